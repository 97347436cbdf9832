// Products of weights and activations that are both NVFP4, on B200 and B300: `tcgen05.mma` with block scales, sums and scales in
// tensor memory. Not yet run on such a chip.
#include "fp4.cuh"

constexpr int TILES = layout::SM100_TILES, STAGES = layout::SM100_STAGES, DISTANCE = STAGES - 1; // how far ahead slots are filled

__device__ __forceinline__ uint64_t codes_descriptor(uint32_t address) {
    return uint64_t(layout::CODES_DESCRIPTOR_HIGH) << 32 | layout::codes_descriptor_low(address);
}
__device__ __forceinline__ uint64_t scales_descriptor(uint32_t address) {
    return uint64_t(layout::SCALES_DESCRIPTOR_HIGH) << 32 | layout::scales_descriptor_low(address);
}

// A barrier that does not come within seconds ends the kernel with an error: a step never hangs.
__device__ __forceinline__ void wait_for_barrier(uint32_t barrier, uint32_t parity) {
    for (int i = 0; i < 1 << 24; i++) {
        uint32_t done;
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
        if (done) return;
    }
    __trap();
}

// 128 rows of four scales, to four columns of every 32 lanes of tensor memory.
__device__ __forceinline__ void copy_scales(uint32_t to, uint32_t address) {
    asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(to), "l"(scales_descriptor(address)) : "memory");
}

// Sums[128 outputs][128 tokens] (+)= A[128][64] B[64][128], each block of 16 columns times its two scales.
__device__ __forceinline__ void multiply(
    uint32_t sums, uint32_t a, uint32_t b, uint32_t a_scales, uint32_t b_scales, bool add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.u32 add, %6, 0;\n"
                 "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [%0], %1, %2, %3, [%4], [%5], add;\n}"
                 ::"r"(sums), "l"(codes_descriptor(a)), "l"(codes_descriptor(b)), "r"(layout::INSTRUCTION), "r"(a_scales), "r"(b_scales),
                 "r"(uint32_t(add))
                 : "memory");
}

#define D4(i) "=r"(to[i]), "=r"(to[i + 1]), "=r"(to[i + 2]), "=r"(to[i + 3])
// This warp's 32 lanes of 32 columns, a lane each.
__device__ __forceinline__ void load_sums(uint32_t (&to)[32], uint32_t from) {
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, [%32];\n"
                 "tcgen05.wait::ld.sync.aligned;"
                 : D4(0), D4(4), D4(8), D4(12), D4(16), D4(20), D4(24), D4(28)
                 : "r"(from)
                 : "memory");
}

template <bool EXPERTS> __device__ __forceinline__ void gemm(const Fp4Gemm& p) {
    extern __shared__ uint8_t shared[];
    __shared__ uint32_t rows[layout::TILE_ROWS];
    __shared__ uint64_t barriers[STAGES]; // the products that read a slot are done
    __shared__ uint32_t tensor_memory;
    wait_for_previous();
    start_next();
    Operands<TILES> operands(p, rows, shared);
    if (!operands.find<EXPERTS>()) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const uint32_t barrier = shared_address(barriers);
    if (warp == 0) {
        asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(shared_address(&tensor_memory)),
                     "n"(layout::TENSOR_COLUMNS)
                     : "memory");
        asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::: "memory");
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + 8 * i) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#pragma unroll
    for (int k = 0; k < DISTANCE; k++) operands.bring(k, k);
    asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
    __syncthreads();
    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
    const uint32_t sums = tensor_memory;

    const int count = operands.count();
    for (int k = 0; k < count; k++) {
        wait_for_copies<DISTANCE - 1>();
        // What threads copied, the tensor cores and `tcgen05.cp` read by another way.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        const uint32_t slot = k % STAGES;
        if (threadIdx.x == 0) {
            const int tiles = operands.tiles(k);
            // Copies and products of one thread are done in their order.
            for (int tile = 0; tile < tiles; tile++) {
                uint32_t a_scales = sums + layout::tensor_scales(slot, 0, tile), b_scales = sums + layout::tensor_scales(slot, 1, tile);
                copy_scales(a_scales, operands.scales(slot, 0, tile));
                copy_scales(b_scales, operands.scales(slot, 1, tile));
                multiply(sums, operands.codes(slot, 0, tile), operands.codes(slot, 1, tile), a_scales, b_scales, k + tile > 0);
            }
            asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(barrier + 8 * slot) : "memory");
        }
        // The slot to be filled was read by the products before these.
        if (k > 0 && k + DISTANCE < count) wait_for_barrier(barrier + 8 * ((k - 1) % STAGES), (k - 1) / STAGES % 2);
        operands.bring(k + DISTANCE, (k + DISTANCE) % STAGES);
    }
    wait_for_barrier(barrier + 8 * ((count - 1) % STAGES), (count - 1) / STAGES % 2);
    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");

    // Lane i of tensor memory has row i, column j token j. The rows of a pair lie eight lanes apart.
    const uint32_t row = layout::tensor_lane(warp) + lane, row_tile = blockIdx.x * ROW_BLOCK_TILES + row / TILE_ROWS, pair = row % 8;
    const bool inside = row_tile * TILE_ROWS < p.matrix.rows;
    const uint32_t mine = layout::finished(lane);
    Affine affine;
    if (inside) affine.load(p.epilogue, p.matrix, operands.expert, row_tile, pair);
#pragma unroll 1
    for (int part = 0; part < 2; part++) {
        const int first = layout::tensor_token(warp) + 32 * part;
        if (first >= operands.n) break;
        uint32_t v[32];
        load_sums(v, sums + (layout::tensor_lane(warp) << 16) + first);
#pragma unroll
        for (int i = 0; i < 32; i += 2) {
            float own = __uint_as_float(mine ? v[i + 1] : v[i]);
            float other = __uint_as_float(__shfl_sync(~0u, mine ? v[i] : v[i + 1], layout::partner(lane)));
            int token = first + i + mine;
            if (!inside || token >= operands.n) continue;
            finish(p.epilogue, p.matrix, affine, row_tile, pair, operands.first + token, mine ? other : own, mine ? own : other);
        }
    }
    asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
    __syncthreads();
    if (warp == 0)
        asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(sums), "n"(layout::TENSOR_COLUMNS) : "memory");
}

extern "C" __global__ void __launch_bounds__(layout::THREADS) fp4_gemm(const __grid_constant__ Fp4Gemm p) { gemm<false>(p); }
extern "C" __global__ void __launch_bounds__(layout::THREADS) fp4_gemm_experts(const __grid_constant__ Fp4Gemm p) { gemm<true>(p); }
