"""Several layers over one quantised weight: tied weights after quantisation."""

from __future__ import annotations

from torch import Tensor, nn

from hqq.core.embedding import HQQEmbedding
from hqq.core.linear import HQQLinear
from hqq.core.quantized_module import QuantizedModule


def sharing_layer(source: QuantizedModule, replaced: nn.Module) -> QuantizedModule:
    """Return a layer over the very tensors of `source` that takes the place of `replaced`.

    `replaced` is an nn.Embedding, or an nn.Linear whose own bias is kept; a quantised one gives its kind and bias.
    """
    if isinstance(replaced, (nn.Embedding, HQQEmbedding)):
        layer: QuantizedModule = HQQEmbedding(
            padding_idx=replaced.padding_idx, compute_dtype=source.compute_dtype, device=source.device
        )
    else:
        layer = HQQLinear(None, None, compute_dtype=source.compute_dtype, device=source.device)
    layer.quant_config, layer.offload_meta = source.quant_config, source.offload_meta
    layer.W_q = source.W_q
    layer.meta = source.meta
    layer.in_gpu = source.in_gpu
    layer._features_from_shape()
    bias = getattr(replaced, "bias", None)
    if isinstance(bias, Tensor):
        layer.bias = nn.Parameter(bias.detach().to(source.device, source.compute_dtype), requires_grad=False)
    return layer


def share_weight(one: QuantizedModule, other: QuantizedModule) -> bool:
    """Whether the two layers read the same codes."""
    key = one.codes_key()
    return key is not None and key == other.codes_key()
