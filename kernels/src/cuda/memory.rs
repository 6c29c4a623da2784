//! The memory of a CUDA device.

use super::{CudaError, device, refused, start};
use cudarc::driver::{self, sys};

/// Memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Whether it is the processor's memory too, as on Jetson boards. What is [free](Self::free) leaves out then what the
    /// system could give back at once (cached files): the kernel's `MemAvailable` says better what can be had.
    pub unified: bool,
    /// All that the device can use.
    pub total: usize,
    /// What nobody uses now.
    pub free: usize,
}

/// The memory of the first device.
///
/// # Errors
/// [`CudaError`] where there is no driver or device, or the driver refuses.
pub fn memory() -> Result<Memory, CudaError> {
    start()?;
    let gpu = device(0)?;
    let (free, total) = usage(gpu).map_err(refused)?;
    let unified = super::survey::unified(gpu).map_err(refused)?;
    Ok(Memory { unified, total, free })
}

/// Free and total bytes of `gpu`.
pub(super) fn usage(gpu: sys::CUdevice) -> Result<(usize, usize), driver::DriverError> {
    // SAFETY: `gpu` is a device of the driver. The context that is retained is current only until it is released.
    unsafe {
        let context = driver::result::primary_ctx::retain(gpu)?;
        let before = driver::result::ctx::get_current();
        let usage = driver::result::ctx::set_current(context).and_then(|()| driver::result::mem_get_info());
        let before = before.ok().flatten().unwrap_or(std::ptr::null_mut());
        let restored = driver::result::ctx::set_current(before);
        driver::result::primary_ctx::release(gpu)?;
        restored.and(usage)
    }
}
