// The kernels as a program for the CPU: what CUDA brings that C++ lacks, threads that run one after the other from one
// barrier to the next, and a main function. For tests alone: it shows what the source says, not what a GPU makes of it.
//
// Invariant: a thread waits at a barrier of its warp or its block until all that still run are there.
//
// Standard input: a line "KERNEL BLOCKS THREADS LEN PARAMETER...", then LEN bytes, which lie at MEMORY from then on.
// Standard output: the LEN bytes afterwards.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

typedef unsigned long long Word;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) ulonglong2 {
    Word x, y;
};
struct Index {
    unsigned x;
};

static Index threadIdx, blockIdx;

static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline ulonglong2 make_ulonglong2(Word x, Word y) { return {x, y}; }

static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits)
{
    return ((Word)high << 32 | low) >> (bits & 31);
}

static inline Word __umul64hi(Word a, Word b) { return (unsigned __int128)a * b >> 64; }

static inline float __uint_as_float(unsigned bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline unsigned __float_as_uint(float value)
{
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline Word atomicAdd(Word *at, Word more)
{
    const Word before = *at;
    *at += more;
    return before;
}

static const Word MEMORY = 1ull << 44;
static const unsigned THREADS_MAX = 1024, STACK_LEN = 64 << 10;

enum Waiting { NOTHING, WARP, BLOCK, ENDED };

struct Thread {
    ucontext_t context;
    Waiting waiting;
    // What it shows to its warp, of this exchange and the one before: a neighbour may be one exchange behind.
    Word shown[2];
    unsigned exchanges;
};

static Thread threads[THREADS_MAX];
static ucontext_t scheduler;
static char stacks[THREADS_MAX][STACK_LEN];
static Word parameters[6];
static void (*kernel)(Word, Word, Word, Word, Word, Word);

static void wait_for(Waiting what)
{
    Thread &self = threads[threadIdx.x];
    self.waiting = what;
    swapcontext(&self.context, &scheduler);
}

static inline void __syncthreads() { wait_for(BLOCK); }

static inline Word __shfl_xor_sync(unsigned, Word value, unsigned distance)
{
    Thread &self = threads[threadIdx.x];
    const unsigned turn = self.exchanges++ % 2;
    self.shown[turn] = value;
    wait_for(WARP);
    return threads[threadIdx.x ^ distance].shown[turn];
}

static void thread_main()
{
    kernel(parameters[0], parameters[1], parameters[2], parameters[3], parameters[4], parameters[5]);
    wait_for(ENDED);
}

// Lets those go on that wait for `what`, if all of them do that have not ended.
static bool release(unsigned first, unsigned count, Waiting what)
{
    bool any = false;
    for (unsigned at = first; at < first + count; ++at) {
        if (threads[at].waiting == ENDED)
            continue;
        if (threads[at].waiting != what)
            return false;
        any = true;
    }
    for (unsigned at = first; at < first + count; ++at)
        if (threads[at].waiting == what)
            threads[at].waiting = NOTHING;
    return any;
}

static void run_block(unsigned count)
{
    for (unsigned at = 0; at < count; ++at) {
        Thread &thread = threads[at];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = stacks[at];
        thread.context.uc_stack.ss_size = STACK_LEN;
        thread.waiting = NOTHING;
        thread.exchanges = 0;
        makecontext(&thread.context, thread_main, 0);
    }
    for (bool any = true; any;) {
        for (unsigned at = 0; at < count; ++at)
            if (threads[at].waiting == NOTHING) {
                threadIdx.x = at;
                swapcontext(&scheduler, &threads[at].context);
            }
        any = release(0, count, BLOCK);
        for (unsigned warp = 0; warp < count; warp += 32)
            any |= release(warp, count - warp < 32 ? count - warp : 32, WARP);
    }
    for (unsigned at = 0; at < count; ++at)
        if (threads[at].waiting != ENDED) {
            fprintf(stderr, "thread %u waits for ever\n", at);
            exit(1);
        }
}

int main()
{
    char name[128];
    unsigned blocks, count, given = 0;
    size_t len;
    if (scanf("%127s %u %u %zu", name, &blocks, &count, &len) != 4 || count == 0 || count > THREADS_MAX)
        return 2;
    while (getchar_unlocked() == ' ' && given < 6 && scanf("%llu", &parameters[given]) == 1)
        ++given;
    kernel = (decltype(kernel))dlsym(RTLD_DEFAULT, name);
    void *memory = mmap((void *)MEMORY, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (!kernel || memory != (void *)MEMORY || fread(memory, 1, len, stdin) != len)
        return 2;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        run_block(count);
    return fwrite(memory, 1, len, stdout) == len ? 0 : 2;
}
