//! What can be wrong with a model folder, each as a sentence that names the file or tensor.

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
}
