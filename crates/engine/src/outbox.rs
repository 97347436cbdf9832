//! News on their way to those who asked: put into words and told while the device is at work on what comes next.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use gptoss::Sampled;

use crate::output::{End, Ended, Transcript};
use crate::worker::panic_message;
use crate::{Event, Failure, Sink};

/// The clients of the requests in the engine, and what they have not been told.
#[derive(Default)]
pub(crate) struct Outbox {
    clients: BTreeMap<u64, Client>,
    /// By request, in order. `None`: nothing more comes.
    untold: Vec<(u64, Option<News>)>,
}

struct Client {
    sink: Sink,
    /// Of its choices; none where the engine reads along because the text decides something.
    transcripts: Vec<Transcript>,
}

/// What happened to a request.
pub(crate) enum News {
    Event(Event),
    /// Tokens that were drawn for a choice, and why they were its last. Nobody has read them yet.
    Drawn {
        choice: usize,
        drawn: Vec<Sampled>,
        end: Option<End>,
    },
    /// A choice of which all was drawn.
    Ended(Ended),
}

impl Outbox {
    /// A request's sink, and what its choices will say if nobody reads along.
    pub(crate) fn open(&mut self, number: u64, sink: Sink, transcripts: Vec<Transcript>) {
        self.clients.insert(number, Client { sink, transcripts });
    }

    pub(crate) fn put(&mut self, number: u64, news: News) {
        self.untold.push((number, Some(news)));
    }

    /// The last news of a request were put.
    pub(crate) fn close(&mut self, number: u64) {
        self.untold.push((number, None));
    }

    /// Tells everything. The result is the requests that are not to go on.
    pub(crate) fn tell(&mut self) -> Vec<u64> {
        let (mut unwanted, mut events) = (Vec::new(), Vec::with_capacity(self.untold.len()));
        // All is read before anybody is told: who is told wakes up and wants the processor.
        for (number, news) in self.untold.drain(..) {
            let Some(client) = self.clients.get_mut(&number) else { continue };
            let Some(news) = news else {
                events.push((number, None));
                continue;
            };
            match catch_unwind(AssertUnwindSafe(|| client.read(news))) {
                Ok(event) => events.extend(event.map(|event| (number, Some(event)))),
                Err(panic) => {
                    let failure = Failure::Device(panic_message(panic.as_ref()));
                    events.extend([(number, Some(Event::Failed(failure))), (number, None)]);
                    unwanted.push(number);
                }
            }
        }
        for (number, event) in events {
            let Some(client) = self.clients.get_mut(&number) else { continue };
            let wanted = event.map(|event| {
                // A sink that panics wants no more.
                catch_unwind(AssertUnwindSafe(|| (client.sink)(event))).unwrap_or_else(|panic| {
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
            let client = self.clients.remove(&number);
            // What a sink owns may panic when it is dropped.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(client)));
        }
        unwanted
    }
}

impl Client {
    /// The event, if it is time for one.
    fn read(&mut self, news: News) -> Option<Event> {
        match news {
            News::Event(event) => Some(event),
            News::Drawn { choice, drawn, end } => {
                let transcript = &mut self.transcripts[choice];
                for (i, sampled) in drawn.iter().enumerate() {
                    let end = end.as_ref().filter(|_| i + 1 == drawn.len());
                    // Without stop strings, none is found.
                    transcript.read(sampled.token, false, end);
                }
                transcript.news(choice, drawn, end.is_some())
            }
            News::Ended(ended) => Some(self.transcripts[ended.choice].finished(ended)),
        }
    }
}
