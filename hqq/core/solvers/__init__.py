"""How scale, zero and codes of a weight's groups are found.

A solver is a function `solve(W, dim, max_code, *, round_zero, storage_dtype) -> Solution` over a grouped matrix; the
registry below names those that a configuration may ask for. "als", the default, also takes a zero mode and weights.
"""

from __future__ import annotations

from hqq.core.solvers.als import ZERO_MODES, solve_als
from hqq.core.solvers.base import GroupSolver, Solution
from hqq.core.solvers.half_quadratic import solve_half_quadratic
from hqq.core.solvers.min_max import solve_min_max
from hqq.errors import ConfigError

__all__ = ["DEFAULT_SOLVER", "SOLVERS", "ZERO_MODES", "GroupSolver", "Solution", "get_solver"]

SOLVERS: dict[str, GroupSolver] = {
    "als": solve_als,
    "hqq": solve_half_quadratic,
    "minmax": solve_min_max,
}

DEFAULT_SOLVER = "als"


def get_solver(name: str | None) -> GroupSolver:
    """Return the solver called `name` (None: the default); raises ConfigError for an unknown name."""
    try:
        return SOLVERS[name or DEFAULT_SOLVER]
    except KeyError:
        raise ConfigError(f"got solver={name!r}; expected one of {', '.join(SOLVERS)}") from None
