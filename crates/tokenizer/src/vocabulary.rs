//! Byte strings and their ids, both ways.

use std::hash::{BuildHasher, RandomState};

/// The tokens that encoding can produce. Ids may have holes: those belong to special tokens or to none.
pub(crate) struct Vocabulary {
    /// All tokens one after the other.
    bytes: Vec<u8>,
    /// Token `id` is `bytes[starts[id] .. starts[id + 1]]`; an empty one is a hole.
    starts: Vec<u32>,
    /// The ids of the tokens of two bytes, `NONE` where there is none: half of what merging looks up.
    pairs: Vec<u32>,
    /// Open addressing by hash: `EMPTY`, or the hash's upper half and an id. Its length is a power of two, at most half
    /// of it in use. Most lookups find nothing, and the stored half lets them end without a look at `bytes`.
    slots: Vec<u64>,
    /// Makes the hash unpredictable: a file cannot be made of tokens that collide.
    seed: u64,
    longest: usize,
}

const NONE: u32 = u32::MAX;
const EMPTY: u64 = u64::MAX;

impl Vocabulary {
    /// From one byte string per id, empty for holes. `None` if two are equal or all is over 4 GiB.
    pub(crate) fn new(tokens: &[impl AsRef<[u8]>]) -> Option<Vocabulary> {
        let lengths = || tokens.iter().map(|token| token.as_ref().len());
        let mut vocabulary = Vocabulary {
            bytes: Vec::with_capacity(lengths().sum()),
            starts: Vec::with_capacity(tokens.len() + 1),
            pairs: vec![NONE; 1 << 16],
            slots: vec![EMPTY; (tokens.len() * 2).next_power_of_two()],
            seed: RandomState::new().hash_one(0),
            longest: lengths().max().unwrap_or(0),
        };
        vocabulary.starts.push(0);
        for token in tokens {
            vocabulary.bytes.extend_from_slice(token.as_ref());
            vocabulary.starts.push(u32::try_from(vocabulary.bytes.len()).ok()?);
        }
        for (id, token) in (0u32..).zip(tokens).filter(|(_, token)| !token.as_ref().is_empty()) {
            let hash = hash(vocabulary.seed, token.as_ref());
            let (slot, found) = vocabulary.find(hash, token.as_ref());
            if found.is_some() {
                return None;
            }
            vocabulary.slots[slot] = hash >> 32 << 32 | u64::from(id);
            if let [first, second] = token.as_ref() {
                vocabulary.pairs[usize::from(*first) << 8 | usize::from(*second)] = id;
            }
        }
        Some(vocabulary)
    }

    /// Ids are below this.
    pub(crate) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The token's bytes; empty for a hole.
    pub(crate) fn token(&self, id: u32) -> &[u8] {
        let at = id as usize;
        match (self.starts.get(at), self.starts.get(at + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    /// The id of a byte string.
    pub(crate) fn id(&self, bytes: &[u8]) -> Option<u32> {
        if let [first, second] = bytes {
            let id = self.pairs[usize::from(*first) << 8 | usize::from(*second)];
            return (id != NONE).then_some(id);
        }
        if bytes.is_empty() || bytes.len() > self.longest {
            return None;
        }
        self.find(hash(self.seed, bytes), bytes).1
    }

    /// The slot that holds `bytes` and its id, or the empty one where it belongs.
    fn find(&self, hash: u64, bytes: &[u8]) -> (usize, Option<u32>) {
        let mask = self.slots.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            let entry = self.slots[slot];
            let id = entry as u32;
            if entry == EMPTY {
                return (slot, None);
            }
            if entry >> 32 == hash >> 32 && self.token(id) == bytes {
                return (slot, Some(id));
            }
            slot = (slot + 1) & mask;
        }
    }
}

/// Eight bytes at a time, multiplied and folded; the last eight overlap the ones before.
fn hash(seed: u64, bytes: &[u8]) -> u64 {
    let fold = |hash: u64, word: u64| {
        let product = u128::from(hash ^ word) * 0x9e37_79b9_7f4a_7c15;
        (product >> 64) as u64 ^ product as u64
    };
    let mut hash = seed ^ bytes.len() as u64;
    let word = if let Some(last) = bytes.last_chunk() {
        let (words, _) = bytes.as_chunks();
        for word in words {
            hash = fold(hash, u64::from_le_bytes(*word));
        }
        u64::from_le_bytes(*last)
    } else if let (Some(first), Some(last)) = (bytes.first_chunk(), bytes.last_chunk()) {
        u64::from(u32::from_le_bytes(*first)) << 32 | u64::from(u32::from_le_bytes(*last))
    } else {
        bytes.iter().fold(0, |word, &byte| word << 8 | u64::from(byte))
    };
    fold(fold(hash, word), seed)
}
