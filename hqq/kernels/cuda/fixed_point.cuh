// Inputs as fixed-point numbers in two bytes, the other operand of an integer matrix instruction.
#ifndef HQQ_FIXED_POINT_CUH
#define HQQ_FIXED_POINT_CUH

#include "ptx.cuh"

#define FULL_WARP 0xffffffffu

// A number n of at most FIXED_BITS bits and a sign is 256 * high + low, both signed bytes.
static constexpr int FIXED_BITS = 14;

// 64 values, sixteen in each of four neighbouring lanes, as n * unit: the unit is a power of two such that the largest |n|
// is at least 2^(FIXED_BITS - 1). So bfloat16 keeps all its digits down to 2^-6 of the largest value, and none is off by
// more than 2^-14 of it. `bytes` gets the low (piece 0) or the high bytes (piece 1), byte j of word q from value
// Order::input(q, j). Returns the unit; NaN where a value is not finite.
template <class Order>
HQQ_INLINE float to_fixed_point(const float (&values)[16], int piece, uint32_t (&bytes)[4]) {
    float larger[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) larger[i] = max_or_nan(fabsf(values[i]), fabsf(values[i + 8]));
#pragma unroll
    for (int half = 4; half > 0; half /= 2)
#pragma unroll
        for (int i = 0; i < half; ++i) larger[i] = max_or_nan(larger[i], larger[i + half]);
    float largest = max_or_nan(larger[0], __shfl_xor_sync(FULL_WARP, larger[0], 1));
    largest = max_or_nan(largest, __shfl_xor_sync(FULL_WARP, largest, 2));
    // Exponents of floats as they are stored. Tiny values get a larger unit than they could have, or it would be subnormal.
    const uint32_t exponent = max(__float_as_uint(largest) >> 23, uint32_t(FIXED_BITS));
    const float per_unit = __uint_as_float((253 + FIXED_BITS - exponent) << 23);
    // The sum's last bits are n, two's complement; 128 more makes the second byte the rounded quotient by 256.
    const float rounding = 12582912.0f + (piece ? 128.0f : 0.0f);
    const uint32_t pair = piece ? 0x51 : 0x40;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        uint32_t n[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) n[j] = __float_as_uint(fmaf(values[Order::input(q, j)], per_unit, rounding));
        bytes[q] = prmt(prmt(n[0], n[1], pair), prmt(n[2], n[3], pair), 0x5410);
    }
    const uint32_t unit = exponent == 255 ? 0x7fffffffu : (exponent + 1 - FIXED_BITS) << 23;
    return __uint_as_float(unit);
}

#endif
