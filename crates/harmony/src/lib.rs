//! The Harmony chat format: messages to tokens and generated tokens to messages.
//!
//! Rendering follows openai-harmony 0.0.8 byte for byte (`render.rs`, `schema.rs`); API requests become Harmony messages in
//! `chat.rs`. The parser (`parser.rs`) is total: every token sequence has a result, and nothing written as content is lost.
#![forbid(unsafe_code)]

mod chat;
mod guard;
mod header;
mod message;
mod parser;
mod render;
mod replay;
mod schema;

use std::sync::Arc;

use tokenizer::Tokenizer;

pub use chat::{
    ChatMessage, ChatPrompt, ChatTool, Document, FunctionCall, FunctionTool, MessageContent, ToolCallInput,
};
pub use guard::{Guard, Place};
pub use message::{
    ChannelConfig, Content, Message, Mode, RenderOptions, ResponseFormat, Role, SystemContent,
    ToolDescription, ToolNamespace,
};
pub use parser::{Delta, ParsedMessage, Parser, REPAIRS, ToolCall, Turn};

/// What cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The vocabulary has no such token.
    #[error("the tokenizer has no special token {0}, which Harmony needs")]
    Vocabulary(&'static str),
    /// A field of the input breaks a rule.
    #[error("{field}: {message}")]
    Invalid {
        /// Path of the field, such as `messages.3.tool_call_id`.
        field: String,
        /// The rule, and what was found.
        message: String,
    },
}

impl Error {
    fn invalid(field: impl Into<String>, message: impl Into<String>) -> Error {
        Error::Invalid { field: field.into(), message: message.into() }
    }
}

/// A tokenizer with the control tokens of the format.
#[derive(Clone)]
pub struct Harmony {
    tokenizer: Arc<Tokenizer>,
    control: Control,
}

/// The ids of the control tokens; they differ between vocabularies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Control {
    start: u32,
    end: u32,
    message: u32,
    channel: u32,
    constrain: u32,
    call: u32,
    r#return: u32,
    end_of_text: u32,
}

impl Harmony {
    /// The format over a vocabulary that has its control tokens.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Result<Harmony, Error> {
        let id = |spelling| tokenizer.special(spelling).ok_or(Error::Vocabulary(spelling));
        let control = Control {
            start: id("<|start|>")?,
            end: id("<|end|>")?,
            message: id("<|message|>")?,
            channel: id("<|channel|>")?,
            constrain: id("<|constrain|>")?,
            call: id("<|call|>")?,
            r#return: id("<|return|>")?,
            end_of_text: id("<|endoftext|>")?,
        };
        Ok(Harmony { tokenizer, control })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// `<|return|>`, `<|call|>` and `<|endoftext|>`: the tokens that end a generation.
    pub fn stop_ids(&self) -> [u32; 3] {
        [self.control.r#return, self.control.call, self.control.end_of_text]
    }

    /// What ends a message of reasoning and begins the answer.
    pub fn conclusion(&self) -> Vec<u32> {
        self.tokenizer.encode_with_special("<|end|><|start|>assistant<|channel|>final<|message|>")
    }

    /// What begins an answer without reasoning, after `<|start|>assistant`.
    pub fn answer_header(&self) -> Vec<u32> {
        self.tokenizer.encode_with_special("<|channel|>final<|message|>")
    }

    /// A parser of what is generated after `<|start|>assistant`; `tools` are the names of the declared functions.
    pub fn parser(&self, tools: impl Into<Arc<[String]>>) -> Parser {
        Parser::new(self, tools.into())
    }
}
