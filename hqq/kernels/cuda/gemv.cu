// y[M, N] = x[M, K] W^T + bias for few tokens, W as tiles of codes (see tile_layout.py).
//
// The product of codes and inputs is one of integers: codes are bytes as they are, and x is split into two bytes
// (fixed_point.cuh), which is exact enough for 16-bit floats and takes a quarter of the instructions that codes as floats
// take. The weights are the tall operand of mma.m16n8k32: 16 output features by 32 inputs, and eight columns. A warp keeps
// one slice of x in registers, as the second operand, and walks over the row tiles of its block; the warps of a block share
// the inputs among them and add up in shared memory, always in the same order. While one row tile is multiplied the codes
// of the next one are on their way into the registers that it frees.
//
// A token takes two columns, one for each byte. With fewer than four tokens the columns left over hold the same tokens once
// more, each for other inputs: columns 2i and 2i + 1 are token i mod TOKENS in slot i / TOKENS, and x is zero in every slot
// but the one whose inputs are multiplied. So a column adds up 64 inputs (or one group, if that is smaller), and a lane
// scales the sums of one slot only: of the columns 2c and 2c + 1, whose sums it holds.
//
// With unit the value of x's last bit, for each slot:
// axis=1: y += scale * (unit * sum(q n) - zero * unit * sum(n)).
// axis=0: a row tile has scale[k] and zero[k] in common, so scale x is what is split: y += unit * sum(q n), and
// sum(zero scale x) is subtracted from the sums of all its rows.
//
// What a transformer does around its products costs little here and a kernel each elsewhere:
// NORMED: x is norm * x / sqrt(mean(x^2) + eps); the root is taken out of the sums.
// GATED: the weight's tiles are those of a gate and, behind them, of as many outputs again; y is silu(gate) * other, [M, N / 2].
// A residual [M, N] is added to y if there is one.
//
// Compile-time: ELEMENT (F16, BF16), CODE_BITS, AXIS, GROUP (axis=1: weights in a group; 0: the row), TOKENS (1, 2, 4, 8),
// TILES (row tiles at a time; GATED: 2), WARPS (of a block), BLOCKS (of 64 inputs that a warp has at a time), RESIDENT
// (blocks that should fit a multiprocessor), NORMED, GATED (0 or 1; GATED for axis=1 only).
#include "gemv_inputs.cuh"
#include "gemv_results.cuh"
#include "gemv_shape.cuh"
#include "gemv_weights.cuh"

// The unit of x in the sums of row g and of row g + 8, whose codes are multiplied by a factor.
HQQ_INLINE float unit_of_sums(float unit, int upper) {
    return unit * (upper ? 1.0f / C::upper_factor : 1.0f / C::lower_factor);
}

// Sums of one slice for TILES row tiles: of integers for one set of slots, and scaled, of all sets.
struct Products {
    float out[TILES][COLUMN_SETS][2];  // rows g and g + 8, in the lane's slot
    int acc[TILES][COLUMN_SETS][4] = {};

    explicit HQQ_INLINE Products(const Inputs& inputs) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int columns = 0; columns < COLUMN_SETS; ++columns)
                out[tile][columns][0] = out[tile][columns][1] = AXIS == 0 ? -inputs.zeros[columns] : 0.0f;
    }

    template <int STEP>
    HQQ_INLINE void multiply(const uint32_t (&w)[TILES][BITS], const uint32_t (&b)[COLUMN_SETS][4]) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            uint32_t a[4];
            C::template unpack<STEP>(w[tile], a);
#pragma unroll
            for (int columns = 0; columns < COLUMN_SETS; ++columns)
                mma_m16n8k32(acc[tile][columns], a[0], a[1], a[2], a[3], b[columns][2 * STEP], b[columns][2 * STEP + 1]);
        }
    }

    // Scales the sums of the set that is complete and begins the next; of_x: unit and, axis=1, unit * sum(n).
    HQQ_INLINE void scale(const Weights& weights, int set, int columns, float2 of_x) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                const float sum = both_bytes(acc[tile][columns], upper), unit = unit_of_sums(of_x.x, upper);
                float& to = out[tile][columns][upper];
                if constexpr (AXIS == 0) {
                    to = fmaf(sum, unit, to);
                } else {
                    const uint32_t word = upper ? weights.scales[tile][set].y : weights.scales[tile][set].x;
                    to = fmaf(low_float<T>(word), fmaf(-high_float<T>(word), of_x.y, sum * unit), to);
                }
                acc[tile][columns][2 * upper] = acc[tile][columns][2 * upper + 1] = 0;
            }
    }

    // Puts the sums where this warp's are; a later sweep adds to what the same lane wrote.
    HQQ_INLINE void put(float* warp_sums, const Lane& lane, bool first) const {
#pragma unroll
        for (int columns = 0; columns < COLUMN_SETS; ++columns)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int upper = 0; upper < 2; ++upper) {
                    float* to = warp_sums + (16 * tile + 8 * upper + lane.g) * ROW_SUMS + 4 * columns + lane.c;
                    *to = (first ? 0.0f : *to) + out[tile][columns][upper];
                }
    }
};

struct Position {
    int batch, sweep, group;  // group: row group of this block
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
gemv(const unsigned char* x_, const unsigned char* codes, const unsigned char* meta, const int4* rows,
     const unsigned char* bias, const unsigned char* norm, const unsigned char* residual, unsigned char* y, int M, int N, int K,
     int tiles, int blocks, int groups, int sweeps, int batch, float eps) {
    // More tokens than TOKENS are several grids in one, which find the codes in the L2 cache.
    const int token0 = int(blockIdx.y) * TOKENS, tokens = min(M - token0, TOKENS);
    const int64_t result0 = int64_t(token0) * (GATED ? N / 2 : N) * 2;
    const Arguments p = {x_ + int64_t(token0) * K * 2, codes, meta, rows, bias, norm,
                         residual ? residual + result0 : nullptr, y + result0, tokens, N, K, tiles, blocks, groups, sweeps,
                         batch, eps};
    HQQ_DYNAMIC_SHARED(memory);
    const Shared shared(memory, p.batch);
    const Lane lane = this_lane();
    const int warp = threadIdx.x / 32;
    float2* x_sums = shared.x_sums + warp * SETS * ROW_SUMS;
    unsigned char* row_meta = shared.row_meta + warp * BLOCKS * 256;

    const int mine = (p.row_groups() - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    const auto group_of_grid = [&](int group) { return int(blockIdx.x) + group * int(gridDim.x); };
    const auto first_block = [&](int sweep) { return (sweep * WARPS + warp) * BLOCKS; };
    const auto first_tile = [&](int group) { return p.first_tile(group_of_grid(group)); };
    const auto batch_end = [&](int b) { return min(b + p.batch, mine); };

    Weights weights;
    weights.aim(p, lane, first_block(0));
    weights.aim_at_tiles(p, first_tile(0), true);
    // Before the kernels in front have ended: whoever makes a TiledWeight waits until it is written.
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) weights.fetch_codes(chunk);
    weights.fetch_all_scales(p, lane, first_tile(0), row_meta);
    pdl_launch();
    pdl_wait();

    Inputs inputs;
    Position at = {0, 0, 0};
    bool new_slice = true;
    while (at.batch < mine) {
        Position next = at;
        if (++next.group >= batch_end(at.batch)) {
            next.group = at.batch;
            if (++next.sweep >= p.sweeps) {
                next.sweep = 0, next.batch += p.batch, next.group = next.batch;
            }
        }
        const bool more = next.batch < mine;
        const int block0 = first_block(at.sweep), next_tile0 = first_tile(next.group);
        if (next.sweep != at.sweep) weights.aim(p, lane, first_block(next.sweep));
        weights.aim_at_tiles(p, next_tile0, more);

        if constexpr (AXIS == 1) {
            if (new_slice) {
                __syncwarp();
                inputs.split(p, lane, block0, x_sums);
                __syncwarp();
            }
        } else {
            cp_async_wait<0>();
            __syncwarp();
            inputs.split_scaled(p, lane, block0, new_slice, row_meta);
            __syncwarp();
            if (more) weights.copy_scales(p, next_tile0, row_meta);
        }
        if (NORMED && new_slice) put_squares(shared.squares + warp * TOKENS, lane, inputs.squares, at.sweep == 0);

        Products products(inputs);
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            constexpr int CHUNK_BLOCKS = Chunk<BITS>::blocks;
            uint32_t w[TILES][BITS];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                block_words<BITS>(weights.codes[tile][block / CHUNK_BLOCKS], block % CHUNK_BLOCKS, w[tile]);
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                uint32_t b[COLUMN_SETS][4];
                inputs.of_block(b, lane, block, pass);
                products.multiply<0>(w, b);
                products.multiply<1>(w, b);
                if ((block + 1) % SET_BLOCKS != 0 && block + 1 != BLOCKS) continue;
                const int held = block / SET_BLOCKS, set = held * PASSES + pass;
#pragma unroll
                for (int columns = 0; columns < COLUMN_SETS; ++columns)
                    products.scale(weights, set, columns,
                                   AXIS == 0 ? make_float2(inputs.units[columns][held], 0.0f)
                                             : x_sums[(set * COLUMN_SETS + columns) * 4 + lane.c]);
                if constexpr (SCALES_AT_ONCE) weights.fetch_scales(p, lane, next_tile0, set);
            }
            if ((block + 1) % CHUNK_BLOCKS == 0) weights.fetch_codes(block / CHUNK_BLOCKS);
        }
        if (AXIS == 1 && !SCALES_AT_ONCE && more) weights.fetch_all_scales(p, lane, next_tile0, row_meta);
        products.put(shared.sums + ((at.group - at.batch) * WARPS + warp) * WARP_SUMS, lane, at.sweep == 0);

        if (next.batch != at.batch) {
            __syncthreads();
            write_results(p, shared, group_of_grid(at.batch), int(gridDim.x), batch_end(at.batch) - at.batch);
            __syncthreads();
        }
        new_slice = next.sweep != at.sweep || next.batch != at.batch;
        at = next;
    }
}
