//! The limit of decoding: how fast all threads together read memory, in order.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use gptoss::Error;

use crate::kernels::{Isa, Kernels};
use crate::packed::Buffer;
use crate::pool::Pool;
use crate::products::{FOLLOWS_READS, ask};
use crate::simd::{LANES, Lanes};

/// Well beyond every cache.
const BYTES: usize = 1 << 30;

/// Bytes per task, about as many as those of a matrix product.
const TASK: usize = 256 << 10;

/// Bytes of sixteen words.
const LINE: usize = 4 * LANES;

/// Bytes per second that the pool reads from memory: the median of `passes` over a gibibyte.
pub fn read_bandwidth(pool: &Pool, passes: usize) -> Result<f64, Error> {
    let mut buffer = Buffer::new(BYTES)
        .ok_or_else(|| Error::NoRoom { what: "measuring how fast it is read".to_owned(), needed: BYTES })?;
    buffer.place(pool, BYTES);
    // Zero pages may be one page read again and again.
    buffer.as_mut_slice().iter_mut().step_by(61).enumerate().for_each(|(i, byte)| *byte = i as u8);
    let kernels = Isa::best().kernels().expect("the best instruction set is available");
    Ok(read(pool, kernels, &[buffer.as_slice()], passes))
}

/// The same over given matrices.
pub(crate) fn read(pool: &Pool, kernels: &Kernels, memory: &[&[u8]], passes: usize) -> f64 {
    // In the order of products: see `packed::multiply`.
    let part =
        |node: usize| memory.iter().flat_map(move |of| of[pool.nodes().part(node, of.len())].chunks(TASK));
    let tasks: Vec<&[u8]> = (0..pool.nodes().count()).flat_map(part).collect();
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

/// A sum of the whole lines of `bytes` that tells their order: words are summed up, and the sums again. Lines are asked for as weights
/// are.
///
/// # Safety
/// The CPU has the features of the lanes.
#[inline(always)]
pub(crate) unsafe fn checksum<L: Lanes>(bytes: &[u8]) -> u64 {
    // SAFETY: the contract.
    unsafe { if *FOLLOWS_READS { line_sums::<L, false>(bytes) } else { line_sums::<L, true>(bytes) } }
}

#[inline(always)]
unsafe fn line_sums<L: Lanes, const FAR: bool>(bytes: &[u8]) -> u64 {
    let mut words = [0; 2 * LANES];
    // SAFETY: within the slice and the array; what is asked for may lie beyond.
    unsafe {
        let (mut sums, mut totals) = (L::splat_ints(0), L::splat_ints(0));
        let mut at = bytes.as_ptr();
        for _ in 0..bytes.len() / LINE {
            if FAR {
                ask::<L>(at, LINE);
            }
            sums = L::add_ints(sums, L::load_ints(at.cast()));
            totals = L::add_ints(totals, sums);
            at = at.add(LINE);
        }
        L::store_ints(sums, words.as_mut_ptr());
        L::store_ints(totals, words.as_mut_ptr().add(LANES));
    }
    let mut all = 0;
    let mut w = 0;
    while w < words.len() {
        all = mix(all ^ u64::from(words[w] as u32));
        w += 1;
    }
    all
}

/// Spreads every bit over all others: the finalizer of MurmurHash3.
#[inline(always)]
pub(crate) fn mix(bits: u64) -> u64 {
    let bits = (bits ^ bits >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let bits = (bits ^ bits >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    bits ^ bits >> 33
}
