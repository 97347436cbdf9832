//! The server on loopback, over a scripted engine.
#![allow(clippy::unwrap_used, reason = "tests")]

mod admin;
mod attacks;
mod chat;
mod completions;
mod errors;
mod fields;
mod fixture;
mod harmony_turns;
mod life;
mod limits;
mod network;
mod operations;
mod replicas;
mod responses;
mod soup;
mod streams;
mod structured;
