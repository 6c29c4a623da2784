//! The thin cache on devices that [CubeCL](https://github.com/tracel-ai/cubecl) has a runtime for.
//!
//! Kernels are generic over the runtime: they serve CUDA, and in tests Vulkan. What they read and write are the bytes that
//! core's `HeadLayout` describes, so that core's plain loops are the contract that they are tested against.
//!
//! A step of decoding launches nine kernels for each layer, whatever the batch up to 32 sequences: the product that makes
//! queries, keys and values with normalisation in front of it (`gemv`), `rotate`, `append`, `attention`'s two and
//! `merge`, and three products more, of which one multiplies up with silu(gate) and two add to the residual stream. Each
//! product is as many launches as its matrices have formats. Beside the layers there are up to four: embeddings are looked up
//! and logits written, of which `best` finds the largest in one launch, or two where there are more than 4,096; and one
//! `flush` a layer comes every 32 tokens. Until a sequence has chosen its channels, one a layer more counts the
//! energies (`score`) of its queries; when it chooses, the same launch sums those of keys too, and `select` and `learn`'s
//! means are one or two more. What kernels go by is uploaded once a step.
//!
//! A prompt takes two launches for each layer and run of up to 512 rows beside its products: `hold` and `prefill`, and
//! three more where the cache held something before, `extend` with what `attention` has before it and `merge` behind it. Its admission is as a step's, once a layer; where it learns
//! how queries are corrected, `residual` and `solve` are two more, after tensor operations that weigh its keys.
//!
//! The host waits for the device once a step: for the tokens and logits that the choice of the next token takes, or for all
//! logits where that depends on each of them (a repetition penalty, or a temperature without a `top_k` of up to 64). A prompt
//! waits once, for the logits of its last row. Nothing else is brought to the host, masks and corrections included,
//! unless a sequence is saved: then all that is held of it, layer by layer.

mod append;
mod attention;
mod best;
mod cache;
mod copy;
mod extend;
mod flush;
mod gemv;
mod held;
mod hold;
mod launch;
mod layout;
mod learn;
mod linear;
mod merge;
mod ops;
mod prefill;
mod residual;
mod rotate;
mod score;
mod select;
mod snapshot;
mod solve;
mod tile;
mod trellis;
mod turn;
mod weights;

pub use cache::DeviceCache;
pub use held::Held;
pub use linear::DeviceLinear;
pub use ops::{AnyCache, AnyPrompt, Device};

#[cfg(all(test, feature = "vulkan", feature = "cuda"))]
mod compile;
#[cfg(all(test, feature = "vulkan"))]
mod linear_tests;
#[cfg(all(test, feature = "vulkan"))]
mod operations;
#[cfg(all(test, feature = "vulkan"))]
mod prompt_tests;
#[cfg(all(test, feature = "vulkan"))]
mod snapshot_tests;
#[cfg(all(test, feature = "vulkan"))]
mod tests;
