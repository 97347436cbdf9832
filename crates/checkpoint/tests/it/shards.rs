//! The shares of a model together are the model.

use checkpoint::*;

use crate::odd_config;

/// Made-up weights with attention and experts in this format; 160 units are five blocks.
fn weights(format: Format) -> Synthetic {
    let pick = move |id: MatrixId| match id.kind {
        MatrixKind::Embedding | MatrixKind::Router | MatrixKind::Unembedding => Format::Bf16,
        _ => format,
    };
    Synthetic::new(Config { head_dim: 32, ..odd_config() }, pick, 7)
}

/// The rows, or the columns, of all shares one after the other.
fn together(parts: &[Matrix<'_>], by_columns: bool) -> Vec<f32> {
    let all: Vec<Vec<f32>> = parts.iter().map(Matrix::to_f32).collect();
    if !by_columns {
        return all.concat();
    }
    let row = |r: usize| parts.iter().zip(&all).flat_map(move |(m, v)| &v[r * m.cols..(r + 1) * m.cols]);
    (0..parts[0].rows).flat_map(row).copied().collect()
}

#[test]
fn shares_put_together_are_the_matrices() {
    for weights in [Format::Bf16, Format::Mxfp4, Format::Nvfp4].map(weights) {
        let shards = [0, 1].map(|rank| Shard::new(&weights, rank, 2).unwrap());
        assert_eq!(shards.each_ref().map(|s| s.config().intermediate_size), [64, 96]);
        for id in matrices(weights.config()) {
            for expert in 0..id.kind.shape(weights.config()).0 {
                let whole = weights.matrix(id, expert).unwrap();
                let parts = shards.each_ref().map(|shard| {
                    let part = shard.matrix(id, expert).unwrap();
                    assert_eq!(
                        (part.rows, part.cols),
                        (id.kind.shape(shard.config()).1, id.kind.shape(shard.config()).2)
                    );
                    assert_eq!(part.values.format(), shard.format(id), "{id:?}");
                    part
                });
                match id.kind {
                    MatrixKind::Embedding | MatrixKind::Unembedding | MatrixKind::Router => {
                        assert!(parts.iter().all(|part| *part == whole), "{id:?}");
                    }
                    kind => {
                        let by_columns = matches!(kind, MatrixKind::Output | MatrixKind::Down);
                        assert_eq!(together(&parts, by_columns), whole.to_f32(), "{id:?} {expert}");
                    }
                }
            }
        }
    }
}

#[test]
fn shares_put_together_are_the_vectors() {
    let weights = weights(Format::Mxfp4);
    let shards = [0, 1].map(|rank| Shard::new(&weights, rank, 2).unwrap());
    for id in vectors(weights.config()) {
        let whole = weights.vector(id).unwrap().to_f32();
        let parts = shards.each_ref().map(|shard| {
            let (count, length) = id.kind.shape(shard.config());
            let part = shard.vector(id).unwrap().to_f32();
            assert_eq!(part.len(), count * length, "{id:?}");
            part
        });
        match id.kind {
            VectorKind::OutputBias | VectorKind::DownBias => {
                assert_eq!(parts[0], whole);
                assert!(parts[1].iter().all(|&v| v == 0.0), "a bias is added once");
            }
            VectorKind::QueryBias | VectorKind::KeyBias | VectorKind::ValueBias | VectorKind::Sinks => {
                assert_eq!(parts.concat(), whole, "{id:?}");
            }
            VectorKind::GateUpBias => {
                let rows = whole.chunks_exact(320).enumerate();
                for (expert, row) in rows {
                    let (first, second) =
                        (&parts[0][expert * 128..][..128], &parts[1][expert * 192..][..192]);
                    assert_eq!([first, second].concat(), row);
                }
            }
            _ => assert!(parts.iter().all(|part| *part == whole), "{id:?}"),
        }
    }
}

#[test]
fn what_cannot_be_divided_is_not() {
    let whole = weights(Format::Nvfp4);
    assert!(Shard::new(&whole, 0, 3).is_none(), "two key/value heads");
    assert!(Shard::new(&whole, 2, 2).is_none(), "ranks are 0 and 1");
    let cannot = |config: Config| Shard::new(&Synthetic::new(config, |_| Format::Bf16, 7), 0, 2).is_none();
    assert!(cannot(Config { intermediate_size: 32, ..whole.config().clone() }), "one block of units");
    assert!(cannot(Config { head_dim: 24, ..whole.config().clone() }), "72 columns are no whole blocks");
}
