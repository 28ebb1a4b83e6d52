"""Checkpoints exchanged with the original hqq 0.2.8 and transformers 4.56, in their own interpreter.

Opt-in: HQQ_ORIGINAL_PYTHON names a Python with hqq==0.2.8.post1, transformers 4.56 and accelerate.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from hqq import BaseQuantizeConfig, load_quantized, quantize_model, save_quantized
from hqq.models.hf.base import AutoHQQHFModel
from tests.models.zoo import Inputs, build, run

PYTHON = os.environ.get("HQQ_ORIGINAL_PYTHON")

pytestmark = [
    pytest.mark.original,
    pytest.mark.skipif(not PYTHON, reason="HQQ_ORIGINAL_PYTHON names no Python with the original hqq"),
]

# Runs in the other interpreter: reads checkpoints of ours, and writes some for us, with the logits it computes.
SCRIPT = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel

work = Path(sys.argv[1])
ids = torch.load(work / "ids.pt")
results = {}

@torch.no_grad()
def logits(model):
    assert any(isinstance(m, HQQLinear) for m in model.modules())
    return model.eval()(input_ids=ids).logits

model = AutoHQQHFModel.from_quantized(str(work / "ours_pt"), compute_dtype=torch.bfloat16, device="cpu")
results["ours_pt"] = logits(model)
for name in ("ours_safetensors", "ours_shards", "ours_blocks"):
    model = AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.bfloat16)
    results[name] = logits(model)
    model.save_pretrained(work / f"again_{name}")

model = AutoModelForCausalLM.from_pretrained(work / "original", dtype=torch.bfloat16)
config = {tag: BaseQuantizeConfig(**settings) for tag, settings in json.loads(sys.argv[2]).items()}
AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.bfloat16, device="cpu")
results["theirs_pt"] = logits(model)
AutoHQQHFModel.save_quantized(model, str(work / "theirs_pt"))

from transformers import HqqConfig
model = AutoModelForCausalLM.from_pretrained(
    work / "original", dtype=torch.bfloat16, quantization_config=HqqConfig(nbits=4, group_size=16)
)
results["theirs_safetensors"] = logits(model)
model.save_pretrained(work / "theirs_safetensors")
torch.save(results, work / "results.pt")
"""

SETTINGS = {
    "self_attn.q_proj": {"nbits": 4, "group_size": 16, "axis": 1},
    "self_attn.v_proj": {"nbits": 3, "group_size": 32, "axis": 0},
    "mlp.up_proj": {"nbits": 2, "group_size": 16, "axis": 1},
    "mlp.down_proj": {"nbits": 8, "group_size": 64, "axis": 1},
}


def test_checkpoints_go_both_ways(rng: torch.Generator, tmp_path: Path) -> None:
    model, inputs = build("llama", rng)
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "original")
    config = {tag: BaseQuantizeConfig(**settings, solver="hqq") for tag, settings in SETTINGS.items()}
    quantize_model(model, config)
    save_quantized(model, tmp_path / "ours_pt", format="pt")
    save_quantized(model, tmp_path / "ours_safetensors")
    save_quantized(model, tmp_path / "ours_shards", max_shard_size="4KB")
    AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "ours_blocks"), num_blocks_per_file=1)
    torch.save(inputs["input_ids"], tmp_path / "ids.pt")
    theirs = run_original(tmp_path, json.dumps(SETTINGS))
    mine = run(model, inputs)
    for name in ("ours_pt", "ours_safetensors", "ours_shards", "ours_blocks"):
        close(theirs[name], mine)
    for name in ("ours_safetensors", "ours_shards", "ours_blocks"):
        assert same_codes(load_quantized(tmp_path / f"again_{name}"), model)
    for name in ("theirs_pt", "theirs_safetensors"):
        loaded = load_quantized(tmp_path / name)
        close(theirs[name], run(loaded, inputs))
    # Same settings, same weights, same algorithm: the codes it found are ours.
    assert same_codes(load_quantized(tmp_path / "theirs_pt"), model)


def run_original(work: Path, settings: str) -> dict[str, torch.Tensor]:
    command = [str(PYTHON), "-c", SCRIPT, str(work), settings]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=work, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, torch.Tensor] = torch.load(work / "results.pt")
    return results


def same_codes(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """See test_golden_models.check_logits: the same steps in bf16 on other versions."""
    difference = (one.float() - other.float()).norm()
    assert float(difference) <= (2 * 34 / 3) ** 0.5 * 2**-9 * float(other.float().norm())


def test_the_tied_model(rng: torch.Generator, tmp_path: Path) -> None:
    model, inputs = build_bf16("tied_llama", rng)
    model.save_pretrained(tmp_path / "original")
    quantize_model(model, BaseQuantizeConfig(nbits=4, group_size=16, solver="hqq"))
    save_quantized(model, tmp_path / "ours_pt", format="pt")
    for name in ("ours_safetensors", "ours_shards", "ours_blocks"):
        save_quantized(model, tmp_path / name)
    torch.save(inputs["input_ids"], tmp_path / "ids.pt")
    theirs = run_original(tmp_path, '{"mlp.up_proj": {"nbits": 4, "group_size": 16}}')
    close(theirs["ours_pt"], run(model, inputs))
    close(theirs["ours_safetensors"], run(model, inputs))
    loaded = load_quantized(tmp_path / "theirs_pt")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    close(theirs["theirs_pt"], run(loaded, inputs))


def build_bf16(name: str, rng: torch.Generator) -> tuple[torch.nn.Module, Inputs]:
    model, inputs = build(name, rng)
    return model.to(torch.bfloat16), inputs
