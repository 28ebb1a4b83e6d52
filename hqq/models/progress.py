"""Progress bars."""

from __future__ import annotations

from typing import Any


def progress_bar(total: int, description: str, enabled: bool, unit: str = "layer") -> Any:
    """Return a tqdm bar with rate and remaining time; silent if not `enabled` or without a terminal."""
    from tqdm.auto import tqdm

    # disable=None: tqdm draws on a terminal only.
    return tqdm(total=total, desc=description, unit=unit, disable=None if enabled else True)
