// From the sums of an output tile to y, in cuda/gemm.cu.
#ifndef HQQ_GEMM_RESULTS_CUH
#define HQQ_GEMM_RESULTS_CUH

#include "gemm_shape.cuh"

struct Output {
    const int* rows;
    const uint16_t* bias;
    uint16_t* y;
    int M, N, tiles;
};

// Whether the tiles `order` to `order + 7` have neighbouring features in each row; the same answer in all warps.
HQQ_INLINE bool neighbours(const Output& out, int order, int lane) {
    if (order + WARPS > out.tiles || out.N % 8 != 0) return false;
    const int w = lane % WARPS;
    const int* row = out.rows + 4 * row_tile(order + w, out.tiles);
    const int base = row[0] - w, stride = row[1];
    bool fine = base % 8 == 0 && stride % 8 == 0 && row[2] == TILE_ROWS;
    fine = fine && base == __shfl_sync(0xffffffffu, base, 0) && stride == __shfl_sync(0xffffffffu, stride, 0);
    return __ballot_sync(0xffffffffu, fine) == 0xffffffffu;
}

// Output features of one row tile; a lane has rows g and g + 8.
struct Rows {
    int base, stride, count;
    float factor, bias[2];
    int neighbours_base;  // of the 8 warps' tiles, where they can be stored together; else -1

    HQQ_INLINE Rows() {}

    // The tile of `warp` among the eight from place `order` on.
    HQQ_INLINE Rows(const Output& out, int order, int warp, int lane) {
        neighbours_base = -1;
        if constexpr (AXIS == 0)
            if (neighbours(out, order, lane)) neighbours_base = out.rows[4 * row_tile(order, out.tiles)];
        order += warp;
        const int* row = out.rows + 4 * row_tile(order, out.tiles);
        base = row[0], stride = row[1], count = order < out.tiles ? row[2] : 0;
        factor = __int_as_float((127 - row[3] - Number<T>::EXPONENT) << 23);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = lane / 4 + 8 * half;
            bias[half] = out.bias != nullptr && i < count ? low_float<T>(out.bias[base + stride * i]) : 0.0f;
        }
    }

    HQQ_INLINE float finish(float sum, int half) const { return fmaf(sum, factor, bias[half]); }
};

// Element by element, for edges and for features that lie apart.
HQQ_INLINE void store_singly(const float* sum, const Rows& rows, const Output& out, int token, int lane) {
#pragma unroll
    for (int n = 0; n < PART_SUMS; n += 4) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int i = lane / 4 + 8 * (e / 2), m = token + 2 * n + lane % 4 * 2 + e % 2;
            if (i < rows.count && m < out.M) {
                const uint32_t pair = pack2<T>(rows.finish(sum[n + e], e / 2), 0.0f);
                out.y[static_cast<int64_t>(m) * out.N + rows.base + rows.stride * i] = static_cast<uint16_t>(pair);
            }
        }
    }
}

// 16 neighbouring features, 16 tokens at a time through 512 bytes of the warp.
HQQ_INLINE void store_columns(const float* sum, const Rows& rows, const Output& out, int token, int lane,
                              unsigned char* mine) {
    // Matrix i of the four: features 8 (i % 2), tokens 8 (i / 2); a token's two halves change places every 4 tokens.
    const int to_token = lane % 8 + lane / 16 * 8, to_half = lane / 8 % 2;
    const uint32_t to = smem_u32(mine) + 32 * to_token + 16 * (to_half ^ (to_token / 4 % 2));
    const int from_token = lane / 2, from_half = lane % 2;
    const unsigned char* from = mine + 32 * from_token + 16 * (from_half ^ (from_token / 4 % 2));
#pragma unroll
    for (int n = 0; n < PART_SUMS; n += 8) {
        uint32_t pair[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            pair[i] = pack2<T>(rows.finish(sum[n + 2 * i], i % 2), rows.finish(sum[n + 2 * i + 1], i % 2));
        __syncwarp();
        stmatrix_x4_trans(to, pair[0], pair[1], pair[2], pair[3]);
        __syncwarp();
        const int m = token + 2 * n + from_token;
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        if (m < out.M)
            *reinterpret_cast<uint4*>(out.y + static_cast<int64_t>(m) * out.N + rows.base + 8 * from_half) = v;
    }
}

// Features of the 8 warps' tiles are neighbours, for each of the 16 rows: 8 at a time, through shared memory of the block.
HQQ_INLINE void store_exchanged(const float* sum, const Rows& rows, const Output& out, int token, int warp, int lane,
                                unsigned char* exchange) {
    uint32_t* words = reinterpret_cast<uint32_t*>(exchange);  // [pairs of tokens][16 rows][8 warps, permuted]
    const int thread = 32 * warp + lane, g = lane / 4, c = lane % 4;
    const int mix = 2 * c + g / 4 % 2;  // so that no two lanes meet in a bank
    const int i = thread % 16, pair = thread / 16, from_mix = 2 * (pair % 4) + i / 4 % 2;
    bar_sync(1, MULTIPLIERS);
#pragma unroll
    for (int k = 0; k < PART_TOKENS / 8; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* two = sum + 4 * k + 2 * half;
            words[((4 * k + c) * 16 + g + 8 * half) * 8 + (warp ^ mix)] =
                pack2<T>(rows.finish(two[0], half), rows.finish(two[1], half));
        }
    }
    bar_sync(1, MULTIPLIERS);
    if (pair < PART_TOKENS / 2) {
        uint32_t v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = words[(pair * 16 + i) * 8 + (j ^ from_mix)];
        const int m = token + 2 * pair;
        uint16_t* to = out.y + static_cast<int64_t>(m) * out.N + rows.neighbours_base + rows.stride * i;
        if (m < out.M)
            *reinterpret_cast<uint4*>(to) = make_uint4(prmt(v[0], v[1], 0x5410), prmt(v[2], v[3], 0x5410),
                                                       prmt(v[4], v[5], 0x5410), prmt(v[6], v[7], 0x5410));
        if (m + 1 < out.M)
            *reinterpret_cast<uint4*>(to + out.N) = make_uint4(prmt(v[0], v[1], 0x7632), prmt(v[2], v[3], 0x7632),
                                                               prmt(v[4], v[5], 0x7632), prmt(v[6], v[7], 0x7632));
    }
}

#endif
