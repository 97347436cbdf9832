//! Reading a message's header, however broken: role, channel, recipient and type, and what else was written in it.

use crate::message::Role;

/// Text tokens after which a header that goes on is taken to be content.
pub(crate) const HEADER_TOKENS: usize = 65;

const CHANNELS: [&str; 3] = ["analysis", "commentary", "final"];

/// A header as it comes in.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    /// `false` after `<|start|>`: the first word should be a role.
    assistant: bool,
    /// Segment 0 precedes the first `<|channel|>`, each of which opens another. A segment's parts are separated by
    /// `<|constrain|>`.
    segments: Vec<Vec<Vec<u8>>>,
    pub(crate) text_tokens: usize,
}

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fields {
    pub(crate) role: Role,
    pub(crate) channel: Option<String>,
    pub(crate) recipient: Option<String>,
    pub(crate) content_type: Option<String>,
    /// What is none of these.
    pub(crate) rest: String,
    /// A word in the place of the role that is none.
    pub(crate) unknown_role: bool,
}

impl Header {
    pub(crate) fn new(assistant: bool) -> Header {
        Header { assistant, segments: vec![vec![Vec::new()]], text_tokens: 0 }
    }

    pub(crate) fn channel(&mut self) {
        self.segments.push(vec![Vec::new()]);
    }

    pub(crate) fn constrain(&mut self) {
        if let Some(segment) = self.segments.last_mut() {
            segment.push(Vec::new());
        }
    }

    pub(crate) fn text(&mut self, bytes: &[u8]) {
        self.text_tokens += 1;
        if let Some(part) = self.segments.last_mut().and_then(|segment| segment.last_mut()) {
            part.extend_from_slice(bytes);
        }
    }

    /// How many channels were opened.
    pub(crate) fn channels(&self) -> usize {
        self.segments.len() - 1
    }

    /// Takes the bytes of a character that is not complete yet off the end.
    pub(crate) fn take_incomplete(&mut self) -> Vec<u8> {
        let Some(part) = self.segments.last_mut().and_then(|segment| segment.last_mut()) else {
            return Vec::new();
        };
        for len in 1..=part.len().min(3) {
            let tail = &part[part.len() - len..];
            // A character begins here, and what is missing is its end.
            if tail[0] >= 0xc0 && std::str::from_utf8(tail).is_err_and(|e| e.error_len().is_none()) {
                return part.split_off(part.len() - len);
            }
        }
        Vec::new()
    }

    /// Reads the header. `message` says whether `<|message|>` followed: then all words are header words, else what is not
    /// understood is text.
    pub(crate) fn read(&self, tools: &[String], message: bool) -> Fields {
        let mut words = Words::new(&self.segments);
        let (role, unknown_role) = self.role(&mut words, message);
        let recipient = recipient(&mut words, tools);
        let channel = channel(&mut words, self.segments.len(), message);
        let content_type = content_type(&mut words, recipient.is_some());
        Fields { role, channel, recipient, content_type, rest: words.rest(), unknown_role }
    }

    fn role(&self, words: &mut Words, message: bool) -> (Role, bool) {
        let mut stripped = self.assistant;
        while let Some(first) = words.in_segment(0).next()
            && words.text(first).starts_with("assistant")
        {
            stripped = true;
            words.remove_prefix(first, "assistant".len());
        }
        if self.assistant {
            return (Role::Assistant, false);
        }
        let Some(first) = words.in_segment(0).next() else { return (Role::Assistant, false) };
        let text = words.text(first).to_owned();
        let second = words.in_segment(0).nth(1).map(|w| words.text(w).to_owned());
        let bare = text.split(':').next().unwrap_or(&text);
        if let Some(role) = Role::ALL.into_iter().find(|role| role.name() == bare) {
            words.remove(first);
            return (role, false);
        }
        if text.starts_with("functions.") || second.as_deref() == Some("to=assistant") {
            words.remove(first);
            return (Role::Tool, false);
        }
        if stripped {
            return (Role::Assistant, false);
        }
        if second.is_none() || self.channels() > 0 || message {
            words.remove(first);
        }
        (Role::Assistant, true)
    }
}

fn recipient(words: &mut Words, tools: &[String]) -> Option<String> {
    let mut recipient: Option<String> = None;
    for word in words.all() {
        if let Some(target) = words.text(word).strip_prefix("to=").map(str::to_owned) {
            words.remove(word);
            let displaces = target != "assistant" || recipient.is_none();
            if displaces && !target.is_empty() {
                recipient = Some(target);
            }
        }
    }
    if recipient.is_none() {
        let named = |text: &str| text.starts_with("functions.") || tools.iter().any(|tool| tool == text);
        if let Some(word) = words.all().find(|&word| named(words.text(word))) {
            recipient = Some(words.text(word).to_owned());
            words.remove(word);
        }
    }
    recipient
}

fn channel(words: &mut Words, segments: usize, message: bool) -> Option<String> {
    let mut channel = None;
    for segment in (1..segments).rev() {
        // A recipient in the first place, or what follows `<|constrain|>`, is no channel.
        let Some(first) = words.first_of_segment(segment) else { continue };
        let (name, len) = channel_of(words.text(first));
        channel = channel.or(Some(name));
        words.remove_prefix(first, len);
    }
    if channel.is_none() && segments == 1 {
        let mut remaining = words.all();
        let found = remaining.find(|&w| CHANNELS.contains(&words.text(w).to_lowercase().as_str()));
        // In running text the words mean themselves; alone, or before `<|message|>`, one is a channel.
        if let Some(word) = found
            && (message || words.all().count() == 1)
        {
            channel = Some(words.text(word).to_lowercase());
            words.remove(word);
        }
    }
    channel
}

/// The channel that a segment's first word names, and how much of the word does so.
fn channel_of(word: &str) -> (String, usize) {
    let lower = word.to_lowercase();
    for name in CHANNELS {
        if let Some(rest) = lower.strip_prefix(name)
            && !rest.starts_with(char::is_alphanumeric)
        {
            return (name.to_owned(), word.len());
        }
    }
    for name in CHANNELS {
        if lower.ends_with(name) {
            return (name.to_owned(), word.len());
        }
    }
    for name in CHANNELS {
        if lower.starts_with(name) && word.is_char_boundary(name.len()) {
            return (name.to_owned(), name.len());
        }
    }
    (lower, word.len())
}

fn content_type(words: &mut Words, has_recipient: bool) -> Option<String> {
    let mut content_type = None;
    for word in words.after_constrain() {
        content_type = content_type.or_else(|| Some(format!("<|constrain|>{}", words.text(word))));
        words.remove(word);
    }
    if content_type.is_none()
        && has_recipient
        && let Some(first) = words.all().next()
        && ["json", "code", "text"].contains(&words.text(first))
    {
        content_type = Some(words.text(first).to_owned());
        words.remove(first);
    }
    content_type
}

/// The words of a header, from which those that are understood are removed.
struct Words {
    /// Decoded parts with their segment, in order; `bool`: follows `<|constrain|>`.
    parts: Vec<(usize, bool, String)>,
    words: Vec<Word>,
}

#[derive(Debug, Clone)]
struct Word {
    part: usize,
    /// Where the word begins and ends, and how much of its beginning is gone.
    start: usize,
    end: usize,
    gone: usize,
}

impl Words {
    fn new(segments: &[Vec<Vec<u8>>]) -> Words {
        let mut parts = Vec::new();
        let mut words = Vec::new();
        for (segment, bytes) in segments.iter().enumerate() {
            for (p, bytes) in bytes.iter().enumerate() {
                let text = String::from_utf8_lossy(bytes).into_owned();
                let part = parts.len();
                let base = text.as_ptr() as usize;
                words.extend(text.split_whitespace().map(|word| {
                    let start = word.as_ptr() as usize - base;
                    Word { part, start, end: start + word.len(), gone: 0 }
                }));
                parts.push((segment, p > 0, text));
            }
        }
        Words { parts, words }
    }

    fn text(&self, word: usize) -> &str {
        let Word { part, start, end, gone } = self.words[word];
        &self.parts[part].2[start + gone..end]
    }

    fn is_left(&self, word: usize) -> bool {
        !self.text(word).is_empty()
    }

    /// The words that are left. (Indexes are collected, so that words may be removed on the way.)
    fn all(&self) -> std::vec::IntoIter<usize> {
        self.filtered(|_| true)
    }

    fn in_segment(&self, segment: usize) -> std::vec::IntoIter<usize> {
        self.filtered(|word| self.parts[word.part].0 == segment)
    }

    /// The first word left after each `<|constrain|>`.
    fn after_constrain(&self) -> std::vec::IntoIter<usize> {
        let mut last = None;
        self.filtered(|word| {
            let first = self.parts[word.part].1 && last != Some(word.part);
            last = Some(word.part);
            first
        })
    }

    fn filtered(&self, mut keep: impl FnMut(&Word) -> bool) -> std::vec::IntoIter<usize> {
        let kept = (0..self.words.len()).filter(|&w| self.is_left(w)).filter(|&w| keep(&self.words[w]));
        kept.collect::<Vec<_>>().into_iter()
    }

    /// The segment's first word, if it is left and does not follow `<|constrain|>`.
    fn first_of_segment(&self, segment: usize) -> Option<usize> {
        let first = self.words.iter().position(|word| self.parts[word.part].0 == segment)?;
        (self.is_left(first) && !self.parts[self.words[first].part].1).then_some(first)
    }

    fn remove(&mut self, word: usize) {
        self.words[word].gone = self.words[word].end - self.words[word].start;
    }

    fn remove_prefix(&mut self, word: usize, len: usize) {
        self.words[word].gone += len;
    }

    /// The text without what was removed.
    fn rest(&self) -> String {
        let mut rest = String::new();
        for (p, (_, _, text)) in self.parts.iter().enumerate() {
            let mut at = 0;
            for word in self.words.iter().filter(|word| word.part == p && word.gone > 0) {
                rest.push_str(&text[at..word.start]);
                at = word.start + word.gone;
            }
            rest.push_str(&text[at..]);
        }
        rest
    }
}
