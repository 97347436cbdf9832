// The router of tens to hundreds of tokens on Hopper, up to the activations in the slots of their experts: norm, logits, choice, grouping
// and gathering in one kernel. A cluster has eight tokens, its blocks a share of the inputs each, and holds them in registers until it is
// known where they go. All blocks are at work at a time: each tells the others its choices, and finds from theirs where its tokens' slots
// are.
#include "hopper.cuh"
#include "router_gather.cuh"

constexpr int WARPS = ROUTER_WARPS, THREADS = WARPS * WARP;
constexpr int TOKENS = 8;                     // of a cluster
constexpr int MAX_RANKS = 4;                  // blocks of a cluster
constexpr int STEP = ROUTER_STEP;
constexpr int STEPS = MAX_HIDDEN / STEP / WARPS / 2; // of a warp, where two blocks share the inputs
constexpr int MAX_PAIRS = TOKENS * 16;        // of a cluster

// What a block has in shared memory beside what has one size: the norm's scales, the weights, and the warps' sums.
struct Layout {
    uint32_t inputs, line; // inputs of the block; bytes of an expert's weights
    __device__ __forceinline__ Layout(uint32_t inputs) : inputs(inputs), line(inputs * 2 + 32) {}
    __device__ __forceinline__ uint32_t weights() const { return inputs * 4; }
    __device__ __forceinline__ uint32_t sums() const { return weights() + ROUTER_EXPERTS * line; }
    // Bytes of a token's activations, where the weights have been.
    __device__ __forceinline__ uint32_t staged() const { return inputs * 2 + 16; }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) router_gather(const __grid_constant__ RouterGather p) {
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ float squares[WARPS][TOKENS], square[TOKENS], partial[ROUTER_EXPERTS * TOKENS], logits[TOKENS * ROUTER_EXPERTS];
    __shared__ uint32_t counts[2][ROUTER_EXPERTS], places[MAX_PAIRS]; // see `place_pairs`
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane_row(), t = lane_quarter();
    const uint32_t rank = cluster_rank(), ranks = cluster_size(), column_tiles = p.hidden / TILE_COLS;
    const uint32_t first_tile = column_tiles * rank / ranks, tiles = column_tiles * (rank + 1) / ranks - first_tile, first_input = first_tile * TILE_COLS;
    const Layout layout(tiles * TILE_COLS);
    const float* scales = (const float*)shared;
    uint8_t* weights = shared + layout.weights();
    float* sums = (float*)(shared + layout.sums()); // [WARPS][experts][ROUTER_SUMS]
    const uint32_t first = blockIdx.x * TOKENS, tokens = min(p.n - first, uint32_t(TOKENS));
    const Routes routes(p.routes, p.experts, p.n * p.experts_per_token);

#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < layout.inputs / 4; i += THREADS) copy_async(shared_address(shared + i * 16), p.norm_scale + first_input + i * 4);
#pragma unroll 1
    for (uint32_t row = warp; row < p.experts; row += WARPS)
#pragma unroll 1
        for (uint32_t i = lane; i < layout.inputs / 8; i += WARP)
            copy_async(shared_address(weights) + row * layout.line + i * 16, p.weights + size_t(row) * p.hidden + first_input + i * 8);
    commit_copies();
    if (threadIdx.x < p.experts) counts[0][threadIdx.x] = counts[1][threadIdx.x] = 0;
    wait_for_previous();
    start_next();

    // A lane has four neighbouring inputs: two where a product has its first eight, two where it has the others.
    float4 x[STEPS];
    const float* row = p.residual + size_t(min(first + g, p.n - 1)) * p.hidden + first_input;
    const uint32_t own = warp * STEP + 4 * t;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const uint32_t k = own + i * WARPS * STEP;
        x[i] = k < layout.inputs ? *(const float4*)(row + k) : make_float4(0, 0, 0, 0);
    }
    float all_squares = 0;
#pragma unroll
    for (int i = 0; i < STEPS; i++) all_squares += squares_of_step(x[i]);
    if (t == 0) squares[warp][g] = all_squares;
    wait_for_copies<0>();
    __syncthreads();
    float sum[ROUTER_EXPERTS / 16][4] = {};
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const uint32_t k = own + i * WARPS * STEP;
        if (k >= layout.inputs) break;
        x[i] = times(x[i], *(const float4*)(scales + k));
        uint32_t lower[3], upper[3];
        split(x[i].x, x[i].y, lower);
        split(x[i].z, x[i].w, upper);
#pragma unroll
        for (int j = 0; j < ROUTER_EXPERTS / 16; j++) {
            if (16 * j >= p.experts) break;
            const uint8_t* from = weights + (16 * j + g) * layout.line + k * 2;
            const uint2 w = *(const uint2*)from, w8 = *(const uint2*)(from + 8 * layout.line);
            multiply_parts(sum[j], {w.x, w8.x, w.y, w8.y}, lower, upper);
        }
    }
    keep_sums(sum, sums, warp, p.experts);
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < p.experts * TOKENS; i += THREADS) {
        partial[i] = sum_of_warps([&](int w) { return sums[(w * p.experts + i / TOKENS) * ROUTER_SUMS + i % TOKENS]; });
    }
    if (threadIdx.x < TOKENS) square[threadIdx.x] = sum_of_warps([&](int w) { return squares[w][threadIdx.x]; });
    cluster_barrier();
    // What all blocks have of it, all reads on their way together.
    auto sum_of_cluster = [&](const float* own) {
        float parts[MAX_RANKS], all = 0;
#pragma unroll
        for (int r = 0; r < MAX_RANKS; r++) parts[r] = r < ranks ? read_of_cluster(own, r) : 0;
#pragma unroll
        for (int r = 0; r < MAX_RANKS; r++) all += parts[r];
        return all;
    };
    auto inverse_of = [&](uint32_t token) { return rsqrtf(sum_of_cluster(square + token) / p.hidden + p.eps); };
    const float inverse = inverse_of(g);
    // The choices of some of the tokens are this block's.
    const uint32_t chosen = TOKENS / ranks;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < p.experts * chosen; i += THREADS) {
        const uint32_t token = rank * chosen + i / p.experts, expert = i % p.experts;
        logits[i] = fmaf(sum_of_cluster(partial + expert * TOKENS + token), inverse_of(token), p.bias[expert]);
    }
    __syncthreads();
    if (warp < chosen && rank * chosen + warp < tokens)
        choose_by(p.routes, routes, [&](uint32_t expert) { return logits[warp * p.experts + expert]; }, first + rank * chosen + warp, p.experts_per_token);
    __syncthreads();
    uint32_t times = 0;
    if (threadIdx.x == 0) times = arrive_of_blocks(p.barrier, gridDim.x * gridDim.y);
    // The activations take the place of the weights, while the blocks wait for one another.
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const uint32_t k = own + i * WARPS * STEP;
        if (k >= layout.inputs) break;
        uint16_t* to = (uint16_t*)(weights + g * layout.staged()) + k / TILE_COLS * TILE_COLS;
        *(uint32_t*)(to + product_position(k % TILE_COLS)) = activation(p.format, x[i].x * inverse) | activation(p.format, x[i].y * inverse) << 16;
        *(uint32_t*)(to + product_position(k % TILE_COLS + 2)) = activation(p.format, x[i].z * inverse) | activation(p.format, x[i].w * inverse) << 16;
    }
    if (threadIdx.x == 0) wait_for_blocks(p.barrier, times);
    __syncthreads();

    // How many pairs of each expert there are, and how many of them before this cluster's.
    const uint32_t* expert_of = p.routes + routes.pairs_at(1);
    const uint32_t first_pair = first * p.experts_per_token, own_pairs = tokens * p.experts_per_token;
    constexpr int TOGETHER = 4; // reads
#pragma unroll 1
    for (uint32_t begin = threadIdx.x; begin < routes.pairs; begin += TOGETHER * THREADS) {
        uint32_t experts[TOGETHER];
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) experts[k] = begin + k * THREADS < routes.pairs ? __ldcg(expert_of + begin + k * THREADS) : 0;
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            const uint32_t i = begin + k * THREADS;
            if (i >= routes.pairs) break;
            atomicAdd(counts[0] + experts[k], 1);
            if (i < first_pair) atomicAdd(counts[1] + experts[k], 1);
            else if (i < first_pair + own_pairs) places[i - first_pair] = experts[k];
        }
    }
    __syncthreads();
    if (warp == 0)
        place_pairs(p, routes, counts[0], counts[1], places, first_pair, own_pairs, blockIdx.x == 0 && rank == 0, rank == 0);
    __syncthreads();
#pragma unroll 1
    for (uint32_t pair = warp; pair < own_pairs; pair += WARPS) {
        const uint32_t slot = places[pair];
        const uint8_t* from = weights + pair / p.experts_per_token * layout.staged();
        for (uint32_t piece = lane; piece < tiles * 8; piece += WARP)
            *(uint4*)(p.out + (size_t(first_tile + piece / 8) * p.stack + slot) * TILE_COLS + ((piece % 8 ^ slot % 8) << 3)) = *(const uint4*)(from + piece * 16);
    }
}
