"""What quantising a model did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hqq.core.modules import named_sites
from hqq.core.quantized_module import QuantizedModule


@dataclass(frozen=True)
class LayerRow:
    """One quantised layer.

    bytes: codes, scale, zero and bias together. error: Frobenius norm of (W - dequantised) over that of W, or None
    if it was not asked for or is not known. seconds: time that the host spent on it (0 for a layer read from
    a file); a GPU that holds the weight may still be at it.
    shared_with: name of the layer whose tensors this one uses; its bytes are counted there.
    output_error_before, output_error: of a calibrated layer, error of the outputs for the inputs it was calibrated
    with, relative to their norm: of the data-free solution and of the one that is used; None if no inputs were seen.
    fallback: why the data-free solution is used although there was calibration.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbits: float
    group_size: int | None
    axis: int
    bytes: int
    error: float | None = None
    seconds: float = 0.0
    shared_with: str | None = None
    output_error_before: float | None = None
    output_error: float | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class LeftRow:
    """One module with weights that were not quantised, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class QuantizationReport:
    """The layers quantised, what was left and why, and totals.

    weights: number of the model's parameters before. bytes: of all parameters after, with scales and zeros.
    """

    layers: tuple[LayerRow, ...]
    left: tuple[LeftRow, ...]
    weights: int
    bytes: int
    seconds: float

    @property
    def effective_bits(self) -> float:
        """Bits per weight of the whole model: everything stored, over all parameters it had."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    @property
    def fallbacks(self) -> dict[str, str]:
        """Layers that calibration left at the data-free solution, and why."""
        return {row.name: row.fallback for row in self.layers if row.fallback is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-able dict."""
        return {**asdict(self), "effective_bits": self.effective_bits}

    def __str__(self) -> str:
        count = sum(row.output_error is not None and row.fallback is None for row in self.layers)
        calibrated = f", {count} of them calibrated" if count else ""
        return (
            f"{len(self.layers)} layers quantised{calibrated}, {len(self.left)} modules with weights left; "
            f"{self.weights:,} weights in {self.bytes:,} bytes, {self.effective_bits:.3f} bits per weight; "
            f"{self.seconds:.1f} s"
        )


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of every parameter of `model`, scales and zeros included, shared ones once."""
    seen: set[object] = set()
    total = 0
    for module in named_sites(model):
        sizes: list[tuple[object, int]] = [
            (id(p), p.nbytes) for p in module._parameters.values() if p is not None
        ]
        if isinstance(module, QuantizedModule) and module.is_initialized():
            q = module.qtensor()
            bias = module.bias
            sizes = [(module.codes_key(), q.nbytes)]
            sizes += [(id(bias), bias.nbytes)] if bias is not None else []
        for key, size in sizes:
            total += 0 if key in seen else size
            seen.add(key)
    return total
