//! Writes GGUF files: what thinkey makes small models for tests with.

use super::gguf::FORMAT_IDS;
use crate::model::config::ModelConfig;
use bytes::Bytes;
use thinkey_kernels::format::{Matrix, WeightFormat};

/// A metadata value of one of the types that models are described with.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaValue {
    /// A number.
    U32(u32),
    /// A floating-point number.
    F32(f32),
    /// A truth value.
    Bool(bool),
    /// Text.
    Text(String),
    /// An array of numbers.
    I32s(Vec<i32>),
    /// An array of floating-point numbers.
    F32s(Vec<f32>),
    /// An array of text.
    Texts(Vec<String>),
}

macro_rules! from {
    ($($type:ty => $variant:ident),* $(,)?) => {$(
        impl From<$type> for MetaValue {
            fn from(value: $type) -> Self {
                Self::$variant(value.into())
            }
        }
    )*};
}

from! { u32 => U32, f32 => F32, bool => Bool, &str => Text, String => Text, Vec<i32> => I32s, Vec<f32> => F32s,
Vec<String> => Texts }

impl MetaValue {
    /// Appends type and value.
    fn write(&self, out: &mut Vec<u8>) {
        fn array<T>(out: &mut Vec<u8>, kind: u32, items: &[T], mut write: impl FnMut(&mut Vec<u8>, &T)) {
            out.extend(9_u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((items.len() as u64).to_le_bytes());
            items.iter().for_each(|item| write(out, item));
        }
        let mut scalar = |kind: u32, bytes: &[u8]| {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        };
        match self {
            Self::U32(value) => scalar(4, &value.to_le_bytes()),
            Self::F32(value) => scalar(6, &value.to_le_bytes()),
            Self::Bool(value) => scalar(7, &[u8::from(*value)]),
            Self::Text(value) => {
                scalar(8, &[]);
                text(out, value);
            }
            Self::I32s(items) => array(out, 5, items, |out, item| out.extend(item.to_le_bytes())),
            Self::F32s(items) => array(out, 6, items, |out, item| out.extend(item.to_le_bytes())),
            Self::Texts(items) => array(out, 8, items, |out, item| text(out, item)),
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A GGUF v3 file in the making.
///
/// ```
/// # use thinkey::weights::GgufWriter;
/// let mut file = GgufWriter::default();
/// file.set("general.architecture", "llama").set("llama.block_count", 2_u32);
/// file.vector("output_norm.weight", &[1.0; 64]);
/// assert!(file.to_bytes().starts_with(b"GGUF"));
/// ```
#[derive(Clone, Debug, Default)]
pub struct GgufWriter {
    metadata: Vec<(String, MetaValue)>,
    tensors: Vec<Stored>,
}

#[derive(Clone, Debug)]
struct Stored {
    name: String,
    /// Innermost extent first.
    extents: Vec<u64>,
    format: WeightFormat,
    bytes: Bytes,
}

impl GgufWriter {
    /// Bytes that every tensor's offset is a multiple of.
    const ALIGNMENT: usize = 32;

    /// A file that describes the shape of `config`, rotary frequencies being the plain powers of `theta`.
    /// Weights, [by their names](super::Role::gguf_name), and a tokenizer are still to be added.
    #[must_use]
    pub fn for_model(config: &ModelConfig, theta: f32) -> Self {
        let prefix = config.architecture.gguf_name();
        let mut file = Self::default();
        file.set("general.architecture", prefix);
        if let Some(name) = &config.name {
            file.set("general.name", name.as_str());
        }
        let numbers = [
            ("block_count", config.layers),
            ("context_length", config.context),
            ("embedding_length", config.width),
            ("feed_forward_length", config.feed_forward),
            ("vocab_size", config.vocab),
            ("attention.head_count", config.heads),
            ("attention.head_count_kv", config.kv_heads),
            ("attention.key_length", config.head_dim),
            ("attention.value_length", config.head_dim),
            ("rope.dimension_count", config.head_dim),
        ];
        let window = config.sliding_window.map(|window| ("attention.sliding_window", window));
        for (key, number) in numbers.into_iter().chain(window) {
            file.set(format!("{prefix}.{key}"), u32::try_from(number).unwrap_or(u32::MAX));
        }
        file.set(format!("{prefix}.attention.layer_norm_rms_epsilon"), config.rms_eps);
        file.set(format!("{prefix}.rope.freq_base"), theta);
        file
    }

    /// Sets a metadata value, in place of one of the same key.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<MetaValue>) -> &mut Self {
        let (key, value) = (key.into(), value.into());
        match self.metadata.iter_mut().find(|(known, _)| *known == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key, value)),
        }
        self
    }

    /// Adds a matrix in its format, in place of a tensor of the same name.
    pub fn matrix(&mut self, name: impl Into<String>, matrix: &Matrix) -> &mut Self {
        let extents = vec![matrix.cols() as u64, matrix.rows() as u64];
        let bytes = Bytes::copy_from_slice(matrix.bytes());
        self.push(Stored { name: name.into(), extents, format: matrix.format(), bytes })
    }

    /// Adds a vector as F32, in place of a tensor of the same name.
    pub fn vector(&mut self, name: impl Into<String>, vector: &[f32]) -> &mut Self {
        let extents = vec![vector.len() as u64];
        let bytes = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.push(Stored { name: name.into(), extents, format: WeightFormat::F32, bytes })
    }

    fn push(&mut self, tensor: Stored) -> &mut Self {
        match self.tensors.iter_mut().find(|known| known.name == tensor.name) {
            Some(old) => *old = tensor,
            None => self.tensors.push(tensor),
        }
        self
    }

    /// The file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            value.write(&mut out);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.extents.len() as u32).to_le_bytes());
            out.extend(tensor.extents.iter().flat_map(|extent| extent.to_le_bytes()));
            let id = FORMAT_IDS.iter().find(|(_, format)| *format == tensor.format);
            out.extend(id.expect("every format has a number").0.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += tensor.bytes.len().next_multiple_of(Self::ALIGNMENT);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(Self::ALIGNMENT), 0);
            out.extend(&tensor.bytes);
        }
        out
    }
}
