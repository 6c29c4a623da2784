//! The thin cache on devices that [CubeCL](https://github.com/tracel-ai/cubecl) has a runtime for.
//!
//! Kernels are generic over the runtime: they serve CUDA, and in tests Vulkan. What they read and write are the bytes that
//! core's `HeadLayout` describes, so that core's plain loops are the contract that they are tested against.
//!
//! A step of decoding launches, for each layer: [`append`] (with [`flush`] before it when the ring is full, and the
//! energies of queries until channels are chosen), then [`attention`]'s two and [`merge`]. Choosing channels, once a
//! sequence, is two more: [`score`] and [`select`]. Nothing waits for the device.

mod append;
mod attention;
mod cache;
mod flush;
mod launch;
mod layout;
mod merge;
mod ops;
mod score;
mod select;

pub use cache::DeviceCache;
pub use ops::{AnyCache, Device};

#[cfg(all(test, feature = "vulkan", feature = "cuda"))]
mod compile;
#[cfg(all(test, feature = "vulkan"))]
mod operations;
#[cfg(all(test, feature = "vulkan"))]
mod tests;
