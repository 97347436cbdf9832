//! The engine over the reference backend and the small random model: tokens that another implementation computed, and the
//! same tokens whatever the company.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use checkpoint::Checkpoint;
use engine::{
    Engine, EngineOptions, Event, FinishReason, Llm, OutputMode, Prompt, Request, RequestOutput,
    SamplingParams, StopReason,
};
use gptoss::Reference;
use harmony::{Harmony, Turn};
use serde_json::Value;
use tokenizer::Tokenizer;

use crate::common::{harmony, submit, tokens_of, unlimited};
use crate::speculation::always;

fn testdata(path: &str) -> String {
    format!("{}/../../testdata/{path}", env!("CARGO_MANIFEST_DIR"))
}

fn llm(options: EngineOptions) -> Llm {
    let weights = Checkpoint::open(Path::new(&testdata("model/hf-mxfp4"))).unwrap();
    let backend = Reference::new(Arc::new(weights));
    Llm::new(Engine::start(Box::new(backend), harmony(), options).unwrap())
}

/// Full and sliding blocks of the random model cost the same: two layers, keys and values, two heads of 64, f32.
const BLOCK_BYTES: usize = 2 * 16 * 2 * 2 * 64 * 4;

fn options(batched_tokens: usize, sequences: usize, blocks: usize) -> EngineOptions {
    EngineOptions {
        max_model_len: Some(256),
        max_num_seqs: sequences,
        max_num_batched_tokens: batched_tokens,
        kv_cache_bytes: blocks * BLOCK_BYTES,
        ..EngineOptions::default()
    }
}

struct Golden {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

fn golden() -> BTreeMap<String, Golden> {
    let reference: Value =
        serde_json::from_str(&std::fs::read_to_string(testdata("model/reference.json")).unwrap()).unwrap();
    let sequences = reference["sequences"].as_object().unwrap();
    let golden = |(name, sequence): (&String, &Value)| {
        let greedy = ids(&reference["greedy"][name]["tokens"]);
        (name.clone(), Golden { prompt: ids(&sequence["ids"]), greedy })
    };
    sequences.iter().map(golden).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens: Some(max_tokens), ignore_eos: true, ..unlimited() }
}

#[test]
fn greedy_answers_are_those_of_the_other_implementation() {
    let golden = golden();
    let prompts: Vec<Prompt> = golden.values().map(|g| Prompt::Tokens(g.prompt.clone())).collect();
    // Whole prompts; small chunks; so little memory that sequences give way.
    for (batched_tokens, sequences, blocks, speculation) in [
        (512, 8, 200, None),
        (7, 3, 100, None),
        (40, 8, 24, None),
        (512, 8, 200, always()),
        (40, 8, 24, always()),
    ] {
        let llm = llm(EngineOptions { speculation, ..options(batched_tokens, sequences, blocks) });
        let outputs = llm.generate(&prompts, &[greedy(32)], &mut |_| ()).unwrap();
        for ((name, golden), output) in golden.iter().zip(&outputs) {
            assert_eq!(
                output.outputs[0].token_ids, golden.greedy,
                "{name}, {batched_tokens} tokens per step"
            );
        }
        let stats = llm.engine().stats();
        assert!(blocks != 24 || stats.preemptions > 0);
        assert!(speculation.is_none() || stats.speculation.accepted_tokens > 0);
    }
}

/// What must not depend on the company: everything but what was cached.
fn essence(output: &RequestOutput) -> (Vec<Vec<u32>>, String) {
    let tokens = output.outputs.iter().map(|o| o.token_ids.clone()).collect();
    let logprobs = output.outputs.iter().map(|o| &o.logprobs).collect::<Vec<_>>();
    (tokens, format!("{logprobs:?} {:?}", output.prompt_logprobs))
}

#[test]
fn drawn_answers_do_not_depend_on_company_chunks_cache_or_guesses() {
    let golden = golden();
    let long = &golden["len64"].prompt;
    let drawn = |seed, n| SamplingParams {
        n,
        seed: Some(seed),
        logprobs: Some(3),
        max_tokens: Some(10),
        top_p: 0.9,
        frequency_penalty: 0.5,
        repetition_penalty: 1.1,
        ..unlimited()
    };
    let scored = SamplingParams { prompt_logprobs: Some(2), ..drawn(5, 1) };
    let jobs: Vec<(&[u32], SamplingParams)> = vec![
        (long, drawn(1, 3)),
        (&long[..50], drawn(2, 1)),
        (&golden["len5"].prompt, drawn(3, 2)),
        (long, scored),
        (long, drawn(1, 1)),
    ];
    let alone: Vec<_> = jobs
        .iter()
        .map(|(prompt, params)| {
            let llm = llm(options(512, 1, 100));
            let prompt = [Prompt::Tokens(prompt.to_vec())];
            let output = llm.generate(&prompt, std::slice::from_ref(params), &mut |_| ()).unwrap().remove(0);
            essence(&output)
        })
        .collect();
    assert_ne!(alone[0].0[0], alone[0].0[1], "choices differ");
    assert_eq!(alone[0].0[0], alone[4].0[0], "the first choice does not depend on how many there are");
    let (prompts, params): (Vec<_>, Vec<_>) =
        jobs.iter().map(|(prompt, params)| (Prompt::Tokens(prompt.to_vec()), params.clone())).unzip();
    let mut guessed = 0;
    for (batched_tokens, sequences, blocks, speculation) in [
        (512, 8, 200, None),
        (9, 9, 200, None),
        (33, 4, 24, None),
        (512, 8, 200, always()),
        (33, 4, 24, always()),
    ] {
        let llm = llm(EngineOptions { speculation, ..options(batched_tokens, sequences, blocks) });
        // The second time most prompts come from the cache.
        for _ in 0..2 {
            let outputs = llm.generate(&prompts, &params, &mut |_| ()).unwrap();
            assert_eq!(outputs.iter().map(essence).collect::<Vec<_>>(), alone);
        }
        if blocks == 200 {
            let again = llm.generate(&prompts[..1], &params[..1], &mut |_| ()).unwrap();
            assert_eq!(again[0].cached_tokens, 48);
        }
        guessed += llm.engine().stats().speculation.draft_tokens;
    }
    assert!(guessed > 0);
}

#[test]
fn the_trained_model_answers_and_calls_tools() {
    let folder = format!("{}/../../models/tiny-gpt-oss", env!("CARGO_MANIFEST_DIR"));
    let checkpoint = Checkpoint::open(Path::new(&folder)).unwrap();
    let tokenizer = Tokenizer::from_file(&Path::new(&folder).join("tokenizer.json")).unwrap();
    let options = EngineOptions {
        eos_ids: checkpoint.generation_config().eos_token_ids.clone(),
        max_model_len: Some(512),
        max_num_batched_tokens: 100,
        ..EngineOptions::default()
    };
    let harmony = Arc::new(Harmony::new(Arc::new(tokenizer)).unwrap());
    let engine = Engine::start(Box::new(Reference::new(Arc::new(checkpoint))), harmony, options).unwrap();
    let reference: Value =
        serde_json::from_str(&std::fs::read_to_string(testdata("model/tiny-gpt-oss.json")).unwrap()).unwrap();
    let cases = [
        ("capital_low", None, Some("The capital of France is Paris."), None, FinishReason::Stop),
        (
            "tool_call",
            Some("I should call get_weather."),
            None,
            Some("{\"location\": \"Tokyo\"}"),
            FinishReason::ToolCalls,
        ),
    ];
    let requests: Vec<_> = cases
        .iter()
        .map(|(name, ..)| {
            let params = SamplingParams {
                logprobs: Some(0),
                prompt_logprobs: Some(0),
                ignore_eos: false,
                ..greedy(64)
            };
            let output = OutputMode::Chat { tools: vec!["get_weather".to_owned()].into(), begun: Vec::new() };
            submit(&engine, Request::new(ids(&reference["prompts"][name]["ids"]), params, output))
        })
        .collect();
    for ((name, reasoning, content, arguments, expected), (_handle, events)) in
        cases.into_iter().zip(requests)
    {
        let golden = &reference["prompts"][name];
        let events: Vec<Event> = events.iter().collect();
        let stop = golden["first_stop"].as_u64().unwrap() as usize;
        assert_eq!(tokens_of(&events, 0), ids(&golden["greedy"])[..=stop], "{name}");

        let mut turn = Turn::default();
        let mut logprobs = Vec::new();
        for event in &events {
            match event {
                Event::Started { prompt_logprobs: Some(scores), .. } => {
                    logprobs.extend(scores.iter().map(|s| s.as_ref().map(|s| s.logprob)));
                }
                Event::Tokens { deltas, logprobs: new, .. } => {
                    deltas.iter().for_each(|delta| turn.apply(delta));
                    logprobs.extend(new.iter().map(|s| Some(s.logprob)));
                }
                Event::Finished { reason, stop, .. } => {
                    let call = engine.harmony().stop_ids()[1];
                    let token = (expected == FinishReason::ToolCalls).then_some(StopReason::Token(call));
                    assert_eq!((*reason, stop), (expected, &token));
                }
                _ => {}
            }
        }
        assert_eq!((turn.reasoning.as_deref(), turn.content.as_deref()), (reasoning, content));
        assert_eq!(turn.tool_calls.first().map(|call| call.arguments.as_str()), arguments);
        let array = |field: &str| golden[field].as_array().unwrap().iter();
        let expected = array("prompt_logprobs").chain(array("logprobs").take(stop + 1));
        assert_eq!(logprobs.len(), expected.clone().count());
        for (found, expected) in logprobs.iter().zip(expected) {
            match (found, expected.as_f64()) {
                (Some(found), Some(expected)) => {
                    assert!((f64::from(*found) - expected).abs() < 1e-4, "{name}: {found}, not {expected}");
                }
                (None, None) => {}
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}
