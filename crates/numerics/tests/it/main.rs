//! The formats against golden values and properties.

mod golden;
mod properties;
