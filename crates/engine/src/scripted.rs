//! A backend without a model, for tests: it says what it was told to, and notices when the engine mixes up its blocks.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use checkpoint::{Config, LayerKind, Rope};
use gptoss::{
    BLOCK_TOKENS, Backend, BlockId, Error, KvLayout, Plan, Sampled, Sampling, Score, SequenceOutput,
    SequencePlan, TokenLogprobs,
};

use crate::worker::choice_seed;
use crate::{FinishReason, SamplingParams};

/// Plays scripts: lists of tokens, one per answer.
///
/// It stores the tokens themselves as keys and values, so at each draw it knows the whole sequence, and a step fails if
/// the blocks of a sliding layer hold other tokens than those of a full layer. Which script an answer follows:
///
/// - A sequence (seed of its generator, all tokens before the draw) that was not met before begins a script: the one that
///   [`Scripted::with_seed`] gave for the request's seed, else the next of `scripts` in turn. Requests without a
///   seed differ in theirs, so the k-th answer that begins plays script k modulo their number; the choices of one request
///   count one by one.
/// - A sequence that continues one met before takes that one's next token. This holds over preemptions and any chunking
///   or batching, since neither changes the tokens.
/// - After its last token a script begins again.
///
/// A token that the request's bias or mask forbids is replaced by the next id that is allowed. Temperature, filters and penalties
/// have no effect. Log-probabilities are made up: the token itself has 1/2, the ids after it 1/4, 1/8 and so on.
pub struct Scripted {
    config: Config,
    scripts: Vec<Script>,
    by_seed: BTreeMap<u64, Script>,
    control: Option<Receiver<Step>>,
    /// Tokens by slot.
    full: Vec<u32>,
    sliding: Vec<u32>,
    /// Sequences met, each by its seed and a digest of its tokens.
    met: HashMap<(u64, u64), Place>,
    /// Those met longer ago. Sequences that were cancelled are never met again, and end here.
    met_before: HashMap<(u64, u64), Place>,
    begun: usize,
    /// The device was lost.
    lost: bool,
}

/// What a controlled step does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Succeeds.
    Run,
    /// Fails with this message.
    Fail(String),
    /// Panics with this message.
    Panic(String),
    /// Fails with this message, and the device with it: nothing works any more.
    Lose(String),
}

/// What is wrong with a file of scripts.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// It is not JSON, or not of this shape.
    #[error("scripts: expected an object of objects with `tokens`, found {0}")]
    Json(#[from] serde_json::Error),
    /// A name is neither a seed nor `default`.
    #[error("scripts: expected a seed or \"default\", found {0:?}")]
    Key(String),
    /// A token that the model does not have.
    #[error("scripts: {key:?} has token {token}, expected ids below {vocab_size}")]
    Token {
        /// Whose script.
        key: String,
        /// The id.
        token: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
}

/// Where a sequence is in its script.
#[derive(Clone, Copy)]
struct Place {
    of: Which,
    next: usize,
}

#[derive(Clone, Copy)]
enum Which {
    InTurn(usize),
    Seed(u64),
}

#[derive(Default)]
struct Script {
    tokens: Vec<u32>,
    /// How long the step waits that draws the token; none beyond the end.
    delays: Vec<Duration>,
}

impl Script {
    fn at_once(tokens: Vec<u32>) -> Script {
        Script { tokens, delays: Vec::new() }
    }
}

impl Scripted {
    /// A backend of this shape (of which the vocabulary, the window and the context matter). Without scripts it says
    /// token 0 for ever.
    pub fn new(config: Config, scripts: Vec<Vec<u32>>) -> Scripted {
        Scripted {
            config,
            scripts: scripts.into_iter().map(Script::at_once).collect(),
            by_seed: BTreeMap::new(),
            control: None,
            full: Vec::new(),
            sliding: Vec::new(),
            met: HashMap::new(),
            met_before: HashMap::new(),
            begun: 0,
            lost: false,
        }
    }

    /// Requests with this `seed` play `script`, all their choices.
    #[must_use]
    pub fn with_seed(mut self, seed: i64, script: Vec<u32>) -> Scripted {
        self.by_seed.insert(seed as u64, Script::at_once(script));
        self
    }

    /// Reads scripts by seed:
    /// `{"<seed>": {"tokens": [ids], "delays_ms": [numbers], "finish_reason": "stop"}, …, "default": {…}}`. Requests without
    /// a script for their seed play the default. A step takes as long as the longest delay of the tokens that it draws.
    /// Delays may be left out; so may the reason, which says what is meant and changes nothing: the tokens decide.
    ///
    /// # Errors
    /// [`ScriptError`] if it is not such an object, or names an id that is not below `config.vocab_size`.
    pub fn from_json(config: Config, json: &str) -> Result<Scripted, ScriptError> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Entry {
            tokens: Vec<u32>,
            #[serde(default)]
            delays_ms: Vec<u32>,
            #[serde(default, rename = "finish_reason")]
            _finish_reason: Option<FinishReason>,
        }
        let entries: BTreeMap<String, Entry> = serde_json::from_str(json)?;
        let mut scripted = Scripted::new(config, Vec::new());
        for (key, Entry { tokens, delays_ms, .. }) in entries {
            if let Some(&token) = tokens.iter().find(|&&t| t as usize >= scripted.config.vocab_size) {
                return Err(ScriptError::Token { key, token, vocab_size: scripted.config.vocab_size });
            }
            let delays = delays_ms.into_iter().map(|ms| Duration::from_millis(ms.into())).collect();
            let script = Script { tokens, delays };
            if key == "default" {
                scripted.scripts.push(script);
            } else {
                let seed: i64 = key.parse().map_err(|_| ScriptError::Key(key))?;
                scripted.by_seed.insert(seed as u64, script);
            }
        }
        Ok(scripted)
    }

    /// Each step waits for a message and does what it says. When the sender is gone, steps run freely.
    #[must_use]
    pub fn controlled_by(mut self, steps: Receiver<Step>) -> Scripted {
        self.control = Some(steps);
        self
    }

    /// The shape of gpt-oss-20b.
    pub fn gpt_oss() -> Config {
        Config {
            hidden_size: 2880,
            intermediate_size: 2880,
            query_heads: 64,
            kv_heads: 8,
            head_dim: 64,
            experts: 32,
            experts_per_token: 4,
            vocab_size: 201_088,
            sliding_window: 128,
            layer_kinds: [LayerKind::Sliding, LayerKind::Full].repeat(12),
            rms_norm_eps: 1e-5,
            swiglu_limit: 7.0,
            swiglu_alpha: 1.702,
            rope: Rope {
                base: 150_000.0,
                factor: 32.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original_context: 4096,
                truncate: false,
            },
            max_context: 131_072,
        }
    }

    /// Stores a sequence's tokens; the result is all tokens up to its last one.
    fn store(&mut self, index: usize, sequence: &SequencePlan) -> Result<Vec<u32>, Error> {
        let slot = |blocks: &[BlockId], p: usize| {
            blocks[p / BLOCK_TOKENS] as usize * BLOCK_TOKENS + p % BLOCK_TOKENS
        };
        for (p, &token) in (sequence.position..).zip(&sequence.tokens) {
            self.full[slot(&sequence.full_blocks, p)] = token;
            self.sliding[slot(&sequence.sliding_blocks, p)] = token;
        }
        let end = sequence.position + sequence.tokens.len();
        let tokens: Vec<u32> = (0..end).map(|p| self.full[slot(&sequence.full_blocks, p)]).collect();
        let first = (sequence.position + 1).saturating_sub(self.config.sliding_window);
        for (p, &token) in tokens.iter().enumerate().skip(first) {
            let found = self.sliding[slot(&sequence.sliding_blocks, p)];
            if found != token {
                return Err(Error::Device(format!(
                    "sequence {index}: at position {p} the full layers hold token {token}, the sliding layers {found}"
                )));
            }
        }
        Ok(tokens)
    }

    /// The next token of the sequence's script, and how long it takes.
    fn draw(&mut self, tokens: &[u32], sampling: &Sampling) -> (Sampled, Duration) {
        let sequence = digest(sampling.seed, tokens);
        let met = self.met.remove(&sequence).or_else(|| self.met_before.remove(&sequence));
        let place = met.unwrap_or_else(|| {
            let seeded = (0..SamplingParams::MAX_N)
                .map(|choice| sampling.seed.wrapping_sub(choice_seed(0, choice)))
                .find(|seed| self.by_seed.contains_key(seed));
            let of = seeded.map_or(Which::InTurn(self.begun), Which::Seed);
            self.begun += usize::from(seeded.is_none());
            Place { of, next: 0 }
        });
        let script = match place.of {
            Which::Seed(seed) => self.by_seed.get(&seed),
            Which::InTurn(turn) => turn.checked_rem(self.scripts.len()).map(|turn| &self.scripts[turn]),
        };
        let next = script.filter(|s| !s.tokens.is_empty()).map(|s| (s, place.next % s.tokens.len()));
        let delay = next.and_then(|(s, at)| s.delays.get(at)).copied().unwrap_or_default();
        let vocabulary = self.config.vocab_size as u32;
        let mut token = next.map_or(0, |(s, at)| s.tokens[at]);
        let forbidden = |token| {
            sampling.mask.as_ref().is_some_and(|mask| !mask.allows(token))
                || sampling.bias.iter().any(|&(t, b)| t == token && b == f32::NEG_INFINITY)
        };
        // If all are forbidden it is as good as any.
        if let Some(allowed) = (0..vocabulary).map(|i| (token + i) % vocabulary).find(|&t| !forbidden(t)) {
            token = allowed;
        }
        if self.met.len() == MOST_MET {
            self.met_before = std::mem::take(&mut self.met);
        }
        let tokens = [tokens, &[token]].concat();
        self.met.insert(digest(sampling.seed, &tokens), Place { next: place.next + 1, ..place });
        let logprobs = sampling.logprobs.as_ref().map(|wanted| {
            let mut logprobs = self.logprobs(token, wanted.top);
            if !wanted.ids.is_empty() {
                let logprob =
                    |&id: &u32| (id, if id == token { logprobs.logprob } else { f32::NEG_INFINITY });
                logprobs.top = wanted.ids.iter().map(logprob).collect();
            }
            logprobs
        });
        (Sampled { token, logprobs }, delay)
    }

    fn logprobs(&self, token: u32, top: usize) -> TokenLogprobs {
        let vocabulary = self.config.vocab_size as u32;
        let best = (0..top.min(self.config.vocab_size) as u32)
            .map(|i| ((token + i) % vocabulary, -((i + 1) as f32) * std::f32::consts::LN_2));
        TokenLogprobs { token, logprob: -std::f32::consts::LN_2, rank: 1, top: best.collect() }
    }
}

impl Backend for Scripted {
    fn config(&self) -> &Config {
        &self.config
    }

    fn describe(&self) -> String {
        "scripted (no model)".to_owned()
    }

    fn kv_layout(&self) -> KvLayout {
        KvLayout { full_block_bytes: 4096, sliding_block_bytes: 4096 }
    }

    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> Result<(), Error> {
        if self.lost {
            return Err(Error::Device("the device is lost".to_owned()));
        }
        // No token has this id, so that a slot which was never written is noticed.
        self.full = vec![u32::MAX; full_blocks * BLOCK_TOKENS];
        self.sliding = vec![u32::MAX - 1; sliding_blocks * BLOCK_TOKENS];
        Ok(())
    }

    fn step(&mut self, plan: &Plan) -> Result<Vec<SequenceOutput>, Error> {
        if let Some(control) = &self.control {
            match control.recv() {
                Ok(Step::Run) => {}
                Ok(Step::Fail(message)) => return Err(Error::Device(message)),
                Ok(Step::Panic(message)) => panic!("{message}"),
                Ok(Step::Lose(message)) => {
                    self.lost = true;
                    return Err(Error::Device(message));
                }
                Err(_) => self.control = None,
            }
        }
        plan.check(&self.config, self.full.len() / BLOCK_TOKENS, self.sliding.len() / BLOCK_TOKENS)?;
        let mut outputs = Vec::with_capacity(plan.sequences.len());
        let mut longest = Duration::ZERO;
        for (index, sequence) in plan.sequences.iter().enumerate() {
            if sequence.logits || sequence.hidden_after_layer.is_some() {
                return Err(Error::Unsupported("a script has no logits and no layers".to_owned()));
            }
            let tokens = self.store(index, sequence)?;
            let scores = match &sequence.score {
                Some(Score { next, top }) => next.iter().map(|&t| self.logprobs(t, *top)).collect(),
                None => Vec::new(),
            };
            let mut sampled: Vec<Sampled> = Vec::with_capacity(sequence.sample.len());
            let first = tokens.len() + 1 - sequence.sample.len();
            for (end, sampling) in (first..).zip(&sequence.sample) {
                // After a guess that was wrong comes nothing that anybody continues.
                if sampled.last().is_some_and(|s| s.token != tokens[end - 1]) {
                    sampled.push(Sampled { token: 0, logprobs: None });
                    continue;
                }
                let (drawn, delay) = self.draw(&tokens[..end], sampling);
                longest = longest.max(delay);
                sampled.push(drawn);
            }
            outputs.push(SequenceOutput { sampled, scores, ..SequenceOutput::default() });
        }
        if !longest.is_zero() {
            std::thread::sleep(longest);
        }
        Ok(outputs)
    }
}

/// Far more sequences than run at a time.
const MOST_MET: usize = 1 << 16;

fn digest(seed: u64, tokens: &[u32]) -> (u64, u64) {
    let mut hasher = DefaultHasher::new();
    tokens.hash(&mut hasher);
    (seed, hasher.finish())
}
