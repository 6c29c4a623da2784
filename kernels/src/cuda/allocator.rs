//! Which of CUDA's two allocators memory comes from.
//!
//! cubecl asks the stream-ordered one (`cuMemAllocAsync`) first and, where that refuses, the other (`cuMemAlloc`). On Jetson
//! Orin the stream-ordered one is known to fail above some 20 GB, and its pool keeps what it once had away from the
//! processor, whose memory it is. cubecl has no switch. But it takes a device's current pool, so a pool that may hold nothing
//! makes every request go to the plain allocator.
//!
//! What is freed is kept for what is of the same size, so that the plain allocator's price, a wait for the device, is paid by a
//! prompt and a first step, and not while decoding.

use super::{CudaError, device, refused, start};
use cudarc::driver::sys::{self, CUmemPoolProps};
use std::{ffi::c_void, mem::offset_of};

/// The environment variable that, set to `async`, leaves cubecl its first choice.
pub const ALLOCATOR: &str = "THINKEY_CUDA_ALLOCATOR";

/// `CUmemPoolProps` as CUDA has laid it out since 12.2; the bindings name its parts differently from version to version.
/// Before 12.2, what is `max_size` here was reserved and is not looked at.
#[repr(C)]
struct PoolProperties {
    allocation: u32,
    handles: u32,
    location: u32,
    device: i32,
    security: *mut c_void,
    max_size: usize,
    reserved: [u8; 56],
}

const _: () = assert!(offset_of!(PoolProperties, max_size) == 24 && size_of::<PoolProperties>() == 88);

/// `CU_MEM_ALLOCATION_TYPE_PINNED`: memory that does not move.
const PINNED: u32 = 1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const ON_DEVICE: u32 = 1;
/// Least size of a pool: smaller ones are rounded up.
const LEAST: usize = 1;

/// Has memory of the first device come from the plain allocator, unless [`ALLOCATOR`] says otherwise: before burn opens the
/// device. Says whether that is so now. A driver without pools, or one that does not limit them, is left as it is.
///
/// # Errors
/// [`CudaError`] where there is no driver or device.
pub fn allocate_synchronously() -> Result<bool, CudaError> {
    start()?;
    let gpu = device(0)?;
    if std::env::var_os(ALLOCATOR).is_some_and(|value| value == "async") {
        return Ok(false);
    }
    if !super::survey::pools(gpu).map_err(refused)? {
        return Ok(true);
    }
    if size_of::<PoolProperties>() != size_of::<CUmemPoolProps>() {
        return Ok(false);
    }
    let properties = PoolProperties {
        allocation: PINNED,
        handles: 0,
        location: ON_DEVICE,
        device: gpu,
        security: std::ptr::null_mut(),
        max_size: LEAST,
        reserved: [0; 56],
    };
    let mut pool = std::ptr::null_mut();
    // SAFETY: `properties` is laid out as `CUmemPoolProps` (checked above) and outlives the call; the pool is the driver's and
    // stays the device's for as long as the process lives.
    let set = unsafe {
        match sys::cuMemPoolCreate(&mut pool, std::ptr::from_ref(&properties).cast::<CUmemPoolProps>()).result() {
            Ok(()) => sys::cuDeviceSetMemPool(gpu, pool).result(),
            refusal => refusal,
        }
    };
    Ok(set.is_ok())
}
