//! Admission: the keys and values of new tokens into the cache of a layer.

use super::{
    attention::Fused,
    cache::{HeadStep, ThinCache},
    pool::Pool,
};
use std::sync::{Mutex, PoisonError};
use thinkey_core::{Error, Rows};

/// Tokens from which on heads are shared out over threads; below, waking them costs more than they save.
const MANY: usize = 64;

/// Admits `rows` new tokens of `slot` to a layer, see [`HeadStep::admit`]; the newest W of their queries count for the
/// score. The heads of a prompt are admitted side by side on the threads of `pool`.
///
/// # Errors
/// Where slices do not fit, or a score is NaN.
///
/// # Panics
/// Where no step of `slot` is under way or the rows are shorter than their heads.
pub fn admit(
    pool: &Pool,
    cache: &mut ThinCache,
    layer: usize,
    slot: usize,
    rows: usize,
    fused: Fused<'_>,
) -> Result<(), Error> {
    let Fused { data, stride, keys, values, heads, kv_heads, head_dim } = fused;
    let group = heads / kv_heads;
    let first = rows.saturating_sub(cache.window());
    let run = |head: usize, step: &mut HeadStep<'_>| {
        let at = head * head_dim;
        let kv = Rows { keys: &data[keys + at..], values: &data[values + at..], stride };
        let queries = (0..group).map(|member| {
            let at = first * stride + (head * group + member) * head_dim;
            (&data[at..], rows - first, stride)
        });
        step.admit(queries, kv)
    };
    if rows < MANY || pool.threads() == 1 {
        return cache.steps(layer, slot).enumerate().try_for_each(|(head, step)| run(head, &mut step?));
    }
    let steps = cache.steps(layer, slot).map(|step| step.map(Mutex::new)).collect::<Result<Vec<_>, _>>()?;
    let failed = Mutex::new(None);
    pool.run(steps.len(), &|head| {
        // The locks are never contended: they are what makes the access safe.
        let result = run(head, &mut steps[head].lock().unwrap_or_else(PoisonError::into_inner));
        if let Err(error) = result {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
