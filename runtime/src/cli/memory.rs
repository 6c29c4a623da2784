//! The memory of this process and of the machine.

use thinkey::machine::{Memory, kilobytes};

/// Most memory that this process ever held at once, weights in the memory map included, where the system tells.
pub fn peak_bytes() -> Option<usize> {
    kilobytes(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Memory that can be had without swapping, where the system tells.
pub fn available_bytes() -> Option<usize> {
    Some(Memory::read()?.available)
}
