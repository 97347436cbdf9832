//! One safetensors file, mapped into memory, its header checked before anything is believed.

use std::fmt;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use sha2::{Digest, Sha256};

use crate::Error;
use crate::error::brief;

#[cfg(target_endian = "big")]
compile_error!("safetensors are little-endian and are read where they lie");

/// A tensor as the header of its file describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub range: Range<usize>,
}

/// A safetensors file whose header holds: every tensor lies inside the file, has the size that its shape and type
/// say, overlaps no other and leaves no gap, and no name occurs twice.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    bytes: Bytes,
    tensors: Vec<StoredTensor>,
    /// When the file was last written.
    modified: Option<SystemTime>,
}

impl TensorFile {
    /// Maps and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, [`Error::File`] if it is not a well-formed safetensors file.
    pub fn open(path: &Path) -> Result<TensorFile, Error> {
        // Asked by name, since opening a pipe waits for its writer.
        if !fs::metadata(path).map_err(Error::io(path))?.is_file() {
            return Err(Error::file(path, "a regular file", "something else"));
        }
        let file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        if metadata.len() < LENGTH_BYTES as u64 {
            return Err(Error::file(path, "a safetensors file", format!("{} bytes", metadata.len())));
        }
        // SAFETY: the map is read-only and private to us. It would change under our references only if another
        // process wrote to the file, which nobody does to a model in use: the one assumption of mapping weights at
        // all (a truncation would end the process with SIGBUS).
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        TensorFile::new(path.to_owned(), Bytes::Map(map), metadata.modified().ok())
    }

    /// Checks a file that is already in memory, under the name `path` for messages. Its weights are borrowed where they lie if
    /// `bytes` is aligned to 8; otherwise BF16 tensors are copied at each use.
    pub fn from_static(path: &Path, bytes: &'static [u8]) -> Result<TensorFile, Error> {
        TensorFile::new(path.to_owned(), Bytes::Static(bytes), None)
    }

    fn new(path: PathBuf, bytes: Bytes, modified: Option<SystemTime>) -> Result<TensorFile, Error> {
        let tensors =
            read_header(bytes.as_slice()).map_err(|found| Error::file(&path, "a safetensors file", found))?;
        Ok(TensorFile { path, bytes, tensors, modified })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors in the order in which they lie in the file.
    pub fn tensors(&self) -> &[StoredTensor] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The bytes of one of this file's tensors.
    pub fn data(&self, tensor: &StoredTensor) -> &[u8] {
        self.slice(&tensor.range)
    }

    /// Adds what stands for the contents: of a file its header, size, time of writing and samples of each tensor, since some
    /// systems give all files one time; all bytes of what is in memory.
    pub(crate) fn identify(&self, digest: &mut Sha256) {
        let bytes = self.bytes.as_slice();
        digest.update((bytes.len() as u64).to_le_bytes());
        let since = self.modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        let Some(since) = since else {
            digest.update(bytes);
            return;
        };
        digest.update(since.as_nanos().to_le_bytes());
        digest.update(&bytes[..self.tensors.first().map_or(bytes.len(), |tensor| tensor.range.start)]);
        for data in self.tensors.iter().map(|tensor| self.data(tensor)) {
            for part in data.chunks(SAMPLED) {
                digest.update(&part[..part.len().min(SAMPLE)]);
            }
            digest.update(&data[data.len().saturating_sub(SAMPLE)..]);
        }
    }

    /// Gives the memory of a range back to the system; it is read from the file again when it is next looked at.
    #[cfg(unix)]
    pub(crate) fn release(&self, range: &Range<usize>) {
        if let Bytes::Map(map) = &self.bytes {
            // Whole pages inside the range only: the neighbours may be in use.
            const PAGE: usize = 1 << 16;
            let start = range.start.next_multiple_of(PAGE);
            let end = range.end / PAGE * PAGE;
            if start < end {
                let advice = memmap2::UncheckedAdvice::DontNeed;
                // SAFETY: the map is read-only and of a file, so a dropped page comes back from that file with the
                // same bytes, also under references that are still held.
                let advised = unsafe { map.unchecked_advise_range(advice, start, end - start) };
                // A hint that the system declines changes nothing.
                drop(advised);
            }
        }
    }

    /// Only there to be called: this system takes no such advice.
    #[cfg(not(unix))]
    pub(crate) fn release(&self, _range: &Range<usize>) {}

    pub(crate) fn slice(&self, range: &Range<usize>) -> &[u8] {
        &self.bytes.as_slice()[range.clone()]
    }
}

enum Bytes {
    Map(Mmap),
    Static(&'static [u8]),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Map(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.as_slice().len())
    }
}

const LENGTH_BYTES: usize = 8;

/// Bytes of a sample, and bytes of a tensor that begin with one. Of gpt-oss-20b 7 MB are read.
const SAMPLE: usize = 4 << 10;
const SAMPLED: usize = 16 << 20;

/// As in the reference implementation.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// The tensors of a file, or what is wrong with it.
fn read_header(bytes: &[u8]) -> Result<Vec<StoredTensor>, String> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!("{} bytes", bytes.len()));
    };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err("a pointer of Git LFS, which `git lfs pull` replaces by the file".to_owned());
    }
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length)
        .ok()
        .filter(|&length| length <= MAX_HEADER_BYTES)
        .and_then(|length| rest.get(..length))
        .ok_or_else(|| format!("a header of {length} bytes in a file of {}", bytes.len()))?;
    let text = std::str::from_utf8(header).map_err(|e| format!("a header that is not UTF-8 ({e})"))?;
    let Header(mut tensors) =
        serde_json::from_str(text).map_err(|e| format!("an unreadable header: {}", brief(&e.to_string())))?;

    tensors.sort_by_key(|(_, info)| info.data_offsets);
    // Each begins where the one before it ends, and has the size of its type and shape.
    let mut expected = 0usize;
    for (name, TensorInfo { dtype, shape, data_offsets: (first, end) }) in &tensors {
        let bits = shape.iter().try_fold(dtype.bitsize(), |bits, &size| bits.checked_mul(size));
        let size = bits.filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8);
        let wanted = size.and_then(|size| expected.checked_add(size));
        if (Some(*first), Some(*end)) != (Some(expected), wanted) {
            let place = wanted.map_or_else(
                || "where no such tensor has room".to_owned(),
                |wanted| format!("instead of {expected} to {wanted}"),
            );
            let what = format!("{dtype} {shape:?}");
            return Err(format!(
                "tensor `{}`, {}, at bytes {first} to {end} {place}",
                brief(name),
                brief(&what)
            ));
        }
        expected = *end;
    }
    let data = rest.len() - header.len();
    if data != expected {
        return Err(format!("{data} bytes of data where the header describes {expected}"));
    }
    let start = LENGTH_BYTES + header.len();
    let stored = |(name, TensorInfo { dtype, shape, data_offsets: (first, end) })| StoredTensor {
        name,
        dtype,
        shape,
        range: start + first..start + end,
    };
    Ok(tensors.into_iter().map(stored).collect())
}

/// The header's JSON. Read by hand because a map would silently keep the last of two equal names.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut seen = std::collections::HashSet::new();
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!("the name `{}` twice", brief(&name))));
                    }
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        tensors.push((name, map.next_value::<TensorInfo>()?));
                    }
                }
                Ok(Header(tensors))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}
