"""Groups against the oracle's index formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hqq.core.grouping import Grouping
from hqq.errors import ConfigError, ShapeError
from tests import oracle
from tests.cases import GRID_FP32, Case, case_id

CASES = [case for case in GRID_FP32 if case.nbits == 4]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_elements_land_where_the_oracle_says(case: Case, rng: torch.Generator) -> None:
    W = case.weight(rng)
    grouping = Grouping(case.shape, case.group_size, case.axis)
    np.testing.assert_array_equal(
        grouping.group(W).numpy(), oracle.group(W.numpy(), case.group_size, case.axis)
    )
    assert grouping.matrix_shape == oracle.matrix_shape(case.shape, case.group_size, case.axis)
    assert torch.equal(grouping.ungroup(grouping.group(W)), W)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_each_group_has_its_own_statistics(case: Case, rng: torch.Generator) -> None:
    W = case.weight(rng)
    grouping = Grouping(case.shape, case.group_size, case.axis)
    largest = grouping.group(W).amax(case.axis, keepdim=True)
    groups = oracle.groups_of(W.numpy(), case.group_size, case.axis)
    assert tuple(largest.shape) == grouping.stat_shape
    assert largest.flatten().tolist() == [max(values) for values in groups]
    assert grouping.num_groups == len(groups)
    assert {len(values) for values in groups} == {grouping.length}


def test_per_tensor_is_one_group() -> None:
    whole = Grouping((3, 4, 5), None, 0, per_tensor=True)
    assert (whole.matrix_shape, whole.stat_shape, whole.num_groups, whole.length) == ((3, 4, 5), (), 1, 60)
    grouped = Grouping((6, 10), 12, 1, per_tensor=True)
    assert (grouped.matrix_shape, grouped.stat_shape, grouped.num_groups) == ((5, 12), (), 1)


@pytest.mark.parametrize(
    ("shape", "axis", "matrix"),
    [((2, 3, 4), 1, (2, 12)), ((2, 3, 4), 0, (2, 12)), ((5,), 1, (1, 5)), ((5,), 0, (1, 5)), ((), 1, (1, 1))],
)
def test_whole_channels_of_any_rank(shape: tuple[int, ...], axis: int, matrix: tuple[int, int]) -> None:
    assert Grouping(shape, None, axis).matrix_shape == matrix


@pytest.mark.parametrize("axis", [2, -1, None, "1", True, 1.0])
def test_axis_is_0_or_1(axis: object) -> None:
    with pytest.raises(ConfigError, match=r"got axis=.*expected 0 \(groups are columns\) or 1"):
        Grouping((8, 8), 8, axis)  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [0, -8, 8.0, "8", True])
def test_group_size_is_a_positive_integer(group_size: object) -> None:
    with pytest.raises(ConfigError, match=r"got group_size=.*expected a positive integer, or None"):
        Grouping((8, 8), group_size, 1)  # type: ignore[arg-type]


def test_a_group_size_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(
        ConfigError,
        match=r"group_size=48 does not divide the 4096 elements .*\(64, 64\); use one of 8, 16, 32, 64, 128",
    ):
        Grouping((64, 64), 48, 1)
    with pytest.raises(ConfigError, match="use a divisor of 35"):
        Grouping((5, 7), 8, 0)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_empty_tensors_have_no_groups(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="got an empty tensor"):
        Grouping(shape, 4, 1)
