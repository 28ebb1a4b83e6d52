// As instructions.cu, for blocks that work together.
#include "ptx_cluster.cuh"

// Four blocks of a cluster send their rows of 128 floats to each other: out[block] is the sum of the cluster's.
extern "C" __global__ void cluster_sum(float* out, const float* in) {
    HQQ_DYNAMIC_SHARED(shared);
    HQQ_SHARED(uint64_t, barriers, 1);
    const uint32_t barrier = smem_u32(barriers), rank = blockIdx.x % 4, t = threadIdx.x;
    if (t == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_arrive_expect(barrier, 4 * 512);
        mbarrier_init_fence();
    }
    __syncwarp();
    cluster_arrive();
    const float4 own = *reinterpret_cast<const float4*>(in + 128 * blockIdx.x + 4 * t);
    cluster_wait();
    for (uint32_t to = 0; to < 4; ++to) store_at(smem_u32(shared) + 512 * rank + 16 * t, to, own, barrier);
    mbarrier_wait_cluster(barrier, 0);
    for (int i = t; i < 128; i += 32) {
        float sum = 0.0f;
        for (int from = 0; from < 4; ++from) sum += reinterpret_cast<const float*>(shared)[128 * from + i];
        out[128 * blockIdx.x + i] = sum;
    }
}

// sums[0] = in[0], sums[b] = sums[b - 1] + in[b], rows of 128 floats: every block waits for the one before it.
extern "C" __global__ void chain(float* sums, int* flags, const float* in) {
    const int b = blockIdx.x, t = threadIdx.x;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (b > 0) {
        if (t == 0) {
            while (load_acquire(flags + b - 1) != 7) {}
        }
        __syncwarp();
        sum = load_shared_result(sums + 128 * (b - 1) + 4 * t);
    }
    const float4 own = *reinterpret_cast<const float4*>(in + 128 * b + 4 * t);
    *reinterpret_cast<float4*>(sums + 128 * b + 4 * t) =
        make_float4(sum.x + own.x, sum.y + own.y, sum.z + own.z, sum.w + own.w);
    __threadfence();
    __syncwarp();
    if (t == 0) store_release(flags + b, 7);
}

// Four matrices of 8x8, given as fragments, stored as their transposes.
extern "C" __global__ void store_matrices(uint16_t* out, const uint32_t* in) {
    HQQ_SHARED(uint16_t, rows, 4 * 64);
    const int t = threadIdx.x;
    stmatrix_x4_trans(smem_u32(rows) + 16 * t, in[t], in[32 + t], in[64 + t], in[96 + t]);
    __syncwarp();
    for (int i = t; i < 4 * 64; i += 32) out[i] = rows[i];
}
