//! Harmony messages, in the JSON form of openai-harmony.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Identity, date, reasoning effort, channels.
    System,
    /// Instructions and function tools.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// A tool's result; the message's name says which.
    Tool,
}

impl Role {
    /// The word in a header.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::Developer => "developer",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }

    pub(crate) const ALL: [Role; 5] =
        [Role::System, Role::Developer, Role::User, Role::Assistant, Role::Tool];
}

/// One message.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// Written after the role; of a tool, instead of it.
    #[serde(default)]
    pub name: Option<String>,
    /// Whom it is for.
    #[serde(default)]
    pub recipient: Option<String>,
    /// `analysis`, `commentary` or `final`.
    #[serde(default)]
    pub channel: Option<String>,
    /// Such as `json` or `<|constrain|>json`.
    #[serde(default)]
    pub content_type: Option<String>,
    /// The parts; each is encoded on its own.
    #[serde(deserialize_with = "parts_or_text")]
    pub content: Vec<Content>,
    /// The tokens after the role, if the message is to be written as it was generated.
    #[serde(skip)]
    pub(crate) generated: Option<Vec<u32>>,
}

impl Message {
    /// A message of one text.
    pub fn text(role: Role, text: impl Into<String>) -> Message {
        Message {
            role,
            name: None,
            recipient: None,
            channel: None,
            content_type: None,
            content: vec![Content::Text { text: text.into() }],
            generated: None,
        }
    }

    pub(crate) fn on(mut self, channel: &str) -> Message {
        self.channel = Some(channel.to_owned());
        self
    }

    pub(crate) fn is_on(&self, channel: &str) -> bool {
        self.channel.as_deref() == Some(channel)
    }
}

/// One part of a message.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Content {
    /// Plain text.
    Text {
        /// The text, kept exactly.
        text: String,
    },
    /// The sections of a system message.
    SystemContent(SystemContent),
    /// The sections of a developer message.
    DeveloperContent {
        /// Instructions; `Some("")` still gives the heading.
        #[serde(default)]
        instructions: Option<String>,
        /// Tools by namespace.
        #[serde(default)]
        tools: Option<BTreeMap<String, ToolNamespace>>,
        /// The form of the answer.
        #[serde(default)]
        response_format: Option<Box<ResponseFormat>>,
    },
}

/// The sections of a system message.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct SystemContent {
    /// First line.
    pub model_identity: Option<String>,
    /// `Low`, `Medium` or `High`, in any case.
    pub reasoning_effort: Option<String>,
    /// `YYYY-MM`
    pub knowledge_cutoff: Option<String>,
    /// `YYYY-MM-DD`
    pub conversation_start_date: Option<String>,
    /// The channels line.
    pub channel_config: Option<ChannelConfig>,
    /// Built-in tools by namespace.
    pub tools: Option<BTreeMap<String, ToolNamespace>>,
}

/// What the model was trained with; fields that are missing have these values.
impl Default for SystemContent {
    fn default() -> SystemContent {
        let channels = ["analysis", "commentary", "final"].map(str::to_owned).to_vec();
        SystemContent {
            model_identity: Some("You are ChatGPT, a large language model trained by OpenAI.".to_owned()),
            reasoning_effort: Some("medium".to_owned()),
            knowledge_cutoff: Some("2024-06".to_owned()),
            conversation_start_date: None,
            channel_config: Some(ChannelConfig { valid_channels: channels, channel_required: true }),
            tools: None,
        }
    }
}

/// Which channels there are.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct ChannelConfig {
    /// Their names.
    pub valid_channels: Vec<String>,
    /// Whether each message must name one.
    #[serde(default)]
    pub channel_required: bool,
}

/// A form that the answer must have.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct ResponseFormat {
    /// Its name.
    pub name: String,
    /// What it is for.
    #[serde(default)]
    pub description: Option<String>,
    /// A JSON Schema.
    pub schema: Value,
}

/// Tools that share a prefix.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct ToolNamespace {
    /// The prefix.
    pub name: String,
    /// What they are for.
    #[serde(default)]
    pub description: Option<String>,
    /// The functions.
    #[serde(default)]
    pub tools: Vec<ToolDescription>,
}

/// One function.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct ToolDescription {
    /// Its name.
    pub name: String,
    /// What it does.
    #[serde(default)]
    pub description: String,
    /// JSON Schema of its argument; the order of properties counts.
    #[serde(default)]
    pub parameters: Option<Value>,
}

/// How a conversation is rendered.
#[derive(Debug, Clone, PartialEq)]
pub struct RenderOptions {
    /// What follows the last message.
    pub mode: Mode,
    /// Leave out analysis before the first final message when the last assistant message is final.
    pub auto_drop_analysis: bool,
}

impl Default for RenderOptions {
    fn default() -> RenderOptions {
        RenderOptions { mode: Mode::Completion(Role::Assistant), auto_drop_analysis: true }
    }
}

/// What follows the last message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The start of the next message, by this role.
    Completion(Role),
    /// Nothing.
    Conversation,
    /// Nothing, and a final answer ends with `<|return|>`.
    Training,
}

fn parts_or_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Content>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Text(String),
        Parts(Vec<Content>),
    }
    Ok(match Either::deserialize(deserializer)? {
        Either::Text(text) => vec![Content::Text { text }],
        Either::Parts(parts) => parts,
    })
}
