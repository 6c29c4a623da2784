//! How much each channel of each head matters, measured once for a model and kept beside it.

use crate::{model::ModelConfig, weights::Checkpoint};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use thinkey_core::{
    Error, Lambda,
    channel::adaptive::{self, Grid, MIN_KEPT},
    policy::{LayerTable, MAX_RUNS},
};

use super::DesignError;

/// Version of the file.
const VERSION: u32 = 1;

/// Those of models that thinkey knows, by the name in the model's header.
const KNOWN: &[(&str, &str)] =
    &[("Smollm2 135M 8k Lc100K Mix1 Ep2", include_str!("../../assets/smollm2-135m-instruct.calibration.json"))];

/// The sorted budget scores of the heads of a model, mean over some windows of text: what
/// [`adaptive::Calibration`] gathers, and what T per head is [distributed](adaptive::distribute) by at any λ.
///
/// It is a JSON file beside the model's, which `thinkey calibrate` writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    version: u32,
    /// The model's own name.
    model: Option<String>,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Windows of text that were averaged.
    windows: usize,
    /// Tokens of each.
    tokens: usize,
    /// [layers · kv_heads · D], falling within a head; they sum to 1.
    scores: Vec<f32>,
}

/// Why a calibration cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrationError {
    /// The file cannot be read.
    #[error("cannot read the calibration {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The file is none.
    #[error("{} is no calibration: {cause}; write it anew by `thinkey calibrate`", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: serde_json::Error,
    },
    /// It is damaged, or of another version.
    #[error("the calibration {} cannot be used: {why}; write it anew by `thinkey calibrate`", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// The file cannot be written.
    #[error("cannot write the calibration {}: {cause}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

impl Calibration {
    /// The average of a model of shape `config`.
    #[must_use]
    pub fn new(config: &ModelConfig, average: &adaptive::Calibration<'_>, tokens: usize) -> Self {
        Self {
            version: VERSION,
            model: config.name.clone(),
            layers: config.layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            windows: average.windows(),
            tokens,
            // Enough digits for what is compared, and a short file.
            scores: average.profile().map(round).collect(),
        }
    }

    /// That of the model of `checkpoint`: the file beside it, or else the one that thinkey knows; `None` where there is
    /// none.
    ///
    /// # Errors
    /// [`CalibrationError`] where there is a file that cannot be used.
    pub fn find(checkpoint: &Checkpoint) -> Result<Option<Self>, CalibrationError> {
        let path = Self::path(checkpoint.path());
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text, &path).map(Some),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                let config = checkpoint.config();
                let known = KNOWN.iter().find(|(name, _)| config.name.as_deref() == Some(*name));
                let known = known.map(|(name, text)| Self::parse(text, Path::new(name))).transpose()?;
                Ok(known.filter(|known| known.fits(config)))
            }
            Err(cause) => Err(CalibrationError::Read { path, cause }),
        }
    }

    /// The file beside the model at `model`: its name with `.calibration.json` for an extension, or, where that is a folder,
    /// `calibration.json` in it.
    #[must_use]
    pub fn path(model: &Path) -> PathBuf {
        if model.is_dir() { model.join("calibration.json") } else { model.with_extension("calibration.json") }
    }

    /// Writes the file at `path`; whoever reads it meanwhile sees the old one or the new one.
    ///
    /// # Errors
    /// [`CalibrationError::Write`].
    pub fn write(&self, path: &Path) -> Result<(), CalibrationError> {
        let failed = |cause| CalibrationError::Write { path: path.to_owned(), cause };
        let text = serde_json::to_string(self).map_err(|cause| failed(cause.into()))?;
        let partial = path.with_extension("partial");
        fs::write(&partial, text + "\n").map_err(failed)?;
        fs::rename(&partial, path).map_err(failed)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, CalibrationError> {
        let parsed: Self =
            serde_json::from_str(text).map_err(|cause| CalibrationError::Parse { path: path.to_owned(), cause })?;
        let damaged = |why| Err(CalibrationError::Damaged { path: path.to_owned(), why });
        if parsed.version != VERSION {
            return damaged("it is of another version");
        }
        let heads = parsed.layers.checked_mul(parsed.kv_heads);
        if parsed.head_dim == 0
            || heads.and_then(|heads| heads.checked_mul(parsed.head_dim)) != Some(parsed.scores.len())
        {
            return damaged("it has not one score a channel");
        }
        if parsed.scores.iter().any(|&score| !(score.is_finite() && score >= 0.0)) {
            return damaged("a score is no number ≥ 0");
        }
        Ok(parsed)
    }

    fn fits(&self, config: &ModelConfig) -> bool {
        [self.layers, self.kv_heads, self.head_dim] == [config.layers, config.kv_heads, config.head_dim]
    }

    /// The scores, [layers · kv_heads · D].
    ///
    /// # Errors
    /// [`DesignError::Core`] where it is that of a model of another shape than `config`.
    pub fn scores(&self, config: &ModelConfig) -> Result<&[f32], DesignError> {
        if self.fits(config) {
            return Ok(&self.scores);
        }
        let expected = config.layers * config.kv_heads * config.head_dim;
        Err(Error::Length { what: "scores of the calibration", expected, actual: self.scores.len() }.into())
    }

    /// One budget spread over the layers of a model of shape `config` instead of over its heads: a λ for each layer with which
    /// its heads keep T, a multiple of `multiple`, and all together at most as much as at `lambda` everywhere. A layer's heads
    /// count together, their best channels first.
    ///
    /// # Errors
    /// As [`scores`](Self::scores); [`DesignError::Lambda`] where the budget does not go round, [`DesignError::Core`] where
    /// the multiple is none or the layers take more runs than a table has.
    pub fn layers(&self, config: &ModelConfig, lambda: Lambda, multiple: usize) -> Result<LayerTable, DesignError> {
        let (scores, d) = (self.scores(config)?, config.head_dim);
        let mut sums = vec![0.0; config.layers * d];
        for (sums, layer) in sums.chunks_exact_mut(d).zip(scores.chunks_exact(config.kv_heads * d)) {
            for head in layer.chunks_exact(d) {
                sums.iter_mut().zip(head).for_each(|(sum, score)| *sum += score);
            }
        }
        let grid = Grid { head_dim: d, minimum: MIN_KEPT.min(d), multiple };
        let mut kept = vec![0; config.layers];
        distribute(&sums, grid, lambda, &mut kept)?;
        let mut table = LayerTable::default();
        for kept in kept {
            // The least λ that prunes so many.
            let pruned = d - usize::from(kept);
            let lambda = Lambda::from_per_mille((1000 * pruned).div_ceil(d) as u16)?;
            let needed = config.layers;
            let full = |_| Error::Capacity { what: "runs of a table of layers", needed, capacity: MAX_RUNS };
            table.push(1, lambda).map_err(full)?;
        }
        Ok(table)
    }

    /// Windows of text that were averaged.
    #[must_use]
    pub fn windows(&self) -> usize {
        self.windows
    }

    /// Tokens of each.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

/// T of each head from `scores` ([`adaptive::distribute`]), λ being to blame where the budget does not go round.
pub(super) fn distribute(scores: &[f32], grid: Grid, lambda: Lambda, kept: &mut [u16]) -> Result<(), DesignError> {
    adaptive::distribute(scores, grid, lambda, kept).map_err(|error| match error {
        Error::Capacity { .. } => DesignError::Lambda { lambda },
        error => DesignError::Core(error),
    })
}

/// To five significant digits.
fn round(x: f32) -> f32 {
    format!("{x:.4e}").parse().unwrap_or(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Architecture, policy::CacheDesign, weights::fixture};
    use thinkey_core::{Policy, policy::Choice};

    /// Two layers of two heads of 16 channels: the second layer's scores are ten times those of the first.
    #[test]
    fn layers_share_one_budget() {
        let config = fixture::config(Architecture::Llama);
        let score = |at: usize| (16 - at % 16) as f32 * if at < 32 { 1.0 } else { 10.0 };
        let calibration = Calibration {
            version: VERSION,
            model: None,
            layers: 2,
            kv_heads: 2,
            head_dim: 16,
            windows: 1,
            tokens: 100,
            scores: (0..64).map(score).collect(),
        };
        for (per_mille, multiple, expected) in [
            (250, 1, [8, 16]),
            (250, 8, [8, 16]),
            (500, 1, [8, 8]),
            (0, 8, [16, 16]),
            (437, 1, [8, 12]),
            (125, 1, [12, 16]),
        ] {
            let lambda = Lambda::from_per_mille(per_mille).unwrap();
            let table = calibration.layers(&config, lambda, multiple).unwrap();
            let policy = Policy { choice: Choice::Layers { table }, ..Policy::FULL };
            let design = CacheDesign::new(policy, &config, None).unwrap();
            let kept: Vec<_> = (0..4).map(|at| design.kept(at / 2, at % 2)).collect();
            assert!(kept.iter().sum::<usize>() <= 4 * lambda.kept(16), "{per_mille}: {kept:?}");
            assert_eq!(kept, [expected[0], expected[0], expected[1], expected[1]], "{per_mille} {multiple}");
        }
        let lambda = Lambda::from_per_mille(900).unwrap();
        assert_eq!(calibration.layers(&config, lambda, 8), Err(DesignError::Lambda { lambda }));
        assert!(matches!(calibration.layers(&config, Lambda::WHOLE, 0), Err(DesignError::Core(Error::Kept { .. }))));
    }
}
