//! Errors as people see them: one sentence, maybe a hint, and an exit status that scripts can rely on.

use std::path::Path;

/// Why a command did not end with status 0.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: Status,
    /// One sentence that names the file, tensor, field or flag, what was expected and what was found. Empty where the
    /// command has said everything on standard output.
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

/// The exit statuses of `cli.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// The work was done and its answer is "no".
    No = 1,
    /// Bad usage or bad input.
    Input = 2,
    /// The machine failed.
    Machine = 3,
    Interrupted = 130,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn new(status: Status, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into(), hint: None }
    }

    /// The answer is no, and has been printed.
    pub(crate) fn no() -> Failure {
        Failure::new(Status::No, "")
    }

    pub(crate) fn input(message: impl Into<String>) -> Failure {
        Failure::new(Status::Input, message)
    }

    pub(crate) fn machine(message: impl Into<String>) -> Failure {
        Failure::new(Status::Machine, message)
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }

    /// A file that could not be read or written.
    pub(crate) fn io(path: &Path, error: &std::io::Error) -> Failure {
        Failure::new(status_of(error), format!("{}: {error}", path.display()))
    }
}

/// A wrong name is the user's mistake; a full disk is the machine's.
fn status_of(error: &std::io::Error) -> Status {
    use std::io::ErrorKind as Kind;
    // Links that lead nowhere: the kind has no stable name.
    if error.raw_os_error() == Some(libc::ELOOP) {
        return Status::Input;
    }
    match error.kind() {
        Kind::NotFound
        | Kind::NotADirectory
        | Kind::IsADirectory
        | Kind::PermissionDenied
        | Kind::AlreadyExists
        | Kind::InvalidInput
        | Kind::InvalidData
        | Kind::InvalidFilename => Status::Input,
        _ => Status::Machine,
    }
}

impl From<checkpoint::Error> for Failure {
    fn from(error: checkpoint::Error) -> Failure {
        let message = error.to_string();
        match &error {
            checkpoint::Error::Io { source, .. } => Failure::new(status_of(source), message),
            checkpoint::Error::Interrupted { .. } => {
                Failure::new(Status::Interrupted, message).hint("the same command continues")
            }
            checkpoint::Error::Tensors { mismatch, .. } => {
                let failure = Failure::input(message);
                match other_names(mismatch) {
                    Some(hint) => failure.hint(hint),
                    None => failure,
                }
            }
            _ => Failure::input(message),
        }
    }
}

/// What tools have made of a model whose tensors have other names.
fn other_names(mismatch: &checkpoint::Mismatch) -> Option<String> {
    if mismatch.unknown.iter().any(|name| name.contains(".lora_")) {
        return Some("these are an adapter's weights: merge it into the model first".to_owned());
    }
    let missing = mismatch.missing.first()?;
    let prefix = mismatch.unknown.iter().find_map(|name| name.strip_suffix(missing.as_str()))?;
    Some(format!("a prefix before the names, {prefix:?}: save the model without what it was wrapped in"))
}

impl From<gptoss::Error> for Failure {
    fn from(error: gptoss::Error) -> Failure {
        match error {
            gptoss::Error::Checkpoint(error) => error.into(),
            gptoss::Error::Memory { .. }
            | gptoss::Error::NoRoom { .. }
            | gptoss::Error::NoDevice(_)
            | gptoss::Error::Device(_) => Failure::machine(error.to_string()),
            _ => Failure::input(error.to_string()),
        }
    }
}

impl From<quantize::Error> for Failure {
    fn from(error: quantize::Error) -> Failure {
        match error {
            quantize::Error::Checkpoint(error) => error.into(),
            quantize::Error::OneProduct { .. } => Failure::input(error.to_string())
                .hint("--recipe linear --algorithm max quantizes all of them anew"),
            _ => Failure::input(error.to_string()),
        }
    }
}

impl From<harmony::Error> for Failure {
    fn from(error: harmony::Error) -> Failure {
        Failure::input(error.to_string())
    }
}

impl From<tokenizer::Error> for Failure {
    fn from(error: tokenizer::Error) -> Failure {
        match &error {
            tokenizer::Error::Io { source, .. } => Failure::new(status_of(source), error.to_string()),
            _ => Failure::input(error.to_string()),
        }
    }
}
