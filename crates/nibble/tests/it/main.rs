//! The binary as a user runs it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod bad_input;
mod calibration;
mod checkpoints;
mod inside;
mod models;
mod serving;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

fn root(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(path)
}

fn path(path: &str) -> String {
    root(path).to_str().unwrap().to_owned()
}

fn small() -> String {
    path("models/tiny-gpt-oss")
}

fn bf16() -> String {
    path("testdata/tiny-gpt-oss-bf16")
}

/// Copies a model's folder, so that it can be changed.
fn copy_model(model: &str, folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    for entry in std::fs::read_dir(model).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
}

fn nibble(args: &[&str]) -> Command {
    let mut command = isolated(env!("CARGO_BIN_EXE_nibble"));
    command.args(args);
    command
}

/// Nothing of the user's environment reaches a test, and no test reaches the hub.
fn isolated(program: &str) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("VLLM_") || text.starts_with("HF_") || text == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.env("HF_HUB_OFFLINE", "1");
    command
}

struct Outcome {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Outcome {
    /// The document of `--json`.
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {} {}", self.stdout, self.stderr))
    }
}

fn run(args: &[&str]) -> Outcome {
    run_with_input(args, b"")
}

fn run_with_input(args: &[&str], input: &[u8]) -> Outcome {
    let mut child =
        nibble(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // The program may refuse the rest.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Outcome {
        status: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs a command that must succeed.
fn ok(args: &[&str]) -> Outcome {
    let outcome = run(args);
    assert_eq!(outcome.status, 0, "{args:?}: {}", outcome.stderr);
    outcome
}

/// Runs a command that must fail with this status, naming this.
fn fails(args: &[&str], status: i32, named: &str) -> Outcome {
    let outcome = run(args);
    assert_eq!(outcome.status, status, "{args:?}: {} {}", outcome.stdout, outcome.stderr);
    assert!(outcome.stderr.contains(named), "{args:?}: {:?} is not named in {}", named, outcome.stderr);
    assert!(!outcome.stderr.contains("panicked"), "{args:?}: {}", outcome.stderr);
    outcome
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect()
}
