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
    /// `<|constrain|>`. Those without text are not kept apart, so that markers alone take no memory.
    segments: Vec<Vec<Vec<u8>>>,
    channels: u64,
    constrains: u64,
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
    /// What is irregular about it.
    pub(crate) repairs: Vec<&'static str>,
}

impl Header {
    pub(crate) fn new(assistant: bool) -> Header {
        Header { assistant, segments: vec![vec![Vec::new()]], channels: 0, constrains: 0, text_tokens: 0 }
    }

    pub(crate) fn channel(&mut self) {
        let begun = self.channels > 0;
        self.channels += 1;
        match self.segments.last_mut() {
            Some(empty) if begun && empty.iter().all(Vec::is_empty) => *empty = vec![Vec::new()],
            _ => self.segments.push(vec![Vec::new()]),
        }
    }

    pub(crate) fn constrain(&mut self) {
        self.constrains += 1;
        if let Some(segment) = self.segments.last_mut()
            && (segment.len() == 1 || segment.last().is_some_and(|part| !part.is_empty()))
        {
            segment.push(Vec::new());
        }
    }

    /// Whether nothing of it has come.
    pub(crate) fn is_blank(&self) -> bool {
        self.channels == 0 && self.constrains == 0 && self.text_tokens == 0
    }

    pub(crate) fn text(&mut self, bytes: &[u8]) {
        self.text_tokens += 1;
        if let Some(part) = self.segments.last_mut().and_then(|segment| segment.last_mut()) {
            part.extend_from_slice(bytes);
        }
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
        let mut repairs = Vec::new();
        let role = self.role(&mut words, message, &mut repairs);
        let recipient = self.recipient(&mut words, tools, message, &mut repairs);
        let channel = self.named_channel(&mut words, message, &mut repairs);
        let content_type = content_type(&mut words, recipient.is_some());
        if self.constrains > 1 {
            repairs.push("several_constrains");
        }
        let rest = words.rest();
        if message && !rest.trim().is_empty() {
            repairs.push("header_noise");
        }
        Fields { role, channel, recipient, content_type, rest, repairs }
    }

    fn role(&self, words: &mut Words, message: bool, repairs: &mut Vec<&'static str>) -> Role {
        let mut repeated = u32::from(self.assistant);
        while let Some(first) = words.in_segment(0).next()
            && words.text(first).starts_with("assistant")
        {
            repeated += 1;
            words.remove_prefix(first, "assistant".len());
        }
        if repeated > 1 {
            repairs.push("repeated_role");
        }
        if self.assistant {
            return Role::Assistant;
        }
        let mut segment = words.in_segment(0);
        // A recipient may stand where the role is missing.
        let Some(first) = segment.next().filter(|&word| !words.text(word).starts_with("to=")) else {
            if repeated == 0 {
                repairs.push("missing_role");
            }
            return Role::Assistant;
        };
        let second = segment.next();
        let text = words.text(first);
        let bare = text.split(':').next().unwrap_or(text);
        let role = if let Some(role) = Role::ALL.into_iter().find(|role| role.name() == bare) {
            role
        } else if repeated > 0 {
            return Role::Assistant;
        } else if text.starts_with("functions.") || second.is_some_and(|w| words.text(w) == "to=assistant") {
            Role::Tool
        } else {
            repairs.push("unknown_role");
            // A channel's name in the role's place still names the channel.
            let header_word = message || second.is_none();
            if self.channels > 0 || header_word && !is_channel(text) {
                words.remove(first);
            }
            return Role::Assistant;
        };
        words.remove(first);
        role
    }

    fn recipient(
        &self,
        words: &mut Words,
        tools: &[String],
        message: bool,
        repairs: &mut Vec<&'static str>,
    ) -> Option<String> {
        let mut recipient: Option<String> = None;
        for word in words.all() {
            if let Some(target) = words.text(word).strip_prefix("to=").map(str::to_owned) {
                words.remove(word);
                if target.is_empty() {
                    repairs.push("empty_recipient");
                } else if recipient.is_none() || target != "assistant" {
                    if recipient.is_some() {
                        repairs.push("several_recipients");
                    }
                    recipient = Some(target);
                }
            }
        }
        if recipient.is_none() {
            let named = |&word: &usize| {
                let text = words.text(word);
                let qualified = text.starts_with("functions.");
                // Without `<|message|>` these may be the words of an answer, in which a tool's name means itself. Only
                // before a channel, or right after its name, are they certain to be a header's.
                let in_header = message
                    || self.channels > 0 && (words.segment(word) == 0 || qualified && words.place(word) == 1);
                in_header && (qualified || tools.iter().any(|tool| tool == text))
            };
            if let Some(word) = words.all().find(named) {
                recipient = Some(words.text(word).to_owned());
                words.remove(word);
                repairs.push("recipient_without_to");
            }
        }
        recipient
    }

    fn named_channel(
        &self,
        words: &mut Words,
        message: bool,
        repairs: &mut Vec<&'static str>,
    ) -> Option<String> {
        let mut channel = None;
        for segment in (1..self.segments.len()).rev() {
            // A recipient in the first place, or what follows `<|constrain|>`, is no channel.
            let Some(first) = words.first_of_segment(segment) else { continue };
            let (name, len) = channel_of(words.text(first));
            if name != words.text(first) {
                repairs.push("misspelt_channel");
            } else if channel.is_none() && !is_channel(&name) {
                repairs.push("unknown_channel");
            }
            channel = channel.or(Some(name));
            words.remove_prefix(first, len);
        }
        if self.channels > 1 {
            repairs.push("several_channels");
        }
        if channel.is_none() {
            repairs.push("missing_channel");
            // In running text the words mean themselves; alone, or before `<|message|>`, one is a channel.
            let found = words.all().find(|&word| is_channel(words.text(word)));
            if let Some(word) = found
                && self.channels == 0
                && (message || words.all().count() == 1)
            {
                channel = Some(words.text(word).to_lowercase());
                words.remove(word);
            }
        }
        channel
    }
}

fn is_channel(word: &str) -> bool {
    CHANNELS.contains(&word.to_lowercase().as_str())
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

    fn segment(&self, word: usize) -> usize {
        self.parts[self.words[word].part].0
    }

    /// How many words precede it in its segment, removed ones too.
    fn place(&self, word: usize) -> usize {
        (0..word).rev().take_while(|&before| self.segment(before) == self.segment(word)).count()
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
