//! A device's log: defmt frames in, records out.
//!
//! A frame carries an index and raw arguments; the strings stay in the ELF file of the firmware. So a
//! [`LogDecoder`] is made from the very file that runs on the device, and each of its [streams](LogDecoder::stream)
//! decodes one run of bytes from it:
//!
//! ```no_run
//! use thinkey_firmware_host::log::{Level, LogDecoder};
//!
//! let decoder = LogDecoder::new(&std::fs::read("firmware.elf")?)?;
//! let mut stream = decoder.stream(Level::Info);
//! for record in stream.decode(&std::fs::read("frames.bin")?) {
//!     println!("{record}");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! defmt frames have no checksum: damage within a frame may be noticed (the frame is counted and skipped) or may read
//! as another record. Either way the frames after it are whole, because a zero byte ends each. What is not guarded
//! against is a damaged length of a logged slice of formatted values: the library reserves memory for that many.
//! `thinkey-core` logs no such slices.

use defmt_decoder::{DecodeError, Frame, Locations, StreamDecoder, Table};
use serde::Serialize;
use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
};

/// Longest encoded frame in bytes. A stream that has no zero byte for longer is no defmt stream, and is not stored.
pub const MAX_FRAME: usize = 64 * 1024;

/// Why a firmware file cannot explain a log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file is no ELF file, or its defmt or debug information is damaged.
    #[error("cannot read the firmware's ELF file: {cause}")]
    Elf {
        /// What the ELF, DWARF or defmt reader says.
        cause: String,
    },
    /// The file has no `.defmt` section, or one without log statements.
    #[error(
        "the firmware has no log statements (no .defmt section, or an empty one); \
         build it with its feature `defmt` and with DEFMT_LOG set, as in DEFMT_LOG=debug, \
         and read the file that the linker wrote, not a stripped one"
    )]
    NoStatements,
    /// The firmware's defmt speaks another version of the format.
    #[error("{cause}")]
    Version {
        /// Both versions, as the decoder words it.
        cause: String,
    },
    /// The firmware's frames are not separated, so one lost byte would lose all that follow.
    #[error(
        "the firmware logs unframed (defmt's feature `encoding-raw`); build it with `encoding-rzcobs`, the default"
    )]
    Encoding,
}

/// How severe a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Every step.
    Trace,
    /// What a developer asks for.
    Debug,
    /// What happens.
    Info,
    /// What may go wrong.
    Warn,
    /// What went wrong.
    Error,
}

impl From<defmt_parser::Level> for Level {
    fn from(level: defmt_parser::Level) -> Self {
        match level {
            defmt_parser::Level::Trace => Self::Trace,
            defmt_parser::Level::Debug => Self::Debug,
            defmt_parser::Level::Info => Self::Info,
            defmt_parser::Level::Warn => Self::Warn,
            defmt_parser::Level::Error => Self::Error,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Trace => "TRACE",
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Warn => "WARN",
            Self::Error => "ERROR",
        })
    }
}

/// Where a log statement stands in the firmware's source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Location {
    /// Path of the module and function, as in `thinkey_core::channel::select::select`.
    pub module: String,
    /// Source file, as the compiler was given it.
    pub file: PathBuf,
    /// Line, from 1.
    pub line: u64,
}

/// One log record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Record {
    /// The time in the format that the firmware chose with `defmt::timestamp!`, if it did.
    pub timestamp: Option<String>,
    /// The level; `None` for `defmt::println!`.
    pub level: Option<Level>,
    /// The message.
    pub message: String,
    /// Where it comes from; `None` where the firmware was built without full debug information.
    #[serde(flatten)]
    pub location: Option<Location>,
}

/// Time, level, module, message and, in brackets, the source line; what is not known is left out.
impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(timestamp) = &self.timestamp {
            write!(f, "{timestamp} ")?;
        }
        if let Some(level) = self.level {
            write!(f, "{level:5} ")?;
        }
        match &self.location {
            Some(Location { module, file, line }) => {
                write!(f, "{module} {} ({}:{line})", self.message, file.display())
            }
            None => f.write_str(&self.message),
        }
    }
}

/// What a firmware file says about its log statements.
#[derive(Debug)]
pub struct LogDecoder {
    table: Table,
    locations: Locations,
}

impl LogDecoder {
    /// Reads the log statements of the firmware whose ELF file is `elf`.
    ///
    /// # Errors
    /// [`LogError`], whose variants say what to do.
    pub fn new(elf: &[u8]) -> Result<Self, LogError> {
        let unreadable = |cause: &dyn fmt::Display| LogError::Elf { cause: cause.to_string() };
        let table = match Table::parse(elf) {
            Ok(table) => table.ok_or(LogError::NoStatements)?,
            // The decoder's errors have no kinds: only its version check can be told from the others, by leaving it out.
            Err(cause) => match Table::parse_ignore_version(elf) {
                Ok(_) => return Err(LogError::Version { cause: cause.to_string() }),
                Err(cause) => return Err(unreadable(&cause)),
            },
        };
        if !table.encoding().can_recover() {
            return Err(LogError::Encoding);
        }
        if table.indices().next().is_none() {
            return Err(LogError::NoStatements);
        }
        let locations = table.get_locations(elf).map_err(|cause| unreadable(&cause))?;
        Ok(Self { table, locations })
    }

    /// Starts to decode a stream of frames. Records below `least` are left out; those of `defmt::println!` have no
    /// level and are kept.
    #[must_use]
    pub fn stream(&self, least: Level) -> LogStream<'_> {
        LogStream {
            firmware: self,
            frames: self.table.new_stream_decoder(),
            least,
            pending: 0,
            overlong: false,
            malformed: 0,
        }
    }

    /// The record of a frame, unless its level is below `least`.
    fn record(&self, frame: &Frame<'_>, least: Level) -> Option<Record> {
        let level = frame.level().map(Level::from);
        if level.is_some_and(|level| level < least) {
            return None;
        }
        Some(Record {
            timestamp: frame.display_timestamp().map(|timestamp| timestamp.to_string()),
            level,
            message: frame.display_message().to_string(),
            location: self.locations.get(&frame.index()).map(|location| Location {
                module: location.module.clone(),
                file: location.file.clone(),
                line: location.line,
            }),
        })
    }
}

/// One stream of frames from a device, decoded as its bytes arrive.
pub struct LogStream<'a> {
    firmware: &'a LogDecoder,
    frames: Box<dyn StreamDecoder + Send + Sync + 'a>,
    least: Level,
    /// Bytes of the frame that has begun.
    pending: usize,
    /// Whether that frame is longer than [`MAX_FRAME`] and given up.
    overlong: bool,
    malformed: u64,
}

impl fmt::Debug for LogStream<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogStream")
            .field("least", &self.least)
            .field("pending", &self.pending)
            .field("malformed", &self.malformed)
            .finish_non_exhaustive()
    }
}

impl LogStream<'_> {
    /// Takes the next bytes of the stream, cut anywhere; returns the records that they complete.
    pub fn decode(&mut self, bytes: &[u8]) -> Vec<Record> {
        let mut records = Vec::new();
        // Frame by frame: the library's buffer then never holds more than one, and need not be moved to its front.
        for part in bytes.split_inclusive(|&byte| byte == 0) {
            let (ends, body) = match part {
                [body @ .., 0] => (true, body),
                body => (false, body),
            };
            self.pending += body.len();
            self.overlong |= self.pending > MAX_FRAME;
            if self.overlong {
                self.frames = self.firmware.table.new_stream_decoder();
            } else {
                self.frames.received(part);
            }
            if !ends {
                continue;
            }
            // A device may send more zeros than one, as when it starts.
            if std::mem::take(&mut self.pending) > 0 {
                match (std::mem::take(&mut self.overlong), self.next_record()) {
                    (false, Ok(record)) => records.extend(record),
                    _ => self.malformed += 1,
                }
            }
        }
        records
    }

    /// Decodes the frame that is complete; `Ok(None)` where its level is too low.
    fn next_record(&mut self) -> Result<Option<Record>, DecodeError> {
        let Self { firmware, frames, least, .. } = self;
        // The library panics on some values that only damage brings about, as on a date beyond its calendar's end. It
        // takes a frame out of its buffer before it looks at it, so the buffer is sound afterwards.
        catch_unwind(AssertUnwindSafe(|| frames.decode().map(|frame| firmware.record(&frame, *least))))
            .unwrap_or(Err(DecodeError::Malformed))
    }

    /// Frames skipped so far because they were damaged or are not this firmware's.
    #[must_use]
    pub const fn malformed(&self) -> u64 {
        self.malformed
    }

    /// Bytes of a frame that has begun and not ended: at the end of a stream, what was cut off.
    #[must_use]
    pub const fn pending(&self) -> usize {
        self.pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A firmware of one statement, as the library would have read it.
    fn firmware(tag: &str, statement: &str) -> LogDecoder {
        let table = serde_json::json!({
            "timestamp": null,
            "entries": { "1": { "string": { "tag": tag, "string": statement }, "raw_symbol": "" } },
            "bitflags": {},
            "encoding": "Rzcobs",
        });
        LogDecoder { table: serde_json::from_value(table).unwrap(), locations: Locations::new() }
    }

    #[test]
    fn values_that_the_library_panics_on_are_malformed() {
        let firmware = firmware("Info", "{=u64:iso8601s}");
        let mut stream = firmware.stream(Level::Info);
        // Index 1, then seconds since 1970, little-endian; a byte after up to seven says where zeros were.
        let soon = [1, 60, 0b111_1010, 0b111_1111, 0];
        let beyond = [1, 255, 255, 255, 255, 255, 0b000_0010, 255, 255, 255, 0b111_1000, 0];
        let message = "1970-01-01T00:01:00Z";
        assert_eq!(stream.decode(&soon)[0].message, message);
        assert!(stream.decode(&beyond).is_empty());
        assert_eq!(stream.malformed(), 1);
        assert_eq!(stream.decode(&soon)[0].to_string(), format!("INFO  {message}"));
        assert_eq!(stream.malformed(), 1);
    }

    #[test]
    fn records_without_a_level_pass_every_filter() {
        let firmware = firmware("Println", "hello");
        let records = firmware.stream(Level::Error).decode(&[1, 0b111_1110, 0]);
        let expected = Record { timestamp: None, level: None, message: "hello".into(), location: None };
        assert_eq!(records, [expected]);
        assert_eq!(records[0].to_string(), "hello");
    }
}
