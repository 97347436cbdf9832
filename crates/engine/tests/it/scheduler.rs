//! Random arrivals, cancellations and lengths through the scheduler, with an oracle that stores tokens for keys and values.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::kv::{Blocks, SHARED, Tokens};
use engine::scheduler::{Limits, NewSequence, Scheduler, SequenceId, Share};
use gptoss::BLOCK_TOKENS;
use proptest::prelude::*;

const WINDOW: usize = 24;

#[derive(Debug, Clone)]
struct Job {
    /// Step at which it arrives.
    at: usize,
    prompt: Vec<u32>,
    outputs: Vec<usize>,
    /// Tokens after which it is cancelled.
    cancelled_after: Option<usize>,
    /// It is held back from one step to another.
    paused: Option<(usize, usize)>,
    own_root: bool,
    priority: i64,
    /// How many tokens are guessed at each step, and how many of these guesses are right.
    guesses: (usize, usize),
}

fn job() -> impl Strategy<Value = Job> {
    // Few different tokens in long runs: prefixes are often shared, and part ways anywhere.
    let prompt = proptest::collection::vec((0u32..2, 1usize..40), 1..5)
        .prop_map(|runs| runs.into_iter().flat_map(|(token, count)| vec![token; count]).collect());
    let outputs = proptest::collection::vec(1usize..40, 1..4);
    let cancelled_after = proptest::option::weighted(0.2, 0usize..30);
    let own_root = proptest::bool::weighted(0.1);
    let paused = proptest::option::weighted(0.3, (0usize..80, 0usize..30));
    let order = (paused, -1i64..2);
    (0usize..60, prompt, outputs, cancelled_after, own_root, order, (0usize..20, 0usize..20)).prop_map(
        |(at, prompt, outputs, cancelled_after, own_root, (paused, priority), guesses)| Job {
            at,
            prompt,
            outputs,
            cancelled_after,
            paused: paused.map(|(from, steps)| (from, from + steps)),
            own_root,
            priority,
            guesses,
        },
    )
}

/// Keys and values, if each were the token it is computed from.
struct Store {
    full: Vec<Option<u32>>,
    sliding: Vec<Option<u32>>,
}

impl Store {
    fn run(&mut self, scheduler: &Scheduler, share: &Share, expected: &[u32]) {
        let plan = scheduler.plan(share);
        assert_eq!(plan.position, share.positions.start);
        assert_eq!(plan.tokens[..share.positions.len()], expected[share.positions.clone()]);
        assert_eq!(plan.tokens[share.positions.len()..], share.guesses);
        assert_eq!(share.complete, share.positions.end == expected.len());
        let slot =
            |blocks: &[u32], p: usize| blocks[p / BLOCK_TOKENS] as usize * BLOCK_TOKENS + p % BLOCK_TOKENS;
        for (p, &token) in (plan.position..).zip(&plan.tokens) {
            self.full[slot(&plan.full_blocks, p)] = Some(token);
            self.sliding[slot(&plan.sliding_blocks, p)] = Some(token);
        }
        for (p, &token) in expected.iter().enumerate().take(share.positions.end) {
            assert_eq!(self.full[slot(&plan.full_blocks, p)], Some(token), "{share:?}: full, position {p}");
            if p + WINDOW > share.positions.start {
                assert_eq!(
                    self.sliding[slot(&plan.sliding_blocks, p)],
                    Some(token),
                    "{share:?}: sliding, position {p}"
                );
            }
        }
    }
}

/// The token that a sequence says at a position.
fn says(position: usize, choice: usize) -> u32 {
    (position as u32 + choice as u32) % 3
}

fn check(jobs: &[Job], full: usize, sliding: usize, limits: Limits, beside: usize) {
    let mut scheduler = Scheduler::new(limits, Blocks::new(full, sliding, WINDOW));
    let slots = |blocks| vec![None; blocks * BLOCK_TOKENS];
    let mut store = Store { full: slots(full), sliding: slots(sliding) };
    // What each live sequence has said, and where its chain starts.
    let mut live: BTreeMap<SequenceId, Vec<u32>> = BTreeMap::new();
    let mut roots = BTreeMap::new();
    let mut finished = 0;
    let mut expected = 0;
    let total: usize = jobs.iter().map(|j| j.outputs.iter().sum::<usize>() + 2 * j.prompt.len()).sum();
    for step in 0.. {
        assert!(step < 100 + 20 * total, "the sequences do not come to an end");
        for (number, job) in jobs.iter().enumerate().filter(|(_, job)| job.at == step) {
            let id = SequenceId { priority: job.priority, turn: 0, request: number as u64, choice: 0 };
            let root = if job.own_root { scheduler.new_identity() } else { SHARED };
            roots.insert(number, root);
            let tokens = Tokens::new(job.prompt.as_slice().into());
            scheduler.add(id, NewSequence { tokens, root, cache_limit: usize::MAX });
            live.insert(id, job.prompt.clone());
            expected += 1;
        }
        let held = |id: &SequenceId| {
            jobs[id.request as usize].paused.is_some_and(|(from, to)| (from..to).contains(&step))
        };
        for &id in live.keys() {
            if held(&id) { scheduler.pause(id) } else { scheduler.resume(id) }
        }
        assert_eq!(scheduler.paused(), live.keys().filter(|id| held(id)).count());
        let mut shares = scheduler.schedule(|_| beside);
        scheduler.check();
        assert!(!shares.iter().any(|share| held(&share.id)));
        for share in shares.iter_mut().filter(|share| share.complete && share.positions.len() == 1) {
            let (count, right) = jobs[share.id.request as usize].guesses;
            let said = live[&share.id].len();
            let left = 13 * BLOCK_TOKENS - said;
            let token = |i: usize| says(said + i, share.id.choice) + u32::from(i >= right) * 5;
            scheduler.guess(share, (0..count.min(left)).map(token).collect());
            scheduler.check();
        }
        if shares.is_empty() {
            assert!(live.keys().all(held), "there is work, but none is scheduled");
            if live.is_empty() && step > 60 {
                break;
            }
            continue;
        }
        assert!(shares.iter().map(|s| s.positions.len()).sum::<usize>() <= limits.tokens);
        assert!(scheduler.running().len() <= limits.sequences);
        // All of a step's writes happen before anyone looks at them again.
        for share in &shares {
            assert!(!share.positions.is_empty());
            assert_eq!(shares.iter().filter(|s| s.id == share.id).count(), 1);
            store.run(&scheduler, share, &live[&share.id]);
        }
        for share in &shares {
            scheduler.commit(share);
            let number = share.id.request as usize;
            let job = &jobs[number];
            if !share.complete || !live.contains_key(&share.id) {
                continue;
            }
            let said = live.get_mut(&share.id).unwrap();
            if share.id.choice == 0 && said.len() == job.prompt.len() {
                let prompt: Arc<[u32]> = job.prompt.as_slice().into();
                for choice in 1..job.outputs.len() {
                    let id = SequenceId { choice, ..share.id };
                    let tokens = Tokens::new(Arc::clone(&prompt));
                    scheduler.add(id, NewSequence { tokens, root: roots[&number], cache_limit: usize::MAX });
                    live.insert(id, job.prompt.clone());
                    expected += 1;
                }
            }
            let said = live.get_mut(&share.id).unwrap();
            let last = job.outputs[share.id.choice];
            let last = job.cancelled_after.filter(|&after| after > 0).map_or(last, |after| last.min(after));
            let mut taken = 0;
            loop {
                let token = says(said.len(), share.id.choice);
                said.push(token);
                scheduler.push(share.id, token);
                if said.len() - job.prompt.len() == last || share.guesses.get(taken) != Some(&token) {
                    break;
                }
                taken += 1;
            }
            scheduler.accept(share.id, taken);
            let generated = said.len() - job.prompt.len();
            if job.cancelled_after == Some(generated) {
                for choice in 0..job.outputs.len() {
                    let id = SequenceId { choice, ..share.id };
                    scheduler.remove(id);
                    finished += usize::from(live.remove(&id).is_some());
                }
            } else if generated == job.outputs[share.id.choice] {
                scheduler.remove(share.id);
                live.remove(&share.id);
                finished += 1;
            }
            scheduler.check();
        }
    }
    assert_eq!(finished, expected);
    assert_eq!((scheduler.running().len(), scheduler.waiting(), scheduler.paused()), (0, 0, 0));
    assert_eq!((scheduler.blocks().full_usage().0, scheduler.blocks().sliding_usage().0), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn every_sequence_ends_and_reads_what_it_wrote(
        jobs in proptest::collection::vec(job(), 1..14),
        full in 13usize..40,
        sliding in 4usize..30,
        sequences in 1usize..8,
        tokens in 8usize..100,
        beside in 1usize..100,
    ) {
        // The longest sequence, 4 · 39 + 39 tokens, fits 13 blocks, and its window two or three.
        check(&jobs, full, sliding, Limits { sequences, tokens, prompt_tokens: tokens / 2 }, beside);
    }
}

fn limits(sequences: usize, tokens: usize) -> Limits {
    Limits { sequences, tokens, prompt_tokens: tokens }
}

fn add(scheduler: &mut Scheduler, request: u64, prompt: &[u32]) -> SequenceId {
    add_with(scheduler, 0, request, prompt)
}

fn add_with(scheduler: &mut Scheduler, priority: i64, request: u64, prompt: &[u32]) -> SequenceId {
    let id = SequenceId { priority, turn: 0, request, choice: 0 };
    scheduler
        .add(id, NewSequence { tokens: Tokens::new(prompt.into()), root: SHARED, cache_limit: usize::MAX });
    id
}

fn step(scheduler: &mut Scheduler) -> Vec<(u64, std::ops::Range<usize>)> {
    step_beside(scheduler, usize::MAX)
}

fn step_beside(scheduler: &mut Scheduler, beside: usize) -> Vec<(u64, std::ops::Range<usize>)> {
    let shares = scheduler.schedule(|_| beside);
    for share in &shares {
        scheduler.commit(share);
        if share.complete {
            scheduler.push(share.id, 7);
        }
    }
    scheduler.check();
    shares.into_iter().map(|s| (s.id.request, s.positions)).collect()
}

#[test]
fn decodes_come_first_then_chunks_in_order_of_arrival() {
    let mut scheduler = Scheduler::new(limits(3, 20), Blocks::new(100, 100, 16));
    add(&mut scheduler, 1, &[1; 10]);
    add(&mut scheduler, 2, &[2; 30]);
    add(&mut scheduler, 3, &[3; 5]);
    add(&mut scheduler, 4, &[4; 5]);
    assert_eq!(step(&mut scheduler), [(1, 0..10), (2, 0..10)]);
    assert_eq!(step(&mut scheduler), [(1, 10..11), (2, 10..29)]);
    // The last token of a prompt counts as a decode; the fourth waits for a place.
    assert_eq!(step(&mut scheduler), [(1, 11..12), (2, 29..30), (3, 0..5)]);
    scheduler.remove(SequenceId { priority: 0, turn: 0, request: 1, choice: 0 });
    assert_eq!(step(&mut scheduler), [(2, 30..31), (3, 5..6), (4, 0..5)]);
}

#[test]
fn a_long_prompt_leaves_room_for_others() {
    let limits = Limits { prompt_tokens: 8, ..limits(3, 20) };
    let mut scheduler = Scheduler::new(limits, Blocks::new(100, 100, 16));
    add(&mut scheduler, 1, &[1; 30]);
    add(&mut scheduler, 2, &[2; 5]);
    assert_eq!(step(&mut scheduler), [(1, 0..8), (2, 0..5)]);
    assert_eq!(step(&mut scheduler), [(2, 5..6), (1, 8..16)]);
}

#[test]
fn prompts_get_a_part_of_a_step_while_others_decode() {
    let mut scheduler = Scheduler::new(limits(5, 40), Blocks::new(100, 100, 16));
    let step = |scheduler: &mut Scheduler| step_beside(scheduler, 10);
    add(&mut scheduler, 1, &[1; 30]);
    add(&mut scheduler, 2, &[2; 12]);
    assert_eq!(step(&mut scheduler), [(1, 0..30), (2, 0..10)], "nobody decodes yet");
    add(&mut scheduler, 3, &[3; 100]);
    assert_eq!(step(&mut scheduler), [(1, 30..31), (2, 10..12), (3, 0..8)]);
    assert_eq!(step(&mut scheduler), [(1, 31..32), (2, 12..13), (3, 8..18)]);
    for request in [1, 2] {
        scheduler.remove(SequenceId { priority: 0, turn: 0, request, choice: 0 });
    }
    assert_eq!(step(&mut scheduler), [(3, 18..58)]);
}

#[test]
fn a_better_priority_goes_first_and_takes_places() {
    let mut scheduler = Scheduler::new(limits(2, 64), Blocks::new(100, 100, 16));
    add_with(&mut scheduler, 1, 1, &[1; 20]);
    add_with(&mut scheduler, 0, 2, &[2; 20]);
    add_with(&mut scheduler, 0, 3, &[3; 20]);
    assert_eq!(step(&mut scheduler), [(2, 0..20), (3, 0..20)]);
    scheduler.remove(SequenceId { priority: 0, turn: 0, request: 2, choice: 0 });
    assert_eq!(step(&mut scheduler), [(3, 20..21), (1, 0..20)]);
    // Equal ones wait, a better one does not.
    add_with(&mut scheduler, 1, 4, &[4; 20]);
    assert_eq!(step(&mut scheduler), [(3, 21..22), (1, 20..21)]);
    add_with(&mut scheduler, -5, 5, &[5; 20]);
    assert_eq!(step(&mut scheduler), [(3, 22..23), (5, 0..20)]);
    assert_eq!(scheduler.preemptions(), 1);
}

#[test]
fn guesses_take_no_block_that_others_need() {
    let mut scheduler = Scheduler::new(limits(4, 64), Blocks::new(4, 4, 16));
    let id = add(&mut scheduler, 1, &[1; 15]);
    assert_eq!(step(&mut scheduler), [(1, 0..15)]);
    let guess = |scheduler: &mut Scheduler, count: usize| {
        let mut share = scheduler.schedule(|_| usize::MAX).remove(0);
        scheduler.guess(&mut share, vec![7; count]);
        scheduler.check();
        (share.guesses.len(), scheduler.plan(&share).full_blocks.len())
    };
    // One of the three blocks left stays free.
    assert_eq!(guess(&mut scheduler, 33), (0, 1));
    assert_eq!(guess(&mut scheduler, 32), (32, 3));
    scheduler.push(id, 7);
    scheduler.accept(id, 1);
    add(&mut scheduler, 2, &[2; 3]);
    assert_eq!(
        scheduler.schedule(|_| usize::MAX).len(),
        1,
        "there is no block left but the one that is needed"
    );
}

#[test]
fn the_youngest_gives_way_and_comes_back() {
    let mut scheduler = Scheduler::new(limits(4, 64), Blocks::new(4, 4, 16));
    let old = add(&mut scheduler, 1, &[1; 31]);
    let young = add(&mut scheduler, 2, &[2; 15]);
    assert_eq!(step(&mut scheduler), [(1, 0..31), (2, 0..15)]);
    // 31 fills the old one's second block, 15 the young one's first; then both need another, and one is left.
    assert_eq!(step(&mut scheduler), [(1, 31..32), (2, 15..16)]);
    assert_eq!(step(&mut scheduler), [(1, 32..33)]);
    assert_eq!(scheduler.preemptions(), 1);
    assert_eq!(scheduler.running().collect::<Vec<_>>(), [old]);
    scheduler.remove(old);
    // Its first block is still known.
    assert_eq!(step(&mut scheduler), [(2, 16..17)]);
    assert_eq!(scheduler.running().collect::<Vec<_>>(), [young]);
}

#[test]
fn nobody_begins_who_would_soon_give_way() {
    // Of sliding blocks, four sequences hold nine of a window each, and six are left.
    let mut scheduler = Scheduler::new(limits(16, 512), Blocks::new(2000, 42, 128));
    for request in 0..4 {
        add(&mut scheduler, request, &[request as u32; 300]);
    }
    for _ in 0..20 {
        step(&mut scheduler);
    }
    let preempted = scheduler.preemptions();
    assert_eq!(scheduler.running().len(), 4);
    for request in 4..10 {
        add(&mut scheduler, request, &[request as u32; 1300]);
    }
    for _ in 0..200 {
        assert_eq!(step(&mut scheduler).len(), 4);
    }
    assert_eq!(scheduler.preemptions(), preempted);
}

#[test]
fn a_prefix_is_found_as_long_as_its_window_is() {
    let mut scheduler = Scheduler::new(limits(4, 256), Blocks::new(16, 6, 16));
    let prompt: Vec<u32> = (0..80).collect();
    let first = add(&mut scheduler, 1, &prompt);
    assert_eq!(step(&mut scheduler), [(1, 0..80)]);
    scheduler.remove(first);
    let second = add(&mut scheduler, 2, &prompt);
    // Not the whole prompt: its last token must be computed.
    assert_eq!(step(&mut scheduler), [(2, 64..80)]);
    scheduler.remove(second);
    let other: Vec<u32> = prompt[..40].iter().copied().chain(100..120).collect();
    let third = add(&mut scheduler, 3, &other);
    assert_eq!(step(&mut scheduler), [(3, 32..60)]);
    scheduler.remove(third);
    // Six sliding blocks of another prompt push out all that were cached: the full blocks alone are of no use.
    let fourth = add(&mut scheduler, 4, &(200..296).collect::<Vec<u32>>());
    assert_eq!(step(&mut scheduler), [(4, 0..96)]);
    scheduler.remove(fourth);
    add(&mut scheduler, 5, &prompt);
    assert_eq!(step(&mut scheduler), [(5, 0..80)]);
    assert_eq!(scheduler.prefix_counts(), (80 + 80 + 60 + 96 + 80, 64 + 32));
}
