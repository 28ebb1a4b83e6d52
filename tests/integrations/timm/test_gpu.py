"""timm's models on a GPU: quantised, saved and loaded there, with the results of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hqq.core.linear import HQQLinear
from hqq.core.quantize import BaseQuantizeConfig
from hqq.engine.timm import HQQtimm

timm = pytest.importorskip("timm", reason="timm (with torchvision) is not installed", exc_type=ImportError)

DEVICE = "cuda"
SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
MODELS = {
    "vit_tiny_patch16_224": (64, {**SMALL, "img_size": 64}),
    "beit_base_patch16_224": (64, {**SMALL, "img_size": 64}),
    "eva02_tiny_patch14_224": (56, {**SMALL, "img_size": 56}),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_quantise_save_and_load(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    size, options = MODELS[name]
    model = HQQtimm.create_model(name, pretrained=False, num_classes=10, **options).eval()
    for parameter in model.parameters():  # some layers start at zero
        parameter.add_(torch.randn_like(parameter) / 50)
    images = torch.randn(2, 3, size, size)
    before = model(images)
    model.quantize_model(
        quant_config=BaseQuantizeConfig(nbits=8, group_size=32), compute_dtype=dtype, device=DEVICE
    )
    layers = [module for module in model.modules() if isinstance(module, HQQLinear)]
    assert layers
    assert all(layer.W_q.is_cuda for layer in layers)
    images = images.to(DEVICE, dtype)
    after = model(images)
    # 8 bits leave 2^-9 of a group's range; with roundings of the dtype, percents at most a few layers deep.
    assert torch.linalg.vector_norm(after.cpu() - before) < 0.05 * torch.linalg.vector_norm(before)
    model.save_quantized(str(tmp_path))
    loaded = HQQtimm.from_quantized(str(tmp_path), compute_dtype=dtype, device=DEVICE)
    assert torch.equal(loaded(images), after)
