//! Raw completions that go well.

use serde_json::{Value, json};

use crate::fixture::{Fixture, MODEL, harmony, tokens};

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn every_field() {
    let server = Fixture::saying(&[" there, friend<|return|>"]);
    let whole = server.complete(&json!({"prompt": "Hello"})).ok();
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
            "kv_transfer_params",
            "metrics"
        ]
    );
    assert!(whole["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!((&whole["object"], &whole["model"]), (&json!("text_completion"), &json!(MODEL)));
    assert_eq!(
        whole["choices"],
        json!([{
            "index": 0, "text": " there, friend", "logprobs": null, "finish_reason": "stop", "stop_reason": null,
            "token_ids": null, "prompt_logprobs": null, "prompt_token_ids": null
        }])
    );
    assert_eq!(whole["usage"]["prompt_tokens"], 1);
    assert_eq!(whole["usage"]["completion_tokens"], 4);
}

#[test]
fn prompts_in_every_form() {
    let server = Fixture::saying(&[" x<|return|>"]);
    let hello = tokens("Hello");
    for (prompt, prompt_ids) in [
        (json!("Hello"), vec![hello.clone()]),
        (json!(["Hello"]), vec![hello.clone()]),
        (json!(["Hello", "<|start|>user"]), vec![hello.clone(), tokens("<|start|>user")]),
        (json!(hello), vec![hello.clone()]),
        (json!([[24912, 2375], hello]), vec![vec![24912, 2375], hello.clone()]),
    ] {
        let whole = server.complete(&json!({"prompt": prompt, "return_token_ids": true, "n": 2})).ok();
        let choices = whole["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * prompt_ids.len());
        for (i, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], i);
            assert_eq!(choice["prompt_token_ids"], json!(prompt_ids[i / 2]), "choice = prompt · n + output");
            assert_eq!(choice["text"], " x");
        }
        let count: usize = prompt_ids.iter().map(Vec::len).sum();
        assert_eq!(whole["usage"]["prompt_tokens"], count);
    }
}

#[test]
fn sixteen_tokens_unless_asked() {
    let server = Fixture::saying(&["a a a a"]);
    for (max, expected) in [(Value::Null, 16), (json!(3), 3)] {
        let whole = server.complete(&json!({"prompt": "Hello", "max_tokens": max})).ok();
        assert_eq!(whole["usage"]["completion_tokens"], expected);
        assert_eq!(whole["choices"][0]["finish_reason"], "length");
    }
}

#[test]
fn special_tokens() {
    let server = Fixture::saying(&["<|channel|>final<|message|>Hi<|return|>"]);
    let text = |skip: bool| {
        let whole = server.complete(&json!({"prompt": "Hello", "skip_special_tokens": skip})).ok();
        whole["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(text(true), "finalHi");
    assert!(text(false).starts_with("<|channel|>final<|message|>Hi"));
}

#[test]
fn scoring_a_prompt() {
    let server = Fixture::saying(&[" there<|return|>"]);
    let prompt = tokens("Hello world, hello");
    let request = json!({"prompt": "Hello world, hello", "echo": true, "logprobs": 2, "max_tokens": 0});
    let whole = server.complete(&request).ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "Hello world, hello");
    assert_eq!(whole["usage"]["completion_tokens"], 0);
    assert_eq!(choice["finish_reason"], "length");
    let logprobs = &choice["logprobs"];
    assert_eq!(keys(logprobs), ["text_offset", "token_logprobs", "tokens", "top_logprobs"]);
    let harmony = harmony();
    let names: Vec<String> = prompt.iter().map(|&id| harmony.tokenizer().decode(&[id])).collect();
    assert_eq!(logprobs["tokens"], json!(names));
    assert_eq!(logprobs["text_offset"], json!([0, 5, 11, 12]));
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    for i in 1..prompt.len() {
        assert!(logprobs["token_logprobs"][i].as_f64().unwrap() < 0.0);
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        assert_eq!(top[&names[i]], logprobs["token_logprobs"][i]);
        assert_eq!(top.len(), 2);
    }

    // Echoed and continued, whole and streamed.
    let mut request = json!({"prompt": "Hello", "echo": true, "logprobs": 0, "max_tokens": 1});
    let whole = server.complete(&request).ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "Hello there");
    assert_eq!(choice["logprobs"]["tokens"], json!(["Hello", " there"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 5]));
    request["stream"] = true.into();
    let chunks = server.chunks("/v1/completions", &request);
    let texts: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, "Hello there");
    let names: Vec<Value> = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"][0]["logprobs"]["tokens"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(json!(names), choice["logprobs"]["tokens"]);
}

#[test]
fn log_probabilities_of_all_prompts_are_bounded_together() {
    let server = Fixture::saying(&["x"]);
    let mut request = json!({"prompt": ["a", "b", "c"], "n": 100, "max_tokens": 4000, "logprobs": 20});
    assert_eq!(server.complete(&request).error().2.as_deref(), Some("logprobs"));
    request["max_tokens"] = 1.into();
    assert_eq!(server.complete(&request).status, 200);
    // Each choice shows its prompt's, in both ways if both are asked for.
    let shown = |tokens: usize, more: &Value| {
        let mut request =
            json!({"prompt": vec![5; tokens], "n": 128, "max_tokens": 1, "logprobs": 20, "echo": true});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.complete(&request)
    };
    let both = json!({"prompt_logprobs": 20});
    assert_eq!(shown(7000, &json!({})).error().2.as_deref(), Some("prompt_logprobs"));
    assert_eq!(shown(3500, &both).error().2.as_deref(), Some("prompt_logprobs"));
    assert_eq!(shown(2, &both).status, 200);
}

#[test]
fn prompts_that_are_repeated_are_bounded_together() {
    let server = Fixture::saying(&["x"]);
    let ask = |prompt: Value, n: usize, field: &str| {
        server.complete(&json!({"prompt": prompt, "n": n, "max_tokens": 1, field: true}))
    };
    for (prompt, field) in [
        (json!(vec!["word ".repeat(200); 600]), "echo"),
        (json!(vec![vec![5; 1000]; 80]), "return_token_ids"),
    ] {
        let (status, _, param, message) = ask(prompt, 128, field).error();
        assert_eq!((status, param.as_deref()), (400, Some(field)));
        assert!(message.contains("at most 67108864 bytes"), "{message}");
        assert_eq!(ask(json!("word"), 128, field).status, 200);
    }
}

#[test]
fn prompt_logprobs() {
    let server = Fixture::saying(&[" x<|return|>"]);
    let whole = server.complete(&json!({"prompt": ["Hello world", "Hello"], "prompt_logprobs": 1})).ok();
    let first = &whole["choices"][0]["prompt_logprobs"];
    assert_eq!(first.as_array().unwrap().len(), 2);
    assert_eq!(first[0], Value::Null);
    assert_eq!(first[1][tokens(" world")[0].to_string()]["rank"], 1);
    assert_eq!(whole["choices"][1]["prompt_logprobs"], json!([null]));
}

#[test]
fn streamed() {
    let server = Fixture::saying(&[" one two three<|return|>"]);
    let request = json!({
        "prompt": ["Hello", "Bye"], "stream": true, "stream_options": {"include_usage": true}
    });
    let chunks = server.chunks("/v1/completions", &request);
    for index in 0..2 {
        let own: Vec<&Value> = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0])
            .filter(|choice| choice["index"] == index)
            .collect();
        let text: String = own.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(text, " one two three");
        let (last, before) = own.split_last().unwrap();
        assert_eq!(last["finish_reason"], "stop");
        assert!(before.iter().all(|choice| choice["finish_reason"].is_null()));
        assert_eq!(keys(last), ["index", "text", "logprobs", "finish_reason", "stop_reason"]);
    }
    let (last, before) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 8);
    assert!(last.get("system_fingerprint").is_some());
    assert!(before.iter().all(|chunk| chunk.get("usage").is_none() && chunk["object"] == "text_completion"));
}
