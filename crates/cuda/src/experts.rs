//! The experts: which kernels take their products, by how many tokens an expert has.

use gptoss::Error;

use crate::arena::{MAX_TOKENS, max_slots, route_words};
use crate::backend::{Cuda, Layer};
use crate::device::Buffer;
use crate::driver::Address;
use crate::fp4;
use crate::packed::PackedMatrix;
use crate::params::{After, BF16, Epilogue, FP4, Few, Gemm, ORDERED, Part, Streamed};
use crate::products::{
    FEWER_TOKENS, GEMM_ROW_TILES, GEMM_SHARED, GEMM_TOKENS, PRODUCT_THREADS, gemm_many_shared, partial_bytes,
};

/// Passes of a block of experts_few.cuh, at most.
const FEW_PASSES: usize = 16;
/// Bytes of weights that a block of experts_few.cuh asks for before it knows its share.
const FEW_EARLY: u32 = 64 << 10;
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
/// Where there is no wgmma: tokens of an expert from which on gemm_many.cu is faster than product.cu.
const EXPERTS_FEW: usize = 8;

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

impl Cuda {
    /// Router and experts, whose outputs are left for the next norm to add.
    pub(crate) fn experts(&self, index: usize, n: usize) -> Result<(), Error> {
        let (layer, config) = (&self.layers[index], &self.config);
        let few_each = self.few_each(layer, n);
        match self.gathering(n).filter(|_| !few_each) {
            Some(gathering) => self.route_and_gather(layer, n, &gathering)?,
            None => self.route(layer, n, few_each)?,
        }
        let epilogue = Epilogue {
            out16: self.arena.activated.address(),
            out_cols: layer.down.padded_cols() as u32,
            out_stack: if few_each { ORDERED } else { self.slot_stack(n) },
            out_format: layer.down.format(),
            ..self.epilogue(After::Swiglu)
        };
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
        let (normed, activated) = (self.arena.normed.address(), self.arena.activated.address());
        let pairs = n * config.experts_per_token;
        if pairs > EXPERTS_FEW * config.experts && !self.options.batch_invariant {
            self.product_anywhere(layer.gate_up.params(), normed, n, true, epilogue)?;
            return self.product_anywhere(layer.down.params(), activated, n, true, store);
        }
        let columns = if n <= 32 && !self.options.batch_invariant { 8 } else { 16 };
        let name = |format| match (format, columns) {
            (BF16, 8) => "experts_bf16_8",
            (BF16, _) => "experts_bf16_16",
            (_, 8) => "experts_fp4_8",
            _ => "experts_fp4_16",
        };
        let active = config.experts.min(pairs) as u32;
        let multiply = |matrix: &PackedMatrix, input: Address, epilogue: Epilogue| {
            let params = self.product_params(matrix.params(), input, n, epilogue);
            let (name, grid) = (name(matrix.format()), [matrix.row_tiles() as u32, active, 1]);
            // SAFETY: the router's list names rows and slots of these tokens, for which the arena has room.
            unsafe { self.device.launch(name, grid, PRODUCT_THREADS, partial_bytes(columns), &params) }
        };
        multiply(&layer.gate_up, normed, epilogue)?;
        multiply(&layer.down, activated, store)
    }

    /// The kernel of experts_few.cuh for `n` tokens, and how it goes through the experts of a layer.
    fn few_kernel(&self, layer: &Layer, n: usize) -> FewKernel {
        let few = n * self.config.experts_per_token <= 8 * self.config.experts;
        // Groups of so many warps.
        let (name, groups, unit, tokens) =
            if few { ("experts_few", 12, 2, 16) } else { ("experts_some", 4, 4, 24) };
        // Of each warp two chunks of four tiles; what all groups but one leave for others; the plan; the routes.
        let weights = groups * unit * 2 * 4 * (512 + 64);
        let heads = (groups - 1) * (tokens / 2) * 32 * unit * 4;
        let beside = weights + heads + 1504 + self.own_routes(n);
        let room = self.device.shared_bytes().saturating_sub(beside) / 1024 * 1024;
        let cols = layer.gate_up.padded_cols().max(layer.down.padded_cols());
        let tokens = (room / (2 * cols)).min(tokens) / 8 * 8;
        FewKernel { name, threads: (32 * groups * unit) as u32, tokens, room, shared: room + beside }
    }

    /// Bytes of shared memory for the routes of `n` tokens that blocks of experts_few.cuh make themselves; 0 if the router makes them.
    pub(crate) fn own_routes(&self, n: usize) -> usize {
        let bytes = (8 * self.config.experts + 4 * route_words(&self.config, n)).next_multiple_of(16);
        if n <= OWN_ROUTES_TOKENS && bytes <= OWN_ROUTES_BYTES { bytes } else { 0 }
    }

    /// Whether the experts have few tokens each, and take experts_few.cuh.
    fn few_each(&self, layer: &Layer, n: usize) -> bool {
        let (experts, pairs) = (self.config.experts, n * self.config.experts_per_token);
        let tokens = self.few_kernel(layer, n).tokens;
        self.device.capability() >= 90
            && !self.options.batch_invariant
            && n > 1
            && pairs <= 20 * experts
            && !self.some_each(layer, n)
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
            // Nearly all experts then have tokens, and what is asked for is needed.
            early: if n * self.config.experts_per_token >= 2 * self.config.experts { FEW_EARLY } else { 0 },
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

    /// Whether the experts take experts_streamed_sm90.cu: those that have more than a few tokens each, and all where the batch may not matter.
    fn some_each(&self, layer: &Layer, n: usize) -> bool {
        let (experts, pairs) = (self.config.experts, n * self.config.experts_per_token);
        // Each expert may have one part that is not full.
        let parts = pairs / STREAMED_TOKENS + experts;
        self.device.capability() == 90
            && (pairs > STREAMED_FROM * experts || self.options.batch_invariant)
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
    pub(crate) fn few_tokens_each(&self, n: usize) -> bool {
        n * self.config.experts_per_token / self.config.experts <= 48
    }

    /// Tiles of at most `tokens` each that the experts, of `n` tokens, may need: each expert may have one that is not full.
    pub(crate) fn expert_tiles(&self, n: usize, tokens: usize) -> usize {
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
        let params =
            Gemm { stack: self.slot_stack(n), ..self.gemm_params(matrix.params(), input, n, epilogue) };
        let grid = [matrix.row_tiles().div_ceil(GEMM_ROW_TILES) as u32, 1, tiles as u32];
        let shared = if few { GEMM_SHARED } else { gemm_many_shared(matrix.format()) };
        // SAFETY: the slots are those of `n` tokens, for which the arena has room.
        unsafe { self.device.launch(name, grid, 256, shared, &params) }
    }
}
