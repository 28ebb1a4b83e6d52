"""What the compiler makes of the solver kernels: registers, spills and instructions for sm_90, without a GPU.

Run: python -m benchmarks.solve.resources [--sass FOLDER]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import table
from hqq.core.solvers import als_search, als_storage
from hqq.core.solvers.half_quadratic import BETA, ITERATIONS, LP_NORM
from hqq.kernels.solve_als_kernel import als_kernel
from hqq.kernels.solve_config import Blocks, SolveConfig, blocks_for
from hqq.kernels.solve_hqq_kernel import iterate_kernel

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    "W": "*bf16",
    "starts": "*fp32",
    "scale_out": "*fp32",
    "zero_out": "*fp32",
    "inverse_out": "*fp32",
    "history": "*fp32",
    "errors": "*fp32",
    "flags": "*i32",
}
_NUMBERS = {"groups": "i32", "origin": "i32", "same_origin": "i32"}
_CONSTANTS: dict[str, Any] = {
    "MAX_CODE": 15,
    "STORAGE": tl.bfloat16,
    "SCALES": als_search.SCALES,
    "OFFSETS": len(als_search.OFFSETS),
    "FITS_PER_OFFSET": als_search.FITS_PER_OFFSET,
    "FITS_OF_BEST": als_search.FITS_OF_BEST,
    "OVERSHOOT": als_search.OVERSHOOT,
    "ZERO_FITS": als_storage.ZERO_FITS,
    "EXTENT": als_storage.EXTENT,
    "ROUND_ZERO": True,
    "ITERATIONS": ITERATIONS,
    "LP_NORM": LP_NORM,
    "BETA": BETA,
    "LARGEST_UNSHRUNK": 0.17,
    "WIDE": False,
    "SATURATE": True,
    "INTERPRETED": False,
}


def compiled(kernel: Any, blocks: Blocks, length: int, axis: int) -> bytes:
    """Return the machine code of `kernel` for bf16 weights."""
    constants = {
        **_CONSTANTS,
        "BLOCK": blocks.block,
        "C": blocks.chunk,
        "T": blocks.tiles,
        "GS": length,
        "AXIS": axis,
    }
    names = kernel.arg_names
    types = {**_POINTERS, **_NUMBERS}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(names.index(n),): [["tt.divisibility", 16]] for n in (*_POINTERS, "groups") if n in names},
    )
    options: dict[str, Any] = {"num_warps": blocks.warps, "enable_fp_fusion": False}
    if kernel is als_kernel and axis == 0 and blocks.warps == 4:
        options["maxnreg"] = 168  # as the launcher asks for
    return bytes(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"])


def resources(machine_code: bytes) -> tuple[dict[str, int], str]:
    """Return registers, stack bytes and counts of instructions, and the disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        sass = _output("nvdisasm", "-c", file.name)
    counts = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", sass, re.MULTILINE))
    found = {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "spills": counts["LDL"] + counts["STL"],
        "instructions": counts.total(),
        **{name.lower(): counts[name] for name in ("FFMA", "FADD", "FMUL", "FMNMX", "SHFL", "BAR")},
    }
    return found, sass


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sass", type=Path, help="folder for the disassembly")
    arguments = parser.parse_args()
    rows = []
    for name, kernel in (("als", als_kernel), ("hqq", iterate_kernel)):
        for length, axis, config in (
            (64, 1, SolveConfig()),
            (64, 1, SolveConfig(4, 32)),
            (64, 0, SolveConfig()),
            (128, 1, SolveConfig()),
            (4096, 1, SolveConfig()),
            (4096, 0, SolveConfig()),
            (28672, 1, SolveConfig()),
        ):
            blocks = blocks_for(length, axis, 2, config)
            found, sass = resources(compiled(kernel, blocks, length, axis))
            rows.append({"kernel": name, "length": length, "axis": axis, **blocks._asdict(), **found})
            if arguments.sass:
                arguments.sass.mkdir(parents=True, exist_ok=True)
                (arguments.sass / f"{name}-{length}-axis{axis}-{config.elements}.sass").write_text(sass)
    print(f"triton {triton.__version__}")
    print(table(rows))


if __name__ == "__main__":
    main()
