"""The parts of a model that are calibrated one after the other: its blocks, and what lies outside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from hqq.models.calibration.chain import Call, Chain, hidden_of, replaced_forwards, run_batch
from hqq.models.calibration.text import Batch, moved
from hqq.models.placement import Placement


class Unit(Protocol):
    """A part of the model that can be run by itself, once for each batch."""

    name: str
    prefix: str

    def prepare(self) -> None:
        """Bring the part to where it is to run."""
        ...

    def run(self, batch: int, hidden: Tensor) -> Tensor:
        """Run a batch from `hidden`, what the unit before gave, and return what the next one takes."""
        ...


class BlockUnit:
    """One block of a chain."""

    def __init__(self, name: str, block: nn.Module, calls: Sequence[Call], placement: Placement) -> None:
        self.name, self.prefix = name, f"{name}."
        self._block, self._calls = block, calls
        self._placement = placement

    def prepare(self) -> None:
        target = None if self._placement.is_spread else self._placement.device_of(self.name)
        if target is not None:
            self._block.to(target)

    def run(self, batch: int, hidden: Tensor) -> Tensor:
        tensor = next(self._block.parameters(), hidden)
        args, kwargs = self._calls[batch].with_hidden(hidden)
        found = hidden_of(self._block(*moved(args, tensor.device), **moved(kwargs, tensor.device)))
        assert found is not None
        return found


class ModelUnit:
    """The whole model; with a chain, without what its blocks compute: the last one gives the unit's hidden states."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], chain: Chain | None = None) -> None:
        self.name, self.prefix = "the rest of the model" if chain else "the model", ""
        self._model, self._batches, self._chain = model, batches, chain

    def prepare(self) -> None:
        """Nothing: it runs where it is."""

    def run(self, batch: int, hidden: Tensor) -> Tensor:
        chain = self._chain
        if chain is None:
            run_batch(self._model, self._batches[batch])
            return hidden
        last = len(chain.blocks) - 1

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                own: Tensor = args[0] if chain.name is None else kwargs[chain.name]
                return chain.output(hidden.to(own.device) if index == last else own)

            return forward

        with replaced_forwards(chain.blocks, stub):
            run_batch(self._model, self._batches[batch])
        return hidden
