// Which experts a token has, and where its activations go.
#pragma once

#include "common.cuh"

constexpr int MAX_EXPERTS = 256;

// Where each (token, rank) pair goes: one array of 32-bit words. Pairs in the order of their expert, then
// of their number `token * experts per token + rank`, have slots; an expert's slots begin at a multiple of eight.
struct Routes {
    const uint32_t* words;
    uint32_t experts, pairs;
    __device__ __forceinline__ Routes(const uint32_t* words, uint32_t experts, uint32_t pairs)
        : words(words), experts(experts), pairs(pairs) {}
    static constexpr uint32_t ACTIVE = 1;
    __device__ __forceinline__ uint32_t firsts_at() const { return ACTIVE + experts; }
    __device__ __forceinline__ uint32_t counts_at() const { return firsts_at() + experts + 1; }
    __device__ __forceinline__ uint32_t slots_at() const { return counts_at() + experts; }
    __device__ __forceinline__ uint32_t pairs_at(uint32_t array) const { return slots_at() + pairs + 7 * experts + array * pairs; }
    // Experts with at least one token, ascending.
    __device__ __forceinline__ uint32_t active_count() const { return words[0]; }
    __device__ __forceinline__ uint32_t active(uint32_t i) const { return words[ACTIVE + i]; }
    // The first slot of an expert, or with `experts` the end of all.
    __device__ __forceinline__ uint32_t first_slot(uint32_t expert) const { return words[firsts_at() + expert]; }
    __device__ __forceinline__ uint32_t count(uint32_t expert) const { return words[counts_at() + expert]; }
    // `NO_PAIR` for a slot that only fills up the eight.
    __device__ __forceinline__ uint32_t pair(uint32_t slot) const { return words[slots_at() + slot]; }
    __device__ __forceinline__ uint32_t slot_of_pair(uint32_t pair) const { return words[pairs_at(0) + pair]; }
    __device__ __forceinline__ uint32_t expert_of_pair(uint32_t pair) const { return words[pairs_at(1) + pair]; }
    __device__ __forceinline__ float weight_of_pair(uint32_t pair) const { return __uint_as_float(words[pairs_at(2) + pair]); }
};
constexpr uint32_t NO_PAIR = ~0u;

// What a block computes: 128 rows of one matrix for `n` rows of input from `first` on.
struct Work {
    uint32_t expert, first;
    int n;
};

// The tile of tokens of number `tile`, of experts one after the other; false if there are fewer. By each warp.
template <int TOKENS> __device__ __forceinline__ bool find(Work& work, const Routes& routes, uint32_t tile) {
    const uint32_t lane = threadIdx.x % WARP;
    for (uint32_t base = 0; base < routes.experts; base += WARP) {
        const uint32_t count = base + lane < routes.experts ? routes.count(base + lane) : 0, tiles = (count + TOKENS - 1) / TOKENS;
        uint32_t end = tiles;
#pragma unroll
        for (int i = 1; i < WARP; i *= 2) {
            uint32_t other = __shfl_up_sync(~0u, end, i);
            if (lane >= i) end += other;
        }
        const uint32_t found = __ballot_sync(~0u, tile < end);
        if (found) {
            const int from = __ffs(found) - 1;
            work.expert = base + from;
            const int all = __shfl_sync(~0u, count, from), own_tiles = __shfl_sync(~0u, tiles, from);
            const int own = tile - (__shfl_sync(~0u, end, from) - own_tiles);
            // Tiles of equal size, so that none is nearly empty.
            const int size = (all + 8 * own_tiles - 1) / (8 * own_tiles) * 8;
            work.first = routes.first_slot(work.expert) + own * size;
            work.n = min(all - own * size, size);
            return work.n > 0;
        }
        tile -= __shfl_sync(~0u, end, WARP - 1);
    }
    return false;
}

// The experts of `COUNT` tokens, one every `step`: those with the largest logits, descending, the lower index first on a tie, weighted by the
// softmax over them. A logit that is no number is the largest, and makes the weights no numbers, as an infinite one does. One warp; `words` are the routes, `logit_of` gives the logit of an expert for one of the tokens. A lane has up to `EACH`
// experts.
template <int COUNT, int EACH, class Logit>
__device__ __forceinline__ void choose_by(
    uint32_t* words, const Routes& routes, const Logit& logit_of, uint32_t token, uint32_t step, uint32_t experts_per_token) {
    const uint32_t lane = threadIdx.x % WARP, experts = routes.experts;
    // As integers of the same order, none zero; zero is what counts no more.
    uint32_t keys[COUNT][EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (i * WARP >= experts) break;
        const uint32_t e = i * WARP + lane;
#pragma unroll
        for (int t = 0; t < COUNT; t++) {
            const float v = e < experts ? logit_of(t, e) : 0.f;
            const uint32_t bits = isnan(v) ? 0x7fffffffu : __float_as_uint(v == 0.f ? 0.f : v);
            keys[t][i] = e < experts ? bits >> 31 ? ~bits : bits | 0x80000000u : 0;
        }
    }
    float largest[COUNT], sum[COUNT] = {}, own[COUNT] = {};
    uint32_t own_expert[COUNT] = {};
#pragma unroll 1
    for (uint32_t rank = 0; rank < experts_per_token; rank++) {
        uint32_t best[COUNT] = {}, at[COUNT] = {}, key[COUNT];
#pragma unroll
        for (int t = 0; t < COUNT; t++) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (i * WARP >= experts) break;
                if (keys[t][i] > best[t]) best[t] = keys[t][i], at[t] = i * WARP + lane;
            }
        }
        // Each of these takes its time, and those of the tokens one beside the other.
#pragma unroll
        for (int t = 0; t < COUNT; t++) key[t] = __reduce_max_sync(~0u, best[t]);
#pragma unroll
        for (int t = 0; t < COUNT; t++) at[t] = __reduce_min_sync(~0u, best[t] == key[t] ? at[t] : ~0u);
#pragma unroll
        for (int t = 0; t < COUNT; t++) {
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (at[t] == i * WARP + lane) keys[t][i] = 0;
            const float logit = __uint_as_float(key[t] >> 31 ? key[t] & 0x7fffffffu : ~key[t]);
            if (rank == 0) largest[t] = logit;
            const float weight = expf(logit - largest[t]);
            sum[t] += weight;
            if (rank == lane) own[t] = weight, own_expert[t] = at[t];
        }
    }
    if (lane >= experts_per_token) return;
#pragma unroll
    for (int t = 0; t < COUNT; t++) {
        const uint32_t pair = (token + t * step) * experts_per_token + lane;
        words[routes.pairs_at(1) + pair] = own_expert[t], words[routes.pairs_at(2) + pair] = __float_as_uint(own[t] / sum[t]);
    }
}

// Of one token.
template <class Logit>
__device__ __forceinline__ void choose_by(uint32_t* words, const Routes& routes, const Logit& logit_of, uint32_t token, uint32_t experts_per_token) {
    choose_by<1, MAX_EXPERTS / WARP>(words, routes, [&](int, uint32_t expert) { return logit_of(expert); }, token, 0, experts_per_token);
}

// The same by logits in memory, `[tokens, experts]`.
__device__ __forceinline__ void choose(uint32_t* words, const Routes& routes, const float* logits, uint32_t token, uint32_t experts_per_token) {
    const float* own = logits + size_t(token) * routes.experts;
    choose_by(words, routes, [&](uint32_t expert) { return __ldcg(own + expert); }, token, experts_per_token);
}
