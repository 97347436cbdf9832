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
    uint32_t format, stack;      // see `activation_place`
    float eps;
};
static_assert(sizeof(Norm) == 80);

// One block per row.
extern "C" __global__ void __launch_bounds__(256) rms_norm(const __grid_constant__ Norm p) {
    __shared__ float scratch[WARP];
    Vector<PRODUCT_VALUES> scale, x;
    start_next();
    if (p.out) scale.load(p.scale, p.hidden);
    wait_for_previous();
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
    x.store(p.out, p.stack, blockIdx.x, p.cols, p.format, scale, inverse);
}

struct Router {
    const float* residual;           // [n, hidden]
    const float* norm_scale;         // [hidden]
    const __nv_bfloat16* weights;    // [experts, hidden]
    const float* bias;               // [experts]
    uint16_t* out;                   // [n, cols], the normed stream, plain or ordered
    float* logits;                   // [n, experts]
    uint32_t* routes;                // see `Routes`; null where the logits are all
    uint32_t* arrivals;              // [n + 1], zero before and after
    uint32_t hidden, cols, n, experts, experts_per_token;
    uint32_t format;
    float eps;
    uint32_t shares;                 // few tokens: blocks that share a token's experts
    uint32_t stack;                  // of `out`: see `activation_place`
    uint32_t padding;
};
static_assert(sizeof(Router) == 104);

// A thread's share of an expert's weights.
struct RouterWeights {
    uint2 pairs[PRODUCT_VALUES];
    __device__ __forceinline__ void load(const Router& p, uint32_t expert) {
#pragma unroll
        for (int i = 0; i < PRODUCT_VALUES; i++) {
            uint32_t at = i * blockDim.x + threadIdx.x;
            pairs[i] = at < p.hidden / 4 && expert < p.experts ? ((const uint2*)(p.weights + size_t(expert) * p.hidden))[at] : make_uint2(0, 0);
        }
    }
    __device__ __forceinline__ float times(const Vector<PRODUCT_VALUES>& x) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < PRODUCT_VALUES; i++) {
            const float4& a = x.v[i];
            float2 lower = __bfloat1622float2((const __nv_bfloat162&)pairs[i].x), upper = __bfloat1622float2((const __nv_bfloat162&)pairs[i].y);
            sum += a.x * lower.x + a.y * lower.y + a.z * upper.x + a.w * upper.y;
        }
        return sum;
    }
};

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

__device__ __forceinline__ Routes routes_of(const Router& p) { return Routes(p.routes, p.experts, p.n * p.experts_per_token); }

// Threads that sort, each with a contiguous part of the pairs, and their counters.
constexpr int MAX_SORTERS = 512, MAX_COUNTS = 16384;

// Sorts all pairs by expert, stably. One block; `counts`: [experts][sorters].
__device__ __forceinline__ void sort_pairs(const Router& p, uint16_t* counts) {
    __shared__ uint32_t first[MAX_EXPERTS + 1];
    const uint32_t sorters = min(min(MAX_SORTERS, blockDim.x), MAX_COUNTS / p.experts / WARP * WARP);
    uint32_t pairs = p.n * p.experts_per_token, each = (pairs + sorters - 1) / sorters, lane = threadIdx.x % WARP;
    const Routes routes = routes_of(p);
    uint32_t *slots = p.routes + routes.slots_at(), *slot_of = p.routes + routes.pairs_at(0);
    const uint32_t* expert_of = p.routes + routes.pairs_at(1);
    uint32_t begin = min(threadIdx.x * each, pairs), end = min(begin + each, pairs);
    if (threadIdx.x < sorters) {
        for (uint32_t e = 0; e < p.experts; e++) counts[e * sorters + threadIdx.x] = 0;
#pragma unroll 8
        for (uint32_t i = begin; i < end; i++) counts[__ldcg(expert_of + i) * sorters + threadIdx.x]++;
    }
    __syncthreads();
    // The pairs of an expert that earlier threads have, and the expert's number of pairs.
    for (uint32_t e = threadIdx.x / WARP; e < p.experts; e += blockDim.x / WARP) {
        const int EACH = sorters / WARP;
        uint16_t* own = counts + e * sorters + lane * EACH;
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
    if (threadIdx.x < WARP) {
        uint32_t active = 0, end = 0;
        for (uint32_t base = 0; base < p.experts; base += WARP) {
            const uint32_t e = base + lane, count = e < p.experts ? first[e + 1] : 0, used = __ballot_sync(~0u, count != 0);
            uint32_t sum = (count + 7) / 8 * 8;
#pragma unroll
            for (int i = 1; i < WARP; i *= 2) {
                uint32_t other = __shfl_up_sync(~0u, sum, i);
                if (lane >= i) sum += other;
            }
            if (count) p.routes[Routes::ACTIVE + active + __popc(used & ((1u << lane) - 1))] = e;
            if (e < p.experts) p.routes[routes.counts_at() + e] = count, first[e + 1] = end + sum;
            active += __popc(used);
            end += __shfl_sync(~0u, sum, WARP - 1);
        }
        if (lane == 0) p.routes[0] = active, first[0] = 0;
    }
    __syncthreads();
    for (uint32_t e = threadIdx.x; e <= p.experts; e += blockDim.x) {
        p.routes[routes.firsts_at() + e] = first[e];
        if (e == p.experts) break;
        for (uint32_t slot = first[e] + p.routes[routes.counts_at() + e]; slot < first[e + 1]; slot++) slots[slot] = NO_PAIR;
    }
    if (threadIdx.x >= sorters) return;
#pragma unroll 8
    for (uint32_t i = begin; i < end; i++) {
        uint32_t e = __ldcg(expert_of + i), slot = first[e] + counts[e * sorters + threadIdx.x]++;
        slots[slot] = i;
        slot_of[i] = slot;
    }
}

// Norm, router logits in f32, choice, grouping, for few tokens. `blockIdx.y`: token; `blockIdx.x`: a share of the experts.
extern "C" __global__ void __launch_bounds__(256) router(const __grid_constant__ Router p) {
    extern __shared__ uint16_t counts[];
    constexpr int WARPS = 8, TOGETHER = 4; // experts whose weights are on their way together
    __shared__ float scratch[WARP], sums[2][TOGETHER][WARPS];
    Vector<PRODUCT_VALUES> scale, x;
    RouterWeights weights[TOGETHER];
    scale.load(p.norm_scale, p.hidden);
    auto load = [&](uint32_t expert) {
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) weights[i].load(p, expert + i * p.shares);
    };
    load(blockIdx.x);
    wait_for_previous();
    start_next();
    uint32_t token = blockIdx.y;
    x.load(p.residual + size_t(token) * p.hidden, p.hidden);
    float inverse = rsqrtf(block_sum(x.square(), scratch) / p.hidden + p.eps);
    if (blockIdx.x == 0) x.store(p.out, p.stack, token, p.cols, p.format, scale, inverse);
    for (int i = 0; i < PRODUCT_VALUES; i++)
        x.v[i].x *= scale.v[i].x, x.v[i].y *= scale.v[i].y, x.v[i].z *= scale.v[i].z, x.v[i].w *= scale.v[i].w;
    int half = 0;
    for (uint32_t expert = blockIdx.x; expert < p.experts; expert += TOGETHER * p.shares, half ^= 1) {
        float sum[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) sum[i] = weights[i].times(x);
        if (expert + TOGETHER * p.shares < p.experts) load(expert + TOGETHER * p.shares);
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            sum[i] = warp_sum(sum[i]);
            if (threadIdx.x % WARP == 0) sums[half][i][threadIdx.x / WARP] = sum[i];
        }
        __syncthreads();
        const uint32_t own = expert + threadIdx.x * p.shares;
        if (threadIdx.x < TOGETHER && own < p.experts) {
            float all = 0;
            for (int w = 0; w < WARPS; w++) all += sums[half][threadIdx.x][w];
            p.logits[size_t(token) * p.experts + own] = all * inverse + p.bias[own];
        }
    }
    if (!p.routes || !last_to_arrive(p.arrivals + 1 + token, p.shares)) return;
    if (threadIdx.x < WARP) choose(p.routes, routes_of(p), p.logits, token, p.experts_per_token);
    if (!last_to_arrive(p.arrivals, p.n)) return;
    sort_pairs(p, counts);
}

// A number as the sum of three BF16 ones, of pairs: what tensor cores multiply as exactly as f32.
__device__ __forceinline__ void split(float a, float b, uint32_t (&parts)[3]) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        parts[i] = reinterpret_cast<uint32_t&>(pair);
        a -= __low2float(pair), b -= __high2float(pair);
    }
}

// The same for many tokens, sixteen per block: their products with 32 experts at a time on tensor cores, the inputs shared among
// the warps.
extern "C" __global__ void __launch_bounds__(512) router_many(const __grid_constant__ Router p) {
    extern __shared__ uint16_t counts[];
    constexpr int WARPS = 16, TOKENS = 16, EXPERTS = 32;
    __shared__ float sums[WARPS][TOKENS][EXPERTS + 1], squares[WARPS][TOKENS];
    wait_for_previous();
    start_next();
    const uint32_t first = blockIdx.x * TOKENS, warp = threadIdx.x / WARP, g = lane_row(), t = lane_quarter();
    const float *rows[2], *scales = p.norm_scale + 4 * t;
#pragma unroll
    for (int h = 0; h < 2; h++) rows[h] = p.residual + size_t(min(first + g + 8 * h, p.n - 1)) * p.hidden + 4 * t;
    float inverse = 0;
    for (uint32_t group = 0; group < p.experts; group += EXPERTS) {
        const __nv_bfloat16* weights[EXPERTS / 8];
#pragma unroll
        for (int i = 0; i < EXPERTS / 8; i++) weights[i] = p.weights + size_t(min(group + 8 * i + g, p.experts - 1)) * p.hidden + 4 * t;
        float sum[EXPERTS / 8][4] = {}, square[2] = {};
#pragma unroll 2
        for (uint32_t k = warp * 16; k < p.hidden; k += WARPS * 16) {
            uint2 w[EXPERTS / 8];
#pragma unroll
            for (int i = 0; i < EXPERTS / 8; i++) w[i] = *(const uint2*)(weights[i] + k);
            const float4 scale = *(const float4*)(scales + k);
            // A lane has four neighbouring inputs: two where a product has its first eight, two where it has the others.
            uint32_t a[4][3];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float4 x = *(const float4*)(rows[h] + k);
                square[h] += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
                split(x.x * scale.x, x.y * scale.y, a[h]);
                split(x.z * scale.z, x.w * scale.w, a[2 + h]);
            }
#pragma unroll
            for (int part = 2; part >= 0; part--) {
                const uint32_t now[4] = {a[0][part], a[1][part], a[2][part], a[3][part]};
#pragma unroll
                for (int i = 0; i < EXPERTS / 8; i++) Number<BF16>::multiply(sum[i], now, w[i].x, w[i].y);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            square[h] += __shfl_xor_sync(~0u, square[h], 1);
            square[h] += __shfl_xor_sync(~0u, square[h], 2);
            if (t == 0) squares[warp][g + 8 * h] = square[h];
#pragma unroll
            for (int i = 0; i < EXPERTS / 8; i++)
                sums[warp][g + 8 * h][8 * i + 2 * t] = sum[i][2 * h], sums[warp][g + 8 * h][8 * i + 2 * t + 1] = sum[i][2 * h + 1];
        }
        __syncthreads();
        // Each thread has one token, `warp`, and one expert.
        const uint32_t expert = group + threadIdx.x % WARP, token = first + warp;
        float logit = 0, all = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) logit += sums[w][warp][threadIdx.x % WARP], all += squares[w][warp];
        inverse = rsqrtf(all / p.hidden + p.eps);
        if (token < p.n && expert < p.experts) p.logits[size_t(token) * p.experts + expert] = logit * inverse + p.bias[expert];
        __syncthreads();
    }
    const uint32_t token = first + warp;
    if (token < p.n) {
        const float* residual = p.residual + size_t(token) * p.hidden;
#pragma unroll 4
        for (uint32_t k = threadIdx.x % WARP * 4; k < p.cols; k += WARP * 4) {
            const bool inside = k < p.hidden;
            const float4 x = inside ? *(const float4*)(residual + k) : make_float4(0, 0, 0, 0);
            const float4 scale = inside ? *(const float4*)(p.norm_scale + k) : make_float4(0, 0, 0, 0);
            const uint32_t lower = activation(p.format, x.x * inverse * scale.x) | activation(p.format, x.y * inverse * scale.y) << 16;
            const uint32_t upper = activation(p.format, x.z * inverse * scale.z) | activation(p.format, x.w * inverse * scale.w) << 16;
            *(uint32_t*)(p.out + activation_place(p.stack, p.cols, token, k)) = lower;
            *(uint32_t*)(p.out + activation_place(p.stack, p.cols, token, k + 2)) = upper;
        }
        __threadfence();
        __syncwarp();
        choose(p.routes, routes_of(p), p.logits, token, p.experts_per_token);
    }
    if (!last_to_arrive(p.arrivals, gridDim.x)) return;
    sort_pairs(p, counts);
}

struct Gather {
    const uint16_t* input;   // [n, cols]
    const uint32_t* routes;
    uint16_t* out;           // stacked, a row per slot
    uint32_t cols, n, experts, experts_per_token;
    uint32_t stack;
    uint32_t padding;
};
static_assert(sizeof(Gather) == 48);

// Rows of activations, copied to the slots of their experts: a warp for each.
extern "C" __global__ void __launch_bounds__(256) gather(const __grid_constant__ Gather p) {
    wait_for_previous();
    start_next();
    Routes routes(p.routes, p.experts, p.n * p.experts_per_token);
    uint32_t slot = blockIdx.x * 8 + threadIdx.x / WARP;
    if (slot >= routes.first_slot(p.experts)) return;
    uint32_t pair = routes.pair(slot);
    if (pair == NO_PAIR) return;
    const uint32_t* row = (const uint32_t*)(p.input + size_t(pair / p.experts_per_token) * p.cols);
    for (uint32_t piece = threadIdx.x % WARP; piece < p.cols / 8; piece += WARP) {
        // What `product_position` puts here: four pairs of inputs, sixteen apart.
        uint32_t j = piece % 8 / 2, half = piece % 2;
        const uint32_t* from = row + piece / 8 * (TILE_COLS / 2) + 2 * j + half;
        uint4 v = make_uint4(from[0], from[8], from[16], from[24]);
        *(uint4*)(p.out + (size_t(piece / 8) * p.stack + slot) * TILE_COLS + ((piece % 8 ^ slot % 8) << 3)) = v;
    }
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
