// Dense products of BF16 weights with few tokens on Hopper, for matrices of which a multiprocessor has few rows. Its one block has most of
// its weights on their way to shared memory before the kernel waits for the one before. The warps share the columns, so that activations,
// which go straight to registers, are read once per multiprocessor.
#include "epilogue.cuh"
#include "hopper.cuh"

struct Dense {
    Matrix matrix;
    const uint16_t* input;     // [n, cols]
    Epilogue epilogue;
    uint32_t n;                // tokens
    uint32_t padding;
};
static_assert(sizeof(Dense) == 136);

constexpr int WARPS = 12, THREADS = WARPS * WARP;
constexpr int ROW_TILES = 3;                  // of a block, at most: one every `gridDim.x`
constexpr int SLOTS = 8;                      // tiles of a warp on their way
constexpr int TILE_BYTES = 2048, RING_BYTES = SLOTS * TILE_BYTES;

// A warp's tiles, each with the row tiles of a column one after the other, through its own piece of shared memory.
struct Weights {
    const uint8_t* from;       // the first tile
    size_t row_step;           // bytes from a row tile of the block to the next
    uint64_t policy;
    uint32_t ring, barriers;   // addresses
    int rows, count;           // row tiles of the block; tiles of the warp
    int number;                // of the next tile
    __device__ __forceinline__ Weights(const Matrix& m, uint8_t* shared, uint64_t* all_barriers, int rows, int begin, int end)
        : rows(rows), count((end - begin) * rows), number(0) {
        const int warp = threadIdx.x / WARP, column_tiles = m.cols / TILE_COLS;
        from = (const uint8_t*)m.weights + (size_t(blockIdx.x) * column_tiles + begin) * TILE_BYTES;
        row_step = size_t(gridDim.x) * column_tiles * TILE_BYTES;
        policy = read_once();
        ring = shared_address(shared) + warp * RING_BYTES, barriers = shared_address(all_barriers) + warp * SLOTS * 8;
        if (threadIdx.x % WARP == 0) {
            for (int i = 0; i < SLOTS; i++) init_barrier(barriers + 8 * i, 1);
            fence_barriers();
            for (int i = 0; i < min(SLOTS, count); i++) fill(i);
        }
        __syncwarp();
    }
    // By one lane.
    __device__ __forceinline__ void fill(int tile) const {
        const uint32_t full = barriers + tile % SLOTS * 8;
        expect_bytes(full, TILE_BYTES);
        copy_bulk(ring + tile % SLOTS * TILE_BYTES, from + tile % rows * row_step + tile / rows * TILE_BYTES, TILE_BYTES, full, policy);
    }
    __device__ __forceinline__ Tile<BF16> next() {
        const int slot = number % SLOTS;
        wait_barrier(barriers + 8 * slot, number / SLOTS % 2);
        Tile<BF16> tile;
#pragma unroll
        for (int j = 0; j < 4; j++) tile.words[j] = load_shared(ring + slot * TILE_BYTES + (j * WARP + threadIdx.x % WARP) * 16);
        if (number + SLOTS < count) {
            fence_reads();
            __syncwarp();
            if (threadIdx.x % WARP == 0) fill(number + SLOTS);
        }
        number++;
        return tile;
    }
};

// NT: eights of tokens.
template <int NT> __device__ __forceinline__ void product(const Dense& p) {
    // Column tiles of activations on their way; chains of sums, since a product is ready only some thirty cycles after it began; floats of
    // a row of sums, such that those of eight rows lie in different banks; outputs of a thread, pairs of rows of a token.
    constexpr int AHEAD = NT == 1 ? 6 : NT == 2 ? 4 : 2, CHAINS = NT == 1 ? 2 : 1, STRIDE = 8 * NT + 4;
    constexpr int OUTPUTS = (ROW_TILES * 8 * NT * 8 + THREADS - 1) / THREADS;
    static_assert(ROW_TILES * TILE_ROWS * STRIDE * 4 <= RING_BYTES);
    extern __shared__ __align__(128) uint8_t shared[]; // the rings, later each warp's sums: [row tiles][16][STRIDE]
    __shared__ __align__(8) uint64_t barriers[WARPS * SLOTS];
    start_next();
    const Matrix& m = p.matrix;
    const Epilogue& e = p.epilogue;
    const int warp = threadIdx.x / WARP, g = lane_row(), t = lane_quarter(), n = p.n;
    const int column_tiles = m.cols / TILE_COLS, row_tiles = (m.rows + TILE_ROWS - 1) / TILE_ROWS;
    const int rows = (row_tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    const int begin = column_tiles * warp / WARPS, end = column_tiles * (warp + 1) / WARPS;
    Weights weights(m, shared, barriers, rows, begin, end);
    struct Output {
        int row, column;       // the row tile's number in this block; the token
        bool wanted;
        uint32_t row_tile;
        Affine affine;
    } outputs[OUTPUTS];
    const int pair = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) {
        Output& o = outputs[i];
        o.row = (threadIdx.x + i * THREADS) / (8 * 8 * NT), o.column = (threadIdx.x + i * THREADS) / 8 % (8 * NT);
        o.wanted = o.row < rows && o.column < n, o.row_tile = blockIdx.x + o.row * gridDim.x;
        if (o.wanted) o.affine.load(e, m, 0, o.row_tile, pair);
    }

    wait_for_previous();
    uint4 x[AHEAD][NT][2];
    auto load = [&](uint4(&x)[NT][2], int column_tile) {
#pragma unroll
        for (int c = 0; c < NT; c++) {
            const uint4* from = (const uint4*)(p.input + size_t(8 * c + g) * m.cols + column_tile * TILE_COLS + 16 * t);
            const bool there = 8 * c + g < n && column_tile < end;
            x[c][0] = there ? from[0] : make_uint4(0, 0, 0, 0);
            x[c][1] = there ? from[1] : make_uint4(0, 0, 0, 0);
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load(x[i], begin + i);
    float sum[ROW_TILES][CHAINS][NT][4] = {};
    for (int first = begin; first < end; first += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (first + i >= end) break;
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                if (r >= rows) break;
                const Tile<BF16> tile = weights.next();
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    uint32_t a[4];
                    tile.fragment(j, {}, a);
#pragma unroll
                    for (int c = 0; c < NT; c++) {
                        const uint4& v = x[i][c][j / 2];
                        Number<BF16>::multiply(sum[r][j % CHAINS][c], a, j % 2 ? v.z : v.x, j % 2 ? v.w : v.y);
                    }
                }
            }
            load(x[i], first + i + AHEAD);
        }
    }
    float* own = (float*)(shared + warp * RING_BYTES) + g * STRIDE + 2 * t;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int c = 0; c < NT; c++) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                float2 v = make_float2(sum[r][0][c][i], sum[r][0][c][i + 1]);
                if (CHAINS == 2) v.x += sum[r][CHAINS - 1][c][i], v.y += sum[r][CHAINS - 1][c][i + 1];
                *(float2*)(own + (r * TILE_ROWS + i / 2 * 8) * STRIDE + 8 * c) = v;
            }
        }
    }
    // What comes from memory is on its way while the warps wait for one another.
    Rotation rotations[OUTPUTS];
    float2 old[OUTPUTS];
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) {
        const Output& o = outputs[i];
        if (!o.wanted) continue;
        if (e.kind == QKV) rotations[i].load(e, o.row_tile, pair, o.column);
        if (e.kind != RESIDUAL) continue;
        const uint2 to = stored_rows(e, o.row_tile, pair);
        const float* out = e.out + size_t(o.column) * m.rows;
        old[i] = make_float2(to.x < m.rows ? out[to.x] : 0, to.y < m.rows ? out[to.y] : 0);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) {
        const Output& o = outputs[i];
        if (!o.wanted) continue;
        const float* sums = (const float*)shared + (o.row * TILE_ROWS + pair) * STRIDE + o.column;
        float a = 0, b = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) a += sums[w * (RING_BYTES / 4)], b += sums[w * (RING_BYTES / 4) + 8 * STRIDE];
        if (e.kind == RESIDUAL) {
            const uint2 to = stored_rows(e, o.row_tile, pair);
            float* out = e.out + size_t(o.column) * m.rows;
            if (to.x < m.rows) out[to.x] = old[i].x + o.affine.first(a);
            if (to.y < m.rows) out[to.y] = old[i].y + o.affine.second(b);
        } else {
            finish(e, m, o.affine, o.row_tile, pair, o.column, a, b, rotations[i]);
        }
    }
}

#define KERNEL(NAME, NT) \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Dense p) { product<NT>(p); }
KERNEL(product_few_8, 1)
KERNEL(product_few_16, 2)
KERNEL(product_few_32, 4)
