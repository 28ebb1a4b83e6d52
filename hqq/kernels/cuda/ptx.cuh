// Every machine instruction that the kernels spell out, under one name each. Kernels use these and plain CUDA C++ only,
// so that another header with the same names (and include guard) can run them elsewhere, as the tests do on the host.
#ifndef HQQ_PTX_CUH
#define HQQ_PTX_CUH

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#define HQQ_INLINE __device__ __forceinline__
// The block's dynamic shared memory; aligned for the 128-byte swizzle of wgmma.
#define HQQ_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
// An array of the block of a size that the compiler knows.
#define HQQ_SHARED(type, name, count) __shared__ __align__(16) type name[count]

// The two 16-bit types, as template arguments. Two values share a 32-bit word, the first in the low half.
struct F16 {};
struct BF16 {};

// ---- addresses and global memory --------------------------------------------------------------------------------
HQQ_INLINE uint32_t smem_u32(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// An L2 policy for data that is read once.
HQQ_INLINE uint64_t evict_first_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Read-only loads (volatile, so that they stay where they are written). `stream`: past L1; with a policy: for L2 too.
HQQ_INLINE uint4 ldg128(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

HQQ_INLINE uint4 ldg128_stream(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

HQQ_INLINE uint4 ldg128_stream(const void* p, uint64_t policy) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(policy));
    return v;
}

HQQ_INLINE uint2 ldg64(const void* p) {
    uint2 v;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

HQQ_INLINE uint32_t ldg16(const void* p) {
    uint16_t v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}

// Stores of data that this kernel does not read again.
HQQ_INLINE void stg128_stream(void* p, uint4 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ---- asynchronous copies to shared memory -----------------------------------------------------------------------
// 16 bytes, both addresses multiples of 16, past L1: the first `bytes` (0 to 16) from memory, zeros after them.
HQQ_INLINE void cp_async16_zfill(uint32_t to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

HQQ_INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most `PENDING` of this thread's latest groups are still under way.
template <int PENDING>
HQQ_INLINE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- barriers ---------------------------------------------------------------------------------------------------
// Barriers 1 to 15 of a block (0 is __syncthreads); `threads` counts whole warps.
HQQ_INLINE void bar_sync(int barrier, int threads) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- matrices ---------------------------------------------------------------------------------------------------
// d[16, 8] += a[16, 32] b[32, 8] of bytes, a without signs and b with; a register has four neighbours of a row of a or a
// column of b. With g = lane / 4, c = lane % 4: d = (g, 2c), (g, 2c+1), (g+8, 2c), (g+8, 2c+1);
// a0 = (g, 4c..), a1 = (g+8, 4c..), a2 = (g, 4c+16..), a3 = (g+8, 4c+16..); b0 = (4c.., g), b1 = (4c+16.., g).
HQQ_INLINE void mma_m16n8k32(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- single floats ----------------------------------------------------------------------------------------------
// The larger one; NaN if either is.
HQQ_INLINE float max_or_nan(float a, float b) {
    float value;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
}

// ---- pairs of 16-bit floats -------------------------------------------------------------------------------------
// Two floats rounded to nearest even, the first in the low half.
template <class T>
HQQ_INLINE uint32_t pack2(float low, float high);

template <>
HQQ_INLINE uint32_t pack2<F16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <>
HQQ_INLINE uint32_t pack2<BF16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The halves of a word as floats, exactly.
template <class T>
HQQ_INLINE float low_float(uint32_t pair);
template <class T>
HQQ_INLINE float high_float(uint32_t pair);

template <>
HQQ_INLINE float low_float<F16>(uint32_t pair) {
    float value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(pair));
    return value;
}

template <>
HQQ_INLINE float high_float<F16>(uint32_t pair) {
    float value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(pair));
    return value;
}

template <>
HQQ_INLINE float low_float<BF16>(uint32_t pair) {
    return __uint_as_float(pair << 16);
}

template <>
HQQ_INLINE float high_float<BF16>(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

// a * b + c, rounded once, in both halves.
template <class T>
HQQ_INLINE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c);

template <>
HQQ_INLINE uint32_t hfma2<F16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

template <>
HQQ_INLINE uint32_t hfma2<BF16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// bf16 has no other arithmetic before compute capability 9.0; a product plus -0 rounds the same.
template <class T>
HQQ_INLINE uint32_t hmul2(uint32_t a, uint32_t b);
template <class T>
HQQ_INLINE uint32_t hneg2(uint32_t a);

template <>
HQQ_INLINE uint32_t hmul2<F16>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

template <>
HQQ_INLINE uint32_t hmul2<BF16>(uint32_t a, uint32_t b) {
    return hfma2<BF16>(a, b, 0x80008000u);
}

template <>
HQQ_INLINE uint32_t hneg2<F16>(uint32_t a) {
    uint32_t d;
    asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

template <>
HQQ_INLINE uint32_t hneg2<BF16>(uint32_t a) {
    uint32_t d;
    asm("neg.bf16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// One half of a pair, twice. Written like this they cost nothing where arithmetic on pairs takes them.
HQQ_INLINE uint32_t low_twice(uint32_t pair) {
    uint32_t d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(d) : "r"(pair));
    return d;
}

HQQ_INLINE uint32_t high_twice(uint32_t pair) {
    uint32_t d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(d) : "r"(pair));
    return d;
}

// ---- bits -------------------------------------------------------------------------------------------------------
// Any function of three bits: bit 4a + 2b + c of TABLE; for instance (0xf0 & 0xcc) | 0xaa is (a & b) | c.
template <int TABLE>
HQQ_INLINE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return d;
}

// Byte i of the result: byte (selector >> 4 i) & 7 of low (0-3) and high (4-7); bit 3 of the nibble: its sign repeated.
HQQ_INLINE uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
    return d;
}

// The value, of which the compiler knows nothing more.
HQQ_INLINE uint32_t opaque(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

template <class V>
HQQ_INLINE V* opaque(V* pointer) {
    asm volatile("" : "+l"(pointer));
    return pointer;
}

// ---- overlapping kernels ----------------------------------------------------------------------------------------
// Waits until the kernels before this one have ended and their writes are visible; nothing to wait for before 9.0.
HQQ_INLINE void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start once every block has said so or ended.
HQQ_INLINE void pdl_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
