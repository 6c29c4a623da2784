//! The host's side of a thinkey device.
//!
//! | module | what |
//! |---|---|
//! | [`log`] | decodes the defmt frames that a device logs |
//! | [`sim`] | boards that are not there: memory, time and what goes wrong, by scenario files |
//! | [`trace`] | records what a model's heads are given, and replays it through `thinkey-core` alone |
#![forbid(unsafe_code)]

pub mod log;
pub mod sim;
pub mod trace;
