"""Times of solving and packing on the GPU: block sizes, layers, whole models, and agreement with the torch reference.

Run: python -m benchmarks.solve.run --out FOLDER [--parts agree,layers,blocks,packing,resident,stream]
Writes FOLDER/solve_PART.json and prints tables. Microseconds are medians of CUDA-graph replays over rotated weights.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

from benchmarks.dequant.timing import bandwidth, buffer_sets, microseconds
from benchmarks.harness import record, table, write_json
from benchmarks.solve.shapes import LLAMA_8B, LLAMA_8B_BLOCKS, LLAMA_70B, random_weight
from hqq.core.bitpack import FORMAT_OF_BITS
from hqq.core.config import QuantConfig
from hqq.core.qtensor import QSpec
from hqq.core.quantizer import Quantizer
from hqq.core.solvers import get_solver
from hqq.core.solvers.min_max import solve_min_max
from hqq.kernels import solve_launch
from hqq.kernels.solve import solve_and_pack
from hqq.kernels.solve_config import SolveConfig, blocks_for
from hqq.models.quantize import quantize_model

Row = dict[str, Any]
_LARGE = (14336, 4096)
_FAILED = (RuntimeError, triton.TritonError)
_STORAGE = torch.bfloat16
_CHOICES = [
    *(("als", SolveConfig(*choice)) for choice in ((4, 64), (1, 64))),
    *(("hqq", SolveConfig(*choice)) for choice in ((4, 64), (1, 64), (4, 32))),
]


def spec_for(nbits: float, shape: tuple[int, int], group_size: int | None, axis: int) -> QSpec:
    """Return the description of a weight of `shape`, packed."""
    return QSpec(nbits, shape, group_size, axis, FORMAT_OF_BITS[nbits])


def lattices(W: Tensor, spec: QSpec, solver: str, config: SolveConfig) -> solve_launch.Lattices:
    """Run the solver's kernels without packing."""
    grouping = spec.grouping
    blocks = blocks_for(grouping.length, grouping.axis, W.element_size(), config)
    if solver == "als":
        return solve_launch.solve_als(W, spec, _STORAGE, blocks)
    return solve_launch.solve_half_quadratic(W, spec, _STORAGE, blocks, round_zero=True)


def blocks(shape: tuple[int, int] = _LARGE) -> Iterator[Row]:
    """Yield the time of each choice of block sizes that is worth a thought, on one large layer."""
    inputs = [random_weight(shape) for _ in range(buffer_sets(2 * shape[0] * shape[1]))]
    settings = [(4, 64), (8, 64), (1, 64)]
    for (bits, group_size), axis in itertools.product(settings, (1, 0)):
        spec = spec_for(bits, shape, group_size, axis)
        for solver, config in _CHOICES:
            row: Row = {"nbits": bits, "group_size": group_size, "axis": axis, "solver": solver}
            row |= {"warps": config.warps, "elements": config.elements}

            def run(W: Tensor, spec: QSpec = spec, solver: str = solver, c: SolveConfig = config) -> Tensor:
                return lattices(W, spec, solver, c).scale

            try:
                row["us"] = round(microseconds(run, inputs), 1)
            except _FAILED as error:
                row["us"] = str(error)[:200]
            yield row


def packing(shape: tuple[int, int] = _LARGE) -> Iterator[Row]:
    """Yield the time of packing alone by block size."""
    inputs = [random_weight(shape) for _ in range(buffer_sets(2 * shape[0] * shape[1]))]
    for axis in (1, 0):
        spec = spec_for(4, shape, 64, axis)
        found = lattices(inputs[0], spec, "als", SolveConfig())
        for block, warps in ((1024, 4), (2048, 4), (2048, 8), (512, 2), (4096, 8)):
            solve_launch._ENCODE_BLOCK, solve_launch._ENCODE_WARPS = block, warps
            time_us = microseconds(_packing(found, spec), inputs)
            yield {"axis": axis, "warps": warps, "elements": block, "us": round(time_us, 1)}
        solve_launch._ENCODE_BLOCK, solve_launch._ENCODE_WARPS = 1024, 4


def _packing(found: solve_launch.Lattices, spec: QSpec) -> Callable[[Tensor], Tensor]:
    fmt = spec.format
    assert fmt is not None
    return lambda W: solve_launch.encode(W, found, spec, fmt)


def layers() -> Iterator[Row]:
    """Yield the time of solving and packing one layer in each setting that people use."""
    peak = bandwidth()
    settings: list[tuple[tuple[int, int], torch.dtype, float, int | None, int]] = [
        *((_LARGE, torch.bfloat16, bits, 64, axis) for axis in (1, 0) for bits in (4, 3, 2, 8, 1)),
        (_LARGE, torch.float32, 4, 64, 1),
        (_LARGE, torch.float16, 4, 128, 1),
        (_LARGE, torch.bfloat16, 4, None, 1),
        (_LARGE, torch.bfloat16, 4, None, 0),
        ((4096, 14336), torch.bfloat16, 4, None, 1),
        ((4096, 14336), torch.bfloat16, 4, 64, 1),
        ((4096, 4096), torch.bfloat16, 4, 64, 1),
        ((1024, 4096), torch.bfloat16, 4, 64, 1),
        ((8192, 28672), torch.bfloat16, 4, None, 1),
    ]
    for shape, dtype, bits, group_size, axis in settings:
        spec = spec_for(bits, shape, group_size, axis)
        first = random_weight(shape, dtype)
        inputs = [first, *(random_weight(shape, dtype) for _ in range(buffer_sets(first.nbytes) - 1))]
        row: Row = {"shape": f"{shape[0]}x{shape[1]}", "dtype": str(dtype)[6:], "nbits": bits}
        row |= {"group_size": group_size or "channel", "axis": axis}
        row["read_us"] = round(first.nbytes / peak * 1e6, 1)
        for solver in ("als", "hqq", "minmax"):

            def run(W: Tensor, spec: QSpec = spec, solver: str = solver) -> Tensor:
                q, _ = solve_and_pack(W, spec, solver, storage_dtype=_STORAGE, round_zero=spec.nbits == 4)
                return q.W_q

            try:
                row[f"{solver}_us"] = round(microseconds(run, inputs, 7), 1)
            except _FAILED as error:
                row[f"{solver}_us"] = str(error)[:200]
        yield row
        del inputs, first
        torch.cuda.empty_cache()


def agree(shape: tuple[int, int] = (4096, 4096)) -> Iterator[Row]:
    """Yield how the kernels' codes and errors compare with the torch reference's on the same GPU."""
    settings: list[tuple[float, int | None, int]] = [
        *((bits, 64, axis) for bits in (8, 6, 4, 3, 2, 1.58, 1) for axis in (1, 0)),
        *((4, size, axis) for size in (48, 128, 1024, None) for axis in (1, 0)),
    ]
    for bits, group_size, axis in settings:
        size = (shape[0] * 3 // 4, shape[1]) if group_size == 48 else shape
        W = random_weight(size)
        spec = spec_for(bits, size, group_size, axis)
        matrix = spec.grouping.group(W.float())
        plain = _errors(matrix, solve_min_max(matrix, axis, spec.max_code, storage_dtype=_STORAGE), axis)
        for solver in ("als", "hqq"):
            row: Row = {"nbits": bits, "group_size": group_size or "channel", "axis": axis, "solver": solver}
            try:
                q, finite = solve_and_pack(W, spec, solver, storage_dtype=_STORAGE, round_zero=bits == 4)
                again, _ = solve_and_pack(W, spec, solver, storage_dtype=_STORAGE, round_zero=bits == 4)
            except _FAILED as error:
                yield row | {"same_codes": str(error)[:200]}
                continue
            assert bool((finite == 1).all())
            assert torch.equal(q.W_q, again.W_q), "not deterministic"
            found = get_solver(solver)(
                matrix, axis, spec.max_code, round_zero=bits == 4, storage_dtype=_STORAGE
            )
            codes = q.codes()
            mine = _errors(matrix, (codes, q.scale, q.zero), axis)
            theirs = _errors(matrix, found, axis)
            row["same_codes"] = round(float((codes == found.codes).double().mean()), 6)
            row["same_groups"] = round(float((codes == found.codes).all(axis).double().mean()), 6)
            row["error_ratio"] = round(float(mine.sum() / theirs.sum()), 7)
            row["groups_worse"] = round(float((mine > theirs * (1 + 1e-5)).double().mean()), 6)
            row["worst_to_min_max"] = round(float((mine / plain).max()), 4)
            yield row
        del W, matrix
        torch.cuda.empty_cache()


def _errors(matrix: Tensor, solution: Any, axis: int) -> Tensor:
    codes, scale, zero = solution
    scale, zero = scale.to(_STORAGE).double(), zero.to(_STORAGE).double()
    errors: Tensor = ((codes.double() - zero) * scale - matrix.double()).square().sum(axis)
    return errors


def resident() -> Iterator[Row]:
    """Yield the seconds for all linear layers of an 8B model whose weights are on the GPU."""
    weights = [random_weight(shape) for _ in range(LLAMA_8B_BLOCKS) for shape in LLAMA_8B.values()]
    for solver in ("hqq", "als"):
        config = QuantConfig(nbits=4, group_size=64, axis=1, solver=solver)

        def kernels(solver: str = solver) -> None:
            for W in weights:
                spec = spec_for(4, (W.shape[0], W.shape[1]), 64, 1)
                solve_and_pack(W, spec, solver, storage_dtype=_STORAGE, round_zero=True)

        def quantizer(solver: str = solver) -> None:
            for W in weights:
                Quantizer.quantize(
                    W, nbits=4, group_size=64, axis=1, round_zero=True, compute_dtype=_STORAGE, solver=solver
                )

        row: Row = {"model": "8B", "solver": solver}
        row["kernels_s"] = _seconds(kernels)
        row["quantizer_s"] = _seconds(quantizer)
        row["quantize_model_s"] = _quantizing_seconds(weights, config, None)
        yield row


def stream(count: int = 4) -> Iterator[Row]:
    """Yield the seconds for blocks of a 70B model that come from host memory, beside those of the copy alone."""
    drawn = [random_weight(shape) for shape in LLAMA_70B.values()] * count
    for pinned in (True, False):
        weights = [_on_host(W, pinned) for W in drawn]
        size = sum(W.nbytes for W in weights)

        row: Row = {
            "model": "70B",
            "pinned": pinned,
            "GB": round(size / 1e9, 2),
            "copy_s": _seconds(_copying(weights), 3),
        }
        for solver in ("hqq", "als"):
            config = QuantConfig(nbits=4, group_size=64, axis=1, solver=solver)
            row[f"{solver}_s"] = _quantizing_seconds(weights, config, "cuda")
        row["copy_GB_per_s"] = round(size / row["copy_s"] / 1e9, 1)
        yield row
        del weights


def _copying(weights: list[Tensor]) -> Callable[[], object]:
    # One at a time, as a model that is larger than the GPU's memory would be.
    return lambda: [W.to("cuda", non_blocking=True).shape for W in weights]


def _quantizing_seconds(weights: list[Tensor], config: QuantConfig, device: str | None) -> float:
    repeats = 5
    models = [_model(weights) for _ in range(repeats + 1)]
    return _seconds(lambda: quantize_model(models.pop(), config, device=device, progress=False), repeats)


def _on_host(W: Tensor, pinned: bool) -> Tensor:
    out = torch.empty(W.shape, dtype=W.dtype, pin_memory=pinned)
    return out.copy_(W)


def _model(weights: list[Tensor]) -> nn.Module:
    """Return a model whose layers have these weights, without copying them."""
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False, device="meta") for _ in weights))
    for layer, W in zip(model, weights, strict=True):
        assert isinstance(layer, nn.Linear)
        layer.out_features, layer.in_features = W.shape
        layer.weight = nn.Parameter(W.view(W.shape), requires_grad=False)
    return model


def _seconds(function: Callable[[], object], repeats: int = 5) -> float:
    function()
    times = []
    for _ in range(repeats):
        gc.collect()  # of what making the models left, or the collector walks through all of torch in between
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times), 4)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "agree": agree,
    "layers": layers,
    "blocks": blocks,
    "packing": packing,
    "resident": resident,
    "stream": stream,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    arguments = parser.parse_args()
    for part in arguments.parts.split(","):
        start = time.perf_counter()
        rows: list[Row] = []
        for row in PARTS[part]():
            rows.append(row)
            print(row, flush=True)
            write_json(arguments.out / f"solve_{part}.json", record(rows))
        print(f"{part}: {time.perf_counter() - start:.0f} s")
        for keys in dict.fromkeys(tuple(row) for row in rows):
            print(table([row for row in rows if tuple(row) == keys]), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
