// y[M, N] = x[M, K] W^T + bias for few tokens (M <= 16), W as tiles of codes (see tile_layout.py).
//
// The weights are the tall operand of mma.m16n8k16: 16 output features by 16 inputs, and eight columns. A warp keeps one
// slice of x in registers, as the second operand, and walks over the row tiles of its block; the warps of a block share the
// inputs among them and add up in shared memory, always in the same order. While one row tile is multiplied the codes of
// the next one are on their way into the registers that it frees.
//
// With fewer than eight tokens the columns left over hold the same tokens once more, each for other inputs: column n is
// token n mod TOKENS in slot n / TOKENS, and x is zero in every slot but the one whose inputs are multiplied. So a column
// adds up 64 inputs (or one group, if that is smaller) and scales are applied once for all slots, by the lanes that hold them.
//
// axis=1: y += scale * (a - (offset + zero) * sum(x)) for each slot, with a = sum((offset + q) * x).
// axis=0: a row tile has scale[k] and zero[k] in common, so x takes them: a = sum((offset + q) * scale * x), and
// sum((offset + zero) * scale * x) is subtracted once for all its rows.
//
// Compile-time: ELEMENT (F16, BF16), CODE_BITS, AXIS, GROUP (axis=1: weights in a group; 0: the row), TOKENS (1, 2, 4, 8,
// 16), TILES (row tiles at a time), WARPS (of a block), BLOCKS (of 64 inputs that a warp has at a time), RESIDENT (blocks
// that should fit a multiprocessor).
#include "codes.cuh"

using T = ELEMENT;
static constexpr int BITS = CODE_BITS;

#define FULL_WARP 0xffffffffu

static constexpr int COLUMN_SETS = TOKENS > 8 ? TOKENS / 8 : 1;
static constexpr int SLOTS = TOKENS > 8 ? 1 : 8 / TOKENS;
static constexpr int COLUMN_TOKENS = TOKENS > 8 ? 8 : TOKENS;
// Groups smaller than a block of 64 inputs belong to some of the lane columns (see tile_layout.py): PARTS of a block, a
// slot each. Larger groups are cut into slots of one block. All slots together are a set; where a block has more parts
// than there are slots, it is multiplied in several passes.
static constexpr int PARTS = AXIS == 1 && GROUP > 0 && GROUP < 64 ? 64 / GROUP : 1;
static constexpr int PASSES = PARTS > SLOTS ? PARTS / SLOTS : 1;
static constexpr int SET_BLOCKS = PARTS > SLOTS ? 1 : SLOTS / PARTS;
static constexpr int SETS = PASSES * ((BLOCKS + SET_BLOCKS - 1) / SET_BLOCKS);
static constexpr int HELD = SETS / PASSES;  // blocks that a lane holds x of
static constexpr int CHUNKS = BLOCKS / Chunk<BITS>::blocks;
static constexpr int LOADS = Chunk<BITS>::loads;
static constexpr int ROWS = 16 * TILES;
using C = Codes<T, BITS>;

struct Meta {  // axis=1: scale and zero of rows g and g + 8, for the lane's two columns (which may share a group)
    uint2 first, second;
};

struct Arguments {
    const unsigned char* x;
    const unsigned char* codes;
    const unsigned char* meta;
    const int4* rows;
    const unsigned char* bias;
    unsigned char* y;
    int M, N, K;
    int tiles;      // row tiles
    int blocks;     // blocks of 64 inputs, padding included
    int groups;     // axis=1: groups of a row, padding included; axis=0: row tiles that share a scale
    int sweeps;     // times that the warps of a block, one slice each, go over the inputs
    int batch;      // row groups (TILES tiles) whose sums shared memory holds
};

struct Position {
    int batch, sweep, group;  // group: row group of this block
};

// The codes of one slice of TILES row tiles; past the end they are zero.
struct Slice {
    uint4 loads[TILES][CHUNKS][LOADS];
};

HQQ_INLINE void load_chunk(uint4 (&loads)[LOADS], const Arguments& p, int tile, int block) {
    const bool there = tile < p.tiles && block < p.blocks;
    const int64_t chunk = int64_t(tile) * (p.blocks / Chunk<BITS>::blocks) + block / Chunk<BITS>::blocks;
    const unsigned char* at = p.codes + chunk * (512 * LOADS) + (threadIdx.x % 32) * 16;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) loads[i] = there ? ldg128_stream(at + 512 * i) : make_uint4(0, 0, 0, 0);
}

// axis=1: group of the slot of column `column` in set `set` of the slice that begins at `block`.
HQQ_INLINE int group_of(const Arguments& p, int block, int set, int column) {
    const int part = set * SLOTS + column / COLUMN_TOKENS;
    if constexpr (GROUP == 0) return 0;
    const int group = PARTS > 1 ? block * PARTS + part : (block + part) / (GROUP >= 64 ? GROUP / 64 : 1);
    return min(group, p.groups - 1);
}

HQQ_INLINE Meta load_meta(const Arguments& p, int tile, int block, int set) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const int row_tile = min(tile, p.tiles - 1);
    const unsigned char* base = p.meta + int64_t(row_tile) * p.groups * 64 + g * 8;
    Meta meta;
    meta.first = ldg64(base + group_of(p, block, set, 2 * c) * 64);
    meta.second = COLUMN_TOKENS == 1 ? ldg64(base + group_of(p, block, set, 2 * c + 1) * 64) : meta.first;
    return meta;
}

// x of this lane's column for the blocks that it holds; zero beyond M and K and in the parts of other slots.
HQQ_INLINE void load_x(uint32_t (&x)[COLUMN_SETS][HELD][4][2], const Arguments& p, int block0) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, slot = g / COLUMN_TOKENS;
    const bool my_part = PASSES > 1 || c * PARTS / 4 == slot % PARTS;
#pragma unroll
    for (int columns = 0; columns < COLUMN_SETS; ++columns) {
        const int token = COLUMN_TOKENS * columns + g % COLUMN_TOKENS;
        const unsigned char* row = p.x + int64_t(token) * p.K * 2;
#pragma unroll
        for (int held = 0; held < HELD; ++held) {
            const int block = held * SET_BLOCKS + (PASSES > 1 ? 0 : slot / PARTS);
            const int k = 64 * (block0 + block) + 16 * c;
            const bool there = my_part && token < p.M && k < p.K && block < BLOCKS;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 v = there ? ldg128(row + k * 2 + 16 * half) : make_uint4(0, 0, 0, 0);
                x[columns][held][2 * half][0] = v.x, x[columns][held][2 * half][1] = v.y;
                x[columns][held][2 * half + 1][0] = v.z, x[columns][held][2 * half + 1][1] = v.w;
            }
        }
    }
}

// One for lanes whose column is in the slot of block `block` (and part, in pass `pass`), else zero, in both halves. Columns
// are masked by a product: the units of logical instructions are busy with the codes.
HQQ_INLINE uint32_t column_mask(int block, int pass) {
    const int lane = threadIdx.x % 32, slot = lane / 4 / COLUMN_TOKENS, part = lane % 4 * PARTS / 4;
    const bool mine = PASSES > 1 ? part == pass * SLOTS + slot : slot / PARTS == block % SET_BLOCKS;
    return mine ? Magic<T>::one : 0u;
}

HQQ_INLINE uint32_t operand(uint32_t x, uint32_t mask) {
    return SET_BLOCKS > 1 || PASSES > 1 ? hmul2<T>(x, mask) : x;
}

template <int STEP>
HQQ_INLINE void multiply_step(float (&acc)[TILES][COLUMN_SETS][4], const uint32_t (&w)[TILES][BITS],
                              const uint32_t (&b)[COLUMN_SETS][4][2]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        uint32_t a[C::parts][4];
        C::template unpack<STEP>(w[tile], a);
#pragma unroll
        for (int columns = 0; columns < COLUMN_SETS; ++columns) {
            const uint32_t b0 = b[columns][STEP][0], b1 = b[columns][STEP][1];
            mma_m16n8k16<T>(acc[tile][columns], a[0][0], a[0][1], a[0][2], a[0][3], b0, b1);
            if constexpr (C::parts == 2) {
                constexpr uint32_t sixteen = 0x41804180u;  // bf16: no step rounds
                mma_m16n8k16<T>(acc[tile][columns], a[C::parts - 1][0], a[C::parts - 1][1], a[C::parts - 1][2],
                                a[C::parts - 1][3], hmul2<T>(b0, sixteen), hmul2<T>(b1, sixteen));
            }
        }
    }
}

// axis=1: out += scale * (acc - (offset + zero) * sum(x)) for the slots of `set`, and acc = 0.
HQQ_INLINE void scale_sums(float (&out)[TILES][COLUMN_SETS][4], float (&acc)[TILES][COLUMN_SETS][4],
                           const Meta (&scales)[TILES][SETS], const float* x_sums, int set) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int columns = 0; columns < COLUMN_SETS; ++columns) {
        const float* sums = x_sums + (set * COLUMN_SETS + columns) * 8 + 2 * c;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint2 pair = i % 2 ? scales[tile][set].second : scales[tile][set].first;
                const uint32_t word = i < 2 ? pair.x : pair.y;
                const float factor = i < 2 ? 1.0f : C::upper_factor;
                const float zero = fmaf(high_float<T>(word), factor, C::offset);
                const float difference = fmaf(-zero, sums[i % 2], acc[tile][columns][i]);
                out[tile][columns][i] = fmaf(low_float<T>(word) * (1.0f / factor), difference, out[tile][columns][i]);
                acc[tile][columns][i] = 0.0f;
            }
    }
}

// The sums of `rows` in one lane's columns, over the slots: what lanes with the same row and token hold.
HQQ_INLINE float over_slots(float value) {
    if constexpr (COLUMN_TOKENS <= 2) value += __shfl_xor_sync(FULL_WARP, value, 1);
    if constexpr (COLUMN_TOKENS <= 4) value += __shfl_xor_sync(FULL_WARP, value, 2);
    return value;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
gemv(const unsigned char* x_, const unsigned char* codes, const unsigned char* meta, const int4* rows,
     const unsigned char* bias, unsigned char* y, int M, int N, int K, int tiles, int blocks, int groups, int sweeps,
     int batch) {
    const Arguments p = {x_, codes, meta, rows, bias, y, M, N, K, tiles, blocks, groups, sweeps, batch};
    HQQ_DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    const int slot = g / COLUMN_TOKENS;
    // Sums: [row groups of a batch][warps][ROWS + EXTRA][TOKENS]; then, axis=1, sums of x: [warps][SETS][COLUMN_SETS][8].
    constexpr int EXTRA = AXIS == 0 ? 2 : 0;
    constexpr int PARTIAL = (ROWS + EXTRA) * TOKENS;
    float* partial = reinterpret_cast<float*>(shared);
    float* x_sums = partial + p.batch * WARPS * PARTIAL + warp * SETS * COLUMN_SETS * 8;

    const int row_groups = (p.tiles + TILES - 1) / TILES;
    const int mine = (row_groups - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    const auto first_block = [&](int sweep) { return (sweep * WARPS + warp) * BLOCKS; };
    const auto first_tile = [&](int group) { return (int(blockIdx.x) + group * int(gridDim.x)) * TILES; };
    const auto batch_end = [&](int b) { return min(b + p.batch, mine); };

    Slice slice;
    Meta scales[TILES][SETS];
    const auto fetch = [&](int chunk, int tile0, int block0) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            load_chunk(slice.loads[tile][chunk], p, tile0 + tile, block0 + chunk * Chunk<BITS>::blocks);
    };
    const auto fetch_meta = [&](int tile0, int block0) {
        if constexpr (AXIS == 1) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int set = 0; set < SETS; ++set) scales[tile][set] = load_meta(p, tile0 + tile, block0, set);
        }
    };
    // Before the kernels in front have ended: whoever makes a TiledWeight waits until it is written.
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) fetch(chunk, first_tile(0), first_block(0));
    fetch_meta(first_tile(0), first_block(0));
    pdl_launch();
    pdl_wait();

    uint32_t x[COLUMN_SETS][HELD][4][2];
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
        const int next_block0 = first_block(next.sweep), next_tile0 = first_tile(next.group);

        if (new_slice) {
            load_x(x, p, block0);
            if constexpr (AXIS == 1) {
                __syncwarp();
#pragma unroll
                for (int set = 0; set < SETS; ++set)
#pragma unroll
                    for (int columns = 0; columns < COLUMN_SETS; ++columns) {
                        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                        for (int s = 0; s < 4; ++s) {
                            const uint32_t(&v)[2] = x[columns][set / PASSES][s];
                            mma_m16n8k16<T>(sums, Magic<T>::one, Magic<T>::one, Magic<T>::one, Magic<T>::one,
                                            PASSES > 1 ? operand(v[0], column_mask(0, set % PASSES)) : v[0],
                                            PASSES > 1 ? operand(v[1], column_mask(0, set % PASSES)) : v[1]);
                        }
                        if (g == 0) {
                            x_sums[(set * COLUMN_SETS + columns) * 8 + 2 * c] = sums[0];
                            x_sums[(set * COLUMN_SETS + columns) * 8 + 2 * c + 1] = sums[1];
                        }
                    }
                __syncwarp();
            }
        }

        float out[TILES][COLUMN_SETS][4] = {};
        float offsets[COLUMN_SETS][2] = {};  // axis=0: sums of scale x and of zero scale x
        uint32_t xs[COLUMN_SETS][HELD][4][2];
        if constexpr (AXIS == 0) {
            const int meta_row = min(tile0, p.tiles - 1) / p.groups;
            const unsigned char* base = p.meta + (int64_t(meta_row) * p.blocks) * 256;
#pragma unroll
            for (int set = 0; set < HELD; ++set) {
                const int block = block0 + set * SLOTS + slot;
                const bool there = block < p.blocks && set * SLOTS + slot < BLOCKS;
                const unsigned char* from = base + int64_t(block) * 256 + c * 32;
                uint4 s4[2], z4[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    s4[i] = there ? ldg128(from + 16 * i) : make_uint4(0, 0, 0, 0);
                    z4[i] = there ? ldg128(from + 128 + 16 * i) : make_uint4(0, 0, 0, 0);
                }
                const uint32_t scale[8] = {s4[0].x, s4[0].y, s4[0].z, s4[0].w, s4[1].x, s4[1].y, s4[1].z, s4[1].w};
                const uint32_t zero[8] = {z4[0].x, z4[0].y, z4[0].z, z4[0].w, z4[1].x, z4[1].y, z4[1].z, z4[1].w};
#pragma unroll
                for (int columns = 0; columns < COLUMN_SETS; ++columns)
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const uint32_t v = hmul2<T>(x[columns][set][i / 2][i % 2], scale[i]);
                        xs[columns][set][i / 2][i % 2] = v;
                        const float low = low_float<T>(v), high = high_float<T>(v);
                        offsets[columns][0] += low + high;
                        offsets[columns][1] = fmaf(low_float<T>(zero[i]), low, offsets[columns][1]);
                        offsets[columns][1] = fmaf(high_float<T>(zero[i]), high, offsets[columns][1]);
                    }
            }
        }

        float acc[TILES][COLUMN_SETS][4] = {};
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const int chunk = block / Chunk<BITS>::blocks;
            uint32_t w[TILES][BITS];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                block_words<BITS>(slice.loads[tile][chunk], block % Chunk<BITS>::blocks, w[tile]);
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                uint32_t b[COLUMN_SETS][4][2];
                const uint32_t mask = column_mask(block, pass);
#pragma unroll
                for (int columns = 0; columns < COLUMN_SETS; ++columns)
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const int held = block / SET_BLOCKS;
                        const uint32_t v = AXIS == 0 ? xs[columns][held][i / 2][i % 2] : x[columns][held][i / 2][i % 2];
                        b[columns][i / 2][i % 2] = operand(v, mask);
                    }
                multiply_step<0>(acc, w, b);
                multiply_step<1>(acc, w, b);
                multiply_step<2>(acc, w, b);
                multiply_step<3>(acc, w, b);
                if constexpr (AXIS == 1) {
                    if ((block + 1) % SET_BLOCKS == 0 || block + 1 == BLOCKS)
                        scale_sums(out, acc, scales, x_sums, block / SET_BLOCKS * PASSES + pass);
                }
            }
            if ((block + 1) % Chunk<BITS>::blocks == 0 && more) fetch(chunk, next_tile0, next_block0);
        }
        if (more) fetch_meta(next_tile0, next_block0);

        // This warp's sums, to shared memory; a later sweep adds to what the same lane wrote.
        float* sums = partial + ((at.group - at.batch) * WARPS + warp) * PARTIAL;
        const auto put = [&](int row, int token, float value) {
            float* to = sums + row * TOKENS + token;
            *to = at.sweep == 0 ? value : *to + value;
        };
#pragma unroll
        for (int columns = 0; columns < COLUMN_SETS; ++columns) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int upper = 0; upper < 2; ++upper) {
                    float v[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        v[i] = AXIS == 0 ? acc[tile][columns][2 * upper + i] * (upper ? 1.0f / C::upper_factor : 1.0f)
                                         : out[tile][columns][2 * upper + i];
                    }
                    const int row = 16 * tile + 8 * upper + g;
                    if constexpr (COLUMN_TOKENS == 1) {
                        const float sum = over_slots(v[0] + v[1]);
                        if (c == 0) put(row, 0, sum);
                    } else {
                        const float first = over_slots(v[0]), second = over_slots(v[1]);
                        const int token = 8 * columns + 2 * c;
                        if (2 * c < COLUMN_TOKENS) put(row, token, first), put(row, token + 1, second);
                    }
                }
            if constexpr (AXIS == 0) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float v = offsets[columns][i];
                    v += __shfl_xor_sync(FULL_WARP, v, 1);
                    v += __shfl_xor_sync(FULL_WARP, v, 2);
                    for (int distance = COLUMN_TOKENS * 4; distance < 32; distance *= 2)
                        v += __shfl_xor_sync(FULL_WARP, v, distance);
                    if (c == 0 && g < COLUMN_TOKENS) put(ROWS + i, 8 * columns + g, v);
                }
            }
        }

        if (next.batch != at.batch) {
            __syncthreads();
            const int count = batch_end(at.batch) - at.batch;
            for (int i = threadIdx.x; i < count * ROWS * p.M; i += WARPS * 32) {
                const int row = i % ROWS, token = i / ROWS % p.M, group = i / (ROWS * p.M);
                const int tile = first_tile(at.batch + group) + row / 16;
                if (tile >= p.tiles) continue;
                const int4 place = p.rows[tile];
                if (row % 16 >= place.z) continue;
                const float* from = partial + group * WARPS * PARTIAL + token;
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    float value = from[(w * (ROWS + EXTRA) + row) * TOKENS];
                    if constexpr (AXIS == 0) {
                        const float factor = row % 16 < 8 ? 1.0f : C::upper_factor;
                        value = fmaf(-C::offset / factor, from[(w * (ROWS + EXTRA) + ROWS) * TOKENS], value);
                        value -= from[(w * (ROWS + EXTRA) + ROWS + 1) * TOKENS];
                    }
                    sum += value;
                }
                if constexpr (AXIS == 0) sum = ldexpf(sum, -place.w);
                const int64_t feature = place.x + int64_t(place.y) * (row % 16);
                if (p.bias) sum += low_float<T>(ldg16(p.bias + feature * 2));
                *reinterpret_cast<unsigned short*>(p.y + (int64_t(token) * p.N + feature) * 2) =
                    static_cast<unsigned short>(pack2<T>(sum, 0.0f));
            }
            __syncthreads();
        }
        new_slice = next.sweep != at.sweep || next.batch != at.batch;
        at = next;
    }
}
