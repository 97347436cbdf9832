// Attention over the paged cache, with sinks, windows and grouped queries: one warp takes 16 rows (tokens times the query
// heads of one key/value head) through pages of 16 keys, scores and values on tensor cores, softmax online in f32.
#include "attention.cuh"

constexpr int MAX_SPLITS = 32; // blocks that share a token's keys

// Running maximum (of scores times log2 e), sum and weighted values of the rows g and g + 8.
struct State {
    float max[2] = {NOTHING, NOTHING}, sum[2] = {0, 0}, out[8][4] = {};
};

template <CacheFormat C> struct Page;

template <> struct Page<CACHE_BF16> {
    uint4 keys[2][2];
    uint2 values[8];
    __device__ __forceinline__ void load(const Attention& p, uint32_t block, uint32_t kv) {
        int g = lane_row(), t = lane_quarter();
        size_t at = (size_t(block) * p.kv_heads + kv) * (BLOCK_TOKENS * HEAD);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            // Column g of score tile i is key 4 (g / 2) + 2 i + g % 2, so that a lane's four probabilities are of keys 4 t ..
            const uint4* k = (const uint4*)((const uint16_t*)p.keys + at + (4 * (g / 2) + 2 * i + g % 2) * HEAD + 16 * t);
            keys[i][0] = k[0], keys[i][1] = k[1];
        }
#pragma unroll
        for (int d = 0; d < 8; d++)
            values[d] = *(const uint2*)((const uint16_t*)p.values + at + (8 * d + g) * BLOCK_TOKENS + 4 * t);
    }
    // Words j and j + 1 of the keys of score tile i; the values of dimensions d.
    __device__ __forceinline__ uint2 key(int i, int j) const {
        const uint4& k = keys[i][j / 2];
        return j % 2 ? make_uint2(k.z, k.w) : make_uint2(k.x, k.y);
    }
    __device__ __forceinline__ uint2 value(int d) const { return values[d]; }
};

template <> struct Page<CACHE_E4M3> {
    uint4 keys[2];
    uint32_t values[8];
    __device__ __forceinline__ void load(const Attention& p, uint32_t block, uint32_t kv) {
        int g = lane_row(), t = lane_quarter();
        size_t at = (size_t(block) * p.kv_heads + kv) * (BLOCK_TOKENS * HEAD);
#pragma unroll
        for (int i = 0; i < 2; i++)
            keys[i] = *(const uint4*)((const uint8_t*)p.keys + at + (4 * (g / 2) + 2 * i + g % 2) * HEAD + 16 * t);
#pragma unroll
        for (int d = 0; d < 8; d++)
            values[d] = *(const uint32_t*)((const uint8_t*)p.values + at + (8 * d + g) * BLOCK_TOKENS + 4 * t);
    }
    __device__ __forceinline__ uint2 key(int i, int j) const {
        const uint4& k = keys[i];
        return widen_e4m3(j == 0 ? k.x : j == 1 ? k.y : j == 2 ? k.z : k.w);
    }
    __device__ __forceinline__ uint2 value(int d) const { return widen_e4m3(values[d]); }
};

// The queries of rows g and g + 8, inputs 16 t .. 16 t + 15.
template <CacheFormat C> struct Queries {
    uint32_t word[2][8];
    __device__ __forceinline__ void load(const Attention& p, uint32_t first, uint32_t count, uint32_t kv) {
        uint32_t group = p.query_heads / p.kv_heads;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t row = lane_row() + 8 * h, token = row / group;
            const uint4* q = (const uint4*)(p.queries
                + (size_t(first + token) * p.query_heads + kv * group + row % group) * HEAD + 16 * lane_quarter());
            uint4 a = token < count ? q[0] : make_uint4(0, 0, 0, 0), b = token < count ? q[1] : make_uint4(0, 0, 0, 0);
            word[h][0] = a.x, word[h][1] = a.y, word[h][2] = a.z, word[h][3] = a.w;
            word[h][4] = b.x, word[h][5] = b.y, word[h][6] = b.z, word[h][7] = b.w;
#pragma unroll
            for (int i = 0; i < 8; i++) word[h][i] = Cached<C>::query(word[h][i]);
        }
    }
};

// One page. Row h sees positions `from[h] .. to[h]`, the last included. `factor`: from products to scores times log2 e.
template <CacheFormat C>
__device__ __forceinline__ void attend(State& s, const Queries<C>& q, const Page<C>& page, float factor, int position,
    const int (&from)[2], const int (&to)[2]) {
    using Product = typename Cached<C>::Product;
    float score[2][4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t a[4] = {q.word[0][2 * j], q.word[1][2 * j], q.word[0][2 * j + 1], q.word[1][2 * j + 1]};
            const uint2 k = page.key(i, j);
            Product::multiply(score[i], a, k.x, k.y);
        }
    }
    int t = lane_quarter();
    uint32_t weight[4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float max = s.max[h];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float& v = score[c / 2][2 * h + c % 2];
            int key = position + 4 * t + c;
            v = key >= from[h] && key <= to[h] ? v * factor : NOTHING;
            max = fmaxf(max, v);
        }
        max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
        max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
        float shrink = exp2f(s.max[h] - max), sum = 0;
        s.max[h] = max;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float& v = score[c / 2][2 * h + c % 2];
            v = v == NOTHING ? 0.f : exp2f(v - max);
            sum += v;
        }
        s.sum[h] = s.sum[h] * shrink + sum;
#pragma unroll
        for (int d = 0; d < 8; d++) s.out[d][2 * h] *= shrink, s.out[d][2 * h + 1] *= shrink;
        weight[h] = Cached<C>::pack(score[0][2 * h], score[0][2 * h + 1]);
        weight[2 + h] = Cached<C>::pack(score[1][2 * h], score[1][2 * h + 1]);
    }
#pragma unroll
    for (int d = 0; d < 8; d++) {
        const uint2 v = page.value(d);
        Product::multiply(s.out[d], weight, v.x, v.y);
    }
}

// Pages `first, first + step, …` up to `last`, the next one on its way while one is computed. `page` is the first, if there is one.
template <CacheFormat C>
__device__ __forceinline__ void attend_pages(State& s, const Attention& p, const Queries<C>& q, Page<C>& page,
    const uint32_t* table, uint32_t kv, int first, int last, int step, const int (&from)[2], const int (&to)[2]) {
    for (int i = first; i <= last; i += step) {
        Page<C> next = page;
        if (i + step <= last) next.load(p, table[i + step], kv);
        attend<C>(s, q, page, Cached<C>::key_factor(p), i * BLOCK_TOKENS, from, to);
        page = next;
    }
}

// The sums of the four lanes of a row.
__device__ __forceinline__ void gather_sums(State& s) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        s.sum[h] += __shfl_xor_sync(~0u, s.sum[h], 1);
        s.sum[h] += __shfl_xor_sync(~0u, s.sum[h], 2);
    }
}

__device__ __forceinline__ void store(const Attention& p, uint32_t token, uint32_t column, float v) {
    p.out[activation_place(p.out_stack, p.query_heads * HEAD, token, column)] = activation(p.out_format, v);
}

// Blocks that share the pages up to this position: a power of two, such that each warp has at least two pages.
__device__ __forceinline__ int own_splits(const Attention& p, int position) {
    const int pages = position / BLOCK_TOKENS + 1;
    return min(int(p.splits), 1 << (31 - __clz(max(pages / 16, 1))));
}

// Single tokens: the pages are shared among the warps of `splits` blocks; the last of them to arrive puts the parts together,
// in their order. A token with few pages has fewer parts: how many depends on nothing but its own position. The step's words, and the pages before a sequence's last, are older than the step: they are read before the
// kernel waits.
template <CacheFormat C> __device__ __forceinline__ void split(const Attention& p) {
    constexpr int WARPS = 8, PART = HEAD + 2;
    static_assert(WARPS * 32 == 256 && MAX_SPLITS <= 32);
    __shared__ float part[WARPS][16][PART], factor[16][MAX_SPLITS];
    __shared__ uint32_t arrived;
    start_next();
    const int group = p.query_heads / p.kv_heads, split = blockIdx.x, kv = blockIdx.y, token = blockIdx.z;
    const int warp = threadIdx.x / WARP;
    const uint32_t* table = p.table + (int)p.table_starts[p.sequences[token]];
    int end = p.positions[token], begin = p.window ? max(0, end + 1 - (int)p.window) : 0;
    const int splits = own_splits(p, end);
    if (split >= splits) return;
    int from[2] = {begin, begin}, to[2];
    for (int h = 0; h < 2; h++) to[h] = lane_row() + 8 * h < group ? end : -1;
    const int first = begin / BLOCK_TOKENS + split * WARPS + warp, last = end / BLOCK_TOKENS;
    Page<C> page = {};
    if (first < last) page.load(p, table[first], kv);
    // A warp's lanes put a row's parts together: of `parts` parts, lane k has that of number k.
    const int own_row = threadIdx.x / WARP, own_part = threadIdx.x % WARP;
    auto sink_of = [&](int row) { return row < group ? p.sinks[kv * group + row] * LOG2_E : NOTHING; };
    const float sinks[2] = {sink_of(own_row), sink_of(own_row + 8)};

    wait_for_previous();
    Queries<C> q;
    q.load(p, token, 1, kv);
    if (first == last) page.load(p, table[first], kv);
    State s;
    attend_pages<C>(s, p, q, page, table, kv, first, last, splits * WARPS, from, to);
    gather_sums(s);
    const float value_factor = Cached<C>::value_factor(p);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float* row = part[warp][lane_row() + 8 * h];
        if (lane_quarter() == 0) row[HEAD] = s.max[h], row[HEAD + 1] = s.sum[h];
#pragma unroll
        for (int d = 0; d < 8; d++) *(float2*)(row + 8 * d + 2 * lane_quarter()) = make_float2(s.out[d][2 * h] * value_factor, s.out[d][2 * h + 1] * value_factor);
    }
    __syncthreads();
    // What each part counts for in the whole of a row; the sink is one more logit of the denominator, without a value.
    auto weigh = [&](int parts, auto max_of, auto sum_of, float* largest, float* total) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = own_row + 8 * h;
            if (row >= group) break;
            bool inside = own_part < parts;
            float own = inside ? max_of(own_part, row) : NOTHING, sink = largest ? NOTHING : sinks[h], max = fmaxf(own, sink);
#pragma unroll
            for (int i = WARP / 2; i; i /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
            float shrink = exp2f(own - max), sum = inside ? shrink * sum_of(own_part, row) : 0.f;
            sum = warp_sum(sum);
            if (largest) largest[row * PART] = max, total[row * PART] = sum;
            else shrink /= sum + exp2f(sink - max);
            if (inside) factor[row][own_part] = shrink;
        }
        __syncthreads();
    };
    auto mine_of = [&](int split) {
        return p.partial + ((size_t(token) * p.kv_heads + kv) * p.splits + split) * 16 * PART;
    };
    float* mine = mine_of(split);
    weigh(WARPS, [&](int w, int row) { return part[w][row][HEAD]; }, [&](int w, int row) { return part[w][row][HEAD + 1]; },
        splits == 1 ? nullptr : mine + HEAD, mine + HEAD + 1);
    for (int i = threadIdx.x; i < group * HEAD; i += blockDim.x) {
        int row = i / HEAD, d = i % HEAD;
        float out = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) out += factor[row][w] * part[w][row][d];
        if (splits == 1) store(p, token, kv * group * HEAD + i, out);
        else mine[row * PART + d] = out;
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(p.arrivals + token * p.kv_heads + kv, 1);
    __syncthreads();
    if (arrived != uint32_t(splits - 1)) return;
    __threadfence();
    if (threadIdx.x == 0) p.arrivals[token * p.kv_heads + kv] = 0;
    weigh(splits, [&](int k, int row) { return __ldcg(mine_of(k) + row * PART + HEAD); },
        [&](int k, int row) { return __ldcg(mine_of(k) + row * PART + HEAD + 1); }, nullptr, nullptr);
    for (int i = threadIdx.x; i < group * HEAD; i += blockDim.x) {
        int row = i / HEAD, d = i % HEAD;
        float out = 0;
#pragma unroll 8
        for (int k = 0; k < splits; k++) out += factor[row][k] * __ldcg(mine_of(k) + row * PART + d);
        store(p, token, kv * group * HEAD + i, out);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) attend_split(const __grid_constant__ Attention p) { split<CACHE_BF16>(p); }
extern "C" __global__ void __launch_bounds__(256, 2) attend_split_e4m3(const __grid_constant__ Attention p) { split<CACHE_E4M3>(p); }
