"""HQQEmbedding: rows looked up in codes, alone or shared with a linear layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hqq.core.embedding import HQQEmbedding
from hqq.core.linear import HQQLinear
from hqq.errors import ConfigError, DtypeError, IdRangeError, NotQuantizedError, ShapeError
from tests.cases import LAYOUTS, Case, case_id, grid
from tests.core.layers import config, linear, quantized, same_state

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def table(rng: torch.Generator, rows: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(rows, dim, padding_idx=0)
    embedding.weight.data = torch.randn(rows, dim, generator=rng)
    return embedding


@pytest.mark.parametrize("case", list(grid(layouts=LAYOUTS, dtypes=(torch.bfloat16,))), ids=case_id)
def test_every_row_is_the_dequantised_one(case: Case, rng: torch.Generator) -> None:
    embedding = table(rng, *case.shape)
    layer = HQQEmbedding.from_embedding(embedding, case.config(solver="hqq"), case.dtype, "cpu")
    ids = torch.randint(case.shape[0], (2, 5), generator=rng)
    rows = layer(ids)
    assert rows.dtype == case.dtype
    assert rows.shape == (2, 5, case.shape[1])
    assert torch.equal(rows, layer.dequantize()[ids])
    linear_layer = HQQLinear.from_weights(
        embedding.weight, None, case.config(solver="hqq"), case.dtype, "cpu"
    )
    assert torch.equal(layer.dequantize(), linear_layer.dequantize())


@pytest.mark.parametrize(
    "options",
    [
        {"view_as_float": True, "nbits": 8},
        {"quant_zero": True},
        {"quant_zero": True, "quant_scale": True, "nbits": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("axis", [0, 1])
def test_options(axis: int, options: dict[str, Any], rng: torch.Generator) -> None:
    layer = HQQEmbedding.from_embedding(
        table(rng, 24, 64), config(axis=axis, **options), torch.float16, "cpu"
    )
    assert torch.equal(layer(torch.arange(24)), layer.dequantize())


@pytest.mark.parametrize("group_size", [None, 16])
def test_one_scale_for_the_whole_table(group_size: int | None, rng: torch.Generator) -> None:
    nested = config(8, group_size)
    nested["weight_quant_params"]["channel_wise"] = False
    layer = HQQEmbedding.from_embedding(table(rng, 9, 32), nested, torch.float32, "cpu")
    assert torch.equal(layer(torch.arange(9)), layer.dequantize())


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_shapes_and_dtypes_of_ids(dtype: torch.dtype, shape: tuple[int, ...], rng: torch.Generator) -> None:
    layer = HQQEmbedding.from_embedding(table(rng, 10, 16), config(group_size=16), torch.float32, "cpu")
    ids = torch.randint(10, shape, generator=rng).to(dtype)
    assert torch.equal(layer(ids), layer.dequantize()[ids.long()])
    assert layer(ids).shape == (*shape, 16)


def test_only_the_rows_are_dequantised(rng: torch.Generator) -> None:
    layer = HQQEmbedding.from_embedding(table(rng, 5000, 16), config(group_size=16), torch.float32, "cpu")
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                largest = max(largest, out.numel())
            return out

    with Watch():
        layer(torch.tensor([7, 4999]))
    assert 0 < largest <= 5000  # a view of the scales; the table has sixteen times as many numbers


@pytest.mark.parametrize("ids", [[-1], [10], [3, 12], [-11]])
def test_ids_outside_the_table(ids: list[int], rng: torch.Generator) -> None:
    # Ten rows of 4-bit codes on axis 1 leave no slack; seven rows would read padding instead of failing.
    for rows in (10, 7):
        layer = HQQEmbedding.from_embedding(table(rng, rows, 16), config(group_size=16), torch.float32, "cpu")
        with pytest.raises(IdRangeError, match=rf"got ids from .*; expected 0 to {rows - 1}"):
            layer(torch.tensor(ids))
        with pytest.raises(IndexError):
            layer(torch.tensor([rows]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_that_are_no_integers(dtype: torch.dtype, rng: torch.Generator) -> None:
    layer = HQQEmbedding.from_embedding(table(rng, 10, 16), config(group_size=16), device="cpu")
    with pytest.raises(DtypeError, match=f"got ids of {dtype}; expected an integer dtype"):
        layer(torch.ones(2).to(dtype))


def test_the_original_is_left(rng: torch.Generator) -> None:
    embedding = table(rng, 10, 16)
    weight, before = embedding.weight, embedding.weight.detach().clone()
    layer = HQQEmbedding.from_embedding(embedding, config(group_size=16), device="cpu")
    assert embedding.weight is weight
    assert torch.equal(weight, before)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (10, 16, 0)
    assert repr(layer) == "HQQEmbedding(10, 16, padding_idx=0)"


def test_empty() -> None:
    layer = HQQEmbedding()
    with pytest.raises(NotQuantizedError):
        layer(torch.tensor([0]))
    assert repr(layer) == "HQQEmbedding(not quantised)"
    with pytest.raises(ConfigError):
        HQQEmbedding.from_embedding(nn.Embedding(10, 16), config(group_size=48), device="cpu")


@pytest.mark.parametrize("encoded", [True, False])
def test_state(encoded: bool, rng: torch.Generator) -> None:
    layer = HQQEmbedding.from_embedding(table(rng, 10, 16), config(group_size=16), torch.bfloat16, "cpu")
    layer.encoded_state_dict = encoded
    copied = HQQEmbedding(compute_dtype=torch.bfloat16, device="cpu")
    copied.encoded_state_dict = encoded
    copied.load_state_dict(layer.state_dict())
    assert (copied.num_embeddings, copied.embedding_dim) == (10, 16)
    assert same_state(dict(copied.state_dict()), dict(layer.state_dict()))
    with pytest.raises(
        ShapeError, match=r"got a quantised weight of shape \(10, 16\); the layer's is \(11, 16\)"
    ):
        HQQEmbedding(11, 16).load_state_dict(layer.state_dict())
    as_linear = HQQLinear(None, None, compute_dtype=torch.bfloat16, device="cpu")
    as_linear.load_state_dict(layer.state_dict())
    assert torch.equal(as_linear.dequantize(), layer.dequantize())


@pytest.mark.parametrize("options", [{}, {"quant_zero": True, "quant_scale": True}], ids=str)
def test_sharing_with_a_tied_linear(options: dict[str, Any], rng: torch.Generator) -> None:
    head = HQQLinear(
        linear(rng, 30, 32, bias=False), config(**options), compute_dtype=torch.float32, device="cpu"
    )
    embedding = HQQEmbedding.sharing(head, padding_idx=3)
    assert embedding.W_q is head.W_q
    assert embedding.padding_idx == 3
    shared = {tensor.data_ptr() for tensor in [*head.parameters(), *head.buffers()]}
    assert {tensor.data_ptr() for tensor in [*embedding.parameters(), *embedding.buffers()]} == shared
    assert torch.equal(embedding(torch.arange(30)), head.dequantize())
    assert same_state(dict(embedding.state_dict()), dict(head.state_dict()))
    head.W_q.data.zero_()
    assert torch.equal(embedding(torch.arange(30)), head.dequantize())


def test_sharing_needs_a_quantised_linear() -> None:
    with pytest.raises(NotQuantizedError):
        HQQEmbedding.sharing(HQQLinear(None, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts_and_copies(dtype: torch.dtype, rng: torch.Generator) -> None:
    layer = HQQEmbedding.from_embedding(
        table(rng, 10, 16), config(nbits=3, group_size=16), torch.float32, "cpu"
    )
    other = copy.deepcopy(layer).to(dtype)
    assert other(torch.arange(10)).dtype == dtype
    assert torch.equal(other.unpack(dtype=torch.uint8), layer.unpack(dtype=torch.uint8))
    assert layer.compute_dtype == torch.float32


def test_compiles_in_one_graph(rng: torch.Generator) -> None:
    torch._dynamo.reset()
    layer = HQQEmbedding.from_embedding(
        table(rng, 10, 16), config(nbits=3, group_size=16), torch.float32, "cpu"
    )
    ids = torch.tensor([[1, 9], [0, 4]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), layer(ids))
    torch._dynamo.reset()


def test_a_model_with_tied_weights_generates_its_own_logits(rng: torch.Generator) -> None:
    head = quantized(rng, bias=False)
    model = nn.Sequential(HQQEmbedding.sharing(head), nn.LayerNorm(64), head)
    logits = model(torch.tensor([[1, 2, 23]]))
    W = head.dequantize()
    expected = nn.functional.layer_norm(W[[1, 2, 23]], (64,)) @ W.t()
    torch.testing.assert_close(logits[0], expected)
