"""The solver kernels against the torch reference of the same solver, which tests of its own hold to brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hqq.core.bitpack import FORMAT_OF_BITS, pack
from hqq.core.qtensor import QSpec, QTensor
from hqq.core.quantizer import Quantizer
from hqq.core.solvers import Solution, fused, get_solver
from hqq.core.solvers.min_max import Lattice, min_max_lattice, solve_min_max
from hqq.errors import ConfigError, WeightError
from hqq.kernels import solve
from hqq.kernels.solve_config import SolveConfig, candidates
from tests.cases import BITS, DTYPES, LAYOUTS, Layout
from tests.core.solvers import judged
from tests.core.solvers.half_quadratic import restated, undecided

# numpy's warnings in the interpreter, where a GPU computes infinity or NaN and the kernel sorts it out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|overflow|underflow) encountered:RuntimeWarning"
)

SOLVERS = ("als", "hqq")
# Few elements to a thread: fewer tiles, which the interpreter walks one by one.
QUICK = SolveConfig(4, 16)
# Groups of these codes are long enough, in steps, for sums in fp32 to tell lattices apart only up to noise.
NOISY_FROM = 31


@pytest.fixture(autouse=True)
def _interpreted_functions(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Triton's own functions are interpreted too, also where something imported triton before that was asked for."""
    if device.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name in ("sum", "max", "min", "zeros"):
        function = getattr(tl, name)
        if isinstance(function, JITFunction):
            monkeypatch.setattr(tl, name, InterpretedFunction(function.fn))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Outputs start as what no kernel writes: NaN in floats, all bits but the sign in integers."""
    from hqq.kernels import solve_launch

    outputs: list[Tensor] = []
    allocate: Callable[..., Tensor] = solve_launch.new_buffer

    def poisoned(*args: object) -> Tensor:
        out = allocate(*args)
        outputs.append(out.fill_(float("nan")) if out.is_floating_point() else out.fill_(0x7F))
        return out

    monkeypatch.setattr(solve_launch, "new_buffer", poisoned)
    return outputs


def weights(shape: tuple[int, int], rng: torch.Generator, spread: float = 0.02) -> Tensor:
    """Weights with the tails of trained ones (Student's t, 5 degrees of freedom)."""
    chi_square = torch.randn(5, *shape, generator=rng).square().mean(0)
    return spread * torch.randn(shape, generator=rng) / chi_square.sqrt()


def spec_for(nbits: float, shape: tuple[int, int], group_size: int | None, axis: int) -> QSpec:
    return QSpec(nbits, shape, group_size, axis, FORMAT_OF_BITS[nbits])


def run(
    W: Tensor,
    spec: QSpec,
    solver: str,
    device: torch.device,
    *,
    storage: torch.dtype = torch.float32,
    round_zero: bool = False,
    config: SolveConfig = QUICK,
) -> QTensor:
    """Return the kernel's answer, on the CPU."""
    q, finite = solve.solve_and_pack(
        W.to(device), spec, solver, storage_dtype=storage, round_zero=round_zero, config=config
    )
    assert bool((finite == 1).all())
    return q.to(torch.device("cpu"))


def reference(
    W: Tensor, spec: QSpec, solver: str, storage: torch.dtype = torch.float32, round_zero: bool = False
) -> Solution:
    matrix = spec.grouping.group(W.float())
    return get_solver(solver)(matrix, spec.axis, spec.max_code, round_zero=round_zero, storage_dtype=storage)


def errors(
    W: Tensor, spec: QSpec, codes: Tensor, scale: Tensor, zero: Tensor, storage: torch.dtype
) -> Tensor:
    """Squared error of each group in float64, with scale and zero as `storage` holds them."""
    return judged.errors(spec.grouping.group(W), Solution(codes, scale, zero), storage, dim=spec.axis)


def assert_agrees(
    q: QTensor,
    found: Solution,
    W: Tensor,
    spec: QSpec,
    solver: str,
    storage: torch.dtype = torch.float32,
    round_zero: bool = False,
) -> None:
    """Same codes but where rounding decides, and errors as good."""
    q.check()
    codes = q.codes()
    assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
    mine = errors(W, spec, codes, q.scale, q.zero, storage)
    theirs = errors(W, spec, found.codes, found.scale, found.zero, storage)
    assert judged.as_good(mine, theirs)
    other = (codes != found.codes).any(spec.axis)
    if solver == "hqq":
        start = min_max_lattice(
            spec.grouping.group(W.float()),
            spec.axis,
            spec.max_code,
            round_zero=round_zero,
            storage_dtype=storage,
        )
        tied = hangs_on_rounding(spec.grouping.group(W.float()), start, spec.axis, spec.max_code)
        assert not bool((other & ~tied.flatten()).any())
    elif spec.max_code < NOISY_FROM:
        # Sums in another order: a few ulps of a group's sum of squares.
        slack = 1e-12 * spec.grouping.group(W.double()).square().sum(spec.axis)
        tied = (mine - theirs).abs() <= 1e-5 * theirs + slack
        # A tie may send the search of a group elsewhere: at 4 bits one in 1000, at fewer none of 13000.
        assert int((other & ~tied).sum()) <= 3 + 0.05 * other.numel()
    if not other.any():
        fmt = spec.format
        assert fmt is not None
        assert torch.equal(q.W_q, pack(found.codes, fmt))  # padding included


def hangs_on_rounding(matrix: Tensor, start: Lattice, dim: int, max_code: int) -> Tensor:
    """Which groups, as `start`'s statistics, the half-quadratic iteration leaves to how float32 rounds."""
    W, inverse_scale = matrix.numpy(), start.inverse_scale.numpy()
    trajectory = restated(W, inverse_scale, start.zero.numpy(), dim, max_code)
    zero, tied = trajectory[-1]
    # Nothing survives the shrinking of weights of this size.
    means = len(trajectory) if float(matrix.abs().max()) > 0.17 else 1
    return torch.from_numpy(tied | undecided(W, inverse_scale, zero, dim, max_code, means))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", BITS)
def test_all_bits(nbits: float, axis: int, solver: str, rng: torch.Generator, device: torch.device) -> None:
    kinds = list(itertools.product(DTYPES, (torch.bfloat16, torch.float16, torch.float32)))
    dtype, storage = kinds[(BITS.index(nbits) * 2 + axis) % len(kinds)]
    W = weights((64, 32) if axis == 0 else (32, 64), rng).to(dtype)
    spec = spec_for(nbits, tuple(W.shape), 64, axis)
    round_zero = nbits == 4
    q = run(W, spec, solver, device, storage=storage, round_zero=round_zero)
    found = reference(W, spec, solver, storage, round_zero)
    assert_agrees(q, found, W, spec, solver, storage, round_zero)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=lambda i: LAYOUTS[i].why)
def test_all_layouts(number: int, axis: int, solver: str, rng: torch.Generator, device: torch.device) -> None:
    layout, nbits = LAYOUTS[number], (4, 3, 2, 1)[(number + axis) % 4]
    W = weights(layout.shape, rng)
    spec = spec_for(nbits, layout.shape, layout.group_size, axis)
    q = run(W, spec, solver, device, config=SolveConfig(4, 8))
    assert_agrees(q, reference(W, spec, solver), W, spec, solver)


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.why)
def test_min_max_of_all_layouts(
    layout: Layout, axis: int, rng: torch.Generator, device: torch.device
) -> None:
    W = weights(layout.shape, rng)
    spec = spec_for(3, layout.shape, layout.group_size, axis)
    q, found = run(W, spec, "minmax", device), reference(W, spec, "minmax")
    fmt = spec.format
    assert fmt is not None
    assert torch.equal(q.W_q, pack(found.codes, fmt))
    assert torch.equal(q.scale, found.scale) and torch.equal(q.zero, found.zero)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize(
    "layout",
    [
        Layout((16, 48), 48, "three tiles of 16"),
        Layout((8, 160), 160, "more than one thread for each group"),
        Layout((3, 1100), None, "channels over whole programs, the last tile ragged"),
    ],
    ids=lambda layout: layout.why,
)
def test_long_groups(
    layout: Layout, axis: int, solver: str, rng: torch.Generator, device: torch.device
) -> None:
    shape = layout.shape if axis == 1 else (layout.shape[1], layout.shape[0])
    W = weights(shape, rng).bfloat16()
    spec = spec_for(3, shape, layout.group_size, axis)
    q = run(W, spec, solver, device, storage=torch.bfloat16)
    assert_agrees(q, reference(W, spec, solver, torch.bfloat16), W, spec, solver, torch.bfloat16)


def strange_groups(dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Groups [G, 32] that no lattice search should stumble over."""
    noise = torch.randn(12, 32, generator=rng)
    tiny = torch.finfo(dtype).tiny
    noise[0] = 0
    noise[1] = 0.37
    noise[2] = -1.5
    noise[3] *= tiny * 8
    noise[4] = noise[4] * 1e-3 + 100
    noise[5, 3] = 1000
    noise[6] = noise[6].sign()
    noise[7] = (
        torch.finfo(dtype).max * 0.4 * noise[7].clamp(-1, 1) if dtype != torch.float16 else noise[7] * 5e3
    )
    noise[8] = 0
    noise[8, 5] = 1e-4
    noise[9] = noise[9].abs()
    noise[10] = -noise[10].abs() - 3
    noise[11] *= 1e-6
    return noise.to(dtype)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("storage", DTYPES, ids=str)
@pytest.mark.parametrize("nbits", [4, 1])
def test_strange_groups(
    nbits: float, storage: torch.dtype, solver: str, rng: torch.Generator, device: torch.device
) -> None:
    W = strange_groups(storage, rng)
    spec = spec_for(nbits, tuple(W.shape), 32, 1)
    q, found = run(W, spec, solver, device, storage=storage), reference(W, spec, solver, storage)
    assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
    assert bool(torch.isfinite(q.scale).all() and torch.isfinite(q.zero).all())
    mine = errors(W, spec, q.codes(), q.scale, q.zero, storage)
    theirs = errors(W, spec, found.codes, found.scale, found.zero, storage)
    size = W.double().square().sum(1)
    # Constant groups come out exact.
    assert bool((mine[:3] <= size[:3] * 1e-12).all())
    # Which of several minima that nearly tie a group ends in hangs on rounding, and the iteration that "hqq" stops at
    # hangs on the sum over all groups. So single groups may differ, but not what all of them lose together. Group 3 is
    # left out: at the least step that there is, the search has no room.
    share = [k for k in range(4, len(W)) if float(size[k]) > 0]
    assert judged.as_good(mine[share] / size[share], theirs[share] / size[share]), (mine, theirs)


@pytest.mark.parametrize("storage", DTYPES, ids=str)
@pytest.mark.parametrize("nbits", [8, 3, 1.58])
def test_als_is_never_worse_than_min_max_as_stored(
    nbits: float, storage: torch.dtype, rng: torch.Generator, device: torch.device
) -> None:
    W = torch.cat([weights((48, 32), rng), strange_groups(storage, rng).float()]).to(storage)
    spec = spec_for(nbits, tuple(W.shape), 32, 1)
    q = run(W, spec, "als", device, storage=storage)
    assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
    mine = errors(W, spec, q.codes(), q.scale, q.zero, storage)
    plain = solve_min_max(W.float(), 1, spec.max_code, storage_dtype=storage)
    least = errors(W, spec, plain.codes, plain.scale, plain.zero, storage)
    made = Solution(q.codes(), q.scale, q.zero)
    unsure = [judged.doubt(W, solution, storage) for solution in (made, plain)]
    assert bool((mine <= least + sum(unsure)).all())


@pytest.mark.parametrize("storage", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", [8, 4, 3, 1.58, 1])
def test_min_max_is_the_reference_bit_for_bit(
    nbits: float, axis: int, storage: torch.dtype, rng: torch.Generator, device: torch.device
) -> None:
    W = torch.cat([weights((52, 32), rng), strange_groups(storage, rng).float()]).to(storage)
    W = W if axis == 1 else W.t().contiguous()
    spec, round_zero = spec_for(nbits, tuple(W.shape), 32, axis), nbits == 4
    q = run(W, spec, "minmax", device, storage=storage, round_zero=round_zero)
    found = reference(W, spec, "minmax", storage, round_zero)
    assert torch.equal(q.codes(torch.float32), found.codes)
    assert torch.equal(q.scale, found.scale) and torch.equal(q.zero, found.zero)


@pytest.mark.parametrize("axis", [1, 0])
def test_half_quadratic_shrinks_large_residuals(
    axis: int, rng: torch.Generator, device: torch.device
) -> None:
    W = weights((32, 32), rng, spread=2.0)
    W[:, :16] *= 0.01  # blocks with and without anything to shrink
    spec = spec_for(2, (32, 32), 32, axis)
    matrix = spec.grouping.group(W)
    unshrunk = get_solver("hqq")(matrix * 1e-3, axis, 3)
    found = reference(W, spec, "hqq")
    assert not torch.allclose(found.zero, unshrunk.zero, rtol=1e-3)  # the shrinkage matters here
    q = run(W, spec, "hqq", device)
    assert_agrees(q, found, W, spec, "hqq")
    assert_zeros_agree(q, found, matrix, min_max_lattice(matrix, axis, 3), axis)


def assert_zeros_agree(q: QTensor, found: Solution, matrix: Tensor, start: Lattice, dim: int) -> int:
    """Assert that the zeros are the reference's, but in groups where rounding decides; return the iterations."""
    assert isinstance(q.zero, Tensor)
    max_code = q.spec.max_code
    trajectory = restated(matrix.numpy(), start.inverse_scale.numpy(), start.zero.numpy(), dim, max_code)
    # Means of up to 32 numbers, twice, of the size of zeros and codes. Each passes what it is off by on to the next
    # as far as residuals survive the shrinking.
    allowed = 2 * 32 * len(trajectory) * 2.0**-24 * (found.zero.abs() + max_code)
    tied = hangs_on_rounding(matrix, start, dim, max_code)
    assert bool((((q.zero - found.zero).abs() <= allowed) | tied).all())
    return len(trajectory)


def test_half_quadratic_stops_where_the_reference_does(rng: torch.Generator, device: torch.device) -> None:
    # Few levels and round starts: the error rises after different numbers of iterations.
    stops = set()
    for size in (0.02, 0.05, 0.5, 3.0):
        W = weights((16, 32), rng, spread=size)
        spec = spec_for(3, (16, 32), 32, 1)
        start = min_max_lattice(W, 1, 7, round_zero=True)
        found = reference(W, spec, "hqq", round_zero=True)
        q = run(W, spec, "hqq", device, round_zero=True)
        stops.add(assert_zeros_agree(q, found, W, start, 1))
    # With nothing to shrink after 8 iterations on average, after more than 15 in none of 1500 runs.
    assert min(stops) < 20


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("axis", [1, 0])
def test_block_sizes_do_not_matter_nor_does_repetition(
    axis: int, solver: str, rng: torch.Generator, device: torch.device
) -> None:
    W = weights((32, 32), rng).bfloat16()
    spec = spec_for(4, (32, 32), 32, axis)
    first = run(W, spec, solver, device, config=candidates()[0])
    again = run(W, spec, solver, device, config=candidates()[0])
    assert torch.equal(first.W_q, again.W_q)
    assert torch.equal(first.scale, again.scale) and torch.equal(first.zero, again.zero)
    found = Solution(first.codes().float(), first.scale, first.zero)
    for config in (SolveConfig(1, 8), SolveConfig(2, 32)):
        assert_agrees(run(W, spec, solver, device, config=config), found, W, spec, solver)


@pytest.mark.parametrize("solver", [*SOLVERS, "minmax"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_raise_a_flag(
    value: float, solver: str, rng: torch.Generator, device: torch.device
) -> None:
    W = weights((70, 32), rng)
    W[66, 5] = value
    spec = spec_for(4, (70, 32), 32, 1)
    _, finite = solve.solve_and_pack(W.to(device), spec, solver, config=QUICK)
    assert not bool(finite.all())
    with pytest.raises(WeightError, match="NaN or infinite"):
        solve.check_finite(finite)


def test_strided_weights_are_read_as_they_are_meant(rng: torch.Generator, device: torch.device) -> None:
    W = weights((64, 48), rng).bfloat16().to(device)
    spec = spec_for(4, (48, 64), 64, 1)
    strided, _ = solve.solve_and_pack(W.t(), spec, "hqq", config=QUICK)
    plain, _ = solve.solve_and_pack(W.t().contiguous(), spec, "hqq", config=QUICK)
    assert torch.equal(strided.W_q, plain.W_q)


def test_what_is_not_supported_says_why(rng: torch.Generator, device: torch.device) -> None:
    W = weights((8, 8), rng).to(device)
    spec = spec_for(4, (8, 8), 8, 1)
    assert solve.unsupported_reason(W, spec, "als") is None
    for other, solver, match in (
        (W.double(), "als", "float64"),
        (W, "other", "no kernel"),
        (torch.empty(1, 1 << 17), "als", "registers"),
        (torch.empty(8, 8, device="meta"), "als", "on meta"),
    ):
        of_other = spec_for(4, tuple(other.shape), None, 1)
        reason = solve.unsupported_reason(other.to(device) if not other.is_meta else other, of_other, solver)
        assert reason is not None and match in reason
        with pytest.raises(ConfigError, match=match):
            solve.solve_and_pack(other.to(device) if not other.is_meta else other, of_other, solver)
    with pytest.raises(ConfigError, match="shape"):
        solve.solve_and_pack(W, spec_for(4, (4, 16), 16, 1), "als")


@pytest.fixture
def fused_here(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setitem(fused._MODULES, device.type, "hqq.kernels.solve")


@pytest.mark.parametrize("solver", [None, "hqq", "minmax"])
def test_quantizer_takes_the_kernel(
    solver: str | None,
    fused_here: None,
    poisoned: list[Tensor],
    rng: torch.Generator,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W = weights((8, 64), rng).to(device)
    options: dict[str, Any] = {"nbits": 4, "group_size": 64, "axis": 1, "compute_dtype": torch.bfloat16}
    options |= {"optimize": False} if solver == "minmax" else {"solver": solver}
    W_q, meta = Quantizer.quantize(W, **options)
    assert poisoned
    # What the kernel itself gives; how that compares with the reference is for the tests above.
    spec = spec_for(4, (8, 64), 64, 1)
    q, _ = solve.solve_and_pack(W, spec, solver or "als", storage_dtype=torch.bfloat16)
    assert torch.equal(W_q, q.W_q)
    assert torch.equal(meta["scale"], q.scale) and torch.equal(meta["zero"], q.zero)
    count = len(poisoned)
    monkeypatch.delitem(fused._MODULES, device.type)
    _, expected_meta = Quantizer.quantize(W, **options)
    assert len(poisoned) == count
    assert meta.keys() == expected_meta.keys()
    for name in ("scale", "zero"):
        assert (meta[name].shape, meta[name].dtype) == (expected_meta[name].shape, expected_meta[name].dtype)


def test_quantizer_keeps_to_the_reference_where_it_must(
    fused_here: None,
    poisoned: list[Tensor],
    rng: torch.Generator,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W = weights((8, 32), rng).to(device)
    Quantizer.quantize(W, nbits=8, group_size=None, axis=1, channel_wise=False)
    Quantizer.quantize(W, nbits=4, group_size=32, axis=1, solver="als", zero_mode="integer")
    Quantizer.quantize(W, nbits=4, group_size=32, axis=1, solver="als", importance=torch.ones(32))
    Quantizer.quantize(W.double(), nbits=4, group_size=32, axis=1)
    asked = []

    def replacement(
        tensor: Tensor, scale: Tensor, zero: Tensor, **_: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(tensor)
        return torch.zeros_like(tensor), scale, zero

    monkeypatch.setattr(Quantizer, "optimize_weights", staticmethod(replacement))
    Quantizer.quantize(W, nbits=4, group_size=32, axis=1)
    assert len(asked) == 1
    assert not poisoned


def test_quantizer_names_what_is_wrong_with_a_weight(
    fused_here: None, poisoned: list[Tensor], rng: torch.Generator, device: torch.device
) -> None:
    W = weights((8, 32), rng)
    W[3, 4] = float("nan")
    with pytest.raises(WeightError, match="NaN or infinite values.*checkpoint"):
        Quantizer.quantize(W.to(device), nbits=4, group_size=32, axis=1)
    assert poisoned
