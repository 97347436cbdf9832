//! Model folders: safetensors, configuration, the on-disk layouts of gpt-oss and the hub.

mod compare;
mod config;
mod error;
mod generation;
pub mod hub;
mod layout;
mod mapped;
mod quantization;
mod reader;
mod shard;
mod synthetic;
mod transpose;
mod unfinished;
mod weights;
mod write;

pub use compare::{Comparison, Difference, compare};
pub use config::{Config, LayerKind, Rope};
pub use error::{Error, Mismatch};
pub use generation::GenerationConfig;
pub use layout::Layout;
pub use mapped::{StoredTensor, TensorFile};
pub use quantization::{KvCache, Quantization};
pub use reader::{Checkpoint, Packed, read_file};
pub use safetensors::Dtype;
pub use shard::Shard;
pub use synthetic::Synthetic;
pub use unfinished::{Unfinished, remove_unfinished};
pub use weights::{
    Format, Identity, KvScales, Matrix, MatrixId, MatrixKind, Values, Vector, VectorId, VectorKind, Weights,
    matrices, vectors,
};
pub use write::{Progress, Target, Written, beside, may_begin, may_write, sync_folder, write};
