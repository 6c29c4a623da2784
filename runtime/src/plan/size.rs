//! Sizes as people write them: `2GiB`, `1.5 GB`, `300000000`.

use indicatif::HumanBytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::{fmt, str::FromStr};

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No number, or no unit that there is.
    #[error("a size is a number of bytes, or one with kB, MB, GB, KiB, MiB or GiB, as 1.5GiB; not {0:?}")]
    Malformed(String),
    /// No byte at all, or more than there can be.
    #[error("a size of {0} is outside what memory can be")]
    Range(String),
}

/// Bytes, as command lines and files give them: written in a unit, serialised as a number.
///
/// ```
/// use thinkey::plan::Size;
/// assert_eq!("1.5GiB".parse(), Ok(Size(3 << 29)));
/// assert!("0".parse::<Size>().is_err(), "a limit of nothing is a slip");
/// assert_eq!(Size(3 << 29).to_string(), "1.50 GiB");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Powers of 1000 are those of the SI, powers of 1024 have an i; case does not matter.
const UNITS: [(&str, u64); 8] = [
    ("", 1),
    ("b", 1),
    ("kb", 1000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
];

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let malformed = || SizeError::Malformed(text.to_owned());
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit = unit.trim().to_ascii_lowercase();
        let (_, factor) = *UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(malformed)?;
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(factor).ok_or_else(|| SizeError::Range(text.to_owned()))?,
            // Saturates where it is too large.
            Err(_) => (number.parse::<f64>().map_err(|_| malformed())? * factor as f64) as u64,
        };
        // So that it is a length in memory, too.
        if bytes > 0 && usize::try_from(bytes).is_ok_and(|bytes| bytes <= isize::MAX as usize) {
            Ok(Self(bytes))
        } else {
            Err(SizeError::Range(text.to_owned()))
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        HumanBytes(self.0).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_either_kind_of_unit() {
        for (text, bytes) in [
            ("1", 1),
            ("300000000", 300_000_000),
            ("12 B", 12),
            ("2GiB", 2 << 30),
            ("2gib", 2 << 30),
            ("2 GB", 2_000_000_000),
            ("1.5MiB", 3 << 19),
            ("0.25kB", 250),
            ("64KiB", 64 << 10),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "GiB", "2G", "2 Gi", "-1", "1e9", "1.2.3MB", "2GiB!", ".", "nan", "½MB"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::Malformed(text.to_owned())), "{text}");
        }
        for text in ["0", "0.1", "99999999999999999999", "20000000000GiB", "9e"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!("0GiB".parse::<Size>(), Err(SizeError::Range("0GiB".to_owned())));
    }
}
