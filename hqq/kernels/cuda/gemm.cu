// y[M, N] = x[M, K] W^T + bias for a weight in tile order (tile_layout.py), M from a few tokens to some hundreds.
//
// Weights are the tall operand, dequantised in registers; tokens are the columns and come through shared memory. A block
// has 8 warps that multiply, in two warpgroups, each warp with BLOCKS tiles of 16 output features and TOKENS tokens, and
// two that copy, in a warpgroup that gives its registers away: one copies codes and scales of SPAN blocks of 64 inputs at
// a time into a ring of DEPTH such spans, the other x, JOINT blocks at a time, into a ring of STAGES, which CLUSTER thread
// blocks share.
//
// All (output tile, span of inputs) pairs are one sequence, cut into as many equal pieces as there are workers (a
// worker: a cluster). Whoever has a tile's first span writes its output; those that continue it leave sums in
// `partial` before they do anything else, and raise a flag. Sums are added in the order of inputs: results repeat.
//
// Set by the host, with HQQ_ in front: T (F16, BF16), BITS, AXIS, GROUP (0: the whole row), TOKENS, BLOCKS, SPAN (a
// multiple of the blocks of a chunk), DEPTH, JOINT (divides SPAN), STAGES, STEPS (instructions in a group: 1, 2 or 4),
// CLUSTER, RESIDENT (thread blocks on a multiprocessor).
#include "fragments.cuh"
#include "ptx_cluster.cuh"

namespace {

using T = HQQ_T;
constexpr int BITS = HQQ_BITS, AXIS = HQQ_AXIS, GROUP = HQQ_GROUP;
constexpr int TOKENS = HQQ_TOKENS, BLOCKS = HQQ_BLOCKS, STAGES = HQQ_STAGES, DEPTH = HQQ_DEPTH, SPAN = HQQ_SPAN;
constexpr int CLUSTER = HQQ_CLUSTER, RESIDENT = HQQ_RESIDENT, JOINT = HQQ_JOINT, STEPS = HQQ_STEPS;
constexpr int WARPS = 8, MULTIPLIERS = 32 * WARPS, THREADS = MULTIPLIERS + 128;
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
static_assert(SPAN % JOINT == 0 && (CLUSTER == 1 || JOINT == 1), "stages of x divide spans");
constexpr int EXCHANGE_TOKENS = TOKENS < 32 ? TOKENS : 32;
constexpr int EXCHANGE_BYTES = AXIS == 0 ? EXCHANGE_TOKENS * TILE_ROWS * WARPS * 2 : WARPS * 512;
constexpr int CODES_AT = STAGES * STAGE_BYTES, EXCHANGE_AT = CODES_AT + DEPTH * SPAN_BYTES;
constexpr int BARRIERS_AT = EXCHANGE_AT + EXCHANGE_BYTES;

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
};

struct Work {
    Share share;
    int units, workers, worker, rank, token_blocks, spans;  // spans: of one output tile

    // Place of the first row tile of output tile `tile`.
    HQQ_INLINE int order(int tile) const { return (tile / token_blocks * CLUSTER + rank) * BLOCK_TILES; }
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

// ---- results ------------------------------------------------------------------------------------------------------
struct Output {
    const int* rows;
    const uint16_t* bias;
    uint16_t* y;
    int M, N, tiles;
};

// Output features of one row tile; a lane has rows g and g + 8.
struct Rows {
    int base, stride, count;
    float factor, bias[2];

    HQQ_INLINE Rows(const Output& out, int order, int lane) {
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
HQQ_INLINE void store_singly(const float (&sum)[SUMS], const Rows& rows, const Output& out, int token, int lane) {
#pragma unroll
    for (int n = 0; n < SUMS; n += 4) {
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
HQQ_INLINE void store_columns(const float (&sum)[SUMS], const Rows& rows, const Output& out, int token, int lane,
                              unsigned char* mine) {
    const uint32_t address = smem_u32(mine);
    // Matrix i of the four: features 8 (i % 2), tokens 8 (i / 2); a token's two halves change places every 4 tokens.
    const int to_token = lane % 8 + lane / 16 * 8, to_half = lane / 8 % 2;
    const uint32_t to = address + 32 * to_token + 16 * (to_half ^ (to_token / 4 % 2));
    const int from_token = lane / 2, from_half = lane % 2;
    const unsigned char* from = mine + 32 * from_token + 16 * (from_half ^ (from_token / 4 % 2));
#pragma unroll
    for (int n = 0; n < SUMS; n += 8) {
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
HQQ_INLINE void store_exchanged(const float (&sum)[SUMS], const Rows& rows, int base, const Output& out, int token,
                                int warp, int lane, unsigned char* exchange) {
    uint32_t* words = reinterpret_cast<uint32_t*>(exchange);  // [pairs of tokens][16 rows][8 warps, permuted]
    const int thread = 32 * warp + lane, g = lane / 4, c = lane % 4;
    const int mix = 2 * c + g / 4 % 2;  // so that no two lanes meet in a bank
    const int i = thread % 16, pair = thread / 16, from_mix = 2 * (pair % 4) + i / 4 % 2;
#pragma unroll
    for (int n = 0; n < SUMS; n += EXCHANGE_TOKENS / 2) {
        bar_sync(1, MULTIPLIERS);
#pragma unroll
        for (int k = 0; k < EXCHANGE_TOKENS / 8; ++k) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* two = &sum[n + 4 * k + 2 * half];
                words[((4 * k + c) * 16 + g + 8 * half) * 8 + (warp ^ mix)] =
                    pack2<T>(rows.finish(two[0], half), rows.finish(two[1], half));
            }
        }
        bar_sync(1, MULTIPLIERS);
        if (pair < EXCHANGE_TOKENS / 2) {
            uint32_t v[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = words[(pair * 16 + i) * 8 + (j ^ from_mix)];
            const int m = token + 2 * n + 2 * pair;
            uint16_t* to = out.y + static_cast<int64_t>(m) * out.N + base + rows.stride * i;
            if (m < out.M)
                *reinterpret_cast<uint4*>(to) = make_uint4(prmt(v[0], v[1], 0x5410), prmt(v[2], v[3], 0x5410),
                                                           prmt(v[4], v[5], 0x5410), prmt(v[6], v[7], 0x5410));
            if (m + 1 < out.M)
                *reinterpret_cast<uint4*>(to + out.N) = make_uint4(prmt(v[0], v[1], 0x7632), prmt(v[2], v[3], 0x7632),
                                                                   prmt(v[4], v[5], 0x7632), prmt(v[6], v[7], 0x7632));
        }
    }
}

// Whether the tiles `order` to `order + 7` can go through store_exchanged; the same answer in all warps.
HQQ_INLINE bool neighbours(const Output& out, int order) {
    if (order + WARPS > out.tiles || out.N % 8 != 0) return false;
    const int* first = out.rows + 4 * row_tile(order, out.tiles);
    bool fine = first[0] % 8 == 0 && first[1] % 8 == 0 && first[2] == TILE_ROWS;
    for (int w = 1; w < WARPS; ++w) {
        const int* row = out.rows + 4 * row_tile(order + w, out.tiles);
        fine = fine && row[0] == first[0] + w && row[1] == first[1] && row[2] == TILE_ROWS;
    }
    return fine;
}

HQQ_INLINE void store(const float (&sum)[BLOCKS][SUMS], const Output& out, int order, int token, int warp, int lane,
                      unsigned char* exchange) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        const int group = order + WARPS * b;
        const Rows rows(out, group + warp, lane);
        if constexpr (AXIS == 0) {
            if (neighbours(out, group)) {
                const int base = out.rows[4 * row_tile(group, out.tiles)];
                store_exchanged(sum[b], rows, base, out, token, warp, lane, exchange);
                continue;
            }
        }
        if (rows.stride == 1 && rows.count == TILE_ROWS && rows.base % 8 == 0 && out.N % 8 == 0)
            store_columns(sum[b], rows, out, token, lane, exchange + 512 * warp);
        else
            store_singly(sum[b], rows, out, token, lane);
    }
}

// ---- sums of a tile that several workers share --------------------------------------------------------------------
HQQ_INLINE float* partial_of(float* partial, int block, int thread) {
    return partial + static_cast<int64_t>(block) * (BLOCKS * SUMS * MULTIPLIERS) + 4 * thread;
}

HQQ_INLINE void leave(const float (&sum)[BLOCKS][SUMS], float* partial, int* flags, int block, int thread) {
    float* to = partial_of(partial, block, thread);
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int n = 0; n < SUMS; n += 4)
            *reinterpret_cast<float4*>(to + (b * SUMS + n) * MULTIPLIERS) =
                make_float4(sum[b][n], sum[b][n + 1], sum[b][n + 2], sum[b][n + 3]);
    // The release reaches what other threads wrote before the barrier; a fence in each of them takes microseconds.
    bar_sync(1, MULTIPLIERS);
    if (thread == 0) store_release(flags + block, 1);
}

constexpr int QUADS = BLOCKS * SUMS / 4;  // of four sums, of a thread

HQQ_INLINE void fetch(float4 (&quad)[QUADS], float* partial, int block, int thread) {
    const float* from = partial_of(partial, block, thread);
#pragma unroll
    for (int i = 0; i < QUADS; ++i) quad[i] = load_shared_result(from + 4 * i * MULTIPLIERS);
}

HQQ_INLINE void add(float (&sum)[BLOCKS][SUMS], const float4 (&quad)[QUADS]) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
        float* four = &sum[4 * i / SUMS][4 * i % SUMS];
        four[0] += quad[i].x, four[1] += quad[i].y, four[2] += quad[i].z, four[3] += quad[i].w;
    }
}

// Adds what the `others` blocks before `block` left, in the order of inputs.
HQQ_INLINE void collect(float (&sum)[BLOCKS][SUMS], float* partial, const int* flags, int block, int others, int thread) {
    for (int i = thread % 32; i < others; i += 32) {
        while (load_acquire(flags + block - (i + 1) * CLUSTER) == 0) {
        }
    }
    __syncwarp();
    if constexpr (QUADS <= (RESIDENT == 1 ? 8 : 4)) {
        // Few enough for the next ones to be on their way meanwhile.
        float4 quad[2][QUADS];
        fetch(quad[0], partial, block - CLUSTER, thread);
#pragma unroll 1
        for (int i = 0; i < others; i += 2) {
            if (i + 1 < others) fetch(quad[1], partial, block - (i + 2) * CLUSTER, thread);
            add(sum, quad[0]);
            if (i + 2 < others) fetch(quad[0], partial, block - (i + 3) * CLUSTER, thread);
            if (i + 1 < others) add(sum, quad[1]);
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < others; ++i) {
            float4 quad[QUADS];
            fetch(quad, partial, block - (i + 1) * CLUSTER, thread);
            add(sum, quad);
        }
    }
}

// ---- products -----------------------------------------------------------------------------------------------------
// Each STEPS instructions of 16 inputs are followed by the dequantisation that the same instructions of the next tile or
// block need, so that tensor cores work meanwhile; each two in a row have registers of their own for a. At most RUNNING
// groups are under way: fewer than would reach back to the registers that are written.
constexpr int RUNNING = 4 / STEPS - (STEPS < 4);

struct Multiplier {
    Ring<STAGES> x;
    Ring<DEPTH> codes;
    uint32_t x_low;  // of the descriptor of the first slot
    const unsigned char* codes_at;
    int lane, unreleased;
    uint32_t a[2][STEPS_OF_BLOCK][4], word[BITS];
    S scales;

    HQQ_INLINE Multiplier(unsigned char* shared, int warp, int l)
        : x(smem_u32(shared) + BARRIERS_AT),
          codes(smem_u32(shared) + BARRIERS_AT + 16 * STAGES),
          x_low(static_cast<uint32_t>(wgmma_descriptor(smem_u32(shared)))),
          codes_at(shared + CODES_AT + warp * TILE_BYTES),
          lane(l),
          unreleased(-1) {}

    HQQ_INLINE void release_x(int slot) const {
        if constexpr (CLUSTER == 1) {
            if (lane == 0) mbarrier_arrive(x.empty + 8 * slot);
        } else {
            if (lane < CLUSTER) mbarrier_arrive_at(x.empty + 8 * slot, lane);
        }
    }

    HQQ_INLINE void release_codes() {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(codes.empty + 8 * codes.slot);
        codes.next();
    }

    // Codes and scales of pair PAIR (blocks, and tiles of a block) of the span, whose first block is `first`.
    template <int PAIR>
    HQQ_INLINE void read(int first) {
        constexpr int BLOCK = PAIR / BLOCKS, B = PAIR % BLOCKS;
        const unsigned char* tile = codes_at + codes.slot * SPAN_BYTES + B * (WARPS * TILE_BYTES);
        read_block<BITS>(word, tile + BLOCK / C::blocks * C::bytes, BLOCK % C::blocks, lane);
        scales.read(tile + CODE_BYTES + (S::offset(first + BLOCK) - S::offset(first)), lane);
        scales.fold();
    }

    // The first pair of a piece: nothing runs yet.
    HQQ_INLINE void begin(int first) {
        codes.wait_full();
        read<0>(first);
        dequantise_steps<0, 0, STEPS_OF_BLOCK>();
    }

    template <int TO, int STEP, int LAST>
    HQQ_INLINE void dequantise_steps() {
        if constexpr (STEP < LAST) {
            weights<T, BITS, STEP>(a[TO][STEP], word, scales);
            dequantise_steps<TO, STEP + 1, LAST>();
        }
    }

    template <int PAIR, int STEP = 0>
    HQQ_INLINE void steps(float (&sum)[SUMS], uint64_t columns) {
        if constexpr (STEP < STEPS_OF_BLOCK) {
            wgmma_fence();
#pragma unroll
            for (int s = STEP; s < STEP + STEPS; ++s) {
                const uint32_t(&now)[4] = a[PAIR % 2][s];
                wgmma<T, TOKENS>(sum, now[0], now[1], now[2], now[3], columns + 2 * s);
            }
            wgmma_commit();
            wgmma_wait<RUNNING>();
            dequantise_steps<(PAIR + 1) % 2, STEP, STEP + STEPS>();
            steps<PAIR, STEP + STEPS>(sum, columns);
        }
    }

    // Descriptor of x for pair PAIR. The shuffle tells the compiler that it is the same in all lanes: then it stays where
    // instructions read descriptors, and so does what is added to it. Addresses are in the low word, in units of 16 bytes.
    template <int PAIR>
    HQQ_INLINE uint64_t columns() const {
        const uint32_t stage = __shfl_sync(0xffffffffu, x_low + x.slot * (STAGE_BYTES / 16), 0);
        return (wgmma_descriptor(0) >> 32 << 32 | stage) + PAIR / BLOCKS % JOINT * (BLOCK_BYTES / 16);
    }

    HQQ_INLINE void next_x() {
        if (unreleased >= 0) release_x(unreleased);
        unreleased = x.slot;
        x.next();
    }

    // A whole span. `more`: another one of the same output tile follows.
    template <int PAIR = 0>
    HQQ_INLINE void span(float (&sum)[BLOCKS][SUMS], int first, bool more) {
        if constexpr (PAIR < SPAN * BLOCKS) {
            if constexpr (PAIR + 1 < SPAN * BLOCKS) {
                read<PAIR + 1>(first);
            } else {
                release_codes();
                if (more) codes.wait_full();
                read<0>(first + SPAN);  // what nobody uses, if there is no more
            }
            const uint64_t x_columns = columns<PAIR>();
            if (PAIR % (BLOCKS * JOINT) == 0) x.wait_full();
            steps<PAIR>(sum[PAIR % BLOCKS], x_columns);
            if (PAIR % (BLOCKS * JOINT) == BLOCKS * JOINT - 1) next_x();
            span<PAIR + 1>(sum, first, more);
        }
    }

    // The first `count` blocks of a span, one after the other.
    template <int PAIR = 0>
    HQQ_INLINE void part_of_span(float (&sum)[BLOCKS][SUMS], int first, int count) {
        if constexpr (PAIR < SPAN * BLOCKS) {
            if (PAIR < count * BLOCKS) {
                wgmma_wait<0>();
                read<PAIR>(first);
                dequantise_steps<0, 0, STEPS_OF_BLOCK>();
                if (PAIR % (BLOCKS * JOINT) == 0) x.wait_full();
                steps<0>(sum[PAIR % BLOCKS], columns<PAIR>());
                if (PAIR % (BLOCKS * JOINT) == BLOCKS * JOINT - 1 || PAIR == count * BLOCKS - 1) next_x();
            }
            part_of_span<PAIR + 1>(sum, first, count);
        } else {
            release_codes();
        }
    }

    HQQ_INLINE void finish(float (&sum)[BLOCKS][SUMS]) {
        wgmma_wait<0>();
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) wgmma_touch(sum[b]);
        if (unreleased >= 0) release_x(unreleased);
        unreleased = -1;
    }
};

HQQ_INLINE void multiply(const Weight& w, const Output& out, const Work& work, float* partial, int* flags,
                         unsigned char* shared, int warp) {
    const int lane = threadIdx.x % 32, block = blockIdx.x;
    Multiplier multiplier(shared, warp, lane);
    int unit = work.share.first, tile = unit / work.spans, span = unit % work.spans;
    bool waited = false;
#pragma unroll 1
    while (unit < work.share.last) {
        const int left = work.share.last - unit, count = left < work.spans - span ? left : work.spans - span;
        float sum[BLOCKS][SUMS];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
            for (int n = 0; n < SUMS; ++n) sum[b][n] = 0.0f;
            wgmma_touch(sum[b]);
        }
        multiplier.begin(span * SPAN);
        const int whole = (span + count) * SPAN <= w.blocks ? count : count - 1;
#pragma unroll 1
        for (int i = 0; i < whole; ++i) multiplier.span(sum, (span + i) * SPAN, i + 1 < count);
        if (whole < count) multiplier.part_of_span(sum, (span + whole) * SPAN, w.blocks % SPAN);
        multiplier.finish(sum);

        if (!waited) pdl_wait(), waited = true;
        if (span > 0) {
            leave(sum, partial, flags, block, threadIdx.x);
        } else {
            // Worker w + 1 has the cluster before: blocks wait for earlier blocks only.
            int others = 0;
            for (int done = count; done < work.spans;) {
                const Share next(work.worker + ++others, work.workers, work.units);
                done += next.last - next.first;
            }
            if (others > 0) collect(sum, partial, flags, block, others, threadIdx.x);
            store(sum, out, work.order(tile), tile % work.token_blocks * TOKENS, warp, lane, shared + EXCHANGE_AT);
        }
        unit += count, ++tile, span = 0;
    }
}

// ---- copies -------------------------------------------------------------------------------------------------------
// Codes and scales, a row tile for each lane.
HQQ_INLINE void copy_codes(const Weight& w, const Work& work, unsigned char* shared, int lane) {
    Ring<DEPTH> ring(smem_u32(shared) + BARRIERS_AT + 16 * STAGES);
    const uint64_t policy = evict_first_policy();
    const uint32_t to = smem_u32(shared) + CODES_AT + lane * TILE_BYTES;
    int tile = work.share.first / work.spans, span = work.share.first % work.spans;
    int row = row_tile(work.order(tile) + lane, w.tiles);
#pragma unroll 1
    for (int unit = work.share.first; unit < work.share.last; ++unit) {
        const int first = span * SPAN, rest = w.blocks - first, count = rest < SPAN ? rest : SPAN;
        const int codes = count / C::blocks * C::bytes;
        const int scales = S::offset(first + count - 1) - S::offset(first) + S::BLOCK_BYTES;
        ring.wait_empty();
        const uint32_t full = ring.full + 8 * ring.slot, slot = to + ring.slot * SPAN_BYTES;
        if (lane == 0) mbarrier_arrive_expect(full, BLOCK_TILES * (codes + scales));
        __syncwarp();
        if (lane < BLOCK_TILES) {
            const int64_t block = static_cast<int64_t>(row) * w.blocks + first;
            bulk_copy(slot, w.codes + block / C::blocks * C::bytes, codes, full, policy);
            const unsigned char* meta = w.meta;
            if constexpr (AXIS == 0)
                meta += static_cast<int64_t>(row / MEMBERS<GROUP>) * w.blocks * S::BLOCK_BYTES;
            else
                meta += static_cast<int64_t>(row) * w.groups * 64;
            bulk_copy(slot + CODE_BYTES, meta + S::offset(first), scales, full);
        }
        ring.next();
        if (++span == work.spans) span = 0, row = row_tile(work.order(++tile) + lane, w.tiles);
    }
}

HQQ_INLINE void copy_tokens(const unsigned char* x, const Work& work, int blocks, unsigned char* shared) {
    pdl_wait();
    Ring<STAGES> ring(smem_u32(shared) + BARRIERS_AT);
    int tile = work.share.first / work.spans, span = work.share.first % work.spans;
#pragma unroll 1
    for (int unit = work.share.first; unit < work.share.last; ++unit) {
        const int first = span * SPAN, rest = blocks - first, count = rest < SPAN ? rest : SPAN;
        const unsigned char* from =
            x + (static_cast<int64_t>(tile % work.token_blocks) * blocks + first) * BLOCK_BYTES;
#pragma unroll 1
        for (int i = 0; i < count; i += JOINT, from += STAGE_BYTES) {
            ring.wait_empty();
            const uint32_t full = ring.full + 8 * ring.slot, to = smem_u32(shared) + ring.slot * STAGE_BYTES;
            const uint32_t bytes = (count - i < JOINT ? count - i : JOINT) * BLOCK_BYTES;
            mbarrier_arrive_expect(full, bytes);
            if constexpr (CLUSTER == 1) {
                bulk_copy(to, from, bytes, full);
            } else {
                constexpr int PART = STAGE_BYTES / CLUSTER;
                bulk_copy_to(to + work.rank * PART, from + work.rank * PART, PART, full, (1 << CLUSTER) - 1);
            }
            ring.next();
        }
        if (++span == work.spans) span = 0, ++tile;
    }
}

}  // namespace

// x: what arrange_tokens wrote. partial: float[blocks of the grid][BLOCKS * TOKENS * 128]; flags: one for each block.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    tiled_gemm(const unsigned char* x, const unsigned char* codes, const unsigned char* meta, const int* rows,
               const uint16_t* bias, uint16_t* y, float* partial, int* flags, int M, int N, int tiles, int blocks,
               int groups) {
    HQQ_DYNAMIC_SHARED(shared);
    const uint32_t barriers = smem_u32(shared) + BARRIERS_AT;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(barriers + 8 * i, 1);
            mbarrier_init(barriers + 8 * (STAGES + i), WARPS * CLUSTER);
        }
        for (int i = 0; i < DEPTH; ++i) {
            mbarrier_init(barriers + 16 * STAGES + 8 * i, 1);
            mbarrier_init(barriers + 16 * STAGES + 8 * (DEPTH + i), WARPS);
        }
        mbarrier_init_fence();
    }
    if constexpr (CLUSTER == 1)
        __syncthreads();
    else
        cluster_sync();

    const int workers = gridDim.x / CLUSTER, worker = workers - 1 - blockIdx.x / CLUSTER;
    const int token_blocks = (M + TOKENS - 1) / TOKENS, spans = (blocks + SPAN - 1) / SPAN;
    const int units = (tiles + BLOCK_TILES * CLUSTER - 1) / (BLOCK_TILES * CLUSTER) * token_blocks * spans;
    const int rank = blockIdx.x % CLUSTER;
    const Work work{Share(worker, workers, units), units, workers, worker, rank, token_blocks, spans};
    const Weight weight{codes, meta, tiles, blocks, groups};
    // The same in all lanes, and known to be.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp < WARPS) {
        more_registers<MANY>();
        multiply(weight, Output{rows, bias, y, M, N, tiles}, work, partial, flags, shared, warp);
    } else {
        fewer_registers<FEW>();
        if (warp == WARPS)
            copy_codes(weight, work, shared, threadIdx.x % 32);
        else if (threadIdx.x == MULTIPLIERS + 32)
            copy_tokens(x, work, blocks, shared);
    }
    if constexpr (CLUSTER > 1) {
        // A block whose neighbours still copy to it or arrive at its barriers must not end.
        __syncwarp();
        cluster_sync();
    }
}

// x [M, K] in the order in which the products read it: blocks of TOKENS tokens, blocks of 64 inputs (`blocks` of them,
// zeros beyond K), rows of 128 bytes with their 16-byte pieces in the 128-byte swizzle. Piece p of a row has inputs
// 16 c + 2 p and the one after it, c = 0 ... 3. A thread writes one piece. The flags of the product become 0.
extern "C" __global__ void __launch_bounds__(256)
    arrange_tokens(const uint16_t* x, unsigned char* arranged, int* flags, int M, int K, int blocks, int flag_count) {
    // In this order: the product reads weights before it waits, and they must be there.
    pdl_wait();
    pdl_launch();
    const int index = blockIdx.x * 256 + threadIdx.x;
    if (index < flag_count) flags[index] = 0;
    const int piece = index % 8, block = index / 8 % blocks, m = index / 8 / blocks;
    if (m >= M) return;
    uint32_t v[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int k = BLOCK_INPUTS * block + 16 * c + 2 * piece;
        const uint16_t* from = x + static_cast<int64_t>(m) * K + k;
        if (K % 2 == 0)
            v[c] = k < K ? *reinterpret_cast<const uint32_t*>(from) : 0;
        else
            v[c] = (k < K ? from[0] : 0u) | (k + 1 < K ? uint32_t(from[1]) << 16 : 0u);
    }
    const int token = m % TOKENS;
    unsigned char* to = arranged + (static_cast<int64_t>(m / TOKENS) * blocks + block) * BLOCK_BYTES;
    *reinterpret_cast<uint4*>(to + 128 * token + 16 * (piece ^ (token % 8))) = make_uint4(v[0], v[1], v[2], v[3]);
}
