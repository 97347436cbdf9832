//! A step of one token: the grids of the kernels in `one.cuh`, and what they scribble on.

use std::sync::Arc;

use bytemuck::Zeroable;
use checkpoint::Config;
use gptoss::Error;

use crate::backend::{Cuda, HEAD, Layer};
use crate::device::{Buffer, Device};
use crate::driver::Address;
use crate::packed::{PackedMatrix, TILE_COLS, tile_bytes};
use crate::params::{After, BF16, Epilogue, FP4, One, SharedOne};

/// Warps of a block, of one of the experts, those of them that the second product has, of one of the output layer.
const WARPS: usize = 16;
const EXPERT_WARPS: usize = 24;
const DOWN_WARPS: usize = 22;
const NARROW: usize = 8;
/// Row tiles that a block of the experts may touch in its second product.
const SHARES: usize = 7;

/// Bytes of shared memory that the device takes for each block, and that one of the projection of attention has itself, at most.
const BLOCK_SHARED: usize = 1 << 10;
const ATTENDED_SHARED: usize = 2 << 10;

/// Bytes of shared memory that any of the kernels has itself, at most.
const OWN_SHARED: usize = 7 << 10;

/// Blocks of the output layer that a multiprocessor has registers for.
const OUTPUT_BLOCKS: usize = 4;

/// A kernel of `one.cu` or `one_invariant_sm90.cu`.
struct Kernel {
    name: &'static str,
    /// The one for several GPUs that share the model.
    shared: &'static str,
    /// Of a warp's flow: the tiles of a chunk, and the slots.
    flow: (usize, usize),
}

macro_rules! kernel {
    ($name:literal, $chunk:literal, $slots:literal) => {
        Kernel { name: $name, shared: concat!($name, "_shared"), flow: ($chunk, $slots) }
    };
}

/// The kernels of a layer, and the final norm, which has no flow, each for weights in BF16 and in four bits.
struct Kernels {
    qkv: [Kernel; 2],
    attended: [Kernel; 2],
    experts: [Kernel; 2],
    norm: [Kernel; 2],
}

const NORM: [Kernel; 2] = [kernel!("one_norm_bf16", 0, 0), kernel!("one_norm_fp4", 0, 0)];

/// With much on its way, and for multiprocessors of 100 KB of shared memory.
static KERNELS: [Kernels; 2] = [
    Kernels {
        qkv: [kernel!("one_qkv_bf16", 1, 3), kernel!("one_qkv_fp4", 9, 1)],
        attended: [kernel!("one_attended_bf16", 1, 3), kernel!("one_attended_fp4", 4, 1)],
        experts: [kernel!("one_experts_bf16", 1, 2), kernel!("one_experts_fp4", 3, 2)],
        norm: NORM,
    },
    Kernels {
        qkv: [kernel!("one_qkv_bf16_small", 1, 2), kernel!("one_qkv_fp4", 9, 1)],
        attended: [kernel!("one_attended_bf16_small", 1, 1), kernel!("one_attended_fp4", 4, 1)],
        experts: [kernel!("one_experts_bf16", 1, 2), kernel!("one_experts_fp4_small", 2, 2)],
        norm: NORM,
    },
];

/// Those whose sums are a batch's.
static INVARIANT: [Kernels; 1] = [Kernels {
    qkv: [kernel!("one_qkv_bf16_invariant", 2, 3), kernel!("one_qkv_fp4_invariant", 8, 2)],
    attended: [kernel!("one_attended_bf16_invariant", 4, 3), kernel!("one_attended_fp4_invariant", 8, 2)],
    experts: [kernel!("one_experts_bf16_invariant", 1, 4), kernel!("one_experts_fp4_invariant", 5, 2)],
    norm: [kernel!("one_norm_bf16_invariant", 0, 0), kernel!("one_norm_fp4_invariant", 0, 0)],
}];

/// The one for such weights.
fn of_format(kernels: &[Kernel; 2], format: u32) -> &Kernel {
    &kernels[usize::from(format == FP4)]
}

/// Bytes of the slots of a warp's flow.
fn flow_bytes(format: u32, (chunk, slots): (usize, usize)) -> usize {
    let (weights, scales) = tile_bytes(format);
    slots * (chunk * (weights + scales) + 16)
}

pub(crate) struct OneToken {
    /// The words that come, see common.cuh: all bits set before and after.
    awaited: Buffer,
    /// Where in there what attention takes and the residual stream begin.
    fresh: u64,
    whole: u64,
    /// f32 `[hidden]`, see one.cuh
    scaled: Buffer,
    router_parts: Buffer,
    shares: Buffer,
    exchange: Buffer,
    rounds: Buffer,
    best: Buffer,
    /// Row tiles of a block of the product of query, key and value, and its blocks.
    qkv: (usize, usize),
    /// Blocks per rank of the experts, and their row tiles in the first product.
    per_rank: usize,
    experts: Split,
    /// Warps of a row tile in the second; where the sums are a batch's, one block adds all there is.
    share_warps: usize,
    /// Where the sums are a batch's.
    chains: Option<Chains>,
    /// Experts per token.
    ranks: usize,
    /// Half of the memory that the blocks of a multiprocessor share.
    half: usize,
    kernels: &'static Kernels,
}

/// By how many blocks a batch's products share their inputs, so that a row has as many chains of sums.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chains {
    pub(crate) qkv: usize,
    pub(crate) attended: usize,
}

/// How the row tiles of a rank are divided among its blocks.
struct Split {
    /// Row tiles of each of the first `early` blocks.
    groups: usize,
    early: usize,
    /// Row tiles of each of the others.
    late_groups: usize,
}

impl Split {
    /// `late` blocks begin about a microsecond after the others, and what they ask for stands behind what all others asked for: they
    /// have at least a fifth less to do.
    fn new(tiles: usize, blocks: usize, late: usize) -> Split {
        let late = if late < blocks { late } else { 0 };
        let (even, early) = (tiles.div_ceil(blocks), blocks - late);
        let rest = |groups: usize| tiles.saturating_sub(early * groups).div_ceil(late.max(1)).max(1);
        let groups = (even..).find(|&groups| late == 0 || rest(groups) * 5 <= groups * 4).unwrap_or(even);
        Split { groups, early, late_groups: rest(groups) }
    }
}

impl OneToken {
    /// `None` if the kernels do not have the model's shape, or the device not the memory that their blocks share. `chains`: the sums
    /// are to be a batch's.
    pub(crate) fn new(
        device: &Arc<Device>,
        config: &Config,
        layers: &[Layer],
        unembedding: &PackedMatrix,
        chains: Option<Chains>,
    ) -> Result<Option<OneToken>, Error> {
        let Some(layer) = layers.first() else { return Ok(None) };
        let (blocks, ranks) = (device.multiprocessors(), config.experts_per_token);
        let qkv_tiles = layer.qkv.row_tiles();
        let groups = qkv_tiles.div_ceil(blocks);
        let per_rank = blocks / ranks;
        if per_rank == 0 || groups > WARPS {
            return Ok(None);
        }
        let late = match layer.output.row_tiles().saturating_sub(blocks) {
            late if device.capability() >= 90 && late < blocks => late.div_ceil(ranks),
            _ => 0,
        };
        let experts = Split::new(layer.gate_up.row_tiles(), per_rank, late);
        // As many warps for each rank of a row tile as there are, but not more than have something to do.
        let down_tiles = layer.down.padded_cols() / TILE_COLS;
        let warps = per_rank * ranks * DOWN_WARPS / (layer.down.row_tiles() * ranks);
        let share_warps = warps.min(down_tiles.max(WARPS)) * ranks;
        let row_tiles = layer.output.row_tiles();
        // 16-bit: what attention found, by query head; query, key and value heads. Then the residual stream.
        let fresh = config.query_heads * HEAD * 2;
        let whole = 2 * fresh + 2 * config.kv_heads * HEAD * 2;
        let awaited = (whole + config.hidden_size * 4).next_multiple_of(16);
        let mut one = OneToken {
            awaited: device.filled(awaited, 0xff)?,
            fresh: fresh as u64,
            whole: whole as u64,
            scaled: device.buffer(config.hidden_size * 4)?,
            router_parts: device.buffer(row_tiles.next_multiple_of(4) * (config.experts + 1) * 4)?,
            shares: device.buffer((blocks * SHARES * 16).max(config.hidden_size) * 4)?,
            exchange: device.buffer(ranks * layer.down.padded_cols() * 4)?,
            rounds: device.buffer(blocks * 4)?,
            best: device.buffer(unembedding.row_tiles().div_ceil(NARROW) * 8)?,
            qkv: (groups, blocks.max(qkv_tiles.div_ceil(groups))),
            per_rank,
            experts,
            share_warps,
            chains,
            ranks,
            half: (device.shared_bytes() + BLOCK_SHARED) / 2,
            kernels: &KERNELS[0],
        };
        let room = device.shared_bytes().saturating_sub(OWN_SHARED);
        let reach = (DOWN_WARPS - 1).checked_div(share_warps).map_or(usize::MAX, |n| n + 2);
        if one.experts.groups > EXPERT_WARPS || reach > SHARES || output_shared(unembedding) > room {
            return Ok(None);
        }
        if let Some(chains) = chains
            && (groups * chains.qkv > WARPS
                || chains.attended > WARPS
                || one.experts_busy(layer) > EXPERT_WARPS)
        {
            return Ok(None);
        }
        let all = if chains.is_some() { &INVARIANT[..] } else { &KERNELS };
        for kernels in all {
            one.kernels = kernels;
            if layers.iter().all(|layer| one.fits(layer, room)) {
                return Ok(Some(one));
            }
        }
        Ok(None)
    }

    fn fits(&self, layer: &Layer, room: usize) -> bool {
        layer.gate_up.format() == layer.down.format()
            && self.qkv_shared(layer) <= room
            && self.attended_shared(layer) <= room
            && self.experts_shared(layer) <= room
    }

    /// Warps that multiply in a block: of query, key and value, and of the projection of attention.
    fn qkv_busy(&self) -> usize {
        self.chains.map_or(WARPS, |chains| self.qkv.0 * chains.qkv)
    }

    fn attended_busy(&self) -> usize {
        self.chains.map_or(WARPS, |chains| chains.attended)
    }

    /// Of the experts, where a warp has whole row tiles: one of the first product, and one of the second, those of all ranks in a block.
    fn experts_busy(&self, layer: &Layer) -> usize {
        let tiles = layer.down.row_tiles().div_ceil(self.per_rank * self.ranks);
        self.chains.map_or(EXPERT_WARPS, |_| self.experts.groups.max(tiles * self.ranks))
    }

    fn qkv_shared(&self, layer: &Layer) -> usize {
        let format = layer.qkv.format();
        let flow = flow_bytes(format, of_format(&self.kernels.qkv, format).flow);
        let needed = layer.qkv.padded_cols() * 2 + self.qkv_busy() * flow;
        // In BF16 a block takes more than it needs, so that one of the projection of attention has no room beside it: its weights
        // would keep those waiting that attention waits for. Two of the projection have room.
        if format == BF16 { needed.max(self.half) } else { needed }
    }

    fn attended_shared(&self, layer: &Layer) -> usize {
        let format = layer.output.format();
        let flow = flow_bytes(format, of_format(&self.kernels.attended, format).flow);
        let needed = layer.output.padded_cols() * 2 + self.attended_busy() * flow;
        let half = self.half - BLOCK_SHARED - ATTENDED_SHARED;
        if format == BF16 { needed.max(half) } else { needed }
    }

    fn experts_shared(&self, layer: &Layer) -> usize {
        let format = layer.gate_up.format();
        let flow = flow_bytes(format, of_format(&self.kernels.experts, format).flow);
        let (first, second) = (layer.gate_up.padded_cols() * 2, self.ranks * layer.down.padded_cols() * 2);
        self.experts_busy(layer) * flow + first.max(second)
    }

    fn params(&self, cuda: &Cuda, matrix: &PackedMatrix, epilogue: Epilogue) -> One {
        let config = &cuda.config;
        One {
            matrix: matrix.params(),
            down: Zeroable::zeroed(),
            norm_scale: 0,
            input: 0,
            residual: cuda.arena.residual.address(),
            whole: self.awaited.address() + self.whole,
            awaited: self.awaited.address(),
            scaled: self.scaled.address(),
            router: 0,
            router_bias: 0,
            router_parts: self.router_parts.address(),
            shares: self.shares.address(),
            exchange: self.exchange.address(),
            rounds: self.rounds.address(),
            best: self.best.address(),
            arrivals: cuda.arena.arrivals.address(),
            largest: 0,
            told: 0,
            epilogue,
            hidden: config.hidden_size as u32,
            part_count: config.hidden_size.div_ceil(16) as u32,
            experts: config.experts as u32,
            experts_per_token: config.experts_per_token as u32,
            groups: 1,
            early: 0,
            late_groups: 0,
            share_warps: self.share_warps as u32,
            eps: config.rms_norm_eps,
            stack: 0,
            awaited_count: (self.awaited.bytes() / 16) as u32,
            busy: 0,
        }
    }

    /// What attention found, `[query heads, 64]`.
    pub(crate) fn context(&self) -> Address {
        self.awaited.address()
    }

    /// What attention takes, `[query, key and value heads, 64]`.
    pub(crate) fn fresh(&self) -> Address {
        self.awaited.address() + self.fresh
    }

    fn pending(&self, pending: Option<usize>) -> u32 {
        pending.map_or(0, |_| self.share_warps as u32)
    }

    /// Words of `shares`, and the warps of a row tile in it: what decides where a row is.
    pub(crate) fn shares(&self) -> (usize, usize) {
        (self.shares.bytes() / 4, self.share_warps)
    }

    /// Whether a row tile is of two blocks at most.
    pub(crate) fn shares_are_near(&self) -> bool {
        self.share_warps <= DOWN_WARPS + 1
    }

    /// A kernel of this layer, or what comes behind the last one.
    ///
    /// # Safety
    /// As [`Device::launch`].
    unsafe fn launch(
        &self,
        cuda: &Cuda,
        kernel: &Kernel,
        layer: usize,
        (grid, threads, shared): ([u32; 3], usize, usize),
        one: One,
    ) -> Result<(), Error> {
        match cuda.shared.as_ref().and_then(|shared| shared.together(layer)) {
            // SAFETY: the caller's promise.
            None => unsafe { cuda.device.launch(kernel.name, grid, threads as u32, shared, &one) },
            Some(others) => {
                let params = SharedOne { one, together: others };
                // SAFETY: the caller's promise; what GPUs exchange has the shape of what each has.
                unsafe { cuda.device.launch(kernel.shared, grid, threads as u32, shared, &params) }
            }
        }
    }

    /// Query, key and value. `pending`: what the experts of that layer add is still in `shares`.
    pub(crate) fn qkv(
        &self,
        cuda: &Cuda,
        index: usize,
        epilogue: Epilogue,
        pending: Option<usize>,
    ) -> Result<(), Error> {
        let layer = &cuda.layers[index];
        let params = One {
            norm_scale: layer.input_norm.address(),
            groups: self.qkv.0 as u32,
            busy: self.qkv_busy() as u32,
            share_warps: self.pending(pending),
            ..self.params(cuda, &layer.qkv, epilogue)
        };
        let kernel = of_format(&self.kernels.qkv, layer.qkv.format());
        let size = ([self.qkv.1 as u32, 1, 1], 32 * WARPS, self.qkv_shared(layer));
        // SAFETY: the arena has a row of everything; the cache's block was checked with the plan.
        unsafe { self.launch(cuda, kernel, index, size, params) }
    }

    /// The projection of what attention found, and the router's logits.
    pub(crate) fn attended(&self, cuda: &Cuda, index: usize) -> Result<(), Error> {
        let layer = &cuda.layers[index];
        let params = One {
            norm_scale: layer.post_attention_norm.address(),
            input: self.context(),
            router: layer.router.address(),
            busy: self.attended_busy() as u32,
            ..self.params(cuda, &layer.output, cuda.epilogue(After::Residual))
        };
        let kernel = of_format(&self.kernels.attended, layer.output.format());
        let size = ([layer.output.row_tiles() as u32, 1, 1], 32 * WARPS, self.attended_shared(layer));
        // SAFETY: the arena has a row of everything.
        unsafe { self.launch(cuda, kernel, index, size, params) }
    }

    /// The experts. What they add is left in `shares`.
    pub(crate) fn experts(&self, cuda: &Cuda, index: usize) -> Result<(), Error> {
        let layer = &cuda.layers[index];
        let params = One {
            down: layer.down.params(),
            router_bias: layer.router_bias.address(),
            groups: self.experts.groups as u32,
            early: self.experts.early as u32,
            late_groups: self.experts.late_groups as u32,
            busy: self.experts_busy(layer) as u32,
            ..self.params(cuda, &layer.gate_up, cuda.epilogue(After::Swiglu))
        };
        let kernel = of_format(&self.kernels.experts, layer.gate_up.format());
        let grid = [self.ranks as u32, self.per_rank as u32, 1];
        // SAFETY: `exchange` has room for what the first product finds. There are not more blocks than multiprocessors, and each fits
        // on one, so that all are at work when they wait for one another.
        unsafe {
            self.launch(cuda, kernel, index, (grid, 32 * EXPERT_WARPS, self.experts_shared(layer)), params)
        }
    }

    /// The final norm, whose output is plain or the first row of a stack of so many, and the residual stream with what is pending.
    pub(crate) fn norm(&self, cuda: &Cuda, pending: Option<usize>, stack: u32) -> Result<(), Error> {
        let matrix = &cuda.unembedding;
        let params = One {
            norm_scale: cuda.final_norm.address(),
            input: cuda.arena.normed.address(),
            whole: cuda.arena.residual.address(),
            share_warps: self.pending(pending),
            stack,
            ..self.params(cuda, matrix, cuda.epilogue(After::Store))
        };
        let kernel = of_format(&self.kernels.norm, matrix.format());
        // Behind that layer.
        let next = pending.map_or(0, |layer| layer + 1);
        // SAFETY: one block, which changes what it alone has read.
        unsafe { self.launch(cuda, kernel, next, ([1, 1, 1], 32 * WARPS, 0), params) }
    }

    /// The logits and the largest of them, which goes to this row of those.
    pub(crate) fn output(&self, cuda: &Cuda, row: usize, epilogue: Epilogue) -> Result<(), Error> {
        let (matrix, row) = (&cuda.unembedding, 4 * row as u64);
        let params = One {
            input: cuda.arena.normed.address(),
            largest: cuda.arena.largest.address() + row,
            told: cuda.arena.largest_host.address() + row,
            ..self.params(cuda, matrix, epilogue)
        };
        let name = match (matrix.format(), self.chains) {
            (BF16, _) => "one_output_bf16",
            (_, None) => "one_output_fp4",
            (_, Some(_)) => "one_output_fp4_invariant",
        };
        let shared = output_shared(matrix);
        // In BF16 all blocks are at work at a time, and none begins with nothing on its way.
        let each = (cuda.device.shared_bytes() / (shared + (2 << 10))).clamp(1, OUTPUT_BLOCKS);
        let blocks = match matrix.row_tiles().div_ceil(NARROW) {
            all if matrix.format() == BF16 => all.min(each * cuda.device.multiprocessors()),
            all => all,
        };
        // SAFETY: the arena has a row of logits; `best` an entry for each block.
        unsafe { cuda.device.launch(name, [blocks as u32, 1, 1], 32 * NARROW as u32, shared, &params) }
    }
}

fn output_shared(matrix: &PackedMatrix) -> usize {
    let flow = if matrix.format() == FP4 { (5, 3) } else { (1, 4) };
    matrix.padded_cols() * 2 + NARROW * flow_bytes(matrix.format(), flow)
}
