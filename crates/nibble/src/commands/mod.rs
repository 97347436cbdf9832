//! One module per command.

pub(crate) mod bench;
pub(crate) mod bench_serve;
pub(crate) mod chat;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod generate;
pub(crate) mod harmony;
pub(crate) mod inspect;
pub(crate) mod lines;
pub(crate) mod logits;
pub(crate) mod quantize;
pub(crate) mod serve;
pub(crate) mod tokens;
pub(crate) mod verify;
