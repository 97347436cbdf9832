//! `quantize`, `verify`, `inspect`.

use crate::{bf16, fails, ok, run, small};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }
}

fn identical(a: &str, b: &str) {
    let found = ok(&["verify", a, b, "--json"]).json();
    assert_eq!(found["identical"], true, "{a} {b}");
    assert_eq!(found["different"].as_array().unwrap().len(), 0);
}

#[test]
fn the_published_form_is_cast_without_loss() {
    let folder = Folder::new();
    let out = folder.path("nvfp4");
    let found = ok(&["quantize", &small(), "--out", &out, "--json"]).json();
    assert_eq!((&found["format"], &found["recipe"]), (&"modelopt".into(), &"experts".into()));
    assert_eq!((found["blocks"].as_u64(), found["lossless_blocks"].as_u64()), (Some(393_216), Some(393_216)));
    assert_eq!(found["changed_values"], 0);
    let bits = found["bits_per_weight"].as_f64().unwrap();
    assert!((bits - found["bytes"].as_f64().unwrap() * 8.0 / 16_062_816.0).abs() < 1e-9, "{bits}");
    assert_eq!(found["tensors"].as_array().unwrap().len(), 8);
    assert!(found["tensors"].as_array().unwrap().iter().all(|t| t["mse"] == 0.0 && t["algorithm"] == "cast"));
    identical(&small(), &out);
    let verified = ok(&["verify", &small(), &out]);
    assert!(verified.stdout.contains("identical: 71 tensors"), "{}", verified.stdout);

    let inspected = ok(&["inspect", &out, "--json"]).json();
    assert_eq!(
        (&inspected["layout"], inspected["parameters"].as_u64()),
        (&"modelopt".into(), Some(16_062_816))
    );
    let name = "model.layers.0.mlp.experts.down_proj";
    assert!(inspected["global_scales"].get(name).is_some(), "{}", inspected["global_scales"]);
    let tensor = ok(&["inspect", &out, "--tensor", name, "--json"]).json();
    assert_eq!((&tensor["dtype"], &tensor["values"]["format"]), (&"U8".into(), &"nvfp4".into()));
    let near = fails(&["inspect", &out, "--tensor", "down_proj"], 2, "--tensor");
    assert!(near.stderr.contains("hint: did you mean"), "{}", near.stderr);

    // And back to what was published.
    let back = folder.path("mxfp4");
    ok(&["quantize", &out, "--out", &back, "--format", "mxfp4", "--quiet"]);
    identical(&small(), &back);
    let before = std::fs::read(crate::root("models/tiny-gpt-oss/tokenizer.json")).unwrap();
    assert_eq!(std::fs::read(format!("{back}/tokenizer.json")).unwrap(), before);
}

#[test]
fn a_fused_tensor_is_looked_at_whole() {
    let model = crate::root("testdata/model/original-mxfp4");
    let name = "block.0.attn.qkv.weight";
    let found = ok(&["inspect", model.to_str().unwrap(), "--tensor", name, "--json"]).json();
    let file = checkpoint::TensorFile::open(&model.join("model.safetensors")).unwrap();
    let bytes = file.data(file.tensor(name).unwrap()).chunks_exact(2);
    let values: Vec<f64> =
        bytes.map(|b| f64::from(f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    assert!((found["values"]["mean"].as_f64().unwrap() - mean).abs() < 1e-9, "{found}, {mean}");
    let max = values.iter().copied().fold(f64::MIN, f64::max);
    assert_eq!((&found["values"]["format"], found["values"]["max"].as_f64()), (&"bf16".into(), Some(max)));
}

#[test]
fn the_parts_of_a_fused_tensor_have_names_of_their_own() {
    let folder = Folder::new();
    let (source, out) = (crate::path("testdata/model/original-mxfp4"), folder.path("out"));
    let args = ["quantize", &source, "--out", &out, "--recipe", "linear", "--algorithm", "max", "--json"];
    let found = ok(&args).json();
    let names: Vec<&str> =
        found["tensors"].as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
    let different: std::collections::BTreeSet<&str> = names.iter().copied().collect();
    assert_eq!(different.len(), names.len(), "{names:?}");
    // They are those of the output.
    for name in names {
        ok(&["inspect", &out, "--tensor", name]);
    }
}

#[test]
fn layouts_convert_into_one_another() {
    let folder = Folder::new();
    for recipe in ["experts", "linear", "all"] {
        let packed = folder.path(&format!("{recipe}-packed"));
        let fake = folder.path(&format!("{recipe}-fake"));
        let again = folder.path(&format!("{recipe}-again"));
        ok(&["quantize", &bf16(), "--out", &packed, "--recipe", recipe, "--algorithm", "mse"]);
        ok(&["quantize", &packed, "--out", &fake, "--recipe", recipe, "--format", "fake-bf16"]);
        identical(&packed, &fake);
        ok(&["quantize", &fake, "--out", &again, "--recipe", recipe]);
        identical(&packed, &again);
        assert_eq!(
            std::fs::read(format!("{packed}/model.safetensors")).unwrap(),
            std::fs::read(format!("{again}/model.safetensors")).unwrap(),
            "{recipe}: the codes come back bit for bit"
        );
        if recipe != "experts" {
            let tensors = folder.path(&format!("{recipe}-ct"));
            let noted = ok(&[
                "quantize",
                &packed,
                "--out",
                &tensors,
                "--recipe",
                recipe,
                "--format",
                "compressed-tensors",
            ]);
            assert!(noted.stderr.contains("written in BF16"), "{}", noted.stderr);
            identical(&packed, &tensors);
            let round = folder.path(&format!("{recipe}-ct-fake"));
            ok(&["quantize", &tensors, "--out", &round, "--recipe", recipe, "--format", "bf16"]);
            identical(&tensors, &round);
        }
        let changed = run(&["verify", &bf16(), &packed, "--json"]);
        assert_eq!(changed.status, 1);
        assert_eq!(changed.json()["identical"], false);
        let close = ok(&["verify", &bf16(), &packed, "--tolerance", "0.2"]).stdout;
        let last = close.lines().last().unwrap();
        assert!(last.starts_with("within the tolerance: ") && last.contains(" of 71 tensors"), "{close}");
        assert!(close.lines().count() > 8 && !close.contains("identical: "), "{close}");
        assert_eq!(run(&["verify", &bf16(), &packed, "--tolerance", "0.01"]).status, 1);
    }
}

#[test]
fn scales_per_expert_are_kept() {
    let folder = Folder::new();
    let (each, fake) = (folder.path("each"), folder.path("fake"));
    ok(&["quantize", &bf16(), "--out", &each, "--algorithm", "max", "--scales-per", "expert"]);
    ok(&["quantize", &each, "--out", &fake, "--format", "fake-bf16"]);
    identical(&each, &fake);
    let (kept, report) = (folder.path("kept"), folder.path("report"));
    ok(&["quantize", &each, "--out", &kept, "--report", &report, "--calibration-tokens", "64"]);
    let card = std::fs::read_to_string(std::path::Path::new(&report).join("README.md")).unwrap();
    assert!(card.contains("one global scale per `expert`"), "{card}");
}

#[test]
fn tensors_of_other_names_are_refused_with_a_hint() {
    let folder = Folder::new();
    let other = folder.path("other");
    crate::copy_model(&small(), std::path::Path::new(&other));
    let path = std::path::Path::new(&other).join("model.safetensors");
    let file = std::fs::read(&path).unwrap();
    let (length, rest) = file.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    let header = String::from_utf8(rest[..length].to_vec()).unwrap();
    for (renamed, hint) in [
        (
            header.replace("\"model.", "\"_orig_mod.model.").replace("\"lm_head", "\"_orig_mod.lm_head"),
            "a prefix before the names, \"_orig_mod.\"",
        ),
        (header.replace("q_proj.bias", "q_proj.lora_A.weight"), "merge it into the model first"),
    ] {
        let length = (renamed.len() as u64).to_le_bytes();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, [&length, renamed.as_bytes(), &rest[header.len()..]].concat()).unwrap();
        let refused = crate::fails(&["inspect", &other], 2, "the tensors do not fit");
        assert!(refused.stderr.contains(hint), "{}", refused.stderr);
    }
}

#[test]
fn several_files_hold_the_same_model() {
    let folder = Folder::new();
    let out = folder.path("shards");
    ok(&["quantize", &small(), "--out", &out, "--max-shard-size", "1500k"]);
    let files = std::fs::read_dir(&out)
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_str().unwrap().ends_with(".safetensors"));
    assert!(files.count() > 5);
    assert!(std::path::Path::new(&out).join("model.safetensors.index.json").exists());
    identical(&small(), &out);
}

#[test]
fn a_lossy_cast_is_refused_and_nothing_is_written() {
    let folder = Folder::new();
    let source = folder.path("source");
    ok(&["quantize", &small(), "--out", &source, "--format", "mxfp4"]);
    // One block of each expert far below the others: its exponent is out of reach.
    let file = format!("{source}/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let parsed: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let at =
        parsed["model.layers.1.mlp.experts.down_proj_scales"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header + at] = 60;
    std::fs::write(&file, bytes).unwrap();

    let out = folder.path("out");
    let refused = fails(&["quantize", &source, "--out", &out], 1, "nothing was written");
    assert!(refused.stderr.contains("393,216"), "{}", refused.stderr);
    assert!(!std::path::Path::new(&out).exists());
    let found = ok(&["quantize", &source, "--out", &out, "--allow-loss", "--json"]).json();
    assert_eq!(found["lossless_blocks"].as_u64(), Some(393_215));
    assert!(found["changed_values"].as_u64().unwrap() > 0);
}
