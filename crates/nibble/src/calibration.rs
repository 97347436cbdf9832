//! Calibration data on the command line: files to windows of token ids, and the built-in set.

use std::path::PathBuf;

use checkpoint::Weights;
use harmony::ChatPrompt;

use crate::commands::lines::{Line, for_each_line, name, read_text};
use crate::failure::{Failure, Result};
use crate::model::Model;
use crate::ui::Ui;

/// Tokens per window, of a model whose context has as many.
const WINDOW: usize = 1024;

/// Windows of each file that are kept for measuring: no more than half of them.
const HELD_OUT: usize = 4;

/// Public-domain English books, and Harmony conversations as the small model knows them (`models/calibration`).
const BOOKS: &str = include_str!("../../../models/calibration/books.txt");
const CONVERSATIONS: &str = include_str!("../../../models/calibration/conversations.jsonl");

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

/// What is wanted of the files.
pub(crate) struct Wanted {
    /// At most so many to calibrate on, shared equally among the files.
    pub(crate) tokens: usize,
    /// Seed 0 takes the first windows of each file, any other seed draws them.
    pub(crate) seed: u64,
    /// Whether windows are held out even of a file that has no more than its share.
    pub(crate) measured: bool,
}

/// Windows of the files, or of the built-in set if there are none.
pub(crate) fn read(model: &Model, files: &[PathBuf], wanted: &Wanted, ui: Ui) -> Result<Data> {
    let share = (wanted.tokens / if files.is_empty() { 2 } else { files.len() }).max(1);
    let window = WINDOW.min(model.checkpoint.config().max_context);
    let mut sets = Vec::new();
    if files.is_empty() {
        let lines = CONVERSATIONS
            .lines()
            .map(|line| serde_json::from_str(line).map_err(|error| error.to_string()).and_then(Line::new))
            .collect::<std::result::Result<Vec<_>, _>>()
            .expect("the built-in set is conversations");
        let lines = (1..).zip(lines).collect();
        for (name, windows) in [
            ("built-in books", of_text(model, BOOKS, usize::MAX, window)?),
            ("built-in conversations", of_lines(model, lines, "the built-in conversations", window)?),
        ] {
            sets.push(divided(name.to_owned(), windows, share, wanted));
        }
    }
    for path in files {
        let windows = match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl") => {
                let mut lines = Vec::new();
                for_each_line(path, |number, line| {
                    lines.push((number, Line::read(path, number, line)?));
                    Ok(())
                })?;
                of_lines(model, lines, &name(path), window)?
            }
            // No vocabulary has tokens longer than this on average, so that a large file is not encoded whole.
            Some("txt") if wanted.seed == 0 => {
                of_text(model, &read_text(path)?, 32 * (share + HELD_OUT * window), window)?
            }
            Some("txt") => of_text(model, &read_text(path)?, usize::MAX, window)?,
            _ => {
                return Err(Failure::input(format!(
                    "--calibration: expected a file that ends in .txt or .jsonl, found {}",
                    path.display()
                )));
            }
        };
        if windows.iter().all(Vec::is_empty) {
            return Err(Failure::input(format!("{}: expected at least one token, found none", name(path))));
        }
        let file = path.file_name().map_or_else(|| name(path), |file| file.to_string_lossy().into_owned());
        let set = divided(file, windows, share, wanted);
        if set.tokens() < share {
            ui.note(format_args!(
                "note: {}: {} tokens to calibrate on, fewer than its share of {share}",
                name(path),
                set.tokens()
            ));
        }
        sets.push(set);
    }
    if wanted.measured && sets.iter().all(|set| set.held_out.is_empty()) {
        ui.note(
            "note: the calibration files have no windows left to measure on: the report has no divergence",
        );
    }
    Ok(Data { sets })
}

/// The share of a file, and what is held out: the windows behind those that are taken.
fn divided(name: String, mut windows: Vec<Vec<u32>>, share: usize, wanted: &Wanted) -> Set {
    windows.retain(|window| !window.is_empty());
    if wanted.seed != 0 {
        shuffle(&mut windows, wanted.seed);
    }
    let held_out = if wanted.measured { HELD_OUT.min(windows.len() / 2) } else { 0 };
    let most = windows.len() - held_out;
    let (mut taken, mut left) = (Vec::new(), share);
    let mut rest = windows.into_iter();
    while left > 0 && taken.len() < most {
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
fn of_text(model: &Model, text: &str, bytes: usize, window: usize) -> Result<Vec<Vec<u32>>> {
    let text = &text[..text.floor_char_boundary(bytes.min(text.len()))];
    Ok(model.tokenizer()?.encode(text).chunks(window).map(<[u32]>::to_vec).collect())
}

/// The windows of lines, each with its number in the file.
fn of_lines(model: &Model, lines: Vec<(usize, Line)>, file: &str, window: usize) -> Result<Vec<Vec<u32>>> {
    let vocabulary = model.checkpoint.config().vocab_size;
    // Ids alone ask for no vocabulary.
    let plain = lines.iter().all(|(_, line)| matches!(line, Line::Tokens(_)));
    let harmony = if plain { None } else { Some(model.harmony()?) };
    let each = lines.into_iter().map(|(number, line)| {
        let failed = |what: String| Failure::input(format!("{file}: line {number}: {what}"));
        let mut ids = match line {
            Line::Tokens(ids) => ids,
            Line::Text(prompt) => {
                harmony.iter().flat_map(|h| h.tokenizer().encode_with_special(&prompt)).collect()
            }
            Line::Chat(prompt) => {
                let prompt = ChatPrompt { add_generation_prompt: false, ..*prompt };
                let rendered = harmony.as_ref().map(|harmony| harmony.render_chat(&prompt)).transpose();
                rendered.map_err(|e| failed(e.to_string()))?.unwrap_or_default()
            }
        };
        ids.truncate(window);
        match ids.iter().find(|&&id| id as usize >= vocabulary) {
            Some(id) => Err(failed(format!("expected ids below {vocabulary}, found {id}"))),
            None => Ok(ids),
        }
    });
    each.collect()
}
