// What GPUs that share a model tell one another. They read and write one another's memory, over the links between them, or the host's.
#pragma once
#include "common.cuh"

constexpr int MAX_GPUS = 8;
constexpr uint32_t NOT_GIVEN = ~0u; // a word that has not come yet
constexpr unsigned long long PATIENCE = 60ull * 1000 * 1000 * 1000; // nanoseconds

// How a sum of all GPUs goes. A vector is four numbers in 16 bits each; one with all bits set has not come yet.
struct Peers {
    uint2* received[MAX_GPUS]; // of each GPU: [ranks - 1, stride] vectors that the others add, then [vectors] sums; all bits set before and after
    uint32_t rank, ranks, stride;
    uint16_t divided; // 1: each GPU sums a share of all and gives the sums to the others; 0: each sums all
    uint16_t by_host; // 1: `received` is memory of the host
};
static_assert(sizeof(Peers) == 80);
constexpr uint32_t OWNED = 16; // vectors in a row that are one GPU's where the sum is divided

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
__device__ __forceinline__ uint4 look(const uint4* from) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ uint2 look(const uint2* from) {
    uint2 v;
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ void give(uint2* to, const uint2& v) {
    asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ bool has_come(const uint2& v) { return max(v.x, v.y) != NOT_GIVEN; }

// Numbers go as FP16 of their 64th: up to 4,192,256, with an error of at most one in 2,048, or of 2^-19 if that is more. A larger one
// becomes infinite, and what is no number has not all bits set.
constexpr float WIRE_SCALE = 64;
__device__ __forceinline__ uint2 to_wire(const float4& v) {
    const __half2 lower = __floats2half2_rn(v.x / WIRE_SCALE, v.y / WIRE_SCALE), upper = __floats2half2_rn(v.z / WIRE_SCALE, v.w / WIRE_SCALE);
    return make_uint2((const uint32_t&)lower, (const uint32_t&)upper);
}
__device__ __forceinline__ float4 from_wire(const uint2& v) {
    const float2 lower = __half22float2((const __half2&)v.x), upper = __half22float2((const __half2&)v.y);
    return make_float4(lower.x * WIRE_SCALE, lower.y * WIRE_SCALE, upper.x * WIRE_SCALE, upper.y * WIRE_SCALE);
}

// Vectors as they come, each of which is then as it was.
template <int COUNT> __device__ __forceinline__ void take(uint2* from, const uint32_t (&at)[COUNT], const bool (&wanted)[COUNT], uint2 (&v)[COUNT]) {
#pragma unroll
    for (int k = 0; k < COUNT; k++)
        if (wanted[k]) v[k] = look(from + at[k]);
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        if (!wanted[k]) continue;
        if (!has_come(v[k]))
            for (const Wait wait; !has_come(v[k] = look(from + at[k])); wait.go_on()) {}
        from[at[k]] = make_uint2(NOT_GIVEN, NOT_GIVEN);
    }
}

// Of all vectors of a sum those at `at` (none where that is NOT_GIVEN): what this GPU adds becomes what all add, in the order of the ranks,
// and the same bits on each and whether it is divided or not. Threads of a warp come together.
template <int COUNT> __device__ __forceinline__ void add_all(const Peers& p, const uint32_t (&at)[COUNT], float4 (&sum)[COUNT]) {
    // Where rank `of` finds what rank `from` adds, and the sums.
    auto added = [&](uint32_t of, uint32_t from) { return p.received[of] + size_t(from - (from > of)) * p.stride; };
    auto sums = [&](uint32_t of) { return p.received[of] + size_t(p.ranks - 1) * p.stride; };
    bool own[COUNT], others[COUNT];
    uint32_t place[COUNT];
    uint2 mine[COUNT], v[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        const uint32_t owner = p.divided ? at[k] / OWNED % p.ranks : p.rank;
        own[k] = at[k] != NOT_GIVEN && owner == p.rank, others[k] = at[k] != NOT_GIVEN && owner != p.rank;
        place[k] = p.divided ? at[k] / (OWNED * p.ranks) * OWNED + at[k] % OWNED : at[k];
        mine[k] = to_wire(sum[k]);
        if (others[k]) give(added(owner, p.rank) + place[k], mine[k]);
        if (own[k] && !p.divided)
            for (uint32_t r = 0; r < p.ranks; r++)
                if (r != p.rank) give(added(r, p.rank) + place[k], mine[k]);
        sum[k] = make_float4(0, 0, 0, 0);
    }
    for (uint32_t r = 0; r < p.ranks; r++) {
        if (r != p.rank) take(added(p.rank, r), place, own, v);
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const float4 x = from_wire(r == p.rank ? mine[k] : v[k]);
            if (own[k]) sum[k].x += x.x, sum[k].y += x.y, sum[k].z += x.z, sum[k].w += x.w;
        }
    }
    // Given before anyone waits for sums, which others of this warp give.
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        if (!own[k]) continue;
        v[k] = to_wire(sum[k]);
        if (!p.divided) continue;
        for (uint32_t r = 0; r < p.ranks; r++)
            if (r != p.rank) give(sums(r) + at[k], v[k]);
    }
    __syncwarp();
    if (p.divided) take(sums(p.rank), at, others, v);
#pragma unroll
    for (int k = 0; k < COUNT; k++)
        if (at[k] != NOT_GIVEN) sum[k] = from_wire(v[k]);
}

// By each thread at its end. Another GPU writes to the same places when it has heard from a later kernel of this one: by then it is known
// everywhere that nothing has come there yet. In a GPU's own memory it is without this.
__device__ __forceinline__ void end_of_sum(const Peers& p) {
    if (p.by_host) __threadfence_system();
}
