"""What every benchmark records, so that a figure can be traced to a machine, versions and a command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def record(results: object, *, versions: Mapping[str, str] | None = None, **notes: Any) -> dict[str, Any]:
    """Return `results` (JSON-able) with the command, date, machine and versions beside them.

    versions: further ones, say of a system that is compared with. notes: further keys of the record.
    """
    return {
        "command": command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": {**library_versions(), **(versions or {})},
        **notes,
        "results": results,
    }


def command() -> str:
    """Return the command line of this process as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name] if spec is not None else ["python", sys.argv[0]]
    arguments = [_without_folders(argument) for argument in sys.argv[1:]]
    return shlex.join([*program, *arguments])


def _without_folders(argument: str) -> str:
    # Folders outside the repository say something of one machine only.
    return Path(argument).name if Path(argument).is_absolute() else argument


def library_versions(
    names: Sequence[str] = ("hqq", "torch", "triton", "transformers", "numpy"),
) -> dict[str, str]:
    """Return the versions of Python and of those of `names` that are installed."""
    import hqq

    found = {"python": platform.python_version(), "hqq": hqq.__version__}
    for name in names:
        if name in found:
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return what the measurement ran on: CPU model and cores, and the GPU with its driver where there is one."""
    described: dict[str, Any] = {"system": platform.system(), "cpu": _cpu_name(), "cores": os.cpu_count()}
    if hasattr(os, "getloadavg"):
        described["load_average"] = round(os.getloadavg()[0], 1)  # above `cores`, something else ran as well
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _driver_version(),
        }
    return described


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    # The kernel module names its version: "NVRM version: NVIDIA UNIX ... Kernel Module  580.95.05  ...".
    info = Path("/proc/driver/nvidia/version")
    if not info.exists():
        return None
    words = info.read_text().splitlines()[0].split()
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON with a final newline, and make the folder it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def seconds(function: Callable[[], object], repetitions: int) -> list[float]:
    """Return the wall-clock seconds of each of `repetitions` calls, after one that is not counted."""
    function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return `rows` (same keys each) as a Markdown table; floats with three significant digits."""
    if not rows:
        return ""
    keys = list(rows[0])
    lines = [keys, ["---"] * len(keys), *([_cell(row[key]) for key in keys] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def spread(times: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest of `times` in milliseconds."""
    return {
        "median_ms": round(statistics.median(times) * 1e3, 4),
        "min_ms": round(min(times) * 1e3, 4),
        "max_ms": round(max(times) * 1e3, 4),
    }
