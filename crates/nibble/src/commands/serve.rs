//! `nibble serve`: the OpenAI-compatible server.

use std::io::IsTerminal;
use std::time::Duration;

use checkpoint::GenerationConfig;
use engine::{Engine, EngineOptions};
use server::{Options, SamplingDefaults, Server};

use crate::args::{Common, Serve};
use crate::engine::{scripted, start};
use crate::failure::{Failure, Result};
use crate::interrupt;
use crate::model::{BUILT_IN, Model};
use crate::ui::Ui;

pub(crate) fn run(args: Serve, common: &Common, ui: Ui) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    ignored(&args).iter().for_each(|flag| tracing::info!("ignored for compatibility: {flag}"));

    let name = args.model.clone().or_else(|| args.model_flag.clone());
    // Wrong files are an error before the port is open.
    let source = match args.engine.split_once(':') {
        Some(("scripted", file)) => Source::Script(scripted(file, &args.capacity, &base(&args))?),
        _ if args.engine == "auto" => Source::Model(Box::new(Model::open(name.as_deref(), ui)?)),
        _ => {
            let found = &args.engine;
            return Err(Failure::input(format!("--engine: expected auto or scripted:FILE, found {found}")));
        }
    };
    let generation = source.generation();
    let root = name.unwrap_or_else(|| source.name().to_owned());
    let served =
        if args.served_model_name.is_empty() { vec![root.clone()] } else { args.served_model_name.clone() };
    let options = Options {
        host: args.host.clone(),
        port: args.port,
        served_model_names: served,
        root,
        api_keys: args.api_key.clone(),
        system_date: args.system_date.clone(),
        responses_store: args.responses_store,
        defaults: SamplingDefaults {
            temperature: generation.temperature.unwrap_or(1.0),
            top_p: generation.top_p.unwrap_or(1.0),
            top_k: generation.top_k.unwrap_or(0) as usize,
            min_p: 0.0,
        },
        shutdown_timeout: Duration::from_secs(args.shutdown_timeout),
        ..Options::default()
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Failure::machine(format!("the server's threads cannot be started: {e}")))?;
    interrupt::handle_gracefully();
    runtime.block_on(serve(options, source, args, common.clone(), ui))
}

fn base(args: &Serve) -> EngineOptions {
    let options = EngineOptions { seed: args.seed, ..EngineOptions::default() };
    match args.max_num_queued_reqs {
        Some(count) => EngineOptions { max_queued_requests: count as usize, ..options },
        None => options,
    }
}

/// Where tokens come from.
enum Source {
    Model(Box<Model>),
    Script(Engine),
}

impl Source {
    fn generation(&self) -> GenerationConfig {
        match self {
            Source::Model(model) => model.checkpoint.generation_config().clone(),
            Source::Script(_) => GenerationConfig::default(),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Source::Model(_) => BUILT_IN,
            Source::Script(_) => "scripted",
        }
    }

    fn start(self, args: &Serve, common: &Common, ui: Ui) -> Result<Engine> {
        match self {
            Source::Model(model) => {
                Ok(start(*model, &args.run, &args.capacity, &base(args), common, ui)?.engine)
            }
            Source::Script(engine) => Ok(engine),
        }
    }
}

async fn serve(options: Options, source: Source, args: Serve, common: Common, ui: Ui) -> Result<()> {
    let server = Server::bind(&options).await.map_err(|e| Failure::machine(e.to_string()))?;
    let address = server.local_addr();
    if ui.json {
        ui.document(&serde_json::json!({"url": format!("http://{address}")}));
    } else {
        println!("http://{address}");
    }
    let handle = server.handle();
    let loading = tokio::task::spawn_blocking(move || source.start(&args, &common, ui));
    let serving = tokio::spawn(server.run(shutdown()));
    let failed = |e: tokio::task::JoinError| Failure::machine(format!("the server failed: {e}"));
    let engine = tokio::select! {
        loaded = loading => loaded.map_err(failed)??,
        // A signal while the model loads: there is nothing to finish, and loading need not be waited for.
        () = shutdown() => std::process::exit(0),
    };
    tracing::info!("ready: {}, context {}", engine.device(), engine.max_model_len());
    handle.ready(engine.clone());
    let served = serving.await.map_err(failed);
    engine.abort();
    served
}

/// SIGTERM or SIGINT.
async fn shutdown() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = interrupt => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = interrupt.await;
}

/// Flags that other servers need and this one does not.
fn ignored(args: &Serve) -> Vec<&'static str> {
    let mut flags = Vec::new();
    if args.trust_remote_code {
        flags.push("--trust-remote-code (no code of a model's repository is ever run)");
    }
    if args.reasoning_parser.is_some() || args.tool_call_parser.is_some() || args.enable_auto_tool_choice {
        flags.push(
            "--reasoning-parser, --tool-call-parser, --enable-auto-tool-choice (Harmony is always parsed)",
        );
    }
    flags
}
