// Floating-point numbers of one format into those of another, rounded to the nearest, ties to even. Integer arithmetic,
// so that neither flags nor hardware decide a bit; the two additions below are exact or round as IEEE 754 says.
//
// Subnormal numbers are kept on both sides, what is too large becomes infinite. NaN stays NaN: the sign, and as many of
// the payload's highest bits as there is room for, with the quiet bit set.
//
// Source and target are multiples of their element's size; they may not overlap.
#include "device.cuh"

static const u32 THREADS = 256;
// Elements that a thread takes at a time: 16 bytes of float, 8 of the others, so that a warp's loads and its stores are
// both without gaps.
static const u32 GROUP = 4;
static const u32 UNROLL = 4;
// What a block of threads takes. The twin and whoever launches know this number.
static const u32 TILE = THREADS * GROUP * UNROLL;

__device__ __forceinline__ u32 f32_of_bf16(u16 half)
{
    const u32 quiet = (half & 0x7fff) > 0x7f80 ? 0x40 : 0;
    return (half | quiet) << 16;
}

__device__ __forceinline__ u16 bf16_of_f32(u32 bits)
{
    if ((bits & 0x7fffffff) > 0x7f800000)
        return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

__device__ __forceinline__ u32 f32_of_f16(u16 half)
{
    const u32 sign = (half & 0x8000u) << 16, magnitude = half & 0x7fff;
    if (magnitude > 0x7c00)
        return sign | 0x7fc00000 | magnitude << 13;
    if (magnitude == 0x7c00)
        return sign | 0x7f800000;
    // A subnormal number is a count of 2^-24, which are the last places of 0.5.
    if (magnitude < 0x400)
        return sign | __float_as_uint(__uint_as_float(0x3f000000 | magnitude) - 0.5f);
    return sign | ((magnitude << 13) + 0x38000000);
}

__device__ __forceinline__ u16 f16_of_f32(u32 bits)
{
    const u32 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return sign | 0x7e00 | (magnitude >> 13 & 0x3ff);
    if (magnitude >= 0x47800000)
        return sign | 0x7c00;
    // Below the smallest normal number: the last places of 0.5 count 2^-24, and the addition rounds.
    if (magnitude < 0x38800000)
        return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000);
    return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

// A format as the loop sees it: its element, four of them in one load, and the way to and from the bits of a float.
struct F32 {
    typedef u32 Element;
    typedef uint4 Group;
    static __device__ __forceinline__ u32 widen(u32 bits) { return bits; }
    static __device__ __forceinline__ u32 narrow(u32 bits) { return bits; }
    static __device__ __forceinline__ uint4 open(uint4 group) { return group; }
    static __device__ __forceinline__ uint4 close(uint4 group) { return group; }
};

// Four elements of 16 bits.
__device__ __forceinline__ uint4 open_halves(uint2 group)
{
    return make_uint4(group.x & 0xffff, group.x >> 16, group.y & 0xffff, group.y >> 16);
}

__device__ __forceinline__ uint2 close_halves(uint4 group)
{
    return make_uint2(group.x | group.y << 16, group.z | group.w << 16);
}

struct BF16 {
    typedef u16 Element;
    typedef uint2 Group;
    static __device__ __forceinline__ u32 widen(u32 half) { return f32_of_bf16(half); }
    static __device__ __forceinline__ u32 narrow(u32 bits) { return bf16_of_f32(bits); }
    static __device__ __forceinline__ uint4 open(uint2 group) { return open_halves(group); }
    static __device__ __forceinline__ uint2 close(uint4 group) { return close_halves(group); }
};

struct F16 {
    typedef u16 Element;
    typedef uint2 Group;
    static __device__ __forceinline__ u32 widen(u32 half) { return f32_of_f16(half); }
    static __device__ __forceinline__ u32 narrow(u32 bits) { return f16_of_f32(bits); }
    static __device__ __forceinline__ uint4 open(uint2 group) { return open_halves(group); }
    static __device__ __forceinline__ uint2 close(uint4 group) { return close_halves(group); }
};

// Through a float, which holds every number of the others: one rounding.
template <typename From, typename To> __device__ __forceinline__ u32 convert(u32 element)
{
    return To::narrow(From::widen(element));
}

template <typename From, typename To>
__device__ __forceinline__ typename To::Group convert_group(typename From::Group group)
{
    const uint4 four = From::open(group);
    return To::close(make_uint4(convert<From, To>(four.x), convert<From, To>(four.y), convert<From, To>(four.z),
                                convert<From, To>(four.w)));
}

// One by one: elements `first + thread` of this block's share.
template <typename From, typename To>
__device__ __forceinline__ void cast_singly(const typename From::Element *source, typename To::Element *target,
                                            u64 count)
{
    const u64 first = (u64)blockIdx.x * TILE + threadIdx.x;
#pragma unroll 4
    for (u32 i = 0; i < GROUP * UNROLL; ++i) {
        const u64 at = first + i * THREADS;
        if (at < count)
            target[at] = convert<From, To>(source[at]);
    }
}

template <typename From, typename To>
__device__ __forceinline__ void cast(const typename From::Element *source, typename To::Element *target, u64 count)
{
    typedef typename From::Group Read;
    typedef typename To::Group Written;
    const u64 to_boundary = (-(u64)target & (sizeof(Written) - 1)) / sizeof(typename To::Element);
    const u64 head = to_boundary < count ? to_boundary : count;
    if (((u64)(source + head) & (sizeof(Read) - 1)) != 0) {
        cast_singly<From, To>(source, target, count);
        return;
    }
    const Read *read = (const Read *)(source + head);
    Written *written = (Written *)(target + head);
    const u64 groups = (count - head) / GROUP;
    const u64 first = (u64)blockIdx.x * (THREADS * UNROLL) + threadIdx.x;
    Read held[UNROLL];
#pragma unroll
    for (u32 i = 0; i < UNROLL; ++i)
        if (first + i * THREADS < groups)
            held[i] = read[first + i * THREADS];
#pragma unroll
    for (u32 i = 0; i < UNROLL; ++i)
        if (first + i * THREADS < groups)
            written[first + i * THREADS] = convert_group<From, To>(held[i]);
    // What is before the first group and behind the last: fewer than two groups.
    if (blockIdx.x == 0 && threadIdx.x < 2 * GROUP) {
        const u64 at = threadIdx.x < head ? threadIdx.x : threadIdx.x + groups * GROUP;
        if (at < count)
            target[at] = convert<From, To>(source[at]);
    }
}

#define CAST(name, from, to)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const from::Element *source, to::Element *target,       \
                                                               u64 count)                                              \
    {                                                                                                                  \
        cast<from, to>(source, target, count);                                                                         \
    }

CAST(hetmem_cast_f32_bf16, F32, BF16)
CAST(hetmem_cast_f32_f16, F32, F16)
CAST(hetmem_cast_bf16_f32, BF16, F32)
CAST(hetmem_cast_f16_f32, F16, F32)
CAST(hetmem_cast_bf16_f16, BF16, F16)
CAST(hetmem_cast_f16_bf16, F16, BF16)
