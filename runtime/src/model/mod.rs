//! Models: what a checkpoint says, and the transformer that computes it.

pub mod config;
mod plan;
mod profile;
pub mod transformer;

#[cfg(all(test, feature = "vulkan"))]
mod vulkan;

pub use config::{Architecture, ModelConfig};
pub use profile::Profile;
pub use transformer::{Model, ModelError};
