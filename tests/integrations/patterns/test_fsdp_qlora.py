"""What fsdp_qlora does with HQQLinear: skeletons filled later, tensors swapped under them, FSDP around them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

WORKER = Path(__file__).with_name("fsdp_worker.py")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def aten() -> Iterator[None]:
    previous = HQQLinear.backend
    HQQLinear.set_backend(HQQBackend.ATEN_BACKPROP)
    yield
    HQQLinear.set_backend(previous)


def skeleton(bias: bool = False, **options: object) -> HQQLinear:
    config = BaseQuantizeConfig(nbits=4, group_size=64, view_as_float=True, **options)
    with torch.device("meta"):
        linear = nn.Linear(128, 64, bias=bias)
    return HQQLinear(
        linear, config, del_orig=True, compute_dtype=torch.bfloat16, device="cpu", initialize=False
    )


def filled(W: torch.Tensor, **options: object) -> HQQLinear:
    layer = skeleton(**options)
    assert not layer.is_initialized()
    assert isinstance(layer.linear_layer, nn.Linear)
    layer.linear_layer.to_empty(device="cpu")
    layer.linear_layer.weight.data.copy_(W)
    layer.dora_scale = W.norm(p=2, dim=1)
    layer.initialize()
    return layer


QUANTISED = {"quant_zero": True, "quant_scale": True, "offload_meta": True}


@pytest.mark.parametrize("options", [{}, QUANTISED], ids=["plain", "quantised-scale"])
def test_skeleton_filled_later(options: dict[str, bool], rng: torch.Generator) -> None:
    W = torch.randn(64, 128, generator=rng)
    layer = filled(W, **options)
    assert layer.W_q is not None and layer.W_q.dtype == torch.bfloat16  # the storage dtype that FSDP shards
    direct = nn.Linear(128, 64, bias=False)
    direct.weight.data.copy_(W)
    config = BaseQuantizeConfig(nbits=4, group_size=64, view_as_float=True, **options)
    expected = HQQLinear(direct, config, compute_dtype=torch.bfloat16, device="cpu")
    assert torch.equal(layer.dequantize_aten(), expected.dequantize())
    layer.W_q = nn.Parameter(layer.W_q.to("cpu"))
    layer.in_gpu = False
    assert not layer.W_q.requires_grad
    assert torch.equal(layer.dequantize_aten(), expected.dequantize())


@pytest.mark.parametrize("options", [{}, QUANTISED], ids=["plain", "quantised-scale"])
def test_rank_without_data_is_filled_by_what_torch_synchronises(
    options: dict[str, bool], rng: torch.Generator
) -> None:
    W = torch.randn(64, 128, generator=rng)
    first, other = filled(W, **options), filled(torch.zeros(64, 128), **options)
    assert other.W_q is not None
    other.W_q = nn.Parameter(other.W_q.to("meta"))
    assert other.W_q.is_meta
    for module in other.modules():  # FSDP's param_init_fn
        module.to_empty(device="cpu", recurse=False)
    # sync_module_states sends the parameters and buffers of the first rank.
    sent = [*first.parameters(), *first.buffers()]
    received = [*other.parameters(), *other.buffers()]
    for source, target in zip(sent, received, strict=True):
        assert source.dtype == target.dtype
        target.data.copy_(source.data)
    assert torch.equal(other.dequantize_aten(), first.dequantize_aten())


def test_loftq_way_in(rng: torch.Generator) -> None:
    W = torch.randn(64, 128, generator=rng)
    layer = skeleton(bias=True)
    assert isinstance(layer.linear_layer, nn.Linear)
    layer.linear_layer.to_empty(device="cpu")
    layer.del_orig = False
    layer.linear_layer.weight.data.copy_(W)
    assert layer.quant_config is not None
    layer.quantize(layer.linear_layer.weight.data, **layer.quant_config)
    residue = (W - layer.dequantize().float()).norm()
    assert 0 < residue < 0.2 * W.norm()  # an eighth of a group's range and less, at 4 bits
    del layer.linear_layer
    layer.bias = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    assert torch.equal(layer(x), torch.ones(1, 64, dtype=torch.bfloat16))


def test_codes_lent_by_fsdp(rng: torch.Generator) -> None:
    """FSDP deletes the parameter and sets views of its own; the layer computes with those and registers nothing."""
    layer = filled(torch.randn(64, 128, generator=rng))
    x = torch.randn(2, 128, generator=rng).bfloat16()
    expected = layer(x)
    assert layer.W_q is not None
    flat = torch.cat([torch.zeros(8, dtype=torch.bfloat16), layer.W_q.detach().flatten()])
    shape = layer.W_q.shape
    del layer.W_q
    assert not layer.is_initialized()
    layer.W_q = flat[8:].view(shape)
    assert list(layer.parameters()) == []
    assert torch.equal(layer(x), expected)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_ranks_train_what_one_does(tmp_path: Path) -> None:
    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", str(WORKER), *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**_environment()}
        )

    store = str(tmp_path / "store")
    workers = [start("0", "1", ""), start("0", "2", store), start("1", "2", store)]
    outputs = [worker.communicate(timeout=240) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs
    alone, first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    assert alone[-1] < alone[0]
    # Both ranks have the same batch, so the mean gradient is one rank's; bfloat16 sums may differ in the last bit.
    assert first == pytest.approx(alone, rel=2**-7)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
