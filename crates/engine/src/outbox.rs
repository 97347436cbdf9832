//! Events on their way to those who asked: told while the device is at work on what comes next.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::worker::panic_message;
use crate::{Event, Sink};

/// The sinks of the requests in the engine, and what they have not been told.
#[derive(Default)]
pub(crate) struct Outbox {
    sinks: BTreeMap<u64, Sink>,
    /// By request, in order. `None`: nothing more comes.
    untold: Vec<(u64, Option<Event>)>,
}

impl Outbox {
    /// A request's sink.
    pub(crate) fn open(&mut self, number: u64, sink: Sink) {
        self.sinks.insert(number, sink);
    }

    pub(crate) fn put(&mut self, number: u64, event: Event) {
        self.untold.push((number, Some(event)));
    }

    /// The last event of a request was put.
    pub(crate) fn close(&mut self, number: u64) {
        self.untold.push((number, None));
    }

    /// Tells everything. The result is the requests that want to hear no more.
    pub(crate) fn tell(&mut self) -> Vec<u64> {
        let mut unwanted = Vec::new();
        for (number, event) in self.untold.drain(..) {
            let Some(sink) = self.sinks.get_mut(&number) else { continue };
            let wanted = event.map(|event| {
                // A sink that panics wants no more.
                catch_unwind(AssertUnwindSafe(|| sink(event))).unwrap_or_else(|panic| {
                    tracing::error!("the sink of a request panicked: {}", panic_message(panic.as_ref()));
                    false
                })
            });
            if wanted == Some(true) {
                continue;
            }
            if wanted == Some(false) {
                unwanted.push(number);
            }
            let sink = self.sinks.remove(&number);
            // What a sink owns may panic when it is dropped.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(sink)));
        }
        unwanted
    }
}
