//! How good a policy is, measured on this model, this text and this implementation.
//!
//! | what | asks |
//! |---|---|
//! | [`perplexity`] | how far are the next tokens' distributions from those over the whole cache, and what does the cache take? |
//! | [`retrieval`] | is a fact found again that was told once, somewhere in a long prompt? |
//! | [`energy`] | how few directions and channels hold what queries and keys say to each other? |
//!
//! Policies are measured side by side: a prompt is read once, exactly, and [admitted to the cache of each
//! policy](crate::engine::Engine::prefill_shared). The whole cache is always among them, first, as what the others are
//! compared with. [`session_for`] is the one place that turns a policy into a cache.
//!
//! ```no_run
//! use std::path::Path;
//! use thinkey::{
//!     engine::{Engine, EngineOptions},
//!     eval::{self, perplexity::{self, PerplexityOptions}},
//!     policy::Calibration,
//!     text::Tokenizer,
//!     weights::Checkpoint,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open(Path::new("model.gguf"))?;
//! let tokenizer = Tokenizer::new(checkpoint.tokenizer()?)?;
//! let mut engine = Engine::load(&checkpoint, EngineOptions::default(), &mut |_, _| {})?;
//! let text = tokenizer.encode_plain(&eval::read_text(Path::new("wiki.txt"))?, false)?;
//! let policies = ["full".parse()?, "think".parse()?];
//! let options = PerplexityOptions { prefix: 2048, predict: 256, windows: 16 };
//! let calibration = Calibration::find(&checkpoint)?;
//! let text = (tokenizer.prefix(), &text[..]);
//! let report = perplexity::measure(&mut engine, calibration.as_ref(), text, &policies, options, &mut |_| {})?;
//! for row in &report.policies {
//!     println!("{}: {:.3} nats from the whole cache", row.policy, row.divergence.mean);
//! }
//! # Ok(())
//! # }
//! ```

pub mod energy;
mod error;
mod haystack;
pub mod html;
pub mod perplexity;
pub mod retrieval;
mod session;
pub mod stats;
mod windows;

pub use error::EvalError;
pub use session::{Footprint, session_for};
pub use windows::{read_text, spread};

use thinkey_core::policy::{Choice, Policy, Store, ThinValues, Tokens};

/// `policies` after the one that the others are compared with, each once: the first of them that keeps everything in
/// floating point, or else `full`.
#[must_use]
pub fn with_reference(policies: &[Policy]) -> Vec<Policy> {
    let whole = |policy: &&Policy| {
        let float = |store| matches!(store, Store::F32 | Store::F16);
        policy.tokens == Tokens::All
            && policy.choice == Choice::Whole
            && policy.thin_values == ThinValues::Whole
            && float(policy.keys)
            && float(policy.values)
    };
    let mut all = vec![*policies.iter().find(whole).unwrap_or(&Policy::FULL)];
    for policy in policies {
        if !all.contains(policy) {
            all.push(*policy);
        }
    }
    all
}

/// Writes a policy, or a part of one, in one line, as it is given.
fn line<S: serde::Serializer>(part: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_comes_first_and_once() {
        let read = |lines: &[&str]| lines.iter().map(|line| line.parse().unwrap()).collect::<Vec<Policy>>();
        for (given, all) in [
            (&[][..], &["full"][..]),
            (&["think"], &["full", "think"]),
            (&["think", "full", "think"], &["full", "think"]),
            (&["quality", "keys=f32,values=f32", "full"], &["keys=f32,values=f32", "quality", "full"]),
        ] {
            assert_eq!(with_reference(&read(given)), read(all));
        }
    }
}
