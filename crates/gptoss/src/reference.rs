//! The forward pass in f32, in the order of the paper: the oracle of every other backend.
//!
//! It decodes each weight where it is used and computes one sequence after the other with plain loops. `gpt-oss.md`
//! sections 2.1 to 2.6 and `gpt_oss/torch/model.py` of openai/gpt-oss can be read beside it.

use std::sync::Arc;

use checkpoint::{Config, Format, LayerKind, MatrixId, MatrixKind, VectorId, VectorKind, Weights};
use numerics::{e4m3, nvfp4};

use crate::backend::{BLOCK_TOKENS, Backend, BlockId, Error, KvLayout, Plan, SequenceOutput, SequencePlan};
use crate::rope::{Rotary, rotate};
use crate::sampling::{is_corrupted, sample, score};

/// Called with each intermediate of a layer: layer, name, values `[tokens, …]`.
pub type Tap<'a> = dyn FnMut(usize, &'static str, &[f32]) + 'a;

/// The reference backend.
pub struct Reference {
    weights: Arc<dyn Weights>,
    rotary: Rotary,
    /// Per layer, keys and values `[blocks, BLOCK_TOKENS, kv heads · head size]`.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    full_blocks: usize,
    sliding_blocks: usize,
    rounding: Rounding,
}

/// What else than weights a model may be made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rounding {
    /// Inputs of NVFP4 matrices that have an input scale are rounded to NVFP4 with it.
    pub inputs: bool,
    /// Keys and values are kept in E4M3, with the layer's scales, or 1 if there are none.
    pub cache: bool,
}

impl Reference {
    /// A backend that reads `weights` at every step.
    pub fn new(weights: Arc<dyn Weights>) -> Reference {
        let config = weights.config();
        let rotary = Rotary::new(&config.rope, config.head_dim);
        let layers = config.layer_kinds.len();
        let none = || vec![Vec::new(); layers];
        Reference {
            rotary,
            keys: none(),
            values: none(),
            weights,
            full_blocks: 0,
            sliding_blocks: 0,
            rounding: Rounding::default(),
        }
    }

    /// The same that rounds more than weights.
    pub fn rounding(self, rounding: Rounding) -> Reference {
        Reference { rounding, ..self }
    }

    /// Runs the layers over one sequence and returns the residual stream `[tokens, hidden]` after the last of them, or
    /// after `layers` of them.
    pub fn forward(
        &mut self,
        sequence: &SequencePlan,
        layers: usize,
        tap: &mut Tap<'_>,
    ) -> Result<Vec<f32>, Error> {
        let config = self.weights.config().clone();
        let embedding = self.weights.matrix(MatrixKind::Embedding.at(0), 0)?;
        let mut x = vec![0.0; sequence.tokens.len() * config.hidden_size];
        for (x, &token) in x.chunks_exact_mut(config.hidden_size).zip(&sequence.tokens) {
            embedding.row(token as usize, x);
        }
        drop(embedding);
        for layer in 0..layers {
            tap(layer, "hidden_in", &x);
            let h = self.norm(&x, VectorKind::InputNorm.at(layer))?;
            tap(layer, "attn_norm", &h);
            let a = self.attention(layer, &h, sequence, tap)?;
            tap(layer, "o_proj", &a);
            add(&mut x, &a);
            let h = self.norm(&x, VectorKind::PostAttentionNorm.at(layer))?;
            tap(layer, "mlp_norm", &h);
            let m = self.moe(layer, &h, tap)?;
            tap(layer, "mlp_out", &m);
            add(&mut x, &m);
        }
        Ok(x)
    }

    /// The final norm, then the logits `[tokens, vocabulary]`.
    pub fn logits(&self, x: &[f32]) -> Result<Vec<f32>, Error> {
        let x = self.norm(x, VectorKind::FinalNorm.at(0))?;
        self.linear(&x, MatrixKind::Unembedding.at(0), 0, None)
    }

    /// RMSNorm over each token; the product with the scale is taken in f32.
    pub fn norm(&self, x: &[f32], scale: VectorId) -> Result<Vec<f32>, Error> {
        let config = self.weights.config();
        let scale = self.weights.vector(scale)?.to_f32();
        let mut out = Vec::with_capacity(x.len());
        for x in x.chunks_exact(config.hidden_size) {
            let mean = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
            let inverse = 1.0 / (mean + config.rms_norm_eps).sqrt();
            out.extend(x.iter().zip(&scale).map(|(v, g)| v * inverse * g));
        }
        Ok(out)
    }

    fn attention(
        &mut self,
        layer: usize,
        h: &[f32],
        sequence: &SequencePlan,
        tap: &mut Tap<'_>,
    ) -> Result<Vec<f32>, Error> {
        let config = self.weights.config().clone();
        let (d, groups) = (config.head_dim, config.query_heads / config.kv_heads);
        let mut q = self.linear(h, MatrixKind::Query.at(layer), 0, Some(VectorKind::QueryBias))?;
        let mut k = self.linear(h, MatrixKind::Key.at(layer), 0, Some(VectorKind::KeyBias))?;
        let v = self.linear(h, MatrixKind::Value.at(layer), 0, Some(VectorKind::ValueBias))?;
        tap(layer, "q_pre_rope", &q);
        tap(layer, "k_pre_rope", &k);
        tap(layer, "v", &v);

        let (mut cos, mut sin) = (vec![0.0; d / 2], vec![0.0; d / 2]);
        let (q_width, kv_width) = (config.query_heads * d, config.kv_heads * d);
        for t in 0..sequence.tokens.len() {
            self.rotary.at(sequence.position + t, &mut cos, &mut sin);
            let (q, k) = (&mut q[t * q_width..][..q_width], &mut k[t * kv_width..][..kv_width]);
            q.chunks_exact_mut(d).chain(k.chunks_exact_mut(d)).for_each(|head| rotate(head, &cos, &sin));
        }
        tap(layer, "q_rope", &q);
        tap(layer, "k_rope", &k);

        let sliding = config.layer_kinds[layer] == LayerKind::Sliding;
        let blocks = if sliding { &sequence.sliding_blocks } else { &sequence.full_blocks };
        for (t, (k, v)) in k.chunks_exact(kv_width).zip(v.chunks_exact(kv_width)).enumerate() {
            let at = slot(blocks, sequence.position + t) * kv_width;
            self.keys[layer][at..at + kv_width].copy_from_slice(k);
            self.values[layer][at..at + kv_width].copy_from_slice(v);
            if self.rounding.cache {
                let scales = self.weights.kv_scales(layer);
                let (key, value) = scales.map_or((1.0, 1.0), |scales| (scales.key, scales.value));
                let round = |v: &mut f32, scale: f32| *v = e4m3::decode(e4m3::encode(*v / scale)) * scale;
                self.keys[layer][at..at + kv_width].iter_mut().for_each(|v| round(v, key));
                self.values[layer][at..at + kv_width].iter_mut().for_each(|v| round(v, value));
            }
        }

        let sinks = self.weights.vector(VectorKind::Sinks.at(layer))?.to_f32();
        let mut context = vec![0.0; q.len()];
        let mut sink_mass = Vec::new();
        for (t, (q, context)) in q.chunks_exact(q_width).zip(context.chunks_exact_mut(q_width)).enumerate() {
            let position = sequence.position + t;
            let first = if sliding { (position + 1).saturating_sub(config.sliding_window) } else { 0 };
            for (head, (q, out)) in q.chunks_exact(d).zip(context.chunks_exact_mut(d)).enumerate() {
                // Query head j reads kv head j / groups.
                let at = |p: usize| slot(blocks, p) * kv_width + head / groups * d;
                let key = |p: usize| &self.keys[layer][at(p)..][..d];
                let scores: Vec<f32> =
                    (first..=position).map(|p| dot(q, key(p)) / (d as f32).sqrt()).collect();
                // The sink is one more logit of the denominator, without a value.
                let max = scores.iter().copied().fold(sinks[head], f32::max);
                let sink = (sinks[head] - max).exp();
                let sum: f32 = sink + scores.iter().map(|s| (s - max).exp()).sum::<f32>();
                sink_mass.push(sink / sum);
                for (p, s) in (first..=position).zip(&scores) {
                    let probability = (s - max).exp() / sum;
                    for (out, v) in out.iter_mut().zip(&self.values[layer][at(p)..][..d]) {
                        *out += probability * v;
                    }
                }
            }
        }
        tap(layer, "sink_prob", &sink_mass);
        tap(layer, "attn_ctx", &context);
        self.linear(&context, MatrixKind::Output.at(layer), 0, Some(VectorKind::OutputBias))
    }

    fn moe(&self, layer: usize, h: &[f32], tap: &mut Tap<'_>) -> Result<Vec<f32>, Error> {
        let config = self.weights.config();
        let width = config.hidden_size;
        let router = self.linear(h, MatrixKind::Router.at(layer), 0, Some(VectorKind::RouterBias))?;
        tap(layer, "router_logits", &router);
        let routes: Vec<Vec<(usize, f32)>> =
            router.chunks_exact(config.experts).map(|g| top_experts(g, config.experts_per_token)).collect();
        let weights: Vec<f32> = routes.iter().flatten().map(|&(_, w)| w).collect();
        tap(layer, "topk_weights", &weights);
        let indices: Vec<f32> = routes.iter().flatten().map(|&(e, _)| e as f32).collect();
        tap(layer, "topk_indices", &indices);

        // One expert after the other, so that each is decoded once; the weighted sum is taken afterwards, by rank.
        let mut outputs = vec![0.0; routes.len() * config.experts_per_token * width];
        for expert in 0..config.experts {
            let chosen: Vec<(usize, usize)> = (0..routes.len())
                .filter_map(|t| Some((t, routes[t].iter().position(|&(e, _)| e == expert)?)))
                .collect();
            if chosen.is_empty() {
                continue;
            }
            let input: Vec<f32> =
                chosen.iter().flat_map(|&(t, _)| &h[t * width..(t + 1) * width]).copied().collect();
            let z =
                self.linear(&input, MatrixKind::GateUp.at(layer), expert, Some(VectorKind::GateUpBias))?;
            let y = swiglu(&z, config);
            let out = self.linear(&y, MatrixKind::Down.at(layer), expert, Some(VectorKind::DownBias))?;
            for (&(t, rank), out) in chosen.iter().zip(out.chunks_exact(width)) {
                let at = (t * config.experts_per_token + rank) * width;
                outputs[at..at + width].copy_from_slice(out);
            }
        }
        let mut sum = vec![0.0; h.len()];
        for (t, sum) in sum.chunks_exact_mut(width).enumerate() {
            for (rank, &(_, weight)) in routes[t].iter().enumerate() {
                let out = &outputs[(t * config.experts_per_token + rank) * width..][..width];
                sum.iter_mut().zip(out).for_each(|(sum, out)| *sum += weight * out);
            }
        }
        Ok(sum)
    }

    /// `y = x Wᵀ + b` over each token; `bias` is of the same layer and, for expert matrices, holds a row per expert.
    fn linear(
        &self,
        x: &[f32],
        id: MatrixId,
        expert: usize,
        bias: Option<VectorKind>,
    ) -> Result<Vec<f32>, Error> {
        let matrix = self.weights.matrix(id, expert)?;
        let mut rounded = Vec::new();
        let scale = self.weights.input_scale(id).filter(|_| self.rounding.inputs);
        let x = match scale.filter(|_| self.weights.format(id) == Format::Nvfp4) {
            Some(scale) => {
                rounded.resize(x.len(), 0.0);
                nvfp4::fake_quantize_activations(x, scale, &mut rounded);
                &rounded[..]
            }
            None => x,
        };
        let tokens = x.len() / matrix.cols;
        let mut row = vec![0.0; matrix.cols];
        let mut y = vec![0.0; tokens * matrix.rows];
        for r in 0..matrix.rows {
            matrix.row(r, &mut row);
            for t in 0..tokens {
                y[t * matrix.rows + r] = dot(&row, &x[t * matrix.cols..(t + 1) * matrix.cols]);
            }
        }
        if let Some(bias) = bias {
            let bias = self.weights.vector(bias.at(id.layer))?.to_f32();
            let bias = &bias[expert * matrix.rows..(expert + 1) * matrix.rows];
            y.chunks_exact_mut(matrix.rows).for_each(|y| add(y, bias));
        }
        Ok(y)
    }
}

impl Backend for Reference {
    fn config(&self) -> &Config {
        self.weights.config()
    }

    fn describe(&self) -> String {
        "reference (f32, one thread)".to_owned()
    }

    fn kv_layout(&self) -> KvLayout {
        KvLayout::new(self.weights.config(), size_of::<f32>())
    }

    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> Result<(), Error> {
        let config = self.weights.config();
        let width = config.kv_heads * config.head_dim;
        for (layer, kind) in config.layer_kinds.iter().enumerate() {
            let blocks = if *kind == LayerKind::Sliding { sliding_blocks } else { full_blocks };
            self.keys[layer] = vec![0.0; blocks * BLOCK_TOKENS * width];
            self.values[layer] = vec![0.0; blocks * BLOCK_TOKENS * width];
        }
        (self.full_blocks, self.sliding_blocks) = (full_blocks, sliding_blocks);
        Ok(())
    }

    fn step(&mut self, plan: &Plan) -> Result<Vec<SequenceOutput>, Error> {
        let config = self.weights.config().clone();
        plan.check(&config, self.full_blocks, self.sliding_blocks)?;
        let mut outputs = Vec::with_capacity(plan.sequences.len());
        for sequence in &plan.sequences {
            let mut output = SequenceOutput::default();
            let layers = config.layer_kinds.len();
            let mut hidden = Vec::new();
            let x = self.forward(sequence, layers, &mut |layer, name, values| {
                // The input of the next layer is the output of this one.
                if name == "hidden_in" && sequence.hidden_after_layer.is_some_and(|l| l + 1 == layer) {
                    hidden = values.to_vec();
                }
            })?;
            output.hidden = hidden;
            if sequence.hidden_after_layer == Some(layers - 1) {
                output.hidden.clone_from(&x);
            }
            if sequence.logits {
                output.logits = self.logits(&x)?;
                output.corrupted |= is_corrupted(&output.logits);
            }
            if let Some(wanted) = &sequence.score {
                for (x, &next) in x.chunks_exact(config.hidden_size).zip(&wanted.next) {
                    let logits = self.logits(x)?;
                    output.corrupted |= is_corrupted(&logits);
                    output.scores.push(score(&logits, next, wanted.top, &[]));
                }
            }
            let first = x.len() - sequence.sample.len() * config.hidden_size;
            for (x, sampling) in x[first..].chunks_exact(config.hidden_size).zip(&sequence.sample) {
                let mut logits = self.logits(x)?;
                output.corrupted |= is_corrupted(&logits);
                output.sampled.push(sample(&mut logits, sampling));
            }
            outputs.push(output);
        }
        Ok(outputs)
    }
}

/// The `k` largest router logits as (expert, weight): value descending, the lower index first on a tie; the weights are the
/// softmax over the selected.
pub fn top_experts(logits: &[f32], k: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(k);
    let max = logits[order[0]];
    let sum: f32 = order.iter().map(|&e| (logits[e] - max).exp()).sum();
    order.into_iter().map(|e| (e, (logits[e] - max).exp() / sum)).collect()
}

/// gpt-oss's clamped SwiGLU over interleaved gate and up: `(up + 1) · gate · sigmoid(alpha · gate)`. The gate has no lower
/// clamp.
pub fn swiglu(z: &[f32], config: &Config) -> Vec<f32> {
    z.chunks_exact(2)
        .map(|pair| {
            // Not `min`, which would make a NaN the limit.
            let gate = if pair[0] > config.swiglu_limit { config.swiglu_limit } else { pair[0] };
            let up = pair[1].clamp(-config.swiglu_limit, config.swiglu_limit);
            (up + 1.0) * gate / (1.0 + (-config.swiglu_alpha * gate).exp())
        })
        .collect()
}

/// Where position `position` is stored, counted in positions.
fn slot(blocks: &[BlockId], position: usize) -> usize {
    blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Eight partial sums, which the compiler keeps in vector registers and which lose less than one running sum.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0f32; 8];
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}
