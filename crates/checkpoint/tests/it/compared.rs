//! What counts as the same model.

use std::borrow::Cow;

use checkpoint::*;
use half::bf16;

use crate::{assert_identical, mxfp4, nvfp4, odd_config, open};

/// A model with one matrix, or one vector, seen through a function.
struct Changed<F> {
    inner: Synthetic,
    id: MatrixId,
    change: F,
}

impl<F: Fn(&mut Matrix<'_>) + Send + Sync> Weights for Changed<F> {
    fn config(&self) -> &Config {
        self.inner.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.inner.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        let mut matrix = self.inner.matrix(id, expert)?;
        if id == self.id {
            (self.change)(&mut matrix);
        }
        Ok(matrix)
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        self.inner.vector(id)
    }
}

fn changed<F: Fn(&mut Matrix<'_>) + Send + Sync>(inner: Synthetic, id: MatrixId, change: F) -> Changed<F> {
    Changed { inner, id, change }
}

#[test]
fn nvfp4_is_equal_by_codes_and_scales() {
    let id = MatrixKind::GateUp.at(1);
    assert_identical(&nvfp4(), &nvfp4());
    let nudged = changed(nvfp4(), id, |matrix| {
        let Values::Nvfp4 { codes, global_scale, .. } = &mut matrix.values else { panic!() };
        *global_scale = f32::from_bits(global_scale.to_bits() + 1);
        for code in codes.to_mut() {
            // -0 for 0, in either half.
            *code |= if *code & 0x0f == 0 { 0x08 } else { 0 };
            *code |= if *code & 0xf0 == 0 { 0x80 } else { 0 };
        }
    });
    assert_identical(&nvfp4(), &nudged);

    // A block shifted by one binary place up in its scale and down in its codes has the same values.
    let shifted = changed(nvfp4(), id, |matrix| {
        let Values::Nvfp4 { codes, scales, .. } = &mut matrix.values else { panic!() };
        codes.to_mut()[..8].copy_from_slice(&[0x42; 8]);
        scales.to_mut()[0] = 0x60;
    });
    let back = changed(nvfp4(), id, |matrix| {
        let Values::Nvfp4 { codes, scales, .. } = &mut matrix.values else { panic!() };
        codes.to_mut()[..8].copy_from_slice(&[0x64; 8]);
        scales.to_mut()[0] = 0x58;
    });
    assert_identical(&shifted, &back);
}

#[test]
fn differences_are_measured_and_located() {
    let id = MatrixKind::Output.at(2);
    let plain = || Synthetic::new(odd_config(), |_| Format::Bf16, 5);
    let moved = changed(plain(), id, |matrix| {
        let Values::Bf16(values) = &mut matrix.values else { panic!() };
        values.to_mut()[3] += bf16::ONE;
        values.to_mut()[4] = bf16::ZERO;
    });
    let zeroed = changed(plain(), id, |matrix| {
        let Values::Bf16(values) = &mut matrix.values else { panic!() };
        values.to_mut()[4] = bf16::NEG_ZERO;
    });
    let comparison = compare(&moved, &zeroed, None, 2).unwrap();
    let [difference] = comparison.different.as_slice() else { panic!("{comparison:?}") };
    assert_eq!(difference.name, "model.layers.2.self_attn.o_proj.weight");
    assert_eq!(difference.elements, 1);
    assert!((difference.max_abs - 1.0).abs() < 0.01, "{difference:?}");
    let expected = difference.max_abs * difference.max_abs / (96.0 * 144.0);
    assert!((difference.mse - expected).abs() < 1e-12, "{difference:?}");
    assert!(!comparison.identical && comparison.missing.is_empty() && comparison.unknown.is_empty());

    // Root mean square of the difference 1 / sqrt(96 · 144) against 0.018 of the weights: a relative 0.47.
    assert!(!compare(&zeroed, &moved, Some(0.3), 2).unwrap().identical);
    let comparison = compare(&zeroed, &moved, Some(0.7), 2).unwrap();
    assert!(comparison.identical);
    assert_eq!((comparison.within_tolerance[0].elements, comparison.within_tolerance.len()), (1, 1));
}

/// Weights with static scales of one input and of the first layer's cache.
struct Static {
    inner: Synthetic,
    input: Option<f32>,
    cache: Option<f32>,
}

impl Weights for Static {
    fn config(&self) -> &Config {
        self.inner.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.inner.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        self.inner.matrix(id, expert)
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        self.inner.vector(id)
    }
    fn input_scale(&self, id: MatrixId) -> Option<f32> {
        self.input.filter(|_| id == MatrixKind::Query.at(1))
    }
    fn kv_scales(&self, layer: usize) -> Option<KvScales> {
        self.cache.filter(|_| layer == 0).map(|value| KvScales { key: 1.0, value })
    }
}

#[test]
fn static_scales_differ_where_both_models_have_them() {
    let with = |input, cache| Static { inner: nvfp4(), input, cache };
    let names = |found: &[Difference]| found.iter().map(|d| d.name.clone()).collect::<Vec<_>>();
    let (input, cache) =
        ("model.layers.1.self_attn.q_proj.input_scale", "model.layers.0.self_attn.v_proj.v_scale");
    let one = with(Some(0.5), Some(1.0));
    assert_identical(&one, &with(Some(f32::from_bits(0.5f32.to_bits() + 1)), Some(1.0)));

    let found = compare(&one, &with(Some(0.75), Some(1.25)), None, 2).unwrap();
    assert_eq!((found.identical, names(&found.different)), (false, vec![input.to_owned(), cache.to_owned()]));
    let found = compare(&one, &with(Some(0.75), Some(1.25)), Some(0.3), 2).unwrap();
    assert_eq!(names(&found.different), [input]);
    assert_eq!(names(&found.within_tolerance), [cache]);

    let found = compare(&with(None, Some(1.0)), &with(Some(0.5), None), None, 2).unwrap();
    let key = "model.layers.0.self_attn.k_proj.k_scale";
    assert!(found.identical);
    assert_eq!(found.scales_of_one, [input, key, cache]);
}

#[test]
fn a_tolerance_is_relative_to_the_whole_stack() {
    // One of five experts is doubled: relative difference sqrt(1/5).
    let id = MatrixKind::Down.at(0);
    struct OneExpert(Synthetic, MatrixId);
    impl Weights for OneExpert {
        fn config(&self) -> &Config {
            self.0.config()
        }
        fn format(&self, id: MatrixId) -> Format {
            self.0.format(id)
        }
        fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
            let mut matrix = self.0.matrix(id, expert)?;
            if let (true, Values::Mxfp4 { scales, .. }) = ((id, expert) == (self.1, 2), &mut matrix.values) {
                scales.to_mut().iter_mut().for_each(|scale| *scale += 1);
            }
            Ok(matrix)
        }
        fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
            self.0.vector(id)
        }
    }
    let other = OneExpert(mxfp4(), id);
    assert!(!compare(&mxfp4(), &other, Some(0.42), 2).unwrap().identical);
    assert!(compare(&mxfp4(), &other, Some(0.48), 2).unwrap().identical);
}

#[test]
fn what_is_no_number_is_never_equal_to_one() {
    let id = MatrixKind::Router.at(0);
    let with = |value: bf16| {
        changed(nvfp4(), id, move |matrix| {
            let Values::Bf16(values) = &mut matrix.values else { panic!() };
            values.to_mut()[0] = value;
        })
    };
    for (a, b) in [(bf16::NAN, bf16::ONE), (bf16::ONE, bf16::NAN), (bf16::INFINITY, bf16::NEG_INFINITY)] {
        for tolerance in [None, Some(1e9)] {
            let comparison = compare(&with(a), &with(b), tolerance, 2).unwrap();
            assert_eq!((comparison.different.len(), comparison.different[0].elements), (1, 1));
            assert!(comparison.different[0].max_abs.is_infinite());
            let json = serde_json::to_value(&comparison).unwrap();
            assert!(json["different"][0]["mse"].is_null());
        }
    }
    assert_identical(&with(bf16::NAN), &with(bf16::NAN));
}

#[test]
fn models_of_other_shapes_are_described() {
    let more_layers = Config { layer_kinds: vec![LayerKind::Full; 4], ..odd_config() };
    let more = Synthetic::new(more_layers, |_| Format::Bf16, 7);
    let plain = Synthetic::new(odd_config(), |_| Format::Bf16, 7);
    let comparison = compare(&plain, &more, None, 2).unwrap();
    assert_eq!((comparison.missing.len(), comparison.unknown.len()), (0, 17));
    assert!(comparison.unknown.contains(&"model.layers.3.mlp.experts.down_proj".to_owned()));
    assert!(comparison.different.is_empty() && !comparison.identical);
    assert_eq!(compare(&more, &plain, None, 2).unwrap().missing, comparison.unknown);

    let wider = Synthetic::new(Config { vocab_size: 78, ..odd_config() }, |_| Format::Bf16, 7);
    let comparison = compare(&plain, &wider, Some(1e9), 2).unwrap();
    let names: Vec<_> = comparison.different.iter().map(|difference| difference.name.as_str()).collect();
    assert_eq!(names, ["model.embed_tokens.weight", "lm_head.weight"]);
}

#[test]
fn a_trained_model_and_its_rounding_are_close_but_not_identical() {
    let comparison = compare(&open("tiny-gpt-oss-bf16"), &open("../models/tiny-gpt-oss"), None, 2).unwrap();
    assert!(!comparison.identical);
    let threads = compare(&open("tiny-gpt-oss-bf16"), &open("../models/tiny-gpt-oss"), None, 3).unwrap();
    assert_eq!(comparison, threads, "sums do not depend on the order in which threads end");
}

#[test]
fn synthetic_weights_depend_on_the_seed_alone() {
    let id = MatrixKind::Down.at(1);
    let values = |seed, expert| {
        let weights = Synthetic::new(odd_config(), |_| Format::Nvfp4, seed);
        weights.matrix(id, expert).unwrap().to_f32()
    };
    assert_eq!(values(1, 2), values(1, 2));
    assert_ne!(values(1, 2), values(2, 2));
    assert_ne!(values(1, 2), values(1, 3));
    for format in [Format::Bf16, Format::Mxfp4, Format::Nvfp4] {
        let weights = Synthetic::new(odd_config(), move |_| format, 1);
        let values = weights.matrix(id, 0).unwrap().to_f32();
        let rms = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        assert!((0.015..0.03).contains(&rms) && mean.abs() < 0.001, "{format:?}: {rms} {mean}");
    }
    assert!(matches!(
        Synthetic::new(odd_config(), |_| Format::Bf16, 1).vector(VectorKind::Sinks.at(0)).unwrap(),
        Vector::Bf16(Cow::Owned(sinks)) if sinks == [bf16::ZERO; 6]
    ));
}
