//! `thinkey pull`: a model into the store.

use super::{
    CliError,
    progress::{self, style},
};
use std::{io::Write, ops::ControlFlow, path::PathBuf};
use thinkey::store::{DEFAULT, Progress, Store};

/// Arguments of `thinkey pull`.
#[derive(clap::Args)]
pub struct Arguments {
    /// A known model, OWNER/NAME[@REVISION][:FILE] on the hub, or a path
    #[arg(default_value = DEFAULT.id)]
    model: String,
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let path = pull(&Store::open()?, &arguments.model)?;
    writeln!(std::io::stdout(), "{}", path.display())?;
    Ok(())
}

/// Pulls `model` with a progress bar on the terminal; a source that fails is named on a line of its own.
pub fn pull(store: &Store, model: &str) -> Result<PathBuf, CliError> {
    let bar = progress::bytes();
    let path = store.pull(model, &mut |progress| {
        match progress {
            Progress::Arrived { what, done_bytes, total_bytes } => {
                if let (Some(total), None) = (total_bytes, bar.length()) {
                    bar.set_length(total);
                    bar.set_style(style("{msg} {bar:30} {bytes}/{total_bytes} {eta}"));
                }
                bar.set_message(what.to_owned());
                bar.set_position(done_bytes);
            }
            Progress::Checked { what, done_bytes, total_bytes } => {
                bar.set_length(total_bytes);
                bar.set_style(style("checking {msg} {bar:30} {bytes}/{total_bytes}"));
                bar.set_message(what.to_owned());
                bar.set_position(done_bytes);
            }
            Progress::SourceFailed { source, reason } => bar.suspend(|| eprintln!("thinkey: {source}: {reason}")),
            Progress::Waiting { what } => bar.set_message(format!("waiting for another process that pulls {what}")),
        }
        ControlFlow::Continue(())
    });
    bar.finish_and_clear();
    Ok(path?)
}
