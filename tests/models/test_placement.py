"""Where parts of a model go, and how inputs follow. "cpu" and "cpu:0" stand for two devices where there is one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hqq import QuantConfig, quantize_model
from hqq.errors import ConfigError
from hqq.models.placement import InputMover, block_names, plan_placement
from tests.models.zoo import build, run

CONFIG = QuantConfig(nbits=4, group_size=16)
ONE, TWO = torch.device("cpu"), torch.device("cpu:0")


def test_blocks(rng: torch.Generator) -> None:
    assert block_names(build("llama", rng)[0]) == ["model.layers.0", "model.layers.1"]
    assert block_names(build("t5", rng)[0]) == [
        f"{part}.block.{i}" for part in ("encoder", "decoder") for i in (0, 1)
    ]
    assert block_names(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) == [
        "0",
        "1",
    ]
    assert block_names(nn.Bilinear(2, 2, 2)) == []


def test_blocks_are_spread_in_order_and_the_rest_follows(rng: torch.Generator) -> None:
    placement = plan_placement(build("llama", rng)[0], [ONE, TWO])
    where = {name: placement.device_of(name) for name in ("model.embed_tokens", "model.norm", "lm_head")}
    assert where == {"model.embed_tokens": ONE, "model.norm": TWO, "lm_head": TWO}
    assert placement.device_of("model.layers.0.mlp.up_proj") == ONE
    assert placement.device_of("model.layers.1.mlp.up_proj") == TWO
    many = plan_placement(nn.Sequential(*(nn.Linear(2, 2) for _ in range(5))), [ONE, TWO])
    assert [many.device_of(str(i)) for i in range(5)] == [ONE, ONE, ONE, TWO, TWO]


def test_the_longest_name_decides(rng: torch.Generator) -> None:
    model, _ = build("llama", rng)
    placement = plan_placement(model, {"": ONE, "model.layers.1": TWO})
    assert placement.device_of("model.layers.1.mlp") == TWO
    assert placement.device_of("model.layers.10") == ONE
    assert plan_placement(model, None).device_of("lm_head") is None


def test_no_blocks_to_spread() -> None:
    with pytest.raises(ConfigError, match="no list of blocks"):
        plan_placement(nn.Bilinear(2, 2, 2), [ONE, TWO])


@pytest.mark.parametrize("name", ["llama", "tied_llama", "t5", "vit"])
def test_a_spread_model_computes_the_same(name: str, rng: torch.Generator) -> None:
    model, inputs = build(name, rng)
    spread = copy.deepcopy(model)
    quantize_model(model, CONFIG)
    quantize_model(spread, CONFIG, device=["cpu", "cpu:0"])
    movers = [
        m for m in spread.modules() if any(isinstance(h, InputMover) for h in m._forward_pre_hooks.values())
    ]
    assert len(movers) > 3
    assert torch.equal(run(spread, inputs), run(model, inputs))


def test_inputs_move_wherever_they_are_nested() -> None:
    mover = InputMover(torch.device("meta"))
    x = torch.ones(2)
    args, kwargs = mover(nn.Identity(), (x, (x, [x])), {"mask": {"a": x}, "cache": "as it is", "n": None})
    assert args[0].is_meta and args[1][0].is_meta and args[1][1][0].is_meta
    assert kwargs["mask"]["a"].is_meta and kwargs["cache"] == "as it is" and kwargs["n"] is None


def test_a_spread_model_compiles_in_one_graph() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    quantize_model(model, CONFIG, device=["cpu", "cpu:0"])
    x = torch.randn(2, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "tied_llama", "t5"])
def test_cpu_and_gpu_together(name: str, rng: torch.Generator) -> None:
    model, inputs = build(name, rng)
    last = f"cuda:{torch.cuda.device_count() - 1}"
    quantize_model(model, CONFIG, device=["cpu" if torch.cuda.device_count() == 1 else "cuda:0", last])
    reference = copy.deepcopy(model)
    for module in reference.modules():
        module._forward_pre_hooks.clear()
    reference.to("cpu")
    devices = {p.device for p in model.parameters()}
    assert len(devices) == 2
    difference = run(model, inputs).cpu() - run(reference, inputs)
    # float32 on two kinds of device: sums of at most 64 products in another order, through two blocks.
    assert float(difference.abs().max()) < 1e-4
