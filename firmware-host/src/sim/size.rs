//! Sizes and times as scenario files write them: `"1.5GiB"`, `"120ms"`.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::{fmt, str::FromStr, time::Duration};

/// Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// Powers of 1000 are those of the SI, powers of 1024 have an i.
const UNITS: [(&str, u64); 7] = [
    ("B", 1),
    ("kB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let malformed = || format!("a size is a number with B, kB, MB, GB, KiB, MiB or GiB, not {text:?}");
        let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
        let (number, unit) = (text[..split].trim(), &text[split..]);
        let (_, factor) = *UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(malformed)?;
        let number: f64 = number.parse().map_err(|_| malformed())?;
        let bytes = number * factor as f64;
        if (0.0..=(1u64 << 50) as f64).contains(&bytes) { Ok(Self(bytes as u64)) } else { Err(malformed()) }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        indicatif::HumanBytes(self.0).fmt(f)
    }
}

/// A length of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map(Self).map_err(|cause| D::Error::custom(format!("{text:?}: {cause}")))
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0.as_secs_f64())
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Both {
        size: Bytes,
        time: Time,
    }

    fn read(size: &str, time: &str) -> Result<Both, toml::de::Error> {
        toml::from_str(&format!("size = {size:?}\ntime = {time:?}"))
    }

    #[test]
    fn sizes_and_times_are_read() {
        let both = read("1.5GiB", "120ms").unwrap();
        assert_eq!((both.size, both.time), (Bytes(3 << 29), Time(Duration::from_millis(120))));
        assert_eq!(read("34 kB", "2s").unwrap().size, Bytes(34_000));
    }

    #[test]
    fn other_texts_are_refused() {
        for size in ["", "12", "-1GiB", "GiB", "1XB", "nanGiB", "1e30GiB", "½GiB"] {
            assert!(read(size, "1s").is_err(), "{size}");
        }
        assert!(read("1B", "fast").is_err());
    }
}
