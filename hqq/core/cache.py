"""How a key-value cache is quantised: rounded, not solved, in groups that any head size allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

CACHE_DIMS = 4  # batch, heads, positions, head size


def cache_group_size(shape: Sequence[int], group_size: int | None) -> int | None:
    """Return `group_size` if it divides the number of elements, else the closest divisor of the last dimension.

    A cache has one length after another, and heads of any size: with 80 channels and an odd number of positions,
    groups of 64 do not come out even, groups of 80 do. Closest means the smallest ratio.
    """
    if group_size is None or math.prod(shape) % group_size == 0:
        return group_size
    divisors = [d for d in range(1, shape[-1] + 1) if shape[-1] % d == 0]
    return min(divisors, key=lambda d: max(d, group_size) / min(d, group_size))
