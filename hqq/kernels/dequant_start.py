"""What Triton does once in a process, before it compiles or looks up its first kernel, done side by side."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import triton
from triton.runtime import driver


@cache
def start_triton() -> None:
    """Have Triton read its own files, for the keys of its cache, while it builds its access to the driver.

    It hashes half a gigabyte, and has a C compiler translate a file: 0.2 s each, neither in Python, and one after the
    other if left to themselves. Both are kept: Triton finds them done.
    """
    with ThreadPoolExecutor(1) as pool:
        # What this raises, Triton itself will raise when it comes to it.
        pool.submit(_hash_triton)
        driver.active.get_current_target()


def _hash_triton() -> None:
    for module in (triton.runtime.cache, triton.compiler.compiler):
        if hasattr(module, "triton_key"):
            module.triton_key()
            return
