//! `nibble demo`: the main job from end to end on the small model that travels in the binary.

use std::hash::BuildHasher;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use checkpoint::{Checkpoint, Layout, Target, Weights};
use engine::{EngineOptions, SamplingParams};
use evaluate::{divergence, perplexity, windows};
use harmony::{ChatMessage, ChatPrompt, ChatTool, Delta, FunctionTool};
use quantize::{Algorithm, Options, Quantized, Recipe, ScalesPer};
use serde_json::{Value, json};

use crate::args::Common;
use crate::commands::chat::{answer, part, show};
use crate::failure::{Failure, Result};
use crate::interrupt;
use crate::loaded::{Loaded, backend};
use crate::model::{Model, threads};
use crate::ui::{self, Ui, bold, bytes, dim, green, grouped, out, print};

/// Text for people: nothing with `--json`.
macro_rules! say {
    ($ui:expr, $($text:tt)*) => {
        if $ui.json { Ok(()) } else { out!($($text)*) }
    };
}

/// Public-domain English books that the small model has not seen.
const TEXT: &str = include_str!("../../data/books.txt");

const WINDOWS: usize = 4;
const CONTEXT: usize = 1024;

pub(crate) fn run(common: &Common, ui: Ui) -> Result<()> {
    let started = Instant::now();
    let original = Arc::new(Model::built_in()?.checkpoint);
    say!(ui, "{}", bold("nibble: gpt-oss in four bits, without losing one"))?;
    say!(
        ui,
        "{}",
        dim(&format!(
            "tiny-gpt-oss, a gpt-oss of {} parameters trained for this program; {} of this CPU",
            grouped(original.parameters()),
            ui::threads(threads(common))
        ))
    )?;

    // An interrupt waits until the folder is gone, and a closed pipe does not end the process before.
    let (view, cast, usual) =
        interrupt::surviving_broken_pipe(|| interrupt::gracefully(|| checkpoints(&original, common, ui)))?;

    heading(ui, 3, "Measure: what did it cost?")?;
    let tokenizer = Model::built_in()?.tokenizer()?;
    let windows = windows(&tokenizer.encode(TEXT), CONTEXT, Some(WINDOWS));
    let load = |weights: Arc<Checkpoint>| backend(weights, &crate::args::Run::exact(), common, ui);
    let mut reference = load(Arc::clone(&original))?;
    let base = perplexity(&mut reference, &windows, &mut |_| {})?;
    let tokens = base.tokens;
    say!(
        ui,
        "   {}",
        dim(&format!("{} windows of {CONTEXT} tokens of books it has not seen", windows.len()))
    )?;
    say!(ui, "   {}", bold("                       size   perplexity   KL from original   same top token"))?;
    let row = |name: &str, size: u64, perplexity: f64, rest: &str| {
        say!(ui, "   {name:<18} {:>8}   {perplexity:>10.4}   {rest}", bytes(size))
    };
    let mut measured = Vec::new();
    row("MXFP4 (original)", original.tensor_bytes(), base.perplexity, "               –               –")?;
    let mut fast = load(Arc::clone(&cast))?;
    for (name, checkpoint, model) in
        [("NVFP4, cast", &cast, &mut fast), ("NVFP4, usual way", &usual, &mut load(Arc::clone(&usual))?)]
    {
        let found = divergence(model, &mut reference, &windows, &mut |_| {})?;
        let agreement = format!("{:.2} %", found.top1_agreement * 100.0);
        let rest = format!("{:>16.6}   {agreement:>13}", found.kl_mean);
        row(name, checkpoint.tensor_bytes(), found.nll.exp(), &rest)?;
        measured.push(json!({"name": name, "bytes": checkpoint.tensor_bytes(), "divergence": found}));
    }
    say!(
        ui,
        "   {}",
        dim(&format!(
            "{tokens} predictions each; the cast gives the same numbers because it is the same model"
        ))
    )?;

    heading(ui, 4, "Ask: three questions to the cast model")?;
    let answers = ask(fast, ui)?;

    heading(ui, 5, "Next: the real one")?;
    for (command, remark) in [
        ("nibble quantize openai/gpt-oss-20b --out gpt-oss-20b-nvfp4", "fetches 14 GB on first use"),
        ("nibble verify openai/gpt-oss-20b gpt-oss-20b-nvfp4", "bit for bit"),
        ("nibble chat gpt-oss-20b-nvfp4", ""),
        ("nibble serve gpt-oss-20b-nvfp4", "OpenAI's API on port 8000"),
    ] {
        say!(ui, "   {command:<60} {}", dim(remark))?;
    }
    if ui.json {
        let counts = view.cast_counts();
        ui.document(&json!({
            "blocks": counts.blocks, "lossless_blocks": counts.lossless_blocks, "changed_values": counts.changed_values,
            "identical": true, "original": {"bytes": original.tensor_bytes(), "perplexity": base},
            "quantized": measured, "answers": answers, "seconds": started.elapsed().as_secs_f64(),
        }))?;
    }
    say!(ui, "\n{}", dim(&format!("done in {:.1} s", started.elapsed().as_secs_f64())))?;
    Ok(())
}

/// Steps 1 and 2: the cast, its checkpoint, and that of the usual way. The folder in which they were written is gone afterwards:
/// both are mapped.
fn checkpoints(
    original: &Arc<Checkpoint>,
    common: &Common,
    ui: Ui,
) -> Result<(Quantized, Arc<Checkpoint>, Arc<Checkpoint>)> {
    let folder = Scratch::new()?;
    heading(ui, 1, "Quantize: MXFP4, as gpt-oss is published, to NVFP4")?;
    let source: Arc<dyn Weights> = original.clone();
    let view = quantized(Arc::clone(&source), Algorithm::Cast, common)?;
    let counts = view.cast_counts();
    let cast_folder = folder.0.join("nvfp4");
    write(&view, original, &cast_folder)?;
    say!(
        ui,
        "   {} of {} blocks lossless, {} values changed",
        green(&grouped(counts.lossless_blocks)),
        grouped(counts.blocks),
        counts.changed_values
    )?;
    let cast = Arc::new(Checkpoint::open(&cast_folder)?);
    let comparison = checkpoint::compare(&**original, &*cast, None, threads(common))?;
    let verdict = if comparison.identical { green("identical") } else { "different".to_owned() };
    say!(ui, "   read back and compared with the original: {verdict}, {} tensors", comparison.tensors)?;
    if !comparison.identical {
        return Err(Failure::machine("the cast checkpoint differs from the original"));
    }

    heading(ui, 2, "The usual way, for comparison: up to BF16, then scales from the largest value")?;
    let upcast: Arc<dyn Weights> =
        Arc::new(Quantized::new(source, Options::Bf16, threads(common), &mut |_, _| {})?);
    let usual = quantized(upcast, Algorithm::Max, common)?;
    let usual_folder = folder.0.join("max");
    write(&usual, original, &usual_folder)?;
    let totals = usual.report().into_iter().filter_map(|tensor| tensor.totals);
    let (changed, values) = totals.fold((0, 0), |(c, v), totals| (c + totals.changed, v + totals.values));
    say!(ui, "   {} of {} expert weights changed", grouped(changed), grouped(values))?;
    let usual = Arc::new(Checkpoint::open(&usual_folder)?);
    Ok((view, cast, usual))
}

fn heading(ui: Ui, number: usize, text: &str) -> Result<()> {
    say!(ui, "\n{}", bold(&format!("{number}  {text}")))
}

fn quantized(source: Arc<dyn Weights>, algorithm: Algorithm, common: &Common) -> Result<Quantized> {
    let options = Options::Nvfp4 {
        recipe: Recipe::Experts,
        algorithm,
        embedding: false,
        scales_per: ScalesPer::Stack,
        activations: false,
        kv_scales: false,
        experts_in_bf16: false,
    };
    Ok(Quantized::new(source, options, threads(common), &mut |_, _| {})?)
}

fn write(weights: &dyn Weights, source: &Checkpoint, out: &Path) -> Result<()> {
    let target = Target::new(source.config_json().clone(), Layout::ModelOpt);
    checkpoint::write(weights, &target, out, &mut |_| {
        if interrupt::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(())
}

/// Three answers, greedy so that they are the same everywhere. The last question comes with a tool.
fn ask(model: Loaded, ui: Ui) -> Result<Vec<Value>> {
    let mut answers = Vec::new();
    let options = EngineOptions {
        eos_ids: Model::built_in()?.checkpoint.generation_config().eos_token_ids.clone(),
        max_model_len: Some(2048),
        kv_cache_bytes: 256 << 20,
        ..EngineOptions::default()
    };
    let engine = crate::engine::engine(Box::new(model), Model::built_in()?.harmony()?, options)?;
    let params = SamplingParams { temperature: 0.0, max_tokens: Some(128), ..SamplingParams::default() };
    let weather = ChatTool {
        function: FunctionTool {
            name: "get_weather".to_owned(),
            description: Some("Get the current weather for a city.".to_owned()),
            parameters: Some(json!({
                "type": "object",
                "properties": {"location": {"type": "string"}},
                "required": ["location"],
            })),
        },
    };
    for (question, tools) in [
        ("What is 17 + 25?", vec![]),
        ("What is the capital of France?", vec![]),
        ("What is the weather in Paris?", vec![weather]),
    ] {
        let prompt = ChatPrompt {
            tools,
            date: Some("2025-06-28".to_owned()),
            ..ChatPrompt::new(vec![ChatMessage::new("user", question)])
        };
        say!(ui, "   {} {question}", bold("you      "))?;
        let mut field = "";
        let turn = answer(&engine, &prompt, &params, &mut |delta| {
            if ui.json {
                return Ok(());
            }
            let Some(name) = part(delta) else { return Ok(()) };
            if name != field {
                let label = bold(&format!("{name:<9}"));
                print(format_args!("{}   {label} ", if field.is_empty() { "" } else { "\n" }))?;
                field = name;
            }
            match delta {
                Delta::CallStart { name, .. } => print(format_args!("{name} ")),
                other => show(other),
            }
        })?;
        say!(ui, "\n")?;
        answers.push(json!({"question": question, "answer": turn}));
    }
    engine.shutdown();
    Ok(answers)
}

/// A folder that is gone when this is.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch> {
        // Others may make folders there too: nobody knows the name before, and a folder that is there is not taken.
        let random = std::hash::RandomState::new().hash_one(std::process::id());
        let path = std::env::temp_dir().join(format!("nibble-demo-{random:016x}"));
        std::fs::create_dir(&path).map_err(|e| Failure::io(&path, &e))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing depends on it; the system clears its temporary folder in time.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
