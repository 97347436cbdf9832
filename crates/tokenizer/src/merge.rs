//! Byte-pair merging within one piece: the lowest rank first, the leftmost on a tie.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::vocabulary::Vocabulary;

/// Which pairs merge, and in what order.
pub(crate) enum Merges {
    /// Any two neighbours whose concatenation is a token; its id is the rank.
    ByRank,
    /// Only the listed pairs of ids: rank, below `MAX_RANK`, and result.
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

/// Ranks are below this: they share 64 bits with a place in the text.
pub(crate) const MAX_RANK: u32 = 1 << 24;

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
        merge_in_windows(vocabulary, merges, bytes, piece, ids);
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

/// A long piece is merged a window of bytes at a time, so that the heap stays small and in the cache. Several times as
/// long as the longest token, so that each window ends behind the one before.
const WINDOW: usize = 2048;

/// How far a window reaches back over the one before. If they have no token in common there, it reaches back further.
const OVERLAP: usize = 256;

/// Merges overlapping windows and passes from one to the next at a token that both have.
///
/// This is exact. Two neighbours in the tokens of any text are what merging these two alone gives: no merge crossed
/// their bounds, so the merges between the bounds were those of the two alone, in the same order. Conversely, if that
/// holds for all neighbours in a row of tokens, the row is what merging its text gives: the first merge across a bound
/// would have happened in the two alone as well. Passing at a common token makes a row of such neighbours.
fn merge_in_windows(
    vocabulary: &Vocabulary,
    merges: &Merges,
    bytes: &[u32; 256],
    piece: &[u8],
    ids: &mut Vec<u32>,
) {
    let ids_before = ids.len();
    let mut heap = Heap { vocabulary, merges, bytes, parts: Vec::new(), candidates: Vec::new() };
    let (mut current, mut next) = (Vec::new(), Vec::new());
    heap.merge(piece, 0, WINDOW, &mut current);
    // Tokens of `current` before this one are in `ids` already, taken from windows before.
    let mut from = 0;
    while let Some(end) = current.last().map(|last| last.end).filter(|&end| end < piece.len()) {
        let mut overlap = OVERLAP;
        let (last, first) = loop {
            let start =
                current[from..].iter().rposition(|token| token.start + overlap <= end).unwrap_or(0) + from;
            heap.merge(piece, current[start].start, WINDOW.max(2 * overlap), &mut next);
            if let Some((in_current, in_next)) = common(&current[start..], &next) {
                break (start + in_current, in_next);
            }
            if start == from {
                // They agree nowhere.
                ids.truncate(ids_before);
                heap.merge(piece, 0, piece.len(), &mut current);
                ids.extend(current.iter().map(|token| token.id));
                return;
            }
            overlap *= 2;
        };
        ids.extend(current[from..last].iter().map(|token| token.id));
        std::mem::swap(&mut current, &mut next);
        from = first;
    }
    ids.extend(current[from..].iter().map(|token| token.id));
}

/// A token and its place in the piece, in bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Token {
    start: usize,
    end: usize,
    id: u32,
}

/// Where in each of two rows their first common token is.
fn common(left: &[Token], right: &[Token]) -> Option<(usize, usize)> {
    let (mut l, mut r) = (0, 0);
    while let (Some(in_left), Some(in_right)) = (left.get(l), right.get(r)) {
        if in_left == in_right {
            return Some((l, r));
        }
        // The first bound of the one that lags may be the other's.
        if in_left.start <= in_right.start {
            l += 1;
        }
        if in_right.start <= in_left.start {
            r += 1;
        }
    }
    None
}

struct Heap<'a> {
    vocabulary: &'a Vocabulary,
    merges: &'a Merges,
    bytes: &'a [u32; 256],
    /// One per byte, of which those are in use that begin a part.
    parts: Vec<Part>,
    /// Rank (upper 24 bits) and place: the least first. Stale if the part at the place has another rank by now.
    candidates: Vec<Reverse<u64>>,
}

#[derive(Clone, Copy)]
struct Part {
    id: u32,
    /// Of merging it with the part behind it, and the result; `NONE` if they do not merge.
    next: (u32, u32),
    end: usize,
    /// Where the part before it begins.
    previous: usize,
}

impl Heap<'_> {
    /// The tokens of the `len` bytes of `piece` from `start` on, or of what there is.
    fn merge(&mut self, piece: &[u8], start: usize, len: usize, tokens: &mut Vec<Token>) {
        let window = &piece[start..piece.len().min(start + len)];
        self.parts.clear();
        self.parts.extend(window.iter().enumerate().map(|(i, &byte)| Part {
            id: self.bytes[usize::from(byte)],
            next: NONE,
            end: i + 1,
            previous: i.saturating_sub(1),
        }));
        self.candidates.clear();
        for left in 0..window.len() {
            if let Some(candidate) = self.look(window, left) {
                self.candidates.push(Reverse(candidate));
            }
        }
        let mut heap = BinaryHeap::from(std::mem::take(&mut self.candidates));
        while let Some(Reverse(candidate)) = heap.pop() {
            let left = (candidate & PLACE) as usize;
            let Part { next: (rank, id), end: right, previous, .. } = self.parts[left];
            if u64::from(rank) != candidate >> PLACE_BITS {
                continue;
            }
            let end = self.parts[right].end;
            self.parts[right].next = NONE;
            (self.parts[left].id, self.parts[left].end) = (id, end);
            if let Some(after) = self.parts.get_mut(end) {
                after.previous = left;
            }
            heap.extend(self.look(window, left).map(Reverse));
            if left > 0 {
                heap.extend(self.look(window, previous).map(Reverse));
            }
        }
        self.candidates = heap.into_vec();
        tokens.clear();
        let mut at = 0;
        while let Some(part) = self.parts.get(at) {
            tokens.push(Token { start: start + at, end: start + part.end, id: part.id });
            at = part.end;
        }
    }

    /// Looks up what the part at `left` and the one behind it merge to, and returns the candidate.
    fn look(&mut self, window: &[u8], left: usize) -> Option<u64> {
        let Part { id, end: right, .. } = self.parts[left];
        let next = self
            .parts
            .get(right)
            .and_then(|part| self.merges.merge(self.vocabulary, (id, part.id), &window[left..part.end]));
        self.parts[left].next = next.unwrap_or(NONE);
        next.map(|(rank, _)| u64::from(rank) << PLACE_BITS | left as u64)
    }
}

const PLACE_BITS: u32 = 64 - MAX_RANK.trailing_zeros();
const PLACE: u64 = (1 << PLACE_BITS) - 1;

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::{Heap, MAX_RANK, Merges, SCAN, Token, WINDOW, merge};
    use crate::vocabulary::Vocabulary;

    /// Any tokens over two letters, in any order: not what training gives, so merges may undercut the rank before.
    fn vocabulary() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let tokens = proptest::collection::hash_set(proptest::collection::vec(b'a'..=b'b', 2..12), 0..60);
        (tokens, any::<u64>()).prop_map(|(tokens, seed)| {
            let mut tokens: Vec<Vec<u8>> = tokens.into_iter().collect();
            tokens.sort_by_key(|token| {
                token
                    .iter()
                    .fold(seed, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7)
            });
            (0..=255).map(|byte| vec![byte]).chain(tokens).collect()
        })
    }

    fn naive(vocabulary: &Vocabulary, merges: &Merges, piece: &[u8]) -> Vec<u32> {
        let mut ends: Vec<usize> = (0..=piece.len()).collect();
        let mut ids: Vec<u32> = piece.iter().map(|&b| u32::from(b)).collect();
        loop {
            let look =
                |i: usize| merges.merge(vocabulary, (ids[i], ids[i + 1]), &piece[ends[i]..ends[i + 2]]);
            let best = (1..ids.len())
                .filter_map(|i| Some((look(i - 1)?, i)))
                .min_by_key(|&((rank, _), i)| (rank, i));
            let Some(((_, id), i)) = best else { return ids };
            ids[i - 1] = id;
            ids.remove(i);
            ends.remove(i);
        }
    }

    fn check(
        tokens: &[Vec<u8>],
        listed: bool,
        piece: &[u8],
        expected: impl Fn(&Vocabulary, &Merges) -> Vec<u32>,
    ) {
        let vocabulary = Vocabulary::new(tokens).unwrap();
        let bytes = std::array::from_fn(|byte| byte as u32);
        let merges = if listed { Merges::Listed(some_merges(&vocabulary, tokens)) } else { Merges::ByRank };
        let mut ids = vec![7];
        merge(&vocabulary, &merges, &bytes, piece, &mut ids);
        assert_eq!(ids[1..], expected(&vocabulary, &merges));
    }

    /// The pairs that make each token, from the last id to the first, without every third.
    fn some_merges(vocabulary: &Vocabulary, tokens: &[Vec<u8>]) -> HashMap<(u32, u32), (u32, u32)> {
        let pairs = tokens.iter().rev().flat_map(|token| {
            (1..token.len()).filter_map(|at| {
                let pair = (vocabulary.id(&token[..at])?, vocabulary.id(&token[at..])?);
                Some((pair, vocabulary.id(token)?))
            })
        });
        (0..MAX_RANK).zip(pairs).filter(|(i, _)| i % 3 != 2).map(|(i, (pair, id))| (pair, (i, id))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        #[test]
        fn scanning_and_the_heap_are_the_naive_merge(
            tokens in vocabulary(),
            piece in proptest::collection::vec(b'a'..=b'c', 0..SCAN * 4),
            listed in any::<bool>(),
        ) {
            check(&tokens, listed, &piece, |vocabulary, merges| naive(vocabulary, merges, &piece));
        }

        #[test]
        fn windows_are_one_heap(
            tokens in vocabulary(),
            unit in proptest::collection::vec(b'a'..=b'b', 1..200),
            noise in proptest::collection::vec((0..WINDOW * 5, b'a'..=b'c'), 0..20),
            len in WINDOW..WINDOW * 5,
            listed in any::<bool>(),
        ) {
            let mut piece: Vec<u8> = unit.iter().copied().cycle().take(len).collect();
            for (at, byte) in noise {
                if let Some(old) = piece.get_mut(at) {
                    *old = byte;
                }
            }
            check(&tokens, listed, &piece, |vocabulary, merges| {
                let bytes = std::array::from_fn(|byte| byte as u32);
                let (parts, candidates) = (Vec::new(), Vec::new());
                let mut tokens: Vec<Token> = Vec::new();
                Heap { vocabulary, merges, bytes: &bytes, parts, candidates }
                    .merge(&piece, 0, piece.len(), &mut tokens);
                tokens.iter().map(|token| token.id).collect()
            });
        }
    }

    /// Each pair of bytes ranks before the one on its left, so that where the text ends decides how all of it pairs up.
    /// The first window has an even end, the text an odd one: they have no token in common.
    #[test]
    fn windows_that_agree_nowhere() {
        let mut piece = Vec::new();
        for first in 0..60 {
            piece.push(first);
            piece.extend((first + 1..60).flat_map(|second| [first, second]));
        }
        piece.truncate(WINDOW + 1001);
        let tokens: Vec<Vec<u8>> =
            (0..=255).map(|byte| vec![byte]).chain(piece.windows(2).rev().map(<[u8]>::to_vec)).collect();
        check(&tokens, false, &piece, |vocabulary, merges| {
            let ids = naive(vocabulary, merges, &piece);
            let of_first_window = naive(vocabulary, merges, &piece[..WINDOW]);
            assert_eq!((vocabulary.token(ids[0]).len(), vocabulary.token(of_first_window[0]).len()), (1, 2));
            ids
        });
    }
}
