"""The picture of the demonstration: perplexity against the size of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files: needs no display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Point = tuple[str, float, float]  # label, megabytes, perplexity

_COLOURS = ("#0b6e99", "#d1603d", "#5b8c5a", "#7a5195")
_GREY = "#555555"


def draw(
    series: Mapping[str, Sequence[Point]], reference: tuple[float, float], title: str, path: Path
) -> None:
    """Write a picture to `path`, one line per series over logarithmic axes.

    reference is (megabytes, perplexity) of the model in full precision.
    """
    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    axes.set_xscale("log")
    axes.set_yscale("log")
    megabytes, perplexity = reference
    axes.axhline(perplexity, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.plot([megabytes], [perplexity], "D", color=_GREY, markersize=7, label="full precision", zorder=3)
    for (name, points), colour, marker in zip(series.items(), cycle(_COLOURS), cycle("os^v")):
        _, sizes, perplexities = zip(*sorted(points, key=lambda point: point[1]), strict=True)
        axes.plot(
            sizes, perplexities, f"{marker}-", color=colour, linewidth=1.8, markersize=6, label=name, zorder=2
        )
    _label_points(axes, [point for points in series.values() for point in points])
    _frame(axes, title)
    figure.savefig(path)
    plt.close(figure)


def _label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write each label once, below and left of all its points: falling curves leave that side free."""
    corners: dict[str, tuple[float, float]] = {}
    for label, megabytes, perplexity in points:
        x, y = corners.get(label, (megabytes, perplexity))
        corners[label] = (min(x, megabytes), min(y, perplexity))
    for label, corner in corners.items():
        axes.annotate(
            label,
            corner,
            xytext=(-6, -6),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9.5,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )


def _frame(axes: Axes, title: str) -> None:
    axes.margins(x=0.12, y=0.15)
    axes.autoscale_view()
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        steps = (
            (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
            if high / low < 10
            else (1, 2, 5)
            if high / low < 1e3
            else (1,)
        )
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("checkpoint size [MB]")
    axes.set_ylabel("perplexity on held-out text (lower is better)")
    axes.set_title(f"{title}: what fewer bits cost")
    axes.grid(True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
