// What CUDA C++ has beyond C++: keywords, vector types and the intrinsics that the kernels use.
#pragma once

#include "block.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
// Blocks run side by side, so a block's variables need a place each: HQQ_SHARED instead.
#define __shared__ static_assert(false, "shared variables of fixed size are declared by HQQ_SHARED here")
#define __constant__ static
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define HQQ_INLINE inline

constexpr int warpSize = 32;

#define HOST_VECTORS(NAME, T)                                               \
    struct __align__(2 * sizeof(T)) NAME##2 {                               \
        T x, y;                                                             \
    };                                                                      \
    struct __align__(4 * sizeof(T)) NAME##4 {                               \
        T x, y, z, w;                                                       \
    };                                                                      \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }              \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HOST_VECTORS(int, int)
HOST_VECTORS(uint, unsigned)
HOST_VECTORS(float, float)
HOST_VECTORS(ushort, unsigned short)
#undef HOST_VECTORS

template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) ? T(b) : T(a);
}

template <class To, class From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return bits_as<int>(v); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t(a) * b) >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(((uint64_t(high) << 32) | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((((uint64_t(high) << 32) | low) << (shift & 31)) >> 32);
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

template <class T>
inline T __ldg(const T* p) {
    return *p;
}

// Fibers give way only where they wait, so every access is atomic.
template <class T>
inline T atomicAdd(T* p, std::common_type_t<T> v) {
    T old = *p;
    *p = old + v;
    ++host::progress;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncthreads() {
    host::arrive_and_wait(host::block->barriers[0], static_cast<int>(host::block->fibers.size()), "__syncthreads");
}

struct Nothing {};
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    host::meet<Nothing>(mask, "__syncwarp", Nothing{}, [](host::Meeting&) {});
}

struct Pick {
    uint64_t value;
    int from;  // the lane whose value is wanted
};

template <class T>
inline T shuffle(uint32_t mask, const char* what, T value, int from) {
    static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
    Pick in{0, from};
    std::memcpy(&in.value, &value, sizeof value);
    uint64_t out = host::meet<uint64_t>(mask, what, in, [mask, what](host::Meeting& m) {
        for (int l = 0; l < host::WARP; ++l) {
            if (!(mask >> l & 1)) continue;
            Pick own, other;
            std::memcpy(&own, m.in[l], sizeof own);
            if (!(mask >> own.from & 1)) host::fail("%s: lane %d reads from lane %d, which is not in the mask", what, l, own.from);
            std::memcpy(&other, m.in[own.from], sizeof other);
            std::memcpy(m.out[l], &other.value, sizeof other.value);
        }
    });
    T result;
    std::memcpy(&result, &out, sizeof result);
    return result;
}

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
    const int base = host::lane() & ~(width - 1);
    return shuffle(mask, "__shfl_sync", value, base + (from & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int other, int width = 32) {
    const int from = host::lane() ^ other;
    // Lanes of later segments are out of reach.
    return shuffle(mask, "__shfl_xor_sync", value, from >= (host::lane() & ~(width - 1)) + width ? host::lane() : from);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32) {
    const int l = host::lane(), from = l + static_cast<int>(by);
    return shuffle(mask, "__shfl_down_sync", value, from >= (l & ~(width - 1)) + width ? l : from);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32) {
    const int l = host::lane(), from = l - static_cast<int>(by);
    return shuffle(mask, "__shfl_up_sync", value, from < (l & ~(width - 1)) ? l : from);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    const uint32_t own = predicate != 0;
    return host::meet<uint32_t>(mask, "__ballot_sync", own, [mask](host::Meeting& m) {
        uint32_t all = 0, one;
        for (int l = 0; l < host::WARP; ++l) {
            std::memcpy(&one, m.in[l], sizeof one);
            if (mask >> l & 1) all |= one << l;
        }
        for (auto& out : m.out) std::memcpy(out, &all, sizeof all);
    });
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
