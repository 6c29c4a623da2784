//! Kernels on a software Vulkan against core's plain loops.

use super::{
    launch::{Doing, Given, Layer, Numbers, Steps, blocks, head_entry, row_entry},
    layout::Shape,
};
use burn_wgpu::{WgpuDevice, WgpuRuntime};
use cubecl::{Runtime, client::ComputeClient};
use thinkey_core::{
    Admission, BLOCK, HeadLayout, HeadMut, HeadRef, KeyOrder, Masks, Moments, Plain, Retention, Rows, Scoring, Span,
    StorageKind,
    attend::{attend, attend_len},
    policy::Fix,
    storage::Form,
};

pub(super) type Client = ComputeClient<WgpuRuntime>;

pub(super) fn client() -> Client {
    WgpuRuntime::client(&WgpuDevice::default())
}

/// Numbers between -1 and 1, of very different size from channel to channel, as keys are.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn rows(&mut self, rows: usize, width: usize) -> Vec<f32> {
        (0..rows * width).map(|at| self.next() * (1.0 + (at % width * 7 % 5) as f32)).collect()
    }
}

#[derive(Clone, Debug)]
struct Case {
    dim: usize,
    group: usize,
    /// T of each head.
    kept: Vec<usize>,
    recent: usize,
    sinks: usize,
    keys: StorageKind,
    values: StorageKind,
    fix: Fix,
    window: Option<usize>,
    /// Slot, new tokens, and whether they are a prompt.
    steps: Vec<(usize, usize, bool)>,
}

const SLOTS: usize = 2;
const PAGES: usize = 40;
/// Queries that score, W.
const SCORING: usize = 5;

#[derive(Clone, Debug, Default)]
struct Slot {
    span: Span,
    pages: Vec<u32>,
    scored: usize,
    masks: Vec<Option<Masks>>,
}

/// Core's cache and the same on the device.
struct Both {
    case: Case,
    layouts: Vec<HeadLayout>,
    bytes: Vec<Vec<u64>>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    client: Client,
    layer: Layer,
    random: Random,
}

impl Both {
    fn new(case: Case, seed: u64) -> Self {
        let layouts: Vec<HeadLayout> = case
            .kept
            .iter()
            .map(|&kept| HeadLayout {
                head_dim: case.dim as u16,
                kept: kept as u16,
                sinks: case.sinks as u16,
                recent: case.recent as u16,
                fix: case.fix,
                kept_values: case.dim as u16,
                renews: false,
                slots: SLOTS as u16,
                pages: PAGES as u32,
                keys: case.keys,
                values: case.values,
                ranked: 0,
            })
            .collect();
        layouts.iter().for_each(|layout| layout.check().unwrap());
        let bytes: Vec<Vec<u64>> = layouts.iter().map(|layout| vec![0; layout.bytes() / 8]).collect();
        let client = client();
        let heads = layouts.len();
        let (mut table, mut start) = (Vec::new(), 0);
        for layout in &layouts {
            table.extend(head_entry(layout, start));
            start += layout.bytes();
        }
        let width = heads * (case.group + 2) * case.dim;
        let shape = Shape {
            dim: case.dim,
            group: case.group,
            keys: case.keys,
            values: case.values,
            sinks: case.sinks,
            stride: layouts[0].ring_stride(),
            corrected: case.fix == Fix::Compensated,
            copies: 1,
            queries_width: width,
            width,
            keys_at: heads * case.group * case.dim,
            values_at: heads * (case.group + 1) * case.dim,
        };
        let layer = Layer {
            arena: Numbers::of(&client, &vec![0; start / 4]),
            heads: Numbers::of(&client, &table),
            channels: Numbers::of(&client, &vec![0; SLOTS * heads * case.dim]),
            count: heads,
            shape,
        };
        let slots = vec![Slot { masks: vec![None; heads], ..Slot::default() }; SLOTS];
        let free = (0..PAGES as u32).map(|page| page * 7 % PAGES as u32).collect();
        Self { case, layouts, bytes, slots, free, client, layer, random: Random(seed) }
    }

    /// Admits tokens to core's cache, and by `device` to the device's too; returns the fused rows.
    fn step(&mut self, slot: usize, new: usize, prompt: bool, device: bool) -> Vec<f32> {
        let Shape { width, keys_at, values_at, dim, group, .. } = self.layer.shape;
        let retention =
            Retention { sinks: self.case.sinks, recent: self.case.recent, window: self.case.window, capacity: None };
        let state = &mut self.slots[slot];
        let admission = state.span.admit(new, retention, prompt);
        let gone = admission.dropped.min(state.pages.len());
        self.free.extend(state.pages.drain(..gone));
        while state.pages.len() < admission.after.blocks as usize {
            state.pages.push(self.free.pop().unwrap());
        }
        let fused = self.random.rows(new, width);
        let chosen = state.masks[0].is_some();
        let (counted, forgets) = (if chosen { 0 } else { new.min(SCORING) }, state.scored == 0);
        let chooses = !chosen && !admission.new_blocks().is_empty();
        state.scored += counted;
        for (head, layout) in self.layouts.iter().enumerate() {
            let mut view = HeadMut::new(*layout, bytemuck::cast_slice_mut(&mut self.bytes[head]), slot).unwrap();
            for member in 0..group {
                let queries = &fused[(new - new.min(SCORING)) * width + (head * group + member) * dim..];
                if counted > 0 {
                    view.add_query_energy(queries, counted, width).unwrap();
                }
            }
            let rows = Rows {
                keys: &fused[keys_at + head * dim..],
                order: KeyOrder::Rows,
                values: &fused[values_at + head * dim..],
                stride: width,
            };
            if chooses {
                let scoring = Scoring { queries: state.scored * group, ..Scoring::default() };
                let mask = view.choose(&scoring, &admission, rows).unwrap();
                view.correct(&mask, Moments::Tokens { admission: &admission, rows }).unwrap();
                state.masks[head] = Some(Masks::of_keys(mask));
            }
            view.admit(&admission, &state.pages, state.masks[head].as_ref(), rows).unwrap();
        }
        if device {
            let doing = Doing {
                slot,
                row: 0,
                pages: 0,
                counted,
                forgets,
                chooses,
                scored: state.scored,
                every: 1,
                queries: new - counted,
            };
            let pages = Numbers::of(&self.client, &state.pages);
            self.admit(&[(admission, doing)], &pages, &fused);
        }
        self.slots[slot].span = admission.after;
        fused
    }

    fn admit(&self, steps: &[(Admission, Doing)], pages: &Numbers, fused: &[f32]) {
        let steps = Steps::new(&self.client, steps);
        let fused = self.floats(fused);
        self.layer.choose(&self.client, &steps, (&fused, &fused), (false, true), &Given::Nothing);
        self.layer.store(&self.client, &steps, pages, &fused);
    }

    fn floats(&self, x: &[f32]) -> Numbers {
        Numbers::of(&self.client, bytemuck::cast_slice(x))
    }

    fn read(&self, numbers: &Numbers) -> Vec<u32> {
        let bytes = self.client.read_one_unchecked(numbers.handle.clone());
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).take(numbers.len).collect()
    }

    fn view<'a>(&'a self, head: usize, slot: usize, bytes: &'a [u8]) -> HeadRef<'a> {
        let Slot { span, pages, masks, .. } = &self.slots[slot];
        HeadRef::new(self.layouts[head], bytes, slot, pages, *span, masks[head].as_ref()).unwrap()
    }

    /// Brings what core holds to the device.
    fn upload(&mut self) {
        let arena: Vec<u32> =
            self.bytes.iter().flat_map(|bytes| bytemuck::cast_slice::<_, u32>(bytes).to_vec()).collect();
        self.layer.arena = Numbers::of(&self.client, &arena);
        let (heads, dim) = (self.layouts.len(), self.case.dim);
        let mut channels = vec![0; SLOTS * heads * dim];
        for (slot, state) in self.slots.iter().enumerate() {
            for (head, masks) in state.masks.iter().enumerate() {
                let to = &mut channels[(slot * heads + head) * dim..][..dim];
                if let Some(Masks { keys, .. }) = masks {
                    let lost = (0..dim).filter(|&channel| !keys.contains(channel));
                    to.iter_mut().zip(keys.channels().chain(lost)).for_each(|(to, channel)| *to = channel as u32);
                }
            }
        }
        self.layer.channels = Numbers::of(&self.client, &channels);
    }

    /// Attends with a random query a slot, all in one batch, and compares with core's.
    fn check_attention(&mut self) {
        let Shape { width, dim, group, .. } = self.layer.shape;
        let window = self.case.window.unwrap_or(usize::MAX);
        let fused = self.random.rows(SLOTS, width);
        let (mut entries, mut pages, mut most) = (Vec::new(), Vec::new(), 0);
        for (slot, state) in self.slots.iter().enumerate() {
            entries.extend(row_entry(slot, state.span, window, pages.len()));
            pages.extend(&state.pages);
            most = most.max(blocks(&state.span));
        }
        let heads = self.layouts.len();
        let out = Numbers::empty(&self.client, SLOTS * heads * group * dim);
        let (entries, pages) = (Numbers::of(&self.client, &entries), Numbers::of(&self.client, &pages));
        let ends = Numbers::empty(&self.client, SLOTS * heads * group * 2);
        self.layer.attend(&self.client, (&entries, SLOTS, most), &pages, &self.floats(&fused), (&out, &ends));
        let actual: Vec<f32> = self.read(&out).into_iter().map(f32::from_bits).collect();
        for slot in 0..SLOTS {
            for head in 0..heads {
                let view = self.view(head, slot, bytemuck::cast_slice(&self.bytes[head]));
                let queries = &fused[slot * width + head * group * dim..][..group * dim];
                let (mut memory, mut expected) = (vec![0.0; attend_len(group, dim)], vec![0.0; group * dim]);
                attend(&Plain, &view, queries, window, &mut memory, &mut expected).unwrap();
                let actual = &actual[(slot * heads + head) * group * dim..][..group * dim];
                for (at, (&x, &y)) in actual.iter().zip(&expected).enumerate() {
                    assert!(
                        (x - y).abs() <= 1e-4 * (1.0 + y.abs()),
                        "{:?}: slot {slot} head {head} place {at}: {x}, not {y}; {:?}",
                        self.case,
                        self.slots[slot].span
                    );
                }
            }
        }
    }

    /// Has the rows of a prompt attend to what each slot holds, the later ones to fewer of its tokens where there is a window,
    /// and compares with core's.
    fn check_prompts(&mut self, count: usize) {
        let Shape { width, dim, group, .. } = self.layer.shape;
        let heads = self.layouts.len();
        for slot in 0..SLOTS {
            let Slot { span, pages, .. } = self.slots[slot].clone();
            if span.tokens() == 0 {
                continue;
            }
            let windows: Vec<_> = (0..count)
                .map(|row| self.case.window.map_or(usize::MAX, |window| window.saturating_sub(2 * row)))
                .collect();
            let fused = self.random.rows(count, width);
            // Behind the page table of somebody else.
            let entries: Vec<u32> = windows.iter().flat_map(|&window| row_entry(slot, span, window, 3)).collect();
            let pages = [&[0; 3][..], &pages].concat();
            let (entries, pages) = (Numbers::of(&self.client, &entries), Numbers::of(&self.client, &pages));
            let out = Numbers::empty(&self.client, count * heads * group * dim);
            let ends = Numbers::empty(&self.client, count * heads * group * 2);
            let seen = (&entries, count, blocks(&span));
            self.layer.extend(&self.client, seen, &pages, &self.floats(&fused), (&out, &ends));
            let actual: Vec<f32> = self.read(&out).into_iter().map(f32::from_bits).collect();
            let ends: Vec<f32> = self.read(&ends).into_iter().map(f32::from_bits).collect();
            for (row, &window) in windows.iter().enumerate() {
                for head in 0..heads {
                    let at = (row * heads + head) * group;
                    let (actual, ends) = (&actual[at * dim..][..group * dim], &ends[at * 2..][..group * 2]);
                    let what = format!("{:?}: slot {slot} row {row} head {head}; {span:?}", self.case);
                    if span.sinks == 0 && window == 0 {
                        // As if of no weight.
                        assert!(ends.chunks(2).all(|end| end[1] == 0.0), "{what}");
                        assert!(actual.iter().all(|&x| x == 0.0), "{what}");
                        continue;
                    }
                    let view = self.view(head, slot, bytemuck::cast_slice(&self.bytes[head]));
                    let queries = &fused[row * width + head * group * dim..][..group * dim];
                    let (mut memory, mut expected) = (vec![0.0; attend_len(group, dim)], vec![0.0; group * dim]);
                    attend(&Plain, &view, queries, window, &mut memory, &mut expected).unwrap();
                    for (at, (&x, &y)) in actual.iter().zip(&expected).enumerate() {
                        assert!((x - y).abs() <= 1e-4 * (1.0 + y.abs()), "{what}: place {at}: {x}, not {y}");
                    }
                }
            }
        }
    }

    /// Compares what the device holds with what core does, byte by byte.
    fn check_bytes(&self) {
        let arena = self.read(&self.layer.arena);
        let channels = self.read(&self.layer.channels);
        let arena: &[u8] = bytemuck::cast_slice(&arena);
        let (mut start, heads, dim) = (0, self.layouts.len(), self.case.dim);
        for (head, layout) in self.layouts.iter().enumerate() {
            let own = &arena[start..start + layout.bytes()];
            start += layout.bytes();
            for slot in 0..SLOTS {
                let span = self.slots[slot].span;
                let (core, ours) =
                    (self.view(head, slot, bytemuck::cast_slice(&self.bytes[head])), self.view(head, slot, own));
                let what = format!("{:?}: slot {slot} head {head} {span:?}", self.case);
                if let Some(mask) = core.mask() {
                    let ours = &channels[(slot * heads + head) * dim..][..mask.kept()];
                    assert!(
                        mask.channels().eq(ours.iter().map(|&channel| channel as usize)),
                        "{what}: {mask:?}, not {ours:?}"
                    );
                }
                let lens = |kind: StorageKind, floats: usize, groups: usize| match kind.form() {
                    Form::Float(kind) => floats * kind.bytes(),
                    Form::Codes(kind) => kind.bytes(groups),
                    Form::Turned(kind) => kind.turned_bytes(dim),
                    Form::Mixed => unreachable!("the kernels have no such kind"),
                };
                let kept = layout.kept as usize;
                let keys = lens(layout.keys, kept * BLOCK, kept);
                let values = lens(layout.values, dim * BLOCK, BLOCK * dim.div_ceil(BLOCK));
                for block in 0..span.blocks as usize {
                    let at = |a: &[u8], b: &[u8]| a.iter().zip(b).position(|(a, b)| a != b);
                    let (a, b) = (&ours.key_block(block)[..keys], &core.key_block(block)[..keys]);
                    assert!(a == b, "{what}: key block {block} at {:?} of {keys}", at(a, b));
                    let (a, b) = (&ours.value_block(block)[..values], &core.value_block(block)[..values]);
                    assert!(a == b, "{what}: value block {block} at {:?} of {values}", at(a, b));
                }
                let token = |view: &HeadRef<'_>, token: usize, sink: bool| {
                    let (mut key, mut value) = (vec![0.0; dim], vec![0.0; dim]);
                    let read = if sink { HeadRef::read_sink } else { HeadRef::read_recent };
                    read(view, token, &mut key, &mut value).unwrap();
                    (key, value)
                };
                for (count, sink) in [(span.sinks, true), (span.recent, false)] {
                    for at in 0..count as usize {
                        assert_eq!(token(&ours, at, sink), token(&core, at, sink), "{what}: token {at}, sink: {sink}");
                    }
                }
            }
        }
    }
}

/// Shapes that differ in everything that may.
fn cases() -> Vec<Case> {
    use StorageKind::{Bf16, F16, F32, Int2, Int3, Int4, Int8, Trellis2, Turned2, Turned3, Turned4};
    let case =
        |dim, group, kept: &[usize], (recent, sinks), (keys, values), fix, window, steps: &[(usize, usize, bool)]| {
            Case { dim, group, kept: kept.to_vec(), recent, sinks, keys, values, fix, window, steps: steps.to_vec() }
        };
    let ones = |slot, count| vec![(slot, 1, false); count];
    vec![
        // One token, then nothing but whole ones, then one block after the other.
        case(64, 3, &[32, 17], (32, 4), (F16, F16), Fix::None, None, &[vec![(0, 1, true)], ones(0, 70)].concat()),
        // Prompts that fill the first block from the back; an empty slot beside them.
        case(64, 3, &[40, 8, 64], (32, 0), (F32, F32), Fix::None, None, &[(1, 333, true), (1, 1, false)]),
        case(
            128,
            4,
            &[64, 77],
            (32, 4),
            (Int4, Int4),
            Fix::Compensated,
            None,
            &[(0, 205, true), (1, 97, true), (0, 33, true)],
        ),
        case(64, 1, &[31, 45], (20, 3), (Int8, Int8), Fix::Compensated, None, &[(0, 150, true), (1, 60, false)]),
        case(80, 8, &[33, 1], (32, 4), (Bf16, Bf16), Fix::Compensated, None, &[(0, 129, true), (1, 68, true)]),
        case(64, 2, &[24, 63], (1, 5), (Int4, Int2), Fix::None, None, &[(0, 120, true), (1, 99, true), (1, 40, false)]),
        case(
            32,
            2,
            &[9, 16],
            (40, 0),
            (Int8, Int3),
            Fix::None,
            Some(100),
            &[(0, 190, true), (0, 30, false), (1, 64, true)],
        ),
        case(256, 2, &[66, 200], (32, 1), (Int3, F16), Fix::None, None, &[(0, 140, true), (1, 2, true)]),
        case(
            64,
            3,
            &[24, 40],
            (32, 4),
            (Int4, Turned2),
            Fix::Compensated,
            None,
            &[(0, 150, true), (1, 99, true), (0, 40, false)],
        ),
        case(
            128,
            2,
            &[64],
            (32, 0),
            (F16, Turned4),
            Fix::None,
            Some(90),
            &[(0, 140, true), (1, 64, true), (1, 40, false)],
        ),
        case(256, 1, &[100], (20, 2), (Int8, Turned3), Fix::None, None, &[(1, 101, true)]),
        case(128, 2, &[40], (32, 4), (Int4, Trellis2), Fix::Compensated, None, &[(0, 140, true), (0, 40, false)]),
        case(64, 3, &[64], (32, 1), (F16, Trellis2), Fix::None, None, &[(1, 130, true), (0, 70, true)]),
        case(16, 1, &[9], (32, 0), (Int8, Trellis2), Fix::None, None, &[(0, 99, true)]),
        case(16, 2, &[7], (32, 4), (F32, Turned2), Fix::None, None, &[(0, 77, true), (1, 33, true)]),
        case(64, 4, &[5], (64, 33), (Int2, Bf16), Fix::None, Some(50), &[(0, 222, true), (1, 97, true), (0, 1, false)]),
    ]
}

#[test]
fn attention_is_as_cores() {
    for (at, case) in cases().into_iter().enumerate() {
        let mut both = Both::new(case.clone(), at as u64);
        both.check_attention();
        for (slot, new, prompt) in case.steps {
            both.step(slot, new, prompt, false);
        }
        both.upload();
        both.check_attention();
    }
}

/// Of one tile of lines and more, and of shares of one tile of tokens and more.
#[test]
fn rows_of_a_prompt_attend_to_the_cache_as_cores() {
    for (at, case) in cases().into_iter().enumerate() {
        let mut both = Both::new(case.clone(), 200 + at as u64);
        for (slot, new, prompt) in case.steps {
            both.step(slot, new, prompt, false);
        }
        both.upload();
        both.check_prompts(if at % 3 == 0 { 70 } else { 17 });
    }
}

#[test]
fn what_is_stored_is_as_cores() {
    for (at, case) in cases().into_iter().enumerate() {
        let mut both = Both::new(Case { fix: Fix::None, ..case.clone() }, 100 + at as u64);
        for (slot, new, prompt) in case.steps {
            both.step(slot, new, prompt, true);
        }
        both.check_bytes();
        both.check_attention();
    }
}
