//! Files that lie. Opening them is an error that names what is wrong, never a panic.

use std::path::Path;

use checkpoint::*;
use half::bf16;
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tempfile::{TempDir, tempdir};

use crate::{nvfp4, testdata, write_all};

/// A safetensors file: its header as JSON, its data.
struct Parts {
    header: Map<String, Value>,
    data: Vec<u8>,
}

impl Parts {
    fn read(path: &Path) -> Parts {
        let bytes = std::fs::read(path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        Parts { header, data: bytes[8 + length..].to_vec() }
    }

    fn bytes(&self) -> Vec<u8> {
        file(&Value::Object(self.header.clone()).to_string(), &self.data)
    }

    fn range(&self, name: &str) -> std::ops::Range<usize> {
        let offset = |i: usize| self.header[name]["data_offsets"][i].as_u64().unwrap() as usize;
        offset(0)..offset(1)
    }

    fn rename(&mut self, from: &str, to: &str) {
        let tensor = self.header.remove(from).unwrap();
        self.header.insert(to.to_owned(), tensor);
    }
}

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// A copy of a golden folder whose tensor file is made anew.
fn folder_with(golden: &str, bytes: &[u8]) -> TempDir {
    let folder = tempdir().unwrap();
    let source = testdata(golden);
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

const PACKED: &str = "quant/tiny_gptoss/nvfp4_default";

fn packed() -> Parts {
    Parts::read(&testdata(PACKED).join("model.safetensors"))
}

/// Opens a golden export after a change of its tensors.
#[track_caller]
fn open_changed(change: impl FnOnce(&mut Parts)) -> Result<Checkpoint, Error> {
    let mut parts = packed();
    change(&mut parts);
    Checkpoint::open(folder_with(PACKED, &parts.bytes()).path())
}

#[track_caller]
fn mismatch(change: impl FnOnce(&mut Parts)) -> Mismatch {
    match open_changed(change).unwrap_err() {
        Error::Tensors { mismatch, .. } => *mismatch,
        other => panic!("{other}"),
    }
}

#[test]
fn every_tensor_is_accounted_for() {
    let name = "model.layers.1.self_attn.v_proj.weight_scale";
    let found = mismatch(|parts| parts.rename(name, "model.layers.1.self_attn.v_proj.scale"));
    assert_eq!(found.missing, [name]);
    assert_eq!(found.unknown, ["model.layers.1.self_attn.v_proj.scale"]);
    assert!(found.misshapen.is_empty());

    // The same for the tensors that other engines drop in silence.
    let name = "model.layers.0.mlp.experts.gate_up_proj_weight_scale_2";
    assert_eq!(mismatch(|parts| parts.rename(name, "x")).missing, [name]);

    let name = "model.layers.0.mlp.router.bias";
    let found = mismatch(|parts| parts.header[name]["shape"] = json!([2, 2]));
    assert_eq!(
        found.misshapen,
        ["model.layers.0.mlp.router.bias: expected BF16 or F32 or F16 [4], found BF16 [2, 2]"]
    );
    let found = mismatch(|parts| parts.header[name]["dtype"] = json!("I16"));
    let expected = "model.layers.0.mlp.router.bias: expected BF16 or F32 or F16 [4], found I16 [4]";
    assert_eq!(found.misshapen, [expected]);

    // The untransposed stack has as many bytes.
    let found =
        mismatch(|parts| parts.header["model.layers.0.mlp.experts.down_proj"]["shape"] = json!([4, 64, 48]));
    assert!(found.misshapen[0].contains("expected U8 [4, 48, 64]"), "{found:?}");
    // Codes of another type are taken for unpacked weights, and their scales belong to nothing.
    let found =
        mismatch(|parts| parts.header["model.layers.0.self_attn.q_proj.weight"]["dtype"] = json!("I8"));
    assert_eq!((found.misshapen.len(), found.unknown.len()), (1, 3));
    // A layer too many.
    let found = mismatch(|parts| {
        let end = parts.data.len();
        parts.data.extend([0; 128]);
        parts.header.insert(
            "model.layers.2.input_layernorm.weight".to_owned(),
            json!({"dtype": "BF16", "shape": [64], "data_offsets": [end, end + 128]}),
        );
    });
    assert_eq!(found.unknown, ["model.layers.2.input_layernorm.weight"]);
}

#[test]
fn long_lists_are_cut_in_messages() {
    let error = Checkpoint::open(folder_with("tiny-gpt-oss-bf16", &packed().bytes()).path()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains(" and 24 more; misshapen: ") && message.ends_with(" and 39 more"), "{message}");
    assert!(message.len() < 6000, "{}", message.len());
}

#[test]
fn expert_parts_are_no_model() {
    let bytes = std::fs::read(testdata("quant/tiny_gptoss/nvfp4_cast_from_mxfp4/model.safetensors")).unwrap();
    let error =
        Checkpoint::open(folder_with("quant/tiny_gptoss/nvfp4_experts_only", &bytes).path()).unwrap_err();
    assert!(error.to_string().contains("model.embed_tokens.weight"), "{error}");
}

#[test]
fn other_legal_spellings_of_scales_are_read() {
    let golden = Checkpoint::open(&testdata(PACKED)).unwrap();
    let stack = "model.layers.0.mlp.experts.gate_up_proj";
    // Dotted suffixes.
    let read = open_changed(|parts| {
        for suffix in ["weight_scale", "weight_scale_2", "input_scale", "bias"] {
            parts.rename(&format!("{stack}_{suffix}"), &format!("{stack}.{suffix}"));
        }
    });
    crate::assert_same_storage(&golden, &read.unwrap());
    // Dimensions of one for a scalar.
    for shape in [json!([1]), json!([1, 1])] {
        let read = open_changed(|parts| parts.header[&format!("{stack}_weight_scale_2")]["shape"] = shape);
        crate::assert_same_storage(&golden, &read.unwrap());
    }
    // One per expert, of a stack: the largest of its inputs' covers them all.
    let each = |parts: &mut Parts, name: &str, values: [f32; 4], shape: &[usize]| {
        let at = parts.data.len();
        parts.data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let tensor = json!({"dtype": "F32", "shape": shape, "data_offsets": [at, at + 16]});
        // The header leaves no gap: what was there belongs to nobody else.
        let old = parts.header.insert(name.to_owned(), tensor).unwrap();
        parts.header.insert("model.layers.9.old".to_owned(), old);
    };
    for suffix in ["weight_scale_2", "input_scale"] {
        for shape in [&[4][..], &[4, 1], &[4, 1, 1]] {
            let found =
                mismatch(|parts| each(parts, &format!("{stack}_{suffix}"), [1.0, 2.0, 4.0, 3.0], shape));
            assert!(found.misshapen.is_empty(), "{found:?}");
        }
    }
    for name in ["q_proj.weight_scale_2", "q_proj.input_scale"] {
        let name = format!("model.layers.0.self_attn.{name}");
        let found = mismatch(|parts| each(parts, &name, [1.0, 2.0, 4.0, 3.0], &[4]));
        assert_eq!(found.misshapen, [format!("{name}: expected F32 [], found F32 [4]")]);
    }
    // Both spellings at once: one of them is nobody's.
    let found = mismatch(|parts| {
        let end = parts.data.len();
        parts.data.extend(1.0f32.to_le_bytes());
        parts.header.insert(
            format!("{stack}.weight_scale_2"),
            json!({"dtype": "F32", "shape": [], "data_offsets": [end, end + 4]}),
        );
    });
    assert_eq!(found.unknown, [format!("{stack}.weight_scale_2")]);
}

#[test]
fn scales_that_no_quantizer_writes_are_refused() {
    let name = "model.layers.1.mlp.experts.down_proj_weight_scale_2";
    for value in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = open_changed(|parts| {
            let range = parts.range(name);
            parts.data[range].copy_from_slice(&value.to_le_bytes());
        })
        .unwrap_err();
        assert!(matches!(&error, Error::Scale { tensor, .. } if tensor == name), "{value}: {error}");
    }
    for byte in [0x7f, 0xff, 0x80, 0xb8] {
        let checkpoint = open_changed(|parts| {
            let range = parts.range("model.layers.1.self_attn.k_proj.weight_scale");
            parts.data[range.end - 1] = byte;
        })
        .unwrap();
        // As often as one asks.
        for _ in 0..2 {
            let error = checkpoint.matrix(MatrixKind::Key.at(1), 0).unwrap_err();
            assert!(matches!(error, Error::Scale { .. }), "{byte}");
        }
        assert!(checkpoint.matrix(MatrixKind::Key.at(0), 0).is_ok());
    }
    let source = "model/original-mxfp4";
    let mut parts = Parts::read(&testdata(source).join("model.safetensors"));
    let range = parts.range("block.3.mlp.mlp2_weight.scales");
    parts.data[range.end - 1] = 255;
    let checkpoint = Checkpoint::open(folder_with(source, &parts.bytes()).path()).unwrap();
    assert!(checkpoint.matrix(MatrixKind::Down.at(3), 0).is_ok());
    let error = checkpoint.matrix(MatrixKind::Down.at(3), 7).unwrap_err();
    assert!(error.to_string().contains("block.3.mlp.mlp2_weight.blocks"), "{error}");
}

#[test]
fn headers_that_lie_are_refused() {
    let tensor = |dtype: &str, shape: &str, from: &str, to: &str| {
        format!("{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{from},{to}]}}")
    };
    let one = tensor("U8", "[4]", "0", "4");
    let huge = u64::MAX.to_string();
    let half = (1u64 << 32).to_string();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("seven bytes", vec![0; 7]),
        ("no header", vec![0; 8]),
        ("header longer than the file", [100u64.to_le_bytes().as_slice(), b"{}"].concat()),
        ("header of the largest length", [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat()),
        ("length that overflows", [(u64::MAX - 7).to_le_bytes().as_slice(), b"{}"].concat()),
        ("not JSON", file("{", &[])),
        ("a list", file("[]", &[])),
        ("not UTF-8", [2u64.to_le_bytes().as_slice(), &[0xff, 0xfe]].concat()),
        ("a byte too many", file(&format!("{{\"a\":{one}}}"), &[0; 5])),
        ("a byte too few", file(&format!("{{\"a\":{one}}}"), &[0; 3])),
        ("the same name twice", file(&format!("{{\"a\":{one},\"a\":{one}}}"), &[0; 4])),
        ("the same name twice, placed well", {
            let two = tensor("U8", "[4]", "4", "8");
            file(&format!("{{\"a\":{one},\"a\":{two}}}"), &[0; 8])
        }),
        ("an overlap", {
            let two = tensor("U8", "[4]", "2", "6");
            file(&format!("{{\"a\":{one},\"b\":{two}}}"), &[0; 6])
        }),
        ("a gap", {
            let two = tensor("U8", "[4]", "5", "9");
            file(&format!("{{\"a\":{one},\"b\":{two}}}"), &[0; 9])
        }),
        ("offsets reversed", file(&format!("{{\"a\":{}}}", tensor("U8", "[4]", "4", "0")), &[0; 4])),
        (
            "offsets beyond all",
            file(&format!("{{\"a\":{}}}", tensor("U8", &format!("[{huge}]"), "0", &huge)), &[]),
        ),
        ("a shape that overflows", {
            file(&format!("{{\"a\":{}}}", tensor("F32", &format!("[{half},{half}]"), "0", "0")), &[])
        }),
        ("a shape that overflows in bits", {
            let shape = format!("[{}]", 1u64 << 61);
            file(&format!("{{\"a\":{}}}", tensor("U8", &shape, "0", "0")), &[])
        }),
        (
            "a size that is not the shape's",
            file(&format!("{{\"a\":{}}}", tensor("F32", "[2]", "0", "4")), &[0; 4]),
        ),
        ("a negative dimension", file(&format!("{{\"a\":{}}}", tensor("U8", "[-4]", "0", "4")), &[0; 4])),
        ("an unknown type", file(&format!("{{\"a\":{}}}", tensor("Q4", "[4]", "0", "4")), &[0; 4])),
        ("deep nesting", file(&"[".repeat(100_000), &[])),
        ("deep nesting in the metadata", file(&format!("{{\"__metadata__\":{}}}", "[".repeat(100_000)), &[])),
    ];
    let folder = tempdir().unwrap();
    let path = folder.path().join("lying.safetensors");
    for (name, bytes) in cases {
        std::fs::write(&path, &bytes).unwrap();
        let error = TensorFile::open(&path).unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{name}: {error}");
        let message = error.to_string();
        assert!(message.contains("lying.safetensors") && message.len() < 600, "{name}: {message}");
    }
    for (tensor, named) in [
        (tensor("F32", "[2]", "0", "4"), "tensor `a`, F32 [2], at bytes 0 to 4 instead of 0 to 8"),
        (tensor("U8", "[4]", "1", "5"), "tensor `a`, U8 [4], at bytes 1 to 5 instead of 0 to 4"),
        (tensor("F4", "[3]", "0", "2"), "tensor `a`, F4 [3], at bytes 0 to 2 where no such tensor has room"),
    ] {
        std::fs::write(&path, file(&format!("{{\"a\":{tensor}}}"), &[0; 8])).unwrap();
        let message = TensorFile::open(&path).unwrap_err().to_string();
        assert!(message.ends_with(&format!("expected a safetensors file, found {named}")), "{message}");
    }
    std::fs::write(&path, file(&format!("{{\"a\":{one}}}"), &[1, 2, 3, 4])).unwrap();
    let file = TensorFile::open(&path).unwrap();
    assert_eq!(file.data(file.tensor("a").unwrap()), [1, 2, 3, 4]);
}

#[test]
fn truncated_files_are_refused_wherever_they_end() {
    let bytes = packed().bytes();
    for kept in [0, 1, 7, 8, 9, 5000, bytes.len() / 2, bytes.len() - 1] {
        let error = Checkpoint::open(folder_with(PACKED, &bytes[..kept]).path()).unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{kept}: {error}");
    }
}

#[test]
fn the_ranges_of_quantizers_are_passed_over() {
    let mut parts = Parts::read(&testdata("tiny-gpt-oss-bf16").join("model.safetensors"));
    let end = parts.data.len();
    parts.data.extend([0; 6]);
    for (at, name) in [
        (0, "mlp.experts.gate_up_proj_weight_quantizer._amax"),
        (2, "self_attn.q_proj.input_quantizer._amax"),
        (4, "self_attn.q_proj.input_quantizer._pre_quant_scale"),
    ] {
        let range = json!({"dtype": "BF16", "shape": [], "data_offsets": [end + at, end + at + 2]});
        parts.header.insert(format!("model.layers.0.{name}"), range);
    }
    // These change what the weights stand for.
    let Err(Error::Tensors { mismatch, .. }) =
        Checkpoint::open(folder_with("tiny-gpt-oss-bf16", &parts.bytes()).path())
    else {
        panic!("opened");
    };
    assert_eq!(mismatch.unknown, ["model.layers.0.self_attn.q_proj.input_quantizer._pre_quant_scale"]);
    parts.header.remove(&mismatch.unknown[0]);
    parts.data.truncate(end + 4);
    let folder = folder_with("tiny-gpt-oss-bf16", &parts.bytes());
    let read = Checkpoint::open(folder.path()).unwrap();
    assert!(read.warnings()[0].contains("2 ranges of Model Optimizer's"), "{:?}", read.warnings());
}

#[test]
fn decoded_experts_may_be_described_as_what_they_were() {
    let folder = tempdir().unwrap();
    let source = testdata("tiny-gpt-oss-bf16");
    std::os::unix::fs::symlink(source.join("model.safetensors"), folder.path().join("model.safetensors"))
        .unwrap();
    let text = std::fs::read(source.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    config["quantization_config"] = json!({"quant_method": "mxfp4", "dequantize": true});
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let read = Checkpoint::open(folder.path()).unwrap();
    assert_eq!((read.layout(), read.quantization().is_some()), (Layout::Bf16, false));
    assert!(read.warnings().iter().any(|warning| warning.contains("says mxfp4")), "{:?}", read.warnings());
}

#[test]
fn wider_and_other_floats_are_rounded_with_a_warning() {
    let source = testdata("tiny-gpt-oss-bf16");
    let original = Checkpoint::open(&source).unwrap();
    let (id, norm) = (MatrixKind::Down.at(1), VectorKind::InputNorm.at(1));
    for dtype in ["F32", "F16"] {
        let mut parts = Parts::read(&source.join("model.safetensors"));
        let mut data = Vec::new();
        let mut tensors: Vec<(&String, &mut Value)> = parts.header.iter_mut().collect();
        tensors.retain(|(name, _)| *name != "__metadata__");
        tensors.sort_by_key(|(_, tensor)| tensor["data_offsets"][0].as_u64());
        for (_, tensor) in tensors {
            let at = |i: usize| tensor["data_offsets"][i].as_u64().unwrap() as usize;
            let start = data.len();
            for pair in parts.data[at(0)..at(1)].chunks_exact(2) {
                // A little more than BF16 holds, so that it has to be rounded.
                let value = bf16::from_le_bytes([pair[0], pair[1]]).to_f32();
                if dtype == "F32" {
                    data.extend((value * 1.0005).to_le_bytes());
                } else {
                    data.extend(half::f16::from_f32(value).to_le_bytes());
                }
            }
            tensor["dtype"] = json!(dtype);
            tensor["data_offsets"] = json!([start, data.len()]);
        }
        parts.data = data;
        let folder = folder_with("tiny-gpt-oss-bf16", &parts.bytes());
        let read = Checkpoint::open(folder.path()).unwrap();
        assert!(read.warnings().iter().any(|warning| warning.contains("rounded to BF16")), "{dtype}");
        let (before, after) = (original.matrix(id, 2).unwrap(), read.matrix(id, 2).unwrap());
        assert_eq!((read.format(id), after.values.format()), (Format::Bf16, Format::Bf16));
        for (before, after) in before.to_f32().iter().zip(after.to_f32()) {
            assert!((before - after).abs() <= 0.001 * before.abs() + 1e-7, "{dtype}: {before} {after}");
        }
        assert!(matches!(read.vector(norm).unwrap(), Vector::F32(_)), "{dtype}");
    }
}

#[test]
fn pointers_to_files_that_were_not_fetched_are_told_as_such() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13761264768\n";
    let error = Checkpoint::open(folder_with(PACKED, pointer).path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: ") && error.contains("git lfs pull"), "{error}");
}

/// A model in shards, written by ourselves, with its index.
fn sharded() -> (TempDir, Value) {
    let folder = tempdir().unwrap();
    let weights = nvfp4();
    let target = Target { shard_bytes: 60_000, ..Target::new(weights.config().to_json(), Layout::ModelOpt) };
    write_all(&weights, &target, &folder.path().join("model")).unwrap();
    let text = std::fs::read(folder.path().join("model").join(INDEX)).unwrap();
    (folder, serde_json::from_slice(&text).unwrap())
}

const INDEX: &str = "model.safetensors.index.json";

#[test]
fn the_index_has_to_agree_with_the_shards() {
    let (folder, index) = sharded();
    let model = folder.path().join("model");
    let open_with = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut index = index.clone();
        change(index["weight_map"].as_object_mut().unwrap());
        std::fs::write(model.join(INDEX), index.to_string()).unwrap();
        Checkpoint::open(&model)
    };
    open_with(&|_| {}).unwrap();
    let first = index["weight_map"]["model.embed_tokens.weight"].as_str().unwrap().to_owned();
    let last = index["weight_map"]["lm_head.weight"].as_str().unwrap().to_owned();
    assert_ne!(first, last);
    std::fs::copy(model.join(&first), folder.path().join(&first)).unwrap();

    for outside in
        [format!("../{first}"), folder.path().join(&first).to_str().unwrap().to_owned(), "..".to_owned()]
    {
        let error = open_with(&|map| {
            map["model.embed_tokens.weight"] = json!(outside);
        })
        .unwrap_err();
        assert!(error.to_string().contains("same folder"), "{outside}: {error}");
    }
    for bad in ["", ".", "a/b.safetensors", "./a.safetensors", "a\0b", "sub\\x.safetensors"] {
        let error = open_with(&|map| {
            map["model.embed_tokens.weight"] = json!(bad);
        })
        .unwrap_err();
        assert!(error.to_string().contains("same folder"), "{bad:?}: {error}");
    }
    let error = open_with(&|map| map["lm_head.weight"] = json!(first)).unwrap_err();
    assert!(error.to_string().contains("`lm_head.weight`"), "{error}");
    let error = open_with(&|map| drop(map.remove("lm_head.weight"))).unwrap_err();
    assert!(error.to_string().contains("`lm_head.weight`"), "{error}");
    let error = open_with(&|map| drop(map.insert("ghost".to_owned(), json!(first)))).unwrap_err();
    assert!(error.to_string().contains("`ghost`"), "{error}");
    let error = open_with(&|map| map["lm_head.weight"] = json!("missing.safetensors")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let error = open_with(&|map| map["lm_head.weight"] = json!(3)).unwrap_err();
    assert!(error.to_string().contains("`lm_head.weight`"), "{error}");

    // A model in one file beside the index: that of a later save, if the shards are not there any more.
    open_with(&|_| {}).unwrap();
    let whole = folder.path().join("whole");
    let weights = nvfp4();
    write_all(&weights, &Target::new(weights.config().to_json(), Layout::ModelOpt), &whole).unwrap();
    std::fs::copy(whole.join("model.safetensors"), model.join("model.safetensors")).unwrap();
    let error = Checkpoint::open(&model).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: expected either this file or"), "{error}");
    std::fs::rename(model.join(&last), folder.path().join(&last)).unwrap();
    Checkpoint::open(&model).unwrap();
    std::fs::rename(folder.path().join(&last), model.join(&last)).unwrap();
    std::fs::remove_file(model.join("model.safetensors")).unwrap();

    // Without an index all shards are taken; a tensor in two of them is nobody's.
    std::fs::remove_file(model.join(INDEX)).unwrap();
    Checkpoint::open(&model).unwrap();
    std::fs::copy(model.join(&first), model.join("again.safetensors")).unwrap();
    let error = Checkpoint::open(&model).unwrap_err();
    assert!(error.to_string().contains("again.safetensors"), "{error}");
}

#[test]
fn folders_that_are_no_models_are_named() {
    let folder = tempdir().unwrap();
    let path = folder.path();
    assert!(matches!(Checkpoint::open(&path.join("nowhere")), Err(Error::Io { .. })));
    let message = |path: &Path| Checkpoint::open(path).unwrap_err().to_string();
    assert!(message(path).contains("config.json"));
    std::fs::copy(testdata(PACKED).join("config.json"), path.join("config.json")).unwrap();
    assert!(message(path).contains(".safetensors"));
    assert!(message(&path.join("config.json")).contains("a file"));
    std::fs::create_dir(path.join("model.safetensors")).unwrap();
    assert!(message(path).contains("regular file"));
    std::fs::write(path.join("config.json"), "{\"a\":").unwrap();
    assert!(matches!(Checkpoint::open(path), Err(Error::Json { .. })));
}

#[test]
fn fake_scales_are_accounted_for_too() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let weights = nvfp4();
    write_all(&weights, &Target::new(weights.config().to_json(), Layout::FakeBf16), &out).unwrap();
    let path = out.join("fake_quant/scales.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let name = "model.layers.0.mlp.experts.down_proj_weight_scale";
    let mut parts = Parts::read(&path);
    parts.rename(name, "stray");
    std::fs::write(&path, parts.bytes()).unwrap();
    let Error::Tensors { mismatch, .. } = Checkpoint::open(&out).unwrap_err() else { panic!() };
    assert_eq!((mismatch.missing, mismatch.unknown), (vec![name.to_owned()], vec!["stray".to_owned()]));

    let mut parts = Parts::read(&path);
    parts.rename("stray", name);
    let range = parts.range(name);
    parts.data[range.start] = 0x7f;
    std::fs::write(&path, parts.bytes()).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert!(checkpoint.matrix(MatrixKind::Down.at(0), 0).is_ok());
    assert!(checkpoint.packed().matrix(MatrixKind::Down.at(0), 0).is_err());

    // Values that the scales do not make are not rounded to some that they do.
    std::fs::write(&path, &whole).unwrap();
    let model = out.join("model.safetensors");
    let name = "model.layers.0.mlp.experts.down_proj";
    for bad in [bf16::NAN, bf16::INFINITY, bf16::MAX] {
        let mut parts = Parts::read(&model);
        let start = parts.range(name).start;
        parts.data[start..start + 2].copy_from_slice(&bad.to_le_bytes());
        std::fs::write(&model, parts.bytes()).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        let packed = checkpoint.packed();
        let error = packed.matrix(MatrixKind::Down.at(0), 0).unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "tensor `{name}`: expected values that its scales in fake_quant/ make of four bits (if the weights were \
                 trained since, delete that folder), found {bad} at 0 of matrix 0"
            )
        );
        assert!(packed.matrix(MatrixKind::Down.at(0), 1).is_ok());
    }

    // Without its scales the folder is not taken for one of plain weights.
    std::fs::remove_file(&path).unwrap();
    let error = Checkpoint::open(&out).unwrap_err().to_string();
    assert!(error.contains("fake_quant: expected scales.safetensors in it"), "{error}");

    // Beside packed weights the folder has no meaning.
    std::fs::write(&path, whole).unwrap();
    let modelopt = folder.path().join("modelopt");
    write_all(&weights, &Target::new(weights.config().to_json(), Layout::ModelOpt), &modelopt).unwrap();
    std::fs::rename(out.join("fake_quant"), modelopt.join("fake_quant")).unwrap();
    let error = Checkpoint::open(&modelopt).unwrap_err();
    assert!(error.to_string().contains("fake_quant"), "{error}");
}

#[test]
fn a_model_in_misaligned_memory_is_copied_where_it_has_to_be() {
    let path = testdata("model/original-mxfp4");
    let config = std::fs::read_to_string(path.join("config.json")).unwrap();
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let expected = Checkpoint::open(&path).unwrap();
    for shift in 0..3 {
        let mut shifted = vec![0; shift];
        shifted.extend(&bytes);
        let read = Checkpoint::from_bytes(&config, "{}", &shifted.leak()[shift..]).unwrap();
        crate::assert_same_storage(&expected, &read);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Changed bytes anywhere, most of them in the header: an error or a model that can be read to its end.
    #[test]
    fn no_change_of_bytes_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = std::fs::read(testdata(PACKED).join("model.safetensors")).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, in_header, byte) in changes {
            let at = at.index(if in_header { 8 + header } else { bytes.len() });
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let folder = folder_with(PACKED, &bytes);
        if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
            for id in matrices(checkpoint.config()) {
                for expert in 0..id.kind.shape(checkpoint.config()).0 {
                    let _ = checkpoint.matrix(id, expert);
                }
            }
        }
    }

    /// Headers of plausible fields with arbitrary numbers.
    #[test]
    fn no_header_panics(
        tensors in prop::collection::vec(
            ("[ab]", prop::sample::select(vec!["U8", "F4", "BF16", "F32", "I64"]),
             prop::collection::vec(prop_oneof![0u64..5, any::<u64>()], 0..4),
             prop_oneof![0u64..9, any::<u64>()], prop_oneof![0u64..9, any::<u64>()]), 0..4),
        data in prop::collection::vec(any::<u8>(), 0..32),
    ) {
        let entries: Vec<String> = tensors.iter().map(|(name, dtype, shape, from, to)| {
            format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{from},{to}]}}")
        }).collect();
        let bytes: &'static [u8] = file(&format!("{{{}}}", entries.join(",")), &data).leak();
        if let Ok(file) = TensorFile::from_static(Path::new("made up"), bytes) {
            let sum: usize = file.tensors().iter().map(|tensor| file.data(tensor).len()).sum();
            prop_assert_eq!(sum, data.len());
        }
    }
}
