// The object checksum: XXH3-64 (seed 0, default secret) of every 16 KiB block. The root over the block values, 8 bytes
// per 16 KiB, is left to the host.
//
// A warp takes a block. XXH3 has eight accumulators, and between two scrambles what a stripe of 64 bytes adds to them
// depends on nothing before it: of the 16 stripes of a round, eight threads take every fourth. Four threads then hold
// parts of one accumulator, which two exchanges within the warp add up. So a warp's load covers 256 bytes in a row, and
// each thread keeps four words of the secret in registers.
#include "device.cuh"

// Bytes whose blocks a group of four warps takes, and where in the list of values its first block's belongs. Whoever
// makes the list cuts objects into parts of 64 KiB, four blocks; the kernel takes any length.
struct Part {
    u64 address;
    u64 len;
    u64 first;
};

static const u32 WARPS = 4;
static const u32 THREADS = 32 * WARPS;
static const u64 BLOCK_LEN = 16384;
static const u32 STRIPE_LEN = 64;
// Stripes of a round, and of a round those that one thread takes.
static const u32 ROUND = 16;
static const u32 SHARE = 4;
static const u64 SHORT_LEN_MAX = 240;
static const u32 ALL = 0xffffffff;

static const u64 PRIME32_1 = 0x9e3779b1ull;
static const u64 PRIME64_1 = 0x9e3779b185ebca87ull;
static const u64 PRIME64_2 = 0xc2b2ae3d27d4eb4full;
static const u64 PRIME64_3 = 0x165667b19e3779f9ull;

// The default secret of the xxHash specification as little-endian words, and where the accumulators start.
static __device__ const u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};
static __device__ const u64 START[8] = {
    0xc2b2ae3dull,         0x9e3779b185ebca87ull, 0xc2b2ae3d27d4eb4full, 0x165667b19e3779f9ull,
    0x85ebca77c2b2ae63ull, 0x85ebca77ull,         0x27d4eb2f165667c5ull, 0x9e3779b1ull,
};

// 64 bits of the secret from a byte of it that is no multiple of 8.
__device__ __forceinline__ u64 secret_at(u32 byte)
{
    const u32 bits = byte % 8 * 8;
    return bits ? SECRET[byte / 8] >> bits | SECRET[byte / 8 + 1] << (64 - bits) : SECRET[byte / 8];
}

__device__ __forceinline__ u64 fold(u64 a, u64 b)
{
    return a * b ^ __umul64hi(a, b);
}

__device__ __forceinline__ u64 avalanche(u64 word)
{
    word = (word ^ word >> 37) * 0x165667919e3779f9ull;
    return word ^ word >> 32;
}

__device__ __forceinline__ u64 read_u64(const u8 *bytes)
{
    u64 word = 0;
    for (u32 i = 0; i < 8; ++i)
        word |= (u64)bytes[i] << 8 * i;
    return word;
}

__device__ __forceinline__ u64 read_u32(const u8 *bytes)
{
    return bytes[0] | (u32)bytes[1] << 8 | (u32)bytes[2] << 16 | (u32)bytes[3] << 24;
}

// 16 bytes of input under 16 bytes of the secret.
__device__ __noinline__ u64 mix(const u8 *bytes, u32 secret)
{
    return fold(read_u64(bytes) ^ secret_at(secret), read_u64(bytes + 8) ^ secret_at(secret + 8));
}

__device__ __forceinline__ u64 avalanche_xxh64(u64 word)
{
    word = (word ^ word >> 33) * PRIME64_2;
    word = (word ^ word >> 29) * PRIME64_3;
    return word ^ word >> 32;
}

// At most 16 bytes.
__device__ u64 hash_up_to_16(const u8 *bytes, u32 len)
{
    if (len == 0)
        return avalanche_xxh64(SECRET[7] ^ SECRET[8]);
    if (len <= 3) {
        const u64 word = (u64)bytes[0] << 16 | (u64)bytes[len / 2] << 24 | bytes[len - 1] | (u64)len << 8;
        return avalanche_xxh64(word ^ (SECRET[0] & 0xffffffff) ^ SECRET[0] >> 32);
    }
    if (len <= 8) {
        u64 word = read_u32(bytes + len - 4) | read_u32(bytes) << 32;
        word ^= SECRET[1] ^ SECRET[2];
        word = (word ^ (word << 49 | word >> 15) ^ (word << 24 | word >> 40)) * 0x9fb21c651e98df25ull;
        word = (word ^ ((word >> 35) + len)) * 0x9fb21c651e98df25ull;
        return word ^ word >> 28;
    }
    const u64 low = read_u64(bytes) ^ SECRET[3] ^ SECRET[4];
    const u64 high = read_u64(bytes + len - 8) ^ SECRET[5] ^ SECRET[6];
    u64 swapped = 0;
    for (u32 i = 0; i < 8; ++i)
        swapped |= (low >> 8 * i & 0xff) << (56 - 8 * i);
    return avalanche(len + swapped + high + fold(low, high));
}

// At most 240 bytes: the tail of an object, or a short one. One thread does it.
__device__ __noinline__ u64 hash_short(const u8 *bytes, u32 len)
{
    if (len <= 16)
        return hash_up_to_16(bytes, len);
    u64 sum = len * PRIME64_1;
    if (len <= 128) {
        // From both ends inwards; the halves may overlap in the middle.
        for (u32 step = 0; step <= (len - 1) / 32; ++step) {
            sum += mix(bytes + 16 * step, 32 * step);
            sum += mix(bytes + len - 16 * (step + 1), 32 * step + 16);
        }
        return avalanche(sum);
    }
    for (u32 step = 0; step < 8; ++step)
        sum += mix(bytes + 16 * step, 16 * step);
    sum = avalanche(sum);
    for (u32 step = 8; step < len / 16; ++step)
        sum += mix(bytes + 16 * step, 16 * (step - 8) + 3);
    return avalanche(sum + mix(bytes + len - 16, 136 - 17));
}

template <bool ALIGNED> __device__ __forceinline__ uint4 load(const u8 *at)
{
    return ALIGNED ? *(const uint4 *)at : load_by_words(at);
}

// What one thread of a warp knows: `at` is its accumulator, `part` which of the four that add to it.
struct Lane {
    u32 at;
    u32 part;
    u64 keys[SHARE];
    u64 scramble_key;
};

// What a stripe adds: the own word under its key as two halves multiplied, and the neighbour's word as it is. `pair`
// holds both.
__device__ __forceinline__ u64 product(const Lane &lane, uint4 pair, u64 key)
{
    const u64 even = word_of(pair.x, pair.y), odd = word_of(pair.z, pair.w);
    const u64 own = lane.at & 1 ? odd : even, neighbour = lane.at & 1 ? even : odd;
    const u64 keyed = own ^ key;
    return neighbour + (u64)(u32)keyed * (u32)(keyed >> 32);
}

// The sum over the four threads of an accumulator, in each of them.
__device__ __forceinline__ u64 joined(u64 sum)
{
    sum += __shfl_xor_sync(ALL, sum, 8);
    return sum + __shfl_xor_sync(ALL, sum, 16);
}

__device__ __forceinline__ u64 scrambled(u64 accumulator, u64 key)
{
    return (accumulator ^ accumulator >> 47 ^ key) * PRIME32_1;
}

// `ROUNDS` rounds of which all bytes are asked for before the first is used.
template <bool ALIGNED, u32 ROUNDS>
__device__ __forceinline__ u64 take_rounds(const Lane &lane, const u8 *bytes, u64 accumulator)
{
    uint4 held[ROUNDS * SHARE];
#pragma unroll
    for (u32 i = 0; i < ROUNDS * SHARE; ++i)
        held[i] = load<ALIGNED>(bytes + (4 * i + lane.part) * STRIPE_LEN + (lane.at & ~1u) * 8);
#pragma unroll
    for (u32 round = 0; round < ROUNDS; ++round) {
        u64 sum = 0;
#pragma unroll
        for (u32 i = 0; i < SHARE; ++i)
            sum += product(lane, held[round * SHARE + i], lane.keys[i]);
        accumulator = scrambled(accumulator + joined(sum), lane.scramble_key);
    }
    return accumulator;
}

// A block of more than 240 bytes. Every thread of the warp gets its value.
template <bool ALIGNED> __device__ __forceinline__ u64 hash_long(const u8 *bytes, u32 len)
{
    Lane lane;
    lane.at = threadIdx.x % 8;
    lane.part = threadIdx.x / 8 % 4;
#pragma unroll
    for (u32 i = 0; i < SHARE; ++i)
        lane.keys[i] = SECRET[4 * i + lane.part + lane.at];
    lane.scramble_key = SECRET[16 + lane.at];
    u64 accumulator = START[lane.at];
    // The last stripe ends with the block and may overlap the one before it, so it is not among these.
    const u32 stripes = (len - 1) / STRIPE_LEN;
    const u32 rounds = stripes / ROUND;
    u32 round = 0;
    for (; round + 2 <= rounds; round += 2)
        accumulator = take_rounds<ALIGNED, 2>(lane, bytes + round * ROUND * STRIPE_LEN, accumulator);
    if (round < rounds)
        accumulator = take_rounds<ALIGNED, 1>(lane, bytes + round * ROUND * STRIPE_LEN, accumulator);
    u64 sum = 0;
    for (u32 i = 0; i < SHARE; ++i) {
        const u32 stripe = rounds * ROUND + 4 * i + lane.part;
        if (stripe < stripes)
            sum += product(lane, load<ALIGNED>(bytes + stripe * STRIPE_LEN + (lane.at & ~1u) * 8), lane.keys[i]);
    }
    if (lane.part == 0) {
        // Not a multiple of 16 from the block's start, whatever that is.
        const u8 *last = bytes + len - STRIPE_LEN + (lane.at & ~1u) * 8;
        const uint4 pair = (u64)last % 16 == 0 ? load<true>(last) : load<false>(last);
        sum += product(lane, pair, secret_at(121 + 8 * lane.at));
    }
    accumulator += joined(sum);
    // The eight accumulators by pairs, in each thread.
    const u64 word = accumulator ^ secret_at(11 + 8 * lane.at);
    u64 value = fold(word, __shfl_xor_sync(ALL, word, 1));
    value += __shfl_xor_sync(ALL, value, 2);
    value += __shfl_xor_sync(ALL, value, 4);
    return avalanche(len * PRIME64_1 + value);
}

// A block; its value is thread 0's of the warp.
__device__ __forceinline__ u64 hash_block(const u8 *bytes, u32 len)
{
    if (len <= SHORT_LEN_MAX)
        return threadIdx.x % 32 == 0 ? hash_short(bytes, len) : 0;
    return (u64)bytes % 16 == 0 ? hash_long<true>(bytes, len) : hash_long<false>(bytes, len);
}

extern "C" __global__ void __launch_bounds__(THREADS, 8) hetmem_checksum(const Part *parts, u64 count, u64 *values)
{
    __shared__ Part part;
    __shared__ u64 found[WARPS];
    if (blockIdx.x >= count)
        return;
    if (threadIdx.x == 0)
        part = parts[blockIdx.x];
    __syncthreads();
    const u64 blocks = (part.len + BLOCK_LEN - 1) / BLOCK_LEN;
    for (u64 first = 0; first < blocks; first += WARPS) {
        const u64 block = first + threadIdx.x / 32;
        if (block < blocks) {
            const u64 rest = part.len - block * BLOCK_LEN;
            const u64 value =
                hash_block((const u8 *)part.address + block * BLOCK_LEN, rest < BLOCK_LEN ? rest : BLOCK_LEN);
            if (threadIdx.x % 32 == 0)
                found[threadIdx.x / 32] = value;
        }
        __syncthreads();
        // In one store of the block of threads: the values may lie behind the bus.
        if (threadIdx.x < WARPS && first + threadIdx.x < blocks)
            values[part.first + first + threadIdx.x] = found[threadIdx.x];
        __syncthreads();
    }
}
