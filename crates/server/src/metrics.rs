//! `GET /metrics`: counts and times in Prometheus' format, under vLLM's names (`serving.md` 12).
//!
//! Written by hand: the format is a dozen lines, and names with a colon and types per name are all that matters.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::{Engine, Event, FinishReason, Place, Replicas, Request, STEP_SECONDS, STEP_TOKENS, Stats};
use gptoss::BLOCK_TOKENS;
use harmony::REPAIRS;

use crate::clock;

/// What has happened since the server started.
#[derive(Debug)]
pub(crate) struct Metrics {
    start_time: u64,
    /// By replica.
    replicas: Vec<Served>,
    disconnects: AtomicU64,
    /// By reason, in the order of `REJECTIONS`.
    rejected: [AtomicU64; REJECTIONS.len()],
    /// Phases of the start, with the seconds that they took.
    startup: Mutex<BTreeMap<&'static str, f64>>,
    tokenizer: Histogram,
    grammar: Histogram,
    /// Names of fields that were ignored, at most `MAX_FIELDS` of them.
    unknown_fields: Mutex<BTreeMap<String, u64>>,
    http: Mutex<BTreeMap<Route, Http>>,
    /// Labels of the key/value cache, each after a comma.
    cache_labels: String,
    /// Series under the names of earlier versions.
    legacy: bool,
}

/// What has happened to the requests that one replica took.
#[derive(Debug)]
struct Served {
    first_token: Histogram,
    between_tokens: Histogram,
    per_token: Histogram,
    whole: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_tokens: Histogram,
    generated_tokens: Histogram,
    max_tokens: Histogram,
    computed_tokens: Histogram,
    choices: Histogram,
    preemptions: Histogram,
    cached_tokens: AtomicU64,
    restarts: AtomicU64,
    /// By reason, in the order of `REASONS`.
    finished: [AtomicU64; REASONS.len()],
    repairs: Mutex<BTreeMap<&'static str, u64>>,
}

const REASONS: [&str; 5] = ["stop", "length", "abort", "error", "repetition"];
const REJECTIONS: [&str; 3] = ["queue_full", "shutting_down", "rate_limited"];

/// Names of unknown fields that have series of their own.
const MAX_FIELDS: usize = 64;
const MAX_FIELD_BYTES: usize = 40;

/// A request refused before it began.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rejection {
    QueueFull,
    ShuttingDown,
    RateLimited,
}

/// Method and template of a path, both of few.
type Route = (&'static str, &'static str);

#[derive(Debug)]
struct Http {
    /// Answers by the first digit of their status.
    statuses: [u64; 6],
    duration: Histogram,
    fine: Histogram,
}

const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const PER_TOKEN: &[f64] = &[
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const PER_REQUEST: &[f64] = &[
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
];
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0,
    100000.0,
];
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const PREEMPTIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];
const HTTP: &[f64] = &[0.1, 0.5, 1.0];
const HTTP_FINE: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0,
    30.0, 60.0,
];
const SHORT: &[f64] = &[0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0];

impl Metrics {
    /// Of so many replicas; `legacy`: with the names of earlier versions.
    pub(crate) fn new(replicas: usize, cache_labels: &[(&str, String)], legacy: bool) -> Metrics {
        Metrics {
            start_time: clock::unix_seconds(),
            replicas: (0..replicas).map(|_| Served::new()).collect(),
            disconnects: AtomicU64::new(0),
            rejected: Default::default(),
            startup: Mutex::default(),
            tokenizer: Histogram::new(SHORT),
            grammar: Histogram::new(SHORT),
            unknown_fields: Mutex::default(),
            http: Mutex::default(),
            cache_labels: cache_labels.iter().map(|(name, value)| format!(",{name}=\"{value}\"")).collect(),
            legacy,
        }
    }

    pub(crate) fn reject(&self, reason: Rejection) {
        self.rejected[reason as usize].fetch_add(1, Relaxed);
    }

    /// A phase of the start is over.
    pub(crate) fn started(&self, phase: &'static str, time: Duration) {
        self.startup.lock().unwrap_or_else(PoisonError::into_inner).insert(phase, time.as_secs_f64());
    }

    /// A request's text became tokens.
    pub(crate) fn tokenized(&self, time: Duration) {
        self.tokenizer.observe(time.as_secs_f64());
    }

    /// A demand on an answer became a grammar.
    pub(crate) fn compiled(&self, time: Duration) {
        self.grammar.observe(time.as_secs_f64());
    }

    /// A request had fields that mean nothing. Names beyond a number, and such as no program has, count as `other`.
    pub(crate) fn unknown_fields(&self, names: &[String]) {
        let mut known = self.unknown_fields.lock().unwrap_or_else(PoisonError::into_inner);
        for name in names {
            let plain = name.len() <= MAX_FIELD_BYTES
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
            let fits = plain && (known.len() < MAX_FIELDS || known.contains_key(name));
            *known.entry(if fits { name.clone() } else { "other".to_owned() }).or_default() += 1;
        }
    }

    /// Choices that have ended, whichever way.
    pub(crate) fn ended(&self) -> u64 {
        self.replicas.iter().flat_map(|served| &served.finished).map(|count| count.load(Relaxed)).sum()
    }

    /// A client went away while its request ran.
    pub(crate) fn disconnect(&self) {
        self.disconnects.fetch_add(1, Relaxed);
    }

    /// The engine of a replica was lost and is replaced.
    pub(crate) fn restarted(&self, replica: usize) {
        self.replicas[replica].restarts.fetch_add(1, Relaxed);
    }

    /// An HTTP request was answered; `route` is a template.
    pub(crate) fn answer(&self, method: &'static str, route: &'static str, status: u16, time: Duration) {
        let mut http = self.http();
        let entry = http.entry((method, route)).or_insert_with(|| Http {
            statuses: [0; 6],
            duration: Histogram::new(HTTP),
            fine: Histogram::new(HTTP_FINE),
        });
        entry.statuses[usize::from(status / 100).min(5)] += 1;
        entry.duration.observe(time.as_secs_f64());
        entry.fine.observe(time.as_secs_f64());
    }

    fn http(&self) -> MutexGuard<'_, BTreeMap<Route, Http>> {
        self.http.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All series; those of an engine are 0 while it is being loaded.
    pub(crate) fn text(
        &self,
        replicas: Option<&Replicas>,
        asleep: Option<u8>,
        model: &str,
        open_metrics: bool,
    ) -> String {
        let all: Vec<Replica<'_>> = self
            .replicas
            .iter()
            .enumerate()
            .map(|(number, served)| {
                let engine = match replicas.and_then(|replicas| replicas.places().get(number)) {
                    Some(Place::Serving(engine)) => Some(engine),
                    _ => None,
                };
                Replica {
                    labels: format!("model_name=\"{}\",engine=\"{number}\"", escape(model)),
                    stats: engine.map(Engine::stats).unwrap_or_default(),
                    grammar_hits: engine.map_or(0, |engine| engine.grammars().cache_hits()),
                    served,
                }
            })
            .collect();
        let mut text = Text { out: String::new(), replicas: &all, open_metrics };

        text.gauge("vllm:num_requests_running", "Sequences that are computed.", |one| {
            one.stats.running as f64
        });
        text.gauge("vllm:num_requests_waiting", "Requests that wait.", |one| {
            (one.stats.waiting + one.stats.paused) as f64
        });
        let name = "vllm:num_requests_waiting_by_reason";
        text.begin(name, "gauge", "Requests that wait, by what for.");
        text.samples(name, "reason=\"capacity\"", |one| one.stats.waiting as f64);
        text.samples(name, "reason=\"deferred\"", |one| one.stats.paused as f64);
        let names = |legacy: &'static [&'static str]| if self.legacy { legacy } else { &legacy[..1] };
        if self.legacy {
            text.gauge("vllm:num_requests_swapped", "Always 0.", |_| 0.0);
        }
        for name in names(&["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"]) {
            text.gauge(name, "Share of the key/value cache in use, 0 to 1.", |one| {
                one.stats.full_blocks_used as f64 / one.stats.full_blocks.max(1) as f64
            });
        }
        text.begin("vllm:engine_sleep_state", "gauge", "Whether the engine is awake.");
        for (state, level) in [("awake", None), ("weights_offloaded", Some(1)), ("discard_all", Some(2))] {
            let value = f64::from(u8::from(asleep == level));
            text.samples("vllm:engine_sleep_state", &format!("sleep_state=\"{state}\""), |_| value);
        }
        text.begin("vllm:cache_config_info", "gauge", "The shape of the key/value cache.");
        for one in &all {
            let blocks = one.stats.full_blocks;
            let labels = &self.cache_labels;
            let shape = format!("block_size=\"{BLOCK_TOKENS}\",num_gpu_blocks=\"{blocks}\"{labels}");
            text.sample(one, "vllm:cache_config_info", &shape, 1.0);
        }

        let cached = |one: &Replica<'_>| one.served.cached_tokens.load(Relaxed);
        // An engine's own count begins anew with it.
        let computed = |one: &Replica<'_>| one.served.computed_tokens.sum() as u64;
        text.counter("vllm:prompt_tokens", "Tokens of prompts.", |one| computed(one) + cached(one));
        text.counter("vllm:generation_tokens", "Tokens generated.", |one| one.stats.generated_tokens);
        text.begin("vllm:prompt_tokens_by_source", "counter", "Tokens of prompts, by where they came from.");
        let name = "vllm:prompt_tokens_by_source_total";
        text.samples(name, "source=\"local_compute\"", |one| computed(one) as f64);
        text.samples(name, "source=\"local_cache_hit\"", |one| cached(one) as f64);
        text.samples(name, "source=\"external_kv_transfer\"", |_| 0.0);
        text.counter("vllm:prompt_tokens_cached", "Tokens of prompts that were cached.", cached);
        for name in names(&["vllm:prefix_cache", "vllm:gpu_prefix_cache"]) {
            text.counter(&format!("{name}_queries"), "Tokens looked up in the prefix cache.", |one| {
                one.stats.prefix_queries
            });
            text.counter(&format!("{name}_hits"), "Tokens found in the prefix cache.", |one| {
                one.stats.prefix_hits
            });
        }
        text.counter("vllm:external_prefix_cache_queries", "Always 0.", |_| 0);
        text.counter("vllm:external_prefix_cache_hits", "Always 0.", |_| 0);
        text.counter("vllm:num_preemptions", "Times a sequence started over.", |one| one.stats.preemptions);
        text.counter("vllm:spec_decode_num_drafts", "Guesses that were verified.", |one| {
            one.stats.speculation.drafts
        });
        text.counter("vllm:spec_decode_num_draft_tokens", "Tokens guessed.", |one| {
            one.stats.speculation.draft_tokens
        });
        text.counter("vllm:spec_decode_num_accepted_tokens", "Those that were right.", |one| {
            one.stats.speculation.accepted_tokens
        });
        let name = "vllm:spec_decode_num_accepted_tokens_per_pos";
        text.begin(name, "counter", "Those that were right, by their place in the guess.");
        for one in &all {
            for (position, &count) in one.stats.speculation.accepted_per_position.iter().enumerate() {
                let label = format!("position=\"{position}\"");
                text.sample(one, &format!("{name}_total"), &label, count as f64);
            }
        }
        text.counter("vllm:corrupted_requests", "Requests whose logits were no finite numbers.", |one| {
            one.stats.corrupted_requests
        });
        text.begin("vllm:request_success", "counter", "Choices that ended, by reason.");
        for (index, reason) in REASONS.iter().enumerate() {
            let label = format!("finished_reason=\"{reason}\"");
            text.samples("vllm:request_success_total", &label, |one| {
                one.served.finished[index].load(Relaxed) as f64
            });
        }
        text.begin("vllm:admission_rejections", "counter", "Requests refused, by reason.");
        for (reason, count) in REJECTIONS.iter().zip(&self.rejected) {
            let labels = format!("model_name=\"{}\",reason=\"{reason}\"", escape(model));
            text.bare("vllm:admission_rejections_total", &labels, count.load(Relaxed) as f64);
        }

        text.histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", |served| {
            &served.first_token
        });
        for name in names(&["vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"]) {
            text.histogram(name, "From one token of a choice to the next.", |served| &served.between_tokens);
        }
        let name = "vllm:request_time_per_output_token_seconds";
        text.histogram(name, "Mean time per token after the first.", |served| &served.per_token);
        text.histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", |served| &served.whole);
        text.histogram("vllm:request_queue_time_seconds", "Arrival to first computed.", |served| {
            &served.queue
        });
        text.histogram("vllm:request_inference_time_seconds", "First computed to end.", |served| {
            &served.inference
        });
        let name = "vllm:request_prefill_time_seconds";
        text.histogram(name, "First computed to first token.", |served| &served.prefill);
        text.histogram("vllm:request_decode_time_seconds", "First token to end.", |served| &served.decode);
        text.histogram("vllm:request_prompt_tokens", "Tokens per prompt.", |served| &served.prompt_tokens);
        text.histogram("vllm:request_generation_tokens", "Tokens per choice.", |served| {
            &served.generated_tokens
        });
        for name in ["vllm:request_max_num_generation_tokens", "vllm:request_params_max_tokens"] {
            text.histogram(name, "Most tokens asked for.", |served| &served.max_tokens);
        }
        let name = "vllm:request_prefill_kv_computed_tokens";
        text.histogram(name, "Tokens per prompt that were not cached.", |served| &served.computed_tokens);
        let name = "vllm:iteration_tokens_total";
        text.begin(name, "histogram", "Tokens per step.");
        let bounds = STEP_TOKENS.map(|bound| bound as f64);
        for one in &all {
            let sum = one.stats.step_tokens_sum as f64;
            text.buckets(name, &one.labels, &bounds, &one.stats.step_tokens, sum);
        }
        text.histogram("vllm:request_params_n", "Choices asked for.", |served| &served.choices);
        let name = "vllm:request_num_preemptions";
        text.histogram(name, "Times that a choice started over.", |served| &served.preemptions);

        text.begin("gptoss_harmony_repairs", "counter", "Malformed output that was mended, by kind.");
        for one in &all {
            for (kind, count) in &*one.served.repairs.lock().unwrap_or_else(PoisonError::into_inner) {
                text.sample(one, "gptoss_harmony_repairs_total", &format!("kind=\"{kind}\""), *count as f64);
            }
        }
        let name = "gptoss_step_seconds";
        text.begin(name, "histogram", "Time that the device took for a step.");
        for one in &all {
            for (kind, phase) in ["decode", "prefill"].iter().enumerate() {
                let labels = format!("{},phase=\"{phase}\"", one.labels);
                let (counts, sum) = (&one.stats.step_seconds[kind], one.stats.step_seconds_sum[kind]);
                text.buckets(name, &labels, &STEP_SECONDS, counts, sum);
            }
        }
        text.counter("gptoss_failed_steps", "Steps in which the device failed.", |one| {
            one.stats.failed_steps
        });
        text.counter("gptoss_engine_restarts", "Engines that were lost and were replaced.", |one| {
            one.served.restarts.load(Relaxed)
        });
        let name = "gptoss_device_memory_bytes";
        text.begin(name, "gauge", "What the weights and the key/value cache take.");
        text.samples(name, "kind=\"weights\"", |one| one.stats.weight_bytes as f64);
        text.samples(name, "kind=\"kv_cache\"", |one| one.stats.cache_bytes as f64);
        text.counter("gptoss_grammar_cache_hits", "Grammars that were known already.", |one| {
            one.grammar_hits
        });
        self.server_text(&mut text);
        self.http_text(&mut text);
        process(&mut text, self.start_time);
        if open_metrics {
            text.out += "# EOF\n";
        }
        text.out
    }

    /// What is the server's, not a replica's: it has the labels of the first.
    fn server_text(&self, text: &mut Text<'_>) {
        let Some(first) = text.replicas.first() else { return };
        text.begin("gptoss_client_disconnects", "counter", "Clients that went away before the end.");
        text.sample(first, "gptoss_client_disconnects_total", "", self.disconnects.load(Relaxed) as f64);
        text.begin("gptoss_startup_seconds", "gauge", "Time that phases of the start took.");
        for (phase, seconds) in &*self.startup.lock().unwrap_or_else(PoisonError::into_inner) {
            text.sample(first, "gptoss_startup_seconds", &format!("phase=\"{phase}\""), *seconds);
        }
        let name = "gptoss_tokenizer_seconds";
        text.begin(name, "histogram", "From a request's text to its tokens.");
        text.observed(name, &first.labels, &self.tokenizer);
        let name = "gptoss_grammar_compile_seconds";
        text.begin(name, "histogram", "From a demand on an answer to its grammar.");
        text.observed(name, &first.labels, &self.grammar);
        text.begin("gptoss_unknown_request_fields", "counter", "Fields of requests that were ignored.");
        for (field, count) in &*self.unknown_fields.lock().unwrap_or_else(PoisonError::into_inner) {
            let label = format!("field=\"{field}\"");
            text.sample(first, "gptoss_unknown_request_fields_total", &label, *count as f64);
        }
    }

    fn http_text(&self, text: &mut Text<'_>) {
        let http = self.http();
        text.begin("http_requests", "counter", "Answers, by method, status and path.");
        for ((method, handler), entry) in &*http {
            for (class, count) in entry.statuses.iter().enumerate().filter(|(_, count)| **count > 0) {
                let labels = format!("method=\"{method}\",status=\"{class}xx\",handler=\"{handler}\"");
                text.bare("http_requests_total", &labels, *count as f64);
            }
        }
        text.begin("http_request_duration_seconds", "histogram", "Time to the head of the answer.");
        for ((method, handler), entry) in &*http {
            let labels = format!("method=\"{method}\",handler=\"{handler}\"");
            text.observed("http_request_duration_seconds", &labels, &entry.duration);
        }
        let name = "http_request_duration_highr_seconds";
        text.begin(name, "histogram", "The same in finer steps.");
        for ((method, handler), entry) in &*http {
            text.observed(name, &format!("method=\"{method}\",handler=\"{handler}\""), &entry.fine);
        }
    }
}

impl Served {
    fn new() -> Served {
        Served {
            first_token: Histogram::new(FIRST_TOKEN),
            between_tokens: Histogram::new(PER_TOKEN),
            per_token: Histogram::new(PER_TOKEN),
            whole: Histogram::new(PER_REQUEST),
            queue: Histogram::new(PER_REQUEST),
            inference: Histogram::new(PER_REQUEST),
            prefill: Histogram::new(PER_REQUEST),
            decode: Histogram::new(PER_REQUEST),
            prompt_tokens: Histogram::new(TOKENS),
            generated_tokens: Histogram::new(TOKENS),
            max_tokens: Histogram::new(TOKENS),
            computed_tokens: Histogram::new(TOKENS),
            choices: Histogram::new(CHOICES),
            preemptions: Histogram::new(PREEMPTIONS),
            cached_tokens: AtomicU64::new(0),
            restarts: AtomicU64::new(0),
            finished: Default::default(),
            repairs: Mutex::new(REPAIRS.into_iter().map(|kind| (kind, 0)).collect()),
        }
    }
}

/// One request on its way through the engine. Told on the engine's thread, so that slow clients do not matter.
#[derive(Debug)]
pub(crate) struct Observed {
    /// Which took it.
    replica: usize,
    arrival: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
    prompt_tokens: usize,
    max_tokens: Option<usize>,
    generated: usize,
    /// When each choice had its last token.
    last: Vec<Option<Instant>>,
    /// Choices that have ended.
    finished: usize,
    ended: bool,
}

impl Observed {
    pub(crate) fn new(request: &Request) -> Observed {
        Observed {
            replica: 0,
            arrival: Instant::now(),
            started: None,
            first: None,
            prompt_tokens: request.prompt.len(),
            max_tokens: request.params.max_tokens,
            generated: 0,
            last: vec![None; request.params.n],
            finished: 0,
            ended: false,
        }
    }

    pub(crate) fn goes_to(&mut self, replica: usize) {
        self.replica = replica;
    }

    pub(crate) fn event(&mut self, metrics: &Metrics, event: &Event) {
        let served = &metrics.replicas[self.replica];
        let now = Instant::now();
        let since = |start: Instant| now.duration_since(start).as_secs_f64();
        match event {
            Event::Started { cached_tokens, queued, .. } => {
                served.choices.observe(self.last.len() as f64);
                if let Some(max) = self.max_tokens {
                    served.max_tokens.observe(max as f64);
                }
                served.cached_tokens.fetch_add(*cached_tokens as u64, Relaxed);
                served.queue.observe(queued.as_secs_f64());
                served.prompt_tokens.observe(self.prompt_tokens as f64);
                served.computed_tokens.observe(self.prompt_tokens.saturating_sub(*cached_tokens) as f64);
                self.started = Some(self.arrival + *queued);
            }
            Event::Tokens { choice, token_ids, .. } => {
                self.generated += token_ids.len();
                if self.first.is_none() {
                    self.first = Some(now);
                    served.first_token.observe(since(self.arrival));
                    served.prefill.observe(since(self.started.unwrap_or(self.arrival)));
                }
                if let Some(last) = self.last.get_mut(*choice)
                    && let Some(before) = last.replace(now)
                {
                    served.between_tokens.observe(since(before));
                }
            }
            Event::Finished { reason, completion_tokens, repairs, preemptions, .. } => {
                served.preemptions.observe(*preemptions as f64);
                let reason = match reason {
                    FinishReason::Stop | FinishReason::ToolCalls => 0,
                    FinishReason::Length => 1,
                    FinishReason::Repetition => 4,
                };
                self.finished += 1;
                served.finished[reason].fetch_add(1, Relaxed);
                served.generated_tokens.observe(*completion_tokens as f64);
                if let Some(first) = self.first.filter(|_| *completion_tokens > 1) {
                    served.per_token.observe(since(first) / (*completion_tokens - 1) as f64);
                }
                if !repairs.is_empty() {
                    let mut all = served.repairs.lock().unwrap_or_else(PoisonError::into_inner);
                    repairs.iter().for_each(|(kind, count)| *all.entry(kind).or_default() += count);
                }
            }
            Event::Done => {
                self.ended = true;
                self.done(metrics);
            }
            Event::Failed(_) => {
                self.ended = true;
                served.finished[3].fetch_add(1, Relaxed);
            }
        }
    }

    /// Tokens of all choices so far.
    pub(crate) fn generated(&self) -> usize {
        self.generated
    }

    /// The engine has forgotten the request. `complete`: the answer was, though the engine went on.
    pub(crate) fn end(&self, metrics: &Metrics, complete: bool) {
        let served = &metrics.replicas[self.replica];
        match (self.ended, complete) {
            (true, _) => {}
            (false, true) => {
                served.finished[0].fetch_add((self.last.len() - self.finished) as u64, Relaxed);
                self.done(metrics);
            }
            (false, false) => {
                served.finished[2].fetch_add(1, Relaxed);
            }
        }
    }

    fn done(&self, metrics: &Metrics) {
        let served = &metrics.replicas[self.replica];
        let since = |start: Instant| start.elapsed().as_secs_f64();
        served.whole.observe(since(self.arrival));
        served.inference.observe(since(self.started.unwrap_or(self.arrival)));
        served.decode.observe(self.first.map_or(0.0, since));
    }
}

/// Counts of values up to bounds.
#[derive(Debug)]
struct Histogram {
    bounds: &'static [f64],
    /// One per bound, and one beyond.
    counts: Vec<AtomicU64>,
    /// The bits of a float.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Histogram { bounds, counts, sum: AtomicU64::new(0f64.to_bits()) }
    }

    fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket].fetch_add(1, Relaxed);
        let add = |sum| Some((f64::from_bits(sum) + value).to_bits());
        // It always has a result.
        let _ = self.sum.fetch_update(Relaxed, Relaxed, add);
    }

    fn sum(&self) -> f64 {
        f64::from_bits(self.sum.load(Relaxed))
    }
}

/// A replica's series.
struct Replica<'a> {
    labels: String,
    stats: Stats,
    grammar_hits: u64,
    served: &'a Served,
}

/// The text in the making.
struct Text<'a> {
    out: String,
    replicas: &'a [Replica<'a>],
    open_metrics: bool,
}

impl<'a> Text<'a> {
    fn begin(&mut self, name: &str, kind: &str, help: &str) {
        // The older format names a counter as its samples are named.
        let suffix = if kind == "counter" && !self.open_metrics { "_total" } else { "" };
        let _ = writeln!(self.out, "# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Fn(&Replica<'a>) -> f64) {
        self.begin(name, "gauge", help);
        self.samples(name, "", value);
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Fn(&Replica<'a>) -> u64) {
        self.begin(name, "counter", help);
        self.samples(&format!("{name}_total"), "", |replica| value(replica) as f64);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: fn(&Served) -> &Histogram) {
        self.begin(name, "histogram", help);
        for replica in self.replicas {
            self.observed(name, &replica.labels, histogram(replica.served));
        }
    }

    fn observed(&mut self, name: &str, labels: &str, histogram: &Histogram) {
        let counts: Vec<u64> = histogram.counts.iter().map(|count| count.load(Relaxed)).collect();
        self.buckets(name, labels, histogram.bounds, &counts, histogram.sum());
    }

    fn buckets(&mut self, name: &str, labels: &str, bounds: &[f64], counts: &[u64], sum: f64) {
        let mut total = 0;
        let bounds = bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(counts) {
            total += count;
            self.bare(&format!("{name}_bucket"), &format!("{labels},le=\"{bound}\""), total as f64);
        }
        self.bare(&format!("{name}_sum"), labels, sum);
        self.bare(&format!("{name}_count"), labels, total as f64);
    }

    /// A sample of each replica.
    fn samples(&mut self, name: &str, labels: &str, value: impl Fn(&Replica<'a>) -> f64) {
        for replica in self.replicas {
            self.sample(replica, name, labels, value(replica));
        }
    }

    /// A sample with a replica's labels.
    fn sample(&mut self, replica: &Replica<'_>, name: &str, labels: &str, value: f64) {
        let comma = if labels.is_empty() { "" } else { "," };
        self.bare(name, &format!("{}{comma}{labels}", replica.labels), value);
    }

    fn bare(&mut self, name: &str, labels: &str, value: f64) {
        let _ = match labels {
            "" => writeln!(self.out, "{name} {value}"),
            labels => writeln!(self.out, "{name}{{{labels}}} {value}"),
        };
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// What the system knows of this process, where it says so.
fn process(text: &mut Text<'_>, start_time: u64) {
    let mut show = |name: &str, kind: &str, help: &str, value: Option<f64>| {
        if let Some(value) = value {
            text.begin(name, kind, help);
            let suffix = if kind == "counter" { "_total" } else { "" };
            text.bare(&format!("{name}{suffix}"), "", value);
        }
    };
    show("process_start_time_seconds", "gauge", "When the server started.", Some(start_time as f64));
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kilobytes = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().trim_end_matches(" kB").parse::<f64>().ok().map(|kb| kb * 1024.0)
    };
    show("process_resident_memory_bytes", "gauge", "Memory in use.", kilobytes("VmRSS:"));
    show("process_virtual_memory_bytes", "gauge", "Memory reserved.", kilobytes("VmSize:"));
    let files = std::fs::read_dir("/proc/self/fd").ok().map(|files| files.count() as f64);
    show("process_open_fds", "gauge", "Open files and connections.", files);
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let limit =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    show("process_max_fds", "gauge", "Most of them.", limit.and_then(|limit| limit.parse().ok()));
    // After the name, which may have anything in it, come the state and numbers; user and system time are the twelfth and
    // thirteenth, in hundredths of a second.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(11).take(2));
    let seconds = ticks.map(|ticks| ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0);
    show("process_cpu_seconds", "counter", "Processor time.", seconds);
}
