// Activations from 16 bits to NVFP4 with a static scale, for the native FP4 products; bit for bit as `numerics` on the CPU.
#include "common.cuh"

struct Quantize {
    const uint16_t* input; // [n, cols]
    uint8_t* codes;        // [n, cols / 2], the even column in the low nibble
    uint8_t* scales;       // [n, cols / 16], E4M3
    uint32_t n, cols;      // cols: a multiple of 16
    uint32_t format;       // of the input
    float input_scale;
};
static_assert(sizeof(Quantize) == 40);

// To nearest, ties to even, saturating; not negative.
__device__ __forceinline__ uint32_t to_e4m3(float v) {
    v = fminf(v, 448.f);
    if (v < 0.015625f) return __float2uint_rn(v * 512.f);
    uint32_t bits = __float_as_uint(v);
    return ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
}

__device__ __forceinline__ float from_e4m3(uint32_t byte) {
    uint32_t e = byte >> 3, m = byte & 7;
    return e ? __uint_as_float((e + 120) << 23 | m << 20) : m * 0.001953125f;
}

// To nearest, ties to the even code; the sign of what is less than zero.
__device__ __forceinline__ uint32_t to_e2m1(float v) {
    float m = fabsf(v);
    uint32_t code = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) + (m >= 3.5f) + (m > 5.f);
    return code | (v < 0.f ? 8 : 0);
}

// One thread per block of 16.
extern "C" __global__ void __launch_bounds__(256) quantize(const __grid_constant__ Quantize p) {
    wait_for_previous();
    start_next();
    size_t block = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
    if (block >= size_t(p.n) * (p.cols / 16)) return;
    uint4 words[2] = {((const uint4*)p.input)[2 * block], ((const uint4*)p.input)[2 * block + 1]};
    const uint16_t* halves = (const uint16_t*)words;
    float v[16], largest = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        v[i] = p.format == FP4 ? __half2float(__ushort_as_half(halves[i])) : __bfloat162float(__ushort_as_bfloat16(halves[i]));
        largest = larger(largest, fabsf(v[i]));
    }
    // The divisions are IEEE's, as in the reference: a product with the inverse changes bytes at ties.
    uint32_t scale = to_e4m3(__fdiv_rn(largest, __fmul_rn(6.f, p.input_scale)));
    // E4M3's NaN: the products are none, either.
    if (!isfinite(largest)) scale = 0x7f;
    float s = __fmul_rn(from_e4m3(scale), p.input_scale);
    uint32_t code[2] = {};
#pragma unroll
    for (int i = 0; i < 16; i++) code[i / 8] |= (s > 0 ? to_e2m1(__fdiv_rn(v[i], s)) : 0) << i % 8 * 4;
    ((uint2*)p.codes)[block] = make_uint2(code[0], code[1]);
    p.scales[block] = scale;
}
