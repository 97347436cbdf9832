//! Folders of unfinished work: one command at a time works in one, only the same command continues it, and nothing else is
//! ever taken for such a folder.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
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
        let path = directory.join(JOURNAL);
        fs::create_dir_all(directory).map_err(Error::io(directory))?;
        let empty = fs::read_dir(directory).map_err(Error::io(directory))?.next().is_none();
        if !empty && !path.is_file() {
            return Err(Error::file(directory, "unfinished work, or nothing", "something else"));
        }
        let mut journal =
            OpenOptions::new().create(true).read(true).append(true).open(&path).map_err(Error::io(&path))?;
        journal.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => {
                Error::file(directory, "no other process that writes there", "one that does")
            }
            TryLockError::Error(error) => Error::io(&path)(error),
        })?;
        let mut text = String::new();
        journal.read_to_string(&mut text).map_err(Error::io(&path))?;
        // A last line without its end was cut off.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let mut lines = text[..whole].lines();
        let identity = hex(&Sha256::digest(identity));
        let ours = match lines.next() {
            None => false,
            Some(first) if first == identity => true,
            Some(_) if overwrite => false,
            Some(_) => return Err(Error::OtherWork { path: directory.to_owned() }),
        };
        if ours {
            journal.set_len(whole as u64).map_err(Error::io(&path))?;
            let lines = lines.map(str::to_owned).collect();
            return Ok((Unfinished { directory: directory.to_owned(), journal }, lines));
        }
        clear(directory)?;
        journal.set_len(0).map_err(Error::io(&path))?;
        writeln!(journal, "{identity}").map_err(Error::io(&path))?;
        Ok((Unfinished { directory: directory.to_owned(), journal }, Vec::new()))
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

/// A digest as it is written.
pub(crate) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Removes everything from an unfinished folder but its journal, which is locked.
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
