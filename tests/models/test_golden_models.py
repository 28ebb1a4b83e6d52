"""The golden model: written by transformers 4.56.2 with hqq 0.2.8, and by hqq 0.2.8 itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hqq import BaseQuantizeConfig, HQQLinear, load_quantized
from hqq.core.modules import linear_tag
from hqq.models.checkpoint import convert_checkpoint, describe_checkpoint
from hqq.models.hf.base import AutoHQQHFModel

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "model"
FOLDERS = {"hf_safetensors": "hf_logits", "hqq_lib": "lib_logits"}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    values: dict[str, Any] = torch.load(GOLDEN / "expected.pt", weights_only=True)
    return values


@torch.no_grad()
def check_logits(model: nn.Module, expected: dict[str, Any], key: str) -> None:
    """Compare with the golden logits: the same steps in bf16, on another version of torch, where sums of products in
    another order let roundings fall on the other side.

    About 16 intermediate results of each of the two blocks, the last norm and the logits are rounded to bf16, each by
    at most 2^-9 of itself, by 2^-9 / sqrt(3) in the mean square; two runs differ by sqrt(2) times the root of their
    sum. 12288 logits stay within five standard deviations.
    """
    logits = model(expected["ids"]).logits.float()
    golden = expected[key]
    relative = math.sqrt(2 * (2 * 16 + 2) / 3) * 2**-9
    assert float((logits - golden).norm()) <= relative * float(golden.norm())
    assert float((logits - golden).abs().max()) <= 5 * relative * float(golden.square().mean().sqrt())


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits(folder: str, expected: dict[str, Any]) -> None:
    model = load_quantized(GOLDEN / folder)
    check_logits(model, expected, FOLDERS[folder])
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert sum(isinstance(module, HQQLinear) for module in model.modules()) == len(
        describe_checkpoint(GOLDEN / folder)
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_after_conversion(folder: str, expected: dict[str, Any], tmp_path: Path) -> None:
    other = "pt" if folder == "hf_safetensors" else "safetensors"
    convert_checkpoint(GOLDEN / folder, tmp_path / "m", format=other)
    model = load_quantized(tmp_path / "m")
    same = load_quantized(GOLDEN / folder)
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, same(expected["ids"]).logits)
    quant_config = model.config.quantization_config
    assert quant_config["quant_method"] == "hqq" and quant_config["skip_modules"] == ["lm_head"]


def test_from_quantized_of_either_format(expected: dict[str, Any]) -> None:
    for folder, key in FOLDERS.items():
        model = AutoHQQHFModel.from_quantized(
            str(GOLDEN / folder), compute_dtype=torch.bfloat16, device="cpu"
        )
        check_logits(model, expected, key)
        assert not any(p.requires_grad for p in model.parameters())


def test_quantising_the_original_gives_the_golden_codes(expected: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    golden = torch.load(GOLDEN / "hqq_lib" / "qmodel.pt", weights_only=True)
    layers = {name: state for name, state in golden.items() if "W_q" in state}
    config = {
        linear_tag(name): BaseQuantizeConfig(
            nbits=state["nbits"], group_size=state["group_size"], axis=state["axis"], solver="hqq"
        )
        for name, state in layers.items()
    }
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "original", dtype=torch.bfloat16)
    result = AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.bfloat16, device="cpu")
    assert result is model
    found = {name for name, module in model.named_modules() if isinstance(module, HQQLinear)}
    assert found == set(layers)
    for name, state in layers.items():
        layer = model.get_submodule(name)
        for key in ("W_q", "scale", "zero"):
            assert torch.equal(getattr(layer, key), state[key]), (name, key)
    check_logits(model, expected, "lib_logits")
