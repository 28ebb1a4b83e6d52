"""What GPUs owe about layers that are already quantised. The whole of it runs in test_solver_gpu.py."""

from __future__ import annotations

import pytest
import torch

from hqq.core.verdicts import Verdict
from hqq.errors import ShapeError, WeightError
from hqq.models import late_checks
from hqq.models.late_checks import LateChecks


def verdict(good: bool, asked: list[bool] | None = None) -> Verdict:
    def otherwise() -> None:
        if asked is None:
            raise WeightError("too large")
        asked.append(good)

    return Verdict(torch.tensor(good), otherwise)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Verdict]:
    """The verdicts that `collected` finds, as if a device had given them."""
    found: list[Verdict] = []

    class Collected:
        def __enter__(self) -> list[Verdict]:
            return found

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(late_checks, "collected", Collected)
    return found


def check(checks: LateChecks, name: str) -> None:
    with checks.of(name, True):
        pass


def test_the_first_layer_that_fails_is_named(answers: list[Verdict]) -> None:
    warned: list[bool] = []
    checks = LateChecks()
    for name, own in (("a", [verdict(True), verdict(False, warned)]), ("b", [verdict(False)]), ("c", [])):
        answers[:] = own
        check(checks, name)
    assert not warned
    with pytest.raises(WeightError, match="^b: too large$"), checks:
        pass
    assert warned == [False]


def test_it_does_not_let_too_much_gather(answers: list[Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_checks, "_MOST", 4)
    asked: list[bool] = []
    answers[:] = [verdict(False, asked)]
    with LateChecks() as checks:
        for layer in range(10):
            check(checks, str(layer))
            assert layer + 1 - len(asked) < 4
    assert len(asked) == 10


def test_an_error_of_another_kind_comes_first(answers: list[Verdict]) -> None:
    answers[:] = [verdict(False)]
    checks = LateChecks()
    check(checks, "a")
    with pytest.raises(ShapeError), checks, checks.of("b", True):
        raise ShapeError("odd")


def test_what_is_not_wanted_is_not_collected(answers: list[Verdict]) -> None:
    answers[:] = [verdict(False)]
    with LateChecks() as checks, checks.of("a", False):
        pass
