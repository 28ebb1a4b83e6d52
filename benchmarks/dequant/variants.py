"""What `explore` measures: for each case the configurations of the kernel that might be fastest there.

`broad` sweeps tile sizes, bursts and overlap. `open_questions` has, for each case that misses its goal, the variants
that would tell why: see docs/kernels.md for the reasons behind each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from hqq.kernels.dequant_config import Config

Shape = tuple[int, int]
LARGE: Shape = (8192, 28672)
SMALL: Shape = (4096, 4096)
_LARGE_RESULT = 1 << 26  # elements


@dataclass(frozen=True)
class Case:
    """One tensor to dequantise, and the configurations to try on it besides the shipped one."""

    shape: Shape
    nbits: int
    axis: int
    configs: tuple[Config, ...]
    group_size: int = 64
    quantised: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def large(self) -> bool:
        """Whether no cache holds the result."""
        return self.shape[0] * self.shape[1] >= _LARGE_RESULT

    @property
    def name(self) -> str:
        """What the case is about, in a few characters."""
        name = f"{self.shape[0]}x{self.shape[1]} {self.nbits}b ax{self.axis}"
        name += f" gs{self.group_size}" if self.group_size != 64 else ""
        name += " quantised" if self.quantised else ""
        return name + (" fp32" if self.dtype == torch.float32 else "")


def broad(shapes: list[Shape], bits: list[int], axes: list[int]) -> list[Case]:
    """Return a case for each shape, bit width and axis, with a sweep of configurations."""
    return [
        Case(shape, nbits, axis, tuple(_sweep(shape, axis)))
        for nbits, axis, shape in product(bits, axes, shapes)
    ]


def _sweep(shape: Shape, axis: int) -> Iterator[Config]:
    large = shape[0] * shape[1] >= _LARGE_RESULT
    return _small(axis) if not large else _rows() if axis == 1 else _columns()


def _small(axis: int) -> Iterator[Config]:
    tiles = ((1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
    for (block, warps), steps in product(tiles, (1, 2) if axis == 1 else (1, 2, 3, 4)):
        for overlap in (2, 4):
            yield Config(block, warps, steps, overlap=overlap)
    for overlap in (0, 1, 3):
        yield Config(2048, 4, 1, overlap=overlap)
    for overlap in (1, 4):
        yield Config(2048, 4, 1, streaming=1, overlap=overlap)


def _rows() -> Iterator[Config]:
    for burst, distance in product((4, 8, 16), (1024, 2048, 3072)):
        yield Config(1024, 4, 1, 0, burst, distance, 1)
    for block, warps, steps in ((2048, 4, 1), (2048, 8, 1), (1024, 4, 2)):
        for burst, distance in ((0, 0), (8, 1024), (16, 1024)):
            yield Config(block, warps, steps, 0, burst, distance, 1)
    for block, warps, burst, phase in (
        (1024, 4, 8, 2048),
        (1024, 4, 4, 1584),
        (1024, 4, 8, 4096),
        (2048, 8, 4, 1024),
    ):
        yield Config(block, warps, 1, 0, burst, phase, 1, phase=phase)
    for streaming, overlap in ((1, 1), (1, 0), (0, 1)):
        yield Config(1024, 4, 1, streaming=streaming, overlap=overlap)


def _columns() -> Iterator[Config]:
    for stripe, steps, (burst, distance) in product((896, 1792, 3584), (1, 2, 4), ((0, 0), (16, 2048))):
        yield Config(1024, 4, steps, stripe, burst, distance if steps == 1 else 1024, 1)
    for burst, distance in product((4, 8, 16), (1024, 2048, 3072)):
        yield Config(1024, 4, 1, 1792, burst, distance, 1)
    yield Config(1024, 4, 1, 1792, streaming=1, overlap=0)
    yield Config(2048, 8, 1, 896, 16, 1024, 1)
    yield Config(1024, 4, 1, 1792, 16, 1024, 1, phase=1024)
    yield Config(1024, 4, 4)


def open_questions() -> list[Case]:
    """Return the cases that miss their goal, most important first."""
    few_fields = tuple(_few_fields())
    columns = tuple(_columns_again(16, 1024))
    wide = tuple(_columns_again(0, 0))
    asked, small_columns = tuple(_small_asked()), tuple(_small_columns())
    return [
        Case(LARGE, 1, 0, columns),
        Case(LARGE, 2, 0, columns),
        Case(LARGE, 1, 1, few_fields),
        Case(LARGE, 4, 0, wide, group_size=32),
        Case(SMALL, 4, 1, tuple(_small_quantised()), quantised=True),
        Case(SMALL, 4, 1, asked),
        Case(SMALL, 8, 1, asked),
        Case(LARGE, 4, 0, wide),
        Case(LARGE, 2, 1, few_fields),
        Case(LARGE, 8, 0, wide),
        Case(SMALL, 1, 1, asked),
        Case(SMALL, 2, 1, asked),
        Case(SMALL, 3, 1, asked),
        Case(SMALL, 4, 0, small_columns),
        Case(SMALL, 4, 0, (*small_columns, small_columns[0]._replace(outer=1)), quantised=True),
        Case(SMALL, 2, 0, small_columns),
        Case(SMALL, 1, 0, small_columns),
        Case(LARGE, 4, 0, tuple(_halved(wide)), dtype=torch.float32),
    ]


def _few_fields() -> Iterator[Config]:
    # Four or eight results for each byte read: how many results are under way at a time?
    phases = Config(2048, 8, 1, 0, 4, 1024, 1, phase=1024)
    for resident in (0, 6, 5):
        yield phases._replace(resident=resident)
    spread, long_phases = Config(1024, 4, 1, 0, 8, 3072, 1), Config(1024, 4, 1, 0, 8, 2048, 1, phase=2048)
    for base, resident in product((spread, long_phases), (0, 10, 8, 5)):
        yield base._replace(resident=resident)


def _columns_again(burst: int, distance: int) -> Iterator[Config]:
    dividing = Config(1024, 4, 1, 1792, burst, distance, 1)
    yield dividing
    base = dividing._replace(grid=1)
    yield base
    for resident in (12, 8, 5):
        yield base._replace(resident=resident)
    # With half as many programs under way, a stripe half as wide still keeps them all within two rows.
    yield base._replace(resident=8, stripe=896)
    yield base._replace(turning=1)
    yield base._replace(turning=1, stripe=3584)
    yield base._replace(streaming=2)
    yield base._replace(overlap=2)
    # Scale and zero read once for two or four rows, at as many results per program.
    for block, warps, steps in ((1024, 4, 2), (512, 2, 2), (512, 2, 4), (256, 1, 4)):
        yield Config(block, warps, steps, 1792 * 1024 // block, streaming=1, grid=1)
    yield Config(512, 2, 2, 3584, 16, 1024, 1, grid=1)
    yield base._replace(burst=0 if burst else 16, distance=0 if burst else 1024)


def _small_quantised() -> Iterator[Config]:
    tiles = ((2048, 4, 2), (2048, 4, 1), (2048, 8, 1), (4096, 8, 2), (1024, 2, 2), (1024, 4, 2))
    for (block, warps, steps), outer in product(tiles, (0, 1)):
        yield Config(block, warps, steps, overlap=4, outer=outer)
    yield Config(2048, 4, 2, streaming=1, overlap=4, outer=1)
    yield Config(2048, 4, 2, overlap=3, outer=1)
    yield Config(2048, 4, 2, overlap=2)


def _small_asked() -> Iterator[Config]:
    for block, warps, steps in (
        (2048, 4, 2),
        (2048, 4, 1),
        (2048, 8, 1),
        (1024, 4, 1),
        (1024, 2, 1),
        (1024, 2, 2),
    ):
        yield Config(block, warps, steps, overlap=4)
    yield Config(2048, 4, 1, overlap=2)
    yield Config(2048, 4, 1, streaming=1, overlap=4)


def _small_columns() -> Iterator[Config]:
    for block, warps, steps in ((1024, 4, 3), (1024, 4, 2), (2048, 8, 2), (2048, 8, 1)):
        yield Config(block, warps, steps, overlap=4, grid=1)
    yield Config(2048, 8, 2, overlap=2, grid=1)


def _halved(configs: tuple[Config, ...]) -> Iterator[Config]:
    # The same number of results for each thread, twice as wide.
    for config in configs:
        yield config._replace(block=config.block // 2, stripe=config.stripe * 2)
