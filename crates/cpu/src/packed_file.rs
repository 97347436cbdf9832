//! Packed weights in a file: made once, mapped at the next start.
//!
//! The file is what [`Shape::pack`] makes of each matrix, in the order of the model, in an order of bytes that every instruction
//! set shares. Where a matrix lies follows from the shapes, so nothing in the file is believed but its values; a sum over all
//! of them, the identity of the weights and the size must agree, or the file is made anew.
//!
//! The sum takes reading all of it. A file that was found good, and is on the disk, is stamped: a time is written into it
//! and set as the time of its last writing. As long as the system tells that time, and that nothing about the file has changed
//! since it was set, it is believed without the sum. So whatever writes to the file, replaces it, or sets its times leads to
//! the sum. What the system does not see, a failing disk or a clock that was set back, is not seen here either, nor is a write within
//! two seconds of the stamp by somebody who then sets the time back; that is what holds for the files of the model.

use std::collections::HashMap;
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use checkpoint::{Identity, MatrixId, MatrixKind, Weights, matrices};
use gptoss::Error;
use memmap2::Mmap;

use crate::bandwidth;
use crate::kernels::Kernels;
use crate::packed::{Memory, PackedMatrix, Shape};
use crate::pool::Pool;

/// How a file begins, whatever its version.
const MAGIC: &[u8; 16] = b"nibble, packed\r\n";

/// The version of the layout: of the packing in `packed.rs`, of the places below, of the sum, and of what identities are made of. Another one is made anew.
const VERSION: u64 = 4;

/// Where the first matrix begins, and what every part is a multiple of.
const ALIGN: usize = 4096;

/// How long after the time of a stamp something about the file may have changed last: its name, which it gets after it.
const STAMPING: Duration = Duration::from_secs(2);

/// Bytes per task of the sum.
const TASK: usize = 256 << 10;

/// Where and for whom packed weights are kept.
pub(crate) struct Request<'a> {
    pub(crate) path: &'a Path,
    pub(crate) weights: &'a dyn Weights,
    /// See [`Shape::of`].
    pub(crate) fast: bool,
    pub(crate) pool: &'a Pool,
    pub(crate) kernels: &'static Kernels,
}

/// A checked file.
pub(crate) struct PackedFile {
    map: Arc<Mmap>,
    places: HashMap<MatrixId, Place>,
}

/// Where the parts of a matrix lie.
struct Place {
    shape: Shape,
    data: Range<usize>,
    scales: Range<usize>,
}

impl PackedFile {
    /// Opens the file, or makes it if there is none, or none of these weights. `note` is told why it was made anew, or why there
    /// is none: a file that cannot be written is no error, the weights are then packed in memory.
    ///
    /// # Errors
    /// Weights that cannot be read, and a file of that name that is none of packed weights.
    pub(crate) fn open_or_make(
        request: &Request<'_>,
        note: &mut dyn FnMut(String),
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Option<PackedFile>, Error> {
        let path = request.path;
        let Some(identity) = request.weights.identity() else {
            return Err(Error::Unsupported(format!(
                "{}: expected the weights of files to keep packed there, found others",
                path.display()
            )));
        };
        let places = Places::new(request.weights, request.fast);
        match request.open(identity, &places)? {
            Found::Good(map) => return Ok(Some(PackedFile { map: Arc::new(map), places: places.of })),
            Found::Nothing => {}
            Found::Bad(why) => note(format!("{}: {why}; the weights are packed anew", path.display())),
        }
        match request.make(identity, &places, progress) {
            Ok(map) => Ok(Some(PackedFile { map: Arc::new(map), places: places.of })),
            Err(Failed::Weights(error)) => Err(error),
            Err(Failed::File(why)) => {
                note(format!("{}: {why}; the weights are packed in memory", path.display()));
                Ok(None)
            }
        }
    }

    /// A matrix or stack of the model other than the embedding.
    pub(crate) fn matrix(&self, id: MatrixId) -> PackedMatrix {
        let Place { shape, data, scales } = &self.places[&id];
        let scales = bytemuck::pod_collect_to_vec(&self.map[scales.clone()]);
        PackedMatrix::new(*shape, Memory::Mapped { file: Arc::clone(&self.map), range: data.clone() }, scales)
    }
}

/// What lies where.
struct Places {
    of: HashMap<MatrixId, Place>,
    /// In the order of the file.
    order: Vec<MatrixId>,
    /// Bytes of the file.
    len: usize,
}

impl Places {
    fn new(weights: &dyn Weights, fast: bool) -> Places {
        let order: Vec<MatrixId> =
            matrices(weights.config()).filter(|id| id.kind != MatrixKind::Embedding).collect();
        let mut len = ALIGN;
        let mut part = |bytes: usize| {
            let range = len..len + bytes;
            len = range.end.next_multiple_of(ALIGN);
            range
        };
        let of = order.iter().map(|&id| {
            let shape = Shape::of(weights, id, fast);
            let (data, scales) = (part(shape.bytes()), part(shape.scales() * size_of::<f32>()));
            (id, Place { shape, data, scales })
        });
        let of = of.collect();
        Places { of, order, len }
    }
}

/// What is under the name.
enum Found {
    Nothing,
    Good(Mmap),
    /// Why it cannot be taken.
    Bad(String),
}

/// What made a file impossible.
enum Failed {
    Weights(Error),
    File(String),
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Failed {
        Failed::File(error.to_string())
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        Failed::Weights(error)
    }
}

impl Request<'_> {
    fn open(&self, identity: Identity, places: &Places) -> Result<Found, Error> {
        let bad = |why: &std::io::Error| Found::Bad(why.to_string());
        let foreign = || {
            Error::Checkpoint(checkpoint::Error::File {
                path: self.path.to_owned(),
                expected: "no file, or one of packed weights".to_owned(),
                found: "something else".to_owned(),
            })
        };
        // To open a pipe would wait for somebody who writes to it.
        if std::fs::metadata(self.path).is_ok_and(|there| !there.is_file()) {
            return Err(foreign());
        }
        let mut file = match File::open(self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(error) => return Ok(bad(&error)),
        };
        let metadata = match file.metadata() {
            Ok(metadata) => metadata,
            Err(error) => return Ok(bad(&error)),
        };
        // What somebody else keeps under that name is not replaced; an empty file is nobody's.
        match magic(&mut file) {
            Ok(magic) if magic.is_empty() || magic == MAGIC => {}
            Ok(_) => return Err(foreign()),
            Err(error) => return Ok(bad(&error)),
        }
        if metadata.len() != places.len as u64 {
            let expected = places.len;
            return Ok(Found::Bad(format!("expected {expected} bytes, found {}", metadata.len())));
        }
        let map = match map(&file) {
            Ok(map) => map,
            Err(error) => return Ok(bad(&error)),
        };
        let header = Header { identity, fast: self.fast, sum: 0 }.bytes();
        let (at_sum, at_stamp) = (Header::SUM, Header::STAMP);
        if map[..MAGIC.len() + 8] != header[..MAGIC.len() + 8] {
            return Ok(Found::Bad("expected this version's layout, found another's".to_owned()));
        }
        if map[..at_sum.start] != header[..at_sum.start] {
            return Ok(Found::Bad("expected these weights, found others".to_owned()));
        }
        let stamp = map[at_stamp.clone()].try_into().expect("eight bytes");
        if is_stamped(&metadata, u64::from_le_bytes(stamp)) {
            return Ok(Found::Good(map));
        }
        if map[at_sum] != self.sum(&map).to_le_bytes() || map[at_stamp.end..ALIGN].iter().any(|&b| b != 0) {
            return Ok(Found::Bad("expected the sum of its bytes, found another".to_owned()));
        }
        // Who may not write it sums up again next time.
        drop(OpenOptions::new().write(true).open(self.path).and_then(|file| stamp_file(&file)));
        Ok(Found::Good(map))
    }

    /// Packs matrix after matrix into a file beside it, which takes the name when it is complete and on the disk.
    fn make(
        &self,
        identity: Identity,
        places: &Places,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Mmap, Failed> {
        let partial =
            checkpoint::beside(self.path, ".partial").map_err(|error| Failed::File(error.to_string()))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        // Not through a link, which would be another's file.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW);
        let mut file = options.open(&partial)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Failed::File("another process is writing it".to_owned()));
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        // Whoever had the lock may have given the file its name meanwhile, and have it mapped.
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            if std::fs::metadata(&partial).ok().map(|m| m.ino()) != Some(file.metadata()?.ino()) {
                return Err(Failed::File("another process has written it".to_owned()));
            }
        }
        // Who was stopped may have written a part of the magic; what has the name in the end has all of it.
        if !file.metadata()?.is_file() || !MAGIC.starts_with(&magic(&mut file)?) {
            return Err(Failed::File(format!(
                "{}: expected no file, or one of packed weights, found something else",
                partial.display()
            )));
        }
        let made = self.fill(&file, identity, places, progress);
        match &made {
            Ok(_) => std::fs::rename(&partial, self.path)?,
            // The error that led here matters more than one of this.
            Err(_) => drop(std::fs::remove_file(&partial)),
        }
        made
    }

    fn fill(
        &self,
        mut file: &File,
        identity: Identity,
        places: &Places,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Mmap, Failed> {
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(MAGIC)?;
        for (done, id) in places.order.iter().enumerate() {
            progress(done, places.order.len());
            let Place { shape, data, scales } = &places.of[id];
            let mut memory = shape.buffer(*id)?;
            let mut factors = vec![1.0f32; shape.scales()];
            shape.pack(self.weights, *id, self.pool, self.kernels, memory.as_mut_slice(), &mut factors)?;
            file.seek(SeekFrom::Start(data.start as u64))?;
            file.write_all(memory.as_slice())?;
            file.seek(SeekFrom::Start(scales.start as u64))?;
            file.write_all(bytemuck::cast_slice(&factors))?;
        }
        file.set_len(places.len as u64)?;
        let map = map(file)?;
        let sum = self.sum(&map);
        file.rewind()?;
        file.write_all(&Header { identity, fast: self.fast, sum }.bytes())?;
        stamp_file(file)?;
        Ok(map)
    }

    /// A sum over everything behind the header, each byte at its place.
    fn sum(&self, map: &Mmap) -> u64 {
        let tasks: Vec<&[u8]> = map[ALIGN..].chunks(TASK).collect();
        let sum = AtomicU64::new(0);
        self.pool.run(tasks.len(), &|task| {
            // SAFETY: the kernels were chosen for this CPU.
            let part = unsafe { (self.kernels.checksum)(tasks[task]) };
            // Depends on the place, and on no order of the tasks.
            sum.fetch_add(bandwidth::mix(part ^ bandwidth::mix(task as u64)), Ordering::Relaxed);
        });
        sum.into_inner()
    }
}

/// The first bytes.
struct Header {
    identity: Identity,
    fast: bool,
    sum: u64,
}

impl Header {
    /// Where the sum is: behind the magic, the version, the identity and whether 16 bits were kept in eight.
    const SUM: Range<usize> = 64..72;

    /// Where the stamp is, in nanoseconds since 1970; zero is none.
    const STAMP: Range<usize> = 72..80;

    fn bytes(&self) -> [u8; Header::SUM.end] {
        let mut bytes = [0; Header::SUM.end];
        bytes[..16].copy_from_slice(MAGIC);
        bytes[16..24].copy_from_slice(&VERSION.to_le_bytes());
        bytes[24..56].copy_from_slice(&self.identity.0);
        bytes[56] = u8::from(self.fast);
        bytes[Header::SUM].copy_from_slice(&self.sum.to_le_bytes());
        bytes
    }
}

/// Has a good file written to the disk and notes in it when that was.
fn stamp_file(mut file: &File) -> std::io::Result<()> {
    file.sync_data()?;
    let now = SystemTime::now();
    let Ok(since) = now.duration_since(SystemTime::UNIX_EPOCH) else { return Ok(()) };
    file.seek(SeekFrom::Start(Header::STAMP.start as u64))?;
    file.write_all(&(since.as_nanos() as u64).to_le_bytes())?;
    file.set_modified(now)
}

/// How a file begins: as many bytes as [`MAGIC`] has, or all that there are.
fn magic(file: &mut File) -> std::io::Result<Vec<u8>> {
    let mut magic = Vec::new();
    file.take(MAGIC.len() as u64).read_to_end(&mut magic)?;
    Ok(magic)
}

/// Whether the file was last written, and last changed in any way that the system tells, when it was stamped.
fn is_stamped(metadata: &Metadata, stamp: u64) -> bool {
    let stamp = SystemTime::UNIX_EPOCH + Duration::from_nanos(stamp);
    #[cfg(unix)]
    let changed = {
        use std::os::unix::fs::MetadataExt;
        let seconds = Duration::from_secs(metadata.ctime().try_into().unwrap_or(0));
        SystemTime::UNIX_EPOCH + seconds + Duration::from_nanos(metadata.ctime_nsec().try_into().unwrap_or(0))
    };
    #[cfg(not(unix))]
    let changed = stamp;
    metadata.modified().is_ok_and(|written| written == stamp) && changed <= stamp + STAMPING
}

fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only. It would change under our references only if another process wrote to the file, which
    // nobody does: files are made under another name, locked, and replaced; what is changed later is the stamp, at which
    // nobody looks again.
    let map = unsafe { Mmap::map(file) }?;
    // On large pages where the system has them for files. Advice only: a failure costs speed.
    #[cfg(target_os = "linux")]
    drop(map.advise(memmap2::Advice::HugePage));
    Ok(map)
}
