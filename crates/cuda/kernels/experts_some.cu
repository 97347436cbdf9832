// Experts with some more tokens each, whose weights are still read once.
constexpr int GROUPS = 4, UNIT = 4, TOKENS = 24, ALONE = 8;
#include "experts_few.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1) experts_some(const __grid_constant__ Few p) { experts(p); }
