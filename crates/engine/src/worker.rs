//! The engine's thread: takes what arrives, runs step after step, and turns results into events.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gptoss::{
    Backend, Logprobs, Mask, Penalties, Plan, Sampled, Sampling, Score, SequenceOutput, SequencePlan,
    TokenLogprobs,
};
use harmony::Harmony;
use tokenizer::Tokenizer;

use crate::engine::{Job, Phase, Shared};
use crate::kv::{SHARED, Tokens};
use crate::masks::{Constraint, Masks};
use crate::output::{Output, Rules};
use crate::scheduler::{NewSequence, Scheduler, SequenceId, Share};
use crate::{Event, Failure, FinishReason, Request, Sink, StopReason};

pub(crate) struct Worker {
    backend: Box<dyn Backend>,
    shared: Arc<Shared>,
    scheduler: Scheduler,
    requests: BTreeMap<u64, Active>,
    masks: Masks,
    settings: Settings,
    vocab_size: usize,
    prompt_tokens: u64,
    generated_tokens: u64,
    steps: u64,
    failed_steps: u64,
    last_failed: bool,
}

/// What stays the same for the engine's life.
pub(crate) struct Settings {
    pub(crate) harmony: Arc<Harmony>,
    /// The model's own stop tokens.
    pub(crate) eos_ids: Vec<u32>,
    /// Longest sequence.
    pub(crate) max_model_len: usize,
    /// Of requests without one.
    pub(crate) seed: u64,
    pub(crate) prefix_caching: bool,
}

/// A request that is in the scheduler.
struct Active {
    sink: Sink,
    rules: Arc<Rules>,
    prompt: Arc<[u32]>,
    /// Where its chain of blocks starts.
    root: u64,
    seed: u64,
    /// Log-probabilities of the prompt so far, if asked.
    scores: Option<Vec<Option<TokenLogprobs>>>,
    arrival: Instant,
    /// From the arrival to the first step.
    queued: Option<Duration>,
    /// The prompt was computed.
    started: bool,
    /// `None`: ended.
    choices: Vec<Option<Choice>>,
}

struct Choice {
    output: Output,
    /// For penalties: each token of prompt and output, with its occurrences in the output.
    seen: BTreeMap<u32, u32>,
    /// The last tokens, as many as the longest bad word has before its last.
    recent: VecDeque<u32>,
    /// Tokens that must come next, whatever the model says.
    forced: VecDeque<u32>,
    /// Made when its first token is about to be drawn.
    constraint: Option<Constraint>,
}

impl Worker {
    pub(crate) fn new(
        backend: Box<dyn Backend>,
        shared: Arc<Shared>,
        scheduler: Scheduler,
        masks: Masks,
        settings: Settings,
    ) -> Worker {
        Worker {
            vocab_size: backend.config().vocab_size,
            backend,
            shared,
            scheduler,
            requests: BTreeMap::new(),
            masks,
            settings,
            prompt_tokens: 0,
            generated_tokens: 0,
            steps: 0,
            failed_steps: 0,
            last_failed: false,
        }
    }

    pub(crate) fn run(mut self) {
        loop {
            let idle = self.requests.is_empty();
            let mut mailbox = self.shared.wait_while(|mailbox| {
                idle && mailbox.phase == Phase::Serving
                    && mailbox.incoming.is_empty()
                    && mailbox.cancelled.is_empty()
                    && !mailbox.reset_prefixes
            });
            let incoming = std::mem::take(&mut mailbox.incoming);
            let cancelled = std::mem::take(&mut mailbox.cancelled);
            let reset = std::mem::take(&mut mailbox.reset_prefixes);
            let phase = mailbox.phase;
            drop(mailbox);

            for job in incoming {
                self.accept(job);
            }
            for number in cancelled {
                self.retire(number);
            }
            if reset {
                self.scheduler.reset_prefixes();
            }
            if phase >= Phase::Aborting || (phase == Phase::Draining && self.requests.is_empty()) {
                // What is left is told on the way out.
                return;
            }
            if !self.requests.is_empty() {
                self.step();
            }
            self.publish(None);
        }
    }

    fn accept(&mut self, job: Job) {
        let Job { number, arrival, request: Request { prompt, params, output, grammar }, sink } = job;
        let mut stop_tokens = params.stop_token_ids.clone();
        if !params.ignore_eos {
            stop_tokens.extend(&self.settings.eos_ids);
        }
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        let prompt: Arc<[u32]> = prompt.into();
        let root = if self.settings.prefix_caching { SHARED } else { self.scheduler.new_identity() };
        let scores = params.prompt_logprobs.map(|_| vec![None]);
        // Scores need the prompt computed.
        let cache_limit = if scores.is_some() { 0 } else { prompt.len() };
        let sequence = NewSequence { tokens: Tokens::new(Arc::clone(&prompt)), root, cache_limit };
        self.scheduler.add(SequenceId { request: number, choice: 0 }, sequence);
        let seed = params.seed.map_or_else(|| scramble(self.settings.seed ^ scramble(number)), |s| s as u64);
        let rules = Arc::new(Rules {
            harmony: Arc::clone(&self.settings.harmony),
            mode: output,
            stop_tokens,
            allowed: params.allowed_token_ids.as_deref().map(Mask::of),
            bad_words: bad_words(&params.bad_words, self.settings.harmony.tokenizer()),
            grammar,
            params,
        });
        let choices = (0..rules.params.n).map(|_| Some(Choice::new(&rules, &prompt))).collect();
        self.requests.insert(
            number,
            Active {
                sink,
                rules,
                prompt,
                root,
                seed,
                scores,
                arrival,
                queued: None,
                started: false,
                choices,
            },
        );
    }

    /// Schedule, run, commit.
    fn step(&mut self) {
        let shares = self.scheduler.schedule();
        for share in &shares {
            if let Some(active) = self.requests.get_mut(&share.id.request) {
                active.queued.get_or_insert_with(|| active.arrival.elapsed());
            }
        }
        shares.iter().filter(|share| share.complete).for_each(|share| self.constrain(share.id));
        let sequences = shares.iter().map(|share| self.plan(share)).collect();
        let plan = Plan { sequences };
        self.publish(Some(Instant::now()));
        let result = catch_unwind(AssertUnwindSafe(|| self.backend.step(&plan)));
        let outputs = match result {
            Ok(Ok(outputs)) => check(&plan, outputs, self.vocab_size),
            Ok(Err(error)) => Err(error.to_string()),
            Err(panic) => Err(panic_message(panic.as_ref())),
        };
        match outputs {
            Ok(outputs) => {
                self.steps += 1;
                self.last_failed = false;
                for (share, output) in shares.iter().zip(outputs) {
                    let committed = catch_unwind(AssertUnwindSafe(|| self.commit(share, output)));
                    if let Err(panic) = committed {
                        self.fail(share.id.request, &panic_message(panic.as_ref()));
                    }
                }
            }
            Err(message) => {
                tracing::error!("a step failed: {message}");
                self.failed_steps += 1;
                self.last_failed = true;
                self.fail_running(&message);
            }
        }
    }

    /// Sees to it that a choice with a grammar has its mask in the making.
    fn constrain(&mut self, id: SequenceId) {
        let Some(active) = self.requests.get_mut(&id.request) else { return };
        let (rules, choice) = (&active.rules, &mut active.choices[id.choice]);
        if let (Some(grammar), Some(choice)) = (&rules.grammar, choice)
            && choice.constraint.is_none()
            && rules.params.max_tokens != Some(0)
        {
            let may_stop = choice.output.may_stop();
            choice.constraint = Some(Constraint::new(&self.masks, rules, grammar, may_stop));
        }
    }

    fn plan(&self, share: &Share) -> SequencePlan {
        let mut plan = self.scheduler.plan(share);
        let active = &self.requests[&share.id.request];
        let params = &active.rules.params;
        // Only the first choice runs before the request has begun, and never beyond the prompt.
        if let (Some(top), false) = (params.prompt_logprobs, active.started) {
            let end = (share.positions.end + 1).min(active.prompt.len());
            let next = active.prompt[share.positions.start + 1..end].to_vec();
            plan.score = Some(Score { next, top });
        }
        if share.complete
            && params.max_tokens != Some(0)
            && let Some(choice) = &active.choices[share.id.choice]
        {
            plan.sample = vec![choice.sampling(active, share.id.choice, share.positions.end)];
        }
        plan
    }

    /// Writes one sequence's results back and tells its request.
    fn commit(&mut self, share: &Share, output: SequenceOutput) {
        self.scheduler.commit(share);
        let number = share.id.request;
        // An earlier share of the same request may have cancelled it.
        let Some(active) = self.requests.get_mut(&number) else { return };
        if let Some(scores) = &mut active.scores {
            // After a preemption the first of these may be known.
            let known = scores.len() - share.positions.start - 1;
            scores.extend(output.scores.into_iter().skip(known).map(Some));
            self.scheduler.set_cache_limit(share.id, scores.len() - 1);
        }
        if !share.complete {
            return;
        }
        if !active.started {
            self.begin(share.id);
        }
        for sampled in output.sampled {
            self.take_token(share.id, sampled);
        }
    }

    /// The prompt is computed: the other choices can share its blocks.
    fn begin(&mut self, first: SequenceId) {
        let Some(active) = self.requests.get_mut(&first.request) else { return };
        active.started = true;
        let prompt_len = active.prompt.len();
        self.prompt_tokens += prompt_len as u64;
        self.shared.mailbox().queued_tokens -= prompt_len;
        let event = Event::Started {
            cached_tokens: self.scheduler.cached_tokens(first),
            queued: active.queued.unwrap_or_default(),
            prompt_logprobs: active.scores.take(),
        };
        if !tell(&mut active.sink, event) {
            return self.retire(first.request);
        }
        if active.rules.params.max_tokens == Some(0) {
            for choice in 0..active.choices.len() {
                self.finish(SequenceId { choice, ..first }, FinishReason::Length, None);
            }
            return;
        }
        for choice in 1..active.choices.len() {
            let sequence = NewSequence {
                tokens: Tokens::new(Arc::clone(&active.prompt)),
                root: active.root,
                cache_limit: prompt_len,
            };
            self.scheduler.add(SequenceId { choice, ..first }, sequence);
        }
    }

    fn take_token(&mut self, id: SequenceId, sampled: Sampled) {
        let Some(active) = self.requests.get_mut(&id.request) else { return };
        let Some(choice) = &mut active.choices[id.choice] else { return };
        let token = sampled.token;
        if let Some(failure) = choice.constraint.as_ref().and_then(Constraint::failure) {
            return self.end(id.request, Event::Failed(Failure::Grammar(failure)));
        }
        self.generated_tokens += 1;
        let room = self.scheduler.push(id, token) < self.settings.max_model_len;
        if !choice.seen.is_empty() {
            *choice.seen.entry(token).or_default() += 1;
        }
        let piece = choice.output.push(token, room);
        choice.advance(token, &active.rules, piece.end.is_some());
        let tokens = Event::Tokens {
            choice: id.choice,
            token_ids: vec![token],
            text: piece.text,
            deltas: piece.deltas,
            logprobs: sampled.logprobs.into_iter().collect(),
        };
        if !tell(&mut active.sink, tokens) {
            self.retire(id.request);
        } else if let Some((reason, stop)) = piece.end {
            self.finish(id, reason, stop);
        }
    }

    /// Ends a choice, and the request with its last.
    fn finish(&mut self, id: SequenceId, reason: FinishReason, stop: Option<StopReason>) {
        self.scheduler.remove(id);
        let Some(active) = self.requests.get_mut(&id.request) else { return };
        let Some(Choice { output, .. }) = active.choices[id.choice].take() else { return };
        let finished = Event::Finished {
            choice: id.choice,
            reason,
            stop,
            completion_tokens: output.generated(),
            reasoning_tokens: output.reasoning_tokens(),
            repairs: output.repairs(),
        };
        if !tell(&mut active.sink, finished) {
            self.retire(id.request);
        } else if active.choices.iter().all(Option::is_none) {
            self.end(id.request, Event::Done);
        }
    }

    /// Fails every request that holds blocks. What is stored in them is not trusted any more.
    fn fail_running(&mut self, message: &str) {
        let failed: BTreeSet<u64> = self.scheduler.running().map(|id| id.request).collect();
        for number in failed {
            self.fail(number, message);
        }
        self.scheduler.reset_prefixes();
    }

    fn fail(&mut self, number: u64, message: &str) {
        self.end(number, Event::Failed(Failure::Device(message.to_owned())));
    }

    /// Removes a request, if it is there, without a word.
    fn retire(&mut self, number: u64) {
        if let Some(active) = self.remove(number) {
            discard(active);
        }
    }

    /// Removes a request, if it is there, with a last event. By then its place in the queue is free.
    fn end(&mut self, number: u64, event: Event) {
        if let Some(mut active) = self.remove(number) {
            tell(&mut active.sink, event);
            discard(active);
        }
    }

    /// Frees what a request holds.
    fn remove(&mut self, number: u64) -> Option<Active> {
        let active = self.requests.remove(&number)?;
        for choice in 0..active.choices.len() {
            self.scheduler.remove(SequenceId { request: number, choice });
        }
        let mut mailbox = self.shared.mailbox();
        mailbox.open -= 1;
        if !active.started {
            mailbox.queued_tokens -= active.prompt.len();
        }
        drop(mailbox);
        self.publish(None);
        Some(active)
    }

    fn publish(&self, step_started: Option<Instant>) {
        let blocks = self.scheduler.blocks();
        let (prefix_queries, prefix_hits) = self.scheduler.prefix_counts();
        let (full_blocks_used, full_blocks) = blocks.full_usage();
        let (sliding_blocks_used, sliding_blocks) = blocks.sliding_usage();
        *self.shared.stats() = crate::Stats {
            running: self.scheduler.running().len(),
            waiting: self.scheduler.waiting(),
            full_blocks_used,
            full_blocks,
            sliding_blocks_used,
            sliding_blocks,
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
            prefix_queries,
            prefix_hits,
            preemptions: self.scheduler.preemptions(),
            steps: self.steps,
            failed_steps: self.failed_steps,
            unhealthy: self.last_failed,
            step_started,
        };
    }
}

/// However the thread ends, no request is left without an answer.
impl Drop for Worker {
    fn drop(&mut self) {
        let panicking = std::thread::panicking();
        let failure = match panicking {
            true => Failure::Device("the engine's thread panicked".to_owned()),
            false => Failure::ShuttingDown,
        };
        let mut mailbox = self.shared.mailbox();
        mailbox.phase = Phase::Ended;
        let incoming = std::mem::take(&mut mailbox.incoming);
        (mailbox.open, mailbox.queued_tokens) = (0, 0);
        drop(mailbox);
        for (number, mut active) in std::mem::take(&mut self.requests) {
            tell(&mut active.sink, Event::Failed(failure.clone()));
            // After a panic the scheduler is not asked for anything.
            for choice in (0..active.choices.len()).filter(|_| !panicking) {
                self.scheduler.remove(SequenceId { request: number, choice });
            }
        }
        for mut job in incoming {
            tell(&mut job.sink, Event::Failed(failure.clone()));
        }
        if panicking {
            self.shared.stats().unhealthy = true;
        } else {
            self.publish(None);
        }
        self.shared.enter(Phase::Ended);
    }
}

impl Choice {
    fn new(rules: &Arc<Rules>, prompt: &[u32]) -> Choice {
        let params = &rules.params;
        let penalized = params.repetition_penalty != 1.0
            || params.frequency_penalty != 0.0
            || params.presence_penalty != 0.0;
        let seen = if penalized { prompt.iter().map(|&t| (t, 0)).collect() } else { BTreeMap::new() };
        let output = Output::new(Arc::clone(rules));
        let mut choice =
            Choice { output, seen, recent: VecDeque::new(), forced: VecDeque::new(), constraint: None };
        // A budget of nothing may be spent in the prompt.
        choice.conclude(rules);
        choice
    }

    /// Takes note of a token that was drawn; `last`: none comes after it.
    fn advance(&mut self, token: u32, rules: &Rules, last: bool) {
        if last {
            return;
        }
        let longest = rules.bad_words.iter().map(Vec::len).max().unwrap_or(0);
        if longest > 1 {
            if self.recent.len() + 1 == longest {
                self.recent.pop_front();
            }
            self.recent.push_back(token);
        }
        if self.forced.front() == Some(&token) {
            self.forced.pop_front();
        }
        self.conclude(rules);
        if let Some(constraint) = &mut self.constraint {
            constraint.advance(token, self.output.may_stop());
        }
    }

    /// Ends the reasoning if its budget is spent.
    fn conclude(&mut self, rules: &Rules) {
        if self.forced.is_empty() && self.output.must_conclude() {
            self.forced.extend(rules.harmony.conclusion());
            // What comes after the reasoning is the grammar's to say.
            if rules.grammar.is_some() {
                self.forced.truncate(1);
            }
        }
    }

    /// What may be drawn, if not everything.
    fn mask(&self, rules: &Rules) -> Option<Mask> {
        match (self.forced.front(), &self.constraint) {
            (Some(&token), _) => Some(Mask::of(&[token])),
            (None, Some(constraint)) => Some(constraint.mask()),
            (None, None) => rules.allowed.clone(),
        }
    }

    /// How the token at `position` is drawn.
    fn sampling(&self, active: &Active, choice: usize, position: usize) -> Sampling {
        let params = &active.rules.params;
        let mut bias: Vec<(u32, f32)> = params.logit_bias.iter().map(|(&t, &b)| (t, b)).collect();
        // A grammar's mask sees to it itself.
        if !self.output.may_stop() && self.constraint.is_none() {
            bias.extend(active.rules.stop_tokens.iter().map(|&t| (t, f32::NEG_INFINITY)));
        }
        if self.forced.is_empty() {
            let completed = |word: &Vec<u32>| {
                let (&last, before) = word.split_last()?;
                let recent = self.recent.iter().rev().take(before.len());
                recent.eq(before.iter().rev()).then_some((last, f32::NEG_INFINITY))
            };
            bias.extend(active.rules.bad_words.iter().filter_map(completed));
        }
        Sampling {
            mask: self.mask(&active.rules),
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            seed: choice_seed(active.seed, choice),
            position: position as u64,
            bias,
            penalties: (!self.seen.is_empty()).then(|| Penalties {
                repetition: params.repetition_penalty,
                frequency: params.frequency_penalty,
                presence: params.presence_penalty,
                seen: self.seen.iter().map(|(&t, &n)| (t, n)).collect(),
            }),
            logprobs: params.logprobs.map(|top| Logprobs { top, ..Logprobs::default() }),
        }
    }
}

/// The tokens of each word, as it is and after a space.
fn bad_words(words: &[String], tokenizer: &Tokenizer) -> Vec<Vec<u32>> {
    words.iter().flat_map(|word| [tokenizer.encode(word), tokenizer.encode(&format!(" {word}"))]).collect()
}

/// The generator's key for one choice of a request: the request's seed for the first.
pub(crate) fn choice_seed(seed: u64, choice: usize) -> u64 {
    seed.wrapping_add((choice as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The finalizer of SplitMix64: spreads small numbers over all 64 bits.
fn scramble(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A backend that answers something else than it was asked is a failed device.
fn check(
    plan: &Plan,
    outputs: Vec<SequenceOutput>,
    vocab_size: usize,
) -> Result<Vec<SequenceOutput>, String> {
    if outputs.len() != plan.sequences.len() {
        return Err(format!("{} results for {} sequences", outputs.len(), plan.sequences.len()));
    }
    for (asked, got) in plan.sequences.iter().zip(&outputs) {
        let scores = asked.score.as_ref().map_or(0, |s| s.next.len());
        if got.scores.len() != scores || got.sampled.len() != asked.sample.len() {
            return Err("a result has not what was asked".to_owned());
        }
        if let Some(sampled) = got.sampled.iter().find(|s| s.token as usize >= vocab_size) {
            return Err(format!("token {} was drawn from a vocabulary of {vocab_size}", sampled.token));
        }
    }
    Ok(outputs)
}

/// A sink that panics wants no more.
fn tell(sink: &mut Sink, event: Event) -> bool {
    catch_unwind(AssertUnwindSafe(|| sink(event))).unwrap_or_else(|panic| {
        tracing::error!("the sink of a request panicked: {}", panic_message(panic.as_ref()));
        false
    })
}

/// What a sink owns may panic when it is dropped.
fn discard(active: Active) {
    let _ = catch_unwind(AssertUnwindSafe(|| drop(active)));
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text =
        panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panic: {}", text.unwrap_or("without a message"))
}
