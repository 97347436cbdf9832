//! Several engines behind one listener: both are seen, either may fail, both are finished.

use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use engine::{Engine, EngineOptions, Scripted, Step};
use serde_json::{Value, json};
use server::{Ended, Options};

use crate::fixture::{Fixture, JSON, Stream, engine_options, harmony, options, parse_data, tokens};

const HI: &str = "<|channel|>final<|message|>Hi<|return|>";
const CHAT: &str = "/v1/chat/completions";

fn hi() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}]})
}

fn streamed() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "stream": true})
}

fn says_hi(engine_options: EngineOptions) -> Engine {
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]);
    Engine::start(Box::new(backend), harmony(), engine_options).unwrap()
}

/// A server with two engines that say hi, one step per message.
fn stepwise(options: &Options) -> (Fixture, [Engine; 2], [Sender<Step>; 2]) {
    let ((first, one), (second, other)) = (channel(), channel());
    let engines = [one, other].map(|control| {
        let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]).controlled_by(control);
        Engine::start(Box::new(backend), harmony(), engine_options()).unwrap()
    });
    (Fixture::several(options, engines.to_vec()), engines, [first, second])
}

fn metric(server: &Fixture, series: &str) -> f64 {
    let text = server.get("/metrics").body;
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in {text}")).parse().unwrap()
}

fn of(engine: usize, name: &str) -> String {
    format!("{name}{{model_name=\"tiny\",engine=\"{engine}\"}}")
}

/// The rest of a stream.
fn rest(mut stream: Stream) -> Vec<String> {
    std::iter::from_fn(|| stream.next()).collect()
}

fn ends_well(events: &[String]) -> bool {
    events.iter().any(|event| event.contains("\"finish_reason\":\"stop\""))
}

/// The type of the error with which a stream ends.
fn error_type(events: &[String]) -> Value {
    let [.., error, done] = events else { panic!("{events:?}") };
    assert_eq!(done, "data: [DONE]");
    parse_data(error)["error"]["type"].clone()
}

#[test]
fn each_has_series_of_its_own() {
    let loading = Fixture::loading(&Options { replicas: 2, ..options() });
    assert_eq!(metric(&loading, &of(1, "vllm:prompt_tokens_total")), 0.0);
    let engines = vec![says_hi(engine_options()), says_hi(engine_options())];
    let server = Fixture::several(&Options { dev_mode: true, ..options() }, engines);
    let usage = server.chat(&hi()).ok()["usage"].clone();
    for _ in 0..3 {
        server.chat(&hi()).ok();
    }
    for engine in 0..2 {
        for (name, value) in [
            ("vllm:prompt_tokens_total", 2.0 * usage["prompt_tokens"].as_f64().unwrap()),
            ("vllm:generation_tokens_total", 2.0 * usage["completion_tokens"].as_f64().unwrap()),
            ("vllm:time_to_first_token_seconds_count", 2.0),
            ("vllm:request_params_n_count", 2.0),
            ("gptoss_failed_steps_total", 0.0),
            ("gptoss_engine_restarts_total", 0.0),
        ] {
            assert_eq!(metric(&server, &of(engine, name)), value, "{name} of {engine}");
        }
        let labels = format!("model_name=\"tiny\",engine=\"{engine}\"");
        let stopped = format!("vllm:request_success_total{{{labels},finished_reason=\"stop\"}}");
        assert_eq!(metric(&server, &stopped), 2.0);
        assert!(metric(&server, &format!("gptoss_device_memory_bytes{{{labels},kind=\"kv_cache\"}}")) > 0.0);
        assert!(metric(&server, &format!("gptoss_step_seconds_count{{{labels},phase=\"prefill\"}}")) > 0.0);
    }
    let info = server.get("/server_info").ok();
    assert_eq!(info["devices"], json!(["scripted (no model)", "scripted (no model)"]));
    assert_eq!(
        info["memory"]["full_blocks"].as_f64().unwrap(),
        2.0 * Fixture::saying(&[HI]).stats().full_blocks as f64
    );
}

#[test]
fn a_conversation_stays_where_its_beginning_is() {
    let options = Options {
        api_keys: vec!["one".to_owned(), "two".to_owned()],
        isolate_prefix_cache: true,
        dev_mode: true,
        ..options()
    };
    let caching = || EngineOptions { prefix_caching: true, ..engine_options() };
    let server = Fixture::several(&options, vec![says_hi(caching()), says_hi(caching())]);
    let ask = |key: &str, words: usize| {
        let body = json!({"prompt": vec![7; words], "max_tokens": 1}).to_string();
        let headers = format!("{JSON}authorization: Bearer {key}\r\n");
        let usage =
            server.request("POST", "/v1/completions", &headers, body.as_bytes()).ok()["usage"].clone();
        usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0)
    };
    assert_eq!([ask("one", 100), ask("two", 100), ask("one", 150), ask("two", 150)], [0, 0, 96, 96]);
    assert_eq!(metric(&server, &of(0, "vllm:prompt_tokens_cached_total")), 96.0);
    assert_eq!(metric(&server, &of(1, "vllm:prompt_tokens_cached_total")), 96.0);
    let headers = "authorization: Bearer one\r\n";
    assert_eq!(server.request("POST", "/reset_prefix_cache", headers, b"").status, 200);
    assert_eq!([ask("one", 150), ask("two", 150)], [0, 0]);
}

#[test]
fn a_router_may_choose_the_engine() {
    for trust_routing_headers in [false, true] {
        let engines = vec![says_hi(engine_options()), says_hi(engine_options())];
        let server = Fixture::several(&Options { trust_routing_headers, ..options() }, engines);
        let ask = |path: &str, body: Value, rank: &str| {
            let headers = format!("{JSON}x-data-parallel-rank: {rank}\r\n");
            server.request("POST", path, &headers, body.to_string().as_bytes())
        };
        let prompts = |engine| metric(&server, &of(engine, "vllm:request_params_n_count"));
        for _ in 0..2 {
            assert_eq!(ask(CHAT, hi(), "1").status, 200);
            assert_eq!(ask(CHAT, streamed(), "1").status, 200);
            assert_eq!(
                ask("/v1/completions", json!({"prompt": ["a", "b"], "max_tokens": 1}), "1").status,
                200
            );
            assert_eq!(ask("/v1/responses", json!({"input": "Hi"}), "1").status, 200);
        }
        let (first, second) = (prompts(0), prompts(1));
        assert_eq!(first + second, 10.0);
        assert_eq!(first == 0.0, trust_routing_headers);
        // Words are ignored, as is what is not trusted.
        assert_eq!(ask(CHAT, hi(), "any").status, 200);
        for rank in ["2", "-1"] {
            let answer = ask(CHAT, hi(), rank);
            if trust_routing_headers {
                let (status, kind, param, message) = answer.error();
                assert_eq!((status, kind.as_str()), (400, "BadRequestError"));
                assert_eq!(param.as_deref(), Some("X-data-parallel-rank"));
                assert!(message.ends_with(&format!("must be 0 to 1, got {rank}.")), "{message}");
            } else {
                assert_eq!(answer.status, 200);
            }
        }
    }
}

#[test]
fn prompts_of_one_request_are_shared_out() {
    let (server, engines, steps) = stepwise(&options());
    std::thread::scope(|scope| {
        let answer =
            scope.spawn(|| server.complete(&json!({"prompt": ["a", "b", "c", "d"], "max_tokens": 2})));
        // All are in their queues, though no step has ended.
        while engines.iter().any(|engine| engine.stats().running + engine.stats().waiting < 2) {
            std::thread::yield_now();
        }
        assert_eq!(server.get("/load").ok(), json!({"server_load": 4}));
        drop(steps);
        assert_eq!(answer.join().unwrap().ok()["choices"].as_array().unwrap().len(), 4);
    });
}

#[test]
fn a_lost_engine_is_replaced_while_the_other_serves() {
    let (server, engines, [first, second]) = stepwise(&options());
    drop(engines);
    let (go_on, wait) = channel::<()>();
    let wait = Mutex::new(wait);
    server.handle.reload_with(Box::new(move |_, numbers| {
        assert_eq!(numbers, [0]);
        // The test has seen enough when it drops its end.
        let _ = wait.lock().unwrap().recv();
        Ok(vec![says_hi(engine_options())])
    }));
    drop(second);
    first.send(Step::Lose("fell off the bus".to_owned())).unwrap();
    assert_eq!(server.chat(&hi()).error().0, 503);
    // Healthy again as soon as the watchdog has seen it; requests are served all the while.
    while server.get("/health").status != 200 {
        assert_eq!(server.chat(&hi()).status, 200);
    }
    for _ in 0..3 {
        assert_eq!(server.chat(&hi()).status, 200);
    }
    assert_eq!(metric(&server, &of(0, "gptoss_engine_restarts_total")), 0.0);
    drop(go_on);
    while metric(&server, &of(0, "gptoss_engine_restarts_total")) != 1.0 {
        std::thread::yield_now();
    }
    let before = metric(&server, &of(0, "vllm:request_params_n_count"));
    for _ in 0..2 {
        assert_eq!(server.chat(&hi()).status, 200);
    }
    assert_eq!(metric(&server, &of(0, "vllm:request_params_n_count")), before + 1.0);
    assert_eq!(metric(&server, &of(1, "gptoss_engine_restarts_total")), 0.0);
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn one_that_cannot_be_replaced_leaves_the_other_serving_and_the_server_unhealthy() {
    let (mut server, engines, [first, second]) = stepwise(&options());
    drop(engines);
    server.handle.reload_with(Box::new(|_, _| Err("an illegal memory access was encountered".to_owned())));
    first.send(Step::Lose("gone".to_owned())).unwrap();
    assert_eq!(server.chat(&hi()).error().0, 503);
    (0..40).for_each(|_| second.send(Step::Run).unwrap());
    assert_eq!(server.chat(&hi()).status, 200);
    assert_eq!((server.get("/health").status, server.get("/ready").status), (503, 200));
    // With the last one goes the server, so that another process can begin.
    while second.send(Step::Lose("gone, too".to_owned())).is_ok() {
        if server.chat(&hi()).status == 503 {
            break;
        }
    }
    assert_eq!(server.ended(), Ended::BeyondRepair);
}

#[test]
fn requests_of_an_engine_that_hangs_are_told_and_no_others() {
    let options = Options { health_stall_timeout: Duration::from_millis(10), ..options() };
    let (server, engines, [first, second]) = stepwise(&options);
    drop(engines);
    server.handle.reload_with(Box::new(|_, _| Err("never asked".to_owned())));
    // Its first token comes, and nothing more.
    first.send(Step::Run).unwrap();
    let hangs = server.stream(CHAT, &streamed());
    drop(second);
    let serves = server.stream(CHAT, &streamed());
    assert!(ends_well(&rest(serves)));
    assert_eq!(error_type(&rest(hangs)), "ServiceUnavailableError");
    assert_eq!((server.get("/health").status, server.get("/ready").status), (503, 200));
    for _ in 0..3 {
        assert_eq!(server.chat(&hi()).status, 200);
    }
    drop(first);
}

#[test]
fn draining_finishes_what_runs_in_both() {
    let (mut server, engines, [first, second]) = stepwise(&options());
    drop(engines);
    first.send(Step::Run).unwrap();
    let one = server.stream(CHAT, &streamed());
    second.send(Step::Run).unwrap();
    let other = server.stream(CHAT, &streamed());
    server.shut_down();
    drop((first, second));
    assert!(ends_well(&rest(one)) && ends_well(&rest(other)));
    assert_eq!(server.ended(), Ended::ShutDown);
}

#[test]
fn both_sleep_and_wake() {
    let options = Options { dev_mode: true, sleep_mode: true, ..options() };
    let (server, engines, steps) = stepwise(&options);
    drop(steps);
    server
        .handle
        .reload_with(Box::new(|_, numbers| Ok(numbers.iter().map(|_| says_hi(engine_options())).collect())));
    let post = |path: &str| server.request("POST", path, "", b"").status;
    assert_eq!(post("/start_profile"), 200);
    assert_eq!((server.chat(&hi()).status, server.chat(&hi()).status), (200, 200));
    let profile = server.request("POST", "/stop_profile", "", b"").ok();
    assert_eq!(profile["generated_tokens"], 2 * tokens(HI).len());
    assert_eq!(post("/sleep"), 200);
    engines.iter().for_each(Engine::wait);
    assert_eq!(server.get("/is_sleeping").ok(), json!({"is_sleeping": true}));
    assert_eq!(post("/wake_up"), 200);
    assert_eq!((server.chat(&hi()).status, server.chat(&hi()).status), (200, 200));
    for engine in 0..2 {
        assert_eq!(metric(&server, &of(engine, "vllm:request_params_n_count")), 2.0);
    }
}
