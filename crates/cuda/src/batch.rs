//! What is computed at a time, and the words that tell the kernels so.

use std::ops::Range;

use gptoss::{Plan, Sampling, SequencePlan};

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
}

/// The numbers that decide a batch's kernels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) words: Words,
    pub(crate) tokens: usize,
    pub(crate) singles: usize,
    pub(crate) tiles: usize,
    /// Of single tokens' keys in the full and in the sliding layers.
    pub(crate) full: Sharing,
    pub(crate) sliding: Sharing,
    /// Whether each of them is of another sequence.
    pub(crate) ahead: bool,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(plan: &'a Plan, mut segments: Vec<Segment>) -> Batch<'a> {
        segments.sort_by_key(|segment| !segment.single);
        let singles = segments.iter().take_while(|segment| segment.single).count();
        let (mut tokens, mut outputs) = (0, Vec::new());
        for (s, segment) in segments.iter().enumerate() {
            let sequence = &plan.sequences[segment.sequence];
            let scored = sequence.score.as_ref().map_or(0, |score| score.next.len());
            for (row, token) in segment.range.clone().enumerate() {
                if sequence.logits || token < scored || sampling(sequence, token).is_some() {
                    outputs.push((tokens + row, s, token));
                }
            }
            tokens += segment.range.len();
        }
        Batch { plan, segments, singles, tokens, outputs }
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
