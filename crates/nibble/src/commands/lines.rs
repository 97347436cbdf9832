//! Reading files, standard input and JSON lines, with bounds.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use harmony::ChatPrompt;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::failure::{Failure, Result};

/// The longest input that is taken into memory: far beyond any context, far below any machine's memory.
const LIMIT: u64 = 256 << 20;

/// All of a file, or of standard input for `-`, as UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    open(path)?.take(LIMIT + 1).read_to_end(&mut bytes).map_err(|e| Failure::io(path, &e))?;
    if bytes.len() as u64 > LIMIT {
        return Err(Failure::input(format!("{}: expected at most {} MiB of text", name(path), LIMIT >> 20)));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Failure::input(format!("{}: expected UTF-8, found an invalid byte at position {at}", name(path)))
    })
}

/// Calls `each` with every line that is not blank, counted from 1.
pub(crate) fn for_each_line(path: &Path, mut each: impl FnMut(usize, &str) -> Result<()>) -> Result<()> {
    let mut reader = BufReader::new(open(path)?);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = reader.by_ref().take(LIMIT + 1).read_until(b'\n', &mut line);
        if read.map_err(|e| Failure::io(path, &e))? == 0 {
            break;
        }
        if line.len() as u64 > LIMIT {
            let limit = LIMIT >> 20;
            return Err(Failure::input(format!("{}: line {number} is longer than {limit} MiB", name(path))));
        }
        let text = std::str::from_utf8(&line)
            .map_err(|_| Failure::input(format!("{}: expected UTF-8 in line {number}", name(path))))?;
        // As some editors begin a file.
        let text = text.strip_prefix('\u{feff}').filter(|_| number == 1).unwrap_or(text);
        if !text.trim().is_empty() {
            each(number, text)?;
        }
    }
    Ok(())
}

/// A line of prompts, or of calibration data.
pub(crate) enum Line {
    Text(String),
    Tokens(Vec<u32>),
    Chat(Box<ChatPrompt>),
}

impl Line {
    /// A line that says two things is refused: one of them would be lost.
    pub(crate) fn read(path: &Path, number: usize, line: &str) -> Result<Line> {
        Line::new(json_line(path, number, line)?)
            .map_err(|error| Failure::input(format!("{}: line {number}: {error}", name(path))))
    }

    /// The error says what was expected and what was found.
    pub(crate) fn new(mut document: Value) -> std::result::Result<Line, String> {
        // The last is what the data of trainers have beside a prompt.
        const NAMES: [&str; 4] = ["prompt", "messages", "prompt_token_ids", "completion"];
        let named = match &document {
            Value::String(_) => vec!["prompt"],
            Value::Array(_) => vec!["prompt_token_ids"],
            Value::Object(fields) => {
                NAMES.into_iter().filter(|name| fields.get(*name).is_some_and(|v| !v.is_null())).collect()
            }
            _ => Vec::new(),
        };
        let [name @ ("prompt" | "messages" | "prompt_token_ids")] = named[..] else {
            let found = if named.is_empty() { "another document".to_owned() } else { named.join(" and ") };
            return Err(format!(
                "expected a text, an array of token ids, or one of {{\"prompt\"}}, {{\"messages\"}} and \
                 {{\"prompt_token_ids\"}}, found {found}"
            ));
        };
        let value = match document.get_mut(name).filter(|_| name != "messages") {
            Some(value) => value.take(),
            None => document,
        };
        match name {
            "prompt" => serde_json::from_value(value).map(Line::Text),
            "prompt_token_ids" => serde_json::from_value(value).map(Line::Tokens),
            _ => serde_json::from_value(value).map(Line::Chat),
        }
        .map_err(|error| format!("{name}: {error}"))
    }
}

pub(crate) fn json_line<T: DeserializeOwned>(path: &Path, number: usize, line: &str) -> Result<T> {
    serde_json::from_str(line).map_err(|e| Failure::input(format!("{}: line {number}: {e}", name(path))))
}

fn open(path: &Path) -> Result<Box<dyn Read>> {
    if path == Path::new("-") {
        return Ok(Box::new(std::io::stdin().lock()));
    }
    let file = std::fs::File::open(path).map_err(|e| Failure::io(path, &e))?;
    Ok(Box::new(file))
}

pub(crate) fn name(path: &Path) -> String {
    if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() }
}
