//! `POST /v1/completions`: from a body to a request that cannot be wrong (`serving.md` 7).

use engine::SamplingParams;

use crate::error::ApiError;
use crate::form::{self, Wanted};
use crate::json::{self, Field, Object};
use crate::request::{self, Common, Context};
use crate::sampling::{self, EndpointFields, SamplingFields};

const MAX_PROMPTS: usize = 1024;
const DEFAULT_MAX_TOKENS: i64 = 16;

const FIELDS: &[&str] = &[
    "prompt",
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "min_tokens",
    "n",
    "best_of",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "seed",
    "logprobs",
    "prompt_logprobs",
    "logprob_token_ids",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "response_format",
    "structured_outputs",
    "echo",
    "suffix",
    "prompt_embeds",
    "stream",
    "stream_options",
    "priority",
    "service_tier",
    "cache_salt",
    "request_id",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "truncate_prompt_tokens",
    "truncation_side",
    "skip_special_tokens",
    "repetition_detection",
    "stream_interval",
    "use_beam_search",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "max_completion_tokens",
    "max_output_tokens",
    // Accepted, and without effect.
    "user",
    "session_id",
    "add_special_tokens",
    "spaces_between_special_tokens",
    "length_penalty",
];

/// Fields of chats and responses, and what they are called here.
const MISNAMED: &[(&str, &str)] =
    &[("max_completion_tokens", "max_tokens"), ("max_output_tokens", "max_tokens")];

/// A valid request.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    pub(crate) common: Common,
    /// At least one.
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) params: SamplingParams,
    pub(crate) wanted: Option<Wanted>,
    /// The prompt comes before the completion.
    pub(crate) echo: bool,
    /// Each choice shows its prompt's log-probabilities.
    pub(crate) prompt_logprobs: Option<usize>,
}

/// What is continued.
#[derive(Debug)]
pub(crate) enum Prompt {
    /// Text in which special tokens count.
    Text(String),
    /// Tokens of the vocabulary, at least one.
    Ids(Vec<u32>),
}

impl CompletionRequest {
    /// Checks in the same order as a chat request.
    pub(crate) fn new(body: &[u8], context: &Context<'_>) -> Result<CompletionRequest, ApiError> {
        let object = Field::root(json::document(body)?).object(FIELDS)?;
        let prompt = object.required("prompt")?;

        // Types.
        let wire = Wire::read(&object, &prompt)?;

        // Ranges.
        check_prompts(&wire.prompts, &prompt, context)?;
        let endpoint = EndpointFields {
            // Without new tokens there must be something else to show.
            max_tokens: sampling::tokens("max_tokens", Some(wire.max_tokens), usize::from(!wire.echo))?,
            logprobs: sampling::count("logprobs", "sample", wire.logprobs, context.limits)?,
            thinking_token_budget: None,
            shows_reasoning: true,
        };
        let mut params = wire.sampling.params(endpoint, context.defaults, context.limits)?;

        // Rules across fields.
        wire.common.cross_check(params.prompt_logprobs)?;

        wire.common.check_model(context)?;

        // Support.
        request::refuse_unsupported(&object)?;
        if object.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::invalid("suffix", "suffix is not supported."));
        }
        if object.field("prompt_embeds").is_some() {
            return Err(ApiError::invalid("prompt_embeds", "prompt_embeds is not supported."));
        }

        let prompt_logprobs = params.prompt_logprobs;
        if wire.echo {
            params.prompt_logprobs = params.prompt_logprobs.max(params.logprobs);
        }
        Ok(CompletionRequest {
            common: wire.common,
            prompts: wire.prompts,
            params,
            wanted: wire.wanted.map(|wanted| Wanted { form: context.json.apply(wanted.form), ..wanted }),
            echo: wire.echo,
            prompt_logprobs,
        })
    }
}

struct Wire {
    common: Common,
    prompts: Vec<Prompt>,
    sampling: SamplingFields,
    max_tokens: i64,
    logprobs: Option<i64>,
    wanted: Option<Wanted>,
    echo: bool,
}

impl Wire {
    fn read(object: &Object<'_>, prompt: &Field<'_>) -> Result<Wire, ApiError> {
        request::refuse_removed(object)?;
        request::refuse_misnamed(object, MISNAMED)?;
        Ok(Wire {
            common: Common::read(object)?,
            prompts: prompts(prompt)?,
            sampling: SamplingFields::read(object)?,
            max_tokens: object.int("max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS),
            logprobs: object.int("logprobs")?,
            wanted: form::read(object)?,
            echo: object.bool("echo")?.unwrap_or(false),
        })
    }
}

/// A string, an array of strings, an array of ids, or an array of arrays of ids.
fn prompts(field: &Field<'_>) -> Result<Vec<Prompt>, ApiError> {
    if field.is_string() {
        return Ok(vec![Prompt::Text(field.string()?)]);
    }
    if !field.is_array() {
        let message = "prompt must be a string, an array of strings, an array of token ids or an array of arrays of \
                       token ids.";
        return Err(field.error(message));
    }
    let first = field.text()[1..].trim_ascii_start().as_bytes().first();
    if first.is_some_and(|byte| byte.is_ascii_digit() || *byte == b'-') {
        return Ok(vec![Prompt::Ids(field.ids()?)]);
    }
    let prompt = |field: &Field<'_>| {
        if field.is_array() { field.ids().map(Prompt::Ids) } else { field.string().map(Prompt::Text) }
    };
    field.array(MAX_PROMPTS)?.iter().map(prompt).collect()
}

fn check_prompts(prompts: &[Prompt], field: &Field<'_>, context: &Context<'_>) -> Result<(), ApiError> {
    let empty = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.is_empty(),
        Prompt::Ids(ids) => ids.is_empty(),
    };
    if prompts.is_empty() || prompts.iter().any(empty) {
        return Err(field.error("prompt must not be empty."));
    }
    let vocab_size = context.limits.vocab_size;
    for prompt in prompts {
        if let Prompt::Ids(ids) = prompt
            && let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size)
        {
            let message = format!("Token id {id} is out of vocabulary. Vocabulary size: {vocab_size}");
            return Err(field.error(message));
        }
    }
    Ok(())
}
