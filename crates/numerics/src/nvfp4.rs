//! NVFP4: E2M1 codes with one E4M3 scale per 16 and one F32 scale per tensor, 4.5 bits per weight.
//!
//! `value = E2M1(code) · S` with `S = f32(scale) · global_scale`, in that order. The formulas are those of NVIDIA
//! Model Optimizer 0.47 (`NVFP4QTensor`); the order of operations decides scale bytes at ties and is kept.

use half::bf16;

use crate::{e2m1, e4m3, e8m0, mxfp4};

/// Elements that share a scale.
pub const BLOCK: usize = 16;

/// The scale byte of an all-zero block in the dynamic form: 1.0.
pub const ZERO_BLOCK_SCALE: u8 = 0x38;

/// The global scale of a tensor that is all zero, and the smallest in use: below it the inverse is not finite.
pub const MIN_GLOBAL_SCALE: f32 = f32::MIN_POSITIVE;

/// The global scale (`weight_scale_2`, `input_scale`) of a tensor of largest magnitude `amax`: `amax / (6 · 448)`,
/// and 2^-126 where that is not a normal number.
#[inline]
pub fn global_scale(amax: f32) -> f32 {
    (amax / 2688.0).max(MIN_GLOBAL_SCALE)
}

/// The largest magnitude of `values`, NaN if any is NaN.
pub fn amax(values: &[f32]) -> f32 {
    values.iter().fold(0.0f32, |a, &v| {
        let v = v.abs();
        if v > a || v.is_nan() { v } else { a }
    })
}

/// The scale byte of a block of largest magnitude `amax`, in the dynamic form (max calibration).
#[inline]
pub fn block_scale(amax: f32, global_scale: f32) -> u8 {
    let t = amax / (6.0 * global_scale);
    if t == 0.0 { ZERO_BLOCK_SCALE } else { e4m3::encode_scale(t) }
}

/// The largest block scale that the static form aims at: all of E4M3's range.
pub const STATIC_MAX_SCALE: f32 = 448.0;

/// The same for four-over-six, which leaves room for a factor of 1.5 below 448.
pub const FOUR_OVER_SIX_MAX_SCALE: f32 = 256.0;

/// The global scale in the static form (searched scales): `amax / (6 · max_scale)`.
#[inline]
pub fn static_global_scale(amax: f32, max_scale: f32) -> f32 {
    (amax / (6.0 * max_scale)).max(MIN_GLOBAL_SCALE)
}

/// The scale byte in the static form, for a block that is to be scaled as if its largest magnitude were `block_amax`, in a
/// tensor of largest magnitude `amax`.
#[inline]
pub fn static_block_scale(block_amax: f32, amax: f32, max_scale: f32) -> u8 {
    let sixth = block_amax / 6.0;
    let sixth = if sixth == 0.0 { 1.0 } else { sixth };
    let scaled = sixth * max_scale;
    // The order decides ties, so another one is taken only where this one leaves F32.
    let scale = if scaled.is_finite() { scaled / (amax / 6.0) } else { sixth / (amax / 6.0) * max_scale };
    e4m3::encode_scale(scale)
}

/// Chooses block scales by their squared error, as Model Optimizer's static fake quantizer measures it.
pub struct ScaleSearch {
    amax: f32,
    max_scale: f32,
    /// Of each candidate byte: the block amax that stands for it and the scale that it is tried with.
    sweep: Vec<(f32, f32)>,
}

/// Candidates of a sweep, relative to the byte of the max rule: the winners lie between -2 and +6.
const SWEEP_BELOW: usize = 8;
const SWEEP_ABOVE: usize = 12;

impl ScaleSearch {
    /// For a tensor (or group of tensors) of largest magnitude `amax`.
    pub fn new(amax: f32, max_scale: f32) -> ScaleSearch {
        let mut search = ScaleSearch { amax, max_scale, sweep: Vec::new() };
        search.sweep = (1..=0x7e)
            .map(|byte| {
                let block_amax = amax * (e4m3::decode(byte) / e4m3::MAX);
                (block_amax, search.trial_scale(block_amax))
            })
            .collect();
        search
    }

    /// The best of all E4M3 scales: the smallest squared error, the smaller scale on a tie. `full` looks at all 126 bytes, else
    /// at those around the max rule's.
    pub fn best_of_sweep(&self, values: &[f32], full: bool) -> u8 {
        // Candidate i stands for byte i + 1. In a block of zeros all are equal, and the first wins.
        if amax(values) == 0.0 {
            return self.found(Some(0), values);
        }
        let candidates = if full {
            0..self.sweep.len()
        } else {
            let start = static_block_scale(amax(values), self.amax, self.max_scale) as usize - 1;
            start.saturating_sub(SWEEP_BELOW)..(start + SWEEP_ABOVE + 1).min(self.sweep.len())
        };
        let (mut best, mut least, mut most) = (None, f32::INFINITY, 0.0f32);
        for i in candidates {
            let error = squared_error(values, self.sweep[i].1);
            if error < least {
                (best, least) = (Some(i), error);
            }
            most = most.max(error);
        }
        self.found(best.filter(|_| most > 0.0), values)
    }

    /// The E4M3 scale of the smallest `d H dᵀ`, `d` being the block's error and `hessian` the second moment `H` of its inputs;
    /// the smaller scale on a tie. Winners lie anywhere, so all 126 are tried.
    pub fn best_by_hessian(&self, values: &[f32], hessian: &[[f32; BLOCK]; BLOCK]) -> u8 {
        const LANES: usize = 16;
        if amax(values) == 0.0 {
            return self.found(Some(0), values);
        }
        let (mut best, mut least) = (None, f32::INFINITY);
        for first in (0..self.sweep.len()).step_by(LANES) {
            // So many candidates side by side; the last one repeated where there are fewer.
            let scales: [f32; LANES] =
                std::array::from_fn(|c| self.sweep[(first + c).min(self.sweep.len() - 1)].1);
            let mut errors = [[0.0f32; LANES]; BLOCK];
            for (errors, &value) in errors.iter_mut().zip(values) {
                for (error, scale) in errors.iter_mut().zip(&scales) {
                    *error = value - e2m1::nearest(value / scale) * scale;
                }
            }
            let mut losses = [0.0f32; LANES];
            for (row, own) in hessian.iter().zip(&errors) {
                let mut product = [0.0f32; LANES];
                for (h, errors) in row.iter().zip(&errors) {
                    product.iter_mut().zip(errors).for_each(|(product, error)| *product += h * error);
                }
                for ((loss, product), error) in losses.iter_mut().zip(&product).zip(own) {
                    *loss += product * error;
                }
            }
            for (c, &loss) in losses.iter().enumerate() {
                if loss < least && loss.is_finite() {
                    (best, least) = (Some(first + c), loss);
                }
            }
        }
        self.found(best, values)
    }

    /// The scale byte of the best candidate; that of the max rule where the losses of all are beyond F32, or so small that F32 has
    /// only 0 for them.
    fn found(&self, best: Option<usize>, values: &[f32]) -> u8 {
        match best {
            Some(best) => static_block_scale(self.sweep[best].0, self.amax, self.max_scale),
            None => block_scale(amax(values), static_global_scale(self.amax, self.max_scale)),
        }
    }

    /// Scales the block so that its largest magnitude lands on 6 or on 4, whichever has the smaller squared error; 6 on a tie
    /// (Cook et al., "Four Over Six", 2025).
    pub fn four_over_six(&self, values: &[f32]) -> u8 {
        let block_amax = amax(values);
        let error = |block_amax: f32| squared_error(values, self.trial_scale(block_amax));
        let (six, four) = (block_amax, block_amax * 1.5);
        let chosen = if error(four) < error(six) { four } else { six };
        static_block_scale(chosen, self.amax, self.max_scale)
    }

    /// The scale with which the static fake quantizer tries a block amax. For 256 it differs from the exported one in the
    /// last bit.
    pub fn trial_scale(&self, block_amax: f32) -> f32 {
        let sixth = self.amax * (e4m3::MAX / self.max_scale) / 6.0;
        let ratio = e4m3::MAX / sixth;
        e4m3::decode(e4m3::encode((block_amax / 6.0 * ratio).min(e4m3::MAX))) * (1.0 / ratio)
    }
}

/// Squared error of quantizing `values` with scale `s`.
fn squared_error(values: &[f32], s: f32) -> f32 {
    let mut sum = 0.0;
    for &value in values {
        let rounded = if s == 0.0 { 0.0 } else { e2m1::nearest(value / s) * s };
        let error = value - rounded;
        sum += error * error;
    }
    sum
}

/// Encodes one block with a given scale byte: `code = E2M1(value / (f32(scale) · global_scale))`.
/// `values` has 16 elements, `codes` 8 bytes.
#[inline]
pub fn encode_block(values: &[f32], scale: u8, global_scale: f32, codes: &mut [u8]) {
    let s = e4m3::decode(scale) * global_scale;
    for (pair, code) in values.chunks_exact(2).zip(codes) {
        *code = e2m1::encode(pair[0] / s) | (e2m1::encode(pair[1] / s) << 4);
    }
}

/// Quantizes `values` (a multiple of 16, finite) by the max rule to `codes` (half as many bytes) and `scales` (one per
/// 16), for a given global scale.
pub fn quantize(values: &[f32], global_scale: f32, codes: &mut [u8], scales: &mut [u8]) {
    assert_eq!(values.len() % BLOCK, 0, "a row is a whole number of blocks");
    for ((values, codes), scale) in
        values.chunks_exact(BLOCK).zip(codes.chunks_exact_mut(BLOCK / 2)).zip(scales.iter_mut())
    {
        *scale = block_scale(amax(values), global_scale);
        encode_block(values, *scale, global_scale, codes);
    }
}

/// Writes the values of `codes` (two per byte) with `scales` (one per 16) to `out`.
pub fn dequantize(codes: &[u8], scales: &[u8], global_scale: f32, out: &mut [f32]) {
    for ((out, codes), &scale) in out.chunks_exact_mut(BLOCK).zip(codes.chunks_exact(BLOCK / 2)).zip(scales) {
        let s = e4m3::decode(scale) * global_scale;
        for (pair, &code) in out.chunks_exact_mut(2).zip(codes) {
            pair[0] = e2m1::decode(code) * s;
            pair[1] = e2m1::decode(code >> 4) * s;
        }
    }
}

/// Recovers the codes of fake-quantized weights, `values = bf16(E2M1(code) · S)`, from the scales that made them.
/// Exact, the sign of zero included, if S / 2 ≥ 2^-126 for every block with a non-zero value: BF16 moves a value by at
/// most 0.2 %, and the nearest rounding border is 12.5 % away.
///
/// # Errors
/// The index of the first value that these scales do not make of any code.
pub fn recover_codes(
    values: &[bf16],
    scales: &[u8],
    global_scale: f32,
    codes: &mut [u8],
) -> Result<(), usize> {
    let blocks = values.chunks_exact(BLOCK).zip(codes.chunks_exact_mut(BLOCK / 2)).zip(scales);
    for (block, ((values, codes), &scale)) in blocks.enumerate() {
        let s = e4m3::decode(scale) * global_scale;
        for (at, value) in values.iter().enumerate() {
            let code = recover_code(value.to_f32(), s).ok_or(block * BLOCK + at)?;
            codes[at / 2] = if at % 2 == 0 { code } else { codes[at / 2] | (code << 4) };
        }
    }
    Ok(())
}

/// The code of a value of scale `s`; `None` if it is more than a step of BF16 from what that code stands for, or no number.
fn recover_code(value: f32, s: f32) -> Option<u8> {
    // A scale byte of 0 makes every value of its block 0, and 0 / 0 is no code.
    let code = e2m1::encode_signed_zero(if value == 0.0 { value } else { value / s });
    let made = e2m1::decode(code) * s;
    ((value - made).abs() <= made.abs() / 256.0).then_some(code)
}

/// Quantizes `values` to NVFP4 and back with a static global scale, as W4A4 kernels treat activations: block scales
/// have no lower clamp, so a block far below the global scale becomes 0. A block with an infinity or a NaN, which no code stands for,
/// stays as it is, so that it is not lost.
pub fn fake_quantize_activations(values: &[f32], input_scale: f32, out: &mut [f32]) {
    for (values, out) in values.chunks_exact(BLOCK).zip(out.chunks_exact_mut(BLOCK)) {
        let amax = amax(values);
        if !amax.is_finite() {
            out.copy_from_slice(values);
            continue;
        }
        let t = amax / (6.0 * input_scale);
        let s = e4m3::decode(e4m3::encode(t.min(e4m3::MAX))) * input_scale;
        for (value, out) in values.iter().zip(out) {
            *out = if s == 0.0 { 0.0 } else { e2m1::decode(e2m1::encode(value / s)) * s };
        }
    }
}

/// What a cast from MXFP4 kept and lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CastCounts {
    /// MXFP4 blocks seen.
    pub blocks: u64,
    /// Blocks whose exponent fits, so that every value is kept: Model Optimizer's count.
    pub lossless_blocks: u64,
    /// Values that changed.
    pub changed_values: u64,
}

impl std::ops::AddAssign for CastCounts {
    fn add_assign(&mut self, other: CastCounts) {
        self.blocks += other.blocks;
        self.lossless_blocks += other.lossless_blocks;
        self.changed_values += other.changed_values;
    }
}

/// The largest MXFP4 scale byte other than 0 (which marks an all-zero block), over all tensors that share a global
/// scale; `None` if every block is zero.
pub fn cast_max_scale(scales: &[u8]) -> Option<u8> {
    scales.iter().copied().max().filter(|&byte| byte > 0)
}

/// The global scale of a cast: 2^(k_max - 8) for the byte of [`cast_max_scale`], so that the largest block scale is 2^8.
pub fn cast_global_scale(max_scale: Option<u8>) -> f32 {
    match max_scale {
        None => MIN_GLOBAL_SCALE,
        Some(byte) => exp2((i32::from(byte) - 127 - 8).max(-126)),
    }
}

/// Casts MXFP4 to NVFP4: `codes` and `scales` (E8M0, one per 32) to `out_codes` and `out_scales` (E4M3, one per 16).
///
/// A block within 17 octaves of the largest keeps every value: 2^(k - m) is an E4M3 number and the codes are kept (8, -0,
/// becomes 0). Below that the scale is clamped to 2^-9 and the codes are rounded anew. `scales` must hold no NaN, and
/// `max_scale` must be no less than any of them.
pub fn cast_from_mxfp4(
    codes: &[u8],
    scales: &[u8],
    max_scale: Option<u8>,
    out_codes: &mut [u8],
    out_scales: &mut [u8],
) -> CastCounts {
    let mut counts = CastCounts::default();
    let global = cast_global_scale(max_scale);
    let m = i32::from((global.to_bits() >> 23) as u8) - 127;
    let blocks = codes.chunks_exact(mxfp4::BLOCK / 2).zip(scales);
    let out = out_codes.chunks_exact_mut(mxfp4::BLOCK / 2).zip(out_scales.chunks_exact_mut(2));
    for ((codes, &byte), (out_codes, out_scales)) in blocks.zip(out) {
        counts.blocks += 1;
        let k = i32::from(byte) - 127;
        if byte == 0 {
            // All zero by convention; a non-zero code means 2^-127 times it, which no E4M3 scale reaches.
            let changed = codes.iter().map(|c| nonzero(*c) + nonzero(c >> 4)).sum::<u64>();
            counts.lossless_blocks += u64::from(changed == 0);
            counts.changed_values += changed;
            out_codes.fill(0);
            out_scales.fill(0x01);
        } else if k - m >= -9 {
            counts.lossless_blocks += 1;
            out_scales.fill(e4m3::encode(exp2(k - m)));
            for (out, &code) in out_codes.iter_mut().zip(codes) {
                *out = POSITIVE_ZERO[usize::from(code)];
            }
        } else {
            out_scales.fill(0x01);
            let source = e8m0::decode(byte);
            let s = e4m3::MIN_POSITIVE * global;
            let mut cast = |code: u8| {
                let value = e2m1::decode(code) * source;
                let new = e2m1::encode(value / s);
                counts.changed_values += u64::from(e2m1::decode(new) * s != value);
                new
            };
            for (out, &code) in out_codes.iter_mut().zip(codes) {
                *out = cast(code) | (cast(code >> 4) << 4);
            }
        }
    }
    counts
}

/// Rearranges a linear scale matrix (`rows × cols` bytes) into tiles of 128 rows by 4 scales, zero-padded, as Blackwell's
/// kernels read them (CUTLASS `Sm1xxBlockScaledConfig`).
pub fn swizzle(linear: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let (padded_rows, padded_cols) = (rows.next_multiple_of(128), cols.next_multiple_of(4));
    let mut out = vec![0; padded_rows * padded_cols];
    for row in 0..rows {
        for col in 0..cols {
            let tile = (row / 128) * (padded_cols / 4) + col / 4;
            out[tile * 512 + (row % 32) * 16 + (row % 128) / 32 * 4 + col % 4] = linear[row * cols + col];
        }
    }
    out
}

/// Two packed codes with each 8 (-0) replaced by 0.
const POSITIVE_ZERO: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (low, high) = (byte & 15, byte >> 4);
        table[byte] = (if low == 8 { 0 } else { low } | if high == 8 { 0 } else { high << 4 }) as u8;
        byte += 1;
    }
    table
};

fn nonzero(code: u8) -> u64 {
    u64::from(code & 7 != 0)
}

/// 2^exponent for a normal result.
fn exp2(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}
