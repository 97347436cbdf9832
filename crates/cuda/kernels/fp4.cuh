// What the native FP4 products of both Blackwell generations share: which rows a block multiplies, and how they come to shared
// memory. Written and compiled, tested by an emulation of the operands' layout, not yet run on such a chip.
#pragma once

#include "epilogue.cuh"
#include "fp4_layout.cuh" // made from src/fp4_layout.rs

struct Fp4Gemm {
    // Weights and scales: [experts, row blocks, column tiles], as src/fp4_layout.rs has it; the rows in the order of common.cuh's tiles.
    // The scale of a row tile includes that of the input.
    Matrix matrix;
    const uint8_t* input;         // codes [n, cols / 2]
    const uint8_t* input_scales;  // [n, cols / 16]
    const uint32_t* list;         // experts: see `Routes`
    Epilogue epilogue;
    uint32_t n;                   // tokens
    uint32_t experts, experts_per_token;
    uint32_t padding;
};
static_assert(sizeof(Fp4Gemm) == sizeof(Matrix) + sizeof(Epilogue) + 40);

constexpr int ROW_BLOCK_TILES = layout::TILE_ROWS / TILE_ROWS; // tiles of the epilogue in a block


// Copies 16 or 4 bytes, or writes zeros.
template <int BYTES> __device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(inside ? 4 : 0) : "memory");
}

// A block's operands. `blockIdx.x`: 128 rows of the weights; `blockIdx.y`: 128 tokens, of experts one after the other.
// `TILES` of 64 columns are a stage.
template <int TILES> struct Operands {
    static constexpr uint32_t STAGE_BYTES = layout::stage_bytes(TILES);
    const Fp4Gemm& p;
    uint32_t* rows; // in shared memory: the row of the input that each token is
    uint32_t stages; // their address in shared memory
    uint32_t expert = 0, first = blockIdx.y * layout::TILE_ROWS; // the first of the tokens, or slots
    int n = 0;       // how many
    const int column_tiles;

    __device__ __forceinline__ Operands(const Fp4Gemm& p, uint32_t* rows, uint8_t* shared)
        : p(p), rows(rows), stages((shared_address(shared) + 1023) / 1024 * 1024), column_tiles(p.matrix.cols / TILE_COLS) {}

    // Which tokens this block multiplies; false if none.
    template <bool EXPERTS> __device__ __forceinline__ bool find() {
        uint32_t end = p.n;
        Routes routes(p.list, p.experts, p.n * p.experts_per_token);
        if constexpr (EXPERTS) {
            uint32_t skip = blockIdx.y, active = routes.active_count(), i = 0;
            for (; i < active; i++) {
                expert = routes.active(i);
                first = routes.first_slot(expert), end = first + routes.count(expert);
                uint32_t tiles = (end - first + layout::TILE_ROWS - 1) / layout::TILE_ROWS;
                if (skip < tiles) break;
                skip -= tiles;
            }
            if (i == active) return false;
            first += skip * layout::TILE_ROWS;
        }
        n = min(end - first, layout::TILE_ROWS);
        for (int i = threadIdx.x; i < n; i += layout::THREADS) {
            bool gathered = EXPERTS && p.epilogue.kind == SWIGLU;
            rows[i] = gathered ? routes.pair(first + i) / p.experts_per_token : first + i;
        }
        __syncthreads();
        return true;
    }

    // Stages of the product.
    __device__ __forceinline__ int count() const { return (column_tiles + TILES - 1) / TILES; }

    // Tiles of stage `k`.
    __device__ __forceinline__ int tiles(int k) const { return min(column_tiles - k * TILES, TILES); }

    __device__ __forceinline__ uint32_t codes(uint32_t slot, int operand, int tile) const {
        return stages + slot * STAGE_BYTES + layout::stage_codes(TILES, operand, tile);
    }
    __device__ __forceinline__ uint32_t scales(uint32_t slot, int operand, int tile) const {
        return stages + slot * STAGE_BYTES + layout::stage_scales(TILES, operand, tile);
    }

    // Stage `k`, if there is one, on its way to a slot.
    __device__ __forceinline__ void bring(int k, uint32_t slot) const {
        if (k < count()) {
            const int tiles = this->tiles(k);
            const uint32_t row_blocks = (p.matrix.rows + layout::TILE_ROWS - 1) / layout::TILE_ROWS;
            const size_t tile = layout::tile(expert * row_blocks + blockIdx.x, k * TILES, column_tiles);
            // The tiles of the weights lie in memory as in the stage.
            const uint8_t* a = (const uint8_t*)p.matrix.weights + tile * layout::CODE_BYTES;
            for (int i = threadIdx.x; i < tiles * int(layout::CODE_BYTES / 16); i += layout::THREADS)
                copy_async<16>(codes(slot, 0, 0) + i * 16, a + i * 16, true);
            const uint8_t* a_scales = (const uint8_t*)p.matrix.scales + tile * layout::SCALE_BYTES;
            for (int i = threadIdx.x; i < tiles * int(layout::SCALE_BYTES / 16); i += layout::THREADS)
                copy_async<16>(scales(slot, 0, 0) + i * 16, a_scales + i * 16, true);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                int token = layout::brought_token(threadIdx.x, i, TILES), piece = layout::brought_piece(threadIdx.x, i, TILES);
                bool inside = token < n;
                const uint8_t* from = p.input + size_t(inside ? rows[token] : 0) * (p.matrix.cols / 2) + k * TILES * 32 + piece * 16;
                if (piece / 2 < tiles) copy_async<16>(codes(slot, 1, piece / 2) + layout::piece(token, piece % 2), from, inside);
            }
#pragma unroll
            for (int i = 0; i < (TILES + 1) / 2; i++) {
                int token = layout::brought_scale_token(threadIdx.x, i, TILES), tile = layout::brought_scale_tile(threadIdx.x, i, TILES);
                bool inside = token < n;
                const uint8_t* from = p.input_scales + size_t(inside ? rows[token] : 0) * (p.matrix.cols / 16) + (k * TILES + tile) * 4;
                if (token < int(layout::TILE_ROWS) && tile < tiles) copy_async<4>(scales(slot, 1, tile) + layout::scales(token), from, inside);
            }
        }
        commit_copies();
    }
};
