// Both products of the experts' four-bit weights with some tokens each, on Hopper: a block takes some rows of some experts, first of the first
// product, then, when all blocks have arrived, of the second. Other than in experts_few.cuh all tokens of an expert take part in its products
// at once, so that each weight is decoded once, and they are too many for their activations to lie in shared memory: those come some column
// tiles at a time for all warpgroups, each of which has 128 rows. What comes is brought by warps of their own, by bulk copies that run ahead,
// the weights across the ends of passes and products.
#include "experts.cuh"
#include "hopper.cuh"

struct Streamed {
    Part parts[2];             // the inputs are stacked, a row per slot
    const uint32_t* list;      // see `Routes`
    uint32_t* barrier;         // counts the blocks that arrived, up to twice as many as there are, then from zero on
    uint32_t n, experts, experts_per_token;
    uint32_t stack;            // of both inputs
};
static_assert(sizeof(Streamed) == 288);

constexpr int GROUPS = 3, WARPS = 4 * GROUPS;            // that multiply
constexpr int THREADS = (GROUPS + 1) * 128;              // one warp more for each warpgroup's weights, and one for the activations
// Registers of a thread: what the block begins with is divided anew, and there is no more to be had.
constexpr int REGISTERS = 65536 / THREADS, MULTIPLYING = 160, BRINGING = 32;
static_assert(GROUPS * MULTIPLYING + BRINGING <= (GROUPS + 1) * REGISTERS);
constexpr int EACH = 2, UNIT = 4 * EACH;                 // row tiles of a warp and of a warpgroup in a pass
constexpr int TOKENS = 72, SUMS = TOKENS / 2;            // of a pass; of a thread: 64 rows of its tokens
constexpr int CHUNK = 3;                                 // column tiles that come together
constexpr int TILE_BYTES = 512, SCALE_BYTES = 64;
constexpr int SCALES = UNIT * CHUNK * TILE_BYTES, SLOT_BYTES = SCALES + UNIT * CHUNK * SCALE_BYTES;
constexpr int LINE = TILE_COLS * 2;                      // bytes of a row of activations of one column tile
constexpr int STAGE_BYTES = CHUNK * TOKENS * LINE;
constexpr int SLOTS = 3, STAGES = 3;                     // chunks of a warpgroup's weights, and of activations
constexpr int MAX_PASSES = 64;                           // of a block in one product

// GROUPS units of an expert, or the rest of them, with some of its tokens.
struct Pass {
    uint32_t expert, first;    // the first of its slots
    int n;                     // its slots
    uint32_t unit, count;      // warpgroup g has the one of number `unit` + g
};
struct Shared {
    uint8_t stages[STAGES][STAGE_BYTES];         // [column tiles][tokens, rounded up to eights][LINE]
    uint8_t slots[GROUPS][SLOTS][SLOT_BYTES];    // [row tiles][column tiles]: codes, then scales
    uint64_t full[STAGES], empty[STAGES];        // barriers
    uint64_t arrived[GROUPS][SLOTS], left[GROUPS][SLOTS];
    uint64_t multiplied;                         // the first product
    Pass passes[2][MAX_PASSES];
    uint32_t counts[2];                          // of passes
};
// What Rust reserves, room to align it to 1024 bytes included.
static_assert(sizeof(Shared) + 1024 <= 227 * 1024 && STAGE_BYTES % 1024 == 0);

__device__ __forceinline__ uint32_t units_of(const Matrix& m) { return (row_tiles_of(m) + UNIT - 1) / UNIT; }

// What this block does of a product. By one warp. An expert's tokens are cut into parts of equal size, each of which needs several passes. A
// pass takes about as long as others with as many tokens: they are dealt to the blocks one by one, to and fro, those with the most first.
__device__ __forceinline__ void make_plan(Shared& shared, const Streamed& p, const Routes& routes, uint32_t product) {
    constexpr int ALL = MAX_EXPERTS / WARP;
    const uint32_t lane = threadIdx.x % WARP, units = units_of(p.parts[product].matrix), pieces = (units + GROUPS - 1) / GROUPS;
    uint32_t count[ALL], slot[ALL], size[ALL], own[ALL], start[ALL], total = 0; // size: of a part; own: passes; start: passes dealt before
#pragma unroll
    for (int i = 0; i < ALL; i++) {
        const uint32_t expert = i * WARP + lane;
        count[i] = expert < routes.experts ? routes.count(expert) : 0;
        slot[i] = expert < routes.experts ? routes.first_slot(expert) : 0;
        const uint32_t parts = (count[i] + TOKENS - 1) / TOKENS;
        size[i] = parts ? (count[i] + 8 * parts - 1) / (8 * parts) * 8 : 0;
        own[i] = parts * pieces;
    }
    for (uint32_t tokens = TOKENS; tokens > 0; tokens -= 8) {
#pragma unroll
        for (int i = 0; i < ALL; i++) {
            if (i * WARP >= routes.experts || !__any_sync(~0u, size[i] == tokens)) continue;
            uint32_t sum = size[i] == tokens ? own[i] : 0;
#pragma unroll
            for (int j = 1; j < WARP; j *= 2) {
                const uint32_t other = __shfl_up_sync(~0u, sum, j);
                if (lane >= j) sum += other;
            }
            if (size[i] == tokens) start[i] = total + sum - own[i];
            total += __shfl_sync(~0u, sum, WARP - 1);
        }
    }
    uint32_t passes = 0;
    for (;; passes++) {
        const uint32_t number = passes * gridDim.x + (passes % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (number >= total) break;
#pragma unroll
        for (int i = 0; i < ALL; i++) {
            if (size[i] == 0 || number - start[i] >= own[i]) continue;
            uint32_t first = 0, unit = (number - start[i]) * GROUPS;
            for (; unit >= pieces * GROUPS; unit -= pieces * GROUPS) first += size[i];
            shared.passes[product][passes]
                = {i * WARP + lane, slot[i] + first, int(min(count[i] - first, size[i])), unit, min(units - unit, uint32_t(GROUPS))};
        }
    }
    if (lane == 0) shared.counts[product] = passes;
}

// A place in a ring.
template <int LENGTH> struct Turn {
    int at = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++at == LENGTH) at = 0, parity ^= 1;
    }
};

// A warp's row tile of number `i` in its unit: two of which the first product's outputs become neighbours in the second's inputs.
__device__ __forceinline__ uint32_t row_tile_of(int i) { return threadIdx.x / (2 * WARP) % 2 * 4 + threadIdx.x / WARP % 2 + 2 * i; }
// The same in the matrix.
__device__ __forceinline__ uint32_t row_tile_of(const Pass& pass, int i) { return (pass.unit + threadIdx.x / 128) * UNIT + row_tile_of(i); }

// A warpgroup's ring of weights, as its warps see it.
struct Weights {
    uint32_t slots, arrived, left; // addresses
    Turn<SLOTS> now;               // the chunk that is multiplied
    __device__ __forceinline__ void wait() const { wait_barrier(arrived + 8 * now.at, now.parity); }
    // A tile of the chunk, as it is.
    __device__ __forceinline__ Tile<FP4> load(int row_tile, int i) const {
        const uint32_t slot = slots + now.at * SLOT_BYTES, tile = row_tile_of(0) * CHUNK, further = row_tile_of(row_tile) - row_tile_of(0);
        return load_tile(slot + tile * TILE_BYTES + (further * CHUNK + i) * TILE_BYTES,
                         slot + SCALES + tile * SCALE_BYTES + (further * CHUNK + i) * SCALE_BYTES);
    }
    // When all of a chunk is loaded.
    __device__ __forceinline__ void leave() {
        fence_reads();
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(left + 8 * now.at);
        now.next();
    }
};

// All weights of a warpgroup. By one thread.
__device__ __forceinline__ void bring_weights(const Streamed& p, Shared& shared, uint32_t group) {
    const uint64_t policy = read_once();
    Turn<SLOTS> now;
    for (int product = 0; product < 2; product++) {
        const Matrix& m = p.parts[product].matrix;
        const int columns = m.cols / TILE_COLS;
        const uint32_t row_tiles = row_tiles_of(m);
        for (uint32_t i = 0; i < shared.counts[product]; i++) {
            const Pass& pass = shared.passes[product][i];
            if (group >= pass.count) continue;
            const uint32_t expert = pass.expert * row_tiles, first = (pass.unit + group) * UNIT;
            for (int column = 0; column < columns; column += CHUNK, now.next()) {
                const uint32_t full = shared_address(&shared.arrived[group][now.at]), to = shared_address(shared.slots[group][now.at]);
                const int count = min(CHUNK, columns - column);
                wait_barrier(shared_address(&shared.left[group][now.at]), now.parity ^ 1);
                expect_bytes(full, UNIT * count * (TILE_BYTES + SCALE_BYTES));
#pragma unroll
                for (int r = 0; r < UNIT; r++) {
                    // Where there are no more rows come others.
                    const size_t from = size_t(expert + min(first + r, row_tiles - 1)) * columns + column;
                    copy_bulk(to + r * CHUNK * TILE_BYTES, (const uint8_t*)m.weights + from * TILE_BYTES, count * TILE_BYTES, full, policy);
                    copy_bulk(to + SCALES + r * CHUNK * SCALE_BYTES, (const uint8_t*)m.scales + from * SCALE_BYTES, count * SCALE_BYTES, full, policy);
                }
            }
        }
    }
}

// The ring of activations, as those see it who take them.
struct Inputs {
    uint32_t stages, full, empty; // addresses
    Turn<STAGES> now;
    __device__ __forceinline__ void wait() const { wait_barrier(full + 8 * now.at, now.parity); }
    __device__ __forceinline__ void leave() {
        if (threadIdx.x % 128 == 0) arrive(empty + 8 * now.at);
        now.next();
    }
};

// A warpgroup's sums of a pass. The next tile is decoded while the products of the one before are at work: where a branch follows these, all
// of them begin before anything is decoded, and all is decoded before they are waited for. The compiler may not know that `some` is true.
template <int N> __device__ __forceinline__ void multiply_pass(float (&d)[EACH][SUMS], Weights& weights, Inputs& inputs, int columns, bool some) {
    uint32_t a[2][4][4];
    auto begin = [&] { decode(weights.load(0, 0), a[0]); };
    weights.wait();
    begin();
    inputs.wait();
    for (; columns > 0; columns -= CHUNK) {
        const uint32_t b = descriptor_of(inputs.stages + inputs.now.at * STAGE_BYTES);
#pragma unroll
        for (int i = 0; i < EACH * CHUNK; i++) {
            if (i % EACH == 0 && i / EACH >= columns) break;
            Tile<FP4> next;
            if (i + 1 < EACH * CHUNK) next = weights.load((i + 1) % EACH, (i + 1) / EACH);
            begin_products();
#pragma unroll
            for (int j = 0; j < 4; j++) multiply<FP4, N>(d[i % EACH], a[i % 2][j], descriptor(b, i / EACH * N * LINE + 32 * j));
            commit_products();
            if (i + 1 < EACH * CHUNK) {
                if (some) decode(next, a[(i + 1) % 2]);
            } else if (columns > CHUNK) {
                weights.leave();
                weights.wait();
                begin();
            }
            wait_for_products<0>();
        }
        inputs.leave();
        if (columns > CHUNK) inputs.wait();
    }
    weights.leave();
}

// What follows the first product: of each lane's outputs its neighbour's are beside, so that they exchange tokens.
__device__ __forceinline__ void finish_first(const float (&d)[EACH][SUMS], const Epilogue& e, const Affine (&affine)[EACH], const Pass& pass) {
    const uint32_t g = lane_row(), t = lane_quarter(), odd = g % 2, row_tile = row_tile_of(pass, 0) % UNIT;
    const uint32_t token = 2 * t + odd, position = product_position(row_tile * 8 + g - odd);
    uint16_t* out = e.out16 + (size_t(row_tile_of(pass, 0) / UNIT) * e.out_stack + pass.first + token) * TILE_COLS
        + ((position / 8 ^ token) * 8 + position % 8);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        if (8 * j >= pass.n) break;
        uint32_t y[2]; // by token: both row tiles
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint16_t v[EACH];
#pragma unroll
            for (int r = 0; r < EACH; r++) {
                const Affine& f = affine[r];
                v[r] = activation(e.out_format, swiglu(d[r][4 * j + i] * f.scale + f.a, d[r][4 * j + 2 + i] * f.scale + f.b, e.limit, e.alpha));
            }
            y[i] = v[0] | uint32_t(v[1]) << 16;
        }
        const uint32_t own = odd ? y[1] : y[0], other = __shfl_xor_sync(~0u, odd ? y[0] : y[1], 4);
        const uint32_t even = odd ? other : own, after = odd ? own : other;
        *(uint2*)(out + j * 8 * TILE_COLS) = make_uint2(__byte_perm(even, after, 0x5410), __byte_perm(even, after, 0x7632));
    }
}

// What follows the second.
__device__ __forceinline__ void finish_second(
    const float (&d)[EACH][SUMS], const Epilogue& e, const Affine (&affine)[EACH], const Pass& pass, uint32_t rows) {
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        const uint32_t row = row_tile_of(pass, r) * TILE_ROWS + lane_row();
        const bool lower = row < rows, upper = row + 8 < rows;
        float* out = e.out + size_t(pass.first + 2 * lane_quarter()) * rows + row;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            if (8 * j >= pass.n) break;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float* to = out + size_t(8 * j + i) * rows;
                if (lower) to[0] = d[r][4 * j + i] * affine[r].scale + affine[r].a;
                if (upper) to[8] = d[r][4 * j + 2 + i] * affine[r].scale + affine[r].b;
            }
        }
    }
}

// A warpgroup's part of a pass. What slots have that only fill up an eight is nobody's.
__device__ __forceinline__ void take_pass(const Streamed& p, Weights& weights, Inputs& inputs, int product, const Pass& pass) {
    const Part& part = p.parts[product];
    const uint32_t row_tiles = row_tiles_of(part.matrix);
    const int columns = __shfl_sync(~0u, part.matrix.cols / TILE_COLS, 0);
    Affine affine[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        affine[i] = {0, 0, 0};
        if (row_tile_of(pass, i) < row_tiles) affine[i].load(part.epilogue, part.matrix, pass.expert, row_tile_of(pass, i), lane_row());
    }
    float d[EACH][SUMS] = {};
    // The same in all lanes, and the compiler should know.
    inputs.now.at = __shfl_sync(~0u, inputs.now.at, 0), inputs.now.parity = __shfl_sync(~0u, inputs.now.parity, 0);
    weights.now.at = __shfl_sync(~0u, weights.now.at, 0), weights.now.parity = __shfl_sync(~0u, weights.now.parity, 0);
    switch ((pass.n + 7) / 8) {
#define WIDTH(N) case N / 8: multiply_pass<N>(d, weights, inputs, columns, pass.n > 0); break;
        WIDTH(8) WIDTH(16) WIDTH(24) WIDTH(32) WIDTH(40) WIDTH(48) WIDTH(56) WIDTH(64) WIDTH(72)
    }
    if (product == 0) finish_first(d, part.epilogue, affine, pass);
    else finish_second(d, part.epilogue, affine, pass, part.matrix.rows);
}

// What a warpgroup without rows does in a pass: it takes part in the ring.
__device__ __forceinline__ void watch(Inputs& inputs, int columns) {
    for (int k = 0; k < columns; k += CHUNK) {
        inputs.wait();
        // All have seen that it is full before it can be filled again.
        asm volatile("barrier.sync %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory");
        inputs.leave();
    }
}

// The activations of all passes. By one thread.
__device__ __forceinline__ void bring_inputs(const Streamed& p, Shared& shared) {
    Turn<STAGES> now;
    for (int product = 0; product < 2; product++) {
        if (product == 1) {
            // What all blocks made: written by stores, read by bulk copies.
            wait_barrier(shared_address(&shared.multiplied), 0);
            asm volatile("fence.proxy.async.global;" ::: "memory");
            __threadfence();
            // Every launch counts one half of the counter's range, so that it never ends in the midst of one.
            const uint32_t half = atomicInc(p.barrier, 2 * gridDim.x - 1) / gridDim.x;
            uint32_t seen;
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(p.barrier) : "memory");
            while (seen / gridDim.x == half);
            __threadfence();
            asm volatile("fence.proxy.async.global;" ::: "memory");
        }
        const Part& part = p.parts[product];
        const int columns = part.matrix.cols / TILE_COLS;
        for (uint32_t i = 0; i < shared.counts[product]; i++) {
            const Pass pass = shared.passes[product][i];
            const uint32_t bytes = (pass.n + 7) / 8 * 8 * LINE;
            const uint16_t* from = part.input + size_t(pass.first) * TILE_COLS;
            for (int column = 0; column < columns; column += CHUNK, now.next()) {
                const uint32_t full = shared_address(&shared.full[now.at]), to = shared_address(shared.stages[now.at]);
                const int count = min(CHUNK, columns - column);
                wait_barrier(shared_address(&shared.empty[now.at]), now.parity ^ 1);
                expect_bytes(full, count * bytes);
                for (int i = 0; i < count; i++) copy_bulk(to + i * bytes, from + size_t(column + i) * p.stack * TILE_COLS, bytes, full);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) experts_streamed(const __grid_constant__ Streamed p) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    Shared& shared = *(Shared*)(bytes + (1024 - shared_address(bytes) % 1024) % 1024);
    const int warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
    if (threadIdx.x < STAGES) {
        init_barrier(shared_address(&shared.full[threadIdx.x]), 1);
        init_barrier(shared_address(&shared.empty[threadIdx.x]), GROUPS);
    }
    if (threadIdx.x < GROUPS * SLOTS) {
        init_barrier(shared_address(&shared.arrived[0][threadIdx.x]), 1);
        init_barrier(shared_address(&shared.left[0][threadIdx.x]), 4);
    }
    if (threadIdx.x == 0) init_barrier(shared_address(&shared.multiplied), WARPS);
    fence_barriers();
    wait_for_previous();
    start_next();
    const Routes routes(p.list, p.experts, p.n * p.experts_per_token);
    if (warp < 2) make_plan(shared, p, routes, warp);
    __syncthreads();
    if (warp >= WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(BRINGING));
        if (threadIdx.x % WARP) return;
        if (warp < WARPS + GROUPS) bring_weights(p, shared, warp - WARPS);
        else bring_inputs(p, shared);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING));
    Weights weights = {shared_address(shared.slots[warp / 4]), shared_address(shared.arrived[warp / 4]), shared_address(shared.left[warp / 4])};
    Inputs inputs = {shared_address(shared.stages), shared_address(shared.full), shared_address(shared.empty)};
    for (int product = 0; product < 2; product++) {
        for (uint32_t i = 0; i < shared.counts[product]; i++) {
            const Pass& pass = shared.passes[product][i];
            if (warp / 4 < pass.count) take_pass(p, weights, inputs, product, pass);
            else watch(inputs, p.parts[product].matrix.cols / TILE_COLS);
        }
        if (product == 1) break;
        asm volatile("fence.proxy.async.global;" ::: "memory");
        __threadfence();
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(shared_address(&shared.multiplied));
    }
}
