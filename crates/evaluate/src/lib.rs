//! What four bits cost: perplexity, and divergence from a reference, over windows of tokens.
//!
//! Each window is scored on its own from its second token on; means are over tokens, in nats.
#![forbid(unsafe_code)]

pub mod report;

use gptoss::{BLOCK_TOKENS, Backend, Error, Plan, Score, SequenceOutput, SequencePlan};

/// Tokens per step: enough to reuse a weight that was read, little enough for the logits to stay small.
const CHUNK: usize = 256;

/// The likelihood of some text.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Perplexity {
    /// Mean negative log-likelihood per token, in nats.
    pub nll: f64,
    /// `e^nll`
    pub perplexity: f64,
    /// Tokens scored.
    pub tokens: usize,
    /// Windows.
    pub windows: usize,
}

/// How far a model's predictions are from a reference's.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Divergence {
    /// Mean of Σ p_reference (ln p_reference − ln p_model).
    pub kl_mean: f64,
    /// Its 99th percentile.
    pub kl_p99: f64,
    /// Share of positions whose most probable token agrees.
    pub top1_agreement: f64,
    /// The model's mean negative log-likelihood.
    pub nll: f64,
    /// The reference's.
    pub nll_reference: f64,
    /// Tokens scored.
    pub tokens: usize,
}

/// The perplexity of a model on `windows`, each of at least two tokens. `progress` is called with the windows done.
pub fn perplexity(
    backend: &mut dyn Backend,
    windows: &[Vec<u32>],
    progress: &mut dyn FnMut(usize),
) -> Result<Perplexity, Error> {
    allocate(backend, windows)?;
    let (mut sum, mut tokens) = (0.0, 0);
    for (done, window) in windows.iter().enumerate() {
        progress(done);
        for (position, chunk) in chunks(window) {
            let score = Some(Score { next: successors(window, position, chunk.len()), top: 0 });
            let output =
                step(backend, SequencePlan { score, ..SequencePlan::in_blocks(chunk, position, 0) })?;
            sum -= output.scores.iter().map(|s| f64::from(s.logprob)).sum::<f64>();
            tokens += output.scores.len();
        }
    }
    progress(windows.len());
    let nll = sum / tokens.max(1) as f64;
    Ok(Perplexity { nll, perplexity: nll.exp(), tokens, windows: windows.len() })
}

/// The divergence of `model` from `reference` on `windows`. Both must have the same vocabulary.
pub fn divergence(
    model: &mut dyn Backend,
    reference: &mut dyn Backend,
    windows: &[Vec<u32>],
    progress: &mut dyn FnMut(usize),
) -> Result<Divergence, Error> {
    let vocabulary = model.config().vocab_size;
    if reference.config().vocab_size != vocabulary {
        return Err(Error::Unsupported(format!(
            "the models have different vocabularies: {vocabulary} and {} tokens",
            reference.config().vocab_size
        )));
    }
    allocate(model, windows)?;
    allocate(reference, windows)?;
    let (mut divergences, mut agree) = (Vec::new(), 0usize);
    let (mut nll, mut nll_reference) = (0.0, 0.0);
    for (done, window) in windows.iter().enumerate() {
        progress(done);
        for (position, chunk) in chunks(window) {
            let plan = SequencePlan { logits: true, ..SequencePlan::in_blocks(chunk, position, 0) };
            let found = step(model, plan.clone())?.logits;
            let expected = step(reference, plan)?.logits;
            let rows = found.chunks_exact(vocabulary).zip(expected.chunks_exact(vocabulary));
            for ((p, q), next) in rows.zip(successors(window, position, chunk.len())) {
                let (p, q) = (LogSoftmax::new(p), LogSoftmax::new(q));
                let kl: f64 = (0..vocabulary).map(|i| q.at(i).exp() * (q.at(i) - p.at(i))).sum();
                divergences.push(kl);
                agree += usize::from(p.best == q.best);
                nll -= p.at(next as usize);
                nll_reference -= q.at(next as usize);
            }
        }
    }
    progress(windows.len());
    let tokens = divergences.len();
    let count = tokens.max(1) as f64;
    let kl_mean = divergences.iter().sum::<f64>() / count;
    divergences.sort_by(f64::total_cmp);
    let kl_p99 = divergences.get((tokens * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or(0.0);
    Ok(Divergence {
        kl_mean,
        kl_p99,
        top1_agreement: agree as f64 / count,
        nll: nll / count,
        nll_reference: nll_reference / count,
        tokens,
    })
}

/// Consecutive windows of `context` tokens, at most `limit`; a shorter rest is left out.
pub fn windows(ids: &[u32], context: usize, limit: Option<usize>) -> Vec<Vec<u32>> {
    ids.chunks_exact(context).take(limit.unwrap_or(usize::MAX)).map(<[u32]>::to_vec).collect()
}

/// Room for the longest window, block `i` at place `i`.
fn allocate(backend: &mut dyn Backend, windows: &[Vec<u32>]) -> Result<(), Error> {
    let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
    let blocks = longest.div_ceil(BLOCK_TOKENS);
    backend.allocate_kv(blocks, blocks)
}

fn chunks(window: &[u32]) -> impl Iterator<Item = (usize, &[u32])> {
    window.chunks(CHUNK).enumerate().map(|(i, chunk)| (i * CHUNK, chunk))
}

/// The tokens that follow those of a chunk; one fewer at the end of the window.
fn successors(window: &[u32], position: usize, len: usize) -> Vec<u32> {
    window[position + 1..(position + 1 + len).min(window.len())].to_vec()
}

fn step(backend: &mut dyn Backend, sequence: SequencePlan) -> Result<SequenceOutput, Error> {
    let mut outputs = backend.step(&Plan { sequences: vec![sequence] })?;
    let output = outputs.pop().ok_or_else(|| Error::Device("the backend gave no output".to_owned()))?;
    if output.corrupted { Err(Error::Corrupted) } else { Ok(output) }
}

struct LogSoftmax<'a> {
    logits: &'a [f32],
    log_sum: f64,
    best: usize,
}

impl LogSoftmax<'_> {
    fn new(logits: &[f32]) -> LogSoftmax<'_> {
        let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        let max = f64::from(logits[best]);
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
        LogSoftmax { logits, log_sum: max + sum.ln(), best }
    }

    fn at(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.log_sum
    }
}
