//! Responses that clients may refer to later: a few, for a while, each for the key that made it (`serving.md` 8.5).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::ApiError;

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
    /// Least recently used first.
    order: VecDeque<String>,
    bytes: usize,
}

/// A response that is kept.
#[derive(Debug)]
pub(crate) struct Stored {
    owner: Owner,
    since: Instant,
    bytes: usize,
    /// The response object.
    pub(crate) response: String,
    /// The items of its request.
    pub(crate) input: Vec<Value>,
    /// All items of the conversation, its own included.
    pub(crate) conversation: Vec<Box<RawValue>>,
}

impl Store {
    pub(crate) fn new(max: usize) -> Store {
        Store { max, inner: Mutex::default() }
    }

    /// A place for a response, if any are kept.
    pub(crate) fn place(
        self: &Arc<Store>,
        owner: Owner,
        earlier: Vec<Box<RawValue>>,
        input: Vec<Value>,
    ) -> Option<Keep> {
        (self.max > 0).then(|| Keep { store: Arc::clone(self), owner, earlier, input })
    }

    /// A response of this owner.
    pub(crate) fn find(&self, id: &str, owner: Owner, param: &'static str) -> Result<Arc<Stored>, ApiError> {
        let mut inner = self.inner();
        let unknown = || ApiError::UnknownResponse { param };
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

    /// Forgets a response of this owner.
    pub(crate) fn remove(&self, id: &str, owner: Owner) -> Result<(), ApiError> {
        self.find(id, owner, "response_id")?;
        self.inner().remove(id);
        Ok(())
    }

    fn insert(&self, id: &str, stored: Stored) {
        let mut inner = self.inner();
        inner.bytes += stored.bytes;
        inner.order.push_back(id.to_owned());
        inner.responses.insert(id.to_owned(), Arc::new(stored));
        while (inner.responses.len() > self.max || inner.bytes > MAX_BYTES)
            && let Some(oldest) = inner.order.front().cloned()
        {
            inner.remove(&oldest);
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remove(&mut self, id: &str) {
        self.order.retain(|known| known != id);
        if let Some(stored) = self.responses.remove(id) {
            self.bytes -= stored.bytes;
        }
    }
}

/// A place for a response that is being made.
#[derive(Debug)]
pub(crate) struct Keep {
    store: Arc<Store>,
    owner: Owner,
    earlier: Vec<Box<RawValue>>,
    input: Vec<Value>,
}

impl Keep {
    /// Keeps a complete response.
    pub(crate) fn store(self, id: &str, response: &Value, output: &[Value]) {
        let items = self.input.iter().chain(output);
        let raw = items.map(|item| RawValue::from_string(item.to_string()));
        let mut conversation = self.earlier;
        conversation.extend(raw.map(|raw| raw.expect("an item is JSON")));
        let response = response.to_string();
        let texts: usize = conversation.iter().map(|item| item.get().len()).sum();
        let input: usize = self.input.iter().map(|item| item.to_string().len()).sum();
        // A tree of values takes several times its text.
        let bytes = response.len() + texts + 8 * input;
        let stored = Stored {
            owner: self.owner,
            since: Instant::now(),
            bytes,
            response,
            input: self.input,
            conversation,
        };
        self.store.insert(id, stored);
    }
}
