//! Activations in four bits: bit for bit on every generation; the products where there are any.

use std::sync::Arc;

use checkpoint::{Format, MatrixId, Synthetic};
use cuda::{fp4_self_test, quantize_activations};
use gptoss::{Backend, Reference};
use half::bf16;
use numerics::{e4m3, nvfp4};

use super::{BLOCKS, Scaled, device, golden, load, logits, odd_config, relative, tokens};

/// What the device must give: codes and scales.
fn quantized(values: &[bf16], input_scale: f32) -> (Vec<u8>, Vec<u8>) {
    let (mut codes, mut scales) = (vec![0; values.len() / 2], Vec::new());
    for (values, codes) in values.chunks_exact(16).zip(codes.chunks_exact_mut(8)) {
        let values: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
        let scale = e4m3::encode((nvfp4::amax(&values) / (6.0 * input_scale)).min(e4m3::MAX));
        scales.push(scale);
        if e4m3::decode(scale) * input_scale > 0.0 {
            nvfp4::encode_block(&values, scale, input_scale, codes);
        }
    }
    (codes, scales)
}

#[test]
fn activations_are_quantized_bit_for_bit() {
    let Some(device) = device() else { return };
    for case in ["act_bf16", "act_f32", "act_clipping_f32", "act_small_scale_f32"] {
        let file = "testdata/quant/fakequant.safetensors";
        let scale = nvfp4::global_scale(golden(file, &format!("{case}.global_amax"))[0]);
        let input = golden(file, &format!("{case}.input"));
        let values: Vec<bf16> = match case {
            // Two of them lie in four bytes.
            "act_bf16" => bytemuck::cast_slice(&input).to_vec(),
            _ => input.into_iter().map(bf16::from_f32).collect(),
        };
        let found = quantize_activations(&device, &values, scale).unwrap();
        assert_eq!(found, quantized(&values, scale), "{case}");
        if case == "act_bf16" {
            let mut out = vec![0.0; values.len()];
            nvfp4::dequantize(&found.0, &found.1, scale, &mut out);
            assert_eq!(out, golden(file, &format!("{case}.output_f32")));
        }
    }
    // Every finite BF16 number, in blocks of neighbours and in blocks far apart.
    let finite: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).filter(|v| v.is_finite()).collect();
    let apart: Vec<bf16> = (0..finite.len()).map(|i| finite[i * 4099 % finite.len()]).collect();
    for values in [finite, apart] {
        for scale in [1.0, 0.0123, 3e-5, 1e-38, 1e30] {
            let found = quantize_activations(&device, &values, scale).unwrap();
            assert!(found == quantized(&values, scale), "input scale {scale:e}");
        }
    }
}

#[test]
fn fp4_products_pass_their_self_test() {
    let Some(device) = device() else { return };
    let tests = fp4_self_test(&device).unwrap();
    assert_eq!(tests.len(), if matches!(device.capability(), 100 | 103 | 120) { 3 } else { 0 });
    for test in tests {
        eprintln!("{test:?}");
        assert!(test.passed, "{test:?}");
    }
}

#[test]
fn a_w4a4_model_runs_in_fp4_where_it_can() {
    let Some(device) = device() else { return };
    let pick = |id: MatrixId| match id.kind.is_expert() || id.kind.is_attention() {
        true => Format::Nvfp4,
        false => Format::Bf16,
    };
    let weights = Arc::new(Synthetic::new(odd_config(), pick, 7));
    let weights = Scaled { weights, cache: None, input: |_| Some(8.0 / 2688.0) };
    let mut cuda = load(&device, &weights);
    let (few, many) = (logits(&mut cuda, &tokens(200), 7), logits(&mut cuda, &tokens(200), 200));
    let matrices = cuda.use_fp4(&weights).unwrap();
    assert_eq!(logits(&mut cuda, &tokens(200), 7), few, "few tokens keep 16 bits");
    let found = logits(&mut cuda, &tokens(200), 200);
    if matrices == 0 {
        assert!(found == many, "without FP4 products nothing changes");
        return;
    }
    // Three layers of four matrices; four bits differ from 16, but not much.
    assert_eq!(matrices, 12);
    let mut reference = Reference::new(Arc::new(weights));
    reference.allocate_kv(BLOCKS, BLOCKS).unwrap();
    let error = relative(&found, &logits(&mut reference, &tokens(200), 200));
    eprintln!("relative error {error:.2e}");
    assert!(found != many && error < 0.5, "{error:e}");
}
