"""The arguments of a launch in memory, as the CUDA driver reads them: a table of addresses, one for each value."""

from __future__ import annotations

import ctypes
import struct

from hqq.errors import KernelError

_SLOT = 8
_FORMATS = {"P": "q", "q": "q", "i": "i4x", "f": "f4x"}


class Arguments:
    """Memory for one launch: a slot for each argument, and the table of their addresses that the driver reads."""

    def __init__(self, count: int) -> None:
        self.slots = ctypes.create_string_buffer(max(count, 1) * _SLOT)
        first = ctypes.addressof(self.slots)
        self._table = (ctypes.c_void_p * max(count, 1))(*(first + _SLOT * i for i in range(count)))
        self.address = ctypes.addressof(self._table)


class ArgumentPool:
    """Argument memory of one signature, reused; each thread in a launch holds its own."""

    def __init__(self, signature: str) -> None:
        unknown = set(signature) - set(_FORMATS)
        if unknown:
            raise KernelError(f"got signature {signature!r}; expected letters of {''.join(_FORMATS)}")
        self._count = len(signature)
        self._pack = struct.Struct("=" + "".join(_FORMATS[letter] for letter in signature)).pack_into
        self._free: list[Arguments] = []

    def take(self, args: tuple[int | float, ...]) -> Arguments:
        """Return memory with `args` in it."""
        try:
            arguments = self._free.pop()
        except IndexError:
            arguments = Arguments(self._count)
        self._pack(arguments.slots, 0, *args)
        return arguments

    def give(self, arguments: Arguments) -> None:
        """Take memory back once the driver has copied what it needs, which it has when a launch returns."""
        self._free.append(arguments)
