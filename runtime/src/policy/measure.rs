//! How a calibration is measured: the budget scores of the heads over some windows of text.

use super::Calibration;
use crate::{
    engine::Engine,
    model::{
        ModelError,
        transformer::{RECENT, WINDOW},
    },
};
use std::ops::ControlFlow;
use thinkey_core::{
    Error, QueryWindow, TokenRows,
    channel::{
        adaptive,
        compensate::{self, SINKS, budget_scores},
        score::add_energy,
    },
    mass,
};
use thinkey_kernels::{
    cpu::{loops::SimdLoops, simd::Level},
    ops::HeldHead,
};

impl Calibration {
    /// Fewest tokens of a window: the newest are never thinned, and their keys do not count.
    pub const LEAST: usize = SINKS + RECENT + 1;

    /// Measures the model of `engine` over `windows`, texts of [`LEAST`](Self::LEAST) tokens and more; `progress` is told
    /// how many are done.
    ///
    /// # Errors
    /// [`ModelError`] where there is no window, one is too short, or the model cannot read it; [`ModelError::Interrupted`]
    /// where `progress` breaks.
    pub fn measure(
        engine: &mut Engine,
        windows: &[&[u32]],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Self, ModelError> {
        let config = engine.config().clone();
        let shortest = windows.iter().map(|window| window.len()).min().unwrap_or(0);
        if shortest < Self::LEAST {
            return Err(Error::Length { what: "tokens of a window", expected: Self::LEAST, actual: shortest }.into());
        }
        let mut memory = vec![0.0; config.layers * config.kv_heads * config.head_dim];
        let mut average = adaptive::Calibration::new(&mut memory, config.head_dim)?;
        for (done, window) in windows.iter().enumerate() {
            if progress(done).is_break() {
                return Err(ModelError::Interrupted);
            }
            let mut scores = Vec::with_capacity(average.heads() * config.head_dim);
            engine.try_examine(window, WINDOW, |_, _, held| Ok::<_, ModelError>(budget(held, RECENT, &mut scores)?))?;
            average.add(&scores)?;
        }
        Ok(Self::new(&config, &average, shortest))
    }
}

/// Adds the budget scores of a head's channels, where all but the newest `recent` tokens are thinned.
pub(super) fn budget(held: &HeldHead, recent: usize, scores: &mut Vec<f32>) -> Result<(), Error> {
    let (d, tokens, window) = (held.head_dim, held.tokens(), held.window);
    let group = held.queries.len() / (window * d);
    let keys = TokenRows::new(&held.keys, tokens, d, d)?;
    let queries = QueryWindow::new(&held.queries, [group, window * d], [window, d], d)?;
    let (mut mass, mut row) = (vec![0.0; tokens], vec![0.0; tokens]);
    mass::group_mass(&SimdLoops(Level::best()), &queries, &keys, &mut row, &mut mass)?;
    mass.truncate(tokens - recent);
    let total = compensate::weigh(&mut mass, SINKS)?;
    let (mut mean, mut covariance) = (vec![0.0; d], vec![0.0; d * d]);
    let mut scratch = vec![0.0; compensate::moments_scratch(d)];
    compensate::moments(&keys.first(tokens - recent)?, &mass, &mut scratch, &mut mean, &mut covariance)?;
    let (mut energy, at) = (vec![0.0; d], scores.len());
    add_energy(&held.queries, group * window, d, &mut energy)?;
    scores.resize(at + d, 0.0);
    budget_scores(&energy, group * window, &covariance, total, &mut scores[at..])
}
