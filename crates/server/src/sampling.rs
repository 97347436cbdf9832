//! The sampling fields that both generating endpoints share: read with their types, then turned into the engine's
//! parameters, whose rules are the engine's.

use std::collections::BTreeMap;

use engine::{InvalidParam, RepetitionDetection, SamplingParams};
use tokenizer::Tokenizer;

use crate::error::ApiError;
use crate::json::{Field, Object, excerpt};
use crate::server::SamplingDefaults;

/// What bounds the values.
#[derive(Clone, Copy)]
pub(crate) struct Limits<'a> {
    pub(crate) vocab_size: usize,
    pub(crate) tokenizer: &'a Tokenizer,
    /// Largest number of alternatives per token.
    pub(crate) max_logprobs: usize,
    /// Most answers to one prompt.
    pub(crate) max_n: usize,
}

/// The fields with their types checked, not their values.
#[derive(Debug)]
pub(crate) struct SamplingFields {
    n: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    repetition_penalty: Option<f64>,
    seed: Option<i64>,
    min_tokens: Option<i64>,
    stop: Vec<String>,
    stop_token_ids: Vec<u32>,
    include_stop_str_in_output: bool,
    ignore_eos: bool,
    prompt_logprobs: Option<i64>,
    logit_bias: Vec<(String, f64)>,
    allowed_token_ids: Option<Vec<u32>>,
    bad_words: Vec<String>,
    skip_special_tokens: bool,
    logprob_token_ids: Option<Vec<u32>>,
    repetition_detection: Option<Detection>,
    stream_interval: Option<i64>,
}

/// `repetition_detection` with its types checked.
#[derive(Debug)]
struct Detection {
    min_pattern_size: Option<i64>,
    max_pattern_size: Option<i64>,
    min_count: Option<i64>,
}

impl Detection {
    fn read(field: &Field<'_>) -> Result<Detection, ApiError> {
        let object = field.object(&["min_pattern_size", "max_pattern_size", "min_count"])?;
        Ok(Detection {
            min_pattern_size: object.int("min_pattern_size")?,
            max_pattern_size: object.int("max_pattern_size")?,
            min_count: object.int("min_count")?,
        })
    }

    fn counts(self) -> Result<RepetitionDetection, ApiError> {
        let of = |name: &str, value: Option<i64>, default: usize| {
            let count = natural(&format!("repetition_detection.{name}"), value)?;
            Ok::<usize, ApiError>(count.unwrap_or(default))
        };
        Ok(RepetitionDetection {
            // vLLM's 0 means the shortest there is.
            min_pattern_size: of("min_pattern_size", self.min_pattern_size, 1)?.max(1),
            max_pattern_size: of("max_pattern_size", self.max_pattern_size, 0)?,
            min_count: of("min_count", self.min_count, 2)?,
        })
    }
}

/// What the endpoints name and default differently.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EndpointFields {
    pub(crate) max_tokens: Option<usize>,
    pub(crate) logprobs: Option<usize>,
    pub(crate) thinking_token_budget: Option<usize>,
    /// The client sees the reasoning, if there is any.
    pub(crate) shows_reasoning: bool,
}

impl SamplingFields {
    pub(crate) fn read(object: &Object<'_>) -> Result<SamplingFields, ApiError> {
        Ok(SamplingFields {
            n: object.int("n")?,
            temperature: object.number("temperature")?,
            top_p: object.number("top_p")?,
            top_k: object.int("top_k")?,
            min_p: object.number("min_p")?,
            presence_penalty: object.number("presence_penalty")?,
            frequency_penalty: object.number("frequency_penalty")?,
            repetition_penalty: object.number("repetition_penalty")?,
            seed: object.int("seed")?,
            min_tokens: object.int("min_tokens")?,
            stop: object.field("stop").map_or(Ok(Vec::new()), |field| stop(&field))?,
            stop_token_ids: object.field("stop_token_ids").map_or(Ok(Vec::new()), |field| field.ids())?,
            include_stop_str_in_output: object.bool("include_stop_str_in_output")?.unwrap_or(false),
            ignore_eos: object.bool("ignore_eos")?.unwrap_or(false),
            prompt_logprobs: object.int("prompt_logprobs")?,
            logit_bias: object.field("logit_bias").map_or(Ok(Vec::new()), |field| logit_bias(&field))?,
            allowed_token_ids: object.field("allowed_token_ids").map(|field| field.ids()).transpose()?,
            bad_words: object.field("bad_words").map_or(Ok(Vec::new()), |field| bad_words(&field))?,
            skip_special_tokens: object.bool("skip_special_tokens")?.unwrap_or(true),
            logprob_token_ids: object.field("logprob_token_ids").map(|field| field.ids()).transpose()?,
            repetition_detection: object
                .field("repetition_detection")
                .map(|f| Detection::read(&f))
                .transpose()?,
            stream_interval: object.int("stream_interval")?,
        })
    }

    /// Valid parameters, with the defaults filled in.
    pub(crate) fn params(
        self,
        endpoint: EndpointFields,
        defaults: &SamplingDefaults,
        limits: Limits<'_>,
    ) -> Result<SamplingParams, ApiError> {
        let or = |value: Option<f64>, default: f32| value.map_or(default, |value| value as f32);
        let params = SamplingParams {
            n: answers(self.n, limits.max_n)?,
            temperature: or(self.temperature, defaults.temperature),
            top_p: or(self.top_p, defaults.top_p),
            top_k: natural("top_k", self.top_k.map(|k| if k == -1 { 0 } else { k }))?
                .unwrap_or(defaults.top_k),
            min_p: or(self.min_p, defaults.min_p),
            seed: self.seed,
            max_tokens: endpoint.max_tokens,
            min_tokens: natural("min_tokens", self.min_tokens)?.unwrap_or(0),
            stop: self.stop,
            stop_token_ids: self.stop_token_ids,
            include_stop_str_in_output: self.include_stop_str_in_output,
            ignore_eos: self.ignore_eos,
            logprobs: endpoint.logprobs,
            prompt_logprobs: count("prompt_logprobs", "prompt", self.prompt_logprobs, limits)?,
            presence_penalty: or(self.presence_penalty, 0.0),
            frequency_penalty: or(self.frequency_penalty, 0.0),
            repetition_penalty: or(self.repetition_penalty, defaults.repetition_penalty),
            logit_bias: biases(self.logit_bias)?,
            allowed_token_ids: self.allowed_token_ids.map(Into::into),
            bad_words: self.bad_words.into(),
            thinking_token_budget: endpoint.thinking_token_budget,
            skip_special_tokens: self.skip_special_tokens,
            logprob_token_ids: self.logprob_token_ids,
            repetition_detection: self.repetition_detection.map(Detection::counts).transpose()?,
            stream_interval: natural("stream_interval", self.stream_interval)?.unwrap_or(1),
            answer_reserve: 0,
            stop_in_reasoning: endpoint.shows_reasoning,
        };
        let params = params.validate(limits.vocab_size)?;
        // Not on the threads that serve connections, nor on the engine's.
        params.prepare(limits.tokenizer);
        Ok(params)
    }
}

impl From<InvalidParam> for ApiError {
    fn from(error: InvalidParam) -> ApiError {
        ApiError::invalid(error.field, format!("{} {}", error.field, error.message))
    }
}

fn answers(n: Option<i64>, max: usize) -> Result<usize, ApiError> {
    match natural("n", n)?.unwrap_or(1) {
        n if n > max => Err(ApiError::invalid("n", format!("n must be in [1, {max}], got {n}."))),
        n => Ok(n),
    }
}

/// A number of log-probabilities per token.
pub(crate) fn count(
    field: &str,
    what: &str,
    value: Option<i64>,
    limits: Limits<'_>,
) -> Result<Option<usize>, ApiError> {
    // All of them, where that is allowed.
    let value =
        value.map(|count| if count == -1 && limits.max_logprobs == usize::MAX { i64::MAX } else { count });
    let count = natural(field, value)?
        .map(|count| if limits.max_logprobs == usize::MAX { count.min(limits.vocab_size) } else { count });
    match count.filter(|&count| count > limits.max_logprobs) {
        None => Ok(count),
        Some(count) => {
            let most = limits.max_logprobs;
            let message =
                format!("Requested {what} logprobs of {count}, which is greater than max allowed: {most}");
            Err(ApiError::invalid(field, message))
        }
    }
}

/// A number of tokens, at least `least`.
pub(crate) fn tokens(field: &str, value: Option<i64>, least: usize) -> Result<Option<usize>, ApiError> {
    match natural(field, value)? {
        Some(tokens) if tokens < least => {
            Err(ApiError::invalid(field, format!("{field} must be at least {least}, got {tokens}.")))
        }
        tokens => Ok(tokens),
    }
}

fn natural(field: &str, value: Option<i64>) -> Result<Option<usize>, ApiError> {
    let convert = |value| {
        usize::try_from(value)
            .map_err(|_| ApiError::invalid(field, format!("{field} must not be negative, got {value}.")))
    };
    value.map(convert).transpose()
}

fn stop(field: &Field<'_>) -> Result<Vec<String>, ApiError> {
    if field.is_string() {
        return Ok(vec![field.string()?]);
    }
    field.array(SamplingParams::MAX_STOP)?.iter().map(Field::string).collect()
}

fn bad_words(field: &Field<'_>) -> Result<Vec<String>, ApiError> {
    field.array(SamplingParams::MAX_BAD_WORDS)?.iter().map(Field::string).collect()
}

fn logit_bias(field: &Field<'_>) -> Result<Vec<(String, f64)>, ApiError> {
    let entries = field.entries(SamplingParams::MAX_LOGIT_BIAS)?;
    entries.into_iter().map(|(key, value)| Ok((key, value.number()?))).collect()
}

fn biases(entries: Vec<(String, f64)>) -> Result<BTreeMap<u32, f32>, ApiError> {
    // In one way only, lest two keys be one token's.
    let id = |key: &str| key.parse().ok().filter(|id: &u32| id.to_string() == key);
    let bias = |(key, value): (String, f64)| match id(&key) {
        Some(id) => Ok((id, value as f32)),
        None => {
            let message = format!("logit_bias must have token ids as keys, got {}.", excerpt(&key));
            Err(ApiError::invalid("logit_bias", message))
        }
    };
    entries.into_iter().map(bias).collect()
}
