//! Views over the small model and over made-up weights.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use checkpoint::{
    Config, Error, Format, Matrix, MatrixId, MatrixKind, Synthetic, Values, Vector, VectorId, VectorKind,
    Weights, compare,
};
use half::bf16;
use quantize::{Algorithm, Method, Options, Quantized, Recipe, ScalesPer};

use crate::{nvfp4, open, view};

const SMALL: &str = "models/tiny-gpt-oss";

#[test]
fn every_block_of_the_small_model_is_cast_without_loss_and_back() {
    let cast = Arc::new(view(open(SMALL), nvfp4(Recipe::Experts, Algorithm::Auto)));
    let counts = cast.cast_counts();
    assert_eq!((counts.blocks, counts.lossless_blocks, counts.changed_values), (393_216, 393_216, 0));
    assert!(compare(&*cast, &*open(SMALL), None, 2).unwrap().identical);
    let back = view(Arc::clone(&cast) as Arc<dyn Weights>, Options::Mxfp4);
    assert_eq!(back.format(MatrixKind::Down.at(1)), Format::Mxfp4);
    assert!(compare(&back, &*open(SMALL), None, 2).unwrap().identical);
    let upcast = view(cast, Options::Bf16);
    assert!(compare(&upcast, &*open(SMALL), None, 2).unwrap().identical);
    assert!(upcast.report().iter().all(|t| t.totals.unwrap().changed == 0 && t.format == Format::Bf16));
}

#[test]
fn max_changes_values_and_reports_the_error() {
    let max = view(open(SMALL), nvfp4(Recipe::All, Algorithm::Max));
    let comparison = compare(&max, &*open(SMALL), None, 2).unwrap();
    // Two stacks and four projections in each of four layers, and the output layer.
    assert_eq!(comparison.different.len(), 4 * 6 + 1);
    assert_eq!(max.cast_counts().blocks, 0);
    for tensor in max.report() {
        let totals = tensor.totals.unwrap();
        if tensor.method == Method::Max {
            let sqnr = totals.sqnr_db();
            assert!(totals.changed > 0 && (15.0..40.0).contains(&sqnr), "{tensor:?}: {sqnr}");
        } else {
            assert_eq!(totals.values, 0);
        }
    }
}

#[test]
fn the_error_of_what_was_not_read_whole_is_not_known() {
    let max = view(open(SMALL), nvfp4(Recipe::Experts, Algorithm::Max));
    let stack = MatrixKind::Down.at(1);
    let totals = || max.report().iter().find(|t| t.id == stack).unwrap().totals;
    assert_eq!(totals(), None);
    let (experts, ..) = stack.kind.shape(max.config());
    for expert in 0..experts {
        assert_eq!(totals(), None, "{expert} of {experts}");
        max.matrix(stack, expert).unwrap();
    }
    assert!(totals().unwrap().changed > 0);
    // What stays as it is need not be read for that.
    let cast = view(open(SMALL), nvfp4(Recipe::Experts, Algorithm::Cast));
    assert!(cast.report().iter().all(|t| t.totals.unwrap().changed == 0));
}

#[test]
fn searched_scales_lower_the_error_and_leave_the_cast_alone() {
    let error = |algorithm| {
        let view = view(open("testdata/tiny-gpt-oss-bf16"), nvfp4(Recipe::Linear, algorithm));
        for id in checkpoint::matrices(view.config()) {
            for expert in 0..id.kind.shape(view.config()).0 {
                view.matrix(id, expert).unwrap().values.check_scales("searched").unwrap();
            }
        }
        view.report().iter().map(|t| t.totals.unwrap().squared_error).sum::<f64>()
    };
    let (max, mse, four) = (error(Algorithm::Max), error(Algorithm::Mse), error(Algorithm::FourOverSix));
    assert!(mse < 0.85 * max && four < 0.92 * max && mse < four, "{max} {mse} {four}");
    for algorithm in [Algorithm::Mse, Algorithm::FourOverSix] {
        let cast = view(open(SMALL), nvfp4(Recipe::Experts, algorithm));
        assert!(compare(&cast, &*open(SMALL), None, 2).unwrap().identical);
    }
}

#[test]
fn query_key_and_value_share_their_global_scale() {
    let max = view(open("testdata/tiny-gpt-oss-bf16"), nvfp4(Recipe::Linear, Algorithm::Mse));
    let scale = |kind: MatrixKind| match max.matrix(kind.at(2), 0).unwrap().values {
        Values::Nvfp4 { global_scale, .. } => global_scale,
        other => panic!("{:?}", other.format()),
    };
    assert_eq!(scale(MatrixKind::Query), scale(MatrixKind::Key));
    assert_eq!(scale(MatrixKind::Query), scale(MatrixKind::Value));
    assert_ne!(scale(MatrixKind::Query), scale(MatrixKind::Output));
}

/// Made-up weights in which one matrix, or also a vector, was replaced.
struct With {
    rest: Synthetic,
    id: MatrixId,
    values: Values<'static>,
    vector: Option<(VectorId, bf16)>,
}

impl Weights for With {
    fn config(&self) -> &Config {
        self.rest.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        if id == self.id { self.values.format() } else { self.rest.format(id) }
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        if id != self.id {
            return self.rest.matrix(id, expert);
        }
        let (_, rows, cols) = id.kind.shape(self.config());
        Ok(Matrix { rows, cols, values: self.values.clone() })
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        match self.vector {
            Some((own, value)) if own == id => {
                let (n, length) = id.kind.shape(self.config());
                Ok(Vector::Bf16(Cow::Owned(vec![value; n * length])))
            }
            _ => self.rest.vector(id),
        }
    }
}

fn config() -> Config {
    let mut config = Config::gpt_oss_20b();
    (config.hidden_size, config.intermediate_size) = (64, 96);
    (config.query_heads, config.kv_heads, config.head_dim) = (2, 1, 16);
    (config.experts, config.experts_per_token, config.vocab_size) = (3, 2, 50);
    config.layer_kinds.truncate(1);
    config
}

fn with(id: MatrixId, values: impl FnOnce(usize, usize) -> Values<'static>) -> Arc<With> {
    let (_, rows, cols) = id.kind.shape(&config());
    let rest = Synthetic::new(config(), |_| Format::Bf16, 3);
    Arc::new(With { rest, id, values: values(rows, cols), vector: None })
}

/// Made-up weights with one vector of this value.
fn with_vector(id: VectorId, value: bf16) -> Arc<With> {
    let rest = Synthetic::new(config(), |_| Format::Bf16, 3);
    let values = rest.matrix(MatrixKind::Router.at(0), 0).unwrap().values;
    let Values::Bf16(values) = values else { panic!("BF16 was asked for") };
    let values = Values::Bf16(Cow::Owned(values.into_owned()));
    Arc::new(With { rest, id: MatrixKind::Router.at(0), values, vector: Some((id, value)) })
}

#[test]
fn kept_query_key_and_value_share_their_global_scale_or_are_refused() {
    let key = |scale: u8, global_scale: f32, rest: fn(MatrixId) -> Format| {
        let id = MatrixKind::Key.at(0);
        let (_, rows, cols) = id.kind.shape(&config());
        let values = Values::Nvfp4 {
            codes: Cow::Owned(vec![0x21; rows * cols / 2]),
            scales: Cow::Owned(vec![scale; rows * cols / 16]),
            global_scale,
        };
        Arc::new(With { rest: Synthetic::new(config(), rest, 3), id, values, vector: None })
    };
    let packed = |id: MatrixId| if id.kind.is_attention() { Format::Nvfp4 } else { Format::Bf16 };
    let global_scale =
        |weights: &dyn Weights, kind: MatrixKind| match weights.matrix(kind.at(0), 0).unwrap().values {
            Values::Nvfp4 { global_scale, .. } => global_scale,
            other => panic!("{:?}", other.format()),
        };
    let source = key(0x38, 1.0, packed);
    let largest = global_scale(&*source, MatrixKind::Query);
    let options = nvfp4(Recipe::Linear, Algorithm::Mse);
    let source = key(0x38, largest / 4.0, packed);
    let shared = view(Arc::clone(&source) as Arc<dyn Weights>, options);
    for kind in [MatrixKind::Query, MatrixKind::Key, MatrixKind::Value] {
        assert_eq!(global_scale(&shared, kind), largest, "{kind:?}");
        let values = |weights: &dyn Weights| weights.matrix(kind.at(0), 0).unwrap().to_f32();
        assert_eq!(values(&shared), values(&*source), "{kind:?}");
    }
    // The smallest scale of E4M3 has no quarter; 3 is no power of two; what is new has another scale.
    let mixed = |id: MatrixId| if id.kind == MatrixKind::Query { Format::Nvfp4 } else { Format::Bf16 };
    for source in
        [key(0x01, largest / 4.0, packed), key(0x38, largest / 3.0, packed), key(0x38, largest, mixed)]
    {
        let error = Quantized::new(source, options, 2, &mut |_, _| {}).err().unwrap().to_string();
        assert!(error.contains("k_proj.weight, ") && error.contains("they run as one product"), "{error}");
    }
}

#[test]
fn values_that_are_not_finite_are_refused_by_name() {
    let refused = |source: Arc<With>, options: Options, name: &str| {
        let error = Quantized::new(source, options, 2, &mut |_, _| {}).err().unwrap().to_string();
        let expected = format!("tensor `{name}`: expected finite values (of BF16 in matrices), found ");
        assert!(error.starts_with(&expected), "{error}");
    };
    for bad in [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY] {
        // Of those that are quantized and of those that stay.
        for options in [nvfp4(Recipe::Experts, Algorithm::Auto), Options::Mxfp4, Options::Bf16] {
            for id in checkpoint::matrices(&config()) {
                let source = with(id, |rows, cols| {
                    let mut values = vec![bf16::ONE; rows * cols];
                    values[rows * cols / 2] = bad;
                    Values::Bf16(Cow::Owned(values))
                });
                refused(source, options, &id.name());
            }
            for id in checkpoint::vectors(&config()) {
                refused(with_vector(id, bad), options, &id.name());
            }
        }
    }
    let source = with(MatrixKind::GateUp.at(0), |rows, cols| Values::Mxfp4 {
        codes: Cow::Owned(vec![0x11; rows * cols / 2]),
        scales: Cow::Owned(vec![255; rows * cols / 32]),
    });
    let error =
        Quantized::new(source, nvfp4(Recipe::Experts, Algorithm::Auto), 2, &mut |_, _| {}).err().unwrap();
    assert!(error.to_string().contains("NaN"), "{error}");
}

#[test]
fn values_beyond_bf16_are_refused_by_name() {
    let source = |scale: u8| {
        with(MatrixKind::GateUp.at(0), move |rows, cols| Values::Mxfp4 {
            codes: Cow::Owned(vec![0x77; rows * cols / 2]),
            scales: Cow::Owned(vec![scale; rows * cols / 32]),
        })
    };
    // 6 · 2^125 is a BF16 value, 6 · 2^127 is not even one of F32.
    let found = view(source(252), Options::Bf16);
    assert!(compare(&found, &*source(252), None, 2).unwrap().identical);
    let error = view(source(254), Options::Bf16).matrix(MatrixKind::GateUp.at(0), 1).unwrap_err().to_string();
    assert_eq!(
        error,
        "tensor `model.layers.0.mlp.experts.gate_up_proj`: expected values in the range of BF16, found inf in row 0 of \
         matrix 1"
    );
}

#[test]
fn a_model_whose_products_overflow_is_refused_by_calibration() {
    let folder = tempfile::tempdir().unwrap();
    for (norm, name) in [
        (VectorKind::InputNorm.at(0), "model.layers.0.self_attn.q_proj.weight"),
        (VectorKind::PostAttentionNorm.at(0), "model.layers.0.mlp.experts.gate_up_proj"),
        (VectorKind::FinalNorm.at(0), "lm_head.weight"),
    ] {
        for algorithm in [Algorithm::Auto, Algorithm::Gptq, Algorithm::LocalHessian, Algorithm::Awq] {
            let mut found = view(with_vector(norm, bf16::MAX), nvfp4(Recipe::Linear, algorithm));
            let calibration = calibration(&folder.path().join(format!("{norm:?} {algorithm:?}")), 0);
            let error = found.calibrate(&calibration, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
            assert!(error.to_string().contains(&format!("finite inputs of tensor `{name}`")), "{error}");
        }
    }
}

#[test]
fn a_cast_out_of_the_window_is_counted_before_anything_is_read() {
    let source = with(MatrixKind::GateUp.at(0), |rows, cols| {
        let mut scales = vec![120; rows * cols / 32];
        scales[5] = 100;
        Values::Mxfp4 { codes: Cow::Owned(vec![0x21; rows * cols / 2]), scales: Cow::Owned(scales) }
    });
    let view = view(Arc::clone(&source) as Arc<dyn Weights>, nvfp4(Recipe::Experts, Algorithm::Cast));
    let counts = view.cast_counts();
    let blocks = 3 * 192 * 2;
    assert_eq!((counts.blocks, counts.lossless_blocks), (blocks, blocks - 3));
    // 0.5 and 1 at 20 octaves below the top both vanish.
    assert_eq!(counts.changed_values, 3 * 32);
    let comparison = compare(&view, &*source, None, 2).unwrap();
    assert!(!comparison.identical && comparison.different[0].elements == 96, "{comparison:?}");
    let report = view.report();
    let tensor = report.iter().find(|t| t.id.kind == MatrixKind::GateUp).unwrap();
    assert_eq!(tensor.totals.unwrap().changed, 96);
}

#[test]
fn an_all_zero_stack_stays_exactly_zero() {
    for algorithm in [Algorithm::Max, Algorithm::Mse, Algorithm::FourOverSix] {
        let source = with(MatrixKind::Down.at(0), |rows, cols| {
            Values::Bf16(Cow::Owned(vec![bf16::ZERO; rows * cols]))
        });
        let view = view(source, nvfp4(Recipe::Experts, algorithm));
        let Values::Nvfp4 { codes, scales, global_scale } =
            view.matrix(MatrixKind::Down.at(0), 1).unwrap().values
        else {
            panic!("not NVFP4");
        };
        assert!(codes.iter().all(|&c| c == 0) && scales.iter().all(|&s| s == 0x38), "{algorithm:?}");
        assert_eq!(global_scale, f32::MIN_POSITIVE);
    }
}

#[test]
fn scales_per_expert_are_no_worse_than_one_for_the_stack() {
    let source = open("testdata/tiny-gpt-oss-bf16");
    let error = |scales_per| {
        let options = Options::Nvfp4 {
            recipe: Recipe::Experts,
            algorithm: Algorithm::Max,
            embedding: false,
            scales_per,
            activations: false,
            kv_scales: false,
            experts_in_bf16: false,
        };
        let view = view(Arc::clone(&source) as Arc<dyn Weights>, options);
        let scales: Vec<u32> = (0..16)
            .map(|e| match view.matrix(MatrixKind::Down.at(0), e).unwrap().values {
                Values::Nvfp4 { global_scale, .. } => global_scale.to_bits(),
                _ => 0,
            })
            .collect();
        let different = scales.iter().any(|s| *s != scales[0]);
        (different, view.report().iter().filter_map(|t| t.totals).map(|totals| totals.mse()).sum::<f64>())
    };
    let (stack, expert) = (error(ScalesPer::Stack), error(ScalesPer::Expert));
    assert!(!stack.0 && expert.0);
    assert!(expert.1 <= stack.1 * 1.001, "{expert:?} {stack:?}");
}

#[test]
fn the_numbers_do_not_depend_on_the_threads() {
    let source = open("testdata/tiny-gpt-oss-bf16");
    let make = |threads| {
        let options = nvfp4(Recipe::All, Algorithm::Max);
        Quantized::new(Arc::clone(&source) as Arc<dyn Weights>, options, threads, &mut |_, _| {}).unwrap()
    };
    let (one, many) = (make(1), make(5));
    assert!(compare(&one, &many, None, 2).unwrap().identical);
    let errors =
        |view: &Quantized| view.report().iter().map(|t| t.totals.unwrap().squared_error).collect::<Vec<_>>();
    assert_eq!(errors(&one), errors(&many));
}

/// A calibration on some tokens, in a folder of its own.
fn calibration(folder: &std::path::Path, seed: u32) -> quantize::Calibration {
    let windows = (0..4).map(|w| (0..96).map(|t| (seed + w * 977 + t * t * 31) % 50).collect()).collect();
    quantize::Calibration {
        windows,
        all_experts: false,
        scratch: folder.join("calibration"),
        fingerprint: format!("{seed}"),
        overwrite: false,
    }
}

#[test]
fn an_interrupted_calibration_continues_to_the_same_result() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    (config.experts, config.experts_per_token) = (6, 4);
    config.layer_kinds = vec![config.layer_kinds[0]; 4];
    let source = || Arc::new(Synthetic::new(config.clone(), |_| Format::Bf16, 3));
    let make = |name: &str, stop: Option<usize>| {
        let path = folder.path().join(name);
        let calibration = calibration(&path, 5);
        let mut view = view(source(), nvfp4(Recipe::Linear, Algorithm::Refine));
        assert!(view.needs_calibration());
        let unread = view.matrix(MatrixKind::Down.at(1), 3).unwrap_err();
        assert!(unread.to_string().contains("calibration"), "{unread}");
        if let Some(stop) = stop {
            let stopped = view.calibrate(&calibration, &mut |done, _| {
                if done < stop { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            });
            assert!(matches!(stopped, Err(quantize::Error::Interrupted)));
        }
        let mut first = None;
        view.calibrate(&calibration, &mut |done, _| {
            first.get_or_insert(done);
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(first.unwrap() > 0, stop.is_some(), "finished layers are not done again");
        view
    };
    let (whole, continued) = (make("whole", None), make("continued", Some(20)));
    assert!(compare(&whole, &continued, None, 2).unwrap().identical);
    let bias = VectorKind::DownBias.at(2);
    assert_eq!(whole.vector(bias).unwrap(), continued.vector(bias).unwrap());
    assert_ne!(whole.vector(bias).unwrap(), source().vector(bias).unwrap(), "the bias takes the mean error");
    assert_eq!(whole.facts().len(), 4);
    for facts in whole.facts() {
        assert_eq!(facts.coverage.iter().sum::<u64>(), 4 * 96 * 4, "every token goes to four experts");
        assert!(facts.input_amax.iter().all(|&a| a > 0.0) && facts.key_amax > 0.0 && facts.value_amax > 0.0);
    }
}

#[test]
fn a_scratch_folder_belongs_to_one_calibration() {
    let folder = tempfile::tempdir().unwrap();
    let one = calibration(folder.path(), 1);
    let calibrate = |calibration: &quantize::Calibration, stop: usize| {
        let source = Arc::new(Synthetic::new(config(), |_| Format::Bf16, 3));
        let mut view = view(source, nvfp4(Recipe::Experts, Algorithm::Gptq));
        let progress = &mut |done, _| {
            if done < stop { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        view.calibrate(calibration, progress).map(|()| view).map_err(|error| error.to_string())
    };

    // What is nobody's unfinished work is not deleted, whatever was asked for.
    std::fs::create_dir(&one.scratch).unwrap();
    let letter = one.scratch.join("letter.txt");
    std::fs::write(&letter, "dear").unwrap();
    for overwrite in [false, true] {
        let error = calibrate(&quantize::Calibration { overwrite, ..one.clone() }, 99).err().unwrap();
        assert!(error.contains("expected unfinished work, or nothing"), "{error}");
    }
    assert_eq!(std::fs::read_to_string(&letter).unwrap(), "dear");
    std::fs::remove_file(letter).unwrap();

    // Nor is the work of another, unless that is asked for.
    assert_eq!(calibrate(&one, 2).err().unwrap(), "interrupted");
    let two = quantize::Calibration { fingerprint: "two".to_owned(), ..one.clone() };
    let error = calibrate(&two, 99).err().unwrap();
    assert!(error.contains("found that of another"), "{error}");
    let two = quantize::Calibration { overwrite: true, ..two };
    let in_use = calibrate(&two, 99).unwrap();

    // As long as somebody reads from it, nobody else works there.
    for calibration in [&one, &two] {
        let error = calibrate(calibration, 99).err().unwrap();
        assert!(error.contains("no other process that writes there"), "{error}");
    }
    drop(in_use);
    assert!(calibrate(&two, 99).is_ok());
}

/// The rows of a matrix as they act on what stands before its norm: each column times the norm's weight.
fn behind_norm(weights: &dyn Weights, kind: MatrixKind) -> Vec<f32> {
    let norm = weights.vector(VectorKind::InputNorm.at(0)).unwrap().to_f32();
    let matrix = weights.matrix(kind.at(0), 0).unwrap();
    matrix
        .to_f32()
        .chunks_exact(matrix.cols)
        .flat_map(|row| row.iter().zip(&norm).map(|(w, n)| w * n))
        .collect()
}

#[test]
fn every_calibrating_algorithm_keeps_the_function() {
    let folder = tempfile::tempdir().unwrap();
    let source = || Arc::new(Synthetic::new(config(), |_| Format::Bf16, 3));
    let windows = vec![(0..48).collect(), (2..50).rev().collect()];
    for algorithm in [Algorithm::LocalHessian, Algorithm::Awq, Algorithm::Gptq, Algorithm::Refine] {
        let calibration = quantize::Calibration {
            windows: Vec::clone(&windows),
            ..calibration(&folder.path().join(format!("{algorithm:?}")), 0)
        };
        let mut found = view(source(), nvfp4(Recipe::Linear, algorithm));
        found.calibrate(&calibration, &mut |_, _| ControlFlow::Continue(())).unwrap();
        for kind in [MatrixKind::Query, MatrixKind::Key, MatrixKind::Value] {
            let (expected, found) = (behind_norm(&*source(), kind), behind_norm(&found, kind));
            let square = |sum: f64, v: f32| sum + f64::from(v).powi(2);
            let noise = expected.iter().zip(&found).map(|(e, f)| e - f).fold(0.0, square);
            let signal = expected.iter().copied().fold(0.0, square);
            // Plain rounding is at 20 dB; error feedback gives up some of it for that of the product.
            assert!(10.0 * (signal / noise).log10() > 15.0, "{algorithm:?} {kind:?}: {signal} {noise}");
        }
        let norm = |weights: &dyn Weights| weights.vector(VectorKind::InputNorm.at(0)).unwrap().to_f32();
        // The error told is that behind the norm, in the source's scale: one read above, another here.
        let query = MatrixKind::Query.at(0);
        let mut expected = 0.0;
        let (before, after) = (source().matrix(query, 0).unwrap().to_f32(), found.matrix(query, 0).unwrap());
        for (before, after) in before.chunks_exact(after.cols).zip(after.to_f32().chunks_exact(after.cols)) {
            for (c, (before, after)) in before.iter().zip(after).enumerate() {
                let scale = f64::from(norm(&found)[c]) / f64::from(norm(&*source())[c]);
                expected += (f64::from(*after) * scale - f64::from(*before)).powi(2);
            }
        }
        let report = found.report();
        let told = report.iter().find(|t| t.id == query).unwrap().totals.unwrap().squared_error / 2.0;
        assert!((told - expected).abs() < 1e-4 * expected, "{algorithm:?}: {told} {expected}");
        assert_eq!(norm(&found) == norm(&*source()), algorithm != Algorithm::Awq, "{algorithm:?}");
        let report = found.report();
        let method = |kind: MatrixKind| report.iter().find(|t| t.id == kind.at(0)).unwrap().method;
        assert_eq!(method(MatrixKind::Down).calibrates(), algorithm != Algorithm::Awq, "{algorithm:?}");
        assert!(method(MatrixKind::Output).calibrates(), "{algorithm:?}");
    }
}

/// Weights whose vectors are in F32, of values that BF16 does not hold.
struct WideVectors(Synthetic);

impl Weights for WideVectors {
    fn config(&self) -> &Config {
        self.0.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.0.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        self.0.matrix(id, expert)
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        Ok(Vector::F32(self.0.vector(id)?.to_f32().iter().map(|value| value * 1.001).collect()))
    }
}

#[test]
fn vectors_in_f32_stay_in_f32_and_change_where_the_algorithm_changes_them() {
    let folder = tempfile::tempdir().unwrap();
    let source = || Arc::new(WideVectors(Synthetic::new(config(), |_| Format::Bf16, 3)));
    for algorithm in [Algorithm::LocalHessian, Algorithm::Awq, Algorithm::Gptq, Algorithm::Refine] {
        let calibration = calibration(&folder.path().join(format!("{algorithm:?}")), 0);
        let mut found = view(source(), nvfp4(Recipe::Linear, algorithm));
        found.calibrate(&calibration, &mut |_, _| ControlFlow::Continue(())).unwrap();
        for id in checkpoint::vectors(&config()) {
            let (before, after) = (source().vector(id).unwrap().to_f32(), found.vector(id).unwrap());
            assert!(matches!(after, Vector::F32(_)), "{algorithm:?} {id:?}");
            let changes = match algorithm {
                Algorithm::Awq => id.kind == VectorKind::InputNorm,
                Algorithm::Refine => id.name().ends_with("bias") && id.kind != VectorKind::RouterBias,
                _ => false,
            };
            assert_eq!(before != after.to_f32(), changes, "{algorithm:?} {id:?}");
        }
    }
}

#[test]
fn what_is_packed_stays_as_it_is_while_the_rest_is_calibrated() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config.layer_kinds.push(config.layer_kinds[0]);
    let packed = |id: MatrixId| match id.layer {
        0 => id.kind.is_attention(),
        _ => id.kind.is_attention() && id.kind != MatrixKind::Output || id.kind == MatrixKind::Down,
    };
    let format = |id| if packed(id) { Format::Nvfp4 } else { Format::Bf16 };
    let source = Arc::new(Synthetic::new(config.clone(), format, 3));
    for algorithm in [Algorithm::LocalHessian, Algorithm::Awq, Algorithm::Gptq, Algorithm::Refine] {
        let calibration = calibration(&folder.path().join(format!("{algorithm:?}")), 0);
        let options = nvfp4(Recipe::Linear, algorithm);
        assert!(options.needs_calibration(&*source));
        let mut found = view(Arc::clone(&source) as Arc<dyn Weights>, options);
        found.calibrate(&calibration, &mut |_, _| ControlFlow::Continue(())).unwrap();
        for id in checkpoint::matrices(&config).filter(|id| id.kind.is_attention() || id.kind.is_expert()) {
            for expert in 0..id.kind.shape(&config).0 {
                let before = source.matrix(id, expert).unwrap();
                let after = found.matrix(id, expert).unwrap();
                assert_eq!(after.values.format(), Format::Nvfp4);
                if packed(id) {
                    assert_eq!(before, after, "{algorithm:?} {id:?}");
                }
            }
        }
        for tensor in found.report().iter().filter(|t| t.method.calibrates()) {
            let sqnr = tensor.totals.unwrap().sqnr_db();
            assert!(sqnr > 10.0, "{algorithm:?} {:?}: {sqnr}", tensor.id);
        }
        for kind in VectorKind::LAYER {
            for layer in 0..2 {
                let vector = |weights: &dyn Weights| weights.vector(kind.at(layer)).unwrap().to_f32();
                let changed = vector(&found).iter().zip(vector(&*source)).any(|(a, b)| (a - b).abs() > 0.1);
                assert!(!changed, "{algorithm:?} {kind:?} {layer}");
            }
        }
    }
    assert!(!nvfp4(Recipe::Linear, Algorithm::Mse).needs_calibration(&*source));
}

#[test]
fn odd_shapes_and_many_experts_are_calibrated_for_w4a4() {
    let mut config = config();
    (config.hidden_size, config.intermediate_size, config.experts) = (96, 160, 128);
    let folder = tempfile::tempdir().unwrap();
    let calibration = quantize::Calibration {
        windows: vec![(0..50).collect()],
        all_experts: true,
        ..calibration(folder.path(), 0)
    };
    let options = Options::Nvfp4 {
        recipe: Recipe::All,
        algorithm: Algorithm::Auto,
        embedding: true,
        scales_per: ScalesPer::Expert,
        activations: true,
        kv_scales: true,
        experts_in_bf16: false,
    };
    let mut found = view(Arc::new(Synthetic::new(config.clone(), |_| Format::Bf16, 3)), options);
    found.calibrate(&calibration, &mut |_, _| ControlFlow::Continue(())).unwrap();
    for id in checkpoint::matrices(&config).filter(|id| id.kind != MatrixKind::Router) {
        assert_eq!(found.format(id), Format::Nvfp4);
        // The embedding has no input.
        let scale = found.input_scale(id);
        assert!(scale.map_or(id.kind == MatrixKind::Embedding, |scale| scale > 0.0), "{id:?}");
        for expert in 0..id.kind.shape(&config).0 {
            let matrix = found.matrix(id, expert).unwrap();
            matrix.values.check_scales("calibrated").unwrap();
            assert!(matrix.to_f32().iter().all(|v| v.is_finite()), "{id:?} {expert}");
        }
    }
    assert_eq!(found.input_scale(MatrixKind::Query.at(0)), found.input_scale(MatrixKind::Value.at(0)));
    assert_eq!(found.facts()[0].coverage.iter().sum::<u64>(), 50 * 2);
    assert!(found.kv_scales(0).unwrap().key > 0.0);

    // What the layout says of it is read back.
    let target = checkpoint::Target {
        kv_cache: Some(checkpoint::KvCache::Fp8),
        scales_per_expert: true,
        ..checkpoint::Target::new(config.to_json(), checkpoint::Layout::ModelOpt)
    };
    let out = folder.path().join("out");
    checkpoint::write(&found, &target, &out, &mut |_| ControlFlow::Continue(())).unwrap();
    let written = checkpoint::Checkpoint::open(&out).unwrap();
    assert!(compare(&found, &written, None, 2).unwrap().identical);
    for id in checkpoint::matrices(&config) {
        assert_eq!(found.input_scale(id), written.input_scale(id), "{id:?}");
    }
    assert_eq!(found.kv_scales(0), written.kv_scales(0));
    // Whoever made them knew what they are for.
    assert!(!options.needs_calibration(&written));
    let again = view(Arc::new(written), options);
    assert!(!again.needs_calibration());
    assert_eq!(found.kv_scales(0), again.kv_scales(0));
}

#[test]
fn the_scales_of_inputs_see_the_tokens_of_all_experts() {
    let mut config = config();
    (config.experts, config.experts_per_token) = (32, 1);
    for algorithm in [Algorithm::Mse, Algorithm::Refine] {
        let [routed, all] = [false, true].map(|all_experts| {
            let folder = tempfile::tempdir().unwrap();
            let options = Options::Nvfp4 {
                recipe: Recipe::Experts,
                algorithm,
                embedding: false,
                scales_per: ScalesPer::Stack,
                activations: true,
                kv_scales: false,
                experts_in_bf16: false,
            };
            let mut found = view(Arc::new(Synthetic::new(config.clone(), |_| Format::Bf16, 3)), options);
            let windows = vec![vec![1, 2]];
            let calibration = quantize::Calibration { windows, all_experts, ..calibration(folder.path(), 0) };
            found.calibrate(&calibration, &mut |_, _| ControlFlow::Continue(())).unwrap();
            found
        });
        let scale = |found: &Quantized, kind: MatrixKind| found.input_scale(kind.at(0)).unwrap();
        assert_eq!(scale(&routed, MatrixKind::GateUp), scale(&all, MatrixKind::GateUp));
        assert!(scale(&routed, MatrixKind::Down) < scale(&all, MatrixKind::Down), "{algorithm:?}");
    }
}

/// Calibrated for W4A4.
fn w4a4(
    source: Arc<dyn Weights>,
    algorithm: Algorithm,
    activations: bool,
    scratch: &std::path::Path,
) -> Quantized {
    let Options::Nvfp4 { recipe, algorithm, embedding, scales_per, kv_scales, experts_in_bf16, .. } =
        nvfp4(Recipe::Linear, algorithm)
    else {
        panic!("not NVFP4");
    };
    let options =
        Options::Nvfp4 { recipe, algorithm, embedding, scales_per, activations, kv_scales, experts_in_bf16 };
    let mut found = view(source, options);
    found.calibrate(&calibration(scratch, 0), &mut |_, _| ControlFlow::Continue(())).unwrap();
    found
}

#[test]
fn the_input_scale_behind_scaled_columns_is_that_of_the_scaled_inputs() {
    let folder = tempfile::tempdir().unwrap();
    let source = Arc::new(Synthetic::new(config(), |_| Format::Bf16, 3));
    let found = w4a4(source, Algorithm::Awq, true, &folder.path().join("awq"));
    let scale = |weights: &dyn Weights| weights.input_scale(MatrixKind::Key.at(0)).unwrap();
    let stated = scale(&found);
    // What the norm gives that AWQ made.
    let seen = scale(&w4a4(Arc::new(found), Algorithm::Max, true, &folder.path().join("max")));
    assert!((stated - seen).abs() < 1e-5 * seen, "{stated} {seen}");
}

#[test]
fn gptq_sees_inputs_in_four_bits_where_they_will_be() {
    let folder = tempfile::tempdir().unwrap();
    let source = || Arc::new(Synthetic::new(config(), |_| Format::Bf16, 3));
    for algorithm in [Algorithm::Gptq, Algorithm::Refine] {
        let [with, without] = [true, false].map(|activations| {
            let scratch = folder.path().join(format!("{algorithm:?} {activations}"));
            w4a4(source(), algorithm, activations, &scratch)
        });
        let different = compare(&with, &without, None, 2).unwrap().different;
        let names: Vec<&str> = different.iter().map(|d| d.name.rsplit('.').next().unwrap()).collect();
        match algorithm {
            Algorithm::Gptq => {
                assert_eq!(names, ["weight", "weight", "weight", "weight", "gate_up_proj", "down_proj"])
            }
            _ => assert!(names.is_empty(), "{names:?}"),
        }
    }
}

/// Counts how often each matrix is read.
struct Counted {
    rest: Synthetic,
    reads: Mutex<BTreeMap<(MatrixId, usize), usize>>,
}

impl Weights for Counted {
    fn config(&self) -> &Config {
        self.rest.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.rest.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        *self.reads.lock().unwrap().entry((id, expert)).or_default() += 1;
        self.rest.matrix(id, expert)
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        self.rest.vector(id)
    }
}

#[test]
fn calibration_reads_experts_once_unless_their_input_scale_is_needed_first() {
    for (algorithm, activations, expected) in [
        (Algorithm::Refine, false, 1),
        (Algorithm::Refine, true, 1),
        (Algorithm::Gptq, false, 1),
        (Algorithm::Gptq, true, 2),
        // The statistics of the source alone.
        (Algorithm::Mse, true, 1),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let rest = Synthetic::new(config(), |_| Format::Bf16, 3);
        let source = Arc::new(Counted { rest, reads: Mutex::default() });
        let options = Options::Nvfp4 {
            recipe: Recipe::Experts,
            algorithm,
            embedding: false,
            scales_per: ScalesPer::Stack,
            activations,
            kv_scales: false,
            experts_in_bf16: false,
        };
        let mut found = view(Arc::clone(&source) as Arc<dyn Weights>, options);
        source.reads.lock().unwrap().clear();
        let calibration = calibration(folder.path(), 0);
        found.calibrate(&calibration, &mut |_, _| ControlFlow::Continue(())).unwrap();
        for kind in [MatrixKind::GateUp, MatrixKind::Down] {
            for expert in 0..config().experts {
                let reads = source.reads.lock().unwrap()[&(kind.at(0), expert)];
                assert_eq!(reads, expected, "{algorithm:?} {activations} {kind:?}");
            }
        }
    }
}

#[test]
fn gptq_leaves_columns_of_zeros_alone() {
    let folder = tempfile::tempdir().unwrap();
    let zero = 21;
    let source = with(MatrixKind::GateUp.at(0), |rows, cols| {
        let rest = Synthetic::new(config(), |_| Format::Bf16, 4);
        let mut values: Vec<bf16> = rest
            .matrix(MatrixKind::GateUp.at(0), 1)
            .unwrap()
            .to_f32()
            .into_iter()
            .map(bf16::from_f32)
            .collect();
        assert_eq!(values.len(), rows * cols);
        values.iter_mut().skip(zero).step_by(cols).for_each(|value| *value = bf16::ZERO);
        Values::Bf16(Cow::Owned(values))
    });
    let found = w4a4(source, Algorithm::Gptq, false, folder.path());
    for expert in 0..3 {
        let matrix = found.matrix(MatrixKind::GateUp.at(0), expert).unwrap();
        assert!(matrix.to_f32().iter().skip(zero).step_by(matrix.cols).all(|&value| value == 0.0));
    }
}

#[test]
fn one_token_leaves_every_expert_at_the_sweep() {
    let folder = tempfile::tempdir().unwrap();
    let calibration = quantize::Calibration { windows: vec![vec![7]], ..calibration(folder.path(), 1) };
    let source = || open("testdata/tiny-gpt-oss-bf16");
    let mut refined = view(source(), nvfp4(Recipe::Experts, Algorithm::Refine));
    refined.calibrate(&calibration, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let mse = view(source(), nvfp4(Recipe::Experts, Algorithm::Mse));
    assert!(compare(&refined, &mse, None, 2).unwrap().identical);

    let nothing = quantize::Calibration { windows: vec![], ..calibration.clone() };
    let error = refined.calibrate(&nothing, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, quantize::Error::NoTokens));
    let unknown = quantize::Calibration {
        windows: vec![vec![4096]],
        scratch: folder.path().join("unknown"),
        ..calibration
    };
    let error = refined.calibrate(&unknown, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains("4096"), "{error}");
}
