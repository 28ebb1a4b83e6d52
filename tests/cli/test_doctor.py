"""`hqq doctor`: what it says is what is there, and it imports none of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from hqq.core.choice import BACKEND_NAMES, unavailable
from hqq.models import doctor
from tests.cli.conftest import Run


def test_it_says_what_is_there(hqq: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dequantize-H200.json").write_text("{}")
    monkeypatch.setenv("HQQ_CACHE_DIR", str(tmp_path))
    done = hqq("doctor", "--json")
    assert done.status == 0
    data = done.json
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    assert data["libraries"] == {name: installed.get(name) for name in data["libraries"]}
    assert {"torch", "triton", "transformers", "peft", "vllm", "gemlite"} <= set(data["libraries"])
    assert [backend["name"] for backend in data["backends"]] == [*BACKEND_NAMES[2:]]
    for backend in data["backends"]:
        assert backend["reason"] == unavailable(backend["name"])
        assert backend["works"] == (backend["reason"] is None)
    assert len(data["devices"]) == torch.cuda.device_count()
    assert (data["cache_folder"], data["cache_files"]) == (str(tmp_path), 1)


def test_text_has_every_library_and_every_reason(hqq: Run) -> None:
    data = hqq("doctor", "--json").json
    text = hqq("doctor").out
    for name, version in data["libraries"].items():
        assert f"{name} " in text
        assert version is None or version in text
    for backend in data["backends"]:
        assert (backend["reason"] or "works") in text
    assert data["transformers_text"] in text
    assert data["cache_folder"] in text


def test_what_transformers_needs_is_what_the_repair_finds() -> None:
    pytest.importorskip("transformers")
    from hqq.integrations.transformers import support
    from hqq.integrations.transformers.versions import Support

    found = support()
    assert isinstance(found, Support)
    assert doctor.transformers_need() == found.need


@pytest.mark.parametrize(
    ("hqq_methods", "base_methods", "need"),
    [
        (None, [], "unsupported"),
        (["create_quantized_param", "check_quantized_param", "update_expected_keys"], [], "nothing"),
        (["create_quantized_param", "check_quantized_param"], [], "unsupported"),
        (["create_quantized_param"], [], "dtype"),
        (["validate_environment"], ["get_quantize_ops", "get_weight_conversions"], "loader"),
        (["validate_environment"], [], "unsupported"),
        (["get_quantize_ops"], ["get_quantize_ops", "get_weight_conversions"], "nothing"),
    ],
)
def test_other_versions_of_transformers(
    hqq_methods: list[str] | None,
    base_methods: list[str],
    need: str,
    tmp_path: Path,
) -> None:
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('read, not imported')")
    (package / "base.py").write_text(_class("HfQuantizer", base_methods))
    if hqq_methods is not None:
        (package / "quantizer_hqq.py").write_text(_class("HqqHfQuantizer", hqq_methods))
    assert _in_process("from hqq.models.doctor import transformers_need as f; print(f())", tmp_path) == need


def _class(name: str, methods: list[str]) -> str:
    return f"class {name}:\n    x = 0\n" + "".join(f"    def {method}(self): pass\n" for method in methods)


def _in_process(code: str, *paths: Path) -> str:
    root = Path(doctor.__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), str(root)])}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    return done.stdout.strip()


def test_nothing_optional_is_imported() -> None:
    code = (
        "import json, sys, torch; before = set(sys.modules); from hqq.cli import main; main(['doctor', '--json']);"
        "print('|' + json.dumps(sorted(set(sys.modules) - before)))"
    )
    loaded = json.loads(_in_process(code).rpartition("|")[2])
    optional = {name.replace("-", "_") for name in doctor.LIBRARIES} - {"torch"}
    assert "hqq.models.doctor" in loaded
    assert not [name for name in loaded if name.partition(".")[0] in optional]
