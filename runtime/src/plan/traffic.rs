//! Bytes that have to be read from memory, by which a step can be no faster than they take.

use super::{Planner, Workload};
use crate::{model::transformer::RUN, policy::DesignError};

impl Planner<'_> {
    /// Bytes that a decode step reads at least, for one sequence that holds `tokens`: every weight but the embedding's other
    /// rows, and the whole cache of these tokens.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn step_traffic(&self, workload: &Workload, tokens: usize) -> Result<usize, DesignError> {
        let embedding = if self.config().tied_embeddings { 0 } else { self.weights().table };
        Ok(self.weights().mapped.saturating_sub(embedding) + self.held(workload, tokens)?)
    }

    /// Bytes that reading a prompt of `tokens` takes at least: a layer's weights for each run of rows that goes through it, the
    /// layer's keys and values so far, in f32, for each, and the output head once. Arithmetic, which mostly takes longer
    /// for a prompt, is not counted.
    #[must_use]
    pub fn prompt_traffic(&self, tokens: usize) -> usize {
        let config = self.config();
        let row = 2 * config.kv_width() * size_of::<f32>();
        let runs = tokens.div_ceil(RUN);
        let seen: usize = (1..=runs).map(|run| (run * RUN).min(tokens)).sum();
        let weights = self.weights().layer.saturating_mul(config.layers).saturating_mul(runs);
        weights
            .saturating_add(config.layers.saturating_mul(seen).saturating_mul(row))
            .saturating_add(self.weights().table)
    }

    /// Bytes of the cache that `tokens` tokens of one sequence take.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn held(&self, workload: &Workload, tokens: usize) -> Result<usize, DesignError> {
        let design = self.design(workload.policy)?;
        let plan = design.plan(1, tokens.max(1), workload.recent);
        Ok(plan.bytes(|layer, head| design.kept(layer, head))?.arena())
    }
}

#[cfg(test)]
mod tests {
    use crate::plan::{ModelShape, Planner, Workload};
    use thinkey_core::Policy;

    #[test]
    fn a_step_reads_weights_and_cache_and_more_of_it_with_depth() {
        let shape: ModelShape = serde_json::from_str(
            r#"{"name": "tiny", "family": "llama", "layers": 3, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
                "feed_forward": 96, "vocab": 100, "context": 4096, "weights": "Q8_0"}"#,
        )
        .unwrap();
        let (config, weights) = shape.planned().unwrap();
        let planner = Planner::of(&config, weights, None);
        let (policy, context) = (Policy::FULL, 4096);
        let workload = Workload { context, prompt: None, slots: 1, policy, recent: 32, window: 32, threads: 1 };
        let step = |tokens| planner.step_traffic(&workload, tokens).unwrap();
        // Whole f16 keys and values of a token in every layer and head, a block of 32 at a time.
        assert_eq!(step(3232) - step(3200), 3 * 2 * 32 * 2 * 16 * 2);
        assert!(step(1) >= weights.mapped - weights.table);
        let thin = Workload { policy: "balanced,choice=top(.5)".parse().unwrap(), ..workload };
        assert!(planner.step_traffic(&thin, 3200).unwrap() < step(3200));

        let row = 2 * 2 * 16 * 4;
        let expected = 3 * 2 * weights.layer + weights.table + 3 * (512 + 700) * row;
        assert_eq!(planner.prompt_traffic(700), expected);
    }
}
