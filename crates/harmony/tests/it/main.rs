//! Harmony against golden values and properties.
#![allow(clippy::unwrap_used, reason = "tests")]

mod parse;
mod properties;
mod render;
mod replay;

use std::sync::Arc;

use harmony::Harmony;
use serde_json::Value;
use tokenizer::Tokenizer;

fn golden(name: &str) -> Vec<Value> {
    let path = format!("{}/../../testdata/harmony/{name}", env!("CARGO_MANIFEST_DIR"));
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    file["cases"].as_array().unwrap().clone()
}

fn o200k() -> Harmony {
    Harmony::new(Tokenizer::o200k_harmony()).unwrap()
}

fn tiny() -> Harmony {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-gpt-oss/tokenizer.json");
    Harmony::new(Arc::new(Tokenizer::from_file(path.as_ref()).unwrap())).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| u32::try_from(v.as_u64().unwrap()).unwrap_or(u32::MAX)).collect()
}
