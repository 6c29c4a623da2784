//! Ctrl-C: ends an answer where one is under way, and the program otherwise.

use super::CliError;
use std::{
    ops::ControlFlow,
    process::{self, ExitCode},
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

/// Exit code of a program that Ctrl-C ended: 128 and the number of the signal, as shells have it.
const CODE: u8 = 130;

static WATCHED: AtomicBool = AtomicBool::new(false);
static PRESSED: AtomicBool = AtomicBool::new(false);

/// Takes over Ctrl-C. Without a [`Watch`], and for whoever presses it again before the first was heeded, it still ends
/// the program.
///
/// # Errors
/// [`CliError::Interrupt`] where the system refuses.
pub fn take_over() -> Result<(), CliError> {
    ctrlc::set_handler(|| {
        if !WATCHED.load(SeqCst) || PRESSED.swap(true, SeqCst) {
            process::exit(CODE.into());
        }
    })
    .map_err(CliError::Interrupt)
}

/// The exit code after an interruption.
pub fn code() -> ExitCode {
    CODE.into()
}

/// While it lives, a Ctrl-C is noted and the program goes on.
pub struct Watch(());

impl Watch {
    /// Begins to watch.
    pub fn new() -> Self {
        PRESSED.store(false, SeqCst);
        WATCHED.store(true, SeqCst);
        Self(())
    }

    /// Breaks once Ctrl-C was pressed.
    pub fn flow(&self) -> ControlFlow<()> {
        if PRESSED.load(SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        WATCHED.store(false, SeqCst);
    }
}
