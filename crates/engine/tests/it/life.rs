//! Requests that come, go, are refused and fail, over scripts.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use engine::{
    EngineOptions, Error, Event, Failure, FinishReason, Request, SamplingParams, SchedulingPolicy, Scripted,
    Step, SubmitError,
};

use checkpoint::Config;
use gptoss::{BLOCK_TOKENS, Backend, KvLayout, Plan, SequenceOutput, SequencePlan};

use crate::common::{
    RETURN, channel_sink, harmony, run, says, start, submit, text_request, tokens, tokens_of, unlimited,
};

fn small(kv_blocks: usize) -> EngineOptions {
    EngineOptions {
        kv_cache_bytes: kv_blocks * 4096,
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        ..Default::default()
    }
}

/// An engine whose steps are let through one by one.
fn controlled(script: Vec<u32>) -> (engine::Engine, std::sync::mpsc::Sender<Step>) {
    let (control, steps) = channel();
    let backend = Scripted::new(Scripted::gpt_oss(), vec![script]).controlled_by(steps);
    (start(backend, small(200)), control)
}

#[test]
fn a_script_is_played_to_its_end() {
    let events = run(&says("One, two.<|return|>"), text_request(&[1, 2, 3], unlimited()));
    assert_eq!(tokens_of(&events, 0), tokens("One, two.<|return|>"));
    let finished = Event::Finished {
        choice: 0,
        reason: FinishReason::Stop,
        stop: None,
        completion_tokens: 5,
        reasoning_tokens: 0,
        repairs: Vec::new(),
        preemptions: 0,
    };
    assert_eq!(events[events.len() - 2], finished);
}

#[test]
fn requests_that_cannot_be_served_are_refused() {
    let options = EngineOptions { max_model_len: Some(40), ..small(200) };
    let engine = start(Scripted::new(Scripted::gpt_oss(), vec![vec![5]]), options);
    let refuse = |prompt: &[u32], params: SamplingParams| {
        engine.submit(text_request(prompt, params), channel_sink().0).err().unwrap()
    };
    assert_eq!(refuse(&[], unlimited()), SubmitError::EmptyPrompt);
    assert_eq!(refuse(&[1; 40], unlimited()), SubmitError::TooLong { prompt: 40, max_model_len: 40 });
    let unknown = SubmitError::TokenOutOfVocabulary { token: 201_088, vocab_size: 201_088 };
    assert_eq!(refuse(&[3, 201_088], unlimited()), unknown);
    let invalid = refuse(&[3], SamplingParams { top_p: 0.0, ..unlimited() });
    assert_eq!(invalid.to_string(), "`top_p` must be in (0, 1], got 0.");
    // The context's end ends an answer.
    let events = run(&engine, text_request(&[1; 39], unlimited()));
    assert_eq!(tokens_of(&events, 0), [5]);
    let events = run(&engine, text_request(&[1; 30], unlimited()));
    assert_eq!(tokens_of(&events, 0).len(), 10);
    assert!(matches!(events[events.len() - 2], Event::Finished { reason: FinishReason::Length, .. }));
    // Scoring alone needs no room after the prompt.
    run(&engine, text_request(&[1; 40], SamplingParams { max_tokens: Some(0), ..unlimited() }));
}

#[test]
fn log_probabilities_are_bounded() {
    let engine = start(Scripted::new(Scripted::gpt_oss(), vec![vec![5]]), small(200));
    let room = engine.max_model_len() - 100;
    let of_prompt = SamplingParams { prompt_logprobs: Some(201_087), ..unlimited() };
    let of_answers = SamplingParams { n: 128, logprobs: Some((16 << 20) / (128 * room)), ..unlimited() };
    let of_ids = SamplingParams {
        logprobs: Some(0),
        logprob_token_ids: Some(vec![1; 128]),
        n: (16 << 20) / (129 * room) + 1,
        ..unlimited()
    };
    for (params, field) in
        [(of_prompt, "prompt_logprobs"), (of_answers.clone(), "logprobs"), (of_ids, "logprobs")]
    {
        let params = SamplingParams { max_tokens: Some(room), ..params };
        let refused = engine.submit(text_request(&[1; 100], params), channel_sink().0).err().unwrap();
        assert!(
            matches!(&refused, SubmitError::Invalid(invalid) if invalid.field == field),
            "{field}: {refused:?}"
        );
    }
    // What a client limits itself is counted so.
    let few = SamplingParams { max_tokens: Some(4), ..of_answers.clone() };
    engine.validate(text_request(&[1; 100], few)).unwrap();
    // Where nobody said how long answers may be, they are as long as they can be together.
    let most = (16 << 20) / (128 * (of_answers.logprobs.unwrap() + 1));
    assert!(most < room);
    let valid = engine.validate(text_request(&[1; 100], of_answers.clone())).unwrap();
    assert_eq!(valid.params.max_tokens, Some(most));
    let mut two = [text_request(&[1; 100], of_answers.clone()), text_request(&[1; 9], of_answers)];
    engine.bound_logprobs(&mut two, 1).unwrap();
    assert_eq!(two.map(|request| request.params.max_tokens), [Some(most / 2); 2]);
    let without = SamplingParams { n: 128, ..unlimited() };
    assert_eq!(engine.validate(text_request(&[1; 100], without)).unwrap().params.max_tokens, None);
}

#[test]
fn options_that_cannot_work_are_refused() {
    let refuse = |options: EngineOptions| {
        let backend = Box::new(Scripted::new(Scripted::gpt_oss(), Vec::new()));
        engine::Engine::start(backend, crate::common::harmony(), options).err().unwrap()
    };
    let found = refuse(EngineOptions { max_num_seqs: 0, ..small(99) }).to_string();
    assert_eq!(found, "`max_num_seqs` must be at least 1, got 0.");
    let found = refuse(EngineOptions { max_num_seqs: 65, ..small(99) }).to_string();
    assert_eq!(found, "`max_num_batched_tokens` must be at least `max_num_seqs`, 65, got 64.");
    let found = refuse(EngineOptions { max_model_len: Some(131_073), ..small(99) }).to_string();
    assert_eq!(found, "`max_model_len` must be in [1, 131072], the model's context, got 131073.");
    // A window of 8 blocks and one more, a chunk of 4 and one more: 14 sliding blocks leave 86 full ones.
    let found = refuse(EngineOptions { max_model_len: Some(86 * 16 + 1), ..small(100) });
    assert!(matches!(found, Error::KvCache { largest: 1376, needed, .. } if needed == 101 * 4096), "{found}");
    let backend = Box::new(Scripted::new(Scripted::gpt_oss(), Vec::new()));
    let fits = engine::Engine::start(backend, crate::common::harmony(), small(100)).unwrap();
    assert_eq!(fits.max_model_len(), 1376);
    // The longest length leaves room for as many windows as sequences.
    let backend = Box::new(Scripted::new(Scripted::gpt_oss(), Vec::new()));
    let many = engine::Engine::start(backend, crate::common::harmony(), small(2048)).unwrap();
    assert_eq!((many.max_model_len(), many.stats().sliding_blocks), (1904 * 16, 79));
    let found = refuse(small(1));
    assert!(matches!(found, Error::KvCache { largest: 0, .. }), "{found}");
}

#[test]
fn a_full_queue_refuses_and_recovers() {
    let (control, steps) = channel();
    let backend = Scripted::new(Scripted::gpt_oss(), vec![vec![RETURN]]).controlled_by(steps);
    let engine = start(backend, EngineOptions { max_queued_requests: 2, ..small(200) });
    let first = submit(&engine, text_request(&[1], unlimited()));
    let second = submit(&engine, text_request(&[2], unlimited()));
    let full = engine.submit(text_request(&[3], unlimited()), channel_sink().0).err();
    assert_eq!(full, Some(SubmitError::Full));
    drop(control);
    assert_eq!(first.1.iter().last(), Some(Event::Done));
    assert_eq!(second.1.iter().last(), Some(Event::Done));
    run(&engine, text_request(&[3], unlimited()));
}

#[test]
fn too_many_waiting_tokens_are_refused_but_one_prompt_is_not() {
    let (control, steps) = channel();
    let backend = Scripted::new(Scripted::gpt_oss(), vec![vec![RETURN]]).controlled_by(steps);
    let engine = start(backend, EngineOptions { max_queued_tokens: Some(100), ..small(200) });
    let first = submit(&engine, text_request(&[1; 101], unlimited()));
    let full = engine.submit(text_request(&[3], unlimited()), channel_sink().0).err();
    assert_eq!(full, Some(SubmitError::Full));
    drop(control);
    assert_eq!(first.1.iter().last(), Some(Event::Done));
    run(&engine, text_request(&[3], unlimited()));
}

#[test]
fn a_cancelled_request_is_gone_after_one_step() {
    let (engine, control) = controlled(vec![9]);
    let (handle, events) = submit(&engine, text_request(&[1; 20], unlimited()));
    control.send(Step::Run).unwrap();
    control.send(Step::Run).unwrap();
    let met: Vec<Event> = events.iter().take(3).collect();
    assert_eq!(tokens_of(&met, 0), [9, 9]);
    drop(handle);
    // The step that was waiting. Another one is not allowed.
    control.send(Step::Run).unwrap();
    let rest: Vec<Event> = events.iter().collect();
    assert!(rest.iter().all(|e| matches!(e, Event::Tokens { .. })), "{rest:?}");
    engine.shutdown();
    engine.wait();
    let stats = engine.stats();
    assert_eq!(
        (stats.full_blocks_used, stats.sliding_blocks_used, stats.running, stats.waiting),
        (0, 0, 0, 0)
    );
}

#[test]
fn a_request_is_cancelled_before_it_begins() {
    let (engine, control) = controlled(vec![9, RETURN]);
    let (_first, events) = submit(&engine, text_request(&[1; 20], unlimited()));
    let (second, nothing) = submit(&engine, text_request(&[2; 20], unlimited()));
    second.cancel();
    // At most the first step can have taken it in.
    drop(control);
    assert_eq!(events.iter().last(), Some(Event::Done));
    assert!(!nothing.iter().any(|e| e == Event::Done));
}

#[test]
fn sinks_that_refuse_or_panic_cost_their_own_request_only() {
    let engine = says("a b c<|return|>");
    for panics in [false, true] {
        let (gone, watch) = channel::<()>();
        let sink = Box::new(move |_| {
            let _alive = &gone;
            assert!(!panics, "this sink panics on purpose");
            false
        });
        let _handle = engine.submit(text_request(&[1, 2], unlimited()), sink).unwrap();
        assert!(watch.recv().is_err(), "the sink is dropped");
        let events = run(&engine, text_request(&[1, 2, 3], unlimited()));
        assert_eq!(tokens_of(&events, 0).last(), Some(&RETURN));
    }
    engine.shutdown();
    engine.wait();
    assert_eq!(engine.stats().full_blocks_used, 0);
}

#[test]
fn after_a_failed_step_requests_go_on_where_they_were() {
    for fault in [Step::Fail("no power".to_owned()), Step::Panic("on purpose".to_owned())] {
        let (engine, control) = controlled((0..20).chain([RETURN]).collect());
        let requests: Vec<_> = (1..4)
            .map(|i| submit(&engine, text_request(&[i; 20], SamplingParams { n: i as usize, ..unlimited() })))
            .collect();
        for _ in 0..5 {
            control.send(Step::Run).unwrap();
        }
        control.send(fault).unwrap();
        drop(control);
        for (i, (_handle, events)) in requests.iter().enumerate() {
            let events: Vec<Event> = events.iter().collect();
            assert_eq!(events.last(), Some(&Event::Done));
            for choice in 0..=i {
                assert_eq!(tokens_of(&events, choice), (0..20).chain([RETURN]).collect::<Vec<_>>());
            }
        }
        engine.shutdown();
        engine.wait();
        let stats = engine.stats();
        assert_eq!((stats.failed_steps, stats.unhealthy, stats.full_blocks_used), (1, false, 0));
    }
}

/// Tells what steps are of.
struct Watched(Scripted, Sender<Vec<SequencePlan>>);

impl Backend for Watched {
    fn config(&self) -> &Config {
        self.0.config()
    }

    fn describe(&self) -> String {
        self.0.describe()
    }

    fn least_prompt_tokens(&self, answers: usize) -> usize {
        10 * answers
    }

    fn kv_layout(&self) -> KvLayout {
        self.0.kv_layout()
    }

    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> Result<(), gptoss::Error> {
        self.0.allocate_kv(full_blocks, sliding_blocks)
    }

    fn step(&mut self, plan: &Plan) -> Result<Vec<SequenceOutput>, gptoss::Error> {
        let outputs = self.0.step(plan)?;
        let _ = self.1.send(plan.sequences.clone());
        Ok(outputs)
    }
}

#[test]
fn beside_answers_a_prompt_gets_what_uses_the_device_well() {
    for even_steps in [false, true] {
        let (control, steps) = channel();
        let (sender, plans) = channel();
        let inner = Scripted::new(Scripted::gpt_oss(), vec![(0..20).chain([RETURN]).collect()]);
        let watched = Watched(inner.controlled_by(steps), sender);
        let options = EngineOptions { even_steps, ..small(200) };
        let engine = engine::Engine::start(Box::new(watched), harmony(), options).unwrap();
        let two = SamplingParams { n: 2, ..unlimited() };
        let (_answers, events) = submit(&engine, text_request(&[1; 20], two));
        let tokens = |plan: Vec<SequencePlan>| plan.iter().map(|s| s.tokens.len()).collect::<Vec<_>>();
        while control.send(Step::Run).is_ok() && tokens(plans.recv().unwrap()) != [1, 1] {}
        let (_prompt, others) = submit(&engine, text_request(&[2; 50], unlimited()));
        drop(control);
        let first = plans.iter().map(tokens).find(|plan| plan.len() == 3);
        assert_eq!(first, Some(vec![1, 1, if even_steps { 20 } else { 50 }]));
        let ends = [events, others].map(|events| events.iter().last());
        assert_eq!(ends, [Some(Event::Done), Some(Event::Done)]);
    }
}

#[test]
fn the_backend_knows_which_token_is_the_last() {
    let script: Vec<u32> = (0..20).chain([RETURN]).collect();
    // By its limit, by the longest length, by what it says.
    for (limit, longest, last) in
        [(Some(5), 200, true), (Some(1), 200, true), (None, 32, true), (None, 200, false)]
    {
        let (sender, plans) = channel();
        let watched = Watched(Scripted::new(Scripted::gpt_oss(), vec![script.clone()]), sender);
        let options = EngineOptions { max_model_len: Some(longest), ..small(200) };
        let engine = engine::Engine::start(Box::new(watched), harmony(), options).unwrap();
        let params = SamplingParams { max_tokens: limit, ..unlimited() };
        let events = run(&engine, text_request(&[1; 20], params));
        engine.shutdown();
        engine.wait();
        let ends: Vec<bool> = plans.iter().map(|plan| plan[0].ends).collect();
        let expected: Vec<bool> = (1..=ends.len()).map(|step| last && step == ends.len()).collect();
        assert_eq!(ends, expected);
        assert_eq!(tokens_of(&events, 0).len(), ends.len());
    }
}

/// Fails whenever a certain token is to be computed, and where it is not told right which tokens follow a prompt.
/// What clients are told comes after a step that succeeds.
struct Fragile(Scripted);

const POISON: u32 = 1000;
/// What follows it is no number.
const DAMAGE: u32 = 1001;
const PROMPT: usize = 20;

impl Backend for Fragile {
    fn config(&self) -> &Config {
        self.0.config()
    }

    fn describe(&self) -> String {
        self.0.describe()
    }

    fn kv_layout(&self) -> KvLayout {
        self.0.kv_layout()
    }

    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> Result<(), gptoss::Error> {
        self.0.allocate_kv(full_blocks, sliding_blocks)
    }

    fn step(&mut self, plan: &Plan) -> Result<Vec<SequenceOutput>, gptoss::Error> {
        if plan.sequences.iter().any(|s| s.tokens.contains(&POISON)) {
            return Err(gptoss::Error::Device("poisoned".to_owned()));
        }
        for sequence in &plan.sequences {
            let positions = sequence.position..sequence.position + sequence.tokens.len();
            assert_eq!(sequence.generated, positions.filter(|&position| position >= PROMPT).count());
        }
        let mut outputs = self.0.step(plan)?;
        for (output, sequence) in outputs.iter_mut().zip(&plan.sequences) {
            output.corrupted = sequence.tokens.contains(&DAMAGE);
        }
        Ok(outputs)
    }

    fn step_while(
        &mut self,
        plan: &Plan,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<SequenceOutput>, gptoss::Error> {
        let outputs = self.step(plan)?;
        meanwhile();
        Ok(outputs)
    }
}

#[test]
fn only_the_request_whose_logits_are_no_numbers_fails() {
    let script: Vec<u32> = (0..30).chain([RETURN]).collect();
    let inner = Scripted::new(Scripted::gpt_oss(), vec![script.clone()]);
    let inner = inner.with_seed(13, vec![0, 1, DAMAGE, 2]);
    let engine = engine::Engine::start(Box::new(Fragile(inner)), harmony(), small(200)).unwrap();
    let request = |seed| text_request(&[1; PROMPT], SamplingParams { seed: Some(seed), ..unlimited() });
    let (healthy, damaged) = (submit(&engine, request(1)), submit(&engine, request(13)));
    let (healthy, damaged) =
        [healthy, damaged].map(|(_handle, events)| events.iter().collect::<Vec<_>>()).into();
    assert_eq!(damaged.last(), Some(&Event::Failed(Failure::Corrupted)));
    assert_eq!(tokens_of(&damaged, 0), [0, 1, DAMAGE]);
    assert_eq!((tokens_of(&healthy, 0), healthy.last()), (script, Some(&Event::Done)));
    // Nobody begins with what it computed.
    let after: Vec<Event> = submit(&engine, request(2)).1.iter().collect();
    assert!(matches!(after[0], Event::Started { cached_tokens: 0, .. }), "{:?}", after[0]);
    engine.shutdown();
    engine.wait();
    let stats = engine.stats();
    assert_eq!((stats.corrupted_requests, stats.failed_steps, stats.full_blocks_used), (1, 0, 0));
}

#[test]
fn only_the_request_that_breaks_the_device_fails() {
    let script: Vec<u32> = (0..30).chain([RETURN]).collect();
    let inner = Scripted::new(Scripted::gpt_oss(), vec![script.clone()]);
    let inner = inner.with_seed(13, vec![0, 1, POISON, 2]);
    let options = EngineOptions { max_num_seqs: 4, ..small(200) };
    let engine = engine::Engine::start(Box::new(Fragile(inner)), harmony(), options).unwrap();
    let requests: Vec<_> = (1..10)
        .map(|i| {
            let seed = if i == 3 { 13 } else { 1000 + i64::from(i) };
            submit(&engine, text_request(&[i; PROMPT], SamplingParams { seed: Some(seed), ..unlimited() }))
        })
        .collect();
    for (i, (_handle, events)) in requests.iter().enumerate() {
        let events: Vec<Event> = events.iter().collect();
        if i == 2 {
            assert!(matches!(events.last(), Some(Event::Failed(Failure::Device(_)))), "{:?}", events.last());
            assert_eq!(tokens_of(&events, 0), [0, 1, POISON]);
        } else {
            assert_eq!(events.last(), Some(&Event::Done), "request {i}");
            assert_eq!(tokens_of(&events, 0), script);
        }
    }
    engine.shutdown();
    engine.wait();
    let stats = engine.stats();
    assert_eq!((stats.unhealthy, stats.full_blocks_used, stats.running, stats.waiting), (false, 0, 0, 0));
}

#[test]
fn a_step_that_fails_again_and_again_fails_its_request() {
    for fault in [Step::Fail("no power".to_owned()), Step::Panic("on purpose".to_owned())] {
        let (engine, control) = controlled(vec![9, RETURN]);
        let request = text_request(&[1; 20], SamplingParams { n: 3, ..unlimited() });
        let (_handle, events) = submit(&engine, request);
        control.send(Step::Run).unwrap();
        control.send(fault.clone()).unwrap();
        control.send(fault).unwrap();
        let events: Vec<Event> = events.iter().collect();
        let Some(Event::Failed(Failure::Device(message))) = events.last() else { panic!("{events:?}") };
        assert!(message.contains("no power") || message.contains("on purpose"), "{message}");
        assert_eq!(events.iter().filter(|e| matches!(e, Event::Failed(_))).count(), 1);
        drop(control);
        let events = run(&engine, text_request(&[1; 20], unlimited()));
        assert!(matches!(events[0], Event::Started { cached_tokens: 0, prompt_logprobs: None, .. }));
        engine.shutdown();
        engine.wait();
        let stats = engine.stats();
        assert_eq!((stats.failed_steps, stats.unhealthy, stats.full_blocks_used), (2, false, 0));
    }
}

#[test]
fn prefixes_are_shared_among_those_with_the_same_salt() {
    let engine = start(Scripted::new(Scripted::gpt_oss(), vec![vec![11, RETURN]]), small(200));
    let cached = |salt: Option<&str>| {
        let request = text_request(&[5; 50], unlimited());
        let request = engine::Request { cache_salt: salt.map(str::to_owned), ..request };
        match run(&engine, request).swap_remove(0) {
            Event::Started { cached_tokens, .. } => cached_tokens,
            other => panic!("{other:?}"),
        }
    };
    let found = [None, Some("a"), Some("b"), None, Some("a"), Some("b")].map(cached);
    assert_eq!(found, [0, 0, 0, 48, 48, 48]);
}

#[test]
fn a_second_turn_computes_what_is_new() {
    let answer: Vec<u32> = (100..130).chain([RETURN]).collect();
    let engine = start(Scripted::new(Scripted::gpt_oss(), vec![answer.clone()]), small(200));
    let first: Vec<u32> = (0..200).collect();
    run(&engine, text_request(&first, unlimited()));
    // What was said, another word for its end, and the next question.
    let second: Vec<u32> = first.iter().chain(&answer[..30]).copied().chain(300..320).collect();
    let events = run(&engine, text_request(&second, unlimited()));
    let Event::Started { cached_tokens, .. } = events[0] else { panic!("{events:?}") };
    assert_eq!(cached_tokens, 224, "all full blocks of the 230 tokens");
}

#[test]
fn tokens_come_in_groups_if_so_wished() {
    let script: Vec<u32> = (0..10).chain([RETURN]).collect();
    let engine = start(Scripted::new(Scripted::gpt_oss(), vec![script.clone()]), small(200));
    let events = run(&engine, text_request(&[1], SamplingParams { stream_interval: 4, ..unlimited() }));
    assert_eq!(tokens_of(&events, 0), script);
    let sizes: Vec<usize> = events
        .iter()
        .filter_map(|event| match event {
            Event::Tokens { token_ids, .. } => Some(token_ids.len()),
            _ => None,
        })
        .collect();
    assert_eq!(sizes, [1, 4, 4, 2]);
}

#[test]
fn an_answer_that_repeats_itself_ends() {
    let script: Vec<u32> = [1, 2, 3, 4].into_iter().chain([7, 8, 9].repeat(5)).collect();
    let engine = start(Scripted::new(Scripted::gpt_oss(), vec![script.clone()]), small(200));
    let said = |min: usize, max: usize, count: usize, min_tokens: usize| {
        let detection =
            engine::RepetitionDetection { min_pattern_size: min, max_pattern_size: max, min_count: count };
        let params = SamplingParams {
            repetition_detection: Some(detection),
            max_tokens: Some(19),
            min_tokens,
            ..SamplingParams::default()
        };
        let events = run(&engine, text_request(&[1], params));
        let Event::Finished { reason, .. } = &events[events.len() - 2] else { panic!("{events:?}") };
        (tokens_of(&events, 0).len(), *reason)
    };
    assert_eq!(said(1, 8, 3, 0), (13, FinishReason::Repetition));
    assert_eq!(said(3, 3, 2, 0), (10, FinishReason::Repetition));
    assert_eq!(said(1, 8, 3, 15), (16, FinishReason::Repetition));
    assert_eq!(said(1, 2, 2, 0), (19, FinishReason::Length));
    assert_eq!(said(4, 5, 2, 0), (19, FinishReason::Length));
    assert_eq!(said(6, 6, 2, 0), (16, FinishReason::Repetition));
}

#[test]
fn a_request_that_is_held_back_gives_its_blocks_away_and_goes_on() {
    let (engine, control) = controlled(vec![9, 8, 7, 6, RETURN]);
    let (handle, events) = submit(&engine, text_request(&[1; 20], SamplingParams { n: 2, ..unlimited() }));
    // The prompt, then the other choice too.
    for _ in 0..2 {
        control.send(Step::Run).unwrap();
    }
    let begun: Vec<Event> =
        events.iter().take_while(|event| !matches!(event, Event::Tokens { choice: 1, .. })).collect();
    let valve = handle.valve();
    valve.close();
    // A step may have begun before.
    control.send(Step::Run).unwrap();
    while engine.stats().paused != 2 {
        std::thread::yield_now();
    }
    assert_eq!((engine.stats().running, engine.stats().full_blocks_used), (0, 0));
    drop(control);
    // Others have the engine to themselves, and shutting down waits for what is held back.
    run(&engine, text_request(&[2; 20], unlimited()));
    engine.shutdown();
    valve.open();
    let events: Vec<Event> = begun.into_iter().chain(events.iter()).collect();
    assert_eq!(events.last(), Some(&Event::Done));
    assert_eq!(tokens_of(&events, 0), [9, 8, 7, 6, RETURN]);
    // `take_while` has swallowed the first.
    assert_eq!(tokens_of(&events, 1), [8, 7, 6, RETURN]);
    engine.wait();
}

#[test]
fn what_a_request_said_before_it_was_held_back_is_not_computed_again() {
    let said: Vec<u32> = (100..160).chain([RETURN]).collect();
    let (engine, control) = controlled(said.clone());
    let (handle, events) = submit(&engine, text_request(&[1; 20], unlimited()));
    for _ in 0..50 {
        control.send(Step::Run).unwrap();
    }
    let is_told = |event: &Event| matches!(event, Event::Tokens { .. });
    let begun: Vec<Event> = events.iter().filter(is_told).take(45).collect();
    handle.valve().close();
    drop(control);
    while engine.stats().paused != 1 {
        std::thread::yield_now();
    }
    handle.valve().open();
    let events: Vec<Event> = begun.into_iter().chain(events.iter()).collect();
    assert_eq!(tokens_of(&events, 0), said);
    // All but the last token once, and the block that was not full.
    let (once, computed) = (20 + 60, engine.stats().step_tokens_sum);
    assert!((once..once + BLOCK_TOKENS as u64).contains(&computed), "{computed} tokens computed");
}

#[test]
fn a_request_that_is_held_back_can_be_cancelled() {
    let engine = says("a b c<|return|>");
    let (sender, events) = channel();
    let handle = Arc::new(Mutex::new(None::<engine::RequestHandle>));
    let closer = Arc::clone(&handle);
    let sink = Box::new(move |event| {
        if let Some(handle) = &*closer.lock().unwrap() {
            handle.valve().close();
        }
        sender.send(event).is_ok()
    });
    let mut held = handle.lock().unwrap();
    *held = Some(engine.submit(text_request(&[1, 2], unlimited()), sink).unwrap());
    drop(held);
    assert!(matches!(events.recv(), Ok(Event::Started { .. })));
    while engine.stats().paused != 1 {
        std::thread::yield_now();
    }
    handle.lock().unwrap().take().unwrap().cancel();
    assert!(!events.iter().any(|event| event == Event::Done));
    assert_eq!(engine.stats().paused, 0);
}

#[test]
fn shutting_down_finishes_what_is_there() {
    let (engine, control) = controlled(vec![9, 9, RETURN]);
    let (_handle, events) = submit(&engine, text_request(&[1], unlimited()));
    engine.shutdown();
    let refused = engine.submit(text_request(&[1], unlimited()), channel_sink().0).err();
    assert_eq!(refused, Some(SubmitError::ShuttingDown));
    drop(control);
    engine.wait();
    assert_eq!(events.iter().last(), Some(Event::Done));
}

#[test]
fn aborting_fails_what_is_there() {
    let (engine, control) = controlled(vec![9]);
    let (_handle, events) = submit(&engine, text_request(&[1], unlimited()));
    control.send(Step::Run).unwrap();
    assert!(matches!(events.recv(), Ok(Event::Started { .. })));
    engine.abort();
    drop(control);
    engine.wait();
    assert_eq!(engine.stats().full_blocks_used, 0);
    assert_eq!(events.iter().last(), Some(Event::Failed(Failure::ShuttingDown)));
}

#[test]
fn dropping_the_last_handle_fails_what_is_there() {
    let (engine, control) = controlled(vec![9]);
    let slot = Arc::new(Mutex::new(None));
    let (sender, events) = channel();
    let last = Arc::clone(&slot);
    let sink = Box::new(move |event| {
        if matches!(event, Event::Tokens { .. }) {
            drop(last.lock().unwrap().take());
        }
        sender.send(event).is_ok()
    });
    let _handle = engine.submit(text_request(&[1], unlimited()), sink).unwrap();
    *slot.lock().unwrap() = Some(engine);
    drop(control);
    let events: Vec<Event> = events.iter().collect();
    // It was told of the first token while the second was computed, which comes too.
    assert_eq!((events.len(), events.last()), (4, Some(&Event::Failed(Failure::ShuttingDown))));
}

#[test]
fn a_sink_may_own_the_last_handle() {
    let engine = says("x<|return|>");
    let (sender, events) = channel();
    let own = engine.clone();
    let sink = Box::new(move |event| {
        let _engine = &own;
        sender.send(event).is_ok()
    });
    let handle = engine.submit(text_request(&[1], unlimited()), sink).unwrap();
    drop(engine);
    assert_eq!(events.iter().last(), Some(Event::Done));
    drop(handle);
}

#[test]
fn clients_take_turns_where_that_is_asked_for() {
    // In what order requests of these clients, all there before the first step, are answered one at a time.
    let order = |policy, clients: &[u8]| {
        let (control, steps) = channel();
        let script = tokens("Yes.<|return|>");
        let backend = Scripted::new(Scripted::gpt_oss(), vec![script]).controlled_by(steps);
        let engine = start(backend, EngineOptions { policy, max_num_seqs: 1, ..small(200) });
        let (answered, order) = channel();
        let submit = |(i, &client): (usize, &u8)| {
            let answered = answered.clone();
            let sink = move |event| !matches!(event, Event::Finished { .. }) || answered.send(i).is_ok();
            let request = Request { client: Some([client; 32]), ..text_request(&[1, 2, 3], unlimited()) };
            engine.submit(request, Box::new(sink)).unwrap()
        };
        let handles: Vec<_> = clients.iter().enumerate().map(submit).collect();
        drop(control);
        let order = order.iter().take(clients.len()).collect::<Vec<usize>>();
        drop(handles);
        order
    };
    let clients = [1, 1, 1, 1, 2, 2, 3];
    assert_eq!(order(SchedulingPolicy::Arrival, &clients), [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(order(SchedulingPolicy::RoundRobin, &clients), [0, 4, 6, 1, 5, 2, 3]);
}

#[test]
fn who_hung_up_often_does_not_wait_for_it() {
    let (control, steps) = channel();
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens("Yes.<|return|>")]).controlled_by(steps);
    let options = EngineOptions { policy: SchedulingPolicy::RoundRobin, max_num_seqs: 1, ..small(200) };
    let engine = start(backend, options);
    let (sender, events) = channel();
    let submit = |client: u8, name: &'static str| {
        let sender = sender.clone();
        let request = Request { client: Some([client; 32]), ..text_request(&[1, 2, 3], unlimited()) };
        engine.submit(request, Box::new(move |event| sender.send((name, event)).is_ok())).unwrap()
    };
    let mut handles = vec![submit(1, "first")];
    (0..20).for_each(|_| drop(submit(2, "gone")));
    handles.extend(["second", "third"].map(|name| submit(1, name)));
    control.send(Step::Run).unwrap();
    // It is told while the next step is computed: who hung up is gone by then.
    assert_eq!(events.recv().unwrap().0, "first");
    handles.push(submit(2, "other"));
    drop(control);
    let finished = events.iter().filter(|(_, event)| matches!(event, Event::Finished { .. }));
    let order: Vec<_> = finished.map(|(name, _)| name).take(4).collect();
    assert_eq!(order, ["first", "other", "second", "third"]);
}

#[test]
fn answers_of_one_request_share_the_prompt() {
    let scripts = vec![vec![11, RETURN], vec![12, 12, RETURN], vec![13, 13, 13, RETURN]];
    let engine = start(Scripted::new(Scripted::gpt_oss(), scripts), small(200));
    let prompt: Vec<u32> = (0..50).collect();
    let events = run(&engine, text_request(&prompt, SamplingParams { n: 3, ..unlimited() }));
    let answers: Vec<Vec<u32>> = (0..3).map(|choice| tokens_of(&events, choice)).collect();
    assert_eq!(answers, [vec![11, RETURN], vec![12, 12, RETURN], vec![13, 13, 13, RETURN]]);
    engine.shutdown();
    engine.wait();
    let stats = engine.stats();
    // Three of the prompt's four blocks are full; both others take them.
    assert_eq!((stats.prefix_queries, stats.prefix_hits), (150, 96));
    assert_eq!((stats.prompt_tokens, stats.generated_tokens), (50, 9));
}

#[test]
fn a_repeated_prompt_is_cached_unless_that_is_off_or_scores_are_asked() {
    for prefix_caching in [true, false] {
        let options = EngineOptions { prefix_caching, ..small(200) };
        let engine = start(Scripted::new(Scripted::gpt_oss(), vec![vec![11, RETURN]]), options);
        let prompt: Vec<u32> = (0..50).collect();
        let cached = |params: SamplingParams| match run(&engine, text_request(&prompt, params)).swap_remove(0)
        {
            Event::Started { cached_tokens, prompt_logprobs, .. } => {
                (cached_tokens, prompt_logprobs.map(|l| l.len()))
            }
            other => panic!("{other:?}"),
        };
        let hit = if prefix_caching { 48 } else { 0 };
        assert_eq!(cached(unlimited()), (0, None));
        assert_eq!(cached(unlimited()), (hit, None));
        assert_eq!(cached(SamplingParams { prompt_logprobs: Some(1), ..unlimited() }), (0, Some(50)));
        engine.reset_prefix_cache();
        assert_eq!(cached(unlimited()), (0, None));
        assert_eq!(cached(unlimited()), (hit, None));
    }
}

#[test]
fn many_requests_in_little_memory_all_get_their_answer() {
    let script: Vec<u32> = (1..60).chain([RETURN]).collect();
    // 8 + 8 blocks beyond the least: many preemptions.
    let options = EngineOptions { max_model_len: Some(160), max_queued_tokens: Some(9999), ..small(24) };
    let engine = start(Scripted::new(Scripted::gpt_oss(), vec![script.clone()]), options);
    let prompt =
        |i: u32| -> Vec<u32> { (0..20 + 5 * (i % 16)).map(|p| if p < 33 { p } else { i }).collect() };
    let requests: Vec<_> = (0..40)
        .map(|i| {
            submit(&engine, text_request(&prompt(i), SamplingParams { n: 1 + i as usize % 3, ..unlimited() }))
        })
        .collect();
    let mut told = 0;
    for (i, (_handle, events)) in requests.iter().enumerate() {
        let events: Vec<Event> = events.iter().collect();
        assert_eq!(events.last(), Some(&Event::Done), "{:?}", events.last());
        told += events
            .iter()
            .map(|event| if let Event::Finished { preemptions, .. } = event { *preemptions } else { 0 })
            .sum::<usize>();
        for choice in 0..1 + i % 3 {
            assert_eq!(tokens_of(&events, choice), script);
        }
    }
    engine.shutdown();
    engine.wait();
    let stats = engine.stats();
    assert!(stats.preemptions > 0);
    assert_eq!(told as u64, stats.preemptions, "each is told with its choice");
    assert_eq!((stats.full_blocks_used, stats.sliding_blocks_used), (0, 0));
}

#[test]
fn an_engine_without_its_device_ends() {
    let (engine, control) = controlled(vec![9, RETURN]);
    let (_first, events) = submit(&engine, text_request(&[1; 20], unlimited()));
    control.send(Step::Lose("fell off the bus".to_owned())).unwrap();
    let events: Vec<Event> = events.iter().collect();
    let [Event::Failed(Failure::Device(_))] = &events[..] else { panic!("{events:?}") };
    engine.wait();
    let stats = engine.stats();
    assert!(stats.lost);
    assert_eq!((stats.full_blocks_used, stats.running, stats.waiting), (0, 0, 0));
    let refused = engine.submit(text_request(&[1; 20], unlimited()), Box::new(|_| true));
    assert!(matches!(refused, Err(engine::SubmitError::ShuttingDown)));
}

#[test]
fn what_was_drawn_is_told_before_the_device_is_lost() {
    let script = tokens("Hi there<|return|>");
    for failure in [Step::Lose("fell off the bus".to_owned()), Step::Panic("on purpose".to_owned())] {
        let (control, steps) = channel();
        let backend = Scripted::new(Scripted::gpt_oss(), vec![script.clone()]).controlled_by(steps);
        let engine = engine::Engine::start(Box::new(Fragile(backend)), harmony(), small(200)).unwrap();
        let params = SamplingParams { n: 2, ..unlimited() };
        let (_handle, events) = submit(&engine, text_request(&[1; 20], params));
        for step in [Step::Run, Step::Run, failure.clone(), failure.clone()] {
            // The engine may be gone by the last.
            let _ = control.send(step);
        }
        let events: Vec<Event> = events.iter().collect();
        assert!(matches!(events.last(), Some(Event::Failed(Failure::Device(_)))), "{events:?}");
        for choice in 0..2 {
            assert_eq!(tokens_of(&events, choice), script[..2 - choice], "{events:?}");
        }
        let text = |event: &Event| match event {
            Event::Tokens { choice: 0, text, .. } => text.clone(),
            _ => String::new(),
        };
        assert_eq!(events.iter().map(text).collect::<String>(), "Hi there");
    }
}
