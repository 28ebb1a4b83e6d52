// y[M, N] = x[M, K] W^T + bias for a weight in tile order (tile_layout.py), M from a few tokens to some thousands.
//
// Weights are the tall operand, dequantised in registers; tokens are the columns and come through shared memory. A block
// has 8 warps that multiply, in two warpgroups, each warp with BLOCKS tiles of 16 output features and TOKENS tokens, and
// four in a warpgroup that gives its registers away: two copy codes and scales of SPAN blocks of 64 inputs at a time into a
// ring of DEPTH such spans, one copies x, JOINT blocks at a time, into a ring of STAGES, and one raises flags.
//
// With SPLIT, a cluster of so many thread blocks makes an output tile: each takes its part of the inputs, sends its sums
// of the others' parts of the tile, and stores its own part. Without, all (output tile, span of inputs) pairs are one
// sequence, cut into as many equal pieces as there are thread blocks. Whoever has a tile's first span writes its output;
// those that continue it leave sums in `partial` before they do anything else, and raise a flag. Either way sums are
// added in an order that repeats.
#include "gemm_copies.cuh"
#include "gemm_sums.cuh"

namespace {

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

    HQQ_INLINE void release_x() {
        if (unreleased >= 0 && lane == 0) mbarrier_arrive(x.empty + 8 * unreleased);
        unreleased = -1;
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
            // The stage before has been read.
            if (PAIR % (BLOCKS * JOINT) == 0 && STEP + STEPS == STEPS_OF_BLOCK) release_x();
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
        release_x();
    }
};

HQQ_INLINE void find_rows(Rows (&rows)[BLOCKS], const Output& out, int order, int warp, int lane) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) rows[b] = Rows(out, order + WARPS * b, warp, lane);
}

// What a block of a cluster does with its sums.
HQQ_INLINE void combine(float (&sum)[BLOCKS][SUMS], const Output& out, const Work& work, int tile, unsigned char* shared,
                        int warp, int lane) {
    const int rank = blockIdx.x % PARTNERS;
    const uint32_t barrier = smem_u32(shared) + RECEIVED_BARRIER_AT;
    if constexpr (SPLIT > 1) {
        // All have done with their rings.
        cluster_arrive();
        cluster_wait();
        send_parts(sum, smem_u32(shared), barrier, rank, 32 * warp + lane);
    }
    Rows rows[BLOCKS];
    find_rows(rows, out, work.order(tile), warp, lane);
    if constexpr (SPLIT > 1) mbarrier_wait_cluster(barrier, 0);
    store(sum, rows, out, work.token(tile), rank, shared, warp, lane);
}

// What a block does with its sums that shares tiles through global memory.
HQQ_INLINE void share(float (&sum)[BLOCKS][SUMS], const Output& out, const Work& work, int tile, int span, int count,
                      float* partial, int* flags, unsigned char* shared, int warp, int lane) {
    const int block = blockIdx.x, thread = 32 * warp + lane;
    if (span > 0) return leave(sum, partial, block, thread);
    Rows rows[BLOCKS];
    find_rows(rows, out, work.order(tile), warp, lane);
    // Worker w + 1 is the block before: blocks wait for earlier blocks only.
    int others = 0;
    for (int done = count; done < work.spans;) {
        const Share next(work.worker + ++others, work.workers, work.units);
        done += next.last - next.first;
    }
    if (others > 0) collect(sum, partial, flags, block, others, thread);
    store(sum, rows, out, work.token(tile), 0, shared, warp, lane);
}

HQQ_INLINE void multiply(const Weight& w, const Output& out, const Work& work, float* partial, int* flags,
                         unsigned char* shared, int warp) {
    const int lane = threadIdx.x % 32;
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

        if (!waited) {
            pdl_wait();
            pdl_launch();
            waited = true;
        }
        if constexpr (SPLIT > 0)
            combine(sum, out, work, tile, shared, warp, lane);
        else
            share(sum, out, work, tile, span, count, partial, flags, shared, warp, lane);
        unit += count, ++tile, span = 0;
    }
}

}  // namespace

// x: what arrange_tokens wrote. partial: float[blocks of the grid][BLOCKS * TOKENS * 128]; flags: one for each
// block; neither with SPLIT.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    tiled_gemm(const unsigned char* x, const unsigned char* codes, const unsigned char* meta, const int* rows,
               const uint16_t* bias, uint16_t* y, float* partial, int* flags, int M, int N, int tiles, int blocks,
               int groups) {
    HQQ_DYNAMIC_SHARED(shared);
    const uint32_t barriers = smem_u32(shared) + BARRIERS_AT;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(barriers + 8 * i, 1);
            mbarrier_init(barriers + 8 * (STAGES + i), WARPS);
        }
        for (int i = 0; i < DEPTH; ++i) {
            mbarrier_init(barriers + 16 * STAGES + 8 * i, 1);
            mbarrier_init(barriers + 16 * STAGES + 8 * (DEPTH + i), WARPS);
        }
        if constexpr (SPLIT > 1) {
            mbarrier_init(smem_u32(shared) + RECEIVED_BARRIER_AT, 1);
            mbarrier_arrive_expect(smem_u32(shared) + RECEIVED_BARRIER_AT, bytes_for(blockIdx.x % PARTNERS));
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    const int token_blocks = (M + TOKENS - 1) / TOKENS, spans = (blocks + SPAN - 1) / SPAN;
    const int units = (tiles + BLOCK_TILES - 1) / BLOCK_TILES * token_blocks * spans;
    // The first block has the last share.
    const int workers = gridDim.x, worker = workers - 1 - blockIdx.x;
    const Share share = SPLIT > 0 ? Share(blockIdx.x % PARTNERS, PARTNERS, spans).after(blockIdx.x / PARTNERS * spans)
                                  : Share(worker, workers, units);
    const Work work{share, units, workers, worker, token_blocks, spans};
    const Weight weight{codes, meta, tiles, blocks, groups};
    // The same in all lanes, and known to be.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (warp < WARPS) {
        more_registers<MANY>();
        multiply(weight, Output{rows, bias, y, M, N, tiles}, work, partial, flags, shared, warp);
    } else {
        fewer_registers<FEW>();
        if (warp == WARPS) {
            if (lane == 0) copy_tokens(x, work, blocks, shared);
        } else if (warp <= WARPS + CODE_WARPS) {
            copy_codes(weight, work, shared, warp - WARPS - 1, lane);
        } else if (SPLIT == 0) {
            raise_flag(flags, work, blockIdx.x, lane);
        }
        if constexpr (SPLIT > 1) {
            __syncwarp();
            cluster_arrive();
            cluster_wait();
        }
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
