"""One side of `cpu_solver`: quantises a set of weights when told to, and says how long it took.

Runs in any interpreter that has torch, safetensors and an `hqq` with the original's interface. Reads one JSON request
a line from standard input, {"weights": file, "nbits": n, "axis": a, "group_size": g, "threads": t, "solver": s}, and
answers each with one line, {"seconds": s, "cpu_seconds": of all threads, "digest": of the packed codes of every
layer}; first it says who it is.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import sys
import time
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import hqq
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


@lru_cache(maxsize=2)
def layers(path: str) -> list[nn.Linear]:
    """Return the weights of a safetensors file as nn.Linear, in a fixed order."""
    made = []
    for _, weight in sorted(load_file(path).items()):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        made.append(layer)
    return made


def settings(request: dict[str, Any]) -> Any:
    """Return the configuration asked for; the original has no choice of solvers, and ignores it."""
    options = {key: request[key] for key in ("nbits", "group_size", "axis")}
    if "solver" in inspect.signature(BaseQuantizeConfig).parameters:
        options["solver"] = request["solver"]
    return BaseQuantizeConfig(**options)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Quantise every layer once, in float16 on the CPU."""
    torch.set_num_threads(request["threads"])
    sources, config = layers(request["weights"]), settings(request)
    start, cpu_start = time.perf_counter(), time.process_time()
    done = [
        HQQLinear(layer, config, del_orig=False, compute_dtype=torch.float16, device="cpu")
        for layer in sources
    ]
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    digest = hashlib.sha256()
    for layer in done:
        assert layer.W_q is not None
        digest.update(layer.W_q.data.numpy().tobytes())
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "digest": digest.hexdigest()}


def identity() -> dict[str, str]:
    """Return the versions on this side."""
    return {"python": platform.python_version(), "hqq": hqq.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    print(json.dumps(identity()), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
