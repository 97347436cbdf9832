//! Products of packed weights with the records of some tokens, written once over [`Lanes`].
//!
//! A lane is a row: a panel has sixteen. Each 32 columns of a panel are decoded once, into registers, and then multiplied with
//! all tokens, whose sums lie in the first-level cache. Every sum has one order, whatever the number of tokens.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::LazyLock;

use crate::records::{COLUMNS, INT8_OFFSET, Kind, Words};
use crate::simd::{LANES, Lanes, Scalar};

/// Weights of sixteen rows.
#[derive(Clone, Copy)]
pub(crate) struct Panel {
    pub(crate) data: *const u8,
    /// Groups of 32 columns.
    pub(crate) slabs: usize,
}

/// Panels of a matrix that lie side by side.
#[derive(Clone, Copy)]
pub(crate) struct Panels {
    pub(crate) first: Panel,
    /// Bytes of one of them.
    pub(crate) bytes: usize,
    pub(crate) count: usize,
}

impl Panels {
    pub(crate) fn panel(&self, index: usize) -> Panel {
        assert!(index < self.count, "one of the panels");
        Panel { data: self.first.data.wrapping_add(index * self.bytes), ..self.first }
    }
}

/// The records of some tokens, in blocks of as many as a product takes at a time. A block is one piece of memory: if the records of a
/// token were as far apart as all tokens need, many would want the same place in a cache.
#[derive(Clone, Copy)]
pub(crate) struct Records<'a> {
    start: *const u32,
    pub(crate) tokens: usize,
    pub(crate) kind: Kind,
    /// Groups of 32 columns.
    pub(crate) slabs: usize,
    words: PhantomData<&'a [u32]>,
}

// SAFETY: shared and read only.
unsafe impl Sync for Records<'_> {}
// SAFETY: as above.
unsafe impl Send for Records<'_> {}

/// Records of tokens of one block.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) start: *const u32,
    /// Words between the records of one token.
    pub(crate) stride: usize,
    pub(crate) tokens: usize,
    words: PhantomData<&'a [u32]>,
}

/// Bytes of records that are multiplied with all panels of a task before the next ones: they stay in the second-level cache.
const RECORD_BYTES: usize = 384 << 10;

/// The tokens of a block.
pub(crate) fn block(kind: Kind, slabs: usize) -> usize {
    let fitting = RECORD_BYTES / (slabs * kind.words() * 4).max(1);
    let block = fitting.clamp(1, MOST_TOKENS);
    // Whole tiles of AMX.
    if block > 16 { block / 16 * 16 } else { block }
}

impl<'a> Records<'a> {
    pub(crate) fn new(words: &'a [u32], tokens: usize, kind: Kind) -> Records<'a> {
        let slabs = words.len() / (tokens * kind.words()).max(1);
        Records { start: words.as_ptr(), tokens, kind, slabs, words: PhantomData }
    }

    /// Where those of token `t` begin, and how far they are apart, in words.
    pub(crate) fn place(tokens: usize, kind: Kind, slabs: usize, t: usize) -> (usize, usize) {
        let block = block(kind, slabs);
        let first = t / block * block;
        let stride = block.min(tokens - first) * kind.words();
        (first * slabs * kind.words() + (t - first) * kind.words(), stride)
    }

    /// Those of the tokens `from .. to`, which are of one block.
    pub(crate) fn part(&self, from: usize, to: usize) -> Part<'a> {
        assert!(from < to && to <= self.tokens, "tokens of the records");
        let block = block(self.kind, self.slabs);
        assert_eq!(from / block, (to - 1) / block, "tokens of one block");
        let (at, stride) = Self::place(self.tokens, self.kind, self.slabs, from);
        Part { start: self.start.wrapping_add(at), stride, tokens: to - from, words: PhantomData }
    }
}

/// Tokens that a product takes at a time: their sums stay in the first-level cache.
pub(crate) const MOST_TOKENS: usize = 64;

/// The sums of panels for each token, at most [`MOST_TOKENS`], before the scales of rows or matrix: `sums[panel][token][row]`, with room
/// for as many tokens.
///
/// # Safety
/// The CPU has the table's instruction set; the panels and the records, which are of the kernel's kind, are valid for their
/// slabs; `sums` is valid for all panels.
pub(crate) type PanelKernel = unsafe fn(panels: Panels, x: Part<'_>, sums: *mut [f32; LANES]);

/// Bytes of a slab of E2M1 codes without the scales.
pub(crate) const CODE_BYTES: usize = LANES * COLUMNS / 2;

/// How far ahead memory is asked for where that is: into the second-level cache, and from there into the first.
const AHEAD: [usize; 2] = [16_384, 4096];

/// How weights of one format meet the records of one kind.
pub(crate) trait Format<L: Lanes> {
    /// Bytes of the weights that are decoded at a time.
    const BYTES: usize;
    /// How often that is per record.
    const STEPS: usize;
    /// Words of a record.
    const WORDS: usize;
    /// What the totals are multiplied with at the end, a power of two.
    const UNIT: f32 = 1.0;
    /// Whether to multiply one token takes about as long as to read the weights.
    const SLOW: bool = false;
    /// Whether decoded weights do not fit the registers, so that two tokens at a time share what is loaded of them.
    const LOADED: bool = false;
    type Decoded;

    /// # Safety
    /// As for a [`PanelKernel`]; `tile` is valid for the bytes.
    unsafe fn decode(tile: *const u8) -> Self::Decoded;

    /// The total plus the products with a record.
    ///
    /// # Safety
    /// As for a [`PanelKernel`].
    unsafe fn add(weights: &Self::Decoded, record: *const i32, step: usize, total: L) -> L;

    /// The same of [`TOGETHER`] tokens, to the same bits.
    ///
    /// # Safety
    /// As for a [`PanelKernel`].
    #[inline(always)]
    unsafe fn add_some(
        weights: &Self::Decoded,
        records: [*const i32; TOGETHER],
        step: usize,
        mut totals: [L; TOGETHER],
    ) -> [L; TOGETHER] {
        let mut n = 0;
        while n < TOGETHER {
            // SAFETY: the same contract.
            totals[n] = unsafe { Self::add(weights, records[n], step, totals[n]) };
            n += 1;
        }
        totals
    }
}

/// Tokens that share what is loaded of weights that do not fit the registers.
const TOGETHER: usize = 2;

/// How E2M1 codes meet several tokens of one limb with these lanes.
pub(crate) trait ByInt8: Lanes {
    type Nvfp4: Format<Self>;
    type Mxfp4: Format<Self>;
}

impl ByInt8 for Scalar {
    type Nvfp4 = E2m1<false, 1>;
    type Mxfp4 = E2m1<true, 1>;
}

/// See [`PanelKernel`].
#[inline(always)]
unsafe fn panel_sums<L: Lanes, F: Format<L>>(panel: Panel, x: Part<'_>, sums: *mut [f32; LANES]) {
    // SAFETY: the contract of `PanelKernel`.
    unsafe {
        let mut tile = panel.data;
        let mut records = x.start.cast::<i32>();
        if x.tokens == 1 {
            if F::SLOW || !*FOLLOWS_READS {
                token_sums::<L, F, true>(panel, x, sums);
            } else {
                token_sums::<L, F, false>(panel, x, sums);
            }
            return;
        }
        for t in 0..x.tokens {
            L::splat(0.0).store(sums.add(t).cast());
        }
        for _ in 0..panel.slabs {
            for step in 0..F::STEPS {
                ask::<L>(tile, F::BYTES);
                let weights = F::decode(tile);
                tile = tile.add(F::BYTES);
                let mut record = records;
                let mut t = 0;
                while F::LOADED && t + TOGETHER <= x.tokens {
                    let (mut some, mut totals) = ([record; TOGETHER], [L::splat(0.0); TOGETHER]);
                    let mut n = 0;
                    while n < TOGETHER {
                        some[n] = record.wrapping_add(n * F::WORDS);
                        totals[n] = L::load(sums.add(t + n).cast());
                        n += 1;
                    }
                    totals = F::add_some(&weights, some, step, totals);
                    let mut n = 0;
                    while n < TOGETHER {
                        totals[n].store(sums.add(t + n).cast());
                        n += 1;
                    }
                    record = record.wrapping_add(TOGETHER * F::WORDS);
                    t += TOGETHER;
                }
                while t < x.tokens {
                    let total = sums.add(t).cast::<f32>();
                    F::add(&weights, record, step, L::load(total)).store(total);
                    record = record.wrapping_add(F::WORDS);
                    t += 1;
                }
            }
            records = records.wrapping_add(x.stride);
        }
        if F::UNIT != 1.0 {
            for t in 0..x.tokens {
                let total = sums.add(t).cast::<f32>();
                L::load(total).mul(L::splat(F::UNIT)).store(total);
            }
        }
    }
}

/// [`panel_sums`] of one token, whose sums stay in registers: memory would take longer than the products.
#[inline(always)]
unsafe fn token_sums<L: Lanes, F: Format<L>, const FAR: bool>(
    panel: Panel,
    x: Part<'_>,
    sums: *mut [f32; LANES],
) {
    // SAFETY: the contract of `PanelKernel`.
    unsafe {
        let mut tile = panel.data;
        let mut records = x.start.cast::<i32>();
        let mut total = L::splat(0.0);
        for _ in 0..panel.slabs {
            for step in 0..F::STEPS {
                if FAR {
                    ask::<L>(tile, F::BYTES);
                } else {
                    touch::<L>(tile, F::BYTES);
                }
                total = F::add(&F::decode(tile), records, step, total);
                tile = tile.add(F::BYTES);
            }
            records = records.wrapping_add(x.stride);
        }
        if F::UNIT != 1.0 {
            total = total.mul(L::splat(F::UNIT));
        }
        total.store(sums.cast());
    }
}

/// Whether this CPU follows reads in order well enough by itself, so that asking for what lies ahead is only in its way. AMD's do;
/// Intel's begin anew on every page of 4 KB.
pub(crate) static FOLLOWS_READS: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid(0);
        [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
});

/// Asks for the lines of a tile in their order, of which the CPU sees by itself what comes then. It does not if lines are read in the
/// order that the compiler finds best.
#[inline(always)]
unsafe fn touch<L: Lanes>(tile: *const u8, bytes: usize) {
    let mut at = 0;
    while at < bytes {
        // SAFETY: the CPU has the features; the address need not be valid.
        unsafe { L::prefetch(tile.wrapping_add(at)) };
        at += 64;
    }
}

/// Asks for what lies ahead, into the second-level cache first: of reads into the first there can be so few at a time that the
/// products would wait for them.
#[inline(always)]
pub(crate) unsafe fn ask<L: Lanes>(tile: *const u8, bytes: usize) {
    let [second, first] = AHEAD;
    let mut at = 0;
    while at < bytes {
        // SAFETY: the CPU has the features; the address need not be valid.
        unsafe {
            L::prefetch_second(tile.wrapping_add(second + at));
            L::prefetch(tile.wrapping_add(first + at));
        }
        at += 64;
    }
}

/// E2M1 codes: the scales of the sixteen rows (16 bytes, E8M0, for MXFP4; 32, E4M3, for NVFP4), then 256 bytes of codes. In
/// byte `64 k + 4 r + j` the low nibble is row `r`, column `8 k + j`, the high one column `8 k + 4 + j`.
#[inline(always)]
pub(crate) unsafe fn e2m1<L: ByInt8, const MX: bool, const LIMBS: usize>(
    panel: Panel,
    x: Part<'_>,
    sums: *mut [f32; LANES],
) {
    // SAFETY: the contract of `PanelKernel`.
    unsafe {
        if L::FEW_REGISTERS && x.tokens > 1 {
            e2m1_by_halves::<L, MX, LIMBS>(panel, x, sums);
        } else if LIMBS == 1 && x.tokens > 1 && MX {
            panel_sums::<L, L::Mxfp4>(panel, x, sums);
        } else if LIMBS == 1 && x.tokens > 1 {
            panel_sums::<L, L::Nvfp4>(panel, x, sums);
        } else {
            panel_sums::<L, E2m1<MX, LIMBS>>(panel, x, sums);
        }
    }
}

/// The same with one half of a slab in registers at a time, and what the first half gives in memory.
#[inline(always)]
unsafe fn e2m1_by_halves<L: Lanes, const MX: bool, const LIMBS: usize>(
    panel: Panel,
    x: Part<'_>,
    sums: *mut [f32; LANES],
) {
    assert!(x.tokens <= MOST_TOKENS, "no more tokens than a product takes at a time");
    let mut firsts = [const { MaybeUninit::<[f32; LANES]>::uninit() }; MOST_TOKENS];
    let whole = MX && LIMBS < 3;
    // SAFETY: the contract of `PanelKernel`; what is read of the first halves was written before.
    unsafe {
        for t in 0..x.tokens {
            L::splat(0.0).store(sums.add(t).cast());
        }
        let mut slab = panel.data;
        let mut records = x.start.cast::<i32>();
        for _ in 0..panel.slabs {
            ask::<L>(slab, <E2m1<MX, LIMBS> as Format<L>>::BYTES);
            let scales = e2m1_scales::<L, MX>(slab);
            let codes = slab.add(if MX { LANES } else { 2 * LANES });
            let weights = e2m1_block::<L>(codes);
            let mut record = records;
            for first in &mut firsts[..x.tokens] {
                let sum = e2m1_sums::<L, LIMBS>(&weights, record, 0);
                if whole {
                    L::store_ints(sum, first.as_mut_ptr().cast());
                } else {
                    L::from_ints(sum).mul(scales[0]).store(first.as_mut_ptr().cast());
                }
                record = record.wrapping_add(Words::<LIMBS>::COUNT);
            }
            let weights = e2m1_block::<L>(codes.add(128));
            let mut record = records;
            for (t, first) in firsts[..x.tokens].iter().enumerate() {
                let sum = e2m1_sums::<L, LIMBS>(&weights, record, 1);
                let scale = L::splat(record.add(Words::<LIMBS>::SCALE).cast::<f32>().read());
                let total = sums.add(t).cast::<f32>();
                let new = if whole {
                    let sum = L::add_ints(L::load_ints(first.as_ptr().cast()), sum);
                    e2m1_whole(sum, scales[0], scale, L::load(total))
                } else {
                    let sum = L::from_ints(sum).fma(scales[1], L::load(first.as_ptr().cast()));
                    sum.fma(scale, L::load(total))
                };
                new.store(total);
                record = record.wrapping_add(Words::<LIMBS>::COUNT);
            }
            slab = slab.add(<E2m1<MX, LIMBS> as Format<L>>::BYTES);
            records = records.wrapping_add(x.stride);
        }
    }
}

pub(crate) struct E2m1<const MX: bool, const LIMBS: usize>;

impl<L: Lanes, const MX: bool, const LIMBS: usize> Format<L> for E2m1<MX, LIMBS> {
    const BYTES: usize = if MX { LANES } else { 2 * LANES } + CODE_BYTES;
    const STEPS: usize = 1;
    const WORDS: usize = Words::<LIMBS>::COUNT;
    const SLOW: bool = LIMBS == 3 || L::FEW_REGISTERS;
    /// The halves of the columns.
    type Decoded = [([L::Bytes; 4], L); 2];

    #[inline(always)]
    unsafe fn decode(tile: *const u8) -> Self::Decoded {
        // SAFETY: the contract.
        unsafe {
            let scales = e2m1_scales::<L, MX>(tile);
            let codes = tile.add(if MX { LANES } else { 2 * LANES });
            [(e2m1_block::<L>(codes), scales[0]), (e2m1_block::<L>(codes.add(128)), scales[1])]
        }
    }

    #[inline(always)]
    unsafe fn add([first, second]: &Self::Decoded, record: *const i32, _step: usize, total: L) -> L {
        // SAFETY: the contract.
        unsafe {
            let sums =
                [e2m1_sums::<L, LIMBS>(&first.0, record, 0), e2m1_sums::<L, LIMBS>(&second.0, record, 1)];
            let scale = L::splat(record.add(Words::<LIMBS>::SCALE).cast::<f32>().read());
            if MX && LIMBS < 3 {
                return e2m1_whole(L::add_ints(sums[0], sums[1]), first.1, scale, total);
            }
            e2m1_halves(sums, [first.1, second.1], scale, total)
        }
    }
}

/// E2M1 codes by one limb with scales that are integers too. Nothing is rounded before the sum of a slab is, so the bits are those of
/// [`E2m1`].
#[cfg(target_arch = "x86_64")]
mod whole {
    use super::*;
    use crate::simd::{Ymm, Zmm};

    impl<const VNNI: bool> ByInt8 for Ymm<VNNI> {
        type Nvfp4 = E2m1<false, 1>;
        type Mxfp4 = E2m1<true, 1>;
    }

    impl<const VBMI: bool> ByInt8 for Zmm<VBMI> {
        type Nvfp4 = Whole;
        type Mxfp4 = Shifted;
    }

    /// NVFP4: sums of sixteen columns fit 16 bits, so that one instruction multiplies those of both halves and adds them.
    pub(crate) struct Whole;

    /// Scales of the halves of a slab, in units of [`Whole`].
    #[derive(Clone, Copy)]
    pub(crate) enum Scales<L: Lanes> {
        Whole(L::Ints),
        /// One of them is less than a unit, or between two.
        Float([L; 2]),
    }

    impl<const VBMI: bool> Format<Zmm<VBMI>> for Whole {
        const BYTES: usize = <E2m1<false, 1> as Format<Zmm<VBMI>>>::BYTES;
        const STEPS: usize = 1;
        const WORDS: usize = Words::<1>::COUNT;
        const UNIT: f32 = 1.0 / 64.0;
        /// Weights of four columns of each half, in turn.
        type Decoded = ([[<Zmm<VBMI> as Lanes>::Bytes; 2]; 4], Scales<Zmm<VBMI>>);

        #[inline(always)]
        unsafe fn decode(tile: *const u8) -> Self::Decoded {
            // SAFETY: the contract.
            unsafe {
                let weights = Zmm::<VBMI>::load_e2m1_halves(tile.add(2 * LANES));
                let scales = match Zmm::<VBMI>::whole_scales(tile) {
                    Some(scales) => Scales::Whole(scales),
                    None => {
                        let [first, second] = e2m1_scales::<Zmm<VBMI>, false>(tile);
                        let units = Zmm::<VBMI>::splat(1.0 / <Self as Format<Zmm<VBMI>>>::UNIT);
                        Scales::Float([first.mul(units), second.mul(units)])
                    }
                };
                (weights, scales)
            }
        }

        #[inline(always)]
        unsafe fn add(
            (weights, scales): &Self::Decoded,
            record: *const i32,
            _step: usize,
            total: Zmm<VBMI>,
        ) -> Zmm<VBMI> {
            // SAFETY: the contract.
            unsafe {
                let sums = Zmm::<VBMI>::dot_halves(record.add(Words::<1>::E2M1), weights, record);
                let scale = Zmm::<VBMI>::splat(record.add(Words::<1>::SCALE).cast::<f32>().read());
                match *scales {
                    Scales::Whole(scales) => {
                        Zmm::<VBMI>::from_ints(Zmm::<VBMI>::join_halves(sums, scales)).fma(scale, total)
                    }
                    Scales::Float(scales) => {
                        let half = |factors| Zmm::<VBMI>::join_halves(sums, Zmm::<VBMI>::splat_ints(factors));
                        e2m1_halves([half(1), half(1 << 16)], scales, scale, total)
                    }
                }
            }
        }
    }

    /// MXFP4: a scale that is a small power of two shifts the sum, which saves a product.
    pub(crate) struct Shifted;

    /// The scales of a slab.
    #[derive(Clone, Copy)]
    pub(crate) enum Powers<L: Lanes> {
        Shift(L::Ints),
        /// One of them is a fraction, or too large.
        Float(L),
    }

    impl<const VBMI: bool> Format<Zmm<VBMI>> for Shifted {
        const BYTES: usize = <E2m1<true, 1> as Format<Zmm<VBMI>>>::BYTES;
        const STEPS: usize = 1;
        const WORDS: usize = Words::<1>::COUNT;
        type Decoded = ([[<Zmm<VBMI> as Lanes>::Bytes; 4]; 2], Powers<Zmm<VBMI>>);

        #[inline(always)]
        unsafe fn decode(tile: *const u8) -> Self::Decoded {
            // SAFETY: the contract.
            unsafe {
                let codes = tile.add(LANES);
                let weights = [e2m1_block::<Zmm<VBMI>>(codes), e2m1_block::<Zmm<VBMI>>(codes.add(128))];
                let scales = match Zmm::<VBMI>::shifts(tile) {
                    Some(shifts) => Powers::Shift(shifts),
                    None => Powers::Float(Zmm::<VBMI>::e8m0(tile)),
                };
                (weights, scales)
            }
        }

        #[inline(always)]
        unsafe fn add(
            ([first, second], scales): &Self::Decoded,
            record: *const i32,
            _step: usize,
            total: Zmm<VBMI>,
        ) -> Zmm<VBMI> {
            // SAFETY: the contract.
            unsafe {
                let first = e2m1_sums::<Zmm<VBMI>, 1>(first, record, 0);
                let sum = Zmm::<VBMI>::add_ints(first, e2m1_sums::<Zmm<VBMI>, 1>(second, record, 1));
                let scale = Zmm::<VBMI>::splat(record.add(Words::<1>::SCALE).cast::<f32>().read());
                match *scales {
                    Powers::Shift(by) => {
                        Zmm::<VBMI>::from_ints(Zmm::<VBMI>::shift(sum, by)).fma(scale, total)
                    }
                    Powers::Float(power) => e2m1_whole(sum, power, scale, total),
                }
            }
        }
    }
}

/// The scales of the halves of a slab.
#[inline(always)]
unsafe fn e2m1_scales<L: Lanes, const MX: bool>(slab: *const u8) -> [L; 2] {
    // SAFETY: the contract of `PanelKernel`.
    unsafe { if MX { [L::e8m0(slab); 2] } else { [L::e4m3(slab), L::e4m3(slab.add(LANES))] } }
}

/// The total plus the sums of a slab, times the scales of its halves and of the record.
#[inline(always)]
unsafe fn e2m1_halves<L: Lanes>(sums: [L::Ints; 2], scales: [L; 2], scale: L, total: L) -> L {
    // SAFETY: the contract of `PanelKernel`.
    unsafe {
        let sum = L::from_ints(sums[1]).fma(scales[1], L::from_ints(sums[0]).mul(scales[0]));
        sum.fma(scale, total)
    }
}

/// The same where both scales are one power of two and the sum has less than 24 bits: the same bits in fewer steps.
#[inline(always)]
unsafe fn e2m1_whole<L: Lanes>(sum: L::Ints, block_scale: L, scale: L, total: L) -> L {
    // SAFETY: the contract of `PanelKernel`.
    unsafe { L::from_ints(sum).fma(block_scale.mul(scale), total) }
}

/// Sixteen columns of codes.
#[inline(always)]
unsafe fn e2m1_block<L: Lanes>(codes: *const u8) -> [L::Bytes; 4] {
    // SAFETY: the contract of `PanelKernel`.
    unsafe {
        let ([a, b], [c, d]) = (L::load_e2m1(codes), L::load_e2m1(codes.add(64)));
        [a, b, c, d]
    }
}

/// The sums of one half of a slab, before its scales.
#[inline(always)]
unsafe fn e2m1_sums<L: Lanes, const LIMBS: usize>(
    weights: &[L::Bytes; 4],
    record: *const i32,
    half: usize,
) -> L::Ints {
    // SAFETY: the contract of `PanelKernel`.
    unsafe {
        let offset = L::splat_ints(record.add(Words::<LIMBS>::E2M1 + half).read());
        L::dot_e2m1::<LIMBS>(offset, weights, record.add(half))
    }
}

/// Weights from -127 to 127, plus 128: byte `64 k + 4 r + j` is row `r`, column `4 k + j`.
#[inline(always)]
pub(crate) unsafe fn int8<L: Lanes, const LIMBS: usize>(panel: Panel, x: Part<'_>, sums: *mut [f32; LANES]) {
    // SAFETY: the contract of `PanelKernel`.
    unsafe { panel_sums::<L, Int8<LIMBS>>(panel, x, sums) }
}

struct Int8<const LIMBS: usize>;

impl<L: Lanes, const LIMBS: usize> Format<L> for Int8<LIMBS> {
    const BYTES: usize = LANES * COLUMNS;
    const STEPS: usize = 1;
    const WORDS: usize = Words::<LIMBS>::COUNT;
    const SLOW: bool = L::FEW_REGISTERS;
    const LOADED: bool = L::FEW_REGISTERS;
    type Decoded = [[L::Bytes; 4]; 2];

    #[inline(always)]
    unsafe fn decode(tile: *const u8) -> Self::Decoded {
        // SAFETY: the contract.
        unsafe { [int8_block::<L>(tile), int8_block::<L>(tile.add(256))] }
    }

    #[inline(always)]
    unsafe fn add(weights: &Self::Decoded, record: *const i32, _step: usize, total: L) -> L {
        // SAFETY: the contract.
        unsafe { int8_totals::<L, LIMBS, 1>(weights, [record], [total])[0] }
    }

    #[inline(always)]
    unsafe fn add_some(
        weights: &Self::Decoded,
        records: [*const i32; TOGETHER],
        _step: usize,
        totals: [L; TOGETHER],
    ) -> [L; TOGETHER] {
        // SAFETY: the contract.
        unsafe { int8_totals::<L, LIMBS, TOGETHER>(weights, records, totals) }
    }
}

/// The totals of some tokens plus their products with a slab.
#[inline(always)]
unsafe fn int8_totals<L: Lanes, const LIMBS: usize, const N: usize>(
    weights: &[[L::Bytes; 4]; 2],
    records: [*const i32; N],
    mut totals: [L; N],
) -> [L; N] {
    // SAFETY: the contract of `PanelKernel`.
    unsafe {
        let mut limbs = [[L::splat_ints(0); N]; LIMBS];
        let mut l = 0;
        while l < LIMBS {
            let (mut offsets, mut x) = (records, records);
            let mut n = 0;
            while n < N {
                (offsets[n], x[n]) = (records[n].add(Words::<LIMBS>::INT8 + l), records[n].add(8 * l));
                n += 1;
            }
            limbs[l] = L::dot_int8(offsets, weights, x);
            l += 1;
        }
        let mut n = 0;
        while n < N {
            let mut sum = L::from_ints(limbs[0][n]);
            let mut l = 1;
            while l < LIMBS {
                sum = L::from_ints(limbs[l][n]).fma(L::splat([256.0, 65_536.0][l - 1]), sum);
                l += 1;
            }
            let scale = L::splat(records[n].add(Words::<LIMBS>::SCALE).cast::<f32>().read());
            totals[n] = sum.fma(scale, totals[n]);
            n += 1;
        }
        totals
    }
}

/// Sixteen columns of bytes.
#[inline(always)]
unsafe fn int8_block<L: Lanes>(tile: *const u8) -> [L::Bytes; 4] {
    // SAFETY: the contract of `PanelKernel`.
    unsafe {
        let (a, b) = (L::load_bytes(tile), L::load_bytes(tile.add(64)));
        [a, b, L::load_bytes(tile.add(128)), L::load_bytes(tile.add(192))]
    }
}

/// BF16 weights: element `32 k + 2 r + j` is row `r`, column `2 k + j`.
#[inline(always)]
pub(crate) unsafe fn bf16<L: Lanes>(panel: Panel, x: Part<'_>, sums: *mut [f32; LANES]) {
    // SAFETY: the contract of `PanelKernel`.
    unsafe { panel_sums::<L, Bf16>(panel, x, sums) }
}

struct Bf16;

/// Columns of BF16 that fit the registers.
const HALF: usize = COLUMNS / 2;

impl<L: Lanes> Format<L> for Bf16 {
    const BYTES: usize = 2 * LANES * HALF;
    const STEPS: usize = COLUMNS / HALF;
    const WORDS: usize = COLUMNS;
    const LOADED: bool = L::FEW_REGISTERS;
    /// The even and the odd of two columns.
    type Decoded = [[L; 2]; HALF / 2];

    #[inline(always)]
    unsafe fn decode(tile: *const u8) -> Self::Decoded {
        // SAFETY: the contract.
        unsafe {
            let mut pairs = [[L::splat(0.0); 2]; HALF / 2];
            for (k, pair) in pairs.iter_mut().enumerate() {
                *pair = L::load_bf16(tile.add(64 * k).cast());
            }
            pairs
        }
    }

    #[inline(always)]
    unsafe fn add(pairs: &Self::Decoded, record: *const i32, step: usize, total: L) -> L {
        // SAFETY: the contract.
        unsafe {
            let x = record.cast::<f32>().add(step * HALF);
            // Four chains, for the latency of the multiply-add.
            let mut chains = [L::splat(0.0); 4];
            for i in 0..HALF {
                let (weight, x) = (pairs[i / 2][i % 2], L::splat(x.add(i).read()));
                chains[i % 4] = if i < 4 { weight.mul(x) } else { weight.fma(x, chains[i % 4]) };
            }
            total.add(chains[0].add(chains[1]).add(chains[2].add(chains[3])))
        }
    }

    #[inline(always)]
    unsafe fn add_some(
        pairs: &Self::Decoded,
        records: [*const i32; TOGETHER],
        step: usize,
        mut totals: [L; TOGETHER],
    ) -> [L; TOGETHER] {
        // SAFETY: the contract.
        unsafe {
            // The chains one after the other, as those of all tokens would not fit the registers.
            let (a, b) = (bf16_chain::<L, 0>(pairs, records, step), bf16_chain::<L, 1>(pairs, records, step));
            let mut first = a;
            let mut n = 0;
            while n < TOGETHER {
                first[n] = a[n].add(b[n]);
                n += 1;
            }
            let (c, d) = (bf16_chain::<L, 2>(pairs, records, step), bf16_chain::<L, 3>(pairs, records, step));
            let mut n = 0;
            while n < TOGETHER {
                totals[n] = totals[n].add(first[n].add(c[n].add(d[n])));
                n += 1;
            }
            totals
        }
    }
}

/// Every fourth column from `FIRST` on, for some tokens.
#[inline(always)]
unsafe fn bf16_chain<L: Lanes, const FIRST: usize>(
    pairs: &[[L; 2]; HALF / 2],
    records: [*const i32; TOGETHER],
    step: usize,
) -> [L; TOGETHER] {
    // SAFETY: the contract of `PanelKernel`.
    unsafe {
        let mut sums = [L::splat(0.0); TOGETHER];
        let mut i = FIRST;
        while i < HALF {
            let weight = pairs[i / 2][i % 2];
            let mut n = 0;
            while n < TOGETHER {
                let x = L::splat(records[n].cast::<f32>().add(step * HALF + i).read());
                sums[n] = if i < 4 { weight.mul(x) } else { weight.fma(x, sums[n]) };
                n += 1;
            }
            i += 4;
        }
        sums
    }
}

/// What is done with the weights of two columns, the even and the odd, of which there are sixteen pairs in a slab.
pub(crate) trait Put<L: Lanes> {
    /// # Safety
    /// As for a [`PanelKernel`].
    unsafe fn put(&mut self, pair: usize, weights: [L; 2]);
}

/// How a slab of weights becomes numbers that BF16 holds.
pub(crate) trait Slab<L: Lanes> {
    const BYTES: usize;
    /// Whether it is BF16 already, in pairs of columns.
    const PAIRS: bool = false;

    /// # Safety
    /// As for a [`PanelKernel`]; `slab` is valid for the bytes.
    unsafe fn each<P: Put<L>>(slab: *const u8, to: &mut P);
}

/// E2M1 codes, twice their values.
pub(crate) struct E2m1Slab<const MX: bool>;

impl<L: Lanes, const MX: bool> Slab<L> for E2m1Slab<MX> {
    const BYTES: usize = if MX { LANES } else { 2 * LANES } + CODE_BYTES;

    #[inline(always)]
    unsafe fn each<P: Put<L>>(slab: *const u8, to: &mut P) {
        // SAFETY: the contract.
        unsafe {
            let scales = e2m1_scales::<L, MX>(slab);
            let codes = slab.add(if MX { LANES } else { 2 * LANES });
            for k in 0..4 {
                let words = L::load_ints(codes.add(64 * k).cast());
                let scale = scales[k / 2];
                put_pair::<L, P, 0>(to, 4 * k, words, scale);
                put_pair::<L, P, 16>(to, 4 * k + 1, words, scale);
                put_pair::<L, P, 4>(to, 4 * k + 2, words, scale);
                put_pair::<L, P, 20>(to, 4 * k + 3, words, scale);
            }
        }
    }
}

/// Puts the codes that are `SHIFT` bits up in the words and those of the byte behind.
#[inline(always)]
unsafe fn put_pair<L: Lanes, P: Put<L>, const SHIFT: u32>(to: &mut P, pair: usize, words: L::Ints, scale: L) {
    // SAFETY: the contract of `Slab::each`.
    unsafe {
        to.put(pair, [L::e2m1_at(words, SHIFT).mul(scale), L::e2m1_at(words, SHIFT + 8).mul(scale)]);
    }
}

/// Weights of eight bits.
pub(crate) struct Int8Slab;

impl<L: Lanes> Slab<L> for Int8Slab {
    const BYTES: usize = LANES * COLUMNS;

    #[inline(always)]
    unsafe fn each<P: Put<L>>(slab: *const u8, to: &mut P) {
        // SAFETY: the contract.
        unsafe {
            let offset = L::splat(-(INT8_OFFSET as f32));
            for k in 0..8 {
                let words = L::load_ints(slab.add(64 * k).cast());
                to.put(2 * k, [L::byte_at(words, 0).add(offset), L::byte_at(words, 8).add(offset)]);
                to.put(2 * k + 1, [L::byte_at(words, 16).add(offset), L::byte_at(words, 24).add(offset)]);
            }
        }
    }
}

/// BF16.
pub(crate) struct Bf16Slab;

impl<L: Lanes> Slab<L> for Bf16Slab {
    const BYTES: usize = 2 * LANES * COLUMNS;
    const PAIRS: bool = true;

    #[inline(always)]
    unsafe fn each<P: Put<L>>(slab: *const u8, to: &mut P) {
        let mut pair = 0;
        while pair < COLUMNS / 2 {
            // SAFETY: the contract.
            unsafe { to.put(pair, L::load_bf16(slab.add(64 * pair).cast())) };
            pair += 1;
        }
    }
}

/// Weights by activations in BF16, in the order of Intel's units for that: of a slab first the even columns, the odd ones, and both
/// together.
///
/// # Safety
/// As for a [`PanelKernel`].
#[inline(always)]
pub(crate) unsafe fn by_bf16<L: Lanes, S: Slab<L>>(panels: Panels, x: Part<'_>, sums: *mut [f32; LANES]) {
    for p in 0..panels.count {
        // SAFETY: the contract.
        unsafe { panel_sums::<L, ByBf16<S>>(panels.panel(p), x, sums.add(p * MOST_TOKENS)) };
    }
}

struct ByBf16<S>(PhantomData<S>);

struct Pairs<L>([[L; 2]; COLUMNS / 2]);

impl<L: Lanes> Put<L> for Pairs<L> {
    #[inline(always)]
    unsafe fn put(&mut self, pair: usize, weights: [L; 2]) {
        self.0[pair] = weights;
    }
}

impl<L: Lanes, S: Slab<L>> Format<L> for ByBf16<S> {
    const BYTES: usize = S::BYTES;
    const STEPS: usize = 1;
    const WORDS: usize = COLUMNS / 2;
    const SLOW: bool = true;
    type Decoded = Pairs<L>;

    #[inline(always)]
    unsafe fn decode(tile: *const u8) -> Pairs<L> {
        // SAFETY: the contract.
        unsafe {
            let mut pairs = Pairs([[L::splat(0.0); 2]; COLUMNS / 2]);
            S::each(tile, &mut pairs);
            pairs
        }
    }

    #[inline(always)]
    unsafe fn add(weights: &Pairs<L>, record: *const i32, _step: usize, total: L) -> L {
        // SAFETY: the contract.
        unsafe {
            let (mut even, mut odd) = (L::splat(0.0), L::splat(0.0));
            for (pair, weights) in weights.0.iter().enumerate() {
                let x = L::splat_bf16(record.add(pair).cast());
                (even, odd) = (weights[0].fma(x[0], even), weights[1].fma(x[1], odd));
            }
            total.add(even.add(odd))
        }
    }
}

/// What becomes of the sums of one panel.
pub(crate) struct Finish<'a> {
    pub(crate) sums: &'a [[f32; LANES]],
    /// A factor per row.
    pub(crate) scale: &'a [f32; LANES],
    pub(crate) bias: &'a [f32; LANES],
    /// Where row 0 of token 0 goes; the next token is `stride` behind.
    pub(crate) out: *mut f32,
    pub(crate) stride: usize,
    /// Rows that exist, at most sixteen.
    pub(crate) rows: usize,
    /// Whether they are added to what is there.
    pub(crate) add: bool,
}

/// `out (+)= sums · scale + bias`.
///
/// # Safety
/// The CPU has the instruction set; `out` is valid for the rows of each token.
#[inline(always)]
pub(crate) unsafe fn finish<L: Lanes>(job: &Finish<'_>) {
    // SAFETY: the contract; arrays have sixteen elements.
    unsafe {
        let (scale, bias) = (L::load(job.scale.as_ptr()), L::load(job.bias.as_ptr()));
        for t in 0..job.sums.len() {
            let out = job.out.add(t * job.stride);
            let value = L::load(job.sums.as_ptr().add(t).cast()).mul(scale).add(bias);
            if job.rows == LANES {
                let value = if job.add { L::load(out).add(value) } else { value };
                value.store(out);
            } else {
                let mut values = [0.0; LANES];
                value.store(values.as_mut_ptr());
                for (r, value) in values.iter().enumerate().take(job.rows) {
                    *out.add(r) = if job.add { *out.add(r) + value } else { *value };
                }
            }
        }
    }
}

/// gpt-oss's clamped SwiGLU: `(up + 1) · gate · sigmoid(alpha · gate)`, to where the gates are to go. NaN stays NaN.
///
/// # Safety
/// As for [`finish`], with sixteen rows; `ups` has as many tokens as `gates`.
#[inline(always)]
pub(crate) unsafe fn finish_swiglu<L: Lanes>(gates: &Finish<'_>, ups: &Finish<'_>, limit: f32, alpha: f32) {
    // SAFETY: the contract; arrays have sixteen elements.
    unsafe {
        let (gate_scale, gate_bias) = (L::load(gates.scale.as_ptr()), L::load(gates.bias.as_ptr()));
        let (up_scale, up_bias) = (L::load(ups.scale.as_ptr()), L::load(ups.bias.as_ptr()));
        let one = L::splat(1.0);
        for t in 0..gates.sums.len() {
            let gate = L::load(gates.sums.as_ptr().add(t).cast()).mul(gate_scale).add(gate_bias);
            let gate = L::splat(limit).min(gate);
            let up = L::load(ups.sums.as_ptr().add(t).cast()).mul(up_scale).add(up_bias);
            let up = L::splat(-limit).max(L::splat(limit).min(up));
            let sigmoid = one.div(one.add(gate.mul(L::splat(-alpha)).exp()));
            up.add(one).mul(gate).mul(sigmoid).store(gates.out.add(t * gates.stride));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;
    use crate::records::Layout;
    use crate::simd::MOST_SHIFT;

    /// A cast keeps every product: NVFP4 with the scales of MXFP4 gives its bits.
    #[test]
    fn mxfp4_and_its_cast_give_the_same_bits() {
        const SLABS: usize = 3;
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let (mut mxfp4, mut nvfp4) = (Vec::new(), Vec::new());
        for _ in 0..SLABS {
            // Powers of two from 2^-6 to 2^7 in both formats.
            let powers: Vec<u8> = (0..LANES).map(|_| random() % 14).collect();
            mxfp4.extend(powers.iter().map(|p| 121 + p));
            nvfp4.extend(powers.iter().chain(&powers).map(|p| (1 + p) << 3));
            let codes: Vec<u8> = (0..CODE_BYTES).map(|_| random()).collect();
            mxfp4.extend(&codes);
            nvfp4.extend(&codes);
        }
        let x: Vec<f32> = (0..SLABS * COLUMNS).map(|_| f32::from(random()) - 100.3).collect();
        for isa in Isa::ALL {
            let Some(kernels) = isa.kernels() else { continue };
            for (limbs, tokens) in [(1, 1), (1, 2), (2, 1), (3, 1)] {
                let layout = Layout { kind: Kind::Limbs(limbs), tokens, cols: x.len() };
                let mut words = vec![0; layout.len()];
                for t in 0..tokens {
                    // SAFETY: the words are those of the layout.
                    unsafe { layout.write(kernels, t, &x, words.as_mut_ptr()) };
                }
                let run = |kernel: PanelKernel, data: &[u8]| sums(kernel, data, layout.records(&words));
                let expected = run(kernels.mxfp4[limbs - 1], &mxfp4);
                assert_eq!(run(kernels.nvfp4[limbs - 1], &nvfp4), expected, "{isa:?}, {limbs} limbs");
            }
        }
    }

    /// The bits of the sums of a panel.
    fn sums(kernel: PanelKernel, data: &[u8], x: Records<'_>) -> Vec<[u32; LANES]> {
        let mut sums = vec![[0.0; LANES]; x.tokens];
        let first = Panel { data: data.as_ptr(), slabs: x.slabs };
        let panel = Panels { first, bytes: data.len(), count: 1 };
        // SAFETY: the instruction set is available; panel and records have as many slabs.
        unsafe { kernel(panel, x.part(0, x.tokens), sums.as_mut_ptr()) };
        sums.into_iter().map(|sums| sums.map(f32::to_bits)).collect()
    }

    /// The largest weights, 6 · 448, 6 · 2^15 and 127, and activations of 127 units add up exactly, whatever the signs.
    #[test]
    fn the_largest_sums_fit() {
        const TOKENS: usize = 4;
        for isa in Isa::ALL {
            let Some(kernels) = isa.kernels() else { continue };
            let layout = Layout { kind: Kind::Limbs(1), tokens: TOKENS, cols: COLUMNS };
            let mut words = vec![0; layout.len()];
            for t in 0..TOKENS {
                let x: [f32; COLUMNS] =
                    std::array::from_fn(|i| if t >> (i / 16) & 1 == 0 { 127.0 } else { -127.0 });
                // SAFETY: the words are those of the layout.
                unsafe { layout.write(kernels, t, &x, words.as_mut_ptr()) };
            }
            for code in [0x77, 0xff] {
                for (kernel, scales, scale) in [
                    (kernels.nvfp4[0], vec![0x7e; 2 * LANES], 448.0),
                    (kernels.mxfp4[0], vec![127 + MOST_SHIFT; LANES], 32_768.0),
                ] {
                    let panel = [scales, vec![code; CODE_BYTES]].concat();
                    // Of twice the weights.
                    let all = 32.0 * 127.0 * scale * if code == 0x77 { 12.0f32 } else { -12.0 };
                    let expected = [all, 0.0, 0.0, -all].map(|sum| [sum.to_bits(); LANES]);
                    assert_eq!(sums(kernel, &panel, layout.records(&words)), expected, "{isa:?}, {scale}");
                }
            }
            for (byte, weight) in [(255, 127.0f32), (1, -127.0)] {
                let all = 32.0 * 127.0 * weight;
                let expected = [all, 0.0, 0.0, -all].map(|sum| [sum.to_bits(); LANES]);
                let panel = vec![byte; COLUMNS * LANES];
                assert_eq!(
                    sums(kernels.int8[0], &panel, layout.records(&words)),
                    expected,
                    "{isa:?}, {weight}"
                );
            }
        }
    }

    /// Of several limbs, too, whose lower ones are smallest and largest together, to the bits of plain code.
    #[test]
    fn the_largest_sums_of_several_limbs_fit() {
        const TOKENS: usize = 4;
        // -128 and -128 · 256 in the lower two limbs of three, the most of both, and the largest numbers.
        let wholes = [-32_896.0, 32_639.0, 8_355_700.0, -8_355_700.0];
        for limbs in [2, 3] {
            let layout = Layout { kind: Kind::Limbs(limbs), tokens: TOKENS, cols: COLUMNS };
            for byte in [0, 1, 255] {
                let panel = vec![byte; COLUMNS * LANES];
                let found = Isa::ALL.into_iter().filter_map(|isa| {
                    let kernels = isa.kernels()?;
                    let mut words = vec![0; layout.len()];
                    for (t, whole) in wholes.into_iter().enumerate() {
                        // The last one makes the scale one.
                        let x: [f32; COLUMNS] =
                            std::array::from_fn(|i| if i == 31 { 8_355_700.0 } else { whole });
                        // SAFETY: the words are those of the layout.
                        unsafe { layout.write(kernels, t, &x, words.as_mut_ptr()) };
                    }
                    Some((isa, sums(kernels.int8[limbs - 1], &panel, layout.records(&words))))
                });
                let mut found = found.collect::<Vec<_>>().into_iter();
                let (_, plain) = found.next().expect("plain code runs everywhere");
                let weight = f32::from(byte) - 128.0;
                let largest = f32::from_bits(plain[2][0]) / (32.0 * 8_355_700.0 * weight);
                assert!((largest - 1.0).abs() < 1e-4, "{limbs} limbs, {byte}: {largest}");
                for (isa, sums) in found {
                    assert_eq!(sums, plain, "{isa:?}, {limbs} limbs, {byte}");
                }
            }
        }
    }
}
