//! All that there is of CUDA on a machine: for people who want to know why it cannot be used, or how well.

use super::{CudaError, Headers, Version, device, find_compiler, memory, refused, start};
use cudarc::{
    driver::{DriverError, result, sys},
    nvrtc,
};
use std::ffi::CStr;

/// What there is of CUDA.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Survey {
    /// The newest CUDA version that the driver serves.
    pub driver: Option<Version>,
    /// The devices that it finds.
    pub devices: Vec<Gpu>,
    /// Version of the run-time compiler.
    pub compiler: Option<Version>,
    /// The headers.
    pub headers: Option<Headers>,
    /// What stands in the way of using the first device, if anything does: what [`probe`](super::probe) says.
    pub obstacle: Option<CudaError>,
}

/// A CUDA device.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// As its maker calls it.
    pub name: String,
    /// Compute capability.
    pub capability: Version,
    /// Whether its memory is the processor's.
    pub unified: bool,
    /// Bytes of memory.
    pub total: usize,
    /// Those that nobody uses; `None` where the driver does not say.
    pub free: Option<usize>,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Threads of a warp.
    pub warp: u32,
    /// Bytes a second that its memory can read by clock and width, where the driver tells both.
    pub bandwidth: Option<f64>,
    /// Whether it has the stream-ordered allocator.
    pub pools: bool,
}

/// Looks for everything, whatever is missing.
#[must_use]
pub fn survey() -> Survey {
    let mut survey = Survey::default();
    let mut obstacles = Vec::new();
    match start() {
        Ok(count) => match (0..count).map(|index| gpu(device(index)?).map_err(refused)).collect() {
            Ok(devices) => survey.devices = devices,
            Err(error) => obstacles.push(error),
        },
        Err(error) => obstacles.push(error),
    }
    if !matches!(obstacles.first(), Some(CudaError::Driver)) {
        survey.driver = driver_version();
    }
    match find_compiler() {
        Ok(()) => survey.compiler = compiler_version(),
        Err(error) => obstacles.push(error),
    }
    match Headers::find() {
        Ok(headers) => survey.headers = Some(headers),
        Err(error) => obstacles.push(error),
    }
    if let (true, Some(gpu), Some(headers)) = (obstacles.is_empty(), survey.devices.first(), &survey.headers) {
        obstacles.extend(compiles(gpu.capability, headers).err());
    }
    survey.obstacle = obstacles.into_iter().next();
    survey
}

/// What kernels of cubecl's include.
const SOURCE: &CStr = c"#include <cuda_runtime.h>\n#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n\
    extern \"C\" __global__ void twice(__half *x) { x[threadIdx.x] = x[threadIdx.x] + x[threadIdx.x]; }\n";

/// Whether the run-time compiler compiles, with `headers`, for devices of this compute capability. It needs none of them.
///
/// # Errors
/// [`CudaError::Compiler`] where there is none; [`CudaError::Compile`] where it does not.
pub fn compiles(capability: Version, headers: &Headers) -> Result<(), CudaError> {
    find_compiler()?;
    let architecture = capability.architecture();
    let options =
        [format!("--gpu-architecture={architecture}"), format!("--include-path={}", headers.path.to_string_lossy())];
    let program = nvrtc::result::create_program(SOURCE, None)
        .map_err(|error| CudaError::Compile { architecture: architecture.clone(), cause: format!("{:?}", error.0) })?;
    // SAFETY: `program` is destroyed below and nowhere else.
    let compiled = unsafe { nvrtc::result::compile_program(program, &options) };
    let result = compiled.map_err(|error| {
        // SAFETY: as above.
        let log = unsafe { nvrtc::result::get_program_log(program) }.unwrap_or_default();
        let log: Vec<u8> = log.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
        let log = String::from_utf8_lossy(&log);
        let first = log.lines().map(str::trim).find(|line| !line.is_empty());
        CudaError::Compile { architecture, cause: first.map_or_else(|| format!("{:?}", error.0), str::to_owned) }
    });
    // SAFETY: it is not used any more. Whether it can be destroyed does not matter: that would be a leak of some bytes.
    let _ = unsafe { nvrtc::result::destroy_program(program) };
    result
}

fn gpu(gpu: sys::CUdevice) -> Result<Gpu, DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let number = |attribute| attribute_of(gpu, attribute).map(|value| u32::try_from(value).unwrap_or(0));
    let clock = number(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).unwrap_or(0);
    let width = number(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH).unwrap_or(0);
    // Kilohertz, bits, two transfers a clock.
    let bandwidth = 2.0 * 1000.0 * f64::from(clock) * f64::from(width) / 8.0;
    Ok(Gpu {
        name: name(gpu)?,
        capability: capability(gpu)?,
        unified: unified(gpu)?,
        // SAFETY: `gpu` is a device of the driver.
        total: unsafe { result::device::total_mem(gpu)? },
        free: memory::usage(gpu).ok().map(|(free, _)| free),
        multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        warp: number(Attribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE)?,
        bandwidth: (bandwidth > 0.0).then_some(bandwidth),
        pools: pools(gpu)?,
    })
}

/// The name of `gpu`; cudarc's function panics where it is longer than it expects.
fn name(gpu: sys::CUdevice) -> Result<String, DriverError> {
    let mut bytes = [0_u8; 256];
    // SAFETY: the driver writes at most one byte less than it is told, and a zero.
    unsafe { sys::cuDeviceGetName(bytes.as_mut_ptr().cast(), bytes.len() as i32, gpu) }.result()?;
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
}

fn attribute_of(gpu: sys::CUdevice, attribute: sys::CUdevice_attribute) -> Result<i32, DriverError> {
    // SAFETY: `gpu` is a device of the driver.
    unsafe { result::device::get_attribute(gpu, attribute) }
}

/// Compute capability.
pub(super) fn capability(gpu: sys::CUdevice) -> Result<Version, DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let part = |attribute| attribute_of(gpu, attribute).map(|value| u32::try_from(value).unwrap_or(0));
    Ok(Version {
        major: part(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        minor: part(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    })
}

/// Whether the memory of `gpu` is the processor's.
pub(super) fn unified(gpu: sys::CUdevice) -> Result<bool, DriverError> {
    Ok(attribute_of(gpu, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0)
}

/// Whether `gpu` has the stream-ordered allocator.
pub(super) fn pools(gpu: sys::CUdevice) -> Result<bool, DriverError> {
    Ok(attribute_of(gpu, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0)
}

fn driver_version() -> Option<Version> {
    let mut number = 0;
    // SAFETY: the driver is there, and writes one number.
    unsafe { sys::cuDriverGetVersion(&mut number) }.result().ok()?;
    u32::try_from(number).ok().map(Version::of_number)
}

fn compiler_version() -> Option<Version> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the compiler is there, and writes two numbers.
    unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) }.result().ok()?;
    Some(Version { major: major.try_into().ok()?, minor: minor.try_into().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where there are a compiler and headers, they compile for a Jetson Orin; what they cannot compile for is named.
    #[test]
    fn a_compiler_and_headers_compile() {
        let (Ok(()), Ok(headers)) = (find_compiler(), Headers::find()) else {
            println!("nothing is compiled: there are no compiler and headers");
            return;
        };
        assert_eq!(compiles(Version { major: 8, minor: 7 }, &headers), Ok(()));
        assert_eq!(compiles(Version { major: 9, minor: 0 }, &headers), Ok(()));
        let error = compiles(Version { major: 1, minor: 0 }, &headers).unwrap_err();
        assert!(matches!(&error, CudaError::Compile { architecture, .. } if architecture == "sm_10"), "{error}");
        let elsewhere = Headers { path: "/nonexistent".into(), version: None };
        let error = compiles(Version { major: 8, minor: 7 }, &elsewhere).unwrap_err();
        assert!(error.to_string().contains("cuda_runtime.h"), "{error}");
    }
}
