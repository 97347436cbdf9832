//! From tokens to text, message fields and reasons, over scripts.

use engine::{
    EngineOptions, Event, Failure, FinishReason, OutputMode, Request, SamplingParams, Scripted, StopReason,
};
use harmony::{Delta, Turn};

use crate::common::{CALL, RETURN, run, says, start, submit, text_request, tokens, tokens_of, unlimited};

type End = (FinishReason, Option<StopReason>);

fn ending(events: &[Event]) -> End {
    match &events[events.len() - 2] {
        Event::Finished { reason, stop, .. } => (*reason, stop.clone()),
        other => panic!("{other:?}"),
    }
}

/// The text that an engine which says `script` gives, and why it ended.
fn text(script: &str, params: SamplingParams) -> (String, End) {
    let events = run(&says(script), text_request(&[1, 2], params));
    let texts = events.iter().filter_map(|e| match e {
        Event::Tokens { text, .. } => Some(text.as_str()),
        _ => None,
    });
    (texts.collect(), ending(&events))
}

fn stops(strings: &[&str]) -> SamplingParams {
    SamplingParams { stop: strings.iter().map(|&s| s.to_owned()).collect(), ..unlimited() }
}

#[test]
fn texts_and_how_they_end() {
    let stop = |s: &str| (FinishReason::Stop, Some(StopReason::Text(s.to_owned())));
    let token = |id| (FinishReason::Stop, Some(StopReason::Token(id)));
    let turn = (FinishReason::Stop, None);
    let length = (FinishReason::Length, None);
    let hello = tokens(" world")[0];
    let cases: Vec<(&str, SamplingParams, &str, End)> = vec![
        ("Hello world!<|return|>", unlimited(), "Hello world!", turn.clone()),
        ("Hello world!<|call|>", unlimited(), "Hello world!", token(CALL)),
        ("Hello world!<|endoftext|>", unlimited(), "Hello world!", token(199_999)),
        ("Hello<|end|> world!<|return|>", unlimited(), "Hello world!", turn.clone()),
        (
            "Hello<|end|> world!<|return|>",
            SamplingParams { skip_special_tokens: false, ..unlimited() },
            "Hello<|end|> world!",
            turn.clone(),
        ),
        ("Hello world!<|return|>", stops(&["o w"]), "Hell", stop("o w")),
        (
            "Hello world!<|return|>",
            SamplingParams { include_stop_str_in_output: true, ..stops(&["o w"]) },
            "Hello w",
            stop("o w"),
        ),
        ("Hello world!<|return|>", stops(&["!!", "d!x", "zz"]), "Hello world!", turn.clone()),
        ("Hello world!<|return|>", stops(&["world", "o"]), "Hell", stop("o")),
        ("naïve 👋🏽!<|return|>", stops(&["🏽"]), "naïve 👋", stop("🏽")),
        (
            "Hello world!<|return|>",
            SamplingParams { max_tokens: Some(2), ..unlimited() },
            "Hello world",
            length.clone(),
        ),
        (
            "Hello world!<|return|>",
            SamplingParams { stop_token_ids: vec![hello], ..unlimited() },
            "Hello",
            token(hello),
        ),
        (
            "Hello world!<|return|>",
            SamplingParams { stop_token_ids: vec![hello], include_stop_str_in_output: true, ..unlimited() },
            "Hello world",
            token(hello),
        ),
        // The script begins again.
        (
            "Hi<|return|>",
            SamplingParams { ignore_eos: true, max_tokens: Some(5), ..unlimited() },
            "HiHiHi",
            length.clone(),
        ),
        ("a b a b<|return|>", SamplingParams { min_tokens: 3, ..stops(&["a"]) }, "a b a b", turn),
        ("a b a b a<|return|>", SamplingParams { min_tokens: 4, ..stops(&[" a"]) }, "a b a b", stop(" a")),
        // It begins before, and is complete behind.
        ("a b a b a<|return|>", SamplingParams { min_tokens: 3, ..stops(&["b a b"]) }, "a ", stop("b a b")),
        // Half a character at the end.
        ("👋🏽", SamplingParams { max_tokens: Some(1), ..unlimited() }, "\u{fffd}", length),
    ];
    for (script, params, expected, end) in cases {
        assert_eq!(text(script, params.clone()), (expected.to_owned(), end), "{script} with {params:?}");
    }
}

#[test]
fn stop_tokens_are_not_drawn_before_min_tokens() {
    let params = SamplingParams { min_tokens: 3, max_tokens: Some(6), ..unlimited() };
    let events = run(&says("<|return|>"), text_request(&[1], params.clone()));
    let found = tokens_of(&events, 0);
    assert_eq!(found.len(), 4);
    assert!(!found[..3].contains(&RETURN) && found[3] == RETURN, "{found:?}");
    assert_eq!(ending(&events), (FinishReason::Stop, None));
    // Where no others may come they come, and end nothing yet.
    let only = SamplingParams { allowed_token_ids: Some(vec![RETURN].into()), ..params };
    assert_eq!(tokens_of(&run(&says("x"), text_request(&[1], only)), 0), [RETURN; 4]);
    // So does what the end of reasoning demands.
    let end = tokens("<|end|>");
    let spent = SamplingParams {
        thinking_token_budget: Some(0),
        stop_token_ids: end.clone(),
        min_tokens: 8,
        max_tokens: Some(10),
        ..unlimited()
    };
    let output = OutputMode::Chat { tools: [].into(), begun: Vec::new() };
    let script = "<|channel|>analysis<|message|>one two";
    let found = tokens_of(&run(&says(script), Request::new(vec![1], spent, output)), 0);
    assert_eq!(found[..4], [tokens("<|channel|>analysis<|message|>"), end].concat());
}

#[test]
fn fields_that_leave_no_token_fail_the_request() {
    let params = SamplingParams {
        allowed_token_ids: Some(tokens("the").into()),
        bad_words: vec!["the".to_owned()].into(),
        ..unlimited()
    };
    let engine = says("x");
    let (_handle, events) = submit(&engine, text_request(&[1], params));
    assert_eq!(events.iter().last(), Some(Event::Failed(Failure::Forbidden)));
}

#[test]
fn nothing_is_generated_when_only_the_prompt_is_asked() {
    let params = SamplingParams { max_tokens: Some(0), prompt_logprobs: Some(2), ..unlimited() };
    let events = run(&says("x"), text_request(&[1, 2, 3], params));
    let Event::Started { prompt_logprobs: Some(scores), .. } = &events[0] else { panic!("{events:?}") };
    assert_eq!(
        scores.iter().map(|s| s.as_ref().map(|s| s.token)).collect::<Vec<_>>(),
        [None, Some(2), Some(3)]
    );
    assert_eq!(events.len(), 3);
    assert_eq!(ending(&events), (FinishReason::Length, None));
}

#[test]
fn each_token_has_its_log_probability_also_while_its_text_is_held_back() {
    let params = SamplingParams { logprobs: Some(2), ..stops(&["Hello world?"]) };
    let events = run(&says("Hello world!<|return|>"), text_request(&[1], params));
    let mut texts = Vec::new();
    for event in &events {
        if let Event::Tokens { token_ids, logprobs, text, .. } = event {
            assert_eq!(logprobs.iter().map(|l| l.token).collect::<Vec<_>>(), *token_ids);
            assert!(logprobs.iter().all(|l| l.top.len() == 2));
            texts.push(text.as_str());
        }
    }
    assert_eq!(texts, ["", "", "Hello world!", ""]);
}

/// The turn that an engine which says `script` gives, the deltas in order, and why it ended.
fn chat(script: &str, params: SamplingParams) -> (Turn, Vec<Delta>, End) {
    let output = OutputMode::Chat { tools: vec!["get_weather".to_owned()].into(), begun: Vec::new() };
    let events = run(&says(script), Request::new(vec![1, 2], params, output));
    let mut turn = Turn::default();
    let mut all = Vec::new();
    for event in &events {
        if let Event::Tokens { deltas, text, .. } = event {
            assert_eq!(text, "");
            deltas.iter().for_each(|delta| turn.apply(delta));
            all.extend(deltas.iter().cloned());
        }
    }
    (turn.finish(), all, ending(&events))
}

const ANSWER: &str = "<|channel|>analysis<|message|>Say hi there.<|end|><|start|>assistant<|channel|>final<|message|>\
                      Hello there.<|return|>";
const CALLS: &str = "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>commentary \
                     to=functions.get_weather <|constrain|>json<|message|>{\"location\": \"Paris\"}<|call|>";

#[test]
fn chats_and_how_they_end() {
    let (turn, _, end) = chat(ANSWER, unlimited());
    assert_eq!(
        (turn.reasoning.as_deref(), turn.content.as_deref()),
        (Some("Say hi there."), Some("Hello there."))
    );
    assert_eq!(end, (FinishReason::Stop, None));

    let (turn, _, end) = chat(CALLS, unlimited());
    assert_eq!(turn.tool_calls[0].arguments, "{\"location\": \"Paris\"}");
    assert_eq!(end, (FinishReason::ToolCalls, Some(StopReason::Token(CALL))));

    // Cut off in the middle of the call.
    let length = tokens(CALLS).len() - 3;
    let (turn, _, end) = chat(CALLS, SamplingParams { max_tokens: Some(length), ..unlimited() });
    assert!(turn.tool_calls[0].arguments.starts_with("{\"location\""));
    assert_eq!(end, (FinishReason::Length, None));
}

#[test]
fn stop_strings_look_at_visible_text() {
    let stop = |s: &str| (FinishReason::Stop, Some(StopReason::Text(s.to_owned())));
    // Not across fields, not in markers, not in arguments.
    for nowhere in [".Hello", "analysis", "<|", "Paris", "there.H"] {
        let (turn, _, end) = chat(ANSWER, stops(&[nowhere]));
        assert_eq!(turn, chat(ANSWER, unlimited()).0, "{nowhere}");
        assert_eq!(end, (FinishReason::Stop, None));
        assert_eq!(chat(CALLS, stops(&[nowhere])).0, chat(CALLS, unlimited()).0, "{nowhere}");
    }
    let (turn, _, end) = chat(ANSWER, stops(&["there"]));
    assert_eq!((turn.reasoning.as_deref(), turn.content), (Some("Say hi "), None));
    assert_eq!(end, stop("there"));
    let (turn, _, end) = chat(ANSWER, stops(&["lo th", "xyz"]));
    assert_eq!((turn.reasoning.as_deref(), turn.content.as_deref()), (Some("Say hi there."), Some("Hel")));
    assert_eq!(end, stop("lo th"));
    let (turn, _, end) =
        chat(CALLS, SamplingParams { include_stop_str_in_output: true, ..stops(&["weather"]) });
    assert_eq!((turn.reasoning.as_deref(), turn.tool_calls.len()), (Some("Need weather"), 0));
    assert_eq!(end, stop("weather"));
}

#[test]
fn what_is_held_back_comes_before_the_next_field() {
    let (_, deltas, _) = chat(ANSWER, stops(&["there.!"]));
    let first_content = deltas.iter().position(|d| matches!(d, Delta::Content(_))).unwrap();
    assert!(
        deltas[first_content..].iter().all(|d| matches!(d, Delta::Content(_) | Delta::End)),
        "{deltas:?}"
    );
}

#[test]
fn reasoning_and_repairs_are_counted() {
    let output = OutputMode::Chat { tools: [].into(), begun: Vec::new() };
    let script = ANSWER.replace("<|end|>", "");
    let events = run(&says(&script), Request::new(vec![1], unlimited(), output));
    let Event::Finished { reasoning_tokens, repairs, .. } = &events[events.len() - 2] else {
        panic!("{events:?}")
    };
    assert_eq!(*reasoning_tokens, tokens("Say hi there.").len());
    assert_eq!(*repairs, [("start_in_content", 1)]);
}

/// What never comes, but whoever waits for it reads along.
fn expectant(params: &SamplingParams) -> SamplingParams {
    SamplingParams { stop: vec!["\u{1}".to_owned()], ..params.clone() }
}

#[test]
fn it_makes_no_difference_when_an_answer_is_read() {
    let at_most = |max_tokens| SamplingParams { max_tokens: Some(max_tokens), ..unlimited() };
    let hello = tokens(" there")[0];
    let cases = [
        unlimited(),
        at_most(0),
        // Within a header, a call and a character.
        at_most(2),
        at_most(20),
        at_most(26),
        SamplingParams { n: 3, logprobs: Some(2), ..unlimited() },
        SamplingParams { stream_interval: 4, logprobs: Some(0), ..at_most(22) },
        SamplingParams { min_tokens: 12, ..unlimited() },
        SamplingParams { skip_special_tokens: false, include_stop_str_in_output: true, ..unlimited() },
        SamplingParams { stop_token_ids: vec![hello], ..unlimited() },
        SamplingParams { stop_token_ids: vec![hello], include_stop_str_in_output: true, ..unlimited() },
        SamplingParams { ignore_eos: true, ..at_most(70) },
    ];
    let modes = [
        OutputMode::Text,
        OutputMode::Chat { tools: vec!["get_weather".to_owned()].into(), begun: Vec::new() },
        OutputMode::Chat { tools: [].into(), begun: tokens("<|channel|>final<|message|>") },
    ];
    let scripts = [
        ANSWER,
        CALLS,
        "<|channel|>final<|message|>👋🏽 there<|end|>surplus<|call|>",
        "👋<|message|>there 👋🏽<|return|>",
    ];
    for script in scripts {
        let engine = says(script);
        for mode in &modes {
            for params in &cases {
                let events = |params: &SamplingParams| {
                    let request = Request::new(vec![1, 2], params.clone(), mode.clone());
                    let mut events = run(&engine, request);
                    // How long it waited.
                    events.remove(0);
                    events
                };
                assert_eq!(
                    events(params),
                    events(&expectant(params)),
                    "{script} as {mode:?} with {params:?}"
                );
            }
        }
    }
}

/// Fine-tunes are saved with one end of a text alone in their `generation_config.json`.
#[test]
fn what_ends_a_turn_ends_it_whatever_the_file_says() {
    let script = tokens("<|channel|>commentary to=functions.f<|message|>{}<|call|>{}<|return|>");
    let options = EngineOptions { eos_ids: vec![RETURN], ..EngineOptions::default() };
    let engine = start(Scripted::new(Scripted::gpt_oss(), vec![script.clone()]), options);
    let output = OutputMode::Chat { tools: vec!["f".to_owned()].into(), begun: Vec::new() };
    let events = run(&engine, Request::new(vec![1], unlimited(), output));
    let end = script.iter().position(|&token| token == CALL).unwrap();
    assert_eq!(tokens_of(&events, 0), script[..=end]);
}
