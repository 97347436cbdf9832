//! The limit of decoding: how fast all threads together read memory, in order.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use gptoss::Error;

use crate::kernels::{Isa, Kernels};
use crate::packed::Buffer;
use crate::pool::Pool;
use crate::products::AHEAD;
use crate::simd::Lanes;

/// Well beyond every cache.
const BYTES: usize = 1 << 30;

/// Bytes per task, about as many as those of a matrix product.
const TASK: usize = 256 << 10;

/// Bytes per second that the pool reads from memory: the median of `passes` over a gibibyte.
pub fn read_bandwidth(pool: &Pool, passes: usize) -> Result<f64, Error> {
    let mut buffer = Buffer::new(BYTES)?;
    // Zero pages may be one page read again and again.
    buffer.as_mut_slice().iter_mut().step_by(61).enumerate().for_each(|(i, byte)| *byte = i as u8);
    let kernels = Isa::best().kernels().expect("the best instruction set is available");
    Ok(read(pool, kernels, &[buffer.as_slice()], passes))
}

/// The same over given memory.
pub(crate) fn read(pool: &Pool, kernels: &Kernels, memory: &[&[u8]], passes: usize) -> f64 {
    let tasks: Vec<&[u8]> = memory.iter().flat_map(|part| part.chunks(TASK)).collect();
    let bytes: usize = memory.iter().map(|part| part.len()).sum();
    let sum = AtomicU64::new(0);
    let mut speeds: Vec<f64> = (0..passes.max(1))
        .map(|_| {
            let start = Instant::now();
            pool.run(tasks.len(), &|task| {
                // SAFETY: the kernels were chosen for this CPU.
                sum.fetch_add(unsafe { (kernels.checksum)(tasks[task]) }, Ordering::Relaxed);
            });
            bytes as f64 / start.elapsed().as_secs_f64()
        })
        .collect();
    // The sum is looked at, so that reading cannot be left out.
    std::hint::black_box(sum.into_inner());
    speeds.sort_by(f64::total_cmp);
    speeds[speeds.len() / 2]
}

/// A sum of `bytes`, a multiple of 128 of them, that tells their order: words are summed up, and the sums again. They are asked
/// for as far ahead as weights are.
///
/// # Safety
/// The CPU has the features of the lanes.
#[inline(always)]
pub(crate) unsafe fn checksum<L: Lanes>(bytes: &[u8]) -> u64 {
    const WORDS: usize = 16;
    let mut sums = [0u64; WORDS];
    let mut totals = [0u64; WORDS];
    let lines = bytes.as_ptr().cast::<[u64; WORDS]>();
    for i in 0..bytes.len() / size_of::<[u64; WORDS]>() {
        // SAFETY: within the slice; prefetching may go beyond.
        let words = unsafe {
            for line in 0..2 {
                L::prefetch(lines.wrapping_add(i).cast::<u8>().wrapping_add(AHEAD + 64 * line));
            }
            lines.add(i).read_unaligned()
        };
        let mut w = 0;
        while w < WORDS {
            sums[w] = sums[w].wrapping_add(words[w]);
            totals[w] = totals[w].wrapping_add(sums[w]);
            w += 1;
        }
    }
    let mut all = 0u64;
    let mut w = 0;
    while w < WORDS {
        all = (all ^ sums[w]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        all = (all ^ all >> 29 ^ totals[w]).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        all ^= all >> 32;
        w += 1;
    }
    all
}
