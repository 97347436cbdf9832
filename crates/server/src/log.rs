//! One line per request, written when the request is over, whichever way it ends. It holds no text of users; the answer is a
//! line of its own, where that was asked for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::{Event, FinishReason};
use harmony::Harmony;

use crate::answer::Usage;

/// A request's line in the making. The line is written when the last clone is dropped.
#[derive(Debug, Clone)]
pub(crate) struct RequestLog(Arc<Line>);

#[derive(Debug)]
struct Line {
    request_id: String,
    key: Option<String>,
    route: &'static str,
    start: Instant,
    facts: Mutex<Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    status: Option<u16>,
    model: Option<String>,
    usage: Option<Usage>,
    queued: Option<Duration>,
    first_token: Option<Instant>,
    finish: Option<FinishReason>,
    /// An answer was begun, and not completed.
    incomplete: bool,
    /// What is known of an answer that nobody has counted.
    prompt_tokens: usize,
    cached_tokens: usize,
    generated: usize,
    /// The error's type, and the field that it is about.
    error: Option<(&'static str, Option<String>)>,
    /// What was generated, if it is to be logged.
    output: Option<Output>,
}

/// Tokens of an answer, and how they become text.
struct Output {
    harmony: Arc<Harmony>,
    max_len: usize,
    tokens: BTreeMap<usize, Vec<u32>>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").finish_non_exhaustive()
    }
}

impl RequestLog {
    /// `route` is a template, never the raw path; `key` is the short name of a key.
    pub(crate) fn new(request_id: String, key: Option<String>, route: &'static str) -> RequestLog {
        RequestLog(Arc::new(Line { request_id, key, route, start: Instant::now(), facts: Mutex::default() }))
    }

    pub(crate) fn request_id(&self) -> &str {
        &self.0.request_id
    }

    pub(crate) fn status(&self, status: u16) {
        self.facts().status = Some(status);
    }

    /// There is an error in place of an answer. Of the field's path the first part alone is kept: what follows may be a client's word.
    pub(crate) fn error(&self, kind: &'static str, param: Option<&str>) {
        let param = param.and_then(|param| param.split('.').next()).map(str::to_owned);
        self.facts().error = Some((kind, param));
    }

    /// The request is valid.
    pub(crate) fn begin(&self, model: &str) {
        let mut facts = self.facts();
        facts.model = Some(model.to_owned());
        facts.incomplete = true;
    }

    /// The engine has the request's prompts, of so many tokens together.
    pub(crate) fn submitted(&self, prompt_tokens: usize) {
        self.facts().prompt_tokens = prompt_tokens;
    }

    /// The engine has generated so many tokens.
    pub(crate) fn generated(&self, tokens: usize) {
        self.facts().generated = tokens;
    }

    pub(crate) fn event(&self, event: &Event) {
        let mut facts = self.facts();
        match event {
            Event::Started { queued, cached_tokens, .. } => {
                facts.queued = facts.queued.or(Some(*queued));
                facts.cached_tokens += cached_tokens;
            }
            Event::Tokens { choice, token_ids, .. } => {
                if facts.first_token.is_none() {
                    facts.first_token = Some(Instant::now());
                }
                if let Some(output) = &mut facts.output {
                    output.tokens.entry(*choice).or_default().extend(token_ids);
                }
            }
            Event::Finished { reason, .. } => facts.finish = Some(*reason),
            _ => {}
        }
    }

    /// The answer will be logged, at most so many characters of it.
    pub(crate) fn keep_output(&self, harmony: &Arc<Harmony>, max_len: usize) {
        let output = Output { harmony: Arc::clone(harmony), max_len, tokens: BTreeMap::new() };
        self.facts().output = Some(output);
    }

    /// The header that says how long the phases took, in milliseconds.
    pub(crate) fn server_timing(&self) -> String {
        let facts = self.facts();
        let queued = facts.queued.unwrap_or_default();
        let first = facts.first_token.map_or(queued, |first| first.duration_since(self.0.start));
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let prefill = milliseconds(first.saturating_sub(queued));
        format!("queue;dur={:.3}, prefill;dur={prefill:.3}", milliseconds(queued))
    }

    pub(crate) fn usage(&self, usage: Usage) {
        self.facts().usage = Some(usage);
    }

    /// The answer is complete. Where the engine has not said why, it ends with the last call that may be made.
    pub(crate) fn complete(&self) {
        let mut facts = self.facts();
        facts.incomplete = false;
        facts.finish.get_or_insert(FinishReason::ToolCalls);
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let facts = self.facts.get_mut().unwrap_or_else(PoisonError::into_inner);
        let milliseconds = |end: Instant| end.duration_since(self.start).as_secs_f64() * 1e3;
        let finish = match (facts.incomplete, facts.finish) {
            (true, _) => Some("abort"),
            (false, Some(FinishReason::Stop)) => Some("stop"),
            (false, Some(FinishReason::Length)) => Some("length"),
            (false, Some(FinishReason::ToolCalls)) => Some("tool_calls"),
            (false, Some(FinishReason::Repetition)) => Some("repetition"),
            (false, None) => None,
        };
        let counted = || {
            let &mut Facts { prompt_tokens, cached_tokens, generated, .. } = facts;
            (prompt_tokens > 0).then(|| Usage::new(prompt_tokens, cached_tokens, generated, None))
        };
        let usage = facts.usage.or_else(counted);
        let (error_type, param) = facts.error.take().unzip();
        tracing::info!(
            request_id = self.request_id,
            key = self.key,
            route = self.route,
            model = facts.model,
            status = facts.status,
            prompt_tokens = usage.map(|usage| usage.prompt_tokens),
            cached_tokens = usage.map(|usage| usage.prompt_tokens_details.cached_tokens),
            completion_tokens = usage.map(|usage| usage.completion_tokens),
            reasoning_tokens = usage
                .and_then(|usage| usage.completion_tokens_details)
                .map(|details| details.reasoning_tokens),
            queue_ms = facts.queued.map(|queued| queued.as_secs_f64() * 1e3),
            ttft_ms = facts.first_token.map(milliseconds),
            e2e_ms = milliseconds(Instant::now()),
            finish_reason = finish,
            error_type,
            param = param.flatten(),
            "request"
        );
        for (choice, tokens) in facts.output.iter().flat_map(|output| &output.tokens) {
            let Some(Output { harmony, max_len, .. }) = &facts.output else { continue };
            let output: String = harmony.tokenizer().decode(tokens).chars().take(*max_len).collect();
            tracing::info!(request_id = self.request_id, choice, output, "answer");
        }
    }
}
