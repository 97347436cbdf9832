//! What single fields of a request do.

use engine::{EngineOptions, SchedulingPolicy, Scripted};
use serde_json::{Value, json};
use server::{Options, SystemDate};

use crate::fixture::{Fixture, JSON, engine_options, options, parse_data, tokens};
use crate::harmony_turns::{join, tool};

const CHAT: &str = "/v1/chat/completions";
const HELLO: &str = "<|channel|>analysis<|message|>Say hi.<|end|><|start|>assistant<|channel|>final<|message|>Hello there!<|return|>";

fn ask(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

#[test]
fn hidden_reasoning_has_no_tokens() {
    let server = Fixture::saying(&[HELLO]);
    let mut request = json!({
        "messages": ask("Hi"), "include_reasoning": false, "logprobs": true, "return_token_ids": true
    });
    let whole = server.chat(&request).ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["token_ids"], json!(tokens("Hello there!")));
    let shown = |entries: &Value| -> String {
        entries.as_array().unwrap().iter().map(|entry| entry["token"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(shown(&choice["logprobs"]["content"]), "Hello there!");
    request["stream"] = true.into();
    let chunks = server.chunks(CHAT, &request);
    assert!(!chunks.iter().any(|chunk| chunk.to_string().contains("Say")), "{chunks:?}");
    let ids: Vec<Value> = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(json!(ids), json!(tokens("Hello there!")));
}

#[test]
fn log_probabilities_of_the_final_channel_alone() {
    let said = "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>final";
    let script = HELLO.replace("<|channel|>final", said);
    let options = Options { final_logprobs: true, ..options() };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(&script)]);
    let server = Fixture::start(&options, backend, engine_options());
    let mut request = json!({"messages": ask("Hi"), "logprobs": true, "return_token_ids": true});
    let joined = |entries: &Value| -> String {
        let entries = entries.as_array().into_iter().flatten();
        entries.map(|entry| entry["token"].as_str().unwrap().to_owned()).collect()
    };
    let whole = server.chat(&request).ok();
    let choice = &whole["choices"][0];
    assert_eq!(joined(&choice["logprobs"]["content"]), "Hello there!");
    assert_eq!(choice["message"]["content"], "Wait.\nHello there!");
    // All else is there as ever.
    assert_eq!(
        (&choice["message"]["reasoning"], &choice["token_ids"]),
        (&json!("Say hi."), &json!(tokens(&script)))
    );
    request["stream"] = true.into();
    let chunks = server.chunks(CHAT, &request);
    let streamed = chunks.iter().map(|chunk| joined(&chunk["choices"][0]["logprobs"]["content"]));
    assert_eq!(streamed.collect::<String>(), "Hello there!");
}

#[test]
fn log_probabilities_of_given_tokens() {
    let server = Fixture::saying(&[HELLO]);
    let hello = tokens("Hello")[0];
    let request = json!({
        "messages": ask("Hi"), "logprobs": true, "logprob_token_ids": [hello, 7], "top_logprobs": 5
    });
    let whole = server.chat(&request).ok();
    for entry in whole["choices"][0]["logprobs"]["content"].as_array().unwrap() {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert_eq!(top[0]["token"], "Hello");
        // Scripts say nothing else.
        assert_eq!(top[0]["logprob"] == -9999.0, entry["token"] != "Hello");
    }
}

#[test]
fn long_prompts_are_cut_where_they_may_be() {
    let server = Fixture::saying(&[HELLO]);
    let words = "one two three four five six seven eight nine ten";
    let mut request = json!({
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": words},
            {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And then?"}
        ],
        "return_token_ids": true, "return_prompt_text": true
    });
    let mut ask = |tokens: Value, side: &str| {
        request["truncate_prompt_tokens"] = tokens;
        request["truncation_side"] = side.into();
        let whole = server.chat(&request).ok();
        let count = whole["prompt_token_ids"].as_array().unwrap().len();
        (count, whole["prompt_text"].as_str().unwrap().to_owned())
    };
    let (all, text) = ask(Value::Null, "left");
    assert!(text.contains("one two") && text.contains("And then?"));
    assert_eq!(ask(json!(all), "left").1, text);
    assert_eq!(ask(json!(-1), "left").1, text);
    // The oldest message goes as a whole; instructions stay.
    let (count, cut) = ask(json!(all - 2), "left");
    assert!(count < all - 2 && !cut.contains("ten"), "{cut}");
    assert!(cut.contains("Be brief.<|end|><|start|>assistant<|channel|>final<|message|>Yes."), "{cut}");
    assert!(cut.ends_with("And then?<|end|><|start|>assistant"), "{cut}");
    let (count, cut) = ask(json!(all - 2), "right");
    assert_eq!(count, all - 2);
    assert!(cut.contains("one two") && cut.ends_with("<|start|>assistant"), "{cut}");

    let mut request = json!({"prompt": "one two three four", "echo": true, "max_tokens": 1});
    for (side, shown) in [("left", " three four"), ("right", "one two")] {
        request["truncate_prompt_tokens"] = 2.into();
        request["truncation_side"] = side.into();
        let whole = server.complete(&request).ok();
        assert!(whole["choices"][0]["text"].as_str().unwrap().starts_with(shown), "{whole}");
        assert_eq!(whole["usage"]["prompt_tokens"], 2);
    }
    // Of responses, `truncation` decides.
    let input: Vec<Value> =
        (0..300).map(|_| json!({"role": "user", "content": "word ".repeat(40)})).collect();
    let mut request = json!({"input": input});
    assert_eq!(server.post("/v1/responses", &request).status, 400);
    request["truncation"] = "auto".into();
    let whole = server.post("/v1/responses", &request).ok();
    assert!(whole["usage"]["input_tokens"].as_u64().unwrap() > 4000, "{}", whole["usage"]);
    // Where nobody says how long the answer may be, there is room for one.
    assert_eq!(whole["output"][1]["content"][0]["text"], "Hello there!", "{whole}");
    let chat = json!({"messages": input, "truncate_prompt_tokens": -1});
    assert_eq!(server.chat(&chat).ok()["choices"][0]["message"]["content"], "Hello there!");
}

#[test]
fn an_answer_that_repeats_itself_ends() {
    let script = format!("<|channel|>final<|message|>Well{}", " so".repeat(50));
    let server = Fixture::saying(&[&script]);
    let mut request = json!({
        "messages": ask("Hi"), "repetition_detection": {"max_pattern_size": 3, "min_count": 4}
    });
    let whole = server.chat(&request).ok();
    let choice = &whole["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("repetition"), &json!("Well so so so so"))
    );
    request["stream"] = true.into();
    assert_eq!(join(&server.chunks(CHAT, &request)).content, "Well so so so so");
    request = json!({"input": "Hi", "repetition_detection": {"max_pattern_size": 3, "min_count": 4}});
    let response = server.post("/v1/responses", &request).ok();
    assert_eq!(response["status"], "completed");
}

#[test]
fn chunks_of_several_tokens() {
    let server = Fixture::saying(&["<|channel|>final<|message|>one two three four five six seven<|return|>"]);
    let mut request = json!({"messages": ask("Hi"), "stream": true});
    let single = server.chunks(CHAT, &request);
    request["stream_interval"] = 4.into();
    let grouped = server.chunks(CHAT, &request);
    assert!(grouped.len() < single.len(), "{} and {}", grouped.len(), single.len());
    assert_eq!(join(&grouped).content, join(&single).content);
}

#[test]
fn prefixes_are_kept_apart_by_salt() {
    let options_of_engine = EngineOptions { prefix_caching: true, ..engine_options() };
    let script = tokens(HELLO);
    let server =
        Fixture::start(&options(), Scripted::new(Scripted::gpt_oss(), vec![script]), options_of_engine);
    let cached = |salt: Value| {
        let request = json!({"messages": ask("Hi"), "cache_salt": salt});
        server.chat(&request).ok()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    let found = [json!("a"), Value::Null, json!("b"), json!("a"), Value::Null].map(cached);
    assert_eq!(&found[..3], [0, 0, 0]);
    assert!(found[3] > 0 && found[4] > 0, "{found:?}");
}

#[test]
fn priorities_need_a_server_that_has_them() {
    let engine_options = EngineOptions { policy: SchedulingPolicy::Priority, ..engine_options() };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HELLO)]);
    let server = Fixture::start(&options(), backend, engine_options);
    for request in
        [json!({"messages": ask("Hi"), "priority": -7}), json!({"messages": ask("Hi"), "priority": 3})]
    {
        assert_eq!(server.chat(&request).status, 200);
    }
    assert_eq!(server.complete(&json!({"prompt": "Hi", "priority": 2})).status, 200);
    assert_eq!(server.post("/v1/responses", &json!({"input": "Hi", "priority": 2})).status, 200);
}

#[test]
fn a_prompt_may_end_with_its_last_message() {
    // The model then writes the whole of the next one.
    let server = Fixture::saying(&[&format!("<|start|>assistant{HELLO}")]);
    let mut request =
        json!({"messages": ask("Hi"), "add_generation_prompt": false, "return_token_ids": true});
    let whole = server.chat(&request).ok();
    assert_eq!(whole["choices"][0]["message"]["content"], "Hello there!");
    assert_eq!(whole["choices"][0]["message"]["reasoning"], "Say hi.");
    let prompt = whole["prompt_token_ids"].as_array().unwrap();
    assert_eq!(prompt[prompt.len() - 1..], [json!(tokens("<|end|>")[0])]);
    assert_eq!(server.post("/tokenize", &request).ok()["tokens"], whole["prompt_token_ids"]);
    (request["stream"], request["return_token_ids"]) = (true.into(), false.into());
    let streamed = join(&server.chunks(CHAT, &request));
    assert_eq!((streamed.content.as_str(), streamed.reasoning.as_str()), ("Hello there!", "Say hi."));
    request["tools"] = json!([tool("f")]);
    request["tool_choice"] = "required".into();
    assert_eq!(server.chat(&request).error().2.as_deref(), Some("add_generation_prompt"));
    // Of a prompt alone it may be asked.
    request["stream"] = false.into();
    assert_eq!(server.post("/tokenize", &request).status, 200);
}

#[test]
fn an_answer_is_shown_with_what_it_continues() {
    let server = Fixture::saying(&[" world<|return|>"]);
    let mut request = json!({
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "continue_final_message": true, "add_generation_prompt": false, "echo": true
    });
    let whole = server.chat(&request).ok();
    assert_eq!(whole["choices"][0]["message"]["content"], "Hello world");
    request["stream"] = true.into();
    assert_eq!(join(&server.chunks(CHAT, &request)).content, "Hello world");
    request["echo"] = false.into();
    assert_eq!(join(&server.chunks(CHAT, &request)).content, " world");
}

#[test]
fn a_response_has_at_most_so_many_calls() {
    let call = |name: &str| format!("<|channel|>commentary to=functions.{name}<|message|>{{}}");
    let script = [call("f"), call("g"), call("f")].join("<|end|><|start|>assistant") + "<|call|>";
    let server = Fixture::saying(&[&script]);
    let flat = |name: &str| {
        let mut tool = tool(name)["function"].clone();
        tool["type"] = "function".into();
        tool
    };
    for (most, expected) in [(Value::Null, 3), (json!(2), 2), (json!(1), 1), (json!(9), 3)] {
        let request = json!({"input": "Hi", "tools": [flat("f"), flat("g")], "max_tool_calls": most});
        let response = server.post("/v1/responses", &request).ok();
        assert_eq!(response["output"].as_array().unwrap().len(), expected, "{response}");
        assert_eq!(response["max_tool_calls"], most);
    }
    let refused = server.post("/v1/responses", &json!({"input": "Hi", "max_tool_calls": 0}));
    assert_eq!(refused.error().2.as_deref(), Some("max_tool_calls"));
}

#[test]
fn functions_in_namespaces_and_tools_that_search() {
    let said = "<|channel|>commentary to=functions.agents.spawn <|constrain|>json<|message|>{}<|call|>";
    let server = Fixture::saying(&[said, "<|channel|>final<|message|>Done<|return|>"]);
    let spawn = json!({"type": "function", "name": "spawn", "parameters": {"type": "object"}});
    let mut request = json!({
        "input": "Hi",
        "tools": [
            {"type": "namespace", "name": "agents", "description": "Helpers", "tools": [spawn]},
            {"type": "web_search", "external_web_access": true},
        ]
    });
    let first = server.post("/v1/responses", &request).ok();
    let call = &first["output"][0];
    assert_eq!(
        (&call["name"], &call["namespace"], &call["type"]),
        (&json!("spawn"), &json!("agents"), &json!("function_call"))
    );
    let kinds: Vec<&Value> = first["tools"].as_array().unwrap().iter().map(|tool| &tool["type"]).collect();
    assert_eq!(kinds, ["namespace"], "what is not there is not repeated");
    request["input"] = json!([
        {"role": "user", "content": "Hi"}, call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "ok"}
    ]);
    let second = server.post("/v1/responses", &request).ok();
    assert_eq!(second["output"][0]["content"][0]["text"], "Done");
    // Together they are one too many.
    let many = |namespaces: usize, functions: usize| -> Value {
        let function = |i| json!({"type": "function", "name": format!("f{i}")});
        let inner: Vec<Value> = (0..functions).map(function).collect();
        let namespace = |i| json!({"type": "namespace", "name": format!("n{i}"), "tools": inner});
        (0..namespaces).map(namespace).collect()
    };
    assert_eq!(server.post("/v1/responses", &json!({"input": "Hi", "tools": many(2, 256)})).status, 200);
    for (tools, param) in [
        (json!([{"type": "namespace", "name": "a b", "tools": [spawn]}]), "tools.0.name"),
        (json!([{"type": "namespace", "name": "a".repeat(65), "tools": [spawn]}]), "tools.0.name"),
        (
            json!([{"type": "namespace", "name": "a", "tools": [{"type": "function", "name": ""}]}]),
            "tools.0.tools.0.name",
        ),
        (many(2, 257), "tools"),
        (
            json!([{"type": "namespace", "name": "a", "tools": [{"type": "custom", "name": "x"}]}]),
            "tools.0.tools.0.type",
        ),
        (json!([{"type": "mcp"}]), "tools.0.type"),
    ] {
        let refused = server.post("/v1/responses", &json!({"input": "Hi", "tools": tools}));
        assert_eq!(refused.error().2.as_deref(), Some(param));
    }
}

#[test]
fn prefixes_are_kept_apart_by_key_where_that_is_asked() {
    let caching = EngineOptions { prefix_caching: true, ..engine_options() };
    for (isolate, shared) in [(false, true), (true, false)] {
        let options = Options {
            api_keys: vec!["one".to_owned(), "two".to_owned()],
            isolate_prefix_cache: isolate,
            ..options()
        };
        let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HELLO)]);
        let server = Fixture::start(&options, backend, caching.clone());
        let cached = |key: &str, salt: Value| {
            let request = json!({"messages": ask("Hi"), "cache_salt": salt}).to_string();
            let headers = format!("{JSON}authorization: Bearer {key}\r\n");
            let whole = server.request("POST", CHAT, &headers, request.as_bytes()).ok();
            whole["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0
        };
        let found = [("one", Value::Null), ("two", Value::Null), ("one", Value::Null), ("one", json!("a"))];
        let found = found.map(|(key, salt)| cached(key, salt));
        assert_eq!(found, [false, shared, true, false], "{isolate}");
    }
}

#[test]
fn an_operator_sets_how_many_answers_and_alternatives_there_may_be() {
    let options = Options { max_n: 2, max_logprobs: usize::MAX, ..options() };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens("Hi<|return|>")]);
    let server = Fixture::start(&options, backend, engine_options());
    assert_eq!(server.complete(&json!({"prompt": "x", "n": 2})).status, 200);
    let (status, _, param, message) = server.complete(&json!({"prompt": "x", "n": 3})).error();
    assert_eq!((status, param.as_deref()), (400, Some("n")));
    assert!(message.contains("[1, 2]"), "{message}");
    let all = server.complete(&json!({"prompt": "x", "logprobs": -1, "max_tokens": 1})).ok();
    let top = all["choices"][0]["logprobs"]["top_logprobs"][0].as_object().unwrap().len();
    // Tokens with equal texts share a place.
    assert!(top > 190_000, "{top}");
    let (status, _, param, _) = server.complete(&json!({"prompt": "x", "logprobs": -2})).error();
    assert_eq!((status, param.as_deref()), (400, Some("logprobs")));
}

#[test]
fn what_a_server_sets_for_prompts_and_chats() {
    let options = Options {
        system_date: SystemDate::None,
        strict_reasoning_effort: true,
        exclude_tools_of_choice_none: true,
        reasoning_content: false,
        ..options()
    };
    let server =
        Fixture::start(&options, Scripted::new(Scripted::gpt_oss(), vec![tokens(HELLO)]), engine_options());
    let mut request = json!({"messages": ask("Hi"), "tools": [tool("f")], "return_prompt_text": true});
    let told = server.chat(&request).ok();
    let prompt = told["prompt_text"].as_str().unwrap();
    assert!(!prompt.contains("Current date") && prompt.contains("type f"), "{prompt}");
    let message = &told["choices"][0]["message"];
    assert_eq!((&message["reasoning"], message.get("reasoning_content")), (&json!("Say hi."), None));
    request["tool_choice"] = "none".into();
    let untold = server.chat(&request).ok();
    assert!(!untold["prompt_text"].as_str().unwrap().contains("type f"), "{untold}");
    request["stream"] = true.into();
    let chunks = server.chunks(CHAT, &request);
    assert!(!json!(chunks).to_string().contains("reasoning_content"), "{chunks:?}");
    for effort in ["none", "minimal", "xhigh", "max"] {
        let refused = server.chat(&json!({"messages": ask("Hi"), "reasoning_effort": effort}));
        assert_eq!(refused.error().2.as_deref(), Some("reasoning_effort"));
        let refused = server.post("/v1/responses", &json!({"input": "Hi", "reasoning": {"effort": effort}}));
        assert_eq!(refused.error().2.as_deref(), Some("reasoning.effort"));
    }
}

#[test]
fn streams_may_begin_before_the_first_token() {
    let (server, steps) = Fixture::stepwise(HELLO, &Options { eager_streams: true, ..options() });
    let mut stream = server.stream(CHAT, &json!({"messages": ask("Hi"), "stream": true}));
    let first = parse_data(&stream.next().unwrap());
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    drop(steps);
    assert_eq!(std::iter::from_fn(|| stream.next()).last().as_deref(), Some("data: [DONE]"));
}

#[test]
fn a_shell_is_a_function() {
    let call = r#"<|channel|>commentary to=functions.local_shell <|constrain|>json<|message|>{"command": ["ls"]}<|call|>"#;
    let server = Fixture::saying(&[call]);
    let request = json!({"input": "Hi", "tools": [{"type": "local_shell"}]});
    let response = server.post("/v1/responses", &request).ok();
    let item = &response["output"][0];
    assert_eq!(
        (&item["type"], &item["name"], &item["arguments"]),
        (&json!("function_call"), &json!("local_shell"), &json!(r#"{"command": ["ls"]}"#))
    );
    assert_eq!(response["tools"], request["tools"]);
}
