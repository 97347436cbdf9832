//! The bridge from the engine's thread to a connection: events of one HTTP request, in order, in bounded memory.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use engine::{Event, Failure, Replicas, Request, RequestHandle, Sink, SubmitError, Valve};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Sleep;

use crate::log::RequestLog;
use crate::metrics::{Metrics, Observed, Rejection};
use crate::rate_limit::Account;

/// What may wait for a client that reads slowly before its request is held back.
const MAX_BACKLOG_BYTES: usize = 1 << 20;
const MAX_BACKLOG_EVENTS: usize = 10_000;

/// The events of an HTTP request, which may have several prompts. Dropping it cancels what still runs.
pub(crate) struct Events {
    receiver: mpsc::UnboundedReceiver<(usize, Event)>,
    backlog: Arc<Backlog>,
    aborted: Pin<Box<dyn Future<Output = Cause> + Send>>,
    given_up: Pin<Box<dyn Future<Output = ()> + Send>>,
    deadline: Option<Pin<Box<Sleep>>>,
    /// The field that asks for a form of the answer.
    form_param: String,
    /// Prompts that are not done.
    running: usize,
    handles: Vec<RequestHandle>,
    fate: Arc<Fate>,
    metrics: Arc<Metrics>,
    log: RequestLog,
}

/// What a request's events depend on beside the engine.
pub(crate) struct Terms {
    /// The answer's and the request's.
    pub(crate) names: [String; 2],
    pub(crate) running: Arc<Running>,
    /// The field that asks for a form of the answer, to complain about.
    pub(crate) form_param: String,
    pub(crate) pace: Pace,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) log: RequestLog,
    /// Becomes true when the server's time to finish is over.
    pub(crate) abort: watch::Receiver<bool>,
    /// Longest time for the whole answer.
    pub(crate) timeout: Option<Duration>,
    /// Longest time that a client may leave a full backlog unread.
    pub(crate) stall_timeout: Duration,
    /// Who pays for the tokens.
    pub(crate) account: Account,
}

/// The requests that run, so that an operator can end them by name.
#[derive(Debug, Default)]
pub(crate) struct Running(Mutex<Vec<Arc<Named>>>);

#[derive(Debug)]
struct Named {
    names: [String; 2],
    aborted: Notify,
}

impl Running {
    /// Ends the requests of these names that run now.
    pub(crate) fn abort(&self, names: &HashSet<String>) {
        let running = self.all();
        let named = running.iter().filter(|request| request.names.iter().any(|name| names.contains(name)));
        // Kept for a request that does not wait yet.
        named.for_each(|request| request.aborted.notify_one());
    }

    fn enter(self: &Arc<Running>, names: [String; 2]) -> Entry {
        let request = Arc::new(Named { names, aborted: Notify::new() });
        self.all().push(Arc::clone(&request));
        Entry { running: Arc::clone(self), request }
    }

    fn all(&self) -> MutexGuard<'_, Vec<Arc<Named>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request among those that run, as long as it does.
struct Entry {
    running: Arc<Running>,
    request: Arc<Named>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.running.all().retain(|other| !Arc::ptr_eq(other, &self.request));
    }
}

/// A prompt that the engine holds; gone when the engine has forgotten it.
struct Tracked {
    observed: Observed,
    metrics: Arc<Metrics>,
    account: Account,
    fate: Arc<Fate>,
}

/// What became of a request.
#[derive(Default)]
struct Fate {
    /// The engine took all its prompts.
    accepted: AtomicBool,
    /// Its answer is complete, whatever the engine still makes of it.
    complete: AtomicBool,
    /// Tokens so far, read or not.
    generated: AtomicUsize,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if self.fate.accepted.load(Ordering::Acquire) {
            self.observed.end(&self.metrics, self.fate.complete.load(Ordering::Acquire));
        }
        self.account.charge(self.observed.generated());
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
    /// What the client demands excludes itself, or takes too much to follow.
    Form {
        param: String,
        reason: String,
    },
    /// The engine's thread is gone.
    EngineGone,
    /// The engine hung and was given up.
    EngineGivenUp,
    /// More waited for longer than is allowed.
    SlowReader,
    /// The server's time to finish is over.
    ShuttingDown,
    /// An operator has ended it.
    Aborted,
    /// The request's time is over.
    Timeout,
}

/// Whether the receiver keeps up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Set by the client's reading: the backlog is bounded.
    Client,
    /// Set by this server: what waits is part of an answer that is kept anyway.
    Server,
}

impl Events {
    /// Submits the prompts; either all are accepted or none.
    pub(crate) fn submit(
        replicas: &Replicas,
        requests: Vec<Request>,
        terms: Terms,
    ) -> Result<Events, SubmitError> {
        let Terms {
            names,
            running: all,
            form_param,
            pace,
            metrics,
            log,
            mut abort,
            timeout,
            stall_timeout,
            account,
        } = terms;
        let entry = all.enter(names);
        let (sender, receiver) = mpsc::unbounded_channel();
        let backlog = Arc::new(Backlog::default());
        let running = requests.len();
        let prompt_tokens = requests.iter().map(|request| request.prompt.len()).sum();
        let runtime = tokio::runtime::Handle::current();
        let fate = Arc::new(Fate::default());
        let mut handles = Vec::with_capacity(running);
        replicas.fits(&requests)?;
        for (prompt, request) in requests.into_iter().enumerate() {
            let (sender, backlog_of_sink) = (sender.clone(), Arc::clone(&backlog));
            let mut tracked = Tracked {
                observed: Observed::new(&request),
                metrics: Arc::clone(&metrics),
                account: account.clone(),
                fate: Arc::clone(&fate),
            };
            let runtime = runtime.clone();
            let sink = |replica| -> Sink {
                tracked.observed.goes_to(replica);
                Box::new(move |event| {
                    let Tracked { observed, metrics, fate, .. } = &mut tracked;
                    observed.event(metrics, &event);
                    if let Event::Tokens { token_ids, .. } = &event {
                        fate.generated.fetch_add(token_ids.len(), Ordering::Relaxed);
                    }
                    let too_much = backlog_of_sink.add(&event);
                    if pace == Pace::Client && too_much {
                        backlog_of_sink.hold(&runtime, stall_timeout);
                    }
                    // After holding, so that the receiver, which lets go, sees something after that.
                    sender.send((prompt, event)).is_ok()
                })
            };
            let handle = replicas.submit(request, sink).inspect_err(|error| match error {
                SubmitError::Full => metrics.reject(Rejection::QueueFull),
                SubmitError::ShuttingDown => metrics.reject(Rejection::ShuttingDown),
                _ => {}
            })?;
            backlog.flow().add(handle.valve());
            handles.push(handle);
        }
        fate.accepted.store(true, Ordering::Release);
        log.submitted(prompt_tokens);
        let valves: Vec<Valve> = handles.iter().map(RequestHandle::valve).collect();
        let mut look_again = abort.clone();
        let given_up = Box::pin(async move {
            if look_again.wait_for(|_| valves.iter().any(Valve::abandoned)).await.is_err() {
                // The server is gone, which `aborted` says.
                std::future::pending().await
            }
        });
        let aborted = Box::pin(async move {
            tokio::select! {
                biased;
                // An error means that the server is gone.
                _ = abort.wait_for(|everything| *everything) => Cause::ShuttingDown,
                () = entry.request.aborted.notified() => Cause::Aborted,
            }
        });
        let deadline = timeout.map(|timeout| Box::pin(tokio::time::sleep(timeout)));
        Ok(Events {
            receiver,
            backlog,
            aborted,
            given_up,
            deadline,
            form_param,
            running,
            handles,
            fate,
            metrics,
            log,
        })
    }

    /// Waits for the next event.
    pub(crate) async fn next(&mut self) -> Next {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The next event. After `Done` or `Failed` nothing runs any more.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        while self.running > 0 {
            // Whatever waits: a client that reads slowly does not put these off.
            if let Poll::Ready(cause) = self.aborted.as_mut().poll(cx) {
                return Poll::Ready(self.end(Next::Failed(cause)));
            }
            if self.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
                return Poll::Ready(self.end(Next::Failed(Cause::Timeout)));
            }
            let Poll::Ready(received) = self.receiver.poll_recv(cx) else {
                ready!(self.given_up.as_mut().poll(cx));
                return Poll::Ready(self.end(Next::Failed(Cause::EngineGivenUp)));
            };
            let Some((prompt, event)) = received else {
                let cause = if self.backlog.flow().given_up { Cause::SlowReader } else { Cause::EngineGone };
                return Poll::Ready(self.end(Next::Failed(cause)));
            };
            self.backlog.remove(&event);
            match event {
                Event::Done => self.running -= 1,
                Event::Failed(failure) => {
                    let cause = match failure {
                        Failure::Grammar(reason) => Cause::Form { param: self.form_param.clone(), reason },
                        failure => Cause::Engine(failure),
                    };
                    return Poll::Ready(self.end(Next::Failed(cause)));
                }
                event => {
                    self.log.event(&event);
                    return Poll::Ready(Next::Event(prompt, event));
                }
            }
        }
        Poll::Ready(self.end(Next::Done))
    }

    /// The answer is complete: what still runs is not needed.
    pub(crate) fn complete(&mut self) {
        self.fate.complete.store(true, Ordering::Release);
        self.close();
    }

    /// What still runs is not wanted any more, and nobody has gone away.
    pub(crate) fn close(&mut self) {
        self.handles.clear();
    }

    fn end(&mut self, next: Next) -> Next {
        self.close();
        self.receiver.close();
        next
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.log.generated(self.fate.generated.load(Ordering::Relaxed));
        if !self.handles.is_empty() {
            self.metrics.disconnect();
        }
    }
}

/// What waits for the client. Once it is too much the engine stops computing the request; it goes on when half is read.
#[derive(Default)]
struct Backlog {
    bytes: AtomicUsize,
    events: AtomicUsize,
    /// A copy of the flow's, to be looked at without its lock.
    held: AtomicBool,
    flow: Mutex<Flow>,
}

#[derive(Default)]
struct Flow {
    valves: Vec<Valve>,
    held: bool,
    /// Times that it was held.
    holds: u64,
    /// The client has had its time.
    given_up: bool,
}

impl Flow {
    fn add(&mut self, valve: Valve) {
        if self.held {
            valve.close();
        }
        self.valves.push(valve);
    }
}

impl Backlog {
    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an event that will wait, and says whether that is too much.
    fn add(&self, event: &Event) -> bool {
        let bytes = cost(event);
        let too_long = self.events.fetch_add(1, Ordering::Relaxed) >= MAX_BACKLOG_EVENTS;
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        // One large event alone is not a backlog.
        too_long || (before > 0 && before + bytes > MAX_BACKLOG_BYTES)
    }

    fn remove(&self, event: &Event) {
        let events = self.events.fetch_sub(1, Ordering::Relaxed) - 1;
        let cost = cost(event);
        let bytes = self.bytes.fetch_sub(cost, Ordering::Relaxed) - cost;
        if self.held.load(Ordering::Acquire)
            && events <= MAX_BACKLOG_EVENTS / 2
            && bytes <= MAX_BACKLOG_BYTES / 2
        {
            let mut flow = self.flow();
            flow.held = false;
            self.held.store(false, Ordering::Release);
            flow.valves.iter().for_each(Valve::open);
        }
    }

    /// Stops the request until half is read; for good, if that takes too long.
    fn hold(self: &Arc<Backlog>, runtime: &tokio::runtime::Handle, stall_timeout: Duration) {
        let mut flow = self.flow();
        if flow.held {
            return;
        }
        (flow.held, flow.holds) = (true, flow.holds + 1);
        self.held.store(true, Ordering::Release);
        flow.valves.iter().for_each(Valve::close);
        let (backlog, hold) = (Arc::downgrade(self), flow.holds);
        drop(flow);
        runtime.spawn(async move {
            tokio::time::sleep(stall_timeout).await;
            let Some(backlog) = backlog.upgrade() else { return };
            let mut flow = backlog.flow();
            if flow.held && flow.holds == hold {
                flow.given_up = true;
                flow.valves.iter().for_each(Valve::cancel);
            }
        });
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
