//! `thinkey-firmware-host log`: a device's frames as lines of text or JSON.

use super::{
    CliError,
    host::{Host, Line},
};
use std::{
    env,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};
use thinkey_core::link::{client::Event, message::ToHost};
use thinkey_firmware_host::log::{Level, LogDecoder, LogStream, Record};

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
    #[command(flatten)]
    line: Line,
    /// Where the frames come from, as they arrive, where not over a link: a file, a serial port, or - for the standard input
    #[arg(default_value = "-", conflicts_with_all = ["connect", "port"])]
    frames: PathBuf,
}

/// What explains the log of a firmware.
///
/// # Errors
/// A file that cannot be read, or explains no log.
pub fn decoder(elf: &Path) -> Result<LogDecoder, CliError> {
    let bytes = fs::read(elf).map_err(|cause| CliError::Input { path: elf.to_owned(), cause })?;
    LogDecoder::new(&bytes).map_err(|cause| CliError::Log { path: elf.to_owned(), cause })
}

/// Prints records as they come.
pub struct Printer<'a> {
    decoder: &'a LogDecoder,
    stream: LogStream<'a>,
    level: Level,
    json: bool,
    home: PathBuf,
    malformed: u64,
}

impl<'a> Printer<'a> {
    /// For a stream that begins, of records from `level` on.
    pub fn new(decoder: &'a LogDecoder, level: Level, json: bool) -> Self {
        let home = env::current_dir().unwrap_or_default();
        Self { decoder, stream: decoder.stream(level), level, json, home, malformed: 0 }
    }

    /// Prints what `bytes` complete.
    ///
    /// # Errors
    /// Where `output` cannot be written.
    pub fn print(&mut self, bytes: &[u8], output: &mut impl Write) -> Result<(), CliError> {
        for record in self.stream.decode(bytes) {
            if self.json {
                serde_json::to_writer(&mut *output, &record).map_err(io::Error::from)?;
                writeln!(output)?;
            } else {
                writeln!(output, "{}", shortened(record, &self.home))?;
            }
        }
        Ok(output.flush()?)
    }

    /// The device begins anew, in the middle of a frame perhaps.
    fn restart(&mut self) {
        self.malformed += self.stream.malformed();
        self.stream = self.decoder.stream(self.level);
    }

    /// Says what could not be printed.
    pub fn finish(&self, elf: &Path) {
        let malformed = self.malformed + self.stream.malformed();
        if malformed > 0 {
            eprintln!("{malformed} malformed frames skipped: damaged, or of another build than {}", elf.display());
        }
        if self.stream.pending() > 0 {
            eprintln!("the last {} bytes are no whole frame: the stream was cut off", self.stream.pending());
        }
    }
}

/// Runs the command.
///
/// # Errors
/// A firmware file that explains no log, an input that cannot be read, an output that is closed.
pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let decoder = decoder(&arguments.elf)?;
    let mut printer = Printer::new(&decoder, arguments.level, arguments.json);
    let mut output = io::stdout().lock();
    if arguments.line.is_given() {
        link(&arguments.line, &mut printer, &mut output)?;
    } else {
        stream(&arguments.frames, &mut printer, &mut output)?;
    }
    printer.finish(&arguments.elf);
    Ok(())
}

/// The log of a device at the other end of a link, until that is closed.
fn link(line: &Line, printer: &mut Printer<'_>, output: &mut impl Write) -> Result<(), CliError> {
    let mut printed = Ok(());
    let mut hear = |printed: &mut Result<(), CliError>, event: Event<'_>| match event {
        Event::Message(ToHost::Log { bytes }) if printed.is_ok() => *printed = printer.print(bytes, output),
        Event::Restarted => printer.restart(),
        _ => {}
    };
    let mut host = Host::connect(line, &mut |event| hear(&mut printed, event))?;
    loop {
        let turned = host.turn(&mut |event| hear(&mut printed, event));
        std::mem::replace(&mut printed, Ok(()))?;
        match turned {
            Ok(()) => {}
            Err(CliError::Closed) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// The log in a stream of bytes, until that ends.
fn stream(path: &Path, printer: &mut Printer<'_>, output: &mut impl Write) -> Result<(), CliError> {
    let from = |cause| CliError::Input { path: path.to_owned(), cause };
    let mut frames: Box<dyn Read> =
        if path == Path::new("-") { Box::new(io::stdin().lock()) } else { Box::new(File::open(path).map_err(from)?) };
    let mut memory = [0; 4096];
    loop {
        let bytes = match frames.read(&mut memory) {
            Ok(0) => return Ok(()),
            Ok(len) => &memory[..len],
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
            Err(cause) => return Err(from(cause)),
        };
        printer.print(bytes, output)?;
    }
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
