//! Packed weights in a file: the same bits from it, and nothing but the same bits whatever becomes of it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use checkpoint::{
    Checkpoint, Config, Error, Format, Identity, Matrix, MatrixId, MatrixKind, Synthetic, Vector, VectorId,
    Weights,
};
use cpu::{Activations, Cpu, Options};
use gptoss::{Backend, Plan, SequencePlan};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

fn weights(path: &str) -> Arc<dyn Weights> {
    Arc::new(Checkpoint::open(&Path::new(ROOT).join(path)).unwrap())
}

/// Weights of which no matrix can be read but the embedding.
struct Sealed(Arc<dyn Weights>);

impl Weights for Sealed {
    fn config(&self) -> &Config {
        self.0.config()
    }
    fn format(&self, id: MatrixId) -> Format {
        self.0.format(id)
    }
    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        assert_eq!(id.kind, MatrixKind::Embedding, "a matrix is packed again");
        self.0.matrix(id, expert)
    }
    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        self.0.vector(id)
    }
    fn identity(&self) -> Option<Identity> {
        self.0.identity()
    }
}

fn options(fast_weights: bool) -> Options {
    let activations = if fast_weights { Activations::Int8 } else { Activations::F32 };
    Options { fast_weights, activations, ..Options::default() }
}

fn logits(mut cpu: Cpu) -> Vec<f32> {
    cpu.allocate_kv(2, 2).unwrap();
    let sequence = SequencePlan {
        tokens: (0..20).map(|i| i * 13 % 320).collect(),
        full_blocks: vec![0, 1].into(),
        sliding_blocks: vec![0, 1].into(),
        logits: true,
        ..SequencePlan::default()
    };
    cpu.step(&Plan { sequences: vec![sequence] }).unwrap().remove(0).logits
}

/// Logits and what was noted.
fn kept(
    weights: Arc<dyn Weights>,
    fast: bool,
    path: &Path,
) -> Result<(Vec<f32>, Vec<String>), gptoss::Error> {
    let mut notes = Vec::new();
    let cpu = Cpu::load_kept(weights, options(fast), path, &mut |note| notes.push(note), &mut |_, _| {})?;
    Ok((logits(cpu), notes))
}

fn expected(weights: Arc<dyn Weights>, fast: bool) -> Vec<f32> {
    logits(Cpu::load(weights, options(fast), &mut |_, _| {}).unwrap())
}

#[test]
fn the_next_start_packs_nothing_and_has_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    for (name, model) in [("mx", "testdata/model/hf-mxfp4"), ("bf", "testdata/tiny-gpt-oss-bf16")] {
        for fast in [false, true] {
            let path = folder.path().join(format!("{name}{fast}"));
            let expected = expected(weights(model), fast);
            assert_eq!(kept(weights(model), fast, &path).unwrap(), (expected.clone(), vec![]));
            let made = std::fs::metadata(&path).unwrap().ino();
            assert_eq!(kept(Arc::new(Sealed(weights(model))), fast, &path).unwrap(), (expected, vec![]));
            assert_eq!(std::fs::metadata(&path).unwrap().ino(), made, "the file was made again");
        }
    }
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 4, "{names:?}");
}

#[test]
fn a_file_that_is_not_whole_or_of_others_is_made_anew() {
    const MODEL: &str = "testdata/model/hf-mxfp4";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("packed");
    let expected = expected(weights(MODEL), false);
    kept(weights(MODEL), false, &path).unwrap();
    let good = std::fs::read(&path).unwrap();
    let len = good.len();

    let mut files: Vec<(String, Vec<u8>)> = [0, 16, 71, 4095, 4096, len / 2, len - 1]
        .map(|cut| (format!("cut at {cut}"), good[..cut].to_vec()))
        .to_vec();
    files.push(("longer".to_owned(), [&good[..], &[0]].concat()));
    // Version, identity, options, sum, the rest of the header but the stamp, and values.
    for at in [16, 23, 24, 55, 56, 57, 63, 64, 71, 80, 4095, 4096, 4097, len / 3, len / 2 + 1, len - 4096] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        files.push((format!("byte {at}"), bytes));
    }
    // The same values elsewhere: within what is summed up at a time, and beyond.
    for (a, b, size) in [(4096, 4096 + 128, 128), (8192, 8192 + (256 << 10), 4096)] {
        let mut bytes = good.clone();
        let (first, second) = bytes.split_at_mut(b);
        first[a..a + size].swap_with_slice(&mut second[..size]);
        assert_ne!(bytes, good);
        files.push((format!("{size} bytes at {a} and {b} exchanged"), bytes));
    }
    kept(weights("testdata/model/original-mxfp4"), false, &folder.path().join("other")).unwrap();
    files.push(("of other files".to_owned(), std::fs::read(folder.path().join("other")).unwrap()));
    kept(weights(MODEL), true, &folder.path().join("fast")).unwrap();
    files.push(("fast".to_owned(), std::fs::read(folder.path().join("fast")).unwrap()));

    for (what, bytes) in files {
        std::fs::write(&path, bytes).unwrap();
        let (found, notes) = kept(weights(MODEL), false, &path).unwrap();
        assert!(found == expected, "{what}");
        assert!(notes.len() == 1 && notes[0].contains("packed anew"), "{what}: {notes:?}");
        assert!(same(&std::fs::read(&path).unwrap(), &good), "{what}");
        assert_eq!(kept(Arc::new(Sealed(weights(MODEL))), false, &path).unwrap().1, [""; 0], "{what}");
    }
}

/// Whether two files are the same but for the stamp.
fn same(a: &[u8], b: &[u8]) -> bool {
    a[..STAMP.start] == b[..STAMP.start] && a[STAMP.end..] == b[STAMP.end..]
}

const STAMP: std::ops::Range<usize> = 72..80;

/// Gives a file a time of writing, and a stamp of it.
fn stamp(path: &Path, time: SystemTime) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let nanoseconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    file.write_all_at(&nanoseconds.to_le_bytes(), STAMP.start as u64).unwrap();
    file.set_modified(time).unwrap();
}

#[test]
fn a_file_is_read_whole_unless_it_is_as_it_was_stamped() {
    let model = || weights("testdata/model/hf-mxfp4");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("packed");
    let expected = expected(model(), false);
    kept(model(), false, &path).unwrap();
    let good = std::fs::read(&path).unwrap();
    let written = std::fs::metadata(&path).unwrap().modified().unwrap();
    let stamped = |bytes: &[u8]| {
        let stamp = u64::from_le_bytes(bytes[STAMP].try_into().unwrap());
        SystemTime::UNIX_EPOCH + Duration::from_nanos(stamp)
    };
    assert_eq!(stamped(&good), written);

    // A copy is good, and has a stamp of its own from its first use on, which the next start leaves.
    let copy = folder.path().join("copy");
    std::fs::write(&copy, &good).unwrap();
    let mut stamps = Vec::new();
    for _ in 0..2 {
        assert_eq!(kept(model(), false, &copy).unwrap(), (expected.clone(), vec![]));
        let found = std::fs::read(&copy).unwrap();
        assert!(same(&found, &good));
        assert_eq!(stamped(&found), std::fs::metadata(&copy).unwrap().modified().unwrap());
        stamps.push(stamped(&found));
    }
    assert!(stamps[0] > written && stamps[0] == stamps[1], "{stamps:?}");

    // Of another time; of the time that it tells, which was set later; and the latter as it was set.
    let mut bad = good;
    let last = bad.len() / 2;
    bad[last] ^= 1;
    let now = SystemTime::now();
    for (time, believed) in [(None, false), (Some(now - Duration::from_secs(60)), false), (Some(now), true)] {
        std::fs::write(&path, &bad).unwrap();
        if let Some(time) = time {
            stamp(&path, time);
        }
        let (found, notes) = kept(model(), false, &path).unwrap();
        assert_eq!(notes.is_empty(), believed, "{time:?}: {notes:?}");
        assert_eq!(found == expected, !believed, "{time:?}");
    }
}

#[test]
fn what_somebody_else_keeps_there_stays() {
    let model = || weights("testdata/model/hf-mxfp4");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notes.txt");
    // Also what begins as ours do and ends before it says so.
    for theirs in ["n", "nibble, packed\r", "not ours"] {
        std::fs::write(&path, theirs).unwrap();
        let error = kept(model(), false, &path).unwrap_err().to_string();
        assert!(error.contains("notes.txt: expected no file, or one of packed weights"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), theirs);
    }
    assert!(kept(model(), false, folder.path()).is_err());

    // A folder that does not exist: in memory then.
    let (found, notes) = kept(model(), false, &folder.path().join("no/packed")).unwrap();
    assert!(found == expected(model(), false));
    assert!(notes.len() == 1 && notes[0].contains("packed in memory"), "{notes:?}");

    // Somebody is writing it.
    let partial = std::fs::File::create(folder.path().join("busy.partial")).unwrap();
    partial.lock().unwrap();
    let (found, notes) = kept(model(), false, &folder.path().join("busy")).unwrap();
    assert!(found == expected(model(), false));
    assert!(notes.len() == 1 && notes[0].contains("another process is writing it"), "{notes:?}");

    // Somebody keeps something under the name in which it is written, or leads it elsewhere.
    let theirs = folder.path().join("theirs.partial");
    std::fs::write(&theirs, "not ours").unwrap();
    std::os::unix::fs::symlink(&path, folder.path().join("led.partial")).unwrap();
    for name in ["theirs", "led"] {
        let (found, notes) = kept(model(), false, &folder.path().join(name)).unwrap();
        assert!(found == expected(model(), false));
        assert!(notes.len() == 1 && notes[0].contains("packed in memory"), "{notes:?}");
        assert!(!folder.path().join(name).exists());
    }
    assert_eq!(std::fs::read(&theirs).unwrap(), b"not ours");
    assert_eq!(std::fs::read(&path).unwrap(), b"not ours");
    // What a start left that was stopped is written anew.
    for left in ["nib", "nibble, packed\r\nand more"] {
        std::fs::write(folder.path().join("left.partial"), left).unwrap();
        let path = folder.path().join("left");
        let (found, notes) = kept(model(), false, &path).unwrap();
        assert!(found == expected(model(), false) && notes.is_empty(), "{notes:?}");
        std::fs::remove_file(path).unwrap();
    }
}

/// Names that are no text are written under names of their own, too.
#[test]
fn names_need_not_be_text() {
    let model = || weights("testdata/model/hf-mxfp4");
    let folder = tempfile::tempdir().unwrap();
    let theirs = folder.path().join("packed\u{fffd}.partial");
    std::fs::write(&theirs, "not ours").unwrap();
    let path = folder.path().join(OsStr::from_bytes(b"packed\xff"));
    let (found, notes) = kept(model(), false, &path).unwrap();
    assert!(found == expected(model(), false) && notes.is_empty(), "{notes:?}");
    assert!(path.exists());
    assert_eq!(std::fs::read(&theirs).unwrap(), b"not ours");
}

#[test]
fn weights_that_are_no_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::gpt_oss_20b();
    config.layer_kinds.truncate(1);
    let made_up = Arc::new(Synthetic::new(config, |_| Format::Bf16, 1));
    assert!(kept(made_up, false, &folder.path().join("packed")).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
