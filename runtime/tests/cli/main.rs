//! The `thinkey` command as a person or a program runs it, on a tiny model.
#![allow(missing_docs, reason = "tests")]

mod bad_files;
mod calibrate;
mod chat;
mod command;
mod doctor;
mod eval;
mod fixture;
mod generate;
mod inspect;
#[cfg(unix)]
mod interrupt;
mod main_job;
#[cfg(target_os = "linux")]
mod memory;
mod plan;
mod server;
mod store;
