//! `thinkey-firmware-host log`: a device's frames as lines of text or JSON.

use super::CliError;
use std::{
    env,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};
use thinkey_firmware_host::log::{Level, LogDecoder, Record};

/// Options of `log`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The ELF file of the firmware that runs on the device
    #[arg(long, value_name = "PATH")]
    elf: PathBuf,
    /// Leave out records below this level
    #[arg(long, value_enum, default_value_t = Level::Trace)]
    level: Level,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Where the frames come from, as they arrive: a file, a serial port, or - for the standard input
    #[arg(default_value = "-")]
    frames: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// A firmware file that explains no log, an input that cannot be read, an output that is closed.
pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let input = |path: &Path, cause| CliError::Input { path: path.to_owned(), cause };
    let elf = fs::read(&arguments.elf).map_err(|cause| input(&arguments.elf, cause))?;
    let decoder = LogDecoder::new(&elf).map_err(|cause| CliError::Log { path: arguments.elf.clone(), cause })?;
    let mut stream = decoder.stream(arguments.level);

    let from = |cause| input(&arguments.frames, cause);
    let mut frames: Box<dyn Read> = if arguments.frames == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(&arguments.frames).map_err(from)?)
    };
    let home = env::current_dir().unwrap_or_default();
    let (mut output, mut memory) = (io::stdout().lock(), [0; 4096]);
    loop {
        let bytes = match frames.read(&mut memory) {
            Ok(0) => break,
            Ok(len) => &memory[..len],
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
            Err(cause) => return Err(from(cause)),
        };
        for record in stream.decode(bytes) {
            if arguments.json {
                serde_json::to_writer(&mut output, &record).map_err(io::Error::from)?;
                writeln!(output)?;
            } else {
                writeln!(output, "{}", shortened(record, &home))?;
            }
        }
        output.flush()?;
    }
    if stream.malformed() > 0 {
        eprintln!(
            "{} malformed frames skipped: damaged, or of another build than {}",
            stream.malformed(),
            arguments.elf.display()
        );
    }
    if stream.pending() > 0 {
        eprintln!("the last {} bytes are no whole frame: the stream was cut off", stream.pending());
    }
    Ok(())
}

/// The record with its source file relative to the directory that the command runs in.
fn shortened(mut record: Record, home: &Path) -> Record {
    if let Some(location) = &mut record.location
        && let Ok(file) = location.file.strip_prefix(home)
    {
        location.file = file.to_owned();
    }
    record
}
