//! A thin head on a Cortex-M4, with nothing but `thinkey-core`: scores, top-T, corrections, blocks of four bits, attention.
//!
//! What the core does is logged by defmt, on the debugger's standard output; `thinkey-firmware-host log` reads it. The
//! checksum and the bytes of stack go to its standard error. Runs in QEMU as on a board (semihosting).
#![no_std]
#![no_main]

mod exit;
mod scenario;

use core::{cell::UnsafeCell, fmt::Write};
use cortex_m_semihosting::hio;
use defmt_semihosting as _;
use exit::exit;

struct Arrays(UnsafeCell<scenario::Memory>);

// SAFETY: there is one core, and no interrupt is handled.
unsafe impl Sync for Arrays {}

/// In `.bss`: zeros take no flash.
static ARRAYS: Arrays = Arrays(UnsafeCell::new(scenario::Memory::ZEROED));

#[cortex_m_rt::entry]
fn main() -> ! {
    defmt::info!("{}", scenario::LAYOUT);
    // SAFETY: the entry point runs once, and nobody else borrows the arrays.
    let result = scenario::run(unsafe { &mut *ARRAYS.0.get() });
    let Ok(mut console) = hio::hstderr() else { exit(false) };
    let stack = deepest_stack();
    match result {
        // What lies below the stack is no longer what it was, and neither is the result.
        Ok(_) if stack.is_none() => {
            let _ = writeln!(console, "the stack overflowed");
            exit(false)
        }
        Ok(sum) => {
            defmt::info!("checksum {=u64:016x}", sum);
            let _ = writeln!(console, "checksum {sum:016x}\nstack {}", stack.unwrap_or_default());
            exit(true)
        }
        Err(error) => {
            defmt::error!("{}", error);
            let _ = writeln!(console, "the scenario failed: {error}");
            exit(false)
        }
    }
}

/// Bytes of stack in use at its deepest so far: from its start down to the last word that is not as the start-up code
/// painted it. `None` where no word is.
fn deepest_stack() -> Option<usize> {
    unsafe extern "C" {
        static _stack_start: u32;
        static _stack_end: u32;
    }
    let (start, end) = ((&raw const _stack_start) as usize, (&raw const _stack_end) as usize);
    // SAFETY: both symbols bound the RAM that cortex-m-rt gives to the stack, which is painted and word-aligned.
    let painted = |at: &usize| unsafe { (*at as *const u32).read_volatile() } == cortex_m_rt::STACK_PAINT_VALUE;
    let deepest = (end..start).step_by(size_of::<u32>()).find(|at| !painted(at)).unwrap_or(start);
    (deepest > end).then_some(start - deepest)
}
