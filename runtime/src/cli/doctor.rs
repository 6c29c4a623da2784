//! `thinkey doctor`: what the machine has, what would run on it, and what stands in the way.

mod cuda;

use super::{CliError, options::threads};
use cuda::Cuda;
use indicatif::HumanBytes;
use serde_json::{Value, json};
use std::io::{self, Write};
use thinkey::{
    engine::{Device, DeviceError, level},
    machine::{Clock, Machine, Memory, PowerMode},
};
use thinkey_kernels::cpu::simd::Level;

/// Arguments of `thinkey doctor`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let report = Report::new();
    let mut out = io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut out, &report.json())?;
        writeln!(out)?;
    } else {
        report.print(&mut out)?;
    }
    Ok(())
}

/// Everything that was looked for.
struct Report {
    machine: Machine,
    cuda: Cuda,
    /// Whether each device can be used.
    devices: Vec<(Device, Result<(), DeviceError>)>,
}

impl Report {
    fn new() -> Self {
        let devices = Device::ALL.into_iter().map(|device| (device, device.check())).collect();
        Self { machine: Machine::read(), cuda: Cuda::look(), devices }
    }

    /// What would make models run better, or at all.
    fn advice(&self) -> Vec<String> {
        let mut advice = self.cuda.advice(&self.machine);
        advice.extend(advice_of(&self.machine));
        advice
    }

    fn json(&self) -> Value {
        let devices = self.devices.iter().map(|(device, check)| {
            json!({
                "device": device.to_string(), "usable": check.is_ok(), "default": *device == Device::default(),
                "computes": device.computes(),
                "reason": check.as_ref().err().map(DeviceError::reason),
                "remedy": check.as_ref().err().map(DeviceError::remedy),
            })
        });
        json!({
            "version": env!("CARGO_PKG_VERSION"), "system": std::env::consts::OS, "architecture": std::env::consts::ARCH,
            "threads": threads(None), "machine": self.machine,
            "instruction_sets": Level::available().map(Level::name).collect::<Vec<_>>(),
            "instruction_set": level().ok().map(Level::name),
            "cuda": self.cuda.json(), "devices": devices.collect::<Vec<_>>(), "advice": self.advice(),
        })
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let Machine { board, processor, jetson_linux, memory, power_mode, gpu_clock, .. } = &self.machine;
        let mut row = |name: &str, text: String| writeln!(out, "{name:15}{text}");
        row(
            "thinkey",
            format!("{}, {} on {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH),
        )?;
        if let Some(board) = board {
            let system = jetson_linux.as_ref().map(|release| format!(", Jetson Linux {release}"));
            row("board", format!("{board}{}", system.unwrap_or_default()))?;
        }
        let name = processor.as_deref().unwrap_or("that does not tell its name");
        row("processor", format!("{} threads of one {name}", threads(None)))?;
        let sets: Vec<_> = Level::available().map(Level::name).collect();
        let chosen = level().map_or_else(|error| error.to_string(), |level| format!("{} is used", level.name()));
        row("", format!("instruction sets {}: {chosen}", sets.join(", ")))?;
        if let Some(Memory { total, available, swap, swap_used, zram }) = *memory {
            let bytes = |bytes: usize| HumanBytes(bytes as u64);
            row("memory", format!("{}, {} can be had", bytes(total), bytes(available)))?;
            if swap > 0 {
                let kind = if zram { ", in compressed memory (zram)" } else { "" };
                row("swap", format!("{}, {} in use{kind}", bytes(swap), bytes(swap_used)))?;
            }
        }
        if let Some(PowerMode { number, name }) = power_mode {
            let words = [name.clone(), number.map(|number| format!("({number})"))];
            row("power mode", words.into_iter().flatten().collect::<Vec<_>>().join(" "))?;
        }
        if let Some(Clock { now, most, governor }) = gpu_clock {
            let by = governor.as_ref().map(|governor| format!(", by {governor}")).unwrap_or_default();
            row("GPU clock", format!("{} of at most {} MHz{by}", now / 1_000_000, most / 1_000_000))?;
        }
        for (name, text) in self.cuda.rows(&self.machine) {
            row(name, text)?;
        }
        row("", String::new())?;
        for (device, check) in &self.devices {
            let default = if *device == Device::default() { " (the default)" } else { "" };
            let name = format!("--device {device}");
            match check {
                Ok(()) => writeln!(out, "{name:17} yes{default}: {}", device.computes())?,
                Err(error) => {
                    writeln!(out, "{name:17} no: {}", error.reason())?;
                    writeln!(out, "{:17} {}", "", error.remedy())?;
                }
            }
        }
        for advice in self.advice() {
            writeln!(out, "\n{advice}")?;
        }
        Ok(())
    }
}

/// What the machine's settings cost.
fn advice_of(machine: &Machine) -> Vec<String> {
    let mut advice = Vec::new();
    if !machine.is_jetson() {
        return advice;
    }
    if machine.memory.is_some_and(|memory| memory.zram) {
        advice.push(
            "Swap is memory itself, compressed: it takes from what models can have, and weights hardly shrink. \
             Switch it off: sudo systemctl disable --now nvzramconfig, and reboot."
                .to_owned(),
        );
    }
    // On Orin and Xavier alike the mode without limits is number 0.
    if let Some(PowerMode { number: Some(number @ 1..), name }) = &machine.power_mode {
        let name = name.as_deref().unwrap_or("of another name");
        advice.push(format!(
            "Power mode {number} ({name}) limits clocks: sudo nvpmodel -m 0 takes the limits away, sudo jetson_clocks holds \
             the clocks at their highest."
        ));
    }
    advice
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jetson_is_told_what_slows_it() {
        let memory = Memory { total: 8, available: 4, swap: 4, swap_used: 0, zram: true };
        let mode = PowerMode { number: Some(2), name: Some("MODE_30W".to_owned()) };
        let jetson = Machine {
            jetson_linux: Some("36.4.3".to_owned()),
            memory: Some(memory),
            power_mode: Some(mode),
            ..Machine::default()
        };
        let [swap, power] = &advice_of(&jetson)[..] else { panic!("two things") };
        assert!(swap.contains("nvzramconfig") && power.contains("Power mode 2 (MODE_30W)"), "{swap}\n{power}");
        let fast = PowerMode { number: Some(0), name: None };
        let memory = Memory { zram: false, ..memory };
        let tuned = Machine { memory: Some(memory), power_mode: Some(fast), ..jetson.clone() };
        assert!(advice_of(&tuned).is_empty());
        assert!(advice_of(&Machine { jetson_linux: None, ..jetson }).is_empty(), "zram is worth having elsewhere");
    }
}
