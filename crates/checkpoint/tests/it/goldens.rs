//! Folders written by other programs open, and hold the values that those programs say.

use std::os::unix::fs::FileExt;

use checkpoint::*;
use half::bf16;
use numerics::{e2m1, e4m3, e8m0};

use crate::{assert_identical, open, testdata};

#[test]
fn original_and_hugging_face_layouts_hold_the_same_model() {
    let (a, b) = (open("model/hf-mxfp4"), open("model/original-mxfp4"));
    assert_eq!(a.config(), b.config());
    assert_identical(&a, &b);
}

/// The lossless cast of experts: files without the rest of a model, read tensor by tensor.
#[test]
fn the_cast_from_mxfp4_has_the_values_of_its_source() {
    let file = |path: &str| TensorFile::open(&testdata(path)).unwrap();
    let source = file("quant/tiny_gptoss/mxfp4_source/model.safetensors");
    let cast = file("quant/tiny_gptoss/nvfp4_cast_from_mxfp4/model.safetensors");
    for (name, rows, cols) in [("gate_up_proj", 192, 64), ("down_proj", 64, 96)] {
        let data = |file: &TensorFile, suffix: &str, dtype, shape: &[usize]| {
            let name = format!("model.layers.1.mlp.experts.{name}{suffix}");
            let tensor = file.tensor(&name).unwrap();
            assert_eq!((tensor.dtype, tensor.shape.as_slice()), (dtype, shape), "{name}");
            file.data(tensor).to_vec()
        };
        let mx = data(&source, "_blocks", Dtype::U8, &[4, rows, cols / 32, 16]);
        let mx_scales = data(&source, "_scales", Dtype::U8, &[4, rows, cols / 32]);
        let nv = data(&cast, "", Dtype::U8, &[4, cols / 2, rows]);
        let nv_scales = data(&cast, "_weight_scale", Dtype::F8_E4M3, &[4, cols / 16, rows]);
        let global = data(&cast, "_weight_scale_2", Dtype::F32, &[]);
        let global = f32::from_le_bytes(global.try_into().unwrap());
        for expert in 0..4 {
            for row in 0..rows {
                for col in 0..cols {
                    let mx_at = (expert * rows + row) * cols + col;
                    let mx_code = mx[mx_at / 2] >> (4 * (col % 2));
                    let mx_value = e2m1::decode(mx_code) * e8m0::decode(mx_scales[mx_at / 32]);
                    let nv_code = nv[(expert * cols / 2 + col / 2) * rows + row] >> (4 * (col % 2));
                    let nv_scale = nv_scales[(expert * cols / 16 + col / 16) * rows + row];
                    let nv_value = e2m1::decode(nv_code) * (e4m3::decode(nv_scale) * global);
                    assert_eq!(mx_value, nv_value);
                }
            }
        }
    }
}

#[test]
fn every_golden_folder_opens() {
    let cases = [
        ("model/hf-mxfp4", Layout::Mxfp4),
        ("model/original-mxfp4", Layout::Original),
        ("../models/tiny-gpt-oss", Layout::Mxfp4),
        ("tiny-gpt-oss-bf16", Layout::Bf16),
        ("quant/tiny_gptoss/source", Layout::Bf16),
        ("quant/tiny_gptoss/nvfp4_default", Layout::ModelOpt),
        ("quant/tiny_gptoss/nvfp4_default_kv_fp8", Layout::ModelOpt),
        ("quant/tiny_gptoss/nvfp4_experts_only", Layout::ModelOpt),
        ("quant/tiny_gptoss/nvfp4_four_over_six", Layout::ModelOpt),
        ("quant/tiny_gptoss/w4a16_nvfp4", Layout::ModelOpt),
    ];
    for (path, layout) in cases {
        let checkpoint = open(path);
        assert_eq!(checkpoint.layout(), layout, "{path}");
        assert_eq!(checkpoint.warnings(), &[] as &[String], "{path}");
        let stored: usize = checkpoint.stored().map(|(_, tensor)| tensor.range.len()).sum();
        assert_eq!(checkpoint.tensor_bytes(), stored as u64);
        for id in matrices(checkpoint.config()) {
            let (n, rows, cols) = id.kind.shape(checkpoint.config());
            for expert in 0..n {
                let matrix = checkpoint.matrix(id, expert).unwrap();
                assert_eq!((matrix.rows, matrix.cols), (rows, cols), "{path} {id:?}");
                assert_eq!(matrix.values.format(), checkpoint.format(id));
                assert!(matrix.to_f32().iter().all(|v| v.is_finite()), "{path} {id:?}");
            }
        }
        for id in vectors(checkpoint.config()) {
            let (n, length) = id.kind.shape(checkpoint.config());
            assert_eq!(checkpoint.vector(id).unwrap().len(), n * length, "{path} {id:?}");
        }
    }
}

#[test]
fn published_shapes_have_the_published_number_of_parameters() {
    assert_eq!(Config::gpt_oss_20b().parameters(), 20_914_757_184);
    assert_eq!(Config::gpt_oss_120b().parameters(), 116_829_156_672);
    for config in [Config::gpt_oss_20b(), Config::gpt_oss_120b()] {
        let (read, warnings) = Config::from_value(&config.to_json()).unwrap();
        assert_eq!((read, warnings.len()), (config, 0));
    }
}

/// Element by element from the tensors as they are stored, written without the crate's own reader of stacks.
#[test]
fn nvfp4_experts_have_the_orientation_of_the_bf16_source() {
    let (source, packed) = (open("quant/tiny_gptoss/source"), open("quant/tiny_gptoss/nvfp4_default"));
    for id in matrices(source.config()) {
        let (n, _, _) = id.kind.shape(source.config());
        for expert in 0..n {
            let a = source.matrix(id, expert).unwrap().to_f32();
            let b = packed.matrix(id, expert).unwrap().to_f32();
            let (mut error, mut power) = (0.0, 0.0);
            for (a, b) in a.iter().zip(&b) {
                error += f64::from(a - b).powi(2);
                power += f64::from(*a).powi(2);
            }
            // NVFP4 of Gaussian weights has 0.9 % of the power as error; a wrong orientation has 200 %.
            assert!(error < 0.02 * power, "{id:?} expert {expert}: {error} of {power}");
        }
    }
    let file = &source.files()[0];
    let stored = file.tensor("model.layers.1.mlp.experts.down_proj").unwrap();
    let bytes = file.data(stored);
    let &[_, inputs, outputs] = stored.shape.as_slice() else { panic!("{:?}", stored.shape) };
    let matrix = source.matrix(MatrixKind::Down.at(1), 3).unwrap().to_f32();
    for (output, input) in [(0, 0), (0, 1), (1, 0), (63, 95), (17, 80)] {
        let at = 2 * ((3 * inputs + input) * outputs + output);
        let value = bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        assert_eq!(matrix[output * inputs + input], value);
    }
}

#[test]
fn scales_of_activations_and_cache_are_read() {
    let checkpoint = open("quant/tiny_gptoss/nvfp4_default_kv_fp8");
    assert_eq!(checkpoint.kv_cache(), Some(KvCache::Fp8));
    let scalar = |name: &str| {
        let file = &checkpoint.files()[0];
        f32::from_le_bytes(file.data(file.tensor(name).unwrap()).try_into().unwrap())
    };
    let attention = "model.layers.1.self_attn";
    let scales = checkpoint.kv_scales(1).unwrap();
    assert_eq!(scales.key, scalar(&format!("{attention}.k_proj.k_scale")));
    assert_eq!(scales.value, scalar(&format!("{attention}.v_proj.v_scale")));
    let query = MatrixKind::Query.at(1);
    assert_eq!(checkpoint.input_scale(query), Some(scalar(&format!("{attention}.q_proj.input_scale"))));
    assert_eq!(checkpoint.global_scales(query), &[scalar(&format!("{attention}.q_proj.weight_scale_2"))]);
    assert_eq!(checkpoint.name_of(query), format!("{attention}.q_proj.weight"));

    // Older exports describe the cache in a file of its own alone.
    let folder = tempfile::tempdir().unwrap();
    let source = crate::testdata("quant/tiny_gptoss/nvfp4_default_kv_fp8");
    for name in ["hf_quant_config.json", "model.safetensors"] {
        std::os::unix::fs::symlink(source.join(name), folder.path().join(name)).unwrap();
    }
    let mut config = checkpoint.config_json().clone();
    config["quantization_config"].as_object_mut().unwrap().remove("kv_cache_scheme").unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().kv_cache(), Some(KvCache::Fp8));

    let weight_only = open("quant/tiny_gptoss/w4a16_nvfp4");
    assert_eq!((weight_only.input_scale(query), weight_only.kv_scales(1)), (None, None));
    assert_eq!(weight_only.quantization().unwrap().algorithm.as_deref(), Some("W4A16_NVFP4"));
}

#[test]
fn stop_ids_come_from_either_file() {
    assert_eq!(open("../models/tiny-gpt-oss").generation_config().eos_token_ids, [4082, 4081, 4092]);
    assert_eq!(open("model/hf-mxfp4").generation_config().eos_token_ids, [2]);
}

#[test]
fn no_limit_of_tokens_has_two_spellings() {
    let folder = tempfile::tempdir().unwrap();
    let read = |top_k: i32| {
        let text = format!("{{\"top_k\": {top_k}, \"temperature\": 0.5}}");
        std::fs::write(folder.path().join("generation_config.json"), text).unwrap();
        checkpoint::GenerationConfig::open(folder.path()).map(|read| (read.top_k, read.temperature))
    };
    assert_eq!(read(-1).unwrap(), (None, Some(0.5)));
    assert_eq!(read(7).unwrap(), (Some(7), Some(0.5)));
    assert!(read(-2).unwrap_err().to_string().contains("`top_k`"));
}

#[test]
fn identities_tell_files_apart_and_know_them_again() {
    let folder = tempfile::tempdir().unwrap();
    let source = testdata("model/hf-mxfp4");
    for entry in std::fs::read_dir(&source).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let identity = || Checkpoint::open(folder.path()).unwrap().identity().unwrap();
    let first = identity();
    assert_eq!(identity(), first);
    assert_ne!(first, open("model/hf-mxfp4").identity().unwrap(), "written at another time");
    assert_ne!(first.derived("a"), first.derived("b"));

    // The same bytes, written later; and other bytes.
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let path = checkpoint.files()[0].path().to_owned();
    drop(checkpoint);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    file.set_modified(time + std::time::Duration::from_nanos(50_000_000)).unwrap();
    assert_ne!(identity(), first);
    file.set_modified(time).unwrap();
    assert_eq!(identity(), first);

    // Other weights of the same time: the first byte of a tensor, and the last of the file.
    let end = file.metadata().unwrap().len();
    let start = Checkpoint::open(folder.path()).unwrap().files()[0].tensors()[5].range.start as u64;
    for at in [start, end - 1] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        file.set_modified(time).unwrap();
        assert_ne!(identity(), first, "byte {at}");
        file.write_all_at(&byte, at).unwrap();
        file.set_modified(time).unwrap();
        assert_eq!(identity(), first);
    }
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap().replacen('{', "{\"later\": 1,", 1);
    std::fs::write(&config, text).unwrap();
    assert_ne!(identity(), first);
}
