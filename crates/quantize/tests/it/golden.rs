//! `testdata/quant/tiny_gptoss`: weights, block scales and global scales bit for bit.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::sync::Arc;

use checkpoint::{
    Checkpoint, Config, Error, Format, Layout, Matrix, MatrixId, MatrixKind, Target, TensorFile, Values,
    Vector, VectorId, Weights, matrices, may_begin,
};
use quantize::{Algorithm, Options, Recipe, ScalesPer};

use crate::{nvfp4, open, root, view};

#[test]
fn weights_equal_model_optimizers_exports() {
    for (name, recipe, algorithm) in [
        ("nvfp4_default", Recipe::Linear, Algorithm::Max),
        ("w4a16_nvfp4", Recipe::Linear, Algorithm::Max),
        ("nvfp4_default_kv_fp8", Recipe::Linear, Algorithm::Max),
        ("nvfp4_experts_only", Recipe::Experts, Algorithm::Max),
        ("nvfp4_four_over_six", Recipe::Linear, Algorithm::FourOverSix),
    ] {
        let golden = open(&format!("testdata/quant/tiny_gptoss/{name}"));
        let found = view(open("testdata/quant/tiny_gptoss/source"), nvfp4(recipe, algorithm));
        let mut packed = 0;
        for id in matrices(golden.config()) {
            assert_eq!(found.format(id), golden.format(id), "{name}: {id:?}");
            packed += usize::from(found.format(id) == Format::Nvfp4);
            for expert in 0..id.kind.shape(golden.config()).0 {
                let (found, golden) = (found.matrix(id, expert).unwrap(), golden.matrix(id, expert).unwrap());
                assert_eq!(found, golden, "{name}: {id:?}, matrix {expert}");
            }
        }
        assert_eq!(packed, if recipe == Recipe::Linear { 2 * 6 } else { 2 * 2 });
    }
}

#[test]
fn scales_of_activations_are_those_that_were_asked_for() {
    // The experts of the source have them, its attention has none.
    let source = || open("testdata/quant/tiny_gptoss/nvfp4_experts_only");
    assert!(source().input_scale(MatrixKind::Down.at(1)).is_some());
    for activations in [false, true] {
        let options = Options::Nvfp4 {
            recipe: Recipe::Linear,
            algorithm: Algorithm::Mse,
            embedding: false,
            scales_per: ScalesPer::Stack,
            activations,
            kv_scales: false,
            experts_in_bf16: false,
        };
        let found = view(source(), options);
        for id in matrices(found.config()) {
            let expected = activations && found.format(id) == Format::Nvfp4;
            assert_eq!(found.input_scale(id).is_some(), expected, "{id:?}");
        }
        let target = Target::new(found.config().to_json(), Layout::ModelOpt);
        may_begin(&found, &target, "a-folder-that-is-not-there".as_ref()).unwrap();
        // What stays as it is keeps its own.
        let down = MatrixKind::Down.at(1);
        assert_eq!(found.input_scale(down), source().input_scale(down).filter(|_| activations));
        assert_eq!(found.needs_calibration(), activations);
        // If all have one, there is nothing to calibrate.
        let Options::Nvfp4 { algorithm, embedding, scales_per, kv_scales, experts_in_bf16, .. } = options
        else {
            unreachable!("as above")
        };
        let experts = Recipe::Experts;
        let options = Options::Nvfp4 {
            recipe: experts,
            algorithm,
            embedding,
            scales_per,
            activations,
            kv_scales,
            experts_in_bf16,
        };
        assert!(!options.needs_calibration(&*source()) && !view(source(), options).needs_calibration());
    }
}

#[test]
fn static_scales_equal_those_of_model_optimizers_calibration() {
    let file = TensorFile::open(&root("testdata/quant/tiny_gptoss/calib.safetensors")).unwrap();
    let ids = file.data(file.tensor("calib_input_ids").unwrap());
    let ids: Vec<u32> = ids.chunks_exact(8).map(|b| u32::from_le_bytes(b[..4].try_into().unwrap())).collect();
    let scratch = tempfile::tempdir().unwrap();
    let calibration = quantize::Calibration {
        windows: ids.chunks_exact(32).map(<[u32]>::to_vec).collect(),
        all_experts: false,
        scratch: scratch.path().join("calibration"),
        fingerprint: String::new(),
        overwrite: false,
    };
    for (name, recipe) in [("nvfp4_default_kv_fp8", Recipe::Linear), ("nvfp4_experts_only", Recipe::Experts)]
    {
        let golden = open(&format!("testdata/quant/tiny_gptoss/{name}"));
        let options = Options::Nvfp4 {
            recipe,
            algorithm: Algorithm::Max,
            embedding: false,
            scales_per: ScalesPer::Stack,
            activations: true,
            kv_scales: recipe == Recipe::Linear,
            experts_in_bf16: false,
        };
        let mut found = view(open("testdata/quant/tiny_gptoss/source"), options);
        assert!(found.needs_calibration());
        found.calibrate(&calibration, &mut |_, _| ControlFlow::Continue(())).unwrap();
        // The peer's forward pass is in BF16.
        let close = |found: f32, golden: f32| (found / golden - 1.0).abs() < 0.02;
        let mut compared = 0;
        for id in matrices(golden.config()) {
            match (found.input_scale(id), golden.input_scale(id)) {
                (Some(found), Some(golden)) => {
                    assert!(close(found, golden), "{name}: {id:?}: {found} {golden}");
                    compared += 1;
                }
                (found, golden) => assert_eq!(found, golden, "{name}: {id:?}"),
            }
        }
        assert_eq!(compared, if recipe == Recipe::Linear { 2 * 6 } else { 2 * 2 });
        for layer in 0..2 {
            match (found.kv_scales(layer), golden.kv_scales(layer)) {
                (Some(found), Some(golden)) => {
                    assert!(close(found.key, golden.key) && close(found.value, golden.value), "{found:?}");
                }
                (found, golden) => assert_eq!(found, golden, "{name}"),
            }
        }
    }
}

/// The source model with its experts taken from the file of MXFP4 experts.
struct Mxfp4Experts {
    rest: Arc<Checkpoint>,
    experts: TensorFile,
}

impl Weights for Mxfp4Experts {
    fn config(&self) -> &Config {
        self.rest.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        if id.kind.is_expert() { Format::Mxfp4 } else { self.rest.format(id) }
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        if !id.kind.is_expert() {
            return self.rest.matrix(id, expert);
        }
        let (_, rows, cols) = id.kind.shape(self.config());
        let part = |suffix: &str, size: usize| {
            let tensor = self.experts.tensor(&format!("{}_{suffix}", name(id))).unwrap();
            Cow::Borrowed(&self.experts.data(tensor)[expert * size..][..size])
        };
        let values = Values::Mxfp4 {
            codes: part("blocks", rows * cols / 2),
            scales: part("scales", rows * cols / 32),
        };
        Ok(Matrix { rows, cols, values })
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        self.rest.vector(id)
    }
}

fn name(id: MatrixId) -> String {
    let kind = if id.kind == MatrixKind::GateUp { "gate_up" } else { "down" };
    format!("model.layers.{}.mlp.experts.{kind}_proj", id.layer)
}

#[test]
fn the_cast_equals_model_optimizers() {
    let source = Mxfp4Experts {
        rest: open("testdata/quant/tiny_gptoss/source"),
        experts: TensorFile::open(&root("testdata/quant/tiny_gptoss/mxfp4_source/model.safetensors"))
            .unwrap(),
    };
    let golden =
        TensorFile::open(&root("testdata/quant/tiny_gptoss/nvfp4_cast_from_mxfp4/model.safetensors"))
            .unwrap();
    let cast = view(Arc::new(source), nvfp4(Recipe::Experts, Algorithm::Cast));
    let counts = cast.cast_counts();
    assert_eq!((counts.blocks, counts.lossless_blocks, counts.changed_values), (4608, 4608, 0));
    for id in matrices(cast.config()).filter(|id| id.kind.is_expert()) {
        let bytes = |suffix: &str| golden.data(golden.tensor(&format!("{}{suffix}", name(id))).unwrap());
        let (count, rows, cols) = id.kind.shape(cast.config());
        for expert in 0..count {
            let Values::Nvfp4 { codes, scales, global_scale } = cast.matrix(id, expert).unwrap().values
            else {
                panic!("{id:?} is not NVFP4");
            };
            assert_eq!(global_scale.to_le_bytes(), bytes("_weight_scale_2"));
            // The file has the input dimension before the output.
            for (ours, theirs, width) in
                [(&codes, bytes(""), cols / 2), (&scales, bytes("_weight_scale"), cols / 16)]
            {
                let theirs = &theirs[expert * rows * width..][..rows * width];
                for r in 0..rows {
                    for c in 0..width {
                        assert_eq!(ours[r * width + c], theirs[c * rows + r], "{id:?} {expert} {r} {c}");
                    }
                }
            }
        }
    }
}
