// What Hopper brought: barriers that count bytes, bulk copies, products of a warpgroup.
#pragma once

#include "common.cuh"

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the barriers of a block are made, before anybody uses them.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}
// To the second-level cache.
__device__ __forceinline__ void prefetch_bulk(const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// After a thread has read shared memory that a bulk copy will overwrite: loads that are still in a queue would otherwise find what the
// copy, which does not stand in it, has brought.
__device__ __forceinline__ void fence_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// True in one thread of a warp, all of which are here. The compiler knows this, which it does not of a comparison of the lane: what only
// that thread does, it does without a loop over the threads that might.
__device__ __forceinline__ bool elected() {
    uint32_t it;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(it));
    return it;
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// A tile of four-bit weights in shared memory.
__device__ __forceinline__ Tile<FP4> load_tile(uint32_t words, uint32_t scales) {
    Tile<FP4> tile;
    tile.words = load_shared(words + threadIdx.x % WARP * 16);
    uint16_t both;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(both) : "r"(scales + threadIdx.x % WARP * 2));
    tile.scales = both;
    return tile;
}

// The same as the first operands of four products.
__device__ __forceinline__ void decode(const Tile<FP4>& tile, uint32_t (&a)[4][4]) {
    uint32_t scale[2];
    tile.scale(scale);
#pragma unroll
    for (int j = 0; j < 4; j++) tile.fragment(j, scale, a[j]);
}
__device__ __forceinline__ void decode_shared(uint32_t words, uint32_t scales, uint32_t (&a)[4][4]) { decode(load_tile(words, scales), a); }

// The second operand in shared memory: rows of 128 bytes, their 16-byte pieces exchanged by the row's number modulo 8. The lower half of
// its descriptor counts in 16 bytes, so that an offset is added to it.
__device__ __forceinline__ uint32_t descriptor_of(uint32_t address) { return (address & 0x3ffff) >> 4 | 1u << 16; }
__device__ __forceinline__ uint64_t descriptor(uint32_t lower, int bytes_further) {
    return uint64_t(1024 >> 4 | 1u << 30) << 32 | (lower + bytes_further / 16);
}

// Before a warpgroup's products read registers that were written, after them, and until all but the last N groups of them are done and
// their registers may be read or written again.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define OUT4 "%0, %1, %2, %3"
#define OUT8 OUT4 ", %4, %5, %6, %7"
#define OUT12 OUT8 ", %8, %9, %10, %11"
#define OUT16 OUT12 ", %12, %13, %14, %15"
#define OUT20 OUT16 ", %16, %17, %18, %19"
#define OUT24 OUT20 ", %20, %21, %22, %23"
#define OUT28 OUT24 ", %24, %25, %26, %27"
#define OUT32 OUT28 ", %28, %29, %30, %31"
#define OUT36 OUT32 ", %32, %33, %34, %35"
#define OUT40 OUT36 ", %36, %37, %38, %39"
#define OUT44 OUT40 ", %40, %41, %42, %43"
#define OUT48 OUT40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define OUT56 OUT48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define OUT64 OUT56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define EIGHT(i) FOUR(i), FOUR(i + 4)
#define D4 FOUR(0)
#define D8 EIGHT(0)
#define D12 D8, FOUR(8)
#define D16 D8, EIGHT(8)
#define D20 D16, FOUR(16)
#define D24 D16, EIGHT(16)
#define D28 D24, FOUR(24)
#define D32 D24, EIGHT(24)
#define D36 D32, FOUR(32)
#define D40 D32, EIGHT(32)
#define D44 D40, FOUR(40)
#define D48 D40, EIGHT(40)
#define D56 D48, EIGHT(48)
#define D64 D56, EIGHT(56)
#define WGMMA(N, TYPE, ADD, OUT, IN, D)                                                                                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" OUT "}, " IN ", " ADD ", 1, 1, 0;"    \
                 : D                                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define MULTIPLY(TYPE, ADD)                                                                                                \
    if constexpr (N == 8) WGMMA(8, TYPE, ADD, OUT4, "{%4, %5, %6, %7}, %8", D4);                                           \
    if constexpr (N == 16) WGMMA(16, TYPE, ADD, OUT8, "{%8, %9, %10, %11}, %12", D8);                                      \
    if constexpr (N == 24) WGMMA(24, TYPE, ADD, OUT12, "{%12, %13, %14, %15}, %16", D12);                                  \
    if constexpr (N == 32) WGMMA(32, TYPE, ADD, OUT16, "{%16, %17, %18, %19}, %20", D16);                                  \
    if constexpr (N == 40) WGMMA(40, TYPE, ADD, OUT20, "{%20, %21, %22, %23}, %24", D20);                                  \
    if constexpr (N == 48) WGMMA(48, TYPE, ADD, OUT24, "{%24, %25, %26, %27}, %28", D24);                                  \
    if constexpr (N == 56) WGMMA(56, TYPE, ADD, OUT28, "{%28, %29, %30, %31}, %32", D28);                                  \
    if constexpr (N == 64) WGMMA(64, TYPE, ADD, OUT32, "{%32, %33, %34, %35}, %36", D32);                                  \
    if constexpr (N == 72) WGMMA(72, TYPE, ADD, OUT36, "{%36, %37, %38, %39}, %40", D36);                                  \
    if constexpr (N == 80) WGMMA(80, TYPE, ADD, OUT40, "{%40, %41, %42, %43}, %44", D40);                                  \
    if constexpr (N == 88) WGMMA(88, TYPE, ADD, OUT44, "{%44, %45, %46, %47}, %48", D44);                                  \
    if constexpr (N == 96) WGMMA(96, TYPE, ADD, OUT48, "{%48, %49, %50, %51}, %52", D48);                                  \
    if constexpr (N == 112) WGMMA(112, TYPE, ADD, OUT56, "{%56, %57, %58, %59}, %60", D56);                                \
    if constexpr (N == 128) WGMMA(128, TYPE, ADD, OUT64, "{%64, %65, %66, %67}, %68", D64);

// d[64 rows][N tokens] += a[64][16] b[16][N], or without `ADD` =.
template <Format F, int N, bool ADD = true, int D> __device__ __forceinline__ void multiply(float (&d)[D], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (F == BF16 && ADD) { MULTIPLY("bf16", "1") }
    if constexpr (F == BF16 && !ADD) { MULTIPLY("bf16", "0") }
    if constexpr (F == FP4 && ADD) { MULTIPLY("f16", "1") }
    if constexpr (F == FP4 && !ADD) { MULTIPLY("f16", "0") }
}
