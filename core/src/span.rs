//! How many tokens of a sequence are thin and how many whole, and what an admission of new tokens moves.

use crate::BLOCK;
use core::ops::Range;
use serde::{Deserialize, Serialize};

/// Which tokens of a sequence are stored whole, and which go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Retention {
    /// First tokens kept whole for good.
    pub sinks: usize,
    /// Newest tokens kept whole at least, R.
    pub recent: usize,
    /// Newest tokens that stay; those between them and the sinks may go.
    pub window: Option<usize>,
}

/// What one layer holds of one sequence: `sinks` whole tokens, `blocks` thin blocks, of whose first `hidden` lanes are not
/// tokens, then `recent` whole tokens.
///
/// Hidden lanes come from a prompt whose prefix is no whole number of blocks (its first block is filled from the
/// back, so that all later flushes are whole blocks) and from a sliding window that has left them behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Span {
    /// First tokens, whole.
    pub sinks: u32,
    /// Thin blocks.
    pub blocks: u32,
    /// Lanes of the first block that are no tokens, below 32.
    pub hidden: u32,
    /// Whole tokens in the ring.
    pub recent: u32,
}

/// How new tokens enter a [`Span`]: a sequence's first become sinks; of the others the oldest whole tokens fill new blocks,
/// and the rest stays whole; what a sliding window has left behind goes.
///
/// Blocks are counted from the front of the span before: `before.blocks` old ones, then those that the admission
/// fills. The first `dropped` of them are not part of the span after, and new ones among them are never written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Admission {
    /// The span before.
    pub before: Span,
    /// The span after.
    pub after: Span,
    /// Tokens that come in.
    pub new: usize,
    /// The first of them that become sinks.
    pub sunk: usize,
    /// Whole tokens (of the ring, then of the new ones that are no sinks) that leave the ring.
    pub thinned: usize,
    /// Blocks dropped from the front.
    pub dropped: usize,
}

impl Span {
    /// Tokens stored thin.
    #[must_use]
    pub const fn prefix(&self) -> usize {
        self.blocks as usize * BLOCK - self.hidden as usize
    }

    /// All tokens held but the sinks: consecutive, and the newest.
    #[must_use]
    pub const fn run(&self) -> usize {
        self.prefix() + self.recent as usize
    }

    /// All tokens held.
    #[must_use]
    pub const fn tokens(&self) -> usize {
        self.sinks as usize + self.run()
    }

    /// Plans the admission of `new` tokens.
    ///
    /// Nothing is thinned while all whole tokens fit the ring (R + 32). Then the oldest are, in whole blocks; a
    /// `prompt` that starts the prefix is thinned down to exactly R whole tokens instead.
    #[must_use]
    pub const fn admit(self, new: usize, retention: Retention, prompt: bool) -> Admission {
        let Retention { sinks, recent, window } = retention;
        let room = sinks.saturating_sub(self.sinks as usize);
        let sunk = if room < new { room } else { new };
        let whole = self.recent as usize + new - sunk;
        let mut after = self;
        after.sinks += sunk as u32;
        let mut thinned = 0;
        if whole > recent + BLOCK {
            let over = whole - recent;
            let blocks = if prompt && self.blocks == 0 {
                thinned = over;
                after.hidden = (over.next_multiple_of(BLOCK) - over) as u32;
                over.div_ceil(BLOCK)
            } else {
                thinned = over / BLOCK * BLOCK;
                over / BLOCK
            };
            after.blocks += blocks as u32;
        }
        after.recent = (whole - thinned) as u32;
        let dropped = match window {
            Some(window) => after.slide(window),
            None => 0,
        };
        Admission { before: self, after, new, sunk, thinned, dropped }
    }

    /// Hides the oldest thin tokens so that at most `window` tokens are left beside the sinks, and drops blocks with none
    /// left; says how many.
    const fn slide(&mut self, window: usize) -> usize {
        let over = self.run().saturating_sub(window);
        let hidden = self.hidden as usize + if over < self.prefix() { over } else { self.prefix() };
        let dropped = hidden / BLOCK;
        self.blocks -= dropped as u32;
        self.hidden = (hidden % BLOCK) as u32;
        dropped
    }
}

impl Admission {
    /// The blocks that are written, as indices into the page table of the span after.
    #[must_use]
    pub const fn new_blocks(&self) -> Range<usize> {
        let first = (self.before.blocks as usize).saturating_sub(self.dropped);
        first..self.after.blocks as usize
    }

    /// The lanes of block `block` (of the span after) that are tokens, and which whole token the first of them is:
    /// counted over the ring before, then the new tokens that are no sinks.
    #[must_use]
    pub const fn lanes(&self, block: usize) -> (Range<usize>, usize) {
        // Of the blocks filled now, seen or dropped, the first starts with the padding of a fresh prefix.
        let filled = (block + self.dropped) - self.before.blocks as usize;
        let pad = self.thinned.next_multiple_of(BLOCK) - self.thinned;
        if filled == 0 { (pad..BLOCK, 0) } else { (0..BLOCK, filled * BLOCK - pad) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HeadLayout;
    use proptest::prelude::*;
    use std::{collections::VecDeque, vec::Vec};

    const RETENTION: Retention = Retention { sinks: 0, recent: 32, window: None };

    #[test]
    fn a_prompt_leaves_exactly_the_recent_tokens_whole() {
        let after = Span::default().admit(1200, RETENTION, true).after;
        assert_eq!((after.blocks, after.hidden, after.recent, after.prefix()), (37, 16, 32, 1168));
    }

    #[test]
    fn a_short_prompt_stays_whole() {
        let after = Span::default().admit(64, RETENTION, true).after;
        assert_eq!((after.blocks, after.recent), (0, 64));
        let after = Span::default().admit(68, Retention { sinks: 4, ..RETENTION }, true).after;
        assert_eq!((after.sinks, after.blocks, after.recent), (4, 0, 64));
    }

    proptest! {
        /// A model that keeps the token numbers themselves: blocks of lanes, and the whole tokens.
        #[test]
        fn equals_a_list_of_tokens(
            sinks in 0usize..70,
            recent in 0usize..100,
            window in prop::option::of(1usize..400),
            steps in prop::collection::vec((1usize..300, any::<bool>()), 1..20),
        ) {
            let mut span = Span::default();
            let retention = Retention { sinks, recent, window };
            let mut first: Vec<usize> = Vec::new();
            let mut blocks: VecDeque<Vec<Option<usize>>> = VecDeque::new();
            let mut ring: Vec<usize> = Vec::new();
            let mut total = 0;
            for (new, prompt) in steps {
                let admission = span.admit(new, retention, prompt);
                first.extend(total..total + admission.sunk);
                ring.extend(total + admission.sunk..total + new);
                total += new;
                let old = blocks.len().saturating_sub(admission.dropped);
                blocks.drain(..blocks.len() - old);
                for block in admission.new_blocks() {
                    let (lanes, first) = admission.lanes(block);
                    let mut content = std::vec![None; BLOCK];
                    for (token, lane) in (first..).zip(lanes) {
                        content[lane] = Some(ring[token]);
                    }
                    prop_assert_eq!(blocks.len(), block);
                    blocks.push_back(content);
                }
                ring.drain(..admission.thinned);
                span = admission.after;

                prop_assert_eq!(ring.len(), span.recent as usize);
                let rest = total - first.len();
                prop_assert_eq!(&first, &(0..total.min(sinks)).collect::<Vec<_>>());
                prop_assert_eq!(span.sinks as usize, first.len());
                prop_assert!(ring.len() <= recent + BLOCK && ring.len() >= recent.min(rest));
                prop_assert_eq!(blocks.len(), span.blocks as usize);
                prop_assert!(span.hidden < BLOCK as u32);
                let reach = window.map_or(rest, |window| rest.min(window));
                prop_assert!(blocks.len() <= HeadLayout::blocks_for(reach, recent));
                let seen: Vec<usize> = blocks.iter().flatten().skip(span.hidden as usize).map(|t| t.unwrap())
                    .chain(ring.iter().copied()).collect();
                let expected: Vec<usize> = (total - reach.max(ring.len())..total).collect();
                prop_assert_eq!(seen, expected);
                prop_assert_eq!(span.run(), reach.max(ring.len()));
            }
        }
    }
}
