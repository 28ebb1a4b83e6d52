"""The operations on files that writing a checkpoint is made of."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV)
_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS


class Disk:
    """Everything a save does to the file system, one method each, so that a test can stop it at any of them."""

    def make_directory(self, path: Path) -> None:
        """Create a directory."""
        path.mkdir()

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file."""
        path.write_text(text, encoding="utf-8")

    def write_tensors(self, path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a safetensors file."""
        save_file(tensors, str(path), metadata=dict(metadata))

    def write_torch(self, path: Path, value: Any) -> None:
        """Write a file of torch.save."""
        torch.save(value, path)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name (a copy where the file system has no links); a symbolic link is copied as one."""
        if source.is_symlink():
            target.symlink_to(source.readlink())
            return
        try:
            target.hardlink_to(source)
        except OSError:
            shutil.copy2(source, target)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file."""
        shutil.copyfile(source, target)

    def sync(self, path: Path) -> None:
        """Wait until a file or directory has reached the disk."""
        if os.name == "nt" and path.is_dir():
            return  # directories cannot be opened there
        handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Rename; an empty directory at `target` is replaced."""
        source.replace(target)

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two directories in one step; False, with nothing done, where the system cannot."""
        return _exchange(os.fsencode(one), os.fsencode(other))

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and what is in it."""
        shutil.rmtree(path)


def _exchange(one: bytes, other: bytes) -> bool:
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(one, other, ctypes.c_uint(_EXCHANGE))
    elif sys.platform == "linux" and hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, ctypes.c_uint(_EXCHANGE))
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), os.fsdecode(other))
