//! A turn's events as the items of a response, whole or as a stream of events (`serving.md` 8.3, 8.4). Both go through
//! [`ResponseAnswer::apply`], so that the events put together are the whole.

use std::sync::Arc;

use axum::body::Bytes;
use engine::{Event, FinishReason};
use gptoss::TokenLogprobs;
use harmony::{Delta, Harmony};
use serde_json::{Map, Value, json};

use crate::answer::{ChatLogprob, Identity, TokenNames, Usage};
use crate::chat_answer::call_id;
use crate::error::{ApiError, ErrorStyle};
use crate::identifier::identifier;
use crate::memory::Record;
use crate::response_request::ResponseRequest;
use crate::response_store::Keep;
use crate::sse::Encoder;
use crate::turn::Choice;
use crate::visible::{Rules, Visible};

/// A response in the making.
pub(crate) struct ResponseAnswer {
    harmony: Arc<Harmony>,
    identity: Identity,
    rules: Rules,
    /// The functions that may be called; those whose argument is a text; those in a namespace.
    tools: Vec<String>,
    free_tools: Vec<String>,
    namespaced_tools: Vec<(String, String)>,
    logprobs: bool,
    /// What is repeated of the request.
    echo: Value,
    /// Takes the response when it is complete.
    keep: Option<Keep>,
    /// All events, or those since [`ResponseAnswer::take_events`]; for a response that is kept.
    recorded: Option<Vec<Bytes>>,
    /// Remembers the turn if it ends with a call.
    record: Option<Record>,
    prompt_tokens: usize,
    cached_tokens: usize,
    completion_tokens: usize,
    reasoning_tokens: Option<usize>,
    visible: Visible,
    /// Whether reasoning and answer have text of earlier messages, from which Harmony's parser separates more by a newline.
    has: Fields,
    items: Vec<Value>,
    open: Option<Open>,
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

/// The item that is being written.
struct Open {
    kind: Kind,
    id: String,
    text: String,
    logprobs: Vec<Value>,
    /// Of tokens whose text has not come yet.
    pending: Vec<Value>,
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
    fn part(&self, text: &str, logprobs: &[Value]) -> Option<Value> {
        match self {
            Kind::Reasoning => Some(json!({"type": "reasoning_text", "text": text})),
            Kind::Message => {
                Some(json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}))
            }
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
            pending: Vec::new(),
            ended: false,
        }
    }

    /// The item as it is shown; empty when it begins.
    fn item(&self, status: &str) -> Value {
        let parts: Vec<Value> = match status {
            "in_progress" => Vec::new(),
            _ => self.kind.part(&self.text, &self.logprobs).into_iter().collect(),
        };
        match &self.kind {
            Kind::Reasoning if parts.is_empty() => {
                json!({"type": "reasoning", "id": self.id, "summary": [], "status": status})
            }
            Kind::Reasoning => json!({
                "type": "reasoning", "id": self.id, "summary": [], "content": parts, "encrypted_content": null,
                "status": status
            }),
            Kind::Message => json!({
                "type": "message", "id": self.id, "role": "assistant", "status": status, "content": parts
            }),
            Kind::Call { call_id, name, namespace, free: false } => {
                let mut item = json!({
                    "type": "function_call", "id": self.id, "call_id": call_id, "name": name, "arguments": self.text,
                    "status": status
                });
                if let Some(namespace) = namespace {
                    item["namespace"] = namespace.as_str().into();
                }
                item
            }
            Kind::Call { call_id, name, free: true, .. } => json!({
                "type": "custom_tool_call", "id": self.id, "call_id": call_id, "name": name, "input": self.text,
                "status": status
            }),
        }
    }
}

impl ResponseAnswer {
    pub(crate) fn new(
        harmony: Arc<Harmony>,
        identity: Identity,
        request: &mut ResponseRequest,
        prompt_tokens: usize,
        keep: Option<Keep>,
        record: Option<Record>,
    ) -> ResponseAnswer {
        let mut echo = request.echo.take();
        // What is said is what is done.
        echo["store"] = keep.is_some().into();
        ResponseAnswer {
            harmony,
            identity,
            rules: Rules {
                calls_allowed: request.choice != Choice::None,
                max_calls: request.max_calls,
                include_reasoning: request.include_reasoning,
            },
            tools: request.tools.clone(),
            free_tools: std::mem::take(&mut request.free_tools),
            namespaced_tools: std::mem::take(&mut request.namespaced_tools),
            logprobs: request.logprobs,
            echo,
            recorded: keep.is_some().then(Vec::new),
            keep,
            record,
            prompt_tokens,
            cached_tokens: 0,
            completion_tokens: 0,
            reasoning_tokens: None,
            visible: Visible::default(),
            has: Fields::default(),
            items: Vec::new(),
            open: None,
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
                self.completion_tokens += token_ids.len();
                self.record.iter_mut().for_each(|record| record.push(&token_ids));
                self.add_tokens(deltas, &logprobs, out);
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
        let response = self.complete(&mut Vec::new());
        serde_json::to_vec(&response).expect("an answer is JSON")
    }

    /// The response goes on without its client: as it is before its beginning, and its place, if it has one.
    pub(crate) fn leave(&mut self) -> (Value, Option<Keep>) {
        self.streamed = false;
        (self.response("queued"), self.keep.take())
    }

    /// The events since the last call, of a response that is kept.
    pub(crate) fn take_events(&mut self) -> Vec<Bytes> {
        self.recorded.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Items that are complete.
    pub(crate) fn items(&self) -> &[Value] {
        &self.items
    }

    /// Ends a response that will not be complete: by an error, or else because somebody wanted it so.
    pub(crate) fn cut_short(&mut self, error: Option<&ApiError>, out: &mut Vec<u8>) -> Value {
        self.close("incomplete", out);
        let (status, kind) = match error {
            Some(_) => ("failed", "response.failed"),
            None => ("cancelled", "response.incomplete"),
        };
        let mut response = self.response(status);
        if let Some(error) = error {
            response["error"] = json!({"code": "server_error", "message": error.to_string()});
        }
        self.emit(kind, json!({"response": response}), out);
        response
    }

    fn add_tokens(&mut self, deltas: Vec<Delta>, logprobs: &[TokenLogprobs], out: &mut Vec<u8>) {
        // What went on after it was not cut off.
        if self.open.as_ref().is_some_and(|open| open.ended) {
            self.close("completed", out);
        }
        let mut entries: Vec<Value> = Vec::new();
        if self.logprobs {
            let names = TokenNames { tokenizer: self.harmony.tokenizer(), as_ids: false };
            let ordinary = logprobs.iter().filter(|entry| !names.tokenizer.is_special(entry.token));
            entries.extend(ordinary.map(|entry| json!(ChatLogprob::new(entry, names))));
        }
        for delta in deltas {
            if self.visible.is_beyond(&delta, &self.rules) {
                self.finish = Some(FinishReason::ToolCalls);
                // The engine will not say.
                let count = |record: &Record| record.reasoning_tokens(&self.harmony, &self.tools);
                self.reasoning_tokens = self.record.as_ref().map(count);
                return;
            }
            match self.visible.show(delta, &self.rules) {
                None => {}
                Some(Delta::Reasoning(text)) => {
                    let joined = std::mem::replace(&mut self.has.reasoning, true);
                    self.add_text(Kind::Reasoning, &text, joined, &mut Vec::new(), out);
                }
                Some(Delta::Content(text)) => {
                    let joined = std::mem::replace(&mut self.has.content, true);
                    self.add_text(Kind::Message, &text, joined, &mut entries, out);
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
                Some(Delta::CallArguments { text, .. }) => self.write(&text, &mut Vec::new(), out),
                Some(Delta::End) => {
                    if let Some(open) = &mut self.open {
                        open.ended = true;
                    }
                }
            }
        }
        // A token may be the first part of a character.
        if let Some(Open { kind: Kind::Message, ended: false, pending, .. }) = &mut self.open {
            pending.append(&mut entries);
        }
    }

    /// Adds text to the open item of this kind, or to a new one. `joined`: there was a message for this field before.
    fn add_text(
        &mut self,
        kind: Kind,
        text: &str,
        joined: bool,
        logprobs: &mut Vec<Value>,
        out: &mut Vec<u8>,
    ) {
        let same = |open: &Open| std::mem::discriminant(&open.kind) == std::mem::discriminant(&kind);
        if self.open.as_ref().is_some_and(|open| same(open) && !open.ended) {
            return self.write(text, logprobs, out);
        }
        self.close("completed", out);
        let text = if joined { text.strip_prefix('\n').unwrap_or(text) } else { text };
        self.begin(kind, out);
        self.write(text, logprobs, out);
    }

    fn begin(&mut self, kind: Kind, out: &mut Vec<u8>) {
        let open = Open::new(kind);
        let index = self.items.len();
        let added = json!({"output_index": index, "item": open.item("in_progress")});
        self.emit("response.output_item.added", added, out);
        if let Some(part) = open.kind.part("", &[]) {
            let added = json!({"item_id": open.id, "output_index": index, "content_index": 0, "part": part});
            self.emit("response.content_part.added", added, out);
        }
        self.open = Some(open);
    }

    fn write(&mut self, text: &str, logprobs: &mut Vec<Value>, out: &mut Vec<u8>) {
        let index = self.items.len();
        let Some(open) = &mut self.open else { return };
        if text.is_empty() {
            return open.pending.append(logprobs);
        }
        open.text.push_str(text);
        open.pending.append(logprobs);
        let logprobs = std::mem::take(&mut open.pending);
        let (event, _) = open.kind.events();
        let mut delta = located(open, index);
        delta["delta"] = text.into();
        if matches!(open.kind, Kind::Message) {
            delta["logprobs"] = logprobs.clone().into();
        }
        open.logprobs.extend(logprobs);
        self.emit(event, delta, out);
    }

    /// Ends the open item.
    fn close(&mut self, status: &str, out: &mut Vec<u8>) {
        let Some(mut open) = self.open.take() else { return };
        open.logprobs.append(&mut open.pending);
        let index = self.items.len();
        let (_, event) = open.kind.events();
        let mut done = located(&open, index);
        match &open.kind {
            Kind::Reasoning => done["text"] = open.text.as_str().into(),
            Kind::Message => {
                done["text"] = open.text.as_str().into();
                done["logprobs"] = open.logprobs.clone().into();
            }
            Kind::Call { name, free: false, .. } => {
                done["name"] = name.as_str().into();
                done["arguments"] = open.text.as_str().into();
            }
            Kind::Call { free: true, .. } => done["input"] = open.text.as_str().into(),
        }
        self.emit(event, done, out);
        if let Some(part) = open.kind.part(&open.text, &open.logprobs) {
            let mut done = located(&open, index);
            done["part"] = part;
            self.emit("response.content_part.done", done, out);
        }
        let item = open.item(status);
        self.emit("response.output_item.done", json!({"output_index": index, "item": item}), out);
        self.items.push(item);
    }

    /// Closes what is open and tells the end; the result is the response, which is kept if it is to be.
    pub(crate) fn complete(&mut self, out: &mut Vec<u8>) -> Value {
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
        let response = self.response(status);
        self.emit(event, json!({"response": response}), out);
        self.record.take().into_iter().for_each(Record::end);
        if let Some(keep) = self.keep.take() {
            let events = self.take_events();
            keep.store(&self.identity.id, &response, &self.items, events);
        }
        response
    }

    /// The response object with the items that are complete.
    pub(crate) fn response(&self, status: &str) -> Value {
        let incomplete = (status == "incomplete").then(|| json!({"reason": "max_output_tokens"}));
        let mut response = json!({
            "id": self.identity.id,
            "object": "response",
            "created_at": self.identity.created,
            "status": status,
            "error": null,
            "incomplete_details": incomplete,
            "model": self.identity.model,
            "output": self.items,
        });
        if let (Some(response), Some(echo)) = (response.as_object_mut(), self.echo.as_object()) {
            response.extend(echo.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        response["usage"] = match status {
            "queued" | "in_progress" => Value::Null,
            _ => json!({
                "input_tokens": self.prompt_tokens,
                "input_tokens_details": {"cached_tokens": self.cached_tokens},
                "output_tokens": self.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens.unwrap_or(0)},
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            }),
        };
        response
    }

    fn emit(&mut self, kind: &str, body: Value, out: &mut Vec<u8>) {
        if !self.streamed && self.recorded.is_none() {
            return;
        }
        let mut event = Map::new();
        event.insert("type".to_owned(), kind.into());
        event.insert("sequence_number".to_owned(), self.sequence.into());
        self.sequence += 1;
        if let Value::Object(body) = body {
            event.extend(body);
        }
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

/// Where an event belongs.
fn located(open: &Open, index: usize) -> Value {
    match open.kind {
        Kind::Call { .. } => json!({"item_id": open.id, "output_index": index}),
        _ => json!({"item_id": open.id, "output_index": index, "content_index": 0}),
    }
}

impl Encoder for ResponseAnswer {
    fn begin(&mut self, out: &mut Vec<u8>) {
        for kind in ["response.created", "response.in_progress"] {
            let response = self.response("in_progress");
            self.emit(kind, json!({"response": response}), out);
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
