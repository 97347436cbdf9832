//! The backend: packed weights, the paged cache, and the step over a ragged batch as a chain of kernels.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Zeroable;
use checkpoint::{Config, Format, KvScales, LayerKind, MatrixId, MatrixKind, VectorKind, Weights, matrices};
use gptoss::{
    BLOCK_TOKENS, Backend, BlockId, Error, KvLayout, Plan, Rotary, Sampled, SequenceOutput, Traffic,
};

use crate::ahead::{Ahead, Lane, Token};
use crate::arena::{Arena, LARGEST_BLOCKS, LOGIT_ROWS, MAX_TOKENS, max_slots, stack_rows};
use crate::attention::{QUERY_ROWS, Sharing, TILE_QUERIES};
use crate::batch::{Batch, Segment, Shape, Step, Words, is_largest};
use crate::device::{Buffer, Device, Graph, KernelTime};
use crate::driver::Address;
use crate::fp4::{self, Fp4Matrix};
use crate::one::OneToken;
use crate::packed::{Loader, PackedMatrix, TILE_COLS, TILE_ROWS, Table};
use crate::params::{
    After, CacheFormat, Embed, Epilogue, FP4, Keep, Largest, Matrix, NO_NUMBER, Norm, Read, RowOrder,
};
use crate::products::{LogitRows, chains};
use crate::router::{MAX_EXPERTS, MAX_RANKS};
use crate::sampling::{Sampler, Wanted};
use crate::shared::Shared;

/// The kernels' head size.
pub(crate) const HEAD: usize = 64;
/// What a block of a norm holds in registers, and by fours what a thread of it does.
const MAX_HIDDEN: usize = 4096;
const NORM_VALUES: usize = 3;
/// Rows of logits that GPUs which share a model send one another, at most.
const SENT_LOGIT_ROWS: usize = 32;
/// Device memory that is left to the driver, graphs and other programs.
const RESERVE: usize = 512 << 20;

/// Graphs that are kept. Each has memory on the device, which nobody counts, for some 200 kernels; steps repeat, so few are in use at a time.
const MOST_GRAPHS: usize = 256;
/// See `are_few`: tokens of a sequence, and pages that all of them look at.
const FEW_TOKENS: usize = 16;
const FEW_PAGES: usize = 8192;

/// The number of tokens of a decode step, how full and sliding layers share their keys, whether those are read ahead, whether logits are
/// stored, and where words, token and logits are.
type GraphKey = (usize, Sharing, Sharing, bool, bool, Lane);

/// How a model is run. `Default` is the fastest that is exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Kernel by kernel, without graphs.
    pub eager: bool,
    /// Keys and values.
    pub cache: CacheFormat,
    /// A token's sums have one order, whatever else is computed with it: prompts go as chunks, answers token by token.
    pub batch_invariant: bool,
}

/// gpt-oss on one GPU.
pub struct Cuda {
    pub(crate) device: Arc<Device>,
    pub(crate) config: Config,
    embedding: Table,
    frequencies: Buffer,
    concentration: f32,
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Buffer,
    pub(crate) unembedding: PackedMatrix,
    pub(crate) arena: Arena,
    /// How a step of one token goes, where the model and the device allow it; else it goes as those of few.
    pub(crate) one: Option<OneToken>,
    /// The same where the batch may not matter.
    one_invariant: Option<OneToken>,
    pub(crate) cache: Vec<LayerCache>,
    blocks: (usize, usize),
    /// Whether some logits were no numbers: then blocks may hold what is none, too.
    pub(crate) damaged: bool,
    /// Decode steps by what decides their kernels, at most [`MOST_GRAPHS`].
    pub(crate) graphs: HashMap<GraphKey, Graph>,
    pub(crate) sampler: Sampler,
    pub(crate) ahead: Ahead,
    pub(crate) options: Options,
    /// Room for quantized activations, if matrices are packed for FP4 products.
    pub(crate) fp4: Option<fp4::Scratch>,
    /// Where other GPUs have the rest of the model: `config`, the weights and the cache are then this one's share.
    pub(crate) shared: Option<Shared>,
}

pub(crate) struct Layer {
    pub(crate) input_norm: Buffer,
    pub(crate) qkv: PackedMatrix,
    pub(crate) sinks: Buffer,
    /// Of keys and values in E4M3.
    pub(crate) kv_scales: KvScales,
    pub(crate) output: PackedMatrix,
    pub(crate) post_attention_norm: Buffer,
    pub(crate) router: Buffer,
    pub(crate) router_bias: Buffer,
    pub(crate) gate_up: PackedMatrix,
    pub(crate) down: PackedMatrix,
}

/// Keys `[blocks, kv heads, 16, 64]` and values `[blocks, kv heads, 64, 16]` of one layer.
pub(crate) struct LayerCache {
    pub(crate) keys: Buffer,
    pub(crate) values: Buffer,
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
        Cuda::load_with(device, weights, options, None, progress)
    }

    /// `shared`: the weights are a share of the model's.
    pub(crate) fn load_with(
        device: &Arc<Device>,
        weights: &dyn Weights,
        options: Options,
        shared: Option<Shared>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Cuda, Error> {
        let config = weights.config().clone();
        check_shape(&config)?;
        device.bind()?;
        let activations = |e| no_room(e, device, "activations");
        let rest = |e| no_room(e, device, "the weights");
        let arena = Arena::new(device, &config).map_err(activations)?;
        let sampler = Sampler::new(device, config.vocab_size).map_err(activations)?;
        let mut loader = Loader::new(device, weights).map_err(rest)?;
        // Said at once, not after minutes of loading.
        let needed = least_bytes(weights) + RESERVE;
        if needed > device.memory()?.0 {
            return Err(rest(Error::Memory { needed }));
        }
        let count = config.layer_kinds.len();
        let mut layers = Vec::with_capacity(count);
        for layer in 0..count {
            progress(layer, count);
            layers.push(Layer::load(&mut loader, layer).map_err(rest)?);
        }
        let unembedding =
            loader.matrix(&[(MatrixKind::Unembedding.at(0), RowOrder::Plain, None)]).map_err(rest)?;
        let embedding = loader.table(MatrixKind::Embedding.at(0)).map_err(rest)?;
        let final_norm = loader.vector(VectorKind::FinalNorm.at(0)).map_err(rest)?;
        let rotary = Rotary::new(&config.rope, config.head_dim);
        let frequencies = loader.floats(&rotary.frequencies).map_err(rest)?;
        drop(loader);
        let one = |chains| OneToken::new(device, &config, &layers, &unembedding, chains).map_err(activations);
        let chains = layers.first().and_then(|layer| chains(device, layer)).filter(|_| shared.is_none());
        let (one, one_invariant) = (one(None)?, chains.map_or(Ok(None), |chains| one(Some(chains)))?);
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
            one_invariant,
            cache: Vec::new(),
            blocks: (0, 0),
            damaged: false,
            graphs: HashMap::new(),
            sampler,
            ahead: Ahead::new(device)?,
            options,
            fp4: None,
            shared,
        })
    }

    /// Whether products of many tokens are W4A4.
    pub fn uses_fp4(&self) -> bool {
        self.fp4.is_some()
    }

    /// Packs the matrices of a W4A4 model a second time, for the generation's own FP4 products, which steps of many tokens then
    /// take. Their number is the result: 0 where the device has no such products, the model no matrix with an input scale, or several
    /// GPUs share it.
    ///
    /// # Errors
    /// As for [`Cuda::load`]; the model then runs as before.
    pub fn use_fp4(&mut self, weights: &dyn Weights) -> Result<usize, Error> {
        if !fp4::has_fp4(&self.device) || self.shared.is_some() {
            return Ok(0);
        }
        let device = Arc::clone(&self.device);
        let beside = |e| no_room(e, &device, "the weights for FP4 products, beside the others,");
        let mut loader = Loader::new(&device, weights).map_err(beside)?;
        let mut packed = Vec::new();
        for layer in 0..self.layers.len() {
            let mut load = |parts: &[(MatrixKind, RowOrder)]| {
                let parts: Vec<_> = parts.iter().map(|(kind, order)| (kind.at(layer), *order)).collect();
                Fp4Matrix::load(&device, &mut loader, weights, &parts).map_err(beside)
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
            self.fp4 = Some(fp4::Scratch::new(&device, dense.max(slots)).map_err(beside)?);
        }
        for (layer, [qkv, output, gate_up, down]) in self.layers.iter_mut().zip(packed) {
            (layer.qkv.fp4, layer.output.fp4) = (qkv, output);
            (layer.gate_up.fp4, layer.down.fp4) = (gate_up, down);
        }
        // They hold the old kernels.
        self.forget_ahead()?;
        self.graphs.clear();
        Ok(count)
    }

    /// Bytes of device memory that the key/value cache can have, on each GPU, now that the weights are loaded, if at most `share` of all
    /// memory may be in use then.
    pub fn cache_memory(&self, share: Option<f64>) -> Result<usize, Error> {
        let (free, total) = self.device.memory()?;
        let kept = share.map_or(0, |share| ((1.0 - share) * total as f64) as usize);
        let mut least = free.saturating_sub(kept.max(RESERVE));
        for follower in self.followers() {
            least = least.min(follower.cache_memory(share)?);
        }
        Ok(least)
    }

    /// The GPUs that take the same steps with the rest of the model.
    fn followers(&self) -> &[Cuda] {
        self.shared.as_ref().map_or(&[], |shared| &shared.followers)
    }

    fn followers_mut(&mut self) -> &mut [Cuda] {
        self.shared.as_mut().map_or(&mut [], |shared| &mut shared.followers)
    }

    /// Bytes of a number of a key or a value.
    fn number_bytes(&self) -> usize {
        match self.options.cache {
            CacheFormat::Bf16 => 2,
            CacheFormat::E4m3 => 1,
        }
    }

    /// What a step reads, on each GPU.
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
    pub fn profile(&mut self, plan: &Plan) -> Result<(Vec<SequenceOutput>, Vec<KernelTime>), Error> {
        let device = Arc::clone(&self.device);
        let eager = std::mem::replace(&mut self.options.eager, true);
        let mut outputs = Vec::new();
        let times = device.profile(|| {
            outputs = self.step(plan)?;
            Ok(())
        });
        self.options.eager = eager;
        Ok((outputs, times?))
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

impl Backend for Cuda {
    fn config(&self) -> &Config {
        self.shared.as_ref().map_or(&self.config, |shared| &shared.config)
    }

    fn describe(&self) -> String {
        let fp4 = if self.fp4.is_some() { ", FP4 products of many tokens" } else { "" };
        let cache = match self.options.cache {
            CacheFormat::Bf16 => "BF16",
            CacheFormat::E4m3 => "E4M3",
        };
        let graphs = if self.options.eager { ", no graphs" } else { "" };
        let count = match 1 + self.followers().len() {
            1 => String::new(),
            count => format!("{count} × "),
        };
        let far = match &self.shared {
            Some(shared) if shared.is_by_host() => ", which exchange sums by the host's memory",
            _ => "",
        };
        format!(
            "{count}{}{far}, 16-bit activations{fp4}, {cache} keys and values{graphs}",
            self.device.name()
        )
    }

    /// From 16 answers on 256 tokens add about the time that answers take. Fewer answers take so little that a prompt would hardly come to
    /// its end if it did not add several times that, so it has what the kernels do best with; more than 32 are there for throughput.
    fn least_prompt_tokens(&self, answers: usize) -> usize {
        match answers {
            ..16 => 512,
            16..=32 => 256,
            _ => 2048,
        }
    }

    fn kv_layout(&self) -> KvLayout {
        KvLayout::new(&self.config, self.number_bytes())
    }

    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> Result<(), Error> {
        self.device.bind()?;
        self.forget_ahead()?;
        // The old cache is given back first: two never exist at once, and none is used that some GPU has no more.
        self.graphs.clear();
        self.cache.clear();
        self.blocks = (0, 0);
        for follower in self.followers_mut() {
            follower.allocate_kv(full_blocks, sliding_blocks)?;
        }
        self.device.bind()?;
        for kind in &self.config.layer_kinds {
            let blocks = if *kind == LayerKind::Sliding { sliding_blocks } else { full_blocks };
            let bytes = blocks
                .checked_mul(self.config.kv_heads * BLOCK_TOKENS * HEAD * self.number_bytes())
                .ok_or(Error::Memory { needed: usize::MAX })?;
            let keys = self.device.buffer(bytes);
            match keys.and_then(|keys| Ok(LayerCache { keys, values: self.device.buffer(bytes)? })) {
                Ok(cache) => self.cache.push(cache),
                Err(error) => {
                    self.cache.clear();
                    let needed = self.kv_layout().bytes(full_blocks, sliding_blocks);
                    return Err(if matches!(error, Error::Memory { .. }) {
                        Error::Memory { needed }
                    } else {
                        error
                    });
                }
            }
        }
        self.blocks = (full_blocks, sliding_blocks);
        self.damaged = false;
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
pub(crate) type Meanwhile<'a> = Option<&'a mut dyn FnMut()>;

pub(crate) fn run_once(meanwhile: &mut Meanwhile<'_>) {
    if let Some(work) = meanwhile.take() {
        work();
    }
}

/// Whether sequences of up to `FEW_TOKENS` tokens are so few, behind so little, that attention is faster with each token by itself.
fn are_few(plan: &Plan) -> bool {
    let short = plan.sequences.iter().filter(|sequence| sequence.tokens.len() <= FEW_TOKENS);
    let pages = short.map(|s| s.tokens.len() * (s.position + s.tokens.len()).div_ceil(BLOCK_TOKENS));
    pages.sum::<usize>() <= FEW_PAGES
}

impl Cuda {
    fn run_plan(&mut self, plan: &Plan, meanwhile: &mut Meanwhile<'_>) -> Result<Vec<SequenceOutput>, Error> {
        plan.check(&self.config, self.blocks.0, self.blocks.1)?;
        self.device.bind()?;
        if let Some(output) = self.step_of_one(plan, meanwhile)? {
            self.damaged |= output.corrupted;
            return Ok(vec![output]);
        }
        self.cleanse(plan)?;
        let invariant = self.options.batch_invariant;
        let few = !invariant && are_few(plan);
        let mut results = vec![SequenceOutput::default(); plan.sequences.len()];
        // First what each sequence begins with, then the answers that come after prompts.
        for answers in [false, true] {
            let (mut segments, mut tokens) = (Vec::new(), 0);
            for (sequence, planned) in plan.sequences.iter().enumerate() {
                let len = planned.tokens.len();
                // Where a token's kernels may not depend on company, they depend on whether it is the prompt's.
                let prompt = if invariant { len - planned.generated } else { len };
                let first = if prompt > 0 { prompt } else { len };
                let (mut at, end) = if answers { (first, len) } else { (0, first) };
                while at < end {
                    let alone = at >= prompt || (few && len <= FEW_TOKENS);
                    let count = if alone { 1 } else { (end - at).min(MAX_TOKENS - tokens) };
                    let single = alone || (!invariant && count == 1);
                    segments.push(Segment { sequence, range: at..at + count, single });
                    (at, tokens) = (at + count, tokens + count);
                    if tokens == MAX_TOKENS {
                        let batch = Batch::new(plan, std::mem::take(&mut segments));
                        self.run(&batch, &mut results, meanwhile)?;
                        tokens = 0;
                    }
                }
            }
            if tokens > 0 {
                self.run(&Batch::new(plan, segments), &mut results, meanwhile)?;
            }
        }
        self.damaged |= results.iter().any(|result| result.corrupted);
        Ok(results)
    }

    /// Zeroes the blocks that begin anew if any may hold what is no number: attention multiplies places that a sequence has not reached
    /// yet by zero, which does not help against that. Which blocks hold some nobody knows: a prompt may have given some of them back
    /// before it had logits.
    pub(crate) fn cleanse(&self, plan: &Plan) -> Result<(), Error> {
        if !self.damaged {
            return Ok(());
        }
        let mut zeroed = Vec::new();
        for sequence in &plan.sequences {
            let begun = sequence.position.div_ceil(BLOCK_TOKENS);
            let end = (sequence.position + sequence.tokens.len()).div_ceil(BLOCK_TOKENS);
            for (kind, blocks) in
                [(LayerKind::Full, &sequence.full_blocks), (LayerKind::Sliding, &sequence.sliding_blocks)]
            {
                zeroed.extend(blocks[begun..end].iter().map(|&block| (kind, block)));
            }
        }
        for follower in self.followers() {
            follower.zero_blocks(&zeroed)?;
        }
        self.zero_blocks(&zeroed)
    }

    fn zero_blocks(&self, blocks: &[(LayerKind, BlockId)]) -> Result<(), Error> {
        self.device.bind()?;
        let bytes = self.config.kv_heads * BLOCK_TOKENS * HEAD * self.number_bytes();
        for &(kind, block) in blocks {
            let layers = self.cache.iter().zip(&self.config.layer_kinds);
            for (cache, _) in layers.filter(|(_, of)| **of == kind) {
                cache.keys.zero(block as usize * bytes, bytes)?;
                cache.values.zero(block as usize * bytes, bytes)?;
            }
        }
        Ok(())
    }

    fn run(
        &mut self,
        batch: &Batch<'_>,
        results: &mut [SequenceOutput],
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<(), Error> {
        let hidden = batch.segments.iter().any(|s| batch.sequence(s).hidden_after_layer.is_some());
        let kept = batch.kept(self.layers.len() - 1, self.options.batch_invariant);
        let answered = kept.as_ref().unwrap_or(batch);
        // First what can fail for want of memory, on all GPUs: none may begin what others do not.
        let prepared = self.followers_mut().iter_mut().map(|follower| {
            follower.device.bind()?;
            let step = follower.upload(batch, kept.as_ref(), Lane::default())?;
            let output = follower.divides_logits(step.answered());
            Ok((step, output, follower.graph(batch, &step.shape, output)?))
        });
        let prepared = prepared.collect::<Result<Vec<_>, Error>>()?;
        self.device.bind()?;
        let step = self.upload(batch, kept.as_ref(), Lane::default())?;
        let graph = if hidden { None } else { self.graph(batch, &step.shape, true)? };
        // They are at work before this one: it waits in the midst of some steps.
        for (follower, (step, output, graph)) in self.followers().iter().zip(&prepared) {
            follower.follow(step, *output, *graph)?;
        }
        self.device.bind()?;
        if let Some(graph) = graph {
            self.graphs[&graph].launch()?;
            run_once(meanwhile);
            return self.collect(batch, 0..batch.tokens, results);
        }
        self.embed(&step.shape)?;
        let mut pending = None;
        for layer in 0..self.layers.len() {
            pending = self.layer(layer, &step, pending)?;
            let wanted = |s: &Segment| batch.sequence(s).hidden_after_layer == Some(layer);
            if hidden && batch.segments.iter().any(wanted) {
                if pending.is_some() {
                    self.norm(&step.shape, pending, None)?;
                    pending = None;
                }
                self.collect_hidden(batch, layer, results)?;
            }
        }
        for first in (0..answered.outputs.len()).step_by(LOGIT_ROWS) {
            let rows = first..answered.outputs.len().min(first + LOGIT_ROWS);
            self.output(step.answered(), rows.clone(), pending)?;
            run_once(meanwhile);
            self.collect(answered, rows, results)?;
        }
        if answered.outputs.is_empty() && pending.is_some() {
            // Nothing that other GPUs have sent may be left behind.
            self.norm(step.answered(), pending, None)?;
        }
        run_once(meanwhile);
        self.device.synchronize()
    }

    /// This GPU's part of a step, from which the one that leads brings back what is wanted.
    fn follow(&self, step: &Step, output: bool, graph: Option<GraphKey>) -> Result<(), Error> {
        self.device.bind()?;
        match graph {
            Some(graph) => self.graphs[&graph].launch(),
            None => self.whole_step(step, output),
        }
    }

    /// Whether GPUs that share the model share the rows of the output layer, too, in this step.
    fn divides_logits(&self, shape: &Shape) -> bool {
        self.shared.as_ref().is_some_and(|shared| !shared.is_by_host() && shared.divides(&self.unembedding))
            && (1..=LOGIT_ROWS).contains(&shape.outputs)
            // What many rows of logits take from GPU to GPU is more than they save.
            && (!shape.logits || shape.outputs <= SENT_LOGIT_ROWS)
            && self.finds_largest(shape.outputs)
    }

    /// Whether the product for so many rows of logits finds the largest of each, too, and stores logits only where they are wanted.
    fn finds_largest(&self, rows: usize) -> bool {
        self.some(self.unembedding.params(), rows, &self.epilogue(After::Store)).is_some()
    }

    /// The graph of a decode step, which is recorded when there is none.
    pub(crate) fn graph(
        &mut self,
        batch: &Batch<'_>,
        shape: &Shape,
        output: bool,
    ) -> Result<Option<GraphKey>, Error> {
        if !batch.decodes() || self.options.eager {
            return Ok(None);
        }
        let logits = shape.logits && self.finds_largest(shape.outputs);
        let key = (shape.tokens, shape.full, shape.sliding, shape.ahead, logits, shape.lane);
        if !self.graphs.contains_key(&key) {
            if self.graphs.len() == MOST_GRAPHS {
                self.device.synchronize()?;
                self.graphs.clear();
            }
            let step = Step { shape: *shape, kept: None };
            let graph = self.device.capture(|| self.whole_step(&step, output))?;
            self.graphs.insert(key, graph);
        }
        Ok(Some(key))
    }

    /// All layers, and the logits if those are wanted.
    fn whole_step(&self, step: &Step, output: bool) -> Result<(), Error> {
        self.embed(&step.shape)?;
        let pending =
            (0..self.layers.len()).try_fold(None, |pending, layer| self.layer(layer, step, pending))?;
        let answered = step.answered();
        match pending {
            pending if output => self.output(answered, 0..answered.outputs, pending),
            // Nothing that others have sent may be left behind.
            Some(_) => self.norm(answered, pending, None),
            None => Ok(()),
        }
    }

    /// Writes the step's words and sends them on their way; at once, if the step before is under way. `kept`: see `Step`.
    pub(crate) fn upload(
        &mut self,
        batch: &Batch<'_>,
        kept: Option<&Batch<'_>>,
        lane: Lane,
    ) -> Result<Step, Error> {
        let tile = TILE_QUERIES / (self.config.query_heads / self.config.kv_heads);
        let words = Words::new(batch, 0, tile, self.config.sliding_window);
        let kept = kept.map(|kept| (kept, Words::new(kept, words.end, tile, self.config.sliding_window)));
        let total = kept.as_ref().map_or(words.end, |(_, words)| words.end);
        if total * 4 > self.arena.step[lane.index].bytes() {
            self.device.synchronize()?;
            self.graphs.clear();
            let bytes = total.next_power_of_two() * 4;
            self.arena.step_host[lane.index] = self.device.pinned(bytes)?;
            let words = self.device.buffer(bytes);
            self.arena.step[lane.index] =
                words.map_err(|error| no_room(error, &self.device, "the words of a step"))?;
        }
        let host = self.arena.step_host[lane.index].slice_mut::<u32>();
        words.write(batch, host);
        if let Some((kept, words)) = &kept {
            words.write(kept, host);
        }
        let (step, host) = (&self.arena.step[lane.index], &self.arena.step_host[lane.index]);
        match lane.token {
            Token::Told => step.upload(0, host, total * 4)?,
            Token::Largest | Token::Drawn => step.upload_now(host, total * 4)?,
        }
        let shape = |batch: &Batch<'_>, words: Words, kept: bool| {
            let (singles, chunks) = batch.segments.split_at(batch.singles);
            let pages = |segments: &[Segment]| {
                let pages = segments.iter().map(|segment| batch.blocks(segment));
                pages.fold((0, 0), |(sum, most), pages| (sum + pages, most.max(pages)))
            };
            let ((total, most), (_, most_of_chunks)) = (pages(singles), pages(chunks));
            let (full, sliding) = self.sharing(batch.singles, total, most);
            let mut pairs = singles.windows(2);
            Shape {
                words,
                tokens: batch.tokens,
                outputs: batch.outputs.len(),
                singles: batch.singles,
                tiles: words.tile_count(),
                full,
                sliding,
                // Keys and values of the rows that are kept are of this very step.
                ahead: !kept && pairs.all(|pair| pair[0].sequence != pair[1].sequence),
                tile_splits: self.tile_splits(words.tile_count(), most_of_chunks),
                logits: batch.logits,
                lane,
            }
        };
        let kept = kept.map(|(kept, words)| shape(kept, words, true));
        Ok(Step { shape: shape(batch, words, false), kept })
    }

    /// A word of a step.
    pub(crate) fn word(&self, shape: &Shape, at: usize) -> Address {
        self.arena.step[shape.lane.index].address() + 4 * at as u64
    }

    /// Where the tokens of a step are.
    fn tokens(&self, shape: &Shape) -> Address {
        let other = 1 - shape.lane.index;
        match shape.lane.token {
            Token::Told => self.word(shape, shape.words.tokens),
            Token::Largest => self.arena.largest.address() + 4 * other as u64,
            Token::Drawn => self.sampler.drawn(other),
        }
    }

    /// Where the logits of a step are.
    fn logits(&self, shape: &Shape) -> Address {
        self.arena.logits.address() + (shape.lane.index * self.config.vocab_size * 4) as u64
    }

    /// How steps of one token go, other than a prompt's.
    pub(crate) fn single(&self) -> Option<&OneToken> {
        if self.options.batch_invariant { self.one_invariant.as_ref() } else { self.one.as_ref() }
    }

    /// How a step of this shape goes if it is of one token.
    pub(crate) fn one_token(&self, shape: &Shape) -> Option<&OneToken> {
        self.single().filter(|_| shape.tokens == 1 && shape.singles == 1)
    }

    fn embed(&self, shape: &Shape) -> Result<(), Error> {
        let params = Embed {
            values: self.embedding.values.address(),
            scales: self.embedding.scales.as_ref().map_or(0, Buffer::address),
            tokens: self.tokens(shape),
            positions: self.word(shape, shape.words.positions),
            frequencies: self.frequencies.address(),
            residual: self.arena.residual.address(),
            rotary: self.arena.rotary.address(),
            sequences: self.word(shape, shape.words.sequences),
            full_starts: self.word(shape, shape.words.full_starts),
            sliding_starts: self.word(shape, shape.words.sliding_starts),
            table: self.word(shape, 0),
            slots: self.arena.slots.address(),
            hidden: self.config.hidden_size as u32,
            n: shape.tokens as u32,
            block: self.embedding.block,
            global_scale: self.embedding.global_scale,
            concentration: self.concentration,
            vocabulary: self.config.vocab_size as u32,
        };
        let threads = if shape.tokens == 1 { 1024 } else { 256 };
        // SAFETY: at most MAX_TOKENS blocks, whose rows the arena has.
        unsafe { self.device.launch("embed", [shape.tokens as u32, 1, 1], threads, 0, &params) }
    }

    /// One layer. `pending`, here and in the result: the layer whose experts' outputs are not yet added to the residual stream.
    fn layer(&self, index: usize, step: &Step, pending: Option<usize>) -> Result<Option<usize>, Error> {
        // GPUs that share the model norm what they have summed.
        let normed = self.shared.is_some() && index > 0;
        let Some(kept) = step.kept.as_ref().filter(|_| index + 1 == self.layers.len()) else {
            return self.whole_layer(index, &step.shape, pending, normed);
        };
        self.keys_values(index, &step.shape, pending, normed)?;
        if kept.tokens == 0 {
            return Ok(None);
        }
        self.keep(&step.shape, kept)?;
        self.whole_layer(index, kept, None, false)
    }

    /// A layer for all rows of a shape. `normed`: the norm before it is done.
    fn whole_layer(
        &self,
        index: usize,
        shape: &Shape,
        pending: Option<usize>,
        normed: bool,
    ) -> Result<Option<usize>, Error> {
        let layer = &self.layers[index];
        let epilogue = self.qkv_epilogue(index, shape);
        if let Some(one) = self.one_token(shape) {
            one.qkv(self, index, Epilogue { out16: one.fresh(), out_cols: 1, ..epilogue }, pending)?;
            self.attention(index, shape)?;
            one.attended(self, index)?;
            one.experts(self, index)?;
            return Ok(Some(index));
        }
        if !normed {
            self.norm(shape, pending, Some((&layer.input_norm, layer.qkv.params())))?;
        }
        self.product(&layer.qkv, self.arena.normed.address(), shape.tokens, epilogue)?;
        self.attention(index, shape)?;
        let residual = self.arena.residual.address();
        let out = self.shared.as_ref().map_or(residual, Shared::attention);
        let epilogue = Epilogue { out, ..self.epilogue(After::Residual) };
        self.product(&layer.output, self.arena.context.address(), shape.tokens, epilogue)?;
        let Some(shared) = &self.shared else {
            self.experts(index, shape.tokens)?;
            return Ok(Some(index));
        };
        shared.add_attention(self, shape.tokens)?;
        self.experts(index, shape.tokens)?;
        // With the norm that the next layer begins with.
        let next = self.layers.get(index + 1).map(|next| (&next.input_norm, next.qkv.params()));
        shared.add_experts(self, self.norm_with(shape, Some(index), next))?;
        Ok(None)
    }

    /// Keys and values of a layer, by the product that makes queries, too, where it must: another one would add in another order, which
    /// matters where no batch may change a bit; its input may be normed already, as it takes it; and it may be in FP4.
    fn keys_values(
        &self,
        index: usize,
        shape: &Shape,
        pending: Option<usize>,
        normed: bool,
    ) -> Result<(), Error> {
        let layer = &self.layers[index];
        let all = layer.qkv.params();
        let queries_too =
            normed || self.options.batch_invariant || self.fp4(&layer.qkv, shape.tokens).is_some();
        let first = if queries_too { 0 } else { self.config.query_heads * HEAD / TILE_ROWS };
        let matrix = all.rows_of(first..all.row_tiles());
        if !normed {
            self.norm(shape, pending, Some((&layer.input_norm, matrix)))?;
        }
        let (input, epilogue) = (self.arena.normed.address(), self.qkv_epilogue(index, shape));
        match queries_too {
            true => self.product(&layer.qkv, input, shape.tokens, epilogue),
            false => self.product_of(matrix, input, shape.tokens, Epilogue { query_heads: 0, ..epilogue }),
        }
    }

    /// What becomes of the product that makes queries, keys and values.
    fn qkv_epilogue(&self, index: usize, shape: &Shape) -> Epilogue {
        let (layer, cache) = (&self.layers[index], &self.cache[index]);
        let sliding = self.config.layer_kinds[index] == LayerKind::Sliding;
        Epilogue {
            out16: self.arena.queries.address(),
            keys: cache.keys.address(),
            values: cache.values.address(),
            rotary: self.arena.rotary.address(),
            slots: self.arena.slots.address() + if sliding { 4 * shape.tokens as u64 } else { 0 },
            out_format: self.options.cache as u32,
            limit: layer.kv_scales.key,
            alpha: layer.kv_scales.value,
            ..self.epilogue(After::Qkv)
        }
    }

    /// Brings what the rows that are kept have of the residual stream, of angles and of places in the cache to the front.
    fn keep(&self, shape: &Shape, kept: &Shape) -> Result<(), Error> {
        const THREADS: usize = 64;
        let (residual, rotary) = (self.config.hidden_size / 4, HEAD / 4);
        let params = Keep {
            residual: self.arena.residual.address(),
            rotary: self.arena.rotary.address(),
            slots: self.arena.slots.address(),
            rows: self.word(shape, shape.words.outputs),
            tokens: shape.tokens as u32,
            n: kept.tokens as u32,
            residual_vectors: residual as u32,
            rotary_vectors: rotary as u32,
        };
        let blocks = (residual + rotary + 1).div_ceil(THREADS);
        // SAFETY: the list names rows of this batch in their order, each once.
        unsafe { self.device.launch("keep", [blocks as u32, 1, 1], THREADS as u32, 0, &params) }
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
        pending: Option<usize>,
        scale: Option<(&Buffer, Matrix)>,
    ) -> Result<(), Error> {
        if let Some(one) = self.one_token(shape) {
            return one.norm(self, pending, 0);
        }
        let params = self.norm_with(shape, pending, scale);
        // SAFETY: the arena has MAX_TOKENS rows of each; the routes are of the same tokens.
        unsafe {
            self.device.launch("rms_norm", [shape.tokens as u32, 1, 1], self.norm_threads(), 0, &params)
        }
    }

    /// A norm of all rows by this scale for products with this matrix, if they are given.
    fn norm_with(&self, shape: &Shape, pending: Option<usize>, scale: Option<(&Buffer, Matrix)>) -> Norm {
        let out = scale.map_or(0, |_| self.arena.normed.address());
        Norm {
            scale: scale.map_or(0, |(scale, _)| scale.address()),
            format: scale.map_or(0, |(_, matrix)| matrix.format()),
            stack: scale.map_or(0, |(_, matrix)| self.stack(matrix, shape.tokens)),
            ..self.norm_params(shape, pending, out)
        }
    }

    /// Threads of a norm, each of which holds `NORM_VALUES` times four values.
    pub(crate) fn norm_threads(&self) -> u32 {
        self.config.hidden_size.div_ceil(4 * NORM_VALUES).next_multiple_of(32) as u32
    }

    fn norm_params(&self, shape: &Shape, pending: Option<usize>, out: Address) -> Norm {
        Norm {
            residual: self.arena.residual.address(),
            experts: pending.map_or(0, |_| self.arena.expert_outputs.address()),
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

    /// The final norm and the logits of these entries of the list of outputs, and the largest of each.
    fn output(&self, shape: &Shape, outputs: Range<usize>, pending: Option<usize>) -> Result<(), Error> {
        let n = outputs.len();
        let epilogue = Epilogue { out: self.logits(shape), ..self.epilogue(After::Store) };
        let some = self.finds_largest(n);
        let stack = if some { stack_rows(n) as u32 } else { self.stack(self.unembedding.params(), n) };
        if let Some(one) = self.one_token(shape) {
            // In BF16 the kernel of several rows is as fast, and that of one has no form whose sums are a batch's.
            let own = self.unembedding.format() == FP4 || !(some || self.options.batch_invariant);
            one.norm(self, pending, if own { 0 } else { stack })?;
            if own {
                return one.output(self, shape.lane.index, epilogue);
            }
        } else {
            let params = Norm {
                rows: self.word(shape, shape.words.outputs + outputs.start),
                scale: self.final_norm.address(),
                format: self.unembedding.format(),
                stack,
                ..self.norm_params(shape, pending, self.arena.normed.address())
            };
            // SAFETY: the list names rows of this batch, each once.
            unsafe { self.device.launch("rms_norm", [n as u32, 1, 1], self.norm_threads(), 0, &params)? };
        }
        if some {
            // It finds the largest, too, and stores what is wanted.
            let out = if shape.logits { epilogue.out } else { 0 };
            let (normed, epilogue) = (self.arena.normed.address(), Epilogue { out, ..epilogue });
            return match &self.shared {
                Some(shared) if self.divides_logits(shape) => shared.logits(self, normed, n, epilogue),
                _ => {
                    let matrix = self.unembedding.params();
                    let rows = LogitRows { lane: shape.lane.index, all: matrix.rows, ..LogitRows::default() };
                    self.product_of_some(matrix, 1, normed, n, epilogue, rows)
                }
            };
        }
        self.product(&self.unembedding, self.arena.normed.address(), n, epilogue)?;
        let lane = 4 * shape.lane.index as u64;
        let params = Largest {
            logits: epilogue.out,
            partial: self.arena.largest_parts.address(),
            arrivals: self.arena.arrivals.address(),
            out: self.arena.largest.address() + lane,
            told: self.arena.largest_host.address() + lane,
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
            if let Some(sampling) = sequence.sampling(token).filter(|sampling| !is_largest(sampling)) {
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
            if sequence.is_scored(token) {
                result.scores.extend(found.next().and_then(|sampled| sampled.logprobs));
            }
            let largest = told(arena, row);
            result.corrupted |= largest.is_none();
            match sequence.sampling(token) {
                Some(sampling) if is_largest(sampling) => {
                    result.sampled.push(Sampled { token: largest.unwrap_or(0), logprobs: None });
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
        let params = Read { from, out: self.arena.largest_parts.address(), vectors: bytes as u64 / 16 };
        let grid = [4 * self.device.multiprocessors() as u32, 1, 1];
        // SAFETY: reads inside one allocation; `largest_parts` has a word, which no step looks for.
        unsafe { self.device.launch("read", grid, 512, 0, &params) }
    }
}

/// The id of the largest logit of a row, which has been waited for; `None` where one is infinite or no number.
pub(crate) fn told(arena: &Arena, row: usize) -> Option<u32> {
    Some(arena.largest_host.slice::<u32>()[row]).filter(|&largest| largest != NO_NUMBER)
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
pub(crate) fn no_room(error: Error, device: &Device, what: &str) -> Error {
    match (error, device.memory()) {
        (Error::Memory { needed }, Ok((free, total))) => Error::Unsupported(format!(
            "{what} do not fit {}: {needed} bytes more are needed, {free} of {total} are free",
            device.name()
        )),
        (error, _) => error,
    }
}
