//! Trace files: recorded where a model runs, replayed by `thinkey-core` alone.
//!
//! The format is that of [`thinkey_core::trace`]; a device that holds the file in its flash replays it by the same call. Here
//! are the two ends that need an operating system: a model that is run, and files.
//!
//! Recording reads a text as a prompt, of which the last tokens stand for steps: what they were asked and told is what a
//! decoder would have been, since queries, keys and values of a token do not depend on those after it.

use std::{
    fmt, fs,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};
use thinkey::{
    engine::Engine,
    model::ModelError,
    policy::{CacheDesign, DesignError},
};
use thinkey_core::{
    HeadLayout, Plain, Policy,
    policy::{Life, Score, Tokens},
    trace::{
        self, MAGIC, MAX_NAME, Needs, Prompt, Record, Replayed, TraceError, TraceHeader, TraceReader, TraceWriter,
        VERSION, Work,
    },
};

/// Bytes of memory that replaying a file may take for each of its own, and at least.
const MEMORY: [usize; 2] = [16, 1 << 24];

/// Why a trace cannot be recorded or replayed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceFileError {
    /// The file.
    #[error("{}: {cause}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// What is in it, or what was to be.
    #[error("the trace {}: {cause}", path.display())]
    Trace {
        /// Its path.
        path: PathBuf,
        /// Why.
        cause: TraceError,
    },
    /// It wants far more memory than it has bytes.
    #[error("the trace {} wants {needed} bytes of memory, which no trace of its size does", path.display())]
    Memory {
        /// Its path.
        path: PathBuf,
        /// Bytes that it wants.
        needed: usize,
    },
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The policy.
    #[error(transparent)]
    Design(#[from] DesignError),
    /// A policy that traces cannot show.
    #[error(
        "{policy}: traces are of caches that keep all tokens, and of masks that a prompt chooses once, by score=query or \
         score=residual"
    )]
    Policy {
        /// The policy.
        policy: Box<Policy>,
    },
    /// Too few tokens.
    #[error("{needed} tokens are to be recorded, and the text has {found}; give a longer one, or record fewer")]
    Text {
        /// Tokens needed.
        needed: usize,
        /// Tokens of the text.
        found: usize,
    },
}

/// What to record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recording {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Steps after it.
    pub steps: usize,
    /// Newest queries of the prompt that score, W.
    pub window: usize,
    /// Newest tokens kept whole, R.
    pub recent: usize,
    /// Heads to record, spread evenly over the model's; all where there are no more.
    pub heads: usize,
}

/// Records what `engine` makes of the first of `tokens` for a cache of `design`, into the file `path`; returns how many heads.
/// `progress` is told how many heads of how many are through.
///
/// # Errors
/// [`TraceFileError`]; [`TraceError::Short`] and others in it where the design is none that traces have.
pub fn record(
    engine: &mut Engine,
    design: &CacheDesign,
    tokens: &[u32],
    recording: Recording,
    path: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<usize, TraceFileError> {
    let Recording { prompt, steps, window, recent, heads } = recording;
    let needed = prompt + steps;
    let tokens = tokens.get(..needed).ok_or(TraceFileError::Text { needed, found: tokens.len() })?;
    let failed = |cause| TraceFileError::Trace { path: path.to_owned(), cause };
    let policy = design.policy();
    if !matches!(policy.score, Score::Query | Score::Residual)
        || policy.life != Life::Prompt
        || policy.tokens != Tokens::All
    {
        return Err(TraceFileError::Policy { policy: Box::new(*policy) });
    }
    let config = engine.config();
    let (kv_heads, all) = (config.kv_heads, config.layers * config.kv_heads);
    let heads = heads.clamp(1, all);
    let mut model = config.name.clone().unwrap_or_default();
    while model.len() > MAX_NAME {
        model.pop();
    }
    let narrow = |number: usize| u16::try_from(number).unwrap_or(u16::MAX);
    let wide = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let header = TraceHeader {
        magic: MAGIC,
        version: VERSION,
        model: &model,
        head_dim: narrow(config.head_dim),
        group: narrow(config.group()),
        window: narrow(window),
        prompt: wide(prompt),
        steps: wide(steps),
        heads: wide(heads),
        residual: policy.score == Score::Residual,
    };
    let layout = |layer: usize, head: usize| -> Result<HeadLayout, TraceFileError> {
        let layout =
            design.plan(1, needed, recent).head(design.kept(layer, head)).map_err(|cause| failed(cause.into()))?;
        Needs::of(&header, &layout).map_err(failed)?;
        Ok(layout)
    };
    // Refused before a model of gigabytes reads anything.
    header.check().map_err(failed)?;
    layout(0, 0)?;

    // Beside its place first, so that a recording that fails leaves nothing that looks like one.
    let mut partial = path.as_os_str().to_owned();
    partial.push(".part");
    let partial = PathBuf::from(partial);
    let file = |cause| TraceFileError::File { path: partial.clone(), cause };
    let mut output = BufWriter::new(fs::File::create(&partial).map_err(file)?);
    let mut writer = TraceWriter::new(|frame: &[u8]| output.write_all(frame).map_err(Failed::File), &header)
        .map_err(|error| error.told(&partial))?;
    let mut memory = Memory::default();
    let mut done = 0;
    engine.try_examine(tokens, window + steps, |layer, head, held| {
        let at = layer * kv_heads + head;
        // The first head of each of `heads` equal parts.
        if at * heads / all == done && done < heads {
            let layout = layout(layer, head)?;
            let needs = Needs::of(&header, &layout).map_err(failed)?;
            let given = Prompt { queries: &held.queries, keys: &held.keys, values: &held.values };
            let place = (narrow(layer), narrow(head), layout);
            trace::record(&Plain, &header, place, given, &mut memory.work(needs), &mut writer)
                .map_err(|error: Failed| error.told(&partial))?;
            done += 1;
        }
        progress(at + 1, all);
        Ok::<_, TraceFileError>(())
    })?;
    let _ = writer.finish().map_err(|error| error.told(&partial))?;
    output.into_inner().map_err(|error| file(error.into_error()))?.sync_all().map_err(file)?;
    fs::rename(&partial, path).map_err(|cause| TraceFileError::File { path: path.to_owned(), cause })?;
    Ok(done)
}

/// What a writer to a file fails of.
enum Failed {
    Trace(TraceError),
    File(io::Error),
}

impl From<TraceError> for Failed {
    fn from(error: TraceError) -> Self {
        Self::Trace(error)
    }
}

impl Failed {
    fn told(self, path: &Path) -> TraceFileError {
        let path = path.to_owned();
        match self {
            Self::Trace(cause) => TraceFileError::Trace { path, cause },
            Self::File(cause) => TraceFileError::File { path, cause },
        }
    }
}

#[derive(Default)]
struct Memory {
    floats: Vec<f32>,
    words: Vec<u64>,
    pages: Vec<u32>,
}

impl Memory {
    /// At least what is needed.
    fn work(&mut self, needs: Needs) -> Work<'_> {
        let Self { floats, words, pages } = self;
        floats.resize(needs.floats.max(floats.len()), 0.0);
        words.resize(needs.words.max(words.len()), 0);
        pages.resize(needs.pages.max(pages.len()), 0);
        Work { floats, words, pages }
    }
}

/// What a replayed trace was of, and how it came out.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The model.
    pub model: String,
    /// How it came out.
    pub replayed: Replayed,
}

/// Replays the trace in the file `path`, with `tolerance` as a share of the largest number of a row.
///
/// # Errors
/// [`TraceFileError`] where it cannot be read; differences are no errors, they are told.
pub fn replay(path: &Path, tolerance: f32) -> Result<Outcome, TraceFileError> {
    let bytes = fs::read(path).map_err(|cause| TraceFileError::File { path: path.to_owned(), cause })?;
    let failed = |cause| TraceFileError::Trace { path: path.to_owned(), cause };
    let reader = TraceReader::open(&bytes).map_err(failed)?;
    let header = *reader.header();
    let mut needs = Needs::default();
    let mut records = reader;
    while let Some(record) = records.read().map_err(failed)? {
        if let Record::Head { layout, .. } = record {
            needs = needs.max(Needs::of(&header, &layout).map_err(failed)?);
        }
    }
    // Every number of a head is in the file, or is one of a few for each.
    let needed = size_of::<f32>() * needs.floats + size_of::<u64>() * needs.words + size_of::<u32>() * needs.pages;
    let [share, least] = MEMORY;
    if needed > least.max(share.saturating_mul(bytes.len())) {
        return Err(TraceFileError::Memory { path: path.to_owned(), needed });
    }
    let mut memory = Memory::default();
    let replayed = trace::replay(&Plain, reader, tolerance, &mut memory.work(needs)).map_err(failed)?;
    Ok(Outcome { model: header.model.to_owned(), replayed })
}

/// Why a replay failed: what differs, and by how much.
#[derive(Clone, Debug, PartialEq)]
pub struct Differs(pub Replayed);

impl fmt::Display for Differs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Replayed { heads, masks, energies, compared, outputs, worst, first } = &self.0;
        write!(f, "{masks} of {heads} masks, {energies} rows of energies and {outputs} of {compared} outputs differ")?;
        write!(f, ", outputs by {worst:.1e} of a row's largest number at most")?;
        first.map_or(Ok(()), |first| write!(f, "; first at {first}"))
    }
}
