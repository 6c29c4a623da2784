//! Views over one KV head's bytes: admit tokens (thin the oldest, then append), and read for attention.
//!
//! # Evicting tokens
//!
//! Where a sequence takes no more than a [capacity](crate::Retention::capacity), thin tokens compete for its blocks by their
//! ranks: those that are stored have theirs beside them, and so have those of the ring. An [`Admission`] that evicts some
//! says how many; [`HeadMut::keep`] lists those that [stay](Kept) in a head, [`HeadMut::keeping`] makes a view that scores,
//! corrects and admits only these, and [`HeadMut::move_ranks`] lets the ranks follow. What comes later takes the lanes of what
//! goes, whatever their order: attention has none, since keys come after RoPE.

use crate::{
    Admission, BLOCK, ChannelMask, Error, HeadLayout, MAX_HEAD_DIM, Span,
    channel::{compensate::Correction, lowrank::Projection, norm, predict::Prediction, random, score, select},
    error::check_len,
    log::debug,
    policy::{Fix, Score},
    quant::{GROUP, mixed::KeyGroups},
    storage::{Element, Form, MIXED_VALUES, elements, elements_mut, with_element},
    value::turn,
};
pub use evict::Kept;
use parts::{Parts, Steps};
use serde::{Deserialize, Serialize};

mod evict;
mod parts;
mod sketch;
mod snapshot;

/// How new keys lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum KeyOrder {
    /// As rows: token `t` is `keys[t * stride ..][..D]`.
    Rows,
    /// Channel-major in blocks of 32 tokens, as they are computed with: channel `c` of token `t` is
    /// `keys[(t / 32 * D + c) * 32 + t % 32]`.
    Blocks,
}

/// New tokens' keys and values of one head, after RoPE: the value of token `t` is `values[t * stride ..][..D]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Keys.
    pub keys: &'a [f32],
    /// How they lie.
    pub order: KeyOrder,
    /// Values.
    pub values: &'a [f32],
    /// Elements between the starts of two tokens, of values and of keys in rows.
    pub stride: usize,
}

#[cfg(feature = "defmt")]
impl defmt::Format for Rows<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(
            f,
            "Rows {{ keys: {=usize}, order: {}, values: {=usize}, stride: {=usize} }}",
            self.keys.len(),
            self.order,
            self.values.len(),
            self.stride
        );
    }
}

impl Rows<'_> {
    fn check(&self, tokens: usize, head_dim: usize) -> Result<(), Error> {
        let rows = if tokens == 0 { 0 } else { (tokens - 1) * self.stride + head_dim };
        let keys = match self.order {
            KeyOrder::Rows => rows,
            KeyOrder::Blocks => tokens.next_multiple_of(BLOCK) * head_dim,
        };
        for (what, data, needed) in [("new keys", self.keys, keys), ("new values", self.values, rows)] {
            if data.len() < needed {
                return Err(Error::Length { what, expected: needed, actual: data.len() });
            }
        }
        Ok(())
    }
}

/// The channels that the prefix of a head holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Masks {
    /// Of keys. Where these are [projected](crate::channel::lowrank), only its length says something; where they are
    /// [predicted](crate::channel::predict), the order in which they are stored is another.
    pub keys: ChannelMask,
    /// Of values.
    pub values: ChannelMask,
}

impl Masks {
    /// Some channels of keys and all of values.
    #[must_use]
    pub fn of_keys(keys: ChannelMask) -> Self {
        Self { keys, values: keys.all() }
    }

    fn check(&self, layout: &HeadLayout) -> Result<(), Error> {
        check_mask(&self.keys, layout.kept, layout)?;
        check_mask(&self.values, layout.kept_values, layout)
    }
}

/// Checks that a mask is of the layout's channels and keeps `kept` of them.
fn check_mask(mask: &ChannelMask, kept: u16, layout: &HeadLayout) -> Result<(), Error> {
    check_len("mask", layout.head_dim as usize, mask.head_dim())?;
    if mask.kept() != kept as usize {
        return Err(Error::Kept { kept: mask.kept(), head_dim: mask.head_dim() });
    }
    Ok(())
}

/// One KV head of one sequence, for reading.
#[derive(Clone, Copy, Debug)]
pub struct HeadRef<'a> {
    layout: HeadLayout,
    bytes: &'a [u8],
    slot: usize,
    pages: &'a [u32],
    span: Span,
    masks: Option<&'a Masks>,
}

#[cfg(feature = "defmt")]
impl defmt::Format for HeadRef<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(
            f,
            "HeadRef {{ layout: {}, slot: {=usize}, span: {}, masks: {} }}",
            self.layout,
            self.slot,
            self.span,
            self.masks
        );
    }
}

/// Checks that a head's parts fit each other, so that the accessors below cannot be out of range.
fn check(layout: &HeadLayout, bytes: usize, slot: usize, pages: &[u32], span: Span) -> Result<(), Error> {
    layout.check()?;
    check_len("cache bytes of a head", layout.bytes(), bytes)?;
    if slot >= layout.slots as usize {
        return Err(Error::Index { what: "slot", index: slot, limit: layout.slots as usize });
    }
    if pages.len() < span.blocks as usize {
        return Err(Error::Capacity { what: "pages", needed: span.blocks as usize, capacity: pages.len() });
    }
    if let Some(&page) = pages[..span.blocks as usize].iter().find(|&&page| page >= layout.pages) {
        return Err(Error::Index { what: "page", index: page as usize, limit: layout.pages as usize });
    }
    if span.sinks > u32::from(layout.sinks) {
        return Err(Error::Capacity { what: "sinks", needed: span.sinks as usize, capacity: layout.sinks as usize });
    }
    if span.recent as usize > layout.ring_capacity() {
        return Err(Error::Capacity { what: "ring", needed: span.recent as usize, capacity: layout.ring_capacity() });
    }
    if span.hidden as usize >= BLOCK || (span.blocks == 0 && span.hidden > 0) {
        return Err(Error::Index { what: "hidden lane", index: span.hidden as usize, limit: BLOCK });
    }
    Ok(())
}

impl<'a> HeadRef<'a> {
    /// A view of the head whose bytes are `bytes`, for the sequence in `slot` with the page table `pages`.
    ///
    /// # Errors
    /// Where the parts do not fit each other, or the span has a prefix but `masks` are missing or of another shape.
    pub fn new(
        layout: HeadLayout,
        bytes: &'a [u8],
        slot: usize,
        pages: &'a [u32],
        span: Span,
        masks: Option<&'a Masks>,
    ) -> Result<Self, Error> {
        check(&layout, bytes.len(), slot, pages, span)?;
        match masks {
            Some(masks) => masks.check(&layout)?,
            None if span.blocks > 0 => return Err(Error::NoMask),
            None => {}
        }
        Ok(Self { layout, bytes, slot, pages, span, masks })
    }

    /// The layout.
    #[must_use]
    pub const fn layout(&self) -> &HeadLayout {
        &self.layout
    }

    /// How many tokens are where.
    #[must_use]
    pub const fn span(&self) -> Span {
        self.span
    }

    /// The key channels that the prefix holds; `None` while there is no prefix and none are chosen.
    #[must_use]
    pub fn mask(&self) -> Option<&'a ChannelMask> {
        self.masks.map(|masks| &masks.keys)
    }

    /// The key channels that block `block` holds: its own where [masks change](HeadLayout::renews), else those of all.
    ///
    /// # Errors
    /// [`Error::NoMask`] where none are chosen; [`Error::Kept`] where the block is damaged.
    ///
    /// # Panics
    /// Where `block` is not below the span's blocks.
    pub fn block_mask(&self, block: usize) -> Result<ChannelMask, Error> {
        if !self.layout.renews {
            return self.mask().copied().ok_or(Error::NoMask);
        }
        let mask = ChannelMask::from_bits(self.layout.head_dim as usize, self.mask_bits(block))?;
        check_mask(&mask, self.layout.kept, &self.layout)?;
        Ok(mask)
    }

    /// The bytes of the mask of block `block`; none where blocks have none.
    pub(crate) fn mask_bits(&self, block: usize) -> &'a [u8] {
        let (mask_at, bytes) = (self.layout.mask_at(), self.key_block(block));
        let len = if self.layout.renews { (self.layout.head_dim as usize).div_ceil(8) } else { 0 };
        &bytes[mask_at..mask_at + len]
    }

    /// The value channels that the prefix holds, as [`mask`](Self::mask).
    #[must_use]
    pub fn value_mask(&self) -> Option<&'a ChannelMask> {
        self.masks.map(|masks| &masks.values)
    }

    /// The bytes of thin key block `block`, `[T][32]`.
    ///
    /// # Panics
    /// Where `block` is not below the span's blocks.
    #[must_use]
    pub fn key_block(&self, block: usize) -> &'a [u8] {
        &self.bytes[self.layout.key_block(self.pages[block] as usize)]
    }

    /// The bytes of value block `block`, `[32][T′]`.
    ///
    /// # Panics
    /// As [`key_block`](Self::key_block).
    #[must_use]
    pub fn value_block(&self, block: usize) -> &'a [u8] {
        &self.bytes[self.layout.value_block(self.pages[block] as usize)]
    }

    /// The bytes of the ring's keys, `[D][ring stride]`.
    #[must_use]
    pub fn ring_keys(&self) -> &'a [u8] {
        &self.bytes[self.layout.ring_keys(self.slot)]
    }

    /// The bytes of the ring's values, `[ring capacity][D]`.
    #[must_use]
    pub fn ring_values(&self) -> &'a [u8] {
        &self.bytes[self.layout.ring_values(self.slot)]
    }

    /// The bytes of the keys of the sinks, `[D][sinks]` and more: 32 lanes of every channel can be read.
    #[must_use]
    pub fn sink_keys(&self) -> &'a [u8] {
        &self.bytes[self.layout.sink_keys(self.slot)]
    }

    /// The bytes of the values of the sinks, `[sinks][D]`.
    #[must_use]
    pub fn sink_values(&self) -> &'a [u8] {
        &self.bytes[self.layout.sink_values(self.slot)]
    }

    /// How queries are corrected, `[D−T][T+1]`, or projected, `[D][T+1]` and more, in numbers of
    /// [`correction_kind`](HeadLayout::correction_kind) and more: 32 numbers can be read from any of them on. `None` where
    /// the layout has no correction, or keeps every channel unpredicted.
    #[must_use]
    pub fn correction(&self) -> Option<&'a [u8]> {
        let range = self.layout.correction(self.slot);
        (!range.is_empty()).then(|| &self.bytes[range])
    }

    /// Writes the numbers of thin key block `block` as f32, `[T][32]`.
    ///
    /// # Errors
    /// [`Error::Length`] for another length.
    ///
    /// # Panics
    /// As [`key_block`](Self::key_block).
    pub fn read_key_block(&self, block: usize, out: &mut [f32]) -> Result<(), Error> {
        check_len("key block", self.layout.kept as usize * BLOCK, out.len())?;
        match self.layout.keys.form() {
            Form::Float(kind) => with_element!(kind, E => {
                for (x, stored) in out.iter_mut().zip(elements::<E>(self.key_block(block))?) {
                    *x = stored.load();
                }
            }),
            form => {
                let groups = KeyGroups::new(form, self.key_block(block), self.layout.kept as usize)?;
                for (channel, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                    for (lane, x) in out.iter_mut().enumerate() {
                        *x = groups.get(channel, lane);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes the numbers of value block `block` as f32: token t to `out[t * stride ..][..D]`, with zeros in channels that
    /// the prefix lacks.
    ///
    /// # Errors
    /// [`Error::Length`] where `out` is too short, [`Error::NoMask`] where nobody knows the channels.
    ///
    /// # Panics
    /// As [`key_block`](Self::key_block).
    pub fn read_value_block(&self, block: usize, out: &mut [f32], stride: usize) -> Result<(), Error> {
        let head_dim = self.layout.head_dim as usize;
        let expected = (BLOCK - 1) * stride + head_dim;
        if out.len() < expected {
            return Err(Error::Length { what: "value block", expected, actual: out.len() });
        }
        self.read_values(block, out.chunks_mut(stride).map(|row| &mut row[..head_dim]).take(BLOCK).enumerate())
    }

    /// Writes the values of lanes of block `block`, with zeros in the channels that the prefix lacks.
    fn read_values<'o>(&self, block: usize, values: impl Iterator<Item = (usize, &'o mut [f32])>) -> Result<(), Error> {
        let mut memory = [0; MAX_HEAD_DIM];
        let channels = parts::list(self.value_mask().ok_or(Error::NoMask)?, &mut memory);
        match self.layout.values.form() {
            Form::Float(kind) => with_element!(kind, E => {
                let stored = elements::<E>(self.value_block(block))?;
                for (lane, value) in values {
                    value.fill(0.0);
                    for (&channel, stored) in channels.iter().zip(&stored[lane * channels.len()..]) {
                        value[usize::from(channel)] = stored.load();
                    }
                }
            }),
            Form::Turned(kind) => {
                let groups = kind.turned_parts(self.value_block(block), channels.len())?;
                for (lane, value) in values {
                    value.iter_mut().enumerate().for_each(|(channel, x)| *x = groups.value(lane, channel));
                    turn(value);
                }
            }
            Form::Mixed => return Err(MIXED_VALUES),
            Form::Codes(kind) => {
                let groups = kind.parts(self.value_block(block), BLOCK * channels.len().div_ceil(GROUP))?;
                for (lane, value) in values {
                    value.fill(0.0);
                    for (index, &channel) in channels.iter().enumerate() {
                        value[usize::from(channel)] = groups.value(lane, index);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes the whole key and value of ring token `token` as f32 (length D each).
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such token, [`Error::Length`] for other lengths.
    pub fn read_recent(&self, token: usize, key: &mut [f32], value: &mut [f32]) -> Result<(), Error> {
        if token >= self.span.recent as usize {
            return Err(Error::Index { what: "recent token", index: token, limit: self.span.recent as usize });
        }
        self.read_whole(self.ring_keys(), self.layout.ring_stride(), self.ring_values(), token, key, value)
    }

    /// Writes the whole key and value of sink `token` as f32 (length D each).
    ///
    /// # Errors
    /// As [`read_recent`](Self::read_recent).
    pub fn read_sink(&self, token: usize, key: &mut [f32], value: &mut [f32]) -> Result<(), Error> {
        if token >= self.span.sinks as usize {
            return Err(Error::Index { what: "sink", index: token, limit: self.span.sinks as usize });
        }
        self.read_whole(self.sink_keys(), self.layout.sinks as usize, self.sink_values(), token, key, value)
    }

    /// Reads `token` of whole keys, channels `stride` apart, and values.
    fn read_whole(
        &self,
        keys: &[u8],
        stride: usize,
        values: &[u8],
        token: usize,
        key: &mut [f32],
        value: &mut [f32],
    ) -> Result<(), Error> {
        let head_dim = self.layout.head_dim as usize;
        check_len("key", head_dim, key.len())?;
        check_len("value", head_dim, value.len())?;
        with_element!(self.layout.keys.ring(), E => {
            let keys = elements::<E>(keys)?;
            for (channel, x) in key.iter_mut().enumerate() {
                *x = keys[channel * stride + token].load();
            }
        });
        with_element!(self.layout.values.ring(), E => {
            let values = elements::<E>(values)?;
            for (x, stored) in value.iter_mut().zip(&values[token * head_dim..]) {
                *x = stored.load();
            }
        });
        Ok(())
    }

    /// Writes what is stored of prefix token `token` (0 is the oldest) as f32: the key's kept channels (length T), or
    /// the numbers that it is projected or predicted by, and the value (length D), with zeros in channels that the prefix lacks.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such token, [`Error::Length`] for other lengths.
    pub fn read_prefix(&self, token: usize, key: &mut [f32], value: &mut [f32]) -> Result<(), Error> {
        if token >= self.span.prefix() {
            return Err(Error::Index { what: "prefix token", index: token, limit: self.span.prefix() });
        }
        check_len("key", self.layout.kept as usize, key.len())?;
        check_len("value", self.layout.head_dim as usize, value.len())?;
        let at = token + self.span.hidden as usize;
        let (block, lane) = (at / BLOCK, at % BLOCK);
        match self.layout.keys.form() {
            Form::Float(kind) => with_element!(kind, E => {
                let stored = elements::<E>(self.key_block(block))?;
                for (channel, x) in key.iter_mut().enumerate() {
                    *x = stored[channel * BLOCK + lane].load();
                }
            }),
            form => {
                let groups = KeyGroups::new(form, self.key_block(block), key.len())?;
                for (channel, x) in key.iter_mut().enumerate() {
                    *x = groups.get(channel, lane);
                }
            }
        }
        self.read_values(block, core::iter::once((lane, value)))
    }
}

/// What [`HeadMut::score`] scores channels by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Scoring {
    /// The score.
    pub score: Score,
    /// The head's number among all of the model, by which random scores differ.
    pub head: usize,
    /// Query rows in the energies, those of all query heads of the group.
    pub queries: usize,
}

/// What [`HeadMut::correct`] goes by.
#[derive(Debug)]
pub enum Moments<'a> {
    /// The keys of the whole tokens of an admission that are no sinks: those of the ring, then new ones.
    Tokens {
        /// The admission that is to be carried out.
        admission: &'a Admission,
        /// The new tokens.
        rows: Rows<'a>,
    },
    /// What [`moments`](crate::channel::compensate::moments) has made of them.
    Known {
        /// m, length D.
        mean: &'a [f32],
        /// C, `[D][D]`.
        covariance: &'a [f32],
        /// The kept channels in the order of their [choice](crate::channel::residual), which is that of
        /// [prediction](crate::channel::predict); of no meaning for other fixes.
        order: &'a [u16],
        /// Scratch of [`HeadLayout::scratch_len`] floats.
        scratch: &'a mut [f32],
    },
}

/// One KV head, for writing.
#[derive(Debug)]
pub struct HeadMut<'a> {
    layout: HeadLayout,
    bytes: &'a mut [u8],
    slot: usize,
    kept: Kept<'a>,
}

#[cfg(feature = "defmt")]
impl defmt::Format for HeadMut<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "HeadMut {{ layout: {}, slot: {=usize} }}", self.layout, self.slot);
    }
}

impl<'a> HeadMut<'a> {
    /// A view of the head whose bytes are `bytes`, for the sequence in `slot`.
    ///
    /// # Errors
    /// Where the parts do not fit each other.
    pub fn new(layout: HeadLayout, bytes: &'a mut [u8], slot: usize) -> Result<Self, Error> {
        check(&layout, bytes.len(), slot, &[], Span::default())?;
        Ok(Self { layout, bytes, slot, kept: Kept::ALL })
    }

    /// The layout.
    #[must_use]
    pub const fn layout(&self) -> &HeadLayout {
        &self.layout
    }

    /// Forgets the query energies: a new sequence starts.
    pub fn clear_energy(&mut self) {
        self.bytes[self.layout.energy(self.slot)].fill(0);
    }

    /// Adds the squares of `rows` query rows (length D, `stride` apart) to the energies that score channels.
    ///
    /// # Errors
    /// [`Error::Length`] where `queries` is too short.
    pub fn add_query_energy(&mut self, queries: &[f32], rows: usize, stride: usize) -> Result<(), Error> {
        let range = self.layout.energy(self.slot);
        let energy = elements_mut::<f32>(&mut self.bytes[range])?;
        score::add_energy(queries, rows, stride, &mut energy[..self.layout.head_dim as usize])
    }

    /// Scores the channels by the query energies so far and all whole tokens of an admission: those of the ring, then the
    /// new `rows`. Those that are [not kept](Self::keeping) do not count. Writes D scores.
    ///
    /// # Errors
    /// [`Error::Length`] where a slice does not fit or there is no query or token.
    pub fn score(
        &self,
        scoring: &Scoring,
        admission: &Admission,
        rows: Rows<'_>,
        scores: &mut [f32],
    ) -> Result<(), Error> {
        let Scoring { score: how, head, queries } = *scoring;
        let (held, new) = (admission.before.recent as usize, admission.new);
        let head_dim = self.layout.head_dim as usize;
        let energy = elements::<f32>(&self.bytes[self.layout.energy(self.slot)])?;
        let energy = &energy[..head_dim];
        let mut sums = [0.0f32; MAX_HEAD_DIM];
        let sums = &mut sums[..head_dim];
        match how {
            // Residuals are there once there is a covariance to leave some.
            Score::Query | Score::Residual => {
                let count = self.add_keys(admission, rows, 1, |x| x * x, sums)?;
                score::score(energy, queries, sums, count, scores)
            }
            Score::Sample { tokens } => {
                let every = (held + new).div_ceil((tokens as usize).max(1)).max(1);
                let count = self.add_keys(admission, rows, every, |x| x * x, sums)?;
                score::score(energy, queries, sums, count, scores)
            }
            Score::L1 => {
                let count = self.add_keys(admission, rows, 1, f32::abs, sums)?;
                norm::l1(sums, count, scores)
            }
            Score::L2 => {
                let count = self.add_keys(admission, rows, 1, |x| x * x, sums)?;
                norm::l2(sums, count, scores)
            }
            Score::Random { seed } => {
                check_len("scores", head_dim, scores.len())?;
                random::random(seed, head, scores);
                Ok(())
            }
            Score::Sketch { rows: lines } => {
                self.sketch_keys((head as u64, lines as usize), held, rows, new, sums)?;
                score::score(energy, queries, sums, held + new, scores)
            }
        }
    }

    /// Adds `what` of every channel of every so many whole tokens, those of the ring and then the new rows, to `sums`;
    /// returns how many tokens that were.
    fn add_keys(
        &self,
        admission: &Admission,
        rows: Rows<'_>,
        every: usize,
        what: impl Fn(f32) -> f32 + Copy,
        sums: &mut [f32],
    ) -> Result<usize, Error> {
        let (held, new) = (admission.before.recent as usize, admission.new);
        if admission.evicted > 0 {
            return self.add_kept_keys(admission, rows, (0, every), what, sums);
        }
        let (head_dim, stride) = (self.layout.head_dim as usize, self.layout.ring_stride());
        rows.check(new, head_dim)?;
        // The first new token that counts.
        let first = held.next_multiple_of(every) - held;
        match rows.order {
            _ if new <= first => {}
            KeyOrder::Rows => {
                let (keys, count) = (&rows.keys[first * rows.stride..], (new - first).div_ceil(every));
                score::add_rows(keys, count, rows.stride.saturating_mul(every), sums, what)?;
            }
            KeyOrder::Blocks if every == 1 => score::add_blocks(rows.keys, new, what, sums)?,
            KeyOrder::Blocks => {
                let steps = Steps::keys(&rows, head_dim);
                for token in (first..new).step_by(every) {
                    for (channel, sum) in sums.iter_mut().enumerate() {
                        *sum += what(rows.keys[steps.at(token, channel)]);
                    }
                }
            }
        }
        with_element!(self.layout.keys.ring(), E => {
            let ring = elements::<E>(&self.bytes[self.layout.ring_keys(self.slot)])?;
            for (sum, lanes) in sums.iter_mut().zip(ring.chunks_exact(stride)) {
                *sum += lanes[..held].iter().step_by(every).map(|x| what(x.load())).sum::<f32>();
            }
        });
        Ok((held + new).div_ceil(every))
    }

    /// [`score`](Self::score), then the layout's T best channels.
    ///
    /// # Errors
    /// As [`score`](Self::score); [`Error::NotANumber`] where a score is NaN.
    pub fn choose(&self, scoring: &Scoring, admission: &Admission, rows: Rows<'_>) -> Result<ChannelMask, Error> {
        let mut scores = [0.0f32; MAX_HEAD_DIM];
        let scores = &mut scores[..self.layout.head_dim as usize];
        self.score(scoring, admission, rows, scores)?;
        select::select(scores, self.layout.kept as usize)
    }

    /// The T′ value channels of largest energy in all whole tokens of an admission: those of the ring, then the new `rows`.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub fn choose_values(&self, admission: &Admission, rows: Rows<'_>) -> Result<ChannelMask, Error> {
        let head_dim = self.layout.head_dim as usize;
        if !self.layout.thins_values() {
            return ChannelMask::whole(head_dim);
        }
        rows.check(admission.new, head_dim)?;
        let mut sums = [0.0f32; MAX_HEAD_DIM];
        let sums = &mut sums[..head_dim];
        if admission.evicted > 0 {
            self.add_kept_values(admission, rows, sums)?;
            return select::select(sums, self.layout.kept_values as usize);
        }
        score::add_energy(rows.values, admission.new, rows.stride, sums)?;
        with_element!(self.layout.values.ring(), E => {
            let ring = elements::<E>(&self.bytes[self.layout.ring_values(self.slot)])?;
            for value in ring.chunks_exact(head_dim).take(admission.before.recent as usize) {
                for (sum, x) in sums.iter_mut().zip(value) {
                    *sum += x.load() * x.load();
                }
            }
        });
        select::select(sums, self.layout.kept_values as usize)
    }

    /// Stores how queries are to be corrected for the channels that `mask`, which is to be given to
    /// [`admit`](Self::admit), does not keep: as [`Correction::solve`] does from `moments`, the mean and the covariance of the
    /// head's keys and scratch for it, or by the [means](Correction::means) of whole tokens. Where keys are projected,
    /// [`Projection::solve`] says on what; by means alone on the channels of the mask. Where they are predicted,
    /// [`Prediction::solve`] says by what. Nothing where the layout has neither.
    ///
    /// # Errors
    /// As [`Correction::solve`], [`Projection::solve`] and [`Prediction::solve`]; [`Error::Kept`] for a mask of another shape.
    pub fn correct(&mut self, mask: &ChannelMask, moments: Moments<'_>) -> Result<(), Error> {
        check_mask(mask, self.layout.kept, &self.layout)?;
        let range = self.layout.correction(self.slot);
        if range.is_empty() {
            return Ok(());
        }
        let mut means = [0.0f32; MAX_HEAD_DIM];
        let means = &mut means[..self.layout.head_dim as usize];
        if let Moments::Tokens { admission, rows } = moments {
            self.means(admission, rows, means)?;
        }
        with_element!(self.layout.correction_kind(), E => {
            let memory = elements_mut::<E>(&mut self.bytes[range])?;
            match (self.layout.fix, moments) {
                (Fix::Lowrank, Moments::Tokens { .. }) => Projection::onto(mask, means, memory),
                (Fix::Predictive, Moments::Tokens { .. }) => Prediction::means(means, mask, memory).map(|_| ()),
                (Fix::Predictive, Moments::Known { mean, covariance, order, scratch }) => {
                    check_len("channels in order", mask.kept(), order.len())?;
                    Prediction::solve(mean, covariance, order, scratch, memory).map(|_| ())
                }
                (Fix::Lowrank, Moments::Known { mean, covariance, scratch, .. }) => {
                    let capacity = scratch.len();
                    let (scratch, own) = scratch
                        .split_at_mut_checked(Projection::scratch_len(mean.len()))
                        .ok_or(Error::Capacity { what: "projection scratch", needed: self.layout.scratch_len(), capacity })?;
                    Projection::solve(mean, covariance, mask.kept(), scratch, own)?.columns(memory)
                }
                (_, Moments::Tokens { .. }) => Correction::means(means, mask, memory).map(|_| ()),
                (_, Moments::Known { mean, covariance, scratch, .. }) => {
                    Correction::solve(mean, covariance, mask, scratch, memory).map(|_| ())
                }
            }
        })
    }

    /// The mean of the keys of the whole tokens of an admission that are no sinks.
    fn means(&self, admission: &Admission, rows: Rows<'_>, means: &mut [f32]) -> Result<(), Error> {
        let (head_dim, stride) = (means.len(), self.layout.ring_stride());
        let Admission { before, new, sunk, .. } = *admission;
        if admission.evicted > 0 {
            let count = self.add_kept_keys(admission, rows, (sunk, 1), |x| x, means)?;
            means.iter_mut().for_each(|mean| *mean /= count.max(1) as f32);
            return Ok(());
        }
        rows.check(new, head_dim)?;
        let (held, steps) = (before.recent as usize, Steps::keys(&rows, head_dim));
        let count = (held + new).saturating_sub(sunk).max(1) as f32;
        with_element!(self.layout.keys.ring(), E => {
            let ring = elements::<E>(&self.bytes[self.layout.ring_keys(self.slot)])?;
            for ((channel, mean), lanes) in means.iter_mut().enumerate().zip(ring.chunks_exact(stride)) {
                let held: f32 = lanes[..held].iter().map(|x| x.load()).sum();
                let new: f32 = (sunk..new).map(|token| rows.keys[steps.at(token, channel)]).sum();
                *mean = (held + new) / count;
            }
        });
        Ok(())
    }

    /// Carries out an admission for this head: thins the oldest whole tokens into the blocks that `pages` (the page table
    /// after the admission) names, and stores the others whole. Where the admission evicts tokens, the view has to say which
    /// it [keeps](Self::keeping).
    ///
    /// # Errors
    /// [`Error::Inconsistent`] where what is kept is not what the admission has room for; [`Error::NoMask`] where tokens
    /// are to be thinned without a mask; [`Error::Length`], [`Error::Capacity`], [`Error::Index`], [`Error::Kept`] where
    /// parts do not fit. Nothing is written then.
    pub fn admit(
        &mut self,
        admission: &Admission,
        pages: &[u32],
        masks: Option<&Masks>,
        rows: Rows<'_>,
    ) -> Result<(), Error> {
        let layout = self.layout;
        rows.check(admission.new, layout.head_dim as usize)?;
        check(&layout, self.bytes.len(), self.slot, pages, admission.after)?;
        check(&layout, self.bytes.len(), self.slot, &[], Span { blocks: 0, hidden: 0, ..admission.before })?;
        if admission.sunk > admission.new
            || admission.thinned > admission.before.recent as usize + admission.new - admission.sunk
        {
            return Err(Error::Inconsistent { what: "admission" });
        }
        self.kept.check(admission)?;
        let blocks = admission.new_blocks();
        let thins = !blocks.is_empty() || !self.kept.lanes.is_empty();
        // The masks that are needed: checked before anything is written.
        let masks = thins.then(|| masks.ok_or(Error::NoMask)).transpose()?;
        masks.map_or(Ok(()), |masks| masks.check(&layout))?;
        let mut parts = self.parts();
        with_element!(layout.keys.ring(), E => parts.sink_keys::<E>(&layout, admission, rows)?);
        with_element!(layout.values.ring(), E => parts.sink_values::<E>(&layout, admission, rows)?);
        if let Some(Masks { keys, values }) = masks {
            with_element!(layout.keys.ring(), E => parts.thin_keys::<E>(&layout, admission, pages, keys, rows)?);
            with_element!(layout.values.ring(), E => parts.thin_values::<E>(&layout, admission, pages, values, rows)?);
            debug!("thinned {} tokens into {} blocks of {} channels", admission.thinned, blocks.len(), keys.kept());
        }
        with_element!(layout.keys.ring(), E => parts.append_keys::<E>(&layout, admission, rows)?);
        with_element!(layout.values.ring(), E => parts.append_values::<E>(&layout, admission, rows)?);
        Ok(())
    }

    fn parts(&mut self) -> Parts<'_> {
        let (layout, slot, kept) = (self.layout, self.slot, self.kept);
        let pages = layout.pages as usize;
        let (key_blocks, rest) = self.bytes.split_at_mut(layout.key_block(pages).start);
        let (value_blocks, slots) = rest.split_at_mut(pages * layout.value_block_bytes());
        // Parts of the slot, in the order in which they lie.
        let mut rest = &mut slots[layout.ring_keys(slot).start - layout.value_block(pages).start..];
        let mut next = |bytes| rest.split_off_mut(..bytes).unwrap_or_default();
        Parts {
            key_blocks,
            value_blocks,
            ring_keys: next(layout.ring_key_bytes()),
            ring_values: next(layout.ring_value_bytes()),
            sink_keys: {
                next(layout.energy_bytes());
                next(layout.sink_key_bytes())
            },
            sink_values: next(layout.sink_value_bytes()),
            correction: next(layout.correction_bytes()),
            kept,
        }
    }
}
