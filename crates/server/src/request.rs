//! What both generating endpoints ask of a body, beside sampling.

use crate::error::ApiError;
use crate::form::JsonRules;
use crate::json::{Object, excerpt};
use crate::sampling::Limits;
use crate::server::SamplingDefaults;
use crate::turn::Choice;

/// What a request is checked against.
pub(crate) struct Context<'a> {
    pub(crate) defaults: &'a SamplingDefaults,
    pub(crate) limits: Limits<'a>,
    /// Names that the model answers to, the default first.
    pub(crate) model_names: &'a [String],
    /// Today, for the prompt.
    pub(crate) date: Option<&'a str>,
    /// Efforts that the model does not have are refused.
    pub(crate) strict_reasoning_effort: bool,
    /// The model is not told of tools that it may not call.
    pub(crate) exclude_tools_of_choice_none: bool,
    /// Arguments are constrained, whether or not a tool is strict.
    pub(crate) strict_arguments: bool,
    /// What all JSON keeps to.
    pub(crate) json: JsonRules,
    /// Requests may go before others.
    pub(crate) priorities: bool,
}

impl Context<'_> {
    /// Whether the model is not told of the tools.
    pub(crate) fn hides_tools(&self, choice: &Choice) -> bool {
        self.exclude_tools_of_choice_none && *choice == Choice::None
    }
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
    /// Only requests with the same one share cached prefixes.
    pub(crate) cache_salt: Option<String>,
    /// Less goes first.
    pub(crate) priority: i64,
    pub(crate) truncation: Option<Truncation>,
}

/// How a prompt that is too long is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Truncation {
    /// Tokens that stay; `None`: as many as the model takes.
    pub(crate) tokens: Option<usize>,
    /// The first tokens stay, not the last.
    pub(crate) keep_first: bool,
}

impl Truncation {
    fn read(object: &Object<'_>) -> Result<Option<Truncation>, ApiError> {
        let keep_first = match object.string("truncation_side")?.as_deref() {
            None | Some("left") => false,
            Some("right") => true,
            Some(other) => {
                let message = format!("truncation_side must be left or right, got {}.", excerpt(other));
                return Err(ApiError::invalid("truncation_side", message));
            }
        };
        let tokens = match object.int("truncate_prompt_tokens")? {
            None => return Ok(None),
            Some(-1) => None,
            Some(tokens) => {
                Some(usize::try_from(tokens).ok().filter(|&tokens| tokens > 0).ok_or_else(|| {
                    let message = format!("truncate_prompt_tokens must be -1 or at least 1, got {tokens}.");
                    ApiError::invalid("truncate_prompt_tokens", message)
                })?)
            }
        };
        Ok(Some(Truncation { tokens, keep_first }))
    }

    /// Cuts a prompt of which the first `preamble` tokens and the last `end` ones must stay; `boundary` is what messages begin
    /// with.
    pub(crate) fn apply(
        self,
        ids: &mut Vec<u32>,
        preamble: usize,
        end: usize,
        boundary: Option<u32>,
        max: usize,
    ) -> Result<(), ApiError> {
        let most = self.tokens.unwrap_or(max).min(max);
        if ids.len() <= most {
            return Ok(());
        }
        let Some(room) = most.checked_sub(preamble + end).filter(|&room| room > 0) else {
            let message = format!(
                "truncate_prompt_tokens must leave room for more than the {} tokens that cannot be cut, got {most}.",
                preamble + end
            );
            return Err(ApiError::invalid("truncate_prompt_tokens", message));
        };
        let body = ids.len() - end;
        let cut = if self.keep_first {
            preamble + room..body
        } else {
            let first = body - room;
            // Whole messages, if one fits.
            let whole = (first..body).find(|&at| Some(ids[at]) == boundary);
            preamble..whole.unwrap_or(first)
        };
        ids.drain(cut);
        Ok(())
    }
}

/// Longest salt.
const MAX_SALT: usize = 128;

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
            cache_salt: object.string("cache_salt")?,
            priority: object.int("priority")?.unwrap_or(0),
            truncation: Truncation::read(object)?,
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
        if let Some(salt) = &self.cache_salt
            && (salt.is_empty() || salt.chars().count() > MAX_SALT || salt.contains(['@', '/', '\\', '\0']))
        {
            let message =
                format!("cache_salt must be 1 to {MAX_SALT} characters, none of them @, /, \\ or NUL.");
            return Err(ApiError::invalid("cache_salt", message));
        }
        Ok(())
    }

    pub(crate) fn check_model(&self, context: &Context<'_>) -> Result<(), ApiError> {
        if self.priority != 0 && !context.priorities {
            let message = "priority needs a server that is started with --scheduling-policy priority.";
            return Err(ApiError::invalid("priority", message));
        }
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

/// A field of another endpoint, and what it is called here: ignoring it would give something else than was asked for. What is off
/// asks for nothing.
pub(crate) fn refuse_misnamed(object: &Object<'_>, names: &[(&'static str, &str)]) -> Result<(), ApiError> {
    for &(name, here) in names {
        if object.field(name).is_some_and(|field| field.text() != "false") {
            let message = format!("{name} is not a field of this endpoint. Use {here} instead.");
            return Err(ApiError::invalid(name, message));
        }
    }
    Ok(())
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
    if object.bool("use_beam_search")? == Some(true) {
        return Err(ApiError::unsupported("use_beam_search"));
    }
    if object.int("best_of")?.is_some_and(|best_of| best_of != 1) {
        return Err(ApiError::unsupported("best_of"));
    }
    Ok(())
}
