// The router of hundreds to thousands of tokens on Hopper, up to the activations in the slots of their experts: norm, logits, choice, grouping
// and gathering in one kernel. A block has neighbouring tokens, as many as make one block of each multiprocessor. It reads them for the
// logits, tells the others how many it has of each expert, finds from theirs where its tokens' slots are, and reads them again, each row
// once, for all its slots.
#include "hopper.cuh"
#include "router_gather.cuh"

constexpr int WARPS = 16, THREADS = WARPS * WARP;
constexpr int STEP = ROUTER_STEP;
constexpr int TOKENS = 64;                 // of a block, at most
constexpr int MAX_PAIRS = TOKENS * 16;
constexpr int AHEAD = 8;                   // steps whose inputs are on their way
constexpr int GROUP = 8;                   // column tiles of a token that a warp gathers at a time

extern "C" __global__ void __launch_bounds__(THREADS, 1) router_gather_many(const __grid_constant__ RouterGather p) {
    extern __shared__ __align__(16) float scales[]; // [hidden], then the weights, then the warps' sums
    __shared__ float squares[WARPS][8], inverses[TOKENS];
    __shared__ uint32_t own[ROUTER_EXPERTS], counts[2][ROUTER_EXPERTS], places[MAX_PAIRS]; // see `place_pairs`
    const uint32_t warp = __shfl_sync(~0u, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP, g = lane_row(), t = lane_quarter();
    const uint32_t line = p.hidden * 2 + 16; // neighbouring rows lie in different banks
    uint8_t* weights = (uint8_t*)(scales + p.hidden);
    float* sums = (float*)(weights + ROUTER_EXPERTS * line); // [WARPS][experts][ROUTER_SUMS]
    const uint32_t first = blockIdx.x * p.each, tokens = min(p.n - first, p.each);
    const float* residual = p.residual + size_t(first) * p.hidden;
    const Routes routes(p.routes, p.experts, p.n * p.experts_per_token);

#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < p.hidden / 4; i += THREADS) copy_async(shared_address(scales + i * 4), p.norm_scale + i * 4);
#pragma unroll 1
    for (uint32_t row = warp; row < p.experts; row += WARPS)
#pragma unroll 1
        for (uint32_t i = lane; i < p.hidden / 8; i += WARP)
            copy_async(shared_address(weights) + row * line + i * 16, p.weights + size_t(row) * p.hidden + i * 8);
    commit_copies();
    if (warp == 0) own[lane] = counts[0][lane] = counts[1][lane] = 0;
    wait_for_previous();
    start_next();

    // A warp has eight tokens, and shares their inputs with as many others as there are for all. A lane has two inputs of a product's first
    // eight and two of the others.
    const uint32_t tiles = (tokens + 7) / 8, slices = WARPS / tiles, tile = warp % tiles, slice = warp / tiles;
    const uint32_t steps = slice < slices ? (p.hidden / STEP - slice + slices - 1) / slices : 0;
    const uint32_t begin = slice * STEP, further = slices * STEP;
    const float* row = residual + size_t(min(8 * tile + g, tokens - 1)) * p.hidden + begin + 2 * t;
    float2 x[AHEAD][2];
    uint32_t asked = 0; // steps
    auto ask = [&](float2 (&to)[2]) {
        if (asked++ >= steps) return;
        to[0] = *(const float2*)row, to[1] = *(const float2*)(row + 8);
        row += further;
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) ask(x[i]);
    wait_for_copies<0>();
    __syncthreads();
    // A lane has a row of one of four matrices of eight experts and eight inputs.
    uint32_t weights_at = shared_address(weights) + lane % 16 * line + (begin + lane / 16 * 8) * 2;
    const float* scale_at = scales + begin + 2 * t;
    float sum[ROUTER_EXPERTS / 16][4] = {}, square = 0;
#pragma unroll 1
    for (uint32_t step = 0; step < steps; step += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (step + i >= steps) break;
            uint32_t parts[2][3];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const float2 v = x[i][k], scale = *(const float2*)(scale_at + 8 * k);
                square += v.x * v.x + v.y * v.y;
                split(v.x * scale.x, v.y * scale.y, parts[k]);
            }
            ask(x[i]);
#pragma unroll
            for (int j = 0; j < ROUTER_EXPERTS / 16; j++) {
                uint32_t a[4];
                load_matrices(a, weights_at + 16 * j * line);
                multiply_parts(sum[j], a, parts[0], parts[1]);
            }
            weights_at += further * 2, scale_at += further;
        }
    }
    square += __shfl_xor_sync(~0u, square, 1);
    square += __shfl_xor_sync(~0u, square, 2);
    if (t == 0) squares[warp][g] = square;
    keep_sums(sum, sums, warp, p.experts);
    __syncthreads();
    // A lane has an expert.
    const float bias = lane < p.experts ? p.bias[lane] : 0;
#pragma unroll 1
    for (uint32_t token = warp; token < tokens; token += WARPS) {
        float logit = 0, all = 0;
        for (uint32_t from = token / 8; from < slices * tiles; from += tiles) {
            if (lane < p.experts) logit += sums[(from * p.experts + lane) * ROUTER_SUMS + token % 8];
            all += squares[from][token % 8];
        }
        const float inverse = rsqrtf(all / p.hidden + p.eps);
        if (lane == 0) inverses[token] = inverse;
        logit = logit * inverse + bias;
        choose_by(p.routes, routes, [&](uint32_t) { return logit; }, first + token, p.experts_per_token);
    }
    __syncthreads();
    const uint32_t first_pair = first * p.experts_per_token, own_pairs = tokens * p.experts_per_token;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < own_pairs; i += THREADS) {
        places[i] = p.routes[routes.pairs_at(1) + first_pair + i];
        atomicAdd(own + places[i], 1);
    }
    __syncthreads();
    if (warp == 0) p.counts[blockIdx.x * ROUTER_EXPERTS + lane] = own[lane];
    __syncwarp();
    uint32_t times = 0;
    if (threadIdx.x == 0) times = arrive_of_blocks(p.barrier, gridDim.x);

    // Of all tokens some columns, then of all those before: what was read last may still be in the cache, and what is written at about the
    // same time, by all blocks, is all rows of a few column tiles.
    const uint32_t column_tiles = p.hidden / TILE_COLS, groups = (column_tiles + GROUP - 1) / GROUP, items = groups * tokens;
    auto tile_of = [&](uint32_t item) { return (groups - 1 - item / tokens) * GROUP + lane / 4; };
    // A lane has four inputs of each sixteen of its column tile: two pieces of activations.
    auto bring = [&](float4 (&to)[4], uint32_t item) {
        if (item >= items || tile_of(item) >= column_tiles) return;
        const float* from = residual + size_t(item % tokens) * p.hidden + tile_of(item) * TILE_COLS + 4 * t;
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = *(const float4*)(from + 16 * i);
    };
    float4 now[4] = {};
    bring(now, warp);
    if (threadIdx.x == 0) wait_for_blocks(p.barrier, times);
    __syncthreads();

    uint32_t all = 0, before = 0;
#pragma unroll 4
    for (uint32_t block = warp; block < gridDim.x; block += WARPS) {
        const uint32_t count = __ldcg(p.counts + block * ROUTER_EXPERTS + lane);
        all += count;
        if (block < blockIdx.x) before += count;
    }
    atomicAdd(counts[0] + lane, all), atomicAdd(counts[1] + lane, before);
    __syncthreads();
    if (warp == 0) place_pairs(p, routes, counts[0], counts[1], places, first_pair, own_pairs, blockIdx.x == 0, true);
    __syncthreads();

    const uint32_t odd = g % 2, piece = 2 * t + odd;
#pragma unroll 1
    for (uint32_t item = warp; item < items; item += WARPS) {
        float4 next[4] = {};
        bring(next, item + WARPS);
        const uint32_t tile = tile_of(item), even = tile - odd, token = item % tokens;
        const float inverse = inverses[token];
        const float* scale = scales + min(tile, column_tiles - 1) * TILE_COLS + 4 * t;
        uint32_t y[2][4]; // piece 2 t of the tile, and the next one
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 s = *(const float4*)(scale + 16 * i);
            y[0][i] = activation(p.format, now[i].x * s.x * inverse) | activation(p.format, now[i].y * s.y * inverse) << 16;
            y[1][i] = activation(p.format, now[i].z * s.z * inverse) | activation(p.format, now[i].w * s.w * inverse) << 16;
            now[i] = next[i];
        }
        // Lanes of neighbouring tiles exchange a piece, so that a tile's 128 bytes are written together.
        uint32_t other[4];
#pragma unroll
        for (int i = 0; i < 4; i++) other[i] = __shfl_xor_sync(~0u, odd ? y[0][i] : y[1][i], 4);
        const uint4 a = make_uint4(y[0][0], y[0][1], y[0][2], y[0][3]), b = make_uint4(y[1][0], y[1][1], y[1][2], y[1][3]);
        const uint4 c = make_uint4(other[0], other[1], other[2], other[3]), of_even = odd ? c : a, of_odd = odd ? b : c;
#pragma unroll 4
        for (uint32_t rank = 0; rank < p.experts_per_token; rank++) {
            const uint32_t slot = places[token * p.experts_per_token + rank];
            uint16_t* to = p.out + (size_t(even) * p.stack + slot) * TILE_COLS + ((piece ^ slot % 8) << 3);
            if (even < column_tiles) *(uint4*)to = of_even;
            if (even + 1 < column_tiles) *(uint4*)(to + size_t(p.stack) * TILE_COLS) = of_odd;
        }
    }
}
