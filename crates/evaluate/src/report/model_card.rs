//! The model card: what the hub shows of a model, with the facts of the run and no others.

use super::text::{
    NONE, bytes, change, code, count, duration, fenced, figures, fixed, percent, perplexity, plural, prose,
    yaml,
};
use super::{Report, STARVED_TOKENS};

/// Markdown with YAML front matter, as the Hugging Face hub reads it. No library is named: the files are run by more than one.
pub fn model_card(report: &Report) -> String {
    let mut card = front_matter(report);
    card += &heading(report);
    card += &quality(report);
    card += &sizes(report);
    card += &making(report);
    card += USE;
    card += &provenance(report);
    card + &limits(report)
}

fn front_matter(report: &Report) -> String {
    let run = &report.run;
    let mut yaml_lines = String::from("---\n");
    if let Some(license) = &run.source_license {
        yaml_lines += &format!("license: {}\n", yaml(license));
    }
    if let Some(base) = &run.base_model {
        yaml_lines += &format!("base_model: {}\n", yaml(base));
        // Of a fine-tune the hub would list it among the quantized forms of the model that was tuned.
        if *base == run.model {
            yaml_lines += "base_model_relation: quantized\n";
        }
    }
    let mut tags = vec!["gpt-oss".to_owned(), "nibble".to_owned()];
    tags.extend(report.formats().iter().map(|format| format.to_lowercase()));
    tags.push(run.layout.to_lowercase());
    yaml_lines += "tags:\n";
    for (place, tag) in tags.iter().enumerate() {
        if !tags[..place].contains(tag) {
            yaml_lines += &format!("  - {}\n", yaml(tag));
        }
    }
    yaml_lines + "---\n\n"
}

fn heading(report: &Report) -> String {
    let run = &report.run;
    let name = code(&run.model);
    let formats = report.formats().join(" and ");
    let formats = if formats.is_empty() { "quantized".to_owned() } else { format!("in {}", prose(&formats)) };
    let smaller = change(run.source_bytes as f64, run.bytes as f64);
    format!(
        "# {name} {formats}\n\n{name}, quantized with nibble {} from {} to the {} layout: {} instead of {}{}, {} bits per weight \
         over all tensors.\n\n",
        prose(&run.version),
        code(&run.source_layout),
        code(&run.layout),
        bytes(run.bytes),
        bytes(run.source_bytes),
        smaller.map_or_else(String::new, |change| format!(" ({change})")),
        fixed(run.bits_per_weight, 2)
    )
}

fn quality(report: &Report) -> String {
    let mut section = String::from("## Quality\n\n");
    if report.quality.is_empty() {
        return section + "Not measured in this run: neither perplexity nor divergence from the source.\n\n";
    }
    section += &format!(
        "Measured against the source model, token by token{}. KL is the mean of KL(source ‖ quantized) in nats, perplexity is e to \
         the mean negative log-likelihood (NLL).\n\n",
        report.unseen()
    );
    if let Some(note) = &report.quality_note {
        section += &format!("Note that {}.\n\n", prose(note));
    }
    section += "| Data | Tokens | KL mean | KL 99th percentile | Same first choice | Perplexity, source | Perplexity, quantized | \
                NLL, source | NLL, quantized |\n|:--|--:|--:|--:|--:|--:|--:|--:|--:|\n";
    for quality in &report.quality {
        section += &format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
            code(&quality.data),
            count(quality.tokens),
            figures(quality.kl_mean),
            figures(quality.kl_p99),
            percent(quality.top1_agreement),
            perplexity(quality.nll_source),
            perplexity(quality.nll),
            fixed(quality.nll_source, 4),
            fixed(quality.nll, 4)
        );
    }
    section += "\n";
    if let (Some(first), false) = (report.quality.first(), report.algorithms.is_empty()) {
        section += &format!(
            "Algorithms on the same source and on {}:\n\n| Algorithm | KL mean | NLL |\n|:--|--:|--:|\n",
            code(&first.data)
        );
        for result in &report.algorithms {
            section += &format!(
                "| {} | {} | {} |\n",
                code(&result.algorithm),
                figures(result.kl_mean),
                fixed(result.nll, 4)
            );
        }
        section += "\n";
    }
    section
}

fn sizes(report: &Report) -> String {
    if report.sizes.is_empty() {
        return String::new();
    }
    let mut section = String::from(
        "## Size\n\n| Part | Parameters | Source | Quantized | Bits per weight |\n|:--|--:|--:|--:|--:|\n",
    );
    for part in &report.sizes {
        let bits = match part.parameters {
            0 => NONE.to_owned(),
            parameters => fixed(part.bytes as f64 * 8.0 / parameters as f64, 2),
        };
        section += &format!(
            "| {} | {} | {} | {} | {bits} |\n",
            prose(&part.name),
            count(part.parameters),
            bytes(part.source_bytes),
            bytes(part.bytes)
        );
    }
    section + "\n"
}

fn making(report: &Report) -> String {
    let run = &report.run;
    let mut section = format!("## How it was made\n\n{}\n", fenced("sh", &run.command));
    let reason = run.reason.as_ref().map_or_else(String::new, |reason| {
        format!(" (chosen by `auto`: {})", prose(reason.trim_end_matches('.')))
    });
    if let (Some(recipe), Some(algorithm)) = (&run.recipe, &run.algorithm) {
        section += &format!("- recipe {}, algorithm {}{reason}\n", code(recipe), code(algorithm));
    }
    let scales = run
        .scales_per
        .as_ref()
        .map_or_else(String::new, |scales_per| format!("; one global scale per {}", code(scales_per)));
    section += &format!(
        "- activations: {}; KV cache: {}{scales}\n- {} on {}{}{}\n",
        code(&run.activations),
        code(&run.kv_cache),
        duration(run.seconds),
        plural(run.threads as u64, "thread", "threads"),
        if run.continued { " for the last call, which continued an interrupted one" } else { "" },
        run.peak_memory_bytes.map_or_else(String::new, |peak| format!(", {} of memory at most", bytes(peak)))
    );
    let exact = report.tensors.iter().filter(|tensor| tensor.mse == 0.0).count();
    if exact > 0 {
        section += &format!("- tensors that kept every value: {exact} of {}\n", report.tensors.len());
    }
    let unknown = report.tensors.iter().filter(|tensor| tensor.mse.is_nan()).count();
    if unknown > 0 {
        section += &format!(
            "- tensors whose error was not measured, since an earlier call wrote some of them: {unknown} of {}\n",
            report.tensors.len()
        );
    }
    section += "\n";
    let Some(calibration) = &report.calibration else {
        return section + "No calibration data were used.\n\n";
    };
    section += &format!(
        "Calibrated on {} in windows of at most {}, {}; seed {}.\n\n",
        plural(calibration.tokens, "token", "tokens"),
        count(calibration.window as u64),
        if calibration.all_experts {
            "every token routed through every expert"
        } else {
            "each token routed through the experts that the router chose"
        },
        calibration.seed
    );
    if !calibration.files.is_empty() {
        section += "| Calibration data | Windows | Tokens |\n|:--|--:|--:|\n";
        for file in &calibration.files {
            let windows = count(file.windows as u64);
            section += &format!("| {} | {windows} | {} |\n", code(&file.name), count(file.tokens));
        }
        section += "\n";
    }
    section
}

const USE: &str = "## Use\n\nWith `DIR` the folder that holds these files:\n\n\
                   ```sh\nnibble chat DIR     # a conversation in the terminal\n\
                   nibble serve DIR    # a server with OpenAI's API\n```\n\n";

fn provenance(report: &Report) -> String {
    let run = &report.run;
    let base = match &run.base_model {
        Some(base) if *base != run.model => format!(", whose base model is {}", code(base)),
        Some(_) => String::new(),
        None => "; the name of its base model is not known".to_owned(),
    };
    let license = match &run.source_license {
        Some(license) => format!("The source's licence is {}; it holds for these weights too.", code(license)),
        None => "**The licence of the source is unknown.** Find it out before these weights are passed on or put to use: \
                 quantizing grants no rights."
            .to_owned(),
    };
    let by = |algorithm: &str| report.tensors.iter().any(|tensor| tensor.algorithm == algorithm);
    // What was not measured is NaN, and may have changed.
    let kept = report.tensors.iter().all(|tensor| tensor.mse == 0.0);
    let mut changes = if kept { "Every weight kept its value" } else { "Weights were rounded" }.to_owned();
    let experts: usize = report.calibration.iter().flat_map(|data| &data.coverage).map(Vec::len).sum();
    if by("refine") && report.calibration.as_ref().is_some_and(|data| data.starved < experts) {
        changes += ", biases took the mean of the error";
    }
    if by("awq") {
        changes += ", columns of the attention projections were scaled and their norms by the inverse";
    }
    format!(
        "## Provenance and licence\n\nMade from {}{base}. {changes}; nothing was trained. {license}\n\n",
        code(&run.model)
    )
}

fn limits(report: &Report) -> String {
    let mut limits = String::from("## Limits\n\n");
    if report.quality.is_empty() {
        limits += "- No quality was measured: how far this model is from its source is not known.\n";
    } else {
        limits += "- Quality was measured on the data named above and on nothing else.\n";
    }
    limits += "- Not measured: tasks such as reasoning, code and tool calls, other languages, safety. Whatever the source gets wrong, \
               this model may get wrong too.\n";
    if let Some(calibration) = &report.calibration
        && calibration.starved > 0
    {
        limits += &format!(
            "- {} saw fewer than {STARVED_TOKENS} calibration tokens: fitted to little, their error is the least certain.\n",
            plural(calibration.starved as u64, "expert", "experts")
        );
    }
    limits
}
