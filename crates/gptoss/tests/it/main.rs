//! The reference forward pass against the golden values of two independent implementations.
#![allow(clippy::unwrap_used, reason = "tests")]

mod golden;
mod models;

use safetensors::SafeTensors;

use models::{relative, root};

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

fn assert_close(found: &[f32], expected: &[f32], tolerance: f64, what: &str) {
    let error = relative(found, expected);
    assert!(error <= tolerance, "{what}: relative error {error:.2e}, expected at most {tolerance:.0e}");
}
