//! One direction of a line on which things go wrong, by a seed.

use fastrand::Rng;
use serde::Deserialize;
use std::collections::VecDeque;

/// What goes wrong on a line. Shares are of bytes, from 0 to 1; times are in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// Bytes that never arrive.
    pub lost: f64,
    /// Bytes of which a bit arrives flipped.
    pub flipped: f64,
    /// Bytes that arrive twice.
    pub duplicated: f64,
    /// Bytes before which the line halts.
    pub delayed: f64,
    /// For how long at most.
    pub delay: u64,
    /// Bytes a millisecond that the reader takes; 0 for as many as come.
    pub rate: u64,
    /// Bytes after which the line is cut; what is on it is lost.
    pub cuts: Vec<u64>,
    /// How long it stays cut.
    pub down: u64,
}

/// One direction of a line.
#[derive(Clone, Debug)]
pub struct Wire {
    faults: Faults,
    random: Rng,
    /// Bytes on the line, and when each arrives at the earliest; never falling.
    line: VecDeque<(u64, u8)>,
    /// Bytes that were sent so far.
    sent: u64,
    /// When the line is up again.
    up: u64,
    /// When bytes were last read.
    looked: u64,
    /// Bytes that the reader could have taken since it began and has not, up to so many of a tenth of a second.
    credit: u64,
}

impl Wire {
    /// A line that is up, with nothing on it.
    #[must_use]
    pub fn new(faults: Faults, seed: u64) -> Self {
        let random = Rng::with_seed(seed);
        Self { faults, random, line: VecDeque::new(), sent: 0, up: 0, looked: 0, credit: 0 }
    }

    /// Ends all faults: what is sent from now on arrives.
    pub fn heal(&mut self) {
        self.faults = Faults::default();
        self.up = 0;
    }

    /// Whether the line is up at the time `now`.
    #[must_use]
    pub const fn is_up(&self, now: u64) -> bool {
        now >= self.up
    }

    /// Loses what is on the line.
    pub fn clear(&mut self) {
        self.line.clear();
    }

    /// Puts `bytes` on the line; those sent while it is cut are lost.
    pub fn send(&mut self, now: u64, bytes: &[u8]) {
        for &byte in bytes {
            self.sent += 1;
            if self.faults.cuts.contains(&self.sent) {
                self.up = now + self.faults.down;
                self.line.clear();
                continue;
            }
            if !self.is_up(now) || self.chance(self.faults.lost) {
                continue;
            }
            let mut arrives = self.line.back().map_or(now, |&(last, _)| last.max(now));
            if self.chance(self.faults.delayed) {
                arrives += self.random.u64(0..=self.faults.delay);
            }
            let byte = if self.chance(self.faults.flipped) { byte ^ 1 << self.random.u8(0..8) } else { byte };
            self.line.push_back((arrives, byte));
            if self.chance(self.faults.duplicated) {
                self.line.push_back((arrives, byte));
            }
        }
    }

    /// Takes what has arrived by `now`, no more than `most` bytes and than the reader's rate allows.
    pub fn receive(&mut self, now: u64, most: usize) -> Vec<u8> {
        let rate = self.faults.rate;
        self.credit = (self.credit + rate.saturating_mul(now - self.looked.min(now))).min(100 * rate);
        self.looked = now;
        let allowed = if rate == 0 { u64::MAX } else { self.credit };
        let most = most.min(usize::try_from(allowed).unwrap_or(usize::MAX));
        let arrived = self.line.iter().take(most).take_while(|(arrives, _)| *arrives <= now).count();
        self.credit = self.credit.saturating_sub(arrived as u64);
        self.line.drain(..arrived).map(|(_, byte)| byte).collect()
    }

    fn chance(&mut self, share: f64) -> bool {
        // No number is drawn for what never happens, so that one fault more leaves the others where they were.
        share > 0.0 && self.random.f64() < share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 100_000;

    fn through(faults: Faults, seed: u64) -> Vec<u8> {
        let mut wire = Wire::new(faults, seed);
        wire.send(0, &vec![0; BYTES]);
        wire.receive(u64::MAX, usize::MAX)
    }

    #[test]
    fn a_line_without_faults_changes_nothing() {
        let mut wire = Wire::new(Faults::default(), 1);
        let bytes: Vec<u8> = (0..=255).collect();
        wire.send(5, &bytes);
        assert!(wire.receive(4, 1000).is_empty());
        assert_eq!(wire.receive(5, 10), bytes[..10]);
        assert_eq!(wire.receive(5, 1000), bytes[10..]);
    }

    #[test]
    fn faults_come_as_often_as_was_said_and_the_same_for_a_seed() {
        let near = |count: usize, share: f64| (count as f64 / BYTES as f64 - share).abs() < 0.003;
        let lost = Faults { lost: 0.01, ..Faults::default() };
        let flipped = Faults { flipped: 0.02, ..Faults::default() };
        let duplicated = Faults { duplicated: 0.03, ..Faults::default() };
        assert!(near(BYTES - through(lost.clone(), 1).len(), 0.01));
        assert!(near(through(flipped.clone(), 1).iter().filter(|byte| byte.count_ones() == 1).count(), 0.02));
        assert!(near(through(duplicated, 1).len() - BYTES, 0.03));
        assert_eq!(through(flipped.clone(), 7), through(flipped.clone(), 7));
        assert_ne!(through(flipped.clone(), 7), through(flipped, 8));
    }

    #[test]
    fn delays_keep_the_order_and_cuts_lose_what_is_under_way() {
        let bytes: Vec<u8> = (0..200).collect();
        let mut wire = Wire::new(Faults { delayed: 0.2, delay: 9, ..Faults::default() }, 3);
        wire.send(0, &bytes);
        let mut arrived = Vec::new();
        let mut times = 0;
        for now in 0..2000 {
            let now = wire.receive(now, usize::MAX);
            times += usize::from(!now.is_empty());
            arrived.extend(now);
        }
        assert!(arrived == bytes && times > 10);

        let mut wire = Wire::new(Faults { cuts: vec![100], down: 50, ..Faults::default() }, 3);
        wire.send(0, &bytes[..120]);
        assert!(!wire.is_up(49) && wire.is_up(50));
        wire.send(49, &bytes[120..130]);
        wire.send(50, &bytes[130..]);
        assert_eq!(wire.receive(60, usize::MAX), bytes[130..]);
    }

    #[test]
    fn a_slow_reader_takes_so_many_a_millisecond() {
        let mut wire = Wire::new(Faults { rate: 3, ..Faults::default() }, 3);
        wire.send(0, &[1; 10]);
        let taken: Vec<usize> = (1..6).map(|now| wire.receive(now, 2).len() + wire.receive(now, 9).len()).collect();
        assert_eq!(taken, [3, 3, 3, 1, 0]);
        wire.heal();
        wire.send(9, &[1; 10]);
        assert_eq!(wire.receive(9, usize::MAX).len(), 10);
    }
}
