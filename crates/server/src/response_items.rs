//! The items of a response's input as the messages of a conversation (`serving.md` 8.2).

use std::collections::HashSet;
use std::sync::Arc;

use harmony::{ChatMessage, FunctionCall, MessageContent, ToolCallInput};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::chat_request::text;
use crate::error::ApiError;
use crate::identifier::identifier;
use crate::json::{Field, excerpt};

const MAX_PARTS: usize = 4096;
/// Of an item that is kept.
const MAX_ITEM_BYTES: usize = 4 << 20;

/// A conversation in the making.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    messages: Vec<ChatMessage>,
    /// What the assistant said last; more may belong to it.
    open: Option<ChatMessage>,
    calls: HashSet<String>,
}

impl Conversation {
    /// Adds a message of plain text.
    pub(crate) fn say(&mut self, role: &str, text: String) {
        self.flush();
        self.messages.push(ChatMessage::new(role, text));
    }

    /// Adds an item.
    pub(crate) fn add(&mut self, item: &Field<'_>) -> Result<(), ApiError> {
        let object = item.object(&[
            "type",
            "role",
            "content",
            "summary",
            "call_id",
            "name",
            "namespace",
            "arguments",
            "input",
            "output",
        ])?;
        let kind = object.field("type").map(|kind| kind.string()).transpose()?;
        match kind.as_deref().unwrap_or("message") {
            "message" => {
                let role = object.required("role")?;
                let role_name = role.string()?;
                let assistant = role_name == "assistant";
                if !assistant && !matches!(role_name.as_str(), "system" | "developer" | "user") {
                    let message = format!(
                        "{} must be one of system, developer, user, assistant, got {}.",
                        role.path(),
                        excerpt(&role_name)
                    );
                    return Err(role.error(message));
                }
                let content = text(&object.required("content")?, assistant)?;
                if assistant {
                    let said = |open: &ChatMessage| open.content.is_some() || open.tool_calls.is_some();
                    self.assistant(said).content = Some(MessageContent::Text(content));
                } else {
                    self.say(&role_name, content);
                }
            }
            "reasoning" => {
                let mut thoughts = String::new();
                if let Some(content) = object.field("content") {
                    for part in content.array(MAX_PARTS)? {
                        thoughts += &part.object(&["text"])?.required("text")?.string()?;
                    }
                }
                if !thoughts.is_empty() {
                    let open = self.assistant(|open| open.content.is_some() || open.tool_calls.is_some());
                    match &mut open.reasoning {
                        Some(earlier) => *earlier += &format!("\n{thoughts}"),
                        None => open.reasoning = Some(thoughts),
                    }
                }
            }
            kind @ ("function_call" | "custom_tool_call") => {
                let id = object.required("call_id")?.string()?;
                let mut name = object.required("name")?.string()?;
                if let Some(namespace) = object.string("namespace")? {
                    name = format!("{namespace}.{name}");
                }
                let arguments = if kind == "function_call" { "arguments" } else { "input" };
                let arguments = Value::String(object.required(arguments)?.string()?);
                self.calls.insert(id.clone());
                let function = FunctionCall { name, arguments };
                let open = self.assistant(|_| false);
                open.tool_calls.get_or_insert_default().push(ToolCallInput {
                    id,
                    function,
                    ..ToolCallInput::default()
                });
            }
            "function_call_output" | "custom_tool_call_output" => {
                let id = object.required("call_id")?;
                let id_text = id.string()?;
                if !self.calls.contains(&id_text) {
                    let message = format!("No earlier item calls a tool with the id {}.", excerpt(&id_text));
                    return Err(id.error(message));
                }
                let output = text(&object.required("output")?, false)?;
                self.flush();
                let result = ChatMessage { tool_call_id: Some(id_text), ..ChatMessage::new("tool", output) };
                self.messages.push(result);
            }
            other => {
                let message = format!("Items of type {} are not supported.", excerpt(other));
                return Err(item.error(message));
            }
        }
        Ok(())
    }

    /// The messages.
    pub(crate) fn finish(mut self) -> Vec<ChatMessage> {
        self.flush();
        self.messages
    }

    /// What the assistant says, a new message if `complete` says so of the open one.
    fn assistant(&mut self, complete: impl FnOnce(&ChatMessage) -> bool) -> &mut ChatMessage {
        if self.open.as_ref().is_some_and(complete) {
            self.flush();
        }
        self.open
            .get_or_insert_with(|| ChatMessage { role: "assistant".to_owned(), ..ChatMessage::default() })
    }

    fn flush(&mut self) {
        self.messages.extend(self.open.take());
    }
}

/// An item as it is kept.
#[derive(Debug)]
pub(crate) struct Item {
    /// What references call it.
    id: Option<String>,
    text: Box<RawValue>,
}

impl Item {
    pub(crate) fn new(id: Option<String>, text: Box<RawValue>) -> Arc<Item> {
        Arc::new(Item { id, text })
    }

    fn of(item: &Value) -> Arc<Item> {
        let text = RawValue::from_string(item.to_string()).expect("a value is JSON");
        Item::new(item["id"].as_str().map(str::to_owned), text)
    }

    pub(crate) fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    pub(crate) fn text(&self) -> &RawValue {
        &self.text
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of::<Item>() + self.id.as_ref().map_or(0, String::len) + self.text.get().len()
    }
}

impl Serialize for Item {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.text.serialize(serializer)
    }
}

/// The id of the item that an item stands for, if it is a reference.
pub(crate) fn reference(item: &Field<'_>) -> Result<Option<String>, ApiError> {
    let object = item.object(&["type", "id"])?;
    match object.field("type").map(|kind| kind.string()).transpose()? {
        Some(kind) if kind == "item_reference" => object.required("id")?.string().map(Some),
        _ => Ok(None),
    }
}

/// An item of a request: with an id, and a message with its type and with parts.
pub(crate) fn kept(item: &Field<'_>) -> Result<Arc<Item>, ApiError> {
    let mut value = item.value(MAX_ITEM_BYTES)?;
    if value.get("type").is_none_or(Value::is_null) {
        value["type"] = "message".into();
    }
    if value["type"] == "message" && value["content"].is_string() {
        let text = value["content"].take();
        value["content"] = match value["role"] == "assistant" {
            true => json!([{"type": "output_text", "text": text, "annotations": []}]),
            false => json!([{"type": "input_text", "text": text}]),
        };
    }
    if value.get("id").is_none_or(Value::is_null) {
        let prefix = match value.get("type").and_then(Value::as_str) {
            Some("reasoning") => "rs",
            Some("function_call") => "fc",
            Some("custom_tool_call") => "ctc",
            Some("function_call_output" | "custom_tool_call_output") => "fco",
            _ => "msg",
        };
        value["id"] = format!("{prefix}_{}", identifier()).into();
    }
    Ok(Item::of(&value))
}

/// A text of the user.
pub(crate) fn kept_text(text: &str) -> Arc<Item> {
    let id = format!("msg_{}", identifier());
    let content = json!([{"type": "input_text", "text": text}]);
    Item::of(&json!({"type": "message", "role": "user", "content": content, "id": id}))
}
