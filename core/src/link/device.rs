//! The device's loop: a state machine over an [`Engine`], driven by bytes, the time and polls.
//!
//! ```text
//! loop {
//!     device.receive(now, bytes that came);
//!     let worked = device.poll(now);            // at most one step of the engine
//!     send what device.transmit(now, …) gives;
//!     if !worked { wait for bytes, or a while }
//! }
//! ```
//!
//! Memory is fixed: [`QUEUE`] requests wait, [`OUTBOX`] messages are under way, [`LOG`] bytes of log.
//! Where the host does not read, there is no room for another token and the engine is not asked for one; a message that
//! cannot be answered for want of room is left on the line, whose reliable part brings it again. Cancellations always
//! get through.

use super::{
    VERSION,
    engine::{Engine, Step},
    frame::Body,
    message::{
        self, Code, End, Ending, Failure, Form, Greeting, Health, Hello, MAX_CHUNK, MAX_LINE, MAX_TEXT, Sampling,
        Start, ToDevice, ToHost, Welcome,
    },
    reliable::{Incoming, Link, OUTBOX, Timing},
};
use crate::wire::CRC;
use heapless::{Deque, String};

/// Requests that wait for their turn.
pub const QUEUE: usize = 4;

/// Bytes of log that wait to be sent.
pub const LOG: usize = 1024;

/// Messages that a poll leaves room for, so that questions are answered while tokens wait.
const RESERVE: usize = 2;

/// A request that waits.
#[derive(Clone, Debug)]
struct Waiting {
    request: u16,
    prompt_bytes: u32,
    form: Form,
    append: bool,
    max_tokens: u32,
    sampling: Sampling,
    policy: String<MAX_LINE>,
}

impl Waiting {
    fn new(request: u16, start: &Start<'_>) -> Result<Self, Failure> {
        let Start { prompt_bytes, form, append, max_tokens, sampling, policy } = *start;
        let too_long = |_| Failure::new(Code::Policy, "the policy's line is longer than a message carries");
        let policy = String::try_from(policy).map_err(too_long)?;
        Ok(Self { request, prompt_bytes, form, append, max_tokens, sampling, policy })
    }

    fn start(&self) -> Start<'_> {
        let Self { prompt_bytes, form, append, max_tokens, sampling, ref policy, .. } = *self;
        Start { prompt_bytes, form, append, max_tokens, sampling, policy }
    }
}

/// What the engine is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Idle,
    /// Bytes of a prompt are still to come.
    Prompt {
        request: u16,
        left: u32,
    },
    /// `None` where who asked is gone, and the engine is only to come to an end.
    Running {
        request: Option<u16>,
    },
    /// A snapshot is being made.
    Making,
    Saving {
        offset: u32,
        bytes: u32,
    },
    Restoring {
        left: u32,
    },
    /// All of it is there, and is being taken.
    Taking,
}

/// The loop.
#[derive(Debug)]
pub struct Device<E> {
    engine: E,
    link: Link,
    boot: u32,
    began: u64,
    sessions: u32,
    client: Option<(u32, u16)>,
    waiting: Deque<Waiting, QUEUE>,
    job: Job,
    ended: u32,
    log: Deque<u8, LOG>,
    lost_log: u32,
}

impl<E: Engine> Device<E> {
    /// A loop over `engine` that begins at `now`, in milliseconds as all times. `boot` is another number each time the device
    /// is switched on: drawn, or counted in memory that stays.
    pub fn new(engine: E, boot: u32, timing: Timing, now: u64) -> Self {
        Self {
            engine,
            link: Link::new(timing),
            boot,
            began: now,
            sessions: 0,
            client: None,
            waiting: Deque::new(),
            job: Job::Idle,
            ended: 0,
            log: Deque::new(),
            lost_log: 0,
        }
    }

    /// The engine.
    pub const fn engine(&self) -> &E {
        &self.engine
    }

    /// The engine, as a test may want to change it.
    pub const fn engine_mut(&mut self) -> &mut E {
        &mut self.engine
    }

    /// The link, for its counters.
    pub const fn link(&self) -> &Link {
        &self.link
    }

    /// The line is another one, or works again.
    pub fn reconnect(&mut self) {
        self.link.reconnect();
    }

    /// Bytes of the device's log, which go to the host when there is room: all of them, or, where there is
    /// [none](Self::log_room), none and they are counted. So whoever gives one frame a call has no frame cut.
    pub fn log(&mut self, bytes: &[u8]) {
        if bytes.len() > self.log_room() {
            self.lost_log = self.lost_log.wrapping_add(bytes.len() as u32);
            return;
        }
        for &byte in bytes {
            // There is room.
            let _ = self.log.push_back(byte);
        }
    }

    /// Bytes of log that there is room for.
    pub fn log_room(&self) -> usize {
        LOG - self.log.len()
    }

    /// Takes what came off the line.
    pub fn receive(&mut self, now: u64, mut bytes: &[u8]) {
        while let Some(incoming) = self.link.receive(now, &mut bytes) {
            match incoming {
                Incoming::Greeting(body) => self.greeted(&body),
                Incoming::Message(body) => {
                    if self.told(now, &body) {
                        self.link.accept();
                    }
                }
            }
        }
    }

    /// Bytes for the line: writes them to the front of `out`, returns how many.
    pub fn transmit(&mut self, now: u64, out: &mut [u8]) -> usize {
        if self.link.room() > RESERVE {
            self.link.invite();
        }
        self.link.transmit(now, out)
    }

    /// Works: at most one step of the engine. Returns whether there was something to do, so that there may be more.
    pub fn poll(&mut self, now: u64) -> bool {
        // An engine whose host is gone comes to an end whatever the line does.
        if self.link.room() <= RESERVE && self.job != (Job::Running { request: None }) {
            return false;
        }
        let worked = match self.job {
            Job::Idle => self.next_request(),
            Job::Prompt { .. } | Job::Restoring { .. } => false,
            Job::Running { request } => self.step(request),
            Job::Making => self.made(),
            Job::Saving { offset, bytes } => self.save(offset, bytes),
            Job::Taking => self.taken(),
        };
        let _ = now;
        self.send_log() || worked
    }

    /// Sends `message`; there is room.
    fn send(&mut self, message: &ToHost<'_>) {
        // Texts are cut and chunks bounded, so every message has a body.
        let sent = message::body(message).and_then(|body| self.link.send(body));
        debug_assert!(sent.is_ok(), "{sent:?}");
    }

    fn fail(&mut self, request: Option<u16>, failure: &Failure) {
        self.send(&ToHost::Failed { request, code: failure.code, detail: &failure.detail });
    }

    /// A request is through.
    fn end(&mut self, request: Option<u16>, result: Result<Ending, Failure>) {
        self.job = Job::Idle;
        self.ended = self.ended.wrapping_add(1);
        let Some(request) = request else { return };
        match result {
            Ok(ending) => self.send(&ToHost::Ended { request, ending }),
            Err(failure) => self.fail(Some(request), &failure),
        }
    }

    fn greeted(&mut self, body: &Body) {
        // The version comes first, whatever else another version says.
        let Ok(Greeting::Hello(hello)) = message::decode(body) else {
            if let [0, rest @ ..] = &body[..]
                && let Ok((version, rest)) = postcard::take_from_bytes::<u16>(rest)
                && let Ok((client, _)) = postcard::take_from_bytes::<u32>(rest)
                && version != VERSION
            {
                self.greet(&Greeting::Rejected { version: VERSION, client });
            }
            return;
        };
        let Hello { version, client, attempt } = hello;
        if version != VERSION {
            self.greet(&Greeting::Rejected { version: VERSION, client });
            return;
        }
        match self.client {
            Some((known, last)) if known == client && last == attempt => {}
            // It is late: half of all numbers are before another.
            Some((known, last)) if known == client && last.wrapping_sub(attempt) < 1 << 15 => return,
            _ => self.new_session(client, attempt),
        }
        let session = self.link.session();
        // The engine lends its texts while the link is written to.
        let Self { engine, link, .. } = self;
        let mut capabilities = engine.capabilities();
        capabilities.model = message::cut(capabilities.model);
        capabilities.policy = message::cut(capabilities.policy);
        if let Ok(body) = message::body(&Greeting::Welcome(Welcome { client, attempt, session, capabilities })) {
            link.greet(body);
        }
    }

    fn greet(&mut self, greeting: &Greeting<'_>) {
        if let Ok(body) = message::body(greeting) {
            self.link.greet(body);
        }
    }

    fn new_session(&mut self, client: u32, attempt: u16) {
        self.sessions = self.sessions.wrapping_add(1);
        self.client = Some((client, attempt));
        let mut digest = CRC.digest();
        for number in [self.boot, self.sessions, client, attempt.into()] {
            digest.update(&number.to_le_bytes());
        }
        self.link.begin(digest.finalize().max(1));
        self.waiting.clear();
        self.job = match self.job {
            Job::Prompt { .. } => {
                self.engine.cancel();
                Job::Idle
            }
            Job::Running { request } => {
                if request.is_some() {
                    self.engine.cancel();
                }
                Job::Running { request: None }
            }
            _ => Job::Idle,
        };
    }

    /// Does what the host says; false where there is no room for the answer.
    fn told(&mut self, now: u64, body: &Body) -> bool {
        let message = message::decode::<ToDevice<'_>>(body);
        if let Ok(ToDevice::Cancel { request }) = message
            && self.job == (Job::Running { request: Some(request) })
        {
            self.engine.cancel();
            return true;
        }
        if self.link.room() == 0 {
            return false;
        }
        match message {
            Err(_) => self.fail(None, &Failure::new(Code::Protocol, "a message that this device cannot read")),
            Ok(ToDevice::Start { request, start }) => self.asked(request, &start),
            Ok(ToDevice::Prompt { request, bytes }) => self.prompted(request, bytes),
            Ok(ToDevice::Cancel { request }) => self.cancelled(request),
            Ok(ToDevice::Stats) => {
                let stats = self.engine.stats();
                self.send(&ToHost::Stats(stats));
            }
            Ok(ToDevice::Health) => {
                let health = self.health(now);
                self.send(&ToHost::Health(health));
            }
            Ok(ToDevice::Save) => match self.free().and_then(|()| self.engine.save()) {
                Ok(()) => self.job = Job::Making,
                Err(failure) => self.fail(None, &failure),
            },
            Ok(ToDevice::Restore(snapshot)) => match self.free().and_then(|()| self.engine.restore(snapshot)) {
                Ok(()) => self.restoring(snapshot.bytes),
                Err(failure) => self.fail(None, &failure),
            },
            Ok(ToDevice::Chunk { bytes }) => self.chunk(bytes),
        }
        true
    }

    fn health(&self, now: u64) -> Health {
        Health {
            uptime_ms: now.saturating_sub(self.began),
            free_bytes: self.engine.free_bytes(),
            requests: self.ended,
            waiting: self.waiting.len() as u16,
            busy: self.job != Job::Idle,
            damaged: self.link.damaged(),
            resent: self.link.resent(),
            lost_log: self.lost_log,
        }
    }

    /// Whether the cache may be saved or replaced.
    fn free(&self) -> Result<(), Failure> {
        if self.job == Job::Idle && self.waiting.is_empty() {
            return Ok(());
        }
        Err(Failure::new(Code::Busy, "a snapshot cannot be had while a request or another snapshot is under way"))
    }

    fn asked(&mut self, request: u16, start: &Start<'_>) {
        let known = match self.job {
            Job::Prompt { request: other, .. } | Job::Running { request: Some(other) } => other == request,
            _ => false,
        };
        let refused = if known || self.waiting.iter().any(|waiting| waiting.request == request) {
            Failure::new(Code::Protocol, "a request under way has the same number")
        } else {
            match Waiting::new(request, start) {
                Ok(waiting) => match self.waiting.push_back(waiting) {
                    Ok(()) => return,
                    Err(_) => Failure::new(Code::Busy, "as many requests wait as can; ask again when one has ended"),
                },
                Err(failure) => failure,
            }
        };
        self.fail(Some(request), &refused);
    }

    /// The turn of the next request has come.
    fn next_request(&mut self) -> bool {
        let Some(waiting) = self.waiting.pop_front() else { return false };
        let request = waiting.request;
        match self.engine.start(&waiting.start()) {
            Ok(()) => {
                self.send(&ToHost::Accepted { request });
                self.job = Job::Prompt { request, left: waiting.prompt_bytes };
                self.begin_if_whole();
            }
            Err(failure) => self.end(Some(request), Err(failure)),
        }
        true
    }

    fn begin_if_whole(&mut self) {
        if let Job::Prompt { request, left: 0 } = self.job {
            match self.engine.begin() {
                Ok(()) => self.job = Job::Running { request: Some(request) },
                Err(failure) => self.end(Some(request), Err(failure)),
            }
        }
    }

    /// Bytes of a prompt. Those of a request that has ended were under way then.
    fn prompted(&mut self, of: u16, bytes: &[u8]) {
        let Job::Prompt { request, left } = self.job else { return };
        if request != of {
            return;
        }
        let result = match left.checked_sub(bytes.len() as u32) {
            Some(left) => self.engine.prompt(bytes).map(|()| left),
            None => Err(Failure::new(Code::Protocol, "the prompt has more bytes than the request said")),
        };
        match result {
            Ok(left) => {
                self.job = Job::Prompt { request, left };
                self.begin_if_whole();
            }
            Err(failure) => {
                self.engine.cancel();
                self.end(Some(request), Err(failure));
            }
        }
    }

    /// Ends a request that is not running.
    fn cancelled(&mut self, request: u16) {
        let ending = Ending { end: End::Cancelled, prompt_tokens: 0, new_tokens: 0, prefill_us: 0, decode_us: 0 };
        if matches!(self.job, Job::Prompt { request: other, .. } if other == request) {
            self.engine.cancel();
            self.end(Some(request), Ok(ending));
            return;
        }
        let before = self.waiting.len();
        for _ in 0..before {
            if let Some(waiting) = self.waiting.pop_front()
                && waiting.request != request
            {
                // There is room where it was.
                let _ = self.waiting.push_back(waiting);
            }
        }
        if self.waiting.len() < before {
            self.ended = self.ended.wrapping_add(1);
            self.send(&ToHost::Ended { request, ending });
        }
    }

    fn step(&mut self, request: Option<u16>) -> bool {
        let Self { engine, link, .. } = self;
        let step = match engine.step() {
            Ok(Step::Pending) => return false,
            Ok(Step::Ended(ending)) => {
                self.end(request, Ok(ending));
                return true;
            }
            Ok(step) => step,
            Err(failure) => {
                self.end(request, Err(failure));
                return true;
            }
        };
        let Some(request) = request else { return true };
        let message = match step {
            Step::Read { done, of } => ToHost::Read { request, done, of },
            Step::Token { token, text } => ToHost::Token { request, token, text },
            Step::Text { text } => ToHost::Text { request, text },
            Step::Pending | Step::Ended(_) => return true,
        };
        let fits = match step {
            Step::Token { text, .. } | Step::Text { text } => text.len() <= MAX_TEXT,
            _ => true,
        };
        match message::body(&message) {
            Ok(body) if fits => {
                // Polled where there is room.
                let sent = link.send(body);
                debug_assert!(sent.is_ok(), "{sent:?}");
            }
            // A contract that is broken: the host must not take the answer for whole.
            _ => {
                engine.cancel();
                self.job = Job::Running { request: None };
                self.fail(Some(request), &Failure::new(Code::Engine, "a token has more text than a message carries"));
            }
        }
        true
    }

    fn made(&mut self) -> bool {
        match self.engine.saved() {
            Ok(None) => return false,
            Ok(Some(snapshot)) => {
                self.job = Job::Saving { offset: 0, bytes: snapshot.bytes };
                self.send(&ToHost::Snapshot(snapshot));
            }
            Err(failure) => {
                self.job = Job::Idle;
                self.fail(None, &failure);
            }
        }
        true
    }

    fn save(&mut self, offset: u32, bytes: u32) -> bool {
        if offset == bytes {
            self.job = Job::Idle;
            return true;
        }
        let mut chunk = [0; MAX_CHUNK];
        let most = ((bytes - offset) as usize).min(MAX_CHUNK);
        let len = self.engine.read_snapshot(offset, &mut chunk[..most]).min(most);
        if len == 0 {
            self.job = Job::Idle;
            self.fail(None, &Failure::new(Code::Engine, "the snapshot ends before its length"));
            return true;
        }
        self.send(&ToHost::Chunk { bytes: &chunk[..len] });
        self.job = Job::Saving { offset: offset + len as u32, bytes };
        true
    }

    /// Bytes of a snapshot. Those of one that was refused were under way then.
    fn chunk(&mut self, bytes: &[u8]) {
        let Job::Restoring { left } = self.job else { return };
        let result = match left.checked_sub(bytes.len() as u32) {
            Some(left) => self.engine.write_snapshot(bytes).map(|()| left),
            None => Err(Failure::new(Code::Protocol, "the snapshot has more bytes than was said")),
        };
        match result {
            Ok(left) => self.restoring(left),
            Err(failure) => {
                self.job = Job::Idle;
                self.fail(None, &failure);
            }
        }
    }

    /// So many bytes of a snapshot are still to come.
    fn restoring(&mut self, left: u32) {
        self.job = if left > 0 { Job::Restoring { left } } else { Job::Taking };
    }

    fn taken(&mut self) -> bool {
        match self.engine.restored() {
            Ok(None) => return false,
            Ok(Some(tokens)) => self.send(&ToHost::Restored { tokens }),
            Err(failure) => self.fail(None, &failure),
        }
        self.job = Job::Idle;
        true
    }

    fn send_log(&mut self) -> bool {
        // Answers come first.
        if self.log.is_empty() || self.link.room() <= OUTBOX / 2 {
            return false;
        }
        let mut chunk = heapless::Vec::<u8, MAX_CHUNK>::new();
        while !chunk.is_full()
            && let Some(byte) = self.log.pop_front()
        {
            let _ = chunk.push(byte);
        }
        self.send(&ToHost::Log { bytes: &chunk });
        true
    }
}
