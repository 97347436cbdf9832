//! The seam between the engine and whatever computes: one trait, its plan and its results.
//!
//! Tokens in, tokens out. A step takes a ragged batch in which prefill chunks and decodes mix; the keys and values of each
//! sequence lie in blocks of [`BLOCK_TOKENS`] positions that the engine hands out and the backend stores.

use std::sync::{Arc, OnceLock};

use checkpoint::{Config, LayerKind};

/// Positions per block of the key/value cache.
pub const BLOCK_TOKENS: usize = 16;

/// A block of the key/value cache. Full and sliding layers count theirs separately, each from 0.
pub type BlockId = u32;

/// What computes: weights packed for some device, and storage for keys and values.
pub trait Backend: Send {
    /// The model's shape.
    fn config(&self) -> &Config;

    /// One line for people: device and kernels.
    fn describe(&self) -> String;

    /// Bytes of the weights that steps read; 0 if unknown.
    fn weight_bytes(&self) -> usize {
        0
    }

    /// Tokens of prompts beside so many answers in a step, at least, if answers are to come evenly: prompts come to their end, too, and a
    /// few together cost much less than each alone.
    fn least_prompt_tokens(&self, answers: usize) -> usize {
        let _ = answers;
        4
    }

    /// What a block costs.
    fn kv_layout(&self) -> KvLayout;

    /// Makes room for this many blocks of each kind, dropping what was stored before.
    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> Result<(), Error>;

    /// Runs one step. The result has one entry per sequence of the plan, in order. Results do not depend on which other
    /// sequences are in the plan, nor on how a prompt was cut into chunks.
    fn step(&mut self, plan: &Plan) -> Result<Vec<SequenceOutput>, Error>;

    /// The same, with something for the host to do: `meanwhile` is called once, while the device computes if that needs no
    /// host, else before it.
    fn step_while(&mut self, plan: &Plan, meanwhile: &mut dyn FnMut()) -> Result<Vec<SequenceOutput>, Error> {
        meanwhile();
        self.step(plan)
    }
}

/// Bytes per block of the key/value cache, over all layers of the kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// A block in the layers that see everything.
    pub full_block_bytes: usize,
    /// A block in the layers that see a window.
    pub sliding_block_bytes: usize,
}

impl KvLayout {
    /// The layout of keys and values of which each number takes so many bytes.
    pub fn new(config: &Config, number_bytes: usize) -> KvLayout {
        let layer = BLOCK_TOKENS * config.kv_heads * config.head_dim * 2 * number_bytes;
        let sliding = config.layer_kinds.iter().filter(|&&kind| kind == LayerKind::Sliding).count();
        KvLayout {
            full_block_bytes: (config.layer_kinds.len() - sliding) * layer,
            sliding_block_bytes: sliding * layer,
        }
    }

    /// Bytes of so many blocks.
    pub fn bytes(&self, full_blocks: usize, sliding_blocks: usize) -> usize {
        let full = full_blocks.saturating_mul(self.full_block_bytes);
        full.saturating_add(sliding_blocks.saturating_mul(self.sliding_block_bytes))
    }
}

/// Bytes that a step reads, to compare its speed with the memory's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Traffic {
    /// Weights that every step reads: attention, routers, norms and the output layer.
    pub dense_bytes: usize,
    /// One expert of one layer.
    pub expert_bytes: usize,
    /// Layers.
    pub layers: usize,
    /// Experts per layer.
    pub experts: usize,
    /// Experts per token.
    pub experts_per_token: usize,
    /// Keys and values of one position, in the full layers.
    pub full_kv_bytes: usize,
    /// Keys and values of one position, in the sliding layers.
    pub sliding_kv_bytes: usize,
    /// Positions that a sliding layer sees.
    pub sliding_window: usize,
}

impl Traffic {
    /// All weights that steps read.
    pub fn weight_bytes(&self) -> usize {
        self.dense_bytes + self.layers * self.experts * self.expert_bytes
    }

    /// Bytes read by a step that decodes one token for each of `batch` sequences with `depth` positions in the cache, if
    /// routing is uniform.
    pub fn step_bytes(&self, batch: usize, depth: usize) -> f64 {
        let missed = (1.0 - self.experts_per_token as f64 / self.experts as f64).powi(batch as i32);
        let experts = self.layers as f64 * self.experts as f64 * (1.0 - missed);
        let kv = self.full_kv_bytes * depth + self.sliding_kv_bytes * depth.min(self.sliding_window);
        self.dense_bytes as f64 + experts * self.expert_bytes as f64 + (batch * kv) as f64
    }
}

/// One step's work.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Any number of sequences, each at most once.
    pub sequences: Vec<SequencePlan>,
}

/// One sequence's share of a step.
#[derive(Debug, Clone, Default)]
pub struct SequencePlan {
    /// The tokens to compute, at least one; each less than the vocabulary size.
    pub tokens: Vec<u32>,
    /// Position of the first of them. Keys and values before it are in the blocks.
    pub position: usize,
    /// How many of them, the last ones, continue a prompt instead of being part of it. Where a backend computes single tokens
    /// and chunks differently, it may go by this instead of by how the tokens happen to come.
    pub generated: usize,
    /// Block `i` stores positions `16 i .. 16 i + 16` of the full layers; covers everything up to the last token. Shared with
    /// whoever keeps the table between steps.
    pub full_blocks: Arc<Vec<BlockId>>,
    /// The same for the sliding layers. Entries of blocks that lie wholly before the window of the first token are
    /// not looked at.
    pub sliding_blocks: Arc<Vec<BlockId>>,
    /// Sample tokens after the last ones, at most one per token: the last entry belongs to the last token, the one before
    /// it to the token before. More than one is how guessed tokens are verified.
    pub sample: Vec<Sampling>,
    /// The sequence ends with the token that is drawn after the last one, whichever it is: nothing need be prepared for another.
    pub ends: bool,
    /// Score each token's successor.
    pub score: Option<Score>,
    /// Return the logits of every token.
    pub logits: bool,
    /// Return the residual stream after this layer, for every token.
    pub hidden_after_layer: Option<usize>,
}

impl SequencePlan {
    /// Tokens from `position` on of a sequence that has, of both kinds, the blocks from `first` on to itself.
    pub fn in_blocks(tokens: &[u32], position: usize, first: BlockId) -> SequencePlan {
        let count = (position + tokens.len()).div_ceil(BLOCK_TOKENS) as BlockId;
        let blocks: Arc<Vec<BlockId>> = Arc::new((first..first + count).collect());
        SequencePlan {
            tokens: tokens.to_vec(),
            position,
            full_blocks: Arc::clone(&blocks),
            sliding_blocks: blocks,
            ..SequencePlan::default()
        }
    }

    /// How a token is drawn after this one of `tokens`, if one is.
    pub fn sampling(&self, token: usize) -> Option<&Sampling> {
        self.sample.get((token + self.sample.len()).checked_sub(self.tokens.len())?)
    }

    /// Whether this one of `tokens` is scored.
    pub fn is_scored(&self, token: usize) -> bool {
        self.score.as_ref().is_some_and(|score| token < score.next.len())
    }

    /// Whether anything asks for the logits of this one of `tokens`. Of the others the last layer needs only keys and values.
    pub fn needs_logits(&self, token: usize) -> bool {
        self.logits || self.is_scored(token) || self.sampling(token).is_some()
    }
}

/// How the next token is drawn. `Default` is greedy.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sampling {
    /// 0: the largest logit, the lowest id on a tie, and the four fields below have no effect.
    pub temperature: f32,
    /// Keep the `top_k` most probable; 0: all.
    pub top_k: usize,
    /// Keep the smallest set whose probability reaches this; 0 or 1: all.
    pub top_p: f32,
    /// Keep what has at least this share of the largest probability.
    pub min_p: f32,
    /// Key of the counter-based generator: the same (seed, position) draws the same number.
    pub seed: u64,
    /// Counter of the generator: the position of the token that is drawn.
    pub position: u64,
    /// Forbids the tokens that are not in it. It may still be in the making when the step begins, so a backend asks for it
    /// only once it has the logits.
    pub mask: Option<Mask>,
    /// Added to single logits; -infinity forbids a token.
    pub bias: Vec<(u32, f32)>,
    /// Penalties for tokens seen before.
    pub penalties: Option<Penalties>,
    /// Return log-probabilities.
    pub logprobs: Option<Logprobs>,
}

/// Which log-probabilities come with a drawn token, beside its own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Logprobs {
    /// Those of this many best.
    pub top: usize,
    /// If not empty, those of these tokens in their place.
    pub ids: Vec<u32>,
    /// After masks, biases, penalties, temperature and filters, where a token that cannot be drawn has -infinity; else those
    /// of the raw logits.
    pub processed: bool,
}

/// A set of tokens, set once by whoever makes it while others wait for it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Mask(Arc<OnceLock<Vec<u32>>>);

impl Mask {
    /// A mask of these tokens.
    pub fn of(tokens: &[u32]) -> Mask {
        let mut words = vec![0; tokens.iter().max().map_or(0, |&last| last as usize / 32 + 1)];
        tokens.iter().for_each(|&token| words[token as usize / 32] |= 1 << (token % 32));
        let mask = Mask::default();
        mask.set(words);
        mask
    }

    /// Bit `i % 32` of word `i / 32` allows token `i`; what is beyond is forbidden. Only the first call counts.
    pub fn set(&self, words: Vec<u32>) {
        // An error means that it is set.
        let _ = self.0.set(words);
    }

    /// Whether nobody would wait for it.
    pub fn is_set(&self) -> bool {
        self.0.get().is_some()
    }

    /// The words, as soon as they are set.
    pub fn wait(&self) -> &[u32] {
        self.0.wait()
    }

    /// Whether a token is in the mask, once it is set.
    pub fn allows(&self, token: u32) -> bool {
        self.wait().get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }
}

/// Penalties for tokens seen before; see `serving.md` 10 for the formulas.
#[derive(Debug, Clone, PartialEq)]
pub struct Penalties {
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1: off.
    pub repetition: f32,
    /// Subtracted once per occurrence in the output.
    pub frequency: f32,
    /// Subtracted once if the token occurs in the output.
    pub presence: f32,
    /// Each token of the prompt once, ascending.
    pub prompt: Arc<[u32]>,
    /// Each token of the output once, ascending, with its number of occurrences.
    pub output: Vec<(u32, u32)>,
}

impl Penalties {
    /// Takes note of a token of the output.
    pub fn count(&mut self, token: u32) {
        match self.output.binary_search_by_key(&token, |&(token, _)| token) {
            Ok(place) => self.output[place].1 += 1,
            Err(place) => self.output.insert(place, (token, 1)),
        }
    }

    /// Each token of prompt and output once, ascending, with its number of occurrences in the output.
    pub fn seen(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let (mut prompt, mut output) =
            (self.prompt.iter().copied().peekable(), self.output.iter().peekable());
        std::iter::from_fn(move || {
            let next = output.peek().map(|&&(token, _)| token);
            if let Some(token) = prompt.next_if(|&token| next.is_none_or(|next| token < next)) {
                return Some((token, 0));
            }
            prompt.next_if(|&token| Some(token) == next);
            output.next().copied()
        })
    }
}

/// Asks for the log-probability of given successors.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Score {
    /// The successor of each token of the chunk; may be one shorter than the chunk, for the end of a text.
    pub next: Vec<u32>,
    /// How many of the best to return beside it.
    pub top: usize,
}

/// What a step gives for one sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SequenceOutput {
    /// One per entry of `sample`.
    pub sampled: Vec<Sampled>,
    /// One per entry of `Score::next`.
    pub scores: Vec<TokenLogprobs>,
    /// `[tokens, vocabulary]` if the plan asked for logits.
    pub logits: Vec<f32>,
    /// `[tokens, hidden]` if the plan asked for a layer's output.
    pub hidden: Vec<f32>,
    /// A logit behind one of these is infinite or no number: the weights are damaged or too large, and nothing here means
    /// anything.
    pub corrupted: bool,
}

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Present if the plan asked for log-probabilities.
    pub logprobs: Option<TokenLogprobs>,
}

/// The log-probability of one token and of the best ones at its place.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// 1 for the most probable token; ties count as one rank.
    pub rank: usize,
    /// The best tokens, most probable first, the lower id first on a tie; or the tokens that were asked for, in their order.
    pub top: Vec<(u32, f32)>,
}

/// What can go wrong in a step or at load.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The weights cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The plan breaks a rule of [`SequencePlan`]: a mistake of the caller.
    #[error("the plan is not valid: {0}")]
    Plan(String),
    /// The weights do not fit this backend.
    #[error("this model cannot run here: {0}")]
    Unsupported(String),
    /// No memory for the key/value cache.
    #[error("not enough memory for the key/value cache: needed {needed} bytes")]
    Memory {
        /// Bytes asked for.
        needed: usize,
    },
    /// No memory for something else.
    #[error("not enough memory for {what}: needed {needed} bytes")]
    NoRoom {
        /// What it was for.
        what: String,
        /// Bytes asked for.
        needed: usize,
    },
    /// There is no such device here.
    #[error("{0}")]
    NoDevice(String),
    /// The device failed.
    #[error("the device failed: {0}")]
    Device(String),
    /// See [`SequenceOutput::corrupted`].
    #[error(
        "the model computed logits that are infinite or no numbers: its weights are damaged or too large"
    )]
    Corrupted,
}

impl Plan {
    /// Checks the plan against the model and the number of blocks, so that a backend can index without looking.
    pub fn check(&self, config: &Config, full_blocks: usize, sliding_blocks: usize) -> Result<(), Error> {
        let fail = |what: String| Err(Error::Plan(what));
        for (s, sequence) in self.sequences.iter().enumerate() {
            if sequence.tokens.is_empty() {
                return fail(format!("sequence {s} has no tokens"));
            }
            if let Some(token) = sequence.tokens.iter().find(|&&t| t as usize >= config.vocab_size) {
                return fail(format!("sequence {s}: token {token} is not below {}", config.vocab_size));
            }
            if sequence.generated > sequence.tokens.len() {
                return fail(format!("sequence {s} has generated more tokens than there are"));
            }
            let end = sequence.position + sequence.tokens.len();
            if end > config.max_context {
                return fail(format!(
                    "sequence {s} ends at {end}, beyond the context of {}",
                    config.max_context
                ));
            }
            let blocks = end.div_ceil(BLOCK_TOKENS);
            if sequence.full_blocks.len() < blocks || sequence.sliding_blocks.len() < blocks {
                return fail(format!("sequence {s} needs {blocks} blocks of each kind"));
            }
            let window = (sequence.position + 1).saturating_sub(config.sliding_window) / BLOCK_TOKENS;
            if sequence.full_blocks[..blocks].iter().any(|&b| b as usize >= full_blocks)
                || sequence.sliding_blocks[window..blocks].iter().any(|&b| b as usize >= sliding_blocks)
            {
                return fail(format!("sequence {s} names a block that was not allocated"));
            }
            if sequence.sample.len() > sequence.tokens.len() {
                return fail(format!("sequence {s} samples more often than it has tokens"));
            }
            let ids = sequence.sample.iter().flat_map(|s| &s.logprobs).flat_map(|l| &l.ids);
            if ids.clone().any(|&id| id as usize >= config.vocab_size) {
                return fail(format!(
                    "sequence {s} asks for the log-probability of a token that does not exist"
                ));
            }
            if let Some(score) = &sequence.score
                && (score.next.len() > sequence.tokens.len()
                    || score.next.iter().any(|&t| t as usize >= config.vocab_size))
            {
                return fail(format!("sequence {s} scores tokens that do not fit"));
            }
            if sequence.hidden_after_layer.is_some_and(|l| l >= config.layer_kinds.len()) {
                return fail(format!("sequence {s} asks for a layer that does not exist"));
            }
        }
        Ok(())
    }
}
