// How several forms of the router add, to the same bits: sixteen inputs at a time, of which every sixteenth step is one sum, then these sums
// of one half of the inputs, and of the other.
#pragma once

#include "common.cuh"

constexpr int ROUTER_STEP = 16;  // inputs of a product
constexpr int ROUTER_WARPS = 16; // of a block that has a half, or all, of the inputs: one has every sixteenth step

// Adds products of sixteen experts' weights with sixteen of eight tokens' inputs, of which a lane has two pairs in three parts each.
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const uint32_t (&weights)[4], const uint32_t (&first)[3], const uint32_t (&second)[3]) {
    float step[4] = {};
#pragma unroll
    for (int part = 2; part >= 0; part--) Number<BF16>::multiply(step, weights, first[part], second[part]);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += step[i];
}

// The squares of a step's inputs, of which four neighbouring lanes have four each.
__device__ __forceinline__ float squares_of_step(const float4& v) {
    float sum = add_squares(0, v);
    sum += __shfl_xor_sync(~0u, sum, 1);
    return sum + __shfl_xor_sync(~0u, sum, 2);
}

// What all warps have, by one thread, in the order in which lanes add by exchanging.
template <class Of> __device__ __forceinline__ float sum_of_warps(const Of& of) {
    float v[ROUTER_WARPS];
#pragma unroll
    for (int w = 0; w < ROUTER_WARPS; w++) v[w] = of(w);
#pragma unroll
    for (int count = ROUTER_WARPS / 2; count; count /= 2)
#pragma unroll
        for (int w = 0; w < count; w++) v[w] += v[w + count];
    return v[0];
}
