"""The published snippets of the library run as written; where there is no GPU, on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqq import HQQBackend, HQQLinear
from hqq.core.peft import HQQLinearLoRA
from hqq.errors import BackendError, DeviceFallbackWarning

TEXT = (Path(__file__).parent / "library.md").read_text()
HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"

transformers = pytest.importorskip("transformers")


def snippet(title: str) -> str:
    found = re.search(rf"^### {re.escape(title)}\n```Python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def fallback() -> AbstractContextManager[Any]:
    """The warning that a snippet asking for a GPU gives where there is none."""
    return nullcontext() if HAS_CUDA else pytest.warns(DeviceFallbackWarning)


@pytest.fixture
def scope() -> dict[str, Any]:
    """What the first snippet leaves behind: the later ones rely on its imports."""
    names: dict[str, Any] = {"your_linear_layer": nn.Linear(128, 96)}
    names["W"] = names["your_linear_layer"].weight.detach().clone()
    names["b"] = names["your_linear_layer"].bias.detach().clone()
    with fallback():
        exec(snippet("Basic usage"), names)
    return names


@pytest.fixture(scope="module")
def model_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small Llama of random weights."""
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model_scope(scope: dict[str, Any], model_id: str) -> dict[str, Any]:
    return scope | {"model_id": model_id, "compute_dtype": torch.float16, "device": DEVICE}


@pytest.fixture
def default_backend() -> Iterator[None]:
    yield
    HQQLinear.set_backend(HQQBackend.PYTORCH)


def assert_quantised_well(layer: HQQLinear, W: Tensor, levels: int, group_size: int) -> None:
    """On average the solver is no further from W than rounding to its groups' min-max lattice at its worst."""
    groups = W.float().cpu().reshape(-1, group_size)
    step = (groups.amax(1) - groups.amin(1)) / (levels - 1)
    error = (layer.dequantize().float().cpu() - W.float().cpu()).abs().mean()
    assert 0 < error < step.mean() / 2


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(24, device=DEVICE).reshape(2, 12)
    with torch.no_grad():
        return model(ids).logits


def test_basic_usage(scope: dict[str, Any]) -> None:
    layer = scope["hqq_layer"]
    assert isinstance(layer, HQQLinear)
    assert layer.device.type == DEVICE
    assert scope["your_linear_layer"].weight is None  # del_orig=True
    assert_quantised_well(layer, scope["W"], levels=16, group_size=64)
    x = torch.randn(5, 128, dtype=torch.float16, device=DEVICE)
    expected = F.linear(x, layer.dequantize(), scope["b"].to(x))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_quantise_save_and_load(model_scope: dict[str, Any], tmp_path: Path) -> None:
    exec(snippet("Quantise a model"), model_scope)
    model = model_scope["model"]
    original = transformers.AutoModelForCausalLM.from_pretrained(model_scope["model_id"])
    layers = {name: m for name, m in model.named_modules() if isinstance(m, HQQLinear)}
    assert len(layers) == 14
    assert isinstance(model.lm_head, nn.Linear)
    for name, layer in layers.items():
        assert_quantised_well(layer, original.get_submodule(name).weight.half(), levels=16, group_size=64)
    before = logits(model)
    model_scope["save_dir"] = str(tmp_path / "saved")
    exec(snippet("Save and load"), model_scope)
    assert model_scope["model"] is not model
    assert torch.equal(logits(model_scope["model"].to(DEVICE)).to(before.dtype), before)


@pytest.mark.usefixtures("default_backend")
def test_native_backends(scope: dict[str, Any]) -> None:
    layer = scope["hqq_layer"]
    expected = layer.dequantize()
    chosen = []
    for line in snippet("Native backends").splitlines():
        exec(line, scope)
        chosen.append(layer.selection().asked)
    assert chosen == ["pytorch", "pytorch_compile", "triton"]
    # The last line stays in force: a kernel where there is a GPU, the torch reference and a reason elsewhere.
    assert torch.equal(layer.dequantize(), expected)
    assert (layer.selection().reason is None) == HAS_CUDA


@pytest.mark.parametrize(
    "line", [line for line in snippet("Optimized inference").splitlines() if "(model" in line]
)
def test_optimized_inference(line: str, model_scope: dict[str, Any]) -> None:
    """As published, and each of the lines that are commented out in its place."""
    exec(snippet("Quantise a model"), model_scope | {"compute_dtype": torch.bfloat16}, model_scope)
    model = model_scope["model"]
    expected = logits(model)
    library = re.search(r'backend="(gemlite|bitblas)"', line)
    imports = snippet("Optimized inference").partition("\n")[0]
    if library is not None and (not HAS_CUDA or find_spec(library[1]) is None):
        with pytest.raises(BackendError, match=library[1]):
            exec(f"{imports}\n{line.removeprefix('#')}", model_scope)
    else:
        exec(f"{imports}\n{line.removeprefix('#')}", model_scope)
    # Layers that a backend does not take multiply as before; others round in bfloat16 in other places.
    assert (logits(model) - expected).norm() < 2**-5 * expected.norm()


def assert_tags_have_their_settings(model: nn.Module) -> None:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, HQQLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        expected = (4, 64) if ".self_attn." in name else (3, 32)
        assert (layer.meta["nbits"], layer.meta["group_size"]) == expected, name


def test_settings_by_layer(model_scope: dict[str, Any]) -> None:
    exec(snippet("Quantise a model").partition("#Quantize")[0], model_scope)
    exec(snippet("Settings by layer"), model_scope)
    exec(
        "from hqq.models.hf.base import AutoHQQHFModel\n"
        "AutoHQQHFModel.quantize_model(model, quant_config=quant_config, compute_dtype=compute_dtype, device=device)",
        model_scope,
    )
    assert_tags_have_their_settings(model_scope["model"])


def on_device(code: str) -> str:
    """Return a snippet for transformers, which itself raises where it is told to use a GPU that is not there."""
    return code.replace('"cuda"', f'"{DEVICE}"')


def test_transformers(model_scope: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    exec(on_device(snippet("Transformers")), model_scope)
    model = model_scope["model"]
    assert sum(isinstance(m, HQQLinear) for m in model.modules()) == 14
    # "You can save/load quantized models as regular transformers models"
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=DEVICE)
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_settings_by_layer(model_scope: dict[str, Any]) -> None:
    pytest.importorskip("accelerate")
    imports, _, _ = snippet("Transformers").partition("\n\n")
    load = snippet("Transformers").partition("# Load and quantize\n")[2]
    exec(imports + "\n" + snippet("Transformers, settings by layer") + "\n" + on_device(load), model_scope)
    assert_tags_have_their_settings(model_scope["model"])


@pytest.mark.usefixtures("default_backend")
def test_adapters(model_scope: dict[str, Any], tmp_path: Path) -> None:
    exec(snippet("Quantise a model"), model_scope)
    before = logits(model_scope["model"])
    filename = tmp_path / "lora.pt"
    exec(snippet("Adapters"), model_scope | {"axis": 0, "filename": str(filename)})
    adapters = [m for m in model_scope["model"].modules() if isinstance(m, HQQLinearLoRA)]
    assert len(adapters) == 8
    assert filename.stat().st_size > 0
    # An adapter that has not been trained adds nothing.
    assert torch.equal(logits(model_scope["model"]), before)
