//! Attention of some queries over the blocks of one key/value head, with the sink in the denominator.
//!
//! Up to [`TILE`] queries share one pass over keys and values. Positions are taken in chunks with fixed boundaries; after each
//! one the sums so far are scaled to the new maximum. A chunk in which a query sees nothing changes nothing, so the
//! result depends neither on how the prompt was cut nor on which queries share the pass.

use crate::simd::{LANES, Lanes};

/// Queries that one call takes at most.
pub(crate) const TILE: usize = 32;

/// Blocks per chunk: 128 positions, as wide as gpt-oss's window.
const CHUNK: usize = 8;

/// Queries whose scores are computed together, and whose values are: as many as there are registers for.
const SCORED: usize = 8;
const WEIGHTED: usize = 4;

/// Queries that share a key/value head, and where its keys and values lie.
pub(crate) struct Attend<'a> {
    /// `[queries, head size]`, already divided by the square root of the head size; at most [`TILE`].
    pub(crate) queries: &'a [f32],
    /// Per query: its sink.
    pub(crate) sinks: &'a [f32],
    /// Per query: its position. They ascend.
    pub(crate) positions: &'a [usize],
    /// Positions that a query sees, its own included.
    pub(crate) window: usize,
    /// Entries of a head.
    pub(crate) size: usize,
    /// Keys of block `b` for this head at `keys[b · stride ..]`: `[head size, 16]`.
    pub(crate) keys: &'a [f32],
    /// Values of block `b` likewise: `[16, head size]`.
    pub(crate) values: &'a [f32],
    /// Elements between blocks.
    pub(crate) stride: usize,
    /// The sequence's block table.
    pub(crate) blocks: &'a [u32],
}

impl Attend<'_> {
    /// The first position that a query at `position` sees.
    fn first(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }
}

/// Writes the results, `[queries, head size]`, to `out`.
///
/// # Safety
/// The CPU has the features of the lanes.
#[inline(always)]
pub(crate) unsafe fn attend<L: Lanes>(job: &Attend<'_>, out: &mut [f32]) {
    let (size, count) = (job.size, job.positions.len());
    assert!(count <= TILE && job.queries.len() == count * size && out.len() == count * size, "a tile");
    let (first, last) = (job.first(job.positions[0]), job.positions[count - 1]);
    let mut scores = [[0.0f32; CHUNK * LANES]; TILE];
    let mut largest = [0.0f32; TILE];
    largest[..count].copy_from_slice(&job.sinks[..count]);
    // The sink is one more term of the denominator, without a value.
    let mut sums = [[0.0f32; LANES]; TILE];
    sums.iter_mut().for_each(|sum| sum[0] = 1.0);
    out.fill(0.0);
    for chunk in first / LANES / CHUNK..=last / LANES / CHUNK {
        let blocks = (chunk * CHUNK).max(first / LANES)..(chunk * CHUNK + CHUNK).min(last / LANES + 1);
        let column = |block: usize| (block - chunk * CHUNK) * LANES;
        for block in blocks.clone() {
            let keys = &job.keys[job.blocks[block] as usize * job.stride..][..size * LANES];
            for q in (0..count).step_by(SCORED) {
                // SAFETY: the contract.
                let found = unsafe { block_scores::<L>(job, q, keys) };
                for (scores, found) in scores[q..].iter_mut().zip(found) {
                    scores[column(block)..][..LANES].copy_from_slice(&found);
                }
            }
        }
        let columns = column(blocks.start)..column(blocks.end - 1) + LANES;
        for q in 0..count {
            let seen = job.first(job.positions[q])..job.positions[q] + 1;
            let hidden = |i: usize| !seen.contains(&(chunk * CHUNK * LANES + i));
            let edges = hidden(columns.start) || hidden(columns.end - 1);
            let row = &mut scores[q][columns.clone()];
            if edges {
                for (i, score) in row.iter_mut().enumerate() {
                    if hidden(columns.start + i) {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
            // SAFETY: the contract; chunks have sixteen elements.
            unsafe {
                let before = largest[q];
                let mut most = L::splat(before);
                for scores in row.chunks_exact(LANES) {
                    most = L::load(scores.as_ptr()).max(most);
                }
                let mut lanes = [0.0f32; LANES];
                most.store(lanes.as_mut_ptr());
                let most = lanes.iter().copied().fold(before, f32::max);
                largest[q] = most;
                let mut sum = L::load(sums[q].as_ptr());
                if most > before {
                    let factor = L::splat(before - most).exp();
                    sum = sum.mul(factor);
                    factor.store(lanes.as_mut_ptr());
                    out[q * size..][..size].iter_mut().for_each(|v| *v *= lanes[0]);
                }
                for (i, scores) in row.chunks_exact_mut(LANES).enumerate() {
                    let mut p = L::load(scores.as_ptr()).sub(L::splat(most)).exp();
                    p.store(scores.as_mut_ptr());
                    if edges {
                        for (lane, score) in scores.iter_mut().enumerate() {
                            if hidden(columns.start + i * LANES + lane) {
                                *score = 0.0;
                            }
                        }
                        p = L::load(scores.as_ptr());
                    }
                    sum = sum.add(p);
                }
                sum.store(sums[q].as_mut_ptr());
            }
        }
        for block in blocks {
            let values = &job.values[job.blocks[block] as usize * job.stride..][..size * LANES];
            // Positions that nobody has written stay out: what lies there may be anything.
            let rows = LANES.min(last + 1 - block * LANES);
            for q in (0..count).step_by(WEIGHTED) {
                let scores = &scores[q..(q + WEIGHTED).min(count)];
                // SAFETY: the contract.
                unsafe {
                    add_values::<L>(scores, column(block), rows, values, size, &mut out[q * size..]);
                }
            }
        }
    }
    for (out, sum) in out.chunks_exact_mut(size).zip(&sums) {
        // SAFETY: the contract; the array has sixteen elements.
        let inverse = 1.0 / unsafe { L::load(sum.as_ptr()).sum() };
        out.iter_mut().for_each(|v| *v *= inverse);
    }
}

/// Scores of the queries from `q` on with the sixteen positions of a block. What is beyond the last query is a copy of it.
#[inline(always)]
unsafe fn block_scores<L: Lanes>(job: &Attend<'_>, q: usize, keys: &[f32]) -> [[f32; LANES]; SCORED] {
    let count = job.positions.len();
    let queries: [&[f32]; SCORED] =
        std::array::from_fn(|i| &job.queries[(q + i).min(count - 1) * job.size..][..job.size]);
    let mut found = [[0.0; LANES]; SCORED];
    // SAFETY: the contract of `attend`; pieces of keys have sixteen elements.
    unsafe {
        let mut sums = [L::splat(0.0); SCORED];
        for (e, keys) in keys.chunks_exact(LANES).enumerate() {
            let keys = L::load(keys.as_ptr());
            for (sum, query) in sums.iter_mut().zip(&queries) {
                *sum = L::splat(*query.get_unchecked(e)).fma(keys, *sum);
            }
        }
        for (found, sum) in found.iter_mut().zip(sums) {
            sum.store(found.as_mut_ptr());
        }
    }
    found
}

/// Adds to the results of up to [`WEIGHTED`] queries the values of a block's first `rows` positions, weighted.
#[inline(always)]
unsafe fn add_values<L: Lanes>(
    scores: &[[f32; CHUNK * LANES]],
    column: usize,
    rows: usize,
    values: &[f32],
    size: usize,
    out: &mut [f32],
) {
    const WIDE: usize = 4;
    let wide = size / (WIDE * LANES) * (WIDE * LANES);
    // SAFETY: the contract of `attend`; all places are within `size` entries.
    unsafe {
        if scores.len() == WEIGHTED {
            for e in (0..wide).step_by(WIDE * LANES) {
                let at = |q: usize, i: usize| q * size + e + i * LANES;
                let mut sums: [[L; WIDE]; WEIGHTED] =
                    std::array::from_fn(|q| std::array::from_fn(|i| L::load(out[at(q, i)..].as_ptr())));
                for row in 0..rows {
                    let values: [L; WIDE] = std::array::from_fn(|i| {
                        L::load(values.as_ptr().add(row * size + e + i * LANES))
                    });
                    for (sums, scores) in sums.iter_mut().zip(scores) {
                        let p = L::splat(*scores.get_unchecked(column + row));
                        for (sum, &value) in sums.iter_mut().zip(&values) {
                            *sum = p.fma(value, *sum);
                        }
                    }
                }
                for (q, sums) in sums.into_iter().enumerate() {
                    for (i, sum) in sums.into_iter().enumerate() {
                        sum.store(out[at(q, i)..][..LANES].as_mut_ptr());
                    }
                }
            }
        }
        let from = if scores.len() == WEIGHTED { wide } else { 0 };
        for (scores, out) in scores.iter().zip(out.chunks_exact_mut(size)) {
            for (e, out) in out.iter_mut().enumerate().skip(from) {
                for row in 0..rows {
                    *out = scores[column + row].mul_add(values[row * size + e], *out);
                }
            }
        }
    }
}
