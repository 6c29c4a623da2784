//! The host's side of a link: a program, or a microcontroller beside the device.
//!
//! A [`Client`] says hello until the device answers, says it again where it waits and hears nothing, and hands on what the
//! device says. It keeps no prompt and no snapshot: those are given to it piece by piece, as it has room.
//!
//! A microcontroller's loop, in which one question is asked:
//!
//! ```
//! use thinkey_core::link::{Client, client::Event, message::{Start, ToHost}, reliable::Timing};
//!
//! # struct Line; impl Line { fn read(&mut self) -> Option<u8> { None } fn write(&mut self, _: &[u8]) {} }
//! # fn milliseconds() -> u64 { 0 }
//! # let mut line = Line;
//! let question = b"Is anybody at the door?";
//! let mut client = Client::new(0x1234_5678, Timing::default());       // drawn at random, so that no other has it
//! let (mut connected, mut accepted, mut over) = (false, false, false);
//! let (mut request, mut sent) = (None, 0);
//! loop {
//!     let now = milliseconds();
//!     while let Some(byte) = line.read() {
//!         client.receive(now, &[byte], &mut |event| {
//!             match event {
//!                 Event::Connected(_) => connected = true,
//!                 Event::Message(ToHost::Accepted { .. }) => accepted = true,
//!                 Event::Message(ToHost::Token { text: _, .. }) => { /* speak it */ }
//!                 // Restarted: the device was switched off. Ask again.
//!                 Event::Message(ToHost::Ended { .. } | ToHost::Failed { .. }) | Event::Restarted => over = true,
//!                 _ => {}
//!             }
//!             true                                                     // false leaves a message on the line for later
//!         });
//!     }
//!     match request {
//!         None if connected => {
//!             let start = Start { prompt_bytes: question.len() as u32, max_tokens: 64, ..Start::default() };
//!             request = client.start(&start).ok();
//!         }
//!         Some(number) if accepted && sent < question.len() => sent += client.prompt(number, &question[sent..]),
//!         _ => {}
//!     }
//!     let mut out = [0; 64];
//!     let len = client.transmit(now, &mut out);
//!     line.write(&out[..len]);
//!     if over {
//!         break;
//!     }
//! #   break;
//! }
//! ```

use super::{
    VERSION,
    message::{self, Capabilities, Greeting, Hello, MAX_CHUNK, Snapshot, Start, ToDevice, ToHost},
    reliable::{Incoming, Link, Timing},
};
use crate::Error;
use heapless::Vec;

/// Requests of a client under way: those that wait in the device, the one that runs, and one that is refused.
pub const OPEN: usize = super::device::QUEUE + 2;

/// What a client is told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event<'a> {
    /// A session has begun.
    Connected(Capabilities<'a>),
    /// The device lost the session: it was switched off, or spoke to another client. Whatever was under way has come to
    /// nothing; a new session begins.
    Restarted,
    /// The device speaks another version of the protocol, and nothing can be said.
    Version {
        /// The device's.
        device: u16,
    },
    /// The device's next message.
    Message(ToHost<'a>),
}

/// The host's side.
#[derive(Debug)]
pub struct Client {
    link: Link,
    client: u32,
    attempt: u16,
    /// When the last hello was said.
    hello: Option<u64>,
    rejected: bool,
    next: u16,
    open: Vec<u16, OPEN>,
    /// Answers to come that are no requests'.
    asked: u16,
    /// Bytes of a snapshot to come.
    chunks: u32,
}

impl Client {
    /// A client that says hello first. `client` is drawn at random, so that no other has it.
    #[must_use]
    pub const fn new(client: u32, timing: Timing) -> Self {
        Self {
            link: Link::new(timing),
            client,
            attempt: 0,
            hello: None,
            rejected: false,
            next: 0,
            open: Vec::new(),
            asked: 0,
            chunks: 0,
        }
    }

    /// Whether there is a session.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.link.session() != 0
    }

    /// Requests under way.
    #[must_use]
    pub fn open(&self) -> &[u16] {
        &self.open
    }

    /// Whether an answer is to come, or something said is not known to have arrived.
    #[must_use]
    pub fn waits(&self) -> bool {
        !self.open.is_empty() || self.asked > 0 || self.chunks > 0 || !self.link.is_settled()
    }

    /// The link, for its counters and its room.
    #[must_use]
    pub const fn link(&self) -> &Link {
        &self.link
    }

    /// The line is another one, or works again.
    pub fn reconnect(&mut self) {
        self.link.reconnect();
        self.hello = None;
    }

    /// There is room again for messages that were left.
    pub fn resume(&mut self) {
        self.link.invite();
    }

    fn say(&mut self, message: &ToDevice<'_>) -> Result<(), Error> {
        self.link.send(message::body(message)?)
    }

    /// Asks for a completion; returns its number. Its prompt is to follow when it is [accepted](ToHost::Accepted).
    ///
    /// # Errors
    /// [`Error::Capacity`] where as many are under way as can be, there is no session or no room in it.
    pub fn start(&mut self, start: &Start<'_>) -> Result<u16, Error> {
        if self.open.is_full() {
            return Err(Error::Capacity { what: "requests under way", needed: OPEN + 1, capacity: OPEN });
        }
        let mut request = self.next;
        while self.open.contains(&request) {
            request = request.wrapping_add(1);
        }
        self.say(&ToDevice::Start { request, start: *start })?;
        self.next = request.wrapping_add(1);
        // There is room, see above.
        let _ = self.open.push(request);
        Ok(request)
    }

    /// Sends bytes of a prompt; returns how many there was room for.
    pub fn prompt(&mut self, request: u16, bytes: &[u8]) -> usize {
        self.pieces(bytes, |bytes| ToDevice::Prompt { request, bytes })
    }

    /// Sends bytes of a snapshot to [restore](Self::restore); returns how many there was room for.
    pub fn chunk(&mut self, bytes: &[u8]) -> usize {
        self.pieces(bytes, |bytes| ToDevice::Chunk { bytes })
    }

    fn pieces<'b>(&mut self, bytes: &'b [u8], message: impl Fn(&'b [u8]) -> ToDevice<'b>) -> usize {
        let mut sent = 0;
        // A place stays for a cancellation.
        while sent < bytes.len() && self.link.room() > 1 {
            let piece = &bytes[sent..bytes.len().min(sent + MAX_CHUNK)];
            if self.say(&message(piece)).is_err() {
                break;
            }
            sent += piece.len();
        }
        sent
    }

    /// Asks for the end of a request.
    ///
    /// # Errors
    /// [`Error::Capacity`] where there is no room.
    pub fn cancel(&mut self, request: u16) -> Result<(), Error> {
        self.say(&ToDevice::Cancel { request })
    }

    /// Asks for [`ToHost::Stats`].
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel).
    pub fn stats(&mut self) -> Result<(), Error> {
        self.ask(&ToDevice::Stats)
    }

    /// Asks for [`ToHost::Health`].
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel).
    pub fn health(&mut self) -> Result<(), Error> {
        self.ask(&ToDevice::Health)
    }

    /// Asks for a snapshot: [`ToHost::Snapshot`] and its chunks.
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel).
    pub fn save(&mut self) -> Result<(), Error> {
        self.ask(&ToDevice::Save)
    }

    /// Says that a snapshot is to be restored, whose [chunks](Self::chunk) follow; [`ToHost::Restored`] is the answer.
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel).
    pub fn restore(&mut self, snapshot: Snapshot) -> Result<(), Error> {
        self.ask(&ToDevice::Restore(snapshot))
    }

    fn ask(&mut self, message: &ToDevice<'_>) -> Result<(), Error> {
        self.say(message)?;
        self.asked += 1;
        Ok(())
    }

    /// Takes what came off the line, and shows what the device says to `on_event`, which answers whether it takes a message:
    /// one that it does not take comes again, and none comes before it.
    pub fn receive(&mut self, now: u64, mut bytes: &[u8], on_event: &mut dyn FnMut(Event<'_>) -> bool) {
        while let Some(incoming) = self.link.receive(now, &mut bytes) {
            match incoming {
                Incoming::Greeting(body) => {
                    if let Ok(greeting) = message::decode(&body) {
                        self.greeted(greeting, on_event);
                    }
                }
                Incoming::Message(body) => match message::decode(&body) {
                    Ok(message) => {
                        if on_event(Event::Message(message)) {
                            self.link.accept();
                            self.told(&message);
                        }
                    }
                    // Of a device of this version there is none such.
                    Err(_) => self.link.accept(),
                },
            }
        }
    }

    fn greeted(&mut self, greeting: Greeting<'_>, on_event: &mut dyn FnMut(Event<'_>) -> bool) {
        match greeting {
            Greeting::Welcome(welcome) if (welcome.client, welcome.attempt) == (self.client, self.attempt) => {
                if self.link.session() == welcome.session {
                    return;
                }
                if !self.is_connected() {
                    self.link.begin(welcome.session);
                    self.rejected = false;
                    on_event(Event::Connected(welcome.capabilities));
                    return;
                }
                // Another session of the same attempt: which of the two is the last is not known, so neither is gone on with.
                self.attempt = self.attempt.wrapping_add(1);
                self.link.begin(0);
                self.open.clear();
                (self.asked, self.chunks, self.hello) = (0, 0, None);
                on_event(Event::Restarted);
            }
            // Told once.
            Greeting::Rejected { version, client }
                if client == self.client && !self.is_connected() && !core::mem::replace(&mut self.rejected, true) =>
            {
                on_event(Event::Version { device: version });
            }
            _ => {}
        }
    }

    fn told(&mut self, message: &ToHost<'_>) {
        match *message {
            ToHost::Ended { request, .. } | ToHost::Failed { request: Some(request), .. } => {
                self.open.retain(|&open| open != request);
            }
            ToHost::Snapshot(Snapshot { bytes, .. }) => {
                self.asked = self.asked.saturating_sub(1);
                self.chunks = bytes;
            }
            ToHost::Chunk { bytes } => self.chunks = self.chunks.saturating_sub(bytes.len() as u32),
            // Also says that a snapshot under way ends early.
            ToHost::Failed { request: None, .. } if core::mem::take(&mut self.chunks) == 0 => {
                self.asked = self.asked.saturating_sub(1);
            }
            ToHost::Stats(_) | ToHost::Health(_) | ToHost::Restored { .. } => self.asked = self.asked.saturating_sub(1),
            _ => {}
        }
    }

    /// Bytes for the line: writes them to the front of `out`, returns how many.
    pub fn transmit(&mut self, now: u64, out: &mut [u8]) -> usize {
        let Timing { retransmit, silence, .. } = *self.link.timing();
        let due = match (self.hello, self.is_connected()) {
            (None, _) => true,
            (Some(last), false) => now >= last.saturating_add(retransmit.into()),
            (Some(last), true) => self.waits() && now >= self.link.heard().max(last).saturating_add(silence.into()),
        };
        if due {
            let hello = Hello { version: VERSION, client: self.client, attempt: self.attempt };
            if let Ok(body) = message::body(&Greeting::Hello(hello)) {
                self.link.greet(body);
            }
            self.hello = Some(now);
        }
        self.link.transmit(now, out)
    }
}
