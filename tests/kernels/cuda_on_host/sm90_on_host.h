// The names of hqq/kernels/cuda/ptx_sm90.cuh and ptx_cluster.cuh on the host.
#pragma once
#define HQQ_PTX_SM90_CUH
#define HQQ_PTX_CLUSTER_CUH

#include "ptx_on_host.h"

#include <algorithm>

namespace host {

// ---- transaction barriers: copies arrive when somebody waits for them, as late as they may --------------------------
inline TransactionBarrier& transaction_barrier(Block& of, uint32_t address, const char* what) {
    shared_pointer(of, address, 8, 8, what);
    auto found = of.transactions.find(address);
    if (found == of.transactions.end()) fail("%s: no barrier was initialised at shared address %u", what, address);
    return found->second;
}

inline void end_phase_if_done(TransactionBarrier& barrier) {
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.missing = barrier.expected;
    ++barrier.phase;
    ++progress;
}

inline void arrive(TransactionBarrier& barrier, uint32_t bytes) {
    if (barrier.missing == 0) fail("more arrivals at a barrier than its %d", barrier.expected);
    barrier.bytes += bytes;
    --barrier.missing;
    ++progress;
    end_phase_if_done(barrier);
}

inline void settle(TransactionBarrier& barrier) {
    if (barrier.copies.empty()) return;
    for (const Copy& copy : barrier.copies) {
        finish(copy);
        barrier.bytes -= copy.bytes;
    }
    barrier.copies.clear();
    end_phase_if_done(barrier);
}

inline void wait_for_phase(uint32_t address, uint32_t parity, const char* what) {
    TransactionBarrier& barrier = transaction_barrier(*block, address, what);
    wait_until([&barrier, parity] {
        if ((barrier.phase & 1) == parity) settle(barrier);
        return (barrier.phase & 1) != parity;
    });
}

inline Block& block_of_cluster(uint32_t rank, const char* what) {
    for (auto& of : resident) {
        if (of && of->cluster == block->cluster && of->rank == static_cast<int>(rank)) {
            if (of->live == 0) fail("%s: block %u of the cluster has ended", what, rank);
            return *of;
        }
    }
    fail("%s: the cluster has no block %u", what, rank);
}

inline void start_copy(Block& of, uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    aligned(from, 16, "bulk_copy");
    if (bytes % 16 || bytes == 0) fail("bulk_copy of %u bytes", bytes);
    unsigned char* target = shared_pointer(of, to, bytes, 16, "bulk_copy");
    std::memset(target, POISON, bytes);
    transaction_barrier(of, barrier, "bulk_copy").copies.push_back({target, from, bytes, bytes});
}

// ---- matrix products ------------------------------------------------------------------------------------------------
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

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    host::shared_pointer(*host::block, barrier, 8, 8, "mbarrier_init");
    const int count = static_cast<int>(arrivals);
    host::block->transactions[barrier] = {count, count, 0, 0, {}};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    host::arrive(host::transaction_barrier(*host::block, barrier, "mbarrier_arrive_expect"), bytes);
}
inline void mbarrier_arrive(uint32_t barrier) {
    host::arrive(host::transaction_barrier(*host::block, barrier, "mbarrier_arrive"), 0);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { host::wait_for_phase(barrier, parity, "mbarrier_wait"); }

inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    host::start_copy(*host::block, to, from, bytes, barrier);
}
inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t) {
    host::start_copy(*host::block, to, from, bytes, barrier);
}
inline void fence_async_proxy() {}

template <int COUNT>
inline void more_registers() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "registers come in eights");
}
template <int COUNT>
inline void fewer_registers() {
    more_registers<COUNT>();
}

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

// ---- clusters, and blocks that wait for each other ------------------------------------------------------------------
inline void cluster_sync() {
    host::Cluster& cluster = *host::block->cluster;
    host::arrive_and_wait(cluster.barrier, cluster.size * static_cast<int>(host::block->fibers.size()), "cluster_sync");
}
inline void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
    host::Block& of = host::block_of_cluster(rank, "mbarrier_arrive_at");
    host::arrive(host::transaction_barrier(of, barrier, "mbarrier_arrive_at"), 0);
}
inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }
inline void bulk_copy_to(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint32_t ranks) {
    for (uint32_t rank = 0; ranks >> rank; ++rank) {
        if (ranks >> rank & 1) host::start_copy(host::block_of_cluster(rank, "bulk_copy_to"), to, from, bytes, barrier);
    }
}
inline void store_release(int* p, int value) {
    *p = value;
    ++host::progress;
}
inline int load_acquire(const int* p) {
    host::yield();
    // A loop that keeps seeing the same value makes no progress.
    if (host::self->polled != p || host::self->polled_value != *p) ++host::progress;
    host::self->polled = p;
    host::self->polled_value = *p;
    return *p;
}
inline float4 load_shared_result(const void* p) { return host::load<float4>(p, "load_shared_result"); }

inline void stmatrix_x4_trans(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    struct In {
        uint32_t row, word[4];
    };
    host::meet<Nothing>(0xffffffffu, "stmatrix_x4_trans", In{row, {a, b, c, d}}, [](host::Meeting& m) {
        In lane, owner;
        for (int l = 0; l < host::WARP; ++l) {
            std::memcpy(&lane, m.in[l], sizeof lane);
            for (int e = 0; e < 8; ++e) {
                // Element (i, j) of matrix l / 8 is held by lane 4 i + j / 2; row l % 8 of the transpose has j = l % 8.
                std::memcpy(&owner, m.in[4 * e + l % 8 / 2], sizeof owner);
                const uint16_t value = static_cast<uint16_t>(owner.word[l / 8] >> (16 * (l % 2)));
                std::memcpy(host::shared_pointer(*host::block, lane.row, 16, 16, "stmatrix") + 2 * e, &value, sizeof value);
            }
        }
    });
}
