//! The limit of decoding: how fast all threads together read memory, in order.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use gptoss::Error;

use crate::packed::Buffer;
use crate::pool::Pool;

/// Well beyond every cache.
const BYTES: usize = 1 << 30;

/// Bytes per task, as large as those of a matrix product.
const TASK: usize = 1 << 20;

/// Bytes per second that the pool reads from memory: the median of `passes` over a gibibyte.
pub fn read_bandwidth(pool: &Pool, passes: usize) -> Result<f64, Error> {
    let mut buffer = Buffer::new(BYTES)?;
    // Zero pages may be one page read again and again.
    buffer.as_mut_slice().iter_mut().step_by(61).enumerate().for_each(|(i, byte)| *byte = i as u8);
    let bytes = buffer.as_slice();
    let sum = AtomicU64::new(0);
    let mut speeds: Vec<f64> = (0..passes.max(1))
        .map(|_| {
            let start = Instant::now();
            pool.run(BYTES / TASK, &|task| {
                sum.fetch_add(checksum(&bytes[task * TASK..][..TASK]), Ordering::Relaxed);
            });
            BYTES as f64 / start.elapsed().as_secs_f64()
        })
        .collect();
    // The sum is looked at, so that reading cannot be left out.
    std::hint::black_box(sum.into_inner());
    speeds.sort_by(f64::total_cmp);
    Ok(speeds[speeds.len() / 2])
}

/// Thirty-two sums side by side, which keeps several cache lines under way.
fn checksum(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 32];
    for chunk in bytes.chunks_exact(256) {
        for (sum, word) in sums.iter_mut().zip(chunk.chunks_exact(8)) {
            *sum = sum.wrapping_add(u64::from_le_bytes(word.try_into().expect("eight bytes")));
        }
    }
    sums.iter().fold(0, |a, &b| a.wrapping_add(b))
}
