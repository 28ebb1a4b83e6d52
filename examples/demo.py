"""Quantise a trained language model at several bit widths on the CPU, and see what each costs in quality.

Prints one table, keeps one of the models, reloads it, checks that it is the same to the bit, and lets it write a few
lines. The kept checkpoint and a picture of perplexity against size go to `demo-output/`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_plot import draw
from torch import nn
from tqdm import tqdm

from hqq import QuantConfig
from hqq.cli.output import size, table
from hqq.models.checkpoint import load_quantized, save_quantized
from hqq.models.evaluate import Perplexity, perplexity
from hqq.models.load import open_full, open_tokenizer
from hqq.models.quantize import quantize_model
from hqq.models.text import Tokenizer, generate_text

HERE = Path(__file__).resolve().parent
BITS, AXES, GROUP_SIZE = (8, 4, 3, 2), (1, 0), 64
KEPT = (4, 1)  # bits and axis of the model that is kept
DTYPE = torch.float16  # of scales and zeros; more precise than bfloat16, and the range suffices
PROMPT = 'def read_lines(path):\n    """Return the lines of '


@dataclass(frozen=True)
class Row:
    """A model of the table: bits and axis (None: not quantised), size in bytes, seconds that quantising took."""

    nbits: float
    axis: int | None
    effective_bits: float
    size: int
    perplexity: float
    seconds: float

    def cells(self, reference: Row) -> list[str]:
        """Return the row as text."""
        change = self.perplexity / reference.perplexity - 1
        return [
            f"{self.nbits}" if self.axis is not None else "full",
            f"{self.axis}" if self.axis is not None else "-",
            f"{self.effective_bits:.2f}",
            size(self.size),
            f"{self.perplexity:.3f}",
            f"{change:+.2%}" if self.axis is not None else "-",
            f"{self.seconds:.1f}" if self.axis is not None else "-",
        ]


@dataclass(frozen=True)
class Evaluation:
    """What every model is measured on: the first `tokens` tokens of a text (None: all)."""

    tokenizer: Tokenizer
    text: str
    tokens: int | None

    def __call__(self, model: nn.Module) -> Perplexity:
        """Return the perplexity of a copy of `model` that computes in float32, which CPUs are quickest in."""
        model = copy.deepcopy(model).to(torch.float32)
        window = model.config.max_position_embeddings
        # Windows that do not overlap: half the work of the usual overlap, and the same for every model compared.
        options = {"window": window, "stride": window, "max_tokens": self.tokens}
        return perplexity(model, self.tokenizer, self.text, progress=False, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration."""
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(open_tokenizer(args.model), args.text.read_text(encoding="utf-8"), args.tokens)
    full = open_full(args.model)
    bar = tqdm(total=1 + len(BITS) * len(AXES), unit="model", file=sys.stderr)
    with bar, tempfile.TemporaryDirectory() as scratch:
        bar.set_description("full precision")
        measured = evaluation(full)
        reference = _full_row(full, args.model, measured)
        bar.update()
        rows = []
        for axis in AXES:
            for nbits in BITS:
                bar.set_description(f"{nbits} bit, axis {axis}")
                is_kept = (nbits, axis) == KEPT
                folder = _kept_folder(args) if is_kept else Path(scratch) / f"{nbits}-{axis}"
                model, row = _quantise(full, nbits, axis, folder, evaluation)
                rows.append(row)
                if is_kept:
                    kept = model
                bar.update()

    _print_table(reference, rows, measured, args)
    reloaded = _reload(kept, _kept_folder(args), evaluation)
    _write(reloaded, evaluation.tokenizer)
    picture = args.out / "perplexity_vs_size.png"
    series = {
        f"axis {axis}": [
            (f"{row.nbits} bit", row.size / 1e6, row.perplexity) for row in rows if row.axis == axis
        ]
        for axis in AXES
    }
    draw(series, reference=(reference.size / 1e6, reference.perplexity), title=args.model.name, path=picture)
    print(f"\nPerplexity against size: {picture}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=HERE / "stdlib-llama", help="folder of the model")
    parser.add_argument(
        "--text", type=Path, help="text for perplexity (default: heldout.txt beside the model)"
    )
    parser.add_argument("--tokens", type=int, help="use only so many tokens of the text (default: all)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write to")
    args = parser.parse_args(argv)
    args.text = args.text or args.model / "heldout.txt"
    return args


def _kept_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.out / f"{args.model.name}-{KEPT[0]}bit"
    return folder


def _full_row(full: nn.Module, folder: Path, measured: Perplexity) -> Row:
    weights = list({id(p): p for p in full.parameters()}.values())
    bits = 8 * sum(p.numel() * p.element_size() for p in weights) / sum(p.numel() for p in weights)
    return Row(bits, None, bits, _weight_bytes(folder), measured.perplexity, 0.0)


def _quantise(
    full: nn.Module, nbits: float, axis: int, folder: Path, evaluation: Evaluation
) -> tuple[nn.Module, Row]:
    """Quantise a copy of `full`, save it to `folder` and measure it."""
    model = copy.deepcopy(full)
    config = QuantConfig(nbits=nbits, group_size=GROUP_SIZE, axis=axis)
    report = quantize_model(model, config, compute_dtype=DTYPE, device="cpu", progress=False)
    save_quantized(model, folder)
    row = Row(
        nbits,
        axis,
        report.effective_bits,
        _weight_bytes(folder),
        evaluation(model).perplexity,
        report.seconds,
    )
    return model, row


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _print_table(reference: Row, rows: Sequence[Row], measured: Perplexity, args: argparse.Namespace) -> None:
    header = ["bits", "axis", "bits/weight", "checkpoint", "perplexity", "change", "seconds"]
    print(f"\n{args.model.name}: the linear layers of its blocks quantised, group size {GROUP_SIZE}.\n")
    print(table(header, [row.cells(reference) for row in [reference, *rows]]))
    print(
        f"\nbits/weight counts every parameter of the model, scales and zeros included. Perplexity is on "
        f"{measured.tokens} tokens of {args.text.name},\nin consecutive windows of "
        f"{measured.window}; seconds is the time to quantise on the CPU.\n"
    )


def _reload(model: nn.Module, folder: Path, evaluation: Evaluation) -> nn.Module:
    """Return the model of `folder` after checking that it is `model` to the bit: every tensor, and logits."""
    reloaded = load_quantized(folder, device="cpu")
    saved, loaded = model.state_dict(), reloaded.state_dict()
    different = [
        name for name in saved.keys() | loaded.keys() if not _equal(saved.get(name), loaded.get(name))
    ]
    input_ids = torch.tensor([evaluation.tokenizer(evaluation.text[:500])["input_ids"][:64]])
    with torch.inference_mode():
        logits = [m.eval()(input_ids=input_ids).logits for m in (model, reloaded)]
    if different or not torch.equal(*logits):
        raise SystemExit(f"the reloaded model differs from the saved one: {different or 'logits'}")
    print(f"Saved to {folder} and reloaded: {len(saved)} tensors and the logits are the same to the bit.")
    return reloaded


def _equal(a: object, b: object) -> bool:
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.dtype == b.dtype
        and torch.equal(a, b)
    )


def _write(model: nn.Module, tokenizer: Tokenizer) -> None:
    text = generate_text(model, tokenizer, PROMPT, max_new_tokens=96, repetition_penalty=1.1)
    print(f"\nThe reloaded model continues a function:\n\n{textwrap.indent(PROMPT + text, '    ')}")


if __name__ == "__main__":
    main()
