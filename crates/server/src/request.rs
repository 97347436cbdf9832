//! What both generating endpoints ask of a body, beside sampling.

use crate::error::ApiError;
use crate::json::{Object, excerpt};
use crate::sampling::Limits;
use crate::server::SamplingDefaults;

/// What a request is checked against.
pub(crate) struct Context<'a> {
    pub(crate) defaults: &'a SamplingDefaults,
    pub(crate) limits: Limits,
    /// Names that the model answers to, the default first.
    pub(crate) model_names: &'a [String],
    /// Today, for the prompt.
    pub(crate) date: &'a str,
}

/// How an answer is streamed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage_stats: bool,
}

/// Fields about the answer's form.
#[derive(Debug)]
pub(crate) struct Common {
    model: Option<String>,
    pub(crate) stream: Option<StreamOptions>,
    /// `stream_options` came without `stream`.
    stray_stream_options: bool,
    pub(crate) request_id: Option<String>,
    pub(crate) return_token_ids: bool,
    pub(crate) return_tokens_as_token_ids: bool,
    /// The client named a tier; it is told `default`.
    pub(crate) service_tier: bool,
    /// Names of a few fields that were ignored.
    pub(crate) unknown: Vec<String>,
}

impl Common {
    pub(crate) fn read(object: &Object<'_>) -> Result<Common, ApiError> {
        let model = object.string("model")?.filter(|name| !name.is_empty());
        let stream = object.bool("stream")?.unwrap_or(false);
        let options = match object.field("stream_options") {
            None => None,
            Some(field) => {
                let object = field.object(&["include_usage", "continuous_usage_stats"])?;
                Some(StreamOptions {
                    include_usage: object.bool("include_usage")?.unwrap_or(false),
                    continuous_usage_stats: object.bool("continuous_usage_stats")?.unwrap_or(false),
                })
            }
        };
        Ok(Common {
            model,
            stray_stream_options: options.is_some() && !stream,
            stream: stream.then(|| options.unwrap_or_default()),
            request_id: object.string("request_id")?,
            return_token_ids: object.bool("return_token_ids")?.unwrap_or(false),
            return_tokens_as_token_ids: object.bool("return_tokens_as_token_ids")?.unwrap_or(false),
            service_tier: object.string("service_tier")?.is_some(),
            unknown: object.unknown().to_vec(),
        })
    }

    /// Rules across fields.
    pub(crate) fn cross_check(&self, prompt_logprobs: Option<usize>) -> Result<(), ApiError> {
        if self.stray_stream_options {
            let message = "Stream options can only be defined when `stream=True`.";
            return Err(ApiError::invalid("stream_options", message));
        }
        if self.stream.is_some_and(|s| s.continuous_usage_stats && !s.include_usage) {
            let message = "continuous_usage_stats needs include_usage.";
            return Err(ApiError::invalid("stream_options.continuous_usage_stats", message));
        }
        if self.stream.is_some() && prompt_logprobs.is_some() {
            let message = "`prompt_logprobs` are not available when `stream=True`.";
            return Err(ApiError::invalid("prompt_logprobs", message));
        }
        if let Some(id) = &self.request_id
            && !is_request_id(id)
        {
            let message = "request_id must be 1 to 128 visible ASCII characters.";
            return Err(ApiError::invalid("request_id", message));
        }
        Ok(())
    }

    pub(crate) fn check_model(&self, context: &Context<'_>) -> Result<(), ApiError> {
        check_model(self.model.as_deref(), context.model_names)
    }
}

/// Whether the model answers to a name; without one the default is meant.
pub(crate) fn check_model(name: Option<&str>, known: &[String]) -> Result<(), ApiError> {
    match name.filter(|name| !name.is_empty()) {
        Some(name) if known.iter().all(|known| known != name) => {
            Err(ApiError::UnknownModel { name: excerpt(name), aliases: known.join(", ") })
        }
        _ => Ok(()),
    }
}

/// Whether a client may call its request so.
pub(crate) fn is_request_id(id: &str) -> bool {
    (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

/// Fields that vLLM once had: ignoring them would give unconstrained text to a client that relies on a constraint.
pub(crate) fn refuse_removed(object: &Object<'_>) -> Result<(), ApiError> {
    for name in [
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "guided_decoding_backend",
        "guided_whitespace_pattern",
    ] {
        if object.field(name).is_some() {
            let message = format!("{name} has been removed. Use structured_outputs instead.");
            return Err(ApiError::invalid(name, message));
        }
    }
    Ok(())
}

/// Fields that the engine cannot honour yet: better no answer than one that silently lacks what was asked for.
pub(crate) fn refuse_unsupported(object: &Object<'_>) -> Result<(), ApiError> {
    for name in ["logprob_token_ids", "repetition_detection", "cache_salt", "truncate_prompt_tokens"] {
        if object.field(name).is_some() {
            return Err(ApiError::unsupported(name));
        }
    }
    if object.bool("use_beam_search")? == Some(true) {
        return Err(ApiError::unsupported("use_beam_search"));
    }
    if object.int("best_of")?.is_some_and(|best_of| best_of != 1) {
        return Err(ApiError::unsupported("best_of"));
    }
    if object.int("stream_interval")?.is_some_and(|interval| interval != 1) {
        return Err(ApiError::unsupported("stream_interval"));
    }
    if object.int("priority")?.is_some_and(|priority| priority != 0) {
        let message =
            "priority needs a server with priority scheduling; this one serves in order of arrival.";
        return Err(ApiError::invalid("priority", message));
    }
    Ok(())
}
