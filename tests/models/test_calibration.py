"""Calibration: what it does to the predictions, for all kinds of models, and what its report says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqq import Calibration, HQQLinear, QuantConfig, quantize_model
from hqq.core.experts import HQQExperts
from hqq.core.modules import named_sites
from hqq.models.calibration import text
from hqq.models.calibration.text import write_text
from hqq.models.report import QuantizationReport
from tests.models.zoo import ARCHITECTURES, ConvNet, build, llama, run

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "stdlib-llama"
CONFIG = QuantConfig(nbits=3, group_size=16)
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
FEW: dict[str, Any] = {"sequences": 6, "length": 48}


def mixtral(**options: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, **options}
    return MixtralForCausalLM(MixtralConfig(**SMALL, **settings)).eval()


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)).eval()


def phi() -> nn.Module:
    """Attention and feed-forward side by side, with one input."""
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**SMALL)).eval()


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings = {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **settings, head_dim=8)).eval()


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "neox": neox,
    "phi": phi,
}


def check_improved(report: QuantizationReport) -> None:
    """Every layer has inputs and no larger error than without; where there is nothing to gain it stays as it was."""
    for row in report.layers:
        assert row.output_error is not None
        assert row.output_error_before is not None
        if row.fallback is None:
            assert row.output_error < row.output_error_before
        else:
            # Inputs of random models hardly depend on each other.
            assert row.fallback.endswith("error feedback did not lower its error")
            assert row.output_error == row.output_error_before or "experts" in row.name
    # Where it gains least, a layer's error falls by 2 % (0.8 is a standard deviation), and by a fifth in most others.
    assert len(report.fallbacks) <= len(report.layers) / 2


def divergence(full: Tensor, quantized: Tensor) -> float:
    full, quantized = full.log_softmax(-1), quantized.log_softmax(-1)
    return F.kl_div(quantized, full, log_target=True, reduction="sum").item() / full[..., 0].numel()


def test_text_of_its_own_halves_what_two_bits_cost() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    full = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    held_out = (SHIPPED / "heldout.txt").read_text(encoding="utf-8")[:8000]
    ids = AutoTokenizer.from_pretrained(SHIPPED)(held_out, return_tensors="pt")["input_ids"][:, :1024]
    expected = run(full, {"input_ids": ids.view(2, -1)})
    costs = []
    for calibration in (None, Calibration(sequences=16, length=256)):
        model = copy.deepcopy(full)
        report = quantize_model(
            model, QuantConfig(nbits=2, group_size=64), calibration=calibration, progress=False
        )
        costs.append(divergence(expected, run(model, {"input_ids": ids.view(2, -1)})))
    check_improved(report)
    assert report.fallbacks == {}
    # 0.52 of the data-free solver's divergence with 40 sequences of 512 (docs/solver.md); here are a fifth of those.
    assert costs[1] < 0.75 * costs[0]


@pytest.mark.parametrize("name", ["llama", "tied_llama", "qwen2", "opt", *WRITERS])
def test_models_that_write(name: str, rng: torch.Generator) -> None:
    model = build(name, rng)[0] if name in ARCHITECTURES else WRITERS[name]()
    data_free = quantize_model(copy.deepcopy(model), CONFIG)
    report = quantize_model(
        model, CONFIG, calibration=Calibration("self", **FEW), errors=True, progress=False
    )
    assert [row.name for row in report.layers] == [row.name for row in data_free.layers]
    assert [row.bytes for row in report.layers] == [row.bytes for row in data_free.layers]
    check_improved(report)
    assert str(report).startswith(
        f"{len(report.layers)} layers quantised, {len(report.layers) - len(report.fallbacks)} of"
    )
    assert not any(isinstance(m, nn.Linear) and "head" not in n[0] for m, n in named_sites(model).items())
    assert bool(torch.isfinite(run(model, {"input_ids": torch.randint(3, 96, (2, 9), generator=rng)})).all())


@pytest.mark.parametrize("name", ["bert", "t5", "vit", "convnet"])
def test_models_that_do_not_write_take_inputs(name: str, rng: torch.Generator) -> None:
    model = ConvNet().eval() if name == "convnet" else build(name, rng)[0]
    ids = torch.randint(3, 96, (2, 40, 16), generator=rng)
    data: Any = {
        "bert": ids[0],
        "t5": [{"input_ids": part, "decoder_input_ids": part} for part in ids],
        "vit": torch.randn(80, 3, 16, 16, generator=rng),
        "convnet": [(torch.randn(40, 3, 8, 8, generator=rng),) for _ in range(2)],
    }[name]
    report = quantize_model(model, CONFIG, calibration=data, progress=False)
    check_improved(report)


def test_random_tokens(rng: torch.Generator) -> None:
    model, _ = llama(rng)
    report = quantize_model(model.eval(), CONFIG, calibration=Calibration("random", **FEW), progress=False)
    check_improved(report)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(nbits=4, group_size=16, axis=0),
        QuantConfig(nbits=2, group_size=None),
        QuantConfig(nbits=1, group_size=16),
        QuantConfig(nbits=4, group_size=16, quant_scale=True, quant_zero=True),
        QuantConfig(nbits=3, group_size=128),  # groups reach over rows
        QuantConfig(nbits=4, group_size=16, optimize=False),
        QuantConfig(nbits=4, group_size=16, solver="hqq"),
        QuantConfig(nbits=4, group_size=16, zero_mode="integer"),
        QuantConfig(nbits=4, group_size=16, view_as_float=True),
    ],
    ids=lambda config: f"{config.nbits}-{config.group_size}-{config.axis}-{config.solver}-{config.zero_mode}",
)
def test_configurations(rng: torch.Generator, config: QuantConfig) -> None:
    model, inputs = llama(rng)
    layers = {"mlp.up_proj": config, "mlp.down_proj": config, "self_attn.o_proj": config}
    report = quantize_model(
        model.eval(),
        layers,
        calibration=Calibration("random", **FEW),
        compute_dtype=torch.bfloat16,
        progress=False,
    )
    check_improved(report)
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, HQQLinear)
    spec = layer.qtensor().spec
    assert (spec.nbits, spec.axis, spec.view_as_float) == (config.nbits, config.axis, config.view_as_float)
    assert layer.compute_dtype == torch.bfloat16
    assert bool(torch.isfinite(run(model, inputs)).all())


def test_tied_weights_stay_tied(rng: torch.Generator) -> None:
    model, _ = build("tied_llama", rng)
    report = quantize_model(
        model, CONFIG, calibration=Calibration("random", **FEW), lm_head=True, progress=False
    )
    rows = {row.name: row for row in report.layers}
    assert rows["lm_head"].shared_with == "model.embed_tokens"
    assert rows["lm_head"].fallback is None
    assert model.lm_head.W_q.data_ptr() == model.model.embed_tokens.W_q.data_ptr()


def test_experts_that_see_too_little_keep_the_data_free_solution(rng: torch.Generator) -> None:
    model = mixtral()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight[:2] = 0  # ties that the router breaks
            block.mlp.gate.weight[2:] *= 50
    free = copy.deepcopy(model)
    quantize_model(free, CONFIG)
    calibration = Calibration(torch.randint(3, 96, (1, 40), generator=rng))
    report = quantize_model(model, CONFIG, calibration=calibration, progress=False)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    reason = report.fallbacks[name]
    assert "of 4 experts, such as" in reason
    assert "no input reached it" in reason or "with 32 inputs it needs" in reason
    experts, others = (m.get_submodule(name) for m in (model, free))
    assert isinstance(experts, HQQExperts)
    assert isinstance(others, HQQExperts)
    same = [torch.equal(a, b) for a, b in zip(experts, others, strict=True)]
    count = int(reason.split()[0])
    assert sum(same) == count
    assert count > 0


def test_layers_whose_inputs_are_zero_fall_back(rng: torch.Generator) -> None:
    model, _ = llama(rng)
    nn.init.zeros_(model.model.layers[1].post_attention_layernorm.weight)
    free = copy.deepcopy(model)
    quantize_model(free, CONFIG)
    report = quantize_model(model.eval(), CONFIG, calibration=Calibration("random", **FEW), progress=False)
    names = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert report.fallbacks == dict.fromkeys(names, "all its inputs are zero")
    layers = [m.model.layers[1].mlp.up_proj for m in (model, free)]
    assert torch.equal(layers[0].W_q, layers[1].W_q)


def test_layers_that_nothing_reaches_fall_back(rng: torch.Generator) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.used(x)
            return result

    mixed = torch.randn(100, 8, generator=rng) @ torch.randn(8, 32, generator=rng)
    report = quantize_model(Unused(), CONFIG, calibration=mixed, progress=False)
    assert report.fallbacks == {"other": "no input reached it"}


def test_padding_does_not_count(rng: torch.Generator) -> None:
    model, _ = llama(rng)
    ids = torch.randint(3, 96, (4, 40), generator=rng)
    mask = torch.ones_like(ids)
    mask[:, 30:] = 0
    other = torch.where(mask.bool(), ids, 7)
    states = []
    for tokens in (ids, other):
        twin = copy.deepcopy(model).eval()
        quantize_model(
            twin, CONFIG, calibration=[{"input_ids": tokens, "attention_mask": mask}], progress=False
        )
        states.append(twin.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_model_is_left_as_a_data_free_one_is(rng: torch.Generator) -> None:
    model = mixtral()
    model.train()
    twin = copy.deepcopy(model)
    quantize_model(twin, CONFIG)
    quantize_model(model, CONFIG, calibration=Calibration("random", **FEW), progress=False)
    assert {name: m.training for name, m in model.named_modules()} == {
        name: m.training for name, m in twin.named_modules()
    }
    assert model.config._experts_implementation == twin.config._experts_implementation
    assert model.config.quantization_config == twin.config.quantization_config
    assert not any(m._forward_pre_hooks for m in model.modules())
    shapes = [{key: (v.shape, v.dtype) for key, v in m.state_dict().items()} for m in (model, twin)]
    assert shapes[0] == shapes[1]


def test_blocks_spread_over_devices(rng: torch.Generator) -> None:
    model, inputs = llama(rng)
    model.eval()
    twin = copy.deepcopy(model)
    calibration = Calibration("random", **FEW)
    quantize_model(model, CONFIG, calibration=calibration, device=["cpu", "cpu"], progress=False)
    quantize_model(twin, CONFIG, calibration=calibration, device="cpu", progress=False)
    assert torch.equal(run(model, inputs), run(twin, inputs))
    # The movers of inputs, once each.
    assert all(len(block._forward_pre_hooks) == 1 for block in model.model.layers)
    assert not any(module._forward_pre_hooks for module in twin.modules())


def test_little_memory_means_text_in_turns(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    def small(model: nn.Module, sequences: int, *args: Any) -> Tensor:
        if sequences > 2:
            raise torch.cuda.OutOfMemoryError
        turns.append(sequences)
        return write_text(model, sequences, *args)

    monkeypatch.setattr(text, "write_text", small)
    model, _ = llama(rng)
    written = text.tokens_for(model.eval(), Calibration("self", sequences=5, length=8), 64, False)
    assert written is not None
    assert (turns, written.shape) == ([2, 1, 2], (5, 8))
    assert len(written.unique(dim=0)) == 5


def test_weights_are_let_go_of_when_their_codes_exist(rng: torch.Generator) -> None:
    model, _ = llama(rng)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    quantize_model(model.eval(), CONFIG, calibration=Calibration("random", **FEW), progress=False)
    assert len(layers) == 14
    assert all(layer.weight is None for layer in layers)


def test_text_follows_the_models_own_distribution(rng: torch.Generator) -> None:
    model, _ = llama(rng)
    with torch.no_grad():
        model.lm_head.weight.mul_(3000)  # certain of the next token, nearly always
    written = write_text(model.eval(), 5, 24, 96, seed=3)
    assert written.shape == (5, 24)
    assert torch.equal(written, write_text(model, 5, 24, 96, seed=3))
    assert not torch.equal(written[:, 0], write_text(model, 5, 24, 96, seed=4)[:, 0])
    likeliest = run(model, {"input_ids": written})[:, :-1].argmax(-1)
    assert (likeliest == written[:, 1:]).double().mean() > 0.9
