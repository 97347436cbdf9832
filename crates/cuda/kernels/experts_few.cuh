// Both products of the experts' four-bit weights with few tokens each, at the speed of the memory, on Hopper and later. A block takes a
// contiguous part of all rows of all experts, first of the first product, then, when all blocks have arrived, of the second. As many
// tokens' activations as there is room for lie in its shared memory. Its warpgroups share what it has evenly, down to the single tile, and
// each warp's weights come to shared memory by copies that run ahead, across the ends of rows, experts and products. (Bulk copies do the
// same with more instructions, of which there are too many here.)
// Whoever includes this says how many warpgroups a block has, and how many tokens a pass: what registers and shared memory allow.
#pragma once

#include "epilogue.cuh"
#include "hopper.cuh"

struct Part {
    Matrix matrix;
    Epilogue epilogue;
    const uint16_t* input;     // ordered (see `activation_place`): [n, cols], in the second product [slots, cols]
};
static_assert(sizeof(Part) == 128);

struct Few {
    Part parts[2];
    const uint32_t* list;      // see `Routes`
    uint32_t* barrier;         // counts the blocks that arrived, for ever
    uint32_t n, experts, experts_per_token;
    uint32_t tokens;           // of a pass, at most: a multiple of eight, not above TOKENS
    uint32_t room;             // bytes of activations that fit in shared memory, at least those of a pass
    uint32_t whole;            // a unit is one warpgroup's, so that its sums have one order whatever else there is
};
static_assert(sizeof(Few) == 296);

constexpr int WARPS = 4 * GROUPS;                        // a warpgroup has 64 rows at a time
constexpr int UNIT = 4;                                  // row tiles of a warpgroup
constexpr int CHUNK = 4, SLOTS = 2;                      // tiles that a warp brings together, and such chunks of a warp
constexpr int TILE_BYTES = 512, SCALE_BYTES = 64, SLOT_BYTES = CHUNK * (TILE_BYTES + SCALE_BYTES);
constexpr int SUMS = TOKENS / 2;                         // of a thread: 64 rows of the tokens of a pass
constexpr int LINE = TILE_COLS * 2;                      // bytes of a row of activations of one column tile
constexpr int MAX_EXPERTS = 256, MAX_PASSES = 16;        // MAX_PASSES: of a block in one product

#if __CUDA_ARCH__ >= 900

// All rows of an expert with some of its tokens. The rows are counted in units of a warpgroup, pass after pass.
struct Pass {
    uint32_t expert, first;    // the first of its slots
    int n;                     // its slots
    uint32_t begin, end;       // its first unit, which may be another block's, and the end of what is this block's
    uint32_t place;            // of its activations in shared memory: [column tiles][n, rounded up to eights][LINE]
};
// Passes whose activations are in shared memory together.
struct Phase {
    uint32_t first, last;      // passes
    uint32_t begin, end;       // units
};
struct Plan {
    uint64_t left[GROUPS];     // barriers: this warpgroup has left its sums
    Pass passes[2][MAX_PASSES];
    Phase phases[2][MAX_PASSES];
    uint32_t counts[2];        // of phases
};
// What Rust reserves beside the activations: weights, sums that warpgroups leave for one another, the plan.
constexpr int HEAD_BYTES = SUMS * 128 * 4, PLAN_BYTES = 2048;
static_assert(sizeof(Plan) <= PLAN_BYTES);

__device__ __forceinline__ uint32_t units_of(const Matrix& m) { return (m.rows + UNIT * TILE_ROWS - 1) / (UNIT * TILE_ROWS); }
__device__ __forceinline__ int eights(int n) { return (n + 7) / 8 * 8; }

// What this block does of a product. By one warp.
__device__ __forceinline__ void make_plan(Plan& plan, const Few& p, const Routes& routes, uint32_t part) {
    constexpr int EACH = MAX_EXPERTS / WARP;
    const Matrix& m = p.parts[part].matrix;
    const uint32_t lane = threadIdx.x % WARP, units = units_of(m);
    uint32_t count[EACH], slot[EACH], number[EACH], total = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t expert = i * WARP + lane;
        count[i] = expert < routes.experts ? routes.count(expert) : 0;
        slot[i] = expert < routes.experts ? routes.first_slot(expert) : 0;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        number[i] = total;
        if (i * WARP >= routes.experts) continue;
        const uint32_t passes = (count[i] + p.tokens - 1) / p.tokens;
        uint32_t sum = passes;
#pragma unroll
        for (int j = 1; j < WARP; j *= 2) {
            uint32_t other = __shfl_up_sync(~0u, sum, j);
            if (lane >= j) sum += other;
        }
        number[i] = total + sum - passes;
        total += __shfl_sync(~0u, sum, WARP - 1);
    }
    const uint32_t begin = uint64_t(total) * units * blockIdx.x / gridDim.x, end = uint64_t(total) * units * (blockIdx.x + 1) / gridDim.x;
    const uint32_t first = begin / units, last = begin < end ? (end + units - 1) / units : first;
    Pass* passes = plan.passes[part];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t over = min(number[i] + (count[i] + p.tokens - 1) / p.tokens, last);
        for (uint32_t pass = max(number[i], first); pass < over; pass++) {
            const uint32_t before = (pass - number[i]) * p.tokens;
            passes[pass - first] = {i * WARP + lane, slot[i] + before, int(min(count[i] - before, p.tokens)), pass * units,
                min((pass + 1) * units, end), 0};
        }
    }
    __syncwarp();
    if (lane) return;
    uint32_t phases = 0, used = 0;
    for (uint32_t i = 0; i < last - first; i++) {
        const uint32_t bytes = eights(passes[i].n) * m.cols * 2;
        if (i == 0 || used + bytes > p.room) {
            plan.phases[part][phases++] = {i, 0, max(passes[i].begin, begin), 0};
            used = 0;
        }
        passes[i].place = used;
        used += bytes;
        plan.phases[part][phases - 1].last = i + 1, plan.phases[part][phases - 1].end = passes[i].end;
    }
    plan.counts[part] = phases;
}

// Where a warpgroup is in its share of a phase.
struct Cursor {
    const Plan* plan;
    int part, phase, pass;
    uint32_t unit;
    int column, columns;       // column tile of the unit
    int left;                  // column tiles of the share
    __device__ __forceinline__ void start(const Few& p, int part, int phase) {
        this->part = part, this->phase = phase;
        columns = p.parts[part].matrix.cols / TILE_COLS;
        const Phase& now = plan->phases[part][phase];
        const int all = (now.end - now.begin) * columns, begin = begin_of(p, all, columns, group());
        left = begin_of(p, all, columns, group() + 1) - begin;
        unit = now.begin + begin / columns, column = begin % columns, pass = now.first;
        if (left > 0) find_pass();
    }
    static __device__ __forceinline__ int group() { return threadIdx.x / 128; }
    static __device__ __forceinline__ int begin_of(const Few& p, int all, int columns, int group) {
        return p.whole ? all / columns * group / GROUPS * columns : all * group / GROUPS;
    }
    __device__ __forceinline__ const Pass& now() const { return plan->passes[part][pass]; }
    __device__ __forceinline__ void find_pass() {
        while (unit >= now().end) pass++;
    }
    __device__ __forceinline__ void move(int count) {
        column += count, left -= count;
        if (column < columns) return;
        column = 0, unit++;
        if (left > 0) find_pass();
    }
    __device__ __forceinline__ uint32_t row_tile() const { return (unit - now().begin) * UNIT + threadIdx.x / WARP % 4; }
};

// A warp's weights, which the cursor `ahead` brings through all phases of both products.
struct Weights {
    Cursor ahead;
    const uint8_t *weights, *scales; // of the cursor's row tile
    uint64_t policy;
    uint32_t slot, over;             // addresses in shared memory: the oldest chunk, and the end of all
    // To the first phase from this one on of which this warpgroup has a share.
    __device__ __forceinline__ void enter(const Few& p, int part, int phase) {
        ahead.left = 0;
        for (; part < 2; part++, phase = 0) {
            for (; phase < int(ahead.plan->counts[part]); phase++) {
                ahead.start(p, part, phase);
                if (ahead.left == 0) continue;
                locate(p);
                return;
            }
        }
    }
    __device__ __forceinline__ void locate(const Few& p) {
        const Matrix& m = p.parts[ahead.part].matrix;
        const uint32_t row_tiles = (m.rows + TILE_ROWS - 1) / TILE_ROWS;
        // Warps without rows bring others'.
        const size_t first = (size_t(ahead.now().expert) * row_tiles + min(ahead.row_tile(), row_tiles - 1)) * ahead.columns;
        weights = (const uint8_t*)m.weights + first * TILE_BYTES + threadIdx.x % WARP * 16;
        scales = (const uint8_t*)m.scales + first * SCALE_BYTES + threadIdx.x % WARP * 16;
    }
    // A chunk to the place of the oldest, which then is the next one. At the end come empty ones.
    __device__ __forceinline__ void bring(const Few& p) {
        if (ahead.left > 0) {
            const int count = min(CHUNK, min(ahead.columns - ahead.column, ahead.left));
            const uint32_t lane = threadIdx.x % WARP, to = slot + lane * 16;
            const uint8_t *from = weights + ahead.column * TILE_BYTES, *from_scales = scales + ahead.column * SCALE_BYTES;
            if (count == CHUNK) {
#pragma unroll
                for (int i = 0; i < CHUNK; i++) copy_async(to + i * TILE_BYTES, from + i * TILE_BYTES, policy);
            } else {
                for (int i = 0; i < count; i++) copy_async(to + i * TILE_BYTES, from + i * TILE_BYTES, policy);
            }
            if (lane * 16 < count * SCALE_BYTES) copy_async(to + CHUNK * TILE_BYTES, from_scales, policy);
            ahead.move(count);
            if (ahead.left == 0) enter(p, ahead.part, ahead.phase + 1);
            else if (ahead.column == 0) locate(p);
        }
        commit_copies();
        slot += SLOT_BYTES;
        if (slot == over) slot -= SLOTS * SLOT_BYTES;
    }
};

// d[64 rows][N tokens] += a[64][64] b[64][N]; `b` as `Pass::place` says, `i` tiles further.
template <int N> __device__ __forceinline__ void multiply_tile(float (&d)[SUMS], const uint32_t (&a)[4][4], uint32_t b, int i) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    begin_products();
#pragma unroll
    for (int j = 0; j < 4; j++) multiply<FP4, N>(d, a[j], descriptor(descriptor_of(b), i * N * LINE + 32 * j));
    commit_products();
#else
    const uint32_t g = lane_row();
#pragma unroll
    for (int c = 0; c < N / 8; c++) {
        const uint32_t row = b + (i * N + 8 * c + g) * LINE + lane_quarter() * 4;
        float sum[4] = {d[4 * c], d[4 * c + 1], d[4 * c + 2], d[4 * c + 3]};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t lower, upper;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(lower) : "r"(row + ((2 * j ^ g) << 4)));
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(upper) : "r"(row + ((2 * j + 1 ^ g) << 4)));
            Number<FP4>::multiply(sum, a[j], lower, upper);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) d[4 * c + i] = sum[i];
    }
#endif
}

__device__ __forceinline__ void wait_for_tile() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    wait_for_products<0>();
#endif
}

// The sums over the next `count` column tiles.
template <int N> __device__ __forceinline__ void multiply_tiles(float (&d)[SUMS], const Few& p, Weights& weights, uint32_t b, int count) {
    uint32_t a[2][4][4];
    auto decode = [&](int i, uint32_t (&a)[4][4]) {
        decode_shared(weights.slot + i * TILE_BYTES, weights.slot + CHUNK * TILE_BYTES + i * SCALE_BYTES, a);
    };
    for (; count >= CHUNK; count -= CHUNK, b += CHUNK * N * LINE) {
        wait_for_copies<SLOTS - 1>();
        __syncwarp();
        decode(0, a[0]);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            multiply_tile<N>(d, a[i % 2], b, i);
            // While the tensor cores are at work.
            if (i + 1 < CHUNK) {
                decode(i + 1, a[(i + 1) % 2]);
            } else {
                __syncwarp();
                weights.bring(p);
            }
            wait_for_tile();
        }
    }
    if (count == 0) return;
    wait_for_copies<SLOTS - 1>();
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        decode(i, a[0]);
        multiply_tile<N>(d, a[0], b, 0);
        wait_for_tile();
        b += N * LINE;
    }
    __syncwarp();
    weights.bring(p);
}

// The activations of a phase. By all threads.
__device__ __forceinline__ void bring_inputs(const Few& p, const Routes& routes, const Plan& plan, int part, const Phase& phase, uint32_t to) {
    const Part& now = p.parts[part];
    const int pieces = now.matrix.cols / 8;
    for (uint32_t i = phase.first; i < phase.last; i++) {
        const Pass& pass = plan.passes[part][i];
        const int stride = eights(pass.n) * LINE;
        for (int row = threadIdx.x / WARP; row < pass.n; row += WARPS) {
            const uint32_t slot = pass.first + row, from = part == 0 ? routes.pair(slot) / p.experts_per_token : slot;
            const uint16_t* inputs = now.input + size_t(from) * now.matrix.cols;
            for (int piece = threadIdx.x % WARP; piece < pieces; piece += WARP)
                copy_async(to + pass.place + piece / 8 * stride + row * LINE + ((piece % 8 ^ row % 8) << 4), inputs + piece * 8);
        }
    }
    commit_copies();
    wait_for_copies<0>();
    // Tensor cores read what was written here.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// This warpgroup's share of a phase. Where a unit is shared, those that do not begin it leave their sums for the one that does: it is
// the first thing that they do.
__device__ __forceinline__ void multiply_phase(
    const Few& p, Weights& weights, int part, int number, int phase, uint32_t inputs, float* heads, uint32_t left_barriers) {
    Cursor at;
    at.plan = weights.ahead.plan;
    at.start(p, part, phase);
    const int group = Cursor::group(), own = threadIdx.x % 128;
    if (at.left == 0 || at.column == 0) arrive(left_barriers + 8 * group);
    const Part& now = p.parts[part];
    const uint32_t row_tiles = (now.matrix.rows + TILE_ROWS - 1) / TILE_ROWS;
    while (at.left > 0) {
        const Pass& pass = at.now();
        const uint32_t row_tile = at.row_tile(), unit = at.unit;
        const int n = pass.n, from = at.column, count = __reduce_or_sync(~0u, min(at.columns - from, at.left));
        const uint32_t first = pass.first;
        const bool mine = row_tile < row_tiles;
        Affine affine = {0, 0, 0};
        if (mine) affine.load(now.epilogue, now.matrix, pass.expert, row_tile, lane_row());
        float d[SUMS] = {};
        // The same in all lanes, and the compiler should know.
        const uint32_t b = __reduce_or_sync(~0u, inputs + pass.place + from * eights(n) * LINE);
        if (n <= 8) multiply_tiles<8>(d, p, weights, b, count);
        else if (TOKENS == 16 || n <= 16) multiply_tiles<16>(d, p, weights, b, count);
        else multiply_tiles<24>(d, p, weights, b, count);
        at.move(count);
        if (from > 0) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) heads[(group * SUMS + i) * 128 + own] = d[i];
            arrive(left_barriers + 8 * group);
            continue;
        }
        if (count < at.columns) {
            const Phase& whole = at.plan->phases[part][phase];
            const int all = (whole.end - whole.begin) * at.columns, over = (unit + 1 - whole.begin) * at.columns;
            for (int other = group + 1; other < GROUPS && Cursor::begin_of(p, all, at.columns, other) < over; other++) {
                if (Cursor::begin_of(p, all, at.columns, other) == Cursor::begin_of(p, all, at.columns, other + 1)) continue;
                wait_barrier(left_barriers + 8 * other, number % 2);
#pragma unroll
                for (int i = 0; i < SUMS; i++) d[i] += heads[(other * SUMS + i) * 128 + own];
            }
        }
        if (!mine) continue;
        auto finish_as = [&](After kind) {
            Epilogue e = now.epilogue;
            e.kind = kind;
#pragma unroll
            for (int i = 0; i < SUMS / 2; i++) {
                const int column = i / 2 * 8 + 2 * lane_quarter() + i % 2, at = i / 2 * 4 + i % 2;
                if (column < n) finish(e, now.matrix, affine, row_tile, lane_row(), first + column, d[at], d[at + 2]);
            }
        };
        if (part == 0) finish_as(SWIGLU);
        else finish_as(STORE);
    }
}

#endif

__device__ __forceinline__ void experts(const Few& p) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(1024) uint8_t shared[]; // the activations, the weights, the heads of warpgroups 1 .., the plan
    const uint32_t inputs = shared_address(shared), warp = threadIdx.x / WARP;
    float* heads = (float*)(shared + p.room + WARPS * SLOTS * SLOT_BYTES) - HEAD_BYTES / 4;
    Plan& plan = *(Plan*)(shared + p.room + WARPS * SLOTS * SLOT_BYTES + (GROUPS - 1) * HEAD_BYTES);
    const uint32_t left_barriers = shared_address(plan.left);
    Weights weights;
    weights.ahead.plan = &plan;
    weights.policy = read_once();
    weights.slot = inputs + p.room + warp * SLOTS * SLOT_BYTES, weights.over = weights.slot + SLOTS * SLOT_BYTES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < GROUPS; i++) init_barrier(left_barriers + 8 * i, 128);
        fence_barriers();
    }
    wait_for_previous();
    start_next();
    const Routes routes(p.list, p.experts, p.n * p.experts_per_token);
    if (warp < 2) make_plan(plan, p, routes, warp);
    __syncthreads();
    weights.enter(p, 0, 0);
    for (int i = 0; i < SLOTS; i++) weights.bring(p);
    int number = 0;
    for (int part = 0; part < 2; part++) {
        if (part == 1) grid_barrier(p.barrier, gridDim.x);
        for (int phase = 0; phase < int(plan.counts[part]); phase++, number++) {
            // Everybody is done with the activations before.
            __syncthreads();
            bring_inputs(p, routes, plan, part, plan.phases[part][phase], inputs);
            __syncthreads();
            multiply_phase(p, weights, part, number, phase, inputs, heads, left_barriers);
        }
    }
#endif
}
