//! `generation_config.json`: where generation stops and how it samples by default.

use std::path::Path;

use serde_json::{Value, json};

use crate::{Config, Error, config::kind_of, reader::read_json};

/// The defaults of generation that come with a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end a completion; from `config.json` where `generation_config.json` names none.
    pub eos_token_ids: Vec<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus sampling.
    pub top_p: Option<f32>,
    /// How many of the best tokens are sampled from.
    pub top_k: Option<u32>,
    /// The share of the best token's probability that others must have.
    pub min_p: Option<f32>,
    /// Divides the logits of tokens that were there already.
    pub repetition_penalty: Option<f32>,
    /// `false` asks for the best token always.
    pub do_sample: Option<bool>,
}

impl GenerationConfig {
    /// The file that published checkpoints have, its name and contents, for a model of their vocabulary that comes without one.
    pub fn published(config: &Config) -> Option<(String, Vec<u8>)> {
        let document = json!({
            "bos_token_id": 199_998,
            "do_sample": true,
            "eos_token_id": [200_002, 199_999, 200_012],
            "pad_token_id": 199_999,
        });
        config.has_o200k_vocabulary().then(|| (FILE.to_owned(), format!("{document:#}\n").into_bytes()))
    }

    /// Reads the `generation_config.json` of a folder.
    ///
    /// # Errors
    /// [`Error::File`] if there is none; [`Error::Json`] or [`Error::Field`] for a field that has no meaning.
    pub fn open(folder: &Path) -> Result<GenerationConfig, Error> {
        let path = folder.join(FILE);
        let found = read_json(&path)?;
        let value = found.ok_or_else(|| Error::file(&path, "the defaults of generation", "no such file"))?;
        GenerationConfig::read(Some(&value), &Value::Null)
    }

    /// Reads `generation_config.json`, if there is one; `config` is `config.json`.
    pub(crate) fn read(generation: Option<&Value>, config: &Value) -> Result<Self, Error> {
        let mut read = GenerationConfig::default();
        if let Some(value) = generation {
            let Value::Object(fields) = value else {
                return Err(Error::field(FILE, "the document", "an object", kind_of(value)));
            };
            read.eos_token_ids = ids(FILE, fields.get("eos_token_id"))?;
            let number = |name: &str, smallest: f64, largest: f64| match fields.get(name) {
                None | Some(Value::Null) => Ok(None),
                Some(value) => match value.as_f64() {
                    Some(number) if (smallest..=largest).contains(&number) => Ok(Some(number)),
                    _ => {
                        Err(Error::field(FILE, name, format!("a number from {smallest} to {largest}"), value))
                    }
                },
            };
            read.temperature = number("temperature", 0.0, 100.0)?.map(|t| t as f32);
            read.top_p = number("top_p", 0.0, 1.0)?.map(|p| p as f32);
            // -1 and 0 are two ways to say that there is no such limit.
            let top_k = number("top_k", -1.0, f64::from(i32::MAX))?;
            read.top_k = top_k.filter(|&k| k >= 0.0).map(|k| k as u32);
            read.min_p = number("min_p", 0.0, 1.0)?.map(|p| p as f32);
            read.repetition_penalty = number("repetition_penalty", 0.01, 100.0)?.map(|p| p as f32);
            read.do_sample = match fields.get("do_sample") {
                None | Some(Value::Null) => None,
                Some(Value::Bool(sample)) => Some(*sample),
                Some(other) => return Err(Error::field(FILE, "do_sample", "true or false", other)),
            };
        }
        if read.eos_token_ids.is_empty() {
            read.eos_token_ids = ids("config.json", config.get("eos_token_id"))?;
        }
        Ok(read)
    }
}

const FILE: &str = "generation_config.json";

fn ids(file: &str, value: Option<&Value>) -> Result<Vec<u32>, Error> {
    let id = |value: &Value| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| Error::field(file, "eos_token_id", "a token id or a list of them", value))
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(one) => Ok(vec![id(one)?]),
    }
}
