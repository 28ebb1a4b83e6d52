"""What all tests share: fresh random inputs whose seed is shown when a test fails."""

from __future__ import annotations

import os

import pytest
import torch

_SEED_VARIABLE = "HQQ_TEST_SEED"


def pytest_report_header() -> str:
    return f"random inputs: set {_SEED_VARIABLE} to a failing test's seed to repeat it"


@pytest.fixture
def seed(record_property: pytest.RecordProperty) -> int:
    """A seed from the system, or from HQQ_TEST_SEED; printed with a failing test's output."""
    value = int(os.environ.get(_SEED_VARIABLE) or int.from_bytes(os.urandom(4), "little"))
    record_property("seed", value)
    print(f"{_SEED_VARIABLE}={value}")  # noqa: T201
    return value


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A generator on the CPU with a fresh seed."""
    return torch.Generator().manual_seed(seed)
