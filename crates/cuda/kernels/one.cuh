// The products of a step of one token. What decides is the chain of kernels, each of which waits for the one before it: so there are
// few, norms and the choice of experts are the beginning of a product, everything else its end, and each kernel has its first weights
// in shared memory before it waits, in blocks of which a multiprocessor holds two kernels'. Attention and its projection wait for
// the end of the kernel before only at their own, and else for words that come: what they read and change was done with by all older kernels
// when query, key and value had waited for the experts.
//
// Where the batch may not matter (`INVARIANT`), sums are those of the kernels that take more tokens: of each row tile in the chains of
// product_some_sm90.cu and experts_streamed_sm90.cu, of the router as router.cuh says.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "hopper.cuh"
#include "router.cuh"
#include "shared.cuh"

struct One {
    Matrix matrix, down;             // `down`: of the experts
    const float* norm_scale;         // [hidden]: of the norm before, or, where the router follows, of the norm after
    const uint16_t* input;           // 16-bit, where there is no norm before; the projection's are words that come
    float* residual;                 // [hidden], without what the last experts add
    float* whole;                    // [hidden], with it, as words that come
    uint4* awaited;                  // [awaited_count]: the words that come, which the experts set to all ones again
    float* scaled;                   // [hidden]: the residual stream times the scale of the norm before the experts
    const __nv_bfloat16* router;     // [experts, hidden]
    const float* router_bias;        // [experts]
    float* router_parts;             // [experts + 1, parts]: what each part of the residual stream adds to the router's logits, see `parts_row`
    float* shares;                   // [blocks, SHARES, 16]: what each block of the experts adds to the residual stream; INVARIANT: [hidden]
    uint16_t* exchange;              // [2, experts per token, cols of the second product]: what the first found, see `both_products`
    uint32_t* rounds;                // [blocks]: how often each block of the experts was at work
    unsigned long long* best;        // [blocks]: the largest logit of each block's rows
    uint32_t *arrivals, *largest;    // zero before and after; the id of the largest logit
    uint32_t* told;                  // the same for the host
    Epilogue epilogue;
    uint32_t hidden, part_count, experts, experts_per_token;
    uint32_t groups;                 // row tiles of a block; in the experts' first product, of one of the first `early` blocks of a rank
    uint32_t early, late_groups;     // those of the other blocks
    uint32_t share_warps;            // warps of a row tile in `shares`; 0: there are none
    float eps;
    uint32_t stack;                  // of the final norm's outputs: see `activation_place`
    uint32_t awaited_count;
    uint32_t busy;                   // INVARIANT: warps of a block that multiply
};
static_assert(sizeof(One) == 336);

// Where the model is on one GPU.
struct Alone {
    static constexpr bool SHARED = false;
};

// Where several GPUs share it: sums of each come to all others as words that had all bits set until then. A sum never is such a word: what
// is no number comes out of an addition as another. All GPUs add them in the order of their ranks, to the same bits.
struct Together {
    static constexpr bool SHARED = true;
    float* shares[MAX_GPUS];    // [ranks, share_words] on each GPU: what the experts add, as in `One::shares`
    float* projected[MAX_GPUS]; // [ranks, hidden] on each GPU: the projections of attention
    float* read;                // those `shares` of this GPU that the layer before has left
    uint32_t rank, ranks, share_words, padding;
};
struct SharedOne {
    One one;
    Together together;
};
static_assert(sizeof(SharedOne) == 488);

constexpr int WARPS = 16, THREADS = WARPS * WARP, NARROW = 8; // of a block, and of one of the output layer
constexpr int EXPERT_WARPS = 24, DOWN_WARPS = 22; // of a block of the experts, and those that the second product has
constexpr int MAX_RANKS = 16;
constexpr int SHARES = 7; // row tiles that a block of the experts may touch

// `a / b` of numbers below 2^20, where the error of the fast division is below half of `1 / b`. Divisions stand before the first weights of
// blocks that begin late, and that of integers takes four times as many instructions.
__device__ __forceinline__ int quotient(int a, int b) { return int(__fdividef(a + 0.5f, b)); }

// Four inputs of a product, at `4 * at`.
template <Format F> __device__ __forceinline__ void store_inputs(uint16_t* x, uint32_t at, float a, float b, float c, float d) {
    ((uint2*)x)[at] = make_uint2(activation(F, a) | activation(F, b) << 16, activation(F, c) | activation(F, d) << 16);
}

// The sums of rows g and g + 8 of a row tile over a lane's inputs.
template <Format F> struct Sums;

template <> struct Sums<BF16> {
    struct Piece : Tile<BF16> {
        __device__ __forceinline__ void load_shared(uint32_t weights, uint32_t) {
#pragma unroll
            for (int j = 0; j < 4; j++) words[j] = ::load_shared(weights + j * 512 + threadIdx.x % WARP * 16);
        }
    };
    float sum[2][4] = {};
    uint32_t x; // this lane's inputs of the next tile, in shared memory
    __device__ __forceinline__ Sums(const uint16_t* inputs) : x(shared_address(inputs) + lane_quarter() * 32) {}
    __device__ __forceinline__ void add(const Piece& tile) {
        uint4 b[2] = {load_shared(x), load_shared(x + 16)};
        x += TILE_COLS * 2;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t a[4];
            tile.fragment(j, {}, a);
            // Two chains of sums: a product is ready only some thirty cycles after it began.
            Number<BF16>::multiply(sum[j % 2], a, j % 2 ? b[j / 2].z : b[j / 2].x, j % 2 ? b[j / 2].w : b[j / 2].y);
        }
    }
    // All eight columns of the tensor cores have the same token.
    __device__ __forceinline__ float lower() const { return sum[0][0] + sum[1][0]; }
    __device__ __forceinline__ float upper() const { return sum[0][2] + sum[1][2]; }
};

// The four blocks of 16 inputs of a row are apart in four columns of the tensor cores: column c has the inputs of the lanes with
// that quarter, and zeros else. So a block's scale is applied once, to its sum, instead of to each weight.
template <> struct Sums<FP4> {
    struct Piece {
        uint4 words;
        uint32_t scales; // of two blocks, each of row g and g + 8
        __device__ __forceinline__ void load_shared(uint32_t weights, uint32_t scales) {
            words = ::load_shared(weights + threadIdx.x % WARP * 16);
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(this->scales) : "r"(scales + lane_row() * 8 + lane_quarter() % 2 * 4) : "memory");
        }
    };
    float sum[2] = {};
    uint4 b[2] = {}; // stay zeros in lanes without inputs
    uint32_t x;
    __device__ __forceinline__ Sums(const uint16_t* inputs) : x(shared_address(inputs) + lane_quarter() * 32) {}
    __device__ __forceinline__ void add(const Piece& tile) {
        if (lane_row() == lane_quarter()) b[0] = load_shared(x), b[1] = load_shared(x + 16);
        x += TILE_COLS * 2;
        float d[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t a[4];
            codes(j == 0 ? tile.words.x : j == 1 ? tile.words.y : j == 2 ? tile.words.z : tile.words.w, a);
            Number<FP4>::multiply(d, a, j % 2 ? b[j / 2].z : b[j / 2].x, j % 2 ? b[j / 2].w : b[j / 2].y);
        }
        // A scale byte has five bits of exponent and three of mantissa: the middle of an FP16 number.
        uint32_t lower = (tile.scales & 0x00ff00ffu) << 7, upper = tile.scales >> 1 & 0x7f807f80u;
        float2 l = __half22float2(reinterpret_cast<__half2&>(lower)), u = __half22float2(reinterpret_cast<__half2&>(upper));
        sum[0] = fmaf(d[1], l.y, fmaf(d[0], l.x, sum[0]));
        sum[1] = fmaf(d[3], u.y, fmaf(d[2], u.x, sum[1]));
    }
    __device__ __forceinline__ float lower() const { return sum[0] + __shfl_xor_sync(~0u, sum[0], 1); }
    __device__ __forceinline__ float upper() const { return sum[1] + __shfl_xor_sync(~0u, sum[1], 1); }
};

// One chain of sums and block scales on the weights, as products of a warpgroup have them, which add like those of a warp.
template <Format F> struct Chain {
    struct Piece : Tile<F> {
        __device__ __forceinline__ void load_shared(uint32_t weights, uint32_t scales) {
            if constexpr (F == FP4) {
                (Tile<F>&)*this = load_tile(weights, scales);
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) this->words[j] = ::load_shared(weights + j * 512 + threadIdx.x % WARP * 16);
            }
        }
    };
    float sum[4] = {};
    uint32_t x;
    __device__ __forceinline__ Chain(const uint16_t* inputs) : x(shared_address(inputs) + lane_quarter() * 32) {}
    __device__ __forceinline__ void add(const Piece& tile) {
        const uint4 b[2] = {load_shared(x), load_shared(x + 16)};
        x += TILE_COLS * 2;
        uint32_t scale[2], a[4][4];
        tile.scale(scale);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            tile.fragment(j, scale, a[j]);
            Number<F>::multiply(sum, a[j], j % 2 ? b[j / 2].z : b[j / 2].x, j % 2 ? b[j / 2].w : b[j / 2].y);
        }
    }
    __device__ __forceinline__ float lower() const { return sum[0]; }
    __device__ __forceinline__ float upper() const { return sum[2]; }
};

// Consecutive tiles of a row tile on their way to one warp through its own piece of shared memory, CHUNK at a time, SLOTS chunks
// ahead; after the last come those of the next row tile, if there is one. From Hopper on four-bit weights come by bulk copies, which do
// not stand in the way of other loads. Else each chunk is one group of copies, and at the end come empty ones: BF16 has too few chunks
// on their way for bulk copies, which take longer each.
template <Format F, int CHUNK, int SLOTS, class Sums> struct Flow {
    static constexpr int WEIGHTS = F == FP4 ? 512 : 2048, SCALES = F == FP4 ? 64 : 0; // bytes of a tile
    static constexpr int BARRIER = CHUNK * (WEIGHTS + SCALES), BYTES = BARRIER + 16;  // of a slot: the place of its barrier, and all
#if __CUDA_ARCH__ >= 900
    static constexpr bool BULK = F == FP4;
#else
    static constexpr bool BULK = false;
#endif
    static constexpr int GROUPS = BULK ? 0 : SLOTS; // of copies that are on their way, at most
    const uint8_t *weights, *scales; // of the next chunk
    int left;                        // tiles that are not yet on their way
    uint32_t shared, slot, parity;   // addresses in shared memory; which phase of its barrier the slot's chunk ends
    uint64_t policy;

    // `all` has BYTES * SLOTS for each of the first `busy` warps. Others have no tiles.
    __device__ __forceinline__ Flow(uint8_t* all, uint32_t busy = ~0u) : parity(0) {
        slot = shared = shared_address(all) + threadIdx.x / WARP * (BYTES * SLOTS);
        policy = read_once();
        if constexpr (BULK) {
            if (threadIdx.x % WARP == 0 && threadIdx.x / WARP < busy)
                for (int i = 0; i < SLOTS; i++) init_barrier(shared + i * BYTES + BARRIER, 1);
            fence_barriers();
            __syncwarp();
        }
    }
    // The next tiles to bring.
    __device__ __forceinline__ void locate(const Matrix& m, size_t tile, int count) {
        weights = (const uint8_t*)m.weights + tile * WEIGHTS, scales = (const uint8_t*)m.scales + tile * SCALES, left = count;
    }
    // `next()` locates what follows.
    template <class Next> __device__ __forceinline__ void start(Next next) {
#pragma unroll 1
        for (int i = 0; i < SLOTS; i++) {
            if (left <= 0) next();
            bring(shared + i * BYTES);
        }
    }
    // Where nothing follows. In BF16 a chunk sets out when the one before is there: all of them on their way at a time would keep what
    // other blocks need soon waiting.
    __device__ __forceinline__ void start(const Matrix& m, size_t tile, int count) {
        locate(m, tile, count);
#pragma unroll 1
        for (int i = 0; i < SLOTS; i++) {
#if __CUDA_ARCH__ >= 900
            if constexpr (!BULK) wait_for_copies<0>();
#endif
            bring(shared + i * BYTES);
        }
    }
    __device__ __forceinline__ void bring(uint32_t to) {
        if constexpr (BULK) {
            if (elected() && left > 0) {
                const int count = min(CHUNK, left);
                expect_bytes(to + BARRIER, count * (WEIGHTS + SCALES));
                copy_bulk(to, weights, count * WEIGHTS, to + BARRIER, policy);
                copy_bulk(to + CHUNK * WEIGHTS, scales, count * SCALES, to + BARRIER, policy);
            }
        } else {
            const uint32_t lane = threadIdx.x % WARP;
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                if (i >= left) break;
#pragma unroll
                for (int j = 0; j < WEIGHTS; j += 512)
                    copy_async(to + i * WEIGHTS + j + lane * 16, weights + i * WEIGHTS + j + lane * 16, policy);
                if (F == FP4 && lane < 4) copy_async(to + CHUNK * WEIGHTS + i * SCALES + lane * 16, scales + i * SCALES + lane * 16, policy);
            }
            commit_copies();
        }
        left -= CHUNK, weights += CHUNK * WEIGHTS, scales += CHUNK * SCALES;
    }
    // Until the slot's chunk is there.
    __device__ __forceinline__ void wait() const {
        if constexpr (BULK) {
            wait_barrier(slot + BARRIER, parity);
        } else {
            wait_for_copies<SLOTS - 1>();
            __syncwarp();
        }
    }
    // When all tiles of the slot have been read.
    template <class Next> __device__ __forceinline__ void leave(Next next) {
        if (left <= 0) next();
        if (!BULK || left > 0) {
            if constexpr (BULK) fence_reads();
            __syncwarp();
            bring(slot);
        }
        slot += BYTES;
        if (slot == shared + SLOTS * BYTES) slot = shared, parity ^= 1;
    }
    __device__ __forceinline__ typename Sums::Piece tile(int i) const {
        typename Sums::Piece tile;
        tile.load_shared(slot + i * WEIGHTS, slot + CHUNK * WEIGHTS + i * SCALES);
        return tile;
    }
    // The sums over the next `count` tiles go to `to`; `sums` begin with the inputs of the first.
    template <class Next> __device__ __forceinline__ void multiply(int count, Sums sums, float* to, float factor, Next next) {
#pragma unroll 1
        for (int more = count; more > 0; more -= CHUNK) {
            wait();
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                if (i >= more) break;
                sums.add(tile(i));
            }
            leave(next);
        }
        float lower = sums.lower(), upper = sums.upper();
        if (lane_quarter() == 0) to[lane_row()] = lower * factor, to[lane_row() + 8] = upper * factor;
    }
    __device__ __forceinline__ void multiply(int count, Sums sums, float* to, float factor) {
        multiply(count, sums, to, factor, [] {});
    }
};

// A warp's inputs, `count` tiles, to shared memory, when they have come. A warp without tiles waits for some, too.
__device__ __forceinline__ void take_inputs(uint16_t* to, const uint16_t* from, int count) {
    for (int i = threadIdx.x % WARP; i < max(count, 1) * 8; i += WARP) {
        uint4 v;
        do v = load_words(from + i * 8);
        while (!has_come(v.x) || !has_come(v.y) || !has_come(v.z) || !has_come(v.w));
        if (i < count * 8) ((uint4*)to)[i] = v;
    }
    __syncwarp();
}

// What one expert has in `router_parts`; a row more is of the squares of the residual stream. The numbers that fill up a row are zeros.
__device__ __forceinline__ uint32_t parts_row(const One& p) { return (p.part_count + 3) / 4 * 4; }

// The choice of experts, by all threads of a block. Between its steps are barriers.
struct Routing {
    static constexpr int WARPS = EXPERT_WARPS, ROWS = 2, VECTORS = MAX_HIDDEN / TILE_ROWS / 4 / WARP, EIGHTS = WARPS * WARP / 8;
    // Sums over the parts: of the experts, then of the squares. Later what `both_products` has there, of a row tile for each warp.
    __align__(16) float sums[WARPS * (TILE_ROWS + 1)];
    static_assert(WARPS * (TILE_ROWS + 1) >= MAX_EXPERTS + 4);
    __align__(16) float bias[MAX_EXPERTS + 4];
    uint32_t experts[MAX_RANKS];
    float logits[MAX_RANKS], weights[MAX_RANKS]; // of those experts

    // Before the wait.
    __device__ __forceinline__ void load_bias(const One& p) {
        for (uint32_t e = threadIdx.x; e < p.experts; e += WARPS * WARP) bias[e] = p.router_bias[e];
    }
    // A warp has some rows.
    __device__ __forceinline__ void sum(const One& p) {
        const uint32_t vectors = parts_row(p) / 4, lane = threadIdx.x % WARP;
#pragma unroll 1
        for (uint32_t first = threadIdx.x / WARP; first <= p.experts; first += ROWS * WARPS) {
            const float4* row = (const float4*)p.router_parts + first * vectors;
            float4 v[ROWS][VECTORS];
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < VECTORS; j++) {
                    const bool there = first + i * WARPS <= p.experts && j * WARP + lane < vectors;
                    v[i][j] = there ? __ldcg(row + i * WARPS * vectors + j * WARP + lane) : make_float4(0, 0, 0, 0);
                }
            float all[ROWS] = {};
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < VECTORS; j++) all[i] += (v[i][j].x + v[i][j].y) + (v[i][j].z + v[i][j].w);
#pragma unroll
            for (int i = 0; i < ROWS; i++) all[i] = warp_sum(all[i]);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                if (lane == 0 && first + i * WARPS <= p.experts) sums[first + i * WARPS] = all[i];
        }
    }
    // The same as router_gather_sm90.cu: a lane has every sixteenth part of one half of the inputs.
    __device__ __forceinline__ void sum_alike(const One& p) {
        constexpr int STEPS = MAX_HIDDEN / ROUTER_STEP / ROUTER_WARPS / 2;
        const uint32_t lane = threadIdx.x % WARP, middle = p.matrix.cols / TILE_COLS / 2 * (TILE_COLS / ROUTER_STEP);
        const uint32_t begin = lane / ROUTER_WARPS ? middle : 0, end = lane / ROUTER_WARPS ? p.part_count : middle;
#pragma unroll 1
        for (uint32_t first = threadIdx.x / WARP; first <= p.experts; first += ROWS * WARPS) {
            const float* row = p.router_parts + first * parts_row(p);
            float v[ROWS][STEPS];
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    const uint32_t at = begin + lane % ROUTER_WARPS + j * ROUTER_WARPS;
                    v[i][j] = first + i * WARPS <= p.experts && at < end ? __ldcg(row + i * WARPS * parts_row(p) + at) : 0;
                }
            float all[ROWS] = {};
#pragma unroll
            for (int j = 0; j < STEPS; j++)
#pragma unroll
                for (int i = 0; i < ROWS; i++) all[i] += v[i][j];
#pragma unroll
            for (int k = 0; k < 5; k++)
#pragma unroll
                for (int i = 0; i < ROWS; i++) all[i] += __shfl_xor_sync(~0u, all[i], k < 4 ? 8 >> k : 16);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                if (lane == 0 && first + i * WARPS <= p.experts) sums[first + i * WARPS] = all[i];
        }
    }
    // One over the norm.
    __device__ __forceinline__ float inverse(const One& p) const { return rsqrtf(sums[p.experts] / p.hidden + p.eps); }
    // The experts by value, descending, the lower index first on a tie. Eight threads count what comes before an expert.
    __device__ __forceinline__ void choose(const One& p, float inverse) {
        auto logit = [&](float sum, float bias) {
            const float v = fmaf(sum, inverse, bias);
            return isnan(v) ? INFINITY : v;
        };
#pragma unroll 1
        for (uint32_t first = threadIdx.x / WARP * 4; first < p.experts; first += EIGHTS) {
            const uint32_t e = first + threadIdx.x % WARP / 8, inside = min(e, p.experts - 1);
            const float own = logit(sums[inside], bias[inside]);
            uint32_t before = 0;
#pragma unroll 1
            for (uint32_t other = threadIdx.x % 8 * 4; other < p.experts; other += 32) {
                const float4 s = *(const float4*)(sums + other), b = *(const float4*)(bias + other);
                auto count = [&](float v, uint32_t i) { before += i < p.experts && (v > own || (v == own && i < e)); };
                count(logit(s.x, b.x), other), count(logit(s.y, b.y), other + 1);
                count(logit(s.z, b.z), other + 2), count(logit(s.w, b.w), other + 3);
            }
#pragma unroll
            for (int i = 4; i; i /= 2) before += __shfl_xor_sync(~0u, before, i);
            if (e < p.experts && threadIdx.x % 8 == 0 && before < p.experts_per_token) experts[before] = e, logits[before] = own;
        }
    }
    // What a rank counts for: the softmax over those that are taken. An infinite logit makes that no number.
    __device__ __forceinline__ void weigh(const One& p, uint32_t rank) {
        auto share = [&](float v) { return expf(v - logits[0]); };
        float sum = 0;
#pragma unroll 1
        for (uint32_t i = 0; i < p.experts_per_token; i++) sum += share(logits[i]);
        weights[rank] = share(logits[rank]) / sum;
    }
};

// The residual stream, with what the blocks of the experts add to it, in their order. INVARIANT: one adds all there is to a row.
template <int THREADS, bool INVARIANT = false> struct Stream {
    static constexpr int VALUES = MAX_HIDDEN / 4 / THREADS, NEAR = 2;
    int at[VALUES][NEAR]; // where in `shares` the first blocks of a row tile have theirs; negative: there is none
    float4 v[VALUES];
    static __device__ __forceinline__ int first_block(const One& p, int row_tile) { return row_tile * int(p.share_warps) / DOWN_WARPS; }
    // Of the 4 values from `4 * i` on, in `block`.
    static __device__ __forceinline__ int place(const One& p, int i, int block) {
        if (INVARIANT) return i < int(p.hidden / 4) && p.share_warps && block == first_block(p, i / (TILE_ROWS / 4)) ? i : -1;
        const int row_tile = i / (TILE_ROWS / 4), last = (int((row_tile + 1) * p.share_warps) - 1) / DOWN_WARPS;
        if (i >= int(p.hidden / 4) || block > last || p.share_warps == 0) return -1;
        return (block * SHARES + row_tile - quotient(block * DOWN_WARPS, p.share_warps)) * (TILE_ROWS / 4) + i % (TILE_ROWS / 4);
    }
    // Before the wait.
    __device__ __forceinline__ Stream(const One& p) {
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int own = i * THREADS + threadIdx.x;
#pragma unroll
            for (int j = 0; j < NEAR; j++) at[i][j] = place(p, own, first_block(p, own / (TILE_ROWS / 4)) + j);
        }
    }
    __device__ __forceinline__ void load(const One& p, Alone) {
        const float4* shares = (const float4*)p.shares;
        float4 more[VALUES][NEAR];
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const uint32_t own = i * THREADS + threadIdx.x;
            v[i] = own < p.hidden / 4 ? ((const float4*)p.residual)[own] : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int j = 0; j < NEAR; j++) more[i][j] = at[i][j] >= 0 ? shares[at[i][j]] : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < VALUES; i++)
#pragma unroll
            for (int j = 0; j < NEAR; j++) add(v[i], more[i][j]);
        if constexpr (!INVARIANT) {
            if (p.share_warps <= DOWN_WARPS + 1) return;
            // Row tiles of more blocks.
#pragma unroll 1
            for (int i = 0; i < VALUES; i++) {
                const int own = i * THREADS + threadIdx.x;
#pragma unroll 1
                for (int block = first_block(p, own / (TILE_ROWS / 4)) + NEAR, from; (from = place(p, own, block)) >= 0; block++) {
                    const float4 b = shares[from];
#pragma unroll
                    for (int k = 0; k < VALUES; k++)
                        if (k == i) add(v[k], b);
                }
            }
        }
    }
    static __device__ __forceinline__ void add(float4& to, const float4& b) { to.x += b.x, to.y += b.y, to.z += b.z, to.w += b.w; }
    // No row tile has more than NEAR blocks.
    __device__ __forceinline__ void load(const One& p, const Together& together) {
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const uint32_t own = i * THREADS + threadIdx.x;
            v[i] = own < p.hidden / 4 ? ((const float4*)p.residual)[own] : make_float4(0, 0, 0, 0);
        }
        const Wait wait;
#pragma unroll 1
        for (uint32_t r = 0; r < together.ranks; r++) {
            const uint4* shares = (const uint4*)(together.read + r * together.share_words);
            uint4 words[VALUES][NEAR];
            while (true) {
                bool missing = false;
#pragma unroll
                for (int i = 0; i < VALUES; i++)
#pragma unroll
                    for (int j = 0; j < NEAR; j++) words[i][j] = at[i][j] >= 0 ? look(shares + at[i][j]) : make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int i = 0; i < VALUES; i++)
#pragma unroll
                    for (int j = 0; j < NEAR; j++) {
                        const uint4& w = words[i][j];
                        missing |= max(max(w.x, w.y), max(w.z, w.w)) == NOT_GIVEN;
                    }
                if (!missing) break;
                wait.go_on();
            }
#pragma unroll
            for (int i = 0; i < VALUES; i++)
#pragma unroll
                for (int j = 0; j < NEAR; j++) add(v[i], reinterpret_cast<const float4&>(words[i][j]));
        }
    }
    // Where nobody else reads them.
    __device__ __forceinline__ void take_back(const Together& together) const {
#pragma unroll 1
        for (uint32_t r = 0; r < together.ranks; r++)
#pragma unroll
            for (int i = 0; i < VALUES; i++)
#pragma unroll
                for (int j = 0; j < NEAR; j++)
                    if (at[i][j] >= 0) ((uint4*)(together.read + r * together.share_words))[at[i][j]] = make_uint4(NOT_GIVEN, NOT_GIVEN, NOT_GIVEN, NOT_GIVEN);
    }
    // The norm, whose numbers from `4 * at` on `put(at, v)` takes; the stream itself, to `whole` if `keep`.
    template <class Put> __device__ __forceinline__ void norm(const One& p, const Vector<VALUES>& scale, bool keep, Put put) const {
        __shared__ __align__(16) float squares[VALUES * THREADS / WARP];
        const float inverse = rsqrtf(sum_of_squares(v, squares) / p.hidden + p.eps);
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const uint32_t at = i * THREADS + threadIdx.x;
            if (at * 4 >= p.matrix.cols) break;
            const float4 &a = v[i], &b = scale.v[i];
            put(at, make_float4(a.x * inverse * b.x, a.y * inverse * b.y, a.z * inverse * b.z, a.w * inverse * b.w));
            if (keep && at < p.hidden / 4) ((float4*)p.whole)[at] = a;
        }
    }
};

// Query, key and value: the norm of the residual stream, which the first block also keeps. `blockIdx.x`: `groups` row tiles, whose
// columns the warps share.
template <Format F, int CHUNK, int SLOTS, bool INVARIANT = false, class Others> __device__ __forceinline__ void qkv(const One& p, const Others& others) {
    extern __shared__ __align__(16) uint16_t x[]; // [cols], the flows
    __shared__ float partial[WARPS][TILE_ROWS];
    const Matrix& m = p.matrix;
    Epilogue e = p.epilogue;
    e.kind = QKV;
    const int warp = threadIdx.x / WARP, each = (INVARIANT ? p.busy : WARPS) / p.groups, column_tiles = m.cols / TILE_COLS;
    const int row_tile = blockIdx.x * p.groups + warp / each;
    const bool busy = warp / each < p.groups && row_tile < row_tiles_of(m);
    const int begin = column_tiles * (warp % each) / each, end = column_tiles * (warp % each + 1) / each;
    using Sums = std::conditional_t<INVARIANT, Chain<F>, Sums<F>>;
    Flow<F, CHUNK, SLOTS, Sums> flow((uint8_t*)(x + m.cols), INVARIANT ? p.busy : WARPS);
    flow.start(m, busy ? size_t(row_tile) * column_tiles + begin : 0, busy ? end - begin : 0);
    // A thread finishes a pair of rows.
    const int group = threadIdx.x / 8, pair = threadIdx.x % 8, own_tile = blockIdx.x * p.groups + group;
    const bool finishes = group < p.groups && own_tile < row_tiles_of(m);
    Affine affine;
    if (finishes) affine.load(e, m, 0, own_tile, pair);
    Vector<Stream<THREADS>::VALUES> scale;
    scale.load(p.norm_scale, p.hidden);
    Stream<THREADS, INVARIANT> stream(p);

    wait_for_previous();
    if (int(blockIdx.x * p.groups) >= row_tiles_of(m)) return;
    stream.load(p, others);
    // All weights of four bits are on their way.
    if (F == FP4) start_next();
    Rotation rotation;
    if (finishes) rotation.load(e, own_tile, pair, 0);
    stream.norm(p, scale, blockIdx.x == 0, [&](uint32_t at, const float4& v) { store_inputs<F>(x, at, v.x, v.y, v.z, v.w); });
    __syncthreads();
    // Not earlier: the residual stream would wait behind the weights of the projection of attention.
    if (F != FP4) start_next();
    flow.multiply(busy ? end - begin : 0, Sums(x + begin * TILE_COLS), partial[warp], 1);
    __syncthreads();
    if (!finishes) return;
    float a = 0, b = 0;
#pragma unroll 4
    for (int w = group * each; w < (group + 1) * each; w++) a += partial[w][pair], b += partial[w][pair + 8];
    finish(e, m, affine, own_tile, pair, 0, a, b, rotation);
}

// What all GPUs have of a row of the projection, of which this one has `own`. They lie where others can see them for one layer.
__device__ __forceinline__ float add_projections(const Together& together, uint32_t hidden, uint32_t row, float own) {
    for (uint32_t r = 0; r < together.ranks; r++) give(together.projected[r] + together.rank * hidden + row, own);
    float* from = together.projected[together.rank] + row;
    const Wait wait;
    float sum = 0;
    for (uint32_t r = 0; r < together.ranks; r++, from += hidden) {
        uint32_t word;
        while ((word = look(from)) == NOT_GIVEN) wait.go_on();
        sum += __uint_as_float(word);
        give(from, __uint_as_float(NOT_GIVEN));
    }
    return sum;
}

// What attention found, projected and added to the residual stream, and what that adds to the router's logits. `blockIdx.x`: a row
// tile.
template <Format F, int CHUNK, int SLOTS, bool INVARIANT = false, class Others> __device__ __forceinline__ void attended(const One& p, const Others& others) {
    extern __shared__ __align__(16) uint16_t x[]; // [cols], the flows
    __shared__ float partial[WARPS][TILE_ROWS];
    __shared__ __align__(16) float added[TILE_ROWS], normed[TILE_ROWS];
    const Matrix& m = p.matrix;
    const int warp = threadIdx.x / WARP, column_tiles = m.cols / TILE_COLS, row_tile = blockIdx.x;
    // The column tiles whose inputs a warp takes, and those that it multiplies: the same but INVARIANT.
    const int first_taken = column_tiles * warp / WARPS, taken = column_tiles * (warp + 1) / WARPS - first_taken;
    const int parts = INVARIANT ? p.busy : WARPS, part = min(warp, parts);
    const int begin = column_tiles * part / parts, end = part < parts ? column_tiles * (part + 1) / parts : begin;
    start_next();
    using Sums = std::conditional_t<INVARIANT, Chain<F>, Sums<F>>;
    Flow<F, CHUNK, SLOTS, Sums> flow((uint8_t*)(x + m.cols), parts);
    flow.start(m, size_t(row_tile) * column_tiles + begin, end - begin);
    __syncthreads();
    // Thread `16 row + w` puts together what warp w has of a row.
    const int own_row = threadIdx.x / WARPS, own = threadIdx.x % WARPS;
    const uint32_t row = row_tile * TILE_ROWS + own_row;
    const bool finishes = own_row < TILE_ROWS && row < m.rows;
    float norm_scale = 0, bias = 0;
    const float factor = m.tile_scale ? m.tile_scale[row_tile] : 1.f;
    if (finishes && own == 0) {
        norm_scale = p.norm_scale[row];
        if (m.bias) bias = m.bias[row];
    }
    // Thread `16 e + row` has the router's weights of a row, of every 32nd expert.
    constexpr int KEPT = 2, EXPERTS = THREADS / TILE_ROWS;
    const uint32_t router_row = row_tile * TILE_ROWS + threadIdx.x % TILE_ROWS;
    auto router_weight = [&](uint32_t e) {
        return e < p.experts && router_row < p.hidden ? __bfloat162float(p.router[size_t(e) * p.hidden + router_row]) : 0.f;
    };
    float router_weights[KEPT];
    // INVARIANT: a warp has sixteen experts' in the order of a product.
    uint2 lower_experts = {}, upper_experts = {};
    const uint32_t own_expert = warp * 16 + lane_row();
    if constexpr (INVARIANT) {
        const uint32_t first = row_tile * TILE_ROWS + 4 * lane_quarter();
        auto weights = [&](uint32_t e) { return e < p.experts && first < p.hidden ? *(const uint2*)(p.router + size_t(e) * p.hidden + first) : make_uint2(0, 0); };
        lower_experts = weights(own_expert), upper_experts = weights(own_expert + 8);
    } else {
#pragma unroll
        for (int i = 0; i < KEPT; i++) router_weights[i] = router_weight(i * EXPERTS + threadIdx.x / TILE_ROWS);
    }

    // The residual stream and then, for each warp, the inputs of its own tiles, long before attention has ended. Where they have come, all
    // blocks of query, key and value have read what this one is going to change.
    float before = 0;
    if (finishes && own == 0) {
        uint32_t v;
        do v = load_word(p.whole + row);
        while (v == ~0u);
        before = __uint_as_float(v);
    }
    take_inputs(x + first_taken * TILE_COLS, p.input + first_taken * TILE_COLS, taken);
    if (INVARIANT) __syncthreads();
    flow.multiply(end - begin, Sums(x + begin * TILE_COLS), partial[warp], INVARIANT ? 1 : factor);
    __syncthreads();
    if constexpr (Others::SHARED) {
        const uint32_t vectors = others.ranks * others.share_words / 4;
        for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < vectors; i += gridDim.x * THREADS)
            ((uint4*)others.read)[i] = make_uint4(NOT_GIVEN, NOT_GIVEN, NOT_GIVEN, NOT_GIVEN);
    }
    if (own_row < TILE_ROWS) {
        float v = 0;
        if constexpr (INVARIANT) {
            for (int i = 0; i < parts; i++) v += partial[i][own_row];
            v = before + fmaf(v, factor, bias);
        } else {
            v = partial[own][own_row] + bias;
            if (!Others::SHARED) v += before;
#pragma unroll
            for (int i = WARPS / 2; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
        }
        if constexpr (Others::SHARED)
            if (finishes && own == 0) v = before + add_projections(others, p.hidden, row, v);
        if (own == 0) {
            if (finishes) p.residual[row] = v, p.scaled[row] = v * norm_scale;
            added[own_row] = finishes ? v : 0, normed[own_row] = finishes ? v * norm_scale : 0;
        }
    }
    __syncthreads();
    if constexpr (INVARIANT) {
        const float4 v = *(const float4*)(normed + 4 * lane_quarter());
        uint32_t first[3], second[3];
        split(v.x, v.y, first);
        split(v.z, v.w, second);
        float logits[4] = {};
        if (warp * 16 < p.experts) multiply_parts(logits, {lower_experts.x, upper_experts.x, lower_experts.y, upper_experts.y}, first, second);
        const float square = squares_of_step(*(const float4*)(added + 4 * lane_quarter()));
        float* to = p.router_parts + row_tile;
        if (lane_quarter() == 0) {
            if (own_expert < p.experts) to[own_expert * parts_row(p)] = logits[0];
            if (own_expert + 8 < p.experts) to[(own_expert + 8) * parts_row(p)] = logits[2];
        }
        if (threadIdx.x == 0) to[p.experts * parts_row(p)] = square;
        wait_for_previous();
        return;
    }
    const float square = added[threadIdx.x % TILE_ROWS] * added[threadIdx.x % TILE_ROWS], v = normed[threadIdx.x % TILE_ROWS];
    auto add = [&](uint32_t e, float weight) {
        float logit = e == p.experts ? square : v * weight;
#pragma unroll
        for (int i = TILE_ROWS / 2; i; i /= 2) logit += __shfl_xor_sync(~0u, logit, i);
        if (threadIdx.x % TILE_ROWS == 0 && e <= p.experts) p.router_parts[e * parts_row(p) + row_tile] = logit;
    };
#pragma unroll
    for (int i = 0; i < KEPT; i++) add(i * EXPERTS + threadIdx.x / TILE_ROWS, router_weights[i]);
#pragma unroll 1
    for (uint32_t first = KEPT * EXPERTS; first <= p.experts; first += EXPERTS)
        add(first + threadIdx.x / TILE_ROWS, router_weight(first + threadIdx.x / TILE_ROWS));
    // Who waits for this kernel waits for attention, too.
    wait_for_previous();
}

// A number on its way to shared memory, or a zero where there is none.
__device__ __forceinline__ void copy_word(float* to, const float* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 4 : 0) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint32_t* to, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

// What a warp has of one of the products of the experts: some columns of a row tile.
struct Part {
    int rank, row_tile, part;
    int begin, count; // column tiles; none if there is no such row tile
    int tile;         // the first, among those of an expert
    __device__ __forceinline__ void set(const Matrix& m, int rank, int row_tile, int part, int parts) {
        const int tiles = m.cols / TILE_COLS;
        this->rank = rank, this->row_tile = row_tile, this->part = part, begin = quotient(tiles * part, parts);
        count = row_tile < row_tiles_of(m) ? quotient(tiles * (part + 1), parts) - begin : 0;
        tile = row_tile * tiles + begin;
    }
};

// The experts. `blockIdx.x`: a rank, `blockIdx.y`: some row tiles of its first product. The last blocks have fewer: they begin late, since
// a multiprocessor that has two blocks of the projection of attention has no room for them before that is done. Then the second product,
// whose units, each rank of each row tile, are spread over all warps, several to a unit. Its weights follow those of the first without a
// break. What the first one finds goes from block to block without a barrier: `exchange` has the complements of the activations, and zeros
// where there are none yet, since no activation is the NaN whose bits are all ones. Odd rounds have one half of it, even rounds the other;
// each clears the half that the round before had.
//
// INVARIANT: a warp has whole row tiles, of the second product those of all ranks in one block.
template <Format F, int CHUNK, int SLOTS, bool INVARIANT = false, class Others> __device__ __forceinline__ void both_products(const One& p, const Others& others) {
    constexpr int WARPS = EXPERT_WARPS, THREADS = WARPS * WARP, VALUES = (MAX_HIDDEN / 4 + THREADS - 1) / THREADS, LOADS = 3;
    // The flows; then the inputs: [cols], later the second product's, [ranks, cols].
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ float partial[WARPS][TILE_ROWS];
    __shared__ __align__(16) Routing routing;
    __shared__ uint32_t round;
    __shared__ Part work[WARPS][2];
    const Matrix &m = p.matrix, &down = p.down;
    const Epilogue& e = p.epilogue;
    const int early = min(blockIdx.y, p.early), groups = blockIdx.y < p.early ? p.groups : p.late_groups;
    const int first_tile = early * p.groups + (blockIdx.y - early) * p.late_groups;
    const int warp = threadIdx.x / WARP, each = INVARIANT ? 1 : quotient(WARPS, groups);
    const int ranks = p.experts_per_token, rank = blockIdx.x, block = blockIdx.y * gridDim.x + blockIdx.x;
    routing.load_bias(p);
    const int busy = INVARIANT ? p.busy : WARPS;
    using Sums = std::conditional_t<INVARIANT, Chain<F>, Sums<F>>;
    using Flow = Flow<F, CHUNK, SLOTS, Sums>;
    Flow flow(shared, busy);
    uint16_t* x = (uint16_t*)(shared + busy * SLOTS * Flow::BYTES);
    // What a warp has to do is found before the wait, since divisions take long, and lies here, since registers are few.
    if (INVARIANT && threadIdx.x % WARP == 0) {
        const int blocks = gridDim.x * gridDim.y, place = quotient(warp, ranks);
        work[warp][0].set(m, rank, warp < groups ? first_tile + warp : row_tiles_of(m), 0, 1);
        // The last blocks, which have fewer row tiles of the first product, have one more of the second.
        work[warp][1].set(down, warp - place * ranks, blocks - 1 - block + place * blocks, 0, 1);
    } else if (threadIdx.x % WARP == 0) {
        const int group = quotient(warp, each), per_unit = quotient(p.share_warps, ranks), place = block * DOWN_WARPS + warp;
        const int unit = quotient(place, per_unit), down_tile = quotient(unit, ranks);
        work[warp][0].set(m, rank, group < groups ? first_tile + group : row_tiles_of(m), warp - group * each, each);
        const int row_tile = warp < DOWN_WARPS ? down_tile : row_tiles_of(down);
        work[warp][1].set(down, unit - down_tile * ranks, row_tile, place - unit * per_unit, per_unit);
    }

    wait_for_previous();
    Vector<VALUES> v;
    v.load(p.scaled, p.hidden);
    const uint32_t last_round = threadIdx.x == 0 ? __ldcg(p.rounds + block) : 0;
    if (INVARIANT) routing.sum_alike(p);
    else routing.sum(p);
    if (threadIdx.x == 0) round = last_round + 1;
    __syncthreads();
    const float inverse = routing.inverse(p);
    routing.choose(p, inverse);
    __syncthreads();
    const int group = threadIdx.x / 8, pair = threadIdx.x % 8, own_tile = first_tile + group;
    const bool finishes = group < groups && own_tile < row_tiles_of(m);
    // Scale and biases of a row tile of the first product come to where the sums were, which nobody needs any more.
    float* affine = routing.sums + group * (TILE_ROWS + 1);
    // To the tiles of a part.
    auto locate = [&](const Matrix& of, const Part& part) {
        const size_t tiles = of.cols / TILE_COLS * row_tiles_of(of);
        flow.locate(of, routing.experts[part.rank] * tiles + part.tile, part.count);
    };
    {
        bool first = true;
        auto second = [&] {
            if (first) locate(down, work[warp][1]);
            first = false;
        };
        const uint32_t expert = routing.experts[rank];
        if (finishes) {
            const uint32_t row = own_tile * TILE_ROWS + 2 * pair;
            const float *biases = m.bias + size_t(expert) * m.rows + row, *scale = m.tile_scale + size_t(expert) * row_tiles_of(m) + own_tile;
            if (pair == 0) copy_word(affine + TILE_ROWS, scale, m.tile_scale);
            copy_word(affine + 2 * pair, biases, m.bias && row < m.rows);
            copy_word(affine + 2 * pair + 1, biases + 1, m.bias && row + 1 < m.rows);
        }
        commit_copies();
        locate(m, work[warp][0]);
        flow.start(second);
        if (threadIdx.x < ranks) routing.weigh(p, threadIdx.x);
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const uint32_t at = i * THREADS + threadIdx.x;
            const float4& a = v.v[i];
            if (at * 4 < m.cols) store_inputs<F>(x, at, a.x * inverse, a.y * inverse, a.z * inverse, a.w * inverse);
        }
        __syncthreads();
        const Part& own = work[warp][0];
        flow.multiply(own.count, Sums(x + own.begin * TILE_COLS), partial[warp], 1, second);
    }
    if (finishes) wait_for_copies<Flow::GROUPS>();
    __syncthreads();
    uint16_t* now = p.exchange + round % 2 * ranks * down.cols;
    const uint32_t unit = own_tile * 8 + pair;
    uint32_t found = 0;
    if (finishes && unit < down.cols) {
        float a = 0, b = 0;
#pragma unroll 2
        for (int w = group * each; w < (group + 1) * each; w++) a += partial[w][pair], b += partial[w][pair + 8];
        const float scale = m.tile_scale ? affine[TILE_ROWS] : 1.f;
        found = activation(F, swiglu(fmaf(a, scale, affine[2 * pair]), fmaf(b, scale, affine[2 * pair + 1]), e.limit, e.alpha));
    }
    found |= __shfl_down_sync(~0u, found, 1) << 16;
    if (finishes && unit < down.cols && pair % 2 == 0) {
        store_relaxed((uint32_t*)(now + rank * down.cols + unit), ~found);
        *(uint32_t*)(p.exchange + ((round + 1) % 2 * ranks + rank) * down.cols + unit) = 0;
    }
    if (threadIdx.x == 0) p.rounds[block] = round;
    if (const uint32_t i = block * THREADS + threadIdx.x; i < p.awaited_count) p.awaited[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
    // What the rank counts for, and the bias in the first part of a row tile.
    const Part& own = work[warp][1];
    const uint32_t expert = routing.experts[own.rank];
    const float weight = INVARIANT ? 1 : routing.weights[own.rank];
    float factor = weight, offset = 0;
    if (own.count && down.tile_scale) factor *= down.tile_scale[size_t(expert) * row_tiles_of(down) + own.row_tile];
    if (const int row = own.row_tile * TILE_ROWS + threadIdx.x % TILE_ROWS; own.part == 0 && down.bias && row < down.rows)
        offset = weight * down.bias[size_t(expert) * down.rows + row];
    // What follows overwrites inputs and sums of the first product.
    __syncthreads();
    // Activations come to shared memory, eight at a time, those of `count` ranks from this one on: `vectors` of each, of which `some` come, and
    // those that fill up a rank's columns never. Who waits for one has others on their way. `step` threads share them.
    auto take = [&](uint16_t* to, const uint16_t* from, int vectors, int some, int count, int step) {
#pragma unroll 1
        for (int first = threadIdx.x % step; first < count * vectors; first += LOADS * step) {
            uint4 words[LOADS];
            uint32_t missing = 0;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                words[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
                const int at = first + i * step, place = count > 1 ? at - quotient(at, vectors) * vectors : at;
                if (at < count * vectors && place < some) missing |= 1u << i;
            }
            while (missing) {
#pragma unroll
                for (int i = 0; i < LOADS; i++)
                    if (missing >> i & 1) words[i] = load_words((const uint32_t*)from + (first + i * step) * 4);
#pragma unroll
                for (int i = 0; i < LOADS; i++)
                    if (!(zero_half(words[i].x) | zero_half(words[i].y) | zero_half(words[i].z) | zero_half(words[i].w))) missing &= ~(1u << i);
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++)
                if (const int at = first + i * step; at < count * vectors)
                    ((uint4*)to)[at] = make_uint4(~words[i].x, ~words[i].y, ~words[i].z, ~words[i].w);
        }
    };
    uint16_t* inputs = x + own.rank * down.cols + own.begin * TILE_COLS;
    if constexpr (INVARIANT) {
        take(x, now, down.cols / 8, row_tiles_of(m), ranks, THREADS);
        __syncthreads();
    } else {
        // A warp needs the activations of its own columns, of which few blocks have some. Warps of one rank that have the same columns store the
        // same words to one place.
        const uint16_t* from = now + own.rank * down.cols + own.begin * TILE_COLS;
        take(inputs, from, own.count * (TILE_COLS / 8), row_tiles_of(m) - own.begin * (TILE_COLS / 8), 1, WARP);
        __syncwarp();
    }
    // Not earlier: the activations would wait behind the next kernel's weights. The first warp to say so speaks for the block.
    if (own.count) start_next();
    flow.multiply(own.count, Sums(inputs), partial[warp], INVARIANT ? 1 : factor);
    __syncwarp();
    if (threadIdx.x % WARP < TILE_ROWS) {
        float& own_part = partial[warp][threadIdx.x % TILE_ROWS];
        own_part = INVARIANT ? fmaf(own_part, factor, offset) : own_part + offset;
    }
    __syncthreads();
    if constexpr (INVARIANT) {
        // In the order of the ranks, weighted, as norms do.
        const int place = threadIdx.x / TILE_ROWS, blocks = gridDim.x * gridDim.y;
        const uint32_t row = (blocks - 1 - block + place * blocks) * TILE_ROWS + threadIdx.x % TILE_ROWS;
        if (row >= down.rows) return;
        float sum = 0;
        for (int r = 0; r < ranks; r++) sum = fmaf(routing.weights[r], partial[place * ranks + r][threadIdx.x % TILE_ROWS], sum);
        p.shares[row] = sum;
        return;
    }
    // Row tile after row tile that this block has warps of.
    const int place = threadIdx.x / TILE_ROWS, tile = quotient(block * DOWN_WARPS, p.share_warps) + place;
    if (place >= SHARES) return;
    float sum = 0;
    const int before = block * DOWN_WARPS;
    const int first = max(tile * int(p.share_warps) - before, 0), last = min((tile + 1) * int(p.share_warps) - before, DOWN_WARPS);
#pragma unroll 4
    for (int w = first; w < last; w++) sum += partial[w][threadIdx.x % TILE_ROWS];
    const uint32_t at = (block * SHARES + place) * TILE_ROWS + threadIdx.x % TILE_ROWS;
    if constexpr (Others::SHARED) {
        for (uint32_t r = 0; r < others.ranks; r++) give(others.shares[r] + others.rank * others.share_words + at, sum);
    } else {
        p.shares[at] = sum;
    }
}

// The norm of the whole residual stream, which it also keeps. One block.
template <Format F, bool INVARIANT = false, class Others> __device__ __forceinline__ void last_norm(const One& p, const Others& others) {
    start_next();
    Vector<Stream<THREADS>::VALUES> scale;
    scale.load(p.norm_scale, p.hidden);
    Stream<THREADS, INVARIANT> stream(p);
    wait_for_previous();
    stream.load(p, others);
    if constexpr (Others::SHARED) stream.take_back(others);
    stream.norm(p, scale, true, [&](uint32_t at, const float4& v) {
        auto to = [&](uint32_t k) { return (uint32_t*)(p.input + activation_place(p.stack, p.matrix.cols, 0, k)); };
        *to(4 * at) = activation(F, v.x) | activation(F, v.y) << 16, *to(4 * at + 2) = activation(F, v.z) | activation(F, v.w) << 16;
    });
}

// The output layer, and the largest logit. Each warp has a row tile, then another.
template <Format F, int CHUNK, int SLOTS, bool INVARIANT = false> __device__ __forceinline__ void output(const One& p) {
    constexpr int WARPS = NARROW;
    extern __shared__ __align__(16) uint16_t x[]; // [cols], the flows
    __shared__ float partial[WARPS][TILE_ROWS];
    const Matrix& m = p.matrix;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, row_tiles = row_tiles_of(m), column_tiles = m.cols / TILE_COLS;
    const int first = blockIdx.x * WARPS + warp, step = gridDim.x * WARPS;
    using Sums = std::conditional_t<INVARIANT, Chain<F>, Sums<F>>;
    Flow<F, CHUNK, SLOTS, Sums> flow((uint8_t*)(x + m.cols));
    int located = first;
    auto next = [&] {
        if (located < row_tiles) flow.locate(m, size_t(located) * column_tiles, column_tiles);
        located += step;
    };
    flow.left = 0;
    flow.start(next);
    wait_for_previous();
    start_next();
    for (uint32_t i = threadIdx.x; i < m.cols / 8; i += WARPS * WARP) ((uint4*)x)[i] = ((const uint4*)p.input)[i];
    __syncthreads();
    unsigned long long best = 0;
#pragma unroll 1
    for (int row_tile = first; row_tile < row_tiles; row_tile += step) {
        const float factor = m.tile_scale ? m.tile_scale[row_tile] : 1.f;
        flow.multiply(column_tiles, Sums(x), partial[warp], factor, next);
        __syncwarp();
        const uint32_t row = row_tile * TILE_ROWS + lane;
        if (lane < TILE_ROWS && row < m.rows) {
            const float v = partial[warp][lane];
            p.epilogue.out[row] = v;
            best = max(best, ranked(v, row));
        }
        __syncwarp();
    }
    {
        // The last block to arrive puts the blocks' results together.
        __shared__ unsigned long long found[WARPS];
        __shared__ uint32_t arrived;
        auto block_largest = [&](unsigned long long v) {
#pragma unroll
            for (int i = WARP / 2; i; i /= 2) v = max(v, __shfl_xor_sync(~0u, v, i));
            if (threadIdx.x % WARP == 0) found[warp] = v;
            __syncthreads();
            for (int i = 0; i < WARPS; i++) v = max(v, found[i]);
            __syncthreads();
            return v;
        };
        best = block_largest(best);
        if (threadIdx.x == 0) {
            p.best[blockIdx.x] = best;
            __threadfence();
            arrived = atomicAdd(p.arrivals, 1);
        }
        __syncthreads();
        if (arrived != gridDim.x - 1) return;
        __threadfence();
        if (threadIdx.x == 0) *p.arrivals = 0;
        best = 0;
        for (uint32_t i = threadIdx.x; i < gridDim.x; i += WARPS * WARP) best = max(best, __ldcg(p.best + i));
        best = block_largest(best);
        if (threadIdx.x == 0) *p.largest = id_of_largest(best), *p.told = id_of_largest(best);
    }
}
