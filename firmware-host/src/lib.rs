//! The host's side of a thinkey device.
//!
//! | module | what |
//! |---|---|
//! | [`log`] | decodes the defmt frames that a device logs |
#![forbid(unsafe_code)]

pub mod log;
