"""The demonstration on a tiny untrained model: its table, its checkpoint, its picture, and that it notices a change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import demo
from demo_plot import draw
from matplotlib.image import imread
from torch import nn

from hqq.models.checkpoint import load_quantized
from hqq.models.evaluate import perplexity
from hqq.models.load import open_model, open_tokenizer
from tests.cli.tiny_lm import write_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "tiny", max_position_embeddings=192)
    (folder / "heldout.txt").write_text("def f(x):\n    return x + 1\n" * 20, encoding="utf-8")
    return folder


def rows(table: str) -> dict[tuple[str, str], list[str]]:
    """The table's rows by bits and axis."""
    lines = table.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("----")) + 1
    cells = [line.split() for line in lines[first : first + 9]]
    return {(row[0], row[1]): row[2:] for row in cells}


def test_table_checkpoint_and_picture(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    demo.main(["--model", str(model), "--out", str(out), "--tokens", "200"])
    printed = capsys.readouterr().out
    table = rows(printed)
    assert set(table) == {("full", "-"), *((bits, axis) for bits in "8432" for axis in "10")}
    assert "Perplexity is on 200 tokens" in printed

    text = (model / "heldout.txt").read_text()
    for folder, key in ((model, ("full", "-")), (out / "tiny-4bit", ("4", "1"))):
        expected = perplexity(
            open_model(folder, dtype=torch.float32, device="cpu"),
            open_tokenizer(model),
            text,
            window=192,
            stride=192,
            max_tokens=200,
            progress=False,
        )
        # Columns: bits per weight, size and its unit, perplexity, change, seconds.
        assert float(table[key][3]) == pytest.approx(expected.perplexity, abs=6e-4)
    full, four = float(table[("full", "-")][3]), float(table[("4", "1")][3])
    assert float(table[("4", "1")][4].rstrip("%")) == pytest.approx(100 * (four / full - 1), abs=0.02)
    # The tiny model's weights are float32: 32 bits each before, scales and zeros in float16 after.
    assert table[("full", "-")][0] == "32.00"
    by_bits = [float(table[(bits, "1")][0]) for bits in "8432"]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[0] < 16

    layers = [m for m in load_quantized(out / "tiny-4bit", device="cpu").modules() if hasattr(m, "W_q")]
    assert {layer.meta["nbits"] for layer in layers} == {4}
    assert (out / "tiny-4bit" / "tokenizer.json").is_file()
    assert "logits are the same to the bit" in printed
    height, width, _ = imread(out / "perplexity_vs_size.png").shape
    assert (width, height) == (1200, 750)


def test_a_reloaded_model_that_differs_is_noticed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_with_one_code_changed(folder: Path, device: str) -> nn.Module:
        loaded = load_quantized(folder, device=device)
        layer = next(m for m in loaded.modules() if hasattr(m, "W_q"))
        layer.W_q.data.view(-1)[7] ^= 1
        return loaded

    monkeypatch.setattr(demo, "load_quantized", load_with_one_code_changed)
    monkeypatch.setattr(demo, "BITS", (4,))
    monkeypatch.setattr(demo, "AXES", (1,))
    with pytest.raises(SystemExit, match=r"q_proj\.W_q"):
        demo.main(["--model", str(model), "--out", str(tmp_path / "out"), "--tokens", "50"])


@pytest.mark.parametrize("worst", [12.0, 500.0, 1e6])
def test_the_picture_takes_any_range(worst: float, tmp_path: Path) -> None:
    series = {"axis 1": [("8 bit", 5.2, 11.3), ("2 bit", 3.0, worst)], "axis 0": [("8 bit", 5.2, 11.3)]}
    draw(series, reference=(7.9, 11.3), title="model", path=tmp_path / "picture.png")
    pixels = imread(tmp_path / "picture.png")[..., :3]
    blue, orange = (0x0B, 0x6E, 0x99), (0xD1, 0x60, 0x3D)
    for colour in (blue, orange):
        distance = abs(pixels * 255 - colour).sum(axis=-1)
        assert (distance < 6).sum() > 50
