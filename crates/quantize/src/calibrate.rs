//! Calibration on the real forward pass, one layer at a time: each is fed by the layers already quantized before it, its
//! matrices are quantized from what they see, and only then do the tokens go on.
//!
//! Two residual streams run side by side, that of the source and that of the quantized model; they lie in files of a scratch
//! folder, as do the finished layers, so that memory holds one expert at a time and an interrupted run continues.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use checkpoint::{Config, LayerKind, MatrixId, MatrixKind, VectorId, VectorKind, Weights};
use cpu::{Pool, Rows, Update, products};
use gptoss::{Rotary, rotate, swiglu, top_experts};
use half::bf16;
use numerics::nvfp4::{self, BLOCK};

use crate::factor::Factor;
use crate::gptq::{Rounded, Scales, refine, round};
use crate::moments::Moments;
use crate::stream::Stream;
use crate::{Error, Method};

/// What to calibrate on, and where unfinished work lies.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// Token ids, each window a sequence of its own.
    pub windows: Vec<Vec<u32>>,
    /// Every token goes through every expert for the statistics; the model's outputs are unchanged.
    pub all_experts: bool,
    /// A folder for activations and finished layers. Work that is found there continues if it has the same fingerprint.
    pub scratch: PathBuf,
    /// Of everything that the result depends on.
    pub fingerprint: String,
}

/// What calibration found out about one layer.
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

/// Fewer tokens than this say too little about an expert: it falls back to `mse`.
pub const FEWEST_TOKENS: usize = 16;

/// Damping of the second moments, as a share of their mean diagonal.
const DAMPING: f32 = 0.01;

/// How much of the difference between the source's inputs and the quantized model's is made up for by the weights (GPTAQ, Li
/// et al., 2025, takes all): measured best.
const ASYMMETRY: f32 = 0.5;

/// Passes of the refinement.
const PASSES: usize = 4;

/// Tokens whose activations are in memory at a time.
const CHUNK: usize = 1024;

/// Quantized layers and facts in the scratch folder.
pub(crate) struct Calibrated {
    config: Config,
    kinds: Vec<MatrixKind>,
    files: Vec<(PathBuf, File)>,
    pub(crate) facts: Vec<LayerFacts>,
}

impl Calibrated {
    /// A matrix that was calibrated.
    pub(crate) fn rounded(&self, id: MatrixId, expert: usize) -> Result<Rounded, checkpoint::Error> {
        let (at, rows, cols) = self.place(id, expert).expect("a matrix that was calibrated");
        let codes = self.read(id.layer, at, rows * cols / 2)?;
        let scales = self.read(id.layer, at + (rows * cols / 2) as u64, rows * cols / BLOCK)?;
        Ok(Rounded { codes, scales })
    }

    /// The corrected bias, if calibration made one.
    pub(crate) fn bias(&self, id: VectorId) -> Result<Option<Vec<bf16>>, checkpoint::Error> {
        let Some(kind) = MatrixKind::LAYER.into_iter().find(|&kind| bias_of(kind) == id.kind) else {
            return Ok(None);
        };
        let (count, ..) = kind.shape(&self.config);
        let mut bias = Vec::new();
        for expert in 0..count {
            let Some((at, rows, cols)) = self.place(kind.at(id.layer), expert) else { return Ok(None) };
            let bytes = self.read(id.layer, at + (rows * cols / 2 + rows * cols / BLOCK) as u64, rows * 2)?;
            bias.extend(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])));
        }
        Ok(Some(bias))
    }

    /// Where the record of a matrix begins, and its shape.
    fn place(&self, id: MatrixId, expert: usize) -> Option<(u64, usize, usize)> {
        let mut at = 0;
        for &kind in &self.kinds {
            let (count, rows, cols) = kind.shape(&self.config);
            let record = record_bytes(rows, cols);
            if kind == id.kind {
                return Some(((at + expert * record) as u64, rows, cols));
            }
            at += count * record;
        }
        None
    }

    fn read(&self, layer: usize, at: u64, len: usize) -> Result<Vec<u8>, checkpoint::Error> {
        let (path, file) = &self.files[layer];
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).map_err(|source| io(path, source))?;
        Ok(bytes)
    }
}

/// What a calibration needs to know about the weights.
pub(crate) struct Job<'a> {
    /// The weights before quantization.
    pub(crate) source: &'a dyn Weights,
    /// The weights that need no calibration, as they will be.
    pub(crate) quantized: &'a dyn Weights,
    /// Matrices to calibrate, and how.
    pub(crate) methods: BTreeMap<MatrixId, Method>,
    /// The largest magnitude behind the global scale of a matrix.
    pub(crate) amax: &'a dyn Fn(MatrixId, usize) -> f32,
    pub(crate) pool: &'a Pool,
    pub(crate) calibration: &'a Calibration,
}

/// Runs the calibration, or what is left of it. `progress` is called with steps done and their number.
pub(crate) fn calibrate(
    job: &Job<'_>,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Calibrated, Error> {
    let config = job.source.config();
    let folder = &job.calibration.scratch;
    let layers = config.layer_kinds.len();
    let kinds: Vec<MatrixKind> =
        MatrixKind::LAYER.into_iter().filter(|kind| job.methods.contains_key(&kind.at(0))).collect();
    if job.calibration.windows.iter().all(Vec::is_empty) {
        return Err(Error::NoTokens);
    }
    for size in [config.hidden_size, config.intermediate_size, config.head_dim] {
        if !size.is_multiple_of(BLOCK) {
            return Err(Error::Shape { found: size });
        }
    }
    let done = prepare(folder, &job.calibration.fingerprint, layers)?;
    let per_layer = config.experts + 2;
    let mut step = |layer: usize, part: usize| {
        let flow = progress(layer * per_layer + part, layers * per_layer);
        if flow.is_break() { Err(Error::Interrupted) } else { Ok(()) }
    };
    if done == 0 {
        embed(job)?;
    }
    for layer in done..layers {
        step(layer, 0)?;
        let pass = LayerPass { job, config, layer, kinds: &kinds };
        pass.run(&mut |part| step(layer, part))?;
    }
    let _ = progress(layers * per_layer, layers * per_layer);
    let mut calibrated = Calibrated { config: config.clone(), kinds, files: Vec::new(), facts: Vec::new() };
    for layer in 0..layers {
        let path = layer_file(folder, layer);
        let file = File::open(&path).map_err(|source| io(&path, source))?;
        calibrated.files.push((path, file));
        let path = facts_file(folder, layer);
        let text = std::fs::read(&path).map_err(|source| io(&path, source))?;
        let facts = serde_json::from_slice(&text).map_err(|error| io(&path, error.into()))?;
        calibrated.facts.push(facts);
    }
    Ok(calibrated)
}

/// Makes the scratch folder, or finds one of the same fingerprint; returns the layers done.
fn prepare(folder: &Path, fingerprint: &str, layers: usize) -> Result<usize, Error> {
    let state = folder.join("fingerprint");
    if std::fs::read_to_string(&state).is_ok_and(|found| found == fingerprint) {
        return Ok((0..layers).take_while(|&layer| facts_file(folder, layer).exists()).count());
    }
    if folder.exists() {
        std::fs::remove_dir_all(folder).map_err(|source| io(folder, source))?;
    }
    std::fs::create_dir_all(folder).map_err(|source| io(folder, source))?;
    std::fs::write(&state, fingerprint).map_err(|source| io(&state, source))?;
    Ok(0)
}

/// The tokens' embeddings as the input of the first layer, in both streams.
fn embed(job: &Job<'_>) -> Result<(), Error> {
    let width = job.source.config().hidden_size;
    for (weights, name) in [(job.source, SOURCE), (job.quantized, QUANTIZED)] {
        let stream = Stream::create(&stream_file(&job.calibration.scratch, name, 0), width)?;
        let embedding = weights.matrix(MatrixKind::Embedding.at(0), 0)?;
        let mut first = 0;
        for window in &job.calibration.windows {
            let mut rows = vec![0.0; window.len() * width];
            for (row, &token) in rows.chunks_exact_mut(width).zip(window) {
                if token as usize >= embedding.rows {
                    return Err(Error::Token { found: token, vocabulary: embedding.rows });
                }
                embedding.row(token as usize, row);
            }
            stream.write(first, &rows)?;
            first += window.len();
        }
    }
    Ok(())
}

const SOURCE: &str = "source";
const QUANTIZED: &str = "quantized";

fn stream_file(folder: &Path, name: &str, layer: usize) -> PathBuf {
    folder.join(format!("{name}-{layer}.f32"))
}

fn layer_file(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("layer-{layer}.nvfp4"))
}

fn facts_file(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("layer-{layer}.json"))
}

fn record_bytes(rows: usize, cols: usize) -> usize {
    rows * cols / 2 + rows * cols / BLOCK + rows * 2
}

fn io(path: &Path, source: std::io::Error) -> checkpoint::Error {
    checkpoint::Error::Io { path: path.to_owned(), source }
}

/// The bias that a matrix's product is added to.
fn bias_of(kind: MatrixKind) -> VectorKind {
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

/// A matrix with its bias, in f32.
struct Linear {
    weights: Vec<f32>,
    bias: Vec<f32>,
    cols: usize,
}

impl Linear {
    /// `x Wᵀ + b` for rows of `x`.
    fn apply(&self, pool: &Pool, x: &[f32]) -> Vec<f32> {
        let rows = self.bias.len();
        let mut out: Vec<f32> =
            std::iter::repeat_n(&self.bias, x.len() / self.cols).flatten().copied().collect();
        products(
            pool,
            Rows::new(x, self.cols),
            Rows::new(&self.weights, self.cols),
            &mut out,
            rows,
            Update::Add,
        );
        out
    }
}

/// The two residual streams between two places of the model.
struct Streams {
    source: Stream,
    quantized: Stream,
}

/// One layer's calibration.
struct LayerPass<'a> {
    job: &'a Job<'a>,
    config: &'a Config,
    layer: usize,
    kinds: &'a [MatrixKind],
}

impl LayerPass<'_> {
    fn run(&self, step: &mut dyn FnMut(usize) -> Result<(), Error>) -> Result<(), Error> {
        let folder = &self.job.calibration.scratch;
        let width = self.config.hidden_size;
        let mut facts = LayerFacts::default();
        let mut record = Record::create(folder, self.layer)?;
        let input = Streams {
            source: Stream::open(&stream_file(folder, SOURCE, self.layer), width)?,
            quantized: Stream::open(&stream_file(folder, QUANTIZED, self.layer), width)?,
        };
        let middle = self.streams("middle", width)?;
        self.attention(&input, &middle, &mut facts, &mut record)?;
        step(1)?;
        let output = Streams {
            source: Stream::create(&stream_file(folder, SOURCE, self.layer + 1), width)?,
            quantized: Stream::create(&stream_file(folder, QUANTIZED, self.layer + 1), width)?,
        };
        self.moe(&middle, &output, &mut facts, &mut record, step)?;
        record.finish()?;
        let path = facts_file(folder, self.layer);
        let text = serde_json::to_vec(&facts).expect("plain numbers are JSON");
        let partial = path.with_extension("partial");
        std::fs::write(&partial, text).map_err(|source| io(&partial, source))?;
        std::fs::rename(&partial, &path).map_err(|source| io(&path, source))?;
        for name in [SOURCE, QUANTIZED] {
            let old = stream_file(folder, name, self.layer);
            std::fs::remove_file(&old).map_err(|source| io(&old, source))?;
        }
        Ok(())
    }

    /// Scratch streams that the next layer overwrites.
    fn streams(&self, name: &str, width: usize) -> Result<Streams, Error> {
        let folder = &self.job.calibration.scratch;
        Ok(Streams {
            source: Stream::create(&folder.join(format!("{name}-source.f32")), width)?,
            quantized: Stream::create(&folder.join(format!("{name}-quantized.f32")), width)?,
        })
    }

    fn attention(
        &self,
        input: &Streams,
        middle: &Streams,
        facts: &mut LayerFacts,
        record: &mut Record,
    ) -> Result<(), Error> {
        let pool = self.job.pool;
        let width = self.config.hidden_size;
        let source_norm = self.norm(self.job.source, VectorKind::InputNorm)?;
        let norm = self.norm(self.job.quantized, VectorKind::InputNorm)?;
        let projections = [MatrixKind::Query, MatrixKind::Key, MatrixKind::Value];
        let source: Vec<Linear> = projections
            .iter()
            .map(|&kind| self.linear(self.job.source, kind, 0))
            .collect::<Result<_, _>>()?;
        let mut moments =
            projections.iter().any(|kind| self.kinds.contains(kind)).then(|| Moments::new(width));
        for window in self.windows() {
            let x = self.normed(&input.quantized.read(window.start, window.len())?, &norm);
            facts.input_amax[0] = facts.input_amax[0].max(nvfp4::amax(&x));
            if let Some(moments) = &mut moments {
                let s = self.normed(&input.source.read(window.start, window.len())?, &source_norm);
                moments.add(pool, &x, &s, &vec![1.0; window.len()]);
            }
        }
        let quantized = self.quantize(&projections, 0, &source, moments, record)?;

        let context_width = self.config.query_heads * self.config.head_dim;
        let context = self.streams("context", context_width)?;
        let mut moments = self.kinds.contains(&MatrixKind::Output).then(|| Moments::new(context_width));
        for window in self.windows() {
            let x = self.normed(&input.quantized.read(window.start, window.len())?, &norm);
            let s = self.normed(&input.source.read(window.start, window.len())?, &source_norm);
            let x = self.attend(&quantized, &x, self.job.quantized, Some(facts))?;
            let s = self.attend(&source, &s, self.job.source, None)?;
            facts.input_amax[1] = facts.input_amax[1].max(nvfp4::amax(&x));
            if let Some(moments) = &mut moments {
                moments.add(pool, &x, &s, &vec![1.0; window.len()]);
            }
            context.quantized.write(window.start, &x)?;
            context.source.write(window.start, &s)?;
        }
        let source = [self.linear(self.job.source, MatrixKind::Output, 0)?];
        let quantized = self.quantize(&[MatrixKind::Output], 0, &source, moments, record)?;
        for window in self.windows() {
            for (linear, from, context, to) in [
                (&quantized[0], &input.quantized, &context.quantized, &middle.quantized),
                (&source[0], &input.source, &context.source, &middle.source),
            ] {
                let mut x = from.read(window.start, window.len())?;
                let a = linear.apply(pool, &context.read(window.start, window.len())?);
                x.iter_mut().zip(&a).for_each(|(x, a)| *x += a);
                to.write(window.start, &x)?;
            }
        }
        Ok(())
    }

    fn moe(
        &self,
        middle: &Streams,
        output: &Streams,
        facts: &mut LayerFacts,
        record: &mut Record,
        step: &mut dyn FnMut(usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (config, pool) = (self.config, self.job.pool);
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let source_norm = self.norm(self.job.source, VectorKind::PostAttentionNorm)?;
        let norm = self.norm(self.job.quantized, VectorKind::PostAttentionNorm)?;
        // Per stream and expert: its tokens and the weights of its answers.
        let empty = || vec![(Vec::new(), Vec::new()); config.experts];
        let (mut routes, mut source_routes) = (empty(), empty());
        let mut others = vec![Vec::new(); config.experts];
        let routers = [
            self.linear(self.job.quantized, MatrixKind::Router, 0)?,
            self.linear(self.job.source, MatrixKind::Router, 0)?,
        ];
        for window in self.windows() {
            for (i, (from, to, norm, routes)) in [
                (&middle.quantized, &output.quantized, &norm, &mut routes),
                (&middle.source, &output.source, &source_norm, &mut source_routes),
            ]
            .into_iter()
            .enumerate()
            {
                let x = from.read(window.start, window.len())?;
                to.write(window.start, &x)?;
                let h = self.normed(&x, norm);
                if i == 0 {
                    facts.input_amax[2] = facts.input_amax[2].max(nvfp4::amax(&h));
                }
                for (t, logits) in routers[i].apply(pool, &h).chunks_exact(config.experts).enumerate() {
                    for (expert, weight) in top_experts(logits, config.experts_per_token) {
                        routes[expert].0.push(window.start + t);
                        routes[expert].1.push(weight);
                    }
                    if i == 0 && self.job.calibration.all_experts {
                        for (expert, weight) in
                            top_experts(logits, config.experts).into_iter().skip(config.experts_per_token)
                        {
                            others[expert].push((window.start + t, weight));
                        }
                    }
                }
            }
        }
        facts.coverage = routes.iter().map(|(tokens, _)| tokens.len() as u64).collect();

        // The record holds all experts of a kind one after the other, so the down matrices wait for their turn.
        let mut downs = Vec::new();
        for expert in 0..config.experts {
            step(2 + expert)?;
            let (tokens, answers) = &routes[expert];
            let mut seen = tokens.clone();
            let mut importance: Vec<f32> = answers.iter().map(|w| w * w).collect();
            for &(token, weight) in &others[expert] {
                seen.push(token);
                importance.push(weight * weight);
            }
            let inputs = |at: usize, end: usize| -> Result<(Vec<f32>, Vec<f32>), Error> {
                Ok((
                    self.normed(&middle.quantized.gather(&seen[at..end])?, &norm),
                    self.normed(&middle.source.gather(&seen[at..end])?, &source_norm),
                ))
            };
            let chunks = || (0..seen.len()).step_by(CHUNK).map(|at| (at, (at + CHUNK).min(seen.len())));

            let source_up = self.linear(self.job.source, MatrixKind::GateUp, expert)?;
            let mut moments = self.kinds.contains(&MatrixKind::GateUp).then(|| Moments::new(width));
            if let Some(moments) = &mut moments {
                for (at, end) in chunks() {
                    let (x, s) = inputs(at, end)?;
                    moments.add(pool, &x, &s, &self.importance(&importance[at..end]));
                }
            }
            let source_up = [source_up];
            let up = self.quantize(&[MatrixKind::GateUp], expert, &source_up, moments, record)?;

            let source_down = [self.linear(self.job.source, MatrixKind::Down, expert)?];
            let mut moments = self.kinds.contains(&MatrixKind::Down).then(|| Moments::new(inner));
            if let Some(moments) = &mut moments {
                for (at, end) in chunks() {
                    let (x, s) = inputs(at, end)?;
                    let x = swiglu(&up[0].apply(pool, &x), config);
                    let s = swiglu(&source_up[0].apply(pool, &s), config);
                    moments.add(pool, &x, &s, &self.importance(&importance[at..end]));
                }
            }
            let mut part = Record::in_memory();
            let down = self.quantize(&[MatrixKind::Down], expert, &source_down, moments, &mut part)?;
            downs.push(part);

            for (i, (stream, to, norm, routes, up, down)) in [
                (&middle.quantized, &output.quantized, &norm, &routes, &up[0], &down[0]),
                (
                    &middle.source,
                    &output.source,
                    &source_norm,
                    &source_routes,
                    &source_up[0],
                    &source_down[0],
                ),
            ]
            .into_iter()
            .enumerate()
            {
                let (tokens, answers) = &routes[expert];
                for (tokens, answers) in tokens.chunks(CHUNK).zip(answers.chunks(CHUNK)) {
                    let x = self.normed(&stream.gather(tokens)?, norm);
                    let y = swiglu(&up.apply(pool, &x), config);
                    if i == 0 {
                        facts.input_amax[3] = facts.input_amax[3].max(nvfp4::amax(&y));
                    }
                    let mut z = down.apply(pool, &y);
                    for (row, weight) in z.chunks_exact_mut(width).zip(answers) {
                        row.iter_mut().for_each(|z| *z *= weight);
                    }
                    to.add(tokens, &z)?;
                }
            }
            self.job.source.release(MatrixKind::GateUp.at(self.layer), expert);
            self.job.source.release(MatrixKind::Down.at(self.layer), expert);
        }
        for part in downs {
            record.append(&part.bytes)?;
        }
        Ok(())
    }

    /// Errors of an expert's answer count by the square of its weight; plain GPTQ does not know of weights.
    fn importance(&self, squares: &[f32]) -> Vec<f32> {
        let plain = self.job.methods.get(&MatrixKind::GateUp.at(self.layer)) == Some(&Method::Gptq);
        if plain { vec![1.0; squares.len()] } else { squares.to_vec() }
    }

    /// Quantizes matrices that share an input, if they are to be calibrated, and records them; others are taken as they will be.
    fn quantize(
        &self,
        kinds: &[MatrixKind],
        expert: usize,
        source: &[Linear],
        moments: Option<Moments>,
        record: &mut Record,
    ) -> Result<Vec<Linear>, Error> {
        let Some(mut moments) = moments else {
            return kinds.iter().map(|&kind| self.linear(self.job.quantized, kind, expert)).collect();
        };
        let pool = self.job.pool;
        let tokens = moments.tokens;
        let method = kinds.iter().find_map(|kind| self.job.methods.get(&kind.at(self.layer)).copied());
        let refined = method == Some(Method::Refine);
        moments.finish(refined);
        let Moments { cols, second, cross, mean, source_mean, .. } = moments;
        // Σ x (s - x)ᵀ, before the damping.
        let difference: Vec<f32> =
            if refined { cross.iter().zip(&second).map(|(c, h)| c - h).collect() } else { Vec::new() };
        drop(cross);
        let factor = (tokens >= FEWEST_TOKENS).then(|| Factor::new(pool, second, cols, DAMPING));
        let mut results = Vec::new();
        for (&kind, source) in kinds.iter().zip(source) {
            let id = kind.at(self.layer);
            let amax = (self.job.amax)(id, expert);
            let global_scale = nvfp4::static_global_scale(amax, nvfp4::STATIC_MAX_SCALE);
            let mut bias = source.bias.clone();
            let rounded = match &factor {
                _ if amax == 0.0 => zeros(&source.weights),
                None => sweep(pool, &source.weights, cols, amax),
                Some(factor) if refined => {
                    let mut target = vec![0.0; source.weights.len()];
                    let rows = Rows::new(&source.weights, cols);
                    products(pool, rows, Rows::new(&difference, cols), &mut target, cols, Update::Set);
                    factor.solve(pool, &mut target);
                    for (target, weight) in target.iter_mut().zip(&source.weights) {
                        *target = weight + ASYMMETRY * *target;
                    }
                    let mut rounded = round(pool, &target, factor, amax, Scales::Searched);
                    refine(pool, &target, factor, amax, &mut rounded, PASSES);
                    rounded
                }
                Some(factor) => round(pool, &source.weights, factor, amax, Scales::Max),
            };
            let weights = rounded.values(global_scale);
            if refined && factor.is_some() {
                // The mean of the error is the bias's to take.
                let rows = source.weights.chunks_exact(cols).zip(weights.chunks_exact(cols));
                for ((w, q), bias) in rows.zip(&mut bias) {
                    let mut sum = 0.0f64;
                    for (((&w, &q), m), s) in w.iter().zip(q).zip(&mean).zip(&source_mean) {
                        sum += f64::from(w - q) * m + f64::from(ASYMMETRY * w) * (s - m);
                    }
                    *bias = bf16::from_f32(*bias + sum as f32).to_f32();
                }
            }
            record.append(&rounded.codes)?;
            record.append(&rounded.scales)?;
            let bytes: Vec<u8> = bias.iter().flat_map(|&b| bf16::from_f32(b).to_le_bytes()).collect();
            record.append(&bytes)?;
            results.push(Linear { weights, bias, cols });
        }
        Ok(results)
    }

    /// Attention over one window of normed inputs: the heads' outputs `[tokens, query heads · head size]`.
    fn attend(
        &self,
        projections: &[Linear],
        x: &[f32],
        weights: &dyn Weights,
        facts: Option<&mut LayerFacts>,
    ) -> Result<Vec<f32>, Error> {
        let (config, pool) = (self.config, self.job.pool);
        let size = config.head_dim;
        let tokens = x.len() / config.hidden_size;
        let [mut q, mut k, v] = [0, 1, 2].map(|i| projections[i].apply(pool, x));
        let (q_width, kv_width) = (config.query_heads * size, config.kv_heads * size);
        let rotary = Rotary::new(&config.rope, size);
        let (mut cos, mut sin) = (vec![0.0; size / 2], vec![0.0; size / 2]);
        for (t, (q, k)) in q.chunks_exact_mut(q_width).zip(k.chunks_exact_mut(kv_width)).enumerate() {
            rotary.at(t, &mut cos, &mut sin);
            q.chunks_exact_mut(size)
                .chain(k.chunks_exact_mut(size))
                .for_each(|head| rotate(head, &cos, &sin));
        }
        if let Some(facts) = facts {
            facts.key_amax = facts.key_amax.max(nvfp4::amax(&k));
            facts.value_amax = facts.value_amax.max(nvfp4::amax(&v));
        }
        let sinks = weights.vector(VectorKind::Sinks.at(self.layer))?.to_f32();
        let window = match config.layer_kinds[self.layer] {
            LayerKind::Sliding => config.sliding_window,
            LayerKind::Full => tokens,
        };
        let padded = tokens.next_multiple_of(BLOCK);
        let scale = 1.0 / (size as f32).sqrt();
        let mut context = vec![0.0; tokens * q_width];
        let mut scores = vec![0.0; tokens * padded];
        let mut values = vec![0.0; size * padded];
        for head in 0..config.query_heads {
            let group = head / (config.query_heads / config.kv_heads);
            for (t, row) in v.chunks_exact(kv_width).enumerate() {
                row[group * size..][..size].iter().enumerate().for_each(|(e, v)| values[e * padded + t] = *v);
            }
            let queries = Rows::within(&q[head * size..], tokens, size, q_width);
            let keys = Rows::within(&k[group * size..], tokens, size, kv_width);
            products(pool, queries, keys, &mut scores, padded, Update::Set);
            for (t, row) in scores.chunks_exact_mut(padded).enumerate() {
                let first = (t + 1).saturating_sub(window);
                let seen = &mut row[first..=t];
                seen.iter_mut().for_each(|s| *s *= scale);
                let max = seen.iter().copied().fold(sinks[head], f32::max);
                seen.iter_mut().for_each(|s| *s = (*s - max).exp());
                let sum = (sinks[head] - max).exp() + seen.iter().sum::<f32>();
                seen.iter_mut().for_each(|s| *s /= sum);
                row[..first].fill(0.0);
                row[t + 1..].fill(0.0);
            }
            let out = &mut context[head * size..];
            products(pool, Rows::new(&scores, padded), Rows::new(&values, padded), out, q_width, Update::Set);
        }
        Ok(context)
    }

    fn linear(&self, weights: &dyn Weights, kind: MatrixKind, expert: usize) -> Result<Linear, Error> {
        let matrix = weights.matrix(kind.at(self.layer), expert)?;
        let bias = weights.vector(bias_of(kind).at(self.layer))?.to_f32();
        let bias = bias[expert * matrix.rows..(expert + 1) * matrix.rows].to_vec();
        Ok(Linear { weights: matrix.to_f32(), bias, cols: matrix.cols })
    }

    fn norm(&self, weights: &dyn Weights, kind: VectorKind) -> Result<Vec<f32>, Error> {
        Ok(weights.vector(kind.at(self.layer))?.to_f32())
    }

    fn normed(&self, x: &[f32], scale: &[f32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(x.len());
        for x in x.chunks_exact(self.config.hidden_size) {
            let mean = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
            let inverse = 1.0 / (mean + self.config.rms_norm_eps).sqrt();
            out.extend(x.iter().zip(scale).map(|(v, g)| v * inverse * g));
        }
        out
    }

    /// The windows as ranges of tokens.
    fn windows(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<'_> {
        self.job.calibration.windows.iter().scan(0, |first, window| {
            let range = *first..*first + window.len();
            *first = range.end;
            Some(range)
        })
    }
}

/// The rounded matrices of a layer, written one after the other.
struct Record {
    file: Option<(PathBuf, File)>,
    bytes: Vec<u8>,
    at: u64,
}

impl Record {
    fn create(folder: &Path, layer: usize) -> Result<Record, Error> {
        let path = layer_file(folder, layer);
        let file = File::create(&path).map_err(|source| io(&path, source))?;
        Ok(Record { file: Some((path, file)), bytes: Vec::new(), at: 0 })
    }

    fn in_memory() -> Record {
        Record { file: None, bytes: Vec::new(), at: 0 }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        match &self.file {
            Some((path, file)) => file.write_all_at(bytes, self.at).map_err(|source| io(path, source))?,
            None => self.bytes.extend_from_slice(bytes),
        }
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn finish(&self) -> Result<(), Error> {
        match &self.file {
            Some((path, file)) => Ok(file.sync_all().map_err(|source| io(path, source))?),
            None => Ok(()),
        }
    }
}

/// Each block with the scale of the smallest squared error.
fn sweep(pool: &Pool, weights: &[f32], cols: usize, amax: f32) -> Rounded {
    let global_scale = nvfp4::static_global_scale(amax, nvfp4::STATIC_MAX_SCALE);
    let search = nvfp4::ScaleSearch::new(amax, nvfp4::STATIC_MAX_SCALE);
    let rows: Vec<std::sync::Mutex<Vec<u8>>> =
        weights.chunks_exact(cols).map(|_| Default::default()).collect();
    pool.run(rows.len(), &|row| {
        let blocks = weights[row * cols..][..cols].chunks_exact(BLOCK);
        let scales = blocks.map(|block| search.best_of_sweep(block, false)).collect();
        *rows[row].lock().unwrap_or_else(std::sync::PoisonError::into_inner) = scales;
    });
    let scales: Vec<u8> = rows
        .into_iter()
        .flat_map(|row| row.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
        .collect();
    let mut codes = vec![0; weights.len() / 2];
    for ((block, codes), &scale) in
        weights.chunks_exact(BLOCK).zip(codes.chunks_exact_mut(BLOCK / 2)).zip(&scales)
    {
        nvfp4::encode_block(block, scale, global_scale, codes);
    }
    Rounded { codes, scales }
}

fn zeros(weights: &[f32]) -> Rounded {
    Rounded {
        codes: vec![0; weights.len() / 2],
        scales: vec![nvfp4::ZERO_BLOCK_SCALE; weights.len() / BLOCK],
    }
}
