//! Queries made ready for a head: scaled, and as its thin prefix takes them.

use super::{KeyLanes, Loops, TILE};
use crate::{
    BLOCK, ChannelMask, Error, HeadRef, MAX_GROUP, StorageKind, channel::compensate::pruned, error::check_len,
};

/// Queries made ready for a head: scaled by 1/√D, and gathered to the channels of its prefix or corrected for those that it
/// lacks.
#[derive(Debug)]
pub struct Queries<'a> {
    pub(super) group: usize,
    pub(super) whole: &'a [f32],
    /// As the prefix takes them, `[group][T]`, in room for all channels.
    pub(super) thin: &'a mut [f32],
    /// What is added to the logits of the prefix, by query head; empty where nothing is.
    pub(super) added: &'a [f32],
    pub(super) scores: &'a mut [f32],
}

#[cfg(feature = "defmt")]
impl defmt::Format for Queries<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(
            f,
            "Queries {{ group: {=usize}, whole: {=usize}, thin: {=usize} }}",
            self.group,
            self.whole.len(),
            self.thin.len()
        );
    }
}

impl<'a> Queries<'a> {
    /// Floats of scratch memory for `group` queries of a head of `head_dim` channels, whatever it keeps.
    #[must_use]
    pub const fn scratch_len(group: usize, head_dim: usize) -> usize {
        group * (2 * head_dim + 1 + TILE)
    }

    /// Prepares `queries` (`[group][D]`, after RoPE, unscaled) for `head`.
    ///
    /// # Errors
    /// [`Error::Group`], [`Error::Length`], or [`Error::Capacity`] with the scratch floats needed.
    pub fn new<L: Loops>(
        loops: &L,
        head: &HeadRef<'_>,
        queries: &[f32],
        scratch: &'a mut [f32],
    ) -> Result<Self, Error> {
        let head_dim = head.layout().head_dim as usize;
        let group = queries.len() / head_dim;
        if group == 0 || group > MAX_GROUP {
            return Err(Error::Group { group });
        }
        check_len("queries", group * head_dim, queries.len())?;
        let (needed, capacity) = (Self::scratch_len(group, head_dim), scratch.len());
        if capacity < needed {
            return Err(Error::Capacity { what: "attention scratch", needed, capacity });
        }
        let (whole, rest) = scratch[..needed].split_at_mut(group * head_dim);
        let (thin, rest) = rest.split_at_mut(group * head_dim);
        let (added, scores) = rest.split_at_mut(group);
        let scale = 1.0 / libm::sqrtf(head_dim as f32);
        for (scaled, &q) in whole.iter_mut().zip(queries) {
            *scaled = q * scale;
        }
        // Where masks change, queries are gathered as the blocks come.
        let added: &[f32] = if head.span().blocks > 0 && !head.layout().renews {
            thin_queries(loops, head, whole, thin, added, scores)?;
            added
        } else {
            &[]
        };
        Ok(Self { group, whole, thin, added, scores })
    }

    /// Gathers the queries to the channels of `mask`.
    pub(super) fn gather(&mut self, mask: &ChannelMask) {
        let rows = self.whole.chunks_exact(mask.head_dim()).zip(self.thin.chunks_exact_mut(mask.kept()));
        rows.for_each(|(whole, thin)| mask.gather(whole, thin));
    }
}

/// Writes queries as the thin prefix of `head` takes them: those of `whole` (`[n][D]`) as `[n][T]` into the front of
/// `thin`, which has room for `[n][D]`, and what is added to their logits into `added` (length n). They are gathered to the
/// kept channels, and [corrected](crate::channel::compensate::Correction::correct) where the head has a correction; where
/// its keys are [projected](crate::channel::lowrank), so are they.
///
/// `scratch` takes 128 floats a query.
///
/// # Errors
/// [`Error::NoMask`] where the head has no prefix; [`Error::Length`] where slices do not fit.
pub fn thin_queries<L: Loops>(
    loops: &L,
    head: &HeadRef<'_>,
    whole: &[f32],
    thin: &mut [f32],
    added: &mut [f32],
    scratch: &mut [f32],
) -> Result<(), Error> {
    let mask = head.mask().ok_or(Error::NoMask)?;
    let (head_dim, kept, rows) = (mask.head_dim(), mask.kept(), added.len());
    check_len("queries", rows * head_dim, whole.len())?;
    check_len("thin queries", rows * head_dim, thin.len())?;
    let (thin, rest) = thin.split_at_mut(rows * kept);
    added.fill(0.0);
    // What is multiplied by the columns: of projected keys all channels, of corrected ones those that are pruned, as many
    // as fit beside the thin ones.
    let (factors, lost): (&[f32], usize) = if head.layout().projects() {
        thin.fill(0.0);
        (whole, head_dim)
    } else {
        for (whole, thin) in whole.chunks_exact(head_dim).zip(thin.chunks_exact_mut(kept)) {
            mask.gather(whole, thin);
        }
        if head.correction().is_none() {
            return Ok(());
        }
        let lost = head_dim - kept;
        for (whole, rest) in whole.chunks_exact(head_dim).zip(rest.chunks_exact_mut(lost)) {
            for (to, channel) in rest.iter_mut().zip(pruned(mask)) {
                *to = whole[channel];
            }
        }
        (rest, lost)
    };
    let columns = head.correction().ok_or(Error::Inconsistent { what: "projection" })?;
    // Their product with the columns is that of queries with keys of T+1 lanes, of which 32 are computed at a time.
    let kind = head.layout().correction_kind();
    for first in (0..=kept).step_by(BLOCK) {
        let bytes = columns.get(first * kind.bytes()..).unwrap_or_default();
        let keys = KeyLanes { kind: StorageKind::from(kind), bytes, channels: lost, stride: kept + 1, ahead: &[] };
        loops.key_scores(keys, factors, rows, scratch, TILE)?;
        let products = scratch.chunks(TILE).zip(thin.chunks_exact_mut(kept).zip(&mut *added));
        for (products, (thin, added)) in products {
            for (product, x) in products[..BLOCK].iter().zip(thin[first..].iter_mut().chain([added])) {
                *x += product;
            }
        }
    }
    Ok(())
}
