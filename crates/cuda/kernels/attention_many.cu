// Attention of prompts over the paged cache: a block takes 128 rows (tokens times the query heads of one key/value head), sixteen
// per warp, through 64 keys at a time, which come to shared memory by asynchronous copies two steps ahead; where that is too few blocks
// for the chip, several share the keys of a tile. Scores and values on tensor cores, softmax online in f32.
#include "attention.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int STAGES = 3;

// `SPLIT`: whether several blocks share the keys of a tile.
template <CacheFormat C, bool SPLIT> __device__ __forceinline__ void many(const Attention& p) {
    using Product = typename Cached<C>::Product;
    extern __shared__ __align__(128) uint8_t shared[];
    wait_for_previous();
    start_next();
    const int group = p.query_heads / p.kv_heads, kv = blockIdx.y, per_warp = 16 / group, warp = threadIdx.x / WARP;
    // The last tiles of a prompt see most keys: they begin first.
    const uint32_t* tile = p.tiles + 2 * (gridDim.x - 1 - blockIdx.x);
    const int first = tile[0], count = tile[1], start = p.positions[first];
    const uint32_t* table = p.table + (int)p.table_starts[p.sequences[first]];
    const uint32_t stages = shared_address(shared);
    const int first_key = p.window ? max(0, start + 1 - (int)p.window) : 0, last_key = start + count - 1;
    const int first_page = first_key / BLOCK_TOKENS, last_page = last_key / BLOCK_TOKENS;
    int splits = 1, begin = first_key / KEYS, end = last_key / KEYS + 1;
    if (SPLIT && !take_share(p, splits, begin, end)) return;

    // This thread brings pieces of one page: of keys `threadIdx.x % 8` of two keys, of values one half of two dimensions.
    const int page = threadIdx.x / 64, key = threadIdx.x % 64 / 8 * 2, piece = threadIdx.x % 8;
    const int d = threadIdx.x % 64 / 2 * 2, half = threadIdx.x % 2;
    // Pages before the first and beyond the last, which are not in the table, are not read: their keys are masked, but what is
    // multiplied by zero must be a number.
    auto block_of = [&](int step) { return step < end ? table[max(first_page, min(step * PAGES + page, last_page))] : 0; };
    // E4M3 comes through registers, a step ahead of the copy to shared memory, and is widened on the way.
    uint2 fetched[4];
    auto fetch = [&](int step, uint32_t block) {
        if (step >= end) return;
        const size_t at = (size_t(block) * p.kv_heads + kv) * (BLOCK_TOKENS * HEAD);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            fetched[i] = *(const uint2*)((const uint8_t*)p.keys + at + (key + i) * HEAD + piece * 8);
            fetched[2 + i] = *(const uint2*)((const uint8_t*)p.values + at + (d + i) * BLOCK_TOKENS + half * 8);
        }
    };
    auto put = [&](int step) {
        if (step >= end) return;
        const uint32_t to = stages + step % STAGES * STAGE;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint2 a = widen_e4m3(fetched[i].x), b = widen_e4m3(fetched[i].y);
            const uint32_t place = i < 2 ? key_place(page * BLOCK_TOKENS + key + i, piece) : value_place(page, d + i - 2, half);
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + place), "r"(a.x), "r"(a.y), "r"(b.x), "r"(b.y)
                         : "memory");
        }
    };
    auto bring = [&](int step, uint32_t block) {
        if (step < end) {
            const size_t at = (size_t(block) * p.kv_heads + kv) * (BLOCK_TOKENS * HEAD);
            const uint32_t to = stages + step % STAGES * STAGE;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                copy_async(to + key_place(page * BLOCK_TOKENS + key + i, piece), (const uint16_t*)p.keys + at + (key + i) * HEAD + piece * 8);
                copy_async(to + value_place(page, d + i, half), (const uint16_t*)p.values + at + (d + i) * BLOCK_TOKENS + half * 8);
            }
        }
        commit_copies();
    };
    constexpr bool WIDENED = C == CACHE_E4M3;
    const float factor = Cached<C>::key_factor(p);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (WIDENED) fetch(begin + i, block_of(begin + i)), put(begin + i);
        else bring(begin + i, block_of(begin + i));
    }
    uint32_t next_block = block_of(begin + STAGES - 1);
    if (WIDENED) {
        fetch(begin + STAGES - 1, next_block);
        next_block = block_of(begin + STAGES);
    }

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
    // What all rows of this warp see, and what any sees.
    const int low = start + warp * per_warp, high = min(low + per_warp, start + count) - 1;
    const bool idle = high < low;
    const int all_from = p.window ? max(0, high + 1 - (int)p.window) : 0, any_from = p.window ? max(0, low + 1 - (int)p.window) : 0;

    float max_score[2] = {NOTHING, NOTHING}, sum[2] = {0, 0}, out[8][4] = {};
    const int lane = threadIdx.x % WARP;
    for (int step = begin; step < end; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();
        if (WIDENED) {
            put(step + STAGES - 1);
            fetch(step + STAGES, next_block);
            next_block = block_of(step + STAGES + 1);
        } else {
            bring(step + STAGES - 1, next_block);
            next_block = block_of(step + STAGES);
        }
        const int position = step * KEYS;
        if (idle || position > high || position + KEYS <= any_from) continue;
        const uint32_t stage = stages + step % STAGES * STAGE;
        float score[8][4] = {};
#pragma unroll
        for (int i = 0; i < 8; i++) {
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                // Four pieces of 8 keys: the inputs of two products.
                uint32_t b[4];
                load_matrices(b, stage + key_place(8 * i + lane % 8, 2 * j + lane / 8));
                Product::multiply(score[i], q[j], b[0], b[1]);
                Product::multiply(score[i], q[j + 1], b[2], b[3]);
            }
        }
        const bool masked = position < all_from || position + KEYS - 1 > low;
        uint32_t weight[4][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float largest = max_score[h];
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float& v = score[i][2 * h + c];
                    if (masked) {
                        const int key = position + 8 * i + 2 * lane_quarter() + c;
                        if (key < from[h] || key > to[h]) v = -INFINITY;
                    }
                    largest = fmaxf(largest, v);
                }
            }
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            const float shrink = power((max_score[h] - largest) * factor), less = largest * factor;
            max_score[h] = largest;
            float total = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float a = power(score[i][2 * h] * factor - less), b = power(score[i][2 * h + 1] * factor - less);
                total += a + b;
                weight[i / 2][i % 2 * 2 + h] = Cached<C>::pack(a, b);
            }
            sum[h] = sum[h] * shrink + total;
#pragma unroll
            for (int i = 0; i < 8; i++) out[i][2 * h] *= shrink, out[i][2 * h + 1] *= shrink;
        }
#pragma unroll
        for (int j = 0; j < PAGES; j++) {
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                // Sixteen dimensions: both halves of the page's keys for eight of them, then for the others.
                uint32_t b[4];
                load_matrices(b, stage + value_place(j, 8 * i + lane / 16 * 8 + lane % 8, lane / 8 % 2));
                Product::multiply(out[i], weight[j], b[0], b[1]);
                Product::multiply(out[i + 1], weight[j], b[2], b[3]);
            }
        }
    }
    if (SPLIT && splits > 1 && !put_together(p, splits, factor, !idle, max_score, sum, reinterpret_cast<float (&)[32]>(out))) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        const int row = lane_row() + 8 * h, token = warp * per_warp + row / group, head = kv * group + row % group;
        if (token >= count) continue;
        // The sink is one more logit of the denominator, without a value.
        const float own = max_score[h] * factor, sink = p.sinks[head] * LOG2_E, largest = fmaxf(own, sink), shrink = exp2f(own - largest);
        const float inverse = shrink * Cached<C>::value_factor(p) / (sum[h] * shrink + exp2f(sink - largest));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t column = head * HEAD + 8 * i + 2 * lane_quarter();
            const float a = out[i][2 * h] * inverse, b = out[i][2 * h + 1] * inverse;
            // Neighbouring inputs lie side by side in either order.
            *(uint32_t*)(p.out + activation_place(p.out_stack, p.query_heads * HEAD, first + token, column))
                = activation(p.out_format, a) | activation(p.out_format, b) << 16;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) attend_many(const __grid_constant__ Attention p) { many<CACHE_BF16, false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) attend_many_e4m3(const __grid_constant__ Attention p) { many<CACHE_E4M3, false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) attend_many_split(const __grid_constant__ Attention p) { many<CACHE_BF16, true>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) attend_many_split_e4m3(const __grid_constant__ Attention p) { many<CACHE_E4M3, true>(p); }
