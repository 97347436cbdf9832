// Products of weights and activations that are both NVFP4, on RTX 50 and RTX PRO: `mma.sync` with block scales. Not yet run on
// such a chip.
#include "fp4.cuh"

constexpr int TILES = layout::SM120_TILES, STAGES = layout::SM120_STAGES, DISTANCE = STAGES - 1; // how far ahead slots are filled

__device__ __forceinline__ uint32_t load_word(uint32_t address) {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}

// D[16 outputs][8 tokens] += A[16][64] B[64][8], each block of 16 columns times its two scales.
__device__ __forceinline__ void multiply(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, uint32_t a_scales, uint32_t b_scales) {
    asm("mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, %10, {0, 0}, %11, {0, 0};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(a_scales), "r"(b_scales));
}

// A warp has 16 rows and all tokens of the block.
template <bool EXPERTS> __device__ __forceinline__ void gemm(const Fp4Gemm& p) {
    extern __shared__ uint8_t shared[];
    __shared__ uint32_t rows[layout::TILE_ROWS];
    wait_for_previous();
    start_next();
    Operands<TILES> operands(p, rows, shared);
    if (!operands.find<EXPERTS>()) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < DISTANCE; k++) operands.bring(k, k);

    float d[layout::TILE_ROWS / 8][4] = {};
    for (int k = 0; k < operands.count(); k++) {
        wait_for_copies<DISTANCE - 1>();
        __syncthreads();
        // Its slot was read in the step before, which every warp has behind it.
        operands.bring(k + DISTANCE, (k + DISTANCE) % STAGES);
        const uint32_t slot = k % STAGES;
        uint32_t a[4];
        load_matrices(a, operands.codes(slot, 0, 0) + layout::piece(warp * TILE_ROWS + layout::a_row(lane), layout::a_piece(lane)));
        uint32_t a_scales = load_word(operands.scales(slot, 0, 0) + layout::scales(warp * TILE_ROWS + layout::a_scale_row(lane)));
#pragma unroll
        for (int j = 0; j < int(layout::TILE_ROWS); j += 16) {
            if (j >= operands.n) break;
            uint32_t b[4];
            load_matrices(b, operands.codes(slot, 1, 0) + layout::piece(j + layout::b_row(lane), layout::b_piece(lane)));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t b_scales = load_word(operands.scales(slot, 1, 0) + layout::scales(j + 8 * i + layout::b_scale_row(lane)));
                multiply(d[j / 8 + i], a, b[2 * i], b[2 * i + 1], a_scales, b_scales);
            }
        }
    }

    const uint32_t row_tile = blockIdx.x * ROW_BLOCK_TILES + warp, pair = lane_row();
    if (row_tile * TILE_ROWS >= p.matrix.rows) return;
    Affine affine;
    affine.load(p.epilogue, p.matrix, operands.expert, row_tile, pair);
#pragma unroll
    for (int j = 0; j < int(layout::TILE_ROWS / 8); j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int token = 8 * j + layout::d_column(lane) + i;
            if (token < operands.n) finish(p.epilogue, p.matrix, affine, row_tile, pair, operands.first + token, d[j][i], d[j][i + 2]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(layout::THREADS, 2) fp4_gemm(const __grid_constant__ Fp4Gemm p) { gemm<false>(p); }
extern "C" __global__ void __launch_bounds__(layout::THREADS, 2) fp4_gemm_experts(const __grid_constant__ Fp4Gemm p) { gemm<true>(p); }
