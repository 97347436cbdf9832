//! Every value of `testdata/quant` that this crate can compute, bit for bit.

use half::bf16;
use numerics::{e2m1, e4m3, e8m0, mxfp4, nvfp4};
use safetensors::SafeTensors;

struct Golden {
    bytes: Vec<u8>,
}

impl Golden {
    fn open(name: &str) -> Golden {
        let path = format!("{}/../../testdata/quant/{name}", env!("CARGO_MANIFEST_DIR"));
        Golden { bytes: std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}")) }
    }

    fn names(&self) -> Vec<String> {
        SafeTensors::deserialize(&self.bytes).unwrap().names().into_iter().map(str::to_owned).collect()
    }

    fn cases(&self, field: &str) -> Vec<String> {
        let suffix = format!(".{field}");
        let mut cases: Vec<String> =
            self.names().iter().filter_map(|n| n.strip_suffix(&suffix).map(str::to_owned)).collect();
        cases.sort();
        assert!(!cases.is_empty(), "no case has {field}");
        cases
    }

    fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).is_ok()
    }

    fn u8(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap().data().to_vec()
    }

    /// F32 or BF16, widened.
    fn f32(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        match tensor.dtype() {
            safetensors::Dtype::F32 => bytemuck::allocation::pod_collect_to_vec(tensor.data()),
            safetensors::Dtype::BF16 => bytemuck::allocation::pod_collect_to_vec::<u8, bf16>(tensor.data())
                .iter()
                .map(|v| v.to_f32())
                .collect(),
            other => panic!("{name}: {other:?}"),
        }
    }

    fn i64(&self, name: &str) -> i64 {
        bytemuck::pod_read_unaligned(&self.u8(name))
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap().shape().to_vec()
    }
}

/// Equal as numbers: the sign of zero is free, NaN equals NaN.
fn assert_values(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(f == e || (f.is_nan() && e.is_nan()), "{what}[{i}]: expected {e}, found {f}");
    }
}

fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan()),
            "{what}[{i}]: expected {e}, found {f}"
        );
    }
    assert_eq!(found.len(), expected.len(), "{what}");
}

#[test]
fn scalar_formats() {
    let golden = Golden::open("formats.safetensors");
    let codes = golden.u8("e2m1.code");
    assert_values(
        &codes.iter().map(|&c| e2m1::decode(c)).collect::<Vec<_>>(),
        &golden.f32("e2m1.value_f32"),
        "e2m1",
    );
    let inputs = golden.f32("e2m1_round.input_f32");
    let encoded: Vec<u8> = inputs.iter().map(|&v| e2m1::encode(v)).collect();
    assert_eq!(encoded, golden.u8("e2m1_round.code_nvfp4qtensor"));
    assert_values(
        &encoded.iter().map(|&c| e2m1::decode(c)).collect::<Vec<_>>(),
        &golden.f32("e2m1_round.value_triton_cast"),
        "e2m1 triton",
    );
    let peer: Vec<u8> =
        golden.f32("e2m1_round_mx.input_f32").iter().map(|&v| e2m1::encode_ties_toward_zero(v)).collect();
    assert_eq!(peer, golden.u8("e2m1_round_mx.code_mxfp4qtensor"));

    let bytes = golden.u8("e4m3fn.byte");
    let values: Vec<f32> = bytes.iter().map(|&b| e4m3::decode(b)).collect();
    assert_bits(&values, &golden.f32("e4m3fn.value_f32"), "e4m3");
    let cast: Vec<u8> = golden.f32("e4m3fn_cast.input_f32").iter().map(|&v| e4m3::encode(v)).collect();
    assert_eq!(cast, golden.u8("e4m3fn_cast.byte"));
    let scales: Vec<u8> =
        golden.f32("nvfp4_scale_cast.input_f32").iter().map(|&v| e4m3::encode_scale(v)).collect();
    assert_eq!(scales, golden.u8("nvfp4_scale_cast.byte"));
    let values: Vec<f32> = golden.u8("e8m0.byte").iter().map(|&b| e8m0::decode(b)).collect();
    assert_bits(&values, &golden.f32("e8m0.value_f32"), "e8m0");
}

fn to_bf16(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect()
}

#[test]
fn nvfp4_tensors() {
    let golden = Golden::open("nvfp4.safetensors");
    let cases = golden.cases("packed");
    assert_eq!(cases.len(), 15);
    for case in cases {
        let field = |name: &str| format!("{case}.{name}");
        let input = golden.f32(&field("input"));
        let global = if golden.has(&field("given_weight_scale_2")) {
            golden.f32(&field("given_weight_scale_2"))[0]
        } else {
            nvfp4::global_scale(nvfp4::amax(&input))
        };
        assert_bits(&[global], &golden.f32(&field("weight_scale_2")), &case);
        let (mut codes, mut scales) = (vec![0; input.len() / 2], vec![0; input.len() / nvfp4::BLOCK]);
        nvfp4::quantize(&input, global, &mut codes, &mut scales);
        assert_eq!(scales, golden.u8(&field("weight_scale")), "{case}");
        assert_eq!(codes, golden.u8(&field("packed")), "{case}");
        let mut values = vec![0.0; input.len()];
        nvfp4::dequantize(&codes, &scales, global, &mut values);
        assert_values(&values, &golden.f32(&field("dequant_f32")), &case);
        assert_values(&to_bf16(&values), &golden.f32(&field("dequant_bf16")), &case);
    }
}

#[test]
fn all_zero_tensor_is_exactly_zero() {
    let input = Golden::open("nvfp4.safetensors").f32("degenerate_all_zero.input");
    let global = nvfp4::global_scale(nvfp4::amax(&input));
    assert_eq!(global, 2f32.powi(-126));
    let (mut codes, mut scales) = (vec![0xff; input.len() / 2], vec![0; input.len() / nvfp4::BLOCK]);
    nvfp4::quantize(&input, global, &mut codes, &mut scales);
    assert!(codes.iter().all(|&c| c == 0) && scales.iter().all(|&s| s == 0x38));
    let mut values = vec![1.0; input.len()];
    nvfp4::dequantize(&codes, &scales, global, &mut values);
    assert!(values.iter().all(|v| v.to_bits() == 0));
}

#[test]
fn activation_fake_quantization() {
    let golden = Golden::open("fakequant.safetensors");
    let cases = golden.cases("output_f32");
    assert!(cases.len() >= 4);
    for case in cases {
        let input = golden.f32(&format!("{case}.input"));
        let scale = nvfp4::global_scale(golden.f32(&format!("{case}.global_amax"))[0]);
        let mut out = vec![0.0; input.len()];
        nvfp4::fake_quantize_activations(&input, scale, &mut out);
        assert_values(&out, &golden.f32(&format!("{case}.output_f32")), &case);
    }
}

#[test]
fn mxfp4_tensors() {
    let golden = Golden::open("mxfp4.safetensors");
    for case in golden.cases("packed") {
        let input = golden.f32(&format!("{case}.input"));
        let (mut codes, mut scales) = (vec![0; input.len() / 2], vec![0; input.len() / mxfp4::BLOCK]);
        mxfp4::quantize(&input, &mut codes, &mut scales);
        assert_eq!(scales, golden.u8(&format!("{case}.scale_e8m0")), "{case}");
        // The peer's own rounding, for its bytes.
        let packed = golden.u8(&format!("{case}.packed"));
        for (i, &value) in input.iter().enumerate() {
            let quotient = value / e8m0::decode(scales[i / mxfp4::BLOCK]);
            let peer = packed[i / 2] >> (4 * (i % 2)) & 15;
            assert_eq!(e2m1::encode_ties_toward_zero(quotient), peer, "{case}[{i}]: {value}");
            let ours = codes[i / 2] >> (4 * (i % 2)) & 15;
            let tie = [0.75, 1.75, 3.5].contains(&quotient.abs());
            assert!(tie || e2m1::decode(ours) == e2m1::decode(peer), "{case}[{i}]: {value}");
        }
        let mut values = vec![0.0; input.len()];
        mxfp4::dequantize(&packed, &scales, &mut values);
        assert_values(&values, &golden.f32(&format!("{case}.dequant_f32")), &case);
        assert_values(&to_bf16(&values), &golden.f32(&format!("{case}.dequant_bf16")), &case);
    }
}

#[test]
fn mxfp4_upcast_keeps_the_sign_of_zero() {
    let golden = Golden::open("gptoss_mxfp4_upcast.safetensors");
    let (blocks, scales) = (golden.u8("blocks"), golden.u8("scales"));
    let mut values = vec![0.0; blocks.len() * 2];
    mxfp4::dequantize(&blocks, &scales, &mut values);
    assert_bits(&to_bf16(&values), &golden.f32("gpt_oss_bf16"), "gpt_oss_bf16");
    let (blocks, scales) = (golden.u8("extreme.blocks"), golden.u8("extreme.scales"));
    let mut values = vec![0.0; blocks.len() * 2];
    mxfp4::dequantize(&blocks, &scales, &mut values);
    assert_values(&to_bf16(&values), &golden.f32("extreme.transformers_bf16"), "extreme");
}

#[test]
fn cast_from_mxfp4() {
    let golden = Golden::open("mxfp4_to_nvfp4.safetensors");
    for case in golden.cases("mx_packed") {
        let field = |name: &str| format!("{case}.{name}");
        let (codes, scales) = (golden.u8(&field("mx_packed")), golden.u8(&field("mx_scale_e8m0")));
        let max_scale = nvfp4::cast_max_scale(&scales);
        assert_eq!(i64::from(max_scale.unwrap()) - 127, golden.i64(&field("k_max")));
        let global = nvfp4::cast_global_scale(max_scale);
        assert_bits(&[global], &golden.f32(&field("weight_scale_2")), &case);
        let (mut out_codes, mut out_scales) = (vec![0; codes.len()], vec![0; scales.len() * 2]);
        let counts = nvfp4::cast_from_mxfp4(&codes, &scales, max_scale, &mut out_codes, &mut out_scales);
        assert_eq!(out_scales, golden.u8(&field("weight_scale")), "{case}");
        assert_eq!(out_codes, golden.u8(&field("packed")), "{case}");
        assert_eq!(counts.blocks as i64, golden.i64(&field("n_blocks")), "{case}");
        assert_eq!(counts.lossless_blocks as i64, golden.i64(&field("n_lossless")), "{case}");
        let exact = codes.len() as i64 * 2 - counts.changed_values as i64;
        assert_eq!(exact, golden.i64(&field("bit_exact_elements")), "{case}");
        let mut values = vec![0.0; codes.len() * 2];
        nvfp4::dequantize(&out_codes, &out_scales, global, &mut values);
        assert_values(&to_bf16(&values), &golden.f32(&field("dequant_bf16")), &case);
    }
}

#[test]
fn swizzled_scales() {
    let golden = Golden::open("peers.safetensors");
    let mut seen = 0;
    for name in golden.names() {
        let Some(case) = name.strip_suffix(".linear") else { continue };
        let shape = golden.shape(&name);
        let swizzled = nvfp4::swizzle(&golden.u8(&name), shape[0], shape[1]);
        assert_eq!(swizzled, golden.u8(&format!("{case}.swizzled")), "{case}");
        seen += 1;
    }
    assert_eq!(seen, 3);
}

#[test]
fn peers_files_are_read() {
    let golden = Golden::open("peers.safetensors");
    for case in ["ct_normal_bf16", "ct_zero_blocks_f32"] {
        let codes = golden.u8(&format!("{case}.weight_packed"));
        let scales = golden.u8(&format!("{case}.weight_scale"));
        let global = 1.0 / golden.f32(&format!("{case}.weight_global_scale"))[0];
        let mut values = vec![0.0; codes.len() * 2];
        nvfp4::dequantize(&codes, &scales, global, &mut values);
        // The peer computes in BF16: one step of it.
        for (found, expected) in values.iter().zip(golden.f32(&format!("{case}.decompressed"))) {
            assert!((found - expected).abs() <= expected.abs() / 128.0, "{case}: {found}, {expected}");
        }
    }
}

#[test]
fn max_calibrated_linear() {
    let golden = Golden::open("calib_linear.safetensors");
    let weight = golden.f32("weight");
    for case in ["max", "weight_only"] {
        let global = nvfp4::global_scale(nvfp4::amax(&weight));
        assert_bits(&[global], &golden.f32(&format!("{case}.weight_scale_2")), case);
        let (mut codes, mut scales) = (vec![0; weight.len() / 2], vec![0; weight.len() / nvfp4::BLOCK]);
        nvfp4::quantize(&weight, global, &mut codes, &mut scales);
        assert_eq!(codes, golden.u8(&format!("{case}.packed")));
        assert_eq!(scales, golden.u8(&format!("{case}.weight_scale")));
    }
}

#[test]
fn static_fake_quantization() {
    let golden = Golden::open("fakequant.safetensors");
    for (case, max_scale, tolerance) in
        [("static_448", nvfp4::STATIC_MAX_SCALE, 0.0), ("static_256", nvfp4::FOUR_OVER_SIX_MAX_SCALE, 2e-7)]
    {
        let field = |name: &str| golden.f32(&format!("{case}.{name}"));
        let search = nvfp4::ScaleSearch::new(field("global_amax")[0], max_scale);
        let close = |found: f32, expected: f32| (found - expected).abs() <= tolerance * expected.abs();
        let blocks = field("block_amax").into_iter().zip(field("block_scale"));
        for ((amax, scale), (input, output)) in
            blocks.zip(field("input").chunks_exact(16).zip(field("output").chunks_exact(16)))
        {
            let found = search.trial_scale(amax);
            assert!(close(found, scale), "{case}: expected {scale}, found {found}");
            for (&value, &expected) in input.iter().zip(output) {
                let found = e2m1::decode(e2m1::encode(value / found)) * found;
                assert!(close(found, expected), "{case}: expected {expected}, found {found}");
            }
        }
    }
}

/// Encodes a tensor whose block scales `choose` finds.
fn encode(values: &[f32], global: f32, choose: impl Fn(&[f32]) -> u8) -> (Vec<u8>, Vec<u8>) {
    let mut codes = vec![0; values.len() / 2];
    let scales: Vec<u8> = values.chunks_exact(nvfp4::BLOCK).map(choose).collect();
    for ((values, codes), &scale) in
        values.chunks_exact(nvfp4::BLOCK).zip(codes.chunks_exact_mut(nvfp4::BLOCK / 2)).zip(&scales)
    {
        nvfp4::encode_block(values, scale, global, codes);
    }
    (codes, scales)
}

#[test]
fn searched_scales_of_a_linear() {
    let golden = Golden::open("calib_linear.safetensors");
    let weight = golden.f32("weight");
    let amax = nvfp4::amax(&weight);
    for (case, max_scale) in
        [("mse_fp8_sweep", nvfp4::STATIC_MAX_SCALE), ("four_over_six", nvfp4::FOUR_OVER_SIX_MAX_SCALE)]
    {
        let search = nvfp4::ScaleSearch::new(amax, max_scale);
        let global = nvfp4::static_global_scale(amax, max_scale);
        assert_bits(&[global], &golden.f32(&format!("{case}.weight_scale_2")), case);
        for full in [true, false] {
            let choose = |values: &[f32]| match case {
                "mse_fp8_sweep" => search.best_of_sweep(values, full),
                _ => search.four_over_six(values),
            };
            let (codes, scales) = encode(&weight, global, choose);
            assert_eq!(scales, golden.u8(&format!("{case}.weight_scale")), "{case}");
            assert_eq!(codes, golden.u8(&format!("{case}.packed")), "{case}");
        }
    }
}
