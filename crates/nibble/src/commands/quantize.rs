//! `nibble quantize`: writes a quantized checkpoint.

use std::hash::{Hash, Hasher};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use checkpoint::{Checkpoint, Layout, Target, Weights, Written};
use quantize::{Method, Options, Quantized, ScalesPer, TensorReport};
use serde_json::{Value, json};

use crate::args::{self, Common, Embedding, Format, Quantize};
use crate::failure::{Failure, Result};
use crate::model::{Model, threads};
use crate::modelopt::flag;
use crate::ui::{Ui, bold, bytes, dim, green, grouped, out, quoted};
use crate::{calibration, interrupt, modelopt, report};

pub(crate) fn run(mut args: Quantize, common: &Common, ui: Ui) -> Result<()> {
    let started = Instant::now();
    modelopt::expand(&mut args, ui)?;
    let args = &args;
    check(args)?;
    let model = Model::open(Some(&args.source), ui)?;
    keeps_inputs(args, model.checkpoint.directory())?;
    let source_bytes = model.checkpoint.tensor_bytes();
    let parameters = model.checkpoint.parameters();
    let layout = layout(args.format);
    let mut target = Target {
        shard_bytes: args.max_shard_size,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        scales_per_expert: args.scales_per == args::ScalesPer::Expert
            || keeps_scales_per_expert(&model.checkpoint, args),
        overwrite: args.overwrite,
        ..Target::like(&model.checkpoint, layout)?
    };
    if args.kv_cache == args::KvCache::Fp8 {
        target.kv_cache = Some(checkpoint::KvCache::Fp8);
    }
    if args.format == Format::CompressedTensors {
        ui.note("note: compressed-tensors has no names for fused experts: they are written in BF16");
    }

    left_out(&model.checkpoint, args, ui);
    if !target.files.iter().any(|(name, _)| name == "tokenizer.json") {
        ui.note("note: the source has no tokenizer.json: other programs cannot load the output without one");
    }
    let calibrated = options(args).needs_calibration(&model.checkpoint.packed());
    if !calibrated && !args.calibration.is_empty() {
        let left = if args.report.is_some() {
            "the report measures on --calibration"
        } else {
            "--calibration is not used"
        };
        ui.note(format_args!("note: the algorithm or the source asks for no calibration: {left}"));
    }
    // Files that were named are checked even so: who mistypes a name should learn of it.
    let data = if calibrated || args.report.is_some() || !args.calibration.is_empty() {
        let wanted = calibration::Wanted {
            tokens: args.calibration_tokens as usize,
            seed: args.seed,
            measured: args.report.is_some(),
        };
        calibration::read(&model, &args.calibration, &wanted, ui)?
    } else {
        calibration::Data::default()
    };
    let facts = report::SourceFacts::of(&model);

    let mut bar = ui.progress("Looking", 1);
    let source = source(model, args.format);
    let mut view =
        Quantized::new(Arc::clone(&source), options(args), threads(common), &mut |done, total| {
            bar.set_total(total as u64);
            bar.set(done as u64);
        })?;
    drop(bar);
    let cast = view.cast_counts();
    if cast.changed_values > 0 && !args.allow_loss {
        let lost = cast.blocks - cast.lossless_blocks;
        let message = format!(
            "{}: the cast would change {} values in {} of {} blocks, and nothing was written",
            args.source,
            grouped(cast.changed_values),
            grouped(lost),
            grouped(cast.blocks)
        );
        if ui.json {
            ui.document(
                &json!({"out": null, "blocks": cast.blocks, "lossless_blocks": cast.lossless_blocks,
                "changed_values": cast.changed_values}),
            )?;
        }
        let failure = Failure::new(crate::failure::Status::No, message);
        return Err(failure.hint("--allow-loss casts all the same; --scales-per expert may lose less"));
    }

    let calibrates = view.needs_calibration();
    let windows = if calibrates { data.windows() } else { Vec::new() };
    target.fingerprint = fingerprint(&view, args, &windows);
    let scratch = checkpoint::beside(&args.out, CALIBRATION)?;
    let unfinished = |error| unfinished(error, &scratch);
    checkpoint::may_begin(&view, &target, &args.out).map_err(unfinished)?;
    if let Some(folder) = &args.report {
        std::fs::create_dir_all(folder).map_err(|error| Failure::io(folder, &error))?;
        report::check_memory(&*source, &view, common, ui)?;
    }
    interrupt::handle_gracefully();
    if calibrates {
        let calibration = quantize::Calibration {
            windows,
            all_experts: args.all_experts,
            scratch: scratch.clone(),
            fingerprint: target.fingerprint.clone(),
            overwrite: args.overwrite,
        };
        let mut bar = ui.progress("Calibrating", 1);
        let note = "interrupted: stops at the next expert, and a layer that is not finished is calibrated anew; a second time \
                    stops at once";
        let calibrated = interrupt::noting(note, || {
            view.calibrate(&calibration, &mut |done, total| {
                bar.set_total(total as u64);
                bar.set(done as u64);
                if interrupt::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
        });
        drop(bar);
        calibrated.map_err(|error| match error {
            quantize::Error::Interrupted => Failure::new(
                crate::failure::Status::Interrupted,
                format!("interrupted; the layers calibrated so far are in {}", scratch.display()),
            )
            .hint("the same command continues"),
            quantize::Error::Checkpoint(error) => unfinished(error),
            error => error.into(),
        })?;
    }

    let mut bar = ui.progress("Writing", 1);
    let written = checkpoint::write(&view, &target, &args.out, &mut |progress| {
        bar.set_total(progress.total_bytes);
        bar.set(progress.done_bytes);
        if interrupt::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    drop(bar);
    let written = written.map_err(unfinished)?;
    if calibrates {
        checkpoint::remove_unfinished(&scratch)?;
    }
    // The model is complete: an interrupt that came too late for it is one of the report.
    interrupt::end_at_once();
    let bits = written.tensor_bytes as f64 * 8.0 / parameters as f64;
    if ui.json {
        ui.document(&document(args, &view, &written, bits, source_bytes, started))?;
    } else {
        table(args, &view)?;
        out!(
            "{}: {} ({bits:.3} bits per weight), from {}, in {:.1} s",
            bold(&args.out.display().to_string()),
            bytes(written.tensor_bytes),
            bytes(source_bytes),
            started.elapsed().as_secs_f64()
        )?;
        // Where values were changed it could only say so.
        if changed(&view)
            .all(|t| t.totals.is_some_and(|totals| totals.changed == 0) && t.cast.changed_values == 0)
        {
            let (source, written) = (quoted(&args.source), quoted(&args.out.to_string_lossy()));
            out!("{}", dim(&format!("nibble verify {source} {written}")))?;
        }
    }
    if let Some(folder) = &args.report {
        if interrupt::interrupted() {
            return Err(Failure::new(crate::failure::Status::Interrupted, "interrupted before the report"));
        }
        let data = &data;
        let scales_per =
            if target.scales_per_expert { args::ScalesPer::Expert } else { args::ScalesPer::Stack };
        let view = &view;
        let run =
            report::Run { args, common, source, facts, data, view, scales_per, started, source_bytes, bits };
        report::write(&run, &written, folder, ui)?;
    }
    Ok(())
}

/// Refuses combinations that have no meaning, before anything is read.
fn check(args: &Quantize) -> Result<()> {
    if args.format == Format::CompressedTensors && args.recipe == args::Recipe::Experts {
        return Err(Failure::input(
            "--format: compressed-tensors has no names for packed experts, expected --recipe linear or all, found experts",
        ));
    }
    if args.algorithm == args::Algorithm::Awq && args.recipe == args::Recipe::Experts {
        return Err(Failure::input(
            "--algorithm: awq scales what stands behind a norm of its own, the attention projections; expected --recipe linear \
             or all, found experts",
        ));
    }
    if matches!(args.format, Format::Mxfp4 | Format::Bf16) {
        let scales = [
            (args.activations == args::Activations::Nvfp4, "--activations nvfp4"),
            (args.kv_cache == args::KvCache::Fp8, "--kv-cache fp8"),
        ];
        if let Some((_, name)) = scales.iter().find(|(given, _)| *given) {
            let format = flag(&args.format);
            return Err(Failure::input(format!("{name}: the layout {format} has no place for its scales")));
        }
    }
    let whole = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if let Some(report) = args.report.as_deref().filter(|report| whole(report).starts_with(whole(&args.out)))
    {
        return Err(Failure::input(format!(
            "--report: expected a folder outside of --out, which is replaced as a whole, found {}",
            report.display()
        )));
    }
    if let Some(path) = args.report.as_deref().and_then(evaluate::report::in_the_way) {
        return Err(Failure::input(format!(
            "--report: {}: expected nothing there, or the file of an earlier report, found something else",
            path.display()
        )));
    }
    checkpoint::may_write(&args.out, args.overwrite).map_err(|error| match &error {
        checkpoint::Error::Exists { .. } => {
            let scratch = checkpoint::beside(&args.out, CALIBRATION).ok().filter(|scratch| scratch.is_dir());
            let left = scratch.map_or_else(String::new, |scratch| {
                format!("; {}, which a calibration left, is not needed for it", scratch.display())
            });
            Failure::from(error).hint(format!("--overwrite replaces it{left}"))
        }
        // Beside the output, in it or above it.
        checkpoint::Error::File { path, .. } if *path != args.out => {
            Failure::from(error).hint("move it elsewhere first")
        }
        _ => error.into(),
    })
}

/// Behind the name of the output: where a calibration keeps what it has.
const CALIBRATION: &str = ".calibration";

/// Refuses to replace a folder with an input in it, were it a link that leads there: the input would be gone.
fn keeps_inputs(args: &Quantize, source: &Path) -> Result<()> {
    let Ok(out) = args.out.canonicalize() else { return Ok(()) };
    let leads = |path: &Path| path.canonicalize().is_ok_and(|path| path.starts_with(&out));
    let files = std::fs::read_dir(source).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut inputs = [source.to_owned()].into_iter().chain(files).chain(args.calibration.iter().cloned());
    match inputs.find(|path| leads(path)) {
        Some(path) => Err(Failure::input(format!(
            "--out {}: expected a folder without the source and calibration files, since it is to be replaced, found {} there",
            args.out.display(),
            path.display()
        ))),
        None => Ok(()),
    }
}

/// An error of calibrating or writing, which may have met the unfinished work of another command, or damaged work in `scratch`.
fn unfinished(error: checkpoint::Error, scratch: &Path) -> Failure {
    use std::io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    match &error {
        checkpoint::Error::OtherWork { .. } => {
            Failure::from(error).hint("--overwrite drops it and begins anew")
        }
        checkpoint::Error::Io { path, source }
            if path.starts_with(scratch)
                && matches!(source.kind(), InvalidData | NotFound | UnexpectedEof) =>
        {
            let damaged = format!(
                "without {} the same command calibrates from the beginning",
                quoted(&scratch.to_string_lossy())
            );
            Failure::from(error).hint(damaged)
        }
        _ => error.into(),
    }
}

/// Says which of the source's static scales the output will not have.
fn left_out(source: &Checkpoint, args: &Quantize, ui: Ui) {
    let packed = source.packed();
    let inputs = checkpoint::matrices(source.config()).any(|id| packed.input_scale(id).is_some());
    let cache = (0..source.config().layer_kinds.len()).any(|layer| packed.kv_scales(layer).is_some());
    let no_place = matches!(args.format, Format::Mxfp4 | Format::Bf16);
    let format = flag(&args.format);
    if no_place && (inputs || cache) {
        ui.note(format_args!(
            "note: the layout {format} has no place for the source's static scales of inputs or of the cache: they are left out"
        ));
    } else if cache && source.kv_cache().is_none() && args.kv_cache != args::KvCache::Fp8 {
        ui.note(
            "note: the source's configuration names no format of the cache: the static scales for it are left out (--kv-cache fp8 \
             keeps them)",
        );
    }
    let nameless =
        args.format == Format::CompressedTensors && source.kv_cache() == Some(checkpoint::KvCache::Nvfp4);
    if nameless && args.kv_cache != args::KvCache::Fp8 {
        ui.note("note: the layout compressed-tensors has no name for a cache in NVFP4: it and its static scales are left out");
    }
    if !no_place && inputs && args.activations != args::Activations::Nvfp4 {
        ui.note("note: the source is W4A4: its input scales are left out (--activations nvfp4 keeps them)");
    }
}

/// Whether a stack that stays as it is has more than one global scale. All algorithms but `max` keep what is NVFP4.
fn keeps_scales_per_expert(source: &Checkpoint, args: &Quantize) -> bool {
    let several = |id| source.global_scales(id).windows(2).any(|pair| pair[0] != pair[1]);
    args.algorithm != args::Algorithm::Max && checkpoint::matrices(source.config()).any(several)
}

/// Fake-quantized weights are taken as the codes that they stand for, unless they are to be plain BF16 again.
fn source(model: Model, format: Format) -> Arc<dyn Weights> {
    match model.checkpoint.layout() {
        Layout::FakeBf16 if format != Format::Bf16 => Arc::new(model.checkpoint.into_packed()),
        _ => Arc::new(model.checkpoint),
    }
}

pub(crate) fn options(args: &Quantize) -> Options {
    match args.format {
        Format::Mxfp4 => Options::Mxfp4,
        Format::Bf16 => Options::Bf16,
        Format::Modelopt | Format::CompressedTensors | Format::FakeBf16 => Options::Nvfp4 {
            recipe: recipe(args.recipe),
            algorithm: match args.algorithm {
                args::Algorithm::Auto => quantize::Algorithm::Auto,
                args::Algorithm::Cast => quantize::Algorithm::Cast,
                args::Algorithm::Max => quantize::Algorithm::Max,
                args::Algorithm::Mse => quantize::Algorithm::Mse,
                args::Algorithm::FourOverSix => quantize::Algorithm::FourOverSix,
                args::Algorithm::LocalHessian => quantize::Algorithm::LocalHessian,
                args::Algorithm::Awq => quantize::Algorithm::Awq,
                args::Algorithm::Gptq => quantize::Algorithm::Gptq,
                args::Algorithm::Refine => quantize::Algorithm::Refine,
            },
            embedding: args.embedding == Embedding::Nvfp4,
            scales_per: match args.scales_per {
                args::ScalesPer::Stack => ScalesPer::Stack,
                args::ScalesPer::Expert => ScalesPer::Expert,
            },
            activations: args.activations == args::Activations::Nvfp4,
            kv_scales: args.kv_cache == args::KvCache::Fp8,
            experts_in_bf16: args.format == Format::CompressedTensors,
        },
    }
}

pub(crate) fn recipe(recipe: args::Recipe) -> quantize::Recipe {
    match recipe {
        args::Recipe::Experts => quantize::Recipe::Experts,
        args::Recipe::Linear => quantize::Recipe::Linear,
        args::Recipe::All => quantize::Recipe::All,
    }
}

pub(crate) fn layout(format: Format) -> Layout {
    match format {
        Format::Modelopt => Layout::ModelOpt,
        Format::CompressedTensors => Layout::CompressedTensors,
        Format::FakeBf16 => Layout::FakeBf16,
        Format::Mxfp4 => Layout::Mxfp4,
        Format::Bf16 => Layout::Bf16,
    }
}

/// Stands for everything that the result depends on: only the same command continues unfinished work.
fn fingerprint(view: &Quantized, args: &Quantize, windows: &[Vec<u32>]) -> String {
    // Of the source's files, its configuration and the options.
    let weights = view.identity();
    format!("{weights:?} {} {:x} {}", args.all_experts, digest(windows), env!("CARGO_PKG_VERSION"))
}

/// Tells calibration data apart.
fn digest(windows: &[Vec<u32>]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    windows.hash(&mut hasher);
    hasher.finish()
}

/// The result for programs.
fn document(
    args: &Quantize,
    view: &Quantized,
    written: &Written,
    bits: f64,
    source_bytes: u64,
    started: Instant,
) -> Value {
    let cast = view.cast_counts();
    let rows: Vec<Value> = changed(view)
        .map(|t| {
            json!({"name": t.id.name(), "format": t.format, "algorithm": t.method,
                "mse": t.totals.map(|totals| totals.mse()), "max_error": t.totals.map(|totals| totals.max_error),
                "sqnr_db": t.totals.and_then(|totals| finite(totals.sqnr_db()))})
        })
        .collect();
    let mut document = json!({
        "out": args.out.display().to_string(), "format": layout(args.format).name(), "recipe": flag(&args.recipe),
        "algorithm": flag(&args.algorithm), "bytes": written.tensor_bytes, "source_bytes": source_bytes,
        "bits_per_weight": bits, "blocks": cast.blocks, "lossless_blocks": cast.lossless_blocks,
        "changed_values": cast.changed_values, "tensors": rows, "seconds": started.elapsed().as_secs_f64(),
        "peak_memory_bytes": peak_memory(),
    });
    if !view.facts().is_empty() {
        let coverage: Vec<_> = view.facts().iter().map(|facts| facts.coverage.clone()).collect();
        document["expert_coverage"] = json!(coverage);
    }
    document
}

/// What was done to each matrix, for people.
fn table(args: &Quantize, view: &Quantized) -> Result<()> {
    for t in changed(view).filter(|t| t.method != Method::Cast || t.cast.changed_values > 0) {
        let method = t.method.name();
        let quality = match t.totals {
            None => "not measured: an earlier call wrote some of it".to_owned(),
            Some(totals) if totals.sqnr_db().is_finite() => {
                format!("SQNR {:5.1} dB, largest error {:.2e}", totals.sqnr_db(), totals.max_error)
            }
            Some(_) => "every value kept".to_owned(),
        };
        out!("{:<52} {method:<13} {quality}", t.id.name())?;
    }
    if let Some(reason) = reason(args, view) {
        out!("{}", dim(&format!("auto took refine for what is BF16: {reason}")))?;
    }
    coverage(args, view)?;
    let cast = view.cast_counts();
    if cast.blocks > 0 {
        let verdict =
            if cast.changed_values == 0 { green("without losing a bit") } else { "with losses".to_owned() };
        out!("{} of {} MXFP4 blocks cast {verdict}", grouped(cast.lossless_blocks), grouped(cast.blocks))?;
    }
    Ok(())
}

fn changed(view: &Quantized) -> impl Iterator<Item = TensorReport> {
    view.report().into_iter().filter(|t| t.method != Method::Keep)
}

/// The algorithm that chose scales and codes: of `auto` the one that it took for what is BF16, if there was any.
pub(crate) fn algorithm(args: &Quantize, view: &Quantized) -> String {
    let taken = (args.algorithm == args::Algorithm::Auto)
        .then(|| changed(view).map(|t| t.method).find(|&method| method == Method::Refine))
        .flatten();
    taken.map_or_else(|| flag(&args.algorithm), |method| method.name().to_owned())
}

/// Why `auto` chose as it did.
pub(crate) fn reason(args: &Quantize, view: &Quantized) -> Option<&'static str> {
    (algorithm(args, view) != flag(&args.algorithm))
        .then_some("the lowest divergence of all algorithms on the small model of nibble's BENCHMARKS.md")
}

/// Says which experts calibration hardly saw.
fn coverage(args: &Quantize, view: &Quantized) -> Result<()> {
    let calibrated = changed(view).any(|t| t.method.calibrates() && t.id.kind.is_expert());
    if args.all_experts || !calibrated {
        return Ok(());
    }
    for (layer, facts) in view.facts().iter().enumerate() {
        let starved: Vec<String> = (0..facts.coverage.len())
            .filter(|&expert| facts.coverage[expert] < quantize::FEWEST_TOKENS as u64)
            .map(|expert| format!("{expert} ({} tokens)", facts.coverage[expert]))
            .collect();
        if !starved.is_empty() {
            out!("layer {layer}: too few tokens for expert {}: mse instead", starved.join(", "))?;
        }
    }
    Ok(())
}

pub(crate) fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// The most memory that this process has held, mapped files included.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok().map(|kb| kb * 1024)
}
