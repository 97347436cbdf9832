//! The CPU backend against the reference, the golden values and itself.
#![allow(clippy::unwrap_used, reason = "tests")]

mod dense;
mod kernels;
mod model;
mod packed_file;
