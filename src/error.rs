//! The error every fallible function of the library returns.
//!
//! A message says what was wanted, what was found and what to do. The kind is what callers branch on: the server turns
//! it into a status, the command line into an exit code.

use std::path::Path;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, in the terms of who has to act.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller asked for something that cannot be: a bad flag, a bad request field.
    #[error("{0}")]
    Invalid(String),
    /// A thing that was named does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The caller may see the thing, but not do that to it.
    #[error("{0}")]
    Denied(String),
    /// What was asked for contradicts what is there: a name that is taken, a frozen cube.
    #[error("{0}")]
    Conflict(String),
    /// The request or file is well formed, but this build does not do that.
    #[error("{0}")]
    Unsupported(String),
    /// A model file, tokenizer or template is damaged or inconsistent.
    #[error("{0}")]
    Format(String),
    /// A bound was reached: queue full, out of blocks, body too large.
    #[error("{0}")]
    Exhausted(String),
    /// The operating system or the network failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, with the path or address.
        context: String,
        /// The system's own error.
        source: std::io::Error,
    },
    /// A device (CPU thread pool, GPU driver) failed.
    #[error("{0}")]
    Device(String),
}

impl Error {
    /// An I/O error that names the file it happened on.
    pub fn io(action: &str, path: &Path, source: std::io::Error) -> Self {
        Error::Io { context: format!("cannot {action} {}", path.display()), source }
    }
}

/// Builds an [`Error::Invalid`] from format arguments.
#[macro_export]
macro_rules! invalid {
    ($($arg:tt)*) => { $crate::Error::Invalid(format!($($arg)*)) };
}

/// Builds an [`Error::Format`] from format arguments.
#[macro_export]
macro_rules! malformed {
    ($($arg:tt)*) => { $crate::Error::Format(format!($($arg)*)) };
}

/// Builds an [`Error::Unsupported`] from format arguments.
#[macro_export]
macro_rules! unsupported {
    ($($arg:tt)*) => { $crate::Error::Unsupported(format!($($arg)*)) };
}
