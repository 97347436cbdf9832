//! Byte-pair merging within one piece: the lowest rank first, the leftmost on a tie.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::vocabulary::Vocabulary;

/// Which pairs merge, and in what order.
pub(crate) enum Merges {
    /// Any two neighbours whose concatenation is a token; its id is the rank.
    ByRank,
    /// Only the listed pairs of ids: rank and result.
    Listed(HashMap<(u32, u32), (u32, u32)>),
}

impl Merges {
    /// Rank and result of merging two neighbouring tokens, `bytes` being their concatenation.
    fn merge(&self, vocabulary: &Vocabulary, pair: (u32, u32), bytes: &[u8]) -> Option<(u32, u32)> {
        match self {
            Merges::ByRank => vocabulary.id(bytes).map(|id| (id, id)),
            Merges::Listed(pairs) => pairs.get(&pair).copied(),
        }
    }
}

/// Longer pieces take the heap: scanning all pairs for each merge would be quadratic.
const SCAN: usize = 48;

/// Appends the tokens of `piece` to `ids`. Every single byte is a token (`bytes` has their ids).
pub(crate) fn merge(
    vocabulary: &Vocabulary,
    merges: &Merges,
    bytes: &[u32; 256],
    piece: &[u8],
    ids: &mut Vec<u32>,
) {
    if piece.len() <= SCAN {
        merge_scanning(vocabulary, merges, bytes, piece, ids);
    } else {
        merge_with_heap(vocabulary, merges, bytes, piece, ids);
    }
}

const NONE: (u32, u32) = (u32::MAX, 0);

fn merge_scanning(
    vocabulary: &Vocabulary,
    merges: &Merges,
    bytes: &[u32; 256],
    piece: &[u8],
    ids: &mut Vec<u32>,
) {
    // Part i is `piece[start[i]..start[i + 1]]` with id `token[i]`; `next[i]` is what merging it with part i + 1 gives.
    let mut len = piece.len();
    let mut start = [0u8; SCAN + 1];
    let mut token = [0u32; SCAN];
    let mut next = [NONE; SCAN];
    for (i, &byte) in piece.iter().enumerate() {
        (start[i], token[i]) = (i as u8, bytes[usize::from(byte)]);
    }
    start[len] = len as u8;
    let look = |start: &[u8], token: &[u32], i: usize, len: usize| {
        if i + 1 >= len {
            return NONE;
        }
        let bytes = &piece[usize::from(start[i])..usize::from(start[i + 2])];
        merges.merge(vocabulary, (token[i], token[i + 1]), bytes).unwrap_or(NONE)
    };
    for (i, next) in next.iter_mut().enumerate().take(len) {
        *next = look(&start, &token, i, len);
    }
    loop {
        let mut best = 0;
        for i in 1..len {
            if next[i].0 < next[best].0 {
                best = i;
            }
        }
        if len == 0 || next[best].0 == NONE.0 {
            break;
        }
        token[best] = next[best].1;
        start.copy_within(best + 2..=len, best + 1);
        token.copy_within(best + 2..len, best + 1);
        next.copy_within(best + 2..len, best + 1);
        len -= 1;
        next[best] = look(&start, &token, best, len);
        if best > 0 {
            next[best - 1] = look(&start, &token, best - 1, len);
        }
    }
    ids.extend(&token[..len]);
}

fn merge_with_heap(
    vocabulary: &Vocabulary,
    merges: &Merges,
    bytes: &[u32; 256],
    piece: &[u8],
    ids: &mut Vec<u32>,
) {
    /// A part, linked to its neighbours by their first byte. A part that was merged into its left neighbour ends at 0.
    #[derive(Clone, Copy)]
    struct Part {
        token: u32,
        end: usize,
        previous: usize,
    }
    let mut parts: Vec<Part> = piece
        .iter()
        .enumerate()
        .map(|(i, &byte)| Part { token: bytes[usize::from(byte)], end: i + 1, previous: i.wrapping_sub(1) })
        .collect();
    // (rank, left start, right start, end): stale if the parts have changed since.
    let mut heap = BinaryHeap::new();
    let look = |parts: &[Part], left: usize, heap: &mut BinaryHeap<Reverse<(u32, usize, usize, usize)>>| {
        let right = parts[left].end;
        let Some(end) = parts.get(right).map(|p| p.end) else { return };
        let pair = (parts[left].token, parts[right].token);
        if let Some((rank, _)) = merges.merge(vocabulary, pair, &piece[left..end]) {
            heap.push(Reverse((rank, left, right, end)));
        }
    };
    for left in 0..piece.len() {
        look(&parts, left, &mut heap);
    }
    while let Some(Reverse((_, left, right, end))) = heap.pop() {
        if parts[left].end != right || parts[right].end != end {
            continue;
        }
        let pair = (parts[left].token, parts[right].token);
        let Some((_, token)) = merges.merge(vocabulary, pair, &piece[left..end]) else { continue };
        (parts[left].token, parts[left].end) = (token, end);
        parts[right].end = 0;
        if let Some(after) = parts.get_mut(end) {
            after.previous = left;
        }
        look(&parts, left, &mut heap);
        if let Some(&Part { end: previous_end, .. }) = parts.get(parts[left].previous) {
            debug_assert_eq!(previous_end, left);
            look(&parts, parts[left].previous, &mut heap);
        }
    }
    let mut at = 0;
    while at < piece.len() {
        ids.push(parts[at].token);
        at = parts[at].end;
    }
}
