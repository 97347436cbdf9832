//! AWQ (Lin et al., 2024) as Model Optimizer does it for NVFP4: scales for the columns of a matrix, and a clipped global scale.
//!
//! Both minimize the mean squared error of the product with the calibration inputs, `tr(d H dᵀ)` for an error `d` of the
//! weights and the second moment `H` of the inputs.

use cpu::{Pool, Rows, Update, products};
use numerics::nvfp4::{self, BLOCK};

use crate::moments::Moments;
use crate::rounded::Rounded;

/// Steps of the search for the exponent.
const STEPS: u32 = 10;

/// `pre_quant_scale`: what the inputs are multiplied by, and the columns of the weights divided by, before the max rule.
pub(crate) fn lite(pool: &Pool, weights: &[f32], moments: &Moments) -> Vec<f32> {
    let cols = moments.cols;
    let rows = weights.len() / cols;
    let mut relative = vec![0.0f64; cols];
    for (i, block) in weights.chunks_exact(BLOCK).enumerate() {
        let amax = nvfp4::amax(block) + f32::MIN_POSITIVE;
        for (relative, weight) in relative[i * BLOCK % cols..].iter_mut().zip(block) {
            *relative += f64::from(weight.abs() / amax) / rows as f64;
        }
    }
    let (mut best, mut least) = (vec![1.0; cols], f64::INFINITY);
    for step in 0..=STEPS {
        let alpha = f64::from(step) / f64::from(STEPS);
        let mut scale: Vec<f32> = moments
            .magnitude
            .iter()
            .zip(&relative)
            .map(|(x, w)| x.powf(alpha) / (w.powf(1.0 - alpha) + f64::from(f32::MIN_POSITIVE)))
            .map(|scale| scale.clamp(1e-4, 1e4) as f32)
            .collect();
        let (low, high) = scale.iter().fold((f32::MAX, 0.0f32), |(low, high), &s| (low.min(s), high.max(s)));
        let middle = (low * high).sqrt();
        scale.iter_mut().for_each(|scale| *scale /= middle);
        let scaled: Vec<f32> = weights
            .chunks_exact(cols)
            .flat_map(|row| row.iter().zip(&scale).map(|(weight, scale)| weight * scale))
            .collect();
        let amax = nvfp4::amax(&scaled);
        let mut error = Rounded::by_max_rule(&scaled, amax).values(nvfp4::global_scale(amax));
        for (error, weights) in error.chunks_exact_mut(cols).zip(weights.chunks_exact(cols)) {
            for ((error, weight), scale) in error.iter_mut().zip(weights).zip(&scale) {
                *error = *error / scale - weight;
            }
        }
        let loss = loss(pool, &error, moments);
        if loss < least {
            (best, least) = (scale.iter().map(|scale| 1.0 / scale).collect(), loss);
        }
    }
    best
}

/// The share of `amax` with which the max rule loses least.
pub(crate) fn clip(pool: &Pool, weights: &[f32], moments: &Moments, amax: f32) -> f32 {
    let (mut best, mut least) = (1.0, f64::INFINITY);
    for step in 10..=20u8 {
        let ratio = f32::from(step) / 20.0;
        let mut error = Rounded::by_max_rule(weights, ratio * amax).values(nvfp4::global_scale(ratio * amax));
        error.iter_mut().zip(weights).for_each(|(error, weight)| *error -= weight);
        let loss = loss(pool, &error, moments);
        if loss < least {
            (best, least) = (ratio, loss);
        }
    }
    best
}

/// `tr(d H dᵀ)`
fn loss(pool: &Pool, error: &[f32], moments: &Moments) -> f64 {
    let cols = moments.cols;
    let mut product = vec![0.0; error.len()];
    let (rows, second) = (Rows::new(error, cols), Rows::new(&moments.second, cols));
    products(pool, rows, second, &mut product, cols, Update::Set);
    product.iter().zip(error).map(|(p, e)| f64::from(*p) * f64::from(*e)).sum()
}
