//! Prints `src/classes.rs`: the character classes of the pre-tokenizer's pattern, as the `regex` family knows them.
//!
//! `cargo run -p tokenizer --example unicode_tables > crates/tokenizer/src/classes.rs`
#![allow(clippy::print_stdout)]

use fancy_regex::Regex;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // In the order of `Class`; a character belongs to the first that matches.
    let patterns = [r"^[\p{Lu}\p{Lt}]$", r"^\p{Ll}$", r"^[\p{Lm}\p{Lo}]$", r"^\p{M}$", r"^\p{N}$", r"^\s$"];
    let patterns = patterns.iter().map(|p| Regex::new(p)).collect::<Result<Vec<_>, _>>()?;
    let mut ranges: Vec<(u32, usize)> = Vec::new();
    let mut text = String::new();
    for c in '\0'..=char::MAX {
        text.clear();
        text.push(c);
        let mut class = patterns.len();
        for (i, pattern) in patterns.iter().enumerate() {
            if pattern.is_match(&text)? {
                class = i;
                break;
            }
        }
        if ranges.last().is_none_or(|&(_, last)| last != class) {
            ranges.push((u32::from(c), class));
        }
    }
    println!(
        "//! Character classes, made by `examples/unicode_tables.rs`: where each run of one class begins.\n"
    );
    println!("/// First character of a run, and the place of its class in `Class`.");
    println!("#[rustfmt::skip]");
    println!("pub(crate) static RUNS: [(u32, u8); {}] = [", ranges.len());
    for line in ranges.chunks(10) {
        let line: Vec<String> = line.iter().map(|(start, class)| format!("({start},{class})")).collect();
        println!("    {},", line.join(","));
    }
    println!("];");
    Ok(())
}
