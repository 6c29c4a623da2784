//! Boards: how much memory there is, how much the system keeps, and how fast it is read.

use super::{SimError, named};
use serde::{Deserialize, Serialize};
use std::path::Path;
use thinkey::plan::Size;

/// A board's profile: a TOML file of four lines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Board {
    /// What it is called.
    pub name: String,
    /// All of its memory.
    pub memory: Size,
    /// What firmware and operating system keep of it.
    pub system: Size,
    /// GB (10⁹ bytes) a second that it is read at, at most.
    pub bandwidth: f64,
}

macro_rules! shipped {
    ($($name:literal),*) => { [$(($name, include_str!(concat!("../../boards/", $name, ".toml")))),*] };
}

/// Profiles that ship with the program, by the names that scenarios use.
pub const SHIPPED: [(&str, &str); 6] =
    shipped!["orin-nano-4gb", "orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb"];

impl Board {
    /// The profile of a shipped name, or of a TOML file beside `home`.
    ///
    /// # Errors
    /// [`SimError`] where there is none, or one whose numbers cannot be.
    pub fn find(name: &str, home: &Path) -> Result<Self, SimError> {
        let board: Self = named("board", &SHIPPED, name, home)?;
        let wrong = |what: &str| SimError::Board { board: board.name.clone(), what: what.to_owned() };
        if board.system >= board.memory {
            return Err(wrong("the system keeps all of its memory"));
        }
        if !(board.bandwidth > 0.0 && board.bandwidth.is_finite()) {
            return Err(wrong("its bandwidth is no number of GB a second"));
        }
        Ok(board)
    }

    /// Bytes that are left for a program.
    #[must_use]
    pub const fn budget(&self) -> u64 {
        self.memory.0 - self.system.0
    }

    /// Seconds that reading `bytes` takes at least.
    #[must_use]
    pub fn seconds(&self, bytes: usize) -> f64 {
        bytes as f64 / (self.bandwidth * 1e9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, fs};

    #[test]
    fn every_shipped_board_is_listed_and_can_be() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("boards");
        let files: BTreeSet<String> =
            fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        let listed: BTreeSet<String> = SHIPPED.iter().map(|(name, _)| format!("{name}.toml")).collect();
        assert_eq!(files, listed);
        let budgets: Vec<u64> =
            SHIPPED.iter().map(|(name, _)| Board::find(name, Path::new(".")).unwrap().budget()).collect();
        assert!(budgets.is_sorted(), "{budgets:?}");
    }

    #[test]
    fn boards_that_cannot_be_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        let find = |text: &str| {
            fs::write(&path, text).unwrap();
            Board::find("mine.toml", folder.path())
        };
        let board = find("name='mine'\nmemory='2GiB'\nsystem='1GiB'\nbandwidth=10.0").unwrap();
        assert_eq!((board.budget(), board.seconds(5_000_000_000)), (1 << 30, 0.5));
        for text in [
            "name='mine'\nmemory='2GiB'\nsystem='2GiB'\nbandwidth=10.0",
            "name='mine'\nmemory='2GiB'\nsystem='1GiB'\nbandwidth=0.0",
            "name='mine'\nmemory='2GiB'\nsystem='1GiB'\nbandwidth=nan",
            "name='mine'\nmemory='2GiB'\nsystem='1GiB'",
            "name='mine'\nmemory='2GiB'\nsystem='1GiB'\nbandwidth=10.0\ncolour='red'",
        ] {
            assert!(find(text).is_err(), "{text}");
        }
        let error = Board::find("orin-nano", Path::new(".")).unwrap_err().to_string();
        assert!(error.contains("orin-nano-8gb"), "{error}");
    }
}
