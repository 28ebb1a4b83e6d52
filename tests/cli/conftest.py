"""Folders that the tests of the command line share, and one way to call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hqq.cli import main
from tests.cli.tiny_lm import write_folder


@dataclass(frozen=True)
class Result:
    """What a command left: exit status and both streams."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout as the one JSON object it must be."""
        data = json.loads(self.out)
        assert isinstance(data, dict)
        return data


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hqq(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command with its arguments as str or Path, bars off."""

    def run(command: str, *args: object) -> Result:
        capsys.readouterr()
        status = main([command, *map(str, args), "--quiet"])
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-precision model with its tokenizer. Tests must not write to it."""
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 10, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model_folder` quantised to 4 bits, in safetensors. Tests must not write to it."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny-4bit"
    assert (
        main(["quantize", str(model_folder), str(path), "--nbits", "4", "--group-size", "32", "--quiet"]) == 0
    )
    return path
