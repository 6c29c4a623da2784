//! CUDA: whether it can be used, asked before burn opens a device.
//!
//! burn-cuda opens devices on a thread of its own, which panics where something is missing; what the caller sees then
//! says nothing of the cause. So [`probe`] looks first, and [`survey`] tells all that there is, for people. Nothing of CUDA
//! is linked: driver and run-time compiler are opened when they are asked for.
//!
//! Devices are counted as the driver does; the first one is used.

mod allocator;
mod bandwidth;
mod headers;
mod memory;
mod survey;

pub use allocator::{ALLOCATOR, allocate_synchronously};
pub use bandwidth::copy_bandwidth;
pub use headers::Headers;
pub use memory::{Memory, memory};
pub use survey::{Gpu, Survey, compiles, survey};

use cudarc::{driver, nvrtc};
use std::{fmt, path::PathBuf};

/// burn's CUDA backend.
pub type Backend = burn_cuda::Cuda<f32, i32>;

/// The first CUDA device.
pub type Device = burn_cuda::CudaDevice;

/// The operations on it.
pub type Ops = crate::cube::Device<Backend, cubecl::cuda::CudaRuntime>;

/// A version as CUDA counts them, and a compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Before the point.
    pub major: u32,
    /// After it.
    pub minor: u32,
}

impl Version {
    /// Of the number that drivers and headers give: 12060 is 12.6.
    #[must_use]
    pub const fn of_number(number: u32) -> Self {
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }

    /// What the run-time compiler calls the architecture of this compute capability, as cubecl asks for it: `sm_87`, and
    /// from 9.0 on with the instructions of that architecture alone, `sm_90a`.
    #[must_use]
    pub fn architecture(self) -> String {
        let alone = if self.major >= 9 { "a" } else { "" };
        format!("sm_{}{}{alone}", self.major, self.minor)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Why CUDA cannot be used. Shown with what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}; {}", self.reason(), self.remedy())]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver library.
    Driver,
    /// The driver does not start.
    Start {
        /// What the driver says.
        cause: String,
    },
    /// The driver finds no device.
    Device,
    /// There is no run-time compiler.
    Compiler,
    /// There are no headers to compile kernels with.
    Headers {
        /// Where they were looked for.
        path: PathBuf,
    },
    /// The run-time compiler does not compile for the device.
    Compile {
        /// What it is to compile for.
        architecture: String,
        /// What it says.
        cause: String,
    },
}

impl CudaError {
    /// What is wrong.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::Driver => "no CUDA driver (libcuda) is found".to_owned(),
            Self::Start { cause } => format!("the CUDA driver does not start: {cause}"),
            Self::Device => "the CUDA driver finds no device".to_owned(),
            Self::Compiler => "no CUDA run-time compiler (libnvrtc) is found".to_owned(),
            Self::Headers { path } => format!("no CUDA headers are found in {}", path.display()),
            Self::Compile { architecture, cause } => {
                format!("the CUDA run-time compiler does not compile for {architecture}: {cause}")
            }
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Driver => "install NVIDIA's driver (on a Jetson it comes with JetPack), or use --device ndarray",
            Self::Start { .. } => "check that its version is the kernel module's (nvidia-smi)",
            Self::Device => "check CUDA_VISIBLE_DEVICES and nvidia-smi, or use --device ndarray",
            Self::Compiler => "install the CUDA toolkit or put its lib folder on LD_LIBRARY_PATH",
            Self::Headers { .. } => "install the CUDA toolkit and set CUDA_PATH to its folder",
            Self::Compile { .. } => {
                "the headers (CUDA_PATH) and the compiler (LD_LIBRARY_PATH) must be of one toolkit that knows the device"
            }
        }
    }
}

/// Whether CUDA can be used: driver, device, run-time compiler and headers, in this order, and whether those compile for the
/// device.
///
/// # Errors
/// [`CudaError`] with what is missing first.
pub fn probe() -> Result<(), CudaError> {
    start()?;
    let gpu = device(0)?;
    find_compiler()?;
    let headers = Headers::find()?;
    let capability = survey::capability(gpu).map_err(refused)?;
    compiles(capability, &headers)
}

/// Starts the driver; how many devices it finds.
fn start() -> Result<usize, CudaError> {
    // SAFETY: opens the library and closes it again; nothing of it is called.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(CudaError::Driver);
    }
    driver::result::init().map_err(refused)?;
    match driver::result::device::get_count().map_err(refused)? {
        count @ 1.. => Ok(count as usize),
        _ => Err(CudaError::Device),
    }
}

/// The driver's name for its device `index`; the driver has started.
fn device(index: usize) -> Result<driver::sys::CUdevice, CudaError> {
    let index = i32::try_from(index).map_err(|_| CudaError::Device)?;
    driver::result::device::get(index).map_err(refused)
}

/// Whether there is a run-time compiler.
fn find_compiler() -> Result<(), CudaError> {
    // SAFETY: opens the library and closes it again; nothing of it is called.
    if unsafe { nvrtc::sys::is_culib_present() } { Ok(()) } else { Err(CudaError::Compiler) }
}

/// What the driver says.
fn refused(error: driver::DriverError) -> CudaError {
    // Its message is to be had from the driver alone, which may be what has failed.
    CudaError::Start { cause: format!("{:?}", error.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the machine has, the answer comes without a panic and names one thing and a way out.
    #[test]
    fn a_probe_answers_what_a_survey_finds() {
        let survey = survey();
        assert_eq!(probe().err(), survey.obstacle);
        match &survey.obstacle {
            None => assert!(!survey.devices.is_empty() && survey.headers.is_some() && survey.compiler.is_some()),
            Some(error) => {
                let (text, reason) = (error.to_string(), error.reason());
                assert!(reason.contains("CUDA"), "{text}");
                assert_eq!(text, format!("{reason}; {}", error.remedy()));
            }
        }
        assert_eq!(memory().is_ok(), !survey.devices.is_empty());
    }

    #[test]
    fn versions_and_architectures() {
        let version = Version::of_number(12060);
        assert_eq!((version.to_string(), version.architecture()), ("12.6".to_owned(), "sm_126a".to_owned()));
        assert_eq!(Version { major: 8, minor: 7 }.architecture(), "sm_87");
        assert_eq!(Version { major: 9, minor: 0 }.architecture(), "sm_90a");
        assert!(Version::of_number(13_000) > version);
    }
}
