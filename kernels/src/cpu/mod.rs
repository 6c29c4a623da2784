//! The operations on plain slices: SIMD chosen at run time, threads from a persistent pool.

pub mod aligned;
pub mod attention;
pub mod cache;
pub mod gemm;
pub mod linear;
pub mod loops;
pub mod pool;
pub mod rows;
// `self` is the proof that the level's instructions exist, not what is converted.
#[allow(clippy::wrong_self_convention)]
pub mod simd;
