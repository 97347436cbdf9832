// What the products of packed weights with many tokens on Hopper share: their parameters, which rows of which expert a block has, and
// what follows the sums of a block of 128 rows.
#pragma once

#include "epilogue.cuh"
#include "hopper.cuh"

struct Gemm {
    Matrix matrix;
    const uint16_t* input;     // stacked
    const uint32_t* list;      // experts: see `Routes`
    Epilogue epilogue;
    uint32_t n;                // tokens
    uint32_t stack;            // of the input
    uint32_t tile;             // dense: tokens of a tile, a multiple of eight
    uint32_t experts, experts_per_token;
    uint32_t tokens_first;     // gemm_many_sm90.cu, dense: blocks with the same rows follow one another
};
static_assert(sizeof(Gemm) == sizeof(Matrix) + sizeof(Epilogue) + 40);

constexpr int GROUPS = 2;                     // warpgroups of 64 rows
constexpr int THREADS = GROUPS * 128;          // that multiply
constexpr int ROW_TILES = GROUPS * 4;         // of a block
constexpr int LINE = TILE_COLS * 2;           // bytes of a row of activations in shared memory

// A barrier of the threads that multiply.
__device__ __forceinline__ void multipliers_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// A line of 64 values in shared memory for each token, then each in 128 contiguous bytes of memory.
__device__ __forceinline__ void put_in_line(uint8_t* lines, int token, uint32_t position, uint16_t v) {
    *(uint16_t*)(lines + token * LINE + ((position / 8 ^ token % 8) * 8 + position % 8) * 2) = v;
}

// What follows the sums: `d` has rows g and g + 8 of this warp's row tile, two tokens of every eight.
template <int TOKENS>
__device__ __forceinline__ void finish_sums(
    const float (&d)[TOKENS / 2], const Gemm& p, const Work& work, int row_tile, int row_tiles, uint8_t* lines) {
    const Epilogue& e = p.epilogue;
    const int g = lane_row(), t = lane_quarter(), group = threadIdx.x / 128;
    const bool mine = row_tile < row_tiles;
    Affine affine = {0, 0, 0};
    if (mine) affine.load(e, p.matrix, work.expert, row_tile, g);
    const uint32_t head = row_tile / 4;
    const bool query = e.kind == QKV && head < e.query_heads;
    if (e.kind == SWIGLU || e.kind == QKV) {
        // All stages have been read, and nothing more arrives in them.
        multipliers_barrier();
        if (e.kind == QKV) lines += group * TOKENS * LINE;
    }
    // Each pair of rows of each token.
    auto each = [&](auto what) {
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            if (8 * j >= work.n) break;
#pragma unroll
            for (int i = 0; i < 2; i++) what(8 * j + 2 * t + i, d[4 * j + i], d[4 * j + 2 + i]);
        }
    };
    if (e.kind == SWIGLU) {
        const uint32_t position = product_position(row_tile % 8 * 8 + g);
        each([&](int column, float a, float b) {
            float y = swiglu(a * affine.scale + affine.a, b * affine.scale + affine.b, e.limit, e.alpha);
            put_in_line(lines, column, position, activation(e.out_format, mine ? y : 0.f));
        });
    } else if (query) {
        const uint32_t place = row_tile % 4 * 8 + g;
        each([&](int column, float a, float b) {
            if (column >= work.n) return;
            const float* rotary = e.rotary + (work.first + column) * HEAD + place;
            const float cos = __ldg(rotary), sin = __ldg(rotary + HEAD / 2);
            const float x = a * affine.scale + affine.a, y = b * affine.scale + affine.b;
            put_in_line(lines, column, place, activation(BF16, x * cos - y * sin));
            put_in_line(lines, column, place + HEAD / 2, activation(BF16, y * cos + x * sin));
        });
    } else if (mine && e.kind == RESIDUAL) {
        // Sixteen tokens' values on their way together.
        const uint2 rows = stored_rows(e, row_tile, g);
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j += 2) {
            if (8 * j >= work.n) break;
            float old[2][4];
            auto visit = [&](auto what) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = 8 * (j + i / 2) + 2 * t + i % 2;
                    if (column < work.n) what(i, e.out + size_t(work.first + column) * p.matrix.rows);
                }
            };
            visit([&](int i, float* out) {
                old[0][i] = rows.x < p.matrix.rows ? out[rows.x] : 0.f, old[1][i] = rows.y < p.matrix.rows ? out[rows.y] : 0.f;
            });
            visit([&](int i, float* out) {
                const int at = 4 * (j + i / 2) + i % 2;
                if (rows.x < p.matrix.rows) out[rows.x] = old[0][i] + (d[at] * affine.scale + affine.a);
                if (rows.y < p.matrix.rows) out[rows.y] = old[1][i] + (d[at + 2] * affine.scale + affine.b);
            });
        }
    } else if (mine) {
        each([&](int column, float a, float b) {
            if (column < work.n) finish(e, p.matrix, affine, row_tile, g, work.first + column, a, b);
        });
    }
    if (e.kind != SWIGLU && e.kind != QKV) return;
    multipliers_barrier();
    // One line per token of the block, or of the warpgroup.
    if (e.kind == QKV && !query) return;
    const int threads = e.kind == QKV ? 128 : THREADS;
    const uint32_t column_tile = row_tile / 8;
    if (e.kind == SWIGLU && column_tile * TILE_COLS >= e.out_cols) return;
    for (int at = threadIdx.x % threads; at < work.n * 8; at += threads) {
        const int token = at / 8, piece = at % 8;
        const uint32_t row = work.first + token;
        // In a stack the pieces lie as they do here: the first row is a multiple of eight.
        const uint4 v = *(const uint4*)(lines + token * LINE + (e.kind == QKV ? piece ^ token % 8 : piece) * 16);
        uint16_t* to = e.kind == QKV ? e.out16 + (size_t(row) * e.query_heads + head) * HEAD
                                     : e.out16 + (size_t(column_tile) * e.out_stack + row) * TILE_COLS;
        *(uint4*)(to + piece * 8) = v;
    }
}
