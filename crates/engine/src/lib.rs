//! Requests, the scheduler, KV blocks, sampling and the offline API: everything between a backend and text.
#![forbid(unsafe_code)]

mod params;
mod request;

pub use params::{InvalidParam, SamplingParams};
pub use request::{Event, Failure, FinishReason, OutputMode, Request, Sink, StopReason};
