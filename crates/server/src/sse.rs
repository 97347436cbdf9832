//! Server-sent events: an encoder's chunks as a body that keeps idle connections alive and never ends without saying so.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderName, HeaderValue, header};
use engine::Event;
use serde::Serialize;
use tokio::time::{Instant, Sleep};

use crate::answer::Usage;
use crate::body::Source;
use crate::error::{ApiError, ErrorStyle};
use crate::events::{Cause, Events, Next};
use crate::json::excerpt;
use crate::log::RequestLog;

/// Turns events into `data:` lines.
pub(crate) trait Encoder: Send + Unpin + 'static {
    /// What comes before the first event.
    fn begin(&mut self, out: &mut Vec<u8>);
    /// An event of a prompt; false once nothing more can come.
    fn event(&mut self, prompt: usize, event: Event, out: &mut Vec<u8>) -> bool;
    /// What comes after the last event.
    fn end(&mut self, out: &mut Vec<u8>);
    /// What comes if the answer ends early.
    fn fail(&mut self, error: &ApiError, style: ErrorStyle, out: &mut Vec<u8>) {
        data(out, &error.wire(style));
        out.extend_from_slice(DONE);
    }
    /// Tokens so far.
    fn usage(&self) -> Usage;
}

/// The type of a stream.
pub(crate) const CONTENT_TYPE: &str = "text/event-stream; charset=utf-8";

/// What keeps others from holding a stream back.
pub(crate) fn headers() -> [(HeaderName, HeaderValue); 2] {
    [
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ]
}

/// The end of a stream of chunks.
pub(crate) const DONE: &[u8] = b"data: [DONE]\n\n";

/// One event of a stream.
pub(crate) fn data(out: &mut Vec<u8>, value: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, value).expect("an answer is JSON");
    out.extend_from_slice(b"\n\n");
}

/// A part of the body holds what is ready, up to about this many bytes: one write for what has piled up.
pub(crate) const MAX_PART: usize = 16 << 10;

/// What a server sets for all streams.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamRules {
    /// Silence before a comment; zero: never.
    pub(crate) keep_alive: Duration,
    pub(crate) style: ErrorStyle,
}

/// A stream of chunks.
pub(crate) struct Chunks<E> {
    encoder: E,
    /// What came while it was not clear yet that there would be a stream.
    first: VecDeque<(usize, Event)>,
    /// Gone after the end, so that whatever still runs is cancelled.
    events: Option<Events>,
    log: RequestLog,
    keep_alive: KeepAlive,
    style: ErrorStyle,
    begun: bool,
}

impl<E: Encoder> Chunks<E> {
    pub(crate) fn new(
        encoder: E,
        first: VecDeque<(usize, Event)>,
        events: Events,
        log: RequestLog,
        rules: StreamRules,
    ) -> Chunks<E> {
        let keep_alive = KeepAlive::new(rules.keep_alive);
        Chunks { encoder, first, events: Some(events), log, keep_alive, style: rules.style, begun: false }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Next>> {
        if let Some((prompt, event)) = self.first.pop_front() {
            return Poll::Ready(Some(Next::Event(prompt, event)));
        }
        match &mut self.events {
            Some(events) => events.poll_next(cx).map(Some),
            None => Poll::Ready(None),
        }
    }

    /// Adds the chunks of what came; may be nothing.
    fn encode(&mut self, next: Next, out: &mut Vec<u8>) {
        let more = match next {
            Next::Event(prompt, event) => self.encoder.event(prompt, event, out),
            Next::Done => false,
            Next::Failed(cause) => {
                let error = error(&cause, self.log.request_id());
                self.log.error(error.kind(), error.param());
                self.encoder.fail(&error, self.style, out);
                self.log.usage(self.encoder.usage());
                self.events = None;
                return;
            }
        };
        if !more {
            self.encoder.end(out);
            self.log.usage(self.encoder.usage());
            self.log.complete();
            self.events.take().iter_mut().for_each(Events::complete);
        }
    }
}

impl<E: Encoder> Source for Chunks<E> {
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut out = Vec::new();
        if !self.begun {
            self.begun = true;
            self.encoder.begin(&mut out);
        }
        while out.len() < MAX_PART
            && let Poll::Ready(next) = self.poll_next(cx)
        {
            match next {
                Some(next) => self.encode(next, &mut out),
                None if out.is_empty() => return Poll::Ready(None),
                None => break,
            }
        }
        if !out.is_empty() {
            self.keep_alive.sent();
            return Poll::Ready(Some(out.into()));
        }
        self.keep_alive.poll(cx).map(|()| Some(KEEP_ALIVE))
    }
}

/// A comment that shows an idle client and whatever lies between that the connection lives.
pub(crate) const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// As good as.
const NEVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// When to send a comment.
pub(crate) struct KeepAlive {
    interval: Duration,
    /// When the last part was sent.
    sent: Instant,
    idle: Pin<Box<Sleep>>,
}

impl KeepAlive {
    /// `interval`: silence before a comment; zero: never.
    pub(crate) fn new(interval: Duration) -> KeepAlive {
        let interval = if interval.is_zero() { NEVER } else { interval };
        KeepAlive { interval, sent: Instant::now(), idle: Box::pin(tokio::time::sleep(interval)) }
    }

    /// Something was sent.
    pub(crate) fn sent(&mut self) {
        self.sent = Instant::now();
    }

    /// Ready when nothing was sent for too long; then it counts as sent. The timer is set anew only when it has run out: that
    /// is cheaper than with every part.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.idle.as_mut().poll(cx).is_ready() {
            let due = self.sent + self.interval;
            if due <= Instant::now() {
                self.sent = Instant::now();
                self.idle.as_mut().reset(self.sent + self.interval);
                // Polled so that the new deadline wakes this task.
                let _ = self.idle.as_mut().poll(cx);
                return Poll::Ready(());
            }
            self.idle.as_mut().reset(due);
        }
        Poll::Pending
    }
}

/// What a client is told of an early end.
pub(crate) fn error(cause: &Cause, request_id: &str) -> ApiError {
    match cause {
        Cause::Engine(engine::Failure::ShuttingDown) | Cause::ShuttingDown => ApiError::ShuttingDown,
        Cause::SlowReader => ApiError::SlowReader,
        Cause::Aborted => ApiError::Aborted,
        Cause::Timeout => ApiError::Timeout,
        Cause::Form { param, reason } => {
            let message = format!("The form of the answer cannot be kept to: {}.", excerpt(reason));
            ApiError::invalid(param, message)
        }
        Cause::Engine(failure @ engine::Failure::Forbidden) => {
            ApiError::invalid("bad_words", format!("{failure}."))
        }
        Cause::Engine(failure @ engine::Failure::Corrupted) => {
            tracing::error!(request_id, %failure, "a request failed");
            ApiError::Corrupted { request_id: request_id.to_owned() }
        }
        Cause::Engine(failure) => {
            tracing::error!(request_id, %failure, "the engine failed");
            ApiError::DeviceFailed { request_id: request_id.to_owned() }
        }
        Cause::EngineGivenUp => ApiError::DeviceFailed { request_id: request_id.to_owned() },
        Cause::EngineGone => {
            tracing::error!(request_id, "the engine ended without an answer");
            ApiError::Internal { request_id: request_id.to_owned() }
        }
    }
}
