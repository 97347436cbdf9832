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
    float* partial;                          // splits: [n, heads of a warp, splits, 8, 64 + 2], for tiles see `put_together`; without
                                             // `arrivals` these are words that come, all bits set before and after
    uint32_t* arrivals;                      // splits: [n, heads of a warp], [tiles, kv heads]; zero before and after. Null: see `partial`
    uint32_t query_heads, kv_heads;
    uint32_t window;                         // 0: everything
    uint32_t out_format, out_stack;
    uint32_t splits;                         // blocks that share the keys of a token and head, or of a tile and head
    float key_scale, value_scale;            // E4M3: what a stored number is multiplied by
    uint32_t n;                              // single tokens
    uint32_t warps;                          // of a block, that share them: a power of two; all eight where keys are split
    uint32_t ahead;                          // whether pages before a token's own are older than the step
    uint32_t rows;                           // of single tokens: query heads of a warp, a power of two
    uint32_t shared_from;                    // pages of a single token from which blocks share its keys
};
static_assert(sizeof(Attention) == 160);

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

// Up to `p.splits` blocks share a tile's steps of `KEYS` keys, `begin .. end`: as many as have `LEAST_STEPS` of them each, which is what
// `splits` becomes. Whether this block is one of them, and its own steps.
constexpr int LEAST_STEPS = 4;
__device__ __forceinline__ bool take_share(const Attention& p, int& splits, int& begin, int& end) {
    const int steps = end - begin, split = blockIdx.z;
    splits = max(1, min(int(p.splits), steps / LEAST_STEPS));
    end = begin + steps * (split + 1) / splits, begin += steps * split / splits;
    return split < splits;
}

// 2^v, to some units of f32: weights are rounded to 16 bits.
__device__ __forceinline__ float power(float v) {
    float p;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(v));
    return p;
}

// What the blocks that share a tile's keys found, put together by the last of them to arrive, in their order: whether this is it. Of each
// thread the largest scores and sums of its two rows, and their weighted values `4 i + 2 row` and `4 i + 2 row + 1`. `rows`: whether
// this thread's warp has any that count.
__device__ __forceinline__ bool put_together(const Attention& p, int splits, float factor, bool rows, float (&max_score)[2], float (&sum)[2],
                                             float (&out)[32]) {
    constexpr int PIECES = 9;
    const uint32_t pair = blockIdx.x * gridDim.y + blockIdx.y;
    float4* parts = (float4*)p.partial + size_t(pair) * p.splits * PIECES * blockDim.x + threadIdx.x;
    auto piece = [&](int split, int i) { return parts + (split * PIECES + i) * blockDim.x; };
    if (rows) {
#pragma unroll
        for (int i = 0; i < 8; i++) __stcg(piece(blockIdx.z, i), make_float4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]));
        __stcg(piece(blockIdx.z, 8), make_float4(max_score[0], max_score[1], sum[0], sum[1]));
    }
    if (!last_to_arrive(p.arrivals + pair, splits)) return false;
    if (!rows) return true;
    max_score[0] = max_score[1] = NOTHING, sum[0] = sum[1] = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) out[i] = 0;
#pragma unroll 2
    for (int split = 0; split < splits; split++) {
        float4 part[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; i++) part[i] = __ldcg(piece(split, i));
        const float part_max[2] = {part[8].x, part[8].y}, part_sum[2] = {part[8].z, part[8].w};
        float old_share[2], share[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float largest = fmaxf(max_score[h], part_max[h]);
            old_share[h] = power((max_score[h] - largest) * factor), share[h] = power((part_max[h] - largest) * factor);
            max_score[h] = largest, sum[h] = sum[h] * old_share[h] + part_sum[h] * share[h];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            out[4 * i] = out[4 * i] * old_share[0] + part[i].x * share[0], out[4 * i + 1] = out[4 * i + 1] * old_share[0] + part[i].y * share[0];
            out[4 * i + 2] = out[4 * i + 2] * old_share[1] + part[i].z * share[1], out[4 * i + 3] = out[4 * i + 3] * old_share[1] + part[i].w * share[1];
        }
    }
    return true;
}
