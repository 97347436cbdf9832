//! Sixteen f32 lanes on AVX-512, AVX2 and plain arrays.
//!
//! Kernels are generic over [`Lanes`] and inlined into one function per instruction set that enables the features; a
//! method that is not inlined there would become a call in the inner loop, hence `inline(always)` throughout. Fused
//! multiply-add rounds once on all three, which makes them equal bit for bit.

/// Lanes per vector: the elements of an NVFP4 block.
pub(crate) const LANES: usize = 16;

/// 2^120: between the exponent biases of E4M3 and f32.
const E4M3_BIAS: f32 = f32::from_bits((127 + 120) << 23);

/// Adding this to a small f32 leaves its nearest integer in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// A vector of sixteen f32.
///
/// # Safety
/// All methods require that the CPU has the features of the implementation; pointers must be valid for sixteen elements
/// (codes: 64 bytes, scales: 8).
pub(crate) trait Lanes: Copy {
    /// A tile of E2M1 codes: lane `j` holds the codes of eight rows at column `j`, row `r` in bits `4 r ..`.
    type Codes: Copy;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_bf16(from: *const u16) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    unsafe fn min(self, other: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    /// `self · b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// The bits shifted left by 23 with the exponent bias added: 2^n for `n + ROUND`.
    unsafe fn exp2_of_rounded(self) -> Self;
    /// Lane `l + 8` is added to `l`, then `l + 4`, `l + 2`, `l + 1`.
    unsafe fn sum(self) -> f32;
    unsafe fn load_codes(from: *const u8) -> Self::Codes;
    /// Drops the codes of the first `rows` rows.
    unsafe fn skip_rows(codes: Self::Codes, rows: i32) -> Self::Codes;
    /// The values of the first row's codes.
    unsafe fn e2m1(codes: Self::Codes) -> Self;

    /// Eight non-negative E4M3 bytes: the bits moved to the place of an f32's, times the difference of the biases. Exact for
    /// the subnormal bytes too.
    #[inline(always)]
    unsafe fn e4m3(from: *const u8) -> [f32; 8] {
        // SAFETY: valid for eight bytes by the trait's contract.
        let bytes = unsafe { from.cast::<[u8; 8]>().read_unaligned() };
        bytes.map(|byte| f32::from_bits(u32::from(byte) << 20) * E4M3_BIAS)
    }

    /// Eight E8M0 bytes. 2^-127, byte 0, is the only one below the normal range.
    #[inline(always)]
    unsafe fn e8m0(from: *const u8) -> [f32; 8] {
        // SAFETY: valid for eight bytes by the trait's contract.
        let bytes = unsafe { from.cast::<[u8; 8]>().read_unaligned() };
        bytes.map(|byte| f32::from_bits((u32::from(byte) << 23).max(1 << 22)))
    }

    /// e^self to about one unit in the last place, for arguments up to 88; below -87 the result stays at e^-87.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the caller vouches for the CPU's features; no pointer is used.
        unsafe {
            let x = self.max(Self::splat(-87.0)).min(Self::splat(88.0));
            let rounded = x.fma(Self::splat(std::f32::consts::LOG2_E), Self::splat(ROUND));
            let n = rounded.sub(Self::splat(ROUND));
            // ln 2 in two parts (Cody and Waite), then the polynomial of Cephes' expf.
            let r = n.fma(Self::splat(-0.693_359_4), x);
            let r = n.fma(Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = p.fma(r, Self::splat(c));
            }
            let p = p.fma(r.mul(r), r).add(Self::splat(1.0));
            p.mul(rounded.exp2_of_rounded())
        }
    }
}

/// Plain arrays: the road of every CPU without AVX2.
#[derive(Clone, Copy)]
pub(crate) struct Scalar([f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn zip(self, other: Scalar, f: impl Fn(f32, f32) -> f32) -> Scalar {
        Scalar(std::array::from_fn(|l| f(self.0[l], other.0[l])))
    }
}

impl Lanes for Scalar {
    type Codes = [u32; LANES];

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Scalar([value; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: valid for sixteen elements by the trait's contract.
        Scalar(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: valid for sixteen elements by the trait's contract.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Scalar(bits.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: valid for sixteen elements by the trait's contract.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // As the vector instructions: the second operand if they are not ordered.
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Scalar(std::array::from_fn(|l| self.0[l].mul_add(b.0[l], c.0[l])))
    }
    #[inline(always)]
    unsafe fn exp2_of_rounded(self) -> Self {
        Scalar(self.0.map(|v| f32::from_bits((v.to_bits() << 23).wrapping_add(127 << 23))))
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = self.0;
        for width in [8, 4, 2, 1] {
            for l in 0..width {
                lanes[l] += lanes[l + width];
            }
        }
        lanes[0]
    }
    #[inline(always)]
    unsafe fn load_codes(from: *const u8) -> Self::Codes {
        // SAFETY: valid for 64 bytes by the trait's contract.
        unsafe { from.cast::<[u32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn skip_rows(codes: Self::Codes, rows: i32) -> Self::Codes {
        codes.map(|c| c >> (4 * rows))
    }
    #[inline(always)]
    unsafe fn e2m1(codes: Self::Codes) -> Self {
        Scalar(codes.map(|c| numerics::e2m1::decode(c as u8)))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    // Every `unsafe` block below calls intrinsics of the features that the trait's contract demands, on pointers that it
    // declares valid.
    use std::arch::x86_64::*;

    use super::Lanes;

    /// Sixteen lanes in one register.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    impl Lanes for Avx512 {
        type Codes = __m512i;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the trait's contract.
            Avx512(unsafe { _mm512_set1_ps(value) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the trait's contract.
            Avx512(unsafe { _mm512_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the trait's contract.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Avx512(unsafe { _mm512_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Avx512(unsafe { _mm512_sub_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Avx512(unsafe { _mm512_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn div(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Avx512(unsafe { _mm512_div_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Avx512(unsafe { _mm512_min_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Avx512(unsafe { _mm512_max_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: the trait's contract.
            Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        unsafe fn exp2_of_rounded(self) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let bits = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
                Avx512(_mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(127 << 23))))
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: the trait's contract.
            unsafe {
                let high = _mm512_extractf32x8_ps::<1>(self.0);
                sum8(_mm256_add_ps(_mm512_castps512_ps256(self.0), high))
            }
        }
        #[inline(always)]
        unsafe fn load_codes(from: *const u8) -> Self::Codes {
            // SAFETY: the trait's contract.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn skip_rows(codes: Self::Codes, rows: i32) -> Self::Codes {
            // SAFETY: the trait's contract.
            unsafe { _mm512_srl_epi32(codes, _mm_cvtsi32_si128(4 * rows)) }
        }
        #[inline(always)]
        unsafe fn e2m1(codes: Self::Codes) -> Self {
            // SAFETY: the trait's contract. The permutation looks at the low four bits of each lane only.
            unsafe {
                let table = _mm512_loadu_ps(numerics::e2m1::VALUES.as_ptr());
                Avx512(_mm512_permutexvar_ps(codes, table))
            }
        }
        #[inline(always)]
        unsafe fn e4m3(from: *const u8) -> [f32; 8] {
            // SAFETY: the trait's contract.
            unsafe { scales8::<20>(from, _mm256_setzero_si256(), super::E4M3_BIAS) }
        }
        #[inline(always)]
        unsafe fn e8m0(from: *const u8) -> [f32; 8] {
            // SAFETY: the trait's contract.
            unsafe { scales8::<23>(from, _mm256_set1_epi32(1 << 22), 1.0) }
        }
    }

    /// Sixteen lanes in two registers.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    impl Lanes for Avx2 {
        type Codes = (__m256i, __m256i);

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let widen = |from: *const u16| {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                };
                Avx2(widen(from), widen(from.add(8)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the trait's contract.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Avx2(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn div(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Avx2(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Avx2(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Avx2(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
        }
        #[inline(always)]
        unsafe fn exp2_of_rounded(self) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let shift = |v| {
                    let bits = _mm256_slli_epi32::<23>(_mm256_castps_si256(v));
                    _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(127 << 23)))
                };
                Avx2(shift(self.0), shift(self.1))
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: the trait's contract.
            unsafe { sum8(_mm256_add_ps(self.0, self.1)) }
        }
        #[inline(always)]
        unsafe fn load_codes(from: *const u8) -> Self::Codes {
            // SAFETY: the trait's contract.
            unsafe { (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())) }
        }
        #[inline(always)]
        unsafe fn skip_rows(codes: Self::Codes, rows: i32) -> Self::Codes {
            // SAFETY: the trait's contract.
            unsafe {
                let count = _mm_cvtsi32_si128(4 * rows);
                (_mm256_srl_epi32(codes.0, count), _mm256_srl_epi32(codes.1, count))
            }
        }
        #[inline(always)]
        unsafe fn e2m1(codes: Self::Codes) -> Self {
            // SAFETY: the trait's contract. The permutation looks at the low three bits of each lane: the magnitude; the
            // fourth bit becomes the sign.
            unsafe {
                let table = _mm256_loadu_ps(numerics::e2m1::VALUES.as_ptr());
                let sign = _mm256_set1_epi32(i32::MIN);
                let decode = |codes| {
                    let magnitude = _mm256_permutevar8x32_ps(table, codes);
                    let sign = _mm256_and_si256(_mm256_slli_epi32::<28>(codes), sign);
                    _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign))
                };
                Avx2(decode(codes.0), decode(codes.1))
            }
        }
        #[inline(always)]
        unsafe fn e4m3(from: *const u8) -> [f32; 8] {
            // SAFETY: the trait's contract.
            unsafe { scales8::<20>(from, _mm256_setzero_si256(), super::E4M3_BIAS) }
        }
        #[inline(always)]
        unsafe fn e8m0(from: *const u8) -> [f32; 8] {
            // SAFETY: the trait's contract.
            unsafe { scales8::<23>(from, _mm256_set1_epi32(1 << 22), 1.0) }
        }
    }

    /// Eight bytes shifted left by `SHIFT`, at least `least`, as f32 times `factor`.
    #[inline(always)]
    unsafe fn scales8<const SHIFT: i32>(from: *const u8, least: __m256i, factor: f32) -> [f32; 8] {
        let mut scales = [0.0; 8];
        // SAFETY: only called from the implementations above, whose contract includes AVX2 and eight valid bytes.
        unsafe {
            let bits = _mm256_slli_epi32::<SHIFT>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())));
            let values = _mm256_castsi256_ps(_mm256_max_epu32(bits, least));
            _mm256_storeu_ps(scales.as_mut_ptr(), _mm256_mul_ps(values, _mm256_set1_ps(factor)));
        }
        scales
    }

    #[inline(always)]
    unsafe fn sum8(v: __m256) -> f32 {
        // SAFETY: only called from the implementations above, whose contract includes AVX.
        unsafe {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }
}
