// x in a warp of gemv.cu: where it comes from, what is done to it, and how it is split into bytes.
#ifndef HQQ_GEMV_INPUTS_CUH
#define HQQ_GEMV_INPUTS_CUH

#include "fixed_point.cuh"
#include "gemv_shape.cuh"

// Where the lane's eight inputs of its column are, in column set `columns` and held block `held` of the slice that begins at
// `block0`: nowhere (so they are zero) beyond M and K and in the parts of other slots.
struct InputPlace {
    int token, k;
    bool there;

    HQQ_INLINE InputPlace(const Arguments& p, const Lane& lane, int columns, int held, int block0) {
        const int block = held * SET_BLOCKS + (PASSES > 1 ? 0 : lane.slot / PARTS);
        const bool my_part = PASSES > 1 || lane.c * PARTS / 4 == lane.slot % PARTS;
        token = COLUMN_TOKENS * columns + lane.token;
        k = 64 * (block0 + block) + first_input(lane);
        there = my_part && token < p.M && k < p.K && block < BLOCKS;
    }

    // Of the sixteen of a column that two lanes share, in a block.
    static HQQ_INLINE int first_input(const Lane& lane) { return 16 * lane.c + C::run * lane.piece; }
};

// Eight inputs: one run of them, or two that begin eight apart.
HQQ_INLINE uint4 load_eight(const unsigned char* from) {
    if constexpr (C::run == 8) return ldg128(from);
    const uint2 first = ldg64(from), second = ldg64(from + 16);
    return make_uint4(first.x, first.y, second.x, second.y);
}

HQQ_INLINE uint4 read_eight(const unsigned char* from) {
    if constexpr (C::run == 8) return *reinterpret_cast<const uint4*>(from);
    const uint2 first = *reinterpret_cast<const uint2*>(from), second = *reinterpret_cast<const uint2*>(from + 16);
    return make_uint4(first.x, first.y, second.x, second.y);
}

HQQ_INLINE uint4 load_x(const Arguments& p, const InputPlace& at) {
    return at.there ? load_eight(p.x + (int64_t(at.token) * p.K + at.k) * 2) : make_uint4(0, 0, 0, 0);
}

HQQ_INLINE void as_floats(float (&values)[8], uint4 pairs) {
    const uint32_t word[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = low_float<T>(word[i]);
        values[2 * i + 1] = high_float<T>(word[i]);
    }
}

// NORMED: values times the norm's weights; returns the sum of the values' squares.
HQQ_INLINE float apply_norm(float (&values)[8], const Arguments& p, const InputPlace& at) {
    float weight[8], square = 0.0f;
    as_floats(weight, at.there ? load_eight(p.norm + at.k * 2) : make_uint4(0, 0, 0, 0));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        square = fmaf(values[i], values[i], square);
        values[i] *= weight[i];
    }
    return square;
}

// Adds up what lanes hold for the same token, and keeps it for this warp; a later sweep adds to it.
HQQ_INLINE void put_squares(float* mine, const Lane& lane, const float (&squares)[COLUMN_SETS], bool first) {
#pragma unroll
    for (int columns = 0; columns < COLUMN_SETS; ++columns) {
        float sum = sum_over_inputs(squares[columns]);
        // With several passes all slots hold the same inputs.
#pragma unroll
        for (int distance = 8 * COLUMN_TOKENS; distance < 32 && PASSES == 1; distance *= 2)
            sum += __shfl_xor_sync(FULL_WARP, sum, distance);
        float* to = mine + COLUMN_TOKENS * columns + lane.token;
        if (lane.c == 0 && lane.piece == 0 && lane.slot == 0) *to = first ? sum : *to + sum;
    }
}

// One for lanes whose column is in the slot of block `block` (and part, in pass `pass`), else zero. Columns are masked by a
// product, which the compiler must not see to be a selection: the units of logical instructions are busy with the codes.
HQQ_INLINE uint32_t column_mask(const Lane& lane, int block, int pass) {
    const int part = lane.c * PARTS / 4;
    return opaque(PASSES > 1 ? part == pass * SLOTS + lane.slot : lane.slot / PARTS == block % SET_BLOCKS);
}

// The lane's bytes of the inputs of one slice, in its column.
struct Inputs {
    uint32_t n[COLUMN_SETS][HELD][4];
    float units[COLUMN_SETS][HELD];  // axis=0: for the slot and token whose sums the lane holds
    float squares[COLUMN_SETS];      // NORMED: the lane's part of the sum of x^2
    float zeros[COLUMN_SETS];        // axis=0: the sum of zero scale x, for the same slot and token

    // axis=1: splits x, and puts unit and unit * sum(n) of each slot and token into `x_sums`.
    HQQ_INLINE void split(const Arguments& p, const Lane& lane, int block0, float2* x_sums) {
#pragma unroll
        for (int columns = 0; columns < COLUMN_SETS; ++columns) {
            squares[columns] = 0.0f;
#pragma unroll
            for (int held = 0; held < HELD; ++held) {
                const InputPlace place(p, lane, columns, held, block0);
                float values[8];
                as_floats(values, load_x(p, place));
                if constexpr (NORMED) squares[columns] += apply_norm(values, p, place);
                const float unit = to_fixed_point<C>(values, lane.piece, n[columns][held]);
                put_sums(lane, columns, held, __shfl_sync(FULL_WARP, unit, 8 * lane.c), x_sums);
            }
        }
    }

    // axis=0: splits scale x for the row tiles whose scales and zeros are in `row_meta`.
    HQQ_INLINE void split_scaled(const Arguments& p, const Lane& lane, int block0, bool new_slice, const unsigned char* row_meta) {
#pragma unroll
        for (int columns = 0; columns < COLUMN_SETS; ++columns) squares[columns] = zeros[columns] = 0.0f;
#pragma unroll
        for (int held = 0; held < HELD; ++held) {
            const int block = held * SLOTS + lane.slot;
            const unsigned char* from = row_meta + (block < BLOCKS ? block : 0) * 256 + 2 * InputPlace::first_input(lane);
            float scale[8], zero[8];
            as_floats(scale, read_eight(from));
            as_floats(zero, read_eight(from + 128));
#pragma unroll
            for (int columns = 0; columns < COLUMN_SETS; ++columns) {
                const InputPlace place(p, lane, columns, held, block0);
                if (!KEEPS_X || new_slice) unscaled[columns][held] = load_x(p, place);
                float values[8];
                as_floats(values, unscaled[columns][held]);
                if constexpr (NORMED) squares[columns] += apply_norm(values, p, place);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    values[i] *= scale[i];
                    zeros[columns] = fmaf(zero[i], values[i], zeros[columns]);
                }
                const float unit = to_fixed_point<C>(values, lane.piece, n[columns][held]);
                units[columns][held] = __shfl_sync(FULL_WARP, unit, 8 * lane.c);
            }
        }
#pragma unroll
        for (int columns = 0; columns < COLUMN_SETS; ++columns)
            zeros[columns] = __shfl_sync(FULL_WARP, sum_over_inputs(zeros[columns]), 8 * lane.c);
    }

    // The operands for block `block` of the slice: zero but in the columns of its slot (and part, in pass `pass`).
    HQQ_INLINE void of_block(uint32_t (&b)[COLUMN_SETS][4], const Lane& lane, int block, int pass) const {
        const uint32_t mask = column_mask(lane, block, pass);
#pragma unroll
        for (int columns = 0; columns < COLUMN_SETS; ++columns)
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const uint32_t bytes = n[columns][block / SET_BLOCKS][q];
                b[columns][q] = SET_BLOCKS > 1 || PASSES > 1 ? bytes * mask : bytes;
            }
    }

private:
    // axis=0: scale x is split anew for each row tile, from x that is kept where it is little.
    static constexpr bool KEEPS_X = COLUMN_SETS * HELD <= 4;
    uint4 unscaled[COLUMN_SETS][HELD];

    HQQ_INLINE void put_sums(const Lane& lane, int columns, int held, float unit, float2* x_sums) const {
        const uint32_t(&bytes)[4] = n[columns][held];
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const uint32_t mask = PASSES > 1 ? column_mask(lane, 0, pass) : 1;
            constexpr uint32_t ones = 0x01010101u;
            int sums[4] = {0, 0, 0, 0};
#pragma unroll
            for (int q = 0; q < 4; q += 2)
                mma_m16n8k32(sums, ones, ones, ones, ones, bytes[q] * mask, bytes[q + 1] * mask);
            float2* to = x_sums + ((held * PASSES + pass) * COLUMN_SETS + columns) * 4 + lane.c;
            if (lane.g == 0) *to = make_float2(unit, unit * both_bytes(sums, 0));
        }
    }
};

#endif
