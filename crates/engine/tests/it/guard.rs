//! The guard of the format: well-formed turns are as they would be without it, and others do not come.

use std::path::Path;
use std::sync::Arc;

use checkpoint::Checkpoint;
use cpu::Cpu;
use engine::{Engine, EngineOptions, Event, FinishReason, OutputMode, Request, SamplingParams, Scripted};
use harmony::{ChatMessage, ChatPrompt, ChatTool, FunctionTool, Harmony};
use proptest::prelude::*;
use tokenizer::Tokenizer;

use crate::common::{run, start, tokens, tokens_of, unlimited};
use crate::speculation::always;

fn repairs(events: &[Event]) -> Vec<(&'static str, u64)> {
    let finished = events.iter().find_map(|event| match event {
        Event::Finished { repairs, .. } => Some(repairs.clone()),
        _ => None,
    });
    finished.unwrap()
}

#[test]
fn the_trained_model_says_the_same_with_the_guard() {
    let folder = format!("{}/../../models/tiny-gpt-oss", env!("CARGO_MANIFEST_DIR"));
    let tokenizer = Tokenizer::from_file(&Path::new(&folder).join("tokenizer.json")).unwrap();
    let harmony = Arc::new(Harmony::new(Arc::new(tokenizer)).unwrap());
    let weights = Arc::new(Checkpoint::open(Path::new(&folder)).unwrap());
    let engines = [false, true].map(|harmony_guard| {
        let options = EngineOptions {
            eos_ids: weights.generation_config().eos_token_ids.clone(),
            max_model_len: Some(512),
            harmony_guard,
            speculation: always(),
            ..EngineOptions::default()
        };
        let cpu = Cpu::load(weights.clone(), cpu::Options::default(), &mut |_, _| {}).unwrap();
        Engine::start(Box::new(cpu), Arc::clone(&harmony), options).unwrap()
    });
    let tool =
        ChatTool { function: FunctionTool { name: "get_weather".to_owned(), ..FunctionTool::default() } };
    let (mut well_formed, mut malformed) = (0, 0);
    for (text, tools) in [
        ("What is the capital of France?", false),
        ("What is the weather in Tokyo?", true),
        ("Say hello.", false),
        ("What is 2 plus 3?", false),
        ("Tell me a story about a dog.", true),
        ("zzz qqq 17", false),
        ("", true),
    ] {
        for seed in 0..2 {
            let messages = vec![ChatMessage::new("user", text)];
            let tools: Vec<ChatTool> = tools.then(|| tool.clone()).into_iter().collect();
            let names: Vec<String> = tools.iter().map(|tool| tool.function.name.clone()).collect();
            let ids = harmony.render_chat(&ChatPrompt { tools, ..ChatPrompt::new(messages) }).unwrap();
            let params = SamplingParams {
                temperature: if seed == 0 { 0.0 } else { 1.5 },
                seed: Some(seed),
                max_tokens: Some(60),
                ..SamplingParams::default()
            };
            let output = OutputMode::Chat { tools: names.into(), begun: Vec::new() };
            let [free, guarded] = engines
                .each_ref()
                .map(|engine| run(engine, Request::new(ids.clone(), params.clone(), output.clone())));
            assert!(!repairs(&guarded).iter().any(|(kind, _)| *kind == "missing_message"), "{guarded:?}");
            if repairs(&free).is_empty() && is_known(&tokens_of(&free, 0), &harmony) {
                well_formed += 1;
                assert_eq!(tokens_of(&guarded, 0), tokens_of(&free, 0), "{text}");
            } else {
                malformed += 1;
            }
        }
    }
    assert!(well_formed > 5, "{well_formed} well-formed turns, {malformed} others");
}

/// Whether every header is one of those that the format has.
fn is_known(ids: &[u32], harmony: &Harmony) -> bool {
    let text = harmony.tokenizer().decode(ids);
    text.split("<|start|>assistant").all(|message| {
        let header = message.split("<|message|>").next().unwrap_or_default();
        let call = header.contains("to=functions.get_weather") && header.contains("<|channel|>");
        call || ["<|channel|>analysis", "<|channel|>commentary", "<|channel|>final"].contains(&header)
            || message == header
    })
}

#[test]
fn what_is_malformed_does_not_come() {
    for said in [
        "Sorry, I cannot.<|return|>",
        "<|channel|>commentary?? free text<|return|>",
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        "<|channel|>analysis<|message|>Hm.<|end|><|return|>",
    ] {
        for speculation in [None, always()] {
            let options = EngineOptions { harmony_guard: true, speculation, ..EngineOptions::default() };
            let engine = start(Scripted::new(Scripted::gpt_oss(), vec![tokens(said)]), options);
            let output = OutputMode::Chat { tools: vec!["f".to_owned()].into(), begun: Vec::new() };
            let params = SamplingParams { max_tokens: Some(60), ..unlimited() };
            let events = run(&engine, Request::new(vec![1], params, output));
            assert_eq!(repairs(&events), [], "{said}: {events:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_words_become_a_turn(words in proptest::collection::vec(0u32..199_998, 1..20), tools in 0usize..3) {
        let options = EngineOptions { harmony_guard: true, ..EngineOptions::default() };
        let engine = start(Scripted::new(Scripted::gpt_oss(), vec![words]), options);
        let tools = ["get", "get_weather"][..tools.min(2)].iter().map(|&name| name.to_owned()).collect();
        let output = OutputMode::Chat { tools, begun: Vec::new() };
        let params = SamplingParams { max_tokens: Some(60), ..unlimited() };
        let events = run(&engine, Request::new(vec![1], params, output));
        prop_assert_eq!(repairs(&events), vec![]);
    }
}

#[test]
fn an_answer_is_left_room_for() {
    let thought = format!("<|channel|>analysis<|message|>{}", " so".repeat(200));
    let engine = start(Scripted::new(Scripted::gpt_oss(), vec![tokens(&thought)]), EngineOptions::default());
    for (max_tokens, reserve, reasoning) in [(100, 64, 47), (100, 20, 77), (20, 64, 7), (100, 0, 97)] {
        let params = SamplingParams {
            max_tokens: Some(max_tokens),
            answer_reserve: reserve,
            ..SamplingParams::default()
        };
        let output = OutputMode::Chat { tools: [].into(), begun: Vec::new() };
        let events = run(&engine, Request::new(vec![1], params, output));
        let Some(Event::Finished { reason, reasoning_tokens, completion_tokens, .. }) =
            events.iter().rev().nth(1)
        else {
            panic!("{events:?}")
        };
        assert_eq!((*reason, *completion_tokens), (FinishReason::Length, max_tokens));
        assert_eq!(*reasoning_tokens, reasoning, "{max_tokens} tokens, {reserve} kept");
        let answered = harmony_text(&engine, &events).contains("<|channel|>final<|message|>");
        assert_eq!(answered, reserve > 0);
    }
}

fn harmony_text(engine: &Engine, events: &[Event]) -> String {
    engine.harmony().tokenizer().decode(&tokens_of(events, 0))
}
