//! From a MODEL on the command line to weights and a tokenizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use checkpoint::hub::{self, Files, Hub};
use checkpoint::{Checkpoint, Format, Layout, Weights, matrices};
use harmony::Harmony;
use quantize::{Algorithm, Options, Quantized, Recipe, ScalesPer};
use serde_json::{Map, Value};
use tokenizer::Tokenizer;

use crate::args::{ActivationBits, Common, FromHub, Run};
use crate::failure::{Failure, Result};
use crate::interrupt;
use crate::ui::Ui;

/// The name of the model inside the binary.
pub(crate) const BUILT_IN: &str = "tiny-gpt-oss";

/// Safetensors data are borrowed in place only if they are aligned.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static BUILT_IN_WEIGHTS: &Aligned<[u8]> =
    &Aligned(*include_bytes!("../../../models/tiny-gpt-oss/model.safetensors"));
const BUILT_IN_CONFIG: &str = include_str!("../../../models/tiny-gpt-oss/config.json");
const BUILT_IN_GENERATION: &str = include_str!("../../../models/tiny-gpt-oss/generation_config.json");
pub(crate) const BUILT_IN_TOKENIZER: &str = include_str!("../../../models/tiny-gpt-oss/tokenizer.json");

/// A model whose files have been checked.
pub(crate) struct Model {
    /// As typed.
    pub(crate) name: String,
    pub(crate) checkpoint: Checkpoint,
    built_in: bool,
    /// A tokenizer.json, or a folder with one, in place of its own.
    other_tokenizer: Option<PathBuf>,
}

impl Model {
    /// Opens a folder, fetches a hub name, or takes the built-in model.
    pub(crate) fn open(name: Option<&str>, ui: Ui) -> Result<Model> {
        Model::open_from(name, &FromHub::default(), ui)
    }

    /// The same, where what is on the hub comes from there.
    pub(crate) fn open_from(name: Option<&str>, from: &FromHub, ui: Ui) -> Result<Model> {
        let revision = from.revision.as_deref();
        let fields = from.hf_overrides.as_ref().map_or_else(Map::new, |fields| fields.0.clone());
        let Some(name) = name.or_else(|| revision.map(|_| BUILT_IN)) else {
            return Model::built_in_with(&fields);
        };
        let path = Path::new(name);
        let folder = if let Some(revision) = revision.filter(|_| !is_on_hub(name)) {
            return Err(Failure::input(format!(
                "--revision {revision}: expected a hub name as MODEL, found {name}"
            )));
        } else if path.exists() {
            path.to_owned()
        } else if hub::is_hub_name(name) {
            fetch(name, from.revision.as_deref(), Files::Model, from, ui)?
        } else {
            return Err(Failure::input(format!(
                "{name}: expected a model folder or a hub name, found no such folder"
            ))
            .hint("a hub name has the form owner/name, such as openai/gpt-oss-20b"));
        };
        let checkpoint = Checkpoint::open_with(&folder, &fields)?;
        checkpoint.warnings().iter().for_each(|warning| ui.note(format_args!("note: {warning}")));
        Ok(Model { name: name.to_owned(), checkpoint, built_in: false, other_tokenizer: None })
    }

    /// Takes the tokenizer of a file, a folder or a model on the hub in place of its own.
    pub(crate) fn use_tokenizer(
        &mut self,
        name: &str,
        revision: Option<&str>,
        from: &FromHub,
        ui: Ui,
    ) -> Result<()> {
        let on_hub = is_on_hub(name);
        if let Some(revision) = revision.filter(|_| !on_hub) {
            return Err(Failure::input(format!(
                "--tokenizer-revision {revision}: expected a hub name as --tokenizer, found {name}"
            )));
        }
        self.other_tokenizer = Some(if on_hub {
            fetch(name, revision, Files::Tokenizer, from, ui)?
        } else {
            PathBuf::from(name)
        });
        Ok(())
    }

    pub(crate) fn built_in() -> Result<Model> {
        Model::built_in_with(&Map::new())
    }

    fn built_in_with(fields: &Map<String, Value>) -> Result<Model> {
        let mut config: Map<String, Value> =
            serde_json::from_str(BUILT_IN_CONFIG).expect("the built-in configuration is JSON");
        config.extend(fields.clone());
        let config = Value::Object(config).to_string();
        let checkpoint = Checkpoint::from_bytes(&config, BUILT_IN_GENERATION, &BUILT_IN_WEIGHTS.0)?;
        Ok(Model { name: BUILT_IN.to_owned(), checkpoint, built_in: true, other_tokenizer: None })
    }

    /// The model's own tokenizer, if no other is asked for; `o200k_harmony` if it has none but the right vocabulary.
    pub(crate) fn tokenizer(&self) -> Result<Arc<Tokenizer>> {
        if self.built_in && self.other_tokenizer.is_none() {
            return Ok(Arc::new(Tokenizer::from_json(BUILT_IN_TOKENIZER.as_bytes())?));
        }
        let source = self.other_tokenizer.as_deref().unwrap_or(self.checkpoint.directory());
        let path = if source.is_file() { source.to_owned() } else { source.join("tokenizer.json") };
        let vocabulary = self.checkpoint.config().vocab_size;
        let tokenizer = if path.exists() {
            Arc::new(Tokenizer::from_file(&path)?)
        } else {
            let built_in = Tokenizer::o200k_harmony();
            if self.other_tokenizer.is_some() || vocabulary != built_in.vocab_size() {
                return Err(Failure::input(format!(
                    "{}: expected a tokenizer.json for a vocabulary of {vocabulary} tokens, found none",
                    source.display()
                )));
            }
            built_in
        };
        if tokenizer.vocab_size() > vocabulary {
            return Err(Failure::input(format!(
                "{}: expected ids below {vocabulary}, the model's vocabulary, found {}",
                path.display(),
                tokenizer.vocab_size() - 1
            )));
        }
        Ok(tokenizer)
    }

    pub(crate) fn harmony(&self) -> Result<Arc<Harmony>> {
        Ok(Arc::new(Harmony::new(self.tokenizer()?)?))
    }

    /// The weights in the format that `--quantization` asks for.
    pub(crate) fn weights(self, run: &Run, common: &Common, ui: Ui) -> Result<Arc<dyn Weights>> {
        let layout = self.checkpoint.layout();
        let matches = match run.quantization.as_str() {
            "auto" => true,
            "none" => matches!(layout, Layout::Bf16 | Layout::FakeBf16),
            "mxfp4" => matches!(layout, Layout::Mxfp4 | Layout::Original),
            "modelopt" | "modelopt_fp4" => layout == Layout::ModelOpt,
            "compressed-tensors" => layout == Layout::CompressedTensors,
            "nvfp4" => return self.nvfp4(run, common, ui),
            other => {
                return Err(Failure::input(format!(
                    "--quantization: expected auto, nvfp4, none, mxfp4, modelopt, modelopt_fp4 or \
                     compressed-tensors, found {other}"
                )));
            }
        };
        if !matches {
            return Err(Failure::input(format!(
                "--quantization: expected {}, which is what the files of {} hold, found {}",
                layout.name(),
                self.name,
                run.quantization
            ))
            .hint("auto takes what the files hold"));
        }
        Ok(as_run(self.checkpoint, run))
    }

    fn nvfp4(self, run: &Run, common: &Common, ui: Ui) -> Result<Arc<dyn Weights>> {
        let weights: Arc<dyn Weights> = match self.checkpoint.layout() {
            Layout::FakeBf16 => Arc::new(self.checkpoint.into_packed()),
            _ => Arc::new(self.checkpoint),
        };
        let ids: Vec<_> = matrices(weights.config()).collect();
        if ids.iter().all(|&id| !id.kind.is_expert() || weights.format(id) == Format::Nvfp4) {
            return Ok(weights);
        }
        // What is rounded here has no scales for its inputs.
        if run.activations == ActivationBits::Nvfp4 && ids.iter().any(|&id| weights.input_scale(id).is_some())
        {
            return Err(Failure::input(format!(
                "{}: --quantization nvfp4 with --activations nvfp4: expected experts in NVFP4, found others",
                self.name
            ))
            .hint("--quantization auto runs the experts as they are"));
        }
        let options = Options::Nvfp4 {
            recipe: Recipe::Experts,
            // Plain BF16 is rounded by `max`, which is the quickest.
            algorithm: Algorithm::Cast,
            embedding: false,
            scales_per: ScalesPer::Stack,
            activations: false,
            kv_scales: false,
            experts_in_bf16: false,
        };
        let mut bar = ui.progress("Quantizing", 1);
        let view = Quantized::new(weights, options, threads(common), &mut |done, total| {
            bar.set_total(total as u64);
            bar.set(done as u64);
        })?;
        let changed = view.cast_counts().changed_values;
        if changed > 0 {
            return Err(Failure::input(format!(
                "{}: the cast to NVFP4 would change {changed} values",
                self.name
            ))
            .hint("run it as it is (--quantization auto), or see nibble quantize --allow-loss"));
        }
        Ok(Arc::new(view))
    }
}

/// The weights as a run takes them from the files. The scales of inputs belong to four bits: a run that rounds inputs takes
/// fake-quantized weights as the codes that they stand for.
pub(crate) fn as_run(checkpoint: Checkpoint, run: &Run) -> Arc<dyn Weights> {
    match checkpoint.layout() {
        Layout::FakeBf16 if run.activations == ActivationBits::Nvfp4 => Arc::new(checkpoint.into_packed()),
        _ => Arc::new(checkpoint),
    }
}

/// Whether a name means a model on the hub: what is on this machine goes first.
pub(crate) fn is_on_hub(name: &str) -> bool {
    hub::is_hub_name(name) && !Path::new(name).exists()
}

pub(crate) fn threads(common: &Common) -> usize {
    common.threads.map_or_else(cpu::physical_cores, usize::from)
}

fn fetch(name: &str, revision: Option<&str>, files: Files, from: &FromHub, ui: Ui) -> Result<PathBuf> {
    let mut hub = Hub::from_env();
    hub.cache = from.download_dir.clone().unwrap_or(hub.cache);
    hub.token = from.hf_token.clone().or(hub.token);
    let mut bar = ui.progress("Fetching", 1);
    let mut report = |progress: hub::Progress<'_>| {
        bar.set_total(progress.total);
        bar.set(progress.done);
    };
    interrupt::surviving_broken_pipe(|| hub.fetch(name, revision, files, &mut report))
        .map_err(|error| hub_failure(name, &error))
}

fn hub_failure(name: &str, error: &hub::Error) -> Failure {
    let message = error.to_string();
    // What was meant for a path may be mistyped.
    let why = || format!("looked for on the hub, since there is no {name} here");
    match error {
        hub::Error::Io { .. } => Failure::machine(message),
        hub::Error::Network { .. } => Failure::machine(message).hint(why()),
        hub::Error::NotFound { .. } | hub::Error::NotCached { .. } => Failure::input(message).hint(why()),
        hub::Error::Refused { status: 401 | 403, .. } => {
            Failure::input(message).hint("set HF_TOKEN, and accept the model's licence on its page")
        }
        hub::Error::Incomplete { found: "an adapter", .. } => {
            Failure::input(message).hint("merge it into the model that it was trained on first")
        }
        _ => Failure::input(message),
    }
}
