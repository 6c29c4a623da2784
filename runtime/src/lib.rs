//! thinkey: an edge LLM runtime whose key cache is really thinner.
//!
//! [`weights`] reads them, [`model`] computes them over a thin cache behind one [`engine`], [`store`] finds and fetches them.
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod bench;
pub mod engine;
pub mod model;
pub mod sample;
pub mod store;
pub mod text;
pub mod weights;
