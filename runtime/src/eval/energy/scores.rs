//! Other scores of a head's channels beside ThinK's, for which every key is looked at: how much of its mask they find, and
//! how long they take.
//!
//! Channels are scored as the cache scores them when it has read a prompt ([`HeadMut::score`]), from keys that lie as they do
//! there, one head after the other on one thread; the work of reading the prompt stands beside it, so that nobody saves the
//! half of nothing. Where a head is scored for the first time, it is scored once before time is taken, so that no score reads
//! what others find in the processor's caches.

use super::EnergyOptions;
use crate::{
    engine::HeldHead,
    eval::{line, stats::Estimate},
};
use serde::Serialize;
use std::time::{Duration, Instant};
use thinkey_core::{
    BLOCK, ChannelMask, Error, Head, HeadLayout, HeadMut, KeyOrder, Rows, Scoring, Span, StorageKind,
    channel::{overlap::overlap, select::select},
    policy::Score,
};

/// Scores beside the exact one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ScoreReport {
    /// Microseconds that the exact score takes for a head, median over heads and prompts.
    pub microseconds: f64,
    /// Milliseconds that a prompt is read in, mean; the time of the scores is not among them.
    pub reading_milliseconds: f64,
    /// The others, as they were asked for.
    pub scores: Vec<ScoreRow>,
}

/// A score.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ScoreRow {
    /// Which.
    #[serde(serialize_with = "line")]
    pub score: Score,
    /// Share of the exact mask's channels that its mask keeps too: mean over heads, and its error over prompts.
    pub overlap: Estimate,
    /// Share of what the exact mask holds of the exact score that its mask holds.
    pub held: Estimate,
    /// The overlap by layer.
    pub layers: Vec<f64>,
    /// Microseconds that it takes for a head, median over heads and prompts.
    pub microseconds: f64,
    /// By how many times it is faster than the exact one; less than 1 where it is slower.
    pub faster: f64,
}

/// What a score made of a head in a prompt.
#[derive(Clone, Copy, Debug)]
struct Found {
    overlap: f64,
    held: f64,
    time: Duration,
}

/// Scores beside the exact one, head by head.
pub(super) struct Scores<'a> {
    options: EnergyOptions<'a>,
    kept: usize,
    /// The exact one's times.
    exact: Vec<Duration>,
    /// Score by score, in the order of heads and then of prompts.
    found: Vec<Vec<Found>>,
}

impl<'a> Scores<'a> {
    pub(super) fn new(options: EnergyOptions<'a>, head_dim: usize) -> Self {
        let found = options.scores.iter().map(|_| Vec::new()).collect();
        Self { options, kept: options.lambda.kept(head_dim), exact: Vec::new(), found }
    }

    /// Scores a head, the `head`th of the model, of the prompt that comes next.
    ///
    /// # Errors
    /// Where a score is not a number.
    pub(super) fn add(&mut self, head: usize, held: &HeldHead) -> Result<(), Error> {
        if self.options.scores.is_empty() {
            return Ok(());
        }
        let mut bench = Bench::new(head, held)?;
        bench.score(Score::Query)?;
        let (exact, time) = bench.score(Score::Query)?;
        self.exact.push(time);
        let mask = select(&exact, self.kept)?;
        let sum = |mask: &ChannelMask| mask.channels().map(|channel| f64::from(exact[channel])).sum::<f64>();
        let all = sum(&mask);
        for (&score, found) in self.options.scores.iter().zip(&mut self.found) {
            let (scores, time) = bench.score(score)?;
            let own = select(&scores, self.kept)?;
            // Where all scores are 0, so is what any mask holds.
            let held = if all > 0.0 { sum(&own) / all } else { 1.0 };
            found.push(Found { overlap: overlap(&mask, &own)?.into(), held, time });
        }
        Ok(())
    }

    /// What came of prompts of so many heads, in layers of `width`, which took `reading` to read.
    pub(super) fn report(&self, heads: usize, width: usize, reading: Duration) -> ScoreReport {
        let prompts = self.options.windows as f64;
        let microseconds = median(self.exact.iter().copied());
        let rows = self.options.scores.iter().zip(&self.found).map(|(&score, found)| {
            let by_prompt = |of: fn(&Found) -> f64| {
                let means = found.chunks(heads).map(|found| found.iter().map(of).sum::<f64>() / heads as f64);
                Estimate::of(&means.collect::<Vec<_>>())
            };
            let layer = |layer: usize| {
                let heads = found.chunks(heads).flat_map(|found| &found[layer * width..(layer + 1) * width]);
                heads.map(|found| found.overlap).sum::<f64>() / (prompts * width as f64)
            };
            let own = median(found.iter().map(|found| found.time));
            ScoreRow {
                score,
                overlap: by_prompt(|found| found.overlap),
                held: by_prompt(|found| found.held),
                layers: (0..heads / width).map(layer).collect(),
                microseconds: own,
                faster: microseconds / own,
            }
        });
        ScoreReport {
            microseconds,
            reading_milliseconds: reading.as_secs_f64() * 1e3 / prompts,
            scores: rows.collect(),
        }
    }
}

/// The median in microseconds, at least a nanosecond, so that it can be divided by; of none it is that.
fn median(times: impl Iterator<Item = Duration>) -> f64 {
    let mut times: Vec<_> = times.collect();
    times.sort_unstable();
    times.get(times.len() / 2).map_or(0.0, Duration::as_secs_f64).max(1e-9) * 1e6
}

/// A head that has read a prompt and is to choose its channels.
struct Bench<'a> {
    head: usize,
    held: &'a HeldHead,
    layout: HeadLayout,
    /// The head's bytes, from where they are aligned.
    bytes: Vec<u8>,
    at: usize,
    /// Keys as a prompt has them, in blocks of 32 tokens, channel-major.
    blocks: Vec<f32>,
}

impl<'a> Bench<'a> {
    fn new(head: usize, held: &'a HeldHead) -> Result<Self, Error> {
        let (d, tokens) = (held.head_dim, held.tokens());
        let dim = u16::try_from(d).map_err(|_| Error::HeadDim { head_dim: d })?;
        let layout = HeadLayout {
            head_dim: dim,
            kept: dim,
            kept_values: dim,
            ..HeadLayout::of::<Head<64, 0>>(BLOCK as u16, 0, StorageKind::F16, StorageKind::F16)
        };
        layout.check()?;
        let mut bytes = vec![0; layout.bytes() + align_of::<u64>()];
        let at = bytes.as_ptr().align_offset(align_of::<u64>());
        let mut view = HeadMut::new(layout, &mut bytes[at..at + layout.bytes()], 0)?;
        view.add_query_energy(&held.queries, held.queries.len() / d, d)?;
        let mut blocks = vec![0.0; tokens.next_multiple_of(BLOCK) * d];
        for (token, key) in held.keys.chunks_exact(d).enumerate() {
            let block = &mut blocks[token / BLOCK * BLOCK * d..][..BLOCK * d];
            block.iter_mut().skip(token % BLOCK).step_by(BLOCK).zip(key).for_each(|(lane, &x)| *lane = x);
        }
        Ok(Self { head, held, layout, bytes, at, blocks })
    }

    /// The scores, and how long they took.
    fn score(&mut self, score: Score) -> Result<(Vec<f32>, Duration), Error> {
        let (layout, held, d) = (self.layout, self.held, self.held.head_dim);
        let view = HeadMut::new(layout, &mut self.bytes[self.at..self.at + layout.bytes()], 0)?;
        let admission = Span::default().admit(held.tokens(), layout.retention(), true);
        let scoring = Scoring { score, head: self.head, queries: held.queries.len() / d };
        let rows = Rows { keys: &self.blocks, order: KeyOrder::Blocks, values: &held.values, stride: d };
        let mut scores = vec![0.0; d];
        let start = Instant::now();
        view.score(&scoring, &admission, rows, &mut scores)?;
        Ok((scores, start.elapsed()))
    }
}
