// More instructions of compute capability 9.0: blocks of a cluster, and blocks that wait for each other's results.
#ifndef HQQ_PTX_CLUSTER_CUH
#define HQQ_PTX_CLUSTER_CUH

#include "ptx_sm90.cuh"

HQQ_INLINE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrives at the barrier at the same address in block `rank` of the cluster. Tells it that this block has read what was
// copied to it, not that this block wrote anything.
HQQ_INLINE void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(barrier), "r"(rank)
        : "memory");
}

// A bulk copy to the same address in each block whose bit of `ranks` is set; counts at the barrier of each of them.
HQQ_INLINE void bulk_copy_to(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint32_t ranks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(ranks))
        : "memory");
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
