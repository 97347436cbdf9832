//! Activations as the products read them: one record per token and 32 columns.
//!
//! Weights of four and eight bits are multiplied as integers: a record holds 32 activations in fixed point with a scale of
//! their own, cut into signed bytes, the limbs. Three limbs are 24 bits, which is the precision of f32; with fewer the products
//! are faster and the activations coarser. Sums of integers are exact, so their order does not matter. BF16 weights take
//! the activations as they are. Or weights of all formats take activations rounded to BF16, for CPUs with units for that. The
//! records of 32 columns lie side by side for all tokens that a product takes at a time.

use crate::kernels::Kernels;
use crate::products::Records;
use crate::simd::E2M1_OFFSET;

/// Columns per record: an MXFP4 block, two of NVFP4.
pub(crate) const COLUMNS: usize = 32;

/// What is added to an eight-bit weight to make it an unsigned byte.
pub(crate) const INT8_OFFSET: i32 = 128;

/// How precise the activations are that meet weights of four or eight bits. BF16 weights meet f32 but with [`Activations::Bf16`],
/// and the router's always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// 24 bits in fixed point, a scale per 32: the precision of f32.
    #[default]
    F32,
    /// Rounded to BF16, eight bits of precision.
    Bf16,
    /// 16 bits in fixed point, a scale per 32.
    Int16,
    /// 8 bits, a scale per 32.
    Int8,
    /// As the model asks for (W4A4): rounded to NVFP4 with a matrix's input scale where it has one, to the numbers that native FP4
    /// products multiply; else as [`Activations::F32`].
    Nvfp4,
}

impl Activations {
    /// The records that weights of four and eight bits take.
    pub(crate) fn kind(self) -> Kind {
        match self {
            Activations::F32 | Activations::Nvfp4 => Kind::Limbs(3),
            Activations::Bf16 => Kind::Bf16,
            Activations::Int16 => Kind::Limbs(2),
            Activations::Int8 => Kind::Limbs(1),
        }
    }

    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            Activations::F32 => "f32",
            Activations::Bf16 => "bf16",
            Activations::Int16 => "int16",
            Activations::Int8 => "int8",
            Activations::Nvfp4 => "nvfp4",
        }
    }
}

/// What is in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// 32 f32.
    Float,
    /// 32 BF16, of which a word has two.
    Bf16,
    /// See [`Words`].
    Limbs(usize),
}

/// Where things are in a record of limbs, counted in words of 32 bits. Limb `l`, the lowest being 0, begins at word `8 l`. Its words
/// are of the first and of the second half of the columns in turn: see [`word`].
pub(crate) struct Words<const LIMBS: usize>;

impl<const LIMBS: usize> Words<LIMBS> {
    /// For each half: the sum of its activations times -12, which takes the offset out of products with E2M1 bytes.
    pub(crate) const E2M1: usize = 8 * LIMBS;
    /// The scale, an f32.
    pub(crate) const SCALE: usize = 8 * LIMBS + 2;
    /// For each limb: the sum of its bytes times -128, for eight-bit weights.
    pub(crate) const INT8: usize = 8 * LIMBS + 3;
    /// Their number.
    pub(crate) const COUNT: usize = 9 * LIMBS + 3;
}

/// In which word of a limb column `column` is.
pub(crate) const fn word(column: usize) -> usize {
    column / 4 % 4 * 2 + column / (COLUMNS / 2)
}

impl Kind {
    /// Words of 32 bits per record.
    pub(crate) fn words(self) -> usize {
        match self {
            Kind::Float => COLUMNS,
            Kind::Bf16 => COLUMNS / 2,
            Kind::Limbs(limbs) => 9 * limbs + 3,
        }
    }
}

/// The records of several tokens: in each block of them those of columns `32 s ..` side by side.
pub(crate) struct Layout {
    pub(crate) kind: Kind,
    pub(crate) tokens: usize,
    /// A multiple of 32, what is missing being zeros.
    pub(crate) cols: usize,
}

impl Layout {
    /// Words of all records.
    pub(crate) fn len(&self) -> usize {
        self.cols / COLUMNS * self.tokens * self.kind.words()
    }

    /// The records in `words`, which holds [`Layout::len`] of them.
    pub(crate) fn records<'a>(&self, words: &'a [u32]) -> Records<'a> {
        Records::new(&words[..self.len()], self.tokens, self.kind)
    }

    /// Writes the records of token `t`, whose activations are `x`.
    ///
    /// # Safety
    /// `words` is valid for [`Layout::len`] words, and nobody else touches those of this token meanwhile.
    pub(crate) unsafe fn write(&self, kernels: &Kernels, t: usize, x: &[f32], words: *mut u32) {
        assert!(t < self.tokens && x.len() <= self.cols, "a token that fits the layout");
        let (at, stride) = Records::place(self.tokens, self.kind, self.cols / COLUMNS, t);
        // SAFETY: the token is one of the layout's, by the assertion.
        let mut at = unsafe { words.add(at) };
        if self.kind == Kind::Float {
            for s in 0..self.cols / COLUMNS {
                let x = x.get(s * COLUMNS..).unwrap_or_default();
                let x = &x[..x.len().min(COLUMNS)];
                // SAFETY: record `s` of the token has 32 words; the next one is `stride` behind, if there is one.
                unsafe {
                    std::ptr::copy_nonoverlapping(x.as_ptr().cast::<u32>(), at, x.len());
                    at.add(x.len()).write_bytes(0, COLUMNS - x.len());
                    at = at.wrapping_add(stride);
                }
            }
            return;
        }
        let quantize = match self.kind {
            Kind::Limbs(limbs) => kernels.quantize[limbs - 1],
            _ => kernels.round,
        };
        // SAFETY: the records of one token are `stride` apart, one per 32 columns; the kernels were chosen for this CPU.
        unsafe { quantize(x, self.cols / COLUMNS, at, stride) };
    }
}

/// How a record is made of 32 activations.
pub(crate) trait Record {
    /// # Safety
    /// `out` is valid for the words of a record.
    unsafe fn write(x: &[f32; COLUMNS], out: *mut u32);
}

/// The records of one token.
///
/// # Safety
/// Every `stride` words from `out` on there is room for a record, `count` times; `x` is not longer than `32 · count`.
#[inline(always)]
pub(crate) unsafe fn write<R: Record>(x: &[f32], count: usize, out: *mut u32, stride: usize) {
    let whole = x.len() / COLUMNS;
    // SAFETY: within `x`; the rest is the contract.
    unsafe {
        for s in 0..whole {
            R::write(&*x.as_ptr().add(s * COLUMNS).cast::<[f32; COLUMNS]>(), out.add(s * stride));
        }
        for s in whole..count {
            let mut block = [0.0f32; COLUMNS];
            for i in s * COLUMNS..x.len() {
                block[i - s * COLUMNS] = x[i];
            }
            R::write(&block, out.add(s * stride));
        }
    }
}

/// Activations in BF16.
pub(crate) struct Rounded;

impl Record for Rounded {
    #[inline(always)]
    unsafe fn write(x: &[f32; COLUMNS], out: *mut u32) {
        for i in 0..COLUMNS / 2 {
            // SAFETY: the contract.
            unsafe { out.add(i).write(bf16(x[2 * i]) | bf16(x[2 * i + 1]) << 16) };
        }
    }
}

/// The nearest BF16, of two the even one. What is so small that a product with it might be subnormal is zero: the units for BF16 take
/// subnormal numbers for zeros.
#[inline(always)]
fn bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // A NaN stays one, whatever its bits.
    let rounded = if x.is_nan() { 0x7fc0 } else { rounded };
    if x.abs() < SMALLEST_BF16 { 0 } else { rounded }
}

/// 2^-60
const SMALLEST_BF16: f32 = 1.0 / (1u64 << 60) as f32;

/// Activations in so many limbs.
pub(crate) struct Limbs<const LIMBS: usize>;

impl<const LIMBS: usize> Record for Limbs<LIMBS> {
    #[inline(always)]
    unsafe fn write(x: &[f32; COLUMNS], out: *mut u32) {
        // SAFETY: the contract.
        unsafe { record::<LIMBS>(x, out) }
    }
}

/// # Safety
/// `out` is valid for the words of a record.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "iterators are not inlined into functions with more instructions"
)]
unsafe fn record<const LIMBS: usize>(x: &[f32; COLUMNS], out: *mut u32) {
    // The largest number of so many balanced digits, 127 each, is 8,355,711 for three; the product below may round to more.
    let most = [127.0f32, 32_639.0, 8_355_700.0][LIMBS - 1];
    // Compared as integers, so that a NaN is the largest and reaches the scale.
    let mut largest = 0;
    for i in 0..COLUMNS {
        let magnitude = x[i].to_bits() & 0x7fff_ffff;
        largest = if magnitude > largest { magnitude } else { largest };
    }
    let largest = f32::from_bits(largest);
    // Below, the inverse would not be finite.
    let inverse = if largest > 1e-30 { most / largest } else { 0.0 };
    let scale = largest / most;
    let mut whole = [0i32; COLUMNS];
    let (mut first, mut both) = (0i32, 0i32);
    for i in 0..COLUMNS {
        let value = (x[i] * inverse).round_ties_even();
        // What is not finite is zero here, and reaches the scale. The usual conversion to integers would not become vectors.
        let value = if value.abs() <= 8_388_608.0 { value } else { 0.0 };
        // SAFETY: the value fits.
        whole[i] = unsafe { value.to_int_unchecked() };
    }
    for i in 0..COLUMNS / 2 {
        first = first.wrapping_add(whole[i]);
    }
    for i in 0..COLUMNS {
        both = both.wrapping_add(whole[i]);
    }
    // SAFETY: all within the record.
    unsafe {
        out.add(Words::<LIMBS>::E2M1).write(first.wrapping_mul(-E2M1_OFFSET) as u32);
        out.add(Words::<LIMBS>::E2M1 + 1).write(both.wrapping_sub(first).wrapping_mul(-E2M1_OFFSET) as u32);
        out.add(Words::<LIMBS>::SCALE).write(scale.to_bits());
        for limb in 0..LIMBS {
            let mut sum = 0;
            let mut bytes = [[0i8; 4]; COLUMNS / 4];
            for i in 0..COLUMNS {
                let byte = whole[i] as i8;
                bytes[i / 4][i % 4] = byte;
                sum += i32::from(byte);
                whole[i] = whole[i].wrapping_sub(i32::from(byte)) >> 8;
            }
            for i in 0..COLUMNS / 4 {
                out.add(8 * limb + word(4 * i)).cast::<[i8; 4]>().write(bytes[i]);
            }
            out.add(Words::<LIMBS>::INT8 + limb).write((-INT8_OFFSET * sum) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limbs_add_up_to_the_activations() {
        let x: [f32; COLUMNS] = std::array::from_fn(|i| ((i * 37 % 41) as f32 - 20.0) * 0.173);
        check::<1>(&x, 0.5 / 127.0);
        check::<2>(&x, 0.5 / 32_639.0);
        check::<3>(&x, 0.5 / 8_355_700.0);
    }

    fn check<const LIMBS: usize>(x: &[f32; COLUMNS], bound: f64) {
        let mut words = [0u32; 30];
        // SAFETY: the longest record has thirty words.
        unsafe { record::<LIMBS>(x, words.as_mut_ptr()) };
        let scale = f64::from(f32::from_bits(words[Words::<LIMBS>::SCALE]));
        let byte = |limb: usize, i: usize| i64::from(words[8 * limb + word(i)].to_le_bytes()[i % 4] as i8);
        let mut halves = [0i64; 2];
        for (i, &x) in x.iter().enumerate() {
            let whole: i64 = (0..LIMBS).map(|limb| byte(limb, i) << (8 * limb)).sum();
            halves[i / 16] += whole;
            let error = (whole as f64 * scale - f64::from(x)).abs() / (20.0 * 0.173);
            // Half a unit, and the roundings of the scale and its inverse to f32.
            assert!(error < bound + f64::from(f32::EPSILON), "{LIMBS} limbs, {x}: {error:e}");
        }
        for (half, sum) in halves.iter().enumerate() {
            assert_eq!(i64::from(words[Words::<LIMBS>::E2M1 + half] as i32), -12 * sum);
        }
        for limb in 0..LIMBS {
            let sum: i64 = (0..COLUMNS).map(|i| byte(limb, i)).sum();
            assert_eq!(i64::from(words[Words::<LIMBS>::INT8 + limb] as i32), -128 * sum);
        }
    }

    #[test]
    fn nan_and_infinity_are_not_lost_and_zeros_are_zero() {
        for (bad, finite) in [(f32::NAN, false), (f32::INFINITY, false), (0.0, true)] {
            let mut x = [0.0; COLUMNS];
            x[7] = bad;
            let mut words = [0u32; 12];
            // SAFETY: a record of one limb has twelve words.
            unsafe { record::<1>(&x, words.as_mut_ptr()) };
            assert_eq!(f32::from_bits(words[Words::<1>::SCALE]).is_finite(), finite);
            assert_eq!(finite, words == [0; 12], "{bad}");
        }
    }
}
