//! Sizes on the command line: `2GiB`, `1.5 GB`, `300000000`.

use std::str::FromStr;

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

/// Bytes, as the command line gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub usize);

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
        match usize::try_from(bytes) {
            Ok(bytes) if bytes > 0 && bytes <= isize::MAX as usize => Ok(Self(bytes)),
            _ => Err(SizeError::Range(text.to_owned())),
        }
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
