// Sums of an output tile that several thread blocks share, in cuda/gemm.cu.
#ifndef HQQ_GEMM_SUMS_CUH
#define HQQ_GEMM_SUMS_CUH

#include "gemm_results.cuh"

constexpr int QUADS = BLOCKS * SUMS / 4;  // of four sums, of a thread

HQQ_INLINE void add_quad(float* four, const float4& quad) {
    four[0] += quad.x, four[1] += quad.y, four[2] += quad.z, four[3] += quad.w;
}

// ---- through global memory: the block with a tile's first inputs collects what the ones after it left -----------------
HQQ_INLINE float* partial_of(float* partial, int block, int thread) {
    return partial + static_cast<int64_t>(block) * (BLOCKS * SUMS * MULTIPLIERS) + 4 * thread;
}

// A warp that copies nothing raises the flag: the release takes a microsecond, and those that multiply go on meanwhile. It
// reaches what other threads wrote before the barrier.
constexpr int LEFT = 2, LEAVING = MULTIPLIERS + 32;

HQQ_INLINE void leave(const float (&sum)[BLOCKS][SUMS], float* partial, int block, int thread) {
    float* to = partial_of(partial, block, thread);
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int n = 0; n < SUMS; n += 4)
            *reinterpret_cast<float4*>(to + (b * SUMS + n) * MULTIPLIERS) =
                make_float4(sum[b][n], sum[b][n + 1], sum[b][n + 2], sum[b][n + 3]);
    bar_arrive(LEFT, LEAVING);
}

HQQ_INLINE void raise_flag(int* flags, const Work& work, int block, int lane) {
    // Only the first tile of a share may have begun elsewhere.
    if (work.share.first % work.spans == 0) return;
    bar_sync(LEFT, LEAVING);
    if (lane == 0) store_release(flags + block, 1);
}

HQQ_INLINE void fetch(float4 (&quad)[QUADS], float* partial, int block, int thread) {
    const float* from = partial_of(partial, block, thread);
#pragma unroll
    for (int i = 0; i < QUADS; ++i) quad[i] = load_shared_result(from + 4 * i * MULTIPLIERS);
}

HQQ_INLINE void add(float (&sum)[BLOCKS][SUMS], const float4 (&quad)[QUADS]) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) add_quad(&sum[4 * i / SUMS][4 * i % SUMS], quad[i]);
}

// Adds what the `others` blocks before `block` left, in the order of inputs.
HQQ_INLINE void collect(float (&sum)[BLOCKS][SUMS], float* partial, const int* flags, int block, int others, int thread) {
    for (int i = thread % 32; i < others; i += 32) {
        while (load_acquire(flags + block - (i + 1)) == 0) {
        }
    }
    __syncwarp();
    if constexpr (QUADS <= (RESIDENT == 1 ? 8 : 4)) {
        // Few enough for the next ones to be on their way meanwhile.
        float4 quad[2][QUADS];
        fetch(quad[0], partial, block - 1, thread);
#pragma unroll 1
        for (int i = 0; i < others; i += 2) {
            if (i + 1 < others) fetch(quad[1], partial, block - (i + 2), thread);
            add(sum, quad[0]);
            if (i + 2 < others) fetch(quad[0], partial, block - (i + 3), thread);
            if (i + 1 < others) add(sum, quad[1]);
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < others; ++i) {
            float4 quad[QUADS];
            fetch(quad, partial, block - (i + 1), thread);
            add(sum, quad);
        }
    }
}

// ---- within a cluster: parts go round, and each block adds up and stores its own ---------------------------------------
// How much a block is sent.
HQQ_INLINE int bytes_for(int rank) {
    return (BLOCKS * PARTS - rank + PARTNERS - 1) / PARTNERS * (PARTNERS - 1) * PART_BYTES;
}

// Where block `from` (not counting the one that receives) puts four sums of a thread.
HQQ_INLINE int received_at(int from, int part, int quad, int thread) {
    return (from * OWN_PARTS + part) * PART_BYTES + quad * (16 * MULTIPLIERS) + 16 * thread;
}

HQQ_INLINE void send_parts(const float (&sum)[BLOCKS][SUMS], uint32_t received, uint32_t barrier, int rank,
                           int thread) {
#pragma unroll
    for (int i = 0; i < BLOCKS * PARTS; ++i) {
        const int owner = i % PARTNERS;
        if (owner == rank) continue;
        const uint32_t from = rank < owner ? rank : rank - 1;
#pragma unroll
        for (int q = 0; q < PART_SUMS / 4; ++q) {
            const float* four = &sum[i / PARTS][i % PARTS * PART_SUMS + 4 * q];
            store_at(received + received_at(from, i / PARTNERS, q, thread), owner,
                     make_float4(four[0], four[1], four[2], four[3]), barrier);
        }
    }
}

HQQ_INLINE void add_received(float* sum, const unsigned char* received, int part, int thread) {
#pragma unroll
    for (int from = 0; from < PARTNERS - 1; ++from)
#pragma unroll
        for (int q = 0; q < PART_SUMS / 4; ++q)
            add_quad(sum + 4 * q, *reinterpret_cast<const float4*>(received + received_at(from, part, q, thread)));
}

// ---- results of the tile B of each warp -----------------------------------------------------------------------------------
enum class Store { TOGETHER, COLUMNS, SINGLY };

// The parts that are this block's own, with what it received for them.
template <int B, Store HOW>
HQQ_INLINE void store_parts(float (&sum)[SUMS], const Rows& rows, const Output& out, int token, int rank,
                            unsigned char* shared, int warp, int lane) {
    unsigned char* exchange = shared + EXCHANGE_AT;
#pragma unroll
    for (int p = 0; p < PARTS; ++p, token += PART_TOKENS) {
        const int i = B * PARTS + p;
        if (i % PARTNERS != rank) continue;
        float* part = &sum[p * PART_SUMS];
        add_received(part, shared, i / PARTNERS, 32 * warp + lane);
        if constexpr (HOW == Store::TOGETHER)
            store_exchanged(part, rows, out, token, warp, lane, exchange);
        else if constexpr (HOW == Store::COLUMNS)
            store_columns(part, rows, out, token, lane, exchange + 512 * warp);
        else
            store_singly(part, rows, out, token, lane);
    }
}

// One branch for all parts, so that instructions lie in the order in which they run.
template <int B = 0>
HQQ_INLINE void store(float (&sum)[BLOCKS][SUMS], const Rows (&all)[BLOCKS], const Output& out, int token, int rank,
                      unsigned char* shared, int warp, int lane) {
    if constexpr (B < BLOCKS) {
        const Rows& rows = all[B];
        if (AXIS == 0 && rows.neighbours_base >= 0)
            store_parts<B, Store::TOGETHER>(sum[B], rows, out, token, rank, shared, warp, lane);
        else if (rows.stride == 1 && rows.count == TILE_ROWS && rows.base % 8 == 0 && out.N % 8 == 0)
            store_parts<B, Store::COLUMNS>(sum[B], rows, out, token, rank, shared, warp, lane);
        else
            store_parts<B, Store::SINGLY>(sum[B], rows, out, token, rank, shared, warp, lane);
        store<B + 1>(sum, all, out, token, rank, shared, warp, lane);
    }
}

#endif
