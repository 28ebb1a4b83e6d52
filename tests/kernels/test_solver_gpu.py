"""What only a GPU can show of the solver kernels: large layers, compiled arithmetic, streams, no synchronisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqq.core.bitpack import FORMAT_OF_BITS
from hqq.core.config import BaseQuantizeConfig
from hqq.core.linear import HQQLinear
from hqq.core.qtensor import QSpec
from hqq.core.solvers import fused, get_solver
from hqq.core.solvers.min_max import solve_min_max
from hqq.errors import WeightError
from hqq.kernels.solve import solve_and_pack
from tests.cases import BITS, DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
SOLVERS = ("als", "hqq")


def weights(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Weights with heavy tails, groups of different sizes, and some that nobody expects."""
    rng = torch.Generator(CUDA).manual_seed(seed)
    W = torch.randn(shape, device=CUDA, generator=rng)
    W *= 0.02 * torch.exp(0.4 * torch.randn(shape, device=CUDA, generator=rng))
    W[0] = 0
    W[1] = 0.5
    W[2, ::7] *= 100
    W[3] += 3
    return W.to(dtype)


def spec_for(nbits: float, shape: tuple[int, int], group_size: int | None, axis: int) -> QSpec:
    return QSpec(nbits, shape, group_size, axis, FORMAT_OF_BITS[nbits])


def errors(matrix: Tensor, solution: Any, axis: int, storage: torch.dtype) -> Tensor:
    codes, scale, zero = solution
    scale, zero = scale.to(storage).double(), zero.to(storage).double()
    return ((codes.double() - zero) * scale - matrix.double()).square().sum(axis)


def check(W: Tensor, spec: QSpec, solver: str, storage: torch.dtype) -> None:
    """Compare the kernel with the torch reference on the same weight."""
    round_zero = spec.nbits == 4
    q, finite = solve_and_pack(W, spec, solver, storage_dtype=storage, round_zero=round_zero)
    assert bool((finite == 1).all())
    q.check()
    matrix = spec.grouping.group(W.float())
    found = get_solver(solver)(matrix, spec.axis, spec.max_code, round_zero=round_zero, storage_dtype=storage)
    codes = q.codes()
    mine = errors(matrix, (codes, q.scale, q.zero), spec.axis, storage)
    theirs = errors(matrix, found, spec.axis, storage)
    same = float((codes == found.codes).double().mean())
    if solver == "hqq":
        assert same >= 0.9995
        assert mine.sum() <= theirs.sum() * (1 + 1e-4)
        return
    # With many levels, sums in fp32 tell lattices apart only up to noise: as good, but not the same.
    if spec.max_code <= 15:
        assert same >= 0.999
    assert mine.sum() <= theirs.sum() * (1 + (1e-4 if spec.max_code <= 15 else 2e-3))
    plain = solve_min_max(matrix, spec.axis, spec.max_code, storage_dtype=storage)
    least = errors(matrix, plain, spec.axis, storage)
    assert bool((mine <= least * (1 + 1e-5) + matrix.double().square().sum(spec.axis) * 1e-12).all())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", BITS)
def test_large_layers_of_all_bits(nbits: float, axis: int, solver: str, seed: int) -> None:
    dtype = DTYPES[BITS.index(nbits) % 3]
    check(weights((2048, 4096), seed, dtype), spec_for(nbits, (2048, 4096), 64, axis), solver, torch.bfloat16)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("storage", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [
        ((4096, 1024), 16),
        ((768, 3072), 48),
        ((1024, 3072), 96),
        ((1031, 1024), 128),
        ((515, 2050), None),
        ((64, 28672), None),
    ],
    ids=str,
)
def test_group_sizes(
    shape: tuple[int, int], group_size: int | None, storage: torch.dtype, axis: int, solver: str, seed: int
) -> None:
    shape = shape if axis == 1 or group_size else (shape[1], shape[0])
    check(weights(shape, seed), spec_for(3, shape, group_size, axis), solver, storage)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("axis", [1, 0])
def test_nothing_waits_for_the_device_and_nothing_is_random(axis: int, solver: str, seed: int) -> None:
    W, spec = weights((1024, 4096), seed), spec_for(4, (1024, 4096), 64, axis)
    first, _ = solve_and_pack(W, spec, solver)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [solve_and_pack(W, spec, solver)[0] for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for q in again:
        assert torch.equal(q.W_q, first.W_q)
        assert isinstance(q.scale, Tensor) and isinstance(first.scale, Tensor)
        assert torch.equal(q.scale, first.scale)


@pytest.mark.parametrize("axis", [1, 0])
def test_more_elements_than_32_bits_count(axis: int, seed: int) -> None:
    shape = (2**16 + 64, 2**15)
    W = torch.empty(shape, device=CUDA, dtype=torch.bfloat16)
    for rows in W.split(8192):
        rows.normal_(0, 0.02, generator=torch.Generator(CUDA).manual_seed(seed))
    q, _ = solve_and_pack(W, spec_for(8, shape, 64, axis), "als", storage_dtype=torch.bfloat16)
    # Rows of one part of the weight, in either grouping, from its end.
    block = W.view(-1, 64)[-4096:] if axis == 1 else W.view(64, -1)[:, -4096:]
    spec = spec_for(8, tuple(block.shape), 64, axis)
    part, _ = solve_and_pack(block.contiguous(), spec, "als", storage_dtype=torch.bfloat16)
    tail = q.W_q[-4096:] if axis == 1 else q.W_q[:, -4096:]
    assert torch.equal(part.W_q, tail)
    assert isinstance(part.scale, Tensor) and isinstance(q.scale, Tensor)
    assert torch.equal(part.scale.flatten(), q.scale.flatten()[-4096:])


@pytest.mark.parametrize("solver", SOLVERS)
def test_layers_are_solved_by_the_kernel(solver: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)
    linear.weight.data = weights((256, 512), seed)
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1, solver=solver)
    layer = HQQLinear(linear, config, del_orig=False, compute_dtype=torch.bfloat16, device=CUDA)
    monkeypatch.setattr(fused, "_MODULES", {})
    expected = HQQLinear(linear, config, del_orig=False, compute_dtype=torch.bfloat16, device=CUDA)
    assert layer.W_q is not None and expected.W_q is not None
    assert (layer.W_q == expected.W_q).double().mean() >= 0.99
    monkeypatch.undo()
    with torch.no_grad():
        linear.weight[5, 7] = float("inf")
    with pytest.raises(WeightError, match="NaN or infinite"):
        HQQLinear(linear, config, compute_dtype=torch.bfloat16, device=CUDA)


def test_graph_capture_replays_on_new_weights(seed: int) -> None:
    W, spec = weights((512, 1024), seed), spec_for(4, (512, 1024), 64, 1)
    solve_and_pack(W, spec, "hqq")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, _ = solve_and_pack(W, spec, "hqq")
    W.copy_(weights((512, 1024), seed + 1))
    expected, _ = solve_and_pack(W, spec, "hqq")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(q.W_q, expected.W_q)
