// What follows a product: bias, rotation and cache, residual sum, SwiGLU. Shared by the products for few and for many tokens.
#pragma once

#include "common.cuh"
#include "routes.cuh"

// The same numbers as `After` in Rust.
enum After : uint32_t { STORE = 0, RESIDUAL = 1, QKV = 2, SWIGLU = 3 };

struct Epilogue {
    float* out;                    // STORE, RESIDUAL: [n, rows]
    uint16_t* out16;               // QKV: queries [n, query heads, 64] in bf16; SWIGLU: [slots, out_cols], see `activation_place`
    void *keys, *values;           // QKV: [blocks, kv heads, 16, 64] and [blocks, kv heads, 64, 16], see `CacheFormat`
    const float* rotary;           // QKV: [n, 64], cosines and sines
    const uint32_t* slots;         // QKV: [n], where a token's keys go: block * 16 + place in the block
    uint32_t kind;
    uint32_t query_heads, kv_heads;
    uint32_t out_cols, out_stack;  // SWIGLU; QKV: `out_cols` is 1 where a single token's queries are followed by its keys and values, else 0
    uint32_t out_format;           // SWIGLU: see `activation`; QKV: a `CacheFormat`
    float limit, alpha;            // SWIGLU; QKV in E4M3: the scales of keys and of values
};
static_assert(sizeof(Epilogue) == 80);

__device__ __forceinline__ float swiglu(float gate, float up, float limit, float alpha) {
    gate = smaller(gate, limit);
    up = smaller(larger(up, -limit), limit);
    // The error of the fast functions is some units of f32; what follows is 16 bits.
    return __fdividef((up + 1.f) * gate, 1.f + __expf(-alpha * gate));
}

// The rows of the stored matrix that rows g and g + 8 of a tile are.
__device__ __forceinline__ uint2 stored_rows(const Epilogue& e, uint32_t row_tile, uint32_t pair) {
    uint32_t row = row_tile * TILE_ROWS + pair;
    if (e.kind == SWIGLU) return make_uint2(row_tile * TILE_ROWS + 2 * pair, row_tile * TILE_ROWS + 2 * pair + 1);
    bool rotated = e.kind == QKV && row_tile / 4 < e.query_heads + e.kv_heads;
    if (rotated) row = row_tile / 4 * HEAD + row_tile % 4 * 8 + pair;
    return make_uint2(row, row + (rotated ? HEAD / 2 : 8));
}

// What the outputs of a pair of rows need of the weights: loaded early, since it comes from far.
struct Affine {
    float scale, a, b;
    __device__ __forceinline__ void load(const Epilogue& e, const Matrix& m, uint32_t expert, uint32_t row_tile, uint32_t pair) {
        uint2 rows = stored_rows(e, row_tile, pair);
        const float* bias = m.bias + size_t(expert) * m.rows;
        a = m.bias && rows.x < m.rows ? bias[rows.x] : 0.f;
        b = m.bias && rows.y < m.rows ? bias[rows.y] : 0.f;
        scale = m.tile_scale ? m.tile_scale[expert * ((m.rows + TILE_ROWS - 1) / TILE_ROWS) + row_tile] : 1.f;
    }
    // The outputs of the first row and of the second, said so that the compiler rounds alike in several kernels.
    __device__ __forceinline__ float first(float sum) const { return fmaf(sum, scale, a); }
    __device__ __forceinline__ float second(float sum) const { return fmaf(sum, scale, b); }
};

// A pair of numbers, rotated, likewise.
__device__ __forceinline__ float2 rotated(float a, float b, float cos, float sin) {
    return make_float2(fmaf(a, cos, -__fmul_rn(b, sin)), fmaf(b, cos, __fmul_rn(a, sin)));
}

// What query and key need of the token: its angles, and where its keys go.
struct Rotation {
    float cos, sin;
    uint32_t slot;
    __device__ __forceinline__ void load(const Epilogue& e, uint32_t row_tile, uint32_t pair, uint32_t token) {
        uint32_t first = stored_rows(e, row_tile, pair).x % HEAD;
        bool rotated = row_tile / 4 < e.query_heads + e.kv_heads;
        cos = rotated ? e.rotary[token * HEAD + first] : 0.f, sin = rotated ? e.rotary[token * HEAD + HEAD / 2 + first] : 0.f;
        slot = e.slots[token];
    }
};

// The two outputs of a pair of rows, g and g + 8 of a tile, for one token (or slot).
__device__ __forceinline__ void finish(
    const Epilogue& e, const Matrix& m, const Affine& affine, uint32_t row_tile, uint32_t pair, uint32_t token, float a, float b,
    const Rotation& rotation) {
    a = affine.first(a), b = affine.second(b);
    uint2 rows = stored_rows(e, row_tile, pair);
    if (e.kind == STORE || e.kind == RESIDUAL) {
        float* out = e.out + size_t(token) * m.rows;
        if (rows.x < m.rows) out[rows.x] = e.kind == RESIDUAL ? out[rows.x] + a : a;
        if (rows.y < m.rows) out[rows.y] = e.kind == RESIDUAL ? out[rows.y] + b : b;
    } else if (e.kind == SWIGLU) {
        uint32_t unit = row_tile * 8 + pair;
        uint16_t y = activation(e.out_format, swiglu(a, b, e.limit, e.alpha));
        if (unit < e.out_cols) e.out16[activation_place(e.out_stack, e.out_cols, token, unit)] = y;
        // Behind the last rows zeros, which the next product multiplies by weights that are.
        if ((row_tile + 1) * TILE_ROWS < m.rows) return;
        for (unit += 8; unit < e.out_cols; unit += 8) e.out16[activation_place(e.out_stack, e.out_cols, token, unit)] = 0;
    } else {
        uint32_t head = row_tile / 4, first = rows.x % HEAD, second = rows.y % HEAD;
        const bool rotates = head < e.query_heads + e.kv_heads;
        if (rotates) {
            const float2 pair = rotated(a, b, rotation.cos, rotation.sin);
            a = pair.x, b = pair.y;
        }
        uint16_t first16 = activation(BF16, a), second16 = activation(BF16, b);
        uint16_t* q = e.out16 + (size_t(token) * e.query_heads + head) * HEAD;
        if (head < e.query_heads || (e.out_cols && e.out_format == CACHE_BF16)) q[first] = first16, q[second] = second16;
        if (head < e.query_heads) return;
        uint32_t slot = rotation.slot, kv = (head - e.query_heads) % e.kv_heads;
        size_t at = (size_t(slot / BLOCK_TOKENS) * e.kv_heads + kv) * (BLOCK_TOKENS * HEAD);
        if (e.out_format == CACHE_E4M3) {
            const float scale = rotates ? e.limit : e.alpha;
            const uint8_t first8 = e4m3(a / scale), second8 = e4m3(b / scale);
            if (e.out_cols) q[first] = first8, q[second] = second8;
            if (rotates) {
                uint8_t* k = (uint8_t*)e.keys + at + slot % BLOCK_TOKENS * HEAD;
                k[first] = first8, k[second] = second8;
            } else {
                uint8_t* v = (uint8_t*)e.values + at + slot % BLOCK_TOKENS;
                v[first * BLOCK_TOKENS] = first8, v[second * BLOCK_TOKENS] = second8;
            }
        } else if (rotates) {
            uint16_t* k = (uint16_t*)e.keys + at + slot % BLOCK_TOKENS * HEAD;
            k[first] = first16, k[second] = second16;
        } else {
            uint16_t* v = (uint16_t*)e.values + at + slot % BLOCK_TOKENS;
            v[first * BLOCK_TOKENS] = first16, v[second * BLOCK_TOKENS] = second16;
        }
    }
}

__device__ __forceinline__ void finish(
    const Epilogue& e, const Matrix& m, const Affine& affine, uint32_t row_tile, uint32_t pair, uint32_t token, float a, float b) {
    Rotation rotation;
    if (e.kind == QKV) rotation.load(e, row_tile, pair, token);
    finish(e, m, affine, row_tile, pair, token, a, b, rotation);
}
