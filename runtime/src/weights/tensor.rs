//! Tensors as their file stores them.

use bytes::Bytes;
use std::{borrow::Cow, collections::HashMap, fmt};
use thinkey_kernels::format::{Matrix, MatrixError, WeightFormat};

/// Element format of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// One that can be computed with.
    Known(WeightFormat),
    /// One that cannot, by the name people know it by.
    Unknown(Cow<'static, str>),
}

impl Format {
    /// The name people know it by.
    pub fn name(&self) -> &str {
        match self {
            Self::Known(format) => format.name(),
            Self::Unknown(name) => name,
        }
    }
}

/// A tensor of a file.
#[derive(Clone)]
pub(super) struct Tensor {
    /// Name in the file.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Element format.
    pub format: Format,
    /// Its share of the file. Empty where a GGUF format is unknown, because then so is the length.
    pub bytes: Bytes,
}

impl Tensor {
    /// Refuses another shape than `expected`, formats that are not supported, and vectors in a block format.
    pub fn check(&self, expected: &[usize]) -> Result<(), TensorError> {
        let name = || self.name.clone();
        if self.shape != expected {
            let (expected, found) = (Extents(expected.into()), Extents(self.shape.clone()));
            return Err(TensorError::Shape { name: name(), expected, found });
        }
        match (&self.format, expected) {
            (Format::Unknown(found), _) => Err(TensorError::Format { name: name(), found: found.to_string() }),
            (Format::Known(format), [_]) if format.block_len() > 1 => {
                Err(TensorError::VectorFormat { name: name(), found: format.name() })
            }
            _ => Ok(()),
        }
    }

    /// The tensor as a matrix, sharing its bytes.
    pub fn matrix(&self) -> Result<Matrix, TensorError> {
        match (&self.format, &self.shape[..]) {
            (&Format::Known(format), &[rows, cols]) => Matrix::new(format, rows, cols, self.bytes.clone())
                .map_err(|problem| TensorError::Matrix { name: self.name.clone(), problem }),
            (Format::Unknown(found), _) => {
                Err(TensorError::Format { name: self.name.clone(), found: found.to_string() })
            }
            _ => Err(self.rank(2)),
        }
    }

    /// The tensor as a vector of f32.
    pub fn vector(&self) -> Result<Vec<f32>, TensorError> {
        let &[_] = &self.shape[..] else { return Err(self.rank(1)) };
        let pairs = || self.bytes.as_chunks::<2>().0.iter().copied();
        match &self.format {
            Format::Known(WeightFormat::F32) => {
                Ok(self.bytes.as_chunks::<4>().0.iter().copied().map(f32::from_le_bytes).collect())
            }
            Format::Known(WeightFormat::F16) => Ok(pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect()),
            Format::Known(WeightFormat::Bf16) => Ok(pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect()),
            Format::Known(found) => Err(TensorError::VectorFormat { name: self.name.clone(), found: found.name() }),
            Format::Unknown(found) => Err(TensorError::Format { name: self.name.clone(), found: found.to_string() }),
        }
    }

    fn rank(&self, expected: usize) -> TensorError {
        TensorError::Rank { name: self.name.clone(), expected, found: Extents(self.shape.clone()) }
    }
}

/// The tensors of a model in the order of its files, findable by name.
#[derive(Default)]
pub(super) struct Tensors {
    list: Vec<Tensor>,
    index: HashMap<String, usize>,
}

impl Tensors {
    /// Adds a tensor; gives it back where the name is taken.
    pub fn push(&mut self, tensor: Tensor) -> Result<(), Tensor> {
        if self.index.contains_key(&tensor.name) {
            return Err(tensor);
        }
        self.index.insert(tensor.name.clone(), self.list.len());
        self.list.push(tensor);
        Ok(())
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.index.get(name).map(|&at| &self.list[at])
    }

    /// The tensor called `name`.
    pub fn need(&self, name: &str) -> Result<&Tensor, TensorError> {
        self.get(name).ok_or_else(|| TensorError::Missing { name: name.to_owned() })
    }

    /// All tensors in the order of the file.
    pub fn iter(&self) -> std::slice::Iter<'_, Tensor> {
        self.list.iter()
    }
}

/// Extents of a tensor, outermost first; shown as `49152×576`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extents(pub Vec<usize>);

impl fmt::Display for Extents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (axis, extent) in self.0.iter().enumerate() {
            write!(f, "{}{extent}", if axis == 0 { "" } else { "×" })?;
        }
        Ok(())
    }
}

/// What is wrong with a tensor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The model needs a tensor that the file does not have.
    #[error("tensor {name:?} is missing; the file is incomplete or of another kind of model")]
    Missing {
        /// Name in the vocabulary of the file.
        name: String,
    },
    /// A tensor does not have the shape that follows from the model's configuration.
    #[error("tensor {name:?} is {found}, but the model's configuration asks for {expected}")]
    Shape {
        /// Name in the file.
        name: String,
        /// By the configuration.
        expected: Extents,
        /// In the file.
        found: Extents,
    },
    /// A format that cannot be computed with.
    #[error("tensor {name:?} is stored as {found}, which is not supported; supported are {}", supported())]
    Format {
        /// Name in the file.
        name: String,
        /// Format in the file.
        found: String,
    },
    /// A norm or bias in a block format.
    #[error("tensor {name:?} is a vector stored as {found}; vectors must be F32, F16 or BF16")]
    VectorFormat {
        /// Name in the file.
        name: String,
        /// Format in the file.
        found: &'static str,
    },
    /// Its rows are no whole number of blocks.
    #[error("tensor {name:?}: {problem}")]
    Matrix {
        /// Name in the file.
        name: String,
        /// What does not fit.
        problem: MatrixError,
    },
    /// A vector was asked for as a matrix or the other way round.
    #[error("tensor {name:?} is {found}; it was asked for with {expected} axes")]
    Rank {
        /// Name in the file.
        name: String,
        /// Axes asked for.
        expected: usize,
        /// In the file.
        found: Extents,
    },
    /// A tensor that the model would ignore, although it was made to be used.
    #[error(
        "tensor {name:?} has no place in a {architecture} model of {layers} layers; ignoring it would change results"
    )]
    Unexpected {
        /// Name in the file.
        name: String,
        /// Family of the model.
        architecture: &'static str,
        /// Layers of the model.
        layers: usize,
    },
    /// Tied embeddings and an output projection that is different.
    #[error("the configuration ties the output projection to {embedding:?}, but {output:?} is another matrix")]
    Untied {
        /// Name of the embedding.
        embedding: String,
        /// Name of the output projection.
        output: String,
    },
}

/// Names of the formats that can be computed with.
fn supported() -> String {
    WeightFormat::ALL.map(WeightFormat::name).join(", ")
}
