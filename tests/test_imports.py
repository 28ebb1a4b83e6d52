"""Imports run one way, optional libraries stay optional, and importing hqq is cheap."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hqq

PACKAGE = Path(hqq.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own layer and from those before it.
LAYERS = ("errors", "core", "kernels", "backends", "models", "integrations", "cli")
LAYER_OF_FILE = {"__main__": "cli"}

# Old import paths: re-exports for callers outside, which nobody inside needs.
FACADES = ("hqq.engine", "hqq.utils", "hqq.core.quantize", "hqq.core.optimize", "hqq.core.utils")

# Modules named as text are imported when first asked for; these registries may name what lies above them.
REGISTRIES = {
    "__init__.py": "the lazy public names",
    "core/backend.py": "finds a backend by name; a backend needs the layer below it, not the other way round",
    "core/choice.py": "finds a backend that multiplies by name, as core/backend.py does",
    "core/solvers/fused.py": "finds a device's solver kernels by name, as core/backend.py finds backends",
    "core/solvers/feedback_round.py": "finds a device's kernel by name, as core/solvers/fused.py does",
    "core/hooks.py": "installs the repair of a library once that library has been imported by someone else",
    "core/watch.py": "installs the repair of a library once that library has been imported by someone else",
}

OPTIONAL = {
    "accelerate": "hf",
    "bitblas": "bitblas",
    "cuda": "cuda",
    "gemlite": "gemlite",
    "huggingface_hub": "hub",
    "matplotlib": "plots",
    "peft": "peft",
    "timm": "timm",
    "tokenizers": "hf",
    "torchao": "torchao",
    "transformers": "hf",
    "triton": "triton",
    "vllm": "vllm",
}

# Files that are not named after the optional library they import.
ALLOWED = {
    "backends/marlin.py": ({"vllm"}, "the package whose Marlin kernels can be called"),
    "kernels/": ({"triton"}, "what this folder is written in"),
    "models/load.py": (
        {"huggingface_hub", "transformers"},
        "opens models of transformers, by folder or hub id",
    ),
    "models/checkpoint/layout.py": ({"huggingface_hub"}, "a checkpoint may be named by its hub id"),
    "models/checkpoint/skeleton.py": (
        {"transformers"},
        "builds the empty model that a checkpoint is loaded into",
    ),
}


def is_facade(module: str) -> bool:
    return any(module == facade or module.startswith(f"{facade}.") for facade in FACADES)


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def layer_of(module: str) -> int | None:
    """Return the rank of a module's layer, None for the package itself and the façades."""
    parts = module.split(".")
    name = LAYER_OF_FILE.get(parts[1], parts[1]) if len(parts) > 1 else ""
    return LAYERS.index(name) if name in LAYERS else None


def module_of(file: Path) -> str:
    parts = ("hqq", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import statement, those inside functions and under conditions included."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(file)}:{node.lineno}: relative import"
            module = node.module or ""
            yield node.lineno, module
            # `from hqq import core` and `from hqq.core import quantize` name modules as well.
            yield from (
                (node.lineno, f"{module}.{alias.name}")
                for alias in node.names
                if module.partition(".")[0] == "hqq" and is_module(f"{module}.{alias.name}")
            )


@cache
def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def named_modules(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every module of this package that stands in the file as text."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name, _, _attribute = node.value.partition(":")
            if re.fullmatch(r"hqq(\.\w+)+", name) and is_module(name):
                yield node.lineno, name


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_run_one_way(file: Path) -> None:
    module = module_of(file)
    own = layer_of(module)
    found = list(imports(file)) + ([] if relative(file) in REGISTRIES else list(named_modules(file)))
    for line, name in found:
        if name.partition(".")[0] != "hqq":
            continue
        place = f"{relative(file)}:{line}"
        assert is_facade(module) or not is_facade(name), f"{place}: {name} is an old path for callers outside"
        other = layer_of(name)
        if own is not None and other is not None:
            assert other <= own, f"{place}: {LAYERS[own]} imports {LAYERS[other]}; {' <- '.join(LAYERS)}"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_optional_libraries_are_imported_only_where_they_are_named(file: Path) -> None:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    permitted = {
        library
        for library, name in OPTIONAL.items()
        if any(name in part or library in part for part in parts)
    }
    for place, (libraries, _reason) in ALLOWED.items():
        if relative(file).startswith(place):
            permitted |= libraries
    for line, name in imports(file):
        library = name.partition(".")[0]
        assert library not in OPTIONAL or library in permitted, f"{relative(file)}:{line}: imports {library}"


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", ["hqq", "hqq.core.quantize"])
def test_import_is_light(module: str) -> None:
    loaded, cuda = json.loads(
        run(
            "import json, sys, torch\n"
            "before = set(sys.modules)\n"
            f"import {module}\n"
            "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))"
        )
    )
    assert module in loaded
    assert not cuda
    heavy = {*OPTIONAL, "torch._dynamo", "torch._inductor", "tqdm", "safetensors"}
    assert not [name for name in loaded if name in heavy or name.startswith(tuple(f"{h}." for h in heavy))]


def test_import_takes_less_than_300_ms_beyond_torch() -> None:
    # The processor's time, not the clock's, and the best of several: what the machine does beside can only add to it.
    # A tenth of what is allowed.
    program = (
        "import time, torch\n"
        "start = time.process_time()\n"
        "import hqq\n"
        "middle = time.process_time()\n"
        "import hqq.core.quantize\n"
        "print(middle - start, time.process_time() - start)"
    )
    runs = [tuple(map(float, run(program).split())) for _ in range(4)]
    assert min(first for first, _ in runs) < 0.3
    assert min(both for _, both in runs) < 0.3
