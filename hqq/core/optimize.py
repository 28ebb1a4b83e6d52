"""Old import path of the solver in the original's calling convention."""

from hqq.core.solvers.legacy import optimize_weights_proximal

optimize_weights_proximal_legacy = optimize_weights_proximal

__all__ = ["optimize_weights_proximal", "optimize_weights_proximal_legacy"]
