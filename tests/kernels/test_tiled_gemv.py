"""The kernel for few tokens on the host: its own source, on small shapes, against the exact product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hqq.errors import ConfigError
from hqq.kernels import tiled_gemv
from hqq.kernels.tiled_gemv_config import GemvConfig, GemvWork, candidates, choose_gemv
from hqq.kernels.tiled_weight import TiledWeight
from tests.kernels.cuda_on_host.host_kernel import compiler
from tests.kernels.cuda_on_host.launchers import kernels_on_host
from tests.kernels.tiled import LIMIT, exact, random_qtensor

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiled_gemv, "multiprocessors", lambda device: 3)
    with kernels_on_host(tiled_gemv):
        yield


def product_error(
    bits: int,
    axis: int,
    group_size: int | None,
    shape: tuple[int, int],
    M: int,
    config: GemvConfig,
    dtype: torch.dtype,
    joined: int = 1,
) -> float:
    parts = [random_qtensor(bits, *shape, axis, group_size, dtype) for _ in range(joined)]
    weight = TiledWeight.cat([TiledWeight.from_qtensor(q, dtype) for q in parts])
    N, K = weight.spec.shape
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    guarded = torch.full((M + 2, N), float("nan"), dtype=dtype)
    work = GemvWork(dtype, bits, axis, weight.group_size, N, K, M)
    tensors = weight.codes, weight.meta, weight.rows, bias
    tiled_gemv.launch_gemv(work, config, x, *tensors, guarded[1:-1])
    assert guarded[0].isnan().all()
    assert guarded[-1].isnan().all()
    expected = x.double() @ torch.cat([exact(q) for q in parts]).T + bias.double()
    return float((guarded[1:-1].double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_one_token(bits: int, axis: int, dtype: torch.dtype) -> None:
    # Inputs that fill neither a chunk nor a warp's slice, and row tiles that do not fill the last group of two.
    config = GemvConfig(tiles=2, warps=2, blocks=4, per_sm=1, resident=1)
    assert product_error(bits, axis, 32, (96, 352), 1, config, dtype) <= LIMIT[dtype]


@pytest.mark.parametrize("M", [2, 3, 7, 8, 13])
@pytest.mark.parametrize("axis", [0, 1])
def test_several_tokens(axis: int, M: int) -> None:
    config = GemvConfig(tiles=1, warps=2, blocks=2, per_sm=2, resident=1)
    assert product_error(4, axis, 64, (128, 320), M, config, torch.bfloat16) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize("axis", [0, 1])
def test_more_tokens_than_columns(axis: int) -> None:
    config = GemvConfig(tiles=1, warps=2, blocks=2, per_sm=1, resident=1)
    assert product_error(4, axis, 64, (128, 320), 37, config, torch.bfloat16) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize("M", [1, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, None])
def test_group_sizes_of_rows(group_size: int | None, M: int) -> None:
    # With 8 tokens there are as many columns as tokens, so a block of 64 inputs takes a pass for each group in it.
    config = GemvConfig(tiles=1, warps=1, blocks=4, per_sm=1, resident=1)
    assert product_error(4, 1, group_size, (32, 384), M, config, torch.float16) <= LIMIT[torch.float16]


@pytest.mark.parametrize("group_size", [16, 48, 128, None])
def test_group_sizes_of_columns(group_size: int | None) -> None:
    config = GemvConfig(tiles=1, warps=2, blocks=4, per_sm=1, resident=1)
    assert product_error(2, 0, group_size, (384, 192), 2, config, torch.float16) <= LIMIT[torch.float16]


def test_several_sweeps_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # Twelve row tiles for three blocks, with shared memory for the sums of one or two at a time.
    monkeypatch.setattr(tiled_gemv, "_SHARED_BYTES", 2600)
    config = GemvConfig(tiles=1, warps=2, blocks=2, per_sm=1, resident=1)
    for axis in (0, 1):
        assert product_error(4, axis, 64, (192, 640), 4, config, torch.bfloat16) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize("axis", [0, 1])
def test_joined_weights(axis: int) -> None:
    config = GemvConfig(tiles=2, warps=2, blocks=4, per_sm=1, resident=1)
    assert product_error(4, axis, 32, (64, 256), 1, config, torch.float16, joined=3) <= LIMIT[torch.float16]


def test_rows_that_do_not_fill_a_tile() -> None:
    config = GemvConfig(tiles=1, warps=1, blocks=4, per_sm=1, resident=1)
    assert product_error(4, 1, 64, (40, 256), 2, config, torch.float16) <= LIMIT[torch.float16]


def test_small_scales_keep_their_digits() -> None:
    """axis=0 multiplies x by the scale in float16: a scale near the smallest normal number must not cost digits."""
    q = random_qtensor(4, 64, 256, 0, 64, torch.float16)
    q.scale *= 2**-9
    weight = TiledWeight.from_qtensor(q, torch.float16)
    x, out = torch.randn(1, 256).half(), torch.full((1, 64), float("nan"), dtype=torch.float16)
    work = GemvWork(torch.float16, 4, 0, 64, 64, 256, 1)
    config = GemvConfig(tiles=1, warps=2, blocks=4, per_sm=1, resident=1)
    tiled_gemv.launch_gemv(work, config, x, weight.codes, weight.meta, weight.rows, None, out)
    expected = x.double() @ exact(q).T
    # What is left is the rounding of results this small to float16.
    assert (out.double() - expected).abs().max() <= 2e-3 * expected.abs().max() + 2**-25


@pytest.mark.parametrize("axis", [0, 1])
def test_inputs_of_very_different_size(axis: int) -> None:
    """Inputs are split into 14 bits below the largest of 64: none is off by more than 2^-14 of that one."""
    q = random_qtensor(4, 64, 512, axis, 64, torch.float16)
    weight = TiledWeight.from_qtensor(q, torch.float16)
    x = torch.randn(3, 512).half()
    x[0, 7] = 2000.0  # an outlier in its block
    x[1] *= 2.0**-13  # some are subnormal
    x[2, 64:128] = 0.0
    out = torch.full((3, 64), float("nan"), dtype=torch.float16)
    config = GemvConfig(tiles=1, warps=2, blocks=4, per_sm=1, resident=1)
    work = GemvWork(torch.float16, 4, axis, 64, 64, 512, 3)
    tiled_gemv.launch_gemv(work, config, x, weight.codes, weight.meta, weight.rows, None, out)
    W, v = exact(q), x.double()
    ungroup, codes = q.spec.grouping.ungroup, q.codes(torch.uint8).double()
    assert isinstance(q.scale, torch.Tensor)
    assert isinstance(q.zero, torch.Tensor)
    scale, zero = (ungroup(of_group.double().expand_as(codes)) for of_group in (q.scale, q.zero))
    codes = ungroup(codes)
    split, factor = v[:, None].expand(-1, 64, -1), W  # what is split, and what its error is multiplied with
    if axis == 0:
        split, factor = v[:, None] * scale, codes
    largest = split.abs().unflatten(-1, (-1, 64)).amax(-1, keepdim=True)
    error = (factor.abs().unflatten(-1, (-1, 64)) * largest).sum((-2, -1)) * 2**-14
    # Fewer than 32 sums in fp32 one after the other, each of which may cost 2^-24 of the addends, and one rounding to
    # float16.
    error += 2**-19 * v.abs() @ (scale * (codes + zero)).T + 2**-11 * (v @ W.T).abs() + 2**-25
    assert torch.all((out.double() - v @ W.T).abs() <= error)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_not_finite_spoils_its_token_only(axis: int, bad: float) -> None:
    q = random_qtensor(2, 32, 256, axis, 32, torch.bfloat16)
    weight = TiledWeight.from_qtensor(q, torch.bfloat16)
    x, out = torch.randn(2, 256).bfloat16(), torch.full((2, 32), float("nan"), dtype=torch.bfloat16)
    x[1, 100] = bad
    work = GemvWork(torch.bfloat16, 2, axis, 32, 32, 256, 2)
    config = GemvConfig(tiles=1, warps=1, blocks=4, per_sm=1, resident=1)
    tiled_gemv.launch_gemv(work, config, x, weight.codes, weight.meta, weight.rows, None, out)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()


@pytest.mark.parametrize("M", [1, 2, 5, 19])
@pytest.mark.parametrize(("axis", "group_size"), [(0, 32), (1, 64), (1, 16)])
def test_norm_and_residual(axis: int, group_size: int, M: int) -> None:
    """An RMS norm in front of the product and a sum behind it; three sweeps over the inputs."""
    q = random_qtensor(4, 96, 640, axis, group_size, torch.bfloat16)
    weight = TiledWeight.from_qtensor(q, torch.bfloat16)
    x, residual = (3 * torch.randn(M, n).bfloat16() for n in (640, 96))
    bias, by = torch.randn(96).bfloat16(), torch.randn(640).bfloat16()
    out = torch.full((M, 96), float("nan"), dtype=torch.bfloat16)
    work = GemvWork(torch.bfloat16, 4, axis, group_size, 96, 640, M, normed=True)
    config = GemvConfig(tiles=1, warps=2, blocks=2, per_sm=1, resident=1)
    tensors = weight.codes, weight.meta, weight.rows, bias
    tiled_gemv.launch_gemv(work, config, x, *tensors, out, tiled_gemv.Norm(by, 0.5), residual)
    normed = by.double() * x.double() * (x.double().square().mean(-1, keepdim=True) + 0.5).rsqrt()
    product = normed @ exact(q).T
    error = (out.double() - (product + bias.double() + residual.double())).norm()
    assert error <= LIMIT[torch.bfloat16] * (product.norm() + residual.double().norm())


@pytest.mark.parametrize("N", [96, 72])
@pytest.mark.parametrize(("M", "normed"), [(1, True), (3, False)])
def test_gate(M: int, normed: bool, N: int) -> None:
    parts = [random_qtensor(2, N, 256, 1, 64, torch.float16) for _ in range(2)]
    weight = TiledWeight.cat([TiledWeight.from_qtensor(q, torch.float16) for q in parts])
    x, by, bias = torch.randn(M, 256).half(), torch.rand(256).half(), torch.randn(2 * N).half()
    guarded = torch.full((M + 2, N), float("nan"), dtype=torch.float16)
    work = GemvWork(torch.float16, 2, 1, 64, 2 * N, 256, M, normed=normed, gated=True)
    config = GemvConfig(tiles=2, warps=1, blocks=4, per_sm=1, resident=1)
    tensors = weight.codes, weight.meta, weight.rows, bias
    norm = tiled_gemv.Norm(by, 1e-6) if normed else None
    tiled_gemv.launch_gemv(work, config, x, *tensors, guarded[1:-1], norm)
    assert guarded[0].isnan().all()
    assert guarded[-1].isnan().all()
    v = x.double()
    if normed:
        v = by.double() * v * (v.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    gate, other = (v @ exact(q).T + b.double() for q, b in zip(parts, bias.split(N), strict=True))
    expected = torch.nn.functional.silu(gate) * other
    assert float((guarded[1:-1].double() - expected).norm() / expected.norm()) <= LIMIT[torch.float16]


def test_a_gate_that_cannot_be() -> None:
    work = GemvWork(torch.float16, 4, 1, 64, 64, 256, 1, gated=True)
    config = GemvConfig(tiles=1, warps=1, blocks=4, per_sm=1, resident=1)
    weight = TiledWeight.from_qtensor(random_qtensor(4, 64, 256, 1, 64, torch.float16), torch.float16)
    x, out = torch.randn(1, 256).half(), torch.empty(1, 32).half()
    for wrong, its_config in ((work, config), (work._replace(axis=0), config._replace(tiles=2))):
        with pytest.raises(ConfigError, match="a gate takes axis=1"):
            tiled_gemv.launch_gemv(wrong, its_config, x, weight.codes, weight.meta, weight.rows, None, out)


def test_configurations_are_possible() -> None:
    """Every configuration that is chosen or measured has whole chunks, and row tiles that share what they must."""
    for bits in (8, 4, 3, 2, 1):
        for axis, group_size in ((1, 64), (0, 16), (0, 48), (0, 64)):
            for N, K in ((28672, 4096), (4096, 14336), (256, 640), (768, 64)):
                for tokens in (1, 2, 8, 16):
                    work = GemvWork(torch.bfloat16, bits, axis, group_size, N, K, tokens)
                    assert choose_gemv(work, 132) in candidates(work, 132)
                    for config in candidates(work, 132):
                        assert config.blocks % {8: 1, 4: 1, 2: 2, 3: 4, 1: 4}[bits] == 0
                        assert axis == 1 or group_size // 16 % config.tiles == 0
                        assert 32 * config.warps * config.per_sm <= 2048
                        assert 1 <= config.warps <= 32
                        assert 1 <= config.resident <= 8
