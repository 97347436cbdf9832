//! `SamplingParams`: vLLM's names, defaults and rules (`serving.md` 10), and the check that makes them valid.

use std::collections::BTreeMap;

use gptoss::Mask;
use tokenizer::Tokenizer;

use crate::Derived;

/// How a request is sampled and when it stops. Fields are free; [`SamplingParams::validate`] is asked before a request
/// enters the engine.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Answers per prompt.
    pub n: usize,
    /// 0: greedy. Values in (0, 0.01) are raised to 0.01.
    pub temperature: f32,
    /// In (0, 1].
    pub top_p: f32,
    /// 0: all.
    pub top_k: usize,
    /// In [0, 1].
    pub min_p: f32,
    /// `None`: drawn from the engine's seed and the request.
    pub seed: Option<i64>,
    /// `None`: what the context leaves. 0: only the prompt is computed, for its log-probabilities.
    pub max_tokens: Option<usize>,
    /// Stop tokens and stop strings are not honoured before.
    pub min_tokens: usize,
    /// Strings that end the text; not part of it unless `include_stop_str_in_output`.
    pub stop: Vec<String>,
    /// Tokens that end the text, beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Keep the matched stop string.
    pub include_stop_str_in_output: bool,
    /// The model's own stop tokens do not stop.
    pub ignore_eos: bool,
    /// Log-probabilities of the drawn token and of this many best.
    pub logprobs: Option<usize>,
    /// The same for each token of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// In [-2, 2].
    pub presence_penalty: f32,
    /// In [-2, 2].
    pub frequency_penalty: f32,
    /// Greater than 0.
    pub repetition_penalty: f32,
    /// Added to single logits, each within ±100.
    pub logit_bias: BTreeMap<u32, f32>,
    /// The only tokens that may be drawn; `None`: all.
    pub allowed_token_ids: Option<Derived<Vec<u32>, Mask>>,
    /// Texts that must not come, at the beginning of a word or within one.
    pub bad_words: Derived<Vec<String>, Vec<Vec<u32>>>,
    /// The drawn token comes with the log-probabilities of these, in place of the best. Needs `logprobs`.
    pub logprob_token_ids: Option<Vec<u32>>,
    /// Chats: reasoning ends after this many tokens. `None`: when the model wants.
    pub thinking_token_budget: Option<usize>,
    /// Chats: reasoning ends when only so many tokens are left, so that there is an answer. 0: it need not.
    pub answer_reserve: usize,
    /// Chats: stop strings end reasoning as they end an answer. Default true; false where nobody sees it.
    pub stop_in_reasoning: bool,
    /// Leave special tokens out of the text of raw completions.
    pub skip_special_tokens: bool,
    /// Ends an answer that repeats itself.
    pub repetition_detection: Option<RepetitionDetection>,
    /// Tokens per event, the first one aside.
    pub stream_interval: usize,
}

/// An answer ends when its last tokens are one pattern several times over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RepetitionDetection {
    /// The shortest pattern, in tokens; at least 1.
    pub min_pattern_size: usize,
    /// The longest.
    pub max_pattern_size: usize,
    /// So many times; at least 2.
    pub min_count: usize,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            n: 1,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            max_tokens: Some(16),
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: BTreeMap::new(),
            allowed_token_ids: None,
            bad_words: Vec::new().into(),
            logprob_token_ids: None,
            thinking_token_budget: None,
            answer_reserve: 0,
            stop_in_reasoning: true,
            skip_special_tokens: true,
            repetition_detection: None,
            stream_interval: 1,
        }
    }
}

impl SamplingParams {
    /// The most answers per prompt.
    pub const MAX_N: usize = 128;
    /// The most stop strings.
    pub const MAX_STOP: usize = 16;
    /// The longest stop string, in bytes.
    pub const MAX_STOP_BYTES: usize = 256;
    /// The most stop tokens.
    pub const MAX_STOP_TOKENS: usize = 256;
    /// The most biased logits.
    pub const MAX_LOGIT_BIAS: usize = 1024;
    /// The most bad words.
    pub const MAX_BAD_WORDS: usize = 128;
    /// The most tokens whose log-probabilities may be asked for.
    pub const MAX_LOGPROB_TOKEN_IDS: usize = 128;
    /// The longest pattern of a repetition.
    pub const MAX_PATTERN: usize = 1024;
    /// The longest bad word, in bytes.
    pub const MAX_BAD_WORD_BYTES: usize = 256;

    /// Makes what the engine needs of the fields of which that takes long, once for all clones, in the thread that calls. They are
    /// valid.
    pub fn prepare(&self, tokenizer: &Tokenizer) {
        self.allowed();
        self.forbidden(tokenizer);
    }

    /// The only tokens that may be drawn, if not all.
    pub(crate) fn allowed(&self) -> Option<Mask> {
        Some(self.allowed_token_ids.as_ref()?.get(|ids| Mask::of(ids)).clone())
    }

    /// The tokens of each bad word, as it is and after a space.
    pub(crate) fn forbidden(&self, tokenizer: &Tokenizer) -> &[Vec<u32>] {
        let both = |word: &String| [tokenizer.encode(word), tokenizer.encode(&format!(" {word}"))];
        self.bad_words.get(|words| words.iter().flat_map(both).collect())
    }

    /// Checks every rule and returns the parameters as the engine uses them: temperatures near 0 raised or greedy, a greedy
    /// request without filters, a `top_k` of the whole vocabulary as none, biases clamped, duplicates among stop tokens and
    /// allowed ones removed, a seed of -1 as none.
    ///
    /// # Errors
    /// Names the first field, in the order of the struct, that breaks its rule.
    pub fn validate(&self, vocab_size: usize) -> Result<SamplingParams, InvalidParam> {
        let mut valid = self.clone();
        require(self.n >= 1 && self.n <= Self::MAX_N, "n", || {
            format!("must be in [1, {}], got {}.", Self::MAX_N, self.n)
        })?;
        within(self.temperature, 0.0, 2.0, "temperature")?;
        if self.temperature < GREEDY_BELOW {
            require(self.n == 1, "n", || format!("must be 1 when using greedy sampling, got {}.", self.n))?;
            (valid.temperature, valid.top_p, valid.top_k, valid.min_p) = (0.0, 1.0, 0, 0.0);
        } else {
            valid.temperature = self.temperature.max(LEAST_TEMPERATURE);
        }
        // Backends need not look for what leaves nothing out.
        valid.top_k = if valid.top_k < vocab_size { valid.top_k } else { 0 };
        require(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", || {
            format!("must be in (0, 1], got {}.", self.top_p)
        })?;
        within(self.min_p, 0.0, 1.0, "min_p")?;
        valid.seed = self.seed.filter(|&seed| seed != NO_SEED);
        if let Some(max) = self.max_tokens {
            require(self.min_tokens <= max, "min_tokens", || {
                format!("must be less than or equal to max_tokens={max}, got {}.", self.min_tokens)
            })?;
        }
        require(self.stop.len() <= Self::MAX_STOP, "stop", || {
            format!("must have at most {} strings, got {}.", Self::MAX_STOP, self.stop.len())
        })?;
        for stop in &self.stop {
            require(!stop.is_empty() && stop.len() <= Self::MAX_STOP_BYTES, "stop", || {
                format!(
                    "must have strings of 1 to {} bytes, got one of {}.",
                    Self::MAX_STOP_BYTES,
                    stop.len()
                )
            })?;
        }
        require(self.stop_token_ids.len() <= Self::MAX_STOP_TOKENS, "stop_token_ids", || {
            format!("must have at most {} ids, got {}.", Self::MAX_STOP_TOKENS, self.stop_token_ids.len())
        })?;
        in_vocabulary(&self.stop_token_ids, vocab_size, "stop_token_ids")?;
        valid.stop_token_ids.sort_unstable();
        valid.stop_token_ids.dedup();
        for (field, count) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            require(count.unwrap_or(0) <= vocab_size, field, || {
                format!(
                    "must be at most the size of the vocabulary, {vocab_size}, got {}.",
                    count.unwrap_or(0)
                )
            })?;
        }
        within(self.presence_penalty, -2.0, 2.0, "presence_penalty")?;
        within(self.frequency_penalty, -2.0, 2.0, "frequency_penalty")?;
        require(
            self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0,
            "repetition_penalty",
            || format!("must be greater than 0 and finite, got {}.", self.repetition_penalty),
        )?;
        valid.repetition_penalty = self.repetition_penalty.max(LEAST_PENALTY);
        require(self.logit_bias.len() <= Self::MAX_LOGIT_BIAS, "logit_bias", || {
            format!("must have at most {} entries, got {}.", Self::MAX_LOGIT_BIAS, self.logit_bias.len())
        })?;
        in_vocabulary(self.logit_bias.keys(), vocab_size, "logit_bias")?;
        for (token, bias) in &mut valid.logit_bias {
            require(!bias.is_nan(), "logit_bias", || {
                format!("must have numbers as values, got {bias} for {token}.")
            })?;
            *bias = bias.clamp(-100.0, 100.0);
        }
        if let Some(allowed) = &self.allowed_token_ids {
            require(!allowed.is_empty(), "allowed_token_ids", || "must not be empty.".to_owned())?;
            in_vocabulary(allowed.iter(), vocab_size, "allowed_token_ids")?;
            // What is valid already stays shared.
            if !allowed.is_sorted_by(|a, b| a < b) {
                let mut different = allowed.to_vec();
                different.sort_unstable();
                different.dedup();
                valid.allowed_token_ids = Some(different.into());
            }
        }
        require(self.bad_words.len() <= Self::MAX_BAD_WORDS, "bad_words", || {
            format!("must have at most {} words, got {}.", Self::MAX_BAD_WORDS, self.bad_words.len())
        })?;
        for word in &*self.bad_words {
            require(!word.is_empty() && word.len() <= Self::MAX_BAD_WORD_BYTES, "bad_words", || {
                format!(
                    "must have words of 1 to {} bytes, got one of {}.",
                    Self::MAX_BAD_WORD_BYTES,
                    word.len()
                )
            })?;
        }
        if let Some(ids) = &self.logprob_token_ids {
            let (field, most) = ("logprob_token_ids", Self::MAX_LOGPROB_TOKEN_IDS);
            require(self.logprobs.is_some(), field, || "needs logprobs.".to_owned())?;
            require(ids.len() <= most, field, || {
                format!("must have at most {most} ids, got {}.", ids.len())
            })?;
            in_vocabulary(ids, vocab_size, field)?;
        }
        if let Some(detection) = self.repetition_detection {
            let RepetitionDetection { min_pattern_size, max_pattern_size, min_count } = detection;
            let field = "repetition_detection";
            require((1..=Self::MAX_PATTERN).contains(&max_pattern_size), field, || {
                format!("must have a max_pattern_size in [1, {}], got {max_pattern_size}.", Self::MAX_PATTERN)
            })?;
            require((1..=max_pattern_size).contains(&min_pattern_size), field, || {
                format!("must have a min_pattern_size in [1, {max_pattern_size}], got {min_pattern_size}.")
            })?;
            require(min_count >= 2, field, || {
                format!("must have a min_count of at least 2, got {min_count}.")
            })?;
        }
        require(self.stream_interval >= 1, "stream_interval", || "must be at least 1, got 0.".to_owned())?;
        Ok(valid)
    }
}

/// Temperatures below are greedy.
const GREEDY_BELOW: f32 = 1e-5;

/// Lower positive temperatures are raised to this: logits divided by less overflow.
const LEAST_TEMPERATURE: f32 = 0.01;

/// Likewise lower repetition penalties.
const LEAST_PENALTY: f32 = 1e-3;

fn require(holds: bool, field: &'static str, message: impl FnOnce() -> String) -> Result<(), InvalidParam> {
    if holds { Ok(()) } else { Err(InvalidParam { field, message: message() }) }
}

fn within(value: f32, least: f32, most: f32, field: &'static str) -> Result<(), InvalidParam> {
    require((least..=most).contains(&value), field, || format!("must be in [{least}, {most}], got {value}."))
}

fn in_vocabulary<'a>(
    ids: impl IntoIterator<Item = &'a u32>,
    vocab_size: usize,
    field: &'static str,
) -> Result<(), InvalidParam> {
    match ids.into_iter().find(|&&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(InvalidParam {
            field,
            message: format!(
                "contains the token id {id}, which is out of vocabulary. Vocabulary size: {vocab_size}"
            ),
        }),
    }
}

/// A seed that is none, as other programs write it.
pub(crate) const NO_SEED: i64 = -1;

/// A field of a request that breaks its rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {message}")]
pub struct InvalidParam {
    /// The field's name as in `SamplingParams`.
    pub field: &'static str,
    /// The rule and what was found, as the rest of a sentence.
    pub message: String,
}
