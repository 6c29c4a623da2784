//! Admission: the keys and values of new tokens into the cache of a layer.

use super::{attention::Fused, cache::ThinCache};
use thinkey_core::{Error, Rows};

/// Admits `rows` new tokens of `slot` to a layer, see [`ThinCache::admit`]; the newest W of their queries count for the
/// score.
///
/// # Errors
/// Where slices do not fit, or a score is NaN.
///
/// # Panics
/// Where no step of `slot` is under way or the rows are shorter than their heads.
pub fn admit(cache: &mut ThinCache, layer: usize, slot: usize, rows: usize, fused: Fused<'_>) -> Result<(), Error> {
    let Fused { data, stride, keys, values, heads, kv_heads, head_dim } = fused;
    let group = heads / kv_heads;
    let first = rows.saturating_sub(cache.window());
    for head in 0..kv_heads {
        let at = head * head_dim;
        let kv = Rows { keys: &data[keys + at..], values: &data[values + at..], stride };
        let queries = (0..group).map(|member| {
            let at = first * stride + (head * group + member) * head_dim;
            (&data[at..], rows - first, stride)
        });
        cache.admit(layer, head, slot, queries, kv)?;
    }
    Ok(())
}
