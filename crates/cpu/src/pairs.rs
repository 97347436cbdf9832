//! Products of eight-bit weights with records of two or three limbs on AVX2 without VNNI, for several tokens, to the bits of
//! `products.rs`.
//!
//! Numbers of 16 bits this instruction set multiplies with their signs, and adds two columns: so two limbs become one number, once for
//! some panels, and the weights of a slab are widened, once for all tokens. One limb is as fast by bytes.

use std::arch::x86_64::*;

use crate::products::{self, MOST_TOKENS, Panels, Part, ask};
use crate::records::{COLUMNS, Words};
use crate::simd::{Avx2, LANES, Lanes, less_128};

/// Pairs of columns of a slab: first the columns 0 and 2 of every word of a record, in its order, then the columns 1 and 3.
const PAIRS: usize = COLUMNS / 2;

/// From so many tokens on it pays to widen.
const FEWEST_TOKENS: usize = 4;

/// Tokens whose sums, with the weights of a pair of columns and what they are multiplied with, fit the registers.
const TOGETHER: usize = 4;

/// A slab of a panel, widened, and the records of its columns, each of which is a cache line.
#[repr(C, align(64))]
struct Wide {
    weights: [<Avx2 as Lanes>::Ints; PAIRS],
    /// The sum of a row's weights times -128, which takes the offset out of products with the lower two of three limbs.
    offset: <Avx2 as Lanes>::Ints,
    /// Of each token the lower two limbs, or both.
    low: [[i32; PAIRS]; MOST_TOKENS],
    /// The third limb.
    high: [[i32; PAIRS]; MOST_TOKENS],
    scales: [f32; MOST_TOKENS],
}

/// # Safety
/// As for a [`PanelKernel`](crate::products::PanelKernel).
#[target_feature(enable = "avx,avx2,fma,f16c")]
pub(crate) unsafe fn int8<const LIMBS: usize>(panels: Panels, x: Part<'_>, sums: *mut [f32; LANES]) {
    if x.tokens < FEWEST_TOKENS {
        for p in 0..panels.count {
            // SAFETY: the contract.
            unsafe { products::int8::<Avx2, LIMBS>(panels.panel(p), x, sums.add(p * MOST_TOKENS)) };
        }
        return;
    }
    assert!(x.tokens <= MOST_TOKENS, "no more tokens than a product takes at a time");
    // SAFETY: zeros are valid integers and floats; the rest is the contract.
    unsafe {
        let mut wide: Wide = std::mem::zeroed();
        for p in 0..panels.count {
            sums.add(p * MOST_TOKENS).write_bytes(0, x.tokens);
        }
        let mut records = x.start.cast::<i32>();
        for s in 0..panels.first.slabs {
            for t in 0..x.tokens {
                widen_record::<LIMBS>(records.wrapping_add(t * Words::<LIMBS>::COUNT), &mut wide, t);
            }
            for p in 0..panels.count {
                let slab = panels.panel(p).data.add(s * LANES * COLUMNS);
                ask::<Avx2>(slab, LANES * COLUMNS);
                widen_weights::<LIMBS>(slab, &mut wide);
                let sums = sums.add(p * MOST_TOKENS);
                let mut t = 0;
                while t + TOGETHER <= x.tokens {
                    add::<LIMBS, TOGETHER>(&wide, t, sums.add(t));
                    t += TOGETHER;
                }
                while t < x.tokens {
                    add::<LIMBS, 1>(&wide, t, sums.add(t));
                    t += 1;
                }
            }
            records = records.wrapping_add(x.stride);
        }
    }
}

/// # Safety
/// `slab` is valid for a slab of bytes.
#[target_feature(enable = "avx,avx2,fma,f16c")]
unsafe fn widen_weights<const LIMBS: usize>(slab: *const u8, wide: &mut Wide) {
    for word in 0..PAIRS / 2 {
        // SAFETY: the contract; the words of a record are of the first and of the second half of the columns in turn.
        let (a, b) = unsafe {
            let (a, b) = Avx2::load_bytes(slab.add(64 * (word / 2 + word % 2 * 4)));
            (less_128(a), less_128(b))
        };
        wide.weights[word] = (lower(a), lower(b));
        wide.weights[PAIRS / 2 + word] = (upper(a), upper(b));
    }
    if LIMBS == 3 {
        let (factor, zero) = (_mm256_set1_epi16(-128), _mm256_setzero_si256());
        wide.offset = wide.weights.iter().fold((zero, zero), |offset, &(a, b)| {
            (
                _mm256_add_epi32(offset.0, _mm256_madd_epi16(a, factor)),
                _mm256_add_epi32(offset.1, _mm256_madd_epi16(b, factor)),
            )
        });
    }
}

/// The lower two of three limbs get 128 more: otherwise they would not always fit 16 bits, as all of two do.
///
/// # Safety
/// The record is valid.
#[target_feature(enable = "avx,avx2,fma,f16c")]
unsafe fn widen_record<const LIMBS: usize>(record: *const i32, wide: &mut Wide, t: usize) {
    // SAFETY: the contract; a record has eight words of each limb.
    let limb = |l: usize| unsafe { _mm256_loadu_si256(record.add(8 * l).cast()) };
    let put = |to: &mut [i32; PAIRS], lower: __m256i, upper: __m256i| {
        // SAFETY: sixteen words.
        unsafe {
            _mm256_storeu_si256(to.as_mut_ptr().cast(), lower);
            _mm256_storeu_si256(to[PAIRS / 2..].as_mut_ptr().cast(), upper);
        }
    };
    let bytes = _mm256_set1_epi16(0xff);
    let (first, second) = (limb(0), limb(1));
    let (lower_1, upper_1) = (_mm256_slli_epi16::<8>(second), _mm256_andnot_si256(bytes, second));
    if LIMBS == 3 {
        // SAFETY: the CPU has AVX2.
        let first = unsafe { less_128(first) };
        let (lower_0, upper_0) = (_mm256_and_si256(first, bytes), _mm256_srli_epi16::<8>(first));
        put(&mut wide.low[t], _mm256_or_si256(lower_0, lower_1), _mm256_or_si256(upper_0, upper_1));
        put(&mut wide.high[t], lower(limb(2)), upper(limb(2)));
    } else {
        let (lower_0, upper_0) = (lower(first), upper(first));
        put(&mut wide.low[t], _mm256_add_epi16(lower_0, lower_1), _mm256_add_epi16(upper_0, upper_1));
    }
    // SAFETY: the contract.
    wide.scales[t] = unsafe { record.add(Words::<LIMBS>::SCALE).cast::<f32>().read() };
}

/// The lower of two signed bytes each, in 16 bits.
#[target_feature(enable = "avx2")]
fn lower(bytes: __m256i) -> __m256i {
    _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(bytes))
}

/// The upper of two signed bytes each, in 16 bits.
#[target_feature(enable = "avx2")]
fn upper(bytes: __m256i) -> __m256i {
    _mm256_srai_epi16::<8>(bytes)
}

/// Adds the products of a slab to the sums of the tokens `t .. t + N`. What two limbs make is rounded once, as `products.rs` rounds the
/// sum of one and 256 times that of the next.
///
/// # Safety
/// `sums` is valid for the tokens.
#[target_feature(enable = "avx,avx2,fma,f16c")]
unsafe fn add<const LIMBS: usize, const N: usize>(wide: &Wide, t: usize, sums: *mut [f32; LANES]) {
    // SAFETY: the contract; the lanes want no more than the instruction set.
    unsafe {
        let zero = Avx2::splat_ints(0);
        let low = multiply::<N>(&wide.weights, if LIMBS == 3 { wide.offset } else { zero }, &wide.low[t..]);
        let high = if LIMBS == 3 { multiply::<N>(&wide.weights, zero, &wide.high[t..]) } else { low };
        for n in 0..N {
            let mut of_slab = Avx2::from_ints(low[n]);
            if LIMBS == 3 {
                of_slab = Avx2::from_ints(high[n]).fma(Avx2::splat(65_536.0), of_slab);
            }
            let sum = sums.add(n).cast::<f32>();
            of_slab.fma(Avx2::splat(wide.scales[t + n]), Avx2::load(sum)).store(sum);
        }
    }
}

/// `start` and the products of a slab with each of some records: at most 128 · 2^15 · 32, and 128 · 128 · 32.
#[target_feature(enable = "avx,avx2,fma,f16c")]
fn multiply<const N: usize>(
    weights: &[<Avx2 as Lanes>::Ints; PAIRS],
    start: <Avx2 as Lanes>::Ints,
    records: &[[i32; PAIRS]],
) -> [<Avx2 as Lanes>::Ints; N] {
    let mut sums = [start; N];
    let records = &records[..N];
    for (pair, &(a, b)) in weights.iter().enumerate() {
        for n in 0..N {
            let x = _mm256_set1_epi32(records[n][pair]);
            sums[n].0 = _mm256_add_epi32(sums[n].0, _mm256_madd_epi16(a, x));
            sums[n].1 = _mm256_add_epi32(sums[n].1, _mm256_madd_epi16(b, x));
        }
    }
    sums
}
