//! Responses: items and events of turns, what comes back as input, the store.

use std::io::Write as _;

use engine::Scripted;
use serde_json::{Value, json};
use server::Options;

use crate::fixture::{Fixture, JSON, Stream, engine_options, message, options, tokens};

const PATH: &str = "/v1/responses";
const HELLO: &str = "<|channel|>analysis<|message|>Say hi.<|end|><|start|>assistant<|channel|>final<|message|>Hello there 👋<|return|>";
const LOOK: &str = r#"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"location": "Paris"}<|call|>"#;

fn server(scripts: &[&str], stored: usize) -> Fixture {
    let options = Options { responses_store: stored, ..options() };
    let scripts = scripts.iter().map(|text| tokens(text)).collect();
    Fixture::start(&options, Scripted::new(Scripted::gpt_oss(), scripts), engine_options())
}

fn tool() -> Value {
    json!({"type": "function", "name": "get_weather", "description": "Looks", "parameters": {
        "type": "object", "properties": {"location": {"type": "string"}}
    }})
}

/// The events of a stream; checks what holds for all.
fn events(server: &Fixture, request: &Value) -> Vec<Value> {
    let mut request = request.clone();
    request["stream"] = true.into();
    let mut stream = server.stream(PATH, &request);
    assert_eq!(stream.status, 200);
    let mut events: Vec<Value> = Vec::new();
    while let Some(event) = stream.next() {
        let (kind, data) = event.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(kind.strip_prefix("event: "), data["type"].as_str());
        assert_eq!(data["sequence_number"], events.len());
        events.push(data);
    }
    assert_eq!(events[0]["type"], "response.created");
    assert_eq!(events[1]["type"], "response.in_progress");
    assert_eq!(events[0]["response"]["status"], "in_progress");
    events
}

/// Puts a stream together as a strict client does; the result is the last event's response.
fn join(events: &[Value]) -> Value {
    let mut items: Vec<Value> = Vec::new();
    let mut texts: Vec<String> = Vec::new();
    let mut parts: Vec<usize> = Vec::new();
    for event in &events[2..events.len() - 1] {
        let index = event["output_index"].as_u64().unwrap() as usize;
        let kind = event["type"].as_str().unwrap();
        if kind == "response.output_item.added" {
            assert_eq!(index, items.len(), "one item after the other");
            assert_eq!(event["item"]["status"], "in_progress");
            items.push(event["item"].clone());
            texts.push(String::new());
            parts.push(0);
            continue;
        }
        assert_eq!(index, items.len() - 1);
        match kind {
            "response.output_item.done" => {
                assert_eq!(event["item"]["id"], items[index]["id"]);
                items[index] = event["item"].clone();
            }
            _ => assert_eq!(event["item_id"], items[index]["id"]),
        }
        match kind.rsplit_once('.').unwrap().1 {
            "added" => parts[index] += 1,
            "delta" => texts[index] += event["delta"].as_str().unwrap(),
            _ => {}
        }
        for field in ["text", "arguments", "input"] {
            if let Some(text) = event[field].as_str() {
                assert_eq!(text, texts[index]);
            }
        }
        if let Some(part) = event["part"]["text"].as_str() {
            assert_eq!(part, texts[index]);
        }
    }
    let last = &events.last().unwrap()["response"];
    assert_eq!(last["id"], events[0]["response"]["id"]);
    assert_eq!(last["output"], Value::from(items.clone()));
    for (item, parts) in items.iter().zip(parts) {
        assert_eq!(parts, usize::from(item.get("content").is_some()));
    }
    last.clone()
}

/// What differs between two answers to the same request.
fn without_ids(mut response: Value) -> Value {
    for key in ["id", "created_at"] {
        response[key] = Value::Null;
    }
    for item in response["output"].as_array_mut().unwrap() {
        item["id"] = Value::Null;
        if item.get("call_id").is_some() {
            item["call_id"] = Value::Null;
        }
    }
    response
}

#[test]
fn every_field() {
    let server = server(&[HELLO], 0);
    let request = json!({
        "input": "Hi", "instructions": "Be kind.", "temperature": 0.5, "metadata": {"a": "b"}, "user": "u",
        "max_output_tokens": 100, "reasoning": {"effort": "low", "summary": "auto"}, "text": {"verbosity": "low"},
        "prompt_cache_retention": "24h"
    });
    let whole = server.post(PATH, &request).ok();
    assert_eq!(whole["prompt_cache_retention"], "24h");
    let generated = tokens(HELLO).len();
    let keys: Vec<&str> = whole.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        [
            "id",
            "object",
            "created_at",
            "status",
            "error",
            "incomplete_details",
            "model",
            "output",
            "instructions",
            "max_output_tokens",
            "max_tool_calls",
            "parallel_tool_calls",
            "previous_response_id",
            "reasoning",
            "temperature",
            "text",
            "tool_choice",
            "tools",
            "top_logprobs",
            "top_p",
            "truncation",
            "user",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "metadata",
            "background",
            "service_tier",
            "store",
            "usage"
        ]
    );
    assert!(whole["id"].as_str().unwrap().starts_with("resp_"));
    assert_eq!((&whole["object"], &whole["status"]), (&json!("response"), &json!("completed")));
    assert_eq!((&whole["temperature"], &whole["metadata"]["a"]), (&json!(0.5), &json!("b")));
    assert_eq!(whole["store"], false);
    assert_eq!(whole["reasoning"], json!({"effort": "low", "summary": "auto"}));
    assert_eq!(whole["text"], json!({"format": {"type": "text"}, "verbosity": "low"}));
    let [thought, message] = &whole["output"].as_array().unwrap()[..] else { panic!("{whole}") };
    assert_eq!(thought["content"], json!([{"type": "reasoning_text", "text": "Say hi."}]));
    assert_eq!((&thought["summary"], &thought["status"]), (&json!([]), &json!("completed")));
    assert!(thought["id"].as_str().unwrap().starts_with("rs_"));
    assert_eq!(
        message["content"],
        json!([{"type": "output_text", "text": "Hello there 👋", "annotations": [], "logprobs": []}])
    );
    let usage = &whole["usage"];
    assert_eq!(usage["output_tokens"], generated);
    assert_eq!(usage["output_tokens_details"]["reasoning_tokens"], 3);
    assert_eq!(usage["input_tokens_details"]["cached_tokens"], 0);

    let events = events(&server, &request);
    assert_eq!(events.last().unwrap()["type"], "response.completed");
    assert_eq!(without_ids(join(&events)), without_ids(whole));
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let expected = [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.delta",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
    ];
    assert_eq!(kinds[2..12], expected);
}

#[test]
fn items_of_turns() {
    let custom = r#"<|channel|>commentary to=functions.apply_patch<|message|>*** Begin
+x<|call|>"#;
    let two = r#"<|channel|>commentary to=functions.get_weather<|message|>{}<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather<|message|>{"location": "Rome"}<|call|>"#;
    let halves =
        "<|channel|>final<|message|>One<|end|><|start|>assistant<|channel|>final<|message|>\nTwo<|return|>";
    let rows: [(&str, Value); 7] = [
        (
            LOOK,
            json!([
                ["reasoning", "Hm."],
                ["message", "Let me look."],
                ["function_call", "{\"location\": \"Paris\"}"]
            ]),
        ),
        (custom, json!([["custom_tool_call", "*** Begin\n+x"]])),
        (two, json!([["function_call", "{}"], ["function_call", "{\"location\": \"Rome\"}"]])),
        // One item per message, each with its own text.
        (halves, json!([["message", "One"], ["message", "\nTwo"]])),
        ("No header at all.<|return|>", json!([["message", "No header at all."]])),
        ("<|return|>", json!([["message", ""]])),
        ("<|channel|>analysis to=python code<|message|>print(1)<|call|>", json!([["reasoning", "print(1)"]])),
    ];
    let scripted = rows
        .iter()
        .enumerate()
        .fold(Scripted::new(Scripted::gpt_oss(), Vec::new()), |scripted, (seed, (script, _))| {
            scripted.with_seed(seed as i64 + 1, tokens(script))
        });
    let server = Fixture::start(&options(), scripted, engine_options());
    for (seed, (script, expected)) in rows.iter().enumerate() {
        let request = json!({
            "input": "Hi", "seed": seed + 1,
            "tools": [tool(), {"type": "custom", "name": "apply_patch", "description": "Patches"}]
        });
        let whole = server.post(PATH, &request).ok();
        assert_eq!(whole["status"], "completed");
        let text = |item: &Value| {
            ["arguments", "input"]
                .iter()
                .find_map(|field| item.get(*field).cloned())
                .unwrap_or_else(|| item["content"][0]["text"].clone())
        };
        let items: Vec<Value> = whole["output"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| json!([item["type"], text(item)]))
            .collect();
        assert_eq!(json!(items), *expected, "{script}");
        assert_eq!(without_ids(join(&events(&server, &request))), without_ids(whole), "{script}");
    }
}

#[test]
fn cut_off() {
    let server = server(&[HELLO], 0);
    for (max, last, status) in [
        (5, "reasoning", "incomplete"),
        // In the header of the next message.
        (9, "reasoning", "completed"),
        (13, "message", "incomplete"),
    ] {
        let request = json!({"input": "Hi", "max_output_tokens": max});
        let whole = server.post(PATH, &request).ok();
        assert_eq!(whole["status"], "incomplete");
        assert_eq!(whole["incomplete_details"], json!({"reason": "max_output_tokens"}));
        let item = whole["output"].as_array().unwrap().last().unwrap();
        assert_eq!((&item["type"], &item["status"]), (&json!(last), &json!(status)));
        let events = events(&server, &request);
        assert_eq!(events.last().unwrap()["type"], "response.incomplete");
        assert_eq!(without_ids(join(&events)), without_ids(whole));
    }
}

#[test]
fn log_probabilities() {
    let server = server(&[HELLO], 0);
    let request = json!({"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let whole = server.post(PATH, &request).ok();
    let entries = whole["output"][1]["content"][0]["logprobs"].as_array().unwrap();
    let bytes: Vec<u8> = entries
        .iter()
        .flat_map(|entry| serde_json::from_value::<Vec<u8>>(entry["bytes"].clone()).unwrap())
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), "Hello there 👋");
    assert_eq!(entries[0]["top_logprobs"].as_array().unwrap().len(), 2);
    let events = events(&server, &request);
    let streamed: Vec<&Value> = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .flat_map(|event| event["logprobs"].as_array().unwrap())
        .collect();
    assert_eq!(json!(streamed), json!(entries));
}

#[test]
fn log_probabilities_are_of_the_message_however_many_tokens_come_at_a_time() {
    let said = "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>final";
    let script = HELLO.replace("<|channel|>final", said);
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(&script)]);
    let server = Fixture::start(&Options { stream_interval: 20, ..options() }, backend, engine_options());
    let request = json!({
        "input": "Hi", "include": ["message.output_text.logprobs"], "include_reasoning": false
    });
    let whole = server.post(PATH, &request).ok();
    let streamed = join(&events(&server, &request));
    assert_eq!(without_ids(streamed), without_ids(whole.clone()));
    let named = |item: &Value| -> String {
        let entries = item["content"][0]["logprobs"].as_array().unwrap();
        entries.iter().map(|entry| entry["token"].as_str().unwrap()).collect()
    };
    let texts: Vec<String> = whole["output"].as_array().unwrap().iter().map(named).collect();
    assert_eq!(texts.len(), 2);
    assert_eq!(texts[0], "Wait.");
    assert!(texts[1].starts_with("Hello there"), "{texts:?}");
}

/// The prompt of a request, as the next chat would see it.
fn prompt_tokens(server: &Fixture, request: &Value) -> u64 {
    server.post(PATH, request).ok()["usage"]["input_tokens"].as_u64().unwrap()
}

#[test]
fn items_come_back_as_input() {
    let server = server(&[LOOK, HELLO], 0);
    let first = server.post(PATH, &json!({"input": "Weather?", "tools": [tool()]})).ok();
    let mut items = vec![json!({"role": "user", "content": "Weather?"})];
    items.extend(first["output"].as_array().unwrap().iter().cloned());
    // As of a server that is no more: this one would remember how the call was written.
    items[3]["call_id"] = "call_of_another".into();
    items.push(json!({"type": "function_call_output", "call_id": "call_of_another", "output": "sunny"}));
    let request = json!({"input": items, "tools": [tool()], "instructions": "Be brief."});
    let found = prompt_tokens(&server, &request);

    // The same as a chat, whose history is known to be right.
    let function = json!({"name": "get_weather", "description": "Looks", "parameters": tool()["parameters"]});
    let chat = json!({
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "Let me look.", "reasoning": "Hm.", "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": "{\"location\": \"Paris\"}"}}
            ]},
            {"role": "tool", "tool_call_id": "a", "content": "sunny"}
        ],
        "tools": [{"type": "function", "function": function}]
    });
    assert_eq!(server.chat(&chat).ok()["usage"]["prompt_tokens"], found);

    // Stripped of what can be filled in, as some agents send it.
    let stripped: Vec<Value> = items
        .iter()
        .map(|item| {
            let mut item = item.clone();
            ["id", "status", "encrypted_content", "summary"].iter().for_each(|key| {
                item.as_object_mut().unwrap().remove(*key);
            });
            item
        })
        .collect();
    let request = json!({"input": stripped, "tools": [tool()], "instructions": "Be brief."});
    assert_eq!(prompt_tokens(&server, &request), found);
}

#[test]
fn the_input_of_a_stored_response_is_listed_by_pages() {
    let server = server(&[HELLO], 1);
    let input: Vec<Value> = ["a", "b", "c"]
        .iter()
        .map(|text| json!({"role": "user", "content": text, "id": format!("msg_{text}")}))
        .chain([json!({"role": "assistant", "content": "d", "id": "msg_d"})])
        .collect();
    let several = server.post(PATH, &json!({"input": input})).ok();
    let items = format!("{PATH}/{}/input_items", several["id"].as_str().unwrap());
    for (query, ids, has_more) in [
        ("", &["d", "c", "b", "a"][..], false),
        ("?order=asc", &["a", "b", "c", "d"], false),
        ("?limit=3", &["d", "c", "b"], true),
        ("?limit=2&order=asc&after=msg_b", &["c", "d"], false),
        ("?after=msg_a", &[], false),
    ] {
        let list = server.get(&format!("{items}{query}")).ok();
        let found: Vec<&str> = list["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| item["content"][0]["text"].as_str().unwrap())
            .collect();
        assert_eq!((&found[..], &list["has_more"]), (ids, &json!(has_more)), "{query}");
        assert!(list["data"].as_array().unwrap().iter().all(|item| item["type"] == "message"), "{list}");
        let ends =
            [ids.first(), ids.last()].map(|id| id.map_or(Value::Null, |id| format!("msg_{id}").into()));
        assert_eq!([&list["first_id"], &list["last_id"]], [&ends[0], &ends[1]]);
    }
    for (query, param) in
        [("limit=0", "limit"), ("limit=x", "limit"), ("order=x", "order"), ("after=zzz", "after")]
    {
        assert_eq!(server.get(&format!("{items}?{query}")).error().2.as_deref(), Some(param));
    }
}

#[test]
fn the_store() {
    let server = server(&[LOOK, HELLO], 2);
    let first = server.post(PATH, &json!({"input": "Weather?", "tools": [tool()]})).ok();
    assert_eq!(first["store"], true);
    let id = first["id"].as_str().unwrap();
    let path = format!("{PATH}/{id}");
    assert_eq!(server.get(&path).ok(), first);
    let list = server.get(&format!("{path}/input_items")).ok();
    assert_eq!(list["data"][0]["content"][0]["text"], "Weather?");
    assert_eq!((&list["first_id"], &list["has_more"]), (&list["data"][0]["id"], &json!(false)));

    // A turn that goes on from there is fed what a client would have sent by itself.
    let output =
        json!([{"type": "function_call_output", "call_id": first["output"][2]["call_id"], "output": "sun"}]);
    let request = json!({"input": output, "tools": [tool()], "previous_response_id": id});
    let second = server.post(PATH, &request).ok();
    assert_eq!(second["previous_response_id"], id);
    let mut items = vec![json!({"role": "user", "content": "Weather?"})];
    items.extend(first["output"].as_array().unwrap().iter().cloned());
    items.push(output[0].clone());
    let whole = json!({"input": items, "tools": [tool()], "store": false});
    assert_eq!(second["usage"]["input_tokens"], prompt_tokens(&server, &whole));

    let streamed = join(&events(&server, &json!({"input": "Hi"})));
    assert_eq!(server.get(&format!("{PATH}/{}", streamed["id"].as_str().unwrap())).ok(), streamed);

    // Two are kept; the one used longest ago went.
    let gone = |path: &str| {
        let (status, kind, param, _) = server.get(path).error();
        assert_eq!(
            (status, kind.as_str(), param.as_deref()),
            (404, "invalid_request_error", Some("response_id"))
        );
    };
    gone(&path);
    let last = format!("{PATH}/{}", second["id"].as_str().unwrap());
    let (status, _, param, message) = server.post(&format!("{last}/cancel"), &json!({})).error();
    assert_eq!((status, param.as_deref()), (400, Some("response_id")));
    assert_eq!(message, "Cannot cancel a synchronous response.");
    assert_eq!(server.request("DELETE", &last, "", b"").ok()["deleted"], true);
    gone(&last);
    let (status, _, param, _) =
        server.post(PATH, &json!({"input": "x", "previous_response_id": "resp_no"})).error();
    assert_eq!((status, param.as_deref()), (404, Some("previous_response_id")));
}

#[test]
fn items_are_referred_to() {
    let options =
        Options { responses_store: 2, api_keys: vec!["one".to_owned(), "two".to_owned()], ..options() };
    let scripts = [LOOK, HELLO].map(tokens).to_vec();
    let server = Fixture::start(&options, Scripted::new(Scripted::gpt_oss(), scripts), engine_options());
    let headers = |key: &str| format!("{JSON}authorization: Bearer {key}\r\n");
    let ask = |key: &str, input: &Value| {
        let body = json!({"input": input, "tools": [tool()]}).to_string();
        server.request("POST", PATH, &headers(key), body.as_bytes())
    };
    let listed = |response: &Value| {
        let path = format!("{PATH}/{}/input_items?order=asc", response["id"].as_str().unwrap());
        server.request("GET", &path, &headers("one"), b"").ok()["data"].clone()
    };
    let reference = |item: &Value| json!({"type": "item_reference", "id": item["id"]});

    let content = json!([{"type": "input_text", "text": "Weather?"}]);
    let question = json!([{"type": "message", "role": "user", "content": content, "id": "msg_mine"}]);
    let first = ask("one", &question).ok();
    let output = first["output"].as_array().unwrap();
    let result = json!({"type": "function_call_output", "call_id": output[2]["call_id"], "output": "sun"});
    // In any place, and items of the request's input and the response's output alike.
    let mut referring: Vec<Value> =
        question.as_array().unwrap().iter().chain(output).map(reference).collect();
    referring.push(result.clone());
    let second = ask("one", &referring.clone().into()).ok();
    let whole: Vec<Value> =
        question.as_array().unwrap().iter().chain(output).chain([&result]).cloned().collect();
    let tokens = ask("one", &whole.clone().into()).ok()["usage"]["input_tokens"].clone();
    assert_eq!(second["usage"]["input_tokens"], tokens);
    // Whoever looks sees the items themselves, and they outlive the response that they came from.
    let items = listed(&second);
    assert_eq!(items.as_array().unwrap()[..4], whole[..4]);
    let result_id = items[4]["id"].clone();
    referring[4] = reference(&items[4]);
    let third = ask("one", &referring.clone().into()).ok();
    assert_eq!(third["usage"]["input_tokens"], tokens);
    assert_eq!(listed(&third)[4]["id"], result_id);

    let refused = |key: &str, input: Value| {
        let (status, kind, param, message) = ask(key, &input).error();
        (status, kind, param.unwrap(), message)
    };
    for (key, input) in
        [("one", json!([{"type": "item_reference", "id": "msg_no"}])), ("two", referring.into())]
    {
        let (status, kind, param, message) = refused(key, input);
        assert_eq!((status, kind.as_str(), param.as_str()), (404, "invalid_request_error", "input.0"));
        assert!(message.starts_with("There is no such item"), "{message}");
    }
    let twice = json!([reference(&items[0]), reference(&items[0])]);
    let (status, _, param, message) = refused("one", twice);
    assert_eq!((status, param.as_str()), (400, "input.1"));
    assert!(message.contains("msg_mine"), "{message}");
    // The call is in a reference that comes too late.
    let (status, _, param, _) = refused("one", json!([result, reference(&items[3])]));
    assert_eq!((status, param.as_str()), (400, "input.0.call_id"));
}

#[test]
fn what_is_referred_to_is_bounded_as_a_body_is() {
    let options = Options { responses_store: 9, max_body_bytes: 4096, ..options() };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HELLO)]);
    let server = Fixture::start(&options, backend, engine_options());
    let references: Vec<Value> = (0..3)
        .map(|i| {
            let item = json!({"role": "user", "content": "a ".repeat(1000), "id": format!("msg_{i}")});
            assert_eq!(server.post(PATH, &json!({"input": [item]})).status, 200);
            json!({"type": "item_reference", "id": format!("msg_{i}")})
        })
        .collect();
    assert_eq!(server.post(PATH, &json!({"input": references[0]})).status, 400, "not an array");
    assert_eq!(server.post(PATH, &json!({"input": [references[0]]})).status, 200);
    let (status, _, param, message) = server.post(PATH, &json!({"input": references})).error();
    assert_eq!((status, param.as_deref()), (400, Some("input")));
    assert!(message.contains("4096 bytes"), "{message}");
}

#[test]
fn responses_belong_to_keys() {
    let options =
        Options { responses_store: 5, api_keys: vec!["one".to_owned(), "two".to_owned()], ..options() };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HELLO)]);
    let server = Fixture::start(&options, backend, engine_options());
    let headers = |key: &str| format!("{JSON}authorization: Bearer {key}\r\n");
    let made = server.request("POST", PATH, &headers("one"), br#"{"input": "Hi"}"#).ok();
    let path = format!("{PATH}/{}", made["id"].as_str().unwrap());
    assert_eq!(server.request("GET", &path, &headers("one"), b"").status, 200);
    assert_eq!(server.request("GET", &path, &headers("two"), b"").status, 404);
    assert_eq!(server.request("DELETE", &path, &headers("two"), b"").status, 404);
    assert_eq!(server.get(&path).status, 401);
}

#[test]
fn nothing_is_stored_unless_asked() {
    let server = server(&[HELLO], 0);
    let made = server.post(PATH, &json!({"input": "Hi", "store": true})).ok();
    assert_eq!(made["store"], false);
    assert_eq!(server.get(&format!("{PATH}/{}", made["id"].as_str().unwrap())).status, 404);
}

#[test]
fn fields() {
    let server = server(&[HELLO], 0);
    for (field, value, param, message) in [
        ("input", Value::Null, "input", "required"),
        ("input", json!([]), "input", "empty"),
        ("input", json!(5), "input", "items"),
        ("input", json!([{"role": "robot", "content": "x"}]), "input.0.role", "robot"),
        (
            "input",
            json!([{"role": "user", "content": [{"type": "input_image"}]}]),
            "input.0.content.0",
            "image",
        ),
        ("input", json!([{"type": "item_reference"}]), "input.0.id", "required"),
        ("input", json!([{"type": "riddle", "id": "x"}]), "input.0", "riddle"),
        (
            "input",
            json!([{"type": "function_call_output", "call_id": "zz", "output": "x"}]),
            "input.0.call_id",
            "zz",
        ),
        ("max_output_tokens", json!(0), "max_output_tokens", "at least 1"),
        ("top_logprobs", json!(21), "top_logprobs", "greater than"),
        ("reasoning", json!({"effort": "huge"}), "reasoning.effort", "huge"),
        ("text", json!({"format": {"type": "xml"}}), "text.format.type", "xml"),
        ("tools", json!([{"type": "file_search"}]), "tools.0.type", "file_search"),
        ("tools", json!([{"type": "function", "name": "a b"}]), "tools.0.name", "letters"),
        ("tool_choice", json!("required"), "tool_choice", "`tools` must be set"),
        ("tool_choice", json!({"type": "what"}), "tool_choice.type", "what"),
        ("truncation", json!("some"), "truncation", "auto or disabled"),
        ("max_tokens", json!(5), "max_tokens", "Use max_output_tokens"),
        ("max_completion_tokens", json!(5), "max_completion_tokens", "Use max_output_tokens"),
        ("reasoning_effort", json!("low"), "reasoning_effort", "Use reasoning.effort"),
        ("response_format", json!({"type": "json_object"}), "response_format", "Use text.format"),
        ("messages", json!([]), "messages", "Use input"),
        ("logprobs", json!(true), "logprobs", "Use top_logprobs"),
        ("n", json!(2), "n", "one answer"),
        ("guided_json", json!({}), "guided_json", "structured_outputs"),
        ("conversation", json!("c"), "conversation", "not supported"),
        ("prompt", json!({"id": "p"}), "prompt", "not supported"),
        ("background", json!(true), "background", "--responses-store"),
        (
            "metadata",
            json!((0..17).map(|i| (i.to_string(), "x")).collect::<std::collections::BTreeMap<_, _>>()),
            "metadata",
            "16",
        ),
    ] {
        let mut request = json!({"input": "Hi"});
        request[field] = value;
        let (status, kind, found, text) = server.post(PATH, &request).error();
        assert_eq!(
            (status, kind.as_str(), found.as_deref()),
            (400, "BadRequestError", Some(param)),
            "{text}"
        );
        assert!(text.contains(message), "{field}: {text}");
    }
    assert_eq!(server.request("POST", PATH, "", b"{}").status, 415);
}

#[test]
fn forms_and_choices() {
    let answer = r#"<|channel|>final<|message|>{"x": 1}<|return|>"#;
    let scripted = [answer, LOOK]
        .iter()
        .enumerate()
        .fold(Scripted::new(Scripted::gpt_oss(), Vec::new()), |scripted, (seed, script)| {
            scripted.with_seed(seed as i64 + 1, tokens(script))
        });
    let server = Fixture::start(&options(), scripted, engine_options());
    let schema =
        json!({"type": "object", "properties": {"x": {"type": "integer"}}, "additionalProperties": false});
    let format =
        json!({"format": {"type": "json_schema", "name": "point", "schema": schema, "strict": true}});
    let whole = server.post(PATH, &json!({"input": "Hi", "text": format, "seed": 1})).ok();
    assert_eq!(whole["output"][0]["content"][0]["text"], r#"{"x": 1}"#);
    assert_eq!(whole["text"]["format"]["name"], "point");

    let other = json!({"type": "function", "name": "other"});
    for (choice, calls) in [
        (json!("required"), true),
        (json!({"type": "function", "name": "get_weather"}), true),
        (
            json!({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]}),
            true,
        ),
        (
            json!({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}),
            false,
        ),
        (json!("none"), false),
    ] {
        let request = json!({
            "input": "Hi", "tools": [tool(), other], "tool_choice": choice, "seed": 2, "max_output_tokens": 60
        });
        let whole = server.post(PATH, &request).ok();
        assert_eq!(whole["tool_choice"], choice);
        let called = |item: &Value| item["type"] == "function_call" && item["name"] == "get_weather";
        assert_eq!(whole["output"].as_array().unwrap().iter().any(called), calls, "{choice}: {whole}");
    }
}

/// As some clients say with every request.
#[test]
fn auto_without_tools() {
    let server = server(&[HELLO], 0);
    for tools in [Value::Null, json!([]), json!([{"type": "web_search"}])] {
        let request =
            json!({"input": "Hi", "tools": tools, "tool_choice": "auto", "parallel_tool_calls": false});
        let whole = server.post(PATH, &request).ok();
        assert_eq!((&whole["status"], &whole["tool_choice"]), (&json!("completed"), &json!("auto")));
    }
}

#[test]
fn a_device_that_fails() {
    let options = Options { responses_store: 1, ..options() };
    let (server, steps) = Fixture::stepwise(HELLO, &options);
    // Up to the second token of the reasoning.
    for _ in 0..5 {
        steps.send(engine::Step::Run).unwrap();
    }
    let mut stream = server.stream(PATH, &json!({"input": "Hi", "stream": true}));
    assert_eq!(stream.status, 200);
    // A failed step is tried again once.
    (0..2).for_each(|_| steps.send(engine::Step::Fail("late".to_owned())).unwrap());
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    let last = events.last().unwrap();
    assert!(last.starts_with("event: response.failed\n"), "{last}");
    let data: Value = serde_json::from_str(last.split_once("data: ").unwrap().1).unwrap();
    assert_eq!(
        (&data["response"]["status"], &data["response"]["error"]["code"]),
        (&json!("failed"), &json!("server_error"))
    );
    assert!(!events.iter().any(|event| event.contains("[DONE]")));
    let usage = &data["response"]["usage"];
    assert_eq!(
        (&usage["output_tokens"], &usage["output_tokens_details"]["reasoning_tokens"]),
        (&json!(5), &json!(2))
    );
    // What says that it is stored is.
    assert_eq!(data["response"]["store"], true);
    let id = data["response"]["id"].as_str().unwrap();
    assert_eq!(server.get(&format!("{PATH}/{id}")).ok(), data["response"]);
    drop(steps);
}

/// The data of each event of a stream.
fn followed(mut stream: Stream) -> Vec<Value> {
    let data = |event: String| serde_json::from_str(event.split_once("data: ").unwrap().1).unwrap();
    std::iter::from_fn(|| stream.next()).map(data).collect()
}

fn follow(server: &Fixture, id: &str, query: &str) -> Stream {
    let mut connection = server.connect();
    let request = message("GET", &format!("{PATH}/{id}?stream=true{query}"), "", b"");
    connection.write_all(&request).unwrap();
    Stream::new(connection)
}

#[test]
fn stored_responses_are_told_again() {
    let server = server(&[LOOK], 4);
    let request = json!({"input": "Weather?", "tools": [tool()]});
    let told = events(&server, &request);
    let id = told[0]["response"]["id"].as_str().unwrap();
    assert_eq!(followed(follow(&server, id, "")), told);
    assert_eq!(followed(follow(&server, id, "&starting_after=4")), told[5..]);
    assert_eq!(followed(follow(&server, id, "&starting_after=18446744073709551615")), [Value::Null; 0]);

    // One that nobody saw made can be followed as well.
    let whole = server.post(PATH, &request).ok();
    let told = followed(follow(&server, whole["id"].as_str().unwrap(), ""));
    assert_eq!(join(&told), whole);
}

#[test]
fn in_the_background() {
    let options = Options { responses_store: 1, ..options() };
    let (server, steps) = Fixture::stepwise(HELLO, &options);
    let request = json!({"input": "Hi", "background": true});
    let queued = server.post(PATH, &request).ok();
    assert_eq!((&queued["status"], &queued["background"]), (&json!("queued"), &json!(true)));
    assert_eq!((&queued["output"], &queued["usage"]), (&json!([]), &Value::Null));
    let id = queued["id"].as_str().unwrap();
    let path = format!("{PATH}/{id}");
    assert_eq!(server.get(&path).ok(), queued);

    // As many as are kept may be in the making; others still are served.
    let (status, kind, _, _) = server.post(PATH, &request).error();
    assert_eq!((status, kind.as_str()), (503, "ServiceUnavailableError"));
    let (status, _, param, _) = server.post(PATH, &json!({"input": "x", "previous_response_id": id})).error();
    assert_eq!((status, param.as_deref()), (400, Some("previous_response_id")));

    let mut stream = follow(&server, id, "");
    (0..4).for_each(|_| steps.send(engine::Step::Run).unwrap());
    let first: Vec<String> = (0..4).map(|_| stream.next().unwrap()).collect();
    assert!(first[2].starts_with("event: response.output_item.added"), "{first:?}");
    assert_eq!(server.get(&path).ok()["status"], "in_progress");
    // Nobody needs to be there.
    drop(stream);
    drop(steps);
    let rest = followed(follow(&server, id, "&starting_after=3"));
    assert_eq!(rest[0]["sequence_number"], 4);
    let made = &rest.last().unwrap()["response"];
    assert_eq!((&made["status"], &made["id"]), (&json!("completed"), &json!(id)));
    assert_eq!(&server.get(&path).ok(), made);
    assert_eq!(join(&followed(follow(&server, id, ""))), *made);
    // It is over, so there is nothing to cancel.
    assert_eq!(&server.post(&format!("{path}/cancel"), &json!({})).ok(), made);

    let next = json!({"input": "And?", "previous_response_id": id, "background": true, "stream": true});
    let told = events(&server, &next);
    assert_eq!(told.last().unwrap()["response"]["previous_response_id"], id);
    assert_eq!(told.last().unwrap()["type"], "response.completed");

    let (status, _, param, message) =
        server.post(PATH, &json!({"input": "x", "background": true, "store": false})).error();
    assert_eq!((status, param.as_deref()), (400, Some("background")), "{message}");
}

#[test]
fn cancelled_in_the_background() {
    let options = Options { responses_store: 2, ..options() };
    let (server, steps) = Fixture::stepwise(HELLO, &options);
    let begin = || server.post(PATH, &json!({"input": "Hi", "background": true})).ok()["id"].clone();
    let (first, second) = (begin(), begin());
    let path = |id: &Value| format!("{PATH}/{}", id.as_str().unwrap());
    let stream = follow(&server, first.as_str().unwrap(), "");
    let cancelled = server.post(&format!("{}/cancel", path(&first)), &json!({})).ok();
    assert_eq!((&cancelled["status"], &cancelled["id"]), (&json!("cancelled"), &first));
    assert_eq!(server.get(&path(&first)).ok(), cancelled);
    assert_eq!(server.post(&format!("{}/cancel", path(&first)), &json!({})).ok(), cancelled);
    let told = followed(stream);
    assert_eq!(told.last().unwrap()["type"], "response.incomplete");
    assert_eq!(told.last().unwrap()["response"], cancelled);

    // Who is forgotten ends, too.
    assert_eq!(server.request("DELETE", &path(&second), "", b"").ok()["deleted"], true);
    assert_eq!(server.get(&path(&second)).status, 404);
    drop(steps);
    server.until(|stats| stats.running + stats.waiting == 0 && stats.full_blocks_used == 0);

    // A failure is an answer as well.
    let (server, steps) = Fixture::stepwise(HELLO, &options);
    let failed = server.post(PATH, &json!({"input": "Hi", "background": true})).ok()["id"].clone();
    (0..2).for_each(|_| steps.send(engine::Step::Fail("lost".to_owned())).unwrap());
    let told = followed(follow(&server, failed.as_str().unwrap(), ""));
    assert_eq!(told.last().unwrap()["type"], "response.failed");
    let found = server.get(&path(&failed)).ok();
    assert_eq!((&found["status"], &found["error"]["code"]), (&json!("failed"), &json!("server_error")));
}

#[test]
fn a_server_that_ends_finishes_what_is_in_the_background() {
    let options = Options { responses_store: 1, ..options() };
    let (mut server, steps) = Fixture::stepwise(HELLO, &options);
    assert_eq!(server.post(PATH, &json!({"input": "Hi", "background": true})).status, 200);
    server.shut_down();
    drop(steps);
    server.ended();
    assert_eq!(server.stats().generated_tokens as usize, tokens(HELLO).len());
}

#[test]
fn what_a_server_that_ends_waits_for_can_be_seen_and_ended() {
    let options = Options { responses_store: 1, dev_mode: true, ..options() };
    for abort in [false, true] {
        let (mut server, steps) = Fixture::stepwise(HELLO, &options);
        let begun = server.post(PATH, &json!({"input": "Hi", "background": true})).ok();
        let path = format!("{PATH}/{}", begun["id"].as_str().unwrap());
        server.shut_down();
        while server.get("/ready").status == 200 {}
        assert_eq!(server.post(PATH, &json!({"input": "Hi"})).status, 503);
        assert_eq!(server.get(&path).ok(), begun);
        let ended = match abort {
            true => server.post("/abort_requests", &json!({"request_ids": [begun["id"]]})),
            false => server.post(&format!("{path}/cancel"), &json!({})),
        };
        assert_eq!(ended.status, 200);
        server.ended();
        drop(steps);
    }
}

#[test]
fn the_next_turn_goes_on_from_the_tokens_that_were_generated() {
    let options = Options { responses_store: 1, ..options() };
    let caching = engine::EngineOptions { prefix_caching: true, ..engine_options() };
    let server = Fixture::start(&options, Scripted::new(Scripted::gpt_oss(), vec![tokens(LOOK)]), caching);
    let generated = tokens(LOOK).len() as u64;
    // What is cached is whole blocks; the last of the turn before may have been begun.
    let goes_on = |first: u64, usage: &Value, kind: &str| {
        let cached = usage[kind]["cached_tokens"].as_u64().unwrap();
        assert!(cached + 16 >= first + generated, "{cached} of {first} + {generated}: {usage}");
    };
    let ask = json!({"role": "user", "content": "What is the weather like in the capital of France?"});
    let chat = |messages: Value| {
        let request = json!({"messages": messages, "tools": [crate::harmony_turns::tool("get_weather")]});
        server.chat(&request).ok()
    };
    let first = chat(json!([ask]));
    let said = &first["choices"][0]["message"];
    let result = json!({"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "sun"});
    let second = chat(json!([ask, said, result]));
    goes_on(first["usage"]["prompt_tokens"].as_u64().unwrap(), &second["usage"], "prompt_tokens_details");

    // The same in a stream and with the other API, whose items come back one by one or by reference.
    let mut request =
        json!({"messages": [ask], "tools": [crate::harmony_turns::tool("get_weather")], "stream": true});
    request["messages"][0]["content"] = "And in the capital of Italy, what is it like there?".into();
    let joined = crate::harmony_turns::join(&server.chunks("/v1/chat/completions", &request));
    let call = json!({"id": joined.ids[0], "type": "function", "function": {"name": joined.calls[0].0, "arguments": joined.calls[0].1}});
    let said = json!({"role": "assistant", "reasoning": joined.reasoning, "content": joined.content, "tool_calls": [call]});
    let result = json!({"role": "tool", "tool_call_id": joined.ids[0], "content": "rain"});
    let second = chat(json!([request["messages"][0], said, result]));
    let prompt = server
        .chat(&json!({"messages": request["messages"], "tools": request["tools"], "max_tokens": 1}))
        .ok();
    goes_on(prompt["usage"]["prompt_tokens"].as_u64().unwrap(), &second["usage"], "prompt_tokens_details");

    let input = json!([{"role": "user", "content": "Now tell me of the one in Portugal, if you please."}]);
    let first = server.post(PATH, &json!({"input": input, "tools": [tool()]})).ok();
    let output =
        json!({"type": "function_call_output", "call_id": first["output"][2]["call_id"], "output": "sun"});
    let mut items = input.as_array().unwrap().clone();
    items.extend(first["output"].as_array().unwrap().iter().cloned());
    items.push(output.clone());
    let prompt = first["usage"]["input_tokens"].as_u64().unwrap();
    for request in [
        json!({"input": [output], "previous_response_id": first["id"], "tools": [tool()]}),
        json!({"input": items, "tools": [tool()]}),
    ] {
        let second = server.post(PATH, &request).ok();
        goes_on(prompt, &second["usage"], "input_tokens_details");
    }
}
