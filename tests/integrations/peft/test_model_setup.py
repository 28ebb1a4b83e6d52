"""Preparing a quantised model for PEFT: freezing it, and finding its layers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, VeraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.hqq import HqqLoraLinear
from torch import nn

from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.integrations import peft as integration
from tests.integrations.peft.models import float_model, hqq_model, tokens

# PEFT uses names that transformers is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def targeted(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_prepare_model_for_kbit_training_freezes_and_keeps_dtypes(checkpointing: bool, seed: int) -> None:
    model = hqq_model(seed, torch.bfloat16)
    options = {"use_reentrant": False}
    model = prepare_model_for_kbit_training(model, checkpointing, gradient_checkpointing_kwargs=options)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.embed_tokens.weight.dtype is torch.bfloat16
    assert model.is_gradient_checkpointing is checkpointing
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.W_q.dtype, layer.compute_dtype) == (torch.uint8, torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
    batch = tokens(seed)
    model(input_ids=batch, labels=batch).loss.backward()
    B = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert B.grad.abs().sum() > 0


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-linear"])
def test_all_linear_finds_quantised_layers_but_not_the_head(spelling: str, seed: int) -> None:
    for model in (hqq_model(seed), hqq_model(seed, lm_head=True, skip=())):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=spelling, task_type="CAUSAL_LM"))
        assert targeted(adapted, HqqLoraLinear) == PROJECTIONS


def test_all_linear_finds_float_and_quantised_layers_together(seed: int) -> None:
    model = float_model(seed)
    for layer in model.model.layers:
        layer.mlp.up_proj = HQQLinear(layer.mlp.up_proj, BaseQuantizeConfig(), compute_dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert targeted(adapted, HqqLoraLinear) == {"up_proj"}
    from peft.tuners.lora import Linear

    assert targeted(adapted, Linear) == PROJECTIONS - {"up_proj"}


def test_all_linear_adds_a_second_adapter_around_the_first(seed: int) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(hqq_model(seed), config)
    model.add_adapter("second", LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    layers = [module for module in model.modules() if isinstance(module, HqqLoraLinear)]
    assert len(layers) == 14
    assert all(set(layer.lora_A) == {"default", "second"} for layer in layers)


def test_all_linear_reaches_methods_that_imported_the_function_by_name(seed: int) -> None:
    model = hqq_model(seed)
    for layer in model.model.layers:
        del layer.mlp, layer.self_attn.k_proj
    from peft.tuners.vera.layer import VeraLayer

    # VeRA shares one pair of matrices between layers of one shape.
    adapted = get_peft_model(model, VeraConfig(r=2, target_modules="all-linear"))
    assert targeted(adapted, VeraLayer) == {"q_proj", "v_proj", "o_proj"}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = BaseQuantizeConfig(group_size=16)
        self.body = HQQLinear(nn.Linear(32, 32), config, compute_dtype=torch.float32)
        self.score = HQQLinear(nn.Linear(32, 16), config, compute_dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.body(x))


def test_models_of_other_libraries_have_no_head_to_leave_out() -> None:
    config = LoraConfig(r=2, target_modules="all-linear")
    assert targeted(get_peft_model(Classifier(), config), HqqLoraLinear) == {"body", "score"}


def test_the_classification_head_is_left_out(seed: int) -> None:
    class WithHead(Classifier):
        def get_output_embeddings(self) -> None:
            return None

    config = LoraConfig(r=2, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    names = set(integration._quantized_targets(WithHead(), config))
    assert names == {"body"}


def test_everything_is_repaired_in_this_version_and_only_once() -> None:
    first = integration.install()
    merge = HqqLoraLinear.merge
    assert set(first) == set(integration._REPAIRS)
    assert integration.install() == first
    assert HqqLoraLinear.merge is merge


ORDERS = {
    "PEFT after the layer": "import hqq.core.quantize as q; layer = make(q); import peft",
    "PEFT before hqq": "import peft; import hqq.core.quantize as q; layer = make(q)",
}
SCRIPT = """
import importlib.util, sys
import torch
def make(q):
    assert ("hqq.integrations.peft" in sys.modules) is False
    layer = q.HQQLinear(torch.nn.Linear(32, 32), q.BaseQuantizeConfig(), compute_dtype=torch.float32)
    importlib.util.find_spec("peft")  # looking for PEFT, as transformers does, is not importing it
    return layer
{order}
assert not any(type(finder).__module__ == "hqq.core.watch" for finder in sys.meta_path)
model = torch.nn.Sequential(layer)
bias = layer.bias.clone()
adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
assert torch.equal(adapted.merge_and_unload()[0].bias, bias)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_imports_works(order: str) -> None:
    script = SCRIPT.format(order=ORDERS[order])
    done: Any = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
