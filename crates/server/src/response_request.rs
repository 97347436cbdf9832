//! `POST /v1/responses`: from a body to a request that cannot be wrong (`serving.md` 8.1).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use engine::SamplingParams;
use harmony::ChatPrompt;
use serde_json::{Value, json};

use crate::chat_request::{Effort, reasoning_effort, text_bytes};
use crate::error::ApiError;
use crate::form::{self, Wanted};
use crate::json::{self, Field, Object, excerpt};
use crate::request::{self, Common, Context, Truncation};
use crate::response_items::{self, Conversation, Item};
use crate::sampling::{self, EndpointFields, SamplingFields};
use crate::turn::{Choice, MAX_TOOLS_BYTES, ToolChoice, Tools, Turn, is_search};

const MAX_ITEMS: usize = 4096;
const MAX_METADATA: usize = 16;
const MAX_METADATA_BYTES: usize = 16 << 10;
const MAX_INCLUDE: usize = 16;

const FIELDS: &[&str] = &[
    "input",
    "instructions",
    "model",
    "max_output_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "logit_bias",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "reasoning",
    "text",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "max_tool_calls",
    "top_logprobs",
    "include",
    "store",
    "previous_response_id",
    "conversation",
    "background",
    "prompt",
    "stream",
    "stream_options",
    "truncation",
    "metadata",
    "service_tier",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "priority",
    "cache_salt",
    "include_reasoning",
    "structured_outputs",
    "repetition_detection",
    "truncate_prompt_tokens",
    "truncation_side",
    "enable_response_messages",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "logprobs",
    "reasoning_effort",
    "response_format",
    "functions",
    "function_call",
    // Accepted, and without effect.
    "session_id",
];

/// Fields of chats, and what they are called here.
const MISNAMED: &[(&str, &str)] = &[
    ("messages", "input"),
    ("max_tokens", "max_output_tokens"),
    ("max_completion_tokens", "max_output_tokens"),
    ("logprobs", "top_logprobs"),
    ("reasoning_effort", "reasoning.effort"),
    ("response_format", "text.format"),
    ("functions", "tools"),
    ("function_call", "tool_choice"),
];

/// A valid request.
#[derive(Debug)]
pub(crate) struct ResponseRequest {
    pub(crate) common: Common,
    pub(crate) prompt: ChatPrompt,
    pub(crate) tools: Arc<[String]>,
    /// Those of the tools whose argument is a text.
    pub(crate) free_tools: Vec<String>,
    /// Those that are in a namespace, and the name within it.
    pub(crate) namespaced_tools: Vec<(String, String)>,
    pub(crate) params: SamplingParams,
    pub(crate) choice: Choice,
    pub(crate) turn: Turn,
    /// The response ends with so many calls.
    pub(crate) max_calls: usize,
    pub(crate) include_reasoning: bool,
    /// Log-probabilities of the answer are shown.
    pub(crate) logprobs: bool,
    /// The client wants to refer to the response later.
    pub(crate) store: bool,
    /// The response is made whether or not the client waits for it.
    pub(crate) background: bool,
    pub(crate) text_bytes: usize,
    /// The request's own items, as they are kept.
    pub(crate) items: Vec<Arc<Item>>,
    /// What the response repeats of the request.
    pub(crate) echo: Value,
}

/// What a body refers to of what is stored.
pub(crate) struct References {
    /// The id of the response that it goes on from.
    pub(crate) previous: Option<String>,
    /// The ids of items.
    pub(crate) items: HashSet<String>,
}

impl References {
    pub(crate) fn of(body: &[u8]) -> Result<References, ApiError> {
        let object = Field::root(json::document(body)?).object(&["input", "previous_response_id"])?;
        let mut items = HashSet::new();
        if let Some(input) = object.field("input").filter(Field::is_array) {
            for item in input.array(MAX_ITEMS)? {
                if let Some(id) = response_items::reference(&item)?
                    && !items.insert(id.clone())
                {
                    return Err(item.error(format!("input refers twice to the item {}.", excerpt(&id))));
                }
            }
        }
        Ok(References { previous: object.string("previous_response_id")?, items })
    }
}

/// What a body refers to.
#[derive(Default)]
pub(crate) struct Earlier {
    /// The items that the conversation began with.
    pub(crate) conversation: Vec<Arc<Item>>,
    /// Those that references stand for.
    pub(crate) items: HashMap<String, Arc<Item>>,
}

impl ResponseRequest {
    /// Checks in the same order as a chat request.
    pub(crate) fn new(
        body: &[u8],
        earlier: &Earlier,
        context: &Context<'_>,
    ) -> Result<ResponseRequest, ApiError> {
        let object = Field::root(json::document(body)?).object(FIELDS)?;
        let input = object.required("input")?;

        // Types.
        let wire = Wire::read(&object)?;
        let (conversation, items) = read_input(&input, wire.instructions.as_ref(), earlier)?;

        // Ranges.
        let top_logprobs = sampling::count("top_logprobs", "sample", wire.top_logprobs, context.limits)?;
        let logprobs = wire.include_logprobs || top_logprobs.is_some_and(|top| top > 0);
        let endpoint = EndpointFields {
            max_tokens: sampling::tokens("max_output_tokens", wire.max_output_tokens, 1)?,
            logprobs: logprobs.then(|| top_logprobs.unwrap_or(0)),
            thinking_token_budget: None,
            shows_reasoning: wire.include_reasoning,
        };
        let max_calls = sampling::tokens("max_tool_calls", wire.max_tool_calls, 1)?;
        let params = wire.sampling.params(endpoint, context.defaults, context.limits)?;
        let effort = wire.effort.as_deref().map(|effort| {
            let found = reasoning_effort(effort, context.strict_reasoning_effort);
            found.map_err(|error| ApiError::invalid("reasoning.effort", error))
        });
        let effort = effort.transpose()?.unwrap_or_default();
        if let Some(tools) = wire.tools.as_ref().filter(|tools| !tools.is_empty()) {
            tools.check()?;
        }

        // Rules across fields.
        wire.common.cross_check(None)?;
        let tools = wire.tools.as_ref().filter(|tools| !tools.is_empty());
        let choice = wire.tool_choice.check(tools)?;

        wire.common.check_model(context)?;

        // Support.
        request::refuse_unsupported(&object)?;
        for name in ["conversation", "prompt"] {
            if object.field(name).is_some() {
                return Err(ApiError::invalid(name, format!("{name} is not supported.")));
            }
        }
        if object.bool("enable_response_messages")? == Some(true) {
            return Err(ApiError::unsupported("enable_response_messages"));
        }
        if wire.background && !wire.store {
            return Err(ApiError::invalid("background", "background needs store to be true."));
        }

        let turn = Turn::new(
            tools,
            &choice,
            wire.parallel_tool_calls,
            wire.wanted.as_ref(),
            effort != Effort::None,
            context,
        );
        let messages = conversation.finish();
        let shown = tools.filter(|_| !context.hides_tools(&choice));
        let text_bytes = text_bytes(&messages) + shown.map_or(0, Tools::bytes);
        let mut common = wire.common;
        if wire.may_truncate {
            common.truncation.get_or_insert(Truncation { tokens: None, keep_first: false });
        }
        let mut echo = wire.echo;
        echo["temperature"] = json!(params.temperature);
        echo["top_p"] = json!(params.top_p);
        Ok(ResponseRequest {
            text_bytes,
            tools: tools.map_or_else(Vec::new, Tools::names).into(),
            free_tools: tools.map_or_else(Vec::new, Tools::free),
            namespaced_tools: tools.map_or_else(Vec::new, Tools::namespaced),
            prompt: ChatPrompt {
                tools: shown.map_or_else(Vec::new, Tools::shown),
                response_format: wire.wanted.and_then(|wanted| wanted.shown).map(Box::new),
                reasoning_effort: Some(effort.shown().to_owned()),
                date: context.date.map(str::to_owned),
                ..ChatPrompt::new(messages)
            },
            common,
            params,
            choice,
            turn,
            max_calls: if wire.parallel_tool_calls { max_calls.unwrap_or(usize::MAX) } else { 1 },
            include_reasoning: wire.include_reasoning,
            logprobs,
            store: wire.store,
            background: wire.background,
            items,
            echo,
        })
    }
}

/// The body with its types checked, not its values.
struct Wire {
    common: Common,
    sampling: SamplingFields,
    instructions: Option<String>,
    max_output_tokens: Option<i64>,
    max_tool_calls: Option<i64>,
    /// The oldest messages may go if all do not fit.
    may_truncate: bool,
    top_logprobs: Option<i64>,
    include_logprobs: bool,
    effort: Option<String>,
    wanted: Option<Wanted>,
    tools: Option<Tools>,
    tool_choice: ToolChoice,
    parallel_tool_calls: bool,
    include_reasoning: bool,
    store: bool,
    background: bool,
    echo: Value,
}

impl Wire {
    fn read(object: &Object<'_>) -> Result<Wire, ApiError> {
        request::refuse_removed(object)?;
        request::refuse_misnamed(object, MISNAMED)?;
        if object.int("n")?.is_some_and(|n| n != 1) {
            return Err(ApiError::invalid("n", "n is not supported: a response has one answer."));
        }
        let text = object.field("text").map(|text| text.object(&["format", "verbosity"])).transpose()?;
        let format = text.as_ref().and_then(|text| text.field("format"));
        let wanted = match (&format, form::read(object)?) {
            (Some(format), outputs) => match (text_format(format)?, outputs) {
                (Some(_), Some(_)) => {
                    let message = "structured_outputs cannot be used together with text.format.";
                    return Err(ApiError::invalid("structured_outputs", message));
                }
                (wanted, outputs) => wanted.or(outputs),
            },
            (None, outputs) => outputs,
        };
        let reasoning =
            object.field("reasoning").map(|field| field.object(&["effort", "summary"])).transpose()?;
        let of_reasoning = |name| reasoning.as_ref().map(|reasoning| reasoning.string(name)).transpose();
        let (effort, summary) = (of_reasoning("effort")?.flatten(), of_reasoning("summary")?.flatten());
        let mut include_logprobs = false;
        for include in object.field("include").map_or(Ok(Vec::new()), |field| field.array(MAX_INCLUDE))? {
            include_logprobs |= include.string()? == "message.output_text.logprobs";
        }
        if let Some(truncation) = object.field("truncation")
            && !matches!(truncation.string()?.as_str(), "auto" | "disabled")
        {
            return Err(truncation.error("truncation must be auto or disabled."));
        }
        let instructions = object.string("instructions")?;
        let background = object.bool("background")?.unwrap_or(false);
        let parallel_tool_calls = object.bool("parallel_tool_calls")?.unwrap_or(true);
        let copy = |name: &'static str| match object.field(name) {
            Some(field) => field.value(MAX_TOOLS_BYTES),
            None => Ok(Value::Null),
        };
        let or = |value: Value, default: Value| if value.is_null() { default } else { value };
        // What is repeated is what counts.
        let mut tools = or(copy("tools")?, json!([]));
        if let Some(tools) = tools.as_array_mut() {
            tools.retain(|tool| !tool["type"].as_str().is_some_and(is_search));
        }
        let metadata = object.field("metadata").map(|field| field.entries(MAX_METADATA)).transpose()?;
        for (_, value) in metadata.into_iter().flatten() {
            value.value(MAX_METADATA_BYTES)?;
        }
        let mut shown_text = json!({"format": match &format {
            Some(format) => format.value(MAX_TOOLS_BYTES)?,
            None => json!({"type": "text"}),
        }});
        if let Some(verbosity) = text.as_ref().map(|text| text.string("verbosity")).transpose()?.flatten() {
            shown_text["verbosity"] = verbosity.into();
        }
        let echo = json!({
            "instructions": instructions,
            "max_output_tokens": object.int("max_output_tokens")?,
            "max_tool_calls": object.int("max_tool_calls")?,
            "parallel_tool_calls": parallel_tool_calls,
            "previous_response_id": object.string("previous_response_id")?,
            "reasoning": {"effort": effort.as_deref().unwrap_or("medium"), "summary": summary},
            "temperature": null,
            "text": shown_text,
            "tool_choice": or(copy("tool_choice")?, "auto".into()),
            "tools": tools,
            "top_logprobs": object.int("top_logprobs")?.unwrap_or(0),
            "top_p": null,
            "truncation": or(copy("truncation")?, "disabled".into()),
            "user": object.string("user")?,
            "safety_identifier": object.string("safety_identifier")?,
            "prompt_cache_key": object.string("prompt_cache_key")?,
            "prompt_cache_retention": object.string("prompt_cache_retention")?,
            "metadata": or(copy("metadata")?, json!({})),
            "background": background,
            "service_tier": "default",
        });
        Ok(Wire {
            common: Common::read(object)?,
            sampling: SamplingFields::read(object)?,
            instructions,
            max_output_tokens: object.int("max_output_tokens")?,
            max_tool_calls: object.int("max_tool_calls")?,
            may_truncate: object.string("truncation")?.as_deref() == Some("auto"),
            top_logprobs: object.int("top_logprobs")?,
            include_logprobs,
            effort,
            wanted,
            tools: object.field("tools").map(|tools| Tools::read_flat(&tools)).transpose()?,
            tool_choice: ToolChoice::read_flat(object)?,
            parallel_tool_calls,
            include_reasoning: object.bool("include_reasoning")?.unwrap_or(true),
            store: object.bool("store")?.unwrap_or(true),
            background,
            echo,
        })
    }
}

/// `text.format`: the flat form of `response_format`.
fn text_format(field: &Field<'_>) -> Result<Option<Wanted>, ApiError> {
    let object = field.object(&["type", "name", "description", "schema", "strict"])?;
    let kind = object.required("type")?;
    match kind.string()?.as_str() {
        "text" => Ok(None),
        "json_object" => form::json_object(&object, field.path()).map(Some),
        "json_schema" => form::json_schema(&object).map(Some),
        other => {
            let message = format!(
                "{} must be one of text, json_object, json_schema, got {}.",
                kind.path(),
                excerpt(other)
            );
            Err(kind.error(message))
        }
    }
}

/// The conversation, and the items of this request.
fn read_input(
    input: &Field<'_>,
    instructions: Option<&String>,
    earlier: &Earlier,
) -> Result<(Conversation, Vec<Arc<Item>>), ApiError> {
    let mut conversation = Conversation::default();
    if let Some(instructions) = instructions {
        conversation.say("developer", instructions.clone());
    }
    for item in &earlier.conversation {
        conversation.add(&Field::root(item.text()))?;
    }
    if input.is_string() {
        let text = input.string()?;
        let kept = response_items::kept_text(&text);
        conversation.say("user", text);
        return Ok((conversation, vec![kept]));
    }
    if !input.is_array() {
        return Err(input.error("input must be a string or an array of items."));
    }
    let mut items = Vec::new();
    for item in input.array(MAX_ITEMS)? {
        let Some(id) = response_items::reference(&item)? else {
            conversation.add(&item)?;
            items.push(response_items::kept(&item)?);
            continue;
        };
        let unknown = || ApiError::Unknown { what: "item", param: item.path().to_owned() };
        let stored = earlier.items.get(&id).ok_or_else(unknown)?;
        conversation.add(&Field::at(item.path(), stored.text()))?;
        items.push(Arc::clone(stored));
    }
    if items.is_empty() && earlier.conversation.is_empty() {
        return Err(input.error("input must not be empty."));
    }
    Ok((conversation, items))
}
