"""The original library's own dequantisation, timed: eager, compiled, and its CUDA extension built on the spot.

Run: python -m benchmarks.dequant.original FOLDER [--build] < cases.json
FOLDER is the original's package `hqq`; a process of its own, since the name is this library's too. Reads a list of
{shape, axis, group_size, nbits}, prints one JSON object for each: microseconds, and "aten_reason" where the extension
could not be built. --build only builds the extension. The extension launches on the default stream, so no graph
captures it; like eager it is timed call by call.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dequant.timing import buffer_sets, eager_microseconds, steady_microseconds

_DTYPE = torch.bfloat16


def build_extension(folder: Path) -> str | None:
    """Build the CUDA extension and make it importable as the original expects; return why not, or None."""
    from torch.utils import cpp_extension

    sources = [str(folder / "kernels" / name) for name in ("hqq_aten_cuda.cpp", "hqq_aten_cuda_kernel.cu")]
    try:
        sys.modules["hqq_aten"] = cpp_extension.load("hqq_aten", sources)
    except (RuntimeError, OSError, ImportError) as error:
        return f"{type(error).__name__}: {str(error)[-300:]}"
    return None


def import_original(folder: Path) -> types.ModuleType:
    """Return the original's module of HQQLinear."""
    sys.path.insert(0, str(folder.parent))
    if find_spec("termcolor") is None:
        # It only colours messages.
        sys.modules["termcolor"] = types.ModuleType("termcolor")
        sys.modules["termcolor"].colored = lambda text, *_: text  # type: ignore[attr-defined]
    from hqq.core import quantize

    assert Path(str(quantize.__file__)).is_relative_to(folder), quantize.__file__
    return quantize


def layer_of(original: Any, case: dict[str, Any], device: str = "cuda") -> Any:
    """Return a layer of the original with random codes, scale and zero."""
    (N, K), gs, axis, nbits = case["shape"], case["group_size"], case["axis"], case["nbits"]
    rows, columns = (gs, N * K // gs) if axis == 0 else (N * K // gs, gs)
    packing = original.Quantizer.bit_to_packing[nbits]
    fields, dtype, top = (10, torch.int32, 2**30) if nbits == 3 else (8 // nbits, torch.uint8, 256)
    layer = original.HQQLinear(None, None, compute_dtype=_DTYPE, device=device)
    layer.W_q = torch.randint(0, top, (-(-rows // fields), columns), dtype=dtype, device=device)
    stat_shape = (1, columns) if axis == 0 else (rows, 1)
    layer.meta = {
        "nbits": nbits,
        "group_size": gs,
        "shape": (N, K),
        "scale": (torch.rand(stat_shape, device=device) * 0.01 + 0.01).to(_DTYPE),
        "zero": (torch.rand(stat_shape, device=device) * (2**nbits - 1) + 0.3).to(_DTYPE),
        "axis": axis,
        "packing": packing,
        "unpack_view_dtype": dtype,
        "view_as_float": False,
        "compute_dtype": _DTYPE,
        "quant_zero": False,
        "quant_scale": False,
    }
    layer.ready = True
    return layer


def _dequantize(layer: Any) -> Tensor:
    result: Tensor = layer.dequantize()
    return result


def _dequantize_aten(layer: Any) -> Tensor:
    result: Tensor = layer.dequantize_aten()
    return result


def measure(original: Any, case: dict[str, Any], aten: bool) -> dict[str, float]:
    """Return microseconds of one case."""
    first = layer_of(original, case)
    moved = first.W_q.nbytes + 2 * first.meta["scale"].nbytes + case["shape"][0] * case["shape"][1] * 2
    layers = [first, *(layer_of(original, case) for _ in range(buffer_sets(moved) - 1))]
    torch.compiler.reset()
    compiled: Any = torch.compile(original.Quantizer.dequantize, dynamic=False, fullgraph=True)
    expected = first.dequantize()
    torch.testing.assert_close(compiled(first.W_q, first.meta), expected, rtol=0.02, atol=0.02)
    times = {
        "original": eager_microseconds(_dequantize, layers),
        "original_compiled": steady_microseconds(lambda layer: compiled(layer.W_q, layer.meta), layers, 7),
    }
    if aten and case["axis"] == 0:
        torch.testing.assert_close(first.dequantize_aten(), expected, rtol=0.02, atol=0.02)
        times["aten"] = eager_microseconds(_dequantize_aten, layers)
    return {name: round(time, 1) for name, time in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--build", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    reason = build_extension(folder)
    if arguments.build:
        return
    original = import_original(folder)
    for case in json.load(sys.stdin):
        times: dict[str, object] = {**measure(original, case, reason is None)}
        if reason is not None:
            times["aten_reason"] = reason
        print(json.dumps(times), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
