//! What quantization did to each tensor.

use checkpoint::{Format, MatrixId};
use numerics::nvfp4::{BLOCK, CastCounts};

use crate::Method;

/// What happened to one matrix or stack.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorReport {
    /// Which.
    pub id: MatrixId,
    /// The format that it has now.
    pub format: Format,
    /// How it got there.
    pub method: Method,
    /// For a cast, its blocks.
    pub cast: CastCounts,
    /// The error of the values against the source's; none as long as some of them were not read, as after a write that
    /// continued an earlier call's.
    pub totals: Option<Totals>,
}

/// Sums over compared values.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Totals {
    /// Values compared.
    pub values: u64,
    /// Values that differ.
    pub changed: u64,
    /// Sum of the squared differences.
    pub squared_error: f64,
    /// Sum of the squared source values.
    pub squared_signal: f64,
    /// The largest difference.
    pub max_error: f32,
    /// The block that lost most of its signal.
    pub worst: Option<WorstBlock>,
}

/// The block of a matrix or stack with the largest relative error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WorstBlock {
    /// Which matrix of the stack.
    pub expert: usize,
    /// Its row.
    pub row: usize,
    /// Its place in the row, counted in blocks of 16.
    pub block: usize,
    /// RMS of the difference over RMS of the source's values.
    pub relative_error: f64,
}

impl Totals {
    /// Mean squared error.
    pub fn mse(&self) -> f64 {
        if self.values == 0 { 0.0 } else { self.squared_error / self.values as f64 }
    }

    /// Signal to quantization noise in decibels; infinite without an error.
    pub fn sqnr_db(&self) -> f64 {
        10.0 * (self.squared_signal / self.squared_error).log10()
    }

    /// Adds a row of a matrix of the stack.
    pub(crate) fn add(&mut self, (expert, row): (usize, usize), source: &[f32], result: &[f32]) {
        for (block, (source, result)) in source.chunks(BLOCK).zip(result.chunks(BLOCK)).enumerate() {
            let (mut squared_error, mut squared_signal) = (0.0, 0.0);
            for (&s, &r) in source.iter().zip(result) {
                let error = r - s;
                self.changed += u64::from(error != 0.0);
                squared_error += f64::from(error) * f64::from(error);
                squared_signal += f64::from(s) * f64::from(s);
                self.max_error = self.max_error.max(error.abs());
            }
            self.values += source.len() as u64;
            self.squared_error += squared_error;
            self.squared_signal += squared_signal;
            let relative_error = (squared_error / squared_signal).sqrt();
            if squared_error > 0.0 && squared_signal > 0.0 {
                self.keep_worst(WorstBlock { expert, row, block, relative_error });
            }
        }
    }

    fn keep_worst(&mut self, other: WorstBlock) {
        if self.worst.is_none_or(|worst| other.relative_error > worst.relative_error) {
            self.worst = Some(other);
        }
    }

    pub(crate) fn merge(&mut self, other: &Totals) {
        self.values += other.values;
        self.changed += other.changed;
        self.squared_error += other.squared_error;
        self.squared_signal += other.squared_signal;
        self.max_error = self.max_error.max(other.max_error);
        other.worst.into_iter().for_each(|worst| self.keep_worst(worst));
    }
}
