//! Which key channels to keep: score them, take the T best, remember them as a mask.
//!
//! Tried in a simulation and not here (numpy, SmolLM2-135M, news, 2 windows of 2,048 + 256 tokens; divergence from the whole cache
//! at bits a token and head, where λ = 0.4 and 0.5 in int4 with the correction take 195 and 162 bits and diverge by 0.0126 and
//! 0.0181): channels [coded one after the other](predict), of principal components weighed by queries (0.0154 at
//! 156); keys without a minimum (worse at every λ); one step a channel for a whole prompt (0.16 at 80); the query's moment
//! averaged over the next positions in place of halving what is off its diagonal (0.079); half of the lost logit's variance
//! added to thin logits (0.0080 for 0.0072).

pub mod adaptive;
pub mod compensate;
pub mod dynamic;
pub mod lowrank;
pub mod mask;
pub mod norm;
pub mod overlap;
pub mod predict;
pub mod random;
pub mod residual;
pub mod sample;
pub mod score;
pub mod select;
pub mod sketch;
pub mod threshold;
