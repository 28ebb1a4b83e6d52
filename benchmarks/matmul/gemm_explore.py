"""Settings of the fused GEMM on one GPU, against an fp64 oracle and cuBLAS.

python -m benchmarks.matmul.gemm_explore [PLAN]

PLAN is a JSON file: a list of {"case": fields of Case, "configs": [fields of GemmConfig, ...], "check": true or false};
without it, the settings that `choose` returns are checked and timed.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks.harness import table
from benchmarks.matmul.turns import Contender, microseconds_in_turn
from hqq.core.bitpack import FORMAT_OF_BITS
from hqq.core.qtensor import QSpec, QTensor
from hqq.kernels import tiled_gemm as launcher
from hqq.kernels import tiled_tune
from hqq.kernels.cuda.nvrtc import cubin
from hqq.kernels.tiled_gemm import tiled_gemm
from hqq.kernels.tiled_gemm_config import GemmConfig, choose, fitted
from hqq.kernels.tiled_weight import TiledWeight

SHAPES = ((28672, 4096), (4096, 4096), (4096, 14336), (6144, 4096))
Arguments: TypeAlias = tuple[Tensor, Tensor, Tensor, int, int, int, int, int]
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """A product: M tokens, a weight [N, K] of so many bits."""

    M: int
    N: int
    K: int
    bits: int = 4
    axis: int = 1
    group_size: int | None = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def spec(self) -> QSpec:
        """The description of the weight."""
        return QSpec(self.bits, (self.N, self.K), self.group_size, self.axis, FORMAT_OF_BITS[self.bits])

    @property
    def name(self) -> str:
        """The case in a few letters."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.N}x{self.K} M={self.M} {self.bits}b a{self.axis} gs{self.group_size} {kind}"


def random_qtensor(case: Case) -> QTensor:
    """Return random codes, scales and zeros for `case`."""
    return tiled_tune.random_qtensor(case.spec, case.dtype, torch.device("cuda"))


def oracle(q: QTensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product in fp64."""
    W = q.spec.grouping.ungroup((q.codes(torch.uint8).double() - q.zero.double()) * q.scale.double())  # type: ignore[union-attr]
    y = x.double() @ W.T
    return y if bias is None else y + bias.double()


def arguments(weight: TiledWeight) -> Arguments:
    """Return what `tiled_gemm` takes for a weight."""
    N, K = weight.spec.shape
    return (weight.codes, weight.meta, weight.rows, weight.bits, weight.spec.axis, weight.group_size, N, K)


def check(case: Case, config: GemmConfig | None = None) -> float:
    """Return the relative error of one product on fresh random values; NaN if an element was not written."""
    q = random_qtensor(case)
    weight = TiledWeight.from_qtensor(q, case.dtype)
    x = torch.randn(case.M, case.K, dtype=case.dtype, device="cuda")
    bias = torch.randn(case.N, dtype=case.dtype, device="cuda")
    guard = torch.full((case.M + 2, case.N), float("nan"), dtype=case.dtype, device="cuda")
    out = guard[1:-1]
    tiled_gemm(x, *arguments(weight), bias, out, config)
    first = out.clone()
    out.fill_(float("nan"))
    tiled_gemm(x, *arguments(weight), bias, out, config)
    torch.cuda.synchronize()
    if not guard[0].isnan().all() or not guard[-1].isnan().all():
        return float("inf")
    if not torch.equal(first, out):
        return float("nan")
    expected = oracle(q, x, bias)
    return float((out.double() - expected).norm() / expected.norm())


def compile_all(pairs: list[tuple[Case, GemmConfig]]) -> None:
    """Compile what the cases need, several at a time."""
    sources = []
    for case, config in pairs:
        group = 0 if case.axis == 1 and case.group_size in (None, case.K) else case.group_size or case.N
        name = "F16" if case.dtype == torch.float16 else "BF16"
        kernel, _ = launcher._kernels(
            name, case.bits, case.axis, group, fitted(config, case.bits, case.axis, group, case.K)
        )
        sources.append((kernel.source, kernel.defines))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda pair: cubin(pair[0], pair[1], "sm_90a"), dict.fromkeys(sources)))


def time_case(case: Case, configs: list[GemmConfig]) -> list[tuple[GemmConfig | None, float]]:
    """Return µs of cuBLAS (None) and of each configuration, in turn, over weights that no cache holds."""
    q = random_qtensor(case._replace(N=min(case.N, 4096)))
    one = TiledWeight.from_qtensor(q, case.dtype)
    x = torch.randn(case.M, case.K, dtype=case.dtype, device="cuda")
    copies = max(2, (1 << 28) // (case.N * case.K * 2) + 2)
    plain = [torch.randn(case.N, case.K, dtype=case.dtype, device="cuda") * 0.01 for _ in range(copies)]
    # Along axis 0, how rows fall into groups depends on N.
    whole = case.axis == 0 or case.N % 4096
    repeated = (
        TiledWeight.from_qtensor(random_qtensor(case), case.dtype)
        if whole
        else TiledWeight.cat([one] * (case.N // 4096))
    )
    args = arguments(repeated)
    copies = max(4, (1 << 29) // repeated.codes.nbytes + 1)
    buffers = []
    for _ in range(min(copies, 48)):
        codes = torch.randint(
            -(1 << 31), (1 << 31) - 1, repeated.codes.shape, dtype=torch.int32, device="cuda"
        )
        buffers.append((codes, repeated.meta.clone()))
    out = torch.empty(case.M, case.N, dtype=case.dtype, device="cuda")

    def run(weight: tuple[Tensor, Tensor], config: GemmConfig) -> Tensor:
        tiled_gemm(x, *weight, args[2], *args[3:], None, out, config)
        return out

    contenders: list[Contender] = [(lambda W: torch.nn.functional.linear(x, W), plain)]
    contenders += [(partial(run, config=config), buffers) for config in configs]
    return list(zip([None, *configs], microseconds_in_turn(contenders), strict=True))


def short(config: GemmConfig | None) -> str:
    """Return a configuration in a few letters."""
    if config is None:
        return "cuBLAS"
    c = config
    tile = f"n{c.tokens} b{c.blocks} sp{c.span} d{c.depth} j{c.joint} st{c.stages}"
    return f"{tile} s{c.steps} split{c.split} r{c.resident}"


class Entry(NamedTuple):
    """Configurations to try on a case; `check`: compare with the oracle rather than time."""

    case: Case
    configs: list[GemmConfig]
    check: bool


def default_plan() -> list[Entry]:
    """Return what `choose` says for the usual shapes, checked and timed."""
    cases = [Case(M, N, K) for N, K in SHAPES for M in (16, 17, 32, 48, 64, 96, 128, 192, 256, 384, 512)]
    cases += [
        Case(M, *SHAPES[0], bits, axis) for bits in (8, 4, 3, 2, 1) for axis in (1, 0) for M in (64, 256)
    ]
    return [
        Entry(case, [choose(case.M, case.N, case.K, case.bits, 132)], check)
        for check in (True, False)
        for case in cases
    ]


def read_plan(path: Path) -> list[Entry]:
    """Return what a plan file lists."""
    entries = []
    for entry in json.loads(path.read_text()):
        fields = dict(entry["case"])
        if "dtype" in fields:
            fields["dtype"] = getattr(torch, fields["dtype"])
        configs = [GemmConfig(**config) for config in entry["configs"]]
        entries.append(Entry(Case(**fields), configs, entry.get("check", False)))
    return entries


def main() -> None:
    """Check, then time, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", nargs="?", type=Path, help="a JSON file")
    path = parser.parse_args().plan
    plan = default_plan() if path is None else read_plan(path)
    compile_all([(entry.case, config) for entry in plan for config in entry.configs])
    print("compiled", flush=True)
    rows = []
    for case, configs, checked in plan:
        if checked:
            for config in configs:
                error = check(case, config)
                verdict = "ok" if error <= LIMIT[case.dtype] else "WRONG"
                print(f"{verdict:6s} {error:.2e} {case.name}  {short(config)}", flush=True)
            continue
        for chosen, time in time_case(case, configs):
            print(case.name, short(chosen), f"{time:.1f}", flush=True)
            rows.append({"case": case.name, "config": short(chosen), "us": round(time, 1)})
        torch.cuda.empty_cache()
    print(table(rows))


if __name__ == "__main__":
    main()
