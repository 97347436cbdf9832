//! Calibration on the real forward pass, one layer at a time: each is fed by the layers already quantized before it, its
//! matrices are quantized from what they see, and only then do the tokens go on.
//!
//! Two residual streams run side by side, that of the source and that of the quantized model; they lie in files of a scratch
//! folder, as do the finished layers, so that memory holds one expert at a time and an interrupted run continues.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::slice;

use checkpoint::{Config, LayerKind, MatrixId, MatrixKind, Unfinished, Vector, VectorKind, Weights};
use cpu::{Pool, Rows, Update, products};
use gptoss::{Rotary, rotate, swiglu, top_experts};
use half::bf16;
use numerics::nvfp4::{self, BLOCK};

use crate::factor::Factor;
use crate::gptq::{Scales, leave_out_zeros, refine, round};
use crate::moments::{Moments, seen};
use crate::rounded::{Rounded, diagonal_blocks, sweep};
use crate::saved::{Calibrated, Done, FORM, LayerFacts, Record, bias_of, io, place};
use crate::stream::Stream;
use crate::{Error, Method, awq};

/// What to calibrate on, and where unfinished work lies.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// Token ids, each window a sequence of its own.
    pub windows: Vec<Vec<u32>>,
    /// Every token goes through every expert for the statistics and the scales of inputs; the model's outputs are unchanged.
    pub all_experts: bool,
    /// A folder for activations and finished layers, locked as long as what was calibrated is in use. Work that is found
    /// there continues if it has the same fingerprint.
    pub scratch: PathBuf,
    /// Of everything that the result depends on.
    pub fingerprint: String,
    /// Whether unfinished work of another fingerprint is dropped.
    pub overwrite: bool,
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

/// What a calibration needs to know about the weights.
pub(crate) struct Job<'a> {
    /// The weights before quantization.
    pub(crate) source: &'a dyn Weights,
    /// The weights that need no calibration, as they will be.
    pub(crate) quantized: &'a dyn Weights,
    /// Matrices to calibrate, and how.
    pub(crate) methods: BTreeMap<MatrixId, Method>,
    /// Whether inputs will be in four bits, too.
    pub(crate) activations: bool,
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
    let sides = Side::of(job);
    if job.calibration.windows.iter().all(Vec::is_empty) {
        return Err(Error::NoTokens);
    }
    for size in [config.hidden_size, config.intermediate_size, config.head_dim] {
        if !size.is_multiple_of(BLOCK) {
            return Err(Error::Shape { found: size });
        }
    }
    let identity = format!("{FORM} {}", job.calibration.fingerprint);
    let (claim, _) = Unfinished::begin(folder, &identity, job.calibration.overwrite)?;
    let done = (0..layers).take_while(|&layer| Done::exists(folder, layer)).count();
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
        let pass = LayerPass { job, sides: &sides, config, layer, record: Record::create(folder, layer)? };
        pass.run(&mut |part| step(layer, part))?;
    }
    let _ = progress(layers * per_layer, layers * per_layer);
    let final_amax = final_amax(job)?;
    Ok(Calibrated::open(claim, config, job.methods.keys().copied().collect(), final_amax, done > 0)?)
}

/// The largest magnitude that the output layer sees.
fn final_amax(job: &Job<'_>) -> Result<f32, Error> {
    let config = job.source.config();
    let path = stream_file(&job.calibration.scratch, Side::of(job)[0].name, config.layer_kinds.len());
    let stream = Stream::open(&path, config.hidden_size)?;
    let norm = job.source.vector(VectorKind::FinalNorm.at(0))?.to_f32();
    let mut largest = 0.0f32;
    for window in windows(job.calibration) {
        let x = normed(config, &stream.read(window.start, window.len())?, &norm);
        largest = largest.max(input_amax(MatrixKind::Unembedding.at(0), &x)?);
    }
    Ok(largest)
}

/// The tokens' embeddings as the input of the first layer, in both streams.
fn embed(job: &Job<'_>) -> Result<(), Error> {
    let width = job.source.config().hidden_size;
    for side in Side::of(job) {
        let stream = Stream::create(&stream_file(&job.calibration.scratch, side.name, 0), width)?;
        let embedding = side.weights.matrix(MatrixKind::Embedding.at(0), 0)?;
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

fn stream_file(folder: &Path, name: &str, layer: usize) -> PathBuf {
    folder.join(format!("{name}-{layer}.f32"))
}

/// A matrix with its bias, in f32.
struct Linear {
    weights: Vec<f32>,
    bias: Vec<f32>,
    cols: usize,
    /// Of inputs that are in four bits.
    input_scale: Option<f32>,
}

impl Linear {
    /// `x Wᵀ + b` for rows of `x`.
    fn apply(&self, pool: &Pool, x: &[f32]) -> Vec<f32> {
        let rows = self.bias.len();
        let mut out: Vec<f32> =
            std::iter::repeat_n(&self.bias, x.len() / self.cols).flatten().copied().collect();
        products(
            pool,
            Rows::new(&seen(x, self.input_scale), self.cols),
            Rows::new(&self.weights, self.cols),
            &mut out,
            rows,
            Update::Add,
        );
        out
    }
}

/// One of the two models whose forward passes are followed.
struct Side<'a> {
    name: &'static str,
    weights: &'a dyn Weights,
}

impl<'a> Side<'a> {
    /// The source, and the quantized model if something is quantized by what it sees there.
    fn of(job: &Job<'a>) -> Vec<Side<'a>> {
        let mut sides = vec![Side { name: "source", weights: job.source }];
        if !job.methods.is_empty() {
            sides.push(Side { name: "quantized", weights: job.quantized });
        }
        sides
    }
}

/// Tokens that go through an expert, and the weights of its answers.
#[derive(Default, Clone)]
struct Route {
    tokens: Vec<usize>,
    weights: Vec<f32>,
}

impl Route {
    fn push(&mut self, token: usize, weight: f32) {
        self.tokens.push(token);
        self.weights.push(weight);
    }

    fn chunks(&self) -> impl Iterator<Item = (&[usize], &[f32])> {
        self.tokens.chunks(CHUNK).zip(self.weights.chunks(CHUNK))
    }
}

/// One layer's calibration. What there is once per side is in the order of `sides`, the source first.
struct LayerPass<'a> {
    job: &'a Job<'a>,
    sides: &'a [Side<'a>],
    config: &'a Config,
    layer: usize,
    record: Record,
}

impl LayerPass<'_> {
    fn run(&self, step: &mut dyn FnMut(usize) -> Result<(), Error>) -> Result<(), Error> {
        let folder = &self.job.calibration.scratch;
        let width = self.config.hidden_size;
        let mut done = Done::default();
        let input = self.streams(|side| Stream::open(&stream_file(folder, side.name, self.layer), width))?;
        let middle = self.scratch_streams("middle", width)?;
        self.attention(&input, &middle, &mut done)?;
        step(1)?;
        let output =
            self.streams(|side| Stream::create(&stream_file(folder, side.name, self.layer + 1), width))?;
        self.moe(&middle, &output, &mut done.facts, step)?;
        self.record.finish()?;
        output.iter().try_for_each(Stream::sync)?;
        done.write(folder, self.layer)?;
        for side in self.sides {
            let old = stream_file(folder, side.name, self.layer);
            std::fs::remove_file(&old).map_err(|source| io(&old, source))?;
        }
        Ok(())
    }

    /// One stream per side.
    fn streams(
        &self,
        open: impl Fn(&Side<'_>) -> Result<Stream, checkpoint::Error>,
    ) -> Result<Vec<Stream>, Error> {
        Ok(self.sides.iter().map(open).collect::<Result<_, _>>()?)
    }

    /// Streams that the next layer overwrites.
    fn scratch_streams(&self, name: &str, width: usize) -> Result<Vec<Stream>, Error> {
        let folder = &self.job.calibration.scratch;
        self.streams(|side| Stream::create(&folder.join(format!("{name}-{}.f32", side.name)), width))
    }

    fn attention(&self, input: &[Stream], middle: &[Stream], done: &mut Done) -> Result<(), Error> {
        let pool = self.job.pool;
        let facts = &mut done.facts;
        let mut norms = self.norms(VectorKind::InputNorm)?;
        let normed = |window: &Range<usize>, norms: &[Vec<f32>]| -> Result<Vec<Vec<f32>>, Error> {
            let each = input.iter().zip(norms);
            each.map(|(from, norm)| Ok(normed(self.config, &from.read(window.start, window.len())?, norm)))
                .collect()
        };
        let kinds = [MatrixKind::Query, MatrixKind::Key, MatrixKind::Value];
        let mut projections = vec![self.linears(&kinds)?];
        for window in windows(self.job.calibration) {
            let x = normed(&window, &norms)?;
            facts.input_amax[0] = facts.input_amax[0].max(self.input_amax(MatrixKind::Query, &x[0])?);
        }
        let mut moments = self.moments(&kinds, self.config.hidden_size, facts);
        if let Some(moments) = &mut moments {
            for window in windows(self.job.calibration) {
                self.add(moments, &kinds, &normed(&window, &norms)?, &vec![1.0; window.len()]);
            }
        }
        if let Some(norm) = norms.get_mut(1) {
            projections.push(match moments {
                Some(moments) if self.method(&kinds) == Some(Method::Awq) => {
                    self.awq(&kinds, &projections[0], moments, Some(norm), done)?
                }
                moments => self.quantize(&kinds, 0, &projections[0], moments)?,
            });
        }

        let facts = &mut done.facts;
        let width = self.config.query_heads * self.config.head_dim;
        let context = self.scratch_streams("context", width)?;
        for window in windows(self.job.calibration) {
            let mut x = normed(&window, &norms)?;
            for (i, x) in x.iter_mut().enumerate() {
                *x = self.attend(&projections[i], x, (i == 0).then_some(&mut *facts))?;
                context[i].write(window.start, x)?;
            }
            facts.input_amax[1] = facts.input_amax[1].max(self.input_amax(MatrixKind::Output, &x[0])?);
        }
        let kinds = [MatrixKind::Output];
        let mut moments = self.moments(&kinds, width, facts);
        if let Some(moments) = &mut moments {
            for window in windows(self.job.calibration) {
                let x = context.iter().map(|from| from.read(window.start, window.len()));
                let x = x.collect::<Result<Vec<_>, _>>()?;
                self.add(moments, &kinds, &x, &vec![1.0; window.len()]);
            }
        }
        let mut outputs = vec![self.linears(&kinds)?];
        if self.sides.len() > 1 {
            outputs.push(match moments {
                Some(moments) if self.method(&kinds) == Some(Method::Awq) => {
                    self.awq(&kinds, &outputs[0], moments, None, done)?
                }
                moments => self.quantize(&kinds, 0, &outputs[0], moments)?,
            });
        }
        for window in windows(self.job.calibration) {
            for (i, output) in outputs.iter().enumerate() {
                let mut x = input[i].read(window.start, window.len())?;
                let a = output[0].apply(pool, &context[i].read(window.start, window.len())?);
                x.iter_mut().zip(&a).for_each(|(x, a)| *x += a);
                middle[i].write(window.start, &x)?;
            }
        }
        Ok(())
    }

    fn moe(
        &self,
        middle: &[Stream],
        output: &[Stream],
        facts: &mut LayerFacts,
        step: &mut dyn FnMut(usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (config, pool) = (self.config, self.job.pool);
        let norms = self.norms(VectorKind::PostAttentionNorm)?;
        let mut routes = vec![vec![Route::default(); config.experts]; self.sides.len()];
        // Tokens that count for the statistics alone.
        let mut others = routes.clone();
        for (i, side) in self.sides.iter().enumerate() {
            let router = self.linear(side.weights, MatrixKind::Router, 0)?;
            for window in windows(self.job.calibration) {
                let x = middle[i].read(window.start, window.len())?;
                output[i].write(window.start, &x)?;
                let h = normed(self.config, &x, &norms[i]);
                if i == 0 {
                    facts.input_amax[2] = facts.input_amax[2].max(self.input_amax(MatrixKind::GateUp, &h)?);
                }
                for (t, logits) in router.apply(pool, &h).chunks_exact(config.experts).enumerate() {
                    for (expert, weight) in top_experts(logits, config.experts_per_token) {
                        routes[i][expert].push(window.start + t, weight);
                    }
                    if self.job.calibration.all_experts {
                        let all = top_experts(logits, config.experts);
                        for (expert, weight) in all.into_iter().skip(config.experts_per_token) {
                            others[i][expert].push(window.start + t, weight);
                        }
                    }
                }
            }
        }
        facts.coverage = routes[self.sides.len() - 1].iter().map(|route| route.tokens.len() as u64).collect();

        let kinds = [MatrixKind::GateUp, MatrixKind::Down];
        let source = |expert| -> Result<[Linear; 2], Error> {
            let [up, down] = kinds.map(|kind| self.linear(self.job.source, kind, expert));
            Ok([up?, down?])
        };
        let release = |expert| kinds.iter().for_each(|k| self.job.source.release(k.at(self.layer), expert));
        // What an expert of one side adds to the tokens routed to it.
        let add = |i: usize, expert: usize, [up, down]: &[Linear; 2], facts: &mut LayerFacts| {
            let hidden = |tokens: &[usize]| -> Result<Vec<f32>, Error> {
                let x = normed(self.config, &middle[i].gather(tokens)?, &norms[i]);
                Ok(swiglu(&up.apply(pool, &x), config))
            };
            if i == 0 {
                for (tokens, _) in others[0][expert].chunks() {
                    let found = self.input_amax(MatrixKind::Down, &hidden(tokens)?)?;
                    facts.input_amax[3] = facts.input_amax[3].max(found);
                }
            }
            for (tokens, weights) in routes[i][expert].chunks() {
                let y = hidden(tokens)?;
                if i == 0 {
                    facts.input_amax[3] = facts.input_amax[3].max(self.input_amax(MatrixKind::Down, &y)?);
                }
                let mut z = down.apply(pool, &y);
                for (row, weight) in z.chunks_exact_mut(config.hidden_size).zip(weights) {
                    row.iter_mut().for_each(|z| *z *= weight);
                }
                output[i].add(tokens, &z)?;
            }
            Ok::<(), Error>(())
        };
        // Inputs in four bits need their scale, which all of the source's experts give, before the first expert is quantized.
        let source_first = self.rounds_inputs(&kinds);
        if source_first {
            for expert in 0..config.experts {
                step(1)?;
                add(0, expert, &source(expert)?, facts)?;
                release(expert);
            }
        }
        for expert in 0..config.experts {
            step(2 + expert)?;
            let source = source(expert)?;
            if !source_first {
                add(0, expert, &source, facts)?;
            }
            if let Some(routes) = routes.get(1) {
                let routes = [&routes[expert], &others[1][expert]];
                let quantized = self.expert(expert, &source, routes, middle, &norms, facts)?;
                add(1, expert, &quantized, facts)?;
            }
            release(expert);
        }
        Ok(())
    }

    /// Quantizes the two matrices of an expert by the tokens of `routes`.
    fn expert(
        &self,
        expert: usize,
        source: &[Linear; 2],
        routes: [&Route; 2],
        middle: &[Stream],
        norms: &[Vec<f32>],
        facts: &LayerFacts,
    ) -> Result<[Linear; 2], Error> {
        let pool = self.job.pool;
        let chunks = || routes.into_iter().flat_map(Route::chunks);
        let inputs = |tokens: &[usize]| -> Result<Vec<Vec<f32>>, Error> {
            let each = middle.iter().zip(norms);
            each.map(|(from, norm)| Ok(normed(self.config, &from.gather(tokens)?, norm))).collect()
        };
        let kinds = [MatrixKind::GateUp];
        let mut moments = self.moments(&kinds, self.config.hidden_size, facts);
        if let Some(moments) = &mut moments {
            for (tokens, weights) in chunks() {
                let x = inputs(tokens)?;
                self.add(moments, &kinds, &x, weights);
            }
        }
        let [source_up, source_down] = source;
        let up = only(self.quantize(&kinds, expert, slice::from_ref(source_up), moments)?);

        let kinds = [MatrixKind::Down];
        let mut moments = self.moments(&kinds, self.config.intermediate_size, facts);
        if let Some(moments) = &mut moments {
            for (tokens, weights) in chunks() {
                let mut x = inputs(tokens)?;
                for (x, up) in x.iter_mut().zip([source_up, &up]) {
                    *x = swiglu(&up.apply(pool, x), self.config);
                }
                self.add(moments, &kinds, &x, weights);
            }
        }
        let down = only(self.quantize(&kinds, expert, slice::from_ref(source_down), moments)?);
        Ok([up, down])
    }

    fn input_amax(&self, kind: MatrixKind, x: &[f32]) -> Result<f32, Error> {
        input_amax(kind.at(self.layer), x)
    }

    /// How those of these matrices are quantized that are calibrated, if there are any.
    fn method(&self, kinds: &[MatrixKind]) -> Option<Method> {
        kinds.iter().find_map(|kind| self.job.methods.get(&kind.at(self.layer)).copied())
    }

    /// Where in the record a matrix that is calibrated begins.
    fn place(&self, id: MatrixId, expert: usize) -> u64 {
        let calibrated = |id| self.job.methods.contains_key(&id);
        place(self.config, calibrated, id, expert).expect("a matrix that is calibrated").0
    }

    /// Whether their inputs are seen in four bits: GPTQ sees what the product will see.
    fn rounds_inputs(&self, kinds: &[MatrixKind]) -> bool {
        self.job.activations && self.method(kinds) == Some(Method::Gptq)
    }

    /// Where their statistics go, if they are calibrated; `facts` are those about their inputs.
    fn moments(&self, kinds: &[MatrixKind], cols: usize, facts: &LayerFacts) -> Option<Moments> {
        let input_scale = self.rounds_inputs(kinds).then(|| facts.input_scale(kinds[0]));
        self.method(kinds).map(|_| Moments::new(cols, input_scale))
    }

    /// Adds tokens to the statistics: the inputs `x` that both sides give, and the `weights` of their answers.
    fn add(&self, moments: &mut Moments, kinds: &[MatrixKind], x: &[Vec<f32>], weights: &[f32]) {
        let method = self.method(kinds);
        let importance: Vec<f32> = match method {
            // An error in an expert's answer counts by the square of its weight.
            Some(Method::Refine) => weights.iter().map(|weight| weight * weight).collect(),
            // Means over windows, of means over their tokens.
            Some(Method::Awq) => vec![1.0 / weights.len() as f32; weights.len()],
            _ => vec![1.0; weights.len()],
        };
        // These two are defined on the source's own inputs.
        let source_alone = matches!(method, Some(Method::LocalHessian | Method::Awq));
        moments.add(self.job.pool, if source_alone { &x[0] } else { &x[1] }, &x[0], &importance);
    }

    /// Quantizes matrices that share an input, and records them, if they are to be calibrated, which all are or none; others are
    /// taken as they will be.
    fn quantize(
        &self,
        kinds: &[MatrixKind],
        expert: usize,
        source: &[Linear],
        moments: Option<Moments>,
    ) -> Result<Vec<Linear>, Error> {
        let Some(mut moments) = moments else {
            return kinds.iter().map(|&kind| self.linear(self.job.quantized, kind, expert)).collect();
        };
        let pool = self.job.pool;
        let tokens = moments.tokens;
        let method = self.method(kinds);
        let refined = method == Some(Method::Refine);
        moments.finish(refined);
        let Moments { cols, input_scale, second, cross, mean, source_mean, .. } = moments;
        // Σ x (s - x)ᵀ, before the damping.
        let difference: Vec<f32> =
            if refined { cross.iter().zip(&second).map(|(c, h)| c - h).collect() } else { Vec::new() };
        drop(cross);
        let enough = tokens >= FEWEST_TOKENS;
        let hessians =
            (enough && method == Some(Method::LocalHessian)).then(|| diagonal_blocks(&second, cols));
        let factor = |id: MatrixId, weights: &[f32]| {
            let mut moment = second.clone();
            if method == Some(Method::Gptq) {
                leave_out_zeros(&mut moment, weights, cols);
            }
            let factor = Factor::new(pool, moment, cols, DAMPING);
            factor.map_err(|found| Error::Inputs { tensor: id.name(), found })
        };
        let mut results = Vec::new();
        for (&kind, source) in kinds.iter().zip(source) {
            let id = kind.at(self.layer);
            let amax = (self.job.amax)(id, expert);
            let global_scale = nvfp4::static_global_scale(amax, nvfp4::STATIC_MAX_SCALE);
            let mut bias = source.bias.clone();
            let stored = self.job.source.vector(bias_of(kind).at(self.layer))?;
            let factor = match enough && hessians.is_none() {
                true => Some(factor(id, &source.weights)?),
                false => None,
            };
            let rounded = match &factor {
                _ if amax == 0.0 => Rounded::zeros(source.weights.len()),
                None => sweep(pool, &source.weights, cols, amax, hessians.as_deref()),
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
                    *bias += sum as f32;
                    if let Vector::Bf16(_) = stored {
                        *bias = bf16::from_f32(*bias).to_f32();
                    }
                }
            }
            self.record.matrix(self.place(id, expert), &rounded, &bias)?;
            results.push(Linear { weights, bias, cols, input_scale });
        }
        Ok(results)
    }

    /// Quantizes projections that share an input as Model Optimizer's `awq_full` does: with a `norm` before them, their columns
    /// are scaled and it takes the inverse; then their common global scale is clipped.
    fn awq(
        &self,
        kinds: &[MatrixKind],
        source: &[Linear],
        mut moments: Moments,
        norm: Option<&mut Vec<f32>>,
        done: &mut Done,
    ) -> Result<Vec<Linear>, Error> {
        let (pool, cols) = (self.job.pool, moments.cols);
        moments.finish(false);
        let mut weights: Vec<Vec<f32>> = source.iter().map(|linear| linear.weights.clone()).collect();
        if let Some(norm) = norm {
            // What runs as one product has one input, so the projections share the mean of their scales.
            let mut scale = vec![0.0; cols];
            for weights in &weights {
                let own = awq::lite(pool, weights, &moments);
                scale.iter_mut().zip(own).for_each(|(scale, own)| *scale += own / source.len() as f32);
            }
            for (scale, norm) in scale.iter_mut().zip(norm.iter_mut()) {
                // As BF16 holds the product, so that scaling loses nothing.
                let scaled = bf16::from_f32(*norm * *scale).to_f32();
                *scale = if scaled.is_normal() && norm.is_normal() { scaled / *norm } else { 1.0 };
                *norm *= *scale;
            }
            for row in weights.iter_mut().flat_map(|weights| weights.chunks_exact_mut(cols)) {
                row.iter_mut().zip(&scale).for_each(|(weight, scale)| *weight /= scale);
            }
            moments.scale(&scale);
            done.facts.input_amax[0] = nvfp4::amax(&moments.source_amax);
            done.norm = Some(norm.clone());
        }
        let all = weights.concat();
        let amax = nvfp4::amax(&all);
        let amax = awq::clip(pool, &all, &moments, amax) * amax;
        if kinds == [MatrixKind::Output] {
            done.amax.1 = Some(amax);
        } else {
            done.amax.0 = Some(amax);
        }
        let mut results = Vec::new();
        for ((kind, weights), source) in kinds.iter().zip(&weights).zip(source) {
            let rounded = Rounded::by_max_rule(weights, amax);
            self.record.matrix(self.place(kind.at(self.layer), 0), &rounded, &source.bias)?;
            let weights = rounded.values(nvfp4::global_scale(amax));
            results.push(Linear { weights, bias: source.bias.clone(), cols, input_scale: None });
        }
        Ok(results)
    }

    /// Attention over one window of normed inputs: the heads' outputs `[tokens, query heads · head size]`.
    fn attend(
        &self,
        projections: &[Linear],
        x: &[f32],
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
        let sinks = self.job.source.vector(VectorKind::Sinks.at(self.layer))?.to_f32();
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
        Ok(Linear { weights: matrix.to_f32(), bias, cols: matrix.cols, input_scale: None })
    }

    /// The source's matrices.
    fn linears(&self, kinds: &[MatrixKind]) -> Result<Vec<Linear>, Error> {
        kinds.iter().map(|&kind| self.linear(self.job.source, kind, 0)).collect()
    }

    /// A norm of each side.
    fn norms(&self, kind: VectorKind) -> Result<Vec<Vec<f32>>, Error> {
        self.sides.iter().map(|side| Ok(side.weights.vector(kind.at(self.layer))?.to_f32())).collect()
    }
}

/// The element of an array of one.
fn only<T>(mut linears: Vec<T>) -> T {
    linears.remove(0)
}

/// The largest magnitude of what goes into a matrix.
fn input_amax(id: MatrixId, x: &[f32]) -> Result<f32, Error> {
    let found = nvfp4::amax(x);
    if found.is_finite() { Ok(found) } else { Err(Error::Inputs { tensor: id.name(), found }) }
}

/// RMS norm of rows.
fn normed(config: &Config, x: &[f32], scale: &[f32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for x in x.chunks_exact(config.hidden_size) {
        let mean = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
        let inverse = 1.0 / (mean + config.rms_norm_eps).sqrt();
        out.extend(x.iter().zip(scale).map(|(v, g)| v * inverse * g));
    }
    out
}

/// The windows as ranges of tokens.
fn windows(calibration: &Calibration) -> impl Iterator<Item = Range<usize>> {
    calibration.windows.iter().scan(0, |first, window| {
        let range = *first..*first + window.len();
        *first = range.end;
        Some(range)
    })
}
