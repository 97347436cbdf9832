//! Guesses what a sequence says next by what followed when it last said the same, so that one step verifies several tokens.
//!
//! A guess costs nothing but the longer step, and a wrong one changes no token. How many are worth it is weighed before
//! each step: how often the sequence's guesses came true (whether or not they were sent), against how much longer steps of
//! so many tokens took.

use std::collections::HashMap;

use crate::kv::Tokens;

/// Guesses from what the sequence has said before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speculation {
    /// Guessed tokens per sequence and step, at most. Default 8.
    pub tokens: usize,
    /// The last tokens must have occurred before, at least this many. Default 3.
    pub lookup_min: usize,
    /// Of several such places the one that agrees longest is taken, up to this many tokens. Default 16.
    pub lookup_max: usize,
    /// Guesses are made only where they are expected to save time. Default true.
    pub adaptive: bool,
}

impl Default for Speculation {
    fn default() -> Speculation {
        Speculation { tokens: 8, lookup_min: 3, lookup_max: 16, adaptive: true }
    }
}

/// What guessing brought so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpeculationCounts {
    /// Guesses verified, of one or more tokens.
    pub drafts: u64,
    /// Their tokens.
    pub draft_tokens: u64,
    /// Those that were right.
    pub accepted_tokens: u64,
    /// The same by place in the guess.
    pub accepted_per_position: Vec<u64>,
}

/// Places to compare for one guess: the most recent ones are enough.
const MAX_PLACES: usize = 16;

/// Where a sequence has said what, and how often a guess from there was right.
#[derive(Debug, Default)]
pub(crate) struct Guesser {
    /// By a hash of the last `lookup_min` tokens: the last place after them.
    last: HashMap<u64, u32>,
    /// For each place the one before it with the same hash, or [`NOWHERE`].
    before: Vec<u32>,
    rates: [Rate; CLASSES],
    /// The guess for what comes next, and its class.
    open: Option<(usize, Vec<u32>)>,
}

const NOWHERE: u32 = u32::MAX;

/// Guesses by the length of what agrees before them.
const CLASSES: usize = 3;
/// What is believed of a class at first.
const PRIOR: [f64; CLASSES] = [0.4, 0.6, 0.85];
/// The weight of that belief, in tokens.
const PRIOR_WEIGHT: f64 = 2.0;
/// What an observation still counts after the next.
const DECAY: f64 = 0.9;

#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    right: f64,
    all: f64,
}

/// What may be verified for a sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chance {
    /// Tokens guessed.
    pub(crate) tokens: usize,
    /// Probability that one is right if those before it were.
    pub(crate) probability: f64,
}

impl Guesser {
    /// Guesses at most `count` tokens that follow.
    pub(crate) fn guess(&mut self, tokens: &Tokens, options: &Speculation, count: usize) -> Chance {
        self.index(tokens, options.lookup_min);
        let guess = self.longest(tokens, options).map(|(place, agreeing)| {
            // Where the place is near the end, what is guessed repeats itself.
            let period = tokens.len() - place;
            let guess = (0..count).map(|i| tokens.at(place + i % period)).collect();
            (agreeing.ilog2().saturating_sub(1).min(CLASSES as u32 - 1) as usize, guess)
        });
        self.open = guess;
        let Some((class, guess)) = &self.open else { return Chance { tokens: 0, probability: 0.0 } };
        let Rate { right, all } = self.rates[*class];
        let probability = (right + PRIOR_WEIGHT * PRIOR[*class]) / (all + PRIOR_WEIGHT);
        Chance { tokens: guess.len(), probability }
    }

    /// The beginning of the last guess.
    pub(crate) fn open(&self, count: usize) -> Vec<u32> {
        self.open.as_ref().map_or_else(Vec::new, |(_, guess)| guess[..count.min(guess.len())].to_vec())
    }

    /// Learns from what really came.
    pub(crate) fn learn(&mut self, drawn: impl ExactSizeIterator<Item = u32>) {
        let Some((class, guess)) = self.open.take() else { return };
        let seen = guess.len().min(drawn.len());
        let right = guess.iter().zip(drawn).take_while(|&(&guess, drawn)| guess == drawn).count();
        let seen = seen.min(right + 1);
        let rate = &mut self.rates[class];
        rate.right = rate.right * DECAY + right as f64;
        rate.all = rate.all * DECAY + seen as f64;
    }

    /// Takes note of what is new.
    fn index(&mut self, tokens: &Tokens, least: usize) {
        for place in self.before.len()..tokens.len() {
            // A guess needs a token after its place, so the end is not one yet.
            let before = match place >= least {
                true => self.last.insert(hash(tokens, place, least), place as u32),
                false => None,
            };
            self.before.push(before.unwrap_or(NOWHERE));
        }
    }

    /// The place whose tokens before it agree longest with the last ones, and how many do.
    fn longest(&self, tokens: &Tokens, options: &Speculation) -> Option<(usize, usize)> {
        let end = tokens.len();
        if end <= options.lookup_min {
            return None;
        }
        let mut place = self.last.get(&hash(tokens, end, options.lookup_min)).copied();
        let mut best: Option<(usize, usize)> = None;
        for _ in 0..MAX_PLACES {
            let Some(at) = place.filter(|&place| place != NOWHERE).map(|place| place as usize) else { break };
            let most = options.lookup_max.max(options.lookup_min).min(at);
            let agreeing = (1..=most).take_while(|i| tokens.at(at - i) == tokens.at(end - i)).count();
            if agreeing >= options.lookup_min && best.is_none_or(|(_, longest)| agreeing > longest) {
                best = Some((at, agreeing));
            }
            place = self.before.get(at).copied();
        }
        best
    }
}

/// Of the `count` tokens before a place (FNV-1a).
fn hash(tokens: &Tokens, place: usize, count: usize) -> u64 {
    (place - count..place).fold(0xcbf2_9ce4_8422_2325, |hash, at| {
        (hash ^ u64::from(tokens.at(at))).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

impl SpeculationCounts {
    pub(crate) fn add(&mut self, guessed: usize, accepted: usize) {
        self.drafts += 1;
        self.draft_tokens += guessed as u64;
        self.accepted_tokens += accepted as u64;
        if self.accepted_per_position.len() < guessed {
            self.accepted_per_position.resize(guessed, 0);
        }
        self.accepted_per_position[..accepted].iter_mut().for_each(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess(text: &str, count: usize) -> String {
        let tokens: Vec<u32> = text.chars().map(u32::from).collect();
        let mut guesser = Guesser::default();
        let tokens = Tokens::new(tokens.into());
        guesser.guess(&tokens, &Speculation::default(), count);
        guesser.open(count).into_iter().filter_map(char::from_u32).collect()
    }

    #[test]
    fn what_followed_the_same_words_is_guessed() {
        assert_eq!(guess("one two three, one two", 6), " three");
        // The place that agrees longest, not the last one.
        assert_eq!(guess("I say that this is so. No: this was not. I say that this ", 6), "is so.");
        // Of equal ones the last.
        assert_eq!(guess("abc1.abc2.abc", 1), "2");
        assert_eq!(guess("abcdef", 3), "");
        assert_eq!(guess("ab", 3), "");
        // What repeats itself goes on so.
        assert_eq!(guess("xyxyxy", 5), "xyxyx");
        assert_eq!(guess("aaaa", 3), "aaa");
    }

    #[test]
    fn guesses_that_fail_are_not_believed_for_long() {
        let tokens = Tokens::new("one two three, one two".chars().map(u32::from).collect());
        let mut guesser = Guesser::default();
        let mut probability = |drawn: &[u32]| {
            let chance = guesser.guess(&tokens, &Speculation::default(), 4);
            assert_eq!(chance.tokens, 4);
            guesser.learn(drawn.iter().copied());
            chance.probability
        };
        let first = probability(&[0]);
        let second = probability(&[0]);
        assert!(second < first);
        let right: Vec<u32> = " thr?".chars().map(u32::from).collect();
        let third = probability(&right);
        assert!(third < second && probability(&right) > third);
    }
}
