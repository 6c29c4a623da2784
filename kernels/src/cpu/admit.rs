//! Admission: the key and value of a step's token into the cache of a layer.

use super::{attention::Fused, cache::ThinCache};
use crate::ops::Cache;
use thinkey_core::{Error, KeyOrder, Rows};

/// Admits one new token of `slot` to a layer, see [`HeadStep`](super::cache::HeadStep); its queries count
/// for the score. Those of a prompt come by [`Prompt::admit`](super::prompt::Prompt::admit).
///
/// # Errors
/// Where slices do not fit, or a score is NaN.
///
/// # Panics
/// Where no step of `slot` is under way or the row is shorter than its heads.
pub fn admit(cache: &mut ThinCache, layer: usize, slot: usize, fused: Fused<'_>) -> Result<(), Error> {
    let Fused { data, stride, keys, values, heads, kv_heads, head_dim } = fused;
    let (cached, copies) = (cache.plan().heads(), cache.plan().copies);
    assert_eq!(cached, kv_heads * copies, "heads of the cache");
    let group = heads / cached;
    let counted = cache.window().min(1);
    cache.steps(layer, slot).enumerate().try_for_each(|(head, step)| {
        let (mut step, at) = (step?, head / copies * head_dim);
        let queries = (0..group).map(|member| (&data[(head * group + member) * head_dim..], counted, stride));
        step.add_queries(queries)?;
        let rows = Rows { keys: &data[keys + at..], order: KeyOrder::Rows, values: &data[values + at..], stride };
        step.admit_one(group, rows)
    })
}
