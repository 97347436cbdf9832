//! The command line: every flag once, with its help.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::Speculation;

use crate::foreign::Foreign;
use crate::gpus;

/// Quantizes gpt-oss to NVFP4, runs it, serves it, and measures what four bits cost.
#[derive(Debug, Parser)]
#[command(name = "nibble", version, about, max_term_width = 100, infer_long_args = false, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  nibble demo                                              the main job on a small built-in model
  nibble quantize openai/gpt-oss-20b --out gpt-oss-20b-nvfp4
  nibble verify openai/gpt-oss-20b gpt-oss-20b-nvfp4
  nibble chat gpt-oss-20b-nvfp4
  nibble serve gpt-oss-20b-nvfp4 --port 8000

MODEL is a folder, or a hub name such as openai/gpt-oss-20b that is fetched on first use.

Exit status: 0 done; 1 the answer is no; 2 bad usage or input; 3 the machine failed; 130 interrupted.";

/// Flags of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Common {
    /// One JSON document on standard output, nothing else there
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress on standard error
    #[arg(long, global = true)]
    pub(crate) quiet: bool,
    /// Where to run. Several GPUs share a model, unless --tensor-parallel-size and --data-parallel-size say otherwise
    #[arg(long, global = true, value_name = "auto|cpu|cuda[:N[,N…]]", default_value = "auto", value_parser = gpus::device_name)]
    pub(crate) device: String,
    /// Threads [default: one per physical core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The main job from end to end on the small built-in model: quantize, verify, measure, answer
    #[command(after_help = "\
Examples:
  nibble demo               for people
  nibble demo --json        for scripts")]
    Demo,
    /// Write a quantized checkpoint
    Quantize(Box<Quantize>),
    /// What is in a checkpoint: layout, tensors, bits per weight, sizes, global scales
    Inspect(Inspect),
    /// Compare two checkpoints, whatever their layouts
    Verify(Verify),
    /// Completions of one or many prompts, offline and batched
    Generate(Generate),
    /// A conversation in the terminal
    Chat(Chat),
    /// The OpenAI-compatible server
    Serve(Box<Serve>),
    /// Perplexity, and divergence from a reference
    Eval(Eval),
    /// Speed: prompt processing, decoding, batches
    Bench(Bench),
    /// What this machine has, which kernels are chosen, and whether each gives the right numbers
    #[command(after_help = "\
Examples:
  nibble doctor
  nibble doctor --device cpu --threads 4")]
    Doctor,
    /// Text to token ids and back
    #[command(
        subcommand,
        after_help = "\
Examples:
  nibble tokens encode --text \"Hello, world\"
  nibble tokens decode 13225 11 2375
  nibble tokens encode --lines texts.jsonl         a JSON string on each line"
    )]
    Tokens(Tokens),
    /// Messages to Harmony prompts, and generated ids to messages
    #[command(
        subcommand,
        after_help = "\
Examples:
  echo '{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}' | nibble harmony render -
  nibble harmony parse 200005 17196 200008 24912 200002
  nibble harmony parse --lines answers.jsonl       {\"ids\": […], \"tools\": […]} on each line"
    )]
    Harmony(Harmony),
    /// The logits of a prompt, as a tensor file
    Logits(Logits),
}

/// How a model is run.
#[derive(Debug, Clone, Args)]
pub(crate) struct Run {
    /// The format to run in: `nvfp4` casts MXFP4 losslessly at load, packs fake-quantized BF16 with its stored scales and
    /// rounds plain BF16; the other names are checked against the files
    #[arg(long, short = 'q', default_value = "auto", value_name = "auto|nvfp4|none|…")]
    pub(crate) quantization: String,
    /// Tokens do not depend on the rest of the batch. Always so on a CPU; on a GPU it costs speed (BENCHMARKS.md), and the prefix
    /// cache is not used
    #[arg(long)]
    pub(crate) batch_invariant: bool,
    /// Type of the key/value cache. `auto` is f32 on a CPU and BF16 on a GPU; `fp8` is E4M3 with the checkpoint's scales, or 1
    /// without
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) kv_cache_dtype: CacheType,
    /// Runs a GPU's kernels one by one, without graphs
    #[arg(long)]
    pub(crate) enforce_eager: bool,
    /// What is not in four bits, on a CPU: as it is stored, or (`fast`) in eight bits with one scale per row; routers
    /// and the embedding stay
    #[arg(long, value_enum, default_value = "as-stored")]
    pub(crate) weights: WeightBits,
    /// What weights of four and eight bits are multiplied with, on a CPU: numbers of 24 bits, which are as good as f32, of 16
    /// or of 8, one scale per 32; or all weights with BF16, as GPUs do, which is fast on CPUs with AMX. BENCHMARKS.md has speed
    /// and divergence of each. `nvfp4` is what W4A4 models ask for: a CPU rounds to it, which shows what it costs; a Blackwell GPU
    /// multiplies in four bits where there are many tokens: these kernels have not yet run on the chip, and are used only if their
    /// self-test passes; the weights are in memory twice
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) activations: ActivationBits,
    /// Keeps the weights on disk as a CPU reads them: the file is made if it is not there or of other weights, and checked and
    /// mapped at the next start. It is as large as the loaded model
    #[arg(long, value_name = "FILE")]
    pub(crate) packed_cache: Option<PathBuf>,
    /// GPUs that share the model, `--device`'s and those after it: each has some heads of every layer and some units of every
    /// expert [default: 1, or as many as --device names]
    #[arg(long, visible_alias = "tp", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) tensor_parallel_size: Option<u16>,
    /// Prints the time per kernel to standard error at the end; `bench` times one more run of each test. A GPU runs its
    /// kernels one after the other meanwhile
    #[arg(long)]
    pub(crate) profile: bool,
}

impl Run {
    /// The weights as they are in the files, with the most precise arithmetic.
    pub(crate) fn exact() -> Run {
        Run {
            quantization: "auto".to_owned(),
            batch_invariant: false,
            kv_cache_dtype: CacheType::Auto,
            enforce_eager: false,
            weights: WeightBits::AsStored,
            activations: ActivationBits::F32,
            packed_cache: None,
            tensor_parallel_size: None,
            profile: false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheType {
    Auto,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WeightBits {
    AsStored,
    Fast,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActivationBits {
    F32,
    Bf16,
    Int16,
    Int8,
    Nvfp4,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nibble quantize openai/gpt-oss-20b --out gpt-oss-20b-nvfp4          the lossless cast
  nibble quantize my-finetune --recipe linear --out my-finetune-nvfp4   attention too
  nibble quantize my-finetune --calibration chats.jsonl --out nvfp4     calibrated on your own data
  nibble quantize my-finetune --config NVFP4_DEFAULT_CFG --out w4a4      Model Optimizer's default, W4A4
  nibble quantize gpt-oss-20b-nvfp4 --format fake-bf16 --out fake       any program loads it

Unfinished work lies in DIR.partial and DIR.calibration; the same command continues it.")]
pub(crate) struct Quantize {
    /// The checkpoint to quantize
    #[arg(value_name = "SOURCE")]
    pub(crate) source: String,
    /// Where to write it
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// What is quantized: the experts; attention too; the output layer too
    #[arg(long, value_enum, default_value = "experts")]
    pub(crate) recipe: Recipe,
    /// All but `max` cast what is MXFP4; what is BF16 takes the rest of the name
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) algorithm: Algorithm,
    /// Activations in four bits too (W4A4): writes their static scales, from calibration
    #[arg(long, value_enum, default_value = "none")]
    pub(crate) activations: Activations,
    /// What the KV cache is to be kept in: as the source says, or in FP8 with static scales, the source's or from calibration
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) kv_cache: KvCache,
    /// One of Model Optimizer's configurations, for the flags that it stands for
    #[arg(long, value_name = "NAME", conflicts_with_all = ["recipe", "algorithm", "activations"])]
    pub(crate) config: Option<String>,
    /// The layout to write
    #[arg(long, value_enum, default_value = "modelopt")]
    pub(crate) format: Format,
    /// Quantize the embedding too
    #[arg(long, value_enum, default_value = "none")]
    pub(crate) embedding: Embedding,
    /// One global scale for a stack of experts, or one each; what is NVFP4 already keeps its own
    #[arg(long, value_enum, default_value = "stack")]
    pub(crate) scales_per: ScalesPer,
    /// What to calibrate on: .txt; .jsonl with `messages`, with `prompt`, or arrays of ids [default: a built-in set]
    #[arg(long, value_name = "FILE")]
    pub(crate) calibration: Vec<PathBuf>,
    /// Tokens to calibrate on, shared equally among the files
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub(crate) calibration_tokens: u32,
    /// Which windows of the files: 0 takes the first, any other number draws them
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Every token goes through every expert for the statistics and for the scales of inputs
    #[arg(long)]
    pub(crate) all_experts: bool,
    /// Measures the result and writes a report there: a page (index.html), the same as JSON (report.json), a model card
    /// (README.md). Those of an earlier report are replaced, others are not. To measure takes source and result in memory at once
    #[arg(long, value_name = "DIR")]
    pub(crate) report: Option<PathBuf>,
    /// Cast even where values change
    #[arg(long)]
    pub(crate) allow_loss: bool,
    /// Replace DIR if it exists, and drop what another command left unfinished
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Largest size of one file, such as 5G, 5GB or 5GiB
    #[arg(long, value_name = "BYTES", default_value = "5G", value_parser = size)]
    pub(crate) max_shard_size: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Recipe {
    Experts,
    Linear,
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Algorithm {
    /// The lowest divergence as measured in BENCHMARKS.md: refine
    Auto,
    /// The lossless cast, and max
    Cast,
    /// Scales from the largest magnitude, for everything
    Max,
    /// The block scale of the smallest squared error
    Mse,
    /// The better of two block scales
    FourOverSix,
    /// The block scale of the smallest error of its product with the inputs; calibrates
    LocalHessian,
    /// For attention, scaled columns and a clipped global scale; max for the experts; calibrates
    Awq,
    /// Error feedback with max scales; calibrates
    Gptq,
    /// Error feedback with searched scales, bias correction and refinement; calibrates
    Refine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Activations {
    None,
    Nvfp4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvCache {
    Auto,
    Fp8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// ModelOpt's unified export
    Modelopt,
    /// nvfp4-pack-quantized; experts stay BF16
    CompressedTensors,
    /// BF16 on the NVFP4 grid, with the scales beside it
    FakeBf16,
    /// As openai/gpt-oss is published
    Mxfp4,
    /// Hugging Face, BF16
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Embedding {
    None,
    Nvfp4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScalesPer {
    Stack,
    Expert,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nibble inspect openai/gpt-oss-20b
  nibble inspect gpt-oss-20b-nvfp4 --json
  nibble inspect gpt-oss-20b-nvfp4 --tensor model.layers.0.mlp.experts.down_proj")]
pub(crate) struct Inspect {
    /// The checkpoint
    pub(crate) model: String,
    /// Look at one tensor, by its name in the files
    #[arg(long, value_name = "NAME")]
    pub(crate) tensor: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nibble verify openai/gpt-oss-20b gpt-oss-20b-nvfp4         value by value
  nibble verify my-finetune my-finetune-nvfp4 --tolerance 0.2")]
pub(crate) struct Verify {
    /// One checkpoint
    pub(crate) a: String,
    /// The other
    pub(crate) b: String,
    /// Relative error allowed per tensor: RMS of the difference over RMS
    #[arg(long, value_name = "X")]
    pub(crate) tolerance: Option<f64>,
}

/// How to draw tokens. What is not given comes from the model's `generation_config.json`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Sampling {
    /// Longest answer in tokens [default: what the context leaves, at most 2,048]
    #[arg(long, value_name = "N", value_parser = count)]
    pub(crate) max_tokens: Option<u64>,
    /// 0 takes the most probable token [default: 1]
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f32>,
    /// Keep the smallest set of tokens with this probability [default: 1]
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Keep the K most probable tokens
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Keep tokens with this share of the largest probability
    #[arg(long, value_name = "P")]
    pub(crate) min_p: Option<f32>,
    /// The same seed draws the same tokens
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) seed: Option<i64>,
    /// End the text where this appears (repeatable)
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

/// How much the engine holds.
#[derive(Debug, Clone, Args)]
pub(crate) struct Capacity {
    /// Context limit in tokens [default: what the model has and memory holds]
    #[arg(long, value_name = "N|auto", allow_negative_numbers = true, value_parser = context)]
    pub(crate) max_model_len: Option<Context>,
    /// Sequences that run at a time [default: 64 on a CPU, 256 on a GPU]
    #[arg(long, value_name = "N", value_parser = count)]
    pub(crate) max_num_seqs: Option<u64>,
    /// Tokens per step [default: 512 on a CPU, 8192 on a GPU]. A CPU that serves takes fewer of prompts while answers are made
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) max_num_batched_tokens: Option<u64>,
    /// Share of a GPU's memory that may be in use with the key/value cache [default: all but half a GiB]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub(crate) gpu_memory_utilization: Option<f64>,
    /// Bytes of the key/value cache [default: a share of what is free]
    #[arg(long, value_name = "BYTES", value_parser = positive)]
    pub(crate) kv_cache_memory_bytes: Option<u64>,
    /// Requests do not share the computation of equal beginnings
    #[arg(long)]
    pub(crate) no_enable_prefix_caching: bool,
    /// They do, which is the default
    #[arg(long, hide = true, overrides_with = "no_enable_prefix_caching")]
    pub(crate) enable_prefix_caching: bool,
}

/// A number of tokens, or as many as fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Context {
    Auto,
    Tokens(usize),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nibble generate -p \"Once upon a time\" --max-tokens 50
  nibble generate openai/gpt-oss-20b --chat -p \"What is the capital of France?\"
  nibble generate MODEL --prompts questions.jsonl --chat --json")]
pub(crate) struct Generate {
    /// The model [default: the small built-in one]
    pub(crate) model: Option<String>,
    /// A prompt (repeatable)
    #[arg(long = "prompt", short = 'p', value_name = "TEXT")]
    pub(crate) prompt: Vec<String>,
    /// JSON lines of strings, {"prompt"}, {"messages"} or {"prompt_token_ids"}
    #[arg(long, value_name = "FILE")]
    pub(crate) prompts: Option<PathBuf>,
    /// Each prompt is a user message
    #[arg(long)]
    pub(crate) chat: bool,
    /// System message of every chat
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Developer message of every chat
    #[arg(long, value_name = "TEXT")]
    pub(crate) developer: Option<String>,
    /// How much to think
    #[arg(long, value_name = "low|medium|high", value_parser = ["low", "medium", "high"])]
    pub(crate) reasoning_effort: Option<String>,
    /// Answers per prompt
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) n: usize,
    /// Log-probabilities of each token and of the K best
    #[arg(long, value_name = "K")]
    pub(crate) logprobs: Option<usize>,
    /// Do not stop at the end of the turn
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    #[command(flatten)]
    pub(crate) sampling: Sampling,
    #[command(flatten)]
    pub(crate) capacity: Capacity,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nibble chat                                  the small built-in model
  nibble chat gpt-oss-20b-nvfp4 --reasoning-effort high
  echo \"What is 2 + 2?\" | nibble chat --temperature 0 --json")]
pub(crate) struct Chat {
    /// The model [default: the small built-in one]
    pub(crate) model: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// How much to think
    #[arg(long, value_name = "low|medium|high", value_parser = ["low", "medium", "high"])]
    pub(crate) reasoning_effort: Option<String>,
    #[command(flatten)]
    pub(crate) sampling: Sampling,
    #[command(flatten)]
    pub(crate) capacity: Capacity,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nibble serve                                             the small built-in model
  nibble serve openai/gpt-oss-20b --quantization nvfp4     cast without loss while loading
  nibble serve MODEL --host 0.0.0.0 --api-key \"$KEY\" --ssl-certfile cert.pem --ssl-keyfile key.pem
  nibble serve --config FILE.yaml                          any of these flags, without the dashes

vLLM's other flags are accepted where they are known to change nothing here; a line at the start lists them.")]
pub(crate) struct Serve {
    /// The model [default: the small built-in one]
    #[arg(value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// The same as MODEL
    #[arg(long = "model", value_name = "MODEL")]
    pub(crate) model_flag: Option<String>,
    /// A tokenizer.json, a folder with one, or a model on the hub that has one [default: the model's]
    #[arg(long, value_name = "FILE|DIR|NAME")]
    pub(crate) tokenizer: Option<String>,
    /// Branch, tag or commit of a tokenizer on the hub [default: main]
    #[arg(long, value_name = "REVISION", requires = "tokenizer")]
    pub(crate) tokenizer_revision: Option<String>,
    #[command(flatten)]
    pub(crate) hub: FromHub,
    /// Flags from a file, by their names; the command line wins
    #[arg(long, value_name = "FILE.yaml")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) network: Network,
    #[command(flatten)]
    pub(crate) access: AccessFlags,
    #[command(flatten)]
    pub(crate) answers: Answers,
    #[command(flatten)]
    pub(crate) limits: Limits,
    #[command(flatten)]
    pub(crate) logs: Logs,
    /// What answers: the model, or for tests of clients the tokens of a file
    #[arg(long, value_name = "auto|scripted:FILE", default_value = "auto")]
    pub(crate) engine: String,
    /// Seed of requests that bring none
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) scheduling: Scheduling,
    /// Engines with a copy of the model each, which share the requests. They divide the GPUs of --device, take those from the
    /// one that it names on, each as many as --tensor-parallel-size says, or divide the CPU's threads; what bounds an engine is
    /// for each of them
    #[arg(long, visible_alias = "dp", value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) data_parallel_size: u16,
    #[command(flatten)]
    pub(crate) capacity: Capacity,
    #[command(flatten)]
    pub(crate) run: Run,
    #[command(flatten)]
    pub(crate) foreign: Foreign,
}

/// Where and how the server listens.
#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
pub(crate) struct Network {
    /// Address to listen on. The variable counts if it is one of this machine
    #[arg(long, default_value = "127.0.0.1", env = "VLLM_HOST_IP")]
    pub(crate) host: String,
    /// Port to listen on; 0 takes a free one and prints it. The variable counts if it is no URI, as Kubernetes sets
    #[arg(long, default_value_t = 8000, env = "VLLM_PORT", overrides_with = "port")]
    pub(crate) port: u16,
    /// A socket in the file system to listen on instead
    #[arg(long, value_name = "PATH")]
    pub(crate) uds: Option<PathBuf>,
    /// Prefix of all paths that a proxy may leave in place
    #[arg(long, value_name = "/PREFIX", default_value = "", value_parser = root_path)]
    pub(crate) root_path: String,
    /// The header X-data-parallel-rank says which engine takes a request
    #[arg(long)]
    pub(crate) trust_routing_headers: bool,
    /// TLS: the certificate, then those that lead to its root, as PEM
    #[arg(long, value_name = "FILE", requires = "ssl_keyfile")]
    pub(crate) ssl_certfile: Option<PathBuf>,
    /// TLS: the certificate's private key, as PEM
    #[arg(long, value_name = "FILE", requires = "ssl_certfile")]
    pub(crate) ssl_keyfile: Option<PathBuf>,
    /// TLS: roots of clients' certificates, as PEM
    #[arg(long, value_name = "FILE", requires = "ssl_certfile")]
    pub(crate) ssl_ca_certs: Option<PathBuf>,
    /// TLS: clients show no certificate (0), may show one (1), must (2)
    #[arg(long, value_name = "0|1|2", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    pub(crate) ssl_cert_reqs: u8,
    /// TLS: read the files again when they change
    #[arg(long)]
    pub(crate) enable_ssl_refresh: bool,
    /// Origins whose pages may use the server, such as ["https://example.org"] or ["*"]
    #[arg(long, value_name = "JSON", default_value = "[]", value_parser = strings)]
    pub(crate) allowed_origins: Strings,
    /// Methods that such pages may use
    #[arg(long, value_name = "JSON", default_value = "[\"*\"]", value_parser = strings)]
    pub(crate) allowed_methods: Strings,
    /// Headers that such pages may send
    #[arg(long, value_name = "JSON", default_value = "[\"*\"]", value_parser = strings)]
    pub(crate) allowed_headers: Strings,
    /// Such pages may send cookies
    #[arg(long)]
    pub(crate) allow_credentials: bool,
}

/// Who may do what.
#[derive(Debug, Args)]
#[command(next_help_heading = "Access")]
pub(crate) struct AccessFlags {
    /// Keys that clients must send one of
    #[arg(long, value_name = "KEY", num_args = 1.., env = "VLLM_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Vec<String>,
    /// More of them, one per line
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Key for /abort_requests, /reset_prefix_cache, /server_info, /sleep, /start_profile and the like
    #[arg(long, value_name = "KEY", num_args = 1..)]
    pub(crate) admin_api_key: Vec<String>,
    /// Key for /metrics [default: none is asked for]
    #[arg(long, value_name = "KEY", num_args = 1..)]
    pub(crate) metrics_api_key: Vec<String>,
    /// What needs an admin's key is open to all clients
    #[arg(long)]
    pub(crate) dev_mode: bool,
    /// /sleep and /wake_up are there
    #[arg(long)]
    pub(crate) enable_sleep_mode: bool,
    /// No chat page at /
    #[arg(long)]
    pub(crate) disable_page: bool,
    /// No /docs and /openapi.json
    #[arg(long, alias = "disable-fastapi-docs")]
    pub(crate) disable_docs: bool,
    /// Nothing of what tools made for Ollama ask
    #[arg(long)]
    pub(crate) no_ollama_compat: bool,
    /// Requests per key and minute [default: no limit]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) rate_limit_requests: Option<u64>,
    /// Tokens per key and minute [default: no limit]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) rate_limit_tokens: Option<u64>,
    /// Keys share no cached prefixes, whose use can be told by the time of an answer
    #[arg(long)]
    pub(crate) isolate_prefix_cache_per_key: bool,
}

/// The largest `--max-n`.
pub(crate) const MOST_ANSWERS: u64 = 128;

/// What answers look like.
#[derive(Debug, Args)]
#[command(next_help_heading = "Answers")]
pub(crate) struct Answers {
    /// Names that requests may use [default: MODEL as typed]
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) served_model_name: Vec<String>,
    /// Owner in the list of models
    #[arg(long, value_name = "NAME", default_value = "vllm")]
    pub(crate) model_owner: String,
    /// Sampling defaults: `auto` from the model's generation_config.json, `vllm` without it, DIR from that folder's
    #[arg(long, value_name = "auto|vllm|DIR", default_value = "auto")]
    pub(crate) generation_config: String,
    /// Sampling defaults over those, such as {"temperature": 0.7}
    #[arg(long, value_name = "JSON", value_parser = sampling_defaults)]
    pub(crate) override_generation_config: Option<SamplingOverrides>,
    /// Most alternatives per token that a request may ask for; -1: the whole vocabulary, with --unsafe-unbounded-logprobs
    #[arg(long, value_name = "N", default_value_t = 20, allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..))]
    pub(crate) max_logprobs: i64,
    /// Allows --max-logprobs -1, by which one request may take gigabytes
    #[arg(long)]
    pub(crate) unsafe_unbounded_logprobs: bool,
    /// Most answers that a request may ask for
    #[arg(long, value_name = "N", default_value_t = MOST_ANSWERS as u8, value_parser = clap::value_parser!(u8).range(1..=MOST_ANSWERS as i64), env = "VLLM_MAX_N_SEQUENCES")]
    pub(crate) max_n: u8,
    /// Tokens per part of a stream
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) stream_interval: u16,
    /// Every part of every stream says how many tokens there are
    #[arg(long)]
    pub(crate) enable_force_include_usage: bool,
    /// Answers say how long they took
    #[arg(long)]
    pub(crate) enable_per_request_metrics: bool,
    /// What `system_fingerprint` says
    #[arg(long, value_name = "full|hash|custom|none", default_value = "full", value_parser = ["full", "hash", "custom", "none"])]
    pub(crate) fingerprint_mode: String,
    /// The custom one
    #[arg(long, value_name = "TEXT", required_if_eq("fingerprint_mode", "custom"))]
    pub(crate) fingerprint_value: Option<String>,
    /// Codes of errors: the status, as vLLM has it, or OpenAI's words
    #[arg(long, value_name = "vllm|openai", default_value = "vllm", value_parser = ["vllm", "openai"])]
    pub(crate) error_code_style: String,
    /// Responses kept for `previous_response_id`, `item_reference`, GET and `background` [default: none]
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) responses_store: usize,
    /// Date in the system message, as YYYY-MM-DD [default: today, UTC]
    #[arg(long, value_name = "DATE", env = "VLLM_SYSTEM_START_DATE", value_parser = date)]
    pub(crate) system_date: Option<String>,
    /// No date in the system message, whatever --system-date says, so that cached prefixes outlive midnight
    #[arg(long)]
    pub(crate) no_system_date: bool,
    /// Refuse `reasoning_effort` other than low, medium and high
    #[arg(long)]
    pub(crate) strict_reasoning_effort: bool,
    /// Do not tell the model of tools where `tool_choice` is none
    #[arg(long)]
    pub(crate) exclude_tools_when_tool_choice_none: bool,
    /// Constrain the arguments of tools with `strict` alone, or of all tools
    #[arg(long, value_name = "function|parameter", default_value = "function", value_parser = ["function", "parameter"])]
    pub(crate) tool_strict_level: String,
    /// What all JSON keeps to: {"disable_any_whitespace": true, "disable_additional_properties": true}, or one of them
    #[arg(long, value_name = "JSON", value_parser = structured_outputs)]
    pub(crate) structured_outputs_config: Option<StructuredOutputs>,
    /// Chats have log-probabilities of all tokens, or of the text of the final channel alone
    #[arg(long, value_name = "all|final", default_value = "all", value_parser = ["all", "final"])]
    pub(crate) logprobs_scope: String,
    /// Do not repeat `reasoning` as `reasoning_content`
    #[arg(long)]
    pub(crate) no_reasoning_content_alias: bool,
    /// Streams begin when a request is taken, not with its first token
    #[arg(long)]
    pub(crate) eager_stream_start: bool,
}

/// Where a model on the hub comes from, and what is different about it.
#[derive(Debug, Default, Args)]
pub(crate) struct FromHub {
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// The hub's cache [default: HF_HUB_CACHE, or `hub` in HF_HOME]
    #[arg(long, value_name = "DIR")]
    pub(crate) download_dir: Option<PathBuf>,
    /// The hub's token, which others on this machine can see on a command line [default: HF_TOKEN]
    #[arg(long, value_name = "TOKEN")]
    pub(crate) hf_token: Option<String>,
    /// Fields that take the place of those in config.json, such as {"max_position_embeddings": 4096}
    #[arg(long, value_name = "JSON", value_parser = fields)]
    pub(crate) hf_overrides: Option<Fields>,
}

/// How requests share the engine, and what is drawn.
#[derive(Debug, Args)]
#[command(next_help_heading = "Scheduling")]
pub(crate) struct Scheduling {
    /// Order of service: of arrival; by the requests' `priority`; or each API key in its turn, so that one with
    /// many requests does not keep the others waiting
    #[arg(long, value_name = "fcfs|priority|round-robin", default_value = "fcfs", value_parser = ["fcfs", "priority", "round-robin"])]
    pub(crate) scheduling_policy: String,
    /// Tokens of one prompt per step, at most; 0: as many as a step has
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) long_prefill_token_threshold: usize,
    /// Guessing of tokens, such as {"method": "ngram", "num_speculative_tokens": 8} [default: that, where it saves time]
    #[arg(long, value_name = "JSON", value_parser = speculation)]
    pub(crate) speculative_config: Option<Guessing>,
    /// The same: only its method
    #[arg(long, value_name = "ngram|none", value_parser = ["ngram", "none"], conflicts_with = "speculative_config")]
    pub(crate) spec_method: Option<String>,
    /// The same: only the number of tokens
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "speculative_config")]
    pub(crate) spec_tokens: Option<u64>,
    /// Log-probabilities of the model, or of what is drawn from
    #[arg(long, value_name = "MODE", default_value = "raw_logprobs",
        value_parser = ["raw_logprobs", "processed_logprobs"])]
    pub(crate) logprobs_mode: String,
    /// The model may leave the chat format
    #[arg(long)]
    pub(crate) no_harmony_guard: bool,
    /// Reasoning leaves the last 64 tokens to the answer
    #[arg(long)]
    pub(crate) never_empty_content: bool,
}

/// Whether and how tokens are guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Guessing(pub(crate) Option<Speculation>);

/// What bounds clients and requests.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct Limits {
    /// Requests that may wait or run
    #[arg(long, value_name = "N", value_parser = count)]
    pub(crate) max_num_queued_reqs: Option<u64>,
    /// Prompt tokens that may wait [default: eight times what the key/value cache holds]
    #[arg(long, value_name = "N", value_parser = count)]
    pub(crate) max_num_queued_tokens: Option<u64>,
    /// Connections at a time; others wait
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    pub(crate) max_connections: usize,
    /// Largest body of a request in bytes
    #[arg(long, value_name = "BYTES", default_value = "32M", value_parser = count, env = "VLLM_HTTP_MAX_REQUEST_BODY_SIZE")]
    pub(crate) max_request_body_size: u64,
    /// Seconds between an answer and the next request of a connection
    #[arg(long, value_name = "SECONDS", default_value_t = 5, env = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE")]
    pub(crate) timeout_keep_alive: u64,
    /// Seconds of silence on a stream before a comment; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 15)]
    pub(crate) sse_keep_alive_interval: u64,
    /// Seconds in which a client may read nothing of what there is for it
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub(crate) client_stall_timeout: u64,
    /// Seconds that an answer may take [default: no limit]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) request_timeout: Option<u64>,
    /// Seconds of a step after which /health says that the device hangs
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) health_stall_timeout: u64,
    /// Seconds to load the model in [default: no limit]
    #[arg(long, value_name = "SECONDS", env = "VLLM_ENGINE_READY_TIMEOUT_S")]
    pub(crate) ready_timeout: Option<u64>,
    /// Seconds to finish running requests on SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) shutdown_timeout: u64,
}

/// What is written down.
#[derive(Debug, Args)]
#[command(next_help_heading = "Logs and metrics")]
pub(crate) struct Logs {
    /// Least important lines that are written [default: what RUST_LOG says, or info]
    #[arg(long, value_name = "LEVEL", env = "VLLM_LOGGING_LEVEL", ignore_case = true,
        value_parser = ["trace", "debug", "info", "warning", "warn", "error", "critical", "off"])]
    pub(crate) log_level: Option<String>,
    /// Lines for people, or JSON
    #[arg(long, value_name = "text|json", default_value = "text", value_parser = ["text", "json"])]
    pub(crate) log_format: String,
    /// No line about the engine every ten seconds
    #[arg(long)]
    pub(crate) disable_log_stats: bool,
    /// Log prompts and parameters
    #[arg(long)]
    pub(crate) enable_log_requests: bool,
    /// Log answers
    #[arg(long)]
    pub(crate) enable_log_outputs: bool,
    /// Most characters of a prompt or an answer in the log
    #[arg(long, value_name = "N")]
    pub(crate) max_log_len: Option<usize>,
    /// No metrics under the names of earlier versions
    #[arg(long)]
    pub(crate) no_legacy_metrics: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nibble eval MODEL perplexity --text book.txt --windows 16
  nibble eval MODEL divergence --reference openai/gpt-oss-20b --conversations chats.jsonl")]
pub(crate) struct Eval {
    /// The model
    pub(crate) model: String,
    #[command(subcommand)]
    pub(crate) measure: Measure,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Measure {
    /// Mean negative log-likelihood per token
    Perplexity(EvalOptions),
    /// Kullback-Leibler divergence from a reference
    Divergence {
        /// The model to compare with
        #[arg(long, value_name = "MODEL")]
        reference: String,
        #[command(flatten)]
        options: EvalOptions,
    },
}

#[derive(Debug, Args)]
pub(crate) struct EvalOptions {
    #[command(flatten)]
    pub(crate) input: EvalInput,
    /// Tokens per window of a text
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..=131_072))]
    pub(crate) context: u32,
    /// At most this many windows
    #[arg(long, value_name = "N", value_parser = whole(1..=u64::MAX))]
    pub(crate) windows: Option<usize>,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct EvalInput {
    /// Plain text, cut into windows
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// JSON lines of {"messages"}, rendered as training examples
    #[arg(long, value_name = "FILE")]
    pub(crate) conversations: Option<PathBuf>,
    /// JSON lines of arrays of token ids
    #[arg(long, value_name = "FILE")]
    pub(crate) ids: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nibble bench gpt-oss-20b-nvfp4
  nibble bench --synthetic gpt-oss-20b:4 -p 128 -n 32 -r 3      four layers with made-up weights
  nibble bench serve http://127.0.0.1:8000 --concurrency 64     a load for a server")]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Bench {
    #[command(subcommand)]
    pub(crate) target: Option<BenchTarget>,
    /// The model
    #[arg(required_unless_present = "synthetic", conflicts_with = "synthetic")]
    pub(crate) model: Option<String>,
    /// Made-up weights of a shape: gpt-oss-20b or gpt-oss-120b, with :N for N layers
    #[arg(long, value_name = "SHAPE")]
    pub(crate) synthetic: Option<String>,
    /// Format of the made-up experts
    #[arg(long, value_enum, default_value = "modelopt", requires = "synthetic")]
    pub(crate) format: BenchFormat,
    /// What is in four bits of the made-up weights
    #[arg(long, value_enum, default_value = "experts", requires = "synthetic")]
    pub(crate) recipe: Recipe,
    /// Write the made-up weights as a checkpoint instead of running them
    #[arg(long, value_name = "DIR", requires = "synthetic")]
    pub(crate) out: Option<PathBuf>,
    /// Prompt sizes
    #[arg(
        short = 'p',
        long = "prompt-sizes",
        value_delimiter = ',',
        value_name = "N,…",
        default_value = "128", value_parser = whole(1..=LONGEST))]
    pub(crate) prompts: Vec<usize>,
    /// Tokens to decode
    #[arg(short = 'n', long = "decode", value_name = "N", default_value_t = 32,
        value_parser = whole(1..=LONGEST))]
    pub(crate) decode: usize,
    /// Positions already in the cache
    #[arg(short = 'd', long = "depths", value_delimiter = ',', value_name = "N,…", default_value = "0",
        value_parser = whole(0..=LONGEST))]
    pub(crate) depths: Vec<usize>,
    /// Batch sizes
    #[arg(short = 'b', long = "batches", value_delimiter = ',', value_name = "N,…", default_value = "1",
        value_parser = whole(1..=65_536))]
    pub(crate) batches: Vec<usize>,
    /// Repetitions
    #[arg(short = 'r', long = "repetitions", value_name = "N", default_value_t = 3,
        value_parser = whole(1..=1_000_000))]
    pub(crate) repetitions: usize,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchTarget {
    /// Load a server that speaks OpenAI's API
    Serve(BenchServe),
}

#[derive(Debug, Args)]
pub(crate) struct BenchServe {
    /// Where the server is, such as http://127.0.0.1:8000
    pub(crate) url: String,
    /// The model to ask for [default: the first that the server has]
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Key to send
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Requests to send
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = whole(1..=1_000_000))]
    pub(crate) num_prompts: usize,
    /// Requests at a time
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = whole(1..=65_536))]
    pub(crate) concurrency: usize,
    /// Requests per second, at random times [default: as fast as they are answered]
    #[arg(long, value_name = "R", value_parser = rate)]
    pub(crate) request_rate: Option<f64>,
    /// Tokens per prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = whole(1..=LONGEST))]
    pub(crate) input_len: usize,
    /// Tokens per answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = whole(1..=LONGEST))]
    pub(crate) output_len: usize,
    /// Tokens with which all prompts begin
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole(0..=LONGEST))]
    pub(crate) shared_prefix_len: usize,
    /// Sampling temperature
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    pub(crate) temperature: f32,
    /// Seed of prompts and arrivals
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchFormat {
    Mxfp4,
    Modelopt,
    Bf16,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Tokens {
    /// Text to ids
    Encode {
        /// The text itself
        #[arg(long, conflicts_with = "file")]
        text: Option<String>,
        /// A file, or - for standard input
        #[arg(required_unless_present = "text")]
        file: Option<PathBuf>,
        /// Take the tokenizer of this model [default: o200k_harmony]
        #[arg(long, value_name = "MODEL")]
        model: Option<String>,
        /// One JSON string per line in, one document per line out
        #[arg(long, conflicts_with = "text")]
        lines: bool,
        /// Special tokens written in the text become control tokens
        #[arg(long)]
        allow_special: bool,
    },
    /// Ids to text
    Decode {
        /// Token ids; with --lines a file or - instead
        #[arg(value_name = "ID")]
        ids: Vec<String>,
        /// Take the tokenizer of this model [default: o200k_harmony]
        #[arg(long, value_name = "MODEL")]
        model: Option<String>,
        /// One JSON array of ids per line in, one document per line out
        #[arg(long)]
        lines: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Harmony {
    /// A chat request or Harmony messages to a prompt
    Render {
        /// A JSON document, or - for standard input
        file: PathBuf,
        /// Take the tokenizer of this model [default: o200k_harmony]
        #[arg(long, value_name = "MODEL")]
        model: Option<String>,
        /// One document per line in, one per line out
        #[arg(long)]
        lines: bool,
    },
    /// Generated ids to messages
    Parse {
        /// Ids, or one file or - with a JSON array
        #[arg(value_name = "ID|FILE")]
        input: Vec<String>,
        /// Take the tokenizer of this model [default: o200k_harmony]
        #[arg(long, value_name = "MODEL")]
        model: Option<String>,
        /// One {"ids", "tools"} per line in, one document per line out
        #[arg(long)]
        lines: bool,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nibble logits MODEL --ids 1,2,3 --out logits.safetensors
  nibble logits MODEL --ids 1,2,3 --layer 0 --out logits.safetensors    the first layer's output too")]
pub(crate) struct Logits {
    /// The model
    pub(crate) model: String,
    /// Token ids, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "ID,…", required = true)]
    pub(crate) ids: Vec<u32>,
    /// The file to write: `logits` [positions, vocabulary] in F32
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) out: PathBuf,
    /// Also `hidden`, the residual stream after this layer
    #[arg(long, value_name = "N")]
    pub(crate) layer: Option<usize>,
    #[command(flatten)]
    pub(crate) run: Run,
}

/// A count with vLLM's suffixes: lower case for powers of 1000, upper case for powers of 1024.
fn count(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, last)) if last.is_ascii_alphabetic() => (&text[..at], last),
        _ => (text, '1'),
    };
    let unit: u64 = match unit {
        '1' => 1,
        'k' => 1000,
        'm' => 1_000_000,
        'g' => 1_000_000_000,
        't' => 1_000_000_000_000,
        'K' => 1 << 10,
        'M' => 1 << 20,
        'G' => 1 << 30,
        'T' => 1 << 40,
        other => {
            return Err(format!("expected one of k, K, m, M, g, G, t, T after the number, found {other}"));
        }
    };
    let number: f64 = digits.parse().map_err(|_| format!("expected a number, found {digits:?}"))?;
    let value = number * unit as f64;
    if value < 0.0 || value.fract() != 0.0 || value > 2f64.powi(53) {
        return Err("expected a whole number of at least 0".to_owned());
    }
    Ok(value as u64)
}

/// More tokens than any model's context has.
const LONGEST: u64 = 1 << 20;

fn whole(range: RangeInclusive<u64>) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(range)
}

/// Requests per second, so many at least that the last of all comes in time.
fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate >= 1e-6);
    rate.ok_or_else(|| "expected a number of at least 0.000001".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "expected a number above 0, at most 1".to_owned())
}

/// A number of bytes, also with the units of other programs: `GB` is decimal, `GiB` binary.
fn size(text: &str) -> Result<u64, String> {
    match (text.strip_suffix("iB"), text.strip_suffix('B')) {
        (Some(binary), _) => positive(&binary.to_uppercase()),
        (None, Some(decimal)) => positive(&decimal.to_lowercase()),
        (None, None) => positive(text),
    }
}

fn positive(text: &str) -> Result<u64, String> {
    match count(text)? {
        0 => Err("expected at least 1".to_owned()),
        n => Ok(n),
    }
}

fn speculation(text: &str) -> Result<Guessing, String> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        method: Option<String>,
        num_speculative_tokens: Option<usize>,
        prompt_lookup_max: Option<usize>,
        prompt_lookup_min: Option<usize>,
        adaptive: Option<bool>,
    }
    let config: Config = serde_json::from_str(text).map_err(|e| {
        format!("expected a JSON object of method, num_speculative_tokens, prompt_lookup_max, prompt_lookup_min, found: {e}")
    })?;
    match config.method.as_deref().unwrap_or("ngram") {
        "none" => return Ok(Guessing(None)),
        "ngram" => {}
        other => return Err(format!("expected the method ngram or none, found {other:?}")),
    }
    let default = Speculation::default();
    let least = config.prompt_lookup_min.unwrap_or(default.lookup_min);
    Ok(Guessing(Some(Speculation {
        tokens: config.num_speculative_tokens.unwrap_or(default.tokens),
        lookup_min: least,
        lookup_max: config.prompt_lookup_max.unwrap_or(default.lookup_max.max(least)),
        adaptive: config.adaptive.unwrap_or(default.adaptive),
    })))
}

fn root_path(text: &str) -> Result<String, String> {
    let path = text.trim_end_matches('/');
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-._~".contains(&b);
    match path.is_empty() || (path.starts_with('/') && path.bytes().all(plain)) {
        true => Ok(path.to_owned()),
        false => Err("expected a path such as /nibble".to_owned()),
    }
}

/// A day that there is.
fn date(text: &str) -> Result<String, String> {
    let number = |part: &str, digits| {
        let plain = part.len() == digits && part.bytes().all(|b| b.is_ascii_digit());
        part.parse::<u32>().ok().filter(|_| plain)
    };
    let days = |year: u32, month: u32| match month {
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => 0,
    };
    if let [year, month, day] = text.split('-').collect::<Vec<_>>()[..]
        && let (Some(year), Some(month), Some(day)) = (number(year, 4), number(month, 2), number(day, 2))
        && (1..=days(year, month)).contains(&day)
    {
        return Ok(text.to_owned());
    }
    Err("expected a day as YYYY-MM-DD".to_owned())
}

/// A list that is one value on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Strings(pub(crate) Vec<String>);

fn strings(text: &str) -> Result<Strings, String> {
    serde_json::from_str(text).map(Strings).map_err(|_| "expected a JSON array of strings".to_owned())
}

/// Sampling defaults over those of the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SamplingOverrides {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<u32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
}

fn sampling_defaults(text: &str) -> Result<SamplingOverrides, String> {
    serde_json::from_str(text).map_err(|e| {
        let names = "temperature, top_p, top_k, min_p, repetition_penalty";
        format!("expected a JSON object of {names}, found: {e}")
    })
}

/// Fields of an object.
#[derive(Debug, Clone)]
pub(crate) struct Fields(pub(crate) serde_json::Map<String, serde_json::Value>);

fn fields(text: &str) -> Result<Fields, String> {
    serde_json::from_str(text).map(Fields).map_err(|e| format!("expected a JSON object, found: {e}"))
}

/// What vLLM says of all JSON; which compiler it takes changes nothing here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
pub(crate) struct StructuredOutputs {
    #[serde(default)]
    pub(crate) disable_any_whitespace: bool,
    #[serde(default)]
    pub(crate) disable_additional_properties: bool,
}

fn structured_outputs(text: &str) -> Result<StructuredOutputs, String> {
    serde_json::from_str(text).map_err(|e| {
        format!(
            "expected a JSON object with disable_any_whitespace and disable_additional_properties, found: {e}"
        )
    })
}

fn context(text: &str) -> Result<Context, String> {
    if text == "auto" || text == "-1" {
        return Ok(Context::Auto);
    }
    match count(text)? {
        0 => Err("expected at least 1".to_owned()),
        n => Ok(Context::Tokens(n as usize)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn values_are_what_they_should_be() {
        for (text, value) in [("32k", 32_000), ("32K", 32_768), ("1.5k", 1500), ("7", 7), ("2G", 2 << 30)] {
            assert_eq!(count(text), Ok(value), "{text}");
        }
        for text in ["", "k", "-1", "1.5", "3x", "nan", "1e400"] {
            assert!(count(text).is_err(), "{text}");
        }
        for text in ["2026-11-28", "2024-02-29", "2000-02-29", "0001-12-31"] {
            assert_eq!(date(text).as_deref(), Ok(text));
        }
        for text in [
            "",
            "x",
            "2026-13-45",
            "2026-00-10",
            "2026-04-31",
            "2026-02-29",
            "1900-02-29",
            "2026-1-1",
            "2026-01-01 ",
            "2026/01/01",
            "+026-01-01",
            "２０２6-1",
            "2026-01-0١",
        ] {
            assert!(date(text).is_err(), "{text}");
        }
        for (text, value) in [("5G", 5 << 30), ("5GiB", 5 << 30), ("5GB", 5_000_000_000), ("5MB", 5_000_000)]
        {
            assert_eq!(size(text), Ok(value), "{text}");
        }
        assert_eq!(context("auto"), Ok(Context::Auto));
        assert_eq!(context("-1"), Ok(Context::Auto));
        assert!(context("0").is_err());
    }
}
