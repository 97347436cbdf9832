//! The server's life: it binds a port, answers that the model is being loaded, serves, and finishes what runs.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use engine::Engine;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::auth::{Keys, digest, hex};
use crate::clock;
use crate::connections;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::response_store::Store;
use crate::routes;

/// Longest wait for connections after what ran was aborted: they have only their last words to send.
const ABORT_GRACE: Duration = Duration::from_secs(2);

/// How to serve. Any field may be changed from its default.
#[derive(Debug, Clone)]
pub struct Options {
    /// Address to listen on. Default 127.0.0.1.
    pub host: String,
    /// Port to listen on; 0 takes a free one. Default 8000.
    pub port: u16,
    /// Names that requests may use, the first of them the default and the one that answers bear. Empty: the last component
    /// of `root`.
    pub served_model_names: Vec<String>,
    /// The model as it was given: a hub name, or a folder, of which only the last component is shown.
    pub root: String,
    /// Keys that clients must send one of. Empty: everybody is let in.
    pub api_keys: Vec<String>,
    /// The date in prompts, `YYYY-MM-DD`. `None`: today in UTC.
    pub system_date: Option<String>,
    /// For requests that leave fields out.
    pub defaults: SamplingDefaults,
    /// Most alternatives per token that a request may ask for. Default 20.
    pub max_logprobs: usize,
    /// Responses that are kept for clients to refer to. Default 0.
    pub responses_store: usize,
    /// Largest body of a request. Default 32 MiB.
    pub max_body_bytes: usize,
    /// Connections at a time; others wait to be accepted. Default 16,384.
    pub max_connections: usize,
    /// Pause on a stream after which a comment is sent. Default 15 s.
    pub sse_keep_alive: Duration,
    /// Time to finish running requests after the shutdown signal. Default 30 s.
    pub shutdown_timeout: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            host: "127.0.0.1".to_owned(),
            port: 8000,
            served_model_names: Vec::new(),
            root: String::new(),
            api_keys: Vec::new(),
            system_date: None,
            defaults: SamplingDefaults::default(),
            max_logprobs: 20,
            responses_store: 0,
            max_body_bytes: 32 << 20,
            max_connections: 16_384,
            sse_keep_alive: Duration::from_secs(15),
            shutdown_timeout: Duration::from_secs(30),
        }
    }
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
}

impl Default for SamplingDefaults {
    fn default() -> SamplingDefaults {
        SamplingDefaults { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0 }
    }
}

/// Why the server does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Somebody else listens there.
    #[error("port {port} of {host} is in use")]
    PortInUse {
        /// The address.
        host: String,
        /// The port.
        port: u16,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on port {port} of {host}: {source}")]
    Bind {
        /// The address.
        host: String,
        /// The port.
        port: u16,
        /// Why.
        source: std::io::Error,
    },
}

/// A server with its port open. Nobody is answered before [`Server::run`].
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    state: Arc<State>,
    shutdown_timeout: Duration,
    max_connections: usize,
}

/// Tells a running server that the model is there. Clones are handles on the same server.
#[derive(Debug, Clone)]
pub struct Handle {
    state: Arc<State>,
}

impl Handle {
    /// Serves this engine from now on; until then requests are told to come back. Only the first call counts.
    pub fn ready(&self, engine: Engine) {
        // The slot is full after an earlier call.
        let _ = self.state.engine.set(engine);
    }
}

impl Server {
    /// Opens the port.
    ///
    /// # Errors
    /// [`Error::PortInUse`], or [`Error::Bind`] for other reasons.
    pub async fn bind(options: &Options) -> Result<Server, Error> {
        let fail = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::AddrInUse => {
                Error::PortInUse { host: options.host.clone(), port: options.port }
            }
            _ => Error::Bind { host: options.host.clone(), port: options.port, source },
        };
        let listener = TcpListener::bind((options.host.as_str(), options.port)).await.map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        Ok(Server {
            listener,
            address,
            state: Arc::new(State::new(options)),
            shutdown_timeout: options.shutdown_timeout,
            max_connections: options.max_connections,
        })
    }

    /// Where the server listens; with the port that was free if 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The way to tell the server that the model is there.
    pub fn handle(&self) -> Handle {
        Handle { state: Arc::clone(&self.state) }
    }

    /// Serves until `shutdown` comes, then takes nothing new and finishes what runs; what still runs after the timeout of
    /// the options ends with an error.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let state = self.state;
        let (down, draining) = watch::channel(false);
        let signal = async {
            shutdown.await;
            state.draining.store(true, Ordering::Release);
            let _ = down.send(true);
            std::future::pending::<Infallible>().await
        };
        let router = routes::router(Arc::clone(&state));
        let served = connections::serve(self.listener, &router, self.max_connections, draining.clone());
        let give_up = async {
            wait(draining).await;
            tokio::time::sleep(self.shutdown_timeout).await;
            let _ = state.abort.send(true);
            tokio::time::sleep(ABORT_GRACE).await;
        };
        tokio::select! {
            () = served => {}
            () = give_up => {}
            never = signal => match never {},
        }
    }
}

async fn wait(mut signal: watch::Receiver<bool>) {
    // An error means that nobody can signal any more, which cannot be told from a signal.
    let _ = signal.wait_for(|down| *down).await;
}

/// What all requests share.
pub(crate) struct State {
    engine: OnceLock<Engine>,
    pub(crate) keys: Keys,
    /// The default first; at least one.
    pub(crate) model_names: Vec<String>,
    pub(crate) root: String,
    pub(crate) created: u64,
    pub(crate) fingerprint: String,
    pub(crate) defaults: SamplingDefaults,
    pub(crate) max_logprobs: usize,
    pub(crate) responses: Arc<Store>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) max_body_bytes: usize,
    pub(crate) sse_keep_alive: Duration,
    system_date: Option<String>,
    draining: AtomicBool,
    abort: watch::Sender<bool>,
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
            engine: OnceLock::new(),
            keys: Keys::new(&options.api_keys),
            model_names,
            root,
            created: clock::unix_seconds(),
            fingerprint: format!("vllm-compatible-{version}-{hash}"),
            defaults: options.defaults,
            max_logprobs: options.max_logprobs,
            metrics: Arc::new(Metrics::new()),
            responses: Arc::new(Store::new(options.responses_store)),
            max_body_bytes: options.max_body_bytes,
            sse_keep_alive: options.sse_keep_alive,
            system_date: options.system_date.clone(),
            draining: AtomicBool::new(false),
            abort: watch::Sender::new(false),
        }
    }

    /// The engine, if requests are taken.
    pub(crate) fn engine(&self) -> Result<&Engine, ApiError> {
        if self.draining.load(Ordering::Acquire) {
            return Err(ApiError::ShuttingDown);
        }
        self.engine.get().ok_or(ApiError::Loading)
    }

    /// The engine, even if it takes nothing new.
    pub(crate) fn loaded(&self) -> Option<&Engine> {
        self.engine.get()
    }

    /// Becomes true when what still runs is to end.
    pub(crate) fn abort(&self) -> watch::Receiver<bool> {
        self.abort.subscribe()
    }

    /// The date in prompts.
    pub(crate) fn date(&self) -> String {
        self.system_date.clone().unwrap_or_else(clock::today)
    }
}
