//! Core against recorded reference tensors: scores, masks, two-region attention.

use thinkey_core::{
    CachePlan, ChannelMask, HeadLayout, HeadMut, HeadRef, KeyOrder, Lambda, Masks, Plain, Rows, Scoring, Span,
    StorageKind, attend,
};
use thinkey_tests::recording::Recording;

const RECENT: usize = 32;

/// A head's cache after the prompt and the decode step's token, in f32, and its mask and scores.
struct Head {
    layout: HeadLayout,
    memory: Vec<[u64; 8]>,
    pages: Vec<u32>,
    span: Span,
    mask: ChannelMask,
    scores: Vec<f32>,
}

fn bytes_mut(memory: &mut [[u64; 8]]) -> &mut [u8] {
    bytemuck::cast_slice_mut(memory)
}

fn admit(recording: &Recording, layer: usize, head: usize, lambda: Lambda) -> Head {
    let tensor = |name: &str| recording.floats(&format!("L{layer}.{name}"));
    let (keys, values, queries) = (tensor("K"), tensor("V"), tensor("Qwin"));
    let (tokens, head_dim) = (keys.shape[1], keys.shape[2]);
    let plan = CachePlan {
        layers: 1,
        kv_heads: 1,
        head_dim,
        sinks: 0,
        recent: RECENT,
        copies: 1,
        flexible: false,
        renews: false,
        fix: thinkey_core::policy::Fix::None,
        value_lambda: Lambda::WHOLE,
        slots: 1,
        tokens: tokens + 1,
        window: None,
        keys: StorageKind::F32,
        values: StorageKind::F32,
        eviction: None,
    };
    let layout = plan.head(lambda.kept(head_dim)).unwrap();
    let mut memory = vec![[0u64; 8]; layout.bytes() / 64];
    // Pages in falling order: nothing may rely on their being in a row.
    let pages: Vec<u32> = (0..layout.pages).rev().collect();
    let group = queries.shape[0] / keys.shape[0];
    let window = queries.shape[1];
    let rows = Rows { keys: keys.part(head), order: KeyOrder::Rows, values: values.part(head), stride: head_dim };
    let mut view = HeadMut::new(layout, bytes_mut(&mut memory), 0).unwrap();
    for query in 0..group {
        view.add_query_energy(queries.part(head * group + query), window, head_dim).unwrap();
    }
    let mut scores = vec![0.0; head_dim];
    let admission = Span::default().admit(tokens, plan.retention(), true);
    let scoring = Scoring { queries: group * window, ..Scoring::default() };
    view.score(&scoring, &admission, rows, &mut scores).unwrap();
    let mask = view.choose(&scoring, &admission, rows).unwrap();
    view.admit(&admission, &pages, Some(&Masks::of_keys(mask)), rows).unwrap();
    let (key, value) = (tensor("decode_k"), tensor("decode_v"));
    let step = admission.after.admit(1, plan.retention(), false);
    let row = Rows { keys: key.part(head), order: KeyOrder::Rows, values: value.part(head), stride: head_dim };
    view.admit(&step, &pages, Some(&Masks::of_keys(mask)), row).unwrap();
    Head { layout, memory, pages, span: step.after, mask, scores }
}

fn close(ours: &[f32], theirs: &[f32], tolerance: f32, what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (index, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= tolerance, "{what}[{index}]: {a} instead of {b}");
    }
}

#[test]
fn scores_masks_and_attention_equal_the_recordings() {
    let mut compared = 0;
    for recording in Recording::all() {
        for layer in recording.layers() {
            let heads = recording.floats(&format!("L{layer}.K")).shape[0];
            for (lambda, suffix) in [(0, "none"), (400, "think.0.4"), (500, "think.0.5"), (600, "think.0.6")] {
                let lambda = Lambda::from_per_mille(lambda).unwrap();
                let out = recording.floats(&format!("L{layer}.attn_out.{suffix}"));
                let queries = recording.floats(&format!("L{layer}.decode_q"));
                let group = queries.shape[0] / heads;
                for head in 0..heads {
                    let what = format!("{}: layer {layer} head {head} {suffix}", recording.path.display());
                    let ours = admit(&recording, layer, head, lambda);
                    let scores = recording.floats(&format!("L{layer}.score.think"));
                    for (channel, (a, b)) in ours.scores.iter().zip(scores.part(head)).enumerate() {
                        assert!((a / b - 1.0).abs() < 1e-4, "{what}: score {channel}: {a} instead of {b}");
                    }
                    if suffix != "none" {
                        let keep = recording.integers(&format!("L{layer}.keep.{suffix}"));
                        assert_eq!(ours.mask.channels().collect::<Vec<_>>(), keep.part(head), "{what}");
                    }
                    let head_dim = ours.layout.head_dim as usize;
                    let bytes = bytemuck::cast_slice(&ours.memory);
                    let masks = Masks::of_keys(ours.mask);
                    let view = HeadRef::new(ours.layout, bytes, 0, &ours.pages, ours.span, Some(&masks)).unwrap();
                    let range = head * group..(head + 1) * group;
                    let query = &queries.data[range.start * head_dim..range.end * head_dim];
                    let mut memory = vec![0.0; attend::attend_len(group, head_dim)];
                    let mut mix = vec![0.0; group * head_dim];
                    attend::attend(&Plain, &view, query, usize::MAX, &mut memory, &mut mix).unwrap();
                    close(&mix, &out.data[range.start * head_dim..range.end * head_dim], 1e-4, &what);
                    compared += 1;
                }
            }
        }
    }
    assert!(compared >= 4, "only {compared} comparisons");
}
