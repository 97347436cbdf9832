//! `quantize` where it calibrates, and what it says about it.

use std::path::Path;
use std::process::Stdio;

use crate::{bf16, fails, nibble, ok, run, small};

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn bad_calibration_data_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    for (name, text, named) in [
        ("broken.jsonl", "[1, 2, 3]\n{\"messages\": [", "line 2"),
        (
            "shape.jsonl",
            "{\"text\": \"no such field\"}\n",
            "line 1: expected a text, an array of token ids, or one of {\"prompt\"}, {\"messages\"} and {\"prompt_token_ids\"}, \
             found another document",
        ),
        // As some sets have it: one of the two would be left out.
        (
            "both.jsonl",
            "{\"prompt\": \"Hi\", \"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n",
            "line 1: expected a text, an array of token ids, or one of {\"prompt\"}, {\"messages\"} and {\"prompt_token_ids\"}, \
             found prompt and messages",
        ),
        (
            "pair.jsonl",
            "\"Hi\"\n{\"prompt\": \"Hi\", \"completion\": \"Ho\"}\n",
            "found prompt and completion",
        ),
        ("half.jsonl", "{\"completion\": \"Ho\"}\n", "found completion"),
        ("unknown.jsonl", "[1]\n\n[1, 2, 4096]\n", "line 3: expected ids below 4096, found 4096"),
        (
            "role.jsonl",
            "[1]\n\n{\"messages\": [{\"role\": \"nobody\", \"content\": \"Hi\"}]}\n",
            "line 3: messages.0.role",
        ),
        ("negative.jsonl", "[-1]\n", "line 1"),
        ("empty.txt", "", "expected at least one token"),
        ("empty.jsonl", "[]\n\n", "expected at least one token"),
        ("table.csv", "1,2\n", "expected a file that ends in .txt or .jsonl"),
    ] {
        let file = write(folder.path(), name, text);
        fails(&["quantize", &bf16(), "--out", &out, "--calibration", &file], 2, named);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "{name}: nothing else was written");
        std::fs::remove_file(file).unwrap();
    }
    let missing = folder.path().join("missing.txt").to_str().unwrap().to_owned();
    // Of the second nothing is to be calibrated.
    for source in [bf16(), small()] {
        fails(&["quantize", &source, "--out", &out, "--calibration", &missing], 2, "missing.txt");
    }
}

#[test]
fn combinations_without_a_meaning_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    let refused = |flags: &[&str], named: &str| {
        let source = bf16();
        let args: Vec<&str> =
            ["quantize", &source, "--out", &out].into_iter().chain(flags.iter().copied()).collect();
        fails(&args, 2, named);
    };
    refused(&["--algorithm", "awq"], "expected --recipe linear or all, found experts");
    refused(&["--format", "mxfp4", "--activations", "nvfp4"], "--activations nvfp4");
    refused(&["--format", "bf16", "--kv-cache", "fp8"], "--kv-cache fp8");
    refused(
        &["--format", "compressed-tensors", "--recipe", "linear", "--embedding", "nvfp4"],
        "model.embed_tokens.weight",
    );
    assert!(!folder.path().join("out.calibration").exists(), "nothing was calibrated");
    refused(&["--config", "NVFP4_AWESOME_CFG"], "NVFP4_DEFAULT_CFG, W4A16_NVFP4_CFG");
    refused(&["--config", "NVFP4_DEFAULT_CFG", "--algorithm", "mse"], "cannot be used with");
    assert!(!Path::new(&out).exists());
}

#[test]
fn model_optimizers_names_are_expanded_and_printed() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    let config = ["--config", "W4A16_NVFP4_CFG", "--json"];
    let source = bf16();
    let done = ok(&[&["quantize", &source, "--out", &out], &config[..]].concat());
    assert!(
        done.stderr.contains("W4A16_NVFP4_CFG: --recipe linear --algorithm max --activations none (W4A16)"),
        "{}",
        done.stderr
    );
    let done = done.json();
    assert_eq!((&done["recipe"], &done["algorithm"]), (&"linear".into(), &"max".into()));
}

#[test]
fn w4a4_with_an_fp8_cache_and_a_report() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = std::fs::read_to_string(crate::path("testdata/data/books-valid.txt")).unwrap();
    let file = write(folder.path(), "book.txt", &text[..16_000]);
    let done = ok(&[
        "quantize",
        &bf16(),
        "--out",
        &path("out"),
        "--config",
        "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
        "--kv-cache",
        "fp8",
        "--calibration",
        &file,
        "--calibration-tokens",
        "1024",
        "--report",
        &path("report"),
        "--json",
    ])
    .json();
    let coverage = done["expert_coverage"].as_array().unwrap();
    assert_eq!((coverage.len(), coverage[0].as_array().unwrap().len()), (4, 16));
    let routed: u64 = crate::ids(&coverage[3]).iter().sum();
    assert_eq!(routed, 1024 * 4);
    let config = std::fs::read_to_string(folder.path().join("out/hf_quant_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["quantization"]["quant_algo"], "NVFP4");
    assert_eq!(config["quantization"]["kv_cache_quant_algo"], "FP8");
    for name in
        ["mlp.experts.down_proj_input_scale", "self_attn.k_proj.k_scale", "self_attn.o_proj.input_scale"]
    {
        ok(&["inspect", &path("out"), "--tensor", &format!("model.layers.3.{name}")]);
    }

    // Its own scales go from layout to layout, or it is said that they do not.
    let again = ["--format", "fake-bf16", "--recipe", "linear", "--json"];
    let kept = [&["quantize", &path("out"), "--out", &path("kept"), "--activations", "nvfp4"], &again[..]];
    let kept = [&kept.concat()[..], &["--kv-cache", "fp8"]];
    assert!(ok(&kept.concat()).json().get("expert_coverage").is_none(), "nothing was calibrated");
    let compared = ok(&["verify", &path("out"), &path("kept"), "--json"]).json();
    assert_eq!((&compared["identical"], &compared["scales_of_one"]), (&true.into(), &serde_json::json!([])));
    let left = ok(&[&["quantize", &path("out"), "--out", &path("left")], &again[..]].concat());
    assert!(left.stderr.contains("its input scales are left out"), "{}", left.stderr);
    let compared = ok(&["verify", &path("out"), &path("left")]);
    assert!(compared.stderr.contains("note: 24 static scales of inputs"), "{}", compared.stderr);

    let report = std::fs::read_to_string(folder.path().join("report/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(
        report["quality_note"],
        "the figures are those of the model as it is made to run, with the activations in NVFP4 and the KV cache in FP8; those \
         of the algorithms are of the rounded weights alone"
    );
    let eval = |model: &str, flags: &[&str]| {
        let args = [
            "eval",
            &path(model),
            "perplexity",
            "--text",
            &file,
            "--context",
            "64",
            "--windows",
            "1",
            "--json",
        ];
        let measured = ok(&[&args[..], flags].concat());
        (measured.json()["nll"].as_f64().unwrap(), measured.stderr)
    };
    let (weights, note) = eval("out", &[]);
    let left_out = "weights alone, without the activations in NVFP4 and the KV cache in FP8 that the model is made for: \
                    --activations nvfp4 --kv-cache-dtype fp8";
    assert!(note.contains(left_out), "{note}");
    let (activations, note) = eval("out", &["--activations", "nvfp4"]);
    let left_out = "weights with the activations in NVFP4, without the KV cache in FP8 that the model is made for: --kv-";
    assert!(note.contains(left_out) && note.contains("the inputs of 24 matrices are rounded"), "{note}");
    // The codes that stand for fake-quantized weights are those of the packed form.
    let as_made = ["--activations", "nvfp4", "--kv-cache-dtype", "fp8"];
    let (all, note) = eval("out", &as_made);
    let (fake, fake_note) = eval("kept", &as_made);
    assert!(!note.contains("without") && note == fake_note, "{note} {fake_note}");
    assert_eq!(all, fake);
    assert!(weights != activations && activations != all, "{weights}, {activations}, {all}");
    let quality = &report["quality"][0];
    assert_eq!((&quality["data"], &report["calibration"]["tokens"]), (&"book.txt".into(), &1024.into()));
    let divergence = quality["kl_mean"].as_f64().unwrap();
    assert!((0.001..1.0).contains(&divergence), "{divergence}");
    let compared = report["algorithms"].as_array().unwrap();
    assert_eq!((&compared[0]["algorithm"], &compared[1]["algorithm"]), (&"mse".into(), &"max".into()));
    let of_weights = |i: usize| compared[i]["kl_mean"].as_f64().unwrap();
    assert!(of_weights(0) < of_weights(1) && of_weights(0) < divergence, "{compared:?}, {divergence}");
    let tensor = &report["tensors"][0];
    assert!(tensor["mse"].as_f64().unwrap() < tensor["max_rule_mse"].as_f64().unwrap(), "{tensor}");
    assert!(tensor["worst_block"]["relative_error"].as_f64().unwrap() > 0.0, "{tensor}");
    let bytes: u64 = report["sizes"].as_array().unwrap().iter().map(|p| p["bytes"].as_u64().unwrap()).sum();
    // The files hold the scales of the cache as well.
    let scales = report["run"]["bytes"].as_u64().unwrap() - bytes;
    assert_eq!(scales, 4 * 2 * 4);
    let page = std::fs::read_to_string(folder.path().join("report/index.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("book.txt"));
    let card = std::fs::read_to_string(folder.path().join("report/README.md")).unwrap();
    assert!(card.contains("`book.txt`") && card.contains("on text that calibration did not see"));
    // Pages that others may read know no path of this machine.
    let command = report["run"]["command"].as_str().unwrap();
    assert!(command.starts_with("nibble quantize tiny-gpt-oss-bf16 --out out "), "{command}");
    let local = folder.path().to_str().unwrap();
    for text in [&page, &card, &report.to_string()] {
        assert!(!text.contains(local) && !text.contains(&bf16()), "{text}");
    }
}

#[test]
fn a_single_token_is_enough_to_say_what_happened() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    let done = ok(&["quantize", &bf16(), "--out", &out, "--algorithm", "gptq", "--calibration-tokens", "1"]);
    assert!(done.stdout.contains("too few tokens for expert"), "{}", done.stdout);
    assert!(done.stdout.contains("(0 tokens)") && done.stdout.contains("mse instead"), "{}", done.stdout);
}

#[test]
fn auto_says_which_algorithm_it_took_and_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let report = path("report");
    let small = ["--calibration-tokens", "256", "--report", &report];
    let done = ok(&[&["quantize", &bf16(), "--out", &path("out")], &small[..]].concat());
    assert!(done.stdout.contains("auto took refine for what is BF16: the lowest"), "{}", done.stdout);
    let text = std::fs::read_to_string(folder.path().join("report/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["run"]["algorithm"], "refine");
    assert_eq!(report["algorithms"][0]["algorithm"], "refine");
    assert!(report["run"]["reason"].as_str().unwrap().contains("lowest divergence"));
}

#[test]
fn a_report_of_few_data_has_figures_and_tells_the_model_from_its_base() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let tuned = folder.path().join("tuned");
    crate::copy_model(&bf16(), &tuned);
    write(&tuned, "README.md", "---\nbase_model: openai/gpt-oss-20b\nlicense: mit\n---\nMine.\n");
    // Fewer tokens than are asked for, of a model with a context below that of a window.
    let config = std::fs::read_to_string(tuned.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["max_position_embeddings"] = 128.into();
    config["initial_context_length"] = serde_json::Value::Null;
    write(&tuned, "config.json", &config.to_string());
    let lines: String = (0..6).map(|line| format!("{:?}\n", vec![line + 1; 200])).collect();
    let few = write(folder.path(), "few.jsonl", &lines);
    let (source, report) = (path("tuned"), path("report"));
    let args = ["quantize", &source, "--calibration", &few, "--report", &report, "--algorithm", "max"];
    let fake = ["--out", &path("fake"), "--format", "fake-bf16", "--activations", "nvfp4"];
    let done = ok(&[&args[..], &fake].concat());
    assert!(done.stderr.contains("few.jsonl: 384 tokens to calibrate on, fewer than"), "{}", done.stderr);
    let text = std::fs::read_to_string(folder.path().join("report/report.json")).unwrap();
    let facts: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&facts["calibration"]["tokens"], &facts["calibration"]["window"]),
        (&384.into(), &128.into())
    );
    assert_eq!(facts["quality"][0]["tokens"], 3 * 127);
    assert_eq!(
        facts["quality_note"],
        "the figures are those of the model as it is made to run, with the activations in NVFP4"
    );
    let sum = |field: &str| -> u64 {
        facts["sizes"].as_array().unwrap().iter().map(|part| part[field].as_u64().unwrap()).sum()
    };
    assert_eq!(
        sum("bytes"),
        facts["run"]["bytes"].as_u64().unwrap(),
        "what is beside the values counts, too"
    );
    assert_eq!(sum("source_bytes"), facts["run"]["source_bytes"].as_u64().unwrap());
    let card = std::fs::read_to_string(folder.path().join("report/README.md")).unwrap();
    assert!(card.contains("# `tuned`") && card.contains("base_model: \"openai/gpt-oss-20b\"\n"), "{card}");
    assert!(!card.contains("base_model_relation"), "{card}");

    // One window is calibrated on, and none is left: it is said at once.
    let one = write(folder.path(), "one.jsonl", "[1, 2, 3]\n");
    let one = ["quantize", &source, "--out", &path("one"), "--calibration", &one, "--report", &report];
    let done = ok(&[&one[..], &["--algorithm", "max", "--activations", "nvfp4"]].concat());
    assert!(done.stderr.contains("have no windows left to measure on"), "{}", done.stderr);
}

#[test]
fn where_no_report_can_be_is_found_before_the_calibration() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    let args = ["quantize", &bf16(), "--out", &out, "--report"];
    for report in ["/proc/nowhere/report", "/proc/version"] {
        fails(&[&args[..], &[report]].concat(), 2, report);
    }
    for report in [out.clone(), format!("{out}/report")] {
        fails(&[&args[..], &[&report]].concat(), 2, "--report: expected a folder outside of --out");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn an_interrupt_ends_the_measuring_of_a_report() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (out, report) = (path("out"), path("report"));
    let source = bf16();
    let args = ["quantize", &source, "--out", &out, "--algorithm", "mse", "--report", &report];
    let child = nibble(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while !Path::new(&out).exists() {
        std::thread::yield_now();
    }
    // SAFETY: a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let stopped = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&stopped.stderr);
    assert_eq!(stopped.status.code(), Some(130), "{stderr}");
    assert!(!stderr.contains("this layer"), "{stderr}");
    assert_eq!(std::fs::read_dir(&report).unwrap().count(), 0);
    ok(&["inspect", &out]);
}

#[test]
fn packed_attention_stays_while_experts_are_calibrated() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (attention, out, back) = (path("attention"), path("out"), path("back"));
    let tensors = ["--format", "compressed-tensors", "--recipe", "linear"];
    ok(&[&["quantize", &bf16(), "--out", &attention, "--algorithm", "max"], &tensors[..]].concat());
    let linear = ["--recipe", "linear", "--calibration-tokens", "64"];
    let done = ok(&[&["quantize", &attention, "--out", &out, "--json"], &linear[..]].concat()).json();
    let changed = done["tensors"].as_array().unwrap();
    assert!(
        changed.iter().all(|t| t["algorithm"] == "refine" && t["name"].as_str().unwrap().contains("experts"))
    );
    assert_eq!(changed.len(), 4 * 2);
    let compared = run(&["verify", &attention, &out, "--json"]).json();
    let different = compared["different"].as_array().unwrap();
    assert!(different.iter().all(|t| t["name"].as_str().unwrap().contains("experts")), "{different:?}");
    // Nothing is in BF16 any more.
    ok(&[&["quantize", &out, "--out", &back], &linear[..]].concat());
    assert_eq!(ok(&["verify", &out, &back, "--json"]).json()["identical"], true);
}

#[test]
fn codes_that_are_recovered_need_no_calibration() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (fake, out) = (path("fake"), path("out"));
    ok(&["quantize", &bf16(), "--out", &fake, "--algorithm", "max", "--format", "fake-bf16"]);
    // Without it there are no data to calibrate on.
    std::fs::remove_file(Path::new(&fake).join("tokenizer.json")).unwrap();
    let done = ok(&["quantize", &fake, "--out", &out]);
    assert!(done.stderr.contains("has no tokenizer.json"), "{}", done.stderr);
    assert_eq!(ok(&["verify", &fake, &out, "--json"]).json()["identical"], true);
    let missing = "expected a tokenizer.json";
    fails(&["quantize", &fake, "--out", &path("other"), "--recipe", "linear"], 2, missing);
}

#[test]
fn the_published_form_needs_no_calibration() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    let report = folder.path().join("report").to_str().unwrap().to_owned();
    let few = write(folder.path(), "few.jsonl", "[1, 2, 3, 4]\n");
    let unused = folder.path().join("unused").to_str().unwrap().to_owned();
    let unused = ok(&["quantize", &small(), "--out", &unused, "--calibration", &few]);
    assert!(unused.stderr.contains("--calibration is not used"), "{}", unused.stderr);
    let done =
        ok(&["quantize", &small(), "--out", &out, "--report", &report, "--calibration-tokens", "2048"]);
    assert!(!done.stderr.contains("--calibration"), "{}", done.stderr);
    assert!(done.stdout.contains("without losing a bit"), "{}", done.stdout);
    let report = std::fs::read_to_string(folder.path().join("report/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["calibration"], serde_json::Value::Null);
    for quality in report["quality"].as_array().unwrap() {
        assert_eq!((&quality["kl_mean"], &quality["top1_agreement"]), (&0.0.into(), &1.0.into()));
    }
    assert_eq!(report["quality"].as_array().unwrap().len(), 2);
}

#[test]
fn a_folder_beside_the_output_is_deleted_by_its_own_calibration_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    let beside = folder.path().join("out.calibration");
    std::fs::create_dir(&beside).unwrap();
    let data = write(&beside, "data.txt", "A text of somebody.");
    let calibrated = ["--algorithm", "gptq", "--calibration", &data, "--overwrite"];
    let source = bf16();
    fails(&[&["quantize", &source, "--out", &out], &calibrated[..]].concat(), 2, "out.calibration: expected");
    ok(&["quantize", &small(), "--out", &out]);
    assert_eq!(std::fs::read_to_string(data).unwrap(), "A text of somebody.");
}

#[test]
fn what_is_in_the_way_of_the_output_is_found_before_the_calibration() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    let partial = folder.path().join("out.partial");
    std::fs::create_dir(&partial).unwrap();
    let letter = write(&partial, "letter.txt", "dear");
    let calibrated = ["quantize", &bf16(), "--out", &out, "--kv-cache", "fp8", "--calibration-tokens", "64"];
    fails(
        &[&calibrated[..], &["--overwrite"]].concat(),
        2,
        "out.partial: expected unfinished work, or nothing",
    );
    // What another command left.
    std::fs::remove_file(&letter).unwrap();
    write(&partial, ".nibble-journal", "0123\n");
    let other = fails(&calibrated, 2, "out.partial: expected unfinished work of this very command");
    assert!(other.stderr.contains("--overwrite drops it"), "{}", other.stderr);
    assert!(!folder.path().join("out.calibration").exists(), "nothing was calibrated");
    ok(&[&calibrated[..], &["--overwrite"]].concat());
}

#[test]
fn an_interrupted_calibration_is_continued_by_the_same_command() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let source = bf16();
    let args = |out: &str| -> Vec<String> {
        ["quantize", &source, "--out", out, "--algorithm", "gptq", "--calibration-tokens", "512"]
            .map(str::to_owned)
            .to_vec()
    };
    // The name may end as a folder's does.
    let (whole, halved) = (path("whole/"), path("halved/"));
    ok(&args(&whole).iter().map(String::as_str).collect::<Vec<_>>());

    let args = args(&halved);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let child = nibble(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let first = folder.path().join("halved.calibration/layer-0.json");
    while !first.exists() {
        std::thread::yield_now();
    }
    // SAFETY: a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let stopped = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&stopped.stderr);
    assert_eq!(stopped.status.code(), Some(130), "{stderr}");
    assert!(
        stderr.contains(
            "interrupted: stops at the next expert, and a layer that is not finished is calibrated anew"
        ),
        "{stderr}"
    );
    assert!(stderr.contains("the same command continues"), "{stderr}");
    assert!(!Path::new(&halved).exists() && first.exists());
    let other = fails(&[&args[..], &["--seed", "1"]].concat(), 2, "halved.calibration: expected");
    assert!(other.stderr.contains("--overwrite drops it"), "{}", other.stderr);

    // What was damaged since is told as such.
    let whole_layer = std::fs::read(&first).unwrap();
    std::fs::write(&first, "").unwrap();
    let damaged = fails(&args, 3, "layer-0.json");
    assert!(damaged.stderr.contains("halved.calibration the same command"), "{}", damaged.stderr);
    std::fs::write(&first, whole_layer).unwrap();

    ok(&args);
    let weights = |folder: &str| std::fs::read(Path::new(folder).join("model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&halved), "the same bytes");
    assert!(!folder.path().join("halved.calibration").exists(), "nothing is left behind");
}
