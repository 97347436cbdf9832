// Products of the experts' four-bit weights with few tokens each, at the speed of the memory, on Hopper and later. A block takes a
// contiguous part of all rows of all experts; each of its warps takes one row tile after the other through all inputs, alone: its
// weights come to shared memory by bulk copies that run ahead, also across the ends of tiles and experts. The activations of as many
// experts' tokens as there is room for lie in shared memory; nothing else is shared.
#include "epilogue.cuh"

struct Few {
    Matrix matrix;
    const uint16_t* input;     // plain: [n, cols] for SWIGLU, else [slots, cols]
    const uint32_t* list;      // see `Routes`
    Epilogue epilogue;
    uint32_t n, experts, experts_per_token;
    uint32_t tokens;           // of a pass, at most: 8, 16 or 24
    uint32_t rows;             // of activations for which there is room in shared memory, at least `tokens`
    uint32_t padding;
};
static_assert(sizeof(Few) == sizeof(Matrix) + sizeof(Epilogue) + 40);

constexpr int WARPS = 16;
constexpr int CHUNK = 4, SLOTS = 2;                      // tiles of a bulk copy, and copies of a warp
constexpr int TILE_BYTES = 512, SCALE_BYTES = 64, SLOT_BYTES = CHUNK * (TILE_BYTES + SCALE_BYTES);
constexpr int PADDING = 16;                              // bytes between rows of activations, so that they lie in different banks

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void init_barrier(uint32_t barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
}

// A pass: the row tiles of one expert with up to `tokens` of its slots. Passes are counted over the experts in their order.
struct Pass {
    uint32_t expert, first;
    int n;
    uint32_t row; // of its activations in shared memory
};
constexpr int MAX_PASSES = 8; // whose activations are in shared memory together

// By each warp. The number of passes if `number` is not below it.
__device__ __forceinline__ uint32_t find(Pass& pass, const Routes& routes, uint32_t tokens, uint32_t number) {
    const uint32_t lane = threadIdx.x % WARP;
    uint32_t before = 0;
    for (uint32_t base = 0; base < routes.experts; base += WARP) {
        const uint32_t count = base + lane < routes.experts ? routes.count(base + lane) : 0, passes = (count + tokens - 1) / tokens;
        uint32_t end = passes;
#pragma unroll
        for (int i = 1; i < WARP; i *= 2) {
            uint32_t other = __shfl_up_sync(~0u, end, i);
            if (lane >= i) end += other;
        }
        end += before;
        const uint32_t found = __ballot_sync(~0u, number < end);
        if (found) {
            const int from = __ffs(found) - 1;
            pass.expert = base + from;
            const uint32_t own = number - __shfl_sync(~0u, end - passes, from);
            pass.n = min(__shfl_sync(~0u, count, from) - own * tokens, tokens);
            pass.first = routes.first_slot(pass.expert) + own * tokens;
            return 0;
        }
        before = __shfl_sync(~0u, end, WARP - 1);
    }
    return before;
}

// What a warp's bulk copies have come to.
struct Copies {
    uint32_t slots, barriers; // addresses in shared memory
    uint32_t unit, end;       // row tiles, counted over all passes
    int column_tile, slot;
    Pass pass;                // of `unit`
    uint32_t row_tiles, column_tiles;

    __device__ __forceinline__ void next(const Few& p, const Routes& routes) {
        if (unit >= end) return;
        const int count = min(CHUNK, (int)column_tiles - column_tile);
        if (threadIdx.x % WARP == 0) {
            const size_t tile = (size_t(pass.expert) * row_tiles + unit % row_tiles) * column_tiles + column_tile;
            const uint32_t to = slots + slot * SLOT_BYTES, barrier = barriers + 8 * slot;
            expect_bytes(barrier, count * (TILE_BYTES + SCALE_BYTES));
            copy_bulk(to, p.matrix.weights + tile * (TILE_BYTES / 16), count * TILE_BYTES, barrier);
            copy_bulk(to + CHUNK * TILE_BYTES, p.matrix.scales + tile * WARP, count * SCALE_BYTES, barrier);
        }
        if (++slot == SLOTS) slot = 0;
        column_tile += CHUNK;
        if (column_tile < (int)column_tiles) return;
        column_tile = 0;
        const uint32_t last = unit / row_tiles;
        unit += WARPS;
        if (unit < end && unit / row_tiles != last) find(pass, routes, p.tokens, unit / row_tiles);
    }
};

// One row tile with 8 NT tokens.
template <int NT>
__device__ __forceinline__ void multiply_tile(
    const Few& p, const Routes& routes, Copies& copies, int& slot, uint32_t& parity, const Pass& pass, uint32_t row_tile, uint32_t input, uint32_t stride) {
    Affine affine;
    affine.load(p.epilogue, p.matrix, pass.expert, row_tile, lane_row());
    float sum[2][NT][4] = {};
    const uint32_t lane = threadIdx.x % WARP;
    // What no token has is computed with those of another, and not used.
    uint32_t x[NT];
#pragma unroll
    for (int c = 0; c < NT; c++) x[c] = input + (pass.row + min(lane_row() + 8 * c, pass.n - 1)) * stride + lane_quarter() * 32;
    const int column_tiles = copies.column_tiles;
    for (int k = 0; k < column_tiles; k += CHUNK) {
        wait_barrier(copies.barriers + 8 * slot, parity);
        const uint32_t from = copies.slots + slot * SLOT_BYTES;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            if (k + i >= column_tiles) break;
            Tile<FP4> tile;
            tile.words = load_shared(from + i * TILE_BYTES + lane * 16);
            uint16_t both;
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(both) : "r"(from + CHUNK * TILE_BYTES + i * SCALE_BYTES + lane * 2));
            tile.scales = both;
            uint4 b[NT][2];
#pragma unroll
            for (int c = 0; c < NT; c++) {
                const uint32_t at = x[c] + (k + i) * (TILE_COLS * 2);
                b[c][0] = load_shared(at), b[c][1] = load_shared(at + 16);
            }
            uint32_t scale[2];
            tile.scale(scale);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t a[4];
                tile.fragment(j, scale, a);
#pragma unroll
                for (int c = 0; c < NT; c++) {
                    const uint4& v = b[c][j / 2];
                    // Two chains of sums: a product is ready only some thirty cycles after it began.
                    Number<FP4>::multiply(sum[j % 2][c], a, j % 2 ? v.z : v.x, j % 2 ? v.w : v.y);
                }
            }
        }
        __syncwarp();
        copies.next(p, routes);
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
#pragma unroll
    for (int c = 0; c < NT; c++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int column = 8 * c + 2 * lane_quarter() + i;
            if (column >= pass.n) continue;
            finish(p.epilogue, p.matrix, affine, row_tile, lane_row(), pass.first + column, sum[0][c][i] + sum[1][c][i],
                sum[0][c][2 + i] + sum[1][c][2 + i]);
        }
    }
}

#endif

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1) experts_few(const __grid_constant__ Few p) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ __align__(8) uint64_t barriers[1 + WARPS * SLOTS];
    __shared__ Pass passes[MAX_PASSES];
    __shared__ uint32_t passes_count;
    const Matrix& m = p.matrix;
    const uint32_t warp = threadIdx.x / WARP, stride = m.cols * 2 + PADDING;
    const uint32_t weights = shared_address(shared), input = weights + WARPS * SLOTS * SLOT_BYTES, arrived = shared_address(barriers);
    Copies copies;
    copies.slots = weights + warp * SLOTS * SLOT_BYTES, copies.barriers = arrived + 8 * (1 + warp * SLOTS);
    if (threadIdx.x % WARP == 0) {
        for (int i = 0; i < SLOTS; i++) init_barrier(copies.barriers + 8 * i);
        if (warp == 0) init_barrier(arrived);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    wait_for_previous();
    start_next();
    const Routes routes(p.list, p.experts, p.n * p.experts_per_token);
    Pass pass;
    const uint32_t row_tiles = (m.rows + TILE_ROWS - 1) / TILE_ROWS, units = find(pass, routes, p.tokens, ~0u) * row_tiles;
    const uint32_t begin = uint64_t(units) * blockIdx.x / gridDim.x, end = uint64_t(units) * (blockIdx.x + 1) / gridDim.x;
    if (begin >= end) return;
    copies.unit = begin + warp, copies.end = end, copies.column_tile = 0, copies.slot = 0;
    copies.row_tiles = row_tiles, copies.column_tiles = m.cols / TILE_COLS;
    if (copies.unit < end) find(copies.pass, routes, p.tokens, copies.unit / row_tiles);
#pragma unroll
    for (int i = 0; i < SLOTS; i++) copies.next(p, routes);

    int slot = 0;
    uint32_t parity = 0, input_parity = 0, unit = begin + warp;
    for (uint32_t number = begin / row_tiles, count; number * row_tiles < end; number += count) {
        // The tokens of the next passes, when everybody is done with those of the ones before.
        __syncthreads();
        if (warp == 0) {
            uint32_t rows = 0;
            for (count = 0; count < MAX_PASSES && (number + count) * row_tiles < end; count++) {
                find(pass, routes, p.tokens, number + count);
                if (rows + pass.n > p.rows) break;
                pass.row = rows;
                rows += pass.n;
                if (threadIdx.x == 0) passes[count] = pass;
            }
            if (threadIdx.x == 0) passes_count = count, expect_bytes(arrived, rows * m.cols * 2);
            __syncwarp();
            for (uint32_t i = 0; i < count; i++) {
                const Pass& now = passes[i];
                if (threadIdx.x >= now.n) continue;
                const uint32_t at = now.first + threadIdx.x, row = p.epilogue.kind == SWIGLU ? routes.pair(at) / p.experts_per_token : at;
                copy_bulk(input + (now.row + threadIdx.x) * stride, p.input + size_t(row) * m.cols, m.cols * 2, arrived);
            }
        }
        __syncthreads();
        count = passes_count;
        wait_barrier(arrived, input_parity);
        input_parity ^= 1;
        for (; unit < min(end, (number + count) * row_tiles); unit += WARPS) {
            pass = passes[unit / row_tiles - number];
            const uint32_t row_tile = unit % row_tiles;
            if (pass.n <= 8) multiply_tile<1>(p, routes, copies, slot, parity, pass, row_tile, input, stride);
            else if (pass.n <= 16) multiply_tile<2>(p, routes, copies, slot, parity, pass, row_tile, input, stride);
            else multiply_tile<3>(p, routes, copies, slot, parity, pass, row_tile, input, stride);
        }
    }
#endif
}
