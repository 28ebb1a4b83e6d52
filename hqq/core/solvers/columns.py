"""How a solver walks a grouped matrix: tiles of whole groups, laid out so that groups are columns.

In a tile [rows, columns] a group takes `split` neighbouring columns. What belongs to a group is then one number per
column, every operation runs along contiguous columns, and a tile stays in a core's cache through all passes.

On the CPU a group's result depends on its own values alone, not on its neighbours, the number of threads or the
number of groups: sums run down whole vectors of columns in an order that `rows` and `split` fix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

# With so many numbers in a thread's part of a tile, calling an operation costs little beside it, and the part with its
# scratch space (4 x 256 KiB) stays in the core's second-level cache.
_CPU_TILE_PER_THREAD = 1 << 16
# torch deals operations on 32768 numbers or more out to threads. Where there are few, that gains less than it loses on
# a busy machine: every operation, of some microseconds, would wait for the thread that has to wait for a core.
_SERIAL_TILE = (1 << 15) - 1
_FEW_THREADS, _MOST_THREADS = 3, 16
_DEVICE_TILE = 1 << 26
_LONGEST_COLUMN = 128
# Sums of columns add in one order for whole vectors and in another for what is left over: leave nothing over.
_COLUMN_STEP = 32


@dataclass(frozen=True)
class Layout:
    """`groups` groups of `length` elements as tiles of `width` groups, each in `split` columns of `rows`."""

    groups: int
    length: int
    rows: int
    split: int
    width: int

    @property
    def columns(self) -> int:
        """Columns of a tile, some of them empty."""
        return -(-self.width * self.split // _COLUMN_STEP) * _COLUMN_STEP

    @property
    def padded(self) -> bool:
        """Whether the last column of a group is longer than what is left of the group."""
        return self.rows * self.split > self.length

    def blocks(self) -> Iterator[slice]:
        """Yield the groups of each tile."""
        for begin in range(0, self.groups, self.width):
            yield slice(begin, min(begin + self.width, self.groups))

    def tile(self, groups: Tensor, out: Tensor) -> Tensor:
        """Copy `groups` [g, length] (any strides) into `out` [rows, columns], zero where there is nothing."""
        count = groups.shape[0]
        if self.padded:
            groups = pad(groups, (0, self.rows * self.split - self.length))
        out[:, count * self.split :].zero_()
        # Views, so that strided groups are read once and not copied first.
        columns = torch.unflatten(groups, 1, (self.split, self.rows)).permute(2, 0, 1)
        torch.unflatten(out[:, : count * self.split], 1, (count, self.split)).copy_(columns)
        return out

    def untile(self, tile: Tensor, out: Tensor) -> None:
        """Copy a tile to `out` [g, length] (any strides)."""
        count = out.shape[0]
        groups = torch.unflatten(tile[:, : count * self.split], 1, (count, self.split)).permute(1, 2, 0)
        if self.padded:
            out.copy_(groups.flatten(1)[:, : self.length])
        else:
            torch.unflatten(out, 1, (self.split, self.rows)).copy_(groups)

    def spread(self, per_group: Tensor) -> Tensor:
        """Return `per_group` [..., width] once for every column, [..., columns]; 1 for empty columns."""
        if self.split > 1:
            per_group = per_group.repeat_interleave(self.split, -1)
        missing = self.columns - per_group.shape[-1]
        return pad(per_group, (0, missing), value=1.0) if missing else per_group

    def total_into(self, tile: Tensor, out: Tensor) -> Tensor:
        """Write the sum of each group of a tile to `out` [width], and return it."""
        if self.split == 1 and self.columns == self.width:
            return torch.sum(tile, 0, out=out)
        per_column = tile.sum(0)[: self.width * self.split]
        return torch.sum(per_column.view(self.width, self.split), 1, out=out)

    def total(self, tile: Tensor) -> Tensor:
        """Return the sum of each group of a tile, [width]."""
        return self.total_into(tile, tile.new_empty(self.width))


def plan(groups: int, length: int, device: torch.device) -> Layout:
    """Return the layout for `groups` groups of `length` elements on `device`."""
    rows = length
    if length > _LONGEST_COLUMN:
        rows = next((m for m in range(_LONGEST_COLUMN, 31, -1) if length % m == 0), _LONGEST_COLUMN // 2)
    split = -(-length // rows)
    tile = _cpu_tile(torch.get_num_threads()) if device.type == "cpu" else _DEVICE_TILE
    most = max(tile // rows // _COLUMN_STEP * _COLUMN_STEP // split, 1)
    # Equal tiles: one costs what it holds and what it could hold.
    tiles = -(-groups // most)
    layout = Layout(groups, length, rows, split, -(-groups // tiles))
    # Columns that are empty anyway may as well be groups: nothing has to be padded then.
    return replace(layout, width=max(layout.columns // split, layout.width))


def _cpu_tile(threads: int) -> int:
    if 1 < threads <= _FEW_THREADS:
        return _SERIAL_TILE
    return _CPU_TILE_PER_THREAD * min(threads, _MOST_THREADS)
