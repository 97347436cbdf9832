//! With guesses and without: the same answers, in fewer steps.

use engine::{
    Engine, EngineOptions, Event, FinishReason, Form, OutputMode, RepetitionDetection, Request,
    SamplingParams, Scripted, Speculation, StopReason, TurnRules,
};
use gptoss::TokenLogprobs;
use harmony::Delta;
use proptest::prelude::*;

use crate::common::{run, start, text_request, tokens, unlimited};

pub(crate) fn always() -> Option<Speculation> {
    Some(Speculation { adaptive: false, lookup_min: 1, ..Speculation::default() })
}

fn engines(script: &[u32]) -> [Engine; 2] {
    [None, always()].map(|speculation| {
        let options = EngineOptions { speculation, kv_cache_bytes: 400 * 4096, ..EngineOptions::default() };
        start(Scripted::new(Scripted::gpt_oss(), vec![script.to_vec()]), options)
    })
}

type Said =
    (Vec<u32>, String, Vec<Delta>, Vec<TokenLogprobs>, Option<(FinishReason, Option<StopReason>, usize)>);

/// What a choice said, however it was cut into events.
fn said(events: &[Event], index: usize) -> Said {
    let mut said = Said::default();
    for event in events {
        match event {
            Event::Tokens { choice, token_ids, text, deltas, logprobs } if *choice == index => {
                said.0.extend(token_ids);
                said.1.push_str(text);
                deltas.iter().for_each(|delta| join(&mut said.2, delta));
                said.3.extend(logprobs.clone());
            }
            Event::Finished { choice, reason, stop, reasoning_tokens, .. } if *choice == index => {
                said.4 = Some((*reason, stop.clone(), *reasoning_tokens));
            }
            _ => {}
        }
    }
    said
}

fn join(deltas: &mut Vec<Delta>, delta: &Delta) {
    match (deltas.last_mut(), delta) {
        (Some(Delta::Reasoning(text)), Delta::Reasoning(more))
        | (Some(Delta::Content(text)), Delta::Content(more)) => {
            text.push_str(more);
        }
        _ => deltas.push(delta.clone()),
    }
}

fn check(script: &[u32], request: &Request) {
    let [plain, guessing] = engines(script);
    let (expected, found) = (run(&plain, request.clone()), run(&guessing, request.clone()));
    for choice in 0..request.params.n {
        assert_eq!(said(&found, choice), said(&expected, choice));
    }
    for engine in [&plain, &guessing] {
        engine.shutdown();
        engine.wait();
        assert_eq!(engine.stats().full_blocks_used, 0);
    }
    assert_eq!(plain.stats().generated_tokens, guessing.stats().generated_tokens);
}

#[test]
fn what_repeats_itself_takes_fewer_steps() {
    let script: Vec<u32> =
        tokens(&"The same words again. ".repeat(20)).into_iter().chain([200_002]).collect();
    let [plain, guessing] = engines(&script);
    for engine in [&plain, &guessing] {
        let events = run(engine, text_request(&[1], unlimited()));
        assert_eq!(said(&events, 0).0, script);
        engine.shutdown();
        engine.wait();
    }
    let (plain, guessing) = (plain.stats(), guessing.stats());
    assert_eq!(plain.steps, script.len() as u64);
    assert!(guessing.steps * 3 < plain.steps, "{} steps, {} without guesses", guessing.steps, plain.steps);
    let counts = guessing.speculation;
    assert_eq!(guessing.steps + counts.accepted_tokens, script.len() as u64);
    assert_eq!(counts.accepted_per_position.iter().sum::<u64>(), counts.accepted_tokens);
    assert!(counts.draft_tokens > counts.accepted_tokens && counts.drafts < guessing.steps);
    assert_eq!(plain.speculation, engine::SpeculationCounts::default());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn any_script_and_any_limits(
        // Few words, so that something repeats; markers among them.
        script in proptest::collection::vec(
            prop::sample::select(vec![
                " a", " a", " a", " b", " b", " stop", "<|channel|>", "analysis", "final", "<|message|>", "<|end|>", "<|start|>",
                "assistant", "<|return|>",
            ]),
            1..40,
        ),
        chat in any::<bool>(),
        n in 1usize..3,
        max_tokens in prop::option::of(1usize..60),
        min_tokens in 0usize..30,
        stop in any::<bool>(),
        bad_words in any::<bool>(),
        budget in prop::option::of(0usize..12),
        repetition in any::<bool>(),
        logprobs in prop::option::of(0usize..3),
        stream_interval in 1usize..4,
    ) {
        let script: Vec<u32> = script.into_iter().flat_map(tokens).collect();
        let params = SamplingParams {
            n,
            max_tokens: Some(max_tokens.unwrap_or(60)),
            min_tokens: min_tokens.min(max_tokens.unwrap_or(60)),
            stop: if stop { vec!["a stop".to_owned(), "b b b".to_owned()] } else { Vec::new() },
            bad_words: if bad_words { vec!["a b a".to_owned(), "stop".to_owned()] } else { Vec::new() }.into(),
            thinking_token_budget: budget,
            repetition_detection: repetition.then_some(RepetitionDetection {
                min_pattern_size: 1, max_pattern_size: 4, min_count: 5,
            }),
            logprobs,
            stream_interval,
            ..SamplingParams::default()
        };
        let output = match chat {
            true => OutputMode::Chat { tools: [].into(), begun: Vec::new() },
            false => OutputMode::Text,
        };
        check(&script, &Request::new(vec![1, 2, 3], params, output));
    }
}

#[test]
fn grammars_hold_for_guesses() {
    let grammars = engines(&[1]);
    let grammar = |form: Form| {
        let rules = TurnRules { reasoning: true, answer: Some(form), calls: Vec::new(), many_calls: false };
        grammars[0].grammars().turn(&rules).unwrap()
    };
    let thought = "<|channel|>analysis<|message|> a b a b a b c a b a b<|end|><|start|>assistant";
    let regex = |form: &str| Form::Regex(form.to_owned());
    for (form, text) in [
        (regex("( a| b)*"), " a b a b a b a b a b a b"),
        // What is guessed is not allowed for ever.
        (regex("( a b){3} c( a b)*"), " a b a b a b a b a b"),
        (regex("( a){4}"), " a a a a a a a a"),
        (regex("( a){9,12}d?"), " a a a a a a a a a a a a a a a"),
        // A parser of it cannot go back.
        (
            Form::Lark("start: (\" a\" some)*\nsome[max_tokens=3]: /[ b]+/".to_owned()),
            " a b b a b b a b b a b b",
        ),
    ] {
        for min_tokens in [0, 25] {
            let script = tokens(&format!("{thought}<|channel|>final<|message|>{text}<|return|>"));
            let params = SamplingParams { max_tokens: Some(50), min_tokens, ..unlimited() };
            let output = OutputMode::Chat { tools: [].into(), begun: Vec::new() };
            let request =
                Request { grammar: Some(grammar(form.clone())), ..Request::new(vec![1], params, output) };
            check(&script, &request);
        }
    }
}
