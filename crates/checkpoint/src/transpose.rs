//! Transposing a matrix between memory layouts, a tile at a time.

/// Writes the transpose of `source` (`rows × cols`, row-major) to `out` (`cols × rows`).
pub(crate) fn transpose<T: Copy>(source: &[T], rows: usize, cols: usize, out: &mut [T]) {
    assert!(source.len() == rows * cols && out.len() == rows * cols, "the buffers have the matrix's size");
    // A tile of bytes touches 64 cache lines on either side: both stay in the first-level cache.
    const TILE: usize = 64;
    for top in (0..rows).step_by(TILE) {
        let bottom = (top + TILE).min(rows);
        for left in (0..cols).step_by(TILE) {
            let right = (left + TILE).min(cols);
            for col in left..right {
                let column = &mut out[col * rows + top..col * rows + bottom];
                for (row, out) in (top..bottom).zip(column) {
                    *out = source[row * cols + col];
                }
            }
        }
    }
}
