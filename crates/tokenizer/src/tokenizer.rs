//! Text to ids and back.

use std::collections::HashMap;

use crate::merge::{Merges, merge};
use crate::pieces::piece_len;
use crate::vocabulary::Vocabulary;

/// A vocabulary with its merge order and its special tokens.
pub struct Tokenizer {
    pub(crate) vocabulary: Vocabulary,
    pub(crate) merges: Merges,
    /// A piece that is a token is taken as it is, without merging.
    pub(crate) whole_pieces: bool,
    /// The id of each single byte.
    pub(crate) bytes: [u32; 256],
    /// Spelling by id, of special tokens.
    pub(crate) special: HashMap<u32, String>,
    /// Spelling by id, of added tokens that are text.
    pub(crate) added: HashMap<u32, String>,
    /// Of special and of added tokens.
    pub(crate) spellings: Spellings,
    /// Of added tokens alone.
    pub(crate) added_spellings: Spellings,
    pub(crate) size: usize,
}

/// Tokens that are found in a text before it is cut into pieces.
#[derive(Default)]
pub(crate) struct Spellings {
    ids: HashMap<String, u32>,
    /// The lengths of the spellings that begin with each byte, the longest first; nothing if there are none.
    lengths: Vec<Vec<usize>>,
}

impl Spellings {
    /// The error is the second of two that are equal.
    pub(crate) fn new(tokens: &[(u32, String)]) -> Result<Spellings, String> {
        let mut spellings = Spellings::default();
        for (id, spelling) in tokens {
            if spellings.ids.insert(spelling.clone(), *id).is_some() {
                return Err(spelling.clone());
            }
            spellings.lengths.resize(256, Vec::new());
            if let Some(&first) = spelling.as_bytes().first() {
                spellings.lengths[usize::from(first)].push(spelling.len());
            }
        }
        for lengths in &mut spellings.lengths {
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths.dedup();
        }
        Ok(spellings)
    }

    /// The first of them in a text, the longest of those that begin there: where it starts and ends, and its id. Spellings are short
    /// and of few lengths, so this is linear.
    fn find(&self, text: &str) -> Option<(usize, usize, u32)> {
        if self.ids.is_empty() {
            return None;
        }
        text.bytes().enumerate().find_map(|(start, byte)| {
            self.lengths[usize::from(byte)].iter().find_map(|length| {
                let id = *self.ids.get(text.get(start..start + length)?)?;
                Some((start, start + length, id))
            })
        })
    }
}

impl Tokenizer {
    /// Every id is below this.
    pub fn vocab_size(&self) -> usize {
        self.size
    }

    /// Ordinary encoding: special tokens written in the text are ordinary characters.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_around(&self.added_spellings, text)
    }

    /// Encoding in which the exact spellings of special tokens become those tokens.
    pub fn encode_with_special(&self, text: &str) -> Vec<u32> {
        self.encode_around(&self.spellings, text)
    }

    fn encode_around(&self, spellings: &Spellings, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut rest = text;
        while let Some((start, end, id)) = spellings.find(rest) {
            self.encode_into(&rest[..start], &mut ids);
            ids.push(id);
            rest = &rest[end..];
        }
        self.encode_into(rest, &mut ids);
        ids
    }

    /// The pre-tokenizer's pieces; their concatenation is the text.
    pub fn pieces<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(piece_len(rest));
            pieces.push(piece);
            rest = after;
        }
        pieces
    }

    /// The text of some ids: their bytes as UTF-8, U+FFFD where they are not; special tokens are spelled.
    pub fn decode(&self, ids: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(ids)).into_owned()
    }

    /// The bytes of some ids. Ids without a token have none.
    pub fn decode_bytes(&self, ids: &[u32]) -> Vec<u8> {
        ids.iter().filter_map(|&id| self.token_bytes(id)).flatten().copied().collect()
    }

    /// An ordinary token's bytes or an added one's spelling; `None` if there is no such token.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        match self.vocabulary.token(id) {
            [] => self.special.get(&id).or_else(|| self.added.get(&id)).map(String::as_bytes),
            bytes => Some(bytes),
        }
    }

    /// Whether the id is a special token, reserved ones included.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains_key(&id)
    }

    /// The id of a special token by its spelling, such as `<|start|>`.
    pub fn special(&self, spelling: &str) -> Option<u32> {
        self.spellings.ids.get(spelling).copied().filter(|&id| self.is_special(id))
    }

    fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        let mut rest = text;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(piece_len(rest));
            match self.whole_pieces.then(|| self.vocabulary.id(piece.as_bytes())).flatten() {
                Some(id) => ids.push(id),
                None => merge(&self.vocabulary, &self.merges, &self.bytes, piece.as_bytes(), ids),
            }
            rest = after;
        }
    }
}
