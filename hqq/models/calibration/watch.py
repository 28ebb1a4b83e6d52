"""What goes into the layers of a part of the full model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hqq.models.calibration.sites import Site, Trace, recorder
from hqq.models.calibration.units import Unit


class Watch:
    """The inputs of a part's layers in the full model: in which order they come, and those that others compare with."""

    def __init__(self, sites: Sequence[Site], kept: Sequence[Tensor | None]) -> None:
        self.trace = Trace()
        self._sites, self._kept = {site.name: site for site in sites}, kept
        self._inputs: dict[str, dict[int, list[Tensor]]] = {}

    def run(self, unit: Unit, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Run all batches and return the unit's outputs."""
        outputs = []
        for i, given in enumerate(hidden):

            def see(name: str, x: Tensor, expert: int | None, i: int = i) -> None:
                if i == 0:
                    self.trace.see(name, x)
                if self._sites[name].routed or self.trace.leaders.get(name) != name:
                    return
                self._inputs.setdefault(name, {}).setdefault(i, []).append(rows_of(x, self._kept[i]))

            with recorder(self._sites.values(), see):
                outputs.append(unit.run(i, given))
            self.trace.done()
        return outputs

    def seen(self, name: str, batch: int, call: int) -> Tensor | None:
        """Return what a layer was given at its call number `call` in a batch, if that is known."""
        inputs = self._inputs.get(name, {}).get(batch, [])
        return inputs[call] if call < len(inputs) else None

    def forget(self, name: str) -> None:
        """Let go of a layer's inputs."""
        self._inputs.pop(name, None)


def rows_of(x: Tensor, kept: Tensor | None) -> Tensor:
    """Return inputs [..., K] as [rows, K], without padding."""
    rows = x.reshape(-1, x.shape[-1])
    if kept is None or kept.numel() != len(rows):
        return rows
    return rows[kept.to(rows.device).reshape(-1)]
