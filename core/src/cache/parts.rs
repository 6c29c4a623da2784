//! What an admission writes: thinned keys and moved values into blocks, the others into the ring.

use super::{KeyOrder, Rows, evict::Kept};
use crate::{
    Admission, BLOCK, ChannelMask, Error, HeadLayout, MAX_HEAD_DIM,
    channel::predict::Prediction,
    quant::{CodeKind, GROUP, QUAD, mixed::KeyGroupsMut},
    storage::{Element, FloatKind, Form, MIXED_VALUES, StorageKind, elements, elements_mut, with_element},
    value::turn,
};
use core::ops::Range;

/// The parts of a head's bytes that one admission touches.
pub(super) struct Parts<'a> {
    pub(super) key_blocks: &'a mut [u8],
    pub(super) value_blocks: &'a mut [u8],
    pub(super) ring_keys: &'a mut [u8],
    pub(super) ring_values: &'a mut [u8],
    pub(super) sink_keys: &'a mut [u8],
    pub(super) sink_values: &'a mut [u8],
    pub(super) correction: &'a mut [u8],
    /// Which tokens stay, where not all do.
    pub(super) kept: Kept<'a>,
}

/// Numbers of a thinned key that are computed at a time.
const STEP: usize = 4 * QUAD;

/// What is stored of a key.
enum Thin<'a> {
    /// These channels.
    Channels(&'a [u16]),
    /// Its coordinates, see [`lowrank`](crate::channel::lowrank).
    Projected {
        /// `[D][T+1]`, as numbers of the kind.
        columns: &'a [u8],
        kind: FloatKind,
        kept: usize,
    },
}

/// The channels of `mask` in the front of `memory`.
pub(super) fn list<'a>(mask: &ChannelMask, memory: &'a mut [u16; MAX_HEAD_DIM]) -> &'a [u16] {
    memory.iter_mut().zip(mask.channels()).for_each(|(to, channel)| *to = channel as u16);
    &memory[..mask.kept()]
}

/// Where numbers of tokens lie.
#[derive(Clone, Copy)]
pub(super) struct Steps {
    /// Elements between two blocks of 32 tokens.
    block: usize,
    /// Between two tokens of a block.
    token: usize,
    /// Between two channels.
    channel: usize,
}

impl Steps {
    /// Of rows `stride` apart.
    const fn rows(stride: usize) -> Self {
        Self { block: BLOCK * stride, token: stride, channel: 1 }
    }

    /// Of the keys of `rows`.
    pub(super) const fn keys(rows: &Rows<'_>, head_dim: usize) -> Self {
        match rows.order {
            KeyOrder::Rows => Self::rows(rows.stride),
            KeyOrder::Blocks => Self { block: BLOCK * head_dim, token: 1, channel: BLOCK },
        }
    }

    #[inline(always)]
    pub(super) const fn at(self, token: usize, channel: usize) -> usize {
        token / BLOCK * self.block + token % BLOCK * self.token + channel * self.channel
    }
}

/// Where the whole tokens of an admission are, sinks not counted: the first `held` in the ring, the others new.
struct Whole<'a, E> {
    head_dim: usize,
    ring: &'a [E],
    held: usize,
    /// Elements between two tokens and between two channels of the ring.
    ring_steps: (usize, usize),
    new: &'a [f32],
    /// New tokens that become sinks, and lie before the others.
    sunk: usize,
    steps: Steps,
    /// Which tokens these are, where they are not all from the oldest on.
    list: Option<&'a [u32]>,
}

impl<E: Element> Whole<'_, E> {
    /// The token that is meant by `token`: itself, or the one that the list has there.
    #[inline(always)]
    fn listed(&self, token: usize) -> usize {
        self.list.map_or(token, |list| list[token] as usize)
    }

    #[inline(always)]
    fn get(&self, token: usize, channel: usize) -> E {
        let token = self.listed(token);
        if token < self.held {
            self.ring[token * self.ring_steps.0 + channel * self.ring_steps.1]
        } else {
            E::store(self.new[self.steps.at(token - self.held + self.sunk, channel)])
        }
    }

    /// The number itself: what is not in the ring yet is not rounded to what the ring stores.
    #[inline(always)]
    fn number(&self, token: usize, channel: usize) -> f32 {
        let token = self.listed(token);
        if token < self.held {
            self.ring[token * self.ring_steps.0 + channel * self.ring_steps.1].load()
        } else {
            self.new[self.steps.at(token - self.held + self.sunk, channel)]
        }
    }

    /// The numbers of `channels` of a token's value into `out`, as [`number`](Self::number). Values lie in rows.
    #[inline(always)]
    fn copy(&self, token: usize, channels: &[u16], out: &mut [f32]) {
        // Of a value that keeps all, channels lie side by side.
        let (first, last) = (channels[0].into(), channels[channels.len() - 1]);
        let whole = self.listed(token);
        if whole >= self.held && usize::from(last) - first + 1 == channels.len() {
            let row = &self.new[self.steps.at(whole - self.held + self.sunk, first)..][..channels.len()];
            out[..row.len()].copy_from_slice(row);
            return;
        }
        for (x, &channel) in out.iter_mut().zip(channels) {
            *x = self.number(token, channel.into());
        }
    }

    /// Numbers `start..` of the thinned keys of a block, as many as `numbers` has room for, lane by lane: `lanes` are
    /// tokens, `first` the first of them. Other lanes repeat the oldest: they must not widen a group's range.
    fn thin(
        &self,
        thin: &Thin<'_>,
        start: usize,
        (lanes, first): (&Range<usize>, usize),
        numbers: &mut [[f32; GROUP]],
    ) -> Result<(), Error> {
        let token = |lane: usize| first + lane.saturating_sub(lanes.start);
        match *thin {
            // Token by token, as they lie in memory.
            Thin::Channels(channels) => {
                for lane in 0..BLOCK {
                    for (numbers, &channel) in numbers.iter_mut().zip(&channels[start..]) {
                        numbers[lane] = self.number(token(lane), channel.into());
                    }
                }
            }
            Thin::Projected { columns, kind, kept } => with_element!(kind, P => {
                numbers.fill([0.0; GROUP]);
                for (channel, column) in elements::<P>(columns)?.chunks_exact(kept + 1).enumerate().take(self.head_dim) {
                    let mean = column[kept].load();
                    let centred: [f32; BLOCK] = core::array::from_fn(|lane| self.number(token(lane), channel) - mean);
                    for (numbers, share) in numbers.iter_mut().zip(&column[start..kept]) {
                        let share = share.load();
                        numbers.iter_mut().zip(&centred).for_each(|(sum, x)| *sum += share * x);
                    }
                }
            }),
        }
        Ok(())
    }

    /// Quantises a key block of `kept` numbers a token.
    fn quantise_keys(
        &self,
        kind: CodeKind,
        (thin, kept): (&Thin<'_>, usize),
        (lanes, first): (Range<usize>, usize),
        block: &mut [u8],
    ) -> Result<(), Error> {
        let mut groups = kind.parts_mut(block, kept)?;
        let mut numbers = [[0.0; GROUP]; STEP];
        for start in (0..kept).step_by(STEP) {
            let count = STEP.min(kept - start);
            self.thin(thin, start, (&lanes, first), &mut numbers[..count])?;
            let (quads, _) = numbers.as_chunks::<QUAD>();
            for (quad, numbers) in quads.iter().take(count.div_ceil(QUAD)).enumerate() {
                groups.put(start / QUAD + quad, numbers);
            }
        }
        Ok(())
    }

    /// Stores a key block of which each channel is [predicted](crate::channel::predict) by what is stored of those before; other
    /// lanes than `lanes` repeat the oldest, as for [`thin`](Self::thin).
    fn predict_keys<P: Element>(
        &self,
        form: Form,
        prediction: &Prediction<'_, P>,
        lanes: (Range<usize>, usize),
        block: &mut [u8],
    ) -> Result<(), Error> {
        // What has been stored takes 128 bytes of the stack a channel.
        match prediction.kept() {
            0..=64 => self.predict_some_keys::<P, 64>(form, prediction, lanes, block),
            65..=128 => self.predict_some_keys::<P, 128>(form, prediction, lanes, block),
            _ => self.predict_some_keys::<P, MAX_HEAD_DIM>(form, prediction, lanes, block),
        }
    }

    /// [`predict_keys`](Self::predict_keys) of up to `N` channels. O(T²/2) a token.
    #[inline(never)]
    fn predict_some_keys<P: Element, const N: usize>(
        &self,
        form: Form,
        prediction: &Prediction<'_, P>,
        (lanes, first): (Range<usize>, usize),
        block: &mut [u8],
    ) -> Result<(), Error> {
        let mut groups = KeyGroupsMut::new(form, block, prediction.kept())?;
        let mut stored = [[0.0f32; GROUP]; N];
        for (index, channel) in prediction.channels().enumerate() {
            let (shares, mean) = prediction.column(channel);
            let mean = mean.load();
            let (before, rest) = stored.split_at_mut(index);
            let numbers = &mut rest[0];
            for (lane, x) in numbers.iter_mut().enumerate() {
                *x = self.number(first + lane.saturating_sub(lanes.start), channel) - mean;
            }
            for (share, before) in shares.iter().zip(before) {
                let share = share.load();
                numbers.iter_mut().zip(before).for_each(|(x, y)| *x -= share * *y);
            }
            groups.put(index, numbers);
        }
        Ok(())
    }

    /// Quantises a value block of these channels; hidden lanes become zeros.
    fn quantise_values(
        &self,
        kind: CodeKind,
        channels: &[u16],
        (lanes, first): (Range<usize>, usize),
        block: &mut [u8],
    ) -> Result<(), Error> {
        let row = channels.len().div_ceil(GROUP);
        let mut groups = kind.parts_mut(block, BLOCK * row)?;
        for quad in 0..row * BLOCK / QUAD {
            let (group, start) = (quad * QUAD / BLOCK, quad * QUAD % BLOCK);
            let channels = &channels[group * GROUP..channels.len().min((group + 1) * GROUP)];
            let (mut numbers, count) = ([[0.0; GROUP]; QUAD], channels.len());
            for (lane, numbers) in (start..).zip(&mut numbers) {
                if lanes.contains(&lane) {
                    self.copy(first + lane - lanes.start, channels, numbers);
                    // A group that the channels do not fill repeats the last one.
                    let last = numbers[count - 1];
                    numbers[count..].fill(last);
                }
            }
            groups.put(quad, &numbers);
        }
        Ok(())
    }
}

/// Turned values.
impl<E: Element> Whole<'_, E> {
    /// The turned value of `token` into the front of `row`.
    fn turned(&self, token: usize, channels: &[u16], row: &mut [f32; MAX_HEAD_DIM]) {
        let row = &mut row[..channels.len()];
        self.copy(token, channels, row);
        turn(row);
    }

    /// [`quantise_values`](Self::quantise_values) of turned values, which have all channels.
    fn turn_values(
        &self,
        kind: CodeKind,
        channels: &[u16],
        (lanes, first): (Range<usize>, usize),
        block: &mut [u8],
    ) -> Result<(), Error> {
        let mut groups = kind.turned_parts_mut(block, channels.len())?;
        for start in (0..BLOCK).step_by(QUAD) {
            let mut rows = [[0.0; MAX_HEAD_DIM]; QUAD];
            for (lane, row) in (start..).zip(&mut rows).filter(|(lane, _)| lanes.contains(lane)) {
                self.turned(first + lane - lanes.start, channels, row);
            }
            groups.put_turned(start, &rows, channels.len());
        }
        Ok(())
    }
}

/// Replacing what evicted tokens have left.
impl<E: Element> Whole<'_, E> {
    /// Stores keys in lanes of blocks that have others: the first of the list, one a lane of `lanes`.
    fn replace_keys(
        &self,
        kind: StorageKind,
        mask: &ChannelMask,
        lanes: &[u32],
        block: impl FnMut(usize) -> Range<usize>,
        bytes: &mut [u8],
    ) -> Result<(), Error> {
        each_block(lanes, block, |first, lanes, range| {
            let block = &mut bytes[range];
            if let Form::Codes(kind) = kind.form() {
                let mut groups = kind.parts_mut(block, mask.kept())?;
                let mut numbers = [0.0; GROUP];
                for (group, channel) in mask.channels().enumerate() {
                    for (token, &lane) in (first..).zip(lanes) {
                        numbers[lane as usize % BLOCK] = self.number(token, channel);
                    }
                    groups.replace(group, lanes.iter().map(|&lane| lane as usize % BLOCK), &numbers);
                }
                return Ok(());
            }
            let stored = elements_mut::<E>(block)?;
            for (to, channel) in stored.chunks_exact_mut(BLOCK).zip(mask.channels()) {
                for (token, &lane) in (first..).zip(lanes) {
                    to[lane as usize % BLOCK] = self.get(token, channel);
                }
            }
            Ok(())
        })
    }

    /// Stores values where [`replace_keys`](Self::replace_keys) stores keys.
    fn replace_values(
        &self,
        kind: StorageKind,
        channels: &[u16],
        lanes: &[u32],
        block: impl FnMut(usize) -> Range<usize>,
        bytes: &mut [u8],
    ) -> Result<(), Error> {
        each_block(lanes, block, |first, lanes, range| {
            let block = &mut bytes[range];
            if let Form::Turned(kind) = kind.form() {
                let mut groups = kind.turned_parts_mut(block, channels.len())?;
                let mut row = [0.0; MAX_HEAD_DIM];
                for (token, &lane) in (first..).zip(lanes) {
                    self.turned(token, channels, &mut row);
                    groups.replace_turned(lane as usize % BLOCK, &row[..channels.len()]);
                }
                return Ok(());
            }
            if let Form::Codes(kind) = kind.form() {
                let row = channels.len().div_ceil(GROUP);
                let mut groups = kind.parts_mut(block, BLOCK * row)?;
                for (token, &lane) in (first..).zip(lanes) {
                    for (group, channels) in channels.chunks(GROUP).enumerate() {
                        let (mut numbers, count) = ([0.0; GROUP], channels.len());
                        self.copy(token, channels, &mut numbers);
                        let last = numbers[count - 1];
                        numbers[count..].fill(last);
                        groups.put_group(group * BLOCK + lane as usize % BLOCK, &numbers);
                    }
                }
                return Ok(());
            }
            let stored = elements_mut::<E>(block)?;
            for (token, &lane) in (first..).zip(lanes) {
                let to = &mut stored[lane as usize % BLOCK * channels.len()..];
                to.iter_mut().zip(channels).for_each(|(to, &channel)| *to = self.get(token, channel.into()));
            }
            Ok(())
        })
    }
}

/// Calls `each` for every block that has some of `lanes` (ascending, over all blocks) with the place of the first of them
/// in the list, those lanes, and where the block lies.
fn each_block(
    lanes: &[u32],
    mut block: impl FnMut(usize) -> Range<usize>,
    mut each: impl FnMut(usize, &[u32], Range<usize>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut first = 0;
    for lanes in lanes.chunk_by(|a, b| *a as usize / BLOCK == *b as usize / BLOCK) {
        each(first, lanes, block(lanes[0] as usize / BLOCK))?;
        first += lanes.len();
    }
    Ok(())
}

/// Stores the whole keys of the new `tokens`, channel-major with `stride` lanes a channel, from lane `first` on.
fn put_keys<E: Element>(
    rows: &Rows<'_>,
    tokens: Range<usize>,
    stored: &mut [E],
    head_dim: usize,
    stride: usize,
    first: usize,
) {
    let steps = Steps::keys(rows, head_dim);
    for (channel, lanes) in stored.chunks_exact_mut(stride).take(head_dim).enumerate() {
        for (token, lane) in tokens.clone().zip(&mut lanes[first..]) {
            *lane = E::store(rows.keys[steps.at(token, channel)]);
        }
    }
}

/// Stores the whole values of the new `tokens`, one after the other.
fn put_values<E: Element>(rows: &Rows<'_>, tokens: Range<usize>, stored: &mut [E], head_dim: usize) {
    for (token, to) in tokens.zip(stored.chunks_exact_mut(head_dim)) {
        for (to, &x) in to.iter_mut().zip(&rows.values[token * rows.stride..]) {
            *to = E::store(x);
        }
    }
}

impl Parts<'_> {
    /// Thins the keys that leave the ring; `E` is what the ring stores.
    pub(super) fn thin_keys<E: Element>(
        &mut self,
        layout: &HeadLayout,
        admission: &Admission,
        pages: &[u32],
        mask: &ChannelMask,
        rows: Rows<'_>,
    ) -> Result<(), Error> {
        let mut memory = [0; MAX_HEAD_DIM];
        let thin = if layout.projects() {
            let (kind, kept) = (layout.correction_kind(), layout.kept as usize);
            Thin::Projected { columns: self.correction, kind, kept }
        } else {
            Thin::Channels(list(mask, &mut memory))
        };
        let whole = Whole {
            head_dim: layout.head_dim as usize,
            ring: elements::<E>(self.ring_keys)?,
            held: admission.before.recent as usize,
            ring_steps: (1, layout.ring_stride()),
            new: rows.keys,
            sunk: admission.sunk,
            steps: Steps::keys(&rows, layout.head_dim as usize),
            list: self.kept.list(admission),
        };
        let place = |block: usize| layout.key_block(pages[block] as usize);
        whole.replace_keys(layout.keys, mask, self.kept.lanes, place, self.key_blocks)?;
        for block in admission.new_blocks() {
            let (lanes, first) = self.kept.place(admission, block);
            let bytes = &mut self.key_blocks[layout.key_block(pages[block] as usize)];
            let (bytes, own) = bytes.split_at_mut(layout.mask_at());
            mask.to_bits(own);
            if layout.predicts() {
                with_element!(layout.correction_kind(), P => {
                    let (head_dim, numbers) = (layout.head_dim as usize, elements::<P>(self.correction)?);
                    let prediction = Prediction::resume(head_dim, layout.kept as usize, numbers)?;
                    whole.predict_keys(layout.keys.form(), &prediction, (lanes, first), bytes)?;
                });
                continue;
            }
            if let Form::Codes(kind) = layout.keys.form() {
                whole.quantise_keys(kind, (&thin, mask.kept()), (lanes, first), bytes)?;
                continue;
            }
            let stored = elements_mut::<E>(bytes)?;
            if let Thin::Projected { .. } = thin {
                let mut numbers = [[0.0; BLOCK]; STEP];
                for (step, to) in stored[..mask.kept() * BLOCK].chunks_mut(STEP * BLOCK).enumerate() {
                    let numbers = &mut numbers[..to.len() / BLOCK];
                    whole.thin(&thin, step * STEP, (&lanes, first), numbers)?;
                    to.iter_mut().zip(numbers.as_flattened()).for_each(|(to, &x)| *to = E::store(x));
                }
                continue;
            }
            for (to, channel) in stored.chunks_exact_mut(BLOCK).zip(mask.channels()) {
                // Hidden lanes are written too: a page may hold what another sequence left.
                to[..lanes.start].fill(E::store(0.0));
                for (token, to) in (first..).zip(&mut to[lanes.clone()]) {
                    *to = whole.get(token, channel);
                }
            }
        }
        Ok(())
    }

    /// Thins the values that leave the ring; `E` is what the ring stores.
    pub(super) fn thin_values<E: Element>(
        &mut self,
        layout: &HeadLayout,
        admission: &Admission,
        pages: &[u32],
        mask: &ChannelMask,
        rows: Rows<'_>,
    ) -> Result<(), Error> {
        let (head_dim, mut memory) = (layout.head_dim as usize, [0; MAX_HEAD_DIM]);
        let channels = list(mask, &mut memory);
        let whole = Whole {
            head_dim,
            ring: elements::<E>(self.ring_values)?,
            held: admission.before.recent as usize,
            ring_steps: (head_dim, 1),
            new: rows.values,
            sunk: admission.sunk,
            steps: Steps::rows(rows.stride),
            list: self.kept.list(admission),
        };
        let start = layout.value_block(0).start;
        let place = |block: usize| {
            let range = layout.value_block(pages[block] as usize);
            range.start - start..range.end - start
        };
        whole.replace_values(layout.values, channels, self.kept.lanes, place, self.value_blocks)?;
        for block in admission.new_blocks() {
            let (lanes, first) = self.kept.place(admission, block);
            let range = layout.value_block(pages[block] as usize);
            let bytes = &mut self.value_blocks[range.start - start..range.end - start];
            match layout.values.form() {
                Form::Codes(kind) => {
                    whole.quantise_values(kind, channels, (lanes, first), bytes)?;
                    continue;
                }
                Form::Turned(kind) => {
                    whole.turn_values(kind, channels, (lanes, first), bytes)?;
                    continue;
                }
                Form::Mixed => return Err(MIXED_VALUES),
                Form::Float(_) => {}
            }
            let stored = elements_mut::<E>(bytes)?;
            let (hidden, tokens) = stored.split_at_mut(lanes.start * channels.len());
            hidden.fill(E::store(0.0));
            for (token, to) in (first..).zip(tokens.chunks_exact_mut(channels.len())).take(lanes.len()) {
                for (&channel, to) in channels.iter().zip(to) {
                    *to = whole.get(token, channel.into());
                }
            }
        }
        Ok(())
    }

    /// Stores the keys of new sinks.
    pub(super) fn sink_keys<E: Element>(
        &mut self,
        layout: &HeadLayout,
        admission: &Admission,
        rows: Rows<'_>,
    ) -> Result<(), Error> {
        if admission.sunk == 0 {
            return Ok(());
        }
        let (sinks, first) = (layout.sinks as usize, admission.before.sinks as usize);
        let stored = elements_mut::<E>(self.sink_keys)?;
        if first == 0 {
            // What is read as lanes of the last channels, and what another sequence has left.
            stored.fill(E::store(0.0));
        }
        put_keys(&rows, 0..admission.sunk, stored, layout.head_dim as usize, sinks, first);
        Ok(())
    }

    /// Stores the values of new sinks.
    pub(super) fn sink_values<E: Element>(
        &mut self,
        layout: &HeadLayout,
        admission: &Admission,
        rows: Rows<'_>,
    ) -> Result<(), Error> {
        let head_dim = layout.head_dim as usize;
        let stored = elements_mut::<E>(self.sink_values)?;
        put_values(&rows, 0..admission.sunk, &mut stored[admission.before.sinks as usize * head_dim..], head_dim);
        Ok(())
    }

    pub(super) fn append_keys<E: Element>(
        &mut self,
        layout: &HeadLayout,
        admission: &Admission,
        rows: Rows<'_>,
    ) -> Result<(), Error> {
        let (held, gone) = (admission.before.recent as usize, admission.thinned);
        let (stay, skip) = (held.saturating_sub(gone), gone.saturating_sub(held));
        let (head_dim, stride) = (layout.head_dim as usize, layout.ring_stride());
        let ring = elements_mut::<E>(self.ring_keys)?;
        for lanes in ring.chunks_exact_mut(stride).take(head_dim) {
            lanes.copy_within(held - stay..held, 0);
        }
        put_keys(&rows, admission.sunk + skip..admission.new, ring, head_dim, stride, stay);
        Ok(())
    }

    pub(super) fn append_values<E: Element>(
        &mut self,
        layout: &HeadLayout,
        admission: &Admission,
        rows: Rows<'_>,
    ) -> Result<(), Error> {
        let head_dim = layout.head_dim as usize;
        let (held, gone) = (admission.before.recent as usize, admission.thinned);
        let (stay, skip) = (held.saturating_sub(gone), gone.saturating_sub(held));
        let ring = elements_mut::<E>(self.ring_values)?;
        ring.copy_within((held - stay) * head_dim..held * head_dim, 0);
        put_values(&rows, admission.sunk + skip..admission.new, &mut ring[stay * head_dim..], head_dim);
        Ok(())
    }
}
