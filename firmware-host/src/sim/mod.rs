//! A board that is not there: what fits it, how long it takes, and what happens when memory goes or power is cut.
//!
//! A [`Scenario`] names a [`Board`], a model (a file, or a shape of which there are no weights), cache policies, a script of
//! requests with what goes wrong meanwhile, and what has to come out. Memory is counted by the planner, to the byte as the
//! runtime allocates it. Time is estimated from below, by the bytes that have to be read and the board's bandwidth; the
//! arithmetic of a prompt takes longer than that.
//!
//! With a `[link]`, the requests go over a [line](link) on which things go wrong, between the real ends of it, and every token
//! that arrives is compared with the one that was sent.
//!
//! ```
//! use std::path::Path;
//! use thinkey_firmware_host::sim::{self, Scenario};
//!
//! let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios/orin-nano-8gb-long-prompt.toml");
//! let report = sim::run(&Scenario::read(&path)?, path.parent().unwrap(), &mut |_, _| {})?;
//! let [full, balanced] = &report.policies[..] else { panic!("it names two policies") };
//! assert!(!full.fits && balanced.fits);
//! # Ok::<(), sim::SimError>(())
//! ```

mod board;
mod html;
pub mod link;
mod report;
mod run;
mod scenario;
mod time;
mod wire;

pub use board::{Board, SHIPPED as BOARDS};
pub use html::page;
pub use link::Weather;
pub use report::{Answer, Broken, Check, LinkReport, Parts, PolicyReport, Report, Sample};
pub use run::run;
pub use scenario::{Cut, Expect, Request, Scenario, Shrink};
pub use time::Time;
pub use wire::{Faults, Wire};

use serde::de::DeserializeOwned;
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use thinkey::{
    eval::EvalError,
    plan::{ModelShape, ShapeError},
    policy::{CalibrationError, DesignError},
    weights::WeightsError,
};
use thinkey_core::{policy::PolicyError, trace::TraceError};

/// Model shapes that ship with the program, by the names that scenarios use.
pub const MODELS: [(&str, &str); 2] = [
    ("llama-3.1-8b", include_str!("../../models/llama-3.1-8b.toml")),
    ("smollm2-135m", include_str!("../../models/smollm2-135m.toml")),
];

/// Why a scenario cannot be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SimError {
    /// A file.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A file is no TOML, or has other fields.
    #[error("{}: {cause}", path.display())]
    Toml {
        /// Its path.
        path: PathBuf,
        /// Why, and where.
        cause: Box<toml::de::Error>,
    },
    /// A file is no trace.
    #[error("{}: {cause}", path.display())]
    Trace {
        /// Its path.
        path: PathBuf,
        /// Why.
        cause: TraceError,
    },
    /// A scenario contradicts itself.
    #[error("{}: {what}", path.display())]
    Scenario {
        /// Its path.
        path: PathBuf,
        /// In what.
        what: String,
    },
    /// Nothing has this name.
    #[error("there is no {kind} {name:?}: name a TOML file, or one of {known}")]
    Unknown {
        /// What was looked for.
        kind: &'static str,
        /// By this name.
        name: String,
        /// What there is.
        known: String,
    },
    /// A board that cannot be.
    #[error("the board {board:?} cannot be: {what}")]
    Board {
        /// Its name.
        board: String,
        /// Why.
        what: String,
    },
    /// A shape that cannot be.
    #[error("the model {model:?} cannot be: {cause}")]
    Shape {
        /// Its name.
        model: String,
        /// Why.
        cause: ShapeError,
    },
    /// A model's file.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A model's calibration.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    /// A policy's text.
    #[error("policy {policy:?}: {cause}")]
    Policy {
        /// As the scenario writes it.
        policy: String,
        /// Why it is none.
        cause: PolicyError,
    },
    /// A policy that the model cannot have, or a cache that cannot be.
    #[error("policy {policy:?}: {cause}")]
    Design {
        /// As the scenario writes it.
        policy: String,
        /// Why.
        cause: DesignError,
    },
    /// A plot.
    #[error(transparent)]
    Plot(#[from] EvalError),
}

/// What `name` says: one of `shipped`, or a TOML file beside `home`.
fn named<T: DeserializeOwned>(
    kind: &'static str,
    shipped: &[(&str, &str)],
    name: &str,
    home: &Path,
) -> Result<T, SimError> {
    let (text, path) = match shipped.iter().find(|(known, _)| *known == name) {
        Some((_, text)) => ((*text).to_owned(), PathBuf::from(name)),
        None if name.ends_with(".toml") => {
            let path = home.join(name);
            (fs::read_to_string(&path).map_err(|cause| SimError::Read { path: path.clone(), cause })?, path)
        }
        None => {
            let known = shipped.iter().map(|(known, _)| *known).collect::<Vec<_>>().join(", ");
            return Err(SimError::Unknown { kind, name: name.to_owned(), known });
        }
    };
    toml::from_str(&text).map_err(|cause| SimError::Toml { path, cause: Box::new(cause) })
}

/// The shape of a shipped name, or of a TOML file beside `home`.
fn shape(name: &str, home: &Path) -> Result<ModelShape, SimError> {
    named("model", &MODELS, name, home)
}
