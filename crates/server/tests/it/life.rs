//! The server's life: loading, health, models, failing, draining, going away.

use std::time::Duration;

use engine::{EngineOptions, Scripted, Step};
use serde_json::{Value, json};
use server::{Error, Options, Server};

use crate::fixture::{Fixture, MODEL, engine_options, harmony, options, parse_data, tokens};

const HI: &str = "<|channel|>final<|message|>Hi<|return|>";
const UNAVAILABLE: &str = "ServiceUnavailableError";

fn hi() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}]})
}

#[test]
fn while_the_model_is_loaded() {
    let mut server = Fixture::loading(&options());
    for path in ["/v1/models", "/v1/models/tiny", "/health", "/ready", "/ping"] {
        let response = server.get(path);
        let (status, kind, ..) = response.error();
        assert_eq!((status, kind.as_str()), (503, UNAVAILABLE), "{path}");
        assert_eq!(response.header("retry-after"), Some("3"));
    }
    let response = server.chat(&hi());
    assert_eq!((response.error().0, response.header("retry-after")), (503, Some("3")));
    assert_eq!(server.get("/live").status, 200);
    assert_eq!(server.get("/version").json()["version"], env!("CARGO_PKG_VERSION"));

    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]);
    let engine = engine::Engine::start(Box::new(backend), harmony(), engine_options()).unwrap();
    server.handle.ready(vec![engine.clone()]);
    server.engine = Some(engine);
    for path in ["/health", "/ready", "/ping"] {
        let response = server.get(path);
        assert_eq!((response.status, response.body.as_str()), (200, ""), "{path}");
    }
    assert_eq!(server.post("/ping", &json!({})).status, 200);
    assert_eq!(server.chat(&hi()).status, 200);
}

#[test]
fn models() {
    let server = Fixture::saying(&[HI]);
    let list = server.get("/v1/models").ok();
    let created = list["data"][0]["created"].clone();
    assert!(created.is_u64());
    let entry = |id: &str| {
        json!({
            "id": id, "object": "model", "created": created, "owned_by": "vllm", "root": "tiny-gpt-oss", "parent": null,
            "max_model_len": 8192, "permission": []
        })
    };
    assert_eq!(list, json!({"object": "list", "data": [entry(MODEL), entry("org/alias")]}));
    assert_eq!(server.get("/v1/models/tiny").ok(), entry(MODEL));
    assert_eq!(server.get("/v1/models/org/alias").ok(), entry("org/alias"));
    assert_eq!(server.get("/v1/models/org%2Falias").ok(), entry("org/alias"));
}

#[test]
fn a_port_in_use() {
    let server = Fixture::loading(&options());
    let port = server.address.port();
    let error = server.runtime.block_on(Server::bind(&Options { port, ..options() })).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }));
    assert_eq!(error.to_string(), format!("port {port} of 127.0.0.1 is in use"));
    let bad = Options { host: "256.0.0.1".to_owned(), ..options() };
    assert!(matches!(server.runtime.block_on(Server::bind(&bad)).unwrap_err(), Error::Bind { .. }));
}

#[test]
fn a_full_queue() {
    let (steps, control) = std::sync::mpsc::channel();
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]).controlled_by(control);
    let server =
        Fixture::start(&options(), backend, EngineOptions { max_queued_requests: 2, ..engine_options() });
    let two = json!({"prompt": ["a", "b"]});
    std::thread::scope(|scope| {
        let first = scope.spawn(|| server.complete(&two));
        server.until(|stats| stats.running + stats.waiting == 2);
        let response = server.chat(&hi());
        let (status, kind, param, message) = response.error();
        assert_eq!((status, kind.as_str(), param), (503, UNAVAILABLE, None));
        assert_eq!(message, "The server is busy. Please retry.");
        assert!(response.header("retry-after").is_some());
        // Of several prompts either all are taken or none.
        assert_eq!(server.complete(&two).status, 503);
        // More than ever find room can be told so, full or not.
        let (status, kind, param, message) = server.complete(&json!({"prompt": ["a", "b", "c"]})).error();
        assert_eq!((status, kind.as_str(), param.as_deref()), (400, "BadRequestError", Some("prompt")));
        assert_eq!(
            message,
            "prompt must have at most 2 prompts in all, as many as may wait at a time, got 3."
        );
        drop(steps);
        assert_eq!(first.join().unwrap().status, 200);
    });
    // What was never taken was not given up.
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("finished_reason=\"abort\"} 0\n"), "{metrics}");
}

#[test]
fn prompts_that_never_wait_together() {
    let options = EngineOptions { max_queued_tokens: Some(10), ..engine_options() };
    let server =
        Fixture::start(&self::options(), Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]), options);
    // One may always wait alone.
    assert_eq!(server.complete(&json!({"prompt": [vec![5; 11]]})).status, 200);
    assert_eq!(server.complete(&json!({"prompt": [vec![5; 4], vec![5; 6]]})).status, 200);
    let (status, kind, param, message) =
        server.complete(&json!({"prompt": [vec![5; 5], vec![5; 6]]})).error();
    assert_eq!((status, kind.as_str(), param.as_deref()), (400, "BadRequestError", Some("prompt")));
    assert_eq!(message, "prompt must have at most 10 tokens in all, as many as may wait at a time, got 11.");
    assert_eq!(server.stats().waiting, 0);
}

#[test]
fn a_device_that_fails() {
    let (server, steps) = Fixture::stepwise(HI, &options());
    // A failed step is tried again once.
    let fail = |what: &str| (0..2).for_each(|_| steps.send(Step::Fail(what.to_owned())).unwrap());
    fail("secret address 0x1234");
    for stream in [false, true] {
        let mut request = hi();
        request["stream"] = stream.into();
        let response = server.chat(&request);
        let (status, kind, param, message) = response.error();
        assert_eq!((status, kind.as_str(), param), (503, UNAVAILABLE, None));
        assert_eq!(response.header("retry-after"), Some("1"));
        assert!(message.starts_with("The device failed while it computed the request "), "{message}");
        assert!(!message.contains("secret"), "{message}");
        if !stream {
            fail("again");
        }
    }
    assert_eq!(server.get("/health").status, 503);

    // After the first token the error is in-band.
    let mut request = hi();
    request["stream"] = true.into();
    steps.send(Step::Run).unwrap();
    let mut stream = server.stream("/v1/chat/completions", &request);
    assert_eq!(stream.status, 200);
    fail("late");
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    let [.., error, done] = &events[..] else { panic!("{events:?}") };
    assert_eq!(parse_data(error)["error"]["type"], UNAVAILABLE);
    assert_eq!(done, "data: [DONE]");
    drop(steps);
    assert_eq!(server.chat(&hi()).status, 200, "the next request is served");
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn draining_finishes_what_runs() {
    let (mut server, steps) = Fixture::stepwise(HI, &options());
    let mut request = hi();
    request["stream"] = true.into();
    steps.send(Step::Run).unwrap();
    let mut stream = server.stream("/v1/chat/completions", &request);
    server.shut_down();
    // Probes and clients are told, as long as something runs.
    while server.get("/ready").status == 200 {}
    for path in ["/ready", "/health", "/v1/models", "/version"] {
        let response = server.get(path);
        let (status, kind, _, message) = response.error();
        assert_eq!((status, kind.as_str()), (503, UNAVAILABLE), "{path}: {message}");
        assert_eq!(
            (response.header("retry-after"), response.header("connection")),
            (Some("1"), Some("close"))
        );
    }
    assert_eq!(server.chat(&hi()).error().3, "The server is shutting down. Please retry.");
    assert_eq!(server.get("/live").status, 200);
    assert!(
        server
            .get("/metrics")
            .body
            .contains("vllm:num_requests_running{model_name=\"tiny\",engine=\"0\"} 1\n")
    );
    drop(steps);
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    assert_eq!(events.last().unwrap(), "data: [DONE]");
    assert!(events.iter().any(|event| event.contains("\"finish_reason\":\"stop\"")), "{events:?}");
    server.ended();
}

#[test]
fn what_does_not_finish_in_time_is_told() {
    let options = Options { shutdown_timeout: Duration::ZERO, ..options() };
    let (mut server, steps) = Fixture::stepwise(HI, &options);
    let mut request = hi();
    request["stream"] = true.into();
    steps.send(Step::Run).unwrap();
    let mut stream = server.stream("/v1/chat/completions", &request);
    server.shut_down();
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    let [.., error, done] = &events[..] else { panic!("{events:?}") };
    assert_eq!(parse_data(error)["error"]["type"], UNAVAILABLE);
    assert_eq!(done, "data: [DONE]");
    server.ended();
    drop(steps);
    server.until(|stats| stats.running == 0);
}

/// A server whose first engine is as it is told, and whose later ones say "Hi".
fn replaceable(options: &Options) -> (Fixture, std::sync::mpsc::Sender<Step>) {
    let (mut server, steps) = Fixture::stepwise(HI, options);
    server.engine = None;
    server.handle.reload_with(Box::new(|_, _| {
        let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]);
        engine::Engine::start(Box::new(backend), harmony(), engine_options())
            .map(|engine| vec![engine])
            .map_err(|error| error.to_string())
    }));
    (server, steps)
}

/// The server serves again, by itself.
fn is_back(server: &Fixture) {
    while server.get("/ready").status != 200 {
        std::thread::yield_now();
    }
    assert_eq!(server.chat(&hi()).ok()["choices"][0]["message"]["content"], "Hi");
    assert_eq!(server.get("/health").status, 200);
    assert!(
        server
            .get("/metrics")
            .body
            .contains("gptoss_engine_restarts_total{model_name=\"tiny\",engine=\"0\"} 1\n")
    );
}

#[test]
fn a_lost_device_is_replaced() {
    let (server, steps) = replaceable(&options());
    steps.send(Step::Run).unwrap();
    steps.send(Step::Lose("fell off the bus".to_owned())).unwrap();
    let (status, kind, _, message) = server.chat(&hi()).error();
    assert_eq!((status, kind.as_str()), (503, UNAVAILABLE), "{message}");
    assert!(!message.contains("bus"), "{message}");
    is_back(&server);
}

#[test]
fn a_server_whose_engine_hangs_ends_so_that_another_process_can_begin() {
    let options = Options { health_stall_timeout: Duration::from_millis(1), ..options() };
    let (mut server, steps) = replaceable(&options);
    // The step is never allowed to go on.
    let (status, kind, ..) = server.chat(&hi()).error();
    assert_eq!((status, kind.as_str()), (503, UNAVAILABLE));
    assert_eq!(server.ended(), server::Ended::BeyondRepair);
    drop(steps);
}

#[test]
fn a_server_whose_device_does_not_come_back_ends_so_that_another_process_can_begin() {
    let (mut server, steps) = replaceable(&options());
    server.handle.reload_with(Box::new(|_, _| Err("an illegal memory access was encountered".to_owned())));
    steps.send(Step::Lose("an illegal memory access was encountered".to_owned())).unwrap();
    assert_eq!(server.chat(&hi()).error().0, 503);
    assert_eq!(server.ended(), server::Ended::BeyondRepair);
}

#[test]
fn without_a_way_to_load_it_again_a_lost_engine_is_unhealthy() {
    let (server, steps) = Fixture::stepwise(HI, &options());
    steps.send(Step::Lose("gone".to_owned())).unwrap();
    assert_eq!(server.chat(&hi()).error().0, 503);
    assert_eq!(server.get("/health").status, 503);
    assert_eq!(server.chat(&hi()).error().0, 503);
    assert_eq!(server.get("/live").status, 200);
}
