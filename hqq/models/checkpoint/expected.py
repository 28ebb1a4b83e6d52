"""Which tensors a model needs, compared with those a checkpoint has, by names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from hqq.core.modules import named_sites
from hqq.errors import CorruptCheckpointError, MissingKeysError, ShapeError


@dataclass
class Slot:
    """One parameter or buffer of the model, at every place that holds it."""

    tensor: Tensor
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter rather than a buffer."""
        return isinstance(self.tensor, nn.Parameter)


def find_slots(model: nn.Module, replaced: Iterable[nn.Module]) -> list[Slot]:
    """Return the parameters and saved buffers of `model` outside the modules that quantised layers replace."""
    slots: dict[int, Slot] = {}
    left_out = set(replaced)
    for module, names in named_sites(model).items():
        if module in left_out:
            continue
        lasting = {
            key: value
            for key, value in module._buffers.items()
            if key not in module._non_persistent_buffers_set
        }
        for key, tensor in [*module._parameters.items(), *lasting.items()]:
            if tensor is None:
                continue
            slot = slots.setdefault(id(tensor), Slot(tensor))
            slot.places.append((module, key))
            slot.names.extend(f"{name}.{key}" if name else key for name in names)
    return list(slots.values())


def match_slots(
    model: nn.Module, slots: list[Slot], shapes: Mapping[str, tuple[int, ...]], shared: Mapping[str, str]
) -> dict[str, Slot]:
    """Return which tensor of the checkpoint (name, shape) fills which slot.

    Raises MissingKeysError for slots without a tensor and tensors without a slot, except those that the model's class
    says not to mind; ShapeError for shapes that differ.
    """
    filled: dict[str, Slot] = {}
    missing: list[str] = []
    used: set[str] = set()
    for slot in slots:
        used.update(slot.names)
        sources = [shared.get(name, name) for name in slot.names]
        source = next((name for name in sources if name in shapes), None)
        if source is None:
            missing.append(slot.names[0])
        elif shapes[source] != tuple(slot.tensor.shape):
            raise ShapeError(
                f"{slot.names[0]}: got shape {shapes[source]} in the checkpoint; the model's is "
                f"{tuple(slot.tensor.shape)}. Is it a checkpoint of this model?"
            )
        else:
            filled.setdefault(source, slot)
            used.add(source)
            if filled[source] is not slot:
                filled[source].places.extend(slot.places)
    _complain(model, missing, [name for name in shapes if name not in used])
    return filled


def _complain(model: nn.Module, missing: list[str], unexpected: list[str]) -> None:
    missing = _without(missing, getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    computed = {name for name, _ in model.named_buffers()}
    ignored = [r"rotary_emb\.inv_freq$", *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    unexpected = [name for name in _without(unexpected, ignored) if name not in computed]
    if missing or unexpected:
        raise MissingKeysError(
            f"got a checkpoint that does not fit {type(model).__name__}: missing {_some(missing)}; "
            f"not in the model {_some(unexpected)}. Nothing was loaded; "
            "use the checkpoint's own architecture and version"
        )


def _without(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return [name for name in names if not any(pattern.search(name) for pattern in compiled)]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:6]) or "nothing"
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def check_same(name: str, one: Tensor, other: Tensor) -> None:
    """Raise CorruptCheckpointError if two tensors for one shared parameter differ."""
    if one.shape != other.shape or not bool((one == other).all()):
        raise CorruptCheckpointError(
            f"{name}: got two different tensors for a parameter that the model shares"
        )
