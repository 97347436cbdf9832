// The kernels of a step of one token whose sums are those of a batch, as Hopper has it.
#include "one.cuh"

#define KERNEL(NAME, REGISTERS, ...) \
    extern "C" __global__ void __maxnreg__(REGISTERS) NAME(const __grid_constant__ One p) { __VA_ARGS__(p, Alone()); }
KERNEL(one_qkv_bf16_invariant, 56, qkv<BF16, 2, 3, true>)
KERNEL(one_qkv_fp4_invariant, 56, qkv<FP4, 8, 2, true>)
KERNEL(one_attended_bf16_invariant, 56, attended<BF16, 4, 3, true>)
KERNEL(one_attended_fp4_invariant, 56, attended<FP4, 8, 2, true>)
KERNEL(one_experts_bf16_invariant, 48, both_products<BF16, 1, 4, true>)
KERNEL(one_experts_fp4_invariant, 48, both_products<FP4, 5, 2, true>)
KERNEL(one_norm_bf16_invariant, 64, last_norm<BF16, true>)
KERNEL(one_norm_fp4_invariant, 64, last_norm<FP4, true>)
extern "C" __global__ void __maxnreg__(64) one_output_fp4_invariant(const __grid_constant__ One p) { output<FP4, 5, 3, true>(p); }
