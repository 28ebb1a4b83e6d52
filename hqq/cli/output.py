"""What a command gives back, as JSON and as text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Output:
    """Result of a command: `data` is JSON-able but for numbers that are not finite, `text` the same for people."""

    data: dict[str, Any]
    text: str

    def as_json(self) -> str:
        """Return one JSON object; numbers that are not finite, which JSON does not have, become null."""
        return json.dumps(_finite(self.data), indent=2, allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return aligned columns under `header`: the first `left` ones flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def size(count: int) -> str:
    """Return a number of bytes in the decimal unit that fits it: 999 B, 8.01 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def number(value: float) -> str:
    """Return a number with four significant digits, without an exponent where it is of ordinary size."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3e}"
