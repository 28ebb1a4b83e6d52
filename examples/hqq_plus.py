"""HQQ+: quantise a trained language model to 2 bits, then train low-rank adapters that win quality back.

    python examples/hqq_plus.py [--device cuda] [--minutes 3]

prints the perplexity on held-out text at full precision, quantised, and with adapters. The adapters learn on the
Python standard library, the text that the model was trained on, to predict what the full-precision model predicts.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import stdlib_corpus
import torch
from stdlib_training import CONTEXT, rate_at, windows
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from hqq import QuantConfig
from hqq.cli.output import table
from hqq.core.devices import resolve_device
from hqq.core.peft import PeftUtils
from hqq.models.evaluate import perplexity
from hqq.models.load import open_full, open_tokenizer
from hqq.models.quantize import quantize_model
from hqq.models.text import Tokenizer

HERE = Path(__file__).resolve().parent
STRIDE = 768  # of windows of 1024, as in demo.py: a third less work than half a window


@dataclass(frozen=True)
class Run:
    """What training did: optimiser steps, tokens seen, seconds."""

    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """A model of the table: bits per weight of its blocks' linear layers, and perplexity on held-out text."""

    name: str
    bits: float
    perplexity: float


def main(argv: Sequence[str] | None = None) -> None:
    """Quantise, train, and print one table."""
    args = _arguments(argv)
    tokenizer, text = open_tokenizer(args.model), args.text.read_text(encoding="utf-8")
    rows: list[Measured] = []

    def measure(name: str, bits: float, candidate: nn.Module) -> None:
        options = {"stride": STRIDE, "max_tokens": args.tokens, "progress": sys.stderr.isatty()}
        found = perplexity(candidate, tokenizer, text, **options)
        print(
            f"{name}: perplexity {found.perplexity:.3f} on {found.tokens} tokens, {found.seconds:.1f} s",
            flush=True,
        )
        rows.append(Measured(name, bits, found.perplexity))

    full = open_full(args.model, progress=False)
    full_bits = 8 * next(full.parameters()).element_size()
    full = full.float().to(args.device)
    measure("full precision", full_bits, full)

    model = copy.deepcopy(full)
    config = QuantConfig(nbits=args.nbits, group_size=args.group_size, axis=args.axis)
    report = quantize_model(model, config, compute_dtype=torch.float16, progress=False)
    model.to(torch.float32)  # scales and zeros keep their 16-bit values
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    bits = 8 * sum(layer.bytes for layer in report.layers) / weights
    measure(f"{args.nbits:g} bit", bits, model)

    torch.manual_seed(args.seed)
    settings = {"lora_type": "default", "r": args.rank, "lora_alpha": 2 * args.rank, "dropout": 0.0}
    PeftUtils.add_lora(model, settings, verbose=False)
    stream = training_tokens(tokenizer, args.steps * args.batch_size * CONTEXT, args.seed).to(args.device)
    run = train(model, full, stream, args)
    PeftUtils.cast_lora_weights(model, torch.float16, verbose=False)
    if args.save is not None:
        PeftUtils.save_lora_weights(model, args.save, verbose=False)
    adapter_bits = 16 * sum(p.numel() for p in model.parameters() if p.requires_grad) / weights
    PeftUtils.cast_lora_weights(model, torch.float32, verbose=False)
    measure(f"{args.nbits:g} bit with adapters", bits + adapter_bits, model)
    _print_results(rows, run, args)


def training_tokens(tokenizer: Tokenizer, count: int, seed: int) -> torch.Tensor:
    """Return at least `count` tokens (or all) of modules drawn at random from the training split, int64 [tokens]."""
    documents = stdlib_corpus.collect().train
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens: list[int] = []
    for index in order:
        tokens += [tokenizer.bos_token_id, *tokenizer(documents[index].text, verbose=False)["input_ids"]]  # type: ignore[attr-defined]
        if len(tokens) >= max(count, 3 * CONTEXT):
            break
    return torch.tensor(tokens)


def train(model: nn.Module, teacher: nn.Module, stream: torch.Tensor, args: argparse.Namespace) -> Run:
    """Train what is trainable in `model` to predict as `teacher` does, until the steps or the minutes are over."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    batches = windows(stream, args.batch_size, torch.Generator().manual_seed(args.seed))
    model.train()
    started, steps, tokens = time.monotonic(), 0, 0
    with tqdm(total=args.steps, desc="train adapters", unit="step", mininterval=1.0) as bar:
        for progress in _progress(args.steps, 60 * args.minutes):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(progress, args.rate)
            window = next(batches)
            loss = distillation_loss(model, teacher, window[:, :-1])
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps, tokens = steps + 1, tokens + window[:, 1:].numel()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    return Run(steps, tokens, time.monotonic() - started)


def _progress(steps: int, seconds: float) -> Iterator[float]:
    """Yield the share of the run that is over, for each step, until the steps or the seconds are used up."""
    started = time.monotonic()
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - started) / seconds)
        if progress >= 1:
            return
        yield progress


def distillation_loss(model: nn.Module, teacher: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || model) per token, in nats: how far the model's predictions are from the teacher's."""
    with torch.no_grad():
        target = F.log_softmax(teacher(input_ids=inputs, use_cache=False).logits.float(), dim=-1)
    own = F.log_softmax(model(input_ids=inputs, use_cache=False).logits.float(), dim=-1)
    return F.kl_div(own.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")


def _print_results(rows: Sequence[Measured], run: Run, args: argparse.Namespace) -> None:
    full, quantised, adapted = (math.log(row.perplexity) for row in rows)
    cells = [[row.name, f"{row.bits:.2f}", f"{row.perplexity:.3f}"] for row in rows]
    print(f"\n{table(['model', 'bits/weight', 'perplexity'], cells)}\n")
    closed = (quantised - adapted) / (quantised - full)
    print(
        f"Adapters of rank {args.rank}, trained {run.seconds:.0f} s on {run.tokens:,} tokens in {run.steps} steps, "
        f"close {closed:.0%} of the gap in loss\n"
        "(log-perplexity) between the quantised and the full-precision model.\n"
        "bits/weight is that of the linear layers in the blocks, scales, zeros and 16-bit adapters included. The\n"
        f"adapter of N x K weights costs 16 * {args.rank} * (1/N + 1/K) bits for each: much in a model as narrow as "
        f"this one, {32 * args.rank / 4096:.2f}\nwhere N = K = 4096."
    )
    if args.save is not None:
        print(f"Adapters saved to {args.save}; PeftUtils.load_lora_weights(model, file) loads them.")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=HERE / "stdlib-llama", help="folder of the model")
    parser.add_argument(
        "--text", type=Path, help="text for perplexity (default: heldout.txt beside the model)"
    )
    parser.add_argument("--tokens", type=int, help="use only so many tokens of the text (default: all)")
    parser.add_argument("--device", type=resolve_device, default=resolve_device(None), help="cpu, cuda, ...")
    parser.add_argument("--nbits", type=float, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--axis", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--rate", type=float, default=8e-3, help="peak learning rate")
    parser.add_argument("--batch-size", type=int, default=2, help=f"windows of {CONTEXT} tokens in a step")
    parser.add_argument("--steps", type=int, default=400, help="most steps to train")
    parser.add_argument("--minutes", type=float, default=3.0, help="most minutes to train")
    parser.add_argument("--save", type=Path, help="file to save the adapters to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.text = args.text or args.model / "heldout.txt"
    return args


if __name__ == "__main__":
    main()
