//! The report of a quantization run: plain facts in, a JSON file, an HTML page and a model card out.
//!
//! The page stands alone: its plots are inline SVG, it runs no script and asks the network for nothing. All names are taken
//! to be hostile. Numbers that are not finite become `null` in the JSON and a dash elsewhere, and are left out of plots.

mod model_card;
mod page;
mod plot;
mod text;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use model_card::model_card;

/// Experts that saw fewer calibration tokens than this are called starved.
pub const STARVED_TOKENS: u64 = 16;

/// Everything that is known of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was done.
    pub run: Run,
    /// The calibration data, if any were used.
    pub calibration: Option<Calibration>,
    /// Where the bytes are.
    pub sizes: Vec<Part>,
    /// What became of each matrix or stack of matrices.
    pub tensors: Vec<Tensor>,
    /// What it cost, one entry per data set.
    pub quality: Vec<Quality>,
    /// What these figures include and leave out of what the model is made for, as a clause; none if that is weights alone.
    pub quality_note: Option<String>,
    /// Other algorithms on the same data, for comparison.
    pub algorithms: Vec<AlgorithmResult>,
}

/// What was done, to what, and what it took.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// The source as it was typed: a folder or a hub name.
    pub model: String,
    /// Its layout, for example `mxfp4` or `bf16`.
    pub source_layout: String,
    /// Its licence, as its model card or its configuration names it.
    pub source_license: Option<String>,
    /// The name on the hub of the source, or of the model that the source was made from.
    pub base_model: Option<String>,
    /// The layout that was written, for example `modelopt`.
    pub layout: String,
    /// What was quantized: `experts`, `linear` or `all`; none for a layout that says so itself.
    pub recipe: Option<String>,
    /// How scales and codes were chosen; none for a layout of which all are made alike.
    pub algorithm: Option<String>,
    /// Why `auto` took that algorithm.
    pub reason: Option<String>,
    /// What activations are rounded to: `none` or `nvfp4`.
    pub activations: String,
    /// The format that the KV cache is meant for.
    pub kv_cache: String,
    /// Whether a global scale belongs to a `stack` of experts or to each `expert`; none for a layout without.
    pub scales_per: Option<String>,
    /// The command line.
    pub command: String,
    /// The version of nibble.
    pub version: String,
    /// Wall time of the last call.
    pub seconds: f64,
    /// Whether that call continued the work of an interrupted one.
    pub continued: bool,
    /// Most memory ever resident at once.
    pub peak_memory_bytes: Option<u64>,
    /// Threads used.
    pub threads: usize,
    /// Bytes of all tensors written.
    pub bytes: u64,
    /// Bytes of all tensors read.
    pub source_bytes: u64,
    /// Bits written per parameter, over all tensors.
    pub bits_per_weight: f64,
}

/// The data that statistics were collected on.
#[derive(Debug, Clone, Serialize)]
pub struct Calibration {
    /// Each file's share.
    pub files: Vec<CalibrationFile>,
    /// Tokens of all files.
    pub tokens: u64,
    /// Tokens of the longest window.
    pub window: usize,
    /// Whether every token was routed through every expert.
    pub all_experts: bool,
    /// The seed of whatever was drawn.
    pub seed: u64,
    /// Tokens that the router sent to each expert, `[layer][expert]`.
    pub coverage: Vec<Vec<u64>>,
    /// Experts with fewer than [`STARVED_TOKENS`] tokens.
    pub starved: usize,
}

/// One calibration file's share.
#[derive(Debug, Clone, Serialize)]
pub struct CalibrationFile {
    /// Its name, or that of the built-in set.
    pub name: String,
    /// Windows taken.
    pub windows: usize,
    /// Tokens in them.
    pub tokens: u64,
}

/// A part of the model and its bytes.
#[derive(Debug, Clone, Serialize)]
pub struct Part {
    /// For example `experts` or `attention`.
    pub name: String,
    /// Parameters.
    pub parameters: u64,
    /// Bytes in the source.
    pub source_bytes: u64,
    /// Bytes written.
    pub bytes: u64,
}

/// What became of a matrix, or of a stack of experts' matrices.
#[derive(Debug, Clone, Serialize)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its layer; none for the embedding and the output layer.
    pub layer: Option<usize>,
    /// Its role within the layer, for example `gate_up`; the plots have a line for each.
    pub kind: String,
    /// The format that it has now.
    pub format: String,
    /// What was done to it.
    pub algorithm: String,
    /// Mean squared difference from the source's values; NaN where it was not measured, as of what an earlier, interrupted call
    /// wrote.
    pub mse: f64,
    /// Signal to quantization noise, 10 log10(Σ w² / Σ (w − w')²); none where no value changed.
    pub sqnr_db: Option<f64>,
    /// The largest difference; NaN as above.
    pub max_error: f64,
    /// The mean squared difference that the `max` rule would have had.
    pub max_rule_mse: Option<f64>,
    /// The block with the largest relative error.
    pub worst_block: Option<WorstBlock>,
}

/// The block of a tensor that lost most.
#[derive(Debug, Clone, Serialize)]
pub struct WorstBlock {
    /// Its expert, in a stack.
    pub expert: Option<usize>,
    /// Its row.
    pub row: usize,
    /// Its place in the row, counted in blocks.
    pub block: usize,
    /// RMS of the difference over RMS of the source's values.
    pub relative_error: f64,
}

/// The quantized model against its source on one data set, of which calibration saw other parts if any. Means are over tokens, in nats.
#[derive(Debug, Clone, Serialize)]
pub struct Quality {
    /// The data's name.
    pub data: String,
    /// Tokens scored.
    pub tokens: u64,
    /// The source's negative log-likelihood.
    pub nll_source: f64,
    /// The quantized model's.
    pub nll: f64,
    /// Mean of Σ p_source (ln p_source − ln p).
    pub kl_mean: f64,
    /// Its 99th percentile.
    pub kl_p99: f64,
    /// Share of positions whose most probable token agrees.
    pub top1_agreement: f64,
}

/// Another algorithm, measured on the first data set of [`Report::quality`].
#[derive(Debug, Clone, Serialize)]
pub struct AlgorithmResult {
    /// Its name.
    pub algorithm: String,
    /// Mean divergence from the source.
    pub kl_mean: f64,
    /// Mean negative log-likelihood.
    pub nll: f64,
}

/// Why a report could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The data cannot be put as JSON.
    #[error("report.json: {0}")]
    Json(serde_json::Error),
    /// A plot cannot be drawn.
    #[error("index.html: the plot of {plot} cannot be drawn: {message}")]
    Plot {
        /// What it shows.
        plot: String,
        /// Why.
        message: String,
    },
}

/// Writes `report.json`, `index.html` and `README.md`, the model card, into `dir`, which is made if need be. Files of these
/// names are replaced, each only once its successor is complete.
pub fn write(report: &Report, dir: &Path) -> Result<(), Error> {
    let json = serde_json::to_string_pretty(report).map_err(Error::Json)? + "\n";
    let page = page::page(report)?;
    let card = model_card(report);
    std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_owned(), source })?;
    for (name, content) in [("report.json", json), ("index.html", page), ("README.md", card)] {
        let path = dir.join(name);
        replace(&path, content.as_bytes()).map_err(|source| Error::Io { path, source })?;
    }
    Ok(())
}

/// A file in `dir` that [`write`] would replace, and that is not of an earlier report: one of its names without `report.json`.
pub fn in_the_way(dir: &Path) -> Option<PathBuf> {
    let there = |path: &PathBuf| path.symlink_metadata().is_ok();
    if there(&dir.join("report.json")) {
        return None;
    }
    ["index.html", "README.md"].map(|name| dir.join(name)).into_iter().find(there)
}

fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let written = File::create(&partial)
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&partial, path));
    if written.is_err() {
        // The first error is the one to tell; what cannot be removed either stays.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

impl Report {
    /// Says of the data that quality is measured on that calibration, if there was one, had other parts of them.
    fn unseen(&self) -> &'static str {
        if self.calibration.is_some() { ", on text that calibration did not see" } else { "" }
    }

    /// The distinct formats of fewer than sixteen bits, as people write them: `NVFP4`.
    fn formats(&self) -> Vec<String> {
        let formats: BTreeSet<String> =
            self.tensors.iter().map(|tensor| tensor.format.to_uppercase()).collect();
        formats.into_iter().filter(|format| !["BF16", "F16", "F32"].contains(&format.as_str())).collect()
    }
}
