//! The engine's thread: takes what arrives, runs step after step, and turns results into events.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gptoss::{
    Backend, Logprobs, Mask, Penalties, Plan, Sampled, Sampling, Score, SequenceOutput, SequencePlan,
    TokenLogprobs,
};
use harmony::{Guard, Harmony, Place};

use crate::costs::{Costs, MAX_STEP_TOKENS};
use crate::engine::{Job, Phase, Shared};
use crate::grammar::Grammar;
use crate::guards::Guards;
use crate::kv::{SHARED, Tokens};
use crate::masks::{Constraint, Masks, others};
use crate::outbox::{News, Outbox};
use crate::output::{End, Output, Rules, Transcript};
use crate::scheduler::{NewSequence, Scheduler, SequenceId, Share};
use crate::speculation::{Chance, Guesser};
use crate::turns::Turns;
use crate::{
    Event, Failure, FinishReason, OutputMode, Request, SchedulingPolicy, Speculation, SpeculationCounts,
};

pub(crate) struct Worker {
    backend: Box<dyn Backend>,
    shared: Arc<Shared>,
    scheduler: Scheduler,
    requests: BTreeMap<u64, Active>,
    outbox: Outbox,
    masks: Masks,
    guards: Guards,
    settings: Settings,
    vocab_size: usize,
    /// Where the chains of blocks of each salt start.
    salts: HashMap<String, u64>,
    turns: Turns,
    costs: Costs,
    speculation: SpeculationCounts,
    prompt_tokens: u64,
    generated_tokens: u64,
    steps: u64,
    failed_steps: u64,
    corrupted_requests: u64,
    /// Steps that failed since the last that did not.
    failures: u32,
    /// After repeated failures: how many sequences may run, one more each step, to find out whose fault it is.
    cautious: Option<usize>,
    /// The device can do nothing any more: why.
    lost: Option<String>,
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
    pub(crate) policy: SchedulingPolicy,
    pub(crate) prefix_caching: bool,
    pub(crate) even_steps: bool,
    pub(crate) speculation: Option<Speculation>,
    pub(crate) harmony_guard: bool,
    pub(crate) processed_logprobs: bool,
    /// Sequences that run at a time.
    pub(crate) sequences: usize,
    /// Full and sliding blocks of the backend.
    pub(crate) blocks: (usize, usize),
}

/// A request that is in the scheduler.
struct Active {
    rules: Arc<Rules>,
    /// Of its first choice.
    id: SequenceId,
    /// Who takes turns with others.
    client: Option<[u8; 32]>,
    prompt: Arc<[u32]>,
    /// For penalties: each token of the prompt once, ascending. Made when the first token is about to be drawn.
    said: Option<Arc<[u32]>>,
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
    /// Failed steps that it was part of.
    faults: u32,
    /// `None`: ended.
    choices: Vec<Option<Choice>>,
}

struct Choice {
    output: Output,
    /// If there are any; with the tokens of the prompt from the first token that is drawn on.
    penalties: Option<Penalties>,
    /// The last tokens, as many as the longest bad word has before its last.
    recent: VecDeque<u32>,
    /// Tokens that must come next, whatever the model says.
    forced: VecDeque<u32>,
    /// Made when its first token is about to be drawn.
    constraint: Option<Constraint>,
    /// What guards the format, if anything does, and where in that it is. Made when its first token is about to be drawn.
    guard: Option<(Arc<Guard>, Place)>,
    guesser: Guesser,
    /// Times that it gave its blocks to an older one.
    preemptions: usize,
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
            outbox: Outbox::default(),
            masks,
            guards: Guards::default(),
            settings,
            salts: HashMap::new(),
            turns: Turns::default(),
            costs: Costs::default(),
            speculation: SpeculationCounts::default(),
            prompt_tokens: 0,
            generated_tokens: 0,
            steps: 0,
            failed_steps: 0,
            corrupted_requests: 0,
            failures: 0,
            cautious: None,
            lost: None,
        }
    }

    pub(crate) fn run(mut self) {
        loop {
            let (idle, empty) = (!self.scheduler.has_work(), self.requests.is_empty());
            let mut mailbox = self.shared.wait_while(|mailbox| {
                let goes_on = match mailbox.phase {
                    Phase::Serving => true,
                    Phase::Draining => !empty,
                    Phase::Aborting | Phase::Abandoned | Phase::Ended => false,
                };
                idle && goes_on
                    && mailbox.incoming.is_empty()
                    && mailbox.cancelled.is_empty()
                    && mailbox.valves.is_empty()
                    && !mailbox.reset_prefixes
            });
            let incoming = std::mem::take(&mut mailbox.incoming);
            let cancelled = std::mem::take(&mut mailbox.cancelled);
            let valves = std::mem::take(&mut mailbox.valves);
            let reset = std::mem::take(&mut mailbox.reset_prefixes);
            let phase = mailbox.phase;
            drop(mailbox);

            for job in incoming {
                self.accept(job);
            }
            self.retire_all(cancelled);
            for (number, open) in valves {
                self.turn_valve(number, open);
            }
            if reset {
                self.scheduler.reset_prefixes();
            }
            if phase >= Phase::Aborting || (phase == Phase::Draining && self.requests.is_empty()) {
                // What is left is told on the way out.
                return;
            }
            if self.scheduler.has_work() {
                self.step();
            }
            if !self.scheduler.has_work() {
                // There is no next step to tell it meanwhile.
                let unwanted = self.outbox.tell();
                self.retire_all(unwanted);
            }
            self.publish(None);
            if self.lost.is_some() {
                return;
            }
        }
    }

    /// Holds all choices of a request back, or lets them go on.
    fn turn_valve(&mut self, number: u64, open: bool) {
        let Some(active) = self.requests.get(&number) else { return };
        for choice in 0..active.choices.len() {
            let id = SequenceId { choice, ..active.id };
            if open { self.scheduler.resume(id) } else { self.scheduler.pause(id) }
        }
    }

    fn accept(&mut self, job: Job) {
        let Job { number, arrival, request, sink } = job;
        let Request { prompt, params, output, grammar, priority, client, cache_salt, guarded } = request;
        let mut stop_tokens = params.stop_token_ids.clone();
        if !params.ignore_eos {
            stop_tokens.extend(&self.settings.eos_ids);
        }
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        let prompt: Arc<[u32]> = prompt.into();
        let root = self.root(cache_salt);
        let scores = params.prompt_logprobs.map(|_| vec![None]);
        // Scores need the prompt computed.
        let cache_limit = if scores.is_some() { 0 } else { usize::MAX };
        let sequence = NewSequence { tokens: Tokens::new(Arc::clone(&prompt)), root, cache_limit };
        let turn = match self.settings.policy {
            SchedulingPolicy::RoundRobin => self.turns.next(client),
            _ => 0,
        };
        let id = SequenceId { priority, turn, request: number, choice: 0 };
        self.scheduler.add(id, sequence);
        let seed = params.seed.map_or_else(|| default_seed(self.settings.seed, number), |s| s as u64);
        // Who forbids tokens may forbid all that the format allows.
        let free = params.allowed_token_ids.is_none() && params.bad_words.is_empty() && grammar.is_none();
        let rules = Arc::new(Rules {
            guarded: free && guarded && self.settings.harmony_guard,
            harmony: Arc::clone(&self.settings.harmony),
            mode: output,
            stop_tokens,
            grammar,
            params,
        });
        let choices = (0..rules.params.n).map(|_| Some(Choice::new(&rules))).collect();
        let read_later = if rules.text_decides() { 0 } else { rules.params.n };
        let transcripts = (0..read_later).map(|_| Transcript::new(Arc::clone(&rules))).collect();
        self.outbox.open(number, sink, transcripts);
        self.requests.insert(
            number,
            Active {
                rules,
                id,
                client,
                prompt,
                said: None,
                root,
                seed,
                scores,
                arrival,
                queued: None,
                started: false,
                faults: 0,
                choices,
            },
        );
    }

    /// Where the chain of blocks of a request with this salt starts.
    fn root(&mut self, salt: Option<String>) -> u64 {
        match salt {
            _ if !self.settings.prefix_caching => self.scheduler.new_identity(),
            None => SHARED,
            Some(salt) => {
                if self.salts.len() == MAX_SALTS {
                    // Those who come again start anew.
                    self.salts.clear();
                }
                *self.salts.entry(salt).or_insert_with(|| self.scheduler.new_identity())
            }
        }
    }

    /// Schedule, run, commit.
    fn step(&mut self) {
        let (even_steps, costs, backend) = (self.settings.even_steps, &self.costs, &self.backend);
        let mut shares = self.scheduler.schedule(|answers| match even_steps {
            true => costs.prompt_tokens(backend.least_prompt_tokens(answers)),
            false => usize::MAX,
        });
        for share in shares.iter().filter(|share| share.begins) {
            if let Some(active) = self.requests.get(&share.id.request)
                && active.queued.is_none()
            {
                self.turns.begin(active.client, share.id.turn);
            }
        }
        for id in self.scheduler.take_preempted() {
            let active = self.requests.get_mut(&id.request);
            if let Some(choice) = active.and_then(|active| active.choices[id.choice].as_mut()) {
                choice.preemptions += 1;
            }
        }
        self.leave_out(&mut shares);
        self.guess(&mut shares);
        let sequences = shares.iter().map(|share| self.plan(share)).collect();
        let plan = Plan { sequences };
        let begin = Instant::now();
        self.publish(Some(begin));
        let (backend, outbox, mut unwanted) = (&mut self.backend, &mut self.outbox, Vec::new());
        let mut meanwhile = || unwanted.extend(outbox.tell());
        let result = catch_unwind(AssertUnwindSafe(|| backend.step_while(&plan, &mut meanwhile)));
        self.retire_all(unwanted);
        let outputs = match result {
            Ok(Ok(outputs)) => check(&plan, outputs, self.vocab_size),
            Ok(Err(error)) => Err(error.to_string()),
            Err(panic) => Err(panic_message(panic.as_ref())),
        };
        match outputs {
            Ok(outputs) => {
                self.steps += 1;
                self.failures = 0;
                self.relax(&shares);
                self.measure(&shares, begin.elapsed());
                // Of the plan only this is looked at again. Tables of blocks that nobody shares can grow in place.
                let samplings: Vec<_> = plan.sequences.into_iter().map(|sequence| sequence.sample).collect();
                for ((share, output), samplings) in shares.iter().zip(outputs).zip(&samplings) {
                    let committed = catch_unwind(AssertUnwindSafe(|| self.commit(share, output, samplings)));
                    if let Err(panic) = committed {
                        self.fail(share.id.request, &panic_message(panic.as_ref()));
                    }
                }
            }
            Err(message) => {
                tracing::error!("a step failed: {message}");
                self.failed_steps += 1;
                self.failures += 1;
                self.start_over(&shares, &message);
            }
        }
    }

    /// Takes those from a step whose mask may take long and is not there yet, so that the others need not wait for it.
    fn leave_out(&mut self, shares: &mut Vec<Share>) {
        let late: Vec<bool> = shares.iter().map(|share| self.is_late(share)).collect();
        if late.contains(&false) {
            let mut late = late.into_iter();
            shares.retain(|_| late.next() == Some(false));
        }
    }

    fn is_late(&mut self, share: &Share) -> bool {
        let Some(active) = self.requests.get_mut(&share.id.request).filter(|_| share.complete) else {
            return false;
        };
        let (Some(grammar), Some(choice)) = (&active.rules.grammar, &mut active.choices[share.id.choice])
        else {
            return false;
        };
        match &choice.constraint {
            Some(constraint) => constraint.is_late(),
            None => grammar.is_slow() && choice.constraint(&self.masks, &active.rules, grammar).is_late(),
        }
    }

    /// Takes note of how long a step took.
    fn measure(&mut self, shares: &[Share], time: Duration) {
        let count = |shares: &[&Share]| shares.iter().map(|share| share.tokens()).sum::<usize>();
        let (answers, prompts): (Vec<_>, Vec<_>) = shares.iter().partition(|share| share.decodes());
        let (tokens, prompt_tokens) = (count(&answers), count(&prompts));
        match (tokens, prompt_tokens) {
            (0, _) => {}
            (_, 0) => self.costs.measure(tokens, time),
            _ => self.costs.measure_prompts(tokens, prompt_tokens, time),
        }
        let chunks = prompts.iter().any(|share| share.positions.len() > 1);
        self.shared.stats().step(tokens + prompt_tokens, chunks, time);
    }

    /// Adds guesses to the shares of a step in which every sequence draws a token, where they are worth it.
    fn guess(&mut self, shares: &mut [Share]) {
        let Some(options) = self.settings.speculation else { return };
        if shares.len() >= MAX_STEP_TOKENS || !shares.iter().all(Share::decodes) {
            return;
        }
        let mut chances = Vec::with_capacity(shares.len());
        for share in shares.iter() {
            chances.push(self.chance(share.id, &options).unwrap_or(Chance { tokens: 0, probability: 0.0 }));
        }
        let counts = match options.adaptive {
            true => self.costs.choose(shares.len(), &chances),
            false => chances.iter().map(|chance| chance.tokens).collect(),
        };
        for (share, count) in shares.iter_mut().zip(counts) {
            if count > 0
                && let Some(active) = self.requests.get(&share.id.request)
                && let Some(choice) = &active.choices[share.id.choice]
            {
                self.scheduler.guess(share, choice.guesser.open(count));
            }
        }
    }

    /// What could be guessed for a sequence.
    fn chance(&mut self, id: SequenceId, options: &Speculation) -> Option<Chance> {
        let tokens = self.scheduler.tokens(id)?;
        let active = self.requests.get_mut(&id.request)?;
        if active.rules.grammar.as_ref().is_some_and(|grammar| !grammar.goes_back()) {
            return None;
        }
        let choice = active.choices[id.choice].as_mut()?;
        // A guess needs a mask, too.
        if choice.constraint.as_ref().is_some_and(Constraint::is_slow) {
            return None;
        }
        let room = self.settings.max_model_len.saturating_sub(tokens.len() + 1);
        let mut chance = choice.guesser.guess(tokens, options, options.tokens.min(room));
        chance.tokens = match choice.forced.is_empty() {
            true => choice.output.foreseeable(&choice.guesser.open(chance.tokens)),
            false => 0,
        };
        Some(chance)
    }

    /// After a failure that was repeated, one more sequence may run as soon as all that do have computed what they know.
    fn relax(&mut self, shares: &[Share]) {
        if let Some(sequences) = self.cautious.filter(|_| shares.iter().all(|share| share.complete)) {
            let sequences = (sequences + 1).min(self.settings.sequences);
            self.cautious = Some(sequences).filter(|&sequences| sequences < self.settings.sequences);
            self.scheduler.limit(sequences);
        }
    }

    /// After a failed step everything is computed again from the tokens that are known, save the requests whose fault it must
    /// be.
    fn start_over(&mut self, shares: &[Share], message: &str) {
        let part: BTreeSet<u64> = shares.iter().map(|share| share.id.request).collect();
        let mut repeated = false;
        for number in &part {
            if let Some(active) = self.requests.get_mut(number) {
                active.faults += 1;
                repeated |= active.faults > 1;
            }
        }
        // The one that computes again what it knows: the others did so before without a failure.
        let known = |share: &&Share| share.begins || share.positions.len() > 1;
        let suspect = self.cautious.filter(|_| part.len() > 1).and(shares.iter().find(known));
        let suspect = suspect.map(|share| share.id.request);
        for &number in &part {
            let faults = self.requests.get(&number).map_or(0, |active| active.faults);
            if (part.len() == 1 && faults > 1) || suspect == Some(number) || faults > MAX_FAULTS {
                self.fail(number, message);
            }
        }
        self.scheduler.start_over();
        if repeated {
            self.cautious = Some(1);
            self.scheduler.limit(1);
        }
        let (full, sliding) = self.settings.blocks;
        let restarted = catch_unwind(AssertUnwindSafe(|| self.backend.allocate_kv(full, sliding)));
        let lost = match restarted {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic_message(panic.as_ref()),
        };
        tracing::error!("the device cannot be used any more: {lost}");
        self.lost = Some(lost);
    }

    /// What the backend is to do for a share. A choice with a grammar has its mask in the making from here on.
    fn plan(&mut self, share: &Share) -> SequencePlan {
        let mut plan = self.scheduler.plan(share);
        let Some(active) = self.requests.get_mut(&share.id.request) else { return plan };
        active.queued.get_or_insert_with(|| active.arrival.elapsed());
        let (rules, choice) = (&active.rules, &mut active.choices[share.id.choice]);
        let end = plan.position + plan.tokens.len();
        plan.generated = end.saturating_sub(active.prompt.len()).min(plan.tokens.len());
        // Only the first choice runs before the request has begun, and never beyond the prompt.
        if let (Some(top), false) = (rules.params.prompt_logprobs, active.started) {
            let end = (share.positions.end + 1).min(active.prompt.len());
            let next = active.prompt[share.positions.start + 1..end].to_vec();
            plan.score = Some(Score { next, top });
        }
        if share.complete
            && rules.params.max_tokens != Some(0)
            && let Some(choice) = choice
        {
            if let Some(grammar) = &rules.grammar {
                choice.constraint(&self.masks, rules, grammar);
            }
            if let (OutputMode::Chat { tools, begun }, true, None) =
                (&rules.mode, rules.guarded, &choice.guard)
                && let Some(guard) = self.guards.get(&rules.harmony, tools)
            {
                let place = begun.iter().fold(guard.begin(), |place, &token| guard.advance(place, token));
                choice.guard = Some((guard, place));
            }
            if let Some(penalties) = &mut choice.penalties
                && penalties.prompt.is_empty()
            {
                let said = active.said.get_or_insert_with(|| distinct(&active.prompt));
                penalties.prompt = Arc::clone(said);
            }
            plan.sample = choice.samplings(rules, active.seed, share, &self.settings);
            let exhausted = choice.output.left() <= share.guesses.len() + 1;
            plan.ends = exhausted || end + 1 >= self.settings.max_model_len;
        }
        plan
    }

    /// Writes one sequence's results back and tells its request.
    fn commit(&mut self, share: &Share, output: SequenceOutput, samplings: &[Sampling]) {
        self.scheduler.commit(share);
        let number = share.id.request;
        // An earlier share of the same request may have cancelled it.
        let Some(active) = self.requests.get_mut(&number) else { return };
        if output.corrupted {
            self.corrupted_requests += 1;
            // Nobody may begin with what it computed, now or in earlier steps.
            self.scheduler.reset_prefixes();
            return self.end(number, Event::Failed(Failure::Corrupted));
        }
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
        self.take_tokens(share, output.sampled, samplings);
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
        self.scheduler.set_cache_limit(first, usize::MAX);
        self.outbox.put(first.request, News::Event(event));
        if active.rules.params.max_tokens == Some(0) {
            for choice in 0..active.choices.len() {
                self.finish(SequenceId { choice, ..first }, (FinishReason::Length, None));
            }
            return;
        }
        for choice in 1..active.choices.len() {
            let sequence = NewSequence {
                tokens: Tokens::new(Arc::clone(&active.prompt)),
                root: active.root,
                cache_limit: usize::MAX,
            };
            self.scheduler.add(SequenceId { choice, ..first }, sequence);
        }
    }

    /// Takes what was drawn after a share: one token, and one more for each guess that was right.
    fn take_tokens(&mut self, share: &Share, mut drawn: Vec<Sampled>, samplings: &[Sampling]) {
        let id = share.id;
        let Some(active) = self.requests.get_mut(&id.request) else { return };
        let Some(choice) = &mut active.choices[id.choice] else { return };
        if drawn.is_empty() {
            return;
        }
        if let Some(failure) = choice.constraint.as_ref().and_then(Constraint::failure) {
            return self.end(id.request, Event::Failed(Failure::Grammar(failure)));
        }
        let (mut taken, mut end) = (0, None);
        for (&Sampled { token, .. }, sampling) in drawn.iter().zip(samplings) {
            // A token is drawn even where none may come: behind a guess that may not, or where fields forbid what others demand.
            if forbids(sampling, token) {
                break;
            }
            let room = self.scheduler.push(id, token) < self.settings.max_model_len;
            end = choice.push(token, room, is_over(&active.rules, sampling, token), &active.rules);
            taken += 1;
            if end.is_some() || share.guesses.get(taken - 1) != Some(&token) {
                break;
            }
        }
        if taken == 0 {
            return self.end(id.request, Event::Failed(Failure::Forbidden));
        }
        drawn.truncate(taken);
        let right = taken - 1;
        self.generated_tokens += taken as u64;
        let tokens = drawn.iter().map(|sampled| sampled.token);
        choice.guesser.learn(tokens.clone());
        if !share.guesses.is_empty() {
            self.speculation.add(share.guesses.len(), right);
        }
        if right > 0 {
            self.scheduler.accept(id, right);
        }
        if end.is_none()
            && let Some(constraint) = &mut choice.constraint
        {
            constraint.advance(tokens.collect(), choice.output.may_stop());
        }
        let news = match choice.output.transcript() {
            Some(transcript) => transcript.news(id.choice, drawn, end.is_some()).map(News::Event),
            None => Some(News::Drawn { choice: id.choice, drawn, end: end.clone() }),
        };
        if let Some(news) = news {
            self.outbox.put(id.request, news);
        }
        if let Some(end) = end {
            self.finish(id, end);
        }
    }

    /// Ends a choice, and the request with its last.
    fn finish(&mut self, id: SequenceId, end: End) {
        self.scheduler.remove(id);
        let Some(active) = self.requests.get_mut(&id.request) else { return };
        let Some(Choice { output, preemptions, .. }) = active.choices[id.choice].take() else { return };
        let last = active.choices.iter().all(Option::is_none);
        let news = match output.ended(id.choice, end, preemptions) {
            (ended, Some(transcript)) => News::Event(transcript.finished(ended)),
            (ended, None) => News::Ended(ended),
        };
        self.outbox.put(id.request, news);
        if last {
            self.end(id.request, Event::Done);
        }
    }

    fn fail(&mut self, number: u64, message: &str) {
        self.end(number, Event::Failed(Failure::Device(message.to_owned())));
    }

    /// Removes requests, those that are there, without a word.
    fn retire_all(&mut self, numbers: Vec<u64>) {
        for number in numbers {
            if self.remove(number) {
                self.outbox.close(number);
            }
        }
    }

    /// Removes a request, if it is there, with a last event. By then its place in the queue is free.
    fn end(&mut self, number: u64, event: Event) {
        if self.remove(number) {
            self.outbox.put(number, News::Event(event));
            self.outbox.close(number);
        }
    }

    /// Frees what a request holds; false if it is not there.
    fn remove(&mut self, number: u64) -> bool {
        let Some(active) = self.requests.remove(&number) else { return false };
        for choice in 0..active.choices.len() {
            self.scheduler.remove(SequenceId { choice, ..active.id });
        }
        if active.queued.is_none() {
            self.turns.leave(active.client);
        }
        let mut mailbox = self.shared.mailbox();
        mailbox.open -= 1;
        if !active.started {
            mailbox.queued_tokens -= active.prompt.len();
        }
        drop(mailbox);
        self.publish(None);
        true
    }

    fn publish(&self, step_started: Option<Instant>) {
        let blocks = self.scheduler.blocks();
        let (prefix_queries, prefix_hits) = self.scheduler.prefix_counts();
        let (full_blocks_used, full_blocks) = blocks.full_usage();
        let (sliding_blocks_used, sliding_blocks) = blocks.sliding_usage();
        let mut stats = self.shared.stats();
        *stats = crate::Stats {
            running: self.scheduler.running().len(),
            waiting: self.scheduler.waiting(),
            paused: self.scheduler.paused(),
            full_blocks_used,
            full_blocks,
            sliding_blocks_used,
            sliding_blocks,
            cache_bytes: stats.cache_bytes,
            weight_bytes: stats.weight_bytes,
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
            prefix_queries,
            prefix_hits,
            preemptions: self.scheduler.preemptions(),
            speculation: self.speculation.clone(),
            steps: self.steps,
            failed_steps: self.failed_steps,
            corrupted_requests: self.corrupted_requests,
            unhealthy: self.failures > 0,
            lost: self.lost.is_some(),
            step_started,
            step_tokens: stats.step_tokens,
            step_tokens_sum: stats.step_tokens_sum,
            step_seconds: stats.step_seconds,
            step_seconds_sum: stats.step_seconds_sum,
        };
    }
}

/// Whether the grammar has come to its end, where this token, which ends a turn, is all that may come.
fn is_over(rules: &Rules, sampling: &Sampling, token: u32) -> bool {
    let ends = rules.harmony.stop_ids();
    let only_ends = |mask: &Mask| others(mask.wait(), &ends).is_none();
    rules.grammar.is_some() && ends.contains(&token) && sampling.mask.as_ref().is_some_and(only_ends)
}

/// However the thread ends, no request is left without an answer.
impl Drop for Worker {
    fn drop(&mut self) {
        let panicking = std::thread::panicking();
        let failure = match (panicking, &self.lost) {
            (true, _) => Failure::Device("the engine's thread panicked".to_owned()),
            (false, Some(lost)) => Failure::Device(lost.clone()),
            (false, None) => Failure::ShuttingDown,
        };
        let mut mailbox = self.shared.mailbox();
        mailbox.phase = Phase::Ended;
        let incoming = std::mem::take(&mut mailbox.incoming);
        (mailbox.open, mailbox.queued_tokens) = (0, 0);
        drop(mailbox);
        for (number, active) in std::mem::take(&mut self.requests) {
            self.outbox.put(number, News::Event(Event::Failed(failure.clone())));
            self.outbox.close(number);
            // After a panic the scheduler is not asked for anything.
            for choice in (0..active.choices.len()).filter(|_| !panicking) {
                self.scheduler.remove(SequenceId { choice, ..active.id });
            }
        }
        for Job { number, sink, .. } in incoming {
            self.outbox.open(number, sink, Vec::new());
            self.outbox.put(number, News::Event(Event::Failed(failure.clone())));
            self.outbox.close(number);
        }
        self.outbox.tell();
        if panicking {
            self.shared.stats().lost = true;
        } else {
            self.publish(None);
        }
        self.shared.enter(Phase::Ended);
    }
}

impl Choice {
    fn new(rules: &Arc<Rules>) -> Choice {
        let params = &rules.params;
        let penalized = params.repetition_penalty != 1.0
            || params.frequency_penalty != 0.0
            || params.presence_penalty != 0.0;
        let penalties = Penalties {
            repetition: params.repetition_penalty,
            frequency: params.frequency_penalty,
            presence: params.presence_penalty,
            prompt: Arc::default(),
            output: Vec::new(),
        };
        let mut choice = Choice {
            output: Output::new(Arc::clone(rules)),
            penalties: penalized.then_some(penalties),
            recent: VecDeque::new(),
            forced: VecDeque::new(),
            constraint: None,
            guard: None,
            guesser: Guesser::default(),
            preemptions: 0,
        };
        // A budget of nothing may be spent in the prompt.
        choice.conclude(rules);
        choice
    }

    /// Takes a token that was drawn. The result is set if it was the last.
    fn push(&mut self, token: u32, room: bool, over: bool, rules: &Rules) -> Option<End> {
        if let Some(penalties) = &mut self.penalties {
            penalties.count(token);
        }
        let end = self.output.push(token, room, over);
        if end.is_none() {
            self.advance(token, rules);
        }
        end
    }

    /// Takes note of a token after which there are more.
    fn advance(&mut self, token: u32, rules: &Rules) {
        let longest = rules.bad_words().iter().map(Vec::len).max().unwrap_or(0);
        if longest > 1 {
            if self.recent.len() + 1 == longest {
                self.recent.pop_front();
            }
            self.recent.push_back(token);
        }
        if self.forced.front() == Some(&token) {
            self.forced.pop_front();
        }
        if let Some((guard, place)) = &mut self.guard {
            *place = guard.advance(*place, token);
        }
        self.conclude(rules);
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

    /// Its place in the grammar, with a mask in the making from the first call on.
    fn constraint(&mut self, masks: &Masks, rules: &Arc<Rules>, grammar: &Grammar) -> &Constraint {
        let may_stop = self.output.may_stop();
        self.constraint.get_or_insert_with(|| Constraint::new(masks, rules, grammar, may_stop))
    }

    /// What may be drawn next and after each guess, if not everything.
    fn masks(&self, rules: &Rules, guesses: &[u32]) -> Vec<Option<Mask>> {
        match (self.forced.front(), &self.constraint) {
            (Some(&token), _) => vec![Some(Mask::of(&[token]))],
            (None, Some(constraint)) => {
                let may_stop: Vec<bool> =
                    (1..=guesses.len()).map(|ahead| self.output.may_stop_after(ahead)).collect();
                let after =
                    if guesses.is_empty() { Vec::new() } else { constraint.masks_after(guesses, &may_stop) };
                [constraint.mask()].into_iter().chain(after).map(Some).collect()
            }
            (None, None) => match &self.guard {
                Some((guard, place)) => {
                    let places = guesses.iter().scan(*place, |place, &guess| {
                        *place = guard.advance(*place, guess);
                        Some(*place)
                    });
                    [*place]
                        .into_iter()
                        .chain(places)
                        .map(|place| guard.allowed(place).map(Mask::of))
                        .collect()
                }
                None => vec![rules.params.allowed(); guesses.len() + 1],
            },
        }
    }

    /// How tokens are drawn after a share and after each of its guesses.
    fn samplings(&self, rules: &Rules, seed: u64, share: &Share, settings: &Settings) -> Vec<Sampling> {
        let masks = self.masks(rules, &share.guesses);
        let seed = choice_seed(seed, share.id.choice);
        let sampling = |(ahead, mask)| {
            let guessed = &share.guesses[..ahead];
            self.sampling(rules, seed, share.positions.end, guessed, mask, settings)
        };
        masks.into_iter().enumerate().map(sampling).collect()
    }

    /// How the token is drawn after the first `end` ones and some that are guessed.
    fn sampling(
        &self,
        rules: &Rules,
        seed: u64,
        end: usize,
        guessed: &[u32],
        mask: Option<Mask>,
        settings: &Settings,
    ) -> Sampling {
        let params = &rules.params;
        let mut bias: Vec<(u32, f32)> = params.logit_bias.iter().map(|(&t, &b)| (t, b)).collect();
        // A grammar's mask sees to it itself.
        if self.forced.is_empty()
            && self.constraint.is_none()
            && !self.output.may_stop_after(guessed.len())
            && mask.as_ref().is_none_or(|mask| others(mask.wait(), &rules.stop_tokens).is_some())
        {
            bias.extend(rules.stop_tokens.iter().map(|&t| (t, f32::NEG_INFINITY)));
        }
        if self.forced.is_empty() {
            let completed = |word: &Vec<u32>| {
                let (&last, before) = word.split_last()?;
                let recent = guessed.iter().rev().chain(self.recent.iter().rev()).take(before.len());
                recent.eq(before.iter().rev()).then_some((last, f32::NEG_INFINITY))
            };
            bias.extend(rules.bad_words().iter().filter_map(completed));
        }
        let mut penalties = self.penalties.clone();
        if let Some(penalties) = &mut penalties {
            guessed.iter().for_each(|&token| penalties.count(token));
        }
        Sampling {
            mask,
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            seed,
            position: (end + guessed.len()) as u64,
            bias,
            penalties,
            logprobs: params.logprobs.map(|top| Logprobs {
                top,
                ids: params.logprob_token_ids.clone().unwrap_or_default(),
                processed: settings.processed_logprobs,
            }),
        }
    }
}

/// Whether no rule lets a token come.
fn forbids(sampling: &Sampling, token: u32) -> bool {
    sampling.mask.as_ref().is_some_and(|mask| !mask.allows(token))
        || sampling.bias.iter().any(|&(biased, bias)| biased == token && bias == f32::NEG_INFINITY)
}

/// Salts whose prefixes can be found again.
const MAX_SALTS: usize = 4096;

/// Failed steps that a request may be part of.
const MAX_FAULTS: u32 = 5;

/// Each token once, ascending.
fn distinct(tokens: &[u32]) -> Arc<[u32]> {
    let mut distinct = tokens.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    distinct.into()
}

/// The generator's key for one choice of a request: the request's seed for the first.
pub(crate) fn choice_seed(seed: u64, choice: usize) -> u64 {
    seed.wrapping_add((choice as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The seed of a request that brings none, from the engine's and the request's number.
pub(crate) fn default_seed(seed: u64, number: u64) -> u64 {
    scramble(seed ^ scramble(number))
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

pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text =
        panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panic: {}", text.unwrap_or("without a message"))
}
