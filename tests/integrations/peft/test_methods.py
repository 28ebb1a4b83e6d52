"""PEFT's methods on quantised layers: training, merging, unmerging, unloading, saving and loading."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BOFTConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from hqq.core.quantize import HQQLinear
from tests.integrations.peft.models import (
    correlation,
    float_model,
    hqq_model,
    logits,
    relative_distance,
    tokens,
)

# What PEFT does: names that transformers is about to drop, and what BOFT and SHiRA say on any CPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]

TARGETS = ["q_proj", "v_proj"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}


def lora(**options: Any) -> Any:
    return LoraConfig(**LORA, **options)


METHODS = {
    "LoRA": lora,
    "DoRA": lambda **options: lora(use_dora=True, **options),
    "VeRA": lambda **options: VeraConfig(r=8, target_modules=TARGETS, **options),
    "OFT": lambda **options: OFTConfig(oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=False, **options),
    "BOFT": lambda **options: BOFTConfig(boft_block_size=4, target_modules=TARGETS, **options),
    "MiSS": lambda **options: MissConfig(r=4, target_modules=TARGETS, **options),
    "SHiRA": lambda **options: ShiraConfig(r=4, target_modules=TARGETS, **options),
}  # fmt: skip
# VeRA trains two vectors between random matrices.
RATES = {"VeRA": 0.1}
DTYPES = [torch.float32, torch.bfloat16]


def adapted(method: str, base: nn.Module, seed: int) -> PeftModel:
    """The model with an adapter of random values, small enough for the model to stay near its base."""
    torch.manual_seed(seed)
    model = get_peft_model(base, METHODS[method]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def quantised_layers(model: nn.Module) -> dict[str, HQQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_leaves_the_codes(method: str, dtype: torch.dtype, seed: int) -> None:
    base = hqq_model(seed, dtype)
    codes = {name: layer.W_q.clone() for name, layer in quantised_layers(base).items()}
    torch.manual_seed(seed)
    model = get_peft_model(base, METHODS[method]()).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    optimizer = torch.optim.Adam(trained, lr=RATES.get(method, 0.02))
    batch = tokens(seed)
    losses = []
    for _ in range(12):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # To 0.72 of it with VeRA and BOFT, to less with the others; over nine standard deviations (30 seeds of each).
    assert min(losses[6:]) < losses[0]
    after = {name.replace(".base_layer", ""): layer for name, layer in quantised_layers(model).items()}
    for name, before in codes.items():
        assert torch.equal(after[f"base_model.model.{name}"].W_q, before)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_follow_those_of_the_float_model(method: str, seed: int) -> None:
    """What PEFT itself asks of HQQ: correlation above 0.97 with the same adapter, before and after merging."""
    batch = tokens(seed)
    expected = logits(adapted(method, float_model(seed), seed), batch)
    model = adapted(method, hqq_model(seed, nbits=8), seed)
    assert correlation(logits(model, batch), expected) > 0.97
    merged = model.merge_and_unload()
    assert correlation(logits(merged, batch), expected) > 0.97


@pytest.mark.parametrize("method", METHODS)
def test_merged_layers_stay_quantised_and_keep_bias_and_settings(method: str, seed: int) -> None:
    batch = tokens(seed)
    model = adapted(method, hqq_model(seed, nbits=8), seed)
    biases = [layer.bias.clone() for layer in quantised_layers(model).values() if layer.bias is not None]
    assert len(biases) == 8
    expected = logits(model, batch)
    model.merge_adapter()
    # Quantising to 8 bits again costs what quantising to 8 bits cost.
    allowed = (
        2 * relative_distance(logits(hqq_model(seed, nbits=8), batch), logits(float_model(seed), batch))
        + 1e-3
    )
    assert relative_distance(logits(model, batch), expected) < allowed
    merged = quantised_layers(model.unload())
    assert len(merged) == 14
    kept = [layer.bias for layer in merged.values() if layer.bias is not None]
    assert all(torch.equal(a, b) for a, b in zip(biases, kept, strict=True))
    assert {m.quant_config["weight_quant_params"]["nbits"] for m in merged.values()} == {8}


@pytest.mark.parametrize("method", METHODS)
def test_unmerging_and_unloading_bring_the_base_back(method: str, seed: int) -> None:
    batch = tokens(seed)
    base = logits(hqq_model(seed, nbits=8), batch)
    model = adapted(method, hqq_model(seed, nbits=8), seed)
    before = logits(model, batch)
    assert not torch.equal(before, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    model.merge_adapter()
    model.unmerge_adapter()
    allowed = 4 * relative_distance(base, logits(float_model(seed), batch)) + 1e-3
    assert relative_distance(logits(model, batch), before) < allowed
    fresh = adapted(method, hqq_model(seed, nbits=8), seed)
    assert torch.equal(logits(fresh.unload(), batch), base)


@pytest.mark.parametrize("method", METHODS)
def test_saved_adapters_load_onto_the_quantised_model(method: str, seed: int, tmp_path: Path) -> None:
    batch = tokens(seed)
    model = adapted(method, hqq_model(seed), seed)
    with warnings.catch_warnings():
        # Without a network PEFT warns that it cannot look up the base model's vocabulary.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(hqq_model(seed), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_two_adapters_are_switched_and_merged_together(seed: int) -> None:
    batch = tokens(seed)
    model = adapted("LoRA", hqq_model(seed, nbits=8), seed)
    first = logits(model, batch)
    model.add_adapter("second", lora(init_lora_weights=False))
    model.set_adapter("second")
    second = logits(model, batch)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, batch)
    merged = model.merge_and_unload(safe_merge=True, adapter_names=["default", "second"])
    assert correlation(logits(merged, batch), both) > 0.97
    assert all(
        layer.bias is not None for name, layer in quantised_layers(merged).items() if "self_attn" in name
    )


def test_biases_can_be_trained_and_survive_merging(seed: int) -> None:
    model = get_peft_model(hqq_model(seed, nbits=8), lora(bias="all"))
    batch = tokens(seed)
    model(input_ids=batch, labels=batch).loss.backward()
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    bias = layer.get_base_layer().bias
    assert bias.grad.abs().sum() > 0
    layer.merge()
    assert layer.get_base_layer().bias is bias
