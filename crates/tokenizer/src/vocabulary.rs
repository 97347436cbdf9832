//! Byte strings and their ids, both ways.

/// The tokens that encoding can produce. Ids may have holes: those belong to special tokens or to none.
pub(crate) struct Vocabulary {
    /// All tokens one after the other.
    bytes: Vec<u8>,
    /// Token `id` is `bytes[starts[id] .. starts[id + 1]]`; an empty one is a hole.
    starts: Vec<u32>,
    /// Open addressing by hash, `EMPTY` or an id; its length is a power of two, at most half full.
    slots: Vec<u32>,
    longest: usize,
}

const EMPTY: u32 = u32::MAX;

impl Vocabulary {
    /// From one byte string per id, empty for holes. `None` if two are equal or all is over 4 GiB.
    pub(crate) fn new(tokens: &[Vec<u8>]) -> Option<Vocabulary> {
        let mut vocabulary = Vocabulary {
            bytes: Vec::with_capacity(tokens.iter().map(Vec::len).sum()),
            starts: Vec::with_capacity(tokens.len() + 1),
            slots: vec![EMPTY; (tokens.len() * 2).next_power_of_two()],
            longest: tokens.iter().map(Vec::len).max().unwrap_or(0),
        };
        vocabulary.starts.push(0);
        for token in tokens {
            vocabulary.bytes.extend(token);
            vocabulary.starts.push(u32::try_from(vocabulary.bytes.len()).ok()?);
        }
        for (id, token) in tokens.iter().enumerate().filter(|(_, token)| !token.is_empty()) {
            let slot = vocabulary.find(token);
            if vocabulary.slots[slot] != EMPTY {
                return None;
            }
            vocabulary.slots[slot] = u32::try_from(id).ok()?;
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
        if bytes.is_empty() || bytes.len() > self.longest {
            return None;
        }
        let id = self.slots[self.find(bytes)];
        (id != EMPTY).then_some(id)
    }

    /// The slot that holds `bytes`, or the empty one where it belongs.
    fn find(&self, bytes: &[u8]) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = hash(bytes) as usize & mask;
        while self.slots[slot] != EMPTY && self.token(self.slots[slot]) != bytes {
            slot = (slot + 1) & mask;
        }
        slot
    }
}

/// Eight bytes at a time, multiplied and folded. The table's content is fixed, so nobody can choose collisions.
fn hash(bytes: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut hash = bytes.len() as u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let product = u128::from(hash ^ u64::from_le_bytes(word)) * u128::from(FACTOR);
        hash = (product >> 64) as u64 ^ product as u64;
    }
    hash
}
