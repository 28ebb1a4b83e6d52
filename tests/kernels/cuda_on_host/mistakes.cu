// Kernels that are right unless MISTAKE is set to the number of one.
#include "ptx_sm90.cuh"

#ifndef MISTAKE
#define MISTAKE 0
#endif

// Forgets to synchronise the block (1), or lets only half of it come (2).
extern "C" __global__ void block_sum(int* out, const int* in) {
    HQQ_SHARED(int, values, 128);
    values[threadIdx.x] = in[threadIdx.x];
    if (MISTAKE == 2 && threadIdx.x < 64) {
        bar_sync(1, 128);
    } else if (MISTAKE != 1) {
        __syncthreads();
    }
    int sum = 0;
    for (int i = 0; i < 128; ++i) sum += values[i];
    out[threadIdx.x] = sum;
}

// Forgets to wait for a copy (1), copies from an odd address (2), or to one behind the shared memory (3).
extern "C" __global__ void copy(uint32_t* out, const uint32_t* in) {
    HQQ_DYNAMIC_SHARED(shared);
    const uint32_t to = smem_u32(shared) + 16 * threadIdx.x + (MISTAKE == 3 ? 16 : 0);
    cp_async16_zfill(to, in + 4 * threadIdx.x + (MISTAKE == 2 ? 1 : 0), 16);
    cp_async_commit();
    if (MISTAKE != 1) cp_async_wait<0>();
    __syncwarp();
    for (int i = 0; i < 4; ++i) out[32 * i + threadIdx.x] = reinterpret_cast<const uint32_t*>(shared)[32 * i + threadIdx.x];
}

// Writes one element too many (1), far too far (2), or reads one too many (3).
extern "C" __global__ void twice(int* out, const int* in, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n + (MISTAKE == 1 || MISTAKE == 3 ? 1 : 0)) {
        const int value = 2 * (MISTAKE == 3 ? __ldg(in + 1024 * (i / n) + i) : in[i % n]);
        if (MISTAKE != 3 || i < n || value == 2) out[MISTAKE == 2 ? i + 4096 * (i / 8) : i] = value;
    }
}

// Half of a warp takes part in one operation, half in another (1).
extern "C" __global__ void votes(int* out) {
    if (MISTAKE == 1 && threadIdx.x < 16) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
    } else {
        out[threadIdx.x] = __popc(__ballot_sync(0xffffffffu, 1));
    }
}

// Reads the accumulators of a matrix product before they are there (1), or changes b before it has been read (2).
extern "C" __global__ void product(float* out) {
    HQQ_DYNAMIC_SHARED(shared);
    uint32_t* words = reinterpret_cast<uint32_t*>(shared);
    for (int i = threadIdx.x; i < 256; i += 128) words[i] = 0x3c003c00u;
    fence_async_proxy();
    __syncthreads();
    float d[4] = {0, 0, 0, 0};
    wgmma_fence();
    wgmma<F16, 8>(d, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u, wgmma_descriptor(smem_u32(shared)));
    wgmma_commit();
    if (MISTAKE == 1) out[threadIdx.x] = d[0];
    if (MISTAKE == 2) words[2 * threadIdx.x] = 0;
    wgmma_wait<0>();
    if (MISTAKE != 1) out[threadIdx.x] = d[0];
}
