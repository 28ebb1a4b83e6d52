"""What the fused decoding step needs to know of a model of the Llama family, and which models it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hqq.errors import BackendError
from hqq.kernels.tiled_gemv import Norm

_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Frequencies of these depend on how long the text is.
_MOVING_ROPE = ("dynamic", "longrope")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its norms, its linear modules, and the window that its attention sees, if any."""

    before_attention: Norm
    before_mlp: Norm
    qkv: tuple[nn.Module, nn.Module, nn.Module]
    o: nn.Module
    gate_up: tuple[nn.Module, nn.Module]
    down: nn.Module
    q_norm: Norm | None
    k_norm: Norm | None
    window: int | None


@dataclass(frozen=True)
class Family:
    """A causal language model of the Llama family, taken apart."""

    embedding: nn.Module
    layers: tuple[Layer, ...]
    norm: Norm
    head: nn.Module
    rotary: nn.Module
    heads: int
    head_size: int
    scale: float
    dtype: torch.dtype
    device: torch.device

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [length, head size] of every position, as the model's own module gives them."""
        positions = torch.arange(length, device=self.device)[None]
        like = torch.zeros(1, dtype=self.dtype, device=self.device)
        cos, sin = self.rotary(like, positions)
        return cos[0].contiguous(), sin[0].contiguous()


def take_apart(model: nn.Module) -> Family:
    """Return the parts of `model`; raises BackendError, saying why, if the fused step would not do what it does."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    # Code that comes with a checkpoint may compute something else under the same names.
    own = f"transformers.models.{kind}.modeling_{kind}"
    if (
        kind not in _TYPES
        or type(model).__module__ != own
        or not type(model).__name__.endswith("ForCausalLM")
    ):
        raise BackendError(
            f"got {type(model).__name__}; the fused decoding step takes transformers' causal language models of the "
            f"types {', '.join(_TYPES)}"
        )
    if getattr(config, "hidden_act", None) not in ("silu", "swish"):
        raise BackendError(
            f"got hidden_act={config.hidden_act!r}; the fused decoding step computes silu only"
        )
    body: Any = model.model
    rope = getattr(body.rotary_emb, "rope_type", "default")
    if rope in _MOVING_ROPE:
        raise BackendError(
            f"got rotary embeddings of type {rope!r}, whose frequencies follow the length of the text"
        )
    device, dtype = _one_place(model), body.norm.weight.dtype
    layers = tuple(_layer(layer, config) for layer in body.layers)
    first: Any = body.layers[0].self_attn
    family = Family(
        embedding=body.embed_tokens,
        layers=layers,
        norm=_norm(body.norm),
        head=model.lm_head,  # type: ignore[arg-type]
        rotary=body.rotary_emb,
        heads=int(config.num_attention_heads),
        head_size=int(first.head_dim),
        scale=float(first.scaling),
        dtype=dtype,
        device=device,
    )
    _check_untouched(model)
    _check_sizes(family)
    return family


def _layer(layer: Any, config: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Layer(
        before_attention=_norm(layer.input_layernorm),
        before_mlp=_norm(layer.post_attention_layernorm),
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        o=attention.o_proj,
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        q_norm=None if q_norm is None else _norm(q_norm),
        k_norm=None if k_norm is None else _norm(k_norm),
        window=_window(attention, config),
    )


def _window(attention: Any, config: Any) -> int | None:
    if config.model_type == "mistral":
        window = getattr(config, "sliding_window", None)
    elif hasattr(attention, "sliding_window"):
        window = attention.sliding_window
    elif getattr(config, "use_sliding_window", False):
        raise BackendError(
            "got a model with sliding windows in a transformers that does not say in which layers"
        )
    else:
        window = None
    return None if window is None else int(window)


def _norm(module: Any) -> Norm:
    return Norm(module.weight, float(module.variance_epsilon))


def _one_place(model: nn.Module) -> torch.device:
    """Return the device of all of the model; raises BackendError if there are several."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) != 1:
        raise BackendError(
            f"got a model on {', '.join(devices)}; the fused decoding step needs it on one device"
        )
    return tensors[0].device


def _check_untouched(model: nn.Module) -> None:
    """Raise BackendError if somebody changed what a module that the fused step passes by does."""
    for name, module in _passed_by(model):
        replaced = "forward" in vars(module) or hasattr(module, "_hf_hook")
        if replaced or module._forward_hooks or module._forward_pre_hooks:
            raise BackendError(
                f"got hooks or a replaced forward on {name or 'the model'}; the fused decoding step would pass them by"
            )


def _passed_by(model: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last in ("", "model", "self_attn", "mlp", "act_fn") or last.endswith("norm") or last.isdecimal():
            yield name, module


def _check_sizes(family: Family) -> None:
    norms = [family.norm]
    for layer in family.layers:
        norms += [n for n in (layer.before_attention, layer.before_mlp, layer.q_norm, layer.k_norm) if n]
    dtypes = {norm.weight.dtype for norm in norms}
    if dtypes != {family.dtype} or family.dtype not in _DTYPES:
        names = ", ".join(sorted(map(str, dtypes)))
        raise BackendError(f"got norms of {names}; expected one of float16, bfloat16 and float32")
    cos, _ = family.rotation(1)
    if cos.shape[-1] != family.head_size or family.head_size % 2:
        raise BackendError(
            f"got rotary embeddings of {cos.shape[-1]} in heads of {family.head_size}; expected whole heads, of even "
            "size"
        )
