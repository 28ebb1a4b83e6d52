"""The study as a picture: divergence against size, the solvers side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

FILES = ("quality.json", "quality_group_sizes.json", "quality_calibration.json")
# By solver and calibration.
STYLES = {
    ("minmax", "none"): ("min-max rounding", "#999999"),
    ("hqq", "none"): ("hqq (the original's)", "#d1603d"),
    ("als", "none"): ("als (default)", "#0b6e99"),
    ("als", "self"): ("als, self-calibrated", "#2f9e44"),
}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a picture of `rows`: KL against bits per weight, a panel for each axis.

    A line joins the group sizes of one solver and calibration at one number of bits. Bit widths that take no less
    memory than a better one (6 and 5 bits are stored as 8, 1.58 as 2) and whole channels are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [
        row
        for row in rows
        if row["nbits"] in (4, 3, 2) and row["group_size"] != "channel" and not row.get("seed")
    ]
    axes = sorted({row["axis"] for row in shown}, reverse=True)
    figure, panels = pyplot.subplots(1, len(axes), figsize=(4.8 * len(axes), 3.8), sharey=True, squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        for (solver, calibration), (label, colour) in STYLES.items():
            for nbits in (4, 3, 2):
                wanted = (axis, solver, calibration, nbits)
                points = sorted(
                    {
                        row["bits_per_weight"]: row["kl"]
                        # Earlier files win: they have more windows.
                        for row in reversed(shown)
                        if (row["axis"], row["solver"], row.get("calibration", "none"), row["nbits"])
                        == wanted
                    }.items()
                )
                if points:
                    named = label if nbits == 4 else None
                    panel.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=named)
        panel.set_yscale("log")
        panel.set_xlabel("bits per weight, scale and zero included")
        panel.set_title(f"axis {axis}: 4, 3 and 2 bits in groups of 32, 64, 128", fontsize=9)
        panel.grid(True, which="major", alpha=0.3)
    panels[0][0].set_ylabel("KL(full ‖ quantised), nats a token")
    panels[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", default=[RESULTS / name for name in FILES])
    arguments = parser.parse_args()
    draw(
        [row for file in arguments.data for row in json.loads(file.read_text())["results"]], arguments.picture
    )
