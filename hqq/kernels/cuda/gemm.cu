// y[M, N] = x[M, K] W^T + bias for a weight in tile order (tile_layout.py), M from a few tokens to some hundreds.
//
// Weights are the tall operand, dequantised in registers; tokens are the columns and come through shared memory. A block
// has 8 warps that multiply, in two warpgroups, each warp with BLOCKS tiles of 16 output features and TOKENS tokens, and
// one thread that copies x (in a warpgroup of its own, which gives its registers away). Codes and scales go from memory into a ring of each warp, DEPTH chunks deep, by copies of its own
// lanes; x into a ring of STAGES blocks of 64 inputs, by bulk copies that CLUSTER blocks share.
//
// All (output tile, chunk of inputs) pairs are one sequence, cut into as many equal pieces as there are workers (a
// worker: a cluster). Whoever has a tile's first chunk writes its output; those that continue it leave sums in
// `partial` before they do anything else, and raise a flag. Sums are added in the order of inputs: results repeat.
//
// Set by the host, with HQQ_ in front: T (F16, BF16), BITS, AXIS, GROUP (0: the whole row), TOKENS, BLOCKS, STAGES, DEPTH,
// CLUSTER, RESIDENT (blocks on a multiprocessor), STEPS (matrix instructions of 16 inputs at a time).
#include "fragments.cuh"
#include "ptx_cluster.cuh"

namespace {

using T = HQQ_T;
constexpr int BITS = HQQ_BITS, AXIS = HQQ_AXIS, GROUP = HQQ_GROUP;
constexpr int TOKENS = HQQ_TOKENS, BLOCKS = HQQ_BLOCKS, STAGES = HQQ_STAGES, DEPTH = HQQ_DEPTH;
constexpr int CLUSTER = HQQ_CLUSTER, RESIDENT = HQQ_RESIDENT, STEPS = HQQ_STEPS;
constexpr int WARPS = 8, MULTIPLIERS = 32 * WARPS, THREADS = MULTIPLIERS + 128;
// Registers of a thread that copies and of one that multiplies; together what the block is given at its start.
constexpr int FEW = 24, MANY = RESIDENT == 1 ? 240 : 104;
constexpr int BLOCK_INPUTS = 64, TILE_ROWS = 16, STEPS_OF_BLOCK = 4;
constexpr int STAGE_BYTES = TOKENS * BLOCK_INPUTS * 2;
constexpr int BLOCK_TILES = WARPS * BLOCKS;
constexpr int SUMS = TOKENS / 2;  // of a thread, for each of its BLOCKS tiles

using P = Packing<BITS>;
using S = Scales<T, AXIS, GROUP>;
constexpr int CHUNK_BLOCKS = P::CHUNK_BLOCKS;
constexpr int META_BYTES = CHUNK_BLOCKS * S::BLOCK_BYTES;
constexpr int SLOT_BYTES = P::CHUNK_BYTES + META_BYTES;
constexpr int RING_BYTES = WARPS * DEPTH * BLOCKS * SLOT_BYTES;
constexpr int EXCHANGE_TOKENS = TOKENS < 32 ? TOKENS : 32;
constexpr int EXCHANGE_BYTES = AXIS == 0 ? EXCHANGE_TOKENS * TILE_ROWS * WARPS * 2 : WARPS * 512;
constexpr int RING_AT = STAGES * STAGE_BYTES, EXCHANGE_AT = RING_AT + RING_BYTES;
constexpr int BARRIERS_AT = EXCHANGE_AT + EXCHANGE_BYTES;

struct Weight {
    const unsigned char *codes, *meta;
    const int* rows;
    int tiles, chunks, groups;  // row tiles; chunks of inputs; groups of a row (axis 1)
};

// The place of a worker in the sequence of (tile, chunk).
struct Cursor {
    int tile, chunk;
};

struct Share {
    int first, last;

    HQQ_INLINE Share(int worker, int workers, int units) {
        first = static_cast<int>(static_cast<int64_t>(units) * worker / workers);
        last = static_cast<int>(static_cast<int64_t>(units) * (worker + 1) / workers);
    }
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

// ---- codes and scales: this warp's ring ---------------------------------------------------------------------------
struct Ring {
    const Weight& w;
    unsigned char* slots;
    uint32_t address;
    int lane, first_order, chunk;
    int tile[BLOCKS];

    HQQ_INLINE Ring(const Weight& weight, unsigned char* mine, int l)
        : w(weight), slots(mine), address(smem_u32(mine)), lane(l) {}

    HQQ_INLINE void seek(int order, int c) {
        first_order = order, chunk = c;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) tile[b] = row_tile(order + WARPS * b, w.tiles);
    }

    HQQ_INLINE void fetch(int slot) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            const uint32_t to = address + (slot * BLOCKS + b) * SLOT_BYTES;
            const unsigned char* codes = w.codes + (static_cast<int64_t>(tile[b]) * w.chunks + chunk) * P::CHUNK_BYTES;
#pragma unroll
            for (int i = 0; i < P::LOADS; ++i) cp_async16(to + 512 * i + 16 * lane, codes + 512 * i + 16 * lane);
            fetch_scales(to + P::CHUNK_BYTES, tile[b]);
        }
    }

    HQQ_INLINE void fetch_scales(uint32_t to, int t) {
        constexpr int PIECES = META_BYTES / 16, OF_BLOCK = S::BLOCK_BYTES / 16;
        const unsigned char* from = w.meta;
        if constexpr (AXIS == 0)
            from += static_cast<int64_t>(t / MEMBERS<GROUP>) * w.chunks * META_BYTES;
        else
            from += static_cast<int64_t>(t) * w.groups * 64;
#pragma unroll
        for (int i = 0; i < (PIECES + 31) / 32; ++i) {
            const int piece = 32 * i + lane;
            if (PIECES % 32 == 0 || piece < PIECES)
                cp_async16(to + 16 * piece,
                           from + S::offset(chunk * CHUNK_BLOCKS + piece / OF_BLOCK) + 16 * (piece % OF_BLOCK));
        }
    }
};

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
        factor = __int_as_float((127 - row[3]) << 23);
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
    __threadfence();
    bar_sync(1, MULTIPLIERS);
    if (thread == 0) store_release(flags + block, 1);
}

HQQ_INLINE void collect(float (&sum)[BLOCKS][SUMS], float* partial, const int* flags, int block, int thread) {
    while (load_acquire(flags + block) == 0) {
    }
    const float* from = partial_of(partial, block, thread);
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int n = 0; n < SUMS; n += 4) {
            const float4 v = load_shared_result(from + (b * SUMS + n) * MULTIPLIERS);
            sum[b][n] += v.x, sum[b][n + 1] += v.y, sum[b][n + 2] += v.z, sum[b][n + 3] += v.w;
        }
}

// ---- products -----------------------------------------------------------------------------------------------------
// STEPS instructions from FIRST on of one block of one tile.
template <int FIRST, int STEP = 0>
HQQ_INLINE void dequantise(uint32_t (&a)[STEPS][4], const uint32_t (&word)[BITS], const S& scales) {
    if constexpr (STEP < STEPS) {
        weights<T, BITS, FIRST + STEP>(a[STEP], word, scales);
        dequantise<FIRST, STEP + 1>(a, word, scales);
    }
}

struct Stage {
    uint32_t full, empty, data;  // barriers of stage 0, and where it lies
    int index, parity;

    HQQ_INLINE Stage(uint32_t shared) : full(shared + BARRIERS_AT), empty(full + 8 * STAGES), data(shared), index(0), parity(0) {}

    HQQ_INLINE void next() {
        if (++index == STAGES) index = 0, parity ^= 1;
    }

    HQQ_INLINE void release(int of, int lane) const {
        if constexpr (CLUSTER == 1) {
            if (lane == 0) mbarrier_arrive(empty + 8 * of);
        } else {
            if (lane < CLUSTER) mbarrier_arrive_at(empty + 8 * of, lane);
        }
    }
};

// One block of 64 inputs of all tiles of this warp. Products are left running: at most those of the last STEPS.
template <int FIRST, int B>
HQQ_INLINE void multiply_part(float (&sum)[BLOCKS][SUMS], const uint32_t (&word)[BITS], const S& scales, Stage& stage,
                              int& unreleased, int lane) {
    if constexpr (FIRST < STEPS_OF_BLOCK) {
        uint32_t a[STEPS][4];
        dequantise<FIRST>(a, word, scales);
        if (B == 0 && FIRST == 0) {
            if constexpr (CLUSTER == 1)
                mbarrier_wait(stage.full + 8 * stage.index, stage.parity);
            else
                mbarrier_wait_cluster(stage.full + 8 * stage.index, stage.parity);
        }
        const uint64_t x = wgmma_descriptor(stage.data + stage.index * STAGE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < STEPS; ++s) wgmma<T, TOKENS>(sum[B], a[s][0], a[s][1], a[s][2], a[s][3], x + 2 * (FIRST + s));
        wgmma_commit();
        wgmma_wait<1>();
        if (B == 0 && FIRST == 0) {
            if (unreleased >= 0) stage.release(unreleased, lane);
            unreleased = stage.index;
        }
        multiply_part<FIRST + STEPS, B>(sum, word, scales, stage, unreleased, lane);
    }
}

template <int B = 0>
HQQ_INLINE void multiply_block(float (&sum)[BLOCKS][SUMS], const unsigned char* slot, int block, Stage& stage,
                               int& unreleased, int lane) {
    if constexpr (B < BLOCKS) {
        uint32_t word[BITS];
        S scales;
        read_block<BITS>(word, slot + B * SLOT_BYTES, block, lane);
        scales.read(slot + B * SLOT_BYTES + P::CHUNK_BYTES + block * S::BLOCK_BYTES, lane);
        scales.fold();
        multiply_part<0, B>(sum, word, scales, stage, unreleased, lane);
        multiply_block<B + 1>(sum, slot, block, stage, unreleased, lane);
    }
}

HQQ_INLINE void multiply(const Weight& w, const Output& out, float* partial, int* flags, Share share, int units,
                         int workers, int worker, int rank, int token_blocks, unsigned char* shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int block = blockIdx.x;
    Stage stage(smem_u32(shared));
    Ring ring(w, shared + RING_AT + warp * (DEPTH * BLOCKS * SLOT_BYTES), lane);
    const auto order_of = [&](int tile) { return (tile / token_blocks * CLUSTER + rank) * BLOCK_TILES; };

    int ahead = share.first, ahead_tile = ahead / w.chunks;
    ring.seek(order_of(ahead_tile) + warp, ahead % w.chunks);
    const auto fetch_next = [&](int slot) {
        if (ahead < share.last) {
            ring.fetch(slot);
            ++ahead;
            if (++ring.chunk == w.chunks) ring.seek(order_of(++ahead_tile) + warp, 0);
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (int slot = 0; slot < DEPTH - 1; ++slot) fetch_next(slot);

    int slot = 0, free_slot = DEPTH - 1;
    int unit = share.first, tile = unit / w.chunks, chunk = unit % w.chunks;
    bool waited = false;
#pragma unroll 1
    while (unit < share.last) {
        const int left = share.last - unit, count = left < w.chunks - chunk ? left : w.chunks - chunk;
        float sum[BLOCKS][SUMS];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int n = 0; n < SUMS; ++n) sum[b][n] = 0.0f;
        int unreleased = -1;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) wgmma_touch(sum[b]);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            cp_async_wait<DEPTH - 2>();
            __syncwarp();
            fetch_next(free_slot);
            if (++free_slot == DEPTH) free_slot = 0;
            const unsigned char* codes = ring.slots + slot * (BLOCKS * SLOT_BYTES);
            if (++slot == DEPTH) slot = 0;
#pragma unroll
            for (int kb = 0; kb < CHUNK_BLOCKS; ++kb) {
                multiply_block(sum, codes, kb, stage, unreleased, lane);
                stage.next();
            }
        }
        wgmma_wait<0>();
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) wgmma_touch(sum[b]);
        stage.release(unreleased, lane);

        if (!waited) pdl_wait(), waited = true;
        if (chunk > 0) {
            leave(sum, partial, flags, block, threadIdx.x);
        } else {
            // Worker w + 1 has the block before; the sequence goes from the last block of the grid to the first.
            for (int done = count, other = 1; done < w.chunks; ++other) {
                collect(sum, partial, flags, block - other * CLUSTER, threadIdx.x);
                const Share next(worker + other, workers, units);
                done += next.last - next.first;
            }
            store(sum, out, order_of(tile), tile % token_blocks * TOKENS, warp, lane, shared + EXCHANGE_AT);
        }
        unit += count, ++tile, chunk = 0;
    }
}

// ---- x ------------------------------------------------------------------------------------------------------------
HQQ_INLINE void copy_tokens(const unsigned char* x, Share share, int rank, int token_blocks, int chunks,
                            unsigned char* shared) {
    pdl_wait();
    Stage stage(smem_u32(shared));
    constexpr int PART = STAGE_BYTES / CLUSTER;
    int tile = share.first / chunks, chunk = share.first % chunks;
#pragma unroll 1
    for (int unit = share.first; unit < share.last; ++unit) {
        const unsigned char* from =
            x + (static_cast<int64_t>(tile % token_blocks) * chunks + chunk) * (CHUNK_BLOCKS * STAGE_BYTES);
#pragma unroll 1
        for (int kb = 0; kb < CHUNK_BLOCKS; ++kb, from += STAGE_BYTES) {
            const uint32_t to = stage.data + stage.index * STAGE_BYTES, full = stage.full + 8 * stage.index;
            if constexpr (CLUSTER == 1) {
                mbarrier_wait(stage.empty + 8 * stage.index, stage.parity ^ 1);
                mbarrier_arrive_expect(full, STAGE_BYTES);
                bulk_copy(to, from, STAGE_BYTES, full);
            } else {
                mbarrier_wait_cluster(stage.empty + 8 * stage.index, stage.parity ^ 1);
                mbarrier_arrive_expect(full, STAGE_BYTES);
                bulk_copy_to(to + rank * PART, from + rank * PART, PART, full, (1 << CLUSTER) - 1);
            }
            stage.next();
        }
        if (++chunk == chunks) chunk = 0, ++tile;
    }
}

}  // namespace

// x: what arrange_tokens wrote. partial: float[blocks of the grid][BLOCKS * TOKENS / 2 * 256]; flags: one for each block.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    tiled_gemm(const unsigned char* x, const unsigned char* codes, const unsigned char* meta, const int* rows,
               const uint16_t* bias, uint16_t* y, float* partial, int* flags, int M, int N, int tiles, int chunks,
               int groups) {
    HQQ_DYNAMIC_SHARED(shared);
    const uint32_t barriers = smem_u32(shared) + BARRIERS_AT;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(barriers + 8 * i, 1);
            mbarrier_init(barriers + 8 * (STAGES + i), WARPS * CLUSTER);
        }
        mbarrier_init_fence();
    }
    if constexpr (CLUSTER == 1)
        __syncthreads();
    else
        cluster_sync();

    const int workers = gridDim.x / CLUSTER, worker = workers - 1 - blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
    const int token_blocks = (M + TOKENS - 1) / TOKENS;
    const int output_tiles = (tiles + BLOCK_TILES * CLUSTER - 1) / (BLOCK_TILES * CLUSTER) * token_blocks;
    const int units = output_tiles * chunks;
    const Share share(worker, workers, units);
    if (threadIdx.x < MULTIPLIERS) {
        more_registers<MANY>();
        const Weight weight{codes, meta, rows, tiles, chunks, groups};
        multiply(weight, Output{rows, bias, y, M, N, tiles}, partial, flags, share, units, workers, worker, rank,
                 token_blocks, shared);
    } else {
        fewer_registers<FEW>();
        if (threadIdx.x == MULTIPLIERS) copy_tokens(x, share, rank, token_blocks, chunks, shared);
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
    unsigned char* to = arranged + (static_cast<int64_t>(m / TOKENS) * blocks + block) * STAGE_BYTES;
    *reinterpret_cast<uint4*>(to + 128 * token + 16 * (piece ^ (token % 8))) = make_uint4(v[0], v[1], v[2], v[3]);
}
