"""Both directions with the original hqq, in its own interpreter (opt-in).

Set HQQ_ORIGINAL_PYTHON to a Python that has hqq==0.2.8.post1 and safetensors; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hqq.core.linear import HQQLinear
from tests.cases import BITS, Case, Layout, grid
from tests.core.layers import exact, product_bound, same_state, same_value

INTERPRETER = os.environ.get("HQQ_ORIGINAL_PYTHON")
pytestmark = [
    pytest.mark.original,
    pytest.mark.skipif(
        not INTERPRETER, reason="HQQ_ORIGINAL_PYTHON names no interpreter with the original hqq"
    ),
]

# Row counts that the original can pack: it refuses or drops others.
CASES: list[Case] = list(
    grid(
        bits=BITS,
        layouts=(
            Layout((48, 96), 32, "several groups in each row and column"),
            Layout((40, 64), 16, "small groups"),
            Layout((64, 128), 64, "the usual group size"),
        ),
    )
)
FLOAT_VIEWS = [case for case in CASES if case.layout.group_size == 32 and case.nbits in (8, 4, 3, 1)]


def settings() -> dict[str, tuple[Case, bool, bool, bool]]:
    """Return name -> (case, view_as_float, optimize, bias)."""
    named = {f"l{i}": (case, False, i % 3 != 0, i % 2 == 0) for i, case in enumerate(CASES)}
    named.update({f"v{i}": (case, True, True, False) for i, case in enumerate(FLOAT_VIEWS)})
    return named


def prepare(folder: Path, rng: torch.Generator) -> dict[str, dict[str, torch.Tensor]]:
    """Write cases.json and inputs.pt, and return the inputs."""
    inputs, described = {}, {}
    for name, (case, view_as_float, optimize, bias) in settings().items():
        N, K = case.shape
        inputs[name] = {
            "W": torch.randn(N, K, generator=rng) * 0.05,
            "bias": torch.randn(N, generator=rng),
            "x": torch.randn(3, K, generator=rng),
        }
        described[name] = {
            "nbits": case.nbits,
            "group_size": case.group_size,
            "axis": case.axis,
            "dtype": str(case.dtype).removeprefix("torch."),
            "view_as_float": view_as_float,
            "optimize": optimize,
            "bias": bias,
        }
    torch.save(inputs, folder / "inputs.pt")
    (folder / "cases.json").write_text(json.dumps(described))
    return inputs


def ours(name: str, inputs: dict[str, torch.Tensor]) -> HQQLinear:
    case, view_as_float, optimize, bias = settings()[name]
    linear = nn.Linear(case.shape[1], case.shape[0], bias=bias)
    linear.weight.data = inputs["W"].clone()
    if bias:
        linear.bias.data = inputs["bias"].clone()
    config = case.config(view_as_float=view_as_float, optimize=optimize, solver="hqq")
    return HQQLinear(linear, config, compute_dtype=case.dtype, device="cpu")


def run_original(command: str, folder: Path) -> Any:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    worker = Path(__file__).with_name("original_worker.py")
    done = subprocess.run(
        [str(INTERPRETER), str(worker), command, str(folder)],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=True)


def test_the_original_reads_what_we_write(tmp_path: Path, rng: torch.Generator) -> None:
    inputs = prepare(tmp_path, rng)
    encoded: dict[str, torch.Tensor] = {}
    raw, expected = {}, {}
    for name in settings():
        layer = ours(name, inputs[name])
        x = inputs[name]["x"].to(layer.compute_dtype)
        bound = product_bound(layer, x)
        expected[name] = {"dequantized": layer.dequantize(), "exact": exact(layer, x), "bound": bound}
        encoded.update({f"{name}.{key}": value for key, value in layer.state_dict().items()})
        layer.encoded_state_dict = False
        raw[name] = dict(layer.state_dict())
    save_file(encoded, tmp_path / "ours.safetensors")
    torch.save(raw, tmp_path / "ours.pt")
    results = run_original("read", tmp_path)
    for form in ("encoded", "raw"):
        assert results[form].keys() == expected.keys()
        for name, values in expected.items():
            assert same_value(results[form][name]["dequantized"], values["dequantized"]), (form, name)
            error = (results[form][name]["y"].double() - values["exact"]).abs()
            assert bool((error <= values["bound"]).all()), (form, name)


def test_we_read_and_repeat_what_the_original_writes(tmp_path: Path, rng: torch.Generator) -> None:
    inputs = prepare(tmp_path, rng)
    results = run_original("write", tmp_path)
    encoded = load_file(tmp_path / "theirs.safetensors")
    raw = torch.load(tmp_path / "theirs.pt", weights_only=True)
    for name, (case, *_) in settings().items():
        state = {
            key.removeprefix(f"{name}."): value
            for key, value in encoded.items()
            if key.startswith(f"{name}.")
        }
        for form, theirs in (("encoded", state), ("raw", raw[name])):
            layer = HQQLinear(None, None, compute_dtype=case.dtype, device="cpu")
            layer.load_state_dict(theirs)
            assert same_value(layer.dequantize(), results[name]["dequantized"]), (form, name)
            x = inputs[name]["x"].to(case.dtype)
            error = (results[name]["y"].double() - exact(layer, x)).abs()
            assert bool((error <= product_bound(layer, x)).all()), (form, name)
        again = ours(name, inputs[name])
        assert same_state(dict(again.state_dict()), state), name
