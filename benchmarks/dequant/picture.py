"""The picture of the dequantisation times: fraction of the bandwidth, ours and the others'.

Run: python -m benchmarks.dequant.picture [--results FILE] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files: needs no display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.harness import RESULTS

_SHAPE = "8192x28672"
_SERIES = {
    "ours": ("this library", "#0b6e99"),
    "seed_kernel": ("seed kernel", "#5b8c5a"),
    "original_compiled": ("hqq 0.2.8, torch.compile", "#d1603d"),
    "aten": ("hqq 0.2.8, CUDA extension", "#7a5195"),
    "original": ("hqq 0.2.8, eager", "#888888"),
}
_BITS = (8, 4, 3, 2, 1)


def draw(results: list[dict[str, Any]], gpu: str, path: Path) -> None:
    """Write bars of floor over time for each bit width, one panel per axis, to `path`."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), dpi=150, sharey=True, layout="constrained")
    for axis, axes in zip((1, 0), panels, strict=True):
        rows = {
            row["nbits"]: row
            for row in results
            if (row["shape"], row["axis"], row["group_size"], row["dtype"]) == (_SHAPE, axis, 64, "bfloat16")
            and not row["quant_zero"]
        }
        _panel(axes, rows, f"axis {axis}")
    panels[0].set_ylabel("fraction of the measured bandwidth")
    handles, labels = panels[1].get_legend_handles_labels()  # the CUDA extension has no axis 1
    panels[0].legend(handles, labels, frameon=False, fontsize=8, ncols=2, loc="upper left")
    figure.suptitle(f"Dequantising {_SHAPE} to bfloat16, groups of 64, {gpu}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _panel(axes: Axes, rows: dict[int, dict[str, Any]], title: str) -> None:
    width = 0.8 / len(_SERIES)
    for i, (key, (label, colour)) in enumerate(_SERIES.items()):
        present = [(x, rows[bits]) for x, bits in enumerate(_BITS) if rows[bits].get(key)]
        places = [x + (i - (len(_SERIES) - 1) / 2) * width for x, _ in present]
        axes.bar(places, [row["floor"] / row[key] for _, row in present], width, color=colour, label=label)
    axes.set_xticks(range(len(_BITS)), [f"{bits} bit" for bits in _BITS])
    axes.set_ylim(0, 1.25)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.axhline(1, color="#555555", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(title, fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "dequant_h200.json")
    parser.add_argument("--output", type=Path, default=Path("docs/images/dequant.png"))
    arguments = parser.parse_args()
    content = json.loads(arguments.results.read_text())
    draw(content["results"], content["machine"]["gpu"], arguments.output)


if __name__ == "__main__":
    main()
