// y[M, N] = x[M, K] W^T + bias for few tokens (M <= 16), W as tiles of codes (see tile_layout.py).
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
// sum(zero scale x) is subtracted once for all its rows.
//
// What a transformer does around its products costs little here and a kernel each elsewhere:
// NORMED: x is norm * x / sqrt(mean(x^2) + eps); the root is taken out of the sums.
// GATED: the weight's tiles are those of a gate and, behind them, of as many outputs again; y is silu(gate) * other, [M, N / 2].
// A residual [M, N] is added to y if there is one.
//
// Compile-time: ELEMENT (F16, BF16), CODE_BITS, AXIS, GROUP (axis=1: weights in a group; 0: the row), TOKENS (1, 2, 4, 8,
// 16), TILES (row tiles at a time; GATED: 2), WARPS (of a block), BLOCKS (of 64 inputs that a warp has at a time), RESIDENT
// (blocks that should fit a multiprocessor), NORMED, GATED (0 or 1; GATED for axis=1 only).
#include "byte_codes.cuh"
#include "fixed_point.cuh"

using T = ELEMENT;
static constexpr int BITS = CODE_BITS;
using C = ByteCodes<BITS>;

static constexpr int COLUMN_SETS = TOKENS > 4 ? TOKENS / 4 : 1;
static constexpr int COLUMN_TOKENS = TOKENS > 4 ? 4 : TOKENS;
static constexpr int SLOTS = 4 / COLUMN_TOKENS;
// Groups smaller than a block of 64 inputs belong to some of the lane columns (see tile_layout.py): PARTS of a block, a
// slot each. Larger groups are cut into slots of one block. All slots together are a set; where a block has more parts
// than there are slots, it is multiplied in several passes.
static constexpr int PARTS = AXIS == 1 && GROUP > 0 && GROUP < 64 ? 64 / GROUP : 1;
static constexpr int PASSES = PARTS > SLOTS ? PARTS / SLOTS : 1;
static constexpr int SET_BLOCKS = PARTS > SLOTS ? 1 : SLOTS / PARTS;
static constexpr int HELD = (BLOCKS + SET_BLOCKS - 1) / SET_BLOCKS;  // blocks that a lane holds x of
static constexpr int SETS = PASSES * HELD;
static constexpr int CHUNKS = BLOCKS / Chunk<BITS>::blocks;
static constexpr int LOADS = Chunk<BITS>::loads;
static constexpr int ROWS = 16 * TILES;
static constexpr int ROW_SUMS = 4 * COLUMN_SETS;  // one for each slot and token
static_assert(!GATED || (TILES == 2 && AXIS == 1), "a gate and what it is for share inputs that are split once");
// axis=0: scale x is split anew for each row tile, from x that is kept where it is little.
static constexpr bool KEEPS_X = COLUMN_SETS * HELD <= 2;
// Sums of a row group: [WARPS][ROWS + EXTRA][ROW_SUMS]; the extra row of axis=0 has sum(zero scale x).
static constexpr int EXTRA = AXIS == 0 ? 1 : 0;
static constexpr int WARP_SUMS = (ROWS + EXTRA) * ROW_SUMS;

struct Arguments {
    const unsigned char* x;
    const unsigned char* codes;
    const unsigned char* meta;
    const int4* rows;
    const unsigned char* bias;
    const unsigned char* norm;      // NORMED: weights [K] of the norm
    const unsigned char* residual;  // [M, N], or none
    unsigned char* y;
    int M, N, K;
    int tiles;      // row tiles
    int blocks;     // blocks of 64 inputs, padding included
    int groups;     // axis=1: groups of a row, padding included; axis=0: row tiles that share a scale
    int sweeps;     // times that the warps of a block, one slice each, go over the inputs
    int batch;      // row groups (TILES tiles) whose sums shared memory holds
    float eps;

    HQQ_INLINE int row_groups() const { return GATED ? tiles / 2 : (tiles + TILES - 1) / TILES; }
    HQQ_INLINE int first_tile(int group) const { return GATED ? group : group * TILES; }
    // The i-th tile of the group that begins at `first`; some other tile past the last one.
    HQQ_INLINE int tile(int first, int i) const { return min(first + (GATED ? i * (tiles / 2) : i), tiles - 1); }
};

// The block's shared memory.
struct Shared {
    float* sums;              // [batch][WARPS][ROWS + EXTRA][ROW_SUMS]
    float2* x_sums;           // axis=1: unit and unit * sum(n) of x in each slot and token: [WARPS][SETS][ROW_SUMS]
    unsigned char* row_meta;  // axis=0: scales and zeros of a row tile, [WARPS][BLOCKS][2][64] in the dtype
    float* squares;           // NORMED: sums of x^2, [WARPS][TOKENS]

    HQQ_INLINE Shared(unsigned char* memory, int batch) {
        sums = reinterpret_cast<float*>(memory);
        row_meta = memory + batch * WARPS * WARP_SUMS * 4;
        x_sums = reinterpret_cast<float2*>(row_meta);
        squares = reinterpret_cast<float*>(row_meta + WARPS * (AXIS == 1 ? SETS * ROW_SUMS * 8 : BLOCKS * 256));
    }
};

struct Position {
    int batch, sweep, group;  // group: row group of this block
};

// The lane's place: as a holder of codes, sums and scales in row g and column pair c, of x in column g.
struct Lane {
    int g, c, piece, token, slot;
};

HQQ_INLINE Lane this_lane() {
    const int lane = threadIdx.x % 32, g = lane / 4, pair = g / 2;
    return {g, lane % 4, g % 2, pair % COLUMN_TOKENS, pair / COLUMN_TOKENS};
}

// axis=1: where the first row tile has scale and zero of rows g and g + 8, for the group of the lane's slot in set `set` of
// the slice that begins at `block`.
HQQ_INLINE const unsigned char* meta_of_slot(const Arguments& p, const Lane& lane, int block, int set) {
    int group = 0;
    if constexpr (GROUP != 0) {
        const int part = set * SLOTS + lane.c / COLUMN_TOKENS;
        group = PARTS > 1 ? block * PARTS + part : (block + part) / (GROUP >= 64 ? GROUP / 64 : 1);
        group = min(group, p.groups - 1);
    }
    return p.meta + group * 64 + lane.g * 8;
}

// Where the lane's sixteen inputs of its column are, in column set `columns` and held block `held` of the slice that begins at
// `block0`: nowhere (so they are zero) beyond M and K and in the parts of other slots.
struct InputPlace {
    int token, k;
    bool there;

    HQQ_INLINE InputPlace(const Arguments& p, const Lane& lane, int columns, int held, int block0) {
        const int block = held * SET_BLOCKS + (PASSES > 1 ? 0 : lane.slot / PARTS);
        const bool my_part = PASSES > 1 || lane.c * PARTS / 4 == lane.slot % PARTS;
        token = COLUMN_TOKENS * columns + lane.token;
        k = 64 * (block0 + block) + 16 * lane.c;
        there = my_part && token < p.M && k < p.K && block < BLOCKS;
    }
};

HQQ_INLINE void load_sixteen(uint4 (&pairs)[2], const unsigned char* from, bool there) {
#pragma unroll
    for (int i = 0; i < 2; ++i) pairs[i] = there ? ldg128(from + 16 * i) : make_uint4(0, 0, 0, 0);
}

HQQ_INLINE void load_x(uint4 (&pairs)[2], const Arguments& p, const InputPlace& at) {
    load_sixteen(pairs, p.x + (int64_t(at.token) * p.K + at.k) * 2, at.there);
}

HQQ_INLINE void as_floats(float (&values)[16], const uint4 (&pairs)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t word[4] = {pairs[i].x, pairs[i].y, pairs[i].z, pairs[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            values[8 * i + 2 * j] = low_float<T>(word[j]);
            values[8 * i + 2 * j + 1] = high_float<T>(word[j]);
        }
    }
}

// NORMED: values times the norm's weights; returns the sum of the values' squares.
HQQ_INLINE float apply_norm(float (&values)[16], const Arguments& p, const InputPlace& at) {
    uint4 pairs[2];
    float weight[16], square = 0.0f;
    load_sixteen(pairs, p.norm + at.k * 2, at.there);
    as_floats(weight, pairs);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        square = fmaf(values[i], values[i], square);
        values[i] *= weight[i];
    }
    return square;
}

// Adds up what lanes hold for the same token, and keeps it for this warp; a later sweep adds to it.
HQQ_INLINE void put_squares(float* mine, const Lane& lane, const float (&squares)[COLUMN_SETS], bool first) {
#pragma unroll
    for (int columns = 0; columns < COLUMN_SETS; ++columns) {
        float sum = squares[columns];
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
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

HQQ_INLINE uint32_t masked(uint32_t x, uint32_t mask) { return SET_BLOCKS > 1 || PASSES > 1 ? x * mask : x; }

template <int STEP>
HQQ_INLINE void multiply_step(int (&acc)[TILES][COLUMN_SETS][4], const uint32_t (&w)[TILES][BITS],
                              const uint32_t (&b)[COLUMN_SETS][4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        uint32_t a[4];
        C::template unpack<STEP>(w[tile], a);
#pragma unroll
        for (int columns = 0; columns < COLUMN_SETS; ++columns)
            mma_m16n8k32(acc[tile][columns], a[0], a[1], a[2], a[3], b[columns][2 * STEP], b[columns][2 * STEP + 1]);
    }
}

// The sum of row g (0) or g + 8 (1) from its two columns, which are those of the low and the high bytes of x.
HQQ_INLINE float joined(const int (&acc)[4], int upper) {
    return static_cast<float>(256 * acc[2 * upper + 1] + acc[2 * upper]);
}

// The unit of x in the sums of row g and of row g + 8, whose codes are multiplied by a factor.
HQQ_INLINE float unit_of_sums(float unit, int upper) {
    return unit * (upper ? 1.0f / C::upper_factor : 1.0f / C::lower_factor);
}

// The sum over warps and slots of row `row` of a row group for one token.
HQQ_INLINE float row_sum(const float* group_sums, int row, int token) {
    const auto of_slots = [&](const float* sums) {
        const float4 four = *reinterpret_cast<const float4*>(sums + token / 4 * 4);
        const float pairs[4] = {four.x, four.y, four.z, four.w};
        if constexpr (COLUMN_TOKENS == 1) return (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
        if constexpr (COLUMN_TOKENS == 2) return token == 0 ? pairs[0] + pairs[2] : pairs[1] + pairs[3];
        const float first = token % 2 == 0 ? pairs[0] : pairs[1], second = token % 2 == 0 ? pairs[2] : pairs[3];
        return token % 4 < 2 ? first : second;
    };
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        sum += of_slots(group_sums + warp * WARP_SUMS + row * ROW_SUMS);
        if constexpr (AXIS == 0) sum -= of_slots(group_sums + warp * WARP_SUMS + ROWS * ROW_SUMS);
    }
    return sum;
}

// Writes the results of `count` row groups whose sums are complete, every `step`-th from `group0` on.
HQQ_INLINE void write_results(const Arguments& p, const Shared& shared, int group0, int step, int count) {
    constexpr int OUTPUTS = GATED ? ROWS / 2 : ROWS;
    const int tokens = TOKENS == 1 ? 1 : p.M, N = GATED ? p.N / 2 : p.N;
    for (int i = threadIdx.x; i < count * OUTPUTS * tokens; i += WARPS * 32) {
        const int row = i % OUTPUTS, token = i / OUTPUTS % tokens, group = i / (OUTPUTS * tokens);
        const int first_tile = p.first_tile(group0 + group * step), tile = first_tile + row / 16;
        if (tile >= p.tiles) continue;
        const int4 place = p.rows[tile];
        if (row % 16 >= place.z) continue;
        const int64_t feature = place.x + int64_t(place.y) * (row % 16);
        float by_norm = 1.0f;
        if constexpr (NORMED) {
            float square = 0.0f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) square += shared.squares[warp * TOKENS + token];
            by_norm = rsqrtf(square / static_cast<float>(p.K) + p.eps);
        }
        const float* group_sums = shared.sums + group * WARPS * WARP_SUMS;
        const auto output = [&](int its_row, int64_t its_feature) {
            float sum = row_sum(group_sums, its_row, token);
            if constexpr (AXIS == 0) sum = ldexpf(sum, -place.w);
            if constexpr (NORMED) sum *= by_norm;
            return p.bias ? sum + low_float<T>(ldg16(p.bias + its_feature * 2)) : sum;
        };
        float value = output(row, feature);
        if constexpr (GATED) value = value / (1.0f + __expf(-value)) * output(row + 16, feature + N);
        const int64_t at = int64_t(token) * N + feature;
        if (p.residual) value += low_float<T>(ldg16(p.residual + at * 2));
        *reinterpret_cast<unsigned short*>(p.y + at * 2) = static_cast<unsigned short>(pack2<T>(value, 0.0f));
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
gemv(const unsigned char* x_, const unsigned char* codes, const unsigned char* meta, const int4* rows,
     const unsigned char* bias, const unsigned char* norm, const unsigned char* residual, unsigned char* y, int M, int N, int K,
     int tiles, int blocks, int groups, int sweeps, int batch, float eps) {
    const Arguments p = {x_, codes, meta, rows, bias, norm, residual, y, M, N, K, tiles, blocks, groups, sweeps, batch, eps};
    HQQ_DYNAMIC_SHARED(memory);
    const Shared shared(memory, p.batch);
    const Lane lane = this_lane();
    const int warp = threadIdx.x / 32;
    float2* x_sums = shared.x_sums + warp * SETS * ROW_SUMS;
    unsigned char* row_meta = shared.row_meta + warp * BLOCKS * 256;

    const int mine = (p.row_groups() - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    const auto first_block = [&](int sweep) { return (sweep * WARPS + warp) * BLOCKS; };
    const auto first_tile = [&](int group) { return p.first_tile(int(blockIdx.x) + group * int(gridDim.x)); };
    const auto batch_end = [&](int b) { return min(b + p.batch, mine); };

    // Codes and scales of one slice of TILES row tiles; any codes past the last input, where x is zero, and another tile's past
    // the last tile. Addresses are those of the slice in the first row tile, and change with the slice only.
    uint4 slice[TILES][CHUNKS][LOADS] = {};
    uint2 scales[TILES][SETS];
    const int tile_bytes = p.blocks / Chunk<BITS>::blocks * (512 * LOADS);
    const unsigned char* codes_from;
    constexpr bool FEW_SETS = SETS <= 4;  // whose addresses are kept
    const unsigned char* meta_from[SETS];
    int chunks_left = 0, from_block = 0;
    const auto aim = [&](int block0) {
        codes_from = p.codes + int64_t(block0 / Chunk<BITS>::blocks) * (512 * LOADS) + threadIdx.x % 32 * 16;
        chunks_left = (p.blocks - block0) / Chunk<BITS>::blocks;
        from_block = block0;
        if constexpr (AXIS == 1 && FEW_SETS) {
#pragma unroll
            for (int set = 0; set < SETS; ++set) meta_from[set] = meta_of_slot(p, lane, block0, set);
        }
    };
    const unsigned char* tile_from[TILES];
    const auto aim_at_tiles = [&](int tile0) {
        // Opaque, or the compiler adds up each chunk's address from its parts anew.
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            tile_from[tile] = opaque(codes_from + int64_t(p.tile(tile0, tile)) * tile_bytes);
    };
    const auto fetch = [&](int chunk, int chunks) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
                if (chunk < chunks) slice[tile][chunk][i] = ldg128_stream(tile_from[tile] + 512 * (LOADS * chunk + i));
    };
    const auto fetch_meta = [&](int tile0) {
        if constexpr (AXIS == 1) {
#pragma unroll
            for (int set = 0; set < SETS; ++set) {
                const unsigned char* from = FEW_SETS ? meta_from[set] : meta_of_slot(p, lane, from_block, set);
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile)
                    scales[tile][set] = ldg64(from + int64_t(p.tile(tile0, tile)) * (p.groups * 64));
            }
        } else {
            const unsigned char* from = p.meta + int64_t(tile0 / p.groups) * p.blocks * 256;
#pragma unroll
            for (int i = 0; i < BLOCKS * 256; i += 512) {
                const int byte = from_block * 256 + i + threadIdx.x % 32 * 16;
                cp_async16_zfill(smem_u32(row_meta) + i + threadIdx.x % 32 * 16, from + byte, byte < p.blocks * 256 ? 16 : 0);
            }
            cp_async_commit();
        }
    };
    aim(first_block(0));
    aim_at_tiles(first_tile(0));
    // Before the kernels in front have ended: whoever makes a TiledWeight waits until it is written.
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) fetch(chunk, chunks_left);
    fetch_meta(first_tile(0));
    pdl_launch();
    pdl_wait();

    uint32_t x[COLUMN_SETS][HELD][4];  // axis=0: scale x of this row tile
    // axis=0: x itself, and the unit of the slot and token whose sums the lane holds.
    uint4 unscaled[COLUMN_SETS][HELD][2];
    float units[COLUMN_SETS][HELD];
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
        const int block0 = first_block(at.sweep), tile0 = first_tile(at.group);
        const int next_tile0 = first_tile(next.group);
        if (next.sweep != at.sweep) aim(first_block(next.sweep));
        aim_at_tiles(next_tile0);
        const int next_chunks = more ? chunks_left : 0;

        float squares[COLUMN_SETS] = {};
        if (AXIS == 1 && new_slice) {
            __syncwarp();
#pragma unroll
            for (int columns = 0; columns < COLUMN_SETS; ++columns)
#pragma unroll
                for (int held = 0; held < HELD; ++held) {
                    const InputPlace place(p, lane, columns, held, block0);
                    uint4 pairs[2];
                    load_x(pairs, p, place);
                    float values[16];
                    as_floats(values, pairs);
                    if constexpr (NORMED) squares[columns] += apply_norm(values, p, place);
                    uint32_t(&n)[4] = x[columns][held];
                    float unit = to_fixed_point<C>(values, lane.piece, n);
                    unit = __shfl_sync(FULL_WARP, unit, 8 * lane.c);
#pragma unroll
                    for (int pass = 0; pass < PASSES; ++pass) {
                        const uint32_t mask = PASSES > 1 ? column_mask(lane, 0, pass) : 1;
                        constexpr uint32_t ones = 0x01010101u;
                        int sums[4] = {0, 0, 0, 0};
#pragma unroll
                        for (int q = 0; q < 4; q += 2)
                            mma_m16n8k32(sums, ones, ones, ones, ones, n[q] * mask, n[q + 1] * mask);
                        if (lane.g == 0)
                            x_sums[((held * PASSES + pass) * COLUMN_SETS + columns) * 4 + lane.c] =
                                make_float2(unit, unit * joined(sums, 0));
                    }
                }
            __syncwarp();
        }

        float zeros[COLUMN_SETS] = {};  // axis=0: the lane's sum of zero scale x
        if constexpr (AXIS == 0) {
            cp_async_wait<0>();
            __syncwarp();
#pragma unroll
            for (int held = 0; held < HELD; ++held) {
                const int block = held * SLOTS + lane.slot;
                const uint4* from = reinterpret_cast<const uint4*>(row_meta + (block < BLOCKS ? block : 0) * 256) + 2 * lane.c;
                const uint4 scale_pairs[2] = {from[0], from[1]}, zero_pairs[2] = {from[8], from[9]};
                float scale[16], zero[16];
                as_floats(scale, scale_pairs);
                as_floats(zero, zero_pairs);
#pragma unroll
                for (int columns = 0; columns < COLUMN_SETS; ++columns) {
                    const InputPlace place(p, lane, columns, held, block0);
                    if (!KEEPS_X || new_slice) load_x(unscaled[columns][held], p, place);
                    float values[16];
                    as_floats(values, unscaled[columns][held]);
                    if constexpr (NORMED) squares[columns] += apply_norm(values, p, place);
#pragma unroll
                    for (int i = 0; i < 16; ++i) {
                        values[i] *= scale[i];
                        zeros[columns] = fmaf(zero[i], values[i], zeros[columns]);
                    }
                    const float unit = to_fixed_point<C>(values, lane.piece, x[columns][held]);
                    units[columns][held] = __shfl_sync(FULL_WARP, unit, 8 * lane.c);
                }
            }
            __syncwarp();
            if (more) fetch_meta(next_tile0);
        }

        if (NORMED && new_slice) put_squares(shared.squares + warp * TOKENS, lane, squares, at.sweep == 0);

        float out[TILES][COLUMN_SETS][2] = {};
        int acc[TILES][COLUMN_SETS][4] = {};
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const int chunk = block / Chunk<BITS>::blocks, held = block / SET_BLOCKS;
            uint32_t w[TILES][BITS];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                block_words<BITS>(slice[tile][chunk], block % Chunk<BITS>::blocks, w[tile]);
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                uint32_t b[COLUMN_SETS][4];
                const uint32_t mask = column_mask(lane, block, pass);
#pragma unroll
                for (int columns = 0; columns < COLUMN_SETS; ++columns)
#pragma unroll
                    for (int q = 0; q < 4; ++q) b[columns][q] = masked(x[columns][held][q], mask);
                multiply_step<0>(acc, w, b);
                multiply_step<1>(acc, w, b);
                if ((block + 1) % SET_BLOCKS != 0 && block + 1 != BLOCKS) continue;
                const int set = held * PASSES + pass;
#pragma unroll
                for (int columns = 0; columns < COLUMN_SETS; ++columns) {
                    const float2 of_x = AXIS == 0 ? make_float2(units[columns][held], 0.0f)
                                                  : x_sums[(set * COLUMN_SETS + columns) * 4 + lane.c];
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                        for (int upper = 0; upper < 2; ++upper) {
                            const float sum = joined(acc[tile][columns], upper), unit = unit_of_sums(of_x.x, upper);
                            float& to = out[tile][columns][upper];
                            if constexpr (AXIS == 0) {
                                to = fmaf(sum, unit, to);
                            } else {
                                const uint32_t word = upper ? scales[tile][set].y : scales[tile][set].x;
                                to = fmaf(low_float<T>(word), fmaf(-high_float<T>(word), of_x.y, sum * unit), to);
                            }
                            acc[tile][columns][2 * upper] = acc[tile][columns][2 * upper + 1] = 0;
                        }
                }
            }
            if ((block + 1) % Chunk<BITS>::blocks == 0) fetch(chunk, next_chunks);
        }
        if (AXIS == 1 && more) fetch_meta(next_tile0);

        // This warp's sums, to shared memory; a later sweep adds to what the same lane wrote.
        float* sums = shared.sums + ((at.group - at.batch) * WARPS + warp) * WARP_SUMS;
        const auto put = [&](int row, int columns, int pair, float value) {
            float* to = sums + row * ROW_SUMS + 4 * columns + pair;
            *to = at.sweep == 0 ? value : *to + value;
        };
#pragma unroll
        for (int columns = 0; columns < COLUMN_SETS; ++columns) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int upper = 0; upper < 2; ++upper)
                    put(16 * tile + 8 * upper + lane.g, columns, lane.c, out[tile][columns][upper]);
            if constexpr (AXIS == 0) {
                float sum = zeros[columns];
                sum += __shfl_xor_sync(FULL_WARP, sum, 1);
                sum += __shfl_xor_sync(FULL_WARP, sum, 2);
                if (lane.c == 0 && lane.piece == 0) put(ROWS, columns, lane.g / 2, sum);
            }
        }

        if (next.batch != at.batch) {
            __syncthreads();
            const int group0 = int(blockIdx.x) + at.batch * int(gridDim.x);
            write_results(p, shared, group0, int(gridDim.x), batch_end(at.batch) - at.batch);
            __syncthreads();
        }
        new_slice = next.sweep != at.sweep || next.batch != at.batch;
        at = next;
    }
}
