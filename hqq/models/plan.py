"""What quantise_model will do, decided and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hqq.core.config import QuantConfig
from hqq.core.modules import named_sites, skip_rule
from hqq.errors import ConfigError
from hqq.models.candidates import examine
from hqq.models.layer_choice import Choice, ConfigChooser
from hqq.models.report import LeftRow
from hqq.models.weight_readers import weight_readers


@dataclass
class Member:
    """A module whose weight is to be quantised, under all its names."""

    module: nn.Module
    names: tuple[str, ...]
    kind: str
    choice: Choice
    reason: str | None


@dataclass
class Job:
    """One weight to quantise, and the modules that use it."""

    members: list[Member]
    config: QuantConfig

    @property
    def name(self) -> str:
        """Name of the first module."""
        return self.members[0].names[0]


@dataclass
class Plan:
    """The weights to quantise, in model order, and the modules left."""

    jobs: list[Job] = field(default_factory=list)
    left: list[LeftRow] = field(default_factory=list)


def make_plan(
    model: nn.Module, chooser: ConfigChooser, skip: Sequence[str], embeddings: bool, lm_head: bool
) -> Plan:
    """Return what to quantise in `model`; raises ConfigError for configs that fit no layer, or none that can be."""
    members = _members(model, chooser)
    choosable = [m for m in members if m.kind in ("linear", "embedding", "experts", "Conv1D")]
    chooser.check_all_used([name for member in choosable for name in member.names])
    head = _output_head(model)
    plan = Plan()
    for group in _by_weight(members):
        reason = _obstacle(group) or _wish(group, skip, embeddings, lm_head, head)
        configs = {m.choice.config for m in group if m.choice.config is not None}
        if reason is None and len(configs) > 1:
            raise ConfigError(f"got different configs for {_names(group)}, which share one weight; use one")
        if reason is None and not configs:
            reason = "no config names it, or its config is None"
        if reason is None:
            plan.jobs.append(Job(group, configs.pop()))
        else:
            plan.left.extend(_left(member, reason) for member in group)
    return plan


def _members(model: nn.Module, chooser: ConfigChooser) -> list[Member]:
    members = []
    readers = weight_readers(model)
    for module, names in named_sites(model).items():
        candidate = examine(module)
        if candidate is None:
            continue
        kind, reason = candidate
        if reason is None and module in readers:
            reason = f"{readers[module]} reads this layer's weight directly"
        choice = chooser.choose(names)
        if (
            reason is not None
            and choice.explicit
            and choice.config is not None
            and kind in ("linear", "embedding")
        ):
            raise ConfigError(f"got a config for {names[0]}, which cannot be quantised: {reason}")
        members.append(Member(module, names, kind, choice, reason))
    return members


def _by_weight(members: list[Member]) -> list[list[Member]]:
    """Return the members in groups that share a parameter, in the order of their first."""
    group_of: dict[int, list[Member]] = {}
    groups: list[list[Member]] = []
    for member in members:
        weight = member.module._parameters.get("weight")
        keys = (
            [id(weight)]
            if member.reason is None
            else [id(p) for p in member.module.parameters(recurse=False)]
        )
        shared = next((group_of[key] for key in keys if key in group_of), None)
        if shared is None:
            shared = []
            groups.append(shared)
        shared.append(member)
        group_of.update(dict.fromkeys(keys, shared))
    return groups


def _obstacle(group: list[Member]) -> str | None:
    for member in group:
        if member.reason is not None:
            return (
                member.reason
                if len(group) == 1
                else f"{member.reason} ({member.names[0]}, which shares this weight)"
            )
    return None


def _wish(
    group: list[Member], skip: Sequence[str], embeddings: bool, lm_head: bool, head: nn.Module | None
) -> str | None:
    """Return why the caller's options leave the weight of `group` alone, or None."""
    if any(m.choice.explicit and m.choice.config is not None for m in group):
        return None
    kinds = {member.kind for member in group}
    tied = kinds == {"linear", "embedding"}
    rules = [rule for rule in skip if not (rule == "lm_head" and (lm_head or (tied and embeddings)))]
    if tied and not (embeddings or lm_head):
        return f"tied weight of {_names(group)}; lm_head=True quantises it"
    for member in group:
        for name in member.names:
            rule = skip_rule(name, rules)
            if rule is not None:
                return f"skipped by {rule!r}"
    if kinds == {"embedding"} and not embeddings:
        return "an embedding; embeddings=True quantises it"
    if "lm_head" in rules and any(member.module is head for member in group) and kinds == {"linear"}:
        return "the output head; lm_head=True quantises it"
    return None


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _names(group: list[Member]) -> str:
    return ", ".join(member.names[0] for member in group)


def _left(member: Member, reason: str) -> LeftRow:
    parameters = [p for p in member.module.parameters(recurse=False) if p.ndim >= 2]
    weight = member.module._parameters.get("weight")
    largest = weight if isinstance(weight, Tensor) else max(parameters, key=torch.numel, default=None)
    shape = tuple(largest.shape) if largest is not None else ()
    return LeftRow(member.names[0], member.kind, shape, sum(p.nbytes for p in parameters), reason)
