// Attention of single tokens over the paged cache, with sinks, windows and grouped queries: a warp takes up to eight query heads that
// share a key/value head through pages of 16 keys. Keys and values are the first operands of tensor core products, so that the queries
// fill the eight columns; softmax online in f32.
#include "attention.cuh"

constexpr int WARPS = 8;       // of a block
constexpr int ROWS = 8;        // query heads of a warp, at most
constexpr int PART = HEAD + 2; // weighted values, largest score, sum of a row
constexpr int MAX_SPLITS = 32; // blocks that share a token's keys
// By how much, in powers of two, scores may exceed what the weights are relative to before those are made anew.
constexpr float SLACK = 8;

// For queries 2 t and 2 t + 1: what the weights are relative to (of scores times log2 e), the sum of this lane's, weighted values of
// dimensions 16 d + g and 16 d + g + 8.
struct State {
    float max[2] = {NOTHING, NOTHING}, sum[2] = {0, 0}, out[HEAD / 16][4] = {};
};

template <CacheFormat C> struct Page;

template <> struct Page<CACHE_BF16> {
    uint4 keys[2][2];
    uint2 values[8];
    __device__ __forceinline__ void load(const Attention& p, uint32_t block, uint32_t kv) {
        const int g = lane_row(), t = lane_quarter();
        const size_t at = (size_t(block) * p.kv_heads + kv) * (BLOCK_TOKENS * HEAD);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            // Row g of half i is key 4 (g / 2) + 2 i + g % 2, so that a lane's four weights are of keys 4 t ..
            const uint4* k = (const uint4*)((const uint16_t*)p.keys + at + (4 * (g / 2) + 2 * i + g % 2) * HEAD);
            keys[i][0] = k[t], keys[i][1] = k[4 + t];
        }
#pragma unroll
        for (int d = 0; d < 8; d++)
            values[d] = *(const uint2*)((const uint16_t*)p.values + at + (8 * d + g) * BLOCK_TOKENS + 4 * t);
    }
    // Words 2 j and 2 j + 1 of the keys of half i; the values of dimension 8 d + g.
    __device__ __forceinline__ uint2 key(int i, int j) const {
        const uint4& k = keys[i][j / 2];
        return j % 2 ? make_uint2(k.z, k.w) : make_uint2(k.x, k.y);
    }
    __device__ __forceinline__ uint2 value(int d) const { return values[d]; }
    // Which of a query's pieces of eight go with the keys' words.
    static __device__ __forceinline__ int piece(int i) { return 4 * i + lane_quarter(); }
};

template <> struct Page<CACHE_E4M3> {
    uint4 keys[2];
    uint32_t values[8];
    __device__ __forceinline__ void load(const Attention& p, uint32_t block, uint32_t kv) {
        const int g = lane_row(), t = lane_quarter();
        const size_t at = (size_t(block) * p.kv_heads + kv) * (BLOCK_TOKENS * HEAD);
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
    static __device__ __forceinline__ int piece(int i) { return 2 * lane_quarter() + i; }
};

// Query g, in the order of the keys' words.
template <CacheFormat C> struct Queries {
    uint32_t word[8];
    __device__ __forceinline__ void load(const uint16_t* queries, uint32_t rows) {
        const uint4* q = (const uint4*)(queries + lane_row() * HEAD);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint4 v = lane_row() < rows ? q[Page<C>::piece(i)] : make_uint4(0, 0, 0, 0);
            word[4 * i] = Cached<C>::query(v.x), word[4 * i + 1] = Cached<C>::query(v.y);
            word[4 * i + 2] = Cached<C>::query(v.z), word[4 * i + 3] = Cached<C>::query(v.w);
        }
    }
};

// The transpose of an 8 by 8 matrix of 16-bit numbers, of which lane `4 g + t` has columns 2 t and 2 t + 1 of row g.
__device__ __forceinline__ uint32_t transpose(uint32_t v) {
    uint32_t out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
    return out;
}

// One page, of which positions `from .. to` count, the last included. `factor`: from products to scores times log2 e.
template <CacheFormat C>
__device__ __forceinline__ void attend(State& s, const Queries<C>& q, const Page<C>& page, float factor, int position, int from, int to) {
    using Product = typename Cached<C>::Product;
    // Keys g of both halves by queries 2 t and 2 t + 1.
    float score[4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const uint2 lower = page.key(0, j), upper = page.key(1, j);
        const uint32_t a[4] = {lower.x, upper.x, lower.y, upper.y};
        Product::multiply(score, a, q.word[2 * j], q.word[2 * j + 1]);
    }
#pragma unroll
    for (int c = 0; c < 4; c++) score[c] *= factor;
    if (position < from || position + BLOCK_TOKENS - 1 > to) {
        const int key = position + 4 * (lane_row() / 2) + lane_row() % 2;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            if (key + c / 2 * 2 < from || key + c / 2 * 2 > to) score[c] = NOTHING;
        }
    }
    float max[2] = {fmaxf(score[0], score[2]), fmaxf(score[1], score[3])};
    if (__any_sync(~0u, max[0] > s.max[0] + SLACK || max[1] > s.max[1] + SLACK)) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int i = 4; i < WARP; i *= 2) max[h] = fmaxf(max[h], __shfl_xor_sync(~0u, max[h], i));
            max[h] = fmaxf(max[h], s.max[h]);
            const float shrink = exp2f(s.max[h] - max[h]);
            s.max[h] = max[h], s.sum[h] *= shrink;
#pragma unroll
            for (int d = 0; d < HEAD / 16; d++) s.out[d][h] *= shrink, s.out[d][2 + h] *= shrink;
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
        score[c] = score[c] == NOTHING ? 0.f : exp2f(score[c] - s.max[c % 2]);
        s.sum[c % 2] += score[c];
    }
    const uint32_t lower = transpose(Cached<C>::pack(score[0], score[1])), upper = transpose(Cached<C>::pack(score[2], score[3]));
#pragma unroll
    for (int d = 0; d < HEAD / 16; d++) {
        const uint2 v = page.value(2 * d), w = page.value(2 * d + 1);
        const uint32_t a[4] = {v.x, w.x, v.y, w.y};
        Product::multiply(s.out[d], a, lower, upper);
    }
}

// What a warp reads: pages `first, first + step, …` up to `last`, whose blocks its lanes look up 32 at a time.
struct Pages {
    const uint32_t* table;
    int first, last, step, number;
    uint32_t block;
    __device__ __forceinline__ void look_up() {
        const int page = first + (number + int(threadIdx.x % WARP)) * step;
        block = page <= last ? table[page] : 0;
    }
    // The block of the next page.
    __device__ __forceinline__ uint32_t next() {
        if (number % WARP == 0) look_up();
        return __shfl_sync(~0u, block, number++ % WARP);
    }
};

// Blocks that share the pages up to this position: a power of two, such that each warp has at least two pages.
__device__ __forceinline__ int own_splits(const Attention& p, int position) {
    const int pages = position / BLOCK_TOKENS + 1;
    return min(int(p.splits), 1 << (31 - __clz(max(pages / 16, 1))));
}

// Single tokens. A pair of a token and of query heads that share keys has `p.warps` warps of a block, or all of `splits` blocks; these
// share its pages, and the last to arrive puts the parts together, in their order. A token with few pages has fewer parts: how many
// depends, beside `p`, on nothing but its own position. The step's words are older than the step, and so are the pages before a token's
// own, unless a sequence has several tokens: what is older is read before the kernel waits.
template <CacheFormat C> __device__ __forceinline__ void split(const Attention& p) {
    static_assert(WARPS * WARP == 256 && MAX_SPLITS <= WARP && ROWS == WARPS);
    __shared__ float part[WARPS][ROWS][PART], factor[WARPS][ROWS], shares[ROWS][MAX_SPLITS];
    __shared__ uint32_t arrived;
    start_next();
    const int group = p.query_heads / p.kv_heads, rows = min(group, ROWS), heads = p.query_heads / rows;
    const int split = blockIdx.y, warps = p.warps, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int shift = __ffs(warps) - 1; // `warps` is a power of two
    // Of this warp; where a block has several pairs, the last may have none.
    const int first_pair = blockIdx.x * (WARPS >> shift), pair = first_pair + (warp >> shift);
    const bool some = pair < int(p.n) * heads;
    const int token = some ? pair / heads : 0, head = pair % heads, kv = head * rows / group;
    const int end = p.positions[token], begin = p.window ? max(0, end + 1 - (int)p.window) : 0;
    // The same for all pairs of a block, of which there are several only where nothing is split.
    const int splits = own_splits(p, end);
    if (split >= splits) return;
    Pages pages = {p.table + (int)p.table_starts[p.sequences[token]], begin / BLOCK_TOKENS + split * warps + (warp & (warps - 1)),
        some ? end / BLOCK_TOKENS : -1, splits * warps, 0, 0};
    Page<C> page = {};
    const int first = pages.first, last = pages.last;
    const uint32_t block = pages.next();
    const bool ahead = p.ahead && first < last;
    if (ahead) page.load(p, block, kv);
    // What each warp's part counts for in the whole of a row is found by a thread per row and warp; what each block's part counts for, by a
    // warp per row. The row's sink, one more logit of the denominator without a value, comes from far: it is loaded before the wait.
    const int weighed = threadIdx.x >> shift & (ROWS - 1), from = (threadIdx.x / ROWS & ~(warps - 1)) + (threadIdx.x & (warps - 1));
    const int sink_head = splits == 1 ? (first_pair + (from >> shift)) % heads * rows + weighed : head * rows + warp;
    const bool sinks = splits == 1 ? weighed < rows && from < WARPS : warp < rows;
    const float sink = sinks ? p.sinks[sink_head] * LOG2_E : NOTHING;
    int store_token = first_pair / heads, store_head = first_pair % heads;

    wait_for_previous();
    Queries<C> q;
    q.load(p.queries + (size_t(token) * p.query_heads + head * rows) * HEAD, some ? rows : 0);
    if (!ahead && first <= last) page.load(p, block, kv);
    State s;
    for (int i = first; i <= last; i += pages.step) {
        Page<C> next = page;
        const uint32_t block = pages.next();
        if (i + pages.step <= last) next.load(p, block, kv);
        attend<C>(s, q, page, Cached<C>::key_factor(p), i * BLOCK_TOKENS, begin, end);
        page = next;
    }
    const float value_factor = Cached<C>::value_factor(p);
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 4; i < WARP; i *= 2) s.sum[h] += __shfl_xor_sync(~0u, s.sum[h], i);
        float* row = part[warp][2 * lane_quarter() + h];
        if (lane_row() == 0) row[HEAD] = s.max[h], row[HEAD + 1] = s.sum[h];
#pragma unroll
        for (int d = 0; d < HEAD / 16; d++) {
            row[16 * d + lane_row()] = s.out[d][h] * value_factor;
            row[16 * d + lane_row() + 8] = s.out[d][2 + h] * value_factor;
        }
    }
    __syncthreads();

    auto mine_of = [&](int split) { return p.partial + (size_t(pair) * p.splits + split) * ROWS * PART; };
    if (threadIdx.x < ROWS * WARPS) {
        const float own = part[from][weighed][HEAD], own_sink = splits == 1 ? sink : NOTHING;
        float max = fmaxf(own, own_sink);
        for (int i = 1; i < warps; i *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
        float shrink = exp2f(own - max), sum = shrink * part[from][weighed][HEAD + 1];
        for (int i = 1; i < warps; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
        if (splits > 1) mine_of(split)[weighed * PART + HEAD] = max, mine_of(split)[weighed * PART + HEAD + 1] = sum;
        else shrink /= sum + exp2f(own_sink - max);
        factor[from][weighed] = shrink;
    }
    __syncthreads();
    // Two dimensions of a row by each thread.
    auto store = [&](int row, int d, float2 v) {
        const uint32_t low = activation(p.out_format, v.x), high = activation(p.out_format, v.y);
        const uint32_t column = (store_head * rows + row) * HEAD + d;
        *(uint32_t*)(p.out + activation_place(p.out_stack, p.query_heads * HEAD, store_token, column)) = low | high << 16;
    };
    const int row_of = threadIdx.x / (HEAD / 2), d = threadIdx.x % (HEAD / 2) * 2;
    for (int i = 0; i < WARPS >> shift; i++) {
        if (row_of >= rows || first_pair + i >= int(p.n) * heads) break;
        float2 out = make_float2(0, 0);
        for (int w = i * warps; w < (i + 1) * warps; w++) {
            const float2 v = *(const float2*)(part[w][row_of] + d);
            out.x += factor[w][row_of] * v.x, out.y += factor[w][row_of] * v.y;
        }
        if (splits == 1) store(row_of, d, out);
        else *(float2*)(mine_of(split) + row_of * PART + d) = out;
        if (++store_head == heads) store_head = 0, store_token++;
    }
    if (splits == 1) return;
    store_token = token, store_head = head;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(p.arrivals + pair, 1);
    __syncthreads();
    if (arrived != uint32_t(splits - 1)) return;
    __threadfence();
    if (threadIdx.x == 0) p.arrivals[pair] = 0;
    // A warp per row, a lane per part.
    if (warp < rows) {
        const float* own_part = mine_of(lane) + warp * PART;
        const bool inside = lane < splits;
        const float own = inside ? __ldcg(own_part + HEAD) : NOTHING;
        float max = fmaxf(own, sink);
#pragma unroll
        for (int i = WARP / 2; i; i /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
        const float shrink = exp2f(own - max), sum = warp_sum(inside ? shrink * __ldcg(own_part + HEAD + 1) : 0.f);
        if (inside) shares[warp][lane] = shrink / (sum + exp2f(sink - max));
    }
    __syncthreads();
    if (row_of >= rows) return;
    float2 out = make_float2(0, 0);
#pragma unroll 8
    for (int k = 0; k < splits; k++) {
        const float2 v = __ldcg((const float2*)(mine_of(k) + row_of * PART + d));
        out.x += shares[row_of][k] * v.x, out.y += shares[row_of][k] * v.y;
    }
    store(row_of, d, out);
}

extern "C" __global__ void __launch_bounds__(256, 2) attend_split(const __grid_constant__ Attention p) { split<CACHE_BF16>(p); }
extern "C" __global__ void __launch_bounds__(256, 2) attend_split_e4m3(const __grid_constant__ Attention p) { split<CACHE_E4M3>(p); }
