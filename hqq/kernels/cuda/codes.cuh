// From the packed codes of a lane to the operands of a matrix instruction (see tile_layout.py for the order).
//
// A code is not converted to a float: its bits are put into the mantissa of one. 0x6400 | q is the float16 1024 + q and
// 0x4300 | q the bfloat16 128 + q, so that one logical instruction makes two operands. Where another code lies below it in
// the word, a code may stay shifted: the operand is offset + factor * q. The factor is the same for all codes of a row,
// so both are taken out again where a row's sums are scaled.
#ifndef HQQ_CODES_CUH
#define HQQ_CODES_CUH

#include "ptx.cuh"

template <class T>
struct Magic;

template <>
struct Magic<F16> {
    static constexpr uint32_t bits = 0x64006400u;
    static constexpr uint32_t one = 0x3c003c00u;
    static constexpr float offset = 1024.0f;
};

template <>
struct Magic<BF16> {
    static constexpr uint32_t bits = 0x43004300u;
    static constexpr uint32_t one = 0x3f803f80u;
    static constexpr float offset = 128.0f;
};

// (a & MASK) | b
template <uint32_t MASK>
HQQ_INLINE uint32_t and_or(uint32_t a, uint32_t b) {
    return lop3<0xea>(a, MASK, b);
}

// (a & MASK) | (b & ~MASK)
template <uint32_t MASK>
HQQ_INLINE uint32_t bit_select(uint32_t a, uint32_t b) {
    return lop3<0xe2>(a, MASK, b);
}

// The four operands a0 .. a3 of one instruction. `w` are the words of a block of 64 inputs, STEP the instruction.
// PARTS is 2 where a code takes two instructions: the second operands then go with 16 x.
template <class T, int BITS>
struct Codes;

template <class T>
struct CodesBase {
    static constexpr int parts = 1;
    static constexpr float offset = Magic<T>::offset;
};

template <>
struct Codes<F16, 4> : CodesBase<F16> {
    static constexpr float upper_factor = 16.0f;  // of rows g + 8; rows g have 1
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[1][4]) {
        const uint32_t v = w[STEP], u = v >> 8;
        a[0][0] = and_or<0x000f000fu>(v, Magic<F16>::bits);
        a[0][1] = and_or<0x00f000f0u>(v, Magic<F16>::bits);
        a[0][2] = and_or<0x000f000fu>(u, Magic<F16>::bits);
        a[0][3] = and_or<0x00f000f0u>(u, Magic<F16>::bits);
    }
};

template <>
struct Codes<BF16, 4> : CodesBase<BF16> {
    static constexpr float upper_factor = 1.0f;
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[1][4]) {
        const uint32_t v = w[STEP];
        a[0][0] = and_or<0x000f000fu>(v, Magic<BF16>::bits);
        a[0][1] = and_or<0x000f000fu>(v >> 4, Magic<BF16>::bits);
        a[0][2] = and_or<0x000f000fu>(v >> 8, Magic<BF16>::bits);
        a[0][3] = and_or<0x000f000fu>(v >> 12, Magic<BF16>::bits);
    }
};

template <class T>
struct Codes<T, 2> : CodesBase<T> {
    static constexpr float upper_factor = 4.0f;
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[1][4]) {
        const uint32_t v = STEP % 2 ? w[STEP / 2] >> 8 : w[STEP / 2], u = w[STEP / 2] >> (STEP % 2 ? 12 : 4);
        a[0][0] = and_or<0x00030003u>(v, Magic<T>::bits);
        a[0][1] = and_or<0x000c000cu>(v, Magic<T>::bits);
        a[0][2] = and_or<0x00030003u>(u, Magic<T>::bits);
        a[0][3] = and_or<0x000c000cu>(u, Magic<T>::bits);
    }
};

template <class T>
struct Codes<T, 1> : CodesBase<T> {
    static constexpr float upper_factor = 2.0f;
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[1][4]) {
        const uint32_t v = w[0] >> (4 * STEP), u = w[0] >> (4 * STEP + 2);
        a[0][0] = and_or<0x00010001u>(v, Magic<T>::bits);
        a[0][1] = and_or<0x00020002u>(v, Magic<T>::bits);
        a[0][2] = and_or<0x00010001u>(u, Magic<T>::bits);
        a[0][3] = and_or<0x00020002u>(u, Magic<T>::bits);
    }
};

// The word of instruction STEP of 3-bit codes: in each of its bytes row g has bits 0-2, row g + 8 bits 3-5, and the other
// two are anything. Those of the last instruction lie in the two bits that the first three leave over.
template <int STEP>
HQQ_INLINE uint32_t three_bit_word(const uint32_t* w) {
    if constexpr (STEP < 3) {
        return w[STEP];
    } else {
        const uint32_t four_bits = bit_select<0x03030303u>(w[0] >> 6, w[1] >> 4);
        return bit_select<0x0f0f0f0fu>(four_bits, w[2] >> 2);
    }
}

template <class T>
struct Codes<T, 3> : CodesBase<T> {
    static constexpr float upper_factor = 8.0f;
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[1][4]) {
        const uint32_t v = three_bit_word<STEP>(w), u = v >> 8;
        a[0][0] = and_or<0x00070007u>(v, Magic<T>::bits);
        a[0][1] = and_or<0x00380038u>(v, Magic<T>::bits);
        a[0][2] = and_or<0x00070007u>(u, Magic<T>::bits);
        a[0][3] = and_or<0x00380038u>(u, Magic<T>::bits);
    }
};

template <>
struct Codes<F16, 8> : CodesBase<F16> {
    static constexpr float upper_factor = 1.0f;
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[1][4]) {
        const uint32_t v = w[2 * STEP], u = w[2 * STEP + 1];
        a[0][0] = and_or<0x00ff00ffu>(v, Magic<F16>::bits);
        a[0][1] = prmt(v, Magic<F16>::bits, 0x7371);
        a[0][2] = and_or<0x00ff00ffu>(u, Magic<F16>::bits);
        a[0][3] = prmt(u, Magic<F16>::bits, 0x7371);
    }
};

// 128 + q holds only 7 bits exactly: low and high halves of a code are two operands, q x = l x + h (16 x).
template <>
struct Codes<BF16, 8> {
    static constexpr int parts = 2;
    static constexpr float offset = 17.0f * Magic<BF16>::offset;
    static constexpr float upper_factor = 1.0f;
    template <int STEP>
    static HQQ_INLINE void unpack(const uint32_t* w, uint32_t (&a)[2][4]) {
        const uint32_t v = w[2 * STEP], u = w[2 * STEP + 1];
        a[0][0] = and_or<0x000f000fu>(v, Magic<BF16>::bits);
        a[1][0] = and_or<0x000f000fu>(v >> 4, Magic<BF16>::bits);
        a[0][1] = and_or<0x000f000fu>(v >> 8, Magic<BF16>::bits);
        a[1][1] = and_or<0x000f000fu>(v >> 12, Magic<BF16>::bits);
        a[0][2] = and_or<0x000f000fu>(u, Magic<BF16>::bits);
        a[1][2] = and_or<0x000f000fu>(u >> 4, Magic<BF16>::bits);
        a[0][3] = and_or<0x000f000fu>(u >> 8, Magic<BF16>::bits);
        a[1][3] = and_or<0x000f000fu>(u >> 12, Magic<BF16>::bits);
    }
};

// How many blocks of 64 inputs share whole 16-byte loads, and how many loads those are.
template <int BITS>
struct Chunk {
    static constexpr int blocks = BITS >= 4 ? 1 : BITS == 2 ? 2 : 4;
    static constexpr int loads = BITS * blocks / 4;
};

// The words of block `block` of a chunk, from the chunk's loads.
template <int BITS>
HQQ_INLINE void block_words(const uint4 (&loads)[Chunk<BITS>::loads], int block, uint32_t (&w)[BITS]) {
    if constexpr (BITS == 8) {
        w[0] = loads[0].x, w[1] = loads[0].y, w[2] = loads[0].z, w[3] = loads[0].w;
        w[4] = loads[1].x, w[5] = loads[1].y, w[6] = loads[1].z, w[7] = loads[1].w;
    } else if constexpr (BITS == 4) {
        w[0] = loads[0].x, w[1] = loads[0].y, w[2] = loads[0].z, w[3] = loads[0].w;
    } else if constexpr (BITS == 1) {
        w[0] = block == 0 ? loads[0].x : block == 1 ? loads[0].y : block == 2 ? loads[0].z : loads[0].w;
    } else if constexpr (BITS == 2) {
        w[0] = block % 2 ? loads[0].z : loads[0].x;
        w[1] = block % 2 ? loads[0].w : loads[0].y;
    } else if (block == 3) {
        w[0] = loads[0].w, w[1] = loads[1].w, w[2] = loads[2].w;
    } else {
        w[0] = loads[block].x, w[1] = loads[block].y, w[2] = loads[block].z;
    }
}

#endif
