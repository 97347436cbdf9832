//! Dense products: which kernels they take, by the number of tokens, the format and the device.

use gptoss::Error;

use crate::arena::{max_slots, stack_rows};
use crate::backend::{Cuda, Layer};
use crate::device::Device;
use crate::driver::Address;
use crate::fp4::{self, FP4_FROM, Fp4Matrix};
use crate::one::Chains;
use crate::packed::{PackedMatrix, TILE_COLS, TILE_ROWS};
use crate::params::{After, BF16, Dense, Epilogue, Exchanged, FP4, Gemm, Matrix, Product};

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
pub(crate) const SOME_TOKENS: usize = 256;
pub(crate) const SOME_SHARES: usize = 5;
const SOME_SHARED_128: usize = 213_248;
const SOME_SHARED_256: usize = 229_888;
/// Up to so many tokens have kernels of their own.
const FEW_TOKENS: usize = 8;
/// Where there is no wgmma: tokens of a dense product from which on gemm_many.cu is faster than product.cu.
const DENSE_FEW: usize = 32;
/// Tokens of a block of gemm_many_sm90.cu, gemm_sm90.cu and gemm_many.cu, at most, and where there are few.
pub(crate) const GEMM_TOKENS: usize = 128;
pub(crate) const FEWER_TOKENS: usize = 64;
/// Row tiles of a block of any of them.
pub(crate) const GEMM_ROW_TILES: usize = 8;
/// Shared memory of gemm_sm90.cu, at most: `Sizes::BYTES`, and room to align them to 1024 bytes.
pub(crate) const GEMM_SHARED: usize = 104_448 + 1024;
/// Bytes of weights that stay in the cache from one tile of tokens to the next.
const GEMM_CACHED: usize = 32 << 20;
/// Blocks of a cluster, at most: larger ones are slower.
const MAX_CLUSTER: usize = 4;
/// Threads of a block of the product kernels.
pub(crate) const PRODUCT_THREADS: u32 = 256;

/// Of the output layer: the lane whose largest logits are found, and one GPU's rows, where several have it: see product_some_sm90.cu.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LogitRows {
    pub(crate) lane: usize,
    pub(crate) bests: Address,
    pub(crate) first: u32,
    pub(crate) all: u32,
    pub(crate) rank: u32,
    pub(crate) ranks: u32,
}

fn shares(device: &Device, matrix: Matrix, most: usize) -> usize {
    let blocks = matrix.row_tiles().div_ceil(GEMM_ROW_TILES);
    (device.multiprocessors() / blocks).min(most).min(matrix.col_tiles())
}

/// How a single token's sums are those of a batch that may not matter, if its products take product_some_sm90.cu.
pub(crate) fn chains(device: &Device, layer: &Layer) -> Option<Chains> {
    let of = |matrix: &PackedMatrix| shares(device, matrix.params(), MAX_CLUSTER);
    let chains = Chains { qkv: of(&layer.qkv), attended: of(&layer.output) };
    (device.capability() == 90 && chains.qkv > 1 && chains.attended > 1).then_some(chains)
}

impl Cuda {
    /// A dense product with `n` rows of `input`.
    pub(crate) fn product(
        &self,
        matrix: &PackedMatrix,
        input: Address,
        n: usize,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        if let Some((scratch, fp4)) = self.fp4(matrix, n) {
            return fp4::multiply(&self.device, scratch, fp4, matrix.params(), (input, n), None, epilogue);
        }
        self.product_of(matrix.params(), input, n, epilogue)
    }

    /// The same with 16-bit activations.
    pub(crate) fn product_of(
        &self,
        matrix: Matrix,
        input: Address,
        n: usize,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        if self.few(matrix, n) {
            let name = match n {
                ..=8 => "product_few_8",
                9..=16 => "product_few_16",
                _ => "product_few_32",
            };
            let params = Dense { matrix, input, epilogue, n: n as u32, padding: 0 };
            let grid = [self.device.multiprocessors().min(matrix.row_tiles()) as u32, 1, 1];
            // SAFETY: input and outputs have `n` rows in the arena or the cache; blocks and tables were checked with the plan.
            return unsafe { self.device.launch(name, grid, 32 * DENSE_WARPS, DENSE_SHARED, &params) };
        }
        if let Some(shares) = self.some(matrix, n, &epilogue) {
            return self.product_of_some(matrix, shares, input, n, epilogue, LogitRows::default());
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

    /// If a product with this matrix, which is dense, takes product_some_sm90.cu: by how many blocks the inputs are shared.
    pub(crate) fn some(&self, matrix: Matrix, n: usize, epilogue: &Epilogue) -> Option<usize> {
        let shares = self.shares(matrix);
        let from = match (matrix.format(), epilogue.kind) {
            _ if self.options.batch_invariant => 0,
            (BF16, STORE) => 0,
            (BF16, _) => DENSE_TOKENS,
            _ => FEW_TOKENS,
        };
        let fits = self.device.capability() == 90
            && n > from
            && n <= SOME_TOKENS
            && !self.few(matrix, n)
            && match epilogue.kind {
                QKV | RESIDUAL => shares > 1,
                STORE => matrix.rows.is_multiple_of((GEMM_ROW_TILES * TILE_ROWS) as u32) && matrix.bias == 0,
                _ => false,
            };
        fits.then_some(if epilogue.kind == STORE { 1 } else { shares })
    }

    /// By how many blocks product_some_sm90.cu shares the inputs of a product with this matrix; where the batch may not matter by as many as
    /// gemm_sm90.cu can, which then has the same sums of more tokens.
    fn shares(&self, matrix: Matrix) -> usize {
        shares(&self.device, matrix, if self.options.batch_invariant { MAX_CLUSTER } else { SOME_SHARES })
    }

    /// `logits`: of the output layer.
    pub(crate) fn product_of_some(
        &self,
        matrix: Matrix,
        shares: usize,
        input: Address,
        n: usize,
        epilogue: Epilogue,
        logits: LogitRows,
    ) -> Result<(), Error> {
        let multiprocessors = self.device.multiprocessors();
        let few = n <= GEMM_TOKENS;
        let name = match (epilogue.kind, matrix.format(), few) {
            (QKV, BF16, true) => "product_some_qkv_bf16_128",
            (QKV, BF16, false) => "product_some_qkv_bf16_256",
            (QKV, _, true) => "product_some_qkv_fp4_128",
            (QKV, _, false) => "product_some_qkv_fp4_256",
            (RESIDUAL, BF16, true) => "product_some_residual_bf16_128",
            (RESIDUAL, BF16, false) => "product_some_residual_bf16_256",
            (RESIDUAL, _, true) => "product_some_residual_fp4_128",
            (RESIDUAL, _, false) => "product_some_residual_fp4_256",
            (_, BF16, true) => "product_some_bf16_128",
            (_, BF16, false) => "product_some_bf16_256",
            (_, _, true) => "product_some_fp4_128",
            (_, _, false) => "product_some_fp4_256",
        };
        let lane = 4 * logits.lane as u64;
        let params = Exchanged {
            matrix,
            input,
            epilogue,
            parts: self.arena.exchanged.address(),
            arrivals: self.arena.arrivals.address(),
            best: self.arena.best.address(),
            largest: self.arena.largest.address() + lane,
            told: self.arena.largest_host.address() + lane,
            bests: logits.bests,
            n: n as u32,
            stack: stack_rows(n) as u32,
            first: logits.first,
            all: logits.all,
            rank: logits.rank,
            ranks: logits.ranks,
        };
        let blocks = (matrix.rows as usize).div_ceil(GEMM_ROW_TILES * TILE_ROWS).min(multiprocessors);
        let grid = [blocks as u32, shares as u32, 1];
        let shared = if few { SOME_SHARED_128 } else { SOME_SHARED_256 };
        // SAFETY: as in `product`; the arena's stacks have room for whole tiles. There are not more blocks than multiprocessors, each of
        // which has room for one, so that all are at work when they wait for one another.
        unsafe { self.device.launch(name, grid, 256, shared, &params) }
    }

    fn product_of_many(
        &self,
        matrix: Matrix,
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
            let shares = match self.options.batch_invariant {
                true => self.shares(matrix),
                false => (fitting / (blocks * tiles)).min(MAX_CLUSTER).min(matrix.col_tiles()),
            };
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
        let tokens_first = matrix.bytes() > GEMM_CACHED;
        let params = Gemm { tokens_first: u32::from(tokens_first), ..params(tile) };
        let (rows, tokens) = (blocks as u32, tiles as u32);
        let grid = if tokens_first { [tokens, 1, rows] } else { [rows, 1, tokens] };
        // SAFETY: as above.
        unsafe { self.device.launch(name, grid, 256, gemm_many_shared(matrix.format()), &params) }
    }

    /// A product of many tokens where there is no wgmma: dense, or of the experts with the activations of their tokens or slots.
    pub(crate) fn product_anywhere(
        &self,
        matrix: Matrix,
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

    pub(crate) fn product_params(
        &self,
        matrix: Matrix,
        input: Address,
        n: usize,
        epilogue: Epilogue,
    ) -> Product {
        Product {
            matrix,
            input,
            list: self.arena.routes.address(),
            epilogue,
            n: n as u32,
            experts: self.config.experts as u32,
            experts_per_token: self.config.experts_per_token as u32,
            padding: 0,
        }
    }

    pub(crate) fn gemm_params(&self, matrix: Matrix, input: Address, n: usize, epilogue: Epilogue) -> Gemm {
        Gemm {
            matrix,
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

    /// What FP4 products of this many tokens need, if the matrix takes them.
    pub(crate) fn fp4<'a>(
        &'a self,
        matrix: &'a PackedMatrix,
        n: usize,
    ) -> Option<(&'a fp4::Scratch, &'a Fp4Matrix)> {
        if n > FP4_FROM && !self.options.batch_invariant {
            self.fp4.as_ref().zip(matrix.fp4.as_ref())
        } else {
            None
        }
    }

    /// Whether products with this matrix, which is dense, take product_few_sm90.cu.
    fn few(&self, matrix: Matrix, n: usize) -> bool {
        self.device.capability() == 90
            && !self.options.batch_invariant
            && n <= DENSE_TOKENS
            && matrix.format() == BF16
            && matrix.row_tiles() <= DENSE_ROW_TILES * self.device.multiprocessors()
    }

    /// Whether products of this many tokens take gemm_sm90.cu, whose activations are stacked.
    pub(crate) fn many(&self, n: usize) -> bool {
        self.device.capability() == 90 && (n > FEW_TOKENS || self.options.batch_invariant)
    }

    /// Rows of a stack of activations of `n` tokens for products with this matrix, or 0 where they are plain.
    pub(crate) fn stack(&self, matrix: Matrix, n: usize) -> u32 {
        if self.many(n) && !self.few(matrix, n) { stack_rows(n) as u32 } else { 0 }
    }

    /// The same for the activations of slots.
    pub(crate) fn slot_stack(&self, n: usize) -> u32 {
        if self.many(n) { stack_rows(max_slots(&self.config, n)) as u32 } else { 0 }
    }
}

/// Shared memory of a block of gemm_many_sm90.cu: its `Sizes::BYTES`.
pub(crate) fn gemm_many_shared(format: u32) -> usize {
    if format == FP4 { 102_592 } else { 114_944 }
}

/// Shared memory of a product: two halves of partial sums of all warps, `[16, columns]` in f32.
pub(crate) fn partial_bytes(columns: usize) -> usize {
    2 * (PRODUCT_THREADS as usize / 32) * 16 * columns * 4
}
