//! Engines over copies of one model, and which of them takes a request.
//!
//! It is the one with the longest beginning of the prompt in its prefix cache, unless it has more than one and a half times as many
//! requests as the one with the fewest. What is in a cache is not asked of the engine's thread: the beginnings that each engine
//! was sent are remembered here, as hashes of their blocks. Those of prompts that still wait are among them, and some that the
//! cache has given up since: then a request may wait a little longer than it had to, and its answer is the same.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gptoss::BLOCK_TOKENS;

use crate::params::NO_SEED;
use crate::{Engine, Request, RequestHandle, Sink, SubmitError};

/// Engines that answer alike, each with a backend and caches of its own. Clones submit to the same engines, but what
/// [`Replicas::set`] changes is changed in one of them alone.
#[derive(Clone)]
pub struct Replicas {
    places: Vec<Place>,
    /// Its keys are random: nobody can choose prompts whose hashes are equal.
    hasher: RandomState,
    routes: Arc<Mutex<Routes>>,
}

/// What there is of one of the engines.
#[derive(Clone)]
pub enum Place {
    /// It serves, or did until it was lost a moment ago.
    Serving(Engine),
    /// It was lost, and another is being made.
    Loading,
    /// It was lost, and there will be no other.
    Gone,
}

impl Replicas {
    /// At least one engine.
    pub fn new(engines: Vec<Engine>) -> Replicas {
        let sent = engines.iter().map(Sent::new).collect();
        Replicas {
            places: engines.into_iter().map(Place::Serving).collect(),
            hasher: RandomState::new(),
            routes: Arc::new(Mutex::new(Routes { requests: 0, sent })),
        }
    }

    /// All places, in order.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// The engines that there are, with the numbers of their places.
    pub fn serving(&self) -> impl Iterator<Item = (usize, &Engine)> {
        self.places.iter().enumerate().filter_map(|(number, place)| match place {
            Place::Serving(engine) => Some((number, engine)),
            Place::Loading | Place::Gone => None,
        })
    }

    /// Changes what there is in a place. A new engine knows no prefix.
    pub fn set(&mut self, number: usize, place: Place) {
        if let Place::Serving(engine) = &place {
            self.routes().sent[number] = Sent::new(engine);
        }
        self.places[number] = place;
    }

    /// The same engines, of which the one in this place alone takes requests; none if there is no such place.
    #[must_use]
    pub fn only(&self, number: usize) -> Replicas {
        let place = |(i, place): (usize, &Place)| if i == number { place.clone() } else { Place::Gone };
        Replicas { places: self.places.iter().enumerate().map(place).collect(), ..self.clone() }
    }

    /// Refuses requests that belong together and could not wait together in these engines if nothing else did.
    ///
    /// # Errors
    /// [`SubmitError::TooMany`].
    pub fn fits(&self, requests: &[Request]) -> Result<(), SubmitError> {
        let limits: Vec<(usize, usize)> = self.serving().map(|(_, engine)| engine.queue_limits()).collect();
        let sum = |values: &mut dyn Iterator<Item = usize>| values.fold(0, usize::saturating_add);
        let prompts = (requests.len(), sum(&mut limits.iter().map(|&(requests, _)| requests)));
        let tokens = (
            sum(&mut requests.iter().map(|request| request.prompt.len())),
            sum(&mut limits.iter().map(|&(_, tokens)| tokens)),
        );
        let refused = |what, (found, most)| Err(SubmitError::TooMany { what, found, most });
        match limits.len() {
            // That there is none is for others to say.
            0 => Ok(()),
            _ if prompts.0 > prompts.1 => refused("prompts", prompts),
            // A prompt may always wait alone.
            engines if requests.len() > engines && tokens.0 > tokens.1 => refused("tokens", tokens),
            _ => Ok(()),
        }
    }

    /// Queues a request in one of the engines, whose place `sink` is told. As [`Engine::submit`] otherwise: a request that brings
    /// no seed has the one that it would have in an engine that takes them all.
    ///
    /// # Errors
    /// Those of [`Engine::submit`]; [`SubmitError::Full`] only if every queue is full.
    pub fn submit(
        &self,
        mut request: Request,
        sink: impl FnOnce(usize) -> Sink,
    ) -> Result<RequestHandle, SubmitError> {
        if let [Place::Serving(engine)] = &self.places[..] {
            return engine.submit(request, sink(0));
        }
        let blocks = self.blocks(&request);
        // Held until the request is in its queue, so that the next one finds it there.
        let mut routes = self.routes();
        let mut open = Vec::with_capacity(self.places.len());
        let mut refusal = SubmitError::ShuttingDown;
        for (number, engine) in self.serving() {
            match engine.queue(request.prompt.len()) {
                Ok(queue) => open.push((number, engine, queue)),
                Err(SubmitError::Full) => refusal = SubmitError::Full,
                Err(_) => {}
            }
        }
        let Some(fewest) = open.iter().map(|&(.., queue)| queue).min() else { return Err(refusal) };
        let key = |&(number, _, queue): &(usize, &Engine, usize)| {
            let sent = &routes.sent[number];
            (Reverse(sent.known(&blocks)), queue, sent.last)
        };
        open.retain(|&(.., queue)| 2 * queue <= 3 * fewest);
        let Some(&(number, engine, _)) = open.iter().min_by_key(|candidate| key(candidate)) else {
            return Err(refusal);
        };
        let count = routes.requests + 1;
        let own = request.params.seed.filter(|&seed| seed != NO_SEED);
        request.params.seed = own.or(Some(engine.seed(count) as i64));
        let handle = engine.submit(request, sink(number))?;
        routes.requests = count;
        routes.sent[number].add(count, &blocks);
        Ok(handle)
    }

    /// Forgets every cached prefix, before the next step of each engine.
    pub fn reset_prefix_cache(&self) {
        let mut routes = self.routes();
        for (number, engine) in self.serving() {
            engine.reset_prefix_cache();
            routes.sent[number] = Sent::new(engine);
        }
    }

    /// A hash of each full block of a prompt with all that is before it, its salt included.
    fn blocks(&self, request: &Request) -> Vec<u64> {
        if self.serving().all(|(_, engine)| engine.prefix_blocks() == 0) {
            return Vec::new();
        }
        let root = self.hasher.hash_one(&request.cache_salt);
        let next = |before: &mut u64, block| {
            *before = self.hasher.hash_one((*before, block));
            Some(*before)
        };
        request.prompt.chunks_exact(BLOCK_TOKENS).scan(root, next).collect()
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What went where.
struct Routes {
    /// Requests sent.
    requests: u64,
    /// To each place.
    sent: Vec<Sent>,
}

/// The blocks that an engine was sent, by their hashes. They are of two ages, of which the older is forgotten at once.
struct Sent {
    recent: HashSet<u64>,
    older: HashSet<u64>,
    /// Of each age: as many as the engine's cache holds.
    capacity: usize,
    /// The last request that the engine was sent.
    last: u64,
}

impl Sent {
    fn new(engine: &Engine) -> Sent {
        Sent { recent: HashSet::new(), older: HashSet::new(), capacity: engine.prefix_blocks(), last: 0 }
    }

    /// How many of a prompt's first blocks are there.
    fn known(&self, blocks: &[u64]) -> usize {
        blocks.iter().take_while(|&block| self.recent.contains(block) || self.older.contains(block)).count()
    }

    fn add(&mut self, request: u64, blocks: &[u64]) {
        self.last = request;
        // The last first, so that the heads of prefixes outlive their tails.
        for &block in blocks.iter().rev().filter(|_| self.capacity > 0) {
            if self.recent.len() >= self.capacity {
                self.older = std::mem::take(&mut self.recent);
            }
            self.recent.insert(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_and_what_is_asked_for_again_stays() {
        let mut sent = Sent { recent: HashSet::new(), older: HashSet::new(), capacity: 100, last: 0 };
        for request in 0..1000 {
            // A head that all share, and a tail of its own.
            let blocks: Vec<u64> = (0..5).chain((0..10).map(|i| 1000 + 10 * request + i)).collect();
            if request > 0 {
                assert_eq!(sent.known(&blocks), 5);
            }
            sent.add(request, &blocks);
            assert_eq!(sent.known(&blocks), 15);
            assert!(sent.recent.len() <= 100 && sent.older.len() <= 100);
        }
        // Longer than the memory: its head is kept.
        let long: Vec<u64> = (100_000..100_500).collect();
        sent.add(1000, &long);
        assert!((100..=200).contains(&sent.known(&long)));
    }

    #[test]
    fn a_cache_that_keeps_nothing_needs_no_memory() {
        let mut sent = Sent { recent: HashSet::new(), older: HashSet::new(), capacity: 0, last: 0 };
        sent.add(1, &[1, 2, 3]);
        assert_eq!((sent.known(&[1]), sent.recent.len(), sent.last), (0, 0, 1));
    }
}
