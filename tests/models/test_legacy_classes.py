"""The original's classes and functions for whole models, under their old names."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hqq import BaseQuantizeConfig, HQQLinear
from hqq.core.utils import decode_safetensor_type, encode_safetensor_type, is_divisible
from hqq.errors import CheckpointError, DtypeError, NotQuantizedError
from hqq.models.base import BaseHQQModel, BasePatch
from hqq.models.hf.base import AutoHQQHFModel
from hqq.models.hf.llama import LlamaHQQ
from hqq.models.hf.mistral import MistralHQQ
from hqq.models.hf.mixtral import MixtralHQQ
from hqq.models.hf.phi import PhiHQQ
from tests.models.zoo import ConvNet, build, run

CONFIG = BaseQuantizeConfig(nbits=4, group_size=16)


def test_the_light_path_stays_light() -> None:
    code = (
        "import sys, hqq.core.quantize\n"
        "heavy = {'transformers', 'accelerate', 'hqq.models', 'hqq.engine', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import hqq.models.hf.base, hqq.engine.hf, hqq.engine.timm\n"
        "heavy = {'transformers', 'accelerate', 'timm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_quantise_save_and_load_as_the_readme_does(rng: torch.Generator, tmp_path: Path) -> None:
    model, inputs = build("llama", rng)
    got = AutoHQQHFModel.quantize_model(
        model, quant_config=CONFIG, compute_dtype=torch.bfloat16, device="cpu"
    )
    assert got is model and model.base_class is AutoHQQHFModel
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match="already quantised"):
        assert AutoHQQHFModel.quantize_model(model, CONFIG) is model
    AutoHQQHFModel.save_quantized(model, str(tmp_path / "a"))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "generation_config.json",
        "qmodel.pt",
    ]
    loaded = AutoHQQHFModel.from_quantized(
        "a", compute_dtype=torch.bfloat16, device="cpu", cache_dir=str(tmp_path)
    )
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert loaded.save_dir == str(tmp_path / "a")
    eager = AutoHQQHFModel.from_quantized(
        str(tmp_path / "a"), compute_dtype=torch.bfloat16, device="cpu", attn_implementation="eager"
    )
    assert eager.config._attn_implementation == "eager"
    with pytest.raises(CheckpointError, match="adapter"):
        AutoHQQHFModel.from_quantized(str(tmp_path / "a"), device="cpu", adapter="lora.pt")
    weights = AutoHQQHFModel.serialize_weights(model)
    stored = AutoHQQHFModel.load_weights(str(tmp_path / "a"))
    assert weights.keys() == stored.keys()
    assert torch.equal(
        weights["model.layers.0.mlp.up_proj"]["W_q"], stored["model.layers.0.mlp.up_proj"]["W_q"]
    )


@pytest.mark.parametrize(("per_file", "files"), [(1, 2), (2, 1), (5, 1)])
def test_save_to_safetensors(per_file: int, files: int, rng: torch.Generator, tmp_path: Path) -> None:
    model, inputs = build("llama", rng)
    AutoHQQHFModel.quantize_model(model, CONFIG, compute_dtype=torch.float32, device="cpu")
    AutoHQQHFModel.save_to_safetensors(model, f"{tmp_path}/s/", num_blocks_per_file=per_file, verbose=False)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == files
    loaded = AutoHQQHFModel.from_quantized(str(tmp_path / "s"), compute_dtype=torch.float32, device="cpu")
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert loaded.config.quantization_config["quant_method"] == "hqq"


def test_families_quantise_their_tags(rng: torch.Generator) -> None:
    model, _ = build("llama", rng)
    model.model.layers[0].mlp.router = nn.Linear(32, 32)
    LlamaHQQ.quantize_model(model, CONFIG, compute_dtype=torch.float32, device="cpu")
    assert isinstance(model.model.layers[0].mlp.up_proj, HQQLinear)
    assert type(model.model.layers[0].mlp.router) is nn.Linear
    assert set(LlamaHQQ.get_linear_tags()) == set(MistralHQQ.get_linear_tags())
    assert "block_sparse_moe.experts.w2" in MixtralHQQ.get_linear_tags()
    assert "mlp.fc2" in PhiHQQ.get_linear_tags()


def test_patching(rng: torch.Generator) -> None:
    model, _ = build("llama", rng)
    seen: dict[str, Any] = {}

    def patch(layer: nn.Module, param: Any) -> nn.Module:
        seen[str(layer.name)] = param
        return nn.Identity() if param == "drop" else layer

    BasePatch.autoname_modules(model)
    BasePatch.set_auto_linear_tags(model)
    assert "mlp.up_proj" in model.linear_tags
    BasePatch.patch_linearlayers(model, patch, {"mlp.up_proj": "drop"}, verbose=False)
    assert len(seen) == 15 and seen["model.layers.1.mlp.down_proj"] is None
    assert isinstance(model.model.layers[1].mlp.up_proj, nn.Identity)
    others: list[type] = []
    BasePatch.patch_nonlinearlayers(
        model, lambda module: others.append(type(module)) or module, verbose=False
    )
    assert nn.Embedding in others and nn.Linear not in others
    assert "model.layers.0" in BasePatch.get_ignore_layers(model)


def test_a_class_of_ones_own(rng: torch.Generator, tmp_path: Path) -> None:
    class ConvNetHQQ(BaseHQQModel):
        @classmethod
        def create_model(cls, save_dir: str, kwargs: dict[str, Any]) -> nn.Module:
            return ConvNet().eval()

    model = ConvNet().eval()
    config = BaseQuantizeConfig(nbits=8, group_size=8)
    ConvNetHQQ.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
    ConvNetHQQ.save_quantized(model, str(tmp_path / "c"))
    loaded = ConvNetHQQ.from_quantized(str(tmp_path / "c"), compute_dtype=torch.float32, device="cpu")
    images = torch.randn(2, 3, 8, 8, generator=rng)
    assert torch.equal(loaded(images), model(images))


def test_engine_hf(rng: torch.Generator, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from hqq.engine import hf

    assert hf.AutoTokenizer is AutoTokenizer
    model, inputs = build("llama", rng)
    model.save_pretrained(tmp_path / "original")
    wrapped = hf.HQQModelForCausalLM.from_pretrained(
        tmp_path / "original", load_in_4bit=True, device_map="auto"
    )
    with pytest.raises(NotQuantizedError, match="quantize_model"):
        wrapped.save_quantized(str(tmp_path / "q"))
    twin = copy.deepcopy(wrapped)
    wrapped.quantize_model(quant_config=CONFIG, compute_dtype=torch.float32, device="cpu")
    assert not twin.hqq_quantized and twin.quantize_model.__self__ is twin
    wrapped.save_quantized(str(tmp_path / "q"))
    loaded = hf.HQQModelForCausalLM.from_quantized(
        str(tmp_path / "q"), compute_dtype=torch.float32, device="cpu"
    )
    assert torch.equal(run(loaded, inputs), run(wrapped, inputs))
    assert "mlp.up_proj" in hf.HQQModelForCausalLM.get_linear_tags(loaded)


def test_engine_timm(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator, tmp_path: Path) -> None:
    """With a stand-in for timm, which is not among the test requirements: the names used are `create_model` and
    `default_cfg`."""

    def create_model(name: str, pretrained: bool = False, num_classes: int = 16) -> nn.Module:
        assert name == "conv_net"
        model = ConvNet().eval()
        model.head[2] = nn.Linear(32, num_classes)
        model.num_classes = num_classes
        model.default_cfg = {"architecture": name}
        return model

    stand_in = types.ModuleType("timm")
    stand_in.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    from hqq.engine.timm import HQQtimm

    model = HQQtimm.create_model("conv_net", num_classes=24)
    config = BaseQuantizeConfig(nbits=8, group_size=8)
    model.quantize_model(quant_config=config, compute_dtype=torch.float32, device="cpu")
    model.save_quantized(str(tmp_path / "t"))
    loaded = HQQtimm.from_quantized(str(tmp_path / "t"), compute_dtype=torch.float32, device="cpu")
    images = torch.randn(2, 3, 8, 8, generator=rng)
    assert loaded(images).shape == (2, 24)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    "value", [True, False, 7, 1.5, "4bit_u8", torch.bfloat16, torch.Size([3, 4]), torch.arange(3.0)], ids=str
)
def test_safetensor_types_round_trip(value: Any) -> None:
    kind = torch.dtype if isinstance(value, torch.dtype) else type(value)
    encoded = encode_safetensor_type(value)
    assert isinstance(encoded, torch.Tensor)
    decoded = decode_safetensor_type(encoded, kind)
    assert torch.equal(decoded, value) if isinstance(value, torch.Tensor) else decoded == value


def test_dtype_names_are_not_evaluated() -> None:
    bomb = encode_safetensor_type("__import__('os').getcwd()")
    with pytest.raises(DtypeError, match="getcwd"):
        decode_safetensor_type(bomb, torch.dtype)


def test_is_divisible() -> None:
    assert is_divisible(12, 4) and not is_divisible(12, 5)
