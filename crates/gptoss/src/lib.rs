//! The gpt-oss model: the `Backend` seam with its plan and result types, sampling from logits, and the readable f32
//! reference that every other backend is compared with.
#![forbid(unsafe_code)]

mod backend;
mod reference;
mod rope;
mod sampling;

pub use backend::{
    BLOCK_TOKENS, Backend, BlockId, Error, KvLayout, Logprobs, Mask, Penalties, Plan, Sampled, Sampling,
    Score, SequenceOutput, SequencePlan, TokenLogprobs, Traffic,
};
pub use reference::{Reference, Rounding, Tap, swiglu, top_experts};
pub use rope::{Rotary, rotate};
pub use sampling::{SORTED_HEAD, is_corrupted, log_sum, random, sample, score};
