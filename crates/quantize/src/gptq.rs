//! Rounding with error feedback: GPTQ on NVFP4's grid, block scales chosen by its own loss, and refinement of what it found.

use std::sync::{Mutex, PoisonError};

use cpu::{Pool, Rows, Update, products};
use numerics::nvfp4::{self, BLOCK};
use numerics::{e2m1, e4m3};

use crate::factor::Factor;
use crate::rounded::Rounded;

/// Columns between two products over all earlier errors; a multiple of a block.
const LAZY: usize = 128;

/// Rows that one task of the pool takes.
const ROWS_PER_TASK: usize = 16;

/// Scales that are tried side by side, around the byte of the max rule: the winners lie between -2 and +6 of it.
const CANDIDATES: usize = 16;
const BELOW: i32 = 4;

/// How block scales are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scales {
    /// By the static max rule from the weights, before any rounding: Model Optimizer's.
    Max,
    /// For each block the one with which the feedback itself loses least.
    Searched,
}

/// Rounds `weights` (`[rows, cols]`) column by column, each column's target moved by the errors of those before it.
/// `amax` is the largest magnitude that the global scale stands for.
pub(crate) fn round(pool: &Pool, weights: &[f32], factor: &Factor, amax: f32, scales: Scales) -> Rounded {
    let cols = factor.cols;
    let rows = weights.len() / cols;
    let grid = Grid::new(amax);
    let blocks: Vec<Triangle> = (0..cols).step_by(BLOCK).map(|at| Triangle::of(factor, at)).collect();
    let mut errors = vec![0.0; rows * cols];
    let mut out = Rounded { codes: vec![0; rows * cols / 2], scales: vec![0; rows * cols / BLOCK] };
    for first in (0..cols).step_by(LAZY) {
        let end = (first + LAZY).min(cols);
        let width = end - first;
        let mut targets: Vec<f32> =
            weights.chunks_exact(cols).flat_map(|row| &row[first..end]).copied().collect();
        if first > 0 {
            let earlier = Rows::within(&errors, rows, first, cols);
            let feedback = Rows::within(&factor.feedback[first * cols..], width, first, cols);
            products(pool, earlier, feedback, &mut targets, width, Update::Add);
        }
        for_each_row(pool, cols, &mut targets, &mut errors, &mut out, &|row, part| {
            let weights = &weights[row * cols..][..cols];
            for at in (first..end).step_by(BLOCK) {
                let mut target = [0.0f32; BLOCK];
                for (j, target) in target.iter_mut().enumerate() {
                    let feedback = &factor.feedback[(at + j) * cols..];
                    let moved: f32 = (first..at).map(|i| part.errors[i] * feedback[i]).sum();
                    *target = part.targets[at + j - first] + moved;
                }
                let own = block(weights, at);
                let found = match scales {
                    Scales::Max => {
                        blocks[at / BLOCK].round(&grid, &target, own, [grid.max_rule(own); CANDIDATES])
                    }
                    Scales::Searched => {
                        blocks[at / BLOCK].round(&grid, &target, own, grid.candidates(&target))
                    }
                };
                part.store(at, &found);
                for (j, value) in found.values.iter().enumerate() {
                    part.errors[at + j] = own[j] - value;
                }
            }
        });
    }
    out
}

/// Takes the columns in which all `weights` are zero out of a second moment: they stay zero and make up for no other's error.
pub(crate) fn leave_out_zeros(moment: &mut [f32], weights: &[f32], cols: usize) {
    let mut zero = vec![true; cols];
    for row in weights.chunks_exact(cols) {
        zero.iter_mut().zip(row).for_each(|(zero, &weight)| *zero &= weight == 0.0);
    }
    for at in (0..cols).filter(|&at| zero[at]) {
        moment[at * cols..][..cols].fill(0.0);
        moment.iter_mut().skip(at).step_by(cols).for_each(|h| *h = 0.0);
        moment[at * cols + at] = 1.0;
    }
}

/// Goes over all blocks `passes` times and rounds each anew, scale included, to what compensates the errors of all others
/// best (coordinate descent on `e H eᵀ`); a block keeps its codes where nothing better is found, so the loss never grows.
pub(crate) fn refine(
    pool: &Pool,
    weights: &[f32],
    factor: &Factor,
    amax: f32,
    rounded: &mut Rounded,
    passes: usize,
) {
    let cols = factor.cols;
    let rows = weights.len() / cols;
    let grid = Grid::new(amax);
    let blocks: Vec<Square> = (0..cols).step_by(BLOCK).map(|at| Square::of(factor, at)).collect();
    let mut errors = rounded.values(grid.global_scale);
    errors.iter_mut().zip(weights).for_each(|(error, weight)| *error = weight - *error);
    for _ in 0..passes {
        for first in (0..cols).step_by(LAZY) {
            let end = (first + LAZY).min(cols);
            let width = end - first;
            // The pull of all errors on these columns: e H.
            let mut pulls = vec![0.0; rows * width];
            let moment = Rows::within(&factor.moment[first * cols..], width, cols, cols);
            products(pool, Rows::new(&errors, cols), moment, &mut pulls, width, Update::Set);
            for_each_row(pool, cols, &mut pulls, &mut errors, rounded, &|_, part| {
                for at in (first..end).step_by(BLOCK) {
                    let square = &blocks[at / BLOCK];
                    let before: [f32; BLOCK] = *block(part.errors, at);
                    // Without its own part, the pull says where the block should lie: w + pull · H⁻¹.
                    let mut pull = *block(part.targets, at - first);
                    let own = square.times(&before);
                    pull.iter_mut().zip(own).for_each(|(pull, own)| *pull -= own);
                    let shift = square.solve(&pull);
                    let old = part.values(at, grid.global_scale);
                    let target: [f32; BLOCK] = std::array::from_fn(|j| before[j] + old[j] + shift[j]);
                    let found = square.triangle.round(&grid, &target, &target, grid.candidates(&target));
                    let distance: [f32; BLOCK] = std::array::from_fn(|j| target[j] - old[j]);
                    // Not where either is beyond F32, as the target itself may be.
                    let better = found.loss < square.loss(&distance);
                    if !better {
                        continue;
                    }
                    part.store(at, &found);
                    let change: [f32; BLOCK] = std::array::from_fn(|j| old[j] - found.values[j]);
                    for (j, change) in change.iter().enumerate() {
                        part.errors[at + j] += change;
                        let moment = &factor.moment[(at + j) * cols..][first..end];
                        part.targets.iter_mut().zip(moment).for_each(|(pull, m)| *pull += change * m);
                    }
                }
            });
        }
    }
}

/// What one row of a pass works on.
struct Part<'a> {
    /// The columns of this pass.
    targets: &'a mut [f32],
    /// All columns.
    errors: &'a mut [f32],
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl Part<'_> {
    fn store(&mut self, at: usize, found: &Found) {
        self.scales[at / BLOCK] = found.scale;
        for (pair, code) in found.levels.chunks_exact(2).zip(&mut self.codes[at / 2..][..BLOCK / 2]) {
            *code = e2m1::encode(pair[0]) | (e2m1::encode(pair[1]) << 4);
        }
    }

    fn values(&self, at: usize, global_scale: f32) -> [f32; BLOCK] {
        let mut values = [0.0; BLOCK];
        nvfp4::dequantize(
            &self.codes[at / 2..][..BLOCK / 2],
            &self.scales[at / BLOCK..=at / BLOCK],
            global_scale,
            &mut values,
        );
        values
    }
}

/// Calls `work(row, part)` for every row, in parallel.
fn for_each_row(
    pool: &Pool,
    cols: usize,
    targets: &mut [f32],
    errors: &mut [f32],
    out: &mut Rounded,
    work: &(dyn Fn(usize, &mut Part<'_>) + Sync),
) {
    let width = targets.len() / (errors.len() / cols);
    let tasks: Vec<_> = targets
        .chunks_mut(ROWS_PER_TASK * width)
        .zip(errors.chunks_mut(ROWS_PER_TASK * cols))
        .zip(out.codes.chunks_mut(ROWS_PER_TASK * cols / 2))
        .zip(out.scales.chunks_mut(ROWS_PER_TASK * cols / BLOCK))
        .map(Mutex::new)
        .collect();
    pool.run(tasks.len(), &|task| {
        let mut own = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
        let (((targets, errors), codes), scales) = &mut *own;
        let rows = targets
            .chunks_exact_mut(width)
            .zip(errors.chunks_exact_mut(cols))
            .zip(codes.chunks_exact_mut(cols / 2))
            .zip(scales.chunks_exact_mut(cols / BLOCK));
        for (r, (((targets, errors), codes), scales)) in rows.enumerate() {
            work(task * ROWS_PER_TASK + r, &mut Part { targets, errors, codes, scales });
        }
    });
}

/// The scales that a tensor's blocks can have.
struct Grid {
    amax: f32,
    global_scale: f32,
}

impl Grid {
    fn new(amax: f32) -> Grid {
        Grid { amax, global_scale: nvfp4::static_global_scale(amax, nvfp4::STATIC_MAX_SCALE) }
    }

    fn max_rule(&self, values: &[f32]) -> u8 {
        nvfp4::static_block_scale(nvfp4::amax(values), self.amax, nvfp4::STATIC_MAX_SCALE)
    }

    fn candidates(&self, values: &[f32]) -> [u8; CANDIDATES] {
        let center = i32::from(self.max_rule(values));
        std::array::from_fn(|c| (center - BELOW + c as i32).clamp(1, 0x7e) as u8)
    }
}

/// A rounded block.
struct Found {
    scale: u8,
    /// The E2M1 values.
    levels: [f32; BLOCK],
    /// These times the scale.
    values: [f32; BLOCK],
    loss: f32,
}

/// The unit triangle and the pivots that spread errors within one block.
struct Triangle {
    /// Row `j`: what the errors of earlier columns add to column `j`.
    feedback: [[f32; BLOCK]; BLOCK],
    pivots: [f32; BLOCK],
}

impl Triangle {
    /// Of the block that begins at column `at`, as a part of the whole.
    fn of(factor: &Factor, at: usize) -> Triangle {
        Triangle {
            feedback: std::array::from_fn(|j| *block(&factor.feedback, (at + j) * factor.cols + at)),
            pivots: *block(&factor.pivots, at),
        }
    }

    /// Rounds `target` with each of the scales, column by column with feedback, and takes the first that loses least. An error
    /// is counted from `origin`.
    fn round(
        &self,
        grid: &Grid,
        target: &[f32; BLOCK],
        origin: &[f32; BLOCK],
        scales: [u8; CANDIDATES],
    ) -> Found {
        let s = scales.map(|byte| e4m3::decode(byte) * grid.global_scale);
        let mut levels = [[0.0f32; CANDIDATES]; BLOCK];
        let mut errors = [[0.0f32; CANDIDATES]; BLOCK];
        let mut loss = [0.0f32; CANDIDATES];
        for j in 0..BLOCK {
            let mut goal = [target[j]; CANDIDATES];
            for (errors, feedback) in errors[..j].iter().zip(&self.feedback[j]) {
                for (goal, error) in goal.iter_mut().zip(errors) {
                    *goal += error * feedback;
                }
            }
            for c in 0..CANDIDATES {
                let level = e2m1::nearest(goal[c] / s[c]);
                let value = level * s[c];
                let rest = goal[c] - value;
                loss[c] += rest * rest * self.pivots[j];
                levels[j][c] = level;
                errors[j][c] = origin[j] - value;
            }
        }
        let mut best = 0;
        for c in 1..CANDIDATES {
            if loss[c] < loss[best] {
                best = c;
            }
        }
        // Beyond F32, or so small that F32 has only 0 for them, losses say nothing, and the max rule decides.
        if loss.iter().all(|&loss| loss == 0.0 || loss == f32::INFINITY) && *target != [0.0; BLOCK] {
            best = BELOW as usize;
        }
        let levels = levels.map(|of_column| of_column[best]);
        Found { scale: scales[best], levels, values: levels.map(|l| l * s[best]), loss: loss[best] }
    }
}

/// One block of the moment by itself.
struct Square {
    moment: [[f32; BLOCK]; BLOCK],
    inverse: [[f32; BLOCK]; BLOCK],
    triangle: Triangle,
}

impl Square {
    fn of(factor: &Factor, at: usize) -> Square {
        let moment: [[f32; BLOCK]; BLOCK] =
            std::array::from_fn(|j| *block(&factor.moment, (at + j) * factor.cols + at));
        // M D Mᵀ from the last column to the first; the damping keeps the pivots positive.
        let mut rest = moment.map(|row| row.map(f64::from));
        let mut unit = [[0.0f64; BLOCK]; BLOCK];
        let mut pivots = [0.0f64; BLOCK];
        for j in (0..BLOCK).rev() {
            pivots[j] = rest[j][j].max(f64::from(f32::MIN_POSITIVE));
            for i in 0..=j {
                unit[i][j] = rest[i][j] / pivots[j];
            }
            for a in 0..j {
                for b in 0..j {
                    rest[a][b] -= unit[a][j] * unit[b][j] * pivots[j];
                }
            }
        }
        let mut inverse = [[0.0f32; BLOCK]; BLOCK];
        for (c, column) in inverse.iter_mut().enumerate() {
            let mut x = [0.0f64; BLOCK];
            x[c] = 1.0;
            for i in (0..BLOCK).rev() {
                x[i] -= (i + 1..BLOCK).map(|k| unit[i][k] * x[k]).sum::<f64>();
            }
            (0..BLOCK).for_each(|i| x[i] /= pivots[i]);
            for i in 0..BLOCK {
                x[i] -= (0..i).map(|k| unit[k][i] * x[k]).sum::<f64>();
            }
            *column = x.map(|v| v as f32);
        }
        let feedback =
            std::array::from_fn(|j| std::array::from_fn(|i| if i < j { unit[i][j] as f32 } else { 0.0 }));
        Square { moment, inverse, triangle: Triangle { feedback, pivots: pivots.map(|p| p as f32) } }
    }

    fn times(&self, x: &[f32; BLOCK]) -> [f32; BLOCK] {
        combine(&self.moment, x)
    }

    fn solve(&self, x: &[f32; BLOCK]) -> [f32; BLOCK] {
        combine(&self.inverse, x)
    }

    fn loss(&self, x: &[f32; BLOCK]) -> f32 {
        self.times(x).iter().zip(x).map(|(a, b)| a * b).sum()
    }
}

/// The sum of the rows of a symmetric matrix, each times an entry of `x`.
fn combine(matrix: &[[f32; BLOCK]; BLOCK], x: &[f32; BLOCK]) -> [f32; BLOCK] {
    let mut out = [0.0; BLOCK];
    for (row, x) in matrix.iter().zip(x) {
        out.iter_mut().zip(row).for_each(|(out, m)| *out += m * x);
    }
    out
}

fn block(values: &[f32], at: usize) -> &[f32; BLOCK] {
    values[at..].first_chunk().expect("a row is a whole number of blocks")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(weights: &[f32], values: &[f32], factor: &Factor) -> f64 {
        let cols = factor.cols;
        let mut sum = 0.0;
        for (w, v) in weights.chunks_exact(cols).zip(values.chunks_exact(cols)) {
            let e: Vec<f64> = w.iter().zip(v).map(|(w, v)| f64::from(w - v)).collect();
            for i in 0..cols {
                let row = &factor.moment[i * cols..][..cols];
                sum += e[i] * row.iter().zip(&e).map(|(m, e)| f64::from(*m) * e).sum::<f64>();
            }
        }
        sum
    }

    const COLS: usize = 160;
    const ROWS: usize = 24;

    /// Weights, and a factor of the second moment of what they see.
    fn layer(pool: &Pool) -> (Vec<f32>, Factor) {
        let tokens = 320;
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        // Correlated inputs, as a layer sees them.
        let shared: Vec<f32> = (0..tokens).map(|_| next()).collect();
        let x: Vec<f32> =
            (0..COLS).flat_map(|_| shared.iter().map(|s| 0.5 * s + next()).collect::<Vec<_>>()).collect();
        let weights: Vec<f32> = (0..ROWS * COLS).map(|_| next() * next()).collect();
        let mut moment = vec![0.0; COLS * COLS];
        products(pool, Rows::new(&x, tokens), Rows::new(&x, tokens), &mut moment, COLS, Update::Set);
        (weights, Factor::new(pool, moment, COLS, 0.01).unwrap())
    }

    #[test]
    fn each_step_loses_less_than_the_one_before() {
        let pool = Pool::new(2);
        let (weights, factor) = layer(&pool);
        let amax = nvfp4::amax(&weights);
        let global = nvfp4::static_global_scale(amax, nvfp4::STATIC_MAX_SCALE);

        let (mut codes, mut scales) = (vec![0; ROWS * COLS / 2], vec![0; ROWS * COLS / BLOCK]);
        nvfp4::quantize(&weights, nvfp4::global_scale(amax), &mut codes, &mut scales);
        let nearest = loss(&weights, &Rounded { codes, scales }.values(global), &factor);
        let plain =
            loss(&weights, &round(&pool, &weights, &factor, amax, Scales::Max).values(global), &factor);
        let mut searched = round(&pool, &weights, &factor, amax, Scales::Searched);
        let with_scales = loss(&weights, &searched.values(global), &factor);
        let one = round(&Pool::new(1), &weights, &factor, amax, Scales::Searched);
        assert_eq!(one, searched, "any number of threads gives the same bits");
        refine(&pool, &weights, &factor, amax, &mut searched, 2);
        let refined = loss(&weights, &searched.values(global), &factor);
        assert!(plain < 0.9 * nearest, "{plain} {nearest}");
        assert!(with_scales < 0.95 * plain, "{with_scales} {plain}");
        assert!(refined < 0.97 * with_scales, "{refined} {with_scales}");
    }

    #[test]
    fn where_losses_are_beyond_f32_the_scales_are_those_of_the_max_rule() {
        let pool = Pool::new(2);
        let (ordinary, factor) = layer(&pool);
        for exponent in [-110, 110, 123] {
            let weights: Vec<f32> = ordinary.iter().map(|w| w * 2f32.powi(exponent)).collect();
            let amax = nvfp4::amax(&weights);
            let global = nvfp4::static_global_scale(amax, nvfp4::STATIC_MAX_SCALE);
            let plain = round(&pool, &weights, &factor, amax, Scales::Max).values(global);
            let mut searched = round(&pool, &weights, &factor, amax, Scales::Searched);
            refine(&pool, &weights, &factor, amax, &mut searched, 2);
            let (plain, refined) =
                (loss(&weights, &plain, &factor), loss(&weights, &searched.values(global), &factor));
            assert!(refined < 1.05 * plain, "2^{exponent}: {refined} {plain}");
        }
    }
}
