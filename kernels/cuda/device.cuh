// What the kernels share: types, loads at any address, 64-bit words. Not a kernel.
//
// Invariant: only bytes of a span are stored. A load may touch, and drop, bytes beside a span, never beyond the aligned
// unit of 4 or 16 bytes that holds one of its bytes: such a unit lies in one page, and so is mapped wherever the byte is.
//
// With HETMEM_ON_CPU a C++ compiler makes the same source into a program for the CPU (`on_cpu.h`), which the tests
// compare with the twins where there is no GPU.
#pragma once

#ifdef HETMEM_ON_CPU
#include "on_cpu.h"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The 16 bytes from byte `shift` (0 to 15) of the 32 that `low` and `high` are.
__device__ __forceinline__ uint4 from_byte(uint4 low, uint4 high, u32 shift)
{
    u32 a = low.x, b = low.y, c = low.z, d = low.w, e = high.x, f = high.y, g = high.z;
    if (shift & 8) {
        a = c;
        b = d;
        c = e;
        d = f;
        e = g;
        f = high.w;
    }
    if (shift & 4) {
        a = b;
        b = c;
        c = d;
        d = e;
        e = f;
    }
    const u32 bits = (shift & 3) * 8;
    return make_uint4(__funnelshift_r(a, b, bits), __funnelshift_r(b, c, bits), __funnelshift_r(c, d, bits),
                      __funnelshift_r(d, e, bits));
}

// 16 bytes at an address that is not a multiple of 16, by aligned words of 4.
__device__ __forceinline__ uint4 load_by_words(const u8 *at)
{
    const u32 bits = ((u64)at & 3) * 8;
    const u32 *words = (const u32 *)((u64)at & ~3ull);
    const u32 a = words[0], b = words[1], c = words[2], d = words[3];
    // Without a shift the fifth word holds no byte that is wanted, and may be nobody's.
    const u32 e = bits ? words[4] : 0;
    return make_uint4(__funnelshift_r(a, b, bits), __funnelshift_r(b, c, bits), __funnelshift_r(c, d, bits),
                      __funnelshift_r(d, e, bits));
}

__device__ __forceinline__ u64 word_of(u32 low, u32 high)
{
    return (u64)high << 32 | low;
}
