//! The HTML page: a summary for the first screen, then plots, then tables.

use std::collections::BTreeMap;

use plotters::style::RGBColor;

use super::plot::{AFTER, BEFORE, Bar, HEAT, LINES, Line};
use super::text::{
    NONE, bytes, change, count, duration, figures, fixed, html, optional, percent, perplexity, plural, rough,
    short,
};
use super::{Calibration, Error, Report, STARVED_TOKENS, Tensor, plot};

/// Rows of the table of tensors: more than a stack per layer needs; experts one by one could be ten thousand.
const MAX_ROWS: usize = 1000;

/// More decibels than any quotient of two numbers has; what is beyond was not measured. NaN is beyond.
const MAX_DECIBELS: f64 = 1e4;

/// The whole page.
pub(super) fn page(report: &Report) -> Result<String, Error> {
    let run = &report.run;
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{} · quantization report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n",
        html(&run.model)
    );
    page += &summary(report);
    page += &quality(report)?;
    page += &sizes(report)?;
    page += &layers(report)?;
    if let Some(calibration) = &report.calibration {
        page += &coverage(calibration)?;
    }
    page += &tensors(report);
    page += &run_facts(report);
    page += &format!(
        "<footer>Written by nibble {}. The same facts for programs: <code>report.json</code>; \
         for the model's page: <code>README.md</code>.</footer>\n</main>\n</body>\n</html>\n",
        html(&run.version)
    );
    Ok(page)
}

fn summary(report: &Report) -> String {
    let run = &report.run;
    let formats = report.formats().join(" and ");
    let what = if formats.is_empty() { formats } else { format!(" to {}", html(&formats)) };
    let how =
        run.algorithm.as_ref().zip(run.recipe.as_ref()).map_or_else(String::new, |(algorithm, recipe)| {
            format!(" by <b>{}</b>, recipe <b>{}</b>", html(algorithm), html(recipe))
        });
    let mut summary = format!(
        "<header>\n<p class=\"eyebrow\">nibble · quantization report</p>\n<h1>{}</h1>\n\
         <p class=\"lead\">Quantized from {}{what}{how}, written as <b>{}</b> in {} on {}.{}</p>\n",
        html(&run.model),
        html(&run.source_layout),
        html(&run.layout),
        duration(run.seconds),
        plural(run.threads as u64, "thread", "threads"),
        run.reason.as_ref().map_or_else(String::new, |reason| format!(
            " <span class=\"muted\">Why this algorithm: {}.</span>",
            html(reason.trim_end_matches('.'))
        )),
    );
    summary += "<div class=\"cards\">\n";
    let smaller = change(run.source_bytes as f64, run.bytes as f64);
    let from = format!(
        "from {}{}",
        bytes(run.source_bytes),
        smaller.map_or_else(String::new, |c| format!(" ({c})"))
    );
    summary += &card("Size", &bytes(run.bytes), &from);
    let parameters: u64 = report.sizes.iter().fold(0, |sum, part| sum.saturating_add(part.parameters));
    let of = if parameters > 0 {
        format!("of {} parameters", rough(parameters))
    } else {
        "over all tensors".to_owned()
    };
    summary += &card("Bits per weight", &fixed(run.bits_per_weight, 2), &of);
    if let Some(first) = report.quality.first() {
        let on = format!("nats on {}", short(&first.data, 40));
        summary += &card("Mean divergence", &figures(first.kl_mean), &on);
        let worse = change(first.nll_source.exp(), first.nll.exp())
            .map_or_else(String::new, |change| format!(" ({change})"));
        let from = format!("from {}{worse}", perplexity(first.nll_source));
        summary += &card("Perplexity", &perplexity(first.nll), &from);
        summary += &card("Same first choice", &percent(first.top1_agreement), "of the source's tokens");
    } else {
        summary += &card("Divergence", NONE, "not measured");
        summary += &card("Perplexity", NONE, "not measured");
    }
    summary + "</div>\n</header>\n"
}

fn card(name: &str, value: &str, note: &str) -> String {
    format!(
        "<div class=\"card\"><span class=\"name\">{}</span><span class=\"value\">{}</span><span class=\"note\">{}</span></div>\n",
        html(name),
        html(value),
        html(note)
    )
}

fn quality(report: &Report) -> Result<String, Error> {
    let mut section = String::new();
    if !report.quality.is_empty() {
        section += &format!(
            "<section>\n<h2>Quality</h2>\n<p>The quantized model against its source, token by token{}. Divergence is the \
             mean of KL(source ‖ quantized) in nats; perplexity is e to the mean negative log-likelihood (NLL).</p>\n",
            report.unseen()
        );
        if let Some(note) = &report.quality_note {
            section += &format!("<p>Note that {}.</p>\n", html(note));
        }
        let rows = report.quality.iter().map(|quality| {
            let worse = change(quality.nll_source.exp(), quality.nll.exp());
            vec![
                html(&quality.data),
                count(quality.tokens),
                figures(quality.kl_mean),
                figures(quality.kl_p99),
                percent(quality.top1_agreement),
                format!(
                    "{} → {}{}",
                    perplexity(quality.nll_source),
                    perplexity(quality.nll),
                    worse.map_or_else(String::new, |change| format!(" <small>{change}</small>"))
                ),
                format!("{} → {}", fixed(quality.nll_source, 4), fixed(quality.nll, 4)),
            ]
        });
        let head = ["Data", "Tokens", "KL mean", "KL 99th pct.", "Same first choice", "Perplexity", "NLL"];
        section += &table(&head, 1, rows);
        section += "</section>\n";
    }
    if !report.algorithms.is_empty() {
        let on =
            report.quality.first().map_or_else(String::new, |quality| format!(" on {}", html(&quality.data)));
        section += &format!(
            "<section>\n<h2>Algorithms compared</h2>\n<p>Mean divergence from the source{on}, in nats; shorter is closer. \
             This run's algorithm is the blue bar.</p>\n"
        );
        let bars: Vec<Bar> = report
            .algorithms
            .iter()
            .map(|result| Bar {
                label: result.algorithm.clone(),
                value: format!("KL {} · NLL {}", figures(result.kl_mean), fixed(result.nll, 4)),
                lengths: vec![(
                    if result.kl_mean.is_finite() { result.kl_mean.max(0.0) } else { 0.0 },
                    if Some(&result.algorithm) == report.run.algorithm.as_ref() { AFTER } else { BEFORE },
                )],
            })
            .collect();
        section += &figure("narrow", &plot::bars("divergence by algorithm", &bars)?);
        section += "</section>\n";
    }
    Ok(section)
}

fn sizes(report: &Report) -> Result<String, Error> {
    if report.sizes.is_empty() {
        return Ok(String::new());
    }
    let bars: Vec<Bar> = report
        .sizes
        .iter()
        .map(|part| Bar {
            label: part.name.clone(),
            value: format!("{} → {}", bytes(part.source_bytes), bytes(part.bytes)),
            lengths: vec![(part.source_bytes as f64, BEFORE), (part.bytes as f64, AFTER)],
        })
        .collect();
    let bits = |bytes: u64, parameters: u64| match parameters {
        0 => NONE.to_owned(),
        _ => fixed(bytes as f64 * 8.0 / parameters as f64, 2),
    };
    let rows = report.sizes.iter().map(|part| {
        let (before, after) = (bits(part.source_bytes, part.parameters), bits(part.bytes, part.parameters));
        vec![html(&part.name), count(part.parameters), format!("{before} → {after}")]
    });
    Ok(format!(
        "<section>\n<h2>Size by part</h2>\n<div class=\"pair\">\n{}<div>{}</div>\n</div>\n</section>\n",
        figure(
            "",
            &format!(
                "{}{}",
                plot::bars("bytes by part, before and after", &bars)?,
                legend([(BEFORE, "before".to_owned()), (AFTER, "after".to_owned())])
            )
        ),
        table(&["Part", "Parameters", "Bits per weight"], 1, rows)
    ))
}

/// What a plot over the layers shows of each tensor, in decibels.
struct Measure {
    title: &'static str,
    note: &'static str,
    value: fn(&Tensor) -> Option<f64>,
    /// Whether 0 means "no difference" and belongs into the plot.
    zero: bool,
}

const MEASURES: [Measure; 2] = [
    Measure {
        title: "Weights: signal to noise",
        note: "Squared weights over squared changes, in dB; higher is closer.",
        value: |tensor| tensor.sqnr_db,
        zero: false,
    },
    Measure {
        title: "Weights: gain over the max rule",
        note: "How many dB less squared error in the weights than scales from the largest magnitude leave. Algorithms that \
               look at the outputs may lose here and win in divergence.",
        value: |tensor| decibels(tensor.max_rule_mse?, tensor.mse),
        zero: true,
    },
];

fn layers(report: &Report) -> Result<String, Error> {
    let mut kinds: Vec<&str> = Vec::new();
    for tensor in report.tensors.iter().filter(|tensor| tensor.layer.is_some()) {
        if !kinds.contains(&tensor.kind.as_str()) {
            kinds.push(&tensor.kind);
        }
    }
    let mut figures = String::new();
    for measure in &MEASURES {
        let mut lines = Vec::new();
        let mut shown = Vec::new();
        for (place, &kind) in kinds.iter().enumerate() {
            let color = LINES[place % LINES.len()];
            let points = by_layer(&report.tensors, kind, measure.value);
            if points.is_empty() {
                continue;
            }
            lines.push(Line { points, color });
            shown.push((color, kind.to_owned()));
        }
        let flat = lines.iter().all(|line| line.points.iter().all(|&(_, value)| value.abs() < 1e-9));
        if lines.is_empty() || (measure.zero && flat) {
            continue;
        }
        figures += &figure(
            "",
            &format!(
                "<h3>{}</h3><p>{}</p>{}{}",
                html(measure.title),
                html(measure.note),
                plot::lines(measure.title, &lines, measure.zero)?,
                legend(shown)
            ),
        );
    }
    let exact = report.tensors.iter().filter(|tensor| tensor.mse == 0.0).count();
    let mut section = String::new();
    if !figures.is_empty() || exact > 0 {
        section += "<section>\n<h2>Error by layer</h2>\n";
        if exact > 0 {
            section += &format!(
                "<p>Tensors that kept every value, and so have no error to plot: {} of {}.</p>\n",
                count(exact as u64),
                count(report.tensors.len() as u64)
            );
        }
        if !figures.is_empty() {
            section += &format!("<div class=\"plots\">\n{figures}</div>\n");
        }
        section += "</section>\n";
    }
    Ok(section)
}

/// The mean of `value` over a kind's tensors in each layer that has any.
fn by_layer(tensors: &[Tensor], kind: &str, value: fn(&Tensor) -> Option<f64>) -> Vec<(usize, f64)> {
    let mut layers: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
    for tensor in tensors.iter().filter(|tensor| tensor.kind == kind) {
        if let (Some(layer), Some(value)) =
            (tensor.layer, value(tensor).filter(|value| value.abs() < MAX_DECIBELS))
        {
            let (sum, count) = layers.entry(layer).or_default();
            *sum += value;
            *count += 1.0;
        }
    }
    layers.into_iter().map(|(layer, (sum, count))| (layer, sum / count)).collect()
}

/// 10 log10(over / under), where that is a number.
fn decibels(over: f64, under: f64) -> Option<f64> {
    (over > 0.0 && under > 0.0).then(|| 10.0 * (over / under).log10())
}

fn coverage(calibration: &Calibration) -> Result<String, Error> {
    let mut section = format!(
        "<section>\n<h2>Calibration</h2>\n<p>{} in windows of at most {}; {}. Seed {}.</p>\n",
        plural(calibration.tokens, "token", "tokens"),
        count(calibration.window as u64),
        if calibration.all_experts {
            "every token went through every expert, so the map below shows what the router alone would have given them"
        } else {
            "each token went through the experts that the router chose"
        },
        calibration.seed
    );
    let rows = calibration
        .files
        .iter()
        .map(|file| vec![html(&file.name), count(file.windows as u64), count(file.tokens)]);
    section += &table(&["File", "Windows", "Tokens"], 1, rows);
    let mut cells: Vec<u64> = calibration.coverage.iter().flatten().copied().collect();
    cells.sort_unstable();
    if let (Some(&least), Some(&most)) = (cells.first(), cells.last()) {
        section += &format!(
            "<h3>Expert coverage</h3><p>Tokens that reached each expert: {} at least, {} in the median, {} at most. {}</p>\n",
            count(least),
            count(cells[cells.len() / 2]),
            count(most),
            if calibration.starved == 0 {
                format!("No expert saw fewer than {STARVED_TOKENS}.")
            } else {
                format!(
                    "<b class=\"bad\">{} saw fewer than {STARVED_TOKENS}.</b>",
                    plural(calibration.starved as u64, "expert", "experts")
                )
            }
        );
        let edges = edges(most);
        let step = |tokens: u64| edges.iter().rposition(|&edge| tokens >= edge).unwrap_or(0);
        let key = (0..edges.len()).filter(|&place| cells.iter().any(|&tokens| step(tokens) == place)).map(
            |place| {
                let first = edges[place];
                let last = edges.get(place + 1).map_or(most, |&next| next - 1);
                let range = if first >= last {
                    count(first)
                } else {
                    format!("{} – {}", count(first), count(last))
                };
                (HEAT[place], range)
            },
        );
        let map = plot::heat_map("tokens by layer and expert", &calibration.coverage, step)?;
        section += &figure("wide", &format!("{map}{}", legend(key)));
    }
    Ok(section + "</section>\n")
}

/// Where the steps of the heat map begin: nothing, too little, then in equal ratios up to `most`.
fn edges(most: u64) -> Vec<u64> {
    let steps = HEAT.len() - 2;
    let ratio = (most as f64 / STARVED_TOKENS as f64).max(1.0);
    let mut edges = vec![0, 1];
    for step in 0..steps {
        let edge = (STARVED_TOKENS as f64 * ratio.powf(step as f64 / steps as f64)).ceil() as u64;
        if edges.last().is_some_and(|&last| edge > last) {
            edges.push(edge);
        }
    }
    edges
}

fn tensors(report: &Report) -> String {
    if report.tensors.is_empty() {
        return String::new();
    }
    let mut tensors: Vec<&Tensor> = report.tensors.iter().collect();
    let mut note = String::new();
    if tensors.len() > MAX_ROWS {
        let noise = |tensor: &Tensor| tensor.sqnr_db.unwrap_or(f64::INFINITY);
        tensors.sort_by(|a, b| noise(a).total_cmp(&noise(b)));
        tensors.truncate(MAX_ROWS);
        note = format!(
            "<p>The {} noisiest of {}; all of them are in <code>report.json</code>.</p>\n",
            count(MAX_ROWS as u64),
            count(report.tensors.len() as u64)
        );
    }
    let blocks = report.tensors.iter().any(|tensor| tensor.worst_block.is_some());
    let mut head = vec!["Tensor", "Format", "Algorithm", "SQNR, dB", "MSE", "MSE of max", "Largest error"];
    if blocks {
        head.push("Worst block");
    }
    let rows = tensors.into_iter().map(|tensor| {
        let mut row = vec![
            format!("<code>{}</code>", html(&tensor.name)),
            html(&tensor.format),
            html(&tensor.algorithm),
            if tensor.mse == 0.0 { "exact".to_owned() } else { optional(tensor.sqnr_db, |db| fixed(db, 2)) },
            figures(tensor.mse),
            optional(tensor.max_rule_mse, figures),
            figures(tensor.max_error),
        ];
        if blocks {
            row.push(tensor.worst_block.as_ref().map_or_else(
                || NONE.to_owned(),
                |worst| {
                    let expert = worst.expert.map_or_else(String::new, |expert| format!("expert {expert}, "));
                    let place = format!("{expert}row {}, block {}", worst.row, worst.block);
                    format!("{} <small>{place}</small>", percent(worst.relative_error))
                },
            ));
        }
        row
    });
    format!(
        "<section>\n<h2>Tensors</h2>\n{note}<details{}><summary>{}</summary>\n{}</details>\n</section>\n",
        if report.tensors.len() <= 64 { " open" } else { "" },
        plural(report.tensors.len() as u64, "tensor", "tensors"),
        table(&head, 3, rows)
    )
}

fn run_facts(report: &Report) -> String {
    let run = &report.run;
    let or = |text: &Option<String>, other: &str| text.as_deref().map_or_else(|| other.to_owned(), html);
    let (known, none) = (|text| or(text, "unknown"), |text| or(text, NONE));
    let continued = if run.continued { ", the last call alone" } else { "" };
    let facts = [
        ("Source", html(&run.model)),
        ("Base model", known(&run.base_model)),
        ("Licence of the source", known(&run.source_license)),
        ("Layout", format!("{} → {}", html(&run.source_layout), html(&run.layout))),
        ("Recipe", none(&run.recipe)),
        ("Algorithm", none(&run.algorithm)),
        ("Activations", html(&run.activations)),
        ("KV cache", html(&run.kv_cache)),
        ("A global scale per", none(&run.scales_per)),
        (
            "Time",
            format!(
                "{} on {}{continued}",
                duration(run.seconds),
                plural(run.threads as u64, "thread", "threads")
            ),
        ),
        ("Peak memory", run.peak_memory_bytes.map_or_else(|| "unknown".to_owned(), bytes)),
    ];
    let facts: String =
        facts.iter().map(|(name, value)| format!("<dt>{name}</dt><dd>{value}</dd>\n")).collect();
    format!(
        "<section>\n<h2>The run</h2>\n<pre>{}</pre>\n<dl>\n{facts}</dl>\n</section>\n",
        html(&run.command)
    )
}

/// A table whose cells are HTML; the first `left` columns hold words, the others numbers.
fn table(head: &[&str], left: usize, rows: impl Iterator<Item = Vec<String>>) -> String {
    let class = |column: usize| if column < left { " class=\"l\"" } else { "" };
    let mut table = String::from("<div class=\"scroll\"><table>\n<thead><tr>");
    for (column, name) in head.iter().enumerate() {
        table += &format!("<th{}>{}</th>", class(column), html(name));
    }
    table += "</tr></thead>\n<tbody>\n";
    for row in rows {
        table += "<tr>";
        for (column, cell) in row.iter().enumerate() {
            table += &format!("<td{}>{cell}</td>", class(column));
        }
        table += "</tr>\n";
    }
    table + "</tbody>\n</table></div>\n"
}

fn figure(class: &str, content: &str) -> String {
    format!("<figure class=\"{class}\">{content}</figure>\n")
}

/// Swatches and names; plots carry no legend of their own, so that long names wrap.
fn legend(entries: impl IntoIterator<Item = (RGBColor, String)>) -> String {
    let entries: String = entries
        .into_iter()
        .map(|(color, name)| {
            // A drawn square: the style sheet gives it the same colour as the plot in either theme.
            let RGBColor(r, g, b) = color;
            format!(
                "<li><svg viewBox=\"0 0 1 1\" aria-hidden=\"true\"><rect width=\"1\" height=\"1\" fill=\"#{r:02X}{g:02X}{b:02X}\"/></svg>{}</li>",
                html(&name)
            )
        })
        .collect();
    format!("<ul class=\"legend\">{entries}</ul>")
}

/// Light by default; the plots' colours (`plot.rs`) are overridden where the dark theme needs others.
const STYLE: &str = include_str!("page.css");
