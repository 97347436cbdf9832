//! The engine from outside: the scheduler without a model, the engine over scripts, the engine over a real model.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
mod grammars;
mod guard;
mod life;
mod llm;
mod model;
mod output;
mod params;
mod replicas;
mod scheduler;
mod speculation;
