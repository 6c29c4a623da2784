//! The device's loop over a port.

use crate::port::{Input, Port};
use std::time::{Duration, Instant};
use thinkey_core::link::{Device, Engine};

/// The time of a link: milliseconds since a moment.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Default for Clock {
    /// One that begins now.
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    /// Milliseconds since it began.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.elapsed().as_millis() as u64
    }
}

/// The longest that a loop waits, so that deadlines are kept.
pub const TICK: Duration = Duration::from_millis(20);

/// Serves `port` until it is closed. `log` gives, for the host, what was logged since it was last called and fits so many
/// bytes; the rest it keeps.
pub fn serve<E: Engine>(device: &mut Device<E>, port: &mut Port, clock: Clock, log: &mut dyn FnMut(usize) -> Vec<u8>) {
    device.reconnect();
    loop {
        let logged = log(device.log_room());
        device.log(&logged);
        let worked = device.poll(clock.now());
        port.write(|out| device.transmit(clock.now(), out));
        let mut input = if worked { port.try_next() } else { port.next(TICK) };
        while let Some(next) = input {
            match next {
                Input::Bytes(bytes) => device.receive(clock.now(), &bytes),
                Input::Work => {}
                Input::Closed => return,
            }
            input = port.try_next();
        }
    }
}
