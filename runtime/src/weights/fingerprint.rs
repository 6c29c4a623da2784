//! A digest that tells models apart, without reading all of their weights.

use super::Checkpoint;
use crate::model::config::Pairing;
use sha2::{Digest, Sha256};

/// Bytes of a tensor that are read from its start, its middle and its end.
const SAMPLE: usize = 256;

impl Checkpoint {
    /// A digest of the model: of its shape, and of names, formats and some bytes of all tensors. A model that was trained
    /// further, or stored in another format, has another.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 16] {
        let mut digest = Sha256::new();
        let config = self.config();
        digest.update(config.architecture.gguf_name());
        for number in [config.heads, config.kv_heads, config.head_dim, config.sliding_window.unwrap_or_default()] {
            digest.update((number as u64).to_le_bytes());
        }
        digest.update([u8::from(config.rope.pairing == Pairing::Interleaved)]);
        config.rope.inv_freq.iter().chain([&config.rms_eps]).for_each(|number| digest.update(number.to_le_bytes()));
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_unstable_by_key(|tensor| &tensor.name);
        for tensor in tensors {
            digest.update(&tensor.name);
            digest.update(tensor.format.name());
            tensor.shape.iter().for_each(|&extent| digest.update((extent as u64).to_le_bytes()));
            let bytes = &tensor.bytes[..];
            let last = bytes.len().saturating_sub(SAMPLE);
            for start in [0, last / 2, last] {
                digest.update(&bytes[start..bytes.len().min(start + SAMPLE)]);
            }
        }
        let all: [u8; 32] = digest.finalize().into();
        let mut half = [0; 16];
        half.copy_from_slice(&all[..16]);
        half
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::Architecture,
        weights::{Role, fixture},
    };
    use std::path::Path;

    #[test]
    fn other_weights_and_other_shapes_have_others() {
        let config = fixture::config(Architecture::Llama);
        let of = |file: &mut super::super::GgufWriter| {
            Checkpoint::from_gguf(Path::new("m.gguf"), file.to_bytes().into()).unwrap().fingerprint()
        };
        let whole = of(&mut fixture::gguf(&config));
        assert_eq!(whole, of(&mut fixture::gguf(&config)));
        let mut norm = fixture::values(&config, Role::OutputNorm);
        norm[5] += 0.5;
        let mut other = fixture::gguf(&config);
        other.vector("output_norm.weight", &norm);
        assert_ne!(whole, of(&mut other));
        let mut wide = config.clone();
        wide.rms_eps *= 2.0;
        assert_ne!(whole, of(&mut fixture::gguf(&wide)));
    }
}
