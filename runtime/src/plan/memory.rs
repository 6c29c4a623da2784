//! Bytes by part.

use super::device;
use crate::{
    engine::Device,
    model::{
        ModelConfig,
        transformer::{self, MATRICES, RUN},
    },
    policy::{CacheDesign, Calibration, DesignError, spread},
    weights::{Checkpoint, Role},
};
use thinkey_core::{CacheBytes, Policy};
use thinkey_kernels::cpu::{Cpu, Demand, ScratchBytes, cache::ThinCache, pool::Pool};

/// What a model is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Most tokens that a sequence holds.
    pub context: usize,
    /// Most tokens that are fed at once; `None` for as many as the context holds.
    pub prompt: Option<usize>,
    /// Sequences at a time: the batch.
    pub slots: usize,
    /// What the cache does.
    pub policy: Policy,
    /// Newest tokens kept whole, R.
    pub recent: usize,
    /// Newest queries of a prompt that score its channels, W.
    pub window: usize,
    /// Threads on the processor.
    pub threads: usize,
}

/// Bytes of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// The files, which are mapped and read: they are memory of the process once they are.
    pub mapped: usize,
    /// What is converted to f32 when the model is loaded: norms and biases.
    pub converted: usize,
    /// Most of the mapped ones that a layer reads.
    pub layer: usize,
    /// The mapped embedding or the output head, whichever is larger.
    pub table: usize,
}

impl WeightBytes {
    /// Of the files and the shape of a model.
    #[must_use]
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let config = checkpoint.config();
        let vectors = Role::needed(config).filter_map(|role| match role.shape(config)[..] {
            [len] => Some(Cpu::tensor_bytes(len)),
            _ => None,
        });
        // All are there: the checkpoint has seen to it.
        let matrix = |role| checkpoint.matrix(role).map_or(0, |matrix| matrix.bytes().len());
        let layers = (0..config.layers)
            .map(|layer| MATRICES.iter().map(|&part| matrix(Role::Layer(layer, part))).sum::<usize>());
        Self {
            mapped: usize::try_from(checkpoint.size_bytes()).unwrap_or(usize::MAX),
            converted: vectors.sum(),
            layer: layers.max().unwrap_or(0),
            table: matrix(Role::TokenEmbedding).max(matrix(Role::Output)),
        }
    }

    /// Both together.
    #[must_use]
    pub const fn total(&self) -> usize {
        self.mapped.saturating_add(self.converted)
    }
}

/// The memory that a workload takes, by part, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights.
    pub weights: WeightBytes,
    /// The cache: exactly what is allocated.
    pub cache: CacheBytes,
    /// Buffers that operations compute in, at their largest.
    pub scratch: ScratchBytes,
    /// Activations of the longest prompt. They are held while it is read.
    pub prompt: usize,
    /// What is held only while a prompt is read, activations and buffers, for one that goes through a layer in one run.
    pub run: usize,
    /// Activations of a decode step. They are kept from step to step.
    pub step: usize,
    /// Logits: of a prompt's last token, of a step, and a copy of the latter for the caller.
    pub logits: usize,
    /// What holds the rest together: descriptions of layers, heads, sequences and threads.
    pub upkeep: usize,
}

impl MemoryPlan {
    /// Most that is there at once. While a long prompt is read, no more of the mapped weights is than a layer's; what it is
    /// read with is gone when steps read all of them.
    #[must_use]
    pub fn total(&self) -> usize {
        let Self { weights, scratch, prompt, run, .. } = *self;
        let reading = prompt + scratch.prompt();
        let long = (weights.layer + reading).max(weights.table + prompt);
        (self.heap() - reading).saturating_add(weights.mapped.saturating_add(run).max(long))
    }

    /// By how much the parts together are more than the [total](Self::total): they are not all there at once.
    #[must_use]
    pub fn not_at_once(&self) -> usize {
        self.weights.mapped.saturating_add(self.heap()) - self.total()
    }

    /// Everything but the mapped weights: what is allocated, at most, from the time the model is loaded on.
    #[must_use]
    pub const fn heap(&self) -> usize {
        self.weights.converted
            + self.cache.total()
            + self.scratch.total()
            + self.prompt
            + self.step
            + self.logits
            + self.upkeep
    }
}

/// Plans workloads of one model, on the processor unless [told](Self::on) otherwise.
#[derive(Clone, Debug)]
pub struct Planner<'a> {
    device: Device,
    config: &'a ModelConfig,
    weights: WeightBytes,
    calibration: Option<&'a Calibration>,
}

impl<'a> Planner<'a> {
    /// A planner for the model of `checkpoint`, of which nothing but the header is read, and its calibration.
    #[must_use]
    pub fn new(checkpoint: &'a Checkpoint, calibration: Option<&'a Calibration>) -> Self {
        Self::of(checkpoint.config(), WeightBytes::of(checkpoint), calibration)
    }

    /// A planner for a model of which the shape is known, and the bytes of its weights.
    #[must_use]
    pub const fn of(config: &'a ModelConfig, weights: WeightBytes, calibration: Option<&'a Calibration>) -> Self {
        Self { device: Device::Ndarray, config, weights, calibration }
    }

    /// The same for workloads on `device`.
    #[must_use]
    pub const fn on(self, device: Device) -> Self {
        Self { device, ..self }
    }

    /// What `policy` comes to for the model.
    ///
    /// # Errors
    /// As [`CacheDesign::new`].
    pub fn design(&self, policy: Policy) -> Result<CacheDesign, DesignError> {
        CacheDesign::new(policy, self.config, self.calibration)
    }

    /// What the checkpoint says of the model.
    #[must_use]
    pub fn config(&self) -> &'a ModelConfig {
        self.config
    }

    /// Bytes of the model's weights.
    #[must_use]
    pub const fn weights(&self) -> &WeightBytes {
        &self.weights
    }

    /// The memory that `workload` takes.
    ///
    /// # Errors
    /// As [`CacheDesign::new`] and [`CachePlan::bytes`](thinkey_core::CachePlan::bytes): where the policy cannot be, or a
    /// number of the workload does not fit the layout of a cache.
    pub fn plan(&self, workload: &Workload) -> Result<MemoryPlan, DesignError> {
        let Self { config, weights, .. } = *self;
        let design = self.design(workload.policy)?;
        let plan = design.plan(workload.slots, workload.context, workload.recent);
        // First, since it checks the numbers.
        let (cache, kept) = (plan.bytes(|layer, head| design.kept(layer, head))?, design.most_kept());
        let prompt = workload.prompt.unwrap_or(workload.context).min(workload.context);
        if self.device != Device::Ndarray {
            return Ok(device::plan(config, (weights, cache), &plan, workload, prompt));
        }
        let demand = |prompt| Demand {
            threads: workload.threads,
            width: config.width,
            inner: config.feed_forward,
            heads: config.heads,
            kept,
            prompt,
            window: workload.window,
            rows: prompt.min(RUN).max(plan.slots),
            cache: plan,
        };
        let (short, mut scratch) = (prompt.min(RUN), Cpu::scratch_bytes(&demand(prompt)));
        if plan.flexible {
            // A prompt holds all layers until it has shared their channels out.
            let heads = plan.layers * plan.heads();
            scratch.packed = scratch.packed * plan.layers
                + spread::bytes(config.head_dim, config.heads / config.kv_heads, heads, prompt, workload.window);
        }
        let (slots, logits) = (plan.slots, |rows| Cpu::tensor_bytes(rows * config.vocab));
        Ok(MemoryPlan {
            weights,
            cache,
            scratch,
            prompt: transformer::prompt_bytes(config, prompt),
            run: transformer::prompt_bytes(config, short) + Cpu::scratch_bytes(&demand(short)).prompt(),
            step: transformer::step_bytes(config, slots),
            logits: logits(1) + 2 * logits(slots),
            upkeep: transformer::upkeep_bytes(config) + ThinCache::upkeep_bytes(&plan) + Pool::bytes(workload.threads),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::fixture;
    use thinkey_core::{CachePlan, Lambda, StorageKind, policy::Fix};

    /// A worked example that circulates with another result: 32 sequences of 2,048 tokens, 24 layers of 16 heads of 128
    /// channels. Keys alone are 12.9 GB in f32 and 6.4 GB in f16; keys and values are twice that.
    #[test]
    fn the_whole_cache_of_a_worked_example() {
        let plan = |kind| CachePlan {
            layers: 24,
            kv_heads: 16,
            head_dim: 128,
            sinks: 0,
            recent: 32,
            copies: 1,
            flexible: false,
            renews: false,
            fix: Fix::None,
            value_lambda: Lambda::WHOLE,
            slots: 32,
            tokens: 2048,
            window: None,
            keys: kind,
            values: kind,
            eviction: None,
        };
        let numbers = 32_usize * 2048 * 24 * 16 * 128;
        for (kind, bytes, keys) in [(StorageKind::F32, 4, 12.9), (StorageKind::F16, 2, 6.4)] {
            let whole = plan(kind).whole_bytes();
            assert_eq!(whole, 2 * numbers * bytes);
            assert_eq!((whole as f64 / 2.0 / 1e8).round() / 10.0, keys, "GB of keys in {}", kind.name());
        }
    }

    /// On a device all weights stay, the cache is the processor's to the byte, and more of anything takes more.
    #[test]
    fn what_a_device_is_to_hold() {
        let config = ModelConfig { context: 8192, ..fixture::config(crate::model::Architecture::Llama) };
        let weights = WeightBytes { mapped: 1 << 20, converted: 1000, layer: 1000, table: 1000 };
        let (host, device) =
            (Planner::of(&config, weights, None), Planner::of(&config, weights, None).on(Device::Cuda));
        let workload = Workload {
            context: 4096,
            prompt: None,
            slots: 2,
            policy: "think,keys=int4,values=int4".parse().unwrap(),
            recent: 32,
            window: 32,
            threads: 2,
        };
        let plan = device.plan(&workload).unwrap();
        assert_eq!(plan.cache, host.plan(&workload).unwrap().cache);
        assert!(plan.total() > (1 << 20) + plan.cache.total() + plan.scratch.total());
        let total = |workload| device.plan(&workload).unwrap().total();
        for more in [Workload { context: 4097 + 64, ..workload }, Workload { slots: 3, ..workload }] {
            assert!(total(more) > plan.total(), "{more:?}");
        }
        let budget = plan.total();
        assert_eq!(device.largest_batch(&workload, budget), Some(2));
        assert!(device.longest_context(&workload, budget).is_some_and(|context| (4096..4160).contains(&context)));
        assert!(!device.fits(&workload, budget - 1));
    }
}
