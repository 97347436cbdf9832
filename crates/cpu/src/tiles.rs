//! Products of weights in four and eight bits with many tokens, on AMX: sixteen tokens by sixteen rows at a time.
//!
//! A tile of activations is one limb of the records of some tokens, where they lie; one of weights is a slab or half of one, as
//! signed bytes. Sums of integers are exact, and what follows them is that of `products.rs`, so the bits are those of the other
//! roads. While tiles multiply, vectors scale the sums of the tokens before.

use std::mem::MaybeUninit;

use crate::products::{self, CODE_BYTES, MOST_TOKENS, Panel, Records};
use crate::records::{COLUMNS, Words};
use crate::simd::{LANES, Lanes};

/// Fewer tokens than this are faster on vectors.
pub(crate) const FEW: usize = 8;

/// Rows of a tile.
const ROWS: usize = 16;

/// Groups of tokens of a product.
const GROUPS: usize = MOST_TOKENS / ROWS;

/// The sums of a tile, `[tokens][rows of the panel]`.
type Sums = [[i32; LANES]; ROWS];

/// What is done with tiles. Each `x` is the first of some records, `stride` bytes apart; `weights` are lines of 64 bytes, four
/// columns of sixteen rows each. Several products at a time, since each takes many times longer than it occupies the unit.
///
/// # Safety
/// The CPU and the system allow tiles; all pointers are valid for the tokens that were last configured, sums for all sixteen.
pub(crate) trait Tiles {
    /// To be called before others, with at most sixteen tokens, and with how many columns are multiplied at a time: sixteen in
    /// halves, otherwise 32.
    unsafe fn configure(tokens: usize, columns: usize);
    /// For one or two groups the sums of sixteen columns, and [`GROUPS`] tiles behind them those of the next sixteen.
    unsafe fn halves<const N: usize>(x: [*const u32; N], stride: usize, weights: *const u8, sums: *mut Sums);
    /// For one, two or four groups the sums of 32 columns.
    unsafe fn whole<const N: usize>(x: [*const u32; N], stride: usize, weights: *const u8, sums: *mut Sums);
    /// The same for unsigned weights.
    unsafe fn whole_unsigned<const N: usize>(
        x: [*const u32; N],
        stride: usize,
        weights: *const u8,
        sums: *mut Sums,
    );
    /// To be called after others.
    unsafe fn release();
}

/// How weights of one format meet records: at most two tiles of sums per limb.
trait Format<L: Lanes> {
    /// Bytes of a slab.
    const BYTES: usize;
    /// Words of a record.
    const WORDS: usize;
    /// Columns that are summed up before scales apply.
    const COLUMNS: usize;

    /// Where a slab lies as lines of bytes, in `room` if need be, and its scales.
    ///
    /// # Safety
    /// As for a [`crate::products::PanelKernel`].
    unsafe fn decode(slab: *const u8, room: *mut u8) -> (*const u8, [L; 2]);

    /// The tiles of `groups` groups, whose first records are `x`; where there are fewer, the last one repeats.
    ///
    /// # Safety
    /// As for [`Tiles`].
    unsafe fn multiply<T: Tiles>(x: [*const u32; GROUPS], groups: usize, weights: *const u8, sums: *mut Sums);

    /// The total of one token plus its sums.
    ///
    /// # Safety
    /// `sums` is where row `t` of the first tile lies, and the next tiles behind it.
    unsafe fn add(sums: *const i32, scales: &[L; 2], record: *const u32, total: L) -> L;
}

/// Words between the same row of the same group in two kinds of sums.
const KIND: usize = GROUPS * ROWS * LANES;

#[repr(align(64))]
struct Aligned<T>(T);

/// See [`crate::products::PanelKernel`].
#[inline(always)]
unsafe fn panel_sums<L: Lanes, T: Tiles, F: Format<L>>(
    panel: Panel,
    x: Records<'_>,
    sums: *mut [f32; LANES],
) {
    assert!(x.tokens <= MOST_TOKENS, "no more tokens than a product takes at a time");
    // Two slabs: the sums of one are added while tiles multiply the next one.
    let mut found = Aligned([const { MaybeUninit::<[[Sums; GROUPS]; 6]>::uninit() }; 2]);
    let mut room = Aligned([0u8; LANES * COLUMNS]);
    let count = if x.tokens < ROWS { x.tokens } else { ROWS };
    let groups = x.tokens.div_ceil(ROWS);
    // Groups end where the tokens end: the last one may begin among the tokens of the one before.
    let mut starts = [0; GROUPS];
    let mut g = 0;
    while g < GROUPS {
        let first = (if g < groups { g } else { groups - 1 }) * ROWS;
        starts[g] = if first + count <= x.tokens { first } else { x.tokens - count };
        g += 1;
    }
    // SAFETY: the contract of `PanelKernel`; sums are read after tiles have written them.
    unsafe {
        T::configure(count, F::COLUMNS);
        for p in 0..panel.count {
            let sums = sums.add(p * MOST_TOKENS);
            for t in 0..x.tokens {
                L::splat(0.0).store(sums.add(t).cast());
            }
            let mut slab = panel.data.add(p * panel.slabs * F::BYTES);
            let mut records = x.start;
            let mut scales = [[L::splat(0.0); 2]; 2];
            for s in 0..panel.slabs {
                products::ask::<L>(slab, F::BYTES);
                let (weights, of_slab) = F::decode(slab, room.0.as_mut_ptr());
                scales[s % 2] = of_slab;
                let mut firsts = [records; GROUPS];
                let mut g = 0;
                while g < GROUPS {
                    firsts[g] = records.wrapping_add(starts[g] * F::WORDS);
                    g += 1;
                }
                F::multiply::<T>(firsts, groups, weights, found.0[s % 2].as_mut_ptr().cast());
                if s > 0 {
                    let (found, before) = (found.0[1 - s % 2].as_ptr(), records.wrapping_sub(x.stride));
                    add_all::<L, F>(found.cast(), &scales[1 - s % 2], before, sums, &starts, x.tokens);
                }
                slab = slab.add(F::BYTES);
                records = records.wrapping_add(x.stride);
            }
            if panel.slabs > 0 {
                let last = (panel.slabs - 1) % 2;
                let (found, before) = (found.0[last].as_ptr(), records.wrapping_sub(x.stride));
                add_all::<L, F>(found.cast(), &scales[last], before, sums, &starts, x.tokens);
            }
        }
        T::release();
    }
}

/// Adds what tiles have found for each token once.
#[inline(always)]
unsafe fn add_all<L: Lanes, F: Format<L>>(
    found: *const i32,
    scales: &[L; 2],
    records: *const u32,
    sums: *mut [f32; LANES],
    starts: &[usize; GROUPS],
    tokens: usize,
) {
    let mut t = 0;
    while t < tokens {
        // SAFETY: the contract of `PanelKernel`; the tile of the token's group has a row for it.
        unsafe {
            let row = t / ROWS * ROWS + t - starts[t / ROWS];
            let total = sums.add(t).cast::<f32>();
            let record = records.add(t * F::WORDS);
            F::add(found.add(row * LANES), scales, record, L::load(total)).store(total);
        }
        t += 1;
    }
}

/// See [`products::e2m1`].
#[inline(always)]
pub(crate) unsafe fn e2m1<L: Lanes, T: Tiles, const MX: bool, const LIMBS: usize>(
    panel: Panel,
    x: Records<'_>,
    sums: *mut [f32; LANES],
) {
    // SAFETY: the contract of `PanelKernel`.
    unsafe { panel_sums::<L, T, E2m1<MX, LIMBS>>(panel, x, sums) }
}

struct E2m1<const MX: bool, const LIMBS: usize>;

impl<const MX: bool, const LIMBS: usize> E2m1<MX, LIMBS> {
    /// Whether both halves have one scale and are summed up together.
    const WHOLE: bool = MX && LIMBS < 3;
}

impl<L: Lanes, const MX: bool, const LIMBS: usize> Format<L> for E2m1<MX, LIMBS> {
    const BYTES: usize = if MX { LANES } else { 2 * LANES } + CODE_BYTES;
    const WORDS: usize = Words::<LIMBS>::COUNT;
    const COLUMNS: usize = if Self::WHOLE { 32 } else { 16 };

    #[inline(always)]
    unsafe fn decode(slab: *const u8, room: *mut u8) -> (*const u8, [L; 2]) {
        // SAFETY: the contract; the room is as large as the columns of sixteen rows.
        unsafe {
            let scales = products::e2m1_scales::<L, MX>(slab);
            let codes = slab.add(if MX { LANES } else { 2 * LANES });
            for k in 0..4 {
                L::store_e2m1(codes.add(64 * k), room.add(128 * k));
            }
            (room, scales)
        }
    }

    #[inline(always)]
    unsafe fn multiply<T: Tiles>(
        x: [*const u32; GROUPS],
        groups: usize,
        weights: *const u8,
        sums: *mut Sums,
    ) {
        let stride = 4 * Words::<LIMBS>::COUNT;
        for limb in 0..LIMBS {
            // SAFETY: the contract; a limb has eight words.
            unsafe {
                let [a, b, c, d] =
                    [x[0].add(8 * limb), x[1].add(8 * limb), x[2].add(8 * limb), x[3].add(8 * limb)];
                if Self::WHOLE {
                    let sums = sums.add(limb * GROUPS);
                    match groups {
                        1 => T::whole([a], stride, weights, sums),
                        2 => T::whole([a, b], stride, weights, sums),
                        _ => T::whole([a, b, c, d], stride, weights, sums),
                    }
                } else {
                    let sums = sums.add(2 * limb * GROUPS);
                    if groups == 1 {
                        T::halves([a], stride, weights, sums);
                    } else {
                        T::halves([a, b], stride, weights, sums);
                    }
                    if groups > 2 {
                        T::halves([c, d], stride, weights, sums.add(2));
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn add(sums: *const i32, scales: &[L; 2], record: *const u32, total: L) -> L {
        // SAFETY: the contract.
        unsafe {
            let scale = L::splat(record.add(Words::<LIMBS>::SCALE).cast::<f32>().read());
            if Self::WHOLE {
                products::e2m1_whole(limbs::<L, LIMBS>(sums, KIND), scales[0], scale, total)
            } else {
                let sums = [limbs::<L, LIMBS>(sums, 2 * KIND), limbs::<L, LIMBS>(sums.add(KIND), 2 * KIND)];
                products::e2m1_halves(sums, *scales, scale, total)
            }
        }
    }
}

/// The sums of all limbs, those of the next one `step` words behind.
#[inline(always)]
unsafe fn limbs<L: Lanes, const LIMBS: usize>(sums: *const i32, step: usize) -> L::Ints {
    // SAFETY: the contract of `Format::add`.
    unsafe {
        let mut sum = L::load_ints(sums.add((LIMBS - 1) * step));
        for limb in (0..LIMBS - 1).rev() {
            sum = L::add_ints(L::load_ints(sums.add(limb * step)), L::shift_byte(sum));
        }
        sum
    }
}

/// See [`products::int8`].
#[inline(always)]
pub(crate) unsafe fn int8<L: Lanes, T: Tiles, const LIMBS: usize>(
    panel: Panel,
    x: Records<'_>,
    sums: *mut [f32; LANES],
) {
    // SAFETY: the contract of `PanelKernel`.
    unsafe { panel_sums::<L, T, Int8<LIMBS>>(panel, x, sums) }
}

struct Int8<const LIMBS: usize>;

impl<L: Lanes, const LIMBS: usize> Format<L> for Int8<LIMBS> {
    const BYTES: usize = LANES * COLUMNS;
    const WORDS: usize = Words::<LIMBS>::COUNT;
    const COLUMNS: usize = 32;

    #[inline(always)]
    unsafe fn decode(slab: *const u8, _room: *mut u8) -> (*const u8, [L; 2]) {
        // SAFETY: the contract.
        (slab, [unsafe { L::splat(1.0) }; 2])
    }

    #[inline(always)]
    unsafe fn multiply<T: Tiles>(
        x: [*const u32; GROUPS],
        groups: usize,
        weights: *const u8,
        sums: *mut Sums,
    ) {
        let stride = 4 * Words::<LIMBS>::COUNT;
        for limb in 0..LIMBS {
            // SAFETY: the contract; a limb has eight words.
            unsafe {
                let sums = sums.add(limb * GROUPS);
                let [a, b, c, d] =
                    [x[0].add(8 * limb), x[1].add(8 * limb), x[2].add(8 * limb), x[3].add(8 * limb)];
                match groups {
                    1 => T::whole_unsigned([a], stride, weights, sums),
                    2 => T::whole_unsigned([a, b], stride, weights, sums),
                    _ => T::whole_unsigned([a, b, c, d], stride, weights, sums),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn add(sums: *const i32, _scales: &[L; 2], record: *const u32, total: L) -> L {
        // SAFETY: the contract.
        unsafe {
            let mut limbs = [L::splat_ints(0); LIMBS];
            let mut l = 0;
            while l < LIMBS {
                let offset = record.add(Words::<LIMBS>::INT8 + l).cast::<i32>().read();
                limbs[l] = L::add_ints(L::load_ints(sums.add(l * KIND)), L::splat_ints(offset));
                l += 1;
            }
            let scale = L::splat(record.add(Words::<LIMBS>::SCALE).cast::<f32>().read());
            products::int8_whole(limbs, scale, total)
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use amx::Amx;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};
    use std::sync::OnceLock;

    use super::{Aligned, Sums, Tiles};

    /// The tiles of the CPU: 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights.
    pub(crate) struct Amx;

    impl Amx {
        /// Whether the CPU has tiles of bytes, and the system lets this process use them, which it must be asked for once.
        pub(crate) fn is_available() -> bool {
            static AVAILABLE: OnceLock<bool> = OnceLock::new();
            const REQUEST: libc::c_int = 0x1023; // ARCH_REQ_XCOMP_PERM
            const TILE_DATA: libc::c_ulong = 18;
            const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
            *AVAILABLE.get_or_init(|| {
                __get_cpuid_max(0).0 >= 7
                    && __cpuid_count(7, 0).edx & TILE_AND_INT8 == TILE_AND_INT8
                    // SAFETY: it only enlarges what the system saves of this process's registers.
                    && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) } == 0
            })
        }
    }

    /// A product in assembly. Each is complete in itself: nothing is left in a tile for the next.
    macro_rules! products {
        ($weights:expr, $sums:expr, $stride:expr, [$($x:ident),*], $($line:expr),* $(,)?) => {
            asm!(
                $($line,)*
                $($x = in(reg) $x,)*
                stride = in(reg) $stride,
                weights = in(reg) $weights,
                sums = in(reg) $sums,
                line = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            )
        };
    }

    macro_rules! whole {
        ($name:ident, $instruction:literal) => {
            #[inline(always)]
            unsafe fn $name<const N: usize>(
                x: [*const u32; N],
                stride: usize,
                weights: *const u8,
                sums: *mut Sums,
            ) {
                // SAFETY: the trait's contract.
                unsafe {
                    match *x.as_slice() {
                        [a] => products!(
                            weights,
                            sums,
                            stride,
                            [a],
                            "tileloadd tmm6, [{weights} + {line}*1]",
                            "tilezero tmm0",
                            "tileloadd tmm4, [{a} + {stride}*1]",
                            concat!($instruction, " tmm0, tmm4, tmm6"),
                            "tilestored [{sums} + {line}*1], tmm0",
                        ),
                        [a, b] => products!(
                            weights,
                            sums,
                            stride,
                            [a, b],
                            "tileloadd tmm6, [{weights} + {line}*1]",
                            "tilezero tmm0",
                            "tileloadd tmm4, [{a} + {stride}*1]",
                            concat!($instruction, " tmm0, tmm4, tmm6"),
                            "tilezero tmm1",
                            "tileloadd tmm5, [{b} + {stride}*1]",
                            concat!($instruction, " tmm1, tmm5, tmm6"),
                            "tilestored [{sums} + {line}*1], tmm0",
                            "tilestored [{sums} + {line}*1 + 1024], tmm1",
                        ),
                        [a, b, c, d] => products!(
                            weights,
                            sums,
                            stride,
                            [a, b, c, d],
                            "tileloadd tmm6, [{weights} + {line}*1]",
                            "tilezero tmm0",
                            "tileloadd tmm4, [{a} + {stride}*1]",
                            concat!($instruction, " tmm0, tmm4, tmm6"),
                            "tilezero tmm1",
                            "tileloadd tmm5, [{b} + {stride}*1]",
                            concat!($instruction, " tmm1, tmm5, tmm6"),
                            "tilezero tmm2",
                            "tileloadd tmm4, [{c} + {stride}*1]",
                            concat!($instruction, " tmm2, tmm4, tmm6"),
                            "tilezero tmm3",
                            "tileloadd tmm5, [{d} + {stride}*1]",
                            concat!($instruction, " tmm3, tmm5, tmm6"),
                            "tilestored [{sums} + {line}*1], tmm0",
                            "tilestored [{sums} + {line}*1 + 1024], tmm1",
                            "tilestored [{sums} + {line}*1 + 2048], tmm2",
                            "tilestored [{sums} + {line}*1 + 3072], tmm3",
                        ),
                        _ => unreachable!("one, two or four groups"),
                    }
                }
            }
        };
    }

    impl Tiles for Amx {
        #[inline(always)]
        unsafe fn configure(tokens: usize, columns: usize) {
            let (tokens, columns) = (tokens as u8, columns as u8);
            // Palette 1, then the bytes per row of each tile in 16 bits from byte 16 on, and the rows from byte 48 on.
            let mut config = Aligned([0u8; 64]);
            config.0[0] = 1;
            let bytes = [64, 64, 64, 64, columns, columns, 64, 64];
            let rows = [tokens, tokens, tokens, tokens, tokens, tokens, columns / 4, columns / 4];
            let mut i = 0;
            while i < 8 {
                config.0[16 + 2 * i] = bytes[i];
                config.0[48 + i] = rows[i];
                i += 1;
            }
            // SAFETY: the trait's contract.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) config.0.as_ptr(), options(nostack, preserves_flags));
            }
        }

        #[inline(always)]
        unsafe fn halves<const N: usize>(
            x: [*const u32; N],
            stride: usize,
            weights: *const u8,
            sums: *mut Sums,
        ) {
            // SAFETY: the trait's contract.
            unsafe {
                match *x.as_slice() {
                    [a] => products!(
                        weights,
                        sums,
                        stride,
                        [a],
                        "tileloadd tmm6, [{weights} + {line}*1]",
                        "tileloadd tmm7, [{weights} + {line}*1 + 256]",
                        "tilezero tmm0",
                        "tileloadd tmm4, [{a} + {stride}*1]",
                        "tdpbssd tmm0, tmm4, tmm6",
                        "tilezero tmm1",
                        "tileloadd tmm5, [{a} + {stride}*1 + 16]",
                        "tdpbssd tmm1, tmm5, tmm7",
                        "tilestored [{sums} + {line}*1], tmm0",
                        "tilestored [{sums} + {line}*1 + 4096], tmm1",
                    ),
                    [a, b] => products!(
                        weights,
                        sums,
                        stride,
                        [a, b],
                        "tileloadd tmm6, [{weights} + {line}*1]",
                        "tileloadd tmm7, [{weights} + {line}*1 + 256]",
                        "tilezero tmm0",
                        "tileloadd tmm4, [{a} + {stride}*1]",
                        "tdpbssd tmm0, tmm4, tmm6",
                        "tilezero tmm1",
                        "tileloadd tmm5, [{a} + {stride}*1 + 16]",
                        "tdpbssd tmm1, tmm5, tmm7",
                        "tilezero tmm2",
                        "tileloadd tmm4, [{b} + {stride}*1]",
                        "tdpbssd tmm2, tmm4, tmm6",
                        "tilezero tmm3",
                        "tileloadd tmm5, [{b} + {stride}*1 + 16]",
                        "tdpbssd tmm3, tmm5, tmm7",
                        "tilestored [{sums} + {line}*1], tmm0",
                        "tilestored [{sums} + {line}*1 + 4096], tmm1",
                        "tilestored [{sums} + {line}*1 + 1024], tmm2",
                        "tilestored [{sums} + {line}*1 + 5120], tmm3",
                    ),
                    _ => unreachable!("one or two groups"),
                }
            }
        }

        whole!(whole, "tdpbssd");
        whole!(whole_unsigned, "tdpbsud");

        #[inline(always)]
        unsafe fn release() {
            // SAFETY: the trait's contract.
            unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::kernels::Isa;
    use crate::products::PanelKernel;
    use crate::records::{Kind, Layout};
    use crate::simd::Scalar;

    thread_local! {
        static TOKENS: Cell<usize> = const { Cell::new(0) };
        static WIDTH: Cell<usize> = const { Cell::new(0) };
    }

    /// Tiles as the manual describes them.
    struct Described;

    impl Described {
        unsafe fn dot(
            x: *const u32,
            stride: usize,
            weights: *const u8,
            columns: usize,
            value: fn(u8) -> i32,
            sums: *mut Sums,
        ) {
            for (t, r) in (0..TOKENS.get()).flat_map(|t| (0..LANES).map(move |r| (t, r))) {
                let products = (0..columns).map(|c| {
                    // SAFETY: the trait's contract.
                    let (x, w) = unsafe {
                        (*x.cast::<i8>().add(t * stride + c), *weights.add(64 * (c / 4) + 4 * r + c % 4))
                    };
                    i32::from(x) * value(w)
                });
                // SAFETY: as above.
                unsafe { (*sums)[t][r] = products.sum() };
            }
        }
    }

    impl Tiles for Described {
        unsafe fn configure(tokens: usize, columns: usize) {
            assert!((1..=ROWS).contains(&tokens) && [16, 32].contains(&columns));
            TOKENS.set(tokens);
            WIDTH.set(columns);
        }
        unsafe fn halves<const N: usize>(
            x: [*const u32; N],
            stride: usize,
            weights: *const u8,
            sums: *mut Sums,
        ) {
            assert!(N <= 2 && WIDTH.get() == 16);
            for (i, x) in x.into_iter().enumerate() {
                // SAFETY: the trait's contract.
                unsafe {
                    Described::dot(x, stride, weights, 16, |w| i32::from(w as i8), sums.add(i));
                    let (x, weights, sums) = (x.add(4), weights.add(256), sums.add(GROUPS + i));
                    Described::dot(x, stride, weights, 16, |w| i32::from(w as i8), sums);
                }
            }
        }
        unsafe fn whole<const N: usize>(
            x: [*const u32; N],
            stride: usize,
            weights: *const u8,
            sums: *mut Sums,
        ) {
            assert!([1, 2, 4].contains(&N) && WIDTH.get() == 32);
            for (i, x) in x.into_iter().enumerate() {
                // SAFETY: the trait's contract.
                unsafe { Described::dot(x, stride, weights, 32, |w| i32::from(w as i8), sums.add(i)) };
            }
        }
        unsafe fn whole_unsigned<const N: usize>(
            x: [*const u32; N],
            stride: usize,
            weights: *const u8,
            sums: *mut Sums,
        ) {
            assert!([1, 2, 4].contains(&N) && WIDTH.get() == 32);
            for (i, x) in x.into_iter().enumerate() {
                // SAFETY: the trait's contract.
                unsafe { Described::dot(x, stride, weights, 32, i32::from, sums.add(i)) };
            }
        }
        unsafe fn release() {
            assert_ne!(TOKENS.replace(0), 0);
        }
    }

    #[test]
    fn tiles_give_the_bits_of_vectors() {
        check::<1>();
        check::<2>();
        check::<3>();
    }

    fn check<const LIMBS: usize>() {
        const SLABS: usize = 3;
        let scalar = Isa::Scalar.kernels().unwrap();
        let kernels: [(PanelKernel, PanelKernel, usize); 3] = [
            (scalar.nvfp4[LIMBS - 1], e2m1::<Scalar, Described, false, LIMBS>, 288),
            (scalar.mxfp4[LIMBS - 1], e2m1::<Scalar, Described, true, LIMBS>, 272),
            (scalar.int8[LIMBS - 1], int8::<Scalar, Described, LIMBS>, 512),
        ];
        let mut state = 9u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        for (expected, found, slab_bytes) in kernels {
            let data: Vec<u8> = (0..2 * SLABS * slab_bytes).map(|_| random() & 0x7e).collect();
            let panel = Panel { data: data.as_ptr(), slabs: SLABS, count: 2 };
            for tokens in [1, 3, 15, 16, 17, 31, 40, 64] {
                let layout = Layout { kind: Kind::Limbs(LIMBS), tokens, cols: SLABS * COLUMNS };
                let mut words = vec![0; layout.len()];
                for t in 0..tokens {
                    let x: Vec<f32> = (0..layout.cols).map(|_| f32::from(random()) - 120.7).collect();
                    // SAFETY: the words are those of the layout.
                    unsafe { layout.write(scalar, t, &x, words.as_mut_ptr()) };
                }
                let run = |kernel: PanelKernel| {
                    let mut sums = vec![[0.0f32; LANES]; MOST_TOKENS + tokens];
                    // SAFETY: panels and records have as many slabs, and every token a place.
                    unsafe { kernel(panel, layout.records(&words), sums.as_mut_ptr()) };
                    sums[..tokens]
                        .iter()
                        .chain(&sums[MOST_TOKENS..])
                        .flatten()
                        .copied()
                        .map(f32::to_bits)
                        .collect::<Vec<_>>()
                };
                assert!(run(found) == run(expected), "{LIMBS} limbs, {tokens} tokens, {slab_bytes} bytes");
            }
        }
    }
}
