//! Files as shared bytes, without reading them.

use super::WeightsError;
use bytes::Bytes;
use memmap2::Mmap;
use std::{fs::File, io::Read, ops::Range, path::Path, sync::Arc};

/// The memory maps of a model's files, whose pages can be given back to the system.
#[derive(Clone, Debug, Default)]
pub struct Maps(Vec<Arc<Mmap>>);

/// A part of a mapped file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Which of the maps.
    map: usize,
    /// Its bytes.
    range: Range<usize>,
}

impl Maps {
    /// Where `bytes` lie; `None` where they are in no map.
    #[must_use]
    pub fn find(&self, bytes: &[u8]) -> Option<Mapped> {
        let start = bytes.as_ptr().addr();
        self.0.iter().enumerate().find_map(|(map, owner)| {
            let from = start.checked_sub(owner.as_ptr().addr())?;
            let range = from..from.checked_add(bytes.len())?;
            (range.end <= owner.len()).then_some(Mapped { map, range })
        })
    }

    /// Takes the pages of `parts` out of the process's memory. They stay in the system's cache as long as it likes, and
    /// whoever touches them has them back: nothing changes but how much memory is held.
    pub fn release<'a>(&self, parts: impl IntoIterator<Item = &'a Mapped>) {
        for Mapped { map, range } in parts {
            if let Some(map) = self.0.get(*map) {
                release(map, range.clone());
            }
        }
    }

    /// [`release`](Self::release) for all of every map.
    pub fn release_all(&self) {
        self.0.iter().for_each(|map| release(map, 0..map.len()));
    }
}

/// The pages that `range` touches.
#[cfg(target_os = "linux")]
fn release(map: &Mmap, range: Range<usize>) {
    // SAFETY: the map is private, read-only and of a file (nothing else becomes `Maps`), so a page that is gone is read
    // from the file again, with the same content: what is borrowed from the map does not change.
    #[allow(unsafe_code)]
    // Only a hint; without it pages stay.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
}

/// Elsewhere pages stay until the system wants them.
#[cfg(not(target_os = "linux"))]
fn release(_: &Mmap, _: Range<usize>) {}

/// A map as the owner of bytes.
struct Owner(Arc<Mmap>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// The bytes of the regular file at `path`, memory-mapped: pages are read when they are touched and are shared by all
/// processes that run the same model. The map is added to `maps`.
pub(super) fn map(path: &Path, maps: &mut Maps) -> Result<Bytes, WeightsError> {
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
    let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(io)?);
    maps.0.push(Arc::clone(&map));
    Ok(Bytes::from_owner(Owner(map)))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// KiB of a map that are in the process's memory.
    #[cfg(target_os = "linux")]
    fn resident(map: &Mmap) -> usize {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", map.as_ptr().addr());
        let of_map = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let rss = of_map.skip(1).find_map(|line| line.strip_prefix("Rss:")).unwrap();
        rss.trim().strip_suffix(" kB").unwrap().parse().unwrap()
    }

    #[test]
    fn released_pages_are_gone_and_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let content: Vec<u8> = (0..3 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let mut maps = Maps::default();
        let bytes = map(&path, &mut maps).unwrap();
        assert_eq!(bytes, content);
        #[cfg(target_os = "linux")]
        assert_eq!(resident(&maps.0[0]), 3 << 10);
        let part = maps.find(&bytes[1 << 20..2 << 20]).unwrap();
        assert_eq!(part, Mapped { map: 0, range: 1 << 20..2 << 20 });
        maps.release([&part]);
        // What shares a large page with them may go too.
        #[cfg(target_os = "linux")]
        assert!(resident(&maps.0[0]) <= 2 << 10);
        maps.release_all();
        #[cfg(target_os = "linux")]
        assert_eq!(resident(&maps.0[0]), 0);
        assert_eq!(bytes, content);
        assert_eq!(maps.find(&content), None, "it is in memory of its own");
    }
}
