//! Folders of unfinished work: one command at a time works in one, only the same command continues it, and nothing else is
//! ever taken for such a folder.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::Error;

/// A folder of unfinished work, locked until this is dropped.
#[derive(Debug)]
pub struct Unfinished {
    directory: PathBuf,
    /// Holds the lock. Its first line says whose the work is, the others what of it is done.
    journal: File,
}

/// The journal's name. A folder without it is nobody's unfinished work.
pub(crate) const JOURNAL: &str = ".nibble-journal";

impl Unfinished {
    /// Makes the folder, or takes the one of the same `identity`; gives the lines that are in its journal. With `overwrite` a
    /// folder of another identity is emptied.
    ///
    /// # Errors
    /// [`Error::OtherWork`] for a folder of another identity; [`Error::File`] for one that is in use, or that is not empty and has
    /// no journal, whatever was asked for.
    pub fn begin(
        directory: &Path,
        identity: &str,
        overwrite: bool,
    ) -> Result<(Unfinished, Vec<String>), Error> {
        refuse_foreign(directory)?;
        let path = directory.join(JOURNAL);
        fs::create_dir_all(directory).map_err(Error::io(directory))?;
        let mut journal =
            OpenOptions::new().create(true).read(true).append(true).open(&path).map_err(Error::io(&path))?;
        match journal.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(Error::file(directory, "no other process that writes there", "one that does"));
            }
            Err(TryLockError::Error(error)) if !without_locks(&error) => {
                return Err(Error::io(&path)(error));
            }
            _ => {}
        }
        let mut text = Vec::new();
        journal.read_to_end(&mut text).map_err(Error::io(&path))?;
        let text = whole_lines(&text);
        if continues(directory, text, identity, overwrite)? {
            journal.set_len(text.len() as u64).map_err(Error::io(&path))?;
            let lines = text.lines().skip(1).map(str::to_owned).collect();
            return Ok((Unfinished { directory: directory.to_owned(), journal }, lines));
        }
        let mut work = Unfinished { directory: directory.to_owned(), journal };
        work.begin_anew(identity)?;
        Ok((work, Vec::new()))
    }

    /// Drops what is done: the folder is as empty as a new one.
    pub(crate) fn begin_anew(&mut self, identity: &str) -> Result<(), Error> {
        let path = self.directory.join(JOURNAL);
        empty(&self.journal).map_err(Error::io(&path))?;
        clear(&self.directory)?;
        writeln!(self.journal, "{}", written(identity)).map_err(Error::io(&path))
    }

    /// Whether [`Unfinished::begin`] would take the folder, if nobody is at work there.
    pub(crate) fn check(directory: &Path, identity: &str, overwrite: bool) -> Result<(), Error> {
        refuse_foreign(directory)?;
        let path = directory.join(JOURNAL);
        match fs::read(&path) {
            Ok(text) => continues(directory, whole_lines(&text), identity, overwrite).map(drop),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io(&path)(error)),
        }
    }

    /// The folder.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Adds lines to the journal and makes them last.
    pub(crate) fn record(&mut self, lines: &[String]) -> Result<(), Error> {
        let mut text = lines.join("\n");
        text.push('\n');
        let written = self.journal.write_all(text.as_bytes()).and_then(|()| self.journal.sync_data());
        written.map_err(Error::io(&self.directory.join(JOURNAL)))
    }
}

/// Whether a file was not locked because its file system knows no locks, as some on a network; work goes on without.
pub(crate) fn without_locks(error: &std::io::Error) -> bool {
    // NFS says that there are no locks available.
    error.kind() == ErrorKind::Unsupported || error.raw_os_error() == Some(libc::ENOLCK)
}

/// Refuses what is not empty and has no journal: it is nobody's unfinished work, and stays as it is. So does what is no folder above
/// it.
pub(crate) fn refuse_foreign(directory: &Path) -> Result<(), Error> {
    let foreign = match fs::read_dir(directory) {
        Ok(mut entries) => entries.next().is_some() && !directory.join(JOURNAL).is_file(),
        // But for a link that leads nowhere.
        Err(error) if error.kind() == ErrorKind::NotFound => fs::symlink_metadata(directory).is_ok(),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            let no_folder = |path: &&Path| fs::metadata(path).is_ok_and(|there| !there.is_dir());
            if let Some(above) = directory.ancestors().skip(1).find(no_folder) {
                return Err(Error::file(above, "a folder, or nothing", "something else"));
            }
            true
        }
        Err(error) => return Err(Error::io(directory)(error)),
    };
    if foreign {
        Err(Error::file(directory, "unfinished work, or nothing", "something else"))
    } else {
        Ok(())
    }
}

/// Removes a folder of unfinished work, if it is there. The journal goes last: if this is interrupted, the next call may go on.
///
/// # Errors
/// [`Error::Io`] with the name of what cannot be removed.
pub fn remove_unfinished(directory: &Path) -> Result<(), Error> {
    if !directory.exists() {
        return Ok(());
    }
    let journal = directory.join(JOURNAL);
    match OpenOptions::new().write(true).open(&journal).and_then(|journal| empty(&journal)) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(&journal)(error)),
        _ => {}
    }
    clear(directory)?;
    match fs::remove_file(&journal) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(&journal)(error)),
        _ => fs::remove_dir(directory).map_err(Error::io(directory)),
    }
}

/// A journal up to where it is no text, or a last line was cut off before its end. What is no text from the beginning is a line that
/// nobody wrote.
fn whole_lines(journal: &[u8]) -> &str {
    let text = match std::str::from_utf8(journal) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&journal[..error.valid_up_to()]).unwrap_or_default(),
    };
    match text.rfind('\n') {
        Some(end) => &text[..=end],
        None if text.len() < journal.len() => "\u{fffd}\n",
        None => "",
    }
}

/// Whether the work of this journal is to be continued under `identity`; that of another one is dropped with `overwrite` alone.
fn continues(directory: &Path, journal: &str, identity: &str, overwrite: bool) -> Result<bool, Error> {
    match journal.lines().next() {
        Some(first) if first == written(identity) => Ok(true),
        Some(_) if !overwrite => Err(Error::OtherWork { path: directory.to_owned() }),
        _ => Ok(false),
    }
}

/// An identity as the journal has it.
fn written(identity: &str) -> String {
    hex(&Sha256::digest(identity))
}

/// A digest as it is written.
pub(crate) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Empties a journal, and makes that last before the files go that it tells of: with some of them gone, the command whose work it was
/// would believe it.
fn empty(journal: &File) -> std::io::Result<()> {
    journal.set_len(0)?;
    journal.sync_all()
}

/// Removes everything from an unfinished folder but its journal, which must be empty.
fn clear(directory: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
        let entry = entry.map_err(Error::io(directory))?;
        let path = entry.path();
        if entry.file_name() == JOURNAL {
            continue;
        }
        let is_dir = entry.file_type().map_err(Error::io(&path))?.is_dir();
        if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.map_err(Error::io(&path))?;
    }
    Ok(())
}
