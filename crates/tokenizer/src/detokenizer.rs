//! Bytes to text, piece by piece: what is emitted is final, and all of it together is the one-shot decoding.

/// Holds back the bytes of a character that is not complete yet, at most three.
#[derive(Debug, Clone, Default)]
pub struct Detokenizer {
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Nothing pending.
    pub fn new() -> Detokenizer {
        Detokenizer::default()
    }

    /// Appends bytes and returns the text that is now certain: U+FFFD for each maximal ill-formed part (Unicode 3.9), and
    /// nothing for an end that may still become a character.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = &self.pending[..];
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let (valid, bad) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        Some(len) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &bad[len..];
                        }
                        None => {
                            self.pending = bad.to_vec();
                            return text;
                        }
                    }
                }
            }
        }
    }

    /// Whether the bytes so far end inside a character.
    pub fn is_inside_character(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The end: what waits becomes one U+FFFD.
    pub fn finish(&mut self) -> String {
        let incomplete = !self.pending.is_empty();
        self.pending.clear();
        if incomplete { char::REPLACEMENT_CHARACTER.to_string() } else { String::new() }
    }
}
