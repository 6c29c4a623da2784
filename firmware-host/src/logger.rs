//! defmt's global logger on a host: frames go to memory, from where the device's loop [takes](take) them for the link.
//!
//! Every thread encodes its own frame, so that none waits for another in the middle of a record, and joins it to the others'
//! when it is whole.

use std::{
    cell::RefCell,
    sync::{Mutex, PoisonError},
    time::Instant,
};
use thinkey_core::link::device::LOG;

/// Most bytes that wait; records that come when there is no room, or would not fit the [loop](LOG), are dropped whole.
pub const ROOM: usize = 64 * 1024;

static WHOLE: Mutex<Vec<u8>> = Mutex::new(Vec::new());

thread_local! {
    /// The frame under way.
    static FRAME: RefCell<(defmt::Encoder, Vec<u8>)> = const { RefCell::new((defmt::Encoder::new(), Vec::new())) };
}

/// The oldest frames that wait, as many as fit `most` bytes.
#[must_use]
pub fn take(most: usize) -> Vec<u8> {
    let mut whole = WHOLE.lock().unwrap_or_else(PoisonError::into_inner);
    // A zero byte ends each.
    let end = whole[..most.min(whole.len())].iter().rposition(|&byte| byte == 0).map_or(0, |last| last + 1);
    whole.drain(..end).collect()
}

#[defmt::global_logger]
struct Logger;

// SAFETY: what is written between `acquire` and `release` on one thread goes to memory of that thread, so that threads need
// not exclude each other; a thread that acquires twice begins its frame anew, and a borrow across the calls is never held.
#[allow(unsafe_code)]
unsafe impl defmt::Logger for Logger {
    fn acquire() {
        FRAME.with_borrow_mut(|(encoder, frame)| {
            frame.clear();
            encoder.start_frame(|bytes| frame.extend_from_slice(bytes));
        });
    }

    unsafe fn flush() {}

    unsafe fn release() {
        FRAME.with_borrow_mut(|(encoder, frame)| {
            encoder.end_frame(|bytes| frame.extend_from_slice(bytes));
            let mut whole = WHOLE.lock().unwrap_or_else(PoisonError::into_inner);
            if frame.len() <= LOG && whole.len() + frame.len() <= ROOM {
                whole.append(frame);
            }
        });
    }

    unsafe fn write(bytes: &[u8]) {
        FRAME.with_borrow_mut(|(encoder, frame)| encoder.write(bytes, |bytes| frame.extend_from_slice(bytes)));
    }
}

/// Microseconds since the first record.
fn now() -> u64 {
    static FIRST: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    FIRST.get_or_init(Instant::now).elapsed().as_micros() as u64
}

defmt::timestamp!("{=u64:us}", now());
