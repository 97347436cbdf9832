//! What is quantized, and how: recipes and algorithms, and the method that follows for each matrix.

use checkpoint::{Format, MatrixId, MatrixKind, Weights, matrices};

/// Which matrices are quantized. Router, norms, biases and sinks never are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recipe {
    /// The expert matrices, as in gpt-oss itself.
    #[default]
    Experts,
    /// The attention projections too: what Model Optimizer's `NVFP4_DEFAULT_CFG` covers.
    Linear,
    /// The output layer too.
    All,
}

/// How scales and codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Algorithm {
    /// The cast for what is MXFP4, nothing for what is NVFP4, and for the rest the algorithm with the lowest divergence from the
    /// original (BENCHMARKS.md): `Refine` for what the layers hold, `Mse` for the embedding and the output layer.
    #[default]
    Auto,
    /// The lossless cast for what is MXFP4, `Max` for the rest.
    Cast,
    /// Scales from the largest magnitude, for everything.
    Max,
    /// The cast for what is MXFP4, for the rest the E4M3 scale of the smallest squared error.
    Mse,
    /// The cast for what is MXFP4, for the rest the largest magnitude of each block on 6 or on 4, whichever is closer.
    FourOverSix,
    /// The cast for what is MXFP4, for the rest the E4M3 scale of the smallest squared error of each block's product with its
    /// inputs.
    LocalHessian,
    /// The cast for what is MXFP4; for attention scaled columns and a clipped global scale (Lin et al., 2024, as Model
    /// Optimizer's `awq_full`), `Max` for the rest, whose inputs have no norm of their own to scale.
    Awq,
    /// The cast for what is MXFP4; GPTQ (Frantar et al., 2022) for the rest, as Model Optimizer does it: max scales, each layer
    /// fed by the quantized ones before it, inputs seen in four bits if they will be.
    Gptq,
    /// The cast for what is MXFP4; for the rest GPTQ with scales searched by its own loss, tokens weighted by their routing,
    /// half of the earlier layers' errors made up for, the mean error taken by the bias, and a refinement block by block.
    Refine,
}

impl Algorithm {
    /// Whether it needs calibration data.
    pub fn calibrates(self) -> bool {
        use Algorithm::{Auto, Awq, Gptq, LocalHessian, Refine};
        matches!(self, Auto | LocalHessian | Awq | Gptq | Refine)
    }
}

/// How many global scales a stack of experts has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScalesPer {
    /// One, which is what Model Optimizer writes and current readers expect.
    #[default]
    Stack,
    /// One per expert, which is closer.
    Expert,
}

/// What to make of some weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Options {
    /// NVFP4.
    Nvfp4 {
        /// What is quantized.
        recipe: Recipe,
        /// How.
        algorithm: Algorithm,
        /// The embedding too.
        embedding: bool,
        /// Global scales of the stacks.
        scales_per: ScalesPer,
        /// Activations in NVFP4 too (W4A4): every quantized matrix has the static scale of its input, its own if it stays as it
        /// is and has one, else from calibration.
        activations: bool,
        /// Static scales for keys and values in FP8: those that a layer has, else from calibration.
        kv_scales: bool,
        /// The experts in BF16 all the same, for a layout that has no names for packed ones.
        experts_in_bf16: bool,
    },
    /// MXFP4 experts, the rest BF16: the published form.
    Mxfp4,
    /// Everything in BF16.
    Bf16,
}

/// What happens to one matrix or stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// It stays as it is.
    Keep,
    /// MXFP4 to NVFP4 by the exponents.
    Cast,
    /// NVFP4 by the largest magnitude.
    Max,
    /// NVFP4 by the smallest squared error over all block scales.
    Mse,
    /// NVFP4 by the smaller squared error of two block scales.
    FourOverSix,
    /// NVFP4 by the smallest squared error of each block's product with its inputs.
    LocalHessian,
    /// NVFP4 by the largest magnitude, with scaled columns and a clipped global scale.
    Awq,
    /// NVFP4 by GPTQ with max scales.
    Gptq,
    /// NVFP4 by GPTQ with searched scales and refinement.
    Refine,
    /// MXFP4 by Model Optimizer's choice of scale.
    Mxfp4,
    /// Decoded to BF16.
    Bf16,
}

impl Options {
    /// Whether a matrix of `source` or a static scale needs calibration data.
    pub fn needs_calibration(&self, source: &dyn Weights) -> bool {
        let Options::Nvfp4 { activations, kv_scales, .. } = *self else { return false };
        (kv_scales && lacks_kv_scales(source))
            || matrices(source.config()).any(|id| {
                let method = self.method(id, source.format(id));
                let packed = method.format(source.format(id)) == Format::Nvfp4 && id.kind.has_inputs();
                method.calibrates()
                    || (activations && packed && method.kept_input_scale(source, id).is_none())
            })
    }

    /// What happens to matrix `id`, stored in `format`.
    pub(crate) fn method(&self, id: MatrixId, format: Format) -> Method {
        match *self {
            Options::Bf16 if format == Format::Bf16 => Method::Keep,
            Options::Bf16 => Method::Bf16,
            Options::Mxfp4 => match (id.kind.is_expert(), format) {
                (true, Format::Mxfp4) | (false, Format::Bf16) => Method::Keep,
                (true, _) => Method::Mxfp4,
                (false, _) => Method::Bf16,
            },
            Options::Nvfp4 { recipe, algorithm, embedding, experts_in_bf16, .. } => {
                let covered = match id.kind {
                    MatrixKind::GateUp | MatrixKind::Down => !experts_in_bf16,
                    MatrixKind::Query | MatrixKind::Key | MatrixKind::Value | MatrixKind::Output => {
                        recipe != Recipe::Experts
                    }
                    MatrixKind::Unembedding => recipe == Recipe::All,
                    MatrixKind::Embedding => embedding,
                    MatrixKind::Router => false,
                };
                let in_layer = id.kind.is_attention() || id.kind.is_expert();
                match (covered, format, algorithm) {
                    (false, Format::Mxfp4, _) => Method::Bf16,
                    (false, Format::Nvfp4, _) if id.kind.is_expert() => Method::Bf16,
                    (false, ..) => Method::Keep,
                    (true, _, Algorithm::Max) => Method::Max,
                    (true, Format::Mxfp4, _) => Method::Cast,
                    (true, Format::Nvfp4, _) => Method::Keep,
                    (true, Format::Bf16, Algorithm::Cast) => Method::Max,
                    (true, Format::Bf16, Algorithm::FourOverSix) => Method::FourOverSix,
                    (true, Format::Bf16, Algorithm::Awq) if id.kind.is_attention() => Method::Awq,
                    (true, Format::Bf16, Algorithm::Awq) => Method::Max,
                    (true, Format::Bf16, Algorithm::LocalHessian) if in_layer => Method::LocalHessian,
                    (true, Format::Bf16, Algorithm::Gptq) if in_layer => Method::Gptq,
                    (true, Format::Bf16, Algorithm::Gptq) => Method::Max,
                    (true, Format::Bf16, Algorithm::Auto | Algorithm::Refine) if in_layer => Method::Refine,
                    (true, Format::Bf16, _) => Method::Mse,
                }
            }
        }
    }
}

/// Whether a layer has no static scales for keys and values.
pub(crate) fn lacks_kv_scales(source: &dyn Weights) -> bool {
    (0..source.config().layer_kinds.len()).any(|layer| source.kv_scales(layer).is_none())
}

impl Method {
    /// Whether it needs to see the matrix's inputs.
    pub fn calibrates(self) -> bool {
        matches!(self, Method::LocalHessian | Method::Awq | Method::Gptq | Method::Refine)
    }

    /// The static scale of the input of a matrix that stays as it is, if it has one: whoever made it knew what goes in.
    pub(crate) fn kept_input_scale(self, source: &dyn Weights, id: MatrixId) -> Option<f32> {
        if self == Method::Keep { source.input_scale(id) } else { None }
    }

    /// The format of the result, given that of the source.
    pub(crate) fn format(self, source: Format) -> Format {
        match self {
            Method::Keep => source,
            Method::Mxfp4 => Format::Mxfp4,
            Method::Bf16 => Format::Bf16,
            _ => Format::Nvfp4,
        }
    }

    /// The name in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Method::Keep => "keep",
            Method::Cast => "cast",
            Method::Max => "max",
            Method::Mse => "mse",
            Method::FourOverSix => "four-over-six",
            Method::LocalHessian => "local-hessian",
            Method::Awq => "awq",
            Method::Gptq => "gptq",
            Method::Refine => "refine",
            Method::Mxfp4 => "mxfp4",
            Method::Bf16 => "bf16",
        }
    }
}
