//! What can be wrong with a model's files.

use super::{gguf::GgufError, safetensors::SafetensorsError, tensor::TensorError};
use crate::model::config::ConfigError;
use std::{
    io,
    path::{Path, PathBuf},
};

/// Why a model could not be opened or a weight not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The operating system refused to open, list or map a path.
    #[error("cannot read {}: {cause}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the operating system says.
        cause: io::Error,
    },
    /// Neither a regular file nor a folder.
    #[error("{} is neither a file nor a folder", path.display())]
    NotAFile {
        /// As given.
        path: PathBuf,
    },
    /// A file of the other kind was given where its folder is needed.
    #[error("{}: to open a safetensors model, give the folder that holds config.json and the weights", path.display())]
    BareSafetensors {
        /// As given.
        path: PathBuf,
    },
    /// A folder without a model.
    #[error(
        "{} holds no model: neither model.safetensors, nor model.safetensors.index.json, nor a .gguf file",
        path.display()
    )]
    NoModel {
        /// The folder.
        path: PathBuf,
    },
    /// A folder with more than one GGUF file.
    #[error("{} holds {} .gguf files; give the path of one: {}", path.display(), files.len(), first(files))]
    Ambiguous {
        /// The folder.
        path: PathBuf,
        /// Names of the files, sorted.
        files: Vec<String>,
    },
    /// A GGUF file that cannot be used.
    #[error("{}: {problem}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: GgufError,
    },
    /// A safetensors file, its index or its `config.json` that cannot be used.
    #[error("{}: {problem}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: SafetensorsError,
    },
    /// A model whose shape cannot run here.
    #[error("{}: {problem}", path.display())]
    Config {
        /// The file that says so.
        path: PathBuf,
        /// What is wrong with the shape.
        problem: ConfigError,
    },
    /// A tensor that is missing, superfluous or not what the model's shape asks for.
    #[error("{}: {problem}", path.display())]
    Tensor {
        /// File or folder of the model.
        path: PathBuf,
        /// What is wrong with the tensor.
        problem: TensorError,
    },
}

impl WeightsError {
    /// What is wrong with the GGUF file at `path`.
    pub(super) fn gguf(path: &Path, problem: GgufError) -> Self {
        let path = path.to_owned();
        match problem {
            GgufError::Config(problem) => Self::Config { path, problem },
            GgufError::Tensor(problem) => Self::Tensor { path, problem },
            problem => Self::Gguf { path, problem },
        }
    }

    /// What is wrong with the file at `path` of a Hugging Face folder.
    pub(super) fn safetensors(path: &Path, problem: SafetensorsError) -> Self {
        let path = path.to_owned();
        match problem {
            SafetensorsError::Config(problem) => Self::Config { path, problem },
            problem => Self::Safetensors { path, problem },
        }
    }
}

/// The first few names of a list.
fn first(files: &[String]) -> String {
    const SHOWN: usize = 8;
    let more = if files.len() > SHOWN { ", …" } else { "" };
    files[..files.len().min(SHOWN)].join(", ") + more
}
