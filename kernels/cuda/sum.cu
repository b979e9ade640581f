// The sum of all 64-bit words, wrapping: a reduction that only reads. Of no use to the store: it is the yardstick in
// `hetmem bench gpu`, which says how fast a kernel that does next to nothing reads the same bytes.
#include "device.cuh"

static const u32 THREADS = 256;
static const u32 UNROLL = 8;
// Vectors of 16 bytes that a block of threads takes: 64 KiB.
static const u64 TILE = 4096;
// Places that the sums of blocks are added to, so that not all wait for one.
static const u32 SUMS = 64;

// `sums` has 64 words, which the caller has made 0; the sum is that of all of them.
extern "C" __global__ void __launch_bounds__(THREADS) hetmem_sum(const ulonglong2 *source, u64 vectors, u64 *sums)
{
    const u64 start = blockIdx.x * TILE;
    const u64 end = start + TILE < vectors ? start + TILE : vectors;
    u64 sum = 0;
    for (u64 at = start + threadIdx.x; at < end; at += UNROLL * THREADS) {
        ulonglong2 held[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i)
            held[i] = at + i * THREADS < end ? source[at + i * THREADS] : make_ulonglong2(0, 0);
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i)
            sum += held[i].x + held[i].y;
    }
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (threadIdx.x % 32 == 0)
        atomicAdd(&sums[blockIdx.x % SUMS], sum);
}
