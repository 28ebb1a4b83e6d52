"""PEFT's methods on quantised layers of a GPU: adapters are made, trained, merged and unmerged where the codes are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

from hqq.core.linear import HQQLinear
from hqq.core.peft import PeftUtils
from hqq.core.quantize import BaseQuantizeConfig
from tests.integrations.peft import test_methods as methods
from tests.integrations.peft.models import (
    correlation,
    float_model,
    hqq_model,
    logits,
    relative_distance,
    tokens,
)

DEVICE = "cuda"

pytestmark = [
    *methods.pytestmark,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(seed: int, dtype: torch.dtype, nbits: int = 8) -> nn.Module:
    model = hqq_model(seed, dtype, nbits, device=DEVICE)
    assert all(layer.W_q.is_cuda for layer in methods.quantised_layers(model).values())  # type: ignore[union-attr]
    return model


def batch(seed: int) -> Tensor:
    return tokens(seed).to(DEVICE)


def train(model: nn.Module, ids: Tensor, rate: float = 0.01, steps: int = 12) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.is_cuda for parameter in trained)
    optimizer = torch.optim.Adam(trained, lr=rate)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", methods.METHODS)
def test_train_merge_unmerge_unload_save_load(
    method: str, dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    base = on_gpu(seed, dtype)
    codes = {name: layer.W_q.clone() for name, layer in methods.quantised_layers(base).items()}  # type: ignore[union-attr]
    ids = batch(seed)
    before = logits(base, ids)
    torch.manual_seed(seed)
    model = get_peft_model(base, methods.METHODS[method]())
    losses = train(model, ids, methods.RATES.get(method, 0.01))
    assert min(losses[6:]) < losses[0]
    for name, layer in methods.quantised_layers(model).items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(layer.W_q, codes[plain])  # type: ignore[arg-type]
    trained = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(on_gpu(seed, dtype), tmp_path, torch_device=DEVICE)
    assert torch.equal(logits(loaded, ids), trained)
    # Quantising to 8 bits again costs what quantising to 8 bits cost, and roundings of the dtype.
    cost = relative_distance(before, logits(float_model(seed, dtype).to(DEVICE), ids))
    allowed = 4 * cost + 16 * torch.finfo(dtype).eps
    model.merge_adapter()
    assert relative_distance(logits(model, ids), trained) < allowed
    model.unmerge_adapter()
    assert relative_distance(logits(model, ids), trained) < 2 * allowed
    merged = loaded.merge_and_unload()
    layers = methods.quantised_layers(merged)
    assert len(layers) == 14
    assert all(layer.W_q.is_cuda for layer in layers.values())  # type: ignore[union-attr]
    assert sum(layer.bias is not None and layer.bias.is_cuda for layer in layers.values()) == 8
    assert correlation(logits(merged, ids), trained) > 0.97


@pytest.mark.parametrize("reentrant", [True, False])
def test_prepare_model_for_kbit_training(reentrant: bool, seed: int) -> None:
    model = on_gpu(seed, torch.bfloat16, 4)
    options = {"use_reentrant": reentrant}
    model = prepare_model_for_kbit_training(model, True, gradient_checkpointing_kwargs=options)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    losses = train(model, batch(seed))
    assert losses[-1] < losses[0]
    layer: Any = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer()
    assert isinstance(layer, HQQLinear) and layer.W_q is not None and layer.W_q.is_cuda


FAKE = BaseQuantizeConfig(nbits=8, group_size=16)
OWN = {
    "default": {"r": 4, "lora_alpha": 8, "dropout": 0.05},
    "lora_with_fakequant": {"r": 4, "lora_alpha": 8, "quant_param": FAKE["weight_quant_params"]},
    "grouped_proj": {"proj_size": 4, "proj_num": 4, "zero_trainable": True},
}


@pytest.mark.parametrize("quantise", [True, False])
@pytest.mark.parametrize("lora_type", OWN)
def test_own_adapters(lora_type: str, quantise: bool, seed: int, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        return on_gpu(seed, torch.float32) if quantise else float_model(seed).to(DEVICE)

    settings: dict[str, Any] = {"lora_type": lora_type, "train_dtype": torch.float32, **OWN[lora_type]}
    if not quantise:
        settings.pop("zero_trainable", None)  # a full layer has no zeros
    model = fresh()
    PeftUtils.add_lora(model, {"self_attn.q_proj": settings, "mlp.down_proj": settings}, verbose=False)
    ids = batch(seed)
    losses = train(model, ids)
    assert min(losses[6:]) < losses[0]
    trained = logits(model, ids)
    PeftUtils.save_lora_weights(model, tmp_path / "adapters.pt", verbose=False)
    again = fresh()
    PeftUtils.load_lora_weights(again, tmp_path / "adapters.pt", verbose=False)
    assert torch.equal(logits(again, ids), trained)
    PeftUtils.cast_lora_weights(again, torch.float16, verbose=False)
    PeftUtils.merge_lora(again, {"*": BaseQuantizeConfig(nbits=8, group_size=16)}, verbose=False)
    assert correlation(logits(again, ids), trained) > 0.97
