//! The total streaming parser: any token sequence gives messages, none is an error, and no text is lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use tokenizer::{Detokenizer, Tokenizer};

use crate::header::{Fields, HEADER_TOKENS, Header};
use crate::message::Role;
use crate::{Control, Harmony};

/// The repair of a header that no `<|message|>` ended.
const MISSING_MESSAGE: &str = "missing_message";

/// What [`Parser::repairs`] counts.
pub const REPAIRS: [&str; 24] = [
    "channel_without_start",
    "constrain_in_content",
    "double_start",
    "empty_recipient",
    "foreign_role",
    "header_noise",
    "message_in_content",
    "message_without_header",
    "missing_channel",
    "missing_message",
    "missing_role",
    "misspelt_channel",
    "recipient_without_to",
    "repeated_role",
    "several_channels",
    "several_constrains",
    "several_recipients",
    "start_in_content",
    "surplus_stop",
    "text_between_messages",
    "undeclared_recipient",
    "unknown_channel",
    "unknown_role",
    "unknown_token",
];

/// What became certain of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// More reasoning.
    Reasoning(String),
    /// More of the answer.
    Content(String),
    /// A tool call begins.
    CallStart {
        /// Counts the calls of the turn from 0.
        index: usize,
        /// The function, without its namespace.
        name: String,
    },
    /// More of a call's arguments.
    CallArguments {
        /// Which call.
        index: usize,
        /// The piece.
        text: String,
    },
    /// A message that brought any of the above ended.
    End,
}

/// A finished message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ParsedMessage {
    /// Who spoke.
    pub role: &'static str,
    /// On which channel.
    pub channel: Option<String>,
    /// To whom.
    pub recipient: Option<String>,
    /// The type in the header.
    pub content_type: Option<String>,
    /// What was said.
    pub text: String,
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ToolCall {
    /// The function, without its namespace.
    pub name: String,
    /// The arguments as written.
    pub arguments: String,
}

/// The fields of a turn.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Turn {
    /// Reasoning, and what is for nobody else.
    pub reasoning: Option<String>,
    /// The answer.
    pub content: Option<String>,
    /// Calls of tools.
    pub tool_calls: Vec<ToolCall>,
}

impl Turn {
    /// The fields of a whole turn.
    pub fn collect<'d>(deltas: impl IntoIterator<Item = &'d Delta>) -> Turn {
        let mut turn = Turn::default();
        deltas.into_iter().for_each(|delta| turn.apply(delta));
        turn.finish()
    }

    /// Adds a delta.
    pub fn apply(&mut self, delta: &Delta) {
        match delta {
            Delta::Reasoning(text) => self.reasoning.get_or_insert_default().push_str(text),
            Delta::Content(text) => self.content.get_or_insert_default().push_str(text),
            Delta::CallStart { name, .. } => {
                self.tool_calls.push(ToolCall { name: name.clone(), arguments: String::new() });
            }
            Delta::CallArguments { index, text } => {
                if let Some(call) = self.tool_calls.get_mut(*index) {
                    call.arguments.push_str(text);
                }
            }
            Delta::End => {}
        }
    }

    /// The end: a turn without any text or call has the answer "".
    #[must_use]
    pub fn finish(mut self) -> Turn {
        if self.reasoning.is_none() && self.tool_calls.is_empty() {
            self.content.get_or_insert_default();
        }
        self
    }
}

/// Reads what is generated after `<|start|>assistant`, token by token. Its memory is the text of the messages.
pub struct Parser {
    tokenizer: Arc<Tokenizer>,
    control: Control,
    tools: Arc<[String]>,
    state: State,
    messages: Vec<ParsedMessage>,
    calls: usize,
    /// Whether a message has put text into the field.
    has_reasoning: bool,
    has_content: bool,
    reasoning_tokens: usize,
    repairs: BTreeMap<&'static str, u64>,
}

enum State {
    Header(Header),
    Content(Open),
    Between,
}

/// A message whose content is being read.
struct Open {
    message: ParsedMessage,
    field: Field,
    detokenizer: Detokenizer,
    /// Whether text of this message was emitted.
    begun: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    Reasoning,
    Content,
    Call(usize),
}

impl Parser {
    pub(crate) fn new(harmony: &Harmony, tools: Arc<[String]>) -> Parser {
        Parser {
            tokenizer: Arc::clone(&harmony.tokenizer),
            control: harmony.control,
            tools,
            state: State::Header(Header::new(true)),
            messages: Vec::new(),
            calls: 0,
            has_reasoning: false,
            has_content: false,
            reasoning_tokens: 0,
            repairs: BTreeMap::new(),
        }
    }

    /// Takes the next token.
    pub fn push(&mut self, token: u32) -> Vec<Delta> {
        let control = self.control;
        let mut deltas = Vec::new();
        if token == control.start {
            match &self.state {
                State::Header(header) if header.is_blank() => {
                    self.repair("double_start");
                    self.state = State::Between;
                }
                State::Content(_) => self.repair("start_in_content"),
                State::Header(_) | State::Between => {}
            }
            self.close(true, &mut deltas);
            self.state = State::Header(Header::new(false));
        } else if token == control.channel {
            match &mut self.state {
                State::Header(header) => header.channel(),
                State::Content(_) | State::Between => {
                    self.repair("channel_without_start");
                    self.close(true, &mut deltas);
                    let mut header = Header::new(true);
                    header.channel();
                    self.state = State::Header(header);
                }
            }
        } else if token == control.message {
            match std::mem::replace(&mut self.state, State::Between) {
                State::Header(header) => {
                    let fields = header.read(&self.tools, true);
                    self.open(fields, &mut deltas);
                }
                State::Content(open) => {
                    self.repair("message_in_content");
                    self.state = State::Content(open);
                }
                State::Between => {
                    let mut fields = Header::new(true).read(&self.tools, true);
                    fields.repairs = vec!["message_without_header"];
                    self.open(fields, &mut deltas);
                }
            }
        } else if token == control.constrain {
            match &mut self.state {
                State::Header(header) => header.constrain(),
                State::Content(_) | State::Between => self.repair("constrain_in_content"),
            }
        } else if [control.end, control.r#return, control.call, control.end_of_text].contains(&token) {
            match &self.state {
                State::Header(header) if header.is_blank() => {
                    self.repair("surplus_stop");
                    self.state = State::Between;
                }
                State::Between => self.repair("surplus_stop"),
                State::Header(_) | State::Content(_) => {}
            }
            self.close(true, &mut deltas);
        } else {
            self.push_text(token, &mut deltas);
        }
        deltas
    }

    /// The end of the stream. Calling it again does nothing.
    pub fn finish(&mut self) -> Vec<Delta> {
        let mut deltas = Vec::new();
        self.close(false, &mut deltas);
        deltas
    }

    /// The finished messages.
    pub fn messages(&self) -> &[ParsedMessage] {
        &self.messages
    }

    /// How often malformed output was mended, by kind.
    pub fn repairs(&self) -> &BTreeMap<&'static str, u64> {
        &self.repairs
    }

    /// Whether the message that is being read goes to reasoning.
    pub fn is_reasoning(&self) -> bool {
        matches!(&self.state, State::Content(open) if open.field == Field::Reasoning)
    }

    /// Whether the message that is being read is the answer, not what is said before calls.
    pub fn is_final(&self) -> bool {
        let preamble = |message: &ParsedMessage| message.channel.as_deref() == Some("commentary");
        matches!(&self.state, State::Content(open) if open.field == Field::Content && !preamble(&open.message))
    }

    /// Whether a message's content is being read.
    pub fn is_content(&self) -> bool {
        matches!(&self.state, State::Content(_))
    }

    /// Whether the content that is being read ends inside a character.
    pub fn is_inside_character(&self) -> bool {
        matches!(&self.state, State::Content(open) if open.detokenizer.is_inside_character())
    }

    /// Text tokens of what went to reasoning.
    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    fn push_text(&mut self, token: u32, deltas: &mut Vec<Delta>) {
        let tokenizer = Arc::clone(&self.tokenizer);
        let Some(bytes) = tokenizer.token_bytes(token).filter(|_| !tokenizer.is_special(token)) else {
            self.repair("unknown_token");
            return;
        };
        if matches!(self.state, State::Between) {
            self.repair("text_between_messages");
            self.state = State::Header(Header::new(true));
        }
        match &mut self.state {
            State::Header(header) => {
                header.text(bytes);
                if header.text_tokens >= HEADER_TOKENS {
                    let pending = header.take_incomplete();
                    let tokens = header.text_tokens;
                    let mut fields = header.read(&self.tools, false);
                    let text = std::mem::take(&mut fields.rest);
                    fields.repairs = vec![MISSING_MESSAGE];
                    self.open(fields, deltas);
                    self.add_text(text.as_bytes(), tokens, deltas);
                    self.add_text(&pending, 0, deltas);
                }
            }
            State::Content(_) => self.add_text(bytes, 1, deltas),
            State::Between => {}
        }
    }

    /// Appends bytes to the open message.
    fn add_text(&mut self, bytes: &[u8], tokens: usize, deltas: &mut Vec<Delta>) {
        let State::Content(open) = &mut self.state else { return };
        if open.field == Field::Reasoning {
            self.reasoning_tokens += tokens;
        }
        let text = open.detokenizer.push(bytes);
        self.emit(text, deltas);
    }

    fn emit(&mut self, text: String, deltas: &mut Vec<Delta>) {
        let State::Content(open) = &mut self.state else { return };
        if text.is_empty() {
            return;
        }
        open.message.text.push_str(&text);
        // Texts of several messages in one field are joined by a newline.
        let join = |has: &mut bool, begun: bool, text: String| {
            let joined = if *has && !begun { format!("\n{text}") } else { text };
            *has = true;
            joined
        };
        deltas.push(match open.field {
            Field::Reasoning => Delta::Reasoning(join(&mut self.has_reasoning, open.begun, text)),
            Field::Content => Delta::Content(join(&mut self.has_content, open.begun, text)),
            Field::Call(index) => Delta::CallArguments { index, text },
        });
        open.begun = true;
    }

    /// Begins the content of a message.
    fn open(&mut self, fields: Fields, deltas: &mut Vec<Delta>) {
        fields.repairs.iter().for_each(|kind| self.repair(kind));
        let field = self.field(&fields, deltas);
        self.state = State::Content(Open {
            message: ParsedMessage {
                role: fields.role.name(),
                channel: fields.channel,
                recipient: fields.recipient,
                content_type: fields.content_type,
                text: String::new(),
            },
            field,
            detokenizer: Detokenizer::new(),
            begun: false,
        });
    }

    /// Which field a message goes to; the first rule that applies.
    fn field(&mut self, fields: &Fields, deltas: &mut Vec<Delta>) -> Field {
        if fields.role != Role::Assistant {
            self.repair("foreign_role");
            return Field::Reasoning;
        }
        let recipient = fields.recipient.as_deref().filter(|r| !["assistant", "user", "all"].contains(r));
        if let Some(recipient) = recipient {
            let name = recipient.strip_prefix("functions.").filter(|name| !name.is_empty());
            let declared = self.tools.iter().any(|tool| tool == recipient);
            let Some(name) = name.or_else(|| declared.then_some(recipient)) else {
                self.repair("undeclared_recipient");
                return Field::Reasoning;
            };
            let index = self.calls;
            self.calls += 1;
            deltas.push(Delta::CallStart { index, name: name.to_owned() });
            return Field::Call(index);
        }
        if fields.channel.as_deref() == Some("analysis") { Field::Reasoning } else { Field::Content }
    }

    /// Ends whatever is open: a message, or a header that never reached its content, whose remaining words are text.
    /// `by_token` is false at the end of the stream, which may cut a good header off.
    fn close(&mut self, by_token: bool, deltas: &mut Vec<Delta>) {
        if let State::Header(header) = &self.state {
            let tokens = header.text_tokens;
            let mut fields = header.read(&self.tools, false);
            let text = std::mem::take(&mut fields.rest).trim().to_owned();
            fields.repairs = vec![MISSING_MESSAGE];
            if text.is_empty() {
                if by_token && !header.is_blank() {
                    self.repair(MISSING_MESSAGE);
                }
                self.state = State::Between;
                return;
            }
            self.open(fields, deltas);
            self.add_text(text.as_bytes(), tokens, deltas);
        }
        let rest = match &mut self.state {
            State::Content(open) => open.detokenizer.finish(),
            State::Header(_) | State::Between => String::new(),
        };
        self.emit(rest, deltas);
        if let State::Content(open) = std::mem::replace(&mut self.state, State::Between) {
            if open.begun || matches!(open.field, Field::Call(_)) {
                deltas.push(Delta::End);
            }
            self.messages.push(open.message);
        }
    }

    fn repair(&mut self, kind: &'static str) {
        *self.repairs.entry(kind).or_default() += 1;
    }
}
