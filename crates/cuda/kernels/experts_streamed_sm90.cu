// Both products of the experts' four-bit weights with more than a few tokens each, on Hopper: a block takes some rows of some experts, first
// of the first product, then of the second, where it waits only for the first product of the same expert. Other than in experts_few.cuh all
// tokens of an expert, or many, take part in its products at once, so that each weight is decoded as rarely as can be, and they are too many
// for their activations to lie in shared memory: those come some column tiles at a time for all warpgroups, each of which has 128 rows. What
// comes is brought by warps of their own, by bulk copies that run ahead, the weights across the ends of passes and products.
#include "experts.cuh"
#include "hopper.cuh"

struct Streamed {
    Part parts[2];             // the inputs are stacked, a row per slot
    const uint32_t* list;      // see `Routes`
    // [experts], units of the first product that are done, and of the second that know it; then passes that blocks have asked for. All are
    // zero before and after.
    uint32_t* done;
    uint32_t n, experts, experts_per_token;
    uint32_t stack;            // of both inputs
};
static_assert(sizeof(Streamed) == 288);

constexpr int GROUPS = 3, WARPS = 4 * GROUPS;            // that multiply
constexpr int THREADS = (GROUPS + 1) * 128;              // one warp more for each warpgroup's weights, and one for the activations
// Registers of a thread: what the block begins with is divided anew, and there is no more to be had.
constexpr int REGISTERS = 65536 / THREADS, MULTIPLYING = 152, BRINGING = 56;
static_assert(GROUPS * MULTIPLYING + BRINGING <= (GROUPS + 1) * REGISTERS);
constexpr int EACH = 2, UNIT = 4 * EACH;                 // row tiles of a warp and of a warpgroup in a pass
constexpr int TOKENS = 88, SUMS = TOKENS / 2;            // of a pass; of a thread: 64 rows of its tokens
constexpr int CHUNK = 3;                                 // column tiles that come together
constexpr int TILE_BYTES = 512, SCALE_BYTES = 64;
constexpr int SCALES = UNIT * CHUNK * TILE_BYTES, SLOT_BYTES = SCALES + UNIT * CHUNK * SCALE_BYTES;
constexpr int LINE = TILE_COLS * 2;                      // bytes of a row of activations of one column tile
constexpr int STAGE_BYTES = CHUNK * TOKENS * LINE;
constexpr int SLOTS = 3, STAGES = 3;                     // chunks of a warpgroup's weights, and of activations
constexpr int MAX_PARTS = 512;                           // of all experts' tokens
constexpr int PASSES = 8;                                // of a block that are known at a time

// Tokens of an expert that take part in a pass together.
struct Tokens {
    uint32_t first;            // slot
    uint8_t expert, n, parts;  // how many, and in how many such parts all of the expert's are
};
// GROUPS units of an expert in one of the products, or fewer, with some of its tokens.
struct Pass {
    Tokens tokens;
    uint32_t product;
    uint32_t unit, count;      // warpgroup g has the one of number `unit` + g; the count is zero when there are no more passes
};
struct Shared {
    uint8_t stages[STAGES][STAGE_BYTES];         // [column tiles][tokens, rounded up to eights][LINE]
    uint8_t slots[GROUPS][SLOTS][SLOT_BYTES];    // [row tiles][column tiles]: codes, then scales
    uint64_t full[STAGES], empty[STAGES];        // barriers
    uint64_t arrived[GROUPS][SLOTS], left[GROUPS][SLOTS];
    uint64_t finished;                           // a pass
    // A pass was found; it is finished and told, and the other warpgroups' bringers have seen it.
    uint64_t known[PASSES], over[PASSES];
    Pass passes[PASSES];
    uint32_t counts[MAX_EXPERTS];                // of parts, and above, the tokens of each
    uint32_t all, smaller;                       // parts, and those of which the second product's passes have a unit less
    uint32_t each[2];                            // units of a pass of each product, at most
    Tokens parts[MAX_PARTS];                     // those with the most first
};
// What Rust reserves, room to align it to 1024 bytes included.
static_assert(sizeof(Shared) + 1024 <= 227 * 1024 && STAGE_BYTES % 1024 == 0);

__device__ __forceinline__ uint32_t units_of(const Matrix& m) { return (row_tiles_of(m) + UNIT - 1) / UNIT; }

// Passes of a product for one part, of which each has so many units.
__device__ __forceinline__ uint32_t passes_of(const Streamed& p, int product, uint32_t each = GROUPS) {
    return (units_of(p.parts[product].matrix) + each - 1) / each;
}

// How the experts' tokens are divided. By all threads; a barrier must follow. An expert's tokens are cut into parts of equal size. Where a
// product has no more passes than there are blocks, they have as few units as leave it so. As far as that makes no more rounds of all blocks,
// the second product's last passes have a unit less.
__device__ __forceinline__ void make_plan(Shared& shared, const Streamed& p, const Routes& routes) {
    static_assert(THREADS >= MAX_EXPERTS);
    const uint32_t expert = threadIdx.x;
    uint32_t count = 0, slot = 0, size = 0, parts = 0;
    if (expert < p.experts) {
        count = routes.count(expert), slot = routes.first_slot(expert);
        parts = (count + TOKENS - 1) / TOKENS;
        size = parts ? (count + 8 * parts - 1) / (8 * parts) * 8 : 0;
        shared.counts[expert] = size << 16 | parts;
    }
    __syncthreads();
    if (expert >= p.experts) return;
    uint32_t all = 0, before = 0; // parts of all, and those with more tokens
    for (uint32_t i = 0; i < p.experts; i++) {
        const uint32_t other = shared.counts[i], own = other & 0xffff;
        all += own;
        if (other >> 16 > size || (other >> 16 == size && i < expert)) before += own;
    }
    for (uint32_t i = 0; i < parts; i++)
        shared.parts[before + i] = {slot + i * size, uint8_t(expert), uint8_t(min(count - i * size, size)), uint8_t(parts)};
    if (expert > 0) return;
    uint32_t each[2] = {GROUPS, GROUPS};
#pragma unroll
    for (int product = 0; product < 2; product++) {
#pragma unroll 1
        while (each[product] > 1 && all * passes_of(p, product, each[product] - 1) <= gridDim.x) each[product]--;
        shared.each[product] = each[product];
    }
    const uint32_t passes = all * (passes_of(p, 0, each[0]) + passes_of(p, 1)), last_round = passes % gridDim.x;
    const uint32_t more = passes_of(p, 1, GROUPS - 1) - passes_of(p, 1);
    shared.all = all, shared.smaller = each[1] == GROUPS && last_round && more ? min((gridDim.x - last_round) / more, all) : 0;
}

// This block's pass of number `i`, when it is known.
__device__ __forceinline__ const Pass& pass_of(const Shared& shared, uint32_t i) {
    wait_barrier(shared_address(&shared.known[i % PASSES]), i / PASSES % 2);
    return shared.passes[i % PASSES];
}

// Finds out what this block's pass of number `i` is. By one thread. Blocks ask for one when they have brought the weights of the one before,
// and get them in this order: the first product before the second, and of each the parts with the most tokens first.
__device__ __forceinline__ void find_pass(const Streamed& p, Shared& shared, uint32_t i) {
    // Of the pass that had its place.
    wait_barrier(shared_address(&shared.over[i % PASSES]), i / PASSES % 2 ^ 1);
    const uint32_t whole[2] = {passes_of(p, 0, shared.each[0]), passes_of(p, 1, shared.each[1])};
    const uint32_t large = shared.all - shared.smaller, cut = passes_of(p, 1, GROUPS - 1);
    const uint32_t total = shared.all * whole[0] + large * whole[1] + shared.smaller * cut;
    uint32_t number = blockIdx.x;
    if (i > 0) {
        const uint32_t asked = atomicAdd(p.done + p.experts, 1);
        // Each block that has had one asks in vain once.
        if (asked + 1 == total) p.done[p.experts] = 0;
        number = gridDim.x + asked;
    }
    Pass pass = {};
    if (number < total) {
        uint32_t part = 0, passes = whole[0], each = shared.each[0];
        if (number >= shared.all * whole[0]) {
            number -= shared.all * whole[0], pass.product = 1, passes = whole[1], each = shared.each[1];
            if (number >= large * whole[1]) number -= large * whole[1], part = large, passes = cut, each = GROUPS - 1;
        }
        pass.tokens = shared.parts[part + number / passes];
        pass.unit = number % passes * each;
        pass.count = min(units_of(p.parts[pass.product].matrix) - pass.unit, each);
    }
    shared.passes[i % PASSES] = pass;
    arrive(shared_address(&shared.known[i % PASSES]));
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

// All weights of a warpgroup. By one thread, the first of which finds the passes.
__device__ __forceinline__ void bring_weights(const Streamed& p, Shared& shared, uint32_t group) {
    const uint64_t policy = read_once();
    Turn<SLOTS> now;
    for (uint32_t i = 0;; i++) {
        if (group == 0) find_pass(p, shared, i);
        const Pass pass = pass_of(shared, i);
        if (pass.count == 0) break;
        if (group > 0) arrive(shared_address(&shared.over[i % PASSES]));
        if (group >= pass.count) continue;
        const Matrix& m = p.parts[pass.product].matrix;
        const int columns = m.cols / TILE_COLS, row_tiles = row_tiles_of(m), first = (pass.unit + group) * UNIT;
        // Where there are no more rows, the sums are of what was there before, and nobody's.
        const int rows = min(UNIT, row_tiles - first);
        const size_t tile = size_t(pass.tokens.expert * row_tiles + first) * columns;
        const uint8_t *weights = (const uint8_t*)m.weights + tile * TILE_BYTES, *scales = (const uint8_t*)m.scales + tile * SCALE_BYTES;
        for (int column = 0; column < columns; column += CHUNK, now.next()) {
            const uint32_t full = shared_address(&shared.arrived[group][now.at]), to = shared_address(shared.slots[group][now.at]);
            const int count = min(CHUNK, columns - column);
            wait_barrier(shared_address(&shared.left[group][now.at]), now.parity ^ 1);
            expect_bytes(full, rows * count * (TILE_BYTES + SCALE_BYTES));
#pragma unroll
            for (int r = 0; r < UNIT; r++) {
                if (r >= rows) break;
                copy_bulk(to + r * CHUNK * TILE_BYTES, weights + r * columns * TILE_BYTES, count * TILE_BYTES, full, policy);
                copy_bulk(to + SCALES + r * CHUNK * SCALE_BYTES, scales + r * columns * SCALE_BYTES, count * SCALE_BYTES, full, policy);
            }
            weights += CHUNK * TILE_BYTES, scales += CHUNK * SCALE_BYTES;
        }
    }
}

// The ring of activations, as those see it who take them.
struct Inputs {
    uint32_t stages, full, empty; // addresses
    Turn<STAGES> now;
    uint32_t before;              // the barrier `empty` of the stage before this one
    __device__ __forceinline__ void wait() const { wait_barrier(full + 8 * now.at, now.parity); }
    __device__ __forceinline__ void next() { before = empty + 8 * now.at, now.next(); }
    __device__ __forceinline__ void leave_before() const {
        if (threadIdx.x % 128 == 0) arrive(before);
    }
};

// A warpgroup's sums of a pass. The products of a tile begin while those of the one before are still at work, then the next is decoded. Where
// a branch stands before that, the compiler leaves it all in this order; it may not know that `some` is true.
template <int N> __device__ __forceinline__ void multiply_pass(float (&d)[EACH][SUMS], Weights& weights, Inputs& inputs, int columns, bool some) {
    constexpr int TILES = EACH * CHUNK;
    uint32_t a[2][4][4];
    weights.wait();
    decode(weights.load(0, 0), a[0]);
    for (bool first = true;; columns -= CHUNK, first = false) {
        inputs.wait();
        const uint32_t b = descriptor_of(inputs.stages + inputs.now.at * STAGE_BYTES);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            Tile<FP4> next;
            if (i + 1 < TILES) next = weights.load((i + 1) % EACH, (i + 1) / EACH);
            begin_products();
#pragma unroll
            for (int j = 0; j < 4; j++) multiply<FP4, N>(d[i % EACH], a[i % 2][j], descriptor(b, i / EACH * N * LINE + 32 * j));
            commit_products();
            const bool last = (i + 1) % EACH == 0 && columns <= (i + 1) / EACH;
            if (i + 1 == TILES && !last) {
                weights.leave();
                weights.wait();
                next = weights.load(0, 0);
            }
            wait_for_products<1>();
            if (i == 0 && !first) inputs.leave_before();
            if (last) break;
            if ((i + 1) % EACH == 0 || some) decode(next, a[(i + 1) % 2]);
        }
        inputs.next();
        if (columns <= CHUNK) break;
    }
    wait_for_products<0>();
    inputs.leave_before();
    weights.leave();
}

// What follows the first product: of each lane's outputs its neighbour's are beside, so that they exchange tokens.
__device__ __forceinline__ void finish_first(const float (&d)[EACH][SUMS], const Epilogue& e, const Affine (&affine)[EACH], const Pass& pass) {
    const uint32_t g = lane_row(), t = lane_quarter(), odd = g % 2, row_tile = row_tile_of(pass, 0) % UNIT;
    const uint32_t token = 2 * t + odd, position = product_position(row_tile * 8 + g - odd);
    uint16_t* out = e.out16 + (size_t(row_tile_of(pass, 0) / UNIT) * e.out_stack + pass.tokens.first + token) * TILE_COLS
        + ((position / 8 ^ token) * 8 + position % 8);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        if (8 * j >= pass.tokens.n) break;
        uint32_t y[2]; // by token: both row tiles
#pragma unroll
        for (int i = 0; i < 2; i++) {
            __half v[EACH];
#pragma unroll
            for (int r = 0; r < EACH; r++) {
                const Affine& f = affine[r];
                v[r] = Number<FP4>::from(swiglu(f.first(d[r][4 * j + i]), f.second(d[r][4 * j + 2 + i]), e.limit, e.alpha));
            }
            y[i] = __half_as_ushort(v[0]) | uint32_t(__half_as_ushort(v[1])) << 16;
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
        float* out = e.out + size_t(pass.tokens.first + 2 * lane_quarter()) * rows + row;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            if (8 * j >= pass.tokens.n) break;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float* to = out + size_t(8 * j + i) * rows;
                if (lower) to[0] = affine[r].first(d[r][4 * j + i]);
                if (upper) to[8] = affine[r].second(d[r][4 * j + 2 + i]);
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
        if (row_tile_of(pass, i) < row_tiles) affine[i].load(part.epilogue, part.matrix, pass.tokens.expert, row_tile_of(pass, i), lane_row());
    }
    float d[EACH][SUMS] = {};
    // The same in all lanes, and the compiler should know.
    inputs.now.at = __shfl_sync(~0u, inputs.now.at, 0), inputs.now.parity = __shfl_sync(~0u, inputs.now.parity, 0);
    weights.now.at = __shfl_sync(~0u, weights.now.at, 0), weights.now.parity = __shfl_sync(~0u, weights.now.parity, 0);
    switch ((pass.tokens.n + 7) / 8) {
#define WIDTH(N) case N / 8: multiply_pass<N>(d, weights, inputs, columns, pass.tokens.n > 0); break;
        WIDTH(8) WIDTH(16) WIDTH(24) WIDTH(32) WIDTH(40) WIDTH(48) WIDTH(56) WIDTH(64) WIDTH(72) WIDTH(80) WIDTH(88)
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
        inputs.next();
        inputs.leave_before();
    }
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

// The activations of all passes. By one thread, which also tells the other blocks what this one has done of the first product: soon after the
// next pass has begun, so that it needn't wait for the end of the one before, and before it waits for others itself.
__device__ __forceinline__ void bring_inputs(const Streamed& p, Shared& shared) {
    Turn<STAGES> now;
    uint32_t told = 0; // passes
    auto tell = [&] {
        const Pass& pass = shared.passes[told % PASSES];
        wait_barrier(shared_address(&shared.finished), told % 2);
        if (pass.product == 0) {
            // Written by stores, read by bulk copies.
            asm volatile("fence.proxy.async.global;" ::: "memory");
            __threadfence();
            atomicAdd(p.done + pass.tokens.expert, pass.count);
        }
        arrive(shared_address(&shared.over[told++ % PASSES]));
    };
    uint32_t i = 0;
    for (;; i++) {
        const Pass pass = pass_of(shared, i);
        if (pass.count == 0) break;
        const Tokens tokens = pass.tokens;
        if (pass.product == 1) {
            const uint32_t needed = tokens.parts * units_of(p.parts[0].matrix), all = needed + tokens.parts * units_of(p.parts[1].matrix);
            while (load_acquire(p.done + tokens.expert) < needed)
                if (told < i) tell();
            __threadfence();
            asm volatile("fence.proxy.async.global;" ::: "memory");
            // The last who needs to know leaves a zero.
            if (atomicAdd(p.done + tokens.expert, pass.count) + pass.count == all) p.done[tokens.expert] = 0;
        }
        const Part& part = p.parts[pass.product];
        const int columns = part.matrix.cols / TILE_COLS;
        const uint32_t bytes = (tokens.n + 7) / 8 * 8 * LINE;
        const uint16_t* from = part.input + size_t(tokens.first) * TILE_COLS;
        for (int column = 0; column < columns; column += CHUNK, now.next()) {
            const uint32_t full = shared_address(&shared.full[now.at]), to = shared_address(shared.stages[now.at]);
            const int count = min(CHUNK, columns - column);
            wait_barrier(shared_address(&shared.empty[now.at]), now.parity ^ 1);
            if (told < i && (column == STAGES * CHUNK || column + CHUNK >= columns)) tell();
            expect_bytes(full, count * bytes);
            for (int j = 0; j < count; j++, from += size_t(p.stack) * TILE_COLS) copy_bulk(to + j * bytes, from, bytes, full);
        }
    }
    while (told < i) tell();
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
    if (threadIdx.x == 0) init_barrier(shared_address(&shared.finished), WARPS);
    if (threadIdx.x < PASSES) {
        init_barrier(shared_address(&shared.known[threadIdx.x]), 1);
        // The bringers of weights but the one that finds the passes, and the bringer of inputs, which waits for those who multiply.
        init_barrier(shared_address(&shared.over[threadIdx.x]), GROUPS);
    }
    // Where there are no more rows, the first product finds zeros, but of numbers alone: the second multiplies them by weights that are zeros.
    if (row_tiles_of(p.parts[0].matrix) % UNIT) {
        for (uint32_t i = threadIdx.x; i < sizeof(shared.slots) / 16; i += THREADS) ((uint4*)shared.slots)[i] = make_uint4(0, 0, 0, 0);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    fence_barriers();
    wait_for_previous();
    start_next();
    make_plan(shared, p, Routes(p.list, p.experts, p.n * p.experts_per_token));
    __syncthreads();
    if (warp >= WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(BRINGING));
        if (!elected()) return;
        if (warp < WARPS + GROUPS) bring_weights(p, shared, warp - WARPS);
        else bring_inputs(p, shared);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING));
    Weights weights = {shared_address(shared.slots[warp / 4]), shared_address(shared.arrived[warp / 4]), shared_address(shared.left[warp / 4])};
    Inputs inputs = {shared_address(shared.stages), shared_address(shared.full), shared_address(shared.empty)};
    for (uint32_t i = 0;; i++) {
        const Pass& pass = pass_of(shared, i);
        __syncwarp();
        if (pass.count == 0) break;
        if (warp / 4 < pass.count) take_pass(p, weights, inputs, pass.product, pass);
        else watch(inputs, p.parts[pass.product].matrix.cols / TILE_COLS);
        asm volatile("fence.proxy.async.global;" ::: "memory");
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(shared_address(&shared.finished));
    }
}
