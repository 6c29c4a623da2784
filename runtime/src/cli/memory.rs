//! The memory of this process and of the machine.

use thinkey::{
    engine::Device,
    machine::{Memory, kilobytes},
};

/// Most memory that this process ever held at once, weights in the memory map included, where the system tells.
pub fn peak_bytes() -> Option<usize> {
    kilobytes(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Memory that can be had on `device` now, where the system tells: without swapping where it is the processor's, as on boards
/// that share it with a GPU.
pub fn available_bytes(device: Device) -> Option<usize> {
    #[cfg(feature = "cuda")]
    if let (Device::Cuda, Ok(memory)) = (device, thinkey_kernels::cuda::memory())
        && !memory.unified
    {
        return Some(memory.free);
    }
    let _ = device;
    Some(Memory::read()?.available)
}
