// The stored codes of a lane: which words belong to a block of 64 inputs, and which to an instruction (see tile_layout.py).
#ifndef HQQ_CODES_CUH
#define HQQ_CODES_CUH

#include "ptx.cuh"

// How many blocks of 64 inputs share whole 16-byte loads, how many loads those are, and the bytes of a warp's loads.
template <int BITS>
struct Chunk {
    static constexpr int blocks = BITS >= 4 ? 1 : BITS == 2 ? 2 : 4;
    static constexpr int loads = BITS * blocks / 4;
    static constexpr int bytes = 512 * loads;
};

// The words of block `block` of a chunk, from the chunk's loads; both are known when this is compiled.
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

// The same from where the chunk lies, in shared or global memory.
template <int BITS>
HQQ_INLINE void read_block(uint32_t (&w)[BITS], const unsigned char* chunk, int block, int lane) {
    const unsigned char* mine = chunk + 16 * lane;
    if constexpr (BITS == 8) {
        const uint4 loads[2] = {*reinterpret_cast<const uint4*>(mine), *reinterpret_cast<const uint4*>(mine + 512)};
        block_words<8>(loads, 0, w);
    } else if constexpr (BITS == 4) {
        const uint4 loads[1] = {*reinterpret_cast<const uint4*>(mine)};
        block_words<4>(loads, 0, w);
    } else if constexpr (BITS == 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(mine + 8 * block);
        w[0] = v.x, w[1] = v.y;
    } else if constexpr (BITS == 1) {
        w[0] = *reinterpret_cast<const uint32_t*>(mine + 4 * block);
    } else if (block == 3) {
#pragma unroll
        for (int i = 0; i < 3; ++i) w[i] = *reinterpret_cast<const uint32_t*>(mine + 512 * i + 12);
    } else {
        const uint4 v = *reinterpret_cast<const uint4*>(mine + 512 * block);
        w[0] = v.x, w[1] = v.y, w[2] = v.z;
    }
}

// (a & MASK) | (b & ~MASK)
template <uint32_t MASK>
HQQ_INLINE uint32_t bit_select(uint32_t a, uint32_t b) {
    return lop3<0xe2>(a, MASK, b);
}

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

#endif
