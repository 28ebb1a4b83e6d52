// The matrix products of ptx_sm90.cuh on the host: they are made when they are waited for, as late as they may.
#pragma once
#define HQQ_PTX_SM90_CUH

#include "ptx_on_host.h"

#include <algorithm>

namespace host {
// Rows and columns of a fragment's elements; pair: 0 .. 3; half: low or high.
inline int a_row(int l, int pair) { return l / 4 + 8 * (pair % 2); }
inline int a_column(int l, int pair, int half) { return l % 4 * 2 + half + 8 * (pair / 2); }

// Accumulators hold NaN while products into them are under way.
struct Accumulators {
    float* registers;
    std::vector<float> values;
    int pending;
};

struct Product {
    std::shared_ptr<Accumulators> sums;
    std::shared_ptr<std::vector<double>> a;  // [16, 16], the rows of the warp
    uint64_t descriptor;
    bool add;
    int n;
    int lane;
    double (*value)(uint32_t);
};

struct WgmmaIn {
    uint32_t a[4];
    uint64_t descriptor;
    int add;
};

// The 16-bit element (k, n) of the matrix that a descriptor stands for.
inline uint32_t element(Block& of, uint64_t descriptor, int k, int n) {
    const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
    const int mode = static_cast<int>(descriptor >> 62);
    uint32_t address;
    if (mode == 0) {
        address = start + n / 8 * stride + k / 8 * leading + n % 8 * 16 + k % 8 * 2;
    } else {
        const uint32_t row = 128u >> (mode - 1), chunks = row / 16;
        address = start + n / 8 * stride + n % 8 * row + 2 * k;
        address ^= (address >> 7 & (chunks - 1)) << 4;
    }
    uint16_t bits;
    std::memcpy(&bits, shared_pointer(of, address, 2, 2, "wgmma"), sizeof bits);
    return bits;
}

inline void compute(Block& of, Product& product) {
    std::vector<float>& sums = product.sums->values;
    for (int i = 0; i < product.n / 2; ++i) {
        const int row = product.lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + product.lane % 4 * 2 + i % 2;
        double sum = product.add ? sums[i] : 0.0;
        for (int k = 0; k < 16; ++k) sum += (*product.a)[16 * row + k] * product.value(element(of, product.descriptor, k, column));
        sums[i] = static_cast<float>(sum);
    }
    if (--product.sums->pending == 0) std::copy(sums.begin(), sums.end(), product.sums->registers);
}

inline std::shared_ptr<Accumulators> accumulators(float* d, int count) {
    for (auto& group : self->products) {
        for (Product& product : group) {
            if (product.sums->registers == d && product.sums->pending > 0) return product.sums;
        }
    }
    auto made = std::make_shared<Accumulators>(Accumulators{d, std::vector<float>(d, d + count), 0});
    std::fill(d, d + count, bits_as<float>(0x7fffffffu));
    return made;
}

// The products of this thread that are not committed yet.
inline std::vector<Product>& open_group() {
    if (self->products.size() == self->committed - self->completed) self->products.emplace_back();
    return self->products.back();
}

template <class T>
inline void start_product(float* d, int n, const WgmmaIn& in) {
    meet<Nothing>(0xffffffffu, "wgmma", in, [](Meeting& m) {
        auto a = std::make_shared<std::vector<double>>(256);
        WgmmaIn lane, first;
        std::memcpy(&first, m.in[0], sizeof first);
        for (int l = 0; l < WARP; ++l) {
            std::memcpy(&lane, m.in[l], sizeof lane);
            if (lane.descriptor != first.descriptor || lane.add != first.add) fail("wgmma: lane %d has another descriptor", l);
            for (int p = 0; p < 4; ++p) {
                for (int h = 0; h < 2; ++h) (*a)[16 * a_row(l, p) + a_column(l, p, h)] = half_of<T>(lane.a[p], h);
            }
        }
        block->parts[warp()] = a;
    });
    auto sums = accumulators(d, n / 2);
    ++sums->pending;
    open_group().push_back({sums, block->parts[warp()], in.descriptor, in.add != 0, n, lane(), value_of<T>});
}

// The four warps of a group make a product together: none has its part before all have asked for it.
inline void wait_for_products(size_t pending) {
    const size_t first = self->number / 128 * 128;
    if (first + 128 > block->fibers.size()) fail("wgmma in a warpgroup of fewer than four warps");
    const size_t target = self->committed - std::min(self->committed, pending);
    wait_until([&] {
        for (size_t i = first; i < first + 128; ++i) {
            if (block->fibers[i].committed < target) return false;
        }
        return true;
    });
    for (size_t i = first; i < first + 128; ++i) {
        Fiber& fiber = block->fibers[i];
        for (; fiber.completed < target; ++fiber.completed) {
            for (Product& product : fiber.products.front()) compute(*block, product);
            fiber.products.erase(fiber.products.begin());
        }
    }
    meet<Nothing>(0xffffffffu, "wgmma_wait", Nothing{}, [](Meeting&) {});
}

}  // namespace host

inline uint64_t wgmma_descriptor(uint32_t start) {
    return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 | (start & 0x3ffffu) >> 4;
}
inline void wgmma_fence() {}
inline void wgmma_commit() {
    host::open_group();
    ++host::self->committed;
    ++host::progress;
}
template <int PENDING>
inline void wgmma_wait() {
    host::wait_for_products(PENDING);
}
template <int COUNT>
inline void wgmma_touch(float (&)[COUNT]) {}

template <class T, int N>
struct Wgmma {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "N is a multiple of 8 up to 256");
    static void run(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, int add) {
        host::start_product<T>(d, N, {{a0, a1, a2, a3}, b, add});
    }
};
template <class T, int N>
inline void wgmma(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, int add = 1) {
    Wgmma<T, N>::run(d, a0, a1, a2, a3, b, add);
}
