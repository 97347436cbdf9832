//! Attention: which kernels a step takes, and how many blocks and warps share the keys of a token.

use checkpoint::LayerKind;
use gptoss::{BLOCK_TOKENS, Error};

use crate::backend::{Cuda, HEAD};
use crate::batch::Shape;
use crate::one::OneToken;
use crate::packed::TILE_COLS;
use crate::params::{Attention, CacheFormat};

/// Warps of a block of attention.cu, each of which has up to as many query heads that share keys.
pub(crate) const ATTENTION_WARPS: usize = 8;
/// Shared memory of a block there, two pages for each warp, and in E4M3, three.
const ATTENTION_SHARED: usize = ATTENTION_WARPS * 2 * (2 * BLOCK_TOKENS * HEAD * 2);
const ATTENTION_SHARED_E4M3: usize = ATTENTION_WARPS * 3 * (2 * BLOCK_TOKENS * HEAD);
/// Its parts that exist at a time: (token, heads of a warp, split).
pub(crate) const MAX_PARTS: usize = 4096;
/// Its blocks that a multiprocessor has at a time.
const ATTENTION_BLOCKS: usize = 2;
/// Blocks that share a token's keys or a tile's, at most.
const MAX_SPLITS: usize = 32;
/// The same where it may not depend on the number of tokens, and warps for the few keys of a sliding layer.
const INVARIANT_SPLITS: usize = 8;
const INVARIANT_SLIDING: usize = 4;
/// Query heads per key/value head, at most: the rows that a warp of attention_many.cu has.
pub(crate) const QUERY_ROWS: usize = 16;
/// Rows of queries of a block of attention_many.cu.
pub(crate) const TILE_QUERIES: usize = 128;
/// Threads of a block there, and what each has of a part, in f32: see `put_together` in attention.cuh.
const TILE_THREADS: u32 = 256;
const TILE_PART: usize = 36;
/// Pages that each has at least where several share a tile's keys: as `LEAST_STEPS` there.
const LEAST_TILE_PAGES: usize = 16;
/// Its parts that exist at a time: (tile, key/value head, split).
const MAX_TILE_PARTS: usize = 256;
/// Blocks there that a multiprocessor has at a time.
const TILE_BLOCKS: usize = 2;
/// Bytes of the parts of both.
pub(crate) const PARTS_BYTES: usize = 4 * {
    let (singles, tiles) =
        (MAX_PARTS * ATTENTION_WARPS * (HEAD + 2), MAX_TILE_PARTS * TILE_THREADS as usize * TILE_PART);
    if singles > tiles { singles } else { tiles }
};
/// Shared memory of attention_many.cu: three stages of 64 keys and values.
const MANY_SHARED: usize = 3 * 16384;
/// Shared memory of attention_many_sm90.cu: `RAW` and room to align it to 1024 bytes; with E4M3 three stages more.
const PROMPTS_SHARED: usize = 81_920 + 1024;
const PROMPTS_SHARED_E4M3: usize = PROMPTS_SHARED + 3 * 8192;

/// By how many the keys of a single token are shared, for as many query heads as a warp takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Sharing {
    /// Of a block: a power of two.
    pub(crate) warps: usize,
    /// Blocks: one, unless each has all its warps for it.
    pub(crate) splits: usize,
}

impl Cuda {
    /// How the keys of `singles` tokens are shared in full and in sliding layers; `total` pages of all tokens, `most` of one.
    pub(crate) fn sharing(&self, singles: usize, total: usize, most: usize) -> (Sharing, Sharing) {
        let power_below = |n: usize| 1 << n.max(1).ilog2();
        // As `own_splits` in attention.cu.
        let useful = match most {
            pages if pages < self.shared_from() => 1,
            0..256 => 4,
            256..1024 => 8,
            1024..2048 => 16,
            _ => MAX_SPLITS,
        };
        let heads = self.attention_heads();
        // For the parts of eight tokens.
        let room = power_below(MAX_PARTS / (8 * heads));
        if self.options.batch_invariant {
            let full = Sharing { warps: ATTENTION_WARPS, splits: useful.min(INVARIANT_SPLITS).min(room) };
            return (full, Sharing { warps: INVARIANT_SLIDING, splits: 1 });
        }
        let fitting = ATTENTION_BLOCKS * ATTENTION_WARPS * self.device.multiprocessors();
        // As many warps as find room at a time; or so many that hardly any room is left over, where each has some pages even so, and more
        // of them if another block's parts must be waited for.
        let pairs = singles.max(1) * heads;
        let above = (9 * fitting / 10).div_ceil(pairs).next_power_of_two();
        let some = if above > ATTENTION_WARPS { 8 } else { 4 };
        let fill = |pages: usize| if pages >= some * above { above } else { power_below(fitting / pairs) };
        let pages = total / singles.max(1);
        let (full, sliding) = (fill(pages), fill(pages.min(self.config.sliding_window / BLOCK_TOKENS)));
        // Where one token has many more pages than others, it should not keep them waiting.
        let mean = total * heads / fitting;
        let sharers = full.max(most.div_ceil((2 * mean).max(8)).next_power_of_two());
        // A block of a single token finds room beside one of the kernel before, and has pages on their way before that ends; a second does not.
        let early = match singles {
            ..2 if self.device.capability() >= 90 => power_below(self.device.multiprocessors() / heads),
            _ => MAX_SPLITS,
        };
        let splits = (sharers / ATTENTION_WARPS).clamp(1, useful.min(room).min(early));
        let warps = |sharers: usize| sharers.min(ATTENTION_WARPS);
        (Sharing { warps: warps(sharers), splits }, Sharing { warps: warps(sliding), splits: 1 })
    }

    /// Pages of a single token from which on blocks share its keys: four of them at first, which are many where each token of a batch
    /// has as many as one alone.
    fn shared_from(&self) -> usize {
        if self.options.batch_invariant { 128 } else { 80 }
    }

    /// Blocks that share the keys of a tile in full layers, at most, where there are so many tiles, with `most` pages: as many as find
    /// room beside one another. None share where what else is in a step may not change a token's bits.
    pub(crate) fn tile_splits(&self, tiles: usize, most: usize) -> usize {
        if self.options.batch_invariant {
            return 1;
        }
        let room = (TILE_BLOCKS * self.device.multiprocessors()).min(MAX_TILE_PARTS);
        (room / (tiles.max(1) * self.config.kv_heads)).min(most / LEAST_TILE_PAGES).clamp(1, MAX_SPLITS)
    }

    /// Groups of query heads that share keys, of which attention.cu gives each to a warp.
    fn attention_heads(&self) -> usize {
        let group = self.config.query_heads / self.config.kv_heads;
        self.config.query_heads / group.min(ATTENTION_WARPS)
    }

    pub(crate) fn attention(&self, index: usize, shape: &Shape) -> Result<(), Error> {
        let layer = &self.layers[index];
        let sliding = self.config.layer_kinds[index] == LayerKind::Sliding;
        let starts = if sliding { shape.words.sliding_starts } else { shape.words.full_starts };
        let cache = &self.cache[index];
        let kv_heads = self.config.kv_heads as u32;
        let one = self.one_token(shape);
        let mut params = Attention {
            queries: self.arena.queries.address(),
            keys: cache.keys.address(),
            values: cache.values.address(),
            sinks: layer.sinks.address(),
            positions: self.word(shape, shape.words.positions),
            sequences: self.word(shape, shape.words.sequences),
            table_starts: self.word(shape, starts),
            table: self.word(shape, 0),
            tiles: self.word(shape, shape.words.tiles),
            fresh: one.map_or(0, OneToken::fresh),
            out: one.map_or(self.arena.context.address(), OneToken::context),
            partial: self.arena.parts.address(),
            arrivals: self.arena.arrivals.address(),
            query_heads: self.config.query_heads as u32,
            kv_heads,
            window: if sliding { self.config.sliding_window as u32 } else { 0 },
            out_format: layer.output.format(),
            out_stack: if one.is_some() { 0 } else { self.stack(layer.output.params(), shape.tokens) },
            splits: 1,
            key_scale: layer.kv_scales.key,
            value_scale: layer.kv_scales.value,
            n: 0,
            warps: 0,
            ahead: u32::from(shape.ahead),
            rows: (self.config.query_heads / self.attention_heads()) as u32,
            shared_from: self.shared_from() as u32,
            padding: 0,
        };
        let e4m3 = self.options.cache == CacheFormat::E4m3;
        if shape.tiles > 0 {
            // The few keys of a window are not worth sharing.
            let splits = if sliding { 1 } else { shape.tile_splits };
            let (name, shared) = match (self.device.capability(), splits > 1, e4m3) {
                (90, false, false) => ("attend_prompts", PROMPTS_SHARED),
                (90, false, true) => ("attend_prompts_e4m3", PROMPTS_SHARED_E4M3),
                (90, true, false) => ("attend_prompts_split", PROMPTS_SHARED),
                (90, true, true) => ("attend_prompts_split_e4m3", PROMPTS_SHARED_E4M3),
                (_, false, false) => ("attend_many", MANY_SHARED),
                (_, false, true) => ("attend_many_e4m3", MANY_SHARED),
                (_, true, false) => ("attend_many_split", MANY_SHARED),
                (_, true, true) => ("attend_many_split_e4m3", MANY_SHARED),
            };
            params.splits = splits as u32;
            let grid = [shape.tiles as u32, kv_heads, params.splits];
            // SAFETY: the tiles are of rows of this batch, the tables' blocks were checked with the plan, there is room for the parts.
            unsafe { self.device.launch(name, grid, TILE_THREADS, shared, &params)? };
        }
        if shape.singles > 0 {
            let Sharing { warps, splits } = if sliding { shape.sliding } else { shape.full };
            (params.warps, params.splits) = (warps as u32, splits as u32);
            let heads = self.attention_heads();
            // As many at a time as there is room for parts; whole eights, in which the rows of a stack repeat.
            let together = match splits {
                1 => shape.singles,
                _ => MAX_PARTS / (heads * splits) / 8 * 8,
            };
            let (name, shared) = match e4m3 {
                true => ("attend_split_e4m3", ATTENTION_SHARED_E4M3),
                false => ("attend_split", ATTENTION_SHARED),
            };
            let row = (2 * HEAD * self.config.query_heads) as u64;
            let out_row = if params.out_stack > 0 { 2 * TILE_COLS as u64 } else { row };
            // Fewer blocks wait for what the others of a head found than there are multiprocessors: those find room, whatever comes first.
            if splits > 1 && shape.singles * heads < self.device.multiprocessors() {
                (params.partial, params.arrivals) = (self.arena.exchanged.address(), 0);
            }
            let first = params;
            for at in (0..shape.singles).step_by(together) {
                params.queries = first.queries + at as u64 * row;
                params.positions = first.positions + 4 * at as u64;
                params.table_starts = first.table_starts + 4 * at as u64;
                params.out = first.out + at as u64 * out_row;
                let n = together.min(shape.singles - at);
                params.n = n as u32;
                let grid = [(n * heads).div_ceil(ATTENTION_WARPS / warps) as u32, params.splits, 1];
                // SAFETY: the first rows are the single tokens; there is room for their parts.
                unsafe { self.device.launch(name, grid, 256, shared, &params)? };
            }
        }
        Ok(())
    }
}
