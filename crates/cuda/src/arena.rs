//! What a step scribbles on, and how much of it there is.

use std::sync::Arc;

use checkpoint::Config;
use gptoss::Error;

use crate::attention::{MAX_PARTS, PARTS_BYTES};
use crate::backend::HEAD;
use crate::device::{Buffer, Device, Pinned};
use crate::packed::{TILE_COLS, TILE_ROWS};
use crate::products::{GEMM_ROW_TILES, GEMM_TOKENS, SOME_TOKENS};
use crate::router::ROUTER_GATHER_EXPERTS;

/// Tokens computed at a time; a step of more is cut.
pub(crate) const MAX_TOKENS: usize = 8192;
/// Rows of logits that exist at a time: 256 rows of the 20b's vocabulary are 206 MB.
pub(crate) const LOGIT_ROWS: usize = 256;
/// Blocks that look for the largest logit of a row, at most.
pub(crate) const LARGEST_BLOCKS: usize = 64;

/// What a step scribbles on, allocated once. The shapes are those of `MAX_TOKENS` tokens.
pub(crate) struct Arena {
    /// f32 `[tokens, hidden]`
    pub(crate) residual: Buffer,
    /// f32 `[tokens, 64]`
    pub(crate) rotary: Buffer,
    /// u32 `[2, tokens]`
    pub(crate) slots: Buffer,
    /// 16-bit `[tokens, hidden]`, plain or stacked
    pub(crate) normed: Buffer,
    /// 16-bit `[slots, hidden]`, stacked
    pub(crate) gathered: Buffer,
    /// BF16 `[tokens, query heads, 64]`
    pub(crate) queries: Buffer,
    /// 16-bit `[tokens, query heads * 64]`
    pub(crate) context: Buffer,
    /// f32, see attention.cu and attention.cuh
    pub(crate) parts: Buffer,
    pub(crate) arrivals: Buffer,
    /// f32 `[tokens, experts]`
    pub(crate) router_logits: Buffer,
    pub(crate) routes: Buffer,
    /// u32 of each block of experts_few.cuh
    pub(crate) rounds: Buffer,
    /// u32 of each expert and one more for experts_streamed_sm90.cu; zero before and after
    pub(crate) experts_done: Buffer,
    /// u32 `[2]`, see router_gather.cuh; zero at first
    pub(crate) router_barrier: Buffer,
    /// u32 `[blocks, ROUTER_GATHER_EXPERTS]`, see router_gather_many_sm90.cu
    pub(crate) router_counts: Buffer,
    /// f32 of each block of product_some_sm90.cu, and of attention.cu; all bits set before and after
    pub(crate) exchanged: Buffer,
    /// 16-bit `[slots, intermediate]`, plain or stacked
    pub(crate) activated: Buffer,
    /// f32 `[slots, hidden]`
    pub(crate) expert_outputs: Buffer,
    /// f32 `[LOGIT_ROWS, vocabulary]`
    pub(crate) logits: Buffer,
    pub(crate) largest_parts: Buffer,
    /// u64 `[LOGIT_ROWS]`, see product_some_sm90.cu; zero before and after
    pub(crate) best: Buffer,
    /// u32 `[LOGIT_ROWS]`
    pub(crate) largest: Buffer,
    /// A step's words, of each lane: see `Words`.
    pub(crate) step: [Buffer; 2],
    pub(crate) step_host: [Pinned; 2],
    pub(crate) logits_host: Pinned,
    /// What `largest` has, too, stored by the kernel that finds it: a copy would take 5 µs.
    pub(crate) largest_host: Pinned,
    /// Residual rows that were asked for.
    pub(crate) residual_host: Pinned,
}

impl Arena {
    pub(crate) fn new(device: &Arc<Device>, config: &Config) -> Result<Arena, Error> {
        let padded = |cols: usize| cols.next_multiple_of(TILE_COLS);
        let tokens = MAX_TOKENS;
        let (rows, slots) = (stack_rows(tokens), stack_rows(max_slots(config, tokens)));
        let context = config.query_heads * HEAD;
        let step_words = 1 << 20;
        let (words, words_host) = (|| device.buffer(step_words * 4), || device.pinned(step_words * 4));
        Ok(Arena {
            residual: device.buffer(tokens * config.hidden_size * 4)?,
            rotary: device.buffer(tokens * HEAD * 4)?,
            slots: device.buffer(2 * tokens * 4)?,
            normed: device.buffer(rows * padded(config.hidden_size) * 2)?,
            gathered: device.buffer(slots * padded(config.hidden_size) * 2)?,
            queries: device.buffer(tokens * context * 2)?,
            context: device.buffer(rows * context * 2)?,
            parts: device.buffer(PARTS_BYTES)?,
            arrivals: device.buffer((MAX_PARTS + tokens + 1) * 4)?,
            router_logits: device.buffer(tokens * config.experts * 4)?,
            routes: device.buffer(route_words(config, tokens) * 4)?,
            rounds: device.buffer(4 * device.multiprocessors())?,
            experts_done: device.buffer(4 * (config.experts + 1))?,
            router_barrier: device.buffer(8)?,
            router_counts: device.buffer(4 * ROUTER_GATHER_EXPERTS * device.multiprocessors())?,
            exchanged: device
                .filled(device.multiprocessors() * SOME_TOKENS * GEMM_ROW_TILES * TILE_ROWS * 4, 0xff)?,
            activated: device.buffer(slots * padded(config.intermediate_size) * 2)?,
            expert_outputs: device.buffer(slots * config.hidden_size * 4)?,
            logits: device.buffer(LOGIT_ROWS * config.vocab_size * 4)?,
            largest_parts: device.buffer(LOGIT_ROWS * LARGEST_BLOCKS * 8)?,
            best: device.buffer(LOGIT_ROWS * 8)?,
            largest: device.buffer(LOGIT_ROWS * 4)?,
            step: [words()?, words()?],
            step_host: [words_host()?, words_host()?],
            logits_host: device.pinned(config.vocab_size * 4)?,
            largest_host: device.pinned(LOGIT_ROWS * 4)?,
            residual_host: device.pinned(config.hidden_size * 4)?,
        })
    }
}

/// Rows of a stack of activations of which `rows` are used: whole eights, and a tile more that is read but not used.
pub(crate) fn stack_rows(rows: usize) -> usize {
    rows.next_multiple_of(8) + GEMM_TOKENS
}

/// Slots of the experts of `n` tokens: each expert's begin at a multiple of eight.
pub(crate) fn max_slots(config: &Config, n: usize) -> usize {
    n * config.experts_per_token + 7 * config.experts
}

/// Words of the routes of `n` tokens: see epilogue.cuh.
pub(crate) fn route_words(config: &Config, n: usize) -> usize {
    2 + 3 * config.experts + max_slots(config, n) + 3 * n * config.experts_per_token
}
