//! The on-disk layouts: for each, which stored tensors hold a logical one, under which names, types and shapes.
//!
//! Reader and writer both take their knowledge from here. Opening a checkpoint claims what these functions name; writing
//! one produces it.

use safetensors::Dtype;

use crate::{Config, Format, KvCache, MatrixId, MatrixKind, VectorId, VectorKind};

/// How a gpt-oss model lies in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// OpenAI's own: `block.N…`, fused q/k/v, MXFP4 experts.
    Original,
    /// Hugging Face, MXFP4 experts, as published.
    Mxfp4,
    /// Hugging Face, BF16; experts are stored input-major.
    Bf16,
    /// Model Optimizer's unified export: NVFP4, experts input-major, any matrix but the router packed or not.
    #[serde(rename = "modelopt")]
    ModelOpt,
    /// compressed-tensors `nvfp4-pack-quantized`: linear layers packed or not, experts in BF16.
    CompressedTensors,
    /// As `Bf16`, with the scales that made its values in `fake_quant/`.
    FakeBf16,
}

impl Layout {
    /// The name used in messages, JSON and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Layout::Original => "original",
            Layout::Mxfp4 => "mxfp4",
            Layout::Bf16 => "bf16",
            Layout::ModelOpt => "modelopt",
            Layout::CompressedTensors => "compressed-tensors",
            Layout::FakeBf16 => "fake-bf16",
        }
    }

    /// Whether this matrix lies input dimension first: each expert's matrix is the transpose of the logical one, packed
    /// bytes and scales being moved whole.
    pub(crate) fn transposes(self, kind: MatrixKind) -> bool {
        kind.is_expert() && !matches!(self, Layout::Original | Layout::Mxfp4)
    }

    /// Whether global scales are stored as their inverses.
    pub(crate) fn inverts_scales(self) -> bool {
        self == Layout::CompressedTensors
    }

    /// Whether its description has a name for this format of the cache.
    pub(crate) fn names_cache(self, kv_cache: KvCache) -> bool {
        match self {
            Layout::ModelOpt | Layout::FakeBf16 => true,
            Layout::CompressedTensors => kv_cache == KvCache::Fp8,
            Layout::Original | Layout::Mxfp4 | Layout::Bf16 => false,
        }
    }

    /// Whether this layout can hold this matrix in this format.
    pub(crate) fn holds(self, config: &Config, kind: MatrixKind, format: Format) -> bool {
        let (_, _, cols) = kind.shape(config);
        match self {
            Layout::Original | Layout::Mxfp4 => {
                format == if kind.is_expert() { Format::Mxfp4 } else { Format::Bf16 }
            }
            Layout::Bf16 | Layout::FakeBf16 => format == Format::Bf16,
            Layout::ModelOpt | Layout::CompressedTensors => match format {
                Format::Bf16 => true,
                Format::Mxfp4 => false,
                Format::Nvfp4 => cols.is_multiple_of(numerics::nvfp4::BLOCK) && self.packs(kind),
            },
        }
    }

    /// Whether this kind of matrix may be packed in this layout.
    pub(crate) fn packs(self, kind: MatrixKind) -> bool {
        match self {
            Layout::ModelOpt | Layout::FakeBf16 => kind != MatrixKind::Router,
            Layout::CompressedTensors => kind.is_attention() || kind == MatrixKind::Unembedding,
            Layout::Original | Layout::Mxfp4 | Layout::Bf16 => false,
        }
    }
}

/// What a stored tensor is to its logical one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The elements of a matrix that is not packed, or of a vector.
    Values,
    /// Packed E2M1 codes.
    Codes,
    /// One scale byte per block.
    Scales,
    /// The scale of the tensor.
    GlobalScale,
    /// The static scale of its input.
    InputScale,
    /// `k_scale`
    KeyScale,
    /// `v_scale`
    ValueScale,
}

impl Role {
    /// Whether a single number is stored.
    pub(crate) fn is_scalar(self) -> bool {
        matches!(self, Role::GlobalScale | Role::InputScale | Role::KeyScale | Role::ValueScale)
    }
}

/// A stored tensor: what the writer writes and the reader looks for.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    pub(crate) role: Role,
    pub(crate) name: String,
    /// Another spelling that is read.
    pub(crate) alias: Option<String>,
    /// Types that are read; the writer uses the first unless the tensor comes with its own.
    pub(crate) dtypes: &'static [Dtype],
    pub(crate) shape: Vec<usize>,
    /// Of a scale of a stack: one for each of so many matrices is legal, too.
    pub(crate) experts: Option<usize>,
    /// Where the logical rows begin in the stored tensor (fused q/k/v).
    pub(crate) first_row: usize,
    /// Whether the model is incomplete without it.
    pub(crate) required: bool,
}

impl Slot {
    fn new(role: Role, name: String, dtypes: &'static [Dtype], shape: Vec<usize>) -> Slot {
        Slot { role, name, alias: None, dtypes, shape, experts: None, first_row: 0, required: true }
    }

    /// Whether a stored tensor of this shape is this one.
    pub(crate) fn fits(&self, shape: &[usize]) -> bool {
        // Scales may have dimensions of one beside that of the experts.
        let mut longer = shape.iter().filter(|&&size| size != 1);
        let scales = match (longer.next(), longer.next()) {
            (None, _) => self.role.is_scalar(),
            (Some(&size), None) => self.experts == Some(size),
            _ => false,
        };
        scales || shape == self.shape
    }
}

const FLOAT: &[Dtype] = &[Dtype::BF16, Dtype::F32, Dtype::F16];
const U8: &[Dtype] = &[Dtype::U8];
const F8_E4M3: &[Dtype] = &[Dtype::F8_E4M3];
const F32: &[Dtype] = &[Dtype::F32];

/// The stored tensors of a matrix that `layout` holds in `format` (see [`Layout::holds`]).
pub(crate) fn matrix(layout: Layout, config: &Config, id: MatrixId, format: Format) -> Vec<Slot> {
    let (n, rows, cols) = id.kind.shape(config);
    let stack = id.kind.is_expert();
    let base = module(layout, id);
    // `[rows, width]`, for experts with the stack's dimension in front and in the layout's orientation.
    let shape = |width: usize| match (stack, layout.transposes(id.kind)) {
        (false, _) => vec![rows, width],
        (true, false) => vec![n, rows, width],
        (true, true) => vec![n, width, rows],
    };
    // Linear layers join their parts' names with a dot, the parameters of the expert module with an underscore.
    let part = |suffix: &str| if stack { format!("{base}_{suffix}") } else { format!("{base}.{suffix}") };
    let dotted = |mut slot: Slot, suffix: &str| {
        slot.alias = stack.then(|| format!("{base}.{suffix}"));
        slot
    };

    match (layout, format) {
        (Layout::Original, Format::Bf16) => {
            let mut slot = Slot::new(Role::Values, format!("{base}.weight"), FLOAT, shape(cols));
            fuse(&mut slot, config, id.kind);
            vec![slot]
        }
        (Layout::Original, _) => {
            mxfp4_parts(format!("{base}.blocks"), format!("{base}.scales"), &[n, rows, cols])
        }
        (_, Format::Mxfp4) => mxfp4_parts(part("blocks"), part("scales"), &[n, rows, cols]),
        (_, Format::Bf16) => {
            let name = if stack { base.clone() } else { format!("{base}.weight") };
            vec![dotted(Slot::new(Role::Values, name, FLOAT, shape(cols)), "weight")]
        }
        (Layout::CompressedTensors, Format::Nvfp4) => {
            let mut input = Slot::new(Role::InputScale, part("input_global_scale"), F32, vec![1]);
            input.required = false;
            vec![
                Slot::new(Role::Codes, part("weight_packed"), U8, shape(cols / 2)),
                Slot::new(Role::Scales, part("weight_scale"), F8_E4M3, shape(cols / 16)),
                Slot::new(Role::GlobalScale, part("weight_global_scale"), F32, vec![1]),
                input,
            ]
        }
        (_, Format::Nvfp4) => {
            let name = if stack { base.clone() } else { format!("{base}.weight") };
            let mut slots = vec![dotted(Slot::new(Role::Codes, name, U8, shape(cols / 2)), "weight")];
            slots.extend(scales(config, id));
            slots
        }
    }
}

/// The scale tensors of an NVFP4 matrix under Model Optimizer's names, all that `fake_quant/` holds of it.
pub(crate) fn scales(config: &Config, id: MatrixId) -> Vec<Slot> {
    let (n, rows, cols) = id.kind.shape(config);
    let base = module(Layout::ModelOpt, id);
    let stack = id.kind.is_expert();
    let shape = if stack { vec![n, cols / 16, rows] } else { vec![rows, cols / 16] };
    let slot = |role, suffix: &str, dtypes, shape| {
        let dotted = format!("{base}.{suffix}");
        let name = if stack { format!("{base}_{suffix}") } else { dotted.clone() };
        let mut slot = Slot::new(role, name, dtypes, shape);
        slot.alias = stack.then_some(dotted);
        slot
    };
    let mut global = slot(Role::GlobalScale, "weight_scale_2", F32, vec![]);
    let mut input = slot(Role::InputScale, "input_scale", F32, vec![]);
    input.required = false;
    for scale in [&mut global, &mut input] {
        scale.experts = stack.then_some(n);
    }
    vec![slot(Role::Scales, "weight_scale", F8_E4M3, shape), global, input]
}

/// The stored tensor of a vector.
pub(crate) fn vector(layout: Layout, config: &Config, id: VectorId) -> Slot {
    let (n, length) = id.kind.shape(config);
    let shape = match id.kind {
        VectorKind::GateUpBias | VectorKind::DownBias => vec![n, length],
        _ => vec![length],
    };
    let (name, alias) = vector_name(layout, id);
    let mut slot = Slot::new(Role::Values, name, FLOAT, shape);
    slot.alias = alias;
    if layout == Layout::Original {
        match id.kind {
            VectorKind::QueryBias => fuse(&mut slot, config, MatrixKind::Query),
            VectorKind::KeyBias => fuse(&mut slot, config, MatrixKind::Key),
            VectorKind::ValueBias => fuse(&mut slot, config, MatrixKind::Value),
            _ => {}
        }
    }
    slot
}

/// The scales of a layer's FP8 key/value cache, where the layout has a place for them.
pub(crate) fn kv_scales(layout: Layout, layer: usize) -> Vec<Slot> {
    let attention = format!("model.layers.{layer}.self_attn");
    let (key, value, shape) = match layout {
        Layout::ModelOpt | Layout::FakeBf16 => (".k_proj.k_scale", ".v_proj.v_scale", vec![]),
        Layout::CompressedTensors => (".k_scale", ".v_scale", vec![1]),
        Layout::Original | Layout::Mxfp4 | Layout::Bf16 => return Vec::new(),
    };
    [(Role::KeyScale, key), (Role::ValueScale, value)]
        .map(|(role, suffix)| {
            let mut slot = Slot::new(role, format!("{attention}{suffix}"), F32, shape.clone());
            slot.required = false;
            slot
        })
        .into()
}

impl MatrixId {
    /// The matrix's name in Hugging Face's layout, whatever it is stored as: for reports and messages.
    pub fn name(self) -> String {
        let base = module(Layout::Bf16, self);
        if self.kind.is_expert() { base } else { format!("{base}.weight") }
    }
}

impl VectorId {
    /// The vector's name in Hugging Face's layout.
    pub fn name(self) -> String {
        vector_name(Layout::Bf16, self).0
    }
}

/// The name of the module, or of the expert parameter, that a matrix belongs to.
pub(crate) fn module(layout: Layout, id: MatrixId) -> String {
    let original = layout == Layout::Original;
    let inner = match (id.kind, original) {
        (MatrixKind::Embedding, false) => return "model.embed_tokens".to_owned(),
        (MatrixKind::Unembedding, false) => return "lm_head".to_owned(),
        (MatrixKind::Query, false) => "self_attn.q_proj",
        (MatrixKind::Key, false) => "self_attn.k_proj",
        (MatrixKind::Value, false) => "self_attn.v_proj",
        (MatrixKind::Output, false) => "self_attn.o_proj",
        (MatrixKind::Router, false) => "mlp.router",
        (MatrixKind::GateUp, false) => "mlp.experts.gate_up_proj",
        (MatrixKind::Down, false) => "mlp.experts.down_proj",
        (MatrixKind::Embedding, true) => return "embedding".to_owned(),
        (MatrixKind::Unembedding, true) => return "unembedding".to_owned(),
        (MatrixKind::Query | MatrixKind::Key | MatrixKind::Value, true) => "attn.qkv",
        (MatrixKind::Output, true) => "attn.out",
        (MatrixKind::Router, true) => "mlp.gate",
        (MatrixKind::GateUp, true) => "mlp.mlp1_weight",
        (MatrixKind::Down, true) => "mlp.mlp2_weight",
    };
    layer_prefix(layout, id.layer) + inner
}

fn vector_name(layout: Layout, id: VectorId) -> (String, Option<String>) {
    let original = layout == Layout::Original;
    let inner = match (id.kind, original) {
        (VectorKind::FinalNorm, false) => return ("model.norm.weight".to_owned(), None),
        (VectorKind::InputNorm, false) => "input_layernorm.weight",
        (VectorKind::PostAttentionNorm, false) => "post_attention_layernorm.weight",
        (VectorKind::QueryBias, false) => "self_attn.q_proj.bias",
        (VectorKind::KeyBias, false) => "self_attn.k_proj.bias",
        (VectorKind::ValueBias, false) => "self_attn.v_proj.bias",
        (VectorKind::OutputBias, false) => "self_attn.o_proj.bias",
        (VectorKind::Sinks, false) => "self_attn.sinks",
        (VectorKind::RouterBias, false) => "mlp.router.bias",
        (VectorKind::GateUpBias, false) => "mlp.experts.gate_up_proj_bias",
        (VectorKind::DownBias, false) => "mlp.experts.down_proj_bias",
        (VectorKind::FinalNorm, true) => return ("norm.scale".to_owned(), None),
        (VectorKind::InputNorm, true) => "attn.norm.scale",
        (VectorKind::PostAttentionNorm, true) => "mlp.norm.scale",
        (VectorKind::QueryBias | VectorKind::KeyBias | VectorKind::ValueBias, true) => "attn.qkv.bias",
        (VectorKind::OutputBias, true) => "attn.out.bias",
        (VectorKind::Sinks, true) => "attn.sinks",
        (VectorKind::RouterBias, true) => "mlp.gate.bias",
        (VectorKind::GateUpBias, true) => "mlp.mlp1_bias",
        (VectorKind::DownBias, true) => "mlp.mlp2_bias",
    };
    let prefix = layer_prefix(layout, id.layer);
    let alias = (layout == Layout::ModelOpt)
        .then(|| inner.strip_suffix("_proj_bias"))
        .flatten()
        .map(|stem| format!("{prefix}{stem}_proj.bias"));
    (prefix + inner, alias)
}

fn layer_prefix(layout: Layout, layer: usize) -> String {
    if layout == Layout::Original { format!("block.{layer}.") } else { format!("model.layers.{layer}.") }
}

/// Makes a slot of q, k or v a range of rows of the fused tensor.
fn fuse(slot: &mut Slot, config: &Config, kind: MatrixKind) {
    let (q, kv) = (config.query_heads * config.head_dim, config.kv_heads * config.head_dim);
    slot.first_row = match kind {
        MatrixKind::Query => 0,
        MatrixKind::Key => q,
        MatrixKind::Value => q + kv,
        _ => return,
    };
    slot.shape[0] = q + 2 * kv;
}

fn mxfp4_parts(blocks: String, scales: String, &[n, rows, cols]: &[usize; 3]) -> Vec<Slot> {
    vec![
        Slot::new(Role::Codes, blocks, U8, vec![n, rows, cols / 32, 16]),
        Slot::new(Role::Scales, scales, U8, vec![n, rows, cols / 32]),
    ]
}
