//! Small models whose logits are compared with the reference's on the very device: each format, each way through the kernels.

use std::sync::Arc;

use checkpoint::{Config, Format, MatrixId, Synthetic, Weights};
use gptoss::{BLOCK_TOKENS, Backend, Error, Plan, Reference, SequencePlan};

use crate::{CacheFormat, Cuda, Device, Options};

/// The largest relative error of logits that 16-bit activations explain.
const LIMIT: f64 = 0.03;
/// The same with keys and values of four significant bits.
const LIMIT_E4M3: f64 = 0.08;

/// What came out for one family of kernels.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTest {
    /// What was run: `decode`, `few tokens`, `chunk`, `long chunk`, and two of them with keys and values in FP8.
    pub kernel: &'static str,
    /// Format of the experts.
    pub format: &'static str,
    /// Root mean square of the difference from the reference's logits, relative to theirs.
    pub error: f64,
    /// Whether the error is small enough.
    pub passed: bool,
}

/// Runs every kernel family on small models and compares with the reference.
pub fn self_test(device: &Arc<Device>) -> Result<Vec<SelfTest>, Error> {
    let mut tests = Vec::new();
    for format in [Format::Nvfp4, Format::Mxfp4, Format::Bf16] {
        let weights: Arc<dyn Weights> = Arc::new(model(format));
        let mut reference = Reference::new(Arc::clone(&weights));
        let mut cuda = Cuda::load(device, &*weights, Options::default(), &mut |_, _| {})?;
        let (blocks, tokens) = (TOKENS.div_ceil(BLOCK_TOKENS), tokens());
        reference.allocate_kv(blocks, blocks)?;
        let expected = run(&mut reference, &tokens, TOKENS)?;
        for (kernel, chunk, cache, limit) in [
            ("decode", 1, CacheFormat::Bf16, LIMIT),
            ("few tokens", 6, CacheFormat::Bf16, LIMIT),
            ("chunk", 40, CacheFormat::Bf16, LIMIT),
            ("long chunk", TOKENS, CacheFormat::Bf16, LIMIT),
            ("decode, FP8 cache", 1, CacheFormat::E4m3, LIMIT_E4M3),
            ("chunk, FP8 cache", 40, CacheFormat::E4m3, LIMIT_E4M3),
        ] {
            cuda.options.cache = cache;
            cuda.allocate_kv(blocks, blocks)?;
            let error = relative(&run(&mut cuda, &tokens, chunk)?, &expected);
            tests.push(SelfTest { kernel, format: format.name(), error, passed: error <= limit });
        }
    }
    Ok(tests)
}

/// Beyond the window, and several blocks.
const TOKENS: usize = 150;

/// Widths that are no whole tiles, in the layer kinds and formats that models have.
fn model(format: Format) -> Synthetic {
    let mut config = Config::gpt_oss_20b();
    config.hidden_size = 160;
    config.intermediate_size = 96;
    config.query_heads = 8;
    config.kv_heads = 2;
    config.experts = 6;
    config.experts_per_token = 3;
    config.vocab_size = 1003;
    config.sliding_window = 20;
    config.layer_kinds.truncate(3);
    let pick = move |id: MatrixId| match format {
        Format::Nvfp4 if id.kind.is_attention() => Format::Nvfp4,
        format if id.kind.is_expert() => format,
        _ => Format::Bf16,
    };
    Synthetic::new(config, pick, 7)
}

fn tokens() -> Vec<u32> {
    (0..TOKENS as u32).map(|i| (i * i * 31 + 7 * i) % 1003).collect()
}

/// The logits of all positions, computed `chunk` at a time.
fn run(backend: &mut dyn Backend, tokens: &[u32], chunk: usize) -> Result<Vec<f32>, Error> {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(BLOCK_TOKENS) as u32).rev().collect();
    let blocks = Arc::new(blocks);
    let mut logits = Vec::new();
    for (i, part) in tokens.chunks(chunk).enumerate() {
        let sequence = SequencePlan {
            tokens: part.to_vec(),
            position: i * chunk,
            full_blocks: blocks.clone(),
            sliding_blocks: blocks.clone(),
            logits: true,
            ..SequencePlan::default()
        };
        logits.extend(backend.step(&Plan { sequences: vec![sequence] })?.remove(0).logits);
    }
    Ok(logits)
}

fn relative(found: &[f32], expected: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = found.iter().zip(expected).map(|(f, e)| square(f - e)).sum();
    // Not a number is not small.
    if error.is_nan() {
        f64::INFINITY
    } else {
        (error / expected.iter().map(|&e| square(e)).sum::<f64>()).sqrt()
    }
}
