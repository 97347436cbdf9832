//! `nibble doctor`: what this machine has, which kernels are chosen, and whether each gives the right numbers.

use std::sync::Arc;

use cpu::{Activations, CacheFormat, Cpu, Isa, Options};
use gptoss::{BLOCK_TOKENS, Backend, Plan, SequencePlan};
use serde_json::{Value, json};

use crate::args::Common;
use crate::failure::{Failure, Result, Status};
#[cfg(feature = "cuda")]
use crate::loaded::Device;
use crate::loaded::devices;
use crate::model::{Model, threads};
use crate::ui::{self, Ui, bold, dim, green, out};

pub(crate) fn run(common: &Common, ui: Ui) -> Result<()> {
    let gpus = gpus(&common.device)?;
    let threads = threads(common);
    let best = Isa::best();
    let pool = cpu::Pool::new(threads);
    let bandwidth = cpu::read_bandwidth(&pool, 5)?;
    let tests: Vec<_> = Isa::ALL.into_iter().flat_map(cpu::self_test).collect();
    let coarser = coarser(threads)?;
    let passed = tests.iter().all(|test| test.passed) && !gpus.failed;

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
            "bandwidth_bytes_per_second": bandwidth, "kernels": rows, "coarser": coarser, "gpus": gpus.json,
            "gpus_together": gpus.together, "passed": passed,
        }))?;
    } else {
        out!("{}  {}", bold("processor "), processor())?;
        out!("{}  {threads} of {} logical", bold("threads   "), logical())?;
        out!("{}  {:.1} GB/s read by {}", bold("memory    "), bandwidth / 1e9, ui::threads(threads))?;
        out!(
            "{}  {} {}",
            bold("kernels   "),
            best.name(),
            dim("(activations f32, or as --activations says)")
        )?;
        for summary in &gpus.summaries {
            out!("{}  {summary}", bold("GPU       "))?;
        }
        out!("")?;
        out!("{}", bold("kernel          set                   error     bits equal scalar"))?;
        for test in &tests {
            let verdict = if test.passed { green("ok") } else { "WRONG".to_owned() };
            let equal = if test.equals_scalar { "yes" } else { "no" };
            out!("{:<15} {:<21} {:<9.1e} {equal:<4} {verdict}", test.kernel, test.isa.name(), test.error)?;
        }
        out!("\n{}", bold("coarser numbers, if asked for                error of the small model's logits"))?;
        for (flags, error) in &coarser {
            out!("{flags:<45}{error:.1e}")?;
        }
        for line in &gpus.lines {
            out!("{line}")?;
        }
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
    let logits = |fast_weights, cache, activations| -> Result<Vec<f32>> {
        let threads = Some(threads);
        let options = Options { threads, fast_weights, cache, activations, ..Options::default() };
        let mut cpu = Cpu::load(weights.clone(), options, &mut |_, _| {})?;
        let blocks = tokens.len().div_ceil(BLOCK_TOKENS);
        cpu.allocate_kv(blocks, blocks)?;
        let sequence = SequencePlan { logits: true, ..SequencePlan::in_blocks(&tokens, 0, 0) };
        let outputs = cpu.step(&Plan { sequences: vec![sequence] })?;
        Ok(outputs.into_iter().flat_map(|output| output.logits).collect())
    };
    let exact = logits(false, CacheFormat::F32, Activations::F32)?;
    let energy: f64 = exact.iter().map(|&e| f64::from(e).powi(2)).sum();
    [
        ("--kv-cache-dtype bf16", false, CacheFormat::Bf16, Activations::F32),
        ("--kv-cache-dtype fp8", false, CacheFormat::E4m3, Activations::F32),
        ("--activations bf16", false, CacheFormat::F32, Activations::Bf16),
        ("--activations int16", false, CacheFormat::F32, Activations::Int16),
        ("--activations int8", false, CacheFormat::F32, Activations::Int8),
        ("--weights fast", true, CacheFormat::F32, Activations::F32),
        ("--weights fast --activations int8", true, CacheFormat::F32, Activations::Int8),
    ]
    .into_iter()
    .map(|(flags, fast, cache, activations)| {
        let found = logits(fast, cache, activations)?;
        let error: f64 = found.iter().zip(&exact).map(|(f, e)| f64::from(f - e).powi(2)).sum();
        Ok((flags, (error / energy).sqrt()))
    })
    .collect()
}

/// What there is to say about GPUs.
#[derive(Default)]
struct Gpus {
    /// One line for each, or why there is none.
    summaries: Vec<String>,
    lines: Vec<String>,
    json: Vec<Value>,
    /// Those of them that share a model.
    together: Value,
    failed: bool,
}

impl Gpus {
    fn none(why: String) -> Gpus {
        Gpus { summaries: vec![why], ..Gpus::default() }
    }
}

#[cfg(not(feature = "cuda"))]
fn gpus(name: &str) -> Result<Gpus> {
    devices(name, None)?;
    Ok(Gpus::none("none: this build runs on CPUs".to_owned()))
}

/// Adds a table of these tests to what is printed, and gives them as JSON.
#[cfg(feature = "cuda")]
fn table(title: &str, tests: &[cuda::SelfTest], lines: &mut Vec<String>) -> Value {
    lines.extend([String::new(), bold(&format!("{title:<29} experts   error"))]);
    lines.extend(tests.iter().map(|t| {
        let verdict = if t.passed { green("ok") } else { "WRONG".to_owned() };
        format!("{:<29} {:<9} {:<9.1e} {verdict}", t.kernel, t.format, t.error)
    }));
    let row = |t: &cuda::SelfTest| json!({"kernel": t.kernel, "format": t.format, "error": t.error, "passed": t.passed});
    tests.iter().map(row).collect()
}

/// All GPUs, or those that `--device` names by their numbers.
#[cfg(feature = "cuda")]
fn gpus(name: &str) -> Result<Gpus> {
    let there = cuda::device_count();
    let count = (!name.contains(':')).then(|| *there.as_ref().unwrap_or(&1));
    let Device::Cuda(devices) = devices(name, count)? else {
        return Ok(Gpus::none(match there {
            Ok(_) => "left out, as --device cpu asks for".to_owned(),
            Err(error) => format!("none: {error}"),
        }));
    };
    let mut gpus = Gpus::default();
    for device in &devices {
        let number = device.ordinal();
        let tested =
            device.memory().and_then(|memory| Ok((memory, cuda::self_test(std::slice::from_ref(device))?)));
        let ((free, total), tests) = match tested {
            Ok(tested) => tested,
            // The others are worth a look all the same.
            Err(error) => {
                gpus.failed = true;
                gpus.summaries
                    .push(format!("{}, where the kernels could not be tested: {error}", device.name()));
                gpus.json.push(json!({"name": device.name(), "error": error.to_string()}));
                continue;
            }
        };
        let capability = device.compute_capability();
        let capability = format!("{}.{}", capability / 10, capability % 10);
        gpus.summaries.push(format!(
            "{}, compute capability {capability}, {} multiprocessors, {:.1} of {:.1} GB free",
            device.name(),
            device.multiprocessors(),
            free as f64 / 1e9,
            total as f64 / 1e9
        ));
        gpus.failed |= tests.iter().any(|test| !test.passed);
        let kernels = table(&format!("kernels of cuda:{number}"), &tests, &mut gpus.lines);
        gpus.json.push(json!({"name": device.name(), "compute_capability": capability, "free_bytes": free,
            "total_bytes": total, "multiprocessors": device.multiprocessors(), "kernels": kernels}));
    }
    // As many as can divide the heads of gpt-oss.
    let count = 1 << devices.len().min(8).ilog2();
    if count > 1 {
        gpus.together = match cuda::self_test(&devices[..count]) {
            Ok(tests) => {
                gpus.failed |= tests.iter().any(|test| !test.passed);
                let kernels = table(&format!("{count} GPUs that share a model"), &tests, &mut gpus.lines);
                json!({"gpus": count, "kernels": kernels})
            }
            // Some machines are made so.
            Err(gptoss::Error::Unsupported(why)) => {
                gpus.lines.push(format!("\nno model for {count} GPUs: {why}"));
                json!({"gpus": count, "error": why})
            }
            Err(error) => {
                gpus.failed = true;
                gpus.lines.push(format!("\n{count} GPUs that share a model could not be tested: {error}"));
                json!({"gpus": count, "error": error.to_string()})
            }
        };
    }
    // Off unless asked for: a failure is shown, and does not make the machine unfit. Last, since it may end the context.
    for (device, found) in devices.iter().zip(&mut gpus.json) {
        let name = format!("cuda:{}, --activations nvfp4", device.ordinal());
        found["fp4_products"] = match cuda::fp4_self_test(device) {
            Ok(tests) if tests.is_empty() => {
                gpus.lines.push(dim(&format!("\n{name} does not apply to this chip")));
                json!([])
            }
            Ok(tests) => table(&name, &tests, &mut gpus.lines),
            Err(error) => {
                gpus.lines.push(format!("\n{name} fails on this chip: {error}"));
                json!(error.to_string())
            }
        };
    }
    Ok(gpus)
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
