//! The backend: packed weights, the paged cache, and the step over a ragged batch as a chain of kernels.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Zeroable;
use checkpoint::{Config, Format, KvScales, LayerKind, MatrixId, MatrixKind, VectorKind, Weights, matrices};
use gptoss::{
    BLOCK_TOKENS, Backend, BlockId, Error, KvLayout, Plan, Rotary, Sampled, Sampling, SequenceOutput,
    SequencePlan, Traffic,
};

use crate::device::{Buffer, Device, Graph, KernelTime, Pinned};
use crate::driver::Address;
use crate::fp4::{self, FP4_FROM, Fp4Matrix};
use crate::one::OneToken;
use crate::packed::{Loader, PackedMatrix, TILE_COLS, TILE_ROWS, Table};
use crate::params::{
    After, Attention, BF16, CacheFormat, Dense, Embed, Epilogue, Exchanged, FP4, Few, Gather, Gemm, Largest,
    Norm, ORDERED, Part, Product, Read, Router, RouterGather, RowOrder, Streamed,
};
use crate::sampling::{Sampler, Wanted};

/// Tokens computed at a time; a step of more is cut.
const MAX_TOKENS: usize = 8192;
/// Rows of logits that exist at a time: 256 rows of the 20b's vocabulary are 206 MB.
pub(crate) const LOGIT_ROWS: usize = 256;
/// The kernels' head size.
const HEAD: usize = 64;
/// The router's limit.
const MAX_EXPERTS: usize = 256;
/// Experts per token that one block puts together.
const MAX_RANKS: usize = 16;
/// What a block of a norm holds in registers.
const MAX_HIDDEN: usize = 4096;
/// Blocks that look for the largest logit of a row, at most.
const LARGEST_BLOCKS: usize = 64;
/// Warps of a block of attention.cu, each of which has up to as many query heads that share keys.
const ATTENTION_WARPS: usize = 8;
/// Shared memory of a block there, two pages for each warp, in BF16.
const ATTENTION_SHARED: usize = ATTENTION_WARPS * 2 * (2 * BLOCK_TOKENS * HEAD * 2);
/// Its parts that exist at a time: (token, heads of a warp, split).
const MAX_PARTS: usize = 4096;
/// Its blocks that a multiprocessor has at a time.
const ATTENTION_BLOCKS: usize = 2;
/// Blocks that share a token's keys, at most.
const MAX_SPLITS: usize = 32;
/// The same where it may not depend on the number of tokens.
const INVARIANT_SPLITS: usize = 8;
/// Single tokens computed at a time there: of many more, experts would take other kernels.
const INVARIANT_SINGLES: usize = 1024;
/// Query heads per key/value head, at most: the rows that a warp of attention_many.cu has.
const QUERY_ROWS: usize = 16;
/// Rows of queries of a block of attention_many.cu.
const TILE_QUERIES: usize = 128;
/// Shared memory of attention_many_sm90.cu: `RAW` and room to align it to 1024 bytes; with E4M3 three stages more.
const PROMPTS_SHARED: usize = 81_920 + 1024;
const PROMPTS_SHARED_E4M3: usize = PROMPTS_SHARED + 3 * 8192;
/// Device memory that is left to the driver, graphs and other programs.
const RESERVE: usize = 512 << 20;

/// How a model is run. `Default` is the fastest that is exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Kernel by kernel, without graphs.
    pub eager: bool,
    /// Keys and values.
    pub cache: CacheFormat,
    /// Tokens of prompts and of answers each take one family of kernels and one order of summation, however many there are.
    pub batch_invariant: bool,
}

/// gpt-oss on one GPU.
pub struct Cuda {
    pub(crate) device: Arc<Device>,
    pub(crate) config: Config,
    embedding: Table,
    frequencies: Buffer,
    concentration: f32,
    layers: Vec<Layer>,
    pub(crate) final_norm: Buffer,
    pub(crate) unembedding: PackedMatrix,
    pub(crate) arena: Arena,
    /// How a step of one token goes, where the model and the device allow it; else it goes as those of few.
    one: Option<OneToken>,
    cache: Vec<LayerCache>,
    blocks: (usize, usize),
    /// Decode steps by their number of tokens, how the full layers share their keys, and whether those are read ahead.
    graphs: HashMap<(usize, Sharing, bool), Graph>,
    sampler: Sampler,
    pub(crate) options: Options,
    /// Room for quantized activations, if matrices are packed for FP4 products.
    fp4: Option<fp4::Scratch>,
}

pub(crate) struct Layer {
    pub(crate) input_norm: Buffer,
    pub(crate) qkv: PackedMatrix,
    sinks: Buffer,
    /// Of keys and values in E4M3.
    kv_scales: KvScales,
    pub(crate) output: PackedMatrix,
    pub(crate) post_attention_norm: Buffer,
    pub(crate) router: Buffer,
    pub(crate) router_bias: Buffer,
    pub(crate) gate_up: PackedMatrix,
    pub(crate) down: PackedMatrix,
}

/// Keys `[blocks, kv heads, 16, 64]` and values `[blocks, kv heads, 64, 16]` of one layer.
struct LayerCache {
    keys: Buffer,
    values: Buffer,
}

/// What a step scribbles on, allocated once. The shapes are those of `MAX_TOKENS` tokens.
pub(crate) struct Arena {
    /// f32 `[tokens, hidden]`
    pub(crate) residual: Buffer,
    /// f32 `[tokens, 64]`
    rotary: Buffer,
    /// u32 `[2, tokens]`
    slots: Buffer,
    /// 16-bit `[tokens, hidden]`, plain or stacked
    pub(crate) normed: Buffer,
    /// 16-bit `[slots, hidden]`, stacked
    gathered: Buffer,
    /// BF16 `[tokens, query heads, 64]`
    pub(crate) queries: Buffer,
    /// 16-bit `[tokens, query heads * 64]`
    pub(crate) context: Buffer,
    /// f32, see attention.cu
    parts: Buffer,
    pub(crate) arrivals: Buffer,
    /// f32 `[tokens, experts]`
    router_logits: Buffer,
    routes: Buffer,
    /// u32 of each block of experts_few.cuh
    rounds: Buffer,
    /// u32 of each expert and one more for experts_streamed_sm90.cu; zero before and after
    experts_done: Buffer,
    /// u32 `[2]`, see router_gather_sm90.cu; zero at first
    router_barrier: Buffer,
    /// f32 of each block of product_some_sm90.cu
    exchanged: Buffer,
    /// u32 `[shares, rows / 128]`, see there; zero at first
    exchanges: Buffer,
    /// 16-bit `[slots, intermediate]`, plain or stacked
    pub(crate) activated: Buffer,
    /// f32 `[slots, hidden]`
    expert_outputs: Buffer,
    /// f32 `[LOGIT_ROWS, vocabulary]`
    pub(crate) logits: Buffer,
    largest_parts: Buffer,
    /// u32 `[LOGIT_ROWS]`
    pub(crate) largest: Buffer,
    /// The step's words: see `Words`.
    step: Buffer,
    step_host: Pinned,
    logits_host: Pinned,
    largest_host: Pinned,
    /// Residual rows that were asked for.
    residual_host: Pinned,
}

impl Cuda {
    /// Packs `weights` on the device, tensor by tensor. `progress` is called with the layers done and their number.
    ///
    /// # Errors
    /// `Unsupported` names the shape that the kernels do not have; `Memory` what did not fit.
    pub fn load(
        device: &Arc<Device>,
        weights: &dyn Weights,
        options: Options,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Cuda, Error> {
        let config = weights.config().clone();
        check_shape(&config)?;
        device.bind()?;
        let arena = Arena::new(device, &config).map_err(|e| no_room(e, device, "activations"))?;
        let sampler =
            Sampler::new(device, config.vocab_size).map_err(|e| no_room(e, device, "activations"))?;
        let mut loader = Loader::new(device, weights)?;
        // Said at once, not after minutes of loading.
        let needed = least_bytes(weights) + RESERVE;
        if needed > device.memory()?.0 {
            return Err(no_room(Error::Memory { needed }, device, "the weights"));
        }
        let count = config.layer_kinds.len();
        let mut layers = Vec::with_capacity(count);
        for layer in 0..count {
            progress(layer, count);
            layers.push(Layer::load(&mut loader, layer).map_err(|e| no_room(e, device, "the weights"))?);
        }
        let rest = |e| no_room(e, device, "the weights");
        let unembedding =
            loader.matrix(&[(MatrixKind::Unembedding.at(0), RowOrder::Plain, None)]).map_err(rest)?;
        let embedding = loader.table(MatrixKind::Embedding.at(0)).map_err(rest)?;
        let final_norm = loader.vector(VectorKind::FinalNorm.at(0))?;
        let rotary = Rotary::new(&config.rope, config.head_dim);
        let frequencies = loader.floats(&rotary.frequencies)?;
        drop(loader);
        let one = match options.batch_invariant {
            true => None,
            false => OneToken::new(device, &config, &layers, &unembedding)
                .map_err(|e| no_room(e, device, "activations"))?,
        };
        device.synchronize()?;
        progress(count, count);
        Ok(Cuda {
            device: Arc::clone(device),
            config,
            embedding,
            frequencies,
            concentration: rotary.concentration,
            layers,
            final_norm,
            unembedding,
            arena,
            one,
            cache: Vec::new(),
            blocks: (0, 0),
            graphs: HashMap::new(),
            sampler,
            options,
            fp4: None,
        })
    }

    /// Packs the matrices of a W4A4 model a second time, for the generation's own FP4 products, which steps of many tokens then
    /// take. Their number is the result: 0 where the device has no such products, or the model no matrix with an input scale.
    ///
    /// # Errors
    /// As for [`Cuda::load`]; the model then runs as before.
    pub fn use_fp4(&mut self, weights: &dyn Weights) -> Result<usize, Error> {
        if !fp4::has_fp4(&self.device) {
            return Ok(0);
        }
        let device = Arc::clone(&self.device);
        let mut loader = Loader::new(&device, weights)?;
        let mut packed = Vec::new();
        for layer in 0..self.layers.len() {
            let mut load = |parts: &[(MatrixKind, RowOrder)]| {
                let parts: Vec<_> = parts.iter().map(|(kind, order)| (kind.at(layer), *order)).collect();
                Fp4Matrix::load(&device, &mut loader, weights, &parts)
                    .map_err(|e| no_room(e, &device, "the weights for FP4 products, beside the others,"))
            };
            packed.push([
                load(&[
                    (MatrixKind::Query, RowOrder::Rotary),
                    (MatrixKind::Key, RowOrder::Rotary),
                    (MatrixKind::Value, RowOrder::Plain),
                ])?,
                load(&[(MatrixKind::Output, RowOrder::Plain)])?,
                load(&[(MatrixKind::GateUp, RowOrder::GateUp)])?,
                load(&[(MatrixKind::Down, RowOrder::Plain)])?,
            ]);
        }
        drop(loader);
        let count = packed.iter().flatten().flatten().count();
        if count > 0 {
            let (config, padded) = (&self.config, |cols: usize| cols.next_multiple_of(TILE_COLS));
            let dense = MAX_TOKENS * (config.query_heads * HEAD).max(padded(config.hidden_size));
            let slots = max_slots(config, MAX_TOKENS) * padded(config.intermediate_size);
            self.fp4 = Some(fp4::Scratch::new(&device, dense.max(slots))?);
        }
        for (layer, [qkv, output, gate_up, down]) in self.layers.iter_mut().zip(packed) {
            (layer.qkv.fp4, layer.output.fp4) = (qkv, output);
            (layer.gate_up.fp4, layer.down.fp4) = (gate_up, down);
        }
        // They hold the old kernels.
        self.graphs.clear();
        Ok(count)
    }

    /// Bytes of device memory that the key/value cache can have, now that the weights are loaded, if at most `share` of all memory
    /// may be in use then.
    pub fn cache_memory(&self, share: Option<f64>) -> Result<usize, Error> {
        let (free, total) = self.device.memory()?;
        let kept = share.map_or(0, |share| ((1.0 - share) * total as f64) as usize);
        Ok(free.saturating_sub(kept.max(RESERVE)))
    }

    /// Bytes of a number of a key or a value.
    fn number_bytes(&self) -> usize {
        match self.options.cache {
            CacheFormat::Bf16 => 2,
            CacheFormat::E4m3 => 1,
        }
    }

    /// What a step reads.
    pub fn traffic(&self) -> Traffic {
        let dense = |l: &Layer| l.qkv.matrix_bytes() + l.output.matrix_bytes() + l.router.bytes();
        let layout = self.kv_layout();
        Traffic {
            dense_bytes: self.layers.iter().map(dense).sum::<usize>() + self.unembedding.matrix_bytes(),
            expert_bytes: self.layers.first().map_or(0, |l| l.gate_up.matrix_bytes() + l.down.matrix_bytes()),
            layers: self.layers.len(),
            experts: self.config.experts,
            experts_per_token: self.config.experts_per_token,
            full_kv_bytes: layout.full_block_bytes / BLOCK_TOKENS,
            sliding_kv_bytes: layout.sliding_block_bytes / BLOCK_TOKENS,
            sliding_window: self.config.sliding_window,
        }
    }

    /// Runs one step kernel by kernel and times each.
    pub fn profile(&mut self, plan: &Plan) -> Result<Vec<KernelTime>, Error> {
        let device = Arc::clone(&self.device);
        let eager = std::mem::replace(&mut self.options.eager, true);
        let times = device.profile(|| self.step(plan).map(drop));
        self.options.eager = eager;
        times
    }

    /// Bytes per second that the device reads from its memory: the best of some passes over the weights.
    pub fn read_bandwidth(&self) -> Result<f64, Error> {
        self.device.bind()?;
        let bytes = self.unembedding.weight_bytes().min(1 << 30);
        let from = self.unembedding.params().weights;
        let mut best = 0.0f64;
        for _ in 0..10 {
            let time = self.device.time(|| self.read(from, bytes))?;
            best = best.max(bytes as f64 / time);
        }
        Ok(best)
    }
}

impl Layer {
    fn load(loader: &mut Loader<'_>, layer: usize) -> Result<Layer, Error> {
        let part = |kind: MatrixKind, order, bias: VectorKind| (kind.at(layer), order, Some(bias.at(layer)));
        Ok(Layer {
            input_norm: loader.vector(VectorKind::InputNorm.at(layer))?,
            qkv: loader.matrix(&[
                part(MatrixKind::Query, RowOrder::Rotary, VectorKind::QueryBias),
                part(MatrixKind::Key, RowOrder::Rotary, VectorKind::KeyBias),
                part(MatrixKind::Value, RowOrder::Plain, VectorKind::ValueBias),
            ])?,
            kv_scales: loader.kv_scales(layer)?,
            sinks: loader.vector(VectorKind::Sinks.at(layer))?,
            output: loader.matrix(&[part(MatrixKind::Output, RowOrder::Plain, VectorKind::OutputBias)])?,
            post_attention_norm: loader.vector(VectorKind::PostAttentionNorm.at(layer))?,
            router: loader.rows(MatrixKind::Router.at(layer))?,
            router_bias: loader.vector(VectorKind::RouterBias.at(layer))?,
            gate_up: loader.matrix(&[part(MatrixKind::GateUp, RowOrder::GateUp, VectorKind::GateUpBias)])?,
            down: loader.matrix(&[part(MatrixKind::Down, RowOrder::Plain, VectorKind::DownBias)])?,
        })
    }
}

impl Arena {
    fn new(device: &Arc<Device>, config: &Config) -> Result<Arena, Error> {
        let padded = |cols: usize| cols.next_multiple_of(TILE_COLS);
        let tokens = MAX_TOKENS;
        let (rows, slots) = (stack_rows(tokens), stack_rows(max_slots(config, tokens)));
        let context = config.query_heads * HEAD;
        let step_words = 1 << 20;
        Ok(Arena {
            residual: device.buffer(tokens * config.hidden_size * 4)?,
            rotary: device.buffer(tokens * HEAD * 4)?,
            slots: device.buffer(2 * tokens * 4)?,
            normed: device.buffer(rows * padded(config.hidden_size) * 2)?,
            gathered: device.buffer(slots * padded(config.hidden_size) * 2)?,
            queries: device.buffer(tokens * context * 2)?,
            context: device.buffer(rows * context * 2)?,
            parts: device.buffer(MAX_PARTS * ATTENTION_WARPS * (HEAD + 2) * 4)?,
            arrivals: device.buffer((MAX_PARTS + tokens + 1) * 4)?,
            router_logits: device.buffer(tokens * config.experts * 4)?,
            routes: device.buffer(route_words(config, tokens) * 4)?,
            rounds: device.buffer(4 * device.multiprocessors())?,
            experts_done: device.buffer(4 * (config.experts + 1))?,
            router_barrier: device.buffer(8)?,
            exchanged: device
                .buffer(device.multiprocessors() * SOME_TOKENS * GEMM_ROW_TILES * TILE_ROWS * 4)?,
            exchanges: device.buffer((SOME_SHARES + 1) * device.multiprocessors() * 4)?,
            activated: device.buffer(slots * padded(config.intermediate_size) * 2)?,
            expert_outputs: device.buffer(slots * config.hidden_size * 4)?,
            logits: device.buffer(LOGIT_ROWS * config.vocab_size * 4)?,
            largest_parts: device.buffer(LOGIT_ROWS * LARGEST_BLOCKS * 8)?,
            largest: device.buffer(LOGIT_ROWS * 4)?,
            step: device.buffer(step_words * 4)?,
            step_host: device.pinned(step_words * 4)?,
            logits_host: device.pinned(config.vocab_size * 4)?,
            largest_host: device.pinned(LOGIT_ROWS * 4)?,
            residual_host: device.pinned(config.hidden_size * 4)?,
        })
    }
}

/// Where the parts of a step's words begin. For a decode step they depend on nothing but the number of tokens.
#[derive(Debug, Clone, Copy)]
struct Words {
    tokens: usize,
    positions: usize,
    sequences: usize,
    outputs: usize,
    tiles: usize,
    full_starts: usize,
    sliding_starts: usize,
    tables: usize,
}

impl Words {
    fn new(tokens: usize, outputs: usize, tiles: usize, sequences: usize) -> Words {
        let tiles_at = 3 * tokens + outputs;
        let starts = tiles_at + 2 * tiles;
        Words {
            tokens: 0,
            positions: tokens,
            sequences: 2 * tokens,
            outputs: 3 * tokens,
            tiles: tiles_at,
            full_starts: starts,
            sliding_starts: starts + sequences,
            tables: starts + 2 * sequences,
        }
    }
}

/// Part of one sequence's tokens.
#[derive(Debug, Clone)]
struct Segment {
    /// Index in the plan.
    sequence: usize,
    /// Which of the plan's tokens.
    range: Range<usize>,
    /// Computed as a single token, not as a chunk.
    single: bool,
}

/// What is computed at a time: single tokens first, then chunks.
struct Batch<'a> {
    plan: &'a Plan,
    segments: Vec<Segment>,
    /// Segments of one token.
    singles: usize,
    tokens: usize,
    /// Rows whose logits are wanted, each with its segment and which of the plan's tokens it is.
    outputs: Vec<(usize, usize, usize)>,
}

/// The numbers that decide a batch's kernels.
#[derive(Debug, Clone, Copy)]
struct Shape {
    words: Words,
    tokens: usize,
    singles: usize,
    tiles: usize,
    /// Of single tokens' keys in the full and in the sliding layers.
    full: Sharing,
    sliding: Sharing,
    /// Whether each of them is of another sequence.
    ahead: bool,
}

/// By how many the keys of a single token are shared, for as many query heads as a warp takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Sharing {
    /// Of a block: a power of two.
    warps: usize,
    /// Blocks: one, unless each has all its warps for it.
    splits: usize,
}

impl<'a> Batch<'a> {
    fn new(plan: &'a Plan, mut segments: Vec<Segment>) -> Batch<'a> {
        segments.sort_by_key(|segment| !segment.single);
        let singles = segments.iter().take_while(|segment| segment.single).count();
        let (mut tokens, mut outputs) = (0, Vec::new());
        for (s, segment) in segments.iter().enumerate() {
            let sequence = &plan.sequences[segment.sequence];
            let scored = sequence.score.as_ref().map_or(0, |score| score.next.len());
            for (row, token) in segment.range.clone().enumerate() {
                if sequence.logits || token < scored || sampling(sequence, token).is_some() {
                    outputs.push((tokens + row, s, token));
                }
            }
            tokens += segment.range.len();
        }
        Batch { plan, segments, singles, tokens, outputs }
    }

    fn sequence(&self, segment: &Segment) -> &'a SequencePlan {
        &self.plan.sequences[segment.sequence]
    }

    /// First row and number of tokens of each tile of `tile_tokens`.
    fn tiles(&self, tile_tokens: usize) -> Vec<(usize, usize)> {
        let (mut row, mut tiles) = (self.singles, Vec::new());
        for segment in &self.segments[self.singles..] {
            let len = segment.range.len();
            tiles.extend((0..len).step_by(tile_tokens).map(|at| (row + at, tile_tokens.min(len - at))));
            row += len;
        }
        tiles
    }
}

impl Backend for Cuda {
    fn config(&self) -> &Config {
        &self.config
    }

    fn describe(&self) -> String {
        let fp4 = if self.fp4.is_some() { ", FP4 products of many tokens" } else { "" };
        let cache = match self.options.cache {
            CacheFormat::Bf16 => "BF16",
            CacheFormat::E4m3 => "E4M3",
        };
        let graphs = if self.options.eager { ", no graphs" } else { "" };
        format!("{}, 16-bit activations{fp4}, {cache} keys and values{graphs}", self.device.name())
    }

    fn kv_layout(&self) -> KvLayout {
        let layout = KvLayout::f32(&self.config);
        let smaller = size_of::<f32>() / self.number_bytes();
        KvLayout {
            full_block_bytes: layout.full_block_bytes / smaller,
            sliding_block_bytes: layout.sliding_block_bytes / smaller,
        }
    }

    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> Result<(), Error> {
        self.device.bind()?;
        self.device.synchronize()?;
        // The old cache is given back first: two never exist at once.
        self.graphs.clear();
        self.cache.clear();
        self.blocks = (0, 0);
        for kind in &self.config.layer_kinds {
            let blocks = if *kind == LayerKind::Sliding { sliding_blocks } else { full_blocks };
            let bytes = blocks
                .checked_mul(self.config.kv_heads * BLOCK_TOKENS * HEAD * self.number_bytes())
                .ok_or(Error::Memory { needed: usize::MAX })?;
            let buffer = || self.device.buffer(bytes);
            match (buffer(), buffer()) {
                (Ok(keys), Ok(values)) => self.cache.push(LayerCache { keys, values }),
                _ => {
                    self.cache.clear();
                    let layout = self.kv_layout();
                    let needed = full_blocks
                        .saturating_mul(layout.full_block_bytes)
                        .saturating_add(sliding_blocks.saturating_mul(layout.sliding_block_bytes));
                    return Err(Error::Memory { needed });
                }
            }
        }
        self.blocks = (full_blocks, sliding_blocks);
        Ok(())
    }

    fn step(&mut self, plan: &Plan) -> Result<Vec<SequenceOutput>, Error> {
        self.step_while(plan, &mut || {})
    }

    fn step_while(&mut self, plan: &Plan, meanwhile: &mut dyn FnMut()) -> Result<Vec<SequenceOutput>, Error> {
        let mut meanwhile = Some(meanwhile);
        let results = self.run_plan(plan, &mut meanwhile);
        // Where nothing was sent to the device.
        run_once(&mut meanwhile);
        results
    }
}

/// What the host does while the device computes; `None`: it has done so.
type Meanwhile<'a> = Option<&'a mut dyn FnMut()>;

fn run_once(meanwhile: &mut Meanwhile<'_>) {
    if let Some(work) = meanwhile.take() {
        work();
    }
}

impl Cuda {
    fn run_plan(&mut self, plan: &Plan, meanwhile: &mut Meanwhile<'_>) -> Result<Vec<SequenceOutput>, Error> {
        plan.check(&self.config, self.blocks.0, self.blocks.1)?;
        self.device.bind()?;
        let mut results = vec![SequenceOutput::default(); plan.sequences.len()];
        let (mut segments, mut tokens) = (Vec::new(), 0);
        for (sequence, planned) in plan.sequences.iter().enumerate() {
            let len = planned.tokens.len();
            // Where a token's kernels may not depend on company, they depend on whether it is the prompt's.
            let invariant = self.options.batch_invariant;
            let prompt = if invariant { len - planned.generated } else { len };
            let mut at = 0;
            while at < len {
                let end = if at < prompt { prompt } else { at + 1 };
                let count = (end - at).min(MAX_TOKENS - tokens);
                let single = if invariant { at >= prompt } else { count == 1 };
                segments.push(Segment { sequence, range: at..at + count, single });
                (at, tokens) = (at + count, tokens + count);
                if tokens == MAX_TOKENS {
                    self.run_segments(plan, std::mem::take(&mut segments), &mut results, meanwhile)?;
                    tokens = 0;
                }
            }
        }
        if tokens > 0 {
            self.run_segments(plan, segments, &mut results, meanwhile)?;
        }
        Ok(results)
    }

    fn run_segments(
        &mut self,
        plan: &Plan,
        segments: Vec<Segment>,
        results: &mut [SequenceOutput],
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<(), Error> {
        if !self.options.batch_invariant {
            return self.run(&Batch::new(plan, segments), results, meanwhile);
        }
        // Kernels are chosen by what is in a batch.
        let (singles, chunks): (Vec<_>, Vec<_>) = segments.into_iter().partition(|s| s.single);
        // A sequence's prompt comes before its answer.
        let chunks = [&chunks[..]].into_iter().filter(|chunks| !chunks.is_empty());
        for segments in chunks.chain(singles.chunks(INVARIANT_SINGLES)) {
            self.run(&Batch::new(plan, segments.to_vec()), results, meanwhile)?;
        }
        Ok(())
    }

    fn run(
        &mut self,
        batch: &Batch<'_>,
        results: &mut [SequenceOutput],
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<(), Error> {
        let shape = self.upload(batch)?;
        let hidden = batch.segments.iter().any(|s| batch.sequence(s).hidden_after_layer.is_some());
        let decode = batch.singles == batch.segments.len() && batch.outputs.len() == batch.tokens;
        if decode && !hidden && !self.options.eager && batch.tokens <= LOGIT_ROWS {
            let key = (shape.tokens, shape.full, shape.ahead);
            if !self.graphs.contains_key(&key) {
                let graph = self.device.capture(|| {
                    self.embed(&shape)?;
                    let pending = (0..self.layers.len())
                        .try_fold(false, |pending, layer| self.layer(layer, &shape, pending))?;
                    self.output(&shape, 0..shape.tokens, pending)
                })?;
                self.graphs.insert(key, graph);
            }
            self.graphs[&key].launch()?;
            run_once(meanwhile);
            return self.collect(batch, 0..batch.tokens, results);
        }
        self.embed(&shape)?;
        let mut pending = false;
        for layer in 0..self.layers.len() {
            pending = self.layer(layer, &shape, pending)?;
            let wanted = |s: &Segment| batch.sequence(s).hidden_after_layer == Some(layer);
            if hidden && batch.segments.iter().any(wanted) {
                if pending {
                    self.norm(&shape, pending, None)?;
                    pending = false;
                }
                self.collect_hidden(batch, layer, results)?;
            }
        }
        for first in (0..batch.outputs.len()).step_by(LOGIT_ROWS) {
            let rows = first..batch.outputs.len().min(first + LOGIT_ROWS);
            self.output(&shape, rows.clone(), pending)?;
            run_once(meanwhile);
            self.collect(batch, rows, results)?;
        }
        run_once(meanwhile);
        self.device.synchronize()
    }

    /// Writes the step's words and sends them on their way.
    fn upload(&mut self, batch: &Batch<'_>) -> Result<Shape, Error> {
        let groups = self.config.query_heads / self.config.kv_heads;
        let tiles = batch.tiles(TILE_QUERIES / groups);
        let words = Words::new(batch.tokens, batch.outputs.len(), tiles.len(), batch.segments.len());
        // Tables of the full layers from the start, of the sliding layers from the window.
        let window = |s: &Segment| {
            let first = batch.sequence(s).position + s.range.start;
            (first + 1).saturating_sub(self.config.sliding_window) / BLOCK_TOKENS
        };
        let blocks = |s: &Segment| (batch.sequence(s).position + s.range.end).div_ceil(BLOCK_TOKENS);
        let total = words.tables + batch.segments.iter().map(|s| 2 * blocks(s) - window(s)).sum::<usize>();
        if total * 4 > self.arena.step.bytes() {
            self.device.synchronize()?;
            self.graphs.clear();
            let bytes = total.next_power_of_two() * 4;
            self.arena.step_host = self.device.pinned(bytes)?;
            self.arena.step = self.device.buffer(bytes)?;
        }
        let host = self.arena.step_host.slice_mut::<u32>();
        let (mut row, mut table, mut pages, mut total_pages) = (0, words.tables, 0, 0);
        for (s, segment) in batch.segments.iter().enumerate() {
            let sequence = batch.sequence(segment);
            for token in segment.range.clone() {
                host[words.tokens + row] = sequence.tokens[token];
                host[words.positions + row] = (sequence.position + token) as u32;
                host[words.sequences + row] = s as u32;
                row += 1;
            }
            let (first, end) = (window(segment), blocks(segment));
            let mut put = |from: &[BlockId], skipped: usize| {
                host[table..table + from.len()].copy_from_slice(from);
                table += from.len();
                // May be negative: entries before the window are not looked at.
                (table - from.len()) as i32 - skipped as i32
            };
            let full = put(&sequence.full_blocks[..end], 0);
            let sliding = put(&sequence.sliding_blocks[first..end], first);
            host[words.full_starts + s] = full as u32;
            host[words.sliding_starts + s] = sliding as u32;
            if s < batch.singles {
                pages = pages.max(end);
                total_pages += end;
            }
        }
        for (i, &(row, ..)) in batch.outputs.iter().enumerate() {
            host[words.outputs + i] = row as u32;
        }
        for (i, &(first, count)) in tiles.iter().enumerate() {
            host[words.tiles + 2 * i] = first as u32;
            host[words.tiles + 2 * i + 1] = count as u32;
        }
        self.arena.step.upload(0, &self.arena.step_host, total * 4)?;
        let (full, sliding) = self.sharing(batch.singles, total_pages, pages);
        let (tokens, singles) = (batch.tokens, batch.singles);
        let ahead = batch.segments[..singles].windows(2).all(|pair| pair[0].sequence != pair[1].sequence);
        Ok(Shape { words, tokens, singles, tiles: tiles.len(), full, sliding, ahead })
    }

    /// How the keys of `singles` tokens are shared in full and in sliding layers; `total` pages of all tokens, `most` of one.
    fn sharing(&self, singles: usize, total: usize, most: usize) -> (Sharing, Sharing) {
        // As `own_splits` in attention.cu.
        let power_below = |n: usize| 1 << n.max(1).ilog2();
        let useful = match most / (4 * ATTENTION_WARPS) {
            ..4 => 1,
            blocks => power_below(blocks).min(MAX_SPLITS),
        };
        if self.options.batch_invariant {
            let all = |splits| Sharing { warps: ATTENTION_WARPS, splits };
            return (all(useful.min(INVARIANT_SPLITS)), all(1));
        }
        let heads = self.attention_heads();
        let fitting = ATTENTION_BLOCKS * ATTENTION_WARPS * self.device.multiprocessors();
        // As many warps as find room at a time; or so many that hardly any room is left over, where each has some pages even so, and more
        // of them if another block's parts must be waited for.
        let pairs = singles.max(1) * heads;
        let above = (9 * fitting / 10).div_ceil(pairs).next_power_of_two();
        let some = if above > ATTENTION_WARPS { 8 } else { 4 };
        let fill = |pages: usize| if pages >= some * above { above } else { power_below(fitting / pairs) };
        let pages = total / singles.max(1);
        let (full, sliding) = (fill(pages), fill(pages.min(self.config.sliding_window / BLOCK_TOKENS)));
        // Where one token has many more pages than others, it should not keep them waiting.
        let mean = total * heads / fitting;
        let sharers = full.max(most.div_ceil((2 * mean).max(8)).next_power_of_two());
        let room = power_below(MAX_PARTS / (8 * heads));
        let splits = (sharers / ATTENTION_WARPS).clamp(1, useful.min(room));
        let warps = |sharers: usize| sharers.min(ATTENTION_WARPS);
        (Sharing { warps: warps(sharers), splits }, Sharing { warps: warps(sliding), splits: 1 })
    }

    /// Groups of query heads that share keys, of which attention.cu gives each to a warp.
    fn attention_heads(&self) -> usize {
        let group = self.config.query_heads / self.config.kv_heads;
        self.config.query_heads / group.min(ATTENTION_WARPS)
    }

    fn word(&self, at: usize) -> Address {
        self.arena.step.address() + 4 * at as u64
    }

    fn embed(&self, shape: &Shape) -> Result<(), Error> {
        let params = Embed {
            values: self.embedding.values.address(),
            scales: self.embedding.scales.as_ref().map_or(0, Buffer::address),
            tokens: self.word(shape.words.tokens),
            positions: self.word(shape.words.positions),
            frequencies: self.frequencies.address(),
            residual: self.arena.residual.address(),
            rotary: self.arena.rotary.address(),
            sequences: self.word(shape.words.sequences),
            full_starts: self.word(shape.words.full_starts),
            sliding_starts: self.word(shape.words.sliding_starts),
            table: self.word(0),
            slots: self.arena.slots.address(),
            hidden: self.config.hidden_size as u32,
            n: shape.tokens as u32,
            block: self.embedding.block,
            global_scale: self.embedding.global_scale,
            concentration: self.concentration,
            padding: 0,
        };
        let threads = if shape.tokens == 1 { 1024 } else { 256 };
        // SAFETY: at most MAX_TOKENS blocks, whose rows the arena has; tokens are below the vocabulary's size.
        unsafe { self.device.launch("embed", [shape.tokens as u32, 1, 1], threads, 0, &params) }
    }

    /// One layer. `pending`, here and in the result: the outputs of the experts of the layer before are not yet added to
    /// the residual stream.
    fn layer(&self, index: usize, shape: &Shape, pending: bool) -> Result<bool, Error> {
        let layer = &self.layers[index];
        let one = self.one.as_ref().filter(|_| shape.tokens == 1);
        if one.is_none() {
            self.norm(shape, pending, Some((&layer.input_norm, &layer.qkv)))?;
        }
        let sliding = self.config.layer_kinds[index] == LayerKind::Sliding;
        let cache = &self.cache[index];
        let starts = if sliding { shape.words.sliding_starts } else { shape.words.full_starts };
        let epilogue = Epilogue {
            out16: self.arena.queries.address(),
            keys: cache.keys.address(),
            values: cache.values.address(),
            rotary: self.arena.rotary.address(),
            slots: self.arena.slots.address() + if sliding { 4 * shape.tokens as u64 } else { 0 },
            out_format: self.options.cache as u32,
            limit: layer.kv_scales.key,
            alpha: layer.kv_scales.value,
            ..self.epilogue(After::Qkv)
        };
        if let Some(one) = one {
            one.qkv(self, layer, epilogue, pending)?;
            self.attention(index, shape, starts)?;
            one.attended(self, layer)?;
            one.experts(self, layer)?;
            return Ok(true);
        }
        self.product(&layer.qkv, self.arena.normed.address(), shape.tokens, epilogue)?;
        self.attention(index, shape, starts)?;
        let epilogue = Epilogue { out: self.arena.residual.address(), ..self.epilogue(After::Residual) };
        self.product(&layer.output, self.arena.context.address(), shape.tokens, epilogue)?;
        self.experts(index, shape)?;
        Ok(true)
    }

    pub(crate) fn epilogue(&self, after: After) -> Epilogue {
        Epilogue {
            kind: after as u32,
            query_heads: self.config.query_heads as u32,
            kv_heads: self.config.kv_heads as u32,
            limit: self.config.swiglu_limit,
            alpha: self.config.swiglu_alpha,
            ..Zeroable::zeroed()
        }
    }

    /// Adds what is pending, then norms all rows, by this scale for products with this matrix, if they are given.
    fn norm(
        &self,
        shape: &Shape,
        pending: bool,
        scale: Option<(&Buffer, &PackedMatrix)>,
    ) -> Result<(), Error> {
        if let Some(one) = self.one.as_ref().filter(|_| shape.tokens == 1) {
            return one.norm(self, pending);
        }
        let out = scale.map_or(0, |_| self.arena.normed.address());
        let params = Norm {
            scale: scale.map_or(0, |(scale, _)| scale.address()),
            format: scale.map_or(0, |(_, matrix)| matrix.format()),
            stack: scale.map_or(0, |(_, matrix)| self.stack(matrix, shape.tokens)),
            ..self.norm_params(shape, pending, out)
        };
        // SAFETY: the arena has MAX_TOKENS rows of each; the routes are of the same tokens.
        unsafe { self.device.launch("rms_norm", [shape.tokens as u32, 1, 1], 256, 0, &params) }
    }

    fn norm_params(&self, shape: &Shape, pending: bool, out: Address) -> Norm {
        Norm {
            residual: self.arena.residual.address(),
            experts: if pending { self.arena.expert_outputs.address() } else { 0 },
            routes: self.arena.routes.address(),
            rows: 0,
            scale: 0,
            out,
            hidden: self.config.hidden_size as u32,
            cols: self.config.hidden_size.next_multiple_of(TILE_COLS) as u32,
            n: shape.tokens as u32,
            experts_count: self.config.experts as u32,
            experts_per_token: self.config.experts_per_token as u32,
            format: 0,
            stack: 0,
            eps: self.config.rms_norm_eps,
        }
    }

    fn product_params(&self, matrix: &PackedMatrix, input: Address, n: usize, epilogue: Epilogue) -> Product {
        Product {
            matrix: matrix.params(),
            input,
            list: self.arena.routes.address(),
            epilogue,
            n: n as u32,
            experts: self.config.experts as u32,
            experts_per_token: self.config.experts_per_token as u32,
            padding: 0,
        }
    }

    /// A dense product with `n` rows of `input`.
    fn product(
        &self,
        matrix: &PackedMatrix,
        input: Address,
        n: usize,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        if let Some((scratch, fp4)) = self.fp4(matrix, n) {
            return fp4::multiply(&self.device, scratch, fp4, matrix.params(), (input, n), None, epilogue);
        }
        if self.few(matrix, n) {
            let name = match n {
                ..=8 => "product_few_8",
                9..=16 => "product_few_16",
                _ => "product_few_32",
            };
            let params = Dense { matrix: matrix.params(), input, epilogue, n: n as u32, padding: 0 };
            let grid = [self.device.multiprocessors().min(matrix.row_tiles()) as u32, 1, 1];
            // SAFETY: input and outputs have `n` rows in the arena or the cache; blocks and tables were checked with the plan.
            return unsafe { self.device.launch(name, grid, 32 * DENSE_WARPS, DENSE_SHARED, &params) };
        }
        if let Some(shares) = self.some(matrix, n, &epilogue) {
            return self.product_of_some(matrix, shares, input, n, epilogue);
        }
        if self.many(n) {
            return self.product_of_many(matrix, input, n, epilogue);
        }
        if n > DENSE_FEW && !self.options.batch_invariant {
            return self.product_anywhere(matrix, input, n, false, epilogue);
        }
        let columns = if n <= 8 && !self.options.batch_invariant { 8 } else { 16 };
        let name = match (matrix.format(), columns) {
            (BF16, 8) => "product_bf16_8",
            (BF16, _) => "product_bf16_16",
            (_, 8) => "product_fp4_8",
            _ => "product_fp4_16",
        };
        let params = self.product_params(matrix, input, n, epilogue);
        // Where there are many more tiles than fit at a time, blocks stay and take one after the other.
        let (tiles, fitting) = (matrix.row_tiles(), 3 * self.device.multiprocessors());
        let blocks = if tiles > 3 * fitting { fitting } else { tiles };
        let grid = [blocks as u32, n.div_ceil(columns) as u32, 1];
        // SAFETY: input and outputs have `n` rows in the arena or the cache; blocks and tables were checked with the plan.
        unsafe { self.device.launch(name, grid, PRODUCT_THREADS, partial_bytes(columns), &params) }
    }

    /// A product of many tokens where there is no wgmma: dense, or of the experts with the activations of their tokens or slots.
    fn product_anywhere(
        &self,
        matrix: &PackedMatrix,
        input: Address,
        n: usize,
        experts: bool,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        let blocks = n.div_ceil(GEMM_TOKENS) * matrix.row_tiles().div_ceil(GEMM_ROW_TILES);
        let few = if experts { self.few_tokens_each(n) } else { blocks < self.device.multiprocessors() };
        let (name, tokens) = match (matrix.format(), few) {
            (BF16, _) => ("gemm_many_bf16_64", FEWER_TOKENS),
            (_, true) => ("gemm_many_fp4_64", FEWER_TOKENS),
            (_, false) => ("gemm_many_fp4_128", GEMM_TOKENS),
        };
        let list = if experts { self.arena.routes.address() } else { 0 };
        let params = Product { list, ..self.product_params(matrix, input, n, epilogue) };
        let tiles = if experts { self.expert_tiles(n, tokens) } else { n.div_ceil(tokens) };
        let grid = [matrix.row_tiles().div_ceil(GEMM_ROW_TILES) as u32, tiles as u32, 1];
        // Three stages of activations, or 64 tokens' sums.
        let shared = (3 * tokens * TILE_COLS * 2).max(FEWER_TOKENS * (GEMM_ROW_TILES * TILE_ROWS + 4) * 4);
        // SAFETY: input and outputs have `n` rows, or as many slots as the router's list names, in the arena or the cache; blocks and
        // tables were checked with the plan.
        unsafe { self.device.launch(name, grid, 256, shared, &params) }
    }

    /// What FP4 products of this many tokens need, if the matrix takes them.
    fn fp4<'a>(&'a self, matrix: &'a PackedMatrix, n: usize) -> Option<(&'a fp4::Scratch, &'a Fp4Matrix)> {
        if n > FP4_FROM && !self.options.batch_invariant {
            self.fp4.as_ref().zip(matrix.fp4.as_ref())
        } else {
            None
        }
    }

    /// Whether products with this matrix, which is dense, take product_few_sm90.cu.
    fn few(&self, matrix: &PackedMatrix, n: usize) -> bool {
        self.device.capability() == 90
            && !self.options.batch_invariant
            && n <= DENSE_TOKENS
            && matrix.format() == BF16
            && matrix.row_tiles() <= DENSE_ROW_TILES * self.device.multiprocessors()
    }

    /// Whether products of this many tokens take gemm_sm90.cu, whose activations are stacked.
    fn many(&self, n: usize) -> bool {
        self.device.capability() == 90 && (n > FEW_TOKENS || self.options.batch_invariant)
    }

    /// Rows of a stack of activations of `n` tokens for products with this matrix, or 0 where they are plain.
    fn stack(&self, matrix: &PackedMatrix, n: usize) -> u32 {
        if self.many(n) && !self.few(matrix, n) { stack_rows(n) as u32 } else { 0 }
    }

    /// The same for the activations of slots.
    fn slot_stack(&self, n: usize) -> u32 {
        if self.many(n) { stack_rows(max_slots(&self.config, n)) as u32 } else { 0 }
    }

    /// If a product with this matrix, which is dense, takes product_some_sm90.cu: by how many blocks the inputs are shared.
    fn some(&self, matrix: &PackedMatrix, n: usize, epilogue: &Epilogue) -> Option<usize> {
        let blocks = matrix.row_tiles().div_ceil(GEMM_ROW_TILES);
        let shares =
            (self.device.multiprocessors() / blocks).min(SOME_SHARES).min(matrix.padded_cols() / TILE_COLS);
        let fits = self.device.capability() == 90
            && !self.options.batch_invariant
            && n > DENSE_TOKENS
            && n <= SOME_TOKENS
            && matrix.format() == BF16
            && match epilogue.kind {
                QKV => shares > 1,
                // With more tokens gemm_sm90.cu is faster.
                RESIDUAL => shares > 1 && n <= GEMM_TOKENS,
                STORE => matrix.row_tiles().is_multiple_of(GEMM_ROW_TILES) && !matrix.has_bias(),
                _ => false,
            };
        fits.then_some(if epilogue.kind == STORE { 1 } else { shares })
    }

    fn product_of_some(
        &self,
        matrix: &PackedMatrix,
        shares: usize,
        input: Address,
        n: usize,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        let multiprocessors = self.device.multiprocessors();
        let few = n <= GEMM_TOKENS;
        let (name, early) = match (epilogue.kind, few) {
            (QKV, true) => ("product_some_qkv_128", 8),
            (QKV, false) => ("product_some_qkv_256", 5),
            (RESIDUAL, _) => ("product_some_residual_128", 3),
            (_, true) => ("product_some_128", 6),
            (_, false) => ("product_some_256", 6),
        };
        let params = Exchanged {
            matrix: matrix.params(),
            input,
            epilogue,
            parts: self.arena.exchanged.address(),
            arrivals: self.arena.exchanges.address() + 4 * (shares * multiprocessors) as u64,
            n: n as u32,
            stack: self.stack(matrix, n),
            early,
            padding: 0,
        };
        let blocks = matrix.row_tiles().div_ceil(GEMM_ROW_TILES).min(multiprocessors);
        let grid = [blocks as u32, shares as u32, 1];
        let shared = if few { SOME_SHARED_128 } else { SOME_SHARED_256 };
        // SAFETY: as in `product`; the arena's stacks have room for whole tiles. There are not more blocks than multiprocessors, each of
        // which has room for one, so that all are at work when they wait for one another.
        unsafe { self.device.launch(name, grid, 256, shared, &params) }
    }

    fn product_of_many(
        &self,
        matrix: &PackedMatrix,
        input: Address,
        n: usize,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        let blocks = matrix.row_tiles().div_ceil(GEMM_ROW_TILES);
        let fitting = 2 * self.device.multiprocessors();
        let tiles = n.div_ceil(GEMM_TOKENS);
        let params = |tile: usize| Gemm {
            tile: tile as u32,
            stack: self.stack(matrix, n),
            ..self.gemm_params(matrix, input, n, epilogue)
        };
        let counted = if self.options.batch_invariant { 1 } else { tiles };
        if 2 * blocks * counted <= fitting {
            // Too few blocks for the device: several share the inputs.
            let shares = fitting / (blocks * counted);
            let shares = shares.min(MAX_CLUSTER).min(matrix.padded_cols() / TILE_COLS);
            let name = if matrix.format() == FP4 { "gemm_fp4_split" } else { "gemm_bf16_split" };
            let tile = n.div_ceil(tiles).next_multiple_of(8);
            let grid = [blocks as u32, shares as u32, tiles as u32];
            // SAFETY: as in `product`; the arena's stacks have room for whole tiles.
            return unsafe {
                self.device.launch_clusters(name, grid, shares as u32, 256, GEMM_SHARED, &params(tile))
            };
        }
        // Tiles of a size with which the last wave of blocks is nearly full; a block's time is that of its tokens and some more.
        let cost = |tile: usize| (blocks * n.div_ceil(tile)).div_ceil(fitting) * (tile + 32);
        let tile = (3..=8).rev().map(|i| 16 * i).min_by_key(|&tile| cost(tile)).unwrap_or(GEMM_TOKENS);
        let name = if matrix.format() == FP4 { "gemm_fp4" } else { "gemm_bf16" };
        let tiles = n.div_ceil(tile);
        // What does not fit the cache is read once.
        let tokens_first = matrix.matrix_bytes() > GEMM_CACHED;
        let params = Gemm { tokens_first: u32::from(tokens_first), ..params(tile) };
        let (rows, tokens) = (blocks as u32, tiles as u32);
        let grid = if tokens_first { [tokens, 1, rows] } else { [rows, 1, tokens] };
        // SAFETY: as above.
        unsafe { self.device.launch(name, grid, 256, gemm_many_shared(matrix.format()), &params) }
    }

    /// The kernel of experts_few.cuh for `n` tokens, and how it goes through the experts of a layer.
    fn few_kernel(&self, layer: &Layer, n: usize) -> FewKernel {
        let few = n * self.config.experts_per_token <= 8 * self.config.experts;
        let (name, groups, tokens) = if few { ("experts_few", 6, 16) } else { ("experts_some", 4, 24) };
        // Of each warp two chunks of four tiles; what all warpgroups but one leave for others; the plan; the routes.
        let weights = 4 * groups * 2 * 4 * (512 + 64);
        let beside = weights + (groups - 1) * (tokens / 2) * 128 * 4 + 2048 + self.own_routes(n);
        let room = self.device.shared_bytes().saturating_sub(beside) / 1024 * 1024;
        let cols = layer.gate_up.padded_cols().max(layer.down.padded_cols());
        let tokens = (room / (2 * cols)).min(tokens) / 8 * 8;
        FewKernel { name, threads: 128 * groups as u32, tokens, room, shared: room + beside }
    }

    /// Bytes of shared memory for the routes of `n` tokens that blocks of experts_few.cuh make themselves; 0 if the router makes them.
    fn own_routes(&self, n: usize) -> usize {
        let bytes = (8 * self.config.experts + 4 * route_words(&self.config, n)).next_multiple_of(16);
        if n <= OWN_ROUTES_TOKENS && bytes <= OWN_ROUTES_BYTES { bytes } else { 0 }
    }

    /// Whether the experts have few tokens each, and take experts_few.cuh.
    fn few_each(&self, layer: &Layer, shape: &Shape) -> bool {
        let n = shape.tokens;
        let (experts, pairs) = (self.config.experts, n * self.config.experts_per_token);
        let tokens = self.few_kernel(layer, n).tokens;
        let few = match self.options.batch_invariant {
            true => shape.singles == n,
            false => n > 1 && pairs <= 20 * experts && !self.some_each(layer, n),
        };
        self.device.capability() >= 90
            && few
            && layer.gate_up.format() == FP4
            && layer.down.format() == FP4
            && tokens > 0
            // A block may have a quarter more of those that cost least.
            && (pairs / tokens + experts) * 5 / (4 * self.device.multiprocessors()) + 2 <= FEW_PASSES
    }

    fn experts_of_few_each(
        &self,
        layer: &Layer,
        n: usize,
        first: Epilogue,
        second: Epilogue,
    ) -> Result<(), Error> {
        let kernel = self.few_kernel(layer, n);
        let params = Few {
            parts: self.parts(layer, &self.arena.normed, first, second),
            list: self.arena.routes.address(),
            logits: if self.own_routes(n) > 0 { self.arena.router_logits.address() } else { 0 },
            rounds: self.arena.rounds.address(),
            n: n as u32,
            experts: self.config.experts as u32,
            experts_per_token: self.config.experts_per_token as u32,
            tokens: kernel.tokens as u32,
            room: kernel.room as u32,
            whole: u32::from(self.options.batch_invariant),
        };
        let grid = [self.device.multiprocessors() as u32, 1, 1];
        // SAFETY: the router's list names rows and slots of these tokens, for which the arena has room. There are not more blocks than
        // multiprocessors, so that all are at work when they wait for one another, and every launch has as many.
        unsafe { self.device.launch(kernel.name, grid, kernel.threads, kernel.shared, &params) }
    }

    /// Both products of the experts, for the kernels that take them at once.
    fn parts(&self, layer: &Layer, input: &Buffer, first: Epilogue, second: Epilogue) -> [Part; 2] {
        let part = |matrix: &PackedMatrix, input: &Buffer, epilogue| Part {
            matrix: matrix.params(),
            epilogue,
            input: input.address(),
        };
        [part(&layer.gate_up, input, first), part(&layer.down, &self.arena.activated, second)]
    }

    /// Whether the experts have more than a few tokens each, and take experts_streamed_sm90.cu.
    fn some_each(&self, layer: &Layer, n: usize) -> bool {
        let (experts, pairs) = (self.config.experts, n * self.config.experts_per_token);
        // Each expert may have one part that is not full.
        let parts = pairs / STREAMED_TOKENS + experts;
        self.device.capability() == 90
            && !self.options.batch_invariant
            && pairs > STREAMED_FROM * experts
            && layer.gate_up.format() == FP4
            && layer.down.format() == FP4
            && parts <= STREAMED_PARTS
    }

    /// Both products of the experts with the activations of their slots.
    fn experts_of_some_each(
        &self,
        layer: &Layer,
        n: usize,
        first: Epilogue,
        second: Epilogue,
    ) -> Result<(), Error> {
        let params = Streamed {
            parts: self.parts(layer, &self.arena.gathered, first, second),
            list: self.arena.routes.address(),
            done: self.arena.experts_done.address(),
            n: n as u32,
            experts: self.config.experts as u32,
            experts_per_token: self.config.experts_per_token as u32,
            stack: self.slot_stack(n),
        };
        let grid = [self.device.multiprocessors() as u32, 1, 1];
        // SAFETY: the slots are those of `n` tokens, for which the arena has room. There are not more blocks than
        // multiprocessors, so that all are at work when they wait for one another.
        unsafe {
            self.device.launch(
                "experts_streamed",
                grid,
                STREAMED_THREADS,
                self.device.shared_bytes(),
                &params,
            )
        }
    }

    /// Whether the experts, of `n` tokens, have so few each that tiles of fewer are better.
    fn few_tokens_each(&self, n: usize) -> bool {
        n * self.config.experts_per_token / self.config.experts <= 48
    }

    /// Tiles of at most `tokens` each that the experts, of `n` tokens, may need: each expert may have one that is not full.
    fn expert_tiles(&self, n: usize, tokens: usize) -> usize {
        let pairs = n * self.config.experts_per_token;
        pairs / tokens + self.config.experts.min(pairs)
    }

    /// A product of the experts with the activations of their slots.
    fn product_of_experts(
        &self,
        matrix: &PackedMatrix,
        input: Address,
        n: usize,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        // Where an expert has few tokens, weights are read further ahead.
        let few = self.few_tokens_each(n);
        let tokens = if few { FEWER_TOKENS } else { GEMM_TOKENS };
        let name = match (matrix.format(), few) {
            (BF16, true) => "gemm_experts_bf16_few",
            (BF16, false) => "gemm_experts_bf16",
            (_, true) => "gemm_experts_fp4_few",
            (_, false) => "gemm_experts_fp4",
        };
        let tiles = self.expert_tiles(n, tokens);
        let params = Gemm { stack: self.slot_stack(n), ..self.gemm_params(matrix, input, n, epilogue) };
        let grid = [matrix.row_tiles().div_ceil(GEMM_ROW_TILES) as u32, 1, tiles as u32];
        let shared = if few { GEMM_SHARED } else { gemm_many_shared(matrix.format()) };
        // SAFETY: the slots are those of `n` tokens, for which the arena has room.
        unsafe { self.device.launch(name, grid, 256, shared, &params) }
    }

    fn gemm_params(&self, matrix: &PackedMatrix, input: Address, n: usize, epilogue: Epilogue) -> Gemm {
        Gemm {
            matrix: matrix.params(),
            input,
            list: self.arena.routes.address(),
            epilogue,
            n: n as u32,
            stack: 0,
            tile: 0,
            experts: self.config.experts as u32,
            experts_per_token: self.config.experts_per_token as u32,
            tokens_first: 0,
        }
    }

    fn attention(&self, index: usize, shape: &Shape, starts: usize) -> Result<(), Error> {
        let layer = &self.layers[index];
        let sliding = self.config.layer_kinds[index] == LayerKind::Sliding;
        let cache = &self.cache[index];
        let kv_heads = self.config.kv_heads as u32;
        let mut params = Attention {
            queries: self.arena.queries.address(),
            keys: cache.keys.address(),
            values: cache.values.address(),
            sinks: layer.sinks.address(),
            positions: self.word(shape.words.positions),
            sequences: self.word(shape.words.sequences),
            table_starts: self.word(starts),
            table: self.word(0),
            tiles: self.word(shape.words.tiles),
            out: self.arena.context.address(),
            partial: self.arena.parts.address(),
            arrivals: self.arena.arrivals.address(),
            query_heads: self.config.query_heads as u32,
            kv_heads,
            window: if sliding { self.config.sliding_window as u32 } else { 0 },
            out_format: layer.output.format(),
            out_stack: self.stack(&layer.output, shape.tokens),
            splits: 1,
            key_scale: layer.kv_scales.key,
            value_scale: layer.kv_scales.value,
            n: 0,
            warps: 0,
            ahead: u32::from(shape.ahead),
            rows: (self.config.query_heads / self.attention_heads()) as u32,
        };
        let e4m3 = self.options.cache == CacheFormat::E4m3;
        if shape.tiles > 0 {
            let (name, shared) = match (self.device.capability(), e4m3) {
                (90, false) => ("attend_prompts", PROMPTS_SHARED),
                (90, true) => ("attend_prompts_e4m3", PROMPTS_SHARED_E4M3),
                (_, false) => ("attend_many", 3 * 16384),
                (_, true) => ("attend_many_e4m3", 3 * 16384),
            };
            // SAFETY: the tiles are of rows of this batch; the tables' blocks were checked with the plan.
            unsafe { self.device.launch(name, [shape.tiles as u32, kv_heads, 1], 256, shared, &params)? };
        }
        if shape.singles > 0 {
            let Sharing { warps, splits } = if sliding { shape.sliding } else { shape.full };
            (params.warps, params.splits) = (warps as u32, splits as u32);
            let heads = self.attention_heads();
            // As many at a time as there is room for parts; whole eights, in which the rows of a stack repeat.
            let together = match splits {
                1 => shape.singles,
                _ => MAX_PARTS / (heads * splits) / 8 * 8,
            };
            let (name, shared) = match e4m3 {
                true => ("attend_split_e4m3", ATTENTION_SHARED / 2),
                false => ("attend_split", ATTENTION_SHARED),
            };
            let row = (2 * HEAD * self.config.query_heads) as u64;
            let out_row = if params.out_stack > 0 { 2 * TILE_COLS as u64 } else { row };
            let first = params;
            for at in (0..shape.singles).step_by(together) {
                params.queries = first.queries + at as u64 * row;
                params.positions = first.positions + 4 * at as u64;
                params.table_starts = first.table_starts + 4 * at as u64;
                params.out = first.out + at as u64 * out_row;
                let n = together.min(shape.singles - at);
                params.n = n as u32;
                let grid = [(n * heads).div_ceil(ATTENTION_WARPS / warps) as u32, params.splits, 1];
                // SAFETY: the first rows are the single tokens; there is room for their parts.
                unsafe { self.device.launch(name, grid, 256, shared, &params)? };
            }
        }
        Ok(())
    }

    /// Where router_gather_sm90.cu takes `n` tokens: the blocks that share a token's inputs.
    fn router_shares(&self, n: usize) -> Option<usize> {
        let (config, multiprocessors) = (&self.config, self.device.multiprocessors());
        let clusters = n.div_ceil(ROUTER_TOKENS);
        // All blocks must have room at a time. The multiprocessors of a cluster are of one of up to eight groups, in each of which some may
        // be left over; but all are pairs.
        let shares = [4, 2].into_iter().find(|&shares| {
            let left_over = if shares > 2 { 8 * (shares - 1) } else { 0 };
            clusters * shares + left_over <= multiprocessors
                && self.router_gather_shared(shares) <= self.device.shared_bytes()
        });
        let fits = self.device.capability() == 90
            && !self.options.batch_invariant
            && self.many(n)
            && config.experts <= ROUTER_GATHER_EXPERTS
            && config.hidden_size % TILE_COLS == 0
            && config.hidden_size >= 4 * TILE_COLS;
        shares.filter(|_| fits)
    }

    /// Shared memory of router_gather_sm90.cu: its own, and what `Layout` has.
    fn router_gather_shared(&self, shares: usize) -> usize {
        let inputs = (self.config.hidden_size / TILE_COLS).div_ceil(shares) * TILE_COLS;
        let experts = self.config.experts;
        ROUTER_GATHER_STATIC
            + inputs * 4
            + experts.next_multiple_of(16) * (inputs * 2 + 32)
            + 16 * experts * 9 * 4
    }

    /// Norm, router and the activations in the slots of the experts.
    fn route_and_gather(&self, layer: &Layer, n: usize, shares: usize) -> Result<(), Error> {
        let params = RouterGather {
            residual: self.arena.residual.address(),
            norm_scale: layer.post_attention_norm.address(),
            weights: layer.router.address(),
            bias: layer.router_bias.address(),
            out: self.arena.gathered.address(),
            routes: self.arena.routes.address(),
            barrier: self.arena.router_barrier.address(),
            hidden: self.config.hidden_size as u32,
            n: n as u32,
            experts: self.config.experts as u32,
            experts_per_token: self.config.experts_per_token as u32,
            format: layer.gate_up.format(),
            stack: self.slot_stack(n),
            eps: self.config.rms_norm_eps,
            padding: 0,
        };
        let grid = [n.div_ceil(ROUTER_TOKENS) as u32, shares as u32, 1];
        let shared = self.router_gather_shared(shares) - ROUTER_GATHER_STATIC;
        // SAFETY: the arena has room for all slots of these tokens; `router_shares` has seen that all blocks have room at a time.
        unsafe { self.device.launch_clusters("router_gather", grid, shares as u32, 512, shared, &params) }
    }

    /// Norm and router: what experts_few.cuh takes, or the routes and the normed tokens, in the slots of the experts where they are stacked.
    fn route(&self, layer: &Layer, shape: &Shape, few_each: bool) -> Result<(), Error> {
        let (n, config) = (shape.tokens, &self.config);
        let format = layer.gate_up.format();
        // Few tokens: the experts are shared among blocks. Many: a warp per token.
        let share = (2 * self.device.multiprocessors() / n).clamp(1, config.experts) as u32;
        let params = Router {
            residual: self.arena.residual.address(),
            norm_scale: layer.post_attention_norm.address(),
            weights: layer.router.address(),
            bias: layer.router_bias.address(),
            out: self.arena.normed.address(),
            logits: self.arena.router_logits.address(),
            routes: if few_each && self.own_routes(n) > 0 { 0 } else { self.arena.routes.address() },
            arrivals: self.arena.arrivals.address() + 4 * MAX_PARTS as u64,
            hidden: config.hidden_size as u32,
            cols: layer.gate_up.padded_cols() as u32,
            n: n as u32,
            experts: config.experts as u32,
            experts_per_token: config.experts_per_token as u32,
            format,
            eps: config.rms_norm_eps,
            shares: share,
            stack: if few_each || self.many(n) { ORDERED } else { 0 },
            padding: 0,
        };
        let few = if self.options.batch_invariant { shape.singles == n } else { n <= ROUTER_FEW };
        // The norm's scales and, if there is room, the weights of 32 experts, with 32 bytes beside each.
        let bytes = |experts: usize| config.hidden_size * 4 + experts * (config.hidden_size * 2 + 32);
        let room = self.device.shared_bytes() - ROUTER_STATIC;
        // Where the blocks of the experts make their routes, none are sorted.
        let counts = if params.routes > 0 { ROUTER_COUNTS } else { 0 };
        match [32, 16].into_iter().find(|&experts| bytes(experts) <= room).filter(|_| !few) {
            None => {
                let grid = [share, n as u32, 1];
                // SAFETY: the arena has MAX_TOKENS rows of each, and one counter more than that.
                unsafe { self.device.launch("router", grid, 256, counts, &params)? };
            }
            Some(together) => {
                let params = Router { shares: together as u32, ..params };
                let blocks = n.div_ceil(ROUTER_TOKENS).min(self.device.multiprocessors());
                let shared = bytes(together).max(ROUTER_COUNTS);
                // SAFETY: as above.
                unsafe { self.device.launch("router_many", [blocks as u32, 1, 1], 512, shared, &params)? };
            }
        }
        if few_each || !self.many(n) {
            return Ok(());
        }
        let params = Gather {
            input: self.arena.normed.address(),
            routes: self.arena.routes.address(),
            out: self.arena.gathered.address(),
            cols: layer.gate_up.padded_cols() as u32,
            n: n as u32,
            experts: config.experts as u32,
            experts_per_token: config.experts_per_token as u32,
            stack: self.slot_stack(n),
            padding: 0,
        };
        let blocks = max_slots(config, n).div_ceil(8) as u32;
        // SAFETY: the router's list names rows of these tokens; the arena has room for all slots.
        unsafe { self.device.launch("gather", [blocks, 1, 1], 256, 0, &params) }
    }

    /// Router and experts, whose outputs are left for the next norm to add.
    fn experts(&self, index: usize, shape: &Shape) -> Result<(), Error> {
        let layer = &self.layers[index];
        let (n, config) = (shape.tokens, &self.config);
        let few_each = self.few_each(layer, shape);
        match self.router_shares(n).filter(|_| !few_each) {
            Some(shares) => self.route_and_gather(layer, n, shares)?,
            None => self.route(layer, shape, few_each)?,
        }
        let epilogue = Epilogue {
            out16: self.arena.activated.address(),
            out_cols: layer.down.padded_cols() as u32,
            out_stack: if few_each { ORDERED } else { self.slot_stack(n) },
            out_format: layer.down.format(),
            ..self.epilogue(After::Swiglu)
        };
        let params = self.product_params(&layer.gate_up, self.arena.normed.address(), n, epilogue);
        let pairs = n * config.experts_per_token;
        let active = config.experts.min(pairs);
        let store = Epilogue { out: self.arena.expert_outputs.address(), ..self.epilogue(After::Store) };
        if few_each {
            return self.experts_of_few_each(layer, n, epilogue, store);
        }
        if let (Some((scratch, gate_up)), Some((_, down))) =
            (self.fp4(&layer.gate_up, n), self.fp4(&layer.down, n))
        {
            let groups = Some(fp4::Groups {
                list: self.arena.routes.address(),
                tokens: n,
                experts: config.experts,
                experts_per_token: config.experts_per_token,
            });
            let (device, normed) = (&self.device, (self.arena.normed.address(), n));
            fp4::multiply(device, scratch, gate_up, layer.gate_up.params(), normed, groups, epilogue)?;
            let activated = (self.arena.activated.address(), max_slots(config, n));
            return fp4::multiply(device, scratch, down, layer.down.params(), activated, groups, store);
        }
        if self.many(n) {
            if self.some_each(layer, n) {
                return self.experts_of_some_each(layer, n, epilogue, store);
            }
            self.product_of_experts(&layer.gate_up, self.arena.gathered.address(), n, epilogue)?;
            return self.product_of_experts(&layer.down, self.arena.activated.address(), n, store);
        }
        if pairs > EXPERTS_FEW * config.experts && !self.options.batch_invariant {
            let (normed, activated) = (self.arena.normed.address(), self.arena.activated.address());
            self.product_anywhere(&layer.gate_up, normed, n, true, epilogue)?;
            return self.product_anywhere(&layer.down, activated, n, true, store);
        }
        let columns = if n <= 32 && !self.options.batch_invariant { 8 } else { 16 };
        let name = |format| match (format, columns) {
            (BF16, 8) => "experts_bf16_8",
            (BF16, _) => "experts_bf16_16",
            (_, 8) => "experts_fp4_8",
            _ => "experts_fp4_16",
        };
        let grid = [layer.gate_up.row_tiles() as u32, active as u32, 1];
        // SAFETY: the router's list names rows and slots of these tokens, for which the arena has room.
        unsafe {
            self.device.launch(
                name(layer.gate_up.format()),
                grid,
                PRODUCT_THREADS,
                partial_bytes(columns),
                &params,
            )?
        };
        let params = self.product_params(&layer.down, self.arena.activated.address(), n, store);
        let grid = [layer.down.row_tiles() as u32, active as u32, 1];
        let name = name(layer.down.format());
        // SAFETY: as above.
        unsafe { self.device.launch(name, grid, PRODUCT_THREADS, partial_bytes(columns), &params) }
    }

    /// The final norm and the logits of these entries of the list of outputs, and the largest of each.
    fn output(&self, shape: &Shape, outputs: Range<usize>, pending: bool) -> Result<(), Error> {
        if let Some(one) = self.one.as_ref().filter(|_| shape.tokens == 1) {
            one.norm(self, pending)?;
            return one.output(self);
        }
        let n = outputs.len();
        let params = Norm {
            rows: self.word(shape.words.outputs + outputs.start),
            scale: self.final_norm.address(),
            format: self.unembedding.format(),
            stack: self.stack(&self.unembedding, n),
            ..self.norm_params(shape, pending, self.arena.normed.address())
        };
        // SAFETY: the list names rows of this batch, each once.
        unsafe { self.device.launch("rms_norm", [n as u32, 1, 1], 256, 0, &params)? };
        let epilogue = Epilogue { out: self.arena.logits.address(), ..self.epilogue(After::Store) };
        self.product(&self.unembedding, self.arena.normed.address(), n, epilogue)?;
        let params = Largest {
            logits: self.arena.logits.address(),
            partial: self.arena.largest_parts.address(),
            arrivals: self.arena.arrivals.address(),
            out: self.arena.largest.address(),
            vocabulary: self.config.vocab_size as u32,
            padding: 0,
        };
        let blocks = (2048 / n).clamp(8, LARGEST_BLOCKS);
        // SAFETY: at most LOGIT_ROWS rows, for which the arena has room.
        unsafe { self.device.launch("largest", [blocks as u32, n as u32, 1], 256, 0, &params) }
    }

    /// Draws, scores and brings back what is wanted of the logits that `output` made.
    fn collect(
        &mut self,
        batch: &Batch<'_>,
        outputs: Range<usize>,
        results: &mut [SequenceOutput],
    ) -> Result<(), Error> {
        let vocabulary = self.config.vocab_size;
        let arena = &mut self.arena;
        arena.largest.download(0, &mut arena.largest_host, outputs.len() * 4)?;
        let outputs = &batch.outputs[outputs];
        let mut wanted = Vec::new();
        for (row, &(_, segment, token)) in outputs.iter().enumerate() {
            let segment = &batch.segments[segment];
            let sequence = batch.sequence(segment);
            if sequence.logits {
                arena.logits.download(row * vocabulary * 4, &mut arena.logits_host, vocabulary * 4)?;
                self.device.synchronize()?;
                results[segment.sequence].logits.extend_from_slice(arena.logits_host.slice::<f32>());
            }
            let score = sequence.score.as_ref().and_then(|score| Some((*score.next.get(token)?, score.top)));
            wanted.extend(score.map(|(token, top)| Wanted::Score { row, token, top }));
            if let Some(sampling) = sampling(sequence, token).filter(|sampling| !is_largest(sampling)) {
                wanted.push(Wanted::Token { row, sampling, kept: score.is_some() });
            }
        }
        let found = self.sampler.run(&wanted, &arena.logits, &arena.largest, &mut arena.logits_host)?;
        self.device.synchronize()?;
        let mut found = found.into_iter();
        for (row, &(_, segment, token)) in outputs.iter().enumerate() {
            let segment = &batch.segments[segment];
            let sequence = batch.sequence(segment);
            let result = &mut results[segment.sequence];
            if sequence.score.as_ref().is_some_and(|score| token < score.next.len()) {
                result.scores.extend(found.next().and_then(|sampled| sampled.logprobs));
            }
            match sampling(sequence, token) {
                Some(sampling) if is_largest(sampling) => {
                    let token = arena.largest_host.slice::<u32>()[row];
                    result.sampled.push(Sampled { token, logprobs: None });
                }
                Some(_) => result.sampled.extend(found.next()),
                None => {}
            }
        }
        Ok(())
    }

    fn collect_hidden(
        &mut self,
        batch: &Batch<'_>,
        layer: usize,
        results: &mut [SequenceOutput],
    ) -> Result<(), Error> {
        let bytes = self.config.hidden_size * 4;
        let (mut row, arena) = (0, &mut self.arena);
        for segment in &batch.segments {
            for _ in segment.range.clone() {
                if batch.sequence(segment).hidden_after_layer == Some(layer) {
                    arena.residual.download(row * bytes, &mut arena.residual_host, bytes)?;
                    self.device.synchronize()?;
                    results[segment.sequence].hidden.extend_from_slice(arena.residual_host.slice());
                }
                row += 1;
            }
        }
        Ok(())
    }

    fn read(&self, from: Address, bytes: usize) -> Result<(), Error> {
        let params = Read { from, out: self.arena.largest.address(), vectors: bytes as u64 / 16 };
        let grid = [4 * self.device.multiprocessors() as u32, 1, 1];
        // SAFETY: reads inside one allocation; `largest` has a word.
        unsafe { self.device.launch("read", grid, 512, 0, &params) }
    }
}

/// A kernel of experts_few.cuh.
struct FewKernel {
    name: &'static str,
    threads: u32,
    /// Of a pass, at most.
    tokens: usize,
    /// Bytes of shared memory for activations, and of all.
    room: usize,
    shared: usize,
}

/// Passes of a block of experts_few.cuh, at most.
const FEW_PASSES: usize = 16;
/// Tokens whose routes the blocks of experts_few.cuh make themselves, at most: bits of a word.
const OWN_ROUTES_TOKENS: usize = 64;
/// Their bytes, at most: more would leave too little room for activations.
const OWN_ROUTES_BYTES: usize = 7 << 10;
/// Of experts_streamed_sm90.cu: tokens of a pass, at most, threads of a block, and parts of all tokens, at most.
const STREAMED_TOKENS: usize = 88;
const STREAMED_THREADS: u32 = 512;
const STREAMED_PARTS: usize = 512;
// The kernel counts an expert's parts in bytes.
const _: () = assert!(MAX_TOKENS.div_ceil(STREAMED_TOKENS) < 256);
/// With more than so many tokens per expert, on average, it is the fastest.
const STREAMED_FROM: usize = 4;
/// Up to so many tokens the router shares a token's experts among blocks.
const ROUTER_FEW: usize = 160;
/// Bytes of counters of the router's sorting warps: sixteen of all experts.
const ROUTER_COUNTS: usize = 16 * MAX_EXPERTS * 4;
/// Tokens that a block of `router_many` takes at a time, and its own shared memory.
const ROUTER_TOKENS: usize = 8;
const ROUTER_STATIC: usize = 21 << 10;
/// product_few_sm90.cu: tokens and row tiles of a block, at most, its warps, and the shared memory of their rings.
const DENSE_TOKENS: usize = 32;
const DENSE_ROW_TILES: usize = 3;
const DENSE_WARPS: u32 = 12;
const DENSE_SHARED: usize = DENSE_WARPS as usize * 8 * 2048;
/// Kinds of `Epilogue`.
const STORE: u32 = After::Store as u32;
const QKV: u32 = After::Qkv as u32;
const RESIDUAL: u32 = After::Residual as u32;
/// product_some_sm90.cu: tokens and blocks that share the inputs, at most, and its shared memory with up to `GEMM_TOKENS` and with more.
const SOME_TOKENS: usize = 256;
const SOME_SHARES: usize = 5;
const SOME_SHARED_128: usize = 213_248;
const SOME_SHARED_256: usize = 229_888;
/// router_gather_sm90.cu: experts, at most, and its own shared memory.
const ROUTER_GATHER_EXPERTS: usize = 32;
const ROUTER_GATHER_STATIC: usize = 4 << 10;
/// Up to so many tokens have kernels of their own.
const FEW_TOKENS: usize = 8;
/// Where there is no wgmma: tokens of a dense product, and of an expert, from which on gemm_many.cu is faster than product.cu.
const DENSE_FEW: usize = 32;
const EXPERTS_FEW: usize = 8;
/// Tokens of a block of gemm_many_sm90.cu, gemm_sm90.cu and gemm_many.cu, at most, and where there are few.
const GEMM_TOKENS: usize = 128;
const FEWER_TOKENS: usize = 64;
/// Row tiles of a block of any of them.
const GEMM_ROW_TILES: usize = 8;
/// Shared memory of gemm_sm90.cu, at most: `Sizes::BYTES`, and room to align them to 1024 bytes.
const GEMM_SHARED: usize = 104_448 + 1024;
/// Bytes of weights that stay in the cache from one tile of tokens to the next.
const GEMM_CACHED: usize = 32 << 20;
/// Blocks of a cluster, at most: larger ones are slower.
const MAX_CLUSTER: usize = 4;
/// Threads of a block of the product kernels.
const PRODUCT_THREADS: u32 = 256;

/// Shared memory of a block of gemm_many_sm90.cu: its `Sizes::BYTES`.
fn gemm_many_shared(format: u32) -> usize {
    if format == FP4 { 102_592 } else { 114_944 }
}

/// Rows of a stack of activations of which `rows` are used: whole eights, and a tile more that is read but not used.
fn stack_rows(rows: usize) -> usize {
    rows.next_multiple_of(8) + GEMM_TOKENS
}

/// Slots of the experts of `n` tokens: each expert's begin at a multiple of eight.
fn max_slots(config: &Config, n: usize) -> usize {
    n * config.experts_per_token + 7 * config.experts
}

/// Words of the routes of `n` tokens: see epilogue.cuh.
fn route_words(config: &Config, n: usize) -> usize {
    2 + 3 * config.experts + max_slots(config, n) + 3 * n * config.experts_per_token
}

/// Shared memory of a product: two halves of partial sums of all warps, `[16, columns]` in f32.
fn partial_bytes(columns: usize) -> usize {
    2 * (PRODUCT_THREADS as usize / 32) * 16 * columns * 4
}

/// How a token is drawn after this one of the plan's tokens, if one is.
fn sampling(sequence: &SequencePlan, token: usize) -> Option<&Sampling> {
    sequence.sample.get((token + sequence.sample.len()).checked_sub(sequence.tokens.len())?)
}

/// Whether the token is simply that of the largest logit.
fn is_largest(sampling: &Sampling) -> bool {
    sampling.temperature <= 0.0
        && sampling.bias.is_empty()
        && sampling.penalties.is_none()
        && sampling.mask.is_none()
        && sampling.logprobs.is_none()
}

/// What the kernels need beyond the rules of `Config`.
fn check_shape(config: &Config) -> Result<(), Error> {
    let require = |fits: bool, what: String| if fits { Ok(()) } else { Err(Error::Unsupported(what)) };
    require(
        config.head_dim == HEAD,
        format!("heads of {} on the GPU, which has kernels for {HEAD}", config.head_dim),
    )?;
    let groups = config.query_heads / config.kv_heads;
    require(
        groups.is_power_of_two() && groups <= QUERY_ROWS,
        format!("{groups} query heads per key/value head on the GPU, where it must be 1, 2, 4, 8 or 16"),
    )?;
    require(
        config.experts <= MAX_EXPERTS && config.experts_per_token <= MAX_RANKS,
        format!(
            "{} experts, {} per token, on the GPU, where at most {MAX_EXPERTS} and {MAX_RANKS} are possible",
            config.experts, config.experts_per_token
        ),
    )?;
    require(
        config.hidden_size <= MAX_HIDDEN,
        format!("a hidden size of {} on the GPU, where at most {MAX_HIDDEN} is possible", config.hidden_size),
    )
}

/// Bytes that the matrices of a model take on the device, without what fills up tiles.
fn least_bytes(weights: &dyn Weights) -> usize {
    let config = weights.config();
    let bytes = |id: MatrixId| {
        let (count, rows, cols) = id.kind.shape(config);
        let sixteenths = if weights.format(id) == Format::Bf16 { 32 } else { 9 };
        count * rows * cols / 16 * sixteenths
    };
    matrices(config).map(bytes).sum()
}

/// Says what did not fit, with the numbers of the device.
fn no_room(error: Error, device: &Device, what: &str) -> Error {
    match (error, device.memory()) {
        (Error::Memory { needed }, Ok((free, total))) => Error::Unsupported(format!(
            "{what} do not fit {}: {needed} bytes more are needed, {free} of {total} are free",
            device.name()
        )),
        (error, _) => error,
    }
}
