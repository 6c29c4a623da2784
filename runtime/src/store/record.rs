//! What the store remembers of a model it holds.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{error::StoreError, part};

/// Name of the record in the folder of its model. It is written last: where it is, the model is complete.
pub(super) const RECORD: &str = "thinkey.json";

/// Where a model came from and what its files are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Name it was pulled by.
    pub name: String,
    /// The source that served it.
    pub source: String,
    /// Commit of the repository, or version of the package.
    pub revision: String,
    /// When, in UTC (RFC 3339).
    pub pulled: String,
    /// The file that is the model; none where the whole folder is.
    pub entry: Option<String>,
    /// Every file.
    pub files: Vec<FileRecord>,
}

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Name in the folder of the model.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 in lower-case hexadecimal, as computed while it was written.
    pub sha256: String,
}

impl Record {
    /// Bytes of all files together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }

    /// The record in `folder`, if there is one and every file it names is there in its full length. A damaged record
    /// counts as none, so that a pull repairs it.
    pub(super) fn read(folder: &Path) -> Result<Option<Self>, StoreError> {
        let path = folder.join(RECORD);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(cause) if matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(cause) => return Err(StoreError::read(&path, cause)),
        };
        let record: Self = match serde_json::from_slice(&text) {
            Ok(record) => record,
            Err(error) => {
                tracing::warn!("{} is damaged and is ignored: {error}", path.display());
                return Ok(None);
            }
        };
        let whole = record.files.iter().all(|file| {
            let found = fs::metadata(folder.join(&file.name));
            found.is_ok_and(|found| found.is_file() && found.len() == file.bytes)
        });
        Ok(whole.then_some(record))
    }

    pub(super) fn write(&self, folder: &Path) -> Result<(), StoreError> {
        let mut text = serde_json::to_vec_pretty(self).expect("strings and integers always serialise");
        text.push(b'\n');
        part::write_whole(&folder.join(RECORD), &text)
    }

    /// What to open: the file, or the folder.
    pub(super) fn path(&self, folder: &Path) -> PathBuf {
        self.entry.as_ref().map_or_else(|| folder.to_path_buf(), |entry| folder.join(entry))
    }
}
