//! From a MODEL to a running engine, for the commands that generate.

use std::sync::Arc;

use checkpoint::GenerationConfig;
use engine::{Engine, EngineOptions, SamplingParams, Scripted, Speculation};
use gptoss::Backend;
use harmony::Harmony;
use tokenizer::Tokenizer;

use crate::args::{Capacity, Common, Context, Run, Sampling};
use crate::failure::{Failure, Result};
use crate::loaded::{Loaded, watched_backend};
use crate::model::Model;
use crate::ui::Ui;

/// The longest answer where nothing was asked for.
const MAX_TOKENS: usize = 2048;

/// A model at work, and how it samples by default.
pub(crate) struct Running {
    pub(crate) engine: Engine,
    pub(crate) generation: GenerationConfig,
}

/// What an engine over a model has unless flags say otherwise.
pub(crate) fn base() -> EngineOptions {
    EngineOptions {
        speculation: Some(Speculation::default()),
        harmony_guard: true,
        ..EngineOptions::default()
    }
}

/// `base` holds what is not a matter of the model or of `capacity`; `watch` is told how much is loaded, of how much.
pub(crate) fn start(
    model: Model,
    run: &Run,
    capacity: &Capacity,
    base: &EngineOptions,
    common: &Common,
    ui: Ui,
    watch: &mut dyn FnMut(usize, usize),
) -> Result<Running> {
    let generation = model.checkpoint.generation_config().clone();
    let place = Places { common, of: 1, these: std::slice::from_ref(common) };
    let mut engines = start_all(model, run, capacity, base, &place, ui, watch)?;
    Ok(Running { engine: engines.pop().expect("an engine in each place"), generation })
}

/// Where engines over one model run.
pub(crate) struct Places<'a> {
    /// As the command line says, for what all of them share.
    pub(crate) common: &'a Common,
    /// How many there are in all.
    pub(crate) of: usize,
    /// Those to start.
    pub(crate) these: &'a [Common],
}

/// The same, an engine in each of several places. All get caches of one size, so that what one takes another takes, too.
pub(crate) fn start_all(
    model: Model,
    run: &Run,
    capacity: &Capacity,
    base: &EngineOptions,
    places: &Places<'_>,
    ui: Ui,
    watch: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Engine>> {
    let harmony = model.harmony()?;
    let generation = model.checkpoint.generation_config().clone();
    let weights = model.weights(run, places.common, ui)?;
    // One after the other: no two are packed at once.
    let mut backends = Vec::with_capacity(places.these.len());
    for (loaded, place) in places.these.iter().enumerate() {
        let mut watch = |done, total| watch(loaded * total + done, places.these.len() * total);
        backends.push(watched_backend(Arc::clone(&weights), run, place, ui, &mut watch)?);
    }
    let mut cache_bytes = None;
    for backend in &backends {
        let bytes = backend.cache_memory(capacity.gpu_memory_utilization, places.of)?;
        cache_bytes = [cache_bytes, bytes].into_iter().flatten().min();
    }
    let start = |backend: Loaded| {
        let base = EngineOptions {
            max_num_seqs: backend.step_sequences(),
            max_num_batched_tokens: backend.step_tokens(),
            kv_cache_bytes: cache_bytes.unwrap_or(base.kv_cache_bytes),
            ..base.clone()
        };
        let mut options = options(&backend, capacity, &generation, &base)?;
        if run.batch_invariant && !backend.answers_are_prompts() {
            options.prefix_caching = false;
        }
        Engine::start(backend.at_work(run), Arc::clone(&harmony), options).map_err(|error| {
            match (error, cache_bytes) {
                (engine::Error::Backend(error @ gptoss::Error::Memory { .. }), Some(room)) => {
                    Failure::machine(format!("{error}, found room for about {room}"))
                        .hint(format!("--kv-cache-memory-bytes {room}"))
                }
                (error, _) => error.into(),
            }
        })
    };
    backends.into_iter().map(start).collect()
}

/// An engine over a loaded model.
pub(crate) fn engine(
    backend: Box<dyn Backend>,
    harmony: Arc<Harmony>,
    options: EngineOptions,
) -> Result<Engine> {
    Ok(Engine::start(backend, harmony, options)?)
}

/// An engine that says what a file tells it to, for tests of clients.
pub(crate) fn scripted(file: &str, capacity: &Capacity, base: &EngineOptions) -> Result<Engine> {
    let script = std::fs::read_to_string(file)
        .map_err(|e| Failure::input(format!("{file}: expected a file of scripts, found: {e}")))?;
    let backend = Scripted::from_json(Scripted::gpt_oss(), &script)
        .map_err(|e| Failure::input(format!("{file}: {e}")))?;
    let harmony = Harmony::new(Tokenizer::o200k_harmony()).map_err(|e| Failure::input(e.to_string()))?;
    // Scripts are played as they are written.
    let base = EngineOptions { speculation: None, harmony_guard: false, even_steps: false, ..base.clone() };
    let options = options(&backend, capacity, &GenerationConfig::default(), &base)?;
    engine(Box::new(backend), Arc::new(harmony), options)
}

fn options(
    backend: &dyn Backend,
    capacity: &Capacity,
    generation: &GenerationConfig,
    base: &EngineOptions,
) -> Result<EngineOptions> {
    let mut options = EngineOptions { eos_ids: generation.eos_token_ids.clone(), ..base.clone() };
    if let Some(Context::Tokens(tokens)) = capacity.max_model_len {
        let limit = backend.config().max_context;
        if tokens > limit {
            return Err(Failure::input(format!(
                "--max-model-len: expected at most {limit}, the model's context, found {tokens}"
            )));
        }
        options.max_model_len = Some(tokens);
    }
    if let Some(count) = capacity.max_num_seqs {
        options.max_num_seqs = count as usize;
        options.max_num_batched_tokens = options.max_num_batched_tokens.max(count as usize);
    }
    if let Some(count) = capacity.max_num_batched_tokens {
        options.max_num_batched_tokens = count as usize;
    }
    if let Some(bytes) = capacity.kv_cache_memory_bytes {
        options.kv_cache_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    }
    options.prefix_caching &= !capacity.no_enable_prefix_caching;
    Ok(options)
}

/// The flags over the model's defaults.
pub(crate) fn sampling(flags: &Sampling, defaults: &GenerationConfig) -> SamplingParams {
    let greedy = defaults.do_sample == Some(false);
    SamplingParams {
        temperature: flags.temperature.or(defaults.temperature).unwrap_or(if greedy { 0.0 } else { 1.0 }),
        top_p: flags.top_p.or(defaults.top_p).unwrap_or(1.0),
        top_k: flags.top_k.or(defaults.top_k.map(|k| k as usize)).unwrap_or(0),
        min_p: flags.min_p.or(defaults.min_p).unwrap_or(0.0),
        repetition_penalty: defaults.repetition_penalty.unwrap_or(1.0),
        seed: flags.seed,
        max_tokens: Some(flags.max_tokens.map_or(MAX_TOKENS, |n| n as usize)),
        stop: flags.stop.clone(),
        ..SamplingParams::default()
    }
}

impl From<engine::Error> for Failure {
    fn from(error: engine::Error) -> Failure {
        match error {
            engine::Error::Backend(error) => error.into(),
            engine::Error::KvCache { largest, .. } => {
                let message = error.to_string();
                let failure = Failure::machine(message);
                // Less than a token is no context.
                if largest == 0 { failure } else { failure.hint(format!("--max-model-len {largest} fits")) }
            }
            engine::Error::Thread(_) => Failure::machine(error.to_string()),
            _ => Failure::input(error.to_string()),
        }
    }
}

/// Weights that are damaged are the user's; all else that ends a request of the user's own is the machine's.
impl From<engine::Failure> for Failure {
    fn from(failure: engine::Failure) -> Failure {
        match failure {
            engine::Failure::Corrupted => Failure::input(failure.to_string()),
            _ => Failure::machine(failure.to_string()),
        }
    }
}

impl From<engine::SubmitError> for Failure {
    fn from(error: engine::SubmitError) -> Failure {
        Failure::input(error.to_string())
    }
}
