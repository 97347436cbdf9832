//! MXFP4: E2M1 codes with one E8M0 scale per 32, as gpt-oss is published.

use crate::{e2m1, e8m0};

/// Elements that share a scale.
pub const BLOCK: usize = 32;

/// The scale byte that Model Optimizer's writer chooses for a block of largest magnitude `amax`:
/// `ceil(log2(amax / 6))`, biased and clamped; 0 for an all-zero block.
#[inline]
pub fn scale(amax: f32) -> u8 {
    if amax == 0.0 {
        return 0;
    }
    let log2 = (amax / e2m1::MAX).log2().ceil();
    (log2 + 127.0).clamp(0.0, 254.0) as u8
}

/// Quantizes `values` (a multiple of 32, finite) to `codes` (half as many bytes) and `scales` (one per 32).
/// Rounds to nearest with ties to even and writes zero as code 0.
pub fn quantize(values: &[f32], codes: &mut [u8], scales: &mut [u8]) {
    assert_eq!(values.len() % BLOCK, 0, "a row is a whole number of blocks");
    for ((values, codes), byte) in
        values.chunks_exact(BLOCK).zip(codes.chunks_exact_mut(BLOCK / 2)).zip(scales.iter_mut())
    {
        *byte = scale(values.iter().fold(0.0f32, |a, v| a.max(v.abs())));
        // In an all-zero block the quotients are 0 whatever the scale.
        let scale = e8m0::decode(*byte);
        for (pair, code) in values.chunks_exact(2).zip(codes) {
            *code = e2m1::encode(pair[0] / scale) | (e2m1::encode(pair[1] / scale) << 4);
        }
    }
}

/// Writes the values of `codes` (two per byte) with `scales` (one per 32) to `out`. Exact in BF16 and F32.
pub fn dequantize(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    for ((out, codes), &byte) in out.chunks_exact_mut(BLOCK).zip(codes.chunks_exact(BLOCK / 2)).zip(scales) {
        let scale = e8m0::decode(byte);
        for (pair, &code) in out.chunks_exact_mut(2).zip(codes) {
            pair[0] = e2m1::decode(code) * scale;
            pair[1] = e2m1::decode(code >> 4) * scale;
        }
    }
}
