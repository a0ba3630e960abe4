// CUDA enough to run lars.cu on the CPU: a block's threads are fibers, which take turns at each barrier.
//
// The order of turns can be chosen: a missing barrier, or a thread that reads what another has still to write, shows as a
// result that depends on it. Blocks run one after the other, in an order that can be chosen too; where
// BLOCKS_ARE_THREADS is defined, as cuda_turns.h says.

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#ifdef BLOCKS_ARE_THREADS
#define LOCAL thread_local
#else
#define LOCAL
#endif
#define __shared__ static LOCAL

struct Index { unsigned x; };
static LOCAL Index threadIdx, blockIdx;
static Index gridDim;

static const size_t STACK = 1 << 17;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    int barrier = 0;  // the line it waits at; -1: it has ended
    void* known = nullptr;  // to ThreadSanitizer
};

static LOCAL std::vector<Fiber> fibers;
static LOCAL ucontext_t scheduler;
static LOCAL void* scheduler_known;
static LOCAL unsigned current;
static std::function<void()> body;

#ifdef __SANITIZE_THREAD__
extern "C" void* __tsan_get_current_fiber();
extern "C" void* __tsan_create_fiber(unsigned);
extern "C" void __tsan_destroy_fiber(void*);
extern "C" void __tsan_switch_to_fiber(void*, unsigned);
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_destroy_fiber(void*) {}
static void __tsan_switch_to_fiber(void*, unsigned) {}
#endif

#ifdef BLOCKS_ARE_THREADS
#include "cuda_turns.h"
#else
// One block after the other: what is waited for is there, or never will be.
static int looks = 0;
static int peek(const int* counter) {
    if (++looks > 1000) fprintf(stderr, "no block gets any further\n"), abort();
    return *counter;
}
static void __threadfence() { looks = 0; }
static int atomicAdd(int* place, int value) { return (*place += value) - value; }
static int atomicExch(int* place, int value) { return std::exchange(*place, value); }
#endif

static void leave_fiber() {
    __tsan_switch_to_fiber(scheduler_known, 0);
    swapcontext(&fibers[current].context, &scheduler);
}

static void fiber_main() {
    body();
    fibers[current].barrier = -1;
    leave_fiber();
}

static void barrier(int line) {
    fibers[current].barrier = line;
    leave_fiber();
}

#define __syncthreads() barrier(__LINE__)

static void fail(const char* message, int line) {
    fprintf(stderr, "%s: line %d of lars.cu, block %u\n", message, line, blockIdx.x);
    abort();
}

// Turn `step` of the threads of a block: forwards, backwards, or from the middle.
static unsigned turn(unsigned step, unsigned count, int order) {
    if (order == 0) return step;
    if (order == 1) return count - 1 - step;
    return (step + count / 2) % count;
}

static void run_block(unsigned threads, int order) {
    if (fibers.size() != threads) {
        fibers = std::vector<Fiber>(threads);
        for (Fiber& fiber : fibers) fiber.stack.resize(STACK);
    }
    scheduler_known = __tsan_get_current_fiber();
    for (Fiber& fiber : fibers) {
        fiber.known = __tsan_create_fiber(0);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        fiber.barrier = 0;
        makecontext(&fiber.context, fiber_main, 0);
    }
    for (unsigned ended = 0; ended < threads;) {
        int line = 0;
        for (unsigned step = 0; step < threads; ++step) {
            current = turn(step, threads, order);
            Fiber& fiber = fibers[current];
            if (fiber.barrier == -1) continue;
            threadIdx.x = current;
            __tsan_switch_to_fiber(fiber.known, 0);
            swapcontext(&scheduler, &fiber.context);
            if (fiber.barrier == -1) {
                ++ended;
            } else {
                if (line != 0 && fiber.barrier != line) fail("threads wait at different barriers", fiber.barrier);
                line = fiber.barrier;
            }
        }
        if (line != 0 && ended != 0) fail("threads wait for others that have ended", line);
#ifdef BLOCKS_ARE_THREADS
        fenced = false;  // by a fence before other writes
        point();
#endif
    }
    for (Fiber& fiber : fibers) __tsan_destroy_fiber(fiber.known);
}

static void run(unsigned blocks, unsigned threads, int order, std::function<void()> kernel) {
    body = std::move(kernel);
    gridDim.x = blocks;
#ifdef BLOCKS_ARE_THREADS
    run_together(blocks, threads, order);
#else
    for (unsigned number = 0; number < blocks; ++number) {
        blockIdx.x = turn(number, blocks, order);
        run_block(threads, order);
    }
#endif
}

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

template <class T> static T __ldcs(const T* place) { return *place; }
template <class T> static void __stcs(T* place, T value) { *place = value; }

static int atomicMax(int* place, int value) {
    int before = *place;
    if (value > before) *place = value;
    return before;
}

static int atomicMin(int* place, int value) {
    int before = *place;
    if (value < before) *place = value;
    return before;
}

using std::fabs;
using std::fma;
using std::sqrt;

// Half precision in integers: what the device has instructions for.
static float float16_to_float(unsigned short half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 0x3ffu, bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | fraction << 13;
    } else if (exponent != 0) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {
        float small = std::ldexp((float)fraction, -24);
        memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static unsigned short float_to_float16(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    unsigned short sign = (unsigned short)(bits >> 16 & 0x8000u);
    float size = std::fabs(number);
    if (!(size == size)) return sign | 0x7fffu;
    if (size >= 65520.0f) return sign | 0x7c00u;
    if (size < 6.103515625e-05f) return sign | (unsigned short)std::nearbyint(std::ldexp(size, 24));
    memcpy(&bits, &size, 4);
    bits += 0xfffu + (bits >> 13 & 1u);
    return sign | (unsigned short)((bits - (112u << 23)) >> 13);
}
