//! What goes into the engine and what comes out of it, for anyone who holds an [`crate::Engine`].

use std::sync::Arc;
use std::time::Duration;

use gptoss::TokenLogprobs;

use crate::{Grammar, SamplingParams};

/// A prompt with its parameters. It becomes `params.n` sequences, which share the prompt's computation.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How to sample.
    pub params: SamplingParams,
    /// How tokens become text.
    pub output: OutputMode,
    /// What the answer must follow, from its first token on.
    pub grammar: Option<Grammar>,
    /// Requests of less go first. Default 0.
    pub priority: i64,
    /// Whose it is, where clients take turns. Default `None`, which is one client like any other.
    pub client: Option<[u8; 32]>,
    /// Only requests with the same salt share the computation of equal beginnings.
    pub cache_salt: Option<String>,
    /// The engine's guard of the format, if it has one, may be used. Default true; false for prompts that tell of tools which
    /// are not in [`OutputMode::Chat`].
    pub guarded: bool,
}

impl Request {
    /// A request without a grammar, of ordinary priority.
    pub fn new(prompt: Vec<u32>, params: SamplingParams, output: OutputMode) -> Request {
        Request {
            prompt,
            params,
            output,
            grammar: None,
            priority: 0,
            client: None,
            cache_salt: None,
            guarded: true,
        }
    }
}

/// How tokens become text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputMode {
    /// Decoded as it is.
    Text,
    /// Parsed as Harmony after `<|start|>assistant`.
    Chat {
        /// Names of the declared function tools.
        tools: Arc<[String]>,
        /// The last tokens of the prompt, if it begins the answer: what came after `<|start|>assistant`.
        begun: Vec<u32>,
    },
}

/// Where events go. Called on the engine's thread, of a step's events while the device computes the next one: it must not block.
/// Returning `false` cancels the request.
pub type Sink = Box<dyn FnMut(Event) -> bool + Send>;

/// What happens to a request, in order. Each choice ends with exactly one `Finished`, the request with `Done`; or the whole
/// with one `Failed`. After a cancellation nothing more comes.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt was computed. Comes once, before everything else.
    Started {
        /// Prompt tokens that came from the prefix cache.
        cached_tokens: usize,
        /// From its arrival until it was computed for the first time.
        queued: Duration,
        /// One entry per prompt token, the first `None`, if `prompt_logprobs` was asked.
        prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    },
    /// New tokens of a choice, at least one.
    Tokens {
        /// Which of the `n` answers.
        choice: usize,
        /// The tokens, stop token included.
        token_ids: Vec<u32>,
        /// Text that became certain with them (held back while it may become a stop string). Empty for chats.
        text: String,
        /// For chats, what became certain of the message fields.
        deltas: Vec<harmony::Delta>,
        /// One per token, if asked.
        logprobs: Vec<TokenLogprobs>,
    },
    /// A choice ended.
    Finished {
        /// Which of the `n` answers.
        choice: usize,
        /// Why.
        reason: FinishReason,
        /// What stopped it, if it was not the model's end of turn.
        stop: Option<StopReason>,
        /// Tokens generated.
        completion_tokens: usize,
        /// Those that went to reasoning (chats only).
        reasoning_tokens: usize,
        /// Times the parser mended malformed output, by kind (chats only).
        repairs: Vec<(&'static str, u64)>,
        /// Times that the choice gave its blocks to an older one and started over.
        preemptions: usize,
    },
    /// All choices ended.
    Done,
    /// The engine could not serve the request.
    Failed(Failure),
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token or stop string.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// The model asked for a tool.
    ToolCalls,
    /// It said the same again and again.
    Repetition,
}

/// What stopped a choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// A stop token other than the end of turn.
    Token(u32),
    /// A stop string.
    Text(String),
}

/// Why the engine could not serve a request that it had accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The engine is going down.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// The device failed.
    #[error("the engine failed: {0}")]
    Device(String),
    /// See [`gptoss::SequenceOutput::corrupted`].
    #[error("{}", gptoss::Error::Corrupted)]
    Corrupted,
    /// The request's grammar cannot be followed any further: it is too complex, or other fields forbid what it demands.
    #[error("the grammar cannot be followed: {0}")]
    Grammar(String),
    /// `bad_words` forbid every token that other fields let come.
    #[error("bad_words forbid every token that may come next")]
    Forbidden,
}
