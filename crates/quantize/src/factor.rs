//! The factorization that error feedback needs: `H = R Rᵀ` with `R` upper triangular.
//!
//! Columns are quantized in their natural order and the error of one is compensated by those after it. With `H = M D Mᵀ`
//! (`M` unit upper triangular, `D` diagonal) the loss `e H eᵀ` of a row's error `e` is `Σ_j D_j (Σ_{i≤j} e_i M_ij)²`, so the
//! best target of column `j` is `w_j + Σ_{i<j} e_i M_ij`. This is GPTQ (Frantar et al., 2022) without the inverse that its
//! text takes: its `U[j, i] / U[j, j]` are these, as QuIP (Chee et al., 2023) shows.

use cpu::{Pool, Rows, Update, products};

/// Columns that are factorized at a time.
const PANEL: usize = 64;

/// The factors of a damped second moment.
pub(crate) struct Factor {
    pub(crate) cols: usize,
    /// `H` itself with the damping, `[cols, cols]`.
    pub(crate) moment: Vec<f32>,
    /// `R`, `[cols, cols]`, zero below the diagonal.
    upper: Vec<f32>,
    /// `Mᵀ`, `[cols, cols]`: row `j` holds what the errors of earlier columns add to the target of column `j`.
    pub(crate) feedback: Vec<f32>,
    /// `D`.
    pub(crate) pivots: Vec<f32>,
}

impl Factor {
    /// Factorizes `moment` (`[cols, cols]`, symmetric) after adding `damping` times the mean of its diagonal to the diagonal. A
    /// matrix that is too close to singular for f32 is damped ten times as much, as often as needed.
    ///
    /// # Errors
    /// The mean of the diagonal, if that is not finite: no damping helps such a matrix.
    pub(crate) fn new(pool: &Pool, mut moment: Vec<f32>, cols: usize, damping: f32) -> Result<Factor, f32> {
        let mean = (0..cols).map(|i| f64::from(moment[i * cols + i])).sum::<f64>() / cols.max(1) as f64;
        if !mean.is_finite() {
            return Err(mean as f32);
        }
        // Inputs that were always zero carry no information: any diagonal does.
        let mean = if mean > f64::from(f32::MIN_POSITIVE) { mean as f32 } else { 1.0 };
        let mut added = damping * mean;
        loop {
            (0..cols).for_each(|i| moment[i * cols + i] += added);
            // Reversed rows and columns turn the upper factor into the ordinary lower one.
            let mut lower: Vec<f32> = moment.iter().rev().copied().collect();
            if cholesky(pool, &mut lower, cols) {
                return Ok(Factor::from_reversed(moment, &lower, cols));
            }
            added = 9.0 * added.max(f32::EPSILON * mean);
        }
    }

    fn from_reversed(moment: Vec<f32>, lower: &[f32], cols: usize) -> Factor {
        let mut upper = vec![0.0; cols * cols];
        let mut feedback = vec![0.0; cols * cols];
        for i in 0..cols {
            for j in i..cols {
                upper[i * cols + j] = lower[(cols - 1 - i) * cols + (cols - 1 - j)];
            }
        }
        let diagonal: Vec<f32> = (0..cols).map(|j| upper[j * cols + j]).collect();
        for j in 0..cols {
            for i in 0..j {
                feedback[j * cols + i] = upper[i * cols + j] / diagonal[j];
            }
        }
        let pivots = diagonal.iter().map(|d| d * d).collect();
        Factor { cols, moment, upper, feedback, pivots }
    }

    /// Solves `x H = b` for every row of `rows` in place.
    pub(crate) fn solve(&self, pool: &Pool, rows: &mut [f32]) {
        let cols = self.cols;
        let count = rows.len() / cols;
        // y Rᵀ = b from the last panel to the first, then x R = y... each with what is known subtracted by one product.
        let panels: Vec<usize> = (0..cols).step_by(PANEL).collect();
        for &first in panels.iter().rev() {
            let end = (first + PANEL).min(cols);
            let mut part = take(rows, cols, first, end);
            if end < cols {
                let known = Rows::within(&rows[end..], count, cols - end, cols);
                let factor = Rows::within(&self.upper[first * cols + end..], end - first, cols - end, cols);
                products(pool, known, factor, &mut part, end - first, Update::Subtract);
            }
            for row in part.chunks_exact_mut(end - first) {
                for j in (0..row.len()).rev() {
                    let at = (first + j) * cols + first;
                    let sum: f32 = (j + 1..row.len()).map(|k| self.upper[at + k] * row[k]).sum();
                    row[j] = (row[j] - sum) / self.upper[at + j];
                }
            }
            put(rows, cols, first, end, &part);
        }
        for &first in &panels {
            let end = (first + PANEL).min(cols);
            let width = end - first;
            let mut part = take(rows, cols, first, end);
            if first > 0 {
                // Rᵀ is the feedback times the diagonal of its row.
                let mut known = vec![0.0; part.len()];
                let x = Rows::within(rows, count, first, cols);
                let factor = Rows::within(&self.feedback[first * cols..], width, first, cols);
                products(pool, x, factor, &mut known, width, Update::Set);
                for (row, known) in part.chunks_exact_mut(width).zip(known.chunks_exact(width)) {
                    for (j, (row, known)) in row.iter_mut().zip(known).enumerate() {
                        *row -= known * self.upper[(first + j) * cols + first + j];
                    }
                }
            }
            for row in part.chunks_exact_mut(width) {
                for j in 0..width {
                    let sum: f32 = (0..j).map(|k| self.upper[(first + k) * cols + first + j] * row[k]).sum();
                    row[j] = (row[j] - sum) / self.upper[(first + j) * cols + first + j];
                }
            }
            put(rows, cols, first, end, &part);
        }
    }
}

fn take(rows: &[f32], cols: usize, first: usize, end: usize) -> Vec<f32> {
    rows.chunks_exact(cols).flat_map(|row| &row[first..end]).copied().collect()
}

fn put(rows: &mut [f32], cols: usize, first: usize, end: usize, part: &[f32]) {
    for (row, part) in rows.chunks_exact_mut(cols).zip(part.chunks_exact(end - first)) {
        row[first..end].copy_from_slice(part);
    }
}

/// Replaces the lower triangle of `a` (`[n, n]`, symmetric) by its Cholesky factor; false if a pivot is not positive.
fn cholesky(pool: &Pool, a: &mut [f32], n: usize) -> bool {
    for first in (0..n).step_by(PANEL) {
        let end = (first + PANEL).min(n);
        let width = end - first;
        for j in first..end {
            let mut pivot = f64::from(a[j * n + j]);
            for k in first..j {
                pivot -= f64::from(a[j * n + k]).powi(2);
            }
            if pivot.is_nan() || pivot <= f64::from(f32::MIN_POSITIVE) {
                return false;
            }
            let root = pivot.sqrt();
            a[j * n + j] = root as f32;
            for i in j + 1..n {
                let mut sum = a[i * n + j];
                for k in first..j {
                    sum -= a[i * n + k] * a[j * n + k];
                }
                a[i * n + j] = (f64::from(sum) / root) as f32;
            }
        }
        if end < n {
            let panel = take(&a[end * n..], n, first, end);
            let rows = Rows::new(&panel, width);
            products(pool, rows, rows, &mut a[end * n + end..], n, Update::Subtract);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factors_multiply_to_the_matrix_and_solve_it() {
        let (pool, cols, rows) = (Pool::new(2), 176, 5);
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let x: Vec<f32> = (0..cols * 400).map(|_| next()).collect();
        let mut moment = vec![0.0; cols * cols];
        products(&pool, Rows::new(&x, 400), Rows::new(&x, 400), &mut moment, cols, Update::Set);
        let factor = Factor::new(&pool, moment.clone(), cols, 0.01).unwrap();
        for i in 0..cols {
            for j in 0..cols {
                // M D Mᵀ, where Mᵀ has a unit diagonal that is not stored.
                let m =
                    |i: usize, k: usize| if i == k { 1.0 } else { f64::from(factor.feedback[k * cols + i]) };
                let sum: f64 =
                    (i.max(j)..cols).map(|k| m(i, k) * f64::from(factor.pivots[k]) * m(j, k)).sum();
                let expected = f64::from(factor.moment[i * cols + j]);
                assert!((sum - expected).abs() < 1e-3, "{i} {j}: {sum} {expected}");
            }
        }
        let b: Vec<f32> = (0..rows * cols).map(|_| next()).collect();
        let mut solved = b.clone();
        factor.solve(&pool, &mut solved);
        let mut back = vec![0.0; rows * cols];
        products(
            &pool,
            Rows::new(&solved, cols),
            Rows::new(&factor.moment, cols),
            &mut back,
            cols,
            Update::Set,
        );
        for (found, expected) in back.iter().zip(&b) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
    }

    #[test]
    fn a_singular_moment_is_damped_until_it_can_be_factorized() {
        let factor = Factor::new(&Pool::new(1), vec![0.0; 32 * 32], 32, 0.01).unwrap();
        assert!(factor.pivots.iter().all(|&d| d > 0.0 && d.is_finite()));
        let factor = Factor::new(&Pool::new(1), vec![1.0; 32 * 32], 32, 0.0).unwrap();
        assert!(factor.pivots.iter().all(|&d| d > 0.0 && d.is_finite()));
    }

    #[test]
    fn a_moment_that_is_not_finite_is_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut moment = vec![0.0; 32 * 32];
            moment[5 * 32 + 5] = bad;
            let found = Factor::new(&Pool::new(1), moment, 32, 0.01).err().unwrap();
            assert!(!found.is_finite());
        }
    }
}
