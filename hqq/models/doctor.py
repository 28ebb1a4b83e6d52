"""What of the ecosystem is on this machine, and which backends work here: without importing any of it."""

from __future__ import annotations

import ast
import platform
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

import hqq
from hqq.core.choice import BACKEND_NAMES, unavailable
from hqq.kernels.tune_cache import cache_folder

LIBRARIES = (
    *("torch", "triton", "safetensors", "transformers", "tokenizers", "accelerate", "peft", "timm"),
    *("sentence-transformers", "torchao", "gemlite", "bitblas", "vllm"),
)
"""Names of the distributions that are looked for."""

_CHOOSING = ("default", "auto")  # names that stand for whatever works

Need = Literal["absent", "nothing", "dtype", "loader", "unsupported"]

_NEEDS: dict[Need, str] = {
    "absent": "transformers is not installed",
    "nothing": "transformers quantises and loads HQQ models by itself",
    "dtype": "transformers loses the dtype of HQQ layers; hqq repairs it when an HqqConfig is made",
    "loader": "transformers cannot quantise or load HQQ models; hqq repairs it when an HqqConfig is made",
    "unsupported": "transformers has no HQQ quantiser, or one that this hqq does not know; install transformers>=4.49",
}


@dataclass(frozen=True)
class Device:
    """A CUDA device: its name, compute capability and memory in bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class BackendState:
    """Whether a backend of `prepare_for_inference` works on this machine, and, if not, why."""

    name: str
    works: bool
    reason: str | None


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found: versions by library (None if absent), devices, backends, and what transformers needs."""

    hqq: str
    python: str
    platform: str
    libraries: dict[str, str | None]
    cuda: str | None
    devices: tuple[Device, ...]
    backends: tuple[BackendState, ...]
    transformers: Need
    transformers_text: str
    cache_folder: str
    cache_files: int

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON-able values."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Return what this machine has. Optional libraries are not imported, and nothing is raised for absent ones."""
    need, folder = transformers_need(), cache_folder()
    return Diagnosis(
        hqq=hqq.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        libraries={name: _version(name) for name in LIBRARIES},
        cuda=torch.version.cuda,
        devices=tuple(_device(index) for index in range(torch.cuda.device_count())),
        backends=tuple(_state(name) for name in BACKEND_NAMES if name not in _CHOOSING),
        transformers=need,
        transformers_text=_NEEDS[need],
        cache_folder=str(folder),
        cache_files=len(list(folder.glob("*.json"))) if folder.is_dir() else 0,
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, f"{properties.major}.{properties.minor}", properties.total_memory)


def _state(name: str) -> BackendState:
    reason = unavailable(name)
    return BackendState(name, reason is None, reason)


@cache
def transformers_need() -> Need:
    """Return what the installed transformers needs to run HQQ models, read from its source.

    Importing it to look, as the repair itself does, takes seconds.
    """
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return "absent"
    folder = Path(spec.submodule_search_locations[0]) / "quantizers"
    methods = _methods(folder / "quantizer_hqq.py", "HqqHfQuantizer")
    base = _methods(folder / "base.py", "HfQuantizer")
    if not methods:
        return "unsupported"
    if "create_quantized_param" in methods:
        if "check_quantized_param" not in methods:
            return "dtype"
        return "nothing" if "update_expected_keys" in methods else "unsupported"
    if "get_quantize_ops" in methods:
        return "nothing"
    return "loader" if {"get_quantize_ops", "get_weight_conversions"} <= base else "unsupported"


def _methods(file: Path, name: str) -> set[str]:
    """Return the names of the methods of class `name` in a source file; none if there is no such file or class."""
    if not file.is_file():
        return set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        part.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == name
        for part in node.body
        if isinstance(part, ast.FunctionDef)
    }
