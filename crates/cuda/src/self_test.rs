//! Small models whose logits are compared with the reference's on the very device: each format, each way through the kernels.

use std::sync::Arc;

use checkpoint::{Config, Format, MatrixId, MatrixKind, Synthetic};
use gptoss::{
    BLOCK_TOKENS, Backend, Error, Logprobs, Mask, Penalties, Plan, Reference, Sampled, Sampling,
    SequenceOutput, SequencePlan, sample,
};

use crate::{CacheFormat, Cuda, Device, Options};

/// The largest relative error of logits that 16-bit activations explain.
const LIMIT: f64 = 0.03;
/// The same with keys and values of four significant bits.
const LIMIT_E4M3: f64 = 0.08;

/// What came out for one family of kernels.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTest {
    /// What was run: steps of so many tokens, some with keys and values in FP8 or in the mode in which a batch changes no bit; whether it
    /// did; or `drawn tokens`; or the last tokens of prompts that nobody asks about otherwise.
    pub kernel: &'static str,
    /// Format of the experts.
    pub format: &'static str,
    /// Root mean square of the difference from the reference's logits, relative to theirs; the share of sequences whose logits are others
    /// alone; the share of drawn tokens that are not what the host draws from the same logits.
    pub error: f64,
    /// Whether the error is small enough.
    pub passed: bool,
}

/// Runs every kernel family on small models and compares with the reference; on several GPUs as [`Cuda::load_shared`] has them share a
/// model.
pub fn self_test(devices: &[Arc<Device>]) -> Result<Vec<SelfTest>, Error> {
    let mut models = Vec::new();
    for format in [Format::Nvfp4, Format::Mxfp4, Format::Bf16] {
        models.push((format, &STEPS[..], Arc::new(model(format, devices.len()))));
    }
    if devices.len() > 1 {
        models.push((Format::Nvfp4, &WIDE_STEPS[..], Arc::new(wide_model(devices.len()))));
    }
    let expected: Vec<_> = std::thread::scope(|scope| {
        let reference = |(_, steps, weights): &(Format, &[Steps], Arc<Synthetic>)| {
            let longest = steps.iter().map(|&(.., total)| total).max().unwrap_or(0);
            let weights = Arc::clone(weights);
            scope.spawn(move || reference(weights, longest))
        };
        let threads: Vec<_> = models.iter().map(reference).collect();
        threads.into_iter().map(|thread| thread.join().expect("the reference does not panic")).collect()
    });
    let mut tests = Vec::new();
    for ((format, steps, weights), expected) in models.iter().zip(expected) {
        let mut cuda = match devices {
            [device] => Cuda::load(device, &**weights, Options::default(), &mut |_, _| {})?,
            several => Cuda::load_shared(several, &**weights, Options::default(), &mut |_, _| {})?,
        };
        test(&mut cuda, *format, steps, &expected?, &mut tests)?;
    }
    Ok(tests)
}

/// Steps of one kind: as in [`SelfTest::kernel`]; the cache; whether a batch changes no bit; sequences, tokens of each in a step and in all.
type Steps = (&'static str, CacheFormat, bool, usize, usize, usize);

const STEPS: [Steps; 13] = {
    use CacheFormat::{Bf16, E4m3};
    [
        ("1 token", Bf16, false, 1, 1, FEW),
        ("6 tokens", Bf16, false, 1, 6, FEW),
        ("12 tokens", Bf16, false, 1, 12, FEW),
        // The last of them behind enough to be shared by several blocks.
        ("40 tokens", Bf16, false, 1, 40, TOKENS),
        ("150 tokens", Bf16, false, 1, 150, SOME),
        ("600 tokens", Bf16, false, 1, 600, TOKENS),
        ("3600 tokens", Bf16, false, COPIES, 600, TOKENS),
        ("1 token, FP8 cache", E4m3, false, 1, 1, FEW),
        ("40 tokens, FP8 cache", E4m3, false, 1, 40, TOKENS),
        ("600 tokens, FP8 cache", E4m3, false, 1, 600, TOKENS),
        ("1 token, invariant", Bf16, true, COPIES, 1, FEW),
        ("40 tokens, invariant", Bf16, true, 1, 40, SOME),
        ("600 tokens, invariant", Bf16, true, 1, 600, TOKENS),
    ]
};
/// Of a model as wide as gpt-oss: several GPUs take a single token of a narrower one as one of few.
const WIDE_STEPS: [Steps; 1] = [("1 token, wide", CacheFormat::Bf16, false, 1, 1, FEW)];

fn test(
    cuda: &mut Cuda,
    format: Format,
    steps: &[Steps],
    expected: &[f32],
    tests: &mut Vec<SelfTest>,
) -> Result<(), Error> {
    let (tokens, vocabulary) = (tokens(), cuda.config().vocab_size);
    let blocks = COPIES * TOKENS.div_ceil(BLOCK_TOKENS);
    let (mut drawn, mut wrong) = (0, 0);
    for &(kernel, cache, batch_invariant, copies, chunk, total) in steps {
        set(cuda, Options { cache, batch_invariant, ..cuda.options });
        cuda.allocate_kv(blocks, blocks)?;
        let found = run(cuda, &tokens[..total], copies, chunk, true)?;
        // Where nobody wants the logits they may not be stored at all.
        let again = run(cuda, &tokens[..total], copies, chunk, false)?;
        let limit = if cache == CacheFormat::E4m3 { LIMIT_E4M3 } else { LIMIT };
        let errors = found.iter().map(|found| relative(&found.logits, &expected[..total * vocabulary]));
        let error = errors.fold(0.0, f64::max);
        tests.push(SelfTest { kernel, format: format.name(), error, passed: error <= limit });
        if batch_invariant && copies > 1 {
            let alone = run(cuda, &tokens[..total], 1, chunk, true)?;
            let others = found.iter().filter(|found| found.logits != alone[0].logits).count();
            let (kernel, error) = ("the same alone and in a batch", others as f64 / copies as f64);
            tests.push(SelfTest { kernel, format: format.name(), error, passed: others == 0 });
        }
        for (found, again) in found.iter().zip(&again) {
            drawn += total;
            for (at, row) in found.logits.chunks_exact(vocabulary).enumerate() {
                let host = sample(&mut row.to_vec(), &sampling(at));
                wrong += usize::from(found.drawn[at] != host || again.drawn[at] != host);
            }
        }
    }
    let error = wrong as f64 / drawn as f64;
    tests.push(SelfTest { kernel: "drawn tokens", format: format.name(), error, passed: wrong == 0 });
    let total = steps.iter().map(|&(.., total)| total).max().unwrap_or(0);
    set(cuda, Options { cache: CacheFormat::Bf16, batch_invariant: false, ..cuda.options });
    cuda.allocate_kv(blocks, blocks)?;
    let error = last_of_prompts(cuda, &tokens[..total], &expected[(total - 1) * vocabulary..][..vocabulary])?;
    let kernel = "the last of a prompt's tokens";
    tests.push(SelfTest { kernel, format: format.name(), error, passed: error <= LIMIT });
    Ok(())
}

/// The error of the last token's logits, `expected` to be these, where a prompt, alone or some copies of it, is asked about nothing else.
fn last_of_prompts(cuda: &mut Cuda, tokens: &[u32], expected: &[f32]) -> Result<f64, Error> {
    let ids = (0..expected.len() as u32).collect();
    let logprobs = Some(Logprobs { top: 0, ids, processed: false });
    let prompt = |copy: usize| SequencePlan {
        sample: vec![Sampling { logprobs: logprobs.clone(), ..Sampling::default() }],
        ..SequencePlan::in_blocks(tokens, 0, (copy * tokens.len().div_ceil(BLOCK_TOKENS)) as u32)
    };
    let mut outputs = cuda.step(&Plan { sequences: vec![prompt(0)] })?;
    outputs.extend(cuda.step(&Plan { sequences: (0..COPIES).map(prompt).collect() })?);
    // Logarithms of probabilities are logits but for what is the same in all.
    let centred = |of: &mut dyn Iterator<Item = f32>| -> Vec<f32> {
        let all: Vec<f32> = of.collect();
        let mean = all.iter().sum::<f32>() / all.len() as f32;
        all.into_iter().map(|v| v - mean).collect()
    };
    let expected = centred(&mut expected.iter().copied());
    let error = |output: &SequenceOutput| {
        let found = output.sampled.iter().filter_map(|sampled| sampled.logprobs.as_ref());
        relative(&centred(&mut found.flat_map(|l| &l.top).map(|&(_, logprob)| logprob)), &expected)
    };
    Ok(outputs.iter().map(error).fold(0.0, f64::max))
}

/// Has these options of all GPUs that share the model; those of loading are as they were.
fn set(cuda: &mut Cuda, options: Options) {
    cuda.options = options;
    cuda.shared.iter_mut().flat_map(|shared| &mut shared.followers).for_each(|cuda| set(cuda, options));
}

/// Beyond the window, and several blocks.
const FEW: usize = 60;
const SOME: usize = 150;
/// More than the kernels of hundreds of tokens take.
const TOKENS: usize = 600;
/// Sequences of so many in one step, for the kernels that take thousands.
const COPIES: usize = 6;

/// The layer kinds that models have, in widths of whole tiles and others. With NVFP4 all is in it but the router, with MXFP4 the experts
/// alone.
fn model(format: Format, gpus: usize) -> Synthetic {
    let mut config = Config::gpt_oss_20b();
    (config.hidden_size, config.vocab_size) = match format {
        Format::Mxfp4 => (256, 1024),
        Format::Nvfp4 => (160, 1024),
        _ => (160, 1003),
    };
    // Each GPU has a head, and a block of units.
    config.kv_heads = gpus.max(2);
    config.query_heads = 4 * config.kv_heads;
    config.intermediate_size = 32 * gpus.max(3);
    config.experts = 6;
    config.experts_per_token = 3;
    config.sliding_window = 20;
    config.layer_kinds.truncate(3);
    let pick = move |id: MatrixId| match id.kind {
        MatrixKind::Router => Format::Bf16,
        kind if kind.is_expert() || format == Format::Nvfp4 => format,
        _ => Format::Bf16,
    };
    Synthetic::new(config, pick, 7)
}

/// Two layers of gpt-oss's width with few experts of few units.
fn wide_model(gpus: usize) -> Synthetic {
    let mut config = Config::gpt_oss_20b();
    config.vocab_size = 1024;
    config.kv_heads = gpus;
    config.query_heads = 8 * gpus;
    config.intermediate_size = 32 * gpus;
    config.experts = 4;
    config.layer_kinds.truncate(2);
    let pick = |id: MatrixId| if id.kind.is_expert() { Format::Nvfp4 } else { Format::Bf16 };
    Synthetic::new(config, pick, 7)
}

fn tokens() -> Vec<u32> {
    (0..TOKENS as u32).map(|i| (i * i * 31 + 7 * i) % 1003).collect()
}

/// How to draw at this position.
fn sampling(at: usize) -> Sampling {
    let drawn = Sampling { temperature: 1.0, seed: 7, position: at as u64, ..Sampling::default() };
    let logprobs = |processed| Some(Logprobs { top: 5, ids: Vec::new(), processed });
    match at % 6 {
        0 | 1 => Sampling::default(),
        2 => Sampling { top_p: 0.9, top_k: 50, ..drawn },
        3 => Sampling { logprobs: logprobs(false), ..drawn },
        4 => Sampling { min_p: 0.1, logprobs: logprobs(true), ..drawn },
        _ => {
            let some: Vec<u32> = (0..1000).step_by(3).collect();
            let penalties = Penalties {
                repetition: 1.3,
                frequency: 0.4,
                presence: 0.2,
                prompt: some[..80].into(),
                output: some[60..100].iter().map(|&token| (token, 1 + token % 3)).collect(),
            };
            let bias = some[50..150].iter().map(|&token| (token, 0.7)).collect();
            Sampling { mask: Some(Mask::of(&some)), bias, penalties: Some(penalties), ..drawn }
        }
    }
}

/// The reference's logits at the first positions.
fn reference(weights: Arc<Synthetic>, count: usize) -> Result<Vec<f32>, Error> {
    let mut reference = Reference::new(weights);
    let blocks = count.div_ceil(BLOCK_TOKENS);
    reference.allocate_kv(blocks, blocks)?;
    let sequence = SequencePlan { logits: true, ..SequencePlan::in_blocks(&tokens()[..count], 0, 0) };
    Ok(reference.step(&Plan { sequences: vec![sequence] })?.remove(0).logits)
}

/// What steps find at each position of a sequence.
#[derive(Clone, Default)]
struct Found {
    logits: Vec<f32>,
    drawn: Vec<Sampled>,
}

/// The logits of all positions, if they are wanted, and the tokens drawn there, of `copies` of a sequence, `chunk` tokens of each at a
/// time.
fn run(
    cuda: &mut Cuda,
    tokens: &[u32],
    copies: usize,
    chunk: usize,
    logits: bool,
) -> Result<Vec<Found>, Error> {
    let each = tokens.len().div_ceil(BLOCK_TOKENS);
    // Not in the order of the tokens.
    let blocks = |copy: usize| -> Arc<Vec<u32>> {
        Arc::new((copy * each..(copy + 1) * each).rev().map(|block| block as u32).collect())
    };
    let blocks: Vec<_> = (0..copies).map(blocks).collect();
    let mut found = vec![Found::default(); copies];
    for (i, part) in tokens.chunks(chunk).enumerate() {
        let position = i * chunk;
        let sequence = |blocks: &Arc<Vec<u32>>| SequencePlan {
            tokens: part.to_vec(),
            position,
            full_blocks: Arc::clone(blocks),
            sliding_blocks: Arc::clone(blocks),
            logits,
            generated: usize::from(chunk == 1),
            sample: (position..position + part.len()).map(sampling).collect(),
            ..SequencePlan::default()
        };
        let outputs = cuda.step(&Plan { sequences: blocks.iter().map(sequence).collect() })?;
        for (found, output) in found.iter_mut().zip(outputs) {
            found.logits.extend(output.logits);
            found.drawn.extend(output.sampled);
        }
    }
    Ok(found)
}

fn relative(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = found.iter().zip(expected).map(|(f, e)| square(f - e)).sum();
    // Not a number is not small.
    if error.is_nan() {
        f64::INFINITY
    } else {
        (error / expected.iter().map(|&e| square(e)).sum::<f64>()).sqrt()
    }
}
