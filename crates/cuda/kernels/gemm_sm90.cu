// Products of packed weights with many tokens on Hopper: weights go from memory to registers, are decoded there and enter the
// warpgroup's tensor core instruction as its first operand; activations come through shared memory.
#include "common.cuh"

#include "epilogue.cuh"

struct Gemm {
    Matrix matrix;
    const uint16_t* input;     // [n, cols], in tiled order
    const uint32_t* list;      // experts: see `Routes`
    Epilogue epilogue;
    uint32_t n;                // tokens
    uint32_t experts, experts_per_token;
    uint32_t padding;
};
static_assert(sizeof(Gemm) == sizeof(Matrix) + sizeof(Epilogue) + 32);

constexpr int GROUPS = 2;                     // warpgroups of 64 rows
constexpr int THREADS = GROUPS * 128;
constexpr int ROW_TILES = GROUPS * 4;         // of a block
constexpr int STAGES = 6, DISTANCE = 4;       // slots of activations, and how far ahead they are filled

// Tiles of weights on their way: the fewer tokens, the more the memory decides.
template <Format F, int TOKENS> constexpr int AHEAD = TOKENS == 128 ? 2 : F == FP4 ? 6 : 3;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Activations in shared memory: rows of 128 bytes, their 16-byte pieces exchanged by the row's number modulo 8.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
    return uint64_t((address & 0x3ffff) >> 4) | 1ull << 16 | uint64_t(1024 >> 4) << 32 | 1ull << 62;
}

#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_64(TYPE)                                                                                                     \
    asm volatile("{\nwgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " "                                         \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                        \
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;\n}"                                                                \
                 : D8(0), D8(8), D8(16), D8(24)                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_128(TYPE)                                                                                                    \
    asm volatile("{\nwgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "                                        \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                         \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                         \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                        \
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;\n}"                                                                \
                 : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <Format F> __device__ __forceinline__ void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (F == BF16) WGMMA_64("bf16");
    else WGMMA_64("f16");
}
template <Format F> __device__ __forceinline__ void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (F == BF16) WGMMA_128("bf16");
    else WGMMA_128("f16");
}

template <Format F> __device__ __forceinline__ void decode(const Tile<F>& tile, uint32_t (&a)[4][4]) {
    uint32_t scale[2];
    tile.scale(scale);
#pragma unroll
    for (int j = 0; j < 4; j++) tile.fragment(j, scale, a[j]);
}

// `blockIdx.x`: row tiles; `blockIdx.y`: tokens, of experts one after the other.
template <Format F, int TOKENS, bool EXPERTS> __device__ __forceinline__ void gemm(const Gemm& p) {
    constexpr int STAGE_BYTES = TOKENS * TILE_COLS * 2, ROWS = TOKENS / 32, AHEAD = ::AHEAD<F, TOKENS>;
    extern __shared__ __align__(1024) uint8_t shared[];
    uint8_t* base = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const Matrix& m = p.matrix;
    const int column_tiles = m.cols / TILE_COLS, row_tiles = (m.rows + TILE_ROWS - 1) / TILE_ROWS;
    const int row_tile = blockIdx.x * ROW_TILES + threadIdx.x / WARP;
    wait_for_previous();
    start_next();

    uint32_t expert = 0, first = blockIdx.y * TOKENS, count = p.n;
    Routes routes(p.list, p.experts, p.n * p.experts_per_token);
    if constexpr (EXPERTS) {
        uint32_t skip = blockIdx.y, active = routes.active_count(), i = 0, slots = 0;
        for (; i < active; i++) {
            expert = routes.active(i);
            first = routes.first_slot(expert), slots = routes.first_slot(expert + 1) - first;
            uint32_t tiles = (slots + TOKENS - 1) / TOKENS;
            if (skip < tiles) break;
            skip -= tiles;
        }
        if (i == active) return;
        count = first + slots;
        first += skip * TOKENS;
    }
    const int n = min(count - first, (uint32_t)TOKENS);

    // This thread brings piece `threadIdx.x % 8` of `ROWS` rows.
    const uint16_t* from[ROWS];
    bool inside[ROWS];
    const int piece = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        int row = threadIdx.x / 8 + 32 * i;
        inside[i] = row < n;
        uint32_t at = first + (inside[i] ? row : 0);
        if (EXPERTS && p.epilogue.kind == SWIGLU) at = routes.token(at, p.experts_per_token);
        from[i] = p.input + size_t(at) * m.cols + piece * 8;
    }
    const uint32_t stages = shared_address(base);
    auto bring = [&](int k) {
        if (k < column_tiles) {
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                int row = threadIdx.x / 8 + 32 * i;
                copy_async(stages + k % STAGES * STAGE_BYTES + row * 128 + ((piece ^ row % 8) << 4), from[i] + k * TILE_COLS, inside[i]);
            }
        }
        commit_copies();
    };
    const bool mine = row_tile < row_tiles;
    const Pointer<F> weights(m, (size_t(expert) * row_tiles + (mine ? row_tile : 0)) * column_tiles);
    Tile<F> ahead[AHEAD];
    auto fetch = [&](Tile<F>& tile, int k) {
        if (k < column_tiles) tile.load_again(weights, k);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch(ahead[i], i);
#pragma unroll
    for (int k = 0; k < DISTANCE; k++) bring(k);

    float d[TOKENS / 2] = {};
    auto step = [&](int k, Tile<F>& tile) {
        wait_for_copies<DISTANCE - 1>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        // Its slot was read by products that every warp has waited for.
        bring(k + DISTANCE);
        uint32_t a[4][4];
        decode<F>(tile, a);
        fetch(tile, k + AHEAD);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        uint64_t b = descriptor(stages + k % STAGES * STAGE_BYTES);
#pragma unroll
        for (int j = 0; j < 4; j++) multiply<F>(d, a[j], b + 2 * j);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // Nothing overlaps within a warpgroup: the three others of the multiprocessor keep the tensor cores busy meanwhile.
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    };
    for (int k = 0; k < column_tiles; k += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (k + i < column_tiles) step(k + i, ahead[i]);
    }
    wait_for_copies<0>();
    __syncthreads();

    // Through shared memory, so that the threads that finish a token's outputs lie side by side.
    constexpr int STRIDE = ROW_TILES * TILE_ROWS + 4;
    constexpr int PART = 64;
    float* sums = (float*)base; // [PART][STRIDE], once per part of the tokens
    const int g = lane_row(), t = lane_quarter();
    // The rows that this thread finishes, for every column.
    const int finished = blockIdx.x * ROW_TILES + threadIdx.x / 8 % ROW_TILES, pair = threadIdx.x % 8;
    static_assert(THREADS % (ROW_TILES * 8) == 0);
    Affine affine;
    if (finished < row_tiles) affine.load(p.epilogue, m, expert, finished, pair);
#pragma unroll
    for (int part = 0; part < TOKENS / PART; part++) {
        if (part) __syncthreads();
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = 8 * j + 2 * t + i % 2, row = threadIdx.x / WARP * TILE_ROWS + g + i / 2 * 8;
                sums[column * STRIDE + row] = d[part * 32 + 4 * j + i];
            }
        }
        __syncthreads();
        int columns = min(n - part * PART, PART);
        if (finished >= row_tiles) continue;
        for (int column = threadIdx.x / (ROW_TILES * 8); column < columns; column += THREADS / (ROW_TILES * 8)) {
            const float* pairs = sums + column * STRIDE + threadIdx.x / 8 % ROW_TILES * TILE_ROWS + pair;
            finish(p.epilogue, m, affine, finished, pair, first + part * PART + column, pairs[0], pairs[8]);
        }
    }
}

#define KERNEL(NAME, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(const __grid_constant__ Gemm p) { __VA_ARGS__(p); }
KERNEL(gemm_bf16, gemm<BF16, 128, false>)
KERNEL(gemm_fp4, gemm<FP4, 128, false>)
KERNEL(gemm_experts_bf16_64, gemm<BF16, 64, true>)
KERNEL(gemm_experts_bf16_128, gemm<BF16, 128, true>)
KERNEL(gemm_experts_fp4_64, gemm<FP4, 64, true>)
KERNEL(gemm_experts_fp4_128, gemm<FP4, 128, true>)
