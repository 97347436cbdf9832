//! The backend: packed weights, the key/value cache and the step over a ragged batch.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use checkpoint::{Config, Format, KvScales, LayerKind, MatrixId, MatrixKind, Values, VectorKind, Weights};
use gptoss::{
    BLOCK_TOKENS, Backend, Error, KvLayout, Plan, Rotary, Sampling, SequenceOutput, SequencePlan, Traffic,
    is_corrupted, sample, score,
};
use numerics::nvfp4;

use crate::attention::{Attend, CacheFormat, E4m3, Element, Found, GROUP, SPAN, Stored, TILE, place};
use crate::bandwidth;
use crate::kernels::{Isa, Kernels};
use crate::packed::{Buffer, Job, Output, PackedMatrix, Then, multiply};
use crate::packed_file::{PackedFile, Request};
use crate::pool::{Pool, physical_cores};
use crate::products::Records;
use crate::records::{Activations, COLUMNS, Kind, Layout};
use crate::simd::LANES;

// A block of keys is one vector per entry of the head.
const _: () = assert!(BLOCK_TOKENS == LANES);

/// Rows of logits that exist at a time: 16 rows of the 20b's vocabulary are 13 MB.
const LOGIT_ROWS: usize = 16;

/// Tokens per task of what is done token by token, at most.
const TOKEN_TASK: usize = 8;

/// How to run on this CPU.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Threads; `None`: one per physical core.
    pub threads: Option<usize>,
    /// Instruction set; `None`: the best available.
    pub isa: Option<Isa>,
    /// Keeps what is stored in 16 bits in eight, with one scale per row; routers stay.
    pub fast_weights: bool,
    /// What weights of four or eight bits are multiplied with.
    pub activations: Activations,
    /// What keys and values are kept in.
    pub cache: CacheFormat,
}

/// Time spent in one kind of phase.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    /// Which phase.
    pub kernel: &'static str,
    /// How often it ran.
    pub count: usize,
    /// Seconds of all runs.
    pub seconds: f64,
}

/// gpt-oss on CPU cores.
pub struct Cpu {
    config: Config,
    kernels: &'static Kernels,
    options: Options,
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
    scratch: Scratch,
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
    /// Of stored keys and values.
    kv_scales: KvScales,
    post_attention_norm: Vec<f32>,
    router: PackedMatrix,
    router_bias: Vec<f32>,
    gate_up: PackedMatrix,
    gate_up_bias: Vec<f32>,
    down: PackedMatrix,
    down_bias: Vec<f32>,
}

/// Keys and values of one layer, where [`place`] says.
struct LayerCache {
    keys: Buffer,
    values: Buffer,
}

impl LayerCache {
    /// Zeros, if there is memory for them; the pages are taken when they are first written.
    fn new(len: usize, format: CacheFormat) -> Option<LayerCache> {
        let bytes = len.checked_mul(format.bytes())?;
        Some(LayerCache { keys: Buffer::new(bytes)?, values: Buffer::new(bytes)? })
    }
}

/// What a step writes on the way, kept from step to step.
#[derive(Default)]
struct Scratch {
    /// The residual stream `[tokens, hidden]`.
    x: Vec<f32>,
    /// A norm of it.
    h: Vec<f32>,
    /// The records of what is multiplied next, as f32 and coarser.
    float_words: Vec<u32>,
    coarser_words: Vec<u32>,
    /// `[tokens, (query heads + 2 · kv heads) · head size]`
    qkv: Vec<f32>,
    /// `[tokens, query heads · head size]`
    context: Vec<f32>,
    /// `[tokens, experts]`
    router: Vec<f32>,
    /// `[slots, intermediate]`, a slot being a token at one of its experts.
    inner: Vec<f32>,
    /// `[slots, hidden]`
    results: Vec<f32>,
    /// `[tokens, vocabulary]`
    logits: Vec<f32>,
    times: Times,
}

/// The clock of a profile, which only runs when it is asked for.
#[derive(Default)]
struct Times {
    on: bool,
    timings: Vec<Timing>,
}

impl Times {
    fn run<T>(&mut self, kernel: &'static str, work: impl FnOnce() -> T) -> T {
        if !self.on {
            return work();
        }
        let start = Instant::now();
        let result = work();
        let seconds = start.elapsed().as_secs_f64();
        match self.timings.iter_mut().find(|t| t.kernel == kernel) {
            Some(timing) => (timing.count, timing.seconds) = (timing.count + 1, timing.seconds + seconds),
            None => self.timings.push(Timing { kernel, count: 1, seconds }),
        }
        result
    }
}

impl Cpu {
    /// Packs `weights` tensor by tensor. `progress` is called with what is done and how much there is.
    pub fn load(
        weights: Arc<dyn Weights>,
        options: Options,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Cpu, Error> {
        Cpu::load_with(weights, options, None, &mut |_| {}, progress)
    }

    /// The same, with the packed weights kept in a file, which is mapped if it is there and theirs, and made otherwise. `note` is
    /// told in a sentence if a file was replaced, or could not be made, which leaves the weights in memory.
    ///
    /// # Errors
    /// Also for weights that are not those of files, and if something else has the name.
    pub fn load_kept(
        weights: Arc<dyn Weights>,
        options: Options,
        path: &Path,
        note: &mut dyn FnMut(String),
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Cpu, Error> {
        Cpu::load_with(weights, options, Some(path), note, progress)
    }

    fn load_with(
        weights: Arc<dyn Weights>,
        options: Options,
        path: Option<&Path>,
        note: &mut dyn FnMut(String),
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Cpu, Error> {
        let config = weights.config().clone();
        let isa = options.isa.unwrap_or_else(Isa::best);
        let kernels = isa
            .kernels()
            .ok_or_else(|| Error::Unsupported(format!("this CPU does not have {}", isa.name())))?;
        if !config.intermediate_size.is_multiple_of(LANES) {
            return Err(Error::Unsupported(format!(
                "intermediate_size: expected a multiple of {LANES}, found {}",
                config.intermediate_size
            )));
        }
        let pool = Pool::new(options.threads.unwrap_or_else(physical_cores));
        let count = config.layer_kinds.len();
        let fast = options.fast_weights;
        let file = match path {
            Some(path) => {
                let request = Request { path, weights: &*weights, fast, pool: &pool, kernels };
                PackedFile::open_or_make(&request, note, progress)?
            }
            None => None,
        };
        let matrix = |id: MatrixId| match &file {
            Some(file) => Ok(file.matrix(id)),
            None => PackedMatrix::load(&*weights, id, fast, &pool, kernels),
        };
        let mut layers = Vec::with_capacity(count);
        for layer in 0..count {
            progress(layer, count);
            layers.push(Layer::load(&*weights, layer, options, &matrix)?);
        }
        let unembedding = with_input_scale(&*weights, MatrixKind::Unembedding.at(0), options, &matrix)?;
        let final_norm = weights.vector(VectorKind::FinalNorm.at(0))?.to_f32();
        let embedding = keep_if_owned(weights.matrix(MatrixKind::Embedding.at(0), 0)?);
        progress(count, count);
        let rotary = Rotary::new(&config.rope, config.head_dim);
        let cache = (0..count).map(|_| LayerCache::new(0, options.cache)).collect::<Option<_>>();
        let cache = cache.ok_or(Error::Memory { needed: 0 })?;
        Ok(Cpu {
            config,
            kernels,
            options,
            pool,
            rotary,
            weights,
            embedding,
            layers,
            final_norm,
            unembedding,
            cache,
            blocks: (0, 0),
            scratch: Scratch::default(),
        })
    }

    /// Matrices and stacks whose inputs are rounded to NVFP4.
    pub fn rounded_inputs(&self) -> usize {
        let of = |l: &Layer| {
            let matrices = [&l.query, &l.key, &l.value, &l.output, &l.gate_up, &l.down];
            matrices.iter().filter(|m| m.input_scale.is_some()).count()
        };
        self.layers.iter().map(of).sum::<usize>() + usize::from(self.unembedding.input_scale.is_some())
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

    /// Bytes per second that the pool reads from memory: from the model's own weights, as many of them as a median of
    /// `passes` is worth, or elsewhere if they fit a cache.
    pub fn read_bandwidth(&self, passes: usize) -> Result<f64, Error> {
        const ENOUGH: usize = 1 << 30;
        let mut memory = Vec::new();
        let mut bytes = 0;
        let layers = self.layers.iter().flat_map(|l| [&l.gate_up, &l.down]);
        for matrix in layers.chain([&self.unembedding]) {
            if bytes < ENOUGH {
                memory.extend(matrix.matrices());
                bytes += matrix.bytes();
            }
        }
        if bytes < ENOUGH / 2 {
            return crate::read_bandwidth(&self.pool, passes);
        }
        Ok(bandwidth::read(&self.pool, self.kernels, &memory, passes))
    }

    /// Makes zeros of the keys and values that `plan` reads. What nobody has written is one page of zeros for all of it, which stays
    /// in the CPU's cache: a measurement that reads it does not read memory.
    pub fn clear_kv(&mut self, plan: &Plan) -> Result<(), Error> {
        plan.check(&self.config, self.blocks.0, self.blocks.1)?;
        let config = &self.config;
        let block_len = config.head_dim * BLOCK_TOKENS * self.options.cache.bytes();
        let caches = Output::new(&mut self.cache);
        self.pool.run(config.layer_kinds.len(), &|layer| {
            // SAFETY: each layer is one task's.
            let [cache] = (unsafe { caches.slice(layer, 1) }) else { unreachable!("a slice of one") };
            let sliding = config.layer_kinds[layer] == LayerKind::Sliding;
            for sequence in &plan.sequences {
                let (blocks, window) = if sliding {
                    (&sequence.sliding_blocks, config.sliding_window)
                } else {
                    (&sequence.full_blocks, usize::MAX)
                };
                let first = (sequence.position + 1).saturating_sub(window) / BLOCK_TOKENS;
                for &block in &blocks[first..sequence.position.div_ceil(BLOCK_TOKENS)] {
                    for head in 0..config.kv_heads {
                        let at = place(block as usize, head, config.kv_heads, block_len);
                        cache.keys.as_mut_slice()[at..][..block_len].fill(0);
                        cache.values.as_mut_slice()[at..][..block_len].fill(0);
                    }
                }
            }
        });
        Ok(())
    }

    /// Runs one step and says how long each kind of phase took.
    pub fn profile(&mut self, plan: &Plan) -> Result<(Vec<SequenceOutput>, Vec<Timing>), Error> {
        self.scratch.times.on = true;
        let result = self.step(plan);
        let mut timings = std::mem::take(&mut self.scratch.times).timings;
        let outputs = result?;
        timings.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok((outputs, timings))
    }

    fn embed(&self, plan: &Plan, x: &mut [f32]) -> Result<(), Error> {
        let mapped;
        let embedding = match &self.embedding {
            Some(kept) => kept,
            None => {
                mapped = self.weights.matrix(MatrixKind::Embedding.at(0), 0)?;
                &mapped
            }
        };
        let tokens = plan.sequences.iter().flat_map(|s| &s.tokens);
        for (x, &token) in x.chunks_exact_mut(self.config.hidden_size).zip(tokens) {
            embedding.row(token as usize, x);
        }
        Ok(())
    }

    /// Calls `work` for each of `0..tokens`, several per task.
    fn each_token(&self, tokens: usize, work: &(dyn Fn(usize) + Sync)) {
        let each = tokens.div_ceil(self.pool.threads()).min(TOKEN_TASK);
        self.pool.run(tokens.div_ceil(each.max(1)), &|task| {
            (task * each..((task + 1) * each).min(tokens)).for_each(work);
        });
    }

    /// RMSNorm of each token of `x`, to `h`.
    fn norm(&self, x: &[f32], scale: &[f32], h: &mut [f32]) {
        let width = self.config.hidden_size;
        let out = Output::new(h);
        self.each_token(x.len() / width, &|t| {
            // SAFETY: each token has a place of its own; the kernels were chosen for this CPU; the config makes the width a
            // multiple of 32.
            unsafe {
                let out = out.slice(t * width, width);
                (self.kernels.rms_norm)(&x[t * width..][..width], scale, self.config.rms_norm_eps, out);
            }
        });
    }

    /// The records of each row of `x` (`width` wide) for products with `matrices`, which may differ in the kind they need.
    fn records<'a>(
        &self,
        matrices: &[&PackedMatrix],
        x: &[f32],
        width: usize,
        float_words: &'a mut Vec<u32>,
        coarser_words: &'a mut Vec<u32>,
    ) -> Prepared<'a> {
        let make = |kind: Kind, words: &'a mut Vec<u32>| {
            // Float records are of matrices without input scales; the others have the same.
            let input_scale = matrices.iter().find_map(|m| m.input_scale).filter(|_| kind != Kind::Float);
            let layout = Layout { kind, tokens: x.len() / width, cols: width.next_multiple_of(COLUMNS) };
            let words = room(words, layout.len());
            let place = Place(words.as_mut_ptr());
            self.each_token(layout.tokens, &|t| {
                // SAFETY: each token's records are its own.
                unsafe {
                    layout.write(self.kernels, t, &inputs(&x[t * width..][..width], input_scale), place.get())
                };
            });
            layout.records(words)
        };
        let kind = |float: bool| {
            let mut kinds = matrices.iter().map(|m| m.records(self.options.activations));
            kinds.find(|&kind| (kind == Kind::Float) == float)
        };
        Prepared {
            float: kind(true).map(|kind| make(kind, float_words)),
            coarser: kind(false).map(|kind| make(kind, coarser_words)),
        }
    }

    /// `out = x Wᵀ + bias`, or added to it.
    fn product(
        &self,
        matrix: &PackedMatrix,
        x: &Prepared<'_>,
        bias: Option<&[f32]>,
        then: Then,
        out: &mut [f32],
    ) {
        let job = Job {
            matrix,
            expert: 0,
            x: x.of(matrix.records(self.options.activations)),
            bias,
            then,
            out: Output::new(out),
            offset: 0,
            stride: matrix.shape.rows,
        };
        multiply(&self.pool, self.kernels, &[job]);
    }

    /// Keys and values of one layer, rotated and stored, and where it is asked for rotated and scaled queries in `scratch.qkv`.
    fn project(
        &mut self,
        index: usize,
        x: &[f32],
        scratch: &mut Scratch,
        plan: &Plan,
        tables: &Tables,
        queries: bool,
    ) {
        let config = &self.config;
        let layer = &self.layers[index];
        let size = config.head_dim;
        let (q_width, kv_width) =
            (if queries { config.query_heads * size } else { 0 }, config.kv_heads * size);
        let stride = q_width + 2 * kv_width;
        let tokens = tables.rows.len();
        let d = config.hidden_size;
        let Scratch { h, float_words, coarser_words, qkv, times, .. } = scratch;

        let h = room(h, tokens * d);
        let records = times.run("norm", || {
            self.norm(x, &layer.input_norm, h);
            self.records(&[&layer.query, &layer.key, &layer.value], h, d, float_words, coarser_words)
        });
        let qkv = room(qkv, tokens * stride);
        times.run("query, key, value", || {
            let out = Output::new(qkv);
            let part = |matrix, bias, offset| Job {
                matrix,
                expert: 0,
                x: records.of(PackedMatrix::records(matrix, self.options.activations)),
                bias: Some(bias),
                then: Then::Set,
                out,
                offset,
                stride,
            };
            let jobs = [
                part(&layer.query, &layer.query_bias[..], 0),
                part(&layer.key, &layer.key_bias, q_width),
                part(&layer.value, &layer.value_bias, q_width + kv_width),
            ];
            multiply(&self.pool, self.kernels, if queries { &jobs } else { &jobs[1..] });
        });

        // Rotate, scale the queries (exact for a head size that is a power of four) and what is stored, store keys and values.
        let sliding = config.layer_kinds[index] == LayerKind::Sliding;
        let LayerCache { keys, values } = &mut self.cache[index];
        let cache = CacheOutput::new(self.options.cache, keys, values);
        let scale = layer.kv_scales.key / (size as f32).sqrt();
        let half = size / 2;
        times.run("rotate, store", || {
            let out = Output::new(qkv);
            self.each_token(tokens, &|row| {
                let (s, position) = tables.rows[row];
                let sequence = &plan.sequences[s];
                let blocks = if sliding { &sequence.sliding_blocks } else { &sequence.full_blocks };
                let (cos, sin) = (&tables.cos[row * half..][..half], &tables.sin[row * half..][..half]);
                // SAFETY: each row is one call's.
                let qkv = unsafe { out.slice(row * stride, stride) };
                for (at, values) in qkv[..q_width + kv_width].chunks_exact_mut(size).enumerate() {
                    gptoss::rotate(values, cos, sin);
                    if at * size < q_width {
                        values.iter_mut().for_each(|v| *v *= scale);
                    }
                }
                let block = blocks[position / BLOCK_TOKENS] as usize;
                let lane = position % BLOCK_TOKENS;
                let (keys, values) = qkv[q_width..].split_at_mut(kv_width);
                keys.iter_mut().for_each(|key| *key /= layer.kv_scales.key);
                values.iter_mut().for_each(|value| *value /= layer.kv_scales.value);
                // SAFETY: each position of each sequence is one call's, and no two share a block.
                unsafe { cache.keep(&qkv[q_width..], size, block, lane) };
            });
        });
    }

    /// Attention of one layer over the batch, added to the residual stream.
    fn attention(
        &mut self,
        index: usize,
        x: &mut [f32],
        scratch: &mut Scratch,
        plan: &Plan,
        tables: &Tables,
    ) {
        self.project(index, x, scratch, plan, tables, true);
        let layer = &self.layers[index];
        let tokens = tables.rows.len();
        let q_width = self.config.query_heads * self.config.head_dim;
        let Scratch { float_words, coarser_words, qkv, context, times, .. } = scratch;
        let context = room(context, tokens * q_width);
        times.run("attention", || self.attend(index, qkv, plan, tables, context));
        times.run("attention output", || {
            let records = self.records(&[&layer.output], context, q_width, float_words, coarser_words);
            self.product(&layer.output, &records, Some(&layer.output_bias), Then::Add, x);
        });
    }

    /// The results of all heads of one layer, `[tokens, query heads · head size]`.
    fn attend(&self, index: usize, qkv: &[f32], plan: &Plan, tables: &Tables, context: &mut [f32]) {
        let (config, layer) = (&self.config, &self.layers[index]);
        let (size, groups) = (config.head_dim, config.query_heads / config.kv_heads);
        let (q_width, kv_width) = (config.query_heads * size, config.kv_heads * size);
        let stride = q_width + 2 * kv_width;

        // A tile is some heads that share a key/value head, of a few tokens of one sequence.
        let heads = groups.min(TILE);
        let mut tiles = Vec::new();
        for rows in &tables.ranges {
            for from in rows.clone().step_by(TILE / heads) {
                let rows = from..(from + TILE / heads).min(rows.end);
                for kv_head in 0..config.kv_heads {
                    for first in (kv_head * groups..(kv_head + 1) * groups).step_by(heads) {
                        let heads = first..(first + heads).min((kv_head + 1) * groups);
                        tiles.push(Tile { rows: rows.clone(), heads, kv_head });
                    }
                }
            }
        }
        let gather = |tile: &Tile| {
            let mut queries = Queries::default();
            for row in tile.rows.clone() {
                let values = tile.heads.start * size..tile.heads.end * size;
                queries.values.extend(&qkv[row * stride..][values]);
                queries.sinks.extend(&layer.sinks[tile.heads.clone()]);
                queries.positions.extend(std::iter::repeat_n(tables.rows[row].1, tile.heads.len()));
            }
            queries
        };
        let out = Output::new(context);
        let store = |tile: &Tile, results: &[f32]| {
            for (row, results) in tile.rows.clone().zip(results.chunks_exact(tile.heads.len() * size)) {
                // SAFETY: each tile has its own heads of its own rows, and is stored once.
                let out = unsafe { out.slice(row * q_width + tile.heads.start * size, results.len()) };
                out.copy_from_slice(results);
            }
        };
        let attend = |job: &Attend<'_>, span: usize| {
            // SAFETY: the kernels were chosen for this CPU.
            unsafe { (self.kernels.attend)(job, span) }
        };
        let merge = |job: &Attend<'_>, found: &mut Found, other: &Found| {
            // SAFETY: as above.
            unsafe { (self.kernels.merge)(job, found, other) }
        };
        let sliding = config.layer_kinds[index] == LayerKind::Sliding;
        let window = if sliding { config.sliding_window } else { usize::MAX };
        // As many as the positions that a tile sees would fill.
        let spans = |tile: &Tile| {
            let (first, last) = (tables.rows[tile.rows.start].1, tables.rows[tile.rows.end - 1].1);
            (last + 1 - (first + 1).saturating_sub(window)).div_ceil(SPAN)
        };
        let most = spans_per_task(tiles.iter().map(spans), self.pool.threads());
        let (whole, parted): (Vec<Tile>, Vec<Tile>) = tiles.into_iter().partition(|tile| spans(tile) <= most);
        // Few queries over much context: the spans are tasks of their own.
        let queries: Vec<Queries> = parted.iter().map(gather).collect();
        let jobs: Vec<Attend<'_>> = parted
            .iter()
            .zip(&queries)
            .map(|(tile, queries)| self.attend_job(index, plan, tables, tile, queries))
            .collect();
        let parts: Vec<(usize, usize, OnceLock<Found>)> = jobs
            .iter()
            .enumerate()
            .flat_map(|(j, job)| job.spans().map(move |span| (j, span, OnceLock::new())))
            .collect();
        self.pool.run(parts.len() + whole.len(), &|task| {
            if let Some((j, span, found)) = parts.get(task) {
                // Each task sets its own, once.
                let _ = found.set(attend(&jobs[*j], *span));
                return;
            }
            let tile = &whole[task - parts.len()];
            let queries = gather(tile);
            let job = self.attend_job(index, plan, tables, tile, &queries);
            let mut found = Found::sinks(&job);
            job.spans().for_each(|span| merge(&job, &mut found, &attend(&job, span)));
            store(tile, &found.finish(&job));
        });
        let mut found: Vec<Found> = jobs.iter().map(Found::sinks).collect();
        for (j, _, part) in &parts {
            merge(&jobs[*j], &mut found[*j], part.get().expect("every task has run"));
        }
        for ((tile, job), found) in parted.iter().zip(&jobs).zip(found) {
            store(tile, &found.finish(job));
        }
    }

    fn attend_job<'a>(
        &'a self,
        index: usize,
        plan: &'a Plan,
        tables: &Tables,
        tile: &Tile,
        queries: &'a Queries,
    ) -> Attend<'a> {
        let (config, cache) = (&self.config, &self.cache[index]);
        let sliding = config.layer_kinds[index] == LayerKind::Sliding;
        let sequence = &plan.sequences[tables.rows[tile.rows.start].0];
        let stored = |buffer: &'a Buffer| match self.options.cache {
            CacheFormat::F32 => Stored::F32(buffer.elements()),
            CacheFormat::Bf16 => Stored::Bf16(buffer.elements()),
            CacheFormat::E4m3 => Stored::E4m3(buffer.elements()),
        };
        Attend {
            queries: &queries.values,
            sinks: &queries.sinks,
            positions: &queries.positions,
            window: if sliding { config.sliding_window } else { usize::MAX },
            size: config.head_dim,
            keys: stored(&cache.keys),
            values: stored(&cache.values),
            value_scale: self.layers[index].kv_scales.value,
            head: tile.kv_head,
            heads: config.kv_heads,
            blocks: if sliding { &sequence.sliding_blocks } else { &sequence.full_blocks },
        }
    }

    /// The mixture of experts of one layer, added to the residual stream.
    fn moe(&self, index: usize, x: &mut [f32], scratch: &mut Scratch) {
        let (config, layer) = (&self.config, &self.layers[index]);
        let (d, i, k) = (config.hidden_size, config.intermediate_size, config.experts_per_token);
        let tokens = x.len() / d;
        let Scratch { h, float_words, coarser_words, router, inner, results, times, .. } = scratch;
        let h = room(h, tokens * d);
        times.run("norm", || self.norm(x, &layer.post_attention_norm, h));
        let router = room(router, tokens * config.experts);
        let groups = times.run("router", || {
            let records = self.records(&[&layer.router], h, d, float_words, coarser_words);
            self.product(&layer.router, &records, Some(&layer.router_bias), Then::Set, router);
            Groups::new(
                router.chunks_exact(config.experts).map(|g| gptoss::top_experts(g, k)),
                config.experts,
            )
        });
        let slots = groups.tokens.len();

        let inner = room(inner, slots * i);
        times.run("gate and up", || {
            let out = Output::new(inner);
            let then = Then::SwiGlu { limit: config.swiglu_limit, alpha: config.swiglu_alpha };
            let records = if tokens == 1 {
                // All experts take the same.
                let records = self.records(&[&layer.gate_up], h, d, float_words, coarser_words);
                vec![records.of(layer.gate_up.records(self.options.activations)); groups.active.len()]
            } else {
                let row = |slot: usize| &h[groups.tokens[slot] * d..][..d];
                self.group_records(&groups, &layer.gate_up, d, &row, coarser_words)
            };
            let jobs = groups.jobs(&records, &layer.gate_up, &layer.gate_up_bias, then, out, i);
            multiply(&self.pool, self.kernels, &jobs);
        });
        let results = room(results, slots * d);
        times.run("down", || {
            let row = |slot: usize| &inner[slot * i..][..i];
            let records = self.group_records(&groups, &layer.down, i, &row, coarser_words);
            let out = Output::new(results);
            let jobs = groups.jobs(&records, &layer.down, &layer.down_bias, Then::Set, out, d);
            multiply(&self.pool, self.kernels, &jobs);
        });

        // The weighted sum in the order of the ranks.
        times.run("expert sum", || {
            let out = Output::new(x);
            self.each_token(tokens, &|t| {
                // SAFETY: each token has a place of its own.
                let x = unsafe { out.slice(t * d, d) };
                let ranks = &groups.ranks[t * k..][..k];
                // The config makes the width a multiple of 32, so nothing is left over.
                for (c, x) in x.as_chunks_mut::<COLUMNS>().0.iter_mut().enumerate() {
                    let mut sums = [0.0; COLUMNS];
                    for &(slot, weight) in ranks {
                        let results = &results[slot * d + c * COLUMNS..][..COLUMNS];
                        sums.iter_mut().zip(results).for_each(|(sum, result)| *sum += weight * result);
                    }
                    x.iter_mut().zip(sums).for_each(|(x, sum)| *x += sum);
                }
            });
        });
    }

    /// The records of each group's tokens, group after group.
    fn group_records<'a>(
        &self,
        groups: &Groups,
        matrix: &PackedMatrix,
        width: usize,
        row: &(dyn Fn(usize) -> &'a [f32] + Sync),
        words: &'a mut Vec<u32>,
    ) -> Vec<Records<'a>> {
        let kind = matrix.records(self.options.activations);
        let cols = width.next_multiple_of(COLUMNS);
        let per_slot = cols / COLUMNS * kind.words();
        let words = room(words, groups.tokens.len() * per_slot);
        let place = Place(words.as_mut_ptr());
        self.pool.run(groups.tokens.len(), &|slot| {
            let group = &groups.active[groups.group_of[slot]];
            let layout = Layout { kind, tokens: group.slots.len(), cols };
            // SAFETY: the group's records begin there; each slot's are its own.
            unsafe {
                let start = place.get().add(group.slots.start * per_slot);
                let x = inputs(row(slot), matrix.input_scale);
                layout.write(self.kernels, slot - group.slots.start, &x, start);
            }
        });
        let words = |slots: &Range<usize>| &words[slots.start * per_slot..slots.end * per_slot];
        groups.active.iter().map(|g| Records::new(words(&g.slots), g.slots.len(), kind)).collect()
    }

    /// The logits of some rows of the residual stream.
    fn logits<'a>(
        &self,
        x: &[f32],
        rows: impl Iterator<Item = usize>,
        scratch: &'a mut Scratch,
    ) -> (&'a mut [f32], &'a mut Times) {
        let d = self.config.hidden_size;
        let x: Vec<f32> = rows.flat_map(|row| &x[row * d..(row + 1) * d]).copied().collect();
        let Scratch { h, float_words, coarser_words, logits, times, .. } = scratch;
        let h = room(h, x.len());
        let logits = room(logits, x.len() / d * self.config.vocab_size);
        times.run("output layer", || {
            self.norm(&x, &self.final_norm, h);
            let records = self.records(&[&self.unembedding], h, d, float_words, coarser_words);
            self.product(&self.unembedding, &records, None, Then::Set, logits);
        });
        (logits, times)
    }

    /// What `work` finds in each row of logits, one row per task, and whether the row is corrupted.
    fn each_row<T: Send + Sync>(
        &self,
        logits: &mut [f32],
        work: impl Fn(usize, &mut [f32]) -> T + Sync,
    ) -> Vec<(bool, T)> {
        let vocabulary = self.config.vocab_size;
        let found: Vec<OnceLock<(bool, T)>> = logits.chunks(vocabulary).map(|_| OnceLock::new()).collect();
        let logits = Output::new(logits);
        self.pool.run(found.len(), &|row| {
            // SAFETY: each row is one task's.
            let logits = unsafe { logits.slice(row * vocabulary, vocabulary) };
            // Each task sets its own, once.
            let _ = found[row].set((is_corrupted(logits), work(row, logits)));
        });
        found.into_iter().map(|found| found.into_inner().expect("every task has run")).collect()
    }

    fn run(
        &mut self,
        plan: &Plan,
        x: &mut Vec<f32>,
        scratch: &mut Scratch,
    ) -> Result<Vec<SequenceOutput>, Error> {
        let d = self.config.hidden_size;
        let mut tables = Tables::new(plan, &self.rotary, |_, _| true);
        let mut x = room(x, tables.rows.len() * d);
        self.embed(plan, x)?;
        let mut hidden = vec![Vec::new(); plan.sequences.len()];
        for layer in 0..self.layers.len() {
            if layer + 1 == self.layers.len() {
                let needed =
                    |s: &SequencePlan, token| s.hidden_after_layer == Some(layer) || s.needs_logits(token);
                if plan.sequences.iter().any(|s| (0..s.tokens.len()).any(|token| !needed(s, token))) {
                    // Of tokens that nobody asks about later steps read nothing but keys and values.
                    self.project(layer, x, scratch, plan, &tables, false);
                    let kept = Tables::new(plan, &self.rotary, needed);
                    for (to, &(s, position)) in kept.rows.iter().enumerate() {
                        let from = tables.ranges[s].start + position - plan.sequences[s].position;
                        x.copy_within(from * d..(from + 1) * d, to * d);
                    }
                    x = &mut x[..kept.rows.len() * d];
                    tables = kept;
                }
                if tables.rows.is_empty() {
                    break;
                }
            }
            self.attention(layer, x, scratch, plan, &tables);
            self.moe(layer, x, scratch);
            for (s, rows) in tables.ranges.iter().enumerate() {
                if plan.sequences[s].hidden_after_layer == Some(layer) {
                    hidden[s] = x[rows.start * d..rows.end * d].to_vec();
                }
            }
        }
        let output = |hidden| SequenceOutput { hidden, ..SequenceOutput::default() };
        let mut outputs: Vec<SequenceOutput> = hidden.into_iter().map(output).collect();
        let sequences = || plan.sequences.iter().zip(&tables.ranges).enumerate();
        // The rows of all sequences whose logits or scores are asked for share passes over the output layer, and so do the
        // sampled ones.
        let scored: Vec<(usize, usize, usize)> = sequences()
            .flat_map(|(s, (sequence, rows))| {
                let scored = sequence.score.as_ref().map_or(0, |score| score.next.len());
                let count = if sequence.logits { sequence.tokens.len() } else { scored };
                (0..count).map(move |t| (s, rows.start + t, t))
            })
            .collect();
        for group in scored.chunks(LOGIT_ROWS) {
            let (logits, times) = self.logits(x, group.iter().map(|&(_, row, _)| row), scratch);
            let scores = times.run("scoring", || {
                self.each_row(logits, |row, logits| {
                    let (s, _, t) = group[row];
                    let wanted = plan.sequences[s].score.as_ref()?;
                    Some(score(logits, *wanted.next.get(t)?, wanted.top, &[]))
                })
            });
            let rows = logits.chunks_exact(self.config.vocab_size);
            for ((&(s, ..), (corrupted, score)), logits) in group.iter().zip(scores).zip(rows) {
                outputs[s].corrupted |= corrupted;
                outputs[s].scores.extend(score);
                if plan.sequences[s].logits {
                    outputs[s].logits.extend_from_slice(logits);
                }
            }
        }
        let sampled: Vec<(usize, usize, &Sampling)> = sequences()
            .flat_map(|(s, (sequence, rows))| {
                let rows = rows.end - sequence.sample.len()..rows.end;
                rows.zip(&sequence.sample).map(move |(row, sampling)| (s, row, sampling))
            })
            .collect();
        for group in sampled.chunks(LOGIT_ROWS) {
            let (logits, times) = self.logits(x, group.iter().map(|&(_, row, _)| row), scratch);
            let drawn =
                times.run("sampling", || self.each_row(logits, |row, logits| sample(logits, group[row].2)));
            for (&(s, ..), (corrupted, sampled)) in group.iter().zip(drawn) {
                outputs[s].corrupted |= corrupted;
                outputs[s].sampled.push(sampled);
            }
        }
        Ok(outputs)
    }
}

impl Layer {
    fn load(
        weights: &dyn Weights,
        layer: usize,
        options: Options,
        matrix: &dyn Fn(MatrixId) -> Result<PackedMatrix, Error>,
    ) -> Result<Layer, Error> {
        let matrix = |kind: MatrixKind| with_input_scale(weights, kind.at(layer), options, matrix);
        let vector = |kind: VectorKind| weights.vector(kind.at(layer)).map(|v| v.to_f32());
        let [query, key, value] =
            [matrix(MatrixKind::Query)?, matrix(MatrixKind::Key)?, matrix(MatrixKind::Value)?];
        if key.input_scale != query.input_scale || value.input_scale != query.input_scale {
            return Err(Error::Unsupported(format!(
                "layer {layer}: expected one input scale for query, key and value, found {:?}, {:?} and {:?}",
                query.input_scale, key.input_scale, value.input_scale
            )));
        }
        let kv_scales = match options.cache {
            CacheFormat::E4m3 => weights.kv_scales(layer),
            CacheFormat::F32 | CacheFormat::Bf16 => None,
        };
        Ok(Layer {
            input_norm: vector(VectorKind::InputNorm)?,
            query,
            key,
            value,
            output: matrix(MatrixKind::Output)?,
            query_bias: vector(VectorKind::QueryBias)?,
            key_bias: vector(VectorKind::KeyBias)?,
            value_bias: vector(VectorKind::ValueBias)?,
            output_bias: vector(VectorKind::OutputBias)?,
            sinks: vector(VectorKind::Sinks)?,
            kv_scales: kv_scales.unwrap_or(KvScales { key: 1.0, value: 1.0 }),
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

/// The packed matrix, with the scale of its inputs where those are to be rounded.
fn with_input_scale(
    weights: &dyn Weights,
    id: MatrixId,
    options: Options,
    matrix: &dyn Fn(MatrixId) -> Result<PackedMatrix, Error>,
) -> Result<PackedMatrix, Error> {
    let rounded = options.activations == Activations::Nvfp4 && weights.format(id) == Format::Nvfp4;
    let mut matrix = matrix(id)?;
    matrix.input_scale = weights.input_scale(id).filter(|_| rounded);
    Ok(matrix)
}

/// What a matrix with this input scale multiplies.
fn inputs(x: &[f32], input_scale: Option<f32>) -> Cow<'_, [f32]> {
    match input_scale {
        Some(scale) => {
            let mut rounded = x.to_vec();
            nvfp4::fake_quantize_activations(x, scale, &mut rounded);
            Cow::Owned(rounded)
        }
        None => Cow::Borrowed(x),
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
        KvLayout::new(&self.config, self.options.cache.bytes())
    }

    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> Result<(), Error> {
        let width = self.config.kv_heads * self.config.head_dim * BLOCK_TOKENS;
        let needed = self.kv_layout().bytes(full_blocks, sliding_blocks);
        let no_room = || Error::Memory { needed };
        for (cache, kind) in self.cache.iter_mut().zip(&self.config.layer_kinds) {
            let blocks = if *kind == LayerKind::Sliding { sliding_blocks } else { full_blocks };
            let blocks = blocks.checked_next_multiple_of(GROUP);
            let len = blocks.and_then(|blocks| blocks.checked_mul(width)).ok_or_else(no_room)?;
            // The old cache is given back first: two never exist at once.
            *cache = LayerCache::new(0, self.options.cache).ok_or_else(no_room)?;
            *cache = LayerCache::new(len, self.options.cache).ok_or_else(no_room)?;
        }
        self.blocks = (full_blocks, sliding_blocks);
        Ok(())
    }

    fn step(&mut self, plan: &Plan) -> Result<Vec<SequenceOutput>, Error> {
        plan.check(&self.config, self.blocks.0, self.blocks.1)?;
        if plan.sequences.is_empty() {
            return Ok(Vec::new());
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut x = std::mem::take(&mut scratch.x);
        let result = self.run(plan, &mut x, &mut scratch);
        self.scratch = Scratch { x, ..scratch };
        result
    }
}

/// Records of the same activations in the kinds that some matrices need.
struct Prepared<'a> {
    float: Option<Records<'a>>,
    coarser: Option<Records<'a>>,
}

impl<'a> Prepared<'a> {
    fn of(&self, kind: Kind) -> Records<'a> {
        let records = if kind == Kind::Float { self.float } else { self.coarser };
        records.expect("records were made for this matrix")
    }
}

/// Where keys and values go.
enum CacheOutput {
    F32(Output<f32>, Output<f32>),
    Bf16(Output<half::bf16>, Output<half::bf16>),
    E4m3(Output<E4m3>, Output<E4m3>),
}

impl CacheOutput {
    fn new(format: CacheFormat, keys: &mut Buffer, values: &mut Buffer) -> CacheOutput {
        use CacheOutput::{Bf16, E4m3, F32};
        match format {
            CacheFormat::F32 => F32(Output::new(keys.elements_mut()), Output::new(values.elements_mut())),
            CacheFormat::Bf16 => Bf16(Output::new(keys.elements_mut()), Output::new(values.elements_mut())),
            CacheFormat::E4m3 => E4m3(Output::new(keys.elements_mut()), Output::new(values.elements_mut())),
        }
    }

    /// [`keep`].
    ///
    /// # Safety
    /// As there.
    unsafe fn keep(&self, new: &[f32], size: usize, block: usize, lane: usize) {
        // SAFETY: the same contract.
        unsafe {
            match self {
                CacheOutput::F32(keys, values) => keep(keys, values, new, size, block, lane),
                CacheOutput::Bf16(keys, values) => keep(keys, values, new, size, block, lane),
                CacheOutput::E4m3(keys, values) => keep(keys, values, new, size, block, lane),
            }
        }
    }
}

/// Stores the keys and values (`new`) of one position in lane `lane` of a block.
///
/// # Safety
/// Nobody else stores this position meanwhile.
unsafe fn keep<T: Element>(
    keys: &Output<T>,
    values: &Output<T>,
    new: &[f32],
    size: usize,
    block: usize,
    lane: usize,
) {
    let (new_keys, new_values) = new.split_at(new.len() / 2);
    let heads = new_keys.len() / size;
    let new = new_keys.chunks_exact(size).zip(new_values.chunks_exact(size));
    for (head, (new_keys, new_values)) in new.enumerate() {
        let at = place(block, head, heads, size * BLOCK_TOKENS);
        for (e, &key) in new_keys.iter().enumerate() {
            // SAFETY: the contract.
            unsafe { keys.slice(at + e * BLOCK_TOKENS + lane, 1)[0] = T::of(key) };
        }
        // SAFETY: the contract.
        let out = unsafe { values.slice(at + lane * size, size) };
        out.iter_mut().zip(new_values).for_each(|(out, &new)| *out = T::of(new));
    }
}

/// Some heads that share a key/value head, of a few tokens of one sequence.
struct Tile {
    rows: Range<usize>,
    heads: Range<usize>,
    kv_head: usize,
}

/// The most spans that a tile may have to be one task: with half of a thread's share of all spans, no thread waits long for another's
/// last task.
fn spans_per_task(tiles: impl Iterator<Item = usize>, threads: usize) -> usize {
    (tiles.sum::<usize>() / (2 * threads)).max(1)
}

/// The queries of a tile, as [`Attend`] has them.
#[derive(Default)]
struct Queries {
    values: Vec<f32>,
    sinks: Vec<f32>,
    positions: Vec<usize>,
}

/// The tokens of a step, ordered by expert. A slot is a token at one of its experts.
struct Groups {
    active: Vec<Group>,
    /// Per slot: its token.
    tokens: Vec<usize>,
    /// Per slot: its place in `active`.
    group_of: Vec<usize>,
    /// Per token and rank: slot and weight.
    ranks: Vec<(usize, f32)>,
}

/// The slots of one expert.
struct Group {
    expert: usize,
    slots: Range<usize>,
}

impl Groups {
    fn new(routes: impl Iterator<Item = Vec<(usize, f32)>>, experts: usize) -> Groups {
        let mut chosen: Vec<Vec<(usize, usize)>> = vec![Vec::new(); experts];
        let mut ranks = Vec::new();
        for (t, route) in routes.enumerate() {
            for (expert, weight) in route {
                chosen[expert].push((t, ranks.len()));
                ranks.push((0, weight));
            }
        }
        let mut groups = Groups { active: Vec::new(), tokens: Vec::new(), group_of: Vec::new(), ranks };
        for (expert, chosen) in chosen.into_iter().enumerate().filter(|(_, chosen)| !chosen.is_empty()) {
            let first = groups.tokens.len();
            for (t, rank) in chosen {
                groups.ranks[rank].0 = groups.tokens.len();
                groups.tokens.push(t);
                groups.group_of.push(groups.active.len());
            }
            groups.active.push(Group { expert, slots: first..groups.tokens.len() });
        }
        groups
    }

    /// One product per group; `bias` has the biases of all experts.
    fn jobs<'a>(
        &self,
        records: &[Records<'a>],
        matrix: &'a PackedMatrix,
        bias: &'a [f32],
        then: Then,
        out: Output,
        width: usize,
    ) -> Vec<Job<'a>> {
        self.active
            .iter()
            .zip(records)
            .map(|(group, &x)| Job {
                matrix,
                expert: group.expert,
                x,
                bias: Some(&bias[group.expert * matrix.shape.rows..][..matrix.shape.rows]),
                then,
                out,
                offset: group.slots.start * width,
                stride: width,
            })
            .collect()
    }
}

/// Where tasks write records, each its own.
struct Place(*mut u32);

// SAFETY: tasks write disjoint records.
unsafe impl Sync for Place {}

impl Place {
    fn get(&self) -> *mut u32 {
        self.0
    }
}

/// The first `len` elements of a buffer that grows when it must.
fn room<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

/// What layers of a step share: cosines and sines per row of the residual stream, and which sequence a row belongs to.
struct Tables {
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Per row: sequence and position.
    rows: Vec<(usize, usize)>,
    /// Per sequence: its rows.
    ranges: Vec<Range<usize>>,
}

impl Tables {
    /// `has`: which of a sequence's tokens have a row.
    fn new(plan: &Plan, rotary: &Rotary, has: impl Fn(&SequencePlan, usize) -> bool) -> Tables {
        let (mut rows, mut ranges) = (Vec::new(), Vec::new());
        for (s, sequence) in plan.sequences.iter().enumerate() {
            let first = rows.len();
            let tokens = (0..sequence.tokens.len()).filter(|&t| has(sequence, t));
            rows.extend(tokens.map(|t| (s, sequence.position + t)));
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

#[cfg(test)]
mod tests {
    use super::*;

    /// One long context among short ones is divided, many long ones are not.
    #[test]
    fn no_tile_is_more_than_half_of_a_threads_share() {
        for (threads, short, long, spans, divided) in [
            (64, 31 * 8, 8, 49, true),
            (64, 0, 8, 49, true),
            (8, 0, 8, 49, true),
            (4, 0, 8, 49, false),
            (64, 0, 32 * 8, 49, false),
            (64, 31 * 8, 8, 1, false),
            (1, 8, 8, 49, false),
        ] {
            let tiles = std::iter::repeat_n(1, short).chain(std::iter::repeat_n(spans, long));
            let most = spans_per_task(tiles, threads);
            assert_eq!(spans > most, divided, "{threads} threads, {long} tiles of {spans} spans");
        }
    }
}
