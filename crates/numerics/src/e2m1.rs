//! E2M1: sign, two exponent bits, one mantissa bit, bias 1. The element type of NVFP4 and MXFP4.

/// The value of each code; code 8 is -0.
pub const VALUES: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The largest magnitude.
pub const MAX: f32 = 6.0;

/// Rounds to the nearest value, ties to the even code, saturating at 6. The sign bit is set where `value < 0`, so
/// -0.0 gives code 0 and a negative value that rounds to zero gives code 8. `value` must not be NaN.
#[inline]
pub fn encode(value: f32) -> u8 {
    sign(value) | round_magnitude(value.abs())
}

/// Rounds as [`encode`], the sign bit taken from `value` also where it is -0: the inverse of decoding.
#[inline]
pub fn encode_signed_zero(value: f32) -> u8 {
    (u8::from(value.is_sign_negative()) << 3) | round_magnitude(value.abs())
}

/// Rounds as Model Optimizer's MXFP4 writer does, for comparisons with its files: ties toward zero, and everything
/// that is not positive carries the sign bit (zero is code 8).
#[inline]
pub fn encode_ties_toward_zero(value: f32) -> u8 {
    let m = value.abs();
    let code = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0].iter().map(|&border| u8::from(m > border)).sum::<u8>();
    (u8::from(value <= 0.0) << 3) | code
}

/// The value of the low four bits of `code`.
#[inline]
pub fn decode(code: u8) -> f32 {
    VALUES[usize::from(code & 15)]
}

#[inline]
fn sign(value: f32) -> u8 {
    u8::from(value < 0.0) << 3
}

#[inline]
fn round_magnitude(m: f32) -> u8 {
    // A border belongs to the neighbour with the even code.
    u8::from(m > 0.25)
        + u8::from(m >= 0.75)
        + u8::from(m > 1.25)
        + u8::from(m >= 1.75)
        + u8::from(m > 2.5)
        + u8::from(m >= 3.5)
        + u8::from(m > 5.0)
}
/// The nearest E2M1 value, ties to the even code: [`decode`] of [`encode`], without branches so that compilers run many side
/// by side. NaN becomes 0.
#[inline]
pub fn nearest(y: f32) -> f32 {
    let m = y.abs();
    let step = |over: bool, by: f32| if over { by } else { 0.0 };
    let level = step(m > 0.25, 0.5)
        + step(m >= 0.75, 0.5)
        + step(m > 1.25, 0.5)
        + step(m >= 1.75, 0.5)
        + step(m > 2.5, 1.0)
        + step(m >= 3.5, 1.0)
        + step(m > 5.0, 2.0);
    level.copysign(y)
}
