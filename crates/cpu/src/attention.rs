//! Attention of some queries over the blocks of one key/value head, with the sink in the denominator.
//!
//! Up to [`TILE`] queries share one pass over keys and values. Positions are taken in chunks, chunks in spans, both with fixed
//! boundaries; after each chunk the sums of its span are scaled to the new maximum, and spans are merged in order. A chunk or
//! span in which a query sees nothing changes nothing, so the result depends neither on how the prompt was cut nor on
//! which queries share the pass, nor on whether spans are computed by one thread or by several.

use std::mem::MaybeUninit;

use half::bf16;
use numerics::e4m3;

use crate::simd::{LANES, Lanes};

/// Blocks of one head that lie side by side. Memory gives pieces of 32 KB nearly as fast as all in order, those of a block, 4 KB, at
/// two thirds of that; longer ones would take more memory for short contexts, since it comes in large pages.
pub(crate) const GROUP: usize = 8;

/// Where a block of one of the key/value heads lies among the keys or values of a layer, `[groups of blocks, heads, GROUP, len]`;
/// `len`: elements of a block of one head.
pub(crate) fn place(block: usize, head: usize, heads: usize, len: usize) -> usize {
    ((block / GROUP * heads + head) * GROUP + block % GROUP) * len
}

/// What keys and values are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheFormat {
    /// As they are computed.
    #[default]
    F32,
    /// Half of that memory.
    Bf16,
    /// A quarter of it, with the model's scale of each layer, or 1 if it has none.
    E4m3,
}

impl CacheFormat {
    /// Of a number.
    pub(crate) fn bytes(self) -> usize {
        match self {
            CacheFormat::F32 => size_of::<f32>(),
            CacheFormat::Bf16 => size_of::<bf16>(),
            CacheFormat::E4m3 => size_of::<E4m3>(),
        }
    }
}

/// Keys or values of a layer.
#[derive(Clone, Copy)]
pub(crate) enum Stored<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    E4m3(&'a [E4m3]),
}

/// What keys and values are stored as.
pub(crate) trait Element: Copy + bytemuck::Pod {
    fn of(value: f32) -> Self;
    fn value(self) -> f32;

    /// # Safety
    /// As for the lanes: sixteen elements are valid.
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
}

impl Element for f32 {
    #[inline(always)]
    fn of(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L {
        // SAFETY: the same contract.
        unsafe { L::load(from) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn of(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const bf16) -> L {
        // SAFETY: the same contract.
        unsafe { L::widen_bf16(from.cast()) }
    }
}

/// An E4M3 byte.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub(crate) struct E4m3(u8);

impl Element for E4m3 {
    #[inline(always)]
    fn of(value: f32) -> E4m3 {
        E4m3(e4m3::encode(value))
    }
    #[inline(always)]
    fn value(self) -> f32 {
        e4m3::decode(self.0)
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const E4m3) -> L {
        // SAFETY: the same contract.
        unsafe { L::widen_e4m3(from.cast()) }
    }
}

/// Queries that one call takes at most.
pub(crate) const TILE: usize = 32;

/// Blocks per chunk: 128 positions, as wide as gpt-oss's window.
const CHUNK: usize = 8;

/// Positions per span: what is worth a task of its own.
pub(crate) const SPAN: usize = 16 * CHUNK * LANES;

/// Queries that are computed together, and vectors of values: as many as there are registers for.
const QUERIES: usize = 8;
const VECTORS: usize = 2;
/// The same with few registers.
const FEW_QUERIES: usize = 4;
const FEW_VECTORS: usize = 1;

/// Queries that share a key/value head, and where its keys and values lie.
pub(crate) struct Attend<'a> {
    /// `[queries, head size]`, already divided by the square root of the head size and times the scale of the keys; at most [`TILE`].
    pub(crate) queries: &'a [f32],
    /// Per query: its sink.
    pub(crate) sinks: &'a [f32],
    /// Per query: its position. They ascend.
    pub(crate) positions: &'a [usize],
    /// Positions that a query sees, its own included.
    pub(crate) window: usize,
    /// Entries of a head.
    pub(crate) size: usize,
    /// Blocks `[head size, 16]`, where [`place`] says.
    pub(crate) keys: Stored<'a>,
    /// Blocks `[16, head size]` likewise.
    pub(crate) values: Stored<'a>,
    /// What the stored values are to be multiplied with.
    pub(crate) value_scale: f32,
    /// Which of the key/value heads this is, and how many there are.
    pub(crate) head: usize,
    pub(crate) heads: usize,
    /// The sequence's block table.
    pub(crate) blocks: &'a [u32],
}

impl Attend<'_> {
    /// The first position that a query at `position` sees.
    fn first(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }

    /// The spans that some query sees.
    pub(crate) fn spans(&self) -> std::ops::Range<usize> {
        let last = self.positions[self.positions.len() - 1];
        self.first(self.positions[0]) / SPAN..last / SPAN + 1
    }
}

/// What the queries found in some positions.
pub(crate) struct Found {
    /// `[queries, head size]`: values times e^(score - largest).
    values: Vec<f32>,
    /// Per query: the largest score, and the sum of e^(score - largest).
    largest: [f32; TILE],
    sums: [f32; TILE],
}

impl Found {
    /// Nothing but the sinks: terms of the denominator without a value.
    pub(crate) fn sinks(job: &Attend<'_>) -> Found {
        let mut found = Found::nothing(job);
        found.largest[..job.sinks.len()].copy_from_slice(job.sinks);
        found.sums = [1.0; TILE];
        found
    }

    /// Nothing. The largest score is finite, so that the distance from it is a number even for a score of -∞.
    pub(crate) fn nothing(job: &Attend<'_>) -> Found {
        Found { values: vec![0.0; job.queries.len()], largest: [f32::MIN; TILE], sums: [0.0; TILE] }
    }

    /// The result, `[queries, head size]`.
    pub(crate) fn finish(mut self, job: &Attend<'_>) -> Vec<f32> {
        for (values, sum) in self.values.chunks_exact_mut(job.size).zip(&self.sums) {
            let inverse = job.value_scale / sum;
            values.iter_mut().for_each(|v| *v *= inverse);
        }
        self.values
    }
}

/// Adds `other`, which was found in later positions.
///
/// # Safety
/// The CPU has the features of the lanes; both are of the same job.
#[inline(always)]
pub(crate) unsafe fn merge<L: Lanes>(job: &Attend<'_>, found: &mut Found, other: &Found) {
    for q in 0..job.positions.len() {
        let most = if other.largest[q] > found.largest[q] { other.largest[q] } else { found.largest[q] };
        // SAFETY: the contract; both have `size` values for each query.
        unsafe {
            let own = L::splat(found.largest[q] - most).exp().first();
            let others = L::splat(other.largest[q] - most).exp().first();
            found.sums[q] = found.sums[q] * own + other.sums[q] * others;
            for e in q * job.size..(q + 1) * job.size {
                let value = found.values.as_mut_ptr().add(e);
                *value = *value * own + *other.values.as_ptr().add(e) * others;
            }
        }
        found.largest[q] = most;
    }
}

/// What the queries find in one span.
///
/// # Safety
/// The CPU has the features of the lanes.
#[inline(always)]
pub(crate) unsafe fn attend<L: Lanes>(job: &Attend<'_>, span: usize) -> Found {
    // SAFETY: the same contract.
    unsafe {
        match (job.keys, job.values) {
            (Stored::F32(keys), Stored::F32(values)) => attend_stored::<L, f32>(job, keys, values, span),
            (Stored::Bf16(keys), Stored::Bf16(values)) => attend_stored::<L, bf16>(job, keys, values, span),
            (Stored::E4m3(keys), Stored::E4m3(values)) => attend_stored::<L, E4m3>(job, keys, values, span),
            _ => unreachable!("keys and values are stored alike"),
        }
    }
}

/// The same for what keys and values are stored as.
///
/// Loops count instead of iterating over slices: what an iterator leaves outside of a function with more instructions than
/// its own becomes a call.
///
/// # Safety
/// The CPU has the features of the lanes.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "stated above")]
unsafe fn attend_stored<L: Lanes, T: Element>(
    job: &Attend<'_>,
    all_keys: &[T],
    all_values: &[T],
    span: usize,
) -> Found {
    let (size, count) = (job.size, job.positions.len());
    assert!(count <= TILE && job.queries.len() == count * size, "a tile");
    let first = job.first(job.positions[0]).max(span * SPAN);
    let last = job.positions[count - 1].min(span * SPAN + SPAN - 1);
    let mut found = Found::nothing(job);
    // Every score that is looked at was computed or set before: clearing all of them costs as much as short attention.
    let mut scores = [[const { MaybeUninit::<f32>::uninit() }; CHUNK * LANES]; TILE];
    let mut sums = [[0.0f32; LANES]; TILE];
    let largest = &mut found.largest;
    let out = found.values.as_mut_ptr();
    // Blocks lie anywhere, so they are asked for by hand, half a chunk ahead: the first keys here, values while scores are
    // computed, the next keys while values are added. They go to the second-level cache: of reads into the first there can be so
    // few at a time that arithmetic would wait for them.
    let place = |block: usize| place(job.blocks[block] as usize, job.head, job.heads, size * LANES);
    let start_of = |all: &[T], block: usize| all.as_ptr().wrapping_add(place(block.min(last / LANES)));
    for block in first / LANES..first / LANES + CHUNK {
        let keys = start_of(all_keys, block);
        for e in 0..size {
            // SAFETY: the contract; the address need not be valid.
            unsafe { L::prefetch_second(keys.wrapping_add(e * LANES).cast()) };
        }
    }
    // SAFETY: the contract; `out` has `count` rows of `size`, every block that is looked at lies within keys and values by
    // the slicing, and columns are below the width of a row of scores.
    unsafe {
        for chunk in first / LANES / CHUNK..last / LANES / CHUNK + 1 {
            let start = (chunk * CHUNK).max(first / LANES);
            let end = (chunk * CHUNK + CHUNK).min(last / LANES + 1);
            for block in start..end {
                let column = (block - chunk * CHUNK) * LANES;
                let keys = &all_keys[place(block)..][..size * LANES];
                let values = start_of(all_values, block);
                let mut q = 0;
                while q < count {
                    if L::FEW_REGISTERS {
                        block_scores::<L, T, FEW_QUERIES>(job, q, keys, values, &mut scores, column);
                        q += FEW_QUERIES;
                    } else {
                        block_scores::<L, T, QUERIES>(job, q, keys, values, &mut scores, column);
                        q += QUERIES;
                    }
                }
            }
            let (left, right) = ((start - chunk * CHUNK) * LANES, (end - chunk * CHUNK) * LANES);
            for q in 0..count {
                // The columns that this query sees.
                let base = chunk * CHUNK * LANES;
                let from = job.first(job.positions[q]).saturating_sub(base).clamp(left, right);
                let to = (job.positions[q] + 1).saturating_sub(base).clamp(from, right);
                let row = scores[q].as_mut_ptr().cast::<f32>();
                for column in left..from {
                    *row.add(column) = f32::NEG_INFINITY;
                }
                for column in to..right {
                    *row.add(column) = f32::NEG_INFINITY;
                }
                let mut most = L::splat(largest[q]);
                for column in (left..right).step_by(LANES) {
                    most = L::load(row.add(column)).max(most);
                }
                let most = most.largest();
                let mut sum = L::load(sums[q].as_ptr());
                if most > largest[q] {
                    let factor = L::splat(largest[q] - most).exp();
                    sum = sum.mul(factor);
                    let factor = factor.first();
                    for e in 0..size {
                        *out.add(q * size + e) *= factor;
                    }
                    largest[q] = most;
                }
                for column in (left..right).step_by(LANES) {
                    L::load(row.add(column)).sub(L::splat(most)).exp().store(row.add(column));
                }
                for column in left..from {
                    *row.add(column) = 0.0;
                }
                for column in to..right {
                    *row.add(column) = 0.0;
                }
                for column in (left..right).step_by(LANES) {
                    sum = sum.add(L::load(row.add(column)));
                }
                sum.store(sums[q].as_mut_ptr());
            }
            let mut blocks =
                [Block { values: all_values.as_ptr(), rows: 0, next: all_values.as_ptr() }; CHUNK];
            for block in start..end {
                let values = &all_values[place(block)..][..size * LANES];
                blocks[block - chunk * CHUNK] = Block {
                    values: values.as_ptr(),
                    // Positions that nobody has written stay out: what lies there may be anything.
                    rows: LANES.min(last + 1 - block * LANES),
                    next: start_of(all_keys, block + CHUNK),
                };
            }
            let mut q = 0;
            while q < count {
                if L::FEW_REGISTERS && q + FEW_QUERIES <= count {
                    add_values::<L, T, FEW_QUERIES, FEW_VECTORS>(&scores, q, &blocks, size, out);
                    q += FEW_QUERIES;
                } else if !L::FEW_REGISTERS && q + QUERIES <= count {
                    add_values::<L, T, QUERIES, VECTORS>(&scores, q, &blocks, size, out);
                    q += QUERIES;
                } else {
                    add_values::<L, T, 1, FEW_VECTORS>(&scores, q, &blocks, size, out);
                    q += 1;
                }
            }
        }
        for q in 0..count {
            found.sums[q] = L::load(sums[q].as_ptr()).sum();
        }
    }
    found
}

/// Scores of `N` queries from `q` on with the sixteen positions of a block. What is beyond the last query is a copy of it.
/// Meanwhile `next` is asked for.
///
/// # Safety
/// As for [`attend`]; `keys` has `size · 16` elements and `column` is that of a block.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "as in `attend`")]
unsafe fn block_scores<L: Lanes, T: Element, const N: usize>(
    job: &Attend<'_>,
    q: usize,
    keys: &[T],
    next: *const T,
    scores: &mut [[MaybeUninit<f32>; CHUNK * LANES]; TILE],
    column: usize,
) {
    let count = job.positions.len();
    // SAFETY: the contract.
    unsafe {
        let mut queries = [job.queries.as_ptr(); N];
        for i in 0..N {
            queries[i] = job.queries.as_ptr().add((q + i).min(count - 1) * job.size);
        }
        let mut sums = [L::splat(0.0); N];
        for e in 0..job.size {
            if q == 0 {
                L::prefetch_second(next.wrapping_add(e * LANES).cast());
            }
            let keys = T::load::<L>(keys.as_ptr().add(e * LANES));
            for i in 0..N {
                sums[i] = L::splat(*queries[i].add(e)).fma(keys, sums[i]);
            }
        }
        for i in 0..N.min(TILE - q) {
            sums[i].store(scores[q + i].as_mut_ptr().cast::<f32>().add(column));
        }
    }
}

/// Values of a block.
#[derive(Clone, Copy)]
struct Block<T> {
    values: *const T,
    /// How many of its positions count.
    rows: usize,
    /// Where those are that are asked for meanwhile.
    next: *const T,
}

/// Adds to the results of `N` queries from `q` on the values of a chunk, weighted, `V` vectors at a time, which stay in registers
/// for all of its blocks.
///
/// # Safety
/// As for [`attend`]; the values of each block that has rows are valid for `16 · size` elements, and `out` for the queries.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "as in `attend`")]
unsafe fn add_values<L: Lanes, T: Element, const N: usize, const V: usize>(
    scores: &[[MaybeUninit<f32>; CHUNK * LANES]; TILE],
    q: usize,
    blocks: &[Block<T>; CHUNK],
    size: usize,
    out: *mut f32,
) {
    let wide = size / (V * LANES) * (V * LANES);
    // SAFETY: the contract.
    unsafe {
        for e in (0..wide).step_by(V * LANES) {
            let mut sums = [[L::splat(0.0); V]; N];
            for n in 0..N {
                for i in 0..V {
                    sums[n][i] = L::load(out.add((q + n) * size + e + i * LANES));
                }
            }
            for b in 0..CHUNK {
                for row in 0..blocks[b].rows {
                    let at = row * size + e;
                    let mut values = [L::splat(0.0); V];
                    for i in 0..V {
                        if q == 0 {
                            L::prefetch_second(blocks[b].next.wrapping_add(at + i * LANES).cast());
                        }
                        values[i] = T::load::<L>(blocks[b].values.add(at + i * LANES));
                    }
                    for n in 0..N {
                        let p = L::splat(*scores[q + n].as_ptr().cast::<f32>().add(b * LANES + row));
                        for i in 0..V {
                            sums[n][i] = p.fma(values[i], sums[n][i]);
                        }
                    }
                }
            }
            for n in 0..N {
                for i in 0..V {
                    sums[n][i].store(out.add((q + n) * size + e + i * LANES));
                }
            }
        }
        for n in 0..N {
            for e in wide..size {
                let out = out.add((q + n) * size + e);
                for b in 0..CHUNK {
                    for row in 0..blocks[b].rows {
                        let p = *scores[q + n].as_ptr().cast::<f32>().add(b * LANES + row);
                        *out = p.mul_add((*blocks[b].values.add(row * size + e)).value(), *out);
                    }
                }
            }
        }
    }
}
