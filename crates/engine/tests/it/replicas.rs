//! Several engines behind one front: which of them takes a request, and that nobody notices.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use checkpoint::Checkpoint;
use cpu::Cpu;
use engine::{
    Engine, EngineOptions, Event, Place, Replicas, Request, RequestHandle, SamplingParams, Scripted, Step,
    SubmitError,
};

use crate::common::{RETURN, channel_sink, harmony, start, text_request, tokens_of, unlimited};

/// Engines that end every answer at once, and what lets their steps through.
fn controlled(options: &EngineOptions) -> (Replicas, [Sender<Step>; 2]) {
    let (steps, engines): (Vec<_>, Vec<_>) = (0..2)
        .map(|_| {
            let (steps, control) = channel();
            let backend = Scripted::new(Scripted::gpt_oss(), vec![vec![RETURN]]).controlled_by(control);
            (steps, start(backend, options.clone()))
        })
        .unzip();
    (Replicas::new(engines), steps.try_into().unwrap())
}

/// The same, without control.
fn free(options: &EngineOptions) -> Replicas {
    controlled(options).0
}

/// Where a request went, and what becomes of it.
fn send(replicas: &Replicas, request: Request) -> (usize, RequestHandle, Receiver<Event>) {
    let place = Cell::new(usize::MAX);
    let (sink, events) = channel_sink();
    let sink = |number| {
        place.set(number);
        sink
    };
    let handle = replicas.submit(request, sink).unwrap();
    (place.get(), handle, events)
}

/// Where a request went, and how much of its prompt was cached, once it is done.
fn ask(replicas: &Replicas, request: Request) -> (usize, usize) {
    let (place, _handle, events) = send(replicas, request);
    let events: Vec<Event> = events.iter().collect();
    assert_eq!(events.last(), Some(&Event::Done));
    let Event::Started { cached_tokens, .. } = events[0] else { panic!("{events:?}") };
    (place, cached_tokens)
}

/// A prompt of so many blocks of this token, and one token more.
fn prompt(token: u32, blocks: usize) -> Request {
    text_request(&[vec![token; blocks * 16], vec![1]].concat(), unlimited())
}

#[test]
fn idle_engines_take_turns_and_a_prefix_is_found_again() {
    let replicas = free(&EngineOptions::default());
    assert_eq!(ask(&replicas, prompt(5, 10)), (0, 0));
    assert_eq!(ask(&replicas, prompt(6, 10)), (1, 0));
    assert_eq!(ask(&replicas, prompt(5, 12)), (0, 160));
    assert_eq!(ask(&replicas, prompt(6, 12)).0, 1);
    assert_eq!(ask(&replicas, prompt(6, 3)).0, 1);
    assert_eq!(ask(&replicas, prompt(5, 20)).0, 0);
    // The longer beginning counts, not the newer one.
    let mixed = |fives: usize, token| {
        text_request(&[vec![5; fives * 16], vec![token; 160], vec![1]].concat(), unlimited())
    };
    assert_eq!(ask(&replicas, mixed(2, 7)).0, 0);
    // Unknown prompts go to the one that has rested longer.
    assert_eq!(ask(&replicas, prompt(8, 10)), (1, 0));
    assert_eq!(ask(&replicas, prompt(9, 10)), (0, 0));
}

#[test]
fn a_long_queue_counts_more_than_a_prefix() {
    let (replicas, steps) = controlled(&EngineOptions::default());
    let mut sent = Vec::new();
    let mut place = |request| {
        let (place, handle, events) = send(&replicas, request);
        sent.push((handle, events));
        place
    };
    let shared = || prompt(5, 10);
    let places: Vec<usize> =
        [shared(), prompt(6, 10), prompt(7, 10), prompt(8, 10)].into_iter().map(&mut place).collect();
    assert_eq!(places, [0, 1, 0, 1]);
    // Of 2 and 2, then 3 and 2, the one with the prefix; of 4 and 2 the other.
    assert_eq!([place(shared()), place(shared()), place(shared())], [0, 0, 1]);
    drop(steps);
    for (_handle, events) in &sent {
        assert_eq!(events.iter().last(), Some(Event::Done));
    }
}

#[test]
fn a_full_queue_leaves_a_request_to_another() {
    let options = EngineOptions { max_queued_requests: 1, ..EngineOptions::default() };
    let (replicas, _steps) = controlled(&options);
    let first = send(&replicas, prompt(5, 10));
    let second = send(&replicas, prompt(5, 10));
    assert_eq!((first.0, second.0), (0, 1));
    let refused = replicas.submit(prompt(5, 10), |_| channel_sink().0).err();
    assert_eq!(refused, Some(SubmitError::Full));
    // What a request asks for is checked as ever.
    drop((first, second));
    let replicas = free(&EngineOptions::default());
    let refused = replicas.submit(text_request(&[], unlimited()), |_| channel_sink().0).err();
    assert_eq!(refused, Some(SubmitError::EmptyPrompt));
}

#[test]
fn a_request_can_be_for_one_engine() {
    let replicas = free(&EngineOptions::default());
    let second = replicas.only(1);
    assert_eq!(ask(&second, prompt(5, 10)), (1, 0));
    assert_eq!(ask(&second, prompt(6, 10)), (1, 0));
    // What went there is known to all.
    assert_eq!(ask(&replicas, prompt(6, 12)), (1, 160));
    assert_eq!(ask(&replicas.only(0), prompt(6, 12)), (0, 0));
    let refused = replicas.only(2).submit(prompt(5, 10), |_| channel_sink().0).err();
    assert_eq!(refused, Some(SubmitError::ShuttingDown));
}

#[test]
fn prefixes_of_other_salts_are_no_reason() {
    let replicas = free(&EngineOptions::default());
    let salted = |salt: &str| Request { cache_salt: Some(salt.to_owned()), ..prompt(5, 10) };
    assert_eq!(ask(&replicas, salted("a")), (0, 0));
    assert_eq!(ask(&replicas, salted("b")), (1, 0));
    assert_eq!(ask(&replicas, prompt(5, 10)), (0, 0));
    assert_eq!(ask(&replicas, salted("b")), (1, 160));
    assert_eq!(ask(&replicas, salted("a")), (0, 160));
    assert_eq!(ask(&replicas, salted("a")), (0, 160));
}

#[test]
fn without_a_prefix_cache_engines_take_turns() {
    let replicas = free(&EngineOptions { prefix_caching: false, ..EngineOptions::default() });
    let places: Vec<usize> = (0..4).map(|_| ask(&replicas, prompt(5, 10)).0).collect();
    assert_eq!(places, [0, 1, 0, 1]);
}

#[test]
fn forgotten_prefixes_are_forgotten_everywhere() {
    let replicas = free(&EngineOptions::default());
    ask(&replicas, prompt(5, 10));
    assert_eq!(ask(&replicas, prompt(5, 10)), (0, 160));
    ask(&replicas, prompt(6, 10));
    replicas.reset_prefix_cache();
    assert_eq!(ask(&replicas, prompt(6, 10)), (0, 0));
    assert_eq!(ask(&replicas, prompt(5, 10)), (1, 0));
}

#[test]
fn who_is_lost_takes_nothing_until_there_is_another() {
    let (mut replicas, [lost, held]) = controlled(&EngineOptions::default());
    let (place, _handle, events) = send(&replicas, prompt(5, 10));
    assert_eq!(place, 0);
    lost.send(Step::Lose("gone".to_owned())).unwrap();
    assert!(matches!(events.iter().last(), Some(Event::Failed(_))));
    replicas.serving().next().unwrap().1.wait();
    let waiting = [send(&replicas, prompt(5, 10)), send(&replicas, prompt(5, 10))];
    assert_eq!(waiting.each_ref().map(|sent| sent.0), [1, 1]);
    replicas.set(0, Place::Loading);
    assert_eq!(replicas.serving().map(|(number, _)| number).collect::<Vec<_>>(), [1]);
    assert_eq!(send(&replicas, prompt(5, 10)).0, 1);
    replicas.set(
        0,
        Place::Serving(start(
            Scripted::new(Scripted::gpt_oss(), vec![vec![RETURN]]),
            EngineOptions::default(),
        )),
    );
    // It knows no prefix, but the other has much to do.
    assert_eq!(ask(&replicas, prompt(5, 10)), (0, 0));
    drop(held);
    replicas.set(0, Place::Gone);
    replicas.set(1, Place::Gone);
    let refused = replicas.submit(prompt(5, 10), |_| channel_sink().0).err();
    assert_eq!(refused, Some(SubmitError::ShuttingDown));
}

fn real() -> Engine {
    let model = format!("{}/../../testdata/model/hf-mxfp4", env!("CARGO_MANIFEST_DIR"));
    let weights = Checkpoint::open(Path::new(&model)).unwrap();
    let options = cpu::Options { threads: Some(1), ..cpu::Options::default() };
    let backend = Cpu::load(Arc::new(weights), options, &mut |_, _| ()).unwrap();
    let options = EngineOptions { max_model_len: Some(256), seed: 11, ..EngineOptions::default() };
    Engine::start(Box::new(backend), harmony(), options).unwrap()
}

/// The answers of a few requests, most of which bring no seed, and where they went.
fn answers(replicas: &Replicas) -> (Vec<Vec<Vec<u32>>>, Vec<usize>) {
    let params = |seed, n| SamplingParams { seed, n, max_tokens: Some(12), ignore_eos: true, ..unlimited() };
    let requests = [
        (20, params(None, 1)),
        (20, params(Some(-1), 1)),
        (40, params(None, 3)),
        (20, params(Some(3), 1)),
        (70, params(None, 1)),
        (20, params(Some(3), 1)),
    ];
    // All at once, so that each engine has some.
    let sent: Vec<_> = requests
        .into_iter()
        .map(|(tokens, params)| {
            let n = params.n;
            (n, send(replicas, text_request(&(100..100 + tokens).collect::<Vec<_>>(), params)))
        })
        .collect();
    let mut places = Vec::new();
    let mut answers = Vec::new();
    for (n, (place, _handle, events)) in sent {
        let events: Vec<Event> = events.iter().collect();
        assert_eq!(events.last(), Some(&Event::Done));
        places.push(place);
        answers.push((0..n).map(|choice| tokens_of(&events, choice)).collect());
    }
    (answers, places)
}

#[test]
fn answers_are_those_of_one_engine() {
    let (expected, places) = answers(&Replicas::new(vec![real()]));
    assert_eq!(places, [0; 6]);
    assert_ne!(expected[0], expected[1], "requests without a seed differ");
    assert_eq!(expected[3], expected[5]);
    let (found, places) = answers(&Replicas::new(vec![real(), real(), real()]));
    assert!((0..3).all(|place| places.contains(&place)), "{places:?}");
    assert_eq!(found, expected);
}
