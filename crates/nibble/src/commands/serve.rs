//! `nibble serve`: the OpenAI-compatible server.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint::GenerationConfig;
use engine::{Engine, EngineOptions, SamplingParams, SchedulingPolicy};
use serde_json::{Value, json};
use server::{
    ClientCertificates, CorsOptions, Ended, ErrorStyle, Fingerprint, Handle, JsonRules, Options,
    SamplingDefaults, Server, SystemDate, TlsOptions,
};
use tracing_subscriber::EnvFilter;

use crate::args::{AccessFlags, Answers, Common, Guessing, Limits, Logs, Network, Serve};
use crate::engine::{Places, scripted, start_all};
use crate::failure::{Failure, Result};
use crate::model::{BUILT_IN, Model};
use crate::modelopt::flag;
use crate::replicas::places;
use crate::ui::{Ui, out, tell};
use crate::{interrupt, spelling};

pub(crate) fn run(args: Serve, common: &Common, ui: Ui) -> Result<()> {
    interrupt::survive_broken_pipe();
    log(&args.logs);
    let ignored = [args.foreign.ignored()?, spelling::ignored_variables()].concat();
    if !ignored.is_empty() {
        tracing::info!("ignored for compatibility: {}", ignored.join("; "));
    }
    if args.model.is_some() && args.model_flag.is_some() && args.config.is_none() {
        return Err(Failure::input("expected one model, found MODEL and --model"));
    }
    // Wrong files are an error before the port is open.
    let name = args.model.clone().or_else(|| args.model_flag.clone());
    let all: Vec<usize> = (0..args.data_parallel_size.into()).collect();
    let source = Source::open(&args, common, name.as_deref(), &all, ui)?;
    if name.is_none() && matches!(source, Source::Model(..)) {
        tracing::warn!(
            "no MODEL was given: the small built-in one is served, which is for trying things out"
        );
    }
    let root = name.unwrap_or_else(|| source.name().to_owned());
    let options = options(&args, common, &source, root)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Failure::machine(format!("the server's threads cannot be started: {e}")))?;
    interrupt::handle_gracefully();
    raise_file_limit(options.max_connections);
    return_large_memory();
    runtime.block_on(serve(options, source, Arc::new(args), common.clone(), ui))
}

/// Has the allocator give large pieces back to the system when they are freed. Left alone, glibc keeps them once it has met
/// one, and bodies of many megabytes, which come and go on many threads, leave holes that add up.
fn return_large_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// What the engine allocates in a step is smaller.
        const LARGE: i32 = 4 << 20;
        // SAFETY: takes two numbers; what was allocated before is not touched.
        let _ = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
    }
}

/// Each connection is an open file, of which most systems allow few unless they are asked.
fn raise_file_limit(connections: usize) {
    #[cfg(unix)]
    {
        /// The model's, the engine's and the log's.
        const OTHERS: u64 = 256;
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the pointer is to a whole, owned structure; the call writes nothing else.
        if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
            return;
        }
        let wanted = connections as u64 + OTHERS;
        let raised = libc::rlimit {
            rlim_cur: wanted.clamp(limit.rlim_cur, limit.rlim_max.max(limit.rlim_cur)),
            ..limit
        };
        // SAFETY: as above; the call only reads.
        let done = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0;
        let found = if done { raised.rlim_cur } else { limit.rlim_cur };
        if found < wanted {
            tracing::warn!("this system allows {found} open files, so fewer than {connections} connections");
        }
    }
}

fn log(logs: &Logs) {
    let filter = match logs.log_level.as_deref().map(str::to_ascii_lowercase).as_deref() {
        None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        Some("warning") => EnvFilter::new("warn"),
        Some("critical") => EnvFilter::new("error"),
        Some(level) => EnvFilter::new(level),
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match logs.log_format.as_str() {
        "json" => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
        _ => lines.with_ansi(std::io::stderr().is_terminal()).init(),
    }
}

/// Tokens that `--never-empty-content` keeps for the answer.
const ANSWER_RESERVE: usize = 64;

fn options(args: &Serve, common: &Common, source: &Source, root: String) -> Result<Options> {
    let Serve { network, access, answers, limits, logs, .. } = args;
    let info = info(args, common);
    let served = match answers.served_model_name.is_empty() {
        true => vec![root.clone()],
        false => answers.served_model_name.clone(),
    };
    let seconds = Duration::from_secs;
    Ok(Options {
        host: network.host.clone(),
        port: network.port,
        socket: network.uds.clone(),
        tls: tls(network),
        root_path: network.root_path.clone(),
        trust_routing_headers: network.trust_routing_headers,
        cors: CorsOptions {
            origins: network.allowed_origins.0.clone(),
            methods: network.allowed_methods.0.clone(),
            headers: network.allowed_headers.0.clone(),
            credentials: network.allow_credentials,
        },
        served_model_names: served,
        root,
        model_owner: answers.model_owner.clone(),
        api_keys: keys(access)?,
        admin_keys: access.admin_api_key.clone(),
        metrics_keys: access.metrics_api_key.clone(),
        dev_mode: access.dev_mode,
        rate_limit_requests: access.rate_limit_requests,
        rate_limit_tokens: access.rate_limit_tokens,
        system_date: match &answers.system_date {
            _ if answers.no_system_date => SystemDate::None,
            Some(date) => SystemDate::Fixed(date.clone()),
            None => SystemDate::Today,
        },
        strict_reasoning_effort: answers.strict_reasoning_effort,
        exclude_tools_of_choice_none: answers.exclude_tools_when_tool_choice_none,
        json: answers.structured_outputs_config.map_or_else(JsonRules::default, |config| JsonRules {
            no_whitespace: config.disable_any_whitespace,
            no_other_properties: config.disable_additional_properties,
        }),
        strict_arguments: answers.tool_strict_level == "parameter",
        defaults: defaults(answers, source)?,
        max_logprobs: match usize::try_from(answers.max_logprobs) {
            Ok(max) => max,
            Err(_) if answers.unsafe_unbounded_logprobs => usize::MAX,
            Err(_) => {
                return Err(Failure::input("--max-logprobs: -1 needs --unsafe-unbounded-logprobs"));
            }
        },
        final_logprobs: answers.logprobs_scope == "final",
        max_n: answers.max_n.into(),
        isolate_prefix_cache: access.isolate_prefix_cache_per_key,
        stream_interval: answers.stream_interval.into(),
        eager_streams: answers.eager_stream_start,
        reasoning_content: !answers.no_reasoning_content_alias,
        answer_reserve: if args.scheduling.never_empty_content { ANSWER_RESERVE } else { 0 },
        force_include_usage: answers.enable_force_include_usage,
        request_metrics: answers.enable_per_request_metrics,
        fingerprint: match (answers.fingerprint_mode.as_str(), &answers.fingerprint_value) {
            ("hash", _) => Fingerprint::Hash,
            ("none", _) => Fingerprint::None,
            ("custom", Some(value)) => Fingerprint::Custom(value.clone()),
            _ => Fingerprint::Full,
        },
        error_style: match answers.error_code_style.as_str() {
            "openai" => ErrorStyle::OpenAi,
            _ => ErrorStyle::Vllm,
        },
        responses_store: answers.responses_store,
        max_body_bytes: usize::try_from(limits.max_request_body_size).unwrap_or(usize::MAX),
        max_connections: limits.max_connections,
        keep_alive: seconds(limits.timeout_keep_alive),
        sse_keep_alive: seconds(limits.sse_keep_alive_interval),
        client_stall_timeout: seconds(limits.client_stall_timeout),
        request_timeout: limits.request_timeout.map(seconds),
        health_stall_timeout: seconds(limits.health_stall_timeout),
        shutdown_timeout: seconds(limits.shutdown_timeout),
        sleep_mode: access.enable_sleep_mode,
        page: !access.disable_page,
        docs: !access.disable_docs,
        ollama: !access.no_ollama_compat,
        cache_labels: cache_labels(args),
        legacy_metrics: !logs.no_legacy_metrics,
        log_stats: !logs.disable_log_stats,
        log_requests: logs.enable_log_requests,
        log_outputs: logs.enable_log_outputs,
        max_log_len: logs.max_log_len,
        replicas: args.data_parallel_size.into(),
        info,
    })
}

fn tls(network: &Network) -> Option<TlsOptions> {
    Some(TlsOptions {
        certificates: network.ssl_certfile.clone()?,
        key: network.ssl_keyfile.clone()?,
        client_roots: network.ssl_ca_certs.clone(),
        client_certificates: match network.ssl_cert_reqs {
            0 => ClientCertificates::None,
            1 => ClientCertificates::Optional,
            _ => ClientCertificates::Required,
        },
        refresh: network.enable_ssl_refresh,
    })
}

/// Those of the command line and of the file.
fn keys(access: &AccessFlags) -> Result<Vec<String>> {
    let mut keys = access.api_key.clone();
    if let Some(path) = &access.api_key_file {
        let text = std::fs::read_to_string(path).map_err(|e| Failure::io(path, &e))?;
        keys.extend(text.lines().map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned));
        if keys.is_empty() {
            return Err(Failure::input(format!(
                "--api-key-file: {}: expected a key per line, found none",
                path.display()
            )));
        }
    }
    // An empty key would let everybody in who sends an empty one.
    match keys.iter().chain(&access.admin_api_key).chain(&access.metrics_api_key).any(String::is_empty) {
        true => Err(Failure::input("--api-key: expected a key, found an empty text")),
        false => Ok(keys),
    }
}

fn defaults(answers: &Answers, source: &Source) -> Result<SamplingDefaults> {
    let file = match answers.generation_config.as_str() {
        "auto" => source.generation(),
        "vllm" => GenerationConfig::default(),
        folder => GenerationConfig::open(Path::new(folder))?,
    };
    let own = answers.override_generation_config.unwrap_or_default();
    let none = SamplingDefaults::default();
    let defaults = SamplingDefaults {
        temperature: own.temperature.or(file.temperature).unwrap_or(none.temperature),
        top_p: own.top_p.or(file.top_p).unwrap_or(none.top_p),
        top_k: own.top_k.or(file.top_k).map_or(none.top_k, |k| k as usize),
        min_p: own.min_p.or(file.min_p).unwrap_or(none.min_p),
        repetition_penalty: own
            .repetition_penalty
            .or(file.repetition_penalty)
            .unwrap_or(none.repetition_penalty),
    };
    let params = SamplingParams {
        temperature: defaults.temperature,
        top_p: defaults.top_p,
        top_k: defaults.top_k,
        min_p: defaults.min_p,
        repetition_penalty: defaults.repetition_penalty,
        ..SamplingParams::default()
    };
    // Else every request would be refused for what its client never said.
    params.validate(usize::MAX).map_err(|error| {
        let whence = "--override-generation-config, or generation_config.json, which --generation-config vllm leaves out";
        Failure::input(format!("{whence}: {error}"))
    })?;
    Ok(defaults)
}

/// What `/server_info` says of the command line: no key, no path.
fn info(args: &Serve, common: &Common) -> Value {
    let Serve { answers, limits, capacity, run, .. } = args;
    json!({
        "device": common.device,
        "threads": common.threads,
        "cuda": cfg!(feature = "cuda"),
        "quantization": run.quantization,
        "batch_invariant": run.batch_invariant,
        "seed": args.seed,
        "data_parallel_size": args.data_parallel_size,
        "max_num_seqs": capacity.max_num_seqs,
        "max_num_batched_tokens": capacity.max_num_batched_tokens,
        "kv_cache_dtype": flag(&run.kv_cache_dtype),
        "kv_cache_memory_bytes": capacity.kv_cache_memory_bytes,
        "gpu_memory_utilization": capacity.gpu_memory_utilization,
        "prefix_caching": !capacity.no_enable_prefix_caching,
        "max_num_queued_reqs": limits.max_num_queued_reqs,
        "max_num_queued_tokens": limits.max_num_queued_tokens,
        "max_connections": limits.max_connections,
        "responses_store": answers.responses_store,
        "stream_interval": answers.stream_interval,
        "shutdown_timeout": limits.shutdown_timeout
    })
}

/// What vLLM says of its cache in the metrics, in its words.
fn cache_labels(Serve { capacity, run, .. }: &Serve) -> Vec<(&'static str, String)> {
    let prefixes = if capacity.no_enable_prefix_caching { "False" } else { "True" };
    let mut labels =
        vec![("cache_dtype", flag(&run.kv_cache_dtype)), ("enable_prefix_caching", prefixes.to_owned())];
    labels.extend(capacity.gpu_memory_utilization.map(|share| ("gpu_memory_utilization", share.to_string())));
    labels
}

fn base(args: &Serve, limits: &Limits) -> EngineOptions {
    let scheduling = &args.scheduling;
    let mut options = EngineOptions {
        seed: args.seed,
        policy: match scheduling.scheduling_policy.as_str() {
            "priority" => SchedulingPolicy::Priority,
            "round-robin" => SchedulingPolicy::RoundRobin,
            _ => SchedulingPolicy::Arrival,
        },
        long_prefill_token_threshold: scheduling.long_prefill_token_threshold,
        processed_logprobs: scheduling.logprobs_mode == "processed_logprobs",
        harmony_guard: !scheduling.no_harmony_guard,
        even_steps: true,
        ..crate::engine::base()
    };
    match (scheduling.speculative_config, scheduling.spec_method.as_deref()) {
        (Some(Guessing(speculation)), _) => options.speculation = speculation,
        (None, Some("none")) => options.speculation = None,
        (None, _) => {}
    }
    if let (Some(speculation), Some(tokens)) = (&mut options.speculation, scheduling.spec_tokens) {
        speculation.tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
    }
    if let Some(count) = limits.max_num_queued_reqs {
        options.max_queued_requests = usize::try_from(count).unwrap_or(usize::MAX);
    }
    options.max_queued_tokens =
        limits.max_num_queued_tokens.map(|count| usize::try_from(count).unwrap_or(usize::MAX));
    options
}

/// Where tokens come from.
enum Source {
    /// And where to compute them.
    Model(Box<Model>, Vec<Common>),
    Script(Vec<Engine>),
}

impl Source {
    /// For the engines of these numbers.
    fn open(args: &Serve, common: &Common, name: Option<&str>, numbers: &[usize], ui: Ui) -> Result<Source> {
        match args.engine.split_once(':') {
            Some(("scripted", file)) => {
                let engine = || scripted(file, &args.capacity, &base(args, &args.limits));
                Ok(Source::Script(numbers.iter().map(|_| engine()).collect::<Result<_>>()?))
            }
            _ if args.engine == "auto" => {
                let mut model = Model::open_from(name, &args.hub, ui)?;
                if let Some(name) = &args.tokenizer {
                    model.use_tokenizer(name, args.tokenizer_revision.as_deref(), &args.hub, ui)?;
                }
                let all = places(common, args.data_parallel_size.into(), args.run.tensor_parallel_size)?;
                let these = numbers.iter().map(|&number| all[number].clone()).collect();
                Ok(Source::Model(Box::new(model), these))
            }
            _ => {
                let found = &args.engine;
                Err(Failure::input(format!("--engine: expected auto or scripted:FILE, found {found}")))
            }
        }
    }

    fn generation(&self) -> GenerationConfig {
        match self {
            Source::Model(model, _) => model.checkpoint.generation_config().clone(),
            Source::Script(_) => GenerationConfig::default(),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Source::Model(..) => BUILT_IN,
            Source::Script(_) => "scripted",
        }
    }

    /// Where `context` is given it is that of other engines, which serve already.
    fn start(
        self,
        args: &Serve,
        common: &Common,
        context: Option<usize>,
        ui: Ui,
        handle: &Handle,
    ) -> Result<Vec<Engine>> {
        match self {
            Source::Model(model, places) => {
                let mut watch = |done, total| handle.progress(done, total);
                let base = EngineOptions { max_model_len: context, ..base(args, &args.limits) };
                let loading = Instant::now();
                let places = Places { common, of: args.data_parallel_size.into(), these: &places };
                let engines = start_all(*model, &args.run, &args.capacity, &base, &places, ui, &mut watch)?;
                handle.started("load", loading.elapsed());
                Ok(engines)
            }
            Source::Script(engines) => Ok(engines),
        }
    }
}

async fn serve(options: Options, source: Source, args: Arc<Serve>, common: Common, ui: Ui) -> Result<()> {
    let server = Server::bind(&options).await.map_err(|error| match error {
        server::Error::Tls(message) => Failure::input(message),
        error => Failure::machine(error.to_string()),
    })?;
    let (url, port) = (server.url().to_owned(), server.local_addr().map(|address| address.port()));
    // Nobody need read it.
    let _ = if ui.json { ui.document(&json!({"url": url})) } else { out!("{url}") };
    let handle = server.handle();
    let loading = {
        let (args, common, handle) = (Arc::clone(&args), common.clone(), handle.clone());
        tokio::task::spawn_blocking(move || source.start(&args, &common, None, ui, &handle))
    };
    let limit = args.limits.ready_timeout.map_or(Duration::MAX, Duration::from_secs);
    let serving = tokio::spawn(server.run(shutdown()));
    let failed = |e: tokio::task::JoinError| Failure::machine(format!("the server failed: {e}"));
    let engines = tokio::select! {
        loaded = loading => loaded.map_err(failed)??,
        // A signal while the model loads: there is nothing to finish, and loading need not be waited for.
        () = shutdown() => std::process::exit(0),
        () = tokio::time::sleep(limit) => {
            let seconds = limit.as_secs();
            // Loading need not be waited for either.
            tell(format_args!("error: --ready-timeout: the model was not loaded within {seconds} s"));
            std::process::exit(3);
        }
    };
    for engine in &engines {
        let (device, context) = (engine.device(), engine.max_model_len());
        tracing::info!("ready: {} at {url}, {device}, context {context}", options.root);
    }
    let context = engines.first().map(Engine::max_model_len);
    handle.ready(engines);
    reload(&handle, args, common, context, ui);
    match serving.await.map_err(failed)? {
        Ended::ShutDown => Ok(()),
        Ended::BeyondRepair => Err(begin_again(port)),
    }
}

/// Begins this process again, on the same port: the device gives nothing to it as it is. Returns only if that fails.
fn begin_again(port: Option<u16>) -> Failure {
    tracing::warn!("the server begins again");
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt as _;
        let mut arguments = std::env::args_os();
        let name = arguments.next().unwrap_or_default();
        // The very program that runs, even if another file has its name since.
        #[cfg(target_os = "linux")]
        let program = std::path::PathBuf::from("/proc/self/exe");
        #[cfg(not(target_os = "linux"))]
        let program = std::env::current_exe().unwrap_or_else(|_| name.clone().into());
        let mut command = std::process::Command::new(program);
        command.arg0(name).args(arguments);
        // Whatever port was free must be the same again; the last word counts.
        if let Some(port) = port {
            command.args(["--port", &port.to_string()]);
        }
        Failure::machine(format!("the server cannot begin again: {}", command.exec()))
    }
    #[cfg(not(unix))]
    {
        let _ = port;
        Failure::machine("the device was lost, and only a new process can have it again")
    }
}

/// How engines come back after a sleep or a failure. One among others takes what they take.
fn reload(handle: &Handle, args: Arc<Serve>, common: Common, context: Option<usize>, ui: Ui) {
    handle.reload_with(Box::new(move |handle, numbers| {
        let name = args.model.as_deref().or(args.model_flag.as_deref());
        let context = context.filter(|_| numbers.len() < args.data_parallel_size.into());
        let source = Source::open(&args, &common, name, numbers, ui).map_err(|failure| failure.message)?;
        source.start(&args, &common, context, ui, handle).map_err(|failure| failure.message)
    }));
}

/// SIGTERM or SIGINT, of which a second one ends the process at once.
async fn shutdown() {
    // What cannot be watched for ends the process by itself.
    if interrupt::signalled().await.is_err() {
        std::future::pending().await
    }
}
