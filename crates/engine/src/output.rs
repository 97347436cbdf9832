//! From a choice's tokens to its text or message fields, and the decision when it ends.

use std::collections::VecDeque;
use std::sync::Arc;

use gptoss::{Sampled, TokenLogprobs};
use harmony::{Delta, Harmony, Parser};
use tokenizer::Detokenizer;

use crate::params::RepetitionDetection;
use crate::{Event, FinishReason, Grammar, OutputMode, SamplingParams, StopReason};

/// What the choices of a request have in common.
pub(crate) struct Rules {
    pub(crate) harmony: Arc<Harmony>,
    pub(crate) mode: OutputMode,
    /// Validated.
    pub(crate) params: SamplingParams,
    /// The tokens that end a choice, sorted.
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) grammar: Option<Grammar>,
    /// Whether a guard keeps a chat to the format where it is no text: where there is no grammar.
    pub(crate) guarded: bool,
}

impl Rules {
    /// Sequences of tokens that must not come.
    pub(crate) fn bad_words(&self) -> &[Vec<u32>] {
        self.params.forbidden(self.harmony.tokenizer())
    }

    /// Whether what a choice says decides when it ends or what may come next. Otherwise its tokens alone do.
    pub(crate) fn text_decides(&self) -> bool {
        let params = &self.params;
        let limited = params.thinking_token_budget.is_some() || params.answer_reserve > 0;
        !params.stop.is_empty() || (limited && matches!(self.mode, OutputMode::Chat { .. }))
    }
}

/// Decides when a choice ends.
pub(crate) struct Output {
    rules: Arc<Rules>,
    /// Read token by token where [`Rules::text_decides`]. Otherwise it is with those who tell the client, and read when they do.
    transcript: Option<Transcript>,
    repetition: Option<Repetition>,
    /// Tokens so far.
    generated: usize,
}

/// Why a choice ends.
pub(crate) type End = (FinishReason, Option<StopReason>);

impl Output {
    pub(crate) fn new(rules: Arc<Rules>) -> Output {
        let transcript = rules.text_decides().then(|| Transcript::new(Arc::clone(&rules)));
        let repetition = rules.params.repetition_detection.map(Repetition::new);
        Output { rules, transcript, repetition, generated: 0 }
    }

    /// What was said, where that decides something.
    pub(crate) fn transcript(&mut self) -> Option<&mut Transcript> {
        self.transcript.as_mut()
    }

    /// Whether a stop token may be drawn next.
    pub(crate) fn may_stop(&self) -> bool {
        self.may_stop_after(0)
    }

    /// The same after so many more tokens.
    pub(crate) fn may_stop_after(&self, tokens: usize) -> bool {
        self.generated + tokens >= self.rules.params.min_tokens
    }

    /// How many tokens may still come, by `max_tokens`.
    pub(crate) fn left(&self) -> usize {
        self.rules.params.max_tokens.map_or(usize::MAX, |max| max.saturating_sub(self.generated))
    }

    /// Of these tokens, how many could come before the answer ends or what may be drawn depends on more than its tokens.
    pub(crate) fn foreseeable(&self, tokens: &[u32]) -> usize {
        let rules = &self.rules;
        let stop = tokens.iter().position(|token| rules.stop_tokens.binary_search(token).is_ok());
        let mut count = stop.unwrap_or(tokens.len()).min(self.left().saturating_sub(1));
        if let Some((parser, left)) = self.reasoning_left() {
            // Within a message each token is one of reasoning or none.
            let special = tokens.iter().position(|&token| rules.harmony.tokenizer().is_special(token));
            let left = match (parser.is_content(), parser.is_reasoning()) {
                (true, true) => left.saturating_sub(1),
                (true, false) => usize::MAX,
                (false, _) => 0,
            };
            count = count.min(special.unwrap_or(tokens.len())).min(left);
        }
        count
    }

    /// Whether the budget for reasoning is spent and reasoning goes on. A grammar has no half characters: one that was begun may
    /// be completed.
    pub(crate) fn must_conclude(&self) -> bool {
        let completes = |parser: &Parser| self.rules.grammar.is_some() && parser.is_inside_character();
        self.reasoning_left()
            .is_some_and(|(parser, left)| parser.is_reasoning() && left == 0 && !completes(parser))
    }

    /// Of chats with a limit: how many tokens of reasoning may still come, and what knows whether it goes on.
    fn reasoning_left(&self) -> Option<(&Parser, usize)> {
        let parser = self.transcript.as_ref()?.parser()?;
        let params = &self.rules.params;
        let budget =
            params.thinking_token_budget.map(|budget| budget.saturating_sub(parser.reasoning_tokens()));
        // A small limit is shared equally.
        let reserve = |max: usize| max - params.answer_reserve.min(max / 2);
        let max = params.max_tokens.filter(|_| params.answer_reserve > 0);
        let until_reserve = max.map(|max| reserve(max).saturating_sub(self.generated));
        let left = [budget, until_reserve].into_iter().flatten().min()?;
        Some((parser, left))
    }

    /// Takes the next token. `room`: the context has a place for another one. `over`: nothing but the end of the turn could come. The
    /// result is set if it was the choice's last.
    pub(crate) fn push(&mut self, token: u32, room: bool, over: bool) -> Option<End> {
        let rules = &self.rules;
        let armed = self.may_stop() || over;
        self.generated += 1;
        let exhausted = !room || self.left() == 0;
        let repeated = self.repetition.as_mut().is_some_and(|repetition| repetition.push(token)) && armed;
        let end = if over || (armed && rules.stop_tokens.binary_search(&token).is_ok()) {
            let [end_of_turn, ..] = rules.harmony.stop_ids();
            Some((FinishReason::Stop, (token != end_of_turn).then_some(StopReason::Token(token))))
        } else if repeated {
            Some((FinishReason::Repetition, None))
        } else if exhausted {
            Some((FinishReason::Length, None))
        } else {
            None
        };
        let Some(transcript) = &mut self.transcript else { return end };
        match transcript.read(token, armed, end.as_ref()) {
            Some(stop) => Some((FinishReason::Stop, Some(StopReason::Text(stop)))),
            None => end,
        }
    }

    /// The end of the choice with this number, which gave its blocks to an older one so many times.
    pub(crate) fn ended(self, choice: usize, end: End, preemptions: usize) -> (Ended, Option<Transcript>) {
        (Ended { choice, end, completion_tokens: self.generated, preemptions }, self.transcript)
    }
}

/// A choice that ended, as far as its tokens tell.
pub(crate) struct Ended {
    pub(crate) choice: usize,
    end: End,
    completion_tokens: usize,
    preemptions: usize,
}

/// What a choice says, and has not told yet.
pub(crate) struct Transcript {
    rules: Arc<Rules>,
    kind: Kind,
    stops: StopStrings,
    untold: Untold,
    /// Something was told.
    begun: bool,
}

enum Kind {
    Text(Detokenizer),
    Chat(Box<Chat>),
}

struct Chat {
    parser: Parser,
    /// The field whose text the stop strings look at.
    field: Field,
    calls: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    Reasoning,
    Content,
}

/// New tokens, and what became certain with them.
#[derive(Default)]
struct Untold {
    token_ids: Vec<u32>,
    text: String,
    deltas: Vec<Delta>,
    logprobs: Vec<TokenLogprobs>,
}

impl Transcript {
    pub(crate) fn new(rules: Arc<Rules>) -> Transcript {
        let kind = match &rules.mode {
            OutputMode::Text => Kind::Text(Detokenizer::new()),
            OutputMode::Chat { tools, begun } => {
                let mut parser = rules.harmony.parser(Arc::clone(tools));
                // A header gives no text.
                begun.iter().for_each(|&token| drop(parser.push(token)));
                Kind::Chat(Box::new(Chat { parser, field: Field::Content, calls: 0 }))
            }
        };
        let stops = StopStrings::new(rules.params.stop.clone(), rules.params.include_stop_str_in_output);
        Transcript { rules, kind, stops, untold: Untold::default(), begun: false }
    }

    /// Reads the next token, which ends the choice if `end` is set. The result is the stop string that it completes, looked for
    /// if `armed`.
    pub(crate) fn read(&mut self, token: u32, armed: bool, end: Option<&End>) -> Option<String> {
        let Transcript { rules, kind, stops, untold, .. } = self;
        let stopped = end.is_some_and(|(reason, _)| *reason == FinishReason::Stop);
        let last = end.is_some();
        match kind {
            Kind::Text(detokenizer) => {
                let special = rules.harmony.tokenizer().is_special(token);
                let hidden = special && rules.params.skip_special_tokens
                    || stopped && !rules.params.include_stop_str_in_output;
                let bytes = rules.harmony.tokenizer().token_bytes(token).filter(|_| !hidden);
                let mut new = detokenizer.push(bytes.unwrap_or_default());
                if last {
                    new.push_str(&detokenizer.finish());
                }
                stops.push(new, armed, last, &mut untold.text)
            }
            Kind::Chat(chat) => {
                // Control tokens close the message that they end. A client's ordinary stop token is no part of it.
                let hidden = stopped
                    && !rules.harmony.tokenizer().is_special(token)
                    && !rules.params.include_stop_str_in_output;
                let mut new = if hidden { Vec::new() } else { chat.parser.push(token) };
                if last {
                    new.extend(chat.parser.finish());
                }
                let armed = [armed && rules.params.stop_in_reasoning, armed];
                chat.pass(new, stops, armed, last, &mut untold.deltas)
            }
        }
    }

    /// The event of the choice with this number after these tokens were read, if it is time to tell.
    pub(crate) fn news(&mut self, choice: usize, drawn: Vec<Sampled>, last: bool) -> Option<Event> {
        for Sampled { token, logprobs } in drawn {
            self.untold.token_ids.push(token);
            self.untold.logprobs.extend(logprobs);
        }
        if self.begun && !last && self.untold.token_ids.len() < self.rules.params.stream_interval {
            return None;
        }
        self.begun = true;
        let Untold { token_ids, text, deltas, logprobs } = std::mem::take(&mut self.untold);
        Some(Event::Tokens { choice, token_ids, text, deltas, logprobs })
    }

    /// The last event of the choice, all of which was read.
    pub(crate) fn finished(&self, ended: Ended) -> Event {
        let Ended { choice, end: (reason, stop), completion_tokens, preemptions } = ended;
        let called = matches!(&self.kind, Kind::Chat(chat) if chat.calls > 0);
        let by_token = reason == FinishReason::Stop && !matches!(stop, Some(StopReason::Text(_)));
        let repairs = self.parser().map(Parser::repairs).into_iter().flatten();
        Event::Finished {
            choice,
            reason: if by_token && called { FinishReason::ToolCalls } else { reason },
            stop,
            completion_tokens,
            reasoning_tokens: self.parser().map_or(0, Parser::reasoning_tokens),
            repairs: repairs.map(|(&kind, &count)| (kind, count)).collect(),
            preemptions,
        }
    }

    fn parser(&self) -> Option<&Parser> {
        match &self.kind {
            Kind::Text(_) => None,
            Kind::Chat(chat) => Some(&chat.parser),
        }
    }
}

impl Chat {
    /// Passes deltas on, texts through the stop strings, which are looked for if `armed`: in reasoning, in content. A stop string lies
    /// within one message, whose end is passed on. The result is the stop string that was found; what comes after it is dropped.
    fn pass(
        &mut self,
        deltas: Vec<Delta>,
        stops: &mut StopStrings,
        [in_reasoning, in_content]: [bool; 2],
        last: bool,
        out: &mut Vec<Delta>,
    ) -> Option<String> {
        for delta in deltas {
            let (field, armed, text) = match delta {
                Delta::Reasoning(text) => (Field::Reasoning, in_reasoning, text),
                Delta::Content(text) => (Field::Content, in_content, text),
                other => {
                    self.emit(stops.flush(), out);
                    self.calls += usize::from(matches!(other, Delta::CallStart { .. }));
                    out.push(other);
                    continue;
                }
            };
            if field != self.field {
                self.emit(stops.flush(), out);
                self.field = field;
            }
            let mut certain = String::new();
            let matched = stops.push(text, armed, false, &mut certain);
            self.emit(certain, out);
            if matched.is_some() {
                return matched;
            }
        }
        if last {
            self.emit(stops.flush(), out);
        }
        None
    }

    fn emit(&self, text: String, out: &mut Vec<Delta>) {
        if !text.is_empty() {
            out.push(match self.field {
                Field::Reasoning => Delta::Reasoning(text),
                Field::Content => Delta::Content(text),
            });
        }
    }
}

/// Notices that the last tokens are one pattern several times over.
struct Repetition {
    detection: RepetitionDetection,
    /// As many as the longest pattern, the last first.
    recent: VecDeque<u32>,
    /// For each length of a pattern: how many of the last tokens equal the one that many before.
    runs: Vec<usize>,
}

impl Repetition {
    fn new(detection: RepetitionDetection) -> Repetition {
        Repetition { detection, recent: VecDeque::new(), runs: vec![0; detection.max_pattern_size + 1] }
    }

    fn push(&mut self, token: u32) -> bool {
        let RepetitionDetection { min_pattern_size, max_pattern_size, min_count } = self.detection;
        let mut repeated = false;
        for length in min_pattern_size..=max_pattern_size {
            let same = self.recent.get(length - 1) == Some(&token);
            self.runs[length] = if same { self.runs[length] + 1 } else { 0 };
            repeated |= self.runs[length] >= length.saturating_mul(min_count - 1);
        }
        self.recent.truncate(max_pattern_size - 1);
        self.recent.push_front(token);
        repeated
    }
}

/// Looks for strings in a text that arrives in pieces, and holds back what may be the beginning of one: less than the
/// longest string. The result does not depend on where the text is cut: the string that is complete first counts, the longest
/// if several end together.
struct StopStrings {
    stops: Vec<String>,
    include: bool,
    held: String,
    /// Of what is held, so many bytes came when nothing was looked for: no string may end in them.
    blind: usize,
}

impl StopStrings {
    fn new(stops: Vec<String>, include: bool) -> StopStrings {
        StopStrings { stops, include, held: String::new(), blind: 0 }
    }

    /// Appends text, and to `out` what became certain. Unless `armed`, no string may end in it. `last`: no more will come.
    /// The result is the stop string that was found.
    fn push(&mut self, text: String, armed: bool, last: bool, out: &mut String) -> Option<String> {
        if self.stops.is_empty() {
            // Mostly there is nothing yet, and nothing to copy.
            if out.is_empty() {
                *out = text;
            } else {
                out.push_str(&text);
            }
            return None;
        }
        self.held.push_str(&text);
        if !armed {
            self.blind = self.held.len();
        }
        let find = |stop: &String| {
            let from = self.held.ceil_char_boundary((self.blind + 1).saturating_sub(stop.len()));
            Some(from + self.held.get(from..)?.find(stop.as_str())?)
        };
        let found = self.stops.iter().filter_map(|stop| Some((find(stop)?, stop)));
        if let Some((start, stop)) = found.min_by_key(|&(start, stop)| (start + stop.len(), start)) {
            let end = if self.include { start + stop.len() } else { start };
            out.push_str(&self.held[..end]);
            self.held.clear();
            return Some(stop.clone());
        }
        let certain = if last { self.held.len() } else { self.certain() };
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        self.blind = self.blind.saturating_sub(certain);
        None
    }

    /// What is held back, without further ado.
    fn flush(&mut self) -> String {
        self.blind = 0;
        std::mem::take(&mut self.held)
    }

    /// The first place from where on the held text is the beginning of a stop string.
    fn certain(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.ceil_char_boundary((self.held.len() + 1).saturating_sub(longest));
        self.held[from..]
            .char_indices()
            .map(|(at, _)| from + at)
            .find(|&at| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::StopStrings;

    /// Strings are looked for from piece `armed` on.
    fn run(stops: &[String], include: bool, pieces: &[&str], armed: usize) -> (String, Option<String>) {
        let mut matcher = StopStrings::new(stops.to_vec(), include);
        let mut out = String::new();
        for (i, piece) in pieces.iter().enumerate() {
            let found = matcher.push((*piece).to_owned(), i >= armed, i + 1 == pieces.len(), &mut out);
            if found.is_some() {
                return (out, found);
            }
            let longest = stops.iter().map(String::len).max().unwrap_or(0);
            assert!(matcher.held.len() < longest.max(1), "held {:?} for {stops:?}", matcher.held);
        }
        (out, None)
    }

    /// The definition: the first place behind `blind` bytes where some stop string ends.
    fn expected(stops: &[String], include: bool, text: &str, blind: usize) -> (String, Option<String>) {
        for end in (blind + 1..=text.len()).filter(|&e| text.is_char_boundary(e)) {
            let ending = stops.iter().filter(|s| text[..end].ends_with(s.as_str())).max_by_key(|s| s.len());
            if let Some(stop) = ending {
                let cut = if include { end } else { end - stop.len() };
                return (text[..cut].to_owned(), Some(stop.clone()));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn stop_strings_are_found_however_the_text_is_cut(
            text in "[abé👋]{0,14}",
            stops in proptest::collection::vec("[abé👋]{1,4}", 0..4),
            include in any::<bool>(),
        ) {
            let chars: Vec<&str> = text.split_inclusive(|_| true).collect();
            prop_assert_eq!(run(&stops, include, &chars, 0), expected(&stops, include, &text, 0));
            let boundaries: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
            for &a in &boundaries {
                for &b in boundaries.iter().filter(|&&b| b >= a) {
                    let pieces = [&text[..a], &text[a..b], &text[b..]];
                    for (armed, blind) in [0, a, b].into_iter().enumerate() {
                        let found = run(&stops, include, &pieces, armed);
                        prop_assert_eq!(found, expected(&stops, include, &text, blind));
                    }
                }
            }
        }
    }
}
