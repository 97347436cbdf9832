// Products of packed weights with many tokens on Hopper: 128 rows by up to 128 tokens a block, two blocks a multiprocessor. Each warp
// brings the weights of its own rows to shared memory by bulk copies that run ahead, decodes them to registers, and they enter the
// warpgroup's product as its first operand, while the product of the inputs before is still at work. Activations, stacked (see
// `activation_place`), come in one bulk copy per 64 inputs. What a warp has to do for 64 inputs, not the tensor cores, would be the
// limit otherwise: the loop has nothing in it that can be known before.
#include "gemm_sm90.cuh"

constexpr int TOKENS = 128;

// Stages of 64 inputs of activations; slots of weights, `CHUNK` column tiles each. All that two blocks have room for beside each other.
template <Format F> struct Sizes {
    static constexpr int STAGES = 4, STAGE_BYTES = TOKENS * LINE;
    static constexpr int CHUNK = F == FP4 ? 4 : 1, SLOTS = F == FP4 ? 2 : 3;
    static constexpr int TILE_BYTES = 16 * Tile<F>::VECTORS, SCALE_BYTES = F == FP4 ? WARP * 2 : 0;
    static constexpr int SCALES = CHUNK * TILE_BYTES, SLOT_BYTES = SCALES + CHUNK * SCALE_BYTES;
    static constexpr int WEIGHTS = STAGES * STAGE_BYTES, BARRIERS = WEIGHTS + ROW_TILES * SLOTS * SLOT_BYTES;
    static constexpr int BYTES = BARRIERS + (2 * STAGES + ROW_TILES * SLOTS) * 8;
};
static_assert(Sizes<FP4>::BYTES == 102592 && Sizes<BF16>::BYTES == 114944, "what the launch gives");

// The activations of a block. A stage is full when its bytes have arrived, and empty again when a thread of each warpgroup has said so.
template <Format F> struct Activations {
    using S = Sizes<F>;
    uint32_t base;          // address of all shared memory
    const uint16_t* from;   // the block's rows of the first column tile
    uint32_t stack;
    int groups;             // warpgroups that have rows
    int width;              // tokens of a stage
    __device__ __forceinline__ uint32_t stage(int i) const { return base + i * S::STAGE_BYTES; }
    __device__ __forceinline__ uint32_t full(int i) const { return base + S::BARRIERS + 8 * i; }
    __device__ __forceinline__ uint32_t empty(int i) const { return full(S::STAGES + i); }
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < S::STAGES; i++) init_barrier(full(i), 1), init_barrier(empty(i), groups);
        fence_barriers();
    }
    __device__ __forceinline__ void fill(int i, int column_tile) const {
        expect_bytes(full(i), width * LINE);
        copy_bulk(stage(i), from + size_t(column_tile) * stack * TILE_COLS, width * LINE, full(i));
    }
};

// A warp's own weights.
template <Format F> struct Weights {
    using S = Sizes<F>;
    uint32_t slots, barriers; // addresses
    const Matrix& matrix;
    uint32_t first_tile;      // of the row tile
    int column_tiles;
    __device__ __forceinline__ uint32_t slot(int i) const { return slots + i * S::SLOT_BYTES; }
    __device__ __forceinline__ uint32_t full(int i) const { return barriers + 8 * i; }
    __device__ __forceinline__ void init() const {
        if (threadIdx.x % WARP == 0)
            for (int i = 0; i < S::SLOTS; i++) init_barrier(full(i), 1);
        fence_barriers();
        __syncwarp();
    }
    __device__ __forceinline__ void start(uint32_t first) {
        first_tile = first;
        if (threadIdx.x % WARP == 0)
            for (int i = 0; i < S::SLOTS; i++) fill(i, i * S::CHUNK);
    }
    // By one lane.
    __device__ __forceinline__ void fill(int i, int column_tile) const {
        const int count = min(S::CHUNK, column_tiles - column_tile);
        if (count <= 0) return;
        expect_bytes(full(i), count * (S::TILE_BYTES + S::SCALE_BYTES));
        const size_t tile = first_tile + column_tile;
        copy_bulk(slot(i), matrix.weights + tile * Tile<F>::VECTORS, count * S::TILE_BYTES, full(i));
        if (F == FP4) copy_bulk(slot(i) + S::SCALES, matrix.scales + tile * WARP, count * S::SCALE_BYTES, full(i));
    }
};

// One warpgroup's sums over all column tiles.
template <Format F, int N>
__device__ __forceinline__ void multiply_all(float (&d)[TOKENS / 2], const Weights<F>& weights, const Activations<F>& activations) {
    using S = Sizes<F>;
    constexpr int STAGES = S::STAGES;
    const int warp = threadIdx.x / WARP, column_tiles = weights.column_tiles;
    const bool first_of_warp = threadIdx.x % WARP == 0, first_of_group = threadIdx.x % 128 == 0;
    int slot = 0;
    uint32_t slot_parity = 0, parity = 0, a[2][4][4];
    Tile<FP4> tile;
    // The weights of a column tile, number `i` of its chunk: FP4 as they are, since their places are still in use by products.
    auto load = [&](int i, uint32_t (&to)[4][4]) {
        if (i == 0) wait_barrier(weights.full(slot), slot_parity);
        const uint32_t from = weights.slot(slot) + i * S::TILE_BYTES;
        if constexpr (F == FP4) {
            tile = load_tile(from, weights.slot(slot) + S::SCALES + i * S::SCALE_BYTES);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint4 v = load_shared(from + (j * WARP + threadIdx.x % WARP) * 16);
                to[j][0] = v.x, to[j][1] = v.y, to[j][2] = v.z, to[j][3] = v.w;
            }
        }
    };
    // What becomes of column tile `k` after that.
    auto use = [&](int k, int i, uint32_t (&to)[4][4]) {
        if constexpr (F == FP4) decode(tile, to);
        if (i + 1 < S::CHUNK) return;
        fence_reads();
        __syncwarp();
        if (first_of_warp) weights.fill(slot, k + 1 + (S::SLOTS - 1) * S::CHUNK);
        if (++slot == S::SLOTS) slot = 0, slot_parity ^= 1;
    };
    // Column tile `k`, of stage `i`, and the weights of the one after it, if there is one.
    auto step = [&](int k, int i, bool next, uint32_t (&now)[4][4], uint32_t (&then)[4][4]) {

        wait_barrier(activations.full(i), parity);
        begin_products();
        const uint32_t b = descriptor_of(activations.stage(i));
#pragma unroll
        for (int j = 0; j < 4; j++) multiply<F, N>(d, now[j], descriptor(b, 32 * j));
        commit_products();
        // Those of the column tile before are done: its stage and the places of its weights are free.
        wait_for_products<1>();
        if (first_of_group && k > 0) arrive(activations.empty((i + STAGES - 1) % STAGES));
        if (next) load((i + 1) % S::CHUNK, then);
        if (next) use(k + 1, (i + 1) % S::CHUNK, then);
        // The other warpgroup should be done with the one before that, too. The warps that have rows take turns.
        if (warp == i * ROW_TILES / STAGES % (4 * activations.groups) && k >= 2 && k - 2 + STAGES < column_tiles) {
            wait_barrier(activations.empty((i + 2) % STAGES), i < 2 ? parity ^ 1 : parity);
            if (first_of_warp) activations.fill((i + 2) % STAGES, k - 2 + STAGES);
        }
    };
    load(0, a[0]);
    use(0, 0, a[0]);
    int k = 0;
    for (; k + STAGES < column_tiles; k += STAGES, parity ^= 1) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) step(k + i, i, true, a[i % 2], a[(i + 1) % 2]);
    }
#pragma unroll
    for (int i = 0; i < STAGES; i++)
        if (k + i < column_tiles) step(k + i, i, k + i + 1 < column_tiles, a[i % 2], a[(i + 1) % 2]);
    wait_for_products<0>();
}

// `blockIdx.x`: 128 rows; `blockIdx.z`: tokens; or the other way round.
template <Format F, bool EXPERTS> __device__ __forceinline__ void gemm(const Gemm& p) {
    using S = Sizes<F>;
    extern __shared__ __align__(1024) uint8_t shared[];
    const Matrix& m = p.matrix;
    const int column_tiles = m.cols / TILE_COLS, row_tiles = (m.rows + TILE_ROWS - 1) / TILE_ROWS;
    // The same in all lanes, and the compiler should know.
    const bool tokens_first = !EXPERTS && p.tokens_first;
    const uint32_t rows_at = tokens_first ? blockIdx.z : blockIdx.x, tokens_at = tokens_first ? blockIdx.x : blockIdx.z;
    const int warp = __shfl_sync(~0u, threadIdx.x / WARP, 0), row_tile = rows_at * ROW_TILES + warp;
    const bool mine = row_tile / 4 * 4 < row_tiles;
    const int groups = min(GROUPS, (row_tiles - int(rows_at) * ROW_TILES + 3) / 4);
    Activations<F> activations = {shared_address(shared), nullptr, p.stack, groups, 0};
    if (threadIdx.x == 0) activations.init();
    Weights<F> weights = {activations.base + S::WEIGHTS + warp * S::SLOTS * S::SLOT_BYTES,
                          activations.base + S::BARRIERS + (2 * S::STAGES + warp * S::SLOTS) * 8, m, 0, column_tiles};
    weights.init();
    const uint32_t first_tile = (row_tile < row_tiles ? row_tile : 0) * column_tiles;
    if (!EXPERTS && mine) weights.start(first_tile);
    wait_for_previous();
    start_next();
    Work work = {0, tokens_at * p.tile, 0};
    if constexpr (EXPERTS) {
        if (!find<TOKENS>(work, Routes(p.list, p.experts, p.n * p.experts_per_token), tokens_at)) return;
        if (mine) weights.start(work.expert * row_tiles * column_tiles + first_tile);
    } else {
        work.n = min(p.n - work.first, p.tile);
    }
    activations.width = (work.n + 15) / 16 * 16;
    activations.from = p.input + size_t(work.first) * TILE_COLS;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 0; i < min(S::STAGES, column_tiles); i++) activations.fill(i, i);

    float d[TOKENS / 2] = {};
#define WIDTH(N) \
    if (mine && activations.width == N) multiply_all<F, N>(d, weights, activations);
    WIDTH(16) WIDTH(32) WIDTH(48) WIDTH(64) WIDTH(80) WIDTH(96) WIDTH(112) WIDTH(128)
    finish_sums<TOKENS>(d, p, work, row_tile, row_tiles, shared);
}

#define KERNEL(NAME, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(const __grid_constant__ Gemm p) { __VA_ARGS__(p); }
KERNEL(gemm_bf16, gemm<BF16, false>)
KERNEL(gemm_fp4, gemm<FP4, false>)
KERNEL(gemm_experts_bf16, gemm<BF16, true>)
KERNEL(gemm_experts_fp4, gemm<FP4, true>)
