// As instructions.cu, for blocks that work together.
#include "ptx_cluster.cuh"

// Two blocks of a cluster fetch halves of `pieces` pieces of 64 words, each half for both blocks. out[block][piece][64].
extern "C" __global__ void multicast(uint32_t* out, const uint32_t* in, int pieces) {
    HQQ_DYNAMIC_SHARED(shared);
    HQQ_SHARED(uint64_t, barriers, 2);
    const uint32_t full = smem_u32(barriers), empty = full + 8, rank = blockIdx.x % 2;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(empty, 2);
        mbarrier_init_fence();
    }
    cluster_sync();
    for (int piece = 0; piece < pieces; ++piece) {
        if (threadIdx.x == 0) {
            // Both blocks have read the piece before.
            mbarrier_wait(empty, piece % 2 ^ 1);
            mbarrier_arrive_expect(full, 256);
            bulk_copy_to(smem_u32(shared) + 128 * rank, in + 64 * piece + 32 * rank, 128, full, 3);
        }
        mbarrier_wait(full, piece % 2);
        const uint32_t* words = reinterpret_cast<const uint32_t*>(shared);
        out[(blockIdx.x * pieces + piece) * 64 + threadIdx.x] = words[threadIdx.x];
        __syncthreads();
        if (threadIdx.x < 2) mbarrier_arrive_at(empty, threadIdx.x);
    }
    cluster_sync();
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
