//! Responses that clients may refer to later: a few, for a while, each for the key that made it (`serving.md` 8.5). Those that
//! are made in the background are here from their beginning, and whoever wants to see them made follows them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use serde_json::value::RawValue;
use tokio::sync::watch;

use crate::body::Source;
use crate::error::ApiError;
use crate::response_items::Item;
use crate::sse::{KEEP_ALIVE, KeepAlive, MAX_PART};

/// What all stored responses may take together.
const MAX_BYTES: usize = 256 << 20;
/// How long a response is kept.
const LIFE: Duration = Duration::from_secs(24 * 60 * 60);

/// Whose a response is: the digest of a key, if keys are asked for.
pub(crate) type Owner = Option<[u8; 32]>;

/// The responses that are kept; none if `max` is 0.
#[derive(Debug)]
pub(crate) struct Store {
    max: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    responses: HashMap<String, Arc<Stored>>,
    /// Those that are complete, least recently used first. As many others may be in the making.
    order: VecDeque<String>,
    bytes: usize,
}

impl Store {
    pub(crate) fn new(max: usize) -> Store {
        Store { max, inner: Mutex::default() }
    }

    /// Whether responses are kept.
    pub(crate) fn keeps(&self) -> bool {
        self.max > 0
    }

    /// A place for a response, if any are kept.
    pub(crate) fn place(
        self: &Arc<Store>,
        owner: Owner,
        earlier: Vec<Arc<Item>>,
        input: Vec<Arc<Item>>,
    ) -> Option<Keep> {
        self.keeps().then(|| Keep { store: Arc::clone(self), owner, earlier, input })
    }

    /// A response of this owner.
    pub(crate) fn find(&self, id: &str, owner: Owner, param: &'static str) -> Result<Arc<Stored>, ApiError> {
        let mut inner = self.inner();
        let unknown = || ApiError::Unknown { what: "response", param: param.to_owned() };
        let found = inner.responses.get(id).filter(|stored| stored.owner == owner).cloned();
        let found = found.ok_or_else(unknown)?;
        if found.since.elapsed() > LIFE {
            inner.remove(id);
            return Err(unknown());
        }
        if let Some(at) = inner.order.iter().position(|known| known == id)
            && let Some(id) = inner.order.remove(at)
        {
            inner.order.push_back(id);
        }
        Ok(found)
    }

    /// All items of a conversation, those of the response with this id at its end.
    pub(crate) fn conversation(&self, id: &str, owner: Owner) -> Result<Vec<Arc<Item>>, ApiError> {
        const PARAM: &str = "previous_response_id";
        let stored = self.find(id, owner, PARAM)?;
        let conversation = stored.made().conversation.clone();
        conversation.ok_or_else(|| {
            ApiError::invalid(PARAM, "The previous response is still in the making. Please retry.")
        })
    }

    /// Those of these items that are in complete conversations of this owner; of several with one id that of the response used last.
    pub(crate) fn items(&self, ids: &HashSet<String>, owner: Owner) -> HashMap<String, Arc<Item>> {
        let mut found = HashMap::new();
        if ids.is_empty() {
            return found;
        }
        let inner = self.inner();
        let used = inner.order.iter().rev().filter_map(|id| inner.responses.get(id));
        let own = |stored: &&Arc<Stored>| stored.owner == owner && stored.since.elapsed() <= LIFE;
        let own: Vec<Arc<Stored>> = used.filter(own).cloned().collect();
        drop(inner);
        // Most often the response used last has them all.
        for stored in own {
            for item in stored.made().conversation.iter().flatten() {
                if let Some(id) = item.id().filter(|&id| ids.contains(id)) {
                    found.entry(id.to_owned()).or_insert_with(|| Arc::clone(item));
                }
            }
            if found.len() == ids.len() {
                break;
            }
        }
        found
    }

    /// Forgets a response of this owner; one in the making ends.
    pub(crate) fn remove(&self, id: &str, owner: Owner) -> Result<(), ApiError> {
        self.find(id, owner, "response_id")?.cancel();
        self.inner().remove(id);
        Ok(())
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remove(&mut self, id: &str) {
        self.order.retain(|known| known != id);
        if let Some(stored) = self.responses.remove(id) {
            self.bytes -= stored.made().bytes;
        }
    }

    /// Forgets complete responses until there is room; whether there is.
    fn make_room(&mut self, max: usize) -> bool {
        while (self.order.len() > max || self.bytes > MAX_BYTES)
            && let Some(oldest) = self.order.front().cloned()
        {
            self.remove(&oldest);
        }
        self.bytes <= MAX_BYTES
    }
}

/// A response that is kept.
#[derive(Debug)]
pub(crate) struct Stored {
    owner: Owner,
    since: Instant,
    background: bool,
    /// The items of its request.
    pub(crate) input: Vec<Arc<Item>>,
    made: Mutex<Made>,
    /// Changes with every event.
    news: watch::Sender<()>,
    cancelled: watch::Sender<bool>,
}

/// What is there of a response.
#[derive(Debug, Default)]
struct Made {
    /// The response object.
    response: String,
    events: Vec<Bytes>,
    /// All items of the conversation, its own included; once it is complete.
    conversation: Option<Vec<Arc<Item>>>,
    bytes: usize,
}

impl Stored {
    /// The response object as it is now.
    pub(crate) fn response(&self) -> String {
        self.made().response.clone()
    }

    /// Ends a response that is made in the background, and waits until it has ended.
    pub(crate) async fn end(&self) -> Result<(), ApiError> {
        if !self.background {
            return Err(ApiError::invalid("response_id", "Cannot cancel a synchronous response."));
        }
        let mut news = self.news.subscribe();
        self.cancel();
        while !self.is_complete() {
            if news.changed().await.is_err() {
                break;
            }
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.made().conversation.is_some()
    }

    fn cancel(&self) {
        self.cancelled.send_replace(true);
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place for a response.
#[derive(Debug)]
pub(crate) struct Keep {
    store: Arc<Store>,
    owner: Owner,
    earlier: Vec<Arc<Item>>,
    input: Vec<Arc<Item>>,
}

impl Keep {
    /// Keeps a response that will be made in the background.
    pub(crate) fn begin(self, id: &str, response: &RawValue) -> Result<InMaking, ApiError> {
        let mut inner = self.store.inner();
        if inner.responses.len() - inner.order.len() >= self.store.max {
            return Err(ApiError::Busy { seconds: 1 });
        }
        let (news, cancelled) = (watch::Sender::new(()), watch::Sender::new(false));
        let made = Mutex::new(Made { response: response.to_string(), ..Made::default() });
        let stored = Stored {
            owner: self.owner,
            since: Instant::now(),
            background: true,
            input: self.input,
            made,
            news,
            cancelled,
        };
        let stored = Arc::new(stored);
        inner.responses.insert(id.to_owned(), Arc::clone(&stored));
        drop(inner);
        Ok(InMaking { store: self.store, id: id.to_owned(), stored, earlier: self.earlier })
    }

    /// Keeps a complete response and the events that made it.
    pub(crate) fn store(self, id: &str, response: &RawValue, output: &[Arc<Item>], events: Vec<Bytes>) {
        let conversation = conversation(self.earlier, &self.input, output);
        let response = response.to_string();
        let bytes = bytes(&response, &conversation) + events.iter().map(event_bytes).sum::<usize>();
        let made = Mutex::new(Made { response, events, conversation: Some(conversation), bytes });
        let stored = Stored {
            owner: self.owner,
            since: Instant::now(),
            background: false,
            input: self.input,
            made,
            news: watch::Sender::new(()),
            cancelled: watch::Sender::new(false),
        };
        let mut inner = self.store.inner();
        inner.bytes += bytes;
        inner.order.push_back(id.to_owned());
        inner.responses.insert(id.to_owned(), Arc::new(stored));
        inner.make_room(self.store.max);
    }
}

/// A response on its way. If it is dropped before its end, it is forgotten.
#[derive(Debug)]
pub(crate) struct InMaking {
    store: Arc<Store>,
    id: String,
    stored: Arc<Stored>,
    earlier: Vec<Arc<Item>>,
}

impl InMaking {
    /// Adds events, and what is there by now if that changed. Fails if there is no room.
    pub(crate) fn tell(&self, events: Vec<Bytes>, response: Option<&RawValue>) -> Result<(), ApiError> {
        let mut inner = self.store.inner();
        let mut made = self.stored.made();
        let bytes: usize = events.iter().map(event_bytes).sum();
        made.events.extend(events);
        if let Some(response) = response {
            made.response = response.to_string();
        }
        made.bytes += bytes;
        // One that was removed meanwhile counts no more.
        inner.bytes += if inner.responses.contains_key(&self.id) { bytes } else { 0 };
        drop(made);
        let room = inner.make_room(self.store.max);
        drop(inner);
        self.stored.news.send_replace(());
        if room { Ok(()) } else { Err(ApiError::StoreFull) }
    }

    /// The response is complete.
    pub(crate) fn end(mut self, response: &RawValue, output: &[Arc<Item>], events: Vec<Bytes>) {
        let conversation = conversation(std::mem::take(&mut self.earlier), &self.stored.input, output);
        let response = response.to_string();
        let bytes = bytes(&response, &conversation) + events.iter().map(event_bytes).sum::<usize>();
        let mut inner = self.store.inner();
        let mut made = self.stored.made();
        made.events.extend(events);
        made.response = response;
        made.conversation = Some(conversation);
        made.bytes += bytes;
        drop(made);
        if inner.responses.contains_key(&self.id) {
            inner.bytes += bytes;
            inner.order.push_back(self.id.clone());
            inner.make_room(self.store.max);
        }
    }

    /// Waits until somebody wants it to end.
    pub(crate) fn cancelled(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut cancelled = self.stored.cancelled.subscribe();
        async move {
            // An error means that nobody can want it any more.
            if cancelled.wait_for(|cancelled| *cancelled).await.is_err() {
                std::future::pending().await
            }
        }
    }

    /// The response as others see it.
    pub(crate) fn stored(&self) -> Arc<Stored> {
        Arc::clone(&self.stored)
    }
}

impl Drop for InMaking {
    fn drop(&mut self) {
        if !self.stored.is_complete() {
            // Whoever follows it is to see an end.
            self.stored.made().conversation = Some(Vec::new());
            self.store.inner().remove(&self.id);
        }
        self.stored.news.send_replace(());
    }
}

fn conversation(earlier: Vec<Arc<Item>>, input: &[Arc<Item>], output: &[Arc<Item>]) -> Vec<Arc<Item>> {
    let mut conversation = earlier;
    conversation.extend(input.iter().cloned());
    conversation.extend(output.iter().cloned());
    conversation
}

/// What a response takes beside its events. Items that several responses share count in each, since any may be the last to go.
fn bytes(response: &str, conversation: &[Arc<Item>]) -> usize {
    response.len() + conversation.iter().map(|item| item.bytes()).sum::<usize>()
}

fn event_bytes(event: &Bytes) -> usize {
    size_of::<Bytes>() + event.len()
}

/// The events of a stored response as a body, from one of them on; those that are still to come as they come.
pub(crate) struct Follower {
    stored: Arc<Stored>,
    next: usize,
    news: Pin<Box<dyn Future<Output = ()> + Send>>,
    keep_alive: KeepAlive,
}

impl Follower {
    pub(crate) fn new(stored: Arc<Stored>, next: usize, keep_alive: Duration) -> Follower {
        let news = Follower::news(&stored);
        Follower { stored, next, news, keep_alive: KeepAlive::new(keep_alive) }
    }

    fn news(stored: &Stored) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let mut news = stored.news.subscribe();
        // The sender is as old as this follower.
        Box::pin(async move { news.changed().await.unwrap_or_default() })
    }
}

impl Source for Follower {
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            let mut part = Vec::new();
            let made = self.stored.made();
            while part.len() < MAX_PART
                && let Some(event) = made.events.get(self.next)
            {
                part.extend_from_slice(event);
                self.next += 1;
            }
            let ended = made.conversation.is_some();
            drop(made);
            if !part.is_empty() {
                self.keep_alive.sent();
                return Poll::Ready(Some(part.into()));
            }
            if ended {
                return Poll::Ready(None);
            }
            // What came after the look above wakes this task.
            if self.news.as_mut().poll(cx).is_pending() {
                return self.keep_alive.poll(cx).map(|()| Some(KEEP_ALIVE));
            }
            self.news = Follower::news(&self.stored);
        }
    }
}
