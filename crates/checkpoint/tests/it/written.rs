//! What is written can be read, is what Model Optimizer would write, and survives interruption.

use std::ops::ControlFlow;
use std::path::Path;

use checkpoint::*;
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::{
    assert_identical, assert_same_storage, contents, mxfp4, nvfp4, odd_config, open, testdata, write_all,
};

fn target(weights: &dyn Weights, layout: Layout) -> Target {
    // Small enough for several shards.
    Target { shard_bytes: 60_000, ..Target::new(weights.config().to_json(), layout) }
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn modelopt_exports_are_reproduced_bit_for_bit() {
    for name in
        ["nvfp4_default", "w4a16_nvfp4", "nvfp4_experts_only", "nvfp4_default_kv_fp8", "nvfp4_four_over_six"]
    {
        let golden_path = testdata("quant/tiny_gptoss").join(name);
        let golden = Checkpoint::open(&golden_path).unwrap();
        let folder = tempdir().unwrap();
        let out = folder.path().join("out");
        let target =
            Target { version: "0.47.0".to_owned(), ..Target::like(&golden, Layout::ModelOpt).unwrap() };
        let written = write_all(&golden, &target, &out).unwrap();
        assert_eq!(written.files, ["model.safetensors", "config.json", "hf_quant_config.json"], "{name}");
        assert_eq!(written.tensor_bytes, golden.tensor_bytes());

        // The whole file, header included.
        let read = |path: &Path| std::fs::read(path.join("model.safetensors")).unwrap();
        assert!(read(&out) == read(&golden_path), "{name}: model.safetensors differs");
        for (file, producer) in [
            ("config.json", "/quantization_config/producer/name"),
            ("hf_quant_config.json", "/producer/name"),
        ] {
            let (mut ours, theirs) = (json_file(&out.join(file)), json_file(&golden_path.join(file)));
            let name = ours.pointer_mut(producer).unwrap();
            assert_eq!(name, "nibble");
            *name = json!("modelopt");
            // As text: the order of keys too.
            assert_eq!(ours.to_string(), theirs.to_string(), "{file}");
        }
    }
}

#[test]
fn every_layout_reads_back_what_was_written() {
    let folder = tempdir().unwrap();
    let packed = nvfp4();
    let blocks = mxfp4();
    let plain = Synthetic::new(odd_config(), |_| Format::Bf16, 3);
    let cases: [(&str, &dyn Weights, Layout); 4] = [
        ("modelopt", &packed, Layout::ModelOpt),
        ("mxfp4", &blocks, Layout::Mxfp4),
        ("bf16", &plain, Layout::Bf16),
        ("bf16 of mxfp4", &blocks, Layout::Bf16),
    ];
    for (name, weights, layout) in cases {
        let out = folder.path().join(name);
        let written = write_all(weights, &target(weights, layout), &out).unwrap();
        assert!(written.files.iter().filter(|file| file.ends_with(".safetensors")).count() > 2, "{name}");
        let read = Checkpoint::open(&out).unwrap();
        assert_eq!((read.layout(), read.tensor_bytes()), (layout, written.tensor_bytes), "{name}");
        assert_identical(weights, &read);
        if name != "bf16 of mxfp4" {
            assert_same_storage(weights, &read);
        }
    }
}

#[test]
fn fake_quantized_weights_pack_back_to_their_codes() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("fake");
    let weights = nvfp4();
    write_all(&weights, &target(&weights, Layout::FakeBf16), &out).unwrap();
    let read = Checkpoint::open(&out).unwrap();
    assert_eq!(read.layout(), Layout::FakeBf16);
    assert_eq!(json_file(&out.join("config.json")).get("quantization_config"), None);
    assert!(matrices(read.config()).all(|id| read.format(id) == Format::Bf16));
    assert_identical(&weights, &read);
    // The sign of zero codes included.
    assert_same_storage(&weights, &read.packed());

    // Written again, packed and as it lies, it stays the same.
    let again = folder.path().join("again");
    let like = Target { shard_bytes: 60_000, ..Target::like(&read, Layout::FakeBf16).unwrap() };
    write_all(&read.packed(), &like, &again).unwrap();
    assert_eq!(contents(&out), contents(&again));

    let plain =
        std::fs::rename(out.join("fake_quant"), folder.path().join("moved")).map(|()| Checkpoint::open(&out));
    assert_eq!(plain.unwrap().unwrap().layout(), Layout::Bf16);
}

#[test]
fn openais_own_folders_are_told_where_answers_end() {
    let folder = tempdir().unwrap();
    let source = folder.path().join("original");
    std::fs::create_dir(&source).unwrap();
    let config = json!({
        "num_hidden_layers": 1, "num_experts": 2, "experts_per_token": 1, "vocab_size": 201_088,
        "hidden_size": 32, "intermediate_size": 32, "swiglu_limit": 7.0, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16,
        "initial_context_length": 256, "rope_theta": 150_000.0, "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1, "rope_ntk_beta": 32
    });
    std::fs::write(source.join("config.json"), config.to_string()).unwrap();
    let shapes: [(&str, &str, &[usize]); 18] = [
        ("embedding.weight", "BF16", &[201_088, 32]),
        ("unembedding.weight", "BF16", &[201_088, 32]),
        ("norm.scale", "BF16", &[32]),
        ("block.0.attn.norm.scale", "BF16", &[32]),
        ("block.0.attn.qkv.weight", "BF16", &[64, 32]),
        ("block.0.attn.qkv.bias", "BF16", &[64]),
        ("block.0.attn.out.weight", "BF16", &[32, 32]),
        ("block.0.attn.out.bias", "BF16", &[32]),
        ("block.0.attn.sinks", "BF16", &[2]),
        ("block.0.mlp.norm.scale", "BF16", &[32]),
        ("block.0.mlp.gate.weight", "BF16", &[2, 32]),
        ("block.0.mlp.gate.bias", "BF16", &[2]),
        ("block.0.mlp.mlp1_weight.blocks", "U8", &[2, 64, 1, 16]),
        ("block.0.mlp.mlp1_weight.scales", "U8", &[2, 64, 1]),
        ("block.0.mlp.mlp1_bias", "BF16", &[2, 64]),
        ("block.0.mlp.mlp2_weight.blocks", "U8", &[2, 32, 1, 16]),
        ("block.0.mlp.mlp2_weight.scales", "U8", &[2, 32, 1]),
        ("block.0.mlp.mlp2_bias", "BF16", &[2, 32]),
    ];
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, dtype, shape) in shapes {
        let start = end;
        end += shape.iter().product::<usize>() * if dtype == "U8" { 1 } else { 2 };
        let tensor = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        header.insert(name.to_owned(), tensor);
    }
    let header = serde_json::Value::from(header).to_string();
    let path = source.join("model.safetensors");
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    std::fs::write(&path, &bytes).unwrap();
    // All weights are zeros, for which nothing need be written.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len((bytes.len() + end) as u64).unwrap();

    let original = Checkpoint::open(&source).unwrap();
    assert_eq!(original.layout(), Layout::Original);
    let out = folder.path().join("out");
    write_all(&original, &Target::like(&original, Layout::Mxfp4).unwrap(), &out).unwrap();
    let config = json_file(&out.join("config.json"));
    assert_eq!((&config["eos_token_id"], &config["pad_token_id"]), (&json!(200_002), &json!(199_999)));
    let generation = json_file(&out.join("generation_config.json"));
    assert_eq!((&generation["bos_token_id"], &generation["do_sample"]), (&json!(199_998), &json!(true)));
    let ends = Checkpoint::open(&out).unwrap().generation_config().eos_token_ids.clone();
    assert_eq!(ends, [200_002, 199_999, 200_012]);

    // Another vocabulary has other ids, which nobody knows.
    let small = Checkpoint::open(&testdata("model/original-mxfp4")).unwrap();
    assert!(Target::like(&small, Layout::Mxfp4).unwrap().files.is_empty());
    assert_eq!(small.config().to_json().get("eos_token_id"), None);
}

#[test]
fn fake_quantization_keeps_the_scales_of_activations_and_cache() {
    let folder = tempdir().unwrap();
    let golden = open("quant/tiny_gptoss/nvfp4_default_kv_fp8");
    write_all(&golden, &Target::like(&golden, Layout::FakeBf16).unwrap(), &folder.path().join("out"))
        .unwrap();
    let fake = Checkpoint::open(&folder.path().join("out")).unwrap();
    assert_eq!(fake.kv_cache(), Some(KvCache::Fp8));
    let packed = fake.into_packed();
    assert_same_storage(&golden, &packed);
    assert_eq!(golden.kv_scales(1), packed.kv_scales(1));
}

#[test]
fn fake_quantization_refuses_values_whose_codes_would_be_lost() {
    let folder = tempdir().unwrap();
    let weights = Scaled { inner: nvfp4(), global_scale: 2.0f32.powi(-126) / 448.0 };
    let out = folder.path().join("out");
    let error = write_all(&weights, &target(&weights, Layout::FakeBf16), &out).unwrap_err();
    assert!(error.to_string().contains("2^-125"), "{error}");
}

#[test]
fn compressed_tensors_hold_linears_and_their_inverse_scales() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let golden = open("quant/tiny_gptoss/nvfp4_default_kv_fp8");
    write_all(&golden, &Target::like(&golden, Layout::CompressedTensors).unwrap(), &out).unwrap();
    let read = Checkpoint::open(&out).unwrap();
    assert_eq!((read.layout(), read.kv_cache()), (Layout::CompressedTensors, Some(KvCache::Fp8)));
    assert_identical(&golden, &read);
    let query = MatrixKind::Query.at(0);
    assert_eq!(read.format(query), Format::Nvfp4);
    assert_eq!(read.format(MatrixKind::GateUp.at(0)), Format::Bf16);
    assert_eq!(read.kv_scales(1), golden.kv_scales(1));
    let (ours, theirs) = (read.input_scale(query).unwrap(), golden.input_scale(query).unwrap());
    assert!(ours.to_bits().abs_diff(theirs.to_bits()) <= 1);
    let file = &read.files()[0];
    let stored = |name: &str| file.tensor(&format!("model.layers.0.self_attn.q_proj.{name}")).unwrap();
    let shapes = ["weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"]
        .map(|name| (stored(name).dtype, stored(name).shape.clone()));
    let expected = [
        (Dtype::U8, vec![64, 32]),
        (Dtype::F8_E4M3, vec![64, 4]),
        (Dtype::F32, vec![1]),
        (Dtype::F32, vec![1]),
    ];
    assert_eq!(shapes, expected);
    let config = json_file(&out.join("config.json"));
    let ignored = &config["quantization_config"]["ignore"];
    let expected = json!([
        "model.layers.0.mlp.router",
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.router",
        "model.layers.1.mlp.experts",
        "lm_head"
    ]);
    assert_eq!(ignored, &expected);
}

#[test]
fn compressed_tensors_have_no_scales_of_a_cache_that_they_cannot_name() {
    let folder = tempdir().unwrap();
    let golden = open("quant/tiny_gptoss/nvfp4_default_kv_fp8");
    for (layout, kept) in [(Layout::ModelOpt, true), (Layout::CompressedTensors, false)] {
        let out = folder.path().join(layout.name());
        let target = Target { kv_cache: Some(KvCache::Nvfp4), ..Target::like(&golden, layout).unwrap() };
        write_all(&golden, &target, &out).unwrap();
        let read = Checkpoint::open(&out).unwrap();
        assert_eq!(read.kv_cache(), Some(KvCache::Nvfp4).filter(|_| kept), "{layout:?}");
        assert_eq!(read.kv_scales(1), golden.kv_scales(1).filter(|_| kept), "{layout:?}");
    }
}

#[test]
fn one_scale_per_expert_is_written_on_request_only() {
    let folder = tempdir().unwrap();
    let weights = PerExpert(nvfp4());
    let out = folder.path().join("out");
    let one = target(&weights, Layout::ModelOpt);
    let error = write_all(&weights, &one, &out).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error}");
    assert!(error.to_string().contains("for expert 1"), "{error}");
    assert!(!out.exists());

    let each = Target { scales_per_expert: true, overwrite: true, ..one };
    write_all(&weights, &each, &out).unwrap();
    let read = Checkpoint::open(&out).unwrap();
    assert_eq!(read.global_scales(MatrixKind::Down.at(2)).len(), 5);
    assert_same_storage(&weights, &read);
}

#[test]
fn an_original_checkpoint_becomes_a_hugging_face_one() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let original = open("model/original-mxfp4");
    write_all(&original, &Target::like(&original, Layout::Mxfp4).unwrap(), &out).unwrap();
    let read = Checkpoint::open(&out).unwrap();
    assert_same_storage(&original, &read);
    assert_eq!(read.warnings(), &[] as &[String]);
    assert_identical(&open("model/hf-mxfp4"), &read);
}

#[test]
fn companions_are_copied() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let source = open("../models/tiny-gpt-oss");
    let written = write_all(&source, &Target::like(&source, Layout::Mxfp4).unwrap(), &out).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(written.files.iter().any(|file| file == name));
        assert_eq!(
            std::fs::read(out.join(name)).unwrap(),
            std::fs::read(source.directory().join(name)).unwrap(),
            "{name}"
        );
    }
    let tensors = |path: &Path| std::fs::read(path.join("model.safetensors")).unwrap();
    assert!(tensors(&out) == tensors(source.directory()), "the small model is written as it was");
    assert_eq!(json_file(&out.join("config.json")), *source.config_json());
}

#[test]
fn formats_that_do_not_fit_are_refused_before_any_work() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let plain = Synthetic::new(odd_config(), |_| Format::Bf16, 3);
    let with = |kind: MatrixKind, format| {
        Synthetic::new(odd_config(), move |id| if id.kind == kind { format } else { Format::Bf16 }, 3)
    };
    let cases: [(&dyn Weights, Layout, &str); 6] = [
        (&mxfp4(), Layout::ModelOpt, "gate_up_proj"),
        (&plain, Layout::ModelOpt, "gate_up_proj"),
        (&nvfp4(), Layout::Mxfp4, "gate_up_proj"),
        (&mxfp4(), Layout::FakeBf16, "gate_up_proj"),
        (&with(MatrixKind::Router, Format::Nvfp4), Layout::ModelOpt, "router"),
        (&with(MatrixKind::Embedding, Format::Nvfp4), Layout::CompressedTensors, "embed_tokens"),
    ];
    for (weights, layout, tensor) in cases {
        let error = write_all(weights, &target(weights, layout), &out).unwrap_err();
        assert!(
            matches!(error, Error::Format { .. }) && error.to_string().contains(tensor),
            "{layout:?}: {error}"
        );
    }
    let error = write_all(&plain, &target(&plain, Layout::Original), &out).unwrap_err();
    assert!(error.to_string().contains("original"), "{error}");
    let other = Target::new(Config::gpt_oss_20b().to_json(), Layout::Bf16);
    let error = write_all(&plain, &other, &out).unwrap_err();
    assert!(error.to_string().contains("`config`"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn an_existing_output_is_replaced_on_request_only() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let weights = nvfp4();
    let mut target = target(&weights, Layout::ModelOpt);
    // A folder with nothing in it needs no request.
    std::fs::create_dir(&out).unwrap();
    write_all(&weights, &target, &out).unwrap();
    let before = contents(&out);
    let error = write_all(&weights, &target, &out).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    assert_eq!(contents(&out), before);

    target.overwrite = true;
    target.layout = Layout::Bf16;
    write_all(&weights, &target, &out).unwrap();
    assert_eq!(Checkpoint::open(&out).unwrap().layout(), Layout::Bf16);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    // What a trainer keeps beside its model is not deleted with it.
    let states = out.join("checkpoint-500");
    std::fs::create_dir(&states).unwrap();
    let error = write_all(&weights, &target, &out).unwrap_err();
    assert!(matches!(&error, Error::File { path, .. } if *path == states), "{error}");
    std::fs::remove_dir(&states).unwrap();

    // Nor is anything deleted where the old model goes for a moment.
    let aside = folder.path().join("out.replaced");
    std::fs::create_dir(&aside).unwrap();
    std::fs::write(aside.join("letter.txt"), "dear").unwrap();
    let error = write_all(&weights, &target, &out).unwrap_err();
    assert!(matches!(&error, Error::File { path, .. } if *path == aside), "{error}");
    assert_eq!(std::fs::read_to_string(aside.join("letter.txt")).unwrap(), "dear");

    // What has a journal there is what a call replaced that was ended before it had deleted it.
    std::fs::write(aside.join(".nibble-journal"), "").unwrap();
    write_all(&weights, &target, &out).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    // Or before the new one had its name.
    std::fs::rename(&out, &aside).unwrap();
    std::fs::write(aside.join(".nibble-journal"), "").unwrap();
    write_all(&weights, &target, &out).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert!(!out.join(".nibble-journal").exists());

    // A folder that is no model is not deleted whatever was asked for.
    let home = folder.path().join("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join("letter.txt"), "dear").unwrap();
    std::fs::write(home.join("config.json"), "{}").unwrap();
    for overwrite in [false, true] {
        target.overwrite = overwrite;
        for out in [&home, &home.join("letter.txt")] {
            let error = write_all(&weights, &target, out).unwrap_err();
            assert!(matches!(error, Error::File { .. }), "{error}");
        }
    }
    assert_eq!(std::fs::read_to_string(home.join("letter.txt")).unwrap(), "dear");
}

#[test]
fn interrupted_work_continues_to_the_same_bytes() {
    let folder = tempdir().unwrap();
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    let weights = nvfp4();
    for layout in [Layout::ModelOpt, Layout::FakeBf16] {
        let target = Target { overwrite: true, ..target(&weights, layout) };
        write_all(&weights, &target, &whole).unwrap();
        let target = Target { overwrite: false, fingerprint: "one".to_owned(), ..target };
        let _ = std::fs::remove_dir_all(&out);

        // Stop every seventh step, wherever that falls, until it is done.
        let mut interruptions = 0;
        let written = loop {
            let mut steps = 0;
            let result = write(&weights, &target, &out, &mut |_| {
                steps += 1;
                if steps > 7 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            match result {
                Ok(written) => break written,
                Err(Error::Interrupted { partial }) => {
                    assert_eq!(partial, folder.path().join("out.partial"));
                    assert!(partial.exists() && !out.exists());
                    interruptions += 1;
                }
                Err(error) => panic!("{error}"),
            }
        };
        assert!(interruptions > 5 && written.resumed_bytes > written.tensor_bytes / 2);
        assert_eq!(contents(&whole), contents(&out));
        assert!(!folder.path().join("out.partial").exists());
    }
}

#[test]
fn other_unfinished_work_is_not_continued() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let weights = nvfp4();
    let one = Target { fingerprint: "one".to_owned(), ..target(&weights, Layout::ModelOpt) };
    write_in_part(&weights, &one, &out);
    let two = Target { fingerprint: "two".to_owned(), ..one.clone() };
    for refused in [write_all(&weights, &two, &out).map(drop), may_begin(&weights, &two, &out)] {
        let error = refused.unwrap_err();
        assert!(matches!(&error, Error::OtherWork { path } if path.ends_with("out.partial")), "{error}");
    }
    may_begin(&weights, &one, &out).unwrap();
    may_begin(&weights, &Target { overwrite: true, ..two.clone() }, &out).unwrap();
    let other_shards = Target { shard_bytes: 1 << 30, ..one.clone() };
    assert!(matches!(write_all(&weights, &other_shards, &out), Err(Error::OtherWork { .. })));

    // A journal that was cut off in the middle of a line costs that line, and one that is no text from some place on what follows.
    let journal = folder.path().join("out.partial/.nibble-journal");
    let text = std::fs::read(&journal).unwrap();
    std::fs::write(&journal, [&text[..text.len() - 3], b"\xff\xfe\n"].concat()).unwrap();
    let written = write_all(&weights, &one, &out).unwrap();
    assert!(written.resumed_bytes > 0);
    assert_same_storage(&weights, &Checkpoint::open(&out).unwrap());
    std::fs::remove_dir_all(&out).unwrap();

    write_in_part(&weights, &one, &out);
    std::fs::write(&journal, b"\xff\xfe\n").unwrap();
    assert!(matches!(write_all(&weights, &one, &out), Err(Error::OtherWork { .. })));
    let written = write_all(&weights, &Target { overwrite: true, ..two }, &out).unwrap();
    assert_eq!(written.resumed_bytes, 0);
    assert_same_storage(&weights, &Checkpoint::open(&out).unwrap());

    // A folder of that name that is nobody's unfinished work is not deleted whatever was asked for.
    std::fs::remove_dir_all(&out).unwrap();
    std::fs::create_dir(folder.path().join("out.partial")).unwrap();
    std::fs::write(folder.path().join("out.partial/letter.txt"), "dear").unwrap();
    for overwrite in [false, true] {
        let target = Target { overwrite, ..one.clone() };
        assert!(matches!(write_all(&weights, &target, &out), Err(Error::File { .. })));
        assert!(matches!(may_write(&out, overwrite), Err(Error::File { .. })));
    }
    assert!(folder.path().join("out.partial/letter.txt").exists());
    std::fs::remove_dir_all(folder.path().join("out.partial")).unwrap();
    std::fs::write(folder.path().join("out.partial"), "dear").unwrap();
    assert!(matches!(may_write(&out, true), Err(Error::File { .. })));
    // Above it, the file itself is named; a link is something even if it leads nowhere.
    let refused = |name: &str| may_write(&folder.path().join(name), true).unwrap_err().to_string();
    let inside = refused("out.partial/a/b");
    assert!(
        inside.ends_with("/out.partial: expected a folder, or nothing, found something else"),
        "{inside}"
    );
    std::os::unix::fs::symlink("nowhere", folder.path().join("link.partial")).unwrap();
    let link = refused("link");
    assert!(
        link.ends_with("/link.partial: expected unfinished work, or nothing, found something else"),
        "{link}"
    );
    // Nothing takes the place of a mounted file system.
    let error = may_write(Path::new("/proc"), true).unwrap_err().to_string();
    assert!(error.contains("found the root of a file system"), "{error}");
}

/// A folder that cannot be emptied is left as by a call that was killed on the way.
#[test]
fn work_that_was_dropped_in_part_is_not_continued() {
    let folder = tempdir().unwrap();
    let weights = nvfp4();
    let one = Target { fingerprint: "one".to_owned(), ..target(&weights, Layout::ModelOpt) };
    let two = Target { fingerprint: "two".to_owned(), overwrite: true, ..one.clone() };
    // So deep that a path to a long name in it is too long, and the file stays.
    let (near, mut far) = (folder.path().join("near"), folder.path().to_owned());
    while far.as_os_str().len() < 3850 {
        far.push("deep".repeat(35));
    }
    std::fs::create_dir_all(far.parent().unwrap()).unwrap();
    type Dropping = fn(&Synthetic, &Target, &Path) -> Result<(), Error>;
    let overwritten: Dropping = |weights, target, out| write_all(weights, target, out).map(drop);
    let removed: Dropping = |_, _, out| remove_unfinished(&out.with_file_name("out.partial"));
    for dropping in [overwritten, removed] {
        write_in_part(&weights, &one, &near.join("out"));
        let long = near.join("out.partial").join("x".repeat(255));
        std::fs::write(&long, "").unwrap();
        std::fs::rename(&near, &far).unwrap();
        let error = dropping(&weights, &two, &far.join("out")).unwrap_err();
        assert!(
            matches!(&error, Error::Io { path, .. } if path.ends_with(long.file_name().unwrap())),
            "{error}"
        );
        std::fs::rename(&far, &near).unwrap();
        assert_eq!(std::fs::read_to_string(near.join("out.partial/.nibble-journal")).unwrap(), "");

        std::fs::remove_file(&long).unwrap();
        let written = write_all(&weights, &one, &near.join("out")).unwrap();
        assert_eq!(written.resumed_bytes, 0);
        assert_same_storage(&weights, &Checkpoint::open(&near.join("out")).unwrap());
        std::fs::remove_dir_all(&near).unwrap();
    }
}

#[test]
fn work_of_which_a_file_is_gone_begins_anew() {
    let folder = tempdir().unwrap();
    let (out, partial) = (folder.path().join("out"), folder.path().join("out.partial"));
    let weights = nvfp4();
    let target = target(&weights, Layout::ModelOpt);
    write_in_part(&weights, &target, &out);
    let mut paths = std::fs::read_dir(&partial).unwrap().map(|entry| entry.unwrap().path());
    let shard = paths.find(|path| path.extension() == Some("safetensors".as_ref())).unwrap();
    std::fs::remove_file(shard).unwrap();
    let written = write_all(&weights, &target, &out).unwrap();
    assert_eq!(written.resumed_bytes, 0);
    assert_same_storage(&weights, &Checkpoint::open(&out).unwrap());
}

#[test]
fn errors_of_the_weights_leave_resumable_work() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let weights = Scaled { inner: nvfp4(), global_scale: f32::NAN };
    let error = write_all(&weights, &target(&weights, Layout::ModelOpt), &out).unwrap_err();
    assert!(matches!(error, Error::Scale { .. }), "{error}");
    let good = nvfp4();
    let written = write_all(&good, &target(&good, Layout::ModelOpt), &out).unwrap();
    assert!(written.resumed_bytes > 0);
}

/// A child process with a limit on the size of its files meets a real failing write.
#[test]
fn a_full_disk_is_reported_and_leaves_the_name_free() {
    const FOLDER: &str = "CHECKPOINT_TEST_FOLDER";
    let weights = nvfp4();
    let target = Target::new(weights.config().to_json(), Layout::ModelOpt);
    if let Some(folder) = std::env::var_os(FOLDER) {
        let error = write_all(&weights, &target, &Path::new(&folder).join("out")).unwrap_err();
        let Error::Io { path, source } = &error else { panic!("{error}") };
        assert!(path.ends_with("out.partial/model.safetensors"), "{error}");
        assert_eq!(source.kind(), std::io::ErrorKind::FileTooLarge, "{error}");
        return;
    }
    let folder = tempdir().unwrap();
    // 128 blocks of 512 bytes. The signal is ignored so that the write returns an error, as it does on a full disk.
    let script = "trap '' XFSZ; ulimit -f 128; exec \"$0\" --exact \"$1\"";
    let output = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .arg("written::a_full_disk_is_reported_and_leaves_the_name_free")
        .env(FOLDER, folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    assert!(folder.path().join("out.partial").exists() && !folder.path().join("out").exists());
    // With room again, the work goes on.
    let written = write_all(&weights, &target, &folder.path().join("out")).unwrap();
    assert!(written.resumed_bytes > 0);
    assert_same_storage(&weights, &Checkpoint::open(&folder.path().join("out")).unwrap());
}

/// Writes some of it and is interrupted.
fn write_in_part(weights: &dyn Weights, target: &Target, out: &Path) {
    let mut steps = 0;
    let result = write(weights, target, out, &mut |_| {
        steps += 1;
        if steps > 30 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(result, Err(Error::Interrupted { .. })));
}

/// Each expert with a global scale of its own.
struct PerExpert(Synthetic);

/// Expert stacks with another global scale.
struct Scaled {
    inner: Synthetic,
    global_scale: f32,
}

fn rescaled<'a>(mut matrix: Matrix<'a>, change: impl FnOnce(f32) -> f32) -> Matrix<'a> {
    if let Values::Nvfp4 { global_scale, .. } = &mut matrix.values {
        *global_scale = change(*global_scale);
    }
    matrix
}

impl Weights for PerExpert {
    fn config(&self) -> &Config {
        self.0.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.0.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        Ok(rescaled(self.0.matrix(id, expert)?, |scale| scale * (expert + 1) as f32))
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        self.0.vector(id)
    }
}

impl Weights for Scaled {
    fn config(&self) -> &Config {
        self.inner.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.inner.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        let matrix = self.inner.matrix(id, expert)?;
        Ok(if id.kind.is_expert() { rescaled(matrix, |_| self.global_scale) } else { matrix })
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        self.inner.vector(id)
    }
}
