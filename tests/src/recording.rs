//! Recorded reference tensors: one decode step after a prompt, by an independent f32 implementation.
//!
//! A recording is a safetensors file. For some layers i it holds the prompt's keys and values (`L{i}.K`, `L{i}.V`,
//! [KV heads, tokens, D], after RoPE), its last queries (`L{i}.Qwin`, [query heads, window, D]), the decode step's
//! `decode_q`, `decode_k`, `decode_v`, and what ThinK makes of them: `score.think`, `keep.think.{λ}`,
//! `attn_out.none`, `attn_out.think.{λ}`.

use safetensors::{Dtype, SafeTensors};
use std::path::{Path, PathBuf};

/// A recording, in memory.
#[derive(Debug)]
pub struct Recording {
    /// Where it came from.
    pub path: PathBuf,
    bytes: Vec<u8>,
}

/// A tensor of a recording.
#[derive(Clone, Debug)]
pub struct Tensor<T> {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Numbers in row-major order.
    pub data: Vec<T>,
}

impl Recording {
    /// The recordings to test against: the slice in the repository and every file named in the environment variable
    /// `THINKEY_FIXTURES` (separated as in `PATH`).
    ///
    /// # Panics
    /// Where a file cannot be read: a test that silently tests less is worse than one that fails.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/wiki1200-layer15-head1.safetensors");
        let named = std::env::var_os("THINKEY_FIXTURES").unwrap_or_default();
        std::iter::once(own)
            .chain(std::env::split_paths(&named).filter(|path| !path.as_os_str().is_empty()))
            .map(|path| Self::open(&path))
            .collect()
    }

    /// The recording in a file.
    ///
    /// # Panics
    /// Where it cannot be read.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path: path.to_owned(), bytes }
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))
    }

    /// The layers recorded, ascending.
    #[must_use]
    pub fn layers(&self) -> Vec<usize> {
        let mut layers: Vec<usize> = self
            .file()
            .names()
            .iter()
            .filter_map(|name| name.strip_prefix('L')?.strip_suffix(".K")?.parse().ok())
            .collect();
        layers.sort_unstable();
        layers
    }

    /// Whether tensor `name` is recorded.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.file().tensor(name).is_ok()
    }

    /// An f32 tensor.
    ///
    /// # Panics
    /// Where it is missing or of another type.
    #[must_use]
    pub fn floats(&self, name: &str) -> Tensor<f32> {
        self.tensor(name, Dtype::F32, |bytes: [u8; 4]| f32::from_le_bytes(bytes))
    }

    /// An integer tensor (i32 or i64).
    ///
    /// # Panics
    /// Where it is missing or of another type.
    #[must_use]
    pub fn integers(&self, name: &str) -> Tensor<usize> {
        let of = |x: i64| usize::try_from(x).expect("indices are not negative");
        match self.file().tensor(name).map(|view| view.dtype()) {
            Ok(Dtype::I32) => self.tensor(name, Dtype::I32, |bytes: [u8; 4]| of(i32::from_le_bytes(bytes).into())),
            _ => self.tensor(name, Dtype::I64, |bytes: [u8; 8]| of(i64::from_le_bytes(bytes))),
        }
    }

    fn tensor<T, const N: usize>(&self, name: &str, dtype: Dtype, read: impl Fn([u8; N]) -> T) -> Tensor<T> {
        let file = self.file();
        let view = file.tensor(name).unwrap_or_else(|error| panic!("{}: {name}: {error}", self.path.display()));
        assert_eq!(view.dtype(), dtype, "{}: {name}", self.path.display());
        let data = view.data().as_chunks::<N>().0.iter().map(|&bytes| read(bytes)).collect();
        Tensor { shape: view.shape().to_vec(), data }
    }
}

impl<T> Tensor<T> {
    /// The `index`-th part of the outermost dimension.
    ///
    /// # Panics
    /// Where there is none.
    #[must_use]
    pub fn part(&self, index: usize) -> &[T] {
        let len = self.data.len() / self.shape[0];
        &self.data[index * len..(index + 1) * len]
    }
}
