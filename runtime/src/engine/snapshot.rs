//! Sequences as bytes, and back: see [`thinkey_core::snapshot`].
//!
//! ```no_run
//! # use thinkey::{engine::{Origin, Session}, weights::Checkpoint};
//! # use thinkey_core::{Policy, snapshot::{Snapshot, SnapshotError}};
//! # fn show(checkpoint: &Checkpoint, policy: Policy, session: &mut Session, tokens: &[u32]) -> Result<(), SnapshotError> {
//! let origin = Origin { model: checkpoint.fingerprint(), policy };
//! let bytes = session.save(0, &origin, tokens)?;
//! // In another process, perhaps:
//! let tokens = session.restore(0, &origin, &Snapshot::open(&bytes)?)?;
//! # Ok(())
//! # }
//! ```

use super::{Session, State};
use crate::model::transformer;
use thinkey_core::{
    CachePlan, HeadLayout, Policy,
    snapshot::{self, MAX_HEADER, Snapshot, SnapshotError, SnapshotHeader},
};
use thinkey_kernels::ops::{Cache, ThinOps};

/// Whose cache a snapshot is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The model's [fingerprint](crate::weights::Checkpoint::fingerprint).
    pub model: [u8; 16],
    /// The policy that the session was designed by.
    pub policy: Policy,
}

impl Session {
    /// What the cache holds of the sequence of `slot`, as a [snapshot]. `tokens` are the sequence's:
    /// those [fed](Session::position) to it, and at most one that waits, as [`generate`](crate::generate::Request::tokens)
    /// leaves it. The bytes are about as many as the cache has in use.
    ///
    /// # Errors
    /// [`SnapshotError::Empty`] where nothing was fed, [`SnapshotError::Device`] where the cache [takes none](Self::takes_snapshots),
    /// [`SnapshotError::Memory`]; [`SnapshotError::Impossible`] for other tokens than the sequence has.
    pub fn save(&self, slot: usize, origin: &Origin, tokens: &[u32]) -> Result<Vec<u8>, SnapshotError> {
        any!(State, &self.0, |state| save(state, slot, origin, tokens))
    }

    /// Makes `slot` hold the sequence of a snapshot, whose tokens are returned: what comes next is what would have come in
    /// the session that was saved. That may have been planned for another number of tokens.
    ///
    /// # Errors
    /// [`SnapshotError::Model`], [`SnapshotError::Policy`], [`SnapshotError::Shape`] and [`SnapshotError::Context`] where it
    /// does not fit the session, [`SnapshotError::Device`]: what the slot held is as before then. Where the heads' bytes
    /// cannot be what heads hold, it is forgotten.
    pub fn restore(
        &mut self,
        slot: usize,
        origin: &Origin,
        snapshot: &Snapshot<'_>,
    ) -> Result<Vec<u32>, SnapshotError> {
        any!(State, &mut self.0, |state| restore(state, slot, origin, snapshot))
    }
}

/// The shape of a head that keeps all of its channels, whatever the sequences and their tokens.
fn shape(plan: &CachePlan) -> Result<HeadLayout, SnapshotError> {
    Ok(CachePlan { slots: 1, tokens: 0, ..*plan }.head(plan.head_dim)?)
}

fn save<O: ThinOps>(
    session: &transformer::Session<O>,
    slot: usize,
    origin: &Origin,
    tokens: &[u32],
) -> Result<Vec<u8>, SnapshotError> {
    let (cache, plan) = (session.cache(), session.cache().plan());
    let (progress, bytes) = cache.progress(slot)?;
    // The last token of an answer waits for what comes after it.
    if tokens.len() < progress.position as usize || tokens.len() - progress.position as usize > 1 {
        return Err(SnapshotError::Impossible { what: "tokens" });
    }
    let header = SnapshotHeader {
        model: origin.model,
        policy: origin.policy,
        layout: shape(plan)?,
        layers: plan.layers as u16,
        heads: plan.heads() as u16,
        window: cache.window() as u32,
        sliding_window: plan.window.map(|window| window as u32),
        progress,
        tokens: tokens.len() as u32,
        bytes: bytes as u64,
    };
    let mut memory = [0; MAX_HEADER];
    let front = header.encode(&mut memory)?;
    let (lists, check) = (size_of_val(tokens) + plan.layers * plan.heads() * size_of::<u16>(), 4);
    let total = front.len() + lists + bytes + check;
    let mut out = Vec::new();
    out.try_reserve_exact(total).map_err(|_| SnapshotError::Memory { bytes: total as u64 })?;
    out.extend_from_slice(front);
    out.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    cache.save(slot, &mut out)?;
    let sum = snapshot::check([&out[..]]);
    out.extend(sum);
    debug_assert_eq!(out.len(), total);
    Ok(out)
}

fn restore<O: ThinOps>(
    session: &mut transformer::Session<O>,
    slot: usize,
    origin: &Origin,
    snapshot: &Snapshot<'_>,
) -> Result<Vec<u32>, SnapshotError> {
    let header = snapshot.header();
    let cache = session.cache_mut();
    let plan = *cache.plan();
    if header.model != origin.model {
        return Err(SnapshotError::Model);
    }
    if let Some(slot) = origin.policy.difference(&header.policy) {
        return Err(SnapshotError::Policy { slot });
    }
    let numbers = [
        ("layers", usize::from(header.layers) == plan.layers),
        ("heads", usize::from(header.heads) == plan.heads()),
        ("heads of another shape", header.layout == shape(&plan)?),
        ("queries that score", header.window as usize == cache.window()),
        ("sliding window", header.sliding_window.map(|window| window as usize) == plan.window),
    ];
    if let Some((what, _)) = numbers.into_iter().find(|(_, same)| !same) {
        return Err(SnapshotError::Shape { what });
    }
    let progress = header.progress;
    if progress.position as usize > plan.tokens {
        return Err(SnapshotError::Context { tokens: progress.position, context: plan.tokens as u32 });
    }
    if header.tokens.checked_sub(progress.position).is_none_or(|waiting| waiting > 1) {
        return Err(SnapshotError::Impossible { what: "tokens" });
    }
    let kept: Vec<u16> = snapshot.kept().collect();
    cache.restore(slot, &progress, &kept, snapshot.heads())?;
    Ok(snapshot.tokens().collect())
}
