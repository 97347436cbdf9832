//! API requests as Harmony messages: where instructions go, which reasoning stays, how calls and results are written.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::message::{
    Content, Message, Mode, RenderOptions, ResponseFormat, Role, SystemContent, ToolDescription,
    ToolNamespace,
};
use crate::render::FUNCTIONS;
use crate::{Error, Harmony};

/// A chat request: what the fields of `/v1/chat/completions` say about the prompt.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ChatPrompt {
    /// The conversation.
    #[serde(deserialize_with = "objects")]
    pub messages: Vec<ChatMessage>,
    /// Function tools.
    #[serde(default, deserialize_with = "objects_or_null")]
    pub tools: Vec<ChatTool>,
    /// The form that the answer must have, shown to the model.
    #[serde(default)]
    pub response_format: Option<Box<ResponseFormat>>,
    /// `low`, `medium` (the default) or `high`.
    #[serde(default)]
    pub reasoning_effort: Option<String>,
    /// Current date as `YYYY-MM-DD`; without it the line is left out.
    #[serde(default)]
    pub date: Option<String>,
    /// `browser`, `python`.
    #[serde(default)]
    pub builtin_tools: Vec<String>,
    /// In place of the identity that the model was trained with.
    #[serde(default)]
    pub model_identity: Option<String>,
    /// `false` renders a training example.
    #[serde(default = "yes")]
    pub add_generation_prompt: bool,
}

impl ChatPrompt {
    /// A prompt of these messages with everything else at its default.
    pub fn new(messages: Vec<ChatMessage>) -> ChatPrompt {
        ChatPrompt {
            messages,
            tools: Vec::new(),
            response_format: None,
            reasoning_effort: None,
            date: None,
            builtin_tools: Vec::new(),
            model_identity: None,
            add_generation_prompt: true,
        }
    }

    /// The names of the functions that may be called.
    pub fn tool_names(&self) -> Arc<[String]> {
        self.tools.iter().map(|tool| tool.function.name.clone()).collect()
    }
}

/// One message of a request.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default)]
pub struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool` (or `function`, its old name).
    pub role: String,
    /// The text.
    pub content: Option<MessageContent>,
    /// Earlier reasoning of the assistant.
    pub reasoning: Option<String>,
    /// Another name of `reasoning`.
    pub reasoning_content: Option<String>,
    /// Another name of `reasoning`.
    pub thinking: Option<String>,
    /// Calls of the assistant.
    pub tool_calls: Option<Vec<ToolCallInput>>,
    /// Which call a tool's message answers.
    pub tool_call_id: Option<String>,
    /// The function's name, in messages of the old role `function`.
    pub name: Option<String>,
}

impl ChatMessage {
    /// A message of one text.
    pub fn new(role: &str, text: impl Into<String>) -> ChatMessage {
        ChatMessage {
            role: role.to_owned(),
            content: Some(MessageContent::Text(text.into())),
            ..ChatMessage::default()
        }
    }

    pub(crate) fn reasoning(&self) -> Option<&str> {
        let names = [&self.reasoning, &self.reasoning_content, &self.thinking];
        names.into_iter().flatten().map(String::as_str).find(|text| !text.is_empty())
    }
}

/// A text, or parts of text that are joined.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum MessageContent {
    /// The whole text.
    Text(String),
    /// Its parts.
    Parts(Vec<Value>),
}

/// A call in the history.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct ToolCallInput {
    /// What the answer refers to.
    #[serde(default)]
    pub id: String,
    /// The function and its arguments.
    pub function: FunctionCall,
    /// Of the first call of a message: the turn as it was generated after `<|start|>assistant`, if that is known. It is written again
    /// if it is what the message says.
    #[serde(skip)]
    pub generated: Option<Arc<[u32]>>,
}

/// A function and its arguments.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct FunctionCall {
    /// Its name.
    pub name: String,
    /// A string, kept byte for byte, or an object.
    #[serde(default)]
    pub arguments: Value,
}

/// A tool of a request.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct ChatTool {
    /// The only kind there is.
    pub function: FunctionTool,
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct FunctionTool {
    /// Its name.
    pub name: String,
    /// What it does.
    #[serde(default)]
    pub description: Option<String>,
    /// JSON Schema of its argument.
    #[serde(default)]
    pub parameters: Option<Value>,
}

/// Values written as objects; serde would also take arrays for them, field after field.
fn objects<'de, T: DeserializeOwned, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    let objects = Vec::<Map<String, Value>>::deserialize(deserializer)?;
    let values = objects.into_iter().map(|object| serde_json::from_value(Value::Object(object)));
    values.collect::<Result<_, _>>().map_err(D::Error::custom)
}

/// The same, or `null` for none.
fn objects_or_null<'de, T: DeserializeOwned, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(Vec::new()),
        values => objects(values).map_err(D::Error::custom),
    }
}

/// What `harmony render` reads: a chat request, or Harmony messages marked by `"harmony": true`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub enum Document {
    /// A chat request.
    Chat(ChatPrompt),
    /// Harmony messages.
    Harmony(Vec<Message>, RenderOptions),
}

impl Document {
    /// Reads a document; the error says which field is wrong.
    pub fn from_json(text: &str) -> Result<Document, Error> {
        serde_json::from_str::<Value>(text).map_err(|e| not_a_document(&e))?.try_into()
    }
}

fn not_a_document(error: &serde_json::Error) -> Error {
    Error::invalid("document", error.to_string())
}

impl TryFrom<Value> for Document {
    type Error = Error;

    fn try_from(document: Value) -> Result<Document, Error> {
        #[derive(Deserialize)]
        struct Conversation {
            messages: Vec<Message>,
            #[serde(default)]
            mode: Option<String>,
            #[serde(default)]
            next_role: Option<Role>,
            #[serde(default = "yes")]
            auto_drop_analysis: bool,
        }
        if !document.is_object() {
            return Err(Error::invalid("document", "expected an object"));
        }
        match document.get("harmony") {
            None | Some(Value::Bool(false)) => {
                return Ok(Document::Chat(serde_json::from_value(document).map_err(|e| not_a_document(&e))?));
            }
            Some(Value::Bool(true)) => {}
            Some(_) => return Err(Error::invalid("harmony", "expected true or false")),
        }
        let conversation: Conversation = serde_json::from_value(document).map_err(|e| not_a_document(&e))?;
        let mode = match conversation.mode.as_deref().unwrap_or("completion") {
            "completion" => Mode::Completion(conversation.next_role.unwrap_or(Role::Assistant)),
            "conversation" => Mode::Conversation,
            "training" => Mode::Training,
            other => {
                let expected = "expected completion, conversation or training, found ";
                return Err(Error::invalid("mode", format!("{expected}{other:?}")));
            }
        };
        let options = RenderOptions { mode, auto_drop_analysis: conversation.auto_drop_analysis };
        Ok(Document::Harmony(conversation.messages, options))
    }
}

impl Harmony {
    /// Renders what [`Document::from_json`] read.
    pub fn render_document(&self, document: &Document) -> Result<Vec<u32>, Error> {
        match document {
            Document::Chat(prompt) => self.render_chat(prompt),
            Document::Harmony(messages, options) => self.render(messages, options),
        }
    }

    /// Renders a chat request: the ids that the model is fed.
    pub fn render_chat(&self, prompt: &ChatPrompt) -> Result<Vec<u32>, Error> {
        let mode =
            if prompt.add_generation_prompt { Mode::Completion(Role::Assistant) } else { Mode::Training };
        let messages = drop_old_reasoning(self.conversation(prompt)?, mode == Mode::Training);
        self.render(&messages, &RenderOptions { mode, auto_drop_analysis: false })
    }

    /// The request as Harmony messages, all reasoning included.
    fn conversation(&self, prompt: &ChatPrompt) -> Result<Vec<Message>, Error> {
        let mut messages = vec![system_message(prompt)?];
        let tools = (!prompt.tools.is_empty()).then(|| function_tools(&prompt.tools));
        let instructions =
            |message: &ChatMessage, i| text(message, i).map(|t| Some(t).filter(|t| !t.is_empty()));
        let is_instructions = |m: &ChatMessage| matches!(m.role.as_str(), "system" | "developer");

        let first = prompt.messages.first().filter(|m| is_instructions(m));
        let first_text = first.map_or(Ok(None), |m| instructions(m, 0))?;
        messages.extend(developer_message(first_text, tools, prompt.response_format.clone()));

        let mut calls: HashMap<&str, &str> = HashMap::new();
        let names = prompt.tool_names();
        for (i, message) in prompt.messages.iter().enumerate().skip(usize::from(first.is_some())) {
            let field = |name: &str| format!("messages.{i}.{name}");
            match message.role.as_str() {
                "system" | "developer" => {
                    messages.extend(developer_message(instructions(message, i)?, None, None))
                }
                "user" => messages.push(Message::text(Role::User, text(message, i)?)),
                "assistant" => {
                    let requested = message.tool_calls.as_deref().unwrap_or_default();
                    if let Some(generated) = requested.first().and_then(|call| call.generated.as_ref())
                        && let Some(replayed) = self.replay(generated, message, &names)
                    {
                        calls.extend(
                            requested.iter().map(|call| (call.id.as_str(), call.function.name.as_str())),
                        );
                        messages.extend(replayed);
                        continue;
                    }
                    if let Some(reasoning) = message.reasoning() {
                        messages.push(Message::text(Role::Assistant, reasoning).on("analysis"));
                    }
                    let content = message.content.as_ref().map(|_| text(message, i)).transpose()?;
                    match content {
                        Some(content) if requested.is_empty() => {
                            messages.push(Message::text(Role::Assistant, content).on("final"));
                        }
                        Some(content) if !content.is_empty() => {
                            messages.push(Message::text(Role::Assistant, content).on("commentary"));
                        }
                        _ => {}
                    }
                    for call in requested {
                        calls.insert(&call.id, &call.function.name);
                        let arguments = match &call.function.arguments {
                            Value::String(text) => text.clone(),
                            Value::Null => String::new(),
                            object => object.to_string(),
                        };
                        let mut message = Message::text(Role::Assistant, arguments).on("commentary");
                        message.recipient = Some(format!("{FUNCTIONS}.{}", call.function.name));
                        message.content_type = Some("json".to_owned());
                        messages.push(message);
                    }
                }
                "tool" | "function" => {
                    let name = match (&message.tool_call_id, &message.name) {
                        (Some(id), _) => calls.get(id.as_str()).copied().ok_or_else(|| {
                            Error::invalid(field("tool_call_id"), "matches no earlier tool call")
                        })?,
                        (None, Some(name)) if message.role == "function" => name,
                        (None, _) => {
                            return Err(Error::invalid(
                                field("tool_call_id"),
                                "is required in a tool's message",
                            ));
                        }
                    };
                    let mut result = Message::text(Role::Tool, text(message, i)?).on("commentary");
                    result.name = Some(format!("{FUNCTIONS}.{name}"));
                    result.recipient = Some("assistant".to_owned());
                    messages.push(result);
                }
                other => {
                    let expected = "expected system, developer, user, assistant or tool, found ";
                    let found: String = other.chars().take(40).collect();
                    return Err(Error::invalid(field("role"), format!("{expected}{found:?}")));
                }
            }
        }
        Ok(messages)
    }
}

/// Drops the analysis before the last final message: the model never saw reasoning of finished turns. What follows it belongs
/// to a tool loop that still goes on. A training example keeps the reasoning of the turn that it teaches.
fn drop_old_reasoning(mut messages: Vec<Message>, training: bool) -> Vec<Message> {
    let considered = messages.len() - usize::from(training && !messages.is_empty());
    let is_final = |m: &Message| m.role == Role::Assistant && m.is_on("final");
    let last_final = messages[..considered].iter().rposition(is_final).unwrap_or(0);
    let mut index = 0;
    messages.retain(|message| {
        index += 1;
        index > last_final || !(message.role == Role::Assistant && message.is_on("analysis"))
    });
    messages
}

fn system_message(prompt: &ChatPrompt) -> Result<Message, Error> {
    let effort = prompt.reasoning_effort.as_deref().unwrap_or("medium");
    if !["low", "medium", "high"].contains(&effort) {
        let found: String = effort.chars().take(40).collect();
        return Err(Error::invalid(
            "reasoning_effort",
            format!("expected low, medium or high, found {found:?}"),
        ));
    }
    let mut tools = BTreeMap::new();
    for (i, name) in prompt.builtin_tools.iter().enumerate() {
        let known = builtin_tools().get_key_value(name.as_str());
        let (name, namespace) = known
            .ok_or_else(|| Error::invalid(format!("builtin_tools.{i}"), "expected browser or python"))?;
        tools.insert(name.clone(), namespace.clone());
    }
    let mut content = SystemContent {
        reasoning_effort: Some(effort.to_owned()),
        conversation_start_date: prompt.date.clone(),
        tools: (!tools.is_empty()).then_some(tools),
        ..SystemContent::default()
    };
    if let Some(identity) = &prompt.model_identity {
        content.model_identity = Some(identity.clone());
    }
    let mut message = Message::text(Role::System, "");
    message.content = vec![Content::SystemContent(content)];
    Ok(message)
}

/// The built-in tools, in the words that the model was trained with.
fn builtin_tools() -> &'static BTreeMap<String, ToolNamespace> {
    static TOOLS: OnceLock<BTreeMap<String, ToolNamespace>> = OnceLock::new();
    TOOLS.get_or_init(|| {
        serde_json::from_str(include_str!("../data/builtin_tools.json"))
            .expect("the built-in tools are valid")
    })
}

fn function_tools(tools: &[ChatTool]) -> BTreeMap<String, ToolNamespace> {
    let tools = tools
        .iter()
        .map(|tool| ToolDescription {
            name: tool.function.name.clone(),
            description: tool.function.description.clone().unwrap_or_default(),
            parameters: tool.function.parameters.clone().filter(|p| !p.is_null()),
        })
        .collect();
    let namespace = ToolNamespace { name: FUNCTIONS.to_owned(), description: None, tools };
    BTreeMap::from([(FUNCTIONS.to_owned(), namespace)])
}

fn developer_message(
    instructions: Option<String>,
    tools: Option<BTreeMap<String, ToolNamespace>>,
    response_format: Option<Box<ResponseFormat>>,
) -> Option<Message> {
    if instructions.is_none() && tools.is_none() && response_format.is_none() {
        return None;
    }
    let mut message = Message::text(Role::Developer, "");
    message.content = vec![Content::DeveloperContent { instructions, tools, response_format }];
    Some(message)
}

/// The text of a message, its parts joined.
fn text(message: &ChatMessage, index: usize) -> Result<String, Error> {
    match &message.content {
        None => Ok(String::new()),
        Some(MessageContent::Text(text)) => Ok(text.clone()),
        Some(MessageContent::Parts(parts)) => {
            let mut joined = String::new();
            for (j, part) in parts.iter().enumerate() {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
                let key = if kind == "refusal" { "refusal" } else { "text" };
                let known = matches!(kind, "text" | "input_text" | "output_text")
                    || (kind == "refusal" && message.role == "assistant");
                let text = part.get(key).and_then(Value::as_str).filter(|_| known).ok_or_else(|| {
                    let found: String = kind.chars().take(40).collect();
                    let message = format!("expected a part of type text, found {found:?}");
                    Error::invalid(format!("messages.{index}.content.{j}"), message)
                })?;
                joined += text;
            }
            Ok(joined)
        }
    }
}

fn yes() -> bool {
    true
}
