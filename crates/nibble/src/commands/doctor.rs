//! `nibble doctor`: what this machine has, which kernels are chosen, and whether each gives the right numbers.

use std::sync::Arc;

use cpu::{Activations, Cpu, Isa, Options};
use gptoss::{BLOCK_TOKENS, Backend, Plan, SequencePlan};
use serde_json::json;

use crate::args::Common;
use crate::failure::{Failure, Result, Status};
#[cfg(feature = "cuda")]
use crate::loaded::Device;
use crate::loaded::devices;
use crate::model::{Model, threads};
use crate::ui::{Ui, bold, dim, green};

pub(crate) fn run(common: &Common, ui: Ui) -> Result<()> {
    let gpu = gpu(&common.device)?;
    let threads = threads(common);
    let best = Isa::best();
    let pool = cpu::Pool::new(threads);
    let bandwidth = cpu::read_bandwidth(&pool, 5)?;
    let tests: Vec<_> = Isa::ALL.into_iter().flat_map(cpu::self_test).collect();
    let coarser = coarser(threads)?;
    let passed = tests.iter().all(|test| test.passed) && gpu.passed;

    if ui.json {
        let rows: Vec<_> = tests
            .iter()
            .map(|t| {
                json!({"kernel": t.kernel, "isa": t.isa.name(), "error": t.error, "equals_scalar": t.equals_scalar,
                    "passed": t.passed})
            })
            .collect();
        let coarser: Vec<_> =
            coarser.iter().map(|(flags, error)| json!({"options": flags, "error": error})).collect();
        ui.document(&json!({
            "version": env!("CARGO_PKG_VERSION"), "machine": machine(), "threads": threads, "isa": best.name(),
            "bandwidth_bytes_per_second": bandwidth, "kernels": rows, "coarser": coarser, "gpu": gpu.json, "passed": passed,
        }));
    } else {
        println!("{}  {}", bold("processor "), processor());
        println!("{}  {threads} of {} logical", bold("threads   "), logical());
        println!("{}  {:.1} GB/s read by {threads} threads", bold("memory    "), bandwidth / 1e9);
        println!(
            "{}  {} {}",
            bold("kernels   "),
            best.name(),
            dim("(activations f32, or as --activations says)")
        );
        println!("{}  {}\n", bold("GPU       "), gpu.summary);
        println!("{}", bold("kernel          set       error     bits equal scalar"));
        for test in &tests {
            let verdict = if test.passed { green("ok") } else { "WRONG".to_owned() };
            let equal = if test.equals_scalar { "yes" } else { "no" };
            println!("{:<15} {:<9} {:<9.1e} {equal:<4} {verdict}", test.kernel, test.isa.name(), test.error);
        }
        println!(
            "\n{}",
            bold("coarser numbers, if asked for                error of the small model's logits")
        );
        for (flags, error) in &coarser {
            println!("{flags:<45}{error:.1e}");
        }
        gpu.lines.iter().for_each(|line| println!("{line}"));
    }
    if passed {
        Ok(())
    } else {
        Err(Failure::new(Status::Machine, "a kernel gives wrong numbers on this machine"))
    }
}

/// What coarser weights, caches and activations cost the small model on a short text: flags, and the relative RMS error of all logits.
fn coarser(threads: usize) -> Result<Vec<(&'static str, f64)>> {
    const TEXT: &str = "Nobody in the village had slept, for the wind had shaken every door. The old man went down to the \
                        harbour as he had done every morning, looked at the boats, and counted them twice.";
    let model = Model::built_in()?;
    let tokens = model.tokenizer()?.encode(TEXT);
    let weights = Arc::new(model.checkpoint);
    let logits = |fast_weights, bf16_cache, activations| -> Result<Vec<f32>> {
        let threads = Some(threads);
        let options = Options { threads, fast_weights, bf16_cache, activations, ..Options::default() };
        let mut cpu = Cpu::load(weights.clone(), options, &mut |_, _| {})?;
        let blocks = tokens.len().div_ceil(BLOCK_TOKENS);
        cpu.allocate_kv(blocks, blocks)?;
        let sequence = SequencePlan { logits: true, ..SequencePlan::in_blocks(&tokens, 0, 0) };
        let outputs = cpu.step(&Plan { sequences: vec![sequence] })?;
        Ok(outputs.into_iter().flat_map(|output| output.logits).collect())
    };
    let exact = logits(false, false, Activations::F32)?;
    let energy: f64 = exact.iter().map(|&e| f64::from(e).powi(2)).sum();
    [
        ("--kv-cache-dtype bf16", false, true, Activations::F32),
        ("--activations int16", false, false, Activations::Int16),
        ("--activations int8", false, false, Activations::Int8),
        ("--weights fast", true, false, Activations::F32),
        ("--weights fast --activations int8", true, false, Activations::Int8),
    ]
    .into_iter()
    .map(|(flags, fast, bf16, activations)| {
        let found = logits(fast, bf16, activations)?;
        let error: f64 = found.iter().zip(&exact).map(|(f, e)| f64::from(f - e).powi(2)).sum();
        Ok((flags, (error / energy).sqrt()))
    })
    .collect()
}

/// What there is to say about the GPU.
struct Gpu {
    summary: String,
    lines: Vec<String>,
    json: serde_json::Value,
    passed: bool,
}

#[cfg(not(feature = "cuda"))]
fn gpu(name: &str) -> Result<Gpu> {
    devices(name, 1)?;
    let summary = "none: this build runs on CPUs".to_owned();
    Ok(Gpu { summary, lines: Vec::new(), json: serde_json::Value::Null, passed: true })
}

#[cfg(feature = "cuda")]
fn gpu(name: &str) -> Result<Gpu> {
    let Device::Cuda(devices) = devices(name, 1)? else {
        let summary = match cuda::device_count() {
            Ok(_) => "left out, as --device cpu asks for".to_owned(),
            Err(error) => format!("none: {error}"),
        };
        return Ok(Gpu { summary, lines: Vec::new(), json: serde_json::Value::Null, passed: true });
    };
    let device = &devices[0];
    let tests = cuda::self_test(device)?;
    let (free, total) = device.memory()?;
    let capability = format!("{}.{}", device.capability() / 10, device.capability() % 10);
    let summary = format!(
        "{}, compute capability {capability}, {} multiprocessors, {:.1} of {:.1} GB free",
        device.name(),
        device.multiprocessors(),
        free as f64 / 1e9,
        total as f64 / 1e9
    );
    let line = |t: &cuda::SelfTest| {
        let verdict = if t.passed { green("ok") } else { "WRONG".to_owned() };
        format!("{:<15} {:<9} {:<9.1e} {verdict}", t.kernel, t.format, t.error)
    };
    let mut lines = vec![String::new(), bold("GPU kernels     experts   error")];
    lines.extend(tests.iter().map(line));
    // Off unless asked for: a failure is shown, and does not make the machine unfit. Last, since it may end the context.
    let fp4 = cuda::fp4_self_test(device);
    match &fp4 {
        Ok(tests) if tests.is_empty() => lines.push(dim("--activations nvfp4 does not apply to this chip")),
        Ok(tests) => lines.extend(tests.iter().map(line)),
        Err(error) => lines.push(format!("--activations nvfp4 fails on this chip: {error}")),
    }
    let row = |t: &cuda::SelfTest| json!({"kernel": t.kernel, "format": t.format, "error": t.error, "passed": t.passed});
    let rows: Vec<_> = tests.iter().map(row).collect();
    let fp4 = match fp4 {
        Ok(tests) => json!(tests.iter().map(row).collect::<Vec<_>>()),
        Err(error) => json!(error.to_string()),
    };
    let json = json!({"name": device.name(), "compute_capability": capability, "multiprocessors": device.multiprocessors(),
        "free_bytes": free, "total_bytes": total, "kernels": rows, "fp4_products": fp4});
    Ok(Gpu { summary, lines, json, passed: tests.iter().all(|t| t.passed) })
}

/// One line that identifies the machine of a measurement.
pub(crate) fn machine() -> String {
    format!("{}, {} logical cores, {}", processor(), logical(), Isa::best().name())
}

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn logical() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
