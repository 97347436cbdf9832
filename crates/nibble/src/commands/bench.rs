//! `nibble bench`: speed of prompts and decoding, beside the bandwidth of the memory in the same run.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use checkpoint::{Config, Format, GenerationConfig, Layout, MatrixKind, Synthetic, Target, Weights};
use gptoss::{BLOCK_TOKENS, Backend, Plan, Sampling, SequencePlan};
use serde_json::{Value, json};

use crate::args::{Bench, BenchFormat, BenchTarget, Common, Recipe};
use crate::commands::bench_serve;
use crate::commands::doctor::machine;
use crate::failure::{Failure, Result};
use crate::loaded::{Loaded, backend};
use crate::model::Model;
use crate::profile::{KernelTime, line};
use crate::ui::{Ui, bold, bytes, dim, out};

/// Steps that are not counted before each measurement.
const WARM_UP: usize = 2;

pub(crate) fn run(args: &Bench, common: &Common, ui: Ui) -> Result<()> {
    if let Some(BenchTarget::Serve(args)) = &args.target {
        return bench_serve::run(args, ui);
    }
    let weights = match &args.synthetic {
        Some(shape) => synthetic(shape, args)?,
        None => Model::open(args.model.as_deref(), ui)?.weights(&args.run, common, ui)?,
    };
    if let Some(out) = &args.out {
        return write(&*weights, args, out, ui);
    }
    let mut tests = Vec::new();
    for &depth in &args.depths {
        let test = |prompt, tokens, batch| Test { prompt, tokens, batch, depth };
        let prompts = |&batch: &usize| args.prompts.iter().map(move |&tokens| test(true, tokens, batch));
        tests.extend(args.batches.iter().flat_map(prompts));
        tests.extend(args.batches.iter().map(|&batch| test(false, args.decode, batch)));
    }
    let limit = weights.config().max_context;
    if let Some(longest) = tests.iter().map(Test::length).max().filter(|&longest| longest > limit) {
        return Err(Failure::input(format!(
            "expected depth and tokens of at most {limit} in all, the model's context, found {longest}"
        )));
    }
    let mut model = backend(weights, &args.run, common, ui)?;
    let traffic = model.traffic();
    let mut bandwidth = vec![model.read_bandwidth()?];
    if !ui.json {
        out!("{}", dim(&format!("{}; {}", machine(), model.describe())))?;
        out!(
            "{}",
            bold(
                "test        batch    depth    tokens/s (min … max)            bytes/token     of bandwidth"
            )
        )?;
    }
    let mut rows = Vec::new();
    let mut bar = ui.progress("Measuring", (tests.len() * args.repetitions) as u64);
    for (t, test) in tests.iter().enumerate() {
        let mut speeds = Vec::new();
        for repetition in 0..args.repetitions {
            bar.set((t * args.repetitions + repetition) as u64);
            speeds.push(test.run(&mut model, repetition as u32)?);
        }
        bandwidth.push(model.read_bandwidth()?);
        speeds.sort_by(f64::total_cmp);
        rows.push(Row {
            test: *test,
            median: median(&speeds),
            min: speeds[0],
            max: speeds[speeds.len() - 1],
            bytes: (!test.prompt).then(|| traffic.step_bytes(test.batch, test.depth) / test.batch as f64),
            kernels: if args.run.profile { test.profile(&mut model)? } else { Vec::new() },
        });
    }
    drop(bar);
    bandwidth.sort_by(f64::total_cmp);
    let bandwidth = median(&bandwidth);
    if ui.json {
        let rows: Vec<Value> = rows.iter().map(|row| row.json(bandwidth)).collect();
        ui.document(&json!({"machine": machine(), "backend": model.describe(),
            "bandwidth_bytes_per_second": bandwidth, "rows": rows}))?;
    } else {
        for row in &rows {
            row.print(bandwidth)?;
        }
        out!(
            "{}",
            dim(&format!("memory: {}/s read by the same device in the same run", bytes(bandwidth as u64)))
        )?;
    }
    Ok(())
}

/// The middle of numbers in order, of which there is at least one; of an even count the mean of the two in the middle.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] }
}

/// One thing to measure: prompts of `tokens`, or `tokens` steps of decoding, `batch` sequences at a time.
#[derive(Clone, Copy)]
struct Test {
    prompt: bool,
    tokens: usize,
    batch: usize,
    depth: usize,
}

impl Test {
    /// Tokens per second of one run.
    fn run(&self, model: &mut Loaded, seed: u32) -> Result<f64> {
        let blocks = self.length().div_ceil(BLOCK_TOKENS);
        model.allocate_kv(blocks * self.batch, blocks * self.batch)?;
        model.clear_kv(&self.plan(model, seed, self.depth, 1))?;
        if self.prompt {
            let chunk = model.step_tokens();
            let start = Instant::now();
            for first in (0..self.tokens).step_by(chunk) {
                let count = chunk.min(self.tokens - first);
                model.step(&self.plan(model, seed, self.depth + first, count))?;
            }
            return Ok((self.tokens * self.batch) as f64 / start.elapsed().as_secs_f64());
        }
        let (mut start, mut drawn) = (Instant::now(), None);
        for i in 0..self.tokens + self.warm_up() {
            if i == self.warm_up() {
                start = Instant::now();
            }
            let mut plan = self.plan(model, seed, self.depth + i, 1);
            // One sequence goes on with what was drawn, as answers do, so that the device may begin a step before the host has seen its
            // token. Several sequences might all come to say the same, and to take the same experts.
            if let (Some(token), 1) = (drawn, self.batch) {
                plan.sequences[0].tokens = vec![token];
            }
            drawn = model.step(&plan)?[0].sampled.first().map(|sampled| sampled.token);
        }
        Ok((self.tokens * self.batch) as f64 / start.elapsed().as_secs_f64())
    }

    /// Steps that are not counted.
    fn warm_up(&self) -> usize {
        if self.prompt { 0 } else { WARM_UP }
    }

    /// Positions of each sequence at the end.
    fn length(&self) -> usize {
        self.depth + self.tokens + self.warm_up()
    }

    /// A step of `count` tokens per sequence. The cache holds zeros up to the depth: reading them costs what reading
    /// anything costs, as long as they lie in memory.
    fn plan(&self, model: &Loaded, seed: u32, position: usize, count: usize) -> Plan {
        let blocks = self.length().div_ceil(BLOCK_TOKENS) as u32;
        let vocabulary = model.config().vocab_size as u32;
        let sequence = |s: usize| {
            let token = |i: usize| {
                let mixed = (position + i) as u32 ^ (s as u32) << 16 ^ seed << 24;
                mixed.wrapping_mul(0x9e37_79b9) % vocabulary
            };
            let tokens: Vec<u32> = (0..count).map(token).collect();
            SequencePlan {
                generated: if self.prompt { 0 } else { count },
                sample: vec![Sampling::default()],
                ..SequencePlan::in_blocks(&tokens, position, s as u32 * blocks)
            }
        };
        Plan { sequences: (0..self.batch).map(sequence).collect() }
    }

    /// Seconds per kernel of the test's first step, the cache being as the last run left it.
    fn profile(&self, model: &mut Loaded) -> Result<Vec<KernelTime>> {
        let count = if self.prompt { self.tokens.min(model.step_tokens()) } else { 1 };
        let plan = self.plan(model, 0, self.depth, count);
        Ok(model.profile(&plan)?.1)
    }

    fn name(&self) -> String {
        format!("{}{}", if self.prompt { "pp" } else { "tg" }, self.tokens)
    }
}

struct Row {
    test: Test,
    median: f64,
    min: f64,
    max: f64,
    bytes: Option<f64>,
    /// Of a profile.
    kernels: Vec<KernelTime>,
}

impl Row {
    fn share(&self, bandwidth: f64) -> Option<f64> {
        self.bytes.map(|bytes| bytes * self.median / bandwidth)
    }

    fn json(&self, bandwidth: f64) -> Value {
        let mut row = json!({"test": self.test.name(), "batch": self.test.batch, "depth": self.test.depth,
            "tokens_per_second": {"median": self.median, "min": self.min, "max": self.max},
            "bytes_per_token": self.bytes, "share_of_bandwidth": self.share(bandwidth)});
        if !self.kernels.is_empty() {
            row["kernels"] = self
                .kernels
                .iter()
                .map(|(kernel, count, seconds)| json!({"kernel": kernel, "count": count, "seconds": seconds}))
                .collect();
        }
        row
    }

    fn print(&self, bandwidth: f64) -> Result<()> {
        let speed = format!("{:9.2} ({:.2} … {:.2})", self.median, self.min, self.max);
        let bytes = self.bytes.map_or_else(|| "–".to_owned(), |b| bytes(b as u64));
        let share = self.share(bandwidth).map_or_else(|| "–".to_owned(), |s| format!("{:.0} %", s * 100.0));
        out!(
            "{:<11} {:<8} {:<8} {speed:<31} {bytes:<15} {share}",
            self.test.name(),
            self.test.batch,
            self.test.depth
        )?;
        for time in &self.kernels {
            out!("{}", dim(&line(time)))?;
        }
        Ok(())
    }
}

/// Made-up weights: `gpt-oss-20b`, `gpt-oss-120b`, with `:N` for N layers.
fn synthetic(shape: &str, args: &Bench) -> Result<Arc<dyn Weights>> {
    let (name, layers) = shape.split_once(':').map_or((shape, None), |(name, layers)| (name, Some(layers)));
    let mut config = match name {
        "gpt-oss-20b" => Config::gpt_oss_20b(),
        "gpt-oss-120b" => Config::gpt_oss_120b(),
        other => {
            return Err(Failure::input(format!(
                "--synthetic: expected gpt-oss-20b or gpt-oss-120b, found {other}"
            )));
        }
    };
    if let Some(layers) = layers {
        let all = config.layer_kinds.len();
        let count: usize = layers.parse().ok().filter(|n| (1..=all).contains(n)).ok_or_else(|| {
            Failure::input(format!("--synthetic: expected 1 to {all} layers, found {layers}"))
        })?;
        config.layer_kinds.truncate(count);
    }
    let (format, recipe) = (args.format, args.recipe);
    let pick = move |id: checkpoint::MatrixId| match (format, id.kind) {
        (BenchFormat::Mxfp4, kind) if kind.is_expert() => Format::Mxfp4,
        (BenchFormat::Modelopt, kind) if kind.is_expert() => Format::Nvfp4,
        (BenchFormat::Modelopt, kind) if kind.is_attention() && recipe != Recipe::Experts => Format::Nvfp4,
        (BenchFormat::Modelopt, MatrixKind::Unembedding) if recipe == Recipe::All => Format::Nvfp4,
        _ => Format::Bf16,
    };
    Ok(Arc::new(Synthetic::new(config, pick, 1)))
}

fn write(weights: &dyn Weights, args: &Bench, out: &std::path::Path, ui: Ui) -> Result<()> {
    let layout = match args.format {
        BenchFormat::Mxfp4 => Layout::Mxfp4,
        BenchFormat::Modelopt => Layout::ModelOpt,
        BenchFormat::Bf16 => Layout::Bf16,
    };
    let target = Target {
        files: GenerationConfig::published(weights.config()).into_iter().collect(),
        fingerprint: format!("{:?} {:?} {:?}", args.synthetic, args.format, args.recipe),
        ..Target::new(weights.config().to_json(), layout)
    };
    let mut bar = ui.progress("Writing", 1);
    crate::interrupt::handle_gracefully();
    let written = checkpoint::write(weights, &target, out, &mut |progress| {
        bar.set_total(progress.total_bytes);
        bar.set(progress.done_bytes);
        if crate::interrupt::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    drop(bar);
    if ui.json {
        ui.document(&json!({"out": out.display().to_string(), "bytes": written.tensor_bytes}))?;
    } else {
        out!("{}: {}", out.display(), bytes(written.tensor_bytes))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians_of_few() {
        assert_eq!([median(&[3.0]), median(&[1.0, 2.0]), median(&[1.0, 5.0, 6.0])], [3.0, 1.5, 5.0]);
    }
}
