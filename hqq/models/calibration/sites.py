"""The weights to calibrate and what of the model multiplies with them; in which stages a part of it is calibrated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from hqq.core.modules import find_module
from hqq.models.calibration.record import Recorder
from hqq.models.install import main_member
from hqq.models.plan import Job

# Experts that are layers of their own: they see some of the tokens each, and are alike but for their number.
_ROUTED = re.compile(r"(?<=experts)\.\d+(?=\.)")


@dataclass
class Site:
    """One weight to quantise.

    layers: the linear layers that multiply with it. experts: the weight itself, if it is that of fused experts.
    """

    job: Job
    layers: list[nn.Module] = field(default_factory=list)
    experts: nn.Parameter | None = None

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.job.name

    @property
    def weight(self) -> nn.Parameter:
        """The weight, a parameter of the model until the quantised layer takes its place."""
        weight = self.experts if self.experts is not None else main_member(self.job).module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def kind(self) -> str:
        """Name of the weight without the numbers of experts."""
        return _ROUTED.sub(".*", self.name)

    @property
    def routed(self) -> bool:
        """Whether only some of the tokens get here."""
        return self.experts is not None or self.kind != self.name


def site_of(model: nn.Module, job: Job) -> Site:
    """Return the site of a job; fused experts are parameters of `model` at this time."""
    if job.members[0].kind == "experts":
        owner, _, leaf = job.name.rpartition(".")
        module = find_module(model, owner)
        assert module is not None
        return Site(job, experts=module._parameters[leaf])
    return Site(job, [member.module for member in job.members if member.kind == "linear"])


class Trace:
    """What the layers of a part of the model are given in its first forward pass, and in which order."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.leaders: dict[str, str] = {}
        self._seen: dict[int, str] = {}
        self._kept: list[Tensor] = []  # or another tensor might get the same id

    def see(self, name: str, x: Tensor) -> None:
        """Note that site `name` is given `x`."""
        if name not in self.calls:
            self._kept.append(x)
            self.leaders[name] = self._seen.setdefault(id(x), name)
        self.calls[name] = self.calls.get(name, 0) + 1

    def done(self) -> None:
        """Forget the tensors."""
        self._kept.clear()
        self._seen.clear()


@dataclass
class Stage:
    """Sites that are calibrated together: no one's input depends on another's weight.

    leaders: for each site, the name of the one whose input it shares. last: the site after which a forward pass has
    shown everything, None if that cannot be said.
    """

    sites: list[Site]
    leaders: dict[str, str]
    last: str | None = None

    def groups(self) -> list[list[Site]]:
        """Return the sites in groups that share input and configuration; fused experts and embeddings alone."""
        groups: dict[object, list[Site]] = {}
        for site in self.sites:
            weight = site.weight
            alike = (self.leaders[site.name], site.job.config, weight.dtype, weight.device)
            groups.setdefault(alike if site.layers else site.name, []).append(site)
        return list(groups.values())

    def recorded(self) -> list[Site]:
        """Return the sites whose inputs have to be seen."""
        return [site for site in self.sites if self.leaders[site.name] == site.name]


def stages_of(sites: Sequence[Site], trace: Trace) -> list[Stage]:
    """Return the stages in the order of the forward pass; sites that it did not reach are left out."""
    by_kind: dict[str, list[Site]] = {}
    for site in sites:
        by_kind.setdefault(site.kind, []).append(site)
    kind_of = {site.name: site.kind for site in sites}
    stages: list[Stage] = []
    done: set[str] = set()
    for name in trace.calls:
        if kind_of[name] in done:
            continue
        done.add(kind_of[name])
        members = by_kind[kind_of[name]]
        # An expert without tokens in this pass may get some in another.
        leaders = {site.name: trace.leaders.get(site.name, site.name) for site in members}
        earlier = next((stage for stage in stages if leaders[name] in stage.leaders), None)
        if earlier is None:
            stages.append(Stage(list(members), leaders))
        else:
            earlier.sites += members
            earlier.leaders.update(leaders)
    order = list(trace.calls)
    for stage in stages:
        # Whoever shares an input with a site of another stage looks for itself.
        stage.leaders = {
            name: leader if leader in stage.leaders else name for name, leader in stage.leaders.items()
        }
        if not any(site.routed or trace.calls[site.name] != 1 for site in stage.sites):
            stage.last = max((site.name for site in stage.recorded()), key=order.index)
    return stages


def recorder(sites: Iterable[Site], on_input: object, last: str | None = None) -> Recorder:
    """Return a recorder of the inputs of `sites`."""
    sites = list(sites)
    layers = {site.name: site.layers for site in sites if site.experts is None}
    experts = {site.name: site.experts for site in sites if site.experts is not None}
    return Recorder(layers, experts, on_input, last)  # type: ignore[arg-type]
