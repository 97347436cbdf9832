// Dense products of BF16 weights with tens to hundreds of tokens on Hopper: each multiprocessor has one block, 128 rows at a time, all tokens.
// Where there are few rows, blocks share the inputs, exchange their sums through the second-level cache, as they lie in registers, and
// each finishes some of the tokens. Each warp brings its weights to shared memory by bulk copies, most of what there is room for before
// the kernel waits for the one before. What runs only once is in loops: code that lies in one line would come from far, and take longer
// than what it does.
#include "gemm_sm90.cuh"

struct Exchanged {
    Matrix matrix;
    const uint16_t* input;     // stacked
    Epilogue epilogue;
    uint4* parts;              // by block: sums of eight tokens after eight tokens, 16 bytes of each thread
    uint32_t* arrivals;        // by 128 rows: zero at first; a launch leaves zero or the number of shares
    uint32_t n;                // tokens
    uint32_t stack;            // of the input
    uint32_t early;            // tiles of weights of a warp that are asked for before the kernel waits: the first activations stand behind them
    uint32_t padding;
};
static_assert(sizeof(Exchanged) == 160);

constexpr int MAX_SHARES = 5, MAX_STAGES = 6;
constexpr int TILE_BYTES = 2048;              // of weights
constexpr int EIGHT_BYTES = THREADS * 16;     // a block's sums of eight tokens
constexpr int MAX_EIGHTS = 32;

// `HALVES` of up to 128 tokens: room for activations, tiles of weights of a warp, and angles and places in the cache of the tokens that a
// block finishes. It leaves room for a block of the kernel before, without which nothing would be early.
template <int HALVES> struct Sizes {
    static constexpr int ACTIVATIONS = (HALVES == 1 ? 48 : 96) << 10, SLOTS = HALVES == 1 ? 9 : 6, TOKENS = HALVES * 64;
    static constexpr int ROTARY = ACTIVATIONS + ROW_TILES * SLOTS * TILE_BYTES, PLACES = ROTARY + TOKENS * HEAD * 4, BYTES = PLACES + TOKENS * 4;
};
static_assert(Sizes<1>::BYTES == 213248 && Sizes<2>::BYTES == 229888, "what the launch gives");

// Where somebody is in a ring of places in shared memory.
struct Place {
    int i = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next(int count) {
        if (++i == count) i = 0, parity ^= 1;
    }
};

// Stages of 64 inputs of all tokens, again and again for all rows. A thread of the warpgroup that is the last to be done with a stage fills it
// again.
struct Activations {
    uint32_t stages, barriers; // addresses
    uint32_t* done;            // by stage: warpgroups that are done with it
    const uint16_t* from;      // the first column tile
    size_t step;               // to the next one
    uint32_t bytes;            // of a stage
    int count;                 // stages
    int column_tiles, all;     // of the inputs; of all rows together
    uint32_t groups;           // warpgroups that have rows
    Place place;
    __device__ __forceinline__ uint32_t stage() const { return stages + place.i * bytes; }
    __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
    __device__ __forceinline__ void fill(int stage, int number) const {
        if (number >= all) return;
        expect_bytes(full(stage), bytes);
        copy_bulk(stages + stage * bytes, from + number % column_tiles * step, bytes, full(stage));
    }
    // By one thread of each warpgroup, which is done with column tile `number`.
    __device__ __forceinline__ void leave(int stage, int number) const {
        uint32_t before;
        asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;" : "=r"(before) : "r"(shared_address(done + stage)), "r"(groups - 1) : "memory");
        if (before == groups - 1) fill(stage, number + count);
    }
};

// A warp's tiles of weights, all columns of a row tile after the other.
template <int SLOTS> struct Weights {
    uint32_t slots, barriers;  // addresses
    const uint8_t* from;       // the tile to be brought next
    size_t row_step;           // from the end of the columns to their beginning in the next row tile of this warp
    int column_tiles, column;  // of a row; of the tile to be brought next
    int left;                  // tiles to be brought
    uint64_t policy;
    Place place;
    // By one lane, in the order of the slots.
    __device__ __forceinline__ void fill(int slot) {
        if (left == 0) return;
        const uint32_t full = barriers + 8 * slot;
        expect_bytes(full, TILE_BYTES);
        copy_bulk(slots + slot * TILE_BYTES, from, TILE_BYTES, full, policy);
        from += TILE_BYTES, left--;
        if (++column == column_tiles) column = 0, from += row_step;
    }
    __device__ __forceinline__ void load(uint32_t (&to)[4][4]) {
        wait_barrier(barriers + 8 * place.i, place.parity);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 v = load_shared(slots + place.i * TILE_BYTES + (j * WARP + threadIdx.x % WARP) * 16);
            to[j][0] = v.x, to[j][1] = v.y, to[j][2] = v.z, to[j][3] = v.w;
        }
        fence_reads();
        __syncwarp();
        if (threadIdx.x % WARP == 0) fill(place.i);
        place.next(SLOTS);
    }
};

// One warpgroup's sums over all column tiles, of which the first is number `first`. Weights come to registers while those of the column
// tile before are multiplied.
template <int N, int HALVES, class W> __device__ __forceinline__ void consume(float (&d)[HALVES][64], W& weights, Activations& activations, int first) {
    const int count = activations.column_tiles;
    uint32_t a[2][4][4];
    // Here, not between the products, where the compiler would otherwise put some of it.
#pragma unroll
    for (int i = 0; i < HALVES * 64; i++) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i / 64][i % 64]));
    int before = 0; // the stage of the column tile before
    auto step = [&](int k, uint32_t (&now)[4][4], uint32_t (&then)[4][4]) {
        wait_barrier(activations.full(activations.place.i), activations.place.parity);
        begin_products();
        const uint32_t b = descriptor_of(activations.stage());
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int half = 0; half < HALVES; half++) multiply<BF16, N>(d[half], now[j], descriptor(b, half * N * LINE + 32 * j));
        }
        commit_products();
        wait_for_products<1>();
        if (threadIdx.x % 128 == 0 && k > 0) activations.leave(before, first + k - 1);
        before = activations.place.i;
        activations.place.next(activations.count);
        if (k + 1 < count) weights.load(then);
    };
    weights.load(a[0]);
    for (int k = 0; k < count; k += 2) {
        step(k, a[0], a[1]);
        if (k + 1 < count) step(k + 1, a[1], a[0]);
    }
    wait_for_products<0>();
    if (threadIdx.x % 128 == 0) activations.leave(before, first + count - 1);
}

// Where a warp's rows of a token go: query, or key or value in the cache.
struct Outputs {
    uint8_t* base;
    bool query, rotated, bytes; // `bytes`: E4M3
    uint32_t token_step;        // of a query; all in numbers, not bytes
    uint32_t block_step, step;  // of the cache
    uint32_t second;            // from the first number of a pair to the second
    float scale;
    __device__ __forceinline__ Outputs(const Epilogue& e, uint32_t row_tile, uint32_t row, uint32_t second_row) {
        const uint32_t head = row_tile / 4, kv = head - e.query_heads, first = row % HEAD;
        query = head < e.query_heads, rotated = kv < e.kv_heads || query, bytes = !query && e.out_format == CACHE_E4M3;
        const bool value = !rotated;
        token_step = e.query_heads * HEAD, block_step = e.kv_heads * BLOCK_TOKENS * HEAD, step = value ? 1 : HEAD;
        second = (second_row - row) * (value ? BLOCK_TOKENS : 1);
        scale = value ? e.alpha : e.limit;
        const uint32_t at = query ? head * HEAD + first : kv % e.kv_heads * (BLOCK_TOKENS * HEAD) + first * (value ? BLOCK_TOKENS : 1);
        base = (uint8_t*)(query ? e.out16 : value ? e.values : e.keys) + at * (bytes ? 1 : 2);
    }
    __device__ __forceinline__ void store(uint32_t token, uint32_t slot, const float* angle, float a, float b) const {
        if (rotated) {
            const float cos = angle[0], sin = angle[HEAD / 2], x = a;
            a = x * cos - b * sin, b = b * cos + x * sin;
        }
        const size_t at = query ? size_t(token) * token_step : size_t(slot / BLOCK_TOKENS) * block_step + slot % BLOCK_TOKENS * step;
        if (bytes) {
            base[at] = e4m3(a / scale), base[at + second] = e4m3(b / scale);
        } else {
            uint16_t* to = (uint16_t*)base + at;
            to[0] = activation(BF16, a), to[second] = activation(BF16, b);
        }
    }
};

// `blockIdx.x`: 128 rows, with STORE every `gridDim.x`; `blockIdx.y`: a share of the inputs.
template <After KIND, int HALVES> __device__ __forceinline__ void product(const Exchanged& p) {
    using S = Sizes<HALVES>;
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ __align__(8) uint64_t barriers[MAX_STAGES + ROW_TILES * S::SLOTS];
    __shared__ uint32_t done[MAX_STAGES];
    const Matrix& m = p.matrix;
    Epilogue e = p.epilogue;
    e.kind = KIND; // the same, and the compiler should know
    const int column_tiles = m.cols / TILE_COLS, row_tiles = row_tiles_of(m), n = p.n, rank = blockIdx.y, ranks = gridDim.y;
    const int begin = column_tiles * rank / ranks, count = column_tiles * (rank + 1) / ranks - begin;
    const int blocks = (row_tiles + ROW_TILES - 1) / ROW_TILES, rounds = KIND == STORE ? (blocks - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x) : 1;
    // The same in all lanes, and the compiler should know.
    const int warp = __shfl_sync(~0u, threadIdx.x / WARP, 0), row_tile = blockIdx.x * ROW_TILES + warp;
    const bool mine = row_tile / 4 * 4 < row_tiles;
    const int groups = min(GROUPS, (row_tiles - int(blockIdx.x) * ROW_TILES + 3) / 4);
    const int width = (n + 16 * HALVES - 1) / (16 * HALVES) * 16; // tokens of a half
    const uint32_t stage_bytes = HALVES * width * LINE, barrier = shared_address(barriers);
    Activations activations = {shared_address(shared), barrier, done, p.input + size_t(begin) * p.stack * TILE_COLS, size_t(p.stack) * TILE_COLS,
                               stage_bytes, min(MAX_STAGES, int(S::ACTIVATIONS / stage_bytes)), count, rounds * count, uint32_t(groups)};
    // Of rows that are not there, others.
    Weights<S::SLOTS> weights = {activations.stages + S::ACTIVATIONS + warp * S::SLOTS * TILE_BYTES, barrier + 8 * (MAX_STAGES + warp * S::SLOTS),
                                 (const uint8_t*)m.weights + (size_t(min(row_tile, row_tiles - 1)) * column_tiles + begin) * TILE_BYTES,
                                 (size_t(gridDim.x) * ROW_TILES * column_tiles - count) * TILE_BYTES, count, 0, rounds * count, read_once()};
    if (threadIdx.x < MAX_STAGES) init_barrier(activations.full(threadIdx.x), 1), done[threadIdx.x] = 0;
    if (threadIdx.x % WARP == 0 && mine) {
        for (int i = 0; i < S::SLOTS; i++) init_barrier(weights.barriers + 8 * i, 1);
        fence_barriers();
        for (int i = 0; i < p.early; i++) weights.fill(i);
    }
    fence_barriers();
    wait_for_previous();
    start_next();
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 0; i < activations.count; i++) activations.fill(i, i);
    if (threadIdx.x % WARP == 0 && mine)
        for (int i = p.early; i < S::SLOTS; i++) weights.fill(i);
    const int eights = (n + 7) / 8, first = eights * rank / ranks, own = eights * (rank + 1) / ranks - first; // that this block finishes
    float* rotary = (float*)(shared + S::ROTARY);
    uint32_t* places = (uint32_t*)(shared + S::PLACES);
    if (KIND == QKV) {
        const int tokens = min(8 * own, n - 8 * first);
        for (int i = threadIdx.x; i < tokens * (HEAD / 4); i += THREADS)
            copy_async(shared_address(rotary + 4 * i), e.rotary + size_t(first) * 8 * HEAD + 4 * i);
        commit_copies();
        if (threadIdx.x < tokens) places[threadIdx.x] = e.slots[8 * first + threadIdx.x];
    }
    const int g = lane_row(), t = lane_quarter();
#define WIDTH(N) \
    if (mine && width == N) consume<N, HALVES>(d, weights, activations, round * count);
#define WIDTHS                                                             \
    if constexpr (HALVES == 1) { WIDTH(16) WIDTH(32) WIDTH(48) WIDTH(64) } \
    WIDTH(80) WIDTH(96) WIDTH(112) WIDTH(128)
    if constexpr (KIND == STORE) {
        for (int round = 0; round < rounds; round++) {
            float d[HALVES][64];
            WIDTHS
            const int row = ((blockIdx.x + round * gridDim.x) * ROW_TILES + warp) * TILE_ROWS + g;
            float* out = e.out + row;
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
#pragma unroll
                for (int j = 0; j < 16; j++) {
                    if (8 * j >= width) break;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int token = half * width + 8 * j + 2 * t + i % 2;
                        if (token < n && row + i / 2 * 8 < int(m.rows)) out[size_t(token) * m.rows + i / 2 * 8] = d[half][4 * j + i];
                    }
                }
            }
        }
        return;
    }
    constexpr int round = 0;
    float d[HALVES][64];
    WIDTHS
    if (KIND == QKV) wait_for_copies<0>();
    // Now all stages have been read, and nothing more arrives in them.
    multipliers_barrier();
    uint8_t* sums = shared + threadIdx.x * 16; // those of all blocks that this one finishes
    uint8_t* parts = (uint8_t*)p.parts + size_t(blockIdx.x) * ranks * MAX_EIGHTS * EIGHT_BYTES + threadIdx.x * 16;
    if (mine) {
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const int before = half * width / 8;
            uint8_t* kept = sums + (rank * own + before - first) * EIGHT_BYTES;
            uint8_t* given = parts + (rank * MAX_EIGHTS + before) * EIGHT_BYTES;
#pragma unroll
            for (int j = 0; j < 16; j++) {
                if (8 * j >= width) break;
                const float4 v = make_float4(d[half][4 * j], d[half][4 * j + 1], d[half][4 * j + 2], d[half][4 * j + 3]);
                if (unsigned(before + j - first) < own) *(float4*)(kept + j * EIGHT_BYTES) = v;
                else __stcg((float4*)(given + j * EIGHT_BYTES), v);
            }
        }
    }
    multipliers_barrier();
    if (threadIdx.x == 0) {
        uint32_t* arrivals = p.arrivals + blockIdx.x;
        uint32_t before, now;
        __threadfence();
        asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrivals), "r"(2 * ranks - 1) : "memory");
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
        while (before / ranks == now / ranks);
    }
    multipliers_barrier();
    if (row_tile >= row_tiles) return;
    for (int r = 0; r < ranks; r++) {
        if (r == rank) continue;
        for (int i = 0; i < own; i++)
            copy_async(shared_address(sums) + (r * own + i) * EIGHT_BYTES, parts + (r * MAX_EIGHTS + first + i) * EIGHT_BYTES);
    }
    commit_copies();
    Affine affine;
    affine.load(e, m, 0, row_tile, g);
    const uint2 stored = stored_rows(e, row_tile, g);
    const Outputs outputs(e, row_tile, stored.x, stored.y);
    wait_for_copies<0>();
#pragma unroll 1
    for (int i = 0; i < own; i++) {
        // In the order of the shares, whoever adds them.
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < MAX_SHARES; r++) {
            if (r >= ranks) break;
            const float4 v = *(const float4*)(sums + (r * own + i) * EIGHT_BYTES);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int local = 8 * i + 2 * t + k, token = 8 * first + local;
            if (token >= n) break;
            const float a = (k ? sum.y : sum.x) * affine.scale + affine.a, b = (k ? sum.w : sum.z) * affine.scale + affine.b;
            if (KIND == QKV) {
                outputs.store(token, places[local], rotary + local * HEAD + stored.x % (HEAD / 2), a, b);
            } else {
                // Nobody else adds to it, and this way nobody waits for what was there.
                float* out = e.out + size_t(token) * m.rows;
                if (stored.x < m.rows) atomicAdd(out + stored.x, a);
                if (stored.y < m.rows) atomicAdd(out + stored.y, b);
            }
        }
    }
}

#define KERNEL(NAME, KIND, HALVES)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, KIND != STORE && HALVES == 1 ? 2 : 1) NAME(const __grid_constant__ Exchanged p) { product<KIND, HALVES>(p); }
KERNEL(product_some_qkv_128, QKV, 1)
KERNEL(product_some_qkv_256, QKV, 2)
KERNEL(product_some_residual_128, RESIDUAL, 1)
KERNEL(product_some_128, STORE, 1)
KERNEL(product_some_256, STORE, 2)
