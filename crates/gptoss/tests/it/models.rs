//! What the tests of every backend need: the golden values, and models that are odd on purpose.
#![allow(dead_code, reason = "each crate's tests need some of it")]

use std::path::PathBuf;
use std::sync::Arc;

use checkpoint::{
    Checkpoint, Config, Format, KvScales, Matrix, MatrixId, MatrixKind, Values, Vector, VectorId, VectorKind,
    Weights,
};
use gptoss::{BLOCK_TOKENS, SequencePlan};
use half::bf16;
use safetensors::SafeTensors;
use serde_json::Value;

/// A file of the repository: where it was built, or in the current folder.
pub(crate) fn root(path: &str) -> PathBuf {
    let built = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    if built.join("testdata").exists() { built.join(path) } else { path.into() }
}

pub(crate) fn open(path: &str) -> Arc<dyn Weights> {
    Arc::new(Checkpoint::open(&root(path)).unwrap())
}

pub(crate) fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root(path)).unwrap()).unwrap()
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// A tensor in F32.
pub(crate) fn golden(path: &str, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(root(path)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    bytemuck::allocation::pod_collect_to_vec(tensors.tensor(name).unwrap().data())
}

/// RMS of the difference over RMS of the expected values.
pub(crate) fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = found.iter().zip(expected).map(|(f, e)| square(f - e)).sum();
    (error / expected.iter().map(|&e| square(e)).sum::<f64>()).sqrt()
}

/// A sequence whose full layers have the blocks from `first` upwards, the sliding ones the same downwards.
pub(crate) fn sequence(tokens: &[u32], position: usize, first: u32) -> SequencePlan {
    let count = (position + tokens.len()).div_ceil(BLOCK_TOKENS) as u32;
    SequencePlan {
        tokens: tokens.to_vec(),
        position,
        full_blocks: (0..count).map(|i| first + i).collect::<Vec<_>>().into(),
        sliding_blocks: (0..count).map(|i| first + count - 1 - i).collect::<Vec<_>>().into(),
        ..SequencePlan::default()
    }
}

/// Weights of which a few are no numbers: the first or second row of the matrices, the first or second value of the vectors of a kind, in every
/// layer and of every expert.
pub(crate) struct NoNumbers {
    pub(crate) weights: Arc<dyn Weights>,
    pub(crate) matrix: Option<MatrixKind>,
    pub(crate) vector: Option<VectorKind>,
    /// 0 or 1: of the first product of experts, gate or up.
    pub(crate) row: usize,
}

impl Weights for NoNumbers {
    fn config(&self) -> &Config {
        self.weights.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.weights.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, checkpoint::Error> {
        let mut matrix = self.weights.matrix(id, expert)?;
        if self.matrix == Some(id.kind) {
            let Values::Bf16(values) = &mut matrix.values else { panic!("values that can be no numbers") };
            values.to_mut()[self.row * matrix.cols] = bf16::NAN;
        }
        Ok(matrix)
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, checkpoint::Error> {
        let mut vector = self.weights.vector(id)?;
        if self.vector == Some(id.kind) {
            let Vector::Bf16(values) = &mut vector else { panic!("BF16, as the others") };
            let (_, length) = id.kind.shape(self.config());
            values.to_mut().iter_mut().skip(self.row).step_by(length).for_each(|v| *v = bf16::NAN);
        }
        Ok(vector)
    }
}

/// Weights with scales that the checkpoint itself has not: of keys and values, of what enters a matrix.
pub(crate) struct Scaled {
    pub(crate) weights: Arc<dyn Weights>,
    pub(crate) cache: Option<KvScales>,
    pub(crate) input: fn(MatrixId) -> Option<f32>,
}

impl Weights for Scaled {
    fn config(&self) -> &Config {
        self.weights.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.weights.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, checkpoint::Error> {
        self.weights.matrix(id, expert)
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, checkpoint::Error> {
        self.weights.vector(id)
    }
    fn kv_scales(&self, _layer: usize) -> Option<KvScales> {
        self.cache
    }
    fn input_scale(&self, id: MatrixId) -> Option<f32> {
        (self.input)(id)
    }
}

/// Weights whose embedding of one token is no number.
pub(crate) struct Damaged(pub(crate) Arc<dyn Weights>);

/// That token.
pub(crate) const DAMAGED: u32 = 7;

impl Weights for Damaged {
    fn config(&self) -> &Config {
        self.0.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.0.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, checkpoint::Error> {
        let mut matrix = self.0.matrix(id, expert)?;
        if let (MatrixKind::Embedding, Values::Bf16(values)) = (id.kind, &mut matrix.values) {
            values.to_mut()[DAMAGED as usize * matrix.cols] = bf16::NAN;
        }
        Ok(matrix)
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, checkpoint::Error> {
        self.0.vector(id)
    }
}
