//! Where the time of passes goes.

use serde::Serialize;
use std::time::{Duration, Instant};

/// Seconds by part, summed over layers and passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Profile {
    /// Passes.
    pub passes: usize,
    /// Look-up of embeddings.
    pub embed: f64,
    /// Norm and projection to queries, keys and values.
    pub qkv: f64,
    /// Rotary embedding, head norms included.
    pub rotate: f64,
    /// Attention to what the cache holds and to each other.
    pub attend: f64,
    /// What the thin cache costs: scores, choice of channels, thinning, storing.
    pub admit: f64,
    /// Projection of attention's output.
    pub output: f64,
    /// Norm and feed-forward part.
    pub feed_forward: f64,
    /// Last norm and logits.
    pub head: f64,
}

impl Profile {
    /// Names and seconds of the parts, in the order in which they run.
    #[must_use]
    pub const fn parts(&self) -> [(&'static str, f64); 8] {
        [
            ("embed", self.embed),
            ("qkv", self.qkv),
            ("rotate", self.rotate),
            ("attend", self.attend),
            ("score and thin", self.admit),
            ("output", self.output),
            ("feed forward", self.feed_forward),
            ("logits", self.head),
        ]
    }

    /// All seconds.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|part| part.1).sum()
    }
}

/// A clock that tells the time since it was last asked.
pub(super) struct Laps(Instant);

impl Laps {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let passed = now.duration_since(self.0);
        self.0 = now;
        Duration::as_secs_f64(&passed)
    }
}
