//! defmt's logger on Linux: every frame is one `write` to file descriptor 2.

use crate::write;
use core::{
    cell::UnsafeCell,
    sync::atomic::{AtomicU32, Ordering},
};
use defmt::{Encoder, Logger, global_logger};

/// Where frames go, beside the results on file descriptor 1.
const DESCRIPTOR: usize = 2;

// A counter and no clock, so that two runs log the same bytes.
static STEP: AtomicU32 = AtomicU32::new(0);
defmt::timestamp!("{=u32}", STEP.fetch_add(1, Ordering::Relaxed));

/// The frame being encoded.
struct Frame {
    encoder: Encoder,
    bytes: [u8; 128],
    len: usize,
}

impl Frame {
    /// Runs a step of the encoder and keeps what it emits, until there is no room left.
    fn encode(&mut self, step: impl FnOnce(&mut Encoder, &mut dyn FnMut(&[u8]))) {
        let Self { encoder, bytes, len } = self;
        step(encoder, &mut |part| {
            for &byte in part {
                if *len == bytes.len() {
                    write(DESCRIPTOR, bytes);
                    *len = 0;
                }
                bytes[*len] = byte;
                *len += 1;
            }
        });
    }

    fn flush(&mut self) {
        write(DESCRIPTOR, &self.bytes[..self.len]);
        self.len = 0;
    }
}

struct Global(UnsafeCell<Frame>);

// SAFETY: the binary has one thread and no signal handlers.
unsafe impl Sync for Global {}

static FRAME: Global = Global(UnsafeCell::new(Frame { encoder: Encoder::new(), bytes: [0; 128], len: 0 }));

/// The frame, for one call of the logger.
///
/// # Safety
/// No other borrow of it may be alive.
unsafe fn frame<'a>() -> &'a mut Frame {
    // SAFETY: the caller vouches for it, and there is one thread.
    unsafe { &mut *FRAME.0.get() }
}

#[global_logger]
struct Descriptor;

// SAFETY: with one thread, a frame is never begun inside another: no value logged here logs while it is formatted.
// No method calls another, so each is the only borrower of the frame.
unsafe impl Logger for Descriptor {
    fn acquire() {
        // SAFETY: see above.
        unsafe { frame() }.encode(|encoder, emit| encoder.start_frame(emit));
    }

    unsafe fn flush() {
        // SAFETY: see above.
        unsafe { frame() }.flush();
    }

    unsafe fn release() {
        // SAFETY: see above.
        let frame = unsafe { frame() };
        frame.encode(|encoder, emit| encoder.end_frame(emit));
        frame.flush();
    }

    unsafe fn write(bytes: &[u8]) {
        // SAFETY: see above.
        unsafe { frame() }.encode(|encoder, emit| encoder.write(bytes, emit));
    }
}
