//! `config.json` as `Config`: the shape of a gpt-oss model, read from the spellings in use and checked.

use serde_json::{Map, Value, json};

use crate::{Error, MatrixKind, VectorKind};

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

impl Config {
    /// Reads `config.json` in Hugging Face's spelling (either generation of it) or OpenAI's original one.
    ///
    /// A fact that the file states twice must be the same both times. Beside the configuration come warnings,
    /// sentences about what was read in a way that the file does not state.
    ///
    /// # Errors
    /// Names the field: missing, contradictory, of the wrong type, or with a value that no gpt-oss model has.
    pub fn from_json(json: &str) -> Result<(Config, Vec<String>), Error> {
        let value: Value =
            serde_json::from_str(json).map_err(|source| Error::Json { path: FILE.into(), source })?;
        Config::from_value(&value)
    }

    /// As [`Config::from_json`], from parsed JSON.
    pub fn from_value(value: &Value) -> Result<(Config, Vec<String>), Error> {
        let Value::Object(top) = value else {
            return Err(Error::field(FILE, "the document", "an object", kind_of(value)));
        };
        let read = Reader::new(top)?;
        let mut warnings = Vec::new();

        if let Some((name, value)) = read.one(&["model_type"])?
            && value != "gpt_oss"
        {
            return Err(Error::field(FILE, name, "\"gpt_oss\"", value));
        }
        if let Some((name, value)) = read.one(&["attention_bias"])?
            && value != &Value::Bool(true)
        {
            return Err(Error::field(FILE, name, "true", value));
        }
        if let Some((name, value)) = read.one(&["tie_word_embeddings"])?
            && value != &Value::Bool(false)
        {
            return Err(Error::field(FILE, name, "false", value));
        }

        let layers = read.size(&["num_hidden_layers"], MAX_LAYERS)?;
        let layer_kinds = layer_kinds(top, layers)?;

        let rope_type = read.one(&["rope.rope_type", "rope.type"])?;
        let published = read.rope.is_empty() && read.one(&["rope_scaling_factor"])?.is_none();
        let factor = match rope_type {
            Some((_, kind)) if kind == "default" => 1.0,
            Some((name, kind)) if kind != "yarn" => {
                return Err(Error::field(FILE, name, "\"yarn\" or \"default\"", kind));
            }
            _ => match read.positive(&["rope.factor", "rope_scaling_factor"])? {
                Some(factor) => factor,
                // As transformers reads it.
                None if published => {
                    warnings.push(format!(
                        "{FILE}: neither `rope_scaling` nor `rope_parameters`; the rotary embedding is read as that of the published \
                         models, YaRN with a factor of {PUBLISHED_FACTOR}"
                    ));
                    PUBLISHED_FACTOR
                }
                None if rope_type.is_some() => {
                    return Err(Error::field(FILE, "rope_scaling.factor", "a positive number", "nothing"));
                }
                None => 1.0,
            },
        };
        let original_context = read
            .optional_size(&["rope.original_max_position_embeddings", "initial_context_length"], MAX_SIZE)?
            .or(published.then_some(PUBLISHED_ORIGINAL_CONTEXT));
        let max_context = match read.optional_size(&["max_position_embeddings"], MAX_SIZE)? {
            Some(context) => context,
            None => {
                let Some(original) = original_context else {
                    return Err(Error::field(
                        FILE,
                        "max_position_embeddings",
                        "a positive integer",
                        "nothing",
                    ));
                };
                let context = (original as f64 * f64::from(factor)).floor();
                if context > MAX_SIZE as f64 {
                    return Err(Error::field(
                        FILE,
                        "initial_context_length",
                        format!("at most {MAX_SIZE} with its factor"),
                        context,
                    ));
                }
                (context as usize).max(1)
            }
        };
        let truncate = match read.one(&["rope.truncate"])? {
            Some((_, Value::Bool(truncate))) => *truncate,
            Some((name, value)) => return Err(Error::field(FILE, name, "true or false", value)),
            None => {
                if rope_type.is_some_and(|(_, kind)| kind == "yarn") {
                    warnings.push(format!(
                        "{FILE}: the rotary embedding has no `truncate`; it is read as false, as gpt-oss was trained"
                    ));
                }
                false
            }
        };
        if let Some(attention_factor) = read.positive(&["rope.attention_factor"])? {
            let expected = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
            if (attention_factor - expected).abs() > 1e-4 {
                return Err(Error::field(
                    FILE,
                    "rope_scaling.attention_factor",
                    format!("none or {expected}"),
                    attention_factor,
                ));
            }
        }
        for field in ["rope.mscale", "rope.mscale_all_dim"] {
            if let Some((name, value)) = read.one(&[field])? {
                return Err(Error::field(FILE, name, "no such field", value));
            }
        }
        let Some(base) = read.positive(&["rope.rope_theta", "rope_theta"])? else {
            return Err(Error::field(FILE, "rope_theta", "a positive number", "nothing"));
        };
        let rope = Rope {
            base,
            factor,
            beta_fast: read.positive(&["rope.beta_fast", "rope_ntk_beta"])?.unwrap_or(32.0),
            beta_slow: read.positive(&["rope.beta_slow", "rope_ntk_alpha"])?.unwrap_or(1.0),
            original_context: original_context.unwrap_or(max_context),
            truncate,
        };

        let config = Config {
            hidden_size: read.size(&["hidden_size"], MAX_SIZE)?,
            intermediate_size: read.size(&["intermediate_size"], MAX_SIZE)?,
            query_heads: read.size(&["num_attention_heads"], MAX_SIZE)?,
            kv_heads: read.size(&["num_key_value_heads"], MAX_SIZE)?,
            head_dim: read.size(&["head_dim"], MAX_SIZE)?,
            experts: read.size(&["num_local_experts", "num_experts"], MAX_SIZE)?,
            experts_per_token: read.size(&["num_experts_per_tok", "experts_per_token"], MAX_SIZE)?,
            vocab_size: read.size(&["vocab_size"], MAX_SIZE)?,
            // Where no layer has one it need not be said.
            sliding_window: match read.optional_size(&["sliding_window"], MAX_SIZE)? {
                None if !layer_kinds.contains(&LayerKind::Sliding) => max_context,
                _ => read.size(&["sliding_window"], MAX_SIZE)?,
            },
            layer_kinds,
            rms_norm_eps: read.positive(&["rms_norm_eps"])?.unwrap_or(1e-5),
            swiglu_limit: read.positive(&["swiglu_limit"])?.unwrap_or(7.0),
            swiglu_alpha: read.positive(&["swiglu_alpha"])?.unwrap_or(1.702),
            rope,
            max_context,
        };
        config.check()?;
        Ok((config, warnings))
    }

    /// The shape of gpt-oss-20b as published.
    pub fn gpt_oss_20b() -> Config {
        Config {
            hidden_size: 2880,
            intermediate_size: 2880,
            query_heads: 64,
            kv_heads: 8,
            head_dim: 64,
            experts: 32,
            experts_per_token: 4,
            vocab_size: 201_088,
            sliding_window: 128,
            layer_kinds: alternating(24),
            rms_norm_eps: 1e-5,
            swiglu_limit: 7.0,
            swiglu_alpha: 1.702,
            rope: Rope {
                base: 150_000.0,
                factor: PUBLISHED_FACTOR,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original_context: PUBLISHED_ORIGINAL_CONTEXT,
                truncate: false,
            },
            max_context: 131_072,
        }
    }

    /// The shape of gpt-oss-120b as published.
    pub fn gpt_oss_120b() -> Config {
        Config { experts: 128, layer_kinds: alternating(36), ..Config::gpt_oss_20b() }
    }

    /// The number of weights, biases and scales of norms.
    pub fn parameters(&self) -> u64 {
        // Fits: `check` bounds the sum.
        u64::try_from(self.wide_parameters())
            .expect("the number of parameters was bounded when the config was read")
    }

    /// The configuration in Hugging Face's spelling, as for a published checkpoint without quantization.
    pub fn to_json(&self) -> Value {
        let kinds = self.layer_kinds.iter().map(|kind| match kind {
            LayerKind::Sliding => "sliding_attention",
            LayerKind::Full => "full_attention",
        });
        let mut config = json!({
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": true,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "experts_per_token": self.experts_per_token,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initial_context_length": self.rope.original_context,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": kinds.collect::<Vec<_>>(),
            "max_position_embeddings": self.max_context,
            "model_type": "gpt_oss",
            "num_attention_heads": self.query_heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.layer_kinds.len(),
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "output_router_logits": false,
            "rms_norm_eps": decimal(self.rms_norm_eps),
            "rope_scaling": {
                "beta_fast": decimal(self.rope.beta_fast),
                "beta_slow": decimal(self.rope.beta_slow),
                "factor": decimal(self.rope.factor),
                "original_max_position_embeddings": self.rope.original_context,
                "rope_type": "yarn",
                "truncate": self.rope.truncate,
            },
            "rope_theta": decimal(self.rope.base),
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.sliding_window,
            "swiglu_alpha": decimal(self.swiglu_alpha),
            "swiglu_limit": decimal(self.swiglu_limit),
            "tie_word_embeddings": false,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        if self.has_o200k_vocabulary() {
            config["eos_token_id"] = json!(200_002);
            config["pad_token_id"] = json!(199_999);
        }
        config
    }

    /// Whether the vocabulary is that of the published models, which says what its special tokens are.
    pub(crate) fn has_o200k_vocabulary(&self) -> bool {
        self.vocab_size == Config::gpt_oss_20b().vocab_size
    }

    fn check(&self) -> Result<(), Error> {
        let require = |legal: bool, field: &str, expected: String, found: usize| {
            if legal { Ok(()) } else { Err(Error::field(FILE, field, expected, found)) }
        };
        for (field, size) in
            [("hidden_size", self.hidden_size), ("intermediate_size", self.intermediate_size)]
        {
            require(size.is_multiple_of(32), field, "a multiple of 32".to_owned(), size)?;
        }
        require(self.head_dim.is_multiple_of(2), "head_dim", "an even number".to_owned(), self.head_dim)?;
        require(
            self.query_heads.is_multiple_of(self.kv_heads),
            "num_attention_heads",
            format!("a multiple of `num_key_value_heads`, {}", self.kv_heads),
            self.query_heads,
        )?;
        require(
            self.experts_per_token <= self.experts,
            "num_experts_per_tok",
            format!("at most `num_local_experts`, {}", self.experts),
            self.experts_per_token,
        )?;
        if self.rope.beta_fast <= self.rope.beta_slow {
            return Err(Error::field(
                FILE,
                "rope_scaling.beta_fast",
                format!("more than `beta_slow`, {}", self.rope.beta_slow),
                self.rope.beta_fast,
            ));
        }
        if self.rope.base <= 1.0 {
            return Err(Error::field(FILE, "rope_theta", "more than 1", self.rope.base));
        }
        let parameters = self.wide_parameters();
        if parameters > MAX_PARAMETERS {
            return Err(Error::field(
                FILE,
                "the product of the sizes",
                format!("at most {MAX_PARAMETERS} parameters"),
                parameters,
            ));
        }
        Ok(())
    }

    fn wide_parameters(&self) -> u128 {
        // In 128 bits: five factors of at most 2^24. The kinds' own `shape` multiplies two of them, which fits.
        let matrix = |kind: MatrixKind| {
            let (n, rows, cols) = kind.shape(self);
            n as u128 * rows as u128 * cols as u128
        };
        let vector = |kind: VectorKind| {
            let (n, length) = kind.shape(self);
            n as u128 * length as u128
        };
        let layer = MatrixKind::LAYER.map(matrix).iter().sum::<u128>()
            + VectorKind::LAYER.map(vector).iter().sum::<u128>();
        layer * self.layer_kinds.len() as u128
            + matrix(MatrixKind::Embedding)
            + matrix(MatrixKind::Unembedding)
            + vector(VectorKind::FinalNorm)
    }
}

/// How the file is called in messages.
const FILE: &str = "config.json";

/// YaRN's factor and original context of the published models.
const PUBLISHED_FACTOR: f32 = 32.0;
const PUBLISHED_ORIGINAL_CONTEXT: usize = 4096;

/// The largest single dimension.
const MAX_SIZE: usize = 1 << 24;

/// The most layers: names are enumerated per layer before the files are looked at.
const MAX_LAYERS: usize = 1024;

/// The most parameters: sizes in bits still fit 64-bit arithmetic.
const MAX_PARAMETERS: u128 = 1 << 50;

fn alternating(layers: usize) -> Vec<LayerKind> {
    (0..layers).map(|l| if l % 2 == 0 { LayerKind::Sliding } else { LayerKind::Full }).collect()
}

fn layer_kinds(top: &Map<String, Value>, layers: usize) -> Result<Vec<LayerKind>, Error> {
    let listed = match top.get("layer_types") {
        None | Some(Value::Null) => return Ok(alternating(layers)),
        Some(Value::Array(listed)) => listed,
        Some(other) => return Err(Error::field(FILE, "layer_types", "a list", kind_of(other))),
    };
    if listed.len() != layers {
        let expected = format!("one entry for each of {layers} layers");
        return Err(Error::field(FILE, "layer_types", expected, listed.len()));
    }
    listed
        .iter()
        .map(|kind| match kind.as_str() {
            Some("sliding_attention") => Ok(LayerKind::Sliding),
            Some("full_attention") => Ok(LayerKind::Full),
            _ => Err(Error::field(FILE, "layer_types", "\"sliding_attention\" or \"full_attention\"", kind)),
        })
        .collect()
}

/// The shortest decimal number that reads back as this F32, so that 1e-5 is not written as 9.999999747378752e-6.
fn decimal(value: f32) -> Value {
    json!(value.to_string().parse::<f64>().expect("a float prints as a float"))
}

pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Looks facts up under all their names. `rope.x` stands for `x` in either of the objects about rotary embedding.
struct Reader<'a> {
    top: &'a Map<String, Value>,
    rope: Vec<(&'static str, &'a Map<String, Value>)>,
}

impl<'a> Reader<'a> {
    fn new(top: &'a Map<String, Value>) -> Result<Self, Error> {
        let mut rope = Vec::new();
        for name in ["rope_scaling", "rope_parameters"] {
            match top.get(name) {
                None | Some(Value::Null) => {}
                Some(Value::Object(object)) => rope.push((name, object)),
                Some(other) => return Err(Error::field(FILE, name, "an object", kind_of(other))),
            }
        }
        Ok(Reader { top, rope })
    }

    /// The one value that the file gives for a fact, null counting as none, with the field's name.
    fn one(&self, names: &[&str]) -> Result<Option<(String, &'a Value)>, Error> {
        let mut found: Option<(String, &'a Value)> = None;
        for name in names {
            let candidates: Vec<(String, Option<&'a Value>)> = match name.strip_prefix("rope.") {
                Some(inner) => {
                    self.rope.iter().map(|(o, map)| (format!("{o}.{inner}"), map.get(inner))).collect()
                }
                None => vec![((*name).to_owned(), self.top.get(*name))],
            };
            for (name, value) in candidates {
                let Some(value) = value.filter(|value| !value.is_null()) else { continue };
                match &found {
                    None => found = Some((name, value)),
                    Some((first, earlier)) => {
                        let equal = match (earlier.as_f64(), value.as_f64()) {
                            (Some(a), Some(b)) => a == b,
                            _ => *earlier == value,
                        };
                        if !equal {
                            let expected = format!("{earlier} as in `{first}`");
                            return Err(Error::field(FILE, name, expected, value));
                        }
                    }
                }
            }
        }
        Ok(found)
    }

    fn optional_size(&self, names: &[&str], largest: usize) -> Result<Option<usize>, Error> {
        let Some((name, value)) = self.one(names)? else { return Ok(None) };
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) if (1..=largest).contains(&size) => Ok(Some(size)),
            _ => Err(Error::field(FILE, name, format!("an integer from 1 to {largest}"), value)),
        }
    }

    fn size(&self, names: &[&str], largest: usize) -> Result<usize, Error> {
        self.optional_size(names, largest)?
            .ok_or_else(|| Error::field(FILE, names[0], format!("an integer from 1 to {largest}"), "nothing"))
    }

    /// A positive number that F32 can hold.
    fn positive(&self, names: &[&str]) -> Result<Option<f32>, Error> {
        let Some((name, value)) = self.one(names)? else { return Ok(None) };
        match value.as_f64().map(|number| number as f32) {
            Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
            _ => Err(Error::field(FILE, name, "a positive number", value)),
        }
    }
}
