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

/// Windows of each file that are kept for measuring.
const HELD_OUT: usize = 4;

/// Public-domain English books, and Harmony conversations as the small model knows them (`models/calibration`).
const BOOKS: &str = include_str!("../../../models/calibration/books.txt");
const CONVERSATIONS: &str = include_str!("../../../models/calibration/conversations.jsonl");

/// A line of a `.jsonl` file.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected an array of token ids, {\"prompt\"} or {\"messages\"} of a chat, found another document"
)]
enum Line {
    Ids(Vec<u32>),
    Prompt { prompt: String },
    Messages(Box<ChatPrompt>),
}

/// What to calibrate on, and what to measure on afterwards.
#[derive(Default)]
pub(crate) struct Data {
    pub(crate) sets: Vec<Set>,
}

/// A file's share, or that of a part of the built-in set.
pub(crate) struct Set {
    pub(crate) name: String,
    pub(crate) windows: Vec<Vec<u32>>,
    /// Some windows of the same file that calibration does not see.
    pub(crate) held_out: Vec<Vec<u32>>,
}

impl Set {
    pub(crate) fn tokens(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }
}

impl Data {
    pub(crate) fn windows(&self) -> Vec<Vec<u32>> {
        self.sets.iter().flat_map(|set| set.windows.iter().cloned()).collect()
    }
}

/// At most `tokens` tokens, shared equally among the files; the built-in set if there are none. Seed 0 takes the first windows
/// of each file, any other seed draws them.
pub(crate) fn read(model: &Model, files: &[PathBuf], tokens: usize, seed: u64, ui: Ui) -> Result<Data> {
    let share = (tokens / if files.is_empty() { 2 } else { files.len() }).max(1);
    let mut sets = Vec::new();
    if files.is_empty() {
        let lines = CONVERSATIONS
            .lines()
            .map(|line| serde_json::from_str(line).expect("the built-in set is JSON"))
            .collect();
        for (name, windows) in [
            ("built-in books", of_text(model, BOOKS, usize::MAX)?),
            ("built-in conversations", of_lines(model, lines, "the built-in conversations")?),
        ] {
            sets.push(divided(name.to_owned(), windows, share, seed));
        }
    }
    for path in files {
        let windows = match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl") => of_lines(model, read_json_lines(path)?, &name(path))?,
            // No vocabulary has tokens longer than this on average, so that a large file is not encoded whole.
            Some("txt") if seed == 0 => of_text(model, &read_text(path)?, 32 * (share + HELD_OUT * WINDOW))?,
            Some("txt") => of_text(model, &read_text(path)?, usize::MAX)?,
            _ => {
                return Err(Failure::input(format!(
                    "--calibration: expected a file that ends in .txt or .jsonl, found {}",
                    path.display()
                )));
            }
        };
        check(model, path, &windows)?;
        let file = path.file_name().map_or_else(|| name(path), |file| file.to_string_lossy().into_owned());
        let set = divided(file, windows, share, seed);
        if set.tokens() < share {
            ui.note(format_args!(
                "note: {}: {} tokens to calibrate on, fewer than its share of {share}",
                name(path),
                set.tokens()
            ));
        }
        sets.push(set);
    }
    Ok(Data { sets })
}

/// The share of a file, and what is held out.
fn divided(name: String, mut windows: Vec<Vec<u32>>, share: usize, seed: u64) -> Set {
    if seed != 0 {
        shuffle(&mut windows, seed);
    }
    let (mut taken, mut left) = (Vec::new(), share);
    let mut rest = windows.into_iter().filter(|window| !window.is_empty());
    while left > 0 {
        let Some(mut window) = rest.next() else { break };
        window.truncate(left);
        left -= window.len();
        taken.push(window);
    }
    let held_out = rest.filter(|window| window.len() > 1).take(HELD_OUT).collect();
    Set { name, windows: taken, held_out }
}

/// Fisher and Yates, with SplitMix64.
fn shuffle(windows: &mut [Vec<u32>], seed: u64) {
    let mut state = seed;
    for last in (1..windows.len()).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        windows.swap(last, ((z ^ (z >> 31)) % (last as u64 + 1)) as usize);
    }
}

/// Windows of the first `bytes` of a text.
fn of_text(model: &Model, text: &str, bytes: usize) -> Result<Vec<Vec<u32>>> {
    let text = &text[..text.floor_char_boundary(bytes.min(text.len()))];
    Ok(model.tokenizer()?.encode(text).chunks(WINDOW).map(<[u32]>::to_vec).collect())
}

fn of_lines(model: &Model, lines: Vec<Line>, file: &str) -> Result<Vec<Vec<u32>>> {
    // Ids alone ask for no vocabulary.
    let plain = lines.iter().all(|line| matches!(line, Line::Ids(_)));
    let harmony = if plain { None } else { Some(model.harmony()?) };
    let each = lines.into_iter().enumerate().map(|(number, line)| {
        let mut ids = match line {
            Line::Ids(ids) => ids,
            Line::Prompt { prompt } => {
                harmony.iter().flat_map(|h| h.tokenizer().encode_with_special(&prompt)).collect()
            }
            Line::Messages(prompt) => {
                let prompt = ChatPrompt { add_generation_prompt: false, ..*prompt };
                let rendered = harmony.as_ref().map(|harmony| harmony.render_chat(&prompt)).transpose();
                rendered
                    .map_err(|e| Failure::input(format!("{file}: line {}: {e}", number + 1)))?
                    .unwrap_or_default()
            }
        };
        ids.truncate(WINDOW);
        Ok(ids)
    });
    each.collect()
}

fn check(model: &Model, path: &Path, windows: &[Vec<u32>]) -> Result<()> {
    let vocabulary = model.checkpoint.config().vocab_size;
    if windows.iter().all(Vec::is_empty) {
        return Err(Failure::input(format!("{}: expected at least one token, found none", name(path))));
    }
    match windows.iter().flatten().find(|&&id| id as usize >= vocabulary) {
        Some(id) => {
            Err(Failure::input(format!("{}: expected ids below {vocabulary}, found {id}", name(path))))
        }
        None => Ok(()),
    }
}
