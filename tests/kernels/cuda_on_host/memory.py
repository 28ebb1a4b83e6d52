"""Tensors at the edge of memory: what is read or written behind them is seen."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
# What lies before and behind, out of bounds; costs addresses only.
_GUARD = 256 * _PAGE
# As torch's allocator aligns what it gives; kernels load 16 bytes at a time.
_ALIGNMENT = 256
_CANARY = 0xA5


class Guarded:
    """Memory whose last byte lies (up to alignment) in front of pages that nobody may touch.

    An access beyond that is an error of HostKernel; `check` finds writes into what lies between, and before the tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        aligned = -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
        pages = -(-aligned // _PAGE) * _PAGE
        self._map = mmap.mmap(-1, _GUARD + pages + _GUARD)
        everything = torch.frombuffer(self._map, dtype=torch.uint8)
        for start in (0, _GUARD + pages):
            _protect(everything.data_ptr() + start, _GUARD)
        within = everything[_GUARD : _GUARD + pages].fill_(_CANARY)
        first = pages - aligned
        self._beside = (within[:first], within[first + size :])
        self.tensor = within[first : first + size].view(tensor.dtype).view(tensor.shape)
        self.tensor.copy_(tensor)

    def check(self) -> None:
        """Raise AssertionError if bytes around the tensor have changed."""
        for part in self._beside:
            changed = int((part != _CANARY).sum())
            assert not changed, f"{changed} bytes beside a tensor {tuple(self.tensor.shape)} changed"


@contextmanager
def guarded(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Give copies of the CPU tensors in guarded memory, and check it afterwards."""
    all_of_them = [Guarded(tensor) for tensor in tensors]
    yield [one.tensor for one in all_of_them]
    for one in all_of_them:
        one.check()


def _protect(address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
