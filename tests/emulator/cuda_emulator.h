// The CUDA execution model on a host, for tests: included before the headers and one .cu of kernels/, compiled by g++.
//
// Every CUDA thread of a block is a fiber; one runs at a time, until it ends or waits at a barrier or for its warp. Blocks run
// one after another, so a kernel whose blocks wait for each other never ends. Schedule 0 runs threads and blocks in order;
// any other number is the seed of a random order, drawn anew for the blocks of a grid and at every barrier for the threads.
//
// What waits forever on a GPU is an error here, and shared memory is full of NaN before each block. What this cannot show:
// speed, memory ordering between threads that run at the same moment, and wrong code made by ptxas.
#ifndef GPUMLP_CUDA_EMULATOR_H
#define GPUMLP_CUDA_EMULATOR_H

#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#define GM_EMULATOR

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
    unsigned x, y, z;
};

// Plain variables, set whenever another thread or block goes on.
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// --- fibers: a stack each, and a switch without a system call --------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 256 * 1024;  // frames are larger: red zones around every local array
#else
constexpr size_t STACK = 64 * 1024;
#endif
constexpr size_t GUARD = 64 * 1024;  // whole pages everywhere: an overflow ends the process instead of changing a neighbour

#if defined(__x86_64__)

// Leaves on the stack the registers that a call has to keep, and its top in *from; goes on where the stack `to` was left.
extern "C" void emulator_switch(void** from, void* to) asm("emulator_switch");
asm(R"(
    .text
    .type emulator_switch, @function
emulator_switch:
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
    popq %rcx           # not ret: the processor would expect another address
    jmpq *%rcx
    .size emulator_switch, .-emulator_switch
)");

struct Context {
    void* top;
};
static void switch_context(Context& from, Context& to) { emulator_switch(&from.top, to.top); }
static void make_context(Context& context, char* stack, size_t size, void (*body)()) {
    void** words = reinterpret_cast<void**>(stack + size) - 8;  // six registers, where to go, and where body would return to
    memset(words, 0, 8 * sizeof(void*));
    words[6] = reinterpret_cast<void*>(body);
    context.top = words;
}

#else  // the C library's switch, which makes a system call: 20 times slower

struct Context {
    ucontext_t registers;
};
static void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
static void make_context(Context& context, char* stack, size_t size, void (*body)()) {
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack;
    context.registers.uc_stack.ss_size = size;
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, body, 0);
}

#endif

struct Fiber {
    Context context;
    char* stack;  // STACK bytes; null: the one that the host launched from
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack;
#endif
};

static Fiber host;

// AddressSanitizer has to know which stack it looks at.
#if defined(__SANITIZE_ADDRESS__)
static const void* host_stack;  // null until a launch first leaves it
static size_t host_stack_size;

static void leave(Fiber& from, const Fiber& to) {
    const void* stack = to.stack ? to.stack : host_stack;
    __sanitizer_start_switch_fiber(&from.fake_stack, stack, to.stack ? STACK : host_stack_size);
}
static void arrive(void* fake_stack) {
    const void* left;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack, &left, &size);
    if (!host_stack) host_stack = left, host_stack_size = size;
}
#endif

static void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    leave(from, to);
#endif
    switch_context(from.context, to.context);
#if defined(__SANITIZE_ADDRESS__)
    arrive(from.fake_stack);
#endif
}

// --- threads of the block that runs ----------------------------------------------------------------------------------------

constexpr int MOST_THREADS = 1024;

struct Thread {
    dim3 index;
    Fiber* fiber;  // null until it has started
};
struct Warp {
    unsigned waiting;  // a bit for each lane that waits for others
    struct Post {
        void (*complete)(void** operands, unsigned mask);
        unsigned mask;
    } posts[32];
    void* operands[32];  // of each waiting lane, on its own stack
};

static Thread threads[MOST_THREADS];
static Warp warps[MOST_THREADS / 32];
static int n_threads, n_ended, n_at_barrier, barrier_line;
static int running;

static int ready[MOST_THREADS], n_ready;  // the threads that go on in this round, the next one last
static int later[MOST_THREADS], n_later;  // in the next round

static Fiber fibers[MOST_THREADS];
static Fiber* parked[MOST_THREADS];  // that no thread is on
static int n_fibers, n_parked;

static void (*kernel)(void* arguments);
static void* kernel_arguments;
static uint64_t block_number;  // counts blocks over all launches: shared arrays see by it that they belong to another block
static char message[512];

static bool in_order;  // schedule 0
static uint64_t random_state;
static bool warps_run_ahead;  // whether a warp whose lanes have met goes on at once, or waits for the next round

static unsigned random_below(unsigned n) {
    random_state += 0x9E3779B97F4A7C15ull;  // SplitMix64
    uint64_t z = random_state;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return unsigned(((z ^ (z >> 31)) >> 32) * n >> 32);
}
template <typename T> static void shuffle(T* items, unsigned n) {
    for (unsigned i = n; i > 1; --i) std::swap(items[i - 1], items[random_below(i)]);
}

static void fiber_body();

static char* new_stack() {
    void* memory = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE)) {
        perror("a stack for the CUDA emulator");
        abort();
    }
    return static_cast<char*>(memory) + GUARD;
}

static void make_fiber(Fiber& fiber) {
    if (!fiber.stack) fiber.stack = new_stack();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, STACK);  // red zones of a thread that was given up
#endif
    // Stacks begin at different lines of the cache: otherwise the hot end of all of them would fight for the same few.
    make_context(fiber.context, fiber.stack, STACK - size_t(&fiber - fibers) % 64 * 64, fiber_body);
}

static Fiber* free_fiber() {
    if (n_parked) return parked[--n_parked];
    make_fiber(fibers[n_fibers]);
    return &fibers[n_fibers++];
}

// The thread whose turn it is, -1 where none can go on.
static int next_thread() {
    if (!n_ready) {
        if (!n_later) return -1;
        n_ready = n_later;
        for (int i = 0; i < n_later; ++i) ready[n_later - 1 - i] = later[i];
        n_later = 0;
        if (!in_order) shuffle(ready, n_ready);
    }
    return ready[--n_ready];
}

static void become(int thread) {
    running = thread;
    threadIdx = threads[thread].index;
}

// What every fiber does: one thread after another, as long as they end without waiting.
static void fiber_body() {
#if defined(__SANITIZE_ADDRESS__)
    arrive(nullptr);
#endif
    for (;;) {
        kernel(kernel_arguments);
        ++n_ended;
        Fiber* here = threads[running].fiber;
        int next = next_thread();
        if (next >= 0) become(next);
        if (next >= 0 && !threads[next].fiber) {
            threads[next].fiber = here;
            continue;
        }
        parked[n_parked++] = here;
        switch_fiber(*here, next < 0 ? host : *threads[next].fiber);
    }
}

// The block is given up, all of its threads where they are.
[[noreturn]] static void give_up() {
    switch_fiber(*threads[running].fiber, host);
    __builtin_unreachable();
}

[[noreturn, gnu::format(printf, 1, 2)]] static void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    give_up();
}

// Others go on until it is this thread's turn again.
static void give_way() {
    int self = running, next = next_thread();
    if (next < 0) give_up();
    if (next == self) return;
    if (!threads[next].fiber) threads[next].fiber = free_fiber();
    become(next);
    switch_fiber(*threads[self].fiber, *threads[next].fiber);
}

// Counting threads is not enough: a GPU lets those at two barriers pass, or hangs, as it likes.
static void barrier(const char* file, int line) {
    if (n_at_barrier == 0) barrier_line = line;
    if (line != barrier_line) fail("threads wait at the barriers of the lines %d and %d of %s", barrier_line, line, file);
    if (++n_at_barrier == n_threads) {
        n_at_barrier = 0;
        for (int i = 0; i < n_threads; ++i) later[n_later++] = i;
    }
    give_way();
}

// The lanes of `mask` meet. The last one to come completes the operation for all: their operands lie on their stacks.
[[gnu::noinline]] static void meet(unsigned mask, void (*complete)(void**, unsigned), void* operands) {
    Warp& warp = warps[running / 32];
    int lane = running % 32;
    if (!(mask >> lane & 1)) fail("lane %d calls a warp operation of the lanes 0x%08X", lane, mask);
    warp.waiting |= 1u << lane;
    warp.posts[lane] = {complete, mask};
    warp.operands[lane] = operands;
    if ((warp.waiting & mask) == mask) {
        for (int i = 0; i < 32; ++i)
            if ((mask >> i & 1) && (warp.posts[i].complete != complete || warp.posts[i].mask != mask))
                fail("the lanes %d and %d of a warp meet at different operations", i, lane);
        complete(warp.operands, mask);
        warp.waiting &= ~mask;
        int* released = warps_run_ahead ? ready + n_ready : later + n_later;
        int n = 0;
        for (int i = 0; i < 32; ++i)
            if (mask >> i & 1) released[n++] = running - lane + i;
        if (warps_run_ahead) shuffle(released, n);
        (warps_run_ahead ? n_ready : n_later) += n;
    }
    give_way();
}

// --- launches --------------------------------------------------------------------------------------------------------------

// False where not all threads came to their end.
static bool run_block() {
    ++block_number;
    message[0] = 0;
    n_ended = n_at_barrier = n_ready = n_later = 0;
    for (int i = 0; i < n_threads; ++i) threads[i].fiber = nullptr, later[n_later++] = i;
    for (int i = 0; i < n_threads; i += 32) warps[i / 32].waiting = 0;
    int first = next_thread();
    threads[first].fiber = free_fiber();
    become(first);
    switch_fiber(host, *threads[first].fiber);
    return n_ended == n_threads;
}

static void describe_failure() {
    char reason[sizeof message / 2];
    if (message[0])
        snprintf(reason, sizeof reason, "%s", message);
    else
        snprintf(reason, sizeof reason, "of %d threads %d wait at __syncthreads, %d at a warp operation, and %d have ended",
                 n_threads, n_at_barrier, n_threads - n_ended - n_at_barrier, n_ended);
    snprintf(message, sizeof message, "block (%u, %u, %u): %s", blockIdx.x, blockIdx.y, blockIdx.z, reason);
}

// After a failure fibers stand in the middle of threads that never go on.
static void make_fibers_again() {
    for (n_parked = 0; n_parked < n_fibers; ++n_parked) {
        make_fiber(fibers[n_parked]);
        parked[n_parked] = &fibers[n_parked];
    }
}

static bool fits(int most_threads) {
    double block = double(blockDim.x) * blockDim.y * blockDim.z;  // which cannot overflow
    bool grid_fits = gridDim.x && gridDim.y && gridDim.z && gridDim.x <= 0x7FFFFFFF && gridDim.y <= 0xFFFF && gridDim.z <= 0xFFFF;
    bool block_fits = block > 0 && block <= unsigned(most_threads) && blockDim.z <= 64;
    if (!grid_fits || !block_fits)
        snprintf(message, sizeof message, "no launch: grid (%u, %u, %u), block (%u, %u, %u) of at most %d threads", gridDim.x,
                 gridDim.y, gridDim.z, blockDim.x, blockDim.y, blockDim.z, most_threads);
    return grid_fits && block_fits;
}

// A grid of blocks; shape is (grid x, y, z, block x, y, z). Null, or what went wrong.
static const char* run_grid(const unsigned* shape, int most_threads, unsigned schedule) {
    gridDim = {shape[0], shape[1], shape[2]};
    blockDim = {shape[3], shape[4], shape[5]};
    if (!fits(most_threads)) return message;
    n_threads = int(blockDim.x * blockDim.y * blockDim.z);
    for (unsigned i = 0; i < unsigned(n_threads); ++i)
        threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
#if defined(__SANITIZE_ADDRESS__)
    host_stack = nullptr;
#endif
    in_order = schedule == 0;
    random_state = schedule;
    size_t blocks = size_t(gridDim.x) * gridDim.y * gridDim.z;
    unsigned* order = static_cast<unsigned*>(malloc(blocks * sizeof(unsigned)));
    for (size_t i = 0; i < blocks; ++i) order[i] = unsigned(i);
    if (!in_order) shuffle(order, unsigned(blocks));
    bool ended = true;
    for (size_t i = 0; i < blocks && ended; ++i) {
        blockIdx = {order[i] % gridDim.x, order[i] / gridDim.x % gridDim.y, order[i] / gridDim.x / gridDim.y};
        warps_run_ahead = !in_order && (schedule + i) % 2;
        ended = run_block();
    }
    free(order);
    if (ended) return nullptr;
    describe_failure();
    make_fibers_again();
    return message;
}

template <typename... A> struct Call {
    void (*function)(A...);
    std::tuple<A...> arguments;

    static void run(void* self) {
        Call* call = static_cast<Call*>(self);
        std::apply(call->function, call->arguments);
    }
};

template <typename... A, size_t... I>
const char* launch(void (*function)(A...), std::index_sequence<I...>, const unsigned* shape, void** arguments, int most_threads,
                   unsigned schedule) {
    (void)arguments;
    Call<A...> call{function, {*static_cast<A*>(arguments[I])...}};
    kernel = Call<A...>::run;
    kernel_arguments = &call;
    return run_grid(shape, most_threads, schedule);
}
// `arguments` point to the values, as cuLaunchKernel's do.
template <typename... A>
const char* launch(void (*function)(A...), const unsigned* shape, void** arguments, int most_threads, unsigned schedule) {
    return launch(function, std::index_sequence_for<A...>{}, shape, arguments, most_threads, schedule);
}

// --- warp operations -------------------------------------------------------------------------------------------------------

struct Shuffle {
    uint64_t value, result;
    int source;

    static void complete(void** lanes, unsigned mask) {
        for (int i = 0; i < 32; ++i) {
            if (!(mask >> i & 1)) continue;
            Shuffle* lane = static_cast<Shuffle*>(lanes[i]);
            bool defined = mask >> lane->source & 1;  // CUDA says nothing about the others
            lane->result = defined ? static_cast<Shuffle*>(lanes[lane->source])->value : ~uint64_t(0);
        }
    }
};

struct Ballot {
    bool vote;
    unsigned votes;

    static void complete(void** lanes, unsigned mask) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i)
            if (mask >> i & 1) votes |= unsigned(static_cast<Ballot*>(lanes[i])->vote) << i;
        for (int i = 0; i < 32; ++i)
            if (mask >> i & 1) static_cast<Ballot*>(lanes[i])->votes = votes;
    }
};

static void complete_nothing(void**, unsigned) {}

inline int lane() { return running % 32; }

template <typename T> T shuffled(unsigned mask, T x, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
    Shuffle mine{0, 0, source & 31};
    memcpy(&mine.value, &x, sizeof x);
    meet(mask, Shuffle::complete, &mine);
    memcpy(&x, &mine.result, sizeof x);
    return x;
}

// --- shared memory ---------------------------------------------------------------------------------------------------------

// Full of NaN (and of the largest integers) when a block first meets it. `seen` stands apart: red zones surround the array.
template <typename Array> Array& shared(Array& array, uint64_t& seen) {
    if (seen != block_number) {
        memset(&array, 0xFF, sizeof array);
        seen = block_number;
    }
    return array;
}

}  // namespace emulator

#define GM_SHARED(T, name, size)                   \
    typedef T name##_array[size];                  \
    alignas(16) static name##_array name##_memory; \
    static uint64_t name##_seen;                   \
    name##_array& name = emulator::shared(name##_memory, name##_seen)

// --- what CUDA has built in ------------------------------------------------------------------------------------------------

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { emulator::barrier(file, line); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulator::meet(mask, emulator::complete_nothing, nullptr); }
inline void __threadfence() {}  // one thread runs at a time

template <typename T> T __shfl_sync(unsigned mask, T x, int source) { return emulator::shuffled(mask, x, source); }
template <typename T> T __shfl_xor_sync(unsigned mask, T x, int bits) {
    return emulator::shuffled(mask, x, emulator::lane() ^ bits);
}
template <typename T> T __shfl_down_sync(unsigned mask, T x, unsigned distance) {
    int source = emulator::lane() + int(distance);
    return emulator::shuffled(mask, x, source < 32 ? source : emulator::lane());
}
template <typename T> T __shfl_up_sync(unsigned mask, T x, unsigned distance) {
    int source = emulator::lane() - int(distance);
    return emulator::shuffled(mask, x, source >= 0 ? source : emulator::lane());
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
    emulator::Ballot mine{vote != 0, 0};
    emulator::meet(mask, emulator::Ballot::complete, &mine);
    return mine.votes;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }

// No floats: their sums would depend on the schedule.
#define GM_ATOMIC(name, T, combined) \
    inline T name(T* p, T x) {       \
        T old = *p;                  \
        *p = combined;               \
        return old;                  \
    }
GM_ATOMIC(atomicAdd, unsigned, old + x)
GM_ATOMIC(atomicAdd, int, int(unsigned(old) + unsigned(x)))
GM_ATOMIC(atomicAdd, unsigned long long, old + x)
GM_ATOMIC(atomicMin, unsigned, x < old ? x : old)
GM_ATOMIC(atomicMin, int, x < old ? x : old)
GM_ATOMIC(atomicMin, unsigned long long, x < old ? x : old)
GM_ATOMIC(atomicMax, unsigned, x > old ? x : old)
GM_ATOMIC(atomicMax, int, x > old ? x : old)
GM_ATOMIC(atomicMax, unsigned long long, x > old ? x : old)
#undef GM_ATOMIC

template <typename T> T __ldg(const T* p) { return *p; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// --- tensor cores ----------------------------------------------------------------------------------------------------------

namespace emulator {

inline float bf16_half(unsigned pair, int half) {
    unsigned bits = half ? pair & 0xFFFF0000u : pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Fragments as "Matrix Fragments for mma.m16n8k16" of the PTX ISA gives them.
struct Mma {
    float* d;
    const unsigned *a, *b;

    static float a_at(void** lanes, int row, int k) {
        const Mma* lane = static_cast<Mma*>(lanes[row % 8 * 4 + k % 8 / 2]);
        return bf16_half(lane->a[row / 8 + k / 8 * 2], k & 1);
    }
    static float b_at(void** lanes, int k, int column) {
        const Mma* lane = static_cast<Mma*>(lanes[column * 4 + k % 8 / 2]);
        return bf16_half(lane->b[k / 8], k & 1);
    }
    static void complete(void** lanes, unsigned) {
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < 8; ++column) {
                float& d = static_cast<Mma*>(lanes[row % 8 * 4 + column / 2])->d[row / 8 * 2 + column % 2];
                for (int k = 0; k < 16; ++k) d += a_at(lanes, row, k) * b_at(lanes, k, column);
            }
    }
};

// ldmatrix.x4: four 8 x 8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8.
template <bool transposed> struct Ldmatrix {
    unsigned* out;
    const void* address;

    static void complete(void** lanes, unsigned) {
        for (int lane = 0; lane < 32; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
                uint16_t pair[2];
                for (int i = 0; i < 2; ++i) {
                    int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
                    const void* begin = static_cast<Ldmatrix*>(lanes[matrix * 8 + row])->address;
                    memcpy(&pair[i], static_cast<const char*>(begin) + column * 2, 2);
                }
                static_cast<Ldmatrix*>(lanes[lane])->out[matrix] = pair[0] | unsigned(pair[1]) << 16;
            }
    }
};

template <bool transposed> void ldmatrix(unsigned (&out)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from an address that is no multiple of 16");
    Ldmatrix<transposed> mine{out, row};
    meet(0xFFFFFFFFu, Ldmatrix<transposed>::complete, &mine);
}

}  // namespace emulator

// d += a b for a 16 x 16 and a 16 x 8 matrix of bfloat16.
inline void gm_mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulator::Mma mine{d, a, b};
    emulator::meet(0xFFFFFFFFu, emulator::Mma::complete, &mine);
}
inline void gm_ldmatrix_x4(unsigned (&out)[4], const void* row) { emulator::ldmatrix<false>(out, row); }
inline void gm_ldmatrix_x4_trans(unsigned (&out)[4], const void* row) { emulator::ldmatrix<true>(out, row); }

#endif
