//! Whole models: the tolerances of `testdata/model/README.md` for f32, and equality where equality is promised.

use std::ops::ControlFlow;
use std::sync::Arc;

use checkpoint::{
    Checkpoint, Config, Format, KvScales, Layout, MatrixId, MatrixKind, Synthetic, Target, VectorKind,
    Weights, write,
};
use cpu::{Activations, CacheFormat, Cpu, Isa, Options};
use gptoss::{Backend, Error, Plan, Reference, Rounding, Sampling, Score, SequenceOutput, SequencePlan};
use serde_json::Value;

use crate::models::{DAMAGED, Damaged, NoNumbers, Scaled, golden, ids, json, open, relative, root, sequence};

const BLOCKS: usize = 70;

fn load(weights: Arc<dyn Weights>, options: Options) -> Cpu {
    let mut cpu = Cpu::load(weights, options, &mut |_, _| {}).unwrap();
    cpu.allocate_kv(BLOCKS, BLOCKS).unwrap();
    cpu
}

fn run(backend: &mut dyn Backend, sequences: Vec<SequencePlan>) -> Vec<SequenceOutput> {
    backend.step(&Plan { sequences }).unwrap()
}

#[test]
fn logits_of_the_random_model() {
    let reference = json("testdata/model/reference.json");
    for path in ["testdata/model/hf-mxfp4", "testdata/model/original-mxfp4"] {
        let mut cpu = load(open(path), Options::default());
        for name in ["len1", "len5", "len64", "len200", "repeat40"] {
            let case = &reference["sequences"][name];
            let plan = SequencePlan { logits: true, ..sequence(&ids(&case["ids"]), 0, 2) };
            let logits = run(&mut cpu, vec![plan]).remove(0).logits;
            let found: Vec<f32> = ids(&case["hidden_positions"])
                .iter()
                .flat_map(|&p| &logits[p as usize * 320..][..320])
                .copied()
                .collect();
            let expected = golden("testdata/model/reference.safetensors", &format!("{name}.logits"));
            let error = relative(&found, &expected);
            assert!(error <= 1e-5, "{path} {name}: {error:e}");
        }
    }
}

#[test]
fn greedy_continuations_of_both_models() {
    let reference = json("testdata/model/reference.json");
    let mut cpu = load(open("testdata/model/hf-mxfp4"), Options::default());
    for name in ["len1", "len5", "len64", "len200", "repeat40"] {
        let expected = ids(&reference["greedy"][name]["tokens"]);
        let found = greedy(&mut cpu, &ids(&reference["sequences"][name]["ids"]), expected.len());
        assert_eq!(found, expected, "{name}");
    }
    let prompts = json("testdata/model/tiny-gpt-oss.json")["prompts"].clone();
    let prompts: Vec<(String, Value)> = match prompts {
        Value::Object(map) => map.into_iter().collect(),
        Value::Array(list) => list.into_iter().map(|p| (p["name"].to_string(), p)).collect(),
        other => panic!("{other}"),
    };
    assert_eq!(prompts.len(), 10);
    let mut cpu = load(open("models/tiny-gpt-oss"), Options::default());
    for (name, prompt) in prompts {
        let expected = ids(&prompt["greedy"]);
        // Equal to the first stop, and after it until two logits lie within 2e-3.
        let stop = prompt["first_stop"].as_u64().map_or(0, |at| at as usize + 1);
        let near = prompt["margins"].as_array().unwrap().iter().position(|m| m.as_f64().unwrap() < 2e-3);
        let len = near.unwrap_or(expected.len()).max(stop);
        assert_eq!(greedy(&mut cpu, &ids(&prompt["ids"]), len), expected[..len], "{name}");
    }
}

fn greedy(cpu: &mut Cpu, prompt: &[u32], count: usize) -> Vec<u32> {
    let (mut tokens, mut position, mut found) = (prompt.to_vec(), 0, Vec::new());
    // Blocks for the whole of it, so that the table does not change on the way.
    let table = sequence(&vec![0; prompt.len() + count], 0, 1);
    for _ in 0..count {
        let sample = vec![Sampling::default()];
        let plan = SequencePlan { tokens: tokens.clone(), position, sample, ..table.clone() };
        position += tokens.len();
        tokens = vec![run(cpu, vec![plan]).remove(0).sampled[0].token];
        found.extend(&tokens);
    }
    found
}

#[test]
fn logits_and_logprobs_of_the_small_models() {
    let cases = json("testdata/model/tiny-gpt-oss.json");
    for (path, case, name) in [
        ("models/tiny-gpt-oss", &cases["logits"]["long"], "long.logits"),
        ("testdata/tiny-gpt-oss-bf16", &cases["logits_bf16_model"], "bf16_model_raw.logits"),
    ] {
        let mut cpu = load(open(path), Options::default());
        let plan = SequencePlan { logits: true, ..sequence(&ids(&case["ids"]), 0, 0) };
        let logits = run(&mut cpu, vec![plan]).remove(0).logits;
        let found: Vec<f32> = ids(&case["positions"])
            .iter()
            .flat_map(|&p| &logits[p as usize * 4096..][..4096])
            .copied()
            .collect();
        let error = relative(&found, &golden("testdata/model/tiny-gpt-oss.safetensors", name));
        assert!(error <= 1e-5, "{name}: {error:e}");
    }
}

/// Odd shapes: widths that are no multiple of 64, heads of 24, 5 experts, and each format.
fn odd(format: Format) -> Arc<dyn Weights> {
    let pick = move |id: MatrixId| if id.kind.is_expert() { format } else { Format::Bf16 };
    Arc::new(Synthetic::new(odd_config(), pick, 7))
}

fn odd_config() -> Config {
    let mut config = Config::gpt_oss_20b();
    config.hidden_size = 96;
    config.intermediate_size = 160;
    config.query_heads = 6;
    config.kv_heads = 2;
    config.head_dim = 24;
    config.experts = 5;
    config.experts_per_token = 3;
    config.vocab_size = 331;
    config.sliding_window = 20;
    config.layer_kinds.truncate(3);
    config
}

/// The same for activations in NVFP4 and a cache in E4M3.
fn scaled(weights: Arc<dyn Weights>) -> Arc<dyn Weights> {
    Arc::new(Scaled {
        weights,
        cache: Some(KvScales { key: 0.02, value: 0.005 }),
        input: |_| Some(4.0 / 2688.0),
    })
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 31 + 7 * i) % 331).collect()
}

#[test]
fn odd_shapes_agree_with_the_reference() {
    for format in [Format::Bf16, Format::Mxfp4, Format::Nvfp4] {
        let mut reference = Reference::new(odd(format));
        reference.allocate_kv(BLOCKS, BLOCKS).unwrap();
        let plan = SequencePlan { logits: true, ..sequence(&tokens(75), 0, 4) };
        let expected = run(&mut reference, vec![plan.clone()]).remove(0).logits;
        let found = run(&mut load(odd(format), Options::default()), vec![plan]).remove(0).logits;
        let error = relative(&found, &expected);
        assert!(error <= 1e-5, "{format:?}: {error:e}");
    }
}

#[test]
fn experts_that_lie_input_by_input_give_the_same_bits() {
    let source = Checkpoint::open(&root("testdata/model/hf-mxfp4")).unwrap();
    let pick = |id: MatrixId| if id.kind.is_expert() { Format::Nvfp4 } else { Format::Bf16 };
    let made_up = Arc::new(Synthetic::new(source.config().clone(), pick, 3));
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("turned");
    let target = Target::new(source.config_json().clone(), Layout::ModelOpt);
    write(&*made_up, &target, &out, &mut |_| ControlFlow::Continue(())).unwrap();
    let turned = Arc::new(Checkpoint::open(&out).unwrap());
    assert!(turned.by_inputs(MatrixKind::GateUp.at(0), 0).unwrap().is_some());
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let options = Options { isa: Some(isa), ..Options::default() };
        let plan = SequencePlan { logits: true, ..sequence(&tokens(20), 0, 2) };
        let expected = run(&mut load(made_up.clone(), options), vec![plan.clone()]).remove(0).logits;
        let found = run(&mut load(turned.clone(), options), vec![plan]).remove(0).logits;
        assert_eq!(found, expected, "{isa:?}");
    }
}

#[test]
fn coarser_activations_weights_and_caches_stay_near() {
    // Twice the error that each had when it was written: a wrong scale or limb is far beyond.
    for (activations, fast_weights, cache, bound) in [
        (Activations::Int16, false, CacheFormat::F32, 6e-5),
        (Activations::Bf16, false, CacheFormat::F32, 4.4e-3),
        (Activations::Int8, false, CacheFormat::F32, 1.3e-2),
        (Activations::F32, true, CacheFormat::F32, 1.5e-2),
        (Activations::Int8, true, CacheFormat::F32, 2.3e-2),
        (Activations::F32, false, CacheFormat::Bf16, 5e-3),
        (Activations::F32, false, CacheFormat::E4m3, 4e-2),
    ] {
        let options = Options { activations, fast_weights, cache, ..Options::default() };
        let mut cpu = load(open("models/tiny-gpt-oss"), options);
        let case = &json("testdata/model/tiny-gpt-oss.json")["logits"]["long"];
        let plan = SequencePlan { logits: true, ..sequence(&ids(&case["ids"]), 0, 0) };
        let logits = run(&mut cpu, vec![plan]).remove(0).logits;
        let found: Vec<f32> = ids(&case["positions"])
            .iter()
            .flat_map(|&p| &logits[p as usize * 4096..][..4096])
            .copied()
            .collect();
        let error = relative(&found, &golden("testdata/model/tiny-gpt-oss.safetensors", "long.logits"));
        let case = format!("{activations:?}, fast {fast_weights}, {cache:?} cache");
        assert!(error <= bound, "{case}: {error:e}");
        assert!(error >= bound / 10.0, "{case} took another road: {error:e}");
    }
}

/// What is rounded to NVFP4 or E4M3 is not what it would be without; two backends round the same but for what lies at the middle of two
/// numbers, so they are much nearer to each other than either is to what is not rounded.
#[test]
fn inputs_and_caches_are_rounded_as_the_reference_does() {
    for (inputs, cache, formats) in [
        (true, false, &[Format::Nvfp4][..]),
        (false, true, &[Format::Nvfp4, Format::Bf16]),
        (true, true, &[Format::Nvfp4]),
    ] {
        for &format in formats {
            let weights = scaled(odd(format));
            let plan = SequencePlan { logits: true, ..sequence(&tokens(75), 0, 4) };
            let reference = |rounding| {
                let mut reference = Reference::new(Arc::clone(&weights)).rounding(rounding);
                reference.allocate_kv(BLOCKS, BLOCKS).unwrap();
                run(&mut reference, vec![plan.clone()]).remove(0).logits
            };
            let expected = reference(Rounding { inputs, cache });
            let effect = relative(&expected, &reference(Rounding::default()));
            let options = Options {
                activations: if inputs { Activations::Nvfp4 } else { Activations::F32 },
                cache: if cache { CacheFormat::E4m3 } else { CacheFormat::F32 },
                ..Options::default()
            };
            let mut cpu = load(Arc::clone(&weights), options);
            // Two products of the experts in each of three layers.
            assert_eq!(cpu.rounded_inputs(), if inputs { 6 } else { 0 });
            let error = relative(&run(&mut cpu, vec![plan.clone()]).remove(0).logits, &expected);
            let case = format!("{format:?}, inputs {inputs}, cache {cache}: {error:e} of {effect:e}");
            assert!(effect > 1e-3, "{case}");
            assert!(error < effect / 20.0, "{case}");
        }
    }
}

/// Activations that are no numbers would be numbers in NVFP4.
#[test]
fn inputs_that_are_no_numbers_are_not_rounded() {
    // The experts' alone, and every matrix that what is no number could pass.
    let pick = |id: MatrixId| if id.kind == MatrixKind::Embedding { Format::Bf16 } else { Format::Nvfp4 };
    let all = Synthetic::new(odd_config(), pick, 7);
    for weights in [odd(Format::Nvfp4), Arc::new(all)] {
        let weights = scaled(Arc::new(Damaged(weights)));
        let plan = SequencePlan { sample: vec![Sampling::default()], ..sequence(&[1, DAMAGED], 0, 0) };
        let options = Options { activations: Activations::Nvfp4, ..Options::default() };
        let mut cpu = load(Arc::clone(&weights), options);
        assert!(run(&mut cpu, vec![plan.clone()]).remove(0).corrupted);
        let mut reference = Reference::new(weights).rounding(Rounding { inputs: true, cache: false });
        reference.allocate_kv(BLOCKS, BLOCKS).unwrap();
        assert!(run(&mut reference, vec![plan]).remove(0).corrupted, "the reference");
    }
    let mut values: Vec<f32> = (0..48).map(|i| i as f32 * 0.11).collect();
    (values[3], values[20]) = (f32::NAN, f32::NEG_INFINITY);
    let mut rounded = vec![0.0; 48];
    numerics::nvfp4::fake_quantize_activations(&values, 4.0 / 2688.0, &mut rounded);
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&rounded[..32]), bits(&values[..32]));
    assert_ne!(bits(&rounded[32..]), bits(&values[32..]));
}

/// Query, key and value have the same input.
#[test]
fn different_input_scales_of_query_key_and_value_are_an_error() {
    let weights: Arc<dyn Weights> = Arc::new(Synthetic::new(odd_config(), |_| Format::Nvfp4, 7));
    let load = |activations| {
        let options = Options { activations, ..Options::default() };
        let input = |id: MatrixId| Some(if id.kind == MatrixKind::Key { 2.0 } else { 1.0 });
        let weights = Scaled { weights: Arc::clone(&weights), cache: None, input };
        Cpu::load(Arc::new(weights), options, &mut |_, _| {})
    };
    assert!(load(Activations::F32).is_ok());
    let error = load(Activations::Nvfp4).err().unwrap().to_string();
    assert!(error.contains("layer 0: expected one input scale for query, key and value"), "{error}");
}

#[test]
fn the_same_bits_on_every_instruction_set_and_thread_count() {
    for (format, activations, fast_weights, cache) in [
        (Format::Bf16, Activations::F32, false, CacheFormat::F32),
        (Format::Bf16, Activations::F32, true, CacheFormat::Bf16),
        (Format::Mxfp4, Activations::F32, false, CacheFormat::E4m3),
        (Format::Nvfp4, Activations::F32, false, CacheFormat::F32),
        (Format::Nvfp4, Activations::Int16, true, CacheFormat::Bf16),
        (Format::Nvfp4, Activations::Int8, true, CacheFormat::Bf16),
        (Format::Bf16, Activations::Bf16, false, CacheFormat::F32),
        (Format::Mxfp4, Activations::Bf16, false, CacheFormat::F32),
        (Format::Nvfp4, Activations::Bf16, true, CacheFormat::Bf16),
        (Format::Nvfp4, Activations::Nvfp4, false, CacheFormat::E4m3),
    ] {
        let plan = SequencePlan { logits: true, ..sequence(&tokens(40), 0, 0) };
        let logits = |isa, threads| {
            let options =
                Options { isa: Some(isa), threads: Some(threads), fast_weights, activations, cache };
            run(&mut load(scaled(odd(format)), options), vec![plan.clone()]).remove(0).logits
        };
        let expected = logits(Isa::Scalar, 1);
        assert!(expected.iter().all(|l| l.is_finite()));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for threads in [1, 2, 5] {
                let found = logits(isa, threads);
                assert!(
                    found == expected,
                    "{format:?}, {activations:?}, fast {fast_weights} on {isa:?} with {threads} threads"
                );
            }
        }
    }
}

#[test]
fn the_same_bits_whatever_the_chunks_and_the_company() {
    for (activations, fast_weights, cache) in [
        (Activations::F32, false, CacheFormat::F32),
        (Activations::Bf16, false, CacheFormat::F32),
        (Activations::Int8, true, CacheFormat::Bf16),
        (Activations::Nvfp4, false, CacheFormat::E4m3),
    ] {
        let options = Options { activations, fast_weights, cache, ..Options::default() };
        cuts_and_company(&mut load(scaled(odd(Format::Nvfp4)), options));
    }
}

fn cuts_and_company(cpu: &mut Cpu) {
    let text = tokens(90);
    let plan = |from: usize, to: usize| SequencePlan {
        logits: true,
        score: Some(Score { next: text[from + 1..(to + 1).min(90)].to_vec(), top: 2 }),
        sample: (from + 1..=to)
            .map(|at| Sampling { temperature: 1.0, seed: 5, position: at as u64, ..Sampling::default() })
            .collect(),
        tokens: text[from..to].to_vec(),
        position: from,
        // The same blocks whatever the chunk.
        ..sequence(&text, 0, 20)
    };
    let whole = run(cpu, vec![plan(0, 90)]).remove(0);
    for cuts in [vec![0, 1, 2, 3, 90], vec![0, 16, 32, 48, 90], vec![0, 33, 89, 90]] {
        let (mut logits, mut scores, mut sampled) = (Vec::new(), Vec::new(), Vec::new());
        for pair in cuts.windows(2) {
            // Strangers before and behind, each with blocks of its own.
            let company = |first, count| SequencePlan {
                sample: vec![Sampling::default()],
                ..sequence(&tokens(count), 0, first)
            };
            let mut outputs = run(cpu, vec![company(0, 5), plan(pair[0], pair[1]), company(50, 70)]);
            let own = outputs.remove(1);
            logits.extend(own.logits);
            scores.extend(own.scores);
            sampled.extend(own.sampled);
        }
        assert!(logits == whole.logits, "{cuts:?}");
        assert_eq!(scores, whole.scores, "{cuts:?}");
        assert_eq!(sampled, whole.sampled, "{cuts:?}");
    }
}

/// Rows of several sequences are scored together, each as it would be alone.
#[test]
fn scored_rows_share_the_output_layer() {
    let mut cpu = load(odd(Format::Nvfp4), Options::default());
    let plan = |first: u32| {
        let text = [first, first + 20, first + 40];
        let score = Some(Score { next: text[1..].to_vec(), top: 3 });
        SequencePlan { score, logits: first == 5, ..sequence(&text[..2], 0, first) }
    };
    let alone: Vec<SequenceOutput> = (0..8).map(|s| run(&mut cpu, vec![plan(s)]).remove(0)).collect();
    assert!(alone.iter().all(|output| output.scores.len() == 2 && !output.corrupted));
    let (together, timings) = cpu.profile(&Plan { sequences: (0..8).map(plan).collect() }).unwrap();
    assert!(together == alone);
    let count = |phase| timings.iter().find(|timing| timing.kernel == phase).map(|timing| timing.count);
    assert_eq!((count("output layer"), count("scoring"), count("sampling")), (Some(1), Some(1), None));
}

/// Of the tokens that nobody asks about the last layer has keys and values alone, which is nothing that anybody sees.
#[test]
fn the_same_bits_whichever_tokens_are_asked_about() {
    for (activations, fast_weights, cache) in [
        (Activations::F32, false, CacheFormat::F32),
        (Activations::Int8, true, CacheFormat::Bf16),
        (Activations::Nvfp4, false, CacheFormat::E4m3),
    ] {
        let options = Options { activations, fast_weights, cache, ..Options::default() };
        let mut cpu = load(scaled(odd(Format::Nvfp4)), options);
        let (text, vocabulary) = (tokens(60), 331);
        let drawn = |at: usize| Sampling { temperature: 1.0, position: at as u64, ..Sampling::default() };
        let score = |count: usize| Some(Score { next: text[1..=count].to_vec(), top: 1 });
        let plan = |asked: SequencePlan| SequencePlan { tokens: text[..59].to_vec(), ..asked };
        let blocks = |first| sequence(&text, 0, first);
        let whole = plan(SequencePlan {
            logits: true,
            score: score(59),
            sample: (0..59).map(drawn).collect(),
            hidden_after_layer: Some(2),
            ..blocks(0)
        });
        let whole = run(&mut cpu, vec![whole]).remove(0);
        let next =
            |first| SequencePlan { logits: true, tokens: vec![text[59]], position: 59, ..blocks(first) };
        let after = run(&mut cpu, vec![next(0)]).remove(0);
        let some = vec![
            plan(SequencePlan { sample: vec![drawn(58)], ..blocks(4) }),
            plan(SequencePlan { score: score(3), sample: vec![drawn(57), drawn(58)], ..blocks(8) }),
            plan(blocks(12)),
            plan(SequencePlan { logits: true, ..blocks(16) }),
            plan(SequencePlan { hidden_after_layer: Some(1), score: score(59), ..blocks(20) }),
            plan(SequencePlan { hidden_after_layer: Some(2), ..blocks(24) }),
        ];
        let found = run(&mut cpu, some.clone());
        for ((asked, found), first) in some.iter().zip(&found).zip((4..).step_by(4)) {
            assert_eq!(found.sampled, whole.sampled[59 - asked.sample.len()..], "{first}");
            let scored = asked.score.as_ref().map_or(0, |score| score.next.len());
            assert_eq!(found.scores, whole.scores[..scored], "{first}");
            assert!(
                found.logits == whole.logits[..if asked.logits { 59 * vocabulary } else { 0 }],
                "{first}"
            );
            assert!(run(&mut cpu, vec![next(first)]).remove(0) == after, "{first}");
        }
        assert!(found[5].hidden == whole.hidden && found[4].hidden.len() == whole.hidden.len());
        // A step that nobody asks anything.
        run(&mut cpu, vec![plan(blocks(40))]);
        assert!(run(&mut cpu, vec![next(40)]).remove(0) == after);
    }
}

/// The positions before a single token are looked at in parts when they are many, those before the tokens of a prompt are not.
#[test]
fn the_same_bits_deep_in_a_context() {
    const COUNT: usize = 2070;
    let text = tokens(COUNT);
    let mut cpu = load(odd(Format::Mxfp4), Options { threads: Some(2), ..Options::default() });
    cpu.allocate_kv(COUNT.div_ceil(16), COUNT.div_ceil(16)).unwrap();
    let plan = |from: usize| SequencePlan { logits: true, ..sequence(&text[from..], from, 0) };
    let mut last = |from: usize| {
        let logits = run(&mut cpu, vec![plan(from)]).remove(0).logits;
        logits[logits.len() - 331..].to_vec()
    };
    let expected = last(0);
    assert!(last(COUNT - 1) == expected);

    // Also beside shorter ones, which are looked at as wholes.
    let mut cpu = load(odd(Format::Mxfp4), Options { threads: Some(8), ..Options::default() });
    let blocks = COUNT.div_ceil(16);
    cpu.allocate_kv(blocks + 6, blocks + 6).unwrap();
    run(&mut cpu, vec![plan(0)]);
    let short = |s: usize| SequencePlan { logits: true, ..sequence(&text[s..s + 9], 0, (blocks + s) as u32) };
    let alone: Vec<SequenceOutput> = (0..6).map(|s| run(&mut cpu, vec![short(s)]).remove(0)).collect();
    let mut found = run(&mut cpu, (0..6).map(short).chain([plan(COUNT - 1)]).collect());
    assert!(found.pop().unwrap().logits == expected);
    assert!(found == alone);
}

/// Of the sequences of the plan and of no other; of sliding layers what the window reaches.
#[test]
fn keys_and_values_can_be_made_zeros() {
    for cache in [CacheFormat::F32, CacheFormat::Bf16, CacheFormat::E4m3] {
        let mut cpu = load(odd(Format::Nvfp4), Options { cache, ..Options::default() });
        let plan = |first| SequencePlan { logits: true, ..sequence(&[5], 40, first) };
        let zeros = run(&mut cpu, vec![plan(4)]).remove(0).logits;
        run(&mut cpu, vec![sequence(&tokens(40), 0, 4), sequence(&tokens(40), 0, 20)]);
        let written = run(&mut cpu, vec![plan(4)]).remove(0).logits;
        assert!(written != zeros);
        cpu.clear_kv(&Plan { sequences: vec![plan(4)] }).unwrap();
        assert!(run(&mut cpu, vec![plan(4)]).remove(0).logits == zeros, "{cache:?}");
        assert!(run(&mut cpu, vec![plan(20)]).remove(0).logits == written, "{cache:?}");
    }
}

#[test]
fn logits_that_are_no_numbers_are_told_of_the_sequence_that_has_them() {
    for activations in [Activations::F32, Activations::Int16, Activations::Int8] {
        let mut cpu =
            load(Arc::new(Damaged(odd(Format::Nvfp4))), Options { activations, ..Options::default() });
        let sampled = |tokens: &[u32], first| {
            let sample = vec![Sampling { temperature: 1.0, top_k: 3, ..Sampling::default() }];
            SequencePlan { sample, ..sequence(tokens, 0, first) }
        };
        let scored = |tokens: &[u32], first| {
            let score = Some(Score { next: tokens[1..].to_vec(), top: 1 });
            SequencePlan { score, ..sequence(tokens, 0, first) }
        };
        let (healthy, damaged) = ([1, 2, 3], [1, DAMAGED, 3]);
        let plans =
            vec![sampled(&healthy, 0), sampled(&damaged, 1), scored(&healthy, 2), scored(&damaged, 3)];
        let found: Vec<bool> = run(&mut cpu, plans).iter().map(|output| output.corrupted).collect();
        assert_eq!(found, [false, true, false, true], "{activations:?}");
        // What it left in its block reaches nobody who has the block after it.
        let after = run(&mut cpu, vec![sampled(&[1], 1), scored(&healthy, 3)]);
        assert!(after.iter().all(|output| !output.corrupted), "{activations:?}");
    }
}

/// A weight that is no number makes the logits no numbers, whichever tensor it is in: nothing on the way takes it for a number.
#[test]
fn weights_that_are_no_numbers_are_not_lost() {
    let matrices = [MatrixKind::Embedding, MatrixKind::Unembedding].into_iter().chain(MatrixKind::LAYER);
    let vectors = VectorKind::LAYER.into_iter().chain([VectorKind::FinalNorm]);
    let kinds: Vec<(Option<MatrixKind>, Option<VectorKind>)> =
        matrices.map(|kind| (Some(kind), None)).chain(vectors.map(|kind| (None, Some(kind)))).collect();
    let tokens = [0, 1, 2, 3];
    for (matrix, vector) in kinds {
        for row in [0, 1] {
            let weights = || Arc::new(NoNumbers { weights: odd(Format::Bf16), matrix, vector, row });
            let case = format!("{matrix:?} {vector:?} {row}");
            // Of the token that was damaged, if it is one.
            let plan =
                || SequencePlan { sample: vec![Sampling::default()], ..sequence(&tokens[..=row], 0, 0) };
            let mut reference = Reference::new(weights());
            reference.allocate_kv(1, 1).unwrap();
            assert!(run(&mut reference, vec![plan()])[0].corrupted, "the reference, {case}");
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                for (activations, fast_weights, cache) in [
                    (Activations::F32, false, CacheFormat::F32),
                    (Activations::Int16, true, CacheFormat::Bf16),
                    (Activations::Int8, true, CacheFormat::F32),
                    (Activations::Bf16, false, CacheFormat::Bf16),
                    (Activations::F32, false, CacheFormat::E4m3),
                ] {
                    let options =
                        Options { isa: Some(isa), threads: Some(1), fast_weights, cache, activations };
                    let mut cpu = Cpu::load(weights(), options, &mut |_, _| {}).unwrap();
                    cpu.allocate_kv(1, 1).unwrap();
                    let output = run(&mut cpu, vec![plan()]).remove(0);
                    assert!(output.corrupted, "{isa:?}, {activations:?}, {case}");
                }
            }
        }
    }
}

/// Weights and cache are told apart, and only for the cache a smaller one is an answer.
#[test]
fn what_memory_is_missing_for_is_said() {
    let error = load(odd(Format::Bf16), Options::default()).allocate_kv(usize::MAX / 2, 1).err().unwrap();
    assert!(matches!(error, Error::Memory { .. }));
    assert!(error.to_string().starts_with("not enough memory for the key/value cache: needed "), "{error}");

    // More than there are addresses: 2 bytes for each of 144 rows of so many columns.
    let config = Config { hidden_size: 1 << 40, ..odd_config() };
    let weights = Synthetic::new(config, |_| Format::Bf16, 7);
    let error = Cpu::load(Arc::new(weights), Options::default(), &mut |_, _| {}).err().unwrap();
    let expected = "not enough memory for the weights Query of layer 0: needed 316659348799488 bytes";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_plan_without_sequences_gives_nothing() {
    assert_eq!(run(&mut load(odd(Format::Nvfp4), Options::default()), vec![]), []);
}

#[test]
fn an_unavailable_instruction_set_and_a_bad_plan_are_errors() {
    let mut cpu =
        load(odd(Format::Bf16), Options { isa: Some(Isa::Scalar), threads: Some(1), ..Options::default() });
    let mut bad = sequence(&[1], 0, 0);
    bad.full_blocks = vec![BLOCKS as u32].into();
    assert!(cpu.step(&Plan { sequences: vec![bad] }).is_err());
    assert!(cpu.allocate_kv(usize::MAX / 2, 1).is_err());
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        let options = Options { isa: Some(isa), ..Options::default() };
        assert!(Cpu::load(odd(Format::Bf16), options, &mut |_, _| {}).is_err());
    }
}
