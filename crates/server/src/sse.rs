//! Server-sent events: an encoder's chunks as a body that keeps idle connections alive and never ends without saying so.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use engine::Event;
use serde::Serialize;
use tokio::time::{Instant, Sleep};

use crate::answer::Usage;
use crate::body::Source;
use crate::error::ApiError;
use crate::events::{Cause, Events, Next};
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
    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        data(out, &error.wire());
        out.extend_from_slice(DONE);
    }
    /// Tokens so far.
    fn usage(&self) -> Usage;
}

/// The end of a stream of chunks.
pub(crate) const DONE: &[u8] = b"data: [DONE]\n\n";

/// One event of a stream.
pub(crate) fn data(out: &mut Vec<u8>, value: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, value).expect("an answer is JSON");
    out.extend_from_slice(b"\n\n");
}

/// A stream of chunks.
pub(crate) struct Chunks<E> {
    encoder: E,
    /// What came while it was not clear yet that there would be a stream.
    first: VecDeque<(usize, Event)>,
    /// Gone after the end, so that whatever still runs is cancelled.
    events: Option<Events>,
    log: RequestLog,
    keep_alive: Duration,
    idle: Pin<Box<Sleep>>,
    begun: bool,
}

impl<E: Encoder> Chunks<E> {
    pub(crate) fn new(
        encoder: E,
        first: VecDeque<(usize, Event)>,
        events: Events,
        log: RequestLog,
        keep_alive: Duration,
    ) -> Chunks<E> {
        let idle = Box::pin(tokio::time::sleep(keep_alive));
        Chunks { encoder, first, events: Some(events), log, keep_alive, idle, begun: false }
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

    /// The chunks of what came; may be nothing.
    fn encode(&mut self, next: Next) -> Vec<u8> {
        let mut out = Vec::new();
        if !self.begun {
            self.begun = true;
            self.encoder.begin(&mut out);
        }
        let more = match next {
            Next::Event(prompt, event) => {
                self.log.event(&event);
                self.encoder.event(prompt, event, &mut out)
            }
            Next::Done => false,
            Next::Failed(cause) => {
                self.encoder.fail(&error(&cause, self.log.request_id()), &mut out);
                self.close();
                return out;
            }
        };
        if !more {
            self.encoder.end(&mut out);
            self.close();
        }
        out
    }

    fn close(&mut self) {
        self.log.usage(self.encoder.usage());
        self.log.complete();
        self.events = None;
    }
}

impl<E: Encoder> Source for Chunks<E> {
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        while let Poll::Ready(next) = self.poll_next(cx) {
            let Some(next) = next else { return Poll::Ready(None) };
            let out = self.encode(next);
            if !out.is_empty() {
                self.idle.as_mut().reset(Instant::now() + self.keep_alive);
                return Poll::Ready(Some(out.into()));
            }
        }
        if self.idle.as_mut().poll(cx).is_ready() {
            self.idle.as_mut().reset(Instant::now() + self.keep_alive);
            // Polled so that the new deadline wakes this task.
            let _ = self.idle.as_mut().poll(cx);
            return Poll::Ready(Some(Bytes::from_static(b": keep-alive\n\n")));
        }
        Poll::Pending
    }
}

/// What a client is told of an early end.
pub(crate) fn error(cause: &Cause, request_id: &str) -> ApiError {
    match cause {
        Cause::Engine(engine::Failure::ShuttingDown) | Cause::ShuttingDown => ApiError::ShuttingDown,
        Cause::SlowReader => ApiError::SlowReader,
        Cause::Engine(engine::Failure::Grammar(reason)) => ApiError::GrammarFailed(reason.clone()),
        Cause::Engine(failure) => {
            tracing::error!(request_id, %failure, "the engine failed");
            ApiError::Internal { request_id: request_id.to_owned() }
        }
        Cause::EngineGone => {
            tracing::error!(request_id, "the engine ended without an answer");
            ApiError::Internal { request_id: request_id.to_owned() }
        }
    }
}
