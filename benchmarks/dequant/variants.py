"""What `explore` measures: for each case the configurations of the kernel that might be fastest there."""

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


def sweep(shapes: list[Shape], bits: list[int], axes: list[int]) -> list[Case]:
    """Return a case for each shape, bit width and axis."""
    return [
        Case(shape, nbits, axis, tuple(_configs(shape, axis)))
        for nbits, axis, shape in product(bits, axes, shapes)
    ]


def _configs(shape: Shape, axis: int) -> Iterator[Config]:
    large = shape[0] * shape[1] >= _LARGE_RESULT
    return _small(axis) if not large else _rows() if axis == 1 else _columns()


def _small(axis: int) -> Iterator[Config]:
    tiles = ((1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
    for (block, warps), steps in product(tiles, (1, 2) if axis == 1 else (1, 2, 3, 4)):
        for overlap in (2, 3):
            yield Config(block, warps, steps, overlap=overlap)
    for overlap in (0, 1):
        yield Config(2048, 4, 1, overlap=overlap)
    for overlap in (1, 3):
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
