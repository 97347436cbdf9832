//! Model folders: safetensors, configuration, the on-disk layouts of gpt-oss and the hub.

mod config;
mod error;
pub mod hub;
mod weights;

pub use config::{Config, LayerKind, Rope};
pub use error::Error;
pub use weights::{
    Format, KvScales, Matrix, MatrixId, MatrixKind, Values, Vector, VectorId, VectorKind, Weights, matrices, vectors,
};
