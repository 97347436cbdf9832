//! Pieces that the answers of both generating endpoints have: identity, usage, log-probabilities.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use engine::{Event, FinishReason, StopReason};
use gptoss::TokenLogprobs;
use serde::{Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};
use tokenizer::Tokenizer;

/// A part of an answer, written once.
pub(crate) fn raw(value: &impl Serialize) -> Box<RawValue> {
    to_raw_value(value).expect("an answer is JSON")
}

/// What is the same in all parts of an answer.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// With its prefix, such as `chatcmpl-…`.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: Option<String>,
    pub(crate) service_tier: Option<&'static str>,
    /// The answer says how long it took since then.
    pub(crate) timed: Option<Instant>,
}

/// Token counts of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
    pub(crate) prompt_tokens_details: PromptDetails,
    /// Unknown while an answer is being generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct PromptDetails {
    pub(crate) cached_tokens: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct CompletionDetails {
    pub(crate) reasoning_tokens: usize,
}

impl Usage {
    pub(crate) fn new(
        prompt_tokens: usize,
        cached_tokens: usize,
        completion_tokens: usize,
        reasoning_tokens: Option<usize>,
    ) -> Usage {
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
            completion_tokens_details: reasoning_tokens.map(|n| CompletionDetails { reasoning_tokens: n }),
        }
    }
}

/// When the parts of an answer came.
#[derive(Debug, Default)]
pub(crate) struct Timing {
    queued: Option<Duration>,
    first: Option<Instant>,
    last: Option<Instant>,
    tokens: usize,
}

/// How long an answer took, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct RequestMetrics {
    time_to_first_token_ms: Option<f64>,
    generation_time_ms: Option<f64>,
    queue_time_ms: Option<f64>,
    mean_itl_ms: Option<f64>,
    tokens_per_second: Option<f64>,
    speculative_decoding: Option<()>,
}

impl Timing {
    /// Takes note of an event.
    pub(crate) fn event(&mut self, event: &Event) {
        match event {
            Event::Started { queued, .. } => self.queued = Some(*queued),
            Event::Tokens { token_ids, .. } => {
                let now = Instant::now();
                self.first.get_or_insert(now);
                self.last = Some(now);
                self.tokens += token_ids.len();
            }
            _ => {}
        }
    }

    /// Of an answer to a request that arrived then.
    pub(crate) fn metrics(&self, arrival: Instant) -> RequestMetrics {
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let (first, last) = (self.first, self.last);
        let generation = first.zip(last).map(|(first, last)| milliseconds(last.duration_since(first)));
        RequestMetrics {
            time_to_first_token_ms: first.map(|first| milliseconds(first.duration_since(arrival))),
            generation_time_ms: generation,
            queue_time_ms: self.queued.map(milliseconds),
            mean_itl_ms: generation.filter(|_| self.tokens > 1).map(|time| time / (self.tokens - 1) as f64),
            tokens_per_second: generation
                .filter(|time| *time > 0.0 && self.tokens > 1)
                .map(|time| (self.tokens - 1) as f64 / time * 1e3),
            speculative_decoding: None,
        }
    }
}

/// Which stop token or string ended a choice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum Stop {
    Token(u32),
    Text(String),
}

impl From<StopReason> for Stop {
    fn from(reason: StopReason) -> Stop {
        match reason {
            StopReason::Token(token) => Stop::Token(token),
            StopReason::Text(text) => Stop::Text(text),
        }
    }
}

/// What is said of how a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finish {
    pub(crate) reason: FinishReason,
    pub(crate) stop: Option<Stop>,
}

/// How tokens are shown.
#[derive(Clone, Copy)]
pub(crate) struct TokenNames<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    /// As `token_id:N` instead of their text.
    pub(crate) as_ids: bool,
}

impl TokenNames<'_> {
    /// The token as text; U+FFFD stands for what is not UTF-8 on its own.
    pub(crate) fn name(&self, token: u32) -> String {
        if self.as_ids {
            return format!("token_id:{token}");
        }
        String::from_utf8_lossy(self.tokenizer.token_bytes(token).unwrap_or_default()).into_owned()
    }

    fn bytes(&self, token: u32) -> Option<Vec<u8>> {
        self.tokenizer.token_bytes(token).map(<[u8]>::to_vec)
    }
}

/// `choices[].logprobs` of chats.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatLogprob>,
    pub(crate) refusal: Option<()>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct ChatLogprob {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
    top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct TopLogprob {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
}

impl ChatLogprob {
    pub(crate) fn new(entry: &TokenLogprobs, names: TokenNames<'_>) -> ChatLogprob {
        let top = entry.top.iter().map(|&(token, logprob)| TopLogprob {
            token: names.name(token),
            logprob: finite(logprob),
            bytes: names.bytes(token),
        });
        ChatLogprob {
            token: names.name(entry.token),
            logprob: finite(entry.logprob),
            bytes: names.bytes(entry.token),
            top_logprobs: top.collect(),
        }
    }
}

/// `choices[].logprobs` of completions.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub(crate) struct TextLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Entries<f32>>>,
}

impl TextLogprobs {
    /// Appends a token; `offset` counts the characters before it and moves on. Without an entry (the first token of a
    /// prompt) there is nothing to say but its name.
    pub(crate) fn push(
        &mut self,
        token: u32,
        entry: Option<&TokenLogprobs>,
        offset: &mut usize,
        names: TokenNames<'_>,
    ) {
        let name = names.name(token);
        self.text_offset.push(*offset);
        *offset += name.chars().count();
        self.token_logprobs.push(entry.map(|entry| finite(entry.logprob)));
        self.top_logprobs.push(entry.map(|entry| {
            // Different tokens may have one name; the more probable comes first and stays.
            let all = entry.top.iter().copied().chain([(entry.token, entry.logprob)]);
            all.map(|(token, logprob)| (names.name(token), finite(logprob))).collect()
        }));
        self.tokens.push(name);
    }

    /// Appends what comes after.
    pub(crate) fn extend(&mut self, later: TextLogprobs) {
        self.text_offset.extend(later.text_offset);
        self.token_logprobs.extend(later.token_logprobs);
        self.tokens.extend(later.tokens);
        self.top_logprobs.extend(later.top_logprobs);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// One map per prompt token, from ids to what is known of them; null for the first.
pub(crate) type PromptLogprobs = Vec<Option<Entries<PromptLogprob>>>;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct PromptLogprob {
    logprob: f32,
    rank: usize,
    decoded_token: String,
}

pub(crate) fn prompt_logprobs(
    entries: &[Option<TokenLogprobs>],
    top: usize,
    names: TokenNames<'_>,
) -> PromptLogprobs {
    let map = |entry: &TokenLogprobs| {
        let ranked = entry.top.iter().take(top).enumerate();
        let ranked = ranked.map(|(i, &(token, logprob))| (token, logprob, i + 1));
        let all = [(entry.token, entry.logprob, entry.rank)].into_iter().chain(ranked);
        all.map(|(token, logprob, rank)| {
            let shown = PromptLogprob { logprob: finite(logprob), rank, decoded_token: names.name(token) };
            (token.to_string(), shown)
        })
        .collect()
    };
    entries.iter().map(|entry| entry.as_ref().map(map)).collect()
}

/// A JSON object with its entries in the order in which they came; of those with one name, the first.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entries<V>(Vec<(String, V)>);

impl<V> FromIterator<(String, V)> for Entries<V> {
    fn from_iter<I: IntoIterator<Item = (String, V)>>(entries: I) -> Entries<V> {
        let mut known = HashSet::new();
        Entries(entries.into_iter().filter(|(name, _)| known.insert(name.clone())).collect())
    }
}

impl<V: Serialize> Serialize for Entries<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// JSON has no infinity.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}
