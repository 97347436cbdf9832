//! E8M0: a bare exponent, 2^(byte - 127). The block scales of MXFP4.

/// The byte that stands for NaN.
pub const NAN: u8 = 255;

/// The value of a byte: 2^(byte - 127), NaN for 255.
#[inline]
pub fn decode(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22),
        NAN => f32::NAN,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}
