//! The FP4 products on a CPU that stands for the chip: the kernels' loops, with their own index functions, over the documented
//! behaviour of the instructions (PTX ISA 9.0: `ldmatrix`, `mma` with block scaling, `tcgen05`'s descriptors, `cp`, `mma`, `ld`).
//! Sums are exact, so a code or a scale in a wrong place makes a difference.

use std::collections::HashMap;

use numerics::{e2m1, e4m3, nvfp4};

use crate::fp4::{Case, INPUT_SCALE, Tiles};
use crate::fp4_layout as layout;
use crate::packed::TILE_COLS;
use crate::params::RowOrder;

/// Rows, or tokens, of a block.
const ROWS: usize = layout::TILE_ROWS as usize;
const WARPS: u32 = layout::THREADS / 32;
/// Whether tokens are spread among experts, and the order of the rows: an ordinary matrix, and the two of the experts.
const KINDS: [(bool, RowOrder); 3] =
    [(false, RowOrder::Plain), (true, RowOrder::GateUp), (true, RowOrder::Plain)];

#[test]
fn products_of_sm_120() {
    for (grouped, order) in KINDS {
        check(grouped, order, layout::SM120_TILES, layout::SM120_STAGES, sm_120);
    }
}

#[test]
fn products_of_sm_100() {
    for (grouped, order) in KINDS {
        check(grouped, order, layout::SM100_TILES, layout::SM100_STAGES, sm_100);
    }
}

/// Eight rows of 16 bytes that are read together lie in different banks.
#[test]
fn pieces_lie_in_different_banks() {
    for first in (0..128).step_by(8) {
        for piece in 0..2 {
            let banks =
                (first..first + 8).fold(0, |banks, row| banks | 1 << (layout::piece(row, piece) / 16 % 8));
            assert_eq!(banks, 0xff, "rows from {first}, piece {piece}");
        }
    }
}

/// The scales of all rows are the 128x4 tiles of `numerics`.
#[test]
fn scales_lie_as_cutlass_has_them() {
    let (rows, cols) = (200, 320);
    let scales: Vec<u8> = (0..rows * cols / 16).map(|i| (i % 251) as u8).collect();
    let mut tiles = Tiles::new(rows, cols);
    tiles.put(0, RowOrder::Plain, &vec![0; rows * cols / 2], &scales, cols);
    assert_eq!(tiles.scales, nvfp4::swizzle(&scales, rows, cols / 16));
}

/// No tile of scales in tensor memory lies on another, or on the sums: copies need not wait for the products before them.
#[test]
fn scales_have_columns_of_their_own() {
    let mut free = vec![true; layout::TENSOR_COLUMNS as usize];
    free[..ROWS].fill(false);
    for slot in 0..layout::SM100_STAGES {
        for (operand, tile) in (0..layout::SM100_TILES).flat_map(|tile| [(0, tile), (1, tile)]) {
            let at = layout::tensor_scales(slot, operand, tile) as usize;
            for free in &mut free[at..at + 4] {
                assert!(std::mem::take(free), "slot {slot}, operand {operand}, tile {tile}");
            }
        }
    }
}

/// What follows a product is given: the stored row, the slot, the sum.
type Outputs = HashMap<(usize, usize), f64>;

/// Every sum of every slot, once, compared with the sum over the unpacked operands.
fn check(
    grouped: bool,
    order: RowOrder,
    tiles: u32,
    stages: u32,
    multiply: fn(&mut Block<'_>, &mut dyn FnMut(Sum)),
) {
    let case = Case::new(grouped);
    // Tokens are gathered before SwiGLU, whose matrix has this order.
    let gathered = grouped && order == RowOrder::GateUp;
    let global = Global::new(&case, order);
    let mut outputs = Outputs::new();
    let row_blocks = case.rows.div_ceil(ROWS);
    let pairs = case.tokens * case.experts_per_token;
    let token_blocks =
        if grouped { pairs / ROWS + case.experts.min(pairs) } else { case.tokens.div_ceil(ROWS) };
    for x in 0..row_blocks {
        for y in 0..token_blocks {
            let Some(mut block) = Block::find(&case, &global, (x, y), (grouped, gathered), tiles, stages)
            else {
                continue;
            };
            let first = block.first;
            let mut finish = |sum: Sum| {
                let (a, b) = stored_rows(order, sum.row_tile, sum.pair);
                for (row, value) in [(a, sum.a), (b, sum.b)] {
                    if row < case.rows {
                        assert!(outputs.insert((row, first + sum.token), value).is_none(), "row {row} twice");
                    }
                }
            };
            multiply(&mut block, &mut finish);
        }
    }
    assert_eq!(outputs.len(), case.rows * pairs);
    for slot in 0..case.routes.slots.len() {
        let Some((expert, row)) = case.slot(slot, gathered) else { continue };
        let (codes, scales) = case.expert(expert);
        let x = unpacked(&global.input, &global.input_scales, row, global.cols);
        for r in 0..case.rows {
            let w = unpacked(codes, scales, r, case.cols);
            let expected: f64 = w.iter().zip(&x).map(|(w, x)| w * x).sum();
            assert_eq!(outputs[&(r, slot)], expected, "{order:?}, row {r}, slot {slot}");
        }
    }
}

/// `stored_rows` of epilogue.cuh.
fn stored_rows(order: RowOrder, row_tile: usize, pair: usize) -> (usize, usize) {
    match order {
        RowOrder::GateUp => (row_tile * 16 + 2 * pair, row_tile * 16 + 2 * pair + 1),
        _ => (row_tile * 16 + pair, row_tile * 16 + pair + 8),
    }
}

fn unpacked(codes: &[u8], scales: &[u8], row: usize, cols: usize) -> Vec<f64> {
    let mut out = vec![0.0; cols];
    nvfp4::dequantize(&codes[row * cols / 2..], &scales[row * cols / 16..], 1.0, &mut out);
    out.into_iter().map(f64::from).collect()
}

/// What lies in global memory: the packed weights of all experts, the quantized activations.
struct Global {
    codes: Vec<u8>,
    scales: Vec<u8>,
    input: Vec<u8>,
    input_scales: Vec<u8>,
    /// Padded to whole tiles.
    cols: usize,
}

impl Global {
    fn new(case: &Case, order: RowOrder) -> Global {
        let cols = case.cols.next_multiple_of(TILE_COLS);
        let rows = case.input.len() / case.cols;
        let mut global = Global {
            codes: Vec::new(),
            scales: Vec::new(),
            input: vec![0; rows * cols / 2],
            input_scales: vec![0; rows * cols / 16],
            cols,
        };
        for expert in 0..case.experts {
            let mut tiles = Tiles::new(case.rows, case.cols);
            let (codes, scales) = case.expert(expert);
            tiles.put(0, order, codes, scales, case.cols);
            global.codes.extend(tiles.codes);
            global.scales.extend(tiles.scales);
        }
        for row in 0..rows {
            for block in 0..case.cols / 16 {
                let values: Vec<f32> =
                    case.input[row * case.cols + block * 16..][..16].iter().map(|v| v.to_f32()).collect();
                let scale = e4m3::encode((nvfp4::amax(&values) / (6.0 * INPUT_SCALE)).min(e4m3::MAX));
                global.input_scales[row * cols / 16 + block] = scale;
                let codes = &mut global.input[row * cols / 2 + block * 8..][..8];
                nvfp4::encode_block(&values, scale, INPUT_SCALE, codes);
            }
        }
        global
    }
}

/// The two sums of a pair of rows, for a token of the block.
struct Sum {
    row_tile: usize,
    pair: usize,
    token: usize,
    a: f64,
    b: f64,
}

/// `Operands` of fp4.cuh, and shared memory.
struct Block<'a> {
    global: &'a Global,
    x: usize,
    row_blocks: usize,
    expert: usize,
    first: usize,
    rows: Vec<usize>,
    tiles: u32,
    stages: u32,
    shared: Vec<u8>,
}

/// Where the stages begin: any multiple of 1024.
const BASE: u32 = 3 * 1024;

impl<'a> Block<'a> {
    fn find(
        case: &Case,
        global: &'a Global,
        (x, y): (usize, usize),
        (grouped, gathered): (bool, bool),
        tiles: u32,
        stages: u32,
    ) -> Option<Block<'a>> {
        let (mut expert, mut first, mut end, mut skip) = (0, y * ROWS, case.tokens, y);
        if grouped {
            let mut active = case.routes.active.iter();
            loop {
                expert = *active.next()?;
                first = case.routes.firsts[expert];
                end = first + case.routes.counts[expert];
                let blocks = (end - first).div_ceil(ROWS);
                if skip < blocks {
                    break;
                }
                skip -= blocks;
            }
            first += skip * ROWS;
        }
        let row = |slot| case.slot(slot, gathered).expect("an expert's slots are full").1;
        let rows = (first..end.min(first + ROWS)).map(row).collect();
        // What was there before must not matter.
        let shared = vec![0xff; (BASE + stages * layout::stage_bytes(tiles)) as usize];
        let row_blocks = case.rows.div_ceil(ROWS);
        Some(Block { global, x, row_blocks, expert, first, rows, tiles, stages, shared })
    }

    fn column_tiles(&self) -> u32 {
        (self.global.cols / TILE_COLS) as u32
    }

    fn count(&self) -> u32 {
        self.column_tiles().div_ceil(self.tiles)
    }

    fn tiles(&self, k: u32) -> u32 {
        (self.column_tiles() - k * self.tiles).min(self.tiles)
    }

    fn codes(&self, slot: u32, operand: u32, tile: u32) -> u32 {
        BASE + slot * layout::stage_bytes(self.tiles) + layout::stage_codes(self.tiles, operand, tile)
    }

    fn scales(&self, slot: u32, operand: u32, tile: u32) -> u32 {
        BASE + slot * layout::stage_bytes(self.tiles) + layout::stage_scales(self.tiles, operand, tile)
    }

    fn copy(&mut self, to: u32, from: &[u8]) {
        self.shared[to as usize..][..from.len()].copy_from_slice(from);
    }

    fn word(&self, at: u32) -> u32 {
        u32::from_le_bytes(self.shared[at as usize..][..4].try_into().unwrap())
    }

    fn bring(&mut self, k: u32, slot: u32) {
        if k >= self.count() {
            return;
        }
        let (global, tiles) = (self.global, self.tiles(k));
        let row_block = (self.expert * self.row_blocks + self.x) as u32;
        let tile = layout::tile(row_block, k * self.tiles, self.column_tiles());
        let part = |bytes: u32| (tile * bytes) as usize..((tile + tiles) * bytes) as usize;
        self.copy(self.codes(slot, 0, 0), &global.codes[part(layout::CODE_BYTES)]);
        self.copy(self.scales(slot, 0, 0), &global.scales[part(layout::SCALE_BYTES)]);
        let zeros = [0; 16];
        for thread in 0..layout::THREADS {
            for i in 0..self.tiles {
                let token = layout::brought_token(thread, i, self.tiles);
                let piece = layout::brought_piece(thread, i, self.tiles);
                if piece / 2 >= tiles {
                    continue;
                }
                let from = self.rows.get(token as usize).map_or(&zeros[..], |row| {
                    &global.input[row * global.cols / 2 + (k * self.tiles * 32 + piece * 16) as usize..]
                });
                self.copy(self.codes(slot, 1, piece / 2) + layout::piece(token, piece % 2), &from[..16]);
            }
            for i in 0..self.tiles.div_ceil(2) {
                let token = layout::brought_scale_token(thread, i, self.tiles);
                let tile = layout::brought_scale_tile(thread, i, self.tiles);
                if token >= layout::TILE_ROWS || tile >= tiles {
                    continue;
                }
                let from = self.rows.get(token as usize).map_or(&zeros[..], |row| {
                    &global.input_scales[row * global.cols / 16 + ((k * self.tiles + tile) * 4) as usize..]
                });
                self.copy(self.scales(slot, 1, tile) + layout::scales(token), &from[..4]);
            }
        }
    }

    /// Word `lane % 4` of row `lane / 4` of each of four matrices, to whose rows the lanes point, eight by eight.
    fn load_matrices(&self, address: impl Fn(u32) -> u32) -> [[u32; 4]; 32] {
        std::array::from_fn(|lane| {
            std::array::from_fn(|i| self.word(address(8 * i as u32 + lane as u32 / 4) + lane as u32 % 4 * 4))
        })
    }
}

fn nibble(word: u32, i: usize) -> f64 {
    e2m1::decode((word >> (4 * i)) as u8 & 15).into()
}

fn scale(word: u32, i: usize) -> f64 {
    let byte = word.to_le_bytes()[i];
    assert!(byte < 0x7f, "a scale is not negative and a number, found {byte:#x}");
    e4m3::decode(byte).into()
}

/// `mma…scale_vec::4X.m16n8k64` with selectors {0, 0}: D[16][8] += A[16][64] B[64][8]. Lane 4 g + t has of A, register i, row
/// g + 8 (i % 2), columns 8 t + 32 (i / 2) and on; of B, register i, column g, rows 8 t + 32 i and on; of D, register i, row
/// g + 8 (i / 2), column 2 t + i % 2. The scales of row g are those of lane 4 g, of row g + 8 those of lane 4 g + 1, of column g
/// those of lane 4 g; byte i is for inputs 16 i and on.
fn mma(
    d: &mut [[f64; 4]; 32],
    a: &[[u32; 4]; 32],
    b: &[[u32; 2]; 32],
    a_scales: &[u32; 32],
    b_scales: &[u32; 32],
) {
    let (mut left, mut right) = ([[0.0; 64]; 16], [[0.0; 64]; 8]);
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        for v in 0..8 {
            for (i, word) in a[lane].into_iter().enumerate() {
                let (row, k) = (g + 8 * (i % 2), 8 * t + 32 * (i / 2) + v);
                let scales = a_scales[4 * g + i % 2];
                left[row][k] = nibble(word, v) * scale(scales, k / 16);
            }
            for (i, word) in b[lane].into_iter().enumerate() {
                let k = 8 * t + 32 * i + v;
                right[g][k] = nibble(word, v) * scale(b_scales[4 * g], k / 16);
            }
        }
    }
    for (lane, d) in d.iter_mut().enumerate() {
        for (i, d) in d.iter_mut().enumerate() {
            let (row, column) = (lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2);
            *d += left[row].iter().zip(&right[column]).map(|(a, b)| a * b).sum::<f64>();
        }
    }
}

/// gemm_sm120.cu
fn sm_120(block: &mut Block<'_>, finish: &mut dyn FnMut(Sum)) {
    let distance = block.stages - 1;
    (0..distance).for_each(|k| block.bring(k, k));
    let mut d = vec![[[[0.0; 4]; 32]; 16]; WARPS as usize];
    for k in 0..block.count() {
        block.bring(k + distance, (k + distance) % block.stages);
        let slot = k % block.stages;
        for (warp, d) in (0..WARPS).zip(&mut d) {
            let a = block.load_matrices(|lane| {
                block.codes(slot, 0, 0)
                    + layout::piece(warp * 16 + layout::a_row(lane), layout::a_piece(lane))
            });
            let words = |at: u32, row: &dyn Fn(u32) -> u32| -> [u32; 32] {
                std::array::from_fn(|lane| block.word(at + layout::scales(row(lane as u32))))
            };
            let a_scales = words(block.scales(slot, 0, 0), &|lane| warp * 16 + layout::a_scale_row(lane));
            for j in (0..layout::TILE_ROWS).step_by(16).take_while(|&j| (j as usize) < block.rows.len()) {
                let b = block.load_matrices(|lane| {
                    block.codes(slot, 1, 0) + layout::piece(j + layout::b_row(lane), layout::b_piece(lane))
                });
                for i in 0..2 {
                    let b_scales =
                        words(block.scales(slot, 1, 0), &|lane| j + 8 * i + layout::b_scale_row(lane));
                    let i = i as usize;
                    mma(
                        &mut d[j as usize / 8 + i],
                        &a,
                        &b.map(|b| [b[2 * i], b[2 * i + 1]]),
                        &a_scales,
                        &b_scales,
                    );
                }
            }
        }
    }
    for (warp, d) in d.iter().enumerate() {
        for (j, d) in d.iter().enumerate() {
            for (lane, d) in d.iter().enumerate() {
                for i in 0..2 {
                    let token = 8 * j + layout::d_column(lane as u32) as usize + i;
                    if token < block.rows.len() {
                        let (row_tile, pair) = (block.x * 8 + warp, lane / 4);
                        finish(Sum { row_tile, pair, token, a: d[i], b: d[i + 2] });
                    }
                }
            }
        }
    }
}

/// A matrix in shared memory, as a descriptor tells of it.
struct Descriptor {
    start: u32,
    /// From eight rows to the next.
    stride: u32,
    /// Whether 16-byte pieces are exchanged by bit 7 of their address, in rows of 32 bytes; else rows are of 16 bytes.
    swizzled: bool,
}

impl Descriptor {
    fn new(low: u32, high: u32) -> Descriptor {
        let bits = u64::from(high) << 32 | u64::from(low);
        let field = |at: u32, count: u32| (bits >> at) as u32 & ((1 << count) - 1);
        assert_eq!(field(46, 3), 1, "the version");
        assert_eq!((field(49, 3), field(52, 1)), (0, 0), "base offset, mode of the leading dimension");
        let swizzle = field(61, 3);
        assert!(swizzle == 0 || swizzle == 6);
        let start = field(0, 14) << 4;
        assert_eq!(start % if swizzle == 6 { 256 } else { 16 }, 0, "no base offset is needed");
        Descriptor { start, stride: field(32, 14) << 4, swizzled: swizzle == 6 }
    }

    fn address(&self, row: u32, byte: u32) -> u32 {
        let pitch = if self.swizzled { 32 } else { 16 };
        assert!(byte < pitch);
        let address = self.start + row / 8 * self.stride + row % 8 * pitch + byte;
        if self.swizzled { address ^ (address >> 7 & 1) << 4 } else { address }
    }
}

/// Tensor memory: 128 lanes of 32-bit columns. Sums are kept apart, in full precision.
struct TensorMemory {
    words: Vec<[u32; 128]>,
    sums: Vec<[f64; 128]>,
}

impl TensorMemory {
    /// `tcgen05.cp.32x128b.warpx4`: 32 rows of 16 bytes, to each 32 lanes.
    fn copy(&mut self, to: u32, block: &Block<'_>, from: &Descriptor) {
        for row in 0..32 {
            for column in 0..4 {
                let word = block.word(from.address(row, column * 4));
                for part in 0..4 {
                    self.words[(to + column) as usize][(row + 32 * part) as usize] = word;
                }
            }
        }
    }

    /// `tcgen05.mma…block16`: the scales of row r are in lane r % 32 of every part, column r / 32, byte i for inputs 16 i and on.
    fn multiply(
        &mut self,
        block: &Block<'_>,
        (a, b): (&Descriptor, &Descriptor),
        instruction: u32,
        (a_scales, b_scales): (u32, u32),
        add: bool,
    ) {
        let field = |at: u32, count: u32| instruction >> at & ((1 << count) - 1);
        assert_eq!((field(7, 3), field(10, 3)), (1, 1), "both E2M1");
        assert_eq!(
            (field(0, 7), field(13, 4), field(29, 3)),
            (0, 0, 0),
            "dense, none negated or transposed, K 64, first scales"
        );
        assert_eq!(field(23, 1), 0, "scales in E4M3");
        let (rows, tokens) = (field(24, 5) * 16, field(17, 6) * 8);
        assert_eq!(rows, 128, "the only number of rows of one block");
        let operand = |from: &Descriptor, row: u32, scales: u32| -> [f64; 64] {
            let words = &self.words[(scales + row / 32) as usize];
            let word = words[(row % 32) as usize];
            assert!((0..4).all(|part| words[(row % 32 + 32 * part) as usize] == word));
            std::array::from_fn(|k| {
                let byte = block.shared[from.address(row, k as u32 / 2) as usize];
                f64::from(e2m1::decode(byte >> (k % 2 * 4) & 15)) * scale(word, k / 16)
            })
        };
        let left: Vec<_> = (0..rows).map(|row| operand(a, row, a_scales)).collect();
        for token in 0..tokens {
            let right = operand(b, token, b_scales);
            for (row, left) in left.iter().enumerate() {
                let sum: f64 = left.iter().zip(&right).map(|(a, b)| a * b).sum();
                let to = &mut self.sums[token as usize][row];
                *to = if add { *to + sum } else { sum };
            }
        }
    }
}

/// gemm_sm100.cu
fn sm_100(block: &mut Block<'_>, finish: &mut dyn FnMut(Sum)) {
    let columns = layout::TENSOR_COLUMNS as usize;
    let mut memory = TensorMemory { words: vec![[!0; 128]; columns], sums: vec![[f64::NAN; 128]; 128] };
    let distance = block.stages - 1;
    (0..distance).for_each(|k| block.bring(k, k));
    for k in 0..block.count() {
        let slot = k % block.stages;
        for tile in 0..block.tiles(k) {
            let scales = [0, 1].map(|operand| layout::tensor_scales(slot, operand, tile));
            let codes = [0, 1].map(|operand| {
                let low = layout::scales_descriptor_low(block.scales(slot, operand, tile));
                let from = Descriptor::new(low, layout::SCALES_DESCRIPTOR_HIGH);
                memory.copy(scales[operand as usize], block, &from);
                let low = layout::codes_descriptor_low(block.codes(slot, operand, tile));
                Descriptor::new(low, layout::CODES_DESCRIPTOR_HIGH)
            });
            let (a, b) = (&codes[0], &codes[1]);
            memory.multiply(block, (a, b), layout::INSTRUCTION, (scales[0], scales[1]), k + tile > 0);
        }
        block.bring(k + distance, (k + distance) % block.stages);
    }
    for warp in 0..WARPS {
        for part in 0..2 {
            let first = layout::tensor_token(warp) + 32 * part;
            for i in (0..32).step_by(2) {
                // Of each lane: its own sum, and what it sends.
                let value = |lane: u32, which: u32| {
                    memory.sums[(first + i + which) as usize][(layout::tensor_lane(warp) + lane) as usize]
                };
                for lane in 0..32 {
                    let mine = layout::finished(lane);
                    let (own, sender) = (value(lane, mine), layout::partner(lane));
                    let other = value(sender, 1 - layout::finished(sender));
                    let token = (first + i + mine) as usize;
                    if token < block.rows.len() {
                        let row = layout::tensor_lane(warp) + lane;
                        let (a, b) = if mine == 1 { (other, own) } else { (own, other) };
                        let row_tile = block.x * 8 + row as usize / 16;
                        finish(Sum { row_tile, pair: row as usize % 8, token, a, b });
                    }
                }
            }
        }
    }
}
