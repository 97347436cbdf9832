//! Model folders as they are met in the world: golden exports, round trips, and files that lie.
// The lint's exception for tests does not reach helper functions.
#![allow(clippy::unwrap_used)]

mod compared;
mod configs;
mod goldens;
mod hostile;
mod shards;
mod written;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use checkpoint::*;

/// A path below `testdata/`.
fn testdata(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata")).join(path)
}

fn open(path: &str) -> Checkpoint {
    Checkpoint::open(&testdata(path)).unwrap()
}

/// Writes without being interrupted.
fn write_all(weights: &dyn Weights, target: &Target, out: &Path) -> Result<Written, Error> {
    write(weights, target, out, &mut |_| ControlFlow::Continue(()))
}

/// A shape without two equal dimensions and without powers of two, of a few hundred kilobytes.
fn odd_config() -> Config {
    Config {
        hidden_size: 96,
        intermediate_size: 160,
        query_heads: 6,
        kv_heads: 2,
        head_dim: 24,
        experts: 5,
        experts_per_token: 3,
        vocab_size: 77,
        layer_kinds: vec![LayerKind::Sliding, LayerKind::Full, LayerKind::Full],
        ..Config::gpt_oss_20b()
    }
}

/// Made-up weights of the odd shape with attention, experts and output layer in NVFP4.
fn nvfp4() -> Synthetic {
    Synthetic::new(
        odd_config(),
        |id| match id.kind {
            MatrixKind::Embedding | MatrixKind::Router => Format::Bf16,
            _ => Format::Nvfp4,
        },
        7,
    )
}

fn mxfp4() -> Synthetic {
    let format = |id: MatrixId| if id.kind.is_expert() { Format::Mxfp4 } else { Format::Bf16 };
    Synthetic::new(odd_config(), format, 7)
}

#[track_caller]
fn assert_identical(a: &dyn Weights, b: &dyn Weights) {
    let comparison = compare(a, b, None, 2).unwrap();
    assert!(comparison.identical, "{comparison:?}");
    let config = a.config();
    assert_eq!(comparison.tensors, matrices(config).count() + vectors(config).count());
}

/// Equal not only in value: formats, codes, scales, and vectors in their types.
#[track_caller]
fn assert_same_storage(a: &dyn Weights, b: &dyn Weights) {
    assert_eq!(a.config(), b.config());
    for id in matrices(a.config()) {
        for expert in 0..id.kind.shape(a.config()).0 {
            assert_eq!(a.matrix(id, expert).unwrap(), b.matrix(id, expert).unwrap(), "{id:?} {expert}");
        }
        assert_eq!(a.input_scale(id), b.input_scale(id), "{id:?}");
    }
    for id in vectors(a.config()) {
        assert_eq!(a.vector(id).unwrap(), b.vector(id).unwrap(), "{id:?}");
    }
}

/// The file names below a folder with their contents.
fn contents(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![directory.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(directory).unwrap().to_str().unwrap().to_owned();
                found.push((name, std::fs::read(path).unwrap()));
            }
        }
    }
    found.sort();
    found
}
