//! Memory of the machine.

use super::text;
use serde::Serialize;
use std::path::Path;

/// Memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// All of it.
    pub total: usize,
    /// What can be had without swapping. On boards where GPU and processor share memory this, and not what is free, is what
    /// a GPU can have too: the rest of what is free is cached files, which the kernel gives up.
    pub available: usize,
    /// Swap.
    pub swap: usize,
    /// Swap that is in use.
    pub swap_used: usize,
    /// Whether some of the swap is memory itself, compressed (zram).
    pub zram: bool,
}

impl Memory {
    /// Of this machine, where its system tells.
    #[must_use]
    pub fn read() -> Option<Self> {
        Self::read_from(Path::new("/"))
    }

    /// Of the machine whose files are under `root`.
    pub(super) fn read_from(root: &Path) -> Option<Self> {
        let entries = text(root, "proc/meminfo")?;
        let entry = |name: &str| kilobytes(&entries, name);
        let swap = entry("SwapTotal:").unwrap_or(0);
        let swaps = text(root, "proc/swaps").unwrap_or_default();
        Some(Self {
            total: entry("MemTotal:")?,
            available: entry("MemAvailable:")?,
            swap,
            swap_used: swap.saturating_sub(entry("SwapFree:").unwrap_or(swap)),
            zram: swaps.lines().any(|line| line.starts_with("/dev/zram")),
        })
    }
}

/// The entry `name` of a file of the kernel's that counts in units of 1,024 bytes, in bytes.
#[must_use]
pub fn kilobytes(entries: &str, name: &str) -> Option<usize> {
    let line = entries.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::{super::tests::root, *};

    #[test]
    fn memory_and_swap_are_read() {
        let meminfo = "MemTotal:       64349640 kB\nMemFree:        40000000 kB\nMemAvailable:   60000000 kB\n\
                       SwapCached:            0 kB\nSwapTotal:      32174820 kB\nSwapFree:       32174720 kB\n";
        let swaps = "Filename\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/zram0  partition\t2681232\t100\t5\n";
        let read = |files: &[(&str, &str)]| Memory::read_from(root(files).path());
        let expected = Memory {
            total: 64_349_640 << 10,
            available: 60_000_000 << 10,
            swap: 32_174_820 << 10,
            swap_used: 100 << 10,
            zram: true,
        };
        assert_eq!(read(&[("proc/meminfo", meminfo), ("proc/swaps", swaps)]), Some(expected));
        assert_eq!(read(&[("proc/meminfo", meminfo)]), Some(Memory { zram: false, ..expected }));
        let small = "MemTotal: 10 kB\nMemAvailable: 5 kB\n";
        let expected = Memory { total: 10 << 10, available: 5 << 10, swap: 0, swap_used: 0, zram: false };
        assert_eq!(read(&[("proc/meminfo", small)]), Some(expected));
        assert_eq!(read(&[("proc/meminfo", "MemTotal: 10 kB\n")]), None);
        assert_eq!(read(&[("proc/meminfo", "MemTotal: 99999999999999999999 kB\nMemAvailable: 5 kB\n")]), None);
    }
}
