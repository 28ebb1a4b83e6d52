// Thread blocks on one CPU thread: every CUDA thread is a fiber that runs until it has to wait for another.
//
// Blocks, warps and lanes take turns in an order drawn from a seed; a warp runs as far as it can. Whoever reads what
// another thread writes without synchronising is therefore likely to read too early under some seed.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace host {

constexpr int WARP = 32;
constexpr size_t STACK = 128 << 10;
constexpr size_t SHARED_MOST = 227 << 10;
constexpr unsigned char POISON = 0xff;  // NaN in every float type, all ones as codes

struct Copy {
    unsigned char* to;
    const void* from;
    uint32_t bytes, filled;  // zeros after `bytes`
    std::shared_ptr<void> kept;  // where `from` is, if it was registers
};

struct Product;  // a matrix product under way; in wgmma_on_host.h

struct Fiber {
    uint3 index;
    int number;  // within the block
    bool started, done;
    jmp_buf resume;
    ucontext_t entry;
    char* stack;
    // cp.async: copies of this thread, the last group still open
    std::deque<std::vector<Copy>> groups;
    // wgmma: groups of products, and how many groups were committed and completed so far
    std::vector<std::vector<Product>> products;
    size_t committed, completed;
    unsigned cluster_generation;  // of the cluster's barrier, when this thread arrived
    const void* polled;
    int polled_value;
};

struct Barrier {
    int arrived, expected;
    unsigned generation;
};

// Lanes of a warp that meet in one operation: the last one to arrive computes for all of them.
struct Meeting {
    uint32_t mask, arrived, left;
    const char* what;
    bool complete;
    unsigned char in[WARP][64], out[WARP][64];
};

struct TransactionBarrier {
    int expected, missing;
    int64_t bytes;  // expected and not yet copied
    unsigned phase;
    std::vector<Copy> copies;
};

struct Cluster {
    int first, size, live;  // blocks
    Barrier barrier;
};

struct Block {
    uint3 index;
    std::vector<Fiber> fibers;
    std::vector<std::vector<Meeting>> meetings;  // of each warp
    Barrier barriers[16];
    std::map<uint32_t, TransactionBarrier> transactions;  // by address
    std::map<const void*, size_t> variables;              // fixed-size shared memory: key to place
    std::vector<std::shared_ptr<std::vector<double>>> parts;  // of each warp: its part of a in the latest wgmma
    std::shared_ptr<Cluster> cluster;
    int rank;  // within the cluster
    int live;
    size_t dynamic_shared, used_shared;
    unsigned char* shared;
};

static std::vector<std::unique_ptr<Block>> resident, spare;
static Block* block;
static Fiber* self;
static std::function<void()> body;
static uint64_t progress;  // changes whenever anything happens that another thread may wait for
static jmp_buf scheduler;
static sigjmp_buf failure;
static std::mt19937 order;
static char message[1024];

inline int lane() { return self->number % WARP; }
inline int warp() { return self->number / WARP; }

[[noreturn]] __attribute__((noinline, format(printf, 1, 2))) inline void fail(const char* format, ...) {
    int used = 0;
    if (self) {
        used = std::snprintf(message, sizeof message, "block (%u, %u, %u) thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z,
                             self->number);
    }
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message + used, sizeof message - used, format, arguments);
    va_end(arguments);
    siglongjmp(failure, 1);
}

__attribute__((noinline)) inline void yield() {
    if (_setjmp(self->resume) == 0) _longjmp(scheduler, 1);
}

template <class Condition>
inline void wait_until(Condition condition) {
    while (!condition()) yield();
}

// Brings the lanes of `mask` together; `compute` sees all inputs and writes all outputs.
template <class Out, class In, class Compute>
inline Out meet(uint32_t mask, const char* what, const In& in, Compute compute) {
    static_assert(sizeof(In) <= sizeof(Meeting::in[0]) && sizeof(Out) <= sizeof(Meeting::out[0]), "slots are too small");
    const int mine = lane();
    const uint32_t bit = uint32_t(1) << mine;
    if (!(mask & bit)) fail("%s with mask 0x%08x, which lacks the calling lane %d", what, mask, mine);
    auto& all = block->meetings[warp()];
    // Looked up again after every wait: other lanes add and remove meetings.
    auto find = [&all](uint32_t lanes) -> Meeting* {
        for (Meeting& meeting : all) {
            if (meeting.mask & lanes) return &meeting;
        }
        return nullptr;
    };
    // A lane that has left a meeting waits until the others have left it too.
    wait_until([&] { return !find(mask) || !(find(mask)->arrived & bit); });
    if (!find(mask)) all.push_back({mask, 0, 0, what, false, {}, {}});
    Meeting* meeting = find(mask);
    if (meeting->mask != mask || std::strcmp(meeting->what, what) != 0) {
        fail("lane %d is in %s (mask 0x%08x) while others of its warp are in %s (mask 0x%08x)", mine, what, mask,
             meeting->what, meeting->mask);
    }
    std::memcpy(meeting->in[mine], &in, sizeof in);
    meeting->arrived |= bit;
    ++progress;
    if (meeting->arrived == mask) {
        compute(*meeting);
        meeting->complete = true;
    }
    wait_until([&] { return find(bit)->complete; });
    meeting = find(bit);
    Out out;
    std::memcpy(&out, meeting->out[mine], sizeof out);
    meeting->left |= bit;
    ++progress;
    if (meeting->left == mask) all.erase(all.begin() + (meeting - all.data()));
    return out;
}

// Arrives; the last of `threads` starts the next generation.
inline void arrive(Barrier& barrier, int threads, const char* what) {
    if (barrier.arrived == 0) barrier.expected = threads;
    if (barrier.expected != threads) fail("%s is used with %d and %d threads", what, barrier.expected, threads);
    ++progress;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
}

inline void arrive_and_wait(Barrier& barrier, int threads, const char* what) {
    const unsigned generation = barrier.generation;
    arrive(barrier, threads, what);
    wait_until([&] { return barrier.generation != generation; });
}

// ---- shared memory: a 32-bit address is the distance from the block's first byte ---------------------------------
inline uint32_t shared_address(const void* pointer) {
    const auto distance = static_cast<const unsigned char*>(pointer) - block->shared;
    if (distance < 0 || static_cast<size_t>(distance) >= SHARED_MOST) fail("an address outside the block's shared memory");
    return static_cast<uint32_t>(distance);
}

inline unsigned char* shared_pointer(Block& of, uint32_t address, size_t bytes, size_t alignment, const char* what) {
    if (address % alignment) fail("%s: shared address %u is not a multiple of %zu", what, address, alignment);
    if (address + bytes > of.used_shared) fail("%s: %zu bytes at %u of %zu of shared memory", what, bytes, address, of.used_shared);
    return of.shared + address;
}

// A variable of the block, behind its dynamic memory; `key` names it.
inline unsigned char* shared_variable(const void* key, size_t bytes, size_t alignment) {
    auto known = block->variables.find(key);
    if (known == block->variables.end()) {
        const size_t start = (block->used_shared + alignment - 1) / alignment * alignment;
        if (start + bytes > SHARED_MOST) fail("more than %zu bytes of shared memory", SHARED_MOST);
        block->used_shared = start + bytes;
        known = block->variables.emplace(key, start).first;
    }
    return block->shared + known->second;
}

inline void finish(const Copy& copy) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, copy.filled - copy.bytes);
}

inline void aligned(const void* pointer, size_t alignment, const char* what) {
    if (reinterpret_cast<uintptr_t>(pointer) % alignment) fail("%s: address %p is not a multiple of %zu", what, pointer, alignment);
}

}  // namespace host
