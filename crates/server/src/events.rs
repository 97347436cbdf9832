//! The bridge from the engine's thread to a connection: events of one HTTP request, in order, in bounded memory.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use engine::{Engine, Event, Failure, Request, RequestHandle, SubmitError};
use tokio::sync::{mpsc, watch};

use crate::metrics::{Metrics, Observed, Rejection};

/// What may wait for a client that reads slowly.
const MAX_BACKLOG_BYTES: usize = 1 << 20;
const MAX_BACKLOG_EVENTS: usize = 10_000;

/// The events of an HTTP request, which may have several prompts. Dropping it cancels what still runs.
pub(crate) struct Events {
    receiver: mpsc::UnboundedReceiver<(usize, Event)>,
    backlog: Arc<Backlog>,
    aborted: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// Prompts that are not done.
    running: usize,
    handles: Vec<RequestHandle>,
    metrics: Arc<Metrics>,
}

/// A request that the engine holds; gone when the engine has forgotten it.
struct Tracked {
    observed: Observed,
    metrics: Arc<Metrics>,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.observed.end(&self.metrics);
    }
}

/// What comes next.
#[derive(Debug)]
pub(crate) enum Next {
    /// An event of the prompt with this number; never `Done` or `Failed`.
    Event(usize, Event),
    /// All prompts are done.
    Done,
    /// Nothing more will come.
    Failed(Cause),
}

/// Why events end early.
#[derive(Debug)]
pub(crate) enum Cause {
    Engine(Failure),
    /// The engine's thread is gone.
    EngineGone,
    /// More waited than is allowed.
    SlowReader,
    /// The server's time to finish is over.
    ShuttingDown,
}

/// Whether the receiver keeps up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Set by the client's reading: the backlog is bounded.
    Client,
    /// Set by this server: what waits is part of an answer that is kept anyway.
    Server,
}

#[derive(Debug, Default)]
struct Backlog {
    bytes: AtomicUsize,
    events: AtomicUsize,
    overflowed: AtomicBool,
}

impl Events {
    /// Submits the prompts; either all are accepted or none.
    pub(crate) fn submit(
        engine: &Engine,
        requests: Vec<Request>,
        pace: Pace,
        metrics: &Arc<Metrics>,
        mut abort: watch::Receiver<bool>,
    ) -> Result<Events, SubmitError> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let backlog = Arc::new(Backlog::default());
        let running = requests.len();
        let mut handles = Vec::with_capacity(running);
        for (prompt, request) in requests.into_iter().enumerate() {
            let (sender, backlog) = (sender.clone(), Arc::clone(&backlog));
            let observed = Observed::new(metrics, &request);
            let mut tracked = Tracked { observed, metrics: Arc::clone(metrics) };
            let sink = move |event: Event| {
                let Tracked { observed, metrics } = &mut tracked;
                observed.event(metrics, &event);
                let too_much = backlog.add(&event);
                if pace == Pace::Client && too_much {
                    backlog.overflowed.store(true, Ordering::Release);
                    return false;
                }
                sender.send((prompt, event)).is_ok()
            };
            let handle = engine.submit(request, Box::new(sink)).inspect_err(|error| match error {
                SubmitError::Full => metrics.reject(Rejection::QueueFull),
                SubmitError::ShuttingDown => metrics.reject(Rejection::ShuttingDown),
                _ => {}
            });
            handles.push(handle?);
        }
        let aborted = Box::pin(async move {
            // An error means that the server is gone, which aborts as well.
            let _ = abort.wait_for(|aborted| *aborted).await;
        });
        Ok(Events { receiver, backlog, aborted, running, handles, metrics: Arc::clone(metrics) })
    }

    /// Waits for the next event.
    pub(crate) async fn next(&mut self) -> Next {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The next event. After `Done` or `Failed` nothing runs any more.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        if self.aborted.as_mut().poll(cx).is_ready() {
            return Poll::Ready(self.end(Next::Failed(Cause::ShuttingDown)));
        }
        while self.running > 0 {
            let Some((prompt, event)) = ready!(self.receiver.poll_recv(cx)) else {
                let overflowed = self.backlog.overflowed.load(Ordering::Acquire);
                let cause = if overflowed { Cause::SlowReader } else { Cause::EngineGone };
                return Poll::Ready(self.end(Next::Failed(cause)));
            };
            self.backlog.remove(&event);
            match event {
                Event::Done => self.running -= 1,
                Event::Failed(failure) => {
                    return Poll::Ready(self.end(Next::Failed(Cause::Engine(failure))));
                }
                event => return Poll::Ready(Next::Event(prompt, event)),
            }
        }
        Poll::Ready(self.end(Next::Done))
    }

    fn end(&mut self, next: Next) -> Next {
        self.handles.clear();
        self.receiver.close();
        next
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if !self.handles.is_empty() {
            self.metrics.disconnect();
        }
    }
}

impl Backlog {
    /// Counts an event that will wait, and says whether that is too much.
    fn add(&self, event: &Event) -> bool {
        let bytes = cost(event);
        let too_long = self.events.fetch_add(1, Ordering::Relaxed) >= MAX_BACKLOG_EVENTS;
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        // One large event alone is not a backlog.
        too_long || (before > 0 && before + bytes > MAX_BACKLOG_BYTES)
    }

    fn remove(&self, event: &Event) {
        self.events.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(cost(event), Ordering::Relaxed);
    }
}

/// Memory that an event holds, about.
fn cost(event: &Event) -> usize {
    let Event::Tokens { token_ids, text, deltas, logprobs, .. } = event else {
        return size_of::<Event>();
    };
    let deltas: usize = deltas
        .iter()
        .map(|delta| {
            size_of_val(delta)
                + match delta {
                    harmony::Delta::Reasoning(text)
                    | harmony::Delta::Content(text)
                    | harmony::Delta::CallArguments { text, .. } => text.len(),
                    harmony::Delta::CallStart { name, .. } => name.len(),
                    harmony::Delta::End => 0,
                }
        })
        .sum();
    let logprobs: usize = logprobs.iter().map(|l| size_of_val(l) + size_of_val(&l.top[..])).sum();
    size_of::<Event>() + size_of_val(&token_ids[..]) + text.len() + deltas + logprobs
}
