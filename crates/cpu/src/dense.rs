//! Products of f32 matrices, for calibration: `out = a bᵀ`, where both have their rows in memory one after the other.
//!
//! Each element is a sum in one order, so results do not depend on the instruction set or the number of threads.

use crate::kernels::{COLUMNS, DenseSums, Isa, ROWS};
use crate::packed::Output;
use crate::pool::Pool;
use crate::simd::LANES;

/// A matrix of f32: rows of `cols` values, `stride` apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// All of `values` as rows of `cols`, a multiple of 16.
    pub fn new(values: &'a [f32], cols: usize) -> Rows<'a> {
        Rows::within(values, values.len() / cols.max(1), cols, cols)
    }

    /// `rows` rows of `cols` values, a multiple of 16, that begin `stride` apart.
    pub fn within(values: &'a [f32], rows: usize, cols: usize, stride: usize) -> Rows<'a> {
        assert!(
            cols.is_multiple_of(LANES) && cols <= stride,
            "rows of a multiple of 16 values within their stride"
        );
        assert!(rows == 0 || (rows - 1) * stride + cols <= values.len(), "rows within the slice");
        Rows { values, rows, cols, stride }
    }

    fn at(&self, row: usize, col: usize) -> *const f32 {
        self.values[row * self.stride + col..].as_ptr()
    }
}

/// What happens with the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// It replaces what is there.
    Set,
    /// It is added.
    Add,
    /// It is subtracted.
    Subtract,
}

/// Columns summed up in one go: with 48 rows of `b` they fit the second-level cache beside those of a task.
const DEPTH: usize = 512;

/// Rows of `a` per task.
const A_ROWS: usize = 64;

/// `out[i · stride + j] (=, +=, -=) Σ_k a[i, k] · b[j, k]`.
pub fn products(pool: &Pool, a: Rows<'_>, b: Rows<'_>, out: &mut [f32], stride: usize, update: Update) {
    assert_eq!(a.cols, b.cols, "matrices of the same depth");
    if a.rows == 0 || b.rows == 0 {
        return;
    }
    assert!(
        b.rows <= stride && (a.rows - 1) * stride + b.rows <= out.len(),
        "an output of the product's shape"
    );
    let kernels = Isa::best().kernels().expect("the best instruction set is available");
    let out = Output::new(out);
    let panels = b.rows.div_ceil(COLUMNS);
    let mut packed = vec![0.0; panels * COLUMNS * DEPTH.min(a.cols)];
    // A product over no columns still sets its output.
    for k in (0..a.cols.max(1)).step_by(DEPTH) {
        let depth = DEPTH.min(a.cols - k);
        let panel_len = depth * COLUMNS;
        let panel = Output::new(&mut packed);
        pool.run(panels, &|task| {
            // SAFETY: this task alone has this panel.
            let panel = unsafe { panel.slice(task * panel_len, panel_len) };
            transpose(b, task * COLUMNS, k, panel);
        });
        pool.run(a.rows.div_ceil(A_ROWS), &|task| {
            let rows = task * A_ROWS..((task + 1) * A_ROWS).min(a.rows);
            for j in (0..b.rows).step_by(COLUMNS) {
                let width = COLUMNS.min(b.rows - j);
                let panel = packed[j * depth..][..panel_len].as_ptr();
                for i in rows.clone().step_by(ROWS) {
                    let height = ROWS.min(rows.end - i);
                    let a_rows = std::array::from_fn(|r| a.at(i + r.min(height - 1), k));
                    let mut sums: DenseSums = [[0.0; COLUMNS]; ROWS];
                    // SAFETY: the instruction set is available; each row has `depth` values from column `k` on.
                    unsafe { (kernels.dense)(a_rows, panel, depth, &mut sums) };
                    for (r, sums) in sums.iter().enumerate().take(height) {
                        // SAFETY: this task alone has these rows.
                        let out = unsafe { out.slice((i + r) * stride + j, width) };
                        for (out, sum) in out.iter_mut().zip(sums) {
                            match update {
                                Update::Set if k == 0 => *out = *sum,
                                Update::Set | Update::Add => *out += sum,
                                Update::Subtract => *out -= sum,
                            }
                        }
                    }
                }
            }
        });
    }
}

/// Rows `row ..` of `b` from column `col` on, column by column: what is beyond the last row stays as it is, for nobody reads its
/// sums.
fn transpose(b: Rows<'_>, row: usize, col: usize, panel: &mut [f32]) {
    for (r, row) in (row..b.rows.min(row + COLUMNS)).enumerate() {
        let values = &b.values[row * b.stride + col..];
        for (to, value) in panel.iter_mut().skip(r).step_by(COLUMNS).zip(values) {
            *to = *value;
        }
    }
}
