//! Loss-free: the table of malformed turns and random token soups go through HTTP in every way there is, and each way tells
//! what the parser reads.

use engine::Scripted;
use harmony::{Delta, Turn};
use serde_json::{Value, json};

use crate::fixture::{Fixture, engine_options, harmony, options};
use crate::harmony_turns::join;

/// Sequences per run unless `NIBBLE_SOUPS` says another number; each goes through HTTP four times.
const SOUPS: usize = 250;

/// Sequences that one server has as its script.
const BATCH: usize = 10_000;

const STOPS: [u32; 3] = [200_002, 200_012, 199_999];

/// What the parser makes of a generation, which ends with its first stop token.
fn expected(tokens: &[u32], tools: &[String]) -> Turn {
    let end = tokens.iter().position(|token| STOPS.contains(token)).map_or(tokens.len(), |stop| stop + 1);
    let harmony = harmony();
    let mut parser = harmony.parser(tools);
    let mut deltas: Vec<Delta> = tokens[..end].iter().flat_map(|&token| parser.push(token)).collect();
    deltas.extend(parser.finish());
    Turn::collect(&deltas)
}

/// Asks for each of the scripts in each way, and compares.
fn check(scripts: &[Vec<u32>], tool: &str) {
    let scripted = scripts
        .iter()
        .enumerate()
        .fold(Scripted::new(Scripted::gpt_oss(), Vec::new()), |scripted, (seed, script)| {
            scripted.with_seed(seed as i64 + 1, script.clone())
        });
    let server = Fixture::start(&options(), scripted, engine_options());
    for (seed, script) in scripts.iter().enumerate().filter(|(_, script)| !script.is_empty()) {
        let turn = expected(script, &[tool.to_owned()]);
        let what = harmony().tokenizer().decode(script);
        let max = script.len();
        let mut chat = json!({
            "messages": [{"role": "user", "content": "Hi"}], "seed": seed + 1, "max_tokens": max,
            "tools": [{"type": "function", "function": {"name": tool}}]
        });
        let whole = server.chat(&chat).ok()["choices"][0]["message"].clone();
        let calls = |message: &Value| -> Vec<(String, String)> {
            let calls = message["tool_calls"].as_array().into_iter().flatten().map(|call| &call["function"]);
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            calls.map(|call| (text(&call["name"]), text(&call["arguments"]))).collect()
        };
        let told: Vec<(String, String)> =
            turn.tool_calls.iter().map(|call| (call.name.clone(), call.arguments.clone())).collect();
        assert_eq!(whole["content"].as_str(), turn.content.as_deref(), "{what}");
        assert_eq!(whole["reasoning"].as_str(), turn.reasoning.as_deref(), "{what}");
        assert_eq!(calls(&whole), told, "{what}");

        chat["stream"] = true.into();
        let joined = join(&server.chunks("/v1/chat/completions", &chat));
        assert_eq!(joined.content, turn.content.clone().unwrap_or_default(), "{what}");
        assert_eq!(joined.reasoning, turn.reasoning.clone().unwrap_or_default(), "{what}");
        assert_eq!(joined.calls, told, "{what}");

        let mut response = json!({
            "input": "Hi", "seed": seed + 1, "max_output_tokens": max,
            "tools": [{"type": "function", "name": tool}]
        });
        let whole = server.post("/v1/responses", &response).ok()["output"].clone();
        let texts = |kind: &str| -> Vec<String> {
            let items = whole.as_array().unwrap().iter().filter(|item| item["type"] == kind);
            items.map(|item| item["content"][0]["text"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(texts("reasoning").join("\n"), turn.reasoning.clone().unwrap_or_default(), "{what}");
        assert_eq!(texts("message").join("\n"), turn.content.clone().unwrap_or_default(), "{what}");
        let called: Vec<(String, String)> = whole
            .as_array()
            .unwrap()
            .iter()
            .filter(|item| item["type"] == "function_call")
            .map(|item| {
                (item["name"].as_str().unwrap().to_owned(), item["arguments"].as_str().unwrap().to_owned())
            })
            .collect();
        assert_eq!(called, told, "{what}");

        response["stream"] = true.into();
        let mut stream = server.stream("/v1/responses", &response);
        let last = std::iter::from_fn(|| stream.next()).last().unwrap();
        let last: Value = serde_json::from_str(last.split_once("data: ").unwrap().1).unwrap();
        let shape = |items: &Value| -> Vec<Value> {
            let items = items.as_array().unwrap().iter();
            items
                .map(|item| json!([item["type"], item["content"], item["name"], item["arguments"]]))
                .collect()
        };
        assert_eq!(shape(&last["response"]["output"]), shape(&whole), "{what}");
    }
}

#[test]
fn the_table_of_malformed_turns() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/harmony/total.json");
    let table: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let cases = table["cases"].as_array().unwrap();
    assert!(cases.len() > 100);
    // Ids that no vocabulary has cannot be generated.
    let scripts: Vec<Vec<u32>> = cases
        .iter()
        .map(|case| serde_json::from_value(case["tokens"].clone()).unwrap())
        .filter(|tokens: &Vec<u32>| tokens.iter().all(|&token| token < 201_088))
        .collect();
    check(&scripts, table["tools"][0].as_str().unwrap());
}

#[test]
fn soups_of_tokens() {
    let words = harmony().tokenizer().encode_with_special(
        "<|start|><|end|><|message|><|channel|><|constrain|><|call|><|return|><|endoftext|> analysis final commentary \
         assistant user to=functions.f to= json f {\"a\": 1} Hello there 👋 \n é",
    );
    // SplitMix64: the same soups in every run.
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % below as u64) as usize
    };
    let mut soup = || -> Vec<u32> {
        (0..1 + random(40))
            .map(|_| match random(10) {
                0..3 => words[random(8)],
                3..9 => words[random(words.len())],
                _ => random(201_088) as u32,
            })
            .collect()
    };
    let soups = std::env::var("NIBBLE_SOUPS").map_or(SOUPS, |number| number.parse().unwrap());
    for first in (0..soups).step_by(BATCH) {
        let batch: Vec<_> = (first..soups.min(first + BATCH)).map(|_| soup()).collect();
        check(&batch, "f");
    }
}
