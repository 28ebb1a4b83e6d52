// Running a grid: which block, warp and lane goes next, and what happens when nobody can.
#pragma once

#include "copies_on_host.h"
#include "wgmma_on_host.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>

namespace host {

// As many blocks at a time as a small GPU would hold; blocks that wait for others find the ones before them there.
constexpr size_t RESIDENT = 6;

inline void fiber_main() {
    body();
    // Copies that nobody waited for never arrive, as far as the other threads can know.
    self->groups.clear();
    if (!self->products.empty()) fail("ended with matrix products under way");
    self->done = true;
    ++progress;
    if (--block->live == 0) --block->cluster->live;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
    self = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        setcontext(&fiber.entry);
    }
    self = nullptr;
}

inline void run_warp(Block& of, size_t first) {
    std::vector<int> lanes(WARP);
    std::iota(lanes.begin(), lanes.end(), 0);
    uint64_t before;
    do {
        before = progress;
        std::shuffle(lanes.begin(), lanes.end(), order);
        for (int l : lanes) {
            if (!of.fibers[first + l].done) resume(of.fibers[first + l]);
        }
    } while (progress != before);
}

inline void run_block(Block& of) {
    block = &of;
    blockIdx = of.index;
    std::vector<size_t> warps(of.fibers.size() / WARP);
    std::iota(warps.begin(), warps.end(), size_t(0));
    std::shuffle(warps.begin(), warps.end(), order);
    for (size_t w : warps) run_warp(of, w * WARP);
}

inline unsigned char* map_memory(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for %zu bytes", bytes);
    return static_cast<unsigned char*>(memory);
}

inline std::unique_ptr<Block> new_block(size_t threads) {
    std::unique_ptr<Block> made;
    if (!spare.empty()) {
        made = std::move(spare.back());
        spare.pop_back();
    } else {
        made = std::make_unique<Block>();
        made->shared = map_memory(SHARED_MOST + 4096);  // aligned to pages
    }
    while (made->fibers.size() < threads) {
        made->fibers.emplace_back();
        unsigned char* stack = map_memory(STACK);
        mprotect(stack, 4096, PROT_NONE);
        made->fibers.back().stack = reinterpret_cast<char*>(stack);
    }
    while (made->fibers.size() > threads) {
        munmap(made->fibers.back().stack, STACK);
        made->fibers.pop_back();
    }
    return made;
}

inline void start_block(unsigned number, std::shared_ptr<Cluster> cluster, size_t threads, size_t shared) {
    std::unique_ptr<Block> made = new_block(threads);
    made->index = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
    made->rank = static_cast<int>(number) - cluster->first;
    made->cluster = std::move(cluster);
    made->live = static_cast<int>(threads);
    made->dynamic_shared = made->used_shared = shared;
    made->meetings.assign(threads / WARP, {});
    made->parts.assign(threads / WARP, nullptr);
    made->transactions.clear();
    made->variables.clear();
    std::memset(made->barriers, 0, sizeof made->barriers);
    std::memset(made->shared, POISON, SHARED_MOST + 4096);
    for (unsigned n = 0; n < threads; ++n) {
        Fiber& fiber = made->fibers[n];
        fiber.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
        fiber.number = static_cast<int>(n);
        fiber.started = fiber.done = false;
        fiber.groups.clear();
        fiber.products.clear();
        fiber.committed = fiber.completed = 0;
        fiber.polled = nullptr;
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = fiber.stack;
        fiber.entry.uc_stack.ss_size = STACK;
        fiber.entry.uc_link = nullptr;
        makecontext(&fiber.entry, fiber_main, 0);
    }
    resident.push_back(std::move(made));
}

inline void retire_ended() {
    for (auto& of : resident) {
        if (of->live > 0 || of->cluster->live > 0) continue;
        block = of.get();
        for (size_t i = of->used_shared; i < SHARED_MOST + 4096; ++i) {
            if (of->shared[i] != POISON) fail("wrote to byte %zu of %zu bytes of shared memory", i, of->used_shared);
        }
        for (auto& [address, barrier] : of->transactions) {
            if (!barrier.copies.empty()) fail("a block ended before its copies to barrier %u did", address);
        }
        spare.push_back(std::move(of));
    }
    resident.erase(std::remove(resident.begin(), resident.end(), nullptr), resident.end());
}

inline void run_grid(size_t threads, size_t shared, unsigned cluster_size) {
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    if (threads == 0 || threads > 1024 || threads % WARP) fail("blocks of %zu threads; multiples of 32 run here", threads);
    if (cluster_size == 0 || gridDim.x % cluster_size) fail("clusters of %u do not divide grid.x", cluster_size);
    if (shared > SHARED_MOST) fail("%zu bytes of shared memory", shared);
    unsigned next = 0;
    while (next < blocks || !resident.empty()) {
        while (next < blocks && (resident.empty() || resident.size() + cluster_size <= RESIDENT)) {
            const int size = static_cast<int>(cluster_size);
            auto cluster = std::make_shared<Cluster>(Cluster{static_cast<int>(next), size, size, {0, 0, 0}});
            for (unsigned rank = 0; rank < cluster_size; ++rank) start_block(next++, cluster, threads, shared);
        }
        const uint64_t before = progress;
        std::vector<Block*> turn;
        for (auto& of : resident) turn.push_back(of.get());
        std::shuffle(turn.begin(), turn.end(), order);
        for (Block* of : turn) run_block(*of);
        if (progress == before) fail("all threads of block (%u, %u, %u) and others wait for one another", blockIdx.x, blockIdx.y, blockIdx.z);
        retire_ended();
    }
}

inline void on_signal(int signal, siginfo_t* info, void*) {
    // Safe here: the fault is in this thread's own code, never inside a library call that holds a lock.
    std::snprintf(message, sizeof message, "block (%u, %u, %u) thread %d: signal %d at address %p", blockIdx.x, blockIdx.y,
                  blockIdx.z, self ? self->number : -1, signal, info->si_addr);
    siglongjmp(failure, 1);
}

// Turns an access outside the memory of the arguments into an error, for as long as it lives.
class Signals {
   public:
    Signals() : stack_(64 << 10) {
        stack_t own{};
        own.ss_sp = stack_.data();
        own.ss_size = stack_.size();
        sigaltstack(&own, &old_stack_);
        struct sigaction action{};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (size_t i = 0; i < 3; ++i) sigaction(NUMBERS[i], &action, &old_[i]);
    }
    ~Signals() {
        for (size_t i = 0; i < 3; ++i) sigaction(NUMBERS[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

   private:
    static constexpr int NUMBERS[3] = {SIGSEGV, SIGBUS, SIGFPE};
    std::vector<char> stack_;
    stack_t old_stack_{};
    struct sigaction old_[3]{};
};

// A process may have 65530 mappings, and a block takes two for each thread: no library keeps them after a launch.
inline void unmap_spare() {
    for (auto& of : spare) {
        for (const Fiber& fiber : of->fibers) munmap(fiber.stack, STACK);
        munmap(of->shared, SHARED_MOST + 4096);
    }
    spare.clear();
}

// Returns null, or what went wrong.
inline const char* launch(const unsigned* shape, unsigned shared, unsigned cluster, unsigned seed) {
    gridDim = {shape[0], shape[1], shape[2]};
    blockDim = {shape[3], shape[4], shape[5]};
    order.seed(seed);
    self = nullptr;
    Signals signals;
    if (sigsetjmp(failure, 1) == 0) {
        run_grid(size_t(blockDim.x) * blockDim.y * blockDim.z, shared, cluster);
        unmap_spare();
        return nullptr;
    }
    for (auto& of : resident) {
        if (of) spare.push_back(std::move(of));
    }
    resident.clear();
    unmap_spare();
    return message;
}

template <class... Args, size_t... I>
inline std::function<void()> with_slots(void (*kernel)(Args...), void** slots, std::index_sequence<I...>) {
    auto values = std::make_tuple(*static_cast<std::remove_cv_t<Args>*>(slots[I])...);
    return [kernel, values] { std::apply(kernel, values); };
}

template <class... Args>
inline std::function<void()> with_slots(void (*kernel)(Args...), void** slots) {
    return with_slots(kernel, slots, std::index_sequence_for<Args...>());
}

}  // namespace host

#define HOST_ENTRY(KERNEL)                                                                                      \
    extern "C" const char* launch_##KERNEL(const unsigned* shape, unsigned shared, unsigned cluster, unsigned seed, \
                                           void** slots) {                                                      \
        host::body = host::with_slots(KERNEL, slots);                                                                 \
        return host::launch(shape, shared, cluster, seed);                                                      \
    }
