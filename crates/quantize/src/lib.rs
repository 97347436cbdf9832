//! Quantization as a view: `Quantized` is weights that are quantized matrix by matrix as somebody reads them.
//!
//! A writer that pulls from it streams a checkpoint, a backend that packs from it loads a model in four bits; either way one
//! matrix exists at a time. What decides the numbers before the first matrix is read, the global scales and whether a cast
//! would lose anything, is found when the view is made.
#![forbid(unsafe_code)]

mod awq;
mod calibrate;
mod factor;
#[cfg(test)]
mod golden;
mod gptq;
mod moments;
mod recipe;
mod report;
mod rounded;
mod saved;
mod stream;
mod view;

pub use calibrate::{Calibration, FEWEST_TOKENS};
pub use recipe::{Algorithm, Method, Options, Recipe, ScalesPer};
pub use report::{TensorReport, Totals, WorstBlock};
pub use saved::LayerFacts;
pub use view::{Error, Quantized};
