//! What the tests that cross crates share: reference recordings.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

pub mod recording;
