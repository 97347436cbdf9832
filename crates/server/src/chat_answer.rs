//! A chat's events as the answer's fields, whole or as a stream of chunks (`serving.md` 5.4 to 5.8). Both go through
//! [`ChatAnswer::apply`], so that the chunks joined are the whole.

use std::sync::Arc;

use engine::{Event, FinishReason};
use gptoss::TokenLogprobs;
use harmony::{Delta, Harmony, Turn};
use serde::Serialize;

use crate::answer::{
    ChatLogprob, ChatLogprobs, Finish, Identity, PromptLogprobs, RequestMetrics, Stop, Timing, TokenNames,
    Usage, prompt_logprobs,
};
use crate::chat_request::ChatRequest;
use crate::chunk::Envelope;
use crate::identifier::identifier;
use crate::memory::{Memory, Record};
use crate::request::StreamOptions;
use crate::server::State;
use crate::sorter::{Place, Sorter, Stretch};
use crate::sse::{DONE, Encoder};
use crate::turn::Choice as CallChoice;
use crate::visible::{Rules, Visible};

/// What an answer shows, of what is generated.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    rules: Rules,
    /// The client named the function, so that the call is the answer.
    call_is_answer: bool,
    /// The call is shown as `function_call`.
    legacy_functions: bool,
    logprobs: bool,
    /// Of the text of the final channel alone.
    final_logprobs: bool,
    prompt_logprobs: Option<usize>,
    token_ids: bool,
    tokens_as_ids: bool,
    /// Reasoning is repeated as `reasoning_content`.
    reasoning_content: bool,
    prompt_text: bool,
    stream: StreamOptions,
    /// What comes before the answer.
    echo: String,
    /// The functions that may be called.
    tools: Arc<[String]>,
    /// Tokens of reasoning are not shown, whoever asks for tokens.
    hides_tokens: bool,
    /// The last tokens of the prompt, if they begin the answer.
    begun: Vec<u32>,
}

impl Shape {
    pub(crate) fn new(request: &ChatRequest, begun: &[u32], state: &State) -> Shape {
        let tokens = request.params.logprobs.is_some() || request.common.return_token_ids;
        Shape {
            echo: request.continued.clone().filter(|_| request.echo).unwrap_or_default(),
            tools: Arc::clone(&request.tools),
            hides_tokens: tokens && !request.include_reasoning,
            begun: begun.to_vec(),
            rules: Rules {
                calls_allowed: request.choice != CallChoice::None,
                max_calls: if request.parallel_tool_calls { usize::MAX } else { 1 },
                include_reasoning: request.include_reasoning,
            },
            call_is_answer: matches!(request.choice, CallChoice::Named(_)),
            legacy_functions: request.legacy_functions,
            logprobs: request.params.logprobs.is_some(),
            final_logprobs: request.params.logprobs.is_some() && state.final_logprobs,
            prompt_logprobs: request.params.prompt_logprobs,
            token_ids: request.common.return_token_ids,
            tokens_as_ids: request.common.return_tokens_as_token_ids,
            reasoning_content: state.reasoning_content,
            prompt_text: request.return_prompt_text,
            stream: request.stream().unwrap_or_default(),
        }
    }
}

/// Why a choice ended, as the client is told.
#[derive(Serialize)]
#[serde(untagged)]
enum Reason {
    Usual(FinishReason),
    Legacy(&'static str),
}

impl Shape {
    fn reason(&self, reason: FinishReason) -> Reason {
        match reason {
            FinishReason::ToolCalls if self.legacy_functions => Reason::Legacy("function_call"),
            reason => Reason::Usual(reason),
        }
    }

    /// Keeps of some tokens, and of their log-probabilities, what the client is to see.
    fn keep_shown(&self, stretch: &mut Stretch) {
        let shown = |place| !self.hides_tokens || !matches!(place, Place::Marker | Place::Reasoning);
        let shown_logprobs = |place| shown(place) && (!self.final_logprobs || place == Place::Final);
        // Where places are not known, all is shown.
        let mut places = stretch.places.iter();
        stretch.token_ids.retain(|_| places.next().is_none_or(|&place| shown(place)));
        let mut places = stretch.places.iter();
        stretch.logprobs.retain(|_| places.next().is_none_or(|&place| shown_logprobs(place)));
    }
}

/// An answer in the making.
pub(crate) struct ChatAnswer {
    harmony: Arc<Harmony>,
    identity: Identity,
    shape: Shape,
    prompt: Vec<u32>,
    cached_tokens: usize,
    timing: Timing,
    prompt_logprobs: Option<PromptLogprobs>,
    choices: Vec<Choice>,
}

#[derive(Default)]
struct Choice {
    visible: Visible,
    finished: bool,
    completion_tokens: usize,
    /// Known at the end.
    reasoning_tokens: Option<usize>,
    /// Tells where tokens belong, if some are not to be shown.
    sorter: Option<Sorter>,
    /// Remembers the turn if it ends with a call.
    record: Option<Record>,
}

/// What an event adds to a choice.
enum Change {
    Delta { choice: usize, deltas: Vec<Delta>, token_ids: Vec<u32>, logprobs: Vec<TokenLogprobs> },
    Finish { choice: usize, finish: Finish },
}

impl ChatAnswer {
    pub(crate) fn new(
        harmony: Arc<Harmony>,
        identity: Identity,
        shape: Shape,
        prompt: Vec<u32>,
        n: usize,
        memory: Option<&Arc<Memory>>,
    ) -> ChatAnswer {
        let parser = || {
            let mut parser = harmony.parser(Arc::clone(&shape.tools));
            shape.begun.iter().for_each(|&token| drop(parser.push(token)));
            parser
        };
        let sorter = || Sorter::new(harmony.tokenizer(), parser());
        let sorts = shape.hides_tokens || shape.final_logprobs || shape.rules.limit_calls();
        let record = || memory.map(|memory| Record::new(memory, &shape.begun));
        let choice = |_| Choice { sorter: sorts.then(sorter), record: record(), ..Choice::default() };
        let choices = (0..n).map(choice).collect();
        ChatAnswer {
            harmony,
            identity,
            shape,
            prompt,
            cached_tokens: 0,
            timing: Timing::default(),
            prompt_logprobs: None,
            choices,
        }
    }

    /// Whether nothing more can change.
    pub(crate) fn is_finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.finished)
    }

    pub(crate) fn usage(&self) -> Usage {
        let completion = self.choices.iter().map(|choice| choice.completion_tokens).sum();
        let reasoning = self.choices.iter().map(|choice| choice.reasoning_tokens).sum();
        Usage::new(self.prompt.len(), self.cached_tokens, completion, reasoning)
    }

    /// How long it took, if that is to be said.
    fn metrics(&self) -> Option<RequestMetrics> {
        // Choices at a time have no time of their own.
        let arrival = self.identity.timed.filter(|_| self.choices.len() == 1)?;
        Some(self.timing.metrics(arrival))
    }

    /// The client knows a call of a choice by this id.
    fn called(&mut self, choice: usize, id: &str) {
        self.choices[choice].record.iter_mut().for_each(|record| record.called(id));
    }

    /// A choice is over.
    fn remember(&mut self, choice: usize) {
        self.choices[choice].record.take().into_iter().for_each(Record::end);
    }

    fn names(&self) -> TokenNames<'_> {
        TokenNames { tokenizer: self.harmony.tokenizer(), as_ids: self.shape.tokens_as_ids }
    }

    fn apply(&mut self, event: Event) -> Vec<Change> {
        let mut changes = Vec::new();
        if self.identity.timed.is_some() {
            self.timing.event(&event);
        }
        match event {
            Event::Started { cached_tokens, prompt_logprobs: entries, .. } => {
                self.cached_tokens = cached_tokens;
                if let (Some(top), Some(entries)) = (self.shape.prompt_logprobs, entries) {
                    self.prompt_logprobs = Some(prompt_logprobs(&entries, top, self.names()));
                }
            }
            Event::Tokens { choice: index, token_ids, deltas, logprobs, .. } => {
                let Some(choice) = self.choices.get_mut(index).filter(|choice| !choice.finished) else {
                    return changes;
                };
                let event = Stretch { token_ids, logprobs, deltas, ..Stretch::default() };
                let stretches = match &mut choice.sorter {
                    Some(sorter) => sorter.split(event),
                    None => vec![event],
                };
                let (mut token_ids, mut logprobs, mut shown) = (Vec::new(), Vec::new(), Vec::new());
                for mut stretch in stretches {
                    if choice.visible.is_over {
                        choice.finished = true;
                        break;
                    }
                    choice.completion_tokens += stretch.token_ids.len();
                    choice.record.iter_mut().for_each(|record| record.push(&stretch.token_ids));
                    self.shape.keep_shown(&mut stretch);
                    let deltas = stretch.deltas.into_iter();
                    shown.extend(deltas.filter_map(|delta| choice.visible.show(delta, &self.shape.rules)));
                    token_ids.extend(stretch.token_ids);
                    logprobs.extend(stretch.logprobs);
                }
                let finished = choice.finished;
                if finished {
                    // The engine will not say.
                    let count = |record: &Record| record.reasoning_tokens(&self.harmony, &self.shape.tools);
                    choice.reasoning_tokens = choice.record.as_ref().map(count);
                }
                changes.push(Change::Delta { choice: index, deltas: shown, token_ids, logprobs });
                if finished {
                    let finish = Finish { reason: FinishReason::ToolCalls, stop: None };
                    changes.push(Change::Finish { choice: index, finish });
                }
            }
            Event::Finished { choice: index, reason, stop, completion_tokens, reasoning_tokens, .. } => {
                let Some(choice) = self.choices.get_mut(index).filter(|choice| !choice.finished) else {
                    return changes;
                };
                choice.finished = true;
                choice.completion_tokens = completion_tokens;
                choice.reasoning_tokens = Some(reasoning_tokens);
                let reason = match reason {
                    FinishReason::ToolCalls if choice.visible.calls == 0 || self.shape.call_is_answer => {
                        FinishReason::Stop
                    }
                    reason => reason,
                };
                let finish = Finish { reason, stop: stop.map(Stop::from) };
                changes.push(Change::Finish { choice: index, finish });
            }
            Event::Done | Event::Failed(_) => {}
        }
        changes
    }
}

/// The whole answer.
pub(crate) struct WholeChat {
    answer: ChatAnswer,
    parts: Vec<Part>,
}

#[derive(Default)]
struct Part {
    turn: Turn,
    token_ids: Vec<u32>,
    logprobs: Vec<ChatLogprob>,
    finish: Option<Finish>,
}

/// What is said beside the body.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Remarks {
    /// A call's arguments are not JSON.
    pub(crate) malformed_arguments: bool,
    /// The answer ended before it left its reasoning.
    pub(crate) truncated_in_analysis: bool,
}

impl WholeChat {
    pub(crate) fn new(answer: ChatAnswer) -> WholeChat {
        let parts = answer.choices.iter().map(|_| Part::default()).collect();
        WholeChat { answer, parts }
    }

    /// Takes an event; false once nothing more can change.
    pub(crate) fn add(&mut self, event: Event) -> bool {
        for change in self.answer.apply(event) {
            match change {
                Change::Delta { choice, deltas, token_ids, logprobs } => {
                    let names = self.answer.names();
                    let part = &mut self.parts[choice];
                    deltas.iter().for_each(|delta| part.turn.apply(delta));
                    part.logprobs.extend(logprobs.iter().map(|entry| ChatLogprob::new(entry, names)));
                    part.token_ids.extend(token_ids);
                }
                Change::Finish { choice, finish } => self.parts[choice].finish = Some(finish),
            }
        }
        !self.answer.is_finished()
    }

    pub(crate) fn usage(&self) -> Usage {
        self.answer.usage()
    }

    /// The body, and what its headers say.
    pub(crate) fn finish(self) -> (Vec<u8>, Remarks) {
        let usage = self.answer.usage();
        let mut answer = self.answer;
        let turns: Vec<_> = self
            .parts
            .into_iter()
            .enumerate()
            .map(|(index, part)| {
                let Part { turn, token_ids, logprobs, finish } = part;
                let turn = turn.finish();
                let ids: Vec<String> = turn.tool_calls.iter().map(|_| call_id()).collect();
                ids.iter().for_each(|id| answer.called(index, id));
                answer.remember(index);
                (index, turn, ids, token_ids, logprobs, finish)
            })
            .collect();
        let shape = &answer.shape;
        let mut remarks = Remarks::default();
        let choices = turns.into_iter().map(|(index, turn, ids, token_ids, logprobs, finish)| {
            let reason = finish.as_ref().map(|finish| finish.reason);
            let is_json = |text: &str| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok();
            remarks.malformed_arguments |= turn.tool_calls.iter().any(|call| !is_json(&call.arguments));
            remarks.truncated_in_analysis |= reason == Some(FinishReason::Length)
                && turn.reasoning.is_some()
                && turn.content.is_none()
                && turn.tool_calls.is_empty();
            let mut calls = turn.tool_calls.into_iter().zip(ids).map(|(call, id)| WholeCall {
                id,
                r#type: "function",
                function: WholeFunction { name: call.name, arguments: call.arguments },
            });
            let function_call = match shape.legacy_functions {
                true => calls.next().map(|call| call.function),
                false => None,
            };
            WholeChoice {
                index,
                message: WholeMessage {
                    role: "assistant",
                    content: match shape.echo.as_str() {
                        "" => turn.content,
                        echo => Some(format!("{echo}{}", turn.content.unwrap_or_default())),
                    },
                    refusal: None,
                    annotations: None,
                    audio: None,
                    function_call,
                    reasoning_content: shape.reasoning_content.then(|| turn.reasoning.clone()),
                    reasoning: turn.reasoning,
                    tool_calls: calls.collect(),
                },
                logprobs: shape.logprobs.then_some(ChatLogprobs { content: logprobs, refusal: None }),
                finish_reason: reason.map(|reason| shape.reason(reason)),
                stop_reason: finish.and_then(|finish| finish.stop),
                token_ids: shape.token_ids.then_some(token_ids),
            }
        });
        let whole = Whole {
            id: &answer.identity.id,
            object: "chat.completion",
            created: answer.identity.created,
            model: &answer.identity.model,
            choices: choices.collect(),
            service_tier: answer.identity.service_tier,
            system_fingerprint: answer.identity.fingerprint.as_deref(),
            usage,
            prompt_logprobs: answer.prompt_logprobs.as_ref(),
            prompt_token_ids: shape.token_ids.then_some(&answer.prompt[..]),
            prompt_text: shape.prompt_text.then(|| answer.harmony.tokenizer().decode(&answer.prompt)),
            kv_transfer_params: None,
            metrics: answer.metrics(),
        };
        (serde_json::to_vec(&whole).expect("an answer is JSON"), remarks)
    }
}

#[derive(Serialize)]
struct Whole<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<WholeChoice>,
    service_tier: Option<&'static str>,
    system_fingerprint: Option<&'a str>,
    usage: Usage,
    prompt_logprobs: Option<&'a PromptLogprobs>,
    prompt_token_ids: Option<&'a [u32]>,
    prompt_text: Option<String>,
    kv_transfer_params: Option<()>,
    metrics: Option<RequestMetrics>,
}

#[derive(Serialize)]
struct WholeChoice {
    index: usize,
    message: WholeMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<Reason>,
    stop_reason: Option<Stop>,
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct WholeMessage {
    role: &'static str,
    content: Option<String>,
    refusal: Option<()>,
    annotations: Option<()>,
    audio: Option<()>,
    function_call: Option<WholeFunction>,
    reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<Option<String>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WholeCall>,
}

#[derive(Serialize)]
struct WholeCall {
    id: String,
    r#type: &'static str,
    function: WholeFunction,
}

#[derive(Serialize)]
struct WholeFunction {
    name: String,
    arguments: String,
}

/// The answer as chunks.
pub(crate) struct ChatChunks {
    answer: ChatAnswer,
}

impl ChatChunks {
    pub(crate) fn new(answer: ChatAnswer) -> ChatChunks {
        ChatChunks { answer }
    }

    fn chunk(&self, choices: &[ChunkChoice], last: bool, out: &mut Vec<u8>) {
        let answer = &self.answer;
        let envelope = Envelope {
            object: "chat.completion.chunk",
            identity: &answer.identity,
            stream: answer.shape.stream,
            usage: answer.usage(),
            metrics: answer.metrics(),
        };
        envelope.write(choices, last, out);
    }

    fn delta(
        &mut self,
        index: usize,
        deltas: Vec<Delta>,
        token_ids: Vec<u32>,
        logprobs: &[TokenLogprobs],
    ) -> Option<ChunkChoice> {
        let mut message = DeltaMessage::default();
        let legacy = self.answer.shape.legacy_functions;
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => message.reasoning.get_or_insert_default().push_str(&text),
                Delta::Content(text) => message.content.get_or_insert_default().push_str(&text),
                Delta::CallStart { name, .. } if legacy => {
                    message.function_call.get_or_insert_default().name = Some(name);
                }
                Delta::CallArguments { text, .. } if legacy => {
                    message.function_call.get_or_insert_default().arguments.push_str(&text);
                }
                Delta::CallStart { index: call, name } => {
                    let id = call_id();
                    self.answer.called(index, &id);
                    message.tool_calls.push(DeltaCall {
                        index: call,
                        id: Some(id),
                        r#type: Some("function"),
                        function: DeltaFunction { name: Some(name), arguments: String::new() },
                    });
                }
                Delta::CallArguments { index, text } => message.tool_calls.push(DeltaCall {
                    index,
                    id: None,
                    r#type: None,
                    function: DeltaFunction { name: None, arguments: text },
                }),
                Delta::End => {}
            }
        }
        let shape = &self.answer.shape;
        message.reasoning_content = message.reasoning.clone().filter(|_| shape.reasoning_content);
        let names = self.answer.names();
        let logprobs = shape.logprobs.then(|| ChatLogprobs {
            content: logprobs.iter().map(|entry| ChatLogprob::new(entry, names)).collect(),
            refusal: None,
        });
        let token_ids = shape.token_ids.then_some(token_ids);
        // Markers have no text: they are sent only for their log-probabilities or ids.
        let worth = !message.is_empty()
            || logprobs.as_ref().is_some_and(|logprobs| !logprobs.content.is_empty())
            || token_ids.as_ref().is_some_and(|ids| !ids.is_empty());
        worth.then(|| ChunkChoice { delta: message, logprobs, token_ids, ..ChunkChoice::new(index) })
    }
}

impl Encoder for ChatChunks {
    fn begin(&mut self, out: &mut Vec<u8>) {
        for index in 0..self.answer.choices.len() {
            let mut choice = ChunkChoice::new(index);
            choice.delta.role = Some("assistant");
            choice.delta.content = Some(String::new());
            if self.answer.shape.token_ids {
                choice.prompt_token_ids = Some(self.answer.prompt.clone());
            }
            self.chunk(&[choice], false, out);
            if !self.answer.shape.echo.is_empty() {
                let mut choice = ChunkChoice::new(index);
                choice.delta.content = Some(self.answer.shape.echo.clone());
                self.chunk(&[choice], false, out);
            }
        }
    }

    fn event(&mut self, _prompt: usize, event: Event, out: &mut Vec<u8>) -> bool {
        for change in self.answer.apply(event) {
            match change {
                Change::Delta { choice, deltas, token_ids, logprobs } => {
                    if let Some(choice) = self.delta(choice, deltas, token_ids, &logprobs) {
                        self.chunk(&[choice], false, out);
                    }
                }
                Change::Finish { choice, finish } => {
                    self.answer.remember(choice);
                    let mut choice = ChunkChoice::new(choice);
                    choice.finish_reason = Some(self.answer.shape.reason(finish.reason));
                    choice.stop_reason = Some(finish.stop);
                    let last = self.answer.is_finished() && !self.answer.shape.stream.include_usage;
                    self.chunk(&[choice], last, out);
                }
            }
        }
        !self.answer.is_finished()
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.answer.shape.stream.include_usage {
            self.chunk(&[], true, out);
        }
        out.extend_from_slice(DONE);
    }

    fn usage(&self) -> Usage {
        self.answer.usage()
    }
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: DeltaMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<Reason>,
    /// Beside a finish reason only, null then for the model's own end.
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Option<Stop>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

impl ChunkChoice {
    fn new(index: usize) -> ChunkChoice {
        ChunkChoice {
            index,
            delta: DeltaMessage::default(),
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
            prompt_token_ids: None,
        }
    }
}

#[derive(Default, Serialize)]
struct DeltaMessage {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<DeltaFunction>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<DeltaCall>,
}

impl DeltaMessage {
    fn is_empty(&self) -> bool {
        self.content.is_none()
            && self.reasoning.is_none()
            && self.function_call.is_none()
            && self.tool_calls.is_empty()
    }
}

#[derive(Serialize)]
struct DeltaCall {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: DeltaFunction,
}

#[derive(Default, Serialize)]
struct DeltaFunction {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

pub(crate) fn call_id() -> String {
    format!("call_{}", &identifier()[..24])
}
