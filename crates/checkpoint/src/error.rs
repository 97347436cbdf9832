//! What can be wrong with a model folder, each as a sentence that names the file or tensor.

use std::fmt;
use std::path::{Path, PathBuf};

/// An error of reading or writing a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A scale that no quantizer writes.
    #[error("tensor `{tensor}`: expected finite positive scales, found {found}")]
    Scale {
        /// The tensor's name.
        tensor: String,
        /// What was found and where.
        found: String,
    },
    /// The machine failed to read or write a file; `source.kind()` tells a full disk from a missing file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A JSON file that is none.
    #[error("{}: expected JSON, found {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A field of a JSON file with a value that cannot be.
    #[error("{file}: `{field}`: expected {expected}, found {found}")]
    Field {
        /// The file's name.
        file: String,
        /// The field, with dots for nesting.
        field: String,
        /// What would be right.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A file or folder that is not what its name says.
    #[error("{}: expected {expected}, found {found}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What would be right.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The tensors of a folder are not those of the model that its configuration describes.
    #[error("{}: the tensors do not fit the configuration: {mismatch}", path.display())]
    Tensors {
        /// The folder or file.
        path: PathBuf,
        /// Which ones.
        mismatch: Box<Mismatch>,
    },
    /// A matrix in a format that the layout to be written has no place for.
    #[error("tensor `{tensor}`: expected {expected}, found {found}")]
    Format {
        /// The tensor's name.
        tensor: String,
        /// What the layout can hold.
        expected: String,
        /// What was given.
        found: String,
    },
    /// The output exists.
    #[error("{}: expected no such folder, found one (it is only replaced when that is asked for)", path.display())]
    Exists {
        /// The output folder.
        path: PathBuf,
    },
    /// A folder of unfinished work that another command left.
    #[error("{}: expected unfinished work of this very command, or nothing, found that of another", path.display())]
    OtherWork {
        /// The folder.
        path: PathBuf,
    },
    /// The writer was told to stop. What is done stays for the same call to continue.
    #[error("interrupted; unfinished work is in {}", partial.display())]
    Interrupted {
        /// The folder of the unfinished work.
        partial: PathBuf,
    },
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn file(path: &Path, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::File { path: path.to_owned(), expected: expected.into(), found: found.into() }
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers have numbers, strings and JSON values at hand"
    )]
    pub(crate) fn field(
        file: &str,
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Error {
        let (field, expected) = (field.into(), expected.into());
        Error::Field { file: file.to_owned(), field, expected, found: brief(&found.to_string()) }
    }
}

/// The differences between the tensors of the files and those of the model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Tensors of the model that no file has.
    pub missing: Vec<String>,
    /// Tensors of the files that the model has no place for.
    pub unknown: Vec<String>,
    /// Tensors of another type or shape: a sentence each.
    pub misshapen: Vec<String>,
}

impl Mismatch {
    pub(crate) fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unknown.is_empty() && self.misshapen.is_empty()
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 10;
        let lists = [("missing", &self.missing), ("unknown", &self.unknown), ("misshapen", &self.misshapen)];
        let mut first = true;
        for (title, names) in lists.iter().filter(|(_, names)| !names.is_empty()) {
            write!(f, "{}{title}: ", if first { "" } else { "; " })?;
            first = false;
            for (i, name) in names.iter().take(SHOWN).enumerate() {
                write!(f, "{}{}", if i == 0 { "" } else { ", " }, brief(name))?;
            }
            if names.len() > SHOWN {
                write!(f, " and {} more", names.len() - SHOWN)?;
            }
        }
        Ok(())
    }
}

/// At most 200 characters, none of them a control character: text from a file that goes into a message.
pub(crate) fn brief(text: &str) -> String {
    const LONGEST: usize = 200;
    let mut out: String =
        text.chars().take(LONGEST).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(LONGEST).is_some() {
        out.push('…');
    }
    out
}
