//! Wrong usage, wrong files, a failing machine: each a sentence and a status, never a panic.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::{bf16, copy_model, fails, isolated, nibble, ok, run, run_with_input, small};

#[test]
fn wrong_usage_is_refused_by_name() {
    let small = small();
    for (args, named) in [
        (vec!["quantise"], "quantise"),
        (vec!["quantize", &small], "--out"),
        (vec!["quantize", &small, "--out", "x", "--recipe", "some"], "some"),
        (vec!["quantize", &small, "--out", "/nonexistent/x", "--format", "compressed-tensors"], "--recipe"),
        (vec!["inspect", "no-such-folder"], "no-such-folder"),
        (vec!["inspect", "Cargo.toml"], "Cargo.toml"),
        (vec!["generate"], "prompt"),
        (vec!["generate", "-p", "x", "--temperature", "9"], "temperature"),
        (vec!["generate", "-p", "x", "--temperature", "nan"], "temperature"),
        (vec!["generate", "-p", "x", "--top-p", "0"], "top_p"),
        (vec!["generate", "-p", "x", "--n", "0"], "n"),
        (vec!["generate", "-p", "x", "--max-model-len", "0"], "--max-model-len"),
        (vec!["generate", "-p", "x", "--max-model-len", "900k"], "131072"),
        (vec!["generate", "-p", "x", "--system", "y"], "--system"),
        (vec!["generate", "-p", "x", "--quantization", "int3"], "int3"),
        (vec!["generate", "-p", "x", "--quantization", "modelopt"], "modelopt"),
        (vec!["generate", "-p", "x", "--tensor-parallel-size", "2"], "--tensor-parallel-size"),
        (vec!["generate", "-p", "x", "--device", "cuda"], "--device"),
        (vec!["doctor", "--device", "cuda"], "--device"),
        (
            vec!["generate", "-p", "x", "--device", "cuda:0,1"],
            "expected auto or cpu in this build, found a GPU",
        ),
        (
            vec!["generate", "-p", "x", "--device", "cuda:1,1"],
            "cuda:N[,N…] without a number twice, found cuda:1,1",
        ),
        (vec!["generate", "-p", ""], "prompt"),
        (vec!["generate", "--prompts", "no-such-file"], "no-such-file"),
        (vec!["eval", &small, "perplexity"], "--text"),
        (vec!["eval", &small, "perplexity", "--text", "Cargo.toml"], "window"),
        (vec!["eval", "no-such-folder", "perplexity", "--text", "Cargo.toml"], "no-such-folder"),
        (vec!["verify", &small, &small, "--tolerance", "nan"], "--tolerance"),
        (
            vec!["logits", &small, "--ids", "1,5000", "--out", "/nonexistent/x"],
            "--ids: expected ids below 4096",
        ),
        (vec!["logits", &small, "--ids", "1", "--layer", "9", "--out", "x"], "--layer"),
        (vec!["logits", &small, "--ids", "1", "--out", "/nonexistent/x"], "/nonexistent/x"),
        (vec!["bench", "--synthetic", "gpt-5"], "gpt-5"),
        (vec!["bench", "--synthetic", "gpt-oss-20b:99"], "99"),
        (vec!["bench", "serve", "http://127.0.0.1:1", "--request-rate", "1e-300"], "--request-rate"),
        (vec!["bench", "serve", "http://127.0.0.1:1", "--num-prompts", "100000000000"], "--num-prompts"),
        (vec!["bench", "serve", "http://127.0.0.1:1", "--input-len", "100000000000"], "--input-len"),
        (vec!["bench", "serve", "http://127.0.0.1:1", "--concurrency", "0"], "--concurrency"),
        (vec!["tokens", "encode", "--text", "a", "--device", "bogus"], "expected auto, cpu, cuda"),
        (vec!["harmony", "parse", "4294967296"], "expected a token id"),
        (vec!["quantize", &small, "--out", "/nonexistent/x", "--max-shard-size", "0"], "--max-shard-size"),
        (vec!["bench", &small, "-r", "0"], "--repetitions"),
        (vec!["bench", &small, "-b", "1,0"], "--batches"),
        (vec!["bench", &small, "-p", "131073"], "expected depth and tokens of at most 131072 in all"),
        (vec!["bench", "serve", "nonsense"], "URL: expected where the server is"),
        (vec!["tokens", "decode", "x"], "\"x\""),
        (vec!["tokens", "decode", "24912", "999999"], "found 999999, which no token has"),
        (vec!["tokens", "encode", "no-such-file"], "no-such-file"),
        (vec!["harmony", "render", "no-such-file"], "no-such-file"),
        (vec!["serve", "--max-modle-len", "3"], "--max-model-len"),
    ] {
        assert_eq!(fails(&args, 2, named).stdout, "", "{args:?}");
    }
}

#[test]
fn without_a_home_the_hubs_cache_is_the_users_still() {
    let mut command = nibble(&["inspect", "owner/name"]);
    let output = command.env_remove("HOME").env_remove("XDG_CACHE_HOME").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("not in the cache /"), "{stderr}");
}

#[test]
fn a_context_that_does_not_fit_is_no_hint() {
    let cache = ["generate", "-p", "x", "--kv-cache-memory-bytes", "1"];
    assert!(!fails(&cache, 3, "key/value cache").stderr.contains("hint:"));
}

#[test]
fn a_cache_that_finds_no_room_is_refused_with_one_that_does() {
    let mut command = Command::new("sh");
    let limited = "ulimit -v 2000000; exec \"$0\" \"$@\"";
    command.args(["-c", limited, env!("CARGO_BIN_EXE_nibble"), "generate", "-p", "x", "--max-tokens", "1"]);
    // What there is room for by default is below the limit.
    assert_eq!(command.output().unwrap().status.code(), Some(0));
    let output = command.args(["--kv-cache-memory-bytes", "1T"]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(
        stderr.contains("found room for about ") && stderr.contains("hint: --kv-cache-memory-bytes "),
        "{stderr}"
    );
}

#[test]
fn help_shows_no_key_of_the_environment() {
    for (args, name) in
        [(&["serve", "--help"][..], "VLLM_API_KEY"), (&["bench", "serve", "--help"], "OPENAI_API_KEY")]
    {
        let output = nibble(args).env(name, "sk-of-somebody").output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(help.contains(name) && !help.contains("sk-of-somebody"), "{help}");
    }
}

#[test]
fn help_has_examples_for_every_command() {
    let help = ok(&["--help"]).stdout;
    for command in [
        "demo", "quantize", "inspect", "verify", "generate", "chat", "serve", "eval", "bench", "doctor",
        "tokens", "harmony", "logits",
    ] {
        assert!(help.contains(command), "{command}");
        let own = ok(&[command, "--help"]).stdout;
        assert!(own.contains("Usage: nibble") && own.contains("Examples:\n"), "{command}");
    }
    assert!(help.contains("Examples:"));
}

#[test]
fn an_output_that_exists_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    std::fs::write(folder.path().join("precious"), "x").unwrap();
    fails(&["quantize", &small(), "--out", out], 2, out);
    // Not even by force, since it is no checkpoint.
    fails(&["quantize", &small(), "--out", out, "--overwrite"], 2, out);
    assert!(folder.path().join("precious").exists());
    let checkpoint = format!("{out}/a model");
    let done = ok(&["quantize", &small(), "--out", &checkpoint]);
    assert!(done.stdout.contains(&format!("nibble verify {} '{checkpoint}'", small())), "{}", done.stdout);
    fails(&["quantize", &small(), "--out", &checkpoint], 2, "--overwrite");
    let lossy = ok(&["quantize", &small(), "--out", &checkpoint, "--overwrite", "--algorithm", "max"]);
    assert!(!lossy.stdout.contains("nibble verify"), "{}", lossy.stdout);
    assert_eq!(run(&["verify", &small(), &checkpoint]).status, 1);

    // A link is neither replaced nor followed, however it is written.
    let link = format!("{out}/link");
    std::os::unix::fs::symlink(&checkpoint, &link).unwrap();
    for link in [&link, &format!("{link}/")] {
        fails(&["quantize", &small(), "--out", link, "--overwrite"], 2, "found a link");
    }
    assert!(Path::new(&link).is_symlink() && !Path::new(&format!("{link}.partial")).exists());

    // Nor a page of somebody by a report.
    let (readme, new) = (format!("{out}/README.md"), format!("{out}/new"));
    std::fs::write(&readme, "mine").unwrap();
    fails(&["quantize", &small(), "--out", &new, "--report", out], 2, &readme);
    assert_eq!(std::fs::read_to_string(&readme).unwrap(), "mine");
    assert!(!Path::new(&new).exists());

    // What is read must not be deleted with it.
    let (inner, text) = (format!("{checkpoint}/inner"), format!("{checkpoint}/data.txt"));
    copy_model(&small(), Path::new(&inner));
    fails(
        &["quantize", &inner, "--out", &checkpoint, "--overwrite"],
        2,
        "inner: expected no folder of other files",
    );
    let moved = run(&["quantize", &inner, "--out", &checkpoint, "--overwrite"]);
    assert!(moved.stderr.contains("hint: move it elsewhere first"), "{}", moved.stderr);
    std::fs::rename(&inner, format!("{out}/inner")).unwrap();
    let refused = format!("--out {checkpoint}: expected a folder without the source");
    std::fs::write(&text, "A text of somebody.").unwrap();
    let calibrated = ["quantize", &bf16(), "--out", &checkpoint, "--overwrite", "--calibration", &text];
    fails(&calibrated, 2, "data.txt there");
    // The source itself, by its name, by a link to it, and by links to its files.
    let linked = format!("{out}/linked");
    std::fs::create_dir(&linked).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::os::unix::fs::symlink(format!("{checkpoint}/{file}"), format!("{linked}/{file}")).unwrap();
    }
    for source in [&checkpoint, &link, &linked] {
        fails(&["quantize", source, "--out", &checkpoint, "--overwrite"], 2, &refused);
    }
    assert!(Path::new(&text).exists());
    fails(&["quantize", &small(), "--out", ".."], 2, "expected the name of a folder");
}

#[test]
fn damaged_checkpoints_name_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("model");
    copy_model(&small(), &copy);
    let path = copy.to_str().unwrap();
    let weights = copy.join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let text = |from: &str, to: &str| {
        let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        let changed = String::from_utf8(whole[8..8 + header].to_vec()).unwrap().replacen(from, to, 1);
        assert_eq!(changed.len(), header, "the replacement has the same length");
        [&whole[..8], changed.as_bytes(), &whole[8 + header..]].concat()
    };
    for (bytes, named) in [
        (whole[..whole.len() - 100].to_vec(), "model.safetensors"),
        (whole[..5].to_vec(), "model.safetensors"),
        (text("model.layers.2.self_attn.sinks", "model.layers.2.self_attn.sunks"), "self_attn.sunks"),
        (text("model.norm.weight", "model.norm.wrong!"), "model.norm.weight"),
        ([&u64::MAX.to_le_bytes(), &whole[8..]].concat(), "model.safetensors"),
    ] {
        std::fs::write(&weights, bytes).unwrap();
        for command in ["inspect", "generate"] {
            let args = [command, path, "-p", "x"];
            fails(&args[..if command == "inspect" { 2 } else { 4 }], 2, named);
        }
    }
    std::fs::write(&weights, &whole).unwrap();
    let config = std::fs::read_to_string(copy.join("config.json")).unwrap();
    std::fs::write(copy.join("config.json"), config.replace("\"hidden_size\": 256", "\"hidden_size\": 288"))
        .unwrap();
    fails(&["inspect", path], 2, "288");
    std::fs::write(copy.join("config.json"), "{").unwrap();
    fails(&["inspect", path], 2, "config.json");
}

#[test]
fn what_is_no_file_is_refused_instead_of_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("model");
    copy_model(&small(), &copy);
    let path = copy.to_str().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    let commands =
        [&["inspect", path][..], &["quantize", path, "--out", &out], &["generate", path, "-p", "x"]];
    // A link that leads to itself.
    let weights = copy.join("model.safetensors");
    std::fs::rename(&weights, folder.path().join("whole")).unwrap();
    std::os::unix::fs::symlink("model.safetensors", &weights).unwrap();
    fails(commands[0], 2, "model.safetensors");
    std::fs::rename(folder.path().join("whole"), &weights).unwrap();
    // A pipe that nobody writes to, and a file without an end.
    for make in [&["mkfifo"][..], &["ln", "-s", "/dev/zero"]] {
        for (name, commands) in [
            ("config.json", &commands[..]),
            ("model.safetensors", &commands),
            ("tokenizer.json", &commands[1..]),
        ] {
            let file = copy.join(name);
            std::fs::rename(&file, folder.path().join("whole")).unwrap();
            assert!(Command::new(make[0]).args(&make[1..]).arg(&file).status().unwrap().success());
            for command in commands {
                let refused = fails(command, 2, name);
                assert!(refused.stderr.contains("a regular file"), "{command:?}: {}", refused.stderr);
            }
            std::fs::remove_file(&file).unwrap();
            std::fs::rename(folder.path().join("whole"), &file).unwrap();
        }
    }
}

#[test]
fn weights_that_are_no_numbers_are_not_answered_with() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("model");
    copy_model(&small(), &copy);
    let path = copy.to_str().unwrap();
    let weights = copy.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let norm = header + tensors["model.norm.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[norm..norm + 2].copy_from_slice(&[0xc0, 0x7f]);
    std::fs::write(&weights, bytes).unwrap();
    fails(&["generate", path, "-p", "x", "--max-tokens", "3"], 2, "damaged");
    let text = crate::path("testdata/data/books-valid.txt");
    fails(&["eval", path, "perplexity", "--text", &text, "--windows", "1"], 2, "damaged");
    let compared = run(&["verify", &small(), path]);
    assert_eq!(compared.status, 1);
    let line = "model.norm.weight: 1 values differ, with other shapes or with values that are no numbers";
    assert!(compared.stdout.contains(line), "{}", compared.stdout);
    let out = folder.path().join("logits");
    fails(&["logits", path, "--ids", "1,2", "--out", out.to_str().unwrap()], 2, "damaged");
    assert!(!out.exists());
}

#[test]
fn json_may_begin_with_the_mark_of_some_editors() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("model");
    copy_model(&small(), &copy);
    let config = std::fs::read_to_string(copy.join("config.json")).unwrap();
    std::fs::write(copy.join("config.json"), format!("\u{feff}{config}")).unwrap();
    ok(&["inspect", copy.to_str().unwrap()]);
    let tokenizer = std::fs::read_to_string(copy.join("tokenizer.json")).unwrap();
    std::fs::write(copy.join("tokenizer.json"), format!("\u{feff}{tokenizer}")).unwrap();
    let encode = ["tokens", "encode", "--text", "Hello", "--model", copy.to_str().unwrap()];
    ok(&encode);
    // Nor is the pointer that a clone without its large files has.
    std::fs::write(
        copy.join("tokenizer.json"),
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    )
    .unwrap();
    fails(&encode, 2, "git lfs pull");
    let lines = run_with_input(&["tokens", "encode", "--lines", "-"], "\u{feff}\"a\"\n\"b\"\n".as_bytes());
    assert_eq!((lines.status, lines.stdout.lines().count()), (0, 2), "{}", lines.stderr);
}

#[test]
fn text_that_is_none_or_without_end_is_refused() {
    let invalid = run_with_input(&["tokens", "encode", "-"], b"abc\xff\xfe");
    assert_eq!(invalid.status, 2);
    assert!(invalid.stderr.contains("position 3"), "{}", invalid.stderr);
    let lines = run_with_input(&["tokens", "encode", "--lines", "-"], b"\"fine\"\n\"\xff\"\n");
    assert_eq!(lines.status, 2);
    assert!(lines.stderr.contains("line 2"), "{}", lines.stderr);
    let document = run_with_input(&["harmony", "parse", "-"], b"{\"ids\": 3}\n");
    assert!(document.status == 2 && document.stderr.contains("standard input: "), "{}", document.stderr);
    let json = run_with_input(&["harmony", "parse", "--lines", "-"], b"{\"ids\": 3}\n");
    assert!(json.status == 2 && json.stderr.contains("line 1"), "{}", json.stderr);

    // A gigabyte is offered; a quarter of it is read.
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    let mut head =
        Command::new("head").args(["-c", "1G"]).stdin(zeros).stdout(Stdio::piped()).spawn().unwrap();
    let input = head.stdout.take().unwrap();
    let output = nibble(&["tokens", "encode", "-"]).stdin(input).output().unwrap();
    let _ = head.kill();
    let _ = head.wait();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("at most 256 MiB"));
}

#[test]
fn a_full_disk_leaves_nothing_under_the_final_name() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    // The limit on a file's size fails a write in the middle, as a full disk does: there is room for the first experts.
    let script = "ulimit -f 10000; trap '' XFSZ; exec \"$0\" quantize \"$1\" --out \"$2\" --algorithm mse";
    let limited = Command::new("bash")
        .args(["-c", script, env!("CARGO_BIN_EXE_nibble"), &bf16(), out.to_str().unwrap()])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&limited.stderr);
    assert_eq!(limited.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("model"), "{stderr}");
    assert!(!out.exists());
    // With room again, the same command continues. What the first one wrote was not measured by the second.
    let done =
        ok(&["quantize", &bf16(), "--out", out.to_str().unwrap(), "--algorithm", "mse", "--json"]).json();
    let measured = done["tensors"].as_array().unwrap().iter().map(|tensor| tensor["mse"].as_f64());
    let measured: Vec<Option<f64>> = measured.collect();
    assert!(measured[0].is_none() && measured.iter().flatten().all(|&mse| mse > 0.0), "{measured:?}");
    assert!(!folder.path().join("model.partial").exists());
    ok(&["inspect", out.to_str().unwrap()]);
}

#[test]
fn unfinished_work_is_continued_with_the_same_data_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (source, out) = (path("source"), path("model"));
    copy_model(&bf16(), Path::new(&source));
    let partial = |args: &[&str]| {
        // Room for the experts of the first layer.
        let script = "ulimit -f 10000; trap '' XFSZ; exec \"$0\" \"$@\"";
        let binary = env!("CARGO_BIN_EXE_nibble");
        let limited = Command::new("bash").args(["-c", script, binary]).args(args).output().unwrap();
        assert_eq!(limited.status.code(), Some(3), "{}", String::from_utf8_lossy(&limited.stderr));
        assert!(folder.path().join("model.partial").exists(), "it was being written");
    };
    let weights = |folder: &str| std::fs::read(Path::new(folder).join("model.safetensors")).unwrap();

    // Another seed draws other windows.
    let calibrated =
        ["quantize", &source, "--algorithm", "gptq", "--calibration-tokens", "256", "--overwrite"];
    partial(&[&calibrated[..], &["--out", &out, "--seed", "1"]].concat());
    let whole = path("whole");
    for out in [&out, &whole] {
        ok(&[&calibrated[..], &["--out", out, "--seed", "2"]].concat());
    }
    assert!(weights(&out) == weights(&whole), "nothing is left of the first seed");

    // A source whose configuration was changed is another one.
    std::fs::remove_dir_all(&out).unwrap();
    let rounded = ["quantize", &source, "--out", &out, "--algorithm", "max"];
    partial(&rounded);
    let config = Path::new(&source).join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let changed = text.replace("\"sliding_window\": ", "\"sliding_window\": 1");
    assert_ne!(text, changed);
    std::fs::write(&config, changed).unwrap();
    fails(&rounded, 2, "model.partial: expected unfinished work of this very command");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let mut child =
        nibble(&["inspect", &small()]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"));
}

#[test]
fn a_file_that_the_system_lets_not_grow_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (small, out, kept) = (small(), at("q"), at("kept"));
    let limited = |args: &[&str]| {
        let mut command = isolated("sh");
        command.args(["-c", "ulimit -f 100; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_nibble")]).args(args);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let quantize = ["quantize", &small, "--out", &out];
    let (status, stderr) = limited(&quantize);
    assert_eq!(status, Some(3), "{stderr}");
    assert!(stderr.contains("q.partial/model.safetensors: File too large"), "{stderr}");
    // What is finished stays, and the same command goes on without the limit.
    assert_eq!(run(&quantize).status, 0);
    let generate =
        ["generate", &small, "-p", "hi", "--max-tokens", "1", "--device", "cpu", "--packed-cache", &kept];
    let (status, stderr) = limited(&generate);
    assert_eq!(status, Some(0), "{stderr}");
    assert!(stderr.contains("kept: File too large"), "{stderr}");
    assert!(!Path::new(&kept).exists());
}

#[test]
fn a_standard_output_that_takes_nothing_is_the_machines_failure() {
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let small = small();
    for args in [
        &["tokens", "encode", "--text", "hi"][..],
        &["inspect", &small],
        &["inspect", &small, "--json"],
        &["verify", &small, &small],
        &["generate", "-p", "hi", "--max-tokens", "1"],
        &["demo"],
        &["--help"],
    ] {
        let output = nibble(args).stdout(full()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: standard output: "), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    }
    // Errors that nobody can read keep their status.
    for args in [&["inspect", "/nowhere"][..], &["inspect"]] {
        assert_eq!(nibble(args).stderr(full()).status().unwrap().code(), Some(2), "{args:?}");
    }
}

#[test]
fn names_that_are_no_unicode_are_written_to_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let name = |bytes: &[u8]| folder.path().join(std::ffi::OsStr::from_bytes(bytes));
    let done = |command: &mut Command| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let (model, logits, report) = (name(b"m\xff"), name(b"l\xff"), name(b"r\xff"));
    let small = small();
    for stdout in [
        done(nibble(&["quantize", &small, "--json", "--out"]).arg(&model).arg("--report").arg(&report)),
        done(nibble(&["logits", &small, "--ids", "1,2", "--json", "--out"]).arg(&logits)),
    ] {
        let document: serde_json::Value = serde_json::from_slice(&stdout).unwrap();
        assert!(document["out"].as_str().unwrap().ends_with('\u{fffd}'), "{document}");
    }
    assert!(model.join("config.json").exists() && logits.exists() && report.join("index.html").exists());
}

#[test]
fn logits_replace_files_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let logits =
        |name: &str| nibble(&["logits", &small(), "--ids", "1", "--out"]).arg(at(name)).output().unwrap();
    std::fs::write(at("file"), "old").unwrap();
    std::fs::write(at("file.partial"), "mine").unwrap();
    assert_eq!(logits("file").status.code(), Some(0));
    assert!(std::fs::read(at("file")).unwrap().len() > 1000);
    assert_eq!(std::fs::read_to_string(at("file.partial")).unwrap(), "mine");

    std::os::unix::fs::symlink(at("file.partial"), at("link")).unwrap();
    assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    for name in ["link", "pipe"] {
        let kind = || std::fs::symlink_metadata(at(name)).unwrap().file_type();
        let before = kind();
        let refused = logits(name);
        let stderr = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("expected nothing there, or a regular file to replace"), "{stderr}");
        assert_eq!(kind(), before);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4, "nothing unfinished is left");
}

#[test]
fn interrupted_logits_leave_nothing_unfinished() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("logits");
    let (small, ids) = (small(), vec!["1"; 2048].join(","));
    let args = ["logits", &small, "--ids", &ids, "--out", out.to_str().unwrap()];
    let mut child = nibble(&args).stdout(Stdio::null()).spawn().unwrap();
    let names = || -> Vec<_> {
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    };
    while names().is_empty() {
        std::thread::yield_now();
    }
    // SAFETY: a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    // The file may have been finished first.
    let whole = child.wait().unwrap().success() || out.exists();
    assert_eq!(names().len(), usize::from(whole), "{:?}", names());
    assert_eq!(out.exists(), whole);
}
