//! thinkey: an edge LLM runtime whose key cache is really thinner.
//!
//! [`store`] finds and fetches models, [`weights`] reads them, [`policy`] says what their
//! cache does and [`plan`] the memory they take, [`model`] computes
//! them over a thin cache behind one [`engine`]; [`text`] turns text into tokens and back, and [`generate`] makes a reply of it all.
//! [`mod@bench`] measures speed, [`eval`] the quality of cache policies; [`machine`] says what there is to run on.
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod bench;
#[doc = include_str!("../docs/jetson.md")]
pub mod jetson {}
pub mod engine;
pub mod eval;
pub mod generate;
pub mod machine;
pub mod model;
pub mod plan;
pub mod policy;
pub mod sample;
pub mod store;
pub mod text;
pub mod weights;
