//! What an answer took: for people and for programs.

use super::{
    budget::{Budget, share},
    memory::peak_bytes,
    options::CacheOptions,
};
use indicatif::HumanBytes;
use serde_json::{Value, json};
use std::fmt;
use thinkey::{engine::Session, generate::Reply};

/// Speed and cache bytes of a reply; shown as a line each.
pub struct Stats<'a> {
    reply: &'a Reply,
    budget: &'a Budget,
    tokens: usize,
    used: usize,
    whole: usize,
    planned: usize,
    measured: usize,
    peak: Option<usize>,
}

impl<'a> Stats<'a> {
    /// Of `reply`, after which the one sequence of `session` is as it is.
    pub fn new(reply: &'a Reply, session: &Session, budget: &'a Budget) -> Self {
        Self {
            reply,
            budget,
            tokens: session.plan().tokens,
            used: session.position(0),
            whole: session.plan().whole_bytes(),
            planned: session.planned().total(),
            measured: session.allocated(),
            peak: peak_bytes(),
        }
    }

    /// Bytes saved; negative where blocks, ring and masks of a short context outweigh the channels.
    fn saved(&self) -> i64 {
        self.whole as i64 - self.measured as i64
    }

    /// All of it, with the answer and the options of the cache.
    pub fn json(&self, options: &CacheOptions) -> Value {
        let Self { reply, budget, .. } = self;
        let policy = budget.design.policy();
        json!({
            "answer": reply.text,
            "end": reply.end,
            "tokens": { "prompt": reply.prompt_tokens, "new": reply.new_tokens },
            "seconds": { "prefill": reply.prefill.as_secs_f64(), "decode": reply.decode.as_secs_f64() },
            "tokens_per_second": { "prefill": reply.prefill_rate(), "decode": reply.decode_rate() },
            "cache": {
                "tokens": self.tokens, "used": self.used, "policy": policy.to_string(),
                "keys": policy.keys.name(), "values": policy.values.name(), "lambda": policy.lambda().map(share),
                "lambda_auto": budget.is_auto(),
                "recent": options.recent(), "window": options.window(),
            },
            "cache_bytes": {
                "whole": self.whole, "planned": self.planned, "measured": self.measured, "saved": self.saved(),
            },
            "memory_bytes": budget.json(),
            "peak_bytes": self.peak,
        })
    }
}

impl fmt::Display for Stats<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reply, budget, .. } = self;
        let bytes = |bytes: usize| HumanBytes(bytes as u64);
        writeln!(
            f,
            "{} prompt tokens at {:.0}/s, {} new at {:.0}/s",
            reply.prompt_tokens,
            reply.prefill_rate(),
            reply.new_tokens,
            reply.decode_rate(),
        )?;
        writeln!(f, "policy: {}", budget.design.policy())?;
        write!(
            f,
            "cache for {} tokens, {} used: whole {}, planned {}, measured {}; saved {:.1}%",
            self.tokens,
            self.used,
            bytes(self.whole),
            bytes(self.planned),
            bytes(self.measured),
            100.0 * self.saved() as f64 / self.whole as f64,
        )?;
        let limit = budget.to_string();
        if !limit.is_empty() {
            write!(f, "\n{limit}")?;
        }
        match self.peak {
            Some(peak) => write!(f, "\nprocess: at most {}, weights included", bytes(peak)),
            None => Ok(()),
        }
    }
}
