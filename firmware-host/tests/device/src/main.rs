//! A device without a model: its only answer is the checksum of what a thin head computes, and what core does meanwhile is
//! logged by defmt over the same link. The loop, the line and the logger are the sources of `thinkey-firmware-host`.

#[allow(dead_code, reason = "a log is all that is wanted of it")]
#[path = "../../../src/logger.rs"]
mod logger;
#[allow(dead_code, reason = "pseudo-terminals are all that is wanted of it")]
#[path = "../../../src/port.rs"]
mod port;
#[path = "../../../../core/cortex-m4/src/scenario.rs"]
mod scenario;
#[path = "../../../src/serve.rs"]
mod serve;

use serve::{Clock, serve};
use thinkey_core::link::{
    Device, Engine,
    engine::Step,
    message::{Capabilities, Code, End, Ending, Failure, Snapshot, Start, Stats},
    reliable::Timing,
};

/// The answer, once it is there.
#[derive(Default)]
struct Head {
    text: String,
    told: bool,
}

impl Engine for Head {
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { model: "thin head", ..Capabilities::default() }
    }

    fn start(&mut self, _: &Start<'_>) -> Result<(), Failure> {
        self.told = false;
        Ok(())
    }

    fn prompt(&mut self, _: &[u8]) -> Result<(), Failure> {
        Ok(())
    }

    fn begin(&mut self) -> Result<(), Failure> {
        let mut memory = Box::new(scenario::Memory::ZEROED);
        let sum = scenario::run(&mut memory).map_err(|error| Failure::new(Code::Engine, &error.to_string()))?;
        self.text = format!("{sum:016x}");
        Ok(())
    }

    fn step(&mut self) -> Result<Step<'_>, Failure> {
        if std::mem::replace(&mut self.told, true) {
            let end = End::Stop;
            return Ok(Step::Ended(Ending { end, prompt_tokens: 0, new_tokens: 1, prefill_us: 0, decode_us: 0 }));
        }
        Ok(Step::Token { token: 0, text: self.text.as_bytes() })
    }

    fn cancel(&mut self) {
        self.told = true;
    }

    fn stats(&self) -> Stats {
        Stats::default()
    }

    fn save(&mut self) -> Result<(), Failure> {
        Err(unsupported())
    }

    fn saved(&mut self) -> Result<Option<Snapshot>, Failure> {
        Err(unsupported())
    }

    fn read_snapshot(&mut self, _: u32, _: &mut [u8]) -> usize {
        0
    }

    fn restore(&mut self, _: Snapshot) -> Result<(), Failure> {
        Err(unsupported())
    }

    fn write_snapshot(&mut self, _: &[u8]) -> Result<(), Failure> {
        Err(unsupported())
    }

    fn restored(&mut self) -> Result<Option<u32>, Failure> {
        Err(unsupported())
    }
}

fn unsupported() -> Failure {
    Failure::new(Code::Unsupported, "a head without a model has no cache to save")
}

fn main() {
    let (pty, mut port) = port::Pty::open().expect("a pseudo-terminal");
    println!("serving {}", pty.path.display());
    defmt::info!("{}", scenario::LAYOUT);
    let clock = Clock::default();
    let mut device = Device::new(Head::default(), 1, Timing::default(), clock.now());
    serve(&mut device, &mut port, clock, &mut logger::take);
}
