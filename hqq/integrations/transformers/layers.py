"""Putting quantised layers in the place of a model's own while its weights are being loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hqq.core.config import LegacyConfig
from hqq.core.embedding import HQQEmbedding
from hqq.core.experts import HQQExperts, replace_parameter
from hqq.core.layer_state import missing_keys
from hqq.core.linear import HQQLinear
from hqq.core.quantized_module import QuantizedModule
from hqq.errors import CheckpointError, MissingKeysError, ShapeError
from hqq.models.sharing import sharing_layer


def quantize_parameter(model: nn.Module, name: str, value: Tensor, config: LegacyConfig) -> None:
    """Quantise `value`, which is to be the parameter called `name` of `model`, in its own dtype and on its device."""
    owner, leaf = _owner(model, name)
    dtype, device = value.dtype, value.device
    if isinstance(owner, nn.Linear):
        _check_shape(name, value.shape, owner.weight.shape)
        layer = HQQLinear.from_weights(value, None, config, dtype, device)
        _replace_layer(model, name, layer, owner.bias)
    else:
        _check_shape(name, value.shape, getattr(owner, leaf).shape)
        _put(owner, leaf, HQQExperts.from_weights(value, config, dtype, device))


def load_parameter(model: nn.Module, name: str, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Make the layer that has the parameter `name` the quantised one that `state` (its keys, no prefix) describes."""
    absent = missing_keys(state)
    if absent:
        raise MissingKeysError(
            f"got {name} without {', '.join(absent)}; expected every key of a quantised layer"
        )
    owner, leaf = _owner(model, name)
    device = state["W_q"].device
    if isinstance(owner, QuantizedModule):  # shared with a layer that came first, but with codes of its own
        owner.load_state_dict(state, strict=False)
    elif isinstance(owner, nn.Linear):
        layer = HQQLinear(None, None, compute_dtype=dtype, device=device)
        layer.out_features, layer.in_features = owner.weight.shape
        layer.load_state_dict(state, strict=False)
        _replace_layer(model, name, layer, owner.bias)
    elif isinstance(owner, nn.Embedding):
        table = HQQEmbedding(owner.num_embeddings, owner.embedding_dim, owner.padding_idx, dtype, device)
        table.load_state_dict(state, strict=False)
        _replace_layer(model, name, table, None)
    else:
        experts = HQQExperts(getattr(owner, leaf).shape, dtype, device)
        experts.load_state_dict(state, strict=False)
        _put(owner, leaf, experts)


def can_hold_codes(model: nn.Module, name: str) -> bool:
    """Whether the parameter called `name` can be loaded from codes."""
    owner, leaf = _owner(model, name)
    parameter = owner._parameters.get(leaf)
    is_layer = isinstance(owner, nn.Linear | nn.Embedding) and leaf == "weight"
    return parameter is not None and (is_layer or parameter.ndim == 3)


def _replace_layer(model: nn.Module, name: str, layer: QuantizedModule, bias: nn.Parameter | None) -> None:
    path = name.rpartition(".")[0]
    parent, _, child = path.rpartition(".")
    if bias is not None and layer.bias is None:
        # Still to be loaded: the loader assigns the bias to the new layer, if it finds one there.
        layer.bias = bias
    layer.name = path
    _put(model.get_submodule(parent), child, layer)


def share_tied(model: nn.Module, name: str) -> list[str]:
    """Give the layers whose parameters are tied to `name`, which is loaded, its codes; return those parameters."""
    path = name.rpartition(".")[0]
    loaded = model.get_submodule(path) if path else model
    if not isinstance(loaded, QuantizedModule) or isinstance(loaded, HQQExperts):
        return []
    shared = []
    for other in tied_to(model, name):
        owner, leaf = _owner(model, other)
        if leaf == "weight" and isinstance(owner, nn.Linear | nn.Embedding):
            _replace_layer(
                model,
                other,
                sharing_layer(loaded, owner),
                owner.bias if isinstance(owner, nn.Linear) else None,
            )
            shared.append(other)
    for parameter in (name, *shared):
        _untie(model, parameter)
    return shared


def tied_to(model: Any, name: str) -> set[str]:
    """Return the parameters tied to the one called `name`."""
    ties: Any = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(ties, Mapping):
        ties = _tied_embeddings(model)
    group = {name}
    for pair in ties.items():
        group |= set(pair) if group & set(pair) else set()
    return group - {name}


def _tied_embeddings(model: Any) -> dict[str, str]:
    """Return the output head's weight and the table it is tied to, where the model's configuration says so."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return {}
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    ends = [names.get(module) for module in (model.get_output_embeddings(), model.get_input_embeddings())]
    return {ends[0]: ends[1]} if ends[0] is not None and ends[1] is not None else {}


def _untie(model: nn.Module, name: str) -> None:
    """Forget that the parameter called `name`, which no longer exists, is tied to another one."""
    ties: Any = getattr(model, "all_tied_weights_keys", None)
    if isinstance(ties, dict):
        for key in [key for key, source in ties.items() if name in (key, source)]:
            del ties[key]


def _put(owner: nn.Module, child: str, layer: QuantizedModule) -> None:
    # Or transformers would take it for a layer that still needs its first weights.
    layer._is_hf_initialized = True
    if isinstance(layer, HQQExperts):
        replace_parameter(owner, child, layer)
    else:
        setattr(owner, child, layer)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path), leaf
    except AttributeError:
        raise CheckpointError(f"got {name}, which {type(model).__name__} does not have") from None


def _check_shape(name: str, got: torch.Size, expected: torch.Size) -> None:
    if got != expected:
        raise ShapeError(f"got {name} of shape {tuple(got)}; the model's is {tuple(expected)}")
