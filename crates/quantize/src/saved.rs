//! Finished layers in the scratch folder: calibration writes them, the view reads them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use checkpoint::{Config, MatrixId, MatrixKind, Unfinished, VectorId, VectorKind};
use numerics::nvfp4::{self, BLOCK};

use crate::rounded::Rounded;

/// What calibration found out about one layer. Magnitudes are those of the source's forward pass; of inputs whose columns are
/// scaled, those of the scaled ones.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerFacts {
    /// Largest magnitudes of the inputs of: query, key and value; output; gate and up; down.
    pub input_amax: [f32; 4],
    /// Largest magnitude of the rotated keys.
    pub key_amax: f32,
    /// Largest magnitude of the values.
    pub value_amax: f32,
    /// Tokens routed to each expert.
    pub coverage: Vec<u64>,
}

impl LayerFacts {
    /// The static scale of the input of one of the layer's quantized matrices.
    pub(crate) fn input_scale(&self, kind: MatrixKind) -> f32 {
        input_scale(match kind {
            MatrixKind::Query | MatrixKind::Key | MatrixKind::Value => self.input_amax[0],
            MatrixKind::Output => self.input_amax[1],
            MatrixKind::GateUp => self.input_amax[2],
            MatrixKind::Down => self.input_amax[3],
            MatrixKind::Router | MatrixKind::Embedding | MatrixKind::Unembedding => 0.0,
        })
    }
}

/// The static scale of inputs of this largest magnitude. Where calibration saw none or only zeros Model Optimizer takes 6.
pub(crate) fn input_scale(amax: f32) -> f32 {
    nvfp4::global_scale(if amax > 0.0 { amax } else { 6.0 })
}

/// What is left of a layer besides its record. That it exists says that the layer is finished.
#[derive(Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Done {
    pub(crate) facts: LayerFacts,
    /// The input norm, if the algorithm changed it.
    pub(crate) norm: Option<Vec<f32>>,
    /// The largest magnitudes behind the global scales of query, key and value, and of output, if the algorithm chose them.
    pub(crate) amax: (Option<f32>, Option<f32>),
}

impl Done {
    pub(crate) fn exists(folder: &Path, layer: usize) -> bool {
        done_file(folder, layer).exists()
    }

    fn read(folder: &Path, layer: usize) -> Result<Done, checkpoint::Error> {
        let path = done_file(folder, layer);
        let text = std::fs::read(&path).map_err(|source| io(&path, source))?;
        serde_json::from_slice(&text).map_err(|error| io(&path, error.into()))
    }

    /// Writes it so that it lasts, as all else that the next layer is made from must have been made to before.
    pub(crate) fn write(&self, folder: &Path, layer: usize) -> Result<(), checkpoint::Error> {
        let path = done_file(folder, layer);
        let partial = path.with_extension("partial");
        let text = serde_json::to_vec(self).map_err(|error| io(&path, error.into()))?;
        File::create(&partial)
            .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
            .map_err(|source| io(&partial, source))?;
        std::fs::rename(&partial, &path).map_err(|source| io(&path, source))?;
        checkpoint::sync_folder(folder)
    }
}

/// Quantized layers and facts in the scratch folder.
pub(crate) struct Calibrated {
    /// Keeps others from the folder.
    _claim: Unfinished,
    config: Config,
    /// The matrices that were calibrated.
    ids: BTreeSet<MatrixId>,
    files: Vec<(PathBuf, File)>,
    done: Vec<Done>,
    /// The largest magnitude of the output layer's input.
    pub(crate) final_amax: f32,
    /// Whether layers of an earlier call were taken.
    pub(crate) continued: bool,
}

/// The form of a scratch folder's files. One of another form is another command's.
pub(crate) const FORM: u32 = 1;

impl Calibrated {
    /// What all layers of a calibration of `ids` have left in their folder.
    pub(crate) fn open(
        claim: Unfinished,
        config: &Config,
        ids: BTreeSet<MatrixId>,
        final_amax: f32,
        continued: bool,
    ) -> Result<Calibrated, checkpoint::Error> {
        let folder = claim.directory();
        let (mut files, mut done) = (Vec::new(), Vec::new());
        for layer in 0..config.layer_kinds.len() {
            let path = layer_file(folder, layer);
            let file = File::open(&path).map_err(|source| io(&path, source))?;
            files.push((path, file));
            done.push(Done::read(folder, layer)?);
        }
        Ok(Calibrated { _claim: claim, config: config.clone(), ids, files, done, final_amax, continued })
    }

    /// What was found out about each layer.
    pub(crate) fn facts(&self) -> impl ExactSizeIterator<Item = &LayerFacts> {
        self.done.iter().map(|done| &done.facts)
    }

    /// The largest magnitude behind the global scale of a matrix whose weights or whose range the calibration changed.
    pub(crate) fn amax(&self, id: MatrixId) -> Option<f32> {
        let (projections, output) = self.done.get(id.layer)?.amax;
        match id.kind {
            MatrixKind::Query | MatrixKind::Key | MatrixKind::Value => projections,
            MatrixKind::Output => output,
            _ => None,
        }
    }

    /// A matrix that was calibrated.
    pub(crate) fn rounded(&self, id: MatrixId, expert: usize) -> Result<Rounded, checkpoint::Error> {
        let (at, rows, cols) = self.place(id, expert).expect("a matrix that was calibrated");
        let codes = self.read(id.layer, at, rows * cols / 2)?;
        let scales = self.read(id.layer, at + (rows * cols / 2) as u64, rows * cols / BLOCK)?;
        Ok(Rounded { codes, scales })
    }

    /// A bias or a norm that calibration changed.
    pub(crate) fn vector(&self, id: VectorId) -> Result<Option<Vec<f32>>, checkpoint::Error> {
        if id.kind == VectorKind::InputNorm {
            return Ok(self.done[id.layer].norm.clone());
        }
        let Some(kind) = MatrixKind::LAYER.into_iter().find(|&kind| bias_of(kind) == id.kind) else {
            return Ok(None);
        };
        let (count, ..) = kind.shape(&self.config);
        let mut bias = Vec::new();
        for expert in 0..count {
            let Some((at, rows, cols)) = self.place(kind.at(id.layer), expert) else { return Ok(None) };
            let bytes = self.read(id.layer, at + (rows * cols / 2 + rows * cols / BLOCK) as u64, rows * 4)?;
            bias.extend(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)));
        }
        Ok(Some(bias))
    }

    fn place(&self, id: MatrixId, expert: usize) -> Option<(u64, usize, usize)> {
        place(&self.config, |id| self.ids.contains(&id), id, expert)
    }

    fn read(&self, layer: usize, at: u64, len: usize) -> Result<Vec<u8>, checkpoint::Error> {
        let (path, file) = &self.files[layer];
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).map_err(|source| io(path, source))?;
        Ok(bytes)
    }
}

/// Where in its layer's record a matrix begins, and its shape, if it is one of those that are `calibrated`: all experts of a kind lie
/// one after the other.
pub(crate) fn place(
    config: &Config,
    calibrated: impl Fn(MatrixId) -> bool,
    id: MatrixId,
    expert: usize,
) -> Option<(u64, usize, usize)> {
    let mut at = 0;
    for kind in MatrixKind::LAYER.into_iter().filter(|kind| calibrated(kind.at(id.layer))) {
        let (count, rows, cols) = kind.shape(config);
        let record = record_bytes(rows, cols);
        if kind == id.kind {
            return Some(((at + expert * record) as u64, rows, cols));
        }
        at += count * record;
    }
    None
}

/// The rounded matrices of a layer.
pub(crate) struct Record {
    path: PathBuf,
    file: File,
}

impl Record {
    pub(crate) fn create(folder: &Path, layer: usize) -> Result<Record, checkpoint::Error> {
        let path = layer_file(folder, layer);
        let file = File::create(&path).map_err(|source| io(&path, source))?;
        Ok(Record { path, file })
    }

    /// Writes a matrix and the bias that belongs to it now to their place.
    pub(crate) fn matrix(&self, at: u64, rounded: &Rounded, bias: &[f32]) -> Result<(), checkpoint::Error> {
        let bias = bias.iter().flat_map(|b| b.to_le_bytes());
        let bytes: Vec<u8> = rounded.codes.iter().chain(&rounded.scales).copied().chain(bias).collect();
        self.file.write_all_at(&bytes, at).map_err(|source| io(&self.path, source))
    }

    pub(crate) fn finish(&self) -> Result<(), checkpoint::Error> {
        self.file.sync_all().map_err(|source| io(&self.path, source))
    }
}

fn layer_file(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("layer-{layer}.nvfp4"))
}

fn done_file(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("layer-{layer}.json"))
}

/// Codes, scales and bias of a matrix.
fn record_bytes(rows: usize, cols: usize) -> usize {
    rows * cols / 2 + rows * cols / BLOCK + rows * 4
}

pub(crate) fn io(path: &Path, source: std::io::Error) -> checkpoint::Error {
    checkpoint::Error::Io { path: path.to_owned(), source }
}

/// The bias that a matrix's product is added to.
pub(crate) fn bias_of(kind: MatrixKind) -> VectorKind {
    match kind {
        MatrixKind::Query => VectorKind::QueryBias,
        MatrixKind::Key => VectorKind::KeyBias,
        MatrixKind::Value => VectorKind::ValueBias,
        MatrixKind::Output => VectorKind::OutputBias,
        MatrixKind::Router | MatrixKind::Embedding | MatrixKind::Unembedding => VectorKind::RouterBias,
        MatrixKind::GateUp => VectorKind::GateUpBias,
        MatrixKind::Down => VectorKind::DownBias,
    }
}
