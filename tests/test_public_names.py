"""The import paths and names that scripts and libraries rely on, and this package's own."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import pytest

import hqq

# Path -> names that public code imports from it.
OLD_PATHS = {
    "hqq.core.quantize": [
        "BaseQuantizeConfig",
        "HQQBackend",
        "HQQLinear",
        "Quantizer",
        "hqq_base_quant_config",
    ],
    "hqq.core.bitpack": ["BitPack"],
    "hqq.core.optimize": ["optimize_weights_proximal", "optimize_weights_proximal_legacy"],
    "hqq.models.base": ["BaseHQQModel"],
    "hqq.models.hf.base": ["AutoHQQHFModel", "BaseHQQHFModel"],
    "hqq.models.hf.llama": ["LlamaHQQ"],
    "hqq.models.hf.mistral": ["MistralHQQ"],
    "hqq.models.hf.mixtral": ["MixtralHQQ"],
    "hqq.models.hf.phi": ["PhiHQQ"],
    "hqq.engine.base": ["HQQWrapper"],
    "hqq.engine.hf": ["AutoTokenizer", "HQQModelForCausalLM"],
    "hqq.engine.timm": ["HQQtimm"],
    "hqq.utils.generation_hf": ["HFGenerator", "patch_model_for_compiled_runtime"],
    "hqq.utils.patching": [
        "patch_add_quant_config",
        "patch_add_weight_param",
        "patch_hqq_inference",
        "patch_linearlayers",
        "patch_lora_inference",
        "prepare_for_inference",
        "recommended_inductor_config_setter",
    ],
}

STAR_NAMES = {
    "BaseQuantizeConfig",
    "BitPack",
    "HQQBackend",
    "HQQLinear",
    "Quantizer",
    "Tensor",
    "hqq_base_quant_config",
    "nn",
    "torch",
}

PUBLIC = [
    "__version__",
    "BaseQuantizeConfig",
    "Calibration",
    "HQQBackend",
    "HQQEmbedding",
    "HQQLinear",
    "QuantConfig",
    "QuantizationReport",
    "Quantizer",
    "load_quantized",
    "quantize_model",
    "save_quantized",
]


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, names in OLD_PATHS.items() for name in names]
)
def test_old_path_has_its_name(path: str, name: str) -> None:
    if path.startswith(("hqq.models.hf", "hqq.engine.hf")):
        pytest.importorskip("transformers")
    assert getattr(import_module(path), name) is not None


def test_star_import_of_quantize_gives_what_snippets_use() -> None:
    scope: dict[str, object] = {}
    exec("from hqq.core.quantize import *", scope)  # noqa: S102 - the statement under test has no other form
    import torch

    assert set(scope) - {"__builtins__"} == STAR_NAMES
    assert scope["torch"] is torch
    assert scope["nn"] is torch.nn
    assert scope["Tensor"] is torch.Tensor


def test_public_names_of_the_package() -> None:
    assert hqq.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(hqq, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="quantise_everything"):
        _ = hqq.quantise_everything


def test_distribution_has_the_version_of_the_module() -> None:
    try:
        installed = version("hqq")
    except PackageNotFoundError:
        pytest.skip("hqq is imported from its folder and not installed")
    assert installed == hqq.__version__ == "1.0.0"
