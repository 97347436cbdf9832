//! The server on loopback, over a scripted engine.
#![allow(clippy::unwrap_used)]

mod chat;
mod completions;
mod errors;
mod fixture;
mod harmony_turns;
mod life;
mod streams;
