//! A thinkey device on a host, and the host's side of one.
//!
//! | module | what |
//! |---|---|
//! | [`engine`] | the runtime as what a device runs |
//! | [`log`] | decodes the defmt frames that a device logs |
//! | [`port`] | lines: TCP, pseudo-terminals, serial devices, pipes |
//! | [`mod@serve`] | the device's loop over a port |
//! | [`sim`] | boards that are not there: memory, time and what goes wrong, by scenario files |
//! | [`trace`] | records what a model's heads are given, and replays it through `thinkey-core` alone |
//!
//! The host's client is [`thinkey_core::link::Client`], which does no input and output.
#![forbid(unsafe_code)]

pub mod engine;
pub mod log;
pub mod port;
pub mod serve;
pub mod sim;
pub mod trace;
