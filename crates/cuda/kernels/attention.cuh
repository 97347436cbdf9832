// The parameters of attention over the paged cache.
#pragma once

#include "common.cuh"

struct Attention {
    const uint16_t* queries;                 // [n, query heads, 64] in bf16
    const void *keys, *values;               // [blocks, kv heads, 16, 64], [blocks, kv heads, 64, 16] in bf16 or E4M3
    const float* sinks;                      // [query heads]
    const uint32_t *positions, *sequences;   // [n]
    const uint32_t *table_starts, *table;    // by sequence, those of single tokens first; the pages of each from there on
    const uint32_t* tiles;                   // chunks: first token and number of tokens of each tile
    const uint16_t* fresh;                   // null, or of a step of one token the query, key and value heads, as words that come
    uint16_t* out;                           // [n, query heads * 64], see `activation_place`
    float* partial;                          // splits: [n, heads of a warp, splits, 8, 64 + 2]
    uint32_t* arrivals;                      // splits: [n, heads of a warp], zero before and after
    uint32_t query_heads, kv_heads;
    uint32_t window;                         // 0: everything
    uint32_t out_format, out_stack;
    uint32_t splits;                         // blocks that share the keys of a token and head
    float key_scale, value_scale;            // E4M3: what a stored number is multiplied by
    uint32_t n;                              // single tokens
    uint32_t warps;                          // of a block, that share them: a power of two; all eight where keys are split
    uint32_t ahead;                          // whether pages before a token's own are older than the step
    uint32_t rows;                           // of single tokens: query heads of a warp, a power of two
};
static_assert(sizeof(Attention) == 152);

constexpr float NOTHING = -1e30f;
constexpr float LOG2_E = 1.4426950408889634f;

// Keys and values in BF16 are multiplied as they are; in E4M3 as FP16 numbers.
template <CacheFormat C> struct Cached;
template <> struct Cached<CACHE_BF16> {
    using Product = Number<BF16>;
    static __device__ __forceinline__ uint32_t pack(float a, float b) {
        __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
        return reinterpret_cast<uint32_t&>(v);
    }
    // Two queries, which are in BF16.
    static __device__ __forceinline__ uint32_t query(uint32_t v) { return v; }
    static __device__ __forceinline__ float key_factor(const Attention&) { return 0.125f * LOG2_E; }
    static __device__ __forceinline__ float value_factor(const Attention&) { return 1; }
};
template <> struct Cached<CACHE_E4M3> {
    using Product = Number<FP4>;
    static __device__ __forceinline__ uint32_t pack(float a, float b) {
        __half2 v = __floats2half2_rn(a, b);
        return reinterpret_cast<uint32_t&>(v);
    }
    static __device__ __forceinline__ uint32_t query(uint32_t v) {
        const float2 pair = __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(v));
        return __half_as_ushort(Product::from(pair.x)) | uint32_t(__half_as_ushort(Product::from(pair.y))) << 16;
    }
    static __device__ __forceinline__ float key_factor(const Attention& p) { return 0.125f * LOG2_E * E4M3_WIDENED * p.key_scale; }
    static __device__ __forceinline__ float value_factor(const Attention& p) { return E4M3_WIDENED * p.value_scale; }
};

// Attention of prompts takes 64 keys at a time, and has them in shared memory: keys, then values.
constexpr int KEYS = 64, PAGES = KEYS / BLOCK_TOKENS;
constexpr int HALF = KEYS * HEAD * 2, STAGE = 2 * HALF; // bytes

// Where a piece of 16 bytes lies there: such that eight rows of one column of pieces are in different banks, as products of a warpgroup
// expect it. Keys: [key][8 pieces of dimensions]; values: [page][dimension][2 pieces of keys].
__device__ __forceinline__ uint32_t key_place(uint32_t key, uint32_t piece) { return key * 128 + ((piece ^ key % 8) << 4); }
__device__ __forceinline__ uint32_t value_place(uint32_t page, uint32_t d, uint32_t piece) {
    return HALF + page * 2048 + d * 32 + ((piece ^ (d / 4 & 1)) << 4);
}

// 2^v, to some units of f32: weights are rounded to 16 bits.
__device__ __forceinline__ float power(float v) {
    float p;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(v));
    return p;
}
