#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! | module | what |
//! |---|---|
//! | [`engine`] | the runtime as what a device runs |
//! | [`log`] | decodes the defmt frames that a device logs |
//! | `logger` | with the feature `defmt`: what this program logs itself, for the link |
//! | [`port`] | lines: TCP, pseudo-terminals, serial devices, pipes |
//! | [`mod@serve`] | the device's loop over a port |
//! | [`sim`] | boards that are not there: memory, time and what goes wrong, by scenario files |
//! | [`trace`] | records what a model's heads are given, and replays it through `thinkey-core` alone |
//!
//! # Features
//!
//! `cuda` has `run --device cuda`, as in `thinkey`.
//!
//! `defmt` makes the program that runs as a device log through defmt, as `thinkey-core` does on a microcontroller; the frames
//! go to the host over the link. Off by default: with it on, every binary of the build needs the logger and the linker script
//! that [`thinkey-firmware-host`](crate) brings for its own.
#![cfg_attr(not(feature = "defmt"), forbid(unsafe_code))]
#![deny(unsafe_code)]

pub mod engine;
pub mod log;
#[cfg(feature = "defmt")]
pub mod logger;
pub mod port;
pub mod serve;
pub mod sim;
pub mod trace;
