"""What graphs ask for around them: code of their own, no garbage collection, and one recorder of CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

Compile = Mapping[str, Any]

# Modes of torch.compile that record CUDA graphs themselves -> the same without.
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def without_graphs(options: Compile) -> dict[str, Any]:
    """Return torch.compile's `options` with a mode that records no CUDA graphs itself."""
    mode = options.get("mode")
    return {**options, "mode": _WITHOUT_GRAPHS[mode]} if mode in _WITHOUT_GRAPHS else dict(options)


def own_code(function: Any) -> Callable[..., Any]:
    """Return `function`, or the method of an object, with a code object of its own.

    torch.compile keeps its graphs, and the limit of how many there may be, by code object: other models, batches and
    lengths that go through the same lines would use up each other's.
    """
    if isinstance(function, MethodType):
        bound: Callable[..., Any] = own_code(function.__func__).__get__(function.__self__)
        return bound
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


@contextmanager
def collection_paused() -> Iterator[None]:
    """Collect no garbage within the context: a CUDA graph that goes away would end the recording of another."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
