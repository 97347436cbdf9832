// Attention of prompts on Hopper, over the paged cache: a block takes 128 rows (tokens times the query heads of one key/value head), 64
// per warpgroup, through 64 keys at a time, which come to shared memory by asynchronous copies three steps ahead; where that is too few
// blocks for the chip, several share the keys of a tile. Scores and values are products of a warpgroup, softmax is online in f32. Products
// and exponentials take a multiprocessor about the same time: while one warpgroup waits for its products, the other three of the
// multiprocessor's two blocks have their exponentials.
#include "attention.cuh"
#include "hopper.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int STAGES = 4, AHEAD = STAGES - 1;
constexpr int LINES = STAGES * STAGE;                   // where a row's output is put together, 128 bytes
constexpr int RAW = LINES + WARPS * 16 * 128;           // E4M3: as they are in the cache
constexpr int RAW_STAGE = STAGE / 2;
static_assert(RAW == 81920 && AHEAD * RAW_STAGE == 3 * 8192, "what the launch gives");

// The values of a page: rows of 32 bytes, eight of them in 256.
__device__ __forceinline__ uint64_t values_descriptor(uint32_t address) {
    return uint64_t(256 >> 4 | 3u << 30) << 32 | descriptor_of(address);
}

// What a thread brings of 64 keys: of keys one piece of eight dimensions of two keys, of values one piece of eight keys of two
// dimensions, all of one page.
template <CacheFormat C> struct Copies {
    const Attention& p;
    const uint32_t* table;
    uint32_t shared;       // address
    int begin, end;        // steps
    int first_page, last_page;
    __device__ __forceinline__ int page() const { return threadIdx.x / 64; }
    __device__ __forceinline__ int row() const { return threadIdx.x % 64 / 8 * 2; }
    __device__ __forceinline__ int piece() const { return threadIdx.x % 8; }
    __device__ __forceinline__ int dimension() const { return threadIdx.x % 64 / 2 * 2; }
    __device__ __forceinline__ int part() const { return threadIdx.x % 2; }
    __device__ __forceinline__ uint32_t stage(int step) const { return shared + (step - begin) % STAGES * STAGE; }
    // Pages before the first and beyond the last, which are not in the table, are not read: their keys are masked, but what is
    // multiplied by zero must be a number.
    __device__ __forceinline__ uint32_t block(int step) const {
        return step < end ? table[max(first_page, min(step * PAGES + page(), last_page))] : 0;
    }
    __device__ __forceinline__ void bring(int step, uint32_t block) const {
        if (step < end) {
            const size_t at = (size_t(block) * p.kv_heads + blockIdx.y) * (BLOCK_TOKENS * HEAD);
            const size_t key = at + row() * HEAD + piece() * 8, value = at + dimension() * BLOCK_TOKENS + part() * 8;
            if constexpr (C == CACHE_BF16) {
                const uint32_t to = stage(step);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    copy_async(to + key_place(page() * BLOCK_TOKENS + row() + i, piece()), (const uint16_t*)p.keys + key + i * HEAD);
                    copy_async(to + value_place(page(), dimension() + i, part()), (const uint16_t*)p.values + value + i * BLOCK_TOKENS);
                }
            } else {
                const uint32_t to = raw(step);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    copy_async_8(to + 8 * i * THREADS, (const uint8_t*)p.keys + key + i * HEAD);
                    copy_async_8(to + 8 * (2 + i) * THREADS, (const uint8_t*)p.values + value + i * BLOCK_TOKENS);
                }
            }
        }
        commit_copies();
    }
    // What has arrived becomes visible to products, after the barrier.
    __device__ __forceinline__ void publish(int step, uint32_t barrier) const {
        if constexpr (C == CACHE_E4M3) {
            const uint32_t to = stage(step), from = raw(step);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t lower, upper;
                asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(lower), "=r"(upper) : "r"(from + 8 * i * THREADS) : "memory");
                const uint2 a = widen_e4m3(lower), b = widen_e4m3(upper);
                const uint32_t place = i < 2 ? key_place(page() * BLOCK_TOKENS + row() + i, piece()) : value_place(page(), dimension() + i - 2, part());
                asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + place), "r"(a.x), "r"(a.y), "r"(b.x), "r"(b.y)
                             : "memory");
            }
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(barrier);
    }

  private:
    // This thread's own.
    __device__ __forceinline__ uint32_t raw(int step) const { return shared + RAW + (step - begin) % AHEAD * RAW_STAGE + 8 * threadIdx.x; }
    static __device__ __forceinline__ void copy_async_8(uint32_t to, const void* from) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
    }
};

// `SPLIT`: whether several blocks share the keys of a tile.
template <CacheFormat C, bool SPLIT> __device__ __forceinline__ void many(const Attention& p) {
    constexpr Format F = C == CACHE_BF16 ? BF16 : FP4;
    extern __shared__ uint8_t unaligned[];
    __shared__ __align__(8) uint64_t barriers[STAGES];
    uint8_t* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
    if (threadIdx.x < STAGES) init_barrier(shared_address(barriers + threadIdx.x), WARPS);
    fence_barriers();
    __syncthreads();
    wait_for_previous();
    start_next();
    const int group = p.query_heads / p.kv_heads, kv = blockIdx.y, per_warp = 16 / group, warp = threadIdx.x / WARP;
    // The last tiles of a prompt see most keys: they begin first.
    const uint32_t* tile = p.tiles + 2 * (gridDim.x - 1 - blockIdx.x);
    const int first = tile[0], count = tile[1], start = p.positions[first];
    const int first_key = p.window ? max(0, start + 1 - (int)p.window) : 0, last_key = start + count - 1;
    int splits = 1, begin = first_key / KEYS, end = last_key / KEYS + 1;
    if (SPLIT && !take_share(p, splits, begin, end)) return;
    const Copies<C> copies = {p, p.table + (int)p.table_starts[p.sequences[first]], shared_address(shared), begin, end,
                              first_key / BLOCK_TOKENS, last_key / BLOCK_TOKENS};
#pragma unroll
    for (int i = 0; i < AHEAD; i++) copies.bring(begin + i, copies.block(begin + i));
    uint32_t next_block = copies.block(begin + AHEAD);

    // Rows g and g + 8 of this warp, their queries and the keys that they see.
    uint32_t q[4][4] = {};
    int from[2], to[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = lane_row() + 8 * h, token = warp * per_warp + row / group;
        const bool inside = token < count;
        to[h] = inside ? start + token : -1;
        from[h] = p.window ? max(0, to[h] + 1 - (int)p.window) : 0;
        const uint32_t* words = (const uint32_t*)(p.queries + (size_t(first + token) * p.query_heads + kv * group + row % group) * HEAD);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (!inside) continue;
            q[j][h] = Cached<C>::query(words[8 * j + lane_quarter()]);
            q[j][2 + h] = Cached<C>::query(words[8 * j + 4 + lane_quarter()]);
        }
    }
    // What all rows of this warp see.
    const int low = start + warp * per_warp, high = low + per_warp - 1;
    const int all_from = p.window ? max(0, high + 1 - (int)p.window) : 0;
    const float factor = Cached<C>::key_factor(p);

    float max_score[2] = {NOTHING, NOTHING}, shrink[2], sum[2] = {0, 0}, score[32] = {}, out[32] = {};
    uint32_t weight[PAGES][4];
    auto full = [&](int step) { return shared_address(barriers) + 8 * ((step - begin) % STAGES); };
    auto wait = [&](int step) { wait_barrier(full(step), (step - begin) / STAGES % 2); };
    auto multiply_keys = [&](int step) {
        const uint32_t b = descriptor_of(copies.stage(step));
        multiply<F, HEAD, false>(score, q[0], descriptor(b, 0));
#pragma unroll
        for (int j = 1; j < 4; j++) multiply<F, HEAD>(score, q[j], descriptor(b, 32 * j));
        commit_products();
    };
    auto multiply_values = [&](int step) {
#pragma unroll
        for (int j = 0; j < PAGES; j++) multiply<F, HEAD>(out, weight[j], values_descriptor(copies.stage(step) + HALF + 2048 * j));
        commit_products();
    };
    // The largest score of each row so far, and what a new one makes of the sums before it.
    auto find_largest = [&](int step) {
        const int position = step * KEYS;
        if (position < all_from || position + KEYS - 1 > low) {
#pragma unroll
            for (int i = 0; i < 32; i++) {
                const int h = i / 2 % 2, key = position + i / 4 * 8 + 2 * lane_quarter() + i % 2;
                if (key < from[h] || key > to[h]) score[i] = -INFINITY;
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float largest = max_score[h];
#pragma unroll
            for (int i = 0; i < 16; i++) largest = fmaxf(largest, score[i / 2 * 4 + 2 * h + i % 2]);
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            shrink[h] = power((max_score[h] - largest) * factor);
            max_score[h] = largest;
        }
    };
    auto weigh = [&] {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float less = max_score[h] * factor;
            float total = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float a = power(score[4 * i + 2 * h] * factor - less), b = power(score[4 * i + 2 * h + 1] * factor - less);
                total += a + b;
                weight[i / 2][i % 2 * 2 + h] = Cached<C>::pack(a, b);
            }
            sum[h] = sum[h] * shrink[h] + total;
        }
    };

    wait_for_copies<AHEAD - 1>();
    copies.publish(begin, full(begin));
    wait(begin);
    begin_products();
    multiply_keys(begin);
    wait_for_products<0>();
    find_largest(begin);
    int step = begin;
    for (; step + 1 < end; step++) {
        wait_for_copies<AHEAD - 2>();
        copies.publish(step + 1, full(step + 1));
        weigh();
        // A warp arrives here when it is done with the values of the step before, whose stage is filled again.
        wait(step + 1);
        copies.bring(step + AHEAD, next_block);
        next_block = copies.block(step + AHEAD + 1);
        begin_products();
        multiply_keys(step + 1);
        multiply_values(step);
        wait_for_products<1>();
        find_largest(step + 1);
        wait_for_products<0>();
        if (__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
            for (int i = 0; i < 32; i++) out[i] *= shrink[i / 2 % 2];
        }
    }
    weigh();
    begin_products();
    multiply_values(step);
    wait_for_products<0>();
    if (SPLIT && splits > 1 && !put_together(p, splits, factor, warp * per_warp < count, max_score, sum, out)) return;

    // Rows of 64 outputs, in the order of activations, each then in pieces of 16 bytes to memory.
    uint8_t* lines = shared + LINES + warp * 16 * 128;
    auto line_place = [&](int row, uint32_t piece) { return lines + row * 128 + ((piece ^ row % 8) << 4); };
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        const int row = lane_row() + 8 * h;
        // The sink is one more logit of the denominator, without a value.
        const float own = max_score[h] * factor, sink = p.sinks[kv * group + row % group] * LOG2_E, largest = fmaxf(own, sink);
        const float less = power(own - largest), inverse = less * Cached<C>::value_factor(p) / (sum[h] * less + power(sink - largest));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float a = out[4 * i + 2 * h] * inverse, b = out[4 * i + 2 * h + 1] * inverse;
            // Neighbouring inputs lie side by side in either order.
            const uint32_t k = 8 * i + 2 * lane_quarter(), position = p.out_stack ? product_position(k) : k;
            *(uint32_t*)(line_place(row, position / 8) + position % 8 * 2) = activation(p.out_format, a) | activation(p.out_format, b) << 16;
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = 4 * i + threadIdx.x % WARP / 8, piece = threadIdx.x % 8, token = warp * per_warp + row / group;
        if (token >= count) continue;
        const uint32_t head = kv * group + row % group, to_row = first + token;
        uint16_t* to = p.out_stack ? p.out + (size_t(head) * p.out_stack + to_row) * HEAD + ((piece ^ to_row % 8) << 3)
                                   : p.out + (size_t(to_row) * p.query_heads + head) * HEAD + piece * 8;
        *(uint4*)to = *(const uint4*)line_place(row, piece);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) attend_prompts(const __grid_constant__ Attention p) { many<CACHE_BF16, false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) attend_prompts_e4m3(const __grid_constant__ Attention p) { many<CACHE_E4M3, false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) attend_prompts_split(const __grid_constant__ Attention p) { many<CACHE_BF16, true>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) attend_prompts_split_e4m3(const __grid_constant__ Attention p) { many<CACHE_E4M3, true>(p); }
