// Transaction barriers, bulk copies and clusters of ptx_sm90.cuh and ptx_cluster.cuh on the host.
#pragma once
#define HQQ_PTX_CLUSTER_CUH

#include "ptx_on_host.h"

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

inline void start_copy(Block& of, uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                       std::shared_ptr<void> kept = nullptr) {
    aligned(from, 16, "bulk_copy");
    if (bytes % 16 || bytes == 0) fail("bulk_copy of %u bytes", bytes);
    unsigned char* target = shared_pointer(of, to, bytes, 16, "bulk_copy");
    std::memset(target, POISON, bytes);
    transaction_barrier(of, barrier, "bulk_copy").copies.push_back({target, from, bytes, bytes, std::move(kept)});
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

// ---- clusters, and blocks that wait for each other ------------------------------------------------------------------
inline void cluster_arrive() {
    host::Cluster& cluster = *host::block->cluster;
    host::self->cluster_generation = cluster.barrier.generation;
    host::arrive(cluster.barrier, cluster.size * static_cast<int>(host::block->fibers.size()), "cluster_arrive");
}
inline void cluster_wait() {
    host::Cluster& cluster = *host::block->cluster;
    host::wait_until([&cluster] { return cluster.barrier.generation != host::self->cluster_generation; });
}
inline void store_at(uint32_t to, uint32_t rank, float4 v, uint32_t barrier) {
    auto kept = std::make_shared<float4>(v);
    host::start_copy(host::block_of_cluster(rank, "store_at"), to, kept.get(), 16, barrier, kept);
}
inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }
inline void bar_arrive(int id, int threads) { host::arrive(host::named_barrier(id, threads), threads, "bar_sync"); }
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
