//! `thinkey-firmware-host sim`: a scenario on a board that is not there.

use super::CliError;
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};
use thinkey_firmware_host::sim::{self, Scenario};

/// Options of `sim`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The scenario; boards, models and shapes that it names by a path lie beside it
    scenario: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write the report with its plots to this file, too
    #[arg(long, value_name = "PATH")]
    html: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// A scenario that cannot be read or run, expectations that are not met, files that cannot be written.
pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let scenario = Scenario::read(&arguments.scenario)?;
    let home = arguments.scenario.parent().unwrap_or(Path::new("."));
    // Drawn on a terminal's standard error alone.
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} tokens")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(0).with_style(style).with_message(scenario.name.clone());
    let report = sim::run(&scenario, home, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let report = report?;
    if let Some(path) = &arguments.html {
        let page = sim::page(&report)?;
        fs::write(path, page).map_err(|cause| CliError::Write { path: path.clone(), cause })?;
    }
    let mut output = io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut output, &report).map_err(io::Error::from)?;
        writeln!(output)?;
    } else {
        writeln!(output, "{report}")?;
    }
    let unmet = report.checks.iter().filter(|check| !check.met).count();
    if unmet > 0 { Err(CliError::Unmet { unmet, all: report.checks.len() }) } else { Ok(()) }
}
