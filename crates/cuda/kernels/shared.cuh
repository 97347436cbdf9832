// What GPUs that share a model tell one another. They read one another's memory, over the links between them.
#pragma once
#include "common.cuh"

constexpr int MAX_GPUS = 8;
constexpr unsigned long long PATIENCE = 60ull * 1000 * 1000 * 1000; // nanoseconds

struct Peers {
    float* added[MAX_GPUS];      // [n, hidden]: what each rank adds to the residual stream, on its GPU
    uint32_t* arrived[MAX_GPUS]; // [ranks, places] on each GPU: the round to which each place of each rank has come
    uint32_t* rounds;            // [places] of this GPU
    uint32_t rank, ranks, places, padding;
};
static_assert(sizeof(Peers) == 152);

__device__ __forceinline__ unsigned long long nanoseconds() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// The other GPU is lost if what it gives does not come. Then this one must not wait for ever.
struct Wait {
    unsigned long long begin = nanoseconds();
    __device__ __forceinline__ void go_on() const {
        if (nanoseconds() - begin > PATIENCE) __trap();
    }
};

// A number for another GPU, and as `load_word` and `load_words` what others have given.
__device__ __forceinline__ void give(float* to, float v) { asm volatile("st.relaxed.sys.global.f32 [%0], %1;" ::"l"(to), "f"(v) : "memory"); }
__device__ __forceinline__ uint32_t look(const float* from) {
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ uint4 look_at_four(const float4* from) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}

// A block waits for those of its place on the other GPUs. What they, and the kernels before them, have written before can then be read.
__device__ __forceinline__ void meet(const Peers& p, uint32_t place) {
    __syncthreads();
    if (threadIdx.x < p.ranks && threadIdx.x != p.rank) {
        const uint32_t round = p.rounds[place] + 1;
        uint32_t* told = p.arrived[threadIdx.x] + p.rank * p.places + place;
        const uint32_t* other = p.arrived[p.rank] + threadIdx.x * p.places + place;
        asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(told), "r"(round) : "memory");
        const Wait wait;
        while (true) {
            uint32_t arrived;
            asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(arrived) : "l"(other) : "memory");
            if (int32_t(arrived - round) >= 0) break;
            wait.go_on();
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) p.rounds[place]++;
}

// `sum` and what all ranks add there, in the order of the ranks: all find the same bits.
__device__ __forceinline__ float4 add_all(const Peers& p, size_t vector, float4 sum) {
    float4 v[MAX_GPUS];
#pragma unroll
    for (int r = 0; r < MAX_GPUS; r++)
        if (r < p.ranks) (uint4&)v[r] = look_at_four((const float4*)p.added[r] + vector);
#pragma unroll
    for (int r = 0; r < MAX_GPUS; r++)
        if (r < p.ranks) sum.x += v[r].x, sum.y += v[r].y, sum.z += v[r].z, sum.w += v[r].w;
    return sum;
}
