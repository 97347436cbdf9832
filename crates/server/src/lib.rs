//! OpenAI's HTTP API over the engine.
//!
//! A body is read leniently (`json.rs`), becomes a request that cannot be wrong (`chat_request.rs`,
//! `completion_request.rs`, `response_request.rs`), goes to the engine, and comes back over a bounded bridge (`events.rs`) as one answer or as
//! chunks (`chat_answer.rs`, `completion_answer.rs`, `response_answer.rs`, `sse.rs`). Every refusal is an `ApiError` (`error.rs`).
#![forbid(unsafe_code)]

mod admin;
mod answer;
mod auth;
mod background;
mod body;
mod chat_answer;
mod chat_request;
mod chunk;
mod clock;
mod completion_answer;
mod completion_request;
mod connections;
mod cors;
mod docs;
mod error;
mod events;
mod form;
mod generate;
mod identifier;
mod json;
mod listener;
mod log;
mod memory;
mod metrics;
mod page;
mod rate_limit;
mod render;
mod request;
mod response_answer;
mod response_items;
mod response_request;
mod response_store;
mod routes;
mod sampling;
mod server;
mod small;
mod socket;
mod sorter;
mod sse;
mod structural;
mod throughput;
mod tls;
mod turn;
mod visible;
mod watchdog;

pub use clock::today;
pub use error::ErrorStyle;
pub use form::JsonRules;
pub use server::{
    CorsOptions, Ended, Error, Fingerprint, Handle, Loader, Options, SamplingDefaults, Server, SystemDate,
};
pub use tls::{ClientCertificates, TlsOptions};
