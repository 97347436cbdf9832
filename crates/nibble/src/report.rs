//! `--report`: measures what was written, and puts the facts of the run together.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use checkpoint::{Checkpoint, MatrixKind, Weights, Written, matrices, vectors};
use evaluate::report::{
    AlgorithmResult, Calibration, CalibrationFile, Part, Quality, Report, STARVED_TOKENS, Tensor, WorstBlock,
};
use gptoss::Backend;
use quantize::{Method, Options, Quantized};

use crate::args::{self, Common, Quantize};
use crate::calibration::Data;
use crate::commands::quantize as command;
use crate::failure::{Failure, Result};
use crate::gpus::gpus;
use crate::loaded::{Loaded, backend};
use crate::memory;
use crate::model::{Model, as_run, is_on_hub, threads};
use crate::modelopt::flag;
use crate::ui::{Ui, bytes, out, quoted};

/// What is to be told of the source's files.
pub(crate) struct SourceFacts {
    layout: &'static str,
    license: Option<String>,
    base_model: Option<String>,
    bytes: Vec<u64>,
}

impl SourceFacts {
    pub(crate) fn of(model: &Model) -> SourceFacts {
        let card = checkpoint::read_file(&model.checkpoint.directory().join("README.md"), 1 << 20);
        let card = String::from_utf8(card.ok().flatten().unwrap_or_default()).unwrap_or_default();
        SourceFacts {
            layout: model.checkpoint.layout().name(),
            license: front_matter(&card, "license"),
            base_model: if is_on_hub(&model.name) {
                Some(model.name.clone())
            } else {
                front_matter(&card, "base_model")
            },
            bytes: parts(&model.checkpoint).map(|(_, _, bytes)| bytes).collect(),
        }
    }
}

/// Says so if the machine's memory is too little for measuring: source and result are in it at once.
pub(crate) fn check_memory(
    source: &dyn Weights,
    result: &dyn Weights,
    common: &Common,
    ui: Ui,
) -> Result<()> {
    let (needed, available) = (loaded_bytes(source) + loaded_bytes(result), memory::available());
    if let Some(available) = available.filter(|&available| needed > available as u64)
        && gpus(&common.device)?.is_none()
    {
        ui.note(format_args!(
            "note: --report measures source and result in memory at once, about {}, and {} are available: the model may be \
             written and the report fail",
            bytes(needed),
            bytes(available as u64)
        ));
    }
    Ok(())
}

/// About what weights take when they are loaded.
fn loaded_bytes(weights: &dyn Weights) -> u64 {
    let config = weights.config();
    let matrices = matrices(config).map(|id| {
        let (count, rows, cols) = id.kind.shape(config);
        weights.format(id).bytes(count * rows * cols) as u64
    });
    matrices.sum()
}

/// A finished run.
pub(crate) struct Run<'a> {
    pub(crate) args: &'a Quantize,
    pub(crate) common: &'a Common,
    pub(crate) source: Arc<dyn Weights>,
    pub(crate) facts: SourceFacts,
    pub(crate) data: &'a Data,
    pub(crate) view: &'a Quantized,
    /// As they were written.
    pub(crate) scales_per: args::ScalesPer,
    pub(crate) started: Instant,
    pub(crate) source_bytes: u64,
    pub(crate) bits: f64,
}

/// Measures the checkpoint that was written and writes the report to `folder`.
pub(crate) fn write(run: &Run<'_>, written: &Written, folder: &Path, ui: Ui) -> Result<()> {
    let args = run.args;
    let (seconds, peak_memory_bytes) = (run.started.elapsed().as_secs_f64(), command::peak_memory());
    let coverage: Vec<Vec<u64>> = run.view.facts().iter().map(|facts| facts.coverage.clone()).collect();
    let max = max_rule(run)?;
    let packs = matches!(command::options(args), Options::Nvfp4 { .. });
    let model = Checkpoint::open(&args.out)?;
    let sizes = parts(&model)
        .zip(&run.facts.bytes)
        .map(|((name, parameters, bytes), &source_bytes)| Part {
            name: name.to_owned(),
            parameters,
            source_bytes,
            bytes,
        })
        .collect();
    let Measured { quality, algorithms, note } = measure(run, model, max.as_ref(), ui)?;
    let report = Report {
        run: evaluate::report::Run {
            model: public(&args.source),
            source_layout: run.facts.layout.to_owned(),
            source_license: run.facts.license.clone(),
            base_model: run.facts.base_model.clone(),
            layout: command::layout(args.format).name().to_owned(),
            recipe: packs.then(|| flag(&args.recipe)),
            algorithm: packs.then(|| command::algorithm(args, run.view)),
            reason: command::reason(args, run.view).map(str::to_owned),
            activations: flag(&args.activations),
            kv_cache: flag(&args.kv_cache),
            scales_per: packs.then(|| flag(&run.scales_per)),
            command: command_line(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            seconds,
            continued: run.view.continued() || written.resumed_bytes > 0,
            peak_memory_bytes,
            threads: threads(run.common),
            bytes: written.tensor_bytes,
            source_bytes: run.source_bytes,
            bits_per_weight: run.bits,
        },
        calibration: (!coverage.is_empty()).then(|| Calibration {
            files: run
                .data
                .sets
                .iter()
                .map(|set| CalibrationFile {
                    name: set.name.clone(),
                    windows: set.windows.len(),
                    tokens: set.tokens() as u64,
                })
                .collect(),
            tokens: run.data.sets.iter().map(|set| set.tokens() as u64).sum(),
            window: run.data.sets.iter().flat_map(|set| &set.windows).map(Vec::len).max().unwrap_or(0),
            all_experts: args.all_experts,
            seed: args.seed,
            starved: coverage.iter().flatten().filter(|&&tokens| tokens < STARVED_TOKENS).count(),
            coverage,
        }),
        sizes,
        tensors: tensors(run, max.as_ref()),
        quality,
        quality_note: note,
        algorithms,
    };
    evaluate::report::write(&report, folder).map_err(|error| Failure::machine(error.to_string()))?;
    if !ui.json {
        out!("report: {}", folder.join("index.html").display())?;
    }
    Ok(())
}

/// The same source by the max rule, for comparison; none if the run itself went by it, or lost nothing.
fn max_rule(run: &Run<'_>) -> Result<Option<Arc<Quantized>>> {
    let Options::Nvfp4 { recipe, embedding, scales_per, experts_in_bf16, .. } = command::options(run.args)
    else {
        return Ok(None);
    };
    let lossy = |t: &quantize::TensorReport| {
        t.method != Method::Max && t.totals.is_none_or(|totals| totals.changed > 0)
    };
    if !run.view.report().iter().any(lossy) {
        return Ok(None);
    }
    let options = Options::Nvfp4 {
        recipe,
        algorithm: quantize::Algorithm::Max,
        embedding,
        scales_per,
        activations: false,
        kv_scales: false,
        experts_in_bf16,
    };
    let max = Quantized::new(Arc::clone(&run.source), options, threads(run.common), &mut |_, _| {})?;
    // Its errors are known once every matrix has been read.
    for id in matrices(max.config()) {
        for expert in 0..id.kind.shape(max.config()).0 {
            max.matrix(id, expert)?;
            max.release(id, expert);
        }
    }
    Ok(Some(Arc::new(max)))
}

#[derive(Default)]
struct Measured {
    quality: Vec<Quality>,
    algorithms: Vec<AlgorithmResult>,
    /// What the figures include and leave out.
    note: Option<String>,
}

/// Divergence of the model as it is made to run from the source, on the windows held out of the calibration files; on the first of
/// them that of its weights alone and of the max rule's.
fn measure(run: &Run<'_>, model: Checkpoint, max: Option<&Arc<Quantized>>, ui: Ui) -> Result<Measured> {
    let (mut quality, mut algorithms) = (Vec::new(), Vec::new());
    let sets: Vec<_> = run.data.sets.iter().filter(|set| !set.held_out.is_empty()).collect();
    let Some(first) = sets.first() else { return Ok(Measured::default()) };
    let mut reference = backend(Arc::clone(&run.source), &args::Run::exact(), run.common, ui)?;
    let asked_for = AskedFor::by(&model);
    let made_to = asked_for.run();
    let model = as_run(model, &made_to);
    let mut loaded = backend(Arc::clone(&model), &made_to, run.common, ui)?;
    let beside = asked_for.beside(&made_to, &loaded);
    for set in &sets {
        let found = divergence(&mut loaded, &mut reference, &set.held_out, ui)?;
        quality.push(Quality {
            data: set.name.clone(),
            tokens: found.tokens as u64,
            nll_source: found.nll_reference,
            nll: found.nll,
            kl_mean: found.kl_mean,
            kl_p99: found.kl_p99,
            top1_agreement: found.top1_agreement,
        });
    }
    drop(loaded);
    let mut note = beside.note();
    if let Some(max) = max {
        let mut of_weights = |weights: Arc<dyn Weights>| {
            let mut model = backend(weights, &args::Run::exact(), run.common, ui)?;
            divergence(&mut model, &mut reference, &first.held_out, ui)
        };
        let (own_kl, own_nll) = if beside.included.is_empty() {
            (quality[0].kl_mean, quality[0].nll)
        } else {
            note = note.map(|note| note + "; those of the algorithms are of the rounded weights alone");
            let own = of_weights(model)?;
            (own.kl_mean, own.nll)
        };
        let found = of_weights(Arc::<Quantized>::clone(max))?;
        let chosen = command::algorithm(run.args, run.view);
        algorithms.push(AlgorithmResult { algorithm: chosen, kl_mean: own_kl, nll: own_nll });
        let max = Method::Max.name().to_owned();
        algorithms.push(AlgorithmResult { algorithm: max, kl_mean: found.kl_mean, nll: found.nll });
    }
    Ok(Measured { quality, algorithms, note })
}

/// What a model's files ask for beside its weights.
#[derive(Clone, Copy)]
pub(crate) struct AskedFor {
    input_scales: bool,
    fp8_cache: bool,
}

impl AskedFor {
    pub(crate) fn by(model: &Checkpoint) -> AskedFor {
        let packed = model.packed();
        AskedFor {
            input_scales: matrices(model.config()).any(|id| packed.input_scale(id).is_some()),
            fp8_cache: model.kv_cache() == Some(checkpoint::KvCache::Fp8),
        }
    }

    /// A run that rounds all of it.
    fn run(self) -> args::Run {
        let mut run = args::Run::exact();
        if self.input_scales {
            run.activations = args::ActivationBits::Nvfp4;
        }
        if self.fp8_cache {
            run.kv_cache_dtype = args::CacheType::Fp8;
        }
        run
    }

    /// What of it this run, for which the model was loaded, does.
    pub(crate) fn beside(self, run: &args::Run, loaded: &Loaded) -> Beside {
        let fp8 = run.kv_cache_dtype == args::CacheType::Fp8;
        let mut beside = Beside { included: Vec::new(), left_out: Vec::new() };
        for (asked_for, included, what, flag) in [
            (self.input_scales, loaded.rounds_inputs(), "the activations in NVFP4", "--activations nvfp4"),
            (self.fp8_cache, fp8, "the KV cache in FP8", "--kv-cache-dtype fp8"),
        ] {
            if asked_for && included {
                beside.included.push(what);
            } else if asked_for {
                beside.left_out.push((what, flag));
            }
        }
        beside
    }
}

/// What a run rounds of what the model's files ask for beside its weights, and what it leaves out.
pub(crate) struct Beside {
    included: Vec<&'static str>,
    /// With the flag that would include it.
    left_out: Vec<(&'static str, &'static str)>,
}

impl Beside {
    /// What the figures include and leave out.
    fn note(&self) -> Option<String> {
        let included = self.included.join(" and ");
        if self.left_out.is_empty() {
            let as_made =
                || format!("the figures are those of the model as it is made to run, with {included}");
            return (!self.included.is_empty()).then(as_made);
        }
        let weights = match &included[..] {
            "" => "the rounded weights alone".to_owned(),
            included => format!("the rounded weights with {included}"),
        };
        let left_out: Vec<_> = self.left_out.iter().map(|&(what, _)| what).collect();
        let left_out = left_out.join(" and ");
        Some(format!("the figures are those of {weights}, without {left_out} that the model is made for"))
    }

    /// The same for somebody who can choose, if something is left out.
    pub(crate) fn hint(&self) -> Option<String> {
        let flags: Vec<_> = self.left_out.iter().map(|&(_, flag)| flag).collect();
        self.note().filter(|_| !flags.is_empty()).map(|note| format!("{note}: {}", flags.join(" ")))
    }
}

fn divergence(
    model: &mut dyn Backend,
    reference: &mut dyn Backend,
    windows: &[Vec<u32>],
    ui: Ui,
) -> Result<evaluate::Divergence> {
    let mut bar = ui.progress("Measuring", windows.len() as u64);
    Ok(evaluate::divergence(model, reference, windows, &mut |done| bar.set(done as u64))?)
}

fn tensors(run: &Run<'_>, max: Option<&Arc<Quantized>>) -> Vec<Tensor> {
    let max = max.map(|max| max.report()).unwrap_or_default();
    let changed = run.view.report().into_iter().filter(|t| t.method != Method::Keep);
    changed
        .map(|t| {
            let stack = t.id.kind.is_expert();
            let in_layer = !matches!(t.id.kind, MatrixKind::Embedding | MatrixKind::Unembedding);
            Tensor {
                name: t.id.name(),
                layer: in_layer.then_some(t.id.layer),
                kind: kind(t.id.kind).to_owned(),
                format: t.format.name().to_owned(),
                algorithm: t.method.name().to_owned(),
                mse: t.totals.map_or(f64::NAN, |totals| totals.mse()),
                sqnr_db: t.totals.and_then(|totals| command::finite(totals.sqnr_db())),
                max_error: t.totals.map_or(f64::NAN, |totals| f64::from(totals.max_error)),
                max_rule_mse: max
                    .iter()
                    .find(|m| m.id == t.id)
                    .and_then(|m| m.totals.filter(|totals| totals.values > 0))
                    .map(|totals| totals.mse()),
                worst_block: t.totals.and_then(|totals| totals.worst).map(|worst| WorstBlock {
                    expert: stack.then_some(worst.expert),
                    row: worst.row,
                    block: worst.block,
                    relative_error: worst.relative_error,
                }),
            }
        })
        .collect()
}

/// Parts of a model: name, parameters, bytes in its files.
fn parts(model: &Checkpoint) -> impl Iterator<Item = (&'static str, u64, u64)> {
    const NAMES: [&str; 6] =
        ["experts", "attention", "router", "embedding", "output layer", "norms, biases and sinks"];
    let mut sums = [(0, 0); 6];
    let config = model.config();
    for id in matrices(config) {
        let part = match id.kind {
            MatrixKind::GateUp | MatrixKind::Down => 0,
            MatrixKind::Query | MatrixKind::Key | MatrixKind::Value | MatrixKind::Output => 1,
            MatrixKind::Router => 2,
            MatrixKind::Embedding => 3,
            MatrixKind::Unembedding => 4,
        };
        let (count, rows, cols) = id.kind.shape(config);
        sums[part].0 += count as u64 * rows as u64 * cols as u64;
        sums[part].1 += model.matrix_bytes(id);
    }
    for id in vectors(config) {
        let (count, len) = id.kind.shape(config);
        sums[5].0 += count as u64 * len as u64;
        sums[5].1 += model.vector_bytes(id);
    }
    NAMES.into_iter().zip(sums).map(|(name, (parameters, bytes))| (name, parameters, bytes))
}

fn kind(kind: MatrixKind) -> &'static str {
    match kind {
        MatrixKind::Query => "query",
        MatrixKind::Key => "key",
        MatrixKind::Value => "value",
        MatrixKind::Output => "output",
        MatrixKind::Router => "router",
        MatrixKind::GateUp => "gate_up",
        MatrixKind::Down => "down",
        MatrixKind::Embedding => "embedding",
        MatrixKind::Unembedding => "output layer",
    }
}

/// The value of a plain `key: value` line in the front matter of a model card.
fn front_matter(card: &str, key: &str) -> Option<String> {
    let body = card.strip_prefix("---\n")?.split("\n---").next()?;
    let value = body.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let value = value.trim().trim_matches(['"', '\'']);
    (!value.is_empty()).then(|| value.to_owned())
}

/// The command as typed, with the program's bare name.
fn command_line() -> String {
    let typed = std::env::args_os().skip(1).map(|word| {
        let word = word.to_string_lossy();
        quoted(&match word.split_once('=').filter(|_| word.starts_with("--")) {
            Some((flag, value)) => format!("{flag}={}", public(value)),
            None => public(&word),
        })
    });
    std::iter::once("nibble".to_owned()).chain(typed).collect::<Vec<_>>().join(" ")
}

/// A word of the command for a page that others may read: of a path on this machine the last component.
fn public(word: &str) -> String {
    match Path::new(word).file_name() {
        Some(name) if !is_on_hub(word) => name.to_string_lossy().into_owned(),
        _ => word.to_owned(),
    }
}
