//! An event's tokens and deltas taken apart, message by message: of several tokens that come at a time, some may belong to another
//! message than the others, or to one that the client is not to see.

use std::sync::Arc;

use gptoss::TokenLogprobs;
use harmony::{Delta, Parser};
use tokenizer::Tokenizer;

/// Where a token of a turn belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A control token, or a word of a header.
    Marker,
    Reasoning,
    /// What is said before calls.
    Preamble,
    Final,
    /// A call's arguments.
    Arguments,
}

/// What an event brings of one message.
#[derive(Debug, Default)]
pub(crate) struct Stretch {
    pub(crate) token_ids: Vec<u32>,
    /// One per token, if asked.
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// One per token, once a [`Sorter`] has seen it.
    pub(crate) places: Vec<Place>,
    pub(crate) deltas: Vec<Delta>,
}

/// Follows a turn.
pub(crate) struct Sorter {
    tokenizer: Arc<Tokenizer>,
    parser: Parser,
    /// The message that is being read is a call.
    is_call: bool,
}

impl Sorter {
    /// `parser` has read what the turn begins with.
    pub(crate) fn new(tokenizer: &Arc<Tokenizer>, parser: Parser) -> Sorter {
        Sorter { tokenizer: Arc::clone(tokenizer), parser, is_call: false }
    }

    /// Cuts what an event brings after the tokens that end messages.
    pub(crate) fn split(&mut self, event: Stretch) -> Vec<Stretch> {
        let Stretch { token_ids, logprobs, deltas, .. } = event;
        let (mut logprobs, mut deltas) = (logprobs.into_iter(), deltas.into_iter());
        let mut stretches = Vec::new();
        let mut stretch = Stretch::default();
        for token in token_ids {
            let (place, ends) = self.push(token);
            stretch.token_ids.push(token);
            stretch.logprobs.extend(logprobs.next());
            stretch.places.push(place);
            if ends {
                let end = deltas.as_slice().iter().position(|delta| *delta == Delta::End);
                stretch.deltas.extend(deltas.by_ref().take(end.map_or(usize::MAX, |end| end + 1)));
                stretches.push(std::mem::take(&mut stretch));
            }
        }
        // The end of the turn ends a message as well, without a token of its own.
        stretch.deltas.extend(deltas);
        if !stretch.token_ids.is_empty() || !stretch.deltas.is_empty() {
            stretches.push(stretch);
        }
        stretches
    }

    /// Reads the next token: where it belongs, and whether it ends a message that brought something.
    fn push(&mut self, token: u32) -> (Place, bool) {
        let deltas = self.parser.push(token);
        self.is_call |= deltas.iter().any(|delta| matches!(delta, Delta::CallStart { .. }));
        let parser = &self.parser;
        let place = if self.tokenizer.is_special(token) || !parser.is_content() {
            Place::Marker
        } else if parser.is_reasoning() {
            Place::Reasoning
        } else if self.is_call {
            Place::Arguments
        } else if parser.is_final() {
            Place::Final
        } else {
            Place::Preamble
        };
        let ends = deltas.last() == Some(&Delta::End);
        self.is_call &= !ends;
        (place, ends)
    }
}
