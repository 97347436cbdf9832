// Attention of single tokens over the paged cache, with sinks, windows and grouped queries: a warp takes up to eight query heads that
// share a key/value head through pages of 16 keys, which come to its part of shared memory by asynchronous copies that run ahead. Keys and
// values are the first operands of tensor core products, so that the queries fill the eight columns; softmax online in f32.
#include "attention.cuh"

constexpr int WARPS = 8;       // of a block
constexpr int ROWS = 8;        // query heads of a warp, at most
constexpr int PART = HEAD + 2; // weighted values, largest score, sum of a row
constexpr int MAX_SPLITS = 32; // blocks that share a token's keys
constexpr int TOGETHER = 16;   // of them, whose parts are put together at a time
// By how much, in powers of two, scores may exceed what the weights are relative to before those are made anew.
constexpr float SLACK = 8;

// For queries 2 t and 2 t + 1: what the weights are relative to (of scores times log2 e), the sum of this lane's, weighted values of
// dimensions 16 d + g and 16 d + g + 8.
struct State {
    float max[2] = {NOTHING, NOTHING}, sum[2] = {0, 0}, out[HEAD / 16][4] = {};
};

// How many pages a warp has on their way, beside the one in its registers. How a page lies in shared memory, keys first: rows of 16-byte
// pieces, exchanged such that those that eight rows give to one matrix are in different banks. 32 pieces further on are 512 bytes further
// on; with the keys, an odd number of times, at a place with bit `FLIP` changed.
template <CacheFormat C> struct Layout;

template <> struct Layout<CACHE_BF16> {
    static constexpr int SLOTS = 2;
    static constexpr uint32_t HALF = BLOCK_TOKENS * HEAD * 2, KEY_PIECES = 8, VALUE_PIECES = 2, FLIP = 64;
    static __device__ __forceinline__ uint32_t key_place(uint32_t key, uint32_t piece) { return key * 128 + ((piece ^ key % 8) << 4); }
    static __device__ __forceinline__ uint32_t value_place(uint32_t d, uint32_t piece) { return d * 32 + ((piece ^ (d / 4 & 1)) << 4); }
    // The key that is row `row` of the lower or upper half of a product; which pair of a query's dimensions goes with word `h` of product j.
    static __device__ __forceinline__ int key(int row, int upper) { return row + 8 * upper; }
    static __device__ __forceinline__ int pair(int j, int h) { return 8 * j + 4 * h + lane_quarter(); }
};

// A word has four numbers, which are those of two words of a product.
template <> struct Layout<CACHE_E4M3> {
    static constexpr int SLOTS = 3;
    static constexpr uint32_t HALF = BLOCK_TOKENS * HEAD, KEY_PIECES = 4, VALUE_PIECES = 1, FLIP = 32;
    static __device__ __forceinline__ uint32_t key_place(uint32_t key, uint32_t piece) { return key * 64 + ((piece ^ key / 4) << 4); }
    static __device__ __forceinline__ uint32_t value_place(uint32_t d, uint32_t) { return d * 16; }
    static __device__ __forceinline__ int key(int row, int upper) { return 4 * (row / 2) + row % 2 + 2 * upper; }
    static __device__ __forceinline__ int pair(int j, int h) { return 8 * j + 2 * lane_quarter() + h; }
};

// This lane's part of a page.
template <CacheFormat C> struct Page {
    using Place = Layout<C>;
    static constexpr uint32_t BYTES = 2 * Place::HALF, COUNT = Place::HALF / (16 * WARP);
    uint32_t keys[COUNT][4], values[COUNT][4];

    // Brings to shared memory what lies from `keys` and `values` on, of which this lane has its pieces.
    static __device__ __forceinline__ void bring(uint32_t to, const uint8_t* keys, const uint8_t* values) {
        const uint32_t lane = threadIdx.x % WARP;
        const uint32_t key = to + Place::key_place(lane / Place::KEY_PIECES, lane % Place::KEY_PIECES);
        const uint32_t value = to + Place::HALF + Place::value_place(lane / Place::VALUE_PIECES, lane % Place::VALUE_PIECES);
        // Else so many would push everything out of the cache, the kernels' code included.
        const uint64_t policy = read_once();
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) copy_async((key ^ i % 2 * Place::FLIP) + 512 * i, keys + 512 * i, policy);
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) copy_async(value + 512 * i, values + 512 * i, policy);
    }
    // A token's key and value to their places there. This lane has two numbers of each, in E4M3 each in a half of a word.
    static __device__ __forceinline__ void put(uint8_t* to, uint32_t token, uint32_t key, uint32_t value) {
        const uint32_t lane = threadIdx.x % WARP;
        uint8_t *keys = to + Place::key_place(token, lane / (WARP / Place::KEY_PIECES)), *values = to + Place::HALF;
        if constexpr (C == CACHE_BF16) ((uint32_t*)keys)[lane % 4] = key;
        else ((uint16_t*)keys)[lane % 8] = __byte_perm(key, 0, 0x20);
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            if constexpr (C == CACHE_BF16) ((uint16_t*)(values + Place::value_place(2 * lane + i, token / 8)))[token % 8] = value >> 16 * i;
            else values[Place::value_place(2 * lane + i, 0) + token] = value >> 16 * i;
        }
    }
    // From there to registers.
    __device__ __forceinline__ void load(uint32_t from) {
        const uint32_t lane = threadIdx.x % WARP, rows = C == CACHE_BF16 ? 2 * 8 : 4 * 8;
        const uint32_t key = from + Place::key_place(Place::key(lane % 8, lane / 8 % 2), lane / 16);
        const uint32_t value = from + Place::HALF + Place::value_place(lane % rows, lane / rows);
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) load_matrices(keys[i], key ^ 32 * i);
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) load_matrices(values[i], value + 512 * i);
    }
    // The first operand of product i.
    static __device__ __forceinline__ void operand(const uint32_t (&words)[COUNT][4], int i, uint32_t (&a)[4]) {
        if constexpr (C == CACHE_BF16) {
#pragma unroll
            for (int k = 0; k < 4; k++) a[k] = words[i][k];
        } else {
            const uint2 first = widen_e4m3(words[i / 2][i % 2 * 2]), second = widen_e4m3(words[i / 2][i % 2 * 2 + 1]);
            a[0] = first.x, a[1] = second.x, a[2] = first.y, a[3] = second.y;
        }
    }
};

// Query g, in the order of the keys' words.
template <CacheFormat C> struct Queries {
    uint32_t word[HEAD / 16][2];
    // As they lie in memory; whether all have come.
    __device__ __forceinline__ bool load(const uint16_t* queries, int rows) {
        const uint32_t* query = (const uint32_t*)(queries + lane_row() * HEAD);
        bool come = true;
#pragma unroll
        for (int i = 0; i < HEAD / 8; i++) {
            const uint32_t v = lane_row() < rows ? load_word(query + Layout<C>::pair(i / 2, i % 2)) : 0;
            word[i / 2][i % 2] = v, come &= has_come(v);
        }
        return come;
    }
    __device__ __forceinline__ void convert() {
#pragma unroll
        for (int i = 0; i < HEAD / 8; i++) word[i / 2][i % 2] = Cached<C>::query(word[i / 2][i % 2]);
    }
};

// The transpose of an 8 by 8 matrix of 16-bit numbers, of which lane `4 g + t` has columns 2 t and 2 t + 1 of row g.
__device__ __forceinline__ uint32_t transpose(uint32_t v) {
    uint32_t out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
    return out;
}

// One page, of which positions `from .. to` count, the last included: at least one. `factor`: from products to scores times log2 e.
template <CacheFormat C>
__device__ __forceinline__ void attend(State& s, const Queries<C>& q, const Page<C>& page, float factor, int position, int from, int to) {
    using Product = typename Cached<C>::Product;
    // Keys g of both halves by queries 2 t and 2 t + 1.
    float score[4] = {};
#pragma unroll
    for (int j = 0; j < HEAD / 16; j++) {
        uint32_t a[4];
        Page<C>::operand(page.keys, j, a);
        Product::multiply(score, a, q.word[j][0], q.word[j][1]);
    }
#pragma unroll
    for (int c = 0; c < 4; c++) score[c] *= factor;
    if (position < from || position + BLOCK_TOKENS - 1 > to) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int key = position + Layout<C>::key(lane_row(), c / 2);
            if (key < from || key > to) score[c] = NOTHING;
        }
    }
    float max[2] = {fmaxf(score[0], score[2]), fmaxf(score[1], score[3])};
    if (__any_sync(~0u, max[0] > s.max[0] + SLACK || max[1] > s.max[1] + SLACK)) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int i = 4; i < WARP; i *= 2) max[h] = fmaxf(max[h], __shfl_xor_sync(~0u, max[h], i));
            max[h] = fmaxf(max[h], s.max[h]);
            const float shrink = power(s.max[h] - max[h]);
            s.max[h] = max[h], s.sum[h] *= shrink;
#pragma unroll
            for (int d = 0; d < HEAD / 16; d++) s.out[d][h] *= shrink, s.out[d][2 + h] *= shrink;
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
        score[c] = power(score[c] - s.max[c % 2]);
        s.sum[c % 2] += score[c];
    }
    const uint32_t lower = transpose(Cached<C>::pack(score[0], score[1])), upper = transpose(Cached<C>::pack(score[2], score[3]));
#pragma unroll
    for (int d = 0; d < HEAD / 16; d++) {
        uint32_t a[4];
        Page<C>::operand(page.values, d, a);
        Product::multiply(s.out[d], a, lower, upper);
    }
}

// What a warp reads: pages `next, next + step, …` up to `last`, whose blocks its lanes look up 32 at a time.
template <CacheFormat C> struct Pages {
    const uint32_t* table;
    const uint8_t *keys, *values; // this lane's first pieces in the first block
    uint32_t stride;              // bytes from block to block
    int next, last, step, number;
    uint32_t block;
    // Brings the next page, if there is one.
    __device__ __forceinline__ void bring(uint32_t to) {
        if (next <= last) {
            if (number % WARP == 0) {
                const int page = next + int(threadIdx.x % WARP) * step;
                block = page <= last ? table[page] : 0;
            }
            const size_t at = size_t(__shfl_sync(~0u, block, number % WARP)) * stride;
            Page<C>::bring(to, keys + at, values + at);
        }
        next += step, number++;
        commit_copies();
    }
};

// Blocks that share the pages up to this position. Several must gain more than they lose when one waits for the others; of more than eight
// a head the next kernel finds no room beside some.
__device__ __forceinline__ int own_splits(const Attention& p, int position) {
    const int pages = position / BLOCK_TOKENS + 1;
    const int useful = pages < int(p.shared_from) ? 1 : pages < 256 ? 4 : pages < 1024 ? 8 : pages < 2048 ? 16 : MAX_SPLITS;
    return min(int(p.splits), useful);
}

// Two numbers of what a block found of a row, which another takes, maybe as words that come: what is no number, a sum has with other bits.
__device__ __forceinline__ void load_pair(float2& v, const float* from, bool wanted) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];\n}"
                 : "+f"(v.x), "+f"(v.y)
                 : "l"(from), "r"(uint32_t(wanted))
                 : "memory");
}
__device__ __forceinline__ void give(float* to, const float2& v) {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void take_back(float* to) { *(uint2*)to = make_uint2(~0u, ~0u); }
__device__ __forceinline__ bool has_come(const float2& v) { return max(__float_as_uint(v.x), __float_as_uint(v.y)) != ~0u; }

// Single tokens. A pair of a token and of query heads that share keys has `p.warps` warps of a block, or all of `splits` blocks; these
// share its pages, and then its rows, of which they put the parts together; of blocks the last one does so, in their order. A token
// with few pages has fewer parts: how many depends, beside `p`, on nothing but its own position. The step's words are older than the step,
// and so are the pages before a token's own, unless a sequence has several tokens: what is older is read before the kernel waits. In a step
// of one token all pages are read then, and the token's own key and value, `fresh`, are put where they belong as they come.
template <CacheFormat C> __device__ __forceinline__ void split(const Attention& p) {
    constexpr int SLOTS = Layout<C>::SLOTS, RING = SLOTS * Page<C>::BYTES;
    static_assert(MAX_SPLITS <= WARP && ROWS == WARPS && ROWS * PART * sizeof(float) <= RING);
    extern __shared__ __align__(128) uint8_t shared[];
    start_next();
    // `warps` and `rows` are powers of two.
    const int split = blockIdx.y, warps = p.warps, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rank = warp & (warps - 1);
    const int rows = p.rows, heads = p.query_heads >> __ffs(rows) - 1;
    const int pair = (blockIdx.x * WARPS + warp) >> __ffs(warps) - 1;
    if (pair >= int(p.n) * heads) return;
    const int token = pair / heads, head = pair % heads, kv = heads > p.kv_heads ? head / 2 : head;
    const int end = p.positions[token], begin = p.window ? max(0, end + 1 - (int)p.window) : 0;
    // The same for all pairs of a block, of which there are several only where nothing is split.
    const int splits = own_splits(p, end);
    if (split >= splits) return;
    const int first = begin / BLOCK_TOKENS + split * warps + rank, last = end / BLOCK_TOKENS;
    const size_t own_place = kv * Layout<C>::HALF + 16 * lane;
    Pages<C> pages = {p.table + (int)p.table_starts[token], (const uint8_t*)p.keys + own_place,
        (const uint8_t*)p.values + own_place, p.kv_heads * Layout<C>::HALF, first, last, splits * warps, 0, 0};
    auto ring_of = [&](int warp) { return shared + warp * RING; };
    const uint32_t ring = shared_address(ring_of(warp));
    // Whether this warp has the page of the token itself.
    const bool fresh = p.fresh, owns = fresh && first <= last && (last - first) % pages.step == 0;
    int brought = 0;
#pragma unroll 1
    for (; brought < SLOTS && p.ahead && pages.next < last + fresh; brought++) pages.bring(ring + brought * Page<C>::BYTES);
    // Of the rows whose parts this warp puts together, lane c knows what part `c % warps` of row `c / warps * warps + rank` counts for.
    const int part = lane & (warps - 1), row = (lane % ROWS & ~(warps - 1)) + rank;
    // The row's sink, one more logit of the denominator without a value, comes from far: it is loaded before the wait.
    const float sink = row < rows ? p.sinks[head * rows + row] * LOG2_E : NOTHING;

    if (!fresh) wait_for_previous();
#pragma unroll 1
    for (; brought < SLOTS; brought++) pages.bring(ring + brought * Page<C>::BYTES);
    Queries<C> q;
    uint32_t own_key = 0, own_value = 0;
    bool come;
    do {
        come = q.load((fresh ? p.fresh : p.queries) + (size_t(token) * p.query_heads + head * rows) * HEAD, rows);
        if (owns) {
            const uint16_t* key = p.fresh + (p.query_heads + kv) * HEAD + 2 * lane;
            own_key = load_word(key), own_value = load_word(key + p.kv_heads * HEAD);
            come &= has_come(own_key) && has_come(own_value);
        }
    } while (fresh && !come);
    __syncwarp();
    q.convert();
    State s;
    uint32_t slot = ring;
    for (int i = first; i <= last; i += pages.step) {
        wait_for_copies<SLOTS - 1>();
        __syncwarp();
        if (owns && i == last) {
            Page<C>::put(ring_of(warp) + (slot - ring), end % BLOCK_TOKENS, own_key, own_value);
            __syncwarp();
        }
        Page<C> page;
        page.load(slot);
        __syncwarp();
        pages.bring(slot);
        slot = slot == ring + (SLOTS - 1) * Page<C>::BYTES ? ring : slot + Page<C>::BYTES;
        attend<C>(s, q, page, Cached<C>::key_factor(p), i * BLOCK_TOKENS, begin, end);
    }
    // All pages were used: the parts take their place.
    const float value_factor = Cached<C>::value_factor(p);
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 4; i < WARP; i *= 2) s.sum[h] += __shfl_xor_sync(~0u, s.sum[h], i);
        float* to = (float*)ring_of(warp) + (2 * lane_quarter() + h) * PART;
        if (lane_row() == 0) to[HEAD] = s.max[h], to[HEAD + 1] = s.sum[h];
#pragma unroll
        for (int d = 0; d < HEAD / 16; d++) {
            to[16 * d + lane_row()] = s.out[d][h] * value_factor;
            to[16 * d + lane_row() + 8] = s.out[d][2 + h] * value_factor;
        }
    }
    if (warps > 1) __syncthreads();
    else __syncwarp();

    auto part_of = [&](int part, int row) { return (const float*)ring_of(warp - rank + part) + row * PART; };
    auto global_part_of = [&](int split, int row) { return p.partial + ((size_t(pair) * p.splits + split) * ROWS + row) * PART; };
    const float own = part_of(part, row)[HEAD], own_sink = splits == 1 ? sink : NOTHING;
    float max = fmaxf(own, own_sink);
    for (int i = 1; i < warps; i *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
    float share = power(own - max), sum = share * part_of(part, row)[HEAD + 1];
    for (int i = 1; i < warps; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (splits == 1) share /= sum + power(own_sink - max);
    else if (lane == 0 && row < rows) give(global_part_of(split, row) + HEAD, make_float2(max, sum));
    // A lane has two dimensions of a row.
    const int d = 2 * lane;
    uint16_t* out = p.out + activation_place(p.out_stack, p.query_heads * HEAD, token, head * rows * HEAD + d);
    const size_t out_step = p.out_stack == 0 || p.out_stack == ORDERED ? HEAD : size_t(p.out_stack) * TILE_COLS;
    auto store = [&](int row, float2 v) {
        *(uint32_t*)(out + row * out_step) = activation(p.out_format, v.x) | uint32_t(activation(p.out_format, v.y)) << 16;
    };
    float2 total = make_float2(0, 0);
    for (int r = rank; r < ROWS; r += warps) {
#pragma unroll 4
        for (int i = 0; i < warps; i++) {
            const float share_of_part = __shfl_sync(~0u, share, r - rank + i);
            const float2 v = *(const float2*)(part_of(i, r) + d);
            total.x += share_of_part * v.x, total.y += share_of_part * v.y;
        }
        if (r >= rows) continue;
        if (splits > 1) give(global_part_of(split, r) + d, total);
        else store(r, total);
        total = make_float2(0, 0);
    }
    // Who waits for this kernel waits for the one before, too.
    wait_for_previous();
    if (splits == 1) return;
    // Parts that are words are put together by a block that waits for them: the others leave room for the next kernel. Else the last does it.
    const bool words = !p.arrivals;
    if (words ? split != splits - 1 : !last_to_arrive(p.arrivals + pair, splits)) return;
    // A warp per row, a lane per part. What all parts have comes together.
    if (warp >= rows) return;
#pragma unroll 1
    for (int from = 0; from < splits; from += TOGETHER) {
        float2 scores = make_float2(NOTHING, 0), values[TOGETHER] = {};
        do {
            load_pair(scores, global_part_of(lane, warp) + HEAD, lane < splits);
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) load_pair(values[k], global_part_of(from + k, warp) + d, from + k < splits);
            come = has_come(scores);
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) come &= has_come(values[k]);
        } while (!__all_sync(~0u, come));
        max = fmaxf(scores.x, sink);
#pragma unroll
        for (int i = WARP / 2; i; i /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
        share = power(scores.x - max), sum = warp_sum(share * scores.y);
        share /= sum + power(sink - max);
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            const float share_of_part = __shfl_sync(~0u, share, from + k);
            total.x += share_of_part * values[k].x, total.y += share_of_part * values[k].y;
        }
    }
    store(warp, total);
    if (!words) return;
    if (lane < splits) take_back(global_part_of(lane, warp) + HEAD);
    for (int k = 0; k < splits; k++) take_back(global_part_of(k, warp) + d);
}

extern "C" __global__ void __launch_bounds__(256, 2) attend_split(const __grid_constant__ Attention p) { split<CACHE_BF16>(p); }
extern "C" __global__ void __launch_bounds__(256, 2) attend_split_e4m3(const __grid_constant__ Attention p) { split<CACHE_E4M3>(p); }
