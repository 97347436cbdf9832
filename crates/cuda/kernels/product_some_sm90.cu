// Dense products with tens to hundreds of tokens on Hopper: each multiprocessor has one block, 128 rows at a time, all tokens.
// Where there are few rows, blocks share the inputs, exchange their sums through the second-level cache, as they lie in registers, and
// each finishes some of the tokens. Each warp brings its weights to shared memory by bulk copies, as many as there is room for before
// the kernel waits for the one before; one warp brings the activations. What runs only once is short or in loops: code that lies in one
// line comes from far, and takes longer than what it does. As the output product it leaves the largest logits, too.
#include "gemm_sm90.cuh"
#include "shared.cuh"

struct Exchanged {
    Matrix matrix;
    const uint16_t* input;     // stacked
    Epilogue epilogue;
    uint8_t* parts;            // by block: sums of eight tokens after eight tokens, 16 bytes of each thread; all bits set before and after
    uint32_t* arrivals;        // STORE: one, zero before and after
    uint64_t* best;            // STORE: [n], the largest logits as `ranked`; zero before and after
    uint32_t* largest;         // STORE: [n], the id of the largest logit, the lowest on a tie, or NO_NUMBER
    uint32_t* told;            // STORE: [n], the same for the host
    uint64_t* bests;           // STORE, where several GPUs have rows of one matrix: [ranks, MAX_EIGHTS * 8] on the first of them, the largest
                               // logits of the rows of each; zero before and after
    uint32_t n;                // tokens
    uint32_t stack;            // of the input
    uint32_t first, all;       // STORE: this GPU's first row, which `matrix` and `epilogue` begin with, and the rows of all
    uint32_t rank, ranks;
};
static_assert(sizeof(Exchanged) == 200);

constexpr int MAX_SHARES = 5;
constexpr int EIGHT_BYTES = THREADS * 16;     // a block's sums of eight tokens
constexpr int MAX_EIGHTS = 32;
constexpr int FILLER = 1;                     // the warp that brings activations

// `HALVES` of up to 128 tokens: room for the rings of activations and weights, and for angles and places in the cache of the tokens that a
// block finishes. It leaves room for a block of the kernel before, without which nothing would be early.
template <int HALVES> struct Sizes {
    static constexpr int MAX_STAGES = 8, ACTIVATIONS = 96 << 10, MAX_SLOTS = 9, RINGS = 192 << 10, TOKENS = HALVES * 64;
    static constexpr int ROTARY = RINGS, PLACES = ROTARY + TOKENS * HEAD * 4, BYTES = PLACES + TOKENS * 4;
};
static_assert(Sizes<1>::BYTES == 213248 && Sizes<2>::BYTES == 229888, "what the launch gives");

// Where somebody is in a ring of places in shared memory.
struct Place {
    int i = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next(int count) {
        if (++i == count) i = 0, parity ^= 1;
    }
};

// Stages of 64 inputs of one half of the tokens, the halves in turn, again and again for all rows. One warp fills them again, some time after
// both warpgroups said that they are done with them, so that it need not wait.
template <int HALVES> struct Activations {
    uint32_t stages, barriers; // addresses; of each stage two barriers: it is full; it is free
    const uint16_t* from;      // the first column tile
    size_t step;               // to the next one
    uint32_t bytes;            // of a stage
    int count;                 // stages
    int column_tiles;
    int left;                  // halves of column tiles to be brought, of all rows together
    int column, half;          // to be brought next
    Place place;               // that is read next
    Place empty;               // that is filled next
    __device__ __forceinline__ uint32_t stage() const { return stages + place.i * bytes; }
    __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
    __device__ __forceinline__ uint32_t free(int stage) const { return barriers + 16 * stage + 8; }
    // By a whole warp, in the order of the stages.
    __device__ __forceinline__ void fill() {
        if (left == 0) return;
        // The phase before that in which it becomes full, which at first is over.
        wait_barrier(free(empty.i), empty.parity ^ 1);
        if (elected()) {
            expect_bytes(full(empty.i), bytes);
            copy_bulk(stages + empty.i * bytes, from + column * step + half * (bytes / 2), bytes, full(empty.i));
        }
        empty.next(count);
        left--;
        if (++half < HALVES) return;
        half = 0;
        if (++column == column_tiles) column = 0;
    }
};

// A warp's tiles of weights, all columns of a row tile after the other. A slot has one chunk of tiles, of four-bit ones with their scales.
template <Format F> struct Weights {
    static constexpr int CHUNK = F == FP4 ? 5 : 1, TILE_BYTES = Tile<F>::VECTORS * 16, SCALE_BYTES = F == FP4 ? WARP * 2 : 0;
    static constexpr int SLOT_BYTES = CHUNK * (TILE_BYTES + SCALE_BYTES);
    uint32_t slots, barriers;  // addresses
    int count;                 // slots
    int column_tiles;          // of a row
    size_t row_step;           // tiles from the end of the columns to their beginning in the next row tile of this warp
    const uint8_t *from, *scales; // of the tile to be brought next
    int left;                  // tiles to be brought
    uint64_t policy;
    int column = 0;            // of the tile to be brought next
    int read = 0, in_chunk = 0; // column of the tile that is read next; its place in its chunk
    bool vacant = true;        // there is a slot to be filled
    Place place = {};          // that is read next
    Place empty = {};          // that is filled next
    // By the whole warp, in the order of the slots.
    __device__ __forceinline__ void fill() {
        if (left == 0 || !vacant) return;
        const int tiles = min(CHUNK, column_tiles - column);
        if (elected()) {
            const uint32_t full = barriers + 8 * empty.i, slot = slots + empty.i * SLOT_BYTES;
            expect_bytes(full, tiles * (TILE_BYTES + SCALE_BYTES));
            copy_bulk(slot, from, tiles * TILE_BYTES, full, policy);
            if (F == FP4) copy_bulk(slot + CHUNK * TILE_BYTES, scales, tiles * SCALE_BYTES, full, policy);
        }
        empty.next(count);
        from += tiles * TILE_BYTES, scales += tiles * SCALE_BYTES, left -= tiles;
        if ((column += tiles) == column_tiles) column = 0, from += row_step * TILE_BYTES, scales += row_step * SCALE_BYTES;
    }
    __device__ __forceinline__ void load(uint32_t (&to)[4][4]) {
        const uint32_t slot = slots + place.i * SLOT_BYTES;
        if (in_chunk == 0) wait_barrier(barriers + 8 * place.i, place.parity);
        if constexpr (F == FP4) {
            decode_shared(slot + in_chunk * TILE_BYTES, slot + CHUNK * TILE_BYTES + in_chunk * SCALE_BYTES, to);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint4 v = load_shared(slot + (j * WARP + threadIdx.x % WARP) * 16);
                to[j][0] = v.x, to[j][1] = v.y, to[j][2] = v.z, to[j][3] = v.w;
            }
        }
        if (CHUNK == 1) {
            place.next(count);
            return;
        }
        const bool last = ++read == column_tiles;
        if (last) read = 0;
        vacant = ++in_chunk == CHUNK || last;
        if (vacant) in_chunk = 0, place.next(count);
    }
};

// One warpgroup's sums over all column tiles. Weights come to registers while those of the column tile before are multiplied. There is little
// in the loop beside the products: what a warp does for 64 inputs must not take longer than they do.
template <Format F, int N, int HALVES> __device__ __forceinline__ void consume(float (&d)[HALVES][64], Weights<F>& weights, Activations<HALVES>& activations, int warp) {
    const int count = activations.column_tiles;
    uint32_t a[2][4][4];
    // Here, not between the products, where the compiler would otherwise put some of it.
#pragma unroll
    for (int i = 0; i < HALVES * 64; i++) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i / 64][i % 64]));
    uint32_t before = 0; // the barrier that says that the stage before is free
    bool later = false;  // there were two stages before
    auto leave = [&] {
        if (before && threadIdx.x % 128 == 0) arrive(before);
    };
    auto step = [&](bool last, uint32_t (&now)[4][4], uint32_t (&then)[4][4]) {
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            wait_barrier(activations.full(activations.place.i), activations.place.parity);
            begin_products();
            const uint32_t b = descriptor_of(activations.stage());
#pragma unroll
            for (int j = 0; j < 4; j++) multiply<F, N>(d[half], now[j], descriptor(b, 32 * j));
            commit_products();
            wait_for_products<1>();
            leave();
            if (warp == FILLER && later) activations.fill();
            later = before;
            before = activations.free(activations.place.i);
            activations.place.next(activations.count);
        }
        // Its weights are in registers since its products began.
        weights.fill();
        if (!last) weights.load(then);
    };
    weights.load(a[0]);
    for (int k = 0; k < count; k += 2) {
        step(k + 1 == count, a[0], a[1]);
        if (k + 1 < count) step(k + 2 == count, a[1], a[0]);
    }
    wait_for_products<0>();
    leave();
    if (warp == FILLER) {
        if (later) activations.fill();
        activations.fill();
    }
}

// Where a warp's rows of a token go: query, or key or value in the cache.
struct Outputs {
    uint8_t* base;
    bool query, rotates, bytes; // `bytes`: E4M3
    uint32_t shift, mask;       // of a place: its block; its token in the block. A query's place is its token, alone in a block
    uint32_t block_step, step;  // in numbers, not bytes
    uint32_t second;            // from the first number of a pair to the second
    float scale;
    __device__ __forceinline__ Outputs(const Epilogue& e, uint32_t row_tile, uint32_t row, uint32_t second_row) {
        const uint32_t head = row_tile / 4, kv = head - e.query_heads, first = row % HEAD;
        query = head < e.query_heads, rotates = kv < e.kv_heads || query, bytes = !query && e.out_format == CACHE_E4M3;
        const bool value = !rotates;
        static_assert(BLOCK_TOKENS == 16);
        shift = query ? 0 : 4, mask = query ? 0 : 15;
        block_step = query ? e.query_heads * HEAD : e.kv_heads * BLOCK_TOKENS * HEAD, step = value ? 1 : HEAD;
        second = (second_row - row) * (value ? BLOCK_TOKENS : 1);
        scale = value ? e.alpha : e.limit;
        const uint32_t at = query ? head * HEAD + first : kv % e.kv_heads * (BLOCK_TOKENS * HEAD) + first * (value ? BLOCK_TOKENS : 1);
        base = (uint8_t*)(query ? e.out16 : value ? e.values : e.keys) + at * (bytes ? 1 : 2);
    }
    __device__ __forceinline__ void store(bool inside, uint32_t token, uint32_t slot, const float* angle, float a, float b) const {
        if (rotates) {
            const float2 pair = rotated(a, b, angle[0], angle[HEAD / 2]);
            a = pair.x, b = pair.y;
        }
        const uint32_t place = query ? token : slot;
        const size_t at = size_t(place >> shift) * block_step + (place & mask) * step;
        if (bytes) {
            if (inside) base[at] = e4m3(a / scale), base[at + second] = e4m3(b / scale);
        } else {
            uint16_t* to = (uint16_t*)base + at;
            if (inside) to[0] = activation(BF16, a), to[second] = activation(BF16, b);
        }
    }
};

// Sums that one block gives another are words that had all bits set until they came, so that none has to say that they did. A sum never is
// such a word: what is no number comes out of an addition as another.
__device__ __forceinline__ float4 sums_of(const float* d) { return make_float4(d[0] + 0.f, d[1] + 0.f, d[2] + 0.f, d[3] + 0.f); }
// Without a branch, of which there would be one for each.
__device__ __forceinline__ void give(uint8_t* to, bool given, const float4& v) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to), "f"(v.x), "f"(v.y),
                 "f"(v.z), "f"(v.w), "r"(uint32_t(given))
                 : "memory");
}

// Of pairs of a value and an id the larger value's, the lower id of equal ones; what is no number is larger.
__device__ __forceinline__ void take_larger(float& v, uint32_t& id, float other, uint32_t other_id) {
    const float most = larger(v, other);
    id = min(v == most ? id : ~0u, other == most ? other_id : ~0u), v = most;
}

// The larger of what a warp had of each token and of its sixteen rows, of which this thread has `row` and `row + 8`.
template <int HALVES> __device__ __forceinline__ void find_largest(const float (&d)[HALVES][64], int width, uint32_t row, uint64_t* best) {
    const int g = lane_row(), t = lane_quarter();
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
#pragma unroll
        for (int tokens = 0; tokens < 128; tokens += 32) {
            if (tokens >= width) break;
            float v[8];
            uint32_t id[8];
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float *a = d[half] + tokens / 2 + k / 2 * 4 + k % 2;
                // Zero times what is infinite or no number is no number.
                v[k] = fmaf(a[0], 0.f, fmaf(a[2], 0.f, fmaxf(a[0], a[2])));
                id[k] = a[0] == v[k] ? row : row + 8;
            }
            // The eight threads that have these tokens give one another half of what they have, until each has one: that of its row.
#pragma unroll
            for (int count = 4; count; count /= 2) {
                const bool upper = g & count;
#pragma unroll
                for (int k = 0; k < count; k++) {
                    const float given = __shfl_xor_sync(~0u, upper ? v[k] : v[k + count], 4 * count);
                    const uint32_t given_id = __shfl_xor_sync(~0u, upper ? id[k] : id[k + count], 4 * count);
                    v[k] = upper ? v[k + count] : v[k], id[k] = upper ? id[k + count] : id[k];
                    take_larger(v[k], id[k], given, given_id);
                }
            }
            const int token = tokens + g / 2 * 8 + 2 * t + g % 2;
            uint64_t& kept = best[half * width + token];
            if (token < width) kept = max(kept, uint64_t(ranked(v[0], id[0])));
        }
    }
}

// `blockIdx.x`: 128 rows, with STORE every `gridDim.x`, else those of every so many row tiles: the rows of values, which take long to be
// written, are then spread over all blocks. `blockIdx.y`: a share of the inputs.
template <After KIND, Format F, int HALVES> __device__ __forceinline__ void product(const Exchanged& p) {
    using S = Sizes<HALVES>;
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ __align__(8) uint64_t barriers[2 * S::MAX_STAGES + ROW_TILES * S::MAX_SLOTS];
    const Matrix& m = p.matrix;
    Epilogue e = p.epilogue;
    e.kind = KIND; // the same, and the compiler should know
    const int column_tiles = m.cols / TILE_COLS, row_tiles = row_tiles_of(m), n = p.n, rank = blockIdx.y, ranks = gridDim.y;
    const int begin = column_tiles * rank / ranks, count = column_tiles * (rank + 1) / ranks - begin;
    const int blocks = (row_tiles + ROW_TILES - 1) / ROW_TILES, rounds = KIND == STORE ? (blocks - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x) : 1;
    // The same in all lanes, and the compiler should know.
    const int warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
    const int row_tile = KIND == STORE ? blockIdx.x * ROW_TILES + warp : warp * gridDim.x + blockIdx.x;
    const int width = (n + 16 * HALVES - 1) / (16 * HALVES) * 16; // tokens of a half
    const uint32_t stage_bytes = width * LINE, barrier = shared_address(barriers);
    const int stages = min(S::MAX_STAGES, int(S::ACTIVATIONS / stage_bytes));
    Activations<HALVES> activations = {shared_address(shared), barrier, p.input + size_t(begin) * p.stack * TILE_COLS, size_t(p.stack) * TILE_COLS,
                                       stage_bytes, stages, count, HALVES * rounds * count, 0, 0};
    using W = Weights<F>;
    const int slots = min(S::MAX_SLOTS, int((S::RINGS - stages * stage_bytes) / (ROW_TILES * W::SLOT_BYTES)));
    // Of rows that are not there, others.
    const size_t tile = size_t(min(row_tile, row_tiles - 1)) * column_tiles + begin;
    W weights = {activations.stages + S::RINGS - (warp + 1) * slots * W::SLOT_BYTES, barrier + 8 * (2 * S::MAX_STAGES + warp * S::MAX_SLOTS), slots,
                 count, size_t(gridDim.x) * ROW_TILES * column_tiles - count, (const uint8_t*)m.weights + tile * W::TILE_BYTES,
                 (const uint8_t*)m.scales + tile * W::SCALE_BYTES, rounds * count, read_once()};
    if (threadIdx.x < S::MAX_STAGES) init_barrier(activations.full(threadIdx.x), 1), init_barrier(activations.free(threadIdx.x), GROUPS);
    if (threadIdx.x % WARP < slots) init_barrier(weights.barriers + 8 * (threadIdx.x % WARP), 1);
    fence_barriers();
    __syncwarp();
    for (int i = 0; i < slots; i++) weights.fill();
    __syncthreads();
    wait_for_previous();
    start_next();
    if (warp == FILLER)
        for (int i = 0; i < stages; i++) activations.fill();
    const int eights = (n + 7) / 8, first = eights * rank / ranks, own = eights * (rank + 1) / ranks - first; // that this block finishes
    float* rotary = (float*)(shared + S::ROTARY);
    uint32_t* places = (uint32_t*)(shared + S::PLACES);
    if (KIND == QKV) {
        const int tokens = min(8 * own, n - 8 * first);
        for (int i = threadIdx.x; i < tokens * (HEAD / 4); i += THREADS)
            copy_async(shared_address(rotary + 4 * i), e.rotary + size_t(first) * 8 * HEAD + 4 * i);
        if (threadIdx.x < tokens)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(places + threadIdx.x)), "l"(e.slots + 8 * first + threadIdx.x) : "memory");
        commit_copies();
    }
    const int g = lane_row(), t = lane_quarter();
#define WIDTH(N) \
    if (width == N) consume<F, N, HALVES>(d, weights, activations, warp);
#define WIDTHS                                                             \
    if constexpr (HALVES == 1) { WIDTH(16) WIDTH(32) WIDTH(48) WIDTH(64) } \
    WIDTH(80) WIDTH(96) WIDTH(112) WIDTH(128)
    if constexpr (KIND == STORE) {
        uint64_t* best = (uint64_t*)(shared + S::ROTARY); // [warps][tokens]
        constexpr int TOKENS = HALVES * 128;
        static_assert(ROW_TILES * TOKENS * sizeof(uint64_t) <= S::BYTES - S::ROTARY && TOKENS <= THREADS);
        for (int i = threadIdx.x % WARP; i < TOKENS; i += WARP) best[warp * TOKENS + i] = 0;
        __syncwarp();
        for (int round = 0; round < rounds; round++) {
            float d[HALVES][64];
            WIDTHS
            const int tile = (blockIdx.x + round * gridDim.x) * ROW_TILES + warp, row = tile * TILE_ROWS + g;
            if constexpr (F == FP4) {
                const float scale = m.tile_scale[tile];
#pragma unroll
                for (int i = 0; i < HALVES * 64; i++) d[i / 64][i % 64] *= scale;
            }
            find_largest<HALVES>(d, width, p.first + row, best + warp * TOKENS);
            if (!e.out) continue;
            float* out = e.out + row;
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
#pragma unroll
                for (int j = 0; j < 16; j++) {
                    if (8 * j >= width) break;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int token = half * width + 8 * j + 2 * t + i % 2;
                        if (token < n) out[size_t(token) * p.all + i / 2 * 8] = d[half][4 * j + i];
                    }
                }
            }
        }
        __syncthreads();
        const int token = threadIdx.x;
        if (token < n) {
            uint64_t largest = 0;
            for (int i = 0; i < ROW_TILES; i++) largest = max(largest, best[i * TOKENS + token]);
            atomicMax((unsigned long long*)p.best + token, (unsigned long long)largest);
        }
        if (!last_to_arrive(p.arrivals, gridDim.x) || token >= n) return;
        unsigned long long largest = __ldcg(p.best + token);
        p.best[token] = 0;
        if (p.rank > 0) {
            // With it, whoever looks finds the logits that all blocks have stored.
            asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p.bests + p.rank * (MAX_EIGHTS * 8) + token), "l"(largest) : "memory");
            return;
        }
        const Wait wait;
        for (uint32_t r = 1; r < p.ranks; r++) {
            uint64_t *from = p.bests + r * (MAX_EIGHTS * 8) + token;
            unsigned long long other;
            while (true) {
                asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(other) : "l"(from) : "memory");
                if (other) break;
                wait.go_on();
            }
            *from = 0, largest = max(largest, other);
        }
        p.largest[token] = p.told[token] = id_of_largest(largest);
        return;
    }
    float d[HALVES][64];
    WIDTHS
    if (KIND == QKV) wait_for_copies<0>();
    constexpr int SHARE_BYTES = MAX_EIGHTS * EIGHT_BYTES;
    uint8_t* parts = p.parts + size_t(blockIdx.x) * ranks * SHARE_BYTES + threadIdx.x * 16;
    asm("" : "+l"(parts)); // else it would be found anew for each use
    const bool finishes = row_tile < row_tiles;
    // Bits of the eights of both halves, of which this block finishes some and gives the others.
    uint32_t kept[HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const int before = half * width / 8, from = min(max(first - before, 0), 16), to = min(max(first + own - before, 0), 16);
        const uint32_t all = finishes ? (1u << min(width / 8, eights - before)) - 1 : 0;
        kept[half] = (1u << to) - (1u << from) & all;
        uint8_t* given = parts + rank * SHARE_BYTES + before * EIGHT_BYTES;
#pragma unroll
        for (int j = 0; j < 16; j++) give(given + j * EIGHT_BYTES, (all & ~kept[half]) >> j & 1, sums_of(d[half] + 4 * j));
    }
    Affine affine;
    affine.load(e, m, 0, min(row_tile, row_tiles - 1), g);
    // Now all stages have been read, and nothing more arrives in them.
    __syncthreads();
    if (!finishes) return;
    uint8_t* sums = shared + threadIdx.x * 16; // those of all blocks that this one finishes
    const int share_bytes = own * EIGHT_BYTES;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        uint8_t* to = sums + rank * share_bytes + (half * width / 8 - first) * EIGHT_BYTES;
#pragma unroll
        for (int j = 0; j < 16; j++)
            if (kept[half] >> j & 1) *(float4*)(to + j * EIGHT_BYTES) = sums_of(d[half] + 4 * j);
    }
    const uint32_t others = (1u << ranks) - 1 & ~(1u << rank);
    uint8_t* given = parts + first * EIGHT_BYTES;
    auto bring = [&](int i, const uint8_t* from) {
        uint32_t to = shared_address(sums) + i * EIGHT_BYTES;
#pragma unroll 1
        for (; i < own; i++, from += EIGHT_BYTES, to += EIGHT_BYTES) {
#pragma unroll
            for (int r = 0; r < MAX_SHARES; r++)
                if (others >> r & 1) copy_async(to + r * share_bytes, from + r * SHARE_BYTES);
        }
        commit_copies();
        wait_for_copies<0>();
    };
    const uint2 stored = stored_rows(e, row_tile, g);
    const Outputs outputs(e, row_tile, stored.x, stored.y);
    bring(0, given);
    float4 v[MAX_SHARES] = {}; // zeros where there is no share
#pragma unroll 1
    for (int i = 0; i < own; i++, given += EIGHT_BYTES) {
        while (true) {
            uint32_t largest = 0;
#pragma unroll
            for (int r = 0; r < MAX_SHARES; r++) {
                if (r < ranks) v[r] = *(const float4*)(sums + r * share_bytes + i * EIGHT_BYTES);
                const uint4& words = (const uint4&)v[r];
                largest = max(largest, max(max(words.x, words.y), max(words.z, words.w)));
            }
            if (largest != NOT_GIVEN) break;
            bring(i, given);
        }
        // In the order of the shares, whoever adds them.
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < MAX_SHARES; r++) {
            sum.x += v[r].x, sum.y += v[r].y, sum.z += v[r].z, sum.w += v[r].w;
            if (others >> r & 1) __stcg((uint4*)(given + r * SHARE_BYTES), make_uint4(NOT_GIVEN, NOT_GIVEN, NOT_GIVEN, NOT_GIVEN));
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int local = 8 * i + 2 * t + k, token = 8 * first + local;
            const float a = affine.first(k ? sum.y : sum.x), b = affine.second(k ? sum.w : sum.z);
            if (KIND == QKV) {
                outputs.store(token < n, token, places[local], rotary + local * HEAD + stored.x % (HEAD / 2), a, b);
            } else {
                // Nobody else adds to it, and this way nobody waits for what was there.
                float* out = e.out + size_t(token) * m.rows;
                if (token < n && stored.x < m.rows) atomicAdd(out + stored.x, a);
                if (token < n && stored.y < m.rows) atomicAdd(out + stored.y, b);
            }
        }
    }
}

#define KERNEL(NAME, KIND, F, HALVES)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, KIND != STORE && HALVES == 1 ? 2 : 1) NAME(const __grid_constant__ Exchanged p) { product<KIND, F, HALVES>(p); }
KERNEL(product_some_qkv_bf16_128, QKV, BF16, 1)
KERNEL(product_some_qkv_bf16_256, QKV, BF16, 2)
KERNEL(product_some_qkv_fp4_128, QKV, FP4, 1)
KERNEL(product_some_qkv_fp4_256, QKV, FP4, 2)
KERNEL(product_some_residual_bf16_128, RESIDUAL, BF16, 1)
KERNEL(product_some_residual_bf16_256, RESIDUAL, BF16, 2)
KERNEL(product_some_residual_fp4_128, RESIDUAL, FP4, 1)
KERNEL(product_some_residual_fp4_256, RESIDUAL, FP4, 2)
KERNEL(product_some_bf16_128, STORE, BF16, 1)
KERNEL(product_some_bf16_256, STORE, BF16, 2)
KERNEL(product_some_fp4_128, STORE, FP4, 1)
KERNEL(product_some_fp4_256, STORE, FP4, 2)
