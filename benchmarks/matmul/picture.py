"""The pictures of the fused products: bandwidth and time by number of tokens, and tokens per second of a model.

Run: python -m benchmarks.matmul.picture [--products FILE] [--decode FILE] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files: needs no display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.harness import RESULTS

_SHAPE = (28672, 4096)
_COLOURS = {8: "#888888", 4: "#0b6e99", 3: "#5b8c5a", 2: "#d1603d", 1: "#7a5195"}
_PEERS = {"tinygemm": ("torch tinygemm, 4 bit", "^"), "gemlite": ("gemlite, 4 bit", "s")}


def draw_products(results: list[dict[str, Any]], bandwidth: float, gpu: str, path: Path) -> None:
    """Write two pictures side by side to `path`: (bytes over bandwidth) / time, and time, against the number of tokens.

    `results` are rows of `benchmarks.matmul.run`, `bandwidth` in bytes per second.
    """
    rows = [
        row
        for row in results
        if (row["N"], row["K"]) == _SHAPE
        and (row["axis"], row["group_size"], row["dtype"]) == (1, 64, "bfloat16")
    ]
    figure, (fractions, times) = plt.subplots(1, 2, figsize=(12, 4.5), dpi=150, layout="constrained")
    _lines(fractions, rows, lambda row, name: _floor(row, name, bandwidth) / row[name])
    fractions.set_ylabel("fraction of the measured bandwidth")
    fractions.set_ylim(0, 1.05)
    _lines(times, rows, lambda row, name: row[name])
    times.set_ylabel("microseconds")
    times.set_yscale("log", base=2)
    times.yaxis.set_major_formatter("{x:.0f}")
    times.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    figure.suptitle(
        f"Products with a weight {_SHAPE[0]}x{_SHAPE[1]}, bfloat16, groups of 64, {gpu}", fontsize=11
    )
    _save(figure, path)


def _lines(axes: Axes, rows: list[dict[str, Any]], height: Callable[[dict[str, Any], str], float]) -> None:
    """Draw our lines, one for each bit width, and the peers'; `height` takes a row and whose time is meant."""

    def draw(bits: int, name: str, line: str, **style: Any) -> None:
        points = sorted(
            (row["M"], height(row, name)) for row in rows if row["bits"] == bits and row.get(name)
        )
        if points:
            axes.plot(*zip(*points, strict=True), line, **style)

    for bits, colour in _COLOURS.items():
        draw(bits, "ours", "o-", color=colour, label=f"{bits} bit", markersize=4)
    for name, (label, marker) in _PEERS.items():
        draw(4, name, marker, color="#c9a227", label=label, markersize=6)
    draw(4, "cublas", "k--", label="cuBLAS, weight in bfloat16", linewidth=1)
    axes.set_xscale("log", base=2)
    tokens = sorted({row["M"] for row in rows})
    axes.set_xticks(tokens, [str(M) for M in tokens])
    axes.set_xlabel("tokens")
    _bare(axes)


def draw_decoding(results: list[dict[str, Any]], gpu: str, path: Path) -> None:
    """Write bars of tokens per second at batch 1 to `path`, from rows of `benchmarks.decode.run`."""
    rows = sorted(
        (row for row in results if row["batch"] == 1), key=lambda row: float(row["tokens_per_second"])
    )
    figure, axes = plt.subplots(figsize=(8, 3.5), dpi=150, layout="constrained")
    places = range(len(rows))
    bars = axes.barh(
        places,
        [row["tokens_per_second"] for row in rows],
        color=[_COLOURS.get(row["nbits"], "#333333") for row in rows],
    )
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_yticks(places, [_model(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second, batch 1")
    _bare(axes)
    figure.suptitle(f"Decoding, Llama-3-8B shapes, groups of 64, {gpu}", fontsize=11)
    _save(figure, path)


def _floor(row: dict[str, Any], name: str, bandwidth: float) -> float:
    """Return microseconds for the bytes of a product; cuBLAS has the weight in 16 bits."""
    if name != "cublas":
        return float(row["floor"])
    moved: int = 2 * (row["N"] * row["K"] + row["M"] * (row["N"] + row["K"]))
    return moved / bandwidth * 1e6


def _model(row: dict[str, Any]) -> str:
    if row["nbits"] == 16:
        return "bfloat16"
    return f"{row['nbits']} bit, axis {row['axis']}, lm_head {row['lm_head']} bit"


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--products", type=Path, default=RESULTS / "matmul_h200.json")
    parser.add_argument("--decode", type=Path, default=RESULTS / "decode_h200.json")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    if arguments.products.exists():
        content = json.loads(arguments.products.read_text())
        gpu = content["machine"]["gpu"]
        bandwidth = content["bandwidth_bytes_per_second"]
        draw_products(content["results"], bandwidth, gpu, arguments.output / "products.png")
    content = json.loads(arguments.decode.read_text())
    draw_decoding(content["results"], content["machine"]["gpu"], arguments.output / "decoding.png")


if __name__ == "__main__":
    main()
