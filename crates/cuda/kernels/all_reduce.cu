// Where several GPUs share a model: adds what each of them found behind attention to the residual stream, which each has.
#include "shared.cuh"

struct AllReduce {
    Peers peers;
    float* residual; // [len]
    uint32_t vectors, padding;
};
static_assert(sizeof(AllReduce) == 168);

extern "C" __global__ void __launch_bounds__(256) all_reduce(const __grid_constant__ AllReduce p) {
    wait_for_previous();
    start_next();
    meet(p.peers, blockIdx.x);
    float4* residual = (float4*)p.residual;
#pragma unroll 2
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < p.vectors; i += gridDim.x * blockDim.x)
        residual[i] = add_all(p.peers, i, residual[i]);
}
