//! What calibration sees at the input of one linear layer.

use std::borrow::Cow;

use cpu::{Pool, Rows, Update, products};
use numerics::nvfp4;

/// Weighted sums over tokens: of the inputs that the quantized model gives (`x`), and of those that the source gives for the
/// same tokens (`s`).
pub(crate) struct Moments {
    pub(crate) cols: usize,
    /// Of inputs that the quantized model has in four bits (W4A4), and that are seen so.
    pub(crate) input_scale: Option<f32>,
    /// Tokens seen.
    pub(crate) tokens: usize,
    /// `Σ ω x xᵀ`, `[cols, cols]`
    pub(crate) second: Vec<f32>,
    /// `Σ ω x sᵀ`, `[cols, cols]`
    pub(crate) cross: Vec<f32>,
    /// `Σ ω x`
    pub(crate) mean: Vec<f64>,
    /// `Σ ω s`
    pub(crate) source_mean: Vec<f64>,
    /// `Σ ω |x|`
    pub(crate) magnitude: Vec<f64>,
    /// `max |s|`
    pub(crate) source_amax: Vec<f32>,
    weight: f64,
}

impl Moments {
    pub(crate) fn new(cols: usize, input_scale: Option<f32>) -> Moments {
        Moments {
            cols,
            input_scale,
            tokens: 0,
            second: vec![0.0; cols * cols],
            cross: vec![0.0; cols * cols],
            mean: vec![0.0; cols],
            source_mean: vec![0.0; cols],
            magnitude: vec![0.0; cols],
            source_amax: vec![0.0; cols],
            weight: 0.0,
        }
    }

    /// Adds some tokens, each with the weight `ω` that errors in its output have.
    pub(crate) fn add(&mut self, pool: &Pool, inputs: &[f32], source: &[f32], weights: &[f32]) {
        let inputs = &*seen(inputs, self.input_scale);
        self.tokens += weights.len();
        self.weight += weights.iter().map(|&w| f64::from(w)).sum::<f64>();
        let sum = |rows: &[f32], sums: &mut [f64], of: fn(f32) -> f32| {
            for (row, &weight) in rows.chunks_exact(self.cols).zip(weights) {
                sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(weight) * f64::from(of(x)));
            }
        };
        sum(inputs, &mut self.mean, |x| x);
        sum(source, &mut self.source_mean, |x| x);
        sum(inputs, &mut self.magnitude, f32::abs);
        for row in source.chunks_exact(self.cols) {
            self.source_amax.iter_mut().zip(row).for_each(|(amax, s)| *amax = amax.max(s.abs()));
        }
        let padded = weights.len().next_multiple_of(16);
        let x = transposed(inputs, self.cols, weights, padded);
        let s = transposed(source, self.cols, weights, padded);
        let (x, s) = (Rows::new(&x, padded), Rows::new(&s, padded));
        products(pool, x, x, &mut self.second, self.cols, Update::Add);
        products(pool, x, s, &mut self.cross, self.cols, Update::Add);
    }

    /// Sums to means; with `centered`, second moments to covariances.
    pub(crate) fn finish(&mut self, centered: bool) {
        let inverse = if self.weight > 0.0 { 1.0 / self.weight } else { 0.0 };
        let sums = self.mean.iter_mut().chain(&mut self.source_mean).chain(&mut self.magnitude);
        sums.for_each(|sum| *sum *= inverse);
        for (i, &mean) in self.mean.iter().enumerate() {
            let range = i * self.cols..(i + 1) * self.cols;
            let means = self.mean.iter().zip(&self.source_mean);
            let rows = self.second[range.clone()].iter_mut().zip(&mut self.cross[range]);
            for ((second, cross), (&own, &source)) in rows.zip(means) {
                let (a, b) = if centered { (mean * own, mean * source) } else { (0.0, 0.0) };
                *second = (f64::from(*second) * inverse - a) as f32;
                *cross = (f64::from(*cross) * inverse - b) as f32;
            }
        }
    }

    /// Of the inputs times `scale`, column by column: the second moment and the source's largest magnitudes; nothing else is
    /// kept true.
    pub(crate) fn scale(&mut self, scale: &[f32]) {
        for (row, a) in self.second.chunks_exact_mut(self.cols).zip(scale) {
            row.iter_mut().zip(scale).for_each(|(second, b)| *second *= a * b);
        }
        self.source_amax.iter_mut().zip(scale).for_each(|(amax, scale)| *amax *= scale);
    }
}

/// What a product sees of its inputs: all, or with a scale what four bits hold of them.
pub(crate) fn seen(inputs: &[f32], input_scale: Option<f32>) -> Cow<'_, [f32]> {
    let Some(scale) = input_scale else { return Cow::Borrowed(inputs) };
    let mut rounded = vec![0.0; inputs.len()];
    nvfp4::fake_quantize_activations(inputs, scale, &mut rounded);
    Cow::Owned(rounded)
}

/// `[tokens, cols]` to `[cols, padded]`, each token times the root of its weight.
fn transposed(rows: &[f32], cols: usize, weights: &[f32], padded: usize) -> Vec<f32> {
    let mut out = vec![0.0; cols * padded];
    for (t, (row, weight)) in rows.chunks_exact(cols).zip(weights).enumerate() {
        let root = weight.sqrt();
        row.iter().enumerate().for_each(|(c, x)| out[c * padded + t] = x * root);
    }
    out
}
