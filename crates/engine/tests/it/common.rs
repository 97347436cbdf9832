//! Engines over scripts, and what they answer.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use engine::{
    Engine, EngineOptions, Event, OutputMode, Request, RequestHandle, SamplingParams, Scripted, Sink,
};
use harmony::Harmony;
use tokenizer::Tokenizer;

pub(crate) const RETURN: u32 = 200_002;
pub(crate) const CALL: u32 = 200_012;

pub(crate) fn harmony() -> Arc<Harmony> {
    Arc::new(Harmony::new(Tokenizer::o200k_harmony()).unwrap())
}

/// The tokens of a text in which special tokens are spelled.
pub(crate) fn tokens(text: &str) -> Vec<u32> {
    Tokenizer::o200k_harmony().encode_with_special(text)
}

pub(crate) fn start(backend: Scripted, options: EngineOptions) -> Engine {
    Engine::start(Box::new(backend), harmony(), options).unwrap()
}

/// An engine that says this text to everyone.
pub(crate) fn says(text: &str) -> Engine {
    start(Scripted::new(Scripted::gpt_oss(), vec![tokens(text)]), EngineOptions::default())
}

pub(crate) fn text_request(prompt: &[u32], params: SamplingParams) -> Request {
    Request::new(prompt.to_vec(), params, OutputMode::Text)
}

pub(crate) fn unlimited() -> SamplingParams {
    SamplingParams { max_tokens: None, ..SamplingParams::default() }
}

pub(crate) fn submit(engine: &Engine, request: Request) -> (RequestHandle, Receiver<Event>) {
    let (sink, events) = channel_sink();
    (engine.submit(request, sink).unwrap(), events)
}

pub(crate) fn channel_sink() -> (Sink, Receiver<Event>) {
    let (sender, events) = channel();
    (Box::new(move |event| sender.send(event).is_ok()), events)
}

/// All events until the request is gone; checks their order.
pub(crate) fn run(engine: &Engine, request: Request) -> Vec<Event> {
    let n = request.params.n;
    let (_handle, events) = submit(engine, request);
    let events: Vec<Event> = events.iter().collect();
    assert!(matches!(events[0], Event::Started { .. }), "{events:?}");
    assert_eq!(events.last(), Some(&Event::Done));
    for index in 0..n {
        let of = |e: &Event| match e {
            Event::Tokens { choice, .. } | Event::Finished { choice, .. } => *choice == index,
            _ => false,
        };
        let own: Vec<&Event> = events.iter().filter(|e| of(e)).collect();
        let finished = own.iter().filter(|e| matches!(e, Event::Finished { .. })).count();
        assert!(finished == 1 && matches!(own.last(), Some(Event::Finished { .. })), "{own:?}");
    }
    events
}

/// The tokens of one choice.
pub(crate) fn tokens_of(events: &[Event], index: usize) -> Vec<u32> {
    let of = |event: &Event| match event {
        Event::Tokens { choice, token_ids, .. } if *choice == index => token_ids.clone(),
        _ => Vec::new(),
    };
    events.iter().flat_map(of).collect()
}
