"""Joined projections compute what they did alone, write the same state, and can be parted again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqq import HQQLinear
from hqq.backends.merge import Projections, join, merge_projections
from hqq.core.config import BaseQuantizeConfig
from hqq.errors import BackendError

K = 128


def prepared(
    rng: torch.Generator, N: int, *, bias: bool = False, dtype: torch.dtype = torch.float16, **settings: Any
) -> HQQLinear:
    """Return a layer that holds a weight in tile order, on whatever device there is."""
    from hqq.backends.native import NativeWeight

    config = BaseQuantizeConfig(**{"nbits": 4, "group_size": 32, "axis": 1, **settings})
    weight = torch.randn(N, K, generator=rng)
    row = torch.randn(N, generator=rng) if bias else None
    layer = HQQLinear.from_weights(weight, row, config, compute_dtype=dtype, device="cpu")
    q = layer.qtensor()
    layer.prepare("pytorch")
    layer.hold(NativeWeight(q, dtype))
    return layer


class Block(nn.Module):
    def __init__(self, *layers: HQQLinear) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layers


def storages(layers: list[HQQLinear]) -> set[int]:
    return {layer.prepared.tiled.codes.untyped_storage().data_ptr() for layer in layers}  # type: ignore[union-attr]


def test_three_layers_are_one_product(rng: torch.Generator) -> None:
    for settings in ({}, {"axis": 0}, {"nbits": 3}, {"nbits": 8, "group_size": K}):
        layers = [prepared(rng, N, bias=N == 64, **settings) for N in (160, 64, 64)]
        x = torch.randn(3, K, generator=rng).half()
        alone = [layer(x) for layer in layers]
        states = [layer.state_dict() for layer in layers]
        shared = Projections(layers)
        assert shared.reason is None
        assert len(storages(layers)) == 1
        for got, again, expected in zip(shared(x), [layer(x) for layer in layers], alone, strict=True):
            assert torch.equal(again, expected)
            # One product or three: the sums of a result are the same, in another order at most.
            torch.testing.assert_close(got, expected, rtol=2**-9, atol=2**-9 * float(expected.abs().max()))
        for layer, state in zip(layers, states, strict=True):
            for key, value in layer.state_dict().items():
                assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key]


def test_joined_layers_are_found_again_without_a_copy(rng: torch.Generator) -> None:
    layers = [prepared(rng, N, axis=0) for N in (96, 32)]
    first = join(layers)
    second = join(layers)
    assert second.codes.data_ptr() == first.codes.data_ptr()
    assert second.meta.data_ptr() == first.meta.data_ptr()
    assert torch.equal(second.rows, first.rows)
    assert second.codes.shape == first.codes.shape
    assert second.spec == first.spec
    swapped = join(layers[::-1])
    assert swapped.codes.data_ptr() != first.codes.data_ptr()
    assert torch.equal(
        swapped.codes[: layers[1].prepared.tiled.codes.shape[0]], layers[1].prepared.tiled.codes
    )  # type: ignore[union-attr]


def test_restored_layers_have_their_own_memory_and_codes(rng: torch.Generator) -> None:
    from hqq.backends.prepare import restore

    block = Block(*[prepared(rng, N) for N in (64, 32, 32)])
    codes = [layer.qtensor().W_q.clone() for layer in block.children()]  # type: ignore[operator]
    assert [row.reason for row in merge_projections(block)] == [None]
    restore(block)
    for layer, expected in zip(block.children(), codes, strict=True):
        assert layer.prepared is None
        assert torch.equal(layer.W_q, expected)  # type: ignore[arg-type]
        assert layer.W_q.untyped_storage().nbytes() == expected.nbytes  # type: ignore[union-attr]


def test_what_cannot_be_joined_is_told_and_works_alone(rng: torch.Generator) -> None:
    x = torch.randn(2, K, generator=rng).half()
    mixed = [prepared(rng, 64), prepared(rng, 64, nbits=2)]
    shared = Projections(mixed)
    assert "cannot be joined" in str(shared.reason)
    assert all(torch.equal(got, layer(x)) for got, layer in zip(shared(x), mixed, strict=True))
    hooked = [prepared(rng, 64), prepared(rng, 64)]
    hooked[1].register_forward_hook(lambda module, args, out: out + 1)
    assert "hooks" in str(Projections(hooked).reason)
    with pytest.raises(BackendError, match="not prepared for the native kernels"):
        join([hooked[0], nn.Linear(K, 64)])


def test_the_report_tells_of_merges(rng: torch.Generator) -> None:
    from hqq.backends.prepare import prepare_for_inference

    block = Block(*[prepared(rng, N) for N in (64, 32, 32)])
    report = prepare_for_inference(block, allow_merge=True, backend="pytorch")
    assert [row.layers for row in report.merges] == [("q_proj", "k_proj", "v_proj")]
    assert "1 groups of projections left apart: a projection is not prepared" in str(report)
    assert prepare_for_inference(block, backend="pytorch").merges == ()
