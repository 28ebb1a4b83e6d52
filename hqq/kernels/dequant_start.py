"""What Triton does once in a process, before it compiles or looks up its first kernel, done side by side."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import triton
from triton.runtime import driver


def start_triton(kernel: Hashable, signature: Sequence[str]) -> None:
    """Have Triton read its files, reach the driver and write the launcher of `signature` at the same time.

    It hashes half a gigabyte for the keys of its cache, and has a C compiler translate two files: 0.25 to 0.3 s each,
    none of it in Python, and one after the other if left to themselves. All is kept: Triton finds it done. The launcher
    is not waited for, since it is needed only once `kernel` is compiled. What these raise, Triton itself will raise
    when it comes to it.

    signature: Triton's name for the type of each of the kernel's parameters.
    """
    pool = ThreadPoolExecutor(3)
    needed = [pool.submit(_hash_triton), pool.submit(_reach_driver)]
    pool.submit(_write_launcher, signature)
    hash(kernel)  # of its source, and of all the functions that it calls
    wait(needed)
    pool.shutdown(wait=False)


def _hash_triton() -> None:
    for module in (triton.runtime.cache, triton.compiler.compiler):
        if hasattr(module, "triton_key"):
            module.triton_key()
            return


def _reach_driver() -> None:
    driver.active.get_current_target()


def _write_launcher(signature: Sequence[str]) -> None:
    """Write the C function that takes arguments of `signature` from Python; later Triton has one for all kernels."""
    from triton.backends.nvidia import driver as nvidia

    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(SimpleNamespace(signature=dict(enumerate(signature))), SimpleNamespace())
