//! Sixteen f32 lanes, and sums of byte products, on AVX-512 with and without VBMI, AVX2 with and without AVX-VNNI, and plain arrays.
//!
//! Kernels are generic over [`Lanes`] and inlined into one function per instruction set that enables the features; a
//! method that is not inlined there would become a call in the inner loop, hence `inline(always)` throughout. Fused
//! multiply-add rounds once on all of them and sums of integers are exact, which makes them equal bit for bit.

/// Lanes per vector: the rows of a panel, and the elements of an NVFP4 block.
pub(crate) const LANES: usize = 16;

/// What is added to twice an E2M1 value to make it an unsigned byte.
pub(crate) const E2M1_OFFSET: i32 = 12;

/// Twice the value of each E2M1 code plus [`E2M1_OFFSET`].
const E2M1_BYTES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// Twice the value of each E2M1 code.
const E2M1_TWICE: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// By how much a sum of 32 columns of weights of at most 12 and activations of at most 127 can be shifted in 32 bits.
pub(crate) const MOST_SHIFT: u8 = 15;

/// 2^8: between the exponent biases of E4M3 and of f16.
const E4M3_BIAS: f32 = 256.0;

/// Adding this to a small f32 leaves its nearest integer in the low mantissa bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// A vector of sixteen f32.
///
/// # Safety
/// All methods require that the CPU has the features of the implementation; pointers must be valid for sixteen elements
/// (bytes of products: 64).
pub(crate) trait Lanes: Copy {
    /// 64 unsigned bytes: four columns of sixteen rows, row `r` in bytes `4 r ..`.
    type Bytes: Copy;
    /// Sixteen i32, one per row.
    type Ints: Copy;

    /// Whether 32 columns of sixteen rows do not fit the registers.
    const FEW_REGISTERS: bool = false;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// The even and the odd of two columns of BF16: row `r` in elements `2 r` and `2 r + 1`.
    unsafe fn load_bf16(from: *const u16) -> [Self; 2];
    /// Two BF16, each in all lanes.
    unsafe fn splat_bf16(from: *const u16) -> [Self; 2];
    /// The other way than [`Lanes::load_bf16`], for numbers that BF16 holds.
    unsafe fn store_bf16(pair: [Self; 2], to: *mut u16);
    /// Twice the values of the E2M1 codes that are `shift` bits up in the words.
    unsafe fn e2m1_at(words: Self::Ints, shift: u32) -> Self;
    /// The unsigned bytes that are `shift` bits up in the words.
    unsafe fn byte_at(words: Self::Ints, shift: u32) -> Self;
    /// Sixteen BF16.
    unsafe fn widen_bf16(from: *const u16) -> Self;
    /// E4M3 bytes with their signs; NaN stays NaN.
    unsafe fn widen_e4m3(from: *const u8) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// Where one of them is NaN, `other`: what must keep its NaN comes second.
    unsafe fn min(self, other: Self) -> Self;
    /// The same.
    unsafe fn max(self, other: Self) -> Self;
    /// `self · b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// The bits shifted left by 23 with the exponent bias added: 2^n for `n + ROUND`.
    unsafe fn exp2_of_rounded(self) -> Self;
    /// Lane `l + 8` is added to `l`, then `l + 4`, `l + 2`, `l + 1`.
    unsafe fn sum(self) -> f32;
    /// The largest lane; none is NaN.
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the array has sixteen elements.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut largest = lanes[0];
        let mut l = 1;
        while l < LANES {
            largest = if lanes[l] > largest { lanes[l] } else { largest };
            l += 1;
        }
        largest
    }
    /// Lane 0.
    #[inline(always)]
    unsafe fn first(self) -> f32 {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the array has sixteen elements.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes[0]
    }

    /// Non-negative E4M3 bytes: the bits moved to the place of an f16's, times the difference of the biases. Exact for
    /// the subnormal bytes too, and no f32 is subnormal on the way, with which some CPUs multiply a hundred times slower.
    unsafe fn e4m3(from: *const u8) -> Self;
    /// E8M0 bytes. 2^-127, byte 0, is the only one below the normal range.
    unsafe fn e8m0(from: *const u8) -> Self;

    unsafe fn load_bytes(from: *const u8) -> Self::Bytes;
    /// Eight columns of E2M1 codes as [`E2M1_BYTES`]: the low nibbles are the first four columns.
    unsafe fn load_e2m1(from: *const u8) -> [Self::Bytes; 2];
    unsafe fn splat_ints(value: i32) -> Self::Ints;
    unsafe fn load_ints(from: *const i32) -> Self::Ints;
    unsafe fn store_ints(ints: Self::Ints, to: *mut i32);
    /// Adds the products of sixteen columns, weights of at most 24, with sixteen numbers of several signed bytes, the next limbs of
    /// which are eight words behind: four bytes of a limb in every second word from `x` on.
    unsafe fn dot_e2m1<const LIMBS: usize>(
        offset: Self::Ints,
        weights: &[Self::Bytes; 4],
        x: *const i32,
    ) -> Self::Ints;
    /// For some tokens, the products of 32 columns of weights from -127 to 127, plus 128, with 32 signed bytes, in eight words from `x`
    /// on. `offsets`: where the sum of these bytes is, times -128.
    unsafe fn dot_int8<const N: usize>(
        offsets: [*const i32; N],
        weights: &[[Self::Bytes; 4]; 2],
        x: [*const i32; N],
    ) -> [Self::Ints; N];
    /// Times 256.
    unsafe fn shift_byte(ints: Self::Ints) -> Self::Ints;
    unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    unsafe fn from_ints(ints: Self::Ints) -> Self;
    /// Word `r` of vector `k` is word `k` of the 64 bytes at `rows[r]`.
    unsafe fn transpose(rows: &[*const u8; LANES]) -> [Self::Ints; LANES];
    /// Word `r` has byte `r` of each of four lines of 16 bytes.
    unsafe fn weave(lines: &[*const u8; 4]) -> Self::Ints;
    /// The same of the bytes `2 r`, and of the bytes `2 r + 1`, of lines of 32 bytes.
    unsafe fn weave_pairs(lines: &[*const u8; 4]) -> [Self::Ints; 2];
    /// Copies bytes, past the caches where the target begins and ends with a cache line. [`Lanes::end_of_stream`] must follow.
    #[inline(always)]
    unsafe fn stream(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: both are valid for so many bytes by the trait's contract.
        unsafe {
            if !to.addr().is_multiple_of(64) || !len.is_multiple_of(64) {
                return std::ptr::copy_nonoverlapping(from, to, len);
            }
            let mut at = 0;
            while at < len {
                Self::stream_line(from.add(at), to.add(at));
                at += 64;
            }
        }
    }
    /// A cache line of [`Lanes::stream`]; `to` is aligned to it.
    unsafe fn stream_line(from: *const u8, to: *mut u8);
    /// Makes other threads see what was streamed before what is written now.
    unsafe fn end_of_stream();
    /// Of each word of eight nibbles the first four become the low halves of its bytes, the others the high ones.
    unsafe fn fold_nibbles(words: Self::Ints) -> Self::Ints;
    /// The lowest bytes of all words, then the next ones: 64 bytes.
    unsafe fn split_bytes(words: Self::Ints, to: *mut u8);
    /// Asks for the cache line at `at`, which need not be valid.
    unsafe fn prefetch(at: *const u8);
    /// The same into the second-level cache only.
    unsafe fn prefetch_second(at: *const u8);

    /// e^self to about one unit in the last place, for arguments up to 88; below -87 the result stays at e^-87. That of NaN is NaN.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the caller vouches for the CPU's features; no pointer is used.
        unsafe {
            let x = Self::splat(88.0).min(Self::splat(-87.0).max(self));
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

/// Lanes that add products of any unsigned with signed bytes.
trait Dot: Lanes {
    /// Adds the products of four columns with the signed bytes of a word.
    unsafe fn multiply(sum: Self::Ints, weights: Self::Bytes, x: i32) -> Self::Ints;

    /// Adds those of sixteen columns, with every second word from `x` on.
    #[inline(always)]
    unsafe fn dot(mut sum: Self::Ints, weights: &[Self::Bytes; 4], x: *const i32) -> Self::Ints {
        let mut i = 0;
        while i < 4 {
            // SAFETY: the trait's contract; four words are valid.
            sum = unsafe { Self::multiply(sum, weights[i], x.add(2 * i).read()) };
            i += 1;
        }
        sum
    }
}

/// See [`Lanes::dot_e2m1`].
#[inline(always)]
unsafe fn dot_e2m1<L: Dot, const LIMBS: usize>(
    offset: L::Ints,
    weights: &[L::Bytes; 4],
    x: *const i32,
) -> L::Ints {
    // SAFETY: the same contract. Limbs are chains of their own, so that one does not wait for another.
    unsafe {
        let mut sum = L::dot(offset, weights, x);
        if LIMBS > 1 {
            let mut high = L::dot(L::splat_ints(0), weights, x.add(8));
            if LIMBS > 2 {
                let highest = L::dot(L::splat_ints(0), weights, x.add(16));
                high = L::add_ints(high, L::shift_byte(highest));
            }
            sum = L::add_ints(sum, L::shift_byte(high));
        }
        sum
    }
}

/// See [`Lanes::dot_int8`].
#[inline(always)]
unsafe fn dot_int8<L: Dot, const N: usize>(
    offsets: [*const i32; N],
    weights: &[[L::Bytes; 4]; 2],
    x: [*const i32; N],
) -> [L::Ints; N] {
    // SAFETY: the same contract.
    unsafe {
        let mut sums = [L::splat_ints(0); N];
        let mut n = 0;
        while n < N {
            // Two chains: with one, more tokens would have to be in flight than the CPU keeps track of.
            let first = L::dot(L::splat_ints(offsets[n].read()), &weights[0], x[n]);
            sums[n] = L::add_ints(first, L::dot(sums[n], &weights[1], x[n].add(1)));
            n += 1;
        }
        sums
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

impl Dot for Scalar {
    #[inline(always)]
    unsafe fn multiply(mut sum: Self::Ints, weights: Self::Bytes, x: i32) -> Self::Ints {
        let x = x.to_ne_bytes().map(|x| x as i8);
        for (sum, weights) in sum.iter_mut().zip(weights.as_chunks::<4>().0) {
            let products = weights.iter().zip(x).map(|(&w, x)| i32::from(w) * i32::from(x));
            *sum = sum.wrapping_add(products.sum());
        }
        sum
    }
}

impl Lanes for Scalar {
    type Bytes = [u8; 4 * LANES];
    type Ints = [i32; LANES];

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
    unsafe fn splat_bf16(from: *const u16) -> [Self; 2] {
        // SAFETY: valid for two elements by the trait's contract.
        unsafe {
            let one = |i: usize| f32::from_bits(u32::from(from.add(i).read()) << 16);
            [Self::splat(one(0)), Self::splat(one(1))]
        }
    }
    #[inline(always)]
    unsafe fn store_bf16([even, odd]: [Self; 2], to: *mut u16) {
        let words: [u32; LANES] =
            std::array::from_fn(|l| even.0[l].to_bits() >> 16 | odd.0[l].to_bits() & 0xffff_0000);
        // SAFETY: valid for 64 bytes by the trait's contract.
        unsafe { to.cast::<[u32; LANES]>().write_unaligned(words) };
    }
    #[inline(always)]
    unsafe fn e2m1_at(words: Self::Ints, shift: u32) -> Self {
        Scalar(words.map(|word| E2M1_TWICE[(word as u32 >> shift & 15) as usize]))
    }
    #[inline(always)]
    unsafe fn byte_at(words: Self::Ints, shift: u32) -> Self {
        Scalar(words.map(|word| (word as u32 >> shift & 255) as f32))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> [Self; 2] {
        // SAFETY: valid for 64 bytes by the trait's contract.
        let bits = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        [Scalar(bits.map(|b| f32::from_bits(b << 16))), Scalar(bits.map(|b| f32::from_bits(b & 0xffff_0000)))]
    }
    #[inline(always)]
    unsafe fn widen_e4m3(from: *const u8) -> Self {
        // SAFETY: valid for sixteen bytes by the trait's contract.
        let bytes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        Scalar(bytes.map(numerics::e4m3::decode))
    }
    #[inline(always)]
    unsafe fn widen_bf16(from: *const u16) -> Self {
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
        // As the vector instructions.
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
    unsafe fn e4m3(from: *const u8) -> Self {
        // SAFETY: valid for sixteen bytes by the trait's contract.
        let bytes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        Scalar(bytes.map(|byte| half::f16::from_bits(u16::from(byte) << 7).to_f32() * E4M3_BIAS))
    }
    #[inline(always)]
    unsafe fn e8m0(from: *const u8) -> Self {
        // SAFETY: valid for sixteen bytes by the trait's contract.
        let bytes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        Scalar(bytes.map(|byte| f32::from_bits((u32::from(byte) << 23).max(1 << 22))))
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
        // SAFETY: valid for 64 bytes by the trait's contract.
        unsafe { from.cast::<Self::Bytes>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_e2m1(from: *const u8) -> [Self::Bytes; 2] {
        // SAFETY: valid for 64 bytes by the trait's contract.
        let codes = unsafe { Self::load_bytes(from) };
        [codes.map(|c| E2M1_BYTES[usize::from(c & 15)]), codes.map(|c| E2M1_BYTES[usize::from(c >> 4)])]
    }
    #[inline(always)]
    unsafe fn splat_ints(value: i32) -> Self::Ints {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> Self::Ints {
        // SAFETY: valid for sixteen elements by the trait's contract.
        unsafe { from.cast::<Self::Ints>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_ints(ints: Self::Ints, to: *mut i32) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::Ints>().write_unaligned(ints) }
    }
    #[inline(always)]
    unsafe fn dot_e2m1<const LIMBS: usize>(
        offset: Self::Ints,
        weights: &[Self::Bytes; 4],
        x: *const i32,
    ) -> Self::Ints {
        // SAFETY: the trait's contract.
        unsafe { dot_e2m1::<Self, LIMBS>(offset, weights, x) }
    }
    #[inline(always)]
    unsafe fn dot_int8<const N: usize>(
        offsets: [*const i32; N],
        weights: &[[Self::Bytes; 4]; 2],
        x: [*const i32; N],
    ) -> [Self::Ints; N] {
        // SAFETY: the trait's contract.
        unsafe { dot_int8::<Self, N>(offsets, weights, x) }
    }
    #[inline(always)]
    unsafe fn shift_byte(ints: Self::Ints) -> Self::Ints {
        ints.map(|i| i << 8)
    }
    #[inline(always)]
    unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        std::array::from_fn(|l| a[l].wrapping_add(b[l]))
    }
    #[inline(always)]
    unsafe fn from_ints(ints: Self::Ints) -> Self {
        Scalar(ints.map(|i| i as f32))
    }
    #[inline(always)]
    unsafe fn transpose(rows: &[*const u8; LANES]) -> [Self::Ints; LANES] {
        // SAFETY: valid for 64 bytes by the trait's contract.
        let rows = rows.map(|row| unsafe { row.cast::<Self::Ints>().read_unaligned() });
        std::array::from_fn(|k| std::array::from_fn(|r| rows[r][k]))
    }
    #[inline(always)]
    unsafe fn stream_line(from: *const u8, to: *mut u8) {
        // SAFETY: both are valid for a line by the trait's contract.
        unsafe { std::ptr::copy_nonoverlapping(from, to, 64) }
    }
    #[inline(always)]
    unsafe fn end_of_stream() {}
    #[inline(always)]
    unsafe fn weave(lines: &[*const u8; 4]) -> Self::Ints {
        // SAFETY: valid for 16 bytes by the trait's contract.
        let lines = lines.map(|line| unsafe { line.cast::<[u8; LANES]>().read_unaligned() });
        std::array::from_fn(|r| i32::from_le_bytes(lines.map(|line| line[r])))
    }
    #[inline(always)]
    unsafe fn weave_pairs(lines: &[*const u8; 4]) -> [Self::Ints; 2] {
        // SAFETY: valid for 32 bytes by the trait's contract.
        let lines = lines.map(|line| unsafe { line.cast::<[[u8; 2]; LANES]>().read_unaligned() });
        std::array::from_fn(|half| {
            std::array::from_fn(|r| i32::from_le_bytes(lines.map(|line| line[r][half])))
        })
    }
    #[inline(always)]
    unsafe fn fold_nibbles(words: Self::Ints) -> Self::Ints {
        // Moves the four nibbles of 16 bits to the low halves of four bytes.
        let spread = |x: u32| {
            let x = (x | x << 8) & 0x00ff_00ff;
            (x | x << 4) & 0x0f0f_0f0f
        };
        words.map(|w| (spread(w as u32 & 0xffff) | spread(w as u32 >> 16) << 4) as i32)
    }
    #[inline(always)]
    unsafe fn split_bytes(words: Self::Ints, to: *mut u8) {
        let bytes: [[u8; LANES]; 4] =
            std::array::from_fn(|b| std::array::from_fn(|l| words[l].to_le_bytes()[b]));
        // SAFETY: valid for 64 bytes by the trait's contract.
        unsafe { to.cast::<[[u8; LANES]; 4]>().write_unaligned(bytes) }
    }
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
    #[inline(always)]
    unsafe fn prefetch_second(_at: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, Avx512Vnni, AvxVnni, Ymm, Zmm, less_128};

#[cfg(target_arch = "x86_64")]
mod x86 {
    // Every `unsafe` block below calls intrinsics of the features that the trait's contract demands, on pointers that it
    // declares valid.
    use std::arch::x86_64::*;

    use super::{LANES, Lanes};

    /// Sixteen lanes in one register, with or without VBMI.
    #[derive(Clone, Copy)]
    pub(crate) struct Zmm<const VBMI: bool>(__m512);

    pub(crate) type Avx512 = Zmm<true>;
    pub(crate) type Avx512Vnni = Zmm<false>;

    impl<const VBMI: bool> super::Dot for Zmm<VBMI> {
        #[inline(always)]
        unsafe fn multiply(sum: Self::Ints, weights: Self::Bytes, x: i32) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(x)) }
        }
    }

    impl<const VBMI: bool> Lanes for Zmm<VBMI> {
        type Bytes = __m512i;
        type Ints = __m512i;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the trait's contract.
            Zmm(unsafe { _mm512_set1_ps(value) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the trait's contract.
            Zmm(unsafe { _mm512_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn splat_bf16(from: *const u16) -> [Self; 2] {
            // SAFETY: the trait's contract.
            unsafe {
                let pairs = _mm512_set1_epi32(from.cast::<i32>().read_unaligned());
                let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                let even = _mm512_slli_epi32::<16>(pairs);
                [Zmm(_mm512_castsi512_ps(even)), Zmm(_mm512_castsi512_ps(odd))]
            }
        }
        #[inline(always)]
        unsafe fn store_bf16([even, odd]: [Self; 2], to: *mut u16) {
            // SAFETY: the trait's contract.
            unsafe {
                let even = _mm512_srli_epi32::<16>(_mm512_castps_si512(even.0));
                let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                // The first, or both of the others.
                let words = _mm512_ternarylogic_epi32::<0xf8>(even, _mm512_castps_si512(odd.0), upper);
                _mm512_storeu_si512(to.cast(), words);
            }
        }
        #[inline(always)]
        unsafe fn e2m1_at(words: Self::Ints, shift: u32) -> Self {
            // SAFETY: the trait's contract. A choice looks at four bits of a word.
            unsafe {
                let codes = _mm512_srlv_epi32(words, _mm512_set1_epi32(shift as i32));
                Zmm(_mm512_permutexvar_ps(codes, _mm512_loadu_ps(super::E2M1_TWICE.as_ptr())))
            }
        }
        #[inline(always)]
        unsafe fn byte_at(words: Self::Ints, shift: u32) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let bytes = _mm512_srlv_epi32(words, _mm512_set1_epi32(shift as i32));
                Zmm(_mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(255))))
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> [Self; 2] {
            // SAFETY: the trait's contract.
            unsafe {
                let pairs = _mm512_loadu_si512(from.cast());
                let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                [Zmm(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))), Zmm(_mm512_castsi512_ps(odd))]
            }
        }
        #[inline(always)]
        unsafe fn widen_e4m3(from: *const u8) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let wide = _mm512_cvtph_ps(e4m3_bits(from));
                Zmm(_mm512_mul_ps(wide, _mm512_set1_ps(super::E4M3_BIAS)))
            }
        }
        #[inline(always)]
        unsafe fn widen_bf16(from: *const u16) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Zmm(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
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
            Zmm(unsafe { _mm512_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Zmm(unsafe { _mm512_sub_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Zmm(unsafe { _mm512_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn div(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Zmm(unsafe { _mm512_div_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Zmm(unsafe { _mm512_min_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Zmm(unsafe { _mm512_max_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: the trait's contract.
            Zmm(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        unsafe fn exp2_of_rounded(self) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let bits = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
                Zmm(_mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(127 << 23))))
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
        unsafe fn largest(self) -> f32 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_reduce_max_ps(self.0) }
        }
        #[inline(always)]
        unsafe fn first(self) -> f32 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_cvtss_f32(self.0) }
        }
        #[inline(always)]
        unsafe fn e4m3(from: *const u8) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let bits = _mm256_slli_epi16::<7>(_mm256_cvtepu8_epi16(_mm_loadu_si128(from.cast())));
                Zmm(_mm512_mul_ps(_mm512_cvtph_ps(bits), _mm512_set1_ps(super::E4M3_BIAS)))
            }
        }
        #[inline(always)]
        unsafe fn e8m0(from: *const u8) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let bits = _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())));
                Zmm(_mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(1 << 22))))
            }
        }
        #[inline(always)]
        unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
            // SAFETY: the trait's contract.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn load_e2m1(from: *const u8) -> [Self::Bytes; 2] {
            // SAFETY: the trait's contract.
            unsafe { e2m1::<VBMI>(_mm512_loadu_si512(from.cast())) }
        }
        #[inline(always)]
        unsafe fn splat_ints(value: i32) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { _mm512_set1_epi32(value) }
        }
        #[inline(always)]
        unsafe fn load_ints(from: *const i32) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn store_ints(ints: Self::Ints, to: *mut i32) {
            // SAFETY: the trait's contract.
            unsafe { _mm512_storeu_si512(to.cast(), ints) }
        }
        #[inline(always)]
        unsafe fn dot_e2m1<const LIMBS: usize>(
            offset: Self::Ints,
            weights: &[Self::Bytes; 4],
            x: *const i32,
        ) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { super::dot_e2m1::<Self, LIMBS>(offset, weights, x) }
        }
        #[inline(always)]
        unsafe fn dot_int8<const N: usize>(
            offsets: [*const i32; N],
            weights: &[[Self::Bytes; 4]; 2],
            x: [*const i32; N],
        ) -> [Self::Ints; N] {
            // SAFETY: the trait's contract.
            unsafe { super::dot_int8::<Self, N>(offsets, weights, x) }
        }
        #[inline(always)]
        unsafe fn shift_byte(ints: Self::Ints) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { _mm512_slli_epi32::<8>(ints) }
        }
        #[inline(always)]
        unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { _mm512_add_epi32(a, b) }
        }
        #[inline(always)]
        unsafe fn from_ints(ints: Self::Ints) -> Self {
            // SAFETY: the trait's contract.
            Zmm(unsafe { _mm512_cvtepi32_ps(ints) })
        }
        #[inline(always)]
        unsafe fn transpose(rows: &[*const u8; LANES]) -> [Self::Ints; LANES] {
            // SAFETY: the trait's contract. Words of four rows are brought together, then quarters of registers.
            unsafe {
                let mut quads = [_mm512_setzero_si512(); LANES];
                let mut i = 0;
                while i < LANES {
                    let row = |r: usize| _mm512_loadu_si512(rows[i + r].cast());
                    let (low, low2) =
                        (_mm512_unpacklo_epi32(row(0), row(1)), _mm512_unpacklo_epi32(row(2), row(3)));
                    let (high, high2) =
                        (_mm512_unpackhi_epi32(row(0), row(1)), _mm512_unpackhi_epi32(row(2), row(3)));
                    // Quarter `q` of `quads[i + w]` has word `4 q + w` of rows `i ..`.
                    quads[i] = _mm512_unpacklo_epi64(low, low2);
                    quads[i + 1] = _mm512_unpackhi_epi64(low, low2);
                    quads[i + 2] = _mm512_unpacklo_epi64(high, high2);
                    quads[i + 3] = _mm512_unpackhi_epi64(high, high2);
                    i += 4;
                }
                let mut out = [_mm512_setzero_si512(); LANES];
                let mut w = 0;
                while w < 4 {
                    let (a, b, c, d) = (quads[w], quads[4 + w], quads[8 + w], quads[12 + w]);
                    let (ab, cd) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0x44>(c, d));
                    let (ab2, cd2) = (_mm512_shuffle_i32x4::<0xee>(a, b), _mm512_shuffle_i32x4::<0xee>(c, d));
                    out[w] = _mm512_shuffle_i32x4::<0x88>(ab, cd);
                    out[4 + w] = _mm512_shuffle_i32x4::<0xdd>(ab, cd);
                    out[8 + w] = _mm512_shuffle_i32x4::<0x88>(ab2, cd2);
                    out[12 + w] = _mm512_shuffle_i32x4::<0xdd>(ab2, cd2);
                    w += 1;
                }
                out
            }
        }
        #[inline(always)]
        unsafe fn stream_line(from: *const u8, to: *mut u8) {
            // SAFETY: the trait's contract; the store is aligned.
            unsafe { _mm512_stream_si512(to.cast(), _mm512_loadu_si512(from.cast())) }
        }
        #[inline(always)]
        unsafe fn end_of_stream() {
            // SAFETY: every x86-64 has it.
            unsafe { _mm_sfence() }
        }
        #[inline(always)]
        unsafe fn weave(lines: &[*const u8; 4]) -> Self::Ints {
            // SAFETY: the trait's contract. Byte `b` of word `r` is byte `16 b + r` of the four lines.
            unsafe {
                if !VBMI {
                    return join(Avx2::weave(lines));
                }
                let line = |b: usize| _mm_loadu_si128(lines[b].cast());
                let bytes = _mm512_castsi128_si512(line(0));
                let bytes = _mm512_inserti32x4::<1>(bytes, line(1));
                let bytes = _mm512_inserti32x4::<2>(bytes, line(2));
                let bytes = _mm512_inserti32x4::<3>(bytes, line(3));
                let words = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                let places = _mm512_mullo_epi32(words, _mm512_set1_epi32(0x0101_0101));
                _mm512_permutexvar_epi8(_mm512_add_epi8(places, _mm512_set1_epi32(0x3020_1000)), bytes)
            }
        }
        #[inline(always)]
        unsafe fn weave_pairs(lines: &[*const u8; 4]) -> [Self::Ints; 2] {
            // SAFETY: the trait's contract. Byte `b` of word `r` is byte `32 b + 2 r` of the four lines, or the one behind.
            unsafe {
                if !VBMI {
                    let [even, odd] = Avx2::weave_pairs(lines);
                    return [join(even), join(odd)];
                }
                let line = |b: usize| _mm256_loadu_si256(lines[b].cast());
                let low = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(line(0)), line(1));
                let high = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(line(2)), line(3));
                let words = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                let places = _mm512_mullo_epi32(words, _mm512_set1_epi32(0x0101_0101));
                let even = _mm512_add_epi8(places, _mm512_set1_epi32(0x6040_2000));
                let odd = _mm512_add_epi8(even, _mm512_set1_epi8(1));
                [_mm512_permutex2var_epi8(low, even, high), _mm512_permutex2var_epi8(low, odd, high)]
            }
        }
        #[inline(always)]
        unsafe fn fold_nibbles(words: Self::Ints) -> Self::Ints {
            // SAFETY: the trait's contract. Each byte is eight bits from a place of its own in its 64.
            unsafe {
                if !VBMI {
                    let halves = (_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64::<1>(words));
                    return join(Avx2::fold_nibbles(halves));
                }
                let low = _mm512_set1_epi64(0x2c28_2420_0c08_0400);
                let high = _mm512_set1_epi64(0x3834_302c_1814_100c);
                let low = _mm512_multishift_epi64_epi8(low, words);
                let high = _mm512_multishift_epi64_epi8(high, words);
                // Where the mask has ones the first, otherwise the second.
                _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(0x0f), low, high)
            }
        }
        #[inline(always)]
        unsafe fn split_bytes(words: Self::Ints, to: *mut u8) {
            // SAFETY: the trait's contract.
            unsafe {
                let mut b = 0;
                let mut rest = words;
                while b < 4 {
                    _mm_storeu_si128(to.add(16 * b).cast(), _mm512_cvtepi32_epi8(rest));
                    rest = _mm512_srli_epi32::<8>(rest);
                    b += 1;
                }
            }
        }
        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            // SAFETY: the trait's contract. A prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
        #[inline(always)]
        unsafe fn prefetch_second(at: *const u8) {
            // SAFETY: the trait's contract. A prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }
    }

    /// Products of E2M1 codes with activations of one limb, whose sums have room for scales as integers.
    impl<const VBMI: bool> Zmm<VBMI> {
        /// Weights of four columns of each half, in turn, of each four rows two in each register, for [`Zmm::dot_halves`]:
        /// `codes` are those of a slab.
        ///
        /// # Safety
        /// As for [`Lanes`]; 256 bytes are valid.
        #[inline(always)]
        pub(crate) unsafe fn load_e2m1_halves(codes: *const u8) -> [[__m512i; 2]; 4] {
            // SAFETY: the contract.
            unsafe {
                let mut weights = [[_mm512_setzero_si512(); 2]; 4];
                for k in 0..2 {
                    let first = _mm512_loadu_si512(codes.add(64 * k).cast());
                    let second = _mm512_loadu_si512(codes.add(128 + 64 * k).cast());
                    let a = e2m1::<VBMI>(_mm512_unpacklo_epi32(first, second));
                    let b = e2m1::<VBMI>(_mm512_unpackhi_epi32(first, second));
                    (weights[2 * k], weights[2 * k + 1]) = ([a[0], b[0]], [a[1], b[1]]);
                }
                weights
            }
        }

        /// For each row the sums of both halves, in 16 bits. `weights` are those of [`Zmm::load_e2m1_halves`];
        /// `x` has the words of the halves in turn, `offsets` what the sums begin with.
        ///
        /// # Safety
        /// As for [`Lanes`]; eight words are valid from `x` on, two from `offsets` on.
        #[inline(always)]
        pub(crate) unsafe fn dot_halves(
            offsets: *const i32,
            weights: &[[__m512i; 2]; 4],
            x: *const i32,
        ) -> __m512i {
            // SAFETY: the contract.
            unsafe {
                let pair = |words: *const i32| _mm512_set1_epi64(words.cast::<i64>().read_unaligned());
                let mut sums = [pair(offsets); 2];
                for (j, weights) in weights.iter().enumerate() {
                    let x = pair(x.add(2 * j));
                    sums[0] = _mm512_dpbusd_epi32(sums[0], weights[0], x);
                    sums[1] = _mm512_dpbusd_epi32(sums[1], weights[1], x);
                }
                _mm512_packs_epi32(sums[0], sums[1])
            }
        }

        /// The sums of [`Zmm::dot_halves`], each times its factor.
        ///
        /// # Safety
        /// As for [`Lanes`].
        #[inline(always)]
        pub(crate) unsafe fn join_halves(sums: __m512i, factors: __m512i) -> __m512i {
            // SAFETY: the contract.
            unsafe { _mm512_madd_epi16(sums, factors) }
        }

        /// The E4M3 scales of the halves of a slab in units of 2^-6, for [`Zmm::join_halves`]. `None` if one of them is not
        /// whole units, which only those below an eighth can be.
        ///
        /// # Safety
        /// As for [`Lanes`]; 32 bytes are valid.
        #[inline(always)]
        pub(crate) unsafe fn whole_scales(scales: *const u8) -> Option<__m512i> {
            // SAFETY: the contract. A byte is eight times the exponent plus the fraction; the subnormal ones are those of exponent
            // one without its eight. A unit is a mantissa of one at exponent four.
            unsafe {
                let (one, four) = (_mm512_set1_epi16(1), _mm512_set1_epi16(4));
                let bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(scales.cast()));
                let exponent = _mm512_max_epi16(_mm512_srli_epi16::<3>(bytes), one);
                let eights = _mm512_slli_epi16::<3>(_mm512_sub_epi16(exponent, one));
                let mantissa = _mm512_sub_epi16(bytes, eights);
                let down = _mm512_subs_epu16(four, exponent);
                let whole = _mm512_srlv_epi16(mantissa, down);
                if _mm512_cmpneq_epi16_mask(_mm512_sllv_epi16(whole, down), mantissa) != 0 {
                    return None;
                }
                let whole = _mm512_sllv_epi16(whole, _mm512_subs_epu16(exponent, four));
                // Those of both halves of a row side by side.
                let rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                let places = _mm512_mullo_epi32(rows, _mm512_set1_epi32(0x1_0001));
                let places = _mm512_add_epi16(places, _mm512_set1_epi32(0x10_0000));
                Some(_mm512_permutexvar_epi16(places, whole))
            }
        }

        /// How far E8M0 scales shift a sum of 32 columns. `None` if one of them is a fraction, or shifts it beyond 31 bits.
        ///
        /// # Safety
        /// As for [`Lanes`]; sixteen bytes are valid.
        #[inline(always)]
        pub(crate) unsafe fn shifts(scales: *const u8) -> Option<__m512i> {
            // SAFETY: the contract.
            unsafe {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(scales.cast()));
                let shifts = _mm512_sub_epi32(bytes, _mm512_set1_epi32(127));
                let wrong = _mm512_cmpgt_epu32_mask(shifts, _mm512_set1_epi32(super::MOST_SHIFT as i32));
                (wrong == 0).then_some(shifts)
            }
        }

        /// Each shifted to the left by as much as its lane says.
        ///
        /// # Safety
        /// As for [`Lanes`].
        #[inline(always)]
        pub(crate) unsafe fn shift(ints: __m512i, by: __m512i) -> __m512i {
            // SAFETY: the contract.
            unsafe { _mm512_sllv_epi32(ints, by) }
        }
    }

    /// Two halves as one.
    #[inline(always)]
    unsafe fn join((low, high): (__m256i, __m256i)) -> __m512i {
        // SAFETY: only called from the implementations above, whose contract includes AVX-512.
        unsafe { _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high) }
    }

    /// Codes, two per byte, as [`super::E2M1_BYTES`]: those of the low halves, then those of the high ones.
    #[inline(always)]
    unsafe fn e2m1<const VBMI: bool>(codes: __m512i) -> [__m512i; 2] {
        // SAFETY: only called from the implementations above, whose contract includes AVX-512, and VBMI if it is said.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(super::E2M1_BYTES.as_ptr().cast()));
            let high = _mm512_srli_epi16::<4>(codes);
            if VBMI {
                // The permutation looks at the low six bits of a byte and the table repeats every sixteen, so what is above a code need
                // not be cleared.
                return [_mm512_permutexvar_epi8(codes, table), _mm512_permutexvar_epi8(high, table)];
            }
            let code = _mm512_set1_epi8(15);
            let look_up = |codes| _mm512_shuffle_epi8(table, _mm512_and_si512(codes, code));
            [look_up(codes), look_up(high)]
        }
    }

    /// Sixteen lanes in two registers, with or without AVX-VNNI.
    #[derive(Clone, Copy)]
    pub(crate) struct Ymm<const VNNI: bool>(__m256, __m256);

    pub(crate) type Avx2 = Ymm<false>;
    pub(crate) type AvxVnni = Ymm<true>;

    impl<const VNNI: bool> super::Dot for Ymm<VNNI> {
        #[inline(always)]
        unsafe fn multiply(sum: Self::Ints, weights: Self::Bytes, x: i32) -> Self::Ints {
            // SAFETY: the trait's contract; only called where there is AVX-VNNI.
            unsafe {
                let x = _mm256_set1_epi32(x);
                (_mm256_dpbusd_avx_epi32(sum.0, weights.0, x), _mm256_dpbusd_avx_epi32(sum.1, weights.1, x))
            }
        }
    }

    impl<const VNNI: bool> Lanes for Ymm<VNNI> {
        type Bytes = (__m256i, __m256i);
        type Ints = (__m256i, __m256i);

        const FEW_REGISTERS: bool = true;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn splat_bf16(from: *const u16) -> [Self; 2] {
            // SAFETY: the trait's contract.
            unsafe {
                let pairs = _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
                let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
                let (even, odd) =
                    (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(odd));
                [Ymm(even, even), Ymm(odd, odd)]
            }
        }
        #[inline(always)]
        unsafe fn store_bf16([even, odd]: [Self; 2], to: *mut u16) {
            // SAFETY: the trait's contract.
            unsafe {
                let half = |even: __m256, odd: __m256| {
                    let even = _mm256_srli_epi32::<16>(_mm256_castps_si256(even));
                    _mm256_blend_epi16::<0xaa>(even, _mm256_castps_si256(odd))
                };
                _mm256_storeu_si256(to.cast(), half(even.0, odd.0));
                _mm256_storeu_si256(to.cast::<__m256i>().add(1), half(even.1, odd.1));
            }
        }
        #[inline(always)]
        unsafe fn e2m1_at(words: Self::Ints, shift: u32) -> Self {
            // SAFETY: the trait's contract. A choice looks at three bits of a word; the fourth is the sign.
            unsafe {
                let magnitudes = _mm256_loadu_ps(super::E2M1_TWICE.as_ptr());
                let half = |words: __m256i| {
                    let codes = _mm256_srlv_epi32(words, _mm256_set1_epi32(shift as i32));
                    let sign = _mm256_and_si256(_mm256_slli_epi32::<28>(codes), _mm256_set1_epi32(i32::MIN));
                    _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, codes), _mm256_castsi256_ps(sign))
                };
                Ymm(half(words.0), half(words.1))
            }
        }
        #[inline(always)]
        unsafe fn byte_at(words: Self::Ints, shift: u32) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let half = |words: __m256i| {
                    let bytes = _mm256_srlv_epi32(words, _mm256_set1_epi32(shift as i32));
                    _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(255)))
                };
                Ymm(half(words.0), half(words.1))
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> [Self; 2] {
            // SAFETY: the trait's contract.
            unsafe {
                let (a, b) = Self::load_bytes(from.cast());
                let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                let even = (_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b));
                let odd = (_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
                [
                    Ymm(_mm256_castsi256_ps(even.0), _mm256_castsi256_ps(even.1)),
                    Ymm(_mm256_castsi256_ps(odd.0), _mm256_castsi256_ps(odd.1)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn widen_e4m3(from: *const u8) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let bits = e4m3_bits(from);
                let bias = _mm256_set1_ps(super::E4M3_BIAS);
                Ymm(
                    _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), bias),
                    _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256::<1>(bits)), bias),
                )
            }
        }
        #[inline(always)]
        unsafe fn widen_bf16(from: *const u16) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let (a, b) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
                let bits = (_mm256_cvtepu16_epi32(a), _mm256_cvtepu16_epi32(b));
                Ymm(
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits.0)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits.1)),
                )
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
            unsafe { Ymm(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn div(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
        }
        #[inline(always)]
        unsafe fn exp2_of_rounded(self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(exp2_8(self.0), exp2_8(self.1)) }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: the trait's contract.
            unsafe { sum8(_mm256_add_ps(self.0, self.1)) }
        }
        #[inline(always)]
        unsafe fn e4m3(from: *const u8) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(e4m3_8(from), e4m3_8(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn e8m0(from: *const u8) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(e8m0_8(from), e8m0_8(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
            // SAFETY: the trait's contract.
            unsafe { (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())) }
        }
        #[inline(always)]
        unsafe fn load_e2m1(from: *const u8) -> [Self::Bytes; 2] {
            // SAFETY: the trait's contract.
            unsafe {
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(super::E2M1_BYTES.as_ptr().cast()));
                let (a, b) = Self::load_bytes(from);
                let high = (_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b));
                [(look_up(table, a), look_up(table, b)), (look_up(table, high.0), look_up(table, high.1))]
            }
        }
        #[inline(always)]
        unsafe fn splat_ints(value: i32) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { (_mm256_set1_epi32(value), _mm256_set1_epi32(value)) }
        }
        #[inline(always)]
        unsafe fn load_ints(from: *const i32) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { Self::load_bytes(from.cast()) }
        }
        #[inline(always)]
        unsafe fn store_ints(ints: Self::Ints, to: *mut i32) {
            // SAFETY: the trait's contract.
            unsafe {
                _mm256_storeu_si256(to.cast(), ints.0);
                _mm256_storeu_si256(to.add(8).cast(), ints.1);
            }
        }
        #[inline(always)]
        unsafe fn dot_e2m1<const LIMBS: usize>(
            offset: Self::Ints,
            weights: &[Self::Bytes; 4],
            x: *const i32,
        ) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe {
                if VNNI {
                    return super::dot_e2m1::<Self, LIMBS>(offset, weights, x);
                }
                let one = _mm256_set1_epi16(1);
                let byte = _mm256_set1_epi16(256);
                let (a, b) = pairs(weights, x);
                let mut sum = (
                    _mm256_add_epi32(offset.0, _mm256_madd_epi16(a, one)),
                    _mm256_add_epi32(offset.1, _mm256_madd_epi16(b, one)),
                );
                if LIMBS == 2 {
                    let (a, b) = pairs(weights, x.add(8));
                    sum.0 = _mm256_add_epi32(sum.0, _mm256_madd_epi16(a, byte));
                    sum.1 = _mm256_add_epi32(sum.1, _mm256_madd_epi16(b, byte));
                }
                if LIMBS == 3 {
                    let ((a, b), (c, d)) = (pairs(weights, x.add(8)), pairs(weights, x.add(16)));
                    let high = Self::shift_byte((
                        _mm256_add_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(c, byte)),
                        _mm256_add_epi32(_mm256_madd_epi16(b, one), _mm256_madd_epi16(d, byte)),
                    ));
                    sum = Self::add_ints(sum, high);
                }
                sum
            }
        }
        #[inline(always)]
        unsafe fn dot_int8<const N: usize>(
            offsets: [*const i32; N],
            weights: &[[Self::Bytes; 4]; 2],
            x: [*const i32; N],
        ) -> [Self::Ints; N] {
            // SAFETY: the trait's contract.
            unsafe {
                let mut sums = [(_mm256_setzero_si256(), _mm256_setzero_si256()); N];
                let mut n = 0;
                while VNNI && n < N {
                    sums[n] = Self::splat_ints(offsets[n].read());
                    n += 1;
                }
                let mut i = 0;
                while i < 8 {
                    let weights = weights[i / 4][i % 4];
                    let (a, b) = (less_128(weights.0), less_128(weights.1));
                    let mut n = 0;
                    while n < N {
                        let word = x[n].add(i % 4 * 2 + i / 4).read();
                        sums[n] = if VNNI {
                            <Self as super::Dot>::multiply(sums[n], weights, word)
                        } else {
                            let x = _mm256_set1_epi32(word);
                            (multiply_signed(sums[n].0, a, x), multiply_signed(sums[n].1, b, x))
                        };
                        n += 1;
                    }
                    i += 1;
                }
                sums
            }
        }
        #[inline(always)]
        unsafe fn shift_byte(ints: Self::Ints) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { (_mm256_slli_epi32::<8>(ints.0), _mm256_slli_epi32::<8>(ints.1)) }
        }
        #[inline(always)]
        unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { (_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn from_ints(ints: Self::Ints) -> Self {
            // SAFETY: the trait's contract.
            unsafe { Ymm(_mm256_cvtepi32_ps(ints.0), _mm256_cvtepi32_ps(ints.1)) }
        }
        #[inline(always)]
        unsafe fn transpose(rows: &[*const u8; LANES]) -> [Self::Ints; LANES] {
            // SAFETY: the trait's contract.
            unsafe {
                let mut out = [(_mm256_setzero_si256(), _mm256_setzero_si256()); LANES];
                let mut half = 0;
                while half < 2 {
                    let low = transpose_8(rows[..8].as_ptr(), 32 * half);
                    let high = transpose_8(rows[8..].as_ptr(), 32 * half);
                    let mut k = 0;
                    while k < 8 {
                        out[8 * half + k] = (low[k], high[k]);
                        k += 1;
                    }
                    half += 1;
                }
                out
            }
        }
        #[inline(always)]
        unsafe fn stream_line(from: *const u8, to: *mut u8) {
            // SAFETY: the trait's contract; the stores are aligned.
            unsafe {
                _mm256_stream_si256(to.cast(), _mm256_loadu_si256(from.cast()));
                _mm256_stream_si256(to.add(32).cast(), _mm256_loadu_si256(from.add(32).cast()));
            }
        }
        #[inline(always)]
        unsafe fn end_of_stream() {
            // SAFETY: every x86-64 has it.
            unsafe { _mm_sfence() }
        }
        #[inline(always)]
        unsafe fn weave(lines: &[*const u8; 4]) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe {
                let line = |b: usize| _mm_loadu_si128(lines[b].cast());
                weave_16([line(0), line(1), line(2), line(3)])
            }
        }
        #[inline(always)]
        unsafe fn weave_pairs(lines: &[*const u8; 4]) -> [Self::Ints; 2] {
            // SAFETY: the trait's contract.
            unsafe {
                let mask = _mm_set1_epi16(0xff);
                let (mut even, mut odd) = ([_mm_setzero_si128(); 4], [_mm_setzero_si128(); 4]);
                let mut b = 0;
                while b < 4 {
                    let low = _mm_loadu_si128(lines[b].cast());
                    let high = _mm_loadu_si128(lines[b].add(LANES).cast());
                    even[b] = _mm_packus_epi16(_mm_and_si128(low, mask), _mm_and_si128(high, mask));
                    odd[b] = _mm_packus_epi16(_mm_srli_epi16::<8>(low), _mm_srli_epi16::<8>(high));
                    b += 1;
                }
                [weave_16(even), weave_16(odd)]
            }
        }
        #[inline(always)]
        unsafe fn fold_nibbles(words: Self::Ints) -> Self::Ints {
            // SAFETY: the trait's contract.
            unsafe { (fold_nibbles_8(words.0), fold_nibbles_8(words.1)) }
        }
        #[inline(always)]
        unsafe fn split_bytes(words: Self::Ints, to: *mut u8) {
            // SAFETY: the trait's contract.
            unsafe {
                let bytes = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
                let bytes = _mm256_broadcastsi128_si256(bytes);
                let (a, b) = (_mm256_shuffle_epi8(words.0, bytes), _mm256_shuffle_epi8(words.1, bytes));
                let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                let (a, b) = (_mm256_permutevar8x32_epi32(a, order), _mm256_permutevar8x32_epi32(b, order));
                // Each 64 bits are eight rows of one kind.
                let (even, odd) = (_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
                _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(even));
                _mm_storeu_si128(to.add(16).cast(), _mm256_castsi256_si128(odd));
                _mm_storeu_si128(to.add(32).cast(), _mm256_extracti128_si256::<1>(even));
                _mm_storeu_si128(to.add(48).cast(), _mm256_extracti128_si256::<1>(odd));
            }
        }
        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            // SAFETY: the trait's contract. A prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
        #[inline(always)]
        unsafe fn prefetch_second(at: *const u8) {
            // SAFETY: the trait's contract. A prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }
    }

    /// Word `r` of vector `k` is word `k` of the 32 bytes behind `at` at `rows[r]`.
    #[inline(always)]
    unsafe fn transpose_8(rows: *const *const u8, at: usize) -> [__m256i; 8] {
        // SAFETY: only called from the implementation above, whose contract includes AVX2 and eight valid rows.
        unsafe {
            let row = |r: usize| _mm256_loadu_si256((*rows.add(r)).add(at).cast());
            let mut quads = [_mm256_setzero_si256(); 8];
            let mut i = 0;
            while i < 8 {
                let (a, b, c, d) = (row(i), row(i + 1), row(i + 2), row(i + 3));
                let (low, low2) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
                let (high, high2) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
                quads[i] = _mm256_unpacklo_epi64(low, low2);
                quads[i + 1] = _mm256_unpackhi_epi64(low, low2);
                quads[i + 2] = _mm256_unpacklo_epi64(high, high2);
                quads[i + 3] = _mm256_unpackhi_epi64(high, high2);
                i += 4;
            }
            let mut out = [_mm256_setzero_si256(); 8];
            let mut w = 0;
            while w < 4 {
                out[w] = _mm256_permute2x128_si256::<0x20>(quads[w], quads[4 + w]);
                out[4 + w] = _mm256_permute2x128_si256::<0x31>(quads[w], quads[4 + w]);
                w += 1;
            }
            out
        }
    }

    /// Word `r` has byte `r` of each line.
    #[inline(always)]
    unsafe fn weave_16(lines: [__m128i; 4]) -> (__m256i, __m256i) {
        // SAFETY: only called from the implementation above, whose contract includes AVX2.
        unsafe {
            let [a, b, c, d] = lines;
            let (low, low2) = (_mm_unpacklo_epi8(a, b), _mm_unpacklo_epi8(c, d));
            let (high, high2) = (_mm_unpackhi_epi8(a, b), _mm_unpackhi_epi8(c, d));
            (
                _mm256_set_m128i(_mm_unpackhi_epi16(low, low2), _mm_unpacklo_epi16(low, low2)),
                _mm256_set_m128i(_mm_unpackhi_epi16(high, high2), _mm_unpacklo_epi16(high, high2)),
            )
        }
    }

    #[inline(always)]
    unsafe fn fold_nibbles_8(words: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let (even, odd) =
                (_mm256_and_si256(words, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(words), mask));
            // Nibbles 0 and 4, 2 and 6 in the low two bytes, 1 and 5, 3 and 7 likewise; they alternate in the result.
            let even = _mm256_or_si256(even, _mm256_srli_epi32::<12>(even));
            let odd = _mm256_or_si256(odd, _mm256_srli_epi32::<12>(odd));
            let both = _mm256_blend_epi16::<0xaa>(even, _mm256_slli_epi32::<16>(odd));
            let order = _mm_set_epi8(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
            _mm256_shuffle_epi8(both, _mm256_broadcastsi128_si256(order))
        }
    }

    /// 2^n for `n + ROUND`.
    #[inline(always)]
    unsafe fn exp2_8(v: __m256) -> __m256 {
        // SAFETY: only called from the implementations above, whose contract includes AVX2.
        unsafe {
            let bits = _mm256_slli_epi32::<23>(_mm256_castps_si256(v));
            _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(127 << 23)))
        }
    }

    /// Sums of eight products in 16 bits: pairs are at most 24 · 128 · 2, and four of them fit.
    #[inline(always)]
    unsafe fn pairs(weights: &[(__m256i, __m256i); 4], x: *const i32) -> (__m256i, __m256i) {
        // SAFETY: as above, and every second of eight words is valid.
        unsafe {
            let first = _mm256_set1_epi32(x.read());
            let mut pairs =
                (_mm256_maddubs_epi16(weights[0].0, first), _mm256_maddubs_epi16(weights[0].1, first));
            let mut i = 1;
            while i < 4 {
                let x = _mm256_set1_epi32(x.add(2 * i).read());
                pairs.0 = _mm256_add_epi16(pairs.0, _mm256_maddubs_epi16(weights[i].0, x));
                pairs.1 = _mm256_add_epi16(pairs.1, _mm256_maddubs_epi16(weights[i].1, x));
                i += 1;
            }
            pairs
        }
    }

    /// Sixteen E4M3 bytes with their signs as the bits of FP16 numbers, each divided by `E4M3_BIAS`; NaN stays NaN.
    #[inline(always)]
    unsafe fn e4m3_bits(from: *const u8) -> __m256i {
        // SAFETY: as above, and sixteen bytes are valid.
        unsafe {
            let bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast()));
            let magnitudes = _mm256_set1_epi16(0x7f);
            let nan = _mm256_cmpeq_epi16(_mm256_and_si256(bytes, magnitudes), magnitudes);
            let bits = _mm256_and_si256(_mm256_slli_epi16::<7>(bytes), _mm256_set1_epi16(!0x4000));
            _mm256_or_si256(bits, nan)
        }
    }

    #[inline(always)]
    unsafe fn e4m3_8(from: *const u8) -> __m256 {
        // SAFETY: as above, and eight bytes are valid.
        unsafe {
            let bits = _mm_slli_epi16::<7>(_mm_cvtepu8_epi16(_mm_loadl_epi64(from.cast())));
            _mm256_mul_ps(_mm256_cvtph_ps(bits), _mm256_set1_ps(super::E4M3_BIAS))
        }
    }

    #[inline(always)]
    unsafe fn e8m0_8(from: *const u8) -> __m256 {
        // SAFETY: as above, and eight bytes are valid.
        unsafe {
            let bits = _mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())));
            _mm256_castsi256_ps(_mm256_max_epu32(bits, _mm256_set1_epi32(1 << 22)))
        }
    }

    /// What a table of sixteen has for the low half of each byte.
    #[inline(always)]
    unsafe fn look_up(table: __m256i, codes: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15))) }
    }

    /// What unsigned bytes are above 128, as signed ones, and the other way.
    #[inline(always)]
    pub(crate) unsafe fn less_128(bytes: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)) }
    }

    /// Adds products of signed bytes. One factor is to be unsigned, so the other takes its sign; a pair of products is at most
    /// 127 · 128 · 2, which fits 16 bits.
    #[inline(always)]
    unsafe fn multiply_signed(sum: __m256i, weights: __m256i, x: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weights, x));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;

    #[test]
    fn every_scale_has_its_value() {
        fn check<L: Lanes>(isa: Isa) {
            if !isa.is_available() {
                return;
            }
            for first in (0..=240).step_by(LANES) {
                let bytes: [u8; LANES] = std::array::from_fn(|i| first + i as u8);
                let (mut e4m3, mut e8m0, mut signed) = ([0.0; LANES], [0.0; LANES], [0.0f32; LANES]);
                // SAFETY: the instruction set is available; the arrays have sixteen elements.
                unsafe {
                    L::e4m3(bytes.as_ptr()).store(e4m3.as_mut_ptr());
                    L::e8m0(bytes.as_ptr()).store(e8m0.as_mut_ptr());
                    L::widen_e4m3(bytes.as_ptr()).store(signed.as_mut_ptr());
                }
                for (i, byte) in bytes.into_iter().enumerate() {
                    let value = numerics::e4m3::decode(byte);
                    if value.is_nan() {
                        assert!(signed[i].is_nan(), "{isa:?}, {byte}");
                    } else {
                        assert_eq!(signed[i].to_bits(), value.to_bits(), "{isa:?}, {byte}");
                    }
                    if byte < 0x7f {
                        assert_eq!(e4m3[i], value, "{isa:?}, {byte}");
                    }
                    if byte < numerics::e8m0::NAN {
                        assert_eq!(e8m0[i], numerics::e8m0::decode(byte), "{isa:?}, {byte}");
                    }
                }
            }
        }
        check::<Scalar>(Isa::Scalar);
        #[cfg(target_arch = "x86_64")]
        {
            check::<Avx2>(Isa::Avx2);
            check::<AvxVnni>(Isa::AvxVnni);
            check::<Avx512Vnni>(Isa::Avx512Vnni);
            check::<Avx512>(Isa::Avx512);
        }
    }
}
