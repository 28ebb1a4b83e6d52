"""The README's examples run as written, in a folder that holds nothing but `examples`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "stdlib-llama"
README = (ROOT / "README.md").read_text()

pytest.importorskip("transformers")


def block(heading: str, language: str) -> str:
    """Return the first fenced block of a language under a heading."""
    found = re.search(
        rf"^## {re.escape(heading)}\n.*?^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL
    )
    assert found is not None
    return found[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(*command: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quick_start(folder: Path) -> None:
    program = block("Quick start", "python")
    assert len(program.splitlines()) == 10
    check = (
        "\nfrom hqq import HQQLinear"
        "\nprint(sum(isinstance(m, HQQLinear) for m in model.modules()), model.dtype, sep='|')"
    )
    printed = run(sys.executable, "-c", program + check, folder=folder)
    layers = 7 * json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
    assert printed.splitlines()[-1] == f"{layers}|torch.bfloat16"
    assert "bits per weight" in printed
    assert (folder / "stdlib-llama-4bit" / "config.json").exists()


def test_command_line(folder: Path) -> None:
    results = {}
    for line in block("Command line", "sh").splitlines():
        program, command, *arguments = shlex.split(line)
        assert program == "hqq"
        printed = run(sys.executable, "-m", "hqq", command, *arguments, "--json", folder=folder)
        results[command] = json.loads(printed)
    assert list(results) == ["quantize", "inspect", "eval", "generate", "convert"]
    assert 1 < results["eval"]["perplexity"] < 100  # the unigram model of the same tokens: 868
    assert (folder / "stdlib-3bit-pt" / "qmodel.pt").exists()
