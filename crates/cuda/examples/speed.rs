//! speed LAYERS RECIPE REPS PROFILE test…: pp:TOKENS:BATCH:DEPTH or tg:STEPS:BATCH:DEPTH
#![allow(clippy::unwrap_used, clippy::print_stdout)]
use checkpoint::{Config, Format, Synthetic, Weights};
use cuda::{Cuda, Device};
use gptoss::{BLOCK_TOKENS, Backend, Plan, Sampling, SequencePlan};
use std::time::Instant;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let mut config = Config::gpt_oss_20b();
    config.layer_kinds.truncate(args[1].parse().unwrap());
    let recipe = args[2].clone();
    let reps: usize = args[3].parse().unwrap();
    let profile = args[4] == "1";
    let all = recipe == "all";
    let weights = Synthetic::new(
        config,
        move |id| match id.kind {
            k if k.is_expert() => Format::Nvfp4,
            k if k.is_attention() && all => Format::Nvfp4,
            checkpoint::MatrixKind::Unembedding if all => Format::Nvfp4,
            _ => Format::Bf16,
        },
        1,
    );
    let start = Instant::now();
    let device = Device::open(0).unwrap();
    let mut model = Cuda::load(&device, &weights, &mut |_, _| {}).unwrap();
    println!(
        "loaded in {:.1} s; read {:.3e}",
        start.elapsed().as_secs_f64(),
        model.read_bandwidth().unwrap()
    );
    let vocabulary = weights.config().vocab_size as u32;
    for test in &args[5..] {
        let f: Vec<&str> = test.split(':').collect();
        let (prompt, tokens, batch, depth): (bool, usize, usize, usize) =
            (f[0] == "pp", f[1].parse().unwrap(), f[2].parse().unwrap(), f[3].parse().unwrap());
        let warm = if prompt { 0 } else { 2 };
        let blocks = (depth + tokens + warm).div_ceil(BLOCK_TOKENS) as u32;
        model.allocate_kv(blocks as usize * batch, blocks as usize * batch).unwrap();
        let plan = |seed: u32, position: usize, count: usize| {
            let sequence = |s: usize| {
                let table: Vec<u32> = (0..blocks).map(|b| s as u32 * blocks + b).collect();
                let token = |i: usize| {
                    let mixed = (position + i) as u32 ^ (s as u32) << 16 ^ seed << 24;
                    mixed.wrapping_mul(0x9e37_79b9) % vocabulary
                };
                SequencePlan {
                    tokens: (0..count).map(token).collect(),
                    position,
                    full_blocks: table.clone(),
                    sliding_blocks: table,
                    sample: vec![Sampling::default()],
                    ..SequencePlan::default()
                }
            };
            Plan { sequences: (0..batch).map(sequence).collect() }
        };
        let mut speeds = Vec::new();
        for r in 0..reps + 1 {
            let mut start = Instant::now();
            let count = if prompt {
                model.step(&plan(r as u32, depth, tokens)).unwrap();
                tokens * batch
            } else {
                for i in 0..tokens + warm {
                    if i == warm {
                        start = Instant::now();
                    }
                    model.step(&plan(r as u32, depth + i, 1)).unwrap();
                }
                tokens * batch
            };
            if r > 0 {
                speeds.push(count as f64 / start.elapsed().as_secs_f64());
            }
        }
        speeds.sort_by(f64::total_cmp);
        let median = speeds[speeds.len() / 2];
        let ms = if prompt { (tokens * batch) as f64 } else { batch as f64 } / median * 1e3;
        println!(
            "{test}: {median:.0} tok/s ({:.0} … {:.0}), {ms:.3} ms a step",
            speeds[0],
            speeds[speeds.len() - 1]
        );
        if profile {
            let count = if prompt { tokens } else { 1 };
            let times = model.profile(&plan(0, depth, count)).unwrap();
            let sum: f64 = times.iter().map(|t| t.seconds).sum();
            for t in times {
                println!(
                    "    {:<22} {:>5} × {:>9.2} µs = {:>9.3} ms {:>4.1} %",
                    t.kernel,
                    t.count,
                    t.seconds * 1e6 / t.count as f64,
                    t.seconds * 1e3,
                    t.seconds / sum * 100.0
                );
            }
        }
    }
}
