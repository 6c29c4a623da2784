//! Which tokens a head keeps where not all can stay, and the ranks by which it does.

use super::{HeadMut, HeadRef, Masks, Rows, parts::Steps};
use crate::{
    Admission, BLOCK, Error, HeadLayout, Span,
    error::check_len,
    rank::Cut,
    storage::{Element, elements, elements_mut, with_element},
};
use core::ops::Range;

/// The tokens that stay in a head where an admission evicts some.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Kept<'a> {
    /// Those of the tokens thinned, ascending; counted over the ring before, then the new tokens that are no sinks.
    pub tokens: &'a [u32],
    /// Lanes of the blocks before, ascending and counted over all of them, that the first of these tokens take: what was
    /// there is evicted. The other tokens fill new blocks.
    pub lanes: &'a [u32],
}

impl Kept<'_> {
    /// All: for admissions that evict none.
    pub const ALL: Self = Self { tokens: &[], lanes: &[] };

    /// Checks that this is what `admission` has room for.
    ///
    /// # Errors
    /// [`Error::Inconsistent`] where it is not, [`Error::Index`] for tokens or lanes that are not there or out of order.
    pub fn check(&self, admission: &Admission) -> Result<(), Error> {
        if admission.evicted == 0 {
            return if *self == Kept::ALL { Ok(()) } else { Err(Error::Inconsistent { what: "tokens kept" }) };
        }
        let before = admission.before;
        // Hidden lanes are taken first: those after have none.
        let hidden = self.lanes.get(..before.hidden as usize);
        let hidden = hidden.is_some_and(|lanes| (0..).zip(lanes).all(|(at, &lane)| at == lane));
        if !hidden || self.tokens.len() != self.lanes.len() + admission.fresh() {
            return Err(Error::Inconsistent { what: "tokens kept" });
        }
        let limits =
            [(self.tokens, "kept token", admission.thinned), (self.lanes, "lane", before.blocks as usize * BLOCK)];
        for (list, what, limit) in limits {
            let ascending = list.is_sorted_by(|a, b| a < b);
            match list.last() {
                Some(&last) if last as usize >= limit || !ascending => {
                    return Err(Error::Index { what, index: last as usize, limit });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The tokens, where not all stay.
    pub(super) fn list(&self, admission: &Admission) -> Option<&[u32]> {
        (admission.evicted > 0).then_some(self.tokens)
    }

    /// The lanes of new block `block` that are tokens, and which of those that stay the first of them is.
    pub(super) fn place(&self, admission: &Admission, block: usize) -> (Range<usize>, usize) {
        if admission.evicted == 0 {
            return admission.lanes(block);
        }
        (0..BLOCK, self.lanes.len() + (block - admission.before.blocks as usize) * BLOCK)
    }
}

/// The whole tokens of an admission that stay, its new sinks first: counted over the ring before, then all new tokens.
fn survivors<'k>(kept: Kept<'k>, admission: &Admission) -> impl Iterator<Item = usize> + Clone + use<'k> {
    let Admission { before, new, sunk, thinned, .. } = *admission;
    let held = before.recent as usize;
    // There are new sinks only while there is no ring.
    let at = move |token: usize| if token < held { token } else { token + sunk };
    let rest = thinned..held + new - sunk;
    (held..held + sunk).chain(kept.tokens.iter().map(|&token| token as usize).chain(rest).map(at))
}

impl<'a> HeadRef<'a> {
    /// The ranks of the thin lanes, hidden ones included, and of the ring's tokens.
    ///
    /// # Errors
    /// [`Error::Capacity`] where the layout has none.
    pub fn ranks(&self) -> Result<(&'a [f32], &'a [f32]), Error> {
        ranks(&self.layout, self.bytes, self.slot, self.span)
    }
}

/// The ranks of the thin lanes of `span` and of its ring, of the head whose bytes these are.
fn ranks<'a>(layout: &HeadLayout, bytes: &'a [u8], slot: usize, span: Span) -> Result<(&'a [f32], &'a [f32]), Error> {
    let lanes = ranked(layout, span)?;
    let (stored, ring) = elements::<f32>(&bytes[layout.ranks(slot)])?.split_at(lanes);
    Ok((&stored[..span.blocks as usize * BLOCK], &ring[..span.recent as usize]))
}

/// Where ranks end that lanes have, and those of the ring begin.
fn ranked(layout: &HeadLayout, span: Span) -> Result<usize, Error> {
    let lanes = layout.ranked as usize;
    let needed = span.blocks as usize * BLOCK;
    if lanes == 0 || needed > lanes {
        return Err(Error::Capacity { what: "ranks", needed: needed.max(1), capacity: lanes });
    }
    let (needed, capacity) = (span.recent as usize, layout.ring_capacity());
    if needed > capacity {
        return Err(Error::Capacity { what: "ring", needed, capacity });
    }
    Ok(lanes)
}

impl<'a> HeadMut<'a> {
    /// The head, of whose tokens only `kept` stay in the admission to come.
    pub fn keeping<'b>(&'b mut self, kept: Kept<'b>) -> HeadMut<'b> {
        HeadMut { layout: self.layout, bytes: &mut *self.bytes, slot: self.slot, kept }
    }

    /// The head for reading, as [`HeadRef::new`] has it.
    ///
    /// # Errors
    /// As there.
    pub fn view<'b>(&'b self, pages: &'b [u32], span: Span, masks: Option<&'b Masks>) -> Result<HeadRef<'b>, Error> {
        HeadRef::new(self.layout, self.bytes, self.slot, pages, span, masks)
    }

    /// The ranks of the thin lanes of `span`, hidden ones included, and of its ring.
    ///
    /// # Errors
    /// [`Error::Capacity`] where the layout has fewer.
    pub fn ranks(&self, span: Span) -> Result<(&[f32], &[f32]), Error> {
        ranks(&self.layout, self.bytes, self.slot, span)
    }

    /// [`ranks`](Self::ranks), for writing.
    ///
    /// # Errors
    /// As there.
    pub fn ranks_mut(&mut self, span: Span) -> Result<(&mut [f32], &mut [f32]), Error> {
        self.keeping(Kept::ALL).into_ranks(span)
    }

    /// [`ranks_mut`](Self::ranks_mut) of a view that is not needed any more.
    ///
    /// # Errors
    /// As there.
    pub fn into_ranks(self, span: Span) -> Result<(&'a mut [f32], &'a mut [f32]), Error> {
        let lanes = ranked(&self.layout, span)?;
        let (stored, ring) = elements_mut::<f32>(&mut self.bytes[self.layout.ranks(self.slot)])?.split_at_mut(lanes);
        Ok((&mut stored[..span.blocks as usize * BLOCK], &mut ring[..span.recent as usize]))
    }

    /// Lists which tokens stay in an admission: of those that are thin before and those that are thinned, the ones of the
    /// highest ranks, as many as fit. `new` are the ranks of the new tokens that are no sinks; the others are ranked already. Of
    /// equal ones the stored token stays, and then the older.
    ///
    /// `tokens` and `lanes` are memory for the lists, at most as many entries as tokens are thinned; the lanes are fewer than
    /// there are.
    ///
    /// # Errors
    /// [`Error::Capacity`] with the entries needed, or where there are no ranks; [`Error::Length`] for another number of new
    /// tokens; [`Error::TokenScore`] for a NaN.
    pub fn keep<'k>(
        &self,
        admission: &Admission,
        new: &[f32],
        tokens: &'k mut [u32],
        lanes: &'k mut [u32],
    ) -> Result<Kept<'k>, Error> {
        let Admission { before, after, thinned, evicted, .. } = *admission;
        check_len("ranks of new tokens", admission.new - admission.sunk, new.len())?;
        if evicted == 0 {
            return Ok(Kept::ALL);
        }
        let (stored, ring) = self.ranks(before)?;
        let hidden = before.hidden as usize;
        // Hidden lanes are the first to be taken.
        let stored =
            stored.iter().enumerate().map(|(lane, &rank)| if lane < hidden { f32::NEG_INFINITY } else { rank });
        let leaving = ring.iter().chain(new).copied().take(thinned);
        let all = stored.clone().chain(leaving.clone());
        if let Some(token) = all.clone().position(f32::is_nan) {
            return Err(Error::TokenScore { token });
        }
        let mut cut = Cut::of(all, after.blocks as usize * BLOCK);
        let list = |to: &mut [u32], index: usize, at: usize| {
            let capacity = to.len();
            let to = to.get_mut(at).ok_or(Error::Capacity { what: "kept tokens", needed: at + 1, capacity })?;
            *to = index as u32;
            Ok::<_, Error>(at + 1)
        };
        let (mut gone, mut stay) = (0, 0);
        for (lane, rank) in stored.enumerate() {
            if !cut.takes(rank) {
                gone = list(lanes, lane, gone)?;
            }
        }
        for (token, rank) in leaving.enumerate() {
            if cut.takes(rank) {
                stay = list(tokens, token, stay)?;
            }
        }
        Ok(Kept { tokens: &tokens[..stay], lanes: &lanes[..gone] })
    }

    /// Moves ranks as [`admit`](Self::admit) moves tokens, before or after it; `new` are those of the new tokens that are no
    /// sinks.
    ///
    /// # Errors
    /// [`Error::Length`] and [`Error::Capacity`] where parts do not fit, [`Error::Inconsistent`] as for `admit`.
    pub fn move_ranks(&mut self, admission: &Admission, new: &[f32]) -> Result<(), Error> {
        let Admission { before, after, sunk, thinned, .. } = *admission;
        check_len("ranks of new tokens", admission.new - sunk, new.len())?;
        let kept = self.kept;
        kept.check(admission)?;
        ranked(&self.layout, before)?;
        let lanes = ranked(&self.layout, after)?;
        let (held, first) = (before.recent as usize, before.blocks as usize * BLOCK);
        let (stored, ring) = elements_mut::<f32>(&mut self.bytes[self.layout.ranks(self.slot)])?.split_at_mut(lanes);
        let rank = |token: usize| if token < held { ring[token] } else { new[token - held] };
        if admission.evicted == 0 {
            let pad = admission.fresh().checked_sub(thinned).ok_or(Error::Inconsistent { what: "admission" })?;
            stored[first..first + pad].fill(0.0);
            stored[first + pad..][..thinned].iter_mut().enumerate().for_each(|(token, to)| *to = rank(token));
        } else {
            let (taken, fresh) = kept.tokens.split_at(kept.lanes.len());
            for (&lane, &token) in kept.lanes.iter().zip(taken) {
                stored[lane as usize] = rank(token as usize);
            }
            for (to, &token) in stored[first..].iter_mut().zip(fresh) {
                *to = rank(token as usize);
            }
        }
        let (stay, skip) = (held.saturating_sub(thinned), thinned.saturating_sub(held));
        ring.copy_within(held - stay..held, 0);
        ring[stay..after.recent as usize].copy_from_slice(&new[skip..]);
        Ok(())
    }

    /// Adds the squares of the value channels of the whole tokens that stay to `sums`.
    pub(super) fn add_kept_values(&self, admission: &Admission, rows: Rows<'_>, sums: &mut [f32]) -> Result<(), Error> {
        let head_dim = self.layout.head_dim as usize;
        rows.check(admission.new, head_dim)?;
        self.kept.check(admission)?;
        let held = admission.before.recent as usize;
        with_element!(self.layout.values.ring(), E => {
            let ring = elements::<E>(&self.bytes[self.layout.ring_values(self.slot)])?;
            for token in survivors(self.kept, admission) {
                for (channel, sum) in sums.iter_mut().enumerate() {
                    let x = if token < held {
                        ring[token * head_dim + channel].load()
                    } else {
                        rows.values[(token - held) * rows.stride + channel]
                    };
                    *sum += x * x;
                }
            }
        });
        Ok(())
    }

    /// Adds `what` of every channel of every so many of the whole tokens that stay, but for the first `skipped`, to `sums`;
    /// returns how many that were.
    pub(super) fn add_kept_keys(
        &self,
        admission: &Admission,
        rows: Rows<'_>,
        (skipped, every): (usize, usize),
        what: impl Fn(f32) -> f32 + Copy,
        sums: &mut [f32],
    ) -> Result<usize, Error> {
        let (head_dim, stride) = (self.layout.head_dim as usize, self.layout.ring_stride());
        rows.check(admission.new, head_dim)?;
        self.kept.check(admission)?;
        let (held, steps, mut count) = (admission.before.recent as usize, Steps::keys(&rows, head_dim), 0);
        with_element!(self.layout.keys.ring(), E => {
            let ring = elements::<E>(&self.bytes[self.layout.ring_keys(self.slot)])?;
            for token in survivors(self.kept, admission).skip(skipped).step_by(every) {
                count += 1;
                for (channel, sum) in sums.iter_mut().enumerate() {
                    *sum += what(if token < held {
                        ring[channel * stride + token].load()
                    } else {
                        rows.keys[steps.at(token - held, channel)]
                    });
                }
            }
        });
        Ok(count)
    }
}
