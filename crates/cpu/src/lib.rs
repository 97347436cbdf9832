//! The CPU backend: kernels per instruction set, the thread pool and packed weights.
