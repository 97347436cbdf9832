//! Limits of connections: heads that are too large or too slow, and more connections than there are places.

use std::io::{Read, Write};

use engine::Scripted;
use server::Options;

use crate::fixture::{Fixture, engine_options, options, tokens};

fn server(options: &Options) -> Fixture {
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens("Hi<|return|>")]);
    Fixture::start(options, backend, engine_options())
}

/// The status of an answer to a head, and whether the server still answers others.
fn status(server: &Fixture, head: &str) -> u16 {
    let mut stream = server.connect();
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(head.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(server.get("/health").status, 200);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status: u16 =
        answer.split(' ').nth(1).unwrap_or_else(|| panic!("no status: {answer:?}")).parse().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    if status >= 400 {
        // Of one shape, whoever refuses.
        let body: serde_json::Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{answer}"));
        assert_eq!(
            (&body["error"]["code"], &body["error"]["type"]),
            (&status.into(), &"BadRequestError".into())
        );
        assert!(head.to_ascii_lowercase().contains("\r\nx-request-id: "), "{head}");
    }
    status
}

#[test]
fn heads_that_are_too_large() {
    let server = server(&options());
    let head = |path: &str, headers: &str| {
        format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n")
    };
    let few: String = (0..90).map(|i| format!("x-{i}: 1\r\n")).collect();
    assert_eq!(status(&server, &head("/health", &few)), 200);
    let many: String = (0..101).map(|i| format!("x-{i}: 1\r\n")).collect();
    assert_eq!(status(&server, &head("/health", &many)), 431);
    let long = format!("x: {}\r\n", "a".repeat(65 << 10));
    assert_eq!(status(&server, &head("/health", &long)), 431);
    assert_eq!(status(&server, &head("/health?a=b", "")), 200);
    let path = format!("/health?{}", "a".repeat(9 << 10));
    assert_eq!(status(&server, &head(&path, "")), 431);
    assert_eq!(status(&server, "nonsense\r\n\r\n"), 400);
}

#[test]
fn more_connections_than_places_wait() {
    let server = server(&Options { max_connections: 2, ..options() });
    let held = [server.connect(), server.connect()];
    // Both are accepted when both have been answered.
    for mut stream in held.iter() {
        stream.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        assert!(stream.read(&mut [0; 1000]).unwrap() > 0);
    }
    let mut third = server.connect();
    third.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    third.set_nonblocking(true).unwrap();
    assert_eq!(third.read(&mut [0; 1000]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    third.set_nonblocking(false).unwrap();
    drop(held);
    let mut answer = String::new();
    third.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn idle_connections_do_not_hold_a_shutdown_up() {
    let mut server = server(&options());
    let mut idle = server.connect();
    idle.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    assert!(idle.read(&mut [0; 1000]).unwrap() > 0);
    server.shut_down();
    server.ended();
    assert_eq!(idle.read(&mut [0; 10]).unwrap(), 0);
}

#[test]
fn bodies_share_a_bounded_memory() {
    let server = server(&Options { max_body_bytes: 1000, ..options() });
    let chat = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
                content-length: 1000\r\n\r\n";
    let hold = || {
        let mut stream = server.connect();
        stream.write_all(format!("{chat}{}", " ".repeat(900)).as_bytes()).unwrap();
        stream
    };
    // Seventeen of 900 bytes leave no room for another one.
    let mut held: Vec<_> = (0..17).map(|_| hold()).collect();
    let body = format!(r#"{{"prompt": "Hi", "max_tokens": 1{}}}"#, " ".repeat(900));
    let ask = || server.request("POST", "/v1/completions", crate::fixture::JSON, body.as_bytes());
    while ask().status != 503 {
        // One that came while the other was read has been refused.
        for stream in &mut held {
            stream.set_nonblocking(true).unwrap();
            if stream.read(&mut [0; 1]).is_ok() {
                *stream = hold();
            }
        }
    }
    assert_eq!(ask().header("retry-after"), Some("1"));
    assert_eq!(server.get("/health").status, 200);
    drop(held);
    while ask().status != 200 {
        std::thread::yield_now();
    }
}
