//! Model files: opened in milliseconds, checked before the first weight is used, never copied.
//!
//! [`Checkpoint`] opens a GGUF file or a Hugging Face folder and hands out weights by their [`Role`] in the model.
//! Files are memory-mapped and weights stay in the format of their file. Whatever is wrong with a file is found when it
//! is opened: a header that lies, tensors that are missing, cut off, of another shape or of an unknown format, and also
//! tensors and settings that would change what the model computes but that nothing here would use.

mod checkpoint;
mod cursor;
mod error;
mod fingerprint;
#[cfg(test)]
pub(crate) mod fixture;
mod gguf;
mod gguf_model;
mod hf_config;
mod map;
mod metadata;
mod role;
mod safetensors;
mod tensor;
#[cfg(test)]
mod tests;
mod tokenizer;
mod write;

pub use checkpoint::{Checkpoint, Kind, TensorInfo};
pub use cursor::Short;
pub use error::WeightsError;
pub use gguf::GgufError;
pub use map::{Mapped, Maps};
pub use metadata::MetadataError;
pub use role::{LayerRole, Role};
pub use safetensors::SafetensorsError;
pub use tensor::{Extents, TensorError};
pub use tokenizer::{GgufTokenizer, TokenizerSource};
pub use write::{GgufWriter, MetaValue};
