"""load_quantized: read a checkpoint into a model, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqq.core.embedding import HQQEmbedding
from hqq.core.experts import ExpertWeight, HQQExperts, experts_as_modules
from hqq.core.linear import HQQLinear
from hqq.core.modules import named_sites, replace_module
from hqq.core.quantized_module import QuantizedModule
from hqq.errors import CheckpointError, CorruptCheckpointError, MissingKeysError, ShapeError
from hqq.models.checkpoint.expected import Slot, check_same, find_slots, match_slots
from hqq.models.checkpoint.layout import CONFIG, detect_format, locate, read_json
from hqq.models.checkpoint.safetensors_source import SafetensorsSource
from hqq.models.checkpoint.skeleton import build_model
from hqq.models.checkpoint.torch_file import TorchSource
from hqq.models.checkpoint.transformers_names import FileSource, RenamedSource, under_names_of
from hqq.models.placement import DeviceMap, Placement, follow_inputs, plan_placement, settle_tensors
from hqq.models.preflight import ErrorsName
from hqq.models.quantization_config import attach_config, describe_model
from hqq.models.quantize import finish_model
from hqq.models.sharing import sharing_layer

ReadableSource = FileSource | RenamedSource


def load_quantized(
    path: str | Path,
    *,
    device: DeviceMap = None,
    compute_dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    cache_dir: str | Path | None = None,
    config_options: dict[str, Any] | None = None,
) -> nn.Module:
    """Return the model of a quantised checkpoint, in either format, from a directory or the hub.

    Args:
        path: directory, or hub id (owner/name).
        device: where to; see `quantize_model`. None: where `model` is, else the CPU.
        compute_dtype: dtype that quantised layers compute in and that the rest is cast to; None: as saved.
        model: the unquantised architecture, with or without weights; its layers are replaced and its other tensors
            overwritten. None builds the transformers model that config.json describes, in eval mode.
        cache_dir: where downloads from the hub go.
        config_options: settings for a transformers config, such as attn_implementation.

    The whole checkpoint is checked against the model, and read, before `model` is changed; nothing stays at random
    values. Raises CheckpointError, CorruptCheckpointError, MissingKeysError or ShapeError.
    """
    directory = locate(path, cache_dir)
    source = open_source(directory)
    if not source.layers:
        raise CheckpointError(
            f"got {directory}, which holds no quantised layer; load it as the full-precision model it is"
        )
    if model is None:
        model = build_model(directory, compute_dtype or _saved_dtype(source), config_options)
    fill_model(model, under_names_of(model, source), device, compute_dtype)
    _describe(model, directory)
    return model


def open_source(directory: Path, mapped: bool = False) -> FileSource:
    """Return the checkpoint in `directory` as a source; `mapped` leaves the tensors of a qmodel.pt on disk."""
    return (
        TorchSource(directory, mapped) if detect_format(directory) == "pt" else SafetensorsSource(directory)
    )


def _saved_dtype(source: FileSource) -> torch.dtype:
    outline = source.layer_outline(min(source.layers))
    return _compute_dtype(outline)


def _compute_dtype(state: Mapping[str, Any]) -> torch.dtype:
    dtype = state.get("compute_dtype")
    return dtype if isinstance(dtype, torch.dtype) else torch.float16


@dataclass
class _Loaded:
    """What was read, not yet in the model."""

    layers: list[tuple[tuple[str, ...], QuantizedModule]] = field(default_factory=list)
    tensors: list[tuple[Slot, Tensor]] = field(default_factory=list)


@torch.no_grad()
def fill_model(
    model: nn.Module, source: ReadableSource, device: DeviceMap, compute_dtype: torch.dtype | None
) -> None:
    """Put the layers and tensors of `source` into `model`; see `load_quantized`."""
    with experts_as_modules(model, source.layers):
        placement = plan_placement(model, device)
        targets = _layer_targets(model, source)
        slots = find_slots(model, targets.values())
        own_bias = {f"{name}.bias" for name in targets if name in source.shared}
        shapes = {
            name: shape
            for name, shape in source.shapes.items()
            if _is_plain(name, source) and name not in own_bias
        }
        filled = match_slots(model, slots, shapes, source.shared)
        loaded = _Loaded()
        _read_layers(loaded, model, source, targets, placement, compute_dtype)
        for name, slot in filled.items():
            loaded.tensors.append((slot, _read_tensor(name, slot, source, placement, compute_dtype)))
        _check_complete(model, loaded, targets)
        for names, layer in loaded.layers:
            replace_module(model, names, layer)
        for slot, tensor in loaded.tensors:
            _assign(slot, tensor)
    settle_tensors(model, placement, compute_dtype)
    follow_inputs(model, placement)
    finish_model(model)


def _is_plain(name: str, source: ReadableSource) -> bool:
    return name in source.units and name not in source.layers


def _layer_targets(model: nn.Module, source: ReadableSource) -> dict[str, nn.Module]:
    """Return the module that each layer of the checkpoint replaces; raises MissingKeysError or ShapeError."""
    by_name = {name: module for module, names in named_sites(model).items() for name in names}
    targets: dict[str, nn.Module] = {}
    aliases = [alias for alias, name in source.shared.items() if name in source.layers]
    for name in [*sorted(source.layers), *aliases]:
        module = by_name.get(name)
        if not isinstance(module, (nn.Linear, nn.Embedding, ExpertWeight, QuantizedModule)) or not name:
            found = f"a {type(module).__name__}" if module is not None else "nothing"
            raise MissingKeysError(
                f"got a quantised layer {name!r} in the checkpoint, but the model has {found} there; "
                "expected nn.Linear, nn.Embedding or fused experts. Nothing was loaded; "
                "use the checkpoint's own architecture"
            )
        if module not in targets.values():
            targets[name] = module
    return targets


def _read_layers(
    loaded: _Loaded,
    model: nn.Module,
    source: ReadableSource,
    targets: Mapping[str, nn.Module],
    placement: Placement,
    compute_dtype: torch.dtype | None,
) -> None:
    sites = named_sites(model)
    done: dict[str, QuantizedModule] = {}
    for name, module in targets.items():
        with ErrorsName(name):
            if name in source.shared:
                layer = sharing_layer(done[source.shared[name]], _with_own_bias(name, module, source))
            else:
                layer = done[name] = _read_layer(name, module, source, placement, compute_dtype)
        layer.train(module.training)
        loaded.layers.append((sites[module], layer))


def _read_layer(
    name: str,
    module: nn.Module,
    source: ReadableSource,
    placement: Placement,
    compute_dtype: torch.dtype | None,
) -> QuantizedModule:
    state = source.layer(name)
    dtype, target = compute_dtype or _compute_dtype(state), placement.device_of(name) or _device_of(module)
    if isinstance(module, (nn.Embedding, HQQEmbedding)):
        layer: QuantizedModule = HQQEmbedding(
            padding_idx=module.padding_idx, compute_dtype=dtype, device=target
        )
    elif isinstance(module, (ExpertWeight, HQQExperts)):
        layer = HQQExperts(compute_dtype=dtype, device=target)
    else:
        layer = HQQLinear(None, None, compute_dtype=dtype, device=target)
    layer.load_state_dict(state, strict=False)
    expected, got = _shape_of(module), tuple(layer.stored_shape())
    if expected is not None and got != expected:
        raise ShapeError(f"got a quantised weight of shape {got}; the model's layer has {expected}")
    if (layer.bias is None) != (getattr(module, "bias", None) is None):
        found, wanted = ("none", "has one") if layer.bias is None else ("one", "has none")
        raise MissingKeysError(f"got {found} for bias in the checkpoint; the model's layer {wanted}")
    return layer


def _shape_of(module: nn.Module) -> tuple[int, ...] | None:
    if isinstance(module, (HQQLinear, HQQEmbedding)):
        return module._declared_shape
    if isinstance(module, HQQExperts):
        return tuple(module.shape)
    weight = module.weight
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _device_of(module: nn.Module) -> torch.device:
    tensor = module.W_q if isinstance(module, QuantizedModule) else module._parameters.get("weight")
    return tensor.device if isinstance(tensor, Tensor) and not tensor.is_meta else torch.device("cpu")


def _with_own_bias(name: str, module: nn.Module, source: ReadableSource) -> nn.Module:
    """Return what `sharing_layer` replaces: an empty layer of the module's kind, with the bias of the checkpoint."""
    if isinstance(module, (nn.Embedding, HQQEmbedding)):
        return module
    shape = _shape_of(module) or (1, 1)
    stand_in = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    has_bias = f"{name}.bias" in source.units
    if has_bias != (getattr(module, "bias", None) is not None):
        raise MissingKeysError(
            f"got {'a' if has_bias else 'no'} bias in the checkpoint, unlike the model's layer"
        )
    if has_bias:
        stand_in.bias = nn.Parameter(source.tensor(f"{name}.bias"), requires_grad=False)
    return stand_in


def _read_tensor(
    name: str, slot: Slot, source: ReadableSource, placement: Placement, compute_dtype: torch.dtype | None
) -> Tensor:
    tensor = source.tensor(name)
    for other in slot.names:
        if other != name and _is_plain(other, source):
            check_same(slot.names[0], tensor, source.tensor(other))
    if tensor.is_floating_point() != slot.tensor.is_floating_point():
        raise CorruptCheckpointError(
            f"{name}: got {tensor.dtype} in the checkpoint; the model's is {slot.tensor.dtype}"
        )
    device = torch.device("cpu") if slot.tensor.is_meta else slot.tensor.device
    device = placement.device_of(slot.names[0].rpartition(".")[0]) or device
    dtype = compute_dtype if compute_dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to(device, dtype)


def _assign(slot: Slot, tensor: Tensor) -> None:
    value = nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad) if slot.is_parameter else tensor
    for module, key in slot.places:
        (module._parameters if slot.is_parameter else module._buffers)[key] = value  # type: ignore[assignment]


def _check_complete(model: nn.Module, loaded: _Loaded, targets: Mapping[str, nn.Module]) -> None:
    """Raise CheckpointError if a tensor would stay without data."""
    have = {id(slot.tensor) for slot, _ in loaded.tensors}
    inside = {id(tensor) for module in targets.values() for tensor in module.parameters(recurse=False)}
    everything = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in everything if tensor.is_meta and id(tensor) not in have | inside]
    if empty:
        raise CheckpointError(
            f"got a model whose {', '.join(empty[:5])} are on the meta device, and a checkpoint without them; build it "
            "inside hqq.models.checkpoint.empty_weights(), which keeps buffers real"
        )


def _describe(model: nn.Module, directory: Path) -> None:
    content = read_json(directory / CONFIG) if (directory / CONFIG).exists() else {}
    described = content.get("quantization_config")
    if not isinstance(described, dict) or described.get("quant_method") != "hqq":
        described = describe_model(model, ("lm_head",))
    attach_config(model, described)
