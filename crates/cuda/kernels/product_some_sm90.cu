// Dense products of BF16 weights with tens to hundreds of tokens on Hopper, where blocks must share the inputs. Each multiprocessor has one
// block: 128 rows, a share of the inputs, all tokens. One thread brings everything to shared memory by bulk copies, half of the block's
// weights before the kernel waits for the one before; eight warps multiply. Blocks with the same rows then exchange their sums through the
// second-level cache, as they lie in registers, and each finishes some of the tokens. What runs only once is in loops: code that lies in
// one line would come from far, and take longer than what it does.
#include "gemm_sm90.cuh"

struct Exchanged {
    Matrix matrix;
    const uint16_t* input;     // stacked
    Epilogue epilogue;         // QKV or RESIDUAL
    uint4* parts;              // by block: sums of eight tokens after eight tokens, 16 bytes of each thread
    uint32_t* arrivals;        // by 128 rows: zero at first; a launch leaves zero or the number of shares
    uint32_t n;                // tokens
    uint32_t stack;            // of the input
};
static_assert(sizeof(Exchanged) == 152);

constexpr int MAX_SHARES = 5, MAX_STAGES = 6;
constexpr int TILE_BYTES = 2048;              // of weights
constexpr int EIGHT_BYTES = THREADS * 16;     // a block's sums of eight tokens
constexpr int MAX_EIGHTS = 32;

// `HALVES` of up to 128 tokens: room for activations and for column tiles of weights, how many of these are on their way before the kernel
// waits (the first activations should not stand behind too many), and angles and places in the cache of the tokens that a block finishes.
// It leaves room for a block of the kernel before, without which nothing would be early.
template <int HALVES> struct Sizes {
    static constexpr int SLOTS = HALVES == 1 ? 9 : 6, EARLY = HALVES == 1 ? 8 : 5, SLOT_BYTES = ROW_TILES * TILE_BYTES;
    static constexpr int ACTIVATIONS = (HALVES == 1 ? 48 : 96) << 10, TOKENS = HALVES * 64;
    static constexpr int ROTARY = ACTIVATIONS + SLOTS * SLOT_BYTES, PLACES = ROTARY + TOKENS * HEAD * 4, BYTES = PLACES + TOKENS * 4;
};
static_assert(Sizes<1>::BYTES == 213248 && Sizes<2>::BYTES == 229888, "what the launch gives");

// A ring of places in shared memory, full when its bytes have arrived, empty again when all warps have said so.
struct Ring {
    uint32_t places, barriers; // addresses
    uint32_t bytes;            // of a place
    int count;
    __device__ __forceinline__ uint32_t place(int i) const { return places + i * bytes; }
    __device__ __forceinline__ uint32_t full(int i) const { return barriers + 16 * i; }
    __device__ __forceinline__ uint32_t empty(int i) const { return full(i) + 8; }
    __device__ __forceinline__ void init(int warps) const {
        for (int i = 0; i < count; i++) init_barrier(full(i), 1), init_barrier(empty(i), warps);
    }
};

// Where somebody is in a ring.
struct Place {
    int i = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next(const Ring& ring) {
        if (++i == ring.count) i = 0, parity ^= 1;
    }
};

// One warpgroup's sums over `count` column tiles. Weights come to registers while those of the column tile before are multiplied.
template <int N, int HALVES> __device__ __forceinline__ void consume(float (&d)[HALVES][64], const Ring& weights, const Ring& activations, int count) {
    const bool first_of_warp = threadIdx.x % WARP == 0;
    const uint32_t own = threadIdx.x / WARP * TILE_BYTES + threadIdx.x % WARP * 16;
    Place tile, stage;
    uint32_t a[2][4][4];
    auto load = [&](uint32_t (&to)[4][4]) {
        wait_barrier(weights.full(tile.i), tile.parity);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 v = load_shared(weights.place(tile.i) + own + j * WARP * 16);
            to[j][0] = v.x, to[j][1] = v.y, to[j][2] = v.z, to[j][3] = v.w;
        }
        fence_reads();
        __syncwarp();
        if (first_of_warp) arrive(weights.empty(tile.i));
        tile.next(weights);
    };
    int before = 0; // the stage of the column tile before
    auto step = [&](int k, uint32_t (&now)[4][4], uint32_t (&then)[4][4]) {
        wait_barrier(activations.full(stage.i), stage.parity);
        begin_products();
        const uint32_t b = descriptor_of(activations.place(stage.i));
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int half = 0; half < HALVES; half++) multiply<BF16, N>(d[half], now[j], descriptor(b, half * N * LINE + 32 * j));
        }
        commit_products();
        wait_for_products<1>();
        if (first_of_warp && k > 0) arrive(activations.empty(before));
        before = stage.i;
        stage.next(activations);
        if (k + 1 < count) load(then);
    };
    load(a[0]);
    for (int k = 0; k < count; k += 2) {
        step(k, a[0], a[1]);
        if (k + 1 < count) step(k + 1, a[1], a[0]);
    }
    wait_for_products<0>();
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

// `blockIdx.x`: 128 rows; `blockIdx.y`: a share of the inputs.
template <After KIND, int HALVES> __device__ __forceinline__ void product(const Exchanged& p) {
    using S = Sizes<HALVES>;
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ __align__(8) uint64_t barriers[2 * (S::SLOTS + MAX_STAGES)];
    const Matrix& m = p.matrix;
    Epilogue e = p.epilogue;
    e.kind = KIND; // the same, and the compiler should know
    const int column_tiles = m.cols / TILE_COLS, row_tiles = row_tiles_of(m), n = p.n, rank = blockIdx.y, ranks = gridDim.y;
    const int begin = column_tiles * rank / ranks, count = column_tiles * (rank + 1) / ranks - begin;
    // The same in all lanes, and the compiler should know.
    const int warp = __shfl_sync(~0u, threadIdx.x / WARP, 0), first_row = blockIdx.x * ROW_TILES, row_tile = first_row + warp;
    const int rows = min(ROW_TILES, (row_tiles - first_row + 3) / 4 * 4); // row tiles of warpgroups that have any
    const int width = (n + 16 * HALVES - 1) / (16 * HALVES) * 16;         // tokens of a half
    const uint32_t stage_bytes = HALVES * width * LINE;
    const Ring activations = {shared_address(shared), shared_address(barriers), stage_bytes, min(MAX_STAGES, int(S::ACTIVATIONS / stage_bytes))};
    const Ring weights = {activations.places + S::ACTIVATIONS, activations.barriers + 16 * MAX_STAGES, S::SLOT_BYTES, S::SLOTS};
    if (threadIdx.x == 0) {
        activations.init(rows), weights.init(rows);
        fence_barriers();
    }
    __syncthreads();
    if (warp >= ROW_TILES) {
        if (HALVES == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp > ROW_TILES || !elected()) return;
        const uint8_t* from = (const uint8_t*)m.weights + (size_t(first_row) * column_tiles + begin) * TILE_BYTES;
        Place tile, stage;
        int brought = 0;
        auto bring_weights = [&] {
            const uint32_t full = weights.full(tile.i);
            if (brought >= S::SLOTS) wait_barrier(weights.empty(tile.i), tile.parity ^ 1);
            expect_bytes(full, rows * TILE_BYTES);
            for (int r = 0; r < rows; r++) {
                // Of rows that are not there, others.
                const int row = min(r, row_tiles - 1 - first_row);
                copy_bulk(weights.place(tile.i) + r * TILE_BYTES, from + (size_t(row) * column_tiles + brought) * TILE_BYTES, TILE_BYTES, full);
            }
            tile.next(weights), brought++;
        };
        while (brought < min(count, S::EARLY)) bring_weights();
        wait_for_previous();
        start_next();
        for (int k = 0; k < count + activations.count; k++) {
            if (k < count) {
                const uint32_t full = activations.full(stage.i);
                if (k >= activations.count) wait_barrier(activations.empty(stage.i), stage.parity ^ 1);
                expect_bytes(full, stage_bytes);
                copy_bulk(activations.place(stage.i), p.input + size_t(begin + k) * p.stack * TILE_COLS, stage_bytes, full);
                stage.next(activations);
            }
            while (brought < min(count, k + 1 - activations.count + S::SLOTS)) bring_weights();
        }
        return;
    }
    if (HALVES == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const bool mine = warp < rows;
    wait_for_previous();
    start_next();
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
    float d[HALVES][64] = {};
#define WIDTH(N) \
    if (mine && width == N) consume<N, HALVES>(d, weights, activations, count);
    if constexpr (HALVES == 1) { WIDTH(16) WIDTH(32) WIDTH(48) WIDTH(64) }
    WIDTH(80) WIDTH(96) WIDTH(112) WIDTH(128)
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
    const int g = lane_row(), t = lane_quarter();
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

#define KERNEL(NAME, KIND, HALVES)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS + (HALVES == 1 ? WARP : 128), 1) NAME(const __grid_constant__ Exchanged p) { \
        product<KIND, HALVES>(p);                                                                                      \
    }
KERNEL(product_some_qkv_128, QKV, 1)
KERNEL(product_some_qkv_256, QKV, 2)
KERNEL(product_some_residual_128, RESIDUAL, 1)
KERNEL(product_some_residual_256, RESIDUAL, 2)
