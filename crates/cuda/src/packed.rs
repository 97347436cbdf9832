//! Weights on the device: matrices as they are stored, streamed through page-locked memory, packed into tiles on arrival.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use checkpoint::{Format, KvScales, Matrix, MatrixId, MatrixKind, Values, VectorId, Weights};
use gptoss::Error;

use crate::device::{Buffer, Device, Event, Pinned};
use crate::driver::Address;
use crate::fp4::Fp4Matrix;
use crate::params::{self, BF16, FP4, Pack, RowOrder};

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Columns of a tile.
pub(crate) const TILE_COLS: usize = 64;

/// Bytes of one of the two staging areas.
const STAGE: usize = 32 << 20;
/// Threads that copy to a staging area, at most, and the least that each copies.
const COPIERS: usize = 8;
const COPY: usize = 1 << 20;
/// Chunks are whole heads, so that rows that rotate together come together.
const CHUNK_ROWS: usize = 64;

/// Bytes of a tile's weights, and of their block scales.
pub(crate) fn tile_bytes(format: u32) -> (usize, usize) {
    const WEIGHTS: usize = TILE_ROWS * TILE_COLS;
    if format == FP4 { (WEIGHTS / 2, WEIGHTS / 16) } else { (2 * WEIGHTS, 0) }
}

/// A matrix, several matrices one above the other, or a stack of one per expert, packed as common.cuh describes.
pub(crate) struct PackedMatrix {
    weights: Buffer,
    scales: Option<Buffer>,
    tile_scale: Option<Buffer>,
    bias: Option<Buffer>,
    matrices: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// The same once more, for the generation's own FP4 products.
    pub(crate) fp4: Option<Fp4Matrix>,
}

impl PackedMatrix {
    /// `BF16` or `FP4`: also the type of the activations that it is multiplied with.
    pub(crate) fn format(&self) -> u32 {
        if self.scales.is_some() { FP4 } else { BF16 }
    }

    /// Columns, padded to whole tiles.
    pub(crate) fn padded_cols(&self) -> usize {
        self.cols.next_multiple_of(TILE_COLS)
    }

    /// Tiles of rows of one matrix.
    pub(crate) fn row_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Bytes of one matrix, scales included.
    pub(crate) fn matrix_bytes(&self) -> usize {
        (self.weights.bytes() + self.scales.as_ref().map_or(0, Buffer::bytes)) / self.matrices
    }

    /// Bytes of the weights of all matrices, scales left out.
    pub(crate) fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// As the kernels take it.
    pub(crate) fn params(&self) -> params::Matrix {
        params::Matrix {
            weights: self.weights.address(),
            scales: address(self.scales.as_ref()),
            tile_scale: address(self.tile_scale.as_ref()),
            bias: address(self.bias.as_ref()),
            rows: self.rows as u32,
            cols: self.padded_cols() as u32,
        }
    }
}

impl params::Matrix {
    /// What its weights are.
    pub(crate) fn format(&self) -> u32 {
        if self.tile_scale == 0 { BF16 } else { FP4 }
    }

    /// Tiles of rows.
    pub(crate) fn row_tiles(&self) -> usize {
        (self.rows as usize).div_ceil(TILE_ROWS)
    }

    /// Tiles of columns.
    pub(crate) fn col_tiles(&self) -> usize {
        self.cols as usize / TILE_COLS
    }

    /// Bytes of the weights and their scales.
    pub(crate) fn bytes(&self) -> usize {
        let (weights, scales) = tile_bytes(self.format());
        self.row_tiles() * self.col_tiles() * (weights + scales)
    }

    /// Some of its row tiles.
    pub(crate) fn rows_of(self, tiles: Range<usize>) -> params::Matrix {
        let (weights, scales) = tile_bytes(self.format());
        let before = tiles.start * self.col_tiles();
        let first = tiles.start * TILE_ROWS;
        let end = (self.rows as usize).min(tiles.end * TILE_ROWS);
        // What is not there has no address.
        let behind = |from: Address, bytes: usize| if from == 0 { 0 } else { from + bytes as u64 };
        params::Matrix {
            weights: behind(self.weights, before * weights),
            scales: behind(self.scales, before * scales),
            tile_scale: behind(self.tile_scale, 4 * tiles.start),
            bias: behind(self.bias, 4 * first),
            rows: (end - first) as u32,
            cols: self.cols,
        }
    }
}

fn address(buffer: Option<&Buffer>) -> Address {
    buffer.map_or(0, Buffer::address)
}

/// A table that is looked up row by row, as it is stored.
pub(crate) struct Table {
    pub(crate) values: Buffer,
    pub(crate) scales: Option<Buffer>,
    /// Inputs per scale; 0 without.
    pub(crate) block: u32,
    pub(crate) global_scale: f32,
}

/// Brings weights to the device.
pub(crate) struct Loader<'a> {
    device: Arc<Device>,
    weights: &'a dyn Weights,
    stages: [Stage; 2],
    turn: usize,
}

/// A staging area on both sides, and when it is free again.
struct Stage {
    host: Pinned,
    device: Buffer,
    free: Event,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(device: &Arc<Device>, weights: &'a dyn Weights) -> Result<Loader<'a>, Error> {
        let stage = || -> Result<Stage, Error> {
            let free = device.event()?;
            device.record(&free)?;
            Ok(Stage { host: device.pinned(STAGE)?, device: device.buffer(STAGE)?, free })
        };
        Ok(Loader { device: Arc::clone(device), weights, stages: [stage()?, stage()?], turn: 0 })
    }

    /// The scales of a layer's keys and values in E4M3: 1 where the checkpoint has none.
    pub(crate) fn kv_scales(&self, layer: usize) -> Result<KvScales, Error> {
        let scales = self.weights.kv_scales(layer).unwrap_or(KvScales { key: 1.0, value: 1.0 });
        let valid = |scale: f32| scale.is_finite() && scale > 0.0;
        if valid(scales.key) && valid(scales.value) {
            return Ok(scales);
        }
        Err(Error::Unsupported(format!(
            "the scales of keys and values of layer {layer} must be above 0, found {} and {}",
            scales.key, scales.value
        )))
    }

    /// A vector in f32.
    pub(crate) fn vector(&mut self, id: VectorId) -> Result<Buffer, Error> {
        self.floats(&self.weights.vector(id)?.to_f32())
    }

    /// Numbers of the host.
    pub(crate) fn floats(&mut self, values: &[f32]) -> Result<Buffer, Error> {
        self.bytes(bytemuck::cast_slice(values))
    }

    /// A matrix in BF16, row by row.
    pub(crate) fn rows(&mut self, id: MatrixId) -> Result<Buffer, Error> {
        match self.weights.matrix(id, 0)?.values {
            Values::Bf16(values) => self.bytes(bytemuck::cast_slice(&values)),
            _ => {
                let format = self.weights.format(id).name();
                Err(unsupported(
                    id,
                    &format!("expected BF16, the only format that runs on the GPU, found {format}"),
                ))
            }
        }
    }

    /// A table as it is stored.
    pub(crate) fn table(&mut self, id: MatrixId) -> Result<Table, Error> {
        Ok(match self.weights.matrix(id, 0)?.values {
            Values::Bf16(values) => Table {
                values: self.bytes(bytemuck::cast_slice(&values))?,
                scales: None,
                block: 0,
                global_scale: 1.0,
            },
            Values::Mxfp4 { codes, scales } => Table {
                values: self.bytes(&codes)?,
                scales: Some(self.bytes(&scales)?),
                block: 32,
                global_scale: 1.0,
            },
            Values::Nvfp4 { codes, scales, global_scale } => Table {
                values: self.bytes(&codes)?,
                scales: Some(self.bytes(&scales)?),
                block: 16,
                global_scale,
            },
        })
    }

    /// Matrices of equal width one above the other, or the stack of a layer's experts. `parts` come with their order of rows
    /// and, for the bias, a vector.
    pub(crate) fn matrix(
        &mut self,
        parts: &[(MatrixId, RowOrder, Option<VectorId>)],
    ) -> Result<PackedMatrix, Error> {
        let config = self.weights.config().clone();
        let (matrices, _, cols) = parts[0].0.kind.shape(&config);
        let rows: usize = parts.iter().map(|(id, ..)| id.kind.shape(&config).1).sum();
        let format = self.weights.format(parts[0].0);
        if let Some((id, ..)) = parts.iter().find(|(id, ..)| self.weights.format(*id) != format) {
            let (first, other) = (format.name(), self.weights.format(*id).name());
            return Err(unsupported(
                *id,
                &format!("query, key and value must have one format on the GPU, found {first} and {other}"),
            ));
        }
        let row_tiles = rows.div_ceil(TILE_ROWS);
        let tiles = matrices * row_tiles * cols.div_ceil(TILE_COLS);
        let four_bits = format != Format::Bf16;
        let mut bias = Vec::new();
        for (_, _, vector) in parts {
            if let Some(id) = vector {
                bias.extend(self.weights.vector(*id)?.to_f32());
            }
        }
        let (weight_bytes, scale_bytes) = tile_bytes(if four_bits { FP4 } else { BF16 });
        let mut packed = PackedMatrix {
            weights: self.device.buffer(tiles * weight_bytes)?,
            scales: if four_bits { Some(self.device.buffer(tiles * scale_bytes)?) } else { None },
            tile_scale: None,
            bias: if bias.is_empty() { None } else { Some(self.floats(&bias)?) },
            matrices,
            rows,
            cols,
            fp4: None,
        };
        let mut tile_scale = vec![0.0; matrices * row_tiles];
        // Weights that are transposed, quantized or made up when they are asked for: several at a time, and the next ones while
        // these are packed.
        let together = std::thread::available_parallelism().map_or(1, |n| n.get().min(16));
        let mut pieces = Vec::new();
        for first in (0..matrices).step_by(together) {
            let mut tile = 0;
            for &(id, order, _) in parts {
                pieces.push((id, order, tile, first..matrices.min(first + together)));
                tile += id.kind.shape(&config).1.div_ceil(TILE_ROWS);
            }
        }
        let weights = self.weights;
        std::thread::scope(|scope| -> Result<(), Error> {
            let ask = |(id, _, _, experts): &(MatrixId, RowOrder, usize, Range<usize>)| {
                let id = *id;
                let threads = experts.clone().map(|expert| scope.spawn(move || weights.matrix(id, expert)));
                threads.collect::<Vec<_>>()
            };
            let mut next = pieces.first().map(ask);
            for (i, (id, order, tile, experts)) in pieces.iter().enumerate() {
                let asked = std::mem::replace(&mut next, pieces.get(i + 1).map(ask));
                for (expert, thread) in experts.clone().zip(asked.into_iter().flatten()) {
                    let matrix = thread.join().expect("reading weights does not panic")?;
                    let at = expert * row_tiles + tile;
                    let scale = self.pack(*id, &matrix, *order, &packed, at)?;
                    let count = id.kind.shape(&config).1.div_ceil(TILE_ROWS);
                    tile_scale[at..at + count].fill(scale);
                    weights.release(*id, expert);
                }
            }
            Ok(())
        })?;
        if four_bits {
            packed.tile_scale = Some(self.floats(&tile_scale)?);
        }
        Ok(packed)
    }

    /// Packs one matrix to the tiles from row tile `first_tile` on; the result is the factor of its products.
    fn pack(
        &mut self,
        id: MatrixId,
        matrix: &Matrix<'_>,
        order: RowOrder,
        to: &PackedMatrix,
        first_tile: usize,
    ) -> Result<f32, Error> {
        let (values, scales, block): (&[u8], &[u8], usize) = match &matrix.values {
            Values::Bf16(values) => (bytemuck::cast_slice(values), &[], 0),
            Values::Mxfp4 { codes, scales } => (codes, scales, 32),
            Values::Nvfp4 { codes, scales, .. } => (codes, scales, 16),
        };
        let (reference, factor) = match &matrix.values {
            Values::Bf16(_) => (0, 1.0),
            // The scale is packed times 2^7, the codes read as 2^-14 of their value.
            Values::Nvfp4 { global_scale, .. } => (0, global_scale * 128.0),
            Values::Mxfp4 { codes, scales } => {
                let largest = largest_exponent(codes, scales)
                    .ok_or_else(|| unsupported(id, "its scales span more than 2^24, more than FP16 holds"))?;
                // The largest scale is packed as 2^15.
                (u32::from(largest), 2f64.powi(i32::from(largest) - 128) as f32)
            }
        };
        let row_values = values.len() / matrix.rows;
        let row_scales = scales.len() / matrix.rows;
        let column_tiles = matrix.cols.div_ceil(TILE_COLS);
        let chunk = (STAGE / (row_values + row_scales + 1) / CHUNK_ROWS * CHUNK_ROWS)
            .min(matrix.rows.next_multiple_of(CHUNK_ROWS));
        if chunk == 0 {
            let bytes = row_values + row_scales;
            return Err(unsupported(id, &format!("a row of {bytes} bytes, of which at most {STAGE} fit")));
        }
        for first in (0..matrix.rows).step_by(chunk) {
            let rows = chunk.min(matrix.rows - first);
            let values = &values[first * row_values..][..rows * row_values];
            let scales = &scales[first * row_scales..][..rows * row_scales];
            let stage = &mut self.stages[self.turn];
            self.turn ^= 1;
            self.device.wait(&stage.free)?;
            let host = stage.host.slice_mut::<u8>();
            let (to_values, to_scales) = host.split_at_mut(values.len());
            copy(to_values, values);
            copy(&mut to_scales[..scales.len()], scales);
            stage.device.upload(0, &stage.host, values.len() + scales.len())?;
            let tile = (first_tile + first / TILE_ROWS) * column_tiles;
            let (weight_bytes, scale_bytes) = tile_bytes(to.format());
            let params = Pack {
                values: stage.device.address(),
                scales: stage.device.address() + values.len() as u64,
                weights: to.weights.address() + (tile * weight_bytes) as u64,
                packed_scales: to.scales.as_ref().map_or(0, |s| s.address() + (tile * scale_bytes) as u64),
                rows: rows as u32,
                cols: matrix.cols as u32,
                order: order as u32,
                block: block as u32,
                reference,
                padding: 0,
            };
            let lanes = rows.div_ceil(TILE_ROWS) * column_tiles * 32;
            let name = if to.format() == FP4 { "pack_fp4" } else { "pack_bf16" };
            // SAFETY: the tiles of these rows lie in `to`, the rows in the stage.
            unsafe { self.device.launch(name, [lanes.div_ceil(256) as u32, 1, 1], 256, 0, &params)? };
            self.device.record(&stage.free)?;
        }
        Ok(factor)
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<Buffer, Error> {
        let buffer = self.device.buffer(bytes.len())?;
        self.write(&buffer, 0, bytes)?;
        Ok(buffer)
    }

    /// Bytes of the host to `offset` of a buffer.
    pub(crate) fn write(&mut self, buffer: &Buffer, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        for (i, part) in bytes.chunks(STAGE).enumerate() {
            let stage = &mut self.stages[self.turn];
            self.turn ^= 1;
            self.device.wait(&stage.free)?;
            copy(&mut stage.host.slice_mut()[..part.len()], part);
            buffer.upload(offset + i * STAGE, &stage.host, part.len())?;
            self.device.record(&stage.free)?;
        }
        Ok(())
    }
}

impl Drop for Loader<'_> {
    fn drop(&mut self) {
        // The stages must outlive their copies; an error here shows again in the first step.
        let _ = self.device.synchronize();
    }
}

/// Copies with as many threads as that is worth: one fetches pages of a file much more slowly than the bus takes them.
fn copy(to: &mut [u8], from: &[u8]) {
    let most = std::thread::available_parallelism().map_or(1, usize::from).min(COPIERS);
    let part = from.len().div_ceil(most).max(COPY);
    if part >= from.len() {
        return to.copy_from_slice(from);
    }
    std::thread::scope(|scope| {
        for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
            scope.spawn(move || to.copy_from_slice(from));
        }
    });
}

/// The largest E8M0 byte, if no scale is smaller than its 2^-24th. Blocks of zeros do not count.
fn largest_exponent(codes: &[u8], scales: &[u8]) -> Option<u8> {
    let largest = scales.iter().copied().max()?;
    let smallest = scales.iter().copied().min()?;
    if largest - smallest <= 24 {
        return Some(largest);
    }
    let used = || {
        codes.chunks_exact(16).zip(scales).filter(|(c, _)| c.iter().any(|b| b & 0x77 != 0)).map(|(_, &s)| s)
    };
    let (largest, smallest) = (used().max().unwrap_or(largest), used().min().unwrap_or(largest));
    (largest - smallest <= 24).then_some(largest)
}

fn unsupported(id: MatrixId, why: &str) -> Error {
    let place = if matches!(id.kind, MatrixKind::Embedding | MatrixKind::Unembedding) {
        Cow::Borrowed("")
    } else {
        Cow::Owned(format!(" of layer {}", id.layer))
    };
    Error::Unsupported(format!("{:?}{place}: {why}", id.kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_of_exponents_leaves_zero_blocks_out() {
        let codes = [[0x11u8; 16], [0x80; 16], [0x01; 16]].concat();
        assert_eq!(largest_exponent(&codes, &[120, 0, 100]), Some(120));
        assert_eq!(largest_exponent(&codes, &[120, 0, 96]), Some(120));
        assert_eq!(largest_exponent(&codes, &[121, 0, 96]), None);
        assert_eq!(largest_exponent(&codes, &[121, 250, 110]), Some(121));
    }
}
