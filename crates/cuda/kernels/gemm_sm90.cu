// Products of packed weights on Hopper where gemm_many_sm90.cu has too few blocks, so that several share the inputs, or where an expert
// has few tokens, so that weights are read further ahead. Each warp brings the tiles of its own rows to shared memory by bulk
// copies that run ahead (registers would not do: a warp has too few scoreboards to wait for the oldest of many loads), decodes
// them to registers, and they enter the warpgroup's tensor core instruction as its first operand. Activations, stacked (see
// `activation_place`), come to shared memory in one bulk copy per 64 inputs.
#include "gemm_sm90.cuh"

constexpr int MAX_CLUSTER = 4; // blocks

// Column tiles of weights that a warp brings at a time, and how many such chunks it has room for; stages of activations. All that
// two blocks have room for beside each other.
template <Format F, int TOKENS> struct Sizes {
    static constexpr int CHUNK = F == FP4 ? 4 : 1, SLOTS = F == FP4 && TOKENS == 128 ? 2 : 3;
    static constexpr int STAGES = TOKENS == 64 ? 6 : F == FP4 ? 4 : 3, STAGE_BYTES = TOKENS * LINE;
    static constexpr int SCALES = CHUNK * 16 * Tile<F>::VECTORS, SLOT_BYTES = SCALES + (F == FP4 ? CHUNK * 64 : 0);
    static constexpr int WEIGHTS = STAGES * STAGE_BYTES, BYTES = WEIGHTS + ROW_TILES * SLOTS * SLOT_BYTES;
};

// The ring of activations in shared memory. A stage is filled by the first thread, and again by a thread of the warpgroup that is the
// last to be done with it.
template <class S> struct Ring {
    uint32_t stages, barriers; // addresses
    uint32_t* done;            // by stage: warpgroups that are done with it
    const uint16_t* from;      // this block's rows of the first column tile
    uint32_t stack;
    int width;                 // tokens of a stage
    __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < S::STAGES; i++) init_barrier(full(i), 1), done[i] = 0;
    }
    __device__ __forceinline__ void fill(int stage, int column_tile) const {
        expect_bytes(full(stage), width * LINE);
        copy_bulk(stages + stage * S::STAGE_BYTES, from + size_t(column_tile) * stack * TILE_COLS, width * LINE, full(stage));
    }
    // By one thread of each warpgroup, which is done with column tile `k`.
    __device__ __forceinline__ void leave(int stage, int k, int end) const {
        uint32_t before;
        asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;" : "=r"(before) : "r"(shared_address(done + stage)), "n"(GROUPS - 1) : "memory");
        if (before == GROUPS - 1 && k + S::STAGES < end) fill(stage, k + S::STAGES);
    }
};

// A warp's own ring of weights.
template <Format F, class S> struct Weights {
    uint32_t slots, barriers; // addresses
    const uint4* weights;     // of the row tile
    const uint16_t* scales;
    int begin, end;           // column tiles
    __device__ __forceinline__ void init() const {
        if (threadIdx.x % WARP == 0)
            for (int i = 0; i < S::SLOTS; i++) init_barrier(barriers + 8 * i, 1);
        fence_barriers();
        __syncwarp();
    }
    __device__ __forceinline__ void start(const Matrix& m, size_t first_tile) {
        weights = m.weights + first_tile * Tile<F>::VECTORS, scales = m.scales + first_tile * WARP;
        if (threadIdx.x % WARP == 0)
            for (int i = 0; i < S::SLOTS; i++) fill(i, begin + i * S::CHUNK);
    }
    // By one lane.
    __device__ __forceinline__ void fill(int slot, int column_tile) const {
        const int count = min(S::CHUNK, end - column_tile);
        if (count <= 0) return;
        const uint32_t to = slots + slot * S::SLOT_BYTES, full = barriers + 8 * slot, bytes = count * 16 * Tile<F>::VECTORS;
        expect_bytes(full, bytes + (F == FP4 ? count * 64 : 0));
        copy_bulk(to, weights + size_t(column_tile) * Tile<F>::VECTORS, bytes, full);
        if (F == FP4) copy_bulk(to + S::SCALES, scales + size_t(column_tile) * WARP, count * 64, full);
    }
    // Tile `i` of a slot as the first operands of four products.
    __device__ __forceinline__ void decode(int slot, int i, uint32_t (&a)[4][4]) const {
        const uint32_t from = slots + slot * S::SLOT_BYTES + i * 16 * Tile<F>::VECTORS;
        if constexpr (F == BF16) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint4 v = load_shared(from + (j * WARP + threadIdx.x % WARP) * 16);
                a[j][0] = v.x, a[j][1] = v.y, a[j][2] = v.z, a[j][3] = v.w;
            }
        } else {
            decode_shared(from, slots + slot * S::SLOT_BYTES + S::SCALES + i * 64, a);
        }
    }
};

// One warpgroup's sums over all column tiles.
template <Format F, int N, int TOKENS, class S>
__device__ __forceinline__ void consume(float (&d)[TOKENS / 2], const Weights<F, S>& weights, const Ring<S>& ring) {
    const int begin = weights.begin, end = weights.end;
    int stage = 0;
    uint32_t parity = 0;
    int slot = 0; // of the weights to be decoded next
    uint32_t slot_parity = 0;
    uint32_t a[2][4][4];
    // `i`: place of the column tile in its chunk.
    auto decode = [&](int k, int i, uint32_t (&a)[4][4]) {
        if (i == 0) wait_barrier(weights.barriers + 8 * slot, slot_parity);
        weights.decode(slot, i, a);
        if (i + 1 < S::CHUNK) return;
        fence_reads();
        __syncwarp();
        if (threadIdx.x % WARP == 0) weights.fill(slot, k + 1 + (S::SLOTS - 1) * S::CHUNK);
        __syncwarp();
        if (++slot == S::SLOTS) slot = 0, slot_parity ^= 1;
    };
    // The products of a column tile begin before those of the one before it are done: the tensor cores never wait for a warpgroup.
    auto step = [&](int k, int next, uint32_t (&now)[4][4], uint32_t (&then)[4][4]) {
        wait_barrier(ring.full(stage), parity);
        begin_products();
        const uint32_t b = descriptor_of(ring.stages + stage * S::STAGE_BYTES);
#pragma unroll
        for (int j = 0; j < 4; j++) multiply<F, N>(d, now[j], descriptor(b, 32 * j));
        commit_products();
        wait_for_products<1>();
        if (threadIdx.x % 128 == 0 && k > begin) ring.leave(stage == 0 ? S::STAGES - 1 : stage - 1, k - 1, end);
        if (k + 1 < end) decode(k + 1, next, then);
        if (++stage == S::STAGES) stage = 0, parity ^= 1;
    };
    decode(begin, 0, a[0]);
    constexpr int UNROLL = S::CHUNK == 1 ? 2 : S::CHUNK;
    for (int k = begin; k < end; k += UNROLL) {
#pragma unroll
        for (int i = 0; i < UNROLL; i++)
            if (k + i < end) step(k + i, (i + 1) % S::CHUNK, a[i % 2], a[(i + 1) % 2]);
    }
    wait_for_products<0>();
}

// What a warpgroup without rows does: its first warp takes part in the ring. The others could fall behind by as many columns as
// there are stages, twice, and then wait for a parity that comes no more.
template <class S> __device__ __forceinline__ void watch(int begin, int end, const Ring<S>& ring) {
    if (threadIdx.x % 128 >= WARP) return;
    int stage = 0;
    uint32_t parity = 0;
    for (int k = begin; k < end; k++) {
        wait_barrier(ring.full(stage), parity);
        if (threadIdx.x % 128 == 0) ring.leave(stage, k, end);
        if (++stage == S::STAGES) stage = 0, parity ^= 1;
    }
}

// `blockIdx.x`: 128 rows; `blockIdx.z`: tokens. With `SPLIT` the blocks of a cluster (`blockIdx.y`) share the inputs and put their
// sums together.
template <Format F, int TOKENS, bool EXPERTS, bool SPLIT> __device__ __forceinline__ void gemm(const Gemm& p) {
    using S = Sizes<F, TOKENS>;
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ __align__(8) uint64_t barriers[S::STAGES + ROW_TILES * S::SLOTS];
    uint8_t* base = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const Matrix& m = p.matrix;
    const int column_tiles = m.cols / TILE_COLS, row_tiles = (m.rows + TILE_ROWS - 1) / TILE_ROWS;
    const int row_tile = blockIdx.x * ROW_TILES + threadIdx.x / WARP;
    // The same in all lanes, and the compiler should know.
    const bool mine = __shfl_sync(~0u, row_tile / 4 * 4 < row_tiles, 0);
    __shared__ uint32_t done[S::STAGES];
    Ring<S> ring = {shared_address(base), shared_address(barriers), done, nullptr, p.stack, 0};
    if (threadIdx.x == 0) ring.init();
    const int warp = threadIdx.x / WARP;
    Weights<F, S> weights = {ring.stages + S::WEIGHTS + warp * S::SLOTS * S::SLOT_BYTES, ring.barriers + 8 * (S::STAGES + warp * S::SLOTS)};
    weights.init();
    Work work = {0, blockIdx.z * p.tile, 0};
    weights.begin = 0, weights.end = column_tiles;
    if (SPLIT) {
        weights.begin = column_tiles * cluster_rank() / cluster_size();
        weights.end = column_tiles * (cluster_rank() + 1) / cluster_size();
    }
    const size_t first_tile = size_t(row_tile < row_tiles ? row_tile : 0) * column_tiles;
    if (!EXPERTS && mine) weights.start(m, first_tile);
    wait_for_previous();
    start_next();
    if constexpr (EXPERTS) {
        if (!find<TOKENS>(work, Routes(p.list, p.experts, p.n * p.experts_per_token), blockIdx.z)) return;
    } else {
        work.n = min(p.n - work.first, p.tile);
    }
    if (EXPERTS && mine) weights.start(m, size_t(work.expert) * row_tiles * column_tiles + first_tile);
    ring.width = (work.n + 15) / 16 * 16;
    ring.from = p.input + size_t(work.first) * TILE_COLS;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 0; i < min(S::STAGES, weights.end - weights.begin); i++) ring.fill(i, weights.begin + i);

    float d[TOKENS / 2] = {};
    if (!mine) watch(weights.begin, weights.end, ring);
#define WIDTH(N)                                                                                                          \
    if constexpr (N <= TOKENS)                                                                                            \
        if (mine && ring.width == N) consume<F, N, TOKENS>(d, weights, ring);
    WIDTH(16) WIDTH(32) WIDTH(48) WIDTH(64) WIDTH(80) WIDTH(96) WIDTH(112) WIDTH(128)
    if constexpr (!SPLIT) {
        finish_sums<TOKENS>(d, p, work, row_tile, row_tiles, base);
    } else {
        // The sums of the blocks, in their order, each of which finishes some of the tokens.
        constexpr int STRIDE = ROW_TILES * TILE_ROWS + 4;
        static_assert(TOKENS * STRIDE * 4 <= S::BYTES);
        float* sums = (float*)base; // [TOKENS][STRIDE]
        __syncthreads();
        const int g = lane_row(), t = lane_quarter();
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            if (8 * j >= work.n) break;
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[(8 * j + 2 * t + i % 2) * STRIDE + threadIdx.x / WARP * TILE_ROWS + g + i / 2 * 8] = d[4 * j + i];
        }
        cluster_barrier();
        const int finished = blockIdx.x * ROW_TILES + threadIdx.x / 8 % ROW_TILES, pair = threadIdx.x % 8;
        if (finished < row_tiles) {
            Affine affine;
            affine.load(p.epilogue, m, work.expert, finished, pair);
            const Epilogue& e = p.epilogue;
            const int at_once = THREADS / (ROW_TILES * 8), ranks = cluster_size(), step = ranks * at_once;
            const uint2 rows = stored_rows(e, finished, pair);
            // All reads of several tokens in flight together: each comes from far.
            constexpr int TOGETHER = 4;
            float parts[TOGETHER][2][MAX_CLUSTER];
            float2 old[TOGETHER];
            Rotation rotations[TOGETHER];
            for (int first = cluster_rank() * at_once + threadIdx.x / (ROW_TILES * 8); first < work.n; first += TOGETHER * step) {
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    const int column = first + i * step;
                    if (column >= work.n) break;
                    const float* own = sums + column * STRIDE + threadIdx.x / 8 % ROW_TILES * TILE_ROWS + pair;
#pragma unroll
                    for (int rank = 0; rank < MAX_CLUSTER; rank++) {
                        parts[i][0][rank] = rank < ranks ? read_of_cluster(own, rank) : 0;
                        parts[i][1][rank] = rank < ranks ? read_of_cluster(own + 8, rank) : 0;
                    }
                    if (e.kind == QKV) rotations[i].load(e, finished, pair, work.first + column);
                    if (e.kind != RESIDUAL) continue;
                    const float* out = e.out + size_t(work.first + column) * m.rows;
                    old[i] = make_float2(rows.x < m.rows ? out[rows.x] : 0.f, rows.y < m.rows ? out[rows.y] : 0.f);
                }
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    const int column = first + i * step;
                    if (column >= work.n) break;
                    float a = 0, b = 0;
#pragma unroll
                    for (int rank = 0; rank < MAX_CLUSTER; rank++) a += parts[i][0][rank], b += parts[i][1][rank];
                    if (e.kind == RESIDUAL) {
                        float* out = e.out + size_t(work.first + column) * m.rows;
                        if (rows.x < m.rows) out[rows.x] = old[i].x + affine.first(a);
                        if (rows.y < m.rows) out[rows.y] = old[i].y + affine.second(b);
                    } else {
                        finish(e, m, affine, finished, pair, work.first + column, a, b, rotations[i]);
                    }
                }
            }
        }
        // A block stays until its sums are read; nobody waits for what was written.
        asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
    }
}

#define KERNEL(NAME, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(const __grid_constant__ Gemm p) { __VA_ARGS__(p); }
KERNEL(gemm_bf16_split, gemm<BF16, 128, false, true>)
KERNEL(gemm_fp4_split, gemm<FP4, 128, false, true>)
KERNEL(gemm_experts_bf16_few, gemm<BF16, 64, true, false>)
KERNEL(gemm_experts_fp4_few, gemm<FP4, 64, true, false>)
