// W[N, K] = (W_q - zero) * scale, row by row, from a weight in tile order (tile_layout.py). Both steps are rounded to the
// dtype, as the reference does, so results are equal to it bit for bit.
//
// A warp turns RUN blocks of 64 inputs of one tile of 16 output features into 16 pieces of rows. A lane has 16
// neighbouring inputs of two rows; lanes exchange halves in pairs, so that a store fills whole 32-byte sectors.
//
// Set by the host, with HQQ_ in front: T (F16, BF16), BITS, AXIS, GROUP (0: the whole row), RUN (a multiple of the blocks
// of a chunk), RAGGED (1: K is no multiple of 8).
#include "fragments.cuh"

namespace {

using T = HQQ_T;
constexpr int BITS = HQQ_BITS, AXIS = HQQ_AXIS, GROUP = HQQ_GROUP, RUN = HQQ_RUN, RAGGED = HQQ_RAGGED;
constexpr int WARPS = 8, BLOCK_INPUTS = 64;

using C = Chunk<BITS>;
using S = Scales<T, AXIS, GROUP>;
constexpr int CHUNKS = RUN / C::blocks;

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

HQQ_INLINE void put(uint16_t* to, const uint32_t (&v)[4]) { stg128_stream(to, make_uint4(v[0], v[1], v[2], v[3])); }

// `row`: inputs k to k + 15 of a row that begins at `to`; lane column c has k = 16 c + a multiple of 64.
HQQ_INLINE void store_row(const uint32_t (&row)[8], uint16_t* to, int k, int K, bool real, int lane) {
    if constexpr (RAGGED) {
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (real && k + i < K) to[k + i] = static_cast<uint16_t>(row[i / 2] >> 16 * (i % 2));
        return;
    }
    // Of a pair of lanes, the even one stores the first half of both runs of 16, the odd one the second.
    const bool odd = lane % 2 != 0;
    uint32_t even_run[4], odd_run[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? row[i] : row[4 + i], 1);
        even_run[i] = odd ? other : row[i];
        odd_run[i] = odd ? row[4 + i] : other;
    }
    const int even_k = odd ? k - 8 : k;
    if (real && even_k < K) put(to + even_k, even_run);
    if (real && even_k + 16 < K) put(to + even_k + 16, odd_run);
}

}  // namespace

// `rows`: for each tile its first output feature, the distance to the next, how many, and the power of two in scales.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    tile_dequantize(const unsigned char* codes, const unsigned char* meta, const int* rows, uint16_t* W, int K, int tiles,
                    int chunks, int groups) {
    const int lane = threadIdx.x % 32, runs = (chunks + CHUNKS - 1) / CHUNKS;
    const int work = blockIdx.x * WARPS + threadIdx.x / 32, tile = work / runs, first = work % runs * CHUNKS;
    if (tile >= tiles) return;
    // Past the last chunk: that one once more, since loads on a condition would be put off.
    uint4 load[CHUNKS][C::loads];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int chunk = first + i < chunks ? first + i : chunks - 1;
        const unsigned char* from = codes + (static_cast<int64_t>(tile) * chunks + chunk) * C::bytes + 16 * lane;
#pragma unroll
        for (int j = 0; j < C::loads; ++j) load[i][j] = ldg128_stream(from + 512 * j);
    }

    const int4 place = *reinterpret_cast<const int4*>(rows + 4 * tile);
    const unsigned char* scales_of_tile = meta;
    if constexpr (AXIS == 0)
        scales_of_tile += static_cast<int64_t>(tile / MEMBERS<GROUP>) * chunks * C::blocks * S::BLOCK_BYTES;
    else
        scales_of_tile += static_cast<int64_t>(tile) * groups * 64;
    const int g = lane / 4;
    uint16_t* to[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) to[half] = W + (place.x + static_cast<int64_t>(place.y) * (g + 8 * half)) * K;

    // Loads before the stores that they must not wait for: all of them along axis 1, the next block's along axis 0.
    constexpr int AHEAD = AXIS == 1 ? RUN : 2;
    S scales[AHEAD];
    const int first_block = first * C::blocks, last_block = (chunks * C::blocks) - 1;
    const auto read = [&](int i) {
        const int block = first_block + i;
        scales[i % AHEAD].read(scales_of_tile + S::offset(block < last_block ? block : last_block), lane);
    };
#pragma unroll
    for (int i = 0; i < AHEAD - (AXIS == 0); ++i) read(i);
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
        constexpr int OF_CHUNK = C::blocks;
        if (i > 0 && i % OF_CHUNK == 0 && first + i / OF_CHUNK >= chunks) break;
        if (AXIS == 0 && i + 1 < RUN) read(i + 1);
        uint32_t word[BITS], row[2][8];
        block_words<BITS>(load[i / OF_CHUNK], i % OF_CHUNK, word);
        scales[i % AHEAD].times_power(-place.w);
        scales[i % AHEAD].negate();
        dequantise(row, word, scales[i % AHEAD]);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            store_row(row[half], to[half], BLOCK_INPUTS * (first_block + i) + 16 * (lane % 4), K, g + 8 * half < place.z,
                      lane);
    }
}
