// More instructions of compute capability 9.0: blocks of a cluster, and blocks that wait for each other's results.
#ifndef HQQ_PTX_CLUSTER_CUH
#define HQQ_PTX_CLUSTER_CUH

#include "ptx_sm90.cuh"

// A barrier of all threads of a cluster, in two steps. Of what was done before arriving, only mbarrier_init_fence() is
// sure to be seen after waiting: a release takes microseconds.
HQQ_INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
HQQ_INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Stores to the same address in block `rank` of the cluster, asynchronously; counts 16 bytes at the barrier there.
HQQ_INLINE void store_at(uint32_t to, uint32_t rank, float4 v, uint32_t barrier) {
    asm volatile(
        "{\n"
        ".reg .b32 there, counted;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mapa.shared::cluster.u32 counted, %6, %1;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%2, %3, %4, %5}, [counted];\n"
        "}" ::"r"(to), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
        : "memory");
}

// As mbarrier_wait, for what other blocks of the cluster stored.
HQQ_INLINE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "retry:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra retry;\n"
        "}" ::"r"(barrier), "r"(parity)
        : "memory");
}

// Arrives at the barrier that others of the block wait for by bar_sync, and goes on.
HQQ_INLINE void bar_arrive(int barrier, int threads) {
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

HQQ_INLINE void store_release(int* p, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

HQQ_INLINE int load_acquire(const int* p) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}

// Past L1: what another block wrote.
HQQ_INLINE float4 load_shared_result(const void* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// Four 8x8 matrices, each stored as its transpose; lanes 8i to 8i+7 give the row addresses of matrix i.
HQQ_INLINE void stmatrix_x4_trans(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

#endif
