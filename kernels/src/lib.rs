//! The tensor operations of thinkey that burn lacks.
//!
//! [`format`](mod@format) is how weights lie in memory; [`cpu`] are the operations on plain slices.
#![deny(missing_docs)]

pub mod cpu;
pub mod format;
