//! Which value channels to keep, and how values are turned before few codes are made of them.

pub mod score;
mod turn;

pub use turn::turn;
