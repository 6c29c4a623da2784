//! A reply as it appears: progress while the prompt is read, then text as it comes, until Ctrl-C.

use super::{CliError, interrupt::Watch, progress};
use std::{
    io::{self, Write},
    ops::ControlFlow,
};
use thinkey::{
    engine::{Engine, Session},
    generate::{Event, Reply, Request, generate},
};

/// Generates a reply and writes its text to `out` as it comes. Ctrl-C interrupts it.
///
/// # Errors
/// Those of [`generate`], and [`CliError::Output`] where `out` cannot be written.
pub fn answer(
    engine: &mut Engine,
    session: &mut Session,
    request: Request<'_>,
    mut out: impl Write,
) -> Result<Reply, CliError> {
    let watch = Watch::new();
    let bar = progress::layers("reading", engine.config().layers);
    bar.tick();
    let mut written = Ok(());
    let reply = generate(engine, session, request, &mut |event| {
        match event {
            Event::Read { done, .. } => bar.set_position(done as u64),
            Event::Token { text, .. } | Event::Rest(text) => {
                bar.finish_and_clear();
                written = write(&mut out, text);
                if written.is_err() {
                    return ControlFlow::Break(());
                }
            }
        }
        watch.flow()
    });
    bar.finish_and_clear();
    written?;
    Ok(reply?)
}

fn write(out: &mut impl Write, text: &str) -> io::Result<()> {
    out.write_all(text.as_bytes())?;
    out.flush()
}
