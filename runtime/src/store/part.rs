//! A file on its way into the store.
//!
//! Bytes go to `<name>.part` beside the target and through SHA-256 at once. Only a complete file of the right content
//! is renamed, after it has been flushed to the disk: whenever the process or the power dies, the final name holds
//! either the whole file or nothing.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{Read, Seek},
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use super::{OnProgress, Progress, error::StoreError, record::FileRecord};

/// Bytes moved between two looks at the progress callback.
pub(super) const CHUNK: usize = 128 << 10;

/// What a file should be, as far as it is known beforehand.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    /// How messages call it.
    pub what: String,
    /// Length in bytes.
    pub bytes: Option<u64>,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: Option<String>,
}

impl Expected {
    fn check_length(&self, found: u64) -> Result<(), StoreError> {
        match self.bytes {
            Some(expected) if expected != found => Err(StoreError::Length { what: self.what.clone(), expected, found }),
            _ => Ok(()),
        }
    }
}

/// A file being written.
#[derive(Debug)]
pub(super) struct Part<'a> {
    expected: &'a Expected,
    target: PathBuf,
    path: PathBuf,
    file: File,
    hasher: Sha256,
    len: u64,
}

impl<'a> Part<'a> {
    /// Opens the part file of `target`, keeping and hashing what an earlier attempt left. Without a digest to check the
    /// result against, and where it is longer than it should be, what is left cannot be trusted and goes.
    ///
    /// Fails at once where the file system has no room for the rest.
    pub fn open(target: &Path, expected: &'a Expected, progress: &mut OnProgress<'_>) -> Result<Self, StoreError> {
        let path = part_path(target);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(expected.sha256.is_none())
            .open(&path)
            .map_err(|cause| StoreError::write(&path, expected.bytes.unwrap_or(0), cause))?;
        let left = file.metadata().map_err(|cause| StoreError::read(&path, cause))?.len();
        let mut part = Self { expected, target: target.to_path_buf(), path, file, hasher: Sha256::new(), len: 0 };
        if expected.bytes.is_some_and(|bytes| left > bytes) {
            part.restart()?;
        } else if left > 0 {
            part.len = hash(&mut part.file, left, &part.path, &mut part.hasher, &expected.what, progress)?;
        }
        part.check_space()?;
        Ok(part)
    }

    /// Bytes that are there.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether every byte is there.
    pub fn is_complete(&self) -> bool {
        self.expected.bytes == Some(self.len)
    }

    /// Empties the file.
    pub fn restart(&mut self) -> Result<(), StoreError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .map_err(|cause| StoreError::Write { path: self.path.clone(), cause })?;
        self.hasher = Sha256::new();
        self.len = 0;
        Ok(())
    }

    /// Appends `bytes`. More bytes than expected are refused, so that no server fills the disk.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        use std::io::Write as _;

        let len = self.len + bytes.len() as u64;
        if self.expected.bytes.is_some_and(|expected| len > expected) {
            self.expected.check_length(len)?;
        }
        self.file.write_all(bytes).map_err(|cause| StoreError::write(&self.path, self.missing(), cause))?;
        self.hasher.update(bytes);
        self.len = len;
        Ok(())
    }

    /// Checks length and digest and moves the file to its final name. A file that fails is removed, so that the next
    /// attempt starts clean.
    pub fn finish(self) -> Result<FileRecord, StoreError> {
        let found = hex(&self.hasher.clone().finalize());
        let checked = self.expected.check_length(self.len).and_then(|()| match &self.expected.sha256 {
            Some(expected) if *expected != found => Err(StoreError::Checksum {
                what: self.expected.what.clone(),
                expected: expected.clone(),
                found: found.clone(),
            }),
            _ => Ok(()),
        });
        if let Err(error) = checked {
            self.discard();
            return Err(error);
        }
        self.file
            .sync_all()
            .and_then(|()| fs::rename(&self.path, &self.target))
            .and_then(|()| sync_folder(&self.target))
            .map_err(|cause| StoreError::write(&self.path, 0, cause))?;
        let name = self.target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(FileRecord { name, bytes: self.len, sha256: found })
    }

    /// Removes the file.
    pub fn discard(self) {
        // Nothing better can be done: the next attempt truncates it.
        let _ = fs::remove_file(&self.path);
    }

    fn missing(&self) -> u64 {
        self.expected.bytes.map_or(0, |bytes| bytes - self.len)
    }

    fn check_space(&self) -> Result<(), StoreError> {
        let folder = self.path.parent().unwrap_or(&self.path);
        // A file system that does not tell its free space is tried anyway.
        match fs4::available_space(folder) {
            Ok(available) if available < self.missing() => Err(StoreError::NoSpace {
                path: folder.to_path_buf(),
                needed: self.missing(),
                available: Some(available),
            }),
            _ => Ok(()),
        }
    }
}

/// `<name>.part` beside `target`.
fn part_path(target: &Path) -> PathBuf {
    let mut name = target.file_name().map(OsString::from).unwrap_or_default();
    name.push(".part");
    target.with_file_name(name)
}

/// Writes a small file in one piece: never seen half-written.
pub(super) fn write_whole(target: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let path = part_path(target);
    let write = || {
        fs::write(&path, bytes)?;
        File::open(&path)?.sync_all()?;
        fs::rename(&path, target)?;
        sync_folder(target)
    };
    write().map_err(|cause| StoreError::write(&path, bytes.len() as u64, cause))
}

/// SHA-256 of the file at `path`, in lower-case hexadecimal, and its length.
pub(super) fn digest(path: &Path, what: &str, progress: &mut OnProgress<'_>) -> Result<(String, u64), StoreError> {
    let mut file = File::open(path).map_err(|cause| StoreError::read(path, cause))?;
    let len = file.metadata().map_err(|cause| StoreError::read(path, cause))?.len();
    let mut hasher = Sha256::new();
    let len = hash(&mut file, len, path, &mut hasher, what, progress)?;
    Ok((hex(&hasher.finalize()), len))
}

/// Hashes the next `len` bytes of `file`; returns how many there were.
fn hash(
    file: &mut File,
    len: u64,
    path: &Path,
    hasher: &mut Sha256,
    what: &str,
    progress: &mut OnProgress<'_>,
) -> Result<u64, StoreError> {
    let mut buffer = vec![0; CHUNK];
    let mut reader = file.take(len);
    let mut done = 0;
    loop {
        match reader.read(&mut buffer).map_err(|cause| StoreError::read(path, cause))? {
            0 => return Ok(done),
            n => {
                hasher.update(&buffer[..n]);
                done += n as u64;
                report(progress, Progress::Checked { what, done_bytes: done, total_bytes: len })?;
            }
        }
    }
}

/// Tells the caller; an error if it answers that it wants to stop.
pub(super) fn report(progress: &mut OnProgress<'_>, event: Progress<'_>) -> Result<(), StoreError> {
    match progress(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(StoreError::Cancelled),
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the renaming of `target` itself survive a power cut.
fn sync_folder(target: &Path) -> std::io::Result<()> {
    match target.parent() {
        // Other systems cannot open a folder for this.
        Some(folder) if cfg!(unix) => File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // From the examples of FIPS 180-2.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn expected(bytes: u64) -> Expected {
        Expected { what: "abc".into(), bytes: Some(bytes), sha256: Some(ABC.into()) }
    }

    fn go_on(_: Progress<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    #[test]
    fn goes_on_where_an_earlier_attempt_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        let expected = expected(3);
        Part::open(&target, &expected, &mut go_on).unwrap().write(b"ab").unwrap();
        assert!(!target.exists());
        let mut part = Part::open(&target, &expected, &mut go_on).unwrap();
        assert_eq!(part.len(), 2);
        part.write(b"c").unwrap();
        assert_eq!(part.finish().unwrap(), FileRecord { name: "x".into(), bytes: 3, sha256: ABC.into() });
        assert_eq!(fs::read(&target).unwrap(), b"abc");
        assert!(!part_path(&target).exists());
    }

    #[test]
    fn wrong_content_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        let expected = expected(3);
        let mut part = Part::open(&target, &expected, &mut go_on).unwrap();
        part.write(b"abd").unwrap();
        assert!(matches!(part.finish(), Err(StoreError::Checksum { expected, .. }) if expected == ABC));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn too_short_and_too_long_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        let expected = expected(3);
        let mut part = Part::open(&target, &expected, &mut go_on).unwrap();
        part.write(b"ab").unwrap();
        assert!(matches!(part.write(b"cd"), Err(StoreError::Length { expected: 3, found: 4, .. })));
        assert!(matches!(part.finish(), Err(StoreError::Length { expected: 3, found: 2, .. })));
    }

    #[test]
    fn what_cannot_be_checked_is_not_resumed() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        fs::write(part_path(&target), "old").unwrap();
        let unknown = Expected { sha256: None, ..expected(3) };
        assert_eq!(Part::open(&target, &unknown, &mut go_on).unwrap().len(), 0);
        fs::write(part_path(&target), "longer than it should be").unwrap();
        assert_eq!(Part::open(&target, &expected(3), &mut go_on).unwrap().len(), 0);
    }

    #[test]
    fn more_than_the_disk_holds_is_refused_before_it_starts() {
        let folder = tempfile::tempdir().unwrap();
        let error = Part::open(&folder.path().join("x"), &expected(u64::MAX / 2), &mut go_on).unwrap_err();
        assert!(matches!(error, StoreError::NoSpace { needed, .. } if needed == u64::MAX / 2), "{error}");
        assert!(error.to_string().contains("set THINKEY_HOME"), "{error}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        std::os::unix::fs::symlink("/dev/full", part_path(&target)).unwrap();
        let expected = expected(3);
        let error = Part::open(&target, &expected, &mut go_on).unwrap().write(b"abc").unwrap_err();
        assert!(matches!(&error, StoreError::NoSpace { needed: 3, path, .. } if path == folder.path()), "{error}");
    }

    #[test]
    fn hashing_can_be_cancelled() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        fs::write(part_path(&target), "ab").unwrap();
        let error = Part::open(&target, &expected(3), &mut |_| ControlFlow::Break(())).unwrap_err();
        assert!(matches!(error, StoreError::Cancelled));
        assert_eq!(fs::read(part_path(&target)).unwrap(), b"ab");
    }
}
