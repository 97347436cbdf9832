// Both products of the experts' four-bit weights with few tokens each, at the speed of the memory, on Hopper and later. A block takes a
// contiguous part of all rows of all experts, first of the first product, then, when the blocks with the same experts are done with theirs,
// of the second. As many tokens' activations as there is room for lie in its shared memory. Its groups of warps share what it has evenly, down
// to the single tile, and each warp's weights come to shared memory by copies that run ahead, across the ends of rows, experts and products.
// (Bulk copies do the same with more instructions, of which there are too many here.)
// Whoever includes this says how many GROUPS a block has, and how many tokens a pass: what registers and shared memory allow; up to how many
// tokens (ALONE) each warp multiplies for itself, with more a warpgroup does; and what a group takes at a time, a UNIT of row tiles, one for
// each of its warps. Small ones divide among blocks more evenly.
#pragma once

#include "experts.cuh"
#include "hopper.cuh"

struct Few {
    Part parts[2];
    uint32_t* list;            // see `Routes`
    const float* logits;       // the router's, [n, experts], or null where the list is made already
    uint32_t* rounds;          // [blocks]: how often each block was done with its first product
    uint32_t n, experts, experts_per_token;
    uint32_t tokens;           // of a pass, at most: a multiple of eight, not above TOKENS
    uint32_t room;             // bytes of activations that fit in shared memory, at least those of a pass
    uint32_t early;            // bytes of weights that a block asks for before it knows its share, at most: a multiple of 16
};
static_assert(sizeof(Few) == 304);

constexpr int WARPS = UNIT * GROUPS, GROUP = UNIT * WARP; // of a block; threads of a group
static_assert(UNIT == 4 || TOKENS <= ALONE);
constexpr int CHUNK = 4, SLOTS = 2;                      // tiles that a warp brings together, and such chunks of a warp
constexpr int TILE_BYTES = 512, SCALE_BYTES = 64, SLOT_BYTES = CHUNK * (TILE_BYTES + SCALE_BYTES);
constexpr int SUMS = TOKENS / 2;                         // of a thread: its warp's rows, or its warpgroup's, of the tokens of a pass
constexpr int LINE = TILE_COLS * 2;                      // bytes of a row of activations of one column tile
constexpr int MAX_PASSES = 16;                           // of a block in one product

#if __CUDA_ARCH__ >= 900

// Asks for weights of the first product while the memory has nothing else to do, since nobody knows yet who takes what: of all of them as many
// bytes for each block, the first of what would be its share if all experts cost the same, for the second-level cache. By one warp.
__device__ __forceinline__ void ask_early(const Few& p) {
    const Matrix& m = p.parts[0].matrix;
    const size_t tiles = size_t(p.experts) * row_tiles_of(m) * (m.cols / TILE_COLS);
    const size_t begin = tiles * blockIdx.x / gridDim.x * TILE_BYTES, end = tiles * (blockIdx.x + 1) / gridDim.x * TILE_BYTES;
    constexpr uint32_t PIECE = 16384;
    const uint32_t bytes = min(size_t(p.early), end - begin);
#pragma unroll 1
    for (uint32_t at = threadIdx.x % WARP * PIECE; at < bytes; at += WARP * PIECE)
        prefetch_bulk((const uint8_t*)m.weights + begin + at, min(PIECE, bytes - at));
}

// All rows of an expert with some of its tokens. The rows are counted in units, pass after pass.
struct Pass {
    uint32_t expert, first;    // the first of its slots
    int n;                     // its slots
    uint32_t begin, end;       // its first unit, which may be another block's, and the end of what is this block's
    uint32_t place;            // of its activations in shared memory: [column tiles][`rows_of(n)`][LINE]
};
// Passes whose activations are in shared memory together.
struct Phase {
    uint32_t first, last;      // passes
    uint32_t begin, end;       // units
};
struct Plan {
    uint64_t left[GROUPS];     // barriers: this group has left its sums
    Pass passes[2][MAX_PASSES];
    Phase phases[2][MAX_PASSES];
    uint32_t counts[2];        // of phases
    uint32_t makers[2];        // the first and the last of the blocks that make what this one needs for its second product
    uint32_t round;            // of this launch
};
// What Rust reserves beside the activations: weights, sums that groups leave for one another, the plan.
constexpr int HEAD_BYTES = SUMS * GROUP * 4, PLAN_BYTES = 1504;
static_assert(sizeof(Plan) <= PLAN_BYTES);

__device__ __forceinline__ uint32_t units_of(const Matrix& m) { return (m.rows + UNIT * TILE_ROWS - 1) / (UNIT * TILE_ROWS); }
// What a unit of an expert with so many tokens costs, in quarters of what one with few does.
__device__ __forceinline__ uint32_t cost_of(uint32_t tokens) { return tokens <= 8 ? 4 : 5; }
// Rows of a pass's activations in shared memory: from eight on whole eights are read.
__device__ __forceinline__ int rows_of(int n) { return n <= 8 ? n : (n + 7) / 8 * 8; }

// The routes of at most 64 tokens. Each block makes them, in its own shared memory, which takes less time than waiting for one that does.
struct OwnRoutes {
    uint64_t* tokens; // [experts], of each the tokens that chose it; zeros at first
    uint32_t* words;
    // By all threads; a barrier must follow. Where there are more tokens than warps, each warp takes two at a time, if need be the same twice:
    // a step takes its time, and hardly more of it for two.
    __device__ __forceinline__ void choose_experts(const Few& p, const Routes& routes) const {
        for (uint32_t token = threadIdx.x / WARP; token < p.n; token += 2 * WARPS) {
            if (p.experts > WARP) choose_of<2, MAX_EXPERTS / WARP>(p, routes, token);
            else if (p.n > WARPS) choose_of<2, 1>(p, routes, token);
            else choose_of<1, 1>(p, routes, token);
        }
    }
    template <int COUNT, int EACH> __device__ __forceinline__ void choose_of(const Few& p, const Routes& routes, uint32_t token) const {
        const uint32_t step = token + WARPS < p.n ? WARPS : 0;
        auto logit_of = [&](int i, uint32_t expert) { return __ldcg(p.logits + (token + i * step) * p.experts + expert); };
        choose_by<COUNT, EACH>(words, routes, logit_of, token, step, p.experts_per_token);
        __syncwarp();
        const uint32_t rank = threadIdx.x % WARP;
        if (rank >= p.experts_per_token) return;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const uint32_t now = token + i * step;
            // Half of the 64 bits, since for these there is an instruction.
            atomicOr((uint32_t*)(tokens + routes.expert_of_pair(now * p.experts_per_token + rank)) + now / 32, 1u << now % 32);
        }
    }
    // By one warp; a barrier must follow.
    __device__ __forceinline__ void place_experts(const Routes& routes) const {
        const uint32_t lane = threadIdx.x % WARP;
        uint32_t end = 0;
        for (uint32_t base = 0; base < routes.experts; base += WARP) {
            const uint32_t expert = base + lane, count = expert < routes.experts ? __popcll(tokens[expert]) : 0, room = (count + 7) / 8 * 8;
            uint32_t sum = room;
#pragma unroll
            for (int i = 1; i < WARP; i *= 2) {
                uint32_t other = __shfl_up_sync(~0u, sum, i);
                if (lane >= i) sum += other;
            }
            if (expert < routes.experts) words[routes.counts_at() + expert] = count, words[routes.firsts_at() + expert] = end + sum - room;
            end += __shfl_sync(~0u, sum, WARP - 1);
        }
    }
    // By these threads; the first block leaves in memory what the next norm needs.
    __device__ __forceinline__ void place_pairs(const Few& p, const Routes& routes, uint32_t thread, uint32_t threads) const {
        for (uint32_t pair = thread; pair < routes.pairs; pair += threads) {
            const uint32_t expert = routes.expert_of_pair(pair), token = pair / p.experts_per_token;
            const uint32_t slot = routes.first_slot(expert) + __popcll(tokens[expert] & ((1ull << token) - 1));
            words[routes.slots_at() + slot] = pair;
            if (blockIdx.x > 0) continue;
            p.list[routes.pairs_at(0) + pair] = slot;
            p.list[routes.pairs_at(2) + pair] = words[routes.pairs_at(2) + pair];
        }
    }
};

// The passes of the experts in the order of their numbers, a lane per expert.
struct Passes {
    uint32_t count, own;       // slots of the lane's expert; its passes in the lower half, their cost, by the unit, in the upper
    uint32_t before;           // the same for all experts before
    __device__ __forceinline__ Passes(const Few& p, const Routes& routes, uint32_t base) {
        const uint32_t expert = base + threadIdx.x % WARP;
        count = expert < routes.experts ? routes.count(expert) : 0;
        // A division takes long.
        const uint32_t passes = count <= p.tokens ? count > 0 : (count + p.tokens - 1) / p.tokens;
        own = passes * (1 | cost_of(count) << 16);
    }
    // `sum`: of the experts before `base`, and of those before the next ones afterwards.
    __device__ __forceinline__ void add(uint32_t& sum) {
        uint32_t end = own;
#pragma unroll
        for (int i = 1; i < WARP; i *= 2) {
            uint32_t other = __shfl_up_sync(~0u, end, i);
            if (threadIdx.x % WARP >= i) end += other;
        }
        before = sum + end - own;
        sum += __shfl_sync(~0u, end, WARP - 1);
    }
};

// What this block does of a product. By one warp.
__device__ __forceinline__ void make_plan(Plan& plan, const Few& p, const Routes& routes, uint32_t part) {
    const Matrix& m = p.parts[part].matrix;
    const uint32_t lane = threadIdx.x % WARP, units = units_of(m), blocks = gridDim.x;
    uint32_t all = 0;
#pragma unroll 1
    for (uint32_t base = 0; base < routes.experts; base += WARP) all += Passes(p, routes, base).own >> 16;
    all = __reduce_add_sync(~0u, all);
    // The units of all passes, one after the other, that begin before the block's share of all cost does, and before that share ends.
    uint32_t begin = 0, end = 0, sum = 0;
#pragma unroll 1
    for (uint32_t base = 0; base < routes.experts; base += WARP) {
        Passes now(p, routes, base);
        now.add(sum);
        const uint32_t one = cost_of(now.count), from = (now.before >> 16) * units;
        auto units_before = [&](uint32_t block) {
            const uint32_t share = all * units * block / blocks;
            return share > from ? min((share - from + one - 1) / one, (now.own & 0xffff) * units) : 0;
        };
        begin += units_before(blockIdx.x), end += units_before(blockIdx.x + 1);
    }
    begin = __reduce_add_sync(~0u, begin), end = __reduce_add_sync(~0u, end);
    const uint32_t first = begin / units, last = begin < end ? (end + units - 1) / units : first;
    Pass* passes = plan.passes[part];
    // Where the passes from the first to the last begin and end among all cost.
    uint32_t cost_begin = 0, cost_end = 0;
    sum = 0;
#pragma unroll 1
    for (uint32_t base = 0; base < routes.experts; base += WARP) {
        Passes now(p, routes, base);
        now.add(sum);
        const uint32_t number = now.before & 0xffff, over = min(number + (now.own & 0xffff), last);
        for (uint32_t pass = max(number, first); pass < over; pass++) {
            const uint32_t before = pass - number, slots = before * p.tokens, cost = (now.before >> 16) + before * cost_of(now.count);
            passes[pass - first] = {base + lane, routes.first_slot(base + lane) + slots, int(min(now.count - slots, p.tokens)), pass * units,
                min((pass + 1) * units, end), 0};
            if (pass == first) cost_begin = cost;
            if (pass + 1 == last) cost_end = cost + cost_of(now.count);
        }
    }
    cost_begin = __reduce_max_sync(~0u, cost_begin), cost_end = __reduce_max_sync(~0u, cost_end);
    __syncwarp();
    if (lane) return;
    // Of the first product blocks share the same experts in the same way.
    if (part == 1) plan.makers[0] = cost_begin * blocks / max(all, 1), plan.makers[1] = min(cost_end * blocks / max(all, 1), blocks - 1);
    uint32_t phases = 0, used = 0;
    for (uint32_t i = 0; i < last - first; i++) {
        const uint32_t bytes = (rows_of(passes[i].n) * m.cols * 2 + 1023) / 1024 * 1024;
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

// Where a group is in its share of a phase.
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
        const int all = (now.end - now.begin) * columns, begin = begin_of(all, group());
        left = begin_of(all, group() + 1) - begin;
        unit = now.begin + begin / columns, column = begin % columns, pass = now.first;
        if (left > 0) find_pass();
    }
    static __device__ __forceinline__ int group() { return threadIdx.x / GROUP; }
    static __device__ __forceinline__ int begin_of(int all, int group) { return all * group / GROUPS; }
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
    __device__ __forceinline__ uint32_t row_tile() const { return (unit - now().begin) * UNIT + threadIdx.x / WARP % UNIT; }
};

// A warp's weights, which the cursor `ahead` brings through all phases of both products.
struct Weights {
    Cursor ahead;
    const uint8_t *weights, *scales; // of the cursor's row tile
    uint64_t policy;
    uint32_t slot, over;             // addresses in shared memory: the oldest chunk, and the end of all
    // To the first phase from this one on of which this group has a share.
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

// Where a lane's row of the eight by eight matrices is that it loads for `multiply_alone`, from the beginning of the activations.
__device__ __forceinline__ uint32_t matrix_row(int n) {
    const uint32_t row = min(threadIdx.x % 8, n - 1), matrix = threadIdx.x % WARP / 8;
    return row * LINE + ((matrix ^ row) << 4);
}

// This warp's row tile alone: d[16 rows][N tokens] += a[16][64] b[64][N]. `words`, `scales`: the tile; `b`: see `matrix_row`.
template <int N> __device__ __forceinline__ void multiply_alone(float (&d)[SUMS], uint32_t words, uint32_t scales, uint32_t b) {
    const Tile<FP4> tile = load_tile(words, scales);
    uint32_t x[2][N / 8][4], scale[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int c = 0; c < N / 8; c++) load_matrices(x[h][c], (b ^ 64 * h) + c * 8 * LINE);
    }
    tile.scale(scale);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t a[4];
        tile.fragment(j, scale, a);
#pragma unroll
        for (int c = 0; c < N / 8; c++)
            Number<FP4>::multiply((float(&)[4])d[4 * c], a, x[j / 2][c][j % 2 * 2], x[j / 2][c][j % 2 * 2 + 1]);
    }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// The row tiles of a warpgroup together: d[64 rows][N tokens] += a[64][64] b[64][N]; `b` as `Pass::place` says, `i` tiles further.
template <int N> __device__ __forceinline__ void multiply_together(float (&d)[SUMS], const uint32_t (&a)[4][4], uint32_t b, int i) {
    begin_products();
#pragma unroll
    for (int j = 0; j < 4; j++) multiply<FP4, N>(d, a[j], descriptor(descriptor_of(b), i * N * LINE + 32 * j));
    commit_products();
}
constexpr bool TOGETHER = true;
#else
template <int N> __device__ __forceinline__ void multiply_together(float (&)[SUMS], const uint32_t (&)[4][4], uint32_t, int) {}
constexpr bool TOGETHER = false;
#endif

// The sums over the next `count` column tiles, of up to N tokens. Few of them a warp multiplies alone, which takes fewer instructions; with
// many, shared memory is too slow for what each warp loads.
template <int N> __device__ __forceinline__ void multiply_tiles(float (&d)[SUMS], const Few& p, Weights& weights, uint32_t b, int n, int count) {
    auto words = [&](int i) { return weights.slot + i * TILE_BYTES; };
    auto scales = [&](int i) { return weights.slot + CHUNK * TILE_BYTES + i * SCALE_BYTES; };
    if constexpr (N <= ALONE || !TOGETHER) {
        const int step = rows_of(n) * LINE;
        b += matrix_row(n);
        for (; count > 0; count -= CHUNK) {
            wait_for_copies<SLOTS - 1>();
            __syncwarp();
#pragma unroll
            for (int i = 0; i < CHUNK; i++, b += step) {
                if (i >= count) break;
                multiply_alone<N>(d, words(i), scales(i), b);
            }
            __syncwarp();
            weights.bring(p);
        }
        return;
    }
    // The same in all lanes, and the compiler should know.
    b = __reduce_or_sync(~0u, b), count = __reduce_or_sync(~0u, count);
    uint32_t a[2][4][4];
    for (; count >= CHUNK; count -= CHUNK, b += CHUNK * N * LINE) {
        wait_for_copies<SLOTS - 1>();
        __syncwarp();
        decode_shared(words(0), scales(0), a[0]);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            multiply_together<N>(d, a[i % 2], b, i);
            // While the tensor cores are at work.
            if (i + 1 < CHUNK) {
                decode_shared(words(i + 1), scales(i + 1), a[(i + 1) % 2]);
            } else {
                __syncwarp();
                weights.bring(p);
            }
            wait_for_products<0>();
        }
    }
    if (count == 0) return;
    wait_for_copies<SLOTS - 1>();
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        decode_shared(words(i), scales(i), a[0]);
        multiply_together<N>(d, a[0], b, 0);
        wait_for_products<0>();
        b += N * LINE;
    }
    __syncwarp();
    weights.bring(p);
}

// The activations of a phase, on their way to shared memory as one group of copies. By all threads.
__device__ __forceinline__ void bring_inputs(const Few& p, const Routes& routes, const Plan& plan, int part, const Phase& phase, uint32_t to) {
    const Part& now = p.parts[part];
    const int pieces = now.matrix.cols / 8;
    for (uint32_t i = phase.first; i < phase.last; i++) {
        const Pass& pass = plan.passes[part][i];
        const int stride = rows_of(pass.n) * LINE;
        // Four warps for each row.
        for (int warp = threadIdx.x / WARP; warp < 4 * pass.n; warp += WARPS) {
            const int row = warp / 4;
            const uint32_t slot = pass.first + row, from = part == 0 ? routes.pair(slot) / p.experts_per_token : slot;
            const uint16_t* inputs = now.input + size_t(from) * now.matrix.cols;
            for (int piece = threadIdx.x % (4 * WARP); piece < pieces; piece += 4 * WARP)
                copy_async(to + pass.place + piece / 8 * stride + row * LINE + ((piece % 8 ^ row % 8) << 4), inputs + piece * 8);
        }
    }
    commit_copies();
}
// When they have come.
template <int N> __device__ __forceinline__ void wait_for_inputs() {
    wait_for_copies<N>();
    // Tensor cores read what was written here.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Says that this block is done with the first product, and waits for those whose results it needs. They must all be at work at a time, and
// every launch have as many.
__device__ __forceinline__ void wait_for_makers(const Few& p, const Plan& plan) {
    __syncthreads();
    // With the barriers before and after, what one thread releases and acquires is what all have written, and may read.
    if (threadIdx.x == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p.rounds + blockIdx.x), "r"(plan.round) : "memory");
    for (uint32_t block = plan.makers[0] + threadIdx.x; block <= plan.makers[1]; block += WARPS * WARP) {
        uint32_t seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(p.rounds + block) : "memory");
        while (int(seen - plan.round) < 0);
    }
    __syncthreads();
}

// This group's share of a phase. Where a unit is shared, those that do not begin it leave their sums for the one that does: it is
// the first thing that they do.
__device__ __forceinline__ void multiply_phase(
    const Few& p, Weights& weights, int part, int number, int phase, uint32_t inputs, float* heads, uint32_t left_barriers) {
    Cursor at;
    at.plan = weights.ahead.plan;
    at.start(p, part, phase);
    const int group = Cursor::group(), own = threadIdx.x % GROUP;
    if (at.left == 0 || at.column == 0) arrive(left_barriers + 8 * group);
    const Part& now = p.parts[part];
    const uint32_t row_tiles = (now.matrix.rows + TILE_ROWS - 1) / TILE_ROWS;
    while (at.left > 0) {
        const Pass& pass = at.now();
        const uint32_t row_tile = at.row_tile(), unit = at.unit;
        const int n = pass.n, from = at.column, count = min(at.columns - from, at.left);
        const uint32_t first = pass.first;
        const bool mine = row_tile < row_tiles;
        Affine affine = {0, 0, 0};
        if (mine) affine.load(now.epilogue, now.matrix, pass.expert, row_tile, lane_row());
        float d[SUMS] = {};
        const uint32_t b = inputs + pass.place + from * rows_of(n) * LINE;
        if (n <= 8) multiply_tiles<8>(d, p, weights, b, n, count);
        else if (TOKENS == 16 || n <= 16) multiply_tiles<16>(d, p, weights, b, n, count);
        else multiply_tiles<24>(d, p, weights, b, n, count);
        at.move(count);
        if (from > 0) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) heads[(group * SUMS + i) * GROUP + own] = d[i];
            arrive(left_barriers + 8 * group);
            continue;
        }
        if (count < at.columns) {
            const Phase& whole = at.plan->phases[part][phase];
            const int all = (whole.end - whole.begin) * at.columns, over = (unit + 1 - whole.begin) * at.columns;
            for (int other = group + 1; other < GROUPS && Cursor::begin_of(all, other) < over; other++) {
                if (Cursor::begin_of(all, other) == Cursor::begin_of(all, other + 1)) continue;
                wait_barrier(left_barriers + 8 * other, number % 2);
#pragma unroll
                for (int i = 0; i < SUMS; i++) d[i] += heads[(other * SUMS + i) * GROUP + own];
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
    extern __shared__ __align__(1024) uint8_t shared[]; // the activations, the weights, the heads of groups 1 .., the plan
    const uint32_t inputs = shared_address(shared), warp = threadIdx.x / WARP;
    float* heads = (float*)(shared + p.room + WARPS * SLOTS * SLOT_BYTES) - HEAD_BYTES / 4;
    Plan& plan = *(Plan*)(shared + p.room + WARPS * SLOTS * SLOT_BYTES + (GROUPS - 1) * HEAD_BYTES);
    const uint32_t left_barriers = shared_address(plan.left);
    Weights weights;
    weights.ahead.plan = &plan;
    weights.policy = read_once();
    weights.slot = inputs + p.room + warp * SLOTS * SLOT_BYTES, weights.over = weights.slot + SLOTS * SLOT_BYTES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < GROUPS; i++) init_barrier(left_barriers + 8 * i, GROUP);
        fence_barriers();
    }
    OwnRoutes own;
    own.tokens = (uint64_t*)((uint8_t*)&plan + PLAN_BYTES), own.words = (uint32_t*)(own.tokens + p.experts);
    const Routes routes(p.logits ? own.words : p.list, p.experts, p.n * p.experts_per_token);
    if (p.logits)
        for (uint32_t i = threadIdx.x; i < p.experts; i += WARPS * WARP) own.tokens[i] = 0;
    if (warp == 1) ask_early(p);
    __syncthreads();
    wait_for_previous();
    start_next();
    if (threadIdx.x == 0) plan.round = __ldcg(p.rounds + blockIdx.x) + 1;
    if (p.logits) {
        own.choose_experts(p, routes);
        __syncthreads();
        if (warp == 0) own.place_experts(routes);
        __syncthreads();
    }
    if (warp < 2) make_plan(plan, p, routes, warp);
    else if (p.logits) own.place_pairs(p, routes, threadIdx.x - 2 * WARP, (WARPS - 2) * WARP);
    __syncthreads();
    // The first activations before the weights, behind which they would have to wait.
    bool brought = plan.counts[0] > 0;
    if (brought) bring_inputs(p, routes, plan, 0, plan.phases[0][0], inputs);
    weights.enter(p, 0, 0);
    // As all that runs but once, this is short rather than in one line: code comes from far.
#pragma unroll 1
    for (int i = 0; i < SLOTS; i++) weights.bring(p);
    int number = 0;
    for (int part = 0; part < 2; part++) {
        if (part == 1) wait_for_makers(p, plan);
        for (int phase = 0; phase < int(plan.counts[part]); phase++, number++) {
            if (brought) {
                wait_for_inputs<SLOTS>();
            } else {
                // Everybody is done with the activations before.
                __syncthreads();
                bring_inputs(p, routes, plan, part, plan.phases[part][phase], inputs);
                wait_for_inputs<0>();
            }
            brought = false;
            __syncthreads();
            multiply_phase(p, weights, part, number, phase, inputs, heads, left_barriers);
        }
    }
#endif
}
