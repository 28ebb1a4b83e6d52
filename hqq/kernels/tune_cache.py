"""Measured choices on disk: one JSON file for each GPU model, Triton version and release of this package."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Return the folder of measured choices: HQQ_CACHE_DIR, or hqq under XDG_CACHE_HOME, or ~/.cache/hqq."""
    override = os.environ.get("HQQ_CACHE_DIR")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hqq"


class TuneCache:
    """The choices of one kernel for one `identity` (GPU model and versions), read once and written through."""

    def __init__(self, kernel: str, identity: str) -> None:
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", identity).strip("-")
        self.path = cache_folder() / f"{kernel}-{slug}.json"
        self._choices: dict[str, list[int]] | None = None

    def get(self, key: str) -> tuple[int, ...] | None:
        """Return the choice kept under `key`, or None."""
        if self._choices is None:
            self._choices = self._read()
        choice = self._choices.get(key)
        return None if choice is None else tuple(choice)

    def put(self, key: str, choice: tuple[int, ...]) -> None:
        """Keep `choice` under `key`, in memory and on disk; a folder that cannot be written costs a warning only."""
        # Read again: another process may have added to the file since.
        self._choices = {**self._read(), **(self._choices or {}), key: list(choice)}
        try:
            self._write(self._choices)
        except OSError as error:
            warnings.warn(
                f"could not keep tuned tile sizes in {self.path} ({error})", RuntimeWarning, stacklevel=2
            )

    def _read(self) -> dict[str, list[int]]:
        try:
            content = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            return self._ignored(str(error))
        if not isinstance(content, dict) or not all(_is_choice(value) for value in content.values()):
            return self._ignored("not a table of integers")
        return content

    def _ignored(self, why: str) -> dict[str, list[int]]:
        message = f"ignoring the tuned tile sizes in {self.path} ({why}); delete the file or tune again"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return {}

    def _write(self, choices: dict[str, list[int]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, so that a reader never sees half a file.
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(choices, file, indent=1, sort_keys=True)
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _is_choice(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)
