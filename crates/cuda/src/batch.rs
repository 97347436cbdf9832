//! What is computed at a time, and the words that tell the kernels so.

use std::ops::Range;

use gptoss::{BLOCK_TOKENS, BlockId, Plan, Sampling, SequencePlan};

use crate::ahead::Lane;
use crate::arena::LOGIT_ROWS;
use crate::attention::Sharing;

/// Where the parts of a batch's words begin, and where they end. For a decode step all but the end depend on nothing but the number of
/// tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Words {
    pub(crate) tokens: usize,
    pub(crate) positions: usize,
    pub(crate) sequences: usize,
    pub(crate) outputs: usize,
    pub(crate) tiles: usize,
    pub(crate) full_starts: usize,
    pub(crate) sliding_starts: usize,
    tables: usize,
    pub(crate) end: usize,
    tile_tokens: usize,
    sliding_window: usize,
}

impl Words {
    /// Those from `first` on, with tiles of `tile_tokens`.
    pub(crate) fn new(batch: &Batch<'_>, first: usize, tile_tokens: usize, sliding_window: usize) -> Words {
        let (tokens, sequences) = (batch.tokens, batch.segments.len());
        let tiles = first + 3 * tokens + batch.outputs.len();
        let starts = tiles + 2 * batch.tiles(tile_tokens).count();
        let tables = starts + 2 * sequences;
        let blocks = |s: &Segment| 2 * batch.blocks(s) - batch.first_sliding_block(s, sliding_window);
        Words {
            tokens: first,
            positions: first + tokens,
            sequences: first + 2 * tokens,
            outputs: first + 3 * tokens,
            tiles,
            full_starts: starts,
            sliding_starts: starts + sequences,
            tables,
            end: tables + batch.segments.iter().map(blocks).sum::<usize>(),
            tile_tokens,
            sliding_window,
        }
    }

    pub(crate) fn tile_count(&self) -> usize {
        (self.full_starts - self.tiles) / 2
    }

    /// Writes the words of the batch that these are of.
    pub(crate) fn write(&self, batch: &Batch<'_>, to: &mut [u32]) {
        let (mut row, mut table) = (0, self.tables);
        for (s, segment) in batch.segments.iter().enumerate() {
            let sequence = batch.sequence(segment);
            for token in segment.range.clone() {
                to[self.tokens + row] = sequence.tokens[token];
                to[self.positions + row] = (sequence.position + token) as u32;
                to[self.sequences + row] = s as u32;
                row += 1;
            }
            let (first, end) =
                (batch.first_sliding_block(segment, self.sliding_window), batch.blocks(segment));
            let mut put = |from: &[BlockId], skipped: usize| {
                to[table..table + from.len()].copy_from_slice(from);
                table += from.len();
                // May be negative: entries before the window are not read.
                (table - from.len()) as i32 - skipped as i32
            };
            // Tables of the full layers from the start, of the sliding layers from the window.
            let full = put(&sequence.full_blocks[..end], 0);
            let sliding = put(&sequence.sliding_blocks[first..end], first);
            to[self.full_starts + s] = full as u32;
            to[self.sliding_starts + s] = sliding as u32;
        }
        for (i, &(row, ..)) in batch.outputs.iter().enumerate() {
            to[self.outputs + i] = row as u32;
        }
        for (i, (first, count)) in batch.tiles(self.tile_tokens).enumerate() {
            to[self.tiles + 2 * i] = first as u32;
            to[self.tiles + 2 * i + 1] = count as u32;
        }
    }
}

/// Part of one sequence's tokens.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    /// Index in the plan.
    pub(crate) sequence: usize,
    /// Which of the plan's tokens.
    pub(crate) range: Range<usize>,
    /// Computed as a single token, not as a chunk.
    pub(crate) single: bool,
}

/// What is computed at a time: single tokens first, then chunks.
pub(crate) struct Batch<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) segments: Vec<Segment>,
    /// Segments of one token.
    pub(crate) singles: usize,
    pub(crate) tokens: usize,
    /// Rows whose logits are wanted, each with its segment and which of the plan's tokens it is.
    pub(crate) outputs: Vec<(usize, usize, usize)>,
    /// Whether more is wanted of any of them than which logit is the largest.
    pub(crate) logits: bool,
}

/// The numbers that decide a batch's kernels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) words: Words,
    pub(crate) tokens: usize,
    /// Rows whose logits are wanted.
    pub(crate) outputs: usize,
    pub(crate) singles: usize,
    pub(crate) tiles: usize,
    /// Of single tokens' keys in the full and in the sliding layers.
    pub(crate) full: Sharing,
    pub(crate) sliding: Sharing,
    /// Whether each of them is of another sequence.
    pub(crate) ahead: bool,
    /// Blocks that share the keys of a tile in full layers, at most.
    pub(crate) tile_splits: usize,
    /// Whether more is wanted of any row of logits than which one is the largest.
    pub(crate) logits: bool,
    pub(crate) lane: Lane,
}

/// What a step computes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) shape: Shape,
    /// Of the last layer beyond keys and values, and of what follows, where that is not of all tokens.
    pub(crate) kept: Option<Shape>,
}

impl Step {
    /// Of the rows that may have logits.
    pub(crate) fn answered(&self) -> &Shape {
        self.kept.as_ref().unwrap_or(&self.shape)
    }
}

impl<'a> Batch<'a> {
    /// Whether it is single tokens alone, few enough for one kernel of logits, whose logits are wanted.
    pub(crate) fn decodes(&self) -> bool {
        self.singles == self.segments.len() && self.outputs.len() == self.tokens && self.tokens <= LOGIT_ROWS
    }

    pub(crate) fn new(plan: &'a Plan, mut segments: Vec<Segment>) -> Batch<'a> {
        segments.sort_by_key(|segment| !segment.single);
        let singles = segments.iter().take_while(|segment| segment.single).count();
        let (mut tokens, mut outputs, mut logits) = (0, Vec::new(), false);
        for (s, segment) in segments.iter().enumerate() {
            let sequence = &plan.sequences[segment.sequence];
            for (row, token) in segment.range.clone().enumerate() {
                if sequence.needs_logits(token) {
                    outputs.push((tokens + row, s, token));
                    logits |= !sequence.sampling(token).is_some_and(is_largest)
                        || sequence.logits
                        || sequence.is_scored(token);
                }
            }
            tokens += segment.range.len();
        }
        Batch { plan, segments, singles, tokens, outputs, logits }
    }

    /// Of tokens whose logits nobody wants the last layer, which is `last`, needs only keys and values. The others, where there are such
    /// and these are few: each as a single token, or, where no batch may change a bit, as what it is part of, a chunk or a single token.
    pub(crate) fn kept(&self, last: usize, batch_invariant: bool) -> Option<Batch<'a>> {
        let hidden = self.segments.iter().any(|s| self.sequence(s).hidden_after_layer == Some(last));
        // A step of one token has kernels that wait for one another.
        if hidden || self.tokens == 1 || self.outputs.len() == self.tokens || self.outputs.len() > LOGIT_ROWS
        {
            return None;
        }
        let segment = |&(_, segment, token): &(usize, usize, usize)| {
            let Segment { sequence, single, .. } = self.segments[segment];
            Segment { sequence, range: token..token + 1, single: single || !batch_invariant }
        };
        Some(Batch::new(self.plan, self.outputs.iter().map(segment).collect()))
    }

    pub(crate) fn sequence(&self, segment: &Segment) -> &'a SequencePlan {
        &self.plan.sequences[segment.sequence]
    }

    /// Blocks of a segment's sequence up to its end.
    pub(crate) fn blocks(&self, segment: &Segment) -> usize {
        (self.sequence(segment).position + segment.range.end).div_ceil(BLOCK_TOKENS)
    }

    /// The first of them that sliding layers look at.
    fn first_sliding_block(&self, segment: &Segment, sliding_window: usize) -> usize {
        let first = self.sequence(segment).position + segment.range.start;
        (first + 1).saturating_sub(sliding_window) / BLOCK_TOKENS
    }

    /// First row and number of tokens of each tile of `tile_tokens`.
    fn tiles(&self, tile_tokens: usize) -> impl Iterator<Item = (usize, usize)> {
        let mut row = self.singles;
        self.segments[self.singles..].iter().flat_map(move |segment| {
            let (first, len) = (row, segment.range.len());
            row += len;
            (0..len).step_by(tile_tokens).map(move |at| (first + at, tile_tokens.min(len - at)))
        })
    }
}

/// Whether the token is simply that of the largest logit.
pub(crate) fn is_largest(sampling: &Sampling) -> bool {
    sampling.temperature <= 0.0
        && sampling.bias.is_empty()
        && sampling.penalties.is_none()
        && sampling.mask.is_none()
        && sampling.logprobs.is_none()
}
