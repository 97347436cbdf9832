//! A turn's events as the items of a response, whole or as a stream of events (`serving.md` 8.3, 8.4). Both go through
//! [`ResponseAnswer::apply`], so that the events put together are the whole.

use std::sync::Arc;

use axum::body::Bytes;
use engine::{Event, FinishReason};
use harmony::{Delta, Harmony};
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::answer::{ChatLogprob, Identity, TokenNames, Usage, raw};
use crate::chat_answer::call_id;
use crate::error::{ApiError, ErrorStyle};
use crate::identifier::identifier;
use crate::memory::Record;
use crate::response_items::Item;
use crate::response_request::ResponseRequest;
use crate::response_store::Keep;
use crate::sorter::{Place, Sorter, Stretch};
use crate::sse::Encoder;
use crate::turn::Choice;
use crate::visible::{Rules, Visible};

/// A response in the making.
pub(crate) struct ResponseAnswer {
    harmony: Arc<Harmony>,
    identity: Identity,
    rules: Rules,
    /// The functions that may be called; those whose argument is a text; those in a namespace.
    tools: Arc<[String]>,
    free_tools: Vec<String>,
    namespaced_tools: Vec<(String, String)>,
    logprobs: bool,
    /// What is repeated of the request.
    echo: Value,
    /// Takes the response when it is complete.
    keep: Option<Keep>,
    /// All events, or those since [`ResponseAnswer::take_events`]; for a response that is kept.
    recorded: Option<Vec<Bytes>>,
    /// Counts the turn's reasoning, and remembers the turn if it ends with a call.
    record: Option<Record>,
    prompt_tokens: usize,
    cached_tokens: usize,
    completion_tokens: usize,
    reasoning_tokens: Option<usize>,
    visible: Visible,
    /// Whether reasoning and answer have text of earlier messages, from which Harmony's parser separates more by a newline.
    has: Fields,
    items: Vec<Arc<Item>>,
    open: Option<Open>,
    /// Log-probabilities of the answer's tokens whose text has not come yet.
    pending: Vec<Box<RawValue>>,
    /// Tells where tokens belong, if that matters.
    sorter: Option<Sorter>,
    finish: Option<FinishReason>,
    /// Where events go; nowhere if the answer is not streamed.
    streamed: bool,
    sequence: u64,
}

#[derive(Default)]
struct Fields {
    reasoning: bool,
    content: bool,
}

/// The item that is being written. Log-probabilities are JSON already, which takes a tenth of the memory of a tree.
struct Open {
    kind: Kind,
    id: String,
    text: String,
    logprobs: Vec<Box<RawValue>>,
    /// Its message is over; whether it was cut off is not known yet.
    ended: bool,
}

enum Kind {
    Reasoning,
    Message,
    Call { call_id: String, name: String, namespace: Option<String>, free: bool },
}

impl Kind {
    /// The part of the kinds that have one, with this text.
    fn part<'a>(&self, text: &'a str, logprobs: &'a [Box<RawValue>]) -> Option<Part<'a>> {
        match self {
            Kind::Reasoning => Some(Part::ReasoningText { text }),
            Kind::Message => Some(Part::OutputText { text, annotations: [], logprobs }),
            Kind::Call { .. } => None,
        }
    }

    /// Names of the events that bring the text and end it.
    fn events(&self) -> (&'static str, &'static str) {
        match self {
            Kind::Reasoning => ("response.reasoning_text.delta", "response.reasoning_text.done"),
            Kind::Message => ("response.output_text.delta", "response.output_text.done"),
            Kind::Call { free: false, .. } => {
                ("response.function_call_arguments.delta", "response.function_call_arguments.done")
            }
            Kind::Call { free: true, .. } => {
                ("response.custom_tool_call_input.delta", "response.custom_tool_call_input.done")
            }
        }
    }
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part<'a> {
    ReasoningText { text: &'a str },
    OutputText { text: &'a str, annotations: [(); 0], logprobs: &'a [Box<RawValue>] },
}

/// An item as it is shown.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Shown<'a> {
    Reasoning {
        id: &'a str,
        summary: [(); 0],
        #[serde(skip_serializing_if = "Option::is_none")]
        content: Option<[Part<'a>; 1]>,
        /// Null, where it is there.
        #[serde(skip_serializing_if = "Option::is_none")]
        encrypted_content: Option<()>,
        status: &'a str,
    },
    Message {
        id: &'a str,
        role: &'static str,
        status: &'a str,
        content: Vec<Part<'a>>,
    },
    FunctionCall {
        id: &'a str,
        call_id: &'a str,
        name: &'a str,
        arguments: &'a str,
        status: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        namespace: Option<&'a str>,
    },
    CustomToolCall {
        id: &'a str,
        call_id: &'a str,
        name: &'a str,
        input: &'a str,
        status: &'a str,
    },
}

/// What an event says of an item's text.
#[derive(Default, Serialize)]
struct Piece<'a> {
    item_id: &'a str,
    output_index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    part: Option<Part<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [Box<RawValue>]>,
}

#[derive(Serialize)]
struct ItemEvent<I> {
    output_index: usize,
    item: I,
}

#[derive(Serialize)]
struct ResponseEvent<'a> {
    response: &'a RawValue,
}

#[derive(Serialize)]
struct Numbered<'a, E> {
    r#type: &'a str,
    sequence_number: u64,
    #[serde(flatten)]
    event: E,
}

/// The response object.
#[derive(Serialize)]
struct Response<'a> {
    id: &'a str,
    object: &'static str,
    created_at: u64,
    status: &'a str,
    error: Option<Value>,
    incomplete_details: Option<Value>,
    model: &'a str,
    output: Vec<&'a Item>,
    #[serde(flatten)]
    echo: &'a Value,
    usage: Option<Value>,
}

impl Open {
    fn new(kind: Kind) -> Open {
        let prefix = match kind {
            Kind::Reasoning => "rs",
            Kind::Message => "msg",
            Kind::Call { free: false, .. } => "fc",
            Kind::Call { free: true, .. } => "ctc",
        };
        Open {
            kind,
            id: format!("{prefix}_{}", identifier()),
            text: String::new(),
            logprobs: Vec::new(),
            ended: false,
        }
    }

    /// The item as it is shown; empty when it begins.
    fn shown<'a>(&'a self, status: &'a str) -> Shown<'a> {
        let (id, text) = (&self.id, &self.text);
        let part = self.kind.part(text, &self.logprobs).filter(|_| status != "in_progress");
        match &self.kind {
            Kind::Reasoning => Shown::Reasoning {
                id,
                summary: [],
                encrypted_content: part.is_some().then_some(()),
                content: part.map(|part| [part]),
                status,
            },
            Kind::Message => {
                Shown::Message { id, role: "assistant", status, content: part.into_iter().collect() }
            }
            Kind::Call { call_id, name, namespace, free: false } => Shown::FunctionCall {
                id,
                call_id,
                name,
                arguments: text,
                status,
                namespace: namespace.as_deref(),
            },
            Kind::Call { call_id, name, free: true, .. } => {
                Shown::CustomToolCall { id, call_id, name, input: text, status }
            }
        }
    }

    /// An event of the item, which has this index.
    fn piece(&self, index: usize) -> Piece<'_> {
        let content_index = match self.kind {
            Kind::Call { .. } => None,
            _ => Some(0),
        };
        Piece { item_id: &self.id, output_index: index, content_index, ..Piece::default() }
    }
}

impl ResponseAnswer {
    pub(crate) fn new(
        harmony: Arc<Harmony>,
        identity: Identity,
        request: &mut ResponseRequest,
        prompt_tokens: usize,
        keep: Option<Keep>,
        record: Record,
    ) -> ResponseAnswer {
        let mut echo = request.echo.take();
        // What is said is what is done.
        echo["store"] = keep.is_some().into();
        let rules = Rules {
            calls_allowed: request.choice != Choice::None,
            max_calls: request.max_calls,
            include_reasoning: request.include_reasoning,
        };
        let sorter = || Sorter::new(harmony.tokenizer(), record.parser(&harmony, &request.tools));
        let sorter = (request.logprobs || rules.limit_calls()).then(sorter);
        ResponseAnswer {
            harmony,
            identity,
            rules,
            tools: Arc::clone(&request.tools),
            free_tools: std::mem::take(&mut request.free_tools),
            namespaced_tools: std::mem::take(&mut request.namespaced_tools),
            logprobs: request.logprobs,
            echo,
            recorded: keep.is_some().then(Vec::new),
            keep,
            record: Some(record),
            prompt_tokens,
            cached_tokens: 0,
            completion_tokens: 0,
            reasoning_tokens: None,
            visible: Visible::default(),
            has: Fields::default(),
            items: Vec::new(),
            open: None,
            pending: Vec::new(),
            sorter,
            finish: None,
            streamed: request.common.stream.is_some(),
            sequence: 0,
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage::new(self.prompt_tokens, self.cached_tokens, self.completion_tokens, self.reasoning_tokens)
    }

    /// Takes an event; false once nothing more can change.
    pub(crate) fn apply(&mut self, event: Event, out: &mut Vec<u8>) -> bool {
        match event {
            Event::Started { cached_tokens, .. } => self.cached_tokens = cached_tokens,
            Event::Tokens { token_ids, deltas, logprobs, .. } if self.finish.is_none() => {
                let event = Stretch { token_ids, logprobs, deltas, ..Stretch::default() };
                let stretches = match &mut self.sorter {
                    Some(sorter) => sorter.split(event),
                    None => vec![event],
                };
                for stretch in stretches {
                    if self.visible.is_over {
                        self.finish = Some(FinishReason::ToolCalls);
                        self.count_reasoning();
                        break;
                    }
                    self.add(stretch, out);
                }
            }
            Event::Finished { reason, completion_tokens, reasoning_tokens, .. } if self.finish.is_none() => {
                self.completion_tokens = completion_tokens;
                self.reasoning_tokens = Some(reasoning_tokens);
                self.finish = Some(reason);
            }
            _ => {}
        }
        self.finish.is_none()
    }

    /// The whole response, which is kept if it is to be.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let response = Box::<str>::from(self.complete(&mut Vec::new()));
        String::from(response).into_bytes()
    }

    /// The response goes on without its client: as it is before its beginning, and its place, if it has one.
    pub(crate) fn leave(&mut self) -> (Box<RawValue>, Option<Keep>) {
        self.streamed = false;
        (self.response("queued", None), self.keep.take())
    }

    /// The events since the last call, of a response that is kept.
    pub(crate) fn take_events(&mut self) -> Vec<Bytes> {
        self.recorded.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Items that are complete.
    pub(crate) fn items(&self) -> &[Arc<Item>] {
        &self.items
    }

    /// Ends a response that will not be complete: by an error, or else because somebody wanted it so. It is kept if it is to be.
    pub(crate) fn cut_short(&mut self, error: Option<&ApiError>, out: &mut Vec<u8>) -> Box<RawValue> {
        self.close("incomplete", out);
        let (status, kind) = match error {
            Some(_) => ("failed", "response.failed"),
            None => ("cancelled", "response.incomplete"),
        };
        if self.reasoning_tokens.is_none() {
            self.count_reasoning();
        }
        let response = self.response(status, error);
        self.end_with(kind, &response, out);
        response
    }

    /// Counts what the engine will not.
    fn count_reasoning(&mut self) {
        let count = |record: &Record| record.reasoning_tokens(&self.harmony, &self.tools);
        self.reasoning_tokens = self.record.as_ref().map(count);
    }

    fn add(&mut self, stretch: Stretch, out: &mut Vec<u8>) {
        self.completion_tokens += stretch.token_ids.len();
        self.record.iter_mut().for_each(|record| record.push(&stretch.token_ids));
        // What went on after it was not cut off.
        if self.open.as_ref().is_some_and(|open| open.ended) {
            self.close("completed", out);
        }
        if self.logprobs {
            let names = TokenNames { tokenizer: self.harmony.tokenizer(), as_ids: false };
            let sorted = stretch.logprobs.iter().zip(&stretch.places);
            let answers = sorted.filter(|(_, place)| matches!(place, Place::Preamble | Place::Final));
            self.pending.extend(answers.map(|(entry, _)| raw(&ChatLogprob::new(entry, names))));
        }
        for delta in stretch.deltas {
            match self.visible.show(delta, &self.rules) {
                None => {}
                Some(Delta::Reasoning(text)) => {
                    let joined = std::mem::replace(&mut self.has.reasoning, true);
                    self.add_text(Kind::Reasoning, &text, joined, out);
                }
                Some(Delta::Content(text)) => {
                    let joined = std::mem::replace(&mut self.has.content, true);
                    self.add_text(Kind::Message, &text, joined, out);
                }
                Some(Delta::CallStart { name, .. }) => {
                    self.close("completed", out);
                    let free = self.free_tools.contains(&name);
                    let declared =
                        |(namespace, inner): &&(String, String)| name == format!("{namespace}.{inner}");
                    let (namespace, name) = match self.namespaced_tools.iter().find(declared) {
                        Some((namespace, inner)) => (Some(namespace.clone()), inner.clone()),
                        None => (None, name),
                    };
                    let call_id = call_id();
                    self.record.iter_mut().for_each(|record| record.called(&call_id));
                    self.begin(Kind::Call { call_id, name, namespace, free }, out);
                }
                Some(Delta::CallArguments { text, .. }) => self.write(&text, out),
                Some(Delta::End) => {
                    if let Some(open) = &mut self.open {
                        open.ended = true;
                    }
                }
            }
        }
    }

    /// Adds text to the open item of this kind, or to a new one. `joined`: there was a message for this field before.
    fn add_text(&mut self, kind: Kind, text: &str, joined: bool, out: &mut Vec<u8>) {
        let same = |open: &Open| std::mem::discriminant(&open.kind) == std::mem::discriminant(&kind);
        if self.open.as_ref().is_some_and(|open| same(open) && !open.ended) {
            return self.write(text, out);
        }
        self.close("completed", out);
        let text = if joined { text.strip_prefix('\n').unwrap_or(text) } else { text };
        self.begin(kind, out);
        self.write(text, out);
    }

    fn begin(&mut self, kind: Kind, out: &mut Vec<u8>) {
        let open = Open::new(kind);
        let index = self.items.len();
        let added = ItemEvent { output_index: index, item: open.shown("in_progress") };
        self.emit("response.output_item.added", added, out);
        if let Some(part) = open.kind.part("", &[]) {
            let added = Piece { part: Some(part), ..open.piece(index) };
            self.emit("response.content_part.added", added, out);
        }
        self.open = Some(open);
    }

    fn write(&mut self, text: &str, out: &mut Vec<u8>) {
        let Some(mut open) = self.open.take() else { return };
        if !text.is_empty() {
            open.text.push_str(text);
            let mut entries = std::mem::take(&mut self.pending);
            let (event, _) = open.kind.events();
            let logprobs = matches!(open.kind, Kind::Message).then_some(&entries[..]);
            let delta = Piece { delta: Some(text), logprobs, ..open.piece(self.items.len()) };
            self.emit(event, delta, out);
            open.logprobs.append(&mut entries);
        }
        self.open = Some(open);
    }

    /// Ends the open item.
    fn close(&mut self, status: &str, out: &mut Vec<u8>) {
        let Some(mut open) = self.open.take() else { return };
        if matches!(open.kind, Kind::Message) {
            open.logprobs.append(&mut self.pending);
        }
        let index = self.items.len();
        let (_, event) = open.kind.events();
        let mut done = open.piece(index);
        let text = Some(&open.text[..]);
        match &open.kind {
            Kind::Reasoning => done.text = text,
            Kind::Message => (done.text, done.logprobs) = (text, Some(&open.logprobs[..])),
            Kind::Call { name, free: false, .. } => (done.name, done.arguments) = (Some(&name[..]), text),
            Kind::Call { free: true, .. } => done.input = text,
        }
        self.emit(event, done, out);
        if let Some(part) = open.kind.part(&open.text, &open.logprobs) {
            let done = Piece { part: Some(part), ..open.piece(index) };
            self.emit("response.content_part.done", done, out);
        }
        let item = raw(&open.shown(status));
        self.emit("response.output_item.done", ItemEvent { output_index: index, item: &item }, out);
        self.items.push(Item::new(Some(open.id), item));
    }

    /// Closes what is open and tells the end; the result is the response, which is kept if it is to be.
    pub(crate) fn complete(&mut self, out: &mut Vec<u8>) -> Box<RawValue> {
        let cut = self.finish == Some(FinishReason::Length);
        let says = self.open.is_some() || !self.items.is_empty();
        if !says && !cut {
            // Nothing at all was said, which is an answer as well.
            self.begin(Kind::Message, out);
        }
        self.close(if cut { "incomplete" } else { "completed" }, out);
        let (status, event) = match cut {
            true => ("incomplete", "response.incomplete"),
            false => ("completed", "response.completed"),
        };
        let response = self.response(status, None);
        self.record.take().into_iter().for_each(Record::end);
        self.end_with(event, &response, out);
        response
    }

    /// Tells the last event, and keeps the response if it is to be.
    fn end_with(&mut self, event: &str, response: &RawValue, out: &mut Vec<u8>) {
        self.emit(event, ResponseEvent { response }, out);
        if let Some(keep) = self.keep.take() {
            let events = self.take_events();
            keep.store(&self.identity.id, response, &self.items, events);
        }
    }

    /// The response object with the items that are complete.
    pub(crate) fn response(&self, status: &str, error: Option<&ApiError>) -> Box<RawValue> {
        let usage = || {
            json!({
                "input_tokens": self.prompt_tokens,
                "input_tokens_details": {"cached_tokens": self.cached_tokens},
                "output_tokens": self.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens.unwrap_or(0)},
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            })
        };
        raw(&Response {
            id: &self.identity.id,
            object: "response",
            created_at: self.identity.created,
            status,
            error: error.map(|error| json!({"code": "server_error", "message": error.to_string()})),
            incomplete_details: (status == "incomplete").then(|| json!({"reason": "max_output_tokens"})),
            model: &self.identity.model,
            output: self.items.iter().map(AsRef::as_ref).collect(),
            echo: &self.echo,
            usage: (!matches!(status, "queued" | "in_progress")).then(usage),
        })
    }

    fn emit(&mut self, kind: &str, event: impl Serialize, out: &mut Vec<u8>) {
        if !self.streamed && self.recorded.is_none() {
            return;
        }
        let event = Numbered { r#type: kind, sequence_number: self.sequence, event };
        self.sequence += 1;
        let begin = out.len();
        out.extend_from_slice(format!("event: {kind}\ndata: ").as_bytes());
        serde_json::to_writer(&mut *out, &event).expect("an answer is JSON");
        out.extend_from_slice(b"\n\n");
        if let Some(recorded) = &mut self.recorded {
            recorded.push(Bytes::copy_from_slice(&out[begin..]));
        }
        if !self.streamed {
            out.truncate(begin);
        }
    }
}

impl Encoder for ResponseAnswer {
    fn begin(&mut self, out: &mut Vec<u8>) {
        for kind in ["response.created", "response.in_progress"] {
            let response = self.response("in_progress", None);
            self.emit(kind, ResponseEvent { response: &response }, out);
        }
    }

    fn event(&mut self, _prompt: usize, event: Event, out: &mut Vec<u8>) -> bool {
        self.apply(event, out)
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        self.complete(out);
    }

    /// Always in the words of this API.
    fn fail(&mut self, error: &ApiError, _style: ErrorStyle, out: &mut Vec<u8>) {
        self.cut_short(Some(error), out);
    }

    fn usage(&self) -> Usage {
        self.usage()
    }
}
