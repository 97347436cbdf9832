//! Streams: framing, keeping alive, several at once, clients that go away or do not read.

use std::io::Write;
use std::time::Duration;

use engine::{EngineOptions, Scripted, Step};
use serde_json::{Value, json};
use server::Options;

use crate::fixture::{Fixture, JSON, engine_options, message, options, parse_data, tokens};

const CHAT: &str = "/v1/chat/completions";
const HELLO: &str = "<|channel|>final<|message|>Hello there<|return|>";

fn hi() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "stream": true})
}

#[test]
fn framing() {
    let server = Fixture::saying(&[HELLO]);
    let mut stream = server.stream(CHAT, &hi());
    assert_eq!(stream.status, 200);
    assert_eq!(stream.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(stream.header("cache-control"), Some("no-cache"));
    assert_eq!(stream.header("x-accel-buffering"), Some("no"));
    let id = stream.header("x-request-id").unwrap().to_owned();
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(done, "data: [DONE]");
    for chunk in chunks {
        assert!(!chunk.contains('\n'));
        assert_eq!(parse_data(chunk)["id"], format!("chatcmpl-{id}"));
    }
    let deltas: Vec<Value> =
        chunks.iter().map(|chunk| parse_data(chunk)["choices"][0]["delta"].clone()).collect();
    let expected = [
        json!({"role": "assistant", "content": ""}),
        json!({"content": "Hello"}),
        json!({"content": " there"}),
        json!({}),
    ];
    assert_eq!(deltas, expected);
}

#[test]
fn characters_are_whole() {
    // Each of these characters is several tokens.
    let text = "🏴‍☠️ ꧁ 𒐫";
    let server = Fixture::saying(&[&format!("<|channel|>final<|message|>{text}<|return|>")]);
    let chunks = server.chunks(CHAT, &hi());
    let joined: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(joined, text);
    assert!(!joined.contains('\u{fffd}'));
}

#[test]
fn idle_streams_are_kept_alive() {
    let options = Options { sse_keep_alive: Duration::from_millis(1), ..options() };
    let (server, steps) = Fixture::stepwise(HELLO, &options);
    for _ in 0..4 {
        steps.send(Step::Run).unwrap();
    }
    let mut stream = server.stream(CHAT, &hi());
    let mut comments = 0;
    while comments < 3 {
        comments += usize::from(stream.next().unwrap() == ": keep-alive");
    }
    drop(steps);
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    assert_eq!(events.last().unwrap(), "data: [DONE]");
}

#[test]
fn streams_at_once_take_turns() {
    let script = format!("<|channel|>final<|message|>{}<|return|>", "word ".repeat(20));
    let (server, steps) = Fixture::stepwise(&script, &options());
    let body = hi().to_string();
    let connect = || {
        let mut connection = server.connect();
        connection.write_all(&message("POST", CHAT, JSON, body.as_bytes())).unwrap();
        connection
    };
    // The first waits in its first step until the second has come.
    let first = connect();
    server.until(|stats| stats.step_started.is_some());
    let second = connect();
    server.until(|stats| stats.waiting >= 1);
    // Enough for both to begin, too few for either to end.
    for _ in 0..8 {
        steps.send(Step::Run).unwrap();
    }
    let (mut first, mut second) = (crate::fixture::Stream::new(first), crate::fixture::Stream::new(second));
    for stream in [&mut first, &mut second] {
        assert_eq!(stream.status, 200);
        let content = std::iter::from_fn(|| stream.next())
            .map(|event| parse_data(&event)["choices"][0]["delta"]["content"].clone())
            .find(|content| content.as_str().is_some_and(|text| !text.is_empty()));
        assert!(content.is_some());
    }
    assert_eq!(server.stats().running, 2);
    drop(steps);
    for mut stream in [first, second] {
        assert_eq!(std::iter::from_fn(|| stream.next()).last().unwrap(), "data: [DONE]");
    }
}

#[test]
fn clients_that_go_away_free_their_sequences() {
    let (server, steps) = Fixture::stepwise("word ", &options());
    for stream in [true, false] {
        let mut request = hi();
        request["stream"] = stream.into();
        let mut connection = server.connect();
        connection.write_all(&message("POST", CHAT, JSON, request.to_string().as_bytes())).unwrap();
        steps.send(Step::Run).unwrap();
        server.until(|stats| stats.running == 1);
        drop(connection);
        // Only the steps are sent that let the engine notice.
        server.until(|stats| {
            let _ = steps.send(Step::Run);
            stats.running == 0 && stats.full_blocks_used == 0
        });
    }
}

#[test]
fn bytes_that_are_not_wanted_yet_do_not_hide_that_a_client_goes_away() {
    let (server, steps) = Fixture::stepwise("word ", &options());
    let request = message("POST", CHAT, JSON, json!({"messages": hi()["messages"]}).to_string().as_bytes());
    for more in [&b"\r\n"[..], &request[..]] {
        let mut connection = server.connect();
        connection.write_all(&[&request, more].concat()).unwrap();
        steps.send(Step::Run).unwrap();
        server.until(|stats| stats.running == 1);
        drop(connection);
        server.until(|stats| {
            let _ = steps.send(Step::Run);
            stats.running == 0 && stats.full_blocks_used == 0
        });
    }
}

/// Tokens of an answer that nobody reads, and the request's name.
const UNREAD: usize = 12_000;
const UNREAD_ID: &str = "unread";

/// A client that does not read what it has asked for, and the server that has stopped computing it.
fn unread(options: &Options) -> (Fixture, std::net::TcpStream) {
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens("word ")]);
    let engine_options =
        EngineOptions { max_model_len: Some(100_000), kv_cache_bytes: 128 << 20, ..engine_options() };
    let server = Fixture::start(options, backend, engine_options);
    let mut request = hi();
    // Large chunks fill what the connection holds sooner: the system takes some four megabytes of them, three thousand or so.
    (request["logprobs"], request["top_logprobs"]) = (true.into(), 20.into());
    request["max_tokens"] = UNREAD.into();
    let headers = format!("{JSON}x-request-id: {UNREAD_ID}\r\n");
    let mut connection = server.connect();
    connection.write_all(&message("POST", CHAT, &headers, request.to_string().as_bytes())).unwrap();
    (server, connection)
}

#[test]
fn clients_that_do_not_read_are_waited_for_without_blocks() {
    let (server, connection) = unread(&options());
    server.until(|stats| stats.paused == 1);
    let stats = server.stats();
    assert_eq!((stats.running, stats.full_blocks_used), (0, 0));
    // Others are served meanwhile.
    assert_eq!(
        server.complete(&json!({"prompt": "x", "max_tokens": 3})).ok()["usage"]["completion_tokens"],
        3
    );
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("reason=\"deferred\"} 1\n"), "{metrics}");
    // Then nothing is lost.
    let mut stream = crate::fixture::Stream::new(connection);
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    assert_eq!(events.last().unwrap(), "data: [DONE]");
    let chunks = events[..events.len() - 1].iter().map(|event| parse_data(event));
    let entries =
        chunks.map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().map_or(0, Vec::len));
    assert_eq!(entries.sum::<usize>(), UNREAD);
}

#[test]
fn clients_that_do_not_read_are_given_up() {
    let options = Options { client_stall_timeout: Duration::from_millis(50), ..options() };
    let (server, connection) = unread(&options);
    server.until(|stats| stats.generated_tokens > 100 && stats.running + stats.waiting + stats.paused == 0);
    assert!(server.stats().generated_tokens < UNREAD as u64, "it was given up, not finished");
    // The answer ends without saying that it is complete.
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut { connection }, &mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("\"finish_reason\":\"length\""));
    assert_eq!(server.complete(&json!({"prompt": "x", "max_tokens": 3})).status, 200);
}

#[test]
fn what_waits_for_a_client_does_not_put_its_end_off() {
    let (server, connection) = unread(&Options { dev_mode: true, ..options() });
    server.until(|stats| stats.paused == 1);
    assert_eq!(server.post("/abort_requests", &json!({"request_ids": [UNREAD_ID]})).status, 200);
    let mut stream = crate::fixture::Stream::new(connection);
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    let [.., error, _] = &events[..] else { panic!("{events:?}") };
    assert_eq!(parse_data(error)["error"]["type"], "RequestAbortedError");
    server.until(|stats| stats.running + stats.waiting + stats.paused == 0);
    assert!(server.stats().generated_tokens < UNREAD as u64);
}

#[test]
fn parts_of_several_tokens() {
    let options = Options { stream_interval: 4, ..options() };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens("a b c d e f g h i j k<|return|>")]);
    let server = Fixture::start(&options, backend, engine_options());
    let request = json!({"prompt": "x", "stream": true, "max_tokens": 50});
    let chunks = server.chunks("/v1/completions", &request);
    let texts: Vec<&str> = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    // The first at once, then four by four, then what is left with the end.
    assert_eq!(texts, ["a", " b c d e", " f g h i", " j k", ""]);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
    let mut two = request;
    two["n"] = 2.into();
    let chunks = server.chunks("/v1/completions", &two);
    for choice in 0..2 {
        let of = chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|c| c["index"] == choice);
        let text: String = of.map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(text, "a b c d e f g h i j k");
    }
}
