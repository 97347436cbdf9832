//! `SamplingParams`: vLLM's names, defaults and rules (`serving.md` 10), and the check that makes them valid.

use std::collections::BTreeMap;

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
    /// `None`: what the context leaves.
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
    /// Leave special tokens out of the text of raw completions.
    pub skip_special_tokens: bool,
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
            skip_special_tokens: true,
        }
    }
}

/// A field of a request that breaks its rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {message}")]
pub struct InvalidParam {
    /// The field's name as in `SamplingParams`.
    pub field: &'static str,
    /// The rule and what was found, as the rest of a sentence.
    pub message: String,
}
