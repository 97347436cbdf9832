// The parameters of attention over the paged cache.
#pragma once

#include "common.cuh"

struct Attention {
    const uint16_t* queries;                 // [n, query heads, 64] in bf16
    const uint16_t *keys, *values;           // [blocks, kv heads, 16, 64], [blocks, kv heads, 64, 16] in bf16
    const float* sinks;                      // [query heads]
    const uint32_t *positions, *sequences, *table_starts, *table;
    const uint32_t* tiles;                   // chunks: first token and number of tokens of each tile
    uint16_t* out;                           // [n, query heads * 64], see `activation_place`
    float* partial;                          // splits: [n, kv heads, splits, 16, 64 + 2]
    uint32_t* arrivals;                      // splits: [n, kv heads], zero before and after
    uint32_t query_heads, kv_heads;
    uint32_t window;                         // 0: everything
    uint32_t out_format, out_stack;
    uint32_t splits, padding[2];
};
static_assert(sizeof(Attention) == 128);

constexpr float NOTHING = -1e30f;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ uint32_t pack2(float a, float b) {
    __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<uint32_t&>(v);
}
