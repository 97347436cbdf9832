//! `config.json` as `Config`: the shape of a gpt-oss model, read from the spellings in use and checked.

/// Which keys a layer's attention sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// The last `sliding_window` positions, the token itself included.
    Sliding,
    /// All positions.
    Full,
}

/// Rotary embedding with YaRN's "NTK by parts" frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// `rope_theta`
    pub base: f32,
    /// Context extension; 1 means none.
    pub factor: f32,
    /// Rotations above which a frequency is kept.
    pub beta_fast: f32,
    /// Rotations below which a frequency is divided by `factor`.
    pub beta_slow: f32,
    /// Context before the extension.
    pub original_context: usize,
    /// Whether the two boundaries are rounded to integers (gpt-oss: no).
    pub truncate: bool,
}

/// The shape of a model. Every field has been checked: see the rules of `Config::from_json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `D`
    pub hidden_size: usize,
    /// `I`, per expert
    pub intermediate_size: usize,
    /// `H`
    pub query_heads: usize,
    /// `K`
    pub kv_heads: usize,
    /// `d`
    pub head_dim: usize,
    /// `E`
    pub experts: usize,
    /// `k`
    pub experts_per_token: usize,
    /// `V`
    pub vocab_size: usize,
    /// Positions that a sliding layer sees.
    pub sliding_window: usize,
    /// The kind of each layer; its length is the number of layers.
    pub layer_kinds: Vec<LayerKind>,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Clamp of gate and up.
    pub swiglu_limit: f32,
    /// Slope inside the sigmoid of the gate.
    pub swiglu_alpha: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// `max_position_embeddings`
    pub max_context: usize,
}
