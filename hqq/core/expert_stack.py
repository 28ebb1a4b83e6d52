"""Stacking the quantised matrices of several experts, and taking one of them out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hqq.core.meta import Stat
from hqq.core.qtensor import QTensor
from hqq.core.wire import NESTED_KEYS

# The tensors of a layer's state that each expert has its own of.
_STACKED = ("W_q", "scale", "zero", "scale_q", "zero_q")


def stack(parts: Sequence[QTensor]) -> QTensor:
    """Return the parts, all of one description, with their tensors stacked; the description is that of one part."""
    W_q = torch.stack([part.W_q for part in parts])
    scale, zero = (_stack_stats([getattr(part, name) for part in parts]) for name in ("scale", "zero"))
    return QTensor(W_q, scale, zero, parts[0].spec)


def _stack_stats(stats: Sequence[Stat]) -> Stat:
    quantized = [stat for stat in stats if isinstance(stat, QTensor)]
    return (
        stack(quantized) if quantized else torch.stack([stat for stat in stats if isinstance(stat, Tensor)])
    )


def part(q: QTensor, index: int) -> QTensor:
    """Return one part of what `stack` gives; raises IndexError if there is none."""
    scale, zero = (part(s, index) if isinstance(s, QTensor) else s[index] for s in (q.scale, q.zero))
    return QTensor(q.W_q[index], scale, zero, q.spec)


def is_stack(state: Mapping[str, Any], count: int) -> bool:
    """Whether every tensor of the decoded `state` that an expert has its own of is there `count` times."""
    tensors = [state[key] for key in _STACKED if state.get(key) is not None]
    nested = [state[key] for key in NESTED_KEYS if state.get(key) is not None]
    return all(isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == count for t in tensors) and all(
        isinstance(inner, Mapping) and is_stack(inner, count) for inner in nested
    )


def part_of_state(state: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return the decoded state of one expert: every stacked tensor sliced, the rest as it is."""
    own = {key: value for key, value in state.items() if value is not None}
    own.update({key: own[key][index] for key in _STACKED if key in own})
    own.update({key: part_of_state(own[key], index) for key in NESTED_KEYS if key in own})
    return own
