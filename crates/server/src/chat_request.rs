//! `POST /v1/chat/completions`: from a body to a request that cannot be wrong (`serving.md` 5.1 to 5.3).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use engine::SamplingParams;
use harmony::{ChatMessage, ChatPrompt, FunctionCall, MessageContent, ToolCallInput};
use serde_json::Value;

use crate::error::ApiError;
use crate::form::{self, Wanted};
use crate::json::{self, Field, Object, excerpt};
use crate::request::{self, Common, Context, StreamOptions};
use crate::sampling::{self, EndpointFields, SamplingFields};
use crate::turn::{Choice, MAX_TOOLS, MAX_TOOLS_BYTES, ToolChoice, Tools, Turn};

const MAX_MESSAGES: usize = 4096;
const MAX_PARTS: usize = 4096;

const FIELDS: &[&str] = &[
    "messages",
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_completion_tokens",
    "max_tokens",
    "min_tokens",
    "n",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "seed",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "logprob_token_ids",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "response_format",
    "structured_outputs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning_effort",
    "include_reasoning",
    "thinking_token_budget",
    "stream",
    "stream_options",
    "priority",
    "service_tier",
    "modalities",
    "cache_salt",
    "request_id",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "return_prompt_text",
    "truncate_prompt_tokens",
    "truncation_side",
    "echo",
    "add_generation_prompt",
    "continue_final_message",
    "skip_special_tokens",
    "repetition_detection",
    "stream_interval",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "use_beam_search",
    "best_of",
    "functions",
    "function_call",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "instructions",
    "max_output_tokens",
    // Accepted, and without effect.
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "verbosity",
    "prediction",
    "session_id",
    "add_special_tokens",
    "spaces_between_special_tokens",
    "length_penalty",
];

/// Fields of responses, and what they are called here; not those that gateways add to chats, too.
const MISNAMED: &[(&str, &str)] =
    &[("instructions", "a message of the role developer"), ("max_output_tokens", "max_completion_tokens")];

/// A valid request.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) common: Common,
    pub(crate) prompt: ChatPrompt,
    /// Names of the tools that may be called.
    pub(crate) tools: Arc<[String]>,
    pub(crate) params: SamplingParams,
    /// How calls may be made; where they may not, what the model writes into one is kept as reasoning.
    pub(crate) choice: Choice,
    pub(crate) turn: Turn,
    /// The last message is one of the assistant's that the answer continues: what it says.
    pub(crate) continued: Option<String>,
    /// The answer is shown with what it continues.
    pub(crate) echo: bool,
    pub(crate) parallel_tool_calls: bool,
    /// The tools came as `functions`: the answer has at most one call, as `function_call`.
    pub(crate) legacy_functions: bool,
    pub(crate) include_reasoning: bool,
    pub(crate) return_prompt_text: bool,
    /// Bytes of text that the prompt will hold, about.
    pub(crate) text_bytes: usize,
}

impl ChatRequest {
    /// The order of the checks is fixed, so that the same mistakes always give the same first error: required fields,
    /// types, ranges, rules across fields, model, support.
    pub(crate) fn new(body: &[u8], context: &Context<'_>) -> Result<ChatRequest, ApiError> {
        let object = Field::root(json::document(body)?).object(FIELDS)?;
        let messages = object.required("messages")?;

        // Types.
        let wire = Wire::read(&object, &messages)?;

        // Ranges.
        if wire.messages.is_empty() {
            return Err(messages.error("messages must not be empty."));
        }
        let top_logprobs = sampling::count("top_logprobs", "sample", wire.top_logprobs, context.limits)?;
        let endpoint = EndpointFields {
            max_tokens: sampling::tokens(wire.max_field, wire.max_tokens, 1)?,
            logprobs: wire.logprobs.then(|| top_logprobs.unwrap_or(0)),
            thinking_token_budget: match wire.thinking_token_budget {
                None | Some(-1) => None,
                budget => sampling::tokens("thinking_token_budget", budget, 0)?,
            },
            shows_reasoning: wire.include_reasoning,
        };
        let params = wire.sampling.params(endpoint, context.defaults, context.limits)?;
        let strict = context.strict_reasoning_effort;
        let read_effort = |effort| reasoning_effort(effort, strict);
        let effort = wire.reasoning_effort.as_deref().map(read_effort).transpose()?;
        if let Some(tools) = &wire.tools {
            tools.check()?;
        }

        // Rules across fields.
        if top_logprobs.is_some_and(|top| top > 0) && !wire.logprobs {
            let message = "when using `top_logprobs`, `logprobs` must be set to true.";
            return Err(ApiError::invalid("top_logprobs", message));
        }
        wire.common.cross_check(params.prompt_logprobs)?;
        let choice = wire.tool_choice.check(wire.tools.as_ref())?;
        let mut messages = history(wire.messages)?;
        let mut text_bytes = text_bytes(&messages);
        let continued = match wire.continue_final_message {
            true => Some(last_answer(&mut messages)?),
            false => None,
        };

        wire.common.check_model(context)?;

        // Support.
        request::refuse_unsupported(&object)?;
        refuse_unsupported(&object)?;
        let kwargs = wire.chat_template_kwargs;
        let kwargs_effort = kwargs.reasoning_effort.as_deref().map(read_effort).transpose()?;
        let effort = effort.or(kwargs_effort).unwrap_or_default();
        let turn = Turn::new(
            wire.tools.as_ref(),
            &choice,
            wire.parallel_tool_calls,
            wire.wanted.as_ref(),
            effort != Effort::None,
            context,
        );
        if continued.is_some() && !turn.is_free() {
            let message = "continue_final_message cannot be used with tools or a form of the answer.";
            return Err(ApiError::invalid("continue_final_message", message));
        }
        let shown = wire.tools.as_ref().filter(|_| !context.hides_tools(&choice));
        text_bytes += shown.map_or(0, Tools::bytes)
            + kwargs.model_identity.as_ref().map_or(0, String::len)
            + kwargs.builtin_tools.iter().map(String::len).sum::<usize>();
        Ok(ChatRequest {
            common: wire.common,
            tools: wire.tools.as_ref().map_or_else(Vec::new, Tools::names).into(),
            prompt: ChatPrompt {
                messages,
                tools: shown.map_or_else(Vec::new, Tools::shown),
                response_format: wire.wanted.and_then(|wanted| wanted.shown).map(Box::new),
                reasoning_effort: Some(effort.shown().to_owned()),
                date: context.date.map(str::to_owned),
                builtin_tools: kwargs.builtin_tools,
                model_identity: kwargs.model_identity,
                // Whoever continues a message says that no other is to begin.
                add_generation_prompt: wire.add_generation_prompt || continued.is_some(),
            },
            params,
            choice,
            turn,
            continued,
            echo: wire.echo,
            parallel_tool_calls: wire.parallel_tool_calls,
            legacy_functions: wire.legacy_functions,
            include_reasoning: wire.include_reasoning,
            return_prompt_text: wire.return_prompt_text,
            text_bytes,
        })
    }
}

/// The body with its types checked, not its values.
struct Wire {
    common: Common,
    messages: Vec<WireMessage>,
    sampling: SamplingFields,
    max_tokens: Option<i64>,
    /// The name under which it came.
    max_field: &'static str,
    logprobs: bool,
    top_logprobs: Option<i64>,
    tools: Option<Tools>,
    tool_choice: ToolChoice,
    parallel_tool_calls: bool,
    legacy_functions: bool,
    reasoning_effort: Option<String>,
    include_reasoning: bool,
    thinking_token_budget: Option<i64>,
    wanted: Option<Wanted>,
    continue_final_message: bool,
    add_generation_prompt: bool,
    echo: bool,
    return_prompt_text: bool,
    chat_template_kwargs: TemplateKwargs,
}

impl Wire {
    fn read(object: &Object<'_>, messages: &Field<'_>) -> Result<Wire, ApiError> {
        request::refuse_removed(object)?;
        request::refuse_misnamed(object, MISNAMED)?;
        let common = Common::read(object)?;
        let messages: Vec<WireMessage> =
            messages.array(MAX_MESSAGES)?.iter().map(WireMessage::read).collect::<Result<_, _>>()?;
        let legacy_max = object.int("max_tokens")?;
        let (max_tokens, max_field) = match object.int("max_completion_tokens")? {
            Some(max) => (Some(max), "max_completion_tokens"),
            None => (legacy_max, "max_tokens"),
        };
        let functions = object.field("functions").filter(|_| object.field("tools").is_none());
        let (tools, tool_choice) = match (object.field("tools"), &functions) {
            (Some(tools), _) => (Some(Tools::read(&tools)?), ToolChoice::read(object)?),
            (None, Some(functions)) => {
                (Some(Tools::read_legacy(functions)?), ToolChoice::read_legacy(object)?)
            }
            (None, None) => (None, ToolChoice::read(object)?),
        };
        Ok(Wire {
            common,
            messages,
            sampling: SamplingFields::read(object)?,
            max_tokens,
            max_field,
            logprobs: object.bool("logprobs")?.unwrap_or(false),
            top_logprobs: object.int("top_logprobs")?,
            tools,
            tool_choice,
            parallel_tool_calls: object.bool("parallel_tool_calls")?.unwrap_or(true) && functions.is_none(),
            legacy_functions: functions.is_some(),
            reasoning_effort: object.string("reasoning_effort")?,
            include_reasoning: object.bool("include_reasoning")?.unwrap_or(true),
            thinking_token_budget: object.int("thinking_token_budget")?,
            wanted: form::read(object)?,
            continue_final_message: object.bool("continue_final_message")?.unwrap_or(false),
            add_generation_prompt: object.bool("add_generation_prompt")?.unwrap_or(true),
            echo: object.bool("echo")?.unwrap_or(false),
            return_prompt_text: object.bool("return_prompt_text")?.unwrap_or(false),
            chat_template_kwargs: TemplateKwargs::read(object)?,
        })
    }
}

/// Those that mean something to Harmony; the others are ignored.
#[derive(Debug, Default)]
struct TemplateKwargs {
    reasoning_effort: Option<String>,
    model_identity: Option<String>,
    builtin_tools: Vec<String>,
}

impl TemplateKwargs {
    fn read(object: &Object<'_>) -> Result<TemplateKwargs, ApiError> {
        let Some(field) = object.field("chat_template_kwargs") else { return Ok(TemplateKwargs::default()) };
        let object = field.object(&["reasoning_effort", "model_identity", "builtin_tools"])?;
        let builtin_tools =
            object.field("builtin_tools").map_or(Ok(Vec::new()), |tools| tools.array(MAX_TOOLS))?;
        Ok(TemplateKwargs {
            reasoning_effort: object.string("reasoning_effort")?,
            model_identity: object.string("model_identity")?,
            builtin_tools: builtin_tools.iter().map(Field::string).collect::<Result<_, _>>()?,
        })
    }
}

/// A message with its types checked, and the path under which to complain about it.
struct WireMessage {
    path: String,
    message: ChatMessage,
    /// The old form of a single call.
    function_call: Option<FunctionCall>,
}

impl WireMessage {
    fn read(field: &Field<'_>) -> Result<WireMessage, ApiError> {
        let object = field.object(&[
            "role",
            "content",
            "refusal",
            "reasoning",
            "reasoning_content",
            "thinking",
            "tool_calls",
            "tool_call_id",
            "name",
            "function_call",
        ])?;
        let role = object.required("role")?;
        let role_name = role.string()?;
        if !matches!(role_name.as_str(), "system" | "developer" | "user" | "assistant" | "tool" | "function")
        {
            let message = format!(
                "{} must be one of system, developer, user, assistant, tool, got {}.",
                role.path(),
                excerpt(&role_name)
            );
            return Err(role.error(message));
        }
        let assistant = role_name == "assistant";
        let mut content = object.field("content").map(|content| text(&content, assistant)).transpose()?;
        if assistant && content.is_none() {
            content = object.string("refusal")?;
        }
        let mut reasoning = None;
        let mut tool_calls = None;
        let mut function_call = None;
        if assistant {
            for name in ["reasoning", "reasoning_content", "thinking"] {
                let value = object.string(name)?;
                reasoning = reasoning.or(value.filter(|text| !text.is_empty()));
            }
            tool_calls = object.field("tool_calls").map(|calls| read_calls(&calls)).transpose()?;
            function_call = object.field("function_call").map(|call| read_call(&call)).transpose()?;
        }
        let called = function_call.is_some() || tool_calls.as_ref().is_some_and(|calls| !calls.is_empty());
        if content.is_none() && !(assistant && (called || reasoning.is_some())) {
            object.required("content")?;
        }
        let tool_call_id = match role_name.as_str() {
            "tool" => Some(object.required("tool_call_id")?.string()?),
            _ => None,
        };
        let name = match role_name.as_str() {
            "function" => Some(object.required("name")?.string()?),
            _ => None,
        };
        Ok(WireMessage {
            path: field.path().to_owned(),
            message: ChatMessage {
                role: role_name,
                content: content.map(MessageContent::Text),
                reasoning,
                tool_calls,
                tool_call_id,
                name,
                ..ChatMessage::default()
            },
            function_call,
        })
    }
}

/// A content: a string, or parts of text, joined.
pub(crate) fn text(field: &Field<'_>, assistant: bool) -> Result<String, ApiError> {
    if field.is_string() {
        return field.string();
    }
    if !field.is_array() {
        return Err(field.error(format!("{} must be a string or an array of parts.", field.path())));
    }
    let mut joined = String::new();
    for part in field.array(MAX_PARTS)? {
        let object = part.object(&["type", "text", "refusal"])?;
        let kind = object.required("type")?.string()?;
        match kind.as_str() {
            "text" | "input_text" | "output_text" => joined += &object.required("text")?.string()?,
            "refusal" if assistant => joined += &object.required("refusal")?.string()?,
            other => {
                let message =
                    format!("Parts of type {} are not supported: this model reads text.", excerpt(other));
                return Err(part.error(message));
            }
        }
    }
    Ok(joined)
}

fn read_calls(field: &Field<'_>) -> Result<Vec<ToolCallInput>, ApiError> {
    field
        .array(MAX_TOOLS)?
        .iter()
        .map(|call| {
            let object = call.object(&["id", "type", "function"])?;
            let id = object.required("id")?.string()?;
            if let Some(kind) = object.field("type")
                && kind.string()? != "function"
            {
                return Err(kind.error("Only calls of type function are supported."));
            }
            Ok(ToolCallInput {
                id,
                function: read_call(&object.required("function")?)?,
                ..ToolCallInput::default()
            })
        })
        .collect()
}

fn read_call(field: &Field<'_>) -> Result<FunctionCall, ApiError> {
    let object = field.object(&["name", "arguments"])?;
    let name = object.required("name")?.string()?;
    let arguments = match object.field("arguments") {
        None => Value::String(String::new()),
        // As the prompt shows them: of many calls one tree is there at a time.
        Some(arguments) if arguments.is_object() => {
            Value::String(arguments.value(MAX_TOOLS_BYTES)?.to_string())
        }
        Some(arguments) => Value::String(arguments.string()?),
    };
    Ok(FunctionCall { name, arguments })
}

/// Checks that results answer calls, and gives old-style calls ids.
fn history(messages: Vec<WireMessage>) -> Result<Vec<ChatMessage>, ApiError> {
    let mut known: HashSet<String> = HashSet::new();
    // Calls of the last assistant message without a result yet, and its path.
    let mut open: Vec<String> = Vec::new();
    let mut open_path = String::new();
    // The old-style call that waits for a message of the role `function`.
    let mut open_function: Option<(String, String)> = None;
    let mut checked = Vec::with_capacity(messages.len());
    for (i, WireMessage { path, mut message, function_call }) in messages.into_iter().enumerate() {
        match message.role.as_str() {
            "assistant" => {
                if let Some(function) = function_call {
                    let id = format!("function_call.{i}");
                    open_function = Some((function.name.clone(), id.clone()));
                    message.tool_calls.get_or_insert_default().push(ToolCallInput {
                        id,
                        function,
                        ..ToolCallInput::default()
                    });
                }
                let calls = message.tool_calls.iter().flatten();
                open = calls.map(|call| call.id.clone()).collect();
                open_path = path;
                known.extend(open.iter().cloned());
            }
            "tool" => {
                let id = message.tool_call_id.as_deref().unwrap_or_default();
                if !known.contains(id) {
                    let message =
                        format!("No earlier assistant message has a tool call with the id {}.", excerpt(id));
                    return Err(ApiError::invalid(&format!("{path}.tool_call_id"), message));
                }
                open.retain(|open| open != id);
            }
            "function" => {
                let name = message.name.take().unwrap_or_default();
                let Some((_, id)) = open_function.take_if(|(called, _)| *called == name) else {
                    let message =
                        format!("No earlier assistant message calls the function {}.", excerpt(&name));
                    return Err(ApiError::invalid(&format!("{path}.name"), message));
                };
                open.retain(|open| *open != id);
                message.role = "tool".to_owned();
                message.tool_call_id = Some(id);
            }
            // The person has moved on.
            "user" => open.clear(),
            _ => {}
        }
        checked.push(message);
    }
    if !open.is_empty() {
        const LISTED: usize = 10;
        let mut ids = open.iter().take(LISTED).map(|id| excerpt(id)).collect::<Vec<_>>().join(", ");
        if open.len() > LISTED {
            ids += &format!(" and {} more", open.len() - LISTED);
        }
        let message = format!("These tool calls have no result: {ids}.");
        return Err(ApiError::invalid(&format!("{open_path}.tool_calls"), message));
    }
    Ok(checked)
}

/// The bytes of text that the prompt will have of the messages: each result, too, names the function that was called.
pub(crate) fn text_bytes(messages: &[ChatMessage]) -> usize {
    let mut names: HashMap<&str, usize> = HashMap::new();
    let mut bytes = 0;
    for message in messages {
        if let Some(MessageContent::Text(text)) = &message.content {
            bytes += text.len();
        }
        bytes += message.reasoning.as_ref().map_or(0, String::len);
        for ToolCallInput { id, function, .. } in message.tool_calls.iter().flatten() {
            bytes += function.name.len() + function.arguments.as_str().map_or(0, str::len);
            names.insert(id, function.name.len());
        }
        bytes += message.tool_call_id.as_deref().and_then(|id| names.get(id)).copied().unwrap_or(0);
    }
    bytes
}

/// Takes the last message away, which must be an answer of the assistant; the result is its text.
fn last_answer(messages: &mut Vec<ChatMessage>) -> Result<String, ApiError> {
    match messages.pop() {
        Some(ChatMessage { role, content: Some(MessageContent::Text(text)), tool_calls: None, .. })
            if role == "assistant" =>
        {
            Ok(text)
        }
        _ => {
            let message = "continue_final_message needs an answer of the assistant as the last message.";
            Err(ApiError::invalid("continue_final_message", message))
        }
    }
}

/// How much the model is to reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Effort {
    /// It answers at once.
    None,
    Low,
    #[default]
    Medium,
    High,
}

impl Effort {
    /// The level that the prompt names.
    pub(crate) fn shown(self) -> &'static str {
        match self {
            Effort::None | Effort::Low => "low",
            Effort::Medium => "medium",
            Effort::High => "high",
        }
    }
}

/// `strict`: only those that the model has.
pub(crate) fn reasoning_effort(effort: &str, strict: bool) -> Result<Effort, ApiError> {
    match effort {
        "low" => Ok(Effort::Low),
        "medium" => Ok(Effort::Medium),
        "high" => Ok(Effort::High),
        "none" if !strict => Ok(Effort::None),
        "minimal" if !strict => Ok(Effort::Low),
        "xhigh" | "max" if !strict => Ok(Effort::High),
        other => {
            let known =
                if strict { "low, medium, high" } else { "none, minimal, low, medium, high, xhigh, max" };
            let message = format!("reasoning_effort must be one of {known}, got {}.", excerpt(other));
            Err(ApiError::invalid("reasoning_effort", message))
        }
    }
}

/// Fields of chats only that the engine cannot honour.
fn refuse_unsupported(object: &Object<'_>) -> Result<(), ApiError> {
    if object.field("chat_template").is_some() {
        let message = "chat_template is not supported: the prompt format of this model is built in.";
        return Err(ApiError::invalid("chat_template", message));
    }
    if object.field("documents").is_some() {
        return Err(ApiError::unsupported("documents"));
    }
    if let Some(modalities) = object.field("modalities") {
        for modality in modalities.array(MAX_PARTS)? {
            if modality.string()? != "text" {
                return Err(modalities.error("This model writes text only."));
            }
        }
    }
    Ok(())
}

impl ChatRequest {
    /// How the answer is to be streamed, if it is.
    pub(crate) fn stream(&self) -> Option<StreamOptions> {
        self.common.stream
    }
}
