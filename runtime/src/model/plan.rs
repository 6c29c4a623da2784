//! From a model's shape to the plan of its cache.

use super::ModelConfig;
use thinkey_core::{CachePlan, Lambda, StorageKind, policy::Fix};

impl ModelConfig {
    /// The plan of a cache for `slots` sequences of at most `tokens` tokens, the newest `recent` of them whole, keys and
    /// values stored as `kind`.
    #[must_use]
    pub fn cache_plan(&self, slots: usize, tokens: usize, recent: usize, kind: StorageKind) -> CachePlan {
        CachePlan {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            sinks: 0,
            recent,
            copies: 1,
            flexible: false,
            renews: false,
            fix: Fix::None,
            value_lambda: Lambda::WHOLE,
            slots,
            tokens,
            window: self.sliding_window,
            keys: kind,
            values: kind,
            eviction: None,
        }
    }
}
