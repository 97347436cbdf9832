//! vLLM's flags that `serve` does not have: accepted where they change nothing, refused with a reason where they would.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::failure::{Failure, Result};

/// What follows a flag.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    Value,
    /// One or more.
    Values,
}

/// What becomes of a flag.
#[derive(Clone, Copy)]
enum Fate {
    /// It changes nothing here; the text says why.
    Ignored(&'static str),
    /// It changes nothing with this value, and cannot be had with others; the text is the rest of the sentence.
    Only(&'static [&'static str], &'static str),
    /// It cannot be had; the text is the rest of the sentence.
    Refused(&'static str),
}

use Fate::{Ignored, Only, Refused};
use Takes::{Nothing, Value, Values};

const HARMONY: &str = "Harmony is built in and always parsed";
const PYTHON: &str = "Python extensions are not supported";
const LORA: &str = "adapters are not supported in this version";
const GRAPHS: &str = "kernels are compiled and graphs captured as the device needs";
const EXPERTS: &str =
    "GPUs share every expert, so that all have the same work: --tensor-parallel-size says how many";
const KERNELS: &str = "kernels are chosen for the device, the model and the work";
const TEXT: &str = "the model takes text alone";
const GENERATES: &str = "the model generates text";
const LOADING: &str = "weights are mapped, and loaded as the device takes them";
const SCHEDULER: &str = "the scheduler fills each step by itself";
const CACHES: &str = "the cache is in the device's memory, and no other server's";
const MAMBA: &str = "the model has no such layers";
const METRICS: &str = "there are no such metrics";
const NODES: &str = "one machine serves a model; put several behind a gateway";

const FLAGS: &[(&str, Takes, Fate)] = &[
    ("trust-remote-code", Nothing, Ignored("no code of a model's repository is ever run")),
    (
        "dtype",
        Value,
        Only(
            &["auto", "bfloat16", "float16", "half", "float32", "float"],
            "the device's kernels fix the type of activations",
        ),
    ),
    ("tokenizer-mode", Value, Ignored("there is one tokenizer")),
    ("skip-tokenizer-init", Nothing, Refused("answers are text")),
    ("code-revision", Value, Ignored("no code of a model's repository is ever run")),
    ("config-format", Value, Only(&["auto", "hf"], "models have Hugging Face's config.json")),
    ("model-impl", Value, Only(&["auto", "vllm"], "there is one implementation of the model")),
    ("runner", Value, Only(&["auto", "generate"], GENERATES)),
    ("convert", Value, Only(&["auto", "none"], GENERATES)),
    ("task", Value, Only(&["auto", "generate"], GENERATES)),
    ("enable-prompt-embeds", Nothing, Refused("prompts are text or token ids")),
    ("load-format", Value, Only(&["auto", "safetensors"], "models are safetensors")),
    ("safetensors-load-strategy", Value, Ignored(LOADING)),
    ("model-loader-extra-config", Value, Ignored(LOADING)),
    ("max-parallel-loading-workers", Value, Ignored(LOADING)),
    ("pt-load-map-location", Value, Ignored(LOADING)),
    ("ignore-patterns", Values, Ignored("what is not the model's is not fetched")),
    ("use-tqdm-on-load", Nothing, Ignored("--quiet counts")),
    ("cpu-offload-gb", Value, Only(&["0"], "weights are in the device's memory")),
    ("limit-mm-per-prompt", Value, Ignored(TEXT)),
    ("language-model-only", Nothing, Ignored(TEXT)),
    ("mm-processor-cache-gb", Value, Ignored(TEXT)),
    ("mm-processor-cache-type", Value, Ignored(TEXT)),
    ("mm-processor-kwargs", Value, Ignored(TEXT)),
    ("mm-shm-cache-max-object-size-mb", Value, Ignored(TEXT)),
    ("mm-encoder-tp-mode", Value, Ignored(TEXT)),
    ("mm-encoder-attn-backend", Value, Ignored(TEXT)),
    ("disable-mm-preprocessor-cache", Nothing, Ignored(TEXT)),
    ("disable-chunked-mm-input", Nothing, Ignored(TEXT)),
    ("enable-mm-embeds", Nothing, Ignored(TEXT)),
    ("interleave-mm-strings", Nothing, Ignored(TEXT)),
    ("skip-mm-profiling", Nothing, Ignored(TEXT)),
    ("media-io-kwargs", Value, Ignored(TEXT)),
    ("video-pruning-rate", Value, Ignored(TEXT)),
    ("allowed-local-media-path", Value, Ignored(TEXT)),
    ("allowed-media-domains", Values, Ignored(TEXT)),
    ("mamba-cache-dtype", Value, Ignored(MAMBA)),
    ("mamba-ssm-cache-dtype", Value, Ignored(MAMBA)),
    ("mamba-block-size", Value, Ignored(MAMBA)),
    ("pipeline-parallel-size", Value, Only(&["1"], "there is one stage in this version")),
    ("decode-context-parallel-size", Value, Only(&["1"], "GPUs share heads, not contexts")),
    ("prefill-context-parallel-size", Value, Only(&["1"], "GPUs share heads, not contexts")),
    ("disable-custom-all-reduce", Nothing, Ignored("GPUs exchange as they can")),
    ("all2all-backend", Value, Ignored("GPUs share every expert, and send no tokens to others")),
    ("expert-placement-strategy", Value, Refused(EXPERTS)),
    ("enable-expert-parallel", Nothing, Refused(EXPERTS)),
    ("enable-eplb", Nothing, Refused(EXPERTS)),
    ("eplb-config", Value, Refused(EXPERTS)),
    (
        "distributed-executor-backend",
        Value,
        Only(&["mp", "uni"], "the engine is a thread of this process; Ray is not needed"),
    ),
    ("swap-space", Value, Ignored("sequences start over from the prefix cache instead")),
    (
        "block-size",
        Value,
        Only(&["16", "32", "64"], "blocks have 16 tokens, and share what larger ones would"),
    ),
    ("num-gpu-blocks-override", Value, Refused("--kv-cache-memory-bytes says how large the cache is")),
    ("kv-sharing-fast-prefill", Nothing, Ignored("no two layers share keys and values")),
    ("disable-hybrid-kv-cache-manager", Nothing, Ignored("there is one manager of the cache")),
    ("kv-offloading-size", Value, Refused(CACHES)),
    ("kv-transfer-config", Value, Refused(CACHES)),
    ("kv-events-config", Value, Refused(CACHES)),
    ("prefix-caching-hash-algo", Value, Only(&["sha256"], "blocks are found by a cryptographic hash")),
    ("enable-chunked-prefill", Nothing, Ignored("prompts are always cut into chunks")),
    ("no-enable-chunked-prefill", Nothing, Ignored("prompts are always cut into chunks")),
    ("async-scheduling", Nothing, Ignored(SCHEDULER)),
    ("no-async-scheduling", Nothing, Ignored(SCHEDULER)),
    ("num-scheduler-steps", Value, Ignored(SCHEDULER)),
    ("max-num-partial-prefills", Value, Ignored(SCHEDULER)),
    ("max-long-partial-prefills", Value, Ignored(SCHEDULER)),
    ("performance-mode", Value, Ignored(SCHEDULER)),
    ("enable-dbo", Nothing, Ignored(SCHEDULER)),
    ("dbo-decode-token-threshold", Value, Ignored(SCHEDULER)),
    ("dbo-prefill-token-threshold", Value, Ignored(SCHEDULER)),
    ("scheduler-cls", Value, Refused(PYTHON)),
    ("attention-backend", Value, Ignored(KERNELS)),
    ("moe-backend", Value, Ignored(KERNELS)),
    ("disable-cascade-attn", Nothing, Ignored(KERNELS)),
    ("enable-flashinfer-autotune", Nothing, Ignored(KERNELS)),
    ("cuda-graph-sizes", Values, Ignored(GRAPHS)),
    ("max-seq-len-to-capture", Value, Ignored(GRAPHS)),
    ("cudagraph-capture-sizes", Values, Ignored(GRAPHS)),
    ("max-cudagraph-capture-size", Value, Ignored(GRAPHS)),
    ("compilation-config", Value, Ignored(GRAPHS)),
    ("optimization-level", Value, Ignored(GRAPHS)),
    ("reasoning-parser", Value, Ignored(HARMONY)),
    ("tool-call-parser", Value, Ignored(HARMONY)),
    ("enable-auto-tool-choice", Nothing, Ignored(HARMONY)),
    ("chat-template", Value, Ignored(HARMONY)),
    ("trust-request-chat-template", Nothing, Ignored(HARMONY)),
    ("default-chat-template-kwargs", Value, Ignored(HARMONY)),
    ("chat-template-content-format", Value, Ignored(HARMONY)),
    ("response-role", Value, Only(&["assistant"], "the assistant answers")),
    ("guided-decoding-backend", Value, Ignored("there is one compiler of grammars")),
    ("tool-server", Value, Ignored("tools are run by clients")),
    ("spec-model", Value, Refused("guesses come from what was said before, not from a second model")),
    ("enable-lora", Nothing, Refused(LORA)),
    ("lora-modules", Values, Refused(LORA)),
    ("max-loras", Value, Refused(LORA)),
    ("max-lora-rank", Value, Refused(LORA)),
    ("max-cpu-loras", Value, Refused(LORA)),
    ("fully-sharded-loras", Nothing, Refused(LORA)),
    ("lora-dtype", Value, Refused(LORA)),
    ("default-mm-loras", Value, Refused(LORA)),
    ("otlp-traces-endpoint", Value, Ignored("the server opens no outbound connection")),
    ("collect-detailed-traces", Values, Ignored("the server opens no outbound connection")),
    ("show-hidden-metrics-for-version", Value, Ignored("no metrics are hidden")),
    ("kv-cache-metrics", Nothing, Refused(METRICS)),
    ("enable-mfu-metrics", Nothing, Refused(METRICS)),
    ("log-config-file", Value, Ignored("--log-level and --log-format count")),
    ("log-error-stack", Nothing, Ignored("there is no stack of Python to show")),
    ("enable-log-deltas", Nothing, Ignored("answers are logged as a whole")),
    ("aggregate-engine-logging", Nothing, Ignored("each engine has its lines")),
    ("disable-log-requests", Nothing, Ignored("prompts are not logged unless --enable-log-requests")),
    ("disable-access-log-for-endpoints", Value, Ignored("probes are not logged")),
    ("uvicorn-log-level", Value, Ignored("--log-level counts")),
    ("disable-uvicorn-access-log", Nothing, Ignored("--log-level counts")),
    ("disable-frontend-multiprocessing", Nothing, Ignored("there is one process")),
    ("api-server-count", Value, Ignored("there is one process")),
    ("enable-request-id-headers", Nothing, Ignored("they are always there")),
    ("enable-prompt-tokens-details", Nothing, Ignored("they are always there")),
    ("enable-server-load-tracking", Nothing, Ignored("/load is always there")),
    ("enable-offline-docs", Nothing, Ignored("/docs needs no network")),
    ("enable-tokenizer-info-endpoint", Nothing, Refused("there is no /tokenizer_info")),
    ("h11-max-incomplete-event-size", Value, Ignored("the server bounds heads and bodies")),
    ("h11-max-header-count", Value, Ignored("the server bounds heads and bodies")),
    ("ssl-ciphers", Value, Refused("the server has safe ciphers only, and takes no list")),
    ("return-tokens-as-token-ids", Nothing, Refused("requests ask for it by return_tokens_as_token_ids")),
    ("middleware", Values, Refused(PYTHON)),
    ("tool-parser-plugin", Value, Refused(PYTHON)),
    ("reasoning-parser-plugin", Value, Refused(PYTHON)),
    ("io-processor-plugin", Value, Refused(PYTHON)),
    ("worker-cls", Value, Refused(PYTHON)),
    ("worker-extension-cls", Value, Refused(PYTHON)),
    ("logits-processors", Values, Refused(PYTHON)),
    ("nnodes", Value, Only(&["1"], NODES)),
    ("node-rank", Value, Only(&["0"], NODES)),
    ("master-addr", Value, Ignored("there is one machine")),
    ("master-port", Value, Ignored("there is one machine")),
    ("headless", Nothing, Refused(NODES)),
    ("data-parallel-rank", Value, Refused(NODES)),
    ("data-parallel-start-rank", Value, Refused(NODES)),
    ("data-parallel-hybrid-lb", Nothing, Refused(NODES)),
    ("data-parallel-external-lb", Nothing, Refused(NODES)),
    ("data-parallel-address", Value, Refused(NODES)),
    ("data-parallel-rpc-port", Value, Refused(NODES)),
    ("data-parallel-backend", Value, Ignored("the engines are threads of this process")),
    ("data-parallel-size-local", Value, Only(&["1"], NODES)),
];

/// The flags of that kind that were given, as they were typed.
#[derive(Debug, Default)]
pub(crate) struct Foreign(Vec<(&'static str, Vec<String>)>);

impl Foreign {
    /// What was given and changes nothing, for people.
    ///
    /// # Errors
    /// What was given and cannot be had.
    pub(crate) fn ignored(&self) -> Result<Vec<String>> {
        let mut ignored = Vec::new();
        for (name, values) in &self.0 {
            let Some((_, _, fate)) = FLAGS.iter().find(|(known, ..)| known == name) else { continue };
            let strange = |allowed: &[&str]| values.iter().find(|v| !allowed.contains(&v.as_str())).cloned();
            match *fate {
                Ignored(why) => ignored.push(format!("--{name} ({why})")),
                Refused(why) => return Err(Failure::input(format!("--{name}: {why}"))),
                Only(allowed, why) => match strange(allowed) {
                    None => ignored.push(format!("--{name} ({why})")),
                    Some(found) => {
                        let expected = allowed.join(" or ");
                        return Err(Failure::input(format!(
                            "--{name}: expected {expected}, since {why}, found {found}"
                        )));
                    }
                },
            }
        }
        Ok(ignored)
    }
}

impl Args for Foreign {
    fn augment_args(command: Command) -> Command {
        FLAGS.iter().fold(command, |command, &(name, takes, _)| {
            let arg = Arg::new(name).long(name).hide(true);
            command.arg(match takes {
                Nothing => arg.action(ArgAction::SetTrue),
                Value => arg.num_args(1).allow_hyphen_values(true),
                Values => arg.num_args(1..).action(ArgAction::Append),
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Foreign::augment_args(command)
    }
}

impl FromArgMatches for Foreign {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Foreign, clap::Error> {
        let mut given = Foreign::default();
        given.update_from_arg_matches(matches)?;
        Ok(given)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        for &(name, takes, _) in FLAGS {
            if takes == Nothing && matches.get_flag(name) {
                self.0.push((name, Vec::new()));
            } else if takes != Nothing
                && let Some(values) = matches.get_many::<String>(name)
            {
                self.0.push((name, values.cloned().collect()));
            }
        }
        Ok(())
    }
}
