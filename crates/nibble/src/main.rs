//! The nibble command line.
fn main() {}
