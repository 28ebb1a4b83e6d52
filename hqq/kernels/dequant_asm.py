"""PTX that turns packed codes into `(W_q - zero) * scale` two 16-bit floats at a time.

Integer-to-float conversion runs at a quarter of the rate of other instructions. Instead the code's bits are put into
the mantissa of a float whose exponent makes it `magic + code` exactly, and `magic` is subtracted, which is exact too.
Zero is subtracted and scale multiplied in the packed 16-bit instructions, which round each step once: the very
roundings of the reference.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

# Per dtype: bits of the float 2^m whose unit in the last place is 1, that float negated, 1, -1 and -0.
_FP16 = {"magic": 0x6400, "minus_magic": 0xE400, "one": 0x3C00, "minus_one": 0xBC00, "minus_zero": 0x8000}
_BF16 = {"magic": 0x4300, "minus_magic": 0xC300, "one": 0x3F80, "minus_one": 0xBF80, "minus_zero": 0x8000}
_FLOATS = {"f16": _FP16, "bf16": _BF16}
_BF16_MANTISSA_BITS = 7
# Operands of the texts that take four codes in bytes: two pairs of results, the codes, two pairs each of zeros, scales.
FOUR_BYTES_CONSTRAINTS = "=r,=r,r,r,r,r,r"


class FieldAsm(NamedTuple):
    """One text per field, the operand constraints they share, and how many elements one text handles."""

    texts: tuple[str, ...]
    constraints: str
    pack: int


@cache
def field_asm(dtype: str, bits: int, fields: int) -> FieldAsm:
    """Return the PTX for `dtype` ("f16" or "bf16") and codes of `bits` bits, `fields` of them in a byte or an int32.

    Operands, first to last: results, packed codes, zeros, scales; four elements at a time from bytes, two from int32.
    """
    shifts = [bits * (fields - 1 - i) for i in range(fields)]
    if bits * fields > 8:
        texts = tuple(_pair_from_words(dtype, bits, shift) for shift in shifts)
        return FieldAsm(texts, "=r,r,r,r,r", 2)
    texts = tuple(_four_from_bytes(dtype, bits, shift) for shift in shifts)
    return FieldAsm(texts, FOUR_BYTES_CONSTRAINTS, 4)


def _four_from_bytes(dtype: str, bits: int, shift: int) -> str:
    lines = [".reg .b32 a, b, k;"]
    if dtype == "bf16" and bits > _BF16_MANTISSA_BITS:
        lines += _bytes_through_fp32()
    else:
        # Bytes 0, 1 and 2, 3 each into the low bytes of two halves; every field shares these two instructions.
        lines += ["prmt.b32 a, $2, 0, 0x4140;", "prmt.b32 b, $2, 0, 0x4342;"]
        for register in "ab":
            lines += _halves_to_codes(register, dtype, bits, shift)
    for result, register, zero, scale in (("$0", "a", "$3", "$5"), ("$1", "b", "$4", "$6")):
        lines += _affine(result, register, zero, scale, dtype)
    return _block(lines)


def _pair_from_words(dtype: str, bits: int, shift: int) -> str:
    lines = [".reg .b32 a, b, k;"]
    if shift + bits <= 16:
        lines += ["prmt.b32 a, $1, $2, 0x5410;"]
    elif shift >= 16:
        lines += ["prmt.b32 a, $1, $2, 0x7632;"]
        shift -= 16
    else:
        lines += [f"shr.b32 a, $1, {shift};", f"shr.b32 b, $2, {shift};", "prmt.b32 a, a, b, 0x5410;"]
        shift = 0
    lines += _halves_to_codes("a", dtype, bits, shift)
    lines += _affine("$0", "a", "$3", "$4", dtype)
    return _block(lines)


def _halves_to_codes(register: str, dtype: str, bits: int, shift: int) -> list[str]:
    """Codes at bit `shift` of both halves of `register` become two floats."""
    floats, mask = _FLOATS[dtype], (1 << bits) - 1
    lines = [f"shr.b32 {register}, {register}, {shift};"] if shift else []
    lines += [
        f"and.b32 {register}, {register}, {_both(mask)};",
        f"or.b32 {register}, {register}, {_both(floats['magic'])};",
    ]
    return lines + _add_constant(register, dtype, floats["minus_magic"])


def _bytes_through_fp32() -> list[str]:
    """Four codes of 8 bits in $2 become bf16 in a and b: bf16's mantissa is too short, fp32's is not."""
    lines = [".reg .f32 f0, f1, f2, f3;", ".reg .b32 u;"]
    for i in range(4):
        lines += [
            f"prmt.b32 u, $2, 0x4B000000, {0x7540 + i:#x};",
            f"mov.b32 f{i}, u;",
            f"add.rn.f32 f{i}, f{i}, 0fCB000000;",
        ]
    return [*lines, "cvt.rn.bf16x2.f32 a, f1, f0;", "cvt.rn.bf16x2.f32 b, f3, f2;"]


def _add_constant(register: str, dtype: str, constant: int) -> list[str]:
    load = f"mov.b32 k, {_both(constant)};"
    if dtype == "f16":
        return [load, f"add.rn.f16x2 {register}, {register}, k;"]
    one = f".reg .b32 one{register}; mov.b32 one{register}, {_both(_BF16['one'])};"
    return [load, one, f"fma.rn.bf16x2 {register}, {register}, one{register}, k;"]


def _affine(result: str, codes: str, zero: str, scale: str, dtype: str) -> list[str]:
    if dtype == "f16":
        return [f"sub.rn.f16x2 {codes}, {codes}, {zero};", f"mul.rn.f16x2 {result}, {codes}, {scale};"]
    # Devices of compute capability 8 have no bf16x2 but fma; adding -0 changes no product.
    return [
        f"mov.b32 k, {_both(_BF16['minus_one'])};",
        f"fma.rn.bf16x2 {codes}, {zero}, k, {codes};",
        f"mov.b32 k, {_both(_BF16['minus_zero'])};",
        f"fma.rn.bf16x2 {result}, {codes}, {scale}, k;",
    ]


def _both(half: int) -> str:
    return f"0x{half << 16 | half:08X}"


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"
