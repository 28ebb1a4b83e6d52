// W[N, K] = (W_q - zero) * scale, row by row, from a weight in tile order (tile_layout.py). Both steps are rounded to the
// dtype, as the reference does, so results are equal to it bit for bit.
//
// A warp turns RUN blocks of 64 inputs of one tile of 16 output features into 16 pieces of rows. A lane has 16
// neighbouring inputs of two rows; lanes exchange halves in pairs, so that a store fills whole 32-byte sectors.
//
// Set by the host, with HQQ_ in front: T (F16, BF16), BITS, AXIS, GROUP (0: the whole row), RUN (a multiple of the blocks
// of a chunk), KEEP (1: the result is read again soon and fits the L2 cache).
#include "fragments.cuh"

namespace {

using T = HQQ_T;
constexpr int BITS = HQQ_BITS, AXIS = HQQ_AXIS, GROUP = HQQ_GROUP, RUN = HQQ_RUN, KEEP = HQQ_KEEP;
constexpr int WARPS = 8, BLOCK_INPUTS = 64;

using P = Packing<BITS>;
using S = Scales<T, AXIS, GROUP>;
constexpr int CHUNKS = RUN / P::CHUNK_BLOCKS;

HQQ_INLINE uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// The words of block `block` of a chunk in registers; `block` is known when this is compiled.
HQQ_INLINE void take_block(uint32_t (&word)[BITS], const uint4 (&load)[P::LOADS], int block) {
#pragma unroll
    for (int i = 0; i < BITS; ++i) {
        if constexpr (BITS == 3)
            word[i] = i < 2 ? word_of(load[block / 2], block % 2 * 2 + i) : word_of(load[2], block);
        else
            word[i] = word_of(load[i / 4], (block * BITS + i) % 4);
    }
}

template <int STEP = 0>
HQQ_INLINE void dequantise(uint32_t (&row)[2][8], const uint32_t (&word)[BITS], const S& scales) {
    if constexpr (STEP < 4) {
        uint32_t a[4];
        exact_weights<T, BITS, STEP>(a, word, scales);
        row[0][2 * STEP] = a[0], row[0][2 * STEP + 1] = a[2];
        row[1][2 * STEP] = a[1], row[1][2 * STEP + 1] = a[3];
        dequantise<STEP + 1>(row, word, scales);
    }
}

HQQ_INLINE void put(uint16_t* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    if constexpr (KEEP)
        *reinterpret_cast<uint4*>(to) = make_uint4(a, b, c, d);
    else
        stg128_stream(to, make_uint4(a, b, c, d));
}

// `row`: inputs k to k + 15 of a row that begins at `to`; lane column c has k = 16 c + a multiple of 64.
HQQ_INLINE void store_row(const uint32_t (&row)[8], uint16_t* to, int k, int K, bool real, int lane) {
    if (K % 8 != 0) {
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (real && k + i < K) to[k + i] = static_cast<uint16_t>(row[i / 2] >> 16 * (i % 2));
        return;
    }
    const bool odd = lane % 2 != 0;
    uint32_t other[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) other[i] = __shfl_xor_sync(0xffffffffu, odd ? row[i] : row[4 + i], 1);
    const int even_k = odd ? k - 16 : k, half = odd ? 8 : 0;
    if (real && even_k + half < K) {
        if (odd)
            put(to + even_k + half, other[0], other[1], other[2], other[3]);
        else
            put(to + even_k + half, row[0], row[1], row[2], row[3]);
    }
    if (real && even_k + 16 + half < K) {
        if (odd)
            put(to + even_k + 16 + half, row[4], row[5], row[6], row[7]);
        else
            put(to + even_k + 16 + half, other[0], other[1], other[2], other[3]);
    }
}

}  // namespace

// `rows`: for each tile its first output feature, the distance to the next, how many, and the power of two in scales.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    tile_dequantize(const unsigned char* codes, const unsigned char* meta, const int* rows, uint16_t* W, int K, int tiles,
                    int chunks, int groups) {
    const int lane = threadIdx.x % 32, runs = (chunks + CHUNKS - 1) / CHUNKS;
    const int work = blockIdx.x * WARPS + threadIdx.x / 32, tile = work / runs, first = work % runs * CHUNKS;
    if (tile >= tiles) return;
    const unsigned char* from = codes + (static_cast<int64_t>(tile) * chunks + first) * P::CHUNK_BYTES + 16 * lane;
    uint4 load[CHUNKS][P::LOADS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
        for (int j = 0; j < P::LOADS; ++j)
            if (i == 0 || first + i < chunks) load[i][j] = ldg128_stream(from + i * P::CHUNK_BYTES + 512 * j);

    const int4 place = *reinterpret_cast<const int4*>(rows + 4 * tile);
    const unsigned char* scales_of_tile = meta;
    if constexpr (AXIS == 0)
        scales_of_tile += static_cast<int64_t>(tile / MEMBERS<GROUP>) * chunks * P::CHUNK_BLOCKS * S::BLOCK_BYTES;
    else
        scales_of_tile += static_cast<int64_t>(tile) * groups * 64;
    const int g = lane / 4;
    uint16_t* to[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) to[half] = W + (place.x + static_cast<int64_t>(place.y) * (g + 8 * half)) * K;

#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        if (i > 0 && first + i >= chunks) break;
#pragma unroll
        for (int b = 0; b < P::CHUNK_BLOCKS; ++b) {
            const int block = (first + i) * P::CHUNK_BLOCKS + b;
            uint32_t word[BITS], row[2][8];
            S scales;
            take_block(word, load[i], b);
            scales.read(scales_of_tile + S::offset(block), lane);
            scales.times_power(-place.w);
            dequantise(row, word, scales);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_row(row[half], to[half], BLOCK_INPUTS * block + 16 * (lane % 4), K, g + 8 * half < place.z, lane);
        }
    }
}
