// Tokens and log-probabilities from logits where they lie, as gptoss's sampler finds them on the host, bit for bit: weights by the
// same operations, their sums those of integers. A row is read by SLICES blocks; only the most probable tokens of it are ever sorted.
#include <cfloat>

#include "common.cuh"

enum Kind : uint32_t {
    DRAW = 0,           // a token
    DRAW_PROCESSED = 1, // a token, and log-probabilities of the sorted few that it is drawn from
    DISTRIBUTION = 2,   // log-probabilities of a row
};

// What is asked of one row.
struct Job {
    float* logits;              // [vocabulary]
    const float* source;        // what `modify` makes them from: the same row, or another
    uint32_t* largest;          // id of the largest logit, or NO_NUMBER; `modify` finds it if it changes the row
    const uint32_t* mask;       // bit `i % 32` of word `i / 32` allows token `i`; or null
    const uint2* biases;        // token, f32; ascending tokens
    const uint2* seen;          // token, occurrences in the output; ascending tokens
    const uint32_t* ids;        // log-probabilities of these in place of the best
    uint64_t random;            // draws the token
    uint32_t mask_words, bias_count, seen_count, id_count;
    float repetition, frequency, presence;
    float temperature, min_p, top_p; // temperature 0: the largest logit is drawn
    uint32_t top_k;             // 0: all
    uint32_t top;               // log-probabilities of this many best
    uint32_t out;               // where its `Record` begins
    uint32_t token, token_from; // DISTRIBUTION: the token, or if not NONE the record that has it
    uint32_t kind;
    __device__ __forceinline__ bool modified() const { return mask || bias_count || seen_count; }
    // What comes of a row with a logit that is no number is not looked at, but must not be read from beyond it.
    __device__ __forceinline__ uint32_t largest_id() const { return *largest == NO_NUMBER ? 0 : *largest; }
    __device__ __forceinline__ float largest_logit() const { return logits[largest_id()]; }
    __device__ __forceinline__ bool limits_p() const { return top_p > 0 && top_p < 1; }
    // Whether the most probable tokens are wanted in their order.
    __device__ __forceinline__ bool greedy() const { return kind != DISTRIBUTION && !(temperature > 0); }
    __device__ __forceinline__ bool sorted() const {
        return kind == DISTRIBUTION ? top && !id_count : !greedy() && (top_k || limits_p());
    }
};
static_assert(sizeof(Job) == 128);
constexpr uint32_t NONE = ~0u;

// Words of an answer, followed by pairs of id and value, or by the values of `ids`.
struct Record {
    uint32_t token, failed, above; // `above`: how many values are larger than the token's
    float largest;
    uint64_t sum;                  // of exp(value - largest), in units of 1 / ONE
    float own;
    uint32_t count;                // of the pairs
};
static_assert(sizeof(Record) == 32);

// What the blocks of a job leave for those after them; zeros between steps.
struct Progress {
    uint32_t arrived, gathered, expected, complete;
};

struct Samples {
    const Job* jobs;
    uint64_t* best;         // [jobs, SLICES]
    uint64_t* sums;         // [jobs, SLICES]
    uint32_t* bins;         // [jobs, BINS]; zeros between steps
    Progress* progress;     // [jobs]
    uint64_t* candidates;   // [jobs, CAPACITY]
    uint32_t* out;
    uint32_t vocabulary, padding;
};
static_assert(sizeof(Samples) == 64);

constexpr uint32_t SLICES = 32, BINS = 512, CAPACITY = 4096, THREADS = 256, DRAWERS = 1024;

// The order of `f32::total_cmp`, descending, then the lower id: as one number, larger is earlier.
__device__ __forceinline__ uint64_t place_of(float v, uint32_t id) {
    uint32_t bits = __float_as_uint(v);
    return uint64_t(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~id;
}
__device__ __forceinline__ uint32_t id_of(uint64_t place) { return ~uint32_t(place); }
__device__ __forceinline__ float value_of(uint64_t place) {
    uint32_t bits = place >> 32;
    return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

// The largest weight, `ONE` of gptoss's sampling.rs.
constexpr float ONE = 1ull << 39;

// ONE * 2^exponent: `share` of gptoss's sampling.rs says how and why; no operation may be fused with another.
__device__ __forceinline__ float share(float exponent) {
    constexpr float SHIFT = 12582912.f + 39.f;
    exponent = fmaxf(exponent, -64.f);
    const float shifted = __fadd_rn(exponent, SHIFT), rest = __fsub_rn(exponent, __fsub_rn(shifted, SHIFT));
    constexpr float coefficients[] = {1.3410001e-3f, 9.618031e-3f, 5.5502973e-2f, 2.402265e-1f, 6.9314724e-1f, 1.f};
    float power = 1.5469732e-4f;
#pragma unroll
    for (int i = 0; i < 6; i++) power = __fadd_rn(__fmul_rn(power, rest), coefficients[i]);
    return __uint_as_float(__float_as_uint(power) + (__float_as_uint(shifted) << 23));
}

// A logit's share of the largest probability.
struct Weight {
    float largest, rate, least;
    __device__ __forceinline__ Weight(float largest, float temperature, float min_p)
        : largest(largest), rate(fminf(__fdiv_rn(1.44269504f, temperature), FLT_MAX)), least(__fmul_rn(min_p, ONE)) {}
    __device__ __forceinline__ Weight(const Job& j, float largest) : Weight(largest, j.temperature, j.min_p) {}
    __device__ __forceinline__ float operator()(float logit) const { return share(__fmul_rn(__fsub_rn(logit, largest), rate)); }
    __device__ __forceinline__ bool keeps(float logit) const { return (*this)(logit) >= least; }
    // Zero where min-p forbids it.
    __device__ __forceinline__ uint64_t kept(float logit) const {
        const float weight = (*this)(logit);
        return weight >= least ? (uint64_t)weight : 0;
    }
};

// What a row's values are: logits to draw from, or for log-probabilities those of what is drawn from.
struct Value {
    Weight weight;
    float temperature;
    bool changed;
    __device__ __forceinline__ Value(const Job& j, float largest)
        : weight(j, largest), temperature(j.temperature),
          changed(j.kind == DISTRIBUTION && (j.temperature != 1 || j.min_p > 0)) {}
    __device__ __forceinline__ float operator()(float logit) const {
        if (!changed) return logit;
        if (weight.least > 0 && !weight.keeps(logit)) return -INFINITY;
        return __fdiv_rn(logit, temperature);
    }
};

template <typename T, typename F> __device__ __forceinline__ T block_reduce(T v, F combine) {
    __shared__ T parts[WARP];
#pragma unroll
    for (int i = WARP / 2; i; i /= 2) v = combine(v, __shfl_xor_sync(~0u, v, i));
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = v;
    __syncthreads();
    v = parts[0];
    for (int i = 1; i < (int)blockDim.x / WARP; i++) v = combine(v, parts[i]);
    return v;
}
struct Sum {
    template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
struct Largest {
    template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a > b ? a : b; }
};
struct Least {
    template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a < b ? a : b; }
};

// The sum of `v` over the threads up to this one.
template <typename T> __device__ __forceinline__ T block_scan(T v) {
    __shared__ T parts[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int i = 1; i < WARP; i *= 2) {
        T other = __shfl_up_sync(~0u, v, i);
        if (lane >= i) v += other;
    }
    __syncthreads();
    if (lane == WARP - 1) parts[warp] = v;
    __syncthreads();
    T before = 0;
    for (int i = 0; i < warp; i++) before += parts[i];
    return before + v;
}

struct Slice {
    uint32_t begin, end;
    __device__ __forceinline__ Slice(uint32_t slice, uint32_t vocabulary) {
        uint32_t each = (vocabulary + SLICES - 1) / SLICES;
        begin = min(slice * each, vocabulary), end = min(begin + each, vocabulary);
    }
};

// What a thread takes at a time: five times five are its share of a slice of 201,088 tokens.
constexpr int ROUND = 5;

// Runs `use` for the values of a slice and the first one's token, from which to the next there are THREADS. Their loads are all under way
// before one is used; beyond the slice they are -inf.
template <typename F>
__device__ __forceinline__ void for_rounds(const float* logits, const Slice& slice, const Value& value, F use) {
    for (uint32_t first = slice.begin + threadIdx.x; first < slice.end; first += ROUND * THREADS) {
        float values[ROUND];
#pragma unroll
        for (int i = 0; i < ROUND; i++) values[i] = first + i * THREADS < slice.end ? logits[first + i * THREADS] : -INFINITY;
        if (value.changed)
#pragma unroll
            for (float& v : values) v = value(v);
        use(values, first);
    }
}

// Runs `change` for the entries of the slice's tokens, those of one token in their order on one thread.
template <typename F> __device__ __forceinline__ void for_entries(const uint2* entries, uint32_t count, const Slice& slice, F change) {
    uint32_t first = 0, last = count;
    while (first < last) {
        uint32_t middle = (first + last) / 2;
        if (entries[middle].x < slice.begin) first = middle + 1;
        else last = middle;
    }
    for (uint32_t i = first + threadIdx.x; i < count && entries[i].x < slice.end; i += blockDim.x) {
        if (i && entries[i - 1].x == entries[i].x) continue;
        for (uint32_t k = i; k < count && entries[k].x == entries[i].x; k++) change(entries[k]);
    }
    __syncthreads();
}

// Mask, biases and penalties, and the largest of what comes out. `blockIdx.x`: slice; `blockIdx.y`: job.
extern "C" __global__ void __launch_bounds__(THREADS) modify(const __grid_constant__ Samples p) {
    wait_for_previous();
    start_next();
    const Job& j = p.jobs[blockIdx.y];
    if (!j.modified()) return;
    const Slice slice(blockIdx.x, p.vocabulary);
    float* logits = j.logits;
    for (uint32_t i = slice.begin + threadIdx.x; i < slice.end; i += THREADS) {
        bool allowed = !j.mask || (i / 32 < j.mask_words && j.mask[i / 32] >> i % 32 & 1);
        logits[i] = allowed ? j.source[i] : -INFINITY;
    }
    __syncthreads();
    for_entries(j.biases, j.bias_count, slice, [&](uint2 e) { logits[e.x] = __fadd_rn(logits[e.x], __uint_as_float(e.y)); });
    for_entries(j.seen, j.seen_count, slice, [&](uint2 e) {
        float v = logits[e.x];
        v = v > 0 ? __fdiv_rn(v, j.repetition) : __fmul_rn(v, j.repetition);
        v = __fsub_rn(v, __fmul_rn(j.frequency, float(e.y)));
        logits[e.x] = e.y ? __fsub_rn(v, j.presence) : v;
    });
    uint64_t best = 0;
    for (uint32_t i = slice.begin + threadIdx.x; i < slice.end; i += THREADS) {
        float v = logits[i];
        // Zeros are equal, whatever their sign.
        if (!isnan(v)) best = max(best, place_of(v == 0 ? 0.f : v, i));
    }
    best = block_reduce(best, Largest());
    __shared__ uint32_t arrived;
    if (threadIdx.x == 0) {
        p.best[blockIdx.y * SLICES + blockIdx.x] = best;
        __threadfence();
        arrived = atomicAdd(&p.progress[blockIdx.y].arrived, 1);
    }
    __syncthreads();
    if (arrived != SLICES - 1 || threadIdx.x >= WARP) return;
    __threadfence();
    best = __ldcg(p.best + blockIdx.y * SLICES + threadIdx.x);
#pragma unroll
    for (int i = WARP / 2; i; i /= 2) best = max(best, (uint64_t)__shfl_xor_sync(~0u, (unsigned long long)best, i));
    if (threadIdx.x == 0) {
        *j.largest = best ? id_of(best) : 0;
        p.progress[blockIdx.y].arrived = 0;
    }
}

// Bins of distances from the largest: 32 to each doubling, beginning at a quarter.
__device__ __forceinline__ uint32_t bin_of(float largest, float v) {
    uint32_t bits = __float_as_uint(largest - v + 0.25f) >> 18;
    return min(bits - (__float_as_uint(0.25f) >> 18), BINS - 1);
}

// The sum of the weights, and how many tokens are how far from the largest, as far as the job needs them.
extern "C" __global__ void __launch_bounds__(THREADS) survey(const __grid_constant__ Samples p) {
    __shared__ uint32_t bins[BINS];
    wait_for_previous();
    start_next();
    const Job& j = p.jobs[blockIdx.y];
    const bool sorted = j.sorted(), distribution = j.kind == DISTRIBUTION, summed = distribution || !(j.top_k || j.greedy());
    if (!sorted && !summed) return;
    const float top_logit = j.largest_logit();
    const Value value(j, top_logit);
    const float largest = value(top_logit);
    for (uint32_t i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
    const Weight weight = distribution ? Weight(largest, 1, 0) : value.weight;
    uint64_t sum = 0;
    for_rounds(j.logits, Slice(blockIdx.x, p.vocabulary), value, [&](const float (&values)[ROUND], uint32_t) {
        if (summed)
#pragma unroll
            for (float v : values) sum += weight.kept(v);
        if (sorted)
#pragma unroll
            for (float v : values)
                if (v > -INFINITY) atomicAdd(bins + bin_of(largest, v), 1);
    });
    if (summed) {
        sum = block_reduce(sum, Sum());
        if (threadIdx.x == 0) p.sums[blockIdx.y * SLICES + blockIdx.x] = sum;
    }
    __syncthreads();
    if (!sorted) return;
    for (uint32_t i = threadIdx.x; i < BINS; i += THREADS)
        if (bins[i]) atomicAdd(p.bins + blockIdx.y * BINS + i, bins[i]);
}

// Collects the tokens of the first bins: those that hold as many as are asked for, or for top-p alone as many as there is room for.
extern "C" __global__ void __launch_bounds__(THREADS) collect(const __grid_constant__ Samples p) {
    static_assert(BINS == 2 * THREADS);
    // What the block finds, and where that is put.
    __shared__ uint64_t places[CAPACITY];
    __shared__ uint32_t found, first_place;
    if (threadIdx.x == 0) found = 0;
    wait_for_previous();
    start_next();
    const Job& j = p.jobs[blockIdx.y];
    if (!j.sorted()) return;
    const uint32_t wanted = j.kind == DISTRIBUTION ? j.top : j.top_k;
    const uint32_t* bins = p.bins + blockIdx.y * BINS + 2 * threadIdx.x;
    const uint32_t second = block_scan(bins[0] + bins[1]), first = second - bins[1];
    // Bins before the last that is taken have fewer than are wanted; where none is wanted all that fit are taken.
    uint32_t taken = 0;
    if (wanted) taken = uint32_t(first < wanted) + uint32_t(second < wanted);
    else taken = uint32_t(first <= CAPACITY) + uint32_t(second <= CAPACITY);
    taken = block_reduce(taken, Sum());
    if (wanted) taken = min(taken + 1, BINS);
    uint32_t expected = 0;
    if (taken && (taken - 1) / 2 == threadIdx.x) expected = (taken - 1) % 2 ? second : first;
    expected = block_reduce(expected, Largest());
    const uint32_t all = block_reduce(second, Largest());
    Progress& progress = p.progress[blockIdx.y];
    if (blockIdx.x == 0 && threadIdx.x == 0) progress.expected = expected, progress.complete = expected == all;
    if (expected > CAPACITY) return;
    const float top_logit = j.largest_logit();
    const Value value(j, top_logit);
    const float largest = value(top_logit);
    // The checks of places hold against numbers that are none.
    for_rounds(j.logits, Slice(blockIdx.x, p.vocabulary), value, [&](const float (&values)[ROUND], uint32_t id) {
#pragma unroll
        for (int i = 0; i < ROUND; i++)
            if (values[i] > -INFINITY && bin_of(largest, values[i]) < taken)
                if (uint32_t at = atomicAdd(&found, 1); at < CAPACITY) places[at] = place_of(values[i], id + i * THREADS);
    });
    __syncthreads();
    if (threadIdx.x == 0) first_place = atomicAdd(&progress.gathered, found);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < min(found, CAPACITY) && first_place + i < CAPACITY; i += THREADS)
        p.candidates[blockIdx.y * CAPACITY + first_place + i] = places[i];
}

// Descending, the rest of `places` up to a power of two being zeros.
__device__ __forceinline__ void sort_places(uint64_t* places, uint32_t count) {
    uint32_t size = 1;
    while (size < count) size *= 2;
    for (uint32_t i = count + threadIdx.x; i < size; i += DRAWERS) places[i] = 0;
    __syncthreads();
    for (uint32_t run = 2; run <= size; run *= 2) {
        for (uint32_t step = run / 2; step; step /= 2) {
            for (uint32_t i = threadIdx.x; i < size / 2; i += DRAWERS) {
                const uint32_t low = 2 * step * (i / step) + i % step, high = low + step;
                const uint64_t a = places[low], b = places[high];
                if ((a < b) == !(low & run)) places[low] = b, places[high] = a;
            }
            __syncthreads();
        }
    }
}

// The first of these tokens at which the sum of weights exceeds `target`. This thread has those from
// `first` on; before them the sum is `before`.
template <int EACH>
__device__ __forceinline__ uint32_t pick(const uint64_t (&weights)[EACH], uint32_t first, uint64_t before, uint64_t target) {
    uint32_t found = NONE;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        before += weights[i];
        if (found == NONE && before > target) found = first + i;
    }
    found = block_reduce(found, Least());
    return found == NONE ? 0 : found;
}

// A token in the order of ids: first the slice, then the token in it.
__device__ __forceinline__ uint32_t draw_by_id(const Samples& p, const Job& j, uint32_t job, float largest) {
    const uint64_t* sums = p.sums + job * SLICES;
    uint64_t total = 0;
    for (uint32_t i = 0; i < SLICES; i++) total += sums[i];
    uint64_t target = __umul64hi(j.random, total);
    uint32_t slice = 0;
    while (slice < SLICES - 1 && target >= sums[slice]) target -= sums[slice++];
    const Slice range(slice, p.vocabulary);
    const Weight weight(j, largest);
    // Eight tokens of each thread at a time.
    constexpr int EACH = 8;
    for (uint32_t begin = range.begin; begin < range.end; begin += EACH * DRAWERS) {
        uint64_t weights[EACH], own = 0;
        const uint32_t first = begin + EACH * threadIdx.x;
#pragma unroll
        for (int i = 0; i < EACH; i++) own += weights[i] = first + i < range.end ? weight.kept(j.logits[first + i]) : 0;
        const uint64_t after = block_scan(own), all = block_reduce(after, Largest());
        if (target < all) return pick(weights, first, after - own, target);
        target -= all;
    }
    // Nothing has a weight.
    return 0;
}

// The drawn token, and what the job wants of the sorted candidates. A block per job.
extern "C" __global__ void __launch_bounds__(DRAWERS) draw(const __grid_constant__ Samples p) {
    extern __shared__ uint64_t places[]; // [CAPACITY]
    constexpr int EACH = CAPACITY / DRAWERS;
    wait_for_previous();
    start_next();
    const uint32_t job = blockIdx.x;
    const Job& j = p.jobs[job];
    Record record = {};
    uint32_t* out = p.out + j.out;
    uint32_t* list = out + sizeof(Record) / 4;
    const float top_logit = j.largest_logit();
    const Value value(j, top_logit);
    uint32_t count = 0;
    bool complete = false;
    if (j.sorted()) {
        Progress& progress = p.progress[job];
        count = progress.gathered, complete = progress.complete;
        record.failed = progress.expected > CAPACITY || count > CAPACITY;
        if (record.failed) count = 0;
        __syncthreads();
        if (threadIdx.x == 0) progress = {};
        for (uint32_t i = threadIdx.x; i < BINS; i += DRAWERS) p.bins[job * BINS + i] = 0;
        for (uint32_t i = threadIdx.x; i < count; i += DRAWERS) places[i] = p.candidates[job * CAPACITY + i];
        sort_places(places, count);
    }
    if (j.kind == DISTRIBUTION) {
        for (uint32_t i = 0; i < SLICES; i++) record.sum += p.sums[job * SLICES + i];
        record.largest = value(top_logit);
    } else if (j.greedy()) {
        record.token = j.largest_id();
    } else if (!j.sorted()) {
        record.token = draw_by_id(p, j, job, top_logit);
    } else {
        const Weight& weight = value.weight;
        const uint32_t first = EACH * threadIdx.x, most = j.top_k ? min(j.top_k, count) : count;
        uint64_t weights[EACH], own = 0;
        uint32_t kept = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const float logit = first + i < most ? value_of(places[first + i]) : -INFINITY;
            kept += first + i < most && weight.keeps(logit);
            own += weights[i] = weight.kept(logit);
        }
        kept = block_reduce(kept, Sum());
        const uint64_t after = block_scan(own);
        uint64_t total = block_reduce(after, Largest()), before = after - own;
        if (j.limits_p()) {
            // Without top-k, what was collected may not be all that counts.
            const bool whole = j.top_k || complete || kept < count;
            uint64_t all = whole ? total : 0;
            if (!whole)
                for (uint32_t i = 0; i < SLICES; i++) all += p.sums[job * SLICES + i];
            uint32_t last = NONE;
            uint64_t cumulative = before;
#pragma unroll
            for (int i = EACH - 1; i >= 0; i--) {
                uint64_t here = before;
                for (int k = 0; k <= i; k++) here += weights[k];
                if (first + i < kept && double(here) >= double(j.top_p) * double(all)) last = first + i, cumulative = here;
            }
            const uint32_t end = block_reduce(last, Least());
            if (end != NONE) {
                total = block_reduce(end == last ? cumulative : 0, Largest());
                kept = end + 1;
#pragma unroll
                for (int i = 0; i < EACH; i++)
                    if (first + i >= kept) weights[i] = 0;
            } else if (!whole) {
                record.failed = 1;
            }
        }
        const uint32_t at = pick(weights, first, before, __umul64hi(j.random, total));
        record.token = kept ? id_of(places[at]) : 0;
        count = kept;
        if (j.kind == DRAW_PROCESSED) {
            __syncthreads();
            // Division may make neighbours equal: they are sorted once more.
            const float own_value = kept ? __fdiv_rn(value_of(places[at]), j.temperature) : 0;
            __syncthreads();
            for (uint32_t i = threadIdx.x; i < count; i += DRAWERS)
                places[i] = place_of(__fdiv_rn(value_of(places[i]), j.temperature), id_of(places[i]));
            sort_places(places, count);
            record.own = own_value, record.largest = count ? value_of(places[0]) : 0;
            const Weight share(record.largest, 1, 0);
            uint64_t sum = 0;
            uint32_t above = 0;
            for (uint32_t i = threadIdx.x; i < count; i += DRAWERS) {
                const float v = value_of(places[i]);
                sum += share.kept(v), above += v > own_value;
            }
            record.sum = block_reduce(sum, Sum());
            record.above = block_reduce(above, Sum());
        }
    }
    if (j.id_count) {
        for (uint32_t i = threadIdx.x; i < j.id_count; i += DRAWERS) {
            float v = j.kind == DISTRIBUTION ? value(j.logits[j.ids[i]]) : -INFINITY;
            if (j.kind == DRAW_PROCESSED)
                for (uint32_t k = 0; k < count; k++)
                    if (id_of(places[k]) == j.ids[i]) v = value_of(places[k]);
            list[i] = __float_as_uint(v);
        }
    } else {
        record.count = min(count, j.top);
        for (uint32_t i = threadIdx.x; i < record.count; i += DRAWERS)
            list[2 * i] = id_of(places[i]), list[2 * i + 1] = __float_as_uint(value_of(places[i]));
    }
    if (threadIdx.x == 0) *(Record*)out = record;
}

// The token's own value and how many are larger, for distributions.
extern "C" __global__ void __launch_bounds__(THREADS) rank(const __grid_constant__ Samples p) {
    wait_for_previous();
    start_next();
    const Job& j = p.jobs[blockIdx.y];
    if (j.kind != DISTRIBUTION) return;
    const uint32_t token = j.token_from == NONE ? j.token : ((const Record*)(p.out + j.token_from))->token;
    const Value value(j, j.largest_logit());
    const float own = value(j.logits[token]);
    uint32_t above = 0;
    for_rounds(j.logits, Slice(blockIdx.x, p.vocabulary), value, [&](const float (&values)[ROUND], uint32_t) {
#pragma unroll
        for (float v : values) above += v > own;
    });
    above = block_reduce(above, Sum());
    Record* record = (Record*)(p.out + j.out);
    if (threadIdx.x == 0 && above) atomicAdd(&record->above, above);
    if (blockIdx.x == 0 && threadIdx.x == 0) record->own = own;
}
