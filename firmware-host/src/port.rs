//! Lines: where the bytes of a link go and come from.
//!
//! A [`Port`] reads and writes on threads of its own, so that whoever has it waits for bytes and for work at one place, and
//! never on a reader that is slow.

use rustix::{
    fs::OFlags,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    net::TcpStream,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, TrySendError},
    thread,
    time::Duration,
};

/// What one waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Bytes came.
    Bytes(Vec<u8>),
    /// Somebody [says](Wake) that there is work.
    Work,
    /// The line is closed, or broken.
    Closed,
}

/// Wakes whoever waits for a port.
#[derive(Clone, Debug)]
pub struct Wake(Sender<Input>);

impl Wake {
    /// There is work.
    pub fn wake(&self) {
        // Nobody waits any more where this fails.
        let _ = self.0.send(Input::Work);
    }
}

/// A line.
#[derive(Debug)]
pub struct Port {
    input: Receiver<Input>,
    wake: Sender<Input>,
    output: SyncSender<Vec<u8>>,
    /// Bytes that the writer had no place for.
    rest: Option<Vec<u8>>,
}

impl Port {
    /// A line of what can be read and what can be written.
    pub fn new(mut reader: impl Read + Send + 'static, mut writer: impl Write + Send + 'static) -> Self {
        let (wake, input) = mpsc::channel();
        let (output, outgoing) = mpsc::sync_channel::<Vec<u8>>(1);
        let read = wake.clone();
        thread::spawn(move || {
            let mut memory = [0; 4096];
            loop {
                let input = match reader.read(&mut memory) {
                    Ok(0) => Input::Closed,
                    Ok(len) => Input::Bytes(memory[..len].to_vec()),
                    Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => Input::Closed,
                };
                let closed = input == Input::Closed;
                if read.send(input).is_err() || closed {
                    break;
                }
            }
        });
        let written = wake.clone();
        thread::spawn(move || {
            for bytes in outgoing {
                if writer.write_all(&bytes).and_then(|()| writer.flush()).is_err() {
                    let _ = written.send(Input::Closed);
                    break;
                }
                let _ = written.send(Input::Work);
            }
        });
        Self { input, wake, output, rest: None }
    }

    /// A TCP connection.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self::new(stream.try_clone()?, stream))
    }

    /// A serial device or the other end of a pseudo-terminal, as raw bytes; `baud` where the speed is to be set.
    ///
    /// # Errors
    /// Where it cannot be opened, or is no terminal.
    pub fn terminal(path: &Path, baud: Option<u32>) -> io::Result<Self> {
        let options = OFlags::NOCTTY.bits() as i32;
        let file = OpenOptions::new().read(true).write(true).custom_flags(options).open(path)?;
        raw(&file, baud)?;
        Ok(Self::new(file.try_clone()?, file))
    }

    /// Someone to wake this port.
    #[must_use]
    pub fn waker(&self) -> Wake {
        Wake(self.wake.clone())
    }

    /// What has come, if anything has.
    pub fn try_next(&self) -> Option<Input> {
        match self.input.try_recv() {
            Ok(input) => Some(input),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Input::Closed),
        }
    }

    /// Waits for what comes next, for `patience` at most.
    pub fn next(&self, patience: Duration) -> Option<Input> {
        match self.input.recv_timeout(patience) {
            Ok(input) => Some(input),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Input::Closed),
        }
    }

    /// Writes what `fill` puts into its memory, until that is nothing or the line takes no more now.
    pub fn write(&mut self, mut fill: impl FnMut(&mut [u8]) -> usize) {
        loop {
            let bytes = match self.rest.take() {
                Some(bytes) => bytes,
                None => {
                    let mut bytes = vec![0; 2048];
                    let len = fill(&mut bytes);
                    if len == 0 {
                        return;
                    }
                    bytes.truncate(len);
                    bytes
                }
            };
            match self.output.try_send(bytes) {
                Ok(()) => {}
                Err(TrySendError::Full(bytes)) => {
                    self.rest = Some(bytes);
                    return;
                }
                // That the line is closed is told where one waits.
                Err(TrySendError::Disconnected(_)) => return,
            }
        }
    }
}

/// Makes a terminal carry bytes as they are.
fn raw(terminal: impl AsFd, baud: Option<u32>) -> io::Result<()> {
    let mut modes = tcgetattr(&terminal)?;
    modes.make_raw();
    if let Some(baud) = baud {
        modes.set_speed(baud)?;
    }
    Ok(tcsetattr(&terminal, OptionalActions::Now, &modes)?)
}

/// A pseudo-terminal: a line whose other end is a path.
#[derive(Debug)]
pub struct Pty {
    /// The other end.
    pub path: PathBuf,
    /// Held open, so that this end outlives whoever opens the path and closes it.
    _other: File,
}

impl Pty {
    /// Opens one.
    ///
    /// # Errors
    /// Where the system has none.
    pub fn open() -> io::Result<(Self, Port)> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = ptsname(&master, Vec::new())?;
        let path = PathBuf::from(String::from_utf8_lossy(path.to_bytes()).into_owned());
        let options = OFlags::NOCTTY.bits() as i32;
        let other = OpenOptions::new().read(true).write(true).custom_flags(options).open(&path)?;
        raw(&other, None)?;
        let master = File::from(master);
        Ok((Self { path, _other: other }, Port::new(master.try_clone()?, master)))
    }
}
