//! What operators and other tools ask: metrics, tokens, load, probes, and that everything else needs a key.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use engine::{Scripted, Step};
use serde_json::{Value, json};
use server::Options;

use crate::fixture::{Fixture, JSON, engine_options, keep_log, logged, message, options, tokens};
use crate::harmony_turns::tool;

const HELLO: &str = "<|channel|>analysis<|message|>Say hi.<|end|><|start|>assistant<|channel|>final<|message|>Hello there!<|return|>";

fn ask() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}]})
}

/// Samples by name and labels; checks the format on the way.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            if let Some((name, kind)) = comment.strip_prefix("TYPE ").and_then(|rest| rest.split_once(' ')) {
                assert!(kinds.insert(name, kind).is_none(), "{name} twice");
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let name = series.split('{').next().unwrap();
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| {
            name.strip_suffix(suffix).filter(|base| kinds.get(base) == Some(&"histogram"))
        });
        assert!(kinds.contains_key(base.unwrap_or(name)), "{name} has no type");
        assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "{series} twice");
    }
    samples
}

#[test]
fn the_log_has_what_an_answer_that_nobody_read_took() {
    keep_log();
    let line = |id: &str| logged(|line| line["request_id"] == *id && line["message"] == "request");
    for stream in [false, true] {
        let id = format!("given-up-{stream}");
        let (server, steps) = Fixture::stepwise(HELLO, &options());
        let body = json!({"messages": [{"role": "user", "content": "Hi"}], "stream": stream}).to_string();
        let headers = format!("{JSON}x-request-id: {id}\r\n");
        let mut client = server.connect();
        client.write_all(&message("POST", "/v1/chat/completions", &headers, body.as_bytes())).unwrap();
        (0..4).for_each(|_| steps.send(Step::Run).unwrap());
        // The first of them is told while a later one is computed.
        server.until(|stats| stats.generated_tokens == 4);
        if stream {
            client.read_exact(&mut [0; 12]).unwrap();
        }
        drop(client);
        let line = line(&id);
        assert_eq!(
            (&line["status"].is_null(), &line["finish_reason"]),
            (&!stream, &json!("abort")),
            "{line}"
        );
        assert!(line["prompt_tokens"].as_u64().unwrap() > 10, "{line}");
        assert!((1..=4).contains(&line["completion_tokens"].as_u64().unwrap()), "{line}");
    }
    // What is wrong with a request is said without a word of the client.
    let server = Fixture::saying(&[HELLO]);
    let bad =
        json!({"messages": [{"role": "user", "content": "Hi"}], "logit_bias": {"secret": "x"}}).to_string();
    let headers = format!("{JSON}x-request-id: bad\r\n");
    let answer = server.request("POST", "/v1/chat/completions", &headers, bad.as_bytes());
    assert_eq!(answer.error().2.as_deref(), Some("logit_bias.secret"));
    let line = line("bad");
    assert_eq!((&line["status"], &line["error_type"]), (&json!(400), &json!("BadRequestError")));
    assert_eq!(line["param"], "logit_bias");
}

#[test]
fn metrics_have_the_names_that_dashboards_know() {
    let server = Fixture::saying(&[HELLO]);
    let response = server.get("/metrics");
    assert_eq!(response.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let before = samples(&response.body);
    let own = |name: &str, labels: &str| {
        let comma = if labels.is_empty() { "" } else { "," };
        format!("{name}{{model_name=\"tiny\",engine=\"0\"{comma}{labels}}}")
    };
    for (name, labels) in [
        ("vllm:num_requests_running", ""),
        ("vllm:num_requests_waiting", ""),
        ("vllm:num_requests_waiting_by_reason", "reason=\"capacity\""),
        ("vllm:kv_cache_usage_perc", ""),
        ("vllm:gpu_cache_usage_perc", ""),
        ("vllm:prompt_tokens_total", ""),
        ("vllm:generation_tokens_total", ""),
        ("vllm:prompt_tokens_by_source_total", "source=\"local_compute\""),
        ("vllm:prefix_cache_queries_total", ""),
        ("vllm:prefix_cache_hits_total", ""),
        ("vllm:num_preemptions_total", ""),
        ("vllm:corrupted_requests_total", ""),
        ("vllm:request_success_total", "finished_reason=\"stop\""),
        ("vllm:time_to_first_token_seconds_count", ""),
        ("vllm:inter_token_latency_seconds_bucket", "le=\"0.001\""),
        ("vllm:time_per_output_token_seconds_count", ""),
        ("vllm:e2e_request_latency_seconds_bucket", "le=\"+Inf\""),
        ("vllm:request_queue_time_seconds_sum", ""),
        ("vllm:request_prompt_tokens_count", ""),
        ("vllm:request_params_n_bucket", "le=\"1\""),
    ] {
        assert_eq!(before.get(&own(name, labels)), Some(&0.0), "{name}");
    }
    let config = before.keys().find(|series| series.starts_with("vllm:cache_config_info")).unwrap();
    assert!(config.contains("block_size=\"16\"") && config.contains("num_gpu_blocks="), "{config}");

    let usage = server.chat(&ask()).ok()["usage"].clone();
    server.chat(&json!({"messages": ask()["messages"], "max_tokens": 4})).ok();
    server.chunks("/v1/chat/completions", &json!({"messages": ask()["messages"], "stream": true}));
    server.until(|stats| stats.running == 0);
    let after = samples(&server.get("/metrics").body);
    let value = |name: &str, labels: &str| after[&own(name, labels)];
    let generated = usage["completion_tokens"].as_f64().unwrap();
    assert_eq!(value("vllm:prompt_tokens_total", ""), 3.0 * usage["prompt_tokens"].as_f64().unwrap());
    assert_eq!(value("vllm:generation_tokens_total", ""), 2.0 * generated + 4.0);
    assert_eq!(value("vllm:request_success_total", "finished_reason=\"stop\""), 2.0);
    assert_eq!(value("vllm:request_success_total", "finished_reason=\"length\""), 1.0);
    assert_eq!(value("vllm:request_success_total", "finished_reason=\"abort\""), 0.0);
    assert_eq!(value("vllm:time_to_first_token_seconds_count", ""), 3.0);
    assert_eq!(value("vllm:inter_token_latency_seconds_count", ""), 2.0 * generated + 4.0 - 3.0);
    assert_eq!(value("vllm:request_generation_tokens_sum", ""), 2.0 * generated + 4.0);
    assert_eq!(value("vllm:request_params_max_tokens_bucket", "le=\"5\""), 1.0);
    // Whoever has had the whole answer has not gone away.
    assert_eq!(value("gptoss_client_disconnects_total", ""), 0.0);
    // A script has no weights; its cache is counted, though nobody reads it.
    assert_eq!(value("gptoss_device_memory_bytes", "kind=\"weights\""), 0.0);
    assert!(value("gptoss_device_memory_bytes", "kind=\"kv_cache\"") > 0.0);
    let http = "http_requests_total{method=\"POST\",status=\"2xx\",handler=\"/v1/chat/completions\"}";
    assert_eq!(after[http], 3.0);
    assert!(after.keys().all(|series| !series.contains("/metrics")));

    let response = server.request("GET", "/metrics", "accept: application/openmetrics-text\r\n", b"");
    assert!(response.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    assert!(response.body.ends_with("# EOF\n"));
    assert!(response.body.contains("# TYPE vllm:prompt_tokens counter\n"));
}

/// Name, type, names of labels and bounds of buckets of all series, as a dashboard relies on them. `metrics.txt` is vLLM's
/// list as far as it applies, and ours.
#[test]
fn metrics_are_those_of_the_list() {
    let server = Fixture::saying(&[HELLO]);
    server.handle.started("load", std::time::Duration::from_secs(1));
    server.chat(&json!({"messages": ask()["messages"], "some_field": 1})).ok();
    let text = server.get("/metrics").body;
    let mut list: Vec<String> = Vec::new();
    for line in text.lines() {
        if let Some(typed) = line.strip_prefix("# TYPE ") {
            list.push(typed.to_owned());
            continue;
        }
        let Some((series, _)) = line.rsplit_once(' ').filter(|_| !line.starts_with('#')) else { continue };
        let labels = series.split_once('{').map_or("", |(_, labels)| labels.trim_end_matches('}'));
        let entry = list.last_mut().unwrap();
        for label in labels.split("\",").filter(|label| !label.is_empty()) {
            let (name, value) = label.split_once("=\"").unwrap();
            let word = match name {
                "le" => value.trim_end_matches('"').to_owned(),
                name => format!("{{{name}}}"),
            };
            if !entry.split(' ').any(|known| known == word) {
                *entry += " ";
                *entry += &word;
            }
        }
    }
    let expected = include_str!("metrics.txt");
    for (found, expected) in list.iter().zip(expected.lines()) {
        assert_eq!(found, expected);
    }
    assert_eq!(list.len(), expected.lines().count(), "{list:#?}");
}

#[test]
fn clients_that_go_away_are_counted() {
    let (server, steps) = Fixture::stepwise("word ", &options());
    let mut request = ask();
    request["stream"] = true.into();
    steps.send(Step::Run).unwrap();
    let stream = server.stream("/v1/chat/completions", &request);
    drop(stream);
    server.until(|stats| {
        let _ = steps.send(Step::Run);
        stats.running == 0
    });
    let metrics = || server.get("/metrics").body;
    assert!(metrics().contains("finished_reason=\"abort\"} 1\n"), "{}", metrics());
    assert!(metrics().contains("gptoss_client_disconnects_total{model_name=\"tiny\",engine=\"0\"} 1\n"));
}

#[test]
fn repairs_are_counted_by_kind() {
    let server = Fixture::saying(&["No header at all.<|return|>"]);
    server.chat(&ask()).ok();
    let text = server.get("/metrics").body;
    assert!(
        text.contains("gptoss_harmony_repairs_total{") && text.contains("kind=\"missing_message\"} 1\n"),
        "{text}"
    );
}

#[test]
fn metrics_while_loading() {
    let server = Fixture::loading(&options());
    let found = samples(&server.get("/metrics").body);
    assert_eq!(found["vllm:num_requests_running{model_name=\"tiny\",engine=\"0\"}"], 0.0);
    assert_eq!(server.get("/load").ok(), json!({"server_load": 0}));
    for path in ["/tokenize", "/detokenize", "/invocations"] {
        assert_eq!(server.post(path, &json!({"prompt": "x", "tokens": [1]})).status, 503, "{path}");
    }
    assert_eq!(server.get("/api/tags").status, 503);
}

#[test]
fn tokens_and_back() {
    let server = Fixture::saying(&[HELLO]);
    for path in ["/tokenize", "/v1/tokenize"] {
        let found = server.post(path, &json!({"prompt": "hello world"})).ok();
        let expected =
            json!({"count": 2, "max_model_len": 8192, "tokens": [24912, 2375], "token_strs": null});
        assert_eq!(found, expected);
    }
    // Halves of a character are shown as bytes, markers in a raw prompt are markers.
    let found = server
        .post("/tokenize", &json!({"prompt": "<|start|>𒐫", "return_token_strs": true, "model": "tiny"}))
        .ok();
    let names: Vec<&str> =
        found["token_strs"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    assert_eq!(names[0], "<|start|>");
    assert!(names[1].starts_with("<0xF0>"), "{names:?}");

    let ids = json!([200_006, 1428, 200_008, 12194]);
    for path in ["/detokenize", "/v1/detokenize"] {
        let found = server.post(path, &json!({"tokens": ids})).ok();
        assert_eq!(found, json!({"prompt": "<|start|>user<|message|>Hi"}));
    }

    // Exactly what the chat endpoint feeds.
    let mut request = ask();
    request["tools"] = json!([tool("f")]);
    request["reasoning_effort"] = "none".into();
    let tokenized = server.post("/tokenize", &request).ok();
    request["return_token_ids"] = true.into();
    assert_eq!(tokenized["tokens"], server.chat(&request).ok()["prompt_token_ids"]);

    for (path, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": 1}), "prompt"),
        ("/tokenize", json!({"messages": []}), "messages"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [-1]}), "tokens"),
        ("/detokenize", json!({"tokens": [1, 999_999]}), "tokens"),
        ("/detokenize", json!({"tokens": vec![1; 8193]}), "tokens"),
    ] {
        let (status, _, found, message) = server.post(path, &body).error();
        assert_eq!((status, found.as_deref()), (400, Some(param)), "{body}: {message}");
    }
    assert_eq!(server.post("/tokenize", &json!({"prompt": "x", "model": "nope"})).status, 404);
    assert_eq!(server.request("POST", "/tokenize", "", b"{}").status, 415);
}

/// In a process of its own, since only the most memory that a process ever had is known.
#[test]
#[cfg(target_os = "linux")]
fn names_of_tokens_are_not_held_all_at_a_time() {
    const CHILD: &str = "NIBBLE_TEST_CHILD";
    if std::env::var_os(CHILD).is_none() {
        let test = "operations::names_of_tokens_are_not_held_all_at_a_time";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let output = child.args(["--exact", test, "--nocapture"]).env(CHILD, "1").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let most = || -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HELLO)]);
    let (max_model_len, kv_cache_bytes) = (Some(131_072), 16 << 30);
    let long = engine::EngineOptions { max_model_len, kv_cache_bytes, ..engine_options() };
    let server = Fixture::start(&options(), backend, long);
    // Two tokens of four bytes.
    let prompt = "‹|".repeat(1 << 20);
    let before = most();
    let found = server.post("/tokenize", &json!({"prompt": prompt, "return_token_strs": true}));
    assert_eq!(found.status, 200);
    assert!(found.body.ends_with(r#""‹","|"]}"#));
    let per_byte = (most() - before) / prompt.len();
    assert!(per_byte < 40, "{per_byte} times the text");
}

#[test]
fn what_tools_for_ollama_ask() {
    let server = Fixture::saying(&[HELLO]);
    assert!(server.get("/api/version").ok()["version"].is_string());
    let tags = server.get("/api/tags").ok();
    assert_eq!(
        (&tags["models"][0]["name"], &tags["models"][1]["model"]),
        (&json!("tiny"), &json!("org/alias"))
    );
    let shown = server.post("/api/show", &json!({"model": "tiny:latest"})).ok();
    assert_eq!(shown["model_info"]["gptoss.context_length"], 8192);
    let pulled = server.post("/api/pull", &json!({"name": "tiny"}));
    assert_eq!((pulled.status, pulled.body.as_str()), (200, "{\"status\":\"success\"}\n"));
    assert_eq!(server.post("/api/pull", &json!({"model": "llama"})).status, 404);
}

#[test]
fn invocations_are_told_apart_by_their_shape() {
    let server = Fixture::saying(&[HELLO]);
    assert_eq!(server.post("/invocations", &ask()).ok()["object"], "chat.completion");
    assert_eq!(server.post("/invocations", &json!({"prompt": "Hi"})).ok()["object"], "text_completion");
    assert_eq!(server.post("/invocations", &json!({"input": "Hi"})).ok()["object"], "response");
    assert_eq!(server.post("/invocations", &json!({})).status, 400);
}

#[test]
fn the_page_asks_nobody_else() {
    let server = Fixture::loading(&options());
    let page = server.get("/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'"));
    for elsewhere in ["http://", "https://", "src=", "@import", "innerHTML", "eval("] {
        assert!(!page.body.contains(elsewhere), "{elsewhere}");
    }
}

#[test]
fn every_route_needs_a_key_but_those_for_probes() {
    let options = Options { api_keys: vec!["secret".to_owned()], ..options() };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HELLO)]);
    let server = Fixture::start(&options, backend, engine_options());
    let guarded = [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/resp_x"),
        ("DELETE", "/v1/responses/resp_x"),
        ("POST", "/v1/responses/resp_x/cancel"),
        ("GET", "/v1/responses/resp_x/input_items"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/v1/tokenize"),
        ("POST", "/v1/detokenize"),
        ("POST", "/invocations"),
        ("GET", "/api/version"),
        ("GET", "/api/tags"),
        ("POST", "/api/show"),
        ("POST", "/api/pull"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/audio/speech"),
        ("POST", "/v1/images/generations"),
        ("POST", "/score"),
        ("POST", "/rerank"),
        ("POST", "/pooling"),
        ("GET", "/nothing"),
        ("GET", "/metrics/"),
        ("GET", "//metrics"),
        ("GET", "/v1/../metrics"),
    ];
    for (method, path) in guarded {
        let response = server.request(method, path, JSON, b"{}");
        assert_eq!(response.status, 401, "{method} {path}");
        let with_key = format!("{JSON}authorization: Bearer secret\r\n");
        assert_ne!(server.request(method, path, &with_key, b"{}").status, 401, "{method} {path}");
    }
    for path in ["/", "/health", "/live", "/ready", "/ping", "/version", "/load", "/metrics"] {
        let response = server.get(path);
        assert_eq!(response.status, 200, "{path}");
        assert!(!response.body.contains("secret"));
    }
}
