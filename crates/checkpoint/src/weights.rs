//! The closed list of gpt-oss's logical tensors, and `Weights`, a view of all of them.
//!
//! Above this crate nobody knows how a tensor is called or packed in a file: a matrix is `rows × cols` with
//! `rows` the output dimension, in one of three formats, and quantization blocks run along its columns.

use std::borrow::Cow;

use half::bf16;
use numerics::{e8m0, mxfp4, nvfp4};
use sha2::{Digest, Sha256};

use crate::{Config, Error};

/// A matrix, or for `GateUp` and `Down` a stack of one matrix per expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MatrixKind {
    /// `[vocabulary, hidden]`, one row per token.
    Embedding,
    /// `[vocabulary, hidden]`, the output layer.
    Unembedding,
    /// `[query heads · head size, hidden]`
    Query,
    /// `[kv heads · head size, hidden]`
    Key,
    /// `[kv heads · head size, hidden]`
    Value,
    /// `[hidden, query heads · head size]`
    Output,
    /// `[experts, hidden]`
    Router,
    /// per expert `[2 · intermediate, hidden]`; row 2i is gate i, row 2i+1 up i
    GateUp,
    /// per expert `[hidden, intermediate]`
    Down,
}

/// A vector (a bias, a norm's scale, the sinks).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum VectorKind {
    /// `[hidden]`
    FinalNorm,
    /// `[hidden]`
    InputNorm,
    /// `[hidden]`
    PostAttentionNorm,
    /// `[query heads · head size]`
    QueryBias,
    /// `[kv heads · head size]`
    KeyBias,
    /// `[kv heads · head size]`
    ValueBias,
    /// `[hidden]`
    OutputBias,
    /// `[query heads]`
    Sinks,
    /// `[experts]`
    RouterBias,
    /// `[experts, 2 · intermediate]`, flattened
    GateUpBias,
    /// `[experts, hidden]`, flattened
    DownBias,
}

/// A logical matrix (or stack) of one layer; `layer` is 0 for the embedding and the unembedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MatrixId {
    /// Layer index.
    pub layer: usize,
    /// Which matrix.
    pub kind: MatrixKind,
}

/// A logical vector of one layer; `layer` is 0 for the final norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VectorId {
    /// Layer index.
    pub layer: usize,
    /// Which vector.
    pub kind: VectorKind,
}

impl MatrixKind {
    /// The matrices that every layer has, in the order of the forward pass.
    pub const LAYER: [MatrixKind; 7] = [
        MatrixKind::Query,
        MatrixKind::Key,
        MatrixKind::Value,
        MatrixKind::Output,
        MatrixKind::Router,
        MatrixKind::GateUp,
        MatrixKind::Down,
    ];

    /// The matrix of this kind in `layer`.
    pub const fn at(self, layer: usize) -> MatrixId {
        MatrixId { layer, kind: self }
    }

    /// Whether there is one matrix per expert.
    pub const fn is_expert(self) -> bool {
        matches!(self, MatrixKind::GateUp | MatrixKind::Down)
    }

    /// Whether this is one of the four attention projections.
    pub const fn is_attention(self) -> bool {
        matches!(self, MatrixKind::Query | MatrixKind::Key | MatrixKind::Value | MatrixKind::Output)
    }

    /// Whether activations are multiplied by it. Of the embedding rows are looked up.
    pub const fn has_inputs(self) -> bool {
        !matches!(self, MatrixKind::Embedding)
    }

    /// `(matrices, rows, cols)`: the number of matrices in the stack (1 unless per expert) and the shape of each.
    pub fn shape(self, config: &Config) -> (usize, usize, usize) {
        let (d, i, e) = (config.hidden_size, config.intermediate_size, config.experts);
        let (q, kv) = (config.query_heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            MatrixKind::Embedding | MatrixKind::Unembedding => (1, config.vocab_size, d),
            MatrixKind::Query => (1, q, d),
            MatrixKind::Key | MatrixKind::Value => (1, kv, d),
            MatrixKind::Output => (1, d, q),
            MatrixKind::Router => (1, e, d),
            MatrixKind::GateUp => (e, 2 * i, d),
            MatrixKind::Down => (e, d, i),
        }
    }
}

impl VectorKind {
    /// The vectors that every layer has.
    pub const LAYER: [VectorKind; 10] = [
        VectorKind::InputNorm,
        VectorKind::QueryBias,
        VectorKind::KeyBias,
        VectorKind::ValueBias,
        VectorKind::OutputBias,
        VectorKind::Sinks,
        VectorKind::PostAttentionNorm,
        VectorKind::RouterBias,
        VectorKind::GateUpBias,
        VectorKind::DownBias,
    ];

    /// The vector of this kind in `layer`.
    pub const fn at(self, layer: usize) -> VectorId {
        VectorId { layer, kind: self }
    }

    /// `(rows, length)`: 1 and the length, or for the expert biases the number of experts and the length of each.
    pub fn shape(self, config: &Config) -> (usize, usize) {
        let (d, i, e) = (config.hidden_size, config.intermediate_size, config.experts);
        match self {
            VectorKind::FinalNorm
            | VectorKind::InputNorm
            | VectorKind::PostAttentionNorm
            | VectorKind::OutputBias => (1, d),
            VectorKind::QueryBias => (1, config.query_heads * config.head_dim),
            VectorKind::KeyBias | VectorKind::ValueBias => (1, config.kv_heads * config.head_dim),
            VectorKind::Sinks => (1, config.query_heads),
            VectorKind::RouterBias => (1, e),
            VectorKind::GateUpBias => (e, 2 * i),
            VectorKind::DownBias => (e, d),
        }
    }
}

/// Every matrix of a model, in a fixed order: embedding, layers, unembedding.
pub fn matrices(config: &Config) -> impl Iterator<Item = MatrixId> + use<> {
    let layers = config.layer_kinds.len();
    std::iter::once(MatrixKind::Embedding.at(0))
        .chain((0..layers).flat_map(|l| MatrixKind::LAYER.map(|k| k.at(l))))
        .chain(std::iter::once(MatrixKind::Unembedding.at(0)))
}

/// Every vector of a model, in a fixed order: layers, final norm.
pub fn vectors(config: &Config) -> impl Iterator<Item = VectorId> + use<> {
    let layers = config.layer_kinds.len();
    (0..layers)
        .flat_map(|l| VectorKind::LAYER.map(|k| k.at(l)))
        .chain(std::iter::once(VectorKind::FinalNorm.at(0)))
}

/// How the elements of a matrix are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// bfloat16, 16 bits per weight.
    Bf16,
    /// E2M1 with one E8M0 scale per 32, 4.25 bits per weight.
    Mxfp4,
    /// E2M1 with one E4M3 scale per 16 and one F32 scale per matrix, 4.5 bits per weight.
    Nvfp4,
}

impl Format {
    /// The name used in messages and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Bf16 => "bf16",
            Format::Mxfp4 => "mxfp4",
            Format::Nvfp4 => "nvfp4",
        }
    }

    /// Bytes of `elements` weights in this format (scales included, the global scale left out).
    pub const fn bytes(self, elements: usize) -> usize {
        match self {
            Format::Bf16 => elements * 2,
            Format::Mxfp4 => elements / 2 + elements / 32,
            Format::Nvfp4 => elements / 2 + elements / 16,
        }
    }
}

/// One matrix, row-major, `rows` outputs by `cols` inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix<'a> {
    /// Outputs.
    pub rows: usize,
    /// Inputs; quantization blocks run along these.
    pub cols: usize,
    /// The elements.
    pub values: Values<'a>,
}

/// The elements of a matrix. Codes are packed two per byte, the even column in the low nibble.
#[derive(Debug, Clone, PartialEq)]
pub enum Values<'a> {
    /// `[rows, cols]`
    Bf16(Cow<'a, [bf16]>),
    /// codes `[rows, cols / 2]`, scales (E8M0) `[rows, cols / 32]`
    Mxfp4 {
        /// E2M1 codes.
        codes: Cow<'a, [u8]>,
        /// E8M0 bytes.
        scales: Cow<'a, [u8]>,
    },
    /// codes `[rows, cols / 2]`, scales (E4M3) `[rows, cols / 16]`
    Nvfp4 {
        /// E2M1 codes.
        codes: Cow<'a, [u8]>,
        /// E4M3 bytes.
        scales: Cow<'a, [u8]>,
        /// The scale of the whole matrix (`weight_scale_2`).
        global_scale: f32,
    },
}

impl Values<'_> {
    /// The format of these elements.
    pub fn format(&self) -> Format {
        match self {
            Values::Bf16(_) => Format::Bf16,
            Values::Mxfp4 { .. } => Format::Mxfp4,
            Values::Nvfp4 { .. } => Format::Nvfp4,
        }
    }

    /// Refuses scales that stand for NaN or infinity; `name` is the tensor's for the message.
    pub fn check_scales(&self, name: &str) -> Result<(), Error> {
        let bad = |what: String| Err(Error::Scale { tensor: name.to_owned(), found: what });
        match self {
            Values::Bf16(_) => Ok(()),
            Values::Mxfp4 { scales, .. } => match first_at_least(scales, e8m0::NAN) {
                Some(at) => bad(format!("NaN (byte 255) at block {at}")),
                None => Ok(()),
            },
            Values::Nvfp4 { scales, global_scale, .. } => {
                if !(global_scale.is_finite() && *global_scale > 0.0) {
                    return bad(format!("a global scale of {global_scale}"));
                }
                match first_at_least(scales, 0x7f) {
                    Some(at) => bad(format!("byte {:#04x} (NaN or negative) at block {at}", scales[at])),
                    None => Ok(()),
                }
            }
        }
    }
}

impl Matrix<'_> {
    /// Writes the values of row `row` to `out` (`cols` long), each as the F32 number that the format defines.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let cols = self.cols;
        match &self.values {
            Values::Bf16(values) => {
                for (out, value) in out.iter_mut().zip(&values[row * cols..(row + 1) * cols]) {
                    *out = value.to_f32();
                }
            }
            Values::Mxfp4 { codes, scales } => mxfp4::dequantize(
                &codes[row * cols / 2..(row + 1) * cols / 2],
                &scales[row * cols / mxfp4::BLOCK..(row + 1) * cols / mxfp4::BLOCK],
                out,
            ),
            Values::Nvfp4 { codes, scales, global_scale } => nvfp4::dequantize(
                &codes[row * cols / 2..(row + 1) * cols / 2],
                &scales[row * cols / nvfp4::BLOCK..(row + 1) * cols / nvfp4::BLOCK],
                *global_scale,
                out,
            ),
        }
    }

    /// All values as F32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in out.chunks_exact_mut(self.cols).enumerate() {
            self.row(row, out);
        }
        out
    }
}

/// The first byte that is not below the limit. Looking for the largest first is many times faster than byte after byte.
fn first_at_least(bytes: &[u8], limit: u8) -> Option<usize> {
    let largest = bytes.iter().fold(0, |largest, &byte| largest.max(byte));
    if largest < limit { None } else { bytes.iter().position(|&byte| byte >= limit) }
}

/// A vector in the type it was stored in, so that nothing is lost when it is written again.
#[derive(Debug, Clone, PartialEq)]
pub enum Vector<'a> {
    /// bfloat16
    Bf16(Cow<'a, [bf16]>),
    /// float32
    F32(Cow<'a, [f32]>),
}

impl Vector<'_> {
    /// The values as F32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Vector::Bf16(values) => values.iter().map(|v| v.to_f32()).collect(),
            Vector::F32(values) => values.to_vec(),
        }
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        match self {
            Vector::Bf16(values) => values.len(),
            Vector::F32(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The scales of one layer's FP8 key/value cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvScales {
    /// `k_scale`
    pub key: f32,
    /// `v_scale`
    pub value: f32,
}

/// Stands for the values of some weights: equal identities, equal values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity(pub [u8; 32]);

impl Identity {
    /// That of what a function makes of the values; `how` names the function and its options.
    #[must_use]
    pub fn derived(self, how: &str) -> Identity {
        Identity(Sha256::new().chain_update(self.0).chain_update(how).finalize().into())
    }
}

/// All weights of one model: a checkpoint on disk, made-up weights, or a view that quantizes another on the way.
///
/// Implementations are total: after construction every matrix and vector of [`matrices`] and [`vectors`] exists
/// with the shape that the config gives it, so an error is a fault of the machine or of the data (a NaN).
pub trait Weights: Send + Sync {
    /// The model's shape.
    fn config(&self) -> &Config;

    /// The format in which [`Weights::matrix`] gives this matrix or stack.
    fn format(&self, id: MatrixId) -> Format;

    /// One matrix; `expert` is 0 for what is not a stack.
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error>;

    /// The values of a matrix in four bits as they lie, if that is input by input: codes `[cols / 2, rows]`, scales
    /// `[cols / block, rows]`. [`Weights::matrix`] would turn them.
    fn by_inputs(&self, _id: MatrixId, _expert: usize) -> Result<Option<Values<'_>>, Error> {
        Ok(None)
    }

    /// One vector.
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error>;

    /// The static scale of the input of a W4A4 matrix (`input_scale`), if the model has one.
    fn input_scale(&self, _id: MatrixId) -> Option<f32> {
        None
    }

    /// The scales of the layer's FP8 key/value cache, if the model has them.
    fn kv_scales(&self, _layer: usize) -> Option<KvScales> {
        None
    }

    /// What stands for the values of all tensors; `None` if they are not those of files, or not a function of files alone.
    fn identity(&self) -> Option<Identity> {
        None
    }

    /// Says that this matrix is not needed again soon, so that memory it was mapped into can go to others. Only a
    /// hint: the matrix can be asked for again.
    fn release(&self, _id: MatrixId, _expert: usize) {}
}
