//! A device that logs by defmt over its own link, and a host that shows it, by the device's own ELF file.
//!
//! The device is small: a thin head in place of a model. `.ci/defmt` does the same with the whole program and a model.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// A device that is switched off when it is dropped.
struct Device(Child);

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Builds the device; the path of its ELF file. In the directory of the firmware of `log.rs`, with which it shares what it is
/// built of.
fn build() -> PathBuf {
    let target = concat!(env!("CARGO_TARGET_TMPDIR"), "/freestanding");
    let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--release", "--locked", "--target-dir", target])
        .current_dir(root().join("firmware-host/tests/device"))
        .env("DEFMT_LOG", "trace")
        .env_remove("CARGO_BUILD_TARGET")
        .status()
        .unwrap();
    assert!(status.success(), "the device does not build: {status}");
    Path::new(target).join("release/thinkey-logging-device")
}

#[test]
fn a_device_says_over_its_link_what_its_head_does() {
    let elf = build();
    let mut device = Device(Command::new(&elf).stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(device.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let talk = |level: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_thinkey-firmware-host"))
            .args(["talk", "--port", line.split_whitespace().last().unwrap(), "go on", "--level", level, "--log"])
            .arg(&elf)
            .current_dir(root())
            .output()
            .unwrap();
        let [answer, log] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert!(output.status.success(), "{log}");
        (answer, log)
    };
    let test = fs::read_to_string(root().join("core/tests/cortex_m4.rs")).unwrap();
    let sum = test.lines().find_map(|line| line.strip_prefix("const CHECKSUM: u64 = 0x")).unwrap();
    let (answer, log) = talk("debug");
    assert_eq!(answer, sum.replace(['_', ';'], "") + "\n");

    // Of a prompt of 100 tokens 4 are sinks and 32 stay whole; the ring of 64 overflows at the 33rd and 65th of 80 more.
    let flush = "thinned 32 tokens into 1 blocks of 16 channels";
    let expected =
        ["HeadLayout {", "selected 16 of 32 channels", "thinned 64 tokens into 2 blocks of 16 channels", flush, flush];
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), expected.len(), "{log}");
    for (line, expected) in lines.into_iter().zip(expected) {
        assert!(line.contains(expected), "{line}");
        let (level, macro_name) =
            if expected.starts_with("Head") { (" INFO ", "info!(") } else { (" DEBUG ", "debug!(") };
        let (file, number) = line.rsplit_once(" (").unwrap().1.trim_end_matches(')').split_once(':').unwrap();
        let source = fs::read_to_string(root().join(file)).unwrap();
        let statement = source.lines().nth(number.parse::<usize>().unwrap() - 1).unwrap();
        assert!(line.contains(level) && statement.contains(macro_name), "{line}: {statement}");
    }
    // The device goes on, and a level leaves out what is below.
    let (again, log) = talk("info");
    assert_eq!((again, log), (answer, String::new()));
}
