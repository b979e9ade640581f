// Many copies in one launch: gather (many sources, one target), scatter (one source, many targets), or any mixture.
//
// A block of threads takes one move. Moves are independent: none may write what another reads or writes. Whoever makes
// the list cuts long copies into moves of some 64 KiB, so that the device's scheduler balances them; the kernel takes any
// length. Both ends may be any memory that the device reaches, at any alignment.
#include "device.cuh"

// One copy. The list lies in memory that the device reads, usually the host's: 24 bytes for each block of threads.
struct Move {
    u64 source;
    u64 target;
    u64 len;
};

static const u32 THREADS = 256;
// Vectors of 16 bytes that a thread has under way: 2,048 threads of a multiprocessor have 128 KiB then, several times
// what its share of the memory's bandwidth times latency is.
static const u32 UNROLL = 4;
// Where every vector takes two loads, of which the second finds its bytes in the cache.
static const u32 UNROLL_SHIFTED = 2;

// `vectors` vectors; both ends are multiples of 16.
__device__ __forceinline__ void copy_aligned(const uint4 *source, uint4 *target, u64 vectors)
{
    for (u64 at = threadIdx.x; at < vectors; at += UNROLL * THREADS) {
        uint4 held[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i)
            if (at + i * THREADS < vectors)
                held[i] = source[at + i * THREADS];
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i)
            if (at + i * THREADS < vectors)
                target[at + i * THREADS] = held[i];
    }
}

// The same from a source that is `shift` bytes (1 to 15) behind a multiple of 16.
__device__ __forceinline__ void copy_shifted(const u8 *source, uint4 *target, u64 vectors, u32 shift)
{
    const uint4 *aligned = (const uint4 *)(source - shift);
    for (u64 at = threadIdx.x; at < vectors; at += UNROLL_SHIFTED * THREADS) {
        uint4 low[UNROLL_SHIFTED], high[UNROLL_SHIFTED];
#pragma unroll
        for (u32 i = 0; i < UNROLL_SHIFTED; ++i)
            if (at + i * THREADS < vectors) {
                low[i] = aligned[at + i * THREADS];
                high[i] = aligned[at + i * THREADS + 1];
            }
#pragma unroll
        for (u32 i = 0; i < UNROLL_SHIFTED; ++i)
            if (at + i * THREADS < vectors)
                target[at + i * THREADS] = from_byte(low[i], high[i], shift);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) hetmem_gather(const Move *moves, u64 count)
{
    __shared__ Move move;
    if (blockIdx.x >= count)
        return;
    // Once for the block: the list is behind the bus.
    if (threadIdx.x == 0)
        move = moves[blockIdx.x];
    __syncthreads();
    const u8 *source = (const u8 *)move.source;
    u8 *target = (u8 *)move.target;
    u64 len = move.len;
    const u64 to_boundary = -(u64)target & 15;
    const u64 head = to_boundary < len ? to_boundary : len;
    if (threadIdx.x < head)
        target[threadIdx.x] = source[threadIdx.x];
    source += head;
    target += head;
    len -= head;
    const u64 vectors = len / 16;
    const u32 shift = (u64)source & 15;
    if (shift == 0)
        copy_aligned((const uint4 *)source, (uint4 *)target, vectors);
    else
        copy_shifted(source, (uint4 *)target, vectors, shift);
    const u64 tail = len & 15;
    if (threadIdx.x < tail)
        target[vectors * 16 + threadIdx.x] = source[vectors * 16 + threadIdx.x];
}
