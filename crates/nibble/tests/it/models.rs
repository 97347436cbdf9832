//! `demo`, `generate`, `chat`, `eval`, `bench`, `doctor`, `serve`: what runs a model.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};

use serde_json::{Value, json};

use crate::{copy_model, fails, ids, nibble, ok, path, root, run_with_input, small};

#[test]
fn the_demo_does_the_whole_job() {
    let shown = ok(&["demo", "--threads", "1"]).stdout;
    for line in [
        "; 1 thread of this CPU",
        "393,216 of 393,216 blocks lossless, 0 values changed",
        "identical, 71 tensors",
        "17 + 25 = 42.",
        "The capital of France is Paris.",
        "get_weather {",
        "nibble quantize openai/gpt-oss-20b",
    ] {
        assert!(shown.contains(line), "{line:?} is not in\n{shown}");
    }
    let row =
        |name: &str| shown.lines().find(|l| l.contains(name)).unwrap().split_whitespace().collect::<Vec<_>>();
    assert!(row("NVFP4, cast").contains(&"0.000000"), "{shown}");
    assert!(!row("NVFP4, usual way").contains(&"0.000000"), "{shown}");
}

#[test]
fn the_demo_for_scripts() {
    let found = ok(&["demo", "--json"]).json();
    assert_eq!((&found["identical"], &found["changed_values"]), (&true.into(), &0.into()));
    assert_eq!(found["quantized"][0]["divergence"]["kl_mean"], 0.0);
    assert_eq!(found["answers"][2]["answer"]["tool_calls"][0]["name"], "get_weather");
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let demo = |end: &dyn Fn(&Child)| {
        let mut child =
            nibble(&["demo"]).env("TMPDIR", folder.path()).stdout(Stdio::piped()).spawn().unwrap();
        // When the first step begins, its folder is there.
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("Quantize")));
        end(&child);
        drop(lines);
        let code = child.wait().unwrap().code();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        code
    };
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: a signal to a child that has not been waited for.
        let send = |child: &Child| assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
        assert_eq!(demo(&send), Some(130));
    }
    // Its output is closed.
    demo(&|_| {});
}

fn interrupt(child: &Child) {
    // SAFETY: a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
}

#[test]
fn greedy_answers_are_the_references() {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(root("testdata/model/tiny-gpt-oss.json")).unwrap()).unwrap();
    let prompts: Vec<&Value> = match &golden["prompts"] {
        Value::Object(map) => map.values().collect(),
        Value::Array(list) => list.iter().collect(),
        other => panic!("{other}"),
    };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    let lines: String =
        prompts.iter().map(|p| format!("{}\n", json!({"prompt_token_ids": p["ids"]}))).collect();
    std::fs::write(&file, lines).unwrap();
    for quantization in ["auto", "nvfp4"] {
        let args = [
            "generate",
            &small(),
            "--prompts",
            file.to_str().unwrap(),
            "--temperature",
            "0",
            "--max-tokens",
            "64",
            "--json",
            "--quantization",
            quantization,
        ];
        let found = ok(&args).json();
        for (output, prompt) in found["outputs"].as_array().unwrap().iter().zip(&prompts) {
            let greedy = ids(&prompt["greedy"]);
            let stop = prompt["first_stop"].as_u64().map_or(greedy.len(), |at| at as usize + 1);
            assert_eq!(output["prompt_token_ids"], prompt["ids"]);
            assert_eq!(ids(&output["choices"][0]["token_ids"]), greedy[..stop], "{quantization}");
        }
    }
}

#[test]
fn chats_have_reasoning_content_and_logprobs() {
    let args = [
        "generate",
        "--chat",
        "-p",
        "What is 2 + 2?",
        "-p",
        "What is the capital of France?",
        "--temperature",
        "0",
        "--logprobs",
        "2",
        "--json",
    ];
    let found = ok(&args).json();
    let choice = &found["outputs"][1]["choices"][0];
    assert_eq!(choice["content"], "The capital of France is Paris.");
    assert!(choice["reasoning"].as_str().unwrap().contains("France"));
    assert_eq!(choice["finish_reason"], "stop");
    let (tokens, logprobs) = (ids(&choice["token_ids"]), choice["logprobs"].as_array().unwrap());
    assert_eq!(tokens.len(), logprobs.len());
    for (token, entry) in tokens.iter().zip(logprobs) {
        assert_eq!(entry["id"].as_u64(), Some(*token));
        assert_eq!(entry["top"].as_array().unwrap().len(), 2);
        assert_eq!(entry["top"][0]["id"], entry["id"], "greedy takes the best");
    }
    assert_eq!(found["completion_tokens"].as_u64().unwrap() as usize, {
        let counts =
            found["outputs"].as_array().unwrap().iter().map(|o| ids(&o["choices"][0]["token_ids"]).len());
        counts.sum::<usize>()
    });
}

#[test]
fn experts_that_stayed_in_bf16_are_rounded_by_max_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (source, mixed, rounded) = (crate::bf16(), path("mixed"), path("rounded"));
    let linear = ["--recipe", "linear", "--algorithm", "max", "--activations", "nvfp4"];
    let few = ["--format", "compressed-tensors", "--calibration-tokens", "64"];
    ok(&[&["quantize", &source, "--out", &mixed][..], &linear, &few].concat());
    ok(&["quantize", &mixed, "--out", &rounded, "--algorithm", "cast"]);
    let nll = |model: &str, quantization: &str| {
        let text = crate::path("testdata/data/books-valid.txt");
        let args =
            ["eval", model, "perplexity", "--text", &text, "--context", "64", "--windows", "1", "--json"];
        ok(&[&args[..], &["--quantization", quantization]].concat()).json()["nll"].as_f64().unwrap()
    };
    assert_eq!(nll(&mixed, "nvfp4"), nll(&rounded, "auto"));
    assert_ne!(nll(&mixed, "nvfp4"), nll(&mixed, "auto"));
    let with_inputs = ["--quantization", "nvfp4", "--activations", "nvfp4"];
    fails(&[&["generate", &mixed, "-p", "x"], &with_inputs[..]].concat(), 2, "expected experts in NVFP4");
}

#[test]
fn a_line_of_prompts_is_taken_whole_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    let file = file.to_str().unwrap();
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "low",
        "date": "2025-06-28", "tools": [{"type": "function", "function": {"name": "f", "description": "Adds."}}]});
    std::fs::write(file, format!("{chat}\n")).unwrap();
    // A flag is for lines that do not say.
    let one = ["--max-tokens", "1", "--reasoning-effort", "high", "--json"];
    let found = ok(&[&["generate", "--prompts", file][..], &one].concat()).json();
    let rendered = ok(&["harmony", "render", "--model", &small(), file]).json();
    assert_eq!(found["outputs"][0]["prompt_token_ids"], rendered["ids"]);

    for (line, named) in [
        (json!({"prompt": "a", "messages": chat["messages"]}), "found prompt and messages"),
        (json!({"text": "a"}), "found another document"),
        (json!({"messages": chat["messages"], "tools": "f"}), "line 2: messages: invalid type"),
    ] {
        std::fs::write(file, format!("\"a\"\n{line}\n")).unwrap();
        fails(&["generate", "--prompts", file], 2, named);
    }
    // What only the model's vocabulary and the chat format know, too.
    let nobody = json!({"messages": [{"role": "nobody", "content": "Hi"}]});
    for (line, named) in [
        (nobody, "prompts.jsonl: line 3: messages.0.role: "),
        (json!([1, 4096]), "prompts.jsonl: line 3: Token id 4096"),
    ] {
        std::fs::write(file, format!("\"a\"\n\n{line}\n")).unwrap();
        fails(&["generate", "--prompts", file], 2, named);
    }
    fails(&["generate", "-p", "a", "-p", ""], 2, "prompt 2: The prompt is empty.");
}

#[test]
fn a_seed_repeats_and_n_answers_differ() {
    let args =
        ["generate", "-p", "Once upon a time", "--max-tokens", "24", "--seed", "7", "--n", "3", "--json"];
    let (first, second) = (ok(&args).json(), ok(&args).json());
    assert_eq!(first["outputs"], second["outputs"]);
    let texts: std::collections::BTreeSet<String> =
        first["outputs"][0]["choices"].as_array().unwrap().iter().map(|c| c["text"].to_string()).collect();
    assert_eq!(texts.len(), 3);
    // A special token in a raw prompt is one token, in a message it is text.
    let raw = ok(&["generate", "-p", "<|start|>", "--max-tokens", "1", "--json"]).json();
    assert_eq!(raw["outputs"][0]["prompt_token_ids"], json!([4086]));
    let stopped = ok(&[
        "generate",
        "--chat",
        "-p",
        "What is the capital of France?",
        "--temperature",
        "0",
        "--stop",
        "France is",
        "--json",
    ]);
    assert_eq!(stopped.json()["outputs"][0]["choices"][0]["content"], "The capital of ");
}

#[test]
fn a_conversation_goes_on_until_its_input_ends() {
    let questions = "What is 2 + 2?\nWhat is the capital of France?\n\nnever asked\n";
    let outcome = run_with_input(&["chat", "--temperature", "0", "--json"], questions.as_bytes());
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    let turns: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let contents: Vec<&str> = turns.iter().map(|turn| turn["content"].as_str().unwrap()).collect();
    assert_eq!(contents, ["2 + 2 = 4.", "The capital of France is Paris."]);
    // People see the reasoning and the answer on lines of their own, here also where the answer is cut off.
    let shown = |more: &[&str]| {
        let outcome = run_with_input(&[&["chat", "--temperature", "0"], more].concat(), b"What is 2 + 3?\n");
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        outcome.stdout
    };
    let whole = shown(&[]);
    let (reasoning, answer) = whole.split_once('\n').unwrap();
    assert!(reasoning.starts_with("reasoning ") && reasoning.ends_with('.'), "{whole}");
    assert_eq!(answer, "answer    2 + 3 = 5.\n");
    assert_eq!(ok(&["generate", "--chat", "-p", "What is 2 + 3?", "--temperature", "0"]).stdout, whole);
    let cut = shown(&["--max-tokens", "6"]);
    assert!(cut.ends_with('\n') && whole.starts_with(cut.trim_end()), "{cut}");
}

#[test]
fn a_conversation_that_outgrows_the_context_goes_on_without_its_oldest_turns() {
    let questions = "What is 2 + 2?\n".repeat(12);
    let args = ["chat", "--temperature", "0", "--max-model-len", "250", "--max-tokens", "40", "--json"];
    let outcome = run_with_input(&args, questions.as_bytes());
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    assert_eq!(outcome.stdout.lines().count(), 12);
    assert!(outcome.stderr.contains("longer than the context of 250 tokens"), "{}", outcome.stderr);
    // A question that is too long by itself is bad input.
    let endless = format!("Hi\n{}\n", "2 + 2 + ".repeat(300));
    let outcome = run_with_input(&args, endless.as_bytes());
    assert!(outcome.status == 2 && outcome.stderr.contains("250 tokens"), "{}", outcome.stderr);
}

#[test]
fn an_interrupt_ends_a_conversation_that_waits_for_a_question() {
    let chat = ["chat", "--temperature", "0", "--json"];
    let mut child = nibble(&chat).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut questions = child.stdin.take().unwrap();
    questions.write_all(b"What is 2 + 2?\n").unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(answers.next().unwrap().unwrap().contains("2 + 2 = 4."));
    interrupt(&child);
    // Its input goes on.
    assert_eq!(child.wait().unwrap().code(), Some(130));
    drop(questions);
}

#[test]
fn a_conversation_for_scripts_prompts_nobody_on_a_terminal() {
    let (mut terminal, mut end) = (0, 0);
    let (name, modes, size) = (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the first two are written, and are files that nobody else closes; the rest may be null.
    let (mut terminal, end) = unsafe {
        assert_eq!(libc::openpty(&raw mut terminal, &raw mut end, name, modes, size), 0);
        (File::from_raw_fd(terminal), OwnedFd::from_raw_fd(end))
    };
    terminal.write_all(b"What is 2 + 2?\n\n").unwrap();
    let output = nibble(&["chat", "--temperature", "0", "--json"]).stdin(end).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let turn: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(turn["content"], "2 + 2 = 4.");
}

#[test]
fn packed_weights_on_disk_answer_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("packed");
    let cached = ["--packed-cache", file.to_str().unwrap()];
    let answer = |more: &[&str]| {
        let args = ["generate", "-p", "What is 2 + 2?", "--chat", "--temperature", "0", "--json", "--quiet"];
        let outcome = ok(&[&args[..], more].concat());
        outcome.json()["outputs"].clone()
    };
    let expected = answer(&[]);
    assert_eq!(answer(&cached), expected);
    assert_eq!(answer(&cached), expected);
    std::fs::File::options().write(true).open(&file).unwrap().set_len(1000).unwrap();
    let args = ["generate", "-p", "a", "--max-tokens", "1"];
    let noted = ok(&[&args[..], &cached].concat()).stderr;
    assert!(noted.contains("packed: expected") && noted.contains("packed anew"), "{noted}");

    std::fs::write(&file, "mine").unwrap();
    fails(&[&args[..], &cached].concat(), 2, "packed: expected no file, or one of packed weights");
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let piped = ["--packed-cache", pipe.to_str().unwrap()];
    fails(&[&args[..], &piped].concat(), 2, "pipe: expected no file, or one of packed weights");
    let synthetic = ["bench", "--synthetic", "gpt-oss-20b:1", "--packed-cache", "x"];
    fails(&synthetic, 2, "expected the weights of files");
}

#[test]
fn measurements() {
    let text = path("testdata/data/books-valid.txt");
    let found = ok(&["eval", &small(), "perplexity", "--text", &text, "--windows", "2", "--json"]).json();
    let golden: Value =
        serde_json::from_slice(&std::fs::read(root("testdata/model/tiny-gpt-oss.json")).unwrap()).unwrap();
    let windows = golden["perplexity"]["mean_nll_per_window"].as_array().unwrap();
    let expected = (windows[0].as_f64().unwrap() + windows[1].as_f64().unwrap()) / 2.0;
    assert!((found["nll"].as_f64().unwrap() - expected).abs() < 1e-4, "{found}");
    assert_eq!(found["tokens"], 2 * 1023);

    let ids = path("testdata/data/conversations-valid.jsonl");
    let found = ok(&[
        "eval",
        &bf16(),
        "divergence",
        "--reference",
        &bf16(),
        "--ids",
        &ids,
        "--windows",
        "1",
        "--json",
    ]);
    assert_eq!(found.json()["kl_mean"], 0.0);
    let packed = ok(&[
        "eval",
        &bf16(),
        "divergence",
        "--reference",
        &bf16(),
        "--ids",
        &ids,
        "--windows",
        "1",
        "--quantization",
        "nvfp4",
        "--json",
    ]);
    assert!(packed.json()["kl_mean"].as_f64().unwrap() > 0.0);

    let folder = tempfile::tempdir().unwrap();
    let conversations = folder.path().join("chats.jsonl");
    let chat = json!({"messages": [{"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "reasoning": "We need 2 + 2. That is 4.", "content": "2 + 2 = 4."}]});
    std::fs::write(&conversations, format!("{chat}\n")).unwrap();
    let found =
        ok(&["eval", &small(), "perplexity", "--conversations", conversations.to_str().unwrap(), "--json"]);
    assert_eq!(found.json()["windows"], 1);

    let bench =
        ok(&["bench", &small(), "-p", "32", "-n", "4", "-b", "1,3", "-d", "0,100", "-r", "2", "--json"]);
    let bench = bench.json();
    assert!(bench["bandwidth_bytes_per_second"].as_f64().unwrap() > 0.0);
    let rows: Vec<(&str, u64, u64)> = bench["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| (r["test"].as_str().unwrap(), r["batch"].as_u64().unwrap(), r["depth"].as_u64().unwrap()))
        .collect();
    let expected =
        [0, 100].map(|depth| [("pp32", 1, depth), ("pp32", 3, depth), ("tg4", 1, depth), ("tg4", 3, depth)]);
    assert_eq!(rows, expected.concat());
    let found = ok(&["doctor", "--json"]).json();
    assert!(found["passed"].as_bool().unwrap());
    assert!(found["gpus"].is_array(), "{}", found["gpus"]);
    // The same bits on every machine; half and twice leave room for another order of sums.
    let coarser = found["coarser"].as_array().unwrap();
    assert_eq!(coarser.len(), 7);
    for (row, (options, usual)) in coarser.iter().zip([
        ("--kv-cache-dtype bf16", 4.6e-3),
        ("--kv-cache-dtype fp8", 3.6e-2),
        ("--activations bf16", 6.8e-3),
        ("--activations int16", 2.5e-5),
        ("--activations int8", 7.3e-3),
        ("--weights fast", 2.0e-2),
        ("--weights fast --activations int8", 2.1e-2),
    ]) {
        assert_eq!(row["options"], options);
        let error = row["error"].as_f64().unwrap();
        assert!(error < 2.0 * usual && error > usual / 2.0, "{options}: {error:e}");
    }
}

#[test]
fn what_is_measured_is_counted_as_scored_and_named_when_it_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let (small, file) = (small(), folder.path().join("data.jsonl"));
    let file = file.to_str().unwrap();
    let measured = |flag| ["eval", &small, "perplexity", flag, file];
    // A line of one token has nothing to score, and is no window.
    std::fs::write(file, "[1]\n[2]\n[1, 2, 3]\n[4, 5]\n").unwrap();
    let found = ok(&[&measured("--ids")[..], &["--windows", "1", "--json"]].concat()).json();
    assert_eq!((&found["windows"], &found["tokens"]), (&json!(1), &json!(2)));
    fails(&[&measured("--ids")[..], &["--windows", "0"]].concat(), 2, "--windows");

    for (flag, text, named) in [
        ("--ids", "[1]\n", "data.jsonl: expected a line of at least two tokens"),
        ("--ids", "[1, 2]\n[1, 4096]\n", "data.jsonl: line 2: expected ids below 4096, found 4096"),
        ("--conversations", "[4086, 2]\n", "data.jsonl: line 1: invalid type: sequence, expected a map"),
        ("--conversations", "{\"messages\": [[\"user\", \"hi\"]]}\n", "expected a map"),
        ("--text", "A word.", "data.jsonl: expected at least one window of 1024 tokens, found"),
    ] {
        std::fs::write(file, text).unwrap();
        let refused = fails(&measured(flag), 2, named);
        assert_eq!(refused.stderr.contains("--context"), flag == "--text", "{}", refused.stderr);
    }

    // The reference is looked at before anything is read or loaded.
    let against = |reference| ["eval", &small, "divergence", "--reference", reference, "--ids", file];
    std::fs::write(file, "[1, 2, 3, 4, 5, 6, 7, 8, 9]\n").unwrap();
    let shorter = folder.path().join("shorter");
    copy_model(&small, &shorter);
    let config = std::fs::read_to_string(shorter.join("config.json")).unwrap();
    let config = config.replace("\"max_position_embeddings\": 131072", "\"max_position_embeddings\": 8");
    std::fs::write(shorter.join("config.json"), config).unwrap();
    fails(&against(shorter.to_str().unwrap()), 2, "line 1: expected at most 8 tokens");
    std::fs::remove_file(file).unwrap();
    fails(&against("no-such-folder"), 2, "no-such-folder");
}

fn bf16() -> String {
    crate::bf16()
}

/// A server on a free port, ended when dropped.
struct Serving {
    child: std::process::Child,
    address: String,
}

impl Serving {
    fn start(args: &[&str]) -> Serving {
        let mut child = nibble(&[&["serve", "--port", "0"], args].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().trim_start_matches("http://").to_owned();
        Serving { child, address }
    }

    /// Status and body of a request; asks again while the model loads.
    fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
        loop {
            let mut stream = TcpStream::connect(&self.address).unwrap();
            let length = body.len();
            write!(
                stream,
                "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
                 Content-Length: {length}\r\n{headers}\r\n{body}"
            )
            .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
            let body = answer.split_once("\r\n\r\n").unwrap().1.to_owned();
            if status != 503 {
                return (status, body);
            }
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_profile_names_the_kernels_whatever_the_command() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("logits.safetensors");
    let (small, text) = (small(), path("testdata/data/books-valid.txt"));
    let named = |stderr: &str| {
        let line = stderr.lines().find(|line| line.trim_start().starts_with("query, key, value "));
        assert!(line.is_some_and(|line| line.contains(" × ") && line.ends_with(" ms")), "{stderr}");
    };
    for args in [
        &["generate", &small, "-p", "Once", "--max-tokens", "3"][..],
        &["logits", &small, "--ids", "1,2,3", "--out", out.to_str().unwrap()],
        &["eval", &small, "perplexity", "--text", &text, "--context", "16", "--windows", "1"],
    ] {
        let done = ok(&[args, &["--profile", "--json"]].concat());
        named(&done.stderr);
        assert!(done.json().is_object());
    }
    named(&run_with_input(&["chat", "--profile", "--max-tokens", "3"], b"Hi\n").stderr);
    assert!(!ok(&["generate", &small, "-p", "Once", "--max-tokens", "3"]).stderr.contains('×'));
}

#[test]
fn the_server_answers_and_ends_on_sigterm() {
    let key = "Authorization: Bearer one\r\n";
    let mut server = Serving::start(&[
        "--api_key",
        "one",
        "two",
        "--served-model-name",
        "small",
        "--max_model_len=1k",
        "--trust-remote-code",
        "--tensor-parallel-size",
        "1",
        "--quantization",
        "nvfp4",
    ]);
    let (status, body) = server.request("GET", "/v1/models", key, "");
    assert_eq!(status, 200, "{body}");
    let models: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["max_model_len"]),
        (&"small".into(), &1000.into())
    );
    assert_eq!(server.request("GET", "/v1/models", "", "").0, 401);
    assert_eq!(server.request("GET", "/health", "", "").0, 200);
    let request = json!({"model": "small", "temperature": 0,
        "messages": [{"role": "user", "content": "What is the capital of France?"}]});
    let (status, body) = server.request("POST", "/v1/chat/completions", key, &request.to_string());
    assert_eq!(status, 200, "{body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "The capital of France is Paris.");
    // SAFETY: a signal to a child that has not been waited for.
    unsafe { libc::kill(server.child.id() as i32, libc::SIGTERM) };
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_scripted_server_says_what_it_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("script.json");
    // `<|channel|>final<|message|>Hi<|return|>`, and without a header for another seed.
    let script = json!({
        "default": {"tokens": [200_005, 17_196, 200_008, 12_194, 200_002]},
        "7": {"tokens": [24_912, 2_375, 200_002], "delays_ms": [1, 2], "finish_reason": "stop"},
    });
    std::fs::write(&file, script.to_string()).unwrap();
    let engine = format!("scripted:{}", file.display());
    let server =
        Serving::start(&["--engine", &engine, "--responses-store", "3", "--max-num-queued-reqs", "1"]);
    for (seed, text) in [(1, "Hi"), (7, "hello world")] {
        let request = json!({"seed": seed, "messages": [{"role": "user", "content": "Hi"}]});
        let (status, body) = server.request("POST", "/v1/chat/completions", "", &request.to_string());
        assert_eq!(status, 200, "{body}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(answer["choices"][0]["message"]["content"], text);
        assert_eq!(answer["model"], "scripted");
    }
    let (status, body) = server.request("POST", "/v1/responses", "", "{\"input\": \"Hi\"}");
    assert_eq!((status, body.contains("\"store\":true")), (200, true), "{body}");

    // A load of completions, which play the default in turn.
    let url = format!("http://{}/v1", server.address);
    let bench = |more: &[&str]| {
        let all =
            ["--json", "bench", "serve", &url, "--num-prompts", "6", "--input-len", "9", "--output-len", "4"];
        ok(&[&all, more].concat()).json()
    };
    let found = bench(&["--concurrency", "1", "--shared-prefix-len", "5"]);
    assert_eq!((&found["requests"], &found["errors"]), (&json!(6), &json!(0)), "{found}");
    assert_eq!((&found["input_tokens"], &found["output_tokens"]), (&json!(54), &json!(24)));
    assert!(found["ttft_ms"]["p99"].as_f64().unwrap() > 0.0 && found["model"] == "scripted");
    let found = bench(&["--concurrency", "2", "--request-rate", "1000"]);
    assert_eq!(found["requests"].as_u64().unwrap() + found["errors"].as_u64().unwrap(), 6);
    fails(&["bench", "serve", "http://127.0.0.1:1"], 3, "list of models");
    // As with other commands, nobody who reads the result is no error.
    let mut unread =
        nibble(&["bench", "serve", &url, "--num-prompts", "1"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(unread.stdout.take());
    assert_eq!(unread.wait().unwrap().signal(), Some(libc::SIGPIPE));

    fails(&["serve", "--port", "0", "--engine", "scripted:/nowhere.json"], 2, "/nowhere.json");
    fails(&["serve", "--port", "0", "--engine", "other"], 2, "scripted:FILE");
    std::fs::write(&file, "{\"default\": {\"tokens\": [999999]}}").unwrap();
    fails(&["serve", "--port", "0", "--engine", &engine], 2, "999999");
}

#[test]
fn the_hubs_address_may_end_with_a_slash() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}/", listener.local_addr().unwrap());
    let hub = std::thread::spawn(move || {
        let mut stream = BufReader::new(listener.accept().unwrap().0);
        let mut asked = String::new();
        stream.read_line(&mut asked).unwrap();
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line).unwrap();
        }
        write!(stream.get_mut(), "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").unwrap();
        asked
    });
    let home = tempfile::tempdir().unwrap();
    let mut command = nibble(&["inspect", "owner/name"]);
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home.path()).env_remove("HF_HUB_OFFLINE");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no owner/name here"));
    assert!(hub.join().unwrap().starts_with("GET /api/models/owner/name/"));
}

#[test]
fn a_port_in_use_is_the_machines_fault() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fails(&["serve", "--port", &port], 3, &port);
}
