//! thinkey: an edge LLM runtime whose key cache is really thinner.
//!
//! [`store`] finds and fetches models.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

pub mod store;
