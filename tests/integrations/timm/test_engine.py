"""Models of timm, where it is installed: quantised, saved, loaded by the names and arguments they were made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hqq import QuantConfig, load_quantized, quantize_model, save_quantized
from hqq.core.linear import HQQLinear
from hqq.core.quantize import BaseQuantizeConfig
from hqq.engine.timm import HQQtimm

timm = pytest.importorskip("timm", reason="timm (with torchvision) is not installed", exc_type=ImportError)

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
MODELS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("vit_tiny_patch16_224", {**SMALL, "img_size": 64, "num_classes": 10}, (2, 3, 64, 64)),
    ("vit_tiny_patch16_224.augreg_in21k", {**SMALL, "in_chans": 1, "num_classes": 8}, (1, 1, 224, 224)),
    ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg", "num_classes": 0}, (1, 3, 224, 224)),
    ("eva02_tiny_patch14_224", {**SMALL, "img_size": 56}, (1, 3, 56, 56)),
    ("beit_base_patch16_224", {**SMALL, "img_size": 64}, (1, 3, 64, 64)),
    (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 32},
        (1, 3, 224, 224),
    ),
    ("test_convnext", {"num_classes": 16}, (1, 3, 160, 160)),
]


def make(name: str, options: dict[str, Any], rng: torch.Generator) -> nn.Module:
    model = HQQtimm.create_model(name, pretrained=False, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some layers start at zero
            parameter.add_(torch.randn(parameter.shape, generator=rng) / 50)
    return model


@pytest.mark.parametrize(
    ("name", "options", "shape"), MODELS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(MODELS)]
)
@torch.no_grad()
def test_saved_model_loads_by_itself(
    name: str, options: dict[str, Any], shape: tuple[int, ...], rng: torch.Generator, tmp_path: Path
) -> None:
    model = make(name, options, rng)
    images = torch.randn(shape, generator=rng)
    before = model(images)
    config = BaseQuantizeConfig(nbits=8, group_size=32)
    model.quantize_model(quant_config=config, compute_dtype=torch.float32, device="cpu")
    assert any(isinstance(module, HQQLinear) for module in model.modules())
    after = model(images)
    # 8 bits leave 2^-9 of a group's range; a few layers deep that is percents at most.
    assert torch.linalg.vector_norm(after - before) < 0.05 * torch.linalg.vector_norm(before)
    model.save_quantized(str(tmp_path / "a"))
    loaded = HQQtimm.from_quantized(str(tmp_path / "a"), compute_dtype=torch.float32, device="cpu")
    assert torch.equal(loaded(images), after)
    loaded.save_quantized(str(tmp_path / "b"))
    again = HQQtimm.from_quantized(str(tmp_path / "b"), compute_dtype=torch.float32, device="cpu")
    assert torch.equal(again(images), after)


@torch.no_grad()
def test_plain_timm_model_without_the_engine(rng: torch.Generator, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    quantize_model(model, QuantConfig(nbits=4, group_size=32), progress=False)
    save_quantized(model, tmp_path / "q")
    skeleton = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    loaded = load_quantized(tmp_path / "q", model=skeleton)
    images = torch.randn(1, 3, 224, 224, generator=rng)
    assert torch.equal(loaded(images), model(images))


def test_weight_that_attention_reads_is_left_and_said() -> None:
    model = timm.create_model("beit_base_patch16_224", **SMALL, img_size=64)
    report = quantize_model(model, QuantConfig(nbits=4, group_size=32), progress=False)
    left = {row.name: row.reason for row in report.left}
    assert "reads this layer's weight" in left["blocks.0.attn.qkv"]
    assert "blocks.0.attn.proj" in {row.name for row in report.layers}
