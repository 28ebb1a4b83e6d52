// How cuda/gemm.cu divides its work: sizes that the host chooses, shared memory, and what a thread block does.
//
// Set by the host, with HQQ_ in front: T (F16, BF16), BITS, AXIS, GROUP (0: the whole row), TOKENS, BLOCKS, SPAN (a
// multiple of the blocks of a chunk), DEPTH, JOINT (divides SPAN), STAGES, STEPS (instructions in a group: 1, 2 or 4),
// SPLIT, RESIDENT (thread blocks on a multiprocessor).
#ifndef HQQ_GEMM_SHAPE_CUH
#define HQQ_GEMM_SHAPE_CUH

#include "fragments.cuh"
#include "ptx_cluster.cuh"

using T = HQQ_T;
constexpr int BITS = HQQ_BITS, AXIS = HQQ_AXIS, GROUP = HQQ_GROUP;
constexpr int TOKENS = HQQ_TOKENS, BLOCKS = HQQ_BLOCKS, STAGES = HQQ_STAGES, DEPTH = HQQ_DEPTH, SPAN = HQQ_SPAN;
constexpr int RESIDENT = HQQ_RESIDENT, JOINT = HQQ_JOINT, STEPS = HQQ_STEPS;
// Thread blocks, a cluster, that share the inputs of an output tile; 0: all thread blocks share everything equally.
constexpr int SPLIT = HQQ_SPLIT;
constexpr int PARTNERS = SPLIT > 0 ? SPLIT : 1;

constexpr int WARPS = 8, MULTIPLIERS = 32 * WARPS, THREADS = MULTIPLIERS + 128;
// Of the four other warps, the first copies x, the next codes and scales.
constexpr int CODE_WARPS = 2;
// Registers of a thread that copies and of one that multiplies; together what the block is given at its start.
constexpr int FEW = 32, MANY = RESIDENT == 1 ? 232 : 104;

constexpr int BLOCK_INPUTS = 64, TILE_ROWS = 16, STEPS_OF_BLOCK = 4;
constexpr int BLOCK_BYTES = TOKENS * BLOCK_INPUTS * 2, STAGE_BYTES = JOINT * BLOCK_BYTES;
constexpr int BLOCK_TILES = WARPS * BLOCKS;
constexpr int SUMS = TOKENS / 2;  // of a thread, for each of its BLOCKS tiles

using C = Chunk<BITS>;
using S = Scales<T, AXIS, GROUP>;
constexpr int CODE_BYTES = SPAN / C::blocks * C::bytes, META_BYTES = SPAN * S::BLOCK_BYTES;
constexpr int TILE_BYTES = CODE_BYTES + META_BYTES, SPAN_BYTES = BLOCK_TILES * TILE_BYTES;
static_assert(SPAN % C::blocks == 0 && SPAN * BLOCKS % 2 == 0, "a span is whole chunks, and two registers take turns");
static_assert(SPAN % JOINT == 0, "stages of x divide spans");

// Results are stored a part at a time: so many tokens of a tile of 16 features, and a thread's sums of them.
constexpr int PART_TOKENS = AXIS == 1 || TOKENS < 32 ? 16 : 32, PART_SUMS = PART_TOKENS / 2, PARTS = SUMS / PART_SUMS;
static_assert(TOKENS % PART_TOKENS == 0, "whole parts");
// What the other blocks of a cluster send of the parts that this one adds up.
constexpr int OWN_PARTS = (BLOCKS * PARTS + PARTNERS - 1) / PARTNERS;
constexpr int PART_BYTES = PART_SUMS * MULTIPLIERS * 4;
constexpr int RECEIVED_BYTES = (PARTNERS - 1) * OWN_PARTS * PART_BYTES;

constexpr int EXCHANGE_BYTES = AXIS == 0 ? PART_TOKENS * TILE_ROWS * WARPS * 2 : WARPS * 512;
// What is received takes the place of the rings.
constexpr int CODES_AT = STAGES * STAGE_BYTES, RINGS_BYTES = CODES_AT + DEPTH * SPAN_BYTES;
constexpr int EXCHANGE_AT = RINGS_BYTES > RECEIVED_BYTES ? RINGS_BYTES : RECEIVED_BYTES;
constexpr int BARRIERS_AT = EXCHANGE_AT + EXCHANGE_BYTES;
constexpr int RECEIVED_BARRIER_AT = BARRIERS_AT + 16 * (STAGES + DEPTH);

struct Weight {
    const unsigned char *codes, *meta;
    int tiles, blocks, groups;  // row tiles; blocks of 64 inputs; groups of a row (axis 1)
};

// What one worker does of the sequence of (output tile, span).
struct Share {
    int first, last;

    HQQ_INLINE Share(int worker, int workers, int units) {
        // The host sees to it that units * workers fits.
        first = static_cast<int>(static_cast<uint32_t>(units) * static_cast<uint32_t>(worker) / workers);
        last = static_cast<int>(static_cast<uint32_t>(units) * static_cast<uint32_t>(worker + 1) / workers);
    }

    HQQ_INLINE Share after(int units) const {
        Share moved = *this;
        moved.first += units, moved.last += units;
        return moved;
    }
};

struct Work {
    Share share;
    int units, workers, worker, token_blocks, spans;  // spans: of one output tile

    // Place of the first row tile of output tile `tile`.
    HQQ_INLINE int order(int tile) const { return tile / token_blocks * BLOCK_TILES; }
    HQQ_INLINE int token(int tile) const { return tile % token_blocks * TOKENS; }
};

// A ring of shared memory with two barriers for each slot.
template <int SLOTS>
struct Ring {
    uint32_t full, empty;  // barriers of slot 0
    int slot, parity;

    HQQ_INLINE Ring(uint32_t barriers) : full(barriers), empty(barriers + 8 * SLOTS), slot(0), parity(0) {}

    HQQ_INLINE void next() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    HQQ_INLINE void wait_full() const { mbarrier_wait(full + 8 * slot, parity); }
    HQQ_INLINE void wait_empty() const { mbarrier_wait(empty + 8 * slot, parity ^ 1); }
};

// The row tile that comes `order`-th. Along axis 0, neighbours have neighbouring output features: row i of tiles r and
// r + 1. Past the end: the last one, whose result nobody stores.
HQQ_INLINE int row_tile(int order, int tiles) {
    order = order < tiles ? order : tiles - 1;
    if constexpr (AXIS == 0) {
        const int R = tiles / MEMBERS<GROUP>;
        return order % R * MEMBERS<GROUP> + order / R;
    }
    return order;
}

#endif
