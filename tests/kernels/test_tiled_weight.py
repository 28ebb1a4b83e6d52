"""The tile order: an exact way there and back, parts of joined weights, and what has no tiles."""

from __future__ import annotations

import pytest
import torch

from hqq.core.meta import qtensor_from_meta
from hqq.core.qtensor import QSpec, QTensor
from hqq.core.quantizer import Quantizer
from hqq.errors import ConfigError, DtypeError, ShapeError
from hqq.kernels import TiledWeight, tiled_dequantize, tiled_linear, tiled_support
from hqq.kernels.tile_layout import arrange
from tests.kernels.tiled import LIMIT, exact, random_qtensor

DTYPES = [torch.float16, torch.bfloat16]


def assert_same(a: QTensor, b: QTensor) -> None:
    assert a.spec == b.spec
    assert torch.equal(a.W_q, b.W_q)
    for mine, its in ((a.scale, b.scale), (a.zero, b.zero)):
        assert isinstance(mine, torch.Tensor)
        assert isinstance(its, torch.Tensor)
        assert mine.dtype == its.dtype
        assert torch.equal(mine, its)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_there_and_back(bits: int, axis: int, dtype: torch.dtype) -> None:
    for group_size, shape in (
        (16, (48, 208)),
        (32, (96, 352)),
        (64, (192, 320)),
        (320, (640, 640)),
        (None, (128, 80)),
    ):
        q = random_qtensor(bits, *shape, axis, group_size, dtype)
        weight = TiledWeight.from_qtensor(q, dtype)
        assert_same(weight.to_qtensor(), q)
        assert torch.equal(tiled_dequantize(weight), q.dequantize(dtype))


def test_order_of_three_bit_codes() -> None:
    """What kernels take from a byte of a lane's words: row g in bits 0-2, row g + 8 in bits 3-5, and the rest."""
    tiles, chunks = 3, 2
    codes = torch.randint(0, 8, (tiles, 16, 256 * chunks), dtype=torch.uint8)
    load = arrange(codes, 3).view(torch.uint8).reshape(tiles, chunks, 3, 32, 4, 4)  # byte
    # [word, T, chunks, block, lane, byte]
    first = torch.stack([*(load[:, :, i, :, :3] for i in range(3)), load[..., 3, :].transpose(2, 3)], dim=2)
    word = list(first.movedim(4, 0))
    word.append((word[0] >> 6 & 3) | (word[1] >> 4 & 0xC) | (word[2] >> 2 & 0x30))
    for step, bytes_of_step in enumerate(word):
        for row in (0, 8):
            found = bytes_of_step >> (3 if row else 0) & 7
            for lane in range(32):
                g, c = divmod(lane, 4)
                for byte, j in enumerate((0, 2, 1, 3)):
                    inputs = codes[:, g + row].reshape(tiles, chunks, 4, 64)[..., 16 * c + 4 * step + j]
                    assert torch.equal(found[..., lane, byte], inputs)


@pytest.mark.parametrize("nbits", [6, 5, 1.58])
def test_bits_that_are_stored_in_more(nbits: float) -> None:
    W_q, meta = Quantizer.quantize(
        torch.randn(64, 128), nbits=nbits, group_size=64, optimize=False, device="cpu"
    )
    q = qtensor_from_meta(W_q, {**meta, "scale": meta["scale"].half(), "zero": meta["zero"].half()})
    assert_same(TiledWeight.from_qtensor(q, torch.float16).to_qtensor(), q)


def test_scales_of_another_dtype_come_back_as_they_were() -> None:
    q = random_qtensor(4, 64, 128, 1, 64, torch.float16)
    q.scale = q.scale.float() * (1 + 2**-20)  # type: ignore[union-attr]
    assert_same(TiledWeight.from_qtensor(q, torch.float16).to_qtensor(), q)


@pytest.mark.parametrize("axis", [0, 1])
def test_joined_weights_come_apart(axis: int) -> None:
    parts = [random_qtensor(4, N, 256, axis, 64, torch.float16) for N in (128, 64, 192)]
    parts[1].scale *= 2**-6  # another exponent than its neighbours'
    joined = TiledWeight.cat([TiledWeight.from_qtensor(q, torch.float16) for q in parts])
    assert joined.spec.shape == (384, 256)
    for q, piece in zip(parts, joined.split(), strict=True):
        assert_same(piece.to_qtensor(), q)
        assert piece.codes.data_ptr() >= joined.codes.data_ptr()
    together = torch.cat([q.dequantize(torch.float16) for q in parts])
    assert torch.equal(tiled_dequantize(joined), together)
    with pytest.raises(ConfigError, match=r"split\(\)"):
        joined.to_qtensor()
    other = TiledWeight.from_qtensor(random_qtensor(4, 64, 256, axis, 32, torch.float16), torch.float16)
    with pytest.raises(ConfigError, match="cannot be joined"):
        TiledWeight.cat([joined, other])


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_product_and_gradients_on_any_device(dtype: torch.dtype) -> None:
    q = random_qtensor(3, 96, 320, 1, 64, dtype)
    weight = TiledWeight.from_qtensor(q, dtype)
    x = torch.randn(2, 3, 320, dtype=dtype, requires_grad=True)
    bias = torch.randn(96, dtype=dtype, requires_grad=True)
    y = tiled_linear(x, weight, bias)
    expected = (x.double() @ exact(q).T + bias.double()).detach()
    assert float((y.detach().double() - expected).norm() / expected.norm()) <= LIMIT[dtype]
    grad = torch.randn_like(y)
    y.backward(grad)
    got = x.grad, bias.grad
    x.grad = bias.grad = None
    torch.nn.functional.linear(x, q.dequantize(dtype), bias).backward(grad)
    assert torch.equal(got[0], x.grad)  # type: ignore[arg-type]
    torch.testing.assert_close(got[1], bias.grad)


def test_operator() -> None:
    w = TiledWeight.from_qtensor(random_qtensor(4, 48, 128, 1, 64, torch.bfloat16), torch.bfloat16)
    x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
    shape = (w.bits, 1, w.group_size, 48, 128)
    torch.library.opcheck(torch.ops.hqq.tiled_linear.default, (x, None, w.codes, w.meta, w.rows, *shape))
    torch.library.opcheck(torch.ops.hqq.tiled_dequantize.default, (w.codes, w.meta, w.rows, *shape))


def test_bad_input() -> None:
    weight = TiledWeight.from_qtensor(random_qtensor(4, 48, 128, 1, 64, torch.bfloat16), torch.bfloat16)
    with pytest.raises(ShapeError, match="takes 128"):
        tiled_linear(torch.randn(3, 64).bfloat16(), weight)
    with pytest.raises(DtypeError, match="prepared for"):
        tiled_linear(torch.randn(3, 128), weight)
    with pytest.raises(ShapeError, match="bias"):
        tiled_linear(torch.randn(3, 128).bfloat16(), weight, torch.randn(47).bfloat16())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (QSpec(4, (64, 96), 48, 1), "groups of 48 along 96 inputs"),
        (QSpec(4, (64, 96), 8, 0), "groups of 8 along 64 outputs"),
        (QSpec(4, (64, 64, 2), 64, 1), "3 dimensions"),
        (QSpec(4, (64, 64), None, 1, packing=None), "not packed"),
        (QSpec(4, (64, 64), None, 1, channel_wise=False), "one group"),
    ],
)
def test_what_has_no_tiles(spec: QSpec, words: str) -> None:
    reason = tiled_support(spec, torch.float16)
    assert reason is not None
    assert words in reason


def test_other_dtypes_have_no_tiles() -> None:
    reason = tiled_support(QSpec(4, (64, 64)), torch.float32)
    assert reason is not None
    assert "float32" in reason
