// The blocks of a launch at once, a thread of the system each: all of them as they come or, one at a time, in turns.
//
// A block may lose its turn before each atomic operation, fence and look at a counter, and at each barrier. `choices`
// says what becomes of it there: 0: it goes on; k: the k-th block behind it does. A block that has looked at a counter
// never goes on, since it may be waiting for others. If all only look, nothing will ever change.
//
// A fence is what C++ calls one, and ThreadSanitizer is told so: what a block has written before a fence, and then an
// atomic operation, is seen by a block that finds this operation's result, and then has a fence.

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

struct Turns {
    std::mutex mutex;
    std::vector<std::condition_variable> changed;
    std::vector<bool> lives;
    std::vector<int> choices;  // empty: blocks run as they come
    size_t points = 0;
    unsigned owner = 0, looks = 0;

    void start(unsigned blocks) {
        changed = std::vector<std::condition_variable>(blocks);
        lives.assign(blocks, true);
        points = owner = looks = 0;
    }

    unsigned behind(unsigned block, int count) const {  // of those that live
        for (; count > 0; --count) {
            do block = (block + 1) % lives.size();
            while (!lives[block]);
        }
        return block;
    }

    void wait(unsigned mine) {
        std::unique_lock<std::mutex> lock(mutex);
        changed[mine].wait(lock, [&] { return owner == mine; });
    }

    void give(unsigned next) {
        std::lock_guard<std::mutex> lock(mutex);
        owner = next;
        changed[next].notify_one();
    }

    void point(unsigned mine, bool is_look) {
        looks = is_look ? looks + 1 : 0;
        if (looks > 1000 * lives.size()) {
            fprintf(stderr, "no block gets any further\n");
            _Exit(3);
        }
        int choice = choices[points++ % choices.size()];
        unsigned next = behind(mine, choice == 0 && is_look ? 1 : choice);
        if (next == mine) return;
        give(next);
        wait(mine);
    }

    void end(unsigned mine) {
        lives[mine] = false;
        for (bool lives_on : lives) {
            if (lives_on) return give(behind(mine, 1));
        }
    }
};

static Turns turns;
static thread_local bool fenced = false;
static thread_local int* seen = nullptr;  // the counter that this block has seen last

static void point(bool is_look = false) {
    if (!turns.choices.empty()) turns.point(blockIdx.x, is_look);
    else if (is_look) std::this_thread::yield();
}

static void __threadfence() {
    point();
    if (seen != nullptr) __tsan_acquire(seen);
    fenced = true;
}

static int atomicAdd(int* place, int value) {
    point();
    if (fenced) __tsan_release(place);
    seen = place;
    return __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}

static int atomicExch(int* place, int value) {
    point();
    return __atomic_exchange_n(place, value, __ATOMIC_RELAXED);
}

static int peek(const int* place) {
    point(true);
    seen = const_cast<int*>(place);
    return __atomic_load_n(place, __ATOMIC_RELAXED);
}

static void run_block(unsigned threads, int order);

static void run_together(unsigned blocks, unsigned threads, int order) {
    turns.start(blocks);
    std::vector<std::thread> running;
    for (unsigned number = 0; number < blocks; ++number) {
        running.emplace_back([=] {
            blockIdx.x = number;
            if (!turns.choices.empty()) turns.wait(number);
            run_block(threads, order);
            if (!turns.choices.empty()) turns.end(number);
        });
    }
    for (std::thread& block : running) block.join();
}

// Whose turn it is, at each point from the first on, and again from the beginning; none: as they come.
extern "C" void set_turns(int count, const int* choices) { turns.choices.assign(choices, choices + count); }
extern "C" long long points_passed() { return (long long)turns.points; }
