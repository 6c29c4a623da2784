//! Which value channels to keep.

pub mod score;
