// CUDA on a CPU: enough of it for g++ to compile the kernels as they are, and to run them.
//
// A grid runs a block at a time, and a block's threads are fibers: functions with stacks of their
// own, which hand over to each other where a thread waits, at a barrier or a shuffle, and nowhere
// else. Everything runs in one thread of the operating system, in an order that the caller picks:
// lanes, warps and blocks forwards, or all of them backwards. A kernel that is right gives the same
// bits in both.
//
// Shared memory and outputs start as NaN, so that what is read before it is written shows. Under
// the address sanitizer an array of shared memory has fences on both sides. Under the thread
// sanitizer every CUDA thread is one of its fibers, and only barriers put their work in an order.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, bytes) (static_cast<void>(start))
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) (static_cast<void>(start))
#endif

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#ifndef __x86_64__
#error "The kernels are emulated on x86-64 alone: fibers are switched in its assembly."
#endif

#define __device__
#define __global__
#define __launch_bounds__(...)

// Arrays of shared memory. The first thread of a block that comes by makes the array; its place in
// the source is its name.
#define SHARED(T, name, count)           \
    static char name##_place;           \
    T* const name = static_cast<T*>(emulation::shared(&name##_place, sizeof(T) * (count)))
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulation::dynamic_shared)

// What the thread sanitizer does not watch: the machinery itself.
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }

namespace emulation {

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float number_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

constexpr unsigned WARP_SIZE = 32, MOST_THREADS = 1024;
constexpr std::size_t STACK = 1 << 16;         // bytes a fiber
constexpr std::size_t SHARED_BYTES = 48 << 10;  // what a block gets without asking for more
constexpr std::size_t FENCE = 64;

// A kernel whose parameters are taken from an array of pointers to arguments.
using Entry = void (*)(void**);

template <auto kernel>
struct Bound;

template <typename... P, void (*kernel)(P...)>
struct Bound<kernel> {
    static void call(void** args) { unpack(args, std::index_sequence_for<P...>{}); }

    template <std::size_t... I>
    static void unpack(void** args, std::index_sequence<I...>) {
        kernel(*static_cast<P*>(args[I])...);
    }
};

enum class Turn { ready, at_shuffle, at_barrier, done };

struct Fiber {
    void* top = nullptr;  // its stack pointer while it waits
    char* stack = nullptr;
    void* watched = nullptr;  // as the thread sanitizer knows it
    Turn turn = Turn::done;
    unsigned shuffles = 0, barriers = 0;
};

inline Fiber fibers[MOST_THREADS], host;
inline Fiber* current = nullptr;
inline std::uint32_t mail[2][MOST_THREADS];  // by turns: a lane may be one shuffle ahead
inline Entry entry = nullptr;
inline void** arguments = nullptr;

inline void* dynamic_shared = nullptr;
alignas(16) inline char arena[SHARED_BYTES + 64 * FENCE];
inline std::size_t arena_used = 0, shared_used = 0;
inline unsigned shared_arrays = 0;
inline struct {
    const void* place;
    void* array;
} shared_table[64];

// Where the thread sanitizer is told that work comes in order: the block's start, its end, and
// barriers, by turns, since a thread may arrive at the next while others leave the last.
inline char at_start, at_end, at_barriers[2];

UNWATCHED inline void release([[maybe_unused]] void* fence) {
#ifdef __SANITIZE_THREAD__
    __tsan_release(fence);
#endif
}

UNWATCHED inline void acquire([[maybe_unused]] void* fence) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(fence);
#endif
}

// Save this stack's pointer under *from, and go on where the stack `to` was left.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

UNWATCHED inline void hand_over(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to.watched, __tsan_switch_to_fiber_no_sync);
#endif
    emulation_switch(&from.top, to.top);
}

// Wait, until the scheduler says that the others have come.
UNWATCHED inline void wait(Turn turn) {
    current->turn = turn;
    hand_over(*current, host);
}

// The body of every fiber. It is never returned from.
UNWATCHED inline void begin() {
    acquire(&at_start);
    entry(arguments);
    release(&at_end);
    wait(Turn::done);
    std::abort();
}

UNWATCHED inline void prepare(Fiber& fiber) {
    if (!fiber.stack) {
        fiber.stack = static_cast<char*>(std::aligned_alloc(16, STACK));
#ifdef __SANITIZE_THREAD__
        fiber.watched = __tsan_create_fiber(0);
#endif
    }
    void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 2;
    top[0] = reinterpret_cast<void*>(begin);
    top[1] = nullptr;
    fiber.top = top - 6;  // six registers
    fiber.turn = Turn::ready;
    fiber.shuffles = fiber.barriers = 0;
}

UNWATCHED inline void* shared(const void* place, std::size_t bytes) {
    for (unsigned i = 0; i < shared_arrays; ++i) {
        if (shared_table[i].place == place) {
            return shared_table[i].array;
        }
    }
    shared_used += bytes;
    if (shared_used > SHARED_BYTES || shared_arrays == 64) {
        std::abort();
    }
    char* const array = arena + arena_used + FENCE;
    ASAN_UNPOISON_MEMORY_REGION(array, bytes);
    arena_used += FENCE + (bytes + 15) / 16 * 16;
    shared_table[shared_arrays++] = {place, array};
    return array;
}

UNWATCHED inline std::uint32_t shuffle(std::uint32_t bits, unsigned lane) {
    const unsigned side = current->shuffles++ % 2, thread = threadIdx.x;
    mail[side][thread] = bits;
    wait(Turn::at_shuffle);
    return mail[side][thread / WARP_SIZE * WARP_SIZE + lane];
}

// Let the threads go that wait for each other, if all of them have come.
UNWATCHED inline bool let_go(unsigned first, unsigned end, Turn turn) {
    for (unsigned i = first; i < end; ++i) {
        if (fibers[i].turn != turn) {
            return false;
        }
    }
    for (unsigned i = first; i < end; ++i) {
        fibers[i].turn = Turn::ready;
    }
    return true;
}

UNWATCHED inline void run_warp(unsigned first, bool backwards) {
    do {
        for (unsigned i = 0; i < WARP_SIZE; ++i) {
            const unsigned thread = first + (backwards ? WARP_SIZE - 1 - i : i);
            if (fibers[thread].turn == Turn::ready) {
                threadIdx.x = thread;
                current = &fibers[thread];
                hand_over(host, *current);
            }
        }
    } while (let_go(first, first + WARP_SIZE, Turn::at_shuffle));
}

// Run a block. What comes back is nullptr, or what its threads did wrong.
UNWATCHED inline const char* run_block(std::size_t shared_bytes, bool backwards) {
    arena_used = shared_arrays = 0;
    shared_used = shared_bytes;
    ASAN_UNPOISON_MEMORY_REGION(arena, sizeof arena);
    std::memset(arena, 0xff, sizeof arena);
    ASAN_POISON_MEMORY_REGION(arena, sizeof arena);
    dynamic_shared = std::malloc(shared_bytes);
    std::memset(dynamic_shared, 0xff, shared_bytes);
    const unsigned threads = blockDim.x, warps = threads / WARP_SIZE;
    for (unsigned i = 0; i < threads; ++i) {
        prepare(fibers[i]);
    }
    release(&at_start);
    do {
        for (unsigned i = 0; i < warps; ++i) {
            run_warp(WARP_SIZE * (backwards ? warps - 1 - i : i), backwards);
        }
    } while (let_go(0, threads, Turn::at_barrier));
    acquire(&at_end);
    std::free(dynamic_shared);
    for (unsigned i = 0; i < threads; ++i) {
        if (fibers[i].turn != Turn::done) {
            return fibers[i].turn == Turn::at_barrier ? "some threads never come to a barrier"
                                                      : "some lanes never come to a shuffle";
        }
    }
    return nullptr;
}

// Run a kernel. What comes back is nullptr, or what it, or the caller, did wrong.
UNWATCHED inline const char* launch(
    Entry kernel, const unsigned* grid, unsigned threads, void** args, std::size_t shared_bytes,
    bool backwards) {
    if (threads == 0 || threads > MOST_THREADS || threads % WARP_SIZE) {
        return "a block is not of whole warps, or has more than 1,024 threads";
    }
    if (shared_bytes > SHARED_BYTES) {
        return "a block asks for more than 48 KB of shared memory";
    }
    if (grid[1] > 65535 || grid[2] > 65535 || !grid[0] || !grid[1] || !grid[2]) {
        return "the grid is empty, or has more than 65,535 blocks along y or z";
    }
#ifdef __SANITIZE_THREAD__
    host.watched = __tsan_get_current_fiber();
#endif
    entry = kernel;
    arguments = args;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    const std::size_t blocks = std::size_t{1} * grid[0] * grid[1] * grid[2];
    for (std::size_t i = 0; i < blocks; ++i) {
        const std::size_t at = backwards ? blocks - 1 - i : i;
        blockIdx.x = at % grid[0];
        blockIdx.y = at / grid[0] % grid[1];
        blockIdx.z = at / grid[0] / grid[1];
        if (const char* wrong = run_block(shared_bytes, backwards)) {
            return wrong;
        }
    }
    return nullptr;
}

}  // namespace emulation

UNWATCHED inline void __syncthreads() {
    char* const fence = &emulation::at_barriers[emulation::current->barriers++ % 2];
    emulation::release(fence);
    emulation::wait(emulation::Turn::at_barrier);
    emulation::acquire(fence);
}

// Shuffles put lanes in step, and say nothing about memory. Masks are of all lanes.
inline float __shfl_sync(unsigned, float x, int lane) {
    return emulation::number_of(emulation::shuffle(emulation::bits_of(x), lane));
}

inline float __shfl_xor_sync(unsigned, float x, int offset) {
    return __shfl_sync(0, x, threadIdx.x % emulation::WARP_SIZE ^ offset);
}
