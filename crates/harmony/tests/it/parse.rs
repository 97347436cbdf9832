//! `total.json`, the executable definition of the parser, and the well-formed cases of `parse.json`.

use harmony::{Harmony, Turn};
use serde_json::{Value, json};

use crate::{golden, ids, o200k};

fn tools() -> Vec<String> {
    vec!["get_current_weather".to_owned()]
}

fn parse(harmony: &Harmony, ids: &[u32]) -> (Turn, Value) {
    let mut parser = harmony.parser(&tools());
    let mut turn = Turn::default();
    for &id in ids {
        parser.push(id).iter().for_each(|delta| turn.apply(delta));
    }
    parser.finish().iter().for_each(|delta| turn.apply(delta));
    assert!(parser.finish().is_empty());
    (turn.finish(), json!(parser.messages()))
}

#[test]
fn every_case_has_its_result() {
    let harmony = o200k();
    let cases = golden("total.json");
    assert_eq!(cases.len(), 130);
    let mut wrong = Vec::new();
    for case in cases {
        let (turn, _) = parse(&harmony, &ids(&case["tokens"]));
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
        let (_, messages) = parse(&harmony, &ids(&case["tokens"]));
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
