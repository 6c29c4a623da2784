//! The host's end of a line to a device.

use super::{CliError, run::BAUD};
use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    io,
    net::TcpStream,
    path::PathBuf,
    time::{Duration, Instant},
};
use thinkey_core::link::{Client, client::Event, reliable::Timing};
use thinkey_firmware_host::{
    port::{Input, Port},
    serve::{Clock, TICK},
};

/// Where the device is, and how fast the line.
#[derive(clap::Args)]
pub struct Line {
    #[command(flatten)]
    end: End,
    /// Speed of a serial device; both ends have the same
    #[arg(long, default_value_t = BAUD)]
    baud: u32,
}

/// Where the device is.
#[derive(clap::Args)]
#[group(multiple = false)]
struct End {
    /// The TCP address that a device listens on
    #[arg(long, value_name = "ADDRESS")]
    connect: Option<String>,
    /// A serial device, or the path of a pseudo-terminal
    #[arg(long, value_name = "PATH")]
    port: Option<PathBuf>,
}

impl Line {
    /// Whether there is one.
    pub const fn is_given(&self) -> bool {
        self.end.connect.is_some() || self.end.port.is_some()
    }

    fn name(&self) -> String {
        match (&self.end.connect, &self.end.port) {
            (Some(address), _) => address.clone(),
            (None, Some(path)) => path.display().to_string(),
            (None, None) => "(give --connect or --port)".to_owned(),
        }
    }

    fn open(&self) -> io::Result<Port> {
        match (&self.end.connect, &self.end.port) {
            (Some(address), _) => Port::tcp(TcpStream::connect(address)?),
            (None, Some(path)) => Port::terminal(path, Some(self.baud)),
            (None, None) => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// How long a device may be silent at first.
const PATIENCE: Duration = Duration::from_secs(10);

/// A client and its line.
pub struct Host {
    pub client: Client,
    port: Port,
    clock: Clock,
}

impl Host {
    /// Opens the line and begins a session with the device at its end. What the device says by then goes to `hear`.
    ///
    /// # Errors
    /// A line that cannot be opened, a device that does not answer or is of another version.
    pub fn connect(line: &Line, hear: &mut dyn FnMut(Event<'_>)) -> Result<Self, CliError> {
        let port = line.open().map_err(|cause| CliError::Line { line: line.name(), cause })?;
        let client = Client::new(RandomState::new().hash_one(0) as u32, Timing::default());
        let mut host = Self { client, port, clock: Clock::default() };
        let (begun, mut version) = (Instant::now(), None);
        while !host.client.is_connected() {
            if begun.elapsed() > PATIENCE {
                return Err(CliError::Silence { line: line.name(), seconds: PATIENCE.as_secs() });
            }
            host.turn(&mut |event| {
                if let Event::Version { device } = event {
                    version = Some(device);
                }
                hear(event);
            })?;
            if let Some(device) = version {
                return Err(CliError::Version { device });
            }
        }
        Ok(host)
    }

    /// Says what is to be said, and waits for something to happen, which goes to `hear`.
    ///
    /// # Errors
    /// [`CliError::Closed`].
    pub fn turn(&mut self, hear: &mut dyn FnMut(Event<'_>)) -> Result<(), CliError> {
        let Self { client, port, clock } = self;
        port.write(|out| client.transmit(clock.now(), out));
        let mut input = port.next(TICK);
        while let Some(next) = input {
            match next {
                Input::Bytes(bytes) => client.receive(clock.now(), &bytes, &mut |event| {
                    hear(event);
                    true
                }),
                Input::Work => {}
                Input::Closed => return Err(CliError::Closed),
            }
            input = port.try_next();
        }
        // What is heard is acknowledged at once, and not when the next thing happens.
        port.write(|out| client.transmit(clock.now(), out));
        Ok(())
    }
}
