//! The reference forward pass against the golden values of two independent implementations.
#![allow(clippy::unwrap_used, reason = "tests")]

mod golden;

use std::path::PathBuf;
use std::sync::Arc;

use checkpoint::Checkpoint;
use safetensors::SafeTensors;
use serde_json::Value;

fn root(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(path)
}

fn open(path: &str) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(&root(path)).unwrap())
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root(path)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

struct Tensors(Vec<u8>);

impl Tensors {
    fn open(path: &str) -> Tensors {
        Tensors(std::fs::read(root(path)).unwrap())
    }

    /// F32 values; integers are converted.
    fn get(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        match tensor.dtype() {
            safetensors::Dtype::F32 => bytemuck::allocation::pod_collect_to_vec(tensor.data()),
            safetensors::Dtype::I32 => bytemuck::allocation::pod_collect_to_vec::<u8, i32>(tensor.data())
                .into_iter()
                .map(|v| v as f32)
                .collect(),
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// RMS of the difference over RMS of the expected values.
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = found.iter().zip(expected).map(|(f, e)| square(f - e)).sum();
    (error / expected.iter().map(|&e| square(e)).sum::<f64>()).sqrt()
}

fn assert_close(found: &[f32], expected: &[f32], tolerance: f64, what: &str) {
    let error = relative(found, expected);
    assert!(error <= tolerance, "{what}: relative error {error:.2e}, expected at most {tolerance:.0e}");
}
