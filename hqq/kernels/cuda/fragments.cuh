// From the stored codes of a lane to the registers of a matrix product: the operand a of mma.m16n8k16 and of Wgmma.
// The order of codes and scales is that of tile_layout.py and tiled_weight.py.
#ifndef HQQ_FRAGMENTS_CUH
#define HQQ_FRAGMENTS_CUH

#include "codes.cuh"

// ---- codes as floats ----------------------------------------------------------------------------------------------
// Code bits become the lowest bits of a number, BITS of them at most. What comes out is the code times 2^EXPONENT, which
// times TO_CODE is the code; no step rounds. minus: times -2^EXPONENT.
template <class T>
struct Number;

// In the mantissa of 1024 they stand for 1024 plus the code, times 2^shift where they lie higher than the lowest bit:
// times 2^-shift minus the 1024 it is the code.
template <>
struct Number<F16> {
    static constexpr int BITS = 10, EXPONENT = 0;
    static constexpr uint32_t TO_CODE = 0x3c003c00u, BASE = 0x64006400u;
    template <int SHIFT>
    static HQQ_INLINE uint32_t without_base(uint32_t number) {
        return hfma2<F16>(number, 0x10001u * ((15 - SHIFT) << 10), 0x10001u * (0x8000 | (25 - SHIFT) << 10));
    }
    template <uint32_t MASK, int SHIFT>
    static HQQ_INLINE uint32_t of(uint32_t word) {  // (word & MASK) | BASE
        return without_base<SHIFT>(lop3<0xea>(word, MASK, BASE));
    }
    static HQQ_INLINE uint32_t minus(uint32_t a) { return hneg2<F16>(a); }
};

// Alone they are multiples of the smallest number, 2^-133: seven bits as subnormal numbers, and the lowest bit of the
// exponent goes on where these end. The largest factor there is, 2^127, leaves 2^-6.
template <>
struct Number<BF16> {
    static constexpr int BITS = 8, EXPONENT = -6;
    static constexpr uint32_t TO_CODE = 0x42804280u;
    template <int SHIFT>
    static HQQ_INLINE uint32_t scaled(uint32_t number) {
        return hmul2<BF16>(number, 0x10001u * ((254 - SHIFT) << 7));
    }
    template <uint32_t MASK, int SHIFT>
    static HQQ_INLINE uint32_t of(uint32_t word) {
        return scaled<SHIFT>(word & MASK);
    }
    static HQQ_INLINE uint32_t minus(uint32_t a) { return hmul2<BF16>(a, 0xbc80bc80u); }
};

// The codes whose BITS bits lie from bit AT on in both halves of `word`.
template <class T, int BITS, int AT>
HQQ_INLINE uint32_t field(uint32_t word) {
    constexpr int REACH = Number<T>::BITS / BITS * BITS;  // as many fields as one shift of the word can serve
    constexpr int SHIFT = AT % REACH;
    return Number<T>::template of<0x10001u * (((1 << BITS) - 1) << SHIFT), SHIFT>(word >> (AT / REACH * REACH));
}

// A byte of each half, ROW the lower (0) or the higher (1).
template <class T, int ROW>
HQQ_INLINE uint32_t field_of_eight(uint32_t word);

template <>
HQQ_INLINE uint32_t field_of_eight<F16, 0>(uint32_t word) {
    return Number<F16>::without_base<0>(prmt(word, Number<F16>::BASE, 0x7250));
}

template <>
HQQ_INLINE uint32_t field_of_eight<F16, 1>(uint32_t word) {
    return Number<F16>::without_base<0>(prmt(word, Number<F16>::BASE, 0x7351));
}

template <>
HQQ_INLINE uint32_t field_of_eight<BF16, 0>(uint32_t word) {
    return Number<BF16>::of<0x00ff00ffu, 0>(word);
}

template <>
HQQ_INLINE uint32_t field_of_eight<BF16, 1>(uint32_t word) {
    return Number<BF16>::scaled<0>(prmt(word, 0, 0x4341));
}

// The pair PAIR (a0 to a3) of instruction STEP of a block, as codes in T times 2^EXPONENT, exactly.
template <class T, int BITS, int STEP, int PAIR>
HQQ_INLINE uint32_t code_pair(const uint32_t (&word)[BITS]) {
    if constexpr (BITS == 8) {
        return field_of_eight<T, PAIR % 2>(word[2 * STEP + PAIR / 2]);
    } else if constexpr (BITS == 3) {
        const uint32_t v = three_bit_word<STEP>(word);
        return field<T, 3, 3 * (PAIR % 2)>(PAIR < 2 ? v : v >> 8);
    } else {
        constexpr int FIELD = 4 * STEP + PAIR, PER_HALF = 16 / BITS;
        return field<T, BITS, FIELD % PER_HALF * BITS>(word[FIELD / PER_HALF]);
    }
}

// Tiles of 16 output features that share a group, along axis 0.
template <int GROUP>
constexpr int MEMBERS = GROUP >= 16 ? GROUP / 16 : 1;

// ---- scales and zeros ---------------------------------------------------------------------------------------------
// What turns codes into weights for one lane and one block of 64 inputs: `GROUP` inputs (axis 1; 0: the whole row) or
// output features (axis 0) share a scale and a zero.
template <class T, int AXIS, int GROUP>
struct Scales;

template <class T, int GROUP>
struct Scales<T, 1, GROUP> {
    static constexpr int BLOCK_GROUPS = GROUP == 0 || GROUP >= 64 ? 1 : 64 / GROUP;
    static constexpr int BLOCK_BYTES = 64 * BLOCK_GROUPS;  // of a warp
    uint32_t scale[2], zero[2];

    // Bytes from the tile's first group to those of block `block`.
    static HQQ_INLINE int offset(int block) {
        return GROUP == 0 ? 0 : GROUP >= 64 ? block / (GROUP / 64 > 0 ? GROUP / 64 : 1) * 64 : block * BLOCK_BYTES;
    }

    HQQ_INLINE void read(const unsigned char* block, int lane) {
        const int group = lane % 4 * BLOCK_GROUPS / 4;
        const uint2 v = *reinterpret_cast<const uint2*>(block + 64 * group + 8 * (lane / 4));
        scale[0] = low_twice(v.x), zero[0] = high_twice(v.x);
        scale[1] = low_twice(v.y), zero[1] = high_twice(v.y);
    }

    HQQ_INLINE void times_power(int) {}

    // zero becomes -zero * scale times 2^EXPONENT, for `weights`.
    HQQ_INLINE void fold() {
#pragma unroll
        for (int row = 0; row < 2; ++row) zero[row] = hmul2<T>(Number<T>::minus(zero[row]), scale[row]);
    }

    // zero becomes -zero, for `exact_weights`.
    HQQ_INLINE void negate() {
#pragma unroll
        for (int row = 0; row < 2; ++row) zero[row] = hneg2<T>(zero[row]);
    }

    template <int STEP, int PAIR>
    HQQ_INLINE uint32_t scale_of() const {
        return scale[PAIR % 2];
    }

    template <int STEP, int PAIR>
    HQQ_INLINE uint32_t zero_of() const {
        return zero[PAIR % 2];
    }
};

template <class T, int GROUP>
struct Scales<T, 0, GROUP> {
    static constexpr int BLOCK_BYTES = 256;
    uint32_t scale[8], zero[8];

    static HQQ_INLINE int offset(int block) { return block * BLOCK_BYTES; }

    HQQ_INLINE void read(const unsigned char* block, int lane) {
        const uint4* mine = reinterpret_cast<const uint4*>(block + 32 * (lane % 4));
        const uint4 s = mine[0], t = mine[1], y = mine[8], z = mine[9];
        scale[0] = s.x, scale[1] = s.y, scale[2] = s.z, scale[3] = s.w;
        scale[4] = t.x, scale[5] = t.y, scale[6] = t.z, scale[7] = t.w;
        zero[0] = y.x, zero[1] = y.y, zero[2] = y.z, zero[3] = y.w;
        zero[4] = z.x, zero[5] = z.y, zero[6] = z.z, zero[7] = z.w;
    }

    HQQ_INLINE void fold() {
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) zero[pair] = hmul2<T>(Number<T>::minus(zero[pair]), scale[pair]);
    }

    // zero becomes -zero, for `exact_weights`.
    HQQ_INLINE void negate() {
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) zero[pair] = hneg2<T>(zero[pair]);
    }

    // Times 2^exponent, from -24 on: exactly what scales were before they were multiplied by 2^-exponent. fp16 only.
    HQQ_INLINE void times_power(int exponent) {
        if (exponent == 0) return;
        const uint32_t power = 0x10001u * (exponent > -15 ? (15 + exponent) << 10 : 1 << (24 + exponent));
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) scale[pair] = hmul2<F16>(scale[pair], power);
    }

    template <int STEP, int PAIR>
    HQQ_INLINE uint32_t scale_of() const {
        return scale[2 * STEP + PAIR / 2];
    }

    template <int STEP, int PAIR>
    HQQ_INLINE uint32_t zero_of() const {
        return zero[2 * STEP + PAIR / 2];
    }
};

// The operand a of instruction STEP times 2^EXPONENT: code * scale - zero * scale, the product with zero rounded first (see
// fold).
template <class T, int BITS, int STEP, int PAIR = 0, class S>
HQQ_INLINE void weights(uint32_t (&a)[4], const uint32_t (&word)[BITS], const S& scales) {
    if constexpr (PAIR < 4) {
        const uint32_t scale = scales.template scale_of<STEP, PAIR>(), zero = scales.template zero_of<STEP, PAIR>();
        a[PAIR] = hfma2<T>(code_pair<T, BITS, STEP, PAIR>(word), scale, zero);
        weights<T, BITS, STEP, PAIR + 1>(a, word, scales);
    }
}

// The operand itself, rounded as the reference does: the difference, then the product (see negate).
template <class T, int BITS, int STEP, int PAIR = 0, class S>
HQQ_INLINE void exact_weights(uint32_t (&a)[4], const uint32_t (&word)[BITS], const S& scales) {
    if constexpr (PAIR < 4) {
        const uint32_t scale = scales.template scale_of<STEP, PAIR>(), zero = scales.template zero_of<STEP, PAIR>();
        a[PAIR] = hmul2<T>(hfma2<T>(code_pair<T, BITS, STEP, PAIR>(word), Number<T>::TO_CODE, zero), scale);
        exact_weights<T, BITS, STEP, PAIR + 1>(a, word, scales);
    }
}

#endif
