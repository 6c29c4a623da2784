//! Files as shared bytes, without reading them.

use super::WeightsError;
use bytes::Bytes;
use std::{fs::File, io::Read, path::Path};

/// The bytes of the regular file at `path`, memory-mapped: pages are read when they are touched and are shared by all
/// processes that run the same model.
pub(super) fn map(path: &Path) -> Result<Bytes, WeightsError> {
    let io = |cause| WeightsError::Io { path: path.to_owned(), cause };
    let file = open(path)?;
    // An empty mapping is an error on some systems.
    if file.metadata().map_err(io)?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the mapping is private and read-only, and nobody in this process writes to model files: they are
    // replaced by renaming, which leaves mapped pages alone. What another process does to a file in place is as
    // undefined here as for every program that maps its data; all parsing is bounds-checked, and no invariant of a
    // type depends on what is read.
    #[allow(unsafe_code)]
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from_owner(map))
}

/// The whole of a small text file; `None` where it is longer than `limit` bytes.
pub(super) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, WeightsError> {
    let mut bytes = Vec::new();
    let read = open(path)?.take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|cause| WeightsError::Io { path: path.to_owned(), cause })?;
    Ok((bytes.len() as u64 <= limit).then_some(bytes))
}

/// Opens a regular file; a pipe would block, a device never end.
fn open(path: &Path) -> Result<File, WeightsError> {
    let io = |cause| WeightsError::Io { path: path.to_owned(), cause };
    if !path.metadata().map_err(io)?.is_file() {
        return Err(WeightsError::NotAFile { path: path.to_owned() });
    }
    File::open(path).map_err(io)
}
