//! Recording and replaying: one computation, written down by the one and compared by the other.

use super::{Record, RowKind, TraceError, TraceHeader, TraceReader, TraceWriter};
use crate::{
    ChannelMask, Error, HeadLayout, HeadMut, HeadRef, KeyOrder, Loops, MAX_HEAD_DIM, Masks, Moments, QueryWindow, Rows,
    Scoring, Span, TokenRows, attend,
    channel::{compensate, residual, score::add_energy},
    mass,
    policy::Fix,
};

/// Memory that one head takes to be recorded or replayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Needs {
    /// Floats.
    pub floats: usize,
    /// Words of the cache, of eight bytes.
    pub words: usize,
    /// Entries of the page table.
    pub pages: usize,
}

impl Needs {
    /// Of a head of `layout` in a trace of `header`.
    ///
    /// # Errors
    /// As [`HeadLayout::check`]; [`TraceError::Short`] where the prompt leaves nothing thin, [`Error::Length`] where there is not
    /// room for just as many blocks as prompt and steps take, and [`Error::Inconsistent`] for
    /// layouts that traces do not have: of several sequences, with low-rank keys, thin values, or masks or tokens that change.
    pub fn of(header: &TraceHeader<'_>, layout: &HeadLayout) -> Result<Self, TraceError> {
        layout.check()?;
        let [head_dim, group, window, prompt, steps] = sizes(header);
        let plain = layout.slots == 1 && !layout.renews && layout.ranked == 0 && !layout.thins_values();
        if !plain || usize::from(layout.head_dim) != head_dim || matches!(layout.fix, Fix::Lowrank) {
            return Err(Error::Inconsistent { what: "the layout of a traced head" }.into());
        }
        let whole = usize::from(layout.sinks) + layout.ring_capacity();
        if prompt <= whole {
            return Err(TraceError::Short { prompt, needed: whole + 1 });
        }
        let pages = HeadLayout::blocks_for(prompt + steps - usize::from(layout.sinks), layout.recent.into());
        if layout.pages as usize != pages {
            return Err(Error::Length { what: "pages", expected: pages, actual: layout.pages as usize }.into());
        }
        let moments = match layout.fix {
            Fix::Compensated | Fix::Predictive => {
                2 * prompt
                    + head_dim
                    + head_dim * head_dim
                    + compensate::moments_scratch(head_dim)
                    + layout.scratch_len()
                    // What is left, the queries' moment, what each choice gains, and scratch for it.
                    + if header.residual { 2 * head_dim * head_dim + head_dim + residual::scratch_len(head_dim) } else { 0 }
            }
            _ => 0,
        };
        let rows = group * window + 2 * prompt + 2 * group + 2 + 4;
        let floats = rows * head_dim + attend::attend_len(group, head_dim) + moments;
        Ok(Self { floats, words: layout.bytes().div_ceil(size_of::<u64>()), pages: layout.pages as usize })
    }

    /// As much of each as both need.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            floats: self.floats.max(other.floats),
            words: self.words.max(other.words),
            pages: self.pages.max(other.pages),
        }
    }
}

fn sizes(header: &TraceHeader<'_>) -> [usize; 5] {
    [header.head_dim.into(), header.group.into(), header.window.into(), header.prompt as usize, header.steps as usize]
}

/// Memory for one head at a time, of at least what it [needs](Needs).
#[derive(Debug)]
pub struct Work<'a> {
    /// Rows and scratch.
    pub floats: &'a mut [f32],
    /// The cache.
    pub words: &'a mut [u64],
    /// The page table.
    pub pages: &'a mut [u32],
}

/// What a head was given.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// Queries of the window and of the steps: those of the last W + steps tokens, `[G][W + steps][D]`.
    pub queries: &'a [f32],
    /// Keys of the prompt and of the steps, `[prompt + steps][D]`.
    pub keys: &'a [f32],
    /// Their values.
    pub values: &'a [f32],
}

/// What differs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum What {
    /// A channel's energy.
    Energy {
        /// Of queries, or of keys.
        queries: bool,
        /// The channel.
        channel: usize,
        /// As recorded.
        expected: f32,
        /// As computed.
        found: f32,
    },
    /// The channels chosen.
    Mask {
        /// As recorded.
        expected: ChannelMask,
        /// As computed.
        found: ChannelMask,
    },
    /// A number of an output.
    Output {
        /// The step.
        step: usize,
        /// The query head of the group.
        query_head: usize,
        /// The channel.
        channel: usize,
        /// As recorded.
        expected: f32,
        /// As computed.
        found: f32,
    },
}

/// Where something differs, and what.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Difference {
    /// The layer.
    pub layer: u16,
    /// The KV head.
    pub head: u16,
    /// What.
    pub what: What,
}

impl core::fmt::Display for Difference {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { layer, head, what } = self;
        write!(f, "layer {layer}, KV head {head}: ")?;
        match what {
            What::Energy { queries, channel, expected, found } => {
                let of = if *queries { "queries" } else { "keys" };
                write!(f, "the energy of {of} in channel {channel} is {found}, recorded was {expected}")
            }
            What::Mask { expected, found } => {
                write!(f, "other channels are kept than were recorded:")?;
                for channel in 0..expected.head_dim().max(found.head_dim()) {
                    match (expected.contains(channel), found.contains(channel)) {
                        (true, false) => write!(f, " -{channel}")?,
                        (false, true) => write!(f, " +{channel}")?,
                        _ => {}
                    }
                }
                Ok(())
            }
            What::Output { step, query_head, channel, expected, found } => write!(
                f,
                "step {step}, query head {query_head}: channel {channel} of the output is {found}, recorded was {expected}"
            ),
        }
    }
}

/// What a replay came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Replayed {
    /// Heads replayed.
    pub heads: u32,
    /// Masks that differ.
    pub masks: u32,
    /// Rows of energies that differ by more than the tolerance.
    pub energies: u32,
    /// Rows of outputs compared.
    pub compared: u32,
    /// Rows of outputs that differ by more than the tolerance.
    pub outputs: u32,
    /// Largest difference of a number of an output, as a share of the largest number of its row.
    pub worst: f32,
    /// The first difference.
    pub first: Option<Difference>,
}

impl Replayed {
    /// Whether everything is as recorded.
    #[must_use]
    pub const fn same(&self) -> bool {
        self.masks == 0 && self.energies == 0 && self.outputs == 0
    }

    /// Compares a row; the channel that is furthest off, if it is by more than `tolerance` of the row's largest number, and
    /// by how much it is off.
    fn compare(expected: &[f32], found: &[f32], tolerance: f32) -> (f32, Option<usize>) {
        let largest = expected.iter().fold(f32::MIN_POSITIVE, |most, x| most.max(x.abs()));
        let mut worst = (0.0, 0);
        for (channel, (&expected, &found)) in expected.iter().zip(found).enumerate() {
            // What is no number is off by any measure, unless it was recorded so.
            let off = if expected.to_bits() == found.to_bits() { 0.0 } else { (expected - found).abs() / largest };
            let off = if off.is_nan() { f32::INFINITY } else { off };
            if off > worst.0 {
                worst = (off, channel);
            }
        }
        (worst.0, (worst.0 > tolerance).then_some(worst.1))
    }
}

/// The rows of one head, and the cache that they make.
struct Run<'a> {
    layout: HeadLayout,
    residual: bool,
    sizes: [usize; 5],
    window: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
    query_energy: &'a mut [f32],
    key_energy: &'a mut [f32],
    query: &'a mut [f32],
    key: &'a mut [f32],
    value: &'a mut [f32],
    out: &'a mut [f32],
    /// Two rows that what was recorded is read into.
    recorded: &'a mut [f32],
    attention: &'a mut [f32],
    moments: &'a mut [f32],
    cache: &'a mut [u8],
    pages: &'a mut [u32],
    span: Span,
    masks: Option<Masks>,
}

impl<'a> Run<'a> {
    fn new(header: &TraceHeader<'_>, layout: HeadLayout, work: &'a mut Work<'_>) -> Result<Self, TraceError> {
        let needs = Needs::of(header, &layout)?;
        for (what, needed, capacity) in [
            ("trace floats", needs.floats, work.floats.len()),
            ("trace words", needs.words, work.words.len()),
            ("trace pages", needs.pages, work.pages.len()),
        ] {
            if needed > capacity {
                return Err(Error::Capacity { what, needed, capacity }.into());
            }
        }
        let sizes = sizes(header);
        let [head_dim, group, window, prompt, _] = sizes;
        let mut rest = &mut work.floats[..needs.floats];
        let mut take = |floats: usize| rest.split_off_mut(..floats).unwrap_or_default();
        let cache: &mut [u8] = bytemuck::cast_slice_mut(&mut work.words[..needs.words]);
        cache.fill(0);
        let pages = &mut work.pages[..needs.pages];
        pages.iter_mut().zip(0..).for_each(|(page, number)| *page = number);
        Ok(Self {
            layout,
            residual: header.residual,
            sizes,
            window: take(group * window * head_dim),
            keys: take(prompt * head_dim),
            values: take(prompt * head_dim),
            query_energy: take(head_dim),
            key_energy: take(head_dim),
            query: take(group * head_dim),
            key: take(head_dim),
            value: take(head_dim),
            out: take(group * head_dim),
            recorded: take(2 * head_dim),
            attention: take(attend::attend_len(group, head_dim)),
            moments: rest,
            cache: &mut cache[..layout.bytes()],
            pages,
            span: Span::default(),
            masks: None,
        })
    }

    /// Computes energies and the mask, and stores the prompt.
    fn prompt<L: Loops>(&mut self, loops: &L) -> Result<ChannelMask, TraceError> {
        let [head_dim, group, window, prompt, _] = self.sizes;
        let layout = self.layout;
        self.query_energy.fill(0.0);
        self.key_energy.fill(0.0);
        add_energy(self.window, group * window, head_dim, self.query_energy)?;
        add_energy(self.keys, prompt, head_dim, self.key_energy)?;

        let rows = Rows { keys: self.keys, order: KeyOrder::Rows, values: self.values, stride: head_dim };
        let admission = self.span.admit(prompt, layout.retention(), true);
        let mut head = HeadMut::new(layout, self.cache, 0)?;
        head.clear_energy();
        head.add_query_energy(self.window, group * window, head_dim)?;
        let scoring = Scoring { queries: group * window, ..Scoring::default() };
        let mut mask = head.choose(&scoring, &admission, rows)?;
        if matches!(layout.fix, Fix::Compensated | Fix::Predictive) {
            let prefix = admission.sunk + admission.thinned;
            let mut rest = &mut *self.moments;
            let mut take = |floats: usize| rest.split_off_mut(..floats).unwrap_or_default();
            let (mass, row, mean) = (take(prompt), take(prompt), take(head_dim));
            let (covariance, centred) = (take(head_dim * head_dim), take(compensate::moments_scratch(head_dim)));
            let scratch = take(layout.scratch_len());
            let keys = TokenRows::new(self.keys, prompt, head_dim, head_dim)?;
            let queries = QueryWindow::new(self.window, [group, window * head_dim], [window, head_dim], head_dim)?;
            mass::group_mass(loops, &queries, &keys, row, mass)?;
            let weights = &mut mass[..prefix];
            compensate::weigh(weights, admission.sunk)?;
            if compensate::tells(admission.thinned, head_dim) {
                compensate::moments(&keys.first(prefix)?, weights, centred, mean, covariance)?;
                let mut order = [0; MAX_HEAD_DIM];
                let order = &mut order[..layout.kept.into()];
                order.iter_mut().zip(mask.channels()).for_each(|(to, channel)| *to = channel as u16);
                if self.residual {
                    let (left, moment) = (take(head_dim * head_dim), take(head_dim * head_dim));
                    let (gains, scratch) = (take(head_dim), take(residual::scratch_len(head_dim)));
                    left.copy_from_slice(covariance);
                    residual::moment(self.window, group * window, head_dim, head_dim, moment)?;
                    mask = residual::choose(left, moment, layout.kept.into(), scratch, gains, order)?;
                }
                head.correct(&mask, Moments::Known { mean, covariance, order, scratch })?;
            } else {
                head.correct(&mask, Moments::Tokens { admission: &admission, rows })?;
            }
        }
        let masks = Masks::of_keys(mask);
        head.admit(&admission, &self.pages[..admission.after.blocks as usize], Some(&masks), rows)?;
        (self.span, self.masks) = (admission.after, Some(masks));
        Ok(mask)
    }

    /// Stores the token of a step and attends to all.
    fn step<L: Loops>(&mut self, loops: &L) -> Result<(), TraceError> {
        let [head_dim, ..] = self.sizes;
        let admission = self.span.admit(1, self.layout.retention(), false);
        let pages = &self.pages[..admission.after.blocks as usize];
        let rows = Rows { keys: self.key, order: KeyOrder::Rows, values: self.value, stride: head_dim };
        HeadMut::new(self.layout, self.cache, 0)?.admit(&admission, pages, self.masks.as_ref(), rows)?;
        self.span = admission.after;
        let head = HeadRef::new(self.layout, self.cache, 0, pages, self.span, self.masks.as_ref())?;
        Ok(attend::attend(loops, &head, self.query, usize::MAX, self.attention, self.out)?)
    }
}

/// Records one head: what it was given, and what the cache of `layout` makes of it by `loops`.
///
/// # Errors
/// As [`Needs::of`]; [`Error::Capacity`] where `work` is less than that; [`Error::Length`] where `given` has another shape than
/// `header` says; and what the sink of `writer` says.
pub fn record<L, S, E>(
    loops: &L,
    header: &TraceHeader<'_>,
    (layer, head, layout): (u16, u16, HeadLayout),
    given: Prompt<'_>,
    work: &mut Work<'_>,
    writer: &mut TraceWriter<S>,
) -> Result<(), E>
where
    L: Loops,
    S: FnMut(&[u8]) -> Result<(), E>,
    E: From<TraceError>,
{
    let [head_dim, group, window, prompt, steps] = sizes(header);
    for (what, slice, rows) in [
        ("queries", given.queries, group * (window + steps)),
        ("keys", given.keys, prompt + steps),
        ("values", given.values, prompt + steps),
    ] {
        crate::error::check_len(what, rows * head_dim, slice.len()).map_err(TraceError::from)?;
    }
    let mut run = Run::new(header, layout, work)?;
    writer.write(&Record::Head { layer, head, layout })?;
    let (key_rows, value_rows) = (given.keys.chunks_exact(head_dim), given.values.chunks_exact(head_dim));
    let query = |head: usize, at: usize| &given.queries[(head * (window + steps) + at) * head_dim..][..head_dim];
    for (index, row) in run.window.chunks_exact_mut(head_dim).enumerate() {
        row.copy_from_slice(query(index / window, index % window));
        writer.row(RowKind::WindowQuery, index, row)?;
    }
    run.keys.copy_from_slice(&given.keys[..prompt * head_dim]);
    run.values.copy_from_slice(&given.values[..prompt * head_dim]);
    for (index, (key, value)) in key_rows.clone().zip(value_rows.clone()).take(prompt).enumerate() {
        writer.row(RowKind::PromptKey, index, key)?;
        writer.row(RowKind::PromptValue, index, value)?;
    }
    let mask = run.prompt(loops)?;
    writer.row(RowKind::QueryEnergy, 0, run.query_energy)?;
    writer.row(RowKind::KeyEnergy, 0, run.key_energy)?;
    writer.write(&Record::Mask(mask))?;
    for (step, (key, value)) in key_rows.zip(value_rows).skip(prompt).enumerate() {
        for (head, row) in run.query.chunks_exact_mut(head_dim).enumerate() {
            row.copy_from_slice(query(head, window + step));
            writer.row(RowKind::StepQuery, step * group + head, row)?;
        }
        run.key.copy_from_slice(key);
        run.value.copy_from_slice(value);
        writer.row(RowKind::StepKey, step, key)?;
        writer.row(RowKind::StepValue, step, value)?;
        run.step(loops)?;
        for (head, row) in run.out.chunks_exact(head_dim).enumerate() {
            writer.row(RowKind::Output, step * group + head, row)?;
        }
    }
    Ok(())
}

/// Replays a trace by `loops`, head after head in the same memory, and compares. Numbers may differ by `tolerance` as a share
/// of the largest of their row: none on the build that recorded them, some where a processor rounds otherwise.
///
/// # Errors
/// [`TraceError`] where the trace cannot be read or its shape cannot be; [`Error::Capacity`] with what a head
/// [needs](Needs) where `work` is less. Differences are no errors: they are told.
pub fn replay<L: Loops>(
    loops: &L,
    mut reader: TraceReader<'_>,
    tolerance: f32,
    work: &mut Work<'_>,
) -> Result<Replayed, TraceError> {
    let header = *reader.header();
    let [head_dim, group, _, prompt, steps] = sizes(&header);
    let mut told = Replayed::default();
    while let Some((layer, head, layout)) = reader.head()? {
        let differs = |what| Difference { layer, head, what };
        let mut run = Run::new(&header, layout, work)?;
        for (index, row) in run.window.chunks_exact_mut(head_dim).enumerate() {
            reader.row(RowKind::WindowQuery, index, row)?;
        }
        for (index, (key, value)) in
            run.keys.chunks_exact_mut(head_dim).zip(run.values.chunks_exact_mut(head_dim)).take(prompt).enumerate()
        {
            reader.row(RowKind::PromptKey, index, key)?;
            reader.row(RowKind::PromptValue, index, value)?;
        }
        let found = run.prompt(loops)?;
        for (kind, computed) in [(RowKind::QueryEnergy, &*run.query_energy), (RowKind::KeyEnergy, &*run.key_energy)] {
            let expected = &mut run.recorded[..head_dim];
            reader.row(kind, 0, expected)?;
            if let (_, Some(channel)) = Replayed::compare(expected, computed, tolerance) {
                told.energies += 1;
                let (expected, found) = (expected[channel], computed[channel]);
                let what = What::Energy { queries: kind == RowKind::QueryEnergy, channel, expected, found };
                told.first.get_or_insert(differs(what));
            }
        }
        let expected = reader.mask()?;
        if expected != found {
            told.masks += 1;
            told.first.get_or_insert(differs(What::Mask { expected, found }));
        }
        for step in 0..steps {
            for (query_head, row) in run.query.chunks_exact_mut(head_dim).enumerate() {
                reader.row(RowKind::StepQuery, step * group + query_head, row)?;
            }
            reader.row(RowKind::StepKey, step, run.key)?;
            reader.row(RowKind::StepValue, step, run.value)?;
            run.step(loops)?;
            for (query_head, computed) in run.out.chunks_exact(head_dim).enumerate() {
                let expected = &mut run.recorded[..head_dim];
                reader.row(RowKind::Output, step * group + query_head, expected)?;
                let (off, channel) = Replayed::compare(expected, computed, tolerance);
                told.compared += 1;
                told.worst = told.worst.max(off);
                if let Some(channel) = channel {
                    told.outputs += 1;
                    let (expected, found) = (expected[channel], computed[channel]);
                    told.first.get_or_insert(differs(What::Output { step, query_head, channel, expected, found }));
                }
            }
        }
        told.heads += 1;
    }
    if told.heads == header.heads {
        Ok(told)
    } else {
        Err(TraceError::Order { record: reader.records(), expected: "as many heads as the header tells" })
    }
}
