//! One line per request, written when the request is over, whichever way it ends. It holds no text of users.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use engine::{Event, FinishReason};

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
    first_token: Option<Instant>,
    finish: Option<FinishReason>,
    /// An answer was begun, and not completed.
    incomplete: bool,
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

    /// The engine has the request.
    pub(crate) fn begin(&self, model: &str) {
        let mut facts = self.facts();
        facts.model = Some(model.to_owned());
        facts.incomplete = true;
    }

    pub(crate) fn event(&self, event: &Event) {
        let mut facts = self.facts();
        match event {
            Event::Tokens { .. } => {
                facts.first_token.get_or_insert_with(Instant::now);
            }
            Event::Finished { reason, .. } => facts.finish = Some(*reason),
            _ => {}
        }
    }

    pub(crate) fn usage(&self, usage: Usage) {
        self.facts().usage = Some(usage);
    }

    pub(crate) fn complete(&self) {
        self.facts().incomplete = false;
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
        let usage = facts.usage;
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
            ttft_ms = facts.first_token.map(milliseconds),
            e2e_ms = milliseconds(Instant::now()),
            finish_reason = finish,
            "request"
        );
    }
}
