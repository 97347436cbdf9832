// Experts with few tokens each. The memory decides, and many warps keep it busy.
constexpr int GROUPS = 12, UNIT = 2, TOKENS = 16, ALONE = 16;
#include "experts_few.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1) experts_few(const __grid_constant__ Few p) { experts(p); }
