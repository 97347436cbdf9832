//! All cases of `render.json` and `chat-expected.json`.

use harmony::{Document, Error, Harmony};
use serde_json::Value;

use crate::{golden, ids, o200k, tiny};

fn render(harmony: &Harmony, document: &Value) -> Result<Vec<u32>, Error> {
    let text = document.to_string();
    let read = Document::from_json(&text);
    assert_eq!(read.clone().ok(), serde_json::from_str(&text).ok(), "{text}");
    harmony.render_document(&read?)
}

#[test]
fn messages() {
    let harmony = o200k();
    let cases = golden("render.json");
    assert_eq!(cases.len(), 164);
    let mut errors = 0;
    for mut case in cases {
        let name = case["name"].to_string();
        let expected = case["openai_harmony"].take();
        case["harmony"] = true.into();
        match render(&harmony, &case) {
            Ok(found) => {
                let text = harmony.tokenizer().decode(&found);
                assert_eq!(text, expected["text"].as_str().unwrap_or("an error"), "{name}");
                assert_eq!(found, ids(&expected["tokens"]), "{name}");
            }
            Err(error) => {
                assert!(expected.get("error").is_some(), "{name}: {error}");
                errors += 1;
            }
        }
    }
    assert_eq!(errors, 3);
}

#[test]
fn chat_requests() {
    let harmony = o200k();
    let requests = golden("chat.json");
    assert_eq!(requests.len(), 48);
    for (request, expected) in requests.iter().zip(golden("chat-expected.json")) {
        let name = request["name"].to_string();
        assert_eq!(request["name"], expected["name"]);
        match render(&harmony, request) {
            Ok(found) => {
                let text = harmony.tokenizer().decode(&found);
                assert_eq!(text, expected["text"].as_str().unwrap_or("an error"), "{name}");
                assert_eq!(found, ids(&expected["tokens"]), "{name}");
            }
            Err(Error::Invalid { field, .. }) => {
                assert_eq!(expected["status"], 400, "{name}");
                assert_eq!(field, "messages.1.tool_call_id");
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }
}

#[test]
fn a_small_vocabulary_has_its_own_control_tokens() {
    let request = serde_json::json!({"messages": [{"role": "user", "content": "<|end|> is text"}]});
    let harmony = tiny();
    let ids = render(&harmony, &request).unwrap();
    let text = harmony.tokenizer().decode(&ids);
    assert!(text.ends_with("<|start|>user<|message|><|end|> is text<|end|><|start|>assistant"), "{text}");
    let end = harmony.tokenizer().special("<|end|>").unwrap();
    // Of the system and the user message; the typed one is text.
    assert_eq!(ids.iter().filter(|&&id| id == end).count(), 2);
}

#[test]
fn no_tools_may_be_written_as_null() {
    let harmony = o200k();
    let rendered = |request| harmony.render_document(&Document::from_json(request).unwrap()).unwrap();
    assert_eq!(rendered(r#"{"messages":[],"tools":null}"#), rendered(r#"{"messages":[]}"#));
}

#[test]
fn wrong_requests_name_the_field() {
    let harmony = o200k();
    for (request, field) in [
        (r#"{"messages":[{"role":"robot","content":"x"}]}"#, "messages.0.role"),
        (r#"{"messages":[{"role":"tool","content":"x"}]}"#, "messages.0.tool_call_id"),
        (r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#, "messages.0.content.0"),
        (r#"{"messages":[],"reasoning_effort":"huge"}"#, "reasoning_effort"),
        (r#"{"messages":[],"builtin_tools":["shell"]}"#, "builtin_tools.0"),
        (r#"{"messages":[],"harmony":true,"mode":"x"}"#, "mode"),
        (r#"{"messages":3}"#, "document"),
        (r#"{"messages":[["user","x"]]}"#, "document"),
        (r#"{"messages":[],"tools":[[{"name":"f"}]]}"#, "document"),
        ("[]", "document"),
        ("[true, []]", "document"),
        (r#"{"messages":[],"harmony":"yes"}"#, "harmony"),
    ] {
        let result = Document::from_json(request).and_then(|d| harmony.render_document(&d));
        match result {
            Err(Error::Invalid { field: found, .. }) => assert_eq!(found, field, "{request}"),
            other => panic!("{request}: {other:?}"),
        }
    }
}
