//! Power modes and clocks, which bound speed more than anything on a board.

use super::{number, text};
use serde::Serialize;
use std::{fs, path::Path};

/// A power mode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PowerMode {
    /// Its number, on a Jetson: what `nvpmodel -m` takes.
    pub number: Option<u32>,
    /// Its name.
    pub name: Option<String>,
}

impl PowerMode {
    /// Of the machine whose files are under `root`: as `nvpmodel` left it, or as the firmware of a PC has it.
    pub(super) fn read_from(root: &Path) -> Option<Self> {
        let set = text(root, "var/lib/nvpmodel/status").and_then(|status| status_number(&status));
        let models = text(root, "etc/nvpmodel.conf").unwrap_or_default();
        if let Some(mode) = set.or_else(|| default_number(&models)) {
            return Some(Self { number: Some(mode), name: model_name(&models, mode) });
        }
        let profile = text(root, "sys/firmware/acpi/platform_profile")?.trim().to_owned();
        (!profile.is_empty()).then_some(Self { number: None, name: Some(profile) })
    }
}

/// `pmode:0002 fmode:fanNull` is 2.
fn status_number(status: &str) -> Option<u32> {
    let digits = status.split_once("pmode:")?.1.split_whitespace().next()?;
    digits.parse().ok()
}

/// `< PM_CONFIG DEFAULT=2 >` is 2: what holds until another is set.
fn default_number(models: &str) -> Option<u32> {
    let line = models.lines().map(str::trim).find(|line| line.starts_with("< PM_CONFIG "))?;
    field(line, "DEFAULT=")?.parse().ok()
}

/// NAME of `< POWER_MODEL ID=2 NAME=MODE_30W >` for 2.
fn model_name(models: &str, mode: u32) -> Option<String> {
    let mut lines = models.lines().map(str::trim).filter(|line| line.starts_with("< POWER_MODEL "));
    let line = lines.find(|line| field(line, "ID=").and_then(|id| id.parse().ok()) == Some(mode))?;
    field(line, "NAME=").map(str::to_owned)
}

/// What follows `name` in one of the words of `line`.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(name))
}

/// The clock of a GPU, in hertz.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Clock {
    /// As it runs now.
    pub now: u64,
    /// The fastest that the power mode allows.
    pub most: u64,
    /// What decides between.
    pub governor: Option<String>,
}

/// What the GPUs of Jetsons are called: Orin's, and those of Xavier and TX2.
const GPUS: [&str; 5] = [".gpu", ".ga10b", ".gv11b", ".gp10b", ".gm20b"];

impl Clock {
    /// Of the machine whose files are under `root`.
    pub(super) fn read_from(root: &Path) -> Option<Self> {
        const DEVICES: &str = "sys/class/devfreq";
        let mut entries = fs::read_dir(root.join(DEVICES)).ok()?.flatten().map(|entry| entry.file_name());
        let name = entries.find_map(|name| {
            let name = name.into_string().ok()?;
            GPUS.iter().any(|gpu| name.ends_with(gpu)).then_some(name)
        })?;
        let file = |file: &str| format!("{DEVICES}/{name}/{file}");
        Some(Self {
            now: number(root, &file("cur_freq"))?,
            most: number(root, &file("max_freq"))?,
            governor: text(root, &file("governor")).map(|governor| governor.trim().to_owned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::root, *};

    /// Excerpts of what Jetson Linux 36 has on an AGX Orin.
    const MODELS: &str = "< PARAM TYPE=FILE NAME=CPU_ONLINE >\nCORE_0 /sys/devices/system/cpu/cpu0/online\n\
        < POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\nGPU MAX_FREQ -1\n\
        < POWER_MODEL ID=2 NAME=MODE_30W >\nGPU MAX_FREQ 612000000\n\
        # mandatory section to configure the default power mode\n< PM_CONFIG DEFAULT=2 >\n";

    fn mode(files: &[(&str, &str)]) -> Option<(Option<u32>, Option<String>)> {
        PowerMode::read_from(root(files).path()).map(|mode| (mode.number, mode.name))
    }

    #[test]
    fn the_mode_that_is_set_counts_before_the_default() {
        let conf = ("etc/nvpmodel.conf", MODELS);
        let named = |number, name: &str| Some((Some(number), Some(name.to_owned())));
        assert_eq!(mode(&[conf]), named(2, "MODE_30W"));
        assert_eq!(mode(&[conf, ("var/lib/nvpmodel/status", "pmode:0000 fmode:fanNull\n")]), named(0, "MAXN"));
        assert_eq!(mode(&[conf, ("var/lib/nvpmodel/status", "pmode:0007")]), Some((Some(7), None)));
        assert_eq!(mode(&[("var/lib/nvpmodel/status", "pmode:0001")]), Some((Some(1), None)));
        let profile = ("sys/firmware/acpi/platform_profile", "balanced\n");
        assert_eq!(mode(&[profile]), Some((None, Some("balanced".to_owned()))));
        assert_eq!(mode(&[]), None);
    }

    #[test]
    fn the_clock_is_that_of_the_gpu() {
        let clock = |name: &str| {
            let path = |file: &str| format!("sys/class/devfreq/{name}/{file}");
            let (now, most, governor) = (path("cur_freq"), path("max_freq"), path("governor"));
            let files = [(&*now, "306000000\n"), (&*most, "1300500000\n"), (&*governor, "nvhost_podgov\n")];
            Clock::read_from(root(&files).path())
        };
        let expected = Clock { now: 306_000_000, most: 1_300_500_000, governor: Some("nvhost_podgov".to_owned()) };
        assert_eq!(clock("17000000.gpu"), Some(expected.clone()));
        assert_eq!(clock("17000000.ga10b"), Some(expected));
        assert_eq!(clock("15340000.vic"), None);
    }
}
