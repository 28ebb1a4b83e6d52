// From the packed codes of a lane to bytes, the operands of an integer matrix instruction (see tile_layout.py for the order).
//
// A code is not moved to the lowest bits of its byte where it can stay: a byte holds code * factor. The factor is the same
// for all codes of a row, so it is taken out again where a row's sums are scaled.
#ifndef HQQ_BYTE_CODES_CUH
#define HQQ_BYTE_CODES_CUH

#include "codes.cuh"

// The operands a0 .. a3 of mma_m16n8k32, half STEP (0, 1) of a block of 64 inputs; `w` are the lane's words of the block.
// a0 and a2 are of row g, a1 and a3 of row g + 8. Byte j of a0 and a1 (h = 0) or a2 and a3 (h = 1) is input
// `input(2 STEP + h, j)` of the lane's sixteen; `run`: see fixed_point.cuh.
template <int BITS>
struct ByteCodes;

template <>
struct ByteCodes<8> {
    static constexpr int lower_factor = 1, upper_factor = 1, run = 8;
    static HQQ_INLINE constexpr int input(int q, int j) { return 4 * q + j; }
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[4]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t v = w[4 * STEP + 2 * h], u = w[4 * STEP + 2 * h + 1];
            a[2 * h] = prmt(v, u, 0x6420);
            a[2 * h + 1] = prmt(v, u, 0x7531);
        }
    }
};

template <>
struct ByteCodes<4> {
    static constexpr int lower_factor = 1, upper_factor = 16, run = 8;
    static HQQ_INLINE constexpr int input(int q, int j) { return 4 * q + (j % 2 * 2 + j / 2); }
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[4]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            a[2 * h] = w[2 * STEP + h] & 0x0f0f0f0fu;
            a[2 * h + 1] = w[2 * STEP + h] & 0xf0f0f0f0u;
        }
    }
};

template <>
struct ByteCodes<3> {
    static constexpr int lower_factor = 1, upper_factor = 8, run = 8;
    static HQQ_INLINE constexpr int input(int q, int j) { return ByteCodes<4>::input(q, j); }
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[4]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t v = h == 0 ? three_bit_word<2 * STEP>(w) : three_bit_word<2 * STEP + 1>(w);
            a[2 * h] = v & 0x07070707u;
            a[2 * h + 1] = v & 0x38383838u;
        }
    }
};

// In the left shifts, bits that come from a neighbouring byte land below the masks.
template <>
struct ByteCodes<2> {
    static constexpr int lower_factor = 16, upper_factor = 64, run = 8;
    static HQQ_INLINE constexpr int input(int q, int j) { return q / 2 * 8 + q % 2 * 2 + (j % 2 * 4 + j / 2); }
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[4]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t v = w[STEP] << (h == 0 ? 4 : 0);
            a[2 * h] = v & 0x30303030u;
            a[2 * h + 1] = v & 0xc0c0c0c0u;
        }
    }
};

template <>
struct ByteCodes<1> {
    static constexpr int lower_factor = 64, upper_factor = 128, run = 4;
    static HQQ_INLINE constexpr int input(int q, int j) { return 2 * q + (j % 2 * 8 + j / 2); }
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[4]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t v = w[0] << (6 - 2 * (2 * STEP + h));
            a[2 * h] = v & 0x40404040u;
            a[2 * h + 1] = v & 0x80808080u;
        }
    }
};

#endif
