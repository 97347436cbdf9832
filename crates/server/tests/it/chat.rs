//! Chats that go well: the fields of answers, and what the model is fed.

use engine::{EngineOptions, Scripted};
use serde_json::{Value, json};

use crate::fixture::{Fixture, MODEL, engine_options, harmony, options, tokens};
use crate::harmony_turns::{join, tool};

const HELLO: &str = "<|channel|>analysis<|message|>Say hi.<|end|><|start|>assistant<|channel|>final<|message|>Hello there!<|return|>";

fn ask(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn every_field() {
    let server = Fixture::saying(&[HELLO]);
    let whole = server.chat(&json!({"model": MODEL, "messages": ask("Hi")})).ok();
    assert_eq!(
        keys(&whole),
        [
            "id",
            "object",
            "created",
            "model",
            "choices",
            "service_tier",
            "system_fingerprint",
            "usage",
            "prompt_logprobs",
            "prompt_token_ids",
            "prompt_text",
            "kv_transfer_params",
            "metrics"
        ]
    );
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(whole["object"], "chat.completion");
    assert!(whole["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(whole["model"], MODEL);
    assert!(whole["system_fingerprint"].as_str().unwrap().starts_with("vllm-compatible-"));
    assert_eq!(
        whole["choices"],
        json!([{
            "index": 0,
            "message": {
                "role": "assistant", "content": "Hello there!", "refusal": null, "annotations": null, "audio": null,
                "function_call": null, "reasoning": "Say hi.", "reasoning_content": "Say hi."
            },
            "logprobs": null, "finish_reason": "stop", "stop_reason": null, "token_ids": null
        }])
    );
    let prompt_tokens = whole["usage"]["prompt_tokens"].as_u64().unwrap();
    let generated = tokens(HELLO).len() as u64;
    assert_eq!(
        whole["usage"],
        json!({
            "prompt_tokens": prompt_tokens, "completion_tokens": generated, "total_tokens": prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 3}
        })
    );
}

/// What the prompt of a request is.
fn prompt_of(server: &Fixture, mut request: Value) -> String {
    request["return_prompt_text"] = true.into();
    request["return_token_ids"] = true.into();
    request["max_tokens"] = 1.into();
    let whole = server.chat(&request).ok();
    let ids: Vec<u32> = serde_json::from_value(whole["prompt_token_ids"].clone()).unwrap();
    let text = whole["prompt_text"].as_str().unwrap();
    assert_eq!(harmony().tokenizer().decode(&ids), text);
    assert_eq!(whole["usage"]["prompt_tokens"], ids.len());
    text.to_owned()
}

#[test]
fn prompts() {
    let server = Fixture::saying(&[HELLO]);
    let system = |effort: &str| {
        format!(
            "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: \
             2024-06\nCurrent date: 2026-11-24\n\nReasoning: {effort}\n\n# Valid channels: analysis, commentary, final. \
             Channel must be included for every message.<|end|>"
        )
    };
    let hi = "<|start|>user<|message|>Hi<|end|><|start|>assistant";
    for (sent, effort) in [
        (json!(null), "medium"),
        (json!("minimal"), "low"),
        (json!("low"), "low"),
        (json!("high"), "high"),
        (json!("xhigh"), "high"),
        (json!("max"), "high"),
    ] {
        let prompt = prompt_of(&server, json!({"messages": ask("Hi"), "reasoning_effort": sent}));
        assert_eq!(prompt, system(effort) + hi);
    }
    let kwargs =
        json!({"messages": ask("Hi"), "chat_template_kwargs": {"reasoning_effort": "low", "other": [1]}});
    assert_eq!(prompt_of(&server, kwargs), system("low") + hi);

    // Parts are joined; markers that people type stay text.
    let parts = json!([{"role": "user", "content": [
        {"type": "text", "text": "H"}, {"type": "input_text", "text": "i"}
    ]}]);
    assert_eq!(prompt_of(&server, json!({"messages": parts})), system("medium") + hi);
    let whole = server
        .chat(&json!({"messages": ask("<|end|><|start|>"), "return_token_ids": true, "max_tokens": 1}))
        .ok();
    let ids: Vec<u32> = serde_json::from_value(whole["prompt_token_ids"].clone()).unwrap();
    let end = harmony().tokenizer().special("<|end|>").unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == end).count(), 2, "of the system message and of the user's");

    // Whether it may call them or not, the model is told of tools.
    for choice in ["auto", "none", "required"] {
        let with_tools = json!({"messages": ask("Hi"), "tools": [tool("f")], "tool_choice": choice});
        assert!(prompt_of(&server, with_tools).contains("type f = (_: {\nlocation?: string,\n}) => any;"));
    }
    let legacy =
        json!({"messages": ask("Hi"), "functions": [tool("f")["function"]], "function_call": "auto"});
    assert!(prompt_of(&server, legacy).contains("type f = (_: {\nlocation?: string,\n}) => any;"));
}

#[test]
fn history_with_calls() {
    let server = Fixture::saying(&[HELLO]);
    let call = |id: &str, name: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": "{\"a\": 1}"}});
    let messages = json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": null, "reasoning": "Look.", "tool_calls": [call("a", "f"), call("b", "g")]},
        {"role": "tool", "tool_call_id": "b", "content": "two"},
        {"role": "tool", "tool_call_id": "a", "content": "one"},
    ]);
    let expected = "<|start|>assistant<|channel|>analysis<|message|>Look.<|end|>\
        <|start|>assistant to=functions.f<|channel|>commentary json<|message|>{\"a\": 1}<|call|>\
        <|start|>assistant to=functions.g<|channel|>commentary json<|message|>{\"a\": 1}<|call|>\
        <|start|>functions.g to=assistant<|channel|>commentary<|message|>two<|end|>\
        <|start|>functions.f to=assistant<|channel|>commentary<|message|>one<|end|><|start|>assistant";
    let prompt = prompt_of(&server, json!({"messages": messages, "tools": [tool("f"), tool("g")]}));
    assert!(prompt.ends_with(expected), "{prompt}");

    let legacy = json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "one"},
    ]);
    let expected = "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>\
        <|start|>functions.f to=assistant<|channel|>commentary<|message|>one<|end|><|start|>assistant";
    let prompt = prompt_of(&server, json!({"messages": legacy}));
    assert!(prompt.ends_with(expected), "{prompt}");
}

#[test]
fn several_choices() {
    let server = Fixture::saying(&[
        "<|channel|>final<|message|>One<|return|>",
        "<|channel|>final<|message|>Two<|return|>",
    ]);
    let whole = server.chat(&json!({"messages": ask("Hi"), "n": 2})).ok();
    let mut contents: Vec<&str> =
        (0..2).map(|i| whole["choices"][i]["message"]["content"].as_str().unwrap()).collect();
    assert_eq!(whole["choices"][1]["index"], 1);
    contents.sort_unstable();
    assert_eq!(contents, ["One", "Two"]);
    assert_eq!(whole["usage"]["completion_tokens"], 10);

    let chunks =
        server.chunks("/v1/chat/completions", &json!({"messages": ask("Hi"), "n": 2, "stream": true}));
    let of = |index: u64| chunks.iter().filter(move |chunk| chunk["choices"][0]["index"] == index);
    for index in [0, 1] {
        assert_eq!(of(index).next().unwrap()["choices"][0]["delta"]["role"], "assistant");
        let finishes = of(index).filter(|chunk| !chunk["choices"][0]["finish_reason"].is_null());
        assert_eq!(finishes.count(), 1);
    }
}

#[test]
fn logprobs() {
    let server = Fixture::saying(&[HELLO]);
    let mut request = json!({
        "messages": ask("Hi"), "logprobs": true, "top_logprobs": 2, "return_token_ids": true, "prompt_logprobs": 1
    });
    let whole = server.chat(&request).ok();
    let generated = tokens(HELLO);
    let choice = &whole["choices"][0];
    assert_eq!(choice["token_ids"], json!(generated));
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(choice["logprobs"]["refusal"], Value::Null);
    assert_eq!(entries.len(), generated.len());
    let tokenizer = harmony();
    let tokenizer = tokenizer.tokenizer();
    for (entry, &token) in entries.iter().zip(&generated) {
        assert_eq!(keys(entry), ["token", "logprob", "bytes", "top_logprobs"]);
        assert_eq!(entry["bytes"], json!(tokenizer.token_bytes(token).unwrap()));
        assert_eq!(entry["token"], tokenizer.decode(&[token]));
        assert_eq!(entry["logprob"].as_f64().unwrap() as f32, -std::f32::consts::LN_2);
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert_eq!(keys(&top[0]), ["token", "logprob", "bytes"]);
        assert_eq!(top[0]["token"], entry["token"]);
    }
    let prompt = whole["prompt_logprobs"].as_array().unwrap();
    let ids: Vec<u32> = serde_json::from_value(whole["prompt_token_ids"].clone()).unwrap();
    assert_eq!(prompt.len(), ids.len());
    assert_eq!(prompt[0], Value::Null);
    let second = &prompt[1][ids[1].to_string()];
    assert_eq!(keys(second), ["logprob", "rank", "decoded_token"]);
    assert_eq!(second["decoded_token"], "system");

    request["return_tokens_as_token_ids"] = true.into();
    let whole = server.chat(&request).ok();
    assert_eq!(whole["choices"][0]["logprobs"]["content"][0]["token"], format!("token_id:{}", generated[0]));

    // Streamed, the entries come one after the other, those of markers too.
    request["stream"] = true.into();
    request["prompt_logprobs"] = Value::Null;
    let chunks = server.chunks("/v1/chat/completions", &request);
    let streamed: Vec<Value> = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(json!(streamed), whole["choices"][0]["logprobs"]["content"]);
    let ids: Vec<Value> = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(json!(ids), json!(generated));
}

#[test]
fn without_reasoning() {
    let server = Fixture::saying(&[HELLO]);
    let mut request = json!({"messages": ask("Hi"), "include_reasoning": false});
    let whole = server.chat(&request).ok();
    assert_eq!(whole["choices"][0]["message"]["reasoning"], Value::Null);
    assert_eq!(whole["choices"][0]["message"]["content"], "Hello there!");
    assert_eq!(whole["usage"]["completion_tokens_details"]["reasoning_tokens"], 3);
    request["stream"] = true.into();
    let joined = join(&server.chunks("/v1/chat/completions", &request));
    assert_eq!((joined.reasoning.as_str(), joined.content.as_str()), ("", "Hello there!"));
}

/// Who asks in the old form is answered in it.
#[test]
fn legacy_functions() {
    let server = Fixture::saying(&[TWO_CALLS]);
    let functions = json!([tool("f")["function"], tool("g")["function"]]);
    let mut request = json!({"messages": ask("Hi"), "functions": functions});
    for (choice, finish) in [(json!("auto"), "function_call"), (json!({"name": "f"}), "stop")] {
        request["function_call"] = choice;
        let choice = server.chat(&request).ok()["choices"][0].clone();
        assert_eq!(choice["message"]["function_call"], json!({"name": "f", "arguments": "{}"}), "{choice}");
        assert_eq!((choice["message"].get("tool_calls"), &choice["finish_reason"]), (None, &json!(finish)));

        let mut streamed = request.clone();
        streamed["stream"] = true.into();
        let (mut names, mut arguments, mut finishes) = (Vec::new(), String::new(), Vec::new());
        for mut chunk in server.chunks("/v1/chat/completions", &streamed) {
            let mut choice = chunk["choices"][0].take();
            assert_eq!(choice["delta"].get("tool_calls"), None);
            let call = choice["delta"]["function_call"].take();
            names.extend(call["name"].as_str().map(str::to_owned));
            arguments += call["arguments"].as_str().unwrap_or_default();
            finishes.extend(choice["finish_reason"].as_str().map(str::to_owned));
        }
        assert_eq!(
            (names, arguments.as_str(), finishes),
            (vec!["f".to_owned()], "{}", vec![finish.to_owned()])
        );
    }
}

const TWO_CALLS: &str = "<|channel|>commentary to=functions.f<|message|>{}<|end|><|start|>assistant<|channel|>commentary to=functions.g<|message|>{}<|call|>";

#[test]
fn one_call_at_most() {
    let server = Fixture::saying(&[TWO_CALLS]);
    let mut request = json!({
        "messages": ask("Hi"), "tools": [tool("f"), tool("g")], "parallel_tool_calls": false
    });
    let whole = server.chat(&request).ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1);
    assert_eq!(choice["finish_reason"], "tool_calls");
    request["stream"] = true.into();
    let joined = join(&server.chunks("/v1/chat/completions", &request));
    assert_eq!(joined.calls, [("f".to_owned(), "{}".to_owned())]);
    assert_eq!(joined.finish, "tool_calls");
    server.until(|stats| stats.running == 0);
}

#[test]
fn nothing_is_shown_or_counted_of_a_call_too_many() {
    let server = Fixture::saying(&[TWO_CALLS]);
    let (first, _) = TWO_CALLS.split_once("<|start|>").unwrap();
    let entries = |choice: &Value| choice["logprobs"]["content"].as_array().map_or(0, Vec::len);
    for interval in [1, 3, 20] {
        let mut request = json!({
            "messages": ask("Hi"), "tools": [tool("f"), tool("g")], "parallel_tool_calls": false,
            "stream_interval": interval, "logprobs": true, "return_token_ids": true
        });
        let whole = server.chat(&request).ok();
        let choice = &whole["choices"][0];
        assert_eq!(choice["token_ids"], json!(tokens(first)), "{interval}");
        assert_eq!(entries(choice), tokens(first).len(), "{interval}");
        assert_eq!(whole["usage"]["completion_tokens"], tokens(first).len(), "{interval}");
        request["stream"] = true.into();
        request["stream_options"] = json!({"include_usage": true});
        let chunks = server.chunks("/v1/chat/completions", &request);
        assert_eq!(chunks.last().unwrap()["usage"], whole["usage"], "{interval}");
        let choices = chunks.iter().map(|chunk| &chunk["choices"][0]);
        assert_eq!(choices.clone().map(entries).sum::<usize>(), tokens(first).len(), "{interval}");
        let ids: Vec<&Value> =
            choices.flat_map(|choice| choice["token_ids"].as_array().into_iter().flatten()).collect();
        assert_eq!(json!(ids), choice["token_ids"], "{interval}");
    }
}

#[test]
fn a_turn_that_ends_with_its_last_call_is_counted_like_others() {
    // The engine would go on for long.
    let said = format!(
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant{}",
        "<|channel|>commentary to=functions.f<|message|>{}<|end|><|start|>assistant".repeat(99)
    );
    let server = Fixture::saying(&[&said]);
    let request = json!({"messages": ask("Hi"), "tools": [tool("f")], "parallel_tool_calls": false});
    let usage = server.chat(&request).ok()["usage"].clone();
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 1);
    let stream = json!({
        "messages": ask("Hi"), "tools": [tool("f")], "parallel_tool_calls": false, "stream": true,
        "stream_options": {"include_usage": true}
    });
    let chunks = server.chunks("/v1/chat/completions", &stream);
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens_details"]["reasoning_tokens"], 1);
    let flat = json!({"type": "function", "name": "f", "parameters": {"type": "object"}});
    let request = json!({"input": "Hi", "tools": [flat], "max_tool_calls": 1});
    let usage = server.post("/v1/responses", &request).ok()["usage"].clone();
    assert_eq!(usage["output_tokens_details"]["reasoning_tokens"], 1);
    server.until(|stats| stats.running == 0);
    let metrics = server.get("/metrics").body;
    for expected in ["finished_reason=\"stop\"} 3\n", "finished_reason=\"abort\"} 0\n"] {
        assert!(metrics.contains(expected), "{expected}: {metrics}");
    }
}

#[test]
fn calls_that_were_not_allowed_are_reasoning() {
    let server = Fixture::saying(&[TWO_CALLS]);
    let mut request = json!({"messages": ask("Hi")});
    let whole = server.chat(&request).ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"].get("tool_calls"), None);
    assert_eq!(choice["message"]["reasoning"], "{}\n{}");
    assert_eq!(choice["finish_reason"], "stop");
    request["stream"] = true.into();
    assert_eq!(join(&server.chunks("/v1/chat/completions", &request)).reasoning, "{}\n{}");
}

#[test]
fn prompts_that_are_repeated_are_bounded_together() {
    let long = EngineOptions { max_model_len: Some(131_072), kv_cache_bytes: 16 << 30, ..engine_options() };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HELLO)]);
    let server = Fixture::start(&options(), backend, long);
    let user = json!({"role": "user", "content": "a ".repeat(80_000)});
    let said = json!({"role": "assistant", "content": " ".repeat(600_000)});
    let refused = |request: Value, expected: &str| {
        let (status, _, param, message) = server.chat(&request).error();
        assert_eq!((status, param.as_deref()), (400, Some(expected)));
        assert!(message.contains("at most 67108864 bytes"), "{message}");
    };
    let streamed = json!({"messages": [user], "n": 128, "return_token_ids": true, "stream": true});
    refused(streamed, "return_token_ids");
    let echoed = json!({
        "messages": [user, said], "n": 128, "continue_final_message": true, "add_generation_prompt": false,
        "echo": true
    });
    refused(echoed, "echo");
    // A whole answer says it once.
    let request = json!({"messages": [user], "n": 128, "return_token_ids": true, "max_tokens": 1});
    assert_eq!(server.chat(&request).status, 200);
}

#[test]
fn usage_on_every_chunk() {
    let server = Fixture::saying(&[HELLO]);
    let chunks = server.chunks(
        "/v1/chat/completions",
        &json!({
            "messages": ask("Hi"), "stream": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true}
        }),
    );
    let counts: Vec<u64> =
        chunks.iter().map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert_eq!(counts[0], 0);
    assert!(counts.is_sorted());
    assert_eq!(*counts.last().unwrap(), tokens(HELLO).len() as u64);
}

#[test]
fn stop_strings() {
    let server = Fixture::saying(&[HELLO]);
    // Of what is hidden none is looked at.
    let mut request = json!({"messages": ask("Hi"), "stop": ["Say", "there"], "include_reasoning": false});
    let whole = server.chat(&request).ok();
    assert_eq!(whole["choices"][0]["message"]["content"], "Hello ");
    request["include_reasoning"] = true.into();
    let whole = server.chat(&request).ok();
    assert_eq!(whole["choices"][0]["stop_reason"], "Say");
    let whole = server.chat(&json!({"messages": ask("Hi"), "stop": "there"})).ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["content"], "Hello ");
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!("there")));
}

#[test]
fn fields_that_are_ignored() {
    let server = Fixture::saying(&[HELLO]);
    let request = json!({
        "messages": ask("Hi"), "model": "", "user": "u", "metadata": {"a": "b"}, "store": true,
        "service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k", "verbosity": "low",
        "prediction": {"type": "content"}, "modalities": ["text"], "response_format": {"type": "text"},
        "bad_words": [], "priority": 0, "unknown": {"deep": [1]}, "thinking_token_budget": -1, "top_k": -1,
        "seed": -1, "best_of": 1, "temperature": 1e0, "max_tokens": 1e2, "spaces_between_special_tokens": false,
        "session_id": "s", "add_special_tokens": true, "length_penalty": 1.0,
    });
    let whole = server.chat(&request).ok();
    assert_eq!(whole["choices"][0]["message"]["content"], "Hello there!");
    assert_eq!(whole["service_tier"], "default");
    let fields = json!({"session_id": "s", "user": "u"});
    for (path, field) in [("/v1/completions", "prompt"), ("/v1/responses", "input")] {
        let mut request = fields.clone();
        request[field] = "Hi".into();
        assert_eq!(server.post(path, &request).status, 200);
    }
    // Only what is not known at all is counted.
    let text = server.get("/metrics").body;
    let counted: Vec<&str> =
        text.lines().filter(|l| l.starts_with("gptoss_unknown_request_fields_total")).collect();
    let [one] = &counted[..] else { panic!("{counted:?}") };
    assert!(one.ends_with("field=\"unknown\"} 1"), "{one}");
}

#[test]
fn what_is_cached_is_counted() {
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HELLO)]);
    let cached = EngineOptions { prefix_caching: true, ..engine_options() };
    let server = Fixture::start(&options(), backend, cached);
    let request = json!({"messages": ask("Hi")});
    for expected in [0, 64] {
        let usage = &server.chat(&request).ok()["usage"];
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], expected);
    }
}

#[test]
fn names_of_requests() {
    let server = Fixture::saying(&[HELLO]);
    let body = json!({"messages": ask("Hi"), "request_id": "from-body"}).to_string();
    let headers = "content-type: Application/JSON; charset=utf-8\r\nx-request-id: from-header\r\n";
    let response = server.request("POST", "/v1/chat/completions", headers, body.as_bytes());
    assert_eq!(response.ok()["id"], "chatcmpl-from-header");
    assert_eq!(response.header("x-request-id"), Some("from-header"));
    let response = server.post("/v1/chat/completions", &serde_json::from_str(&body).unwrap());
    assert_eq!(response.ok()["id"], "chatcmpl-from-body");
    assert_eq!(response.header("x-request-id"), Some("from-body"));
    let bad = format!("x-request-id: {}\r\n", "x".repeat(129));
    let response = server.request("GET", "/v1/models", &bad, b"");
    assert_eq!(response.header("x-request-id").unwrap().len(), 32);
}

#[test]
fn defaults_of_the_model() {
    let mut options = options();
    options.defaults.temperature = 0.0;
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HELLO)]);
    let server = Fixture::start(&options, backend, engine_options());
    let (status, _, param, _) = server.chat(&json!({"messages": ask("Hi"), "n": 2})).error();
    assert_eq!((status, param.as_deref()), (400, Some("n")));
    assert_eq!(server.chat(&json!({"messages": ask("Hi"), "n": 2, "temperature": 1})).status, 200);
}
