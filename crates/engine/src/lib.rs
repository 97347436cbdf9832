//! Requests, the scheduler, KV blocks, sampling and the offline API: everything between a backend and text.
//!
//! [`Engine`] runs a [`gptoss::Backend`] on a thread of its own; [`Llm`] is the offline API over it. Each step is scheduled
//! (`scheduler.rs`, over the blocks of `kv.rs`), run by the backend, and committed (`worker.rs`); tokens become text and
//! message fields in `output.rs` and are told while the next step is computed (`outbox.rs`); `speculation.rs` guesses tokens
//! that one step verifies together; `costs.rs` knows how long steps take. What a client demands of an answer is compiled in `grammar.rs` and kept to by the masks of
//! `masks.rs`. Where several engines serve one model, `replicas.rs` chooses one for each request.
#![forbid(unsafe_code)]

mod costs;
mod demands;
mod derived;
mod engine;
mod gbnf;
mod grammar;
mod guards;
pub mod kv;
mod llm;
mod masks;
mod numbers;
mod outbox;
mod output;
mod params;
mod replicas;
mod request;
pub mod scheduler;
mod scripted;
mod speculation;
mod structure;
mod turns;
mod worker;

pub use derived::Derived;
pub use engine::{
    Engine, EngineOptions, Error, RequestHandle, STEP_SECONDS, STEP_TOKENS, SchedulingPolicy, Stats,
    SubmitError, Valve,
};
pub use grammar::{Form, Grammar, GrammarError, Grammars, TurnRules, Whitespace};
pub use llm::{CompletionOutput, Llm, Progress, Prompt, RequestOutput};
pub use params::{InvalidParam, RepetitionDetection, SamplingParams};
pub use replicas::{Place, Replicas};
pub use request::{Event, Failure, FinishReason, OutputMode, Request, Sink, StopReason};
pub use scripted::{ScriptError, Scripted, Step};
pub use speculation::{Speculation, SpeculationCounts};
pub use structure::{Structure, Tag};
