"""The chain of a model's blocks, found by running the model with blocks that do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hqq.core.modules import named_sites
from hqq.models.calibration.record import Enough
from hqq.models.calibration.text import Batch, moved


class Call(NamedTuple):
    """The arguments of a block but for the hidden states, and where those go: first (None) or under a name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with these hidden states."""
        if self.name is None:
            return (hidden, *self.args), self.kwargs
        return self.args, {**self.kwargs, self.name: hidden}


class Chain(NamedTuple):
    """Blocks of which each takes the hidden states that the one before gives.

    calls: for each block, its other arguments for each batch. hidden: what the first block is given. name: of the
    argument that hidden states are given by (None: the first). rest: what a block returns after its hidden states,
    None if it returns those alone.
    """

    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    calls: list[list[Call]]
    hidden: list[Tensor]
    name: str | None
    rest: tuple[Any, ...] | None

    def output(self, hidden: Tensor) -> Any:
        """Return `hidden` in the form in which a block returns them."""
        return hidden if self.rest is None else (hidden, *self.rest)


def run_batch(model: nn.Module, batch: Batch) -> None:
    """Run the model on a batch, where its first parameter is; Enough ends it without an error."""
    tensor = next(model.parameters(), torch.empty(0))
    try:
        model(*moved(batch.args, tensor.device), **moved(batch.kwargs, tensor.device))
    except Enough:
        return


def hidden_of(value: Any) -> Tensor | None:
    """Return the hidden states in what a block returns, or None if there are none."""
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return first if isinstance(first, Tensor) else None


def find_chain(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> Chain | None:
    """Return the chain of blocks that holds most of the layers called `names`, or None if the model has none.

    The model is run on every batch with blocks that do nothing, so this costs next to nothing.
    """
    found = _largest_list(model, names)
    # Blocks of a decoder also depend on what those of the encoder give.
    if found is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    labels, blocks = found
    first: list[tuple[Any, dict[str, Any]]] = []

    def catch(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            first.append((args, kwargs))
            raise Enough

        return forward

    with replaced_forwards(blocks, catch):
        run_batch(model, batches[0])
    if not first:
        return None
    output = blocks[0](*first[0][0], **first[0][1])
    if hidden_of(output) is None:
        return None
    rest = tuple(output[1:]) if isinstance(output, (tuple, list)) else None
    name = None if first[0][0] else "hidden_states"
    chain = Chain(labels, blocks, [[] for _ in blocks], [], name, rest)
    return chain if all(_follow(chain, model, batch) for batch in batches) else None


def _follow(chain: Chain, model: nn.Module, batch: Batch) -> bool:
    """Add the arguments of all blocks for a batch to `chain`; False if one does not take what the one before gave."""
    seen: list[int] = []
    given: list[Tensor] = []

    def stub(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if chain.name is None:
                hidden, call = hidden_of(args), Call(args[1:], kwargs, None)
            else:
                hidden = kwargs.get(chain.name)
                others = {key: value for key, value in kwargs.items() if key != chain.name}
                call = Call(args, others, chain.name)
            if hidden is None or index != len(seen) or (given and not _same(given[-1], hidden)):
                raise Enough
            seen.append(index)
            given.append(hidden)
            chain.calls[index].append(call)
            if index == len(chain.blocks) - 1:
                raise Enough
            return chain.output(hidden)

        return forward

    with replaced_forwards(chain.blocks, stub):
        run_batch(model, batch)
    if len(seen) < len(chain.blocks):
        return False
    chain.hidden.append(given[0])
    return True


def _same(one: Tensor, other: Tensor) -> bool:
    # A block on another device is given a copy.
    return one is other or (
        one.shape == other.shape and (one.device != other.device or torch.equal(one, other))
    )


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], forward: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Within the context module i computes `forward(i)`."""
    kept = [vars(module).get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = forward(index)
        yield
    finally:
        for module, own in zip(modules, kept, strict=True):
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def _largest_list(
    model: nn.Module, names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[nn.Module, ...]] | None:
    """Return names and modules of the ModuleList that holds most layers, if it holds at least half of them."""
    counts: Mapping[str, int] = {
        site[0]: sum(name.startswith(f"{site[0]}.") for name in names)
        for module, site in named_sites(model).items()
        if isinstance(module, nn.ModuleList) and site[0]
    }
    best = max(counts, key=lambda label: counts[label], default=None)
    if best is None or 2 * counts[best] < len(names):
        return None
    children = dict(model.get_submodule(best).named_children())
    return tuple(f"{best}.{key}" for key in children), tuple(children.values())
