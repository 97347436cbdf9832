// Products of packed weights with many tokens on every generation (on Hopper gemm_many_sm90.cu is faster): 128 rows by TOKENS tokens a
// block. Four pairs of warps have 32 rows each, a warp of a pair every other eight tokens. Weights go straight to registers, where those
// of the next 64 inputs are on their way while those of these are decoded; activations come to shared memory, some 64 inputs ahead.
#include "product.cuh"

constexpr int THREADS = 256, ROW_TILES = 8;
constexpr int OWN = 2;                  // row tiles of a warp
constexpr int STAGES = 3;               // of 64 inputs each
constexpr int LINE = TILE_COLS * 2;     // bytes of a row of activations in shared memory

// The activations of a block: lines whose pieces of 16 bytes are exchanged by the line's number modulo 8, so that eight lanes that read
// two of every other line's pieces find them in different banks.
template <int TOKENS> struct Activations {
    static constexpr int EACH = TOKENS * 8 / THREADS; // pieces that a thread brings of a stage
    const uint16_t* from[EACH];
    uint32_t to;                // address of the thread's first piece in the first stage
    int lines;
    // `row(token)` is its row of the input.
    template <class Row> __device__ __forceinline__ Activations(const Product& p, uint32_t shared, int n, Row row) {
        const int line = threadIdx.x / 8, piece = threadIdx.x % 8;
        to = shared + line * LINE + (piece ^ line % 8) * 16;
        lines = (n + 7) / 8 * 8;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            from[i] = (const uint16_t*)p.input + size_t(row(min(line + i * (THREADS / 8), n - 1))) * p.matrix.cols + piece * 8;
    }
    __device__ __forceinline__ void bring(int k, int column_tiles) const {
        if (k < column_tiles) {
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (int(threadIdx.x / 8) + i * (THREADS / 8) < lines)
                    copy_async(to + (k % STAGES * TOKENS + i * (THREADS / 8)) * LINE, from[i] + k * TILE_COLS);
        }
        commit_copies();
    }
};

// `blockIdx.x`: 128 rows; `blockIdx.y`: tokens, of experts one after the other.
template <Format F, int TOKENS> __device__ __forceinline__ void gemm(const Product& p) {
    constexpr int NT = TOKENS / 16; // eights of tokens of a warp
    extern __shared__ __align__(128) uint8_t shared[]; // [STAGES][TOKENS] lines, later sums
    const Matrix& m = p.matrix;
    const Epilogue& e = p.epilogue;
    const int column_tiles = m.cols / TILE_COLS, row_tiles = row_tiles_of(m);
    const int first_row_tile = blockIdx.x * ROW_TILES + threadIdx.x / WARP / 2 * OWN, half = threadIdx.x / WARP % 2;
    const int g = lane_row(), t = lane_quarter();
    wait_for_previous();
    start_next();
    Work work = {0, blockIdx.y * TOKENS, 0};
    const Routes routes(p.list, p.experts, p.n * p.experts_per_token);
    if (p.list) {
        if (!find<TOKENS>(work, routes, blockIdx.y)) return;
    } else {
        work.n = min(p.n - work.first, uint32_t(TOKENS));
    }
    const bool by_pair = p.list && e.kind == SWIGLU;
    const Activations<TOKENS> activations(p, shared_address(shared), work.n, [&](int token) {
        return by_pair ? routes.pair(work.first + token) / p.experts_per_token : work.first + token;
    });
#pragma unroll
    for (int k = 0; k < STAGES - 1; k++) activations.bring(k, column_tiles);

    // Rows beyond the last are computed with its tile's weights and not kept.
    auto pointer = [&](int r) {
        return Pointer<F>(m, (size_t(work.expert) * row_tiles + min(first_row_tile + r, row_tiles - 1)) * column_tiles);
    };
    Pointer<F> weights[OWN] = {pointer(0), pointer(1)};
    Tile<F> tiles[OWN];
#pragma unroll
    for (int r = 0; r < OWN; r++) tiles[r].load_again(weights[r], 0);
    float sum[OWN][NT][4] = {};
    for (int k = 0; k < column_tiles; k++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        activations.bring(k + STAGES - 1, column_tiles);
        uint32_t scale[OWN][2];
#pragma unroll
        for (int r = 0; r < OWN; r++) tiles[r].scale(scale[r]);
        const uint32_t line = shared_address(shared) + (k % STAGES * TOKENS + 8 * half + g) * LINE;
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            uint32_t a[2][OWN][4];
#pragma unroll
            for (int r = 0; r < OWN; r++) {
                tiles[r].fragment(2 * pair, scale[r], a[0][r]);
                tiles[r].fragment(2 * pair + 1, scale[r], a[1][r]);
                if (k + 1 < column_tiles) tiles[r].follow(weights[r], k + 1, pair);
            }
#pragma unroll
            for (int c = 0; c < NT; c++) {
                if (8 * (2 * c + half) >= work.n) break;
                const uint4 b = load_shared(line + 16 * c * LINE + ((2 * t + pair ^ g) * 16));
#pragma unroll
                for (int r = 0; r < OWN; r++) Number<F>::multiply(sum[r][c], a[0][r], b.x, b.y);
#pragma unroll
                for (int r = 0; r < OWN; r++) Number<F>::multiply(sum[r][c], a[1][r], b.z, b.w);
            }
        }
    }
    // Through shared memory, 64 tokens at a time, so that neighbouring threads have neighbouring rows.
    constexpr int STRIDE = ROW_TILES * TILE_ROWS + 4;
    float* sums = (float*)shared; // [64][STRIDE]
    const int row_tile = blockIdx.x * ROW_TILES + threadIdx.x / 8 % ROW_TILES, row_pair = threadIdx.x % 8;
    Affine affine = {0, 0, 0};
    if (row_tile < row_tiles) affine.load(e, m, work.expert, row_tile, row_pair);
#pragma unroll
    for (int first = 0; first < TOKENS; first += 64) {
        if (first >= work.n) break;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < OWN; r++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    sums[(16 * c + 8 * half + 2 * t + i % 2) * STRIDE + (threadIdx.x / WARP / 2 * OWN + r) * TILE_ROWS + g + i / 2 * 8]
                        = sum[r][first / 16 + c][i];
            }
        }
        __syncthreads();
        if (row_tile >= row_tiles) continue;
        for (int token = threadIdx.x / 64; token < min(work.n - first, 64); token += THREADS / 64) {
            const float* own = sums + token * STRIDE + threadIdx.x / 8 % ROW_TILES * TILE_ROWS + row_pair;
            finish(e, m, affine, row_tile, row_pair, work.first + first + token, own[0], own[8]);
        }
    }
}

#define KERNEL(NAME, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(const __grid_constant__ Product p) { __VA_ARGS__(p); }
// With 128 tokens BF16 weights would have too few registers to be on their way ahead.
KERNEL(gemm_many_bf16_64, gemm<BF16, 64>)
KERNEL(gemm_many_fp4_64, gemm<FP4, 64>)
KERNEL(gemm_many_fp4_128, gemm<FP4, 128>)
