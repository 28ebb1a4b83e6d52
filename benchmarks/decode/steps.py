"""Timing decoding steps and prompts, and dividing a step among its kernels."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch

from hqq.models.generate import HFGenerator

# Kernel names -> kind; everything else that lies between two of these is a matrix product.
_KINDS = {
    "norm": "_add_norm_kernel",
    "attention": "attention_kernel",
    "join": "join_kernel",
    "activation": "_silu_mul_kernel",
    "choice": "_choose_kernel",
    "limits": "survey_kernel|limit_kernel",
    "embedding": "indexSelect|index_select|embedding|gather",
}
_ENOUGH = 1000.0  # milliseconds


def started(model: Any, batch: int, prompt: int, steps: int, cache: int, **options: Any) -> HFGenerator:
    """Return a generator that has read random prompts."""
    tokenizer = SimpleNamespace(pad_token_id=0)
    generator = HFGenerator(model, tokenizer, steps, cache_size=cache, eos_token_id=(), **options)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device="cuda")
    generator.setup({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, steps)
    generator.prefill()
    return generator


def milliseconds_per_step(generator: HFGenerator, steps: int) -> float:
    """Return the wall-clock time of a step in generator's own loop, checks for the end of the texts included.

    Begins after the prompts, which are read again. The mean over `steps`; texts and tokens stay on the GPU.
    """
    for warming in (True, False):
        generator.prefill()
        loop = generator._loop(watch=False)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in loop.run(9 if warming else steps + 1, generator.gen_next_token):
            pass
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps * 1e3


def milliseconds_of_prompt(generator: HFGenerator, new: bool = False, repeats: int = 5) -> float:
    """Return the median wall-clock time to read the prompts that the generator was set up with.

    new: as if the generator had met no prompts of this length before.
    """
    times: list[float] = []
    fused = None if generator._decoder is None else generator._decoder._fused
    # The first ones may be recorded; long ones vary little.
    while len(times) < 2 + repeats and (len(times) < 4 or sum(times) < _ENOUGH):
        if new and fused is not None:
            fused.forget_prompts()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        generator.prefill()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[2:])


def breakdown(generator: HFGenerator, token: torch.Tensor, steps: int = 4) -> dict[str, Any]:
    """Return microseconds per step by kind of kernel, from a profile of `steps` steps.

    Kernels overlap: each is charged the time from the end of the kernel before it to its own end, which includes the
    gap between the two; together they make up the step.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            token = generator.gen_next_token(token)
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type.name == "CUDA"]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if "Memcpy" not in e.name)
    kinds = named([_kind(name) for _, _, name in spans])
    shares: dict[str, float] = {}
    counts: dict[str, int] = {}
    before = spans[0][0]
    for (_, end, _), kind in zip(spans, kinds, strict=True):
        shares[kind] = shares.get(kind, 0.0) + max(0.0, end - before)
        counts[kind] = counts.get(kind, 0) + 1
        before = max(before, end)
    rows = {
        kind: {"us": round(shares[kind] / steps, 1), "kernels": counts[kind] / steps}
        for kind in sorted(shares, key=lambda kind: -shares[kind])
    }
    others = sorted({name for (_, _, name), kind in zip(spans, kinds, strict=True) if kind == "other"})
    return {"total_us": round(sum(shares.values()) / steps, 1), "kinds": rows, "other_kernels": others[:12]}


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), None)


# The kernels of other kinds before and after products -> which products they are, in their order. Norms and activations
# may be kernels of their own or part of the products.
_PRODUCTS = {
    ("norm", "attention"): ("qkv",),
    ("embedding", "attention"): ("qkv",),
    ("join", "norm"): ("o",),
    ("join", "activation"): ("o", "gate_up"),
    ("join", "attention"): ("o", "gate_up", "down", "qkv"),
    ("join", "choice"): ("o", "gate_up", "down", "lm_head"),
    ("norm", "activation"): ("gate_up",),
    ("activation", "norm"): ("down",),
    ("activation", "attention"): ("down", "qkv"),
    ("activation", "choice"): ("down", "lm_head"),
    ("norm", "norm"): ("gate_up", "down"),
    ("norm", "choice"): ("lm_head",),
}


def named(kinds: Sequence[str | None]) -> list[str]:
    """Return the kinds with the products among them, which are None, named by what stands around them.

    Where several products stand together, each takes an equal number of kernels, or they are "products".
    """
    names: list[str] = []
    for known, run in groupby(range(len(kinds)), key=lambda place: kinds[place] is not None):
        places = list(run)
        if known:
            names += [kinds[place] or "" for place in places]
            continue
        before, after = kinds[places[0] - 1] if places[0] else None, (*kinds, None)[places[-1] + 1]
        before = "join" if before == "attention" else before  # there is nothing to join in a short cache
        these = _PRODUCTS.get((before or "", after or ""), ("other",))
        each, left = divmod(len(places), len(these))
        names += ["products"] * len(places) if left else [name for name in these for _ in range(each)]
    return names
