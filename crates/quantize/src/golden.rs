//! Model Optimizer's calibrations of one linear layer (`testdata/quant/calib_linear.safetensors`), as the README there grades
//! them.

use std::path::Path;

use checkpoint::TensorFile;
use cpu::Pool;
use numerics::nvfp4;

use crate::awq;
use crate::factor::Factor;
use crate::gptq::{Scales, round};
use crate::moments::Moments;
use crate::rounded::{Rounded, diagonal_blocks, sweep};

const COLS: usize = 64;

struct Golden(TensorFile);

impl Golden {
    fn open() -> Golden {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/quant/calib_linear.safetensors");
        Golden(TensorFile::open(&path).unwrap())
    }

    fn bytes(&self, name: &str) -> &[u8] {
        self.0.data(self.0.tensor(name).unwrap())
    }

    fn numbers(&self, name: &str) -> Vec<f32> {
        self.bytes(name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn number(&self, name: &str) -> f32 {
        self.numbers(name)[0]
    }

    /// Statistics of the inputs, which came in three calls; of the inputs in NVFP4 if there is a scale.
    fn moments(&self, pool: &Pool, input_scale: Option<f32>) -> Moments {
        let mut moments = Moments::new(COLS, input_scale);
        for call in self.numbers("activations").chunks_exact(32 * COLS) {
            moments.add(pool, call, call, &[1.0 / 32.0; 32]);
        }
        moments.finish(false);
        moments
    }

    fn assert_bits(&self, algorithm: &str, found: &Rounded, global_scale: f32) {
        assert_eq!(found.codes, self.bytes(&format!("{algorithm}.packed")), "{algorithm}");
        assert_eq!(found.scales, self.bytes(&format!("{algorithm}.weight_scale")), "{algorithm}");
        assert_eq!(global_scale, self.number(&format!("{algorithm}.weight_scale_2")), "{algorithm}");
    }

    fn assert_close(&self, name: &str, found: &[f32]) {
        let expected = self.numbers(name);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-6 * expected.abs(), "{name}: {found} {expected}");
        }
    }
}

#[test]
fn searched_scales_and_error_feedback_give_the_same_bits() {
    let (golden, pool) = (Golden::open(), Pool::new(2));
    let weights = golden.numbers("weight");
    let amax = nvfp4::amax(&weights);
    let scale = nvfp4::static_global_scale(amax, nvfp4::STATIC_MAX_SCALE);
    let moments = golden.moments(&pool, None);
    golden.assert_bits("mse_fp8_sweep", &sweep(&pool, &weights, COLS, amax, None), scale);
    let hessians = diagonal_blocks(&moments.second, COLS);
    golden.assert_bits("local_hessian", &sweep(&pool, &weights, COLS, amax, Some(&hessians)), scale);
    // There activations were in four bits too, and GPTQ sees what the layer sees.
    let input_scale = Some(nvfp4::global_scale(golden.number("gptq.input_amax")));
    let factor = Factor::new(&pool, golden.moments(&pool, input_scale).second, COLS, 0.01).unwrap();
    golden.assert_bits("gptq", &round(&pool, &weights, &factor, amax, Scales::Max), scale);
}

#[test]
fn scaled_columns_and_the_clipped_scale_are_the_same() {
    let (golden, pool) = (Golden::open(), Pool::new(2));
    let weights = golden.numbers("weight");
    let moments = golden.moments(&pool, None);
    let scale = awq::lite(&pool, &weights, &moments);
    golden.assert_close("awq_lite.pre_quant_scale", &scale);
    let scaled: Vec<f32> =
        weights.chunks_exact(COLS).flat_map(|row| row.iter().zip(&scale).map(|(w, p)| w / p)).collect();
    golden.assert_close("awq_lite.weight_after", &scaled);
    let mut scaled_inputs = golden.moments(&pool, None);
    scaled_inputs.scale(&scale);
    golden.assert_close("awq_lite.input_amax", &[nvfp4::amax(&scaled_inputs.source_amax)]);

    let clipped = awq::clip(&pool, &weights, &moments, nvfp4::amax(&weights)) * nvfp4::amax(&weights);
    assert_eq!(clipped, golden.number("awq_clip.weight_amax"));
    let rounded = Rounded::by_max_rule(&weights, clipped);
    golden.assert_bits("awq_clip", &rounded, nvfp4::global_scale(clipped));

    // What these did to the weights is the file's; the rule is ours.
    for algorithm in ["max", "weight_only", "awq_lite", "svdquant", "act_headroom"] {
        let after = golden.numbers(&format!("{algorithm}.weight_after"));
        let amax = nvfp4::amax(&after);
        golden.assert_bits(algorithm, &Rounded::by_max_rule(&after, amax), nvfp4::global_scale(amax));
    }
}
