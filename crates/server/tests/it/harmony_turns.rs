//! Each row of the table of malformed and well-formed turns (`serving.md` 6.6): what it becomes, and that a stream joined is
//! the same as the whole answer.

use engine::Scripted;
use serde_json::{Value, json};

use crate::fixture::{Fixture, engine_options, options, tokens};

struct Row {
    generated: &'static str,
    content: Option<&'static str>,
    reasoning: Option<&'static str>,
    calls: &'static [(&'static str, &'static str)],
    finish: &'static str,
    stop_reason: Option<u32>,
}

const STOP: Row =
    Row { generated: "", content: None, reasoning: None, calls: &[], finish: "stop", stop_reason: None };

const CALL: &str = r#"{"location": "Paris"}"#;

fn rows() -> Vec<Row> {
    let called =
        || Row { calls: &[("get_weather", CALL)], finish: "tool_calls", stop_reason: Some(200_012), ..STOP };
    vec![
        Row {
            generated: "<|channel|>analysis<|message|>Say hi.<|end|><|start|>assistant<|channel|>final<|message|>Hello there 👋!<|return|>",
            content: Some("Hello there 👋!"),
            reasoning: Some("Say hi."),
            ..STOP
        },
        Row {
            generated: r#"<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"location": "Paris"}<|call|>"#,
            reasoning: Some("Need weather."),
            ..called()
        },
        Row {
            generated: r#"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"location": "Paris"}<|call|>"#,
            content: Some("Let me look."),
            reasoning: Some("Hm."),
            ..called()
        },
        Row { generated: "<|channel|>final<|message|>Hi.<|return|>", content: Some("Hi."), ..STOP },
        Row {
            generated: "I cannot help with that.<|return|>",
            content: Some("I cannot help with that."),
            ..STOP
        },
        Row {
            generated: "<|channel|>final<|message|>Done.<|end|><|return|>",
            content: Some("Done."),
            ..STOP
        },
        Row {
            generated: r#"<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"location": "Paris"}<|call|>"#,
            ..called()
        },
        Row {
            generated: "<|channel|>commentary?? free text <|message|>Body<|return|>",
            content: Some("Body"),
            ..STOP
        },
        Row {
            generated: r#"<|channel|>final <|constrain|>json<|message|>{"a": 1}<|return|>"#,
            content: Some(r#"{"a": 1}"#),
            ..STOP
        },
        Row {
            generated: r#"<|channel|>commentary to=functions.get_weather<|message|>{"location": "Paris"}<|end|><|start|>assistant<|channel|>commentary to=functions.get_time<|message|>{}<|call|>"#,
            calls: &[("get_weather", CALL), ("get_time", "{}")],
            ..called()
        },
        Row {
            generated: "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
            content: None,
            reasoning: Some("print(1)"),
            ..STOP
        },
        Row { generated: "<|return|>", content: Some(""), ..STOP },
        Row {
            generated: "<|start|><|start|>assistantassistant<|channel|>commentary<|channel|>final<|message|>Still here.<|return|>",
            content: Some("Still here."),
            ..STOP
        },
        Row {
            generated: "<|channel|>final<|message|>Cut<|endoftext|>",
            content: Some("Cut"),
            stop_reason: None,
            ..STOP
        },
        Row {
            generated: r#"<|channel|>commentary to=functions.get_weather<|message|>not json<|call|>"#,
            calls: &[("get_weather", "not json")],
            ..called()
        },
    ]
}

#[test]
fn whole_and_streamed() {
    let rows = rows();
    let scripted = rows
        .iter()
        .enumerate()
        .fold(Scripted::new(Scripted::gpt_oss(), Vec::new()), |scripted, (seed, row)| {
            scripted.with_seed(seed as i64 + 1, tokens(row.generated))
        });
    let server = Fixture::start(&options(), scripted, engine_options());
    for (seed, row) in rows.iter().enumerate() {
        let what = row.generated;
        let mut request = json!({
            "messages": [{"role": "user", "content": "Weather in Paris?"}],
            "tools": [tool("get_weather"), tool("get_time")],
            "seed": seed + 1,
        });
        let response = server.chat(&request);
        let whole = response.ok();
        let choice = &whole["choices"][0];
        let message = &choice["message"];
        assert_eq!(message["content"].as_str(), row.content, "{what}");
        assert_eq!(message["reasoning"].as_str(), row.reasoning, "{what}");
        assert_eq!(message["reasoning_content"], message["reasoning"], "{what}");
        assert_eq!(choice["finish_reason"], row.finish, "{what}");
        if row.calls.is_empty() {
            assert_eq!(message.get("tool_calls"), None, "{what}");
        } else {
            assert_eq!(choice["stop_reason"].as_u64(), row.stop_reason.map(u64::from), "{what}");
        }
        let calls: Vec<(&str, &str)> = message["tool_calls"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|call| {
                assert_eq!(call["type"], "function");
                assert_call_id(&call["id"]);
                (call["function"]["name"].as_str().unwrap(), call["function"]["arguments"].as_str().unwrap())
            })
            .collect();
        assert_eq!(calls, row.calls, "{what}");
        let malformed = row.calls.iter().any(|(_, arguments)| *arguments == "not json");
        assert_eq!(response.header("x-malformed-tool-arguments").is_some(), malformed, "{what}");

        request["stream"] = true.into();
        request["stream_options"] = json!({"include_usage": true});
        let joined = join(&server.chunks("/v1/chat/completions", &request));
        assert_eq!(joined.content, message["content"].as_str().unwrap_or_default(), "{what}");
        assert_eq!(joined.reasoning, message["reasoning"].as_str().unwrap_or_default(), "{what}");
        let streamed: Vec<(&str, &str)> =
            joined.calls.iter().map(|(name, arguments)| (name.as_str(), arguments.as_str())).collect();
        assert_eq!(streamed, row.calls, "{what}");
        assert_eq!(joined.finish, choice["finish_reason"], "{what}");
        assert_eq!(joined.stop_reason, choice["stop_reason"], "{what}");
        assert_eq!(joined.usage, whole["usage"], "{what}");
    }
}

#[test]
fn first_row_counts_its_reasoning() {
    let server = Fixture::saying(&[rows()[0].generated]);
    let whole = server.chat(&json!({"messages": [{"role": "user", "content": "Hi"}]})).ok();
    assert_eq!(whole["usage"]["completion_tokens_details"]["reasoning_tokens"], 3);
}

#[test]
fn cut_off_in_analysis() {
    let server = Fixture::saying(&["<|channel|>analysis<|message|>one two three four five<|end|>"]);
    let response =
        server.chat(&json!({"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 5}));
    let choice = &response.ok()["choices"][0];
    assert_eq!(choice["message"]["content"], Value::Null);
    assert_eq!(choice["message"]["reasoning"], "one two");
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(response.header("x-truncated-in"), Some("analysis"));
}

pub(crate) fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {
        "name": name,
        "description": "Looks something up",
        "parameters": {"type": "object", "properties": {"location": {"type": "string"}}}
    }})
}

pub(crate) fn assert_call_id(id: &Value) {
    let hex = id.as_str().and_then(|id| id.strip_prefix("call_")).unwrap();
    assert!(hex.len() == 24 && hex.bytes().all(|b| b.is_ascii_hexdigit()), "{id}");
}

/// A stream of one choice, put together.
#[derive(Debug, Default)]
pub(crate) struct Joined {
    pub(crate) content: String,
    pub(crate) reasoning: String,
    pub(crate) calls: Vec<(String, String)>,
    pub(crate) ids: Vec<String>,
    pub(crate) finish: Value,
    pub(crate) stop_reason: Value,
    pub(crate) usage: Value,
}

/// Puts a stream together as a strict client does, checking the order of `serving.md` 5.7 on the way.
pub(crate) fn join(chunks: &[Value]) -> Joined {
    let mut joined = Joined::default();
    let first = &chunks[0];
    assert_eq!(
        first["choices"],
        json!([{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}])
    );
    for (i, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        for constant in ["id", "created", "model"] {
            assert_eq!(chunk[constant], first[constant]);
        }
        let is_last = i + 1 == chunks.len();
        assert_eq!(chunk.get("system_fingerprint").is_some(), is_last, "{chunk}");
        let Some(choice) = chunk["choices"].get(0) else {
            assert!(is_last && joined.usage.is_null() && !joined.finish.is_null());
            joined.usage = chunk["usage"].clone();
            continue;
        };
        assert_eq!(chunk.get("usage"), None);
        assert!(joined.finish.is_null(), "nothing comes after the finish reason: {chunk}");
        let delta = &choice["delta"];
        joined.content += delta["content"].as_str().unwrap_or_default();
        joined.reasoning += delta["reasoning"].as_str().unwrap_or_default();
        assert_eq!(delta["reasoning"], delta["reasoning_content"]);
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let function = &call["function"];
            let index = call["index"].as_u64().unwrap() as usize;
            if index == joined.calls.len() {
                assert_call_id(&call["id"]);
                assert_eq!(call["type"], "function");
                joined.ids.push(call["id"].as_str().unwrap().to_owned());
                joined.calls.push((function["name"].as_str().unwrap().to_owned(), String::new()));
            } else {
                assert_eq!(index + 1, joined.calls.len());
                assert!(
                    call.get("id").is_none() && call.get("type").is_none() && function.get("name").is_none()
                );
            }
            joined.calls[index].1 += function["arguments"].as_str().unwrap();
        }
        assert_eq!(choice.get("stop_reason").is_some(), !choice["finish_reason"].is_null());
        if !choice["finish_reason"].is_null() {
            assert_eq!(*delta, json!({}));
            joined.finish = choice["finish_reason"].clone();
            joined.stop_reason = choice["stop_reason"].clone();
        } else if i > 0 {
            assert_ne!(*delta, json!({}), "empty deltas are not sent");
        }
    }
    joined
}
