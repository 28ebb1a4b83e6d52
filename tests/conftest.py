"""What all tests share: fresh random inputs whose seed is shown when a test fails."""

from __future__ import annotations

import os
import random

import pytest
import torch

_SEED_VARIABLE = "HQQ_TEST_SEED"


def pytest_report_header() -> str:
    return f"random inputs: set {_SEED_VARIABLE} to a failing test's seed to repeat it"


@pytest.fixture(scope="module")
def module_seed() -> int:
    """A seed from the system, or from HQQ_TEST_SEED, for what the tests of a file share."""
    return int(os.environ.get(_SEED_VARIABLE) or int.from_bytes(os.urandom(4), "little"))


@pytest.fixture
def seed(request: pytest.FixtureRequest, record_property: pytest.RecordProperty) -> int:
    """A seed from the system, or from HQQ_TEST_SEED; printed with a failing test's output.

    With something that the file shares, it is that one's seed: one number repeats both.
    """
    shared = "module_seed" in request.fixturenames
    value = request.getfixturevalue("module_seed") if shared else int.from_bytes(os.urandom(4), "little")
    value = int(os.environ.get(_SEED_VARIABLE) or value)
    record_property("seed", value)
    print(f"{_SEED_VARIABLE}={value}")  # noqa: T201
    return value


@pytest.fixture(autouse=True)
def _shared_generators(seed: int) -> None:
    """Draws that name no generator, such as the weights of a new layer, repeat with the seed too.

    They are not those of `rng`: inputs must not be their layer's own weights.
    """
    torch.manual_seed(seed ^ 0x5DEECE66)
    random.seed(seed)


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A generator on the CPU with a fresh seed."""
    return torch.Generator().manual_seed(seed)
