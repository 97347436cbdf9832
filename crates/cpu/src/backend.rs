//! The backend: packed weights, the key/value cache and the step over a ragged batch.

use std::sync::Arc;

use checkpoint::{Config, LayerKind, MatrixKind, Values, VectorKind, Weights};
use gptoss::{
    BLOCK_TOKENS, Backend, Error, KvLayout, Plan, Rotary, Sampling, SequenceOutput, SequencePlan, Traffic,
    sample, score,
};

use crate::kernels::{Attend, Isa, Kernels};
use crate::packed::{Job, Output, PackedMatrix, Product, multiply};
use crate::pool::{Pool, physical_cores};
use crate::simd::LANES;

// A block of keys is one vector per entry of the head.
const _: () = assert!(BLOCK_TOKENS == LANES);

/// Rows of logits that exist at a time: 16 rows of the 20b's vocabulary are 13 MB.
const LOGIT_ROWS: usize = 16;

/// How to run on this CPU.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Threads; `None`: one per physical core.
    pub threads: Option<usize>,
    /// Instruction set; `None`: the best available.
    pub isa: Option<Isa>,
}

/// gpt-oss on CPU cores, activations in f32.
pub struct Cpu {
    config: Config,
    kernels: &'static Kernels,
    pool: Pool,
    rotary: Rotary,
    /// The embedding is looked up where it lies: in the mapped file, or in the matrix made for it.
    weights: Arc<dyn Weights>,
    embedding: Option<checkpoint::Matrix<'static>>,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    unembedding: PackedMatrix,
    cache: Vec<LayerCache>,
    blocks: (usize, usize),
}

struct Layer {
    input_norm: Vec<f32>,
    query: PackedMatrix,
    key: PackedMatrix,
    value: PackedMatrix,
    output: PackedMatrix,
    query_bias: Vec<f32>,
    key_bias: Vec<f32>,
    value_bias: Vec<f32>,
    output_bias: Vec<f32>,
    sinks: Vec<f32>,
    post_attention_norm: Vec<f32>,
    router: PackedMatrix,
    router_bias: Vec<f32>,
    gate_up: PackedMatrix,
    gate_up_bias: Vec<f32>,
    down: PackedMatrix,
    down_bias: Vec<f32>,
}

/// Keys `[blocks, kv heads, head size, 16]` and values `[blocks, kv heads, 16, head size]` of one layer.
#[derive(Default)]
struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Cpu {
    /// Packs `weights` tensor by tensor. `progress` is called with the layers done and their number.
    pub fn load(
        weights: Arc<dyn Weights>,
        options: Options,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Cpu, Error> {
        let config = weights.config().clone();
        let isa = options.isa.unwrap_or_else(Isa::best);
        let kernels = isa
            .kernels()
            .ok_or_else(|| Error::Unsupported(format!("this CPU does not have {}", isa.name())))?;
        let pool = Pool::new(options.threads.unwrap_or_else(physical_cores));
        let count = config.layer_kinds.len();
        let mut layers = Vec::with_capacity(count);
        for layer in 0..count {
            progress(layer, count);
            layers.push(Layer::load(&*weights, layer, &pool)?);
        }
        let unembedding = PackedMatrix::load(&*weights, MatrixKind::Unembedding.at(0), &pool)?;
        let final_norm = weights.vector(VectorKind::FinalNorm.at(0))?.to_f32();
        let embedding = keep_if_owned(weights.matrix(MatrixKind::Embedding.at(0), 0)?);
        progress(count, count);
        let rotary = Rotary::new(&config.rope, config.head_dim);
        let cache = (0..count).map(|_| LayerCache::default()).collect();
        Ok(Cpu {
            config,
            kernels,
            pool,
            rotary,
            weights,
            embedding,
            layers,
            final_norm,
            unembedding,
            cache,
            blocks: (0, 0),
        })
    }

    /// What a step reads.
    pub fn traffic(&self) -> Traffic {
        let config = &self.config;
        let dense = |l: &Layer| {
            [&l.query, &l.key, &l.value, &l.output, &l.router].iter().map(|m| m.bytes()).sum::<usize>()
        };
        let layout = self.kv_layout();
        Traffic {
            dense_bytes: self.layers.iter().map(dense).sum::<usize>() + self.unembedding.bytes(),
            expert_bytes: self.layers.first().map_or(0, |l| l.gate_up.matrix_bytes() + l.down.matrix_bytes()),
            layers: self.layers.len(),
            experts: config.experts,
            experts_per_token: config.experts_per_token,
            full_kv_bytes: layout.full_block_bytes / BLOCK_TOKENS,
            sliding_kv_bytes: layout.sliding_block_bytes / BLOCK_TOKENS,
            sliding_window: config.sliding_window,
        }
    }

    /// The pool that the kernels run on.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    fn embed(&self, plan: &Plan) -> Result<Vec<f32>, Error> {
        let mapped;
        let embedding = match &self.embedding {
            Some(kept) => kept,
            None => {
                mapped = self.weights.matrix(MatrixKind::Embedding.at(0), 0)?;
                &mapped
            }
        };
        let tokens = plan.sequences.iter().flat_map(|s| &s.tokens);
        let mut x = vec![0.0; tokens.clone().count() * self.config.hidden_size];
        for (x, &token) in x.chunks_exact_mut(self.config.hidden_size).zip(tokens) {
            embedding.row(token as usize, x);
        }
        Ok(x)
    }

    fn norm(&self, x: &[f32], scale: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        let width = self.config.hidden_size;
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            // SAFETY: the kernels were chosen for this CPU; the config makes the width a multiple of 32.
            unsafe { (self.kernels.rms_norm)(x, scale, self.config.rms_norm_eps, out) };
        }
        out
    }

    /// Attention of one layer over the batch: `h` is normed, the result is added to `x`.
    fn attention(&mut self, index: usize, h: &[f32], x: &mut [f32], plan: &Plan, tables: &Tables) {
        let (config, layer) = (&self.config, &self.layers[index]);
        let (size, groups) = (config.head_dim, config.query_heads / config.kv_heads);
        let (q_width, kv_width) = (config.query_heads * size, config.kv_heads * size);
        let stride = q_width + 2 * kv_width;
        let tokens = h.len() / config.hidden_size;

        let mut qkv = vec![0.0; tokens * stride];
        let out = Output::new(&mut qkv);
        let part = |matrix, bias, offset| Job {
            product: Product { matrix, expert: 0, x: h, take: None, bias: Some(bias) },
            out,
            offset,
            stride,
        };
        let jobs = [
            part(&layer.query, &layer.query_bias[..], 0),
            part(&layer.key, &layer.key_bias, q_width),
            part(&layer.value, &layer.value_bias, q_width + kv_width),
        ];
        multiply(&self.pool, self.kernels, &jobs);

        // Rotate, scale the queries (exact for a head size that is a power of four), store keys and values.
        let sliding = config.layer_kinds[index] == LayerKind::Sliding;
        let cache = &mut self.cache[index];
        let block_len = kv_width * BLOCK_TOKENS;
        let scale = 1.0 / (size as f32).sqrt();
        let half = size / 2;
        let mut row = 0;
        for sequence in &plan.sequences {
            let blocks = if sliding { &sequence.sliding_blocks } else { &sequence.full_blocks };
            for t in 0..sequence.tokens.len() {
                let (cos, sin) = (&tables.cos[row * half..][..half], &tables.sin[row * half..][..half]);
                let qkv = &mut qkv[row * stride..][..stride];
                for (head, values) in qkv[..q_width + kv_width].chunks_exact_mut(size).enumerate() {
                    let (first, second) = values.split_at_mut(half);
                    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                    if head < config.query_heads {
                        values.iter_mut().for_each(|v| *v *= scale);
                    }
                }
                let position = sequence.position + t;
                let at = blocks[position / BLOCK_TOKENS] as usize * block_len;
                let lane = position % BLOCK_TOKENS;
                let (keys, values) = qkv[q_width..].split_at(kv_width);
                for (e, &key) in keys.iter().enumerate() {
                    cache.keys[at + e * BLOCK_TOKENS + lane] = key;
                }
                for (head, values) in values.chunks_exact(size).enumerate() {
                    let to = at + (head * BLOCK_TOKENS + lane) * size;
                    cache.values[to..to + size].copy_from_slice(values);
                }
                row += 1;
            }
        }

        // One task per key/value head and a few tokens.
        const TASK_TOKENS: usize = 4;
        let cache = &self.cache[index];
        let width = layer.output.cols;
        let mut context = vec![0.0; tokens * width];
        let out = Output::new(&mut context);
        let token_tasks = tokens.div_ceil(TASK_TOKENS);
        self.pool.run(token_tasks * config.kv_heads, &|task| {
            let head = task % config.kv_heads;
            let mut scores = Vec::new();
            let from = task / config.kv_heads * TASK_TOKENS;
            for row in from..(from + TASK_TOKENS).min(tokens) {
                let (s, position) = tables.rows[row];
                let sequence = &plan.sequences[s];
                let job = Attend {
                    queries: &qkv[row * stride + head * groups * size..][..groups * size],
                    sinks: &layer.sinks[head * groups..][..groups],
                    keys: &cache.keys[head * size * BLOCK_TOKENS..],
                    values: &cache.values[head * size * BLOCK_TOKENS..],
                    stride: block_len,
                    blocks: if sliding { &sequence.sliding_blocks } else { &sequence.full_blocks },
                    first: if sliding { (position + 1).saturating_sub(config.sliding_window) } else { 0 },
                    last: position,
                };
                // SAFETY: each task has its own heads of its own rows; the kernels were chosen for this CPU.
                unsafe {
                    let out = out.slice(row * width + head * groups * size, groups * size);
                    (self.kernels.attend)(&job, &mut scores, out);
                }
            }
        });

        let a = self.product(&layer.output, &context, &layer.output_bias);
        add(x, &a);
    }

    /// The mixture of experts of one layer: `h` is normed, the result is added to `x`.
    fn moe(&self, index: usize, h: &[f32], x: &mut [f32]) {
        let (config, layer) = (&self.config, &self.layers[index]);
        let (d, i, k) = (config.hidden_size, config.intermediate_size, config.experts_per_token);
        let router = self.product(&layer.router, h, &layer.router_bias);
        let routes: Vec<Vec<(usize, f32)>> =
            router.chunks_exact(config.experts).map(|logits| gptoss::top_experts(logits, k)).collect();

        // Group by expert; slot `s` of the results belongs to the s-th (expert, token) pair in expert order.
        let mut tokens_of = vec![Vec::new(); config.experts];
        for (t, route) in routes.iter().enumerate() {
            for &(expert, _) in route {
                tokens_of[expert].push(t);
            }
        }
        let mut first_slot = vec![0; config.experts];
        let mut slots = 0;
        for (first, tokens) in first_slot.iter_mut().zip(&tokens_of) {
            *first = slots;
            slots += tokens.len();
        }

        let mut z = vec![0.0; slots * 2 * i];
        let out = Output::new(&mut z);
        let active = || (0..config.experts).filter(|&e| !tokens_of[e].is_empty());
        let jobs: Vec<Job<'_>> = active()
            .map(|expert| Job {
                product: Product {
                    matrix: &layer.gate_up,
                    expert,
                    x: h,
                    take: Some(&tokens_of[expert]),
                    bias: Some(&layer.gate_up_bias[expert * 2 * i..][..2 * i]),
                },
                out,
                offset: first_slot[expert] * 2 * i,
                stride: 2 * i,
            })
            .collect();
        multiply(&self.pool, self.kernels, &jobs);

        let mut y = vec![0.0; slots * i];
        let out = Output::new(&mut y);
        self.pool.run(slots, &|slot| {
            // SAFETY: each task has its own slot; the kernels were chosen for this CPU, `z` has twice the length.
            unsafe {
                let out = out.slice(slot * i, i);
                (self.kernels.swiglu)(
                    &z[slot * 2 * i..][..2 * i],
                    config.swiglu_limit,
                    config.swiglu_alpha,
                    out,
                );
            }
        });

        let mut results = vec![0.0; slots * d];
        let out = Output::new(&mut results);
        let jobs: Vec<Job<'_>> = active()
            .map(|expert| Job {
                product: Product {
                    matrix: &layer.down,
                    expert,
                    x: &y[first_slot[expert] * i..][..tokens_of[expert].len() * i],
                    take: None,
                    bias: Some(&layer.down_bias[expert * d..][..d]),
                },
                out,
                offset: first_slot[expert] * d,
                stride: d,
            })
            .collect();
        multiply(&self.pool, self.kernels, &jobs);

        // The weighted sum in the order of the ranks; tokens ascend within an expert, so a counter finds the slot.
        let mut next_slot = first_slot;
        let mut sum = vec![0.0; d];
        for (x, route) in x.chunks_exact_mut(d).zip(&routes) {
            sum.fill(0.0);
            for &(expert, weight) in route {
                let result = &results[next_slot[expert] * d..][..d];
                next_slot[expert] += 1;
                sum.iter_mut().zip(result).for_each(|(sum, r)| *sum += weight * r);
            }
            add(x, &sum);
        }
    }

    fn product(&self, matrix: &PackedMatrix, x: &[f32], bias: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len() / matrix.cols * matrix.rows];
        let job = Job {
            product: Product { matrix, expert: 0, x, take: None, bias: (!bias.is_empty()).then_some(bias) },
            out: Output::new(&mut out),
            offset: 0,
            stride: matrix.rows,
        };
        multiply(&self.pool, self.kernels, &[job]);
        out
    }

    fn logits(&self, x: &[f32]) -> Vec<f32> {
        self.product(&self.unembedding, &self.norm(x, &self.final_norm), &[])
    }

    /// What the plan asks for one sequence, from its residual stream `[tokens, hidden]`.
    fn output(&self, sequence: &SequencePlan, x: &[f32]) -> SequenceOutput {
        let (d, vocabulary) = (self.config.hidden_size, self.config.vocab_size);
        let mut output = SequenceOutput::default();
        let scored = sequence.score.as_ref().map_or(0, |s| s.next.len());
        let rows = if sequence.logits { sequence.tokens.len() } else { scored };
        for first in (0..rows).step_by(LOGIT_ROWS) {
            let count = LOGIT_ROWS.min(rows - first);
            let logits = self.logits(&x[first * d..(first + count) * d]);
            if let Some(wanted) = &sequence.score {
                let next = wanted.next.iter().skip(first);
                output.scores.extend(
                    logits
                        .chunks_exact(vocabulary)
                        .zip(next)
                        .map(|(row, &next)| score(row, next, wanted.top)),
                );
            }
            if sequence.logits {
                output.logits.extend(logits);
            }
        }
        output
    }
}

impl Layer {
    fn load(weights: &dyn Weights, layer: usize, pool: &Pool) -> Result<Layer, Error> {
        let matrix = |kind: MatrixKind| PackedMatrix::load(weights, kind.at(layer), pool);
        let vector = |kind: VectorKind| weights.vector(kind.at(layer)).map(|v| v.to_f32());
        Ok(Layer {
            input_norm: vector(VectorKind::InputNorm)?,
            query: matrix(MatrixKind::Query)?,
            key: matrix(MatrixKind::Key)?,
            value: matrix(MatrixKind::Value)?,
            output: matrix(MatrixKind::Output)?,
            query_bias: vector(VectorKind::QueryBias)?,
            key_bias: vector(VectorKind::KeyBias)?,
            value_bias: vector(VectorKind::ValueBias)?,
            output_bias: vector(VectorKind::OutputBias)?,
            sinks: vector(VectorKind::Sinks)?,
            post_attention_norm: vector(VectorKind::PostAttentionNorm)?,
            router: matrix(MatrixKind::Router)?,
            router_bias: vector(VectorKind::RouterBias)?,
            gate_up: matrix(MatrixKind::GateUp)?,
            gate_up_bias: vector(VectorKind::GateUpBias)?,
            down: matrix(MatrixKind::Down)?,
            down_bias: vector(VectorKind::DownBias)?,
        })
    }
}

impl Backend for Cpu {
    fn config(&self) -> &Config {
        &self.config
    }

    fn describe(&self) -> String {
        let threads = self.pool.threads();
        format!("CPU, {}, {threads} thread{}", self.kernels.isa.name(), if threads == 1 { "" } else { "s" })
    }

    fn kv_layout(&self) -> KvLayout {
        KvLayout::f32(&self.config)
    }

    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> Result<(), Error> {
        let width = self.config.kv_heads * self.config.head_dim * BLOCK_TOKENS;
        for (cache, kind) in self.cache.iter_mut().zip(&self.config.layer_kinds) {
            let blocks = if *kind == LayerKind::Sliding { sliding_blocks } else { full_blocks };
            let len = blocks.checked_mul(width).ok_or(Error::Memory { needed: usize::MAX })?;
            // The old cache is given back first: two never exist at once.
            *cache = LayerCache::default();
            *cache = LayerCache { keys: zeros(len)?, values: zeros(len)? };
        }
        self.blocks = (full_blocks, sliding_blocks);
        Ok(())
    }

    fn step(&mut self, plan: &Plan) -> Result<Vec<SequenceOutput>, Error> {
        plan.check(&self.config, self.blocks.0, self.blocks.1)?;
        let d = self.config.hidden_size;
        let tables = Tables::new(plan, &self.rotary);
        let mut x = self.embed(plan)?;
        let mut hidden = vec![Vec::new(); plan.sequences.len()];
        for layer in 0..self.layers.len() {
            let h = self.norm(&x, &self.layers[layer].input_norm);
            self.attention(layer, &h, &mut x, plan, &tables);
            let h = self.norm(&x, &self.layers[layer].post_attention_norm);
            self.moe(layer, &h, &mut x);
            for (s, rows) in tables.ranges.iter().enumerate() {
                if plan.sequences[s].hidden_after_layer == Some(layer) {
                    hidden[s] = x[rows.start * d..rows.end * d].to_vec();
                }
            }
        }
        let mut outputs: Vec<SequenceOutput> = Vec::with_capacity(plan.sequences.len());
        for ((sequence, rows), hidden) in plan.sequences.iter().zip(&tables.ranges).zip(hidden) {
            let mut output = self.output(sequence, &x[rows.start * d..rows.end * d]);
            output.hidden = hidden;
            outputs.push(output);
        }
        // The sampled rows of all sequences share one pass over the output layer.
        let sampled: Vec<(usize, usize, &Sampling)> = plan
            .sequences
            .iter()
            .zip(&tables.ranges)
            .enumerate()
            .flat_map(|(s, (sequence, rows))| {
                let rows = rows.end - sequence.sample.len()..rows.end;
                rows.zip(&sequence.sample).map(move |(row, sampling)| (s, row, sampling))
            })
            .collect();
        for group in sampled.chunks(LOGIT_ROWS) {
            let rows: Vec<f32> =
                group.iter().flat_map(|&(_, row, _)| &x[row * d..(row + 1) * d]).copied().collect();
            let mut logits = self.logits(&rows);
            for (&(s, _, sampling), logits) in
                group.iter().zip(logits.chunks_exact_mut(self.config.vocab_size))
            {
                outputs[s].sampled.push(sample(logits, sampling));
            }
        }
        Ok(outputs)
    }
}

/// What all layers of a step share: cosines and sines per row of the batch, and which sequence a row belongs to.
struct Tables {
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Per row: sequence and position.
    rows: Vec<(usize, usize)>,
    /// Per sequence: its rows.
    ranges: Vec<std::ops::Range<usize>>,
}

impl Tables {
    fn new(plan: &Plan, rotary: &Rotary) -> Tables {
        let (mut rows, mut ranges) = (Vec::new(), Vec::new());
        for (s, sequence) in plan.sequences.iter().enumerate() {
            let first = rows.len();
            rows.extend((0..sequence.tokens.len()).map(|t| (s, sequence.position + t)));
            ranges.push(first..rows.len());
        }
        let half = rotary.frequencies.len();
        let (mut cos, mut sin) = (vec![0.0; rows.len() * half], vec![0.0; rows.len() * half]);
        for ((&(_, position), cos), sin) in
            rows.iter().zip(cos.chunks_exact_mut(half)).zip(sin.chunks_exact_mut(half))
        {
            rotary.at(position, cos, sin);
        }
        Tables { cos, sin, rows, ranges }
    }
}

/// The matrix itself if it was made for the caller; `None` if it is borrowed from a mapped file, where it can stay.
fn keep_if_owned(matrix: checkpoint::Matrix<'_>) -> Option<checkpoint::Matrix<'static>> {
    use std::borrow::Cow;
    let owned = match &matrix.values {
        Values::Bf16(v) => matches!(v, Cow::Owned(_)),
        Values::Mxfp4 { codes, .. } | Values::Nvfp4 { codes, .. } => matches!(codes, Cow::Owned(_)),
    };
    let keep = |bytes: Cow<'_, [u8]>| Cow::Owned(bytes.into_owned());
    owned.then(|| checkpoint::Matrix {
        rows: matrix.rows,
        cols: matrix.cols,
        values: match matrix.values {
            Values::Bf16(v) => Values::Bf16(Cow::Owned(v.into_owned())),
            Values::Mxfp4 { codes, scales } => Values::Mxfp4 { codes: keep(codes), scales: keep(scales) },
            Values::Nvfp4 { codes, scales, global_scale } => {
                Values::Nvfp4 { codes: keep(codes), scales: keep(scales), global_scale }
            }
        },
    })
}

/// Zeros, or an error instead of an abort. The pages are taken when they are first written.
fn zeros(len: usize) -> Result<Vec<f32>, Error> {
    let layout = std::alloc::Layout::array::<f32>(len).map_err(|_| Error::Memory { needed: usize::MAX })?;
    if len == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the layout is not of size zero.
    let start = unsafe { std::alloc::alloc_zeroed(layout) };
    if start.is_null() {
        return Err(Error::Memory { needed: layout.size() });
    }
    // SAFETY: allocated by the global allocator with the layout of `len` f32, zeroed: every bit pattern is a value.
    Ok(unsafe { Vec::from_raw_parts(start.cast::<f32>(), len, len) })
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
