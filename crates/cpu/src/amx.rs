//! Products with activations in BF16 by Intel's AMX, which multiplies tiles: activations of sixteen tokens, weights of sixteen rows, 32
//! columns of both at a time. The sums stay in tiles.

use std::arch::asm;
use std::ops::Range;
use std::sync::LazyLock;

use crate::products::{MOST_TOKENS, Panel, Panels, Part, Put, Slab, ask};
use crate::records::COLUMNS;
use crate::simd::{LANES, Lanes};

/// Rows of a tile, and bytes of one of its rows.
const TILE_ROWS: usize = 16;
const ROW_BYTES: usize = 64;

/// Whether the CPU has AMX for BF16, and the system lets this process use it, for which it is asked here.
pub(crate) static IS_AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_os = "linux")]
    {
        // CPUID leaf 7: AMX-BF16 and AMX-TILE.
        const FEATURES: u32 = 1 << 22 | 1 << 24;
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XTILEDATA: libc::c_long = 18;
        let (most, _) = std::arch::x86_64::__get_cpuid_max(0);
        most >= 7
            && std::arch::x86_64::__cpuid_count(7, 0).edx & FEATURES == FEATURES
            // SAFETY: permits larger states of the process's threads; where there are none of these it fails.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) } == 0
    }
    #[cfg(not(target_os = "linux"))]
    false
});

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// A slab of weights as a tile: row `k` has the columns `2 k` and `2 k + 1` of all rows of the panel.
#[repr(C, align(64))]
struct Tile([u16; LANES * COLUMNS]);

impl<L: Lanes> Put<L> for Tile {
    #[inline(always)]
    unsafe fn put(&mut self, pair: usize, weights: [L; 2]) {
        // SAFETY: there are sixteen pairs of 32 numbers.
        unsafe { L::store_bf16(weights, self.0.as_mut_ptr().add(pair * 2 * LANES)) };
    }
}

/// Slabs of which the activations of a block are multiplied with all panels before the next ones: they stay in the first-level cache.
const CHUNK: usize = 8;

/// As [`crate::products::by_bf16`], to the same bits.
///
/// # Safety
/// As for a [`crate::products::PanelKernel`]; AMX [is available](IS_AVAILABLE).
#[inline(always)]
pub(crate) unsafe fn by_bf16<L: Lanes, S: Slab<L>>(panels: Panels, x: Part<'_>, sums: *mut [f32; LANES]) {
    const { assert!(MOST_TOKENS == 4 * TILE_ROWS) };
    // SAFETY: the contract.
    unsafe {
        match x.tokens {
            1..=16 => product::<L, S, 1>(panels, x, sums),
            17..=32 => product::<L, S, 2>(panels, x, sums),
            33..=48 => product::<L, S, 3>(panels, x, sums),
            49..=64 => product::<L, S, 4>(panels, x, sums),
            tokens => panic!("{tokens} tokens, more than a product takes at a time"),
        }
    }
}

/// `GROUPS` of sixteen tokens, of the last of which some may be missing. Tiles 0 to 3 have their sums, 4 the weights, 5 and 6 in turn the
/// activations of whole groups, 7 those of the last one.
///
/// # Safety
/// As for [`by_bf16`]; there are so many groups.
#[inline(always)]
unsafe fn product<L: Lanes, S: Slab<L>, const GROUPS: usize>(
    panels: Panels,
    x: Part<'_>,
    sums: *mut [f32; LANES],
) {
    let mut config =
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let last = (x.tokens - TILE_ROWS * (GROUPS - 1)) as u8;
    config.row_bytes[..8].fill(ROW_BYTES as u16);
    config.rows[..8].fill(TILE_ROWS as u8);
    (config.rows[GROUPS - 1], config.rows[7]) = (last, last);
    // Few tokens' activations stay there anyway, and their weights come from memory, in order.
    let chunk = if GROUPS == 1 { panels.first.slabs } else { CHUNK };
    let mut tiles = [const { Tile([0; LANES * COLUMNS]) }; 2];
    // SAFETY: the contract; the compiler uses no tiles, so they keep what they have from one statement to the next.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly));
        for first in (0..panels.first.slabs).step_by(chunk) {
            let slabs = first..(first + chunk).min(panels.first.slabs);
            for p in 0..panels.count {
                let sums = sums.add(p * MOST_TOKENS);
                panel::<L, S, GROUPS>(panels.panel(p), slabs.clone(), x, &mut tiles, sums);
            }
        }
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// Does an instruction with the tile of each group's sums, whose number comes between the texts, and with their place in memory.
macro_rules! each_group {
    ($sums:expr, $before:literal, $after:literal) => {
        each_group!($sums, $before, $after, 0, 1, 2, 3)
    };
    ($sums:expr, $before:literal, $after:literal, $($group:literal),*) => {
        $(if $group < GROUPS {
            asm!(
                concat!($before, $group, $after),
                at = in(reg) $sums.wrapping_add($group * TILE_ROWS),
                stride = in(reg) ROW_BYTES,
                options(nostack),
            );
        })*
    };
}

/// Adds to the sums in tile `$sums` the products of the tokens whose records begin at `$from`, which come to tile `$x`.
macro_rules! multiply {
    ($sums:literal, $x:literal, $from:expr) => {
        asm!(
            concat!("tileloadd tmm", $x, ", [{from} + {stride}]"),
            concat!("tdpbf16ps tmm", $sums, ", tmm", $x, ", tmm4"),
            from = in(reg) $from,
            stride = in(reg) ROW_BYTES,
            options(nostack),
        )
    };
}

/// Some slabs of one panel; the sums go on from what they are, but with the first slab. `tiles` is room for weights.
///
/// # Safety
/// As for [`product`], which has told the CPU what the tiles are.
#[inline(always)]
unsafe fn panel<L: Lanes, S: Slab<L>, const GROUPS: usize>(
    panel: Panel,
    slabs: Range<usize>,
    x: Part<'_>,
    tiles: &mut [Tile; 2],
    sums: *mut [f32; LANES],
) {
    // SAFETY: the contract.
    unsafe {
        if slabs.start == 0 {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        } else {
            each_group!(sums, "tileloadd tmm", ", [{at} + {stride}]");
        }
        let mut slab = panel.data.wrapping_add(slabs.start * S::BYTES);
        let mut records = x.start.wrapping_add(slabs.start * x.stride);
        if !S::PAIRS {
            S::each(slab, &mut tiles[0]);
        }
        for s in 0..slabs.len() {
            ask::<L>(slab, S::BYTES);
            let mut weights = slab.cast::<u16>();
            slab = slab.wrapping_add(S::BYTES);
            if !S::PAIRS {
                // One ahead, so that what is loaded has long been stored.
                if s + 1 < slabs.len() {
                    S::each(slab, &mut tiles[(s + 1) % 2]);
                }
                weights = tiles[s % 2].0.as_ptr();
            }
            asm!(
                "tileloadd tmm4, [{from} + {stride}]",
                from = in(reg) weights,
                stride = in(reg) ROW_BYTES,
                options(nostack),
            );
            let group = |g: usize| records.wrapping_add(g * TILE_ROWS * ROW_BYTES / 4);
            match GROUPS {
                1 => multiply!(0, 7, group(0)),
                2 => {
                    multiply!(0, 5, group(0));
                    multiply!(1, 7, group(1));
                }
                3 => {
                    multiply!(0, 5, group(0));
                    multiply!(1, 6, group(1));
                    multiply!(2, 7, group(2));
                }
                _ => {
                    multiply!(0, 5, group(0));
                    multiply!(1, 6, group(1));
                    multiply!(2, 5, group(2));
                    multiply!(3, 7, group(3));
                }
            }
            records = records.wrapping_add(x.stride);
        }
        each_group!(sums, "tilestored [{at} + {stride}], tmm", "");
    }
}
