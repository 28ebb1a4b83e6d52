"""What the programs ask the L2 cache for: all they will read, and nothing outside the tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hqq.core.qtensor import QTensor
from hqq.kernels import dequantize_qtensor
from hqq.kernels.dequant_config import Config
from tests.kernels.quantized import bits_of, random_qtensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
Asked = list[tuple[int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """First address and bytes of every piece that is asked for, with what a Hopper GPU does switched on."""
    from hqq.kernels import dequant_flow, dequant_kernel, dequant_launch

    pieces: Asked = []

    def asks_for(size: int) -> Callable[[Any, Any], None]:
        def ask(at: Any, wanted: Any) -> None:
            pairs = zip(at.handle.data.ravel(), wanted.handle.data.ravel(), strict=True)
            pieces.extend((int(address), size) for address, is_wanted in pairs if is_wanted)

        return ask

    def ask_line(pointer: Any) -> None:
        pieces.append((int(pointer.handle.data.item()), 1))

    kernel = dequant_kernel.dequantize_kernel

    class WithoutLaunchOption:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launched(*args: Any, launch_pdl: bool = False, **options: Any) -> None:
                kernel[grid](*args, **options)

            return launched

    monkeypatch.setattr(dequant_flow, "_prefetch_long", asks_for(1024))
    monkeypatch.setattr(dequant_flow, "_prefetch_short", asks_for(128))
    monkeypatch.setattr(dequant_flow, "_prefetch_line", ask_line)
    for name in ("start_next", "wait_for_previous"):
        monkeypatch.setattr(dequant_kernel, name, lambda: None)
    for name in ("_has_bulk_prefetch", "_has_overlap"):
        monkeypatch.setattr(dequant_launch, name, lambda device: True)
    monkeypatch.setattr(dequant_launch, "dequantize_kernel", WithoutLaunchOption())
    return pieces


def read_first(q: QTensor) -> list[Tensor]:
    """Return codes, scale and zero, as codes where they are quantised."""
    return [q.W_q, *(stat if isinstance(stat, Tensor) else stat.W_q for stat in (q.scale, q.zero))]


def read_second(q: QTensor) -> list[Tensor]:
    """Return the scales and zeros of quantised scales and zeros."""
    found = [
        part for stat in (q.scale, q.zero) if isinstance(stat, QTensor) for part in (stat.scale, stat.zero)
    ]
    return [part for part in found if isinstance(part, Tensor)]


def bytes_asked(tensor: Tensor, asked: Asked) -> Tensor:
    """Return for each byte of `tensor` whether a piece has it."""
    found = torch.zeros(tensor.nbytes, dtype=torch.bool)
    for address, size in asked:
        first = address - tensor.data_ptr()
        found[max(first, 0) : max(first + size, 0)] = True
    return found


def check_all_asked(tensors: list[Tensor], asked: Asked) -> None:
    """Fail unless every byte was asked for, but for a last piece that would reach beyond the tensor."""
    for tensor in tensors:
        found = bytes_asked(tensor, asked)
        assert found[: max(1, tensor.nbytes - 1023)].all(), (tensor.shape, found.float().mean())


def check_within(tensors: list[Tensor], asked: Asked) -> None:
    """Fail unless every piece lies in one of the tensors, at an address that the instruction takes."""
    spans = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
    for address, size in asked:
        assert address % 16 == 0 or size == 1
        assert any(begin <= address and address + size <= end for begin, end in spans)


# Along axis 0 a matrix of 16 rows, four tiles wide.
def tensor(
    rng: torch.Generator, device: torch.device, nbits: float, axis: int, quantised: bool = False
) -> QTensor:
    return random_qtensor(
        rng,
        device,
        nbits=nbits,
        shape=(32, 2048),
        group_size=16,
        axis=axis,
        dtype=torch.bfloat16,
        quant_scale=quantised,
        quant_zero=quantised,
    )


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", [8, 4, 3, 1])
def test_each_program_asks_for_its_inputs(
    nbits: float, axis: int, rng: torch.Generator, device: torch.device, asked: Asked
) -> None:
    q = tensor(rng, device, nbits, axis)
    result = dequantize_qtensor(q, config=Config(1024, 4, 2, overlap=3))
    assert torch.equal(bits_of(result), bits_of(q.dequantize()))
    check_all_asked(read_first(q), asked)
    check_within(read_first(q), asked)


@pytest.mark.parametrize("quantised", [False, True])
def test_the_first_program_asks_for_outer_statistics(
    quantised: bool, rng: torch.Generator, device: torch.device, asked: Asked
) -> None:
    q = tensor(rng, device, 4, 1, quantised)
    result = dequantize_qtensor(q, torch.bfloat16, config=Config(2048, 8, 1, overlap=3))
    assert torch.equal(bits_of(result), bits_of(q.dequantize(torch.bfloat16)))
    assert len(read_second(q)) == 4 * quantised
    for part in read_second(q):
        found = bytes_asked(part, asked)
        assert found[: max(1, part.nbytes - 127)].any() == (part.numel() == 1 or part.nbytes >= 128)
    check_within(read_first(q) + read_second(q), asked)


# Askers spread or in phases; with distance 0 they ask for all codes, if stripes are multiples of the two programs that
# one asks for.
@pytest.mark.parametrize("phase", [0, 8])
@pytest.mark.parametrize("stripe", [0, 2])
def test_some_programs_ask_for_all_columns(
    stripe: int, phase: int, rng: torch.Generator, device: torch.device, asked: Asked
) -> None:
    q = tensor(rng, device, 4, 0)
    config = Config(1024, 4, 1, stripe, 2, 0, 1, 1, phase)
    result = dequantize_qtensor(q, config=config)
    assert torch.equal(bits_of(result), bits_of(q.dequantize()))
    check_all_asked([q.W_q], asked)
    check_within([q.W_q], asked)
    asked.clear()
    dequantize_qtensor(q, config=config._replace(distance=4))
    assert not bytes_asked(q.W_q, asked).all()
    check_within(read_first(q), asked)


# As many programs as it takes for askers to have had their turn with every field: a multiple of 4 * fields.
@pytest.mark.parametrize("nbits", [4, 1])
@pytest.mark.parametrize("phase", [0, 8])
def test_some_programs_ask_for_all_rows(
    phase: int, nbits: float, rng: torch.Generator, device: torch.device, asked: Asked
) -> None:
    q = tensor(rng, device, nbits, 1)
    config = Config(256, 1, 1, 0, 4, 0, 1, 1, phase)
    result = dequantize_qtensor(q, config=config)
    assert torch.equal(bits_of(result), bits_of(q.dequantize()))
    check_all_asked(read_first(q), asked)
    check_within(read_first(q), asked)
