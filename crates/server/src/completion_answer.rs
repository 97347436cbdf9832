//! A raw completion's events as the answer's fields, whole or as a stream of chunks (`serving.md` 7). Both go through
//! [`CompletionAnswer::apply`], so that the chunks joined are the whole.

use std::sync::Arc;

use engine::{Event, FinishReason};
use gptoss::TokenLogprobs;
use harmony::Harmony;
use serde::Serialize;

use crate::answer::{
    Finish, Identity, PromptLogprobs, RequestMetrics, Stop, TextLogprobs, Timing, TokenNames, Usage,
    prompt_logprobs,
};
use crate::chunk::Envelope;
use crate::completion_request::CompletionRequest;
use crate::request::StreamOptions;
use crate::sse::{DONE, Encoder};

/// What an answer shows, of what is generated.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    n: usize,
    echo: bool,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    token_ids: bool,
    tokens_as_ids: bool,
    stream: StreamOptions,
}

impl Shape {
    pub(crate) fn new(request: &CompletionRequest) -> Shape {
        Shape {
            n: request.params.n,
            echo: request.echo,
            logprobs: request.params.logprobs,
            prompt_logprobs: request.prompt_logprobs,
            token_ids: request.common.return_token_ids,
            tokens_as_ids: request.common.return_tokens_as_token_ids,
            stream: request.common.stream.unwrap_or_default(),
        }
    }
}

/// A prompt, and the text by which the client knows it.
#[derive(Debug, Clone)]
pub(crate) struct Prompt {
    pub(crate) ids: Vec<u32>,
    pub(crate) text: String,
}

/// An answer in the making.
pub(crate) struct CompletionAnswer {
    harmony: Arc<Harmony>,
    identity: Identity,
    shape: Shape,
    prompts: Vec<Prompt>,
    /// What the prompts' log-probabilities are, for the choices to show.
    entries: Vec<Vec<Option<TokenLogprobs>>>,
    cached_tokens: usize,
    timing: Timing,
    /// The `n` choices of the first prompt, then those of the second.
    choices: Vec<Choice>,
}

#[derive(Default)]
struct Choice {
    begun: bool,
    finished: bool,
    completion_tokens: usize,
    /// Characters of the tokens' names so far.
    offset: usize,
}

/// What an event adds to a choice.
#[derive(Default)]
struct Change {
    choice: usize,
    text: String,
    token_ids: Vec<u32>,
    logprobs: TextLogprobs,
    finish: Option<Finish>,
}

impl CompletionAnswer {
    pub(crate) fn new(
        harmony: Arc<Harmony>,
        identity: Identity,
        shape: Shape,
        prompts: Vec<Prompt>,
    ) -> CompletionAnswer {
        let choices = (0..prompts.len() * shape.n).map(|_| Choice::default()).collect();
        let entries = vec![Vec::new(); prompts.len()];
        CompletionAnswer {
            harmony,
            identity,
            shape,
            prompts,
            entries,
            cached_tokens: 0,
            timing: Timing::default(),
            choices,
        }
    }

    fn is_finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.finished)
    }

    pub(crate) fn usage(&self) -> Usage {
        let prompt = self.prompts.iter().map(|prompt| prompt.ids.len()).sum();
        let completion = self.choices.iter().map(|choice| choice.completion_tokens).sum();
        Usage::new(prompt, self.cached_tokens, completion, self.is_finished().then_some(0))
    }

    /// How long it took, if that is to be said.
    fn metrics(&self) -> Option<RequestMetrics> {
        // Choices at a time have no time of their own.
        let arrival = self.identity.timed.filter(|_| self.choices.len() == 1)?;
        Some(self.timing.metrics(arrival))
    }

    fn names(&self) -> TokenNames<'_> {
        TokenNames { tokenizer: self.harmony.tokenizer(), as_ids: self.shape.tokens_as_ids }
    }

    fn prompt_logprobs(&self, prompt: usize) -> Option<PromptLogprobs> {
        let top = self.shape.prompt_logprobs?;
        Some(prompt_logprobs(&self.entries[prompt], top, self.names()))
    }

    fn apply(&mut self, prompt: usize, event: Event) -> Option<Change> {
        if self.identity.timed.is_some() {
            self.timing.event(&event);
        }
        match event {
            Event::Started { cached_tokens, prompt_logprobs, .. } => {
                self.cached_tokens += cached_tokens;
                if let (Some(entries), Some(slot)) = (prompt_logprobs, self.entries.get_mut(prompt)) {
                    *slot = entries;
                }
                None
            }
            Event::Tokens { choice, token_ids, text, logprobs, .. } => {
                let mut change = self.begin(prompt, choice)?;
                let choice = self.choices.get_mut(change.choice)?;
                choice.completion_tokens += token_ids.len();
                let names =
                    TokenNames { tokenizer: self.harmony.tokenizer(), as_ids: self.shape.tokens_as_ids };
                for entry in &logprobs {
                    change.logprobs.push(entry.token, Some(entry), &mut choice.offset, names);
                }
                change.text += &text;
                change.token_ids = token_ids;
                Some(change)
            }
            Event::Finished { choice, reason, stop, completion_tokens, .. } => {
                let mut change = self.begin(prompt, choice)?;
                let choice = self.choices.get_mut(change.choice)?;
                choice.finished = true;
                choice.completion_tokens = completion_tokens;
                change.finish = Some(Finish { reason, stop: stop.map(Stop::from) });
                Some(change)
            }
            Event::Done | Event::Failed(_) => None,
        }
    }

    /// The beginning of a change of a choice: the prompt, if it is echoed and was not yet.
    fn begin(&mut self, prompt: usize, choice: usize) -> Option<Change> {
        let index = prompt * self.shape.n + choice;
        let begun = std::mem::replace(&mut self.choices.get_mut(index)?.begun, true);
        let mut change = Change { choice: index, ..Change::default() };
        if !begun && self.shape.echo {
            let echoed = &self.prompts[prompt];
            change.text = echoed.text.clone();
            if let Some(top) = self.shape.logprobs {
                let names =
                    TokenNames { tokenizer: self.harmony.tokenizer(), as_ids: self.shape.tokens_as_ids };
                let offset = &mut self.choices[index].offset;
                let entries = self.entries[prompt].iter().map(Option::as_ref).chain(std::iter::repeat(None));
                for (&token, entry) in echoed.ids.iter().zip(entries) {
                    // More may have been computed for `prompt_logprobs`.
                    let entry = entry.map(|entry| {
                        let mut entry = entry.clone();
                        entry.top.truncate(top);
                        entry
                    });
                    change.logprobs.push(token, entry.as_ref(), offset, names);
                }
            }
        }
        Some(change)
    }
}

/// The whole answer.
pub(crate) struct WholeCompletion {
    answer: CompletionAnswer,
    parts: Vec<Part>,
}

#[derive(Default)]
struct Part {
    text: String,
    token_ids: Vec<u32>,
    logprobs: TextLogprobs,
    finish: Option<Finish>,
}

impl WholeCompletion {
    pub(crate) fn new(answer: CompletionAnswer) -> WholeCompletion {
        let parts = answer.choices.iter().map(|_| Part::default()).collect();
        WholeCompletion { answer, parts }
    }

    /// Takes an event of a prompt.
    pub(crate) fn add(&mut self, prompt: usize, event: Event) {
        if let Some(change) = self.answer.apply(prompt, event) {
            let part = &mut self.parts[change.choice];
            part.text += &change.text;
            part.token_ids.extend(change.token_ids);
            part.logprobs.extend(change.logprobs);
            part.finish = part.finish.take().or(change.finish);
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        self.answer.usage()
    }

    /// The body.
    pub(crate) fn finish(self) -> Vec<u8> {
        let answer = self.answer;
        let shape = &answer.shape;
        let choices = self.parts.into_iter().enumerate().map(|(index, part)| {
            let prompt = index / shape.n;
            WholeChoice {
                index,
                text: part.text,
                logprobs: shape.logprobs.is_some().then_some(part.logprobs),
                finish_reason: part.finish.as_ref().map(|finish| finish.reason),
                stop_reason: part.finish.and_then(|finish| finish.stop),
                token_ids: shape.token_ids.then_some(part.token_ids),
                prompt_logprobs: answer.prompt_logprobs(prompt),
                prompt_token_ids: shape.token_ids.then(|| &answer.prompts[prompt].ids[..]),
            }
        });
        let whole = Whole {
            id: &answer.identity.id,
            object: "text_completion",
            created: answer.identity.created,
            model: &answer.identity.model,
            choices: choices.collect(),
            service_tier: answer.identity.service_tier,
            system_fingerprint: answer.identity.fingerprint.as_deref(),
            usage: answer.usage(),
            kv_transfer_params: None,
            metrics: answer.metrics(),
        };
        serde_json::to_vec(&whole).expect("an answer is JSON")
    }
}

#[derive(Serialize)]
struct Whole<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<WholeChoice<'a>>,
    service_tier: Option<&'static str>,
    system_fingerprint: Option<&'a str>,
    usage: Usage,
    kv_transfer_params: Option<()>,
    metrics: Option<RequestMetrics>,
}

#[derive(Serialize)]
struct WholeChoice<'a> {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<FinishReason>,
    stop_reason: Option<Stop>,
    token_ids: Option<Vec<u32>>,
    prompt_logprobs: Option<PromptLogprobs>,
    prompt_token_ids: Option<&'a [u32]>,
}

/// The answer as chunks.
pub(crate) struct CompletionChunks {
    answer: CompletionAnswer,
}

impl CompletionChunks {
    pub(crate) fn new(answer: CompletionAnswer) -> CompletionChunks {
        CompletionChunks { answer }
    }

    fn chunk(&self, choices: &[ChunkChoice], last: bool, out: &mut Vec<u8>) {
        let answer = &self.answer;
        let envelope = Envelope {
            object: "text_completion",
            identity: &answer.identity,
            stream: answer.shape.stream,
            usage: answer.usage(),
            metrics: answer.metrics(),
        };
        envelope.write(choices, last, out);
    }
}

impl Encoder for CompletionChunks {
    fn begin(&mut self, _out: &mut Vec<u8>) {}

    fn event(&mut self, prompt: usize, event: Event, out: &mut Vec<u8>) -> bool {
        let shape = self.answer.shape.clone();
        if let Some(change) = self.answer.apply(prompt, event) {
            let finished = change.finish.is_some();
            // Tokens without text are sent only for their log-probabilities or ids.
            let worth = finished
                || !change.text.is_empty()
                || (!change.token_ids.is_empty() && (shape.token_ids || shape.logprobs.is_some()));
            if worth {
                let choice = ChunkChoice {
                    index: change.choice,
                    text: change.text,
                    logprobs: (shape.logprobs.is_some() && !change.logprobs.is_empty())
                        .then_some(change.logprobs),
                    finish_reason: change.finish.as_ref().map(|finish| finish.reason),
                    stop_reason: change.finish.and_then(|finish| finish.stop),
                    token_ids: shape.token_ids.then_some(change.token_ids),
                };
                let last = finished && self.answer.is_finished() && !shape.stream.include_usage;
                self.chunk(&[choice], last, out);
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
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<FinishReason>,
    stop_reason: Option<Stop>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}
