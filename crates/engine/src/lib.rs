//! Requests, the scheduler, KV blocks, sampling and the offline API: everything between a backend and text.
//!
//! [`Engine`] runs a [`gptoss::Backend`] on a thread of its own; [`Llm`] is the offline API over it. Each step is scheduled
//! (`scheduler.rs`, over the blocks of `kv.rs`), run by the backend, and committed (`worker.rs`); tokens become text and
//! message fields in `output.rs`.
#![forbid(unsafe_code)]

mod engine;
pub mod kv;
mod llm;
mod output;
mod params;
mod request;
pub mod scheduler;
mod scripted;
mod worker;

pub use engine::{Engine, EngineOptions, Error, RequestHandle, Stats, SubmitError};
pub use llm::{CompletionOutput, Llm, Progress, Prompt, RequestOutput};
pub use params::{InvalidParam, SamplingParams};
pub use request::{Event, Failure, FinishReason, OutputMode, Request, Sink, StopReason};
pub use scripted::{ScriptError, Scripted, Step};
