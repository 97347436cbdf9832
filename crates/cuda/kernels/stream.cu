// What happens to the residual stream between products: embedding, norms, the router, and the largest logit.
#include "epilogue.cuh"

struct Embed {
    const void* values;          // BF16: bf16; four bits: codes as stored
    const uint8_t* scales;       // four bits: as stored
    const uint32_t *tokens, *positions;
    const float* frequencies;    // [32]
    float* residual;             // [n, hidden]
    float* rotary;               // [n, 64]: cosines, sines
    const uint32_t *sequences, *full_starts, *sliding_starts, *table;
    uint32_t* slots;             // [2, n]: where a token's keys go in full and in sliding layers
    uint32_t hidden, n;
    uint32_t block;              // inputs per scale: 0 (BF16), 16 (E4M3), 32 (E8M0)
    float global_scale, concentration;
    uint32_t padding;
};
static_assert(sizeof(Embed) == 120);

__device__ __forceinline__ float code_value(uint32_t code) {
    uint32_t e = code >> 1 & 3, m = code & 1;
    float v = e ? ldexpf(2 + m, int(e) - 2) : 0.5f * m;
    return code & 8 ? -v : v;
}

__device__ __forceinline__ float scale_value(uint32_t block, uint32_t byte) {
    if (block == 32) return ldexpf(1, int(byte) - 127);
    uint32_t e = byte >> 3, m = byte & 7;
    return e ? ldexpf(8 + m, int(e) - 10) : ldexpf(m, -9);
}

// One block per token.
extern "C" __global__ void embed(const __grid_constant__ Embed p) {
    wait_for_previous();
    start_next();
    uint32_t token = blockIdx.x;
    size_t from = size_t(p.tokens[token]) * p.hidden;
    for (uint32_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
        float v;
        if (p.block == 0) {
            v = __bfloat162float(((const __nv_bfloat16*)p.values)[from + i]);
        } else {
            uint32_t code = ((const uint8_t*)p.values)[(from + i) / 2] >> i % 2 * 4 & 15;
            v = code_value(code) * (scale_value(p.block, p.scales[(from + i) / p.block]) * p.global_scale);
        }
        p.residual[size_t(token) * p.hidden + i] = v;
    }
    if (threadIdx.x < 2) {
        uint32_t position = p.positions[token];
        int start = (threadIdx.x ? p.sliding_starts : p.full_starts)[p.sequences[token]];
        uint32_t block = p.table[start + int(position / BLOCK_TOKENS)];
        p.slots[threadIdx.x * p.n + token] = block * BLOCK_TOKENS + position % BLOCK_TOKENS;
    }
    if (threadIdx.x < HEAD / 2) {
        // The angle is an F32 product, as in the references; its cosine and sine are accurate far out.
        float angle = float(p.positions[token]) * p.frequencies[threadIdx.x];
        p.rotary[token * HEAD + threadIdx.x] = cosf(angle) * p.concentration;
        p.rotary[token * HEAD + HEAD / 2 + threadIdx.x] = sinf(angle) * p.concentration;
    }
}

struct Norm {
    float* residual;             // [n, hidden]; changed only if `experts` is given
    const float* experts;        // [slots, hidden], or null: added, weighted, in the order of the ranks
    const uint32_t* routes;
    const uint32_t* rows;        // which rows of the stream, or null: all
    const float* scale;          // [hidden]
    uint16_t* out;               // [n, cols]
    uint32_t hidden, cols, n, experts_count, experts_per_token;
    uint32_t format, tiled;
    float eps;
};
static_assert(sizeof(Norm) == 80);

// One block per row.
extern "C" __global__ void __launch_bounds__(256) rms_norm(const __grid_constant__ Norm p) {
    __shared__ float scratch[WARP];
    Vector<PRODUCT_VALUES> scale, x;
    if (p.out) scale.load(p.scale, p.hidden);
    wait_for_previous();
    start_next();
    uint32_t row = p.rows ? p.rows[blockIdx.x] : blockIdx.x;
    float* residual = p.residual + size_t(row) * p.hidden;
    x.load(residual, p.hidden);
    if (p.experts) {
        Routes routes(p.routes, p.experts_count, p.n * p.experts_per_token);
        Vector<PRODUCT_VALUES> sum = {};
        for (uint32_t rank = 0; rank < p.experts_per_token; rank++) {
            uint32_t pair = row * p.experts_per_token + rank;
            float weight = routes.weight_of_pair(pair);
            Vector<PRODUCT_VALUES> y;
            y.load(p.experts + size_t(routes.slot_of_pair(pair)) * p.hidden, p.hidden);
            for (int i = 0; i < PRODUCT_VALUES; i++) {
                sum.v[i].x += weight * y.v[i].x, sum.v[i].y += weight * y.v[i].y;
                sum.v[i].z += weight * y.v[i].z, sum.v[i].w += weight * y.v[i].w;
            }
        }
        for (int i = 0; i < PRODUCT_VALUES; i++) {
            x.v[i].x += sum.v[i].x, x.v[i].y += sum.v[i].y, x.v[i].z += sum.v[i].z, x.v[i].w += sum.v[i].w;
            uint32_t at = i * blockDim.x + threadIdx.x;
            if (at < p.hidden / 4) ((float4*)residual)[at] = x.v[i];
        }
    }
    if (!p.out) return;
    float inverse = rsqrtf(block_sum(x.square(), scratch) / p.hidden + p.eps);
    x.store(p.out + size_t(blockIdx.x) * p.cols, p.cols, p.format, p.tiled, scale, inverse);
}

struct Router {
    const float* residual;           // [n, hidden]
    const float* norm_scale;         // [hidden]
    const __nv_bfloat16* weights;    // [experts, hidden]
    const float* bias;               // [experts]
    uint16_t* out;                   // [n, cols], the normed stream
    float* logits;                   // [n, experts]
    uint32_t* routes;                // see `Routes`
    uint32_t* arrivals;              // [n + 1], zero before and after
    uint32_t hidden, cols, n, experts, experts_per_token;
    uint32_t format, tiled;
    float eps;
    uint32_t shares;                 // few tokens: blocks that share a token's experts
    uint32_t padding;
    Prefetch next;                   // few tokens: for the blocks beyond them
};
static_assert(sizeof(Router) == 120);

constexpr int MAX_EXPERTS = 256;

__device__ __forceinline__ void load_weights(Vector<PRODUCT_VALUES>& to, const Router& p, uint32_t expert) {
#pragma unroll
    for (int i = 0; i < PRODUCT_VALUES; i++) {
        uint32_t at = i * blockDim.x + threadIdx.x;
        bool inside = at < p.hidden / 4;
        uint2 pairs = inside ? ((const uint2*)(p.weights + size_t(expert) * p.hidden))[at] : make_uint2(0, 0);
        float2 lower = __bfloat1622float2((const __nv_bfloat162&)pairs.x), upper = __bfloat1622float2((const __nv_bfloat162&)pairs.y);
        to.v[i] = make_float4(lower.x, lower.y, upper.x, upper.y);
    }
}

// True in the last of `count` blocks to arrive.
__device__ __forceinline__ bool last_to_arrive(uint32_t* counter, uint32_t count) {
    __shared__ uint32_t arrived;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = atomicAdd(counter, 1);
        if (arrived == count - 1) *counter = 0;
    }
    __syncthreads();
    bool last = arrived == count - 1;
    __syncthreads();
    __threadfence();
    return last;
}

// The largest `ranks` logits of a token, value descending, the lower index first on a tie; softmax over them. One warp.
__device__ __forceinline__ void choose(const Router& p, uint32_t token) {
    int lane = threadIdx.x % WARP;
    constexpr int EACH = MAX_EXPERTS / WARP;
    float v[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        uint32_t e = i * WARP + lane;
        float logit = e < p.experts ? __ldcg(p.logits + size_t(token) * p.experts + e) : -INFINITY;
        v[i] = isnan(logit) ? -INFINITY : logit;
    }
    uint32_t used = 0, pairs = p.n * p.experts_per_token;
    uint32_t* expert_of = p.routes + 2 + 2 * p.experts + 2 * pairs + token * p.experts_per_token;
    float* weight_of = (float*)(expert_of + pairs);
    float largest = 0, sum = 0, own = 0;
    for (uint32_t rank = 0; rank < p.experts_per_token; rank++) {
        float best = -INFINITY;
        uint32_t at = ~0u;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            uint32_t e = i * WARP + lane;
            if (e < p.experts && !(used >> i & 1) && (at == ~0u || v[i] > best)) best = v[i], at = e;
        }
#pragma unroll
        for (int i = WARP / 2; i; i /= 2) {
            float other = __shfl_xor_sync(~0u, best, i);
            uint32_t other_at = __shfl_xor_sync(~0u, at, i);
            if (other_at != ~0u && (at == ~0u || other > best || (other == best && other_at < at))) best = other, at = other_at;
        }
        if (at % WARP == lane) used |= 1u << at / WARP;
        if (rank == 0) largest = best;
        float weight = best == largest ? 1.f : expf(best - largest);
        sum += weight;
        if (rank == lane) own = weight;
        if (lane == 0) expert_of[rank] = at;
    }
    if (lane < p.experts_per_token) weight_of[lane] = own / sum;
}

// Threads that sort, each with a contiguous part of the pairs.
constexpr int SORTERS = 128;

// Sorts all pairs by expert, stably. One block; `counts`: [experts][SORTERS].
__device__ __forceinline__ void sort_pairs(const Router& p, uint16_t* counts) {
    __shared__ uint32_t first[MAX_EXPERTS + 1];
    uint32_t pairs = p.n * p.experts_per_token, each = (pairs + SORTERS - 1) / SORTERS, lane = threadIdx.x % WARP;
    uint32_t* slots = p.routes + 2 + 2 * p.experts;
    uint32_t *slot_of = slots + pairs, *expert_of = slot_of + pairs;
    uint32_t begin = min(threadIdx.x * each, pairs), end = min(begin + each, pairs);
    if (threadIdx.x < SORTERS) {
        for (uint32_t e = 0; e < p.experts; e++) counts[e * SORTERS + threadIdx.x] = 0;
#pragma unroll 8
        for (uint32_t i = begin; i < end; i++) counts[__ldcg(expert_of + i) * SORTERS + threadIdx.x]++;
    }
    __syncthreads();
    // The pairs of an expert that earlier threads have, and the expert's number of pairs.
    for (uint32_t e = threadIdx.x / WARP; e < p.experts; e += blockDim.x / WARP) {
        constexpr int EACH = SORTERS / WARP;
        uint16_t* own = counts + e * SORTERS + lane * EACH;
        uint32_t before = 0, total = 0;
        for (int i = 0; i < EACH; i++) total += own[i];
        uint32_t sum = total;
#pragma unroll
        for (int i = 1; i < WARP; i *= 2) {
            uint32_t other = __shfl_up_sync(~0u, sum, i);
            if (lane >= i) sum += other;
        }
        before = sum - total;
        for (int i = 0; i < EACH; i++) {
            uint32_t count = own[i];
            own[i] = before;
            before += count;
        }
        if (lane == WARP - 1) first[e + 1] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t active = 0;
        first[0] = 0;
        for (uint32_t e = 0; e < p.experts; e++) {
            if (first[e + 1]) p.routes[1 + active++] = e;
            first[e + 1] += first[e];
        }
        p.routes[0] = active;
    }
    __syncthreads();
    for (uint32_t e = threadIdx.x; e <= p.experts; e += blockDim.x) p.routes[1 + p.experts + e] = first[e];
    if (threadIdx.x >= SORTERS) return;
#pragma unroll 8
    for (uint32_t i = begin; i < end; i++) {
        uint32_t e = __ldcg(expert_of + i), slot = first[e] + counts[e * SORTERS + threadIdx.x]++;
        slots[slot] = i;
        slot_of[i] = slot;
    }
}

// Norm, router logits in f32, choice, grouping, for few tokens. `blockIdx.y`: token; `blockIdx.x`: a share of the experts.
extern "C" __global__ void __launch_bounds__(256) router(const __grid_constant__ Router p) {
    extern __shared__ uint16_t counts[];
    if (blockIdx.x >= p.shares) {
        uint32_t more = gridDim.x - p.shares;
        return prefetch(p.next, blockIdx.y * more + blockIdx.x - p.shares, gridDim.y * more);
    }
    __shared__ float scratch[2][WARP];
    Vector<PRODUCT_VALUES> scale, x, weights;
    scale.load(p.norm_scale, p.hidden);
    uint32_t expert = blockIdx.x;
    load_weights(weights, p, expert);
    wait_for_previous();
    start_next();
    uint32_t token = blockIdx.y;
    x.load(p.residual + size_t(token) * p.hidden, p.hidden);
    float inverse = rsqrtf(block_sum(x.square(), scratch[0]) / p.hidden + p.eps);
    if (blockIdx.x == 0) x.store(p.out + size_t(token) * p.cols, p.cols, p.format, p.tiled, scale, inverse);
    for (int i = 0; i < PRODUCT_VALUES; i++)
        x.v[i].x *= scale.v[i].x, x.v[i].y *= scale.v[i].y, x.v[i].z *= scale.v[i].z, x.v[i].w *= scale.v[i].w;
    for (; expert < p.experts; expert += p.shares) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < PRODUCT_VALUES; i++) {
            const float4 &a = x.v[i], &b = weights.v[i];
            sum += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
        }
        if (expert + p.shares < p.experts) load_weights(weights, p, expert + p.shares);
        sum = block_sum(sum, scratch[1]);
        if (threadIdx.x == 0) p.logits[size_t(token) * p.experts + expert] = sum * inverse + p.bias[expert];
        __syncthreads();
    }
    if (!last_to_arrive(p.arrivals + 1 + token, p.shares)) return;
    if (threadIdx.x < WARP) choose(p, token);
    // A single token's experts are taken by their rank.
    if (p.n == 1 || !last_to_arrive(p.arrivals, p.n)) return;
    sort_pairs(p, counts);
}

// The same for many tokens, each of which has one warp, so that a block reads the router's weights once for eight.
extern "C" __global__ void __launch_bounds__(256) router_many(const __grid_constant__ Router p) {
    extern __shared__ uint16_t counts[];
    constexpr int EACH = MAX_HIDDEN / 8 / WARP; // of a lane, times eight inputs
    wait_for_previous();
    start_next();
    uint32_t token = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (token < p.n) {
        const float4* residual = (const float4*)(p.residual + size_t(token) * p.hidden);
        float x[EACH][8], square = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            uint32_t at = i * WARP + lane;
            bool inside = at < p.hidden / 8;
            float4 lower = inside ? residual[2 * at] : make_float4(0, 0, 0, 0);
            float4 upper = inside ? residual[2 * at + 1] : make_float4(0, 0, 0, 0);
            x[i][0] = lower.x, x[i][1] = lower.y, x[i][2] = lower.z, x[i][3] = lower.w;
            x[i][4] = upper.x, x[i][5] = upper.y, x[i][6] = upper.z, x[i][7] = upper.w;
#pragma unroll
            for (int k = 0; k < 8; k++) square += x[i][k] * x[i][k];
        }
        float inverse = rsqrtf(warp_sum(square) / p.hidden + p.eps);
        uint16_t* out = p.out + size_t(token) * p.cols;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            uint32_t at = i * WARP + lane;
            if (at * 8 >= p.cols) continue;
#pragma unroll
            for (int k = 0; k < 8; k += 2) {
                bool inside = at < p.hidden / 8;
                float2 scale = inside ? ((const float2*)p.norm_scale)[at * 4 + k / 2] : make_float2(0, 0);
                x[i][k] *= inverse * scale.x, x[i][k + 1] *= inverse * scale.y;
                uint32_t pair = activation(p.format, x[i][k]) | activation(p.format, x[i][k + 1]) << 16;
                *(uint32_t*)(out + position_in(p.tiled, at * 8 + k)) = pair;
            }
        }
        for (uint32_t e = 0; e < p.experts; e++) {
            const uint4* weights = (const uint4*)(p.weights + size_t(e) * p.hidden);
            float sum = 0;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                uint32_t at = i * WARP + lane;
                uint4 w = at < p.hidden / 8 ? __ldg(weights + at) : make_uint4(0, 0, 0, 0);
                const uint32_t* words = (const uint32_t*)&w;
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    sum += x[i][2 * k] * __uint_as_float(words[k] << 16);
                    sum += x[i][2 * k + 1] * __uint_as_float(words[k] & 0xffff0000u);
                }
            }
            sum = warp_sum(sum);
            if (lane == 0) p.logits[size_t(token) * p.experts + e] = sum + p.bias[e];
        }
        __threadfence();
        __syncwarp();
        choose(p, token);
    }
    if (!last_to_arrive(p.arrivals, gridDim.x)) return;
    sort_pairs(p, counts);
}

struct Largest {
    const float* logits;     // [n, vocabulary]
    uint64_t* partial;       // [n, blocks]
    uint32_t* arrivals;      // [n], zero before and after
    uint32_t* out;           // [n], the id of the largest logit, the lowest on a tie
    uint32_t vocabulary, padding;
};
static_assert(sizeof(Largest) == 40);

// Ordered as the pair (value, the lower id first).
__device__ __forceinline__ uint64_t ranked(float v, uint32_t id) {
    uint32_t bits = __float_as_uint(v == 0.f ? 0.f : v);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t(isnan(v) ? 0 : bits) << 32 | ~id;
}

__device__ __forceinline__ uint64_t block_largest(uint64_t v) {
    __shared__ uint64_t shared[WARP];
    for (int i = WARP / 2; i; i /= 2) v = max(v, (uint64_t)__shfl_xor_sync(~0u, (unsigned long long)v, i));
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = v;
    __syncthreads();
    for (int i = 0; i < (int)blockDim.x / WARP; i++) v = max(v, shared[i]);
    __syncthreads();
    return v;
}

extern "C" __global__ void __launch_bounds__(256) largest(const __grid_constant__ Largest p) {
    wait_for_previous();
    start_next();
    const float* logits = p.logits + size_t(blockIdx.y) * p.vocabulary;
    uint64_t best = 0;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < p.vocabulary; i += gridDim.x * blockDim.x)
        best = max(best, ranked(logits[i], i));
    best = block_largest(best);
    uint64_t* partial = p.partial + blockIdx.y * gridDim.x;
    if (threadIdx.x == 0) partial[blockIdx.x] = best;
    if (!last_to_arrive(p.arrivals + blockIdx.y, gridDim.x)) return;
    best = threadIdx.x < gridDim.x ? __ldcg(partial + threadIdx.x) : 0;
    best = block_largest(best);
    if (threadIdx.x == 0) p.out[blockIdx.y] = ~uint32_t(best);
}


struct Read {
    const uint4* from;
    uint32_t* out;
    uint64_t vectors;
};
static_assert(sizeof(Read) == 24);

// Reads memory and nothing else: what the device can do at most.
extern "C" __global__ void __launch_bounds__(512) read(const __grid_constant__ Read p) {
    constexpr int AHEAD = 8;
    size_t step = size_t(gridDim.x) * blockDim.x, i = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
    uint32_t sum = 0;
    for (; i + (AHEAD - 1) * step < p.vectors; i += AHEAD * step) {
        uint4 v[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) v[k] = load_once(p.from + i + k * step);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (sum == 0x12345678u) *p.out = sum;
}
