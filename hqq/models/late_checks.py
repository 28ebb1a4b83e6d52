"""Answers that GPUs owe about layers already quantised: asked for some layers at a time, so that no GPU waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hqq.core.verdicts import Verdict, collected
from hqq.models.preflight import ErrorsName

# What is owed keeps scales and zeros in float32 alive, an eighth of a byte for each weight in groups of 64.
_MOST = 32


class LateChecks:
    """Collects what layers would have waited for; a context manager: leaving it without an error asks for the rest."""

    def __init__(self) -> None:
        self._owed: list[tuple[str, Verdict]] = []

    def __enter__(self) -> LateChecks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.settle()

    @contextmanager
    def of(self, name: str, wanted: bool) -> Iterator[None]:
        """Collect the verdicts on the layer called `name`, if `wanted`; raises an HQQError about an earlier layer."""
        if not wanted:
            yield
            return
        with collected() as verdicts:
            yield
        self._owed += [(name, verdict) for verdict in verdicts]
        if len(self._owed) >= _MOST:
            self.settle()

    def settle(self) -> None:
        """Wait for the devices; raises the HQQError of the first layer that has one, with its name."""
        owed, self._owed = self._owed, []
        by_device: dict[torch.device, list[int]] = {}
        for i, (_, verdict) in enumerate(owed):
            by_device.setdefault(verdict.good.device, []).append(i)
        good = [True] * len(owed)
        for places in by_device.values():
            answers = torch.stack([owed[i][1].good for i in places]).tolist()
            for i, answer in zip(places, answers, strict=True):
                good[i] = answer
        for (name, verdict), fine in zip(owed, good, strict=True):
            if not fine:
                with ErrorsName(name):
                    verdict.otherwise()
