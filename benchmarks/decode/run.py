"""Tokens per second of Llama-3-8B shapes, with a breakdown of the step.

Run: python -m benchmarks.decode.run --out FOLDER [--only TEXT ...] [--layers N]
Writes FOLDER/decode.json and prints a table. Random weights, a cache of 1024 tokens, prompts of 512; tokens per second
are wall-clock, over 256 steps from there on, in HFGenerator's own loop.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode.models import Weights, random_llama
from benchmarks.decode.steps import breakdown, milliseconds_of_prompt, milliseconds_per_step, started
from benchmarks.harness import record, table, write_json
from hqq.backends.prepare import prepare_for_inference
from hqq.models.generation.prompt_graphs import MOST_TOKENS

_CACHE, _PROMPT, _STEPS = 1024, 512, 256
_BATCHES = (1, 8, 64)

MODELS = {
    "bf16": Weights(None),
    "4bit": Weights(4),
    "4bit head4": Weights(4, head_bits=4),
    "4bit axis0": Weights(4, axis=0),
    "4bit axis0 head4": Weights(4, axis=0, head_bits=4),
    "2bit": Weights(2),
    "2bit head4": Weights(2, head_bits=4),
    "3bit head4": Weights(3, head_bits=4),
    "8bit": Weights(8, head_bits=8),
}


def measure(name: str, layers: int, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return the lines of one model, one for each batch size."""
    weights = MODELS[name]
    before = torch.cuda.memory_allocated()
    model = random_llama(weights, num_hidden_layers=layers)
    if weights.bits is not None:
        prepare_for_inference(model, allow_merge=True)
    kept = torch.cuda.memory_allocated() - before
    lines = []
    for batch in batches:
        generator = started(model, batch, _PROMPT, _STEPS + 32, _CACHE)
        prompt = milliseconds_of_prompt(generator)
        recorded = batch * _PROMPT <= MOST_TOKENS
        new_prompt = milliseconds_of_prompt(generator, new=True) if recorded else prompt
        step = milliseconds_per_step(generator, _STEPS)
        lines.append(
            {
                "model": name,
                **weights.columns(),
                "batch": batch,
                "tokens_per_second": round(batch * 1e3 / step, 1),
                "step_ms": round(step, 4),
                "prompt_ms": round(prompt, 2),
                "new_prompt_ms": round(new_prompt, 2),
                "weights_gb": round(kept / 1e9, 2),
                "step": "fused" if generator.step_reason is None else generator.step_reason,
                "breakdown": breakdown(generator, generator.prefill()),
            }
        )
        print({k: v for k, v in lines[-1].items() if k != "breakdown"}, flush=True)
        print("   ", lines[-1]["breakdown"], flush=True)
        del generator
        gc.collect()
        torch.cuda.empty_cache()
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="*", default=list(_BATCHES))
    arguments = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for name in arguments.only:
        lines += measure(name, arguments.layers, tuple(arguments.batches))
        gc.collect()
        torch.cuda.empty_cache()
        content = record(lines, cache=_CACHE, prompt=_PROMPT, steps=_STEPS, layers=arguments.layers)
        write_json(arguments.out / "decode.json", content)
    print(table([{k: v for k, v in line.items() if k != "breakdown"} for line in lines]))


if __name__ == "__main__":
    main()
