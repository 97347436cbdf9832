//! The tokenizer against golden values, the pattern's oracle and hostile input.
#![allow(clippy::unwrap_used, reason = "tests")]

mod golden;
mod hostile;
mod properties;

use std::path::PathBuf;

use tokenizer::Tokenizer;

fn root(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(path)
}

fn json(path: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(root(path)).unwrap()).unwrap()
}

fn tiny() -> Tokenizer {
    Tokenizer::from_file(&root("models/tiny-gpt-oss/tokenizer.json")).unwrap()
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}
