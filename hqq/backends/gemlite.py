"""gemlite's kernels: as a backend of HQQLinear, and, under the original's path, as the module that replaces it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hqq.backends.foreign import ForeignWeight, why_not_groups, why_not_there
from hqq.core.linear import HQQLinear
from hqq.core.lora import HQQLinearLoRA
from hqq.core.prepared import plain
from hqq.core.qtensor import QSpec, QTensor
from hqq.errors import BackendError

# Bits of a code as stored here -> as gemlite takes them.
_BITS = {8: 8, 4: 4, 3: 4, 2: 2, 1: 1}
_MULTIPLE = 32
# Its tiles are at least 32 inputs deep and read one scale each: smaller groups, and those that are no power of two,
# would get the scale of a neighbour. At 1 bit the tiles for few tokens are two packed words, 64 inputs, deep.
_SMALLEST_GROUP = {8: 32, 4: 32, 2: 32, 1: 64}
# For 5 to 63 tokens up to four workers take turns at tiles of up to 256 inputs, and what is left over after the last
# round reads scales beyond the end: numbers there that are no numbers would become part of the sums.
_TURNS, _DEEPEST_TILE = 4, 256


class GemliteWeight(ForeignWeight):
    """A weight in a layer of gemlite's, which is no child of this module: it has another idea of its state.

    For few tokens gemlite adds up parts of a sum as they come, rounded to the layer's dtype each time: results differ
    from call to call in the last bits, and in bfloat16 those of long sums are coarse.
    """

    backend = "gemlite"

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        super().__init__(q, dtype)
        flat = plain(q, dtype)
        assert q.spec.format is not None
        codes = flat.spec.grouping.ungroup(flat.codes(torch.uint8)).contiguous()
        # gemlite asks for the GPU's properties without saying of which, and calls its kernels there.
        with torch.cuda.device(q.device):
            made = _processor()(device=str(q.device), dtype=dtype).from_weights(
                W_q=codes,
                scales=flat.scale,
                zeros=flat.zero,
                W_nbits=_BITS[q.spec.format.bits],
                group_size=q.spec.grouping.length,
                bias=None,
            )
        self._layers: tuple[nn.Module, ...] = (made,)

    @property
    def nbytes(self) -> int:
        """Bytes that gemlite keeps on the device."""
        layer = self._layers[0]
        return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))

    def multiply(self, x: Tensor) -> Tensor:
        layer = self._layers[0]
        y: Tensor
        if torch.compiler.is_compiling():  # compiled code runs on the device of its tensors
            y = layer(x)
        else:
            with torch.cuda.device(x.device):
                y = layer(x)
        return y


class GemliteBackend:
    """8 to 1 bits (5 and 6 kept as 8, 3 as 4), axis 1, float16 and bfloat16; needs a GPU even to be imported."""

    name = "gemlite"

    def available(self) -> str | None:
        return why_not_there("gemlite", "pip install gemlite")

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        reason = why_not_groups("gemlite", spec, device)
        if reason is not None:
            return reason
        if compute_dtype not in (torch.float16, torch.bfloat16):
            return f"gemlite is used in float16 and bfloat16, not in {compute_dtype}"
        assert spec.format is not None
        return _why_not_shape(spec.shape, spec.grouping.length, _BITS[spec.format.bits])

    def prepare(self, q: QTensor, dtype: torch.dtype) -> GemliteWeight:
        return GemliteWeight(q, dtype)


MATMUL = GemliteBackend()


def _why_not_shape(shape: tuple[int, ...], group_size: int, bits: int) -> str | None:
    K = shape[1]
    if any(extent % _MULTIPLE for extent in shape):
        return f"gemlite takes multiples of {_MULTIPLE} outputs and inputs, not {shape}"
    reason = _why_not_group(group_size, K, bits)
    if reason is not None:
        return reason
    round_ = max(_TURNS * min(group_size, _DEEPEST_TILE), _DEEPEST_TILE)
    if K % round_:
        return f"gemlite takes multiples of {round_} inputs with groups of {group_size}, not {K}"
    return None


def _why_not_group(group_size: int, K: int, bits: int) -> str | None:
    power_of_two = group_size & (group_size - 1) == 0
    if group_size != K and (not power_of_two or group_size < _SMALLEST_GROUP[bits]):
        return (
            f"gemlite takes groups of {_SMALLEST_GROUP[bits]} and larger powers of two at {bits} bits, not of "
            f"{group_size}"
        )
    return None


def patch_hqq_to_gemlite(layer: nn.Module, patch_params: Any = None) -> nn.Module:
    """Return gemlite's layer in place of an HQQLinear (or inside an HQQLinearLoRA); others come back as they are.

    patch_params is there for `patch_linearlayers` and is not used. The HQQLinear is empty afterwards. Raises
    BackendError if gemlite is not there or does not take the layer; the layer is as it was then.
    """
    hqq_layer = layer.linear_layer if isinstance(layer, HQQLinearLoRA) else layer
    if not isinstance(hqq_layer, HQQLinear):
        return layer
    processor = _processor()
    _check(hqq_layer)
    new: nn.Module = processor(device=str(hqq_layer.device)).from_hqqlinear(hqq_layer)
    if isinstance(layer, HQQLinearLoRA):
        layer.linear_layer = new
        return layer
    return new


def _processor() -> Any:
    try:
        from gemlite.helper import A16Wn
    except ImportError as error:
        raise BackendError(f"got no gemlite ({error}); pip install gemlite, or use another backend") from None
    except (AssertionError, RuntimeError) as error:  # it asks for the GPU's properties when it is imported
        raise BackendError(
            f"got a gemlite that cannot be imported here ({error}); it needs a GPU, use another backend"
        ) from error
    return A16Wn


def _check(layer: HQQLinear) -> None:
    spec = layer.qtensor().spec
    if spec.axis != 1:
        raise BackendError(f"got a layer with axis={spec.axis}; gemlite takes axis=1 only")
    if spec.nbits not in (8, 4, 2, 1):
        raise BackendError(f"got a layer of {spec.nbits:g} bits; gemlite takes 8, 4, 2 and 1")
    meta = layer.meta
    assert meta is not None
    if meta["quant_scale"] or meta["quant_zero"]:
        raise BackendError("got a layer whose scale or zero is quantised; gemlite takes plain ones")
    reason = _why_not_group(spec.grouping.length, spec.shape[1], int(spec.nbits))
    if reason is not None:
        raise BackendError(f"got a layer with group_size={spec.group_size}: {reason}")
