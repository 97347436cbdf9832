//! `total.json`, the executable definition of the parser, and the well-formed cases of `parse.json`.

use harmony::{Harmony, Turn};
use serde_json::{Value, json};

use crate::{golden, ids, o200k};

fn tools() -> Vec<String> {
    vec!["get_current_weather".to_owned()]
}

fn parse(harmony: &Harmony, ids: &[u32]) -> (Turn, Value, Vec<&'static str>) {
    let mut parser = harmony.parser(tools());
    let mut deltas = Vec::new();
    for &id in ids {
        deltas.extend(parser.push(id));
    }
    deltas.extend(parser.finish());
    assert!(parser.finish().is_empty());
    (Turn::collect(&deltas), json!(parser.messages()), parser.repairs().keys().copied().collect())
}

#[test]
fn every_case_has_its_result() {
    let harmony = o200k();
    let cases = golden("total.json");
    assert_eq!(cases.len(), 130);
    let mut wrong = Vec::new();
    for case in cases {
        let (turn, _, _) = parse(&harmony, &ids(&case["tokens"]));
        let expected = json!({
            "reasoning": case["reasoning"], "content": case["content"], "tool_calls": case["tool_calls"],
        });
        if json!(turn) != expected {
            let text = harmony.tokenizer().decode(&ids(&case["tokens"]));
            wrong.push(format!(
                "{}: {text}\n  expected {expected}\n  found    {}",
                case["name"],
                json!(turn)
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn well_formed_output_gives_the_librarys_messages() {
    let harmony = o200k();
    let mut seen = 0;
    for case in golden("parse.json") {
        let name = case["name"].as_str().unwrap();
        if !name.starts_with("ok_")
            || case["role"] != "assistant"
            || case["openai_harmony"].get("error").is_some()
        {
            continue;
        }
        let (_, messages, _) = parse(&harmony, &ids(&case["tokens"]));
        let expected = case["openai_harmony"]["messages"].as_array().unwrap();
        assert_eq!(messages.as_array().unwrap().len(), expected.len(), "{name}");
        for (found, expected) in messages.as_array().unwrap().iter().zip(expected) {
            for field in ["role", "text", "channel", "recipient"] {
                // The library takes a type for a recipient where there is none.
                if expected[field].as_str().is_some_and(|text| text.starts_with("<|constrain|>")) {
                    continue;
                }
                assert_eq!(found[field], expected[field], "{name}: {field} in {found}");
            }
        }
        seen += 1;
    }
    assert!(seen > 10, "{seen}");
}

/// One header each, and what follows from it: `reasoning`, `content` or the function that is called.
#[test]
fn headers() {
    let harmony = o200k();
    for (text, field) in [
        // A recipient is found wherever the role is missing, repeated or followed by it without `to=`.
        ("<|start|>assistant functions.f<|channel|>commentary json<|message|>x<|call|>", "f"),
        ("<|start|> to=functions.f<|channel|>commentary json<|message|>x<|call|>", "f"),
        ("<|start|>to=functions.f<|message|>x<|call|>", "f"),
        (" functions.f<|channel|>commentary x<|call|>", "f"),
        ("<|channel|>commentary functions.f x<|call|>", "f"),
        ("<|channel|>commentary to=get_current_weather x<|end|>", "get_current_weather"),
        ("<|channel|>analysis to=functions.<|message|>x<|call|>", "reasoning"),
        ("<|channel|>commentary to=user<|message|>x<|end|>", "content"),
        ("<|channel|>commentary to=python code<|message|>x<|call|>", "reasoning"),
        // A channel's name in the role's place, or without its marker.
        ("<|start|>analysis<|message|>x<|end|>", "reasoning"),
        ("<|start|>assistant analysis<|message|>x<|end|>", "reasoning"),
        ("analysis<|channel|>final<|message|>x<|end|>", "content"),
        ("<|channel|>commentary?? free text <|message|>x<|end|>", "content"),
        // The model plays somebody else.
        ("<|start|>user:bob<|message|>x<|end|>", "reasoning"),
        ("<|start|>functions.f to=assistant<|channel|>commentary<|message|>x<|end|>", "reasoning"),
        ("<|start|>assistant:bob<|channel|>final<|message|>x<|end|>", "content"),
    ] {
        let (turn, _, _) = parse(&harmony, &harmony.tokenizer().encode_with_special(text));
        let call = turn.tool_calls.first().map(|call| (call.name.as_str(), call.arguments.as_str()));
        let found = match (&turn.reasoning, &turn.content, call) {
            (Some(text), None, None) => ("reasoning", text.as_str()),
            (None, Some(text), None) => ("content", text.as_str()),
            (None, None, Some(call)) => call,
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(found, (field, "x"), "{text}");
    }
}

#[test]
fn in_an_answer_without_header_words_mean_themselves() {
    let harmony = o200k();
    for text in [
        "I could ask get_current_weather or functions.f for that.",
        "The final answer is commentary.",
        "user and analysis",
    ] {
        for (prefix, stop) in [("", ""), ("", "<|return|>"), ("<|channel|>final ", "<|end|>")] {
            let ids = harmony.tokenizer().encode_with_special(&format!("{prefix}{text}{stop}"));
            assert_eq!(parse(&harmony, &ids).0.content.as_deref(), Some(text), "{prefix}{text}{stop}");
        }
    }
}

#[test]
fn repairs_count_what_is_malformed_and_only_that() {
    let harmony = o200k();
    // These are cut off or complete, or their fault is in the text alone.
    let fine = [
        "bad_json_bad",
        "bad_json_empty",
        "bad_call_ends_with_return",
        "bad_call_ends_with_end",
        "bad_final_with_recipient",
        "bad_recipient_bare_name",
        "bad_endoftext",
        "bad_whitespace_header",
        "bad_channel_space",
        "bad_channel_newline",
        "bad_constrain_before_to",
    ];
    let irregular = ["ok_no_channel", "ok_unknown_channel", "ok_call_python", "ok_call_browser"];
    for case in golden("total.json") {
        let name = case["name"].as_str().unwrap();
        let (_, _, repairs) = parse(&harmony, &ids(&case["tokens"]));
        if name.starts_with("bad_") {
            assert_eq!(repairs.is_empty(), fine.contains(&name), "{name}: {repairs:?}");
        } else if name.starts_with("ok_") && !irregular.contains(&name) {
            assert!(repairs.is_empty(), "{name}: {repairs:?}");
        }
    }
}

#[test]
fn markers_alone_do_not_grow_the_header() {
    let harmony = o200k();
    let special = |spelling| harmony.tokenizer().special(spelling).unwrap();
    let mut ids = harmony.tokenizer().encode(" to=functions.f");
    for _ in 0..50_000 {
        ids.extend([special("<|channel|>"), special("<|constrain|>"), special("<|constrain|>")]);
    }
    ids.extend(harmony.tokenizer().encode_with_special("<|channel|>commentary<|message|>x<|call|>"));
    let (turn, messages, _) = parse(&harmony, &ids);
    assert_eq!(json!(turn.tool_calls), json!([{"name": "f", "arguments": "x"}]));
    assert_eq!(messages[0]["channel"], "commentary");
}
