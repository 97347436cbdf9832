//! Rows of a checkpoint's matrix turned into a panel, at the speed of memory: see `products.rs` for how a panel looks.
//!
//! Four bytes of a row are what a panel keeps together, so each kernel is a transposition of words with something done to
//! them before or after. Panels begin as zeros: columns that do not exist stay that.

use std::ops::Range;

use crate::products::CODE_BYTES;
use crate::records::{COLUMNS, INT8_OFFSET};
use crate::simd::{LANES, Lanes, ROUND};

/// Bytes per row that are turned at a time: sixteen words.
const CHUNK: usize = 4 * LANES;

/// The rows of one panel.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Those that do not exist are zeros.
    pub(crate) rows: [&'a [u8]; LANES],
    /// How far behind those of the next panel lie, which are asked for.
    pub(crate) ahead: usize,
}

impl Rows<'_> {
    fn len(&self) -> usize {
        self.rows[0].len()
    }
}

/// What is done with the words `4 u ..` of sixteen rows, word `u` of each.
trait Line {
    /// # Safety
    /// As for [`turn`].
    unsafe fn put<L: Lanes>(&self, u: usize, words: L::Ints);
}

/// Hands the words of all rows to `line`, what is missing of the last one being zeros.
///
/// # Safety
/// The CPU has the features of the lanes; what `line` writes is valid.
#[inline(always)]
unsafe fn turn<L: Lanes, T: Line>(rows: &Rows<'_>, line: &T) {
    let len = rows.len();
    let mut from = 0;
    while from < len {
        let mut part = [[0u8; CHUNK]; LANES];
        let mut starts = [std::ptr::null(); LANES];
        let whole = from + CHUNK <= len;
        let mut r = 0;
        while r < LANES {
            assert!(rows.rows[r].len() == len, "rows of one length");
            if whole {
                starts[r] = rows.rows[r].as_ptr().wrapping_add(from);
                // SAFETY: the CPU has the features; the address need not be valid.
                unsafe { L::prefetch(starts[r].wrapping_add(rows.ahead)) };
            } else {
                part[r][..len - from].copy_from_slice(&rows.rows[r][from..]);
                starts[r] = part[r].as_ptr();
            }
            r += 1;
        }
        // SAFETY: each start has 64 valid bytes; the rest is the contract.
        unsafe {
            let lines = L::transpose(&starts);
            let count = (len - from).div_ceil(4);
            let mut u = 0;
            while u < LANES {
                if u < count {
                    line.put::<L>(from / 4 + u, lines[u]);
                }
                u += 1;
            }
        }
        from += CHUNK;
    }
}

/// One line of a panel after the other.
struct Lines(*mut u8);

impl Line for Lines {
    #[inline(always)]
    unsafe fn put<L: Lanes>(&self, u: usize, words: L::Ints) {
        // SAFETY: the contract.
        unsafe { L::store_ints(words, self.0.add(CHUNK * u).cast()) }
    }
}

/// Eight columns of E2M1 codes are a line.
struct Codes {
    out: *mut u8,
    /// Scales per row and slab.
    blocks: usize,
}

impl Line for Codes {
    #[inline(always)]
    unsafe fn put<L: Lanes>(&self, u: usize, words: L::Ints) {
        let at = u / 4 * (self.blocks * LANES + CODE_BYTES) + self.blocks * LANES + u % 4 * CHUNK;
        // SAFETY: the contract.
        unsafe { L::store_ints(L::fold_nibbles(words), self.out.add(at).cast()) }
    }
}

/// A word is four scales, each of which goes beside its codes.
struct Scales {
    out: *mut u8,
    blocks: usize,
    /// Scales per row.
    count: usize,
}

impl Line for Scales {
    #[inline(always)]
    unsafe fn put<L: Lanes>(&self, u: usize, words: L::Ints) {
        let mut bytes = [[0u8; LANES]; 4];
        // SAFETY: the CPU has the features; the array has 64 bytes.
        unsafe { L::split_bytes(words, bytes.as_mut_ptr().cast()) };
        let mut b = 0;
        while b < 4 {
            let scale = 4 * u + b;
            if scale < self.count {
                let at =
                    scale / self.blocks * (self.blocks * LANES + CODE_BYTES) + scale % self.blocks * LANES;
                // SAFETY: the contract.
                unsafe { self.out.add(at).cast::<[u8; LANES]>().write_unaligned(bytes[b]) };
            }
            b += 1;
        }
    }
}

/// A panel of E2M1 codes with `blocks` scales per row and 32 columns.
///
/// # Safety
/// The CPU has the features of the lanes. Panics if `out` is not as long as the slabs of the rows.
#[inline(always)]
pub(crate) unsafe fn e2m1<L: Lanes>(codes: &Rows<'_>, scales: &Rows<'_>, blocks: usize, out: &mut [u8]) {
    let slabs = codes.len().div_ceil(COLUMNS / 2);
    assert!(scales.len() <= slabs * blocks, "scales of the rows");
    assert!(out.len() == slabs * (blocks * LANES + CODE_BYTES), "a panel of the rows");
    let out = out.as_mut_ptr();
    // SAFETY: a word of codes is a line of its slab, and a scale sixteen bytes of it; all are within the panel.
    unsafe {
        turn::<L, _>(scales, &Scales { out, blocks, count: scales.len() });
        turn::<L, _>(codes, &Codes { out, blocks });
    }
}

/// E2M1 codes and their scales that lie input by input: a line has a byte of every row.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    /// Two columns per line.
    pub(crate) codes: &'a [u8],
    /// Of 32 columns so many lines as [`e2m1`] has `blocks`.
    pub(crate) scales: &'a [u8],
    pub(crate) rows: usize,
    pub(crate) blocks: usize,
    /// Whether rows alternate between two panels.
    pub(crate) paired: bool,
}

/// Columns that are turned at a time, whose lines are read side by side: as many as make whole cache lines of a panel.
const TURNED: usize = 4 * COLUMNS;

/// How far ahead in each line bytes are asked for: lines are too many for the hardware to see where they go.
const AHEAD: usize = 256;

/// What [`TURNED`] columns are in a panel, until it is written past the caches.
#[repr(align(64))]
struct Part([u8; TURNED / COLUMNS * (2 * LANES + CODE_BYTES)]);

/// All panels of a matrix that lies input by input.
///
/// # Safety
/// As for [`e2m1`]. Panics if `out` is not as long as the panels, or if lines or pairs of panels are not whole.
#[inline(always)]
pub(crate) unsafe fn e2m1_by_inputs<L: Lanes>(inputs: &Inputs<'_>, out: &mut [u8]) {
    let Inputs { codes, scales, rows, blocks, paired } = *inputs;
    let width = if paired { 2 * LANES } else { LANES };
    let (lines, scale_lines) = (codes.len() / rows, scales.len() / rows);
    let slabs = lines.div_ceil(COLUMNS / 2);
    let slab_bytes = blocks * LANES + CODE_BYTES;
    let panel_bytes = slabs * slab_bytes;
    assert!((codes.len(), scales.len()) == (lines * rows, scale_lines * rows), "whole lines");
    assert!(lines.is_multiple_of(4) && blocks <= 2 && scale_lines <= slabs * blocks, "scales of the lines");
    assert!(!paired || rows.is_multiple_of(width), "pairs of panels");
    assert!(out.len() == rows.div_ceil(LANES) * panel_bytes, "panels of the rows");
    let out = out.as_mut_ptr();
    for slab in (0..slabs).step_by(TURNED / COLUMNS) {
        let end = (slab + TURNED / COLUMNS).min(slabs);
        let code_lines = slab * COLUMNS / 2..(end * COLUMNS / 2).min(lines);
        let scale_lines = slab * blocks..(end * blocks).min(scale_lines);
        for row in (0..rows).step_by(width) {
            let mut parts = [const { Part([0; _]) }, const { Part([0; _]) }];
            let [first, second] = &mut parts;
            let (first, second) = (first.0.as_mut_ptr(), second.0.as_mut_ptr());
            let mut rest = [[0; LANES]; 4];
            // SAFETY: a line of codes or scales has bytes of all rows. Four lines of codes are a line of their slab, a line of
            // scales is sixteen bytes of it; both are within the part, and the part within its panel.
            unsafe {
                let mut line = code_lines.start;
                while line < code_lines.end {
                    let from = four_lines::<L>(codes, rows, line..line + 4, row..row + width, &mut rest);
                    let at = line / (COLUMNS / 2) - slab;
                    let at = at * slab_bytes + blocks * LANES + line % (COLUMNS / 2) / 4 * CHUNK;
                    if paired {
                        let [even, odd] = L::weave_pairs(&from);
                        L::store_ints(L::fold_nibbles(even), first.add(at).cast());
                        L::store_ints(L::fold_nibbles(odd), second.add(at).cast());
                    } else {
                        L::store_ints(L::fold_nibbles(L::weave(&from)), first.add(at).cast());
                    }
                    line += 4;
                }
                let mut line = scale_lines.start;
                while line < scale_lines.end {
                    let count = (scale_lines.end - line).min(4);
                    let from = four_lines::<L>(scales, rows, line..line + count, row..row + width, &mut rest);
                    let mut bytes = [[0u8; LANES]; 8];
                    if paired {
                        let [even, odd] = L::weave_pairs(&from);
                        L::split_bytes(even, bytes.as_mut_ptr().cast());
                        L::split_bytes(odd, bytes[4..].as_mut_ptr().cast());
                    } else {
                        L::split_bytes(L::weave(&from), bytes.as_mut_ptr().cast());
                    }
                    let mut b = 0;
                    while b < count {
                        let at = ((line + b) / blocks - slab) * slab_bytes + (line + b) % blocks * LANES;
                        first.add(at).cast::<[u8; LANES]>().write_unaligned(bytes[b]);
                        second.add(at).cast::<[u8; LANES]>().write_unaligned(bytes[4 + b]);
                        b += 1;
                    }
                    line += 4;
                }
                let len = (end - slab) * slab_bytes;
                let to = out.add(row / LANES * panel_bytes + slab * slab_bytes);
                L::stream(first, to, len);
                if paired {
                    L::stream(second, to.add(panel_bytes), len);
                }
            }
        }
    }
    // SAFETY: the CPU has the features.
    unsafe { L::end_of_stream() };
}

/// Where the bytes of some rows begin in four lines; where there are fewer lines, in the last of them again. What lies further on in
/// the lines is asked for.
///
/// # Safety
/// The CPU has the features of the lanes.
#[inline(always)]
unsafe fn four_lines<L: Lanes>(
    bytes: &[u8],
    rows: usize,
    lines: Range<usize>,
    part: Range<usize>,
    rest: &mut [[u8; LANES]; 4],
) -> [*const u8; 4] {
    let mut starts = [bytes.as_ptr(); 4];
    let mut b = 0;
    while b < 4 {
        let line = if lines.start + b < lines.end { lines.start + b } else { lines.end - 1 };
        let at = line * rows + part.start;
        starts[b] = starts[b].wrapping_add(at);
        if part.start.is_multiple_of(CHUNK) {
            // SAFETY: the CPU has the features; the address need not be valid.
            unsafe { L::prefetch(starts[b].wrapping_add(AHEAD)) };
        }
        if part.end > rows {
            // The last rows, which do not fill a panel: with zeros behind.
            rest[b][..rows - part.start].copy_from_slice(&bytes[at..][..rows - part.start]);
            starts[b] = rest[b].as_ptr();
        }
        b += 1;
    }
    starts
}

/// A panel of BF16.
///
/// # Safety
/// As for [`e2m1`].
#[inline(always)]
pub(crate) unsafe fn bf16<L: Lanes>(values: &Rows<'_>, out: &mut [u8]) {
    assert!(out.len() >= values.len().div_ceil(4) * CHUNK, "a panel of the rows");
    // SAFETY: as many lines as there are words.
    unsafe { turn::<L, _>(values, &Lines(out.as_mut_ptr())) };
}

/// A panel of eight bits plus 128 from rows of BF16, and the scale of each row.
///
/// # Safety
/// As for [`e2m1`].
#[inline(always)]
pub(crate) unsafe fn int8<L: Lanes>(values: &Rows<'_>, out: &mut [u8], scales: &mut [f32; LANES]) {
    let cols = values.len() / 2;
    let width = cols.next_multiple_of(COLUMNS);
    assert!(out.len() == width * LANES, "a panel of the rows");
    let mut bytes = vec![INT8_OFFSET as u8; width * LANES];
    for r in 0..LANES {
        assert!(values.rows[r].len() == 2 * cols, "rows of one length");
        let (from, to) = (values.rows[r].as_ptr().cast::<u16>(), bytes[r * width..].as_mut_ptr());
        let mut largest = 0;
        for c in 0..cols {
            // SAFETY: the row has so many values.
            let magnitude = unsafe { from.add(c).read_unaligned() } & 0x7fff;
            largest = if magnitude > largest { magnitude } else { largest };
        }
        let largest = f32::from_bits(u32::from(largest) << 16);
        scales[r] = largest / 127.0;
        let inverse = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
        for c in 0..cols {
            // SAFETY: as above, and so many bytes belong to the row. Adding the constant leaves the nearest integer in the
            // low bits, ties to even.
            unsafe {
                let value = f32::from_bits(u32::from(from.add(c).read_unaligned()) << 16);
                let rounded = value * inverse + ROUND;
                to.add(c).write((rounded.to_bits() as u8).wrapping_add(INT8_OFFSET as u8));
            }
        }
    }
    let rows = std::array::from_fn(|r| &bytes[r * width..][..width]);
    // SAFETY: as many lines as there are words.
    unsafe { turn::<L, _>(&Rows { rows, ahead: 0 }, &Lines(out.as_mut_ptr())) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;

    fn bytes(len: usize, seed: u32) -> Vec<u8> {
        let mut state = seed;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect()
    }

    fn rows(bytes: &[u8]) -> Rows<'_> {
        let len = bytes.len() / LANES;
        Rows { rows: std::array::from_fn(|r| &bytes[r * len..][..len]), ahead: len }
    }

    #[test]
    fn codes_and_scales_are_where_products_read_them() {
        for (cols, blocks) in [(32, 1), (64, 1), (288, 1), (2880, 1), (16, 2), (32, 2), (48, 2), (2880, 2)] {
            let per_row = cols * blocks / COLUMNS;
            let slabs = cols.div_ceil(COLUMNS);
            let (codes, scales) = (bytes(cols / 2 * LANES, 3), bytes(per_row * LANES, 5));
            for kernels in Isa::ALL.into_iter().filter_map(Isa::kernels) {
                let mut out = vec![0; slabs * (blocks * LANES + CODE_BYTES)];
                // SAFETY: the instruction set is available.
                unsafe { (kernels.pack_e2m1)(&rows(&codes), &rows(&scales), blocks, &mut out) };
                let slab_bytes = blocks * LANES + CODE_BYTES;
                for (row, col) in (0..LANES).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                    let slab = &out[col / COLUMNS * slab_bytes..][..slab_bytes];
                    let stored = codes[(row * cols + col) / 2] >> (4 * (col % 2)) & 15;
                    let at = col % COLUMNS;
                    let byte = slab[blocks * LANES + at / 8 * 64 + 4 * row + at % 4];
                    assert_eq!(if at % 8 < 4 { byte & 15 } else { byte >> 4 }, stored);
                    let scale = scales[row * per_row + col * blocks / COLUMNS];
                    let found = slab[at * blocks / COLUMNS * LANES + row];
                    assert_eq!(found, scale, "{:?}, {cols} columns", kernels.isa);
                }
            }
        }
    }

    #[test]
    fn lines_of_inputs_make_the_same_panels() {
        let shapes: [(usize, usize); 5] = [(32, 16), (48, 33), (96, 40), (160, 64), (2880, 16)];
        for ((cols, some), blocks, paired) in shapes
            .into_iter()
            .flat_map(|shape| [(shape, 1, false), (shape, 2, false), (shape, 1, true), (shape, 2, true)])
            .filter(|((cols, _), blocks, _)| (cols * blocks).is_multiple_of(COLUMNS))
        {
            let rows = if paired { 2 * LANES * some.div_ceil(16) } else { some };
            let (width, per_row) = (cols / 2, cols * blocks / COLUMNS);
            let (codes, scales) = (bytes(rows * width, 9), bytes(rows * per_row, 11));
            let turned = |bytes: &[u8], len: usize| -> Vec<u8> {
                (0..len).flat_map(|at| (0..rows).map(move |row| bytes[row * len + at])).collect()
            };
            let (by_width, by_scale) = (turned(&codes, width), turned(&scales, per_row));
            let panels = rows.div_ceil(LANES);
            let panel_bytes = cols.div_ceil(COLUMNS) * (blocks * LANES + CODE_BYTES);
            for kernels in Isa::ALL.into_iter().filter_map(Isa::kernels) {
                let (mut expected, mut found) =
                    (vec![0; panels * panel_bytes], vec![0; panels * panel_bytes]);
                let none = vec![0; width];
                for (panel, out) in expected.chunks_exact_mut(panel_bytes).enumerate() {
                    let part = |bytes, len| Rows {
                        rows: std::array::from_fn(|r| {
                            let row = if paired {
                                2 * (panel / 2 * LANES + r) + panel % 2
                            } else {
                                panel * LANES + r
                            };
                            if row < rows { &<[u8]>::as_ref(bytes)[row * len..][..len] } else { &none[..len] }
                        }),
                        ahead: len,
                    };
                    // SAFETY: the instruction set is available.
                    unsafe {
                        (kernels.pack_e2m1)(&part(&codes, width), &part(&scales, per_row), blocks, out)
                    };
                }
                let inputs = Inputs { codes: &by_width, scales: &by_scale, rows, blocks, paired };
                // SAFETY: as above.
                unsafe { (kernels.pack_e2m1_by_inputs)(&inputs, &mut found) };
                assert!(found == expected, "{:?}, {rows} × {cols}, {blocks}, {paired}", kernels.isa);
            }
        }
    }

    #[test]
    fn sixteen_bits_stay_and_eight_round_to_the_nearest() {
        for cols in [1, 2, 7, 31, 32, 33, 97, 160] {
            let values = bytes(2 * cols * LANES, 7);
            // Small exponents, so that nothing is NaN.
            let values: Vec<u8> = values.chunks(2).flat_map(|v| [v[0], v[1] & 0x83 | 0x3c]).collect();
            let value = |row: usize, col: usize| {
                let at = 2 * (row * cols + col);
                half::bf16::from_le_bytes([values[at], values[at + 1]]).to_f64()
            };
            let width = cols.next_multiple_of(COLUMNS);
            for kernels in Isa::ALL.into_iter().filter_map(Isa::kernels) {
                let mut wide = vec![0; 2 * width * LANES];
                let (mut narrow, mut scales) = (vec![0xee; width * LANES], [0.0; LANES]);
                // SAFETY: the instruction set is available.
                unsafe {
                    (kernels.pack_bf16)(&rows(&values), &mut wide);
                    (kernels.pack_int8)(&rows(&values), &mut narrow, &mut scales);
                }
                for row in 0..LANES {
                    let largest = (0..cols).map(|c| value(row, c).abs()).fold(0.0, f64::max);
                    assert!((f64::from(scales[row]) * 127.0 / largest - 1.0).abs() < 1e-6);
                    for col in 0..width {
                        let expected = if col < cols { value(row, col) } else { 0.0 };
                        let at = 2 * (col / 2 * 32 + 2 * row + col % 2);
                        let found = half::bf16::from_le_bytes([wide[at], wide[at + 1]]).to_f64();
                        assert_eq!(found, expected, "{:?}, row {row}, column {col}", kernels.isa);
                        let stored = f64::from(narrow[col / 4 * 64 + 4 * row + col % 4]) - 128.0;
                        let error = (expected / largest * 127.0 - stored).abs();
                        assert!(error < 0.5001, "{:?}, row {row}, column {col}: {error}", kernels.isa);
                    }
                }
            }
        }
    }
}
