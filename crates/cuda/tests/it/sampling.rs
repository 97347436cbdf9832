//! Tokens and log-probabilities of the device beside those that the host finds in the same logits.

use checkpoint::{Matrix, MatrixKind, Values, Vector, VectorId};
use gptoss::{Logprobs, Mask, Penalties, Sampling, Score, SequencePlan, sample, score};

use super::*;

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn ids(&mut self, count: usize, vocabulary: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(vocabulary) as u32).collect()
    }

    fn sampling(&mut self, vocabulary: usize, position: u64) -> Sampling {
        let logprobs = match self.below(3) {
            0 => None,
            _ => Some(Logprobs {
                top: self.pick(&[0, 1, 5, 20, 300]),
                ids: if self.below(3) == 0 { self.ids(4, vocabulary) } else { Vec::new() },
                processed: self.below(2) == 0,
            }),
        };
        let mask = match self.below(4) {
            0 => Some(Mask::of(&self.ids(3, vocabulary))),
            1 => Some(Mask::of(&self.ids(vocabulary / 2, vocabulary))),
            _ => None,
        };
        let mut bias: Vec<(u32, f32)> = Vec::new();
        if self.below(3) == 0 {
            for id in self.ids(40, vocabulary) {
                bias.push((id, self.pick(&[f32::NEG_INFINITY, -3.0, 0.7, 4.0, 9.0])));
            }
            // One token twice, and one that does not exist.
            bias.extend([(bias[0].0, 1.25), (vocabulary as u32 + 3, 1.0)]);
        }
        let penalties = (self.below(3) == 0).then(|| {
            let mut seen = self.ids(200, vocabulary);
            seen.sort_unstable();
            seen.dedup();
            Penalties {
                repetition: self.pick(&[1.0, 1.3, 0.8]),
                frequency: self.pick(&[0.0, 0.6, -0.4]),
                presence: self.pick(&[0.0, 1.1]),
                output: seen.iter().map(|&id| (id, self.below(4) as u32)).filter(|&(_, n)| n > 0).collect(),
                prompt: seen.into(),
            }
        });
        Sampling {
            temperature: self.pick(&[0.0, 0.05, 0.3, 0.7, 1.0, 1.0, 1.0, 1.7, 30.0]),
            top_k: self.pick(&[0, 0, 1, 2, 40, 1000, 5000]),
            top_p: self.pick(&[0.0, 1.0, 0.01, 0.5, 0.9, 0.95, 0.999]),
            min_p: self.pick(&[0.0, 0.0, 0.02, 0.3, 1.0]),
            seed: self.next(),
            position,
            mask,
            bias,
            penalties,
            logprobs,
        }
    }
}

/// Draws after every token of texts, each in another way, with and without scores of the same rows.
fn check_model(cuda: &mut Cuda, vocabulary: usize, rounds: usize, seed: u64) {
    let mut random = Random(seed);
    for round in 0..rounds {
        let text = random.ids(24, vocabulary);
        let samplings: Vec<Sampling> =
            (0..text.len()).map(|i| random.sampling(vocabulary, i as u64)).collect();
        let top = random.pick(&[0, 3, 50]);
        let scored = (round % 2 == 0).then(|| Score { next: random.ids(text.len(), vocabulary), top });
        let plan = SequencePlan {
            logits: true,
            score: scored.clone(),
            sample: samplings.clone(),
            ..sequence(&text, 0, 0)
        };
        let output = run(cuda, vec![plan.clone()]).remove(0);
        let rows: Vec<&[f32]> = output.logits.chunks_exact(vocabulary).collect();
        for (i, sampling) in samplings.iter().enumerate() {
            let what = format!(
                "round {round}, row {i}: {:?}",
                Sampling { mask: None, bias: Vec::new(), penalties: None, ..sampling.clone() }
            );
            assert_eq!(output.sampled[i], sample(&mut rows[i].to_vec(), sampling), "{what}");
            if let Some(scored) = &scored {
                assert_eq!(output.scores[i], score(rows[i], scored.next[i], top, &[]), "{what}");
            }
        }
        // The same without the logits, and bit for bit.
        let alone = SequencePlan { logits: false, ..plan };
        assert_eq!(run(cuda, vec![alone]).remove(0).sampled, output.sampled);
    }
}

#[test]
fn samples_and_scores_are_those_of_the_host() {
    let Some(device) = device() else { return };
    check_model(&mut load(&device, &*odd(Format::Nvfp4)), 331, 40, 1);
    check_model(&mut load(&device, &*open("models/tiny-gpt-oss")), 4096, 40, 2);
    // More tokens than are sorted on the device.
    let config = Config { vocab_size: 20_011, ..odd_config() };
    check_model(&mut load(&device, &Synthetic::new(config, |_| Format::Bf16, 3)), 20_011, 40, 3);
}

#[test]
fn single_tokens_are_drawn_as_in_a_batch() {
    let Some(device) = device() else { return };
    let mut cuda = load(&device, &*open("models/tiny-gpt-oss"));
    let mut random = Random(9);
    for round in 0..30 {
        let sampling = random.sampling(4096, round);
        let plan = SequencePlan {
            logits: true,
            sample: vec![sampling.clone()],
            ..sequence(&[random.below(4096) as u32], 0, 0)
        };
        let output = run(&mut cuda, vec![plan]).remove(0);
        let expected = sample(&mut output.logits.clone(), &sampling);
        assert_eq!(output.sampled[0], expected, "round {round}");
    }
}

#[test]
fn a_mask_may_come_after_the_step_has_begun() {
    let Some(device) = device() else { return };
    let mut cuda = load(&device, &*odd(Format::Bf16));
    let mask = Mask::default();
    let sampling = Sampling { mask: Some(mask.clone()), ..Sampling::default() };
    let plan = SequencePlan { sample: vec![sampling], ..sequence(&[5], 0, 0) };
    let step = std::thread::spawn(move || run(&mut cuda, vec![plan]).remove(0).sampled[0].token);
    mask.set(vec![0, 1 << 9]);
    assert_eq!(step.join().unwrap(), 41);
}

/// Weights whose output layer has the same rows again and again.
struct Repeated {
    weights: Synthetic,
    period: usize,
}

impl Weights for Repeated {
    fn config(&self) -> &Config {
        self.weights.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.weights.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, checkpoint::Error> {
        let matrix = self.weights.matrix(id, expert)?;
        let Matrix { rows, cols, values: Values::Bf16(values) } = matrix else { return Ok(matrix) };
        let period = if id.kind == MatrixKind::Unembedding { self.period } else { rows };
        let values = values[..period * cols].iter().copied().cycle().take(rows * cols).collect();
        Ok(Matrix { rows, cols, values: Values::Bf16(values) })
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, checkpoint::Error> {
        self.weights.vector(id)
    }
}

#[test]
fn of_equal_logits_the_first_is_the_largest() {
    let Some(device) = device() else { return };
    let vocab_size = 128 * 150;
    for period in [8, 1000] {
        let config = Config { vocab_size, ..odd_config() };
        let mut cuda =
            load(&device, &Repeated { weights: Synthetic::new(config, |_| Format::Bf16, 3), period });
        cuda.allocate_kv(256, 256).unwrap();
        for count in [20, 33, 100, 130, 256] {
            let mut outputs = |logits: bool| {
                let one = |s: u32| SequencePlan {
                    logits,
                    sample: vec![Sampling::default()],
                    ..sequence(&[s * 71], 0, s)
                };
                run(&mut cuda, (0..count).map(one).collect())
            };
            // With the logits and without them.
            for (with, without) in outputs(true).iter().zip(outputs(false)) {
                let first = argmax(&with.logits);
                assert!(first < period);
                let tokens = [with, &without].map(|output| output.sampled[0].token as usize);
                assert_eq!(tokens, [first; 2], "{count} tokens, period {period}");
            }
        }
    }
}
