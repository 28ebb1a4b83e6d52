"""Calibrating one weight: the data-free solution, and the better one that its inputs allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hqq.core.bitpack import FORMAT_OF_BITS, FORMATS, pack
from hqq.core.config import QuantConfig
from hqq.core.linear import HQQLinear
from hqq.core.qtensor import QSpec, QTensor
from hqq.core.quantizer import view_codes_as_float
from hqq.core.solvers import DEFAULT_SOLVER, Solution, get_solver
from hqq.core.solvers.als import solve_als
from hqq.core.solvers.als_storage import stored
from hqq.core.solvers.feedback import (
    Factor,
    can_follow,
    corrected,
    factorise,
    output_error,
    solve_with_feedback,
)
from hqq.core.solvers.feedback_refit import refit
from hqq.core.solvers.min_max import solve_min_max
from hqq.core.storable import check_representable
from hqq.errors import WeightError
from hqq.models.calibration.moments import Moments, tokens_needed
from hqq.models.calibration.settings import Calibration


@dataclass
class Outcome:
    """What calibration did for one weight: squared output errors before and after, of outputs with this square.

    fallback: why the data-free solution stayed, or None.
    """

    before: float = 0.0
    after: float = 0.0
    square: float = 0.0
    fallback: str | None = None

    def relative(self) -> tuple[float, float] | None:
        """Return the errors before and after, relative to the norm of the outputs; None if no inputs were seen."""
        if not self.square > 0:
            return None
        return math.sqrt(self.before / self.square), math.sqrt(self.after / self.square)


class Inputs:
    """The second moments of one input, and the factor that every weight which reads it shares."""

    def __init__(self, moments: Moments, settings: Calibration) -> None:
        self.moments, self._settings = moments, settings
        self._factor: Factor | None = None
        self.reason = self._obstacle()

    def _obstacle(self) -> str | None:
        K, rows = len(self.moments.H), self.moments.rows
        if rows == 0:
            return "no input reached it"
        if rows < tokens_needed(K):
            return f"it saw {rows} tokens; with {K} inputs it needs {tokens_needed(K)}"
        self.moments.check_finite()
        self._factor = factorise(self.moments.H, self._settings.damping_for(K, rows))
        if self._factor is None:
            zero = not bool(self.moments.H.any())
            return "all its inputs are zero" if zero else "the second moments of its inputs are singular"
        return None

    def target(self, W: Tensor) -> Tensor:
        """Return the weight to approximate, float32: `W`, moved to make up for the errors in its inputs."""
        cross, share = self.moments.correction(), self._settings.correction
        if cross is None or share == 0:
            return W.float()
        return corrected(W, cross, self.factor, share)

    def damped(self) -> Tensor:
        """Return the second moments with their damping."""
        assert self._factor is not None
        H = self.moments.H.clone()
        H.diagonal().add_(self._factor.damping * H.diagonal().mean())
        return H

    @property
    def factor(self) -> Tensor:
        """U of `factorise`; only there without a `reason`."""
        assert self._factor is not None
        return self._factor.U


def refine(
    layers: Sequence[HQQLinear], weights: Sequence[Tensor], config: QuantConfig, inputs: Inputs
) -> list[Outcome]:
    """Give layers, quantised without data, the codes, scale and zero that suit their inputs, where the error falls.

    weights: of the layers, float [N, K], on their device. config: that of all of them. inputs: those that they share.
    Scale and zero stay where they are stored as codes themselves, and where groups reach over several rows; codes
    alone are then searched for.
    """
    if inputs.reason is not None:
        return [Outcome(fallback=inputs.reason) for _ in layers]
    targets = [inputs.target(W) for W in weights]
    found = _solutions(layers, targets, config, inputs)
    return [_adopt(*each, inputs.moments.H) for each in zip(layers, targets, found, strict=True)]


def _solutions(
    layers: Sequence[HQQLinear], targets: Sequence[Tensor], config: QuantConfig, inputs: Inputs
) -> list[Solution]:
    specs = [_spec(layer) for layer in layers]
    fixed = [layer._scale_and_zero() if _is_fixed(layer) else None for layer in layers]
    solve = group_solver(config, specs[0].max_code, layers[0].compute_dtype)
    if config.axis == 0 or any(fixed):
        return [
            solve_with_feedback(target, inputs.factor, spec, solve, given)
            for target, spec, given in zip(targets, specs, fixed, strict=True)
        ]
    # Rows do not know of each other: those of several weights go through their columns together.
    stacked = torch.cat(list(targets))
    spec = replace(specs[0], shape=tuple(stacked.shape))
    whole = solve_with_feedback(stacked, inputs.factor, spec, solve)
    if config.optimize and config.zero_mode in (None, "float"):
        whole = refit(stacked, inputs.damped(), whole, spec, layers[0].compute_dtype)
    parts = (torch.split(part, [spec.grouping.num_groups for spec in specs]) for part in whole)
    return [Solution(*each) for each in zip(*parts, strict=True)]


def _spec(layer: HQQLinear) -> QSpec:
    """Return the layer's description, without how its codes are stored."""
    spec = layer.qtensor().spec
    return QSpec(spec.nbits, spec.shape, spec.group_size, spec.axis, FORMAT_OF_BITS[spec.nbits])


def _is_fixed(layer: HQQLinear) -> bool:
    q = layer.qtensor()
    return isinstance(q.scale, QTensor) or isinstance(q.zero, QTensor) or not can_follow(_spec(layer))


def _adopt(layer: HQQLinear, target: Tensor, found: Solution, H: Tensor) -> Outcome:
    """Give `found` to the layer if it is better and can be stored."""
    q, spec = layer.qtensor(), _spec(layer)
    outcome = Outcome(
        before=output_error(target - _values(q, layer), H),
        after=output_error(target - spec.grouping.ungroup((found.codes - found.zero) * found.scale), H),
        square=output_error(target, H),
    )
    if not outcome.after < outcome.before:
        outcome.after, outcome.fallback = outcome.before, "error feedback did not lower its error"
        return outcome
    codes = pack(found.codes, FORMATS[FORMAT_OF_BITS[spec.nbits]])
    if q.spec.view_as_float:
        codes = view_codes_as_float(codes, layer.compute_dtype)
    new = QTensor(codes, *((q.scale, q.zero) if _is_fixed(layer) else found[1:]), q.spec)
    try:
        check_representable(new, layer.compute_dtype)
    except WeightError as error:
        outcome.after, outcome.fallback = outcome.before, str(error)
        return outcome
    layer._set_qtensor(new)
    return outcome


def _values(q: QTensor, layer: HQQLinear) -> Tensor:
    """Return the weight that `layer` stands for, in float32."""
    scale, zero = layer._scale_and_zero()
    return q.spec.grouping.ungroup((q.codes(torch.float32) - zero.float()) * scale.float())


def group_solver(
    config: QuantConfig, max_code: int, dtype: torch.dtype
) -> Callable[[Tensor, Tensor | None], Solution]:
    """Return the solver that `config` names, for groups that are columns and importances of their rows.

    Scale and zero come out as `dtype` stores them.
    """
    name = config.solver or DEFAULT_SOLVER
    rounding = bool(config.to_dict()["weight_quant_params"]["round_zero"])

    def solve(groups: Tensor, importance: Tensor | None) -> Solution:
        if config.optimize and name == "als":
            weights = None if importance is None else importance[:, None].expand_as(groups)
            mode = config.zero_mode or "float"
            return solve_als(groups, 0, max_code, storage_dtype=dtype, zero_mode=mode, importance=weights)
        solver = get_solver(name) if config.optimize else solve_min_max
        found = solver(groups, 0, max_code, round_zero=rounding, storage_dtype=dtype)
        return found._replace(scale=stored(found.scale, dtype), zero=stored(found.zero, dtype))

    return solve
