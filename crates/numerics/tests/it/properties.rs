//! What must hold for any input.

use half::bf16;
use numerics::{e2m1, e4m3, e8m0, mxfp4, nvfp4};
use proptest::prelude::*;

/// Weights of any binade in which a global scale is a normal number.
fn weights(len: usize) -> impl Strategy<Value = Vec<f32>> {
    (-100i32..100, proptest::collection::vec(-1.0f32..1.0, len))
        .prop_map(|(e, v)| v.into_iter().map(|x| x * 2f32.powi(e)).collect())
}

proptest! {
    #[test]
    fn e4m3_rounds_to_the_nearest(value in -600.0f32..600.0) {
        let found = e4m3::decode(e4m3::encode(value));
        let clamped = value.clamp(-448.0, 448.0);
        let best = (0..=255u8).map(e4m3::decode).filter(|v| !v.is_nan())
            .map(|v| (v - clamped).abs()).fold(f32::INFINITY, f32::min);
        prop_assert_eq!((found - clamped).abs(), best);
    }

    #[test]
    fn e2m1_rounds_to_the_nearest(value in -8.0f32..8.0) {
        let found = e2m1::decode(e2m1::encode(value));
        prop_assert_eq!(e2m1::nearest(value), found);
        let clamped = value.clamp(-6.0, 6.0);
        let best = e2m1::VALUES.iter().map(|v| (v - clamped).abs()).fold(f32::INFINITY, f32::min);
        prop_assert_eq!((found - clamped).abs(), best);
    }

    #[test]
    fn quantizing_twice_changes_nothing(values in weights(64)) {
        let global = nvfp4::global_scale(nvfp4::amax(&values));
        let (mut codes, mut scales) = (vec![0; 32], vec![0; 4]);
        nvfp4::quantize(&values, global, &mut codes, &mut scales);
        let mut decoded = vec![0.0; 64];
        nvfp4::dequantize(&codes, &scales, global, &mut decoded);
        let mut again = vec![0; 32];
        for (b, &scale) in scales.iter().enumerate() {
            nvfp4::encode_block(&decoded[b * 16..][..16], scale, global, &mut again[b * 8..][..8]);
        }
        for (a, b) in codes.iter().zip(&again) {
            // Equal but for the sign of zero, which encoding drops.
            prop_assert_eq!(e2m1::decode(*a), e2m1::decode(*b));
            prop_assert_eq!(e2m1::decode(*a >> 4), e2m1::decode(*b >> 4));
        }
    }

    #[test]
    fn fake_quantized_codes_come_back(
        codes in proptest::collection::vec(any::<u8>(), 32),
        scales in proptest::collection::vec(1u8..0x7f, 4),
        exponent in -110i32..100, mantissa in 1.0f32..2.0,
    ) {
        let global = mantissa * 2f32.powi(exponent);
        let mut values = vec![0.0; 64];
        nvfp4::dequantize(&codes, &scales, global, &mut values);
        let fake: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        prop_assume!(fake.iter().all(|v| v.is_finite()));
        let mut recovered = vec![0; 32];
        prop_assert_eq!(nvfp4::recover_codes(&fake, &scales, global, &mut recovered), Ok(()));
        prop_assert_eq!(&codes, &recovered);
        // What no code makes is found: halfway between two values, beyond the largest, or no number.
        for (at, level) in [(3, 2.5), (17, -7.0), (40, f32::NAN), (63, f32::INFINITY)] {
            let mut changed = fake.clone();
            changed[at] = bf16::from_f32(level * e4m3::decode(scales[at / 16]) * global);
            prop_assert_eq!(nvfp4::recover_codes(&changed, &scales, global, &mut recovered), Err(at));
        }
    }

    #[test]
    fn cast_within_the_window_keeps_every_value(
        codes in proptest::collection::vec(any::<u8>(), 64),
        top in 30u8..230,
        below in proptest::collection::vec(0u8..=17, 4),
    ) {
        let mut scales: Vec<u8> = below.iter().map(|b| top - b).collect();
        scales[0] = top;
        let max = nvfp4::cast_max_scale(&scales);
        let (mut out_codes, mut out_scales) = (vec![0; 64], vec![0; 8]);
        let counts = nvfp4::cast_from_mxfp4(&codes, &scales, max, &mut out_codes, &mut out_scales);
        prop_assert_eq!(counts.lossless_blocks, 4);
        prop_assert_eq!(counts.changed_values, 0);
        let (mut before, mut after) = (vec![0.0; 128], vec![0.0; 128]);
        mxfp4::dequantize(&codes, &scales, &mut before);
        nvfp4::dequantize(&out_codes, &out_scales, nvfp4::cast_global_scale(max), &mut after);
        prop_assert_eq!(before, after);
    }

    #[test]
    fn cast_counts_every_changed_value(
        codes in proptest::collection::vec(any::<u8>(), 64),
        scales in proptest::collection::vec(prop_oneof![Just(0u8), 60u8..200], 4),
    ) {
        let max = nvfp4::cast_max_scale(&scales);
        let (mut out_codes, mut out_scales) = (vec![0; 64], vec![0; 8]);
        let counts = nvfp4::cast_from_mxfp4(&codes, &scales, max, &mut out_codes, &mut out_scales);
        let (mut before, mut after) = (vec![0.0; 128], vec![0.0; 128]);
        mxfp4::dequantize(&codes, &scales, &mut before);
        nvfp4::dequantize(&out_codes, &out_scales, nvfp4::cast_global_scale(max), &mut after);
        let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count() as u64;
        prop_assert_eq!(counts.changed_values, changed);
        prop_assert_eq!(counts.blocks, 4);
    }

    #[test]
    fn mxfp4_scale_is_the_smallest_that_does_not_saturate(values in weights(32)) {
        let (mut codes, mut scales) = (vec![0; 16], vec![0; 1]);
        mxfp4::quantize(&values, &mut codes, &mut scales);
        let amax = nvfp4::amax(&values);
        prop_assume!(amax > 0.0);
        prop_assert!(amax <= 6.0 * e8m0::decode(scales[0]) * 1.000001);
        prop_assert!(amax > 3.0 * e8m0::decode(scales[0]) * 0.999999);
    }

    #[test]
    fn the_window_of_the_sweep_finds_what_the_full_one_finds(
        values in proptest::collection::vec(-1.0f32..1.0, 64), spread in proptest::collection::vec(-6i32..=0, 4),
        exponent in -20i32..20,
    ) {
        // Blocks of different size in one tensor, as in real weights.
        let values: Vec<f32> =
            values.iter().enumerate().map(|(i, v)| v * 2f32.powi(exponent + spread[i / 16])).collect();
        let amax = nvfp4::amax(&values);
        prop_assume!(amax > 1e-20);
        let search = nvfp4::ScaleSearch::new(amax, nvfp4::STATIC_MAX_SCALE);
        let global = nvfp4::static_global_scale(amax, nvfp4::STATIC_MAX_SCALE);
        for block in values.chunks_exact(16) {
            prop_assert_eq!(search.best_of_sweep(block, false), search.best_of_sweep(block, true));
            // And it is never worse than the max rule.
            let error = |scale: u8| {
                let (mut codes, mut out) = ([0; 8], [0.0; 16]);
                nvfp4::encode_block(block, scale, global, &mut codes);
                nvfp4::dequantize(&codes, &[scale], global, &mut out);
                block.iter().zip(out).map(|(b, o)| f64::from(b - o).powi(2)).sum::<f64>()
            };
            let max = nvfp4::block_scale(nvfp4::amax(block), global);
            prop_assert!(error(search.best_of_sweep(block, false)) <= error(max) * 1.00001);
        }
    }
}

#[test]
fn the_largest_and_smallest_tensors_get_the_scales_of_ordinary_ones() {
    for max_scale in [nvfp4::STATIC_MAX_SCALE, nvfp4::FOUR_OVER_SIX_MAX_SCALE] {
        for share in [1.0, 0.7, 0.3, 0.01, 1e-3f32] {
            let scale = |amax: f32| nvfp4::static_block_scale(share * amax, amax, max_scale);
            for exponent in [-100, 100, 120, 125, 127] {
                assert_eq!(scale(1.5 * 2f32.powi(exponent)), scale(1.5), "{share} of 2^{exponent}");
            }
        }
    }
}

/// A block of about this power of two, whose sweeps take the scale of the max rule, with the search and that scale.
fn block_of_the_max_rule(exponent: i32) -> (Vec<f32>, nvfp4::ScaleSearch, u8) {
    let values: Vec<f32> = (1..=16).map(|i| (i as f32).sqrt() * 0.25 * 2f32.powi(exponent)).collect();
    let amax = 3.0 * nvfp4::amax(&values);
    let search = nvfp4::ScaleSearch::new(amax, nvfp4::STATIC_MAX_SCALE);
    let expected = nvfp4::block_scale(nvfp4::amax(&values), nvfp4::global_scale(amax));
    for full in [false, true] {
        assert_eq!(search.best_of_sweep(&values, full), expected, "2^{exponent}");
    }
    (values, search, expected)
}

#[test]
fn where_squared_errors_vanish_the_scale_is_that_of_the_max_rule() {
    for exponent in [-80, -100] {
        block_of_the_max_rule(exponent);
    }
}

#[test]
fn where_squared_errors_overflow_the_scale_is_that_of_the_max_rule() {
    for exponent in [100, 110, 125] {
        let (values, search, expected) = block_of_the_max_rule(exponent);
        // Of the second the infinite parts of a sum have both signs.
        for sign in [1.0, -1.0f32] {
            let row = |r: i32| std::array::from_fn(|c| sign.powi(r + c as i32));
            let hessian = std::array::from_fn(|r| row(r as i32));
            assert_eq!(search.best_by_hessian(&values, &hessian), expected, "2^{exponent}, {sign}");
        }
    }
}
