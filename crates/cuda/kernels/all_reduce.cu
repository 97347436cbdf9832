// Where several GPUs share a model: adds what each of them found behind attention to the residual stream, which each has.
#include "shared.cuh"

struct AllReduce {
    Peers peers;
    float* added;    // [len]: of this GPU; zero afterwards
    float* residual; // [len]
    uint32_t vectors, padding;
};
static_assert(sizeof(AllReduce) == 104);

constexpr int TOGETHER = 4; // vectors of a thread

extern "C" __global__ void __launch_bounds__(64) all_reduce(const __grid_constant__ AllReduce p) {
    wait_for_previous();
    start_next();
    float4* residual = (float4*)p.residual;
    uint32_t at[TOGETHER];
    float4 sum[TOGETHER], before[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
        const uint32_t i = (blockIdx.x * TOGETHER + k) * blockDim.x + threadIdx.x;
        at[k] = i < p.vectors ? i : NOT_GIVEN;
        if (at[k] == NOT_GIVEN) continue;
        sum[k] = ((const float4*)p.added)[i];
        before[k] = residual[i];
    }
    add_all(p.peers, at, sum);
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
        if (at[k] == NOT_GIVEN) continue;
        ((float4*)p.added)[at[k]] = make_float4(0, 0, 0, 0);
        residual[at[k]] = make_float4(before[k].x + sum[k].x, before[k].y + sum[k].y, before[k].z + sum[k].z, before[k].w + sum[k].w);
    }
    end_of_sum(p.peers);
}
