//! A model's files, whatever their kind.

use super::{
    GgufError, Role, TensorError, TokenizerSource, WeightsError,
    gguf::Gguf,
    gguf_model,
    map::{self, Maps},
    metadata::Metadata,
    safetensors,
    tensor::{Tensor, Tensors},
};
use crate::model::config::ModelConfig;
use bytes::Bytes;
use std::{
    collections::HashSet,
    fmt, fs,
    path::{Path, PathBuf},
};
use thinkey_kernels::format::Matrix;

/// An open model: its shape, its weights and its tokenizer.
///
/// Weights are slices of the memory-mapped file; they live as long as the last [`Matrix`] made of them.
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    pub(super) tensors: Tensors,
    size: u64,
    source: Source,
    maps: Maps,
}

/// What depends on the kind of file.
enum Source {
    Gguf { version: u32, metadata: Metadata },
    HuggingFace { shards: usize },
}

/// Kind of a model's files; shown as `GGUF v3` or `safetensors, 2 shards`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A GGUF file.
    Gguf {
        /// Version of the format.
        version: u32,
    },
    /// A Hugging Face folder.
    Safetensors {
        /// Number of files that hold the weights.
        shards: usize,
    },
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gguf { version } => write!(f, "GGUF v{version}"),
            Self::Safetensors { shards: 1 } => f.write_str("safetensors"),
            Self::Safetensors { shards } => write!(f, "safetensors, {shards} shards"),
        }
    }
}

/// A tensor as its file has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Extents, outermost first.
    pub shape: &'a [usize],
    /// Element format (`F16`, `Q4_1`).
    pub format: &'a str,
    /// Length in bytes.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens a `.gguf` file, a Hugging Face folder, or a folder that holds exactly one `.gguf` file and no safetensors.
    ///
    /// Reads headers only, so it takes milliseconds; all that is needed to run the model is checked to be there.
    ///
    /// # Errors
    /// [`WeightsError`]: unreadable, damaged, cut off, or a model that cannot run here; see its variants.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let found = path.metadata().map_err(|cause| WeightsError::Io { path: path.to_owned(), cause })?;
        if !found.is_dir() {
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                return Err(WeightsError::BareSafetensors { path: path.to_owned() });
            }
            return Self::from_gguf_file(path);
        }
        if [safetensors::SINGLE, safetensors::INDEX].iter().any(|name| path.join(name).is_file()) {
            return Self::from_folder(path);
        }
        Self::from_gguf_file(&path.join(only_gguf(path)?))
    }

    fn from_gguf_file(path: &Path) -> Result<Self, WeightsError> {
        let mut maps = Maps::default();
        let file = map::map(path, &mut maps)?;
        Ok(Self { maps, ..Self::from_gguf(path, file)? })
    }

    /// A checkpoint of the GGUF file whose content is `file`; `path` is for messages.
    ///
    /// # Errors
    /// [`WeightsError`] as for [`open`](Self::open).
    pub fn from_gguf(path: &Path, file: Bytes) -> Result<Self, WeightsError> {
        let at = |problem: GgufError| WeightsError::gguf(path, problem);
        let gguf = Gguf::open(&file).map_err(at)?;
        let config = gguf_model::config(&gguf).map_err(at)?;
        let Gguf { version, metadata, tensors } = gguf;
        let source = Source::Gguf { version, metadata };
        Self { path: path.to_owned(), config, tensors, size: file.len() as u64, source, maps: Maps::default() }
            .checked()
    }

    fn from_folder(path: &Path) -> Result<Self, WeightsError> {
        let safetensors::Folder { config, tensors, shards, size, maps } = safetensors::open(path)?;
        Self { path: path.to_owned(), config, tensors, size, source: Source::HuggingFace { shards }, maps }.checked()
    }

    /// The checkpoint, if its tensors are those of its model: each there, in shape, and none that would be ignored.
    fn checked(self) -> Result<Self, WeightsError> {
        self.check().map_err(|problem| self.at(problem))?;
        Ok(self)
    }

    fn check(&self) -> Result<(), TensorError> {
        let config = &self.config;
        let mut used = HashSet::new();
        for role in Role::needed(config) {
            let tensor = self.tensors.need(&self.name(role))?;
            tensor.check(&role.shape(config))?;
            used.insert(tensor.name.as_str());
        }
        let output = self.name(Role::Output);
        for tensor in self.tensors.iter().filter(|tensor| !used.contains(tensor.name.as_str())) {
            if tensor.name == output {
                // A tied output that was saved all the same.
                let embedding = self.tensors.need(&self.name(Role::TokenEmbedding))?;
                if (&tensor.format, &tensor.bytes) != (&embedding.format, &embedding.bytes) {
                    return Err(TensorError::Untied { embedding: embedding.name.clone(), output });
                }
            } else if !self.is_harmless(tensor) {
                return Err(TensorError::Unexpected {
                    name: tensor.name.clone(),
                    architecture: config.architecture.gguf_name(),
                    layers: config.layers,
                });
            }
        }
        Ok(())
    }

    /// Whether the model computes the same without this tensor.
    fn is_harmless(&self, tensor: &Tensor) -> bool {
        match self.source {
            // Already in the configuration's frequencies.
            Source::Gguf { .. } if tensor.name == gguf_model::ROPE_FREQS => true,
            // Frequencies that old versions of transformers saved beside the configuration that they follow from.
            Source::HuggingFace { .. } if tensor.name.ends_with(".rotary_emb.inv_freq") => true,
            // Models retrofitted into a class that has more biases carry zeros there.
            _ => {
                tensor.name.ends_with(".bias") && !tensor.bytes.is_empty() && tensor.bytes.iter().all(|&byte| byte == 0)
            }
        }
    }

    /// Shape of the model.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// File or folder of the model.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Kind of its files.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self.source {
            Source::Gguf { version, .. } => Kind::Gguf { version },
            Source::HuggingFace { shards } => Kind::Safetensors { shards },
        }
    }

    /// Bytes of the files that hold the weights.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size
    }

    /// The memory maps of these files.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// All tensors in the order of their files.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|tensor| TensorInfo {
            name: &tensor.name,
            shape: &tensor.shape,
            format: tensor.format.name(),
            bytes: tensor.bytes.len() as u64,
        })
    }

    /// The tokenizer: copied out of a GGUF file, or the folder where it is described.
    ///
    /// # Errors
    /// [`WeightsError::Gguf`] where the metadata lacks a tokenizer or contradicts itself.
    pub fn tokenizer(&self) -> Result<TokenizerSource, WeightsError> {
        match &self.source {
            Source::Gguf { metadata, .. } => gguf_model::tokenizer(metadata, self.config.vocab)
                .map(TokenizerSource::Gguf)
                .map_err(|problem| WeightsError::gguf(&self.path, problem.into())),
            Source::HuggingFace { .. } => Ok(TokenizerSource::Folder(self.path.clone())),
        }
    }

    /// The matrix in that role, sharing the file's bytes. [`Role::Output`] is the embedding where they are tied.
    ///
    /// # Errors
    /// [`WeightsError::Tensor`] where the model has no such weight or it is a vector.
    pub fn matrix(&self, role: Role) -> Result<Matrix, WeightsError> {
        self.tensor(role).and_then(Tensor::matrix).map_err(|problem| self.at(problem))
    }

    /// The vector in that role (a norm or a bias), converted to f32.
    ///
    /// # Errors
    /// [`WeightsError::Tensor`] where the model has no such weight or it is a matrix.
    pub fn vector(&self, role: Role) -> Result<Vec<f32>, WeightsError> {
        self.tensor(role).and_then(Tensor::vector).map_err(|problem| self.at(problem))
    }

    fn tensor(&self, role: Role) -> Result<&Tensor, TensorError> {
        let role = if role == Role::Output && self.config.tied_embeddings { Role::TokenEmbedding } else { role };
        self.tensors.need(&self.name(role))
    }

    fn name(&self, role: Role) -> String {
        match self.source {
            Source::Gguf { .. } => role.gguf_name(),
            Source::HuggingFace { .. } => role.hugging_face_name(),
        }
    }

    fn at(&self, problem: TensorError) -> WeightsError {
        WeightsError::Tensor { path: self.path.clone(), problem }
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, config, size, .. } = self;
        let (kind, tensors) = (self.kind(), self.tensors.iter().len());
        write!(
            f,
            "Checkpoint {{ path: {path:?}, kind: {kind:?}, size: {size}, tensors: {tensors}, config: {config:?} }}"
        )
    }
}

/// Name of the one GGUF file in a folder.
fn only_gguf(folder: &Path) -> Result<String, WeightsError> {
    let io = |cause| WeightsError::Io { path: folder.to_owned(), cause };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let name = PathBuf::from(entry.map_err(io)?.file_name());
        if name.extension().is_some_and(|extension| extension == "gguf") {
            files.push(name.to_string_lossy().into_owned());
        }
    }
    files.sort();
    match files.len() {
        0 => Err(WeightsError::NoModel { path: folder.to_owned() }),
        1 => Ok(files.remove(0)),
        _ => Err(WeightsError::Ambiguous { path: folder.to_owned(), files }),
    }
}
