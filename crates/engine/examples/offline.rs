//! The offline API: continues a prompt with a model folder on this CPU.
//!
//! `cargo run --release -p engine --example offline -- models/tiny-gpt-oss "Once upon a time"`
#![allow(clippy::print_stdout, reason = "an example")]

use std::path::Path;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(text)) = (args.next(), args.next()) else {
        return Err("expected MODEL and PROMPT".into());
    };
    let checkpoint = checkpoint::Checkpoint::open(Path::new(&folder))?;
    let tokenizer = tokenizer::Tokenizer::from_file(&Path::new(&folder).join("tokenizer.json"))?;
    let harmony = Arc::new(harmony::Harmony::new(Arc::new(tokenizer))?);
    let backend = cpu::Cpu::load(Arc::new(checkpoint), cpu::Options::default(), &mut |_, _| {})?;
    let engine = engine::Engine::start(Box::new(backend), harmony, engine::EngineOptions::default())?;

    let llm = engine::Llm::new(engine);
    let params = engine::SamplingParams { max_tokens: Some(64), ..engine::SamplingParams::default() };
    for output in llm.generate(&[engine::Prompt::Text(text)], &[params], &mut |_| {})? {
        println!("{}", output.outputs[0].text);
    }
    Ok(())
}
