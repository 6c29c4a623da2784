//! The operations on plain slices: SIMD chosen at run time, threads from a persistent pool.

pub mod aligned;
pub mod attention;
pub mod cache;
pub mod gemm;
pub mod linear;
pub mod loops;
pub mod pool;
pub mod rows;
pub mod simd;
