//! The o200k byte-pair encoding and incremental detokenization.
//!
//! A [`Tokenizer`] is a vocabulary of byte strings whose ids are merge ranks, and special tokens. Encoding cuts the text into
//! pieces (`pieces.rs`) and merges bytes within each (`merge.rs`); it takes time linear in the text, whatever the text.
#![forbid(unsafe_code)]

#[rustfmt::skip]
mod classes;
mod detokenizer;
mod load;
mod merge;
mod pieces;
mod tokenizer;
mod vocabulary;

pub use detokenizer::Detokenizer;
pub use load::Error;
pub use pieces::PATTERN;
pub use tokenizer::Tokenizer;
