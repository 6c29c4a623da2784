//! The tensor operations of thinkey that burn lacks.
//!
//! [`ops`] are the operations that a model needs, as a trait over burn's backends. [`cpu`] implements them on slices,
//! [`reference`](mod@reference) by plain tensor operations on any backend. [`format`](mod@format) is how weights lie in memory.
#![deny(missing_docs)]

pub mod cpu;
#[cfg(feature = "cube")]
pub mod cube;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod format;
pub mod ops;
pub mod reference;
#[cfg(feature = "vulkan")]
pub mod vulkan;
