"""Products with quantised weights on the CPU, in one layer and in a whole model, against torch's with plain weights.

    python -m benchmarks.cpu_matmul [--threads 2] [--repetitions 15] [--tokens 64] [--output FILE]

One call of each variant in turn, `repetitions` times; a buffer larger than the caches is written before each call, so
that weights come from memory, as in a model. What is reported is the least of each, because on a busy machine only that
says something of the code: `min_ms` of the wall clock, `cpu_ms` of the processor time of all threads, which other work
on the machine hardly touches, and from which the ratios are. `plain` is torch's F.linear, `reference` dequantises and
multiplies (backend "pytorch"), `cpu` is the backend of that name. Groups of 64 along the inputs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, record, table, write_json
from hqq import HQQLinear, quantize_model
from hqq.backends.prepare import prepare_for_inference
from hqq.core.config import BaseQuantizeConfig

MODEL = Path(__file__).resolve().parents[1] / "examples" / "stdlib-llama"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 8, 64)
GROUP_SIZE = 64
CACHE_BYTES = 2**28

Call = Callable[[], Tensor]


def variants(N: int, K: int) -> dict[tuple[str, str], nn.Module]:
    """Return the layers that are compared, by (weight, how it is multiplied)."""
    layers: dict[tuple[str, str], nn.Module] = {}
    W = torch.randn(N, K) * 0.02
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(W.to(dtype), requires_grad=False)
        layers[name, "plain"] = linear
    for nbits in (8, 4):
        config = BaseQuantizeConfig(nbits=nbits, group_size=GROUP_SIZE, axis=1)
        config["weight_quant_params"]["optimize"] = (
            False  # the time of a product does not depend on the codes
        )
        for how, backend in (("reference", "pytorch"), ("cpu", "cpu")):
            layer = HQQLinear.from_weights(W, None, config, torch.bfloat16, "cpu")
            prepare_for_inference(layer, backend=backend, strict=True)
            layers[f"{nbits} bit", how] = layer
    return layers


def in_turn(calls: dict[Any, Call], repetitions: int) -> dict[Any, tuple[float, float]]:
    """Return the least wall-clock and processor seconds of `repetitions` calls of each, in turn, with cold caches."""
    flush = torch.empty(CACHE_BYTES // 4)
    times: dict[Any, list[tuple[float, float]]] = {key: [] for key in calls}
    for repetition in range(repetitions + 1):
        for key, call in calls.items():
            flush.fill_(repetition)
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            if repetition:  # the first is the warm-up
                times[key].append((time.perf_counter() - start, time.process_time() - start_cpu))
    return {key: (min(wall for wall, _ in t), min(cpu for _, cpu in t)) for key, t in times.items()}


def layer_rows(N: int, K: int, repetitions: int) -> list[dict[str, Any]]:
    """Return a row for each number of tokens and each variant of one shape."""
    layers, rows = variants(N, K), []
    for M in TOKENS:
        x = torch.randn(M, K)
        inputs = {dtype: x.to(dtype) for dtype in (torch.float32, torch.bfloat16)}

        def call(layer: nn.Module, x: Tensor) -> Call:
            return lambda: layer(x)

        calls = {key: call(layer, inputs[_dtype(layer)]) for key, layer in layers.items()}
        best = in_turn(calls, repetitions)
        for (weight, how), (wall, cpu) in best.items():
            rows.append(
                {
                    "N": N,
                    "K": K,
                    "M": M,
                    "weight": weight,
                    "how": how,
                    "min_ms": round(wall * 1e3, 3),
                    "cpu_ms": round(cpu * 1e3, 3),
                    "of_bf16": round(cpu / best["bf16", "plain"][1], 2),
                    "of_fp32": round(cpu / best["fp32", "plain"][1], 2),
                }
            )
    return rows


def _dtype(layer: nn.Module) -> torch.dtype:
    return layer.compute_dtype if isinstance(layer, HQQLinear) else next(layer.parameters()).dtype


def model_rows(tokens: int, repetitions: int) -> list[dict[str, Any]]:
    """Return tokens per second of greedy decoding with the shipped model, for each form of its linear layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(MODEL)("def read(path):", return_tensors="pt").input_ids
    calls: dict[Any, Call] = {}
    kinds: dict[Any, str] = {}

    def generate(model: Any) -> Call:
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        return lambda: model.generate(prompt, pad_token_id=0, **settings)

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
        calls[name, "plain"], kinds[name, "plain"] = generate(model), "plain"
    for nbits in (8, 4):
        config = BaseQuantizeConfig(nbits=nbits, group_size=GROUP_SIZE, axis=1)
        for how, backend in (("reference", "pytorch"), ("cpu", "cpu")):
            model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
            quantize_model(model, config, compute_dtype=torch.bfloat16, device="cpu", progress=False)
            report = prepare_for_inference(model, backend=backend)
            key = (f"{nbits} bit", how)
            calls[key], kinds[key] = generate(model), str(report).partition("\n")[2]
    with torch.no_grad():
        times = in_turn(calls, repetitions)
    return [
        {
            "weight": weight,
            "how": how,
            "tokens_per_s": round(tokens / wall, 1),
            "tokens_per_cpu_s": round(tokens / cpu, 1),
            "layers": kinds[weight, how],
        }
        for (weight, how), (wall, cpu) in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_matmul.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [row for N, K in SHAPES for row in layer_rows(N, K, arguments.repetitions)]
    print(table(rows))
    decoding = model_rows(arguments.tokens, max(3, arguments.repetitions // 3))
    print(table(decoding))
    note = "least of the repetitions; other work ran on the same cores if load_average is above `threads`"
    capability = torch.backends.cpu.get_cpu_capability()
    results = {"products": rows, "decoding": decoding}
    write_json(
        arguments.output,
        record(
            results,
            note=note,
            repetitions=arguments.repetitions,
            threads=arguments.threads,
            instructions=capability,
            group_size=GROUP_SIZE,
        ),
    )


if __name__ == "__main__":
    main()
