//! Times as scenario files write them: `"120ms"`.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::{fmt, time::Duration};

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
        // As no other, zero has no unit that is right.
        if self.0.is_zero() { f.write_str("0s") } else { write!(f, "{:.1?}", self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thinkey::plan::Size;

    #[derive(Deserialize)]
    struct Both {
        size: Size,
        time: Time,
    }

    fn read(size: &str, time: &str) -> Result<Both, toml::de::Error> {
        toml::from_str(&format!("size = {size:?}\ntime = {time:?}"))
    }

    #[test]
    fn sizes_and_times_are_read() {
        let both = read("1.5GiB", "120ms").unwrap();
        assert_eq!((both.size, both.time), (Size(3 << 29), Time(Duration::from_millis(120))));
        assert_eq!(read("34 kB", "2s").unwrap().size, Size(34_000));
    }

    #[test]
    fn other_texts_are_refused() {
        for size in ["", "-1GiB", "GiB", "1XB", "nanGiB", "1e30GiB", "½GiB", "0B"] {
            assert!(read(size, "1s").is_err(), "{size}");
        }
        assert!(read("1B", "fast").is_err());
    }
}
