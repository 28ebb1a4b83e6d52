// The instructions of compute capability 9.0 (sm_90a): warpgroup matrix products, transaction barriers, bulk copies.
#ifndef HQQ_PTX_SM90_CUH
#define HQQ_PTX_SM90_CUH

#include "ptx.cuh"

// ---- transaction barriers in shared memory (8 bytes, aligned to 8) ----------------------------------------------
HQQ_INLINE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to asynchronous copies; the block synchronises after it.
HQQ_INLINE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

HQQ_INLINE void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase end only when `bytes` more have been copied.
HQQ_INLINE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity: 0 for the first phase, then 1, 0, ...
HQQ_INLINE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "retry:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra retry;\n"
        "}" ::"r"(barrier), "r"(parity)
        : "memory");
}

// ---- bulk copies: addresses and bytes are multiples of 16; counts as `bytes` at the barrier ------------------------
HQQ_INLINE void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

HQQ_INLINE void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
                 "%4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

// Orders this thread's plain accesses to shared memory before later ones of bulk copies and wgmma.
HQQ_INLINE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers of a warpgroup (multiples of 8, every warp of it takes part) ----------------------------------------
template <int COUNT>
HQQ_INLINE void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
HQQ_INLINE void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- matrix products of a warpgroup -----------------------------------------------------------------------------
// Descriptor of B: N rows of 64 16-bit elements along k (128 bytes), row n at 128 n bytes of `start`, rows in the
// 128-byte swizzle: the 16-byte chunk at byte address a lies at a ^ ((a >> 7 & 7) << 4). `start` of the rows: a multiple
// of 1024; plus 32 bytes for each further 16 of k within the 64.
HQQ_INLINE uint64_t wgmma_descriptor(uint32_t start) {
    return (uint64_t(1) << 62) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 16) | ((start & 0x3ffffu) >> 4);
}

// Before the first product, and when registers of products (d, a) were written since.
HQQ_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

HQQ_INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns when at most `PENDING` of the latest groups are still under way.
template <int PENDING>
HQQ_INLINE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accesses of accumulators across this line; for around wgmma_wait.
template <int COUNT>
HQQ_INLINE void wgmma_touch(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d[64, N] = (add ? d : 0) + a[64, 16] b[16, N], asynchronously; b transposed, by its descriptor, is N rows of k.
// Warp w of the four has rows 16w to 16w+15; in them a is as in mma.m16n8k16, and d[4 j ...] is its d of columns 8j to
// 8j+7.
template <class T, int N>
struct Wgmma;

// clang-format off
#define HQQ_D4 "%0, %1, %2, %3"
#define HQQ_D8 HQQ_D4 ", %4, %5, %6, %7"
#define HQQ_D12 HQQ_D8 ", %8, %9, %10, %11"
#define HQQ_D16 HQQ_D12 ", %12, %13, %14, %15"
#define HQQ_D20 HQQ_D16 ", %16, %17, %18, %19"
#define HQQ_D24 HQQ_D20 ", %20, %21, %22, %23"
#define HQQ_D32 HQQ_D24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define HQQ_D40 HQQ_D32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define HQQ_D48 HQQ_D40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define HQQ_D64 HQQ_D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HQQ_D80 HQQ_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define HQQ_D96 HQQ_D80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define HQQ_D128 HQQ_D96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
    "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define HQQ_O4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define HQQ_O8 HQQ_O4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define HQQ_O12 HQQ_O8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define HQQ_O16 HQQ_O12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define HQQ_O20 HQQ_O16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define HQQ_O24 HQQ_O20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define HQQ_O32 \
    HQQ_O24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), \
    "+f"(d[31])
#define HQQ_O40 \
    HQQ_O32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), \
    "+f"(d[39])
#define HQQ_O48 \
    HQQ_O40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), \
    "+f"(d[47])
#define HQQ_O64 \
    HQQ_O48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), \
    "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
    "+f"(d[63])
#define HQQ_O80 \
    HQQ_O64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), \
    "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), \
    "+f"(d[79])
#define HQQ_O96 \
    HQQ_O80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), \
    "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), \
    "+f"(d[95])
#define HQQ_O128 \
    HQQ_O96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), \
    "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), \
    "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), \
    "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), \
    "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

#define HQQ_WGMMA_OF(TYPE, PTX, N, R, A0, A1, A2, A3, B, ADD)                                                      \
    template <>                                                                                                    \
    struct Wgmma<TYPE, N> {                                                                                        \
        static HQQ_INLINE void run(float (&d)[R], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b,  \
                                   int add) {                                                                      \
            asm volatile("{.reg .pred p; setp.ne.b32 p, %" #ADD ", 0;\n"                                           \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX " {" HQQ_D##R "}, "         \
                         "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 0;}\n"                       \
                         : HQQ_O##R                                                                                \
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add));                                  \
        }                                                                                                          \
    };

#define HQQ_WGMMA(...) HQQ_WGMMA_OF(F16, "f16", __VA_ARGS__) HQQ_WGMMA_OF(BF16, "bf16", __VA_ARGS__)

HQQ_WGMMA(8, 4, 4, 5, 6, 7, 8, 9)
HQQ_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
HQQ_WGMMA(24, 12, 12, 13, 14, 15, 16, 17)
HQQ_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
HQQ_WGMMA(40, 20, 20, 21, 22, 23, 24, 25)
HQQ_WGMMA(48, 24, 24, 25, 26, 27, 28, 29)
HQQ_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
HQQ_WGMMA(80, 40, 40, 41, 42, 43, 44, 45)
HQQ_WGMMA(96, 48, 48, 49, 50, 51, 52, 53)
HQQ_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
HQQ_WGMMA(160, 80, 80, 81, 82, 83, 84, 85)
HQQ_WGMMA(192, 96, 96, 97, 98, 99, 100, 101)
HQQ_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)
// clang-format on

template <class T, int N>
HQQ_INLINE void wgmma(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, int add = 1) {
    Wgmma<T, N>::run(d, a0, a1, a2, a3, b, add);
}

#endif
