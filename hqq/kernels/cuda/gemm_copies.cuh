// What the warps that copy do in cuda/gemm.cu.
#ifndef HQQ_GEMM_COPIES_CUH
#define HQQ_GEMM_COPIES_CUH

#include "gemm_shape.cuh"

// Codes and scales, a row tile for each lane of warp `part` of CODE_WARPS: a warp asks for the copies of its lanes one after
// the other.
HQQ_INLINE void copy_codes(const Weight& w, const Work& work, unsigned char* shared, int part, int lane) {
    Ring<DEPTH> ring(smem_u32(shared) + BARRIERS_AT + 16 * STAGES);
    const uint64_t policy = evict_first_policy();
    const int place = lane * CODE_WARPS + part;
    const uint32_t to = smem_u32(shared) + CODES_AT + place * TILE_BYTES;
    int tile = work.share.first / work.spans, span = work.share.first % work.spans;
    int row = row_tile(work.order(tile) + place, w.tiles);
#pragma unroll 1
    for (int unit = work.share.first; unit < work.share.last; ++unit) {
        const int first = span * SPAN, rest = w.blocks - first, count = rest < SPAN ? rest : SPAN;
        const int codes = count / C::blocks * C::bytes;
        const int scales = S::offset(first + count - 1) - S::offset(first) + S::BLOCK_BYTES;
        ring.wait_empty();
        const uint32_t full = ring.full + 8 * ring.slot, slot = to + ring.slot * SPAN_BYTES;
        if (part == 0 && lane == 0) mbarrier_arrive_expect(full, BLOCK_TILES * (codes + scales));
        __syncwarp();
        if (place < BLOCK_TILES) {
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
        if (++span == work.spans) span = 0, row = row_tile(work.order(++tile) + place, w.tiles);
    }
}

// x as arrange_tokens wrote it; one thread.
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
            bulk_copy(to, from, bytes, full);
            ring.next();
        }
        if (++span == work.spans) span = 0, ++tile;
    }
}

#endif
