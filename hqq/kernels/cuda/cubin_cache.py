"""Compiled kernels on disk, beside the tuned choices: each file is a digest followed by the machine code it is of."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

from hqq.kernels.tune_cache import cache_folder

_DIGEST_BYTES = hashlib.sha256().digest_size


def path_of(name: str) -> Path:
    """Return the file that keeps the machine code called `name`."""
    return cache_folder() / "cubin" / f"{name}.cubin"


def read(name: str) -> bytes | None:
    """Return the machine code kept under `name`; None if there is none, or if the file is damaged."""
    try:
        content = path_of(name).read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def write(name: str, code: bytes) -> None:
    """Keep `code` under `name`; a folder that cannot be written costs a warning only."""
    path = path_of(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, hashlib.sha256(code).digest() + code)
    except OSError as error:
        warnings.warn(f"could not keep a compiled kernel in {path} ({error})", RuntimeWarning, stacklevel=3)


def _replace(path: Path, content: bytes) -> None:
    # Renamed into place, so that a reader never sees half a file.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
