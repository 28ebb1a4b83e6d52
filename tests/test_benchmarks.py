"""What the benchmarks make of their figures."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.image import imread

from benchmarks.decode.steps import named
from benchmarks.harness import RESULTS
from benchmarks.matmul.picture import draw_decoding, draw_products


def test_products_are_named_by_what_stands_around_them() -> None:
    layer = [None, "attention", "join", None, None, None]
    assert named(["embedding", *layer, *layer, None, "choice"]) == [
        *("embedding", "qkv", "attention", "join", "o", "gate_up", "down"),
        *("qkv", "attention", "join", "o", "gate_up", "down", "lm_head", "choice"),
    ]
    alone = [
        "norm",
        None,
        None,
        "attention",
        None,
        "norm",
        None,
        "activation",
        None,
        None,
        "norm",
        None,
        "choice",
    ]
    assert [name for name, kind in zip(named(alone), alone, strict=True) if kind is None] == [
        *("qkv", "qkv", "o", "gate_up", "down", "down", "lm_head")
    ]
    assert named(["join", None, "norm", None, None, "norm", None, "attention"]) == [
        *("join", "o", "norm", "gate_up", "down", "norm", "qkv", "attention")
    ]
    # Kernels that cannot be told apart, and ones at a place where nothing is expected.
    assert named(["join", None, None, None, "activation"])[1:4] == ["products"] * 3
    assert named(["choice", None, "embedding"])[1] == "other"


def test_pictures(tmp_path: Path) -> None:
    rows = [
        {
            "M": M,
            "N": 28672,
            "K": 4096,
            "bits": bits,
            "axis": 1,
            "group_size": 64,
            "dtype": "bfloat16",
            "floor": 4.0 * bits,
            "ours": 5.0 * bits + M,
            "cublas": 60.0 + M,
            **({"tinygemm": 70.0} if bits == 4 and M == 1 else {}),
        }
        for M in (1, 2, 64)
        for bits in (8, 4, 3, 2, 1)
    ]
    draw_products(rows, 4.3e12, "a GPU", tmp_path / "products.png")
    decoding = json.loads((RESULTS / "decode_h200.json").read_text())["results"]
    draw_decoding(decoding, "a GPU", tmp_path / "decoding.png")
    for name in ("products", "decoding"):
        pixels = imread(tmp_path / f"{name}.png")[..., :3]
        assert (pixels < 0.9).any(-1).mean() > 0.01
