"""The text of the Python standard library, split by module into training, validation and held-out text.

The split is by name, so that a module and the tests that quote it always fall on the same side, and so that
it stays the same from one Python release to the next.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

HELD_OUT = (
    "argparse", "calendar", "csv", "fractions", "graphlib",
    "heapq", "sched", "shelve", "statistics", "textwrap",
)  # fmt: skip
"""Modules that neither the tokenizer nor the model ever sees, nor their tests (3 % of the text)."""

VALIDATION = ("bisect", "cmd", "colorsys", "copy", "fnmatch", "getopt", "queue", "reprlib", "shlex", "string")
"""Modules, with their tests, that choices made during training (when to stop) may look at."""

SHIPPED_HELD_OUT = (
    "calendar.py", "csv.py", "fractions.py", "graphlib.py", "heapq.py", "sched.py", "shelve.py",
    "statistics.py", "textwrap.py", "test/test_graphlib.py", "test/test_sched.py", "test/test_shelve.py",
)  # fmt: skip
"""The held-out files whose text, joined, is the shipped `heldout.txt`: a CPU scores it in seconds."""

# Installed packages are not the standard library; `data` holds inputs of tests, `pydoc_data` the manual.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "data", "pydoc_data"}
_GENERATED = ("decoding_table", "decoding_map")  # the encodings' 256-entry charmaps
_MIN_LETTER_SHARE = 0.65  # below lie tables: html entities, stringprep, lists of numbers to parse


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the library's root, with `/` between parts, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Three disjoint sets of documents, each in the order of their paths, and the licence they come under."""

    python: str
    licence: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def shipped_text(self) -> str:
        """Text of `heldout.txt`: the files of `SHIPPED_HELD_OUT` that exist, joined in that order."""
        by_path = {document.path: document.text for document in self.held_out}
        return "".join(by_path[path] for path in SHIPPED_HELD_OUT if path in by_path)

    def digest(self) -> str:
        """SHA-256 over split names, paths and texts, in order."""
        state = hashlib.sha256()
        for split in ("train", "validation", "held_out"):
            for document in getattr(self, split):
                for part in (split, document.path, document.text):
                    state.update(part.encode() + b"\0")
        return state.hexdigest()


def split_of(path: str) -> str:
    """Split that a file of the library belongs to: `"train"`, `"validation"` or `"held_out"`."""
    names = {part.removeprefix("test_") for part in PurePosixPath(path).with_suffix("").parts}
    if not names.isdisjoint(HELD_OUT):
        return "held_out"
    return "train" if names.isdisjoint(VALIDATION) else "validation"


def is_prose_or_code(text: str) -> bool:
    """Whether a text reads as source written by hand, rather than as an empty file or a generated table."""
    if not text.strip() or "\0" in text or any(mark in text for mark in _GENERATED):
        return False
    letters = sum(c.isascii() and (c.isalpha() or c.isspace() or c == "_") for c in text)
    return letters >= _MIN_LETTER_SHARE * len(text)


def _documents(root: Path) -> Iterator[Document]:
    seen: set[str] = set()
    for path in sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py")):
        parts = PurePosixPath(path).parts
        # `config-<platform>` and `_sysconfigdata*` are written by Python's build and hold its paths.
        if _SKIPPED_FOLDERS & set(parts[:-1]) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            text = (root / path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            continue  # a test of another source encoding
        if text not in seen and is_prose_or_code(text):
            seen.add(text)
            yield Document(path, text)


def _licence(root: Path) -> str:
    for file in (root / "LICENSE.txt", Path(sys.base_prefix) / "LICENSE.txt"):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return f"{sys.copyright}\n\nPython Software Foundation License Version 2: https://docs.python.org/3/license.html\n"


def collect(root: Path | None = None) -> Corpus:
    """Read and split the standard library under `root` (default: the running interpreter's)."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "held_out": []}
    for document in _documents(root):
        splits[split_of(document.path)].append(document)
    return Corpus(platform.python_version(), _licence(root), **{name: tuple(d) for name, d in splits.items()})


def save(corpus: Corpus, file: Path) -> None:
    """Write a corpus as xz-compressed JSON, to train elsewhere on the same text."""
    content: dict[str, object] = {"python": corpus.python, "licence": corpus.licence}
    for split in ("train", "validation", "held_out"):
        content[split] = {document.path: document.text for document in getattr(corpus, split)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(lzma.compress(json.dumps(content).encode()))


def load(file: Path) -> Corpus:
    """Read a corpus that `save` wrote."""
    content = json.loads(lzma.decompress(file.read_bytes()))
    splits = {
        split: tuple(Document(path, text) for path, text in content[split].items())
        for split in ("train", "validation", "held_out")
    }
    return Corpus(content["python"], content["licence"], **splits)
