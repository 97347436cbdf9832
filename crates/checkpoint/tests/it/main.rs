//! Model folders as they are met in the world: golden exports, round trips, and files that lie.

mod goldens;

use std::path::PathBuf;

/// A path below `testdata/`.
fn testdata(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata")).join(path)
}
