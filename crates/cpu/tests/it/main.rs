//! The CPU backend against the reference, the golden values and itself.
#![allow(clippy::unwrap_used, reason = "tests")]

mod dense;
mod kernels;
mod model;
#[path = "../../../gptoss/tests/it/models.rs"]
mod models;
mod packed_file;
