// As instructions.cu, for what needs compute capability 9.0.
#include "ptx_sm90.cuh"

// out[64, COLUMNS] = sum of two products over 64 of k: a[64, 64] b[COLUMNS, 64]^T, the first replacing what out held.
extern "C" __global__ void warpgroup_product(float* out, const uint16_t* a, const uint16_t* b) {
    HQQ_DYNAMIC_SHARED(shared);
    const int t = threadIdx.x, warp = t / 32, g = t % 32 / 4, q = t % 4;
    for (int i = t; i < COLUMNS * 64; i += 128) {
        const int row = i / 64, k = i % 64, chunk = k / 8 ^ row % 8;
        reinterpret_cast<uint16_t*>(shared)[64 * row + 8 * chunk + k % 8] = b[i];
    }
    fence_async_proxy();
    __syncthreads();
    float d[COLUMNS / 2];
    for (int i = 0; i < COLUMNS / 2; ++i) d[i] = 1000.0f;  // replaced by the first product
    uint32_t fragment[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        for (int p = 0; p < 4; ++p) {
            const uint16_t* pair = a + 64 * (16 * warp + g + 8 * (p % 2)) + 16 * step + 2 * q + 8 * (p / 2);
            fragment[step][p] = *reinterpret_cast<const uint32_t*>(pair);
        }
    }
    wgmma_touch(d);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        wgmma<TYPE, COLUMNS>(d, fragment[step][0], fragment[step][1], fragment[step][2], fragment[step][3],
                       wgmma_descriptor(smem_u32(shared) + 32 * step), step > 0);
        if (step % 2 == 1) wgmma_commit();
    }
    wgmma_wait<1>();
    wgmma_wait<0>();
    wgmma_touch(d);
    for (int i = 0; i < COLUMNS / 2; ++i) {
        out[COLUMNS * (16 * warp + g + 8 * (i / 2 % 2)) + 8 * (i / 4) + 2 * q + i % 2] = d[i];
    }
}

// out = 3 in, in pieces of 128 words through `STAGES` buffers: a warp copies, 128 threads read.
extern "C" __global__ void pipeline(uint32_t* out, const uint32_t* in, int pieces) {
    HQQ_DYNAMIC_SHARED(shared);
    HQQ_SHARED(uint64_t, barriers, 2 * STAGES);
    const uint32_t full = smem_u32(barriers), empty = full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(full + 8 * s, 1);
            mbarrier_init(empty + 8 * s, 4);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (threadIdx.x == 128) {
            for (int piece = 0; piece < pieces; ++piece) {
                const int s = piece % STAGES;
                mbarrier_wait(empty + 8 * s, piece / STAGES % 2 ^ 1);
                mbarrier_arrive_expect(full + 8 * s, 512);
                bulk_copy(smem_u32(shared) + 512 * s, in + 128 * piece, 256, full + 8 * s);
                bulk_copy(smem_u32(shared) + 512 * s + 256, in + 128 * piece + 64, 256, full + 8 * s, evict_first_policy());
            }
        }
    } else {
        for (int piece = 0; piece < pieces; ++piece) {
            const int s = piece % STAGES;
            mbarrier_wait(full + 8 * s, piece / STAGES % 2);
            out[128 * piece + threadIdx.x] = 3 * reinterpret_cast<const uint32_t*>(shared)[128 * s + threadIdx.x];
            __syncwarp();
            if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * s);
        }
    }
}
