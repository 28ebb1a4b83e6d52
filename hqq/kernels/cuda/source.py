"""The CUDA C++ sources beside this file: their text, the headers they include, and a digest of all of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

FOLDER = Path(__file__).parent

# Sorted (name, value) pairs, each becoming -Dname=value.
Defines: TypeAlias = tuple[tuple[str, str], ...]

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One .cu file and, by the name they are included under, all headers that it reaches."""

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]

    def digest(self, *more: str) -> str:
        """Return a hexadecimal digest of the texts and of `more`."""
        sha = hashlib.sha256()
        for part in (self.name, self.text, *(part for header in self.headers for part in header), *more):
            encoded = part.encode()
            sha.update(len(encoded).to_bytes(8, "little") + encoded)
        return sha.hexdigest()


@cache
def read_source(name: str, folder: Path = FOLDER) -> Source:
    """Return the source `name` of `folder` with its headers, which lie there or beside this file; read only once."""
    text = (folder / name).read_text()
    headers: dict[str, str] = {}
    waiting = [text]
    while waiting:
        for header in _INCLUDE.findall(waiting.pop()):
            if header not in headers:
                own = folder / header
                headers[header] = (own if own.exists() else FOLDER / header).read_text()
                waiting.append(headers[header])
    return Source(name, text, tuple(sorted(headers.items())))


def as_defines(defines: Mapping[str, object]) -> Defines:
    """Return `defines` in the order and form that identifies a compilation; True and False become 1 and 0."""
    return tuple(sorted((name, str(int(v) if isinstance(v, bool) else v)) for name, v in defines.items()))
