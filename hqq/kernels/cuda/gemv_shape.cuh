// What the parts of gemv.cu have in common: how its work is cut, its arguments, and who holds what.
#ifndef HQQ_GEMV_SHAPE_CUH
#define HQQ_GEMV_SHAPE_CUH

#include "byte_codes.cuh"

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
static constexpr int WARP_SUMS = ROWS * ROW_SUMS;
// axis=1: scales are replaced as they are used, not all at the end. With so many tokens each block has scales of its own, and
// the first ones are needed at once.
static constexpr bool SCALES_AT_ONCE = AXIS == 1 && TOKENS >= 8 && PARTS == 1;

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
    float* sums;              // [batch][WARPS][ROWS][ROW_SUMS]
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

// The lane's place: as a holder of codes, sums and scales in row g and column pair c, of x in column g.
struct Lane {
    int g, c, piece, token, slot;
};

HQQ_INLINE Lane this_lane() {
    const int lane = threadIdx.x % 32, g = lane / 4, pair = g / 2;
    return {g, lane % 4, g % 2, pair % COLUMN_TOKENS, pair / COLUMN_TOKENS};
}

// The sum of row g (0) or g + 8 (1) from its two columns, which are those of the low and the high bytes of x.
HQQ_INLINE float both_bytes(const int (&acc)[4], int upper) {
    return static_cast<float>(256 * acc[2 * upper + 1] + acc[2 * upper]);
}

#endif
