//! What the memory of a CUDA device gives.

use super::{Backend, Device};
use burn::tensor::Tensor;
use std::time::Instant;

/// Numbers that are copied: more than caches on the chip hold.
const NUMBERS: usize = 1 << 25;

/// Copies that are timed together.
const TIMES: usize = 50;

/// Bytes that the first device reads and writes in a second, copying 128 MiB again and again: what other speeds are measured
/// against. Needs three times as much memory.
///
/// # Panics
/// Where there is no device, which [`probe`](super::probe) tells first, or too little memory.
#[must_use]
pub fn copy_bandwidth() -> f64 {
    let from = Tensor::<Backend, 1>::ones([NUMBERS], &Device::default());
    let copy = || from.clone() + 1.0;
    let wait = |copied: Tensor<Backend, 1>| copied.narrow(0, 0, 1).into_data();
    wait(copy());
    let start = Instant::now();
    let mut last = copy();
    (1..TIMES).for_each(|_| last = copy());
    wait(last);
    (TIMES * 2 * size_of::<f32>() * NUMBERS) as f64 / start.elapsed().as_secs_f64()
}
