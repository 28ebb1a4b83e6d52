// Each kernel shows one instruction, or one that needs others around it, in its barest use.
#include "ptx.cuh"

// out[16, 8] = a[16, 32] b[8, 32]^T + c of bytes, with fragments read as mma_m16n8k32 describes them.
extern "C" __global__ void product_of_bytes(int* out, const uint8_t* a, const int8_t* b, const int* c) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    auto four = [](const void* rows, int row, int k) { return static_cast<const uint32_t*>(rows)[8 * row + k / 4]; };
    int d[4];
    for (int i = 0; i < 4; ++i) d[i] = c[8 * (g + 8 * (i / 2)) + 2 * q + i % 2];
    mma_m16n8k32(d, four(a, g, 4 * q), four(a, g + 8, 4 * q), four(a, g, 4 * q + 16), four(a, g + 8, 4 * q + 16),
                 four(b, g, 4 * q), four(b, g, 4 * q + 16));
    for (int i = 0; i < 4; ++i) out[8 * (g + 8 * (i / 2)) + 2 * q + i % 2] = d[i];
}

extern "C" __global__ void larger(float* out, const float* a, const float* b) {
    out[threadIdx.x] = max_or_nan(a[threadIdx.x], b[threadIdx.x]);
}

// out[2, 128]: a, and the first words of b with zeros after them, by way of shared memory.
extern "C" __global__ void copies(uint32_t* out, const uint32_t* a, const uint32_t* b, int bytes) {
    HQQ_DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x;
    const uint32_t to = smem_u32(shared) + 16 * lane;
    cp_async16_zfill(to, a + 4 * lane, 16);
    cp_async_commit();
    cp_async16_zfill(to + 512, b + 4 * lane, min(max(bytes - 16 * lane, 0), 16));
    cp_async_commit();
    const auto put = [&](int half) {
        const uint4 v = *reinterpret_cast<const uint4*>(shared + 512 * half + 16 * (lane ^ 1));
        *reinterpret_cast<uint4*>(out + 128 * half + 4 * (lane ^ 1)) = v;
    };
    cp_async_wait<1>();
    __syncwarp();
    put(0);
    cp_async_wait<0>();
    __syncwarp();
    put(1);
}

// Rows of `out`: what each operation makes of a, b and c.
extern "C" __global__ void arithmetic(uint32_t* out, const uint32_t* a, const uint32_t* b, const uint32_t* c, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int row = 0;
    auto put = [&](uint32_t value) { out[n * row++ + i] = value; };
    put(hfma2<TYPE>(a[i], b[i], c[i]));
    put(hmul2<TYPE>(a[i], b[i]));
    put(pack2<TYPE>(__uint_as_float(a[i]), __uint_as_float(b[i])));
    put(__float_as_uint(low_float<TYPE>(a[i])));
    put(__float_as_uint(high_float<TYPE>(a[i])));
    put(prmt(a[i], b[i], c[i] & 0xffff));
    put(lop3<0xea>(a[i], b[i], c[i]));
    put(lop3<0x6a>(a[i], b[i], c[i]));
    put(__byte_perm(a[i], b[i], c[i]));
    put(__funnelshift_r(a[i], b[i], c[i] & 31));
    put(__popc(a[i]));
    put(__clz(a[i]));
    put(hneg2<TYPE>(a[i]));
    put(low_twice(a[i]));
    put(high_twice(a[i]));
}

// Rows of `out`, 64 threads: what the lanes of both warps get from each other.
extern "C" __global__ void shuffles(int* out, const int* in) {
    const int t = threadIdx.x, v = in[t];
    int row = 0;
    auto put = [&](int value) { out[64 * row++ + t] = value; };
    put(__shfl_xor_sync(0xffffffffu, v, 5));
    put(__shfl_xor_sync(0xffffffffu, v, 16, 8));
    put(__shfl_down_sync(0xffffffffu, v, 3));
    put(__shfl_down_sync(0xffffffffu, v, 3, 16));
    put(__shfl_up_sync(0xffffffffu, v, 2, 8));
    put(__shfl_sync(0xffffffffu, v, t + 1, 4));
    put(static_cast<int>(__ballot_sync(0xffffffffu, v & 1)));
    put(t % 32 < 16 ? __shfl_xor_sync(0x0000ffffu, v, 1) : __shfl_xor_sync(0xffff0000u, v, 2));
}

// One warp makes numbers, another adds one to them, in `rounds` rounds through named barriers.
extern "C" __global__ void two_warps(int* out, int rounds) {
    HQQ_SHARED(int, box, 32);
    const int lane = threadIdx.x % 32;
    for (int round = 0; round < rounds; ++round) {
        if (threadIdx.x < 32) {
            if (round > 0) bar_sync(2, 64);
            box[lane] = 100 * round + lane;
            bar_sync(1, 64);
        } else {
            bar_sync(1, 64);
            out[32 * round + lane] = box[lane] + 1;
            if (round + 1 < rounds) bar_sync(2, 64);
        }
    }
}

// A sum over the block in shared memory; WRONG leaves out what keeps the threads together.
extern "C" __global__ void block_sum(int* out, const int* in) {
    HQQ_SHARED(int, values, 128);
    values[threadIdx.x] = in[threadIdx.x];
#ifndef WRONG
    __syncthreads();
#endif
    int sum = 0;
    for (int i = 0; i < 128; ++i) sum += values[i];
    out[threadIdx.x] = sum;
}
