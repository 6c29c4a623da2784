//! How much each channel of each head matters, measured once for a model and kept beside it.

use crate::{model::ModelConfig, weights::Checkpoint};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use thinkey_core::{Error, channel::adaptive};

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

    /// Windows of text that were averaged.
    #[must_use]
    pub fn windows(&self) -> usize {
        self.windows
    }
}

/// To five significant digits.
fn round(x: f32) -> f32 {
    format!("{x:.4e}").parse().unwrap_or(x)
}
