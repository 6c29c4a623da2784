//! Frames in order, once, whatever the line loses, damages, repeats or delays; how is said [above](super).
//!
//! A [`Link`] is one side. Bytes from the line go to [`receive`](Link::receive), one message comes out at a time, and whoever
//! takes it says [`accept`](Link::accept), or leaves it for later. Bytes for the line come from
//! [`transmit`](Link::transmit). Where the line is cut, what it swallowed is sent again.

use super::frame::{self, Body, Decoder, Header, MAX_FRAME};
use crate::Error;
use heapless::Deque;

/// Frames under way at most in one direction.
pub const WINDOW: usize = 8;

/// Messages that wait for their acknowledgement or to be sent.
pub const OUTBOX: usize = 16;

/// What happens when nothing does, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Timing {
    /// Frames are sent again where no acknowledgement came so long after the last; twice as long each time after that. Longer
    /// than [`WINDOW`] frames take on the line and their acknowledgement back.
    pub retransmit: u32,
    /// No longer than this, however often it was in vain.
    pub retransmit_most: u32,
    /// A frame whose next byte does not come in this time is forgotten.
    pub half_frame: u32,
    /// A host that waits for something and hears nothing for so long asks whether the device is still there.
    pub silence: u32,
}

impl Default for Timing {
    /// For a line of 115,200 baud, on which eight of the longest frames take 178 ms, or a faster one.
    fn default() -> Self {
        Self { retransmit: 400, retransmit_most: 3200, half_frame: 250, silence: 1000 }
    }
}

/// What came off the line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A body of session 0.
    Greeting(Body),
    /// The next body of the session. It comes again unless it is [accepted](Link::accept).
    Message(Body),
}

/// One side of a line.
#[derive(Debug)]
pub struct Link {
    timing: Timing,
    /// 0 where there is none yet.
    session: u32,
    decoder: Decoder,
    /// Not acknowledged, oldest first.
    outbox: Deque<Body, OUTBOX>,
    /// Number of the oldest.
    base: u16,
    /// How many of them were sent in this round.
    sent: usize,
    /// How many were ever sent.
    ever: usize,
    /// Number of the next frame to take.
    expected: u16,
    /// Whether the other side is to be told.
    owes: bool,
    /// Whether something was left that there was no room for.
    left: bool,
    /// When the round is given up.
    deadline: Option<u64>,
    retransmit: u32,
    /// Whether a repeated acknowledgement has begun the round since the last that was news.
    hurried: bool,
    greeting: Option<Body>,
    /// The frame that is going out, and how much of it has.
    line: heapless::Vec<u8, { MAX_FRAME + 1 }>,
    gone: usize,
    /// When the last good frame came.
    heard: u64,
    damaged: u32,
    resent: u32,
}

impl Link {
    /// A side without a session.
    #[must_use]
    pub const fn new(timing: Timing) -> Self {
        Self {
            timing,
            session: 0,
            decoder: Decoder::new(),
            outbox: Deque::new(),
            base: 0,
            sent: 0,
            ever: 0,
            expected: 0,
            owes: false,
            left: false,
            deadline: None,
            retransmit: timing.retransmit,
            hurried: false,
            greeting: None,
            line: heapless::Vec::new(),
            gone: 0,
            heard: 0,
            damaged: 0,
            resent: 0,
        }
    }

    /// Begins `session` with nothing under way; 0 for none.
    pub fn begin(&mut self, session: u32) {
        self.session = session;
        self.outbox.clear();
        (self.base, self.sent, self.ever, self.expected) = (0, 0, 0, 0);
        (self.owes, self.left, self.hurried) = (false, false, false);
        (self.deadline, self.retransmit) = (None, self.timing.retransmit);
    }

    /// The session; 0 where there is none.
    #[must_use]
    pub const fn session(&self) -> u32 {
        self.session
    }

    /// The timing.
    #[must_use]
    pub const fn timing(&self) -> &Timing {
        &self.timing
    }

    /// Messages that there is room for.
    #[must_use]
    pub fn room(&self) -> usize {
        if self.session == 0 { 0 } else { OUTBOX - self.outbox.len() }
    }

    /// Whether every message sent is acknowledged.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.outbox.is_empty()
    }

    /// When the last good frame came.
    #[must_use]
    pub const fn heard(&self) -> u64 {
        self.heard
    }

    /// Frames that came damaged, or of another session.
    #[must_use]
    pub const fn damaged(&self) -> u32 {
        self.damaged.wrapping_add(self.decoder.malformed())
    }

    /// Frames that were sent again.
    #[must_use]
    pub const fn resent(&self) -> u32 {
        self.resent
    }

    /// Sends `body`, a message that is not empty.
    ///
    /// # Errors
    /// [`Error::Capacity`] where there is no [room](Self::room).
    pub fn send(&mut self, body: Body) -> Result<(), Error> {
        let full = Error::Capacity { what: "messages under way", needed: self.outbox.len() + 1, capacity: OUTBOX };
        if self.room() == 0 {
            return Err(full);
        }
        self.outbox.push_back(body).map_err(|_| full)
    }

    /// Sends `body` once in session 0, before all else.
    pub fn greet(&mut self, body: Body) {
        self.greeting = Some(body);
    }

    /// Takes bytes off the front of `bytes` until something comes; `None` where all are taken.
    pub fn receive(&mut self, now: u64, bytes: &mut &[u8]) -> Option<Incoming> {
        loop {
            let found = self.decoder.next(now, self.timing.half_frame, bytes)?;
            if self.session != 0
                && let Some((header, body)) = found.of(self.session)
            {
                self.heard = now;
                let next = header.sequence == self.expected;
                let message = (next && !body.is_empty()).then(|| Body::from_slice(body).unwrap_or_default());
                let repeats = body.is_empty();
                // One that is not waited for is a repetition, or comes after one that was lost: the other side is to know. After
                // one that was left it is to wait.
                let old = self.expected.wrapping_sub(header.sequence) < 1 << 15;
                self.owes |= !repeats && !next && (old || !self.left);
                self.acknowledged(now, header.acknowledged, repeats);
                if let Some(message) = message {
                    self.left = true;
                    return Some(Incoming::Message(message));
                }
            } else if let Some((_, body)) = found.of(0) {
                self.heard = now;
                return Some(Incoming::Greeting(Body::from_slice(body).unwrap_or_default()));
            } else {
                self.damaged = self.damaged.wrapping_add(1);
            }
        }
    }

    /// The message that came last is taken, and is not to come again.
    pub fn accept(&mut self) {
        if core::mem::take(&mut self.left) {
            self.expected = self.expected.wrapping_add(1);
            self.owes = true;
        }
    }

    /// There is room again for what was left: the other side need not wait until it tries again.
    pub fn invite(&mut self) {
        self.owes |= core::mem::take(&mut self.left);
    }

    /// The line is another one, or works again: what is under way is sent again at once.
    pub fn reconnect(&mut self) {
        self.line.clear();
        self.gone = 0;
        self.decoder.forget();
        self.sent = 0;
        self.owes = self.session != 0;
        (self.deadline, self.retransmit) = (None, self.timing.retransmit);
    }

    fn acknowledged(&mut self, now: u64, next: u16, repeats: bool) {
        let count = usize::from(next.wrapping_sub(self.base));
        if count > self.ever {
            // Of an acknowledgement that was overtaken by a later one.
            return;
        }
        if count == 0 {
            if repeats && self.ever > 0 && !self.hurried {
                (self.sent, self.hurried) = (0, true);
            }
            return;
        }
        for _ in 0..count {
            self.outbox.pop_front();
        }
        self.base = next;
        self.sent = self.sent.saturating_sub(count);
        self.ever -= count;
        (self.hurried, self.retransmit) = (false, self.timing.retransmit);
        self.deadline = (self.ever > 0).then(|| now + u64::from(self.retransmit));
    }

    /// Writes what the line is to carry to the front of `out`; returns how many bytes, 0 where there is nothing to say now.
    pub fn transmit(&mut self, now: u64, out: &mut [u8]) -> usize {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            (self.sent, self.hurried, self.deadline) = (0, false, None);
            self.retransmit = self.retransmit.saturating_mul(2).min(self.timing.retransmit_most);
        }
        let mut written = 0;
        while written < out.len() {
            if self.gone == self.line.len() && !self.next_frame(now) {
                break;
            }
            let count = (out.len() - written).min(self.line.len() - self.gone);
            out[written..written + count].copy_from_slice(&self.line[self.gone..self.gone + count]);
            written += count;
            self.gone += count;
        }
        written
    }

    /// When [`transmit`](Self::transmit) has something to say although nothing happened.
    #[must_use]
    pub const fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Puts the next frame into the line.
    fn next_frame(&mut self, now: u64) -> bool {
        let Self { base, expected, session, sent, .. } = *self;
        let header = Header { sequence: base.wrapping_add(sent as u16), acknowledged: expected };
        let mut bytes = [0; MAX_FRAME];
        let frame = if let Some(body) = self.greeting.take() {
            frame::encode(0, Header::default(), &body, &mut bytes)
        } else if let Some(body) = self.outbox.iter().nth(sent).filter(|_| sent < WINDOW) {
            self.sent += 1;
            if self.sent <= self.ever {
                self.resent = self.resent.wrapping_add(1);
            }
            self.ever = self.ever.max(self.sent);
            self.deadline = Some(now + u64::from(self.retransmit));
            self.owes = false;
            frame::encode(session, header, body, &mut bytes)
        } else if self.owes && session != 0 {
            self.owes = false;
            let header = Header { sequence: base.wrapping_add(self.ever as u16), ..header };
            frame::encode(session, header, &[], &mut bytes)
        } else {
            return false;
        };
        self.line.clear();
        self.gone = 0;
        // Bodies fit, because room for them is what they come in.
        let Ok(frame) = frame else { return false };
        // A greeting may come after whatever another host left on the line.
        if header.sequence == 0 {
            let _ = self.line.push(0);
        }
        self.line.extend_from_slice(frame).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn pair() -> [Link; 2] {
        [0, 1].map(|_| {
            let mut link = Link::new(Timing::default());
            link.begin(9);
            link
        })
    }

    fn body(byte: u8) -> Body {
        Body::from_slice(&[byte]).unwrap()
    }

    fn bytes(link: &mut Link, now: u64) -> Vec<u8> {
        let mut out = [0; 8192];
        let len = link.transmit(now, &mut out);
        out[..len].to_vec()
    }

    /// What `to` takes of `line`, at most `most` messages.
    fn take(to: &mut Link, now: u64, mut line: &[u8], most: usize) -> Vec<u8> {
        let mut taken = Vec::new();
        while let Some(incoming) = to.receive(now, &mut line) {
            let Incoming::Message(body) = incoming else { panic!("a greeting") };
            if taken.len() < most {
                to.accept();
                taken.push(body[0]);
            }
        }
        taken
    }

    #[test]
    fn what_is_lost_is_sent_again_and_no_sooner() {
        let [mut one, mut other] = pair();
        (0..3).for_each(|byte| one.send(body(byte)).unwrap());
        assert!(!bytes(&mut one, 0).is_empty(), "and lost");
        assert_eq!(one.deadline(), Some(400));
        assert!(bytes(&mut one, 399).is_empty());
        let again = bytes(&mut one, 400);
        assert_eq!(take(&mut other, 400, &again, 9), [0, 1, 2]);
        assert_eq!(one.deadline(), Some(1200), "twice as long");
        let lost = bytes(&mut other, 400);
        let again = bytes(&mut one, 1200);
        assert!(take(&mut other, 1200, &again, 9).is_empty(), "once");
        assert_eq!(lost, bytes(&mut other, 1200), "acknowledged again");
        take(&mut one, 1200, &lost, 0);
        assert!(one.is_settled() && one.deadline().is_none());
        assert_eq!((one.resent(), other.damaged()), (6, 0));
    }

    #[test]
    fn a_window_is_under_way_and_the_rest_waits() {
        let [mut one, mut other] = pair();
        (0..OUTBOX as u8).for_each(|byte| one.send(body(byte)).unwrap());
        assert_eq!(one.room(), 0);
        let full = Error::Capacity { what: "messages under way", needed: OUTBOX + 1, capacity: OUTBOX };
        assert_eq!(one.send(body(0)), Err(full));
        let line = bytes(&mut one, 0);
        assert_eq!(take(&mut other, 0, &line, 99), (0..WINDOW as u8).collect::<Vec<_>>());
        let line = bytes(&mut other, 0);
        take(&mut one, 0, &line, 0);
        assert_eq!(one.room(), WINDOW);
        let line = bytes(&mut one, 0);
        assert_eq!(take(&mut other, 0, &line, 99), (WINDOW as u8..OUTBOX as u8).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_left_comes_again_when_it_is_invited() {
        let [mut one, mut other] = pair();
        (0..4).for_each(|byte| one.send(body(byte)).unwrap());
        let line = bytes(&mut one, 0);
        assert_eq!(take(&mut other, 0, &line, 2), [0, 1]);
        let line = bytes(&mut other, 0);
        take(&mut one, 0, &line, 0);
        other.invite();
        let line = bytes(&mut other, 1);
        take(&mut one, 1, &line, 0);
        let line = bytes(&mut one, 1);
        assert_eq!(take(&mut other, 1, &line, 9), [2, 3]);
    }

    #[test]
    fn numbers_go_round() {
        let [mut one, mut other] = pair();
        for number in 0..70_000_u32 {
            one.send(body(number as u8)).unwrap();
            let line = bytes(&mut one, 0);
            assert_eq!(take(&mut other, 0, &line, 1), [number as u8]);
            let line = bytes(&mut other, 0);
            take(&mut one, 0, &line, 0);
        }
        assert_eq!(one.resent(), 0);
    }

    #[test]
    fn old_acknowledgements_are_none() {
        let [mut one, mut other] = pair();
        let mut olds = Vec::new();
        for number in 0..20 {
            one.send(body(number)).unwrap();
            let line = bytes(&mut one, 0);
            take(&mut other, 0, &line, 1);
            let line = bytes(&mut other, 0);
            take(&mut one, 0, &line, 0);
            olds.push(line);
        }
        one.send(body(99)).unwrap();
        bytes(&mut one, 0);
        olds.iter().for_each(|old| drop(take(&mut one, 0, old, 0)));
        assert!(!one.is_settled());
    }
}
