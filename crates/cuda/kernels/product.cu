// Products of packed weights with few columns, at the speed of the memory: each weight is read once, decoded in registers
// and multiplied on tensor cores with up to 16 tokens. The work after is part of the kernel.
#include "product.cuh"

// Warps of a block, which share the inputs of a row of tiles.
constexpr int WARPS = 8;

// The tiles of one warp: groups of `column_tiles` tiles, of which the warps of a block take every eighth. `AHEAD` of them are
// in registers or on their way there, also across the end of a group.
template <Format F> struct Stream {
    static constexpr int AHEAD = F == FP4 ? 6 : 2;
    Tile<F> tiles[AHEAD];
    int groups, column_tiles;

    // `index(group)` is the first tile of a group.
    template <class Index> __device__ __forceinline__ void start(const Matrix& m, int groups, Index index) {
        this->groups = groups;
        column_tiles = m.cols / TILE_COLS;
        if (groups <= 0) return;
        Pointer<F> from(m, index(0) + threadIdx.x / WARP);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (int(threadIdx.x / WARP) + i * WARPS < column_tiles) tiles[i].load(from, i * WARPS);
    }
    // `consume(tile, k, more, group)` gets each tile in order, at `k + more` of its group; then `finish(group)` is called.
    template <class Index, class Consume, class Finish>
    __device__ __forceinline__ void run(const Matrix& m, Index index, Consume consume, Finish finish) {
        for (int group = 0; group < groups; group++) {
            for (int k = threadIdx.x / WARP, left = column_tiles; left > 0; left -= AHEAD * WARPS, k += AHEAD * WARPS) {
                bool over = left <= AHEAD * WARPS, more = !over || group + 1 < groups;
                int next_k = over ? threadIdx.x / WARP : k + AHEAD * WARPS;
                Pointer<F> next(m, more ? index(over ? group + 1 : group) + next_k : 0);
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    if (k + i * WARPS < column_tiles) consume(tiles[i], k, i * WARPS, group);
                    if (more && next_k + i * WARPS < column_tiles) tiles[i].load(next, i * WARPS);
                }
            }
            finish(group);
        }
    }
};

// What a lane multiplies with: its columns' inputs, `16 t` of them skipped; null where there is no column.
template <int NT> struct Columns {
    const uint16_t* rows[NT];
};

// `x` at tile `k + more` of the inputs.
template <Format F, int NT>
__device__ __forceinline__ void multiply(float (&sum)[2][NT][4], const Tile<F>& tile, const Columns<NT>& x, int k, int more) {
    uint32_t scale[2];
    tile.scale(scale);
    uint4 b[NT][2];
#pragma unroll
    for (int c = 0; c < NT; c++) {
        const uint4* p = (const uint4*)(x.rows[c] + k * TILE_COLS) + more * (TILE_COLS / 8);
        b[c][0] = x.rows[c] ? p[0] : make_uint4(0, 0, 0, 0);
        b[c][1] = x.rows[c] ? p[1] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t a[4];
        tile.fragment(j, scale, a);
#pragma unroll
        for (int c = 0; c < NT; c++) {
            const uint4& v = b[c][j / 2];
            // Two chains of sums: a product is ready only some thirty cycles after it began.
            Number<F>::multiply(sum[j % 2][c], a, j % 2 ? v.z : v.x, j % 2 ? v.w : v.y);
        }
    }
}

// Leaves this warp's sums in `partial[row][column]` and clears them.
template <int NT> __device__ __forceinline__ void leave(float (&sum)[2][NT][4], float* partial) {
    int g = lane_row(), t = lane_quarter();
#pragma unroll
    for (int c = 0; c < NT; c++) {
        float* p = partial + g * NT * 8 + c * 8 + 2 * t;
        p[0] = sum[0][c][0] + sum[1][c][0], p[1] = sum[0][c][1] + sum[1][c][1];
        p += 8 * NT * 8;
        p[0] = sum[0][c][2] + sum[1][c][2], p[1] = sum[0][c][3] + sum[1][c][3];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[0][c][i] = sum[1][c][i] = 0;
    }
}

// The sums of all warps for one tile of rows, in their order, and what follows.
template <int NT>
__device__ __forceinline__ void finish_tile(
    const Product& p, const float* all, const Affine& affine, uint32_t row_tile, uint32_t first_column, int n) {
    constexpr int PARTIAL = TILE_ROWS * NT * 8;
    for (int i = threadIdx.x; i < 8 * n; i += WARPS * WARP) {
        int pair = i % 8, column = i / 8;
        const float* sums = all + pair * NT * 8 + column;
        float a = 0, b = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) a += sums[w * PARTIAL], b += sums[w * PARTIAL + 8 * NT * 8];
        finish(p.epilogue, p.matrix, affine, row_tile, pair, first_column + column, a, b);
    }
}

// Groups of tiles through `finish_tile`, one per row tile; `place(group)` gives expert, row tile and offset of the columns;
// `affine` is that of the first group.
template <Format F, int NT, class Index, class Place>
__device__ __forceinline__ void run_groups(
    Stream<F>& stream, Affine& affine, const Product& p, const Columns<NT>& x, float* partial, uint32_t first_column, int n, Index index,
    Place place) {
    constexpr int PARTIAL = TILE_ROWS * NT * 8;
    int warp = threadIdx.x / WARP, half = 0;
    float sum[2][NT][4] = {};
    auto consume = [&](const Tile<F>& tile, int k, int more, int) { multiply<F, NT>(sum, tile, x, k, more); };
    stream.run(p.matrix, index, consume, [&](int group) {
        // Two halves, so that one barrier per group is enough.
        float* all = partial + half * WARPS * PARTIAL;
        half ^= 1;
        leave<NT>(sum, all + warp * PARTIAL);
        __syncthreads();
        uint3 at = place(group);
        finish_tile<NT>(p, all, affine, at.y, first_column + at.z, n);
        if (group + 1 == stream.groups) return;
        at = place(group + 1);
        affine.load(p.epilogue, p.matrix, at.x, at.y, threadIdx.x % 8);
    });
}

// How many of `count` things this block takes, one every `gridDim.x`.
__device__ __forceinline__ int share_of(int count) {
    return (count - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
}

// Dense. `blockIdx.x`: row tiles; `blockIdx.y`: 8 NT tokens.
template <Format F, int NT> __device__ __forceinline__ void dense(const Product& p) {
    extern __shared__ __align__(16) float partial[]; // two halves of [WARPS][16][8 NT]
    const Matrix& m = p.matrix;
    int column_tiles = m.cols / TILE_COLS;
    auto row_tile = [&](int group) { return blockIdx.x + group * gridDim.x; };
    auto index = [&](int group) { return size_t(row_tile(group)) * column_tiles; };
    Stream<F> stream;
    stream.start(m, share_of(row_tiles_of(m)), index);
    Affine affine;
    affine.load(p.epilogue, m, 0, blockIdx.x, threadIdx.x % 8);
    wait_for_previous();
    start_next();
    uint32_t first = blockIdx.y * 8 * NT;
    int n = min(p.n - first, 8u * NT);
    Columns<NT> x;
#pragma unroll
    for (int c = 0; c < NT; c++) {
        int column = c * 8 + lane_row();
        x.rows[c] = column < n ? (const uint16_t*)p.input + size_t(first + column) * m.cols + 16 * lane_quarter() : nullptr;
    }
    run_groups<F, NT>(stream, affine, p, x, partial, first, n, index, [&](int group) { return make_uint3(0, row_tile(group), 0); });
}

// A product of the experts. `blockIdx.x`: row tiles; `blockIdx.y`: an active expert.
template <Format F, int NT> __device__ __forceinline__ void experts(const Product& p) {
    extern __shared__ __align__(16) float partial[]; // two halves of [WARPS][16][8 NT]
    const Matrix& m = p.matrix;
    int column_tiles = m.cols / TILE_COLS, row_tiles = row_tiles_of(m);
    wait_for_previous();
    start_next();
    Routes routes(p.list, p.experts, p.n * p.experts_per_token);
    if (blockIdx.y >= routes.active_count()) return;
    uint32_t expert = routes.active(blockIdx.y), first_slot = routes.first_slot(expert);
    int count = routes.count(expert);
    auto row_tile = [&](int group) { return blockIdx.x + group * gridDim.x; };
    auto index = [&](int group) { return (size_t(expert) * row_tiles + row_tile(group)) * column_tiles; };
    for (int first = 0; first < count; first += 8 * NT) {
        Stream<F> stream;
        stream.start(m, share_of(row_tiles), index);
        Affine affine;
        affine.load(p.epilogue, m, expert, blockIdx.x, threadIdx.x % 8);
        int n = min(count - first, 8 * NT);
        Columns<NT> x;
#pragma unroll
        for (int c = 0; c < NT; c++) {
            uint32_t slot = first_slot + first + c * 8 + lane_row();
            bool inside = c * 8 + lane_row() < n;
            uint32_t row = inside && p.epilogue.kind == SWIGLU ? routes.pair(slot) / p.experts_per_token : slot;
            x.rows[c] = inside ? (const uint16_t*)p.input + size_t(row) * m.cols + 16 * lane_quarter() : nullptr;
        }
        if (first) __syncthreads();
        run_groups<F, NT>(stream, affine, p, x, partial, first_slot + first, n, index,
            [&](int group) { return make_uint3(expert, row_tile(group), 0); });
    }
}

#define KERNEL(NAME, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP, 3) NAME(const __grid_constant__ Product p) { __VA_ARGS__(p); }
KERNEL(product_bf16_8, dense<BF16, 1>)
KERNEL(product_bf16_16, dense<BF16, 2>)
KERNEL(product_fp4_8, dense<FP4, 1>)
KERNEL(product_fp4_16, dense<FP4, 2>)
KERNEL(experts_bf16_8, experts<BF16, 1>)
KERNEL(experts_bf16_16, experts<BF16, 2>)
KERNEL(experts_fp4_8, experts<FP4, 1>)
KERNEL(experts_fp4_16, experts<FP4, 2>)
