//! What is computed at a time, and the words that tell the kernels so.

use std::ops::Range;

use gptoss::{Plan, Sampling, SequencePlan};

use crate::ahead::Lane;
use crate::arena::LOGIT_ROWS;
use crate::attention::Sharing;

/// Where the parts of a step's words begin. For a decode step they depend on nothing but the number of tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Words {
    pub(crate) tokens: usize,
    pub(crate) positions: usize,
    pub(crate) sequences: usize,
    pub(crate) outputs: usize,
    pub(crate) tiles: usize,
    pub(crate) full_starts: usize,
    pub(crate) sliding_starts: usize,
    pub(crate) tables: usize,
}

impl Words {
    pub(crate) fn new(tokens: usize, outputs: usize, tiles: usize, sequences: usize) -> Words {
        let tiles_at = 3 * tokens + outputs;
        let starts = tiles_at + 2 * tiles;
        Words {
            tokens: 0,
            positions: tokens,
            sequences: 2 * tokens,
            outputs: 3 * tokens,
            tiles: tiles_at,
            full_starts: starts,
            sliding_starts: starts + sequences,
            tables: starts + 2 * sequences,
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
    /// Whether more is wanted of any row of logits than which one is the largest.
    pub(crate) logits: bool,
    pub(crate) lane: Lane,
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
            let scored = sequence.score.as_ref().map_or(0, |score| score.next.len());
            for (row, token) in segment.range.clone().enumerate() {
                let (all, sampling) = (sequence.logits || token < scored, sampling(sequence, token));
                if all || sampling.is_some() {
                    outputs.push((tokens + row, s, token));
                    logits |= all || sampling.is_some_and(|sampling| !is_largest(sampling));
                }
            }
            tokens += segment.range.len();
        }
        Batch { plan, segments, singles, tokens, outputs, logits }
    }

    pub(crate) fn sequence(&self, segment: &Segment) -> &'a SequencePlan {
        &self.plan.sequences[segment.sequence]
    }

    /// First row and number of tokens of each tile of `tile_tokens`.
    pub(crate) fn tiles(&self, tile_tokens: usize) -> Vec<(usize, usize)> {
        let (mut row, mut tiles) = (self.singles, Vec::new());
        for segment in &self.segments[self.singles..] {
            let len = segment.range.len();
            tiles.extend((0..len).step_by(tile_tokens).map(|at| (row + at, tile_tokens.min(len - at))));
            row += len;
        }
        tiles
    }
}

/// How a token is drawn after this one of the plan's tokens, if one is.
pub(crate) fn sampling(sequence: &SequencePlan, token: usize) -> Option<&Sampling> {
    sequence.sample.get((token + sequence.sample.len()).checked_sub(sequence.tokens.len())?)
}

/// Whether the token is simply that of the largest logit.
pub(crate) fn is_largest(sampling: &Sampling) -> bool {
    sampling.temperature <= 0.0
        && sampling.bias.is_empty()
        && sampling.penalties.is_none()
        && sampling.mask.is_none()
        && sampling.logprobs.is_none()
}
