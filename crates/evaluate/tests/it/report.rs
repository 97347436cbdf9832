//! Reports: what they say, that hostile names stay names, and that no number breaks them.

use evaluate::report::{
    AlgorithmResult, Calibration, CalibrationFile, Part, Quality, Report, Run, Tensor, WorstBlock,
    model_card, write,
};

/// A run on a model of this shape, with figures such as real runs have.
pub(crate) fn run_of(layers: usize, experts: usize) -> Report {
    let mut state = 7u32;
    let mut random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / f64::from(1 << 24)
    };
    let mut tensors = Vec::new();
    for layer in 0..layers {
        for (place, kind) in ["gate_up", "down", "q", "k", "v", "o"].into_iter().enumerate() {
            let depth = layer as f64 / layers as f64;
            let mse = 1e-5 * (1.0 + random());
            let part = if place < 2 { "mlp.experts" } else { "self_attn" };
            let suffix = if place < 2 { "" } else { ".weight" };
            tensors.push(Tensor {
                name: format!("model.layers.{layer}.{part}.{kind}_proj{suffix}"),
                layer: Some(layer),
                kind: kind.into(),
                format: "nvfp4".into(),
                algorithm: "gptq".into(),
                mse,
                sqnr_db: Some(20.0 + place as f64 / 3.0 + random() - depth),
                max_error: 0.03 * random(),
                max_rule_mse: Some(mse * (1.1 + 0.2 * random())),
                worst_block: Some(WorstBlock {
                    expert: (place < 2).then_some(layer % experts),
                    row: 12 + layer,
                    block: place,
                    relative_error: 0.2 + random() / 10.0,
                }),
            });
        }
    }
    tensors.push(Tensor {
        name: "lm_head.weight".into(),
        layer: None,
        kind: "output layer".into(),
        format: "bf16".into(),
        algorithm: "keep".into(),
        mse: 0.0,
        sqnr_db: None,
        max_error: 0.0,
        max_rule_mse: None,
        worst_block: None,
    });
    let coverage: Vec<Vec<u64>> =
        (0..layers).map(|_| (0..experts).map(|_| (2000.0 * random().powi(5)) as u64).collect()).collect();
    let part = |name: &str, parameters: u64, bits: f64| Part {
        name: name.into(),
        parameters,
        source_bytes: parameters * 2,
        bytes: (parameters as f64 * bits / 8.0) as u64,
    };
    Report {
        run: Run {
            model: "acme/gpt-oss-20b-tuned".into(),
            source_layout: "bf16".into(),
            source_license: Some("apache-2.0".into()),
            base_model: Some("openai/gpt-oss-20b".into()),
            layout: "modelopt".into(),
            recipe: Some("linear".into()),
            algorithm: Some("gptq".into()),
            reason: Some("the lowest measured divergence of six".into()),
            activations: "none".into(),
            kv_cache: "auto".into(),
            scales_per: Some("stack".into()),
            command:
                "nibble quantize acme/gpt-oss-20b-tuned --recipe linear --out tuned-nvfp4 --report report"
                    .into(),
            version: "0.1.0".into(),
            seconds: 4711.5,
            continued: false,
            peak_memory_bytes: Some(1_834_000_000),
            threads: 2,
            bytes: 12_610_000_000,
            source_bytes: 41_830_000_000,
            bits_per_weight: 4.8235,
        },
        calibration: Some(Calibration {
            files: vec![
                CalibrationFile { name: "books-train.txt".into(), windows: 32, tokens: 32_768 },
                CalibrationFile { name: "conversations-train.jsonl".into(), windows: 40, tokens: 32_768 },
            ],
            tokens: 65_536,
            window: 1024,
            all_experts: false,
            seed: 3,
            starved: coverage.iter().flatten().filter(|&&tokens| tokens < 16).count(),
            coverage,
        }),
        sizes: vec![
            part("experts", 19_110_000_000, 4.5),
            part("attention", 640_000_000, 4.5),
            part("embedding", 579_000_000, 16.0),
            part("output layer", 579_000_000, 16.0),
            part("router, norms, biases", 8_300_000, 16.0),
        ],
        tensors,
        quality_note: None,
        quality: vec![
            Quality {
                data: "books-valid.txt".into(),
                tokens: 16_368,
                nll_source: 2.5,
                nll: 2.5125,
                kl_mean: 0.01362,
                kl_p99: 0.1103,
                top1_agreement: 0.9412,
            },
            Quality {
                data: "conversations-valid.jsonl".into(),
                tokens: 9_120,
                nll_source: 1.25,
                nll: 1.2531,
                kl_mean: 0.00871,
                kl_p99: 0.0912,
                top1_agreement: 0.9633,
            },
        ],
        algorithms: [("max", 0.0250, 2.5301), ("mse", 0.0195, 2.5222), ("gptq", 0.01362, 2.5125)]
            .into_iter()
            .map(|(name, kl_mean, nll)| AlgorithmResult { algorithm: name.into(), kl_mean, nll })
            .collect(),
    }
}

/// Nothing but what every run has.
fn empty() -> Report {
    let Report { run, .. } = run_of(1, 1);
    let run = Run {
        source_license: None,
        base_model: None,
        reason: None,
        peak_memory_bytes: None,
        bytes: 0,
        source_bytes: 0,
        bits_per_weight: f64::NAN,
        ..run
    };
    Report {
        run,
        calibration: None,
        sizes: vec![],
        tensors: vec![],
        quality: vec![],
        quality_note: None,
        algorithms: vec![],
    }
}

struct Written {
    json: String,
    page: String,
    card: String,
}

fn written(report: &Report) -> Written {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("new/report");
    write(report, &dir).unwrap();
    let mut names: Vec<_> =
        std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["README.md", "index.html", "report.json"]);
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    let written = Written { json: read("report.json"), page: read("index.html"), card: read("README.md") };
    assert_well_formed(&written.page);
    assert_eq!(written.card, model_card(report));
    for forbidden in ["<script", "<img", "<link", "<iframe", " onerror", "href=", "src="] {
        assert!(
            !written.page.contains(&format!("{forbidden}=")) && !written.page.contains(forbidden),
            "{forbidden}"
        );
    }
    written
}

/// Every element that is opened is closed, in order, and attributes are quoted.
fn assert_well_formed(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page.strip_prefix("<!DOCTYPE html>").unwrap();
    while let Some(start) = rest.find('<') {
        rest = &rest[start + 1..];
        let mut quoted = false;
        let end = rest
            .find(|c| {
                quoted ^= c == '"';
                assert!(c != '<', "a tag within a tag: {}", &rest[..rest.len().min(80)]);
                c == '>' && !quoted
            })
            .expect("a tag ends");
        let tag = &rest[..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
        } else if !tag.ends_with('/') && !tag.starts_with("meta ") {
            let name = tag.split_whitespace().next().unwrap();
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric()), "{tag}");
            open.push(name);
        }
    }
    assert!(open.is_empty(), "not closed: {open:?}");
}

fn assert_all(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing");
    }
}

#[test]
fn the_page_says_what_happened() {
    let page = written(&run_of(24, 32)).page;
    assert_all(
        &page,
        &[
            "<h1>acme/gpt-oss-20b-tuned</h1>",
            "Quantized from bf16 to NVFP4 by <b>gptq</b>, recipe <b>linear</b>, written as <b>modelopt</b> in 1 h 18 min on 2 threads.",
            "Why this algorithm: the lowest measured divergence of six.",
            "<span class=\"value\">12.6 GB</span><span class=\"note\">from 41.8 GB (−70 %)</span>",
            "<span class=\"value\">4.82</span><span class=\"note\">of 20.9 billion parameters</span>",
            "<span class=\"value\">0.0136</span><span class=\"note\">nats on books-valid.txt</span>",
            "<span class=\"value\">12.34</span><span class=\"note\">from 12.18 (+1.26 %)</span>",
            "<td class=\"l\">conversations-valid.jsonl</td><td>9,120</td><td>0.00871</td><td>0.0912</td><td>96.3 %</td><td>3.490 → 3.501 <small>+0.31 %</small></td>",
            "KL 0.0250 · NLL 2.5301",
            "38.2 GB → 10.7 GB",
            "Tensors that kept every value, and so have no error to plot: 1 of 145.",
            "65,536 tokens in windows of at most 1,024; each token went through the experts that the router chose. Seed 3.",
            "saw fewer than 16.</b>",
            "<code>model.layers.23.self_attn.o_proj.weight</code>",
            "expert 3, row 15, block 0",
            "<dt>Peak memory</dt><dd>1.83 GB</dd>",
            "Content-Security-Policy",
        ],
    );
    for plot in [
        "Weights: signal to noise",
        "Weights: gain over the max rule",
        "bytes by part, before and after",
        "divergence by algorithm",
        "tokens by layer and expert",
    ] {
        assert_eq!(page.matches(&format!("<svg role=\"img\" aria-label=\"{plot}\"")).count(), 1, "{plot}");
    }
}

#[test]
fn the_model_card_states_the_facts() {
    let report = run_of(24, 32);
    let card = written(&report).card;
    let expected = "---\nlicense: \"apache-2.0\"\nbase_model: \"openai/gpt-oss-20b\"\ntags:\n  - \"gpt-oss\"\n  \
                    - \"nibble\"\n  - \"nvfp4\"\n  - \"modelopt\"\n---\n\n# `acme/gpt-oss-20b-tuned` in NVFP4\n\n";
    assert_eq!(&card[..expected.len()], expected);
    assert_all(
        &card,
        &[
            "from `bf16` to the `modelopt` layout: 12.6 GB instead of 41.8 GB (−70 %), 4.82 bits per weight",
            "Measured against the source model, token by token, on text that calibration did not see. KL",
            "| `books-valid.txt` | 16,368 | 0.0136 | 0.110 | 94.1 % | 12.18 | 12.34 | 2.5000 | 2.5125 |\n",
            "| `max` | 0.0250 | 2.5301 |\n",
            "| experts | 19,110,000,000 | 38.2 GB | 10.7 GB | 4.50 |\n",
            "```sh\nnibble quantize acme/gpt-oss-20b-tuned --recipe linear --out tuned-nvfp4 --report report\n```\n",
            "- recipe `linear`, algorithm `gptq` (chosen by `auto`: the lowest measured divergence of six)\n",
            "| `conversations-train.jsonl` | 40 | 32,768 |\n",
            "nibble chat DIR",
            "nibble serve DIR",
            "one global scale per `stack`\n- 1 h 18 min on 2 threads, 1.83 GB",
            "Made from `acme/gpt-oss-20b-tuned`, whose base model is `openai/gpt-oss-20b`. Weights were rounded;",
            "The source's licence is `apache-2.0`",
            "Quality was measured on the data named above and on nothing else.",
            "experts saw fewer than 16 calibration tokens",
        ],
    );
    let own = Run { model: "openai/gpt-oss-20b".into(), continued: true, ..report.run.clone() };
    let card = model_card(&Report { run: own, ..report.clone() });
    assert_all(
        &card,
        &[
            "base_model_relation: quantized\n",
            "# `openai/gpt-oss-20b` in NVFP4\n",
            "Made from `openai/gpt-oss-20b`. Weights",
            "2 threads for the last call, which continued an interrupted one, 1.83 GB",
        ],
    );

    // Of a cast nothing is said that rounding does.
    let mut cast = report;
    cast.tensors.iter_mut().for_each(|tensor| tensor.mse = 0.0);
    (cast.run.recipe, cast.run.algorithm, cast.run.scales_per, cast.run.reason) = (None, None, None, None);
    cast.calibration = None;
    let Written { card, page, .. } = written(&cast);
    assert_all(
        &card,
        &[
            "token by token. KL",
            "- activations: `none`; KV cache: `auto`\n",
            "Every weight kept its value; nothing was trained.",
        ],
    );
    assert!(!card.contains("algorithm `") && !card.contains("global scale"), "{card}");
    assert_all(&page, &["from bf16 to NVFP4, written as", "<dt>Recipe</dt><dd>–</dd>"]);
}

#[test]
fn the_json_has_every_field() {
    let report = run_of(2, 4);
    let json: serde_json::Value = serde_json::from_str(&written(&report).json).unwrap();
    let keys = |pointer: &str| {
        let object = json.pointer(pointer).and_then(|value| value.as_object()).unwrap();
        object.keys().map(String::as_str).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(keys(""), "run calibration sizes tensors quality quality_note algorithms");
    assert_eq!(
        keys("/run"),
        "model source_layout source_license base_model layout recipe algorithm reason activations kv_cache scales_per command \
         version seconds continued peak_memory_bytes threads bytes source_bytes bits_per_weight"
    );
    assert_eq!(keys("/calibration"), "files tokens window all_experts seed coverage starved");
    assert_eq!(keys("/calibration/files/1"), "name windows tokens");
    assert_eq!(keys("/sizes/0"), "name parameters source_bytes bytes");
    assert_eq!(
        keys("/tensors/0"),
        "name layer kind format algorithm mse sqnr_db max_error max_rule_mse worst_block"
    );
    assert_eq!(keys("/tensors/0/worst_block"), "expert row block relative_error");
    assert_eq!(keys("/quality/0"), "data tokens nll_source nll kl_mean kl_p99 top1_agreement");
    assert_eq!(keys("/algorithms/0"), "algorithm kl_mean nll");
    assert_eq!(json["run"]["bytes"], 12_610_000_000u64);
    assert_eq!(json["quality"][1]["nll_source"], 1.25);
    assert_eq!(json["calibration"]["coverage"].as_array().unwrap().len(), 2);
    assert_eq!(json["tensors"].as_array().unwrap().len(), 13);
    assert!(json["tensors"][12]["layer"].is_null() && json["tensors"][12]["worst_block"].is_null());
}

#[test]
fn a_report_of_next_to_nothing_says_so() {
    let Written { json, page, card } = written(&empty());
    assert_all(&page, &["not measured", "<dt>Licence of the source</dt><dd>unknown</dd>"]);
    assert!(!page.contains("<svg") && !page.contains("<table"));
    assert!(
        card.starts_with("---\ntags:\n  - \"gpt-oss\"\n"),
        "neither a licence nor a base model is made up"
    );
    assert_all(
        &card,
        &[
            "# `acme/gpt-oss-20b-tuned` quantized\n",
            "The licence of the source is unknown.",
            "No calibration data were used.",
            "Not measured in this run: neither perplexity nor divergence",
            "No quality was measured",
        ],
    );
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["run"]["bits_per_weight"].is_null() && json["calibration"].is_null());
}

#[test]
fn hostile_names_stay_names() {
    const HOSTILE: &str =
        "a\"'</td></title></style><script>alert(1)</script>|`]( x:#\n---\n# h\u{202e}\u{1}\\";
    let mut report = run_of(3, 4);
    let plain = model_card(&report);
    let name = || HOSTILE.to_owned();
    let run = &mut report.run;
    for field in [
        &mut run.model,
        &mut run.source_layout,
        &mut run.layout,
        &mut run.activations,
        &mut run.kv_cache,
        &mut run.command,
        &mut run.version,
    ] {
        *field = name();
    }
    for field in [
        &mut run.source_license,
        &mut run.base_model,
        &mut run.recipe,
        &mut run.algorithm,
        &mut run.reason,
        &mut run.scales_per,
    ] {
        *field = Some(name());
    }
    for tensor in &mut report.tensors {
        (tensor.name, tensor.kind, tensor.format, tensor.algorithm) = (name(), name(), name(), name());
    }
    report.calibration.as_mut().unwrap().files[0].name = name();
    report.sizes[0].name = name();
    report.quality[0].data = name();
    report.algorithms[0].algorithm = name();

    let Written { json, page, card } = written(&report);
    let escaped = "a&quot;&#39;&lt;/td&gt;&lt;/title&gt;&lt;/style&gt;&lt;script&gt;alert(1)&lt;/script&gt;|`]( x:# --- # h\u{fffd}\u{fffd}\\";
    assert_all(
        &page,
        &[
            &format!("<h1>{escaped}</h1>"),
            &format!("<td class=\"l\">{escaped}</td>"),
            &format!("<pre>{escaped}</pre>"),
        ],
    );
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["tensors"][0]["name"], HOSTILE);

    let yaml = "\"a\\\"'</td></title></style><script>alert(1)</script>|`]( x:#\\U0000000A---\\U0000000A# h\\U0000202E\\U00000001\\\\\"";
    let front: Vec<&str> = card.split("\n---\n").next().unwrap().lines().skip(1).collect();
    assert_eq!(
        front[..3],
        [&format!("license: {yaml}"), &format!("base_model: {yaml}"), "base_model_relation: quantized"]
    );
    assert!(front[3..].iter().all(|line| *line == "tags:" || line.starts_with("  - \"")), "{front:?}");

    // What remains of the names in the prose are words; in the fenced command they are code.
    let body = card.split_once("\n---\n").unwrap().1;
    let prose: String = body.lines().filter(|line| !line.starts_with("a\"'")).collect::<Vec<_>>().join("\n");
    assert!(!prose.contains("<script") && !prose.contains("](") && !prose.contains("\u{202e}"), "{prose}");
    let shape = |card: &str| {
        let lines = card.lines().filter(|line| line.starts_with('#') || line.starts_with('|'));
        lines
            .map(|line| (line.split(' ').next().unwrap().to_owned(), line.matches('|').count()))
            .collect::<Vec<_>>()
    };
    assert_eq!(shape(&card), shape(&plain), "the same headings and cells");
}

#[test]
fn a_fence_outlasts_the_backticks_of_a_command() {
    let mut report = empty();
    report.run.command = "nibble quantize '````\nevil' --out x".into();
    assert!(model_card(&report).contains("`````sh\nnibble quantize '```` evil' --out x\n`````\n"));
}

#[test]
fn no_number_breaks_a_report() {
    for value in
        [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, -f64::MAX, f64::MIN_POSITIVE, -1.0, 0.0]
    {
        for integer in [0, 1, u64::MAX] {
            let mut report = run_of(3, 4);
            let run = &mut report.run;
            (run.seconds, run.bits_per_weight) = (value, value);
            (run.bytes, run.source_bytes, run.peak_memory_bytes) = (integer, integer, Some(integer));
            for tensor in &mut report.tensors {
                (tensor.mse, tensor.max_error, tensor.sqnr_db) = (value, value, Some(value));
                tensor.max_rule_mse = Some(value);
                tensor.layer = Some(integer as usize);
            }
            for part in &mut report.sizes {
                (part.parameters, part.source_bytes, part.bytes) = (integer, integer, integer);
            }
            for quality in &mut report.quality {
                (quality.nll, quality.nll_source, quality.kl_mean) = (value, value, value);
                (quality.kl_p99, quality.top1_agreement, quality.tokens) = (value, value, integer);
            }
            for result in &mut report.algorithms {
                (result.kl_mean, result.nll) = (value, value);
            }
            let calibration = report.calibration.as_mut().unwrap();
            calibration.coverage = vec![vec![integer; 5], vec![], vec![0, 15, 16, u64::MAX]];
            (calibration.tokens, calibration.seed) = (integer, integer);
            let Written { json, page, card } = written(&report);
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            assert_eq!(json["tensors"][0]["mse"].is_null(), !value.is_finite());
            for text in [&page, &card] {
                assert!(
                    !text.contains("NaN") && !text.contains("inf ") && !text.contains("inf<"),
                    "{value} {integer}"
                );
            }
        }
    }
}

#[test]
fn what_was_quality_note_did_not_keep_its_values() {
    let mut report = run_of(4, 8);
    let tensor = &mut report.tensors[0];
    (tensor.mse, tensor.max_error, tensor.sqnr_db) = (f64::NAN, f64::NAN, None);
    let Written { json, page, card } = written(&report);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["tensors"][0]["mse"].is_null() && json["tensors"][0]["max_error"].is_null());
    assert_all(
        &card,
        &["- tensors that kept every value: 1 of 25\n", "error was not measured", ": 1 of 25\n"],
    );
    assert!(page.contains("no error to plot: 1 of 25"));
}

#[test]
fn the_model_card_names_what_changed_beside_the_weights() {
    let mut report = run_of(2, 4);
    assert!(model_card(&report).contains("Weights were rounded; nothing was trained."));
    report.tensors[0].algorithm = "refine".into();
    assert!(model_card(&report).contains("rounded, biases took the mean of the error; nothing"));
    report.tensors[1].algorithm = "awq".into();
    assert!(model_card(&report).contains("error, columns of the attention projections were scaled and"));
}

#[test]
fn what_the_figures_include_and_leave_out_is_said_beside_them() {
    let report = Report { quality_note: Some("they are without <b>".into()), ..run_of(2, 4) };
    let Written { json, page, card } = written(&report);
    assert!(json.contains("they are without <b>") && page.contains("Note that they are without &lt;b&gt;."));
    assert!(card.contains("Note that they are without &#60;b&#62;."), "{card}");
}

#[test]
fn a_lossless_cast_has_nothing_to_plot() {
    let mut report = run_of(4, 8);
    for tensor in &mut report.tensors {
        (tensor.mse, tensor.max_error, tensor.sqnr_db) = (0.0, 0.0, None);
        tensor.max_rule_mse = None;
    }
    let Written { page, card, .. } = written(&report);
    assert_all(&page, &["no error to plot: 25 of 25", "<td>exact</td>"]);
    assert!(!page.contains("signal to noise"));
    assert!(card.contains("- tensors that kept every value: 25 of 25\n"));
}

#[test]
fn large_models_make_pages_that_open() {
    let Written { page, .. } = written(&run_of(36, 128));
    assert!(page.len() < 3 << 20, "{} bytes", page.len());
    assert_eq!(page.matches("<code>model.layers.").count(), 216);

    // Experts one by one: 9,216 tensors, of which the page lists the noisiest.
    let mut report = run_of(36, 128);
    let stacks = report.tensors.iter().filter(|tensor| tensor.kind == "down" || tensor.kind == "gate_up");
    report.tensors = stacks.flat_map(|stack| std::iter::repeat_n(stack.clone(), 128)).collect();
    report.tensors[5000].sqnr_db = Some(1.5);
    let Written { page, .. } = written(&report);
    assert!(page.len() < 3 << 20, "{} bytes", page.len());
    assert_all(&page, &["The 1,000 noisiest of 9,216", "<td>1.50</td>"]);
}

#[test]
fn an_error_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("taken");
    std::fs::write(&file, "").unwrap();
    let message = write(&empty(), &file).unwrap_err().to_string();
    assert!(message.starts_with(&format!("{}: ", file.display())), "{message}");
    let folder = folder.path().join("report");
    std::fs::create_dir_all(folder.join("index.html/sub")).unwrap();
    let message = write(&empty(), &folder).unwrap_err().to_string();
    assert!(message.starts_with(&format!("{}: ", folder.join("index.html").display())), "{message}");
    assert!(!folder.join("index.html.partial").exists(), "nothing half-written is left");
}
