//! `testdata/model`: traces, logits and greedy continuations, within the tolerances of its README for f32.

use gptoss::{BLOCK_TOKENS, Backend, Plan, Reference, Rotary, Sampling, Score, SequenceOutput, SequencePlan};

use crate::models::{ids, json, open};
use crate::{Tensors, assert_close};

const RANDOM: &str = "testdata/model/hf-mxfp4";

/// A backend with room for `tokens` tokens, its blocks in an order that no formula would guess.
fn backend(path: &str, tokens: usize) -> (Reference, Vec<u32>) {
    let mut backend = Reference::new(open(path));
    let count = tokens.div_ceil(BLOCK_TOKENS);
    backend.allocate_kv(count, count).unwrap();
    (backend, (0..count as u32).rev().collect())
}

fn sequence(tokens: &[u32], position: usize, blocks: &[u32]) -> SequencePlan {
    SequencePlan {
        tokens: tokens.to_vec(),
        position,
        full_blocks: blocks.to_vec().into(),
        sliding_blocks: blocks.to_vec().into(),
        ..SequencePlan::default()
    }
}

fn step(backend: &mut Reference, sequence: SequencePlan) -> SequenceOutput {
    backend.step(&Plan { sequences: vec![sequence] }).unwrap().remove(0)
}

fn rows(values: &[f32], positions: &[u32], width: usize) -> Vec<f32> {
    positions.iter().flat_map(|&p| &values[p as usize * width..][..width]).copied().collect()
}

#[test]
fn rotary_tables() {
    let golden = Tensors::open("testdata/model/trace_len64.safetensors");
    let config = open(RANDOM).config().clone();
    let rotary = Rotary::new(&config.rope, config.head_dim);
    let largest = |found: &[f32], expected: &[f32]| {
        found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max)
    };
    assert!(largest(&rotary.frequencies, &golden.get("rope.inv_freq")) <= 1e-6);
    let (mut cos, mut sin) = (vec![0.0; 64 * 32], vec![0.0; 64 * 32]);
    for (p, (cos, sin)) in cos.chunks_exact_mut(32).zip(sin.chunks_exact_mut(32)).enumerate() {
        rotary.at(p, cos, sin);
    }
    assert!(largest(&cos, &golden.get("rope.cos")) <= 1e-6);
    assert!(largest(&sin, &golden.get("rope.sin")) <= 1e-6);
}

#[test]
fn frequencies_of_the_published_models() {
    let config = checkpoint::Config::gpt_oss_20b();
    let rotary = Rotary::new(&config.rope, config.head_dim);
    for (i, expected) in [
        (0, 1.0f32),
        (8, 0.050_813_3),
        (9, 0.031_705_7),
        (12, 0.006_794_96),
        (17, 1.293_19e-4),
        (18, 3.830_88e-5),
        (31, 3.023_51e-7),
    ] {
        assert!((rotary.frequencies[i] / expected - 1.0).abs() < 5e-6, "{i}: {}", rotary.frequencies[i]);
    }
    assert!((rotary.concentration - 1.346_573_6).abs() < 1e-6);
}

#[test]
fn every_intermediate_of_two_layers() {
    let golden = Tensors::open("testdata/model/trace_len64.safetensors");
    let reference = json("testdata/model/reference.json");
    let tokens = ids(&reference["sequences"]["len64"]["ids"]);
    let (mut backend, blocks) = backend(RANDOM, 64);
    let mut seen = 0;
    backend
        .forward(&sequence(&tokens, 0, &blocks), 2, &mut |layer, name, values| {
            if ["hidden_in", "router_logits"].contains(&name) {
                return;
            }
            let expected = golden.get(&format!("layer{layer}.{name}"));
            if name == "topk_indices" {
                assert_eq!(values, expected, "layer {layer}");
            } else {
                assert_close(values, &expected, 1e-5, &format!("layer {layer} {name}"));
            }
            seen += 1;
        })
        .unwrap();
    assert_eq!(seen, 2 * 13);
}

#[test]
fn logits_and_hidden_states_of_both_layouts() {
    let golden = Tensors::open("testdata/model/reference.safetensors");
    let reference = json("testdata/model/reference.json");
    for path in [RANDOM, "testdata/model/original-mxfp4"] {
        for name in ["len1", "len5", "len64", "len200", "repeat40"] {
            let case = &reference["sequences"][name];
            let (tokens, positions) = (ids(&case["ids"]), ids(&case["hidden_positions"]));
            let (mut backend, blocks) = backend(path, tokens.len());
            let x = backend
                .forward(&sequence(&tokens, 0, &blocks), 4, &mut |layer, tap, values| {
                    let (golden_name, width) = match tap {
                        "hidden_in" => (format!("{name}.hidden_in_{layer}"), 128),
                        "router_logits" => (format!("{name}.router_logits_{layer}"), 8),
                        _ => return,
                    };
                    let what = format!("{path} {golden_name}");
                    assert_close(&rows(values, &positions, width), &golden.get(&golden_name), 1e-5, &what);
                })
                .unwrap();
            let normed = backend.norm(&x, checkpoint::VectorKind::FinalNorm.at(0)).unwrap();
            let expected = golden.get(&format!("{name}.final_normed"));
            assert_close(&rows(&normed, &positions, 128), &expected, 1e-5, name);
            let found = rows(&backend.logits(&x).unwrap(), &positions, 320);
            let expected = golden.get(&format!("{name}.logits"));
            assert_close(&found, &expected, 1e-5, name);
            let largest = found.iter().zip(&expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
            assert!(largest <= 2e-4, "{name}: {largest}");
        }
    }
}

#[test]
fn greedy_continuations_token_by_token() {
    let reference = json("testdata/model/reference.json");
    for name in ["len1", "len5", "len64", "len200", "repeat40"] {
        let prompt = ids(&reference["sequences"][name]["ids"]);
        let expected = ids(&reference["greedy"][name]["tokens"]);
        let (mut backend, blocks) = backend(RANDOM, prompt.len() + expected.len());
        let (mut tokens, mut position, mut found) = (prompt, 0, Vec::<u32>::new());
        for _ in 0..expected.len() {
            let sample = vec![Sampling::default()];
            let output = step(&mut backend, SequencePlan { sample, ..sequence(&tokens, position, &blocks) });
            position += tokens.len();
            tokens = vec![output.sampled[0].token];
            found.extend(&tokens);
        }
        assert_eq!(found, expected, "{name}");

        // The same in one step, as guesses to verify.
        let guessed = [&ids(&reference["sequences"][name]["ids"]), &expected[..expected.len() - 1]].concat();
        let sample = vec![Sampling::default(); expected.len()];
        let output = step(&mut backend, SequencePlan { sample, ..sequence(&guessed, 0, &blocks) });
        assert_eq!(output.sampled.iter().map(|s| s.token).collect::<Vec<_>>(), expected, "{name}");
    }
}

#[test]
fn chunks_and_scores_agree_with_one_pass() {
    let reference = json("testdata/model/reference.json");
    let tokens = ids(&reference["sequences"]["len200"]["ids"]);
    let (mut whole, blocks) = backend(RANDOM, 200);
    let expected = step(&mut whole, SequencePlan { logits: true, ..sequence(&tokens, 0, &blocks) }).logits;
    let (mut chunked, _) = backend(RANDOM, 200);
    let mut position = 0;
    for size in [1, 7, 16, 40, 64, 72] {
        let next = tokens[position + 1..(position + 1 + size).min(200)].to_vec();
        let plan = SequencePlan {
            logits: true,
            score: Some(Score { next: next.clone(), top: 3 }),
            hidden_after_layer: Some(3),
            ..sequence(&tokens[position..position + size], position, &blocks)
        };
        let output = step(&mut chunked, plan);
        assert_close(&output.logits, &expected[position * 320..(position + size) * 320], 1e-6, "chunk");
        assert_close(&chunked.logits(&output.hidden).unwrap(), &output.logits, 1e-7, "hidden");
        for (score, (&next, row)) in
            output.scores.iter().zip(next.iter().zip(output.logits.chunks_exact(320)))
        {
            let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            let logprob = f64::from(row[next as usize]) - sum.ln();
            assert!((f64::from(score.logprob) - logprob).abs() < 1e-5);
            assert!(score.top.len() == 3 && score.top[0].1 >= score.top[2].1);
        }
        position += size;
    }
    assert_eq!(position, 200);
}

#[test]
fn logits_of_the_small_models() {
    let golden = Tensors::open("testdata/model/tiny-gpt-oss.safetensors");
    let cases = json("testdata/model/tiny-gpt-oss.json");
    let bf16 = &cases["logits_bf16_model"];
    for (path, case, name) in [
        ("models/tiny-gpt-oss", &cases["logits"]["raw"], "raw.logits"),
        ("models/tiny-gpt-oss", &cases["logits"]["chat"], "chat.logits"),
        ("models/tiny-gpt-oss", &cases["logits"]["long"], "long.logits"),
        ("testdata/tiny-gpt-oss-bf16", bf16, "bf16_model_raw.logits"),
    ] {
        let (tokens, positions) = (ids(&case["ids"]), ids(&case["positions"]));
        let (mut backend, blocks) = backend(path, tokens.len());
        let x = backend.forward(&sequence(&tokens, 0, &blocks), 4, &mut |_, _, _| {}).unwrap();
        let found = backend.logits(&rows(&x, &positions, 256)).unwrap();
        assert_close(&found, &golden.get(name), 1e-5, name);
    }
}

#[test]
fn plans_that_break_a_rule_are_refused() {
    let (mut backend, blocks) = backend(RANDOM, 32);
    let good = sequence(&[1, 2, 3], 0, &blocks);
    for (plan, expected) in [
        (SequencePlan { tokens: vec![], ..good.clone() }, "no tokens"),
        (SequencePlan { tokens: vec![320], ..good.clone() }, "not below 320"),
        (SequencePlan { generated: good.tokens.len() + 1, ..good.clone() }, "more tokens than there are"),
        (SequencePlan { position: 30, ..good.clone() }, "needs 3 blocks"),
        (SequencePlan { position: usize::MAX / 2, ..good.clone() }, "beyond the context"),
        (SequencePlan { full_blocks: vec![9].into(), ..good.clone() }, "not allocated"),
        (SequencePlan { score: Some(Score { next: vec![0; 4], top: 0 }), ..good.clone() }, "do not fit"),
        (SequencePlan { hidden_after_layer: Some(4), ..good.clone() }, "does not exist"),
    ] {
        let error = backend.step(&Plan { sequences: vec![plan] }).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
