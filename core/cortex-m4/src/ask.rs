//! A microcontroller that asks: a Cortex-M4 with a device on the other end of its serial line, such as a Jetson that runs
//! `thinkey-firmware-host run --serial /dev/ttyTHS1`. It asks one question and shows the answer as it comes.
//!
//! Everything but the serial line's three registers is [`Client`]. Text goes to the debugger's standard error (semihosting), a
//! log by defmt to its standard output. In QEMU, whose MPS2 has the same line:
//!
//! ```text
//! thinkey-firmware-host run --listen 127.0.0.1:4000
//! qemu-system-arm -M mps2-an386 -display none -monitor none -serial tcp:127.0.0.1:4000 \
//!     -semihosting-config enable=on,target=native -kernel thinkey-ask
//! ```
#![no_std]
#![no_main]

mod exit;

use core::fmt::Write;
use cortex_m::peripheral::{Peripherals, syst::SystClkSource};
use cortex_m_semihosting::hio;
use defmt_semihosting as _;
use exit::exit;
use thinkey_core::link::{
    Client,
    client::Event,
    message::{Start, ToHost},
    reliable::Timing,
};

const QUESTION: &[u8] = b"Why is the sky blue? Answer in two sentences.";

/// Most tokens of the answer.
const TOKENS: u32 = 12;

/// Milliseconds after which nobody is believed to be there.
const PATIENCE: u64 = 60_000;

/// Arm's CMSDK serial line, of one byte each way: the board's own driver stands here.
struct Line;

impl Line {
    const DATA: *mut u32 = 0x4000_4000 as *mut u32;
    const STATE: *mut u32 = 0x4000_4004 as *mut u32;
    const CONTROL: *mut u32 = 0x4000_4008 as *mut u32;
    const DIVIDER: *mut u32 = 0x4000_4010 as *mut u32;

    /// 115,200 baud of the board's 25 MHz.
    fn open() -> Self {
        // SAFETY: registers of the first serial line of the MPS2 with AN386, which nothing else uses.
        unsafe {
            Self::DIVIDER.write_volatile(25_000_000 / 115_200);
            Self::CONTROL.write_volatile(0b11);
        }
        Self
    }

    fn read(&mut self) -> Option<u8> {
        // SAFETY: as above.
        unsafe { (Self::STATE.read_volatile() & 0b10 != 0).then(|| Self::DATA.read_volatile() as u8) }
    }

    /// Whether there was room.
    fn write(&mut self, byte: u8) -> bool {
        // SAFETY: as above.
        unsafe {
            let room = Self::STATE.read_volatile() & 0b01 == 0;
            if room {
                Self::DATA.write_volatile(byte.into());
            }
            room
        }
    }
}

/// What the device has said.
#[derive(Default)]
struct Heard {
    connected: bool,
    accepted: bool,
    /// How it ended: well, or not.
    over: Option<bool>,
}

#[cortex_m_rt::entry]
fn main() -> ! {
    let Ok(mut console) = hio::hstderr() else { exit(false) };
    let Some(mut peripherals) = Peripherals::take() else { exit(false) };
    let clock = &mut peripherals.SYST;
    clock.set_clock_source(SystClkSource::Core);
    clock.set_reload(25_000 - 1);
    clock.clear_current();
    clock.enable_counter();

    let mut line = Line::open();
    // A number that no other host has: one of the board's, or drawn.
    let mut client = Client::new(0x4d34_0001, Timing::default());
    let (mut now, mut heard) = (0, Heard::default());
    let (mut out, mut len, mut gone) = ([0; 64], 0, 0);
    let (mut request, mut sent) = (None, 0);
    while now < PATIENCE {
        now += u64::from(clock.has_wrapped());
        if let Some(byte) = line.read() {
            client.receive(now, &[byte], &mut |event| {
                hear(&mut heard, &mut console, event);
                true
            });
        }
        if gone == len {
            (len, gone) = (client.transmit(now, &mut out), 0);
        }
        if gone < len && line.write(out[gone]) {
            gone += 1;
        }
        match request {
            None if heard.connected => {
                let start = Start { prompt_bytes: QUESTION.len() as u32, max_tokens: TOKENS, ..Start::default() };
                // Where there is no room now, there will be.
                request = client.start(&start).ok();
            }
            Some(number) if heard.accepted && sent < QUESTION.len() => sent += client.prompt(number, &QUESTION[sent..]),
            _ => {}
        }
        if let Some(well) = heard.over {
            let _ = writeln!(console);
            exit(well);
        }
    }
    let _ = writeln!(console, "nobody answers");
    exit(false)
}

fn hear(heard: &mut Heard, console: &mut hio::HostStream, event: Event<'_>) {
    match event {
        Event::Connected(capabilities) => {
            defmt::info!("{=str}, {=u32} tokens", capabilities.model, capabilities.context);
            heard.connected = true;
        }
        Event::Message(ToHost::Accepted { .. }) => heard.accepted = true,
        Event::Message(ToHost::Token { text, .. } | ToHost::Text { text, .. }) => {
            let _ = console.write_all(text);
        }
        Event::Message(ToHost::Ended { ending, .. }) => {
            defmt::info!("{}", ending);
            heard.over = Some(true);
        }
        // The device was switched off, speaks another version, or cannot.
        Event::Restarted | Event::Version { .. } | Event::Message(ToHost::Failed { .. }) => heard.over = Some(false),
        Event::Message(_) => {}
    }
}
