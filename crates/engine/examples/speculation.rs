//! What guessing tokens saves: the same greedy answers with and without, and how long they took.
//!
//! `cargo run --release -p engine --example speculation -- models/tiny-gpt-oss`
#![allow(clippy::print_stdout, reason = "an example")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use engine::{Engine, EngineOptions, Llm, Prompt, SamplingParams, Speculation};

const TEXTS: [(&str, &str); 3] = [
    ("a list that goes on", "1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3,"),
    ("a text to repeat", "The dog ran to the park. The dog ran to the park. The dog ran"),
    ("a story", "Once upon a time there was a little girl who"),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("expected MODEL")?;
    let checkpoint = Arc::new(checkpoint::Checkpoint::open(Path::new(&folder))?);
    let tokenizer = tokenizer::Tokenizer::from_file(&Path::new(&folder).join("tokenizer.json"))?;
    let harmony = Arc::new(harmony::Harmony::new(Arc::new(tokenizer))?);
    let always = Speculation { adaptive: false, ..Speculation::default() };
    let mut engines = Vec::new();
    for speculation in [None, Some(Speculation::default()), Some(always)] {
        let backend = cpu::Cpu::load(checkpoint.clone(), cpu::Options::default(), &mut |_, _| {})?;
        let options = EngineOptions { speculation, prefix_caching: false, ..EngineOptions::default() };
        engines.push(Llm::new(Engine::start(Box::new(backend), Arc::clone(&harmony), options)?));
    }
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens: Some(256),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    println!("{:<20} {:>9} {:>9} {:>9}  tokens per step", "", "without", "adaptive", "always");
    for (name, text) in TEXTS {
        let prompt = [Prompt::Text(text.to_owned())];
        let (mut times, mut said, mut steps) = ([f64::INFINITY; 3], Vec::new(), 0);
        for _ in 0..5 {
            for (time, llm) in times.iter_mut().zip(&engines) {
                let before = llm.engine().stats().steps;
                let start = Instant::now();
                let outputs = llm.generate(&prompt, std::slice::from_ref(&params), &mut |_| {})?;
                *time = time.min(start.elapsed().as_secs_f64());
                steps = llm.engine().stats().steps - before;
                said.push(outputs[0].outputs[0].token_ids.clone());
            }
        }
        if said.iter().any(|tokens| *tokens != said[0]) {
            return Err(format!("{name}: the answers differ").into());
        }
        let rate = |time: f64| 256.0 / time;
        println!(
            "{name:<20} {:>7.0}/s {:>8.2}× {:>8.2}×  {:.2}",
            rate(times[0]),
            times[0] / times[1],
            times[0] / times[2],
            256.0 / steps as f64
        );
    }
    Ok(())
}
