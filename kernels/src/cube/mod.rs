//! The thin cache on devices that [CubeCL](https://github.com/tracel-ai/cubecl) has a runtime for.
//!
//! Kernels are generic over the runtime: they serve CUDA, and in tests Vulkan. What they read and write are the bytes that
//! core's `HeadLayout` describes, so that core's plain loops are the contract that they are tested against.
//!
//! A step of decoding launches nine kernels for each layer, whatever the batch up to 32 sequences: the product that makes
//! queries, keys and values with normalisation in front of it (`gemv`), `rotate`, `append`, `attention`'s two and
//! `merge`, and three products more, of which one multiplies up with silu(gate) and two add to the residual stream. Each
//! product is as many launches as its matrices have formats. Beside the layers there are three: two look up embeddings and
//! write logits, and one `flush` a layer comes every 32 tokens. Until a sequence has chosen its channels, one a layer more
//! counts the energies of its queries; choosing them, once a sequence, is two to three more: `score`, `select`, and
//! `learn`'s means. What kernels go by is uploaded once a step.
//!
//! Nothing waits for the device but what reads logits, and a first prompt that learns how queries are corrected: it reads
//! the covariance of the keys of a layer and solves it on the host, as the processor does, since sums of 64 bits are not to
//! be had everywhere.

mod append;
mod attention;
mod cache;
mod flush;
mod gemv;
mod launch;
mod layout;
mod learn;
mod linear;
mod merge;
mod ops;
mod rotate;
mod score;
mod select;
mod turn;
mod weights;

pub use cache::DeviceCache;
pub use linear::DeviceLinear;
pub use ops::{AnyCache, Device};

#[cfg(all(test, feature = "vulkan", feature = "cuda"))]
mod compile;
#[cfg(all(test, feature = "vulkan"))]
mod linear_tests;
#[cfg(all(test, feature = "vulkan"))]
mod operations;
#[cfg(all(test, feature = "vulkan"))]
mod tests;
