//! Traces: what one prompt and a few steps were to some heads of a model, and what the thin cache made of them.
//!
//! A trace is recorded where the model runs and [replayed](replay()) where only this crate does, on a board or by another
//! build: queries, keys and values are read from it, and energies, masks and attention outputs are computed anew and
//! compared.
//!
//! # Format
//!
//! A trace is a run of frames, each a length of two bytes (little-endian) and as many bytes of [`wire`]: postcard
//! with a CRC-32 behind it. The first is a [`TraceHeader`], the others are [`Record`]s, none longer than [`MAX_FRAME`],
//! in this order:
//!
//! | record | how many |
//! |---|---|
//! | [`Record::Head`] | one for each head, and behind each the following |
//! | [`RowKind::WindowQuery`] | group × window, head after head |
//! | [`RowKind::PromptKey`], [`RowKind::PromptValue`] | prompt, in pairs |
//! | [`RowKind::QueryEnergy`], [`RowKind::KeyEnergy`] | one each: the sums of squares by channel |
//! | [`Record::Mask`] | one: the channels that were chosen |
//! | [`RowKind::StepQuery`] × group, [`RowKind::StepKey`], [`RowKind::StepValue`], [`RowKind::Output`] × group | for each step |
//!
//! [`Record::End`] is the last, with the number of records before it, so that a trace cut off between two frames is noticed.
//! A row is D numbers of four bytes (f32, little-endian).
//!
//! ```
//! use thinkey_core::trace::{TraceError, TraceReader};
//! assert_eq!(TraceReader::open(&[3, 0, 1]).unwrap_err(), TraceError::Cut { at: 0 });
//! ```

mod replay;

pub use replay::{Difference, Needs, Prompt, Replayed, What, Work, record, replay};

use crate::{ChannelMask, Error, HeadLayout, MAX_GROUP, MAX_HEAD_DIM, wire};
use core::fmt;
use serde::{Deserialize, Serialize};

/// Version of the format.
pub const VERSION: u16 = 1;

/// What every trace starts with.
pub const MAGIC: [u8; 4] = *b"tkTR";

/// Longest name of a model, in bytes.
pub const MAX_NAME: usize = 64;

/// Bytes of the longest frame: a row of [`MAX_HEAD_DIM`] numbers, and what describes it.
pub const MAX_FRAME: usize = size_of::<f32>() * MAX_HEAD_DIM + 32;

/// Bytes before a frame, which are its length.
const PREFIX: usize = 2;

/// What a trace is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct TraceHeader<'a> {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// Format version, [`VERSION`].
    pub version: u16,
    /// What the model is called, in at most [`MAX_NAME`] bytes.
    pub model: &'a str,
    /// Channels per head, D.
    pub head_dim: u16,
    /// Query heads that share a KV head, G.
    pub group: u16,
    /// Newest queries of the prompt that score channels, W.
    pub window: u16,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Steps after it, of a token each.
    pub steps: u32,
    /// Heads that were recorded.
    pub heads: u32,
    /// Whether channels were chosen one by one, each for what [regression](crate::channel::residual) on those before
    /// leaves, where the prompt tells a covariance; else by the energies.
    pub residual: bool,
}

impl TraceHeader<'_> {
    /// Whether the numbers can be.
    ///
    /// # Errors
    /// [`TraceError::Magic`], [`TraceError::Version`], or [`TraceError::Core`] that names the number.
    pub fn check(&self) -> Result<(), TraceError> {
        let (head_dim, group) = (self.head_dim as usize, self.group as usize);
        if self.magic != MAGIC {
            return Err(TraceError::Magic);
        }
        if self.version != VERSION {
            return Err(TraceError::Version { found: self.version });
        }
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(Error::HeadDim { head_dim }.into());
        }
        if group == 0 || group > MAX_GROUP {
            return Err(Error::Group { group }.into());
        }
        if self.model.len() > MAX_NAME {
            return Err(Error::Capacity { what: "model name", needed: self.model.len(), capacity: MAX_NAME }.into());
        }
        if self.window == 0 || u32::from(self.window) > self.prompt {
            return Err(
                Error::Index { what: "window", index: self.window.into(), limit: self.prompt as usize + 1 }.into()
            );
        }
        if self.prompt > MAX_TOKENS || self.steps > MAX_TOKENS {
            let needed = self.prompt.max(self.steps) as usize;
            return Err(Error::Capacity { what: "tokens of a trace", needed, capacity: MAX_TOKENS as usize }.into());
        }
        Ok(())
    }
}

/// Most tokens of a prompt, and most steps.
pub const MAX_TOKENS: u32 = 1 << 17;

/// What the numbers of a row are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum RowKind {
    /// A query of the window, after RoPE and unscaled; the index is head · W + position.
    WindowQuery,
    /// The key of a token of the prompt, after RoPE.
    PromptKey,
    /// Its value.
    PromptValue,
    /// The window's queries, squared and summed.
    QueryEnergy,
    /// The prompt's keys, squared and summed.
    KeyEnergy,
    /// The query of a step; the index is step · G + head, as of [`Output`](Self::Output).
    StepQuery,
    /// The key of a step.
    StepKey,
    /// The value of a step.
    StepValue,
    /// What attention came to.
    Output,
}

/// One record of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Record<'a> {
    /// A head begins.
    Head {
        /// Its layer.
        layer: u16,
        /// Its number among the layer's KV heads.
        head: u16,
        /// How it is stored, with room for the prompt and the steps.
        layout: HeadLayout,
    },
    /// D numbers.
    Row {
        /// What they are.
        kind: RowKind,
        /// Which of them.
        index: u32,
        /// Four bytes each, little-endian.
        numbers: &'a [u8],
    },
    /// The channels that were chosen.
    Mask(ChannelMask),
    /// Nothing follows.
    End {
        /// Records before.
        records: u32,
    },
}

/// Why a trace cannot be read, recorded or replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum TraceError {
    /// It is no trace.
    Magic,
    /// It is of another version of the format.
    Version {
        /// Its version.
        found: u16,
    },
    /// It ends within a frame, or before its end is told.
    Cut {
        /// Where the frame begins.
        at: usize,
    },
    /// A frame is damaged or too long.
    Damaged {
        /// Where it begins.
        at: usize,
    },
    /// A record is not the one that comes next.
    Order {
        /// Records before it.
        record: u32,
        /// What comes next.
        expected: &'static str,
    },
    /// A prompt is too short for any of its tokens to be thinned, so that there would be no mask to compare.
    Short {
        /// Its tokens.
        prompt: usize,
        /// The fewest.
        needed: usize,
    },
    /// A shape cannot be, or memory is too small for it.
    Core(Error),
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Magic => write!(f, "this is no trace"),
            Self::Version { found } => {
                write!(
                    f,
                    "the trace has format version {found}, but this build reads version {VERSION}; record it anew"
                )
            }
            Self::Cut { at } => write!(f, "the trace is cut off in the frame at byte {at}"),
            Self::Damaged { at } => write!(f, "the frame at byte {at} is damaged"),
            Self::Order { record, expected } => write!(f, "record {record} is not what comes next: {expected}"),
            Self::Short { prompt, needed } => {
                write!(f, "a prompt of {prompt} tokens is stored whole; {needed} are the fewest that choose channels")
            }
            Self::Core(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for TraceError {}

impl From<Error> for TraceError {
    fn from(error: Error) -> Self {
        Self::Core(error)
    }
}

/// Reads a trace frame by frame; every byte of it may be hostile.
#[derive(Clone, Copy, Debug)]
pub struct TraceReader<'a> {
    bytes: &'a [u8],
    at: usize,
    records: u32,
    header: TraceHeader<'a>,
    ended: bool,
}

impl<'a> TraceReader<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// As [`TraceHeader::check`]; [`TraceError::Cut`] and [`TraceError::Damaged`].
    pub fn open(bytes: &'a [u8]) -> Result<Self, TraceError> {
        let (frame, at) = frame(bytes, 0)?;
        // Other versions may have other fields: their first two are the same.
        match wire::decode::<TraceHeader<'_>>(frame) {
            Ok(header) => {
                header.check()?;
                Ok(Self { bytes, at, records: 0, header, ended: false })
            }
            Err(_) if frame.starts_with(&MAGIC) => Err(TraceError::Damaged { at: 0 }),
            Err(_) => Err(TraceError::Magic),
        }
    }

    /// What the trace is of.
    #[must_use]
    pub const fn header(&self) -> &TraceHeader<'a> {
        &self.header
    }

    /// Records read so far.
    #[must_use]
    pub const fn records(&self) -> u32 {
        self.records
    }

    /// The next record; `None` once the end was told and nothing follows.
    ///
    /// # Errors
    /// [`TraceError::Cut`], [`TraceError::Damaged`]; [`TraceError::Order`] where the end is told too early or late.
    pub fn read(&mut self) -> Result<Option<Record<'a>>, TraceError> {
        if self.ended {
            return if self.at == self.bytes.len() { Ok(None) } else { Err(self.unexpected("the end of the file")) };
        }
        let (frame, next) = frame(self.bytes, self.at)?;
        let record = wire::decode(frame).map_err(|_| TraceError::Damaged { at: self.at })?;
        if let Record::End { records } = record {
            if records != self.records {
                return Err(self.unexpected("as many records as the end tells"));
            }
            self.ended = true;
        }
        self.at = next;
        self.records = self.records.saturating_add(1);
        Ok(Some(record))
    }

    const fn unexpected(&self, expected: &'static str) -> TraceError {
        TraceError::Order { record: self.records, expected }
    }

    /// The next record, which is to be a head, or the end.
    fn head(&mut self) -> Result<Option<(u16, u16, HeadLayout)>, TraceError> {
        let before = *self;
        match self.read()? {
            Some(Record::Head { layer, head, layout }) => Ok(Some((layer, head, layout))),
            Some(Record::End { .. }) => self.read().map(|_| None),
            _ => Err(before.unexpected("a head, or the end")),
        }
    }

    /// The next record, which is to be row `index` of `kind`, into `row`.
    fn row(&mut self, kind: RowKind, index: usize, row: &mut [f32]) -> Result<(), TraceError> {
        let before = *self;
        match self.read()? {
            Some(Record::Row { kind: found, index: at, numbers })
                if found == kind && at as usize == index && numbers.len() == size_of_val(row) =>
            {
                let (numbers, _) = numbers.as_chunks();
                row.iter_mut().zip(numbers).for_each(|(to, &from)| *to = f32::from_le_bytes(from));
                Ok(())
            }
            _ => Err(before.unexpected(kind.name())),
        }
    }

    /// The next record, which is to be a mask.
    fn mask(&mut self) -> Result<ChannelMask, TraceError> {
        let before = *self;
        match self.read()? {
            Some(Record::Mask(mask)) => Ok(mask),
            _ => Err(before.unexpected("a mask")),
        }
    }
}

impl RowKind {
    const fn name(self) -> &'static str {
        match self {
            Self::WindowQuery => "a query of the window, of D numbers",
            Self::PromptKey => "a key of the prompt, of D numbers",
            Self::PromptValue => "a value of the prompt, of D numbers",
            Self::QueryEnergy => "the energies of queries, D numbers",
            Self::KeyEnergy => "the energies of keys, D numbers",
            Self::StepQuery => "the query of a step, of D numbers",
            Self::StepKey => "the key of a step, of D numbers",
            Self::StepValue => "the value of a step, of D numbers",
            Self::Output => "an output of attention, of D numbers",
        }
    }
}

/// The frame whose length stands at `at`, and where the next begins.
fn frame(bytes: &[u8], at: usize) -> Result<(&[u8], usize), TraceError> {
    let cut = TraceError::Cut { at };
    let rest = bytes.get(at..).ok_or(cut)?;
    let (&len, rest) = rest.split_first_chunk::<PREFIX>().ok_or(cut)?;
    let len = usize::from(u16::from_le_bytes(len));
    if len > MAX_FRAME {
        return Err(TraceError::Damaged { at });
    }
    Ok((rest.get(..len).ok_or(cut)?, at + PREFIX + len))
}

/// Writes a trace frame by frame to what takes bytes.
#[derive(Debug)]
pub struct TraceWriter<S> {
    sink: S,
    records: u32,
}

impl<S: FnMut(&[u8]) -> Result<(), E>, E: From<TraceError>> TraceWriter<S> {
    /// Writes the header.
    ///
    /// # Errors
    /// As [`TraceHeader::check`], and what the sink says.
    pub fn new(sink: S, header: &TraceHeader<'_>) -> Result<Self, E> {
        header.check()?;
        let mut writer = Self { sink, records: 0 };
        writer.frame(header)?;
        Ok(writer)
    }

    /// Writes a record.
    ///
    /// # Errors
    /// [`TraceError::Core`] for one longer than [`MAX_FRAME`], and what the sink says.
    pub fn write(&mut self, record: &Record<'_>) -> Result<(), E> {
        self.frame(record)?;
        self.records = self.records.saturating_add(1);
        Ok(())
    }

    /// Writes the end.
    ///
    /// # Errors
    /// What the sink says.
    pub fn finish(mut self) -> Result<S, E> {
        self.frame(&Record::End { records: self.records })?;
        Ok(self.sink)
    }

    fn row(&mut self, kind: RowKind, index: usize, row: &[f32]) -> Result<(), E> {
        let mut numbers = [0; size_of::<f32>() * MAX_HEAD_DIM];
        let numbers =
            numbers.get_mut(..size_of_val(row)).ok_or(TraceError::Core(Error::HeadDim { head_dim: row.len() }))?;
        for (to, x) in numbers.as_chunks_mut().0.iter_mut().zip(row) {
            *to = x.to_le_bytes();
        }
        self.write(&Record::Row { kind, index: index as u32, numbers })
    }

    fn frame<T: Serialize>(&mut self, value: &T) -> Result<(), E> {
        let mut memory = [0; PREFIX + MAX_FRAME];
        let (prefix, body) = memory.split_at_mut(PREFIX);
        let len = wire::encode(value, body).map_err(TraceError::from)?.len();
        prefix.copy_from_slice(&(len as u16).to_le_bytes());
        (self.sink)(&memory[..PREFIX + len])
    }
}

#[cfg(test)]
mod tests;
