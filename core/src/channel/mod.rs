//! Which key channels to keep: score them, take the T best, remember them as a mask.

pub mod adaptive;
pub mod compensate;
pub mod dynamic;
pub mod lowrank;
pub mod mask;
pub mod norm;
pub mod overlap;
pub mod random;
pub mod residual;
pub mod sample;
pub mod score;
pub mod select;
pub mod sketch;
pub mod threshold;
