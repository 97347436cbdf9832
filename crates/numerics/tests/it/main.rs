//! The formats against golden values and properties.
#![allow(clippy::unwrap_used, reason = "tests")]

mod golden;
mod properties;
