//! Decides what the next step computes: schedule, run, commit. Nothing here knows a model, text or time.
//!
//! First come, first served, among sequences of equal priority and turn. A step takes every decoding sequence, then chunks of prompts,
//! first come first, until the token budget is spent; then new sequences as long as their blocks suffice. When a decoding
//! sequence finds no block, the last in the order gives all of its blocks back and starts over later (its tokens are kept,
//! their keys and values computed again); so it does when one of a better priority finds no place. A paused sequence gives its
//! blocks back, too, so that a client that does not read holds nothing that others need.
//!
//! The answers of one request beyond the first are sequences of their own, added when the first has computed the prompt:
//! the prefix cache hands them its blocks, all but the last partial one, whose tokens each computes for itself. So no block is
//! written by two sequences, and none is copied.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::Arc;

use gptoss::{BLOCK_TOKENS, SequencePlan};

use crate::kv::{Blocks, Table, Tokens};

/// A sequence's place in the order of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    /// Less goes first.
    pub priority: i64,
    /// Of equal priority, less goes first: see [`crate::SchedulingPolicy::RoundRobin`].
    pub turn: u64,
    /// Serial number of the request.
    pub request: u64,
    /// Which of its answers.
    pub choice: usize,
}

/// What bounds a step.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences that hold blocks at a time.
    pub sequences: usize,
    /// Tokens per step; at least `sequences`.
    pub tokens: usize,
    /// Of these, tokens of one sequence's prompt.
    pub prompt_tokens: usize,
}

/// One sequence's share of the step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Whose.
    pub id: SequenceId,
    /// Positions to compute.
    pub positions: Range<usize>,
    /// They are the last known ones: a token can be drawn after them.
    pub complete: bool,
    /// Guesses of what follows, computed with them.
    pub guesses: Vec<u32>,
    /// The sequence had no part in the step before.
    pub begins: bool,
}

impl Share {
    fn new(id: SequenceId, positions: Range<usize>, complete: bool) -> Share {
        Share { id, positions, complete, guesses: Vec::new(), begins: false }
    }

    /// Tokens to compute.
    pub fn tokens(&self) -> usize {
        self.positions.len() + self.guesses.len()
    }

    /// It is the one token before the next that is drawn.
    pub fn decodes(&self) -> bool {
        self.complete && self.positions.len() == 1
    }
}

/// A new sequence.
#[derive(Debug)]
pub struct NewSequence {
    /// Its tokens.
    pub tokens: Tokens,
    /// Where its chain of blocks starts: [`crate::kv::SHARED`], or an identity of its own to keep its prefix apart.
    pub root: u64,
    /// At most this many positions may come from the prefix cache.
    pub cache_limit: usize,
}

/// The queues, and the blocks that they compete for.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    waiting: BTreeMap<SequenceId, Waiting>,
    running: BTreeMap<SequenceId, Running>,
    /// Held back until they are resumed.
    paused: BTreeMap<SequenceId, Waiting>,
    preemptions: u64,
    /// Those that were preempted since somebody asked.
    preempted: Vec<SequenceId>,
    prefix_queries: u64,
    prefix_hits: u64,
}

#[derive(Debug)]
struct Waiting {
    sequence: NewSequence,
    /// Of a sequence that starts over: what it found in the prefix cache the first time.
    cached: Option<usize>,
}

#[derive(Debug)]
struct Running {
    sequence: NewSequence,
    table: Table,
    /// Positions whose keys and values are stored.
    computed: usize,
    /// Those that came from the prefix cache when it began first.
    cached: usize,
}

impl Running {
    fn decoding(&self) -> bool {
        self.computed + 1 == self.sequence.tokens.len()
    }
}

impl Scheduler {
    /// Empty queues. The blocks must hold the longest sequence that will be added.
    pub fn new(limits: Limits, blocks: Blocks) -> Scheduler {
        Scheduler {
            limits,
            blocks,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            paused: BTreeMap::new(),
            preemptions: 0,
            preempted: Vec::new(),
            prefix_queries: 0,
            prefix_hits: 0,
        }
    }

    /// Queues a sequence.
    pub fn add(&mut self, id: SequenceId, sequence: NewSequence) {
        self.waiting.insert(id, Waiting { sequence, cached: None });
    }

    /// Removes a sequence, wherever it is, and frees its blocks.
    pub fn remove(&mut self, id: SequenceId) {
        self.waiting.remove(&id);
        self.paused.remove(&id);
        if let Some(running) = self.running.remove(&id) {
            self.blocks.close(running.table);
        }
    }

    /// Holds a sequence back, without its blocks, until [`Scheduler::resume`].
    pub fn pause(&mut self, id: SequenceId) {
        if let Some(waiting) = self.suspend(id).or_else(|| self.waiting.remove(&id)) {
            self.paused.insert(id, waiting);
        }
    }

    /// Queues a paused sequence in its old place.
    pub fn resume(&mut self, id: SequenceId) {
        if let Some(waiting) = self.paused.remove(&id) {
            self.waiting.insert(id, waiting);
        }
    }

    /// Whether a step has something to do.
    pub fn has_work(&self) -> bool {
        !self.running.is_empty() || !self.waiting.is_empty()
    }

    /// Chooses the next step's work and takes the blocks for it. Empty only if there is no work. `beside` says how many tokens prompts
    /// get at most beside a number of decoding sequences.
    pub fn schedule(&mut self, beside: impl FnOnce(usize) -> usize) -> Vec<Share> {
        let mut shares = Vec::new();
        let mut budget = self.limits.tokens;
        let before = self.preemptions;

        self.schedule_decodes(&mut shares, &mut budget);
        if !shares.is_empty() {
            budget = budget.min(beside(shares.len()));
        }
        let mut starved = self.schedule_prompts(&mut shares, &mut budget);
        while shares.is_empty()
            && let Some((&youngest, _)) = self.running.last_key_value()
        {
            // Prompts wait for one another's blocks.
            self.preempt(youngest);
            starved = self.schedule_prompts(&mut shares, &mut budget);
        }
        if self.running.is_empty() || (self.preemptions == before && !starved) {
            self.admit(&mut shares, &mut budget);
        }
        shares
    }

    /// Adds guesses to the share of a decoding sequence, as many as there are blocks for without taking what others need.
    pub fn guess(&mut self, share: &mut Share, mut guesses: Vec<u32>) {
        let reserve = self.running.len();
        let Some(running) = self.running.get_mut(&share.id) else { return };
        let end = share.positions.end;
        let held = running.table.full().len().min(running.table.sliding().len());
        let more = (end + guesses.len()).div_ceil(BLOCK_TOKENS).saturating_sub(held);
        let reach = match self.blocks.free() >= more + reserve {
            true => end + guesses.len(),
            false => held * BLOCK_TOKENS,
        };
        let reach = self.blocks.grow(&mut running.table, reach);
        guesses.truncate(reach.saturating_sub(end));
        share.guesses = guesses;
    }

    /// What the backend needs to know about a share.
    pub fn plan(&self, share: &Share) -> SequencePlan {
        let running = &self.running[&share.id];
        let mut tokens = running.sequence.tokens.range(share.positions.clone());
        tokens.extend(&share.guesses);
        SequencePlan {
            tokens,
            position: share.positions.start,
            full_blocks: Arc::clone(running.table.full()),
            sliding_blocks: Arc::clone(running.table.sliding()),
            ..SequencePlan::default()
        }
    }

    /// A share was computed. The sequence may be gone.
    pub fn commit(&mut self, share: &Share) {
        if let Some(running) = self.running.get_mut(&share.id) {
            running.computed = share.positions.end;
            self.blocks.advance(&mut running.table, &running.sequence.tokens, running.computed);
        }
    }

    /// Appends a drawn token to a running sequence; the result is its new length.
    pub fn push(&mut self, id: SequenceId, token: u32) -> usize {
        let Some(running) = self.running.get_mut(&id) else { return 0 };
        running.sequence.tokens.push(token);
        running.sequence.tokens.len()
    }

    /// So many guesses of a share were right, and have been appended: what was computed for them stays.
    pub fn accept(&mut self, id: SequenceId, guesses: usize) {
        if let Some(running) = self.running.get_mut(&id) {
            running.computed += guesses;
            self.blocks.advance(&mut running.table, &running.sequence.tokens, running.computed);
        }
    }

    /// All blocks of all sequences are given back, and nothing that was computed is trusted any more.
    pub fn start_over(&mut self) {
        while let Some((&last, _)) = self.running.last_key_value()
            && let Some(waiting) = self.suspend(last)
        {
            self.waiting.insert(last, waiting);
        }
        self.blocks.reset_prefixes();
    }

    /// Sequences that run at a time from now on, at most.
    pub fn limit(&mut self, sequences: usize) {
        self.limits.sequences = sequences;
    }

    /// The tokens of a running sequence.
    pub fn tokens(&self, id: SequenceId) -> Option<&Tokens> {
        self.running.get(&id).map(|running| &running.sequence.tokens)
    }

    /// Changes how many positions a sequence may take from the prefix cache, should it have to start over.
    pub fn set_cache_limit(&mut self, id: SequenceId, limit: usize) {
        if let Some(running) = self.running.get_mut(&id) {
            running.sequence.cache_limit = limit;
        }
    }

    /// Positions of a running sequence that came from the prefix cache when it began.
    pub fn cached_tokens(&self, id: SequenceId) -> usize {
        self.running.get(&id).map_or(0, |r| r.cached)
    }

    /// The sequences that hold blocks, oldest first.
    pub fn running(&self) -> impl ExactSizeIterator<Item = SequenceId> + '_ {
        self.running.keys().copied()
    }

    /// The number of sequences that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The number of sequences that are held back.
    pub fn paused(&self) -> usize {
        self.paused.len()
    }

    /// The blocks.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// An identity for [`NewSequence::root`].
    pub fn new_identity(&mut self) -> u64 {
        self.blocks.new_identity()
    }

    /// Forgets every cached prefix.
    pub fn reset_prefixes(&mut self) {
        self.blocks.reset_prefixes();
    }

    /// Times a sequence gave its blocks back.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// The sequences that were preempted since the last call.
    pub fn take_preempted(&mut self) -> Vec<SequenceId> {
        std::mem::take(&mut self.preempted)
    }

    /// Tokens looked up in the prefix cache and found there by sequences that began, so far.
    pub fn prefix_counts(&self) -> (u64, u64) {
        (self.prefix_queries, self.prefix_hits)
    }

    /// Panics if a block is lost or held wrongly. For tests.
    pub fn check(&self) {
        self.blocks.check(self.running.values().map(|r| &r.table));
    }

    fn schedule_decodes(&mut self, shares: &mut Vec<Share>, budget: &mut usize) {
        let mut from = Bound::Unbounded;
        loop {
            let mut starved = None;
            let rest = self.running.range_mut((from, Bound::Unbounded));
            for (&id, running) in rest.filter(|(_, r)| r.decoding()) {
                let end = running.sequence.tokens.len();
                if *budget == 0 {
                    return;
                }
                if self.blocks.grow(&mut running.table, end) < end {
                    starved = Some(id);
                    break;
                }
                shares.push(Share::new(id, end - 1..end, true));
                *budget -= 1;
            }
            let Some(id) = starved else { return };
            // Victims are younger than what was planned so far, so the plan stays valid; the last victim is this one.
            let youngest = *self.running.last_key_value().expect("this one is running").0;
            self.preempt(youngest);
            from = Bound::Included(id);
        }
    }

    /// Whether some prompt found no block.
    fn schedule_prompts(&mut self, shares: &mut Vec<Share>, budget: &mut usize) -> bool {
        for (&id, running) in self.running.iter_mut().filter(|(_, r)| !r.decoding()) {
            let start = running.computed;
            let most = self.limits.prompt_tokens.min(*budget);
            let end = running.sequence.tokens.len().min(start + most);
            let end = self.blocks.grow(&mut running.table, end).min(end);
            if end > start {
                shares.push(Share::new(id, start..end, end == running.sequence.tokens.len()));
                *budget -= end - start;
            } else if *budget > 0 {
                return true;
            }
        }
        false
    }

    fn admit(&mut self, shares: &mut Vec<Share>, budget: &mut usize) {
        while *budget > 0
            && let Some((&id, Waiting { sequence, .. })) = self.waiting.first_key_value()
        {
            let places = self.limits.sequences.saturating_sub(self.running.len());
            // A block for each running sequence stays free, so that admitting does not force preempting at once.
            let reserve = self.running.len();
            let opened = match places {
                0 => None,
                _ => self.blocks.open(sequence.root, &sequence.tokens, sequence.cache_limit, reserve),
            };
            let Some((mut table, cached)) = opened else {
                match self.running.last_key_value() {
                    Some((&last, _)) if last.priority > id.priority => {
                        self.preempt(last);
                        *budget += shares.iter().filter(|s| s.id == last).map(Share::tokens).sum::<usize>();
                        shares.retain(|share| share.id != last);
                        continue;
                    }
                    _ => return,
                }
            };
            let end = sequence.tokens.len().min(cached + self.limits.prompt_tokens.min(*budget));
            let end = self.blocks.grow(&mut table, end);
            let complete = end == sequence.tokens.len();
            let Some(Waiting { sequence, cached: first }) = self.waiting.remove(&id) else { return };
            if first.is_none() {
                self.prefix_queries += sequence.tokens.len() as u64;
                self.prefix_hits += cached as u64;
            }
            shares.push(Share { begins: true, ..Share::new(id, cached..end, complete) });
            *budget -= end - cached;
            let running = Running { sequence, table, computed: cached, cached: first.unwrap_or(cached) };
            self.running.insert(id, running);
        }
    }

    fn preempt(&mut self, id: SequenceId) {
        if let Some(waiting) = self.suspend(id) {
            self.waiting.insert(id, waiting);
            self.preemptions += 1;
            self.preempted.push(id);
        }
    }

    /// Takes a running sequence's blocks from it.
    fn suspend(&mut self, id: SequenceId) -> Option<Waiting> {
        let running = self.running.remove(&id)?;
        self.blocks.close(running.table);
        Some(Waiting { sequence: running.sequence, cached: Some(running.cached) })
    }
}
