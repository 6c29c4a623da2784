//! CUDA: whether it can be used, asked before burn opens a device.
//!
//! burn-cuda opens devices on a thread of its own, which panics where something is missing; what the caller sees then
//! says nothing of the cause. So [`probe`] looks first.

use cudarc::{driver, nvrtc};
use std::path::PathBuf;

/// burn's CUDA backend.
pub type Backend = burn_cuda::Cuda<f32, i32>;

/// The first CUDA device.
pub type Device = burn_cuda::CudaDevice;

/// Why CUDA cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver library.
    #[error("no CUDA driver (libcuda) is found; install NVIDIA's driver, or use --device ndarray")]
    Driver,
    /// The driver does not start.
    #[error("the CUDA driver does not start: {cause}; check that its version is the kernel module's (nvidia-smi)")]
    Start {
        /// What the driver says.
        cause: String,
    },
    /// The driver finds no device.
    #[error("the CUDA driver finds no device; check CUDA_VISIBLE_DEVICES and nvidia-smi, or use --device ndarray")]
    Device,
    /// There is no run-time compiler.
    #[error(
        "no CUDA run-time compiler (libnvrtc) is found; install the CUDA toolkit or put its lib folder on LD_LIBRARY_PATH"
    )]
    Compiler,
    /// There are no headers to compile kernels with.
    #[error("no CUDA headers are found in {}; install the CUDA toolkit and set CUDA_PATH to its folder", path.display())]
    Headers {
        /// Where they were looked for.
        path: PathBuf,
    },
}

/// Whether CUDA can be used: driver, device, run-time compiler and headers, in this order.
///
/// # Errors
/// [`CudaError`] with what is missing first.
pub fn probe() -> Result<(), CudaError> {
    // SAFETY: opens the library and closes it again; nothing of it is called.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(CudaError::Driver);
    }
    let start = |error: driver::DriverError| CudaError::Start { cause: error.to_string() };
    driver::result::init().map_err(start)?;
    if driver::result::device::get_count().map_err(start)? < 1 {
        return Err(CudaError::Device);
    }
    // SAFETY: as above.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err(CudaError::Compiler);
    }
    let path = headers();
    if !path.join("cuda_runtime.h").exists() {
        return Err(CudaError::Headers { path });
    }
    Ok(())
}

/// Where cubecl looks for the headers.
fn headers() -> PathBuf {
    let toolkit = std::env::var_os("CUDA_PATH").map(PathBuf::from).unwrap_or_else(|| {
        let found = ["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from).into_iter().find(|path| path.exists());
        found.unwrap_or_else(|| PathBuf::from("/usr"))
    });
    toolkit.join("include")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the machine has, the answer comes without a panic and names one thing.
    #[test]
    fn a_probe_answers() {
        match probe() {
            Ok(()) => assert!(headers().join("cuda_runtime.h").exists()),
            Err(error) => assert!(error.to_string().contains("CUDA"), "{error}"),
        }
    }
}
