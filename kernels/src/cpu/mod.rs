//! The operations on plain slices: SIMD chosen at run time, threads from a persistent pool. [`Cpu`] makes burn's ndarray
//! backend compute by them.

pub mod admit;
mod ahead;
pub mod aligned;
pub mod attention;
pub mod bandwidth;
pub mod cache;
pub mod evict;
mod exponential;

pub mod gemm;
mod learn;
pub mod linear;
pub mod loops;
mod ops;
pub mod pool;
pub mod prompt;
pub mod rows;
// `self` is the proof that the level's instructions exist, not what is converted.
#[allow(clippy::wrong_self_convention)]
pub mod simd;

pub use ops::{Cpu, Demand, ScratchBytes};
