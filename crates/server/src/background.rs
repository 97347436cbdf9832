//! Responses that are made while nobody waits for them: they run to their end or until somebody cancels them, and tell the store
//! what there is by then (`serving.md` 8.5).

use std::sync::Arc;

use axum::body::Bytes;

use crate::events::{Events, Next};
use crate::log::RequestLog;
use crate::response_answer::ResponseAnswer;
use crate::response_store::InMaking;
use crate::server::State;
use crate::sse::{self, Encoder};

/// Makes the response on a task of its own, which a server that shuts down waits for.
pub(crate) fn spawn(
    state: &Arc<State>,
    answer: ResponseAnswer,
    events: Events,
    place: InMaking,
    log: RequestLog,
) {
    let counted = Counted::new(state);
    tokio::spawn(async move {
        run(answer, events, place, log).await;
        drop(counted);
    });
}

/// Is counted while it lives.
struct Counted(Arc<State>);

impl Counted {
    fn new(state: &Arc<State>) -> Counted {
        state.in_background.send_modify(|responses| *responses += 1);
        Counted(Arc::clone(state))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.in_background.send_modify(|responses| *responses -= 1);
    }
}

async fn run(mut answer: ResponseAnswer, mut events: Events, place: InMaking, log: RequestLog) {
    let mut cancelled = std::pin::pin!(place.cancelled());
    // The store has the events.
    let nowhere = &mut Vec::new();
    answer.begin(nowhere);
    let mut told = None;
    let response = loop {
        let next = tokio::select! {
            next = events.next() => next,
            () = &mut cancelled => break answer.cut_short(None, nowhere),
        };
        let more = match next {
            Next::Event(_, event) => answer.apply(event, nowhere),
            Next::Done => false,
            Next::Failed(cause) => {
                break answer.cut_short(Some(&sse::error(&cause, log.request_id())), nowhere);
            }
        };
        if !more {
            events.complete();
            log.complete();
            break answer.complete(nowhere);
        }
        let items = Some(answer.items().len());
        let changed = std::mem::replace(&mut told, items) != items;
        let response = changed.then(|| answer.response("in_progress", None));
        let news: Vec<Bytes> = answer.take_events();
        if let Err(error) = place.tell(news, response.as_deref()) {
            break answer.cut_short(Some(&error), nowhere);
        }
    };
    events.close();
    log.usage(answer.usage());
    let news = answer.take_events();
    place.end(&response, answer.items(), news);
}
