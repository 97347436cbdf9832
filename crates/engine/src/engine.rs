//! The handle that others hold on an engine: start it, submit requests, look at it, stop it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use checkpoint::Config;
use gptoss::{BLOCK_TOKENS, Backend, BlockId, KvLayout};
use harmony::Harmony;

use crate::costs::MAX_STEP_TOKENS;
use crate::grammar::Grammars;
use crate::kv::Blocks;
use crate::masks::{self, Masks};
use crate::scheduler::{Limits, Scheduler};
use crate::worker::{Settings, Worker, default_seed};
use crate::{InvalidParam, Request, SamplingParams, Sink, Speculation, SpeculationCounts};

/// What bounds an engine. Any field may be changed from its default.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineOptions {
    /// Longest sequence, prompt and answer. `None` (the default): the model's context, or what the key/value cache holds if
    /// that is less.
    pub max_model_len: Option<usize>,
    /// Sequences computed at a time. Default 64.
    pub max_num_seqs: usize,
    /// Tokens per step, at least `max_num_seqs`. Default 512: on CPUs larger steps are hardly more efficient.
    pub max_num_batched_tokens: usize,
    /// Of these, tokens of one sequence's prompt; 0 (the default): all.
    pub long_prefill_token_threshold: usize,
    /// While sequences decode, prompts add to a step about the time that it takes without them, so that answers come at about half
    /// their speed or more, but get at least what [`Backend::least_prompt_tokens`] says. Otherwise they get all that the answers leave of a step.
    /// Default false.
    pub even_steps: bool,
    /// Bytes of the key/value cache. Default 1 GiB.
    pub kv_cache_bytes: usize,
    /// Requests that may be in the engine at a time, running ones included. Default 4096.
    pub max_queued_requests: usize,
    /// Prompt tokens that may wait at a time. `None` (the default): eight times what the key/value cache holds.
    pub max_queued_tokens: Option<usize>,
    /// Whether requests share the computation of equal beginnings. Default true.
    pub prefix_caching: bool,
    /// The model's own stop tokens, from `generation_config.json`, beside Harmony's. Default none.
    pub eos_ids: Vec<u32>,
    /// Seed of requests without one. Default 0.
    pub seed: u64,
    /// Who goes first. Default first come, first served.
    pub policy: SchedulingPolicy,
    /// Guess tokens and verify several in one step. Changes no answer. `None` (the default): no.
    pub speculation: Option<Speculation>,
    /// Chats keep to Harmony's format where it is no text. Default false.
    pub harmony_guard: bool,
    /// Log-probabilities are those of the distribution that is drawn from, not the model's own. Default false.
    pub processed_logprobs: bool,
}

/// In which order requests are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SchedulingPolicy {
    /// First come, first served.
    #[default]
    Arrival,
    /// By [`Request::priority`], then by arrival.
    Priority,
    /// Clients take turns: of those that wait, each client's next request goes before any client's one after next (start-time fair
    /// queueing, Goyal, Vin and Cheng 1996, a request being the unit of service).
    RoundRobin,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            long_prefill_token_threshold: 0,
            even_steps: false,
            kv_cache_bytes: 1 << 30,
            max_queued_requests: 4096,
            max_queued_tokens: None,
            prefix_caching: true,
            eos_ids: Vec::new(),
            seed: 0,
            policy: SchedulingPolicy::default(),
            speculation: None,
            harmony_guard: false,
            processed_logprobs: false,
        }
    }
}

/// Why an engine does not start, or a batch of prompts fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option breaks its rule.
    #[error("`{option}` {message}")]
    Option {
        /// The option's name as in [`EngineOptions`].
        option: &'static str,
        /// The rule and what was found, as the rest of a sentence.
        message: String,
    },
    /// The key/value cache does not hold one sequence of the length asked for.
    #[error(
        "a key/value cache of {available} bytes does not hold one sequence of {max_model_len} tokens, which needs {needed} \
         bytes; the largest `max_model_len` that fits is {largest}"
    )]
    KvCache {
        /// The length asked for, or 1.
        max_model_len: usize,
        /// Bytes for it.
        needed: usize,
        /// `kv_cache_bytes`.
        available: usize,
        /// The longest sequence that fits.
        largest: usize,
    },
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] gptoss::Error),
    /// The operating system gave no thread.
    #[error("the engine's thread cannot be started: {0}")]
    Thread(#[source] std::io::Error),
    /// A prompt was refused.
    #[error("prompt {index}: {source}")]
    Submit {
        /// Which of the prompts.
        index: usize,
        /// Why.
        source: SubmitError,
    },
    /// A conversation cannot be rendered.
    #[error("prompt {index}: {source}")]
    Render {
        /// Which of the prompts.
        index: usize,
        /// Why.
        source: harmony::Error,
    },
    /// As many parameters as prompts are needed, or one.
    #[error("The lengths of prompts ({prompts}) and params ({params}) must be the same.")]
    Lengths {
        /// Number of prompts.
        prompts: usize,
        /// Number of parameters.
        params: usize,
    },
    /// The engine gave up on a prompt.
    #[error("prompt {index}: {source}")]
    Failed {
        /// Which of the prompts.
        index: usize,
        /// Why.
        source: crate::Failure,
    },
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// A parameter breaks its rule.
    #[error(transparent)]
    Invalid(#[from] InvalidParam),
    /// Prompts that belong together could never wait together.
    #[error("prompt must have at most {most} {what} in all, as many as may wait at a time, got {found}.")]
    TooMany {
        /// Prompts or tokens.
        what: &'static str,
        /// Of all the prompts.
        found: usize,
        /// That may wait.
        most: usize,
    },
    /// The prompt leaves no room in the context.
    #[error(
        "This model's maximum context length is {max_model_len} tokens. However, your prompt contains {prompt} input tokens. \
         Please reduce the length of the input prompt."
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Longest sequence, one generated token included.
        max_model_len: usize,
    },
    /// There is nothing to continue.
    #[error("The prompt is empty.")]
    EmptyPrompt,
    /// The prompt has an id that the model does not know.
    #[error("Token id {token} is out of vocabulary. Vocabulary size: {vocab_size}")]
    TokenOutOfVocabulary {
        /// The id.
        token: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// The queue is full: later it may not be.
    #[error("The server is busy. Please retry.")]
    Full,
    /// The engine takes no more requests.
    #[error("The engine is shutting down.")]
    ShuttingDown,
}

/// An engine at a moment. Counters only grow.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Sequences that hold blocks.
    pub running: usize,
    /// Sequences that wait for blocks. Of a request that has not begun, one.
    pub waiting: usize,
    /// Sequences that are held back by their [`Valve`].
    pub paused: usize,
    /// Blocks of the full layers that sequences hold.
    pub full_blocks_used: usize,
    /// All blocks of the full layers.
    pub full_blocks: usize,
    /// Bytes of the key/value cache.
    pub cache_bytes: usize,
    /// Bytes of the weights; 0 if unknown.
    pub weight_bytes: usize,
    /// Blocks of the sliding layers that sequences hold.
    pub sliding_blocks_used: usize,
    /// All blocks of the sliding layers.
    pub sliding_blocks: usize,
    /// Prompt tokens of the requests that began to generate.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Those found there.
    pub prefix_hits: u64,
    /// Times a sequence gave its blocks to an older one and started over.
    pub preemptions: u64,
    /// What guessing tokens brought.
    pub speculation: SpeculationCounts,
    /// Steps that succeeded.
    pub steps: u64,
    /// Steps that failed.
    pub failed_steps: u64,
    /// Requests that failed with [`Failure::Corrupted`](crate::Failure::Corrupted).
    pub corrupted_requests: u64,
    /// Steps by the tokens that they computed: up to each of [`STEP_TOKENS`], and more.
    pub step_tokens: [u64; STEP_TOKENS.len() + 1],
    /// Tokens of all steps.
    pub step_tokens_sum: u64,
    /// Steps that only decoded, and those with prompts, by the time that the backend took: up to each of [`STEP_SECONDS`],
    /// and more.
    pub step_seconds: [[u64; STEP_SECONDS.len() + 1]; 2],
    /// Time of all steps of each kind.
    pub step_seconds_sum: [f64; 2],
    /// The last step failed.
    pub unhealthy: bool,
    /// The engine has ended because its device, or its own thread, failed beyond repair.
    pub lost: bool,
    /// When the step in progress began. A step that takes far too long is a wedged device.
    pub step_started: Option<Instant>,
}

/// Bounds of [`Stats::step_tokens`].
pub const STEP_TOKENS: [u64; 13] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];

/// Bounds of [`Stats::step_seconds`].
pub const STEP_SECONDS: [f64; 9] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];

impl Stats {
    /// Counts a step.
    pub(crate) fn step(&mut self, tokens: usize, prompts: bool, time: Duration) {
        let tokens = tokens as u64;
        self.step_tokens[STEP_TOKENS.partition_point(|&bound| bound < tokens)] += 1;
        self.step_tokens_sum += tokens;
        let (kind, seconds) = (usize::from(prompts), time.as_secs_f64());
        self.step_seconds[kind][STEP_SECONDS.partition_point(|&bound| bound < seconds)] += 1;
        self.step_seconds_sum[kind] += seconds;
    }
}

/// A backend at work on a thread of its own. Clones are handles on the same engine; when the last is dropped, the requests
/// still in it fail.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    config: Config,
    harmony: Arc<Harmony>,
    grammars: Grammars,
    eos_ids: Vec<u32>,
    policy: SchedulingPolicy,
    max_model_len: usize,
    max_queued_requests: usize,
    max_queued_tokens: usize,
    seed: u64,
    prefix_blocks: usize,
    device: String,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What handles and the engine's thread share.
pub(crate) struct Shared {
    mailbox: Mutex<Mailbox>,
    /// Signalled when the mailbox changes.
    changed: Condvar,
    stats: Mutex<Stats>,
}

#[derive(Default)]
pub(crate) struct Mailbox {
    pub(crate) incoming: VecDeque<Job>,
    pub(crate) cancelled: Vec<u64>,
    /// Requests to hold back (false) or to let go on (true), in order.
    pub(crate) valves: Vec<(u64, bool)>,
    pub(crate) reset_prefixes: bool,
    pub(crate) phase: Phase,
    /// Requests accepted and not ended.
    pub(crate) open: usize,
    /// Prompt tokens of requests that did not begin to generate.
    pub(crate) queued_tokens: usize,
    submitted: u64,
}

/// Life of the engine's thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) enum Phase {
    #[default]
    Serving,
    /// What is there is finished, nothing more is taken.
    Draining,
    /// What is there fails.
    Aborting,
    /// The same, but for a step that may never come back.
    Abandoned,
    /// The thread has ended.
    Ended,
}

/// A request on its way to the engine's thread.
pub(crate) struct Job {
    /// Order of arrival, from 1.
    pub(crate) number: u64,
    pub(crate) arrival: Instant,
    /// Valid.
    pub(crate) request: Request,
    pub(crate) sink: Sink,
}

impl Engine {
    /// Allocates the key/value cache and starts the engine's thread.
    ///
    /// # Errors
    /// [`Error::Option`] and [`Error::KvCache`] for options that cannot work together, [`Error::Backend`] if the memory is
    /// not there.
    pub fn start(
        mut backend: Box<dyn Backend>,
        harmony: Arc<Harmony>,
        options: EngineOptions,
    ) -> Result<Engine, Error> {
        let config = backend.config().clone();
        let layout = backend.kv_layout();
        let capacity = Capacity::plan(&options, &config, layout)?;
        backend.allocate_kv(capacity.full_blocks, capacity.sliding_blocks)?;
        let EngineOptions { mut eos_ids, max_queued_tokens, max_queued_requests, .. } = options;
        eos_ids.extend(harmony.stop_ids());
        eos_ids.retain(|&id| (id as usize) < config.vocab_size);

        let limits = Limits {
            sequences: options.max_num_seqs,
            tokens: options.max_num_batched_tokens,
            prompt_tokens: match options.long_prefill_token_threshold {
                0 => options.max_num_batched_tokens,
                most => most,
            },
        };
        let blocks = Blocks::new(capacity.full_blocks, capacity.sliding_blocks, config.sliding_window);
        let shared = Arc::new(Shared {
            mailbox: Mutex::default(),
            changed: Condvar::new(),
            stats: Mutex::new(Stats {
                full_blocks: capacity.full_blocks,
                sliding_blocks: capacity.sliding_blocks,
                cache_bytes: layout.bytes(capacity.full_blocks, capacity.sliding_blocks),
                weight_bytes: backend.weight_bytes(),
                ..Stats::default()
            }),
        });
        let device = backend.describe();
        let settings = Settings {
            harmony: Arc::clone(&harmony),
            eos_ids: eos_ids.clone(),
            max_model_len: capacity.max_model_len,
            seed: options.seed,
            policy: options.policy,
            prefix_caching: options.prefix_caching,
            even_steps: options.even_steps,
            speculation: options.speculation,
            harmony_guard: options.harmony_guard,
            processed_logprobs: options.processed_logprobs,
            sequences: options.max_num_seqs,
            blocks: (capacity.full_blocks, capacity.sliding_blocks),
        };
        let masks = Masks::new(masks::threads()).map_err(Error::Thread)?;
        let worker =
            Worker::new(backend, Arc::clone(&shared), Scheduler::new(limits, blocks), masks, settings);
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || worker.run())
            .map_err(Error::Thread)?;
        let max_queued_tokens =
            max_queued_tokens.unwrap_or(capacity.full_blocks.saturating_mul(8 * BLOCK_TOKENS));
        Ok(Engine {
            inner: Arc::new(Inner {
                shared,
                config,
                grammars: Grammars::new(Arc::clone(&harmony)),
                harmony,
                eos_ids,
                policy: options.policy,
                max_model_len: capacity.max_model_len,
                max_queued_requests,
                max_queued_tokens,
                seed: options.seed,
                prefix_blocks: if options.prefix_caching { capacity.full_blocks } else { 0 },
                device,
                thread: Mutex::new(Some(thread)),
            }),
        })
    }

    /// Queues a request. Its events go to `sink`, on the engine's thread. Dropping the handle cancels the request.
    ///
    /// # Errors
    /// Whatever [`Engine::validate`] finds; [`SubmitError::Full`] and [`SubmitError::ShuttingDown`].
    pub fn submit(&self, request: Request, sink: Sink) -> Result<RequestHandle, SubmitError> {
        let request = self.validate(request)?;
        let mut mailbox = self.inner.shared.mailbox();
        let queued_tokens = self.inner.admit(&mailbox, request.prompt.len())?;
        mailbox.submitted += 1;
        mailbox.open += 1;
        mailbox.queued_tokens = queued_tokens;
        let number = mailbox.submitted;
        mailbox.incoming.push_back(Job { number, arrival: Instant::now(), request, sink });
        drop(mailbox);
        self.inner.shared.changed.notify_all();
        Ok(RequestHandle { shared: Arc::clone(&self.inner.shared), number })
    }

    /// How many requests are in the engine, running ones included.
    ///
    /// # Errors
    /// [`SubmitError::Full`] and [`SubmitError::ShuttingDown`] if a prompt of so many tokens is not taken now.
    pub(crate) fn queue(&self, prompt: usize) -> Result<usize, SubmitError> {
        let mailbox = self.inner.shared.mailbox();
        self.inner.admit(&mailbox, prompt).map(|_| mailbox.open)
    }

    /// The seed of the request of this number, if it brings none.
    pub(crate) fn seed(&self, number: u64) -> u64 {
        default_seed(self.inner.seed, number)
    }

    /// Blocks that may hold prefixes which other requests share.
    pub(crate) fn prefix_blocks(&self) -> usize {
        self.inner.prefix_blocks
    }

    /// Requests that may be in the engine, and tokens of prompts that may wait.
    pub(crate) fn queue_limits(&self) -> (usize, usize) {
        (self.inner.max_queued_requests, self.inner.max_queued_tokens)
    }

    /// Checks a request as [`Engine::submit`] does and returns it as the engine will run it.
    pub fn validate(&self, mut request: Request) -> Result<Request, SubmitError> {
        let vocab_size = self.inner.config.vocab_size;
        request.params = request.params.validate(vocab_size)?;
        if self.inner.policy != SchedulingPolicy::Priority {
            request.priority = 0;
        }
        if self.inner.policy != SchedulingPolicy::RoundRobin {
            request.client = None;
        }
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if let Some(&token) = request.prompt.iter().find(|&&t| t as usize >= vocab_size) {
            return Err(SubmitError::TokenOutOfVocabulary { token, vocab_size });
        }
        let (prompt, max_model_len) = (request.prompt.len(), self.inner.max_model_len);
        if prompt + request.params.max_tokens.unwrap_or(1).min(1) > max_model_len {
            return Err(SubmitError::TooLong { prompt, max_model_len });
        }
        let (min, room) = (request.params.min_tokens, max_model_len - prompt);
        if request.params.max_tokens.is_none() && min > room {
            let message = format!("must be less than or equal to max_tokens={room}, got {min}.");
            return Err(InvalidParam { field: "min_tokens", message }.into());
        }
        self.bound_logprobs(std::slice::from_mut(&mut request), 1)?;
        request.params.prepare(self.inner.harmony.tokenizer());
        Ok(request)
    }

    /// Bounds how many log-probabilities there are of requests that belong together: those of each token of prompts and answers, with
    /// its alternatives. Those of prompts count as often as they are shown. Answers without a `max_tokens` get one if there might be too
    /// many.
    ///
    /// # Errors
    /// Names the field of which there may be more.
    pub fn bound_logprobs(&self, requests: &mut [Request], prompts_shown: usize) -> Result<(), InvalidParam> {
        let room = |prompt: &[u32]| self.inner.max_model_len.saturating_sub(prompt.len());
        // Those of a token of each of a request's answers.
        let of_token = |params: &SamplingParams| {
            let ids = params.logprob_token_ids.as_ref().map_or(0, Vec::len);
            params.logprobs.map_or(0, |top| top.max(ids).saturating_add(1).saturating_mul(params.n))
        };
        // Those of a token of all answers of which nobody said how long they may be, and how long the longest may become.
        let (mut of_prompts, mut of_answers, mut open, mut longest) = (0usize, 0usize, 0usize, 0usize);
        for Request { prompt, params, .. } in &*requests {
            let of_prompt =
                params.prompt_logprobs.map_or(0, |top| top.saturating_add(1).saturating_mul(prompt.len()));
            of_prompts = of_prompts.saturating_add(of_prompt.saturating_mul(prompts_shown));
            match params.max_tokens {
                Some(tokens) => {
                    let tokens = tokens.min(room(prompt));
                    of_answers = of_answers.saturating_add(of_token(params).saturating_mul(tokens));
                }
                None => (open, longest) = (open.saturating_add(of_token(params)), longest.max(room(prompt))),
            }
        }
        let entries = of_prompts.saturating_add(of_answers);
        if entries.saturating_add(open) <= MAX_LOGPROBS {
            let most = (MAX_LOGPROBS - entries).checked_div(open).unwrap_or(usize::MAX);
            let limited = |request: &&mut Request| {
                request.params.max_tokens.is_none() && request.params.logprobs.is_some()
            };
            if most < longest {
                requests.iter_mut().filter(limited).for_each(|r| r.params.max_tokens = Some(most));
            }
            return Ok(());
        }
        let entries = entries.saturating_add(open);
        let field = if of_prompts > of_answers { "prompt_logprobs" } else { "logprobs" };
        let message = format!(
            "must be so few, or of so few tokens, that there are at most {MAX_LOGPROBS} entries with those of all alternatives, got \
             up to {entries}."
        );
        Err(InvalidParam { field, message })
    }

    /// The engine at this moment.
    pub fn stats(&self) -> Stats {
        let incoming = self.inner.shared.mailbox().incoming.len();
        let mut stats = self.inner.shared.stats().clone();
        stats.waiting += incoming;
        stats
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Longest sequence, prompt and answer.
    pub fn max_model_len(&self) -> usize {
        self.inner.max_model_len
    }

    /// The chat format and the tokenizer.
    pub fn harmony(&self) -> &Arc<Harmony> {
        &self.inner.harmony
    }

    /// Where the grammars of requests are compiled.
    pub fn grammars(&self) -> &Grammars {
        &self.inner.grammars
    }

    /// Who goes first.
    pub fn policy(&self) -> SchedulingPolicy {
        self.inner.policy
    }

    /// The model's own stop tokens.
    pub fn eos_ids(&self) -> &[u32] {
        &self.inner.eos_ids
    }

    /// The backend's line for people.
    pub fn device(&self) -> &str {
        &self.inner.device
    }

    /// Forgets every cached prefix, before the next step.
    pub fn reset_prefix_cache(&self) {
        self.inner.shared.mailbox().reset_prefixes = true;
        self.inner.shared.changed.notify_all();
    }

    /// Takes no more requests; those in the engine are finished. Returns at once: see [`Engine::wait`].
    pub fn shutdown(&self) {
        self.inner.shared.enter(Phase::Draining);
    }

    /// Takes no more requests; those in the engine fail with [`crate::Failure::ShuttingDown`]. Returns at once.
    pub fn abort(&self) {
        self.inner.shared.enter(Phase::Aborting);
    }

    /// Waits until the engine has ended, after [`Engine::shutdown`] or [`Engine::abort`] or because it is lost, and its backend
    /// is gone. Not for sinks.
    pub fn wait(&self) {
        let shared = &self.inner.shared;
        let ended = shared.changed.wait_while(shared.mailbox(), |mailbox| mailbox.phase != Phase::Ended);
        drop(ended);
        let thread = self.inner.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // An engine that panicked has told its requests.
        thread.into_iter().for_each(|thread| drop(thread.join()));
    }

    /// Gives up on an engine whose step does not come back: it takes no more requests, and nobody waits for its thread, which
    /// ends if the step ever does. The requests that it has hear nothing until then: see [`Valve::abandoned`].
    pub fn abandon(&self) {
        self.inner.shared.enter(Phase::Abandoned);
        drop(self.inner.thread.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Inner {
    /// Prompt tokens that wait once a prompt of so many has come, if it may.
    fn admit(&self, mailbox: &Mailbox, prompt: usize) -> Result<usize, SubmitError> {
        if mailbox.phase > Phase::Serving {
            return Err(SubmitError::ShuttingDown);
        }
        let queued_tokens = mailbox.queued_tokens.saturating_add(prompt);
        // A prompt may always wait alone.
        if mailbox.open >= self.max_queued_requests
            || (mailbox.queued_tokens > 0 && queued_tokens > self.max_queued_tokens)
        {
            return Err(SubmitError::Full);
        }
        Ok(queued_tokens)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.enter(Phase::Aborting);
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // A sink may own the last handle; the thread cannot wait for itself.
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id()) {
            // An engine that panicked has told its requests.
            let _ = thread.join();
        }
    }
}

/// Entries (token and alternatives) that log-probabilities may take: some 200 MB.
const MAX_LOGPROBS: usize = 16 << 20;

impl Shared {
    pub(crate) fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stats(&self) -> MutexGuard<'_, Stats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while `idle` holds.
    pub(crate) fn wait_while(&self, idle: impl FnMut(&mut Mailbox) -> bool) -> MutexGuard<'_, Mailbox> {
        self.changed.wait_while(self.mailbox(), idle).unwrap_or_else(PoisonError::into_inner)
    }

    fn cancel(&self, number: u64) {
        let mut mailbox = self.mailbox();
        if mailbox.phase != Phase::Ended {
            mailbox.cancelled.push(number);
        }
        drop(mailbox);
        self.changed.notify_all();
    }

    /// Moves on to a later phase.
    pub(crate) fn enter(&self, phase: Phase) {
        let mut mailbox = self.mailbox();
        mailbox.phase = mailbox.phase.max(phase);
        drop(mailbox);
        self.changed.notify_all();
    }
}

/// A request in the engine. Dropping it cancels the request; it has no effect on one that ended.
#[must_use = "dropping the handle cancels the request"]
pub struct RequestHandle {
    shared: Arc<Shared>,
    number: u64,
}

impl RequestHandle {
    /// Removes the request before the next step. Events of the step in progress may still come.
    pub fn cancel(&self) {
        self.shared.cancel(self.number);
    }

    /// Holds the request back and lets it go on; for sinks, too.
    pub fn valve(&self) -> Valve {
        Valve { shared: Arc::clone(&self.shared), number: self.number }
    }

    /// The request's number in the order of submission, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for RequestHandle {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Holds a request back while its client does not keep up. It keeps its place in the order of arrival and its tokens, and
/// gives its blocks back; what it had computed is mostly still in the prefix cache when it goes on.
#[derive(Clone)]
pub struct Valve {
    shared: Arc<Shared>,
    number: u64,
}

impl Valve {
    /// No step after the one in progress computes the request.
    pub fn close(&self) {
        self.turn(false);
    }

    /// The request goes on.
    pub fn open(&self) {
        self.turn(true);
    }

    /// Removes the request, as [`RequestHandle::cancel`] does.
    pub fn cancel(&self) {
        self.shared.cancel(self.number);
    }

    /// The engine was given up, see [`Engine::abandon`]: nothing may come any more.
    pub fn abandoned(&self) -> bool {
        self.shared.mailbox().phase == Phase::Abandoned
    }

    fn turn(&self, open: bool) {
        let mut mailbox = self.shared.mailbox();
        if mailbox.phase != Phase::Ended {
            mailbox.valves.push((self.number, open));
        }
        drop(mailbox);
        self.shared.changed.notify_all();
    }
}

/// How the bytes of the key/value cache become blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Capacity {
    max_model_len: usize,
    full_blocks: usize,
    sliding_blocks: usize,
}

impl Capacity {
    /// One sequence of the longest length must fit. Of the bytes beyond that, up to half become sliding blocks: twice what
    /// all sequences need for their windows, so that cached prefixes can keep theirs. The others become full blocks. Where the longest
    /// length is to be found, it leaves them an eighth of all bytes: else a cache of less than the model's context is for few sequences.
    fn plan(options: &EngineOptions, config: &Config, layout: KvLayout) -> Result<Capacity, Error> {
        let sequences = options.max_num_seqs;
        if let Some(Speculation { tokens, lookup_min, lookup_max, .. }) = options.speculation
            && (tokens == 0 || tokens > MAX_STEP_TOKENS || lookup_min == 0 || lookup_max < lookup_min)
        {
            let message = format!(
                "must guess 1 to {MAX_STEP_TOKENS} tokens after at least 1 and at most `lookup_max` equal ones, got {tokens} after \
                 {lookup_min} to {lookup_max}."
            );
            return Err(Error::Option { option: "speculation", message });
        }
        let fail = |option, message| Err(Error::Option { option, message });
        if sequences == 0 {
            return fail("max_num_seqs", "must be at least 1, got 0.".to_owned());
        }
        if options.max_num_batched_tokens < sequences {
            let found = options.max_num_batched_tokens;
            let message = format!("must be at least `max_num_seqs`, {sequences}, got {found}.");
            return fail("max_num_batched_tokens", message);
        }
        if let Some(len) = options.max_model_len
            && (len == 0 || len > config.max_context)
        {
            let message = format!("must be in [1, {}], the model's context, got {len}.", config.max_context);
            return fail("max_model_len", message);
        }

        let bytes = options.kv_cache_bytes;
        let (full_bytes, sliding_bytes) = (layout.full_block_bytes, layout.sliding_block_bytes);
        let window = config.sliding_window.div_ceil(BLOCK_TOKENS) + 1;
        // The window before a chunk, the chunk, and one more because neither begins at a block's edge.
        let least = window + options.max_num_batched_tokens.div_ceil(BLOCK_TOKENS) + 1;
        let cost = |full: usize| {
            full.saturating_mul(full_bytes).saturating_add(full.min(least).saturating_mul(sliding_bytes))
        };
        let most = config.max_context.div_ceil(BLOCK_TOKENS);
        // The longest length beside so many sliding blocks.
        let beside = |sliding: usize| {
            let fitting = most.min(if bytes >= cost(sliding) {
                bytes.saturating_sub(sliding * sliding_bytes).checked_div(full_bytes).unwrap_or(most)
            } else {
                bytes.checked_div(full_bytes + sliding_bytes).unwrap_or(most)
            });
            (fitting * BLOCK_TOKENS).min(config.max_context)
        };
        let largest = beside(least);
        let wanted = sequences.saturating_mul(2 * window).min(MAX_BLOCKS);
        let eighth = (bytes / 8).checked_div(sliding_bytes).unwrap_or(wanted).min(wanted);
        let max_model_len = options.max_model_len.unwrap_or(beside(least.max(eighth)).max(1));
        if max_model_len > largest {
            let needed = cost(max_model_len.div_ceil(BLOCK_TOKENS));
            return Err(Error::KvCache { max_model_len, needed, available: bytes, largest });
        }

        let full_least = max_model_len.div_ceil(BLOCK_TOKENS);
        let sliding_least = least.min(full_least);
        let rest = bytes.saturating_sub(cost(full_least));
        let sliding_more = (rest / 2).checked_div(sliding_bytes).unwrap_or(wanted).min(wanted);
        let rest = rest - sliding_more * sliding_bytes;
        let all = sequences.saturating_mul(full_least);
        let full_more = rest.checked_div(full_bytes).unwrap_or(all).min(MAX_BLOCKS);
        Ok(Capacity {
            max_model_len,
            full_blocks: full_least + full_more,
            // No sequence holds more of these than of the others.
            sliding_blocks: (sliding_least + sliding_more).min(full_least + full_more),
        })
    }
}

/// Bounds the bookkeeping of models with tiny blocks.
const MAX_BLOCKS: usize = 1 << 24;

const _: () = assert!(2 * MAX_BLOCKS + (1 << 24) < BlockId::MAX as usize);
