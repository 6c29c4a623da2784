//! Byte-exact size of a whole model's cache, known before anything is allocated.

use crate::{BLOCK, Error, HeadLayout, Lambda, Masks, Retention, StorageKind, policy::Fix, token::Eviction};
use serde::{Deserialize, Serialize};

/// The shape of a model's thin cache: every layer has the same KV heads; each head keeps its own number of channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct CachePlan {
    /// Layers.
    pub layers: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Caches of a KV head, each with channels of its own: one, or one a query head.
    pub copies: usize,
    /// Whether there is to be room for any T per head that sum up to no more than those that are planned: each prompt
    /// decides. Only for one sequence.
    pub flexible: bool,
    /// Whether masks are chosen anew in the course of a sequence, so that every key block carries its own.
    pub renews: bool,
    /// Channels per head, D.
    pub head_dim: usize,
    /// First tokens stored whole for good.
    pub sinks: usize,
    /// Newest tokens stored whole, R.
    pub recent: usize,
    /// How queries make up for what the keys of the prefix lack, see [`compensate`](crate::channel::compensate) and
    /// [`lowrank`](crate::channel::lowrank).
    pub fix: Fix,
    /// Share of value channels that the prefix lacks.
    pub value_lambda: Lambda,
    /// Sequences.
    pub slots: usize,
    /// Most tokens that a sequence holds.
    pub tokens: usize,
    /// Most tokens that a sequence looks back on, for models with a sliding window.
    pub window: Option<usize>,
    /// How keys are stored.
    pub keys: StorageKind,
    /// How values are stored.
    pub values: StorageKind,
    /// By what tokens are evicted one by one, where a sequence is to take no more than a capacity.
    pub eviction: Option<Eviction>,
}

/// Bytes of a cache by part. They are what is allocated, alignment included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct CacheBytes {
    /// Thin keys of the prefix.
    pub prefix_keys: usize,
    /// Values of the prefix.
    pub prefix_values: usize,
    /// Whole recent tokens, keys and values.
    pub recent: usize,
    /// Whole first tokens, keys and values.
    pub sinks: usize,
    /// Corrections of queries, or projections of them.
    pub corrections: usize,
    /// Query energies.
    pub energies: usize,
    /// Channel masks.
    pub masks: usize,
    /// Page tables and spans.
    pub tables: usize,
    /// Ranks that tokens are evicted by.
    pub ranks: usize,
}

impl CacheBytes {
    /// All parts together.
    #[must_use]
    pub const fn total(&self) -> usize {
        self.arena() + self.masks + self.tables
    }

    /// The parts that lie in the arena: all but masks and tables.
    #[must_use]
    pub const fn arena(&self) -> usize {
        self.prefix_keys + self.prefix_values + self.recent + self.sinks + self.corrections + self.energies + self.ranks
    }
}

impl CachePlan {
    /// Heads of a layer that are cached: KV heads, times their copies.
    #[must_use]
    pub const fn heads(&self) -> usize {
        self.kv_heads.saturating_mul(self.copies)
    }

    /// Which tokens stay whole, and which go.
    #[must_use]
    pub const fn retention(&self) -> Retention {
        let capacity = match &self.eviction {
            Some(eviction) => Some(eviction.capacity()),
            None => None,
        };
        Retention { sinks: self.sinks, recent: self.recent, window: self.window, capacity }
    }

    /// Blocks that one sequence can take.
    #[must_use]
    pub const fn blocks_per_slot(&self) -> usize {
        let reach = match self.window {
            Some(window) if window < self.tokens => window,
            _ => self.tokens.saturating_sub(self.sinks),
        };
        let blocks = HeadLayout::blocks_for(reach, self.recent);
        match self.retention().most_blocks() {
            Some(most) if most < blocks => most,
            _ => blocks,
        }
    }

    /// Whether tokens can be evicted: others neither all stay nor go by their age.
    const fn check_eviction(&self) -> Result<(), Error> {
        let Some(eviction) = &self.eviction else { return Ok(()) };
        if self.window.is_some() {
            return Err(Error::Inconsistent { what: "eviction and window" });
        }
        if eviction.recent() > self.recent {
            return Err(Error::Capacity { what: "recent tokens", needed: eviction.recent(), capacity: self.recent });
        }
        let (needed, capacity) =
            (self.sinks.saturating_add(self.recent).saturating_add(2 * BLOCK), eviction.capacity());
        if needed > capacity {
            return Err(Error::Capacity { what: "tokens kept", needed, capacity });
        }
        Ok(())
    }

    /// The layout of a head that keeps `kept` channels.
    ///
    /// # Errors
    /// [`Error::HeadDim`], [`Error::Kept`], or [`Error::Capacity`] where a number does not fit the layout; where tokens are
    /// evicted, [`Error::Capacity`] with the tokens that have to be kept for a thin block to be left, and
    /// [`Error::Inconsistent`] beside a window.
    pub const fn head(&self, kept: usize) -> Result<HeadLayout, Error> {
        if let Err(error) = self.check_eviction() {
            return Err(error);
        }
        let Some(pages) = self.blocks_per_slot().checked_mul(self.slots) else {
            return Err(Error::Capacity { what: "pages", needed: usize::MAX, capacity: u32::MAX as usize });
        };
        if pages > u32::MAX as usize {
            return Err(Error::Capacity { what: "pages", needed: pages, capacity: u32::MAX as usize });
        }
        const WHOLE: usize = 4096;
        if self.recent > WHOLE {
            return Err(Error::Capacity { what: "recent tokens", needed: self.recent, capacity: WHOLE });
        }
        if self.sinks > WHOLE {
            return Err(Error::Capacity { what: "sinks", needed: self.sinks, capacity: WHOLE });
        }
        if self.slots > u16::MAX as usize {
            return Err(Error::Capacity { what: "slots", needed: self.slots, capacity: u16::MAX as usize });
        }
        if self.head_dim > crate::MAX_HEAD_DIM {
            return Err(Error::HeadDim { head_dim: self.head_dim });
        }
        if kept > self.head_dim {
            return Err(Error::Kept { kept, head_dim: self.head_dim });
        }
        // A block's at least, so that there are some for the ring.
        let blocks = self.blocks_per_slot();
        let ranked = match &self.eviction {
            Some(_) => (if blocks == 0 { 1 } else { blocks }).saturating_mul(BLOCK),
            None => 0,
        };
        if ranked > u32::MAX as usize {
            return Err(Error::Capacity { what: "ranks", needed: ranked, capacity: u32::MAX as usize });
        }
        let layout = HeadLayout {
            head_dim: self.head_dim as u16,
            kept: kept as u16,
            sinks: self.sinks as u16,
            recent: self.recent as u16,
            fix: self.fix,
            kept_values: self.value_lambda.kept(self.head_dim) as u16,
            renews: self.renews,
            slots: self.slots as u16,
            pages: pages as u32,
            keys: self.keys,
            values: self.values,
            ranked: ranked as u32,
        };
        match layout.check() {
            Ok(()) => Ok(layout),
            Err(error) => Err(error),
        }
    }

    /// Bytes by part where head h of layer l keeps `kept(l, h)` channels.
    ///
    /// # Errors
    /// As [`head`](Self::head); [`Error::Capacity`] where the sum cannot be counted in a `usize`.
    pub fn bytes(&self, kept: impl Fn(usize, usize) -> usize) -> Result<CacheBytes, Error> {
        const OVERFLOW: Error =
            Error::Capacity { what: "address space", needed: usize::MAX, capacity: usize::MAX >> 1 };
        let heads = self.layers.checked_mul(self.heads()).ok_or(OVERFLOW)?;
        let mut bytes = CacheBytes {
            masks: heads
                .checked_mul(self.slots)
                .and_then(|masks| masks.checked_mul(size_of::<Option<Masks>>()))
                .ok_or(OVERFLOW)?,
            tables: self.table_bytes(),
            ..CacheBytes::default()
        };
        for layer in 0..self.layers {
            for head in 0..self.heads() {
                let layout = self.head(kept(layer, head))?;
                let (pages, slots) = (layout.pages as usize, self.slots);
                bytes.prefix_keys += pages * layout.key_block_bytes();
                bytes.prefix_values += pages * layout.value_block_bytes();
                bytes.recent += slots * (layout.ring_key_bytes() + layout.ring_value_bytes());
                bytes.sinks += slots * (layout.sink_key_bytes() + layout.sink_value_bytes());
                bytes.corrections += slots * layout.correction_bytes();
                if self.flexible {
                    bytes.prefix_keys += pages * layout.key_block_slack();
                    bytes.corrections += slots * (layout.most_correction_bytes() - layout.correction_bytes());
                }
                bytes.energies += slots * layout.energy_bytes();
                bytes.ranks += slots * layout.rank_bytes();
                if bytes.total() > usize::MAX >> 1 {
                    return Err(OVERFLOW);
                }
            }
        }
        Ok(bytes)
    }

    /// Bytes of the page tables: for every sequence one before and one after the step, and the list of free pages.
    #[must_use]
    pub const fn table_bytes(&self) -> usize {
        3 * self.slots * self.blocks_per_slot() * size_of::<u32>()
    }

    /// Bytes of the cache that holds the same tokens whole, every channel as the ring stores it (quantised kinds: in
    /// f16) and once: no block, no ring, no mask.
    #[must_use]
    pub const fn whole_bytes(&self) -> usize {
        let per_channel = self.keys.ring().bytes() + self.values.ring().bytes();
        self.layers * self.kv_heads * self.head_dim * self.tokens * self.slots * per_channel
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::h2o::H2o;

    /// SmolLM2-135M at 4,096 tokens in f16.
    const SMOL: CachePlan = CachePlan {
        layers: 30,
        kv_heads: 3,
        head_dim: 64,
        sinks: 0,
        recent: 32,
        copies: 1,
        flexible: false,
        renews: false,
        fix: Fix::None,
        value_lambda: Lambda::WHOLE,
        slots: 1,
        tokens: 4096,
        window: None,
        keys: StorageKind::F16,
        values: StorageKind::F16,
        eviction: None,
    };

    #[test]
    fn a_known_model_byte_by_byte() {
        let kept = Lambda::from_per_mille(500).unwrap().kept(64);
        let bytes = SMOL.bytes(|_, _| kept).unwrap();
        let heads = 90;
        assert_eq!(bytes.prefix_keys, heads * 127 * 32 * 32 * 2);
        assert_eq!(bytes.prefix_values, heads * 127 * 32 * 64 * 2);
        assert_eq!(bytes.recent, heads * 2 * 64 * 64 * 2);
        assert_eq!(bytes.energies, heads * 256);
        assert_eq!(bytes.masks, heads * 76);
        assert_eq!(bytes.tables, 3 * 127 * 4);
        assert_eq!(SMOL.whole_bytes(), heads * 4096 * 256);
        let share = bytes.total() as f64 / SMOL.whole_bytes() as f64;
        assert!(share < 0.78, "{share}");
    }

    #[test]
    fn quantised_blocks_carry_their_scales() {
        for (kind, group) in [
            (StorageKind::Int8, 32 + 4),
            (StorageKind::Int4, 16 + 4),
            (StorageKind::Int3, 12 + 4),
            (StorageKind::Int2, 8 + 4),
        ] {
            let plan = CachePlan { keys: kind, values: kind, ..SMOL };
            let bytes = plan.bytes(|_, _| 32).unwrap();
            assert_eq!(bytes.prefix_keys, 90 * 127 * 32 * group);
            assert_eq!(bytes.prefix_values, 90 * 127 * 64 * group);
            assert_eq!(bytes.recent, SMOL.bytes(|_, _| 32).unwrap().recent);
            assert_eq!(plan.whole_bytes(), SMOL.whole_bytes());
        }
    }

    /// A quarter of the channels in four bits, the others in two, in whole lines, and a projection that keeps its order.
    #[test]
    fn predicted_keys_take_three_bits_a_number() {
        let plan = CachePlan { keys: StorageKind::Int4Int2, fix: Fix::Predictive, ..SMOL };
        let bytes = plan.bytes(|_, _| 40).unwrap();
        assert_eq!(bytes.prefix_keys, 90 * 127 * (16 * (16 + 2) + 24 * (8 + 1usize)).next_multiple_of(64));
        assert_eq!(bytes.corrections, 90 * ((64 * 41 + 40 + 32) * 2usize).next_multiple_of(64));
        assert!(plan.bytes(|_, _| 64).unwrap().corrections > bytes.corrections);
        assert!(CachePlan { fix: Fix::Compensated, ..plan }.head(40).is_err());
        assert!(CachePlan { keys: StorageKind::F16, ..plan }.head(40).is_err());
        assert!(CachePlan { values: StorageKind::Int4Int2, ..plan }.head(40).is_err());
    }

    #[test]
    fn the_arena_is_the_sum_of_the_heads() {
        let plan = CachePlan { slots: 3, ..SMOL };
        let kept = |layer: usize, head: usize| 8 + layer + head;
        let sum: usize = (0..30)
            .flat_map(|l| (0..3).map(move |h| (l, h)))
            .map(|(l, h)| plan.head(kept(l, h)).unwrap().bytes())
            .sum();
        assert_eq!(plan.bytes(kept).unwrap().arena(), sum);
    }

    #[test]
    fn a_sliding_window_bounds_the_pages() {
        let plan = CachePlan { window: Some(1000), ..SMOL };
        assert_eq!(plan.blocks_per_slot(), 31);
        assert_eq!(CachePlan { window: Some(10_000), ..SMOL }.blocks_per_slot(), 127);
    }

    #[test]
    fn a_flexible_plan_has_room_for_any_split() {
        for keys in StorageKind::ALL.into_iter().filter(|kind| !kind.turns()) {
            for fix in [Fix::None, Fix::Compensated, Fix::Lowrank, Fix::Predictive] {
                let plan = CachePlan { layers: 2, keys, fix, tokens: 500, ..SMOL };
                if plan.head(64).is_err() {
                    continue;
                }
                for mean in [1, 13, 32, 63, 64] {
                    let room = CachePlan { flexible: true, ..plan }.bytes(|_, _| mean).unwrap().arena();
                    for by in 0..=mean.min(64 - mean) {
                        let own =
                            plan.bytes(
                                |layer, _| if layer == 0 { mean - by.min(mean - 1) } else { mean + by.min(mean - 1) },
                            );
                        assert!(own.unwrap().arena() <= room, "{keys:?} {fix:?} {mean} ± {by}");
                    }
                    let less = plan.bytes(|layer, head| mean.saturating_sub(layer * 3 + head).max(1)).unwrap();
                    assert!(less.arena() <= room);
                }
            }
        }
    }

    #[test]
    fn a_capacity_bounds_the_pages() {
        let eviction = |capacity, recent| Some(Eviction::H2o(H2o { capacity, recent }));
        let plan = CachePlan { eviction: eviction(512, 32), ..SMOL };
        assert_eq!(plan.blocks_per_slot(), 14);
        let (bytes, all) = (plan.bytes(|_, _| 32).unwrap(), SMOL.bytes(|_, _| 32).unwrap());
        assert_eq!(bytes.prefix_keys, 90 * 14 * 32 * 32 * 2);
        assert_eq!(bytes.ranks, 90 * (14 * 32 + 64) * 4);
        assert!(bytes.total() * 6 < all.total());
        // A capacity that is not reached costs the ranks.
        let loose = CachePlan { eviction: eviction(8192, 32), ..SMOL }.bytes(|_, _| 32).unwrap();
        assert_eq!(loose.total() - loose.ranks, all.total());
        for eviction in [eviction(95, 32), eviction(512, 33)] {
            assert!(matches!(CachePlan { eviction, ..SMOL }.head(32), Err(Error::Capacity { .. })));
        }
        assert!(CachePlan { window: Some(100), ..plan }.head(32).is_err());
    }

    #[test]
    fn absurd_plans_are_errors() {
        assert!(CachePlan { slots: usize::MAX, ..SMOL }.bytes(|_, _| 32).is_err());
        assert!(CachePlan { layers: usize::MAX, ..SMOL }.bytes(|_, _| 32).is_err());
        assert!(SMOL.bytes(|_, _| 65).is_err());
    }
}
