//! The small model's perplexity against the reference implementation's, and what divergence must be.
#![allow(clippy::unwrap_used, reason = "tests")]

mod report;

use std::path::PathBuf;
use std::sync::Arc;

use checkpoint::{Checkpoint, Weights};
use cpu::{Cpu, Options};
use evaluate::{divergence, perplexity, windows};
use quantize::{Algorithm, Quantized, Recipe, ScalesPer};
use tokenizer::Tokenizer;

fn root(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(path)
}

fn load(weights: Arc<dyn Weights>) -> Cpu {
    Cpu::load(weights, Options::default(), &mut |_, _| {}).unwrap()
}

fn small() -> Arc<dyn Weights> {
    Arc::new(Checkpoint::open(&root("models/tiny-gpt-oss")).unwrap())
}

fn quantized(source: Arc<dyn Weights>, algorithm: Algorithm) -> Arc<dyn Weights> {
    let options = quantize::Options::Nvfp4 {
        recipe: Recipe::Experts,
        algorithm,
        embedding: false,
        scales_per: ScalesPer::Stack,
        activations: false,
        kv_scales: false,
        experts_in_bf16: false,
    };
    Arc::new(Quantized::new(source, options, 2, &mut |_, _| {}).unwrap())
}

fn books() -> Vec<Vec<u32>> {
    let tokenizer = Tokenizer::from_file(&root("models/tiny-gpt-oss/tokenizer.json")).unwrap();
    let text = std::fs::read_to_string(root("testdata/data/books-valid.txt")).unwrap();
    windows(&tokenizer.encode(&text), 1024, Some(16))
}

#[test]
fn perplexity_is_the_references_and_the_cast_changes_nothing() {
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(root("testdata/model/tiny-gpt-oss.json")).unwrap()).unwrap();
    let expected = golden["perplexity"]["mean_nll"].as_f64().unwrap();
    let windows = books();
    let mut seen = Vec::new();
    let found = perplexity(&mut load(small()), &windows, &mut |done| seen.push(done)).unwrap();
    assert!((found.nll - expected).abs() <= 2e-5, "{} instead of {expected}", found.nll);
    assert_eq!((found.tokens, found.windows), (16 * 1023, 16));
    assert_eq!(seen, (0..=16).collect::<Vec<_>>());
    let cast = perplexity(&mut load(quantized(small(), Algorithm::Cast)), &windows, &mut |_| {}).unwrap();
    assert_eq!(cast, found, "the cast is the same model, bit for bit");
    for (window, expected) in
        golden["perplexity"]["mean_nll_per_window"].as_array().unwrap().iter().enumerate().take(3)
    {
        let found = perplexity(&mut load(small()), &windows[window..=window], &mut |_| {}).unwrap();
        assert!((found.nll - expected.as_f64().unwrap()).abs() < 1e-4, "window {window}");
    }
}

#[test]
fn divergence_is_zero_from_itself_and_positive_from_others() {
    let windows = &books()[..2];
    let itself =
        divergence(&mut load(quantized(small(), Algorithm::Cast)), &mut load(small()), windows, &mut |_| {});
    let itself = itself.unwrap();
    assert_eq!((itself.kl_mean, itself.kl_p99, itself.top1_agreement), (0.0, 0.0, 1.0));
    assert_eq!(itself.nll, itself.nll_reference);
    let max =
        divergence(&mut load(quantized(small(), Algorithm::Max)), &mut load(small()), windows, &mut |_| {});
    let max = max.unwrap();
    assert!(max.kl_mean > 1e-3 && max.kl_p99 > max.kl_mean && max.top1_agreement < 1.0, "{max:?}");
    assert!((max.nll_reference - itself.nll_reference).abs() < 1e-12);
    assert_eq!(max.tokens, 2 * 1023);
}

#[test]
fn windows_are_whole_and_consecutive() {
    let ids: Vec<u32> = (0..10).collect();
    assert_eq!(windows(&ids, 4, None), [vec![0, 1, 2, 3], vec![4, 5, 6, 7]]);
    assert_eq!(windows(&ids, 4, Some(1)).len(), 1);
    assert!(windows(&ids, 11, None).is_empty());
}
