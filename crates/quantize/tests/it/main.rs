//! The quantizing view against Model Optimizer's own exports, and what must hold for any weights.
#![allow(clippy::unwrap_used, reason = "tests")]

mod golden;
mod views;

use std::path::PathBuf;
use std::sync::Arc;

use checkpoint::{Checkpoint, Weights};
use quantize::{Algorithm, Options, Quantized, Recipe, ScalesPer};

fn root(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(path)
}

fn open(path: &str) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(&root(path)).unwrap())
}

fn nvfp4(recipe: Recipe, algorithm: Algorithm) -> Options {
    Options::Nvfp4 {
        recipe,
        algorithm,
        embedding: false,
        scales_per: ScalesPer::Stack,
        activations: false,
        kv_scales: false,
        experts_in_bf16: false,
    }
}

fn view(source: Arc<dyn Weights>, options: Options) -> Quantized {
    Quantized::new(source, options, 2, &mut |_, _| {}).unwrap()
}
