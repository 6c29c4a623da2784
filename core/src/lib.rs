//! The thin key cache of thinkey, as a device stores and computes it: `no_std`, no allocator.
//!
//! ThinK ([arXiv 2407.21018](https://arxiv.org/abs/2407.21018)) scores every channel of the key cache by how
//! strongly the recent queries use it and drops the weak ones. This crate holds all that a device needs for it:
//!
//! | module | what |
//! |---|---|
//! | [`shape`] | λ in per mille, channels kept, head shapes fixed at compile time |
//! | [`channel`] | scores, fixed-capacity top-T, masks, budgets, corrections |
//! | [`mass`] | the attention that the last queries pay to each token |
//! | [`storage`] | element kinds and the bytes of a 32-token block |
//! | [`quant`] | groups of 32 numbers as 8- or 4-bit codes |
//! | [`layout`] | where every byte of one head's cache lies |
//! | [`span`] | how many tokens are thin and how many whole, and what an admission of new tokens moves |
//! | [`cache`] | views over one head's bytes: admit, flush, read |
//! | [`attend`](mod@attend) | two-region decode attention with one softmax |
//! | [`plan`] | byte-exact size of a whole model's cache |
//! | [`fixed`] | a head's cache on a fixed-size arena |
//! | [`token`] | which tokens to keep: SnapKV, heavy hitters, sinks and a window |
//! | [`policy`] | what a cache does, as one value, one line or a file |
//! | [`snapshot`] | what a cache holds of a sequence, as bytes to go on with |
//! | [`trace`] | what a model's heads were given and what the cache made of it, to be replayed and compared |
//! | [`value`] | which value channels to keep |
//! | [`link`] | what a device and its host say to each other, and both their loops |
//! | [`wire`] | masks, layouts and headers as checked postcard frames |
//!
//! Vocabulary: `head_dim` D, `kept` T (channels kept), `lambda` λ (share of channels pruned), `group` G (query
//! heads per KV head), `recent` R (newest tokens kept whole), `prefix` (the tokens stored thin), `block`
//! (32 tokens).
//!
//! The loops here are the contract: every faster backend is tested against them.
#![no_std]
#![deny(missing_docs)]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod log;
mod rank;

pub mod attend;
pub mod cache;
pub mod channel;
pub mod error;
pub mod fixed;
pub mod layout;
pub mod link;
pub mod mass;
pub mod plan;
pub mod policy;
pub mod quant;
pub mod shape;
pub mod snapshot;
pub mod span;
pub mod storage;
pub mod token;
pub mod trace;
pub mod value;
pub mod wire;

pub use attend::{Loops, Partial, Plain};
pub use cache::{HeadMut, HeadRef, Kept, KeyOrder, Masks, Moments, Rows, Scoring};
pub use channel::mask::ChannelMask;
pub use error::Error;
pub use layout::HeadLayout;
pub use mass::{QueryWindow, TokenRows};
pub use plan::{CacheBytes, CachePlan};
pub use policy::Policy;
pub use shape::{BLOCK, Head, HeadShape, Lambda, MAX_GROUP, MAX_HEAD_DIM};
pub use span::{Admission, Retention, Span};
pub use storage::StorageKind;
