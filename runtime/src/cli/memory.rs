//! The memory of this process and of the machine.

/// Most memory that this process ever held at once, weights in the memory map included, where the system tells.
pub fn peak_bytes() -> Option<usize> {
    entry("/proc/self/status", "VmHWM:")
}

/// Memory that can be had without swapping, where the system tells.
pub fn available_bytes() -> Option<usize> {
    entry("/proc/meminfo", "MemAvailable:")
}

/// An entry of a file of the kernel's, in bytes.
fn entry(path: &str, name: &str) -> Option<usize> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}
