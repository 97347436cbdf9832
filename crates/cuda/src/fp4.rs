//! Blackwell's own FP4 products: matrices of W4A4 models, packed a second time as those kernels take them, times activations
//! that are quantized on the way. They are written, compiled and tested by an emulation of the operands' documented layout, but
//! have not yet run on such a chip: nothing uses them before the user asks and [`fp4_self_test`] passes there.

use std::sync::Arc;

use bytemuck::Zeroable;
use checkpoint::{MatrixId, Values, Weights};
use gptoss::Error;
use half::{bf16, f16};
use numerics::nvfp4;

use crate::device::{Buffer, Device};
use crate::driver::Address;
use crate::fp4_layout as layout;
use crate::packed::{Loader, TILE_COLS, TILE_ROWS};
use crate::params::{self, After, BF16, Epilogue, FP4, Fp4Gemm, Quantize, RowOrder};
use crate::self_test::SelfTest;

/// Products of more tokens take these; those of fewer wait for the memory, and keep 16 bits.
pub(crate) const FP4_FROM: usize = 64;

/// Whether the chip has FP4 products, and this build kernels for them.
pub(crate) fn has_fp4(device: &Device) -> bool {
    matches!(device.capability(), 100 | 103 | 120)
}

/// A matrix, several one above the other, or a stack, in tiles of fp4_layout.rs.
pub(crate) struct Fp4Matrix {
    codes: Buffer,
    scales: Buffer,
    /// `[matrices, tiles of 16 rows]`: global scale times input scale.
    tile_scale: Buffer,
    input_scale: f32,
}

/// Matrices one above the other on the host.
pub(crate) struct Tiles {
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<u8>,
    column_tiles: usize,
}

impl Tiles {
    /// Zeros.
    pub(crate) fn new(rows: usize, cols: usize) -> Tiles {
        let column_tiles = cols.div_ceil(TILE_COLS);
        let tiles = rows.div_ceil(layout::TILE_ROWS as usize) * column_tiles;
        Tiles {
            codes: vec![0; tiles * layout::CODE_BYTES as usize],
            scales: vec![0; tiles * layout::SCALE_BYTES as usize],
            column_tiles,
        }
    }

    /// Puts a matrix, codes `[rows, cols / 2]` and scales `[rows, cols / 16]`, from row `first` on.
    pub(crate) fn put(&mut self, first: usize, order: RowOrder, codes: &[u8], scales: &[u8], cols: usize) {
        let place = |row: usize, column_tile: usize| {
            let row_block = (row / layout::TILE_ROWS as usize) as u32;
            let tile = layout::tile(row_block, column_tile as u32, self.column_tiles as u32) as usize;
            (tile, (row % layout::TILE_ROWS as usize) as u32)
        };
        for row in 0..codes.len() / (cols / 2) {
            let stored = stored_row(order, row);
            let codes = &codes[stored * (cols / 2)..][..cols / 2];
            for (i, codes) in codes.chunks(16).enumerate() {
                let (tile, row) = place(first + row, i / 2);
                let at = tile * layout::CODE_BYTES as usize + layout::piece(row, (i % 2) as u32) as usize;
                self.codes[at..at + codes.len()].copy_from_slice(codes);
            }
            let scales = &scales[stored * (cols / 16)..][..cols / 16];
            for (i, scales) in scales.chunks(4).enumerate() {
                let (tile, row) = place(first + row, i);
                let at = tile * layout::SCALE_BYTES as usize + layout::scales(row) as usize;
                self.scales[at..at + scales.len()].copy_from_slice(scales);
            }
        }
    }
}

/// The row of the stored matrix that is a row of the tiles, as in pack.cu.
fn stored_row(order: RowOrder, row: usize) -> usize {
    let (tile, pair, upper) = (row / 16, row % 8, row / 8 % 2);
    match order {
        RowOrder::Plain => row,
        RowOrder::GateUp => tile * 16 + 2 * pair + upper,
        RowOrder::Rotary => tile / 4 * 64 + tile % 4 * 8 + pair + upper * 32,
    }
}

impl Fp4Matrix {
    /// `None` unless all parts are NVFP4 and have the same input scale.
    pub(crate) fn load(
        device: &Arc<Device>,
        loader: &mut Loader<'_>,
        weights: &dyn Weights,
        parts: &[(MatrixId, RowOrder)],
    ) -> Result<Option<Fp4Matrix>, Error> {
        let config = weights.config();
        let Some(input_scale) = weights.input_scale(parts[0].0).filter(|scale| *scale > 0.0) else {
            return Ok(None);
        };
        let fits = |id| {
            weights.format(id) == checkpoint::Format::Nvfp4 && weights.input_scale(id) == Some(input_scale)
        };
        if !parts.iter().all(|&(id, _)| fits(id)) {
            return Ok(None);
        }
        let (matrices, _, cols) = parts[0].0.kind.shape(config);
        let rows: usize = parts.iter().map(|(id, _)| id.kind.shape(config).1).sum();
        let (mut to, mut tile_scale) = (None, Vec::new());
        for expert in 0..matrices {
            let (mut tiles, mut first) = (Tiles::new(rows, cols), 0);
            for &(id, order) in parts {
                let matrix = weights.matrix(id, expert)?;
                let Values::Nvfp4 { codes, scales, global_scale } = &matrix.values else { return Ok(None) };
                tiles.put(first, order, codes, scales, cols);
                tile_scale.extend(vec![global_scale * input_scale; matrix.rows.div_ceil(TILE_ROWS)]);
                first += matrix.rows;
                weights.release(id, expert);
            }
            let (codes, scales) = match &to {
                Some(to) => to,
                None => {
                    let buffer = |bytes: usize| device.buffer(bytes * matrices);
                    to.insert((buffer(tiles.codes.len())?, buffer(tiles.scales.len())?))
                }
            };
            loader.write(codes, expert * tiles.codes.len(), &tiles.codes)?;
            loader.write(scales, expert * tiles.scales.len(), &tiles.scales)?;
        }
        let tile_scale = loader.floats(&tile_scale)?;
        Ok(to.map(|(codes, scales)| Fp4Matrix { codes, scales, tile_scale, input_scale }))
    }
}

/// Quantized activations, for any product of a step.
pub(crate) struct Scratch {
    codes: Buffer,
    scales: Buffer,
}

impl Scratch {
    /// For so many values.
    pub(crate) fn new(device: &Arc<Device>, values: usize) -> Result<Scratch, Error> {
        Ok(Scratch { codes: device.buffer(values / 2)?, scales: device.buffer(values / nvfp4::BLOCK)? })
    }

    /// Quantizes `[n, cols]` values of 16 bits, of this format.
    fn quantize(
        &self,
        device: &Device,
        input: Address,
        (n, cols): (usize, usize),
        format: u32,
        input_scale: f32,
    ) -> Result<(), Error> {
        assert!(n * cols / 2 <= self.codes.bytes() && cols.is_multiple_of(nvfp4::BLOCK));
        let params = Quantize {
            input,
            codes: self.codes.address(),
            scales: self.scales.address(),
            n: n as u32,
            cols: cols as u32,
            format,
            input_scale,
        };
        let grid = [(n * cols / nvfp4::BLOCK).div_ceil(256) as u32, 1, 1];
        // SAFETY: the caller's input has these values, the scratch room for as many.
        unsafe { device.launch("quantize", grid, 256, 0, &params) }
    }
}

/// How tokens are spread among experts: the router's list, which is of `tokens`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Groups {
    pub(crate) list: Address,
    pub(crate) tokens: usize,
    pub(crate) experts: usize,
    pub(crate) experts_per_token: usize,
}

/// Quantizes `n` rows of FP16 activations and multiplies them. With `groups`, the rows are the tokens before SwiGLU, and the
/// slots otherwise; `matrix` is the same matrix as other kernels take it.
pub(crate) fn multiply(
    device: &Device,
    scratch: &Scratch,
    fp4: &Fp4Matrix,
    matrix: params::Matrix,
    (input, n): (Address, usize),
    groups: Option<Groups>,
    epilogue: Epilogue,
) -> Result<(), Error> {
    scratch.quantize(device, input, (n, matrix.cols as usize), FP4, fp4.input_scale)?;
    let mut params = Fp4Gemm {
        matrix: params::Matrix {
            weights: fp4.codes.address(),
            scales: fp4.scales.address(),
            tile_scale: fp4.tile_scale.address(),
            ..matrix
        },
        input: scratch.codes.address(),
        input_scales: scratch.scales.address(),
        epilogue,
        n: n as u32,
        ..Zeroable::zeroed()
    };
    let tile = layout::TILE_ROWS as usize;
    let (name, token_tiles) = match groups {
        None => ("fp4_gemm", n.div_ceil(tile)),
        Some(groups) => {
            params.list = groups.list;
            params.n = groups.tokens as u32;
            params.experts = groups.experts as u32;
            params.experts_per_token = groups.experts_per_token as u32;
            // Each expert may have one tile that is not full.
            let pairs = groups.tokens * groups.experts_per_token;
            ("fp4_gemm_experts", pairs / tile + groups.experts.min(pairs))
        }
    };
    let (stages, tiles) = match device.capability() {
        120 => (layout::SM120_STAGES, layout::SM120_TILES),
        _ => (layout::SM100_STAGES, layout::SM100_TILES),
    };
    // Room to align the stages to 1024 bytes.
    let shared = (stages * layout::stage_bytes(tiles)) as usize + 1024;
    let grid = [(matrix.rows as usize).div_ceil(tile) as u32, token_tiles as u32, 1];
    // SAFETY: input and outputs have these rows; the slots of the experts are those of the list.
    unsafe { device.launch(name, grid, layout::THREADS, shared, &params) }
}

/// Quantizes BF16 activations on the device as the FP4 products do: codes, two to a byte, and the scale of each 16. Runs on
/// every generation.
pub fn quantize_activations(
    device: &Arc<Device>,
    values: &[bf16],
    input_scale: f32,
) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let (scratch, input) =
        (Scratch::new(device, values.len())?, upload(device, bytemuck::cast_slice(values))?);
    scratch.quantize(device, input.address(), (1, values.len()), BF16, input_scale)?;
    Ok((
        download(device, &scratch.codes, values.len() / 2)?,
        download(device, &scratch.scales, values.len() / nvfp4::BLOCK)?,
    ))
}

fn upload(device: &Arc<Device>, bytes: &[u8]) -> Result<Buffer, Error> {
    let (buffer, mut host) = (device.buffer(bytes.len())?, device.pinned(bytes.len())?);
    host.slice_mut().copy_from_slice(bytes);
    buffer.upload(0, &host, bytes.len())?;
    device.synchronize()?;
    Ok(buffer)
}

fn download<T: bytemuck::Pod>(device: &Arc<Device>, buffer: &Buffer, count: usize) -> Result<Vec<T>, Error> {
    let mut host = device.pinned(count * size_of::<T>())?;
    buffer.download(0, &mut host, count * size_of::<T>())?;
    device.synchronize()?;
    Ok(host.slice::<T>().to_vec())
}

/// The largest relative error of products that the order of their sums explains. A scale or a code in a wrong place is far
/// above.
const LIMIT: f64 = 1e-3;

/// Products of every kind with the device's FP4 kernels, compared with sums in f64. Empty where there are none: they are
/// Blackwell's.
pub fn fp4_self_test(device: &Arc<Device>) -> Result<Vec<SelfTest>, Error> {
    if !has_fp4(device) {
        return Ok(Vec::new());
    }
    let test = |kernel, experts, after| -> Result<SelfTest, Error> {
        let error = Case::new(experts).error(device, after)?;
        Ok(SelfTest { kernel, format: "w4a4", error, passed: error <= LIMIT })
    };
    Ok(vec![
        test("fp4 product", false, After::Store)?,
        test("fp4 gate, up", true, After::Swiglu)?,
        test("fp4 down", true, After::Store)?,
    ])
}

/// Made-up operands: widths and heights that are no whole tiles, experts with none, few and more than a tile of tokens.
pub(crate) struct Case {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) experts: usize,
    pub(crate) experts_per_token: usize,
    pub(crate) tokens: usize,
    /// `[experts, rows, cols]`
    codes: Vec<u8>,
    scales: Vec<u8>,
    /// `[slots, cols]`, of which a product of tokens takes the first.
    pub(crate) input: Vec<f16>,
    pub(crate) routes: Routes,
}

const GLOBAL_SCALE: f32 = 0.001;
pub(crate) const INPUT_SCALE: f32 = 0.0015;

impl Case {
    pub(crate) fn new(grouped: bool) -> Case {
        // More stages than there are slots, the last one not full.
        let (rows, cols, tokens) = (208, 1120, 150);
        let (experts, experts_per_token) = if grouped { (5, 2) } else { (1, 1) };
        // The upper bits of a linear congruential generator.
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as u32
        };
        let codes = (0..experts * rows * cols / 2).map(|_| random() as u8).collect();
        // Scales around 1: sums are then dominated by no single block.
        let scales = (0..experts * rows * cols / 16).map(|_| (0x30 + random() % 16) as u8).collect();
        let pairs = tokens * experts_per_token;
        // Nine of ten tokens go to expert 1 first, some to 2 and 4, none to 0.
        let choose =
            |token: usize| [if token % 10 < 9 { 1 } else { 2 }, if token.is_multiple_of(3) { 4 } else { 3 }];
        let expert_of = (0..pairs)
            .map(|pair| if grouped { choose(pair / experts_per_token)[pair % experts_per_token] } else { 0 });
        let routes = Routes::new(&expert_of.collect::<Vec<usize>>(), experts);
        let value = |v: u32| f16::from_f32((v % 4001) as f32 / 1000.0 - 2.0);
        let input = (0..routes.slots.len() * cols).map(|_| value(random())).collect();
        Case { rows, cols, experts, experts_per_token, tokens, codes, scales, input, routes }
    }

    /// Root mean square of the difference from the right products, relative to theirs.
    fn error(&self, device: &Arc<Device>, after: After) -> Result<f64, Error> {
        let padded = self.cols.next_multiple_of(TILE_COLS);
        let gathered = after == After::Swiglu;
        let slots = self.routes.slots.len();
        let n = if gathered { self.tokens } else { slots };
        let mut input = vec![f16::ZERO; n * padded];
        for (to, from) in input.chunks_exact_mut(padded).zip(self.input.chunks_exact(self.cols)) {
            to[..self.cols].copy_from_slice(from);
        }
        let order = if gathered { RowOrder::GateUp } else { RowOrder::Plain };
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for expert in 0..self.experts {
            let mut tiles = Tiles::new(self.rows, self.cols);
            let (c, s) = self.expert(expert);
            tiles.put(0, order, c, s, self.cols);
            codes.extend(tiles.codes);
            scales.extend(tiles.scales);
        }
        let tile_scale = vec![GLOBAL_SCALE * INPUT_SCALE; self.experts * self.rows.div_ceil(TILE_ROWS)];
        let matrix = Fp4Matrix {
            codes: upload(device, &codes)?,
            scales: upload(device, &scales)?,
            tile_scale: upload(device, bytemuck::cast_slice(&tile_scale))?,
            input_scale: INPUT_SCALE,
        };
        let bias: Vec<f32> = (0..self.experts * self.rows).map(|i| (i % 7) as f32 * 0.1).collect();
        let (input_buffer, bias_buffer) =
            (upload(device, bytemuck::cast_slice(&input))?, upload(device, bytemuck::cast_slice(&bias))?);
        let list = upload(device, bytemuck::cast_slice(&self.routes.words()))?;
        let out = device.buffer(slots * self.rows * 4)?;
        let scratch = Scratch::new(device, n * padded)?;
        let shape = params::Matrix {
            bias: bias_buffer.address(),
            rows: self.rows as u32,
            cols: padded as u32,
            ..Zeroable::zeroed()
        };
        let epilogue = Epilogue {
            out: out.address(),
            out16: out.address(),
            out_cols: (self.rows / 2) as u32,
            out_format: FP4,
            kind: after as u32,
            limit: 7.0,
            alpha: 1.702,
            ..Zeroable::zeroed()
        };
        let groups = (self.experts > 1).then_some(Groups {
            list: list.address(),
            tokens: self.tokens,
            experts: self.experts,
            experts_per_token: self.experts_per_token,
        });
        multiply(device, &scratch, &matrix, shape, (input_buffer.address(), n), groups, epilogue)?;
        let (mut square, mut difference) = (0.0, 0.0);
        let found32: Vec<f32> = download(device, &out, slots * self.rows)?;
        let found16: &[f16] = bytemuck::cast_slice(&found32);
        for slot in 0..slots {
            let Some((expert, row)) = self.slot(slot, gathered) else { continue };
            let mut x = vec![0.0; self.cols];
            let values: Vec<f32> =
                self.input[row * self.cols..][..self.cols].iter().map(|v| v.to_f32()).collect();
            nvfp4::fake_quantize_activations(&values, INPUT_SCALE, &mut x);
            let product = |r: usize| {
                let (codes, scales) = self.expert(expert);
                let mut w = vec![0.0; self.cols];
                let (codes, scales) = (&codes[r * self.cols / 2..], &scales[r * self.cols / 16..]);
                nvfp4::dequantize(&codes[..self.cols / 2], &scales[..self.cols / 16], GLOBAL_SCALE, &mut w);
                let sum: f64 = w.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                sum + f64::from(bias[expert * self.rows + r])
            };
            let mut compare = |found: f64, expected: f64| {
                square += expected * expected;
                difference += (found - expected) * (found - expected);
            };
            if gathered {
                for unit in 0..self.rows / 2 {
                    let (gate, up) = (product(2 * unit).min(7.0), product(2 * unit + 1).clamp(-7.0, 7.0));
                    // Rounded as the kernel rounds, so that FP16 does not count as an error.
                    let expected = f16::from_f64((up + 1.0) * gate / (1.0 + (-1.702 * gate).exp()));
                    compare(found16[slot * (self.rows / 2) + unit].to_f64(), expected.to_f64());
                }
            } else {
                (0..self.rows).for_each(|r| compare(found32[slot * self.rows + r].into(), product(r)));
            }
        }
        // Not a number is not small.
        let error = (difference / square).sqrt();
        Ok(if error.is_nan() { f64::INFINITY } else { error })
    }

    /// Codes and scales of one expert.
    pub(crate) fn expert(&self, expert: usize) -> (&[u8], &[u8]) {
        let values = self.rows * self.cols;
        (
            &self.codes[expert * values / 2..][..values / 2],
            &self.scales[expert * values / 16..][..values / 16],
        )
    }

    /// The expert of a slot, and the row of the input: its token's where those are gathered. `None` where the slot is empty.
    pub(crate) fn slot(&self, slot: usize, gathered: bool) -> Option<(usize, usize)> {
        let pair = self.routes.slots[slot]?;
        let expert = (0..self.experts).rfind(|&e| self.routes.firsts[e] <= slot)?;
        Some((expert, if gathered { pair / self.experts_per_token } else { slot }))
    }
}

/// What the router finds: see epilogue.cuh.
pub(crate) struct Routes {
    pub(crate) active: Vec<usize>,
    /// The first slot of each expert, a multiple of eight.
    pub(crate) firsts: Vec<usize>,
    pub(crate) counts: Vec<usize>,
    /// The pair of each slot, and none in those that fill up the eight.
    pub(crate) slots: Vec<Option<usize>>,
}

impl Routes {
    fn new(expert_of: &[usize], experts: usize) -> Routes {
        let mut routes =
            Routes { active: Vec::new(), firsts: Vec::new(), counts: Vec::new(), slots: Vec::new() };
        for expert in 0..experts {
            let first = routes.slots.len();
            routes.slots.extend((0..expert_of.len()).filter(|&pair| expert_of[pair] == expert).map(Some));
            let count = routes.slots.len() - first;
            if count > 0 {
                routes.active.push(expert);
            }
            routes.firsts.push(first);
            routes.counts.push(count);
            routes.slots.resize((first + count).next_multiple_of(8), None);
        }
        routes
    }

    /// As the products read them; what only others read is left out.
    fn words(&self) -> Vec<u32> {
        let mut words = vec![self.active.len()];
        words.extend(&self.active);
        words.resize(1 + self.firsts.len(), 0);
        words.extend(&self.firsts);
        words.push(self.slots.len());
        words.extend(&self.counts);
        words.extend(self.slots.iter().map(|pair| pair.unwrap_or(usize::MAX)));
        words.into_iter().map(|word| word as u32).collect()
    }
}
