// What happens to the residual stream between products: embedding, norms, the router, and the largest logit.
#include "epilogue.cuh"
#include "router.cuh"
#include "shared.cuh"

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
    uint32_t vocabulary;
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
    // One that the device found itself may be none.
    size_t from = size_t(min(p.tokens[token], p.vocabulary - 1)) * p.hidden;
    float* to = p.residual + size_t(token) * p.hidden;
    if (p.block == 0) {
        constexpr int TOGETHER = 6; // reads
        const uint32_t* pairs = (const uint32_t*)((const __nv_bfloat16*)p.values + from);
        for (uint32_t begin = threadIdx.x; begin < p.hidden / 2; begin += TOGETHER * blockDim.x) {
            uint32_t v[TOGETHER];
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) v[k] = begin + k * blockDim.x < p.hidden / 2 ? pairs[begin + k * blockDim.x] : 0;
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                const uint32_t i = begin + k * blockDim.x;
                if (i < p.hidden / 2) ((float2*)to)[i] = make_float2(__uint_as_float(v[k] << 16), __uint_as_float(v[k] & 0xffff0000u));
            }
        }
    } else {
        for (uint32_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
            uint32_t code = ((const uint8_t*)p.values)[(from + i) / 2] >> i % 2 * 4 & 15;
            to[i] = code_value(code) * (scale_value(p.block, p.scales[(from + i) / p.block]) * p.global_scale);
        }
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

struct Keep {
    uint4 *residual, *rotary;    // [tokens, residual_vectors], [tokens, rotary_vectors]
    uint32_t* slots;             // [2, tokens]; afterwards [2, n]
    const uint32_t* rows;        // [n], ascending
    uint32_t tokens, n;
    uint32_t residual_vectors, rotary_vectors;
};
static_assert(sizeof(Keep) == 48);

// Brings some rows to the front, in their order. A thread has one column and writes rows only when it has read those that lie there: a row
// never comes from further ahead.
template <class T> __device__ __forceinline__ void keep_column(T* to, const T* from, size_t step, const Keep& p) {
    constexpr uint32_t TOGETHER = 16; // rows on their way
    for (uint32_t first = 0; first < p.n; first += TOGETHER) {
        T v[TOGETHER];
#pragma unroll
        for (uint32_t i = 0; i < TOGETHER; i++)
            if (first + i < p.n) v[i] = from[p.rows[first + i] * step];
#pragma unroll
        for (uint32_t i = 0; i < TOGETHER; i++)
            if (first + i < p.n) to[(first + i) * step] = v[i];
    }
}

extern "C" __global__ void __launch_bounds__(64) keep(const __grid_constant__ Keep p) {
    wait_for_previous();
    start_next();
    const uint32_t residual = blockIdx.x * 64 + threadIdx.x, rotary = residual - p.residual_vectors;
    if (residual < p.residual_vectors) {
        keep_column(p.residual + residual, p.residual + residual, p.residual_vectors, p);
    } else if (rotary < p.rotary_vectors) {
        keep_column(p.rotary + rotary, p.rotary + rotary, p.rotary_vectors, p);
    } else if (rotary == p.rotary_vectors) {
        // Those of sliding layers come to where those of full layers were.
        keep_column(p.slots, p.slots, 1, p);
        keep_column(p.slots + p.n, p.slots + p.tokens, 1, p);
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

// One block per row, of as many threads as hold it: few values each, so that those of many experts find room in registers.
constexpr int NORM_VALUES = 3, MAX_NORM_THREADS = (MAX_HIDDEN / 4 + NORM_VALUES * WARP - 1) / (NORM_VALUES * WARP) * WARP;
using Row = Vector<NORM_VALUES>;

__device__ __forceinline__ void add_row(Row& to, float w, const Row& y) {
#pragma unroll
    for (int i = 0; i < NORM_VALUES; i++)
        to.v[i] = make_float4(fmaf(w, y.v[i].x, to.v[i].x), fmaf(w, y.v[i].y, to.v[i].y), fmaf(w, y.v[i].z, to.v[i].z), fmaf(w, y.v[i].w, to.v[i].w));
}

__device__ __forceinline__ void store_row(float* to, const Row& x, uint32_t hidden) {
#pragma unroll
    for (int i = 0; i < NORM_VALUES; i++)
        if (const uint32_t at = i * blockDim.x + threadIdx.x; at < hidden / 4) ((float4*)to)[at] = x.v[i];
}

// What the experts of a row found, weighted, in the order of the ranks.
__device__ __forceinline__ Row sum_experts(const Norm& p, uint32_t row) {
    Routes routes(p.routes, p.experts_count, p.n * p.experts_per_token);
    // Each lane looks where one rank's output is; then those of several are on their way together.
    constexpr uint32_t TOGETHER = 4;
    const uint32_t pair = row * p.experts_per_token + min(threadIdx.x % WARP, p.experts_per_token - 1);
    const uint32_t slot = routes.slot_of_pair(pair);
    const float weight = routes.weight_of_pair(pair);
    Row sum = {};
    for (uint32_t first = 0; first < p.experts_per_token; first += TOGETHER) {
        Row y[TOGETHER];
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            const uint32_t from = __shfl_sync(~0u, slot, first + k);
            if (first + k < p.experts_per_token) y[k].load(p.experts + size_t(from) * p.hidden, p.hidden);
        }
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            const float w = __shfl_sync(~0u, weight, first + k);
            if (first + k >= p.experts_per_token) break;
            add_row(sum, w, y[k]);
        }
    }
    return sum;
}

__device__ __forceinline__ void norm_row(const Norm& p, const Row& x, const Row& scale) {
    __shared__ float sums[NORM_VALUES * MAX_NORM_THREADS / WARP];
    if (!p.out) return;
    const float inverse = rsqrtf(sum_of_squares(x.v, sums) / p.hidden + p.eps);
    x.store(p.out, p.stack, blockIdx.x, p.cols, p.format, scale, inverse);
}

extern "C" __global__ void __launch_bounds__(MAX_NORM_THREADS) rms_norm(const __grid_constant__ Norm p) {
    Row scale, x;
    start_next();
    if (p.out) scale.load(p.scale, p.hidden);
    wait_for_previous();
    uint32_t row = p.rows ? p.rows[blockIdx.x] : blockIdx.x;
    float* residual = p.residual + size_t(row) * p.hidden;
    x.load(residual, p.hidden);
    if (p.experts) {
        add_row(x, 1, sum_experts(p, row));
        store_row(residual, x, p.hidden);
    }
    norm_row(p, x, scale);
}

struct SharedNorm {
    Norm norm;
    Peers peers;
};
static_assert(sizeof(SharedNorm) == 160);

// The same, where several GPUs share the model: what the experts of all of them found is added.
extern "C" __global__ void __launch_bounds__(MAX_NORM_THREADS) rms_norm_shared(const __grid_constant__ SharedNorm s) {
    const Norm& p = s.norm;
    Row scale, x;
    start_next();
    if (p.out) scale.load(p.scale, p.hidden);
    wait_for_previous();
    float* residual = p.residual + size_t(blockIdx.x) * p.hidden;
    Row sum = sum_experts(p, blockIdx.x);
    x.load(residual, p.hidden);
    uint32_t at[NORM_VALUES];
#pragma unroll
    for (int i = 0; i < NORM_VALUES; i++) {
        const uint32_t vector = i * blockDim.x + threadIdx.x;
        at[i] = vector < p.hidden / 4 ? blockIdx.x * (p.hidden / 4) + vector : NOT_GIVEN;
    }
    add_all(s.peers, at, sum.v);
    add_row(x, 1, sum);
    store_row(residual, x, p.hidden);
    norm_row(p, x, scale);
    end_of_sum(s.peers);
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
    uint32_t shares;                 // few tokens: blocks that share a token's experts; many: experts that a block has at a time
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

__device__ __forceinline__ Routes routes_of(const Router& p) { return Routes(p.routes, p.experts, p.n * p.experts_per_token); }

// Sorts all pairs by expert, stably. One block, whose warps have a contiguous part of the pairs each; `counts`: [warps][experts].
__device__ __forceinline__ void sort_pairs(const Router& p, uint32_t* counts) {
    __shared__ uint32_t first[MAX_EXPERTS + 1];
    const uint32_t pairs = p.n * p.experts_per_token, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const uint32_t each = (pairs + warps * WARP - 1) / (warps * WARP) * WARP;
    const Routes routes = routes_of(p);
    uint32_t *slots = p.routes + routes.slots_at(), *slot_of = p.routes + routes.pairs_at(0), *own = counts + threadIdx.x / WARP * p.experts;
    const uint32_t* expert_of = p.routes + routes.pairs_at(1);
    const uint32_t begin = min(threadIdx.x / WARP * each, pairs), end = min(begin + each, pairs);
    for (uint32_t e = lane; e < p.experts; e += WARP) own[e] = 0;
    __syncwarp();
#pragma unroll 4
    for (uint32_t i = begin + lane; i < end; i += WARP) atomicAdd(own + __ldcg(expert_of + i), 1);
    __syncthreads();
    // The pairs of an expert that earlier warps have, and the expert's number of pairs.
    for (uint32_t e = threadIdx.x; e < p.experts; e += blockDim.x) {
        uint32_t sum = 0;
        for (uint32_t w = 0; w < warps; w++) {
            const uint32_t count = counts[w * p.experts + e];
            counts[w * p.experts + e] = sum;
            sum += count;
        }
        first[e + 1] = sum;
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
#pragma unroll 2
    for (uint32_t i = begin; i < end; i += WARP) {
        const bool inside = i + lane < end;
        const uint32_t e = inside ? __ldcg(expert_of + i + lane) : ~0u, same = __match_any_sync(~0u, e);
        const uint32_t before = inside ? own[e] : 0, rank = __popc(same & ((1u << lane) - 1)), slot = first[min(e, p.experts)] + before + rank;
        __syncwarp();
        if (inside && rank == 0) own[e] = before + __popc(same);
        __syncwarp();
        if (inside) slots[slot] = i + lane, slot_of[i + lane] = slot;
    }
}

// Norm, router logits in f32, choice, grouping, for few tokens. `blockIdx.y`: token; `blockIdx.x`: a share of the experts.
extern "C" __global__ void __launch_bounds__(256) router(const __grid_constant__ Router p) {
    extern __shared__ uint32_t counts[];
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

// The same for many tokens, eight at a time: their products with the experts on tensor cores, the inputs shared among the warps, which
// hold the tokens in registers until the norm is known. Scales and weights lie in shared memory, those of `shares` experts at a time:
// where that is all of them, once and for all. It sums as a cluster of two blocks in router_gather_sm90.cu does: half of the inputs, then the others.
extern "C" __global__ void __launch_bounds__(ROUTER_WARPS * WARP, 1) router_many(const __grid_constant__ Router p) {
    constexpr int WARPS = ROUTER_WARPS, TOKENS = 8, EXPERTS = 32, STEP = ROUTER_STEP, HALVES = 2, STEPS = MAX_HIDDEN / STEP / WARPS / HALVES;
    extern __shared__ __align__(16) float scales[]; // [hidden], then the weights; in the end the counts of `sort_pairs`
    __shared__ float sums[WARPS][EXPERTS][TOKENS + 1], squares[HALVES][WARPS][TOKENS];
    const uint32_t warp = threadIdx.x / WARP, g = lane_row(), t = lane_quarter();
    const uint32_t middle = p.cols / TILE_COLS / 2 * TILE_COLS;
    // Input `i` of a lane in a half, the first of four.
    auto input_of = [&](int half, int i) { return half * middle + i * WARPS * STEP + warp * STEP + 4 * t; };
    // Neighbouring rows lie in different banks.
    const uint32_t line = p.hidden * 2 + 32;
    uint8_t* weights = (uint8_t*)(scales + p.hidden);
    auto bring_weights = [&](uint32_t group) {
        const uint32_t pieces = p.hidden / 8, to = shared_address(weights);
        for (uint32_t row = warp; row < min(p.shares, p.experts - group); row += WARPS)
            for (uint32_t i = threadIdx.x % WARP; i < pieces; i += WARP)
                copy_async(to + row * line + i * 16, p.weights + size_t(group + row) * p.hidden + i * 8);
        commit_copies();
    };
    for (uint32_t i = threadIdx.x; i < p.hidden / 4; i += blockDim.x) copy_async(shared_address(scales + 4 * i), p.norm_scale + 4 * i);
    bring_weights(0);
    uint32_t here = 0; // the group whose weights are here
    wait_for_previous();
    start_next();
    for (uint32_t first = blockIdx.x * TOKENS; first < p.n; first += gridDim.x * TOKENS) {
        // A lane has four neighbouring inputs: two where a product has its first eight, two where it has the others.
        float4 x[HALVES][STEPS];
        const float* row = p.residual + size_t(min(first + g, p.n - 1)) * p.hidden;
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                const uint32_t k = input_of(half, i);
                x[half][i] = k < (half ? p.hidden : middle) ? *(const float4*)(row + k) : make_float4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            float square = 0;
#pragma unroll
            for (int i = 0; i < STEPS; i++) square += squares_of_step(x[half][i]);
            if (t == 0) squares[half][warp][g] = square;
        }
        auto inverse_of = [&](uint32_t token) {
            float all = 0;
#pragma unroll
            for (int half = 0; half < HALVES; half++) all += sum_of_warps([&](int w) { return squares[half][w][token]; });
            return rsqrtf(all / p.hidden + p.eps);
        };
        wait_for_copies<0>();
        __syncthreads();
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                const uint32_t k = input_of(half, i);
                if (k < (half ? p.hidden : middle)) x[half][i] = times(x[half][i], *(const float4*)(scales + k));
            }
        }
        for (uint32_t group = 0; group < p.experts; group += p.shares) {
            if (group != here) {
                __syncthreads();
                bring_weights(group);
                here = group;
                wait_for_copies<0>();
                __syncthreads();
            }
            const uint32_t at = threadIdx.x % EXPERTS, expert = group + at, local = threadIdx.x / EXPERTS, token = first + local;
            float logit = 0;
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                float sum[EXPERTS / 16][4] = {};
#pragma unroll
                for (int i = 0; i < STEPS; i++) {
                    const uint32_t k = input_of(half, i);
                    if (k >= (half ? p.hidden : middle)) break;
                    uint32_t lower[3], upper[3];
                    split(x[half][i].x, x[half][i].y, lower);
                    split(x[half][i].z, x[half][i].w, upper);
#pragma unroll
                    for (int j = 0; j < EXPERTS / 16; j++) {
                        if (16 * j >= p.shares) break;
                        const uint8_t* from = weights + (16 * j + g) * line + k * 2;
                        const uint2 w = *(const uint2*)from, w8 = *(const uint2*)(from + 8 * line);
                        multiply_parts(sum[j], {w.x, w8.x, w.y, w8.y}, lower, upper);
                    }
                }
                // The first half's have been read.
                if (half > 0) __syncthreads();
#pragma unroll
                for (int j = 0; j < EXPERTS / 16; j++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) sums[warp][16 * j + g + i / 2 * 8][2 * t + i % 2] = sum[j][i];
                }
                __syncthreads();
                if (local >= TOKENS) continue;
                logit += sum_of_warps([&](int w) { return sums[w][at][local]; });
            }
            if (local < TOKENS && token < p.n && at < p.shares && expert < p.experts)
                p.logits[size_t(token) * p.experts + expert] = fmaf(logit, inverse_of(local), p.bias[expert]);
        }
        if (first + g < p.n) {
            const float inverse = inverse_of(g);
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
#pragma unroll
                for (int i = 0; i < STEPS; i++) {
                    const uint32_t k = input_of(half, i);
                    if (k >= (half ? p.cols : middle)) break;
                    const float4& v = x[half][i];
                    *(uint32_t*)(p.out + activation_place(p.stack, p.cols, first + g, k))
                        = activation(p.format, v.x * inverse) | activation(p.format, v.y * inverse) << 16;
                    *(uint32_t*)(p.out + activation_place(p.stack, p.cols, first + g, k + 2))
                        = activation(p.format, v.z * inverse) | activation(p.format, v.w * inverse) << 16;
                }
            }
        }
        __threadfence();
        __syncthreads();
        if (warp < TOKENS && first + warp < p.n) choose(p.routes, routes_of(p), p.logits, first + warp, p.experts_per_token);
    }
    if (!last_to_arrive(p.arrivals, gridDim.x)) return;
    sort_pairs(p, (uint32_t*)scales);
}

struct Gather {
    const uint16_t* input;   // [n, cols], ordered
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
    const uint4* row = (const uint4*)(p.input + size_t(pair / p.experts_per_token) * p.cols);
    constexpr uint32_t TOGETHER = 4; // pieces on their way
    for (uint32_t first = threadIdx.x % WARP; first < p.cols / 8; first += TOGETHER * WARP) {
        uint4 v[TOGETHER];
#pragma unroll
        for (uint32_t i = 0; i < TOGETHER; i++)
            if (first + i * WARP < p.cols / 8) v[i] = row[first + i * WARP];
#pragma unroll
        for (uint32_t i = 0; i < TOGETHER; i++) {
            const uint32_t piece = first + i * WARP;
            if (piece < p.cols / 8) *(uint4*)(p.out + (size_t(piece / 8) * p.stack + slot) * TILE_COLS + ((piece % 8 ^ slot % 8) << 3)) = v[i];
        }
    }
}

struct Largest {
    const float* logits;     // [n, vocabulary]
    uint64_t* partial;       // [n, blocks]
    uint32_t* arrivals;      // [n], zero before and after
    uint32_t* out;           // [n], the id of the largest logit, the lowest on a tie
    uint32_t* told;          // [n], the same for the host
    uint32_t vocabulary, padding;
};
static_assert(sizeof(Largest) == 48);

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
    constexpr int TOGETHER = 8; // reads
    uint64_t best = 0;
    const uint32_t step = gridDim.x * blockDim.x;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < p.vocabulary; i += TOGETHER * step) {
        float v[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) v[j] = i + j * step < p.vocabulary ? logits[i + j * step] : -INFINITY;
#pragma unroll
        for (int j = 0; j < TOGETHER; j++)
            if (i + j * step < p.vocabulary) best = max(best, (uint64_t)ranked(v[j], i + j * step));
    }
    best = block_largest(best);
    uint64_t* partial = p.partial + blockIdx.y * gridDim.x;
    if (threadIdx.x == 0) partial[blockIdx.x] = best;
    if (!last_to_arrive(p.arrivals + blockIdx.y, gridDim.x)) return;
    best = threadIdx.x < gridDim.x ? __ldcg(partial + threadIdx.x) : 0;
    best = block_largest(best);
    if (threadIdx.x == 0) p.out[blockIdx.y] = id_of_largest(best), p.told[blockIdx.y] = id_of_largest(best);
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
