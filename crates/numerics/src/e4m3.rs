//! E4M3FN: sign, four exponent bits, three mantissa bits, bias 7, no infinity. The block scales of NVFP4.

/// The largest value, byte 0x7E.
pub const MAX: f32 = 448.0;

/// The smallest positive value, byte 0x01.
pub const MIN_POSITIVE: f32 = 0.001953125;

/// The positive NaN.
pub const NAN: u8 = 0x7f;

/// Rounds to the nearest value, ties to even, saturating at ±448; NaN gives NaN.
#[inline]
pub fn encode(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | NAN;
    }
    let magnitude = magnitude.min(MAX);
    if magnitude < 0.015625 {
        // Below 2^-6 the values are the multiples of 2^-9, and the product is exact.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    // Exponent bias 127 becomes 7.
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// The byte of a weight's block scale: `value` clamped to [2^-9, 448], then rounded.
#[inline]
pub fn encode_scale(value: f32) -> u8 {
    encode(value.clamp(MIN_POSITIVE, MAX))
}

/// The value of a byte; 0x7F and 0xFF are NaN.
#[inline]
pub fn decode(byte: u8) -> f32 {
    TABLE[usize::from(byte)]
}

/// The value of every byte.
pub const TABLE: [f32; 256] = table();

const fn table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (exponent, mantissa) = ((byte >> 3) & 15, byte & 7);
        let magnitude = if byte & 0x7f == 0x7f {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 * MIN_POSITIVE
        } else {
            f32::from_bits((((exponent + 120) << 23) | (mantissa << 20)) as u32)
        };
        table[byte] = if byte >= 128 { -magnitude } else { magnitude };
        byte += 1;
    }
    table
}
