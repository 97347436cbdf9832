// What every kernel needs: 16-bit pairs, tensor core products, dependent launch, the order of packed weights.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

// Formats of a packed matrix; the same numbers as in `params.rs`.
enum Format : uint32_t { BF16 = 0, FP4 = 1 };

constexpr int WARP = 32;
// A tile of packed weights: 16 outputs by 64 inputs.
constexpr int TILE_ROWS = 16;
constexpr int TILE_COLS = 64;
constexpr int HEAD = 64;
constexpr int BLOCK_TOKENS = 16;

// Lane `4 g + t` of a warp holds rows g and g + 8 of a tile, and of its inputs 16 t .. 16 t + 15: product j of four takes
// 16 t + 4 j + {0, 1, 2, 3} of them. One lane's inputs are then one NVFP4 block per row, and 32 contiguous bytes of 16-bit
// activations.
__device__ __forceinline__ int lane_row() { return (threadIdx.x % WARP) / 4; }
__device__ __forceinline__ int lane_quarter() { return threadIdx.x % 4; }

// In place of the id of the largest logit where one is infinite or no number; `NO_NUMBER` in Rust.
constexpr uint32_t NO_NUMBER = ~0u;
// A logit's rank: larger ones first, then the lower id; what is infinite or no number before all others.
__device__ __forceinline__ unsigned long long ranked(float v, uint32_t id) {
    uint32_t bits = __float_as_uint(v == 0.f ? 0.f : v);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (unsigned long long)(isfinite(v) ? bits : ~0u) << 32 | ~id;
}
__device__ __forceinline__ uint32_t id_of_largest(unsigned long long best) {
    return best >> 32 == ~0u ? NO_NUMBER : ~uint32_t(best);
}

// Waits until the kernels before this one are complete and their writes visible. What may be read earlier `start_next` says.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start, as far as there is room. Where it comes after `wait_for_previous`, whatever the next kernel reads before
// its own wait was complete before this kernel began its work; earlier only if the next reads nothing but weights, the step's words and
// older keys and values before its wait.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Weights are read once per step: they should not push activations out of the cache.
__device__ __forceinline__ uint4 load_once(const uint4* p) { return __ldcs(p); }

// The smaller and the larger of two. What is no number stays so, else a damaged weight would go unseen.
__device__ __forceinline__ float smaller(float a, float b) {
    float v;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}
__device__ __forceinline__ float larger(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

template <Format F> struct Number;
template <> struct Number<BF16> {
    using Type = __nv_bfloat16;
    static __device__ __forceinline__ Type from(float v) { return __float2bfloat16_rn(v); }
    // D[16 outputs][8 columns] += A[16][16] B[16][8]
    static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
template <> struct Number<FP4> {
    // Four-bit weights times their block scales are exact in FP16, and FP16 activations keep three more bits than BF16.
    using Type = __half;
    // Saturates: an infinity would turn into NaN further on.
    static __device__ __forceinline__ Type from(float v) { return __float2half_rn(smaller(larger(v, -65504.f), 65504.f)); }
    static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// A number as the sum of three BF16 ones, of pairs: what tensor cores multiply as exactly as f32.
__device__ __forceinline__ void split(float a, float b, uint32_t (&parts)[3]) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        parts[i] = reinterpret_cast<uint32_t&>(pair);
        a -= __uint_as_float(parts[i] << 16), b -= __uint_as_float(parts[i] & 0xffff0000u);
    }
}

// What several kernels do with a token, said so that the compiler rounds alike in all of them.
__device__ __forceinline__ float4 times(const float4& a, const float4& b) {
    return make_float4(__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y), __fmul_rn(a.z, b.z), __fmul_rn(a.w, b.w));
}
__device__ __forceinline__ float add_squares(float sum, const float4& v) {
    return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
}

// A 16-bit activation of the type that a matrix of format `format` is multiplied with.
__device__ __forceinline__ uint16_t activation(uint32_t format, float v) {
    return format == FP4 ? __half_as_ushort(Number<FP4>::from(v)) : __bfloat16_as_ushort(Number<BF16>::from(v));
}

// Addresses in shared memory, as instructions take them, and what is read and brought there.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ uint4 load_shared(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}
// Four matrices of eight by eight 16-bit numbers, of each of which a lane has two of row g; lane `8 i + r` knows where row r of the i-th is.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// What is read once leaves the cache first.
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Words that come while the kernel that finds them still runs: all bits are set until then. A half may come by itself; no 16-bit activation has
// all bits set, not even what is no number, nor has a sum in f32. These loads see what other multiprocessors have written.
__device__ __forceinline__ uint32_t load_word(const void* from) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_words(const void* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
// Not zero if one of the halves is zero.
__device__ __forceinline__ uint32_t zero_half(uint32_t v) { return (v - 0x00010001u) & ~v & 0x80008000u; }
// Whether both halves have come.
__device__ __forceinline__ bool has_come(uint32_t v) { return !zero_half(~v); }

// How keys and values are stored; the same numbers as in Rust.
enum CacheFormat : uint32_t { CACHE_BF16 = 0, CACHE_E4M3 = 1 };

// The nearest E4M3 number, at most 448.
__device__ __forceinline__ uint8_t e4m3(float v) { return __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3); }

// Four E4M3 numbers as FP16 ones, each times 1 / E4M3_WIDENED. Where no instruction does it: exponents of both begin behind the sign, seven
// and fifteen from zero.
__device__ __forceinline__ uint2 widen_e4m3(uint32_t v) {
#if __CUDA_ARCH__ >= 890
    uint2 out;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
        : "=r"(out.x), "=r"(out.y)
        : "r"(v));
    return out;
#else
    // What is no number stays none: all bits of such a half are set.
    const uint32_t none = __vcmpeq4(v & 0x7f7f7f7fu, 0x7f7f7f7fu);
    auto half = [&](uint32_t spread) {
        const uint32_t bits = __byte_perm(v, 0, spread);
        return (bits & 0x80008000u) | (bits & 0x7f007f00u) >> 1;
    };
    return make_uint2(half(0x1404) | __byte_perm(none, 0, 0x1100), half(0x3424) | __byte_perm(none, 0, 0x3322));
#endif
}
#if __CUDA_ARCH__ >= 890
constexpr float E4M3_WIDENED = 1;
#else
constexpr float E4M3_WIDENED = 256;
#endif

// Where input `k` of 64 lies in a row of stacked activations: what a product of sixteen inputs takes lies side by side.
__device__ __forceinline__ uint32_t product_position(uint32_t k) {
    uint32_t t = k / 16 % 4, j = k / 4 % 4, i = k % 4;
    return 16 * j + 8 * (i / 2) + 2 * t + i % 2;
}

// Where input `k` of a row of activations lies. Plain (`stack` is 0): row by row of `cols` inputs. `ORDERED`: the same, but of every 64
// inputs in the order of `product_position`. Stacked: `stack` rows of the first 64 inputs, of the next 64, and so on, each 128 bytes
// whose pieces of 16 are exchanged by the row's number modulo 8, as warpgroup products read them in shared memory: the rows of a tile
// are one piece of memory.
constexpr uint32_t ORDERED = ~0u;
__device__ __forceinline__ size_t activation_place(uint32_t stack, uint32_t cols, uint32_t row, uint32_t k) {
    if (stack == 0) return size_t(row) * cols + k;
    uint32_t position = product_position(k % TILE_COLS);
    if (stack == ORDERED) return size_t(row) * cols + k / TILE_COLS * TILE_COLS + position;
    return (size_t(k / TILE_COLS) * stack + row) * TILE_COLS + ((position / 8 ^ row % 8) << 3 | position % 8);
}

// A packed matrix, or a stack of one per expert.
struct Matrix {
    const uint4* weights;      // [experts, row tiles, column tiles, vectors of a tile]
    const uint16_t* scales;    // FP4: [experts, row tiles, column tiles, 32]
    const float* tile_scale;   // FP4: [experts, row tiles], else null
    const float* bias;         // [experts, rows] in stored order, or null
    uint32_t rows, cols;       // cols: padded to whole tiles
};
static_assert(sizeof(Matrix) == 40);
__device__ __forceinline__ int row_tiles_of(const Matrix& m) { return (m.rows + TILE_ROWS - 1) / TILE_ROWS; }

// One lane's share of a tile of packed weights, as loaded.
template <Format F> struct Tile;

// Where this lane's share of a tile lies.
template <Format F> struct Pointer {
    const uint4* weights;
    const uint16_t* scales;
    __device__ __forceinline__ Pointer(const Matrix& m, size_t tile)
        : weights(m.weights + tile * Tile<F>::VECTORS + threadIdx.x % WARP), scales(m.scales + tile * WARP + threadIdx.x % WARP) {}
};

template <> struct Tile<BF16> {
    static constexpr int VECTORS = 4 * WARP; // 16-byte vectors of a tile
    uint4 words[4];
    // The tile `more` tiles further on.
    __device__ __forceinline__ void load(const Pointer<BF16>& from, int more) {
#pragma unroll
        for (int j = 0; j < 4; j++) words[j] = load_once(from.weights + more * VECTORS + j * WARP);
    }
    // For what other blocks read too.
    __device__ __forceinline__ void load_again(const Pointer<BF16>& from, int more) {
#pragma unroll
        for (int j = 0; j < 4; j++) words[j] = __ldg(from.weights + more * VECTORS + j * WARP);
    }
    // The same, of what two products take, when this tile's products `2 pair` and `2 pair + 1` have their fragments.
    __device__ __forceinline__ void follow(const Pointer<BF16>& from, int more, int pair) {
#pragma unroll
        for (int j = 2 * pair; j < 2 * pair + 2; j++) words[j] = __ldg(from.weights + more * VECTORS + j * WARP);
    }
    __device__ __forceinline__ void scale(uint32_t (&)[2]) const {}
    __device__ __forceinline__ void fragment(int j, const uint32_t (&)[2], uint32_t (&a)[4]) const {
        a[0] = words[j].x, a[1] = words[j].y, a[2] = words[j].z, a[3] = words[j].w;
    }
};

// A word holds eight codes, their bits mixed so that each pair becomes two FP16 numbers, 2^-14 of the values, by few instructions: see
// `mix` in pack.cu.
__device__ __forceinline__ void codes(uint32_t word, uint32_t (&a)[4]) {
    constexpr uint32_t CODES = 0x8e008e00u;
    a[0] = word << 6 & CODES;
    a[1] = word << 9 & CODES;
    a[2] = (word ^ word >> 3) & CODES;
    a[3] = (word ^ word << 2) & CODES;
}

template <> struct Tile<FP4> {
    static constexpr int VECTORS = WARP;
    uint4 words;
    uint32_t scales; // row g in the low byte, row g + 8 above it
    __device__ __forceinline__ void load(const Pointer<FP4>& from, int more) {
        words = load_once(from.weights + more * VECTORS);
        scales = __ldcs(from.scales + more * WARP);
    }
    __device__ __forceinline__ void load_again(const Pointer<FP4>& from, int more) {
        words = __ldg(from.weights + more * VECTORS);
        scales = __ldg(from.scales + more * WARP);
    }
    // All at once, after the last products.
    __device__ __forceinline__ void follow(const Pointer<FP4>& from, int more, int pair) {
        if (pair == 1) load_again(from, more);
    }
    // A scale byte has five bits of exponent and three of mantissa: the middle of an FP16 number.
    __device__ __forceinline__ void scale(uint32_t (&s)[2]) const {
        const uint32_t rows = __byte_perm(scales, 0, 0x4140) << 7;
        // A product can take either half twice: these are no instructions.
        const __half2 lower = __low2half2(reinterpret_cast<const __half2&>(rows)), upper = __high2half2(reinterpret_cast<const __half2&>(rows));
        s[0] = reinterpret_cast<const uint32_t&>(lower), s[1] = reinterpret_cast<const uint32_t&>(upper);
    }
    __device__ __forceinline__ void fragment(int j, const uint32_t (&s)[2], uint32_t (&a)[4]) const {
        codes(j == 0 ? words.x : j == 1 ? words.y : j == 2 ? words.z : words.w, a);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            __half2 v = __hmul2(reinterpret_cast<__half2&>(a[i]), reinterpret_cast<const __half2&>(s[i % 2]));
            a[i] = reinterpret_cast<uint32_t&>(v);
        }
    }
};

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int i = WARP / 2; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

// The squares of a row of the residual stream, of which a thread has the vectors `i * blockDim.x + threadIdx.x`, whatever the size of the
// block: those of 32 neighbouring vectors are added by their warp, then these sums in their order. Every thread gets the sum; `sums` has
// one float for each that the threads have room for.
template <int COUNT> __device__ __forceinline__ float sum_of_squares(const float4 (&v)[COUNT], float* sums) {
    const uint32_t warps = blockDim.x / WARP;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float part = warp_sum(add_squares(0, v[i]));
        if (threadIdx.x % WARP == 0) sums[i * warps + threadIdx.x / WARP] = part;
    }
    __syncthreads();
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < COUNT * warps; i++) sum += sums[i];
    return sum;
}

// Sums `v` over the block; every thread gets the sum. `shared` has one float per warp.
__device__ __forceinline__ float block_sum(float v, float* shared) {
    v = warp_sum(v);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = v;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < (int)blockDim.x / WARP; i++) sum += shared[i];
    return sum;
}

// True in the last of `count` blocks to arrive, which sees what the others wrote before.
__device__ __forceinline__ bool last_to_arrive(uint32_t* counter, uint32_t count) {
    __shared__ uint32_t arrived;
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(arrived) : "l"(counter) : "memory");
        if (arrived == count - 1) *counter = 0;
    }
    __syncthreads();
    return arrived == count - 1;
}

// Up to 4 COUNT values per thread of one row of the residual stream, or of a scale, all loads in flight together.
template <int COUNT> struct Vector {
    float4 v[COUNT];
    __device__ __forceinline__ void load(const float* from, uint32_t len) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            uint32_t at = i * blockDim.x + threadIdx.x;
            v[i] = at < len / 4 ? ((const float4*)from)[at] : make_float4(0, 0, 0, 0);
        }
    }
    __device__ __forceinline__ float square() const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < COUNT; i++) sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
        return sum;
    }
    // The values times `scale` and `inverse`, as activations of row `row`; those up to `cols` are zeros.
    __device__ __forceinline__ void store(
        uint16_t* to, uint32_t stack, uint32_t row, uint32_t cols, uint32_t format, const Vector& scale, float inverse) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            uint32_t at = 4 * (i * blockDim.x + threadIdx.x);
            if (at >= cols) return;
            const float4 &a = v[i], &b = scale.v[i];
            *(uint32_t*)(to + activation_place(stack, cols, row, at))
                = activation(format, a.x * inverse * b.x) | activation(format, a.y * inverse * b.y) << 16;
            *(uint32_t*)(to + activation_place(stack, cols, row, at + 2))
                = activation(format, a.z * inverse * b.z) | activation(format, a.w * inverse * b.w) << 16;
        }
    }
};

// Widest row of the residual stream, and what a thread of 256 holds of it.
constexpr int MAX_HIDDEN = 4096;
constexpr int PRODUCT_VALUES = MAX_HIDDEN / 4 / 256;

// A barrier of all threads of a cluster; of a block before Hopper, where there are no clusters.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#else
    __syncthreads();
#endif
}

// What block `rank` of the cluster has at the same place of its shared memory.
__device__ __forceinline__ float read_of_cluster(const float* own, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
    float v;
    asm volatile("{\n.reg .u32 a;\nmapa.shared::cluster.u32 a, %1, %2;\nld.shared::cluster.f32 %0, [a];\n}"
                 : "=f"(v)
                 : "r"(shared_address(own)), "r"(rank)
                 : "memory");
    return v;
#else
    return *own;
#endif
}
