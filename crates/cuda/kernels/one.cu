// The kernels of a step of one token.
#include "one.cuh"

#define KERNEL(NAME, REGISTERS, ...)                                                                                            \
    extern "C" __global__ void __maxnreg__(REGISTERS) NAME(const __grid_constant__ One p) { __VA_ARGS__(p, Alone()); }         \
    extern "C" __global__ void __maxnreg__(REGISTERS) NAME##_shared(const __grid_constant__ SharedOne p) { __VA_ARGS__(p.one, p.together); }
KERNEL(one_qkv_bf16, 56, qkv<BF16, 1, 3>)
KERNEL(one_qkv_fp4, 56, qkv<FP4, 9, 1>)
KERNEL(one_attended_bf16, 56, attended<BF16, 1, 3>)
KERNEL(one_attended_fp4, 56, attended<FP4, 4, 1>)
KERNEL(one_experts_bf16, 48, both_products<BF16, 1, 2>)
KERNEL(one_experts_fp4, 48, both_products<FP4, 3, 2>)
// For multiprocessors of 100 KB of shared memory, which have less bandwidth and need less on its way: two blocks of the projection have room.
KERNEL(one_qkv_bf16_small, 56, qkv<BF16, 1, 2>)
KERNEL(one_attended_bf16_small, 56, attended<BF16, 1, 1>)
KERNEL(one_experts_fp4_small, 48, both_products<FP4, 2, 2>)
KERNEL(one_norm_bf16, 64, last_norm<BF16>)
KERNEL(one_norm_fp4, 64, last_norm<FP4>)
#define OUTPUT(NAME, ...) \
    extern "C" __global__ void __maxnreg__(64) NAME(const __grid_constant__ One p) { __VA_ARGS__(p); }
OUTPUT(one_output_bf16, output<BF16, 1, 4>)
OUTPUT(one_output_fp4, output<FP4, 5, 3>)
