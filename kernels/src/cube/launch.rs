//! Launches: how kernels are called, and with what tables. Nothing here waits for the device.

use super::{
    append, attention, copy, extend, flush,
    layout::{Shape, head, row, step},
    learn, merge,
    residual::{self, Told},
    score, select, solve, tile,
};
use cubecl::{prelude::*, server::Handle};
use cubecl_runtime::memory_management::MemoryAllocationMode;
use thinkey_core::{Admission, BLOCK, HeadLayout, Span};

#[cfg(all(test, feature = "vulkan"))]
std::thread_local! {
    static LAUNCHES: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Notes that a kernel is launched, for tests that count them.
#[inline]
pub(crate) fn count_launch() {
    #[cfg(all(test, feature = "vulkan"))]
    LAUNCHES.set(LAUNCHES.get() + 1);
}

/// Kernels of ours that this thread has launched.
#[cfg(all(test, feature = "vulkan"))]
pub(crate) fn launches() -> usize {
    LAUNCHES.get()
}

/// Has whatever this thread allocates from now on take as many bytes as it asks for, to the alignment. Freed memory serves what
/// is of the same size, until it is [given back](ComputeClient::memory_cleanup).
///
/// cubecl's own pools grow in pages, which on CUDA are of up to a quarter of the device's memory, and cannot be told others:
/// on a board of 8 GiB an activation of 300 MB would take 2 GiB. What is computed with here comes in few sizes.
pub(crate) fn allocate_exactly<R: Runtime>(client: &ComputeClient<R>) {
    // SAFETY: it is a setting of the allocator of this thread's stream, made in turn with what that does. What it warns of,
    // that memory of sizes that do not come again stays, is seen to: it is given back when shapes change.
    unsafe { client.allocation_mode(MemoryAllocationMode::Persistent) };
}

/// Has this thread allocate from cubecl's pools: for what comes in another size at every step.
pub(crate) fn allocate_in_pages<R: Runtime>(client: &ComputeClient<R>) {
    // SAFETY: as in `allocate_exactly`; these pools share pages among all sizes.
    unsafe { client.allocation_mode(MemoryAllocationMode::Auto) };
}

/// Numbers on the device.
#[derive(Clone, Debug)]
pub(crate) struct Numbers {
    pub(crate) handle: Handle,
    pub(crate) len: usize,
}

impl Numbers {
    /// Room for `len` numbers of 32 bits.
    pub(crate) fn empty<R: Runtime>(client: &ComputeClient<R>, len: usize) -> Self {
        Self { handle: client.empty(len.max(1) * 4), len }
    }

    /// A table of the host.
    pub(crate) fn of<R: Runtime>(client: &ComputeClient<R>, table: &[u32]) -> Self {
        // A buffer has at least one number.
        let table = if table.is_empty() { &[0] } else { table };
        Self { handle: client.create_from_slice(bytemuck::cast_slice(table)), len: table.len() }
    }

    pub(crate) fn arg<R: Runtime>(&self) -> ArrayArg<R> {
        // SAFETY: the handle was made with room for as many numbers, or is that of a contiguous tensor of as many.
        unsafe { ArrayArg::from_raw_parts(self.handle.clone(), self.len) }
    }
}

/// The caches of a layer: the bytes of all heads, one after the other, where they lie, and which channels they keep.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) arena: Numbers,
    pub(crate) heads: Numbers,
    /// `[slot][head][D]`.
    pub(crate) channels: Numbers,
    /// Cached heads.
    pub(crate) count: usize,
    pub(crate) shape: Shape,
}

/// What channels are scored by beside energies: made for each layer that chooses.
#[derive(Clone, Debug, Default)]
pub(crate) enum Given {
    /// Nothing.
    #[default]
    Nothing,
    /// The scores themselves, `[step][head][D]`.
    Scores(Numbers),
    /// Random signs of the whole tokens of a step, two words each, `[step][head][most tokens]`; and the rows of the sketch.
    Signs {
        /// The signs: bit r of the two words is that of row r.
        signs: Numbers,
        /// The most tokens.
        tokens: usize,
        /// Rows of the sketch, 1 to 64.
        rows: usize,
    },
}

/// The entry of a head that begins at byte `start` of its layer.
pub(crate) fn head_entry(layout: &HeadLayout, start: usize) -> [u32; head::FIELDS] {
    let words = |bytes: usize| u32::try_from(bytes / 4).expect("a layer is below 16 GiB");
    let slot = layout.ring_keys(0).start;
    let slot_bytes = layout.ranks(0).end - slot;
    let mut entry = [0; head::FIELDS];
    entry[head::KEPT] = u32::from(layout.kept);
    entry[head::KEYS] = words(start + layout.key_block(0).start);
    entry[head::KEY_BLOCK] = words(layout.key_block_bytes());
    entry[head::VALUES] = words(start + layout.value_block(0).start);
    entry[head::VALUE_BLOCK] = words(layout.value_block_bytes());
    entry[head::SLOT] = words(start + slot);
    entry[head::SLOT_WORDS] = words(slot_bytes);
    entry[head::RING_VALUES] = words(layout.ring_values(0).start - slot);
    entry[head::ENERGY] = words(layout.energy(0).start - slot);
    entry[head::SINK_KEYS] = words(layout.sink_keys(0).start - slot);
    entry[head::SINK_VALUES] = words(layout.sink_values(0).start - slot);
    entry[head::CORRECTION] = words(layout.correction(0).start - slot);
    entry
}

/// The entry of a row of the sequence of `slot`, which holds `span`; of the tokens that are no sinks it sees the newest
/// `window`. Its page table begins at `pages`.
pub(crate) fn row_entry(slot: usize, span: Span, window: usize, pages: usize) -> [u32; row::FIELDS] {
    let mut entry = [0; row::FIELDS];
    entry[row::SLOT] = slot as u32;
    entry[row::SINKS] = span.sinks;
    entry[row::BLOCKS] = span.blocks;
    entry[row::UNSEEN] = span.hidden + span.run().saturating_sub(window).min(span.prefix()) as u32;
    entry[row::RECENT] = span.recent;
    entry[row::SEEN] = span.recent.saturating_sub(u32::try_from(window).unwrap_or(u32::MAX));
    entry[row::PAGES] = pages as u32;
    entry
}

/// What a step does beside what its admission says.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Doing {
    /// Slot of the sequence.
    pub(crate) slot: usize,
    /// Row of its first new token.
    pub(crate) row: usize,
    /// Where the page table after it begins.
    pub(crate) pages: usize,
    /// Newest rows whose queries count.
    pub(crate) counted: usize,
    /// Whether the energies of before are forgotten.
    pub(crate) forgets: bool,
    /// Whether channels are chosen.
    pub(crate) chooses: bool,
    /// Query rows of each query head in the energies.
    pub(crate) scored: usize,
    /// Every so many keys count.
    pub(crate) every: usize,
    /// The row of queries that is the first of those that count.
    pub(crate) queries: usize,
}

/// The steps of a batch, which all layers go through.
#[derive(Clone, Debug)]
pub(crate) struct Steps {
    /// Whole tokens of each step, those of the ring and the new ones.
    pub(crate) whole: Vec<usize>,
    pub(crate) entries: Numbers,
    pub(crate) count: usize,
    /// Most blocks that one of them writes.
    pub(crate) blocks: usize,
    /// Most chunks of tokens that score.
    pub(crate) chunks: usize,
    pub(crate) counts: bool,
}

impl Steps {
    /// The table of `steps`.
    pub(crate) fn new<R: Runtime>(client: &ComputeClient<R>, steps: &[(Admission, Doing)]) -> Self {
        let (mut table, mut whole) = (Vec::new(), Vec::new());
        let (mut blocks, mut chunks, mut counts) = (0, 0, false);
        for (admission, doing) in steps {
            let Admission { before, after, new, sunk, thinned, dropped, .. } = *admission;
            let written = admission.new_blocks();
            let mut entry = [0; step::FIELDS];
            entry[step::SLOT] = doing.slot as u32;
            entry[step::ROW] = doing.row as u32;
            entry[step::NEW] = new as u32;
            entry[step::HELD] = before.recent;
            entry[step::THINNED] = thinned as u32;
            entry[step::SUNK] = sunk as u32;
            entry[step::SINKS] = before.sinks;
            entry[step::RECENT] = after.recent;
            entry[step::PAGES] = doing.pages as u32;
            entry[step::FIRST] = written.start as u32;
            entry[step::BLOCKS] = written.len() as u32;
            entry[step::SKIPPED] = (written.start + dropped).saturating_sub(before.blocks as usize) as u32;
            entry[step::COUNTED] = doing.counted as u32;
            entry[step::FORGETS] = u32::from(doing.forgets);
            entry[step::CHOOSES] = u32::from(doing.chooses);
            entry[step::SCORED] = doing.scored as u32;
            entry[step::EVERY] = doing.every.max(1) as u32;
            entry[step::QUERIES] = doing.queries as u32;
            table.extend(entry);
            whole.push(before.recent as usize + new);
            blocks = blocks.max(written.len());
            counts |= doing.counted > 0;
            if doing.chooses {
                let tokens = (before.recent as usize + new).div_ceil(doing.every.max(1));
                chunks = chunks.max(tokens.div_ceil(score::CHUNK));
            }
        }
        Self { whole, entries: Numbers::of(client, &table), count: steps.len(), blocks, chunks, counts }
    }
}

/// Launches a kernel, and counts it: by its client, name, units of a cube and cubes; then its buffers, and its numbers.
macro_rules! launch {
    ($client:expr, $file:ident::$kernel:ident, $units:expr, $cubes:expr, [$($buffer:expr),*] $(, $number:expr)* $(,)?) => {{
        $crate::cube::launch::count_launch();
        let units = cubecl::prelude::CubeDim::new_1d($units as u32);
        $file::$kernel::launch_unchecked($client, $cubes, units, $($buffer.arg::<R>(),)* $($number),*);
    }};
}
pub(crate) use launch;

pub(crate) fn cubes(x: usize, y: usize, z: usize) -> CubeCount {
    CubeCount::Static(x as u32, y as u32, z as u32)
}

/// As many cubes, and up to a row more of them: devices take fewer side by side than one below the other.
fn in_rows(cubes: usize) -> CubeCount {
    const ROW: usize = 32_768;
    self::cubes(cubes.clamp(1, ROW), cubes.div_ceil(ROW).max(1), 1)
}

/// Copies runs of words of the first buffer to the second: where they begin in the one and in the other, and how many words.
/// 1 launch.
///
/// # Safety
/// The runs are in the buffers.
pub(crate) unsafe fn copy_runs<R: Runtime>(
    client: &ComputeClient<R>,
    (from, to): (&Numbers, &Numbers),
    runs: &[[u32; copy::RUN]],
) {
    let table = Numbers::of(client, runs.as_flattened());
    // SAFETY: as the caller says; the table has as many runs.
    unsafe {
        launch!(client, copy::copy, copy::UNITS, in_rows(runs.len()), [from, to, table], runs.len() as u32);
    }
}

/// Makes all of `numbers` zeros. 1 launch.
pub(crate) fn clear<R: Runtime>(client: &ComputeClient<R>, numbers: &Numbers) {
    // SAFETY: as many are there.
    unsafe {
        launch!(
            client,
            copy::clear,
            copy::UNITS,
            in_rows(numbers.len.div_ceil(copy::CLEARED)),
            [numbers],
            numbers.len as u32
        );
    }
}

/// The width of planes, or 1 where it is not known or our cubes are no whole number of them.
pub(crate) fn plane<R: Runtime>(client: &ComputeClient<R>) -> usize {
    let hardware = &client.properties().hardware;
    let (least, most) = (hardware.plane_size_min as usize, hardware.plane_size_max as usize);
    if least == most && most > 0 && attention::UNITS.is_multiple_of(most) { most } else { 1 }
}

impl Layer {
    /// Counts the queries of `steps` and, where one chooses, lists its channels and, where queries are corrected, has every
    /// channel that is not kept be at its mean. 1 launch; where one chooses, 1 or 2 more.
    pub(crate) fn choose<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        steps: &Steps,
        (queries, fused): (&Numbers, &Numbers),
        (l1, by_queries): (bool, bool),
        given: &Given,
    ) {
        let Self { arena, heads, channels, count, shape } = self;
        let dim = shape.dim;
        let chunks = match given {
            Given::Nothing => steps.chunks,
            Given::Scores(_) => 1,
            Given::Signs { rows, .. } => *rows,
        };
        let sums = match given {
            Given::Scores(scores) => scores.clone(),
            _ => Numbers::empty(client, steps.count * count * chunks * dim),
        };
        let streamed = if matches!(given, Given::Nothing) { steps.chunks } else { 0 };
        if steps.counts || streamed > 0 {
            // SAFETY: tables name places in the layer's buffer, which core's layouts keep apart, and rows of `queries` and
            // `fused`; `sums` has room for every chunk, and those that a step does not have are zeros to it, since it has
            // fewer tokens than begin there.
            unsafe {
                launch!(
                    client,
                    score::energies,
                    score::UNITS,
                    cubes(streamed + 1, *count, steps.count),
                    [arena, heads, steps.entries, queries, fused, sums],
                    *shape,
                    l1
                );
            }
        }
        if steps.chunks == 0 {
            return;
        }
        if let Given::Signs { signs, tokens, .. } = given {
            // SAFETY: as above; there are signs for the most tokens that a step of these has.
            unsafe {
                launch!(
                    client,
                    score::sketch_energies,
                    score::UNITS,
                    cubes(chunks, *count, steps.count),
                    [arena, heads, steps.entries, fused, signs, sums],
                    *tokens as u32,
                    *shape
                );
            }
        }
        // SAFETY: as above; `sums` has a number a channel for every chunk.
        unsafe {
            launch!(
                client,
                select::select_channels,
                score::UNITS,
                cubes(*count, steps.count, 1),
                [arena, heads, steps.entries, sums, channels],
                chunks as u32,
                *shape,
                by_queries
            );
        }
        if shape.corrected {
            // SAFETY: as above; a correction has room for its numbers and a block more, so that a last word is its own.
            unsafe {
                launch!(
                    client,
                    learn::means,
                    score::UNITS,
                    cubes(*count, steps.count, 1),
                    [arena, heads, steps.entries, channels, fused],
                    *shape
                );
            }
        }
    }

    /// Whole keys of a slot, the sinks and then those of the ring: `[head][tokens][D]`. 1 launch.
    pub(crate) fn whole_keys<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        slot: usize,
        (sinks, recent): (usize, usize),
    ) -> Numbers {
        let Self { arena, heads, count, shape, .. } = self;
        let out = Numbers::empty(client, count * (sinks + recent) * shape.dim);
        // SAFETY: the slot has as many sinks and recent tokens, and `out` has room for all of them.
        unsafe {
            launch!(
                client,
                learn::whole_keys,
                score::UNITS,
                cubes(*count, 1, 1),
                [arena, heads, out],
                slot as u32,
                sinks as u32,
                recent as u32,
                *shape
            );
        }
        out
    }

    /// Has the heads of `slot` be corrected by what `numbers` tell of them, see [`Told`]; where they choose, lists the channels
    /// that they say to keep first. 1 launch, or 2.
    pub(crate) fn learn<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        slot: usize,
        (numbers, told): (&Numbers, Told),
        chooses: bool,
    ) {
        let Self { arena, heads, channels, count, shape } = self;
        let scratch = Numbers::empty(client, count * told.scratch());
        let own = (slot * count * shape.dim) as u32;
        // SAFETY: there are `told.len()` numbers and scratch memory for every head; channels that are listed are channels,
        // whatever the numbers are, and a correction has room for its numbers and a block more.
        unsafe {
            if chooses {
                launch!(
                    client,
                    residual::choose,
                    residual::UNITS,
                    cubes(*count, 1, 1),
                    [numbers, heads, scratch, channels],
                    own,
                    told
                );
            }
            launch!(
                client,
                solve::solve,
                solve::UNITS,
                cubes(*count, 1, 1),
                [numbers, heads, channels, scratch, arena],
                own,
                slot as u32,
                told,
                shape.correction()
            );
        }
    }

    /// Stores the tokens of `steps`: thins what leaves the ring, then appends what is new. 1 launch, or 2.
    pub(crate) fn store<R: Runtime>(&self, client: &ComputeClient<R>, steps: &Steps, pages: &Numbers, fused: &Numbers) {
        let Self { arena, heads, channels, count, shape } = self;
        if steps.blocks > 0 {
            // SAFETY: a page belongs to one block of one sequence, so cubes write to words of their own.
            unsafe {
                launch!(
                    client,
                    flush::flush,
                    flush::UNITS,
                    cubes(steps.blocks, *count, steps.count),
                    [arena, heads, steps.entries, pages, channels, fused],
                    *shape
                );
            }
        }
        // SAFETY: a slot belongs to one step.
        unsafe {
            launch!(
                client,
                append::append,
                append::UNITS,
                cubes(*count, steps.count, 1),
                [arena, heads, steps.entries, fused],
                *shape
            );
        }
    }

    /// The attention of `rows` rows, whose entries are `entries` and which see up to `blocks` blocks each: the output,
    /// `[rows][query heads · D]`, into `out`, and its ends, `[rows][query heads][2]`, into `ends`, see
    /// [`merge`](merge::merge). 3 launches.
    pub(crate) fn attend<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        (entries, rows, blocks): (&Numbers, usize, usize),
        pages: &Numbers,
        fused: &Numbers,
        (out, ends): (&Numbers, &Numbers),
    ) {
        let Self { arena, heads, count, shape, .. } = self;
        let queries = self.thin_queries(client, (entries, rows), fused);
        let shares = shares(rows * count, blocks);
        // Of the same size whatever the depth, so that it serves all steps.
        let partials = Numbers::empty(client, rows * count * most_shares(rows * count) * shape.group * shape.partial());
        // SAFETY: entries name slots, and pages of the layer's buffer; every cube writes to words of its own.
        unsafe {
            launch!(
                client,
                attention::attend,
                attention::UNITS,
                cubes(shares, *count, rows),
                [arena, heads, entries, pages, queries, partials],
                *shape,
                plane(client)
            );
        }
        self.merge(client, (&partials, rows, shares), (out, ends));
    }

    /// As [`attend`](Self::attend), of the rows of a prompt of one sequence, of which none sees what one before does not.
    /// 3 launches.
    pub(crate) fn extend<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        (entries, rows, blocks): (&Numbers, usize, usize),
        pages: &Numbers,
        fused: &Numbers,
        (out, ends): (&Numbers, &Numbers),
    ) {
        let Self { arena, heads, count, shape, .. } = self;
        let lines = rows * shape.group;
        if lines < tile::SIDE {
            return self.attend(client, (entries, rows, blocks), pages, fused, (out, ends));
        }
        let queries = self.thin_queries(client, (entries, rows), fused);
        let (tiles, most) = (lines.div_ceil(tile::TILE), most_tiled_shares(lines, *count));
        let shares = most.min((blocks * BLOCK).div_ceil(tile::TILE)).max(1);
        // Of the same size whatever the depth, as there.
        let partials = Numbers::empty(client, rows * count * most * shape.group * shape.partial());
        // SAFETY: as there; a line is one of `rows`.
        unsafe {
            launch!(
                client,
                extend::extend,
                tile::UNITS,
                cubes(shares, *count, tiles),
                [arena, heads, entries, pages, queries, partials],
                rows as u32,
                *shape
            );
        }
        self.merge(client, (&partials, rows, shares), (out, ends));
    }

    /// Queries of rows as they meet whole tokens and the prefix. 1 launch.
    fn thin_queries<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        (entries, rows): (&Numbers, usize),
        fused: &Numbers,
    ) -> Numbers {
        let Self { arena, heads, channels, count, shape } = self;
        let queries = Numbers::empty(client, rows * count * shape.queries());
        // SAFETY: entries name slots, whose channels are channels; every cube writes to words of its own.
        unsafe {
            launch!(
                client,
                attention::thin_queries,
                attention::UNITS,
                cubes(*count, rows, 1),
                [arena, heads, entries, channels, fused, queries],
                1.0 / (shape.dim as f32).sqrt(),
                *shape
            );
        }
        queries
    }

    /// Joins what shares of the tokens give. 1 launch.
    fn merge<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        (partials, rows, shares): (&Numbers, usize, usize),
        (out, ends): (&Numbers, &Numbers),
    ) {
        let Self { count, shape, .. } = self;
        // SAFETY: `partials` has so many shares of each row and head, `out` and `ends` a place for each row and query head.
        unsafe {
            launch!(
                client,
                merge::merge,
                attention::UNITS,
                cubes(count * shape.group, rows, 1),
                [partials, out, ends],
                shares as u32,
                shape.dim,
                shape.group,
                shape.values.turns()
            );
        }
    }
}

/// Into how many shares the tokens of each of `heads` heads are split at most: enough cubes to fill a large device.
fn most_shares(heads: usize) -> usize {
    const CUBES: usize = 512;
    CUBES.div_ceil(heads.max(1))
}

/// Into how many shares they are split where there are up to `blocks` blocks: of a tile at least each.
fn shares(heads: usize, blocks: usize) -> usize {
    most_shares(heads).min(blocks.div_ceil(attention::TILE)).max(1)
}

/// Into how many shares the tokens are split at most that `lines` lines of each of `heads` heads attend to in tiles. A cube has
/// more to do here than one of a step, and less would be won of it by more shares than are lost on merging them.
fn most_tiled_shares(lines: usize, heads: usize) -> usize {
    const CUBES: usize = 256;
    CUBES.div_ceil((lines.div_ceil(tile::TILE) * heads).max(1))
}

/// Blocks that a row of `span` sees at most: of its prefix and of whole tokens.
pub(crate) const fn blocks(span: &Span) -> usize {
    span.blocks as usize + (span.sinks as usize).div_ceil(BLOCK) + (span.recent as usize).div_ceil(BLOCK)
}
