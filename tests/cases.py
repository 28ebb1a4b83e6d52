"""THE grid of quantisation settings that tests and benchmarks go through: bits, axis, group size, shape, dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

BITS: tuple[float, ...] = (8, 6, 5, 4, 3, 2, 1.58, 1)
AXES: tuple[int, ...] = (1, 0)
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Layout:
    """A weight's shape [N, K] and how it falls into groups; group_size None: whole channels."""

    shape: tuple[int, int]
    group_size: int | None
    why: str


LAYOUTS: tuple[Layout, ...] = (
    Layout((48, 96), 32, "a plain layer, several groups in each row and column"),
    Layout((64, 64), 64, "the usual group size, powers of two"),
    Layout(
        (7, 24),
        8,
        "seven rows of three groups: 21 grouped rows, which fill no byte at 4, 2 or 1 bit on axis 1",
    ),
    Layout((9, 10), 5, "odd group size: ragged packed rows on both axes"),
    Layout((1, 64), 16, "one row"),
    Layout((40, 1), 8, "one column"),
    Layout((6, 10), 12, "groups that cross row ends"),
    Layout((13, 17), None, "whole channels of prime lengths"),
    Layout((11, 6), 1, "groups of one weight"),
    Layout((5, 7), 35, "one group for all"),
)


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    nbits: float
    axis: int
    layout: Layout
    dtype: torch.dtype = torch.float32

    @property
    def id(self) -> str:
        """Readable name, such as 4bit-axis1-gs64-48x96-bf16."""
        gs = "channel" if self.layout.group_size is None else f"gs{self.layout.group_size}"
        N, K = self.layout.shape
        return f"{self.nbits}bit-axis{self.axis}-{gs}-{N}x{K}-{_SHORT[self.dtype]}"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape [N, K] of the weight."""
        return self.layout.shape

    @property
    def group_size(self) -> int | None:
        """Weights per group, None for whole channels."""
        return self.layout.group_size

    def config(self, **weight_params: Any) -> dict[str, Any]:
        """Return the nested configuration; keyword arguments go into weight_quant_params."""
        weight: dict[str, Any] = {
            "nbits": self.nbits,
            "channel_wise": True,
            "group_size": self.group_size,
            "optimize": True,
            "round_zero": self.nbits == 4,
            "axis": self.axis,
            "view_as_float": False,
        }
        return {
            "weight_quant_params": {**weight, **weight_params},
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        }

    def weight(self, rng: torch.Generator, scale: float = 0.02) -> torch.Tensor:
        """Return a fresh random weight [N, K] in the case's dtype."""
        return (torch.randn(self.shape, generator=rng) * scale).to(self.dtype)


def grid(
    bits: tuple[float, ...] = BITS,
    axes: tuple[int, ...] = AXES,
    layouts: tuple[Layout, ...] = LAYOUTS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Iterator[Case]:
    """Yield every combination, or those of the values given."""
    for nbits in bits:
        for axis in axes:
            for layout in layouts:
                for dtype in dtypes:
                    yield Case(nbits, axis, layout, dtype)


# Everything, and the same without dtypes for what does not depend on them.
GRID: tuple[Case, ...] = tuple(grid())
GRID_FP32: tuple[Case, ...] = tuple(grid(dtypes=(torch.float32,)))
# One plain and one ragged layout: for tests that take a second each.
SMALL_GRID: tuple[Case, ...] = tuple(grid(layouts=(LAYOUTS[0], LAYOUTS[2])))


def case_id(case: Case) -> str:
    """Return `case.id`, for pytest.mark.parametrize(..., ids=case_id)."""
    return case.id
