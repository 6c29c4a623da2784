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
    /// Most tokens that stay, where others are evicted one by one; not together with a window.
    pub capacity: Option<usize>,
}

impl Retention {
    /// Most thin blocks, where a capacity bounds them: what it leaves beside the sinks and a full ring (R + 32), in whole
    /// blocks, so that it is never exceeded. Up to 31 tokens are given away by that, and up to 32 more as the ring empties.
    #[must_use]
    pub const fn most_blocks(&self) -> Option<usize> {
        match self.capacity {
            Some(capacity) => Some(capacity.saturating_sub(self.sinks + self.recent + BLOCK) / BLOCK),
            None => None,
        }
    }
}

/// What one layer holds of one sequence: `sinks` whole tokens, `blocks` thin blocks, of whose first `hidden` lanes are not
/// tokens, then `recent` whole tokens.
///
/// Hidden lanes come from a prompt whose prefix is no whole number of blocks (its first block is filled from the
/// back, so that all later flushes are whole blocks) and from a sliding window that has left them behind.
///
/// Where tokens are evicted one by one, the thin ones are in no particular order, and which they are differs from head to
/// head; how many there are does not.
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
    /// Tokens that every head has to evict: of those that it holds thin, hidden lanes not counted, and those thinned now.
    /// Where there are any, the thin blocks after are full.
    pub evicted: usize,
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
    /// `prompt` that starts the prefix is thinned down to exactly R whole tokens instead. Where that makes more blocks than a
    /// capacity leaves room for, the best of all thin tokens fill those that there are.
    #[must_use]
    pub const fn admit(self, new: usize, retention: Retention, prompt: bool) -> Admission {
        let Retention { sinks, recent, window, .. } = retention;
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
        let mut evicted = 0;
        if let Some(most) = retention.most_blocks()
            && after.blocks as usize > most
        {
            // More than fit although the first block has hidden lanes: these are taken first.
            evicted = self.prefix() + thinned - most * BLOCK;
            after.blocks = most as u32;
            after.hidden = 0;
        }
        let dropped = match window {
            Some(window) => after.slide(window),
            None => 0,
        };
        Admission { before: self, after, new, sunk, thinned, dropped, evicted }
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

    /// Tokens that blocks which are new have room for, where some are evicted: of those thinned, as many go there, and the
    /// others that stay take the lanes of those that go.
    #[must_use]
    pub const fn fresh(&self) -> usize {
        (self.after.blocks as usize).saturating_sub(self.before.blocks as usize) * BLOCK
    }

    /// The lanes of block `block` (of the span after) that are tokens, and which whole token the first of them is:
    /// counted over the ring before, then the new tokens that are no sinks. Of no meaning where tokens are evicted.
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

    const RETENTION: Retention = Retention { sinks: 0, recent: 32, window: None, capacity: None };

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

    #[test]
    fn a_capacity_is_not_exceeded_and_little_of_it_given_away() {
        let retention = Retention { capacity: Some(512), ..RETENTION };
        let admission = Span::default().admit(1200, retention, true);
        assert_eq!((admission.after.blocks, admission.after.hidden, admission.after.recent), (14, 0, 32));
        assert_eq!((admission.thinned, admission.evicted, admission.fresh()), (1168, 720, 448));
    }

    proptest! {
        #[test]
        fn a_capacity_bounds_all_tokens(
            sinks in 0usize..70,
            recent in 0usize..100,
            capacity in 0usize..600,
            steps in prop::collection::vec((prop_oneof![Just(1usize), 1usize..300], any::<bool>()), 1..60),
        ) {
            let (mut span, mut total) = (Span::default(), 0);
            let retention = Retention { sinks, recent, window: None, capacity: Some(capacity) };
            let most = retention.most_blocks().unwrap();
            for (new, prompt) in steps {
                let admission = span.admit(new, retention, prompt);
                let (before, after) = (span, admission.after);
                total += new;
                prop_assert_eq!(before.prefix() + admission.thinned, after.prefix() + admission.evicted);
                prop_assert!(after.blocks as usize <= most);
                prop_assert!(admission.evicted == 0 || (after.hidden == 0 && after.blocks as usize == most));
                prop_assert!(admission.evicted == 0 || admission.fresh() <= admission.thinned);
                if capacity >= sinks + recent + BLOCK {
                    prop_assert!(after.tokens() <= capacity);
                    let full = capacity.saturating_sub(BLOCK - 1 + BLOCK);
                    prop_assert!(admission.evicted == 0 || after.tokens() >= full, "{} of {capacity}", after.tokens());
                }
                // And what fits is as if there were no capacity.
                let free = before.admit(new, Retention { capacity: None, ..retention }, prompt);
                prop_assert!(admission.evicted > 0 || free == admission);
                span = after;
            }
            prop_assert!(span.tokens() <= total);
        }

        /// A model that keeps the token numbers themselves: blocks of lanes, and the whole tokens.
        #[test]
        fn equals_a_list_of_tokens(
            sinks in 0usize..70,
            recent in 0usize..100,
            window in prop::option::of(1usize..400),
            steps in prop::collection::vec((1usize..300, any::<bool>()), 1..20),
        ) {
            let mut span = Span::default();
            let retention = Retention { sinks, recent, window, capacity: None };
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
