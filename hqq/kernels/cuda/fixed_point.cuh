// Inputs as fixed-point numbers in two bytes, the other operand of an integer matrix instruction.
#ifndef HQQ_FIXED_POINT_CUH
#define HQQ_FIXED_POINT_CUH

#include "ptx.cuh"

#define FULL_WARP 0xffffffffu

// Words 0 and 1 of a lane's inputs take `Order::run` inputs from the first on and as many from the ninth on; words 2 and 3
// take those that follow. Where the lane that holds two words has such an input.
template <class Order>
HQQ_INLINE constexpr int place_of_input(int input) {
    return input < Order::run ? input : input - 8 + Order::run;
}

// A number n of at most FIXED_BITS bits and a sign is 256 * high + low, both signed bytes.
static constexpr int FIXED_BITS = 14;

// The sum, or the largest, of what the eight lanes hold that have the inputs of two columns.
HQQ_INLINE float sum_over_inputs(float value) {
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) value += __shfl_xor_sync(FULL_WARP, value, distance);
    return value;
}

HQQ_INLINE float largest_of_inputs(float value) {
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2)
        value = max_or_nan(value, __shfl_xor_sync(FULL_WARP, value, distance));
    return value;
}

// 64 values as n * unit: the unit is a power of two such that the largest |n| is at least 2^(FIXED_BITS - 1). So bfloat16
// keeps all its digits down to 2^-6 of the largest value, and none is off by more than 2^-14 of it. Eight neighbouring lanes
// hold them: sixteen each pair of lanes 4 apart, of which the one with piece 0 has those of words 0 and 1 (`Order::input`),
// the other those of words 2 and 3. `bytes` gets all four words: of low bytes (piece 0), or of high ones. Returns the unit;
// NaN where a value is not finite.
template <class Order>
HQQ_INLINE float to_fixed_point(const float (&values)[8], int piece, uint32_t (&bytes)[4]) {
    float larger[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) larger[i] = max_or_nan(fabsf(values[i]), fabsf(values[i + 4]));
    const float largest = largest_of_inputs(max_or_nan(max_or_nan(larger[0], larger[1]), max_or_nan(larger[2], larger[3])));
    // Exponents of floats as they are stored. Tiny values get a larger unit than they could have, or it would be subnormal.
    const uint32_t exponent = max(__float_as_uint(largest) >> 23, uint32_t(FIXED_BITS));
    const float per_unit = __uint_as_float((253 + FIXED_BITS - exponent) << 23);
    // The sum's last bits are n + 128, two's complement: its second byte is n / 256, rounded, and the first one, with its
    // highest bit turned, the rest.
    const float rounding = 12582912.0f + 128.0f;
    const uint32_t selector = piece ? 0x51 : 0x40;
    uint32_t mine[2], other[2];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        uint32_t n[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            n[j] = __float_as_uint(fmaf(values[place_of_input<Order>(Order::input(word, j))], per_unit, rounding));
        const auto pack = [&](uint32_t pair) { return prmt(prmt(n[0], n[1], pair), prmt(n[2], n[3], pair), 0x5410); };
        mine[word] = pack(selector);
        other[word] = __shfl_xor_sync(FULL_WARP, pack(selector ^ 0x11), 4);
    }
    const uint32_t turned = piece ? 0 : 0x80808080u;
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        bytes[word] = (piece ? other[word] : mine[word]) ^ turned;
        bytes[2 + word] = (piece ? mine[word] : other[word]) ^ turned;
    }
    const uint32_t unit = exponent == 255 ? 0x7fffffffu : (exponent + 1 - FIXED_BITS) << 23;
    return __uint_as_float(unit);
}

#endif
