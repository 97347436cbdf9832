// Norm, router and gathering in one kernel whose blocks are all at work at a time: what its forms for tens of tokens and for thousands share.
#pragma once

#include "epilogue.cuh"
#include "router.cuh"

struct RouterGather {
    const float* residual;           // [n, hidden]
    const float* norm_scale;         // [hidden]
    const __nv_bfloat16* weights;    // [experts, hidden]
    const float* bias;               // [experts]
    uint16_t* out;                   // stacked, a row per slot
    uint32_t* routes;                // see `Routes`
    uint32_t* barrier;               // blocks that have come, zero before and after; times that all have
    uint32_t* counts;                // router_gather_many: [blocks, ROUTER_EXPERTS], pairs that a block has of an expert
    uint32_t hidden, n, experts, experts_per_token;
    uint32_t format, stack;          // of `out`
    float eps;
    uint32_t each;                   // tokens of a cluster or block
};
static_assert(sizeof(RouterGather) == 96);

constexpr int ROUTER_EXPERTS = 32;   // at most: a lane's each
constexpr int ROUTER_SUMS = 8 + 1;   // numbers of an expert's sums of eight tokens, such that neighbours lie in different banks

// A warp's sums of eight tokens go to `to`, [warps][experts][ROUTER_SUMS].
__device__ __forceinline__ void keep_sums(const float (&sum)[ROUTER_EXPERTS / 16][4], float* to, uint32_t warp, uint32_t experts) {
#pragma unroll
    for (int j = 0; j < ROUTER_EXPERTS / 16; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t expert = 16 * j + lane_row() + i / 2 * 8;
            if (expert < experts) to[(warp * experts + expert) * ROUTER_SUMS + 2 * lane_quarter() + i % 2] = sum[j][i];
        }
    }
}

// A barrier of all blocks, in two halves, by one thread of each after all its threads have come; the first gives what the second takes.
__device__ __forceinline__ uint32_t arrive_of_blocks(uint32_t* barrier, uint32_t blocks) {
    const uint32_t times = *(volatile uint32_t*)(barrier + 1);
    __threadfence();
    if (atomicAdd(barrier, 1) == blocks - 1) {
        *(volatile uint32_t*)barrier = 0;
        __threadfence();
        atomicAdd(barrier + 1, 1);
    }
    return times;
}
__device__ __forceinline__ void wait_for_blocks(const uint32_t* barrier, uint32_t times) {
    uint32_t now;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(barrier + 1) : "memory");
    while (now == times);
}

// The slots of this block's pairs, by how many pairs each expert has and, in `next`, how many of them come before. `places`: the expert of
// each, then its slot. By one warp. One block `tells` the experts' counts and first slots, and one of those that share pairs where they are.
__device__ __forceinline__ void place_pairs(
    const RouterGather& p, const Routes& routes, const uint32_t* counts, uint32_t* next, uint32_t* places, uint32_t first_pair,
    uint32_t own_pairs, bool tells, bool tells_pairs) {
    const uint32_t lane = threadIdx.x % WARP, count = lane < p.experts ? counts[lane] : 0, eights = (count + 7) / 8 * 8;
    uint32_t end = eights;
#pragma unroll
    for (int i = 1; i < WARP; i *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, end, i);
        if (lane >= i) end += other;
    }
    const uint32_t begin = end - eights, used = __ballot_sync(~0u, count != 0);
    if (lane < p.experts) next[lane] += begin;
    if (tells && lane < p.experts) {
        if (count) p.routes[Routes::ACTIVE + __popc(used & ((1u << lane) - 1))] = lane;
        p.routes[routes.counts_at() + lane] = count, p.routes[routes.firsts_at() + lane] = begin;
#pragma unroll 1
        for (uint32_t slot = begin + count; slot < end; slot++) p.routes[routes.slots_at() + slot] = NO_PAIR;
        if (lane == p.experts - 1) p.routes[0] = __popc(used), p.routes[routes.firsts_at() + p.experts] = end;
    }
    __syncwarp();
#pragma unroll 1
    for (uint32_t i = 0; i < own_pairs; i += WARP) {
        const bool inside = i + lane < own_pairs;
        const uint32_t e = inside ? places[i + lane] : ~0u, same = __match_any_sync(~0u, e), rank = __popc(same & ((1u << lane) - 1));
        const uint32_t slot = inside ? next[e] + rank : 0;
        __syncwarp();
        if (inside && rank == 0) next[e] = slot + __popc(same);
        __syncwarp();
        if (!inside) continue;
        places[i + lane] = slot;
        const uint32_t pair = first_pair + i + lane;
        if (tells_pairs) p.routes[routes.slots_at() + slot] = pair, p.routes[routes.pairs_at(0) + pair] = slot;
    }
}
