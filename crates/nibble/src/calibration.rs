//! Calibration data on the command line: files to windows of token ids, and the built-in set.

use std::path::{Path, PathBuf};

use checkpoint::Weights;
use harmony::ChatPrompt;
use serde::Deserialize;

use crate::commands::lines::{name, read_json_lines, read_text};
use crate::failure::{Failure, Result};
use crate::model::Model;
use crate::ui::Ui;

/// Tokens per window.
const WINDOW: usize = 1024;

/// Public-domain English books, and Harmony conversations as the small model knows them (`models/calibration`).
const BOOKS: &str = include_str!("../../../models/calibration/books.txt");
const CONVERSATIONS: &str = include_str!("../../../models/calibration/conversations.jsonl");

/// A line of a `.jsonl` file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Ids(Vec<u32>),
    Prompt { prompt: String },
    Messages(Box<ChatPrompt>),
}

/// At most `tokens` tokens, shared equally among the files: the first windows of each. Without files, the built-in set.
pub(crate) fn windows(model: &Model, files: &[PathBuf], tokens: usize, ui: Ui) -> Result<Vec<Vec<u32>>> {
    let sources = files.len().max(if files.is_empty() { 2 } else { 1 });
    let share = tokens / sources;
    let mut windows = Vec::new();
    if files.is_empty() {
        windows.extend(of_text(model, BOOKS, share)?);
        let lines = CONVERSATIONS
            .lines()
            .map(|line| serde_json::from_str(line).expect("the built-in set is JSON"))
            .collect();
        windows.extend(of_lines(model, lines, share, "the built-in conversations")?);
    }
    for path in files {
        let found = match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl") => of_lines(model, read_json_lines(path)?, share, &name(path))?,
            Some("txt") => of_text(model, &read_text(path)?, share)?,
            _ => {
                return Err(Failure::input(format!(
                    "--calibration: expected a file that ends in .txt or .jsonl, found {}",
                    path.display()
                )));
            }
        };
        check(model, path, &found)?;
        let seen: usize = found.iter().map(Vec::len).sum();
        if seen < share {
            ui.note(format_args!(
                "note: {}: {seen} tokens to calibrate on, fewer than its share of {share}",
                name(path)
            ));
        }
        windows.extend(found);
    }
    Ok(windows)
}

fn of_text(model: &Model, text: &str, share: usize) -> Result<Vec<Vec<u32>>> {
    // No vocabulary has tokens longer than this on average, so a large file is not encoded whole.
    let enough = text.floor_char_boundary(share.saturating_mul(32).min(text.len()));
    let ids = model.tokenizer()?.encode(&text[..enough]);
    Ok(ids[..share.min(ids.len())].chunks(WINDOW).map(<[u32]>::to_vec).collect())
}

fn of_lines(model: &Model, lines: Vec<Line>, share: usize, file: &str) -> Result<Vec<Vec<u32>>> {
    let mut windows = Vec::new();
    let mut left = share;
    for (number, line) in lines.into_iter().enumerate() {
        if left == 0 {
            break;
        }
        let mut ids = match line {
            Line::Ids(ids) => ids,
            Line::Prompt { prompt } => model.tokenizer()?.encode_with_special(&prompt),
            Line::Messages(prompt) => {
                let prompt = ChatPrompt { add_generation_prompt: false, ..*prompt };
                let rendered = model.harmony()?.render_chat(&prompt);
                rendered.map_err(|e| Failure::input(format!("{file}: line {}: {e}", number + 1)))?
            }
        };
        ids.truncate(WINDOW.min(left));
        left -= ids.len();
        if !ids.is_empty() {
            windows.push(ids);
        }
    }
    Ok(windows)
}

fn check(model: &Model, path: &Path, windows: &[Vec<u32>]) -> Result<()> {
    let vocabulary = model.checkpoint.config().vocab_size;
    if windows.is_empty() {
        return Err(Failure::input(format!("{}: expected at least one token, found none", name(path))));
    }
    match windows.iter().flatten().find(|&&id| id as usize >= vocabulary) {
        Some(id) => {
            Err(Failure::input(format!("{}: expected ids below {vocabulary}, found {id}", name(path))))
        }
        None => Ok(()),
    }
}
