"""Exit statuses, streams and start-up of the command, whatever it is asked to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hqq as package
from hqq.cli import main
from hqq.cli.output import Output, number, size, table
from hqq.errors import HQQError
from tests.cli.conftest import Run

LINEARS = 2 * 7


def python(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=environment, check=False
    )


def test_module_runs_as_the_command(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = python("-m", "hqq", "quantize", str(model_folder), str(out), "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert len(data["layers"]) == LINEARS
    assert done.stderr == ""


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; from hqq.cli import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(status)"
    )
    for arguments in (["--help"], ["quantize", "--help"], ["--version"]):
        done = python("-c", code, *arguments)
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"hqq {package.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["quantize", "only-one"],
        ["quantize", "a", "b", "--nbits", "four"],
        ["quantize", "a", "b", "--group-size", "1.5"],
        ["quantize", "a", "b", "--dtype", "int8"],
        ["quantize", "a", "b", "--format", "gguf"],
        ["convert", "a", "b"],
        ["eval", "a"],
    ],
)
def test_usage_errors_are_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: hqq")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces what `hqq generate` runs by a function that raises `failing.error`."""
    import hqq.cli.generation as module

    state = SimpleNamespace(error=None)

    def run(args: object) -> Output:
        raise state.error

    monkeypatch.setattr(module, "run", run)
    return state


def test_errors_are_one_line_and_debug_shows_where(failing: SimpleNamespace, hqq: Run) -> None:
    failing.error = HQQError("got\n  this")
    result = hqq("generate", "m", "--prompt", "p")
    assert (result.status, result.out, result.err) == (1, "", "hqq: got this\n")
    failing.error = PermissionError(13, "Permission denied", "/some/where")
    assert hqq("generate", "m", "--prompt", "p").err == "hqq: Permission denied: /some/where\n"
    result = hqq("generate", "m", "--prompt", "p", "--debug")
    assert result.status == 1
    assert "Traceback" in result.err
    assert "in run" in result.err


def test_interruption_is_130_and_bugs_are_not_hidden(failing: SimpleNamespace, hqq: Run) -> None:
    failing.error = KeyboardInterrupt()
    result = hqq("generate", "m", "--prompt", "p")
    assert (result.status, result.err) == (130, "hqq: interrupted\n")
    for bug in (AttributeError("a bug"), RuntimeError("a bug")):
        failing.error = bug
        with pytest.raises(type(bug), match="a bug"):
            hqq("generate", "m", "--prompt", "p")


def test_limits_of_the_machine_are_one_line_too(failing: SimpleNamespace, hqq: Run) -> None:
    failing.error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    result = hqq("generate", "m", "--prompt", "p")
    assert (result.status, result.err) == (1, "hqq: CUDA out of memory. Tried to allocate\n")


@pytest.mark.filterwarnings("always")
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_warnings_are_one_line(checkpoint: Path, hqq: Run) -> None:
    result = hqq("generate", checkpoint, "--prompt", "p", "--max-new-tokens", 1, "--device", "cuda")
    assert result.status == 0
    assert result.err.startswith("hqq: warning: got device='cuda'")
    assert result.err.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_traceback(checkpoint: Path) -> None:
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-m', 'hqq', 'inspect', sys.argv[1]], "
    )
    code += "stdout=subprocess.PIPE, stderr=subprocess.PIPE); p.stdout.close(); "
    code += "sys.stderr.buffer.write(p.stderr.read()); sys.exit(p.wait())"
    done = python("-c", code, str(checkpoint))
    assert (done.returncode, done.stderr) == (1, "")


def test_output_helpers() -> None:
    assert json.loads(Output({"a": [1.0, float("nan"), {"b": float("inf")}]}, "").as_json()) == {
        "a": [1.0, None, {"b": None}]
    }
    assert [size(n) for n in (0, 999, 1000, 999_499, 999_600, 8_010_000, 12_345_678_901)] == [
        "0 B", "999 B", "1 kB", "999 kB", "1 MB", "8.01 MB", "12.3 GB"
    ]  # fmt: skip
    assert [number(x) for x in (1.0, 12.34567, 9876.5, 123456.0)] == ["1", "12.35", "9876", "1.235e+05"]
    assert table(["a", "bits"], [["long", "8"], ["x", "16"]]).splitlines() == [
        "a     bits", "----  ----", "long     8", "x       16"
    ]  # fmt: skip
