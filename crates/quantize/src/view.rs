//! The view that quantizes on the way.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint::{
    Config, Format, Identity, KvScales, Matrix, MatrixId, MatrixKind, Values, Vector, VectorId, VectorKind,
    Weights, matrices, vectors,
};
use cpu::Pool;
use half::bf16;
use numerics::nvfp4::CastCounts;
use numerics::{e4m3, mxfp4, nvfp4};

use crate::calibrate::{self, Calibration, Job};
use crate::recipe::{Method, Options, ScalesPer, lacks_kv_scales};
use crate::report::{TensorReport, Totals};
use crate::saved::{Calibrated, LayerFacts, input_scale};

/// What can be wrong with weights that are to be quantized.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The source cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// NaN and infinity have no code, and nothing can be calibrated on what they make. In a matrix what lies beyond BF16 was read as
    /// infinity.
    #[error("tensor `{tensor}`: expected finite values (of BF16 in matrices), found {found}")]
    NotFinite {
        /// The tensor's name.
        tensor: String,
        /// The value.
        found: f32,
    },
    /// A row is not a whole number of blocks.
    #[error("tensor `{tensor}`: expected rows of a multiple of {block} values, found {cols}")]
    Ragged {
        /// The tensor's name.
        tensor: String,
        /// Elements per block.
        block: usize,
        /// Elements per row.
        cols: usize,
    },
    /// Matrices that run as one product and cannot have one global scale.
    #[error(
        "{tensors}: expected one global scale, or scales that powers of two tell apart, since they run as one product, found {found}"
    )]
    OneProduct {
        /// Their names.
        tensors: String,
        /// Their scales.
        found: String,
    },
    /// Calibration was interrupted; what is done is kept.
    #[error("interrupted")]
    Interrupted,
    /// Nothing to calibrate on.
    #[error("calibration: expected at least one token, found none")]
    NoTokens,
    /// A token of the calibration data that the model does not have.
    #[error("calibration: expected token ids below {vocabulary}, found {found}")]
    Token {
        /// The id.
        found: u32,
        /// Tokens of the vocabulary.
        vocabulary: usize,
    },
    /// The model's own products overflow on the calibration data.
    #[error("calibration: expected finite inputs of tensor `{tensor}`, found {found}")]
    Inputs {
        /// The name of the matrix that they go into.
        tensor: String,
        /// The largest input, or the mean of their squares.
        found: f32,
    },
    /// The model's shape does not allow calibration.
    #[error("calibration: expected hidden, intermediate and head sizes of a multiple of 16, found {found}")]
    Shape {
        /// The size.
        found: usize,
    },
}

/// Weights, quantized as they are read.
pub struct Quantized {
    source: Arc<dyn Weights>,
    pool: Pool,
    plans: BTreeMap<MatrixId, Plan>,
    activations: bool,
    kv_scales: bool,
    totals: Mutex<BTreeMap<MatrixId, Totals>>,
    calibrated: Option<Calibrated>,
    identity: Option<Identity>,
}

/// The values of a row to codes and scales.
type EncodeRow<'a> = dyn Fn(&[f32], &mut [u8], &mut [u8]) + Sync + 'a;

/// Codes and scales of a row to its values.
type DecodeRow<'a> = dyn Fn(&[u8], &[u8], &mut [f32]) + Sync + 'a;

struct Plan {
    method: Method,
    /// Per matrix of the stack: the largest scale byte of a cast's stack or matrix.
    max_scales: Vec<Option<u8>>,
    /// Per matrix of the stack: the largest magnitude that its global scale comes from.
    amaxes: Vec<f32>,
    /// The global scale of a matrix in NVFP4 that stays as it is but for its scales.
    shared_scale: Option<f32>,
    cast: CastCounts,
}

impl Quantized {
    /// A view of `source`, with the global scales found and all values in BF16 and F32 known to be finite (which reads each
    /// of these tensors once, and the scales of those that are cast). `progress` is called with the matrices looked at and
    /// their number.
    pub fn new(
        source: Arc<dyn Weights>,
        options: Options,
        threads: usize,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Quantized, Error> {
        let pool = Pool::new(threads);
        for id in vectors(source.config()) {
            if let Some(found) = source.vector(id)?.to_f32().into_iter().find(|value| !value.is_finite()) {
                return Err(Error::NotFinite { tensor: id.name(), found });
            }
        }
        let ids: Vec<MatrixId> = matrices(source.config()).collect();
        let (scales_per, activations, kv_scales) = match options {
            Options::Nvfp4 { scales_per, activations, kv_scales, .. } => (scales_per, activations, kv_scales),
            Options::Mxfp4 | Options::Bf16 => (ScalesPer::Stack, false, false),
        };
        let mut plans = BTreeMap::new();
        for (done, &id) in ids.iter().enumerate() {
            progress(done, ids.len());
            let method = options.method(id, source.format(id));
            check_shape(&*source, id, method)?;
            plans.insert(id, Plan::new(&*source, id, method, scales_per, &pool)?);
        }
        for layer in 0..source.config().layer_kinds.len() {
            let one_product = [MatrixKind::Query, MatrixKind::Key, MatrixKind::Value].map(|k| k.at(layer));
            share_scale(&mut plans, &one_product);
            share_kept_scale(&*source, &mut plans, &one_product)?;
        }
        progress(ids.len(), ids.len());
        let totals = Mutex::default();
        let identity = source.identity().map(|identity| identity.derived(&format!("{options:?}")));
        Ok(Quantized { source, pool, plans, activations, kv_scales, totals, calibrated: None, identity })
    }

    /// Whether a matrix or a static scale waits for [`Quantized::calibrate`].
    pub fn needs_calibration(&self) -> bool {
        let input_scale = |(&id, plan): (&MatrixId, &Plan)| {
            self.has_input_scale(id) && plan.method.kept_input_scale(&*self.source, id).is_none()
        };
        let waits = (self.kv_scales && lacks_kv_scales(&*self.source))
            || self.plans.values().any(|plan| plan.method.calibrates())
            || self.plans.iter().any(input_scale);
        waits && self.calibrated.is_none()
    }

    /// Whether the matrix has a static scale of its input.
    fn has_input_scale(&self, id: MatrixId) -> bool {
        self.activations && self.format(id) == Format::Nvfp4 && id.kind.has_inputs()
    }

    /// Quantizes what needs to see its inputs, layer by layer. `progress` is called with the steps done and their number.
    pub fn calibrate(
        &mut self,
        calibration: &Calibration,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let methods: BTreeMap<MatrixId, Method> = self
            .plans
            .iter()
            .filter(|(_, plan)| plan.method.calibrates())
            .map(|(&id, plan)| (id, plan.method))
            .collect();
        let calibrated = calibrate::calibrate(
            &Job {
                source: &*self.source,
                quantized: self,
                methods,
                activations: self.activations,
                amax: &|id, expert| self.plans.get(&id).map_or(0.0, |plan| plan.amaxes[expert]),
                pool: &self.pool,
                calibration,
            },
            progress,
        )?;
        // What was read meanwhile will be read, and counted, again.
        self.totals = Mutex::default();
        self.calibrated = Some(calibrated);
        Ok(())
    }

    /// Whether the calibration took layers that an earlier, interrupted call had finished.
    pub fn continued(&self) -> bool {
        self.calibrated.as_ref().is_some_and(|calibrated| calibrated.continued)
    }

    /// What calibration found out about each layer; empty without one.
    pub fn facts(&self) -> Vec<&LayerFacts> {
        self.calibrated.iter().flat_map(Calibrated::facts).collect()
    }

    /// The blocks of all casts: how many there are, and what they lose.
    pub fn cast_counts(&self) -> CastCounts {
        let mut sum = CastCounts::default();
        self.plans.values().for_each(|plan| sum += plan.cast);
        sum
    }

    /// What happened to each matrix; the errors are known of what has been read whole.
    pub fn report(&self) -> Vec<TensorReport> {
        let totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        self.plans
            .iter()
            .map(|(&id, plan)| {
                let (count, rows, cols) = id.kind.shape(self.config());
                let found = totals.get(&id).copied().unwrap_or_default();
                let known = plan.keeps_values() || found.values >= (count * rows * cols) as u64;
                TensorReport {
                    id,
                    format: self.format(id),
                    method: plan.method,
                    cast: plan.cast,
                    totals: known.then_some(found),
                }
            })
            .collect()
    }

    /// Encodes every row with `encode(row values, codes, scales)` and adds up the error of `decode(codes, scales, out)`.
    fn encode(
        &self,
        (id, expert): (MatrixId, usize),
        source: &Matrix<'_>,
        block: usize,
        encode: &EncodeRow<'_>,
        decode: &DecodeRow<'_>,
    ) -> (Vec<u8>, Vec<u8>) {
        let (rows, cols) = (source.rows, source.cols);
        let mut codes = vec![0; rows * cols / 2];
        let mut scales = vec![0; rows * cols / block];
        let parts: Vec<Mutex<Part<'_>>> = codes
            .chunks_mut(ROWS_PER_TASK * cols / 2)
            .zip(scales.chunks_mut(ROWS_PER_TASK * cols / block))
            .map(|(codes, scales)| Mutex::new(Part { codes, scales, totals: Totals::default() }))
            .collect();
        self.pool.run(parts.len(), &|task| {
            let mut part = parts[task].lock().unwrap_or_else(PoisonError::into_inner);
            let Part { codes, scales, totals } = &mut *part;
            let (mut values, mut decoded) = (vec![0.0; cols], vec![0.0; cols]);
            let rows = codes.chunks_exact_mut(cols / 2).zip(scales.chunks_exact_mut(cols / block));
            for (r, (codes, scales)) in rows.enumerate() {
                let row = task * ROWS_PER_TASK + r;
                source.row(row, &mut values);
                encode(&values, codes, scales);
                decode(codes, scales, &mut decoded);
                totals.add((expert, row), &values, &decoded);
            }
        });
        let mut sum = Totals::default();
        for part in parts {
            sum.merge(&part.into_inner().unwrap_or_else(PoisonError::into_inner).totals);
        }
        self.add_totals(id, &sum);
        (codes, scales)
    }

    fn add_totals(&self, id: MatrixId, totals: &Totals) {
        let mut all = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(id).or_default().merge(totals);
    }
}

impl Weights for Quantized {
    fn config(&self) -> &Config {
        self.source.config()
    }

    fn identity(&self) -> Option<Identity> {
        // What calibration found is no function of the source alone.
        self.identity.filter(|_| self.calibrated.is_none())
    }

    fn format(&self, id: MatrixId) -> Format {
        let source = self.source.format(id);
        self.plans.get(&id).map_or(source, |plan| plan.method.format(source))
    }

    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, checkpoint::Error> {
        let source = self.source.matrix(id, expert)?;
        let Some(plan) = self.plans.get(&id) else { return Ok(source) };
        let (rows, cols) = (source.rows, source.cols);
        let values = match (plan.method, &source.values) {
            (Method::Cast, Values::Mxfp4 { codes, scales }) => {
                let (mut out_codes, mut out_scales) = (vec![0; codes.len()], vec![0; scales.len() * 2]);
                let max = plan.max_scales[expert];
                nvfp4::cast_from_mxfp4(codes, scales, max, &mut out_codes, &mut out_scales);
                let global_scale = nvfp4::cast_global_scale(max);
                let values = Values::Nvfp4 {
                    codes: Cow::Owned(out_codes),
                    scales: Cow::Owned(out_scales),
                    global_scale,
                };
                // Comparing values that are known to be equal would only take time.
                if !plan.keeps_values() {
                    let cast = Matrix { rows, cols, values: values.clone() };
                    let mut totals = Totals::default();
                    let (mut before, mut after) = (vec![0.0; cols], vec![0.0; cols]);
                    for row in 0..rows {
                        source.row(row, &mut before);
                        cast.row(row, &mut after);
                        totals.add((expert, row), &before, &after);
                    }
                    self.add_totals(id, &totals);
                }
                values
            }
            (Method::Keep, Values::Nvfp4 { codes, scales, global_scale }) => {
                let Some(shared) = plan.shared_scale else { return Ok(source) };
                let scales = rescaled(scales, *global_scale, shared)
                    .expect("the scales were rescaled when the view was made");
                Values::Nvfp4 { codes: codes.clone(), scales: Cow::Owned(scales), global_scale: shared }
            }
            (Method::Max | Method::Mse | Method::FourOverSix, _) => {
                let amax = plan.amaxes[expert];
                let global_scale = plan.method.global_scale(amax);
                let max_scale = plan.method.max_scale();
                let search = nvfp4::ScaleSearch::new(amax, max_scale);
                let choose = |block: &[f32]| match plan.method {
                    // Nothing to search for in a tensor of zeros.
                    _ if amax == 0.0 => nvfp4::ZERO_BLOCK_SCALE,
                    Method::Mse => search.best_of_sweep(block, false),
                    Method::FourOverSix => search.four_over_six(block),
                    _ => nvfp4::block_scale(nvfp4::amax(block), global_scale),
                };
                let (codes, scales) = self.encode(
                    (id, expert),
                    &source,
                    nvfp4::BLOCK,
                    &|values, codes, scales| {
                        let blocks =
                            values.chunks_exact(nvfp4::BLOCK).zip(codes.chunks_exact_mut(nvfp4::BLOCK / 2));
                        for ((block, codes), scale) in blocks.zip(scales) {
                            *scale = choose(block);
                            nvfp4::encode_block(block, *scale, global_scale, codes);
                        }
                    },
                    &|codes, scales, out| nvfp4::dequantize(codes, scales, global_scale, out),
                );
                Values::Nvfp4 { codes: Cow::Owned(codes), scales: Cow::Owned(scales), global_scale }
            }
            (method, _) if method.calibrates() => {
                let calibrated = self.calibrated.as_ref().ok_or_else(|| checkpoint::Error::Format {
                    tensor: id.name(),
                    expected: "a calibration before it is read".to_owned(),
                    found: "none".to_owned(),
                })?;
                let rounded = calibrated.rounded(id, expert)?;
                let amax = calibrated.amax(id).unwrap_or(plan.amaxes[expert]);
                let global_scale = method.global_scale(amax);
                // Columns that were scaled are compared as they act behind their norm.
                let norm = VectorKind::InputNorm.at(id.layer);
                let behind_norm = matches!(id.kind, MatrixKind::Query | MatrixKind::Key | MatrixKind::Value);
                let scaled = match calibrated.vector(norm)?.filter(|_| behind_norm) {
                    Some(new) => Some((new, self.source.vector(norm)?.to_f32())),
                    None => None,
                };
                let mut totals = Totals::default();
                let mut values = vec![0.0; cols];
                for (row, after) in rounded.values(global_scale).chunks_exact_mut(cols).enumerate() {
                    source.row(row, &mut values);
                    if let Some((new, old)) = &scaled {
                        for ((after, new), old) in after.iter_mut().zip(new).zip(old) {
                            *after *= if new == old { 1.0 } else { new / old };
                        }
                    }
                    totals.add((expert, row), &values, after);
                }
                self.add_totals(id, &totals);
                Values::Nvfp4 {
                    codes: Cow::Owned(rounded.codes),
                    scales: Cow::Owned(rounded.scales),
                    global_scale,
                }
            }
            (Method::Mxfp4, _) => {
                let (codes, scales) =
                    self.encode((id, expert), &source, mxfp4::BLOCK, &mxfp4::quantize, &mxfp4::dequantize);
                Values::Mxfp4 { codes: Cow::Owned(codes), scales: Cow::Owned(scales) }
            }
            (Method::Bf16, _) => {
                let mut out = Vec::with_capacity(rows * cols);
                let mut totals = Totals::default();
                let (mut values, mut rounded) = (vec![0.0; cols], vec![0.0; cols]);
                for row in 0..rows {
                    source.row(row, &mut values);
                    for (rounded, &value) in rounded.iter_mut().zip(&values) {
                        let value = bf16::from_f32(value);
                        *rounded = value.to_f32();
                        out.push(value);
                    }
                    if let Some(at) = rounded.iter().position(|value| !value.is_finite()) {
                        return Err(checkpoint::Error::Format {
                            tensor: id.name(),
                            expected: "values in the range of BF16".to_owned(),
                            found: format!("{} in row {row} of matrix {expert}", values[at]),
                        });
                    }
                    totals.add((expert, row), &values, &rounded);
                }
                self.add_totals(id, &totals);
                Values::Bf16(Cow::Owned(out))
            }
            _ => return Ok(source),
        };
        Ok(Matrix { rows, cols, values })
    }

    fn vector(&self, id: VectorId) -> Result<Vector<'_>, checkpoint::Error> {
        let source = self.source.vector(id)?;
        let Some(calibrated) = &self.calibrated else { return Ok(source) };
        // The type stays, whatever happens to the values: it is known before they are.
        Ok(match (calibrated.vector(id)?, &source) {
            (None, _) => source,
            (Some(values), Vector::F32(_)) => Vector::F32(Cow::Owned(values)),
            (Some(values), Vector::Bf16(_)) => Vector::Bf16(values.into_iter().map(bf16::from_f32).collect()),
        })
    }

    fn input_scale(&self, id: MatrixId) -> Option<f32> {
        if !self.has_input_scale(id) {
            return None;
        }
        let kept = self.plans.get(&id).and_then(|plan| plan.method.kept_input_scale(&*self.source, id));
        if kept.is_some() {
            return kept;
        }
        let Some(calibrated) = &self.calibrated else {
            // So far it is known only that there will be one.
            return Some(input_scale(0.0));
        };
        match id.kind {
            MatrixKind::Unembedding => Some(input_scale(calibrated.final_amax)),
            kind => calibrated.facts().nth(id.layer).map(|facts| facts.input_scale(kind)),
        }
    }

    fn kv_scales(&self, layer: usize) -> Option<KvScales> {
        let kept = self.source.kv_scales(layer);
        if kept.is_some() || !self.kv_scales {
            return kept;
        }
        let Some(calibrated) = &self.calibrated else {
            // So far it is known only that there will be some.
            return Some(KvScales { key: 1.0, value: 1.0 });
        };
        let facts = calibrated.facts().nth(layer)?;
        let scale = |amax: f32| if amax > 0.0 { amax / e4m3::MAX } else { 1.0 };
        Some(KvScales { key: scale(facts.key_amax), value: scale(facts.value_amax) })
    }

    fn release(&self, id: MatrixId, expert: usize) {
        self.source.release(id, expert);
    }
}

/// Rows that one task of the pool encodes: some tens of kilobytes.
const ROWS_PER_TASK: usize = 16;

struct Part<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    totals: Totals,
}

impl Plan {
    fn new(
        source: &dyn Weights,
        id: MatrixId,
        method: Method,
        scales_per: ScalesPer,
        pool: &Pool,
    ) -> Result<Plan, Error> {
        let (count, ..) = id.kind.shape(source.config());
        let mut plan = Plan {
            method,
            max_scales: Vec::new(),
            amaxes: Vec::new(),
            shared_scale: None,
            cast: CastCounts::default(),
        };
        match method {
            // No code stands for NaN or infinity.
            Method::Keep | Method::Bf16 if source.format(id) != Format::Bf16 => {}
            Method::Keep | Method::Bf16 | Method::Mxfp4 => {
                for expert in 0..count {
                    amax(&source.matrix(id, expert)?, id, pool)?;
                    source.release(id, expert);
                }
            }
            Method::Cast => {
                for expert in 0..count {
                    let matrix = source.matrix(id, expert)?;
                    matrix.values.check_scales(&id.name())?;
                    if let Values::Mxfp4 { scales, .. } = &matrix.values {
                        plan.max_scales.push(nvfp4::cast_max_scale(scales));
                    }
                }
                if scales_per == ScalesPer::Stack {
                    let all = plan.max_scales.iter().copied().max().flatten();
                    plan.max_scales.fill(all);
                }
                for expert in 0..count {
                    if let Values::Mxfp4 { codes, scales } = &source.matrix(id, expert)?.values {
                        plan.cast += cast_counts(codes, scales, plan.max_scales[expert]);
                    }
                    source.release(id, expert);
                }
            }
            _ => {
                for expert in 0..count {
                    plan.amaxes.push(amax(&source.matrix(id, expert)?, id, pool)?);
                    source.release(id, expert);
                }
                if scales_per == ScalesPer::Stack {
                    let all = plan.amaxes.iter().copied().fold(0.0, f32::max);
                    plan.amaxes.fill(all);
                }
            }
        }
        Ok(plan)
    }

    /// Whether every value is known to stay as it is.
    fn keeps_values(&self) -> bool {
        match self.method {
            Method::Keep => true,
            Method::Cast => self.cast.changed_values == 0,
            _ => false,
        }
    }
}

impl Method {
    /// The largest block scale that the static form aims at.
    fn max_scale(self) -> f32 {
        if self == Method::FourOverSix { nvfp4::FOUR_OVER_SIX_MAX_SCALE } else { nvfp4::STATIC_MAX_SCALE }
    }

    /// The global scale of a tensor of largest magnitude `amax`.
    fn global_scale(self, amax: f32) -> f32 {
        if matches!(self, Method::Max | Method::Awq) {
            nvfp4::global_scale(amax)
        } else {
            nvfp4::static_global_scale(amax, self.max_scale())
        }
    }
}

/// What a cast would do, without the codes of blocks that need no look.
fn cast_counts(codes: &[u8], scales: &[u8], max_scale: Option<u8>) -> CastCounts {
    let lowest = max_scale.unwrap_or(0).saturating_sub(17).max(1);
    let mut counts = CastCounts::default();
    for (codes, &scale) in codes.chunks_exact(mxfp4::BLOCK / 2).zip(scales) {
        if scale >= lowest {
            counts += CastCounts { blocks: 1, lossless_blocks: 1, changed_values: 0 };
        } else {
            let (mut out_codes, mut out_scales) = ([0; mxfp4::BLOCK / 2], [0; 2]);
            counts += nvfp4::cast_from_mxfp4(codes, &[scale], max_scale, &mut out_codes, &mut out_scales);
        }
    }
    counts
}

/// Gives matrices that run as one product the same global scale, by the largest of their magnitudes.
fn share_scale(plans: &mut BTreeMap<MatrixId, Plan>, ids: &[MatrixId]) {
    let largest = ids
        .iter()
        .filter_map(|id| plans.get(id))
        .flat_map(|plan| plan.amaxes.iter().copied())
        .fold(0.0, f32::max);
    for id in ids {
        if let Some(plan) = plans.get_mut(id) {
            plan.amaxes.fill(largest);
        }
    }
}

/// Gives those of them that stay in NVFP4 as they are the largest of their global scales, if that changes no value.
fn share_kept_scale(
    source: &dyn Weights,
    plans: &mut BTreeMap<MatrixId, Plan>,
    ids: &[MatrixId],
) -> Result<(), Error> {
    let mut scales = Vec::new();
    for &id in ids.iter().filter(|id| plans.get(id).is_some_and(|plan| plan.method == Method::Keep)) {
        if let Values::Nvfp4 { scales: blocks, global_scale, .. } = source.matrix(id, 0)?.values {
            scales.push((id, blocks, global_scale));
        }
    }
    let Some(largest) = scales.iter().map(|&(_, _, scale)| scale).reduce(f32::max) else { return Ok(()) };
    let refused = |found: String| {
        let tensors = ids.iter().map(|id| id.name()).collect::<Vec<_>>().join(", ");
        Err(Error::OneProduct { tensors, found })
    };
    let anew = |id: &MatrixId| plans.get(id).is_some_and(|plan| !plan.amaxes.is_empty());
    if ids.iter().any(anew) {
        return refused("some in nvfp4 and others that are to be quantized".to_owned());
    }
    let fits = |(_, blocks, scale): &(_, Cow<'_, [u8]>, f32)| rescaled(blocks, *scale, largest).is_some();
    if !scales.iter().all(fits) {
        let found = scales.iter().map(|(_, _, scale)| format!("{scale:e}")).collect::<Vec<_>>();
        return refused(found.join(", "));
    }
    for (id, ..) in scales.into_iter().filter(|&(_, _, scale)| scale != largest) {
        if let Some(plan) = plans.get_mut(&id) {
            plan.shared_scale = Some(largest);
        }
    }
    Ok(())
}

/// The block scales with which `shared` as the global scale gives the values that they had with `own`, if there are any.
fn rescaled(scales: &[u8], own: f32, shared: f32) -> Option<Vec<u8>> {
    let ratio = own / shared;
    // A power of two has no mantissa.
    let exact = ratio * shared == own && ratio.to_bits() & 0x007f_ffff == 0;
    let scale = |&byte: &u8| {
        let value = e4m3::decode(byte) * ratio;
        let byte = e4m3::encode(value);
        (e4m3::decode(byte) == value).then_some(byte)
    };
    if exact { scales.iter().map(scale).collect() } else { None }
}

fn check_shape(source: &dyn Weights, id: MatrixId, method: Method) -> Result<(), Error> {
    let (_, _, cols) = id.kind.shape(source.config());
    let block = match method {
        Method::Keep | Method::Cast | Method::Bf16 => return Ok(()),
        Method::Mxfp4 => mxfp4::BLOCK,
        _ => nvfp4::BLOCK,
    };
    if cols % block == 0 { Ok(()) } else { Err(Error::Ragged { tensor: id.name(), block, cols }) }
}

/// The largest magnitude of a matrix; an error if a value is not finite.
fn amax(matrix: &Matrix<'_>, id: MatrixId, pool: &Pool) -> Result<f32, Error> {
    matrix.values.check_scales(&id.name())?;
    let parts: Vec<Mutex<f32>> = (0..matrix.rows.div_ceil(ROWS_PER_TASK)).map(|_| Mutex::new(0.0)).collect();
    pool.run(parts.len(), &|task| {
        let mut values = vec![0.0; matrix.cols];
        let first = task * ROWS_PER_TASK;
        let mut largest = 0.0f32;
        for row in first..(first + ROWS_PER_TASK).min(matrix.rows) {
            matrix.row(row, &mut values);
            let own = nvfp4::amax(&values);
            if own > largest || own.is_nan() {
                largest = own;
            }
            if !largest.is_finite() {
                break;
            }
        }
        *parts[task].lock().unwrap_or_else(PoisonError::into_inner) = largest;
    });
    let mut largest = 0.0f32;
    for part in parts {
        let own = part.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !own.is_finite() {
            return Err(Error::NotFinite { tensor: id.name(), found: own });
        }
        largest = largest.max(own);
    }
    Ok(largest)
}
