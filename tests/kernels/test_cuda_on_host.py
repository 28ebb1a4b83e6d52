"""The host that stands in for a GPU sees the mistakes that kernels make: each is right without, and caught with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hqq.kernels.cuda.source import read_source
from tests.kernels.cuda_on_host.host_kernel import HERE, HostError, HostKernel, compiler
from tests.kernels.cuda_on_host.memory import guarded

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler here")
ORDERS = range(5)


def launch(
    kernel: str, tensors: list[Tensor], *numbers: int, mistake: int = 0, seed: int = 0, **shape: int
) -> Tensor:
    """Run a kernel of mistakes.cu; the first tensor is its output."""
    signature = "P" * len(tensors) + "i" * len(numbers)
    made = HostKernel(read_source("mistakes.cu", HERE), kernel, signature, {"MISTAKE": mistake}, seed=seed)
    with guarded(*tensors) as copies:
        args = (*(t.data_ptr() for t in copies), *numbers)
        made.launch(
            0,
            (shape.get("grid", 1), 1, 1),
            (shape.get("block", 32), 1, 1),
            args,
            shared=shape.get("shared", 0),
        )
        return copies[0].clone()


def integers(rng: torch.Generator, n: int) -> Tensor:
    return torch.randint(0, 1 << 20, (n,), generator=rng).to(torch.int32)


def test_missing_syncthreads_shows(rng: torch.Generator) -> None:
    values = integers(rng, 128)
    expected = values.sum().int().expand(128)
    for seed in ORDERS:
        assert torch.equal(launch("block_sum", [values * 0, values], seed=seed, block=128), expected)
        assert not torch.equal(
            launch("block_sum", [values * 0, values], mistake=1, seed=seed, block=128), expected
        )


def test_deadlock_is_an_error(rng: torch.Generator) -> None:
    values = integers(rng, 128)
    with pytest.raises(HostError, match="wait for one another"):
        launch("block_sum", [values * 0, values], mistake=2, block=128)


def test_copies_arrive_only_when_waited_for(rng: torch.Generator) -> None:
    values = integers(rng, 128)
    assert torch.equal(launch("copy", [values * 0, values], shared=512), values)
    assert torch.equal(launch("copy", [values * 0, values], mistake=1, shared=512), values * 0 - 1)
    with pytest.raises(HostError, match="not a multiple of 16"):
        launch("copy", [values * 0, values], mistake=2, shared=512)
    with pytest.raises(HostError, match="16 bytes at 512 of 512"):
        launch("copy", [values * 0, values], mistake=3, shared=512)


def test_accesses_beside_a_tensor_are_seen(rng: torch.Generator) -> None:
    values = integers(rng, 60)
    shape = {"grid": 2, "block": 32}
    assert torch.equal(launch("twice", [values * 0, values], 60, **shape), 2 * values)
    with pytest.raises(AssertionError, match="4 bytes beside a tensor"):
        launch("twice", [values * 0, values], 60, mistake=1, **shape)
    for mistake in (2, 3):
        with pytest.raises(HostError, match="signal 11"):
            launch("twice", [values * 0, values], 60, mistake=mistake, **shape)
    # Nothing is left over of a failed launch.
    assert torch.equal(launch("twice", [values * 0, values], 60, **shape), 2 * values)


def test_lanes_in_different_operations_are_an_error() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    assert torch.equal(launch("votes", [out]), out + 32)
    with pytest.raises(HostError, match="while others of its warp are in"):
        launch("votes", [out], mistake=1)


def test_matrix_products_are_made_when_waited_for() -> None:
    out = torch.zeros(128)
    assert torch.equal(launch("product", [out], block=128, shared=1024), out + 16)
    assert launch("product", [out], mistake=1, block=128, shared=1024).isnan().all()
    assert not torch.equal(launch("product", [out], mistake=2, block=128, shared=1024), out + 16)


def test_source_that_does_not_compile_is_an_error() -> None:
    source = read_source("mistakes.cu", HERE)
    with pytest.raises(HostError, match="does not compile for the host"):
        HostKernel(source, "votes", "P", {"MISTAKE": "nonsense("})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mappings")
@pytest.mark.parametrize("mistake", [0, 1], ids=["to its end", "to an error"])
def test_memory_of_blocks_is_given_back(mistake: int, rng: torch.Generator) -> None:
    """A test run loads a library for each variant of each kernel; what each keeps adds up."""

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    values, before = integers(rng, 128), mappings()
    if mistake:
        with pytest.raises(HostError, match="wait for one another"):
            launch("block_sum", [values * 0, values], mistake=2, block=128, grid=3)
    else:
        launch("block_sum", [values * 0, values], block=128, grid=3)
    # The library itself takes a few; stacks with a guard page each would be 256 for each block.
    assert mappings() - before < 128
