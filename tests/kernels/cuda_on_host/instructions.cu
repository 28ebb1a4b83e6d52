// Each kernel shows one instruction, or one that needs others around it, in its barest use.
#include "ptx.cuh"

// out[16, 8] = a[16, 16] b[8, 16]^T + c, with fragments read as mma_m16n8k16 describes them.
extern "C" __global__ void product(float* out, const uint16_t* a, const uint16_t* b, const float* c) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    auto pair = [](const uint16_t* rows, int row, int k) { return ldg32(rows + 16 * row + k); };
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = c[8 * (g + 8 * (i / 2)) + 2 * q + i % 2];
    mma_m16n8k16<TYPE>(d, pair(a, g, 2 * q), pair(a, g + 8, 2 * q), pair(a, g, 2 * q + 8), pair(a, g + 8, 2 * q + 8),
                       pair(b, g, 2 * q), pair(b, g, 2 * q + 8));
    for (int i = 0; i < 4; ++i) out[8 * (g + 8 * (i / 2)) + 2 * q + i % 2] = d[i];
}

// out[16, 8] = a[16, 32] b[8, 32]^T + c of bytes, with fragments read as mma_m16n8k32 describes them.
extern "C" __global__ void product_of_bytes(int* out, const uint8_t* a, const int8_t* b, const int* c) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    auto four = [](const void* rows, int row, int k) { return ldg32(static_cast<const uint8_t*>(rows) + 32 * row + k); };
    int d[4];
    for (int i = 0; i < 4; ++i) d[i] = c[8 * (g + 8 * (i / 2)) + 2 * q + i % 2];
    mma_m16n8k32(d, four(a, g, 4 * q), four(a, g + 8, 4 * q), four(a, g, 4 * q + 16), four(a, g + 8, 4 * q + 16),
                 four(b, g, 4 * q), four(b, g, 4 * q + 16));
    for (int i = 0; i < 4; ++i) out[8 * (g + 8 * (i / 2)) + 2 * q + i % 2] = d[i];
}

extern "C" __global__ void larger(float* out, const float* a, const float* b) {
    out[threadIdx.x] = max_or_nan(a[threadIdx.x], b[threadIdx.x]);
}

// out[16, 8] = a[16, 16] b[8, 16]^T + c with operands that come through shared memory, by cp.async and ldmatrix.
extern "C" __global__ void product_from_shared(float* out, const uint16_t* a, const uint16_t* b, const float* c) {
    HQQ_DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
    const uint32_t base = smem_u32(shared);
    cp_async16(base + 16 * lane, a + 8 * lane);
    cp_async_commit();
    cp_async16_zfill(base + 512 + 16 * lane, b + 8 * (lane % 16), lane < 16 ? 16 : 0);
    cp_async_commit();
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = c[8 * (g + 8 * (i / 2)) + 2 * q + i % 2];
    uint32_t fa[4], fb[4];
    cp_async_wait<1>();
    __syncwarp();
    ldmatrix_x4(fa, base + 32 * (lane % 16) + 16 * (lane / 16));
    cp_async_wait<0>();
    __syncwarp();
    ldmatrix_x4(fb, base + 512 + 32 * (lane % 8) + 16 * (lane / 8 % 2) + (lane / 16) * 256);
    mma_m16n8k16<TYPE>(d, fa[0], fa[1], fa[2], fa[3], fb[0], fb[1]);
    // The rows after b are the zeros that were filled in.
    for (int i = 0; i < 4; ++i) out[8 * (g + 8 * (i / 2)) + 2 * q + i % 2] = d[i] + __uint_as_float(fb[2] | fb[3]);
}

// out[8 matrices of 8x8]: four as they are loaded, four transposed.
extern "C" __global__ void matrices(uint32_t* out, const uint16_t* in) {
    HQQ_SHARED(uint16_t, rows, 4 * 64);
    for (int i = threadIdx.x; i < 4 * 64; i += 32) rows[i] = in[i];
    __syncwarp();
    uint32_t r[4], t[4];
    const uint32_t row = smem_u32(rows) + 16 * threadIdx.x;
    ldmatrix_x4(r, row);
    ldmatrix_x4_trans(t, row);
    for (int i = 0; i < 4; ++i) {
        out[32 * i + threadIdx.x] = r[i];
        out[32 * (4 + i) + threadIdx.x] = t[i];
    }
}

// Rows of `out`: what each operation makes of a, b and c.
extern "C" __global__ void arithmetic(uint32_t* out, const uint32_t* a, const uint32_t* b, const uint32_t* c, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int row = 0;
    auto put = [&](uint32_t value) { out[n * row++ + i] = value; };
    put(hfma2<TYPE>(a[i], b[i], c[i]));
    put(hmul2<TYPE>(a[i], b[i]));
    put(hadd2<TYPE>(a[i], b[i]));
    put(hsub2<TYPE>(a[i], b[i]));
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
            bar_arrive(1, 64);
        } else {
            bar_sync(1, 64);
            out[32 * round + lane] = box[lane] + 1;
            if (round + 1 < rounds) bar_arrive(2, 64);
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
