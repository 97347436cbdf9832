//! `quantization_config` and `hf_quant_config.json`: what they promise about the tensors, read and written.

use serde_json::{Map, Value, json};

use crate::config::kind_of;
use crate::layout::module;
use crate::{Config, Error, Format, Layout, MatrixId, MatrixKind, matrices};

/// The format of the key/value cache that a checkpoint asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCache {
    /// E4M3 with one scale per tensor.
    Fp8,
    /// Blocks of 16 as in the weights.
    Nvfp4,
}

/// What a checkpoint says about its quantization.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantization {
    /// The layout that the method stands for.
    pub layout: Layout,
    /// `quant_algo` of Model Optimizer.
    pub algorithm: Option<String>,
    /// The key/value cache.
    pub kv_cache: Option<KvCache>,
}

impl Quantization {
    /// Reads `quantization_config` of `config.json`; `None` if there is none.
    pub(crate) fn from_config(config: &Value) -> Result<Option<Quantization>, Error> {
        const FILE: &str = "config.json";
        let fields = match config.get("quantization_config") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(fields)) => fields,
            Some(other) => {
                return Err(Error::field(FILE, "quantization_config", "an object", kind_of(other)));
            }
        };
        let method = fields.get("quant_method").unwrap_or(&Value::Null);
        let layout = match method.as_str() {
            Some("mxfp4") => Layout::Mxfp4,
            Some("modelopt") => Layout::ModelOpt,
            Some("compressed-tensors") => {
                let format = fields.get("format").unwrap_or(&Value::Null);
                if format != "nvfp4-pack-quantized" {
                    let field = "quantization_config.format";
                    return Err(Error::field(FILE, field, "\"nvfp4-pack-quantized\"", format));
                }
                Layout::CompressedTensors
            }
            _ => {
                return Err(Error::field(
                    FILE,
                    "quantization_config.quant_method",
                    "\"mxfp4\", \"modelopt\" or \"compressed-tensors\"",
                    method,
                ));
            }
        };
        let algorithm = match layout {
            Layout::ModelOpt => Some(algorithm(FILE, "quantization_config", fields)?),
            _ => None,
        };
        check_groups(FILE, fields)?;
        let kv_cache = match fields.get("kv_cache_scheme") {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) if name == "NVFP4" => Some(KvCache::Nvfp4),
            Some(Value::Object(scheme)) if is_fp8(scheme) => Some(KvCache::Fp8),
            Some(other) => {
                let expected = "8-bit float or \"NVFP4\"";
                return Err(Error::field(FILE, "quantization_config.kv_cache_scheme", expected, other));
            }
        };
        Ok(Some(Quantization { layout, algorithm, kv_cache }))
    }

    /// Reads `hf_quant_config.json`, which older exports have alone.
    pub(crate) fn from_hf_quant_config(value: &Value) -> Result<Quantization, Error> {
        const FILE: &str = "hf_quant_config.json";
        let Some(Value::Object(fields)) = value.get("quantization") else {
            return Err(Error::field(FILE, "quantization", "an object", "something else"));
        };
        let algorithm = algorithm(FILE, "quantization", fields)?;
        check_group_size(FILE, "quantization.group_size", fields.get("group_size"))?;
        let kv_cache = match fields.get("kv_cache_quant_algo") {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) if name == "FP8" => Some(KvCache::Fp8),
            Some(Value::String(name)) if name == "NVFP4" => Some(KvCache::Nvfp4),
            Some(other) => {
                return Err(Error::field(
                    FILE,
                    "quantization.kv_cache_quant_algo",
                    "\"FP8\" or \"NVFP4\"",
                    other,
                ));
            }
        };
        Ok(Quantization { layout: Layout::ModelOpt, algorithm: Some(algorithm), kv_cache })
    }
}

fn algorithm(file: &str, parent: &str, fields: &Map<String, Value>) -> Result<String, Error> {
    let value = fields.get("quant_algo").unwrap_or(&Value::Null);
    match value.as_str() {
        Some(name @ ("NVFP4" | "W4A16_NVFP4")) => Ok(name.to_owned()),
        _ => Err(Error::field(file, format!("{parent}.quant_algo"), "\"NVFP4\" or \"W4A16_NVFP4\"", value)),
    }
}

/// Other block sizes and widths use the same tensor names: they must not be read as NVFP4.
fn check_groups(file: &str, fields: &Map<String, Value>) -> Result<(), Error> {
    let Some(Value::Object(groups)) = fields.get("config_groups") else { return Ok(()) };
    for (name, group) in groups {
        for part in ["weights", "input_activations"] {
            let Some(Value::Object(scheme)) = group.get(part) else { continue };
            let path = format!("quantization_config.config_groups.{name}.{part}");
            check_group_size(file, &format!("{path}.group_size"), scheme.get("group_size"))?;
            if let Some(bits) = scheme.get("num_bits")
                && bits != &json!(4)
            {
                return Err(Error::field(file, format!("{path}.num_bits"), "4", bits));
            }
        }
    }
    Ok(())
}

fn check_group_size(file: &str, field: &str, value: Option<&Value>) -> Result<(), Error> {
    match value {
        Some(size) if !size.is_null() && size != &json!(16) => Err(Error::field(file, field, "16", size)),
        _ => Ok(()),
    }
}

fn is_fp8(scheme: &Map<String, Value>) -> bool {
    scheme.get("num_bits") == Some(&json!(8)) && scheme.get("type") == Some(&json!("float"))
}

/// What a checkpoint about to be written has to say about itself.
pub(crate) struct Description<'a> {
    pub(crate) layout: Layout,
    pub(crate) config: &'a Config,
    /// The format of each matrix of the checkpoint.
    pub(crate) format: &'a dyn Fn(MatrixId) -> Format,
    /// Whether NVFP4 matrices come with the scale of their input (W4A4).
    pub(crate) activations: bool,
    pub(crate) kv_cache: Option<KvCache>,
    pub(crate) version: &'a str,
}

impl Description<'_> {
    /// The object for `quantization_config`, if the layout has one.
    pub(crate) fn quantization_config(&self) -> Option<Value> {
        match self.layout {
            Layout::Original | Layout::Bf16 | Layout::FakeBf16 => None,
            Layout::Mxfp4 => Some(json!({
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            })),
            Layout::ModelOpt => {
                let scheme = json!({"dynamic": false, "num_bits": 4, "type": "float", "group_size": 16});
                let mut group = Map::new();
                if self.activations {
                    group.insert("input_activations".to_owned(), scheme.clone());
                }
                group.insert("weights".to_owned(), scheme);
                group.insert("targets".to_owned(), json!(["Linear"]));
                let mut fields = Map::new();
                fields.insert("config_groups".to_owned(), json!({"group_0": group}));
                fields.insert("ignore".to_owned(), json!(self.excluded()));
                fields.insert("quant_algo".to_owned(), json!(self.algorithm()));
                match self.kv_cache {
                    None => {}
                    Some(KvCache::Fp8) => {
                        let scheme = json!({"dynamic": false, "num_bits": 8, "type": "float"});
                        fields.insert("kv_cache_scheme".to_owned(), scheme);
                    }
                    Some(KvCache::Nvfp4) => {
                        fields.insert("kv_cache_scheme".to_owned(), json!("NVFP4"));
                    }
                }
                fields.insert("producer".to_owned(), self.producer());
                fields.insert("quant_method".to_owned(), json!("modelopt"));
                Some(Value::Object(fields))
            }
            Layout::CompressedTensors => {
                let scheme = |dynamic: Value| {
                    json!({
                        "num_bits": 4,
                        "type": "float",
                        "strategy": "tensor_group",
                        "symmetric": true,
                        "group_size": 16,
                        "dynamic": dynamic,
                    })
                };
                let activations = if self.activations { scheme(json!("local")) } else { Value::Null };
                let kv_cache = match self.kv_cache {
                    Some(KvCache::Fp8) => json!({
                        "num_bits": 8,
                        "type": "float",
                        "strategy": "tensor",
                        "symmetric": true,
                        "dynamic": false,
                    }),
                    _ => Value::Null,
                };
                Some(json!({
                    "quant_method": "compressed-tensors",
                    "format": "nvfp4-pack-quantized",
                    "quantization_status": "compressed",
                    "config_groups": {
                        "group_0": {
                            "targets": ["Linear"],
                            "format": "nvfp4-pack-quantized",
                            "weights": scheme(json!(false)),
                            "input_activations": activations,
                            "output_activations": null,
                        },
                    },
                    "ignore": self.unpacked_linears(),
                    "kv_cache_scheme": kv_cache,
                }))
            }
        }
    }

    /// The document `hf_quant_config.json`, if the layout has one.
    pub(crate) fn hf_quant_config(&self) -> Option<Value> {
        matches!(self.layout, Layout::ModelOpt | Layout::FakeBf16).then(|| {
            let kv_cache = self.kv_cache.map(|cache| match cache {
                KvCache::Fp8 => "FP8",
                KvCache::Nvfp4 => "NVFP4",
            });
            json!({
                "producer": self.producer(),
                "quantization": {
                    "quant_algo": self.algorithm(),
                    "kv_cache_quant_algo": kv_cache,
                    "group_size": 16,
                    "exclude_modules": self.excluded(),
                },
            })
        })
    }

    fn algorithm(&self) -> &'static str {
        if self.activations { "NVFP4" } else { "W4A16_NVFP4" }
    }

    fn producer(&self) -> Value {
        json!({"name": "nibble", "version": self.version})
    }

    fn packed(&self, id: MatrixId) -> bool {
        (self.format)(id) == Format::Nvfp4
    }

    /// Model Optimizer's exclude list: sorted names of modules, a module with nothing quantized in it summarized by `*`.
    fn excluded(&self) -> Vec<String> {
        let mut names = Vec::new();
        for kind in [MatrixKind::Embedding, MatrixKind::Unembedding] {
            if !self.packed(kind.at(0)) {
                names.push(module(Layout::ModelOpt, kind.at(0)));
            }
        }
        for layer in 0..self.config.layer_kinds.len() {
            names.push(module(Layout::ModelOpt, MatrixKind::Router.at(layer)));
            let attention = [MatrixKind::Query, MatrixKind::Key, MatrixKind::Value, MatrixKind::Output];
            let experts = [MatrixKind::GateUp, MatrixKind::Down];
            let groups = [(&attention[..], "self_attn*"), (&experts[..], "mlp.experts*")];
            for (kinds, summary) in groups {
                let plain: Vec<_> =
                    kinds.iter().map(|k| k.at(layer)).filter(|&id| !self.packed(id)).collect();
                if plain.len() == kinds.len() {
                    names.push(format!("model.layers.{layer}.{summary}"));
                } else {
                    names.extend(plain.into_iter().map(|id| module(Layout::ModelOpt, id)));
                }
            }
        }
        names.sort_unstable();
        names
    }

    /// compressed-tensors' ignore list: linear modules, each by its full name, and the expert modules.
    fn unpacked_linears(&self) -> Vec<String> {
        let mut names = Vec::new();
        for id in matrices(self.config) {
            match id.kind {
                MatrixKind::Embedding | MatrixKind::Down => {}
                MatrixKind::GateUp => names.push(format!("model.layers.{}.mlp.experts", id.layer)),
                _ if self.packed(id) => {}
                _ => names.push(module(Layout::CompressedTensors, id)),
            }
        }
        names
    }
}
