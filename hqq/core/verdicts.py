"""What a device has yet to say: checks of many layers can be answered together, so that the host waits once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor


class Verdict(NamedTuple):
    """good: bool, 0-d, on the device that decides. otherwise: raises, or warns, where it turns out False."""

    good: Tensor
    otherwise: Callable[[], None]


_collected: ContextVar[list[Verdict] | None] = ContextVar("hqq_verdicts", default=None)


def expect(good: Tensor, otherwise: Callable[[], None]) -> None:
    """Call `otherwise` unless `good` (bool, 0-d): at once, or, inside `collected`, when the collector asks."""
    verdicts = _collected.get()
    if verdicts is not None and good.device.type != "cpu":
        verdicts.append(Verdict(good, otherwise))
    elif not bool(good):
        otherwise()


@contextmanager
def collected() -> Iterator[list[Verdict]]:
    """Collect the verdicts of other devices than the CPU in a list, which the caller has to ask."""
    verdicts: list[Verdict] = []
    token = _collected.set(verdicts)
    try:
        yield verdicts
    finally:
        _collected.reset(token)
