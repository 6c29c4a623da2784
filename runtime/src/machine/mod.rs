//! The machine that this runs on, as far as its system tells: processor, memory, power mode, NVIDIA's driver.
//!
//! Everything is read from files of the kernel's and of NVIDIA's Jetson Linux. What is not there is not told; nothing fails.
//!
//! | file | what |
//! |---|---|
//! | `/proc/cpuinfo`, `/proc/device-tree/model` | processor and board |
//! | `/proc/meminfo`, `/proc/swaps` | [memory](Memory) |
//! | `/etc/nv_tegra_release` | release of Jetson Linux |
//! | `/etc/nvpmodel.conf`, `/var/lib/nvpmodel/status` | [power mode](PowerMode) of a Jetson |
//! | `/sys/firmware/acpi/platform_profile` | that of a PC |
//! | `/sys/class/devfreq` | [clock](Clock) of a Jetson's GPU |
//! | `/proc/driver/nvidia/version` | NVIDIA's kernel module |

mod memory;
mod power;

pub use memory::{Memory, kilobytes};
pub use power::{Clock, PowerMode};

use serde::Serialize;
use std::{fs, path::Path};

/// What is known of a machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Machine {
    /// What the board calls itself, where it does.
    pub board: Option<String>,
    /// What the processor calls itself, where it does.
    pub processor: Option<String>,
    /// Release of Jetson Linux, as 36.4.3.
    pub jetson_linux: Option<String>,
    /// Memory, where the system tells.
    pub memory: Option<Memory>,
    /// The power mode, where there are some.
    pub power_mode: Option<PowerMode>,
    /// The clock of a GPU that the system governs.
    pub gpu_clock: Option<Clock>,
    /// Version of NVIDIA's kernel module, where it is loaded.
    pub nvidia_module: Option<String>,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn read() -> Self {
        Self::read_from(Path::new("/"))
    }

    /// The one whose files are under `root`.
    #[must_use]
    pub fn read_from(root: &Path) -> Self {
        Self {
            // Strings of a device tree end in a zero.
            board: text(root, "proc/device-tree/model").map(|model| model.trim_end_matches('\0').trim().to_owned()),
            processor: text(root, "proc/cpuinfo").and_then(|text| processor(&text)),
            jetson_linux: text(root, "etc/nv_tegra_release").and_then(|text| jetson_linux(&text)),
            memory: Memory::read_from(root),
            power_mode: PowerMode::read_from(root),
            gpu_clock: Clock::read_from(root),
            nvidia_module: text(root, "proc/driver/nvidia/version").and_then(|text| nvidia_module(&text)),
        }
    }

    /// Whether it is a board of NVIDIA's Jetson family.
    #[must_use]
    pub fn is_jetson(&self) -> bool {
        self.jetson_linux.is_some()
    }
}

/// The file `path` under `root`, if it can be read.
fn text(root: &Path, path: &str) -> Option<String> {
    fs::read_to_string(root.join(path)).ok()
}

/// The number that the file `path` under `root` holds.
fn number(root: &Path, path: &str) -> Option<u64> {
    text(root, path)?.trim().parse().ok()
}

/// `model name` of the first processor.
fn processor(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// `# R36 (release), REVISION: 4.3, …` is 36.4.3.
fn jetson_linux(release: &str) -> Option<String> {
    let major = release.trim_start_matches(['#', ' ']).strip_prefix('R')?.split(' ').next()?;
    let revision = release.split_once("REVISION: ")?.1.split([',', '\n']).next()?;
    Some(format!("{major}.{}", revision.trim()))
}

/// The first word that is numbers with points between, of the module's line.
fn nvidia_module(version: &str) -> Option<String> {
    let line = version.lines().find(|line| line.starts_with("NVRM version:"))?;
    let is_version = |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    line.split_whitespace().find(is_version).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes files under a root of their own.
    pub(super) fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn a_jetson_tells_what_it_is() {
        let root = root(&[
            ("proc/device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0"),
            ("proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 62.50\nCPU implementer\t: 0x41\n"),
            (
                "etc/nv_tegra_release",
                "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed\n# KERNEL_VARIANT: oot\n",
            ),
            (
                "proc/driver/nvidia/version",
                "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@mobile)\n\
                 GCC version:  collect2: error: ld returned 1 exit status\n",
            ),
        ]);
        let machine = Machine::read_from(root.path());
        assert_eq!(machine.board.as_deref(), Some("NVIDIA Jetson AGX Orin Developer Kit"));
        assert_eq!(machine.jetson_linux.as_deref(), Some("36.4.3"));
        assert_eq!(machine.nvidia_module.as_deref(), Some("540.4.0"));
        assert!(machine.is_jetson() && machine.processor.is_none());
    }

    #[test]
    fn a_pc_tells_what_it_is() {
        let root = root(&[
            ("proc/cpuinfo", "processor\t: 0\nmodel name\t: AMD EPYC 7B13\nprocessor\t: 1\nmodel name\t: other\n"),
            (
                "proc/driver/nvidia/version",
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n",
            ),
        ]);
        let machine = Machine::read_from(root.path());
        assert_eq!(machine.processor.as_deref(), Some("AMD EPYC 7B13"));
        assert_eq!(machine.nvidia_module.as_deref(), Some("550.54.14"));
        assert!(!machine.is_jetson());
    }

    #[test]
    fn files_of_another_form_tell_nothing() {
        assert_eq!(Machine::read_from(root(&[]).path()), Machine::default());
        let odd = root(&[
            ("proc/cpuinfo", "model name\n"),
            ("etc/nv_tegra_release", "R36"),
            ("proc/driver/nvidia/version", "NVRM version: none\n"),
            ("proc/meminfo", "MemTotal: much\n"),
            ("var/lib/nvpmodel/status", "pmode:x"),
            ("sys/class/devfreq/17000000.gpu/cur_freq", "fast"),
        ]);
        assert_eq!(Machine::read_from(odd.path()), Machine::default());
    }
}
