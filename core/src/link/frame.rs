//! Messages as checked frames, and back from any bytes; what they look like is said [above](super).

use crate::{Error, wire::CRC};
use heapless::Vec;

/// Bytes of a header.
const HEADER: usize = 4;

/// Bytes of a check.
const CHECK: usize = 4;

/// Bytes that COBS leaves in one piece.
const RAW: usize = 254;

/// Most bytes of a body.
pub const MAX_BODY: usize = RAW - HEADER - CHECK;

/// Most bytes of a frame, its end included.
pub const MAX_FRAME: usize = RAW + 2;

/// A body, in room for any.
pub type Body = Vec<u8, MAX_BODY>;

/// What stands before the body of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Header {
    /// The frame's number; without a body, that of the next with one.
    pub sequence: u16,
    /// Number of the next frame that its sender waits for.
    pub acknowledged: u16,
}

/// The check of a frame of `session` whose header and body are `bytes`.
fn check(session: u32, bytes: &[u8]) -> [u8; CHECK] {
    let mut digest = CRC.digest();
    // The session comes last: a check behind what it checks leaves a CRC where four zeros do, so that a frame followed by one
    // of session 0, their separator flipped, would pass as one.
    digest.update(bytes);
    digest.update(&session.to_le_bytes());
    digest.finalize().to_le_bytes()
}

/// Writes a frame to the front of `line`, its end included; returns it.
///
/// # Errors
/// [`Error::Capacity`] where `body` is longer than [`MAX_BODY`] or `line` too short.
pub fn encode<'a>(session: u32, header: Header, body: &[u8], line: &'a mut [u8]) -> Result<&'a mut [u8], Error> {
    if body.len() > MAX_BODY {
        return Err(Error::Capacity { what: "frame body", needed: body.len(), capacity: MAX_BODY });
    }
    let (needed, capacity) = (HEADER + body.len() + CHECK + 2, line.len());
    if needed > capacity {
        return Err(Error::Capacity { what: "frame bytes", needed, capacity });
    }
    let mut raw = [0; RAW];
    let end = HEADER + body.len();
    raw[..2].copy_from_slice(&header.sequence.to_le_bytes());
    raw[2..HEADER].copy_from_slice(&header.acknowledged.to_le_bytes());
    raw[HEADER..end].copy_from_slice(body);
    let sum = check(session, &raw[..end]);
    raw[end..end + CHECK].copy_from_slice(&sum);
    let len = cobs::encode(&raw[..end + CHECK], line);
    line[len] = 0;
    Ok(&mut line[..=len])
}

/// Header, body and check of a frame, whose check is still to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unchecked<'a> {
    bytes: &'a [u8],
    sum: [u8; CHECK],
}

impl<'a> Unchecked<'a> {
    /// Header and body, if the frame is whole and of `session`.
    #[must_use]
    pub fn of(self, session: u32) -> Option<(Header, &'a [u8])> {
        if check(session, self.bytes) != self.sum {
            return None;
        }
        let [s0, s1, a0, a1, body @ ..] = self.bytes else { return None };
        let header = Header { sequence: u16::from_le_bytes([*s0, *s1]), acknowledged: u16::from_le_bytes([*a0, *a1]) };
        Some((header, body))
    }
}

/// Finds frames in a stream of bytes.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    line: Vec<u8, MAX_FRAME>,
    /// Whether the frame under way cannot be one and is skipped.
    skips: bool,
    /// When its last byte came.
    last: u64,
    /// Frames that were too long, cut off or no COBS.
    malformed: u32,
}

impl Decoder {
    /// A decoder that has seen nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { line: Vec::new(), skips: false, last: 0, malformed: 0 }
    }

    /// Forgets the frame under way.
    pub fn forget(&mut self) {
        self.line.clear();
        self.skips = false;
    }

    /// Takes bytes off the front of `bytes` up to the end of a frame, and returns that; `None` where all are taken.
    ///
    /// A frame that has begun and whose next byte comes `patience` after the last, or later, is forgotten.
    pub fn next<'a>(&'a mut self, now: u64, patience: u32, bytes: &mut &[u8]) -> Option<Unchecked<'a>> {
        if !bytes.is_empty() {
            if self.has_begun() && now.saturating_sub(self.last) >= patience.into() {
                self.forget();
                self.malformed = self.malformed.wrapping_add(1);
            }
            self.last = now;
        }
        let len = loop {
            let (&byte, rest) = bytes.split_first()?;
            // What the last call returned is borrowed no more.
            if self.line.last() == Some(&0) {
                self.line.clear();
            }
            *bytes = rest;
            if byte != 0 {
                // One place stays for the end.
                self.skips |= self.line.len() == MAX_FRAME - 1 || self.line.push(byte).is_err();
                continue;
            }
            let skipped = core::mem::take(&mut self.skips);
            if self.line.is_empty() {
                continue;
            }
            let decoded = cobs::decode_in_place(&mut self.line).ok().filter(|len| *len >= HEADER + CHECK);
            match decoded {
                Some(len) if !skipped => break len,
                _ => {
                    self.malformed = self.malformed.wrapping_add(1);
                    self.line.clear();
                }
            }
        };
        // Marks the line as read.
        self.line.truncate(len);
        let _ = self.line.push(0);
        let (bytes, sum) = self.line[..len].split_at(len - CHECK);
        Some(Unchecked { bytes, sum: [sum[0], sum[1], sum[2], sum[3]] })
    }

    /// Whether a frame has begun and not ended.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.skips || self.line.last().is_some_and(|&byte| byte != 0)
    }

    /// Frames so far that were too long, cut off or no COBS.
    #[must_use]
    pub const fn malformed(&self) -> u32 {
        self.malformed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec as Heap;

    const HEADER: Header = Header { sequence: 0x0102, acknowledged: 3 };
    const SESSION: u32 = 0xdead_beef;

    fn frame(body: &[u8]) -> Heap<u8> {
        encode(SESSION, HEADER, body, &mut [0; MAX_FRAME]).unwrap().to_vec()
    }

    /// The bodies of all whole frames.
    fn bodies(decoder: &mut Decoder, mut bytes: &[u8]) -> Heap<Heap<u8>> {
        let mut bodies = Heap::new();
        while let Some(found) = decoder.next(0, 100, &mut bytes) {
            bodies.extend(found.of(SESSION).map(|(_, body)| body.to_vec()));
        }
        bodies
    }

    proptest! {
        #[test]
        fn frames_come_back_from_any_pieces(
            sent in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..=MAX_BODY), 0..5),
            piece in 1usize..300,
        ) {
            let line: Heap<u8> = sent.iter().flat_map(|body| frame(body)).collect();
            let mut decoder = Decoder::default();
            let read: Heap<_> = line.chunks(piece).flat_map(|piece| bodies(&mut decoder, piece)).collect();
            prop_assert_eq!(read, sent);
            prop_assert_eq!(decoder.malformed(), 0);
        }

        #[test]
        fn garbage_costs_at_most_the_frame_after_it(
            garbage in prop::collection::vec(any::<u8>(), 0..700),
            body in prop::collection::vec(any::<u8>(), 0..=MAX_BODY),
        ) {
            let mut decoder = Decoder::default();
            prop_assert!(bodies(&mut decoder, &garbage).is_empty());
            let ended = !decoder.has_begun();
            let found = bodies(&mut decoder, &[frame(&body), frame(&body)].concat());
            prop_assert_eq!(found.len(), 1 + usize::from(ended));
            prop_assert!(found.iter().all(|found| *found == body));
        }
    }

    #[test]
    fn no_flipped_bit_passes() {
        let whole = frame(b"0123456789 \0 0123");
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(bodies(&mut Decoder::default(), &damaged).is_empty(), "bit {bit}");
        }
    }

    /// A flipped separator joins two frames.
    #[test]
    fn joined_frames_do_not_pass() {
        for (first, second) in [(SESSION, 0), (0, SESSION), (SESSION, SESSION), (0, 0)] {
            for separator in 1..=255 {
                let mut memory = [0; MAX_FRAME];
                let mut line = encode(first, HEADER, &[], &mut memory).unwrap().to_vec();
                *line.last_mut().unwrap() = separator;
                line.extend_from_slice(encode(second, HEADER, b"hello", &mut memory).unwrap());
                // Zeros that the other side puts between frames are flipped as well.
                for between in [&[][..], &[1], &[2]] {
                    let joined = [&line[..10], between, &line[10..]].concat();
                    let mut decoder = Decoder::default();
                    let found = decoder.next(0, 100, &mut &joined[..]);
                    let passes = found.is_some_and(|found| found.of(0).is_some() || found.of(SESSION).is_some());
                    assert!(!passes, "{first} {second} {separator} {between:?}");
                }
            }
        }
    }

    #[test]
    fn a_frame_is_of_one_session() {
        let (whole, mut decoder) = (frame(b"x"), Decoder::default());
        let found = decoder.next(0, 100, &mut &whole[..]).unwrap();
        assert_eq!(found.of(SESSION), Some((HEADER, &b"x"[..])));
        assert_eq!((found.of(0), found.of(SESSION + 1)), (None, None));
    }

    #[test]
    fn half_a_frame_is_forgotten_in_time() {
        let whole = frame(b"half");
        for cut in 1..whole.len() {
            for (later, expected) in [(99, 1), (100, 0)] {
                let mut decoder = Decoder::default();
                assert!(decoder.next(0, 100, &mut &whole[..cut]).is_none());
                assert!(decoder.has_begun());
                let found = decoder.next(later, 100, &mut &whole[cut..]).and_then(|found| found.of(SESSION));
                assert_eq!(found.is_some(), expected == 1, "cut {cut}");
                assert_eq!(bodies(&mut decoder, &whole).len(), 1, "the next is whole");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut line = [0; MAX_FRAME];
        assert_eq!(encode(1, HEADER, &[7; MAX_BODY], &mut line).unwrap().len(), MAX_FRAME);
        let error = encode(1, HEADER, &[7; MAX_BODY + 1], &mut line).unwrap_err();
        assert_eq!(error, Error::Capacity { what: "frame body", needed: MAX_BODY + 1, capacity: MAX_BODY });
        let error = encode(1, HEADER, &[7; 9], &mut line[..18]).unwrap_err();
        assert_eq!(error, Error::Capacity { what: "frame bytes", needed: 19, capacity: 18 });
    }
}
