"""Packed bytes against the oracle, for every format and ragged row counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hqq.core.bitpack import (
    FORMAT_OF_BITS,
    FORMATS,
    SUPPORTED_BITS,
    BitPack,
    check_nbits,
    format_named,
    max_code,
    pack,
    unpack,
)
from hqq.errors import ConfigError, DtypeError, ShapeError
from tests import oracle

ROWS = (1, 2, 3, 7, 8, 9, 10, 11, 19, 20, 21, 40, 64)


def random_codes(name: str, rows: int, columns: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2 ** FORMATS[name].bits, (rows, columns), generator=rng)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_the_oracles(name: str, rows: int, rng: torch.Generator) -> None:
    codes = random_codes(name, rows, 5, rng)
    packed = pack(codes, FORMATS[name])
    expected = oracle.pack(codes.tolist(), name)
    assert packed.numpy().dtype == expected.dtype
    np.testing.assert_array_equal(packed.numpy(), expected)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_unpack_reads_what_the_oracle_packed(name: str, rows: int, rng: torch.Generator) -> None:
    codes = random_codes(name, rows, 3, rng)
    packed = torch.from_numpy(oracle.pack(codes.tolist(), name))
    torch.testing.assert_close(
        unpack(packed, FORMATS[name], rows=rows, dtype=torch.int64), codes, rtol=0, atol=0
    )


@pytest.mark.parametrize("name", FORMATS)
def test_without_rows_the_padding_comes_back_as_zeros(name: str, rng: torch.Generator) -> None:
    codes = random_codes(name, 11, 4, rng)
    fmt = FORMATS[name]
    unpacked = unpack(pack(codes, fmt), fmt, dtype=torch.int64)
    assert unpacked.shape[0] == fmt.packed_rows(11) * fmt.fields
    assert torch.equal(unpacked[:11], codes)
    assert not unpacked[11:].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int32])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_survive_in_every_dtype(name: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    codes = random_codes(name, 13, 6, rng).to(dtype)  # up to 255: exact in bfloat16's eight bits
    assert torch.equal(unpack(pack(codes, FORMATS[name]), FORMATS[name], rows=13, dtype=dtype), codes)


@pytest.mark.parametrize("name", FORMATS)
def test_any_number_of_dimensions(name: str, rng: torch.Generator) -> None:
    codes = random_codes(name, 12, 30, rng)
    fmt = FORMATS[name]
    packed = pack(codes.reshape(12, 2, 3, 5), fmt)
    assert torch.equal(packed.reshape(packed.shape[0], 30), pack(codes, fmt))
    column = pack(codes[:, 0], fmt)
    assert torch.equal(column, pack(codes, fmt)[:, 0])


@pytest.mark.parametrize("name", FORMATS)
def test_input_is_not_changed_and_may_be_strided(name: str, rng: torch.Generator) -> None:
    codes = random_codes(name, 10, 12, rng).to(torch.uint8)
    before = codes.clone()
    packed = pack(codes[:, ::2], FORMATS[name])
    assert torch.equal(codes, before)
    assert torch.equal(packed, pack(codes[:, ::2].contiguous(), FORMATS[name]))


@pytest.mark.parametrize("name", FORMATS)
def test_the_old_static_functions_are_the_same(name: str, rng: torch.Generator) -> None:
    codes = random_codes(name, 40, 4, rng)
    packed = getattr(BitPack, f"pack_{name}")(codes)
    assert torch.equal(packed, pack(codes, FORMATS[name]))
    assert torch.equal(getattr(BitPack, f"unpack_{name}")(packed, dtype=torch.int64), codes)
    assert getattr(BitPack, f"unpack_{name}")(packed).dtype == torch.uint8


def test_every_bit_width_has_a_format_that_holds_it() -> None:
    assert FORMAT_OF_BITS == oracle.PACKING_OF_BITS
    for nbits in SUPPORTED_BITS:
        assert max_code(nbits) == oracle.LEVELS[nbits] - 1
        assert max_code(nbits) <= FORMATS[FORMAT_OF_BITS[nbits]].mask


@pytest.mark.parametrize("nbits", [7, 0, -1, 16, 1.5, True, "4", None, [4], float("nan")])
def test_other_bit_widths_are_refused(nbits: object) -> None:
    with pytest.raises(ConfigError, match=r"got nbits=.*expected one of 8, 6, 5, 4, 3, 2, 1.58, 1"):
        check_nbits(nbits)  # type: ignore[arg-type]


def test_a_whole_number_of_bits_is_an_int() -> None:
    assert isinstance(check_nbits(4.0), int)
    assert check_nbits(1.58) == 1.58


@pytest.mark.parametrize("name", ["7bit_u8", "", None, 4])
def test_unknown_formats_are_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="expected one of 8bit_u8, 4bit_u8, 3bit_32, 2bit_u8, 1bit_u8"):
        format_named(name)  # type: ignore[arg-type]


def test_what_cannot_be_packed_or_unpacked_says_so() -> None:
    fmt = FORMATS["4bit_u8"]
    with pytest.raises(ShapeError, match="at least one dimension"):
        pack(torch.tensor(3), fmt)
    with pytest.raises(
        DtypeError, match=r"got packed codes of torch\.int32; 4bit_u8 holds them as torch\.uint8"
    ):
        unpack(torch.zeros(2, 2, dtype=torch.int32), fmt)
    with pytest.raises(ShapeError, match="for 4 rows; expected at least 5"):
        unpack(torch.zeros(2, 2, dtype=torch.uint8), fmt, rows=5)
