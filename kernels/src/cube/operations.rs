//! The operations on a software Vulkan against plain tensors on the processor: prompts, further prompts, single tokens.

use super::Device;
use crate::{
    ops::{Cache, Heads, Rows, ThinOps},
    reference::Reference,
};
use burn::tensor::{Tensor, TensorData};
use burn_ndarray::NdArray;
use burn_wgpu::{Wgpu, WgpuRuntime};
use thinkey_core::{CachePlan, Lambda, StorageKind, policy::Fix};

const HEADS: Heads = Heads { heads: 6, kv_heads: 2, head_dim: 32 };
const LAYERS: usize = 2;
/// Rows of a prompt that are held at once.
const RUN: usize = 96;

fn plan(kind: StorageKind, sinks: usize, window: Option<usize>, copies: usize) -> CachePlan {
    CachePlan {
        layers: LAYERS,
        kv_heads: HEADS.kv_heads,
        copies,
        flexible: false,
        renews: false,
        head_dim: HEADS.head_dim,
        sinks,
        recent: 32,
        fix: Fix::None,
        value_lambda: Lambda::WHOLE,
        slots: 2,
        tokens: 600,
        window,
        keys: kind,
        values: kind,
        eviction: None,
    }
}

/// Feeds the same rows to `ops` and returns all attention outputs.
fn outputs<O: ThinOps>(mut ops: O, plan: CachePlan) -> Vec<f32> {
    let device = Default::default();
    let mut cache = ops.cache(plan, 8, &|layer, head| 8 + 5 * layer + 3 * head).unwrap();
    let (mut all, mut part, mut seed) = (Vec::new(), Vec::new(), 1u64);
    let mut rows = |count: usize| -> Rows<O> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let width = HEADS.width();
        let data = (0..count * width).map(|at| next() * (1 + at * 7 % 5) as f32).collect::<Vec<f32>>();
        Tensor::from_data(TensorData::new(data, [count, width]), &device)
    };
    let mut take = |ops: &O, out: Rows<O>| {
        ops.read(&out, &mut part);
        all.extend_from_slice(&part);
    };
    let prompts = [(0, 200), (1, 7), (0, 50), (1, 131)];
    for (slot, count) in prompts {
        cache.begin(slot, count, true).unwrap();
        for layer in 0..LAYERS {
            let mut prompt = ops.prompt(&cache, slot, count, 8, HEADS);
            for first in (0..count).step_by(RUN) {
                let fused = rows(RUN.min(count - first));
                ops.hold(&cache, layer, &mut prompt, &fused).unwrap();
                let out = ops.rows(fused.dims()[0], HEADS.keys());
                let out = ops.attend_prompt(&cache, layer, &prompt, &fused, out).unwrap();
                take(&ops, out);
            }
            ops.admit_prompt(&mut cache, layer, &prompt).unwrap();
        }
        cache.commit(slot);
    }
    for step in 0..40 {
        // Now one sequence, now both.
        let slots: &[usize] = if step % 3 == 0 { &[1] } else { &[1, 0] };
        slots.iter().for_each(|&slot| cache.begin(slot, 1, false).unwrap());
        for layer in 0..LAYERS {
            let fused = rows(slots.len());
            ops.admit(&mut cache, layer, slots, &fused, HEADS).unwrap();
            let out = ops.rows(slots.len(), HEADS.keys());
            let out = ops.attend(&cache, layer, slots, &fused, HEADS, out).unwrap();
            take(&ops, out);
        }
        slots.iter().for_each(|&slot| cache.commit(slot));
    }
    all
}

#[test]
fn outputs_are_those_of_plain_tensors() {
    for (kind, sinks, window, copies) in
        [(StorageKind::F32, 4, None, 1), (StorageKind::F16, 0, Some(90), 1), (StorageKind::F32, 3, Some(40), 3)]
    {
        let plan = plan(kind, sinks, window, copies);
        let expected = outputs(Reference::<NdArray>::new(Default::default()), plan);
        let actual = outputs(Device::<Wgpu, WgpuRuntime>::new(Default::default()), plan);
        assert_eq!(actual.len(), expected.len());
        for (at, (x, y)) in actual.iter().zip(&expected).enumerate() {
            assert!((x - y).abs() <= 2e-3 * (1.0 + y.abs()), "{plan:?}: place {at}: {x}, not {y}");
        }
    }
}
