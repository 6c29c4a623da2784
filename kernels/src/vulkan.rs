//! Vulkan, for tests: what runs there is what CUDA runs, and a software implementation of it needs no device.

/// burn's Vulkan backend.
pub type Backend = burn_wgpu::Wgpu<f32, i32>;

/// The operations on it.
pub type Ops = crate::cube::Device<Backend, burn_wgpu::WgpuRuntime>;

/// The operations on the first device.
#[must_use]
pub fn ops() -> Ops {
    Ops::new(burn_wgpu::WgpuDevice::default())
}
