"""Train the small Llama-architecture model that this repository ships on the Python standard library.

    python examples/train_stdlib_model.py --output DIR [--device cuda] [--minutes 4]

writes a complete model folder: weights in bfloat16, configuration, tokenizer, held-out text, licence, model
card and `training.json` with the figures measured on the way.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import stdlib_corpus
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from stdlib_figures import model_card, nats_per_token, score, unigram_nats_per_token
from stdlib_tokenizer import prepare, save_tokenizer
from stdlib_training import CONTEXT, WEIGHT_DECAY, Plan, Run, model_config, new_model, train
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """'


def save_model(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write the weights in bfloat16 (without the tied head), `config.json` and `generation_config.json`."""
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def saved_figures(folder: Path, train_tokens: torch.Tensor) -> tuple[dict[str, Any], str]:
    """Figures of the model as it lies in `folder`, in float32 arithmetic, and a continuation of `PROMPT`."""
    device = train_tokens.device
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    text = (folder / "heldout.txt").read_bytes()
    held_out = torch.tensor(tokenizer(text.decode(), verbose=False)["input_ids"], device=device)
    predictions, vocabulary = len(held_out) - 1, model.config.vocab_size
    sample_tokens = train_tokens[: len(train_tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    sample_tokens = sample_tokens[:: max(1, len(sample_tokens) // 64)].flatten()  # 64 windows, evenly spread
    unigram = unigram_nats_per_token(train_tokens, held_out, vocabulary)
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": (folder / "model.safetensors").stat().st_size,
        "context": CONTEXT,
        "held_out": {
            **score(nats_per_token(model, held_out, CONTEXT), predictions, len(text)),
            "tokens": len(held_out),
            "bytes": len(text),
        },
        "held_out_unigram": score(unigram, predictions, len(text)),
        "train_perplexity": math.exp(nats_per_token(model, sample_tokens, CONTEXT)),
    }
    prompt = tokenizer(PROMPT, return_tensors="pt").to(device)
    generated = model.generate(**prompt, max_new_tokens=96, do_sample=False)[0]
    return figures, str(tokenizer.decode(generated, skip_special_tokens=True))


def corpus_figures(corpus: stdlib_corpus.Corpus, streams: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Sizes of the splits, their hold-out lists and the fingerprint of the whole."""
    sizes: dict[str, Any] = {}
    for split in ("train", "validation", "held_out"):
        documents = getattr(corpus, split)
        size = sum(len(document.text.encode()) for document in documents)
        sizes[split] = {"files": len(documents), "bytes": size}
        if split in streams:
            sizes[split]["tokens"] = len(streams[split])
    present = {document.path for document in corpus.held_out}
    return {
        "python": corpus.python,
        "sha256": corpus.digest(),
        **sizes,
        "held_out_modules": list(stdlib_corpus.HELD_OUT),
        "validation_modules": list(stdlib_corpus.VALIDATION),
        "shipped_files": [path for path in stdlib_corpus.SHIPPED_HELD_OUT if path in present],
    }


def training_figures(run: Run, plan: Plan, train_tokens: int, device: torch.device) -> dict[str, Any]:
    """Figures of the run itself: how much, how long, on what, and the validation curve."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        **vars(run),
        "epochs": run.tokens_seen / train_tokens,
        "device": device_name,
        "batch_tokens": plan.batch_size * CONTEXT,
        "learning_rate": plan.learning_rate,
        "weight_decay": WEIGHT_DECAY,
        "limits": asdict(plan),
        "validation_perplexity": math.exp(min(point["nats"] for point in run.validation_curve)),
    }


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line; `compile` is decided by the device unless given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="folder to write the model to")
    parser.add_argument("--corpus", type=Path, help="file to keep the text in; tokens lie beside it")
    parser.add_argument("--prepare", action="store_true", help="stop once text and tokens are there")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=Plan.minutes, help="longest time to train for")
    parser.add_argument("--epochs", type=float, default=Plan.epochs, help="most passes over the text")
    parser.add_argument("--steps", type=int, help="most optimiser steps")
    parser.add_argument(
        "--batch-size", type=int, default=Plan.batch_size, help=f"windows of {CONTEXT} tokens"
    )
    parser.add_argument("--learning-rate", type=float, default=Plan.learning_rate, help="its peak")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    options = parser.parse_args(arguments)
    if options.output is None and not options.prepare:
        parser.error("got no --output; name the folder to write the model to")
    if options.prepare and options.corpus is None:
        parser.error("got --prepare without --corpus; name the file to keep the corpus in")
    if options.compile is None:
        options.compile = options.device.type == "cuda"
    return options


def prepared_corpus(file: Path | None) -> tuple[stdlib_corpus.Corpus, Tokenizer, dict[str, torch.Tensor]]:
    """Corpus, tokenizer and token streams, read from `file` and its folder, or made and kept there."""
    if file is not None and file.is_file():
        corpus = stdlib_corpus.load(file)
    else:
        corpus = stdlib_corpus.collect()
        if file is not None:
            stdlib_corpus.save(corpus, file)
    tokenizer, streams = prepare(corpus, None if file is None else file.parent)
    print(f"{len(corpus.train)} training files, {len(streams['train']):,} tokens", flush=True)
    return corpus, tokenizer, streams


def write_figures(figures: dict[str, Any], config: dict[str, Any], sample: str, folder: Path) -> None:
    """Write `training.json` and the model card, and say how good the model is."""
    (folder / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(figures, config, sample), encoding="utf-8")
    for name, entry in (("held out", figures["held_out"]), ("unigram", figures["held_out_unigram"])):
        print(f"{name}: perplexity {entry['perplexity']:.3f}, {entry['bits_per_byte']:.3f} bits per byte")


def main(arguments: list[str] | None = None) -> int:
    """Prepare the text, train, save, measure what was saved, and write the card."""
    options = parse_options(arguments)
    corpus, tokenizer, streams = prepared_corpus(options.corpus)
    if options.prepare:
        return 0
    folder, device = options.output, options.device
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder, CONTEXT)
    (folder / "heldout.txt").write_bytes(corpus.shipped_text().encode())
    (folder / "LICENSE").write_text(corpus.licence, encoding="utf-8")

    plan = Plan(**{entry.name: getattr(options, entry.name) for entry in fields(Plan)})
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    config = model_config(tokenizer.get_vocab_size())
    model = new_model(config, device)
    streams = {name: stream.to(device) for name, stream in streams.items()}
    run = train(model, streams, plan)
    save_model(model, config, folder)

    torch.set_float32_matmul_precision("highest")  # the figures are float32 ones
    figures, sample = saved_figures(folder, streams["train"])
    figures["training"] = training_figures(run, plan, len(streams["train"]), device)
    figures["corpus"] = corpus_figures(corpus, streams)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, tokenizers)}
    figures["versions"] = {"python": platform.python_version(), **versions}
    write_figures(figures, config, sample, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
