"""What config.json says of a timm model, and what HQQtimm does with it: with a stand-in that builds like timm."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hqq.core.quantize import BaseQuantizeConfig
from hqq.engine.timm import HQQtimm
from hqq.errors import CheckpointError


class Vit(nn.Module):
    """The parts of a vision transformer that timm's builder makes adjustable."""

    def __init__(
        self, tag: str, num_classes: int, img_size: int, in_chans: int, act_layer: type[nn.Module]
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {"architecture": "vit", "tag": tag, "num_classes": 1000}
        self.patch_embed = nn.Conv2d(in_chans, 32, 8, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // 8) ** 2, 32))
        self.fc1, self.act, self.fc2 = nn.Linear(32, 64), act_layer(), nn.Linear(64, 32)
        self.head = nn.Linear(32, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.fc2(self.act(self.fc1(x))).mean(1))


def create_model(
    model_name: str,
    pretrained: bool = False,
    num_classes: int = 1000,
    img_size: int | None = None,
    in_chans: int = 3,
    act_layer: type[nn.Module] = nn.GELU,
) -> nn.Module:
    """As timm.create_model: a tag's settings are the defaults of some arguments."""
    architecture, _, tag = model_name.partition(".")
    assert architecture == "vit"
    return Vit(tag, num_classes, img_size or (48 if tag == "large_images" else 32), in_chans, act_layer)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("timm")
    module.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)


def quantized(make: Callable[[], nn.Module]) -> nn.Module:
    model = make().eval()
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    model.quantize_model(quant_config=config, compute_dtype=torch.float32, device="cpu")  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("vit", {"num_classes": 16}, 32),
        ("vit", {"img_size": 64, "num_classes": 16, "in_chans": 1, "pretrained": False}, 64),
        ("vit.large_images", {}, 48),
    ],
)
@torch.no_grad()
def test_arguments_come_back(
    name: str, options: dict[str, int], size: int, rng: torch.Generator, tmp_path: Path
) -> None:
    model = quantized(lambda: HQQtimm.create_model(name, **options))
    model.save_quantized(str(tmp_path / "q"))  # type: ignore[operator]
    written = json.loads((tmp_path / "q" / "config.json").read_text())
    assert written["architecture"] == "vit"
    assert written["model_args"] == {key: value for key, value in options.items() if key != "pretrained"}
    loaded = HQQtimm.from_quantized(str(tmp_path / "q"), compute_dtype=torch.float32, device="cpu")
    images = torch.randn(2, options.get("in_chans", 3), size, size, generator=rng)
    assert torch.equal(loaded(images), model(images))


@torch.no_grad()
def test_argument_that_json_cannot_hold_is_named(rng: torch.Generator, tmp_path: Path) -> None:
    model = quantized(lambda: HQQtimm.create_model("vit", act_layer=nn.ReLU))
    model.save_quantized(str(tmp_path / "q"))  # type: ignore[operator]
    with pytest.raises(
        CheckpointError, match=r"vit built with act_layer.*load_quantized\(path, model=model\)"
    ):
        HQQtimm.from_quantized(str(tmp_path / "q"), compute_dtype=torch.float32, device="cpu")


def test_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    model = quantized(lambda: HQQtimm.create_model("vit"))
    del model.pretrained_cfg
    model.save_quantized(str(tmp_path / "q"))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="without the name of a timm model"):
        HQQtimm.from_quantized(str(tmp_path / "q"), device="cpu")
