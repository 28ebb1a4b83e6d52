// The names of hqq/kernels/cuda/ptx.cuh on the host. Included first, under that header's guard, so that it stays away.
#pragma once
#define HQQ_PTX_CUH

#include "language.h"
#include "numbers.h"

#define HQQ_DYNAMIC_SHARED(name) unsigned char* const name = host::block->shared
// The key is another one in every function and every instance of a template.
#define HQQ_SHARED(type, name, count)                                        \
    static const char name##_key = 0;                                        \
    type(&name)[count] = *reinterpret_cast<type(*)[count]>(                  \
        host::shared_variable(&name##_key, sizeof(type) * (count), 16))

inline uint32_t smem_u32(const void* pointer) { return host::shared_address(pointer); }
inline uint64_t evict_first_policy() { return 1; }

namespace host {
template <class V>
inline V load(const void* p, const char* what) {
    aligned(p, sizeof(V), what);
    V value;
    std::memcpy(&value, p, sizeof value);
    return value;
}
}  // namespace host

inline uint4 ldg128(const void* p) { return host::load<uint4>(p, "ldg128"); }
inline uint4 ldg128_stream(const void* p) { return host::load<uint4>(p, "ldg128_stream"); }
inline uint4 ldg128_stream(const void* p, uint64_t) { return host::load<uint4>(p, "ldg128_stream"); }
inline uint2 ldg64(const void* p) { return host::load<uint2>(p, "ldg64"); }
inline uint32_t ldg16(const void* p) { return host::load<uint16_t>(p, "ldg16"); }
inline void stg128_stream(void* p, uint4 v) {
    host::aligned(p, 16, "stg128_stream");
    std::memcpy(p, &v, sizeof v);
}

// ---- asynchronous copies: the bytes arrive when they are waited for, as late as they may ----------------------------
inline void cp_async16_zfill(uint32_t to, const void* from, uint32_t bytes) {
    host::aligned(from, 16, "cp_async16_zfill");
    if (bytes > 16) host::fail("cp_async16_zfill of %u bytes", bytes);
    unsigned char* target = host::shared_pointer(*host::block, to, 16, 16, "cp_async16_zfill");
    std::memset(target, host::POISON, 16);
    if (host::self->groups.empty()) host::self->groups.emplace_back();
    host::self->groups.back().push_back({target, from, bytes, 16});
}
inline void cp_async_commit() {
    if (host::self->groups.empty()) host::self->groups.emplace_back();
    host::self->groups.emplace_back();
}
template <int PENDING>
inline void cp_async_wait() {
    auto& groups = host::self->groups;
    while (groups.size() > PENDING + 1) {  // the last one is open
        for (const host::Copy& copy : groups.front()) host::finish(copy);
        groups.pop_front();
    }
}

// ---- barriers -------------------------------------------------------------------------------------------------------
namespace host {
inline Barrier& named_barrier(int id, int threads) {
    if (id < 1 || id > 15 || threads % WARP) fail("barrier %d of %d threads", id, threads);
    return block->barriers[id];
}
}  // namespace host
inline void bar_sync(int id, int threads) { host::arrive_and_wait(host::named_barrier(id, threads), threads, "bar_sync"); }

// ---- matrices -------------------------------------------------------------------------------------------------------
namespace host {
struct MmaIn {
    uint32_t a[4], b[2];
    int32_t d[4];
};
struct MmaOut {
    int32_t d[4];
};
}  // namespace host

inline void mma_m16n8k32(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const host::MmaIn in{{a0, a1, a2, a3}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
    const auto out = host::meet<host::MmaOut>(0xffffffffu, "mma_m16n8k32", in, [](host::Meeting& m) {
        uint8_t a[16][32];
        int8_t b[32][8];
        host::MmaIn lane;
        for (int l = 0; l < host::WARP; ++l) {
            std::memcpy(&lane, m.in[l], sizeof lane);
            for (int byte = 0; byte < 4; ++byte) {
                const int k = l % 4 * 4 + byte;
                for (int p = 0; p < 4; ++p) a[l / 4 + 8 * (p % 2)][k + 16 * (p / 2)] = lane.a[p] >> (8 * byte) & 0xff;
                for (int p = 0; p < 2; ++p) b[k + 16 * p][l / 4] = static_cast<int8_t>(lane.b[p] >> (8 * byte) & 0xff);
            }
        }
        for (int l = 0; l < host::WARP; ++l) {
            std::memcpy(&lane, m.in[l], sizeof lane);
            host::MmaOut sums;
            for (int i = 0; i < 4; ++i) {
                const int row = l / 4 + 8 * (i / 2), column = l % 4 * 2 + i % 2;
                int64_t sum = lane.d[i];
                for (int k = 0; k < 32; ++k) sum += int64_t(a[row][k]) * b[k][column];
                if (sum != static_cast<int32_t>(sum)) host::fail("mma_m16n8k32: the sum %lld overflows", (long long)sum);
                sums.d[i] = static_cast<int32_t>(sum);
            }
            std::memcpy(m.out[l], &sums, sizeof sums);
        }
    });
    std::memcpy(d, out.d, sizeof d);
}

// ---- single floats --------------------------------------------------------------------------------------------------
inline float max_or_nan(float a, float b) { return a != a || b != b ? std::nanf("") : std::max(a, b); }

// ---- pairs of 16-bit floats -----------------------------------------------------------------------------------------
template <class T>
inline uint32_t pack2(float low, float high) {
    return host::bits_of<T>(low) | host::bits_of<T>(high) << 16;
}
template <class T>
inline float low_float(uint32_t pair) {
    return static_cast<float>(host::half_of<T>(pair, 0));
}
template <class T>
inline float high_float(uint32_t pair) {
    return static_cast<float>(host::half_of<T>(pair, 1));
}
template <class T>
inline uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
    return host::fma16<T>(a & 0xffff, b & 0xffff, c & 0xffff) | host::fma16<T>(a >> 16, b >> 16, c >> 16) << 16;
}
template <class T>
inline uint32_t hmul2(uint32_t a, uint32_t b) {
    return hfma2<T>(a, b, 0x80008000u);
}
template <class T>
inline uint32_t hneg2(uint32_t a) {
    return a ^ 0x80008000u;
}
inline uint32_t low_twice(uint32_t pair) { return pair << 16 | (pair & 0xffff); }
inline uint32_t high_twice(uint32_t pair) { return pair >> 16 | (pair & 0xffff0000u); }

// ---- bits -----------------------------------------------------------------------------------------------------------
template <int TABLE>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int entry = 0; entry < 8; ++entry) {
        if (TABLE >> entry & 1) d |= (entry & 4 ? a : ~a) & (entry & 2 ? b : ~b) & (entry & 1 ? c : ~c);
    }
    return d;
}
inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = selector >> (4 * i) & 15;
        uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        d |= byte << (8 * i);
    }
    return d;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) { return prmt(low, high, selector & 0x7777); }
inline uint32_t opaque(uint32_t value) { return value; }
template <class V>
inline V* opaque(V* pointer) {
    return pointer;
}

inline void pdl_wait() {}
inline void pdl_launch() {}
