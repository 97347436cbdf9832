//! `nibble serve` as an operator sees it: flags, logs, attacks, faults, ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{fails, nibble};

/// Long enough for any test: one that waits for so long has failed.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A server with scripted answers, whose log is kept. Ended when dropped.
struct Scripted {
    child: Child,
    address: String,
    folder: tempfile::TempDir,
}

impl Scripted {
    /// One that says `hello world` again and again.
    fn start(args: &[&str]) -> Scripted {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script.json");
        std::fs::write(&script, json!({"default": {"tokens": [24_912, 2_375]}}).to_string()).unwrap();
        let engine = format!("scripted:{}", script.display());
        Scripted::run(folder, &[&["--engine", &engine], args].concat())
    }

    /// Any server.
    fn run(folder: tempfile::TempDir, args: &[&str]) -> Scripted {
        Scripted::spawn(folder, nibble(&[&["serve", "--port", "0"], args].concat()))
    }

    fn spawn(folder: tempfile::TempDir, mut command: Command) -> Scripted {
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().trim_start_matches("http://").to_owned();
        let server = Scripted { child, address, folder };
        while server.request("GET", "/ready", "", b"").0 != 200 {}
        server
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream
    }

    /// Status and everything after the head of an answer to bytes, of which the server need not read all. Status 0: no answer.
    fn raw(&self, request: &[u8]) -> (u16, String) {
        let mut stream = self.connect();
        let writer = stream.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // The server may have had enough.
                let _ = { writer }.write_all(request);
            });
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            let answer = String::from_utf8_lossy(&answer).into_owned();
            let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
            (status, answer.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
        })
    }

    fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String) {
        self.raw(&message(method, path, headers, body))
    }

    fn post(&self, path: &str, body: &Value) -> (u16, String) {
        self.request("POST", path, JSON, body.to_string().as_bytes())
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.request("GET", "/metrics", "", b"").1;
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// Waits until the log says so.
    fn logged(&self, text: &str) {
        let start = Instant::now();
        while !self.log().contains(text) {
            assert!(start.elapsed() < TIMEOUT, "{text}: {}", self.log());
            std::thread::yield_now();
        }
    }

    fn signal(&self, signal: i32) {
        // SAFETY: a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const JSON: &str = "Content-Type: application/json\r\n";

fn message(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

fn hi() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4})
}

/// Every way in which a client may be too much (`serving.md` 3.2 and 14): what it is told, that the next one is served, and
/// that nothing is left behind.
#[test]
fn attacks_leave_nothing_behind() {
    let server = Scripted::start(&["--api-key", "secret", "--max-model-len", "8192"]);
    let key = "Authorization: Bearer secret\r\n";
    let headers = format!("{JSON}{key}");
    let with = |path: &str, body: &[u8]| message("POST", path, &headers, body);
    let chat = |field: &str, value: Value| {
        let mut request = hi();
        request[field] = value;
        with("/v1/chat/completions", request.to_string().as_bytes())
    };
    let completion = |fields: &Value| with("/v1/completions", fields.to_string().as_bytes());
    let many_headers: String = (0..110).map(|i| format!("X-{i}: 1\r\n")).collect();
    let nested = |depth: usize| {
        let value = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        with("/v1/chat/completions", format!("{{\"messages\": [], \"x\": {value}}}").as_bytes())
    };
    let arguments = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let call = json!({"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}});
    let tool = |i: usize| json!({"type": "function", "function": {"name": format!("f{i}")}});
    let regex = |pattern: &str| chat("response_format", json!({"type": "regex", "pattern": pattern}));
    let declared =
        format!("POST /v1/completions HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: 99999999999\r\n\r\n");
    let mut chunked =
        format!("POST /v1/completions HTTP/1.1\r\nHost: x\r\n{headers}Transfer-Encoding: chunked\r\n\r\n")
            .into_bytes();
    for _ in 0..34 {
        chunked.extend(b"100000\r\n");
        chunked.extend(vec![b' '; 1 << 20]);
        chunked.extend(b"\r\n");
    }
    let two_lengths = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}"
    );
    let rows: Vec<(&str, Vec<u8>, u16)> = vec![
        ("no key", message("POST", "/v1/completions", JSON, b"{}"), 401),
        ("wrong key", message("GET", "/v1/models", "Authorization: Bearer secre\r\n", b""), 401),
        ("unknown path", message("GET", "/v1/../../etc/passwd", key, b""), 404),
        ("wrong method", message("PUT", "/v1/completions", &headers, b"{}"), 405),
        ("wrong media type", message("POST", "/v1/completions", key, b"{}"), 415),
        ("not for this model", with("/v1/embeddings", b"{}"), 501),
        ("unknown model", completion(&json!({"prompt": "x", "model": "x".repeat(1 << 20)})), 404),
        ("unknown response", message("GET", "/v1/responses/resp_x", key, b""), 404),
        ("body too large by its length", declared.into_bytes(), 413),
        ("body too large by its chunks", chunked, 413),
        ("two lengths", two_lengths.into_bytes(), 400),
        ("too many headers", message("GET", "/v1/models", &format!("{key}{many_headers}"), b""), 431),
        ("a large header", message("GET", "/v1/models", &format!("X: {}\r\n", "x".repeat(70_000)), b""), 431),
        ("a long path", message("GET", &format!("/{}", "x".repeat(9000)), key, b""), 431),
        ("not HTTP", b"\x16\x03\x01\x00\xff\r\n\r\n".to_vec(), 400),
        ("no such version", b"GET / HTTP/7.3\r\n\r\n".to_vec(), 400),
        ("not JSON", with("/v1/completions", b"{\"prompt\": "), 400),
        ("not UTF-8", with("/v1/completions", b"{\"prompt\": \"\xff\"}"), 400),
        ("nothing", with("/v1/completions", b""), 400),
        ("nested", nested(129), 400),
        ("nested deep", nested(4_000_000), 400),
        ("messages", chat("messages", vec![hi()["messages"][0].clone(); 4097].into()), 400),
        (
            "a large message",
            chat("messages", json!([{"role": "user", "content": "x".repeat(20 << 20)}])),
            400,
        ),
        ("a long message", chat("messages", json!([{"role": "user", "content": "x ".repeat(400_000)}])), 400),
        ("tools", chat("tools", (0..513).map(tool).collect()), 400),
        ("stop", chat("stop", json!(vec!["x"; 17])), 400),
        ("bad_words", chat("bad_words", json!(vec!["x"; 129])), 400),
        ("logit_bias", chat("logit_bias", (0..1025).map(|i| (i.to_string(), json!(1))).collect()), 400),
        ("n", chat("n", 129.into()), 400),
        ("logprobs", completion(&json!({"prompt": "x", "logprobs": 1_000_000})), 400),
        ("prompts", completion(&json!({"prompt": vec!["x"; 1025]})), 400),
        ("ids", completion(&json!({"prompt": vec![1; 2_000_000]})), 400),
        ("nested arguments", chat("messages", json!([{"role": "assistant", "tool_calls": [call]}])), 400),
        // Followed as far as the answer goes, never written out.
        ("a huge regex", regex("((a{1,1000}){1,1000}){1,1000}"), 200),
        ("a deep regex", regex(&"(".repeat(10_000)), 400),
        (
            "an endless schema",
            chat(
                "response_format",
                json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:1/"}}}),
            ),
            400,
        ),
        ("half a request", b"POST /v1/completions HTTP/1.1\r\nHost".to_vec(), 0),
    ];
    let mut memory = Vec::new();
    for _ in 0..4 {
        for (what, request, expected) in &rows {
            let half = *expected == 0;
            let (status, body) = if half {
                // It is left open and forgotten.
                let mut stream = server.connect();
                stream.write_all(request).unwrap();
                (0, String::new())
            } else {
                server.raw(request)
            };
            assert_eq!(status, *expected, "{what}: {body}");
            // The parser of heads has no words.
            if !body.is_empty() && status != 200 {
                let error =
                    serde_json::from_str::<Value>(&body).unwrap_or_else(|e| panic!("{what}: {e}: {body}"));
                assert_eq!(error["error"]["code"], *expected, "{what}");
                assert!(body.len() < 2000, "{what}: {body}");
            }
            let answer =
                server.request("POST", "/v1/chat/completions", &headers, hi().to_string().as_bytes());
            assert_eq!(answer.0, 200, "after {what}: {}", answer.1);
        }
        memory.push(server.metric("process_resident_memory_bytes"));
    }
    assert_eq!(server.metric("vllm:num_requests_running"), 0.0);
    assert_eq!(server.metric("vllm:kv_cache_usage_perc"), 0.0);
    // What the first round has touched stays with the allocator; nothing is added.
    let (first, last) = (memory[0], memory[3]);
    assert!(last < first * 1.1 + 16e6, "{memory:?}");
    let log = server.log();
    assert!(!log.contains("secret") && !log.contains("panicked"), "{log}");
}

#[test]
fn a_level_that_was_asked_for_is_that_of_the_log() {
    let lines = |level: &[&str]| {
        let args = ["serve", "--port", "0", "--engine", "scripted:/nowhere.json", "--trust-remote-code"];
        let output = nibble(&args).args(level).env("RUST_LOG", "error").output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap().lines().count()
    };
    // The error, and with the level the line about the flag that changes nothing.
    assert_eq!((lines(&[]), lines(&["--log-level", "info"])), (1, 2));
}

#[test]
fn logs_are_structured_and_discreet() {
    let server = Scripted::start(&["--api-key", "secret", "--log-format", "json"]);
    let headers = format!("{JSON}Authorization: Bearer secret\r\nX-Request-Id: mine\r\n");
    let request = json!({"messages": [{"role": "user", "content": "my private words"}], "max_tokens": 4});
    let (status, _) =
        server.request("POST", "/v1/chat/completions", &headers, request.to_string().as_bytes());
    assert_eq!(status, 200);
    let line = loop {
        // The line is written after the answer.
        if let Some(line) = server.log().lines().find(|line| line.contains("\"mine\"")) {
            break serde_json::from_str::<Value>(line).unwrap();
        }
    };
    assert_eq!((&line["status"], &line["completion_tokens"]), (&json!(200), &json!(4)), "{line}");
    assert_eq!((&line["route"], &line["finish_reason"]), (&json!("/v1/chat/completions"), &json!("length")));
    assert!(
        line["queue_ms"].is_number() && line["ttft_ms"].is_number() && line["e2e_ms"].is_number(),
        "{line}"
    );
    assert_eq!(line["key"].as_str().unwrap().len(), 6);
    let log = server.log();
    assert!(!log.contains("private") && !log.contains("secret") && !log.contains("hello"), "{log}");

    let server = Scripted::start(&["--enable-log-requests", "--enable-log-outputs", "--max-log-len", "60"]);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "my own words", "max_tokens": 2})).0, 200);
    server.logged("hello world");
    assert!(server.log().contains("my own words"), "{}", server.log());
}

#[test]
fn flags_of_others_are_listed_or_refused() {
    let server = Scripted::start(&[
        "--trust_remote_code",
        "--reasoning-parser",
        "openai_gptoss",
        "--tensor-parallel-size=1",
        "-pp",
        "1",
        "-O3",
        "--cudagraph-capture-sizes",
        "1",
        "2",
        "--no-enable-log-requests",
        "--gpu_memory_utilization",
        "0.9",
        "--swap-space",
        "4",
        "--no-enable-chunked-prefill",
        "--max-model-len",
        "-1",
        "--async-scheduling",
        "--limit-mm-per-prompt",
        "{\"image\": 0}",
        "--attention-backend=FLASH_ATTN",
        "--dtype",
        "half",
        "--block-size",
        "64",
    ]);
    let log = server.log();
    let line = log.lines().find(|line| line.contains("ignored for compatibility")).unwrap();
    for flag in [
        "--trust-remote-code",
        "--reasoning-parser",
        "--pipeline-parallel-size",
        "--optimization-level",
        "--cudagraph-capture-sizes",
        "--swap-space",
        "--no-enable-chunked-prefill",
        "--async-scheduling",
        "--limit-mm-per-prompt",
        "--attention-backend",
        "--dtype",
    ] {
        assert!(line.contains(flag), "{flag}: {line}");
    }
    assert_eq!(log.matches("ignored for compatibility").count(), 1);
    let small = crate::small();
    for (args, named) in [
        (vec!["--middleware", "x.y"], "Python extensions"),
        (vec!["--distributed-executor-backend", "ray"], "Ray"),
        (vec!["--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
        (vec!["--enable-lora"], "adapters"),
        (vec!["--ssl-ciphers", "x"], "--ssl-ciphers: the server has safe ciphers only"),
        (vec!["--runner", "pooling"], "--runner: expected auto or generate, since the model generates text"),
        (vec!["-dp", "0"], "--data-parallel-size"),
        (
            vec!["-dp", "3", "--device", "cpu", "--threads", "2"],
            "expected at most 2, a thread for each, found 3",
        ),
        (vec!["--block-size", "128"], "16"),
        (vec!["--api-kye", "x"], "--api-key"),
        (
            vec!["--structured-outputs-config", "{\"disable_any_whitespace\": 1}"],
            "--structured-outputs-config",
        ),
        (vec!["--served-model-nam", "x"], "--served-model-name"),
        (vec!["--api-key", ""], "--api-key"),
        (vec!["--ssl-certfile", "x"], "--ssl-keyfile"),
        (vec!["--ssl-certfile", "/nowhere.pem", "--ssl-keyfile", "x"], "/nowhere.pem"),
        (vec!["--override-generation-config", "{\"heat\": 1}"], "heat"),
        (vec!["--override-generation-config", "{\"repetition_penalty\": 0}"], "`repetition_penalty` must be"),
        (vec!["--root-path", "x y"], "--root-path"),
        (vec!["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (vec!["--tokenizer", "/nowhere"], "/nowhere: expected a tokenizer.json"),
        (vec!["--tokenizer-revision", "v1"], "--tokenizer <FILE|DIR|NAME>"),
        (vec!["--tokenizer", &small, "--tokenizer-revision", "v1"], "expected a hub name as --tokenizer"),
        (vec!["--revision", "v1"], "--revision v1: expected a hub name"),
        (vec![&small, "--revision", "v1"], "--revision v1: expected a hub name"),
        (vec!["--gpu-memory-utilization", "1.5"], "at most 1"),
        (vec!["--system-date", "2026-13-45"], "expected a day as YYYY-MM-DD"),
        (vec!["--fingerprint-mode", "custom"], "--fingerprint-value"),
        (vec!["--max-model-len", "1M"], "--max-model-len"),
        (vec!["--host", "300.0.0.1"], ""),
    ] {
        let all = [&["serve", "--port", "0"], &args[..]].concat();
        let status = if named.is_empty() { 3 } else { 2 };
        fails(&all, status, named);
    }
}

#[test]
fn a_flag_of_several_values_takes_no_model() {
    let small = crate::small();
    let refused = |args: &[&str], flag: &str| {
        let all = [&["serve", "--port", "0"], args].concat();
        let stderr = fails(&all, 2, "found it as the flag's last value").stderr;
        assert!(stderr.starts_with(&format!("error: {flag}: expected MODEL")), "{stderr}");
        assert!(!stderr.contains("secret"), "{stderr}");
    };
    refused(&["--served-model-name", "gpt-oss-20b", &small], "--served-model-name");
    refused(&["--served-model-name", &small], "--served-model-name");
    refused(&["--served-model-name", "a", "openai/gpt-oss-20b"], "--served-model-name");
    refused(&["--api-key", "secret", &small], "--api-key");
    refused(&["--admin_api_key", "secret", "openai/gpt-oss-20b"], "--admin-api-key");
    refused(&["--cudagraph-capture-sizes", "1", "2", &small], "--cudagraph-capture-sizes");
    // Where the model is, or where the value is clearly the flag's, nothing is refused.
    let folder = tempfile::tempdir().unwrap();
    let names = ["--served-model-name", "a", "b/c"];
    let server = Scripted::run(folder, &[&["--device", "cpu", &small], &names[..]].concat());
    server.logged(&format!("ready: {small} at http://{}, CPU", server.address));
    assert!(!server.log().contains("no MODEL was given"), "{}", server.log());
    let folder = tempfile::tempdir().unwrap();
    let names = ["--served-model-name", "b/c", "--api-key=x/y"];
    let server = Scripted::run(folder, &[&["--device", "cpu"], &names[..]].concat());
    assert!(server.log().contains("WARN nibble::commands::serve: no MODEL was given"), "{}", server.log());
}

/// Tokens of some requests without a seed, one after the other.
fn drawn(server: &Scripted) -> Vec<Value> {
    let ask = |prompt: &str| {
        let request =
            json!({"prompt": prompt, "max_tokens": 8, "ignore_eos": true, "return_token_ids": true});
        let (status, body) = server.post("/v1/completions", &request);
        assert_eq!(status, 200, "{body}");
        serde_json::from_str::<Value>(&body).unwrap()["choices"][0]["token_ids"].clone()
    };
    ["Once", "Once", "Upon", "Once", "a time", "Upon"].map(ask).to_vec()
}

#[test]
fn several_engines_answer_like_one() {
    let start = |replicas: &str| {
        let args = ["--device", "cpu", "--threads", "2", "--seed", "7", "-dp", replicas];
        Scripted::run(tempfile::tempdir().unwrap(), &args)
    };
    let (one, two) = (start("1"), start("2"));
    let expected = drawn(&one);
    assert_ne!(expected[0], expected[1]);
    assert_eq!(drawn(&two), expected);
    let took = |engine: usize| {
        let labels = format!("{{model_name=\"tiny-gpt-oss\",engine=\"{engine}\"}}");
        two.metric(&format!("vllm:request_params_n_count{labels}"))
    };
    assert_eq!((took(0), took(1)), (3.0, 3.0));
    assert_eq!(two.log().matches("ready: ").count(), 2);
}

#[test]
fn flags_say_what_answers_are_like() {
    let folder = tempfile::tempdir().unwrap();
    let text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f \
                <|constrain|>json<|message|>{\"x\": \"one\"}<|call|>";
    let encoded = crate::ok(&["tokens", "encode", "--allow-special", "--text", text, "--json"]).json();
    let script = folder.path().join("script.json");
    std::fs::write(&script, json!({"default": {"tokens": encoded["ids"]}}).to_string()).unwrap();
    let engine = format!("scripted:{}", script.display());
    let flags = ["-dp", "2", "--trust-routing-headers", "--logprobs-scope", "final", "--tool-strict-level"];
    let json = [
        "parameter",
        "--structured-outputs-config",
        r#"{"backend": "xgrammar", "disable_any_whitespace": true, "disable_additional_properties": true}"#,
    ];
    let server = Scripted::run(folder, &[&["--engine", &engine], &flags[..], &json].concat());
    let parameters = json!({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]});
    let request = json!({
        "messages": hi()["messages"], "logprobs": true, "max_tokens": 60,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    });
    let (status, body) = server.post("/v1/chat/completions", &request);
    assert_eq!(status, 200, "{body}");
    let choice = serde_json::from_str::<Value>(&body).unwrap()["choices"][0].clone();
    assert_eq!(choice["message"]["reasoning"], "Hm.");
    assert_eq!(choice["logprobs"]["content"], json!([]), "nothing is in the final channel");
    let arguments = choice["message"]["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
    assert!(arguments.starts_with("{\"x\":") && !arguments.contains("one"), "{arguments}");
    assert!(!arguments.contains([' ', ',']), "{arguments}");
    let headers = format!("{JSON}X-data-parallel-rank: 2\r\n");
    let (status, body) =
        server.request("POST", "/v1/chat/completions", &headers, hi().to_string().as_bytes());
    assert!(status == 400 && body.contains("must be 0 to 1"), "{body}");
}

#[test]
fn several_engines_play_scripts() {
    let server = Scripted::start(&["--data_parallel_size=3"]);
    for _ in 0..3 {
        let (status, body) = server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2}));
        assert!(status == 200 && body.contains("hello world"), "{body}");
    }
    for engine in 0..3 {
        let labels = format!("{{model_name=\"scripted\",engine=\"{engine}\"}}");
        assert_eq!(server.metric(&format!("vllm:generation_tokens_total{labels}")), 2.0);
    }
}

#[test]
fn the_tokenizer_of_another_folder_or_of_the_hub() {
    let (folder, small) = (tempfile::tempdir().unwrap(), crate::small());
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        std::os::unix::fs::symlink(std::path::Path::new(&small).join(file), model.join(file)).unwrap();
    }
    let model = model.to_str().unwrap().to_owned();
    fails(&["serve", "--port", "0", &model], 2, "expected a tokenizer.json for a vocabulary of 4096 tokens");
    fails(&["serve", "--port", "0", &model, "--tokenizer", &model], 2, "expected a tokenizer.json");
    let file = format!("{small}/tokenizer.json");
    let expected = crate::ok(&["tokens", "encode", "--text", "hello", "--model", &small]).json();
    // On the hub, that is, in its cache.
    let cached = folder.path().join("models--owner--name");
    std::fs::create_dir_all(cached.join("refs")).unwrap();
    std::fs::create_dir_all(cached.join("snapshots/abc")).unwrap();
    std::fs::write(cached.join("refs/v2"), "abc").unwrap();
    std::os::unix::fs::symlink(&file, cached.join("snapshots/abc/tokenizer.json")).unwrap();
    let cache = folder.path().to_str().unwrap();
    let on_hub = ["--tokenizer", "owner/name", "--download-dir", cache, "--tokenizer-revision"];
    fails(
        &[&["serve", "--port", "0", &model], &on_hub[..], &["v1"]].concat(),
        2,
        "owner/name: not in the cache",
    );
    for tokenizer in
        [vec!["--tokenizer", &small], vec!["--tokenizer", &file], [&on_hub[..], &["v2"]].concat()]
    {
        let all = [&[&model, "--device", "cpu"], &tokenizer[..]].concat();
        let server = Scripted::run(tempfile::tempdir().unwrap(), &all);
        let (status, body) =
            server.post("/tokenize", &json!({"prompt": "hello", "add_special_tokens": false}));
        assert_eq!(status, 200, "{body}");
        let tokens: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(tokens["tokens"], expected["ids"]);
    }
}

#[test]
fn fields_of_a_models_configuration_can_be_set() {
    let small = crate::small();
    for model in [&[][..], &[small.as_str()]] {
        let all =
            [model, &["--device", "cpu", "--hf-overrides", r#"{"max_position_embeddings": 128}"#]].concat();
        let server = Scripted::run(tempfile::tempdir().unwrap(), &all);
        let models: Value = serde_json::from_str(&server.request("GET", "/v1/models", "", b"").1).unwrap();
        assert_eq!(models["data"][0]["max_model_len"], 128);
    }
    let fails = |json: &str, named: &str| {
        fails(&["serve", "--port", "0", &small, "--hf-overrides", json], 2, named);
    };
    fails("[1]", "--hf-overrides");
    fails(r#"{"num_hidden_layers": 5}"#, "layer");
    fails(r#"{"hidden_size": "wide"}"#, "hidden_size");
}

#[test]
fn sampling_defaults_come_from_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let missing = "generation_config.json: expected the defaults of generation, found no such file";
    fails(&["serve", "--port", "0", "--generation-config", path], 2, missing);
    let defaults =
        json!({"temperature": 0.5, "top_p": 0.75, "top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5});
    std::fs::write(folder.path().join("generation_config.json"), defaults.to_string()).unwrap();
    let flags = ["--generation-config", path, "--override-generation-config"];
    let server = Scripted::start(&[&flags[..], &[r#"{"top_p": 1, "repetition_penalty": 2}"#]].concat());
    let (status, body) = server.post("/v1/completions/render", &json!({"prompt": "x"}));
    assert_eq!(status, 200, "{body}");
    let found = serde_json::from_str::<Value>(&body).unwrap()["sampling_params"].clone();
    for (name, value) in
        [("temperature", 0.5), ("top_p", 1.0), ("top_k", 7.0), ("min_p", 0.25), ("repetition_penalty", 2.0)]
    {
        assert_eq!(found[name].as_f64(), Some(value), "{name}");
    }
    let text = server.request("GET", "/metrics", "", b"").1;
    let cache = text.lines().find(|line| line.starts_with("vllm:cache_config_info")).unwrap();
    assert!(cache.contains("cache_dtype=\"auto\",enable_prefix_caching=\"True\"} 1"), "{cache}");
}

#[test]
fn a_file_of_flags_and_the_environment() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.yaml");
    std::fs::write(&file, "served-model-name: [from-file, second]\napi_key: [in-file]\nmodel-owner: file\n")
        .unwrap();
    let server = Scripted::start(&["--config", file.to_str().unwrap(), "--model-owner", "line"]);
    let (status, body) = server.request("GET", "/v1/models", "Authorization: Bearer in-file\r\n", b"");
    assert_eq!(status, 200, "{body}");
    let models: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&models["data"][0]["id"], &models["data"][1]["id"]), (&json!("from-file"), &json!("second")));
    assert_eq!(models["data"][0]["owned_by"], "line");

    let keys = folder.path().join("keys");
    std::fs::write(&keys, "one\n\n two \n").unwrap();
    let server = Scripted::start(&["--api-key-file", keys.to_str().unwrap()]);
    let status =
        |key: &str| server.request("GET", "/v1/models", &format!("Authorization: Bearer {key}\r\n"), b"").0;
    assert_eq!((status("one"), status("two"), status("three")), (200, 200, 401));
}

#[test]
fn variables_that_say_nothing_to_this_server_do_not_count() {
    let serve = |variables: &[(&str, &str)]| {
        let folder = tempfile::tempdir().unwrap();
        let mut command = nibble(&["serve", "--port", "0"]);
        command.args(["--device", "cpu"]).envs(variables.iter().copied());
        Scripted::spawn(folder, command)
    };
    // 192.0.2.1 is in a range that no machine has.
    let others = [
        ("VLLM_HOST_IP", "192.0.2.1"),
        ("VLLM_PORT", "tcp://10.0.0.1:8000"),
        ("VLLM_MAX_N_SEQUENCES", "16384"),
        ("VLLM_LOGGING_LEVEL", "INFO"),
    ];
    let server = serve(&others);
    let log = server.log();
    let line = log.lines().find(|line| line.contains("ignored for compatibility")).unwrap();
    for (variable, _) in &others[..3] {
        assert!(line.contains(&format!("{variable} (")), "{line}");
    }
    assert!(server.address.starts_with("127.0.0.1:"), "{}", server.address);
    let empty = [
        "VLLM_HOST_IP",
        "VLLM_PORT",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
        "VLLM_HTTP_MAX_REQUEST_BODY_SIZE",
        "VLLM_LOGGING_LEVEL",
        "VLLM_API_KEY",
        "VLLM_MAX_N_SEQUENCES",
        "VLLM_ENGINE_READY_TIMEOUT_S",
        "VLLM_SYSTEM_START_DATE",
    ]
    .map(|name| (name, ""));
    let server = serve(&empty);
    assert!(!server.log().contains("ignored for compatibility"), "{}", server.log());
    assert_eq!(server.request("GET", "/v1/models", "", b"").0, 200);
    assert_eq!(serve(&[("VLLM_HOST_IP", "127.0.0.2")]).address.split(':').next(), Some("127.0.0.2"));
    for (variable, value) in [("VLLM_PORT", "http"), ("VLLM_LOGGING_LEVEL", "LOUD")] {
        let output = nibble(&["serve"]).env(variable, value).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.starts_with(&format!("error: {variable}: invalid value '{value}'")), "{stderr}");
    }
}

#[test]
fn a_revision_of_a_model_on_the_hub() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("models--owner--name");
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::create_dir_all(model.join("snapshots")).unwrap();
    std::fs::write(model.join("refs/v2"), "abc").unwrap();
    std::os::unix::fs::symlink(crate::small(), model.join("snapshots/abc")).unwrap();
    let serve = |revision: &str| {
        let cache = folder.path().to_str().unwrap();
        let mut command = nibble(&["serve", "owner/name", "--port", "0", "--revision", revision]);
        command.args(["--download-dir", cache, "--hf-token", "secret"]);
        command.env("HF_HUB_CACHE", "/nowhere");
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let output = serve("v1").wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("owner/name"));

    let mut child = serve("v2");
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let _ = child.kill();
    let _ = child.wait();
    assert!(line.starts_with("http://127.0.0.1:"), "{line}");
}

#[test]
fn a_hub_may_have_an_authority_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("script.json");
    std::fs::write(&script, json!({"default": {"tokens": [24_912]}}).to_string()).unwrap();
    let engine = format!("scripted:{}", script.display());
    let tls = |file: &str| crate::path(&format!("testdata/tls/{file}"));
    let (key, certificate) = (tls("server.key"), tls("server.pem"));
    let mut server = nibble(&["serve", "--port", "0", "--engine", &engine])
        .args(["--ssl-keyfile", &key, "--ssl-certfile", &certificate])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let endpoint = line.trim().replace("127.0.0.1", "localhost");
    assert!(endpoint.starts_with("https://"), "{line}");
    for (variable, expected) in [
        ("OTHER", "UnknownIssuer"),
        ("SSL_CERT_FILE", "the hub knows no such model"),
        ("REQUESTS_CA_BUNDLE", "the hub knows no such model"),
    ] {
        let mut command = nibble(&["inspect", "owner/name"]);
        command.env("HF_ENDPOINT", &endpoint).env("HF_HOME", folder.path()).env_remove("HF_HUB_OFFLINE");
        command.env_remove("SSL_CERT_FILE").env_remove("REQUESTS_CA_BUNDLE").env(variable, tls("root.pem"));
        for proxy in ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"] {
            command.env_remove(proxy);
        }
        let output = command.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(expected), "{variable}: {stderr}");
    }
    let _ = server.kill();
    let _ = server.wait();
}

#[test]
#[cfg(target_os = "linux")]
fn a_client_that_goes_away_ends_nobody_else() {
    // A write to a connection that was reset raises SIGPIPE, whose default is the end of the process. The moment cannot be
    // forced; whether the signal is ignored can be seen.
    let server = Scripted::start(&[]);
    assert_eq!(server.request("GET", "/health", "", b"").0, 200);
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
    assert_eq!(ignored >> (libc::SIGPIPE - 1) & 1, 1, "{status}");
}

#[test]
fn a_server_that_was_killed_is_there_again() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let run = || {
        let mut child = nibble(&["serve", "--uds", socket.to_str().unwrap()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), format!("unix:{}", socket.display()));
        child
    };
    let ask = || {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        stream
            .write_all(&message("POST", "/v1/chat/completions", JSON, hi().to_string().as_bytes()))
            .unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    let mut first = run();
    while !ask().starts_with("HTTP/1.1 200") {}
    // In the middle of an answer.
    let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    let long = json!({"prompt": "Once", "max_tokens": 4000, "ignore_eos": true, "stream": true}).to_string();
    stream.write_all(&message("POST", "/v1/completions", JSON, long.as_bytes())).unwrap();
    let mut some = [0; 300];
    assert!(stream.read(&mut some).unwrap() > 0);
    first.kill().unwrap();
    first.wait().unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    // The socket that it has left behind is no obstacle.
    let mut second = run();
    while !ask().starts_with("HTTP/1.1 200") {}
    second.kill().unwrap();
    second.wait().unwrap();
}

#[test]
fn a_profile_comes_when_the_server_ends() {
    let mut server = Scripted::run(tempfile::tempdir().unwrap(), &["--profile"]);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2})).0, 200);
    server.signal(libc::SIGTERM);
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    let log = server.log();
    assert!(log.contains("query, key, value ") && log.contains(" × "), "{log}");
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut server = Scripted::start(&["--shutdown-timeout", "3600"]);
    let mut stream = server.connect();
    let endless =
        json!({"prompt": "x", "max_tokens": 100_000, "ignore_eos": true, "stream": true}).to_string();
    stream.write_all(&message("POST", "/v1/completions", JSON, endless.as_bytes())).unwrap();
    let mut some = [0; 300];
    assert!(stream.read(&mut some).unwrap() > 0);
    server.signal(libc::SIGTERM);
    // It takes nothing new, and goes on with what runs.
    server.logged("shutting down: what runs may finish");
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 1})).0, 503);
    assert!(server.child.try_wait().unwrap().is_none());
    server.signal(libc::SIGTERM);
    assert_eq!(server.child.wait().unwrap().code(), Some(130));
}
