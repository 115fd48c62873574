// Runs CUDA kernels on a CPU, for tests: what rows.cu needs of CUDA C, in C++.
//
// The threads of a block take turns. Where they exchange values, each waits until all threads that
// are left have come as far. A thread is a context of its own with its own stack. ``reverse`` makes
// threads and blocks run in descending order, so that a kernel that depends on the order differs.
#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
struct __attribute__((aligned(16))) float4 { float x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline long long __double_as_longlong(double number) {
    long long bits;
    memcpy(&bits, &number, sizeof(bits));
    return bits;
}
static inline double __longlong_as_double(long long bits) {
    double number;
    memcpy(&number, &bits, sizeof(number));
    return number;
}
struct Index { unsigned x; };
static Index threadIdx, blockIdx, blockDim;

namespace cpu {

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool ended;
};

static std::vector<Thread> threads;
static ucontext_t scheduler;
static unsigned char given[1024][8];  // what each thread gave in the last exchange
static void (*body)(void*);
static void* arguments;

static void wait_for_all() {
    const unsigned me = threadIdx.x;
    swapcontext(&threads[me].context, &scheduler);
    threadIdx.x = me;
}

static void enter() {
    const unsigned me = threadIdx.x;
    body(arguments);
    threads[me].ended = true;
}

// Run the threads of one block, each up to its next exchange, until all have ended.
static void run_block(unsigned block, bool reverse) {
    for (unsigned t = 0; t < block; t++) {
        Thread& thread = threads[t];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &scheduler;
        thread.ended = false;
        makecontext(&thread.context, enter, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (unsigned k = 0; k < block; k++) {
            threadIdx.x = reverse ? block - 1 - k : k;
            Thread& thread = threads[threadIdx.x];
            if (thread.ended) continue;
            swapcontext(&scheduler, &thread.context);
            left = left || !thread.ended;
        }
    }
}

template <class... P, size_t... K>
static void call(void (*kernel)(P...), void** values, std::index_sequence<K...>) {
    kernel(*static_cast<std::remove_reference_t<P>*>(values[K])...);
}

// Launch a kernel as cuLaunchKernel does: ``values`` are pointers to its arguments.
template <class... P>
static void launch(void (*kernel)(P...), unsigned grid, unsigned block, bool reverse, void** values) {
    struct Call { void (*kernel)(P...); void** values; } one{kernel, values};
    while (threads.size() < block) {
        threads.emplace_back();
        threads.back().stack.resize(64 << 10);
    }
    body = [](void* it) {
        Call* call_ = static_cast<Call*>(it);
        call(call_->kernel, call_->values, std::make_index_sequence<sizeof...(P)>());
    };
    arguments = &one;
    blockDim.x = block;
    for (unsigned b = 0; b < grid; b++) {
        blockIdx.x = reverse ? grid - 1 - b : b;
        run_block(block, reverse);
    }
    arguments = nullptr;
}

// Launch a kernel whose threads exchange nothing, faster: each runs to its end.
template <class... P>
static void launch_plain(
    void (*kernel)(P...), unsigned grid, unsigned block, bool reverse, void** values) {
    blockDim.x = block;
    for (unsigned b = 0; b < grid; b++)
        for (unsigned t = 0; t < block; t++) {
            blockIdx.x = reverse ? grid - 1 - b : b;
            threadIdx.x = reverse ? block - 1 - t : t;
            call(kernel, values, std::make_index_sequence<sizeof...(P)>());
        }
}

template <class T> static T exchange(T value, unsigned from) {
    memcpy(given[threadIdx.x], &value, sizeof(T));
    wait_for_all();
    T got;
    memcpy(&got, given[from], sizeof(T));
    wait_for_all();
    return got;
}

}  // namespace cpu

template <class T> static T __shfl_sync(unsigned, T value, int from, int width) {
    return cpu::exchange(value, threadIdx.x / width * width + from);
}
template <class T> static T __shfl_xor_sync(unsigned, T value, int apart, int) {
    return cpu::exchange(value, threadIdx.x ^ apart);
}
static inline void __syncwarp(unsigned) { cpu::wait_for_all(); }
