//! Transposing a matrix between memory layouts, a tile at a time.

use bytemuck::{Pod, Zeroable};
use half::bf16;

use interleave::Vector;

/// Writes the transpose of `source` (`rows × cols`, row-major) to `out` (`cols × rows`).
pub(crate) fn transpose<T: Element>(source: &[T], rows: usize, cols: usize, out: &mut [T]) {
    assert!(source.len() == rows * cols && out.len() == rows * cols, "the buffers have the matrix's size");
    // A tile of bytes touches 64 cache lines on either side: both stay in the first-level cache.
    const TILE: usize = 64;
    for top in (0..rows).step_by(TILE) {
        for left in (0..cols).step_by(TILE) {
            for row in (top..(top + TILE).min(rows)).step_by(T::BLOCK) {
                for col in (left..(left + TILE).min(cols)).step_by(T::BLOCK) {
                    if row + T::BLOCK <= rows && col + T::BLOCK <= cols {
                        T::transpose_block(
                            &source[row * cols + col..],
                            cols,
                            &mut out[col * rows + row..],
                            rows,
                        );
                        continue;
                    }
                    for row in row..(row + T::BLOCK).min(rows) {
                        for col in col..(col + T::BLOCK).min(cols) {
                            out[col * rows + row] = source[row * cols + col];
                        }
                    }
                }
            }
        }
    }
}

/// What is transposed.
pub(crate) trait Element: Pod {
    /// Rows and columns of a block: a vector of 16 bytes.
    const BLOCK: usize = 16 / size_of::<Self>();

    /// Transposes a block at the beginning of `source`, whose rows are `stride` apart, to that of `out`.
    fn transpose_block(source: &[Self], stride: usize, out: &mut [Self], out_stride: usize);
}

impl Element for u8 {
    #[inline(always)]
    fn transpose_block(source: &[u8], stride: usize, out: &mut [u8], out_stride: usize) {
        block::<u8, 16>(source, stride, out, out_stride, interleave::bytes);
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn transpose_block(source: &[bf16], stride: usize, out: &mut [bf16], out_stride: usize) {
        block::<bf16, 8>(source, stride, out, out_stride, interleave::words);
    }
}

/// When every row has been interleaved with the one half the block behind it, as often as the block's size has bits, rows have
/// become columns.
#[inline(always)]
fn block<T: Pod, const N: usize>(
    source: &[T],
    stride: usize,
    out: &mut [T],
    out_stride: usize,
    interleave: impl Fn(Vector, Vector) -> [Vector; 2] + Copy,
) {
    let mut rows = [Vector::zeroed(); N];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&source[r * stride..][..N]));
    }
    // Written out, so that rows stay in registers.
    rows = round(round(round(rows, interleave), interleave), interleave);
    if N == 16 {
        rows = round(rows, interleave);
    }
    for (c, row) in rows.iter().enumerate() {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut out[c * out_stride..][..N]);
        *<&mut [u8; 16]>::try_from(bytes).expect("sixteen bytes") = bytemuck::cast(*row);
    }
}

#[inline(always)]
fn round<const N: usize>(
    rows: [Vector; N],
    interleave: impl Fn(Vector, Vector) -> [Vector; 2],
) -> [Vector; N] {
    let mut next = [Vector::zeroed(); N];
    for i in 0..N / 2 {
        [next[2 * i], next[2 * i + 1]] = interleave(rows[i], rows[i + N / 2]);
    }
    next
}

#[cfg(target_arch = "x86_64")]
mod interleave {
    use std::arch::x86_64::{
        __m128i, _mm_unpackhi_epi8, _mm_unpackhi_epi16, _mm_unpacklo_epi8, _mm_unpacklo_epi16,
    };

    /// Sixteen bytes.
    pub(super) type Vector = __m128i;

    /// The bytes of both, in turn.
    #[inline(always)]
    pub(super) fn bytes(a: Vector, b: Vector) -> [Vector; 2] {
        // SAFETY: every x86-64 has SSE2.
        unsafe { [_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)] }
    }

    /// The same with two bytes at a time.
    #[inline(always)]
    pub(super) fn words(a: Vector, b: Vector) -> [Vector; 2] {
        // SAFETY: as above.
        unsafe { [_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b)] }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod interleave {
    /// Sixteen bytes.
    pub(super) type Vector = [u8; 16];

    /// The bytes of both, in turn.
    pub(super) fn bytes(a: Vector, b: Vector) -> [Vector; 2] {
        [0, 8].map(|half| std::array::from_fn(|i| [a, b][i % 2][half + i / 2]))
    }

    /// The same with two bytes at a time.
    pub(super) fn words(a: Vector, b: Vector) -> [Vector; 2] {
        [0, 8].map(|half| std::array::from_fn(|i| [a, b][i / 2 % 2][half + i / 4 * 2 + i % 2]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns() {
        for (rows, cols) in [(1, 1), (16, 16), (8, 24), (17, 64), (64, 65), (130, 31), (96, 160)] {
            let bytes: Vec<u8> = (0..rows * cols).map(|i| (i * 7 % 251) as u8).collect();
            let words: Vec<bf16> =
                (0..rows * cols).map(|i| bf16::from_bits((i as u16).wrapping_mul(31))).collect();
            let (mut turned, mut turned_words) = (vec![0; bytes.len()], vec![bf16::ZERO; words.len()]);
            transpose(&bytes, rows, cols, &mut turned);
            transpose(&words, rows, cols, &mut turned_words);
            for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
                assert_eq!(turned[col * rows + row], bytes[row * cols + col]);
                assert_eq!(turned_words[col * rows + row].to_bits(), words[row * cols + col].to_bits());
            }
        }
    }
}
