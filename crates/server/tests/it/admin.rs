//! What those who run the server do, and what they may set for all answers.

use std::time::Duration;

use engine::{Engine, EngineOptions, Scripted, Step};
use serde_json::{Value, json};
use server::{Fingerprint, Options};

use crate::fixture::{Fixture, JSON, engine_options, harmony, message, options, parse_data, tokens};

const HI: &str = "<|channel|>final<|message|>Hi<|return|>";
const CHAT: &str = "/v1/chat/completions";

fn hi() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}]})
}

fn serving(options: &Options) -> Fixture {
    Fixture::start(options, Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]), engine_options())
}

fn keyed() -> Options {
    Options {
        api_keys: vec!["key".to_owned()],
        admin_keys: vec!["admin".to_owned()],
        metrics_keys: vec!["metrics".to_owned()],
        ..options()
    }
}

fn bearer(key: &str) -> String {
    format!("{JSON}authorization: Bearer {key}\r\n")
}

#[test]
fn an_admin_needs_the_admins_key() {
    let server = serving(&keyed());
    let info = |headers: &str| server.request("GET", "/server_info", headers, b"");
    assert_eq!((info("").status, info(&bearer("key")).status), (401, 401));
    let found = info(&bearer("admin")).ok();
    assert_eq!((&found["device"], &found["api_keys"]), (&json!("scripted (no model)"), &json!(true)));
    assert!(found["memory"]["full_blocks"].as_u64().unwrap() > 0);
    let text = found.to_string();
    assert!(!text.contains("\"key\"") && !text.contains("\"admin\"") && !text.contains("private"), "{text}");
    assert_eq!(server.request("POST", "/reset_prefix_cache", &bearer("admin"), b"").status, 200);
    // An admin's key opens nothing else, and nobody sleeps unless that was asked for.
    assert_eq!(server.request("GET", "/v1/models", &bearer("admin"), b"").status, 401);
    assert_eq!(server.request("POST", "/sleep", &bearer("key"), b"").status, 404);
    assert_eq!(server.request("POST", "/sleep", &bearer("admin"), b"").status, 404);
    assert_eq!(server.request("POST", "/sleep", &bearer("other"), b"").status, 401);

    let metrics = |headers: &str| server.request("GET", "/metrics", headers, b"").status;
    assert_eq!((metrics(""), metrics(&bearer("key")), metrics(&bearer("metrics"))), (401, 401, 200));

    let open = serving(&options());
    assert_eq!(open.get("/server_info").status, 404);
    let development = serving(&Options { dev_mode: true, ..options() });
    assert_eq!(development.get("/server_info").status, 200);
    let development = serving(&Options { dev_mode: true, api_keys: vec!["key".to_owned()], ..options() });
    assert_eq!(development.get("/server_info").status, 401);
    assert_eq!(development.request("GET", "/server_info", &bearer("key"), b"").status, 200);
}

#[test]
fn requests_are_ended_by_name() {
    let options = Options { dev_mode: true, ..options() };
    let (server, steps) = Fixture::stepwise("word ", &options);
    let mut request = hi();
    request["stream"] = true.into();
    let open = |id: &str| {
        use std::io::Write;
        let mut connection = server.connect();
        let headers = format!("{JSON}x-request-id: {id}\r\n");
        let before = server.stats();
        connection.write_all(&message("POST", CHAT, &headers, request.to_string().as_bytes())).unwrap();
        server.until(|stats| stats.running + stats.waiting > before.running + before.waiting);
        // One may go to a step that began without this request.
        for _ in 0..4 {
            steps.send(Step::Run).unwrap();
        }
        crate::fixture::Stream::new(connection)
    };
    let abort = |ids: Value| server.post("/abort_requests", &json!({"request_ids": ids})).status;
    // What does not run yet is not meant.
    assert_eq!(abort(json!(["first", "second"])), 200);
    let mut by_request = open("first");
    let mut by_answer = open("second");
    for stream in [&mut by_request, &mut by_answer] {
        assert_eq!(stream.status, 200);
        assert!(parse_data(&stream.next().unwrap())["error"].is_null());
    }
    assert_eq!(abort(json!(["nobody", "first"])), 200);
    assert_eq!(abort(json!(["chatcmpl-second"])), 200);
    for stream in [&mut by_request, &mut by_answer] {
        let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
        let [.., error, done] = &events[..] else { panic!("{events:?}") };
        assert_eq!(parse_data(error)["error"]["type"], "RequestAbortedError");
        assert_eq!(done, "data: [DONE]");
    }
    drop(steps);
    server.until(|stats| stats.running == 0 && stats.full_blocks_used == 0);
    for (body, param) in [(json!({}), "request_ids"), (json!({"request_ids": [1]}), "request_ids.0")] {
        assert_eq!(server.post("/abort_requests", &body).error().2.as_deref(), Some(param));
    }
}

#[test]
fn sleep_frees_the_engine_and_waking_loads_it_again() {
    let options = Options { dev_mode: true, sleep_mode: true, ..options() };
    let mut server = serving(&options);
    let post = |server: &Fixture, path: &str| server.request("POST", path, "", b"");
    assert_eq!(post(&server, "/sleep").error().0, 400, "without a loader");
    server.handle.reload_with(Box::new(|handle, _| {
        handle.progress(1, 2);
        let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]);
        let engine = Engine::start(Box::new(backend), harmony(), engine_options());
        engine.map(|engine| vec![engine]).map_err(|error| error.to_string())
    }));
    let engine = server.engine.take().unwrap();
    for (query, state) in [("", "weights_offloaded"), ("?level=2", "discard_all")] {
        assert_eq!(server.get("/is_sleeping").ok(), json!({"is_sleeping": false}));
        assert_eq!(post(&server, &format!("/sleep{query}")).status, 200);
        assert_eq!(server.get("/is_sleeping").ok(), json!({"is_sleeping": true}));
        let asleep = server.chat(&hi());
        assert_eq!((asleep.error().0, asleep.header("retry-after")), (503, Some("1")));
        assert_eq!((server.get("/ready").status, server.get("/health").status), (503, 200));
        let metrics = server.get("/metrics").body;
        assert!(metrics.contains(&format!("sleep_state=\"{state}\"}} 1\n")), "{metrics}");
        assert_eq!(post(&server, "/wake_up?tags=weights&tags=kv_cache").status, 200);
        assert_eq!(server.chat(&hi()).status, 200);
    }
    engine.wait();
    assert_eq!(post(&server, "/sleep?level=9").error().2.as_deref(), Some("level"));
    assert_eq!(post(&server, "/sleep?level=x").error().0, 400);
}

#[test]
fn where_prompts_came_from_is_counted_across_engines() {
    let options = Options { dev_mode: true, sleep_mode: true, ..options() };
    let caching = || EngineOptions { prefix_caching: true, ..engine_options() };
    let backend = || Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]);
    let mut server = Fixture::start(&options, backend(), caching());
    server.handle.reload_with(Box::new(move |_, _| {
        let engine = Engine::start(Box::new(backend()), harmony(), caching());
        engine.map(|engine| vec![engine]).map_err(|error| error.to_string())
    }));
    // Else it would not be gone.
    server.engine = None;
    let (mut prompt, mut cached) = (0, 0);
    let mut ask = |times: usize| {
        for _ in 0..times {
            let usage = server.chat(&hi()).ok()["usage"].take();
            prompt += usage["prompt_tokens"].as_u64().unwrap();
            cached += usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        }
        let metrics = server.get("/metrics").body;
        for (name, labels, value) in [
            ("prompt_tokens", "", prompt),
            ("prompt_tokens_by_source", ",source=\"local_compute\"", prompt - cached),
            ("prompt_tokens_by_source", ",source=\"local_cache_hit\"", cached),
        ] {
            let line = format!("vllm:{name}_total{{model_name=\"tiny\",engine=\"0\"{labels}}} {value}\n");
            assert!(metrics.contains(&line), "{line}: {metrics}");
        }
        assert!(cached > 0);
    };
    ask(3);
    assert_eq!(server.request("POST", "/sleep", "", b"").status, 200);
    assert_eq!(server.request("POST", "/wake_up", "", b"").status, 200);
    ask(1);
}

#[test]
fn who_wakes_the_server_need_not_wait() {
    use std::io::Write;
    // The next connection is accepted when the one before is gone.
    let options = Options { dev_mode: true, sleep_mode: true, max_connections: 1, ..options() };
    let mut server = serving(&options);
    let (entered, entries) = std::sync::mpsc::channel();
    let (go, going) = std::sync::mpsc::channel::<()>();
    let going = std::sync::Mutex::new(going);
    server.handle.reload_with(Box::new(move |_, _| {
        entered.send(()).unwrap();
        going.lock().unwrap().recv().unwrap();
        let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]);
        let engine = Engine::start(Box::new(backend), harmony(), engine_options());
        engine.map(|engine| vec![engine]).map_err(|error| error.to_string())
    }));
    server.engine = None;
    assert_eq!(server.request("POST", "/sleep", "", b"").status, 200);
    let mut connection = server.connect();
    connection.write_all(&message("POST", "/wake_up", "", b"")).unwrap();
    entries.recv().unwrap();
    drop(connection);
    // It is as with the first loading.
    let again = server.request("POST", "/wake_up", "", b"");
    assert_eq!((again.error().0, again.header("retry-after")), (503, Some("3")));
    go.send(()).unwrap();
    while server.get("/ready").status != 200 {
        std::thread::yield_now();
    }
    assert_eq!(server.chat(&hi()).status, 200);
}

#[test]
fn sleep_waits_for_what_runs() {
    let options = Options { dev_mode: true, sleep_mode: true, ..options() };
    let (mut server, steps) = Fixture::stepwise(HI, &options);
    server.handle.reload_with(Box::new(|_, _| Err("no".to_owned())));
    server.engine = None;
    let mut request = hi();
    request["stream"] = true.into();
    steps.send(Step::Run).unwrap();
    let mut stream = server.stream(CHAT, &request);
    std::thread::scope(|scope| {
        let asleep = scope.spawn(|| server.request("POST", "/sleep", "", b"").status);
        while server.get("/ready").status != 503 {
            std::thread::yield_now();
        }
        drop(steps);
        let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
        assert!(events.iter().any(|event| event.contains("\"finish_reason\":\"stop\"")), "{events:?}");
        assert_eq!(asleep.join().unwrap(), 200);
    });
    // A loader that fails leaves it asleep, and says nothing of why.
    let error = server.request("POST", "/wake_up", "", b"").error();
    assert_eq!((error.0, error.3.starts_with("Internal server error")), (500, true));
    assert_eq!(server.get("/is_sleeping").ok(), json!({"is_sleeping": true}));
}

#[test]
fn there_are_never_two_models() {
    let options = Options { dev_mode: true, sleep_mode: true, ..options() };
    let (mut server, steps) = Fixture::stepwise(HI, &options);
    let old = std::sync::Mutex::new(steps.clone());
    server.handle.reload_with(Box::new(move |_, _| {
        if old.lock().unwrap().send(Step::Run).is_ok() {
            return Err("the old backend is there".to_owned());
        }
        let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]);
        let engine = Engine::start(Box::new(backend), harmony(), engine_options());
        engine.map(|engine| vec![engine]).map_err(|error| error.to_string())
    }));
    server.engine = None;
    let mut request = hi();
    request["stream"] = true.into();
    steps.send(Step::Run).unwrap();
    let mut stream = server.stream(CHAT, &request);
    let server = &server;
    std::thread::scope(|scope| {
        let post = |path: &'static str| scope.spawn(move || server.request("POST", path, "", b"").status);
        let asleep = post("/sleep");
        while server.get("/ready").status != 503 {
            std::thread::yield_now();
        }
        let awake = post("/wake_up");
        for _ in 0..10 {
            assert_eq!(server.get("/is_sleeping").ok(), json!({"is_sleeping": true}));
        }
        // More than it takes: the backend goes with what is left.
        for _ in 0..16 {
            let _ = steps.send(Step::Run);
        }
        let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
        assert!(events.iter().any(|event| event.contains("\"finish_reason\":\"stop\"")), "{events:?}");
        assert_eq!((asleep.join().unwrap(), awake.join().unwrap()), (200, 200));
    });
    assert_eq!(server.chat(&hi()).status, 200);
}

#[test]
fn a_profile_counts_what_was_done() {
    let server = serving(&Options { dev_mode: true, ..options() });
    let post = |path: &str| server.request("POST", path, "", b"");
    assert_eq!(post("/stop_profile").error().0, 400);
    assert_eq!(post("/start_profile").status, 200);
    let generated = server.chat(&hi()).ok()["usage"]["completion_tokens"].clone();
    server.until(|stats| stats.running == 0);
    let profile = post("/stop_profile").ok();
    assert_eq!(profile["generated_tokens"], generated);
    assert!(profile["steps"].as_u64().unwrap() > 0, "{profile}");
}

#[test]
fn a_key_has_its_minute() {
    let options = Options {
        api_keys: vec!["one".to_owned(), "two".to_owned()],
        rate_limit_requests: Some(2),
        ..options()
    };
    let server = serving(&options);
    let ask =
        |key: &str, body: &Value| server.request("POST", CHAT, &bearer(key), body.to_string().as_bytes());
    // What is refused does not count.
    assert_eq!(ask("one", &json!({})).status, 400);
    assert_eq!((ask("one", &hi()).status, ask("one", &hi()).status), (200, 200));
    let refused = ask("one", &hi());
    let (status, kind, param, _) = refused.error();
    assert_eq!((status, kind.as_str(), param), (429, "RateLimitError", None));
    let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=31).contains(&seconds), "{seconds}");
    assert_eq!(ask("two", &hi()).status, 200);
    assert!(server.get("/metrics").body.contains("reason=\"rate_limited\"} 1\n"));
    // Tokens are counted with the answer.
    let options = Options { rate_limit_tokens: Some(100), rate_limit_requests: None, ..options };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]);
    let server = Fixture::start(&options, backend, engine_options());
    let ask = |tokens: usize| {
        let body = json!({"prompt": vec![1; 20], "max_tokens": tokens, "ignore_eos": true});
        server.request("POST", "/v1/completions", &bearer("one"), body.to_string().as_bytes()).status
    };
    assert_eq!(ask(90), 200);
    server.until(|stats| stats.running == 0);
    // The engine tells the account when it forgets the request, which is a moment after the answer.
    while ask(1) != 429 {}
}

#[test]
fn what_the_server_does_not_take_does_not_count() {
    let options = Options { rate_limit_requests: Some(2), ..options() };
    let (steps, control) = std::sync::mpsc::channel();
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]).controlled_by(control);
    let engine_options = EngineOptions { max_queued_requests: 1, ..engine_options() };
    let server = Fixture::start(&options, backend, engine_options);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| server.chat(&hi()).status);
        server.until(|stats| stats.step_started.is_some());
        assert_eq!([server.chat(&hi()).status, server.chat(&hi()).status], [503; 2]);
        drop(steps);
        assert_eq!(first.join().unwrap(), 200);
    });
    // The engine's queue is free a moment after the answer.
    let mut second = server.chat(&hi()).status;
    while second == 503 {
        second = server.chat(&hi()).status;
    }
    assert_eq!(second, 200);
}

#[test]
fn a_request_has_its_time() {
    let options = Options { request_timeout: Some(Duration::from_millis(30)), ..options() };
    let (server, steps) = Fixture::stepwise(HI, &options);
    let (status, kind, param, _) = server.chat(&hi()).error();
    assert_eq!((status, kind.as_str(), param), (504, "TimeoutError", None));
    let mut request = hi();
    request["stream"] = true.into();
    assert_eq!(server.chat(&request).error().0, 504);
    // After the first token it is told in-band. The step that hung belongs to requests that are gone.
    for _ in 0..3 {
        steps.send(Step::Run).unwrap();
    }
    server.until(|stats| stats.running == 0);
    let mut stream = loop {
        // One for a step that an earlier try has left behind, one for the prompt; with neither the answer would end.
        for _ in 0..2 {
            steps.send(Step::Run).unwrap();
        }
        let stream = server.stream(CHAT, &request);
        if stream.status == 200 {
            break stream;
        }
    };
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    let [.., error, done] = &events[..] else { panic!("{events:?}") };
    assert_eq!(parse_data(error)["error"]["type"], "TimeoutError");
    assert_eq!(done, "data: [DONE]");
    drop(steps);
    server.until(|stats| stats.running == 0);
}

#[test]
fn what_answers_say_of_themselves() {
    let server = serving(&Options {
        request_metrics: true,
        force_include_usage: true,
        fingerprint: Fingerprint::Custom("build 7".to_owned()),
        model_owner: "me".to_owned(),
        ..options()
    });
    assert_eq!(server.get("/v1/models").ok()["data"][0]["owned_by"], "me");
    let response = server.chat(&hi());
    let timing = response.header("server-timing").unwrap();
    assert!(timing.starts_with("queue;dur=") && timing.contains(", prefill;dur="), "{timing}");
    let whole = response.ok();
    assert_eq!(whole["system_fingerprint"], "build 7");
    for name in ["time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms"] {
        assert!(whole["metrics"][name].as_f64().unwrap() >= 0.0, "{name}: {whole}");
    }
    assert_eq!(server.chat(&json!({"messages": hi()["messages"], "n": 2})).ok()["metrics"], Value::Null);
    let chunks = server.chunks(CHAT, &json!({"messages": hi()["messages"], "stream": true}));
    assert!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"].is_u64()), "{chunks:?}");
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!((&last["choices"], &last["system_fingerprint"]), (&json!([]), &json!("build 7")));
    assert!(last["metrics"]["tokens_per_second"].is_number(), "{last}");
    assert!(others.iter().all(|chunk| chunk.get("metrics").is_none()));

    let server = serving(&Options { fingerprint: Fingerprint::None, ..options() });
    let whole = server.complete(&json!({"prompt": "a"})).ok();
    assert_eq!((&whole["system_fingerprint"], &whole["metrics"]), (&Value::Null, &Value::Null));
    let server = serving(&Options { fingerprint: Fingerprint::Hash, ..options() });
    let hash =
        server.complete(&json!({"prompt": "a"})).ok()["system_fingerprint"].as_str().unwrap().to_owned();
    assert!(hash.len() == 8 && hash.bytes().all(|b| b.is_ascii_hexdigit()), "{hash}");
}

#[test]
fn rendering_runs_nothing() {
    let (server, _steps) = Fixture::stepwise(HI, &options());
    let mut request = hi();
    request["temperature"] = 0.5.into();
    let rendered = server.post("/v1/chat/completions/render", &request).ok();
    assert_eq!(rendered["model"], "tiny");
    assert!(rendered["request_id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(rendered["sampling_params"]["temperature"], 0.5);
    assert_eq!(rendered["token_ids"], server.post("/tokenize", &request).ok()["tokens"]);
    let one = server.post("/v1/completions/render", &json!({"prompt": "hello world"})).ok();
    assert_eq!(
        (&one["token_ids"], &one["sampling_params"]["max_tokens"]),
        (&json!([24912, 2375]), &json!(16))
    );
    let two = server.post("/v1/completions/render", &json!({"prompt": [[1], [2, 3]]})).ok();
    assert_eq!((&two[0]["token_ids"], &two[1]["token_ids"]), (&json!([1]), &json!([2, 3])));
    assert_eq!(server.post("/v1/completions/render", &json!({})).error().2.as_deref(), Some("prompt"));
    // What is refused is what would be.
    for prompt in [json!("word ".repeat(9000)), json!([vec![5; 8192]])] {
        let request = json!({"prompt": prompt});
        let error = server.post("/v1/completions/render", &request).error();
        assert_eq!(error, server.complete(&request).error());
        assert_eq!(error.2.as_deref(), Some("input_tokens"), "{}", error.3);
    }
    let last = json!({"prompt": [vec![5; 8192]], "max_tokens": 0, "echo": true});
    assert_eq!(server.post("/v1/completions/render", &last).status, 200);
    // A small body could ask for gigabytes.
    let ids: Vec<u32> = (0..200_000).collect();
    let many = json!({"prompt": vec![[5]; 1000], "allowed_token_ids": ids});
    let error = server.post("/v1/completions/render", &many).error();
    assert_eq!((error.0, error.2.as_deref()), (400, Some("prompt")), "{}", error.3);
    let few =
        server.post("/v1/completions/render", &json!({"prompt": [[5], [6]], "allowed_token_ids": ids})).ok();
    assert_eq!(few[1]["sampling_params"]["allowed_token_ids"].as_array().unwrap().len(), ids.len());
    assert_eq!(server.stats().steps, 0);
}

#[test]
fn loading_says_how_far_it_is() {
    let server = Fixture::loading(&options());
    for (done, total, percent) in [(0, 0, 0), (1, 3, 33), (3, 3, 100)] {
        server.handle.progress(done, total);
        let (status, _, _, message) = server.get("/ready").error();
        assert_eq!(status, 503);
        assert_eq!(message, format!("The model is being loaded ({percent} % done). Please retry."));
    }
    server.handle.started("load", Duration::from_millis(1500));
    assert!(
        server
            .get("/metrics")
            .body
            .contains("gptoss_startup_seconds{model_name=\"tiny\",engine=\"0\",phase=\"load\"} 1.5\n")
    );
}

#[test]
fn errors_in_openais_words() {
    let options =
        Options { error_style: server::ErrorStyle::OpenAi, api_keys: vec!["key".to_owned()], ..options() };
    let (server, steps) = Fixture::stepwise(HI, &options);
    let ask = |path: &str, key: &str, body: Value| {
        let response = server.request("POST", path, &bearer(key), body.to_string().as_bytes());
        (response.status, response.json()["error"].clone())
    };
    for (path, key, body, status, code) in [
        (CHAT, "key", json!({"messages": hi()["messages"], "model": "nope"}), 404, json!("model_not_found")),
        (CHAT, "key", json!({"messages": []}), 400, json!("invalid_value")),
        ("/v1/completions", "key", json!({"prompt": vec![1; 9000]}), 400, json!("context_length_exceeded")),
        (CHAT, "wrong", hi(), 401, json!("invalid_api_key")),
        ("/v1/nothing", "key", hi(), 404, json!("unknown_url")),
        ("/v1/embeddings", "key", hi(), 501, Value::Null),
    ] {
        let (found, error) = ask(path, key, body);
        assert_eq!((found, &error["code"]), (status, &code), "{error}");
        let kind = if status == 501 { "server_error" } else { "invalid_request_error" };
        assert_eq!(error["type"], kind);
    }
    // In-band, too.
    for _ in 0..2 {
        steps.send(Step::Run).unwrap();
    }
    // A failed step is tried again once.
    for _ in 0..2 {
        steps.send(Step::Fail("no".to_owned())).unwrap();
    }
    let body = json!({"messages": hi()["messages"], "stream": true}).to_string();
    let mut stream = server.connect();
    std::io::Write::write_all(&mut stream, &message("POST", CHAT, &bearer("key"), body.as_bytes())).unwrap();
    let mut stream = crate::fixture::Stream::new(stream);
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    let [.., error, _] = &events[..] else { panic!("{events:?}") };
    assert_eq!(parse_data(error)["error"]["type"], "server_error");
}
