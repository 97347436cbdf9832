//! What people see: results on standard output, progress on standard error.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::args::Common;
use crate::failure::{Failure, Result};

/// How to speak.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ui {
    pub(crate) json: bool,
    quiet: bool,
}

impl Ui {
    pub(crate) fn new(common: &Common) -> Ui {
        Ui { json: common.json, quiet: common.quiet }
    }

    /// The one document of `--json`.
    pub(crate) fn document(self, document: &impl Serialize) -> Result<()> {
        out!("{}", serde_json::to_string(document).expect("documents have string keys and plain values"))
    }

    /// A remark on standard error.
    pub(crate) fn note(self, text: impl std::fmt::Display) {
        if !self.quiet {
            tell(text);
        }
    }

    /// A progress bar over `total` steps, shown once it has taken a second.
    pub(crate) fn progress(self, what: &str, total: u64) -> Progress {
        let bar = indicatif::ProgressBar::hidden();
        bar.set_length(total);
        let style =
            indicatif::ProgressStyle::with_template("{msg:<14} {wide_bar:.cyan/dim} {percent:>3}% {eta:>4}");
        bar.set_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()));
        bar.set_message(what.to_owned());
        Progress {
            what: what.to_owned(),
            bar,
            quiet: self.quiet,
            terminal: std::io::stderr().is_terminal(),
            started: Instant::now(),
            shown: false,
            tenths: 0,
        }
    }
}

/// A bar on a terminal; elsewhere a line per ten percent.
pub(crate) struct Progress {
    what: String,
    bar: indicatif::ProgressBar,
    quiet: bool,
    terminal: bool,
    started: Instant,
    shown: bool,
    tenths: u64,
}

impl Progress {
    pub(crate) fn set(&mut self, done: u64) {
        self.bar.set_position(done);
        if self.quiet || self.started.elapsed() < Duration::from_secs(1) {
            return;
        }
        let total = self.bar.length().unwrap_or(0).max(1);
        if self.terminal {
            if !self.shown {
                self.bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
                self.shown = true;
            }
        } else if done * 10 / total > self.tenths {
            self.tenths = done * 10 / total;
            tell(format_args!("{}: {} %", self.what, self.tenths * 10));
        }
    }

    pub(crate) fn set_total(&mut self, total: u64) {
        self.bar.set_length(total);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// `println!`, but a standard output that fails is an error of the command, not a panic.
macro_rules! out {
    ($($text:tt)*) => {
        $crate::ui::print(format_args!("{}\n", format_args!($($text)*)))
    };
}
pub(crate) use out;

/// Prints a piece of a line, or a line with its end, and has it seen at once.
pub(crate) fn print(text: std::fmt::Arguments<'_>) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_fmt(text).and_then(|()| stdout.flush()).map_err(|error| unwritten(&error))
}

/// The failure of a standard output that took not all: silent where nobody reads it any more, as in a closed pipe.
pub(crate) fn unwritten(error: &std::io::Error) -> Failure {
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        return Failure::machine("");
    }
    Failure::machine(format!("standard output: expected that results can be written, found: {error}"))
}

/// A line on standard error; if that fails there is nobody to tell.
pub(crate) fn tell(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Whether colours and weights may be used on standard output.
pub(crate) fn styled() -> bool {
    let plain =
        std::env::var_os("NO_COLOR").is_some() || std::env::var_os("TERM").is_some_and(|t| t == "dumb");
    std::io::stdout().is_terminal() && !plain
}

/// What stands before a part of an answer where nothing else tells it from the others.
pub(crate) fn label(part: &str) -> String {
    if styled() { String::new() } else { format!("{part:<9} ") }
}

pub(crate) fn bold(text: &str) -> String {
    if styled() { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
}

pub(crate) fn dim(text: &str) -> String {
    if styled() { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
}

pub(crate) fn green(text: &str) -> String {
    if styled() { format!("\x1b[32m{text}\x1b[0m") } else { text.to_owned() }
}

/// A word as a shell takes it for one.
pub(crate) fn quoted(word: &str) -> String {
    let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:,+@".contains(c));
    if plain && !word.is_empty() { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// Bytes with a decimal unit.
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// A number of threads in words.
pub(crate) fn threads(count: usize) -> String {
    if count == 1 { "1 thread".to_owned() } else { format!("{count} threads") }
}

/// A number with its digits in groups of three.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_shells() {
        assert_eq!(["a/b-c.d", "a b", "", "it's"].map(quoted), ["a/b-c.d", "'a b'", "''", "'it'\\''s'"]);
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(12), "12");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(13_761_264_768), "13.8 GB");
    }
}
