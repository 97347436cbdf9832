//! The CPU backend against the reference, the golden values and itself.

mod kernels;
