"""A plain re-statement of the half-quadratic iteration in numpy, which also says what hangs on rounding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def undecided(
    W: Array, inverse_scale: Array, zero: Array, dim: int, max_code: int, means: int = 1
) -> NDArray[np.bool_]:
    """Which groups have a value in the middle between two codes, as nearly as float32 tells.

    A place is off by the rounding of its product and sum, and by its zero's: a mean of n differences of numbers up to
    max_code, which themselves are of the zero's size and whose sums round either way: six roots of n cover them.
    means: how many of them went into it. Codes forget by what their zero was off, residuals that survive shrinking
    pass it on to the next mean.
    """
    place = W.astype(np.float64) * inverse_scale + zero
    in_mean = means * (max_code + 6 * W.shape[dim] ** 0.5 * (np.abs(zero) + 1))
    unsure = 2.0**-24 * (2 * np.abs(W * inverse_scale) + np.abs(zero) + in_mean)
    inside = (place > -unsure) & (place < max_code + unsure)
    near = np.abs(place - np.floor(place) - 0.5) <= unsure
    found: NDArray[np.bool_] = (inside & near).any(axis=dim, keepdims=True)
    return found


def restated(
    W: Array,
    inverse_scale: Array,
    zero: Array,
    dim: int,
    max_code: int,
    p: float = 0.7,
    beta: float = 10.0,
    steps: int = 20,
) -> list[tuple[Array, NDArray[np.bool_]]]:
    """Return the zeros after every iteration, in float32, until the error does not fall any more.

    With them, which groups hang on how float32 rounds: some value lay in the middle between two codes, as nearly as
    float32 tells, in this iteration or one before. All do after an error that neither rose nor fell, unless nothing
    moved.
    """
    trajectory = []
    best, means = np.inf, 1
    tied = np.zeros(zero.shape, dtype=bool)
    for _ in range(steps):
        tied = tied | undecided(W, inverse_scale, zero, dim, max_code, means)
        codes = np.clip(np.round(W * inverse_scale + zero), 0, max_code)
        fitted = (codes - zero) / inverse_scale
        with np.errstate(divide="ignore"):
            shrunk = np.abs(W - fitted) - np.abs(W - fitted) ** np.float32(p - 1) / np.float32(beta)
        sparse = np.sign(W - fitted) * np.maximum(shrunk, 0)
        means += int(sparse.any())
        before, zero = (
            zero,
            np.mean(codes - (W - sparse) * inverse_scale, axis=dim, keepdims=True, dtype=np.float32),
        )
        trajectory.append((zero, tied))
        error = np.abs(W - fitted).mean(dtype=np.float64)
        # A mean in float32, of residuals that are off by the rounding of what they are differences of.
        doubt = 2.0**-20 * error + 2.0**-23 * float(np.abs(W).max())
        if abs(error - best) <= doubt and not np.array_equal(zero, before):
            tied = np.ones_like(tied)
        if not error < best:
            break
        best = error
    return trajectory
