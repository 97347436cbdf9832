//! Turns that ended with a call, as they were generated. When the conversation goes on they are written into the prompt as they
//! were, so that it goes on from the keys and values that are there (`serving.md` 6.3).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use harmony::{ChatMessage, Harmony, Parser};

/// Tokens of all remembered turns together: 16 MiB.
const MAX_TOKENS: usize = 4 << 20;

/// The turns of the recent past, by the id of their first call.
#[derive(Debug, Default)]
pub(crate) struct Memory(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    turns: HashMap<String, Arc<[u32]>>,
    /// Oldest first.
    order: VecDeque<String>,
    tokens: usize,
}

impl Memory {
    fn remember(&self, call: String, turn: Vec<u32>) {
        let mut inner = self.inner();
        inner.tokens += turn.len();
        inner.order.push_back(call.clone());
        inner.turns.insert(call, turn.into());
        while inner.tokens > MAX_TOKENS
            && let Some(oldest) = inner.order.pop_front()
        {
            let turn = inner.turns.remove(&oldest);
            inner.tokens -= turn.map_or(0, |turn| turn.len());
        }
    }

    /// Adds to the messages of a history what is known of them.
    pub(crate) fn recall(&self, messages: &mut [ChatMessage]) {
        let inner = self.inner();
        for call in messages.iter_mut().filter_map(|message| message.tool_calls.as_mut()?.first_mut()) {
            call.generated = inner.turns.get(&call.id).cloned();
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A turn on its way into the memory.
#[derive(Debug)]
pub(crate) struct Record {
    memory: Arc<Memory>,
    turn: Vec<u32>,
    call: Option<String>,
}

impl Record {
    /// `begun`: tokens of the prompt that begin the turn.
    pub(crate) fn new(memory: &Arc<Memory>, begun: &[u32]) -> Record {
        Record { memory: Arc::clone(memory), turn: begun.to_vec(), call: None }
    }

    /// What was generated.
    pub(crate) fn push(&mut self, tokens: &[u32]) {
        self.turn.extend(tokens);
    }

    /// A parser that has read it so far, of a turn that may call these functions.
    pub(crate) fn parser(&self, harmony: &Harmony, tools: &[String]) -> Parser {
        let mut parser = harmony.parser(tools);
        self.turn.iter().for_each(|&token| drop(parser.push(token)));
        parser
    }

    /// How much of it is reasoning so far.
    pub(crate) fn reasoning_tokens(&self, harmony: &Harmony, tools: &[String]) -> usize {
        self.parser(harmony, tools).reasoning_tokens()
    }

    /// A call is known to the client by this id.
    pub(crate) fn called(&mut self, id: &str) {
        self.call.get_or_insert_with(|| id.to_owned());
    }

    /// The turn is over. It is remembered if the client knows a call of it.
    pub(crate) fn end(self) {
        if let Some(call) = self.call {
            self.memory.remember(call, self.turn);
        }
    }
}
