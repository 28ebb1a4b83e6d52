"""Checks that wait for the device at once, or together."""

from __future__ import annotations

import pytest
import torch

from hqq.core.verdicts import collected, expect
from hqq.errors import WeightError


def refuse() -> None:
    raise WeightError("refused")


def test_answers_on_the_cpu_are_heeded_at_once_even_while_collecting() -> None:
    expect(torch.tensor(True), refuse)
    with collected() as verdicts:
        expect(torch.tensor(True), refuse)
        with pytest.raises(WeightError, match="refused"):
            expect(torch.tensor(False), refuse)
    assert not verdicts
    with pytest.raises(WeightError, match="refused"):
        expect(torch.tensor(False), refuse)


def test_answers_of_a_device_are_only_kept() -> None:
    unknown = torch.empty((), dtype=torch.bool, device="meta")  # whoever asks fails
    with collected() as outer:
        expect(unknown, refuse)
        with collected() as inner:
            expect(unknown, refuse)
        expect(unknown, refuse)
    assert [len(outer), len(inner)] == [2, 1]
    assert all(verdict.good is unknown and verdict.otherwise is refuse for verdict in (*outer, *inner))


def test_collecting_ends_with_an_error_too() -> None:
    with pytest.raises(KeyError), collected():
        raise KeyError
    with pytest.raises(WeightError, match="refused"):
        expect(torch.tensor(False), refuse)
