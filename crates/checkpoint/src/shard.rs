//! One device's share of a model that several run together: some heads of every layer, and some units of every expert.
//!
//! Every share has all norms, routers, the embedding and the output layer. What a layer adds to the residual stream is the sum of
//! what its shares add; the first has the biases of both sums. So a share is a model by itself, of fewer heads and a smaller
//! intermediate size, and who runs it need not know more than when to sum (Shoeybi et al., Megatron-LM, 2019).

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;
use numerics::{mxfp4, nvfp4};

use crate::{
    Config, Error, Format, KvScales, Matrix, MatrixId, MatrixKind, Values, Vector, VectorId, VectorKind,
    Weights,
};

/// Columns are cut at multiples of this: whole blocks of either four-bit format.
const BLOCK: usize = mxfp4::BLOCK;

/// A share of some weights, as a view of them.
pub struct Shard<'a> {
    weights: &'a dyn Weights,
    config: Config,
    rank: usize,
    /// Key/value heads, each with its query heads.
    heads: Range<usize>,
    /// Units of every expert: pairs of a gate and an up row, columns of what comes down.
    units: Range<usize>,
}

impl<'a> Shard<'a> {
    /// Share `rank` of `ranks`. `None` if the model cannot be divided among so many: each has as many key/value heads, whose
    /// queries are whole blocks of 32 numbers, and at least one such block of every expert's units.
    pub fn new(weights: &'a dyn Weights, rank: usize, ranks: usize) -> Option<Shard<'a>> {
        let whole = weights.config();
        let blocks = whole.intermediate_size / BLOCK;
        let divisible = whole.kv_heads.is_multiple_of(ranks)
            && (whole.query_heads * whole.head_dim).is_multiple_of(ranks * BLOCK)
            && blocks >= ranks;
        if rank >= ranks || !divisible {
            return None;
        }
        // The last share has what is no whole block.
        let cut =
            |rank: usize| if rank == ranks { whole.intermediate_size } else { blocks * rank / ranks * BLOCK };
        let units = cut(rank)..cut(rank + 1);
        let heads = whole.kv_heads / ranks;
        let config = Config {
            query_heads: whole.query_heads / ranks,
            kv_heads: heads,
            intermediate_size: units.len(),
            ..whole.clone()
        };
        Some(Shard { weights, config, rank, heads: rank * heads..(rank + 1) * heads, units })
    }

    /// Rows of a projection to `per_head` heads for each key/value head.
    fn head_rows(&self, per_head: usize) -> Range<usize> {
        let rows = per_head * self.config.head_dim;
        self.heads.start * rows..self.heads.end * rows
    }

    fn queries_per_head(&self) -> usize {
        self.config.query_heads / self.config.kv_heads
    }

    fn gate_up_rows(&self) -> Range<usize> {
        2 * self.units.start..2 * self.units.end
    }
}

impl Weights for Shard<'_> {
    fn config(&self) -> &Config {
        &self.config
    }

    fn format(&self, id: MatrixId) -> Format {
        self.weights.format(id)
    }

    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        let whole = self.weights.matrix(id, expert)?;
        Ok(match id.kind {
            MatrixKind::Query => rows_of(whole, self.head_rows(self.queries_per_head())),
            MatrixKind::Key | MatrixKind::Value => rows_of(whole, self.head_rows(1)),
            MatrixKind::Output => columns_of(&whole, self.head_rows(self.queries_per_head())),
            MatrixKind::GateUp => rows_of(whole, self.gate_up_rows()),
            MatrixKind::Down => columns_of(&whole, self.units.clone()),
            MatrixKind::Embedding | MatrixKind::Unembedding | MatrixKind::Router => whole,
        })
    }

    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        let whole = self.weights.vector(id)?;
        let length = id.kind.shape(self.weights.config()).1;
        let of_each = |range: Range<usize>| values_of(&whole, length, range);
        Ok(match id.kind {
            VectorKind::QueryBias => of_each(self.head_rows(self.queries_per_head())),
            VectorKind::KeyBias | VectorKind::ValueBias => of_each(self.head_rows(1)),
            VectorKind::Sinks => {
                let each = self.queries_per_head();
                of_each(self.heads.start * each..self.heads.end * each)
            }
            VectorKind::GateUpBias => of_each(self.gate_up_rows()),
            VectorKind::OutputBias | VectorKind::DownBias if self.rank > 0 => {
                Vector::F32(Cow::Owned(vec![0.0; whole.len()]))
            }
            _ => whole,
        })
    }

    fn input_scale(&self, id: MatrixId) -> Option<f32> {
        self.weights.input_scale(id)
    }

    fn kv_scales(&self, layer: usize) -> Option<KvScales> {
        self.weights.kv_scales(layer)
    }

    fn release(&self, id: MatrixId, expert: usize) {
        self.weights.release(id, expert);
    }
}

/// Some rows of a matrix, where they lie if it is borrowed.
fn rows_of(matrix: Matrix<'_>, rows: Range<usize>) -> Matrix<'_> {
    fn part<T: Clone>(values: Cow<'_, [T]>, each: usize, rows: Range<usize>) -> Cow<'_, [T]> {
        let range = rows.start * each..rows.end * each;
        match values {
            Cow::Borrowed(values) => Cow::Borrowed(&values[range]),
            Cow::Owned(values) => Cow::Owned(values[range].to_vec()),
        }
    }
    let cols = matrix.cols;
    let values = match matrix.values {
        Values::Bf16(values) => Values::Bf16(part(values, cols, rows.clone())),
        Values::Mxfp4 { codes, scales } => Values::Mxfp4 {
            codes: part(codes, cols / 2, rows.clone()),
            scales: part(scales, cols / mxfp4::BLOCK, rows.clone()),
        },
        Values::Nvfp4 { codes, scales, global_scale } => Values::Nvfp4 {
            codes: part(codes, cols / 2, rows.clone()),
            scales: part(scales, cols / nvfp4::BLOCK, rows.clone()),
            global_scale,
        },
    };
    Matrix { rows: rows.len(), cols, values }
}

/// Some columns of a matrix, whole blocks of its format.
fn columns_of<'a>(matrix: &Matrix<'_>, columns: Range<usize>) -> Matrix<'a> {
    let cols = matrix.cols;
    let values = match &matrix.values {
        Values::Bf16(values) => Values::Bf16(every(values, cols, columns.clone()).into()),
        Values::Mxfp4 { codes, scales } => Values::Mxfp4 {
            codes: every(codes, cols / 2, by(&columns, 2)).into(),
            scales: every(scales, cols / mxfp4::BLOCK, by(&columns, mxfp4::BLOCK)).into(),
        },
        Values::Nvfp4 { codes, scales, global_scale } => Values::Nvfp4 {
            codes: every(codes, cols / 2, by(&columns, 2)).into(),
            scales: every(scales, cols / nvfp4::BLOCK, by(&columns, nvfp4::BLOCK)).into(),
            global_scale: *global_scale,
        },
    };
    Matrix { rows: matrix.rows, cols: columns.len(), values }
}

fn by(range: &Range<usize>, count: usize) -> Range<usize> {
    range.start / count..range.end / count
}

/// The same range of every `length` values.
fn every<T: Copy>(values: &[T], length: usize, range: Range<usize>) -> Vec<T> {
    values.chunks_exact(length).flat_map(|row| &row[range.clone()]).copied().collect()
}

fn values_of<'a>(vector: &Vector<'_>, length: usize, range: Range<usize>) -> Vector<'a> {
    match vector {
        Vector::Bf16(values) => Vector::Bf16(every::<bf16>(values, length, range).into()),
        Vector::F32(values) => Vector::F32(every(values, length, range).into()),
    }
}
