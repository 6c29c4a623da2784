//! What a prompt holds of the layer at hand: memory for all of its rows, taken once and used by one layer after the other.

use super::{
    hold,
    launch::{Numbers, cubes, launch},
    prefill::{self, PromptShape},
    tile,
};
use crate::ops::Heads;
use cubecl::prelude::*;

/// Keys and values of a prompt's rows, and the queries of the newest ones.
#[derive(Clone, Debug)]
pub struct Held {
    pub(super) slot: usize,
    pub(super) heads: Heads,
    /// Tokens of the prompt.
    pub(super) rows: usize,
    /// Those whose queries are kept, the newest.
    pub(super) window: usize,
    /// Rows of the layer so far.
    pub(super) count: usize,
    /// `[rows][keys, then values]`, each `[KV head][D]`.
    pub(super) tokens: Numbers,
    /// `[window][query head][D]`.
    pub(super) queries: Numbers,
}

impl Held {
    /// Memory for a prompt of `rows` tokens of which nothing is held, and the queries of the newest `window`.
    pub(super) fn new<R: Runtime>(
        client: &ComputeClient<R>,
        slot: usize,
        rows: usize,
        window: usize,
        heads: Heads,
    ) -> Self {
        let window = window.min(rows);
        let tokens = Numbers::empty(client, rows * Self::width(heads));
        let queries = Numbers::empty(client, window * heads.keys());
        Self { slot, heads, rows, window, count: 0, tokens, queries }
    }

    /// Keys and values of a row.
    pub(super) const fn width(heads: Heads) -> usize {
        heads.width() - heads.keys()
    }

    /// Rows before those that score.
    pub(super) const fn unheld(&self) -> usize {
        self.rows - self.window
    }

    /// Takes the next `rows` rows of the layer, or the first of the next. 1 launch.
    ///
    /// # Panics
    /// Where there are more than the prompt has.
    pub(super) fn take<R: Runtime>(&mut self, client: &ComputeClient<R>, fused: &Numbers, rows: usize) {
        if self.count == self.rows {
            self.count = 0;
        }
        assert!(self.count + rows <= self.rows, "rows of the prompt");
        // SAFETY: `fused` has so many rows, there is room for these, as was seen, and for queries of all from the first that
        // scores on.
        unsafe {
            launch!(
                client,
                hold::hold,
                hold::UNITS,
                cubes(rows, 1, 1),
                [fused, self.tokens, self.queries],
                self.count as u32,
                self.unheld() as u32,
                self.heads.keys(),
                self.heads.width()
            );
        }
        self.count += rows;
    }

    /// The attention of the newest `rows` rows, which `fused` has, to all that is held, into `out`; a row sees the newest
    /// `window` tokens and the first `sinks`. Where `past` are the ends of what `out` has already, see
    /// [`merge`](super::merge::merge), it goes on from there. 1 launch.
    pub(super) fn attend<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        (fused, rows): (&Numbers, usize),
        (window, sinks): (usize, usize),
        past: Option<&Numbers>,
        out: &Numbers,
    ) {
        let Heads { kv_heads, head_dim, .. } = self.heads;
        let group = self.heads.group();
        let shape = PromptShape { dim: head_dim, heads: kv_heads, group, continued: past.is_some() };
        // So that a place and a window have a sum.
        let window = window.min(1 << 30) as u32;
        // SAFETY: there are so many rows in `fused` and `out`; places among what is held are at most that of the last row; a
        // cube writes lines of its own.
        unsafe {
            launch!(
                client,
                prefill::prefill,
                tile::UNITS,
                cubes((rows * group).div_ceil(tile::TILE), kv_heads, 1),
                [fused, self.tokens, past.unwrap_or(fused), out],
                rows as u32,
                (self.count - rows) as u32,
                window,
                sinks as u32,
                1.0 / (head_dim as f32).sqrt(),
                shape
            );
        }
    }
}
