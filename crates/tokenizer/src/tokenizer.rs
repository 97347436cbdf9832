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
    /// Spelling by id.
    pub(crate) special: HashMap<u32, String>,
    /// Id by spelling.
    pub(crate) spellings: HashMap<String, u32>,
    /// The lengths of the spellings that begin with each byte, the longest first.
    pub(crate) spelling_lengths: Vec<Vec<usize>>,
    pub(crate) size: usize,
}

impl Tokenizer {
    /// Every id is below this.
    pub fn vocab_size(&self) -> usize {
        self.size
    }

    /// Ordinary encoding: special tokens written in the text are ordinary characters.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_into(text, &mut ids);
        ids
    }

    /// Encoding in which the exact spellings of special tokens become those tokens.
    pub fn encode_with_special(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut rest = text;
        while let Some((start, end, id)) = self.find_special(rest) {
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

    /// An ordinary token's bytes or a special one's spelling; `None` if there is no such token.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        match self.vocabulary.token(id) {
            [] => self.special.get(&id).map(String::as_bytes),
            bytes => Some(bytes),
        }
    }

    /// Whether the id is a special token, reserved ones included.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains_key(&id)
    }

    /// The id of a special token by its spelling, such as `<|start|>`.
    pub fn special(&self, spelling: &str) -> Option<u32> {
        self.spellings.get(spelling).copied()
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

    /// The first special token, the longest of those that begin there: where it starts and ends, and its id. Spellings are short
    /// and of few lengths, so this is linear.
    fn find_special(&self, text: &str) -> Option<(usize, usize, u32)> {
        text.bytes().enumerate().find_map(|(start, byte)| {
            self.spelling_lengths[usize::from(byte)].iter().find_map(|length| {
                let id = self.special(text.get(start..start + length)?)?;
                Some((start, start + length, id))
            })
        })
    }
}
