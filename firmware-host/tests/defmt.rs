//! A device that logs through defmt over its own link, and a host that shows what it says, by the device's own ELF file.
//!
//! Only where the program is built with its feature `defmt`, see `.ci/defmt`. Nothing of the workspace is linked into this
//! test, so that it wants no logger.
#![cfg(target_os = "linux")]

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_thinkey-firmware-host");

/// A device that is switched off when it is dropped.
struct Device(Child);

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_device_says_over_its_link_what_its_cache_does() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = fs::read_to_string(root.join("runtime/assets/pig-and-pepper.txt")).unwrap();
    let prompt: String = text.chars().take(500).collect();
    let child =
        Command::new(PROGRAM).args(["run", "--context", "300", "--pty"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut device = Device(child);
    let mut line = String::new();
    BufReader::new(device.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let line = line.split_whitespace().last().expect("where it is");
    let output = Command::new(PROGRAM)
        .args(["talk", "--port", line, "--raw", &prompt, "--max-tokens", "8", "--log", PROGRAM])
        .current_dir(root)
        .output()
        .unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && output.stdout.len() > 8, "{log}");

    // Time, level, module, message and source line, as the statements say it and where they stand.
    assert!(log.lines().any(|line| line.contains(" INFO ") && line.contains("serving")), "{log}");
    let of = |message: &'static str| log.lines().filter(move |line| line.contains(message));
    let first = of(" blocks of ").next().unwrap_or_else(|| panic!("{log}"));
    assert!(first.contains(" DEBUG thinkey_core::cache::") && first.contains(" thinned "), "{first}");
    let (file, number) = first.rsplit_once(" (").unwrap().1.trim_end_matches(')').split_once(':').unwrap();
    let source = fs::read_to_string(root.join(file)).unwrap();
    assert!(source.lines().nth(number.parse::<usize>().unwrap() - 1).unwrap().contains("debug!("), "{first}");
    // Each of 30 layers has 3 heads, and none is lost or damaged.
    assert_eq!(of(" blocks of ").count(), 90, "{log}");
    assert!(!log.contains("malformed") && !log.contains("cut off"), "{log}");
    println!("{}", log.lines().take(4).collect::<Vec<_>>().join("\n"));
}
