//! The server's life: it binds a port, answers that the model is being loaded, serves, sleeps, and finishes what runs.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use engine::{Engine, Place, Replicas, SamplingParams, Stats};
use tokio::sync::watch;

use crate::auth::{Keys, digest, hex};
use crate::body::BodyLimits;
use crate::clock;
use crate::connections::{self, Settings};
use crate::cors::Cors;
use crate::error::{ApiError, ErrorStyle};
use crate::events::Running;
use crate::form::JsonRules;
use crate::listener::Listener;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::rate_limit::RateLimits;
use crate::response_store::Store;
use crate::routes;
use crate::throughput;
use crate::tls::{Tls, TlsOptions};
use crate::watchdog;

/// Longest wait for connections after what ran was aborted: they have only their last words to send.
const ABORT_GRACE: Duration = Duration::from_secs(2);

/// How to serve. Any field may be changed from its default.
#[derive(Debug, Clone)]
pub struct Options {
    /// Address to listen on. Default 127.0.0.1.
    pub host: String,
    /// Port to listen on; 0 takes a free one. Default 8000.
    pub port: u16,
    /// A socket in the file system to listen on instead. Default none.
    pub socket: Option<PathBuf>,
    /// Encryption. Default none.
    pub tls: Option<TlsOptions>,
    /// Prefix of all paths that a proxy may leave in place. Default none.
    pub root_path: String,
    /// `X-data-parallel-rank` says which engine takes a request. Default false.
    pub trust_routing_headers: bool,
    /// Which pages of other origins may use the server. Default none.
    pub cors: CorsOptions,
    /// Names that requests may use, the first of them the default and the one that answers bear. Empty: the last component
    /// of `root`.
    pub served_model_names: Vec<String>,
    /// The model as it was given: a hub name, or a folder, of which only the last component is shown.
    pub root: String,
    /// Whom the list of models names as the owner. Default `vllm`.
    pub model_owner: String,
    /// Keys that clients must send one of. Empty: everybody is let in.
    pub api_keys: Vec<String>,
    /// Keys of those who may end requests, let the server sleep and look inside. Empty: nobody, unless `dev_mode`.
    pub admin_keys: Vec<String>,
    /// Keys that `/metrics` asks for. Empty: none.
    pub metrics_keys: Vec<String>,
    /// What needs an admin's key is open to all clients, if there is no such key. Default false.
    pub dev_mode: bool,
    /// Requests per key and minute. Default: no limit.
    pub rate_limit_requests: Option<u64>,
    /// Tokens of prompts and answers per key and minute. Default: no limit.
    pub rate_limit_tokens: Option<u64>,
    /// The date in prompts. Default today.
    pub system_date: SystemDate,
    /// A request may ask for the efforts that the model has, and for no others. Default false.
    pub strict_reasoning_effort: bool,
    /// The model is not told of tools that it may not call. Default false.
    pub exclude_tools_of_choice_none: bool,
    /// The arguments of every call are constrained by the tool's schema, `strict` or not. Default false.
    pub strict_arguments: bool,
    /// What all JSON of answers and calls keeps to. Default nothing.
    pub json: JsonRules,
    /// For requests that leave fields out.
    pub defaults: SamplingDefaults,
    /// Most alternatives per token that a request may ask for; `usize::MAX`: all of the vocabulary, and -1 asks for them.
    /// Default 20.
    pub max_logprobs: usize,
    /// Chats have log-probabilities of the text of the final channel alone. Default false.
    pub final_logprobs: bool,
    /// Most answers that a request may ask for, at most [`SamplingParams::MAX_N`], which is the default.
    pub max_n: usize,
    /// Requests with different keys share no cached prefixes. Default false.
    pub isolate_prefix_cache: bool,
    /// Tokens per part of a stream. Default 1.
    pub stream_interval: usize,
    /// Streams begin when the engine has taken the request, not with its first token. Default false.
    pub eager_streams: bool,
    /// Chats have their reasoning twice, as `reasoning` and as `reasoning_content`. Default true.
    pub reasoning_content: bool,
    /// Tokens that reasoning leaves for the answer. Default 0: it may take all.
    pub answer_reserve: usize,
    /// Every part of every stream says how many tokens there are. Default false.
    pub force_include_usage: bool,
    /// Answers say how long they took. Default false.
    pub request_metrics: bool,
    /// What answers say of the server's build.
    pub fingerprint: Fingerprint,
    /// How errors are worded for programs.
    pub error_style: ErrorStyle,
    /// Responses that are kept for clients to refer to. Default 0.
    pub responses_store: usize,
    /// Largest body of a request. Default 32 MiB.
    pub max_body_bytes: usize,
    /// Connections at a time; others wait to be accepted. Default 16,384.
    pub max_connections: usize,
    /// Longest pause between an answer and the next request of a connection. Default 5 s.
    pub keep_alive: Duration,
    /// Pause on a stream after which a comment is sent. Zero: never. Default 15 s.
    pub sse_keep_alive: Duration,
    /// Longest time in which a client may read nothing of what there is for it. Default 60 s.
    pub client_stall_timeout: Duration,
    /// Longest time for an answer. Default: no limit.
    pub request_timeout: Option<Duration>,
    /// A step of the engine that takes longer means that the device hangs. Default 10 s.
    pub health_stall_timeout: Duration,
    /// Time to finish running requests after the shutdown signal. Default 30 s.
    pub shutdown_timeout: Duration,
    /// `/sleep` and `/wake_up` are there. Default false.
    pub sleep_mode: bool,
    /// The chat page at `/`. Default true.
    pub page: bool,
    /// `/docs` and `/openapi.json`. Default true.
    pub docs: bool,
    /// What tools made for Ollama ask before they start. Default true.
    pub ollama: bool,
    /// Names and values that `vllm:cache_config_info` has beside the blocks. Default none.
    pub cache_labels: Vec<(&'static str, String)>,
    /// `/metrics` has names that older dashboards ask for, too. Default true.
    pub legacy_metrics: bool,
    /// A line every ten seconds while the engine is at work. Default true.
    pub log_stats: bool,
    /// Prompts are logged. Default false.
    pub log_requests: bool,
    /// Answers are logged. Default false.
    pub log_outputs: bool,
    /// Most characters of a prompt or an answer in the log. Default: all.
    pub max_log_len: Option<usize>,
    /// Engines that [`Handle::ready`] will bring. Default 1.
    pub replicas: usize,
    /// What `/server_info` says of how the server was started; no secrets. Default null.
    pub info: serde_json::Value,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            host: "127.0.0.1".to_owned(),
            port: 8000,
            socket: None,
            tls: None,
            root_path: String::new(),
            trust_routing_headers: false,
            cors: CorsOptions::default(),
            served_model_names: Vec::new(),
            root: String::new(),
            model_owner: "vllm".to_owned(),
            api_keys: Vec::new(),
            admin_keys: Vec::new(),
            metrics_keys: Vec::new(),
            dev_mode: false,
            rate_limit_requests: None,
            rate_limit_tokens: None,
            system_date: SystemDate::Today,
            strict_reasoning_effort: false,
            exclude_tools_of_choice_none: false,
            strict_arguments: false,
            json: JsonRules::default(),
            defaults: SamplingDefaults::default(),
            max_logprobs: 20,
            final_logprobs: false,
            max_n: SamplingParams::MAX_N,
            isolate_prefix_cache: false,
            stream_interval: 1,
            eager_streams: false,
            reasoning_content: true,
            answer_reserve: 0,
            force_include_usage: false,
            request_metrics: false,
            fingerprint: Fingerprint::Full,
            error_style: ErrorStyle::Vllm,
            responses_store: 0,
            max_body_bytes: 32 << 20,
            max_connections: 16_384,
            keep_alive: Duration::from_secs(5),
            sse_keep_alive: Duration::from_secs(15),
            client_stall_timeout: Duration::from_secs(60),
            request_timeout: None,
            health_stall_timeout: Duration::from_secs(10),
            shutdown_timeout: Duration::from_secs(30),
            sleep_mode: false,
            page: true,
            docs: true,
            ollama: true,
            cache_labels: Vec::new(),
            legacy_metrics: true,
            log_stats: true,
            log_requests: false,
            log_outputs: false,
            max_log_len: None,
            replicas: 1,
            info: serde_json::Value::Null,
        }
    }
}

/// The date in prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SystemDate {
    /// That of the day in UTC.
    Today,
    /// Always this, `YYYY-MM-DD`.
    Fixed(String),
    /// None, so that prefixes outlive midnight.
    None,
}

/// Which pages of other origins may use the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorsOptions {
    /// Such as `https://example.org`, or `*` for all. Default none.
    pub origins: Vec<String>,
    /// Methods, or `*`. Default `*`.
    pub methods: Vec<String>,
    /// Headers, or `*`. Default `*`.
    pub headers: Vec<String>,
    /// With cookies. Default false.
    pub credentials: bool,
}

impl Default for CorsOptions {
    fn default() -> CorsOptions {
        let all = || vec!["*".to_owned()];
        CorsOptions { origins: Vec::new(), methods: all(), headers: all(), credentials: false }
    }
}

/// What answers say of the server's build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fingerprint {
    /// The version, and a hash over it and the model's name.
    Full,
    /// The hash.
    Hash,
    /// Always this.
    Custom(String),
    /// Nothing.
    None,
}

/// What `generation_config.json` says about sampling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// Default 1.
    pub temperature: f32,
    /// Default 1.
    pub top_p: f32,
    /// Default 0: all.
    pub top_k: usize,
    /// Default 0.
    pub min_p: f32,
    /// Default 1.
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    fn default() -> SamplingDefaults {
        SamplingDefaults { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

/// Why the server does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Somebody else listens there.
    #[error("{place} is in use")]
    InUse {
        /// The port and address, or the socket.
        place: String,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {place}: {source}")]
    Bind {
        /// The port and address, or the socket.
        place: String,
        /// Why.
        source: std::io::Error,
    },
    /// The files for TLS cannot be used.
    #[error("{0}")]
    Tls(String),
}

/// A server with its port open. Nobody is answered before [`Server::run`].
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    url: String,
    state: Arc<State>,
    shutdown_timeout: Duration,
    settings: Settings,
    log_stats: bool,
}

/// Gives a running server its model. Clones are handles on the same server.
#[derive(Debug, Clone)]
pub struct Handle {
    state: Arc<State>,
}

/// Makes engines anew after a sleep or a failure: those of these numbers, one of each. It may take its time, and tell the handle
/// how far it is.
pub type Loader = Box<dyn Fn(&Handle, &[usize]) -> Result<Vec<Engine>, String> + Send + Sync>;

impl Handle {
    /// Serves with these engines from now on; until then requests are told to come back.
    ///
    /// # Panics
    /// Unless there are as many as [`Options::replicas`].
    pub fn ready(&self, engines: Vec<Engine>) {
        assert_eq!(engines.len(), self.state.replicas, "as many engines as `Options::replicas`");
        *self.state.life.write().unwrap_or_else(PoisonError::into_inner) =
            Life::Awake(Replicas::new(engines));
    }

    /// How far loading is, for those who ask meanwhile.
    pub fn progress(&self, done: usize, total: usize) {
        let percent = (done.saturating_mul(100) / total.max(1)).min(100);
        self.state.loaded_percent.store(percent as u32, Ordering::Relaxed);
    }

    /// How a phase of the start took, for the metrics.
    pub fn started(&self, phase: &'static str, time: Duration) {
        self.state.metrics.started(phase, time);
    }

    /// How to make engines anew. Without it `/sleep` refuses, and a server that has lost a device stays unhealthy.
    pub fn reload_with(&self, loader: Loader) {
        *self.state.loader.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(loader));
    }
}

impl Server {
    /// Opens the port or the socket.
    ///
    /// # Errors
    /// [`Error::InUse`], or [`Error::Bind`] for other reasons; [`Error::Tls`] before the port is opened.
    pub async fn bind(options: &Options) -> Result<Server, Error> {
        let tls = options.tls.as_ref().map(Tls::new).transpose().map_err(Error::Tls)?.map(Arc::new);
        let place = match &options.socket {
            Some(path) => path.display().to_string(),
            None => format!("port {} of {}", options.port, options.host),
        };
        let listener = match &options.socket {
            Some(path) => Listener::unix(path),
            None => Listener::tcp(&options.host, options.port).await,
        };
        let listener = listener.map_err(|source| match source.kind() {
            std::io::ErrorKind::AddrInUse => Error::InUse { place },
            _ => Error::Bind { place, source },
        })?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let url = match (listener.local_addr(), &options.socket) {
            (Some(address), _) => format!("{scheme}://{address}{}", options.root_path),
            (None, path) => format!("unix:{}", path.as_deref().unwrap_or(Path::new("")).display()),
        };
        Ok(Server {
            listener,
            url,
            state: Arc::new(State::new(options)),
            shutdown_timeout: options.shutdown_timeout,
            settings: Settings {
                max: options.max_connections,
                keep_alive: options.keep_alive,
                stall_timeout: options.client_stall_timeout,
                root_path: options.root_path.clone(),
                error_style: options.error_style,
                tls,
            },
            log_stats: options.log_stats,
        })
    }

    /// Where the server listens, with the port that was free if 0 was asked for; none for a socket in the file system.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.listener.local_addr()
    }

    /// The address for people.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The way to tell the server that the model is there.
    pub fn handle(&self) -> Handle {
        Handle { state: Arc::clone(&self.state) }
    }

    /// Serves until `shutdown` comes, then says so to whatever is new and finishes what runs; what still runs after the timeout of
    /// the options ends with an error. Or until there is no engine, and none to be had within this process; then what runs has
    /// failed.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Ended {
        let state = self.state;
        let (down, draining) = watch::channel(false);
        let signal = async {
            shutdown.await;
            tracing::info!(requests = state.requests(), "shutting down: what runs may finish");
            state.draining.store(true, Ordering::Release);
            let _ = down.send(true);
            std::future::pending::<Infallible>().await
        };
        let router = routes::router(Arc::clone(&state));
        let tls = self.settings.tls.clone();
        let refresh = async {
            match &tls {
                Some(tls) => tls.refresh().await,
                None => std::future::pending().await,
            }
        };
        let background = async {
            // An error cannot be: the sender is in the state.
            let _ = state.in_background.subscribe().wait_for(|&responses| responses == 0).await;
        };
        let served = connections::serve(self.listener, &router, &self.settings, draining.clone(), background);
        let give_up = async {
            wait(draining).await;
            tokio::time::sleep(self.shutdown_timeout).await;
            tracing::warn!(requests = state.requests(), "shutting down: the time to finish is over");
            state.abort.send_modify(|everything| *everything = true);
            tokio::time::sleep(ABORT_GRACE).await;
        };
        let beyond_repair = async {
            watchdog::watch(&state).await;
            // The last words of those that failed.
            tokio::time::sleep(ABORT_GRACE).await;
        };
        let ended = tokio::select! {
            () = served => Ended::ShutDown,
            () = give_up => Ended::ShutDown,
            () = refresh => Ended::ShutDown,
            () = throughput::watch(&state, self.log_stats) => Ended::ShutDown,
            () = beyond_repair => Ended::BeyondRepair,
            never = signal => match never {},
        };
        if ended == Ended::ShutDown {
            tracing::info!("shut down");
        }
        ended
    }
}

/// Why a server has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was to.
    ShutDown,
    /// Its device was lost or hangs, and only a new process can have it again.
    BeyondRepair,
}

async fn wait(mut signal: watch::Receiver<bool>) {
    // An error means that nobody can signal any more, which cannot be told from a signal.
    let _ = signal.wait_for(|down| *down).await;
}

/// What the server has of its model.
enum Life {
    Loading,
    Awake(Replicas),
    /// At the level that was asked for.
    Asleep(u8),
}

/// What became of an engine that does not work.
pub(crate) enum Restart {
    /// There is a new one.
    Done,
    /// There is none, nor will there be in this process.
    Failed(String),
    /// The server has no way to make one, or sleeps.
    NotPossible,
}

fn is_loading(replicas: &Replicas) -> bool {
    replicas.places().iter().any(|place| matches!(place, Place::Loading))
}

/// What all requests share.
pub(crate) struct State {
    life: RwLock<Life>,
    /// Held while the server falls asleep, and by who wakes it: the model is not loaded again before it is gone.
    falling_asleep: tokio::sync::Mutex<()>,
    loaded_percent: AtomicU32,
    loader: Mutex<Option<Arc<Loader>>>,
    pub(crate) keys: Keys,
    pub(crate) admin_keys: Keys,
    pub(crate) metrics_keys: Keys,
    pub(crate) dev_mode: bool,
    pub(crate) rate_limits: Arc<RateLimits>,
    pub(crate) cors: Cors,
    pub(crate) root_path: String,
    pub(crate) trust_routing_headers: bool,
    /// The default first; at least one.
    pub(crate) model_names: Vec<String>,
    pub(crate) root: String,
    pub(crate) model_owner: String,
    pub(crate) created: u64,
    pub(crate) fingerprint: Option<String>,
    pub(crate) defaults: SamplingDefaults,
    pub(crate) max_logprobs: usize,
    pub(crate) final_logprobs: bool,
    pub(crate) max_n: usize,
    pub(crate) isolate_prefix_cache: bool,
    pub(crate) stream_interval: usize,
    pub(crate) eager_streams: bool,
    pub(crate) reasoning_content: bool,
    pub(crate) answer_reserve: usize,
    pub(crate) force_include_usage: bool,
    pub(crate) request_metrics: bool,
    pub(crate) error_style: ErrorStyle,
    pub(crate) responses: Arc<Store>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) bodies: Arc<BodyLimits>,
    pub(crate) sse_keep_alive: Duration,
    pub(crate) client_stall_timeout: Duration,
    pub(crate) request_timeout: Option<Duration>,
    pub(crate) health_stall_timeout: Duration,
    shutdown_timeout: Duration,
    pub(crate) sleep_mode: bool,
    pub(crate) page: bool,
    pub(crate) docs: bool,
    pub(crate) ollama: bool,
    pub(crate) log_requests: bool,
    pub(crate) log_outputs: bool,
    pub(crate) max_log_len: usize,
    pub(crate) replicas: usize,
    pub(crate) info: serde_json::Value,
    /// Since when a profile is taken, and what the engines had done by then.
    pub(crate) profile: Mutex<Option<(Instant, Vec<Stats>)>>,
    /// Requests that ended in the last seconds, per second.
    pub(crate) ended_per_second: AtomicU32,
    system_date: SystemDate,
    pub(crate) strict_reasoning_effort: bool,
    pub(crate) exclude_tools_of_choice_none: bool,
    pub(crate) strict_arguments: bool,
    pub(crate) json: JsonRules,
    draining: AtomicBool,
    /// What still runs is to end.
    abort: watch::Sender<bool>,
    pub(crate) running: Arc<Running>,
    /// Responses that are being made while nobody need wait for them.
    pub(crate) in_background: watch::Sender<usize>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("model_names", &self.model_names).finish_non_exhaustive()
    }
}

impl State {
    fn new(options: &Options) -> State {
        // A path says something about this machine.
        let root = match Path::new(&options.root) {
            path if path.is_absolute() || path.starts_with(".") || path.starts_with("..") => {
                path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
            }
            _ => options.root.clone(),
        };
        let mut model_names = options.served_model_names.clone();
        if model_names.is_empty() {
            model_names.push(if root.is_empty() { "default".to_owned() } else { root.clone() });
        }
        let version = env!("CARGO_PKG_VERSION");
        let hash = hex(&digest(format!("{version} {root}").as_bytes())[..4]);
        State {
            life: RwLock::new(Life::Loading),
            falling_asleep: tokio::sync::Mutex::default(),
            loaded_percent: AtomicU32::new(0),
            loader: Mutex::default(),
            keys: Keys::new(&options.api_keys),
            admin_keys: Keys::new(&options.admin_keys),
            metrics_keys: Keys::new(&options.metrics_keys),
            dev_mode: options.dev_mode,
            rate_limits: Arc::new(RateLimits::new(options.rate_limit_requests, options.rate_limit_tokens)),
            cors: Cors::new(&options.cors),
            root_path: options.root_path.clone(),
            trust_routing_headers: options.trust_routing_headers,
            model_names,
            root,
            model_owner: options.model_owner.clone(),
            created: clock::unix_seconds(),
            fingerprint: match &options.fingerprint {
                Fingerprint::Full => Some(format!("vllm-compatible-{version}-{hash}")),
                Fingerprint::Hash => Some(hash),
                Fingerprint::Custom(value) => Some(value.clone()),
                Fingerprint::None => None,
            },
            defaults: options.defaults,
            max_logprobs: options.max_logprobs,
            final_logprobs: options.final_logprobs,
            max_n: options.max_n,
            isolate_prefix_cache: options.isolate_prefix_cache,
            stream_interval: options.stream_interval,
            eager_streams: options.eager_streams,
            reasoning_content: options.reasoning_content,
            answer_reserve: options.answer_reserve,
            force_include_usage: options.force_include_usage,
            request_metrics: options.request_metrics,
            error_style: options.error_style,
            metrics: Arc::new(Metrics::new(options.replicas, &options.cache_labels, options.legacy_metrics)),
            responses: Arc::new(Store::new(options.responses_store)),
            memory: Arc::default(),
            bodies: Arc::new(BodyLimits::new(options.max_body_bytes)),
            sse_keep_alive: options.sse_keep_alive,
            client_stall_timeout: options.client_stall_timeout,
            request_timeout: options.request_timeout,
            health_stall_timeout: options.health_stall_timeout,
            shutdown_timeout: options.shutdown_timeout,
            sleep_mode: options.sleep_mode,
            page: options.page,
            docs: options.docs,
            ollama: options.ollama,
            log_requests: options.log_requests,
            log_outputs: options.log_outputs,
            max_log_len: options.max_log_len.unwrap_or(usize::MAX),
            replicas: options.replicas,
            info: options.info.clone(),
            profile: Mutex::default(),
            ended_per_second: AtomicU32::new(0),
            system_date: options.system_date.clone(),
            strict_reasoning_effort: options.strict_reasoning_effort,
            exclude_tools_of_choice_none: options.exclude_tools_of_choice_none,
            strict_arguments: options.strict_arguments,
            json: options.json,
            draining: AtomicBool::new(false),
            abort: watch::Sender::new(false),
            running: Arc::default(),
            in_background: watch::Sender::new(0),
        }
    }

    /// What runs may finish, and nothing else is done.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// An engine, if requests are taken: one of several that answer alike.
    pub(crate) fn engine(&self) -> Result<Engine, ApiError> {
        if self.is_draining() {
            return Err(ApiError::ShuttingDown);
        }
        match &*self.life.read().unwrap_or_else(PoisonError::into_inner) {
            Life::Awake(replicas) => match replicas.serving().find(|(_, engine)| !engine.stats().lost) {
                Some((_, engine)) => Ok(engine.clone()),
                None if is_loading(replicas) => Err(self.loading()),
                None => Err(ApiError::Unhealthy),
            },
            Life::Asleep(_) => Err(ApiError::Asleep),
            Life::Loading => Err(self.loading()),
        }
    }

    fn loading(&self) -> ApiError {
        ApiError::Loading { percent: self.loaded_percent.load(Ordering::Relaxed) }
    }

    /// The engines, even if they take nothing new.
    pub(crate) fn loaded(&self) -> Option<Replicas> {
        match &*self.life.read().unwrap_or_else(PoisonError::into_inner) {
            Life::Awake(replicas) => Some(replicas.clone()),
            _ => None,
        }
    }

    /// What each engine has done and has to do.
    pub(crate) fn stats(&self) -> Vec<Stats> {
        let replicas = self.loaded();
        replicas.iter().flat_map(Replicas::serving).map(|(_, engine)| engine.stats()).collect()
    }

    /// How many requests are in the engines.
    pub(crate) fn requests(&self) -> usize {
        self.stats().iter().map(|stats| stats.running + stats.waiting + stats.paused).sum()
    }

    /// The level of the server's sleep, if it sleeps.
    pub(crate) fn asleep(&self) -> Option<u8> {
        match *self.life.read().unwrap_or_else(PoisonError::into_inner) {
            Life::Asleep(level) => Some(level),
            _ => None,
        }
    }

    /// Takes nothing new, finishes what runs, and frees the memory of model and cache. Level 1 and 2 differ in name only:
    /// what is needed again comes from the files either way.
    pub(crate) async fn sleep(&self, level: u8) -> Result<(), ApiError> {
        if self.loader.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            return Err(ApiError::body("This server cannot load its model again."));
        }
        let _falling_asleep = self.falling_asleep.lock().await;
        let replicas = {
            let mut life = self.life.write().unwrap_or_else(PoisonError::into_inner);
            match &*life {
                Life::Awake(replicas) if !is_loading(replicas) => {
                    let replicas = replicas.clone();
                    *life = Life::Asleep(level);
                    replicas
                }
                Life::Asleep(_) => return Ok(()),
                Life::Awake(_) | Life::Loading => return Err(self.loading()),
            }
        };
        replicas.serving().for_each(|(_, engine)| engine.shutdown());
        let mut ended = {
            let replicas = replicas.clone();
            tokio::task::spawn_blocking(move || replicas.serving().for_each(|(_, engine)| engine.wait()))
        };
        if tokio::time::timeout(self.shutdown_timeout, &mut ended).await.is_err() {
            replicas.serving().for_each(|(_, engine)| engine.abort());
            // The threads end after the step in progress.
            let _ = ended.await;
        }
        Ok(())
    }

    /// Loads the model again, when a sleep that has begun is complete.
    pub(crate) async fn wake(self: &Arc<State>, request_id: &str) -> Result<(), ApiError> {
        let internal = |error: &dyn std::fmt::Display| {
            tracing::error!(request_id, %error, "the model could not be loaded again");
            ApiError::Internal { request_id: request_id.to_owned() }
        };
        let loader = self.loader.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let level = {
            let _asleep = self.falling_asleep.lock().await;
            let mut life = self.life.write().unwrap_or_else(PoisonError::into_inner);
            match (&*life, &loader) {
                (&Life::Asleep(level), Some(_)) => {
                    *life = Life::Loading;
                    level
                }
                (Life::Loading, _) => return Err(self.loading()),
                _ => return Ok(()),
            }
        };
        let Some(loader) = loader else { return Ok(()) };
        let (next, result) = match self.load(loader, (0..self.replicas).collect()).await {
            Ok(engines) => (Life::Awake(Replicas::new(engines)), Ok(())),
            Err(error) => (Life::Asleep(level), Err(internal(&error))),
        };
        *self.life.write().unwrap_or_else(PoisonError::into_inner) = next;
        result
    }

    async fn load(
        self: &Arc<State>,
        loader: Arc<Loader>,
        numbers: Vec<usize>,
    ) -> Result<Vec<Engine>, String> {
        self.loaded_percent.store(0, Ordering::Relaxed);
        let handle = Handle { state: Arc::clone(self) };
        let wanted = numbers.len();
        let loaded = tokio::task::spawn_blocking(move || loader(&handle, &numbers)).await;
        let engines = loaded.unwrap_or_else(|error| Err(error.to_string()))?;
        match engines.len() {
            found if found == wanted => Ok(engines),
            found => Err(format!("expected {wanted} engines of the loader, found {found}")),
        }
    }

    /// Makes a new engine in place of one that is lost or hangs; until then the others serve, or requests are told to come back.
    /// An engine that hangs may hold its device, so there is nothing to try.
    pub(crate) async fn restart(self: &Arc<State>, number: usize, engine: Engine, hangs: bool) -> Restart {
        let Some(loader) = self.loader.lock().unwrap_or_else(PoisonError::into_inner).clone() else {
            return Restart::NotPossible;
        };
        if !self.set(number, if hangs { Place::Gone } else { Place::Loading }) {
            return Restart::NotPossible;
        }
        if hangs {
            engine.abandon();
            // Those that wait for it look again.
            self.abort.send_modify(|_| {});
            return Restart::Failed("its step does not come back".to_owned());
        }
        // It gives its memory back first.
        let _ = tokio::task::spawn_blocking(move || engine.wait()).await;
        match self.load(loader, vec![number]).await {
            Ok(engines) => {
                for engine in engines {
                    self.set(number, Place::Serving(engine));
                }
                self.metrics.restarted(number);
                Restart::Done
            }
            Err(error) => {
                self.set(number, Place::Gone);
                Restart::Failed(error)
            }
        }
    }

    /// Changes what there is of an engine, unless the server sleeps.
    fn set(&self, number: usize, place: Place) -> bool {
        match &mut *self.life.write().unwrap_or_else(PoisonError::into_inner) {
            Life::Awake(replicas) => {
                replicas.set(number, place);
                true
            }
            _ => false,
        }
    }

    /// Becomes true when what still runs is to end.
    pub(crate) fn abort(&self) -> watch::Receiver<bool> {
        self.abort.subscribe()
    }

    /// Seconds until a queue of this length may have got shorter.
    pub(crate) fn retry_after(&self, queued: usize) -> u64 {
        const LONGEST: u64 = 60;
        let per_second = self.ended_per_second.load(Ordering::Relaxed);
        match per_second {
            // Nothing has ended lately, or nothing is known yet.
            0 => 1,
            rate => (queued as u64).div_ceil(u64::from(rate)).clamp(1, LONGEST),
        }
    }

    /// The date in prompts, if they have one.
    pub(crate) fn date(&self) -> Option<String> {
        match &self.system_date {
            SystemDate::Today => Some(clock::today()),
            SystemDate::Fixed(date) => Some(date.clone()),
            SystemDate::None => None,
        }
    }
}
