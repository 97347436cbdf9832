//! A matrix as codes and scales, and the ways to round to it that look at each block alone.

use std::sync::{Mutex, PoisonError};

use cpu::Pool;
use numerics::nvfp4::{self, BLOCK};

/// The second moment of one block's inputs.
pub(crate) type Hessian = [[f32; BLOCK]; BLOCK];

/// A quantized matrix without its global scale.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rounded {
    /// `[rows, cols / 2]`
    pub(crate) codes: Vec<u8>,
    /// `[rows, cols / 16]`
    pub(crate) scales: Vec<u8>,
}

impl Rounded {
    /// So many zeros.
    pub(crate) fn zeros(values: usize) -> Rounded {
        Rounded { codes: vec![0; values / 2], scales: vec![nvfp4::ZERO_BLOCK_SCALE; values / BLOCK] }
    }

    /// Each block by its largest magnitude, `amax` being that of the whole; what is beyond it saturates.
    pub(crate) fn by_max_rule(weights: &[f32], amax: f32) -> Rounded {
        let mut rounded = Rounded::zeros(weights.len());
        if amax > 0.0 {
            let global_scale = nvfp4::global_scale(amax);
            nvfp4::quantize(weights, global_scale, &mut rounded.codes, &mut rounded.scales);
        }
        rounded
    }

    /// The values `[rows, cols]`.
    pub(crate) fn values(&self, global_scale: f32) -> Vec<f32> {
        let mut values = vec![0.0; self.codes.len() * 2];
        nvfp4::dequantize(&self.codes, &self.scales, global_scale, &mut values);
        values
    }
}

/// The blocks on the diagonal of a second moment `[cols, cols]`.
pub(crate) fn diagonal_blocks(second: &[f32], cols: usize) -> Vec<Hessian> {
    let row = |at: usize, i: usize| *second[(at + i) * cols + at..].first_chunk().expect("whole blocks");
    (0..cols).step_by(BLOCK).map(|at| std::array::from_fn(|i| row(at, i))).collect()
}

/// Each block with the scale of the smallest squared error: of its weights or, with `hessians` (one for each block of a row),
/// of its product with the inputs.
pub(crate) fn sweep(
    pool: &Pool,
    weights: &[f32],
    cols: usize,
    amax: f32,
    hessians: Option<&[Hessian]>,
) -> Rounded {
    let global_scale = nvfp4::static_global_scale(amax, nvfp4::STATIC_MAX_SCALE);
    let search = nvfp4::ScaleSearch::new(amax, nvfp4::STATIC_MAX_SCALE);
    let mut rounded = Rounded::zeros(weights.len());
    let rows: Vec<_> = weights
        .chunks_exact(cols)
        .zip(rounded.codes.chunks_exact_mut(cols / 2))
        .zip(rounded.scales.chunks_exact_mut(cols / BLOCK))
        .map(Mutex::new)
        .collect();
    pool.run(rows.len(), &|row| {
        let mut row = rows[row].lock().unwrap_or_else(PoisonError::into_inner);
        let ((weights, codes), scales) = &mut *row;
        let blocks = weights.chunks_exact(BLOCK).zip(codes.chunks_exact_mut(BLOCK / 2));
        for (at, ((block, codes), scale)) in blocks.zip(scales.iter_mut()).enumerate() {
            *scale = match hessians {
                Some(hessians) => search.best_by_hessian(block, &hessians[at]),
                None => search.best_of_sweep(block, false),
            };
            nvfp4::encode_block(block, *scale, global_scale, codes);
        }
    });
    drop(rows);
    rounded
}
